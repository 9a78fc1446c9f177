"""Which backend runs an op: the first that has no reason against it, or the one that was asked for, or an error.

Nothing falls back in silence: a backend that was named and cannot run raises with every reason.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BACKENDS = ("cuda", "triton", "reference", "cpp")
VARIABLE = "SSR_FAST_KERNELS"


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run this call; the message holds every reason."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op."""

    name: str
    """One of BACKENDS."""
    run: Callable[..., Any]
    """The implementation; takes what the op's public function has checked."""
    not_supported_reasons: Callable[[Sequence[Tensor]], list[str]]
    """Why it cannot run on these tensors, a sentence each; of no tensors: why it cannot run on this machine at all."""


@dataclass(frozen=True)
class Op:
    """An op and its backends, the preferred one first."""

    name: str
    backends: tuple[Backend, ...]

    def reasons(self, name: str, tensors: Sequence[Tensor] = ()) -> list[str]:
        """Why backend `name` cannot run this op on `tensors`; empty if it can. See Backend.not_supported_reasons."""
        for backend in self.backends:
            if backend.name == name:
                return backend.not_supported_reasons(tensors)
        return [f"{self.name} has no {name} backend yet in this version"]

    def choose(self, backend: str | None, tensors: Sequence[Tensor]) -> Backend:
        """The backend for one call.

        Args:
            backend: a name of BACKENDS or "auto"; None: what the variable SSR_FAST_KERNELS says, else "auto".
            tensors: the call's tensor arguments.

        Raises:
            ValueError: not the name of a backend.
            BackendError: the backend that was named cannot run this call, or "auto" finds none that can.
        """
        origin = "backend" if backend is not None else VARIABLE
        name = backend if backend is not None else os.environ.get(VARIABLE) or "auto"
        if name not in ("auto", *BACKENDS):
            raise ValueError(f"{origin}={name}: expected auto, {', '.join(BACKENDS)}")
        against: list[str] = []
        for candidate in self.backends:
            if name in ("auto", candidate.name):
                reasons = candidate.not_supported_reasons(tensors)
                if not reasons:
                    return candidate
                against += reasons
        raise BackendError(f"{origin}={name} cannot be honoured: " + "; ".join(against or self.reasons(name)))


def no_reasons(tensors: Sequence[Tensor]) -> list[str]:
    """The reasons against a reference backend: none, it is the definition of the op."""
    return []
