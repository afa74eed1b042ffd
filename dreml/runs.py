"""Reading a run folder: its record, its members (finished, missing, or being trained elsewhere), its test split."""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from dreml.cache import Cache, read_cache
from dreml.cli import InputError, one_line, out_of_memory
from dreml.files import json_sha256, read_record, sha256, take_lock, wait_for_lock
from dreml.settings import Settings

FORMAT = 3  # of a run folder; folders of another format are refused
WEIGHTS = "safetensors"  # suffix of the files of weights
METADATA = "dreml"  # key in their header; its value is JSON: settings, partition, mean and std
SUFFIXES = {"logits": "", "pooled": "_pooled"}  # end of the names of tables made from an embedding
TEST_COLUMNS = {"path": str, "label": np.int64, "is_query": bool, "is_gallery": bool, "class_name": str}  # test.csv
HISTORY_COLUMNS = ("epoch", "loss", "accuracy", "lr", "seconds", "images_per_second")  # train.csv

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
        return json_sha256({"settings": changed, "fingerprint": self.data.fingerprint})


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


def pooled_path(folder: Path, member: int, suffix: str) -> Path:
    """Path of a file of a member's pooled features: folder/pooled_007.npy or .json."""
    return folder / f"pooled_{member:03d}.{suffix}"


def member_numbers(folder: Path) -> list[int]:
    """List the members that have a record in a run folder, damaged or not, in order."""
    matches = (re.fullmatch(r"member_([0-9]{3,})\.json", path.name) for path in folder.glob("member_*.json"))
    return sorted(int(match[1]) for match in matches if match)


def pooled_record(folder: Path, record: MemberRecord) -> dict[str, str | int]:
    """Make the content of `pooled_007.json`: the checksums of a member's weights and of its pooled features.

    Raises OSError if there are no pooled features.
    """
    weights = record.sha256[member_path(folder, record.member, WEIGHTS).name]
    checksum = sha256(pooled_path(folder, record.member, "npy"))
    return {"member": record.member, "settings_hash": record.settings_hash, "weights": weights, "sha256": checksum}


@dataclass
class Members:
    """The finished members of a run folder, as of the last `refresh`."""

    folder: Path
    settings_hash: str
    records: dict[int, MemberRecord] = field(default_factory=dict)
    pooled: set[int] = field(default_factory=set)  # the members whose pooled features are saved
    needed: tuple[str, ...] = (WEIGHTS, "npy")  # suffixes of the files that must be undamaged
    warnings: set[str] = field(default_factory=set)  # each is printed once

    def refresh(self, embedding: str = "logits") -> None:
        """Add newly finished members, for "pooled" also their features. Warn of damaged ones. Does not write."""
        for member in self.missing(member_numbers(self.folder)):
            record, damaged = self.read(member)
            if damaged:
                self.warn(f"member {member} is damaged ({', '.join(damaged)})")
            else:
                self.records[member] = record
        for member in self.missing(self.records, "pooled") if embedding == "pooled" else []:
            path = pooled_path(self.folder, member, "json")
            if not path.exists():
                continue
            try:
                if read_record(path) == pooled_record(self.folder, self.records[member]):
                    self.pooled.add(member)
                    continue
                problem = "another run, member, weights or .npy"
            except (ValueError, OSError) as error:
                problem = one_line(error)
            self.warn(f"{path.name} is damaged ({problem})")

    def warn(self, problem: str) -> None:
        """Print a warning, once per problem."""
        if problem not in self.warnings:
            print(f"warning: {problem}; train.py makes it again", file=sys.stderr)
        self.warnings.add(problem)

    def read(self, member: int) -> tuple[MemberRecord | None, list[str]]:
        """Read a member's record (None if unreadable). List its files that are missing, damaged or of another run."""
        path = member_path(self.folder, member, "json")
        try:
            record = read_record(path, MemberRecord)
        except (ValueError, OSError) as error:
            return None, [f"{path.name}: {one_line(error)}"]
        if (record.member, record.settings_hash) != (member, self.settings_hash):
            return record, [f"{path.name}: from another run or member"]
        files = [member_path(self.folder, member, suffix) for suffix in self.needed]
        damaged = [file.name for file in files if not file.exists() or sha256(file) != record.sha256.get(file.name)]
        return record, damaged

    def missing(self, wanted: Iterable[int], embedding: str = "logits") -> list[int]:
        """List the wanted members that are not finished or, for "pooled", that have no pooled features."""
        finished = self.pooled if embedding == "pooled" else self.records
        return [member for member in wanted if member not in finished]

    def lock_next_missing(
        self, wanted: Iterable[int], embedding: str
    ) -> tuple[int, contextlib.AbstractContextManager] | None:
        """Lock the first wanted member that is missing and not locked elsewhere. Returns it and its lock, or None."""
        for member in self.missing(wanted, embedding):
            lock = take_lock(self.folder / f".member_{member:03d}.lock", timeout=0)
            if lock is None:  # another process makes it
                continue
            self.refresh(embedding)
            if self.missing([member], embedding):
                return member, lock
            with lock:  # another process has finished it in the meantime
                pass
        return None

    def embeddings(self, num_members: int, embedding: str, device: torch.device) -> list[torch.Tensor]:
        """Load the saved embeddings of members 1 to `num_members`, or up to the first missing one.

        Returns tensors `(M, d) float32`; d is the number of meta-classes ("logits") or of pooled features ("pooled").
        They are on the device, or on the CPU if the device has too little memory.
        """
        self.refresh(embedding)
        missing = self.missing(range(1, num_members + 1), embedding)
        stop = missing[0] if missing else num_members + 1
        path_of = pooled_path if embedding == "pooled" else member_path
        arrays = [torch.from_numpy(np.load(path_of(self.folder, member, "npy"))) for member in range(1, stop)]
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


