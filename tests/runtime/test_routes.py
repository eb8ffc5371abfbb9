"""Routes between placements are remembered, each for its own group and its own placements."""

import copy

import torch

from autoparallel.placement import Invariant, Partial, Replicate, Shard
from autoparallel.runtime.groups import SingleGroup, thread_groups
from autoparallel.runtime.routes import route_between


def test_a_route_is_that_of_its_group_and_its_placements() -> None:
    """Placements that are equal may lie in other orders; groups that were copied are others."""
    group, split, outer = SingleGroup(), Shard(1), Shard(1, outermost=True)
    assert split == outer
    route = route_between(group, split, Replicate())
    assert route_between(group, split, route.target) is route
    assert route_between(group, outer, route.target) is not route
    for other in (copy.copy(group), copy.deepcopy(group)):
        assert route_between(other, split, route.target).group is other
    assert route_between(group, split, route.target).group is group


def test_routes_of_passing_placements_are_forgotten() -> None:
    group = SingleGroup()
    for _ in range(1000):
        assert route_between(group, Partial(), Invariant()).back.step.value == "none"
    assert len(vars(group)["_routes"]) < 1000


def test_rows_are_moved_as_they_lie_where_all_ranks_have_equally_many() -> None:
    """The whole size tells, of a gather the given one; no dim but an outermost one has rows."""
    first, _ = thread_groups(2)
    gather = route_between(first, Shard(1, unit=2, outermost=True), Replicate())
    scatter = route_between(first, Partial(), Shard(1, outermost=True))
    part, whole = torch.zeros(3, 2, 5), torch.zeros(3, 4, 5)
    assert gather.has_rows(part, 4)
    assert not gather.has_rows(part, 6)
    assert scatter.has_rows(whole, 0)
    assert not scatter.has_rows(torch.zeros(3, 5, 5), 0)
    assert not route_between(first, Shard(1), Replicate()).has_rows(part, 4)
    assert not route_between(SingleGroup(), Shard(1, outermost=True), Partial()).has_rows(part, 4)
