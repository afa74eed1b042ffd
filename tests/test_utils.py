"""The partition, the draws, safe writing, and Recall@K against an obvious implementation."""

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


def slow_recall(parts: list[np.ndarray], labels: np.ndarray, ks: list[int]) -> np.ndarray:
    """The definition of METHOD.md, one query at a time, in float64."""
    rows = []
    similarity = np.zeros((len(labels), len(labels)))
    for size, part in enumerate(parts, 1):
        lengths = np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True)
        unit = part / np.where(lengths > 0, lengths, 1)
        similarity += unit @ unit.T
        hits = np.zeros(len(ks))
        for query in range(len(labels)):
            own = [i for i in range(len(labels)) if labels[i] == labels[query] and i != query]
            if own:
                reach = max(similarity[query, i] for i in own) - 1e-6 * size
                rank = sum(similarity[query, i] >= reach for i in range(len(labels)) if labels[i] != labels[query])
                hits += [rank < k for k in ks]
        rows.append(hits / len(labels))
    return np.array(rows)


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


@pytest.mark.parametrize("max_bytes", [2**20, 2**22, 2**26])
def test_no_tensor_of_recall_is_over_max_bytes(max_bytes):
    """3,000 images of 800 dimensions are 9.6 MB: copied as a whole only where that fits into half of the bound."""
    points, labels = torch.randn(3000, 800), torch.arange(3000) // 10

    class Largest(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != points.data_ptr():
                self.num_bytes = max(self.num_bytes, result.untyped_storage().nbytes())
            return result

    with Largest() as largest:
        recall_at_k(points, labels, [1], max_bytes)
    assert largest.num_bytes <= max_bytes / 2
    assert (largest.num_bytes >= points.nbytes) == (max_bytes == 2**26)


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
