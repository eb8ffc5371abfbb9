"""The commands `generate`, `evaluate` and `export-weights`: what a trained model is asked for.

Under torchrun they run on all ranks, and rank 0 prints.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoparallel.errors import AutoParallelError, CheckpointError
from autoparallel.train.train_command import leave, tell

if TYPE_CHECKING:
    from autoparallel.train.evaluation import Score
    from autoparallel.train.trained import Trained

__all__ = ["add_trained_commands"]

_Work = Callable[["Trained", argparse.Namespace], str]


def add_trained_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the commands, with their options."""
    parser = _command(commands, "generate", "write text with a trained model", _generate)
    parser.add_argument("--prompt", default="\n", help="the text that is gone on with")
    parser.add_argument("--tokens", type=int, default=100, help="at most so many new ones")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, default=0, help="of so many likeliest; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the likeliest of this mass")
    parser.add_argument("--seed", type=int, default=0)
    parser = _command(commands, "evaluate", "measure what a trained model knows", _evaluate)
    parser.add_argument("--perplexity", type=Path, metavar="TEXT", help="of each word of a text")
    parser.add_argument("--stride", type=int, default=32, help="by which its windows move")
    parser.add_argument("--cloze", type=Path, metavar="FILE", help="last words of its passages")
    parser.add_argument("--held-out", type=int, metavar="BATCHES", help="loss of held-out rows")
    parser.add_argument("--masked", type=int, metavar="BATCHES", help="hidden tokens of such rows")
    parser.add_argument(
        "--choices", type=Path, metavar="PATH", help="right answers to questions in RACE's format"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    parser = _command(
        commands, "export-weights", "write a trained model's weights as safetensors", _export
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")


def _command(
    commands: argparse._SubParsersAction[Any],
    name: str,
    about: str,
    work: _Work,
) -> argparse.ArgumentParser:
    """Add a command that opens a trained model and prints what `work` returns."""
    parser = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument(
        "folder", type=Path, help="of a run, one of its checkpoints, or one of Hugging Face's"
    )
    parser.add_argument("--mesh", default="tp", help="axes of the ranks; see train --help")
    parser.set_defaults(run=lambda options: _run(options, work))
    return parser


def _run(options: argparse.Namespace, work: _Work) -> int:
    """Open the model and do the work; return the exit status."""
    from autoparallel.train.preflight import rank_and_world
    from autoparallel.train.trained import open_trained

    status, first = 0, rank_and_world()[0] == 0
    try:
        trained = open_trained(
            options.folder, options.mesh, lambda text: print(text, file=sys.stderr)
        )
        text = work(trained, options)
        if first:
            print(text)
    except AutoParallelError as error:
        status = tell(error, 1 if isinstance(error, CheckpointError) else 2)
    return leave(status)


def _generate(trained: Trained, options: argparse.Namespace) -> str:
    """Return the prompt and the text that follows; say on stderr how quick that was."""
    import torch

    from autoparallel.train.config import TrainingError
    from autoparallel.train.generation import Sampling, generate
    from autoparallel.train.preflight import rank_and_world

    trained.require("text", "next", "same")
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    ids = trained.tokenizer.encode(options.prompt, add_special_tokens=False).ids
    most = trained.config.data.sequence - len(ids)
    if not ids or options.tokens < 1 or most < 1:
        raise TrainingError(
            f"a prompt of {len(ids)} tokens, and {options.tokens} new ones",
            why=f"the model reads {trained.config.data.sequence} positions",
            fix="give a prompt of one token at least, and fewer than that",
        )
    tokens = torch.tensor([ids], device=trained.device)
    made, seconds, start = list(ids), [], time.perf_counter()
    for chosen in generate(trained.module, tokens, min(options.tokens, most), sampling):
        made.append(int(chosen[0]))
        seconds.append(time.perf_counter() - start)
        if made[-1] in trained.ends:
            break
        start = time.perf_counter()
    # The first two tokens plan what the others run.
    rest = seconds[2:] or seconds
    if rank_and_world()[0] == 0:
        print(
            f"{len(seconds)} tokens, {len(rest) / sum(rest):.1f} tokens/s after the first two",
            file=sys.stderr,
        )
    text: str = trained.tokenizer.decode(made)
    return text


def _evaluate(trained: Trained, options: argparse.Namespace) -> str:
    """Return the scores that were asked for."""
    from autoparallel.train.config import TrainingError
    from autoparallel.train.evaluation import (
        Scorer,
        cloze_accuracy,
        masked_accuracy,
        mean_loss,
        read_texts,
        word_perplexity,
    )

    counts = [options.stride, options.held_out, options.masked]
    if any(count is not None and count < 1 for count in counts):
        raise TrainingError(
            "a number of batches or a stride below 1",
            why="nothing would be measured",
            fix="give positive whole numbers to --held-out, --masked and --stride",
        )
    if options.perplexity is not None or options.cloze is not None:
        trained.require("the likelihood of texts", "next", "same")
    if options.masked is not None:
        trained.require("masked accuracy", "masked")
    scorer = Scorer(
        trained.module, trained.config.data.sequence, trained.shifts, device=trained.device
    )
    scores: list[Score] = []
    if options.perplexity is not None:
        try:
            text = options.perplexity.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(
                f"no text in {options.perplexity}", why=str(error), fix="name a file of text"
            ) from error
        scores.append(word_perplexity(scorer, trained.tokenizer, text, options.stride))
    if options.cloze is not None:
        scores.append(cloze_accuracy(scorer, trained.tokenizer, read_texts(options.cloze)))
    for measure, count in ((mean_loss, options.held_out), (masked_accuracy, options.masked)):
        if count is not None:
            scores.append(measure(trained.module, trained.held_out(count)))
    if options.choices is not None:
        scores.append(_choices(trained, options.choices))
    if not scores:
        raise TrainingError(
            "nothing is to be measured",
            fix="give --perplexity, --cloze, --choices, --held-out or --masked",
        )
    if options.json:
        return json.dumps([asdict(score) for score in scores], indent=1)
    return "\n".join(map(str, scores))


def _choices(trained: Trained, path: Path) -> Score:
    """Return how many questions of a file, or of those in a folder, are answered rightly."""
    from autoparallel.train.config import TrainingError
    from autoparallel.train.multiple_choice import ChoiceRows, choice_accuracy, read_questions

    if not isinstance(trained.rows, ChoiceRows):
        raise TrainingError(
            "--choices for a model that scores no choices",
            why="it was not trained on questions",
            fix='fine-tune it first: data.objective = "choices" and model.weights',
        )
    questions = read_questions(path)
    return choice_accuracy(trained.module, trained.rows, questions, trained.device)


def _export(trained: Trained, options: argparse.Namespace) -> str:
    """Write the weights and the tokenizer; return where they are."""
    from autoparallel.train.config import TrainingError
    from autoparallel.train.weights import export_weights

    try:
        export_weights(
            trained.module, options.output, {"tokenizer.json": trained.tokenizer.to_str()}
        )
    except OSError as error:
        raise TrainingError(
            f"the weights cannot be written to {options.output}",
            why=str(error),
            fix="name a folder that can be made and written to",
        ) from error
    return f"written to {options.output}"
