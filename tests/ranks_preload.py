"""What the server of tests/ranks.py imports before it forks: all that a training needs, and that starts no thread."""

import tensorboard.compat.proto  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.tensor  # noqa: F401
import torch.export  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import ssr_fast.arguments  # noqa: F401
import ssr_fast.engine.together  # noqa: F401
import ssr_fast.session  # noqa: F401
