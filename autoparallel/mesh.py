"""The device mesh: named axes and their sizes, without devices."""

from __future__ import annotations

from dataclasses import dataclass

from autoparallel.errors import PlanError

__all__ = ["Mesh", "arrangements"]


@dataclass(frozen=True, slots=True, init=False)
class Mesh:
    """Named axes of devices, outermost first: `Mesh(tp=8)`.

    axes: ((name, size), ...). A size of 1 is valid and changes nothing.
    Raises PlanError for a size below 1, for a name that is none (programs say it), and for no axis.
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, /, **axes: int) -> None:
        if not axes:
            raise PlanError(
                "a mesh without axes", fix="name one: Mesh(tp=1) is a single rank, Mesh(tp=8) eight"
            )
        for name, size in axes.items():
            if not name.isidentifier():
                raise PlanError(
                    f"mesh axis {name!r} has no name of letters, digits and _",
                    why="constraints and the program of a rank call it by its name",
                    fix="give one like dp or tp",
                )
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise PlanError(
                    f"mesh axis {name!r} has size {size!r}", fix="give a positive whole number"
                )
        object.__setattr__(self, "axes", tuple(axes.items()))

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of the axes' sizes."""
        result = 1
        for _, size in self.axes:
            result *= size
        return result

    def __str__(self) -> str:
        return "Mesh(" + ", ".join(f"{name}={size}" for name, size in self.axes) + ")"


def arrangements(world_size: int, devices_per_node: int) -> tuple[Mesh, ...]:
    """The meshes of at most two axes whose inner axis fills whole nodes or even parts of one.

    The narrowest inner axis comes first: `Mesh(dp=16)`, `Mesh(dp=8, tp=2)`, ... A rank per place,
    so that an inner axis never straddles two nodes.
    """
    if world_size == 1:
        return (Mesh(tp=1),)
    found = [Mesh(dp=world_size)]
    for size in range(2, world_size):
        outer, rest = divmod(world_size, size)
        fits = devices_per_node % size == 0 or size % devices_per_node == 0
        if not rest and fits:
            found.append(Mesh(dp=outer, tp=size))
    return tuple(found)
