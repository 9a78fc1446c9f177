"""The facts that a run writes down about its machine: complete, ready for JSON, and never those of another project."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssr_fast.engine import environment as module
from ssr_fast.engine.environment import commit, communication, environment, missing, versions


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=T", "-c", "user.email=t@example.org", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_everything_is_there_and_is_json():
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts) == {"device", "devices", "cuda", "platform", "python", "commit", "versions"}
    assert facts["python"] == platform.python_version() and facts["cuda"] == torch.version.cuda
    assert facts["device"].startswith("CPU, ") == (not torch.cuda.is_available())
    assert facts["versions"]["numpy"] is not None and facts["versions"]["segment-anything"] == "1.0"


def test_the_commit_of_a_checkout(tmp_path):
    assert commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert commit(tmp_path) is None  # nothing committed yet
    (tmp_path / "a.txt").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "-a", "v9", "-m", "a tag must not replace the hash")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "a.txt").write_text("2")
    assert commit(tmp_path) == f"{head}-dirty"
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert commit(inside) is None  # the repository around it is not ours


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs an empty distribution of a name and version in front of all others."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, version: str, *folders: str) -> None:
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "__init__.py").write_text("raise SyntaxError('this package is not to be imported')")
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    yield install
    sys.modules.pop("apex", None)


def test_pypis_apex_is_told_from_nvidias(installed):
    installed("apex", "0.9.10.dev0", "apex")
    assert versions()["apex"] is None
    assert "apex 0.9.10.dev0 that is installed is another project" in missing()["apex"]


def test_nvidias_apex_is_taken(installed):
    installed("apex", "0.1", "apex", "apex/multi_tensor_apply")
    assert versions()["apex"] == "0.1"
    assert "apex" not in missing()


def test_dali_of_either_cuda(installed, monkeypatch):
    monkeypatch.setitem(module._DISTRIBUTIONS, "DALI", ("no-such-dali", "nvidia-dali-cuda120"))
    installed("nvidia-dali-cuda120", "1.99.0")
    assert versions()["DALI"] == "1.99.0"


def test_what_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(module, "_DISTRIBUTIONS", {**module._DISTRIBUTIONS, "xformers": ("no-such-xformers",)})
    assert versions()["xformers"] is None
    assert missing()["xformers"] == "not installed; pip install xformers"


def test_what_processes_talk_by(monkeypatch):
    facts = communication()
    assert json.loads(json.dumps(facts)) == facts and facts["gloo"] is True
    assert facts["gpus"] == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    assert communication()["nccl"] == "2.28.9"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert communication()["nccl"] is None
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    assert communication()["gloo"] is False
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert communication() == {"gpus": facts["gpus"], "nccl": None, "gloo": False}
