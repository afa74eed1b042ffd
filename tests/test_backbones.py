"""The networks of torchvision and timm: which there are, what they take, that they train; their initial weights."""

import argparse
import dataclasses
import email.message
import io
import pickle
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from builders import Payload, train_tiny
from safetensors.torch import save_file
from torchvision.models import efficientnet, mnasnet, regnet, vision_transformer

import train
from dreml import runs
from dreml.backbones import check_backbone, read_weights, weights_tag, without_drawing
from dreml.cli import InputError
from dreml.files import sha256, write_record
from dreml.runs import Members
from model import Compute, build_model, extract_features, head_of, load_ensemble, load_member
from train import Experiment

FAMILIES = "resnet18 resnext50_32x4d alexnet vgg11 convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3"
FAMILIES += " maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf shufflenet_v2_x0_5 swin_t vit_b_32"
FAMILIES = FAMILIES.split()  # one network of each


def test_backbones_are_all_classification_networks_of_torchvision():
    check_backbone("resnet152", 224)
    for name, near in (("vgg", "vgg16"), ("ResNet18", "resnet18"), ("", "none"), ("fcn_resnet50", "resnet50")):
        with pytest.raises(InputError, match=f"^--backbone '{name}' is no network of torchvision, .*near it: .*{near}"):
            check_backbone(name, 224)
    with pytest.raises(InputError, match=r"^--backbone squeezenet1_0: its last layer is not one linear layer"):
        check_backbone("squeezenet1_0", 224)


@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_family_gets_a_meta_class_head(backbone):
    """In place of the layer that gave the 1,000 logits of ImageNet."""
    model = without_drawing(lambda: build_model(backbone, 12, None)).to("meta").eval()
    size = 96 if backbone == "inception_v3" else 64
    if backbone in ("vit_b_32", "maxvit_t"):
        size = 224
    features = []
    head_of(model).register_forward_hook(lambda head, inputs, output: features.append(inputs[0].shape))
    assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 12)
    assert features == [(2, head_of(model).in_features)] and head_of(model).bias is not None
    weights = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
    assert weights_tag(backbone, "imagenet") == f"imagenet:{weights.url.rsplit('/')[-1]}"
    assert weights_tag("vit_h_14", "imagenet") == "imagenet:vit_h_14_lc_swag-c1eb923e.pth"  # it has no first recipe


@pytest.mark.parametrize(
    ("backbone", "size", "possible"),
    [("alexnet", 32, "64, 96, 128, .*, 512 of"), ("vit_b_32", 256, "224 of"), ("maxvit_t", 112, "224 of")],
)
def test_images_of_a_size_that_a_network_cannot_take_are_refused(backbone, size, possible):
    with pytest.raises(InputError, match=f"^--image_size {size}: {backbone} cannot take it .*; it takes {possible}"):
        check_backbone(backbone, size)
    check_backbone(backbone, 224)


# Families with dropout, with a loader of their own, and that cannot be built on meta, each in small for 32 pixels.
SMALL = {
    "efficientnet_b0": partial(
        efficientnet.EfficientNet,
        [efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1), efficientnet.MBConvConfig(4, 3, 2, 8, 8, 2)],
        dropout=0.2,
        last_channel=32,
    ),
    "mnasnet0_5": partial(mnasnet.MNASNet, 0.1),
    "regnet_x_400mf": lambda **kwargs: regnet.RegNet(
        regnet.BlockParams.from_init_params(depth=2, w_0=8, w_a=8.0, w_m=2.0, group_width=8), stem_width=8, **kwargs
    ),
    "vit_b_32": partial(vision_transformer.VisionTransformer, 32, 16, 1, 2, 16, 32, dropout=0.1),
}


@pytest.fixture
def small(monkeypatch) -> None:
    """torchvision builds the networks of SMALL."""
    for name, build in SMALL.items():
        builder = lambda weights, build=build, **options: build(**options)  # noqa: E731
        monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, name, builder)


