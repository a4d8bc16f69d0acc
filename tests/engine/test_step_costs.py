"""Predicted durations of steps."""

import math

import pytest

from llmsrv.engine.step_costs import StepCosts


def test_unmeasured_costs_are_interpolated() -> None:
    costs = StepCosts()
    assert costs.of(1) == 0 and costs.rows_within(1.0) == math.inf
    costs.record(1, 0.005)
    costs.record(64, 0.05)
    assert costs.of(1) == 0.005 and costs.of(8) == pytest.approx(0.01)
    assert costs.of(64) == 0.05 and costs.of(128) == 0.1
    assert costs.rows_within(0.01) == 2  # more once these are measured
    costs.record(8, 0.012)
    for limit_s in (0.005, 0.012, 0.015, 0.05, 0.2):
        assert costs.of(round(costs.rows_within(limit_s))) == pytest.approx(limit_s, rel=0.1)


def test_costs_below_all_measurements_are_extrapolated() -> None:
    costs = StepCosts()
    costs.record(128, 0.07)
    assert costs.of(1) == pytest.approx(0.07 / 128)  # a lower bound
    costs.record(8, 0.01)
    assert costs.of(1) == pytest.approx(0.01 - 7 * 0.0005)


def test_one_slow_step_changes_little_and_is_soon_forgotten() -> None:
    costs = StepCosts()
    costs.record(16, 0.01)
    costs.record(16, 3.0)
    assert costs.of(16) <= 0.0125
    costs = StepCosts()
    costs.record(16, 3.0)
    for _ in range(25):
        costs.record(16, 0.01)
    assert costs.of(16) < 0.015


def test_a_measured_step_bounds_the_costs_of_others() -> None:
    costs = StepCosts()
    for rows, cost_s in ((1, 0.1), (8, 0.1), (64, 0.1)):
        costs.record(rows, cost_s)
    for _ in range(100):
        costs.record(8, 0.01)
    assert [costs.of(rows) for rows in (1, 8, 64)] == pytest.approx([0.01, 0.01, 0.08])
    for _ in range(100):
        costs.record(64, 0.4)
    assert [costs.of(rows) for rows in (1, 8, 64)] == pytest.approx([0.01, 0.05, 0.4])
