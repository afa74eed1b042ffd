"""The backbones, from torchvision and, if installed, timm; and their initial weights.

torchvision is imported late: that takes a second, and a search of saved embeddings does not need it.
"""

import argparse
import difflib
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load
from torch import nn

from dreml.cli import InputError, counted, one_line
from dreml.files import sha256

TIMM = "timm:"  # prefix of the names of timm's networks
# torchvision's first recipe, as at the time of the paper. vit_h_14 and regnet_y_128gf have only the second entry.
ENTRIES = ("IMAGENET1K_V1", "IMAGENET1K_SWAG_LINEAR_V1")
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}  # outputs for training, left out
USUAL_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)


def timm_library():
    """Import `timm`. Raises InputError if it cannot be imported."""
    try:
        import timm
    except ImportError as error:
        raise InputError(f"--backbone {TIMM}NAME needs: pip install timm ({one_line(error)})") from None
    return timm


def check_backbone(backbone: str, image_size: int) -> None:
    """Raise InputError for an unknown backbone, or an image size that it cannot take."""
    from torchvision import models

    if backbone.startswith(TIMM):
        library = "timm"
        known = timm_library().list_models() + timm_library().list_pretrained()  # the second has names with tags
        name = backbone.removeprefix(TIMM)
    else:
        library = f"torchvision, or {TIMM}NAME"
        known = models.list_models(module=models)
        name = backbone
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3)) or "none"
        raise InputError(f"--backbone {backbone!r} is no network of {library}; near it: {near}")
    check_image_size(backbone, image_size)


def build_backbone(backbone: str, num_classes: int) -> tuple[nn.Module, str]:
    """Build a network as its library does, from torch's global CPU generator. Returns it and its last layer's name."""
    from torchvision import models

    if backbone.startswith(TIMM):
        network = timm_library().create_model(backbone.removeprefix(TIMM), num_classes=num_classes)
        return network, last_layer(backbone, network)
    options = {"aux_logits": False, "init_weights": True} if backbone in AUXILIARY else {}
    network = models.get_model(backbone, weights=None, num_classes=num_classes, **options)
    if backbone.startswith("mnasnet"):  # its own loader needs a version number, which our files lack
        network._load_from_state_dict = functools.partial(nn.Module._load_from_state_dict, network)
    return network, last_layer(backbone, network)


def last_layer(backbone: str, network: nn.Module) -> str:
    """Return the name of the linear layer that outputs the logits. Raises InputError if there is none."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    if backbone.startswith(TIMM):
        last = network.get_classifier()
        inside = list(last.modules()) if isinstance(last, nn.Module) else []  # two classifiers are a tuple
        layers = {name: layer for name, layer in layers.items() if any(layer is part for part in inside)}
        layers = layers if len(layers) == 1 else {}
    if not layers:
        raise InputError(f"--backbone {backbone}: its last layer is not one linear layer, which the method replaces")
    return list(layers)[-1]


def without_drawing(build: Callable[[], nn.Module]) -> nn.Module:
    """Call `build` and keep the random state, for weights loaded later. On device meta if possible, else on the CPU."""
    try:
        with torch.device("meta"):
            network = build()
        if {name for name, _ in network.named_buffers()} <= set(network.state_dict()):
            return network  # else it has buffers, such as position tables, that no file holds
    except NotImplementedError:  # RegNet computes its widths with tensors
        pass
    with torch.random.fork_rng(devices=[]):
        return build()


@functools.cache
def check_image_size(backbone: str, size: int) -> None:
    """Raise InputError if the network cannot train on images of `size` pixels. The error lists sizes that it takes."""
    network = without_drawing(lambda: build_backbone(backbone, 2)[0]).to("meta").train()

    def problem(size: int) -> Exception | None:
        try:
            network(torch.empty(2, 3, size, size, device="meta"))
        except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
            return error
        return None

    found = problem(size)
    if found:
        network.eval()  # faster, and accepts the same sizes
        possible = ", ".join(str(usual) for usual in USUAL_SIZES if not problem(usual))
        reason = f"{backbone} cannot take it ({one_line(found)})"
        raise InputError(f"--image_size {size}: {reason}; it takes {possible or 'none'} of the usual sizes")


def weights_tag(backbone: str, weights: str) -> str:
    """Identify initial weights: "none", "imagenet:" and the library's file, or "sha256:" and a checksum."""
    if weights == "none":
        return "none"
    if weights == "imagenet" and backbone.startswith(TIMM):
        entry = timm_library().models.get_pretrained_cfg(backbone.removeprefix(TIMM))
        if not entry.has_weights:
            raise InputError(f"timm has no pretrained weights for {backbone}: give --weights none, or a file")
        return f"imagenet:{entry.hf_hub_id or Path(entry.url).name}"
    if weights == "imagenet":
        return f"imagenet:{Path(torchvision_weights(backbone).url).name}"
    if not Path(weights).is_file():
        raise InputError(f"--weights {weights!r}: no such file (imagenet, none, or the path of a state dict)")
    return f"sha256:{sha256(Path(weights))}"


