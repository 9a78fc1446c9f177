"""The frozen encoder's features of views that come again, kept in memory."""

import hashlib

import torch
from torch import Tensor

from ssr_fast.data.augment import normalise_batch
from ssr_fast.models.sam import FrozenEncoder


class ViewCache:
    """Encodes each view once, together with its mirror image, which a flip will ask for.

    A view is known by its pixels. It is always encoded in the same batch of two, so that its features do not depend on
    when it came, and a resumed run repeats bit for bit. Grows by 2 D h w numbers a view, without bound.

    B batch, H W pixels, D feature channels, h w feature pixels.

    Args:
        encoder: the features stay on its device.
    """

    def __init__(self, encoder: FrozenEncoder) -> None:
        self._encoder = encoder
        self._features: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        """Number of views, mirror images included."""
        return len(self._features)

    def __call__(self, images: Tensor) -> Tensor:
        """images uint8 [B, H, W, 3] RGB on the host -> `encoder.encode` of them, [B, D, h, w]."""
        keys = [_key(image) for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in self._features:
                self._encode(key, image)
        return torch.stack([self._features[key] for key in keys])

    def _encode(self, key: bytes, image: Tensor) -> None:
        mirrored = image.flip(1)
        pair = sorted([(key, image), (_key(mirrored), mirrored)], key=lambda view: view[0])
        images = torch.stack([view for _, view in pair]).to(self._encoder.device)
        features = self._encoder.encode(normalise_batch(images))
        self._features |= {key: feature for (key, _), feature in zip(pair, features, strict=True)}


def _key(image: Tensor) -> bytes:
    pixels = image.contiguous().numpy().tobytes()
    return hashlib.blake2b(pixels, digest_size=16, key=repr(tuple(image.shape)).encode()).digest()
