"""Option parsing that names every mistake at once, and the exit codes."""

import errno
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse import ActionConfigFile, ArgumentParser

from ssr_fast import commandline
from ssr_fast.commandline import command_parser, parse, raise_problems
from ssr_fast.errors import UserError


@dataclass(kw_only=True)
class Scenes:
    count: int = 3
    """Scenes."""
    gap: float = 0.5
    """Gap."""


@dataclass(kw_only=True)
class Source:
    root: str = ""
    """Root."""
    resize: tuple[int, int] | None = None
    """Box."""


@dataclass(kw_only=True)
class Data:
    source: Source = field(default_factory=Source)
    """Source."""
    scenes: Scenes | None = None
    """Scenes."""
    workers: int = 2
    """Workers."""


@dataclass(kw_only=True)
class Run:
    dir: str = ""
    """Folder."""
    steps: int = 10
    """Steps."""
    lr: float = 0.1
    """Rate."""
    fast: bool = False
    """Fast."""
    kind: Literal["a", "b"] = "a"
    """Kind."""
    stages: tuple[str, ...] | None = None
    """Stages."""


def parser() -> ArgumentParser:
    made = command_parser("ssr_fast.x", "text")
    made.add_argument("--config", action=ActionConfigFile)
    made.add_argument("model", type=str)
    made.add_argument("--resume", nargs="?", const="", default=None, type=str)
    made.add_argument("--flag", action="store_true")
    made.add_argument("--protocol", choices=("one", "two"), default="one")
    made.add_class_arguments(Run, "run")
    made.add_class_arguments(Data, "data")
    return made


def mistakes(*argv: str) -> list[str]:
    with pytest.raises(UserError) as error:
        parse(parser(), argv)
    return str(error.value).splitlines()


def test_right_options_in_all_spellings(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run:\n  steps: 7\n  lr: 1e-3\ndata: {source: {root: x}, scenes: {gap: 0.25}}\n")
    result = parse(
        parser(),
        [
            "m",
            "--config",
            str(file),
            "--run.dir=a b",
            "--data.workers",
            "-1",
            "--flag",
            "--data.source.resize",
            "3",
            "4",
        ],
    )
    assert (result.model, result.run.steps, result.run.lr, result.run.dir, result.flag) == ("m", 7, 1e-3, "a b", True)
    assert result.data.workers == -1 and result.data.source.resize == (3, 4) and result.data.scenes.gap == 0.25
    assert parse(parser(), ["--data.source.resize", "[5, 6]", "m"]).data.source.resize == (5, 6)
    assert parse(parser(), ["--data.source.resize", "null", "m"]).data.source.resize is None
    assert parse(parser(), ["m", "--data.scenes.gap", "0.75"]).data.scenes.gap == 0.75
    assert parse(parser(), ["m", "--resume"]).resume == "" and parse(parser(), ["m", "--resume", "d"]).resume == "d"
    assert parse(parser(), ["--", "-odd"]).model == "-odd"


def test_all_mistakes_come_at_once() -> None:
    assert mistakes(
        "m", "--run.stpes", "3", "--run.steps=x", "--data.source.rooot=1", "--run.lr", "fast", "--protocol", "three",
        "--flag=1", "--run.fast", "perhaps", "--run.kind=c", "--run.dir", "more", "words"
    ) == [
        "unknown option --run.stpes: did you mean --run.steps?",
        "--run.steps must be an integer (it is x)",
        "unknown option --data.source.rooot: did you mean --data.source.root?",
        "--run.lr must be a number (it is fast)",
        "--protocol must be one of one, two (it is three)",
        "--flag takes no value (it has 1)",
        "--run.fast must be true or false (it is perhaps)",
        "--run.kind must be one of a, b (it is c)",
        "unexpected argument words",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        ("--steps", "--run.steps"),
        ("--run-steps", "--run.steps"),
        ("--workers", "--data.workers"),
        ("--data.sorce.root", "--data.source.root"),
        ("--resize", "--data.source.resize"),
        ("--protcol", "--protocol"),
    ],
)
def test_suggestions(given: str, suggested: str) -> None:
    assert mistakes("m", given, "3") == [f"unknown option {given}: did you mean {suggested}?"]


def test_no_suggestion_for_what_is_like_nothing() -> None:
    assert mistakes("m", "--zzzzqqq") == ["unknown option --zzzzqqq"]