def torchvision_weights(backbone: str):
    """Return torchvision's entry for the ImageNet weights of one of its networks."""
    from torchvision import models

    entries = models.get_model_weights(backbone)
    return next(entries[recipe] for recipe in ENTRIES if recipe in entries.__members__)


def own_scaling(backbone: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the channels' mean and std, in 0..1, `(3,)` each, with which the library trained its weights."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # every recipe of torchvision
    if backbone.startswith(TIMM):
        entry = timm_library().models.get_pretrained_cfg(backbone.removeprefix(TIMM))
        mean, std = entry.mean, entry.std
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def read_weights(backbone: str, weights: str) -> dict[str, torch.Tensor] | None:
    """Read the backbone's initial weights once, for all members.

    `weights`: "imagenet" (the library's own download), "none", or the path of a state dict in the library's naming. A
    prefix of all names, such as "module.", is removed. The counters `num_batches_tracked` may be missing, as in older
    files: BatchNorm does not use them here. No code in a pickle is executed.

    Returns the state dict without the last layer, or None for "none". Raises InputError if the weights are unusable.
    """
    if weights == "none":
        return None
    state = download(backbone) if weights == "imagenet" else state_dict_in(weights)
    network = without_drawing(lambda: build_backbone(backbone, 1000)[0])
    left_out = (f"{last_layer(backbone, network)}.", *AUXILIARY.get(backbone, ()))
    expected = {name: value for name, value in network.state_dict().items() if not name.startswith(left_out)}
    state = {str(name): value for name, value in state.items()}
    if not expected.keys() & state.keys():
        common = os.path.commonprefix(list(state))  # noqa: RUF071 (it is cut at a dot)
        state = {name[common.rfind(".") + 1 :]: value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith(left_out)}
    problems = [f"{name} is missing" for name in expected if name not in state and not name.endswith("_tracked")]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    wrong = {name: what_is_wrong(state[name], value) for name, value in expected.items() if name in state}
    problems += [f"{name} is {problem}" for name, problem in wrong.items() if problem]
    if problems:
        others = f" ({counted(len(problems), 'difference')})" if len(problems) > 1 else ""
        raise InputError(f"--weights {weights} does not fit {backbone}: {problems[0]}{others}")
    return state


def what_is_wrong(value: torch.Tensor, expected: torch.Tensor) -> str:
    """Say why a tensor of a file cannot take the place of the network's own; "" if it can."""
    if value.shape != expected.shape:
        return f"{tuple(value.shape)}, not {tuple(expected.shape)}"
    if value.layout != torch.strided:
        return "sparse"
    if expected.is_floating_point() and not value.is_floating_point():
        return f"{str(value.dtype).removeprefix('torch.')}, not floating point"
    return "" if torch.isfinite(value.float()).all() else "not finite"


def state_dict_in(path: str) -> dict[str, torch.Tensor]:
    """Read the one state dict in a file, at the top level or under a key such as "state_dict" or "model".

    The format, safetensors or `torch.save`, is told by the content, not by the file name.
    """
    content = Path(path).read_bytes()
    if not content:
        raise InputError(f"--weights {path} is an empty file")
    if content.startswith(b"version https://git-lfs"):
        raise InputError(f"--weights {path} is a pointer of Git LFS, not the file itself: run git lfs pull")
    is_safetensors = content[8:9] == b"{"  # the header, after its length of 8 bytes
    if not is_safetensors and content[:200].lstrip().startswith((b"<", b"{")):
        raise InputError(f"--weights {path} is a web page or an error message: download the file again")
    try:
        if is_safetensors:
            found = load(content)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # many files hold the options too
                found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds of errors
        wanted = "state dict, as torch.save(model.state_dict(), PATH) writes it"
        raise InputError(f"--weights {path} is no readable {wanted} ({one_line(error)})") from None
    if is_state_dict(found):
        return found
    inside = [value for value in found.values() if is_state_dict(value)] if isinstance(found, dict) else []
    if len(inside) != 1:
        raise InputError(f"--weights {path} holds {counted(len(inside), 'state dict')}, not one")
    return inside[0]


def is_state_dict(value: object) -> bool:
    """Whether the value is a non-empty dict of tensors."""
    return isinstance(value, dict) and bool(value) and all(isinstance(each, torch.Tensor) for each in value.values())


def download(backbone: str) -> dict[str, torch.Tensor]:
    """Return the library's state dict, downloaded now or earlier. Raises InputError if that fails."""
    source = weights_tag(backbone, "imagenet").removeprefix("imagenet:")
    try:
        if backbone.startswith(TIMM):
            with torch.random.fork_rng(devices=[]):
                return timm_library().create_model(backbone.removeprefix(TIMM), pretrained=True).state_dict()
        entry = torchvision_weights(backbone)
        source = f"{entry.url} into {torch.hub.get_dir()}"
        return entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a damaged file among the downloads
        remedy = "give a copy of that file with --weights PATH, or train from scratch with --weights none"
        raise InputError(f"cannot download or read the weights {source} ({one_line(error)}); {remedy}") from None
