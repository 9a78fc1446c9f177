"""What a run ran on: versions, commit, device. Goes into environment.json and into `python -m ssr_fast.info`."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssr_fast.engine.apex import is_nvidias

_DISTRIBUTIONS = {
    "ssr_fast": ("ssr_fast",),
    "torch": ("torch",),
    "triton": ("triton",),
    "torchvision": ("torchvision",),
    "numpy": ("numpy",),
    "segment-anything": ("segment-anything",),
    "DALI": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "xformers": ("xformers",),
    "apex": ("apex",),
}
_OPTIONAL = {"DALI": "pip install nvidia-dali-cuda130", "xformers": "pip install xformers"}
_APEX = "NVIDIA Apex has no wheel, build it as https://github.com/NVIDIA/apex says"


def environment() -> dict[str, Any]:
    """Everything about this machine and installation that a result may depend on, ready for JSON.

    Returns:
        device (one line), devices (a dict with name, capability, memory_gib for each GPU), cuda (the version that torch
        was built with, or None), platform, python, commit (of the source checkout, with "-dirty" behind it where files
        have changed; None outside of one), versions (package -> version, None if it is missing).
    """
    devices = _devices()
    names = sorted({device["name"] for device in devices})
    return {
        "device": f"{len(devices)} x {', '.join(names)}" if devices else f"CPU, {os.cpu_count()} cores",
        "devices": devices,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": commit(Path(__file__).resolve().parents[2]),
        "versions": versions(),
    }


def communication() -> dict[str, Any]:
    """What several processes can talk by, ready for JSON.

    Returns:
        gpus (how many this machine shows), nccl (version of the NCCL that torch was built with, or None), gloo (whether
        torch was built with it).
    """
    built = dist.is_available()
    nccl = built and dist.is_nccl_available()
    return {
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "gloo": built and dist.is_gloo_available(),
    }


def versions() -> dict[str, str | None]:
    """Version of each package that ssr_fast uses or can use; None if it is missing, or is not what it must be."""
    found = {name: _version(names) for name, names in _DISTRIBUTIONS.items()}
    return {**found, "apex": found["apex"] if is_nvidias() else None}


def missing() -> dict[str, str]:
    """For each package that versions() has None for: why, and how to get it."""
    reasons = {}
    for name in (name for name, version in versions().items() if version is None):
        reasons[name] = f"not installed; {_OPTIONAL[name]}" if name in _OPTIONAL else "not installed"
        if name == "apex":
            other = _version(("apex",))
            wrong = f"the apex {other} that is installed is another project, a Pyramid toolkit; " if other else ""
            reasons[name] = f"{wrong or 'not installed; '}{_APEX}"
    return reasons


def commit(root: Path) -> str | None:
    """Commit of the git checkout whose top folder is `root`, "-dirty" behind it where files have changed, or None."""
    if not (root / ".git").exists():  # git itself would go up and answer for a repository around site-packages
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distributions: tuple[str, ...]) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _devices() -> list[dict[str, Any]]:
    """Name, compute capability and memory of each visible GPU."""
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability, memory = f"{properties.major}.{properties.minor}", round(properties.total_memory / 2**30, 1)
        devices.append({"name": properties.name, "capability": capability, "memory_gib": memory})
    return devices
