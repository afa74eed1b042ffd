"""A run folder: its record, its members (finished, missing, or being trained elsewhere), its test split, its logs."""

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import nn

from dreml import files
from dreml.cache import Cache, read_cache
from dreml.checkpoint import remove_progress
from dreml.cli import InputError, one_line, out_of_memory, with_less_memory
from dreml.files import read_record, sha256, take_lock, wait_for_lock, write_csv, write_record
from dreml.settings import EMBEDDINGS, Settings
from utils import recall_at_k, similarity_memory

T = TypeVar("T")
FORMAT = 3  # of a run folder; folders of another format are refused
WEIGHTS = "safetensors"  # suffix of the files of weights
METADATA = "dreml"  # key in their header; its value is JSON: settings, partition, mean and std
SAVED = {"logits": "npy", "pooled": "pooled.npy"}  # suffixes of the files of embeddings
SUFFIXES = {"logits": "", "pooled": "_pooled"}  # end of the names of tables made from an embedding
TEST_COLUMNS = {"path": str, "label": np.int64, "is_query": bool, "is_gallery": bool, "class_name": str}  # test.csv
HISTORY_COLUMNS = ("epoch", "loss", "accuracy", "lr", "seconds", "images_per_second")  # train.csv
DIGITS = {"loss": 6, "accuracy": 4, "seconds": 3, "images_per_second": 1}  # decimals in train.csv

# ------------------------------------------------------------------------------------------------ records


@dataclass
class DataRecord:
    """What a run records about its data set."""

    fingerprint: str  # of the cache
    mean: list[float]
    std: list[float]
    counts: dict[str, dict[str, int]]  # split -> classes and images


@dataclass(kw_only=True)
class RunRecord:
    """`args.json`. `settings` and `data` define the members; `options` are the last command's."""

    format: int = FORMAT
    settings: Settings
    data: DataRecord
    options: dict
    environment: dict
    baseline: list[dict] = field(default_factory=list)  # see `update_baseline`

    def __post_init__(self):
        if isinstance(self.settings, dict):
            self.settings = Settings(**self.settings)
        if isinstance(self.data, dict):
            self.data = DataRecord(**self.data)

    @property
    def settings_hash(self) -> str:
        """The checksum of everything that the members of a run have to share.

        Settings at their default are left out. So old runs stay valid when a setting is added.
        """
        plain = asdict(Settings())
        changed = {name: value for name, value in asdict(self.settings).items() if value != plain[name]}
        return files.json_sha256({"settings": changed, "fingerprint": self.data.fingerprint})


@dataclass
class MemberRecord:
    """`member_007.json`: how a finished member was trained, and the checksums of its files."""

    member: int
    settings_hash: str  # of its run
    best_epoch: int
    history: list[dict]  # for each epoch, HISTORY_COLUMNS and more
    partition: list[int]  # the meta-class of each training class
    environment: dict
    sha256: dict[str, str]  # file name -> checksum


def read_run_record(folder: Path) -> RunRecord:
    """Read `args.json`. Raises InputError if it is missing, damaged or of another format."""
    path = folder / "args.json"
    if not os.path.isfile(path):  # unlike Path.is_file, no error if the name is too long
        raise InputError(f"{folder} is not a run folder: it has no args.json")
    try:
        found = read_record(path).get("format", 1)
        if found == FORMAT:
            return read_record(path, RunRecord)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({one_line(error)}): remove it, and train.py makes it again") from None
    reason = f"is of format {found}, and this version of the program reads format {FORMAT}"
    raise InputError(f"{folder} {reason}: train it again under another --results_path")


# ------------------------------------------------------------------------------------------------ members


def member_path(folder: Path, member: int, suffix: str) -> Path:
    """Path of a member's file: `member_path(folder, 7, "json")` is folder/member_007.json."""
    return folder / f"member_{member:03d}.{suffix}"


def member_numbers(folder: Path) -> list[int]:
    """List the members that have a record in a run folder, damaged or not, in order."""
    matches = (re.fullmatch(r"member_([0-9]{3,})\.json", path.name) for path in folder.glob("member_*.json"))
    return sorted(int(match[1]) for match in matches if match)