@pytest.mark.parametrize("backbone", [*SMALL, "timm:test_efficientnet"])
def test_a_small_network_trains_and_embeds(backbone, small, tiny_cache, tiny_settings, tmp_path):
    """Trained again, it has the same bits; the member embeds as it was saved."""
    if backbone not in SMALL:
        pytest.importorskip("timm", reason="timm is an extra")
    settings = dataclasses.replace(tiny_settings, backbone=backbone, batch_size=36)
    experiment = Experiment(tiny_cache, settings, None, Compute(torch.device("cpu")), {})
    record = runs.make_run_record(settings, tiny_cache, {"data_path": "data"}, {})
    write_record(tmp_path / "args.json", record)
    train.make_member(experiment, Members(tmp_path, record.settings_hash), 1, "member")
    again, images = train.train_member(experiment, 1, "again")[0], np.array(tiny_cache.array("test_images"))
    computed = extract_features(again, images, experiment.statistics, 72)
    saved = {name: np.load(tmp_path / f"member_001.{suffix}") for name, suffix in runs.SAVED.items()}
    for embedding, rows in saved.items():
        assert np.array_equal(rows, computed[embedding].numpy())
        unit_rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        embedded = load_ensemble(tmp_path, embedding=embedding)(torch.from_numpy(images))
        np.testing.assert_allclose(embedded.numpy(), unit_rows, atol=1e-5)
    head = head_of(again)
    logits = saved["pooled"] @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    np.testing.assert_allclose(saved["logits"], logits, rtol=1e-4, atol=1e-5)
    initial = train.initial_state(experiment, 1).model.parameters()
    assert all(not torch.equal(*both) for both in zip(initial, again.parameters(), strict=True))


def test_dropout_is_drawn_for_each_epoch_of_each_member(small, tiny_cache, tiny_settings, monkeypatch):
    """Whatever was drawn before; two members and two epochs have other draws."""
    draws = []

    def look(state, compute, batches, num_images, title):
        draws.append(torch.rand(()).item())
        return {"correct": 0}

    monkeypatch.setattr(train, "train_epoch", look)
    settings = dataclasses.replace(tiny_settings, backbone="vit_b_32")
    experiment = Experiment(tiny_cache, settings, None, Compute(torch.device("cpu")), {})
    for member in (1, 2, 1):
        train.train_member(experiment, member, "")
    assert draws[:2] == draws[4:] and len(set(draws)) == 4


def test_networks_of_timm_that_cannot_be_taken_are_refused():
    pytest.importorskip("timm", reason="timm is an extra")
    refusals = {
        "timm:nothing_like_it": "is no network of timm; near it: ",
        "timm:resnet50.nobody": r"is no network of timm; near it: .*resnet50\.",
        "timm:": "is no network of timm",
        "timm:crossvit_9_240": "its last layer is not one linear layer",  # but two
        "timm:deit_tiny_distilled_patch16_224": "its last layer is not one linear layer",
        "timm:test_vit3": "--image_size 96: timm:test_vit3 cannot take it .*; it takes 160 of the usual sizes",
    }
    for backbone, message in refusals.items():
        with pytest.raises(InputError, match=message):
            check_backbone(backbone, 96)
    check_backbone("timm:test_vit3", 160)


def test_without_timm_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"^--backbone timm:NAME needs: pip install timm"):
        check_backbone("timm:resnet18", 32)


def test_tables_that_no_file_holds_are_there_in_a_member_that_is_loaded(tmp_path):
    """timm's tables of positions are not in state dicts."""
    pytest.importorskip("timm", reason="timm is an extra")
    model = build_model("timm:test_coatnet", 3, None).eval()
    assert {name for name, _ in model.named_buffers()} - set(model.state_dict())
    settings = {"backbone": "timm:test_coatnet", "meta_class_size": 3}
    record = runs.MemberRecord(1, "", 0, history=[], partition=[], environment={}, sha256={})
    embeddings = dict.fromkeys(runs.SAVED, torch.zeros(1))
    runs.save_member(tmp_path, record, model, {"settings": settings}, embeddings)
    before = torch.get_rng_state()
    loaded = load_member(runs.member_path(tmp_path, 1, runs.WEIGHTS)).eval()
    assert torch.equal(torch.get_rng_state(), before)
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), model(pixels))


