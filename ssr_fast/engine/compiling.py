"""torch.compile of a method's nets, block by block: blocks of a kind share their code, so few are compiled.

The step as a whole stays as it is written: its pieces are fused inside, and a CUDA graph joins them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ssr_fast.data.batch import Batch
from ssr_fast.errors import UserError
from ssr_fast.methods.method import Method
from ssr_fast.models.heads import HEADS
from ssr_fast.models.mit import Block
from ssr_fast.models.sam_attention import SamBlock

KINDS = 64
"""Most variants of a block's code: stages x (student, teacher, frozen), at each size of a batch; SAM has two kinds."""

RunStep = Callable[[Batch, int], dict[str, Tensor]]


def compile_blocks(method: Method, hooked: bool = False) -> None:
    """Let every block and head of a method be compiled when it is first run; after its precision is settled.

    The frozen encoder's too, if it is SAM's.

    Args:
        hooked: the modules get hooks later that cannot be compiled (those of fully_shard gather their parameters): of
            blocks the forward pass alone is compiled, and heads, whose BatchNorms have such hooks, are not.

    Nothing falls back in silence: what cannot be compiled whole raises at that first run.
    """
    import torch._dynamo.config as dynamo  # takes a second, which only those pay who compile

    dynamo.recompile_limit = max(dynamo.recompile_limit, KINDS)
    dynamo.fail_on_recompile_limit_hit = True
    for module in compiled_modules(method):
        if hooked and isinstance(module, tuple(HEADS.values())):
            continue
        if hooked:
            module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)
        else:
            module.compile(fullgraph=True, dynamic=False)


def compiled_modules(method: Method) -> Iterator[nn.Module]:
    """What `compile_blocks` compiles, of every net and working copy."""
    return (module for module in method.modules() if isinstance(module, (Block, SamBlock, *HEADS.values())))


class CompiledStep:
    """A step of a method whose blocks are compiled: says how long that took, and what went wrong in one sentence.

    Args:
        run: the step.
        report: gets a line after each step in which something was compiled.
    """

    def __init__(self, run: RunStep, report: Callable[[str], None] = print) -> None:
        self._run, self._report = run, report
        self._seconds = compile_seconds()

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """See engine.step.TrainStep.

        Raises:
            UserError: a block could not be compiled.
        """
        try:
            terms = self._run(batch, step)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"--run.compile_blocks: a block could not be compiled ({_first(error)}); leave the option out"
            ) from error
        seconds = compile_seconds()
        if seconds > self._seconds:
            self._report(f"step {step + 1}: {seconds - self._seconds:.0f} s to compile blocks")
            self._seconds = seconds
        return terms


def compile_seconds() -> float:
    """Seconds that this process has spent in torch.compile."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent()["total_wall_time"])


def _first(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
