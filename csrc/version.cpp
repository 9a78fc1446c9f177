#include "ssr.h"

SSR_EXPORT const char *ssr_version() { return SSR_SOURCES; }
