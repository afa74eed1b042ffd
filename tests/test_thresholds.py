"""thresholds.py: a threshold lets through what it says, and what is found at it."""

import numpy as np
import pandas as pd
import pytest

from dreml import thresholds
from dreml.thresholds import COLUMNS, threshold_at, threshold_table


def queries_of(other: np.ndarray, own: np.ndarray | None = None) -> pd.DataFrame:
    """Queries with these similarities, right where the own class is more similar."""
    own = np.zeros_like(other) if own is None else own
    return pd.DataFrame({"own": own, "other": other, "right": own > other}).astype({"own": "f4", "other": "f4"})


@pytest.mark.parametrize("far", [0.1, 0.01, 0.25, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_a_threshold_lets_its_share_through(far, tied):
    """As near below the share as ties allow: the next lower value would let too many through."""
    values = np.random.default_rng(0).uniform(-1, 1, size=2000)
    values = (values.round(2) if tied else values).astype(np.float32)
    threshold = threshold_at(queries_of(values), far)
    rounded = values.astype(float).round(6)
    assert (rounded >= threshold - 1e-9).mean() <= far
    lower = rounded[rounded < threshold - 1e-9]
    if far < 1:
        assert (rounded >= lower.max()).mean() > far
        assert tied or (rounded >= threshold - 1e-9).mean() == far
    else:
        assert threshold == -1 and not len(lower)


def test_no_threshold_where_fewer_than_ten_are_expected_above_it():
    """Queries without an image of another class are none. Of equal similarities, none passes."""
    values = np.linspace(0, 1, 1000)
    assert threshold_at(queries_of(values), 0.01) is not None and threshold_at(queries_of(values[1:]), 0.01) is None
    values[:1] = -np.inf
    assert threshold_at(queries_of(values), 0.01) is None
    assert threshold_at(queries_of(np.full(1000, -np.inf)), 1.0) is None
    assert threshold_at(queries_of(np.ones(1000)), 0.1) == pytest.approx(1.000001)


def test_found_are_right_first_neighbours_at_or_above_the_threshold(monkeypatch):
    """What is right counts, and no similarity alone: a tie is more similar by less than the tolerance."""
    queries = queries_of(np.array([0.2, 0.8, 0.5, 0.1, -np.inf]), np.array([0.6, 0.7, 0.5 + 2e-7, 0.3, 0.4]))
    queries.loc[2, "right"] = False
    for threshold, expected in ((-1.0, 3), (0.3, 3), (0.300001, 2), (0.6, 1), (0.600001, 0)):
        monkeypatch.setattr(thresholds, "threshold_at", lambda *_, threshold=threshold: threshold)
        assert threshold_table(queries, 5).found[0] == pytest.approx(100 * expected / 5)


def test_the_table_has_a_row_for_each_rate():
    generator = np.random.default_rng(0)
    queries = queries_of(generator.random(1000), generator.random(1000))
    table = threshold_table(queries, 77)
    assert list(table.columns) == COLUMNS and (table.queries == 1000).all() and (table.gallery == 77).all()
    assert table.far.tolist() == [0.1, 0.01]
    for row in table.itertuples():
        assert (queries.other.round(6) >= row.threshold).mean() == pytest.approx(row.far)
        assert row.found == pytest.approx(100 * (queries.right & (queries.own.round(6) >= row.threshold)).mean())