def save_weights(path: Path, num_classes: int = 1000, leave_out: str = "nothing") -> dict[str, torch.Tensor]:
    """A state dict of resnet18 in torchvision's format. Returned without its head."""
    torch.manual_seed(123)
    state = torchvision.models.resnet18(num_classes=num_classes).state_dict()
    state = {name: value for name, value in state.items() if not name.endswith(leave_out)}
    torch.save(state, path)
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("num_classes", [1000, 7])
@pytest.mark.parametrize("leave_out", ["nothing", "num_batches_tracked"])
def test_weights_from_a_file_fill_all_but_the_head(tmp_path, num_classes, leave_out):
    """torchvision's files of before 2018, which mirrors still carry, lack BatchNorm's counter."""
    saved = save_weights(tmp_path / "w.pth", num_classes, leave_out)
    weights = read_weights("resnet18", str(tmp_path / "w.pth"))
    assert weights_tag("resnet18", str(tmp_path / "w.pth")) == f"sha256:{sha256(tmp_path / 'w.pth')}"
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = build_model("resnet18", 5, weights).state_dict()
        heads.append(state["fc.weight"])
        assert len(state) == 122 and all(torch.equal(state[name], value) for name, value in saved.items())
    assert heads[0].shape == (5, 512) and not torch.equal(*heads)


def prefixed(state: dict, prefix: str) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


READABLE = {  # what people have -> how it is written, from a state dict
    "data parallel": lambda state, path: torch.save(prefixed(state, "module."), path),
    "compiled": lambda state, path: torch.save(prefixed(state, "module._orig_mod."), path),
    "checkpoint": lambda state, path: torch.save({"epoch": 3, "state_dict": prefixed(state, "module.")}, path),
    "with options": lambda state, path: torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, path),
    "safetensors": lambda state, path: save_file(state, path),
}


