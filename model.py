"""One member of the ensemble: a ResNet with a meta-class head, its precision and its features; and the Ensemble."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dreml.console import InputError, one_line, out_of_memory
from dreml.data.batches import image_batches, normalize, spans
from dreml.data.images import ImageSpec
from dreml.files import read_ahead, sha256
from dreml.runs.folder import Members, member_file, member_numbers, read_run_record
from dreml.runs.settings import EMBEDDINGS
from utils import full_float32

IMAGENET_WEIGHTS = "IMAGENET1K_V1"  # torchvision's first recipe for every ResNet, the one that the paper's time had

# ------------------------------------------------------------------------------------------------ network


def torchvision_models():
    """`torchvision.models`. It takes a second to import, and a search among saved embeddings does without it."""
    import torchvision

    return torchvision.models


def backbone_names() -> list[str]:
    """Every ResNet, ResNeXt and Wide ResNet of torchvision."""
    models = torchvision_models()
    return [
        name for name in models.list_models() if models.get_model_builder(name).__module__.endswith("models.resnet")
    ]


def check_backbone(name: str) -> None:
    """Raises InputError for a backbone that this program does not know."""
    if name not in backbone_names():
        raise InputError(f"--backbone {name!r} is not one of {', '.join(backbone_names())}")


def build_model(backbone: str, num_meta_classes: int, weights: dict[str, torch.Tensor] | None) -> nn.Module:
    """A backbone whose last layer is one `Linear(features, num_meta_classes)` (paper, section 3).

    Maps `(N, 3, S, S) float` to logits `(N, num_meta_classes)`. What `weights` (from `read_weights`) does not fill,
    at least the head, is drawn from torch's global CPU generator by torchvision's own initialisation.
    """
    model = torchvision_models().get_model(backbone, weights=None, num_classes=num_meta_classes)
    model.fc = Head(model.fc.in_features, num_meta_classes)
    if weights is not None:
        model.load_state_dict(weights | {f"fc.{name}": value for name, value in model.fc.state_dict().items()})
    return model.to(memory_format=torch.channels_last)  # the layout that cuDNN and oneDNN compute fastest


class Head(nn.Linear):
    """The last layer: features `(N, features)` of any float dtype -> logits `(N, D) float32`, whatever the autocast."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with autocast(features.device, "fp32"):
            return super().forward(features.float())


# ------------------------------------------------------------------------------------------------ initial weights


def weights_tag(backbone: str, weights: str) -> str:
    """What tells initial weights apart: "none", "imagenet:" and torchvision's file, or "sha256:" and a checksum."""
    if weights == "none":
        return "none"
    if weights == "imagenet":
        return f"imagenet:{Path(torchvision_models().get_model_weights(backbone)[IMAGENET_WEIGHTS].url).name}"
    if not Path(weights).is_file():
        raise InputError(f"--weights {weights!r}: no such file (imagenet, none, or the path of a state dict)")
    return f"sha256:{sha256(Path(weights))}"


def read_weights(backbone: str, weights: str) -> dict[str, torch.Tensor] | None:
    """Reads the backbone's initial weights once, for all members.

    Args:
        weights: "imagenet" (torchvision's own download), "none", or the path of a state dict in torchvision's format,
            which has to fit the backbone but for its head (`fc.*`).

    Returns:
        The state dict without `fc.*`, or None for "none".

    Raises:
        InputError: weights that cannot be had or do not fit. A file is read as data only: a pickle is not executed.
    """
    if weights == "none":
        return None
    if weights == "imagenet":
        entry = torchvision_models().get_model_weights(backbone)[IMAGENET_WEIGHTS]
        try:
            state = entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except Exception as error:  # no network, no disk, a damaged file among torch's downloads
            raise InputError(
                f"cannot download or read the ImageNet weights {entry.url} into {torch.hub.get_dir()} "
                f"({one_line(error)}); give a copy of that file with --weights PATH, or train from scratch with "
                "--weights none"
            ) from None
    else:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise a dozen kinds
            raise InputError(f"--weights {weights}: not a readable state dict ({one_line(error)})") from None
    return checked_weights(backbone, weights, state)


def checked_weights(backbone: str, weights: str, state: object) -> dict[str, torch.Tensor]:
    """The state dict without its head, if it fits the backbone in every other name and shape.

    The counters `num_batches_tracked`, which BatchNorm never uses here, are not in older files and may be missing.
    """
    with torch.device("meta"):
        expected = torchvision_models().get_model(backbone, weights=None).state_dict()
    expected = {name: value.shape for name, value in expected.items() if not name.startswith("fc.")}
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"--weights {weights}: not a state dict in torchvision's format (name -> tensor)")
    state = {name: value for name, value in state.items() if not str(name).startswith("fc.")}
    wrong = [f"{name} is missing" for name in expected if name not in state and not name.endswith("_tracked")]
    wrong += [f"{name} is unknown" for name in state if name not in expected]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more differences" if len(wrong) > 1 else ""
        raise InputError(f"--weights {weights} does not fit {backbone}: {wrong[0]}{more}")
    return state