class TestSplit(NamedTuple):
    """The classes of the test images, and which are queries and which gallery images, `(M,)` each."""

    labels: torch.Tensor  # int64
    is_query: torch.Tensor  # bool
    is_gallery: torch.Tensor  # bool

    @classmethod
    def from_arrays(cls, labels: np.ndarray, is_query: np.ndarray, is_gallery: np.ndarray) -> "TestSplit":
        """Make it from copies of the arrays, which may be memory maps."""
        return cls(*(torch.from_numpy(np.array(array)) for array in (labels, is_query, is_gallery)))


@dataclass
class Run:
    """An opened run folder: its record, its first finished members and its test images."""

    folder: Path
    record: RunRecord
    members: Members
    num_members: int
    test: pd.DataFrame  # TEST_COLUMNS; row i is row i of the embeddings

    @property
    def settings(self) -> Settings:
        return self.record.settings

    @property
    def split(self) -> TestSplit:
        return TestSplit.from_arrays(self.test.label, self.test.is_query, self.test.is_gallery)

    @property
    def name(self) -> str:
        """The name of the run folder, even if its path was given as "." or a link."""
        return self.folder.resolve().name

    @property
    def weights(self) -> list[str]:
        """The SHA-256 of each member's file of weights, in order."""
        names = {number: member_path(self.folder, number, WEIGHTS).name for number in range(1, self.num_members + 1)}
        return [self.members.records[number].sha256[name] for number, name in names.items()]

    def without_seed(self) -> dict[str, object]:
        """Everything that defines the run's networks, except the seed: settings and data."""
        return self.settings.without_seed() | {"cache": self.record.data.fingerprint[:8]}

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

    def require(self, embedding: str) -> None:
        """Raise InputError unless every member has this embedding."""
        self.members.refresh(embedding)
        missing = self.members.missing(range(1, self.num_members + 1), embedding)
        if missing:
            command = self.record.options.get("command", "python train.py, with the options in args.json,")
            command = re.sub(r" --(members|ensemble_size|embedding)[ =]\S+", "", command)
            command += f" --ensemble_size {self.num_members} --embedding {embedding}"
            text = f"the {embedding} embedding of member {missing[0]} is missing; make it from the saved member with"
            raise InputError(f"{self.folder}: {text}: {command}")

    def embeddings(self, embedding: str, device: torch.device) -> list[torch.Tensor]:
        """Load the members' embeddings of the test images, `(M, d) float32` each; see `Members.embeddings`."""
        arrays = self.members.embeddings(self.num_members, embedding, device)
        for array in arrays:
            if len(array) != len(self.test):
                raise InputError(f"{self.folder}: test.csv has {len(self.test)} images, the embeddings {len(array)}")
        return arrays


def read_run(folder: Path, num_members: int | None = None) -> Run:
    """Open a run folder with its members 1 to `num_members`; None: all before the first missing one.

    Needs neither data nor weights, and writes nothing. Raises InputError if the folder is not a run, is damaged or has
    too few members.
    """
    record = read_run_record(folder)
    members = Members(folder, record.settings_hash, needed=("npy",))
    members.refresh()
    finished = next(member for member in itertools.count() if member + 1 not in members.records)
    if not members.records:
        raise InputError(f"{folder} has no finished member: train it on, or leave it out")
    if finished < (num_members or 1):
        raise InputError(f"{folder}: member {finished + 1} of {num_members or 1} is missing; train.py makes it")
    return Run(folder, record, members, num_members or finished, read_test(folder))


def read_test(folder: Path) -> pd.DataFrame:
    """Read `test.csv`, with TEST_COLUMNS. Raises InputError if it is missing or damaged."""
    path = folder / "test.csv"
    try:
        options = {"keep_default_na": False, "lineterminator": "\n"}  # a name may have a carriage return
        return pd.read_csv(path, usecols=list(TEST_COLUMNS), dtype=TEST_COLUMNS, **options)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is missing or damaged ({one_line(error)}); train.py writes it again") from None


def run_lock(folder: Path) -> contextlib.AbstractContextManager:
    """Take the lock for the files that the whole run shares, such as its logs. Waits while another process holds it."""
    return wait_for_lock(folder.with_name(f".{folder.name}.lock"), folder)  # not inside: a refused run makes no folder
