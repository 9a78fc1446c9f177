"""`prepare store` killed at any moment, and on a full disk: what is finished is kept, nothing else is taken for it."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.builders import picture, save

IMAGES, SIZE = 60, (160, 120)
# small parts, so that a small set has many; `-c` and not a patch, because the processes that it starts import it anew
PREPARE = (
    "import sys, ssr_fast.data.store_writer as writer\n"
    f"writer._SMALLEST = 4 * 3 * {SIZE[0] * SIZE[1]}\n"
    "from ssr_fast.prepare import main\n"
    "if __name__ == '__main__': sys.exit(main(sys.argv[1:]))"
)


def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "SSR_FAST_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def prepare(root: Path, out: Path, tmp_path: Path, *before: str, **options: object) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", PREPARE, "store", str(root), "--out", str(out), "--workers", "2"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment(tmp_path), **streams, **options)  # type: ignore[call-overload,no-any-return]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "set"
    for number in range(IMAGES):
        save(root / "images" / f"{number:03d}.png", picture(number, *SIZE))
        label = np.random.default_rng(number).integers(0, 3, SIZE[::-1], dtype=np.uint8)
        save(root / "labels" / f"{number:03d}.png", label)
    (root / "classes.json").write_text('["x", "y", "z"]')
    return root


def content(folder: Path) -> dict[str, bytes]:
    """All that the store is made of; what killed processes have left below .tmp is no part of it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".tmp" not in path.parts
    }


def kill_and_restart(data: Path, tmp_path: Path, seed: int, kills: int) -> None:
    rng = random.Random(seed)
    process = prepare(data, tmp_path / "whole", tmp_path)
    assert finish(process)[0] == 0
    expected = content(tmp_path / "whole")
    assert len([name for name in expected if name.startswith("images-")]) == IMAGES // 4
    store, killed, started = tmp_path / "store", 0, time.monotonic()
    while killed < kills:
        process = prepare(data, store, tmp_path, start_new_session=True)
        wait_for_progress(process, store, rng.randrange(0, 6))
        time.sleep(rng.random() * 0.05)
        if process.poll() is None:
            # now and then the whole group, else the parent alone, whose processes must end with it
            os.killpg(process.pid, signal.SIGKILL) if rng.random() < 0.5 else process.kill()
            killed += 1
        process.communicate()
        if (store / "index.json").is_file():  # it is finished, but for parts that a kill may have left beside it
            found = content(store)
            assert {name: found[name] for name in found if not name.startswith("parts/")} == expected
            assert finish(prepare(data, store, tmp_path))[0] == 0 and content(store) == expected
            shutil.rmtree(store)
        assert time.monotonic() - started < 250
    assert finish(prepare(data, store, tmp_path))[0] == 0
    assert content(store) == expected


def wait_for_progress(process: subprocess.Popen[str], store: Path, parts: int) -> None:
    """Until so many more files are there, so that kills meet all moments of the work and not only imports."""
    before, until = len(list(store.rglob("*.npy"))), time.monotonic() + 20
    while process.poll() is None and time.monotonic() < until:
        if (store / "store.json").is_file() and len(list(store.rglob("*.npy"))) - before >= parts:
            return
        time.sleep(0.002)


def test_killed_and_restarted_it_is_the_same_byte_for_byte(data: Path, tmp_path: Path) -> None:
    kill_and_restart(data, tmp_path, seed=1, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_twenty_kills(data: Path, tmp_path: Path, seed: int) -> None:
    kill_and_restart(data, tmp_path, seed, kills=10)


def small_disk(folder: Path, size: str) -> list[str]:
    """Words before a command that let it see a disk of this size at `folder`; skips where that is not allowed."""
    mount = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size={size} none "{folder}" && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("a file system of its own needs the right to mount")
    return mount


def test_a_full_disk_is_one_sentence_and_keeps_what_is_finished(data: Path, tmp_path: Path) -> None:
    """A real one; then the same folder with room enough goes on from there."""
    disk, store = tmp_path / "disk", tmp_path / "disk" / "store"
    disk.mkdir()
    script = '"$@"; code=$?; cp -r "$STORE" "$KEPT"; exit $code'  # the disk goes with the process
    process = subprocess.Popen(
        [*small_disk(disk, "2m"), "sh", "-c", script, "sh", sys.executable, "-c", PREPARE, "store", str(data), "--out",
         str(store), "--workers", "2"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**environment(tmp_path), "STORE": str(store), "KEPT": str(tmp_path / "kept")},
    )  # fmt: skip
    code, _, error = finish(process)
    assert code == 2 and error.strip().count("error: ") == 1, error
    line = error.strip().splitlines()[-1]
    assert "No space left on device" in line and str(store) in line and "free space" in line
    kept = content(tmp_path / "kept")
    done = [name for name in kept if name.startswith("parts/")]
    assert 2 <= len(done) < IMAGES // 4 and "index.json" not in kept
    assert not list((tmp_path / "kept" / ".tmp").iterdir())
    code, out, _ = finish(prepare(data, tmp_path / "kept", tmp_path))
    assert code == 0 and f"{4 * len(done)} kept" in out
    assert finish(prepare(data, tmp_path / "whole", tmp_path))[0] == 0
    assert content(tmp_path / "kept") == content(tmp_path / "whole")


def test_a_file_that_may_not_grow_further_is_one_sentence(data: Path, tmp_path: Path) -> None:
    """The same through the limit of a file's size, which every machine has."""
    limited = ["sh", "-c", 'ulimit -f 64; trap "" XFSZ; exec "$@"', "sh"]
    code, _, error = finish(prepare(data, tmp_path / "store", tmp_path, *limited))
    line = error.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and "File too large" in line and "Traceback" not in error
    assert not (tmp_path / "store" / "index.json").exists()
    assert finish(prepare(data, tmp_path / "store", tmp_path))[0] == 0
