"""The draws, the partition, the cut of large classes, and Recall@K and mAP@R against obvious implementations."""

from functools import partial

import numpy as np
import pytest
import torch
from reference import slow_best_similarities, slow_map, slow_recall
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from utils import (
    capped_images,
    map_at_r,
    meta_class_partition,
    nearest_images,
    recall_at_k,
    rng_for,
    similarity_memory,
)


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


@pytest.mark.parametrize("num_meta_classes", [6, 1])
def test_partition_refuses(num_meta_classes):
    with pytest.raises(ValueError, match=f"5 classes into {num_meta_classes}"):
        meta_class_partition(5, num_meta_classes, np.random.default_rng(0))


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


MAX_BYTES = (2**30, 1)  # in one block; in blocks of 16 rows
KS = [1, 2, 3, 8, 100]


def random_case(seed: int) -> tuple[list[np.ndarray], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Small cases full of ties (integer coordinates), zero rows, lone classes and classes of very different sizes.

    Returns embeddings, labels and the masks of queries and gallery: in a quarter of the cases every image is both; else
    they are apart, overlap with images that are neither, or one is within the other.
    """
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
    if seed % 4 == 0:
        return embeddings, labels, (np.ones(num_images, bool), np.ones(num_images, bool))
    is_query, is_gallery = generator.random((2, num_images)) < generator.choice([0.2, 0.5, 0.9], (2, 1))
    if seed % 3 == 0:
        is_gallery = ~is_query
    if seed % 3 == 1:
        is_gallery |= is_query
    is_query[generator.integers(num_images)] = is_gallery[generator.integers(num_images)] = True
    return embeddings, labels, (is_query, is_gallery)


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


@pytest.mark.parametrize("seed", range(60))
def test_all_scores_equal_their_definitions(seed):
    """Every image against all others, or queries in a gallery; in one block, and in many."""
    embeddings, labels, masks = random_case(seed)
    parts, classes, num_members = tensors(embeddings), torch.from_numpy(labels), len(embeddings)
    recall = slow_recall(embeddings, labels, KS, *masks)
    maps = slow_map(embeddings, labels, *masks)
    for max_bytes in MAX_BYTES:
        options = {"max_bytes": max_bytes} | (as_masks(*masks) if seed % 4 else {})
        result = recall_at_k(parts, classes, KS, **options)
        assert result.dtype == torch.float64 and result.shape == (num_members, len(KS))
        np.testing.assert_array_equal(result.numpy(), recall)
        for score, expected in zip(map_at_r(parts, classes, **options), maps, strict=True):
            assert score.dtype == torch.float64 and score.shape == (num_members,)
            np.testing.assert_allclose(score, expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(60))
def test_nearest_images_equal_the_definition(seed):
    """An image of another class that is as similar as the best of the own one comes first; never the query itself."""
    embeddings, labels, masks = random_case(seed)
    other, own = slow_best_similarities(embeddings, labels, *masks)
    is_right = other < own - 1e-6
    expected = np.where(is_right, own, other)
    alone = np.isneginf(expected)
    units = [part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-9) for part in embeddings]
    cosines = sum(unit.astype(float) @ unit.T for unit in units) / len(units)
    queries = np.flatnonzero(masks[0])
    for max_bytes in MAX_BYTES:
        options = {**as_masks(*masks), "max_bytes": max_bytes}
        found = nearest_images(tensors(embeddings), torch.from_numpy(labels), **options)
        assert {values.shape for values in found.values()} == {queries.shape}
        assert [found[name].dtype for name in ("own", "neighbour", "right")] == [torch.float32, torch.int64, torch.bool]
        np.testing.assert_allclose(found["own"], own, atol=1e-6)
        np.testing.assert_allclose(found["other"], other, atol=1e-6)
        assert np.array_equal(found["right"], is_right)
        rows = found["neighbour"].numpy()
        assert (rows[alone] == -1).all()
        queries_found, rows, right = queries[~alone], rows[~alone], is_right[~alone]
        assert masks[1][rows].all() and (rows != queries_found).all()
        assert np.array_equal(labels[rows] == labels[queries_found], right)
        np.testing.assert_allclose(cosines[queries_found, rows], expected[~alone], atol=2e-6)
    for height, right in ((1.6e-3, False), (2e-3, True)):  # 0.8e-6 and 1.5e-6 apart, the tolerance is 1e-6
        rows = torch.tensor([[1, 0], [1, 1e-3], [1, height]])
        for members in ([rows], [rows, rows]):
            assert nearest_images(members, torch.tensor([0, 0, 1]))["right"][0] == right
    only = torch.tensor([True, False, False])
    assert nearest_images(torch.eye(3), torch.tensor([0, 0, 1]), is_gallery=only)["neighbour"].tolist() == [-1, 0, 0]


def test_scores_by_hand():
    """On a circle: class 0 at 0, 10 and 30 degrees, class 1 at 4 and 90."""
    points, labels = on_a_circle(0, 10, 30, 4, 90), torch.tensor([0, 0, 0, 1, 1])
    # 0 deg finds 4, 10 | 30; 10 deg finds 4, 0 | 30; 30 deg finds 10, 4 | 0. 4 deg finds 0 |; 90 deg finds 30 |.
    mean_precision, r_precision = map_at_r(points, labels)
    np.testing.assert_allclose(r_precision, [(1 / 2 + 1 / 2 + 1 / 2 + 0 + 0) / 5], atol=1e-7)
    np.testing.assert_allclose(mean_precision, [(1 / 4 + 1 / 4 + 1 / 2 + 0 + 0) / 5], atol=1e-7)
    # The best own image of 4 deg, 90, comes after 0, 10 and 30; that of 90, 4, after 30 and 10.
    assert recall_at_k(points, labels, [1, 2, 3, 4]).tolist() == pytest.approx(np.array([[0.2, 0.6, 0.8, 1.0]]))


def similarities_computed(**masks: torch.Tensor) -> int:
    """How many numbers the matrix products of one recall give, for 1,000 images."""
    with Products() as products:
        recall_at_k(torch.randn(1000, 4), torch.arange(1000) // 4, [1], max_bytes=2**20, **masks)
    return sum(rows * columns for rows, columns in products.shapes)


def test_half_of_the_similarities_are_enough_where_all_are_queries_and_gallery():
    every, all_but_one = torch.ones(1000, dtype=torch.bool), torch.arange(1000) > 0
    half = similarities_computed()
    assert half < 0.7 * 1000**2 and similarities_computed(is_query=every, is_gallery=every) == half
    assert similarities_computed(is_query=all_but_one, is_gallery=all_but_one) < 0.7 * 1000**2
    assert similarities_computed(is_query=all_but_one) > 0.7 * 1000**2


@pytest.mark.parametrize("first", [0, 1])  # whichever class lies first in the order
def test_a_pair_exactly_at_the_tolerance_counts_against_the_query(first):
    """Each of the 15 copies finds the 14 others and then, at 1e-6, its own class and, at 0, the other one."""
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1e-6, 1.0], *[[-1.0, 0.0]] * 15])
    labels = torch.tensor([first] * 2 + [1 - first] * 16)
    assert recall_at_k(points, labels, [1], max_bytes=1).item() == pytest.approx(15 / 18)
    assert map_at_r(points, labels)[1].item() == pytest.approx((0 + 0 + 14 / 15 + 15 * 14 / 15) / 18)


def test_the_tolerance_grows_with_the_number_of_members():
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.75e-6, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert recall_at_k([points, points], labels, [1]).tolist() == [[0], [0]]
    assert [score.tolist() for score in map_at_r([points, points], labels)] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("points", [torch.ones(40, 3), torch.zeros(40, 3)])
def test_a_constant_embedding_scores_zero(points):
    labels = torch.arange(40) // 4
    assert recall_at_k(points, labels, [1, 36, 37]).tolist() == [[0, 0, 1]]
    assert [score.tolist() for score in map_at_r([points, points], labels)] == [[0, 0], [0, 0]]


@pytest.mark.filterwarnings("error")  # a program that knows what it does is not warned
def test_queries_without_a_class_mate_are_misses_and_left_out_of_map_at_r():
    """In the second case, one of four queries has no class mate, one's is no gallery image, and one's is itself."""
    labels = torch.tensor([5, 5, 9])
    assert recall_at_k(torch.eye(3), labels, [1, 100]).tolist() == [[0, 2 / 3]]
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    assert [score.tolist() for score in map_at_r(points, labels)] == [[1], [1]]
    assert all(score.isnan().all() for score in map_at_r(points, torch.arange(3)))
    masks = as_masks(torch.tensor([1, 1, 0, 1, 1]).bool(), torch.tensor([1, 1, 0, 0, 0]).bool())
    assert recall_at_k(torch.eye(5), torch.tensor([0, 1, 1, 2, 0]), [2, 100], **masks).tolist() == [[0.25, 0.25]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_computed_in_float32_and_ignore_lengths(dtype):
    embeddings, labels, masks = random_case(28)
    points = torch.from_numpy(embeddings[0]).to(dtype)
    scaled = points * torch.tensor([0.25, 4.0], dtype=dtype).repeat(len(points))[: len(points), None]
    exact, classes = [points.double().numpy()], torch.from_numpy(labels)
    recall, precisions = slow_recall(exact, labels, KS), slow_map(exact, labels, *masks)
    for rows, max_bytes in ((points, 2**30), (scaled, 2**30), (scaled, 1)):
        np.testing.assert_array_equal(recall_at_k(rows, classes, KS, max_bytes=max_bytes), recall)
        np.testing.assert_allclose(np.stack(map_at_r(rows, classes, max_bytes=max_bytes)), precisions, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_recall_of_very_small_and_very_large_rows(scale):
    """Their squares are 0 or infinite in float32. Rows below its range count as zeros: never a hit for anyone."""
    points, labels = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 12
    assert torch.equal(recall_at_k(points * scale, labels, [1, 4]), recall_at_k(points, labels, [1, 4]))
    zeroed = points.clone()
    zeroed[3] = 0
    points[3] = torch.tensor([1e-40] + [0] * 7)
    assert torch.equal(recall_at_k(points, labels, [1, 4]), recall_at_k(zeroed, labels, [1, 4]))


@pytest.mark.parametrize("asked", ["matmul_precision", "mkldnn", "every backend"])
def test_scores_ignore_reduced_precision_settings(asked):
    """TF32 or bfloat16 products and autocast around the call change nothing, and are as before afterwards.

    The CPU of the tests may have neither, so what is asked for in each product is looked at too.
    """
    backends = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    points, labels = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 30
    try:
        if asked == "matmul_precision":  # PyTorch's older setting
            torch.set_float32_matmul_precision("medium")
        elif asked == "mkldnn":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        else:
            torch.backends.fp32_precision = "tf32"
        before = [backend.fp32_precision for backend in backends]
        for score in (partial(recall_at_k, ks=[1, 4]), map_at_r, nearest_images):
            with torch.autocast("cpu", torch.bfloat16), Products() as products:
                score(points, labels)
            assert products.precisions == {("ieee", "ieee", False)}
            assert [backend.fp32_precision for backend in backends] == before
        with pytest.raises(MemoryError), Products(MemoryError()):
            recall_at_k(points, labels, [1])
        assert [backend.fp32_precision for backend in backends] == before
    finally:  # as PyTorch starts
        torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "none"


def test_scoring_takes_a_quarter_of_the_free_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * 2**30)
    assert similarity_memory(torch.device("cuda", 1)) == 16 * 2**30  # what PyTorch keeps is free, too
    assert similarity_memory(torch.device("cpu")) == similarity_memory(torch.device("mps")) == 2**30


@pytest.mark.parametrize("score", [partial(recall_at_k, ks=[1]), map_at_r, nearest_images])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("largest_class", [10, 370])
def test_no_tensor_of_a_score_is_over_max_bytes(score, apart, largest_class):
    """400 images: the whole matrix would be 0.6 MB, its part of the largest class 0.5 MB."""
    points, labels = torch.randn(400, 8), (torch.arange(400) - largest_class).clamp(min=0) // 10
    masks = as_masks(torch.arange(400) % 2 == 0, torch.arange(400) % 2 == 1) if apart else {}
    with Largest(points) as largest:
        score(points, labels, **masks, max_bytes=2**20)
    assert largest.num_bytes <= 2**19


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    points, labels = torch.randn(10, 4), torch.arange(10) // 2
    points[3, 2] = value
    for score in (partial(recall_at_k, ks=[1]), map_at_r, nearest_images):
        with pytest.raises(ValueError, match="not finite: 1 of 10 rows"):
            score([torch.randn(10, 4), points], labels)


@pytest.mark.parametrize(
    ("embeddings", "labels", "ks", "masks"),
    [
        (torch.ones(4, 2), [0, 0, 1], [1], {}),
        (torch.ones(4), [0, 0, 1, 1], [1], {}),
        ([], [0, 0, 1, 1], [1], {}),
        (torch.ones(4, 2), [0.0, 0.0, 1.0, 1.0], [1], {}),
        (torch.ones(4, 2), [0, 0, 1, 1], [0], {}),
        (torch.ones(4, 2), [0, 0, 1, 1], [1], {"is_query": torch.ones(3).bool()}),
        (torch.ones(4, 2), [0, 0, 1, 1], [1], {"is_query": torch.ones(4)}),
        (torch.ones(4, 2), [0, 0, 1, 1], [1], {"is_gallery": torch.zeros(4).bool()}),
    ],
)
def test_wrong_arguments_are_refused(embeddings, labels, ks, masks):
    with pytest.raises(ValueError, match=r"have to be|has to be"):
        recall_at_k(embeddings, torch.tensor(labels), ks, **masks)
