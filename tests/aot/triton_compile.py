"""Compiles recorded Triton launches for GPUs that are not there and says what the machine code needs.

Run as a program, `python -m tests.aot.triton_compile`, it reads jobs from a pickle on stdin and writes JSON: every
compile is a forked process of its own, because the compiler may abort.
"""

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one block may have, bytes, by compute capability."""

MATRIX = {80: r"\bHMMA", 90: r"\bHGMMA|\bHMMA", 100: r"\bUTC[A-Z]*MMA|\bHMMA"}
"""The matrix instructions of an architecture in its disassembly."""


@dataclass(frozen=True)
class Launch:
    """One recorded launch, as triton.compile takes it."""

    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


def describe(kernel: Any, arguments: dict[str, Any], options: Sequence[str] = ("num_warps", "num_stages")) -> Launch:
    """What Triton's own launcher would compile for these arguments: types, constants, divisibility by 16.

    Args:
        kernel: a function under triton.jit.
        arguments: everything that the launch passes by name, options included; tensors may be on the meta device.
        options: the names among them that are the compiler's.
    """
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        else:
            specialised = not parameter.do_not_specialize
            signature[parameter.name] = _type(value, (place,), specialised, constants, attributes)
    chosen = {name: arguments[name] for name in options if name in arguments}
    return Launch(kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes, chosen)


def _type(
    value: Any,
    path: tuple[int, ...],
    specialised: bool,
    constants: dict[Any, Any],
    attributes: dict[tuple[int, ...], list[list[Any]]],
) -> Any:
    import torch

    if isinstance(value, tuple):
        return tuple(_type(v, (*path, i), specialised, constants, attributes) for i, v in enumerate(value))
    if value is None or (specialised and isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]  # what the allocator gives
        names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "uint8": "u8"}
        return "*" + names[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, float):
        return "fp32"
    if specialised and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32"


def compile_all(jobs: Sequence[tuple[Launch, int]], timeout: int = 1500) -> list[dict[str, Any]]:
    """Compile each launch for its capability, in one program that forks: see measure for the keys of a row."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.triton_compile"],
        input=pickle.dumps(list(jobs)),
        capture_output=True,
        timeout=timeout,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode())
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def recorded(record: Callable[[], list[Launch]], architecture: str) -> list[Launch]:
    """What `record` records with the block sizes of an architecture, such as "sm_90"."""
    from ssr_kernels import tables

    with patch.object(tables, "architecture", lambda device: architecture):
        return record()


def problems(
    record: Callable[[], list[Launch]],
    capabilities: Sequence[int],
    registers: Mapping[str, Sequence[int]] | None,
    products: Collection[str] = (),
) -> list[str]:
    """What is wrong with the machine code of launches: it does not compile, spills, or asks for too much.

    Args:
        record: gives the launches; called for each architecture, whose own block sizes they then have.
        registers: the most a thread of each kernel may have on each of MATRIX's architectures; None: no budget. It
            holds for the default block sizes: those that were tuned on an architecture need only not spill.
        products: kernels with a matrix product; they, and no others, must have matrix instructions.
    """
    found = []
    default = recorded(record, "default")
    jobs = [(launch, number) for number in capabilities for launch in recorded(record, f"sm_{number}")]
    assert jobs, "nothing was recorded"
    for (launch, _), row in zip(jobs, compile_all(jobs), strict=True):
        name, capability = row["kernel"], row["capability"]
        what = f"{name} on sm_{capability}"
        if "error" in row:
            found.append(f"{what}: {row['error']}")
            continue
        print(row)
        budget = registers if launch in default else None
        allowed = None if budget is None else budget[name][tuple(MATRIX).index(capability)]
        if allowed is not None and row["registers"] > allowed:
            found.append(f"{what} takes {row['registers']} registers, more than {allowed}")
        if row["stack"] or row["spills"]:
            found.append(f"{what} spills: {row['stack']} bytes of stack, {row['spills']} instructions")
        if row["shared"] > SHARED_LIMIT[capability]:
            found.append(f"{what} takes {row['shared']} bytes of shared memory")
        if (row["matrix"] > 0) != (name in products):
            found.append(f"{what} has {row['matrix']} matrix instructions")
    return found


def measure(launch: Launch, capability: int) -> dict[str, Any]:
    """Compile one launch and take its cubin apart.

    Returns:
        kernel, capability, and registers, stack (bytes a thread), spills (instructions), shared (bytes a block),
        matrix (number of matrix instructions).
    """
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output([tools / "cuobjdump", "-res-usage", cubin.name])
        code = _output([tools / "nvdisasm", "-c", cubin.name])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump says nothing of {launch.kernel}: {usage}")
    return {
        "kernel": launch.kernel,
        "capability": capability,
        "registers": int(found.group(1)),
        "stack": int(found.group(2)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared": compiled.metadata.shared,
        "matrix": len(re.findall(MATRIX[capability], code)),
    }


def _output(command: Sequence[object]) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def _forked(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The job's answer from a process of its own, or {"error": how it ended}."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        if answer and not status:
            result: dict[str, Any] = json.loads(answer)
            return result
        return {"error": f"the compiler's process ended with status {status}"}
    os.close(reader)
    os.dup2(2, 1)  # what the compiler prints is no part of the answer
    try:
        answer = json.dumps(job()).encode()
    except Exception as error:
        answer = json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(answer)
    os._exit(0)


def main() -> None:
    """Answer the jobs on stdin."""
    import importlib

    jobs: list[tuple[Launch, int]] = pickle.loads(sys.stdin.buffer.read())
    for launch, _ in jobs:
        importlib.import_module(launch.module)  # once, before the forks
    rows = []
    for launch, capability in jobs:
        row = _forked(lambda launch=launch, capability=capability: measure(launch, capability))  # type: ignore[misc]
        rows.append({"kernel": launch.kernel, "capability": capability, **row})
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    main()
