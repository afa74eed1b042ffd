"""Writing a run folder: its record, its members, its CSV logs; and refusing one that holds something else."""

import contextlib
import csv
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from dreml.batches import spans
from dreml.cache import Cache, verify_cache
from dreml.checkpoint import remove_progress
from dreml.cli import InputError
from dreml.files import (
    atomic_open,
    make_folder,
    remove_leftovers,
    sha256,
    take_lock,
    write_csv,
    write_record,
)
from dreml.runs import (
    FORMAT,
    HISTORY_COLUMNS,
    SUFFIXES,
    TEST_COLUMNS,
    DamagedRecord,
    DataRecord,
    MemberRecord,
    Members,
    PooledRecord,
    RunRecord,
    member_file,
    member_numbers,
    read_run_record,
)
from dreml.settings import Settings

DIGITS = {"loss": 6, "accuracy": 4, "seconds": 3, "images_per_second": 1}  # of the logs of training

# ------------------------------------------------------------------------------------------------ the run


def run_lock(folder: Path) -> contextlib.AbstractContextManager:
    """The lock for what the whole run shares, such as its logs. One process at a time holds it."""
    path = folder.with_name(f".{folder.name}.lock")  # outside: a refused run makes no folder
    held = take_lock(path, timeout=2)
    if held is None:
        print(f"{folder}: waiting for another process of this run", flush=True)
        held = take_lock(path)
    return held


def environment(device: torch.device) -> dict[str, str | int | None]:
    """What a number depends on beside the options: versions, hardware, and the commit of this code."""
    import torchvision  # takes a second, and those that only read a run do without it

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit, changed = "", ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "commit": commit + ("+changes" if changed else "") or None,
    }


def make_run_record(settings: Settings, cache: Cache, options: dict[str, object], here: dict) -> RunRecord:
    """The record of a run; `options` are those of the command line, `here` its environment.

    Paths become absolute: relative ones would mean something else in another current folder.
    """
    counts = {split: {"classes": c, "images": n} for split, (c, n) in cache.counts.items()}
    data = DataRecord(cache.fingerprint, cache.meta.mean, cache.meta.std, counts)
    options = {name: os.path.abspath(value) if isinstance(value, Path) else value for name, value in options.items()}
    return RunRecord(format=FORMAT, settings=settings, data=data, options=options, environment=here)


def earlier_record(folder: Path) -> RunRecord | None:
    """The record of a run that was begun before, or None if it is missing or damaged: the members know their run."""
    if not (folder / "args.json").exists():
        return None
    try:
        return read_run_record(folder)
    except DamagedRecord as error:
        print(f"warning: {error}", file=sys.stderr)
        return None


def compare_with_earlier(folder: Path, earlier: RunRecord | None, record: RunRecord) -> str | None:
    """Refuses a run folder whose members belong to other settings or data, by InputError.

    For one begun in another environment, keeps that in `record` and returns a warning.
    """
    if earlier is None:
        return None
    before, now = (asdict(r.settings) | {"cache (fingerprint)": r.data.fingerprint} for r in (earlier, record))
    for key, value in now.items():
        if before[key] != value:
            raise InputError(
                f"{folder} holds members of other settings: {key} {before[key]}, not {value}; "
                "move it away or give another --results_path"
            )
    here, begun_in = record.environment, earlier.environment
    record.environment = begun_in
    changes = [f"{key} {begun_in.get(key)} (now {here[key]})" for key in here if begun_in.get(key) != here[key]]
    return f"this run was begun with {', '.join(changes)}" if changes else None


def find_members(folder: Path, earlier: RunRecord | None, record: RunRecord) -> Members:
    """The finished members of the run. Raises InputError for a folder that holds members of something unknown."""
    members = Members(folder, record.settings_hash)
    members.refresh()
    if earlier is None and members.damaged and not members.records:
        raise InputError(
            f"{folder} has no sound args.json and no member of these settings and data: move it away or give "
            "another --results_path"
        )
    return members


