"""The state of a run as plain data: a tree's tensors and values apart, random generators as tensors, config diffs."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MISSING = "(not set)"
_GAUSS_NONE = 0  # flag of a generator that holds no second Gaussian

OPTIONAL = ("rng",)
"""What may be missing on either side: each rank has its own generators, and the number of ranks may change."""


def split(tree: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Takes a nested dict of tensors and JSON values apart.

    Returns:
        the tensors themselves by dotted path, and a tree of the same shape that holds the other values.

    Raises:
        TypeError: a key is not a string.
        ValueError: two tensors have the same dotted path.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"a state's keys are strings, not {key!r}")
        inner: dict[str, Tensor] = {}
        if isinstance(value, Tensor):
            inner = {key: value}
        elif isinstance(value, Mapping):
            below, values[key] = split(value)
            inner = {f"{key}.{path}": tensor for path, tensor in below.items()}
        else:
            values[key] = value
        twice = sorted(inner.keys() & tensors.keys())
        if twice:
            raise ValueError(f"two tensors of the state have the path {twice[0]!r}")
        tensors.update(inner)
    return tensors, values


def merge_values(tree: dict[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Writes saved `values` (see `split`) into `tree` in place.

    Returns:
        dotted paths of the tree's values that `values` does not have; those stay as they are.
    """
    for key, value in values.items():
        below = tree.get(key)
        if not isinstance(value, Mapping):
            tree[key] = value
        elif not isinstance(below, dict):
            tree[key] = dict(value)
        else:
            merge_values(below, value)
    saved = set(_flat(values))
    return [path for path in _flat(split(tree)[1]) if path not in saved]


def rng_state(device: torch.device | None = None) -> dict[str, Tensor]:
    """The state of Python's, NumPy's and torch's generators (and of `device`, if it is a CUDA device) as tensors."""
    version, keys, gauss = random.getstate()
    _, np_keys, position, has_gauss, np_gauss = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *keys], dtype=torch.int64),
        "python_gauss": _optional_float(gauss),
        "numpy": torch.tensor([*np.asarray(np_keys).tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(np_gauss, dtype=torch.float64),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Puts the generators into a state that `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, *keys = state["python"].tolist()
    known, gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(keys), None if known == _GAUSS_NONE else gauss))
    *np_keys, position, has_gauss = state["numpy"].tolist()
    words = np.asarray(np_keys, dtype=np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, float(state["numpy_gauss"])))
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_generators(seed: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators. Nothing of ours draws from them, but what a user adds may."""
    number = (seed * 1_000_003 + rank) % 2**32
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of a resolved config, whatever the order of its keys; paths count as their text, tuples as lists."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """What changed between two resolved configs, one line an option: "model.backbone: mit_b0 -> mit_b5".

    Args:
        saved: a checkpoint's config.
        now: this run's config.
        ignore: dotted options, or prefixes of options, whose change does not matter, such as "run.dir".
    """
    old, new = (_flat(json.loads(json.dumps(config, default=str))) for config in (saved, now))
    lines = []
    for option in [*old, *(name for name in new if name not in old)]:
        if any(option == prefix or option.startswith(f"{prefix}.") for prefix in ignore):
            continue
        before, after = old.get(option, _MISSING), new.get(option, _MISSING)
        # by their text: 1 and True are equal in Python, nan is not equal to itself
        if repr(before) != repr(after):
            lines.append(f"{option}: {before} -> {after}")
    return lines


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _optional_float(value: float | None) -> Tensor:
    """[is there a value, the value] as float64 [2]."""
    return torch.tensor([_GAUSS_NONE, 0.0] if value is None else [1.0, value], dtype=torch.float64)
