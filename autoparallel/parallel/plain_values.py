"""Values that are no tensors, such as the number of a step, as bytes in which no code can be.

A pickle runs what it says as it is read, and a checkpoint may come from anywhere. So numbers,
texts, lists, tables and the tensors in them are written as JSON, with the tensors' bytes behind it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autoparallel.errors import AutoParallelError
from autoparallel.support.json_text import NUMBERS_BELOW, read_json

__all__ = ["packed", "unpacked"]

# So many bytes at the beginning say how long the JSON is.
_HEAD = 8
_DEEPEST = 24


def packed(value: Any, what: str) -> torch.Tensor:
    """Return a value as bytes, which `unpacked` reads.

    value: None, a truth value, a number, a text, a tensor, or lists, tuples and dicts of these.
    what: its name in errors. Raises AutoParallelError for anything else.

    >>> unpacked(packed({"step": 3, "betas": (0.9, float("inf"))}, "extra"))
    {'step': 3, 'betas': (0.9, inf)}
    """
    tensors: list[torch.Tensor] = []
    text = json.dumps(_written(value, what, tensors, _DEEPEST)).encode()
    head = torch.frombuffer(bytearray(len(text).to_bytes(_HEAD, "big") + text), dtype=torch.uint8)
    return torch.cat([head, *(_bytes_of(tensor) for tensor in tensors)])


def unpacked(content: torch.Tensor) -> Any:
    """Return the value that `packed` has written.

    content: bytes. Raises ValueError for any other bytes.
    """
    length = int.from_bytes(bytes(content[:_HEAD].tolist()), "big")
    if content.numel() < _HEAD or length > content.numel() - _HEAD:
        raise ValueError("these bytes are no values of a checkpoint")
    text = bytes(content[_HEAD : _HEAD + length].numpy()).decode()
    return _read(read_json(text), content[_HEAD + length :], [0])


def _written(value: Any, what: str, tensors: list[torch.Tensor], depth: int) -> Any:
    """Return a value as JSON has it; what JSON has not is a table with the name of its kind."""
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int and abs(value) < NUMBERS_BELOW:
        return value
    if type(value) is int:
        return {"int": hex(value)}
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
        plain = value.detach().resolve_conj().resolve_neg()
        if plain.layout == torch.strided and not plain.is_quantized and not plain.is_meta:
            tensors.append(plain)
            return {"tensor": [str(plain.dtype).removeprefix("torch."), list(plain.shape)]}
    if depth and type(value) in (list, tuple):
        items = [
            _written(item, f"{what}[{place}]", tensors, depth - 1)
            for place, item in enumerate(value)
        ]
        return items if isinstance(value, list) else {"tuple": items}
    if depth and isinstance(value, Mapping):
        return {
            "table": [
                [
                    _written(key, f"a key of {what}", tensors, 1),
                    _written(item, f"{what}[{key!r:.40}]", tensors, depth - 1),
                ]
                for key, item in value.items()
            ]
        }
    raise AutoParallelError(
        f"{what} is a {type(value).__name__}, which a checkpoint does not hold",
        why="it has numbers, texts, tensors, and lists and dicts of them: to read anything else, "
        "code that is in the file would run",
        fix="save what it consists of, as value.state_dict() gives it, or write it to a file of "
        "your own",
    )


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor's elements, in their order."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def _read(item: Any, content: torch.Tensor, at: list[int]) -> Any:
    """Return the value that `_written` has made an item of. at: where the next tensor's bytes are.

    Raises ValueError for an item that it has not made.
    """
    if isinstance(item, list):
        return [_read(part, content, at) for part in item]
    if not isinstance(item, dict):
        return item
    if len(item) != 1:
        raise ValueError(f"{item!r:.60} is no value of a checkpoint")
    ((kind, inner),) = item.items()
    match kind, inner:
        case "int", str():
            return int(inner, 16)
        case "float", str():
            return float(inner)
        case "tuple", list():
            return tuple(_read(part, content, at) for part in inner)
        case "table", list():
            return {_read(k, content, at): _read(part, content, at) for k, part in inner}
        case "tensor", [str() as name, list() as shape]:
            dtype: Any = getattr(torch, name, None)
            if not isinstance(dtype, torch.dtype) or any(
                type(size) is not int or size < 0 for size in shape
            ):
                raise ValueError(f"{inner!r:.60} is no tensor")
            nbytes = math.prod(shape) * dtype.itemsize
            if at[0] + nbytes > content.numel():
                raise ValueError("the bytes of a tensor are missing")
            part = content[at[0] : at[0] + nbytes].clone()
            at[0] += nbytes
            return part.view(dtype).reshape(shape)
    raise ValueError(f"{item!r:.60} is no value of a checkpoint")
