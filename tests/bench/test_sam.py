"""The encoders of SAM side by side, on a CPU: every provider against float64, verdicts, JSON."""

import json

import pytest
import torch

import bench.__main__ as command
from bench import sam
from bench.harness import Setting

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_settings():
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


def eager(candidates):
    """Those that need no compiler."""
    return [one for one in candidates if "compiled" not in one.name and "flex" not in one.name]


def rows_of(dtype, candidates=None):
    (case,) = sam.cases(Setting(CPU, quick=True))
    return sam.run_case(case, Setting(CPU, quick=True), candidates or eager(sam.providers(dtype)))


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sam, "providers", lambda dtype, found=sam.providers: eager(found(dtype)))
    path = tmp_path / "sam.json"
    assert command.main(["sam", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["device"]["kind"] == "cpu" and content["quick"]
    rows = {row["provider"]: row for row in content["rows"]}
    assert {"segment-anything fp32", "transformers fp32", "ours low_rank fp32", "ours xformers fp32"} <= set(rows)
    for row in rows.values():
        assert row["sizes"] == {"encoder": "small", "size": 160, "batch": 1}
        if row["status"] == "ok":
            assert 0 < row["errors"]["features"] < sam.FLOAT32_BOUND and row["forward_us"]["median"] > 0
        else:
            assert row["status"] == "skipped" and row["reasons"] and row["forward_us"] is None
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_in_bf16_the_measure_is_segment_anythings_own_error():
    rows = {row.provider: row for row in rows_of(torch.bfloat16)}
    stock = rows["segment-anything bf16"].errors["features"]
    for name in ("ours low_rank bf16", "ours mask bf16", "transformers bf16"):
        assert rows[name].status in ("ok", "skipped")
    row = rows["ours low_rank bf16"]
    assert row.eager_errors["features"] == stock > 1e-4 and row.errors["features"] <= sam.STOCK_FACTOR * stock
    assert rows["segment-anything fp32"].errors["features"] < sam.FLOAT32_BOUND


def test_a_wrong_result_and_an_exception_fail(capsys, monkeypatch):
    def halved(encoder, shape):
        return lambda images: encoder(images) / 2

    def broken(encoder, shape):
        raise RuntimeError("no such kernel\nmore")

    right, *_ = sam.providers(torch.float32)
    wrong = [sam.Provider("halved", torch.float32, halved), sam.Provider("broken", torch.float32, broken)]
    monkeypatch.setattr(sam, "providers", lambda dtype: [right, *wrong])
    assert sam.main(["--quick", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "halved wrong: features are off by 5.0e-01" in printed.out
    assert "broken: RuntimeError: no such kernel\n" in printed.err


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_provider():
    rows = rows_of(torch.float32, sam.providers(torch.float32))
    assert {row.status for row in rows} <= {"ok", "skipped"}, rows
    assert next(row for row in rows if row.provider == "ours flex fp32").status == "ok"
