"""The photos below a folder, their embeddings, and the index that keeps these: a LanceDB table on disk.

The table `photos` has a row for each photo, with the columns of `schema`; docs/SEARCH.md says how to open it elsewhere.
LanceDB is an extra: it is imported where it is used.
"""

import contextlib
import importlib.util
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from dreml.batches import spans
from dreml.cli import (
    InputError,
    RunError,
    format_problems,
    is_utf8,
    num_cores,
    one_line,
    progress_bar,
    with_less_memory,
)
from dreml.files import json_sha256, read_record, sha256, take_lock, writable, write_record
from dreml.images import IMAGE_VERSION, BadImage, ImageSpec, bad_image, read_pixels
from dreml.lists import LeftOut, class_folders
from dreml.runs import Run
from model import Ensemble

T = TypeVar("T")
Embedding = torch.Tensor | BadImage | None  # (d,) float32; or what is wrong; None: it was not needed
BATCH_SIZE = 128  # images embedded at a time
TABLE = "photos"
RECORD = "index.json"  # beside the table: the folder and the model that it was made for
KEPT_VERSIONS = timedelta(minutes=10)  # older versions of the table are removed: nobody reads for so long
OPTIMIZE_AFTER = 100  # batches; each adds a small file, and many slow the table down
MIN_ROWS = 1000  # photos for a vector index: an exact search among fewer takes milliseconds
EF = 200  # photos that the vector index keeps in view on its way
REFINE = 4  # for how many times the wanted photos the vectors themselves are compared, not the index's bytes

# ------------------------------------------------------------------------------------------------ photos


class Photo(NamedTuple):
    """A photo as its folder shows it."""

    path: str  # relative to the photo folder, with forward slashes
    size: int  # bytes
    mtime: int  # time of change, in nanoseconds


def class_of(path: str) -> str | None:
    """The class of a photo, as in data sets: the path of its folder; None for a photo outside any."""
    return path.rpartition("/")[0] or None


def list_photos(name: str, folder: Path, problems: list[str]) -> list[Photo]:
    """All photos below a folder, at any depth. What cannot be read is added to `problems`.

    Says which files are left out, for their types. Raises InputError if there are no photos. `name` says what the
    folder is, "gallery" or "query".
    """
    if not os.path.isdir(folder):
        raise InputError(f"{name} {folder}: no such folder")
    photos = []
    left_out = LeftOut()
    for class_name, files in class_folders(folder, problems, left_out):
        for file in files:
            path = f"{class_name}/{file}" if class_name else file
            try:
                found = os.stat(folder / path)
            except OSError as error:  # a link to nowhere
                problems.append(str(bad_image(folder / path, error)))
                continue
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait without end
                problems.append(f"{folder / path}: not a regular file")
            elif not is_utf8(f"{folder}/{path}"):
                problems.append(f"{str(folder / path)!a}: the name is not valid UTF-8")
            else:
                photos.append(Photo(path, found.st_size, found.st_mtime_ns))
    if not photos:
        reason = f" ({left_out})" if left_out else format_problems(problems)
        raise InputError(f"{name} {folder}: no images below it{reason}")
    if left_out:
        print(f"warning: {name} {folder}: {left_out}", file=sys.stderr)
    return photos


@torch.inference_mode()
def embed_images(
    items: Sequence[T], read: Callable[[T, ImageSpec], np.ndarray | None], load: Callable[[], Ensemble], title: str
) -> Iterator[list[tuple[T, Embedding]]]:
    """Yield BATCH_SIZE items at a time, each with its embedding or with what is wrong with it.

    `read(item, spec)` returns the pixels `(S, S, 3) uint8`, or None for an image that needs no embedding; it runs in
    threads. `load()` returns the ensemble. Embeddings are `(d,) float32` on the CPU, of length 1. Raises RunError for
    one that is not finite.
    """
    if not items:
        return
    ensemble = load()

    def read_or_say(item: T) -> np.ndarray | BadImage | None:
        try:
            return read(item, ensemble.image_spec)
        except Exception as error:  # of the disk, and whatever a damaged image makes Pillow raise
            return bad_image(getattr(error, "filename", None) or "image", error)

    def embed(size: int) -> torch.Tensor:
        return torch.cat([ensemble(part).cpu() for part in pixels.split(size)])

    pieces = spans(0, len(items), BATCH_SIZE)
    with ThreadPoolExecutor(num_cores()) as threads:
        for start, stop in progress_bar(pieces, title, len(pieces), " batches"):
            batch = list(threads.map(read_or_say, items[start:stop]))
            usable = [place for place, image in enumerate(batch) if isinstance(image, np.ndarray)]
            if usable:
                pixels = torch.from_numpy(np.stack([batch[place] for place in usable]))
                rows = with_less_memory(embed, len(pixels))
                if not torch.isfinite(rows).all():
                    raise RunError(f"{title}: the embedding of some images is not finite")
                for place, row in zip(usable, rows, strict=True):
                    batch[place] = row
            yield list(zip(items[start:stop], batch, strict=True))


