"""Capture of repeated blocks: the folded graph is the fully traced one, whatever the model does."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from block_stacks import LAYERS, WIDTH, Block, Stack, both, instances, numbered, sample, stack
from broad_cases import broad, share_of
from families import TRANSFORMERS, build, inputs_for
from torch import nn

from autoparallel.capture import export
from autoparallel.capture.export import capture

FAMILY_LAYERS = 4


@pytest.mark.parametrize(
    ("name", "training"), share_of([*((name, True) for name in TRANSFORMERS), ("gpt", False)], 4)
)
def test_families_are_folded(name: str, training: bool) -> None:
    """The first block is copied to all but the last, which is traced as a check."""
    model = build(name, layers=FAMILY_LAYERS).train(training)
    if hasattr(model, "config") and name.startswith("hf-"):
        model.config.use_cache = False
    captured = both(model, **inputs_for(name))
    assert instances(captured) == [FAMILY_LAYERS - 1]


@pytest.mark.parametrize("name", [*broad("hf-gpt2"), "hf-llama"])
def test_a_cache_is_captured(name: str) -> None:
    """Blocks that append keys and values to a cache: the graph returns those of every layer."""
    model = build(name, layers=3).eval()
    model.config.use_cache = True
    inputs = inputs_for(name)
    captured = both(model, **inputs)
    assert len(captured.graph.outputs) == 2 + 2 * 3


def test_a_shared_layer_is_captured() -> None:
    """ALBERT: one layer, called again and again."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=97,
        embedding_size=16,
        hidden_size=WIDTH,
        num_hidden_layers=FAMILY_LAYERS,
        num_attention_heads=3,
        intermediate_size=20,
    )
    tokens = torch.randint(97, (3, 5))
    both(transformers.AlbertForMaskedLM(config).eval(), input_ids=tokens, labels=tokens)


def test_the_same_block_under_two_names() -> None:
    shared = Block()
    both(Stack([Block(), shared, Block(), shared, Block(), Block()]), sample())


class Wide(Block):
    """Another class with the same parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.second(torch.tanh(self.first(self.norm(x))))


def test_alternating_kinds_are_two_groups() -> None:
    captured = both(Stack((Block, Wide)[index % 2]() for index in range(8)), sample())
    assert instances(captured) == [3, 3]
    assert all(len({int(path[-1]) % 2 for path in paths}) == 1 for paths in captured.repeats)


def test_blocks_with_different_attributes_are_kept_apart() -> None:
    class Scaled(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * super().forward(x)

    captured = both(Stack(Scaled(scale=0.5 if i == 2 else 1.0) for i in range(7)), sample())
    assert instances(captured) == [5]
    assert "blocks.2" not in captured.repeats[0]


class Idle(Block):
    """Has a number and does not use it, as Hugging Face blocks without a cache."""

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        if cache is not None:
            cache[self.layer_idx] = x
        return super().forward(x)


def test_an_unread_number_does_not_matter() -> None:
    assert instances(both(numbered(Idle), sample())) == [LAYERS - 1]


class UNet(Stack):
    """Blocks out of sequence, joined by skip connections; one is left out, one is called twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        first = self.blocks[1](x)
        second = self.blocks[3](first)
        third = self.blocks[0](second) + first
        fourth = self.blocks[5](third + second)
        return self.blocks[2](fourth) + self.blocks[3](fourth)


