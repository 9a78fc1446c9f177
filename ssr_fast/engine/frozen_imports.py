"""Importing this keeps whatever is imported by then out of garbage collections: the last thing a fork server imports.

A collection in a forked process would copy every page that it shares with the others, and the server itself would
search all of it three times before it ends.
"""

import gc

gc.freeze()
