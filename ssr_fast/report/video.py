"""Overlay videos, frame by frame through OpenCV."""

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ssr_fast.data.images import BadFile
from ssr_fast.data.labels import ClassSet
from ssr_fast.errors import UserError
from ssr_fast.report.pictures import overlay

Predict = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

_USUAL_RATE = 25.0  # frames a second, for files that do not say it


def overlay_video(source: Path, target: Path, predict: Predict, classes: ClassSet) -> tuple[Path, int]:
    """Write <target>_overlay.mp4 with the predictions over the frames; no sound.

    Args:
        source: a video that OpenCV can read.
        target: path without ending; its folder is made.
        predict: RGB uint8 [H, W, 3] -> train ids uint8 [H, W].
        classes: the predictions' classes.

    Returns:
        (the path, frames written).

    Raises:
        BadFile: the video cannot be read.
        UserError: OpenCV cannot write videos here.
    """
    path = Path(f"{target}_overlay.mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp.mp4")
    reader = cv2.VideoCapture(str(source))
    try:
        frame = _next_frame(reader)
        if frame is None:
            raise BadFile(
                source, "cannot be read as a video", "convert it to mp4 with H.264, or give its frames as images"
            )
        rate = reader.get(cv2.CAP_PROP_FPS)
        frames = _write(part, reader, frame, rate if 0 < rate < 1000 else _USUAL_RATE, predict, classes)
        os.replace(part, path)
    finally:
        reader.release()
        part.unlink(missing_ok=True)
    return path, frames


def _next_frame(reader: cv2.VideoCapture) -> NDArray[np.uint8] | None:
    """The next frame as RGB [H, W, 3], None at the end."""
    good, frame = reader.read()
    return np.ascontiguousarray(frame[:, :, ::-1]).astype(np.uint8, copy=False) if good else None


def _write(
    path: Path,
    reader: cv2.VideoCapture,
    first: NDArray[np.uint8],
    rate: float,
    predict: Predict,
    classes: ClassSet,
) -> int:
    """Write this frame [H, W, 3] RGB and all that follow; how many."""
    size = (first.shape[1], first.shape[0])
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise UserError(
            f"{path.parent} takes no video: this OpenCV cannot write mp4, give the frames as images instead"
        )
    frames = 0
    frame: NDArray[np.uint8] | None = first
    try:
        while frame is not None:
            writer.write(np.ascontiguousarray(overlay(frame, predict(frame), classes)[:, :, ::-1]))
            frames += 1
            frame = _next_frame(reader)
    finally:
        writer.release()
    return frames
