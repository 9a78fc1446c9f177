"""What `python -m ssr_fast.prepare check` does: open every file of a data set once and list what is wrong."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from ssr_fast.data.check_table import as_json, print_diagnosis
from ssr_fast.data.class_stats import STATS_FILE, write_rcs_files
from ssr_fast.data.index import DomainConfig, diagnose
from ssr_fast.errors import UserError
from ssr_fast.prepare_parts import compare_stats, tell


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `prepare check` beside those that say which data set."""
    parser.add_argument("--unlabelled", action="store_true", help="look at the images only, as for a target set")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument(
        "--write-class-stats", type=Path, metavar="FOLDER", help="write DAFormer's three class statistics to FOLDER"
    )


def run(config: DomainConfig, options: argparse.Namespace) -> int:
    """Check and print; the exit code: 0 all is well, 2 training would not start.

    Raises:
        UserError: wrong options, or a file that cannot be written.
    """
    if options.unlabelled and options.write_class_stats:
        raise UserError("--write-class-stats needs labels, which --unlabelled does not read; leave one out")
    diagnosis = diagnose(config, not options.unlabelled, report=tell, again=True)
    console = Console()
    print_diagnosis(diagnosis, console)
    index = diagnosis.index()
    if diagnosis.labelled and (diagnosis.layout.root / STATS_FILE).is_file():
        console.print(f"note: {compare_stats(index)}", highlight=False, markup=False, soft_wrap=True)
    if options.write_class_stats:
        write_rcs_files(index, options.write_class_stats)
    if options.json:
        _write_json(as_json(diagnosis), options.json)
    return 2 if diagnosis.fatal else 0


def _write_json(content: dict[str, object], path: Path) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written ({error.strerror}); give another file") from error
