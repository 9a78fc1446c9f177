"""The guard itself: each thing that it must refuse is refused, and what a step needs passes."""

import numpy as np
import pytest
import torch

from tests.syncfree import HostSyncError, NoHostSync

X = torch.tensor([0.5, -1.0, 2.0])
INDEX, REPEATS = torch.tensor([2, 0]), torch.tensor([1, 2, 3])
FORBIDDEN = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X[0]),
    "bool": lambda: bool((X > 0).any()),
    "tolist": lambda: X.sum().tolist(),
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.numpy(),
    "array": lambda: np.asarray(X),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 0),
    "unique": lambda: X.unique(),
    "unique_dim": lambda: X[:, None].unique(dim=0),
    "unique_consecutive": lambda: X.unique_consecutive(),
    "masked_select": lambda: X.masked_select(X > 0),
    "bincount": lambda: REPEATS.bincount(),
    "boolean indexing": lambda: X[X > 0],
    "boolean assignment": lambda: X.clone().index_put_((X > 0,), torch.zeros(2)),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "repeat_interleave": lambda: X.repeat_interleave(REPEATS),
    "constants": lambda: torch.tensor([1.0, 2.0]),
    "constants as they are": lambda: torch.as_tensor([1.0, 2.0]),
}
ALLOWED = {
    "where with values": lambda: torch.where(X > 0, X, 0.0),
    "gather": lambda: X.gather(0, INDEX),
    "integer indexing": lambda: X[INDEX],
    "masked_fill": lambda: X.masked_fill(X > 0, 0.0),
    "topk": lambda: X.topk(2),
    "repeat_interleave": lambda: X.repeat_interleave(2),
    "repeat_interleave of known size": lambda: X.repeat_interleave(REPEATS, output_size=6),
    "sort": lambda: X.sort(),
    "constants made there": lambda: torch.full((2,), 0.5),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_refuses(name):
    FORBIDDEN[name]()
    with pytest.raises(HostSyncError), NoHostSync():
        FORBIDDEN[name]()


@pytest.mark.parametrize("name", ALLOWED)
def test_lets_pass(name):
    with NoHostSync():
        ALLOWED[name]()


def test_sees_the_backward_pass():
    class Peeking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.sum().item()

    x = X.clone().requires_grad_()
    with NoHostSync():
        loss = Peeking.apply(x).sum()
    with pytest.raises(HostSyncError), NoHostSync():
        loss.backward()


def test_is_over_when_it_is_left():
    with pytest.raises(HostSyncError), NoHostSync():
        X.sum().item()
    assert X.sum().item() == 1.5 and X.tolist()


@pytest.mark.gpu
def test_refuses_a_copy_to_the_host():
    x = X.cuda()
    with pytest.raises(HostSyncError), NoHostSync():
        x.to("cpu")
