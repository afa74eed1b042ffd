"""Curves: recall against the ensemble size, training, comparisons of runs. Call them inside `style.drawing()`."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dreml.runs import MemberRecord
from dreml.style import COLORS, LEGEND, line_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_recall(sizes: pd.DataFrame, alone: pd.DataFrame, baseline: pd.DataFrame | None = None) -> "Figure":
    """Recall@K against the ensemble size; at the first K, each member alone and what finds images without training.

    The first two tables are those of evaluate.py, the third is `baseline.csv`.
    """
    figure = new_figure(2.9)
    axes = figure.subplots()
    names = [name for name in sizes if name.startswith("R@")]
    mean, curves = alone[names[0]].mean(), []
    for number, name in enumerate(names):
        curves += axes.plot(sizes.ensemble_size, sizes[name], label=name, **line_style(number, len(sizes)))
    dots = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": "#666666", "zorder": 4}
    dots["markersize"] = 5.5 if len(alone) <= 16 else 3
    (members,) = axes.plot(alone.member, alone[names[0]], linestyle="", label=f"each member alone, {names[0]}", **dots)
    dotted = {"color": "#666666", "linestyle": (0, (1, 1)), "linewidth": 1}
    average = axes.axhline(mean, label=f"their mean, {mean:.1f} %", **dotted)
    before = []
    for number, row in enumerate(baseline.to_dict("records") if baseline is not None and names[0] in baseline else []):
        line = {"color": "#666666", "linestyle": ("--", "-.")[number % 2], "linewidth": 1}
        label = f"{row['baseline']}, {row[names[0]]:.1f} %"
        before.append(axes.axhline(row[names[0]], label=label, **line))
    axes.set_ylabel("Recall@K (%)")
    set_size_axis(axes, len(sizes))
    figure.legend(handles=curves, loc="outside upper center", ncols=min(len(names), 4), **LEGEND)
    figure.legend(handles=[members, average, *before], loc="outside lower center", ncols=2, **LEGEND)
    return figure


def draw_found(curves: pd.DataFrame) -> "Figure":
    """The share of queries that find their class against the false-accept rate, for a few ensemble sizes.

    `curves` has the columns ensemble_size, far and found (percent).
    """
    figure = new_figure(2.9)
    axes = figure.subplots()
    for number, (size, rows) in enumerate(curves.groupby("ensemble_size")):
        label = f"{size} members" if size > 1 else "1 member"
        axes.plot(100 * rows.far, rows.found, label=label, **line_style(number, len(rows)))
    axes.set_xscale("log")
    axes.set_xlabel("false-accept rate (%)")
    axes.set_ylabel("found, and right (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    if len(curves):
        figure.legend(loc="outside upper center", ncols=4, **LEGEND)
    return figure


def draw_training(records: list[MemberRecord]) -> "Figure":
    """Loss and accuracy of every epoch: all members and their mean."""
    figure = new_figure(3.6)
    panels = figure.subplots(2, sharex=True)
    draw_histories(panels[0], records, "loss")
    draw_histories(panels[1], records, "accuracy")
    panels[0].set_ylabel("training loss (nats)")
    panels[1].set_ylabel("training accuracy (%)")
    panels[1].set_xlabel("epoch")
    panels[1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, **LEGEND)
    figure.align_ylabels()
    return figure


def draw_histories(axes: "Axes", records: list[MemberRecord], name: str) -> None:
    """A column of the members' histories against the epoch, the epoch that each member keeps, and the mean."""
    histories = [pd.DataFrame(record.history) for record in records]
    thin = {"color": COLORS[0], "linewidth": 0.7, "alpha": max(0.25, 1 / len(records) ** 0.5)}
    dot = {"color": COLORS[0], "marker": "o", "markersize": 3 if len(records) <= 16 else 2, "linestyle": ""}
    for record, history in zip(records, histories, strict=True):
        best = history.iloc[record.best_epoch]
        (line,) = axes.plot(history.epoch, history[name], **thin)
        (kept,) = axes.plot(best.epoch, best[name], **dot)
    line.set_label("a member")
    kept.set_label("epoch that is kept")
    if len(records) > 1:
        mean = pd.concat(histories).groupby("epoch")[name].mean()
        axes.plot(mean.index, mean, color=COLORS[1], linestyle="--", linewidth=1.5, label=f"mean of {len(records)}")


def draw_comparison(curves: list[tuple[str, np.ndarray]], score: str) -> "Figure":
    """One score against the ensemble size, for each (label, values `(runs, L)` in percent): mean and, shaded, ± std."""
    figure = new_figure(2.5 + 0.14 * sum(label.count("\n") + 1 for label, _ in curves))
    axes = figure.subplots()
    for number, (label, values) in enumerate(curves):
        sizes, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
        style = line_style(number, len(sizes))
        if len(values) > 1:
            std = values.std(0, ddof=1)
            axes.fill_between(sizes, mean - std, mean + std, color=style["color"], alpha=0.2, linewidth=0)
        axes.plot(sizes, mean, label=label, **style)
    axes.set_ylabel(f"{score} (%)")
    set_size_axis(axes, max(values.shape[1] for _, values in curves))
    figure.legend(loc="outside lower center", **LEGEND)
    return figure


def set_size_axis(axes: "Axes", size: int) -> None:
    """The horizontal axis for the ensemble sizes 1 to `size`."""
    step = -(-size // 10)
    axes.set_xlabel("ensemble size (members)")
    axes.set_xticks(sorted({1, *range(step, size + 1, step)}))
    axes.set_xlim(0.8 - 0.03 * size, 0.2 + 1.03 * size)
