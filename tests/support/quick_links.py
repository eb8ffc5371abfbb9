"""A machine like the preset "cpu" whose collectives start in a fifth of the time.

The start of a collective weighs on it beside the bytes of a small model as it does elsewhere beside
those of a large one, so that a small model is split as a large one is.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["QUICK_LINKS"]

QUICK_LINKS = str(Path(__file__).with_name("quick_links.json"))
