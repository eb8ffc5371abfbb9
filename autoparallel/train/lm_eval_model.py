"""A trained model as lm-eval asks it: how likely texts are, and how they go on.

    import lm_eval
    model = LanguageModel(open_trained(Path("out/gpt-tiny")))
    lm_eval.simple_evaluate(model, tasks=["lambada_openai"])

Under torchrun every rank runs the same lines. The ranks are one model: each is asked all requests,
and they answer alike. The harness itself (`pip install lm-eval`) is not needed to import this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from autoparallel.train.config import TrainingError
from autoparallel.train.evaluation import Scorer
from autoparallel.train.generation import Sampling, generate
from autoparallel.train.trained import Trained

try:
    import lm_eval.api.model

    _Base: Any = lm_eval.api.model.LM
except ImportError:
    _Base = object

__all__ = ["LanguageModel"]

_NEW_TOKENS = 256  # where a task does not say how long an answer may be


class LanguageModel(_Base):
    """The interface of lm_eval.api.model.LM. trained: a causal model, split or not.

    Raises TrainingError for one that was trained on other labels. A request is any object whose
    `args` are a tuple, as the harness's Instance.
    """

    # All ranks are one model, and none of them takes a part of the requests.
    rank, world_size = 0, 1

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        trained.require("the likelihood of texts", "next", "same")
        self.trained = trained
        length = trained.config.data.sequence
        self.scorer = Scorer(trained.module, length, trained.shifts, device=trained.device)
        self.window = length if trained.shifts else length + 1

    @property
    def tokenizer_name(self) -> str:
        """A name under which the harness may keep answers."""
        return str(self.trained.config.folder)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log p of each continuation after its context, and whether it is the likeliest.

        requests: with args (context, continuation). The context loses its beginning where both are
        longer than the model reads; a continuation that is longer by itself is scored at its end.
        Raises TrainingError for one that nothing comes before, not even a token that begins texts.
        """
        texts, scored = [], []
        for request in requests:
            before, after = self._tokens(*request.args)
            if not before and after:
                raise _after_nothing(f"the likelihood of {request.args[1][:60]!r}")
            text = [*before, *after][-self.window :]
            texts.append(text)
            scored.append(min(len(after), len(text) - 1))
        sums = [-self.scorer.nll(*each) for each in zip(texts, scored, strict=True)]
        return list(zip(sums, self.scorer.all_likeliest(texts, scored), strict=True))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p of each whole text, of which each token is scored once.

        requests: with args (text,). The first token follows the end of a text, where the tokenizer
        has one. A long text is read in windows that begin where the one before ended; the last one
        begins earlier, so that it is full.
        """
        sums = []
        for request in requests:
            tokens = [*self._begin(), *self._encode(request.args[0])]
            total = 0.0
            for first in range(0, len(tokens) - 1, self.window - 1):
                last = min(first + self.window, len(tokens))
                part = tokens[max(0, last - self.window) : last]
                total -= self.scorer.nll(part, last - first - 1)
            sums.append(total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return how each context goes on, up to the first of the texts that end it.

        requests: with args (context, settings): until, max_gen_toks, do_sample, temperature, top_k,
        top_p. A context loses its beginning where the model does not read both it and the longest
        answer; where a task does not say how long that is, at most half of what the model reads.
        Raises TrainingError for an answer that leaves no place for a context.
        """
        return [self._answer(*request.args) for request in requests]

    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        ends = settings.get("until") or []
        ends = [end for end in ([ends] if isinstance(ends, str) else ends) if end]
        most = int(settings.get("max_gen_toks", min(_NEW_TOKENS, self.window // 2)))
        if not 0 < most < self.window:
            raise TrainingError(
                f"max_gen_toks = {most}",
                why=f"the model reads {self.window - 1} tokens and one of the context at least",
                fix="give a smaller max_gen_toks, above 0",
            )
        drawn = settings.get("do_sample")
        temperature = float(settings.get("temperature", 1.0 if drawn else 0.0))
        sampling = Sampling(
            temperature if drawn is not False else 0.0,
            int(settings.get("top_k", 0)),
            float(settings.get("top_p", 1.0)),
        )
        tokens = (self._encode(context) or self._begin())[-max(1, self.window - most) :]
        if not tokens:
            raise _after_nothing("an answer")
        rows = torch.tensor([tokens], device=self.trained.device)
        written: list[int] = []
        text = ""
        for chosen in generate(self.trained.module, rows, most, sampling):
            if int(chosen[0]) in self.trained.ends:
                break
            written.append(int(chosen[0]))
            text = self._decode(written)
            if any(end in text for end in ends):
                break
        return text[: min([len(text), *(text.find(end) for end in ends if end in text)])]

    def _tokens(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both; spaces at the context's end belong to what follows."""
        kept = context.rstrip()
        whole = self._encode(context + continuation)
        before = self._encode(kept) if kept else []
        after = whole[len(before) :]
        if continuation and not after:
            # Tokens grew over the boundary: each text has tokens of its own.
            after = self._encode(context[len(kept) :] + continuation)
        return (before or self._begin()), after

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.trained.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _decode(self, tokens: Iterable[int]) -> str:
        text: str = self.trained.tokenizer.decode([*tokens])
        return text

    def _begin(self) -> list[int]:
        return [] if self.trained.begin is None else [self.trained.begin]


def _after_nothing(what: str) -> TrainingError:
    return TrainingError(
        f"{what} after nothing",
        why="the context is empty, and the tokenizer has no token that begins or ends a text",
        fix="give it one, such as </s>, as a special token",
    )
