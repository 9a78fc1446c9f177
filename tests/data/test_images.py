import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ssr_fast.data.images import (
    MAX_BYTES,
    MAX_SIDE,
    BadFile,
    decode_image,
    decode_label,
    decode_synthia_label,
    read_image,
)
from tests.data.builders import assert_sentence, ids, picture, save, save_palette, save_synthia

GREY = "greyscale, repeated over R, G, B"
DEEP = "16-bit, scaled to 8 bits (>> 8)"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(path: Path, width: int, height: int = 0) -> Path:
    header = struct.pack(">IIBBBBB", width, height or width, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_rgb_is_read_as_it_is_and_may_be_written_to(tmp_path: Path) -> None:
    image, notes = decode_image(save(tmp_path / "ä b.png", picture()))
    assert (image == picture()).all() and image.dtype == np.uint8 and notes == () and image.flags.writeable
    assert (read_image(str(tmp_path / "ä b.png")) == picture()).all()


def test_grey_is_repeated(tmp_path: Path) -> None:
    image, notes = decode_image(save(tmp_path / "g.png", picture()[..., 0]))
    assert (image == picture()[..., :1]).all() and image.shape == (8, 16, 3) and notes == (GREY,)


def test_palette_images_are_looked_up(tmp_path: Path) -> None:
    image, notes = decode_image(save_palette(tmp_path / "p.png", ids(7, 3)))
    assert tuple(image[0, 0]) == (128, 64, 128) and tuple(image[0, -1]) == (252, 1, 77)
    assert notes == ("palette files, converted to RGB",)


def test_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path: Path) -> None:
    with Image.open(save_palette(tmp_path / "p.png", ids(7, 3))) as image:
        image.save(tmp_path / "t.png", transparency=bytes([0] * 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuple(read_image(tmp_path / "t.png")[0, 0]) == (128, 64, 128)


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    rgba = np.dstack([picture(), np.zeros((8, 16), np.uint8)])
    image, notes = decode_image(save(tmp_path / "a.png", rgba))
    assert (image == picture()).all() and notes == ("RGBA, the alpha channel is dropped",)


def test_16_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    values = np.arange(128, dtype=np.uint16).reshape(8, 16) * 512  # dividing by 257 would give less
    image, notes = decode_image(save(tmp_path / "d.png", values))
    assert (image == (values >> 8).astype(np.uint8)[..., None]).all() and notes == (DEEP, GREY)


def test_16_bit_rgb_keeps_its_high_byte_and_is_noted(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (8, 16, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "d.png"), values[..., ::-1])
    image, notes = decode_image(tmp_path / "d.png")
    assert (image == (values >> 8).astype(np.uint8)).all() and notes == (DEEP,)


def test_cmyk_jpeg_is_converted(tmp_path: Path) -> None:
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "c.jpg")
    image, notes = decode_image(tmp_path / "c.jpg")
    assert image.shape == (8, 16, 3) and notes == ("CMYK, converted to RGB",)


def test_exif_rotation_is_not_applied_but_noted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "r.jpg", exif=exif)
    image, notes = decode_image(tmp_path / "r.jpg")
    assert image.shape == (8, 16, 3) and notes == ("rotated by an EXIF tag, which is not applied",)


def test_all_black_is_noted(tmp_path: Path) -> None:
    assert decode_image(save(tmp_path / "b.png", picture() * 0))[1] == ("all black",)


