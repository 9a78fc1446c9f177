"""Run in its own process: looks at data sets as `prepare check` and training do, and writes down what came of it.

`python -m tests.faults.look_at JOB.json`; the job names the roots, the files to open alone, and where to write.
"""

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ssr_fast import prepare
from ssr_fast.data.images import BadFile, decode_image, decode_label, decode_synthia_label, palette_color, read_image
from ssr_fast.data.index import Diagnosis, DomainConfig, diagnose

DECODERS: tuple[Callable[[Path], object], ...] = (
    decode_image, decode_label, decode_synthia_label, lambda path: palette_color(path, 7),
)  # fmt: skip


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def check(root: str, options: list[str], report: Path) -> dict[str, Any]:
    """`prepare check` with its exit code, output and JSON file."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = prepare.main(["check", root, "--json", str(report), *options])
    return {"code": code, "printed": printed.getvalue(), **json.loads(report.read_text())}


def read_samples(diagnosis: Diagnosis) -> dict[str, str]:
    """Sample name -> empty if image and label are read as training reads them, else what is wrong."""
    found = {}
    for sample in diagnosis.samples:
        image, shape = read_image(sample.image), (sample.height, sample.width)
        problem = ""
        if image.dtype != np.uint8 or image.shape != (*shape, 3) or not image.flags.writeable:
            problem = f"image {image.dtype} {image.shape}"
        if sample.label is not None:
            label = diagnosis.layout.read_label(sample.label)
            if label.dtype != np.uint8 or label.shape != shape:
                problem += f" label {label.dtype} {label.shape}"
            if tuple(int((label == k).sum()) for k in range(len(sample.counts or ()))) != sample.counts:
                problem += " counts differ"
        found[sample.name] = problem
    return found


def open_alone(path: str) -> dict[str, str]:
    """Decoder -> what it raised besides BadFile; and a BadFile that is not about this very file."""
    wrong = {}
    for decode in DECODERS:
        try:
            decode(Path(path))
        except BadFile as error:
            if str(error.path) != path:
                wrong[str(decode)] = f"names {error.path}"
        except BaseException as error:
            wrong[str(decode)] = f"{type(error).__name__}: {error}"
    return wrong


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Look at everything the job names."""
    os.cpu_count = lambda: 16  # as many threads as there may ever be
    warnings.simplefilter("always")  # so that one that comes through is seen in the output
    result: dict[str, Any] = {"base": peak_bytes(), "roots": {}}
    for number, (root, labelled) in enumerate(job["roots"]):
        options = [] if labelled else ["--unlabelled"]
        looks = [check(root, options, Path(job["out"]) / f"{number}-{k}.json") for k in range(2)]
        diagnosis = diagnose(DomainConfig(root=root), labelled)
        result["roots"][root] = {
            "looks": looks,
            "samples": read_samples(diagnosis),
            "sentences": [str(row) for row in diagnosis.rows],
        }
    warnings.simplefilter("ignore")
    result["alone"] = {path: wrong for path in job["alone"] if (wrong := open_alone(path))}
    result["peak"] = peak_bytes()
    return result


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text(encoding="ascii"))
    Path(task["out"], "result.json").write_text(json.dumps(main(task)), encoding="ascii")
