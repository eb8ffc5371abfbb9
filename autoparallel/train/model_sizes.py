"""The sizes of the bundled models, and those that papers have made known."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BertConfig", "GPTConfig"]


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Sizes of a GPT; the defaults are GPT-2's smallest.

    layers: number of blocks. hidden: width h, a multiple of heads (ValueError). vocabulary: V.
    positions: longest sequence. dropout: a probability.

    >>> GPTConfig.gpt3().hidden
    12288
    """

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    vocabulary: int = 50257
    positions: int = 1024
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_heads(self.hidden, self.heads)

    @classmethod
    def gpt2(cls) -> GPTConfig:
        """Return the sizes of 124 million parameters (Radford et al. 2019, table 2, smallest)."""
        return cls()

    @classmethod
    def gpt2_xl(cls) -> GPTConfig:
        """Return the sizes of 1.6 billion parameters (Radford et al. 2019, table 2, largest).

        Its 25 heads divide by no usual number of ranks.
        """
        return cls(layers=48, hidden=1600, heads=25)

    @classmethod
    def gpt3(cls) -> GPTConfig:
        """Return the sizes of 175 billion parameters (Brown et al. 2020, table 2.1)."""
        return cls(layers=96, hidden=12288, heads=96, positions=2048)


@dataclass(frozen=True, slots=True)
class BertConfig:
    """Sizes of a BERT; fields as of GPTConfig, with token_types segments.

    norm: "pre" where each branch of a block is normalized before it, "post" where the sum is after
    it, as in the first BERT (ValueError for others). sentence_order: a second head tells whether
    two segments are in order (Lan et al. 2019, section 3.1).
    """

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    vocabulary: int = 30522
    positions: int = 512
    token_types: int = 2
    dropout: float = 0.1
    norm: str = "pre"
    sentence_order: bool = False

    def __post_init__(self) -> None:
        _check_heads(self.hidden, self.heads)
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {self.norm!r}")

    @classmethod
    def large(cls) -> BertConfig:
        """Return the sizes of 340 million parameters (Devlin et al. 2018, section 3)."""
        return cls(layers=24, hidden=1024, heads=16)


def _check_heads(hidden: int, heads: int) -> None:
    """Raise ValueError unless the heads divide the width."""
    if heads < 1 or hidden % heads:
        raise ValueError(f"hidden must be a multiple of heads: {hidden} hidden / {heads} heads")
