"""One member of the ensemble: a ResNet with a meta-class head, its precision, and its embedding."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from utils import (
    LATER_SETTINGS,
    MEMBER_RECORD,
    RUN_RECORD,
    InputError,
    image_batches,
    member_file,
    member_numbers,
    one_line,
    out_of_memory,
    read_record,
    run_identity,
    sha256,
    spans,
)

IMAGENET_WEIGHTS = "IMAGENET1K_V1"  # torchvision's first recipe for every ResNet, the one that the paper's time had

# ------------------------------------------------------------------------------------------------ network


def backbone_names() -> list[str]:
    """Every ResNet, ResNeXt and Wide ResNet of torchvision."""
    names = torchvision.models.list_models()
    return [name for name in names if torchvision.models.get_model_builder(name).__module__.endswith("models.resnet")]


def build_model(backbone: str, num_meta_classes: int, weights: dict[str, torch.Tensor] | None) -> nn.Module:
    """A backbone whose last layer is one `Linear(features, num_meta_classes)` (METHOD.md: "One member", step 2).

    Maps `(N, 3, S, S) float` to logits `(N, num_meta_classes)`. What `weights` (from `read_weights`) does not fill,
    at least the head, is drawn from torch's global CPU generator by torchvision's own initialisation.
    """
    model = torchvision.models.get_model(backbone, weights=None, num_classes=num_meta_classes)
    model.fc = Head(model.fc.in_features, num_meta_classes)
    if weights is not None:
        model.load_state_dict(weights | {f"fc.{name}": value for name, value in model.fc.state_dict().items()})
    return model.to(memory_format=torch.channels_last)  # the layout that cuDNN and oneDNN compute fastest


class Head(nn.Linear):
    """The last layer: features `(N, features)` of any float dtype -> logits `(N, D) float32`, whatever the autocast."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with autocast(features.device, "fp32"):
            return super().forward(features.float())


def weights_identity(backbone: str, weights: str) -> str:
    """What tells initial weights apart: "none", the name of torchvision's file, or "sha256:" and a file's checksum."""
    if weights == "none":
        return "none"
    if weights == "imagenet":
        return Path(torchvision.models.get_model_weights(backbone)[IMAGENET_WEIGHTS].url).name
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
        entry = torchvision.models.get_model_weights(backbone)[IMAGENET_WEIGHTS]
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
    return _checked_weights(backbone, weights, state)


def _checked_weights(backbone: str, weights: str, state: object) -> dict[str, torch.Tensor]:
    """The state dict without its head, if it fits the backbone in every other name and shape.

    The counters `num_batches_tracked`, which BatchNorm never uses here, are not in older files and may be missing.
    """
    with torch.device("meta"):
        expected = torchvision.models.get_model(backbone, weights=None).state_dict()
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

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what the backbone computes in


def pick_precision(device: torch.device) -> str:
    """The precision for `--precision auto`: bf16 where the device computes it natively, else fp16 on CUDA, else fp32.

    fp16 needs tensor cores (compute capability 7.0, such as the V100) to be worth its gradient scaling.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bf16"
        return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context in which a backbone computes in `precision`; "fp32" switches an outer autocast off."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


# ------------------------------------------------------------------------------------------------ images and embedding


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """`(N, S, S, 3) uint8` or float in 0..255 -> `(N, 3, S, S) float32` in the memory format channels_last.

    Equals torchvision's ToTensor and Normalize, on the CPU bit for bit. `mean` and `std` `(3,)`: of values in [0, 1].
    """
    num_images, height, width, _ = images.shape
    # Whole rows against the tiled statistics: broadcasting over three channels took five times as long on a CPU.
    rows = images.reshape(num_images * height, width * 3) / 255
    rows.sub_(mean.repeat(width)).div_(std.repeat(width))
    return rows.view(num_images, height, width, 3).permute(0, 3, 1, 2)


def resize_windows(images: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Enlarges the top left window of each image, `sides` `(N,)` pixels wide and high, to the whole image.

    `(N, S, S, 3) uint8` -> `(N, S, S, 3) float32`; bilinear, as `F.interpolate` of each window.
    """
    size = images.shape[1]
    pixels = torch.arange(size, device=images.device)
    last = (sides - 1)[:, None]
    places = torch.minimum(((pixels + 0.5) * sides[:, None] / size - 0.5).clamp(min=0), last)  # (N, S)
    places = places * (2 / max(size - 1, 1)) - 1  # grid_sample counts from -1 to 1
    rows, columns = places[:, :, None].expand(-1, -1, size), places[:, None, :].expand(-1, size, -1)
    grid = torch.stack([columns, rows], dim=3)
    resized = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, align_corners=True)
    return resized.permute(0, 2, 3, 1)


EMBEDDINGS = ("logits", "pooled")  # "logits" is the method


