"""Plans, trains three ways and compares: the whole road, in about five minutes on two cores.

    make demo                                  (or: python examples/demo.py)
    make demo ARGS="--data my_texts --output my_out"

A GPT and then, for fewer steps, a BERT are trained (a) split over two processes by the planner, (b)
split by hand as Megatron-LM does it, (c) whole, in one process: from the same weights, on the same
batches. All that is shown is written to out/ as well.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import three_ways as trainer
from rich.console import Console

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.train.comparison import Comparison
from autoparallel.train.data import TokenizedCorpus, prepare_corpus
from autoparallel.train.metrics import RunRecord
from autoparallel.view.dot import write_svg
from autoparallel.view.report import print_plan

WORLD_SIZE = 2
TITLES = {"gpt": "GPT, causal language model", "bert": "BERT, masked language model"}
NOTE = """\
Collectives and bytes are counted on the running modules: one step on rank 0, bytes of the whole
tensors. "update" is clipping and the optimizer. Every process has one thread, the plain one too:
two processes are faster than one where splitting the work saves more than talking costs."""
ROOT = Path(__file__).resolve().parent.parent


class RunFailedError(Exception):
    """A training run that ended badly; its own words are on stderr."""


def main() -> int:
    """Return the exit status: 0 if every run ended well, the curves agree and the held-out loss
    fell.
    """
    options = parse()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=100)
    start = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    comparisons = []
    try:
        say(console, "Text")
        corpus = prepare_corpus(options.data, vocabulary=trainer.VOCABULARY)
        console.print(
            f"{corpus.source}: {corpus.nbytes / 1e6:.1f} MB, {len(corpus.train):,} tokens to "
            f"train on, {len(corpus.held_out):,} held out, vocabulary {corpus.vocabulary:,}"
        )
        for model, steps in (("gpt", options.steps), ("bert", options.bert_steps)):
            if steps:
                comparisons.append(compare(console, model, steps, corpus, options))
    except (AutoParallelError, RunFailedError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return summarize(console, comparisons, options.output, time.monotonic() - start)


def compare(
    console: Console, model: str, steps: int, corpus: TokenizedCorpus, options: Any
) -> Comparison:
    """Plan one model, train it by every method, write the results, and return the comparison."""
    settings = trainer.Settings(model, sequence_parallel=options.sequence_parallel)
    if "automatic" in options.methods:
        say(console, f"Plan of the {model.upper()} for {WORLD_SIZE} ranks")
        plan = autoparallel.make_plan(
            settings.plain_model(corpus.vocabulary),
            WORLD_SIZE,
            example_inputs=settings.batches(corpus).train(0),
            sequence_parallel=settings.sequence_parallel,
        )
        print_plan(plan)
        (options.output / f"{model}_plan.json").write_text(plan.to_json())
        write_svg(plan, options.output / f"{model}_plan.svg")

    say(console, f"Training the {model.upper()}: {steps} steps, one thread per process")
    records = tuple(run(model, method, steps, options) for method in options.methods)
    comparison = Comparison(TITLES[model], records)
    comparison.draw(options.output / f"{model}_loss.png")
    return comparison


def run(model: str, method: str, steps: int, options: Any) -> RunRecord:
    """Train in processes of their own: torchrun's for the parallel methods, one for the plain.

    Raises RunFailedError if the run fails or takes longer than --timeout; no process is left.
    """
    launcher = [] if method == "plain" else ["-m", "torch.distributed.run", "--standalone"]
    launcher += [] if method == "plain" else [f"--nproc-per-node={WORLD_SIZE}"]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "record.json")
        command = [sys.executable, *launcher, str(ROOT / "examples" / "three_ways.py")]
        command += ["--model", model, "--method", method, "--steps", str(steps)]
        command += ["--record", str(record)]
        command += ["--data", options.data] if options.data else []
        command += [] if options.sequence_parallel else ["--no-sequence-parallel"]
        run_to_its_end(command, options.timeout)
        return RunRecord.from_json(record.read_text())


def run_to_its_end(command: list[str], timeout_seconds: float) -> None:
    """Run a command whose output goes where ours goes; end its whole process group if it lingers.

    Raises RunFailedError.
    """
    sys.stdout.flush()
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    # The child prints its result, which our table shows, so its stdout is not wanted.
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        status = process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        raise RunFailedError(
            f"no end after {timeout_seconds:.0f} s (see --timeout): {' '.join(command)}"
        ) from None
    finally:
        stop_group(process)
    if status != 0:
        raise RunFailedError(f"exit status {status}, see above: {' '.join(command)}")


def stop_group(process: subprocess.Popen) -> None:
    """End all processes that are left of the process's group: politely, then at once."""
    for number, patience_seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        # The group is empty: all of its processes have ended.
        except ProcessLookupError:
            return
        try:
            process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            continue


def summarize(console: Console, comparisons: list[Comparison], output: Path, seconds: float) -> int:
    """Print and write the comparison; return 1 if something is not as it should be, else 0."""
    say(console, "Comparison")
    for comparison in comparisons:
        console.print(comparison.table())
    console.print(NOTE)
    file = output / "comparison.json"
    contents = [comparison.to_json() for comparison in comparisons]
    file.write_text(json.dumps(contents, indent=1) + "\n")
    written = ", ".join(sorted(path.name for path in output.iterdir()))
    console.print(f"\nwritten to {output}/: {written}\n{seconds:.0f} seconds in all")
    complaints = [line for comparison in comparisons for line in comparison.complaints()]
    for line in complaints:
        console.print(f"[red]NOT AS IT SHOULD BE[/red] {line}")
    return 1 if complaints else 0


def say(console: Console, title: str) -> None:
    """Print a heading."""
    console.print(f"\n[bold]== {title}[/bold]")
    sys.stdout.flush()


def parse() -> Any:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a text file or a folder of text (default: Python's own)")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--steps", type=int, default=120, help="for the GPT; 0 leaves it out")
    parser.add_argument("--bert-steps", type=int, default=45, help="for the BERT; 0 leaves it out")
    parser.add_argument("--methods", nargs="+", choices=trainer.METHODS, default=trainer.METHODS)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run")
    parser.add_argument(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="allow splitting the activations along the sequence",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
