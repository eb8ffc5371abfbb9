"""Print the lower bounds of the dependencies in pyproject.toml, one a line, as pip takes them.

python .ci/lowest.py. Torch is left out: its releases are tried by `make versions`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest() -> list[str]:
    """Return "name==version" of each dependency that has a lower bound."""
    wanted = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    found = [re.match(r"([\w.-]+)>=([\d.]+)", text) for text in wanted]
    return [f"{match[1]}=={match[2]}" for match in found if match and match[1] != "torch"]


if __name__ == "__main__":
    sys.stdout.write("\n".join(lowest()) + "\n")
