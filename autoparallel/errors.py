"""Errors that say what happened, where in the user's model, why, and how to fix it."""

from __future__ import annotations

__all__ = [
    "AliasError",
    "AutoParallelError",
    "CaptureError",
    "InputMismatchError",
    "InputsNeededError",
    "MemoryLimitError",
    "PlanError",
    "UnsupportedOpError",
    "WorldSizeError",
    "WrappedModelError",
]


class AutoParallelError(Exception):
    """what: one sentence. where: module path and source line. why: the cause. fix: what to type."""

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        lines = [what]
        for label, text in (("where", where), ("why", why), ("fix", fix)):
            if text:
                lines.append(f"  {label + ':':<6} " + text.replace("\n", "\n         "))
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.why, self.fix))


def _rebuild(
    kind: type[AutoParallelError], what: str, where: str, why: str, fix: str
) -> AutoParallelError:
    return kind(what, where=where, why=why, fix=fix)


class InputsNeededError(AutoParallelError):
    """No example inputs were given and none could be found."""


class CaptureError(AutoParallelError):
    """The model's forward could not be turned into a graph."""


class AliasError(CaptureError):
    """The model keeps a view of its own parameter or buffer, which would not follow it."""


class UnsupportedOpError(AutoParallelError):
    """Ops without a sharding rule; all offenders at once."""


class WorldSizeError(AutoParallelError):
    """The world size asked for is not the one that runs."""


class WrappedModelError(AutoParallelError):
    """The model is already wrapped by another parallel engine."""


class PlanError(AutoParallelError):
    """A plan that does not fit the model, the mesh or the options."""


class InputMismatchError(AutoParallelError):
    """Ranks were given different inputs where the plan says that they are equal."""


class MemoryLimitError(PlanError):
    """No plan fits into the memory that a rank may use. least: bytes that one takes at least."""

    least: float = float("inf")
