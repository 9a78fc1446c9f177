"""An op's table as a file: a tuned section put into it, in the style that the files have: one set of blocks a line."""

import json
from typing import Any

from ssr_kernels.tables import DEFAULT, PROVENANCE, difference, merge, path, read

from .search import Table


def with_section(
    content: dict[str, Any], architecture: str, table: Table, provenance: dict[str, Any]
) -> dict[str, Any]:
    """A file's content with `table` as that of an architecture; the same content if it is so already."""
    if merge(content[DEFAULT], content.get(architecture, {})) == table:
        return content
    sections = {name: value for name, value in content.items() if name not in (architecture, DEFAULT, PROVENANCE)}
    origins = {name: value for name, value in content.get(PROVENANCE, {}).items() if name != architecture}
    if changes := difference(content[DEFAULT], table):
        sections[architecture], origins[architecture] = changes, provenance
    found = {DEFAULT: content[DEFAULT], **dict(sorted(sections.items()))}
    return {**found, PROVENANCE: dict(sorted(origins.items()))} if origins else found


def write(op: str, architecture: str, table: Table, provenance: dict[str, Any]) -> bool:
    """Make `table` the one that an op has on an architecture; returns whether its file changed."""
    content = read(op)
    changed = with_section(content, architecture, table, provenance)
    if changed == content:
        return False
    path(op).write_text(text(changed), encoding="utf-8")
    return True


def text(content: dict[str, Any]) -> str:
    """A file's text."""
    return _text(content, "\n") + "\n"


def _text(value: Any, newline: str) -> str:
    inner = newline + "  "
    if isinstance(value, dict) and any(isinstance(entry, (dict, list)) for entry in value.values()):
        entries = (f"{json.dumps(key)}: {_text(entry, inner)}" for key, entry in value.items())
        return "{" + inner + ("," + inner).join(entries) + newline + "}"
    if isinstance(value, list):
        return "[" + inner + ("," + inner).join(_text(entry, inner) for entry in value) + newline + "]"
    return json.dumps(value)
