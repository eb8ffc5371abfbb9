"""The device mesh: named axes and their sizes, without devices."""

from __future__ import annotations

from dataclasses import dataclass

from autoparallel.errors import PlanError

__all__ = ["MICROBATCH", "PIPELINE", "Mesh", "arrangements", "finer"]

# The axis of a mesh whose ranks are stages: it splits the model's ops, and no tensor's dims.
PIPELINE = "pp"
# The axis in time of a pipeline's plan: its places are the micro-batches of one step, which the
# same ranks compute one after the other. What it splits is split over them, as over ranks; but no
# collective can cross it, as a later micro-batch has not begun when an earlier one ends.
MICROBATCH = "microbatch"


_LONGEST_NAME = 64


@dataclass(frozen=True, slots=True, init=False)
class Mesh:
    """A device mesh without devices: named axes and their sizes, outermost first.

    axes: ((name, size), ...), given as keywords. A size of 1 is valid and changes nothing. Ranks
    are numbered row by row, as in torch's DeviceMesh: neighbours on the last axis are neighbours in
    rank.

    Raises PlanError for a size below 1, for a name that is no identifier in ASCII (an emitted
    program has a variable of that name), and where there is no axis.

    >>> mesh = Mesh(dp=2, tp=4)
    >>> print(mesh, mesh.world_size)
    Mesh(dp=2, tp=4) 8
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, /, **axes: int) -> None:
        if not axes:
            raise PlanError(
                "a mesh without axes",
                why="every placement is said of a mesh axis",
                fix="name one: Mesh(tp=1) is a single rank, Mesh(tp=8) eight",
            )
        for name, size in axes.items():
            # Letters of other alphabets look like these, and Python takes some for one another.
            if not (name.isidentifier() and name.isascii()) or len(name) > _LONGEST_NAME:
                raise PlanError(
                    f"mesh axis {name!r:.80} has no name of ASCII letters, digits and _",
                    why="constraints and the program of a rank call it by its name",
                    fix="give one like dp or tp",
                )
            # bool is a subclass of int, and Mesh(tp=True) is surely a mistake.
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise PlanError(
                    f"mesh axis {name!r} has size {size!r}",
                    why="an axis is that many ranks",
                    fix="give a positive whole number",
                )
        # The class is frozen, so that plain assignment is refused even here.
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
    """Return the meshes of at most two axes whose inner axis fills
    whole nodes or an even part of one.

    world_size: number of ranks in all. devices_per_node: devices that share the fast links. The
    narrowest inner axis comes first. The inner axis is the one that talks most (tensor
    parallelism), so it must not straddle two nodes unless it fills them.

    >>> [str(mesh) for mesh in arrangements(8, devices_per_node=4)]
    ['Mesh(dp=8)', 'Mesh(dp=4, tp=2)', 'Mesh(dp=2, tp=4)']
    """
    if world_size == 1:
        return (Mesh(tp=1),)
    meshes = [Mesh(dp=world_size)]
    for size in range(2, world_size):
        outer, rest = divmod(world_size, size)
        fits = devices_per_node % size == 0 or size % devices_per_node == 0
        if not rest and fits:
            meshes.append(Mesh(dp=outer, tp=size))
    return tuple(meshes)


def finer(mesh: Mesh, devices_per_node: int) -> Mesh | None:
    """Return a mesh of three axes that divides one of two further; None where there is none.

    The outer axis is divided where nodes end, if it crosses them; else the inner one in two.

    >>> print(finer(Mesh(dp=16, tp=2), devices_per_node=8), finer(Mesh(dp=8, tp=8), 8))
    Mesh(dp=4, sp=4, tp=2) Mesh(dp=8, sp=2, tp=4)
    >>> finer(Mesh(dp=64), 8)
    """
    if len(mesh.axes) != 2:
        return None
    (outer, count), (inner, size) = mesh.axes
    inside, rest = divmod(devices_per_node, size)
    if inside > 1 and not rest and count % inside == 0 and count > inside:
        return Mesh(**{outer: count // inside, "sp": inside, inner: size})
    if size % 2 == 0 and size > 2:
        return Mesh(**{outer: count, "sp": 2, inner: size // 2})
    return None
