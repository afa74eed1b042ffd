"""Network, initial weights, normalisation and embedding."""

import email.message
import io
import pickle
import re
import shutil
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from data_utils import read_cache
from model import (
    backbone_names,
    build_model,
    embed,
    load_ensemble,
    member_logits,
    normalize,
    read_weights,
    weights_identity,
)
from utils import InputError


def test_backbones_are_all_of_torchvisions_resnets():
    expected = {f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}
    expected |= {"resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"}
    assert set(backbone_names()) == expected


@pytest.mark.parametrize("backbone", backbone_names())
def test_every_backbone_gets_a_meta_class_head(backbone):
    with torch.device("meta"):
        model = build_model(backbone, 12, None)
        logits = model(torch.empty(2, 3, 64, 64))
    assert logits.shape == (2, 12) and isinstance(model.fc, torch.nn.Linear) and model.fc.bias is not None
    weights = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
    assert weights.url.startswith("https://")


def save_weights(path, backbone="resnet18", change=None, num_classes=1000):
    """A state dict in torchvision's format, every value another than at any initialisation."""
    torch.manual_seed(123)
    state = torchvision.models.get_model(backbone, weights=None, num_classes=num_classes).state_dict()
    if change:
        change(state)
    torch.save(state, path)
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("num_classes", [1000, 7])
def test_weights_from_a_file_fill_all_but_the_head(tmp_path, num_classes):
    saved = save_weights(tmp_path / "w.pth", num_classes=num_classes)
    weights = read_weights("resnet18", str(tmp_path / "w.pth"))
    identity = weights_identity("resnet18", str(tmp_path / "w.pth"))
    assert identity.startswith("sha256:") and len(identity) == 71
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = build_model("resnet18", 5, weights).state_dict()
        heads.append(state["fc.weight"])
        assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert heads[0].shape == (5, 512) and not torch.equal(*heads)


def test_older_weights_lack_batchnorms_counter(tmp_path):
    """torchvision's files of before 2018, which mirrors still carry, have 102 entries for resnet18, not 122."""

    def drop(state):
        for name in [name for name in state if name.endswith("num_batches_tracked")]:
            del state[name]

    saved = save_weights(tmp_path / "w.pth", change=drop)
    assert len(saved) == 100
    state = build_model("resnet18", 5, read_weights("resnet18", str(tmp_path / "w.pth"))).state_dict()
    assert len(state) == 122 and torch.equal(state["layer4.1.bn2.weight"], saved["layer4.1.bn2.weight"])


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "w.pth"

    def refused(message, backbone="resnet18"):
        with pytest.raises(InputError, match=message) as error:
            weights_identity(backbone, str(path))
            read_weights(backbone, str(path))
        assert "\n" not in str(error.value)

    refused("no such file")
    path.write_bytes(b"")
    refused("not a readable state dict")
    path.write_text("<html>")
    refused("not a readable state dict")
    path.write_bytes(pickle.dumps(Payload(str(tmp_path / "owned")), protocol=2))
    refused("not a readable state dict")
    torch.save({"conv1.weight": Payload(str(tmp_path / "owned"))}, path)
    refused("not a readable state dict")
    assert not (tmp_path / "owned").exists()
    torch.save([1, 2], path)
    refused("not a state dict in torchvision's format")
    torch.save({"state_dict": {}}, path)
    refused("not a state dict in torchvision's format")
    save_weights(path, change=lambda state: state.pop("conv1.weight"))
    refused(r"does not fit resnet18: conv1.weight is missing$")
    save_weights(path, change=lambda state: state.update(extra=torch.ones(1)))
    refused(r"extra is unknown$")
    save_weights(path, change=lambda state: state.update({"conv1.weight": torch.ones(64, 1, 7, 7)}))
    refused(r"conv1.weight is \(64, 1, 7, 7\), not \(64, 3, 7, 7\)$")
    save_weights(path)
    refused("does not fit resnet34: .* more differences", backbone="resnet34")


def test_no_network_names_the_ways_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(InputError, match=r"cannot download .*no route.* --weights PATH.* --weights none"):
        read_weights("resnet18", "imagenet")


class Answer(io.BytesIO):
    """What a server sends."""

    def info(self):
        return email.message.Message()


