"""What a fork server imports first: importing this ends garbage collection there, and begins it anew in each fork.

Imports make objects that stay. To search them again and again takes a quarter of the time of importing, and in a forked
process it would copy every page that is shared with the others.
"""

import atexit
import gc
import os


def _collect_own() -> None:
    gc.freeze()
    gc.enable()


gc.disable()
os.register_at_fork(after_in_child=_collect_own)
atexit.register(gc.freeze)  # or the server would search all of it three times before it ends
