"""thresholds.py: a threshold lets through what it says, and what is found at it; reading a run's thresholds."""

import numpy as np
import pandas as pd
import pytest
import torch
from builders import copy_run

from dreml import thresholds
from dreml.cli import InputError
from dreml.runs import read_run
from dreml.thresholds import COLUMNS, read_threshold, threshold_at, threshold_table


@pytest.mark.parametrize("far", [0.1, 0.01, 0.25, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_a_threshold_lets_its_share_through(far, tied):
    """As near below the share as ties allow: the next lower value would let too many through."""
    values = np.random.default_rng(0).uniform(-1, 1, size=2000)
    values = (values.round(2) if tied else values).astype(np.float32)
    threshold = threshold_at(torch.from_numpy(values), far)
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
    values = torch.linspace(0, 1, 1000)
    assert threshold_at(values, 0.01) is not None and threshold_at(values[1:], 0.01) is None
    values[:1] = -torch.inf
    assert threshold_at(values, 0.01) is None
    assert threshold_at(torch.full((1000,), -torch.inf), 1.0) is None
    assert threshold_at(torch.ones(1000), 0.1) == pytest.approx(1.000001)


def test_found_are_right_first_neighbours_at_or_above_the_threshold(monkeypatch):
    others = torch.tensor([0.2, 0.8, 0.5, 0.1, -torch.inf, 0.1])
    own = torch.tensor([0.6, 0.7, 0.5 + 2e-7, 0.3, 0.4, -torch.inf])
    for threshold, expected in ((-1.0, 3), (0.3, 3), (0.300001, 2), (0.6, 1), (0.600001, 0)):
        monkeypatch.setattr(thresholds, "threshold_at", lambda *_, threshold=threshold: threshold)
        table = threshold_table(others[None], own[None], 6)
        assert table.found[0] == pytest.approx(100 * expected / 6)


def test_the_table_has_a_row_for_each_size_and_rate():
    generator = torch.Generator().manual_seed(0)
    others, own = torch.rand((2, 1000), generator=generator), torch.rand((2, 1000), generator=generator)
    table = threshold_table(others, own, 77)
    assert list(table.columns) == list(COLUMNS) and (table.queries == 1000).all() and (table.gallery == 77).all()
    assert list(zip(table.ensemble_size, table.far, strict=True)) == [(1, 0.1), (1, 0.01), (2, 0.1), (2, 0.01)]
    for row in table.itertuples():
        of_others, of_own = others[row.ensemble_size - 1], own[row.ensemble_size - 1]
        assert (of_others >= row.threshold).double().mean() == pytest.approx(row.far)
        right = (of_own > of_others) & (of_own >= row.threshold)
        assert row.found == pytest.approx(100 * right.double().mean().item())


def test_reading_a_threshold(tiny_run, tmp_path):
    """The row of this ensemble size and rate; else one line that says which there are, or which command makes them."""
    folder = copy_run(tiny_run, tmp_path / "run")
    path = folder / "thresholds.csv"
    rows = [(1, 0.1, 0.5, 90.0, 200, 300), (2, 0.1, 0.625, 80.0, 200, 300), (2, 0.05, 0.75, 70.0, 200, 300)]

    def refused(size: int, far: float) -> str:
        with pytest.raises(InputError) as refusal:
            read_threshold(read_run(folder, size, "logits"), "logits", far)
        return str(refusal.value)

    command = f"make it with: python evaluate.py {folder} --embedding logits"
    assert refused(1, 0.1).startswith(f"far needs {path}, which is missing") and refused(1, 0.1).endswith(command)
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(path, index=False, float_format="%.6f")
    assert read_threshold(read_run(folder, 1, "logits"), "logits", 0.1) == 0.5
    assert read_threshold(read_run(folder, 2, "logits"), "logits", 0.05) == 0.75
    others = "; what would do: far 0.1, far 0.05, or a threshold of your own"
    reason = ": it takes 1,000 test queries, and there are 36"
    assert refused(2, 0.01) == f"{path} has none for far 0.01 and ensemble size 2{reason}{others}"
    assert refused(2, 0.5) == f"{path} has none for far 0.5 and ensemble size 2{others}"
    pd.DataFrame(rows[1:], columns=list(COLUMNS)).to_csv(path, index=False)
    assert f"what would do: {command}; or" in refused(1, 0.1)
    for damage in ("ensemble_size,far\n1,0.1\n", "", "\0"):
        path.write_text(damage)
        assert "is missing or damaged" in refused(2, 0.1)
