"""`python -m ssr_fast.prepare check ROOT`: look at a data set before training does."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from ssr_fast.data.check_table import as_json, print_diagnosis
from ssr_fast.data.class_stats import STATS_FILE, read_rcs_files, write_rcs_files
from ssr_fast.data.index import DomainConfig, diagnose
from ssr_fast.data.layouts import LAYOUTS
from ssr_fast.errors import UserError


class _Parser(argparse.ArgumentParser):
    """argparse with its errors as one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0 all is well, 2 problems in the data or a user's mistake."""
    parser = _Parser(prog="python -m ssr_fast.prepare", description="Prepare a data set.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_check(commands)
    try:
        arguments = parser.parse_args(argv)
        exit_code: int = arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return exit_code


def _add_check(commands: "argparse._SubParsersAction[_Parser]") -> None:
    """The subcommand `check`."""
    parser = commands.add_parser(
        "check",
        help="open every file once; list bad files, sizes and classes",
        description="Open every image and label once; list bad files, sizes and classes. Exit code 2 if training would "
        "not start.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_check)
    add_domain(parser)
    parser.add_argument("--unlabelled", action="store_true", help="look at the images only, as for a target set")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument(
        "--write-class-stats", type=Path, metavar="FOLDER", help="write DAFormer's three class statistics to FOLDER"
    )


def add_domain(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which data set: the same for every subcommand."""
    parser.add_argument("root", metavar="ROOT", help="folder of the data set")
    parser.add_argument("--layout", default="auto", help=f"auto (default), {', '.join(LAYOUTS)}")
    parser.add_argument("--split", default="train", help="train (default), val, test or all")
    parser.add_argument("--condition", default="", help="such as night (acdc, darkzurich) or dusk (camvid)")
    parser.add_argument("--classes", default="", metavar="FILE", help="classes file of a folder data set")


def domain(arguments: argparse.Namespace) -> DomainConfig:
    """What `add_domain` parsed."""
    return DomainConfig(
        root=arguments.root,
        layout=arguments.layout,
        split=arguments.split,
        condition=arguments.condition,
        classes=arguments.classes,
    )


def _check(arguments: argparse.Namespace) -> int:
    """Run `check`."""
    if arguments.unlabelled and arguments.write_class_stats:
        raise UserError("--write-class-stats needs labels, which --unlabelled does not read; leave one out")
    diagnosis = diagnose(domain(arguments), not arguments.unlabelled, report=_tell)
    console = Console()
    print_diagnosis(diagnosis, console)
    index = diagnosis.index()
    if diagnosis.labelled and (diagnosis.layout.root / STATS_FILE).is_file():
        try:
            read_rcs_files(diagnosis.layout.root, index)
            note = f"{STATS_FILE} agrees with the labels"
        except UserError as error:
            note = f"{error} (it is not used: labels are counted)"
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if arguments.write_class_stats:
        write_rcs_files(index, arguments.write_class_stats)
    if arguments.json:
        _write_json(as_json(diagnosis), arguments.json)
    return 2 if diagnosis.fatal else 0


def _write_json(content: dict[str, object], path: Path) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written ({error.strerror}); give another file") from error


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
