"""Gradients of parameters that stages of several ranks read: added up, on each of these alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from autoparallel.parallel.pipeline_place import PipelinePlace

__all__ = ["add_over_stages"]


def add_over_stages(
    gradients: list[torch.Tensor | None],
    parameters: Sequence[torch.Tensor],
    shared: Sequence[tuple[int, Sequence[int]]],
    place: PipelinePlace,
) -> None:
    """Add up the gradients of parameters that stages of several ranks read, on each of these.

    gradients: of `parameters`, as this rank has them; the shared ones are replaced. shared: places
    among them, with the other ranks of the pipeline that hold the parameter; some rank has a
    gradient of each. place: this rank's.
    All of them add in the order of the ranks, so that they have the same number bit for bit.
    """
    waiting = []
    for index, others in shared:
        own = gradients[index]
        if own is None:
            own = torch.zeros_like(parameters[index])
        own = own.contiguous()
        arrived = {place.number: own}
        operations = []
        for other in others:
            arrived[other] = torch.empty_like(own)
            peer = place.process(other)
            operations += [
                dist.P2POp(dist.isend, own, peer, place.group),
                dist.P2POp(dist.irecv, arrived[other], peer, place.group),
            ]
        waiting.append((index, arrived, dist.batch_isend_irecv(operations)))
    for index, arrived, works in waiting:
        for work in works:
            work.wait()
        total = arrived[min(arrived)].clone()
        for stage in sorted(arrived)[1:]:
            total += arrived[stage]
        gradients[index] = total if parameters[index].requires_grad else None
