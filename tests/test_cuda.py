"""Training, evaluation and search on a GPU give what they give on the CPU. At most two minutes on a fast card.

python -m pytest tests/test_cuda.py                             skipped where PyTorch finds no GPU
DREML_TEST_DEVICE=cpu python -m pytest tests/test_cuda.py       a rehearsal on the CPU, which tests these tests only
"""

import contextlib
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import digests, only_folder, save_image
from processes import ROOT, wait_until

import data_utils
import model
import train
from dreml.batches import epoch_batches, input_memory, prepare
from dreml.cache import Cache, read_cache
from dreml.demo import draw_demo
from dreml.images import ImageSpec
from dreml.optimizers import with_rates
from dreml.settings import Settings, settings_of
from model import Compute, build_model, extract_features
from utils import map_at_r, recall_at_k, rng_for

DEVICE = torch.device(os.environ.get("DREML_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="PyTorch finds no GPU (CUDA)"),
]
SIZE = (60, 16) if ON_GPU else (12, 12)  # of the demo: classes of each split, and images of each class
OPTIONS = "--data_name demo --image_size 32 --weights none --no_flip --lr 1e-3 --precision fp32".split()
OPTIONS += "--ensemble_size 2 --num_epochs 2 --batch_size 64 --recalls 1,4".split()
BITS = [*OPTIONS, "--device", str(DEVICE), "--deterministic", "--num_epochs", "4"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A data folder with the demo and its cache of 32 pixels."""
    data = tmp_path_factory.mktemp("data")
    draw_demo(data / "demo", *SIZE)
    assert data_utils.main(["--data_path", str(data), "--data_name", "demo", "--image_size", "32"]) == 0
    return data


@pytest.fixture
def cache(demo) -> Cache:
    return read_cache(demo, "demo", ImageSpec(32))


@pytest.fixture(scope="module")
def start(demo, processes):
    """Starts train.py with a ResNet in a process of its own."""

    def start(results: Path, *options: str):
        paths = ["--data_path", str(demo), "--results_path", str(results)]
        return processes.start("train.py", *options, *paths, folder=ROOT, small=False)

    return start


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory) -> list[Path]:
    """The run folders of the same command on the CPU and on the GPU, there without TF32: the CPU has none."""
    folders = []
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    for device in ("cpu", str(DEVICE)):
        results = tmp_path_factory.mktemp("results")
        paths = ["--data_path", str(demo), "--results_path", str(results)]
        assert train.main([*OPTIONS, *paths, "--device", device]) == 0
        folders.append(only_folder(results))
    convolutions.fp32_precision = before
    return folders


@pytest.fixture(scope="module")
def bits(start, tmp_path_factory) -> dict[str, str]:
    """The checksums of the embeddings of a run with --deterministic."""
    results = tmp_path_factory.mktemp("deterministic")
    script = start(results, *BITS)
    assert script.wait() == 0, script.err
    found = digests(only_folder(results), "member_*.npy")
    assert len(found) == 4
    return found


def make_experiment(cache: Cache, device: torch.device = DEVICE, **options: object) -> train.Experiment:
    """The training of OPTIONS in this process, with other settings."""
    settings = replace(settings_of(train.parse_args(OPTIONS)), **options)
    compute = Compute(device, settings.precision)
    return train.Experiment(cache=cache, settings=settings, weights=None, compute=compute, environment={})


def first_epoch(cache: Cache, settings: Settings, device: torch.device):
    """The batches of the first epoch of member 1, a meta-class a class."""
    labels = np.array(cache.array("train_labels")) % settings.meta_class_size
    return epoch_batches(cache, np.arange(len(labels)), labels, settings, partial(rng_for, 0, 1, 0), device)


def test_training_on_a_gpu_finds_what_training_on_the_cpu_finds(runs):
    """Recall@1 of two members after two epochs. Rounding alone moved it by half a point on a CPU."""
    recalls = [pd.read_csv(folder / "recall.csv")["R@1"].iloc[-1] for folder in runs]
    assert abs(recalls[0] - recalls[-1]) <= 1.5, recalls
    assert min(recalls) > 100 / SIZE[0]  # they have learned


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(cache, precision):
    """`train_epoch` raises RunError for a loss that is not finite."""
    _, result = train.train_member(make_experiment(cache, precision=precision, num_epochs=4), 1, "member 1")
    losses = [epoch["loss"] for epoch in result["history"]]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_two_processes_on_one_gpu_and_a_kill_then_the_bits_of_one(start, bits, tmp_path):
    """With --deterministic. One is killed in its third epoch; who takes over goes on after its first or second."""
    options = [*BITS, "--progress_seconds", "0"]
    killed, other = (start(tmp_path, *options) for _ in range(2))
    wait_until(lambda: "epoch 1: loss" in killed.out, killed)
    killed.process.kill()
    third = start(tmp_path, *options)
    assert (killed.wait(), other.wait(), third.wait()) == (-signal.SIGKILL, 0, 0), other.err + third.err
    assert "goes on after epoch" in other.out + third.out
    assert digests(only_folder(tmp_path), "member_*.npy") == bits


def test_a_member_leaves_no_memory_behind(cache):
    """After the first one, which leaves what cuBLAS and cuDNN keep."""
    experiment, held = make_experiment(cache), []
    for member in (1, 2, 3):
        train.train_member(experiment, member, f"member {member}")
        held.append(torch.cuda.memory_allocated() if ON_GPU else 0)
    assert held[2] <= held[0]


@pytest.mark.parametrize("options", [{}, {"scale_min": 0.5, "mixup": True}], ids=["plain", "mixed"])
def test_batches_through_pinned_memory_are_those_of_the_cpu(cache, options):
    """Also where the GPU is far behind: memory that was filled again too early would show."""

    def tensors_of(batch) -> list[torch.Tensor]:
        return [part for part in batch if isinstance(part, torch.Tensor)]

    settings = make_experiment(cache, batch_size=16, **options).settings
    on_gpu = []
    for batch in first_epoch(cache, settings, DEVICE):
        if ON_GPU:
            torch.cuda._sleep(20_000_000)  # clock cycles
        on_gpu.append(batch._replace(images=batch.images + 0))
    expected = list(first_epoch(cache, settings, torch.device("cpu")))
    assert len(on_gpu) == len(expected) > 5
    for found, batch in zip(on_gpu, expected, strict=True):
        assert found.images.device.type == DEVICE.type
        for tensor, other in zip(tensors_of(found), tensors_of(batch), strict=True):
            torch.testing.assert_close(tensor.cpu(), other, atol=0, rtol=0)


@contextlib.contextmanager
def waiting_is_an_error():
    """Whatever makes the host wait for the GPU raises RuntimeError."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16"}, {"scale_min": 0.5, "mixup": True}, {"optimizer": "sgd", "lr": 0.01}],
    ids=["fp32", "bf16", "mixed", "sgd"],
)
def test_no_step_waits_for_the_gpu(cache, options):
    """Ten steps, with their batches and rates, as `train_member` puts them together. fp16 may wait for its scale."""
    experiment = make_experiment(cache, batch_size=8, **options)
    settings = experiment.settings
    state = train.initial_state(experiment, 1)
    state.model.train()
    memory = input_memory(settings.batch_size + 1, settings.image_size, DEVICE)
    batches = first_epoch(cache, settings, DEVICE)
    prepared = ((prepare(batch, *experiment.statistics, memory), batch.targets) for batch in batches)
    paced = with_rates(prepared, state.optimizer, settings, 0, len(cache.array("train_labels")))
    for _ in range(3):  # the first ones choose algorithms, and make the optimizer's state
        loss, _ = train.train_step(state, experiment.compute, *next(paced))
    with waiting_is_an_error():
        for _ in range(10):
            loss, _ = train.train_step(state, experiment.compute, *next(paced))
    assert torch.isfinite(loss)
    batches.close()


