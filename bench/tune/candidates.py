"""What the tuner tries: for each op, row of its table and kernel other block sizes than the table's own.

All compile for sm_90 without a spill and within its shared memory (tests/aot/test_candidates.py compiles them). Where a
table holds a list, the candidates are a list as long, one tuple of candidates for each entry.
"""

from collections.abc import Sequence
from typing import Any

from ssr_kernels.tables import Blocks


def _blocks(options: str, *rows: tuple[int, ...]) -> tuple[Blocks, ...]:
    names = options.split()
    return tuple(dict(zip(names, row, strict=True)) for row in rows)


def _tiles(*rows: tuple[int, ...]) -> tuple[Blocks, ...]:
    return _blocks("TW BC num_warps STAGES", *rows)


def _dilated(*rows: tuple[int, ...]) -> tuple[Blocks, ...]:
    return _blocks("TW BC num_warps", *rows)


def _pixels(*rows: tuple[int, ...]) -> tuple[Blocks, ...]:
    return _blocks("KL BP num_warps", *rows)


def _sums(*rows: tuple[int, ...]) -> tuple[Blocks, ...]:
    return _blocks("BLOCK num_warps", *rows)


_STAGED = "num_warps num_stages"
_ALIGN_HALF: dict[str, Sequence[Blocks]] = {
    "direct_rows": _blocks(
        f"BN BK {_STAGED}",
        (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3),
        (32, 64, 4, 3),
    ),
    "direct_dx": _blocks(
        f"BC BN BK {_STAGED}",
        (128, 64, 64, 8, 3), (64, 64, 64, 4, 2), (64, 64, 64, 8, 2), (128, 32, 64, 8, 2), (128, 64, 32, 8, 3),
        (256, 32, 32, 8, 2), (64, 64, 64, 4, 3), (128, 128, 32, 8, 2),
    ),
    "direct_dw": _blocks(
        f"BC BN BK {_STAGED}",
        (128, 64, 64, 8, 3), (64, 64, 64, 4, 2), (64, 64, 64, 8, 2), (64, 128, 64, 8, 2), (128, 64, 32, 8, 3),
        (128, 32, 64, 8, 2), (256, 64, 32, 8, 2),
    ),
    "gram_tables": _blocks(
        f"BM BC BK {_STAGED}",
        (64, 64, 64, 4, 3), (64, 64, 64, 8, 2), (64, 64, 32, 4, 3), (32, 64, 64, 4, 3), (64, 32, 64, 4, 3),
        (128, 64, 32, 8, 3), (32, 32, 64, 4, 2),
    ),
    "gram_rows": _blocks(
        f"BC BK {_STAGED}",
        (32, 32, 4, 3), (32, 32, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3), (64, 32, 8, 2), (64, 64, 8, 2), (32, 16, 4, 3),
    ),
    "gram_dx": _blocks(
        f"BC BK {_STAGED}",
        (32, 32, 4, 3), (32, 32, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3), (64, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2),
        (32, 16, 4, 3),
    ),
    "gram_adjoint": _blocks(
        f"BM BC {_STAGED}",
        (16, 64, 2, 1), (16, 64, 4, 2), (16, 64, 4, 3), (8, 64, 4, 1), (32, 64, 4, 1), (16, 128, 4, 1), (32, 32, 4, 1),
        (16, 64, 8, 1), (8, 64, 2, 1),
    ),
    "token_sums": _blocks(
        f"BR BN BC {_STAGED}",
        (64, 64, 64, 4, 3), (64, 64, 64, 8, 2), (32, 64, 64, 4, 3), (64, 128, 64, 8, 2), (64, 32, 64, 4, 3),
        (32, 32, 64, 4, 3), (32, 32, 32, 4, 3),
    ),
    "moments": _blocks(
        f"BR BC {_STAGED}",
        (64, 64, 4, 3), (64, 64, 8, 2), (32, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3),
        (32, 32, 4, 3),
    ),
    "weight_gradients": _blocks(
        f"BN BC BK {_STAGED}",
        (32, 32, 32, 4, 2), (32, 32, 32, 8, 1), (32, 64, 32, 8, 1), (16, 32, 32, 4, 1), (16, 64, 32, 4, 1),
        (32, 32, 16, 4, 2), (16, 16, 32, 4, 1), (16, 16, 32, 2, 1),
    ),
    "loss_sums": _sums((1024, 8), (512, 4), (2048, 8), (2048, 16), (256, 2)),
}  # fmt: skip
_ALIGN_FLOAT32: dict[str, Sequence[Blocks]] = {
    "direct_rows": _blocks(
        f"BN BK {_STAGED}",
        (32, 32, 8, 3), (32, 32, 4, 2), (64, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 3), (32, 16, 8, 2),
    ),
    "direct_dx": _blocks(
        f"BC BN BK {_STAGED}",
        (128, 32, 32, 8, 3), (64, 32, 32, 8, 2), (64, 32, 32, 4, 2), (128, 16, 32, 8, 2), (64, 32, 32, 8, 3),
        (128, 32, 16, 8, 3),
    ),
    "direct_dw": _blocks(
        f"BC BN BK {_STAGED}",
        (128, 32, 32, 8, 3), (64, 32, 32, 8, 2), (64, 32, 32, 4, 2), (64, 32, 32, 8, 3), (128, 32, 16, 8, 3),
        (128, 16, 32, 8, 2),
    ),
    "gram_tables": _blocks(
        f"BM BC BK {_STAGED}",
        (64, 32, 32, 4, 3), (64, 32, 32, 8, 2), (32, 32, 32, 4, 2), (64, 64, 32, 8, 2), (64, 32, 32, 8, 3),
        (64, 32, 16, 4, 3),
    ),
    "gram_rows": _blocks(
        f"BC BK {_STAGED}", (32, 32, 8, 3), (32, 32, 4, 2), (64, 32, 8, 2), (32, 64, 8, 2), (32, 16, 8, 3)
    ),
    "gram_dx": _blocks(
        f"BC BK {_STAGED}", (32, 32, 4, 3), (32, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (32, 16, 4, 3)
    ),
    "gram_adjoint": _ALIGN_HALF["gram_adjoint"],
    "token_sums": _blocks(
        f"BR BN BC {_STAGED}",
        (32, 64, 64, 4, 3), (32, 64, 64, 8, 2), (64, 64, 64, 8, 2), (32, 32, 64, 4, 3), (32, 32, 32, 4, 3),
    ),
    "moments": _blocks(
        f"BR BC {_STAGED}", (32, 64, 4, 3), (32, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 3), (64, 32, 4, 2)
    ),
    "weight_gradients": _ALIGN_HALF["weight_gradients"],
    "loss_sums": _ALIGN_HALF["loss_sums"],
}  # fmt: skip
_CONTRAST_ROWS: dict[str, Sequence[Blocks]] = {
    "inverse_norms": _blocks("BM num_warps", (4, 4), (8, 4), (32, 4), (16, 2), (32, 8), (64, 8)),
    "loss_sum": _sums((1024, 4), (1024, 8), (4096, 8), (4096, 16), (2048, 16), (512, 4)),
    "gradient_sums": _blocks("BM num_warps", (4, 4), (8, 4), (8, 2), (16, 8), (32, 8)),
}
_CONTRAST: dict[str, dict[str, Sequence[Blocks]]] = {
    "bfloat16": {
        **_CONTRAST_ROWS,
        "row_sums": _blocks(
            f"BM BN BK {_STAGED}",
            (64, 32, 256, 4, 2), (64, 32, 256, 4, 4), (64, 32, 256, 8, 3), (64, 64, 256, 8, 3), (64, 32, 128, 4, 3),
            (128, 32, 256, 8, 2), (128, 32, 256, 8, 3), (128, 32, 256, 8, 4), (32, 32, 256, 4, 3), (32, 64, 256, 4, 3),
        ),
        "row_gradients": _blocks(
            f"BM BN BK {_STAGED}",
            (64, 32, 256, 4, 2), (64, 32, 256, 4, 4), (64, 32, 256, 8, 3), (64, 64, 256, 8, 2), (64, 64, 256, 8, 3),
            (128, 32, 256, 8, 2), (128, 32, 256, 8, 3),
        ),
    },
    "float32": {
        **_CONTRAST_ROWS,
        "row_sums": _blocks(
            f"BM BN BK {_STAGED}",
            (64, 32, 32, 4, 3), (64, 32, 64, 4, 2), (128, 32, 32, 8, 2), (32, 32, 32, 4, 2),
            (64, 64, 32, 8, 3), (64, 32, 32, 8, 2),
        ),
        "row_gradients": _blocks(
            f"BM BN BK {_STAGED}",
            (32, 32, 32, 8, 3), (32, 16, 32, 8, 2), (32, 16, 32, 8, 3), (32, 32, 16, 8, 2), (32, 32, 16, 8, 3),
            (16, 32, 32, 4, 2), (16, 32, 32, 8, 2), (16, 64, 32, 8, 2),
        ),
    },
}  # fmt: skip
_DILATED = (
    _dilated((128, 16, 8), (32, 16, 4), (128, 8, 8), (64, 16, 8), (64, 32, 16), (32, 32, 8), (32, 64, 16)),
    (),
)  # fmt: skip
_DWCONV: dict[str, Sequence[Any]] = {
    "gelu_forward": (
        _tiles(
            (16, 64, 4, 1), (16, 64, 4, 2), (16, 64, 4, 4), (16, 64, 8, 3), (16, 32, 4, 3), (16, 32, 2, 3),
            (16, 128, 8, 3), (32, 32, 4, 3), (32, 64, 8, 3),
        ),
    ),
    "gelu_backward": (
        _tiles(
            (16, 32, 4, 1), (16, 32, 4, 2), (16, 32, 4, 4), (16, 32, 8, 3), (16, 64, 8, 3), (16, 16, 2, 3),
            (16, 16, 4, 3),
        ),
        _tiles(
            (32, 32, 8, 1), (32, 32, 8, 2), (32, 32, 8, 4), (32, 16, 4, 3), (32, 16, 8, 3), (32, 32, 16, 3),
        ),
        _tiles((64, 16, 8, 1), (64, 16, 8, 2), (64, 16, 8, 4), (64, 16, 16, 3), (64, 8, 4, 3)),
    ),
    "dilated_forward": _DILATED,
    "dilated_dx": _DILATED,
    "dilated_dw": _DILATED,
    "tap_sums": _blocks(
        "BS BC num_warps",
        (64, 32, 8), (32, 32, 4), (16, 32, 4), (128, 32, 8), (64, 64, 8), (64, 16, 4), (32, 64, 4), (128, 16, 4),
    ),
}  # fmt: skip
_UP = {
    "16": _pixels((1, 128, 4), (2, 64, 4), (2, 128, 4), (4, 32, 4), (4, 128, 4), (4, 128, 8), (8, 64, 4)),
    "32": _pixels(
        (2, 64, 4), (2, 128, 4), (4, 32, 4), (4, 64, 8), (4, 128, 4), (4, 128, 8), (8, 32, 4), (8, 64, 4), (16, 32, 4)
    ),
    "64": _pixels((4, 32, 4), (4, 64, 4), (8, 16, 4), (8, 64, 4), (8, 64, 8), (16, 32, 4)),
    "128": _pixels((8, 16, 4), (8, 32, 4), (16, 8, 4), (16, 32, 4), (16, 32, 8), (32, 16, 4)),
    "256": _pixels((8, 8, 4), (16, 16, 4), (16, 16, 8), (32, 4, 4), (32, 8, 4), (32, 16, 8)),
}
_DOWN = {
    "16": _pixels((2, 32, 4), (2, 64, 4), (4, 16, 2), (4, 64, 4), (4, 64, 8), (8, 16, 4), (8, 32, 4)),
    "32": _pixels((2, 32, 4), (4, 16, 2), (4, 16, 4), (4, 64, 4), (4, 64, 8), (8, 16, 4), (8, 32, 4), (8, 32, 8)),
    "64": _pixels((4, 16, 4), (8, 8, 4), (8, 16, 8), (8, 32, 4), (8, 32, 8), (16, 16, 4)),
    "128": _pixels((8, 8, 4), (16, 4, 4), (16, 8, 8), (16, 16, 4), (16, 16, 8), (32, 8, 4)),
    "256": _pixels((16, 4, 4), (16, 8, 8), (16, 16, 8), (32, 4, 4), (32, 8, 4), (32, 8, 8)),
}
_TOTALS = _sums((1024, 4), (2048, 4), (2048, 8), (4096, 16), (8192, 8), (8192, 16))

CANDIDATES: dict[str, dict[str, dict[str, Sequence[Any]]]] = {
    "align": {"half": _ALIGN_HALF, "float32": _ALIGN_FLOAT32},
    "contrast": _CONTRAST,
    "dwconv": {"maps": _DWCONV},
    "segloss": {
        "sums": {"loss_sum": _TOTALS, "count_sum": _TOTALS},
        **{row: {"pixel_losses": _UP[row], "logit_gradients": _DOWN[row], "surest_classes": _UP[row]} for row in _UP},
    },
}
"""Options that a candidate does not name stay as they are in the table."""
