"""`python -m bench step --sam`: SSR's rows, their verdicts and what they are measured against."""

import dataclasses
import json

import pytest
import torch

from bench.__main__ import main
from bench.draws import CounterDraws
from bench.harness import Setting
from bench.ledger.counting import Ledger
from bench.released_ssr import ReleasedSsrStep, stock_encoder
from bench.stepping import Comparison, loss_terms
from bench.variants import BFLOAT16, COMPILED_GRAPH, ONE_PASS, RELEASED, ssr_variants
from bench.workload import STEPS, demo_workload
from ssr_fast.engine.step import TrainStep
from ssr_fast.methods.regularisers import CosineAlignment
from ssr_fast.methods.ssr import SsrConfig
from ssr_fast.models.sam import SHAPES, SamShape
from tests.bench.teaching import teach

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("small_demo")


def run(*words):
    return main(["step", "--device", "cpu", "--quick", "--sam", "small", *words])


def test_rows_and_json(tmp_path, capsys):
    file, picture = tmp_path / "step.json", tmp_path / "step.png"
    assert run("--json", str(file), "--picture", str(picture)) == 0
    content = json.loads(file.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert content["complete"] is True and list(rows) == list(ssr_variants("small")) and picture.stat().st_size > 5000
    assert list(content["flops"]) == ["demo, 1+1@64x64, SAM small online"]
    for name in (RELEASED, ONE_PASS, BFLOAT16):
        row = rows[name]
        assert row["status"] == "ok" and row["step_us"]["median"] > 0 and row["peak_bytes"] > 1e5, row
        assert row["losses"][0]["loss/cosine"] > 1 and row["loss_error"] <= row["bound"]
    assert rows[ONE_PASS]["bound"] == 1e-5 and rows[COMPILED_GRAPH]["status"] == "skipped"
    assert "SAM small online" in capsys.readouterr().out


def test_a_wrong_regulariser_is_noticed(monkeypatch, capsys):
    right = CosineAlignment.forward
    monkeypatch.setattr(CosineAlignment, "forward", lambda *arguments: 1.0002 * right(*arguments))
    assert run("--rows", RELEASED, ONE_PASS) == 1
    assert f"{ONE_PASS}: wrong: a loss is off by 2.0e-04" in capsys.readouterr().err


def test_an_encoder_that_forgets_its_positions_is_noticed(monkeypatch):
    """Random positions, so that ours without them has other features."""
    from ssr_fast.models import sam_attention

    make = sam_attention.make_tables
    monkeypatch.setattr(sam_attention, "make_tables", lambda tables, *a: make(tuple(0 * t for t in tables), *a))
    (row,) = Comparison(demo_workload(1, 64, 64, sam="small"), [ONE_PASS], Setting(CPU, True), None).run()
    assert row.status == "wrong", row


def test_an_encoder_of_a_fixed_size(monkeypatch):
    """As SAM's own: images are resized to its square, and it has absolute positions."""
    monkeypatch.setitem(SHAPES, "vit_b", SamShape(96, 8, 48, 2, 3, 4.0, 32, 5, (1,)))
    workload = demo_workload(1, 64, 64, sam="vit_b")
    released, ours = Comparison(workload, [RELEASED, ONE_PASS], Setting(CPU, True), None).run()
    assert released.status == ours.status == "ok" and 0 < ours.loss_error < 1e-6, ours
    assert workload.method(CPU).encoder.encoder.pos_embed.std() > 0.1


def test_losses_and_weights_of_several_steps():
    """At rates that move the regulariser's projections, so that a gradient that is wrong or kept is noticed."""
    fresh = demo_workload(2, 64, 64, sam="small")
    workload = dataclasses.replace(fresh, optim=dataclasses.replace(fresh.optim, warmup_steps=0))
    runs, methods, taught = [], [], None
    for kind in ("released", "one by one", "ours"):
        method = workload.method(CPU)
        logits = teach(method, taught)
        taught = taught or logits
        if kind == "ours":
            step = TrainStep(method, workload.optim, STEPS)
        else:
            step = ReleasedSsrStep(method, SHAPES["small"], workload.optim, STEPS, one_by_one=kind == "one by one")
            step.draws = CounterDraws()
        runs.append([loss_terms(step(workload.batches[0], number)) for number in range(4)])
        methods.append(method)
    assert abs(runs[0][1]["loss/cosine"] / runs[0][0]["loss/cosine"] - 1) > 1e-3
    for run_, method in zip(runs[1:], methods[1:], strict=True):
        for found, expected in zip(run_, runs[0], strict=True):
            assert found.keys() == expected.keys()
            for name in ("loss", "loss/source", "loss/mixed", "loss/cosine"):
                assert abs(found[name] - expected[name]) < 1e-5 * expected[name], (name, run_, runs[0])
        for name, parameter in method.regulariser.named_parameters():
            wanted = methods[0].regulariser.get_parameter(name).detach()
            assert (parameter.detach() - wanted).norm() < 1e-4 * wanted.norm(), name


@pytest.mark.parametrize("options", [{"domains": "source"}, {"regulariser": "injection"}])
def test_options_that_the_released_loop_does_not_have_are_refused(options):
    workload = demo_workload(1, 64, 64, sam="small")
    method = workload.method(CPU)
    if "regulariser" in options:
        method.regulariser = torch.nn.Identity()
    else:
        method.ssr = SsrConfig(**options)
    with pytest.raises(ValueError, match="cosine regulariser on both domains"):
        ReleasedSsrStep(method, SHAPES["small"], workload.optim, STEPS)


def test_the_stock_encoder_shares_the_weights():
    workload = demo_workload(1, 64, 64, sam="small")
    method = workload.method(CPU)
    ours = method.encoder.encoder
    stock = stock_encoder(method.encoder, SHAPES["small"])
    theirs = dict(stock.named_parameters())
    assert {name: one.data_ptr() for name, one in ours.named_parameters()} == {
        name: theirs[name].data_ptr() for name in theirs
    }
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = stock(images), ours(images)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert not any(one.requires_grad for one in theirs.values()) and not stock.training


def test_the_flops_are_those_of_the_stock_encoder_less_its_padding():
    """Attention that is widened for a fused kernel (form low_rank) does not count as work that was to be done."""
    workload, alone = demo_workload(1, 96, 96, sam="small"), demo_workload(1, 96, 96)
    method = workload.method(CPU)
    stock = stock_encoder(method.encoder, SHAPES["small"])  # 96 / 8 = two windows of 6: nothing is padded
    with torch.no_grad(), Ledger(stock) as ledger:
        stock(torch.zeros(1, 3, 96, 96))
    own = (workload.flops(CPU) - alone.flops(CPU)) / workload.images
    assert own == pytest.approx(ledger.counts.flops, rel=0.02)


def test_an_unknown_encoder_is_one_sentence(capsys):
    assert main(["step", "--device", "cpu", "--sam", "vit_x"]) == 2
    error = capsys.readouterr().err
    assert "there is no encoder 'vit_x'; did you mean 'vit_" in error and error.count("\n") == 1
