"""What to use at each number of GPUs, and why, from the model's rows."""

from dataclasses import dataclass

from bench.scaling.model import Plan, Row

RECIPE_BATCH = 2
"""Images a domain of a step in the published recipe."""
SOURCE_IMAGES, TARGET_IMAGES = 24_966, 2_975
"""GTA5, and Cityscapes' training images."""


@dataclass(frozen=True)
class Advice:
    """For one number of GPUs; hours are the model's."""

    gpus: int
    global_batch: int
    """Images a domain of a step of all GPUs."""
    hours: float
    """Of the planned steps."""
    source_epochs: float
    target_epochs: float
    """Of GTA5 and Cityscapes in the planned steps."""
    same_samples_steps: int
    """Steps after which as many images were seen as in the planned steps of the recipe's batch."""
    same_samples_minutes: float
    use: str
    why: str


def advise(plan: Plan, steps: int, ddp: Row) -> Advice:
    """For the GPUs of a row.

    Args:
        plan: the model's inputs.
        steps: of a run.
        ddp: the row of the mode that is advised where several GPUs train one network.
    """
    gpus, batch = ddp.gpus, plan.batch * ddp.gpus
    seconds = ddp.step_ms / 1e3
    same = max(1, round(steps * RECIPE_BATCH / batch))
    use, why = _choice(plan, steps, ddp)
    return Advice(
        gpus,
        batch,
        steps * seconds / 3600,
        steps * batch / SOURCE_IMAGES,
        steps * batch / TARGET_IMAGES,
        same,
        same * seconds / 60,
        use,
        why,
    )


def _choice(plan: Plan, steps: int, ddp: Row) -> tuple[str, str]:
    gpus, batch, node = ddp.gpus, plan.batch * ddp.gpus, plan.cluster.gpus_per_node
    alone = f"{steps * plan.step / 3600:.2f} h a run"
    if gpus == 1:
        return "single", f"nothing to exchange; {alone}"
    other = f"a step of {batch / RECIPE_BATCH:.0f} times the recipe's images is not the published method"
    if gpus <= node:
        return f"ddp, or {gpus} seeds", f"ddp runs at {ddp.efficiency:.0f} %, but {other}; seeds side by side: {alone}"
    apart = f"{gpus} runs of one GPU ({alone}, no network), or {gpus // node} of {node} by ddp"
    return "independent seeds", f"{apart}; one run by ddp: {ddp.efficiency:.0f} %, but {other}"
