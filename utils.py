"""The method's computations: seeded random draws, meta-class partitions, Recall@K, mAP@R. Imports no project module."""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

TIE_TOLERANCE = 1e-6  # per member: summed cosines this close count as equal, so that rounding decides nothing
# Most rows of a block of similarities. On a CPU, larger blocks are not faster; a GPU needs few large launches.
LARGEST_BLOCK = {"cpu": 2**10, "cuda": 2**14, "mps": 2**14}

# ------------------------------------------------------------------------------------------------ partitions


def rng_for(seed: int, member: int, epoch: int, purpose: str) -> np.random.Generator:
    """Return the random generator for one purpose in one epoch of one member.

    It depends on these four arguments only. So member 7 is the same whether or not members 1-6 were trained before it,
    and an epoch can be repeated. `seed`, `member` and `epoch` are below 2**32.
    """
    return np.random.default_rng(np.random.SeedSequence((seed, member, epoch, zlib.crc32(purpose.encode()))))


def meta_class_partition(num_classes: int, num_meta_classes: int, generator: np.random.Generator) -> np.ndarray:
    """Draw a random, balanced partition of the training classes into meta-classes (paper, section 3).

    Returns `(num_classes,) int64`: the meta-class, 0..num_meta_classes-1, of every class. Each meta-class gets
    floor(N/D) or ceil(N/D) classes. Raises ValueError unless 2 <= num_meta_classes <= num_classes.
    """
    if not 2 <= num_meta_classes <= num_classes:
        raise ValueError(f"cannot divide {num_classes} classes into {num_meta_classes} meta-classes")
    rounds = -(-num_classes // num_meta_classes)
    partition = np.concatenate([generator.permutation(num_meta_classes) for _ in range(rounds)])[:num_classes]
    generator.shuffle(partition)
    return partition.astype(np.int64)


def capped_images(labels: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """Draw the training images of a member: at most `most` random images of each class.

    `labels` `(N,) int64`: the class of each image. Returns their indices, sorted, `(n,) int64`.
    """
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])  # where each image's class starts
    return np.sort(by_class[np.arange(len(labels)) - starts < most])


# ------------------------------------------------------------------------------------------------ Recall@K


