"""The processes of the contenders: one alone, and a pair, for each build of the project."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["Processes"]

FOLDER = Path(__file__).parents[1]


def _rank(rank: int) -> dict[str, str]:
    """Return the variables by which a launcher tells a process which rank it is."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


class Processes:
    """One or more processes that are given the same orders, as the ranks of one group.

    build: the folder from which they import the project. ranks: how many there are; one has no
    group. errors: a file for what they say. alone: only the first rank runs, and collectives
    return at once; what is measured is all that a rank does besides.
    """

    def __init__(self, build: Path, ranks: int, errors: Any, alone: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # This folder comes first: the benchmark is this one, whatever build is measured.
        paths = [FOLDER, build, *filter(None, [os.environ.get("PYTHONPATH")])]
        shared = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
        }
        shared.pop("RANK", None)
        if alone and ranks > 1:
            shared["ALONE"], ranks = "1", 1
        self.all = [
            subprocess.Popen(
                [sys.executable, "-P", str(FOLDER / "contenders" / "worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**shared, **(_rank(rank) if ranks > 1 else {})},
            )
            for rank in range(ranks)
        ]

    def do(self, order: str, **arguments: Any) -> list[dict[str, Any]]:
        """Give an order to all, and return their answers, by rank.

        Raises RuntimeError where one has ended.
        """
        line = json.dumps({"do": order, **arguments}) + "\n"
        for process in self.all:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        answers = []
        for rank, process in enumerate(self.all):
            assert process.stdout is not None
            text = process.stdout.readline()
            if not text:
                raise RuntimeError(f"rank {rank} has ended in {order} {arguments}")
            answers.append(json.loads(text))
        return answers

    def end(self) -> None:
        """End all of them."""
        for process in self.all:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.all:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
