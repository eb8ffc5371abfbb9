"""Habits with several processes: meshes, wrappers, and ranks that do not do the same."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import autoparallel

from .case import Case, whole
from .models import built, inputs, plain, rows, scores
from .registry import in_group

habit = in_group("Processes and other engines")


def step(model: Any, batch: Any) -> torch.Tensor:
    """Return the loss of a batch, after its backward pass."""
    loss = model(*batch)
    loss.backward()
    return loss


@habit("mesh=init_device_mesh(...) of torch")
def device_mesh(case: Case) -> None:
    with case.group():
        mesh = init_device_mesh("cpu", (case.world_size,), mesh_dim_names=("tp",))
        case.compare(lambda model: step(model, rows(6, 0)), mesh=mesh)


@habit("a part of a DeviceMesh: mesh=devices['tp']")
def part_of_mesh(case: Case) -> None:
    with case.group():
        sizes = (1, case.world_size)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp"))["tp"]
        case.compare(lambda model: step(model, rows(6, 0)), mesh=mesh)


@habit("data parallelism as a mesh axis: mesh=Mesh(dp=2), every rank with the whole batch")
def data_parallel(case: Case) -> None:
    mesh = autoparallel.Mesh(dp=case.world_size)
    case.compare(lambda model: step(model, rows(6, 0)), mesh=mesh)


@habit("stages as a mesh axis: mesh=Mesh(pp=2), every rank with the whole batch")
def stages(case: Case) -> None:
    options: dict[str, Any] = {"microbatches": 2} if case.world_size > 1 else {}
    model, unsplit = plain(), plain()
    mesh = autoparallel.Mesh(pp=case.world_size)
    split = case.split(model, rows(6, 0), mesh=mesh, **options)
    for each in (split, unsplit):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        for number in range(2):
            step(each, rows(6, number))
            optimizer.step()
            optimizer.zero_grad()
    case.same(step(split, rows(6, 2)), step(unsplit, rows(6, 2)))
    case.same(dict(autoparallel.full_state_dict(split)), dict(unsplit.state_dict()))


@habit("backward(create_graph=True) of a model in stages")
def stages_twice(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(*rows(6, 0))
        loss.backward(create_graph=True)
        return loss

    case.compare(script, mesh=autoparallel.Mesh(pp=case.world_size))


def own_rows(case: Case, lengths: tuple[int, ...]) -> tuple[Any, Any]:
    """Return this rank's rows, and those of all ranks together. lengths: of the ranks' rows."""
    parts = [rows(length, rank + 3) for rank, length in enumerate(lengths[: case.world_size])]
    together = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return parts[case.rank], together


def local_batches(case: Case, lengths: tuple[int, ...]) -> None:
    """Compare a step whose batch is that of all ranks."""
    own, together = own_rows(case, lengths)
    model = case.split(plain(), own, mesh=autoparallel.Mesh(dp=case.world_size), local_inputs="dp")
    unsplit = plain()
    case.same(step(model, own), step(unsplit, together))
    case.same_module(model, unsplit)


@habit("a batch of its own on each rank: local_inputs='dp'")
def local_inputs(case: Case) -> None:
    local_batches(case, (6, 6))


@habit("batches of different lengths on the ranks, with local_inputs='dp'")
def local_lengths(case: Case) -> None:
    local_batches(case, (6, 3))


@habit("a gradient penalty on the rows that each rank brings, of different lengths")
def local_penalty(case: Case) -> None:
    def penalized(model: Any, batch: Any) -> Any:
        x = batch[0].clone().requires_grad_()
        loss = model(x, batch[1])
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()
        return loss

    own, together = own_rows(case, (6, 3))
    mesh = autoparallel.Mesh(dp=case.world_size)
    model, unsplit = case.split(plain(), own, mesh=mesh, local_inputs="dp"), plain()
    case.same(penalized(model, own), penalized(unsplit, together))
    case.same_module(model, unsplit)


@habit("a DistributedSampler and a DataLoader, with local_inputs='dp'")
def sampler(case: Case) -> None:
    data = TensorDataset(*rows(12, 1))
    parts = [
        DistributedSampler(data, case.world_size, rank, shuffle=True, seed=4)
        for rank in range(case.world_size)
    ]
    loaders = [DataLoader(data, batch_size=3, sampler=part) for part in parts]
    mesh = autoparallel.Mesh(dp=case.world_size)
    model = case.split(plain(), rows(3, 0), mesh=mesh, local_inputs="dp")
    unsplit = plain()
    for batches in zip(*loaders, strict=True):
        together = [torch.cat(column) for column in zip(*batches, strict=True)]
        case.same(step(model, batches[case.rank]), step(unsplit, together))
    case.same_module(model, unsplit)


@habit("ranks that bring different batches without local_inputs")
def different_batches(case: Case) -> None:
    model = case.split(plain(), rows(6, 0))
    found = step(model, rows(6, case.rank))
    case.same(found, step(plain(), rows(6, case.rank)))


@habit("ranks that bring batches of different sizes without local_inputs")
def different_sizes(case: Case) -> None:
    model = case.split(plain(), rows(6, 0))
    batch = rows(6 + case.rank, 0)
    case.same(step(model, batch), step(plain(), batch))


@habit("different batches on the ranks from the third call on, without local_inputs")
def different_later(case: Case) -> None:
    model = case.split(plain(), rows(6, 0))
    for seed in range(4):
        batch = rows(6, seed if seed < 3 else case.rank + 5)
        case.same(step(model, batch), step(plain(), batch))


@habit("weights that differ on the ranks (no common seed)")
def different_weights(case: Case) -> None:
    def different() -> nn.Module:
        model = scores()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(case.rank)
        return model

    case.compare(lambda model: model(inputs()), different, inputs())


@habit("different random states on the ranks: dropout is the same on all")
def different_seeds(case: Case) -> None:
    model = case.split(built(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5))), inputs())
    torch.manual_seed(case.rank + 17)
    y = whole(model(inputs()))
    if case.world_size > 1:
        ys = [torch.empty_like(y) for _ in range(case.world_size)]
        dist.all_gather(ys, y.detach().contiguous())
        case.same(ys[0], ys[1])


@habit("DistributedDataParallel over the split module")
def ddp(case: Case) -> None:
    def script(model: Any) -> Any:
        if "_autoparallel" not in vars(model):
            return step(model, rows(6, 0))
        with case.group():
            return step(DistributedDataParallel(model), rows(6, 0))

    case.compare(script)


@habit("fully_shard (FSDP2) over the split module")
def fsdp(case: Case) -> None:
    def script(model: Any) -> Any:
        if "_autoparallel" not in vars(model):
            return model(*rows(6, 0))
        with case.group():
            mesh = init_device_mesh("cpu", (case.world_size,))
            return fully_shard(model, mesh=mesh)(*rows(6, 0))

    case.compare(script)


@habit("FullyShardedDataParallel (FSDP1) over the split module")
def fsdp_old(case: Case) -> None:
    def script(model: Any) -> Any:
        if "_autoparallel" not in vars(model):
            return model(*rows(6, 0))
        with case.group():
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"))(*rows(6, 0))

    case.compare(script)


@habit("torch.nn.DataParallel over the split module, on CPUs")
def data_parallel_module(case: Case) -> None:
    case.compare(lambda model: step(DataParallel(model), rows(6, 0)))


@habit("parallelize_module over the split module")
def tensor_parallel(case: Case) -> None:
    def script(model: Any) -> Any:
        if "_autoparallel" not in vars(model):
            return model(*rows(6, 0))
        with case.group():
            mesh = init_device_mesh("cpu", (case.world_size,))
            return parallelize_module(model, mesh, {"up": ColwiseParallel()})(*rows(6, 0))

    case.compare(script)


@habit("splitting a module that DistributedDataParallel wraps", refused=True)
def over_ddp(case: Case) -> None:
    with case.group():
        case.split(DistributedDataParallel(plain()), rows(6, 0))


@habit("splitting a module whose parameters are DTensors already", refused=True)
def over_dtensors(case: Case) -> None:
    with case.group():
        mesh = init_device_mesh("cpu", (case.world_size,))
        model = plain()
        weight = distribute_tensor(model.up.weight.detach(), mesh)
        model.up.weight = nn.Parameter(weight)
        case.split(model, rows(6, 0))


@habit("another world size than that of the processes", refused=True)
def other_world(case: Case) -> None:
    autoparallel.autoparallelize(plain(), case.world_size + 1, example_inputs=rows(6, 0))


@habit("all_reduce of the loss by hand, for a log")
def reduced_by_hand(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = step(model, rows(6, 0))
        logged = loss.detach().clone()
        with case.group():
            dist.all_reduce(logged)
            return loss, logged / dist.get_world_size()

    case.compare(script)


@habit("all_reduce of gradients by hand: p.grad is averaged over the ranks")
def gradients_by_hand(case: Case) -> None:
    def script(model: Any) -> Any:
        step(model, rows(6, 0))
        with case.group():
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    case.compare(script)


@habit("evaluation on rank 0 alone of a copy from full_state_dict")
def rank_zero(case: Case) -> None:
    model = case.split(plain(), rows(6, 0))
    weights = autoparallel.full_state_dict(model)
    if case.rank == 0:
        unsplit = plain()
        unsplit.load_state_dict(weights)
        case.same(unsplit(*rows(6, 1)), plain()(*rows(6, 1)))


@habit("an error in forward that all ranks raise and catch, and training on")
def error_everywhere(case: Case) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] == 3:
                raise ValueError("no three rows")
            return self.down(torch.tanh(self.up(x))).square().mean()

    def script(model: Any) -> Any:
        first = step(model, (inputs(),))
        try:
            model(inputs(3))
        except ValueError as error:
            return first, str(error), step(model, (inputs(seed=1),))
        raise AssertionError("no error")

    case.compare(script, lambda: built(Failing), inputs())


@habit("calls from a thread that is not the main one")
def thread(case: Case) -> None:
    def script(model: Any) -> Any:
        results: list[Any] = []
        worker = threading.Thread(target=lambda: results.append(step(model, rows(6, 0))))
        worker.start()
        worker.join()
        assert results, "the thread failed"
        return results

    case.compare(script)


@habit("two split modules in one training: a generator and a critic")
def two_models(case: Case) -> None:
    def build() -> tuple[Any, Any]:
        maker = built(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)))
        return maker, scores()

    def run(maker: Any, critic: Any) -> list[torch.Tensor]:
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (critic, maker)]
        losses = []
        for seed in range(2):
            fake = maker(inputs(seed=seed))
            for optimizer, seen in zip(optimizers, (fake.detach(), fake), strict=True):
                maker.zero_grad()
                critic.zero_grad()
                loss = critic(seen).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss)
        return losses

    unsplit = build()
    split = [case.split(model, inputs(grad=not index)) for index, model in enumerate(build())]
    case.same(run(*split), run(*unsplit))
    for model, expected in zip(split, unsplit, strict=True):
        case.same_module(model, expected)


@habit("a process group destroyed, and another one made, with a model split in each")
def destroyed(case: Case) -> None:
    if case.world_size > 1:
        # The other rows of this launch need the group; a mesh on another one takes its place.
        for _ in range(2):
            mesh = init_device_mesh("cpu", (case.world_size,), mesh_dim_names=("tp",))
            case.compare(lambda model: step(model, rows(6, 0)), mesh=mesh)
        return
    with case.group():
        case.compare(lambda model: step(model, rows(6, 0)))
    with case.group():
        case.compare(lambda model: step(model, rows(6, 0)))