def embed_folder(folder: Path, load: Callable[[], Ensemble]) -> tuple[list[str], torch.Tensor]:
    """The paths of the photos below a folder, sorted, and their embeddings `(N, d) float32`, without an index."""
    problems: list[str] = []
    paths = sorted(photo.path for photo in list_photos("gallery", folder, problems))
    rows = {}
    for batch in embed_images(paths, lambda path, spec: read_pixels(folder / path, spec), load, "gallery"):
        rows |= {path: row for path, row in batch if not isinstance(row, BadImage)}
        problems += [str(row) for _, row in batch if isinstance(row, BadImage)]
    warn_of(problems)
    if not rows:
        raise InputError(f"gallery {folder}: none of its images can be used")
    return list(rows), torch.stack(list(rows.values()))


def warn_of(problems: list[str]) -> None:
    """Count the files that cannot be used, and name the first of them."""
    if problems:
        text = f"warning: {len(problems):,} files cannot be used:{format_problems(problems)}"
        print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)


# ------------------------------------------------------------------------------------------------ the index


def is_installed() -> bool:
    """Whether LanceDB is there."""
    return importlib.util.find_spec("lancedb") is not None


def model_checksum(run: Run, embedding: str) -> str:
    """What tells embeddings of different models apart, 64 hexadecimal digits.

    Made from the run's settings and data, the kind of embedding, the members' weights, and how pixels are read.
    """
    return json_sha256([run.record.settings_hash, embedding, run.num_members, run.weights, IMAGE_VERSION])


def index_name(photos: Path, model: str) -> str:
    """The name of the folder for an index, where none is given."""
    photos = os.path.realpath(photos)
    name = re.sub(r"[^\w.-]", "_", os.path.basename(photos))[:40]
    return f"{name}_{json_sha256([photos, model])[:16]}"


def schema(width: int):
    """The columns of the table, for embeddings of `width` numbers."""
    import pyarrow as pa

    columns = {"path": pa.string(), "class": pa.string(), "size": pa.int64(), "mtime": pa.int64()}
    return pa.schema(columns | {"hash": pa.string(), "vector": pa.list_(pa.float32(), width)})


