"""The cases of the registry under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Our side alone is timed here, after its values have been compared with the peers'; ratios come from
`python -m benchmarks`, which times all sides in turn.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Case, prepare, registry
from benchmarks.measure import Place
from benchmarks.runner import agreeing


@pytest.mark.parametrize("case", registry("quick"), ids=lambda case: f"{case.suite}: {case.name}")
def test_case(case: Case, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Our side; the peers' agreement with it is checked first."""
    comparison = prepare(case, Place())
    for side in case.alone[1:]:  # which may take all memory, and so run in processes of their own
        del comparison.sides[side]
    timed, differences, missing = agreeing(comparison)
    benchmark.extra_info.update(case.params, missing=missing, differences=differences)
    benchmark.group = case.suite
    benchmark(next(iter(timed.values())))
