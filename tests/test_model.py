"""Network, initial weights, precision, features, and the ensemble."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import safetensors
import torch
from builders import copy_run, flip_a_bit
from torch import nn

from dreml.batches import normalize
from dreml.cache import read_cache
from dreml.cli import InputError
from dreml.files import read_record
from dreml.images import ImageSpec
from dreml.runs import MemberRecord, read_run_record
from model import (
    Compute,
    Ensemble,
    Head,
    build_model,
    channel_statistics,
    extract_features,
    load_ensemble,
    load_member,
    pick_precision,
)

CPU = torch.device("cpu")
STATISTICS = (torch.tensor([0.5] * 3), torch.tensor([0.25] * 3))


def random_pixels(num_images: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_images, size, size, 3), dtype=np.uint8)


def small_model() -> nn.Module:
    """The same at each call."""
    torch.manual_seed(0)
    return build_model("resnet18", 4, None)


@pytest.mark.parametrize(("precision", "digits"), [("bf16", 8), ("fp16", 11)])
def test_the_backbone_computes_in_the_precision_and_the_head_in_fp32(precision, digits):
    """Logits near those of fp32, but not equal; the head's product is exact in float32, which the features show."""
    model = small_model().eval()
    pixels, seen = torch.randn(3, 3, 32, 32), {}
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.update(conv1=output))
    model.fc.register_forward_hook(lambda module, inputs, output: seen.update(features=inputs[0], logits=output))
    with torch.no_grad():
        exact = model(pixels)
        assert seen["conv1"].dtype == torch.float32
        with Compute(CPU, precision).autocast():
            logits = model(pixels)
        assert seen["conv1"].dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        expected = seen["features"].double() @ model.fc.weight.double().T + model.fc.bias.double()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
    assert 0 < (logits - exact).abs().max() < 20 * exact.abs().max() * 2**-digits


@pytest.mark.parametrize(
    ("kind", "bf16", "capability", "name", "backbone", "expected"),
    [
        ("cuda", True, (9, 0), "NVIDIA H100", "resnet18", "bf16"),
        ("cuda", True, (9, 0), "NVIDIA H100", "efficientnet_b0", "bf16"),
        ("cuda", False, (7, 0), "Tesla V100-SXM2-16GB", "resnet18", "fp16"),
        ("cuda", False, (7, 5), "NVIDIA GeForce RTX 2080 Ti", "resnet18", "fp16"),
        ("cuda", False, (7, 5), "NVIDIA GeForce GTX 1660 SUPER", "resnet18", "fp32"),  # no tensor cores
        ("cuda", False, (6, 1), "Tesla P40", "resnet18", "fp32"),
        ("mps", False, None, "", "resnet18", "fp32"),
        ("cpu", True, None, "", "resnet18", "bf16"),
        ("cpu", False, None, "", "resnet18", "fp32"),
        ("cpu", True, None, "", "timm:vit_tiny_patch16_224", "bf16"),
        ("cpu", True, None, "", "efficientnet_b0", "fp32"),  # no gain there (docs/RESULTS.md)
    ],
)
def test_the_precision_that_a_device_is_fast_in(monkeypatch, kind, bf16, capability, name, backbone, expected):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert pick_precision(torch.device(kind), backbone) == expected


def test_features_fill_by_index_in_eval_mode():
    model, images = small_model(), random_pixels(7, 32)
    model.train()
    logits, pooled = extract_features(model, images, STATISTICS, batch_size=3).values()
    assert logits.shape == (7, 4) and pooled.shape == (7, 512) and not model.training
    assert logits.dtype == pooled.dtype == torch.float32
    with torch.no_grad():
        alone = [model(normalize(torch.from_numpy(image[None]), *STATISTICS))[0] for image in images]
        torch.testing.assert_close(logits, torch.stack(alone))
        torch.testing.assert_close(model.fc(pooled), logits)


def test_features_are_computed_in_float32():
    """Whatever is asked for around the call: autocast, and reduced precision of products and convolutions."""
    images, model, seen = random_pixels(2, 32), small_model(), []
    expected = extract_features(model, images, STATISTICS, 2)
    backends = torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    before = [backend.fp32_precision for backend in backends]

    def look(module, inputs, output):
        seen.append((output.dtype, *(backend.fp32_precision for backend in backends)))

    model.layer1.register_forward_hook(look)
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = extract_features(model, images, STATISTICS, 2)
        assert [backend.fp32_precision for backend in backends] == [*before[:2], "bf16"]
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before[2]
    assert seen == [(torch.float32, "ieee", "ieee", "ieee")]
    assert all(torch.equal(found[name], expected[name]) for name in ("logits", "pooled"))


