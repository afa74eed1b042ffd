"""Approximate search in the index of a photo folder, by Lance's own vector index, and how much it misses."""

import contextlib

import numpy as np
import torch

from dreml.cli import InputError, print_text
from dreml.files import read_record, writable, write_record
from dreml.index import COLUMNS, IndexedPhotos, PhotoIndex
from dreml.search import Found, Item, find_neighbours, nearest

MIN_ROWS = 1000  # below, an exact search takes milliseconds
EF = 200  # photos that the vector index keeps in view on its way; more found no more (docs/SEARCH.md)
REFINE = 4  # for how many times K photos the vectors themselves are compared, not the index's bytes
NUM_SAMPLES = 100  # photos by which the recall is measured


class ApproximateSearch:
    """Searches a `PhotoIndex` by a vector index, which is made if there is none and `may_build` allows it."""

    def __init__(self, index: PhotoIndex, may_build: bool):
        self.index, self.table, self.may_write = index, index.table(), may_build
        num_rows = self.table.count_rows() if self.table else 0
        if num_rows < MIN_ROWS:
            raise InputError(
                f"--ann needs at least {MIN_ROWS:,} photos, {index.place} has {num_rows:,}: search without --ann"
            )
        if not self.has_vector_index():
            if not may_build:
                raise InputError(f"--ann: {index.place} has no vector index yet: search once without --refresh never")
            self.build()

    def has_vector_index(self) -> bool:
        return any(each.columns == ["vector"] for each in self.table.list_indices())

    def build(self) -> None:
        """Makes the vector index, unless another process has made it in the meantime."""
        from lancedb.index import HnswSq

        with self.index.locked():
            self.table = self.index.table()
            if not self.has_vector_index():
                print_text(f"{self.index.place}: making the vector index")
                with self.index.one_line_errors():
                    self.table.create_index("vector", config=HnswSq(distance_type="cosine"))

    def candidates(self, vector: torch.Tensor, top: int) -> IndexedPhotos:
        """Photos that are nearest to a vector `(d,) float32`, or nearly so: a few more than `top`."""
        with self.index.one_line_errors():
            query = self.table.search(vector.numpy()).distance_type("cosine").limit(top + 8)
            query = query.refine_factor(REFINE).ef(max(EF, REFINE * (top + 8)))  # Lance refuses a smaller one
            return self.index.loaded(query.select([*COLUMNS, "_distance"]).with_row_id(True).to_arrow())

    def find(self, queries: list[Item], query_rows: torch.Tensor, top: int) -> list[Found]:
        """As `find_neighbours`, but it may miss some neighbours."""
        found = []
        for query, row in zip(queries, query_rows.cpu(), strict=True):
            nearby = self.candidates(row, top)
            found += find_neighbours([query], row[None], nearby, nearby.vectors, top)
        return found

    def print_recall(self, top: int) -> None:
        """Prints the recall of the first `top`. It is measured anew only when the table has changed."""
        path, now = self.index.place / "recall.json", {"version": self.table.version, "top": top}
        record = {}
        with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
            record = read_record(path)
        if {name: record.get(name) for name in now} != now:
            record = now | {"recall": self.measure_recall(top)}
            if self.may_write:  # not into an index that is to stay as it is
                with writable(self.index.place, "--index"):
                    write_record(path, record)
        print_text(
            f"approximate: recall@{top} {record['recall']:.4f} against exact search ({NUM_SAMPLES} sampled photos)"
        )

    def measure_recall(self, top: int) -> float:
        """The share of the exact `top` neighbours that are found, for sampled photos. Of equal ones any counts."""
        photos, hits = self.index.photos(), 0
        sample = np.random.default_rng(0).choice(len(photos), NUM_SAMPLES, replace=False)
        exact = nearest(photos.vectors[sample], photos.vectors, top, sample)[0]
        for row, similarities in zip(sample.tolist(), exact, strict=True):
            nearby, vector = self.candidates(photos.vectors[row], top), photos.vectors[row]
            itself = nearby.paths.index(photos.paths[row]) if photos.paths[row] in nearby.paths else -1
            least = similarities[-1] - 1.5e-6  # products of other shapes can be rounded to the next 1e-6
            hits += int((nearest(vector[None], nearby.vectors, top, [itself])[0] >= least).sum())
        return hits / (NUM_SAMPLES * top)