@dataclass
class Members:
    """The finished members of a run folder, as of the last `refresh`."""

    folder: Path
    settings_hash: str
    records: dict[int, MemberRecord] = field(default_factory=dict)
    needed: tuple[str, ...] = (WEIGHTS, *SAVED.values())  # suffixes of the files that must be undamaged
    warnings: set[str] = field(default_factory=set)  # each is printed once

    def refresh(self, number: int | None = None) -> None:
        """Add newly finished members, or only the first `number`. Warn of damaged ones. Does not write."""
        for member in self.missing(member_numbers(self.folder)[:number]):
            record, damaged = self.read(member)
            warning = f"member {member} is incomplete or damaged ({', '.join(damaged)}); train.py makes it again"
            if not damaged:
                self.records[member] = record
            elif warning not in self.warnings:
                print(f"warning: {warning}", file=sys.stderr)
                self.warnings.add(warning)

    def read(self, member: int) -> tuple[MemberRecord | None, list[str]]:
        """Read a member's record (None if unreadable). List its files that are missing, damaged or of another run."""
        path = member_path(self.folder, member, "json")
        try:
            record = read_record(path, MemberRecord)
        except (ValueError, OSError) as error:
            return None, [f"{path.name}: {one_line(error)}"]
        if (record.member, record.settings_hash) != (member, self.settings_hash):
            return record, [f"{path.name}: from another run or member"]
        paths = [member_path(self.folder, member, suffix) for suffix in self.needed]
        damaged = [path.name for path in paths if not path.exists() or sha256(path) != record.sha256.get(path.name)]
        return record, damaged

    def trained(self, member: int) -> MemberRecord | None:
        """Return a member's record if at most its embeddings are missing or damaged, not its weights; else None."""
        record, damaged = self.read(member)
        embeddings = {member_path(self.folder, member, suffix).name for suffix in SAVED.values()}
        return record if embeddings.issuperset(damaged) else None

    def missing(self, wanted: Iterable[int]) -> list[int]:
        """List the wanted members that are not finished."""
        return [member for member in wanted if member not in self.records]

    def lock_next_missing(self, wanted: Iterable[int]) -> tuple[int, AbstractContextManager] | None:
        """Lock the first wanted member that is missing and not locked elsewhere. Returns it and its lock, or None."""
        for member in self.missing(wanted):
            lock = take_lock(self.folder / f".member_{member:03d}.lock", timeout=0)
            if lock is None:  # another process makes it
                continue
            self.refresh()
            if member not in self.records:
                return member, lock
            with lock:  # another process has finished it in the meantime
                pass
        return None

    def num_first(self) -> int:
        """Return the number of finished members before the first missing one."""
        return next(member for member in itertools.count() if member + 1 not in self.records)


def load_embeddings(folder: Path, num_members: int, embedding: str, device: torch.device) -> list[torch.Tensor]:
    """Load the saved embeddings of members 1 to `num_members`, `(M, d) float32` each.

    d is the number of meta-classes ("logits") or of pooled features ("pooled"). They are on the device, or on the CPU
    if the device has too little memory.
    """
    paths = [member_path(folder, member, SAVED[embedding]) for member in range(1, num_members + 1)]
    arrays = [torch.from_numpy(np.load(path)) for path in paths]
    try:
        on_device = [array.to(device) for array in arrays]
        if device.type != "cpu":
            _ = [torch.empty_like(array) for array in on_device]  # scoring makes a sorted copy of them
        return on_device
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    print(f"warning: the embeddings do not fit on {device}: they are scored on the CPU", file=sys.stderr)
    return arrays


# ------------------------------------------------------------------------------------------------ reading a run


