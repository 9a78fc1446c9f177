#include "ssr.h"

SSR_EXPORT const char *ssr_cuda_version() { return SSR_SOURCES; }
