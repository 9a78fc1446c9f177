"""What every entry point shares: exit codes, and option errors that are reported all at once with suggestions.

jsonargparse stops at its first error and words it for programmers. `parse` lets it try, and only when it fails looks
at each option and each key of each configuration file by itself, so that one run names every mistake.
"""

import argparse
import errno
import gc
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from ssr_fast.errors import UserError
from ssr_fast.options import expectation, find_action, option_names, suggestion, tuple_length

DONE, OUR_FAULT, USER_MISTAKE, STOPPED = 0, 1, 2, 3
FAULT_SENTENCE = "this is a fault of ssr_fast, please report it with the lines above"

_ENVIRONMENT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_PLAIN_TAG = "tag:yaml.org,2002:"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run an entry point on sys.argv and exit: its own code, 2 for a user's mistake, 3 interrupted, 1 our fault.

    A UserError's lines go to stderr as `error: <line>`, without a traceback; so does a full or read-only disk.
    """
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        _print_errors(str(error))
        code = USER_MISTAKE
    except KeyboardInterrupt:
        _print_errors("stopped by Ctrl-C")
        code = STOPPED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRORS and error.filename is not None:
            _print_errors(f"{error.filename} cannot be used ({error.strerror}): free space, or give another place")
            code = USER_MISTAKE
        else:
            traceback.print_exc()
            print(FAULT_SENTENCE, file=sys.stderr)
            code = OUR_FAULT
    gc.freeze()  # Python would search every object three more times before it ends
    sys.exit(code)


def _print_errors(message: str) -> None:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)


def tell(message: str) -> None:
    """A one-line message beside the results: on stderr."""
    print(message, file=sys.stderr)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one UserError with a line for each problem; nothing if there are none."""
    if problems:
        raise UserError("\n".join(problems))


def command_parser(module: str, description: str) -> ArgumentParser:
    """A parser as `parse` wants it, for `python -m <module>`."""
    return ArgumentParser(prog=f"python -m {module}", description=description, exit_on_error=False, allow_abbrev=False)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """The parser's result for argv, or one UserError that names every mistake in it.

    An option whose value is a tuple of n numbers may be given as `--option "[1, 2]"` or as `--option 1 2`.

    Args:
        parser: made by `command_parser` (exit_on_error and allow_abbrev are False).
        argv: the arguments behind the program's name.

    Raises:
        UserError: unknown options and configuration keys, each with a suggestion, wrong values, missing arguments,
            unreadable configuration files; one line each.
        SystemExit: --help, --print_config and their like have printed and ask to end.
    """
    argv = _join_tuples(parser, argv)
    words = list(_words(parser, argv))
    filled = [word for word in words if not any(_ConfigFile(parser, file).empty() for file in _config_files([word]))]
    if len(filled) < len(words):  # jsonargparse refuses a file of comments only
        words, argv = filled, [token for word in filled for token in word.tokens]
    problems = [problem for file in _config_files(words) for problem in _ConfigFile(parser, file).structure()]
    if not problems:
        try:
            return parser.parse_args(argv)
        except argparse.ArgumentError as error:
            problems = _diagnose(parser, words) or [_one_line(str(error))]
    else:
        problems = _diagnose(parser, words)
    raise UserError("\n".join(dict.fromkeys(problems)))


@dataclass(frozen=True)
class _Word:
    """One option with its values, or one positional argument (`name` is empty)."""

    name: str
    values: tuple[str, ...]
    tokens: tuple[str, ...]
    action: argparse.Action | None


