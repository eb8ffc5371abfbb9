"""The parameters of a pipelined model know their pipeline, for norms that are of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.pipeline_place import PipelinePlace
from autoparallel.support.torch_private import parts_of_norms

__all__ = ["counts_here", "note_stages", "pipelines_of", "refuse_norms_of_stages"]

# By parameter, also those of other stages: the place of this rank in its pipeline, and the path.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
# The meshes of ranks of a stage.
_meshes: set[int] = set()


def note_stages(module: nn.Module, place: PipelinePlace) -> None:
    """Remember the pipeline of a model's parameters. place: this rank's."""
    for path, parameter in module.named_parameters():
        _known[parameter] = (place, path)
        if isinstance(parameter, DTensor):
            _meshes.add(id(parameter.device_mesh))


def pipelines_of(parameters: Iterable[Any]) -> list[PipelinePlace]:
    """Return the pipelines that parameters are of, each once, in their order."""
    places: dict[int, PipelinePlace] = {}
    if not _known:
        return []
    for parameter in parameters:
        place, _ = _known.get(parameter, (None, ""))
        if place is not None:
            places[id(place)] = place
    return list(places.values())


def counts_here(parameter: Any) -> bool:
    """Return whether a parameter counts in sums over all ranks of a pipeline on this rank: on that
    of the first stage that holds it.
    """
    place, path = _known.get(parameter, (None, ""))
    return place is None or place.number == place.holders.get(path, (0,))[0]


def refuse_norms_of_stages(function: Any, arguments: tuple[Any, ...]) -> None:
    """Raise AutoParallelError where a function of torch would take one stage's parameters for all.

    function, arguments: of a call with split tensors.
    """
    if not _meshes or function not in parts_of_norms():
        return
    for item in arguments:
        for tensor in item if isinstance(item, (list, tuple)) else (item,):
            if isinstance(tensor, DTensor) and id(tensor.device_mesh) in _meshes:
                raise AutoParallelError(
                    f"torch's {function.__name__} of a parameter or gradient, of a model with "
                    "stages",
                    why="clip_grad_norm_ and loss scaling of torch look at the gradients that this "
                    "rank has, and the ranks of other stages have the others",
                    fix="autoparallel.clip_grad_norm_(model.parameters(), max_norm); for one "
                    "tensor, parameter.grad.norm(); train in bfloat16, which takes no loss scaling",
                )
