"""The index of a photo folder: a LanceDB table on disk that keeps the embedding of every photo, for the next search.

The table `photos` has a row for each photo, with the columns of `PhotoIndex.schema`; docs/SEARCH.md says how to open it
elsewhere. LanceDB is an extra: it is imported where it is used.
"""

import collections
import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dreml.cli import InputError, format_problems, one_line, print_text
from dreml.files import atomic_open, json_sha256, take_lock, writable
from dreml.images import IMAGE_VERSION
from dreml.photos import IndexedPhotos, Photo, Row, class_of, list_photos, read_photos, walk_order
from dreml.runs import Run
from dreml.search import embed_batch

TABLE = "photos"
COLUMNS = ["path", "size", "mtime", "vector", "model"]  # what a search reads
SKIPPED = "skipped.txt"  # beside the table: the photos that cannot be used
MAX_WAITING = 1024  # rows that need no embedding are written when there are so many
KEPT_VERSIONS = timedelta(minutes=10)  # older versions of the table are removed: nobody reads for so long
MAX_VERSIONS, MAX_FRAGMENTS = 16, 200  # with more, the table is compacted after a refresh, and during one


def is_installed() -> bool:
    """Whether LanceDB is there."""
    return importlib.util.find_spec("lancedb") is not None


def model_checksum(run: Run, embedding: str) -> str:
    """What tells embeddings of different models apart, 64 hexadecimal digits.

    Made from the run's settings and data, the kind of embedding, the members' weights, and how pixels are read.
    """
    return json_sha256([run.record.settings_hash, embedding, run.num_members, run.weights, IMAGE_VERSION])


def default_place(run: Run, photos: Path, model: str) -> Path:
    """Where the index of a photo folder is kept unless another place is named: in the run folder."""
    photos = os.path.realpath(photos)
    name = re.sub(r"[^\w.-]", "_", os.path.basename(photos))[:40]
    which = hashlib.sha256(os.fsencode(photos)).hexdigest()[:8]  # other folders may have this name too
    return run.folder / "index" / f"{name}_{which}_model_{model[:8]}"


# ------------------------------------------------------------------------------------------------ the index