# ------------------------------------------------------------------------------------------------ precision

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """Where a network runs, and in which precision its backbone computes (its head always computes in fp32)."""

    device: torch.device
    precision: str = "fp32"

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the backbone computes."""
        return autocast(self.device, self.precision)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss up in fp16, where small gradients would vanish; does nothing in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def overflow_remedy(self) -> str:
        """What to try when numbers are not finite."""
        if self.precision == "fp32":
            return "try a lower --lr"
        return f"try a lower --lr, or --precision fp32 ({self.precision} was used)"


def pick_precision(device: torch.device) -> str:
    """The precision for `--precision auto`: bf16 where the device computes it natively, else fp16 on CUDA, else fp32.

    fp16 needs tensor cores to be worth its gradient scaling: compute capability 7.0 (V100) and above. The GTX 16 cards
    report 7.5 and have none; there fp16 is known for NaN.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bf16"
        has_tensor_cores = "GTX 16" not in torch.cuda.get_device_name(device)
        return "fp16" if has_tensor_cores and torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context for computing in `precision`. "fp32" switches an outer autocast off."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


# ------------------------------------------------------------------------------------------------ features


def features(model: nn.Module, pixels: torch.Tensor, embedding: str) -> torch.Tensor:
    """What a member's embedding is made of, before it is scaled to length 1: `(N, 3, S, S) float` -> `(N, d) float32`.

    For "logits" its D logits (the method); for "pooled" the input of its last layer, the backbone's feature after
    average pooling.
    """
    if embedding not in EMBEDDINGS:
        raise ValueError(f"embedding has to be one of {', '.join(EMBEDDINGS)}, not {embedding!r}")
    if embedding == "logits":
        return model(pixels)
    backbone = nn.Sequential(*list(model.children())[:-1], nn.Flatten())  # a ResNet's layers in order, but for the last
    return backbone(pixels).float()


@torch.inference_mode()
def extract_features(
    model: nn.Module,
    images: np.ndarray,
    statistics: tuple[torch.Tensor, torch.Tensor],
    batch_size: int,
    embedding: str = "logits",
) -> torch.Tensor:
    """The `features` of many images, `(N, d) float32` on the device, computed in float32 whatever the training was.

    Args:
        images: `(N, S, S, 3) uint8`, memory-mapped or not.
        statistics: mean and standard deviation of the data set's channels, `(3,)` each, on the device.
    """
    model.eval()
    device, batches = statistics[0].device, spans(0, len(images), batch_size)
    width = model.fc.out_features if embedding == "logits" else model.fc.in_features
    outputs = torch.empty((len(images), width), device=device)

    def fill(start: int, stop: int, out: np.ndarray) -> None:
        out[:] = images[start:stop]

    def ask(start: int, stop: int) -> None:
        if isinstance(images, np.memmap):
            size = images[0].nbytes
            read_ahead(images.filename, spans(images.offset + start * size, images.offset + stop * size, size))

    loaded = image_batches(fill, batches, images.shape[1], device, ask)
    with full_float32(device.type):
        for (start, stop), batch in zip(batches, loaded, strict=True):
            outputs[start:stop] = features(model, normalize(batch, *statistics), embedding)
    return outputs


# ------------------------------------------------------------------------------------------------ the ensemble


class Ensemble(nn.Module):
    """The trained members of a run, which turn images into embeddings; see `load_ensemble`."""

    def __init__(
        self,
        members: Sequence[nn.Module],
        image_spec: ImageSpec,
        mean: Sequence[float],
        std: Sequence[float],
        embedding: str = "logits",
    ):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.image_spec = image_spec
        self.embedding = embedding
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(N, S, S, 3) uint8`, from `data_utils.resize_test(image, ensemble.image_spec)` -> `(N, L * d) float32`.

        Rows of length 1: the members' embeddings side by side, each of length 1 / sqrt(L). So the dot product of two
        rows is the mean of the members' cosines. Computed in float32, whatever the training was.
        """
        pixels = normalize(images, self.mean, self.std)
        with full_float32(images.device.type):
            outputs = [features(member, pixels, self.embedding) for member in self.members]
        return torch.cat([F.normalize(output, dim=1) for output in outputs], dim=1) / len(outputs) ** 0.5


def load_member(weights: Path, backbone: str, num_meta_classes: int) -> nn.Module:
    """The network of a trained member, `member_007.pth`, on the CPU."""
    with torch.device("meta"):  # no weights are drawn, only to be overwritten
        model = build_model(backbone, num_meta_classes, None)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), assign=True)
    return model.to(memory_format=torch.channels_last)


def load_ensemble(
    run_folder: str | Path,
    device: str | torch.device = "cpu",
    embedding: str = "logits",
    num_members: int | None = None,
) -> Ensemble:
    """Loads the first finished members of a run folder (`results/...`), ready to embed images in float32.

    `num_members` None: all of them. Raises InputError if the folder is no run, has no or fewer finished members, or a
    file does not match its checksum.
    """
    run_folder = Path(run_folder)
    record = read_run_record(run_folder)
    settings, finished = record.settings, member_numbers(run_folder)
    if not finished:
        raise InputError(f"{run_folder} has no finished member")
    if num_members is not None and len(finished) < num_members:
        raise InputError(f"{run_folder} has {len(finished)} finished members, not {num_members}")
    checked, networks = Members(run_folder, record.settings_hash, needed=("pth",)), []
    for member in finished[:num_members]:
        damaged = checked.read(member)[1]
        try:
            if damaged:
                raise ValueError(", ".join(damaged))
            path = run_folder / member_file(member, "pth")
            networks.append(load_member(path, settings.backbone, settings.meta_class_size))
        except Exception as error:  # damaged files raise a dozen kinds
            if out_of_memory(error):
                raise
            raise InputError(
                f"{run_folder}: member {member} is damaged ({one_line(error)}); train.py makes it again"
            ) from None
    data = record.data
    ensemble = Ensemble(networks, settings.image_spec, data.mean, data.std, embedding)
    return ensemble.to(device).eval()
