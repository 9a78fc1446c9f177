"""Compare implementations side by side: `python -m bench [NAME...] [--list] [--json [FILE]] [--quick]`.

On a GPU if there is one, else the small cases on the CPU. Exit code 0: everything that can run here ran and is right;
1: a provider raised or returned a wrong result; 2: a mistake on the command line. The JSON is written anew after each
case: a run that is cut off leaves what it had, marked "complete": false. `python -m bench ledger` times
nothing and counts what a training step asks of the device, `python -m bench scaling` models several GPUs,
`python -m bench step` times whole training steps, `python -m bench overhead` what guard and checkpoints cost of one,
`python -m bench sam` compares encoders of SAM, `python -m bench report` puts predictions beside measurements (--help of
each says more).
"""

import argparse
import dataclasses
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from . import document, measure, tables
from .device import DeviceLost
from .harness import Bench, Case, Row, Setting, run
from .kernels import align, contrast, dwconv, segloss

BENCHES: tuple[Bench, ...] = (
    align.BENCH,
    contrast.BENCH,
    contrast.SAMPLER,
    dwconv.BENCH,
    dwconv.DILATED_BENCH,
    segloss.BENCH,
)
COMMANDS = {
    "ledger": ("bench.ledger.__main__", "a training step counted at full size: operators, syncs, bytes"),
    "step": ("bench.step", "a training step timed, the released loop's and ours, lever by lever"),
    "profile": ("bench.profiling", "a training step's largest kernels and the device's idle share, by torch.profiler"),
    "scaling": (
        "bench.scaling.__main__",
        "several GPUs, by a model from one GPU's step: efficiency, hours, what to use",
    ),
    "loader": ("bench.loader", "input pipelines: torchvision's and ours, samples a second, CPU time, memory"),
    "overhead": ("bench.overhead", "guard and checkpoints: their share of a training step, on the CPU's demo"),
    "report": ("bench.report", "predictions beside measurements: the page docs/performance.md"),
    "tune": (
        "bench.tune.__main__",
        "block sizes of the Triton kernels: tries others on this GPU, writes them if asked to",
    ),
    "sam": ("bench.sam", "encoders of SAM: segment-anything's, compiled, transformers', ours in each form"),
}
"""What has a command line of its own (python -m bench NAME --help): its module, and about what it is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        command: Callable[[Sequence[str]], int] = importlib.import_module(COMMANDS[words[0]][0]).main
        return command(words[1:])
    options = parse(words)
    if options.list:
        for bench in BENCHES:
            print(f"{bench.name:24} {bench.about}")
        for name, (_, about) in COMMANDS.items():
            print(f"{name:24} {about} (python -m bench {name} --help)")
        return 0
    known = {bench.name: bench for bench in BENCHES}
    if problem := _problem(options, list(known)):
        print(problem, file=sys.stderr)
        return 2
    setting = Setting(torch.device(options.device), options.quick)
    if setting.device.type == "cpu":
        torch.set_num_threads(1)  # a thread that waits for a busy core would decide what is measured
    peaks = measure.measure_peaks(setting.device) if setting.device.type == "cuda" else None
    screen = tables.console()
    _introduce(setting, peaks, screen.print)
    record = Record(options.json, [known[name] for name in options.names or known], setting, peaks)
    lost = ""
    for bench in record.benches:

        def report(case: Case, done: list[Row], bench: Bench = bench) -> None:
            on_gpu = setting.device.type == "cuda"
            goals = bench.goals(case, {row.provider: row for row in done}) if on_gpu else []
            record.add(bench.name, case, done)
            tables.show(case, done, peaks, goals, screen)

        try:
            run(bench, setting, peaks, report, 60 * options.minutes, partial(record.write, bench.name))
        except DeviceLost as error:
            lost = f"{bench.name}: the device does not answer any more, the rest is left out: {error}"
            break
    for path in record.paths:
        print(f"wrote {path}")
    left = record.missing()
    if left and not lost:
        print(f"left out, not to be done within {options.minutes:g} minutes: {'; '.join(left)}")
    rows = [row for done in record.rows.values() for row in done]
    failed = list(dict.fromkeys(f"{row.bench} {row.case}: {row.provider}: {row.status}" for row in rows if row.failed))
    failed += [lost] if lost else []
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


class Record:
    """The documents of a run, written anew after each case.

    Args:
        target: one file for everything; "": each benchmark to its own place; None: nothing is written.
        benches: what is asked for.
        setting: device and thoroughness.
        peaks: the device's, or None.
    """

    def __init__(
        self, target: str | None, benches: Sequence[Bench], setting: Setting, peaks: measure.Peaks | None
    ) -> None:
        self.target, self.benches = target, benches
        self.rows: dict[str, list[Row]] = {bench.name: [] for bench in benches}
        self.paths: list[Path] = []
        self._left = {bench.name: [case.name for case in bench.cases(setting)] for bench in benches}
        self._content = document.document([], setting, peaks) if target is not None else {}

    def add(self, bench: str, case: Case, done: Sequence[Row]) -> None:
        """Enter the rows of a case and write."""
        self.rows[bench] += done
        self._left[bench].remove(case.name)
        self.write(bench, case, [])

    def write(self, bench: str, case: Case, begun: Sequence[Row]) -> None:
        """Write what there is, with the rows of a case that is not at its end."""
        if self.target is None:
            return
        names = list(self.rows) if self.target else [bench]
        path = Path(self.target) if self.target else document.default_path(bench, self._content["device"])
        there = [row for name in names for row in self.rows[name]]
        rows = [document.finite(dataclasses.asdict(row)) for row in (*there, *begun)]
        missing = self.missing(names)
        document.write(path, {**self._content, "complete": not missing, "missing": missing, "rows": rows})
        self.paths += [] if path in self.paths else [path]

    def missing(self, names: Sequence[str] | None = None) -> list[str]:
        """The cases that were not measured (yet)."""
        return [f"{name} {case}" for name in self._left if names is None or name in names for case in self._left[name]]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options as given."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench", description=summary, epilog=details)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; without any: all")
    parser.add_argument("--list", action="store_true", help="say what there is")
    target = "bench/results/<device>/<NAME>.json without FILE"
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help=f"write the results, to {target}")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    parser.add_argument("--minutes", **document.MINUTES)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here, help=f"default here: {here}")
    return parser.parse_args(arguments)


def _problem(options: argparse.Namespace, known: list[str]) -> str:
    """What is wrong with the options, one sentence; empty if nothing is."""
    for name in options.names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.3)
            hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(known)}"
            return f"python -m bench: there is no benchmark {name!r}; {hint} (python -m bench --list shows all)"
    if options.json and not options.json.endswith(".json"):
        return f"python -m bench: --json takes a file that ends in .json (it got {options.json!r}; NAMEs go first)"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "python -m bench: --device=cuda needs a GPU that torch can use (torch.cuda.is_available() is False)"
    return ""


def _introduce(setting: Setting, peaks: measure.Peaks | None, say: Callable[[str], None]) -> None:
    """Say what is measured, and how."""
    facts = document.device_facts(setting.device, document.environment()["devices"])
    say(", ".join(f"{name} {value}" if name != "kind" else str(value) for name, value in facts.items()))
    if peaks is None:
        say(f"times: {measure.METHOD['cpu']}")
        return
    tera = (peaks.bytes_per_second / 1e12, peaks.flops_per_second / 1e12)
    say(f"peaks: {tera[0]:.2f} TB/s, {tera[1]:.0f} TFLOP/s bf16; {measure.METHOD['peaks']}")
    say(f"times: {measure.METHOD['gpu']}; graph: {measure.METHOD['graph']}")


if __name__ == "__main__":
    sys.exit(main())
