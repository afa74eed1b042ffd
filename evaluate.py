"""Scores runs again from their saved embeddings: Recall@K, mAP@R, R-Precision. Needs no images and trains nothing.

    python evaluate.py results/RUN --recalls 1,10,100 --plot      tables and a figure, into the run folder
    python evaluate.py results/demo_* --output compared           several runs in one table; all files go to compared/

Each run is scored for every ensemble size, and for each member alone. classes.csv has the Recall@1 of each class, worst
first; confusions.csv the classes that are taken for others, most often first; thresholds.csv the similarities below
which a search says "not found". Several runs are compared by mAP@R, each with all its members. Runs that
differ only in their seed are compared with as many members as all of them have, and averaged, with the sample standard
deviation. mAP@R and R-Precision: Musgrave et al., "A Metric Learning Reality Check", ECCV 2020.
"""

import argparse
import contextlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dreml import cli, figures
from dreml.baseline import print_baseline
from dreml.cache import default_recalls
from dreml.cli import InputError
from dreml.confusions import class_table, confident_errors, confusion_table, first_neighbour_table
from dreml.files import writable, write_csv
from dreml.runs import SUFFIXES, Run, add_run_options, read_run, run_lock, scored
from dreml.search import FARS, threshold_at
from utils import map_at_r, recall_at_k


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="run folders of train.py")
    recalls_help = "values of K for Recall@K, separated by commas (default: 1,2,4,8; for isc 1,10,20,30)"
    parser.add_argument("--recalls", type=cli.number_list, metavar="K,K", help=recalls_help)
    add_run_options(parser)
    parser.add_argument("--plot", action="store_true", help="draw the recall, as PNG and SVG")
    output_help = "folder for all files, in place of the run folders (default: each run's files into its folder)"
    parser.add_argument("--output", type=Path, metavar="DIR", help=output_help)
    parser.add_argument("--device", default="auto", help=cli.DEVICE_HELP)
    return parser.parse_args(argv)


def score_run(run: Run, ks: list[int], embedding: str, device: torch.device) -> dict[str, pd.DataFrame]:
    """Compute the tables of a run from its saved embeddings, by the names of their files."""
    members = run.embeddings(embedding, device)
    sizes = score(members, run.test, ks)
    sizes.insert(0, "ensemble_size", range(1, len(members) + 1))
    bar = cli.progress_bar(members, f"{run.folder.name}: each member alone", len(members), " members")
    alone = pd.concat([score([member], run.test, ks) for member in bar], ignore_index=True)
    alone.insert(0, "member", range(1, len(members) + 1))
    queries = first_neighbour_table(members, run.test)
    return {
        "evaluation": sizes,
        "members": alone,
        "thresholds": threshold_table(queries, run.test.is_gallery.sum()),
        "classes": class_table(queries),
        "confusions": confusion_table(confident_errors(queries), run.test),
    }


def score(members: list[torch.Tensor], test: pd.DataFrame, ks: list[int]) -> pd.DataFrame:
    """Recall@K, mAP@R and R-Precision in percent; row l-1 is of the first l members."""
    recalls = scored(recall_at_k, members, test, ks=ks)
    precisions = torch.stack(scored(map_at_r, members, test), dim=1)
    values = 100 * torch.cat([recalls, precisions], dim=1).numpy()
    return pd.DataFrame(values, columns=[*(f"R@{k}" for k in ks), "mAP@R", "R-Precision"])


def threshold_table(queries: pd.DataFrame, num_gallery: int) -> pd.DataFrame:
    """thresholds.csv, from `first_neighbour_table`: a row for each of FARS that enough queries can tell.

    `found` is the percentage of queries whose first neighbour is of their class and reaches the threshold. As in
    Recall@K, ties count against the query: at a threshold of -1, this is the Recall@1.
    """
    rows = []
    for far in FARS:
        threshold = threshold_at(queries, far)
        if threshold is not None:
            is_found = queries.right & (queries.own.astype(float) >= threshold - 5e-7)  # as rounded as the threshold
            rows.append((far, threshold, 100 * is_found.mean(), len(queries), num_gallery))
    return pd.DataFrame(rows, columns=["far", "threshold", "found", "queries", "gallery"])


def group_by_settings(runs: list[Run]) -> list[list[Run]]:
    """Put runs together that differ only in their seed. Raises InputError for a run that is given twice."""
    groups: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        group = groups.setdefault((replace(run.settings, seed=0), run.record.data.fingerprint), {})
        other = group.setdefault(run.settings.seed, run)
        if other is not run:
            raise InputError(f"{other.folder} and {run.folder} are the same run, seed {run.settings.seed}: give one")
    return [list(group.values()) for group in groups.values()]