def test_abbreviations_are_not_guessed() -> None:
    assert mistakes("m", "--run.st", "3") == ["unknown option --run.st: did you mean --run.steps or --run.stages?"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ((), "the argument model is missing: see --help"),
        (("m", "--run.steps"), "--run.steps needs a value"),
        (("m", "--run.steps", "--flag"), "--run.steps needs a value"),
        (("m", "--run.steps="), "--run.steps must be an integer (it is empty)"),
        (("m", "--run.steps", "1.5"), "--run.steps must be an integer (it is 1.5)"),
        (
            ("m", "--data.source.resize", "3"),
            "--data.source.resize must be 2 integers such as 512 512, or null (it is 3)",
        ),
        (
            ("m", "--data.source.resize", "[1,2,3]"),
            "--data.source.resize must be 2 integers such as 512 512, or null (it is [1,2,3])",
        ),
        (("m", "n"), "unexpected argument n"),
        (("m", "-x"), "unknown option -x"),
        (("m", "--config"), "--config needs a value"),
        (("m", "--config", "none.yaml"), "the configuration file none.yaml cannot be read (No such file or directory)"),
        (("m", "--run", "nofile"), "--run nofile is no file with its settings: give them one by one, as --run.dir"),
    ],
)
def test_single_mistakes(argv: tuple[str, ...], sentence: str) -> None:
    assert mistakes(*argv) == [sentence]


def test_a_nested_option_of_an_optional_group_is_known() -> None:
    """--data.scenes.gap exists only through the type of --data.scenes; beside another mistake it is no second one."""
    assert mistakes("m", "--data.scenes.gap", "0.3", "--run.steps", "x") == ["--run.steps must be an integer (it is x)"]
    (sentence,) = mistakes("m", "--data.scenes.gap", "wide")
    assert sentence.startswith("--data.scenes.gap") and "wide" in sentence


def test_configuration_files_are_checked_whole(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "run:\n  steps: many\n  stpes: 3\n  lr:\n  kind: a\n  kind: b\ndta: {workers: 3}\ndata:\n  workers: [1]\n"
        "  source: {resize: [1, 2, 3]}\n"
    )
    assert mistakes("m", "--config", str(file), "--run.lr", "q") == [
        f"{file}, line 3: unknown key run.stpes: did you mean run.steps?",
        f"{file}, line 6: the key run.kind is there twice (first on line 5)",
        f"{file}, line 7: unknown key dta",
        f"{file}, line 2: run.steps must be an integer (it is many)",
        f"{file}, line 4: run.lr must be a number (it is null)",
        f"{file}, line 9: data.workers must be an integer (it is [1])",
        f"{file}, line 10: data.source.resize must be 2 integers such as 512 512, or null (it is [1, 2, 3])",
        "--run.lr must be a number (it is q)",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run:\n  steps: [3\n", "line 3 is not valid YAML"),
        ("run:\n\tsteps: 3\n", "line 2 is not valid YAML"),
        ("- a\n- b\n", "must hold keys with values"),
        ("just text", "must hold keys with values"),
        ("a: &x [*x, 1]\n", "unknown key a"),
        ("run: {steps: !!python/object:os.system 3}", "run.steps"),
        (b"\xff\xfe\x00", "cannot be read (it is not UTF-8 text)"),
    ],
)
def test_bad_configuration_files(tmp_path: Path, text: str | bytes, words: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    (sentence,) = mistakes("m", "--config", str(file))
    assert words in sentence and str(file) in sentence


def test_an_empty_configuration_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert parse(parser(), ["m", "--config", str(tmp_path / "c.yaml")]).run.steps == 10


def test_a_printed_configuration_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(parser(), ["m", "--run.steps", "77", "--data.scenes.gap", "0.125", "--print_config"])
    assert exit_.value.code in (0, None)
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    result = parse(parser(), ["--config", str(tmp_path / "c.yaml")])
    assert (result.model, result.run.steps, result.data.scenes.gap) == ("m", 77, 0.125)


def test_help_wins_over_mistakes_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(parser(), ["--help"])
    assert exit_.value.code in (0, None) and "--run.steps" in capsys.readouterr().out


def test_raise_problems() -> None:
    raise_problems([])
    with pytest.raises(UserError, match="^a\nb$"):
        raise_problems(["a", "b"])


def outcome(monkeypatch: pytest.MonkeyPatch, main: Callable[[list[str]], int]) -> int:
    monkeypatch.setattr(sys, "argv", ["x", "--a"])
    with pytest.raises(SystemExit) as exit_:
        commandline.run(main)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def main(argv: list[str]) -> int:
        assert argv == ["--a"]
        raise error

    return main


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(monkeypatch, lambda argv: 0) == 0
    assert outcome(monkeypatch, lambda argv: 3) == 3
    assert capsys.readouterr().err == ""
    assert outcome(monkeypatch, raising(UserError("one thing\nanother"))) == 2
    assert capsys.readouterr().err == "error: one thing\nerror: another\n"
    assert outcome(monkeypatch, raising(KeyboardInterrupt())) == 3
    assert "Traceback" not in capsys.readouterr().err
    full = OSError(errno.ENOSPC, "No space left on device", "/data/out.png")
    assert outcome(monkeypatch, raising(full)) == 2
    assert capsys.readouterr().err.startswith("error: /data/out.png cannot be used (No space left on device)")


@pytest.mark.parametrize(
    "error", [ValueError("inner"), OSError("x"), FileNotFoundError(2, "gone", "f"), AssertionError()]
)
def test_our_faults_have_a_traceback_and_ask_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert outcome(monkeypatch, raising(error)) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith(f"{commandline.FAULT_SENTENCE}\n")
