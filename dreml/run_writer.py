"""Writing a run folder: its record, its members, its CSV logs; and refusing one that holds something else."""

import contextlib
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import nn
from tqdm import tqdm

from dreml.batches import spans
from dreml.cache import Cache, verify_cache
from dreml.checkpoint import remove_progress
from dreml.cli import InputError, with_less_memory
from dreml.files import atomic_open, make_folder, remove_leftovers, sha256, write_csv, write_record
from dreml.runs import (
    HISTORY_COLUMNS,
    METADATA,
    SUFFIXES,
    TEST_COLUMNS,
    WEIGHTS,
    DamagedRecord,
    DataRecord,
    MemberRecord,
    Members,
    PooledRecord,
    RunRecord,
    TestSplit,
    member_numbers,
    member_path,
    pooled_path,
    read_run_record,
    run_lock,
)
from dreml.settings import Settings
from utils import recall_at_k, similarity_memory

DIGITS = {"loss": 6, "accuracy": 4, "seconds": 3, "images_per_second": 1}  # after the point, in train.csv

# ------------------------------------------------------------------------------------------------ the run


def environment(device: torch.device) -> dict[str, str | int | None]:
    """What a number depends on beside the options: versions, hardware, and the commit of this code."""
    import torchvision  # takes a second, and those that only read a run do without it

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    describe = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
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
    """The record of a run; `options` are those of the command line, `here` its environment.

    Paths become absolute: relative ones would mean something else in another current folder.
    """
    counts = {split: {"classes": c, "images": n} for split, (c, n) in cache.counts.items()}
    data = DataRecord(cache.fingerprint, cache.meta.mean, cache.meta.std, counts)
    options = {name: os.path.abspath(value) if isinstance(value, Path) else value for name, value in options.items()}
    return RunRecord(settings=settings, data=data, options=options, environment=here)


def earlier_record(folder: Path) -> RunRecord | None:
    """The record of a run that was begun before. None if missing; warns if damaged: the members know their run."""
    if not (folder / "args.json").exists():
        return None
    try:
        return read_run_record(folder)
    except DamagedRecord as error:
        print(f"warning: {error}", file=sys.stderr)
        return None


def compare_with_earlier(folder: Path, earlier: RunRecord | None, record: RunRecord) -> str | None:
    """Refuse a run folder whose members belong to other settings or data, by InputError.

    If it was begun in another environment, keep that one in `record` and return a warning.
    """
    if earlier is None:
        return None
    before = asdict(earlier.settings) | {"cache (fingerprint)": earlier.data.fingerprint}
    now = asdict(record.settings) | {"cache (fingerprint)": record.data.fingerprint}
    for key, value in now.items():
        if before[key] != value:
            raise InputError(
                f"{folder} holds members of other settings: {key} {before[key]}, not {value}; "
                "move it away or give another --results_path"
            )
    here = record.environment
    begun_in = earlier.environment
    record.environment = begun_in
    changes = [f"{key} {begun_in.get(key)} (now {here[key]})" for key in here if begun_in.get(key) != here[key]]
    return f"this run was begun with {', '.join(changes)}" if changes else None


def find_members(folder: Path, earlier: RunRecord | None, record: RunRecord) -> Members:
    """The finished members of the run. Raises InputError for a folder that holds members of something unknown."""
    members = Members(folder, record.settings_hash)
    members.refresh()
    known = members.records or members.not_embedded
    if earlier is None and members.warnings and not known:
        raise InputError(
            f"{folder} has no sound args.json and no member of these settings and data: move it away or give "
            "another --results_path"
        )
    return members


def write_run_record(members: Members, record: RunRecord, cache: Cache) -> None:
    """Write `args.json` and `test.csv`, and remove what killed processes left. Raises InputError if it cannot."""
    folder = members.folder
    for name in ("args.json", "cache_compared.json", "*.csv"):
        remove_leftovers(folder, name)
    for member in members.records:
        remove_progress(folder, member)
    try:
        write_record(folder / "args.json", record)
        write_test_csv(folder / "test.csv", cache)
    except OSError as error:
        raise InputError(f"cannot write the results: {error}") from None


