"""`python -m ssr_fast.info`: what it prints, for people and as JSON."""

import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from ssr_fast import info
from ssr_fast.commandline import run
from ssr_kernels.library import LIBRARIES
from ssr_kernels.registry import BACKENDS


def test_json_is_one_object_with_every_entry():
    done = subprocess.run([sys.executable, "-m", "ssr_fast.info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(facts["missing"]) == {name for name, version in facts["versions"].items() if version is None}
    assert set(facts["libraries"]) == set(LIBRARIES)
    assert set(facts["communication"]) == {"gpus", "nccl", "gloo"} and facts["communication"]["gloo"] is True
    assert facts["communication"]["gpus"] == len(facts["devices"])
    assert set(facts["choices"]) == {"--data.loader dali", "--optim.fused apex", "--run.attention xformers"}
    if not facts["devices"]:
        assert "on a GPU, and there is none in use" in facts["choices"]["--optim.fused apex"]
    assert {"align", "dwconv_gelu", "dwconv_dilated", "segloss", "pseudo_label"} <= set(facts["ops"])
    for reasons in facts["ops"].values():
        assert set(reasons) == set(BACKENDS) and reasons["reference"] == []
    assert len(facts["devices"]) == torch.cuda.device_count()


def test_the_tables_show_every_reason():
    facts = info.gather()
    facts["versions"]["xformers"], facts["missing"]["xformers"] = None, "not there [for a reason]"
    facts["libraries"]["ssr_cpu"] = "no compiler"
    facts["choices"] = {"--optim.fused apex": "no [apex] here", "--run.attention xformers": None}
    facts["ops"]["align"]["triton"] = ["no [GPU]", "no triton"]
    facts["devices"] = [{"name": "H100", "capability": "9.0", "memory_gib": 79.1}]
    screen = io.StringIO()
    info.show(facts, Console(file=screen, width=300, markup=False, highlight=False))
    for text in (
        "not there [for a reason]",
        "no compiler",
        "no [GPU]; no triton",
        "no [apex] here",
        "can be used",
        "H100, compute 9.0, 79.1 GiB",
        "runs",
    ):
        assert text in screen.getvalue()


@pytest.mark.parametrize(
    ("facts", "lines"),
    [
        ({"gpus": 8, "nccl": "2.28.9", "gloo": True}, ["8", "2.28.9", "can be used"]),
        ({"gpus": 0, "nccl": "2.28.9", "gloo": True}, ["0", "2.28.9, and there is no GPU for it", "can be used"]),
        (
            {"gpus": 1, "nccl": None, "gloo": False},
            [
                "1",
                "not in this build of torch: several GPUs cannot train together",
                "not in this build of torch: only one process can train",
            ],
        ),
    ],
)
def test_the_table_says_what_several_processes_have(facts, lines):
    screen = io.StringIO()
    info.show(info.gather() | {"communication": facts}, Console(file=screen, width=200))
    cells = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in screen.getvalue().splitlines()]
    assert [cell for cell in cells if cell and cell[0] in ("GPUs", "NCCL", "gloo")] == [
        ["GPUs", lines[0]],
        ["NCCL", lines[1]],
        ["gloo", lines[2]],
    ]


def test_main_returns_0_and_help_ends(capsys):
    assert info.main(["--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert info.main([]) == 0
    assert "segment-anything" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        info.main(["--help"])
    assert not stop.value.code


def test_an_unknown_option_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["info", "--jsom"])
    with pytest.raises(SystemExit) as stop:
        run(info.main)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: unknown option --jsom") and printed.err.count("\n") == 1
