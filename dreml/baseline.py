"""Baselines without training, which every ensemble has to beat: the initial weights, and colour histograms."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dreml.backbones import own_scaling, read_weights
from dreml.cache import Cache
from dreml.cli import InputError
from dreml.confusions import first_neighbour_table
from dreml.files import write_csv, write_record
from dreml.runs import RunRecord, read_run_record, recall_percent, run_lock, scored
from dreml.settings import Settings
from model import channel_statistics, extract_features, initial_model, unit_rows
from utils import map_at_r

LEVELS = 6  # of each of the three channels: 216 colours
LARGEST_MAP = 20_000  # test images; mAP@R of more takes minutes on a CPU, so only evaluate.py computes it
NEAR = 0.99  # the cosines, of colours and of embeddings, above which two images are near copies
MANY_COPIES = 5  # percent of the queries


def colour_histograms(images: np.ndarray) -> torch.Tensor:
    """Count each image's pixels of each of 6 x 6 x 6 colours: `(N, S, S, 3) uint8` -> `(N, 216) float32`."""
    step = max(1, images.shape[1] // 64)  # at most 127 x 127 pixels of an image
    level_of = (np.arange(256) * LEVELS // 256).astype(np.uint8)
    counts = np.empty((len(images), LEVELS**3), np.float32)
    for row, image in zip(counts, images, strict=True):
        red, green, blue = level_of[image[::step, ::step]].reshape(-1, 3).T
        colours = red * LEVELS**2 + green * LEVELS + blue  # at most 215
        row[:] = np.bincount(colours, minlength=LEVELS**3)
    return torch.from_numpy(counts)


def initial_features(settings: Settings, weights: str, cache: Cache, device: torch.device) -> torch.Tensor:
    """Compute the pooled features of the test images before the first step of member 1, `(M, d) float32`.

    For pretrained weights, images are normalised as in their own training; members use the data set's statistics.
    Raises InputError for unusable weights, or features that are not finite.
    """
    state = read_weights(settings.backbone, weights)
    model = initial_model(settings, 1, state).to(device)
    scaling = own_scaling(settings.backbone, device) if state else channel_statistics(cache.meta, device)
    features = extract_features(model, cache.array("test_images"), scaling, 2 * settings.batch_size)["pooled"]
    if not torch.isfinite(features).all():
        raise InputError("their features are not finite")
    return features


def update_baseline(
    folder: Path, record: RunRecord, weights: str, cache: Cache, test: pd.DataFrame, ks: list[int], device: torch.device
) -> None:
    """Compute and print a run's baselines, unless its record has them for these K. Write them into it, and as CSV.

    Each is a dict of "baseline", "dimensions" and, in percent, "R@1", ..., "mAP@R". `weights`: the value of --weights.
    Warns if they are unusable.
    """
    wanted = [f"R@{k}" for k in ks]
    table = pd.DataFrame(record.baseline)
    is_scored = len(table) == 2 and set(wanted) <= set(table)
    if not is_scored:
        features = {}
        try:
            features["initial weights"] = initial_features(record.settings, weights, cache, device)
        except InputError as error:
            print(f"warning: the initial weights are not scored: {error}", file=sys.stderr)
        features["colour histogram"] = colour_histograms(cache.array("test_images")).to(device)
        rows = []
        for name, vectors in features.items():
            recalls = dict(zip(wanted, recall_percent([vectors], test, ks)[0].tolist(), strict=True))
            rows.append({"baseline": name, **recalls, **map_percent([vectors], test), "dimensions": vectors.shape[1]})
        table = pd.DataFrame(rows).round(4)
        print_scores(table, [*wanted, "mAP@R"])
        record.baseline = table.to_dict("records")
    with run_lock(folder):
        if not is_scored:
            latest = read_run_record(folder)  # another process may have written its options
            latest.baseline = record.baseline
            write_record(folder / "args.json", latest)
        csv = table.drop(columns=["mAP@R", "dimensions"], errors="ignore")
        write_csv(folder / "baseline.csv", csv, float_format="%.4f")


def map_percent(embeddings: list[torch.Tensor], test: pd.DataFrame) -> dict[str, float]:
    """Return {"mAP@R": percent} of the whole ensemble; {} if there are too many images or more than 1 GiB."""
    if len(test) > LARGEST_MAP or sum(rows.numel() for rows in embeddings) > 2**28:
        return {}
    return {"mAP@R": 100 * scored(map_at_r, [unit_rows(embeddings)], test)[0].item()}


def print_scores(table: pd.DataFrame, names: list[str]) -> None:
    """Print one line per baseline, with the scores in `names` that it has."""
    for row in table.to_dict("records"):
        scores = ", ".join(f"{name} {row[name]:.2f}" for name in names if name in row)
        print(f"before training: {scores} ({row['baseline']}, {row['dimensions']} numbers an image)", flush=True)


def print_baseline(record: RunRecord, ensembles: pd.DataFrame, embedding: str) -> None:
    """Print a run's baselines. If one is better than the ensemble, print what to try.

    `ensembles`: a column of ensemble sizes, then scores. The last row is compared, by the first score that both have.
    """
    table = pd.DataFrame(record.baseline)
    names = [name for name in list(ensembles)[1:] if name in table]
    if not names:
        return
    print_scores(table, names)
    name = names[0]
    best = table.loc[table[name].idxmax()]
    after = ensembles[name].iloc[-1]
    if best[name] > round(after, 4):  # rounded as the baselines are
        remedies = ["--embedding pooled"] if embedding == "logits" else []
        remedies += ["pretrained --weights"] if record.settings.weights == "none" else []
        remedies += ["more --num_epochs"]
        ahead = f"{name} {best[name]:.2f} ({best.baseline}), {after:.2f} after"
        print(f"training has not helped: before it, {ahead}; try {', then '.join(remedies)}")


def print_near_copies(embeddings: list[torch.Tensor], test: pd.DataFrame, images: np.ndarray) -> None:
    """If many queries have a near copy, print their share. A near copy has nearly the same embedding and colours."""
    if len(test) > LARGEST_MAP:
        return
    queries = first_neighbour_table(embeddings, test)
    colours = torch.nn.functional.normalize(colour_histograms(images)).numpy()
    same_colours = (colours[queries.row] * colours[queries.neighbour]).sum(1) > NEAR
    share = 100 * (same_colours & (queries.similarity > NEAR)).mean()
    if share >= MANY_COPIES:
        print(f"{share:.0f} % of the queries have a near copy among the test images: it raises R@1 more than mAP@R")