def _words(parser: ArgumentParser, argv: Sequence[str]) -> Iterator[_Word]:
    """argv cut into options with their values and positional arguments, in argparse's way."""
    position = 0
    while position < len(argv):
        token = argv[position]
        if token == "--":
            yield from (_Word("", (rest,), ("--", rest), None) for rest in argv[position + 1 :])
            return
        if not _is_option(parser, token):
            yield _Word("", (token,), (token,), None)
            position += 1
            continue
        name, equals, value = token.partition("=")
        action = find_action(parser, name)
        end = position + 1
        if not equals:
            limit = _value_limit(action)
            while end < len(argv) and end - position <= limit and not _is_option(parser, argv[end]):
                end += 1
        values = (value,) if equals else tuple(argv[position + 1 : end])
        yield _Word(name, values, tuple(argv[position:end]), action)
        position = end


def _is_option(parser: ArgumentParser, token: str) -> bool:
    if token.partition("=")[0] in parser._option_string_actions:
        return True
    return len(token) > 1 and token[0] == "-" and " " not in token and not _NUMBER.fullmatch(token)


def _value_limit(action: argparse.Action | None) -> int:
    """How many tokens behind an option can be its values; an unknown option is taken to have one."""
    if action is None or action.nargs is None or action.nargs == "?":
        return 1
    return action.nargs if isinstance(action.nargs, int) else sys.maxsize


