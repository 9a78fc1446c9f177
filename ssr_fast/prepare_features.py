"""What `python -m ssr_fast.prepare features` does: the frozen encoder's features of whole images, for cached_full."""

import argparse
import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ssr_fast.data.feature_jobs import Encode, make_features
from ssr_fast.data.features import DTYPES, FeatureStore, create_features
from ssr_fast.data.index import DomainConfig
from ssr_fast.data.layouts import find_layout
from ssr_fast.data.stores import Outcome
from ssr_fast.errors import UserError
from ssr_fast.prepare_parts import check_place, local_rank, progress, shard

if TYPE_CHECKING:
    from ssr_fast.models.sam import SamConfig

_MODE = "cached_full"
_WORDS: dict[Literal["made", "kept", "failed"], str] = {"made": "files made", "kept": "kept", "failed": "failed"}
_MAX_THREADS = 8  # an encoder on a GPU takes no more images than these decode


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `prepare features` beside those that say which data set."""
    parser.add_argument("--sam.checkpoint", dest="checkpoint", default="", metavar="FILE", help="SAM's published file")
    parser.add_argument("--sam.encoder", dest="encoder", default="vit_b", help="as for training (default: vit_b)")
    parser.add_argument("--sam.input_size", dest="input_size", type=int, help="as for training")
    parser.add_argument("--mode", default=_MODE, help=f"{_MODE} (default): whole images, for --sam.features {_MODE}")
    parser.add_argument(
        "--dtype", default="int8", choices=DTYPES, help="int8 (default; a scale a token) or fp16, twice the size"
    )
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16"), help="that the encoder computes in (default: fp32)"
    )
    parser.add_argument("--device", default="auto", help="auto (default: this process's GPU), cpu, cuda or cuda:N")
    parser.add_argument("--out", metavar="DIR", help="the store; default: features in the data set's folder")
    parser.add_argument("--overwrite", action="store_true", help="make what is there anew, with other options too")
    parser.add_argument("--rank", type=int, help="do every WORLD-th image only, from this one on (default: torchrun's)")
    parser.add_argument("--world", type=int, help="processes that share the images (default: torchrun's, else 1)")
    parser.add_argument("--workers", type=int, help=f"threads that read ahead (default: cores, at most {_MAX_THREADS})")


def run(config: DomainConfig, options: argparse.Namespace) -> int:
    """Make the store; the exit code 0.

    Raises:
        UserError: wrong options, or images that got no features (a line each, after all others are done).
    """
    rank, world = shard(options.rank, options.world, os.environ)
    sam = _checked(options)
    layout = find_layout(Path(config.root), config.layout, config.classes)
    entries = layout.listing(config.split, config.condition).entries
    if not entries:
        raise UserError(f"ROOT {config.root} holds no images ({layout.name}, split {config.split}); check both")
    out = Path(options.out).expanduser() if options.out else None
    check_place(out, layout, [entry.image for entry in entries])
    from ssr_fast.models.feature_maps import recipe

    encode = _encoder(sam, options)
    store = create_features(out, layout.root, recipe(sam, options.dtype, options.precision), options.overwrite)
    mine = [entry.image for entry in entries[rank::world]]
    threads = options.workers or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    started, outcomes = time.perf_counter(), []
    with progress(len(mine), "features") as show:
        for outcome in make_features(store, mine, encode, threads, options.overwrite):
            outcomes.append(outcome)
            show(outcome.message if outcome.kind == "made" else "")
    _sum_up(outcomes, store, time.perf_counter() - started)
    if failed := [outcome.message for outcome in outcomes if outcome.kind == "failed"]:
        raise UserError("\n".join(failed))
    return 0


def _checked(options: argparse.Namespace) -> "SamConfig":
    """The encoder that the options name.

    Raises:
        UserError: every mistake that needs no look at the data, a line for each.
    """
    from ssr_fast.models.sam import SamConfig  # PyTorch takes seconds, which `prepare --help` need not wait for

    sam = SamConfig(encoder=options.encoder, checkpoint=options.checkpoint, input_size=options.input_size)
    found = sam.problems("sam")
    if options.mode != _MODE:
        found.append(
            f"--mode must be {_MODE} (it is {options.mode}); the other values of --sam.features need no preparation"
        )
    if options.workers is not None and options.workers < 1:
        found.append(f"--workers must be at least 1 (it is {options.workers})")
    if found:
        raise UserError("\n".join(found))
    return sam


def _encoder(sam: "SamConfig", options: argparse.Namespace) -> Encode:
    """The encoder, built when the first image needs it."""
    from ssr_fast.models.feature_maps import MapEncoder, build_map_encoder
    from ssr_fast.models.sam_masks import pick_device

    device = pick_device(options.device, local_rank(os.environ))

    @functools.cache
    def build() -> MapEncoder:
        return build_map_encoder(sam, device, options.precision)

    return lambda path, image: build()(path, image)


def _sum_up(outcomes: list[Outcome], store: FeatureStore, seconds: float) -> None:
    """One line on what was done."""
    kinds = [outcome.kind for outcome in outcomes]
    counts = ", ".join(f"{kinds.count(kind)} {word}" for kind, word in _WORDS.items())
    line = f"{store.folder}: {counts}"
    there = [store.path(outcome.image) for outcome in outcomes if outcome.kind != "failed"]
    if there:
        line += f"; {sum(path.stat().st_size for path in there) / 1e6:.1f} MB"
    if "made" in kinds:
        line += f", {len(outcomes) / max(seconds, 1e-9):.3g} images/s"
    print(line)
