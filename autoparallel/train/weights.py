"""Weights in safetensors under the model's original names, read and written tensor by tensor.

No rank ever holds the whole model: each tensor is cut, or put together, by itself. Files of more
than one shard have Hugging Face's index, and are loaded by it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autoparallel.errors import CheckpointError
from autoparallel.parallel.checkpoint_files import is_first_rank, together
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.whole_values import whole_value
from autoparallel.support.json_text import read_other_json
from autoparallel.train.config import TrainingError

__all__ = ["export_weights", "import_weights"]

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


def import_weights(
    module: nn.Module, folder: Path, *, fine_tuned: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fill a split module from safetensors. A collective call; every rank reads the files.

    folder: with model.safetensors, or several files with an index, as Hugging Face writes them.
    What is tied may be in the files under any of its names. fine_tuned: the model may have other
    heads than the one that was trained. Return the names that the files lack, which stay as they
    are, and those that the model lacks, which are left out: none without fine_tuned. Raises
    TrainingError, before anything is filled, that names the tensors that are missing, strange, or
    of another shape; with fine_tuned where no tensor is in both.

    Example: `import_weights(model, Path("out/weights"))`
    """
    files = together("reading the weights", lambda: _files_of(folder))
    aliases = _aliases(module)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    wrong, seen = [], set()
    strange = tuple(name for name in files if name not in expected)
    for name, file in files.items():
        if name in strange:
            continue
        with safetensors.safe_open(file, framework="pt") as content:
            shape = tuple(content.get_slice(name).get_shape())
        if shape != expected[name]:
            wrong.append(f"{name} is {shape}, in the model {expected[name]}")
        seen |= {name, *aliases.get(name, ())}
    missing = tuple(name for name in expected if name not in seen)
    if not fine_tuned or not seen:
        wrong += [f"{name} is not the model's" for name in strange]
        wrong += [f"{name} is missing" for name in missing]
    if wrong:
        raise TrainingError(
            f"the weights in {folder} are of another model",
            why="; ".join(wrong[:8]) + (f"; {len(wrong) - 8} more" if len(wrong) > 8 else ""),
            fix="give weights of the model that model.kind names, in its sizes",
        )
    for name, file in files.items():
        if name not in strange:
            with safetensors.safe_open(file, framework="pt") as content:
                module.load_state_dict({name: content.get_tensor(name)}, strict=False)
    return missing, strange


def export_weights(module: nn.Module, folder: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a module's weights as safetensors, on rank 0. A collective call.

    module: split or plain; of what is tied the first name is written. texts: further files, such as
    tokenizer.json, by name. A model of transformers is written by its own save_pretrained, so that
    from_pretrained loads the folder. Raises CheckpointError, on all ranks, where it cannot be.

    Example: `export_weights(model, Path("out/weights"), {"tokenizer.json": text})`
    """
    together("preparing the folder", lambda: folder.mkdir(parents=True, exist_ok=True))
    own: Any = getattr(module, "save_pretrained", None)
    if callable(own):
        own(folder)
    else:
        _write_shards(module, folder)

    def write_texts() -> None:
        for name, text in (texts or {}).items() if is_first_rank() else ():
            (folder / name).write_text(text)

    together("writing beside the weights", write_texts)


def _write_shards(module: nn.Module, folder: Path) -> None:
    """Gather one tensor after the other, and write those that fill a file."""
    shards: list[dict[str, str]] = []
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        def save() -> None:
            if is_first_rank():
                file = folder / f"part-{len(shards) + 1:05}.safetensors"
                safetensors.torch.save_file(waiting, file, metadata={"format": "pt"})

        together("writing the weights", save)
        shards.append(dict.fromkeys(waiting, ""))
        waiting.clear()

    size = 0
    for name, value in _owned(module):
        whole = _whole(module, name, value)
        nbytes = whole.numel() * whole.element_size()
        if waiting and size + nbytes > SHARD_BYTES:
            write()
            size = 0
        # The other ranks only remember its name.
        kept = whole.detach().to("cpu").contiguous().clone() if is_first_rank() else whole[:0]
        waiting[name], size = kept, size + nbytes
    write()
    together("naming the weights", lambda: _name(folder, shards) if is_first_rank() else None)


def _whole(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return the whole of a tensor, whichever ranks have it. A collective call."""
    if "_autoparallel" in vars(module) and isinstance(value, nn.Parameter):
        return whole_value(state_of(module), name, value)
    return value.full_tensor() if isinstance(value, DTensor) else value


def _name(folder: Path, shards: list[dict[str, str]]) -> None:
    """Give the files of the weights the names by which they are looked for."""
    count, index = len(shards), {}
    for number, names in enumerate(shards, 1):
        name = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        (folder / f"part-{number:05}.safetensors").rename(folder / name)
        index.update(dict.fromkeys(names, name))
    if count > 1:
        rows = {"metadata": {}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(rows, indent=1))


def _owned(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state dict, each that is tied once."""
    kept = module.state_dict()
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if name in kept:
            yield name, value


def _aliases(module: nn.Module) -> dict[str, set[str]]:
    """Return all names of each tensor that has several, by each of them."""
    by_id: dict[int, set[str]] = {}
    for name, value in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        by_id.setdefault(id(value), set()).add(name)
    return {name: names for names in by_id.values() for name in names if len(names) > 1}


def _files_of(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor. Raises CheckpointError where there are no weights."""
    try:
        if (folder / INDEX).exists():
            rows = read_other_json((folder / INDEX).read_text())["weight_map"]
            # A name with a folder in it would lead out of this one.
            return {name: folder / Path(file).name for name, file in rows.items()}
        file = folder if folder.is_file() else folder / "model.safetensors"
        with safetensors.safe_open(file, framework="pt") as content:
            return dict.fromkeys(content.keys(), file)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        safetensors.SafetensorError,
    ) as error:
        raise CheckpointError(
            f"no weights in {folder}",
            why=f"{type(error).__name__}: {error}",
            fix="name a folder with model.safetensors, or with an index and its files",
        ) from error