@torch.inference_mode()
def recall_at_k(
    embeddings: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    ks: Sequence[int],
    *,
    is_query: torch.Tensor | None = None,
    is_gallery: torch.Tensor | None = None,
    max_bytes: int | None = None,
) -> torch.Tensor:
    """Share of queries with an image of their own class among the K most similar, for every ensemble size.

    The similarity of two images is the sum of the first l members' cosines. The rank of a query is the number of images
    of *other* classes whose similarity is at least the best own-class similarity minus 1e-6 * l; the query itself is
    excluded by index. A query is a hit at K if its rank is below K. So ties count against the query: a constant
    embedding scores 0, not 1. A query is a miss if its class has no other gallery image.

    Args:
        embeddings: one `(N, d)` tensor, or a sequence of L tensors `(N, d_l)`, one for each member, of any float dtype
            and on one device. Each row is scaled to length 1 here.
        labels: `(N,)` integers.
        ks: positive integers.
        is_query, is_gallery: `(N,) bool`; None: every image. An image may be both, or neither.
        max_bytes: memory for similarities; None: `similarity_memory`. They are computed in blocks of at least 16 rows,
            never as an N x N matrix. A float32 copy of the embeddings is held beside the blocks.

    Returns `(L, len(ks)) float64` on the CPU, in [0, 1]; row l-1 is the ensemble of the first l members. Raises
    ValueError for shapes that do not fit, a K below 1, no query, no gallery, or embeddings that are not finite.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"every K has to be a positive integer, not {list(ks)}")
    pairs = _pairs_by_class(embeddings, labels, is_query, is_gallery, max_bytes)
    with full_float32(pairs.device.type):
        thresholds = _best_own_similarities(pairs)
        thresholds -= TIE_TOLERANCE * torch.arange(1, pairs.num_members + 1, device=pairs.device)[:, None]
        ranks = _count_others_above(pairs, thresholds)
    has_match = pairs.num_own > 0
    hits = torch.stack([((ranks < k) & has_match).sum(1) for k in ks], dim=1)
    return hits.cpu().double() / len(has_match)


def similarity_memory(device: torch.device) -> int:
    """Return the bytes that scoring may use for similarities: on CUDA a quarter of the free memory, elsewhere 1 GiB."""
    if device.type != "cuda":
        return 2**30
    kept_by_pytorch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, too
    return (torch.cuda.mem_get_info(device)[0] + kept_by_pytorch) // 4


def _best_own_similarities(pairs: "_Pairs") -> torch.Tensor:
    """Best similarity of each query to another image of its class, `(L, queries) float32`; -inf if there is none."""
    best = torch.full((pairs.num_members, pairs.num_queries), -torch.inf, device=pairs.device)
    step = max(min(pairs.block, 256), pairs.block // 4)
    for start in range(0, pairs.num_queries, step):
        stop = min(start + step, pairs.num_queries)
        for left in range(pairs.first[start], pairs.last[stop - 1], pairs.block):
            right = min(left + pairs.block, pairs.last[stop - 1])
            sums = _zeros_at(pairs.own(start, stop, left, right))
            for index in range(pairs.num_members):
                pairs.add_cosines(sums, index, start, left)
                best[index, start:stop] = torch.maximum(best[index, start:stop], sums.amax(1))
    return best


def _count_others_above(pairs: "_Pairs", thresholds: torch.Tensor) -> torch.Tensor:
    """Count the images of other classes that reach each query's threshold, `(L, queries) int32`, block by block.

    If queries and gallery are the same images, each block of the symmetric matrix is computed once: its columns count
    as queries, too, from gallery image max(stop, left) on.
    """
    ranks = torch.zeros((pairs.num_members, pairs.num_queries), dtype=torch.int32, device=pairs.device)
    reached = torch.empty(0, device=pairs.device)
    width = 4 * pairs.block
    for start in range(0, pairs.num_queries, pairs.block):
        stop = min(start + pairs.block, pairs.num_queries)
        for left in range(start if pairs.symmetric else 0, pairs.num_gallery, width):
            right = min(left + width, pairs.num_gallery)
            rest = max(stop, left)
            sums = torch.zeros((stop - start, right - left), device=pairs.device)
            if left < pairs.last[stop - 1] and right > pairs.first[start]:  # else the block has no pair of one class
                sums.masked_fill_(pairs.same_class(start, stop, left, right), -torch.inf)
            if reached.shape != sums.shape:
                reached = torch.empty_like(sums)
            for index in range(pairs.num_members):
                pairs.add_cosines(sums, index, start, left)
                # Write 0.0 and 1.0, not bool: summing floats took a twentieth of the time on the CPU.
                torch.ge(sums, thresholds[index, start:stop, None], out=reached)
                ranks[index, start:stop] += reached.sum(1).int()
                if pairs.symmetric and rest < right:
                    torch.ge(sums, thresholds[index, left:right], out=reached)
                    ranks[index, rest:right] += reached[:, rest - left :].sum(0).int()
    return ranks


# ------------------------------------------------------------------------------------------------ mAP@R


@torch.inference_mode()
def map_at_r(
    embeddings: torch.Tensor | Sequence[torch.Tensor], labels: torch.Tensor, **options: torch.Tensor | int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """mAP@R and R-Precision for every ensemble size (Musgrave et al., "A Metric Learning Reality Check", 2020).

    R is the number of gallery images of the query's class, without the query itself. R-Precision is the share of
    own-class images among the R most similar ones. mAP@R sums the precision at the position of each of these own-class
    images and divides by R. Both are means over the queries with R > 0, as in pytorch-metric-learning; NaN if none.

    As in `recall_at_k`, ties count against the query: the position of its i-th most similar own-class image is i plus
    the number of images of *other* classes whose similarity is at least that image's minus 1e-6 * l. So the numbers do
    not depend on the order of the images. A constant embedding scores 0 unless R exceeds the number of these images.

    Arguments, options and errors are those of `recall_at_k`; blocks hold whole rows of the similarity matrix, at least
    16. Returns (mAP@R, R-Precision), each `(L,) float64` on the CPU, in [0, 1], for the first l members.
    """
    # A row needs at most 16 floats per gallery image: its similarities, those to its own class again, and what is
    # computed from the R nearest of both. It needs all 16 if its class is nearly the whole gallery.
    pairs = _pairs_by_class(embeddings, labels, **options, floats_of_a_row=16 * len(labels))
    scores = torch.zeros((2, pairs.num_members, pairs.num_queries), device=pairs.device)
    with full_float32(pairs.device.type):
        for start in range(0, pairs.num_queries, pairs.block):
            stop = min(start + pairs.block, pairs.num_queries)
            left, right = pairs.first[start], pairs.last[stop - 1]  # outside this range, all classes are others
            own = _zeros_at(pairs.own(start, stop, left, right))
            others = _zeros_at(~pairs.same_class(start, stop, 0, pairs.num_gallery))
            num_own = pairs.num_own[start:stop, None]
            for index in range(pairs.num_members):
                pairs.add_cosines(own, index, start, left)
                pairs.add_cosines(others, index, start, 0)
                tolerance = TIE_TOLERANCE * (index + 1)
                scores[:, index, start:stop] = _precisions(own, others, num_own, tolerance)
    mean = scores[:, :, pairs.num_own > 0].cpu().double().mean(2)
    return mean[0], mean[1]


def _precisions(own: torch.Tensor, others: torch.Tensor, num_own: torch.Tensor, tolerance: float) -> torch.Tensor:
    """mAP@R and R-Precision of a block of queries, `(2, queries) float32`.

    `own` and `others` are similarities to images of the query's class and of other classes; -inf means no image.
    """
    most = int(num_own.max())
    ordinal = torch.arange(1, most + 1, device=own.device)
    # Both are sorted, nearest first, and negated: searchsorted needs ascending values. Only the `most` nearest others
    # are counted: an image behind all of them is beyond R anyway.
    reach = own.topk(most).values - tolerance
    position = ordinal + torch.searchsorted(-others.topk(most).values, -reach, right=True)
    found = position <= num_own
    return torch.stack([(found * ordinal / position).sum(1) / num_own[:, 0], found.sum(1) / num_own[:, 0]])


# ------------------------------------------------------------------------------------------------ nearest images


@torch.inference_mode()
def nearest_images(
    embeddings: torch.Tensor | Sequence[torch.Tensor], labels: torch.Tensor, **options: torch.Tensor | int | None
) -> dict[str, torch.Tensor]:
    """Find the nearest image of each query, of its own class and of others, in the ensemble of all members.

    The similarity is the mean of the members' cosines. As in Recall@1, ties count against the query: the first
    neighbour is of its class if that similarity is more than 1e-6 above the other. Arguments, options and errors are
    those of `recall_at_k`; blocks hold whole rows of the similarity matrix, at least 16.

    Returns tensors `(queries,)` on the CPU, queries in row order: "own" and "other", the similarities to the nearest
    image of the query's class and of another one, float32, -inf if there is none; "neighbour", the row of the first
    neighbour, int64, -1 if there is none; "right", whether it is of the query's class.
    """
    pairs = _pairs_by_class(embeddings, labels, **options, floats_of_a_row=4 * len(labels))
    best = torch.full((2, pairs.num_queries), -torch.inf, device=pairs.device)
    places = torch.zeros((2, pairs.num_queries), dtype=torch.int64, device=pairs.device)
    with full_float32(pairs.device.type):
        for start in range(0, pairs.num_queries, pairs.block):
            stop = min(start + pairs.block, pairs.num_queries)
            sums = torch.zeros((stop - start, pairs.num_gallery), device=pairs.device)
            for index in range(pairs.num_members):
                pairs.add_cosines(sums, index, start, 0)
            left, right = pairs.first[start], pairs.last[stop - 1]  # outside this range, all classes are others
            band = sums[:, left:right]
            if left < right:
                own = band.masked_fill(~pairs.own(start, stop, left, right), -torch.inf)
                best[0, start:stop], places[0, start:stop] = own.max(1)
                places[0, start:stop] += left
            band.masked_fill_(pairs.same_class(start, stop, left, right), -torch.inf)
            best[1, start:stop], places[1, start:stop] = sums.max(1)
    is_right = best[0] - TIE_TOLERANCE * pairs.num_members > best[1]
    rows = pairs.gallery.order[torch.where(is_right, places[0], places[1])]
    rows[best.amax(0).isneginf()] = -1
    own, other = best / pairs.num_members
    by_row = torch.argsort(pairs.queries.order)
    found = {"own": own, "other": other, "neighbour": rows, "right": is_right}
    return {name: values[by_row].cpu() for name, values in found.items()}


# ------------------------------------------------------------------------------------------------ images by class


class _Images:
    """The chosen images, sorted by class, and a copy of their embeddings with rows of length 1."""

    def __init__(self, members: Sequence[torch.Tensor], labels: torch.Tensor, chosen: torch.Tensor):
        order = torch.argsort(labels, stable=True)
        self.order = order[chosen[order]]  # (n,) int64
        self.labels = labels[self.order]  # (n,) int64, ascending
        self.members = [_unit_rows(member[self.order].float()) for member in members]


@dataclass
class _Pairs:
    """All pairs of a query and a gallery image, both sorted by class, so that pairs of one class lie in a band."""

    queries: _Images
    gallery: _Images  # the same object if they are the same images
    first: list[int]  # where each query's class starts in the gallery
    last: list[int]  # and where it ends
    num_own: torch.Tensor  # (queries,) int64, other gallery images of each query's class
    block: int  # rows of a block of similarities

    def __post_init__(self):
        self.device = self.num_own.device
        self.num_members = len(self.queries.members)
        self.num_queries = len(self.queries.order)
        self.num_gallery = len(self.gallery.order)
        self.symmetric = self.queries is self.gallery

    def same_class(self, start: int, stop: int, left: int, right: int) -> torch.Tensor:
        """Compare the classes of queries start:stop and gallery images left:right, `(rows, columns) bool`."""
        return self.queries.labels[start:stop, None] == self.gallery.labels[left:right]

    def own(self, start: int, stop: int, left: int, right: int) -> torch.Tensor:
        """As `same_class`, but False for a pair of an image and itself."""
        other = self.queries.order[start:stop, None] != self.gallery.order[left:right]
        return self.same_class(start, stop, left, right) & other

    def add_cosines(self, sums: torch.Tensor, index: int, start: int, left: int) -> None:
        """Add one member's cosines to a block of sums, whose first query is `start` and first gallery image `left`."""
        num_rows, num_columns = sums.shape
        rows = self.queries.members[index][start : start + num_rows]
        sums.addmm_(rows, self.gallery.members[index][left : left + num_columns].T)


