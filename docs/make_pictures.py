"""Makes the pictures of the documentation again: `python docs/make_pictures.py`."""

from __future__ import annotations

from pathlib import Path

import autoparallel
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.dot import write_svg

HERE = Path(__file__).parent


def main() -> None:
    """gpt_block.svg: one block of a GPT-2 medium on two ranks, without sequence parallelism."""
    model = GPT(GPTConfig(layers=2, hidden=1024, heads=16, dropout=0.0))
    plan = autoparallel.make_plan(model, 2, sequence_parallel=False, hardware="dgx-2h")
    write_svg(plan, HERE / "gpt_block.svg", within="blocks.1")


if __name__ == "__main__":
    main()
