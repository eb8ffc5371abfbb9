"""Random programs as text: declarations of tensors, lines of plain torch, and the result.

    x = input(3, 4)
    w = parameter(5, 4)
    a = F.linear(x, w)
    return a.tanh()

The text is the whole program: it is what a failure prints, and what a regression keeps.
"""

from __future__ import annotations

import functools
import linecache
import math
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

__all__ = ["BLOCKS", "DECLARATIONS", "Program", "content"]

# input: takes a gradient; given: does not. integers: below the last number. truths: of both kinds.
# parameter: trained; frozen: not. blocks: equal ones in a list; how many, and their widths.
INPUTS = ("input", "given", "integers", "truths")
BLOCKS = ("blocks_lists", "blocks_dicts", "blocks_sequences", "blocks_classes")
DECLARATIONS = (*INPUTS, "parameter", "frozen", "buffer", *BLOCKS)
_DECLARATION = re.compile(rf"(\w+) = ({'|'.join(DECLARATIONS)})\(([\d, ]*)\)")


def content(name: str, kind: str, sizes: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor of a declaration: the same for a name, no two numbers alike, no zeros."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {sizes}".encode()))
    if kind == "integers":
        return torch.randint(0, sizes[-1], sizes[:-1], generator=generator)
    if kind == "truths":
        return torch.rand(sizes, generator=generator) < 0.6
    numbers = torch.rand(sizes, generator=generator, dtype=torch.float64) * 0.8 + 0.2
    signs = torch.randint(0, 2, sizes, generator=generator) * 2 - 1
    return numbers * signs


@dataclass(frozen=True, repr=False)
class Program:
    """A Program is a model and its inputs. text: as shown above."""

    text: str

    @cached_property
    def rows(self) -> list[str]:
        return [line.strip() for line in self.text.strip().splitlines() if line.strip()]

    @cached_property
    def declared(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The kind and the sizes of every tensor that is there before the program runs, by name."""
        found = {}
        for row in self.rows:
            match = _DECLARATION.fullmatch(row)
            if match:
                name, kind, sizes = match.groups()
                found[name] = (kind, tuple(int(size) for size in sizes.split(",") if size.strip()))
        return found

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for name, (kind, _) in self.declared.items() if kind in INPUTS)

    def source(self) -> str:
        """The class of the model."""
        lines = ["class Model(torch.nn.Module):"]
        lines.append(f"    def forward({', '.join(('self', *self.inputs))}):")
        for name in self.declared:
            if name not in self.inputs:
                lines.append(f"        {name} = self.{name}")
        lines += [f"        {row}" for row in self.rows if not _DECLARATION.fullmatch(row)]
        return "\n".join(lines) + "\n"

    def model(self) -> nn.Module:
        """Return a fresh model with all its tensors."""
        source = self.source()
        file = f"<program {zlib.crc32(source.encode()):08x}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        from fuzz_containers import container

        names: dict[str, Any] = {"torch": torch, "F": nn.functional}
        names |= {"math": math, "functools": functools}
        exec(compile(source, file, "exec"), names)
        model: nn.Module = names["Model"]()
        for name, (kind, sizes) in self.declared.items():
            if kind in ("parameter", "frozen"):
                own = nn.Parameter(content(name, kind, sizes), kind == "parameter")
                setattr(model, name, own)
            elif kind == "buffer":
                model.register_buffer(name, content(name, kind, sizes))
            elif kind in BLOCKS:
                setattr(model, name, container(name, kind, sizes))
        return model

    def arguments(self, other: dict[tuple[str, int], int] | None = None) -> list[torch.Tensor]:
        """Return fresh inputs. other: sizes, by input and dim, in place of the declared ones."""
        made = []
        for name in self.inputs:
            kind, sizes = self.declared[name]
            own = tuple((other or {}).get((name, dim), size) for dim, size in enumerate(sizes))
            tensor = content(name, kind, own)
            made.append(tensor.requires_grad_(kind == "input"))
        return made

    def __str__(self) -> str:
        return "\n".join(self.rows)

    def __repr__(self) -> str:
        return f'Program("""\n{self}\n""")'