@dataclass
class Run:
    """An opened run folder: its record, its first finished members and its test images."""

    folder: Path
    record: RunRecord
    members: list[MemberRecord]
    test: pd.DataFrame  # TEST_COLUMNS; row i is row i of the embeddings

    @property
    def num_members(self) -> int:
        return len(self.members)

    @property
    def settings(self) -> Settings:
        return self.record.settings

    @property
    def name(self) -> str:
        """The name of the run folder, even if its path was given as "." or a link."""
        return self.folder.resolve().name

    @property
    def weights(self) -> list[str]:
        """The SHA-256 of each member's file of weights, in order."""
        return [each.sha256[member_path(self.folder, each.member, WEIGHTS).name] for each in self.members]

    def data_path(self, named: Path | None) -> Path:
        """Find the folder of data sets: `named` if given, else the one used in training, else data/ here.

        The folder in args.json may not exist: the run may be on another machine, or the data may have been moved.
        """
        recorded, here = Path(self.record.options["data_path"]), Path("data")
        found = (path for path in (recorded, here) if os.path.isdir(path / self.settings.data_name))
        return named or next(found, recorded if os.path.isdir(recorded) else here)

    def read_cache(self, data_path: Path | None) -> Cache:
        """Open the cache of the run's training in `self.data_path(data_path)`. Raises InputError without it."""
        cache = read_cache(self.data_path(data_path), self.settings.data_name, self.settings.image_spec)
        if cache.fingerprint != self.record.data.fingerprint:
            raise InputError(f"{cache.folder} is not the cache of this run: it was made from other images")
        return cache

    def embeddings(self, embedding: str, device: torch.device) -> list[torch.Tensor]:
        """Load the members' embeddings of the test images, see `load_embeddings`."""
        arrays = load_embeddings(self.folder, self.num_members, embedding, device)
        if len(arrays[0]) != len(self.test):
            raise InputError(f"{self.folder}: test.csv has {len(self.test)} images, the embeddings {len(arrays[0])}")
        return arrays


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what `read_run` takes from a run folder."""
    parser.add_argument("--num_members", type=int, metavar="L", help="members 1 to L (default: all that are finished)")
    embedding_help = "logits (default), or pooled: the features before the last layer"
    parser.add_argument("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)


def read_run(folder: Path, num_members: int | None, embedding: str) -> Run:
    """Open a run folder with its members 1 to `num_members`; None: all before the first missing one.

    Needs neither data nor weights, only what the members embedded the test images to. Writes nothing. Raises InputError
    if the folder is not a run, is damaged or has too few members.
    """
    record = read_run_record(folder)
    members = finished_members(folder, record, num_members, SAVED[embedding])
    return Run(folder, record, members, read_test(folder))


def finished_members(folder: Path, record: RunRecord, num_members: int | None, needed: str) -> list[MemberRecord]:
    """Read the records of members 1 to `num_members`; None: of all before the first missing one.

    `needed`: the suffix of the files that must be undamaged. Raises InputError if there are too few.
    """
    if num_members is not None and num_members < 1:
        raise InputError(f"num_members has to be at least 1, not {num_members}")
    members = Members(folder, record.settings_hash, needed=(needed,))
    members.refresh(num_members)
    finished = members.num_first()
    if finished < (num_members or 1):
        raise InputError(f"{folder}: member {finished + 1} of {num_members or 1} is missing; train.py makes it")
    return [members.records[number] for number in range(1, (num_members or finished) + 1)]


def read_test(folder: Path) -> pd.DataFrame:
    """Read `test.csv`, with TEST_COLUMNS. Raises InputError if it is missing or damaged."""
    path = folder / "test.csv"
    try:
        options = {"keep_default_na": False, "lineterminator": "\n"}  # a name may have a carriage return
        return pd.read_csv(path, usecols=list(TEST_COLUMNS), dtype=TEST_COLUMNS, **options)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is missing or damaged ({one_line(error)}); train.py writes it again") from None


def run_lock(folder: Path) -> AbstractContextManager:
    """Take the lock for the files that the whole run shares, such as its logs. Waits while another process holds it."""
    return wait_for_lock(folder.with_name(f".{folder.name}.lock"), folder)  # not inside: a refused run makes no folder


# ------------------------------------------------------------------------------------------------ writing, logs


def make_run_record(settings: Settings, cache: Cache, options: dict[str, object], here: dict) -> RunRecord:
    """Make the record of a run. `options` are from the command line; `here` is from `environment`.

    Paths are made absolute, so that they do not depend on the current folder.
    """
    counts = {split: {"classes": c, "images": n} for split, (c, n) in cache.counts.items()}
    data = DataRecord(cache.fingerprint, cache.meta.mean, cache.meta.std, counts)
    options = {name: os.path.abspath(value) if isinstance(value, Path) else value for name, value in options.items()}
    return RunRecord(settings=settings, data=data, options=options, environment=here)


def open_members(folder: Path, earlier: RunRecord | None, record: RunRecord) -> Members:
    """Find the finished members of a run folder. `earlier` is the record in it, or None; its baselines are kept.

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
    record.baseline = earlier.baseline if earlier else []
    return members