@pytest.mark.parametrize("kind", READABLE)
def test_weights_are_read_as_people_have_them(tmp_path, kind):
    """Prefixes, wrappers, and whatever the file's name says."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    for path in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
        READABLE[kind](state, path)
        found = read_weights("resnet18", str(path))
        assert found.keys() == {name for name in state if not name.startswith("fc.")}
        assert all(torch.equal(value, state[name]) for name, value in found.items())


CONV = torch.ones(64, 3, 7, 7)
REFUSED = {  # a change of a state dict, another object, or the bytes of a file -> what is said
    "missing": ({"conv1.weight": None}, r"does not fit resnet18: conv1.weight is missing$"),
    "unknown": ({"extra": CONV}, r"extra is unknown$"),
    "shape": ({"conv1.weight": CONV[:, :1]}, r"conv1.weight is \(64, 1, 7, 7\), not \(64, 3, 7, 7\)$"),
    "NaN": ({"layer2.0.conv1.weight": torch.full((128, 64, 3, 3), torch.nan)}, r"layer2.0.conv1.weight is not finite$"),
    "int8": ({"conv1.weight": CONV.to(torch.int8)}, r"conv1.weight is int8, not floating point$"),
    "sparse": ({"conv1.weight": CONV.to_sparse()}, r"conv1.weight is sparse$"),
    "other network": (torchvision.models.resnet34, r"does not fit resnet18: .* is unknown \(\d+ differences\)$"),
    "nothing inside": ({"state_dict": {}, "conv1.weight": 3}, "holds 0 state dicts, not one$"),
    "two inside": ([{"a": {"x": CONV}, "b": {"x": CONV}}], "holds 2 state dicts, not one$"),
    "code": ([Payload("owned")], "is no readable state dict, as torch.save"),
    "empty": (b"", "is an empty file$"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS, .*git lfs pull$"),
    "page": (b"\n<!DOCTYPE html>\n<title>Sign in</title>", "is a web page or an error message: download"),
    "answer": (b'{"error": "Repository not found"}', "is a web page or an error message: download"),
    "text": (b"Entry not found", "is no readable state dict"),
    "truncated": (b"PK\x03\x04" + b"\0" * 60, "is no readable state dict"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_weights_that_cannot_be_used_are_refused_in_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    content, message = REFUSED[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, list):
        torch.save(content[0], path)
    elif callable(content):
        torch.save(content().state_dict(), path)
    else:
        state = torchvision.models.resnet18().state_dict() | content
        torch.save({name: value for name, value in state.items() if value is not None}, path)
    with pytest.raises(InputError, match=message) as error:
        read_weights("resnet18", str(path))
    assert "\n" not in str(error.value) and not (tmp_path / "owned").exists()


def test_weights_by_the_command_line(tiny_data, tmp_path, capsys, no_training):
    (tmp_path / "page.pth").write_bytes(b"<html>")
    for name, problem in (("nowhere.pth", "no such file"), ("page.pth", "is a web page or an error message")):
        assert train_tiny(tiny_data, tmp_path / "results", "--weights", str(tmp_path / name)) == 2
        line = capsys.readouterr().err
        assert line.startswith("train.py: --weights ") and problem in line and line.count("\n") == 1


@pytest.fixture
def downloaded(tmp_path, monkeypatch) -> Path:
    """Where torchvision keeps the ImageNet weights of resnet18. The server answers with other bytes."""

    class Answer(io.BytesIO):
        def info(self):
            return email.message.Message()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: Answer(b"damaged"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder / Path(torchvision.models.get_model_weights("resnet18")["IMAGENET1K_V1"].url).name


@pytest.mark.parametrize("damage", ["empty", "a pickle that runs code", "another file from the server", "no network"])
def test_a_damaged_download_is_refused_and_not_executed(tmp_path, downloaded, damage, monkeypatch):
    """With the ways out."""
    if damage == "empty":
        downloaded.write_bytes(b"")
    elif damage == "a pickle that runs code":
        downloaded.write_bytes(pickle.dumps(Payload(str(tmp_path / "owned"))))
    elif damage == "no network":
        monkeypatch.setattr("torch.hub.urlopen", None)  # the call fails
    place = re.escape(str(tmp_path / "hub"))
    with pytest.raises(
        InputError, match=f"^cannot download .* into {place} .* --weights PATH.* --weights none"
    ) as error:
        read_weights("resnet18", "imagenet")
    assert "\n" not in str(error.value) and not (tmp_path / "owned").exists()


def test_imagenet_weights_are_torchvisions_file(downloaded):
    """A file where torchvision keeps its downloads is taken, without network, and named in the weights' tag."""
    saved = save_weights(downloaded)
    weights = read_weights("resnet18", "imagenet")
    assert weights_tag("resnet18", "imagenet") == f"imagenet:{downloaded.name}"
    assert set(weights) == set(saved) and all(torch.equal(weights[name], value) for name, value in saved.items())


def test_pretrained_weights_are_those_that_timm_itself_loads(monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is an extra")
    assert weights_tag("timm:test_resnet", "imagenet") == "imagenet:timm/test_resnet.r160_in1k"
    with pytest.raises(InputError, match="timm has no pretrained weights for timm:coatnet_0_224"):
        weights_tag("timm:coatnet_0_224", "imagenet")
    network, create = timm.create_model("test_resnet"), timm.create_model

    def downloaded(name, pretrained=False, **kwargs):
        return network if pretrained else create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", downloaded)
    weights = read_weights("timm:test_resnet", "imagenet")
    assert torch.equal(weights["conv1.0.weight"], network.state_dict()["conv1.0.weight"])
    assert not any(name.startswith("fc.") for name in weights)
    monkeypatch.setattr(timm, "create_model", None)  # fails, as without network
    with pytest.raises(InputError, match=r"cannot download .* timm/test_resnet.r160_in1k .* --weights none"):
        read_weights("timm:test_resnet", "imagenet")


def test_the_auxiliary_outputs_of_two_networks_are_left_out_of_their_weights(tmp_path):
    torch.manual_seed(0)
    state = torchvision.models.googlenet(num_classes=1000, init_weights=False, aux_logits=True).state_dict()
    assert any(name.startswith("aux1.") for name in state)
    torch.save(state, tmp_path / "w.pth")
    weights = read_weights("googlenet", str(tmp_path / "w.pth"))
    assert not any(name.startswith(("aux", "fc.")) for name in weights) and len(weights) > 300
