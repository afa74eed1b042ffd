"""Scores runs again from their saved embeddings: Recall@K, mAP@R, R-Precision. Needs no images and trains nothing.

    python evaluate.py results/RUN --recalls 1,10,100 --plot      tables and figures, into the run folder
    python evaluate.py results/demo_* --output compared           several runs in one table; all files go to compared/

Each run is scored for every ensemble size, and for each member alone. Several runs that differ only in their seed are
also averaged, with the sample standard deviation. mAP@R and R-Precision: Musgrave et al., "A Metric Learning Reality
Check", ECCV 2020. thresholds.csv has the similarities below which retrieve.py --far says "not found".
"""

import argparse
import contextlib
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from dreml.baseline import print_baseline, read_baseline
from dreml.cli import (
    DEVICE_HELP,
    MANY,
    InputError,
    Parser,
    check_ranges,
    pick_device,
    print_text,
    progress_bar,
    recall_list,
    run_main,
    with_less_memory,
)
from dreml.curves import draw_comparison, draw_found, draw_recall, draw_training
from dreml.datasets import default_recalls
from dreml.files import writable, write_csv
from dreml.runs import SUFFIXES, Run, TestSplit, read_run, run_lock
from dreml.settings import EMBEDDINGS
from dreml.style import check_matplotlib, drawing, printable, save_figure
from dreml.thresholds import FARS, FEWEST_ABOVE, threshold_table
from utils import (
    TIE_TOLERANCE,
    best_similarities,
    map_at_r,
    recall_at_k,
    similarity_memory,
    unmatched_queries,
)

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description=__doc__)
    scores = parser.add_argument_group("what is scored").add_argument
    folders_help = "run folders of train.py, such as results/car_resnet18_D12_e20_s0"
    scores("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help=folders_help)
    recalls_help = "Recall@K (default: 1,2,4,8; for isc 1,10,20,30)"
    scores("--recalls", type=recall_list, metavar="K,K", help=recalls_help)
    scores("--num_members", type=int, metavar="L", help="members 1 to L (default: all that are finished)")
    embedding_help = "logits (default), or pooled: the features before the last layer"
    scores("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    rest = parser.add_argument_group("the rest").add_argument
    rest("--plot", action="store_true", help="draw Recall@K and the training curves, as PNG and SVG")
    output_help = "write into DIR, nothing into the run folders (default: each run's files into its folder)"
    rest("--output", type=Path, metavar="DIR", help=output_help)
    rest("--device", default="auto", help=DEVICE_HELP)
    args = parser.parse_args(argv)
    check_ranges(args, num_members=(1, MANY))
    return args


# ------------------------------------------------------------------------------------------------ scores


class Scores(NamedTuple):
    """The scores of a run in percent, as tables."""

    sizes: pd.DataFrame  # a row for each ensemble size
    alone: pd.DataFrame  # a row for each member by itself
    thresholds: pd.DataFrame  # rows for each ensemble size, see `threshold_table`
    found: pd.DataFrame  # the same at many false-accept rates and few ensemble sizes, for the figure


def score_run(run: Run, ks: list[int], embedding: str, device: torch.device) -> Scores:
    """Computes Recall@K, mAP@R and R-Precision from the saved embeddings."""
    split, members = run.split, run.embeddings(embedding, device)
    num_unmatched = int(unmatched_queries(*split).sum())
    if num_unmatched:
        print(
            f"{num_unmatched} queries have no other image of their class in the gallery: they count as misses in "
            "Recall@K and are left out of mAP@R and R-Precision"
        )
    sizes = score(members, split, ks)
    bar = progress_bar(members, f"{run.folder.name}: each member alone", len(members), " members")
    alone = np.concatenate([score([member], split, ks) for member in bar])
    tables = score_table("ensemble_size", sizes, ks), score_table("member", alone, ks)
    return Scores(*tables, *score_thresholds(members, split))


def score(member_embeddings: Sequence[torch.Tensor], split: TestSplit, ks: list[int]) -> np.ndarray:
    """Recall@K, mAP@R, R-Precision in percent, `(L, len(ks) + 2) float64`; row l-1 is of the first l members."""
    masks = {"is_query": split.is_query, "is_gallery": split.is_gallery}

    def recalls(max_bytes: int) -> torch.Tensor:
        return recall_at_k(member_embeddings, split.labels, ks, max_bytes=max_bytes, **masks)

    def precisions(max_bytes: int) -> torch.Tensor:
        return torch.stack(map_at_r(member_embeddings, split.labels, max_bytes=max_bytes, **masks), dim=1)

    memory = similarity_memory(member_embeddings[0].device)
    columns = [with_less_memory(recalls, memory), with_less_memory(precisions, memory)]
    return 100 * torch.cat(columns, dim=1).numpy()


def score_thresholds(members: Sequence[torch.Tensor], split: TestSplit) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The `thresholds` and `found` of Scores, from the members' embeddings `(M, d)`, or those of one network."""

    def best(max_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        masks = {"is_query": split.is_query, "is_gallery": split.is_gallery}
        return best_similarities(members, split.labels, max_bytes=max_bytes, **masks)

    others, own = with_less_memory(best, similarity_memory(members[0].device))
    num_gallery, size = int(split.is_gallery.sum()), len(members)
    table = threshold_table(others, own, FARS, num_gallery, TIE_TOLERANCE)
    few = sorted({1, max(1, size // 4), max(1, size // 2), size})
    rows = [number - 1 for number in few]
    curves = threshold_table(others[rows], own[rows], tuple(np.logspace(-4, 0, 81)), num_gallery, TIE_TOLERANCE)
    curves.ensemble_size = [few[number - 1] for number in curves.ensemble_size]
    return table, curves


def threshold_text(table: pd.DataFrame, run: Run) -> str:
    """The thresholds of the whole ensemble, and which false-accept rates have none, for people."""
    rows, num_queries = table[table.ensemble_size == run.num_members].itertuples(), int(run.test.is_query.sum())
    parts = [f"FAR {100 * row.far:g} %: {row.threshold:.4f} (found {row.found:.2f} %)" for row in rows]
    missing = [f"{100 * far:g} %" for far in FARS if far not in set(table.far)]
    if missing:
        few = f"under {FEWEST_ABOVE} of {num_queries:,} queries would be above it"
        parts.append(f"none for {', '.join(missing)}: {few}")
    return f"thresholds of {run.num_members} members: {'; '.join(parts)}"


def score_table(index: str, values: np.ndarray, ks: list[int]) -> pd.DataFrame:
    """The rows of `score` with names, counted from 1 in the column `index`."""
    table = pd.DataFrame(values, columns=[*(f"R@{k}" for k in ks), "mAP@R", "R-Precision"])
    table.insert(0, index, range(1, len(values) + 1))
    return table


# ------------------------------------------------------------------------------------------------ several runs


def group_by_settings(runs: list[Run]) -> list[list[Run]]:
    """Puts runs together that differ only in their seed. Raises InputError for a run that is given twice."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group, seed = groups.setdefault(repr(run.without_seed()), []), run.settings.seed
        for other in group:
            if other.settings.seed == seed:
                raise InputError(f"{other.folder} and {run.folder} are the same run, seed {seed}: give one")
        group.append(run)
    return list(groups.values())


def group_labels(groups: list[list[Run]]) -> list[str]:
    """A label for each group, for a legend: the settings in which the groups differ."""
    settings = [group[0].without_seed() for group in groups]
    differing = [key for key in settings[0] if len({repr(each[key]) for each in settings}) > 1]
    if differing != ["cache"]:  # a checksum says little to people
        differing = [key for key in differing if key != "cache"]
    labels = []
    for group, each in zip(groups, settings, strict=True):
        label = ", ".join(f"{key} {each[key]}" for key in differing) or group_name(group)
        labels.append(f"{label} ({len(group)} seeds)" if len(group) > 1 else label)
    return labels


def group_name(group: list[Run]) -> str:
    """The name of the run folder; for several runs, with s* in place of the seeds."""
    if len(group) == 1:
        return group[0].name
    names = (re.sub(rf"_s{run.settings.seed}(?=_|$)", "_s*", run.name) for run in group)
    return ", ".join(dict.fromkeys(names))


def compare(groups: list[list[Run]], tables: dict[Path, pd.DataFrame]) -> pd.DataFrame:
    """A table with a row for each group of several runs, mean and sample standard deviation, and one for each run.

    `tables`: run folder -> `Scores.sizes`. All rows are of the largest ensemble size that every run has. Columns: run,
    seeds, n, ensemble_size, then each score and score_std, NaN where n is 1.
    """
    size, rows = min(map(len, tables.values())), []
    for group in groups:
        single = [[run] for run in group]
        for runs in [group, *single] if len(group) > 1 else single:
            row = {"run": group_name(runs), "seeds": " ".join(str(run.settings.seed) for run in runs)}
            row |= {"n": len(runs), "ensemble_size": size}
            values = pd.DataFrame([tables[run.folder].iloc[size - 1, 1:] for run in runs])
            for name in values:
                row |= {name: values[name].mean(), f"{name}_std": values[name].std(ddof=1)}
            rows.append(row)
    return pd.DataFrame(rows)


def comparison_text(table: pd.DataFrame) -> str:
    """The table of `compare` for people."""
    columns = {"run": table.run, "seeds": table.seeds, "n": table.n}
    for name in table.columns[4::2]:
        pairs = zip(table[name], table[f"{name}_std"], strict=True)
        columns[name] = [f"{mean:.2f}" if np.isnan(std) else f"{mean:.2f} ± {std:.2f}" for mean, std in pairs]
    return pd.DataFrame(columns).to_string(index=False)


# ------------------------------------------------------------------------------------------------ the evaluation


def run(args: argparse.Namespace) -> None:
    # 1. Whatever can be wrong is found before anything is computed
    if args.plot:
        check_matplotlib()
    device = pick_device(args.device)
    runs = [read_run(folder, args.num_members) for folder in args.folders]
    groups = group_by_settings(runs)
    targets = output_folders(runs, args.output)
    ks = args.recalls or common_recalls(runs)
    for one in runs:
        one.require(args.embedding)
        check_recalls(ks, one)

    # 2. Each run
    tables, suffix = {}, SUFFIXES[args.embedding]
    for one, target in zip(runs, targets, strict=True):
        scores = score_run(one, ks, args.embedding, device)
        tables[one.folder] = scores.sizes
        first = scores.sizes.columns[1]
        print_text(f"{one.folder}: {args.embedding}, percent")
        print_baseline(one.folder, one.record.settings_hash, scores.sizes)
        print(scores.sizes.assign(alone=scores.alone[first]).round(2).to_string(index=False))
        print(f"(alone: {first} of the last member of the row by itself)")
        print(threshold_text(scores.thresholds, one))
        write_scores(one, scores, target, suffix, args.plot)
        written = ", ".join(f"{name}{suffix}.csv" for name in ("evaluation", "members", "thresholds"))
        print_text(f"{target}/: {written}{', figures' if args.plot else ''}\n")

    # 3. All of them together
    if len(runs) == 1:
        return
    table = compare(groups, tables)
    print_text(f"{table.ensemble_size[0]} members, {args.embedding}, percent (mean ± sample standard deviation)")
    print_text(comparison_text(table))
    if not args.output:
        print("(--output DIR writes this table, and with --plot a figure of it)")
        return
    with writable(args.output, "--output"):
        write_csv(args.output / f"comparison{suffix}.csv", table, float_format="%.4f")
        figure = ", its figure" if args.plot else ""
        print_text(f"{args.output}/: comparison{suffix}.csv{figure}")
        if args.plot:
            save_comparison(groups, tables, args.output, f"comparison{suffix}")


def output_folders(runs: list[Run], output: Path | None) -> list[Path]:
    """The folder for each run's files: its own, or `output`, or, for several runs, its subfolder of `output`."""
    if output is None:
        return [run.folder for run in runs]
    if len(runs) == 1:
        return [output]
    folders = [output / run.name for run in runs]
    if len(set(folders)) < len(folders):
        raise InputError("two run folders have the same name: --output would mix their files; rename one")
    return folders


def common_recalls(runs: list[Run]) -> list[int]:
    """The default of --recalls: the data set's own, if all runs are of one that has any."""
    names = {run.settings.data_name for run in runs}
    return default_recalls(names.pop() if len(names) == 1 else "")


def check_recalls(ks: list[int], run: Run) -> None:
    """Raises InputError for a K that all images of the gallery would reach, and for a run without test images."""
    num_gallery = int(run.test.is_gallery.sum())
    if not len(run.test):
        raise InputError(f"{run.folder}: its data set has no test images: there is nothing to score")
    if max(ks) >= num_gallery:
        raise InputError(
            f"--recalls: {max(ks)} is not below the number of gallery images of {run.folder}, {num_gallery}"
        )


def write_scores(run: Run, scores: Scores, folder: Path, suffix: str, plot: bool) -> None:
    """Writes the three tables; with `plot`, evaluation.png, thresholds.png and training.png and all as SVG."""
    with writable(folder, "--output"), lock_inside(folder, run):
        write_csv(folder / f"evaluation{suffix}.csv", scores.sizes, float_format="%.4f")
        write_csv(folder / f"members{suffix}.csv", scores.alone, float_format="%.4f")
        write_csv(folder / f"thresholds{suffix}.csv", scores.thresholds, float_format="%.6f")
        if not plot:
            return
        with drawing():
            records = [run.members.records[member] for member in range(1, run.num_members + 1)]
            baseline = read_baseline(run.folder, run.record.settings_hash)
            save_figure(draw_recall(scores.sizes, scores.alone, baseline), folder, f"evaluation{suffix}")
            save_figure(draw_found(scores.found), folder, f"thresholds{suffix}")
            save_figure(draw_training(records), folder, "training")


@contextlib.contextmanager
def lock_inside(folder: Path, run: Run) -> Iterator[None]:
    """Holds the lock of the run if `folder` is its own: train.py removes half-written files there."""
    if folder.resolve() != run.folder.resolve():
        yield
        return
    try:
        lock = run_lock(folder.resolve())
    except InputError as error:
        raise InputError(f"{error}; --output names another folder") from None
    with lock:
        yield


def save_comparison(groups: list[list[Run]], tables: dict[Path, pd.DataFrame], folder: Path, name: str) -> None:
    """Draws the first score of each group, up to the largest ensemble size that all its runs have."""
    curves, score_name = [], next(iter(tables.values())).columns[1]
    for group, label in zip(groups, group_labels(groups), strict=True):
        columns = [tables[run.folder][score_name].to_numpy() for run in group]
        length = min(map(len, columns))
        lines = textwrap.fill(printable(label), 56)  # the width of the figure
        curves.append((lines, np.stack([column[:length] for column in columns])))
    with drawing():
        save_figure(draw_comparison(curves, score_name), folder, name)


def main(argv: list[str] | None = None) -> int:
    save_memory = "fewer --num_members, or --device cpu"
    return run_main("evaluate.py", lambda: run(parse_args(argv)), save_memory, resumable=False)


if __name__ == "__main__":
    sys.exit(main())