def write_run_record(members: Members, record: RunRecord, test: pd.DataFrame) -> None:
    """Write `args.json` and `test.csv`, and remove temporary files of killed processes."""
    folder = members.folder
    folder.mkdir(exist_ok=True)
    for name in ("args.json", "*.csv"):
        files.remove_leftovers(folder, name)
    for member in members.records:
        remove_progress(folder, member)
    write_record(folder / "args.json", record)
    write_csv(folder / "test.csv", test)


def save_member(
    folder: Path, record: MemberRecord, model: nn.Module, metadata: dict, embeddings: dict[str, torch.Tensor]
) -> None:
    """Write `member_007.safetensors`, `.npy`, `.pooled.npy` and, last, `.json`, which makes the member finished."""
    paths = [member_path(folder, record.member, suffix) for suffix in (WEIGHTS, *SAVED.values())]
    state = model.state_dict()
    tensors = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    # One entry of metadata: safetensors writes several in random order, which would change the checksum each time.
    content = safetensors.torch.save(tensors, {METADATA: json.dumps(metadata, sort_keys=True)})
    with files.atomic_open(paths[0], "wb") as file:
        file.write(content)
    for path, name in zip(paths[1:], SAVED, strict=True):
        with files.atomic_open(path, "wb") as file:
            np.save(file, embeddings[name].cpu().numpy(), allow_pickle=False)
    record.sha256 = {path.name: sha256(path) for path in paths}
    write_record(member_path(folder, record.member, "json"), record)


def update_logs(
    members: Members, num_members: int, test: pd.DataFrame, ks: list[int], embedding: str, device: torch.device
) -> tuple[pd.DataFrame, list[torch.Tensor]]:
    """Write the logs of all finished members, one process at a time.

    Returns, for the first `num_members`, the table of Recall@K, one row per ensemble size, and the embeddings.
    """
    with run_lock(members.folder):
        members.refresh()
        # Not only the first `num_members`: a smaller ensemble must not shorten a log.
        embeddings = load_embeddings(members.folder, members.num_first(), embedding, device)
        is_scored = embeddings and len(test)
        recalls = recall_percent(embeddings, test, ks) if is_scored else np.empty((0, len(ks)))
        table = pd.DataFrame(recalls, columns=[f"R@{k}" for k in ks])
        table.insert(0, "ensemble_size", range(1, len(recalls) + 1))
        write_csv(members.folder / f"recall{SUFFIXES[embedding]}.csv", table, float_format="%.4f")
        records = sorted(members.records.items())
        rows = [{"member": member} | epoch for member, record in records for epoch in record.history]
        log = pd.DataFrame(rows, columns=["member", *HISTORY_COLUMNS]).round(DIGITS)
        write_csv(members.folder / "train.csv", log)
    return table.head(num_members), embeddings[:num_members]


def recall_percent(embeddings: list[torch.Tensor], test: pd.DataFrame, ks: list[int]) -> np.ndarray:
    """Compute `recall_at_k` in percent, `(L, len(ks)) float64`."""
    return 100 * scored(recall_at_k, embeddings, test, ks=ks).numpy()


def scored(metric: Callable[..., T], embeddings: list[torch.Tensor], test: pd.DataFrame, **options: object) -> T:
    """Call a metric of utils.py for the test images (TEST_COLUMNS). If memory runs out, retry with less."""
    columns = {name: torch.from_numpy(np.array(test[name])) for name in ("label", "is_query", "is_gallery")}
    labels = columns.pop("label")

    def call(max_bytes: int) -> T:
        return metric(embeddings, labels, **columns, max_bytes=max_bytes, **options)

    return with_less_memory(call, similarity_memory(embeddings[0].device))