def mean_times(matrix: list[list[float]]) -> nn.Module:
    """A member: mean colours times a matrix."""
    head = Head(3, len(matrix), bias=False)
    head.weight = nn.Parameter(torch.tensor(matrix))
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def test_an_embedding_is_the_logits_of_each_member_with_length_1():
    """And no graph for gradients is built, although the members have parameters; another network may learn from it."""
    members = [mean_times([[3.0, 0.0, 0.0], [4.0, 0.0, 1.0]]), mean_times([[-2.0, 0.0, 0.0]])]
    ensemble = Ensemble(members, ImageSpec(2), mean=[0.0] * 3, std=[1 / 255] * 3)
    images = torch.zeros(2, 2, 2, 3, dtype=torch.uint8)
    images[0, :, :, 0], images[1, :, :, 2] = 1, 5
    embedding = ensemble(images)
    torch.testing.assert_close(embedding, torch.tensor([[0.6, 0.8, -1.0], [0.0, 1.0, 0.0]]) / 2**0.5)
    assert all(parameter.requires_grad for parameter in ensemble.parameters()) and not embedding.requires_grad
    student = nn.Linear(3, 1)
    student(embedding).sum().backward()
    assert student.weight.grad.any()


def test_ensemble_from_a_run_folder(tiny_run, tiny_data):
    """Its embedding of the test images is what is saved, each member's scaled to length 1 / sqrt(L), side by side."""
    cases = [("logits", None, 2), ("logits", 1, 1), ("pooled", 2, 2), ("pooled", 1, 1)]
    for embedding, asked, num_members in cases:
        suffix, width = {"logits": ("npy", 3), "pooled": ("pooled.npy", 512)}[embedding]
        ensemble = load_ensemble(tiny_run, embedding=embedding, num_members=asked)
        assert ensemble.image_spec == ImageSpec(32, "crop")
        images = read_cache(tiny_data, "tiny", ensemble.image_spec).array("test_images")
        result = ensemble(torch.from_numpy(np.array(images)))
        saved = [np.load(tiny_run / f"member_00{member}.{suffix}") for member in range(1, num_members + 1)]
        expected = np.hstack([rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in saved]) / num_members**0.5
        assert result.shape == (36, num_members * width) and result.dtype == torch.float32
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_folders_without_the_members_asked_for_are_refused(tiny_run, tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        load_ensemble(tmp_path)
    with pytest.raises(InputError, match=f"^{tiny_run}: member 3 of 3 is missing; train.py makes it$"):
        load_ensemble(tiny_run, num_members=3)
    with pytest.raises(ValueError, match="one of logits, pooled, not 'Pooled'"):
        load_ensemble(tiny_run, embedding="Pooled")


def test_a_damaged_member_is_named(tiny_run, tmp_path, capsys):
    """By its checksum, so nothing of it is read; its embeddings are not looked at."""
    run = copy_run(tiny_run, tmp_path / "run")
    flip_a_bit(run / "member_002.safetensors")
    for path in run.glob("*.npy"):
        path.unlink()
    warning = "warning: member 2 is incomplete or damaged (member_002.safetensors); train.py makes it again\n"
    for num_members, said in ((1, ""), (None, warning)):
        assert len(load_ensemble(run, num_members=num_members).members) == 1
        assert capsys.readouterr().err == said
    with pytest.raises(InputError, match=r"member 2 of 2 is missing; train.py makes it$"):
        load_ensemble(run, num_members=2)


def test_the_file_of_a_member_says_what_it_is(tiny_run, tiny_cache):
    """Its network is built from the file alone, which runs no code."""
    path = tiny_run / "member_001.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["dreml"])
    assert metadata["settings"] == dataclasses.asdict(read_run_record(tiny_run).settings)
    assert metadata["partition"] == read_record(tiny_run / "member_001.json", MemberRecord).partition
    assert (metadata["mean"], metadata["std"]) == (tiny_cache.meta.mean, tiny_cache.meta.std)
    images, statistics = np.array(tiny_cache.array("test_images")), channel_statistics(tiny_cache.meta, CPU)
    embeddings = extract_features(load_member(path), images, statistics, 32)
    assert np.array_equal(embeddings["logits"], np.load(tiny_run / "member_001.npy"))