class PhotoIndex:
    """The index of the photos below `folder`, kept at `place` for the model with this checksum.

    `moved`: the folder has another place than before, and the index goes on. Methods raise InputError where the index
    is damaged, of another folder or model, or cannot be written.
    """

    def __init__(self, folder: Path, place: Path, model: str, moved: bool = False):
        self.folder = folder
        self.place = place
        self.made_for = {"folder": os.path.realpath(folder), "model": model}
        self.moved = moved
        self.check()

    def check(self) -> None:
        """Raise InputError unless the index is of this folder and model, or not there yet."""
        if os.path.exists(self.place) and not os.path.isdir(self.place):
            raise InputError(f"index {self.place} is not a folder")
        with self.opened() as table:
            record = self.made_for if table is None else read_record(self.place / RECORD)
        if record["model"] != self.made_for["model"]:
            other = "another model, other members or another embedding"
            raise InputError(f"index {self.place} is of {other}: choose another place, or delete it")
        if record["folder"] != self.made_for["folder"] and not self.moved:
            moved = f"if they are in {self.folder} now, search once with refresh moved"
            raise InputError(
                f"index {self.place} is of the photos in {record['folder']}: choose another place; {moved}"
            )

    @contextlib.contextmanager
    def opened(self) -> Iterator:
        """The newest version of the table, or None if there is none yet. Where LanceDB fails, the index is named."""
        versions = self.place / f"{TABLE}.lance" / "_versions"
        try:  # a process that was killed early leaves a folder without a version
            yield self.database().open_table(TABLE) if any(versions.glob("*.manifest")) else None
        except (RuntimeError, ValueError, OSError, ImportError) as error:  # what LanceDB raises
            remedy = "if it is damaged, delete it and search again"
            raise InputError(f"index {self.place} cannot be used ({one_line(error)}); {remedy}") from None

    def database(self):
        import lancedb

        return lancedb.connect(os.path.abspath(self.place))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process changes the index, and keep others from it."""
        with writable(self.place, "index"):
            lock = take_lock(self.place / ".lock", timeout=0)
        if lock is None:
            print(f"another process works on {self.place}: waiting for it (refresh never would not wait)")
            lock = take_lock(self.place / ".lock")
        with lock:
            yield

    def read(self, near: torch.Tensor | None = None, number: int = 0) -> tuple[list[str], torch.Tensor]:
        """The paths of the photos in the index, sorted, and their embeddings `(N, d) float32`.

        With a vector `near` `(d,) float32`, only the `number` nearest to it, or nearly so, by the vector index.
        """
        with self.opened() as table:
            if table is None:
                raise InputError(f"there is no index in {self.place} yet: search once with refresh always")
            query = table.search()
            if near is not None:  # Lance refuses a smaller ef
                number = min(number, table.count_rows())  # of 2**31 or more, Lance raises OverflowError
                query = table.search(near.cpu().numpy()).distance_type("cosine").limit(number)
                query = query.refine_factor(REFINE).ef(max(EF, REFINE * number))
            found = query.to_arrow().sort_by("path")
        if not found.num_rows:
            raise InputError(f"gallery {self.folder}: its index has no photo that can be searched")
        vectors = np.concatenate([chunk.flatten().to_numpy() for chunk in found["vector"].chunks])
        return found["path"].to_pylist(), torch.from_numpy(vectors.reshape(found.num_rows, -1))

    def has_vector_index(self) -> bool:
        """Whether an approximate search is possible."""
        with self.opened() as table:
            return table is not None and any(each.columns == ["vector"] for each in table.list_indices())

    def refresh(self, load: Callable[[], Ensemble], vector_index: bool = False) -> dict[str, int]:
        """Make the index equal to the folder, and print what was done. Returns the counts.

        Only new and changed photos are embedded, by the ensemble that `load` returns. Each batch is stored when it is
        done: a killed process loses the batch in hand. `vector_index`: make one, if there are photos enough.
        """
        problems: list[str] = []
        hashes: dict[Photo, str] = {}
        counts = {"new": 0, "changed": 0, "removed": 0}

        def read(photo: Photo, spec: ImageSpec) -> np.ndarray | None:
            file = self.folder / photo.path
            hashes[photo] = sha256(file)  # first: a photo that changes after this is embedded by the next search
            known = photo.path in stored and stored[photo.path][1] == hashes[photo]
            return None if known else read_pixels(file, spec)

        with self.locked():
            self.check()
            photos = list_photos("gallery", self.folder, problems)
            with writable(self.place, "index"):
                write_record(self.place / RECORD, self.made_for)
            stored = self.stored()
            pending = [photo for photo in photos if photo.path not in stored or stored[photo.path][0] != photo]
            usable = {photo.path for photo in photos}
            for number, batch in enumerate(embed_images(pending, read, load, "gallery"), 1):
                self.write(batch, hashes, number % OPTIMIZE_AFTER == 0)
                for photo, row in batch:
                    if isinstance(row, BadImage):
                        problems.append(str(row))
                        usable.remove(photo.path)
                    elif row is not None:
                        counts["changed" if photo.path in stored else "new"] += 1
            gone = sorted(stored.keys() - usable)
            counts["removed"] = len(gone)
            self.finish(gone, bool(pending or gone), vector_index)
        changes = ", ".join(f"{number:,} {kind}" for kind, number in counts.items() if number) or "no changes"
        num_embedded = counts["new"] + counts["changed"]
        print(f"{self.place}: {len(photos):,} photos, {changes}; {num_embedded:,} embedded")
        warn_of(problems)
        return counts

    def stored(self) -> dict[str, tuple[Photo, str]]:
        """The photos of the table and their hashes, by path."""
        with self.opened() as table:
            found = [] if table is None else table.search().select([*Photo._fields, "hash"]).to_arrow().to_pylist()
        return {row["path"]: (Photo(row["path"], row["size"], row["mtime"]), row["hash"]) for row in found}

    def write(self, batch: list[tuple[Photo, Embedding]], hashes: dict[Photo, str], optimize: bool) -> None:
        """Store a batch, in the place of earlier rows of the same paths. Without an embedding, theirs stays."""
        import pyarrow as pa

        rows = []
        touched = []
        for photo, row in batch:
            if row is None:
                touched.append(photo._asdict())
            elif not isinstance(row, BadImage):
                more = {"class": class_of(photo.path), "hash": hashes[photo], "vector": row.numpy()}
                rows.append(photo._asdict() | more)
        with self.opened() as table:
            if touched:
                table.merge_insert("path").when_matched_update_all().execute(pa.Table.from_pylist(touched))
            if rows:
                columns = schema(len(rows[0]["vector"]))
                if table is None:
                    table = self.database().create_table(TABLE, schema=columns)
                merge = table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(pa.Table.from_pylist(rows, schema=columns))
            if optimize and table is not None:
                table.optimize()

    def finish(self, gone: list[str], changed: bool, vector_index: bool) -> None:
        """Delete the rows of photos that are gone, and let LanceDB tidy up."""
        with self.opened() as table:
            for start, stop in spans(0, len(gone), 1000):
                names = ", ".join("'" + path.replace("'", "''") + "'" for path in gone[start:stop])
                table.delete(f"path IN ({names})")
            if table is not None and changed:  # joins small files, adds new rows to the vector index
                table.optimize(cleanup_older_than=KEPT_VERSIONS)
            if vector_index and table is not None and table.count_rows() >= MIN_ROWS and not self.has_vector_index():
                from lancedb.index import HnswSq

                print(f"{self.place}: making the vector index")
                table.create_index("vector", config=HnswSq(distance_type="cosine"))
