"""Sends of a rank of a pipeline, whose memory is held until they are known to have arrived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from autoparallel.runtime.message_orders import Messages
from autoparallel.runtime.schedule_orders import FORWARD, WEIGHTS, Pass

__all__ = ["Sends"]


class Sends:
    """The sends of a rank in a step, each with the memory of what is sent.

    Torch holds all of them until the step ends, where it goes by a table. passes: of the rank, in
    order. messages: as of `messages_of`, of the rank.
    """

    def __init__(self, passes: Sequence[Pass], messages: Sequence[Messages]) -> None:
        self.under_way: dict[tuple[int, bool, int], list[Any]] = {}
        # By a pass that receives: the sends that are known to have arrived then.
        self.arrived: dict[tuple[int, bool, int], list[tuple[int, bool, int]]] = {}
        keys = [(work.stage, work.kind == FORWARD, work.microbatch) for work in passes]
        for key, work, message in zip(keys, passes, messages, strict=True):
            if work.kind != WEIGHTS and 0 <= message.held < len(keys):
                self.arrived.setdefault(keys[message.held], []).append(key)

    def send(self, stage: int, forward: bool, microbatch: int, ops: Sequence[dist.P2POp]) -> None:
        """Begin to send what a pass has made. ops: as torch's stage returns them."""
        self.under_way[stage, forward, microbatch] = [
            dist.isend(each.tensor, each.peer, each.group, each.tag) for each in ops
        ]

    def received(self, stage: int, forward: bool, microbatch: int) -> None:
        """Let go of what is known to have arrived, as what a pass needs is received."""
        for key in self.arrived.get((stage, forward, microbatch), ()):
            for work in self.under_way.pop(key, ()):
                work.wait()

    def finish(self) -> None:
        """Wait until everything has arrived."""
        while self.under_way:
            for work in self.under_way.popitem()[1]:
                work.wait()
