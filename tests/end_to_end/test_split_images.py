"""Images whose places are split: ranks get the edges of their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from broad_cases import share_of
from families import relative_error, worst_gradient
from forced_kernels import only_by
from image_decoder import Decoder
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan

TOLERANCE = 1e-10
EDGES = ("convolution_edges", "pool_edges", "resample_edges")

Case = tuple[nn.Module, tuple[torch.Tensor, ...]]


class Shrinks(nn.Module):
    """Convolutions with strides, dilation and groups, pools, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.MaxPool2d(3, 2, padding=1),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
            nn.AvgPool2d(2, 1),
            nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().sum()


class Volumes(nn.Module):
    """A convolution of sounds, and one of volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.sound, self.volume = nn.Conv1d(2, 3, 5, padding=2), nn.Conv3d(2, 3, 3, padding="same")

    def forward(self, sound: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
        return self.sound(sound).square().sum() + self.volume(volume).square().sum()


class Stretches(nn.Module):
    """Sounds whose elements are repeated so often that torch is one off for some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.Upsample(scale_factor=41))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        return (y * torch.arange(y.shape[-1])).square().sum()


class Grows(nn.Module):
    """Images whose elements are interpolated, as decoders of segmentation do; one at a scale that
    is no whole number, although the sizes are multiples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.bend = nn.Upsample(scale_factor=3.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.interpolate(self.one(x), scale_factor=(2, 3), mode="bilinear")
        x = nn.functional.interpolate(self.two(x), scale_factor=2, mode="bicubic")
        y = self.bend(self.three(x.reshape(1, 2, 28, 36))).sin()
        return (y * torch.arange(y.shape[-1])).square().sum()


def decoder() -> Case:
    model = Decoder((4, 2), groups=2, blocks=1).double()
    latent = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    return model, (latent, torch.randn(1, 3, 6, 8, dtype=torch.float64))


def shrinking() -> Case:
    return Shrinks().double(), (torch.randn(2, 3, 21, 17, dtype=torch.float64),)


def volumes() -> Case:
    shapes = (1, 2, 9), (1, 2, 4, 5, 3)
    return Volumes().double(), tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def stretching() -> Case:
    return Stretches().double(), (torch.randn(1, 2, 31, dtype=torch.float64),)


def growing() -> Case:
    return Grows().double(), (torch.randn(1, 2, 7, 6, dtype=torch.float64),)


MAKERS: dict[str, Callable[[], Case]] = {
    "decoder": decoder,
    "growing": growing,
    "shrinking": shrinking,
    "stretching": stretching,
    "volumes": volumes,
}
CASES = [
    ("decoder", Mesh(sp=3)),  # of four columns, the last rank has none
    ("growing", Mesh(sp=3)),
    ("growing", Mesh(rows=2, columns=2)),
    ("shrinking", Mesh(sp=2)),
    ("shrinking", Mesh(sp=3)),
    ("shrinking", Mesh(rows=2, columns=2)),
    ("volumes", Mesh(sp=3)),
    ("stretching", Mesh(sp=3)),
]


def planned(name: str, mesh: Mesh) -> tuple[nn.Module, tuple[torch.Tensor, ...], Plan]:
    """The model and its inputs, and the plan in which whatever can is split along places."""
    torch.manual_seed(0)
    model, inputs = MAKERS[name]()
    with only_by(*EDGES, "group_norm_split", ranks=mesh.axes[0][1]):
        plan = autoparallel.make_plan(model, mesh=mesh, example_inputs=inputs)
    rows = [op.kernels for op in plan.ops if "conv" in op.target]
    edges = [row for row in rows if {*row} == {"convolution_edges"}]
    # Windows of one element need none.
    assert len(edges) > len(rows) / 2
    return model, inputs, plan


def unsplit(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, inputs = MAKERS[name]()
    loss = model(*inputs)
    loss.backward()
    return loss.detach(), {path: p.grad for path, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "mesh"), share_of(CASES, 2), ids=str)
def test_split_images_are_the_users(name: str, mesh: Mesh) -> None:
    model, inputs, plan = planned(name, mesh)
    loss, gradients = unsplit(name)
    made = autoparallel.simulate(model, plan=plan, example_inputs=inputs)
    assert relative_error(made.output.detach(), loss) < TOLERANCE
    error, where = worst_gradient(dict(made.gradients), gradients)
    assert error < TOLERANCE, where


def run_on_gloo(rank: int) -> list[float]:
    """Errors of a process' step, eager and compiled."""
    model, inputs, plan = planned("shrinking", Mesh(sp=2))
    loss, gradients = unsplit("shrinking")
    module = autoparallel.apply_plan(model, plan)
    errors = []
    for call in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        module.zero_grad()
        result = call(*inputs)
        result.backward()
        whole = {path: p.grad.full_tensor() for path, p in module.named_parameters()}
        errors += [relative_error(result.detach(), loss), worst_gradient(whole, gradients)[0]]
    return errors


@pytest.mark.broad
def test_edges_are_exchanged_between_processes() -> None:
    """By gloo; and when compiled."""
    for errors in run_processes(run_on_gloo, 2):
        assert max(errors) < TOLERANCE


def test_large_images_are_split_rather_than_channels() -> None:
    """The decoder of Stable Diffusion at batch 1: at 1024 x 1024 edges are little beside the rest,
    and channels are much; at 128 x 128 it is the other way round.
    """
    shares = []
    for latent in (128, 16):
        with torch.device("meta"):
            model = Decoder((512, 512, 256, 128), groups=32, blocks=1).to(torch.bfloat16)
            inputs = tuple(
                torch.zeros(1, channels, size, size, dtype=torch.bfloat16)
                for channels, size in ((4, latent), (3, 8 * latent))
            )
        plan = autoparallel.make_plan(
            model, mesh=Mesh(sp=8), example_inputs=inputs, hardware="dgx-h100"
        )
        wide = [op for op in plan.ops if op.target == "aten.conv2d.default"]
        shares.append(sum(op.kernels == ("convolution_edges",) for op in wide) / len(wide))
    assert shares[0] > 0.8
    assert shares[1] < shares[0] / 2