def test_32_bit_values_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "f.tif", np.ones((8, 16), np.float32))
    with pytest.raises(BadFile) as error:
        read_image(path)
    assert_sentence(error.value, path, "32-bit")


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "x.png"
    if kind == "truncated":
        whole = save(path, picture(width=200, height=100)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "flipped":
        whole = bytearray(save(path, picture(width=200, height=100)).read_bytes())
        whole[len(whole) // 2] ^= 0xFF
        path.write_bytes(whole)
    elif kind == "text":
        path.write_text("this is no picture\n")
    elif kind == "empty":
        path.touch()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "gone.png")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        path.write_bytes(b"RIFF\xff\xff\xff\xffWEBPVP8L")
        os.truncate(path, MAX_BYTES + 1)
    elif kind == "gif":
        Image.fromarray(picture()).save(path, "GIF")
    elif kind == "narrow":
        huge_png(path, 1, MAX_SIDE + 1)
    elif kind == "bomb":
        huge_png(path, 60000)
    elif kind == "large":
        huge_png(path, 10000)
    return path


DAMAGES = {
    "truncated": "cannot be decoded",
    "flipped": "cannot be decoded",
    "text": "is not an image file",
    "empty": "is empty",
    "loop": "symbolic links",
    "dangling": "No such file",
    "bomb": "too large",
    "large": "10000x10000",
    "missing": "No such file",
    "folder": "is a folder",
    "fifo": "not a regular file",
    "device": "not a regular file",
    "sparse": "too large (1073741825 bytes",
    "gif": "is not an image file",
    "narrow": "1x65536",
}


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("read", [read_image, decode_label, decode_synthia_label])
def test_damaged_files_are_named_with_the_reason(tmp_path: Path, kind: str, read) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(BadFile) as error:
        read(path)
    assert_sentence(error.value, path, DAMAGES[kind])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", picture())
    path.chmod(0)
    with pytest.raises(BadFile) as error:
        read_image(path)
    assert_sentence(error.value, path, "permission")


def test_a_refused_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path / "x.png", picture())
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(BadFile) as error:
        read_image(path)
    assert_sentence(error.value, path, "permission")


def test_bad_file_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadFile(Path("/a b.png"), "is bad", "remove it")))
    assert str(error) == "/a b.png is bad; remove it" and error.path == Path("/a b.png")


def test_a_path_with_line_breaks_gives_one_printable_sentence(tmp_path: Path) -> None:
    error = BadFile(Path("/a\nb\x1b[31m\udcff ä.png"), "is bad", "remove it now, please")
    assert str(error) == r"/a\nb\x1b[31m\udcff ä.png is bad; remove it now, please"
    assert error.path == Path("/a\nb\x1b[31m\udcff ä.png")


@pytest.mark.parametrize("error", [cv2.error("(-215:Assertion failed) a\n > b"), MemoryError()])
def test_what_opencv_raises_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object) -> None:
        raise error

    path = save_synthia(tmp_path / "s.png", ids(0, 3))
    monkeypatch.setattr(cv2, "imdecode", refuse)
    with pytest.raises(BadFile) as caught:
        decode_synthia_label(path)
    assert_sentence(caught.value, path, "cannot be decoded")


def test_palette_labels_are_read_as_indices(tmp_path: Path) -> None:
    assert (decode_label(save_palette(tmp_path / "p.png", ids(0, 7, 33, 255))) == ids(0, 7, 33, 255)).all()


def test_bilevel_labels_are_zero_and_one(tmp_path: Path) -> None:
    Image.fromarray(ids(0, 255)).convert("1").save(tmp_path / "m.png")
    label = decode_label(tmp_path / "m.png")
    assert label.dtype == np.uint8 and (label == ids(0, 1)).all()


def test_16_bit_labels_keep_their_values(tmp_path: Path) -> None:
    values = ids(0, 3).astype(np.uint16) * 100
    assert (decode_label(save(tmp_path / "d.png", values)) == values).all()


def test_labels_in_jpeg_or_with_fractions_are_refused(tmp_path: Path) -> None:
    for path, part in (
        (save(tmp_path / "l.jpg", ids(0, 1)), "JPEG"),
        (save(tmp_path / "l.tif", ids(0) / 2.0), "float"),
    ):
        with pytest.raises(BadFile) as error:
            decode_label(path)
        assert_sentence(error.value, path, part)


def test_synthia_class_is_the_first_rgb_channel_low_byte(tmp_path: Path) -> None:
    label = decode_synthia_label(save_synthia(tmp_path / "s.png", ids(0, 3, 21)))
    assert label.shape == (8, 16) and (label == ids(0, 3, 21)).all()


def test_synthia_label_with_one_channel_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "s.png", ids(0, 3))
    with pytest.raises(BadFile) as error:
        decode_synthia_label(path)
    assert_sentence(error.value, path, "one channel")
