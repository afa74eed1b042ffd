"""The draws, the partition, the cut of large classes, and Recall@K and mAP@R against obvious implementations."""

import contextlib
import os
import resource
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import slow_best_similarities, slow_map, slow_recall
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from utils import (
    best_similarities,
    capped_images,
    map_at_r,
    meta_class_partition,
    recall_at_k,
    rng_for,
    similarity_memory,
    unmatched_queries,
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
        return tuple(rng_for(*key).integers(2**32, size=4))

    base = numbers(0, 1, 2, "order")
    assert numbers(0, 1, 2, "order") == base
    others = [(1, 1, 2, "order"), (0, 2, 2, "order"), (0, 1, 3, "order"), (0, 1, 2, "crop"), (0, 2, 1, "order")]
    assert len({base, *(numbers(*key) for key in others)}) == 6


def test_large_classes_are_cut_to_a_random_300():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [350, 20, 300]))
    first, again, other = (capped_images(labels, 300, rng_for(0, member, 0, "cut")) for member in (1, 1, 2))
    assert first.dtype == np.int64 and np.bincount(labels[first]).tolist() == [300, 20, 300]
    assert (np.diff(first) > 0).all() and np.array_equal(first, again)
    assert not np.array_equal(first, other)
    large = [images[labels[images] == 0] for images in (first, other)]
    assert 240 < len(np.intersect1d(*large)) < 275  # two random 300 of 350 share 257 on average


# ------------------------------------------------------------------------------------------------ cases

MAX_BYTES = (2**30, 2**15, 1)  # whole; small blocks of a copy; smallest, gathered, 16 rows


def random_case(seed: int) -> tuple[list[np.ndarray], np.ndarray, list[int]]:
    """Small cases full of ties (integer coordinates), zero rows, lone classes and classes of very different sizes."""
    generator = np.random.default_rng(seed)
    num_images = int(generator.integers(2, 90))
    embeddings = []
    for _ in range(generator.integers(1, 4)):
        shape = (num_images, int(generator.integers(1, 6)))
        ties = generator.random() < 0.6
        rows = generator.integers(-1, 2, shape) if ties else generator.normal(size=shape)
        embeddings.append(rows.astype(np.float32))
    labels = generator.integers(0, generator.integers(1, num_images + 1), num_images)
    if generator.random() < 0.3:
        labels[generator.random(num_images) < 0.8] = -7  # one giant class
    return embeddings, labels, [1, 2, 3, 8, 100]


