"""Steps of every method, and how two of them are compared, for the tests of graphs on a CPU and on a GPU."""

import torch

from ssr_fast.engine.deterministic import prepare_deterministic
from ssr_fast.engine.optim import OptimConfig
from ssr_fast.engine.precision import apply_precision
from ssr_fast.engine.step import TrainStep
from ssr_fast.methods.ssr import SsrConfig
from tests.methods.support import make_batch, make_method, make_source_free

START = 5
STEPS = 11
METHODS = {
    "supervised": lambda: make_method("supervised"),
    "self_training": lambda: make_method("self_training", start_step=START, feature_distance=0.01),
    "cosine": lambda: make_method("ssr", start_step=START),
    "injection": lambda: make_method("ssr", ssr=SsrConfig(regulariser="injection"), start_step=START),
    "source_free": lambda: make_source_free(contrast_start=START, vote=True),
}
OPTIM = OptimConfig(lr=1e-3, warmup_steps=4, clip_norm=0.5)


def make_step(name, precision="fp32", recompute=False, device="cpu"):
    method = METHODS[name]().to(device)
    method.student.backbone.recompute_blocks = recompute
    apply_precision(method, precision)
    return TrainStep(method, OPTIM, STEPS, deterministic=prepare_deterministic(True, torch.device(device)))


def everything(step):
    """Every tensor that a step changes."""
    slots = [tensor for slots in step.optimizer.state.values() for tensor in slots.values()]
    return [
        *step.method.state_dict(keep_vars=True).values(),
        *slots,
        *step.guard.__dict__["_saved"],
        *step.guard.state().values(),
    ]


def run(step, call, spoil=None, steps=STEPS):
    """The terms of each step."""
    kept = []
    for number in range(steps):
        batch = make_batch(seed=number)
        if number == spoil:
            batch.source_image.fill_(0)
            step.method.class_weight.fill_(float("nan"))
        kept.append({name: value.detach().clone() for name, value in call(batch, number).items()})
        if number == spoil:
            step.method.class_weight.fill_(1.0)
    return kept


def check_equal(one, other, terms, expected):
    for number, (ours, theirs) in enumerate(zip(terms, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(ours[name].nan_to_num(-1), theirs[name].nan_to_num(-1)), (number, name)
    for mine, theirs in zip(everything(one), everything(other), strict=True):
        assert torch.equal(mine, theirs)