def _join_tuples(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """`--crop 512 512` becomes `--crop [512,512]` for options whose type is a tuple of two."""
    joined: list[str] = []
    position = 0
    while position < len(argv):
        if argv[position] == "--":
            return joined + list(argv[position:])
        length = tuple_length(parser._option_string_actions.get(argv[position]))
        values = argv[position + 1 : position + 1 + length]
        joined.append(argv[position])
        position += 1
        if length and len(values) == length and all(_NUMBER.fullmatch(value) for value in values):
            joined.append(f"[{','.join(values)}]")
            position += length
    return joined


def _diagnose(parser: ArgumentParser, words: Sequence[_Word]) -> list[str]:
    """Every mistake of a command line that the parser refuses."""
    positionals = [token for word in words if not word.name for token in word.tokens]
    base = _failure(parser, positionals)
    problems = []
    for word in words:
        if not word.name:
            continue
        if word.action is None:
            problems.append(f"unknown option {word.name}{suggestion(word.name, option_names(parser), '--')}")
        elif isinstance(word.action, ActionConfigFile):
            if not word.values:
                problems.append(f"{word.name} needs a value")
            for file in _config_files([word]):
                config = _ConfigFile(parser, file)
                problems += config.structure() + config.values(positionals, base)
        else:
            failure = _failure(parser, [*word.tokens, *positionals])
            if failure is not None and failure != base:
                problems.append(_value_problem(parser, word, failure))
    return problems if base is None else [*problems, base]


def _failure(parser: ArgumentParser, argv: list[str]) -> str | None:
    """What the parser says against argv in one line, None if it takes it."""
    try:
        parser.parse_args(argv)
    except argparse.ArgumentError as error:
        message = _one_line(str(error))
        for pattern, sentence in _KNOWN_MESSAGES:
            if match := pattern.fullmatch(message):
                return sentence.format(*match.groups())
        return message
    except SystemExit:  # --help among the options; its print is not what failed
        return None
    return None


_KNOWN_MESSAGES = (
    (re.compile(r"unrecognized arguments: (?:-- )?(.*)"), "unexpected argument {0}"),
    (re.compile(r'Key "(\w+)" is required but .*'), "the argument {0} is missing: see --help"),
    (re.compile(r"the following arguments are required: (.*)"), "the argument {0} is missing: see --help"),
)


def _value_problem(parser: ArgumentParser, word: _Word, failure: str) -> str:
    if word.action is not None and word.action.nargs == 0:
        return f"{word.name} takes no value (it has {_shown(word.values)})"
    if not word.values:
        return f"{word.name} needs a value"
    parts = [name for name in option_names(parser) if name.startswith(f"{word.name}.")]
    if parts:
        return f"{word.name} {_shown(word.values)} is no file with its settings: give them one by one, as {parts[0]}"
    expected = expectation(word.action)
    return f"{word.name} must be {expected} (it is {_shown(word.values)})" if expected else f"{word.name}: {failure}"


def _shown(values: Sequence[str]) -> str:
    return " ".join(values) if any(values) else "empty"


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _config_files(words: Sequence[_Word]) -> list[Path]:
    """Files given with --config; not pipes, which can be read only once, and the parser does that."""
    given = [Path(value) for word in words if isinstance(word.action, ActionConfigFile) for value in word.values]
    return [path for path in given if not path.is_fifo()]


class _ConfigFile:
    """A YAML configuration file, read as nodes: they know their lines."""

    def __init__(self, parser: ArgumentParser, path: Path) -> None:
        self.parser, self.path = parser, path
        dests = [action.dest for action in parser._actions if not action.dest.endswith(".help")]
        self.leaves = [dest for dest in dests if not any(other.startswith(f"{dest}.") for other in dests)]
        self.groups = [dest for dest in dests if dest not in self.leaves]

    def empty(self) -> bool:
        """A readable file without any key."""
        try:
            return self._root() is None
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return False

    def structure(self) -> list[str]:
        """Why the file cannot be read, or its unknown and repeated keys."""
        try:
            root = self._root()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            return [f"the configuration file {self.path} cannot be read ({reason})"]
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            return [f"the configuration file {self.path}{line} is not valid YAML ({_yaml_reason(error)})"]
        if root is not None and not isinstance(root, yaml.MappingNode):
            return [f"the configuration file {self.path} must hold keys with values, such as `run: {{steps: 100}}`"]
        seen: dict[str, int] = {}
        problems = []
        for key, at, node in self._items(root, ""):
            if not node.tag.startswith(_PLAIN_TAG) or "/" in node.tag.removeprefix(_PLAIN_TAG):
                problems.append(f"{self.path}, line {at}: {key} has the tag {node.tag}: give a plain value")
            if key in seen:
                problems.append(f"{self.path}, line {at}: the key {key} is there twice (first on line {seen[key]})")
            seen.setdefault(key, at)
            if key not in self.groups and not self._is_leaf(key):
                problems.append(f"{self.path}, line {at}: unknown key {key}{suggestion(key, self.leaves)}")
        return problems

    def values(self, positionals: list[str], base: str | None) -> list[str]:
        """The wrong values of the known keys; `base` is what the positional arguments alone fail with."""
        try:
            root = self._root()
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return []  # `structure` says so
        problems = []
        for key, line, node in self._items(root, ""):
            action = self.parser._option_string_actions.get(f"--{key}")
            if key not in self.leaves or action is None:
                continue
            text = _node_text(node)
            failure = _failure(self.parser, [f"--{key}={text}", *positionals])
            if failure is not None and failure != base:
                expected = expectation(action)
                sentence = f"{key} must be {expected} (it is {text or 'empty'})" if expected else f"{key}: {failure}"
                problems.append(f"{self.path}, line {line}: {sentence}")
        return problems

    def _root(self) -> yaml.Node | None:
        return yaml.compose(self.path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)

    def _is_leaf(self, key: str) -> bool:
        return any(key == leaf or key.startswith(f"{leaf}.") for leaf in self.leaves)

    def _items(self, node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int, yaml.Node]]:
        """(dotted key, line, value node) of a mapping and the mappings in it, groups before their members."""
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            yield key, key_node.start_mark.line + 1, value_node
            if key in self.groups:
                yield from self._items(value_node, f"{key}.")


def _yaml_reason(error: yaml.YAMLError) -> str:
    return _one_line(str(getattr(error, "problem", None) or error))


def _node_text(node: yaml.Node) -> str:
    """A value as it would be written behind an option."""
    if isinstance(node, yaml.ScalarNode):
        return "null" if node.tag.endswith(":null") else node.value
    loader = yaml.SafeLoader("")
    return json.dumps(loader.construct_object(node, deep=True), default=str)
