"""What finds images without training, which every ensemble has to beat: the initial weights, and the colours."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dreml.backbones import own_scaling, read_weights
from dreml.batches import spans
from dreml.cache import Cache
from dreml.cli import InputError, one_line
from dreml.files import read_record, remove_leftovers, take_lock, write_csv, write_record
from dreml.run_writer import recall_percent
from dreml.runs import Members, TestSplit, run_lock
from dreml.settings import Settings
from model import channel_statistics, extract_features, initial_model

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

    settings_hash: str  # of its run
    recalls: list[dict[str, str | float]]  # the rows of baseline.csv: "baseline" and "R@1", ..., in percent


def initial_features(settings: Settings, weights: str, cache: Cache, device: torch.device) -> torch.Tensor:
    """The pooled features of the test images before the first step of member 1, `(M, d) float32`.

    `weights`: as --weights names them. Pretrained weights see images scaled as they were for them; members are trained
    on the data set's own scaling. Raises InputError for weights that cannot be had.
    """
    state = read_weights(settings.backbone, weights)
    model = initial_model(settings, 1, state).to(device)
    scaling = own_scaling(settings.backbone, device) if state else channel_statistics(cache.meta, device)
    features = extract_features(model, cache.array("test_images"), scaling, 2 * settings.batch_size, "pooled")
    if not torch.isfinite(features).all():
        raise InputError("their features are not finite")
    return features


def update_baseline(
    members: Members,
    settings: Settings,
    weights: str,
    cache: Cache,
    split: TestSplit,
    ks: list[int],
    device: torch.device,
) -> None:
    """Make and print the baseline of a run, unless it is there for these K. One process does so, others go on.

    `weights`: as --weights names them. A warning says if they cannot be had.
    """
    folder = members.folder
    wanted = [f"R@{k}" for k in ks]
    lock = take_lock(folder / ".baseline.lock", timeout=0)
    if lock is None:  # another process is at it
        return
    with lock:
        table = read_baseline(folder, members.settings_hash)
        is_new = table is None or len(table) < 2 or not set(wanted) <= set(table)
        if is_new:
            earlier = [] if table is None else [int(name.removeprefix("R@")) for name in list(table)[1:]]
            ks = sorted({*ks, *earlier})
            features = {}
            try:
                features[INITIAL_WEIGHTS] = initial_features(settings, weights, cache, device)
            except InputError as error:
                print(f"warning: the initial weights are not scored: {error}", file=sys.stderr)
            features[COLOURS] = colour_histograms(cache.array("test_images")).to(device)
            recalls = [recall_percent([rows], split, ks)[0] for rows in features.values()]
            table = pd.DataFrame(recalls, columns=[f"R@{k}" for k in ks]).round(4)
            table.insert(0, "baseline", list(features))
        with run_lock(folder):
            remove_leftovers(folder, "baseline.json")
            if is_new:
                write_record(folder / "baseline.json", BaselineRecord(members.settings_hash, table.to_dict("records")))
            write_csv(folder / "baseline.csv", table, float_format="%.4f")
    if is_new:
        print("\n".join(baseline_lines(table, wanted)), flush=True)


def read_baseline(folder: Path, settings_hash: str) -> pd.DataFrame | None:
    """The table of the baselines of a run: name and Recall@K in percent. None if missing; warns if damaged."""
    path = folder / "baseline.json"
    try:
        record = read_record(path, BaselineRecord)
        if record.settings_hash != settings_hash:
            raise ValueError("from another run")
        return pd.DataFrame(record.recalls)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        print(f"warning: {path} is damaged ({one_line(error)}); train.py makes it again", file=sys.stderr)
        return None


def baseline_lines(table: pd.DataFrame, names: list[str]) -> list[str]:
    """A line for each baseline, with the scores `names` (R@1, ...)."""
    lines = []
    for row in table.to_dict("records"):
        scores = ", ".join(f"{name} {row[name]:.2f}" for name in names)
        lines.append(f"before training: {scores} ({row['baseline']})")
    return lines


def print_baseline(folder: Path, settings_hash: str, ensembles: pd.DataFrame) -> None:
    """Print the baselines of a run for the scores of its table of ensembles, and say if one is ahead of the largest.

    The table's first column is the ensemble size. Scores that no baseline has are left out.
    """
    table = read_baseline(folder, settings_hash)
    names = [name for name in list(ensembles)[1:] if table is not None and name in table]
    if not names:
        return
    print("\n".join(baseline_lines(table, names)))
    name = names[0]
    best = table.loc[table[name].idxmax()]
    of_ensemble = ensembles[name].iloc[-1]
    if best[name] > round(of_ensemble, 4):  # the baselines are rounded so
        remedy = "more members or epochs may pass it"
        if best.baseline == COLOURS:
            remedy = "photos of one class may have been taken together, and the score says little about others"
        print(f"before training is ahead: {name} {best[name]:.2f} ({best.baseline}), {of_ensemble:.2f} after; {remedy}")