def write_test_csv(path: Path, cache: Cache) -> None:
    """Write which images the test split has. A piece at a time: one table would take 400 bytes an image."""
    class_names = np.array(cache.meta.test["classes"], dtype=object)
    columns = [cache.array(f"test_{name}") for name in ("labels", "is_query", "is_gallery")]
    with atomic_open(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(TEST_COLUMNS)
        for start, stop in spans(0, cache.counts["test"][1], 2**12):
            labels, is_query, is_gallery = (column[start:stop] for column in columns)
            table.writerows(
                zip(cache.paths("test", start, stop), labels, is_query, is_gallery, class_names[labels], strict=True)
            )


def verify_once(folder: Path, cache: Cache) -> None:
    """Compare the cache with its checksums, once for each size and time of change of its files.

    Raises InputError if it is damaged. What was compared is remembered in the run folder.
    """
    memory = folder / "cache_compared.json"
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(cache.folder.glob("*.npy"))}
    compared = {"cache": cache.fingerprint, "files": files}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(memory.read_text(encoding="utf-8")) == compared:
            return
    verify_cache(cache)
    make_folder(folder)
    with atomic_open(memory) as file:
        json.dump(compared, file)


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
    weights = record.sha256[member_path(folder, record.member, WEIGHTS).name]
    pooled = PooledRecord(record.member, record.settings_hash, weights, sha256(path))
    write_record(path.with_suffix(".json"), pooled)


def save_weights(path: Path, model: nn.Module, metadata: dict) -> None:
    """Write the state dict of a network as safetensors, with `metadata` as JSON in its header.

    One entry of it: safetensors puts several into a random order, and then the checksum would change with each file.
    """
    state = model.state_dict()
    tensors = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    content = safetensors.torch.save(tensors, {METADATA: json.dumps(metadata, sort_keys=True)})
    with atomic_open(path, "wb") as file:
        file.write(content)


def save_array(path: Path, array: torch.Tensor) -> None:
    """Write a tensor as .npy."""
    with atomic_open(path, "wb") as file:
        np.save(file, array.cpu().numpy(), allow_pickle=False)


def print_outlook(folder: Path, files: str, remaining: int, seconds: float) -> None:
    """Say what the remaining members will need, judged by the one just finished, whose files match `files`."""
    needed = remaining * sum(path.stat().st_size for path in folder.glob(files))
    free = shutil.disk_usage(folder).free
    minutes = remaining * seconds / 60
    duration = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.1f} minutes"
    sizes = f"{tqdm.format_sizeof(needed, 'B')} ({tqdm.format_sizeof(free, 'B')} are free)"
    print(f"the other {remaining} members need about {duration} and {sizes}")
    if needed > free:
        print("warning: the disk will be full before the ensemble is finished", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ logs


def update_logs(
    members: Members, num_members: int, split: TestSplit, ks: list[int], embedding: str, device: torch.device
) -> tuple[pd.DataFrame, list[torch.Tensor]]:
    """Write the logs for all members that are finished by now. One process at a time does so.

    Returns the table of Recall@K, a row for each ensemble size, and the embeddings, of the first `num_members`.
    """
    with run_lock(members.folder):
        largest = max([num_members, *member_numbers(members.folder)])  # a smaller ensemble shortens no log
        embeddings = members.embeddings(largest, embedding, device)
        table = recall_table(embeddings, split, ks)
        write_csv(recall_log(members.folder, embedding), table, float_format="%.4f")
        write_train_log(members.folder, members.records)
    return table.head(num_members), embeddings[:num_members]


def recall_log(folder: Path, embedding: str) -> Path:
    """recall.csv, or recall_pooled.csv"""
    return folder / f"recall{SUFFIXES[embedding]}.csv"


def recall_table(embeddings: list[torch.Tensor], split: TestSplit, ks: list[int]) -> pd.DataFrame:
    """Recall@K in percent, a row for each ensemble size; no row without test images."""
    is_scored = embeddings and len(split.labels)
    recalls = recall_percent(embeddings, split, ks) if is_scored else np.empty((0, len(ks)))
    table = pd.DataFrame(recalls, columns=[f"R@{k}" for k in ks])
    table.insert(0, "ensemble_size", range(1, len(recalls) + 1))
    return table


def recall_percent(embeddings: list[torch.Tensor], split: TestSplit, ks: list[int]) -> np.ndarray:
    """`recall_at_k` in percent, `(L, len(ks)) float64`, with less memory where it runs out."""
    masks = {"is_query": split.is_query, "is_gallery": split.is_gallery}
    memory = similarity_memory(embeddings[0].device)
    recalls = with_less_memory(
        lambda max_bytes: recall_at_k(embeddings, split.labels, ks, max_bytes=max_bytes, **masks), memory
    )
    return 100 * recalls.numpy()


def write_train_log(folder: Path, records: dict[int, MemberRecord]) -> None:
    """Write train.csv: one row for each epoch of each finished member."""
    rows = [{"member": member} | epoch for member in sorted(records) for epoch in records[member].history]
    write_csv(folder / "train.csv", pd.DataFrame(rows, columns=["member", *HISTORY_COLUMNS]).round(DIGITS))
