"""Hundreds of malformed images and labels: each is named or handled, and none crashes, hangs or eats the memory.

`prepare check` and the decoders run in a process of their own, whose time and peak memory are bounded.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ssr_fast.data.images import MAX_PIXELS
from tests.data.builders import assert_sentence
from tests.faults.malformed import (
    ANY,
    HANDLED,
    NAMED,
    Case,
    build_folder,
    build_synthia,
    build_unlabelled,
    kind_of,
    partner,
)
from tests.faults.malformed_images import image_cases, large_cases
from tests.faults.malformed_labels import COLORS, color_cases, label_cases, synthia_cases

SECONDS = 150
MEMORY = 20 * MAX_PIXELS
"""Bytes above an idle process: the largest image takes 12 to 14 bytes a pixel to decode, and is decoded alone."""

Made = dict[Path, Case]


def look_at(folder: Path, roots: dict[Path, Made], labelled: bool = True, alone: bool = True) -> dict[str, Any]:
    """What the process found; a hang or a crash of it fails the test, and so does too much memory."""
    out = folder / "out"
    out.mkdir()
    job = {
        "roots": [[str(root), labelled] for root in roots],
        "alone": [str(path) for made in roots.values() for path in made] if alone else [],
        "out": str(out),
    }
    (out / "job.json").write_text(json.dumps(job), encoding="ascii")
    environment = {**os.environ, "SSR_FAST_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.faults.look_at", str(out / "job.json")]
    done = subprocess.run(
        command, env=environment, timeout=SECONDS, capture_output=True, text=True, errors="backslashreplace"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "result.json").read_text(encoding="ascii"))
    assert found["peak"] - found["base"] < MEMORY, f"{(found['peak'] - found['base']) >> 20} MiB more than idle"
    return found


def account(made: Made, result: dict[str, Any]) -> list[str]:
    """What is wrong with the verdicts on one data set: a case that is missing, misjudged, or a row too many."""
    rows = {path: [row["problem"] for row in result["looks"][0]["problems"] if row["path"] == path]
            for path in dict.fromkeys(row["path"] for row in result["looks"][0]["problems"])}  # fmt: skip
    wrong = []
    for path, case in made.items():
        problems = rows.pop(str(path), [])
        if case.expect == ANY and not problems and not case.label:  # a changed header may say another size
            problems = [problem for problem in rows.pop(str(partner(path)), []) if "and its image" in problem]
        used = case.stem in result["samples"]
        verdict = NAMED if problems else HANDLED if used else "missing"
        if (
            len(problems) > 1
            or (problems and used)
            or verdict not in (case.expect, *(NAMED, HANDLED) * (case.expect == ANY))
        ):
            wrong.append(f"{case.stem!r} should be {case.expect} and is {verdict} {problems}")
        elif problems and case.words not in problems[0]:
            wrong.append(f"{case.stem!r} should be named with {case.words!r}: {problems}")
    wrong += [f"{path!r} is named and is no case: {problems}" for path, problems in rows.items()]
    return wrong + [f"sample {name!r}: {problem}" for name, problem in result["samples"].items() if problem]


def assert_accounted(roots: dict[Path, Made], found: dict[str, Any]) -> None:
    for root, made in roots.items():
        result = found["roots"][str(root)]
        first, second = result["looks"]
        assert account(made, result) == []
        assert first["images"] == len(made) == first["usable"] + len(first["problems"])
        for sentence in result["sentences"]:
            assert_sentence(re.sub(r"[.!?] [A-Z]", "_", sentence.split(";")[0]) + ";" + sentence.partition(";")[2])
            assert sentence.isprintable(), repr(sentence)
        same = [
            {key: look[key] for key in ("problems", "usable", "digest", "notes", "code")} for look in (first, second)
        ]
        assert same[0] == same[1]
        assert first["code"] == (2 if first["problems"] else 0)
        for look in (first, second):
            assert not re.search(r"Traceback|Warning|is damaged|\x1b", look["printed"]), look["printed"]
    assert found["alone"] == {}


def test_malformed_inputs_are_named_or_handled(tmp_path: Path) -> None:
    ids, colors, synthia = tmp_path / "ids", tmp_path / "colours", tmp_path / "synthia"
    roots = {
        ids: build_folder(ids, image_cases() + label_cases(), ["road", "car", "sky"]),
        colors: build_folder(colors, color_cases(), COLORS),
        synthia: build_synthia(synthia, synthia_cases()),
    }
    for made in roots.values():
        kinds = Counter((case.label, kind_of(path)) for path, case in made.items())
        assert max(kinds.values()) == 1, [kind for kind, count in kinds.items() if count > 1]
    assert sum(map(len, roots.values())) >= 400
    sure = Counter(case.expect for made in roots.values() for case in made.values())
    assert sure[NAMED] >= 200 and sure[HANDLED] >= 60, sure
    assert_accounted(roots, look_at(tmp_path, roots))


def test_large_images_are_decoded_one_after_the_other(tmp_path: Path) -> None:
    roots = {tmp_path / "large": build_unlabelled(tmp_path / "large", large_cases(3))}
    assert_accounted(roots, look_at(tmp_path, roots, labelled=False, alone=False))


@pytest.mark.slow
def test_sixteen_large_images_take_no_more_memory_than_three(tmp_path: Path) -> None:
    roots = {tmp_path / "large": build_unlabelled(tmp_path / "large", large_cases(16))}
    assert_accounted(roots, look_at(tmp_path, roots, labelled=False, alone=False))


@pytest.mark.slow
def test_malformed_images_without_labels(tmp_path: Path) -> None:
    root = tmp_path / "images only"
    made = build_unlabelled(root, image_cases())
    assert_accounted({root: made}, look_at(tmp_path, {root: made}, labelled=False))
