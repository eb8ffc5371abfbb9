"""The decoder of a latent image, as diffusion models have it: convolutions, norms of groups, one
attention over all places, and images that grow.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Residual(nn.Module):
    """Two convolutions, each behind a norm, around which the input passes."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for width in (before, after))
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.around = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(functional.silu(self.norms[0](x)))
        return self.around(x) + self.second(functional.silu(self.norms[1](y)))


class Attention(nn.Module):
    """Attention of one head over all places."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unsqueeze(1) for t in self.up(places).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.down(y).transpose(1, 2).unflatten(2, x.shape[2:])


class Decoder(nn.Module):
    """A decoder that doubles an image between its levels.

    widths: of the levels, from the smallest image on. The sizes of Stable Diffusion's decoder
    (arXiv:2112.10752) are 512, 512, 256, 128 with 32 groups, and 3 blocks in each level.
    """

    def __init__(
        self, widths: tuple[int, ...], groups: int, blocks: int, channels: int = 4
    ) -> None:
        super().__init__()
        wide = widths[0]
        self.enter = nn.Conv2d(channels, wide, 3, padding=1)
        self.middle = nn.Sequential(
            Residual(wide, wide, groups), Attention(wide, groups), Residual(wide, wide, groups)
        )
        levels: list[nn.Module] = []
        for at, width in enumerate(widths):
            before = widths[max(at - 1, 0)]
            rows = [Residual(before if n == 0 else width, width, groups) for n in range(blocks)]
            growing = [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1)]
            levels.append(nn.Sequential(*rows, *(growing if width != widths[-1] else [])))
        self.levels = nn.Sequential(*levels)
        self.leave = nn.Sequential(
            nn.GroupNorm(groups, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)
        )

    def forward(self, latent: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        made = self.leave(self.levels(self.middle(self.enter(latent))))
        return functional.mse_loss(made, image)
