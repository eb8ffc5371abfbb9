"""A trained model, opened to be asked: from the folder of a run, or one of Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import nn

from autoparallel.api import apply_plan
from autoparallel.parallel.checkpoint import load_checkpoint
from autoparallel.support.json_text import read_other_json
from autoparallel.train.built_models import build_model, objective_of
from autoparallel.train.config import Checkpoints, TrainingError
from autoparallel.train.config_text import read_config
from autoparallel.train.multiple_choice import ChoiceRows
from autoparallel.train.preflight import join_processes, rank_and_world
from autoparallel.train.prepared_run import plan_of_run
from autoparallel.train.row_sources import open_rows
from autoparallel.train.rows import Rows
from autoparallel.train.run_config import RunConfig
from autoparallel.train.token_files import END_NAMES
from autoparallel.train.weights import import_weights

__all__ = ["Trained", "open_trained"]


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A model in evaluation mode, split over the ranks that run, and what it was trained on.

    config: of the run. tokenizer: of its text. rows: its rows, None for a folder of Hugging Face's.
    device: of the inputs. steps: after which it was saved, None where nobody says. begin: the token
    before a text, ends: those after one, where files beside the weights name them.
    """

    module: nn.Module
    config: RunConfig
    tokenizer: tokenizers.Tokenizer
    rows: Rows | None
    device: torch.device
    steps: int | None
    begin: int | None = None
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ends:
            # Documents of a run end with this one, and each begins after the end of another.
            known = (self.tokenizer.token_to_id(name) for name in END_NAMES)
            found = next((number for number in known if number is not None), None)
            object.__setattr__(self, "ends", () if found is None else (found,))
        if self.begin is None and self.ends:
            object.__setattr__(self, "begin", self.ends[0])

    def require(self, what: str, *objectives: str) -> None:
        """Raise TrainingError unless the model was trained on one of some kinds of labels.

        what: what is asked of it. objectives: see `objective_of`.
        """
        own = objective_of(self.config)
        if own not in objectives:
            raise TrainingError(
                f"{what} of a model that was trained on other labels: {own!r}",
                why=f"it would mean nothing; it is of {' and '.join(map(repr, objectives))}",
                fix="measure what it was trained on, or set data.objective to what it learned",
            )

    def held_out(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches of held-out rows. Raises TrainingError where there are none."""
        if self.rows is None:
            raise TrainingError(
                "there are no held-out rows",
                why="the model comes from a folder without a run",
                fix="measure --perplexity or --cloze on a file",
            )
        rows = self.config.rows_of_a_pass
        for number in range(count):
            batch = self.rows("held_out", number, 0, rows)
            yield {name: value.to(self.device) for name, value in batch.items()}

    @property
    def shifts(self) -> bool:
        """True if the model moves the labels by one position itself."""
        return objective_of(self.config) == "same"


def open_trained(folder: Path, mesh: str = "tp", say: Callable[[str], None] = print) -> Trained:
    """Return the model in a folder.

    folder: of a run, one of its checkpoints, or with a config.json, a tokenizer.json and
    safetensors, as Hugging Face has them. mesh: of the ranks that run, see parallel.mesh. A
    collective call. Raises TrainingError where no model is there.

    Example: `open_trained(Path("out/gpt-tiny")).module`
    """
    folder = folder.expanduser()
    if (folder / "config.json").exists():
        return _of_hugging_face(folder, mesh)
    named = folder.name.startswith("step_")
    run = folder.parent.parent if named else folder
    if not (run / "config.toml").exists():
        raise TrainingError(
            f"no trained model in {folder}",
            why="there is neither a config.toml, as in the folder of a run, nor a config.json",
            fix="name the folder of a run, one of its checkpoints, or one of Hugging Face's",
        )
    config = read_config(str(run / "config.toml"))
    config = _on_mesh(config, mesh)
    checkpoints = Checkpoints(run / "checkpoints").newest_first()
    if not named and not checkpoints:
        raise TrainingError(
            f"no checkpoint in {run}",
            why="the run has not come so far, or checkpoint.every is 0",
            fix="train on, or name another folder",
        )
    device = join_processes(config.parallel.timeout_seconds)
    source = open_rows(config, say)
    if source.tokenizer_json is None:
        raise TrainingError(
            f"the run in {run} has no tokenizer",
            why=f"its rows come from {config.data.source}",
            fix="call autoparallel.train.evaluation and generation with a tokenizer of your own",
        )
    example = None
    if isinstance(source.rows, ChoiceRows):
        example = {n: value.to(device) for n, value in source.rows("held_out", 0, 0, 2).items()}
    module = _split(config, source.vocabulary, device, example)
    extra = load_checkpoint(folder if named else checkpoints[0], module)
    tokenizer = tokenizers.Tokenizer.from_str(source.tokenizer_json)
    return Trained(module.eval(), config, tokenizer, source.rows, device, extra.get("step"))


def _of_hugging_face(folder: Path, mesh: str) -> Trained:
    """Return the model in a folder as save_pretrained writes it."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        rows = read_other_json((folder / "config.json").read_text())
        vocabulary = int(rows["vocab_size"])
        begin, ends = _marks_beside(folder, tokenizer)
    except Exception as error:  # the library raises plain exceptions for what is no tokenizer
        raise TrainingError(
            f"the folder {folder} cannot be opened",
            why=f"{type(error).__name__}: {error}",
            fix="it needs config.json with a vocab_size, tokenizer.json and safetensors",
        ) from error
    positions = rows.get("max_position_embeddings") or rows.get("n_positions") or 1024
    config = read_config(None, [f"--model=hf:{folder}/config.json", f"--parallel.mesh={mesh}"])
    sequence = min(1024, int(positions))
    config = replace(config, data=replace(config.data, sequence=sequence))
    device = join_processes(config.parallel.timeout_seconds)
    module = _split(config, vocabulary, device)
    import_weights(module, folder)
    return Trained(module.eval(), config, tokenizer, None, device, None, begin, ends)


def _marks_beside(
    folder: Path, tokenizer: tokenizers.Tokenizer
) -> tuple[int | None, tuple[int, ...]]:
    """Return the token before a text, and those after one, as the files of a folder name them.

    A token of tokenizer_config.json is asked first, as libraries do. Numbers of no special token
    are left out: they are defaults of a model that has other tokens.
    """
    added = tokenizer.get_added_tokens_decoder()
    files = [
        read_other_json(file.read_text()) if file.exists() else {}
        for name in ("tokenizer_config.json", "config.json", "generation_config.json")
        for file in [folder / name]
    ]

    def numbers(mark: str) -> list[int]:
        named = files[0].get(f"{mark}_token")
        named = named.get("content") if isinstance(named, dict) else named
        found: list[Any] = [] if named is None else [tokenizer.token_to_id(named)]
        # What the tokenizer says not to have, it has not.
        for file in [] if mark == "bos" and f"{mark}_token" in files[0] else files[1:]:
            value = file.get(f"{mark}_token_id")
            found += value if isinstance(value, list) else [value]
        special = [number for number in found if number in added and added[number].special]
        return list(dict.fromkeys(special))

    return next(iter(numbers("bos")), None), tuple(numbers("eos"))


def _on_mesh(config: RunConfig, mesh: str) -> RunConfig:
    """Return the configuration for another mesh, without what is of training alone."""
    parallel = replace(
        config.parallel, mesh=mesh, plan="", memory_limit="", constraints=(),
        layout="", microbatches=0, schedule="", stages_per_rank=0,
    )  # fmt: skip
    return replace(config, parallel=parallel)


def _split(
    config: RunConfig,
    vocabulary: int,
    device: torch.device,
    example: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Return the model of a configuration, split over the ranks that run; all bring all rows.

    example: arguments of forward; by default tokens and labels.
    """
    model = build_model(config, vocabulary)
    if not config.model.meta:
        model = model.to(device)
    tokens = torch.zeros(2, config.data.sequence, dtype=torch.int64, device=device)
    example = example or {"input_ids": tokens, "labels": tokens}
    world_size = rank_and_world()[1]
    plan = plan_of_run(config, model, example, world_size, device)
    return apply_plan(model, plan, example_inputs=example)