def random_masks(seed: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and gallery: apart, overlapping with images that are neither, or one within the other."""
    generator = np.random.default_rng(1000 + seed)
    is_query, is_gallery = generator.random((2, num_images)) < generator.choice([0.2, 0.5, 0.9], (2, 1))
    if seed % 3 == 0:
        is_gallery = ~is_query
    if seed % 3 == 1:
        is_gallery |= is_query
    is_query[generator.integers(num_images)] = is_gallery[generator.integers(num_images)] = True
    return is_query, is_gallery


def tensors(arrays: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def as_masks(is_query: torch.Tensor | np.ndarray, is_gallery: torch.Tensor | np.ndarray) -> dict[str, torch.Tensor]:
    return {"is_query": torch.as_tensor(is_query), "is_gallery": torch.as_tensor(is_gallery)}


def on_a_circle(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


class Products(TorchFunctionMode):
    """The matrix products that are computed meanwhile: their shapes, and the precisions that are asked for."""

    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.shapes, self.precisions, self.error = [], set(), error

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "addmm" in getattr(function, "__name__", ""):
            self.shapes.append(tuple(result.shape))
            backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            self.precisions.add((*(backend.fp32_precision for backend in backends), torch.is_autocast_enabled("cpu")))
            if self.error:
                raise self.error
        return result


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


class Launches(TorchDispatchMode):
    """How many operations are given to the device meanwhile."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------ memory


def test_scoring_takes_a_quarter_of_the_free_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    assert similarity_memory(torch.device("cuda", 1)) == 15 * 2**30
    assert similarity_memory(torch.device("cpu")) == similarity_memory(torch.device("mps")) == 2**30


def test_a_gpu_gets_few_large_launches(monkeypatch):
    """Where all images fit into one block, the number of operations depends on the members only."""
    generator = torch.Generator().manual_seed(0)
    members, labels = [torch.randn(3000, 8, generator=generator) for _ in range(4)], torch.arange(3000) // 10
    counts = {}
    for largest in (64, 2**14):
        monkeypatch.setitem(utils.LARGEST_BLOCK, "cpu", largest)
        for score in (
            lambda **memory: recall_at_k(members, labels, [1], **memory),
            lambda **memory: map_at_r(members, labels, **memory),
        ):
            with Launches() as launches:
                score(max_bytes=2**34)
            counts.setdefault(largest, []).append(launches.count)
    own, others = counts[2**14]
    assert own < 200 + 60 * len(members) and others < 100 + 60 * len(members)
    assert all(few < many / 8 for few, many in zip(*reversed(counts.values()), strict=True))


# ------------------------------------------------------------------------------------------------ Recall@K


@pytest.mark.parametrize("seed", range(60))
def test_recall_equals_the_definition(seed):
    embeddings, labels, ks = random_case(seed)
    expected = slow_recall(embeddings, labels, ks)
    for max_bytes in MAX_BYTES:
        result = recall_at_k(tensors(embeddings), torch.from_numpy(labels), ks, max_bytes=max_bytes)
        assert result.dtype == torch.float64 and result.shape == (len(embeddings), len(ks))
        np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize("seed", range(60))
def test_recall_of_queries_in_a_gallery_equals_the_definition(seed):
    embeddings, labels, ks = random_case(seed)
    masks = random_masks(seed, len(labels))
    expected = slow_recall(embeddings, labels, ks, *masks)
    for max_bytes in MAX_BYTES:
        options = as_masks(*masks) | {"max_bytes": max_bytes}
        result = recall_at_k(tensors(embeddings), torch.from_numpy(labels), ks, **options)
        np.testing.assert_array_equal(result.numpy(), expected)


def test_queries_in_a_gallery_by_hand():
    """On a circle, three queries of class 0; the gallery: 10 (class 0), 4 degrees (class 1) and the first query."""
    points, labels = on_a_circle(0, 8, 90, 10, 4), torch.tensor([0, 0, 0, 0, 1])
    masks = as_masks(torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([1, 0, 0, 1, 1]).bool())
    # 0 deg: 4 is nearer than 10, and it does not find itself. 8 deg: 10, then 4, then 0. 90 deg: 10, then 4, then 0.
    assert recall_at_k(points, labels, [1, 2, 100], **masks).tolist() == [[2 / 3, 1, 1]]
    # 0 deg: R = 1, position 2. The others: R = 2, positions 1 and 3: one of two found, precision 1 there.
    for score in map_at_r(points, labels, **masks):
        np.testing.assert_allclose(score, [(0 + 1 / 2 + 1 / 2) / 3], atol=1e-7)


def test_recall_by_hand():
    """On a circle: 0 and 10 degrees are class 0, 4 and 90 are class 1."""
    # Ranks: 0 deg: 4 is nearer than 10 -> 1. 4 deg: 0 and 10 are nearer than 90 -> 2. 10 deg: 4 -> 1. 90 deg: 10 -> 1.
    result = recall_at_k(on_a_circle(0, 4, 10, 90), torch.tensor([0, 1, 0, 1]), [1, 2, 3])
    assert result.tolist() == [[0.0, 0.75, 1.0]]


def similarities_computed(num_images: int, **masks: torch.Tensor) -> int:
    """How many numbers the matrix products of one call give."""
    points, labels = torch.randn(num_images, 4), torch.arange(num_images) // 4
    with Products() as products:
        recall_at_k(points, labels, [1], max_bytes=2**20, **masks)
    return sum(rows * columns for rows, columns in products.shapes)


def test_half_of_the_similarities_are_enough_where_all_are_queries_and_gallery():
    every, all_but_one = torch.ones(1000, dtype=torch.bool), torch.arange(1000) > 0
    half = similarities_computed(1000)
    assert half < 0.7 * 1000**2 and similarities_computed(1000, is_query=every, is_gallery=every) == half
    assert similarities_computed(1000, is_query=all_but_one, is_gallery=all_but_one) < 0.7 * 1000**2
    assert similarities_computed(1000, is_query=all_but_one) > 0.7 * 1000**2


@pytest.mark.parametrize("first", [0, 2])  # whichever class lies first in the order
def test_a_pair_exactly_at_the_tolerance_counts_against_the_query(first):
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1e-6, 1.0], *[[-1.0, 0.0]] * 15])
    labels = torch.tensor([1 if first == 0 else 0] * 2 + [0 if first == 0 else 1] * 16)
    assert recall_at_k(points, labels, [1], max_bytes=1).item() == pytest.approx(15 / 18)


