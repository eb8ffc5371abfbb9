"""Errors that say what happened, where in the user's model, why, and how to fix it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = [
    "AliasError",
    "AutoParallelError",
    "CaptureError",
    "CheckpointError",
    "CoupledBatchError",
    "InputMismatchError",
    "InputsNeededError",
    "MemoryLimitError",
    "PlanError",
    "RuleError",
    "UnsupportedOpError",
    "WorldSizeError",
    "WrappedModelError",
]


class AutoParallelError(Exception):
    """The base of every error that the library raises on purpose: it says what, where,
    why and how to fix it.

    what: one sentence that says what happened. where: the module's path and the source line in the
    user's model. why: the cause. fix: what the user may type instead. All but `what` may be empty.

    >>> print(AutoParallelError("the mesh has no axes", fix="write Mesh(tp=8)"))
    the mesh has no axes
      fix:   write Mesh(tp=8)
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        """The message is the four texts, a line each; those that are empty are left out."""
        self.what, self.where, self.why, self.fix = what, where, why, fix
        lines = [what]
        for label, text in (("where", where), ("why", why), ("fix", fix)):
            if text:
                lines.append(f"  {label + ':':<6} " + text.replace("\n", "\n         "))
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        """Errors are pickled by their four texts, because launchers send them between processes."""
        return (_rebuild, (type(self), self.what, self.where, self.why, self.fix))


def _rebuild(
    kind: type[AutoParallelError], what: str, where: str, why: str, fix: str
) -> AutoParallelError:
    """Return the error that was pickled.

    Exception's own way would pass the joined message alone.
    """
    return kind(what, where=where, why=why, fix=fix)


class InputsNeededError(AutoParallelError):
    """No example inputs were given, and none could be derived from the model:
    it cannot be traced without.
    """


class CaptureError(AutoParallelError):
    """The model's forward could not be turned into a graph, or does what a graph cannot say."""


class AliasError(CaptureError):
    """The model keeps a view of its own parameter or buffer, which would not follow it."""


class UnsupportedOpError(AutoParallelError):
    """Ops without a sharding rule are in the graph; the message lists all of them at once."""


class RuleError(AutoParallelError):
    """A registered sharding rule that is not right, or cannot be proven right."""


class WorldSizeError(AutoParallelError):
    """The world size that was asked for is not that of the process group that runs."""


class WrappedModelError(AutoParallelError):
    """The model is already wrapped by another parallel engine (DDP, FSDP),
    which moves its tensors.
    """


class PlanError(AutoParallelError):
    """A plan, or what was asked of one, does not fit the model, the mesh or the options."""


class CoupledBatchError(PlanError):
    """An op needs all of a batch at once, of which it would be given one micro-batch at a time."""


class InputMismatchError(AutoParallelError):
    """Inputs that the model does not take, or that are not the same on all ranks."""


class CheckpointError(AutoParallelError):
    """The files of a checkpoint are missing, cut short or changed, or could not be written."""


class MemoryLimitError(PlanError):
    """No plan fits into the memory that a rank may use.

    least: the bytes that the plan found that needs least takes; infinity where none was found.
    advised: returns the error with the number of ranks that would do, which takes a while to find.
    """

    # Set by who raises it, so that a caller may ask again with a limit that can be met.
    least: float = float("inf")
    advised: Callable[[], MemoryLimitError] | None = None
