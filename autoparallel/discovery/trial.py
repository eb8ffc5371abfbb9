"""The trial of a discovered rule: every strategy is validated on real calls at several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from autoparallel.discovery.discovered_rule import DiscoveredRule
from autoparallel.discovery.example_calls import Example, make_example, random_numbers
from autoparallel.discovery.probe_sizes import ProbeSizes
from autoparallel.discovery.shape_pattern import Pattern, Probe, ProbeError, Values
from autoparallel.discovery.size_choices import assignment
from autoparallel.discovery.strategy_validation import why_wrong
from autoparallel.graph.graph import Sym, hint
from autoparallel.placement import Partial
from autoparallel.rules.loop_splits import LoopSplit, is_possible
from autoparallel.rules.rule import ShardingRule
from autoparallel.rules.strategies import Strategy, strategies
from autoparallel.support.torch_private import has_backward

__all__ = ["DRAWS", "WRITES", "Trial"]

# Why whole tensors are not right for an op either: every rank would draw numbers of its own, and
# what the op writes is not in the graph.
DRAWS = "when it is run again: it draws numbers"
WRITES = "writes to its inputs"

# Integers of the call above this are taken for sizes.
_MOST_OWN = 64
_MOST_ELEMENTS = 1 << 17
# Which sizes, and how many ranks: enough to refuse most wrong guesses.
_QUICK = ((0, 2), (1, 3))
_TOLERANCE = 1e-10
# For ops that take no float64.
_LOOSE = 2e-4
# The change of numbers by which their condition is seen, the error of a hundred roundings or so,
# and what no error may exceed of the largest number.
_NUDGE = 1e-9
_ROUNDING = 3e-14
_MOST_SLACK = 1e-7
_ENORMOUS = 1e6


@dataclass(frozen=True, slots=True)
class _Case:
    """A call with real numbers, and the numbers of ranks to try it on."""

    example: Example
    ranks: tuple[int, ...]


class Trial:
    """Everything that the rules of one call are tried on.

    probe, shrunk: the call, and its small sizes. tolerance: of comparisons. gradients: whether the
    op can be differentiated; if not, backward_error says why. faults: how many strategies were
    tried. Raises ProbeError where the op gives other results when it is run again.
    """

    def __init__(self, probe: Probe, shrunk: ProbeSizes) -> None:
        self.probe, self.shrunk = probe, shrunk
        self.tolerance = _TOLERANCE if probe.dtype == torch.float64 else _LOOSE
        self.gradients = any(operand.requires_grad for operand in probe.call.operands)
        self.backward_error = ""
        self.faults = 0
        try:
            self.cases = {which: self.case(which) for which in (0, 1)}
        except ProbeError:
            raise
        except Exception as error:  # op and backward are anyone's code, and may fail in any way
            words = f"{type(error).__name__}: {str(error).strip()[:200]}"
            # A broken backward is the op's fault; one that does not exist leaves the forward to be
            # split.
            if not self.gradients or _has_backward(probe):
                raise ProbeError(f"failed on probe inputs, in its backward: {words}") from error
            self.gradients, self.backward_error = False, words
            self.cases = {which: self.case(which) for which in (0, 1)}

    def case(self, which: int, symbolic: bool = False) -> Example:
        """Return the call at one of the choices of small sizes. symbolic: see `example`."""
        return self.example(assignment(self.shrunk.order, which), which, symbolic)

    def example(
        self,
        sizes: Mapping[int, int],
        seed: int,
        symbolic: bool = False,
        values: Values | None = None,
    ) -> Example:
        """Return the call at these sizes, with its unsplit results.

        symbolic: its symbols are symbols there too.
        """
        probe, pattern = self.probe, self.shrunk.pattern
        tensors = probe.tensors(pattern, sizes, values or self.shrunk.values, 7 + seed)
        for operand, tensor in zip(probe.call.operands, tensors, strict=True):
            if operand.requires_grad and self.gradients and _is_number(tensor):
                tensor.requires_grad_()
        before = [tensor.detach().clone() for tensor in tensors]
        args, kwargs = probe.arguments(pattern, sizes, tensors)
        names = self.symbols(sizes) if symbolic else {}
        first_run = make_example(probe.call.node.target, args, kwargs, names)
        second_run = make_example(probe.call.node.target, args, kwargs, names)
        for old, new in zip(first_run.results, second_run.results, strict=True):
            # Bit for bit: a random op differs, and a deterministic one on the CPU does not.
            if not torch.allclose(old, new, rtol=0, atol=0, equal_nan=True):
                raise ProbeError(f"gives other results {DRAWS}")
        for name, old in first_run.gradients.items():
            if not torch.allclose(old, second_run.gradients[name], rtol=0, atol=0, equal_nan=True):
                raise ProbeError(f"gives other gradients {DRAWS}")
        for old, tensor in zip(before, tensors, strict=True):
            # Schemas may be wrong: what is written to is seen here.
            if not torch.equal(old, tensor.detach()):
                raise ProbeError(WRITES)
        return replace(first_run, slack=self.slack(first_run, pattern, sizes, tensors))

    def slack(
        self,
        example: Example,
        pattern: Pattern,
        sizes: Mapping[int, int],
        tensors: list[torch.Tensor],
    ) -> dict[str, float]:
        """Return the errors that rounding may leave in results and gradients, by their names.

        It is seen by changing all numbers a little, and is above the tolerance for ill-conditioned
        calls alone (the inverse of a matrix that is nearly singular). It is far below what a wrong
        strategy changes in any case.
        """
        if self.probe.dtype != torch.float64:
            return {}
        generator = torch.Generator().manual_seed(3)
        near = [
            (tensor * (1 + _NUDGE * random_numbers(tensor.shape, generator)))
            .to(tensor.dtype)
            .detach()
            .requires_grad_(tensor.requires_grad)
            if _is_number(tensor)
            else tensor
            for tensor in tensors
        ]
        args, kwargs = self.probe.arguments(pattern, sizes, near)
        try:
            other = make_example(self.probe.call.node.target, args, kwargs)
        except Exception:  # the op or its backward may not take these: nothing is known then
            return {}
        pairs = [
            (value.name, one, two)
            for value, one, two in zip(
                example.node.results, example.results, other.results, strict=True
            )
        ]
        pairs += [
            (name, one, two)
            for (name, one), two in zip(
                example.gradients.items(), other.gradients.values(), strict=True
            )
        ]
        slack = {}
        for name, one, two in pairs:
            if one.shape == two.shape and _is_number(one) and one.numel():
                change = _largest(one - two)
                slack[name] = min(change * _ROUNDING / _NUDGE, _MOST_SLACK * _largest(one))
        return slack

    def tried(
        self, sizes: Mapping[int, int], seed: int, values: Values | None = None
    ) -> Example | None:
        """Return the call at these sizes; None where the op, or its backward,
        does not take them.
        """
        try:
            return self.example(sizes, seed, values=values)
        except ProbeError:
            raise
        except Exception:  # both are anyone's code, and may fail in any way
            return None

    def symbols(self, sizes: Mapping[int, int]) -> dict[int, str]:
        """Return sizes that are the call's symbols or products of them,
        by the value that they have here.
        """
        pattern = self.shrunk.pattern
        atoms = pattern.solve(self.probe.call) or {}
        symbols = {atom for atom, size in atoms.items() if isinstance(size, Sym)}
        names = {sizes[atom]: f"s{atom}" for atom in sorted(symbols)}
        for term in pattern.terms():
            if symbols & set(term.atoms):
                factors = [f"s{atom}" if atom in symbols else sizes[atom] for atom in term.atoms]
                names[term.at(sizes)] = "*".join(map(str, (term.factor, *factors)))
        return names

    def strategies(
        self, example: Example, rule: ShardingRule, tiles: list[LoopSplit], world_size: int
    ) -> tuple[Strategy, ...]:
        """Return all strategies of a rule for the example, with these splits of loops."""
        operands = tuple(operand.requires_grad for operand in example.call.operands)
        results = tuple(result.requires_grad for result in example.call.results)
        return strategies(rule, tiles, operands, results, world_size)

    def wrong(
        self,
        example: Example,
        rule: ShardingRule,
        strategy: Strategy,
        world_size: int,
        twice: bool = False,
    ) -> str:
        """Return the fault of a strategy as text, "" if it has none.

        twice: whether derivatives of gradients are compared too.
        """
        pairs = zip(example.results, strategy.results, strict=True)
        for result in [result for result, placement in pairs if isinstance(placement, Partial)]:
            if result.dtype == torch.bool:
                return "truth values have no pending sum"
            if result.numel() and not result.any():
                # As of an op that finds the first number that is not 0: the summands could be
                # anything that it gives for other numbers.
                return "a sum of zeros proves nothing"
        self.faults += 1
        return self.probe.survived(
            lambda: why_wrong(example, strategy, world_size, rule, self.tolerance, twice)
        )

    def try_loop(self, discovered: DiscoveredRule, loop: str) -> str:
        """Return the fault of splitting `loop`, "" if it has none, on two sets of sizes.

        Where results of parts are reduced again, also with numbers that are all alike, on parts of
        unequal sizes: all that are largest may share a gradient, or the first may get it.
        """
        tried = 0
        why = ""
        cases = [(self.cases[which], ranks) for which, ranks in _QUICK]
        if any(kernel.gathers for name, kernel in discovered.kernels if name == loop):
            values = replace(self.shrunk.values, low=0.6, high=0.9, signs=False, step=1.0)
            for which in (0, 1):
                alike = self.tried(assignment(self.shrunk.order, which), 5, values)
                cases += [(alike, ranks) for ranks in (2, 3, 4) if alike is not None]
        for example, ranks in cases:
            rule = discovered.rule(example.call)
            if rule is None:
                return "its sizes do not follow from the call's"
            tiles = [LoopSplit(loop)]
            for strategy in self.strategies(example, rule, tiles, ranks):
                if strategy.tile is not None:
                    tried += 1
                    why = self.wrong(example, rule, strategy, ranks)
                    if why:
                        return why
        return "" if tried else "too small to be split"

    def try_sum(self, discovered: DiscoveredRule, group: tuple[int, ...]) -> str:
        """Return the fault of a pending sum through these operands, "" if it has none."""
        for which, ranks in _QUICK:
            example = self.cases[which]
            rule = replace(discovered, linear=(group,)).rule(example.call)
            if rule is None:
                raise ProbeError("behaves differently at other sizes")
            strategy = self.strategies(example, rule, [], ranks)[-1]
            if not any(isinstance(placement, Partial) for placement in strategy.operands):
                return "a sum without a gradient is not left pending here"
            why = self.wrong(example, rule, strategy, ranks)
            if why:
                return why
        return ""

    def final(self) -> Iterator[_Case]:
        """Yield cases that no choice was made on: other sizes, the call's integers, its symbols."""
        yield _Case(self.case(2), (2, 3))
        for example in self.unusual():
            yield _Case(example, (2,))
        with_integers = self.own_integers()
        if with_integers is not None:
            yield _Case(with_integers, (2, 3))
        if any(isinstance(size, Sym) for o in self.probe.call.operands for size in o.shape):
            # Symbolic sizes are emitted as expressions, another path through the rewriter.
            yield _Case(self.case(1, symbolic=True), (2,))

    def unusual(self) -> Iterator[Example]:
        """Yield the call with numbers that an op may treat differently: many alike, zeros,
        large ones.
        """
        plain = self.shrunk.values
        changes: tuple[dict[str, float], ...] = (
            {"step": 0.25},
            {"zeros": 0.4},
            {"high": 20 * plain.high},
        )
        for values in (replace(plain, **change) for change in changes):  # type: ignore[arg-type]
            example = self.tried(assignment(self.shrunk.order, 1), 5, values)
            if example is None:
                continue
            numbers = (*example.results, *example.gradients.values())
            if all(bool(tensor.isfinite().all()) for tensor in numbers) and not _explodes(example):
                yield example

    def own_integers(self) -> Example | None:
        """Return the call with its own integers, where they are small:
        they may mean more than sizes.
        """
        pattern = self.shrunk.pattern
        atoms = pattern.solve(self.probe.call) or {}
        asked = {atom for term in pattern.integers for atom in term.atoms}
        if not asked or any(atom not in atoms or hint(atoms[atom]) > _MOST_OWN for atom in asked):
            return None
        sizes = assignment(self.shrunk.order, 0)
        own_values = {hint(atoms[atom]) for atom in asked}
        # Sizes that are none of the call's integers, nor each other's.
        spare = iter(size for size in range(5, 200) if size not in own_values)
        for atom in self.shrunk.order:
            sizes[atom] = hint(atoms[atom]) if atom in asked else next(spare)
        if _elements(pattern, sizes) > _MOST_ELEMENTS:
            return None
        return self.tried(sizes, 3)

    def tiles(self, rule: ShardingRule, world_size: int) -> list[LoopSplit]:
        """Return every loop's plain split, and splits into blocks and into runs."""
        tiles = []
        for loop in rule.loops:
            for blocks, unit in ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3)):
                tile = LoopSplit(loop, blocks, unit)
                size = rule.sizes[loop]
                if isinstance(size, Sym) and (blocks, unit) != (1, 1):
                    continue
                if loop not in rule.whole and is_possible(rule, tile, world_size):
                    tiles.append(tile)
        return tiles


def _explodes(example: Example) -> bool:
    """Return whether numbers are enormous, and rounding hides what is wrong with them.

    Large operands of a product of many factors give such results, of which nothing can be learnt.
    """
    numbers = {
        **dict(zip((value.name for value in example.node.results), example.results, strict=True)),
        **example.gradients,
    }
    return any(
        _largest(numbers[name]) > _ENORMOUS and slack > _TOLERANCE * _largest(numbers[name])
        for name, slack in example.slack.items()
    )


def _largest(tensor: torch.Tensor) -> float:
    """Return the largest finite magnitude in a tensor that has elements."""
    return float(tensor.abs().nan_to_num(0.0, 0.0, 0.0).max().item())


def _is_number(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has real or complex numbers, which are rounded."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _has_backward(probe: Probe) -> bool:
    """Return whether the op can be differentiated, or may be."""
    return has_backward("::".join(probe.call.node.target.split(".")[:2]))


def _elements(pattern: Pattern, sizes: Mapping[int, int]) -> int:
    """Return the number of elements of all operands together."""
    return sum(torch.Size([term.at(sizes) for term in row]).numel() for row in pattern.operands)
