import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssr_fast.data.decode_room import DecodeRoom
from ssr_fast.data.images import MAX_PIXELS, BadFile
from tests.data.builders import picture, save


def black(path: Path, side: int) -> Path:
    Image.fromarray(np.zeros((side, side), np.uint8)).convert("1").save(path)
    return path


def most_at_once(room: DecodeRoom, path: Path, threads: int) -> int:
    """How many threads were in the room together, of as many as tried to be."""
    inside, most, lock = 0, 0, threading.Lock()
    full = threading.Barrier(threads)

    def enter() -> None:
        nonlocal inside, most
        with room.taken(path):
            with lock:
                inside += 1
                most = max(most, inside)
            try:
                full.wait(timeout=0.5)
            except threading.BrokenBarrierError:
                pass  # the others are not let in
            with lock:
                inside -= 1

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: enter(), range(threads)))
    return most


def test_small_images_are_decoded_together(tmp_path: Path) -> None:
    assert most_at_once(DecodeRoom(), save(tmp_path / "a.png", picture()), 16) == 16


def test_large_ones_wait_for_each_other(tmp_path: Path) -> None:
    side = int((MAX_PIXELS / 2.5) ** 0.5)
    room = DecodeRoom()
    assert most_at_once(room, black(tmp_path / "a.png", side), 5) == 2
    assert most_at_once(room, black(tmp_path / "b.png", int(MAX_PIXELS**0.5)), 3) == 1


def test_a_large_file_of_few_pixels_waits_too(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", picture())
    with path.open("ab") as file:
        file.truncate(MAX_PIXELS * 3)
    assert most_at_once(DecodeRoom(), path, 3) == 1


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_bad_files_leave_the_room_free(tmp_path: Path, content: bytes | None) -> None:
    path, room = tmp_path / "a.png", DecodeRoom()
    if content is not None:
        path.write_bytes(content)
    for _ in range(3):
        with pytest.raises(BadFile), room.taken(path):
            raise AssertionError("not reached")
    with pytest.raises(ZeroDivisionError), room.taken(black(tmp_path / "b.png", int(MAX_PIXELS**0.5))):
        raise ZeroDivisionError
    assert most_at_once(room, tmp_path / "b.png", 1) == 1
