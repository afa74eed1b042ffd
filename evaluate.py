"""Scores runs again from their saved embeddings: Recall@K, mAP@R, R-Precision. Needs no images and trains nothing.

    python evaluate.py results/RUN --recalls 1,10,100 --plot      evaluation.csv, members.csv and figures, into the run
    python evaluate.py results/demo_* --output compared           several runs in one table; all files go to compared/

Each run: every ensemble size, and each member alone. Several runs: runs that differ only in their seed also as mean
and sample standard deviation. mAP@R and R-Precision: Musgrave et al., "A Metric Learning Reality Check", ECCV 2020.
"""

import argparse
import contextlib
import importlib.util
import itertools
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from model import EMBEDDINGS
from train import (
    DEVICE_HELP,
    Members,
    Truth,
    default_recalls,
    make_folder,
    open_run,
    pick_device,
    recall_list,
    recall_percent,
    saved_parts,
    with_less_memory,
    write_csv,
)
from utils import InputError, Parser, atomic_open, map_at_r, natural_number, one_line, run_main

if TYPE_CHECKING:  # matplotlib is imported where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEST_COLUMNS = {"path": str, "label": np.int64, "is_query": bool, "is_gallery": bool, "class_name": str}

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description=__doc__)
    scores = parser.add_argument_group("what is scored").add_argument
    scores(
        "folders",
        nargs="+",
        type=Path,
        metavar="RUN_FOLDER",
        help="run folders of train.py, such as results/car_resnet18_D12_e20_s0",
    )
    recalls_help = "Recall@K (default: 1,2,4,8; for isc 1,10,20,30)"
    scores("--recalls", type=recall_list, metavar="K,K", help=recalls_help)
    scores("--num_members", type=natural_number, metavar="L", help="members 1 to L (default: all that are finished)")
    add_embedding_option(scores)
    rest = parser.add_argument_group("the rest").add_argument
    rest("--plot", action="store_true", help="draw Recall@K and the training curves, as PNG and SVG")
    output_help = "write into DIR, nothing into the run folders (default: each run's files into its folder)"
    rest("--output", type=Path, metavar="DIR", help=output_help)
    rest("--device", default="auto", help=DEVICE_HELP)
    return parser.parse_args(argv)


