"""The first weights of a model on the meta device: every rank draws its own part."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from autoparallel.parallel.recorded_fills import (
    FillRecorder,
    RecordedCall,
    Region,
    replayed,
)
from autoparallel.parallel.tiled_fills import (
    cover,
    elementwise_fills,
    filled_part,
    number_of_tiles,
    tile_seed,
)
from autoparallel.parallel.whole_fills import children_first, filled_whole, nothing_fills, resetting
from autoparallel.placement import Invariant, Layout
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.module_copy import on_meta
from autoparallel.support.torch_private import storage_key

__all__ = ["materialize"]


def materialize(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    ranks: Ranks,
    device: torch.device,
    absent: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Return this rank's parts of a meta model's parameters, and its buffers, by path.

    layouts: the layout of each parameter, by path; what has none stays whole. device: the device of
    the parts. absent: parameters that other ranks have, which are left out where they can be.
    The model's own initializer (the model's `_init_weights(module)`, else `reset_parameters()`)
    runs on tensors without data, module by module in the order of nn.Module.apply, and what it does
    is recorded. Where it treats the elements of a parameter one by one (normal, uniform, truncated,
    constant, a row of zeros), a rank computes the tiles of its own part alone; what else it does
    (an orthogonal matrix) is computed whole and cut. The numbers follow from one draw of torch's
    generator: with the same seed they are the same on any number of ranks, but they are not those
    that torch's generator gives when `model.apply(model._init_weights)` draws in a row.
    An initializer that reads values, or has a generator of its own, needs memory and torch's
    generator: then every rank fills module by module whole, with torch's numbers, and a warning
    says so.
    Raises AutoParallelError that lists the tensors, or their modules, that nothing fills.
    """
    try:
        fillings = _Fillings(model, device)
    except Exception as error:
        # The initializer's own errors come again, where it runs on tensors with data.
        parts = filled_whole(model, layouts, ranks, device)
        warnings.warn(
            "every rank draws the whole of every weight of this meta model, with torch's own "
            f"generator, because its initializer cannot run without data ({error})",
            stacklevel=2,
        )
        return parts
    return fillings.parts(layouts, ranks, absent)


def _recorded(twin: nn.Module) -> list[RecordedCall]:
    """Return the record of the initializers' run on a model without data."""
    initializer = getattr(twin, "_init_weights", None)
    with FillRecorder(_tensors(twin).values()) as recorder:
        for _, module in children_first(twin):
            if callable(initializer):
                initializer(module)
            elif module._parameters or module._buffers:
                reset = resetting(module)
                if reset is not None:
                    reset()
    return recorder.calls


class _Fillings:
    """The record of a model's initializers, ready to be computed."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Run the initializers on a copy of the model without data, and give seeds to what draws.

        device: where to compute. Raises what an initializer raises that cannot run without data.
        """
        self.device = device
        twin = on_meta(model)
        # By storage: the tensors of the user that lie in it, one for each tensor that is tied.
        self.originals: dict[int, dict[int, torch.Tensor]] = {}
        tensors = _tensors(model)
        before = _tensors(twin)
        for path, tensor in before.items():
            shared = self.originals.setdefault(storage_key(tensor), {})
            shared[id(tensors[path])] = tensors[path]
        self.calls = _recorded(twin)
        # An initializer may give a parameter other memory: `weight.data = ...`.
        self.regions = {path: Region.of(tensor) for path, tensor in _tensors(twin).items()}
        self.places: dict[int, list[int]] = {}
        for at, call in enumerate(self.calls):
            regions = (*call.written, *filter(None, call.created))
            for storage in {region.storage for region in regions}:
                self.places.setdefault(storage, []).append(at)
        tiles = {region.storage: number_of_tiles(region.shape) for region in self.regions.values()}
        self.seeds: dict[int, int] = {}
        first = int(torch.empty((), dtype=torch.int64).random_())
        for at, call in enumerate(self.calls):
            if call.draws:
                self.seeds[at] = tile_seed(first, 0)
                first += max((tiles.get(region.storage, 1) for region in call.written), default=1)

    def parts(
        self, layouts: Mapping[str, Layout], ranks: Ranks, absent: Collection[str]
    ) -> dict[str, torch.Tensor]:
        """Return a rank's parts by path. Tensors with data that no initializer fills are left out,
        and so are those that are absent.

        Raises AutoParallelError for tensors without data that nothing fills.
        """
        parts: dict[str, torch.Tensor] = {}
        missing: list[str] = []
        by_region: dict[Region, torch.Tensor] = {}
        unsplit: Layout = (Invariant(),) * len(ranks.sizes)
        for path, region in self.regions.items():
            if region.storage not in self.places:
                if self._begun(region.storage) is None:
                    missing.append(path)
                continue
            if path in absent:
                continue
            if region not in by_region:
                part = self._part(region, layouts.get(path, unsplit), ranks)
                if part is None:
                    missing.append(path)
                    continue
                by_region[region] = part
            parts[path] = by_region[region]
        if missing:
            raise nothing_fills(missing)
        return parts

    def _part(self, region: Region, layout: Layout, ranks: Ranks) -> torch.Tensor | None:
        """Return a rank's part of one tensor; None, on all ranks, if no fill reaches some of it."""
        begun = self._begun(region.storage)
        alone = len(self.originals.get(region.storage, ())) == 1
        if alone and region == _contiguous(region):
            fills = elementwise_fills(self.calls, self.places[region.storage], self.seeds, region)
            if fills is not None:
                if begun is None and not cover(fills, region):
                    return None
                return filled_part(fills, region, layout, ranks, self.device, begun)
        whole = self._whole(region, beginning=0)
        if begun is None:
            # What is not filled is NaN. Integers have none: it follows the number it begins with.
            if whole.is_floating_point() or whole.is_complex():
                reached = not bool(whole.isnan().any())
            else:
                reached = torch.equal(whole, self._whole(region, beginning=1))
            if not reached:
                return None
        return take_layout_part(whole, layout, ranks.sizes, ranks.coordinates).clone()

    def _whole(self, region: Region, beginning: int) -> torch.Tensor:
        """Return one tensor, computed whole. beginning: what integers without data begin with."""
        memory = partial(self._memory, beginning=beginning)
        storage = replayed(region.storage, self.calls, self.places, memory, self.seeds, self.device)
        return region.shown(storage, self.device)

    def _begun(self, storage: int) -> torch.Tensor | None:
        """Return the user's tensor whose data a storage begins with, None if it has none."""
        originals = iter(self.originals.get(storage, {}).values())
        original = next((tensor for tensor in originals if not tensor.is_meta), None)
        return None if original is None else original.detach()

    def _memory(self, storage: int, beginning: int) -> torch.UntypedStorage:
        """Return the memory with which a tensor of the model begins: its data, or NaN.

        beginning: what integers are in place of NaN.
        """
        begun = self._begun(storage)
        if begun is not None:
            return begun.to(self.device, copy=True).untyped_storage()
        (original, *_) = self.originals[storage].values()
        numbers = original.is_floating_point() or original.is_complex()
        memory = torch.full_like(
            original, float("nan") if numbers else beginning, device=self.device
        )
        return memory.untyped_storage()


def _tensors(model: nn.Module) -> dict[str, Any]:
    """Return all parameters and buffers by every path at which they stand."""
    tensors: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def _contiguous(region: Region) -> Region:
    """Return the region of a contiguous tensor of this shape that begins its storage."""
    like = torch.empty(region.shape, dtype=region.dtype, device="meta")
    return Region(region.storage, region.shape, tuple(like.stride()), 0, region.dtype)