def compare(groups: list[list[Run]], tables: dict[Path, pd.DataFrame]) -> pd.DataFrame:
    """Table of several runs, by mAP@R, best first: a row for each group of seeds.

    `tables`: run folder -> table "evaluation". A row is of all members; in a group, of as many as all its runs have.
    Columns: run, seeds, n, ensemble_size, then each score and score_std (sample standard deviation, NaN where n is 1).
    """
    rows = []
    for group in groups:
        size = min(len(tables[run.folder]) for run in group)
        seeds = [str(run.settings.seed) for run in group]
        name = group[0].name if len(group) == 1 else re.sub(rf"_s{seeds[0]}(?=_|$)", "_s*", group[0].name)
        row = {"run": name, "seeds": " ".join(seeds), "n": len(group), "ensemble_size": size}
        scores = pd.DataFrame([tables[run.folder].iloc[size - 1, 1:] for run in group])
        for score_name in scores:
            row[score_name] = scores[score_name].mean()
            row[f"{score_name}_std"] = scores[score_name].std()
        rows.append(row)
    return pd.DataFrame(rows).sort_values("mAP@R", ascending=False, kind="stable")


def comparison_text(table: pd.DataFrame) -> str:
    """Table of `compare` for people."""
    columns = table[["run", "seeds", "n", "ensemble_size"]].copy()
    for name in table.columns[4::2]:
        pairs = zip(table[name], table[f"{name}_std"], strict=True)
        columns[name] = [f"{mean:.2f}" if np.isnan(std) else f"{mean:.2f} ± {std:.2f}" for mean, std in pairs]
    return columns.to_string(index=False)


def run(args: argparse.Namespace) -> None:
    # 1. Whatever can be wrong is found before anything is computed
    if args.plot:
        cli.require("--plot", "matplotlib")
    device = cli.pick_device(args.device)
    runs = [read_run(folder, args.num_members, args.embedding) for folder in args.folders]
    groups = group_by_settings(runs)
    targets = [args.output or one.folder for one in runs]
    if args.output and len(runs) > 1:
        targets = [args.output / one.name for one in runs]
        if len(set(targets)) < len(targets):
            raise InputError("two run folders have the same name: --output would mix their files; rename one")
    ks = args.recalls or default_recalls(runs[0].settings.data_name)
    for one in runs:
        size = int(one.test.is_gallery.sum())
        if not len(one.test):
            raise InputError(f"{one.folder}: its data set has no test images: there is nothing to score")
        if max(ks) >= size:
            raise InputError(f"--recalls: {max(ks)} is not below the number of gallery images of {one.folder}, {size}")

    # 2. Each run
    tables = {}
    suffix = SUFFIXES[args.embedding]
    for one, target in zip(runs, targets, strict=True):
        scores = score_run(one, ks, args.embedding, device)
        sizes = scores["evaluation"]
        tables[one.folder] = sizes
        first = sizes.columns[1]
        print(f"{one.folder}: {args.embedding}, percent")
        print_baseline(one.record, sizes, args.embedding)
        print(sizes.assign(alone=scores["members"][first]).round(2).to_string(index=False))
        print(f"(alone: {first} of the last member of the row by itself)")
        thresholds = scores["thresholds"]
        if len(thresholds):
            print(f"thresholds at false-accept rates:\n{thresholds.round(6).to_string(index=False)}")
        if len(thresholds) < len(FARS):
            print(f"no threshold at {FARS[len(thresholds)]:g} or less: {one.test.is_query.sum():,} queries are too few")
        write_scores(one, scores, target, suffix, args.plot)
        written = ", ".join(f"{name}{suffix}.csv" for name in scores)
        print(f"{target}/: {written}{', a figure' if args.plot else ''}\n")

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


def write_scores(run: Run, scores: dict[str, pd.DataFrame], folder: Path, suffix: str, plot: bool) -> None:
    """Write the tables; with `plot`, also evaluation.png and evaluation.svg."""
    own_folder = run.folder.resolve()
    is_own = folder.resolve() == own_folder  # there, train.py removes half-written files while it holds the lock
    with writable(folder, "--output"), run_lock(own_folder) if is_own else contextlib.nullcontext():
        for name, table in scores.items():
            float_format = "%.6f" if name == "thresholds" else "%.4f"
            write_csv(folder / f"{name}{suffix}.csv", table, float_format=float_format)
        if plot:
            with figures.drawing():
                recall = figures.draw_recall(scores["evaluation"], scores["members"], pd.DataFrame(run.record.baseline))
                figures.save_figure(recall, folder, f"evaluation{suffix}")


def main(argv: list[str] | None = None) -> int:
    save_memory = "fewer --num_members, or --device cpu"
    return cli.run_main("evaluate.py", lambda: run(parse_args(argv)), save_memory, resumable=False)


if __name__ == "__main__":
    sys.exit(main())
