"""The embeddings of photos, and the index that keeps those of a folder: a LanceDB table on disk.

The table `photos` has a row for each photo; docs/SEARCH.md names its columns and says how to open it elsewhere. LanceDB
is an extra: it is imported where it is used.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from dreml.cli import InputError, format_problems, num_cores, one_line, progress_bar, require
from dreml.files import json_sha256, read_record, sha256, wait_for_lock, writable, write_record
from dreml.images import IMAGE_VERSION, ImageSpec, bad_image, read_pixels
from dreml.lists import Photos, class_of, list_photos
from dreml.runs import Run

T = TypeVar("T")
Embedder = Callable[[torch.Tensor], torch.Tensor]  # images (N, S, S, 3) uint8 -> rows (N, d) float32 on the CPU
BATCH_SIZE = 128  # images embedded at a time
TABLE = "photos"
RECORD = "index.json"  # beside the table: the folder and the model that it was made for
KEPT_VERSIONS = timedelta(minutes=10)  # older versions of the table are removed: nobody reads for so long
OPTIMIZE_AFTER = 100  # versions of the table; each adds a small file, and many slow it down
MIN_ROWS = 1000  # photos for a vector index: an exact search among fewer takes milliseconds


def embed_images(
    items: Sequence[T], read: Callable[[T], np.ndarray | None], embed: Embedder, title: str, problems: list[str]
) -> Iterator[dict[T, torch.Tensor | None]]:
    """Yield BATCH_SIZE items at a time with their embeddings, `(d,) float32`. What is wrong with others: `problems`.

    `read(item)` returns the pixels `(S, S, 3) uint8`, or None for an image that needs no embedding. It runs in threads.
    """
    starts = range(0, len(items), BATCH_SIZE)
    with ThreadPoolExecutor(num_cores()) as threads:
        for start in progress_bar(starts, title, len(starts), " batches"):
            futures = {item: threads.submit(read, item) for item in items[start : start + BATCH_SIZE]}
            batch = {}
            for item, future in futures.items():
                try:
                    batch[item] = future.result()
                except Exception as error:  # of the disk, and whatever a damaged image makes Pillow raise
                    problems.append(str(bad_image(getattr(error, "filename", None) or "image", error)))
            new = [item for item, pixels in batch.items() if pixels is not None]
            if new:
                rows = embed(torch.from_numpy(np.stack([batch[item] for item in new])))
                batch |= zip(new, rows, strict=True)
            yield batch


def model_checksum(run: Run, embedding: str) -> str:
    """A checksum of all that an embedding hangs on: settings and data, members, which features, how pixels are read."""
    return json_sha256([run.record.settings_hash, embedding, run.num_members, run.weights, IMAGE_VERSION])


def default_place(run_folder: Path, photos: Path, model: str) -> Path:
    """The folder for an index, where none is given."""
    photos = os.path.realpath(photos)
    name = re.sub(r"[^\w.-]", "_", os.path.basename(photos))[:40]
    return run_folder / "index" / f"{name}_{json_sha256([photos, model])[:16]}"


class PhotoIndex:
    """The index of the photos below `folder`, kept at `place` for the model with this checksum.

    Methods raise InputError where the index is damaged, of another folder or model, or cannot be written.
    """

    def __init__(self, folder: Path, place: Path, model: str):
        require("a gallery of photos", "lancedb")
        self.folder = folder
        self.place = place
        self.made_for = {"folder": os.path.realpath(folder), "model": model}
        with self.opened() as table:
            record = self.made_for if table is None else read_record(place / RECORD)
        if record != self.made_for:
            made_for = f"for the photos in {record['folder']}, or for another model"
            raise InputError(f"index {place} was made {made_for}: choose another place")

    @contextlib.contextmanager
    def opened(self, schema=None) -> Iterator:
        """The newest version of the table. If there is none yet: None or, with a schema, a new one."""
        try:
            versions = self.place / f"{TABLE}.lance" / "_versions"  # a process that was killed early leaves it empty
            if schema is None and not any(versions.glob("*.manifest")):
                yield None
                return
            import lancedb

            database = lancedb.connect(os.path.abspath(self.place))
            yield database.create_table(TABLE, schema=schema, exist_ok=True) if schema else database.open_table(TABLE)
        except (RuntimeError, ValueError, OSError) as error:  # what LanceDB raises
            remedy = "choose another place, or delete it if it is damaged"
            raise InputError(f"index {self.place} cannot be used ({one_line(error)}): {remedy}") from None

    def read(self, near: torch.Tensor | None = None, number: int = 0) -> tuple[list[str], torch.Tensor]:
        """The paths of the photos in the index, sorted, and their embeddings `(N, d) float32`.

        With a vector `near` `(d,) float32`, only the `number` nearest to it, or nearly so, by the vector index.
        """
        with self.opened() as table:
            if table is None:
                raise InputError(f"there is no index in {self.place} yet: search with refresh first")
            query = table.search()
            if near is not None:
                number = min(number, table.count_rows())  # of 2**31 or more, Lance raises OverflowError
                query = table.search(near.numpy()).distance_type("cosine").limit(number)
            found = query.to_arrow().sort_by("path")
        if not found.num_rows:
            raise InputError(f"{self.folder}: its index has no photo that can be searched")
        vectors = np.concatenate([chunk.flatten().to_numpy() for chunk in found["vector"].chunks])
        return found["path"].to_pylist(), torch.from_numpy(vectors.reshape(found.num_rows, -1))

    def refresh(self, embed: Embedder, spec: ImageSpec, vector_index: bool = False) -> int:
        """Make the index equal to the folder. Returns how many photos were embedded: only new and changed ones are.

        Each batch is stored when it is done: a killed process loses the batch in hand. `vector_index`: make one, if
        there are photos enough.
        """
        problems: list[str] = []
        hashes: dict[str, str] = {}

        def read(path: str) -> np.ndarray | None:
            file = self.folder / path
            hashes[path] = sha256(file)  # first: if the photo changes after this, the next search embeds it
            return None if hashes[path] == old_hashes.get(path) else read_pixels(file, spec)

        with writable(self.place, "index"), wait_for_lock(self.place / ".lock", self.place):
            photos = list_photos(self.folder, problems)
            with self.opened() as table:
                rows = table.search().select(["path", "size", "mtime", "hash"]).to_arrow().to_pylist() if table else []
            old_hashes = {row["path"]: row["hash"] for row in rows}
            usable = {row["path"] for row in rows if photos.get(row["path"]) == (row["size"], row["mtime"])}
            write_record(self.place / RECORD, self.made_for)
            pending = [path for path in photos if path not in usable]
            num_embedded = 0
            for batch in embed_images(pending, read, embed, "gallery", problems):
                num_embedded += self.store(batch, photos, hashes)
                usable |= batch.keys()
            gone = old_hashes.keys() - usable
            if pending or gone or vector_index:
                self.finish(usable, vector_index)
        print(f"{self.place}: {num_embedded:,} of {len(photos):,} photos embedded, {len(gone):,} removed")
        if problems:
            found = format_problems(problems)
            print(f"warning: files that cannot be used ({len(problems):,}):{found}", file=sys.stderr)
        return num_embedded

    def store(self, batch: dict[str, torch.Tensor | None], photos: Photos, hashes: dict[str, str]) -> int:
        """Store photos with their embeddings, or only the new time of change. Returns how many have an embedding."""
        import pyarrow as pa

        new = []
        touched = []
        for path, vector in batch.items():
            size, mtime = photos[path]
            row = {"path": path, "size": size, "mtime": mtime}
            if vector is None:
                touched.append(row)
            else:
                new.append(row | {"class": class_of(path), "hash": hashes[path], "vector": vector.numpy()})
        if touched:
            with self.opened() as table:
                table.merge_insert("path").when_matched_update_all().execute(touched)
        if new:
            columns = {"path": pa.string(), "class": pa.string(), "size": pa.int64(), "mtime": pa.int64()}
            columns |= {"hash": pa.string(), "vector": pa.list_(pa.float32(), len(new[0]["vector"]))}
            with self.opened(pa.schema(columns)) as table:
                table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(new)
                if table.version % OPTIMIZE_AFTER == 0:
                    table.optimize()
        return len(new)

    def finish(self, usable: set[str], vector_index: bool) -> None:
        """Delete all other photos, let LanceDB tidy up and, if wanted, make the vector index."""
        import pyarrow as pa
        from lancedb.index import HnswSq

        with self.opened() as table:
            if table is None:  # no photo could be used
                return
            paths = pa.table({"path": pa.array(sorted(usable), pa.string())})
            table.merge_insert("path").when_not_matched_by_source_delete().execute(paths)
            table.optimize(cleanup_older_than=KEPT_VERSIONS)  # joins small files, adds new rows to the vector index
            if vector_index and table.count_rows() < MIN_ROWS:
                print(f"{self.place}: too few photos for a vector index: the search is exact")
            elif vector_index and not table.list_indices():
                print(f"{self.place}: making the vector index")
                table.create_index("vector", config=HnswSq(distance_type="cosine"))