def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: Answer(b"damaged"))
    with pytest.raises(InputError, match=r"cannot download .*invalid hash value"):
        read_weights("resnet18", "imagenet")


@pytest.mark.parametrize("payload", [False, True])
def test_a_damaged_download_is_refused_and_not_executed(tmp_path, monkeypatch, payload):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / weights_identity("resnet18", "imagenet")
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(Payload(str(tmp_path / "owned")), protocol=2) if payload else b"")
    with pytest.raises(InputError, match=re.escape(f"into {tmp_path / 'hub'} ")) as error:
        read_weights("resnet18", "imagenet")
    assert "\n" not in str(error.value) and not (tmp_path / "owned").exists()


def test_imagenet_weights_are_torchvisions_file(tmp_path, monkeypatch):
    """A file where torchvision keeps its downloads is taken, without network, and named as the weights' identity."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entry = torchvision.models.get_model_weights("resnet18")["IMAGENET1K_V1"]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    saved = save_weights(tmp_path / "hub" / "checkpoints" / entry.url.rsplit("/", 1)[1])
    weights = read_weights("resnet18", "imagenet")
    assert weights_identity("resnet18", "imagenet") == entry.url.rsplit("/", 1)[1]
    assert set(weights) == set(saved) and all(torch.equal(weights[name], value) for name, value in saved.items())


def test_normalize_equals_torchvision():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    mean, std = (0.4853, 0.4965, 0.4295), (0.2237, 0.2193, 0.2568)
    expected = [TF.normalize(TF.to_tensor(Image.fromarray(image)), mean, std) for image in images]
    result = normalize(torch.from_numpy(images), torch.tensor(mean), torch.tensor(std))
    assert torch.equal(result, torch.stack(expected))


def test_member_logits_fill_by_index_in_eval_mode():
    torch.manual_seed(0)
    model = build_model("resnet18", 4, None)
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    mean, std = torch.tensor([0.5] * 3), torch.tensor([0.25] * 3)
    model.train()
    logits = member_logits(model, images, mean, std, batch_size=3)
    assert logits.shape == (7, 4) and logits.dtype == torch.float32
    with torch.no_grad():
        alone = [model(normalize(torch.from_numpy(image[None]), mean, std))[0] for image in images]
    torch.testing.assert_close(logits, torch.stack(alone))


def test_embedding_is_the_logits_with_length_1():
    logits = torch.tensor([[3.0, 4.0], [-2.0, 0.0]])
    torch.testing.assert_close(embed(logits), torch.tensor([[0.6, 0.8], [-1.0, 0.0]]))


def test_ensemble_from_a_run_folder(tiny_run, tiny_data, tmp_path):
    """Its embedding of the test images is the saved logits, each member's scaled to length 1, side by side."""
    ensemble = load_ensemble(tiny_run)
    images = read_cache(tiny_data, "tiny", ensemble.image_size).array("test_images")
    with torch.no_grad():
        embedding = ensemble(torch.from_numpy(np.array(images)))
    parts = [np.load(tiny_run / f"member_00{member}.npy") for member in (1, 2)]
    expected = np.hstack([part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts])
    np.testing.assert_allclose(embedding.numpy(), expected, atol=1e-5)
    with pytest.raises(InputError, match="is not a run folder"):
        load_ensemble(tmp_path)


def test_a_run_folder_is_read_as_data_only(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    torch.save({"conv1.weight": Payload(str(tmp_path / "owned"))}, tmp_path / "run" / "member_001.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_ensemble(tmp_path / "run")
    assert not (tmp_path / "owned").exists()


def test_forward_pass_on_a_cuda_device_without_one():
    """FakeTensorMode refuses tensors of mixed devices: nothing in the path is left on the CPU."""
    with FakeTensorMode():
        model = build_model("resnet18", 12, None).eval()
        state = {n: torch.empty(v.shape, dtype=v.dtype, device="cuda") for n, v in model.state_dict().items()}
        images = torch.empty(4, 64, 64, 3, dtype=torch.uint8, device="cuda")
        mean, std = torch.empty(3, device="cuda"), torch.empty(3, device="cuda")
        embedding = embed(torch.func.functional_call(model, state, (normalize(images, mean, std),)))
    assert embedding.shape == (4, 12) and embedding.device.type == "cuda"
