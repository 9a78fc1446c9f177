"""Train the demo's small SAM-shaped encoder, class-agnostically: `python -m bench.small_sam [--out FILE]`.

The encoder sees domain-randomised scenes in which every REGION has a random colour; the losses know region masks only,
never a class: boundaries between regions, the distances of a pixel to the sides of its region's box, and the mask of
the region under a point prompt. The three heads are thrown away; the encoder's weights ship as fp16 in
ssr_fast/models/sam_small.safetensors. The drawing seed is far from those that the demo and its bench draw.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssr_fast.data.augment import normalise
from ssr_fast.data.scenes import draw_layout, random_style, render
from ssr_fast.models.sam import SHAPES, SMALL_WEIGHTS, build_vit

SEED = 77_000_001
SCALE = 4  # masks, boxes and boundaries are compared on the image's grid divided by this
POINTS = 12  # point prompts an image


class RandomScenes(Dataset[tuple[Tensor, Tensor]]):
    """Domain-randomised scenes: image [3, 96, 192] normalised, region map int64 [24, 48]."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.Generator(np.random.Philox(key=[SEED, 0], counter=[0, 0, 0, index]))
        layout = draw_layout(rng)
        image = normalise(render(layout, random_style(rng), rng, random_regions=True))
        return image, torch.from_numpy(layout.region[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]).long()


class Heads(nn.Module):
    """The three class-agnostic heads on features [B, D, 12, 24]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, 2), nn.GELU(), nn.Conv2d(channels, channels, 1)
        )
        self.boundary = nn.Conv2d(channels, 1, 1)
        self.box = nn.Conv2d(channels, 4, 1)
        self.prompt = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))
        self.bias = nn.Parameter(torch.zeros(()))


def region_targets(regions: Tensor) -> tuple[Tensor, Tensor]:
    """regions [B, h, w] -> boundary [B, h, w] in {0, 1}, distances to the region's box sides [B, 4, h, w] in [0, 1]."""
    b, h, w = regions.shape
    edge = torch.zeros_like(regions, dtype=torch.bool)
    edge[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    edge[:, :, 1:] |= regions[:, :, 1:] != regions[:, :, :-1]
    count = int(regions.max()) + 1
    index = (regions + torch.arange(b)[:, None, None] * count).flatten()
    ys = torch.arange(h).view(1, h, 1).expand(b, h, w)
    xs = torch.arange(w).view(1, 1, w).expand(b, h, w)
    sides = []
    for axis, size in ((ys, h), (xs, w)):
        flat = axis.flatten()
        low = torch.full((b * count,), size).scatter_reduce(0, index, flat, "amin")[index].view(b, h, w)
        high = torch.full((b * count,), -1).scatter_reduce(0, index, flat, "amax")[index].view(b, h, w)
        sides += [(axis - low) / size, (high - axis) / size]
    return edge.float(), torch.stack(sides, 1)


def draw_points(regions: Tensor, generator: torch.Generator) -> Tensor:
    """regions [B, h, w] -> flat pixel indices [B, POINTS], drawn by area ** -0.5: small regions count."""
    flat = regions.flatten(1)
    counts = torch.zeros(flat.shape[0], int(flat.max()) + 1).scatter_add_(1, flat, torch.ones(flat.shape))
    return torch.multinomial(counts.gather(1, flat) ** -0.5, POINTS, generator=generator)


def losses(heads: Heads, features: Tensor, regions: Tensor, generator: torch.Generator) -> Tensor:
    """Sum of the boundary, box and prompt losses of a batch."""
    b, h, w = regions.shape
    pixels = heads.up(features)  # [B, D, h, w]
    edge, sides = region_targets(regions)
    boundary = F.binary_cross_entropy_with_logits(heads.boundary(pixels)[:, 0], edge, pos_weight=torch.tensor(3.0))
    box = (heads.box(pixels).sigmoid() - sides.sqrt()).abs().mean()
    points = draw_points(regions, generator)
    coarse = F.interpolate(features, (h, w), mode="bilinear", align_corners=False).flatten(2)  # [B, D, h*w]
    picked = coarse.gather(2, points[:, None].expand(-1, features.shape[1], -1)).transpose(1, 2)  # [B, P, D]
    masks = torch.einsum("bpd,bdn->bpn", heads.prompt(picked), pixels.flatten(2)) / 8 + heads.bias
    truth = (regions.flatten(1)[:, None] == regions.flatten(1).gather(1, points)[..., None]).float()
    cross = F.binary_cross_entropy_with_logits(masks, truth)
    share = masks.sigmoid()
    dice = 1 - (2 * (share * truth).sum(-1) + 1) / (share.sum(-1) + truth.sum(-1) + 1)
    return boundary + 2 * box + 2 * cross + dice.mean()


def train(steps: int, batch: int) -> nn.Module:
    """Train and return the encoder (the shipped one: 1200 steps of 12 scenes, half an hour on 2 busy cores)."""
    torch.manual_seed(SEED)
    encoder, heads = build_vit(SHAPES["small"]), Heads(SHAPES["small"].out)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.08)
    loader = DataLoader(RandomScenes(steps * batch), batch, num_workers=1)
    generator = torch.Generator().manual_seed(SEED)
    started, total = time.perf_counter(), 0.0
    for step, (images, regions) in enumerate(loader, 1):
        loss = losses(heads, encoder(images), regions, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step:5d}  loss {total / 50:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
            total = 0.0
    return encoder


def main() -> None:
    """Command line: --out, --steps, --batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=SMALL_WEIGHTS)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=12)
    options = parser.parse_args()
    encoder = train(options.steps, options.batch)
    tensors = {key: value.to(torch.float16).contiguous() for key, value in encoder.state_dict().items()}
    save_file(
        tensors, options.out, metadata={"steps": str(options.steps), "batch": str(options.batch), "seed": str(SEED)}
    )
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
