"""Names of a model's dims, as demands have them: "heads", "vocab", "batch:dp, heads:tp".

They are those of the model's threads (`threads/`), which follow from what ops do with a dim, and a
few more words for them, which papers and libraries have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from autoparallel.errors import PlanError
from autoparallel.threads import Thread, Threads

__all__ = ["OTHER_NAMES", "layout_sentences", "threads_named"]

# Words for a name that a thread has; spaces, "_" and "-" do not count, nor do capitals.
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "heads": ("heads", "key-value heads", "heads per key-value head"),
    "vocab": ("vocabulary",),
    "hidden_ff": ("feed-forward",),
    "ff": ("feed-forward",),
    "ffn": ("feed-forward",),
    "d_ff": ("feed-forward",),
    "intermediate": ("feed-forward",),
    "d_model": ("hidden",),
    "model": ("hidden",),
    "seq": ("sequence",),
    "length": ("sequence",),
    "d_head": ("head size",),
    "head_dim": ("head size",),
}


def _plain(name: str) -> str:
    """Return a name without what does not count."""
    return re.sub(r"[\s_-]", "", name).lower()


_OTHERS = {_plain(word): names for word, names in OTHER_NAMES.items()}


def threads_named(name: str, threads: Threads) -> tuple[Thread, ...]:
    """Return the threads that a word stands for; none where it is no name of this model's.

    Example: `threads_named("vocab", autoparallel.trace_threads(model))`
    """
    plain = _plain(name)
    wanted = {plain, *map(_plain, _OTHERS.get(plain, ()))}
    return tuple(thread for thread in threads.threads if _plain(thread.name) in wanted)


def layout_sentences(layout: str) -> tuple[str, ...]:
    """Return the constraints that a layout in Mesh-TensorFlow's words stands for, one per axis.

    Raises PlanError for a text that is no layout.

    >>> layout_sentences("batch:dp, heads:tp, vocab:tp")
    ('only batch on dp', 'only heads, vocab on tp')
    """
    names: dict[str, list[str]] = {}
    for rule in re.split(r"\s*[,;]\s*", layout.strip()):
        match = re.fullmatch(r"(\S.*?)\s*:\s*(\w+)", rule)
        if match is None:
            raise PlanError(
                f"layout {layout!r}: {rule!r} is no rule",
                why="a rule is the name of a dim, and of the mesh axis that splits it",
                fix='write "batch:dp, heads:tp"; `autoparallel dims` prints the names',
            )
        names.setdefault(match[2], []).append(match[1])
    return tuple(f"only {', '.join(dims)} on {axis}" for axis, dims in names.items())
