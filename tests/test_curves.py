"""figures/curves.py: the curves show their tables."""

import numpy as np
import pandas as pd
import pytest

from dreml.curves import draw_comparison, draw_found, draw_recall, draw_training
from dreml.runs import read_run
from dreml.style import drawing


def test_the_curves_show_the_tables():
    sizes = pd.DataFrame({"ensemble_size": [1, 2, 3], "R@1": [10.0, 20, 30], "R@5": [40.0, 50, 60], "mAP@R": [1.0] * 3})
    alone = pd.DataFrame({"member": [1, 2, 3], "R@1": [10.0, 14, 12], "R@5": [0.0] * 3})
    with drawing():
        axes = draw_recall(sizes, alone).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["R@1", "R@5", "each member alone, R@1", "their mean, 12.0 %"]
    assert lines["R@5"].get_xydata().tolist() == [[1, 40], [2, 50], [3, 60]]
    assert lines["each member alone, R@1"].get_xydata().tolist() == [[1, 10], [2, 14], [3, 12]]
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in list(lines.values())[:2]]
    assert all(first != second for first, second in zip(*styles, strict=True))
    assert axes.get_xlabel() == "ensemble size (members)" and axes.get_ylabel() == "Recall@K (%)"
    baseline = pd.DataFrame({"baseline": ["a", "b"], "R@1": [7.0, 8], "R@5": [0.0, 0]})
    with drawing():
        lines, others = (draw_recall(sizes, alone, table).axes[0].lines for table in (baseline, baseline[["baseline"]]))
    assert [(line.get_label(), line.get_ydata()[0]) for line in lines[4:]] == [("a, 7.0 %", 7), ("b, 8.0 %", 8)]
    assert len({line.get_linestyle() for line in lines[4:]}) == 2 and len(others) == 4


def test_the_thresholds_curve_shows_its_table():
    """A curve for each size; without any threshold, empty axes."""
    curves = pd.DataFrame({"ensemble_size": [1, 1, 4, 4], "far": [0.01, 0.1] * 2, "found": [10.0, 20, 30, 40]})
    with drawing():
        axes, empty = (draw_found(table).axes[0] for table in (curves, curves[:0]))
    assert [line.get_label() for line in axes.lines] == ["1 member", "4 members"]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 10], [10, 20]], [[1, 30], [10, 40]]]
    assert axes.get_xscale() == "log" and "(%)" in axes.get_xlabel() and not empty.lines


def test_training_curves_show_the_histories(tiny_run):
    records = [record for _, record in sorted(read_run(tiny_run).members.records.items())]
    with drawing():
        figure = draw_training(records)
    loss, accuracy = figure.axes
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["training loss (nats)", "training accuracy (%)"] and accuracy.get_xlabel() == "epoch"
    histories = [pd.DataFrame(record.history) for record in records]
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        curves = [line.get_ydata() for line in axes.lines]
        assert [len(curve) for curve in curves] == [2, 1, 2, 1, 2]  # each member, its best epoch; the mean
        np.testing.assert_allclose(curves[0], histories[0][name])
        np.testing.assert_allclose(curves[2], histories[1][name])
        np.testing.assert_allclose(curves[4], (histories[0][name] + histories[1][name]) / 2)
        assert [float(curves[place][0]) for place in (1, 3)] == [
            history[name][record.best_epoch] for history, record in zip(histories, records, strict=True)
        ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a member", "epoch that is kept", "mean of 2"]


@pytest.mark.parametrize("size", [1, 48])
def test_small_and_large_ensembles_have_whole_numbers_at_the_axis(size):
    values = {"ensemble_size": range(1, size + 1), "R@1": np.linspace(30, 80, size)}
    with drawing():
        figure = draw_recall(pd.DataFrame(values), pd.DataFrame({"member": [1], "R@1": [30.0]}))
    ticks = figure.axes[0].get_xticks().tolist()
    assert ticks == ([1] if size == 1 else [1, 5, 10, 15, 20, 25, 30, 35, 40, 45])


def test_the_comparison_has_a_band_for_seeds():
    curves = [("two", np.array([[10.0, 20], [20, 40]])), ("one", np.array([[50.0]]))]
    with drawing():
        axes = draw_comparison(curves, "R@1").axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 15], [2, 30]], [[1, 50]]]
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(15 - 50**0.5) and heights.max() == pytest.approx(30 + 200**0.5)
