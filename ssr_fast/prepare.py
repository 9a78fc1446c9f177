"""`python -m ssr_fast.prepare check|store|masks|features ROOT`: check a data set before training does; make stores."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ssr_fast import prepare_check, prepare_features, prepare_masks, prepare_store
from ssr_fast.data.index import DomainConfig
from ssr_fast.data.layouts import LAYOUTS
from ssr_fast.errors import UserError

Run = Callable[[DomainConfig, argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """argparse with its errors as one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0 all is well, 2 problems in the data or a mistake, 3 Ctrl-C."""
    try:
        arguments = _parser().parse_args(argv)
        exit_code: int = arguments.run(domain(arguments), arguments)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "error: stopped by Ctrl-C; what is done is kept, and the same command goes on from there", file=sys.stderr
        )
        return 3
    return exit_code


def _parser() -> _Parser:
    parser = _Parser(prog="python -m ssr_fast.prepare", description="Prepare a data set.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    check = _add_command(
        commands,
        "check",
        "open every file once; list bad files, sizes and classes",
        "Open every image and label once; list bad files, sizes and classes. Exit code 2 if training would not start.",
        prepare_check.run,
    )
    prepare_check.add_options(check)
    store = _add_command(
        commands,
        "store",
        "make a store of resized images, labels and segments, for fast training",
        "Write what training needs once: resized images, train ids and segments in a few large files. Whole files that "
        "are there are kept, so a run that was stopped goes on with the same command.",
        prepare_store.run,
    )
    prepare_store.add_options(store)
    masks = _add_command(
        commands,
        "masks",
        "make a store of class-agnostic segments",
        "Make a store of class-agnostic segments, one 16-bit map an image. Whole maps that are there are kept. Exit "
        "code 2 if an image got none.",
        prepare_masks.run,
    )
    prepare_masks.add_options(masks)
    features = _add_command(
        commands,
        "features",
        "make a store of the frozen encoder's features",
        "Encode every image once, as a whole, for training with --sam.features cached_full. Whole files that are there "
        "are kept. Exit code 2 if an image got none.",
        prepare_features.run,
    )
    prepare_features.add_options(features)
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[_Parser]", name: str, help_text: str, description: str, run: Run
) -> _Parser:
    """A subcommand, with the arguments that say which data set."""
    parser = commands.add_parser(name, help=help_text, description=description, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("root", metavar="ROOT", help="folder of the data set")
    parser.add_argument("--layout", default="auto", help=f"auto (default), {', '.join(LAYOUTS)}")
    parser.add_argument("--split", default="train", help="train (default), val, test or all")
    parser.add_argument("--condition", default="", help="such as night (acdc, darkzurich) or dusk (camvid)")
    parser.add_argument("--classes", default="", metavar="FILE", help="classes file of a folder data set")
    return parser


def domain(arguments: argparse.Namespace) -> DomainConfig:
    """Which data set the arguments name."""
    return DomainConfig(
        root=arguments.root,
        layout=arguments.layout,
        split=arguments.split,
        condition=arguments.condition,
        classes=arguments.classes,
    )


if __name__ == "__main__":
    sys.exit(main())
