"""All threads of a graph, by number, by name, and by the dims that they lie in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from autoparallel.graph.graph import Graph
from autoparallel.threads.thread import Passage, Thread
from autoparallel.threads.threads_text import threads_text

__all__ = ["Threads"]


@dataclass(frozen=True)
class Threads:
    """The Threads of a graph.

    graph: of which they are. threads: in the order in which the program meets them. dims: for each
    value, per dim, the numbers of its threads, outermost first; a dim of size 1 has none. passages:
    what every call does with its loops, by the call's name.

    >>> import torch, autoparallel
    >>> layer, inputs = torch.nn.Linear(8, 6, bias=False), torch.zeros(4, 8)
    >>> threads = autoparallel.make_plan(layer, 2, example_inputs=inputs).threads()
    >>> [thread.name for thread in threads.threads]
    ['features', 'features', 'batch']
    """

    graph: Graph
    threads: tuple[Thread, ...]
    dims: Mapping[str, tuple[tuple[int, ...], ...]]
    passages: Mapping[str, tuple[Passage, ...]] = field(default_factory=dict)

    def of(self, value: str) -> tuple[tuple[Thread, ...], ...]:
        """Return the threads of each dim of a value, outermost first."""
        return tuple(tuple(self.threads[number] for number in dim) for dim in self.dims[value])

    def named(self, name: str) -> tuple[Thread, ...]:
        """Return the threads of that name, in order; repeated blocks have one each of some."""
        return tuple(thread for thread in self.threads if thread.name == name)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names that occur, each once, in the order of the program."""
        return tuple(dict.fromkeys(thread.name for thread in self.threads))

    def shape(self, value: str) -> str:
        """Return a value's shape in names: "[batch, sequence, heads * head size]"."""
        words = (
            " * ".join(thread.name for thread in dim) or str(size)
            for dim, size in zip(self.of(value), self.graph.values[value].shape, strict=True)
        )
        return f"[{', '.join(words)}]"

    def __str__(self) -> str:
        """Return a table of the threads, equal ones of repeated blocks in one row."""
        return threads_text(self.threads)
