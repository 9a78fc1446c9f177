"""Drawn pictures: repeatable, read as the sets they stand for, and as heavy."""

import numpy as np
import pytest

from bench import photos
from ssr_fast.data.images import read_image
from ssr_fast.data.index import DomainConfig, build_index
from ssr_fast.data.labels import CITYSCAPES_IDS

SMALL = (photos.Photograph("gta5", 192, 106, 2.5, 0.35), photos.Photograph("cityscapes", 160, 80, 2.5, 0.35))


def test_a_picture_is_a_function_of_seed_and_index():
    image, ids = photos.draw(SMALL[0], 3, 5)
    assert image.shape == (106, 192, 3) and ids.shape == (106, 192) and image.dtype == ids.dtype == np.uint8
    again, same = photos.draw(SMALL[0], 3, 5)
    assert (image == again).all() and (ids == same).all()
    for seed, index in ((3, 6), (4, 5)):
        assert (photos.draw(SMALL[0], seed, index)[1] != ids).mean() > 0.1


def test_the_folders_are_found_to_be_the_two_sets(tmp_path):
    written = photos.write_sets(tmp_path, SMALL, 3, 0)
    assert written["gta5"].images == 3 and written["gta5"].label_bytes > 300 and written["cityscapes"].label_bytes == 0
    source = build_index(DomainConfig(root=str(tmp_path / "gta5")), True, "data.source", tmp_path / "index")
    target = build_index(DomainConfig(root=str(tmp_path / "cityscapes")), False, "data.target", tmp_path / "index")
    assert source.layout.name == "gta5" and target.layout.name == "cityscapes"
    assert len(source.samples) == len(target.samples) == 3
    image, ids = photos.draw(SMALL[0], 0, 2)
    assert (read_image(source.samples[2].image) == image).all()
    label = source.layout.read_label(source.samples[2].label)
    assert (label == np.array([CITYSCAPES_IDS.get(value, 255) for value in range(256)])[ids]).all()


@pytest.mark.parametrize("kind", [photos.GTA5, photos.CITYSCAPES_PHOTOGRAPH], ids=lambda kind: kind.set)
def test_files_weigh_what_the_sets_files_do(kind, tmp_path):
    (written,) = photos.write_sets(tmp_path, [kind], 1, 0).values()
    assert 1.8e6 < written.image_bytes < 2.9e6
    _, ids = photos.draw(kind, 0, 0)
    assert len(np.unique(ids)) >= 10
    if kind.set == "gta5":
        assert 2e4 < written.label_bytes < 1e5
