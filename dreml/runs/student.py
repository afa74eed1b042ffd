"""The students of a run (distill.py): what defines one, what its folder holds, reading it."""

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dreml.backbones import check_backbone, weights_tag
from dreml.console import InputError, natural_number, one_line, positive_float, seed_number
from dreml.files import json_sha256, read_record, sha256
from dreml.runs.folder import Members, Run, RunRecord, read_run, read_run_record, read_test
from dreml.runs.settings import (
    EMBEDDINGS,
    PRECISIONS,
    Settings,
    backbone_in_name,
    check_values,
    joined_tags,
    option,
    weights_in_name,
)

FOLDER = "student_"  # in the run folder, and then the student's tag
RECORD, WEIGHTS, EMBEDDING_FILES = "student.json", "weights.pth", [f"{embedding}.npy" for embedding in EMBEDDINGS]
HISTORY_COLUMNS = ("epoch", "loss", "lr", "seconds", "images_per_second", "teacher_seconds", "student_seconds")

# ------------------------------------------------------------------------------------------------ what defines one


def dimension(text: str) -> int:
    """argparse type: 0, or a positive integer."""
    return 0 if text == "0" else natural_number(text)


ALWAYS_IN_NAME = ("backbone", "num_members", "num_epochs", "seed")
START = "member1"  # the first member's backbone
WEIGHTS_HELP = "begin with: member1 (its backbone; the default where that fits), imagenet, none, or a state dict"
DIM_HELP = "width of the last layer (default: 0, a block of meta-classes for each member)"


@dataclass(frozen=True)
class StudentSettings:
    """What defines a student of a run. Another value of any of these makes another student.

    `backbone` "", `num_members` 0, `weights` "" and `precision` "auto" stand for what the run has; records hold what
    was used.
    """

    backbone: str = option("", backbone_in_name, "of torchvision, or timm:NAME (default: the members')", "NAME")
    num_members: int = option(0, "L{}".format, "members 1 to L teach it (default: all)", "L", natural_number)
    num_epochs: int = option(36, "e{}".format, "epochs (default: 36)", "E", natural_number)
    seed: int = option(0, "s{}".format, "start of all random draws (default: 0)", type=seed_number)
    dim: int = option(0, "d{}".format, DIM_HELP, "d", dimension)
    batch_size: int = option(32, "b{}".format, "images a step (default: 32)", "B", natural_number)
    lr: float = option(1e-3, "lr{!r}".format, "highest learning rate (default: 1e-3)", type=positive_float)
    weights: str = option("", lambda tag: weights_in_name(tag) or "wimagenet", WEIGHTS_HELP, "W")
    precision: str = option(
        "auto", "{}".format, "auto (default: the members'), fp32, bf16 or fp16", "P", choices=("auto", *PRECISIONS)
    )
    photos: str = option("", lambda checksum: f"photos{checksum[:8]}", None)  # those of --images

    def __post_init__(self):
        check_values(self)

    @property
    def num_blocks(self) -> int:
        """How many blocks of its output are each scaled to length 1."""
        return 1 if self.dim else self.num_members

    def width(self, of_run: Settings) -> int:
        """How many outputs its last layer has."""
        return self.dim or self.num_members * of_run.meta_class_size

    def tag(self, of_run: Settings) -> str:
        """`<backbone>_L<members>_e<epochs>_s<seed>` and a tag for each other setting that is not at its default."""
        defaults = StudentSettings(weights=START, precision=of_run.precision)
        return joined_tags(self, defaults, ALWAYS_IN_NAME)


@dataclass
class StudentRecord:
    """`student.json`: how a finished student was made, and the checksums of its files."""

    run: str  # settings_hash of its run
    teachers: list[str]  # SHA-256 of the weights of the members that taught it
    settings: StudentSettings
    photos: dict  # of one's own that it has seen: "folders" and "images"; empty: none
    history: list[dict]  # for each epoch, HISTORY_COLUMNS
    environment: dict
    sha256: dict[str, str]  # file name -> checksum

    def __post_init__(self):
        if not isinstance(self.settings, StudentSettings):
            self.settings = StudentSettings(**self.settings)
        self.photos, self.environment, self.sha256 = dict(self.photos), dict(self.environment), dict(self.sha256)
        self.teachers, self.history = list(self.teachers), [dict(epoch) for epoch in self.history]
        if any(type(epoch.get(name)) not in (int, float) for epoch in self.history for name in HISTORY_COLUMNS):
            raise ValueError("its history lacks a number")

    @property
    def owner(self) -> str:
        """What tells students apart: the checksum of all that defines this one."""
        return json_sha256([self.run, self.teachers, asdict(self.settings)])

    def damaged_files(self, folder: Path, names: list[str]) -> list[str]:
        """Those of its files that are missing or do not match their checksums."""
        files = [folder / name for name in names]
        return [file.name for file in files if not file.exists() or sha256(file) != self.sha256.get(file.name)]

    def is_embedded(self, folder: Path) -> bool:
        """Whether its embeddings of the test images are there and sound."""
        return not self.damaged_files(folder, EMBEDDING_FILES)


