"""Wrappers of other engines around a split module are refused; a whole one may be wrapped."""

from __future__ import annotations

import inspect

import pytest
import torch
from processes import run_processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import autoparallel
from autoparallel.errors import WrappedModelError


class Documented(nn.Module):
    """A model whose forward tells what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """Return scores (batch, 5)."""
        return self.down(self.up(x).relu()) * scale


def work(rank: int) -> None:
    torch.manual_seed(0)
    model, x = Documented(), torch.ones(4, 6)
    split = autoparallel.autoparallelize(model, 2, example_inputs=x)
    with pytest.raises(WrappedModelError, match="DistributedDataParallel over a module that"):
        DistributedDataParallel(split)
    with pytest.raises(WrappedModelError, match="FSDP over a module that"):
        fully_shard(split)
    with pytest.raises(WrappedModelError, match=r"DataParallel over .*[\s\S]*Mesh\(tp=2\)"):
        # DataParallel calls this for each of several GPUs; it leaves a CPU's module as it is.
        split._replicate_for_data_parallel()  # type: ignore[operator]
    torch.testing.assert_close(split(x), model(x))


def test_wrappers_of_a_split_module() -> None:
    run_processes(work, 2)


@pytest.mark.parametrize("example", [torch.ones(4, 6), None], ids=["planned", "deferred"])
def test_forward_has_the_signature_of_the_users(example: torch.Tensor | None) -> None:
    """Tools ask for it: Hugging Face's Trainer drops the columns that forward does not name."""
    split = autoparallel.autoparallelize(Documented(), 1, example_inputs=example)
    assert inspect.signature(split.forward) == inspect.signature(Documented().forward)
    assert split.forward.__doc__ == Documented.forward.__doc__
    split(torch.ones(4, 6))
    assert inspect.signature(split.forward) == inspect.signature(Documented().forward)
