"""The classes file of a `folder` data set: names, colours and ids of any classes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ssr_fast.data.labels import IGNORE, MAX_CLASSES, ClassSet, distinct_colors, id_table, train_id_table
from ssr_fast.errors import UserError

CLASS_FILES = ("classes.json", "classes.yaml", "classes.yml", "classes.txt")
"""Names that are looked for in the root, in this order."""

_KEYS = ("names", "colors", "ids", "things")
_MAX_ID = 65535


@dataclass(frozen=True, eq=False)
class ClassFile:
    """What a classes file says.

    Args:
        classes: the class set.
        table: value in a label file -> train id, UNKNOWN elsewhere, uint8 [256 or 65536].
        color_coded: colours were given, so RGB labels can be converted.
    """

    classes: ClassSet
    table: NDArray[np.uint8]
    color_coded: bool


def read_class_file(path: Path) -> ClassFile:
    """Read classes.json, .yaml or .txt.

    A .txt file has one name a line. The others hold a list of names, or {"names": [...], "colors": [[r, g, b], ...],
    "ids": {value in the files: train id}, "things": [train id, ...]} of which only names is needed. Without ids the
    files hold 0..K-1; 255 is always ignored.

    Raises:
        UserError: the file cannot be read or says something impossible; the sentence names file and key.
    """
    content = _parse(path)
    if isinstance(content, list):
        content = {"names": content}
    if not isinstance(content, dict) or "names" not in content:
        raise UserError(f'{path} must hold a list of class names or a mapping with "names"; write ["road", "car", ...]')
    strange = [str(key) for key in content if key not in _KEYS]
    if strange:
        raise UserError(f'{path} has the unknown key "{strange[0]}"; the keys are {", ".join(_KEYS)}')
    names = _names(content["names"], path)
    colors = _colors(content.get("colors"), len(names), path)
    things = _things(content.get("things"), len(names), path)
    ids = _ids(content.get("ids"), len(names), path)
    classes = ClassSet(path.parent.name, names, colors or distinct_colors(len(names)), things)
    if ids is None:
        table = train_id_table(len(names))
    else:
        table = id_table(ids, size=256 if max(ids) < 256 else _MAX_ID + 1, known=() if IGNORE in ids else (IGNORE,))
    return ClassFile(classes, table, colors is not None)


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            return [line.strip() for line in text.splitlines() if line.strip()]
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"the classes file {path} cannot be read ({error.strerror}); check its name") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the classes file {path} is not valid {path.suffix[1:] or 'text'} ({reason}); correct it"
        ) from error


def _names(value: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise UserError(f"names in {path} must be a list of class names")
    if len(value) < 2:
        raise UserError(
            f"{path} names {len(value)} class(es), and a network needs at least 2 to tell apart; "
            f'for one kind of object give ["background", "object"]'
        )
    if len(value) > MAX_CLASSES:
        raise UserError(f"{path} names {len(value)} classes and at most {MAX_CLASSES} are possible; merge some")
    repeated = [name for name in value if value.count(name) > 1]
    if repeated:
        raise UserError(f'{path} names the class "{repeated[0]}" more than once; give each class its own name')
    return tuple(value)


def _colors(value: Any, count: int, path: Path) -> tuple[tuple[int, int, int], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count:
        got = len(value) if isinstance(value, list) else "something else"
        raise UserError(f"colors in {path} must list one [r, g, b] for each of the {count} names (it has {got})")
    colors: list[tuple[int, int, int]] = []
    for color in value:
        if not isinstance(color, list) or len(color) != 3 or not all(_integer(c, 0, 255) for c in color):
            raise UserError(f"colors in {path} holds {color}; a colour is [r, g, b] with integers 0..255")
        if tuple(color) in colors:
            raise UserError(f"colors in {path} gives {color} to two classes; each class needs its own colour")
        colors.append((color[0], color[1], color[2]))
    return tuple(colors)


def _things(value: Any, count: int, path: Path) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(_integer(thing, 0, count - 1) for thing in value):
        raise UserError(f"things in {path} must be a list of train ids 0..{count - 1} (it is {value})")
    return tuple(value)


def _ids(value: Any, count: int, path: Path) -> dict[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not value:
        raise UserError(f'ids in {path} must map values of the files to train ids, such as {{"0": 255, "7": 0}}')
    ids: dict[int, int] = {}
    for key, train_id in value.items():
        raw = int(key) if isinstance(key, str) and key.strip().isdecimal() else key  # JSON keys are strings
        if not _integer(raw, 0, _MAX_ID):
            raise UserError(f'ids in {path} has the key "{key}"; keys are the values in the files, 0..{_MAX_ID}')
        if not _integer(train_id, 0, count - 1) and train_id != IGNORE:
            raise UserError(f"ids in {path} maps {key} to {train_id}; train ids are 0..{count - 1}, or 255 to ignore")
        ids[raw] = train_id
    return ids


def _integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
