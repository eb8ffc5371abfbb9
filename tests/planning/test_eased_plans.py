"""Plans that keep less: bytes are charged a share of what is kept at that price."""

from __future__ import annotations

import numpy as np
import pytest

from autoparallel.planning.eased_plans import Eased
from planners import Problem, Variable, exact


@pytest.mark.parametrize("kept", [40.0, 30.0])
def test_the_price_is_a_share_of_what_is_kept_at_it(kept: float) -> None:
    """However much less than the quickest plan the first price keeps: there is no jump."""
    costs, usages = np.array([1.0, 1.04, 1.08]), np.array([100.0, kept, 10.0])
    problem = Problem((Variable("way", costs, usages),), ())
    quickest = exact.solve(problem)
    assert quickest.assignment == {"way": 0}
    # At a tenth of the quickest plan's seconds for its bytes, the second way would be best.
    first = exact.solve(problem.weighed(0.1 * quickest.cost / quickest.usage))
    assert first.assignment == {"way": 1}
    assert Eased("none", 0.1).solved(exact.solve, problem, quickest).assignment == {"way": 2}
