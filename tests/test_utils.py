"""The partition, the draws, safe writing, and Recall@K and mAP@R against obvious implementations."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from utils import (
    InputError,
    RunError,
    atomic_open,
    draws,
    map_at_r,
    meta_class_partition,
    read_record,
    recall_at_k,
    run_main,
    spans,
    write_record,
)

# ------------------------------------------------------------------------------------------------ partition and draws


@pytest.mark.parametrize(("num_classes", "num_meta_classes"), [(98, 12), (100, 12), (11318, 500), (12, 12), (7, 2)])
def test_partition_is_balanced(num_classes, num_meta_classes):
    partition = meta_class_partition(num_classes, num_meta_classes, np.random.default_rng(0))
    assert partition.shape == (num_classes,) and partition.dtype == np.int64
    sizes = np.bincount(partition, minlength=num_meta_classes)
    assert len(sizes) == num_meta_classes
    assert set(sizes) <= {num_classes // num_meta_classes, -(-num_classes // num_meta_classes)}


def test_partition_is_uniform_over_pairs():
    """Every two classes share a meta-class equally often: 4 classes into 2 pairs, each of 3 pairings a third."""
    generator = np.random.default_rng(0)
    drawn = [meta_class_partition(4, 2, generator) for _ in range(3000)]
    for other in (1, 2, 3):
        share = np.mean([partition[0] == partition[other] for partition in drawn])
        assert abs(share - 1 / 3) < 0.035  # four standard deviations


@pytest.mark.parametrize(("num_classes", "num_meta_classes"), [(5, 6), (5, 1), (5, 0)])
def test_partition_refuses(num_classes, num_meta_classes):
    with pytest.raises(ValueError, match=f"{num_classes} classes into {num_meta_classes}"):
        meta_class_partition(num_classes, num_meta_classes, np.random.default_rng(0))


def test_draws_depend_on_each_argument_and_nothing_else():
    def numbers(*key):
        return tuple(draws(*key).integers(2**32, size=4))

    base = numbers(0, 1, 2, "order")
    assert numbers(0, 1, 2, "order") == base
    others = [(1, 1, 2, "order"), (0, 2, 2, "order"), (0, 1, 3, "order"), (0, 1, 2, "crop"), (0, 2, 1, "order")]
    assert len({base, *(numbers(*key) for key in others)}) == 6


# ------------------------------------------------------------------------------------------------ Recall@K


def slow_ranks(
    parts: list[np.ndarray], labels: np.ndarray, is_query: np.ndarray, is_gallery: np.ndarray
) -> list[list[list[int]]]:
    """The definition of METHOD.md, one query at a time, in float64.

    For every ensemble size and query: how many images of other classes come before each of its own class, the most
    similar first.
    """
    sizes = []
    similarity = np.zeros((len(labels), len(labels)))
    for size, part in enumerate(parts, 1):
        lengths = np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True)
        unit = part / np.where(lengths > 0, lengths, 1)
        similarity += unit @ unit.T
        queries = []
        for query in np.flatnonzero(is_query):
            gallery = [i for i in np.flatnonzero(is_gallery) if i != query]
            own = sorted((similarity[query, i] for i in gallery if labels[i] == labels[query]), reverse=True)
            others = np.array([similarity[query, i] for i in gallery if labels[i] != labels[query]])
            queries.append([int((others >= value - 1e-6 * size).sum()) for value in own])
        sizes.append(queries)
    return sizes


def slow_recall(
    parts: list[np.ndarray],
    labels: np.ndarray,
    ks: list[int],
    is_query: np.ndarray | None = None,
    is_gallery: np.ndarray | None = None,
) -> np.ndarray:
    every = np.ones(len(labels), bool)
    ranks = slow_ranks(
        parts, labels, every if is_query is None else is_query, every if is_gallery is None else is_gallery
    )
    return np.array([[np.mean([bool(r) and r[0] < k for r in queries]) for k in ks] for queries in ranks])


def slow_map(
    parts: list[np.ndarray], labels: np.ndarray, is_query: np.ndarray, is_gallery: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """mAP@R and R-Precision from a list of hits and misses at each of the R first positions."""
    rows = []
    for queries in slow_ranks(parts, labels, is_query, is_gallery):
        scores = []
        for ranks in filter(len, queries):
            hits = np.zeros(len(ranks))
            for number, rank in enumerate(ranks):
                if number + rank < len(hits):
                    hits[number + rank] = 1
            precision = [hits[: position + 1].mean() for position in range(len(hits))]
            scores.append(((precision * hits).mean(), hits.mean()))
        rows.append(np.mean(scores, axis=0) if scores else (np.nan, np.nan))
    return tuple(np.array(rows).T)


def random_case(seed: int) -> tuple[list[np.ndarray], np.ndarray, list[int]]:
    """Small cases full of ties (integer coordinates), zero rows, lone classes and classes of very different sizes."""
    generator = np.random.default_rng(seed)
    num_images = int(generator.integers(2, 90))
    parts = []
    for _ in range(generator.integers(1, 4)):
        shape = (num_images, int(generator.integers(1, 6)))
        ties = generator.random() < 0.6
        parts.append((generator.integers(-1, 2, shape) if ties else generator.normal(size=shape)).astype(np.float32))
    labels = generator.integers(0, generator.integers(1, num_images + 1), num_images)
    if generator.random() < 0.3:
        labels[generator.random(num_images) < 0.8] = -7  # one giant class
    return parts, labels, [1, 2, 3, 8, 100]


@pytest.mark.filterwarnings("ignore:.*no other image of their class")
@pytest.mark.parametrize("max_bytes", [2**30, 2**15, 1])  # whole; small blocks of a copy; smallest, gathered, 16 rows
@pytest.mark.parametrize("seed", range(60))
def test_recall_equals_the_definition(seed, max_bytes):
    parts, labels, ks = random_case(seed)
    result = recall_at_k([torch.from_numpy(part) for part in parts], torch.from_numpy(labels), ks, max_bytes=max_bytes)
    assert result.dtype == torch.float32 and result.shape == (len(parts), len(ks))
    np.testing.assert_allclose(result.numpy(), slow_recall(parts, labels, ks), atol=1e-7)


def random_masks(seed: int, num_images: int) -> list[np.ndarray]:
    """Queries and gallery: apart, overlapping with images that are neither, or one within the other."""
    generator = np.random.default_rng(1000 + seed)
    is_query, is_gallery = generator.random((2, num_images)) < generator.choice([0.2, 0.5, 0.9], (2, 1))
    if seed % 3 == 0:
        is_gallery = ~is_query
    if seed % 3 == 1:
        is_gallery |= is_query
    is_query[generator.integers(num_images)] = is_gallery[generator.integers(num_images)] = True
    return [is_query, is_gallery]


@pytest.mark.filterwarnings("ignore:.*no other image of their class")
@pytest.mark.parametrize("max_bytes", [2**30, 2**15, 1])
@pytest.mark.parametrize("seed", range(60))
def test_recall_of_queries_in_a_gallery_equals_the_definition(seed, max_bytes):
    parts, labels, ks = random_case(seed)
    masks = random_masks(seed, len(labels))
    tensors = [torch.from_numpy(mask) for mask in masks]
    result = recall_at_k([torch.from_numpy(part) for part in parts], torch.from_numpy(labels), ks, max_bytes, *tensors)
    np.testing.assert_allclose(result.numpy(), slow_recall(parts, labels, ks, *masks), atol=1e-7)


def test_queries_in_a_gallery_by_hand():
    """On a circle, three queries of class 0; the gallery: 10 (class 0), 4 degrees (class 1) and the first query."""
    angles = torch.deg2rad(torch.tensor([0.0, 8.0, 90.0, 10.0, 4.0]))
    points, labels = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 0, 0, 0, 1])
    masks = torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([1, 0, 0, 1, 1]).bool()
    # 0 deg: 4 is nearer than 10, and it does not find itself. 8 deg: 10, then 4, then 0. 90 deg: 10, then 4, then 0.
    result = recall_at_k(points, labels, [1, 2, 100], 2**30, *masks)
    np.testing.assert_allclose(result, [[2 / 3, 1, 1]], atol=1e-7)
    # 0 deg: R = 1, position 2. The others: R = 2, positions 1 and 3: one of two found, precision 1 there.
    for score in map_at_r(points, labels, *masks):
        np.testing.assert_allclose(score, [(0 + 1 / 2 + 1 / 2) / 3], atol=1e-7)


def similarities_computed(num_images: int, *masks: torch.Tensor) -> int:
    """How many numbers the matrix products of one call give."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.count += result.numel() if "addmm" in str(function) else 0
            return result

    with Products() as products:
        recall_at_k(torch.randn(num_images, 4), torch.arange(num_images) // 4, [1], 2**22, *masks)
    return products.count


def test_half_of_the_similarities_are_enough_where_all_are_queries_and_gallery():
    every, no_query = torch.ones(2000, dtype=torch.bool), torch.arange(2000) > 0
    half = similarities_computed(2000)
    assert half < 0.7 * 2000**2 and similarities_computed(2000, every, every) == half
    assert similarities_computed(2000, no_query, no_query) < 0.7 * 2000**2 < similarities_computed(2000, no_query)


def test_recall_by_hand():
    """On a circle: 0 and 10 degrees are class 0, 4 and 90 are class 1."""
    angles = torch.deg2rad(torch.tensor([0.0, 4.0, 10.0, 90.0]))
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    # Ranks: 0 deg: 4 is nearer than 10 -> 1. 4 deg: 0 and 10 are nearer than 90 -> 2. 10 deg: 4 -> 1. 90 deg: 10 -> 1.
    assert recall_at_k(points, torch.tensor([0, 1, 0, 1]), [1, 2, 3]).tolist() == [[0.0, 0.75, 1.0]]


@pytest.mark.parametrize("first", [0, 2])  # whichever class lies first in the order
def test_a_pair_exactly_at_the_tolerance_counts_against_the_query(first):
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1e-6, 1.0], *[[-1.0, 0.0]] * 15])
    labels = torch.tensor([1 if first == 0 else 0] * 2 + [0 if first == 0 else 1] * 16)
    assert recall_at_k(points, labels, [1], max_bytes=1).item() == pytest.approx(15 / 18)


