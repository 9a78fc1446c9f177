import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssr_fast.prepare import main
from tests.data import builders
from tests.data.builders import assert_sentence, ids, picture, save


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def one_error(err: str) -> str:
    """stderr is one `error: <sentence>` line."""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err[len("error: ") :].strip()


def line_with(text: str, *words: str) -> list[str]:
    """The cells of the one table line that has all the words."""
    (line,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return [cell.strip() for cell in line.replace("┃", "│").split("│")]


def test_a_good_data_set_is_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = builders.camvid(tmp_path / "CamVid")
    code, out, err = run(capsys, "check", tmp_path, "--condition", "day")
    assert code == 0 and "Problems" not in out and "no problems" in out
    assert f"checking 2 of 2 files of {root}" in err
    assert line_with(out, "layout")[0].split()[1] == "camvid"
    assert "all 16x8" in out and "2 (2 usable)" in out
    assert line_with(out, "road")[1:6] == ["3", "road", "64", "25.00%", "2"]
    assert line_with(out, "(ignored)")[1:6] == ["255", "(ignored)", "64", "25.00%", "2"]
    assert "no label holds the classes building, pole" in out


def test_problems_are_listed_with_path_problem_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builders.folder(tmp_path, ("a[red]", "b", "c"))
    (tmp_path / "images" / "b.png").write_text("x")
    save(tmp_path / "labels" / "a[red].png", ids(0, 7))
    save(tmp_path / "labels" / "c.png", ids(255))
    code, out, err = run(capsys, "check", tmp_path)
    assert code == 2 and "error" not in err
    assert line_with(out, "images/b.png")[2].startswith("is not an image")
    assert "value 7 at column 8, row 0" in line_with(out, "labels/a[red].png")[2]
    assert "is ignored everywhere" in line_with(out, "labels/c.png")[2]
    assert "3 problems" in out


def test_left_out_files_alone_are_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builders.folder(tmp_path)
    save(tmp_path / "labels" / "c.png", ids(0))
    code, out, _ = run(capsys, "check", tmp_path)
    assert code == 0 and line_with(out, "labels/c.png")[3].startswith("left out") and "1 file(s) left out" in out


def test_different_sizes_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builders.folder(tmp_path)
    save(tmp_path / "images" / "big.png", picture(width=30, height=20))
    save(tmp_path / "labels" / "big.png", ids(0, 1, width=30, height=20))
    assert "16x8 to 30x20, mostly 16x8 (2 images)" in run(capsys, "check", tmp_path)[1]


def test_long_lists_are_cut_and_json_has_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builders.folder(tmp_path / "set", tuple(f"i{k:02d}" for k in range(60)))
    for path in (tmp_path / "set" / "labels").iterdir():
        path.write_text("x")
    code, out, _ = run(capsys, "check", tmp_path / "set", "--json", tmp_path / "all.json")
    assert code == 2 and out.count("is not an image") == 50 and "and 10 more" in out
    content = json.loads((tmp_path / "all.json").read_text())
    assert len(content["problems"]) == 60 and content["usable"] == 0


def test_json_holds_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builders.folder(tmp_path / "set")
    run(capsys, "check", tmp_path / "set", "--json", tmp_path / "all.json")
    content = json.loads((tmp_path / "all.json").read_text())
    assert content["layout"] == "folder" and content["images"] == content["labels"] == content["usable"] == 2
    assert content["sizes"] == [{"width": 16, "height": 8, "images": 2}]
    assert content["classes"][1] == {"id": 1, "name": "car", "pixels": 64, "share": 0.25, "images": 2}
    assert content["problems"] == [] and content["notes"] == [] and len(content["digest"]) == 64


def test_unlabelled_looks_at_images_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "images" / "a.png", picture())
    code, out, _ = run(capsys, "check", tmp_path, "--unlabelled")
    assert code == 0 and "Classes" not in out and "not looked at" in out
    code, _, err = run(capsys, "check", tmp_path)
    assert code == 2
    assert_sentence(one_error(err), f"ROOT {tmp_path}", "classes.json")


def test_layout_split_and_classes_are_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builders.folder(tmp_path / "set", ("train/a", "val/b"))
    (tmp_path / "c.txt").write_text("p\nq\nr\n")
    arguments = ("check", tmp_path / "set", "--layout", "folder", "--split", "val", "--classes", tmp_path / "c.txt")
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and line_with(out, "│ q ")[1:4] == ["1", "q", "32"]


def test_class_statistics_are_written_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = builders.gta5(tmp_path / "gta")
    assert run(capsys, "check", root, "--write-class-stats", root)[0] == 0
    assert len(list(root.glob("*.json"))) == 3
    assert "agrees with the labels" in run(capsys, "check", root)[1]
    save(root / "labels" / "00001_labelTrainIds.png", ids(3))
    code, out, _ = run(capsys, "check", root)
    assert code == 0 and "contradicts" in out and "not used" in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "COMMAND"),
        (("polish",), "polish"),
        (("check",), "ROOT"),
        (("check", "/nowhere/at/all"), "/nowhere/at/all"),
        (("check", "/nowhere", "--colour"), "--colour"),
        (("check", "/nowhere", "--split"), "--split"),
        (("check", "/nowhere", "--unlabelled", "--write-class-stats", "x"), "--write-class-stats"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert_sentence(one_error(err), part)


def test_a_json_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builders.folder(tmp_path)
    code, _, err = run(capsys, "check", tmp_path, "--json", tmp_path / "no" / "x.json")
    assert code == 2
    assert_sentence(one_error(err.splitlines(keepends=True)[-1]), tmp_path / "no" / "x.json")


def test_as_a_program(tmp_path: Path) -> None:
    builders.folder(tmp_path, ("ä",))
    (tmp_path / "images" / "ä.png").write_text("x")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C"}
    command = [sys.executable, "-m", "ssr_fast.prepare", "check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and "is not an image" in done.stdout and "Traceback" not in done.stderr
    done = subprocess.run([*command[:3], "nonsense"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
