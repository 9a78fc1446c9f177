"""compute-sanitizer over the kernels' small cases: `python -m bench.sanitizer memcheck|racecheck`.

First the cases run without the tool, in several processes side by side: Triton then has compiled what they need, which
takes longer than the checks. Then `python -m bench.sanitize` runs under the tool. Verdict, findings and cases go to
bench/results/<device>/sanitize-<tool>.json. Exit code 0: every case is right and the tool found nothing; 1: not so.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = {"memcheck": ("--report-api-errors=no",), "racecheck": ()}
"""And options of each. A CUDA call that fails raises in Python; torch also makes calls that may fail."""
FOUND = 99
"""Exit code for an error of the tool's own finding; 1 is a wrong result of bench.sanitize."""
OPTIONS = (
    f"--error-exitcode={FOUND}",
    "--target-processes=application-only",  # not ptxas and others; a process without CUDA is an error of the tool
    "--destroy-on-device-error=kernel",  # a stopped kernel's row is wrong, the next ones still run
    "--show-backtrace=device",  # the host's is the interpreter's
    "--print-limit=50",
)
# without torch's pool every tensor is an allocation of its own, so that memcheck sees where each ends
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
WARM_UP_S = 60.0
KEPT = 200
"""Lines of the tool in the JSON."""
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)")
_HOST = re.compile(r"^=+\s+(Host Frame|Saved host backtrace)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitizer", description=__doc__)
    parser.add_argument("tool", choices=TOOLS)
    options = parser.parse_args(arguments)
    tool = find_tool()
    if tool is None:
        print("python -m bench.sanitizer: there is no compute-sanitizer (of the CUDA toolkit)", file=sys.stderr)
        return 1
    path = begin(options.tool)
    warm_up()
    command = [str(tool), "--tool", options.tool, *OPTIONS, *TOOLS[options.tool]]
    command += [sys.executable, "-m", "bench.sanitize", "--json", str(path)]
    return check(command, path, UNPOOLED if options.tool == "memcheck" else {})


def find_tool() -> Path | None:
    """compute-sanitizer: on PATH, or where the CUDA toolkit puts it."""
    if found := shutil.which("compute-sanitizer"):
        return Path(found)
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [home / "bin" for home in (*homes, Path("/usr/local/cuda"))]
    return next((place / "compute-sanitizer" for place in places if (place / "compute-sanitizer").is_file()), None)


def begin(tool: str) -> Path:
    """Write the document without a verdict, which a run that is cut off leaves; returns its place."""
    import torch

    from bench import document
    from bench.harness import Setting

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    content = document.document([], Setting(device), None)
    path = document.default_path(f"sanitize-{tool}", content["device"])
    document.write(path, {**content, "complete": False, "tool": tool, "verdict": "none: cut off"})
    return path


def warm_up() -> None:
    """Run the cases without the tool, side by side; what is wrong with them the run under the tool tells."""
    count = max(1, min(8, (os.cpu_count() or 1) // 2))
    command = [sys.executable, "-m", "bench.sanitize", "--part"]
    quiet = subprocess.DEVNULL
    children = [subprocess.Popen([*command, f"{k}/{count}"], stdout=quiet, stderr=quiet) for k in range(count)]
    try:
        for child in children:
            child.wait(WARM_UP_S)
    except subprocess.TimeoutExpired:
        print(f"the kernels were not compiled within {WARM_UP_S:.0f} s; the tool's run goes on with that", flush=True)
    finally:
        for child in children:
            child.kill()  # of one that has ended: nothing
            child.wait()


def check(command: Sequence[str], path: Path, variables: dict[str, str]) -> int:
    """Run the command under the tool, pass on what it prints, and enter the verdict into the document at `path`."""
    from bench import document

    lines, count = list[str](), None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, **variables},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("=====") and not _HOST.match(line):
                lines.append(line.strip("= \n"))
            if found := _SUMMARY.search(line):
                count = (count or 0) + int(found[1] or found[2])
    content = json.loads(path.read_text(encoding="utf-8"))
    failed = sum(row["status"] in ("wrong", "error") for row in content["rows"])
    verdict = "clean"
    if failed:
        verdict = f"{failed} cases are wrong"
    if count is None:
        verdict = f"none: the tool printed no summary (exit code {process.returncode})"
    elif count or process.returncode == FOUND:
        verdict = f"{count} findings"
    elif process.returncode and not failed:
        verdict = f"none: exit code {process.returncode}"
    kept = [line for line in lines if line][:KEPT]
    whole = count is not None and bool(content.get("cases_done"))
    document.write(path, {**content, "complete": whole, "verdict": verdict, "errors": count, "findings": kept})
    print(f"wrote {path}: {verdict}")
    return 0 if verdict == "clean" and whole else 1


if __name__ == "__main__":
    sys.exit(main())
