"""The manifest of a checkpoint: what makes a folder whole, and how one sees that it no longer is.

`manifest.json` holds every file's size and sha256, the step, the config and its hash, and the plain values of the
state; `manifest.sha256` holds its own checksum, as sha256sum reads it.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ssr_fast.engine.state import config_hash

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
FORMAT = 1
_BLOCK = 1 << 20


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest over all files of a folder and syncs both to disk.

    Raises:
        OSError: a file cannot be read or written.
    """
    files = {entry.name: {"size": entry.stat().st_size, "sha256": _sha256(entry)} for entry in sorted(folder.iterdir())}
    text = json.dumps({**manifest, "files": files}, indent=1).encode()
    _write_synced(folder / MANIFEST, text)
    _write_synced(folder / DIGEST, f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode())
    sync_folder(folder)


def verify(path: Path, contents: bool = True) -> str | None:
    """Reads a whole checkpoint and says why it cannot be used, or None where every byte is as it was written.

    Args:
        path: a `step-<n>` folder.
        contents: False compares the sizes of the tensors' files alone, which takes no time.
    """
    try:
        text = (path / MANIFEST).read_bytes()
        digest = (path / DIGEST).read_bytes()
        if digest != f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode():
            return f"{MANIFEST} does not match {DIGEST}"
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, this version reads format {FORMAT}"
        if config_hash(manifest["config"]) != manifest["config_hash"]:
            return f"the config in {MANIFEST} does not match its hash"
        for name, wanted in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != wanted["size"]:
                return f"{name} has {size} bytes instead of {wanted['size']}"
            if contents and _sha256(path / name) != wanted["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if path.is_dir() else "there is no such folder"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    except (ValueError, LookupError, TypeError, AttributeError):
        # its checksum is right, so it was written like this
        return f"{MANIFEST} is not one of ssr_fast's"
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, whole or not: by its name, or by what is in it."""
    return path.is_dir() and (re.fullmatch(r"step-\d+", path.resolve().name) is not None or (path / MANIFEST).exists())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that `verify` has found whole."""
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
    return manifest


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by their step, whole or not; none where there is no such folder."""
    try:
        entries = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    matches = ((re.fullmatch(r"step-(\d+)", entry.name), entry) for entry in entries)
    return {int(match[1]): entry for match, entry in matches if match}


def newest_whole(folder: Path) -> str | None:
    """Name of the newest checkpoint whose files are there in full size (their contents are not read)."""
    found = (path for _, path in sorted(steps(folder).items(), reverse=True) if verify(path, contents=False) is None)
    return next((path.name for path in found), None)


def best_of(entries: dict[int, Path]) -> Path | None:
    """The checkpoint with the highest score, the newer of two equals, or None where none has a score."""
    scores: list[tuple[float, int]] = []
    for step, path in entries.items():
        try:
            score = read_manifest(path).get("score")
        except (OSError, ValueError):
            continue  # damaged: `latest` says so when it matters
        if score is not None:
            scores.append((score, step))
    return entries[max(scores)[1]] if scores else None


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
