"""The same bits again: what a GPU must be told so that a step that is repeated, or resumed, gives the same numbers.

Some of PyTorch's kernels add up in the order in which their blocks happen to end: the backward passes of attention
(FlashAttention's, and the memory-efficient one where it splits the keys; cuDNN's is left out) and of some convolutions
by cuDNN, and a few that no step has (tests/engine/test_deterministic.py lists them). And torch.compile chooses between
kernels by how fast they were just now. torch.use_deterministic_algorithms forbids all that. This was read in PyTorch's
documentation and source; neither the bits nor the price have been seen on a GPU yet.

It is on while a step is computed and not around it: an evaluation has no backward pass, and would pay for nothing.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

from ssr_fast.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""The values with which cuBLAS is deterministic; the second takes less memory and more time."""
_TELLING = ("does not have a deterministic implementation", "Deterministic behavior was enabled")


def prepare_deterministic(wanted: bool, device: torch.device) -> bool:
    """Whether the steps of a run are to be computed by deterministic kernels; before anything runs on the device.

    A CPU's kernels are deterministic as they are.

    Args:
        wanted: --run.deterministic.

    Raises:
        UserError: the environment holds a setting of cuBLAS that is not deterministic.
    """
    if not wanted or device.type != "cuda":
        return False
    given = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if given not in WORKSPACES:
        raise UserError(
            f"the environment variable {WORKSPACE} is {given!r}, with which cuBLAS may give other bits each time: "
            f"unset it, set it to {' or '.join(WORKSPACES)}, or give --run.deterministic false"
        )
    return True


@contextlib.contextmanager
def only_deterministic(wanted: bool) -> Iterator[None]:
    """In the body PyTorch takes deterministic kernels alone; with wanted=False nothing changes.

    Raises:
        UserError: something in the body has no deterministic kernel, such as an encoder that a user brings.
    """
    if not wanted:
        yield
        return
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in _TELLING):
            raise
        first = str(error).strip().partition(", but you set")[0].partition("\n")[0]
        raise UserError(f"{first}: give --run.deterministic false; a resumed run then has other last bits") from error
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