class Skips(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            if index != 2:
                x = block(x)
        return x


@pytest.mark.parametrize("kind", [UNet, Skips])
def test_blocks_in_another_order(kind: type[Stack]) -> None:
    both(kind(Block() for _ in range(LAYERS)), sample())


def test_sequential_and_slices() -> None:
    assert instances(both(nn.Sequential(*[Block() for _ in range(LAYERS)]), sample())) == [5]

    class Sliced(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks[1:5]:
                x = block(x)
            return x

    both(Sliced(Block() for _ in range(LAYERS)), sample())


class TwoStreams(Block):
    """Structured inputs and outputs, one of them passed on, None at the first block."""

    def forward(self, x: torch.Tensor, extra: dict[str, Any]) -> Any:
        total = extra["total"]
        y = super().forward(x)
        return y, {"total": y if total is None else total + y, "mask": extra["mask"]}


class TwoStreamStack(Stack):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        extra: dict[str, Any] = {"total": None, "mask": mask}
        for block in self.blocks:
            x, extra = block(x, extra)
        return x * extra["mask"], extra["total"]


def test_structures_pass_through() -> None:
    """None at first, then one tensor twice, then two: the third block is the one that is copied."""
    model = TwoStreamStack(TwoStreams() for _ in range(LAYERS))
    captured = both(model, sample(), torch.ones(3, 5, 1))
    assert captured.repeats == (("blocks.2", "blocks.3", "blocks.4"),)


class SameTwice(Block):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * y


class SameTwiceStack(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x, x if index != 3 else torch.tanh(x))
        return x


def test_one_tensor_given_twice() -> None:
    both(SameTwiceStack(SameTwice() for _ in range(LAYERS)), sample())


class Growing(Stack):
    """Every block sees another length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(torch.cat([x, x[:, :1]], 1))
        return x


class Scan(Block):
    """Its loop fixes a size that it has sliced to: symbolic in the first block, a number later."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        longer = nn.functional.pad(x, (0, 0, 0, 2))[:, :length, :]
        for place in range(length):
            x = x + longer[:, place, :].unsqueeze(1)
        return x


def test_slices_of_sizes_that_the_first_block_fixes() -> None:
    folded = both(stack(Scan), torch.ones(4, 3, WIDTH))
    assert [len(paths) for paths in folded.repeats] == [LAYERS - 1]


def test_sizes_that_change_from_block_to_block() -> None:
    both(Growing(Block() for _ in range(LAYERS)), sample())


class Tied(Block):
    """Own buffers, a tied pair inside, a constant, a module that all blocks share."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key.weight = self.query.weight
        self.register_buffer("kept", torch.ones(WIDTH))
        self.register_buffer("lost", torch.ones(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.query(x) * self.kept + self.key(self.shared(x)) * self.lost
        return super().forward(x) + torch.tensor([0.5] * WIDTH, device=x.device)


@pytest.mark.parametrize("meta", [False, True])
def test_own_shared_and_tied_tensors(meta: bool) -> None:
    shared = nn.BatchNorm1d(5).eval()
    model = Stack(Tied(shared) for _ in range(LAYERS)).eval()
    if not meta:
        assert instances(both(model, sample())) == [LAYERS - 1]
    else:
        model = model.to("meta")
        folded, full = (capture(model, (sample(),), {}, fold=fold) for fold in (True, False))
        assert str(folded.graph) == str(full.graph)


def test_gradients_flow_as_in_the_full_trace() -> None:
    """The first block's input has no gradient, those of the others have."""
    model = stack()
    model.stem.requires_grad_(False)
    assert instances(both(model, sample())) == [LAYERS - 1]


class Filling(Block):
    """Only the memory of `filled` says that a gradient flows: its first owner has none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        filled = torch.zeros_like(x)
        filled[..., 1:] = self.first(x)[..., 1:WIDTH]
        return x.detach() + filled * 2


def test_gradients_flow_through_memory_that_copies_write_to() -> None:
    assert instances(both(stack(Filling), sample())) == [LAYERS - 1]


class WithoutGradient(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for block in self.blocks[:4]:
                x = block(x)
        for block in self.blocks[4:]:
            x = block(x)
        return x


class PartlyWithoutGradient(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = torch.sigmoid(self.first(x).mean())
        return super().forward(x) * scale


def test_regions_without_gradient() -> None:
    both(WithoutGradient(Block() for _ in range(LAYERS)), sample())
    both(stack(PartlyWithoutGradient), sample())


def test_a_cycle_of_two_lists() -> None:
    """Encoder and decoder: each list has its own template."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = stack()
            self.decoder = Stack(Wide() for _ in range(LAYERS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.encoder(x))

    assert instances(both(Two(), sample())) == [LAYERS - 1] * 2


def test_capture_is_deterministic_and_restores_after_errors() -> None:
    class Broken(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if bool(x.sum() > 0) else x

    model = stack()
    texts = [str(capture(model, (sample(),), {}).graph) for _ in range(2)]
    assert texts[0] == texts[1]
    broken = Broken(Block() for _ in range(LAYERS))
    with pytest.raises(Exception, match="branches on the values"):
        capture(broken, (sample(),), {})
    assert all(type(module) is Block for module in broken.blocks)
    assert broken(sample()).shape == (3, 5, WIDTH)


class Setting(Stack):
    """A Setting leaves a text in its configuration, as classifiers of Hugging Face do when called.

    Its blocks hold the same configuration.
    """

    def __init__(self) -> None:
        config = types.SimpleNamespace(kind=None)
        super().__init__(Block(config=config) for _ in range(LAYERS))
        self.config = config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, places, WIDTH)."""
        self.config.kind = "regression"
        return super().forward(x)


def test_blocks_are_hidden_in_both_of_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the second call of such a model does the same is seen without a full trace."""
    hidden: list[tuple[bool, int]] = []
    plain = export._exported

    def noted(wanted: Any, folding: Any, one_by_one: bool, twice: bool = False) -> Any:
        result = plain(wanted, folding, one_by_one, twice)
        hidden.append((twice, len(folding.calls)))
        return result

    monkeypatch.setattr(export, "_exported", noted)
    capture(Setting(), (sample(),), {})
    assert hidden == [(False, LAYERS - 2), (True, 2 * (LAYERS - 2))]


class Reaching(Stack):
    """A Reaching model writes to one of its equal blocks, which it knows by an attribute too."""

    def __init__(self) -> None:
        super().__init__(Block() for _ in range(LAYERS))
        self.kept = (self.blocks[1].second,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, places, WIDTH)."""
        x = super().forward(x)
        self.kept[0].reached = True
        return x


def test_a_hidden_block_that_is_changed_is_traced_by_itself() -> None:
    """Else nobody sees that it changes, nor that the next call may be another one."""
    captured = capture(Reaching(), (sample(),), {})
    assert captured.repeats == ()
    assert [(write.path, write.route) for write in captured.left] == [
        ("blocks.1.second", (("attribute", "reached"),))
    ]