def member_output(model: nn.Module, pixels: torch.Tensor, embedding: str) -> torch.Tensor:
    """What a member's embedding is made of: images `(N, 3, S, S) float` -> `(N, d) float32`.

    For "logits" its D logits; for "pooled" the input of its last layer, the backbone's feature after average pooling.
    """
    if embedding not in EMBEDDINGS:
        raise ValueError(f"embedding has to be one of {', '.join(EMBEDDINGS)}, not {embedding!r}")
    if embedding == "logits":
        return model(pixels)
    backbone = nn.Sequential(*list(model.children())[:-1], nn.Flatten())  # a ResNet's layers in order, but for the last
    return backbone(pixels).float()


def embed(outputs: torch.Tensor) -> torch.Tensor:
    """The embedding by one member: its outputs `(N, d)` scaled to length 1 (METHOD.md: "One member", step 7)."""
    return F.normalize(outputs, dim=1)


@torch.inference_mode()
def member_outputs(
    model: nn.Module,
    images: np.ndarray,
    mean: torch.Tensor,
    std: torch.Tensor,
    batch_size: int,
    precision: str,
    embedding: str = "logits",
) -> torch.Tensor:
    """`member_output` of images `(N, S, S, 3) uint8`, memory-mapped or not: `(N, d) float32` on the model's device."""
    model.eval()
    device, batches = mean.device, spans(0, len(images), batch_size)
    width = model.fc.out_features if embedding == "logits" else model.fc.in_features
    outputs = torch.empty((len(images), width), device=device)

    def fill(start: int, stop: int, out: np.ndarray) -> None:
        out[:] = images[start:stop]

    loaded = image_batches(fill, batches, images.shape[1], device)
    for (start, stop), batch in zip(batches, loaded, strict=True):
        with autocast(device, precision):
            outputs[start:stop] = member_output(model, normalize(batch, mean, std), embedding)
    return outputs


class Ensemble(nn.Module):
    """The trained members of a run; see `load_ensemble`. `resize` is what `data_utils.resize_test` has to be told."""

    def __init__(
        self,
        members: Sequence[nn.Module],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        precision: str = "fp32",
        embedding: str = "logits",
        resize: str = "crop",
    ):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.image_size = image_size
        self.precision = precision
        self.embedding = embedding
        self.resize = resize
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(N, S, S, 3) uint8`, as `data_utils.resize_test` makes them -> `(N, L * d) float32`.

        The members' embeddings side by side, each of length 1: the dot product of two rows, divided by L, is the mean
        of the members' cosines.
        """
        pixels = normalize(images, self.mean, self.std)
        with autocast(images.device, self.precision):
            outputs = [member_output(member, pixels, self.embedding) for member in self.members]
        return torch.cat([embed(of_member) for of_member in outputs], dim=1)


def read_run_record(run_folder: Path) -> dict:
    """The `args.json` of a run folder. Raises InputError if it is missing or damaged."""
    path = run_folder / "args.json"
    if not os.path.isfile(path):  # unlike Path.is_file, also for a name that is too long
        raise InputError(f"{run_folder} is not a run folder: it has no args.json")
    try:
        record = read_record(path, RUN_RECORD)
        if record["settings"]["precision"] not in PRECISIONS:
            raise ValueError("unknown precision")
        return record | {"settings": LATER_SETTINGS | record["settings"]}
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({one_line(error)}); train.py makes it again") from None


def load_member(weights: Path, backbone: str, num_meta_classes: int) -> nn.Module:
    """The network of a trained member, `member_007.pth`, on the CPU."""
    model = build_model(backbone, num_meta_classes, None)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


def load_ensemble(
    run_folder: str | Path,
    device: str | torch.device = "cpu",
    embedding: str = "logits",
    num_members: int | None = None,
) -> Ensemble:
    """Loads the first finished members of a run folder (`results/...`), ready to embed images in the run's precision.

    `num_members` None: all of them. Raises InputError if the folder is no run, has no or fewer finished members, or a
    file does not match its checksum.
    """
    run_folder = Path(run_folder)
    record = read_run_record(run_folder)
    settings, data = record["settings"], record["data"]
    finished, members = member_numbers(run_folder), []
    if not finished:
        raise InputError(f"{run_folder} has no finished member")
    if num_members is not None and len(finished) < num_members:
        raise InputError(f"{run_folder} has {len(finished)} finished members, not {num_members}")
    for member in finished[:num_members]:
        path, weights = (run_folder / member_file(member, suffix) for suffix in ("json", "pth"))
        try:
            of_member = read_record(path, MEMBER_RECORD)
            if (of_member["run"], of_member["member"]) != (run_identity(record), member):
                raise ValueError("of another run or member")
            if sha256(weights) != of_member["sha256"][weights.name]:
                raise ValueError(f"the checksum of {weights.name} does not fit")
            members.append(load_member(weights, settings["backbone"], settings["meta_class_size"]))
        except Exception as error:  # damaged files raise a dozen kinds
            if out_of_memory(error):
                raise
            raise InputError(f"{path} is damaged ({one_line(error)}); train.py makes it again") from None
    ensemble = Ensemble(
        members, settings["image_size"], data["mean"], data["std"], settings["precision"], embedding, settings["resize"]
    )
    return ensemble.to(device).eval()
