"""Writing a run folder: its record, its members, its CSV logs; and refusing one that holds something else."""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import nn

from dreml.cache import Cache
from dreml.checkpoint import remove_progress
from dreml.cli import InputError, with_less_memory
from dreml.files import atomic_open, remove_leftovers, sha256, write_csv, write_record
from dreml.runs import (
    HISTORY_COLUMNS,
    METADATA,
    SUFFIXES,
    TEST_COLUMNS,
    WEIGHTS,
    DataRecord,
    MemberRecord,
    Members,
    RunRecord,
    TestSplit,
    member_numbers,
    member_path,
    pooled_path,
    pooled_record,
    run_lock,
)
from dreml.settings import Settings
from utils import recall_at_k, similarity_memory

DIGITS = {"loss": 6, "accuracy": 4, "seconds": 3, "images_per_second": 1}  # decimals in train.csv
T = TypeVar("T")

# ------------------------------------------------------------------------------------------------ the run


def environment(device: torch.device) -> dict[str, str | int | None]:
    """Describe what results depend on beside the options: versions, hardware, and the commit of this code."""
    import torchvision  # takes a second; scripts that only read a run do not need it

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        here = Path(__file__).resolve().parent
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "commit": commit or None,
    }


def make_run_record(settings: Settings, cache: Cache, options: dict[str, object], here: dict) -> RunRecord:
    """Make the record of a run. `options` are from the command line; `here` is from `environment`.

    Paths are made absolute, so that they do not depend on the current folder.
    """
    counts = {split: {"classes": c, "images": n} for split, (c, n) in cache.counts.items()}
    data = DataRecord(cache.fingerprint, cache.meta.mean, cache.meta.std, counts)
    options = {name: os.path.abspath(value) if isinstance(value, Path) else value for name, value in options.items()}
    return RunRecord(settings=settings, data=data, options=options, environment=here)


def open_members(folder: Path, earlier: RunRecord | None, record: RunRecord) -> Members:
    """Find the finished members of a run folder. `earlier` is the record in it, or None.

    Raises InputError if they belong to other settings or data, since they would be overwritten.
    """
    remedy = "move it away, or give another --results_path"
    before = asdict(earlier.settings) if earlier else {}
    for name, value in before.items():
        new = getattr(record.settings, name)
        if new != value:
            raise InputError(f"{folder} holds members of other settings: {name} {value}, not {new}; {remedy}")
    if earlier and earlier.data.fingerprint != record.data.fingerprint:
        raise InputError(f"your photos have changed since the members in {folder} were trained: {remedy}")
    members = Members(folder, record.settings_hash)
    members.refresh()
    if not earlier and members.warnings and not members.records:
        raise InputError(f"{folder} has no args.json, and no sound member of these settings: {remedy}")
    return members


def write_run_record(members: Members, record: RunRecord, cache: Cache) -> None:
    """Write `args.json` and `test.csv`, and remove temporary files of killed processes."""
    folder = members.folder
    folder.mkdir(exist_ok=True)
    for name in ("args.json", "baseline.json", "*.csv"):
        remove_leftovers(folder, name)
    for member in members.records:
        remove_progress(folder, member)
    write_record(folder / "args.json", record)
    columns = {name: np.asarray(cache.array(f"test_{name}")) for name in ("labels", "is_query", "is_gallery")}
    class_names = np.array(cache.meta.test["classes"], dtype=object)[columns["labels"]]
    table = pd.DataFrame({"path": cache.paths("test"), **columns, "class_name": class_names})
    write_csv(folder / "test.csv", table, header=list(TEST_COLUMNS))


# ------------------------------------------------------------------------------------------------ saving a member


def save_member(folder: Path, record: MemberRecord, model: nn.Module, logits: torch.Tensor, metadata: dict) -> None:
    """Write `member_007.safetensors`, `.npy` and, last, `.json`, which makes the member finished."""
    weights = member_path(folder, record.member, WEIGHTS)
    embedding = member_path(folder, record.member, "npy")
    save_weights(weights, model, metadata)
    save_array(embedding, logits)
    record.sha256 = {path.name: sha256(path) for path in (weights, embedding)}
    write_record(member_path(folder, record.member, "json"), record)


def save_pooled(folder: Path, record: MemberRecord, features: torch.Tensor) -> None:
    """Write `pooled_007.npy` and, last, `.json`, for the member of this record."""
    path = pooled_path(folder, record.member, "npy")
    save_array(path, features)
    write_record(path.with_suffix(".json"), pooled_record(folder, record))


def save_weights(path: Path, model: nn.Module, metadata: dict) -> None:
    """Write the state dict of a network as safetensors, with `metadata` as JSON in its header.

    It is a single entry: safetensors writes several in random order, which would change the checksum each time.
    """
    state = model.state_dict()
    tensors = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    with atomic_open(path, "wb") as file:
        file.write(safetensors.torch.save(tensors, {METADATA: json.dumps(metadata, sort_keys=True)}))


def save_array(path: Path, array: torch.Tensor) -> None:
    """Write a tensor as .npy."""
    with atomic_open(path, "wb") as file:
        np.save(file, array.cpu().numpy(), allow_pickle=False)


# ------------------------------------------------------------------------------------------------ logs


def update_logs(
    members: Members, num_members: int, split: TestSplit, ks: list[int], embedding: str, device: torch.device
) -> tuple[pd.DataFrame, list[torch.Tensor]]:
    """Write the logs of all finished members, one process at a time.

    Returns, for the first `num_members`, the table of Recall@K, one row per ensemble size, and the embeddings.
    """
    with run_lock(members.folder):
        largest = max([num_members, *member_numbers(members.folder)])  # a smaller ensemble must not shorten a log
        embeddings = members.embeddings(largest, embedding, device)
        is_scored = embeddings and len(split.labels)
        recalls = recall_percent(embeddings, split, ks) if is_scored else np.empty((0, len(ks)))
        table = pd.DataFrame(recalls, columns=[f"R@{k}" for k in ks])
        table.insert(0, "ensemble_size", range(1, len(recalls) + 1))
        write_csv(members.folder / f"recall{SUFFIXES[embedding]}.csv", table, float_format="%.4f")
        records = sorted(members.records.items())
        rows = [{"member": member} | epoch for member, record in records for epoch in record.history]
        log = pd.DataFrame(rows, columns=["member", *HISTORY_COLUMNS]).round(DIGITS)
        write_csv(members.folder / "train.csv", log)
    return table.head(num_members), embeddings[:num_members]


def recall_percent(embeddings: list[torch.Tensor], split: TestSplit, ks: list[int]) -> np.ndarray:
    """Compute `recall_at_k` in percent, `(L, len(ks)) float64`."""
    return 100 * scored(recall_at_k, embeddings, split, ks=ks).numpy()


def scored(metric: Callable[..., T], embeddings: list[torch.Tensor], split: TestSplit, **options: object) -> T:
    """Call a metric of utils.py for the test split. If memory runs out, retry with less."""
    masks = {"is_query": split.is_query, "is_gallery": split.is_gallery}

    def call(max_bytes: int) -> T:
        return metric(embeddings, split.labels, **masks, max_bytes=max_bytes, **options)

    return with_less_memory(call, similarity_memory(embeddings[0].device))
