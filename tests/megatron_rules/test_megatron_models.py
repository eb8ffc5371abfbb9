"""The hand-written GPT and BERT give the plain models' numbers, and communicate what they claim."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_counter import CollectiveCounter
from processes import run_processes
from releases import attention_without_heads
from torch import Tensor, nn

from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig
from megatron_rules.dropout import ParallelDropout, RandomStream
from megatron_rules.models import ParallelBert, ParallelGPT
from megatron_rules.regions import Split

TOLERANCE = 1e-10
BATCH, SEQUENCE = 3, 8
# Neither heads nor vocabulary divide by the ranks; the sequence must.
GPT_CONFIG = GPTConfig(layers=2, hidden=12, heads=3, vocabulary=101, positions=11, dropout=0.0)
BERT_CONFIG = BertConfig(layers=2, hidden=12, heads=3, vocabulary=101, positions=11, dropout=0.0)
# On four ranks the last one has no head at all.
WIDE_CONFIG = GPTConfig(layers=1, hidden=20, heads=5, vocabulary=101, positions=11, dropout=0.0)
KINDS = {
    "gpt": (GPT, ParallelGPT, GPT_CONFIG),
    "bert": (Bert, ParallelBert, BERT_CONFIG),
    "wide": (GPT, ParallelGPT, WIDE_CONFIG),
}
OPTIONS = {
    "whole sequence": {},
    "sequence parallel": {"sequence_parallel": True},
    "gathered once": {"sequence_parallel": True, "keep_gathered": True},
}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def plain_model(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A plain model in double precision, no parameter left at a special value, and its inputs."""
    plain_class, _, config = KINDS[kind]
    torch.manual_seed(7)
    model = plain_class(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    inputs = model.example_inputs(BATCH, SEQUENCE)
    inputs["labels"][0, 1] = inputs["labels"][2, 4] = -100
    return model, inputs


def compare(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Errors of the parallel model against the plain one, and the collectives of its passes."""
    plain, inputs = plain_model(kind)
    expected = plain(**inputs)
    expected.loss.backward()

    _, parallel_class, config = KINDS[kind]
    model = parallel_class(config, **options).double()
    model.load_plain(plain.state_dict())
    with CollectiveCounter() as forward:
        found = model(**inputs)
    with CollectiveCounter() as backward:
        found.loss.backward()
    with CollectiveCounter() as finish:
        model.finish_gradients()

    state, gradients = model.gathered_state(), model.gathered_gradients()
    logits = Split(2, config.vocabulary).gather(found.logits, options.get("group"))
    return {
        "loss": relative_error(found.loss, expected.loss),
        "logits": relative_error(logits, expected.logits),
        "state": all(torch.equal(state[name], whole) for name, whole in plain.state_dict().items()),
        "gradients": {
            name: relative_error(gradients[name], parameter.grad)
            for name, parameter in plain.named_parameters()
        },
        "forward": forward.counts,
        "backward": backward.counts,
        "finish": finish.counts,
    }


def work_on_two(rank: int) -> dict[str, Any]:
    """All that needs two processes, in one start."""
    results: dict[Any, Any] = {
        (kind, name): compare(kind, options)
        for kind in ("gpt", "bert")
        for name, options in OPTIONS.items()
    }

    torch.manual_seed(11)
    results["initial"] = ParallelGPT(GPT_CONFIG).gathered_state()

    x = torch.ones(1000)
    torch.manual_seed(12)
    stream = RandomStream(seed=1)
    results["common dropout"] = ParallelDropout(0.5, None)(x)
    results["own dropout"] = [ParallelDropout(0.5, stream)(x) for _ in range(2)]
    results["common after"] = torch.rand(4)

    torch.manual_seed(13)
    dropping = ParallelGPT(GPTConfig(2, 12, 3, 101, 11, dropout=0.4))
    inputs = GPT(GPT_CONFIG).example_inputs(BATCH, SEQUENCE)
    losses = [dropping(**inputs).loss for _ in range(2)]
    losses[0].backward()
    results["dropped gradient"] = dropping.final_norm.weight.grad
    losses.append(dropping.eval()(**inputs).loss)
    results["dropped losses"] = [loss.item() for loss in losses]

    model = ParallelGPT(GPT_CONFIG, sequence_parallel=True)
    tokens = torch.zeros(1, 7, dtype=torch.long)
    with pytest.raises(ValueError, match="7 positions / 2 ranks"):
        model(tokens)
    return results


def work_on_four(rank: int) -> dict[str, Any]:
    """Uneven parts, one of them empty, on a group of all four processes and on one of two."""
    results = {name: compare("wide", options) for name, options in OPTIONS.items()}
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for options in OPTIONS.values():
        results["pair", *options] = compare("gpt", {**options, "group": pairs[rank // 2]})
    return results


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_processes(work_on_two, 2)


def check_numbers(outcome: dict[str, Any]) -> None:
    assert outcome["loss"] < TOLERANCE
    assert outcome["logits"] < TOLERANCE
    assert outcome["state"]
    wrong = {name: error for name, error in outcome["gradients"].items() if not error < TOLERANCE}
    assert not wrong


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_two_ranks_give_the_plain_numbers(two: list[dict[str, Any]], kind: str, name: str) -> None:
    """Loss, logits and every gradient, on both ranks."""
    for results in two:
        check_numbers(results[kind, name])


@attention_without_heads
def test_four_ranks_give_the_plain_numbers() -> None:
    """Five heads on four ranks, and two groups of two beside each other."""
    for results in run_processes(work_on_four, 4):
        for outcome in results.values():
            check_numbers(outcome)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_needs_no_process_group(kind: str, name: str) -> None:
    """The same code on one rank: plain numbers, no collective."""
    outcome = compare(kind, OPTIONS[name])
    check_numbers(outcome)
    assert not outcome["forward"] + outcome["backward"] + outcome["finish"]


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_collectives_without_sequence_parallelism(two: list[dict[str, Any]], kind: str) -> None:
    """Two all-reduces per block and pass; the embedding one forward, the head one backward."""
    layers, hidden = GPT_CONFIG.layers, GPT_CONFIG.hidden
    activation, tokens = BATCH * SEQUENCE * hidden, BATCH * SEQUENCE
    for results in two:
        outcome = results[kind, "whole sequence"]
        assert outcome["forward"] == {
            ("all_reduce", activation): 2 * layers + 1,
            ("all_reduce", tokens): 3,
        }
        assert outcome["backward"] == {("all_reduce", activation): 2 * layers + 1}
        assert outcome["finish"] == {}


@pytest.mark.parametrize("name", ["sequence parallel", "gathered once"])
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_collectives_with_sequence_parallelism(
    two: list[dict[str, Any]], kind: str, name: str
) -> None:
    """Per block two all-gathers and two reduce-scatters in each pass, and backward two all-gathers
    more where the gathered activations were not kept. The entry scatters what the embedding summed;
    the head gathers."""
    layers, hidden = GPT_CONFIG.layers, GPT_CONFIG.hidden
    activation, tokens = BATCH * SEQUENCE * hidden, BATCH * SEQUENCE
    again = 0 if name == "gathered once" else 2 * layers + 1
    norms = {"gpt": 2 * layers + 1, "bert": 2 * layers + 3}[kind]
    dense = {"gpt": 0, "bert": hidden * hidden + hidden}[kind]
    for results in two:
        outcome = results[kind, name]
        assert outcome["forward"] == {
            ("all_reduce", activation): 1,
            ("all_gather", activation): 2 * layers + 1,
            ("reduce_scatter", activation): 2 * layers,
            ("all_reduce", tokens): 3,
        }
        assert outcome["backward"] == {
            ("all_gather", activation): 2 * layers + 1 + again,
            ("reduce_scatter", activation): 2 * layers + 1,
        }
        pending = 2 * hidden * norms + 2 * layers * hidden + dense
        assert outcome["finish"] == Counter({("all_reduce", pending): 1})


def test_initial_weights_do_not_depend_on_the_ranks(two: list[dict[str, Any]]) -> None:
    """Equal seeds, equal whole matrices at every world size."""
    torch.manual_seed(11)
    expected = ParallelGPT(GPT_CONFIG).gathered_state()
    for results in two:
        assert results["initial"].keys() == expected.keys()
        for name, whole in expected.items():
            torch.testing.assert_close(results["initial"][name], whole, rtol=0, atol=0)


def test_dropout_is_common_outside_and_own_inside(two: list[dict[str, Any]]) -> None:
    """Whole activations drop alike on all ranks, split ones each by itself."""
    first, second = two
    assert torch.equal(first["common dropout"], second["common dropout"])
    assert torch.equal(first["common after"], second["common after"])
    masks = [*first["own dropout"], *second["own dropout"], first["common dropout"]]
    for position, mask in enumerate(masks):
        assert 400 < mask.count_nonzero() < 600
        for other in masks[:position]:
            assert not torch.equal(mask, other)
    # The gradients of a whole parameter stay equal only if all that is outside drops alike.
    torch.testing.assert_close(first["dropped gradient"], second["dropped gradient"])
    assert first["dropped losses"] == pytest.approx(second["dropped losses"], rel=1e-6)
    assert len({round(loss, 5) for loss in first["dropped losses"]}) == 3


def test_load_plain_names_what_does_not_fit() -> None:
    plain, _ = plain_model("gpt")
    state = dict(plain.state_dict())
    state["surplus"] = state.pop("final_norm.bias")
    with pytest.raises(ValueError, match=r"missing \['final_norm.bias'\], left over \['surplus'\]"):
        ParallelGPT(GPT_CONFIG).load_plain(state)


@pytest.mark.parametrize(
    ("split", "world_size", "expected"),
    [
        (Split(0, 7), 3, [[0, 1, 2], [3, 4, 5], [6]]),
        (Split(0, 5), 4, [[0, 1], [2, 3], [4], []]),
        (Split(0, 12, blocks=2, unit=2), 2, [[0, 1, 2, 3, 6, 7, 8, 9], [4, 5, 10, 11]]),
    ],
    ids=str,
)
def test_split_parts(split: Split, world_size: int, expected: list[list[int]]) -> None:
    """The parts of torch.chunk in units, block by block."""
    whole = torch.arange(split.size)
    for rank in range(world_size):
        assert split.local(whole, rank, world_size).tolist() == expected[rank]
        assert split.local_size(rank, world_size) == len(expected[rank])


def test_split_must_fit() -> None:
    with pytest.raises(ValueError, match=r"10 size / \(3 blocks \* 1 unit\)"):
        Split(0, 10, blocks=3)
