"""When ranks of a pipeline ask for what they receive, and until when they hold what they send."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autoparallel.options import SCHEDULES
from autoparallel.runtime.message_orders import messages_of
from autoparallel.runtime.schedule_orders import FORWARD, WEIGHTS, schedule_class, schedule_order

CASES = [
    ("1f1b", 2, 2, 4),
    ("1f1b", 4, 3, 8),
    ("gpipe", 3, 2, 6),
    ("zero_bubble", 4, 1, 8),
    ("zbv", 3, 2, 9),
    ("dualpipev", 2, 2, 8),
]
PASSES = ("F", "B", "I", "W")


def torch_tables(schedule: str, ranks: int, each: int, count: int) -> list[list[list[Any]]]:
    """Return torch's own table of a schedule, with sends and receives, of each rank; and the one
    that torch makes in the same way of passes alone.

    The first has turns for parameters besides, as many as a release needs: they come between when
    a rank asks and when another one sends.
    """
    from torch.distributed.pipelining import schedules

    stage = SimpleNamespace(
        group_size=ranks, group_rank=0, num_stages=ranks * each, is_first=True, is_last=False,
        stage_index=0, submod=None,
    )  # fmt: skip
    kind = getattr(schedules, schedule_class(schedule, ranks, each, count))
    table = kind([stage] * each, count, loss_fn=None)
    whole = [list(table.pipeline_order_with_comms[rank]) for rank in range(ranks)]
    passes = {
        rank: [action for action in row if action.sub_actions or kind_of(action) in PASSES]
        for rank, row in enumerate(whole)
    }
    place_of = table.stage_index_to_group_rank.__getitem__
    alone = schedules._add_send_recv(passes, place_of, ranks * each)
    return [whole, [alone[rank] for rank in range(ranks)]]


def kind_of(action: Any) -> str:
    kind: str = action.computation_type.value
    return kind


def asked_in(row: list[Any]) -> dict[tuple[int, bool, int], int]:
    """Return how many passes of a rank stand before each of its receives."""
    asked: dict[tuple[int, bool, int], int] = {}
    begun = 0
    for action in row:
        for each in action.sub_actions or (action,):
            kind = kind_of(each)
            if kind in PASSES:
                begun += 1
            elif kind in ("RECV_F", "RECV_B"):
                asked[each.stage_index, kind == "RECV_F", each.microbatch_index] = begun
    return asked


@pytest.mark.parametrize("case", CASES, ids=str)
def test_receives_are_asked_for_as_in_torch(case: tuple[str, int, int, int]) -> None:
    """In torch's table of passes, a receive stands behind as many of them, or one more of two that
    overlap; in its own, a few turns for parameters apart: three, where a rank also waits for
    gradients that it reduces (2.15).
    """
    order, messages = schedule_order(*case), messages_of(*case)
    whole, alone = torch_tables(*case)
    waits = any(kind_of(action) == "WAIT_REDUCE_GRAD" for row in whole for action in row)
    overlaps = any(action.sub_actions for row in alone for action in row)
    for rank, (row, bare) in enumerate(zip(whole, alone, strict=True)):
        asked, exactly = asked_in(row), asked_in(bare)
        assert asked.keys() == exactly.keys()
        assert asked
        for place, (work, message) in enumerate(zip(order[rank], messages[rank], strict=True)):
            key = work.stage, work.kind == FORWARD, work.microbatch
            if work.kind == WEIGHTS or key not in asked:
                assert message.asked == place
            else:
                assert abs(message.asked - exactly[key]) <= overlaps, (rank, work)
                assert abs(message.asked - asked[key]) <= 2 + waits, (rank, work)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_let_go_of_has_arrived(case: tuple[str, int, int, int]) -> None:
    """Worked off with every rank as far behind as what it needs lets it be, a rank that begins the
    pass before which it lets go of something knows that the pass that needs it has begun.
    """
    order, messages = schedule_order(*case), messages_of(*case)
    where = {
        (work.stage, work.kind == FORWARD, work.microbatch): (rank, place)
        for rank, passes in enumerate(order)
        for place, work in enumerate(passes)
        if work.kind != WEIGHTS
    }

    def needed(rank: int, place: int) -> list[int]:
        """Return how many passes of each rank are done, at least, when one begins."""
        done = [0] * len(order)
        todo = [(rank, place)]
        while todo:
            of, upto = todo.pop()
            first, done[of] = done[of], max(done[of], upto)
            for work in order[of][first : upto + 1]:
                forward = work.kind == FORWARD
                source = where.get((work.stage + (-1 if forward else 1), forward, work.microbatch))
                if work.kind != WEIGHTS and source is not None and done[source[0]] <= source[1]:
                    todo.append((source[0], source[1] + 1))
        return done

    known = 0
    for rank, passes in enumerate(order):
        for work, message in zip(passes, messages[rank], strict=True):
            forward = work.kind == FORWARD
            target = where.get((work.stage + (1 if forward else -1), forward, work.microbatch))
            if work.kind == WEIGHTS or target is None or message.held == len(passes):
                continue
            other, at = target
            done = needed(rank, message.held)
            assert done[other] > at or other == rank, (rank, work)
            known += other != rank
    assert known or SCHEDULES[case[0]].folded
