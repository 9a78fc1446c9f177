"""`python -m bench scaling`: the model's figures and properties, its inputs' sources, and that it says what it is."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench import document
from bench.__main__ import main
from bench.scaling.inputs import PREDICTED_MS, count_network, step_time
from bench.scaling.model import MODES, Assumptions, Cluster, Plan, predict
from bench.variants import GRAPH, RELEASED
from ssr_fast.data.labels import CITYSCAPES
from ssr_fast.models.mit import Block
from ssr_fast.models.segmentor import ModelConfig, build_segmentor

SIZES = (1, 2, 8, 64, 512)
FAST, SLOW = Cluster(), Cluster(nics=12.5e9)
TOLERANCE = 3.0
"""Points, from what was planned with before there was this model."""


@pytest.fixture(scope="module")
def network():
    return count_network()


@pytest.fixture(autouse=True)
def no_results(monkeypatch, tmp_path):
    monkeypatch.setattr(document, "RESULTS", tmp_path / "results")


def plan(network, **changes):
    given = {"cluster": FAST, "step": 35.5e-3, "batch": 2, "gradient_bytes": 2, **changes}
    return Plan(network, **given)


def efficiencies(made, mode="ddp", sizes=(8, 64, 512)):
    return [predict(made, mode, gpus).efficiency for gpus in sizes]


@pytest.mark.parametrize(
    ("batch", "step", "cluster", "expected"),
    [
        (2, 35.5e-3, FAST, (99, 96, 93)),
        (8, 101e-3, FAST, (99, 97, 94)),
        (2, 35.5e-3, SLOW, (99, 65, 58)),
        (8, 101e-3, SLOW, (99, 93, 90)),
    ],
)
def test_ddp_efficiencies_are_those_planned_with(network, batch, step, cluster, expected):
    found = efficiencies(plan(network, batch=batch, step=step, cluster=cluster))
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_what_sharding_saves_and_moves(network):
    made = plan(network)
    ddp, fsdp = predict(made, "ddp", 512), predict(made, "fsdp", 512)
    assert 1.6e9 < fsdp.saved_bytes < 1.71e9 and ddp.saved_bytes == 0
    assert 1.5 <= fsdp.sent_bytes / ddp.sent_bytes <= 3 and 23 <= fsdp.collectives / ddp.collectives <= 46
    # by hand: 85,155,283 parameters, 2 bytes, twice all but one part of 512
    assert ddp.sent_bytes == pytest.approx(2 * 511 / 512 * 2 * 85_155_283)
    moved = 2 * (3 * 85_155_283 + network.block_parameters)  # teacher, student, gradients, and the blocks once more
    assert fsdp.sent_bytes == pytest.approx(511 / 512 * moved)
    assert predict(made, "hsdp", 8).sent_bytes == pytest.approx(7 / 8 * moved)
    assert predict(made, "zero1", 8).sent_bytes == pytest.approx(ddp.sent_bytes * (7 / 8) / (511 / 512))
    assert ddp.collectives == 7 + 2 and predict(made, "zero1", 8).collectives == 7 + 1 + 2
    assert fsdp.collectives == 3 * 61 + 52 + 2 and predict(made, "hsdp", 64).collectives == 4 * 61 + 52 + 2
    for sharded in ("fsdp", "hsdp"):
        gains = [predict(made, sharded, n).efficiency - predict(made, "ddp", n).efficiency for n in (8, 64, 512)]
        assert abs(gains[0]) < TOLERANCE and gains[1] < -TOLERANCE and gains[2] < -TOLERANCE


def test_a_step_by_hand(network):
    """8 GPUs, one machine, a bucket, no delay: what the docstring says, in numbers."""
    small = dataclasses.replace(network, parameters=10**6)
    exact = Assumptions(link_efficiency=0.5, hop_in=1e-6, launch=1e-5, overlap=0.0, delay=0.0)
    made = plan(small, cluster=Cluster(nvlink=2e9), step=1e-2, assumptions=exact)
    half = 1e-5 + 7 / 8 * 2e6 / 1e9 + 7e-6
    flags = 2 * 2 * (1e-5 + 7e-6)
    row = predict(made, "ddp", 8)
    assert row.step_ms == pytest.approx(1e3 * (1e-2 + 2 * half + flags))
    assert row.images_per_second == pytest.approx(8 * 4 / (row.step_ms / 1e3))
    halves = 1e-5 + 1 / 2 * 2e6 / (0.5 * 4e10) + 5e-6
    made = dataclasses.replace(made, cluster=Cluster(nvlink=2e9, nics=4e10, hop=5e-6))
    flags = 2 * (2 * (1e-5 + 7e-6) + 2 * (1e-5 + 5e-6))
    assert predict(made, "ddp", 16).step_ms == pytest.approx(1e3 * (1e-2 + 2 * half + 2 * halves + flags))


@pytest.mark.parametrize("mode", MODES)
def test_one_gpu_is_the_measure(network, mode):
    for cluster, sync in ((FAST, False), (SLOW, True)):
        row = predict(plan(network, cluster=cluster, sync_batchnorm=sync, gradient_bytes=4), mode, 1)
        assert row.efficiency == pytest.approx(100) and row.step_ms == pytest.approx(35.5)
        assert row.sent_bytes == row.collectives == row.saved_bytes == row.exposed_ms == row.communication_ms == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", [FAST, SLOW], ids=["8x400G", "1x100G"])
def test_more_of_a_good_thing_is_never_worse(network, mode, base):
    for gpus in SIZES:
        made = plan(network, cluster=base)
        before = predict(made, mode, gpus).step_ms + 1e-9
        for change in ({"nics": 2 * base.nics}, {"nvlink": 2 * base.nvlink}, {"hop": base.hop / 2}):
            assert predict(plan(network, cluster=dataclasses.replace(base, **change)), mode, gpus).step_ms <= before
        assert predict(plan(network, cluster=base, gradient_bytes=4), mode, gpus).step_ms >= before - 2e-9
        assert predict(plan(network, cluster=base, sync_batchnorm=True), mode, gpus).step_ms >= before - 2e-9
        if mode == "ddp":  # a longer step hides more; the update's time that others take over is less of it
            assert predict(plan(network, cluster=base, step=71e-3), mode, gpus).efficiency >= 100 * 35.5 / before


@pytest.mark.parametrize("mode", MODES)
def test_fewer_parameters_are_never_slower(network, mode):
    sizes = [10**6, 10**7, 26 * 10**6, 53 * 10**6, 85 * 10**6, 10**9]
    for gpus in (8, 64):
        # the update that other GPUs take over shortens the step, so it is the exposed part that is compared
        times = [
            predict(plan(dataclasses.replace(network, parameters=number)), mode, gpus).exposed_ms for number in sizes
        ]
        assert times == sorted(times)


@pytest.mark.parametrize("cluster", [FAST, SLOW], ids=["8x400G", "1x100G"])
def test_ddp_never_gains_by_more_gpus(network, cluster):
    found = efficiencies(plan(network, cluster=cluster), "ddp", SIZES)
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(100)


def test_synchronised_batchnorm_costs_more_with_more_gpus(network):
    made = plan(network)
    costs = [
        predict(dataclasses.replace(made, sync_batchnorm=True), "ddp", gpus).step_ms
        - predict(made, "ddp", gpus).step_ms
        for gpus in (8, 64, 512)
    ]
    assert 0.5 < costs[0] < 2 and 2 < costs[1] < 10 and costs[1] < costs[2] < 20


def test_the_network_is_the_real_one(network):
    net = build_segmentor(ModelConfig(), CITYSCAPES.count)
    assert network.parameters == sum(parameter.numel() for parameter in net.parameters()) == 85_155_283
    assert network.tensors == len(list(net.parameters())) and len(list(net.backbone.parameters())) == 1052
    assert network.batchnorms == sum(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules()) == 8
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    assert network.blocks == len(blocks) == 52 and network.units == 52 + 8 + 1
    assert network.block_parameters == sum(p.numel() for block in blocks for p in block.parameters())


def run(*words):
    return main(["scaling", *words])


def sources(content):
    return {one["name"]: one for one in content["inputs"]}


def test_the_document_says_that_it_is_a_model(tmp_path, capsys):
    file = tmp_path / "out" / "scaling.json"
    assert run("--json", str(file), "--gpus", "8", "1", "16", "--reduce", "bf16") == 0
    content = json.loads(file.read_text())
    assert content["kind"] == "model" and "measured" in content["note"] and "device" not in content
    assert {"date", "versions", "commit", "dirty", "inputs", "rows", "advice"} <= set(content)
    given = sources(content)
    assert given["step"]["source"] == "predicted" and "not measured" in given["step"]["detail"]
    assert given["step"]["value"] == 35.5 == PREDICTED_MS[2, 512]
    assert given["parameters"] == {
        "name": "parameters",
        "value": 85155283,
        "unit": "",
        "source": "counted",
        "detail": "MiT-B5 with the DAFormer head, 19 classes",
    }
    assert given["gradients"]["source"] == "given" and given["gradients"]["value"] == pytest.approx(170.31, abs=0.01)
    assert given["NVLink"]["source"] == given["delay"]["source"] == "assumed"
    assert not any(one["source"] == "measured" for one in content["inputs"])
    assert {(row["mode"], row["gpus"]) for row in content["rows"]} == {
        ("single", 1),
        *((mode, gpus) for mode in MODES for gpus in (8, 16)),
    }
    assert {row["mode"] for row in content["rows"] if not row["offered"]} == {"zero1"}
    single = content["rows"][0]
    assert single["efficiency"] == pytest.approx(100) and single["hours"] == pytest.approx(40000 * 0.0355 / 3600)
    printed = capsys.readouterr().out
    assert printed.startswith("MODEL, not measured")
    titles = [line for line in printed.splitlines() if "a step on N GPUs" in line or "what to use" in line]
    assert len(titles) == 2 and all(title.startswith("MODEL, not measured") for title in titles)
    assert "zero1*" in printed and "the trainer does not offer it" in printed


def test_the_advice(tmp_path, capsys):
    file = tmp_path / "scaling.json"
    assert run("--json", str(file)) == 0
    found = {one["gpus"]: one for one in json.loads(file.read_text())["advice"]}
    assert list(found) == [1, 8, 64, 512]
    assert [one["use"] for one in found.values()] == [
        "single",
        "ddp, or 8 seeds",
        "independent seeds",
        "independent seeds",
    ]
    assert [one["global_batch"] for one in found.values()] == [2, 16, 128, 1024]
    assert [one["same_samples_steps"] for one in found.values()] == [40000, 5000, 625, 78]
    assert found[1]["source_epochs"] == pytest.approx(80000 / 24966)
    assert found[8]["target_epochs"] == pytest.approx(8 * 80000 / 2975)
    assert found[1]["same_samples_minutes"] == pytest.approx(60 * found[1]["hours"])
    assert "not the published method" in found[512]["why"] and "512 runs of one GPU" in found[512]["why"]
    assert "80,000 samples a domain in steps of 2+2" in capsys.readouterr().out


def results(folder, name="NVIDIA H100 80GB HBM3", kind="cuda", ms=41.5, date="2027-01-02T00:00:00+00:00", **changes):
    timing = {"median": 1e3 * ms, "p20": 1.0, "p80": 1e6}
    row = {"size": "MiT-B5, 2+2@512", "name": GRAPH, "status": "ok", "step_us": timing, **changes}
    slower = {**row, "name": "bf16", "step_us": {**timing, "median": 2e3 * ms}}
    loop = {**row, "name": RELEASED, "step_us": {**timing, "median": 1.0}}
    content = {"device": {"kind": kind, "name": name}, "commit": "abc123", "dirty": False, "date": date}
    folder = folder / name.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(json.dumps({**content, "rows": [slower, row, loop]}))


def test_a_measured_step_is_picked_up_and_named(tmp_path, capsys):
    folder = document.RESULTS
    results(folder, "other", kind="cpu", ms=9000)
    assert step_time(folder, 2, 512).source == "predicted"
    results(folder)
    file = tmp_path / "scaling.json"
    assert run("--json", str(file)) == 0
    step = sources(json.loads(file.read_text()))["step"]
    assert step["source"] == "measured" and step["value"] == pytest.approx(41.5)
    for part in ("nvidia-h100-80gb-hbm3/step.json", GRAPH, "NVIDIA H100 80GB HBM3", "abc123", "2027-01-02"):
        assert part in step["detail"]
    printed = capsys.readouterr().out
    assert "step: 41.5 ms (measured: " in printed and printed.startswith("MODEL, not measured")
    assert step_time(folder, 8, 512).source == "predicted"  # another size than was measured
    results(folder, "newer", ms=30.0, date="2027-05-01T00:00:00+00:00")
    assert step_time(folder, 2, 512).value == pytest.approx(30.0)
    results(folder, "zz newest", ms=28.0, date="2027-06-01T00:00:00+00:00")
    results(folder, "zz newest too", ms=28.0, date="2027-06-01T00:00:00+00:00")
    assert step_time(folder, 2, 512).value == pytest.approx(28.0)
    assert run("--step-ms", "50", "--json", str(file)) == 0
    assert sources(json.loads(file.read_text()))["step"]["source"] == "given"


@pytest.mark.parametrize("change", [{"status": "wrong"}, {"step_us": None}, {"size": "MiT-B5, 8+8@512"}])
def test_a_row_that_is_no_right_step_of_this_size_is_not_used(change):
    results(document.RESULTS, **change)
    content = json.loads(next(document.RESULTS.rglob("*.json")).read_text())
    for row in content["rows"]:
        row.update(change)
    next(document.RESULTS.rglob("*.json")).write_text(json.dumps(content))
    assert step_time(document.RESULTS, 2, 512).source == "predicted"


def measured_file(path, **changes):
    rows = [{"gpus": gpus, "step_ms": step} for gpus, step in ((8, 44.0), (1, 40.0), (16, 50.0))]
    about = {"device": "16 x H100", "commit": "abc123", "date": "2027-01-02", "mode": "ddp", "rows": rows}
    path.write_text(json.dumps({**about, **changes}))
    return str(path)


def test_model_and_measurement_side_by_side(tmp_path, capsys):
    given, file = measured_file(tmp_path / "measured.json"), tmp_path / "scaling.json"
    assert run("--check-measured", given, "--json", str(file)) == 0
    content = json.loads(file.read_text())
    step = sources(content)["step"]
    assert step["source"] == "measured" and step["value"] == 40.0 and "16 x H100, commit abc123" in step["detail"]
    rows = content["comparison"]["rows"]
    assert [row["gpus"] for row in rows] == [1, 8, 16] and rows[0]["model_off_percent"] == pytest.approx(0)
    model = predict(plan(count_network(), step=40e-3, gradient_bytes=4), "ddp", 8).step_ms
    assert rows[1] == {
        "gpus": 8,
        "measured_ms": 44.0,
        "model_ms": pytest.approx(model),
        "model_off_percent": pytest.approx(100 * (model / 44 - 1)),
    }
    printed = capsys.readouterr().out
    assert "MODEL beside measured steps: ddp" in printed and "44.00" in printed
    assert content["kind"] == "model" and "2027-01-02" in content["comparison"]["measured"]


def test_a_mistake_is_one_sentence(tmp_path, capsys):
    def measured(name, **changes):
        return ("--check-measured", measured_file(tmp_path / name, **changes))

    text = tmp_path / "text.json"
    text.write_text("{")
    folder = tmp_path / "results"
    for words, hint in (
        (("--gpus", "12"), "--gpus 12 GPUs does not fill machines of 8"),
        (("--nics", "400"), "such as 8x400G"),
        (("--nics", "0x400G"), "such as 8x400G"),
        (("--batch", "3"), "give --step-ms"),
        (("--json", "out.txt"), "ends in .json"),
        (("--check-measured", str(tmp_path / "none.json")), "none.json cannot be read"),
        (("--check-measured", str(text)), "text.json cannot be read"),
        (measured("a.json", rows=[]), "at least one"),
        (measured("b.json", mode="zero1"), "'zero1'"),
        (measured("c.json", rows=[{"gpus": 8, "step_ms": 0}]), "both must be above 0"),
        (measured("d.json", rows=[{"gpus": 8}]), "KeyError: 'step_ms'"),
        (measured("e.json", rows=2 * [{"gpus": 8, "step_ms": 4}]), "a row for each number of GPUs"),
        (measured("f.json", rows=[{"gpus": 12, "step_ms": 4}]), "f.json: a row of 12 GPUs does not fill"),
    ):
        assert run(*words) == 2, words
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and hint in printed.err, printed.err
    folder.mkdir()
    (folder / "broken").mkdir(parents=True)
    (folder / "broken" / "step.json").write_text("[]")
    assert run() == 2
    assert "broken/step.json is no result of" in capsys.readouterr().err
    for words in (
        ("--gpus", "0"),
        ("--step-ms", "-1"),
        ("--latency-us", "nan"),
        ("--nvlink", "x"),
        ("--reduce", "int8"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*words)
    capsys.readouterr()


def test_it_is_listed(capsys):
    assert main(["--list"]) == 0
    assert "python -m bench scaling --help" in capsys.readouterr().out


def test_the_page_shows_what_is_printed(capsys):
    assert run() == 0
    page = (Path(__file__).parents[2] / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    rows = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "MODEL"))]
    assert len(rows) == 1 + 1 + 13 + 1 + 4
    assert [row for row in rows if row not in page] == []
    assert "**Nothing below was measured on several GPUs.**" in page
