"""The time that a plan predicts."""

import pytest

from causalcone.engine.localize.tracer import TracePlan
from causalcone.runners.show.forecast import USUAL_EFFICIENCY, VERIFYING, predicted_seconds


def plan(flops, passes=1, read_bytes=0):
    return TracePlan(
        facts=1, passes=passes, rows=1, flops=flops, attention_flops=0, naive_flops=flops, peak_bytes=1,
        read_bytes=read_bytes,
    )  # fmt: skip


def test_operations_at_the_usual_efficiency():
    assert predicted_seconds(plan(7 * 10**12), 1e12) == pytest.approx(7 / USUAL_EFFICIENCY)


@pytest.mark.parametrize(("passes", "expected"), [(1, 10.0), (4, 10.0), (5, 10.0), (20, 40.0)])
def test_what_takes_longer_of_computing_and_reading(passes, expected):
    """Ten seconds of computing, and two of reading in every pass; nothing is computed while the engine is verified."""
    flops = round(10 * USUAL_EFFICIENCY * 1e12)
    found = predicted_seconds(plan(flops, passes, 2 * 10**9), 1e12, 1e9)
    assert found == pytest.approx(2 * VERIFYING + expected)