def test_the_tolerance_grows_with_the_number_of_members():
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.75e-6, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert recall_at_k([points, points], labels, [1]).tolist() == [[0], [0]]
    assert [score.tolist() for score in map_at_r([points, points], labels)] == [[0, 0], [0, 0]]


def test_recall_of_a_constant_embedding_is_zero():
    labels = torch.arange(40) // 4
    assert recall_at_k(torch.ones(40, 3), labels, [1, 36, 37]).tolist() == [[0, 0, 1]]
    assert recall_at_k(torch.zeros(40, 3), labels, [1]).item() == 0


def test_recall_excludes_the_query_by_index_not_by_value():
    """Two copies of an image in one class find each other; copies in two classes are a tie, which counts against."""
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert recall_at_k(points, torch.tensor([0, 0, 1, 1]), [1]).item() == 1
    assert recall_at_k(points, torch.tensor([0, 1, 0, 1]), [1]).item() == 0


@pytest.mark.filterwarnings("error")  # a program that knows what it does is not warned
def test_lone_classes_are_misses():
    labels = torch.tensor([5, 5, 9])
    assert recall_at_k(torch.eye(3), labels, [1, 100]).tolist() == [[0, 2 / 3]]
    assert unmatched_queries(labels).tolist() == [False, False, True]


@pytest.mark.filterwarnings("error")
def test_queries_without_an_image_in_the_gallery_are_misses():
    """Of four queries, one has no class mate, one's is no gallery image, and one's class mate is itself."""
    labels = torch.tensor([0, 1, 1, 2, 0])
    masks = as_masks(torch.tensor([1, 1, 0, 1, 1]).bool(), torch.tensor([1, 1, 0, 0, 0]).bool())
    assert recall_at_k(torch.eye(5), labels, [2, 100], **masks).tolist() == [[0.25, 0.25]]
    assert unmatched_queries(labels, **masks).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("seed", range(30))
def test_unmatched_queries_are_those_without_a_class_mate_in_the_gallery(seed):
    """Labels may be negative, and far apart."""
    _, labels, _ = random_case(seed)
    labels = labels * 10**12
    every = np.ones(len(labels), bool)
    queries, gallery = random_masks(seed, len(labels))
    for masks in ({}, {"is_query": queries}, {"is_gallery": gallery}, {"is_query": queries, "is_gallery": gallery}):
        is_query, is_gallery = (masks.get(name, every) for name in ("is_query", "is_gallery"))
        expected = []
        for query in range(len(labels)):
            mates = [i for i in range(len(labels)) if i != query and is_gallery[i] and labels[i] == labels[query]]
            expected.append(bool(is_query[query]) and not mates)
        result = unmatched_queries(torch.from_numpy(labels), **{name: torch.tensor(masks[name]) for name in masks})
        assert result.dtype == torch.bool and result.tolist() == expected


# ------------------------------------------------------------------------------------------------ number formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_computed_in_float32_and_ignore_lengths(dtype):
    embeddings, labels, ks = random_case(3)
    points = torch.from_numpy(embeddings[0]).to(dtype)
    scaled = points * torch.tensor([0.25, 4.0], dtype=dtype).repeat(len(points))[: len(points), None]
    exact, every = [points.double().numpy()], np.ones(len(labels), bool)
    recall, precisions = slow_recall(exact, labels, ks), slow_map(exact, labels, every, every)
    for rows, max_bytes in ((points, 2**30), (scaled, 2**30), (scaled, 1)):
        result = recall_at_k(rows, torch.from_numpy(labels), ks, max_bytes=max_bytes)
        np.testing.assert_array_equal(result, recall)
        scores = map_at_r(rows, torch.from_numpy(labels), max_bytes=max_bytes)
        np.testing.assert_allclose(np.stack(scores), precisions, atol=1e-6)


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


