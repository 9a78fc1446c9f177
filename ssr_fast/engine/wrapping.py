"""How a method's nets are run: one ordered function, each step with its reason."""

from ssr_fast.engine.attention import apply_attention
from ssr_fast.engine.compiling import compile_blocks
from ssr_fast.engine.precision import apply_precision
from ssr_fast.engine.trainer import RunConfig
from ssr_fast.methods.method import Method


def wrap(method: Method, run: RunConfig, precision: str) -> None:
    """Make a method on its device run as the options say.

    Args:
        precision: what pick_precision has given.
    """
    method.student.backbone.recompute_blocks = run.recompute_blocks  # first: working copies take it over
    apply_precision(method, precision)  # makes the nets that the step runs
    apply_attention(method, run.attention)
    if run.compile_blocks:
        compile_blocks(method)  # last: what is compiled has its final types
