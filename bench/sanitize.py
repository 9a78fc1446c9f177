"""What runs under compute-sanitizer: `python -m bench.sanitize [PROVIDER...]`.

One forward and backward of each benchmark's native implementations on small odd sizes, checked against the float64
definition. Exit code 1 if one raises or is wrong, or if none can run; what cannot run is listed with its reasons.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from .__main__ import BENCHES
from .harness import Bench, Case, Provider, Row, Setting, Task, describe, judge


def main(arguments: Sequence[str] | None = None, benches: Sequence[Bench] = BENCHES) -> int:
    """The command line; returns the exit code."""
    native = list(dict.fromkeys(provider.name for bench in benches for provider in bench.providers if provider.ours))
    everyone = list(dict.fromkeys(provider.name for bench in benches for provider in bench.providers))
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("providers", nargs="*", metavar="PROVIDER", help=f"default: {' '.join(native)}")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.providers if name not in everyone]:
        print(f"python -m bench.sanitize: no provider {unknown[0]!r}; there is {', '.join(everyone)}", file=sys.stderr)
        return 2
    setting = Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    failures = ran = 0
    for bench in benches:
        for case in bench.odd_cases(setting):
            for provider in bench.providers:
                if provider.name in (options.providers or native):
                    row = check(bench, case, provider, setting)
                    ran += row.status != "skipped"
                    failures += row.failed
                    why = "; ".join([row.error] if row.error else row.reasons)
                    print(f"{bench.name} {case.name}: {provider.name}: {row.status}" + (f": {why}" if why else ""))
    print(f"{ran} ran, {failures} failed")
    return 1 if failures or not ran else 0  # a check that checked nothing has not passed


def check(bench: Bench, case: Case, provider: Provider, setting: Setting) -> Row:
    """Run one provider once on one case and judge its result."""
    row = Row(bench.name, case.name, case.sizes, str(case.dtype), provider.name)
    try:
        task = Task(case, case.make(setting.device, 0), setting)
        row.reasons = provider.reasons(task)
        if row.reasons:
            row.status = "skipped"
            return row
        judge(row, provider.build(task).both(), case.exact(task.inputs), case.dtype)
    except Exception as error:  # the next case is checked all the same
        row.status, row.error = "error", describe(error)
    return row


if __name__ == "__main__":
    sys.exit(main())