def complete_settings(settings: StudentSettings, run: Run) -> StudentSettings:
    """Puts what the run has in the place of "as the run's", and a tag in the place of the weights' name.

    Raises InputError for a backbone that cannot take the images, and for weights that are not there or do not fit it.
    """
    backbone = settings.backbone or run.settings.backbone
    check_backbone(backbone, run.settings.image_size)
    weights = settings.weights or (START if backbone == run.settings.backbone else "imagenet")
    if weights != START:
        weights = weights_tag(backbone, weights)
    elif backbone != run.settings.backbone:
        raise InputError(f"--weights {START} is a {run.settings.backbone}, not a {backbone}")
    precision = run.settings.precision if settings.precision == "auto" else settings.precision
    given = {"backbone": backbone, "weights": weights, "precision": precision, "num_members": run.num_members}
    return replace(settings, **given)


# ------------------------------------------------------------------------------------------------ reading one


def find_student(run_folder: Path, tag: str = "") -> Path:
    """The folder of the finished student with this tag; "": of the only one. Raises InputError if there is none."""
    found = sorted(path.parent for path in run_folder.glob(f"{FOLDER}*/{RECORD}"))
    tags = [path.name.removeprefix(FOLDER) for path in found]
    if not tag and len(found) == 1:
        return found[0]
    if tag in tags:
        return found[tags.index(tag)]
    if not found:
        raise InputError(f"{run_folder} has no student; to make one: python distill.py {shlex.quote(str(run_folder))}")
    which = f"no student {tag!r}" if tag else "several students"
    raise InputError(f"{run_folder} has {which}: give one of {', '.join(tags)}")


def read_student(run_folder: Path, of_run: RunRecord, tag: str, needed: list[str]) -> tuple[Path, StudentRecord]:
    """The folder and the record of a finished student, see `find_student`.

    Raises InputError if it is of another run, or if it or one of the `needed` files is damaged.
    """
    folder = find_student(run_folder, tag)
    try:
        record = read_record(folder / RECORD, StudentRecord)
        if record.run != of_run.settings_hash:
            raise ValueError("of another run")
        damaged = record.damaged_files(folder, needed)
        if damaged:
            raise ValueError(f"{', '.join(damaged)} does not fit its checksum")
    except (ValueError, OSError) as error:
        raise InputError(f"{folder} is damaged ({one_line(error)}); distill.py makes it again") from None
    return folder, record


@dataclass
class StudentRun(Run):
    """A student in the place of the members of its run: one network, whose folder takes what is computed from it."""

    student: StudentRecord

    @property
    def tag(self) -> str:
        return self.folder.name.removeprefix(FOLDER)

    @property
    def run_folder(self) -> Path:
        return self.folder.parent

    @property
    def name(self) -> str:
        folder = self.folder.resolve()
        return f"{folder.parent.name}_{folder.name}"

    @property
    def weights(self) -> list[str]:
        return [self.student.sha256[WEIGHTS]]

    def without_seed(self) -> dict[str, object]:
        own = {f"student {name}": value for name, value in asdict(self.student.settings).items() if name != "seed"}
        return super().without_seed() | own

    def saved_embeddings(self) -> tuple[str, ...]:
        return EMBEDDINGS

    def require(self, embedding: str) -> None:
        """It always has both embeddings."""

    def embeddings(self, embedding: str, device: torch.device) -> list[torch.Tensor]:
        rows = np.load(self.folder / f"{embedding}.npy", allow_pickle=False)
        self.check_length(rows)
        return [torch.from_numpy(rows).to(device)]


def read_student_run(run_folder: Path, tag: str = "") -> StudentRun:
    """Opens a student, see `find_student`, with the test split of its run. Needs no member and writes nothing.

    Raises InputError as `read_student` and `read_run` do.
    """
    record = read_run_record(run_folder)
    folder, student = read_student(run_folder, record, tag, EMBEDDING_FILES)
    members = Members(run_folder, record.settings_hash)  # nobody looks at them
    return StudentRun(folder, record, members, 1, read_test(run_folder), student)


def read_run_or_student(run_folder: Path, num_members: int | None, tag: str | None) -> Run:
    """Opens the first members of a run, or its student with this tag: see `read_run` and `read_student_run`."""
    return read_run(run_folder, num_members) if tag is None else read_student_run(run_folder, tag)


# ------------------------------------------------------------------------------------------------ its recall


def kept_text(table: pd.DataFrame) -> str:
    """Which share of the recall of all members the student keeps, by their logits and, where saved, pooled features.

    `table` is that of distill.py: model, embedding, ensemble_size, dimensions, and recalls, the first of which counts.
    """
    lines, recall, student = [], table.columns[4], table[table.model == "student"]
    for name, rows in table[table.model == "ensemble"].groupby("embedding", sort=False):
        whole = rows.iloc[-1]
        shares = 100 * student[recall] / whole[recall]
        parts = [f"{share:.1f} % ({own})" for share, own in zip(shares, student.embedding, strict=True)]
        what = f"{whole.ensemble_size} members' {'logits' if name == 'logits' else 'pooled features'}"
        lines.append(f"of the {recall} of {what}, the student keeps {' and '.join(parts)}")
    return "\n".join(lines)
