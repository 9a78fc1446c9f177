"""The report: complete, well formed, safe, and good with whatever a run directory lacks."""

import base64
import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssr_fast.errors import UserError
from ssr_fast.report.page import write_report
from ssr_fast.report.run_data import read_run
from ssr_fast.report.sections import duration
from tests.report.fabricate import NAMES, summary, write_run

VOID = {"meta", "img", "br", "hr", "link", "input", "rect", "line"}
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> & co"


class Checker(HTMLParser):
    """Fails on tags that do not close in order; collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def check(folder: Path) -> Checker:
    """Write the report and check what must hold for every report."""
    path = write_report(folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    for tag, attributes in checker.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster"):
                assert value is not None and value.startswith("data:image/"), f"<{tag} {name}={value!r:.60}>"
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert "nan" not in checker.text.split() and "None" not in checker.text.split()
    assert not list(folder.glob(".report*"))
    return checker


def images(checker: Checker) -> list[str]:
    return [str(attributes["src"]) for tag, attributes in checker.tags if tag == "img"]


def test_a_full_run(tmp_path: Path) -> None:
    checker = check(write_run(tmp_path, curves=True))
    for expected in ("24.2", "43.0", "55.7", "+31.5", "+18.8", "12.7", "Street scenes", "no evidence for GTA5"):
        assert expected in checker.text, expected
    for name in NAMES:
        assert name in checker.text
    assert "python -m ssr_fast.train demo --run.seed 0" in checker.text
    assert "steps: 300" in checker.text, "the configuration"
    assert "CPU (2 cores)" in checker.text and "versions.torch" in checker.text and "2.11.0" in checker.text
    assert len(images(checker)) == 2 + 4, "two samples, four curves"
    assert sum(tag == "svg" for tag, _ in checker.tags) == 3
    widths = [float(str(a["width"])) for tag, a in checker.tags if tag == "rect" and "fill" in a]
    assert widths == [24.2, 43.0, 55.7]
    for source in images(checker):
        assert base64.b64decode(source.partition(",")[2], validate=True)[1:4] == b"PNG"


def test_it_is_a_page_for_phones_and_dark_rooms(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>") and 'lang="en"' in html
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html
    assert "default-src 'none'" in html, "the policy forbids everything that could be loaded"


def test_everything_is_escaped(tmp_path: Path) -> None:
    content = summary({"source_only": 10.0, EVIL: 20.0})
    content |= {"title": EVIL, "about": EVIL, "preset": EVIL, "protocol": EVIL}
    content["classes"]["names"][0] = EVIL
    for stage in content["stages"]:
        stage["per_class"] = {EVIL: 1.0, "road": 2.0}
    write_run(tmp_path, content)
    (tmp_path / "environment.json").write_text(json.dumps({"device": EVIL, "command": EVIL, EVIL: {EVIL: [EVIL]}}))
    (tmp_path / "config.yaml").write_text(f"name: {EVIL}\n</pre></details>")
    rows = [{"stage": EVIL, "step": k, "loss": 1.0, f"loss/{EVIL}": 2.0, "eval/miou": 3.0} for k in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "a<b>&'\".png")
    (tmp_path / "samples" / "<i>broken.png").write_bytes(b"no picture")
    checker = check(tmp_path)
    assert checker.text.count("<script>alert(1)</script>") >= 10, "the text is there, as text"


def test_a_class_colour_cannot_carry_style(tmp_path: Path) -> None:
    content = summary()
    content["classes"]["colors"] = [
        ["0);background:url(http://x", 1, 2],
        [1],
        [300, 4, 5],
        None,
        [1, 2, 3],
        7,
        "red",
        {},
    ]
    checker = check(write_run(tmp_path, content))
    for _, attributes in checker.tags:
        assert "url(" not in (attributes.get("style") or "")


def test_an_empty_directory_gives_a_page(tmp_path: Path) -> None:
    checker = check(tmp_path)
    assert "no evaluation yet" in checker.text and tmp_path.name in checker.text
    assert "Before and after" not in checker.text and "Class by class" not in checker.text


@pytest.mark.parametrize("missing", ["summary.json", "environment.json", "config.yaml", "samples"])
def test_each_piece_may_be_missing(tmp_path: Path, missing: str) -> None:
    write_run(tmp_path, curves=missing == "summary.json")
    path = tmp_path / missing
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink()
    checker = check(tmp_path)
    assert "55.7" in checker.text, "without a summary the last evaluations in metrics.jsonl say it"


def test_one_stage_has_no_change_column(tmp_path: Path) -> None:
    checker = check(write_run(tmp_path, summary({"ssr": 55.7})))
    assert "Change" not in checker.text and "above" not in checker.text


def test_a_loss_is_told_as_a_loss(tmp_path: Path) -> None:
    checker = check(write_run(tmp_path, summary({"source_only": 50.0, "ssr": 41.5})))
    assert "8.5 points below source only" in checker.text
    assert "−8.5" in checker.text


def test_the_wait_for_data_stands_beside_the_time(tmp_path: Path) -> None:
    write_run(tmp_path, curves=True)
    assert "Waiting for data" not in check(tmp_path).text  # a run of before it was measured
    windows = [("ssr", 2, 0.02), ("ssr", 4, 0.05), ("ssr", 6, None), ("self_training", 2, 0.4)]
    rows = [{"stage": stage, "step": step, "data_share": share} for stage, step, share in windows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = check(tmp_path).text
    assert "TimeWaiting for data" in text
    assert "40 s–Self-training" in text and "40 s40.0 %SSR" in text and "40 s3.5 %" in text


def test_seeds_are_averaged(tmp_path: Path) -> None:
    content = summary({"ssr": 50.0}, seeds=(0, 2, 4))
    checker = check(write_run(tmp_path, content))
    assert "52.0" in checker.text and "± 2.0" in checker.text and "0, 2, 4" in checker.text
    assert "2 min 0 s" in checker.text, "40 seconds, three times"


def test_unknown_numbers_are_dashes(tmp_path: Path) -> None:
    content = summary()
    content["stages"][0] |= {
        "target_miou": None,
        "per_class": {"road": None},
        "seconds": None,
        "steps": None,
        "seed": None,
    }
    content["stages"][1] |= {"target_miou": math.nan, "per_class": {}}
    checker = check(write_run(tmp_path, content))
    assert "–" in checker.text
    widths = [float(str(a["width"])) for tag, a in checker.tags if tag == "rect" and "fill" in a]
    assert widths == [0.0, 0.0, 55.7]


def test_wrong_kinds_in_the_summary_do_not_break_the_page(tmp_path: Path) -> None:
    for key in summary():
        for value in (None, 3, "text", [], {}, [None, 1]):
            content = copy.deepcopy(summary()) | {key: value}
            (tmp_path / "summary.json").write_text(json.dumps(content))
            check(tmp_path)


def test_half_a_line_of_metrics_is_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ssr", "step": 1, "loss": 2}\n\n[1]\n{"stage": "ssr", "st')
    checker = check(tmp_path)
    assert "2 lines of metrics.jsonl could not be read" in checker.text
    assert len(read_run(tmp_path).rows) == 1


def test_series_are_sorted_and_losses_found(tmp_path: Path) -> None:
    rows = [{"stage": "ssr", "step": 20, "loss": 1.0}, {"stage": "ssr", "step": 10, "loss": 2.0, "loss/align": 0.1}]
    rows += [{"stage": "ssr", "step": 10, "loss": None, "lossless": 1}, {"stage": "ssr", "loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = read_run(tmp_path)
    assert data.loss_keys() == ["loss", "loss/align"]
    steps = [step for step, _ in data.series("loss")["SSR"]]
    assert steps == [10, 10, 20]


def test_lines_come_in_the_order_of_the_stages_not_of_the_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", curves=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in reversed(rows)))
    data = read_run(folder)
    assert list(data.series("loss")) == [stage.title for stage in data.stages] == data.stage_titles()


def test_large_pictures_become_smaller(tmp_path: Path) -> None:
    write_run(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (900, 2400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "samples" / "99.png")
    checker = check(tmp_path)
    jpeg = [source for source in images(checker) if source.startswith("data:image/jpeg")]
    assert len(jpeg) == 1
    assert len(jpeg[0]) < (tmp_path / "samples" / "99.png").stat().st_size


def test_many_pictures_are_cut_and_counted(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for number in range(15):
        Image.new("RGB", (8, 8)).save(tmp_path / "samples" / f"{number:02d}.png")
    checker = check(tmp_path)
    assert len(images(checker)) == 12 and "3 more pictures" in checker.text


@pytest.mark.parametrize("name", ["summary.json", "environment.json"])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        write_report(tmp_path)


def test_errors_of_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path)


def test_the_report_is_a_function_of_the_files(tmp_path: Path) -> None:
    write_run(tmp_path)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (121, "2 min 1 s"), (7200, "2 h 0 min"), (math.nan, "–")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
