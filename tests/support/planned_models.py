"""Models that write to themselves in their forward, and the state of a model for comparisons."""

from __future__ import annotations

import collections
import copy
from typing import Any

import torch
from torch import nn

WIDTH = 8


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return every dict of every module: keys in order, objects by identity, numbers of tensors."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}|class"] = type(module)
        for name, value in vars(module).items():
            found[f"{path}|{name}"] = _content(value)
    return found


def _content(value: Any) -> Any:
    """Return a key that is equal if nothing was changed."""
    if isinstance(value, torch.Tensor):
        grad = None if not value.is_leaf or value.grad is None else _content(value.grad)
        looks = (
            id(value),
            type(value),
            value.shape,
            value.stride(),
            value.dtype,
            value.requires_grad,
        )
        if nn.parameter.is_lazy(value) or value.is_meta:
            return (id(value), type(value))
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (*looks, value.data_ptr(), data, grad)
    if isinstance(value, dict):
        return (id(value), type(value), [(key, _content(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple, collections.deque)):
        return (id(value), [_content(item) for item in value])
    if isinstance(value, set):
        return (id(value), sorted(map(str, value)))
    if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
        return value if isinstance(value, (bool, int, float, str)) else id(value)
    inside = [
        (k, v) for k, v in vars(value).items() if isinstance(v, (bool, int, float, str, list))
    ]
    return (id(value), [(key, _content(item)) for key, item in inside])


class Base(nn.Module):
    """A Base has two products; subclasses may set up `first` and `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.ready = False

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))).square().sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(x)


class Hooks(Base):
    """Registers a hook at its first call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            self.first.register_forward_hook(lambda module, args, output: output * 2)
            self.ready = True
        return self.loss(x)


class Replaces(Base):
    """Replaces a child at its first call by another that it has built."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = [nn.ReLU(), nn.Tanh()]
        self.between: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            self.between, self.ready = self.spare.pop(), True
        return self.second(self.between(self.first(x))).square().sum()


class Assigns(Base):
    """Makes a buffer larger when it has to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(2.0).double(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.places.numel() < x.size(0):
            self.places = torch.arange(float(x.size(0)), dtype=x.dtype)
        return self.loss(x + self.places[: x.size(0), None])


class Caches(Base):
    """Keeps a mask in an attribute."""

    mask: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask is None or self.mask.size(0) < x.size(0):
            self.mask = torch.ones(x.size(0), x.size(0), dtype=x.dtype).tril()
        return self.loss(self.mask[: x.size(0), : x.size(0)] @ x)


class Flags(Base):
    """Sets attributes to the same values at every call, some of an object."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.kind = "unknown"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kind = self.settings.kind = "square"
        return self.loss(x)


class Settings:
    """A Settings object holds a model's settings."""

    kind: str | None = None


class Appends(Base):
    """Keeps a history in a list, a dict and a set."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Any] = [1]
        self.sizes: dict[str, Any] = {"before": (0, [0])}
        self.seen: set[int] = {5}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(len(self.history))
        self.sizes["before"][1].append(x.size(0))
        self.sizes["now"] = x.size(1)
        self.seen.add(len(self.history))
        return self.loss(x) * len(self.history)


class Counts(Base):
    """Warms up, so that the number of the call matters."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.loss(x) * min(1.0, self.calls / 3)


class Initializes(Base):
    """Initializes by data, as ActNorm does: parameters are written at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if not self.ready:
            with torch.no_grad():
                self.shift.copy_(-y.mean(0))
                self.scale.data = 1 / (y.std(0) + 0.1)
            self.ready = True
        return self.second(torch.relu((y + self.shift) * self.scale)).square().sum()


class Lazily(Base):
    """Makes a child at its first call."""

    extra: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(WIDTH, WIDTH).to(x.dtype)
        return self.loss(self.extra(x))


class Spectral(Base):
    """Has a spectral norm, a parametrization whose power iteration writes to buffers."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.first)
        nn.utils.parametrizations.weight_norm(self.second)


class KeepsLoss(Base):
    """Leaves computed tensors in attributes of itself and of a child."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.penalty = y.square().mean()
        self.second.seen = y
        return self.second(torch.relu(y)).square().sum()


class Stale(Base):
    """Goes on with tensors that the first call has computed of its input and of a parameter."""

    memory: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.memory is None:
            self.memory = x.detach() @ self.first.weight.detach().T
        return self.loss(x) + (self.memory * self.first(x)).sum()


class Hidden(Base):
    """Has a teacher that `parameters()` does not list, written through an object's closure."""

    def __init__(self) -> None:
        super().__init__()
        teacher = nn.Linear(WIDTH, 12).double()
        self.teachers = [[teacher]]
        self.update = lambda: teacher.weight.data.mul_(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.update()
        if float(x.detach().sum()) == 0.123:
            return x
        return self.loss(x)


class Disturbs(Base):
    """Leaves torch's switches, and random numbers, otherwise than they were; and fails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        self.first.bias.data += 1
        self.history = [1]
        if float(x.detach().sum()) != 0.123:
            raise ValueError("it has had enough")
        return self.loss(x)


SETTING_UP = (
    Hooks, Replaces, Assigns, Caches, Flags, Appends, Counts, Initializes, Lazily, Spectral,
    KeepsLoss, Stale, Hidden,
)  # fmt: skip


class Momentum(Base):
    """Has a student, and a teacher that follows it. how: the way to write the teacher."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(WIDTH, 10), nn.ReLU(), nn.Linear(10, WIDTH))
        self.teacher = copy.deepcopy(self.student)
        self.scale, self.teacher_scale = (nn.Parameter(torch.full((WIDTH,), n)) for n in (0.7, 1.0))
        for own in (*self.teacher.parameters(), self.teacher_scale):
            own.requires_grad_(False).mul_(0.5)
        self.how = how

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return the teacher's parameters, each with the one that it follows."""
        both = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        return [*both, (self.teacher_scale, self.scale)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        WAYS[self.how](self)
        with torch.no_grad():
            target = self.teacher(x) * self.teacher_scale
        return (self.student(x) * self.scale - target).square().mean()


def _each(write: Any) -> Any:
    def run(model: Momentum) -> None:
        with torch.no_grad():
            for teacher, student in model.pairs():
                write(teacher, student)

    return run


def _assign(teacher: Any, student: Any) -> None:
    teacher.data = teacher.data * 0.9 + student.data * 0.1


def _through_views(teacher: Any, student: Any) -> None:
    teacher[1:].copy_(student[1:])
    teacher.view(-1)[:3] += 0.25


def _through_numpy(teacher: Any, student: Any) -> None:
    teacher.data.numpy()[...] = 0.9 * teacher.numpy() + 0.1 * student.detach().numpy()


@torch.no_grad()
def _together(model: Momentum) -> None:
    teachers, students = zip(*model.pairs(), strict=True)
    torch._foreach_mul_(teachers, 0.9)
    torch._foreach_add_(teachers, students, alpha=0.1)


@torch.no_grad()
def _clamp(model: Momentum) -> None:
    for own in model.student.parameters():
        own.clamp_(-0.2, 0.2)


@torch.no_grad()
def _normalize(model: Momentum) -> None:
    model.student[0].weight.div_(model.student[0].weight.norm())


@torch.no_grad()
def _by_two_names(model: Momentum) -> None:
    one, other = model.teacher[0].weight, model.teacher[0].weight
    one.add_(0.1)
    other.mul_(0.5)
    model.teacher[0].weight.add_(one)


@torch.no_grad()
def _load(model: Momentum) -> None:
    state = {name: value * 0.5 for name, value in model.student.state_dict().items()}
    model.teacher.load_state_dict(state)


@torch.no_grad()
def _as_a_vector(model: Momentum) -> None:
    vector = nn.utils.parameters_to_vector(model.student.parameters()) * 0.3
    nn.utils.vector_to_parameters(vector, model.teacher.parameters())


WAYS: dict[str, Any] = {
    "in place": _each(lambda teacher, student: teacher.mul_(0.9).add_(student, alpha=0.1)),
    "data": _each(lambda teacher, student: teacher.data.mul_(0.9).add_(student.data, alpha=0.1)),
    "assigned data": _each(_assign),
    "detached": _each(lambda teacher, student: teacher.detach().lerp_(student, 0.1)),
    "out": _each(lambda teacher, student: torch.lerp(teacher, student, 0.1, out=teacher)),
    "views": _each(_through_views),
    "numpy": _each(_through_numpy),
    "together": _together,
    "clamped": _clamp,
    "normalized": _normalize,
    "two names": _by_two_names,
    "loaded": _load,
    "a vector": _as_a_vector,
}
