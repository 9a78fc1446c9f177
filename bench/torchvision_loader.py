"""GTA5 and Cityscapes through torch's DataLoader and torchvision.transforms.v2, as a careful user writes it.

After torchvision's own advice on speed: transforms v2, tensors instead of PIL images, uint8 until the crop is cut, the
label as a tv_tensors.Mask that shares the image's geometry; the work is in persistent worker processes. It draws its
source images uniformly and takes the first crop: no rare-class sampling, no second tries, which ours has.
B batch, H W pixels of the crop.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from ssr_fast.data.labels import IGNORE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Item = tuple[Tensor, Tensor, Tensor]


class PairDataset(Dataset[Item]):
    """Item `index`: a source image and its label, and a target image that is drawn at random.

    Args:
        sources: image and label of each source sample.
        targets: the target images.
        source_size, target_size: (width, height) that images are resized to.
        crop: (height, width).
        ids: value in a label file -> train id; all else is ignored.
    """

    def __init__(
        self,
        sources: list[tuple[Path, Path]],
        targets: list[Path],
        source_size: tuple[int, int],
        target_size: tuple[int, int],
        crop: tuple[int, int],
        ids: Mapping[int, int],
    ) -> None:
        self.sources, self.targets = sources, targets
        self.table = torch.full((256,), IGNORE, dtype=torch.uint8)
        self.table[list(ids)] = torch.tensor(list(ids.values()), dtype=torch.uint8)
        self.source_transform = _transform(source_size, crop)
        self.target_transform = _transform(target_size, crop)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Item:
        """float32 [3, H, W], uint8 [H, W], float32 [3, H, W]."""
        image_path, label_path = self.sources[index]
        image, label = self.source_transform(
            _image(image_path), tv_tensors.Mask(v2.functional.pil_to_tensor(Image.open(label_path)))
        )
        target = self.target_transform(_image(self.targets[int(torch.randint(len(self.targets), ()))]))
        return image, self.table[label[0].long()], target


def _image(path: Path) -> tv_tensors.Image:
    return tv_tensors.Image(v2.functional.pil_to_tensor(Image.open(path).convert("RGB")))


def _transform(size: tuple[int, int], crop: tuple[int, int]) -> v2.Compose:
    return v2.Compose(
        [
            v2.Resize((size[1], size[0])),
            v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}),
            v2.RandomHorizontalFlip(),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def batches(dataset: PairDataset, batch: int, workers: int, prefetch: int, pin: bool, seed: int) -> Iterator[Item]:
    """Batches without end: float32 [B, 3, H, W] normalised, uint8 [B, H, W], float32 [B, 3, H, W] normalised.

    Images are drawn with replacement: an epoch of the few images of a benchmark would end, and wait, too often.
    """
    torch.manual_seed(seed)
    loader: DataLoader[Item] = DataLoader(
        dataset,
        batch_size=batch,
        sampler=RandomSampler(dataset, replacement=True, num_samples=2**31),
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        drop_last=True,
    )
    yield from loader
