"""What runs under compute-sanitizer: `python -m bench.sanitize [PROVIDER...]` (`python -m bench.sanitizer` starts it).

One forward and backward of each benchmark's native implementations on small odd sizes, checked against the float64
definition, which is computed on the CPU: on the device the tool sees our kernels, copies and little else. Exit code 1
if one raises or is wrong, or if none can run; what cannot run is listed with its reasons.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import document
from .__main__ import BENCHES
from .harness import Bench, Case, Inputs, Provider, Row, Setting, Task, describe, judge

CPU = torch.device("cpu")


def main(arguments: Sequence[str] | None = None, benches: Sequence[Bench] = BENCHES) -> int:
    """The command line; returns the exit code."""
    native = list(dict.fromkeys(provider.name for bench in benches for provider in bench.providers if provider.ours))
    everyone = list(dict.fromkeys(provider.name for bench in benches for provider in bench.providers))
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("providers", nargs="*", metavar="PROVIDER", help=f"default: {' '.join(native)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a document, into which each row is written at once")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="K/N", help="every N-th case only, from K on")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.providers if name not in everyone]:
        print(f"python -m bench.sanitize: no provider {unknown[0]!r}; there is {', '.join(everyone)}", file=sys.stderr)
        return 2
    setting = Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    failures = ran = 0
    rows: list[Row] = []
    first, step = options.part
    work = list(_work(benches, options.providers or native, setting))[first::step]
    for bench, case, provider in work:
        row = check(bench, case, provider, setting)
        rows.append(row)
        ran += row.status != "skipped"
        failures += row.failed
        why = "; ".join([row.error] if row.error else row.reasons)
        print(f"{bench.name} {case.name}: {provider.name}: {row.status}" + (f": {why}" if why else ""), flush=True)
        if options.json:
            content = json.loads(options.json.read_text(encoding="utf-8"))
            found = [document.finite(dataclasses.asdict(one)) for one in rows]
            document.write(options.json, {**content, "rows": found, "cases_done": len(rows) == len(work)})
    print(f"{ran} ran, {failures} failed")
    return 1 if failures or not ran else 0  # a check that checked nothing has not passed


def _part(text: str) -> tuple[int, int]:
    first, _, step = text.partition("/")
    return int(first), int(step)


def _work(benches: Sequence[Bench], names: Sequence[str], setting: Setting) -> Iterator[tuple[Bench, Case, Provider]]:
    for bench in benches:
        for case in bench.odd_cases(setting):
            yield from ((bench, case, provider) for provider in bench.providers if provider.name in names)


def check(bench: Bench, case: Case, provider: Provider, setting: Setting) -> Row:
    """Run one provider once on one case and judge its result."""
    row = Row(bench.name, case.name, case.sizes, str(case.dtype), provider.name)
    try:
        inputs = case.make(CPU, 0)
        task = Task(case, _on(setting.device, inputs), setting)
        row.reasons = provider.reasons(task)
        if row.reasons:
            row.status = "skipped"
            return row
        outputs = {name: out.cpu() for name, out in provider.build(task).both().items()}
        judge(row, outputs, case.exact(inputs), case.dtype)
    except Exception as error:  # the next case is checked all the same
        row.status, row.error = "error", describe(error)
    return row


def _on(device: torch.device, inputs: Inputs) -> Inputs:
    """The same numbers on another device."""
    return Inputs(
        {name: leaf.detach().to(device).requires_grad_() for name, leaf in inputs.leaves.items()},
        {name: constant.to(device) for name, constant in inputs.constants.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
