"""Reports: pictures and the self-contained page."""