def test_the_tolerance_grows_with_the_number_of_parts():
    part = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.75e-6, 1.0], [-1.0, 0.0]])
    assert recall_at_k([part, part], torch.tensor([0, 0, 1, 1]), [1]).tolist() == [[0], [0]]
    assert [score.tolist() for score in map_at_r([part, part], torch.tensor([0, 0, 1, 1]))] == [[0, 0], [0, 0]]


def test_recall_of_a_constant_embedding_is_zero():
    labels = torch.arange(40) // 4
    assert recall_at_k(torch.ones(40, 3), labels, [1, 36, 37]).tolist() == [[0, 0, 1]]
    assert recall_at_k(torch.zeros(40, 3), labels, [1]).item() == 0


def test_recall_excludes_the_query_by_index_not_by_value():
    """Two copies of an image in one class find each other; copies in two classes are a tie, which counts against."""
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert recall_at_k(points, torch.tensor([0, 0, 1, 1]), [1]).item() == 1
    assert recall_at_k(points, torch.tensor([0, 1, 0, 1]), [1]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_recall_casts_to_float32_and_ignores_lengths(dtype):
    parts, labels, ks = random_case(3)
    part = torch.from_numpy(parts[0]).to(dtype)
    scaled = part * torch.tensor([0.25, 4.0], dtype=dtype).repeat(len(part))[: len(part), None]
    expected = slow_recall([part.double().numpy()], labels, ks)
    for rows in (part, scaled):
        np.testing.assert_allclose(recall_at_k(rows, torch.from_numpy(labels), ks), expected, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_recall_of_very_small_and_very_large_rows(scale):
    """Their squares are 0 or infinite in float32."""
    points, labels = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 12
    assert torch.equal(recall_at_k(points * scale, labels, [1, 4]), recall_at_k(points, labels, [1, 4]))


def test_recall_of_rows_below_the_range_of_float32():
    """They count as zeros: never a hit for anyone."""
    points, labels = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) // 2
    points[3] = torch.tensor([1e-40] + [0] * 7)
    zeroed = points.clone()
    zeroed[3] = 0
    assert torch.equal(recall_at_k(points, labels, [1, 4]), recall_at_k(zeroed, labels, [1, 4]))
    assert recall_at_k(torch.full((40, 8), 1e-40), labels, [1]).item() == 0


def test_recall_ignores_reduced_precision_settings():
    """TF32 or bfloat16 products and autocast around the call change nothing, and are as before afterwards."""
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randn(300, 64, generator=generator), torch.arange(300) % 30
    expected = recall_at_k(points, labels, [1, 4])
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            result = recall_at_k(points, labels, [1, 4])
            assert (points @ points.T).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(result, expected)


def test_products_run_in_full_float32():
    """On the CPU of the tests reduced precision may not exist: what is asked for is checked."""
    torch.set_float32_matmul_precision("medium")
    try:
        with utils._full_float32("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_max_bytes_bounds_the_blocks(monkeypatch):
    steps, spans = [], utils.spans
    monkeypatch.setattr(utils, "spans", lambda start, stop, step: steps.append(step) or spans(start, stop, step))
    recall_at_k(torch.randn(64, 8), torch.arange(64) // 2, [1], max_bytes=2**16)
    assert 3 * 4 * max(steps) ** 2 <= 2**16


class Largest(TorchDispatchMode):
    """The largest tensor that is made meanwhile, in bytes, views of `points` aside."""

    def __init__(self, points: torch.Tensor):
        super().__init__()
        self.points, self.num_bytes = points, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.points.data_ptr():
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("max_bytes", [2**20, 2**22, 2**26])
def test_no_tensor_of_recall_is_over_max_bytes(max_bytes):
    """3,000 images of 800 dimensions are 9.6 MB: copied as a whole only where that fits into half of the bound."""
    points, labels = torch.randn(3000, 800), torch.arange(3000) // 10
    with Largest(points) as largest:
        recall_at_k(points, labels, [1], max_bytes)
    assert largest.num_bytes <= max_bytes / 2
    assert (largest.num_bytes >= points.nbytes) == (max_bytes == 2**26)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("largest_class", [10, 1400])
@pytest.mark.parametrize("width", [8, 800])
def test_no_tensor_of_map_at_r_is_over_max_bytes(apart, largest_class, width):
    """1,500 images: the whole matrix would be 9 MB, a whole copy of the wider embeddings 4.8 MB."""
    points, labels, max_bytes = torch.randn(1500, width), (torch.arange(1500) - largest_class).clamp(min=0) // 10, 2**21
    masks = [torch.arange(1500) % 2 == 0, torch.arange(1500) % 2 == 1] if apart else []
    with Largest(points) as largest:
        map_at_r(points, labels, *masks, max_bytes=max_bytes)
    assert largest.num_bytes <= max_bytes / 2


def test_batches_are_prepared_two_ahead():
    """And no more, for the sake of memory. An error while filling reaches the consumer."""
    filled = []
    batches = utils.image_batches(
        lambda start, stop, out: filled.append(start) or out.fill(1 // (5 - start)),
        spans(0, 6, 1),
        4,
        torch.device("cpu"),
    )
    for number in range(3):
        batch = next(batches)
        wait_until(lambda number=number: len(filled) >= number + 3)
        time.sleep(0.05)
        assert filled == list(range(number + 3)) and batch.shape == (1, 4, 4, 3)
    with pytest.raises(ZeroDivisionError):
        list(batches)


def wait_until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)


def test_lone_classes_are_misses_and_reported():
    points = torch.eye(3)
    with pytest.warns(UserWarning, match="1 of 3 queries have no other image"):
        result = recall_at_k(points, torch.tensor([5, 5, 9]), [1, 100])
    np.testing.assert_allclose(result, [[0, 2 / 3]], atol=1e-7)


def test_queries_without_an_image_in_the_gallery_are_misses_and_reported():
    """Of four queries, one has no class mate, one's is no gallery image, and one's class mate is itself."""
    points, labels = torch.eye(5), torch.tensor([0, 1, 1, 2, 0])
    masks = torch.tensor([1, 1, 0, 1, 1]).bool(), torch.tensor([1, 1, 0, 0, 0]).bool()
    with pytest.warns(UserWarning, match="3 of 4 queries have no other image of their class in the gallery: misses"):
        assert recall_at_k(points, labels, [2, 100], 2**30, *masks).tolist() == [[0.25, 0.25]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_recall_refuses_what_is_not_finite(value):
    part = torch.randn(10, 4)
    part[3, 2] = value
    with pytest.raises(ValueError, match="not finite: 1 of 10 rows"):
        recall_at_k([torch.randn(10, 4), part], torch.arange(10) // 2, [1])


@pytest.mark.parametrize(
    ("embeddings", "labels", "ks"),
    [
        (torch.ones(4, 2), torch.ones(3, dtype=torch.int64), [1]),
        (torch.ones(4), torch.ones(4, dtype=torch.int64), [1]),
        ([], torch.ones(4, dtype=torch.int64), [1]),
        (torch.ones(4, 2), torch.ones(4), [1]),
        (torch.ones(0, 2), torch.ones(0, dtype=torch.int64), [1]),
        (torch.ones(4, 2), torch.ones(4, dtype=torch.int64), [0]),
    ],
)
def test_recall_refuses_wrong_arguments(embeddings, labels, ks):
    with pytest.raises(ValueError):
        recall_at_k(embeddings, labels, ks)


@pytest.mark.parametrize("name", ["is_query", "is_gallery"])
@pytest.mark.parametrize("mask", [torch.ones(3).bool(), torch.ones(4, 1).bool(), torch.ones(4), torch.zeros(4).bool()])
def test_wrong_masks_are_refused(name, mask):
    points, labels = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=rf"{name} has to be \(4,\) bool, with at least one True"):
        recall_at_k(points, labels, [1], **{name: mask})
    with pytest.raises(ValueError, match=rf"{name} has to be \(4,\) bool, with at least one True"):
        map_at_r(points, labels, **{name: mask})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts kilobytes on Linux")
def test_recall_needs_no_square_matrix():
    """20,000 images: the full matrix would be 1.6 GB, the one giant class alone 0.9 GB."""
    code = """
import resource, torch
from utils import recall_at_k
labels = torch.cat([torch.zeros(15000, dtype=torch.int64), torch.arange(1, 2501).repeat(2)])
points = torch.randn(20000, 32)
recall_at_k(points[:500], labels[:500], [1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
recall_at_k(points, labels, [1], max_bytes=2**26)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert int(output.stdout) < 2 * 2**26, output.stderr


# ------------------------------------------------------------------------------------------------ mAP@R


@pytest.mark.filterwarnings("ignore:.*no other image of their class")
@pytest.mark.parametrize("max_bytes", [2**30, 2**15, 1])
@pytest.mark.parametrize("seed", range(60))
def test_map_at_r_equals_the_definition(seed, max_bytes):
    parts, labels, _ = random_case(seed)
    masks = random_masks(seed, len(labels)) if seed % 4 else [np.ones(len(labels), bool)] * 2
    tensors = [torch.from_numpy(mask) for mask in masks] if seed % 4 else []
    embeddings = [torch.from_numpy(part) for part in parts]
    scores = map_at_r(embeddings, torch.from_numpy(labels), *tensors, max_bytes=max_bytes)
    for score, expected in zip(scores, slow_map(parts, labels, *masks), strict=True):
        assert score.dtype == torch.float64 and score.shape == (len(parts),)
        np.testing.assert_allclose(score, expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*no other image of their class")
def test_scores_equal_those_of_pytorch_metric_learning():
    pytest.importorskip("faiss")  # its search
    package = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    for seed in range(120):
        compare_with_package(package, seed)


def compare_with_package(package, seed: int) -> None:
    """Without ties. Every other case has queries apart from the gallery. It leaves lone queries out of R@1 too."""
    generator = torch.Generator().manual_seed(seed)
    num_images, num_classes = (int(torch.randint(5, 80, (), generator=generator)) for _ in range(2))
    labels = torch.randint(1 + num_classes % 13, (num_images,), generator=generator)
    labels[1] = labels[0]  # at least one query has a match
    centres = torch.randn(14, 6, generator=generator)
    parts = [torch.randn(num_images, 6, generator=generator) + centres[labels] for _ in range(1 + seed % 3)]
    whole = torch.cat([torch.nn.functional.normalize(part) for part in parts], 1)
    is_query = torch.arange(num_images) % 3 == 0 if seed % 2 else torch.ones(num_images, dtype=torch.bool)
    is_gallery = ~is_query if seed % 2 else is_query

    names = ("mean_average_precision_at_r", "r_precision", "precision_at_1")
    calculator = package.AccuracyCalculator(include=names, device=torch.device("cpu"))
    gallery = (whole[is_gallery], labels[is_gallery]) if seed % 2 else ()
    expected = calculator.get_accuracy(whole[is_query], labels[is_query], *gallery)
    ours = [score[-1].item() for score in map_at_r(parts, labels, is_query, is_gallery)]
    mates = (labels[is_query, None] == labels[is_gallery]).sum(1) - (is_query & is_gallery)[is_query].long()
    recall = recall_at_k(parts, labels, [1], 2**30, is_query, is_gallery)[-1, 0].item()
    ours.append(recall * len(mates) / (mates > 0).sum().item())
    np.testing.assert_allclose(ours, [expected[name] for name in names], atol=1e-6)


def test_map_at_r_by_hand():
    """On a circle: class 0 at 0, 10 and 30 degrees, class 1 at 4 and 90."""
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 30.0, 4.0, 90.0]))
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    mean_precision, r_precision = map_at_r(points, torch.tensor([0, 0, 0, 1, 1]))
    # 0 deg finds 4, 10 | 30; 10 deg finds 4, 0 | 30; 30 deg finds 10, 4 | 0. 4 deg finds 0 |; 90 deg finds 30 |.
    np.testing.assert_allclose(r_precision, [(1 / 2 + 1 / 2 + 1 / 2 + 0 + 0) / 5], atol=1e-7)
    np.testing.assert_allclose(mean_precision, [(1 / 4 + 1 / 4 + 1 / 2 + 0 + 0) / 5], atol=1e-7)


def test_map_at_r_of_a_constant_embedding_is_zero():
    labels = torch.arange(40) // 4
    for points in (torch.ones(40, 3), torch.zeros(40, 3)):
        assert [score.tolist() for score in map_at_r([points, points], labels)] == [[0, 0], [0, 0]]


def test_map_at_r_does_not_depend_on_the_order_of_tied_images():
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randint(-1, 2, (200, 2), generator=generator).float(), torch.arange(200) % 9
    order = torch.randperm(200, generator=generator)
    for score, other in zip(map_at_r(points, labels), map_at_r(points[order], labels[order]), strict=True):
        np.testing.assert_allclose(score, other, rtol=1e-12)


@pytest.mark.parametrize("first", [0, 1])
def test_an_own_image_exactly_at_the_tolerance_comes_after_the_other(first):
    """Each of the 15 copies finds the 14 others and then, at 1e-6, its own class and, at 0, the other one."""
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1e-6, 1.0], *[[-1.0, 0.0]] * 15])
    labels = torch.tensor([first] * 2 + [1 - first] * 16)
    assert map_at_r(points, labels)[1].item() == pytest.approx((0 + 0 + 14 / 15 + 15 * 14 / 15) / 18)


def test_lone_queries_are_left_out_and_reported():
    points, labels = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([5, 5, 9])
    with pytest.warns(UserWarning, match="1 of 3 queries have no other image of their class in the gallery: left out"):
        assert [score.tolist() for score in map_at_r(points, labels)] == [[1], [1]]
    with pytest.warns(UserWarning, match="3 of 3"):
        assert all(score.isnan().all() for score in map_at_r(points, torch.arange(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_map_at_r_casts_to_float32_and_ignores_lengths(dtype):
    parts, labels, _ = random_case(3)
    part = torch.from_numpy(parts[0]).to(dtype)
    scaled = part * torch.tensor([0.25, 4.0], dtype=dtype).repeat(len(part))[: len(part), None]
    expected = slow_map([part.double().numpy()], labels, *[np.ones(len(labels), bool)] * 2)
    for rows, max_bytes in ((part, 2**30), (scaled, 2**30), (scaled, 1)):
        for score, value in zip(map_at_r(rows, torch.from_numpy(labels), max_bytes=max_bytes), expected, strict=True):
            np.testing.assert_allclose(score, value, atol=1e-6)


def test_map_at_r_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="not finite: 10 of 10 rows"):
        map_at_r(torch.full((10, 4), torch.nan), torch.arange(10) // 2)


# ------------------------------------------------------------------------------------------------ files and errors


def test_atomic_open_replaces_only_when_all_went_well(tmp_path):
    path = tmp_path / "log.csv"
    with atomic_open(path) as file:
        file.write("whole\n")
        assert not path.exists()
    assert path.read_text() == "whole\n"
    with pytest.raises(RuntimeError), atomic_open(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "whole\n"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_open_flushes_before_the_rename(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    with atomic_open(tmp_path / "log.csv") as file:
        file.write("whole")
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("bad"), 2), (RunError("bad"), 1), (OSError(28, "bad"), 1), (KeyboardInterrupt(), 130), (None, 0)],
)
def test_exit_codes_and_single_lines(error, code, capsys):
    def run():
        if error is not None:
            raise error

    assert run_main("script.py", run, "less") == code
    message = capsys.readouterr().err
    assert message == "" if error is None else re.fullmatch(r"script\.py: .*\n", message)


@pytest.mark.parametrize(("number", "code", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_signals_stop_at_the_next_safe_place(capsys, number, code, word):
    reached = []

    def run():
        for step in range(3):
            utils.stop_here()
            os.kill(os.getpid(), getattr(signal, number))
            if number == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it twice
            reached.append(step)

    def noted():
        try:
            run()
        except BaseException as stop:
            stop.add_note("step 1")
            stop.add_note("the test")
            raise

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run_main("script.py", noted, "less") == code and reached == [0]
    message = f"script.py: {word} in the test, step 1; run the same command again to go on\n"
    assert capsys.readouterr().err == message
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert run_main("script.py", utils.stop_here, "less") == 0  # it is forgotten
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_signals_stop_soon_where_there_is_no_safe_place(capsys, monkeypatch):
    seconds = []
    monkeypatch.setattr(
        utils, "_set_alarm", lambda s: seconds.append(s) or signal.setitimer(signal.ITIMER_REAL, s / 30)
    )

    def run():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    assert run_main("script.py", run, "less") == 143 and max(seconds) == 3
    assert "script.py: terminated; run the same command again" in capsys.readouterr().err


def test_a_second_interrupt_stops_at_once():
    def run():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not at once")

    assert run_main("script.py", run, "less") == 130


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_every_kind_of_out_of_memory_is_one_line(capsys, error):
    def run():
        raise error

    assert run_main("script.py", run, "less") == 1
    assert capsys.readouterr().err == "script.py: failed: out of memory; try less\n"
    with pytest.raises(RuntimeError, match="another one"):
        error = RuntimeError("another one")
        run_main("script.py", run, "less")


def test_a_lock_is_held_by_one_and_freed_by_its_holders_death(tmp_path):
    held = utils.take_lock(tmp_path / ".lock")
    with held:
        assert utils.take_lock(tmp_path / ".lock", timeout=0) is None
    code = "import sys, utils; held = utils.take_lock(utils.Path(sys.argv[1])); print(1, flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(utils.__file__).parent,
    )
    assert process.stdout.readline() == b"1\n"
    assert utils.take_lock(tmp_path / ".lock", timeout=0) is None
    process.kill()
    process.wait()
    with utils.take_lock(tmp_path / ".lock", timeout=5):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", flock)
        with pytest.raises(InputError, match="is on a file system without file locks"):
            utils.take_lock(tmp_path / ".lock")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="cannot write"):
        utils.take_lock(tmp_path / "file" / ".lock")


def test_waiting_for_a_lock_ends_at_a_signal(tmp_path):
    def run():
        os.kill(os.getpid(), signal.SIGTERM)
        utils.take_lock(tmp_path / ".lock")

    with utils.take_lock(tmp_path / ".lock"):
        assert run_main("script.py", run, "less") == 143


RECORD = {"a": 1, "b": [{"c": 1.5}], "more": None}


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ({}, True),
        ({"a": int, "b": [{"c": float}]}, True),
        ({"a": float}, False),
        ({"d": int}, False),
        ({"b": [int]}, False),
        ({"b": {"c": float}}, False),
        ({"b": [{"c": float, "d": int}]}, False),
        ({"a": [int]}, False),
    ],
)
def test_records_have_a_pattern(tmp_path, pattern, fits):
    write_record(tmp_path / "record.json", RECORD)
    if fits:
        assert read_record(tmp_path / "record.json", pattern) == RECORD
    else:
        with pytest.raises(ValueError, match="of another version"):
            read_record(tmp_path / "record.json", pattern)


def test_a_changed_record_is_noticed(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, RECORD)
    for text in (path.read_text().replace("1.5", "2.5"), "[]", '{"a": 1}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"its checksum does not fit|too deeply nested"):
            read_record(path, {})


def test_leftovers_of_one_name_go(tmp_path):
    for name in (".log.csv.tmp-1", ".log.csv.tmp-2", ".other.csv.tmp-1", "log.csv"):
        (tmp_path / name).write_text("x")
    utils.remove_leftovers(tmp_path, "log.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.csv.tmp-1", "log.csv"]


def test_size_text():
    assert [utils.size_text(n) for n in (999, 1500, 44_800_000, 17e9, 2e15)] == [
        "999 bytes",
        "1.5 kB",
        "44.8 MB",
        "17 GB",
        "2e+03 TB",
    ]
