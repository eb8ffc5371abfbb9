"""Routes: moves between two placements that a program makes again and again.

All that does not depend on the tensor is found out once for each pair of placements, and not at
every call: a step of a small model is mostly the time that Python takes around its ops.
"""

from __future__ import annotations

import torch

from autoparallel.placement import Movement, Partial, Placement, Shard, gradient, movement
from autoparallel.runtime.groups import Group, Result
from autoparallel.runtime.moves import move, start_move

__all__ = ["Route", "route_between"]

# Placements that are made for one call have a route each, and these are forgotten.
_MOST_ROUTES = 256


class Route:
    """A move between two placements on a group's mesh axis.

    group, source, target: as of `move`. step: the move. dim: the split dim that lies outermost in
    memory where the route gathers or scatters along one, both values and gradients, else 0; the
    first dim is none. unit: of the ranks, what a size divides by where all of them have equal parts
    of that dim. sums: whether it is the sum of whole tensors, whole on every rank.

    >>> from autoparallel.placement import Invariant, Partial
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> route = route_between(SingleGroup(), Partial(), Invariant())
    >>> route.step.value, route.back.step.value, route.move(torch.ones(2), 0)
    ('all_reduce', 'none', tensor([1., 1.]))
    """

    __slots__ = ("_back", "dim", "group", "source", "step", "sums", "target", "unit")

    def __init__(self, group: Group, source: Placement, target: Placement) -> None:
        self.group, self.source, self.target = group, source, target
        self.step = movement(source, target)
        self._back: Route | None = None
        plain = isinstance(source, Partial) and not isinstance(target, Shard)
        self.sums = self.step is Movement.ALL_REDUCE and plain and group.world_size > 1
        # The gradient goes back the same way. That of a gather to what all ranks use alike is cut.
        rows = (Movement.ALL_GATHER, Movement.REDUCE_SCATTER)
        both = self.step in rows and movement(gradient(target), gradient(source)) in rows
        shard = (source if self.step is Movement.ALL_GATHER else target) if both else None
        self.dim, self.unit = 0, 1
        if isinstance(shard, Shard) and shard.outermost and group.world_size > 1:
            assert isinstance(shard.unit, int)
            self.dim, self.unit = shard.dim, group.world_size * shard.unit

    @property
    def back(self) -> Route:
        """The route of the gradient, whose own way back is this one."""
        if self._back is None:
            self._back = Route(self.group, gradient(self.target), gradient(self.source))
        return self._back

    def back_size(self, x: torch.Tensor, size: int) -> int:
        """Return the size of the whole along the split dim that the gradient's move starts from.

        x: what is moved. size: of the whole along the source's split dim. As of `Convert`: x is
        whole along the target's dim, except where the source splits it.
        """
        target, source = self.target, self.source
        if not isinstance(target, Shard):
            return 0
        return (
            size if isinstance(source, Shard) and source.dim == target.dim else x.size(target.dim)
        )

    def move(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """Return a tensor that was moved; see `move`. Collective."""
        if self.step is Movement.NONE:
            return x
        return move(x, self.group, self.source, self.target, size)

    def start(self, x: torch.Tensor, size: int) -> Result:
        """Start the move, and return a function that waits for its result. Collective."""
        if self.step is Movement.NONE:
            return lambda: x
        return start_move(x, self.group, self.source, self.target, size)

    def start_own(self, x: torch.Tensor, size: int) -> Result:
        """Start the move of a tensor that nobody else holds, into whose memory a sum is written.
        Collective.
        """
        if self.sums and x.is_contiguous():
            return self.group.start_all_reduce_(x)
        return self.start(x, size)

    def has_rows(self, x: torch.Tensor, size: int) -> bool:
        """Return whether rows are moved as they lie: the split dim lies outermost, and all ranks
        have equally many. x, size: as of `move`.
        """
        if not self.dim:
            return False
        whole = size if self.step is Movement.ALL_GATHER else x.size(self.dim)
        return whole % self.unit == 0

    def start_rows(self, rows: torch.Tensor) -> Result:
        """Start the move of a tensor whose split dim comes first, as that of the result does.

        Only where `has_rows` says so. Collective.
        """
        if self.step is Movement.ALL_GATHER:
            return self.group.start_gather_rows(rows)
        return self.group.start_scatter_rows(rows)


def route_between(group: Group, source: Placement, target: Placement) -> Route:
    """Return the route between two placements, the same one for the same objects."""
    routes: dict[tuple[int, int], Route] = vars(group).setdefault("_routes", {})
    route = routes.get((id(source), id(target)))
    # A route keeps its placements, so that their ids are not given to others. A group that was
    # copied has routes of the other one, and copies of its placements.
    if (
        route is None
        or route.source is not source
        or route.target is not target
        or route.group is not group
    ):
        if len(routes) >= _MOST_ROUTES:
            routes.clear()
        route = routes[id(source), id(target)] = Route(group, source, target)
    return route