@pytest.mark.skipif(not ON_GPU, reason="nothing waits for a CPU")
def test_a_wait_would_be_an_error():
    """Otherwise the test above holds nothing."""
    number = torch.ones((), device=DEVICE)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()


@pytest.mark.parametrize("seed", range(3))
def test_recall_and_map_are_those_of_the_cpu(seed):
    """Two members, equal rows, queries and gallery apart; in blocks."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 100, (1500,), generator=generator)
    members = [torch.randn(1500, width, generator=generator) + labels[:, None] % 7 for width in (16, 24)]
    for member in members:
        member[700:720] = member[:20]
    on_device = [member.to(DEVICE) for member in members]
    masks = {name: torch.rand(1500, generator=generator) < 0.7 for name in ("is_query", "is_gallery")}
    for options in ({}, masks, {"max_bytes": 2**20}):
        recalls = [recall_at_k(each, labels, [1, 5, 20], **options) for each in (members, on_device)]
        assert torch.equal(*recalls)
        maps = [torch.stack(map_at_r(each, labels, **options)) for each in (members, on_device)]
        torch.testing.assert_close(*maps, atol=1e-6, rtol=0)


@pytest.mark.skipif(not ON_GPU, reason="the memory of a CPU cannot be limited so")
def test_what_does_not_fit_is_embedded_in_smaller_batches(monkeypatch):
    network = build_model("resnet18", 12, None).to(DEVICE)
    images = np.random.default_rng(0).integers(0, 256, (512, 128, 128, 3), np.uint8)
    statistics = torch.full((3,), 0.5, device=DEVICE), torch.full((3,), 0.25, device=DEVICE)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected = extract_features(network, images, statistics, 64)
    share = 2 * torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(DEVICE).total_memory
    sizes, in_batches = [], model.features_in_batches
    monkeypatch.setattr(model, "features_in_batches", lambda *each: sizes.append(each[3]) or in_batches(*each))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        found = extract_features(network, images, statistics, 512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sizes[:2] == [512, 256] and 64 <= sizes[-1] < 512
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_a_search_finds_as_on_the_cpu(runs, tmp_path):
    """A photo of one's own among the test images: all that an ensemble embeds."""
    from dreml.search import Searcher

    save_image(tmp_path / "photo.png")
    answers = [Searcher(runs[0], device=device).find(tmp_path / "photo.png", top=8) for device in ("cpu", DEVICE)]
    on_cpu, on_gpu = ([neighbour.similarity for neighbour in answer] for answer in answers)
    np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-5)
