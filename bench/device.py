"""Whether the device still answers: a kernel that writes beyond its memory breaks the context of the whole process."""

import torch


class DeviceLost(RuntimeError):
    """A kernel has broken this process's context on the device: nothing runs there any more."""


def check_device(device: torch.device) -> None:
    """See whether the device still answers.

    Raises:
        DeviceLost: it does not, with CUDA's message.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            raise DeviceLost((str(error).strip().splitlines() or [type(error).__name__])[0]) from error


def is_lost(device: torch.device) -> bool:
    """Whether check_device raises."""
    try:
        check_device(device)
    except DeviceLost:
        return True
    return False