class PhotoIndex:
    """The index of the photos below `folder`, kept at `place` for the model with this checksum.

    Its methods raise InputError where the index is damaged, of another model, or cannot be written.
    """

    def __init__(self, folder: Path, place: Path, model: str):
        self.folder, self.place, self.model = folder, place, model
        if os.path.exists(place) and not os.path.isdir(place):
            raise InputError(f"--index {place} is not a folder")

    @staticmethod
    def schema(width: int):
        """The columns of the table."""
        import pyarrow as pa

        columns = {"path": pa.string(), "class": pa.string(), "size": pa.int64(), "mtime": pa.int64()}
        columns |= {"hash": pa.string(), "vector": pa.list_(pa.float32(), width), "model": pa.string()}
        return pa.schema([pa.field(name, kind, name == "class") for name, kind in columns.items()])

    @functools.cached_property
    def database(self):
        import lancedb

        return lancedb.connect(os.path.abspath(self.place))

    def table(self):
        """The newest version of the table, or None if there is none yet."""
        with self.one_line_errors():
            if not os.path.isdir(self.place):
                return None
            try:
                return self.database.open_table(TABLE)
            except ValueError as error:  # the process that made it was killed before it had a version
                if "was not found" in str(error):
                    return None
                raise

    @contextlib.contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Names the index where LanceDB fails: its errors are plain RuntimeErrors."""
        try:
            yield
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            raise InputError(
                f"--index {self.place} cannot be used ({one_line(error)}); if it is damaged, delete it and search again"
            ) from None

    def scan(self, table, columns: list[str], where: str | None = None):
        """Columns of the table's rows, and `_rowid`, as an Arrow table. Later rows have larger ids."""
        with self.one_line_errors():
            query = table.search().select(columns).with_row_id(True)
            found = (query.where(where) if where else query).to_arrow()
            if "model" in columns and set(found["model"].unique().to_pylist()) - {self.model}:
                raise InputError(
                    f"--index {self.place} is of another model, other members or another --embedding: choose another "
                    "place, or delete it"
                )
            return found

    def photos(self) -> IndexedPhotos:
        """All photos of the index."""
        table = self.table()
        if table is None:
            raise InputError(f"there is no index in {self.place} yet: search once without --refresh never")
        return self.loaded(self.scan(table, COLUMNS))

    def loaded(self, found) -> IndexedPhotos:
        """Rows of the table, an Arrow table, in order. Of a photo's two rows (interrupted refresh) the newer counts."""
        if not found.num_rows:
            raise InputError(f"--gallery {self.folder}: its index has no photo that can be searched")
        paths, start = found["path"].to_pylist(), 0
        vectors = np.empty((len(paths), found["vector"].type.list_size), np.float32)
        for chunk in found["vector"].chunks:
            vectors[start : start + len(chunk)] = chunk.flatten().to_numpy().reshape(len(chunk), -1)
            start += len(chunk)
        newest = {paths[row]: row for row in np.argsort(found["_rowid"].to_numpy(), kind="stable").tolist()}
        order = [newest[path] for path in sorted(newest, key=walk_order)]
        if order != list(range(len(paths))):
            paths, vectors = [paths[row] for row in order], vectors[order]
        sizes, mtimes = (found[name].to_numpy()[order] for name in ("size", "mtime"))
        return IndexedPhotos(self.folder, paths, sizes, mtimes, torch.from_numpy(vectors))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Waits until no other process changes the index, and keeps others from it."""
        with writable(self.place, "--index"):
            lock = take_lock(self.place / ".lock", timeout=0)
        if lock is None:
            print_text(f"another process works on {self.place}: waiting for it (--refresh never would not wait)")
            lock = take_lock(self.place / ".lock")
        with lock:
            yield

    def refresh(self, load: Callable[[], nn.Module], batch_size: int) -> collections.Counter:
        """Makes the index equal to the folder, and prints what was done. Returns the counts.

        Only new and changed photos are embedded, by the ensemble that `load` returns. Each batch is stored when it is
        done, so that a killed process loses the batch in hand.
        """
        if not os.path.isdir(self.folder):
            raise InputError(f"--gallery {self.folder}: no such folder")
        problems: list[str] = []
        with self.locked():
            photos = list_photos(self.folder, problems)  # as it is when nobody else changes the index
            rows = self.rows()
            stored, known = {row.photo for row in rows}, {row.hash for row in rows}
            pending = [photo for photo in photos if photo not in stored]
            added = self.add(pending, load(), known, batch_size, problems) if pending else []
            counts = self.count(rows, photos, added)
            self.drop_stale(self.rows() if added else rows, photos)
            self.report(counts, problems)
        return counts

    def rows(self) -> list[Row]:
        """All rows of the table but their vectors, the older ones first."""
        table = self.table()
        if table is None:
            return []
        found = self.scan(table, ["path", "size", "mtime", "hash", "model"]).sort_by("_rowid")
        columns = [found[name].to_pylist() for name in ("path", "size", "mtime", "hash", "_rowid")]
        return [
            Row(Photo(path, size, mtime), digest, id) for path, size, mtime, digest, id in zip(*columns, strict=True)
        ]

    def add(
        self, pending: list[Photo], ensemble: nn.Module, known: set[str], batch_size: int, problems: list[str]
    ) -> list[tuple[Photo, str, bool]]:
        """Stores rows of photos. Returns (photo, hash, whether it was embedded), a photo of known content was not.

        A batch is the next `batch_size` photos of new content, whatever lies between them: a process that goes on
        after a killed one makes the same batches, and so the same bits.
        """
        batch: dict[str, np.ndarray] = {}  # hash -> pixels
        waiting: list[tuple[Photo, str]] = []
        added = []

        def store(last: bool = False) -> None:
            embedded = {}
            if batch and (last or len(batch) == batch_size):
                rows = embed_batch("--gallery", torch.from_numpy(np.stack(list(batch.values()))), ensemble)
                embedded = dict(zip(batch, rows.cpu().numpy(), strict=True))
                batch.clear()
            ready = [pair for pair in waiting if pair[1] not in batch]
            self.write(ready, embedded)
            known.update(embedded)
            waiting[:] = [pair for pair in waiting if pair[1] in batch]
            for photo, digest in ready:
                added.append((photo, digest, embedded.pop(digest, None) is not None))

        for each in read_photos(self.folder, pending, ensemble.image_spec, known, 2 * batch_size):
            if each.problem:
                problems.append(each.problem)
                continue
            waiting.append((each.photo, each.hash))
            if each.hash not in known:
                batch.setdefault(each.hash, each.pixels)
            if len(batch) == batch_size or len(waiting) >= MAX_WAITING + batch_size:
                store()
        store(last=True)
        return added

    def write(self, ready: list[tuple[Photo, str]], embedded: dict[str, np.ndarray]) -> None:
        """Appends a row for each (photo, hash), with the vector embedded now, or that of a row of the same hash."""
        import pyarrow as pa

        if not ready:
            return
        table = self.table()
        vectors = dict(embedded)
        missing = sorted({digest for _, digest in ready} - set(vectors))
        if missing:
            where = "hash IN ({})".format(", ".join(f"'{digest}'" for digest in missing))
            found = self.scan(table, ["hash", "vector"], where).to_pylist()
            vectors |= {row["hash"]: np.array(row["vector"], np.float32) for row in found}
        matrix = np.stack([vectors[digest] for _, digest in ready])
        width = matrix.shape[1]
        columns = list(zip(*(photo for photo, _ in ready), strict=True))
        arrays = [columns[0], [class_of(path) for path in columns[0]], *columns[1:], [digest for _, digest in ready]]
        arrays += [pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), width), [self.model] * len(ready)]
        rows = pa.table(arrays, schema=self.schema(width))
        with self.one_line_errors():
            if table is None:
                self.database.create_table(TABLE, rows)
            else:
                table.add(rows)
                if table.stats()["fragment_stats"]["num_fragments"] > MAX_FRAGMENTS:
                    compact(table)

    @staticmethod
    def count(rows: list[Row], photos: list[Photo], added: list[tuple[Photo, str, bool]]) -> collections.Counter:
        """What a refresh did, by the rows before, the photos now, and the rows added. A renamed photo is "moved"."""
        before = {row.photo.path: row.hash for row in rows}
        gone = before.keys() - {photo.path for photo in photos}
        gone_hashes = {before[path] for path in gone}
        counts = collections.Counter(photos=len(photos), removed=len(gone))
        for photo, digest, was_embedded in added:
            if photo.path in before:
                kind = "touched" if before[photo.path] == digest else "changed"
            else:
                kind = "moved" if digest in gone_hashes else "new" if was_embedded else "copied"
            counts.update([kind, "embedded"] if was_embedded else [kind])
        counts["removed"] = max(0, counts["removed"] - counts["moved"])
        return counts

    def drop_stale(self, rows: list[Row], photos: list[Photo]) -> None:
        """Deletes all rows but the newest one of each photo as it is now. Compacts a table of many versions."""
        newest = {row.photo: row.id for row in rows}
        kept = {newest.get(photo) for photo in photos}
        stale = [str(row.id) for row in rows if row.id not in kept]
        table = self.table()
        if table is None:
            return
        with self.one_line_errors():
            if stale:
                table.delete(f"_rowid IN ({', '.join(stale)})")
            if len(table.list_versions()) > MAX_VERSIONS:
                compact(table)

    def report(self, counts: collections.Counter, problems: list[str]) -> None:
        """Prints what a refresh did. The problems are listed in a file beside the table, the first 20 are printed."""
        kinds = ("new", "changed", "moved", "copied", "touched", "removed")
        parts = [f"{counts[kind]:,} {kind}" for kind in kinds if counts[kind]] or ["no changes"]
        print_text(f"{self.place}: {counts['photos']:,} photos, {', '.join(parts)}; {counts['embedded']:,} embedded")
        skipped = self.place / SKIPPED
        if not problems:
            skipped.unlink(missing_ok=True)
            return
        with atomic_open(skipped) as file:
            file.writelines(f"{problem}\n" for problem in problems)
        text = f"warning: {len(problems):,} files cannot be used (listed in {skipped}):{format_problems(problems)}"
        print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)


def compact(table) -> None:
    """Joins the table's small files, lets the vector index take in new rows, and removes old versions."""
    table.optimize(cleanup_older_than=KEPT_VERSIONS)
