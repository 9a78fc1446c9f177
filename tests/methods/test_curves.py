"""The ops reproduce the training curve: 50 steps of the demo's SSR through them and through their definitions.

The learning rate is a fourteenth of the demo's. At the demo's own, training is chaotic: changing the projection's
weights by one unit in the last place at the first step moves the losses of the definition itself by 1e-3 in 50 steps.
"""

import json
from pathlib import Path

import pytest

from ssr_fast.engine.guard import StopSignal
from ssr_fast.methods import method, regularisers, self_training
from ssr_fast.models import heads, mit
from ssr_fast.presets import demo
from ssr_fast.session import Session
from ssr_kernels import library
from ssr_kernels.align import reference as align
from ssr_kernels.dwconv import reference as dwconv
from ssr_kernels.segloss import reference as segloss

STEPS = 50
BOUND = 1e-5


def curve(folder: Path) -> dict[str, list[float]]:
    """Every logged loss of a short run of the demo's SSR, step by step."""
    config = demo()
    config.run.stages, config.run.seed, config.run.dir = None, 5, str(folder)
    config.run.steps = config.run.evaluate_every = config.run.save_every = STEPS
    config.run.log_every, config.run.samples = 1, 1
    config.optim.lr = 5e-4
    config.method.name = "ssr"
    config.data.scenes.source_count = config.data.scenes.target_count = 8
    config.data.scenes.evaluation_count = 2
    config.self_training.start_step = STEPS
    session = Session(config, "demo", False, ["pytest"], report=lambda line: None)
    with StopSignal() as stop:
        session.train_stage("ssr", stop)
    lines = [json.loads(line) for line in next(folder.rglob("metrics*.jsonl")).read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == STEPS
    names = [name for name, value in steps[0].items() if "loss" in name and isinstance(value, float)]
    return {name: [step[name] for step in steps] for name in names}


def by_definition(patch):
    """Every op as its definition in plain PyTorch."""
    patch.setattr(regularisers, "align_stages", align.align_stages)
    patch.setattr(mit, "dwconv_gelu", dwconv.dwconv_gelu)
    patch.setattr(heads, "dwconv_dilated", dwconv.dwconv_dilated)
    patch.setattr(method, "segloss", lambda logits, labels, weights: segloss.segloss(logits, labels, weights, 255))
    patch.setattr(self_training, "pseudo_label", segloss.pseudo_label)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_steps_have_the_curve_of_the_definitions(tmp_path, monkeypatch):
    monkeypatch.setenv("SSR_FAST_KERNELS", "")
    op, calls = regularisers.align_stages, []
    with monkeypatch.context() as patch:
        by_definition(patch)
        expected = curve(tmp_path / "definitions")
    assert expected["loss"][-1] < 0.7 * expected["loss"][0]  # it does learn
    for backend in ("reference", "cpp") if not library.reasons("ssr_cpu") else ("reference",):

        def counted(*arguments, backend=backend):
            calls.append(backend)
            return op(*arguments, backend=backend)

        monkeypatch.setattr(regularisers, "align_stages", counted)
        actual = curve(tmp_path / backend)
        assert calls.count(backend) >= STEPS and expected.keys() == actual.keys()
        for name in expected:
            errors = [abs(a - b) / (abs(b) or 1.0) for a, b in zip(actual[name], expected[name], strict=True)]
            print(backend, name, max(errors))
            assert max(errors) < BOUND, (backend, name, errors)