def write_run_record(members: Members, record: RunRecord, cache: Cache) -> None:
    """Writes `args.json` and `test.csv`, and removes what killed processes left. Raises InputError if it cannot."""
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
    """Writes which images the test split has. A piece at a time: the names of all would take 400 bytes an image."""
    class_names = np.array(cache.meta.test["classes"], dtype=object)
    with atomic_open(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(TEST_COLUMNS)
        for start, stop in spans(0, cache.counts["test"][1], 2**12):
            labels, is_query, is_gallery = (
                cache.array(f"test_{name}")[start:stop] for name in ("labels", "is_query", "is_gallery")
            )
            table.writerows(
                zip(cache.paths("test", start, stop), labels, is_query, is_gallery, class_names[labels], strict=True)
            )


def verify_once(folder: Path, cache: Cache) -> None:
    """Compares the cache with its checksums, once for each size and time of change of its files.

    Raises InputError if it is damaged. What was compared is remembered in the run folder.
    """
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(cache.folder.glob("*.npy"))}
    compared, memory = {"cache": cache.fingerprint, "files": files}, folder / "cache_compared.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if json.loads(memory.read_text(encoding="utf-8")) == compared:
            return
    verify_cache(cache)
    make_folder(folder)
    with atomic_open(memory) as file:
        json.dump(compared, file)


# ------------------------------------------------------------------------------------------------ members


def save_member(folder: Path, record: MemberRecord, model: nn.Module, logits: torch.Tensor) -> None:
    """Writes `member_007.pth`, `.npy` and, last, `.json`, which makes the member finished."""
    weights, embedding = (folder / member_file(record.member, suffix) for suffix in ("pth", "npy"))
    save_weights(weights, model)
    save_array(embedding, logits)
    record.sha256 = {path.name: sha256(path) for path in (weights, embedding)}
    write_record(folder / member_file(record.member, "json"), record)


def save_pooled(folder: Path, member: int, run: str, weights: str, features: torch.Tensor) -> None:
    """Writes `pooled_007.npy` and, last, `.json`. `run` and `weights`: see `PooledRecord`."""
    path = folder / member_file(member, "npy", "pooled")
    save_array(path, features)
    write_record(path.with_suffix(".json"), PooledRecord(member, run, weights, sha256(path)))


def save_weights(path: Path, model: nn.Module) -> None:
    """Writes the state dict of a network, on the CPU."""
    buffer = io.BytesIO()  # torch.save would report a full disk as a RuntimeError
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, buffer)
    with atomic_open(path, "wb") as file:
        file.write(buffer.getbuffer())


def save_array(path: Path, array: torch.Tensor) -> None:
    """Writes a tensor as .npy."""
    with atomic_open(path, "wb") as file:
        np.save(file, array.cpu().numpy(), allow_pickle=False)


def print_outlook(folder: Path, files: str, remaining: int, seconds: float) -> None:
    """Says what the remaining members will need, judged by the one just finished, whose files match `files`."""
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
    members: Members,
    num_members: int,
    device: torch.device,
    recall_table: Callable[[list[torch.Tensor]], pd.DataFrame],
    embedding: str,
) -> tuple[pd.DataFrame, list[torch.Tensor]]:
    """Writes the logs for all members that are finished by then. One process at a time does so.

    `recall_table` computes Recall@K, a row for every ensemble size, from the members' embeddings. Returns that table
    and the embeddings, of the first `num_members`.
    """
    with run_lock(members.folder):
        largest = max([num_members, *member_numbers(members.folder)])  # a smaller ensemble shortens no log
        embeddings = members.embeddings(largest, embedding, device)
        table = recall_table(embeddings)
        write_csv(recall_log(members.folder, embedding), table, float_format="%.4f")
        write_train_log(members.folder, members.records)
    return table.head(num_members), embeddings[:num_members]


def recall_log(folder: Path, embedding: str) -> Path:
    """recall.csv, or recall_pooled.csv"""
    return folder / f"recall{SUFFIXES[embedding]}.csv"


def write_train_log(folder: Path, records: dict[int, MemberRecord]) -> None:
    """Writes train.csv: one row for each epoch of each finished member."""
    rows = [{"member": member} | epoch for member in sorted(records) for epoch in records[member].history]
    write_csv(folder / "train.csv", pd.DataFrame(rows, columns=["member", *HISTORY_COLUMNS]).round(DIGITS))
