"""The table of contents of a checkpoint: torch's own, read without running what it says.

torch.distributed.checkpoint pickles it. It is read here by an unpickler that knows the classes that
it consists of, and no other.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as words

from autoparallel.errors import CheckpointError
from autoparallel.support.torch_private import checkpoint_classes

__all__ = ["METADATA", "CheckpointReader", "read_metadata"]

# The file of the table, in the folder of the checkpoint.
METADATA = ".metadata"
_CLASSES = (
    words.BytesStorageMetadata,
    words.ChunkStorageMetadata,
    words.Metadata,
    words.MetadataIndex,
    words.StorageMeta,
    words.TensorProperties,
    words.TensorStorageMetadata,
)
_KNOWN = {(kind.__module__, kind.__qualname__): kind for kind in _CLASSES}


class _Unpickler(pickle.Unpickler):
    """Reads tables of contents; any other class or function in them is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class by its name. Raises UnpicklingError for one that such a table has not."""
        known = {**_KNOWN, **checkpoint_classes(), ("torch", "Size"): torch.Size}
        if (module, name) in known:
            return known[module, name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        # Where the checkpoint was written; nothing is read from there.
        if module.partition(".")[0] == "pathlib":
            return PurePath
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class CheckpointReader(dcp.FileSystemReader):
    """torch's reader of the files in a folder, with a table of contents that was read so."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Return the table of contents of the folder."""
        table = read_metadata(Path(self.path))
        table.storage_meta = words.StorageMeta(load_id=self.load_id)
        return table


def read_metadata(folder: Path) -> Any:
    """Return the table of contents of the checkpoint in a folder.

    Raises CheckpointError where it cannot be read, or says what no checkpoint of the project says.
    """
    try:
        content = (folder / METADATA).read_bytes()
        _require_bounded(content)
        table = _Unpickler(io.BytesIO(content)).load()
        why = _why_unusable(table, folder)
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle fail in any way
        why = f"{type(error).__name__}: {error}"
    if why:
        raise CheckpointError(
            f"the checkpoint in {folder} cannot be read",
            why=f"{METADATA}: {why}",
            fix="give a folder that save_checkpoint() wrote, as it was written",
        )
    return table


def _require_bounded(content: bytes) -> None:
    """Raise UnpicklingError for a pickle that would take more memory than its own length.

    It may number what it remembers as it likes, and Python makes room for all numbers below: five
    bytes can ask for 32 GB. That texts end within the file is seen on the way.
    """
    for operation, argument, _ in pickletools.genops(content):
        if operation.name.endswith("PUT") and int(argument or 0) > len(content):
            raise pickle.UnpicklingError(f"it remembers {argument} things in {len(content)} bytes")


def _why_unusable(table: Any, folder: Path) -> str:
    """Return why a table is not the contents of a folder; "" if it is."""
    if not isinstance(table, words.Metadata) or not isinstance(table.storage_data, dict):
        return "it is no table of contents"
    # No tensor is larger than the files that it is read from.
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    most = sum(files.values())
    entries: dict[Any, Any] = table.state_dict_metadata
    for name, entry in entries.items():
        if isinstance(entry, words.BytesStorageMetadata):
            continue
        if not isinstance(name, str) or not isinstance(entry, words.TensorStorageMetadata):
            return f"{name!r:.60} is no tensor"
        if math.prod(entry.size) * entry.properties.dtype.itemsize > most:
            return f"{name:.60} is larger than the files"
    for index, place in table.storage_data.items():
        if place.relative_path not in files:
            return f"{index.fqn:.60} is in {place.relative_path!r:.60}, which is not there"
    return ""
