"""The files that a model is written in, told from those of the libraries below it.

A model's own code is whatever lies in no library. Of a library, such as transformers, it is the
files whose modules hold others: there stands how the model is put together. A layer without modules
of its own, torch's or another library's, is used like a function, and the line that uses it says
more.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import torch
from torch import nn

__all__ = ["HANDS_ON", "ModelFiles"]

# The name of the frames of modes, which hand on what the model asks for.
HANDS_ON = "__torch_function__"

_FOLDERS = ("/site-packages/", "/dist-packages/")
_TORCH = f"{Path(torch.__file__).parent}/"
_HERE = f"{Path(__file__).parents[1]}/"
# The bundled models are written as users write theirs, and know nothing of the rest.
_MODELS = f"{_HERE}train/"
_STANDARD = tuple({f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib")})
# Code that was typed in is in files of such names; other names in brackets are those of programs.
_TYPED = ("<stdin>", "<string>", "<ipython-input-")


class ModelFiles:
    """The ModelFiles are those that a model is written in.

    model: any module; None for all files outside of libraries.

    >>> files = ModelFiles(nn.Sequential(nn.Linear(2, 2)))
    >>> "/home/me/train.py" in files, nn.__file__ in files
    (True, False)
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        modules = () if model is None else model.modules()
        kinds = {type(one) for one in modules if one is model or any(True for _ in one.children())}
        named = (sys.modules.get(kind.__module__) for kind in kinds)
        self._holding = {getattr(module, "__file__", None) for module in named}
        self._known: dict[str, bool] = {}

    def __contains__(self, file: str) -> bool:
        if file not in self._known:
            self._known[file] = self._is_own(file)
        return self._known[file]

    def _is_own(self, file: str) -> bool:
        """Return whether a file is one of the model's, by the name that tracebacks have for it."""
        if file.startswith("<"):
            return file.startswith(_TYPED)
        if file.startswith((_TORCH, _HERE)):
            return file.startswith(_MODELS)
        is_library = file.startswith(_STANDARD) or any(folder in file for folder in _FOLDERS)
        return not is_library or file in self._holding

    def shown(self, file: str) -> str:
        """Return the name to show a file by: of a library's file also the folders in the library.

        >>> ModelFiles().shown("/usr/lib/python3/dist-packages/torch/nn/modules/linear.py")
        'torch/nn/modules/linear.py'
        """
        if file not in self:
            for folder in _FOLDERS:
                if folder in file:
                    return file.rpartition(folder)[2]
        return file.rpartition("/")[2]
