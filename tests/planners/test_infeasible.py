"""Problems that allow nothing: every solver says so, and the exact one names who is to blame."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from planners import Factor, InfeasibleError, Problem, Variable, exact, exhaustive, ilp

SOLVERS = pytest.mark.parametrize("solver", [exact, ilp, exhaustive], ids=lambda s: s.__name__)


@SOLVERS
def test_infeasible_by_one_table(solver: ModuleType) -> None:
    forbidden = np.full((2, 2), np.inf)
    variables = tuple(Variable(name, np.zeros(2)) for name in "abc")
    with pytest.raises(InfeasibleError) as raised:
        solver.solve(Problem(variables, (Factor(("c", "a"), forbidden),)))
    if solver is exact:
        assert raised.value.variables == ("a", "c")
        assert "a, c" in str(raised.value)


@SOLVERS
def test_infeasible_by_a_cycle_only(solver: ModuleType) -> None:
    """Three variables of two states that must all differ: every pair alone can."""
    differ = np.array([[np.inf, 0.0], [0.0, np.inf]])
    variables = tuple(Variable(name, np.zeros(2)) for name in "abcd")
    pairs = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]
    with pytest.raises(InfeasibleError) as raised:
        solver.solve(Problem(variables, tuple(Factor((p, q), differ) for p, q in pairs)))
    if solver is exact:
        assert raised.value.variables == ("a", "b", "c")


def test_infeasible_by_a_cycle_and_what_narrows_it() -> None:
    """Three variables of three states could differ, if others did not forbid them one state."""
    differ = np.where(np.eye(3) > 0, np.inf, 0.0)
    narrow = np.array([[0.0, 0.0, np.inf]])
    variables = tuple(Variable(name, np.zeros(3)) for name in "abcd")
    rulers = tuple(Variable(name, np.zeros(1)) for name in "xyz")
    cycle = tuple(Factor((p, q), differ) for p, q in ("ab", "bc", "ca", "cd"))
    rules = tuple(Factor((p, q), narrow) for p, q in ("xa", "yb", "zc"))
    with pytest.raises(InfeasibleError) as raised:
        exact.solve(Problem(variables + rulers, cycle + rules))
    assert raised.value.variables == ("a", "b", "c", "x", "y", "z")
    exact.solve(Problem(variables + rulers, cycle + rules[:2]))


def test_infeasible_far_apart() -> None:
    """Both ends of a chain of equalities want something else: all of it is to blame."""
    same = np.array([[0.0, np.inf], [np.inf, 0.0]])
    count = 50
    problem = Problem(
        tuple(Variable(f"v{i}", np.zeros(2)) for i in range(count)),
        tuple(Factor((f"v{i}", f"v{i + 1}"), same) for i in range(count - 1)),
    )
    with pytest.raises(InfeasibleError) as raised:
        exact.solve(problem.pinned({"v10": 0, "v40": 1}))
    assert raised.value.variables == tuple(f"v{i}" for i in range(10, 41))


def test_what_presolve_takes_for_impossible_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS 1.8.1 took a problem so whose least usage is within its limit."""
    run, asked = ilp._Program.run, list[bool]()

    def mistaken(self: Any, *arguments: Any, presolve: bool = True) -> Any:
        asked.append(presolve)
        return None if len(asked) == 1 else run(self, *arguments, presolve=presolve)

    ways = np.array([0.0, 1.0]), np.array([2.0, 0.0])
    monkeypatch.setattr(ilp._Program, "run", mistaken)
    assert ilp.solve(Problem(tuple(Variable(name, *ways) for name in "ab"), limit=2.0)).cost == 1.0
    assert asked == [True, True, False]
