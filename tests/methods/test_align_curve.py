"""A fast path reproduces the training curve: 50 steps of the demo's SSR through the op and through its definition.

The learning rate is a fourteenth of the demo's. At the demo's own, training is chaotic: changing the projection's
weights by one unit in the last place at the first step moves the losses of the definition itself by 1e-3 in 50 steps.
"""

import json
from pathlib import Path

import pytest

from ssr_fast.engine.guard import StopSignal
from ssr_fast.methods import regularisers
from ssr_fast.presets import demo
from ssr_fast.session import Session
from ssr_kernels import library
from ssr_kernels.align import reference

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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_steps_have_the_curve_of_the_definition(tmp_path, monkeypatch):
    monkeypatch.setenv("SSR_FAST_KERNELS", "")
    op = regularisers.align_stages
    monkeypatch.setattr(regularisers, "align_stages", reference.align_stages)
    expected = curve(tmp_path / "definition")
    assert expected["loss"][-1] < 0.7 * expected["loss"][0]  # it does learn
    for backend in ("reference", "cpp") if not library.reasons("ssr_cpu") else ("reference",):
        calls = []

        def counted(*arguments, backend=backend, calls=calls):
            calls.append(1)
            return op(*arguments, backend=backend)

        monkeypatch.setattr(regularisers, "align_stages", counted)
        actual = curve(tmp_path / backend)
        assert len(calls) >= STEPS and expected.keys() == actual.keys()
        for name in expected:
            errors = [abs(a - b) / (abs(b) or 1.0) for a, b in zip(actual[name], expected[name], strict=True)]
            print(backend, name, max(errors))
            assert max(errors) < BOUND, (backend, name, errors)
