"""What finds images without training, which every ensemble has to beat: the initial weights, and the colours."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dreml.batches import spans
from dreml.cli import InputError, one_line
from dreml.files import read_record, remove_leftovers, take_lock, write_csv, write_record
from dreml.run_writer import run_lock
from dreml.runs import Members

INITIAL_WEIGHTS, COLOURS = "initial weights", "colour histogram"
LEVELS = 6  # of each of the three channels: 216 colours


def colour_histograms(images: np.ndarray, max_pixels: int = 2**22) -> torch.Tensor:
    """How many pixels of each image have each of 6 x 6 x 6 colours: `(N, S, S, 3) uint8` -> `(N, 216) float32`.

    Memory for `max_pixels` at a time, about 20 bytes each, but for at least one image.
    """
    level_of = (np.arange(256) * LEVELS // 256).astype(np.uint8)
    counts = np.empty((len(images), LEVELS**3), np.float32)
    for start, stop in spans(0, len(images), max(1, max_pixels // images[0, ..., 0].size)):
        red, green, blue = np.moveaxis(level_of[images[start:stop]].reshape(stop - start, -1, 3), 2, 0)
        colours = red * LEVELS**2 + green * LEVELS + blue  # at most 215
        places = colours + LEVELS**3 * np.arange(stop - start)[:, None]
        counts[start:stop] = np.bincount(places.ravel(), minlength=(stop - start) * LEVELS**3).reshape(-1, LEVELS**3)
    return torch.from_numpy(counts)


@dataclass
class BaselineRecord:
    """`baseline.json`: Recall@K of what finds images without training."""

    run: str  # settings_hash of its run
    recalls: list[dict[str, str | float]]  # the rows of baseline.csv: "baseline" and "R@1", ..., in percent


def update_baseline(
    members: Members,
    images: np.ndarray,
    ks: list[int],
    initial_features: Callable[[], torch.Tensor],
    recall_percent: Callable[[torch.Tensor, list[int]], np.ndarray],
) -> None:
    """Makes and prints the baseline of a run, unless it is there for these K. One process does so, others go on.

    `initial_features` computes those of the initial weights for the test images `(N, S, S, 3) uint8`; weights that
    cannot be had give a warning. `recall_percent` computes Recall@K in percent, `(1, len(ks))`, from features `(N, d)`.
    """
    folder, wanted = members.folder, [f"R@{k}" for k in ks]
    lock = take_lock(folder / ".baseline.lock", timeout=0)
    if lock is None:  # another process is at it
        return
    with lock:
        table = read_baseline(folder, members.settings_hash)
        is_new = table is None or len(table) < 2 or not set(wanted) <= set(table)
        if is_new:
            earlier = [] if table is None else [int(name.removeprefix("R@")) for name in list(table)[1:]]
            ks, recalls = sorted({*ks, *earlier}), {}
            names = [f"R@{k}" for k in ks]
            try:
                recalls[INITIAL_WEIGHTS] = recall_percent(initial_features(), ks)
            except InputError as error:
                print(f"warning: the initial weights are not scored: {error}", file=sys.stderr)
            recalls[COLOURS] = recall_percent(colour_histograms(images), ks)
            table = pd.DataFrame(np.concatenate([*recalls.values()]), columns=names).round(4)
            table.insert(0, "baseline", list(recalls))
        with run_lock(folder):
            remove_leftovers(folder, "baseline.json")
            if is_new:
                write_record(folder / "baseline.json", BaselineRecord(members.settings_hash, table.to_dict("records")))
            write_csv(folder / "baseline.csv", table, float_format="%.4f")
    if is_new:
        print("\n".join(baseline_lines(table, wanted)), flush=True)


def read_baseline(folder: Path, run: str) -> pd.DataFrame | None:
    """The table of the baselines: name and Recall@K in percent. None if it is missing or, which is said, damaged."""
    path = folder / "baseline.json"
    try:
        record = read_record(path, BaselineRecord)
        if record.run != run:
            raise ValueError("of another run")
        return pd.DataFrame(record.recalls)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as error:
        print(f"warning: {path} counts as not made ({one_line(error)})", file=sys.stderr)
        return None


def baseline_lines(table: pd.DataFrame, names: list[str]) -> list[str]:
    """A line for each baseline, with the scores `names` (R@1, ...)."""
    rows = table.to_dict("records")
    return [f"before training: {', '.join(f'{n} {row[n]:.2f}' for n in names)} ({row['baseline']})" for row in rows]


def print_baseline(folder: Path, run: str, ensembles: pd.DataFrame) -> None:
    """Prints the baselines of a run for the scores of its table of ensembles, and says if one is ahead of the largest.

    `run` is its settings_hash. The table's first column is the ensemble size. Scores that no baseline has are left out.
    """
    table = read_baseline(folder, run)
    names = [name for name in list(ensembles)[1:] if table is not None and name in table]
    if not names:
        return
    print("\n".join(baseline_lines(table, names)))
    name, best = names[0], table.loc[table[names[0]].idxmax()]
    of_ensemble = ensembles[name].iloc[-1]
    if best[name] > of_ensemble:
        remedy = "more members or epochs may pass it"
        if best.baseline == COLOURS:
            remedy = "photos of one class may have been taken together, and the score says little about others"
        print(f"before training is ahead: {name} {best[name]:.2f} ({best.baseline}), {of_ensemble:.2f} after; {remedy}")
