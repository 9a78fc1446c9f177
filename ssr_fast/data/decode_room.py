"""How much may be decoded at once: many threads times large images would be more memory than a machine has."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssr_fast.data.images import MAX_PIXELS, opened

_LARGE = MAX_PIXELS // 16  # what the allocator keeps of images up to this size is no more than one of MAX_PIXELS
_BYTES = 3  # of a file that count as a pixel: some decoders read the file as a whole before they know its size


class DecodeRoom:
    """Lets threads decode side by side as long as their images have no more than MAX_PIXELS together.

    Sixteen images of 2048x1024 fit; one of MAX_PIXELS is decoded alone.
    """

    def __init__(self) -> None:
        self._free = MAX_PIXELS
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, path: Path) -> Iterator[None]:
        """The body runs once there is room for the image or label `path`.

        Raises:
            BadFile: the file cannot be opened, or is too large.
        """
        weight = _weight(path)
        with self._claimed(weight), opened(path) as image:
            width, height = image.size
        pixels = max(weight, width * height)
        with self._claimed(pixels):
            try:
                yield
            finally:
                if pixels > _LARGE:
                    _return_memory()

    @contextmanager
    def _claimed(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, MAX_PIXELS)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def _weight(path: Path) -> int:
    """The file's size in pixels; 0 if that cannot be told, which the decoder will name."""
    try:
        return os.stat(path).st_size // _BYTES
    except OSError:
        return 0


def _return_memory() -> None:
    """Give freed memory back to the system: glibc keeps it for each thread apart, which adds up over many threads."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and keep less
    if trim is not None:
        trim(0)
