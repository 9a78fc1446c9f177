"""Makes the files of a feature store, image by image; the encoder stays in this thread, others read and write for it.

H W pixels, h w tokens, D channels.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.feature_map import Geometry
from ssr_fast.data.features import FeatureStore
from ssr_fast.data.images import BadFile, opened, read_image
from ssr_fast.data.stores import Outcome

Encode = Callable[[Path, NDArray[np.uint8]], tuple[NDArray[np.float32], Geometry]]
"""(path, RGB uint8 [H, W, 3]) -> features [h, w, D] and where they lie; raises BadFile for an image it cannot do."""


def make_features(
    store: FeatureStore, images: Sequence[Path], encode: Encode, threads: int, overwrite: bool = False
) -> Iterator[Outcome]:
    """Make every file that is missing, damaged or of an image of another size; in the images' order.

    Args:
        store: where the features go.
        images: paths of the images.
        encode: the encoder; called in this thread only, and not at all if nothing is to be made.
        threads: that look at what is there and read images ahead of the encoder, and write behind it; at least 1.
        overwrite: make the files that are there, too.

    Raises:
        UserError: the store cannot be written.
    """
    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[Outcome | _Read]] = deque()
    behind: deque[Callable[[], Outcome]] = deque()
    try:
        for number, image in enumerate(images):
            while len(ahead) <= 2 * threads and number + len(ahead) < len(images):
                ahead.append(pool.submit(_look, store, images[number + len(ahead)], overwrite))
            behind.append(_encode(pool, store, image, ahead.popleft().result(), encode))
            if len(behind) > threads:
                yield behind.popleft()()
        while behind:
            yield behind.popleft()()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Read:
    """An image that needs features, and why where a file was there."""

    pixels: NDArray[np.uint8]
    message: str


def _look(store: FeatureStore, image: Path, overwrite: bool) -> Outcome | _Read:
    """What is there for an image, else its pixels."""
    path, message = store.path(image), ""
    try:
        if not overwrite and os.path.lexists(path):
            with opened(image) as header:
                size = header.size
            problem = store.problem(image, size)
            if problem is None:
                return Outcome(image, "kept")
            message = f"the feature file {path} {problem}; it is made again"
        return _Read(read_image(image), message)
    except BadFile as error:
        return Outcome(image, "failed", str(error))


def _encode(
    pool: ThreadPoolExecutor, store: FeatureStore, image: Path, found: Outcome | _Read, encode: Encode
) -> Callable[[], Outcome]:
    """Encode an image, if it is to be, and start to write; waits for the outcome when called."""
    if isinstance(found, Outcome):
        return lambda: found
    try:
        features, geometry = encode(image, found.pixels)
    except BadFile as error:
        failed = Outcome(image, "failed", str(error))
        return lambda: failed
    return pool.submit(_write, store, image, features, geometry, found.message).result


def _write(
    store: FeatureStore, image: Path, features: NDArray[np.float32], geometry: Geometry, message: str
) -> Outcome:
    try:
        store.write(image, features, geometry)
    except BadFile as error:
        return Outcome(image, "failed", str(error))
    return Outcome(image, "made", message)
