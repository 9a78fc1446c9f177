"""The fixed block sizes of an op's Triton kernels: the file configs.json beside the op.

    {"default":    {row: {kernel: blocks, or a list of blocks from which the op takes one by the shape}},
     "sm_90":      the same, but only what differs on that architecture; a list is replaced whole,
     "provenance": {"sm_90": on what and with which versions that section was tuned}}

A row is what an op chooses by, such as the dtype; blocks are {option: number}, options the kernel's constants,
num_warps and num_stages. Nothing is tuned at run time: `python -m bench tune --write` fills in a section.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .machine import interpreted

DEFAULT, PROVENANCE = "default", "provenance"

COUNTS = ("num_stages", "STAGES")
"""Options that may be any number from 1 up; every other is a power of two."""

Blocks = dict[str, int]
Row = dict[str, Any]
"""{kernel: Blocks or a list of Blocks}."""


@cache
def architecture(device: torch.device) -> str:
    """The section of a device, such as "sm_90"; "default" where no kernel is compiled. Reads nothing from the GPU."""
    if device.type != "cuda" or interpreted():
        return DEFAULT
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def table(op: str, architecture: str) -> dict[str, Row]:
    """An op's rows on an architecture: the default ones, with what that architecture's section changes.

    Raises:
        ValueError: the file says what no kernel can take; one sentence.
    """
    content = read(op)
    found = problem(content)
    if found:
        raise ValueError(f"{path(op)}: {found}")
    merged: dict[str, Row] = merge(content[DEFAULT], content.get(architecture, {}))
    return merged


def path(op: str) -> Path:
    """The file of an op."""
    return Path(__file__).parent / op / "configs.json"


def read(op: str) -> dict[str, Any]:
    """The content of an op's file."""
    content: dict[str, Any] = json.loads(path(op).read_text(encoding="utf-8"))
    return content


def merge(base: Any, changes: Any) -> Any:
    """`base` with what `changes` says instead, dictionary by dictionary; neither is altered."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in changes.items()}}


def difference(base: Any, changed: Any) -> Any:
    """The least changes with which merge(base, changes) is `changed`, which has the keys of `base`."""
    if not isinstance(base, dict) or not isinstance(changed, dict):
        return changed
    return {key: difference(base[key], value) for key, value in changed.items() if value != base[key]}


def problem(content: dict[str, Any]) -> str:
    """What is wrong with a file's content, one sentence; empty if nothing is."""
    return next(_problems(content), "")


def _problems(content: dict[str, Any]) -> Iterator[str]:
    base = content.get(DEFAULT)
    if not isinstance(base, dict):
        yield f'there is no section "{DEFAULT}"'
        return
    for section in content.keys() - {PROVENANCE}:
        for row, kernels in content[section].items():
            if row not in base:
                yield f"{section} has a row {row!r}, and {DEFAULT} none; its rows are {', '.join(base)}"
                continue
            for kernel, found in kernels.items():
                if kernel not in base[row]:
                    yield f"{section}, {row}: {kernel!r} is no kernel; the kernels are {', '.join(base[row])}"
                    continue
                yield from _wrong_blocks(f"{section}, {row}, {kernel}", found, base[row][kernel], section == DEFAULT)


def _wrong_blocks(where: str, found: Any, base: Any, whole: bool) -> Iterator[str]:
    """What is wrong with the blocks of one kernel; `whole`: they are those of the default section."""
    if isinstance(found, list) != isinstance(base, list) or found == []:
        yield f"{where} must be {'a list of blocks' if isinstance(base, list) else 'one set of blocks'}"
        return
    known = set(base[0] if isinstance(base, list) else base)
    for blocks in found if isinstance(found, list) else [found]:
        if strange := sorted(set(blocks) - known):
            yield f"{where} has an option {strange[0]!r}; its options are {', '.join(sorted(known))}"
        if (whole or isinstance(found, list)) and (missing := sorted(known - set(blocks))):
            yield f"{where} lacks the option {missing[0]!r}"
        for option, value in blocks.items():
            if type(value) is not int or value < 1:
                yield f"{where}: {option} must be a whole number from 1 up (it is {value!r})"
            elif option not in COUNTS and value & (value - 1):
                yield f"{where}: {option} must be a power of two (it is {value})"
