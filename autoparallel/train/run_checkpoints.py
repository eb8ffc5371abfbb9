"""The checkpoints of a run: when one is written, how many are kept, and from which it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoparallel.errors import CheckpointError
from autoparallel.parallel.background_checkpoint import BackgroundCheckpoints
from autoparallel.parallel.checkpoint import load_checkpoint, save_checkpoint
from autoparallel.parallel.checkpoint_files import find_checkpoint, is_first_rank, together
from autoparallel.train.config import Checkpoints, TrainingError
from autoparallel.train.run_config import CheckpointConfig

__all__ = ["Position", "RunCheckpoints"]

Say = Callable[[str], None]


@dataclass
class Position:
    """The place of a run: what a checkpoint knows besides tensors.

    step: optimizer steps that are done. batch: number of the next batch of rows. tokens: that the
    model has seen. left_out: numbers of batches that are passed over, as the model diverged on
    them. data: the digest of the rows' source. config, plan: as they were when it was written.
    """

    step: int = 0
    batch: int = 0
    tokens: int = 0
    left_out: list[int] = field(default_factory=list)
    data: str = ""
    config: str = ""
    plan: str = ""

    def next_batch(self) -> int:
        """Return the number of the batch of the next step, and go on to the one after it."""
        while self.batch in self.left_out:
            self.batch += 1
        self.batch += 1
        return self.batch - 1


class RunCheckpoints:
    """Saves a run in its folder, and finds the checkpoint from which it goes on.

    All ranks make it and call its methods. say: is told what a person should know.
    """

    def __init__(self, config: CheckpointConfig, folder: Path, say: Say) -> None:
        self.config, self.say = config, say
        self.named = Checkpoints(folder / "checkpoints", max(1, config.every))
        self.background = BackgroundCheckpoints() if config.asynchronous else None
        self.last_saved = -1

    def is_due(self, step: int) -> bool:
        """Return whether a run is saved after so many steps, its last one aside."""
        return self.config.every > 0 and step % self.config.every == 0

    def save(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        position: Position,
        *,
        last: bool = False,
    ) -> None:
        """Write a checkpoint, unless there are to be none or this step has one.

        A collective call. Where writing fails before the last step, that is told, and the run goes
        on: what was saved before is as it was. last: wait until it is written, and raise
        CheckpointError if it cannot be.
        """
        if self.config.every == 0:
            return
        self._wait()  # for the one before: that it failed does not keep this one from being written
        try:
            if self.last_saved != position.step:
                self._write(module, optimizers, position)
                self.last_saved = position.step
            if last and self.background is not None:
                self.background.wait()
        except (CheckpointError, OSError) as error:
            if last:
                raise CheckpointError(
                    f"the end of the run, step {position.step}, was not saved",
                    why=str(error),
                    fix="make room, and start the command again: it goes on from the checkpoint "
                    "before",
                ) from error
            self._failed(error)

    def _wait(self) -> None:
        """Wait until the checkpoint before is written; tell where it could not be."""
        if self.background is not None:
            try:
                self.background.wait()
            except (CheckpointError, OSError) as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.say(f"a checkpoint was not written, and training goes on: {error}")
        self.last_saved = -1

    def _write(self, module: nn.Module, optimizers: Any, position: Position) -> None:
        folder, extra = self.named.after(position.step), asdict(position)
        if self.background is not None:
            self.background.save(folder, module, optimizers, extra, self._prune)
            return
        save_checkpoint(folder, module, optimizers, extra)
        together("removing old checkpoints", self._prune if is_first_rank() else list)

    def _prune(self) -> None:
        """Remove all but the newest checkpoints, on rank 0."""
        if self.config.keep:
            for old in self.named.newest_first()[self.config.keep :]:
                # It has no name of a checkpoint while its files disappear one by one.
                gone = old.with_name("removed_" + old.name)
                for path in (old, old.with_name(old.name + ".replaced")):
                    if path.exists():
                        path.rename(gone)
                        shutil.rmtree(gone, ignore_errors=True)

    def require_start(self) -> None:
        """Look at what `resume` will want, before anything takes long.

        Raises CheckpointError where a checkpoint is named that there is not, and TrainingError
        where a run is to begin anew beside checkpoints.
        """
        if self.config.resume == "never" and self.named.newest_first():
            raise TrainingError(
                f'checkpoint.resume = "never", and {self.named.folder} has checkpoints',
                why="the new run would replace them",
                fix="give another folder, remove them, or resume them",
            )
        if self.config.resume not in ("auto", "never"):
            find_checkpoint(Path(self.config.resume))

    def resume(
        self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> Position | None:
        """Go on from the checkpoint that the configuration names; None to begin anew.

        A collective call. "auto" takes the newest whole one, and says which it has passed over.
        Raises CheckpointError where all are damaged, as a new run would replace them.
        """
        asked, folders = self.config.resume, self.named.newest_first()
        if asked == "never":
            return None
        if asked != "auto":
            folders = [Path(asked)]
        for folder in folders:
            try:
                return self._loaded(folder, module, optimizers)
            except CheckpointError as error:
                if folder == folders[-1]:
                    raise
                self.say(f"passed over {folder.name}: {error.what}: {error.why}")
        return None

    def again(
        self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> Position | None:
        """Go back to the newest whole checkpoint of the run; None where it has none yet."""
        self._wait()
        folders = self.named.newest_first()
        for folder in folders:
            try:
                return self._loaded(folder, module, optimizers)
            except CheckpointError:
                if folder == folders[-1]:
                    raise
        return None

    def _loaded(self, folder: Path, module: nn.Module, optimizers: Any) -> Position:
        extra = load_checkpoint(folder, module, list(optimizers))
        try:
            position = Position(**extra)
        except TypeError as error:
            raise TrainingError(
                f"{folder} is no checkpoint of this command",
                why=str(error),
                fix="name a folder below the run's checkpoints",
            ) from error
        self.last_saved = position.step
        return position
