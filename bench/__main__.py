"""Compare implementations side by side: `python -m bench [NAME...] [--list] [--json [FILE]] [--quick]`.

On a GPU if there is one, else the small cases on the CPU. Exit code 0: everything that can run here ran and is right;
1: a provider raised or returned a wrong result; 2: a mistake on the command line. `python -m bench ledger` times
nothing and counts what a training step asks of the device, `python -m bench scaling` models several GPUs,
`python -m bench step` times whole training steps, `python -m bench overhead` what guard and checkpoints cost of one,
`python -m bench sam` compares encoders of SAM (--help of each says more).
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import document, measure, tables
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
    "scaling": (
        "bench.scaling.__main__",
        "several GPUs, by a model from one GPU's step: efficiency, hours, what to use",
    ),
    "loader": ("bench.loader", "input pipelines: torchvision's and ours, samples a second, CPU time, memory"),
    "overhead": ("bench.overhead", "guard and checkpoints: their share of a training step, on the CPU's demo"),
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
    rows: list[Row] = []
    for name in options.names or known:
        bench = known[name]

        def report(case: Case, done: list[Row], bench: Bench = bench) -> None:
            on_gpu = setting.device.type == "cuda"
            goals = bench.goals(case, {row.provider: row for row in done}) if on_gpu else []
            tables.show(case, done, peaks, goals, screen)

        rows += run(bench, setting, peaks, report)
    if options.json is not None:
        for path in _save(options.json, rows, setting, peaks):
            print(f"wrote {path}")
    failed = list(dict.fromkeys(f"{row.bench} {row.case}: {row.provider}: {row.status}" for row in rows if row.failed))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options as given."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench", description=summary, epilog=details)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; without any: all")
    parser.add_argument("--list", action="store_true", help="say what there is")
    target = "bench/results/<NAME>-<device>.json without FILE"
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help=f"write the results, to {target}")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
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


def _save(target: str, rows: list[Row], setting: Setting, peaks: measure.Peaks | None) -> list[Path]:
    """Write one document to `target`, or, where that is empty, one a benchmark to its own place."""
    content = document.document(rows, setting, peaks)
    if target:
        document.write(Path(target), content)
        return [Path(target)]
    paths = []
    for name in dict.fromkeys(row.bench for row in rows):
        path = document.default_path(name, content["device"])
        own = [row for row in content["rows"] if row["bench"] == name]
        document.write(path, {**content, "rows": own})
        paths.append(path)
    return paths


if __name__ == "__main__":
    sys.exit(main())