PRECISION_SETTINGS = {  # PyTorch's older setting and its newer ones, after which reading the older one may be an error
    "none": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "every backend": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@contextlib.contextmanager
def precision_settings(name: str):
    """With one of PRECISION_SETTINGS; afterwards as PyTorch starts."""
    try:
        PRECISION_SETTINGS[name]()
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            backend.fp32_precision = "none"


def read_precision_settings() -> list[str]:
    backends = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    settings = [backend.fp32_precision for backend in backends]
    try:
        return [*settings, torch.get_float32_matmul_precision()]
    except RuntimeError:  # "mix of the legacy and new APIs"
        return [*settings, "unreadable"]


@pytest.mark.parametrize("name", PRECISION_SETTINGS)
def test_scores_ignore_reduced_precision_settings(name):
    """TF32 or bfloat16 products and autocast around the call change nothing, and are as before afterwards.

    The CPU of the tests may have neither, so what is asked for in each product is looked at too.
    """
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randn(300, 64, generator=generator), torch.arange(300) % 30
    expected = [recall_at_k(points, labels, [1, 4]), *map_at_r(points, labels)]
    with precision_settings(name):
        before = read_precision_settings()
        assert before[3] == {"none": "highest", "medium": "medium"}.get(name, before[3])
        with torch.autocast("cpu", torch.bfloat16), Products() as products:
            results = [recall_at_k(points, labels, [1, 4]), *map_at_r(points, labels)]
        assert products.precisions == {("ieee", "ieee", False)}
        assert read_precision_settings() == before
        with pytest.raises(MemoryError), Products(MemoryError()):
            recall_at_k(points, labels, [1])
        assert read_precision_settings() == before
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


# ------------------------------------------------------------------------------------------------ memory


def test_max_bytes_bounds_the_blocks():
    with Products() as products:
        recall_at_k(torch.randn(256, 8), torch.arange(256) // 2, [1], max_bytes=2**16)
    widest = max(max(shape) for shape in products.shapes)
    assert 0 < 3 * 4 * widest**2 <= 2**16


@pytest.mark.parametrize("max_bytes", [2**19, 2**21, 2**25])
def test_no_tensor_of_recall_is_over_max_bytes(max_bytes):
    """1,500 images of 800 dimensions are 4.8 MB: copied as a whole only where that fits into half of the bound."""
    points, labels = torch.randn(1500, 800), torch.arange(1500) // 10
    with Largest(points) as largest:
        recall_at_k(points, labels, [1], max_bytes=max_bytes)
    assert largest.num_bytes <= max_bytes / 2
    assert (largest.num_bytes >= points.nbytes) == (max_bytes == 2**25)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("largest_class", [10, 700])
@pytest.mark.parametrize("width", [8, 800])
def test_no_tensor_of_map_at_r_is_over_max_bytes(apart, largest_class, width):
    """750 images: the whole matrix would be 2.3 MB, a whole copy of the wider embeddings 2.4 MB."""
    points, labels, max_bytes = torch.randn(750, width), (torch.arange(750) - largest_class).clamp(min=0) // 10, 2**20
    masks = as_masks(torch.arange(750) % 2 == 0, torch.arange(750) % 2 == 1) if apart else {}
    with Largest(points) as largest:
        map_at_r(points, labels, **masks, max_bytes=max_bytes)
    assert largest.num_bytes <= max_bytes / 2


def memory_growth(call: Callable[[], object]) -> int:
    """By how many bytes the memory of a process grows while it calls. A copy of this process does it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            call()
            growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            os.write(writer, str(growth).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as answer:
        return int(answer.read())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts kilobytes on Linux")
def test_recall_needs_no_square_matrix():
    """8,000 images: the full matrix would be 256 MB, the one giant class alone 144 MB."""
    labels = torch.cat([torch.zeros(6000, dtype=torch.int64), torch.arange(1, 1001).repeat(2)])
    points = torch.randn(8000, 32)
    recall_at_k(points[:500], labels[:500], [1])  # loads what the first call loads
    assert memory_growth(lambda: recall_at_k(points, labels, [1], max_bytes=2**24)) < 2 * 2**24


# ------------------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_recall_refuses_what_is_not_finite(value):
    points = torch.randn(10, 4)
    points[3, 2] = value
    with pytest.raises(ValueError, match="not finite: 1 of 10 rows"):
        recall_at_k([torch.randn(10, 4), points], torch.arange(10) // 2, [1])


def test_map_at_r_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="not finite: 10 of 10 rows"):
        map_at_r(torch.full((10, 4), torch.nan), torch.arange(10) // 2)


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
    with pytest.raises(ValueError, match=r"have to be|has to be"):
        recall_at_k(embeddings, labels, ks)


@pytest.mark.parametrize("name", ["is_query", "is_gallery"])
@pytest.mark.parametrize("mask", [torch.ones(3).bool(), torch.ones(4, 1).bool(), torch.ones(4), torch.zeros(4).bool()])
def test_wrong_masks_are_refused(name, mask):
    points, labels = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=rf"{name} has to be \(4,\) bool, with at least one True"):
        recall_at_k(points, labels, [1], **{name: mask})
    with pytest.raises(ValueError, match=rf"{name} has to be \(4,\) bool, with at least one True"):
        map_at_r(points, labels, **{name: mask})


# ------------------------------------------------------------------------------------------------ mAP@R


@pytest.mark.parametrize("seed", range(60))
def test_map_at_r_equals_the_definition(seed):
    embeddings, labels, _ = random_case(seed)
    masks = random_masks(seed, len(labels)) if seed % 4 else [np.ones(len(labels), bool)] * 2
    options = as_masks(*masks) if seed % 4 else {}
    expected = slow_map(embeddings, labels, *masks)
    for max_bytes in MAX_BYTES:
        scores = map_at_r(tensors(embeddings), torch.from_numpy(labels), **options, max_bytes=max_bytes)
        for score, value in zip(scores, expected, strict=True):
            assert score.dtype == torch.float64 and score.shape == (len(embeddings),)
            np.testing.assert_allclose(score, value, atol=1e-6)


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
    embeddings = [torch.randn(num_images, 6, generator=generator) + centres[labels] for _ in range(1 + seed % 3)]
    whole = torch.cat([torch.nn.functional.normalize(rows) for rows in embeddings], 1)
    is_query = torch.arange(num_images) % 3 == 0 if seed % 2 else torch.ones(num_images, dtype=torch.bool)
    is_gallery = ~is_query if seed % 2 else is_query

    names = ("mean_average_precision_at_r", "r_precision", "precision_at_1")
    calculator = package.AccuracyCalculator(include=names, device=torch.device("cpu"))
    gallery = (whole[is_gallery], labels[is_gallery]) if seed % 2 else ()
    expected = calculator.get_accuracy(whole[is_query], labels[is_query], *gallery)
    masks = as_masks(is_query, is_gallery)
    ours = [score[-1].item() for score in map_at_r(embeddings, labels, **masks)]
    mates = (labels[is_query, None] == labels[is_gallery]).sum(1) - (is_query & is_gallery)[is_query].long()
    recall = recall_at_k(embeddings, labels, [1], **masks)[-1, 0].item()
    ours.append(recall * len(mates) / (mates > 0).sum().item())
    np.testing.assert_allclose(ours, [expected[name] for name in names], atol=1e-6)


def test_map_at_r_by_hand():
    """On a circle: class 0 at 0, 10 and 30 degrees, class 1 at 4 and 90."""
    points = on_a_circle(0, 10, 30, 4, 90)
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


@pytest.mark.filterwarnings("error")
def test_lone_queries_are_left_out():
    points, labels = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([5, 5, 9])
    assert [score.tolist() for score in map_at_r(points, labels)] == [[1], [1]]
    assert all(score.isnan().all() for score in map_at_r(points, torch.arange(3)))


# ------------------------------------------------------------------------------------------------ none of these


@pytest.mark.parametrize("seed", range(40))
def test_best_similarities_equal_the_definition(seed):
    """Of another class and of the own one, for every ensemble size, in the order of the rows."""
    embeddings, labels, _ = random_case(seed)
    masks = random_masks(seed, len(labels)) if seed % 4 else [np.ones(len(labels), bool)] * 2
    options = as_masks(*masks) if seed % 4 else {}
    expected = slow_best_similarities(embeddings, labels, *masks)
    for max_bytes in MAX_BYTES:
        best = best_similarities(tensors(embeddings), torch.from_numpy(labels), **options, max_bytes=max_bytes)
        for similarities, values in zip(best, expected, strict=True):
            assert similarities.dtype == torch.float32 and similarities.shape == (len(embeddings), masks[0].sum())
            np.testing.assert_allclose(similarities, values, atol=1e-6)


def test_best_similarities_compute_each_pair_once_and_keep_within_their_memory():
    """1,500 images of 800 dimensions, as for the recall; and its first neighbours are those of the recall."""
    points, labels, max_bytes = torch.randn(1500, 800), torch.arange(1500) // 10, 2**21
    with Products() as products, Largest(points) as largest:
        others, own = best_similarities(points, labels, max_bytes=max_bytes)
    assert largest.num_bytes <= max_bytes / 2
    assert sum(rows * columns for rows, columns in products.shapes) < 0.7 * 1500**2
    assert (others < own - 1e-6).double().mean() == recall_at_k(points, labels, [1]).item()


def test_best_similarities_refuse_what_recall_refuses():
    with pytest.raises(ValueError, match="not finite: 10 of 10 rows"):
        best_similarities(torch.full((10, 4), torch.nan), torch.arange(10) // 2)
    with pytest.raises(ValueError, match=r"is_query has to be \(4,\) bool"):
        best_similarities(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]), is_query=torch.ones(3).bool())
