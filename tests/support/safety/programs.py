"""Rows of random programs, split by random costs; `make fuzz` draws them smaller and smaller."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from functools import partial

from fuzz_containers import contained
from fuzz_draw import divided, written
from fuzz_split import Coverage, Subject, UnfitError

from .registry import note, row

SHARE = 20


def _programs(
    draw: random.Random, count: int, on: tuple[int, ...], sparing: bool, blocks: bool
) -> Counter[str]:
    counts: Counter[str] = Counter()

    def tried() -> str:
        program = written(draw.randint, *([contained] if blocks else []))
        way = divided(draw.randint, on, sparing)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Subject(program).check(way, Coverage())
        except UnfitError:
            return "refused"
        except AssertionError as error:
            return f"wrong: {str(error).splitlines()[0]}, {program!r}, {way}"
        return "right"

    for _ in range(count):
        note(counts, partial(tried))
    return counts


@row("a random program, split by random costs on one or more axes", share=SHARE, least=3)
def programs(draw: random.Random, count: int) -> Counter[str]:
    return _programs(draw, count, (), False, False)


@row("a random program, its copies dropped and made again", share=SHARE, least=3)
def sparing(draw: random.Random, count: int) -> Counter[str]:
    return _programs(draw, count, (), True, False)


@row("a random program on three axes", share=SHARE, least=3)
def three_axes(draw: random.Random, count: int) -> Counter[str]:
    return _programs(draw, count, (2, 2, 2), False, False)


@row("a random program with equal blocks in containers", share=SHARE, least=3)
def equal_blocks(draw: random.Random, count: int) -> Counter[str]:
    return _programs(draw, count, (), False, True)
