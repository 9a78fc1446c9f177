"""The page of predictions and measurements, from made-up documents, and the committed one."""

import json
import re

import pytest

import bench.__main__ as command
from bench import document, report
from bench.kernels import align, contrast
from bench.stepping import Row
from bench.variants import VARIANTS
from tests.bench import made_up

PREDICTIONS = json.loads(report.PREDICTIONS.read_text())


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(document, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    return tmp_path / "results" / "nvidia-h100"


def put(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_every_prediction_says_where_it_comes_from_and_where_it_is_measured():
    assert len({(one["section"], one["name"]) for one in PREDICTIONS}) == len(PREDICTIONS) > 40
    cuda = command.Setting(command.torch.device("cuda"))
    cases = {bench.name: {case.name for case in bench.cases(cuda)} for bench in (align.BENCH, contrast.BENCH)}
    providers = {bench.name: {one.name for one in bench.providers} for bench in (align.BENCH, contrast.BENCH)}
    for one in PREDICTIONS:
        assert one["source"] in ("model", "counted") and one["value"] > 0
        assert ("where" in one) == ("document" in one) == ("field" in one) == ("command" in one), one["name"]
        if one.get("document") == "step":
            assert one["where"]["name"] in VARIANTS
        elif one.get("document", "").startswith("kernels."):
            name, provider = one["document"], one["where"]["provider"]
            assert one["where"]["case"] in cases[name]
            assert set([provider] if isinstance(provider, str) else provider) - {"cuda"} <= providers[name]


def test_without_a_measurement_every_cell_says_so(results, capsys):
    put(results.with_name("cpu"), "step", {**made_up.document([]), "device": {"kind": "cpu", "name": "CPU"}})
    assert command.main(["report"]) == 0
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if re.match(r"\| (?! )", line) and "| predicted" not in line
    ]
    assert len(lines) == len(PREDICTIONS)
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2:4] == ["not measured", ""] and re.search(r"\((model|counted)\)$", cells[1])
    assert command.main(["report", "--write"]) == 2
    assert "there is nothing to write" in capsys.readouterr().err and not report.PAGE.exists()


def test_a_measurement_stands_beside_its_prediction(results, capsys):
    graph = made_up.step_row("bf16, CUDA graph", 98.0)
    other_size = made_up.step_row("bf16, CUDA graph", 7.0, size="MiT-B5, 8+8@1024")
    wrong = made_up.step_row("bf16", 1.0, status="wrong")
    untimed = Row("MiT-B5, 2+2@512", "released loop", "tf32")
    put(results, "step-2-512", made_up.document([graph, other_size, wrong, untimed], complete=False))
    sam = [made_up.sam_row("ours mask bf16", 28.0, batch=4), made_up.sam_row("ours flex bf16", 21.0, batch=4)]
    put(results, "sam", made_up.document([*sam, made_up.sam_row("ours mask bf16", 1.0, batch=1)]))
    floor = made_up.kernel("kernels.align", "B=2 crop=512", "triton", 100.0, 56.0)
    put(results, "kernels.align", made_up.document([floor]))
    put(results, "tests", made_up.tests(["passed"]))
    assert command.main(["report", "--write"]) == 0
    text = report.PAGE.read_text()
    assert "## NVIDIA H100 80GB HBM3" in text and "tests" not in text.split("###")[0].replace("bench/results", "")
    assert (
        "step-2-512: 2027-01-02, driver 570.1, torch 2.11.0, triton 3.6.0, cuda 13.0, commit abc123def456; cut off"
        in text
    )
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
        for line in text.splitlines()
        if "|" in line
    }
    assert lines["P5: the whole step in a CUDA graph, 2+2@512"] == ["49 ms (model)", "98 (88.2..117.6) ms", "2.00"]
    assert lines["vit_b: fused, bf16 (our fastest form)"] == ["14 ms (model)", "21 (18.9..25.2) ms", "1.50"]
    assert lines["floor of the planned form, 2 images of 512"] == ["28 us (counted)", "56 (50.4..67.2) us", "2.00"]
    measured = [line for line in lines.values() if line[1][:1].isdigit()]
    assert len(measured) == 3
    first = text
    assert command.main(["report", "--write"]) == 0 and report.PAGE.read_text() == first


def test_a_file_that_is_no_result_is_one_sentence(results, capsys):
    put(results, "step", {"rows": []})
    assert command.main(["report"]) == 2
    printed = capsys.readouterr().err
    assert "is no result" in printed and printed.count("\n") == 1


def test_the_committed_page_is_what_the_committed_results_give():
    devices = report.read_results(document.RESULTS)
    if not report.PAGE.exists():
        pytest.skip("docs/performance.md is written when a GPU has been measured")
    assert report.PAGE.read_text(encoding="utf-8") == report.page(PREDICTIONS, devices)