def add_embedding_option(add) -> None:
    """`--embedding`, for an argument group's `add_argument`."""
    embedding_help = "logits (default), or pooled: the features before the last layer"
    add("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)


# ------------------------------------------------------------------------------------------------ a finished run


@dataclass
class Run:
    """A run folder, the first of its finished members, and the test split that they embedded."""

    folder: Path
    record: dict  # args.json, see utils.RUN_RECORD
    members: Members
    num_members: int
    test: pd.DataFrame  # TEST_COLUMNS; row i is row i of the embeddings

    @property
    def settings(self) -> dict:
        return self.record["settings"]

    @property
    def truth(self) -> Truth:
        columns = (self.test[name].to_numpy(copy=True) for name in ("label", "is_query", "is_gallery"))
        return Truth(*map(torch.from_numpy, columns))

    def check(self, embedding: str) -> None:
        """Raises InputError unless every member has this embedding."""
        self.members.look(embedding)
        missing = self.members.missing(range(1, self.num_members + 1), embedding)
        if missing:
            raise InputError(
                f"{self.folder}: the {embedding} embedding of member {missing[0]} is missing; the training command "
                f"with --embedding {embedding} makes it from the saved member"
            )

    def parts(self, embedding: str, device: torch.device) -> list[torch.Tensor]:
        """The members' outputs for the test images, `(M, d) float32` each, on the device."""
        parts = saved_parts(self.folder, self.members, self.num_members, embedding, device)
        if any(len(part) != len(self.test) for part in parts):
            raise InputError(f"{self.folder / 'test.csv'} has {len(self.test)} images, the embeddings {len(parts[0])}")
        return parts


def read_run(folder: Path, num_members: int | None = None) -> Run:
    """Opens a run folder with its members 1 to `num_members`; None: up to the first that is missing. Writes nothing.

    Raises InputError for a folder that is no run, is damaged or has too few members.
    """
    record, members = open_run(folder)
    finished = next(member for member in itertools.count() if member + 1 not in members.records)
    if finished == 0:
        raise InputError(f"{folder}: member 1 is missing, and so every ensemble; train.py trains it")
    if num_members and num_members > finished:
        raise InputError(f"--num_members {num_members}: {folder} has {finished}, member {finished + 1} is missing")
    path = folder / "test.csv"
    try:
        test = pd.read_csv(path, usecols=list(TEST_COLUMNS), dtype=TEST_COLUMNS, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is missing or damaged ({one_line(error)}); train.py writes it again") from None
    return Run(folder, record, members, num_members or finished, test)


def show(text: str) -> None:
    """Prints a text; characters that the terminal's encoding lacks as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


# ------------------------------------------------------------------------------------------------ scores


def scores(run: Run, parts: list[torch.Tensor], ks: list[int]) -> np.ndarray:
    """`(L, len(ks) + 2) float64` in percent: Recall@K, mAP@R, R-Precision of the first l parts."""
    truth = run.truth
    recalls = recall_percent(parts, ks, truth)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no other image of their class")  # `evaluated` says so once
        precisions = with_less_memory(lambda max_bytes: torch.stack(map_at_r(parts, *truth, max_bytes)), 2**30)
    return np.concatenate([recalls, 100 * precisions.T.numpy()], axis=1)


def evaluated(run: Run, ks: list[int], embedding: str, device: torch.device) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables in percent: one row for every ensemble size, and one for each member alone."""
    num_lone = int(run.truth.lone_queries().sum())
    parts = run.parts(embedding, device)
    if num_lone:
        print(
            f"{num_lone} queries have no other image of their class in the gallery: they count as misses in Recall@K "
            "and are left out of mAP@R and R-Precision"
        )
    tables = []
    bar = tqdm(parts, f"{run.folder.name}: each member alone", delay=1, leave=False, disable=None)
    for index, values in (
        ("ensemble_size", scores(run, parts, ks)),
        ("member", np.concatenate([scores(run, [part], ks) for part in bar])),
    ):
        table = pd.DataFrame(values, columns=[*(f"R@{k}" for k in ks), "mAP@R", "R-Precision"])
        table.insert(0, index, range(1, len(parts) + 1))
        tables.append(table)
    return tables[0], tables[1]


# ------------------------------------------------------------------------------------------------ several runs


def grouped(runs: list[Run]) -> list[list[int]]:
    """The numbers of the runs that differ only in their seed, together; in the order of their first one."""
    groups: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        groups.setdefault(repr(sorted(identity(run).items())), []).append(number)
    for numbers in groups.values():
        by_seed: dict[int, Path] = {}
        for run in (runs[number] for number in numbers):
            other = by_seed.setdefault(run.settings["seed"], run.folder)
            if other is not run.folder:
                raise InputError(f"{other} and {run.folder} are the same run, seed {run.settings['seed']}: give one")
    return list(groups.values())


def identity(run: Run) -> dict:
    """What defines the members of a run beside its seed."""
    settings = {name: value for name, value in run.settings.items() if name != "seed"}
    return settings | {"cache": run.record["data"]["fingerprint"][:8]}


def group_name(runs: list[Run]) -> str:
    """The name of the run folder; of several, with s* in place of the seeds."""
    if len(runs) == 1:
        return run_label(runs[0])
    names = (re.sub(rf"_s{run.settings['seed']}(?=_|$)", "_s*", run_label(run)) for run in runs)
    return ", ".join(dict.fromkeys(names))


def run_label(run: Run) -> str:
    return run.folder.resolve().name


def compared(runs: list[Run], tables: list[pd.DataFrame], groups: list[list[int]]) -> pd.DataFrame:
    """A row for each group of several runs, with mean and sample standard deviation, and one for each run.

    All at the largest ensemble size that every run has. Columns: run, seeds, n, ensemble_size, then each score and
    score_std, NaN where n is 1.
    """
    size = min(len(table) for table in tables)
    rows = []
    for numbers in groups:
        several = [numbers] if len(numbers) > 1 else []
        for chosen in [*several, *([number] for number in numbers)]:
            of_group = [runs[number] for number in chosen]
            row = {"run": group_name(of_group), "seeds": " ".join(str(run.settings["seed"]) for run in of_group)}
            row |= {"n": len(chosen), "ensemble_size": size}
            values = pd.DataFrame([tables[number].iloc[size - 1, 1:] for number in chosen])
            for name in values:
                row |= {name: values[name].mean(), f"{name}_std": values[name].std(ddof=1)}
            rows.append(row)
    return pd.DataFrame(rows)


def comparison_text(table: pd.DataFrame) -> str:
    """The table of `compared` for people."""
    columns = {"run": table.run, "seeds": table.seeds, "n": table.n}
    for name in table.columns[4::2]:
        pairs = zip(table[name], table[f"{name}_std"], strict=True)
        columns[name] = [f"{mean:.2f}" if np.isnan(std) else f"{mean:.2f} ± {std:.2f}" for mean, std in pairs]
    return pd.DataFrame(columns).to_string(index=False)


# ------------------------------------------------------------------------------------------------ figures

COLUMN_WIDTH = 3.4  # inches: one of two columns of a page
# Told apart by the colour-blind, and by line and marker without any colour.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
LINES, MARKERS = ["-", "--", "-.", ":"], ["o", "s", "^", "D", "v", "P", "X"]
LEGEND = {"handlelength": 2.6, "columnspacing": 1.2}
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "svg.hashsalt": "dreml",  # the same file each time
}


def check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("drawing needs matplotlib: pip install -r requirements.txt")


@contextlib.contextmanager
def drawing(texts: Iterable[str] = (), style: dict | None = None) -> Iterator[dict[int, str]]:
    """matplotlib's settings while a figure is made and saved, with fonts for the characters of `texts`.

    Yields a table for `str.translate`: what no installed font has, and control characters, become boxes.
    """
    import matplotlib

    families, boxes = fonts_for(texts)
    with matplotlib.rc_context({"font.family": families, **STYLE, **(style or {})}):
        yield boxes


def fonts_for(texts: Iterable[str]) -> tuple[list[str], dict[int, str]]:
    """The fonts that are needed for all characters, DejaVu Sans first, and "□" for each character that none has."""
    from matplotlib import font_manager, get_data_path

    wanted = {ord(character) for text in texts for character in text}
    missing = {code for code in wanted if chr(code).isprintable()}
    families, others = [], {}
    for font in font_manager.fontManager.ttflist:
        upright = font.style == "normal" and font.weight in ("normal", "regular", 400)
        # matplotlib's other own fonts are for formulas, or draw every character as a box.
        if upright and (font.name == "DejaVu Sans" or not font.fname.startswith(get_data_path())):
            others[font.name] = font.fname
    for name in sorted(others, key=lambda name: (name != "DejaVu Sans", name)):
        found = missing & set(font_manager.get_font(others[name]).get_charmap()) if missing else set()
        if found or not families:
            families.append(name)
            missing -= found
    if missing:
        examples = "".join(map(chr, sorted(missing)[:10]))
        print(f"warning: no installed font can draw {examples} (boxes in the picture)", file=sys.stderr)
    control = {code for code in wanted if not chr(code).isprintable()}
    return families, dict.fromkeys(missing | control, "□")


def new_figure(height: float) -> "Figure":
    """A figure for one column, `height` inches; its layout keeps texts apart."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and picks a window system

    return Figure((COLUMN_WIDTH, height), layout="constrained")


def save_figure(figure: "Figure", folder: Path, name: str, suffixes: Sequence[str] = ("png", "svg")) -> None:
    """Writes NAME.png and NAME.svg."""
    for suffix in suffixes:
        with atomic_open(folder / f"{name}.{suffix}", "wb") as file:
            figure.savefig(file, format=suffix, metadata={"Date": None} if suffix == "svg" else None)


def line_style(number: int, num_points: int) -> dict:
    """Colour, line and marker of the curve with this number; about ten markers on a long curve."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markevery": max(1, -(-num_points // 12)),
    }


def size_axis(axes: "Axes", size: int) -> None:
    """The horizontal axis for the ensemble sizes 1 to `size`."""
    step = -(-size // 10)
    axes.set_xlabel("ensemble size (members)")
    axes.set_xticks(sorted({1, *range(step, size + 1, step)}))
    axes.set_xlim(0.8 - 0.03 * size, 0.2 + 1.03 * size)


def draw_recall(sizes: pd.DataFrame, alone: pd.DataFrame) -> "Figure":
    """Recall@K against the ensemble size, and each member alone at the first K."""
    figure = new_figure(2.9)
    axes = figure.subplots()
    names = [name for name in sizes if name.startswith("R@")]
    mean, curves = alone[names[0]].mean(), []
    for number, name in enumerate(names):
        curves += axes.plot(sizes.ensemble_size, sizes[name], label=name, **line_style(number, len(sizes)))
    dots = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": "#666666", "zorder": 4}
    dots["markersize"] = 5.5 if len(alone) <= 16 else 3
    (lone,) = axes.plot(alone.member, alone[names[0]], linestyle="", label=f"each member alone, {names[0]}", **dots)
    dotted = {"color": "#666666", "linestyle": (0, (1, 1)), "linewidth": 1}
    average = axes.axhline(mean, label=f"their mean, {mean:.1f} %", **dotted)
    axes.set_ylabel("Recall@K (%)")
    size_axis(axes, len(sizes))
    figure.legend(handles=curves, loc="outside upper center", ncols=min(len(names), 4), **LEGEND)
    figure.legend(handles=[lone, average], loc="outside lower center", ncols=2, **LEGEND)
    return figure


def draw_training(run: Run) -> "Figure":
    """Loss and accuracy of every epoch, all members and their mean."""
    figure = new_figure(3.6)
    records = [run.members.records[member] for member in range(1, run.num_members + 1)]
    histories = [pd.DataFrame(record["history"]) for record in records]
    panels = figure.subplots(2, sharex=True)
    for axes, name, label in zip(
        panels, ("loss", "accuracy"), ("training loss (nats)", "training accuracy (%)"), strict=True
    ):
        for number, (record, history) in enumerate(zip(records, histories, strict=True)):
            best = history.iloc[record["best_epoch"]]
            thin = {"color": COLORS[0], "linewidth": 0.7, "alpha": max(0.25, 1 / len(records) ** 0.5)}
            axes.plot(history.epoch, history[name], label="a member" if number == 0 else None, **thin)
            dot = {"color": COLORS[0], "marker": "o", "markersize": 3 if len(records) <= 16 else 2, "linestyle": ""}
            axes.plot(best.epoch, best[name], label="epoch that is kept" if number == 0 else None, **dot)
        mean = pd.concat(histories).groupby("epoch")[name].mean()
        if len(records) > 1:
            axes.plot(mean.index, mean, color=COLORS[1], linestyle="--", linewidth=1.5, label=f"mean of {len(records)}")
        axes.set_ylabel(label)
    panels[1].set_xlabel("epoch")
    panels[1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, **LEGEND)
    figure.align_ylabels()
    return figure


def draw_comparison(curves: list[tuple[str, np.ndarray]], score: str) -> "Figure":
    """One score against the ensemble size: for each (label, values `(runs, L)` in percent) mean and, shaded, ± std."""
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
    size_axis(axes, max(values.shape[1] for _, values in curves))
    figure.legend(loc="outside lower center", **LEGEND)
    return figure


def group_labels(groups: list[list[Run]]) -> list[str]:
    """What tells each group from the others, for a legend."""
    identities = [identity(runs[0]) for runs in groups]
    keys = dict.fromkeys(key for one in identities for key in one)  # in order
    differing = [key for key in keys if len({repr(one.get(key)) for one in identities}) > 1]
    differing = [key for key in differing if key != "cache"] or differing  # a checksum says little to people
    labels = []
    for runs, one in zip(groups, identities, strict=True):
        settings = ", ".join(f"{key} {one.get(key)}" for key in differing) or group_name(runs)
        labels.append(f"{settings} ({len(runs)} seeds)" if len(runs) > 1 else settings)
    return labels


# ------------------------------------------------------------------------------------------------ the evaluation


def run(args: argparse.Namespace) -> None:
    # 1. Whatever can be wrong is found before anything is computed
    if args.plot:
        check_matplotlib()
    device = pick_device(args.device)
    runs = [read_run(folder, args.num_members) for folder in args.folders]
    groups, several = grouped(runs), len(runs) > 1
    targets = [one.folder if not args.output else args.output / (run_label(one) * several) for one in runs]
    if len(set(targets)) < len(targets):
        raise InputError("two run folders have the same name: --output would mix their files; rename one")
    ks = args.recalls or common_recalls(runs)
    suffix = "" if args.embedding == "logits" else f"_{args.embedding}"
    for one in runs:
        one.check(args.embedding)
        num_gallery = int(one.test.is_gallery.sum())
        if max(ks) >= num_gallery:
            raise InputError(
                f"--recalls: {max(ks)} is not below the number of gallery images of {one.folder}, {num_gallery}"
            )

    # 2. Each run
    results = []
    for scored, target in zip(runs, targets, strict=True):
        sizes, alone = evaluated(scored, ks, args.embedding, device)
        results.append(sizes)
        first = sizes.columns[1]
        show(f"{scored.folder}: {args.embedding}, percent")
        print(sizes.assign(alone=alone[first]).round(2).to_string(index=False))
        print(f"(alone: {first} of the last member of the row by itself)")
        write_results(scored, target, suffix, sizes, alone, args.plot)
        show(f"{target}/: evaluation{suffix}.csv, members{suffix}.csv{', figures' * args.plot}\n")

    # 3. All of them together
    if several:
        table = compared(runs, results, groups)
        show(f"{table.ensemble_size[0]} members, {args.embedding}, percent (mean ± sample standard deviation)")
        show(comparison_text(table))
        if args.output:
            write_comparison(runs, args.output, suffix, results, groups, table, args.plot)
        else:
            print("(--output DIR writes this table, and with --plot a figure of it)")


def common_recalls(runs: Sequence[Run]) -> list[int]:
    """The default of --recalls: the data set's own, if all runs are of one that has any."""
    names = list(dict.fromkeys(run.settings["data_name"] for run in runs))
    return default_recalls(names[0] if len(names) == 1 else "")


@contextlib.contextmanager
def writable(folder: Path, option: str = "--output") -> Iterator[None]:
    """Makes a folder for what the block writes; InputError, naming the option to change, where that cannot be done."""
    make_folder(folder)
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({one_line(error)}); {option} names another folder") from None


def write_results(run: Run, folder: Path, suffix: str, sizes: pd.DataFrame, alone: pd.DataFrame, plot: bool) -> None:
    """evaluation.csv and members.csv; with `plot`, evaluation.png and training.png and both as SVG."""
    with writable(folder):
        write_csv(folder / f"evaluation{suffix}.csv", sizes, float_format="%.4f")
        write_csv(folder / f"members{suffix}.csv", alone, float_format="%.4f")
        if plot:
            with drawing():
                save_figure(draw_recall(sizes, alone), folder, f"evaluation{suffix}")
                save_figure(draw_training(run), folder, "training")


def write_comparison(
    runs: list[Run],
    folder: Path,
    suffix: str,
    sizes: list[pd.DataFrame],
    groups: list[list[int]],
    table: pd.DataFrame,
    plot: bool,
) -> None:
    """comparison.csv; with `plot`, its figure: the first score, each group as far as all its runs go."""
    with writable(folder):
        write_csv(folder / f"comparison{suffix}.csv", table, float_format="%.4f")
        show(f"{folder}/: comparison{suffix}.csv{', its figure' * plot}")
        if not plot:
            return
        score, curves = sizes[0].columns[1], []
        labels = group_labels([[runs[number] for number in numbers] for numbers in groups])
        with drawing(labels) as boxes:
            for numbers, label in zip(groups, labels, strict=True):
                columns = [sizes[number][score].to_numpy() for number in numbers]
                length = min(map(len, columns))
                lines = textwrap.fill(label.translate(boxes), 56)  # the width of the figure
                curves.append((lines, np.stack([column[:length] for column in columns])))
            save_figure(draw_comparison(curves, score), folder, f"comparison{suffix}")


def main(argv: list[str] | None = None) -> int:
    return run_main("evaluate.py", lambda: run(parse_args(argv)), "fewer --num_members, or --device cpu", goes_on=False)


if __name__ == "__main__":
    sys.exit(main())
