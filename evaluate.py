"""Scores runs again from their saved embeddings: Recall@K, mAP@R, R-Precision. Needs no images and trains nothing.

    python evaluate.py results/RUN --recalls 1,10,100 --plot      tables and figures, into the run folder
    python evaluate.py results/demo_* --output compared           several runs in one table; all files go to compared/

Each run is scored for every ensemble size, and for each member alone. classes.csv has the Recall@1 of each class, worst
first; confusions.csv the classes that are taken for others, most often first; thresholds.csv the similarities below
which retrieve.py --far says "not found". Several runs are compared by mAP@R, each with all its members. Runs that
differ only in their seed are compared with as many members as all of them have, and averaged, with the sample standard
deviation. mAP@R and R-Precision: Musgrave et al., "A Metric Learning Reality Check", ECCV 2020.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from dreml.baseline import print_baseline, read_baseline
from dreml.cache import default_recalls
from dreml.cli import (
    DEVICE_HELP,
    MANY,
    InputError,
    Parser,
    check_ranges,
    counted,
    pick_device,
    progress_bar,
    recall_list,
    run_main,
)
from dreml.figures import (
    check_matplotlib,
    draw_found,
    draw_recall,
    draw_training,
    drawing,
    save_figure,
)
from dreml.files import writable, write_csv
from dreml.run_writer import scored
from dreml.runs import SUFFIXES, Run, TestSplit, read_run, run_lock
from dreml.settings import EMBEDDINGS
from dreml.thresholds import FARS, FEWEST_ABOVE, threshold_table
from utils import (
    best_similarities,
    first_neighbours,
    map_at_r,
    recall_at_k,
    unmatched_queries,
)

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description=__doc__)
    group = parser.add_argument_group("what is scored")
    folders_help = "run folders of train.py, such as results/car_resnet18_D12_e20_s0"
    group.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help=folders_help)
    recalls_help = "values of K for Recall@K, separated by commas (default: 1,2,4,8; for isc 1,10,20,30)"
    group.add_argument("--recalls", type=recall_list, metavar="K,K", help=recalls_help)
    members_help = "score the ensembles of members 1 to L (default: all that are finished)"
    group.add_argument("--num_members", type=int, metavar="L", help=members_help)
    embedding_help = "logits, or pooled: the features before the last layer (default: logits)"
    group.add_argument("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    group = parser.add_argument_group("the rest")
    group.add_argument("--plot", action="store_true", help="draw the scores and the training, as PNG and SVG")
    output_help = "folder for all files, in place of the run folders (default: each run's files into its folder)"
    group.add_argument("--output", type=Path, metavar="DIR", help=output_help)
    group.add_argument("--device", default="auto", help=DEVICE_HELP)
    args = parser.parse_args(argv)
    check_ranges(args, num_members=(1, MANY))
    return args


# ------------------------------------------------------------------------------------------------ scores


class Scores(NamedTuple):
    """Tables of one run. Scores are in percent."""

    evaluation: pd.DataFrame  # a row for each ensemble size
    members: pd.DataFrame  # a row for each member alone
    thresholds: pd.DataFrame  # rows for each ensemble size, see `threshold_table`
    classes: pd.DataFrame  # a row for each class of the queries
    confusions: pd.DataFrame  # a row for each class and another one that it was taken for
    found: pd.DataFrame  # as thresholds, for many false-accept rates and few ensemble sizes; for the figure


WRITTEN = ("evaluation", "members", "thresholds", "classes", "confusions")  # each as a CSV


def score_run(run: Run, ks: list[int], embedding: str, device: torch.device) -> Scores:
    """Compute all tables of a run from its saved embeddings."""
    split = run.split
    members = run.embeddings(embedding, device)
    num_unmatched = int(unmatched_queries(*split).sum())
    if num_unmatched:
        print(
            f"queries without another image of their class in the gallery: {num_unmatched:,} (misses in Recall@K, left "
            "out of mAP@R and R-Precision)"
        )
    sizes = score(members, split, ks)
    bar = progress_bar(members, f"{run.folder.name}: each member alone", len(members), " members")
    alone = np.concatenate([score([member], split, ks) for member in bar])
    thresholds, found = score_thresholds(members, split)
    classes, confusions = score_classes(members, run.test)
    return Scores(
        evaluation=score_table("ensemble_size", sizes, ks),
        members=score_table("member", alone, ks),
        thresholds=thresholds,
        classes=classes,
        confusions=confusions,
        found=found,
    )


def score(members: Sequence[torch.Tensor], split: TestSplit, ks: list[int]) -> np.ndarray:
    """Recall@K, mAP@R, R-Precision in percent, `(L, len(ks) + 2) float64`; row l-1 is of the first l members."""
    recalls = scored(recall_at_k, members, split, ks=ks)
    precisions = torch.stack(scored(map_at_r, members, split), dim=1)
    return 100 * torch.cat([recalls, precisions], dim=1).numpy()


def score_table(index: str, values: np.ndarray, ks: list[int]) -> pd.DataFrame:
    """Rows of `score` with names, counted from 1 in the column `index`."""
    table = pd.DataFrame(values, columns=[*(f"R@{k}" for k in ks), "mAP@R", "R-Precision"])
    table.insert(0, index, range(1, len(values) + 1))
    return table


def score_thresholds(members: Sequence[torch.Tensor], split: TestSplit) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables `thresholds` and `found` of Scores."""
    others, own = scored(best_similarities, members, split)
    num_gallery = int(split.is_gallery.sum())
    size = len(members)
    table = threshold_table(others, own, FARS, num_gallery)
    few = sorted({1, max(1, size // 4), max(1, size // 2), size})
    rows = [number - 1 for number in few]
    curves = threshold_table(others[rows], own[rows], tuple(np.logspace(-4, 0, 81)), num_gallery)
    curves.ensemble_size = [few[number - 1] for number in curves.ensemble_size]
    return table, curves


def score_classes(members: Sequence[torch.Tensor], test: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables `classes` and `confusions` of Scores, for the whole ensemble.

    Queries that have no other image of their class in the gallery count as misses, but as no confusion. The example of
    a confusion is the query that is most similar to its neighbour.
    """
    split = TestSplit.from_arrays(test.label, test.is_query, test.is_gallery)
    rows, similarities = (values.numpy() for values in scored(first_neighbours, members, split))
    queries = test[test.is_query].reset_index(drop=True)
    neighbours = test.iloc[rows].reset_index(drop=True)  # any image for -1: such a query is unmatched
    unmatched = unmatched_queries(*split)[split.is_query].numpy()
    is_right = (queries.label == neighbours.label) & ~unmatched
    of_class = is_right.groupby(queries.class_name)
    classes = pd.DataFrame({"queries": of_class.size(), "R@1": 100 * of_class.mean()}).reset_index()
    classes = classes.sort_values(["R@1", "queries", "class_name"], ascending=[True, False, True])

    pairs = pd.DataFrame({"class_name": queries.class_name, "neighbour_class": neighbours.class_name})
    pairs["query_path"] = queries.path
    pairs["neighbour_path"] = neighbours.path
    pairs["similarity"] = similarities
    pairs = pairs[~is_right & ~unmatched].sort_values("similarity", ascending=False, kind="stable")
    of_pair = pairs.groupby(["class_name", "neighbour_class"], sort=False)
    confusions = of_pair[["query_path", "neighbour_path"]].first().reset_index()
    confusions.insert(2, "times", of_pair.size().to_numpy())
    return classes, confusions.sort_values("times", ascending=False, kind="stable")


def threshold_text(table: pd.DataFrame, run: Run) -> str:
    """Thresholds of the whole ensemble, and which false-accept rates have none, for people."""
    rows = table[table.ensemble_size == run.num_members]
    parts = [f"FAR {100 * row.far:g} %: {row.threshold:.4f} (found {row.found:.2f} %)" for row in rows.itertuples()]
    missing = [f"{100 * far:g} %" for far in FARS if far not in set(table.far)]
    if missing:
        few = f"under {FEWEST_ABOVE} of {int(run.test.is_query.sum()):,} queries would be above it"
        parts.append(f"none for {', '.join(missing)}: {few}")
    return f"thresholds of {counted(run.num_members, 'member')}: {'; '.join(parts)}"


# ------------------------------------------------------------------------------------------------ several runs


def group_by_settings(runs: list[Run]) -> list[list[Run]]:
    """Put runs together that differ only in their seed. Raises InputError for a run that is given twice."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group, seed = groups.setdefault(repr(run.without_seed()), []), run.settings.seed
        for other in group:
            if other.settings.seed == seed:
                raise InputError(f"{other.folder} and {run.folder} are the same run, seed {seed}: give one")
        group.append(run)
    return list(groups.values())


def group_name(group: list[Run]) -> str:
    """Name of the run folder; for several runs, with s* in place of the seeds."""
    if len(group) == 1:
        return group[0].name
    names = (re.sub(rf"_s{run.settings.seed}(?=_|$)", "_s*", run.name) for run in group)
    return ", ".join(dict.fromkeys(names))


def compare(groups: list[list[Run]], tables: dict[Path, pd.DataFrame]) -> pd.DataFrame:
    """Table of several runs, by mAP@R, best first: a row for each group of seeds, and below it one for each seed.

    `tables`: run folder -> `Scores.evaluation`. A row is of all members; in a group, of as many as all its runs have.
    Columns: run, seeds, n, ensemble_size, then each score and score_std (sample standard deviation, NaN where n is 1).
    """

    def row_of(runs: list[Run], size: int) -> dict:
        values = pd.DataFrame([tables[run.folder].iloc[size - 1, 1:] for run in runs])
        seeds = " ".join(str(run.settings.seed) for run in runs)
        row = {"run": group_name(runs), "seeds": seeds, "n": len(runs), "ensemble_size": size}
        for name in values:
            row[name] = values[name].mean()
            row[f"{name}_std"] = values[name].std(ddof=1)
        return row

    def by_map(row: dict) -> float:
        return np.nan_to_num(row["mAP@R"], nan=-1)

    blocks = []
    for group in groups:
        size = min(len(tables[run.folder]) for run in group)
        seeds = [row_of([run], size) for run in group] if len(group) > 1 else []
        blocks.append([row_of(group, size), *sorted(seeds, key=by_map, reverse=True)])
    blocks.sort(key=lambda block: by_map(block[0]), reverse=True)
    return pd.DataFrame([row for block in blocks for row in block])


def comparison_text(table: pd.DataFrame) -> str:
    """Table of `compare` for people."""
    columns = table[["run", "seeds", "n", "ensemble_size"]].copy()
    for name in table.columns[4::2]:
        pairs = zip(table[name], table[f"{name}_std"], strict=True)
        columns[name] = [f"{mean:.2f}" if np.isnan(std) else f"{mean:.2f} ± {std:.2f}" for mean, std in pairs]
    return columns.to_string(index=False)


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
    tables = {}
    suffix = SUFFIXES[args.embedding]
    for one, target in zip(runs, targets, strict=True):
        scores = score_run(one, ks, args.embedding, device)
        sizes = scores.evaluation
        tables[one.folder] = sizes
        first = sizes.columns[1]
        print(f"{one.folder}: {args.embedding}, percent")
        print_baseline(one.folder, sizes, args.embedding, one.settings.weights)
        print(sizes.assign(alone=scores.members[first]).round(2).to_string(index=False))
        print(f"(alone: {first} of the last member of the row by itself)")
        print(threshold_text(scores.thresholds, one))
        write_scores(one, scores, target, suffix, args.plot)
        written = ", ".join(f"{name}{suffix}.csv" for name in WRITTEN)
        print(f"{target}/: {written}{', figures' if args.plot else ''}\n")

    # 3. All of them together
    if len(runs) == 1:
        return
    table = compare(groups, tables)
    spread = " (mean ± sample standard deviation)" if table.n.max() > 1 else ""
    print(f"by mAP@R, best first: {args.embedding}, percent{spread}")
    print(comparison_text(table))
    if not args.output:
        print("(--output DIR writes this table)")
        return
    with writable(args.output, "--output"):
        write_csv(args.output / f"comparison{suffix}.csv", table, float_format="%.4f")
    print(f"{args.output}/: comparison{suffix}.csv")


def output_folders(runs: list[Run], output: Path | None) -> list[Path]:
    """Folder for each run's files: its own, or `output`, or, for several runs, its subfolder of `output`."""
    if output is None:
        return [run.folder for run in runs]
    if len(runs) == 1:
        return [output]
    folders = [output / run.name for run in runs]
    if len(set(folders)) < len(folders):
        raise InputError("two run folders have the same name: --output would mix their files; rename one")
    return folders


def common_recalls(runs: list[Run]) -> list[int]:
    """Default of --recalls: the data set's own, if all runs are of one that has any."""
    names = {run.settings.data_name for run in runs}
    return default_recalls(names.pop() if len(names) == 1 else "")


def check_recalls(ks: list[int], run: Run) -> None:
    """Raise InputError for a K that all images of the gallery would reach, and for a run without test images."""
    num_gallery = int(run.test.is_gallery.sum())
    if not len(run.test):
        raise InputError(f"{run.folder}: its data set has no test images: there is nothing to score")
    if max(ks) >= num_gallery:
        raise InputError(
            f"--recalls: {max(ks)} is not below the number of gallery images of {run.folder}, {num_gallery}"
        )


def write_scores(run: Run, scores: Scores, folder: Path, suffix: str, plot: bool) -> None:
    """Write the tables; with `plot`, evaluation.png, thresholds.png and training.png and all as SVG."""
    own_folder = run.folder.resolve()
    is_own = folder.resolve() == own_folder  # there, train.py removes half-written files while it holds the lock
    with writable(folder, "--output"), run_lock(own_folder) if is_own else contextlib.nullcontext():
        for name in WRITTEN:
            float_format = "%.6f" if name == "thresholds" else "%.4f"
            write_csv(folder / f"{name}{suffix}.csv", getattr(scores, name), float_format=float_format)
        if not plot:
            return
        with drawing():
            records = [run.members.records[member] for member in range(1, run.num_members + 1)]
            baseline = read_baseline(run.folder)
            save_figure(draw_recall(scores.evaluation, scores.members, baseline), folder, f"evaluation{suffix}")
            save_figure(draw_found(scores.found), folder, f"thresholds{suffix}")
            save_figure(draw_training(records), folder, "training")


def main(argv: list[str] | None = None) -> int:
    save_memory = "fewer --num_members, or --device cpu"
    return run_main("evaluate.py", lambda: run(parse_args(argv)), save_memory, resumable=False)


if __name__ == "__main__":
    sys.exit(main())