def _pairs_by_class(
    embeddings: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    is_query: torch.Tensor | None = None,
    is_gallery: torch.Tensor | None = None,
    max_bytes: int | None = None,
    floats_of_a_row: int | None = None,
) -> _Pairs:
    """Check the arguments of `recall_at_k`, sort the images by class, and choose the size of a block of similarities.

    `floats_of_a_row`: number of float32 values that a row of a block needs. None: blocks are `block` x `4 * block`, and
    three are held at once.
    """
    members = [embeddings] if isinstance(embeddings, torch.Tensor) else list(embeddings)
    labels = torch.as_tensor(labels)
    if not members or any(member.ndim != 2 or len(member) != len(labels) for member in members) or labels.ndim != 1:
        raise ValueError("embeddings have to be (N, d) tensors and labels (N,), with the same N")
    if labels.is_floating_point():
        raise ValueError("labels have to be integers")
    device = members[0].device
    masks = []
    for name, mask in (("is_query", is_query), ("is_gallery", is_gallery)):
        mask = torch.ones(len(labels), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.shape != labels.shape or not mask.any():
            raise ValueError(f"{name} has to be ({len(labels)},) bool, with at least one True")
        masks.append(mask.to(device))
    max_bytes = similarity_memory(device) if max_bytes is None else max_bytes
    block = LARGEST_BLOCK[device.type]
    while block > 16 and 4 * block * (floats_of_a_row or 12 * block) > max_bytes / 2:  # half is left for the copy
        block //= 2
    labels = labels.to(device).long()
    queries = _Images(members, labels, masks[0])
    gallery = queries if torch.equal(*masks) else _Images(members, labels, masks[1])
    first = torch.searchsorted(gallery.labels, queries.labels)
    last = torch.searchsorted(gallery.labels, queries.labels, right=True)
    num_own = last - first - masks[1][queries.order].long()
    return _Pairs(queries, gallery, first.tolist(), last.tolist(), num_own, block)


def _zeros_at(kept: torch.Tensor) -> torch.Tensor:
    """Return the initial sums of a block, float32: 0 where `kept` is True, -inf elsewhere."""
    return torch.zeros(kept.shape, device=kept.device).masked_fill_(~kept, -torch.inf)


def _unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Scale rows `(n, d) float32` to length 1, in place. Rows of zeros stay. Raises ValueError for NaN and infinity."""
    # In float64, the squares of any finite float32 neither overflow nor vanish; mps has no float64.
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in rows.split(LARGEST_BLOCK["cpu"])]
    lengths = torch.cat(parts)
    if not torch.isfinite(lengths).all():
        raise ValueError(f"embeddings are not finite: {int((~torch.isfinite(lengths)).sum())} of {len(rows)} rows")
    inverse = (1 / lengths).float()
    return rows.mul_(torch.where(inverse.isfinite(), inverse, 0)[:, None])  # too short to invert: zeros


@contextlib.contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Compute in full float32, without autocast, TF32 or bfloat16. Restores the caller's settings."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    backends += (torch.backends.cudnn.conv, torch.backends.mkldnn.conv)
    shared = torch.backends.fp32_precision
    before = ["none" if each.fp32_precision == shared else each.fp32_precision for each in backends]  # none: inherited
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        known = torch.amp.is_autocast_available(device_type)  # not for the data-less device meta
        with torch.autocast(device_type, enabled=False) if known else contextlib.nullcontext():
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
