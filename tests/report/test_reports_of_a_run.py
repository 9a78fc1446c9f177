"""When a run writes its report: after each stage, and again when nothing is left to train."""

import json
from pathlib import Path

import pytest

from ssr_fast.train import main
from tests.methods.run_support import TINY


def test_a_report_after_each_stage_and_one_for_a_run_that_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
    shown: list[tuple[list[str], int]] = []

    def recorded(folder: Path) -> None:
        summary = json.loads((folder / "summary.json").read_text())
        names = [row["name"] for row in summary["stages"]]
        pictures = {path.parent.name for path in folder.glob("samples/*/00.png")}
        assert set(names) <= pictures and (folder / "samples" / "00.png").is_file()
        shown.append((names, (folder / "samples" / "00.png").stat().st_size))

    monkeypatch.setattr("ssr_fast.session.write_report", recorded)
    run = tmp_path / "run"
    stages = ["--run.stages=[supervised,self_training]", "--self_training.start_step=2"]
    assert main([*TINY[:-1], *stages, "--run.dir", str(run)]) == 0
    assert [names for names, _ in shown] == [["self_training"], ["source_only", "self_training"]]
    assert shown[1][1] > shown[0][1]  # the picture has a column more
    assert main(["--resume", str(run)]) == 0
    assert shown[2:] == [shown[1]]
