"""A network with a meta-class head, its precision and its features; the Ensemble of several."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from dreml.backbones import TIMM, build_backbone, without_drawing
from dreml.batches import image_batches, input_memory, normalize, spans
from dreml.cli import with_less_memory
from dreml.images import ImageSpec
from dreml.runs import METADATA, WEIGHTS, finished_members, member_path, read_run_record
from dreml.settings import EMBEDDINGS, Settings
from utils import full_float32, rng_for

# ------------------------------------------------------------------------------------------------ network


def build_model(backbone: str, num_meta_classes: int, weights: dict[str, torch.Tensor] | None) -> nn.Module:
    """Build a backbone whose last layer is one `Linear(features, num_meta_classes)` (paper, section 3).

    Maps `(N, 3, S, S) float` to logits `(N, num_meta_classes)`. `weights` (from `read_weights`) fills all but the head;
    None fills nothing. The rest is drawn from torch's global CPU generator by the library's own initialisation.
    """
    model, last = build_backbone(backbone, num_meta_classes)
    head = Head(model.get_submodule(last).in_features, num_meta_classes)
    model.set_submodule(last, head)
    if weights is not None:
        model.load_state_dict(weights | {f"{last}.{name}": value for name, value in head.state_dict().items()})
    return model.to(memory_format=torch.channels_last)  # the layout that cuDNN and oneDNN compute fastest


def initial_model(settings: Settings, member: int, weights: dict[str, torch.Tensor] | None) -> nn.Module:
    """Build a member's network before the first step, on the CPU. Its random weights depend on seed and member only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng_for(settings.seed, member, 0, "weights").integers(2**63)))
        return build_model(settings.backbone, settings.meta_class_size, weights)


class Head(nn.Linear):
    """The last layer: features `(N, features)` of any float dtype -> logits `(N, D) float32`, also under autocast."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with autocast(features.device, "fp32"):
            return super().forward(features.float())


def head_of(model: nn.Module) -> Head:
    """Return the last layer of a network from `build_model`."""
    return next(layer for layer in model.modules() if isinstance(layer, Head))


# ------------------------------------------------------------------------------------------------ precision

# Networks that a CPU trains faster in bf16 than in fp32 (measured: docs/RESULTS.md, "Networks"). MobileNets are slower.
FASTER_IN_BF16 = ("resnet", "resnext", "wide_resnet", "vgg", "densenet", "regnet", "convnext", "vit", "swin", "maxvit")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """The device of a network, and the precision of its backbone (the head always computes in fp32)."""

    device: torch.device
    precision: str = "fp32"

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.device, self.precision)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Make a loss scaler for fp16, where small gradients would vanish. It does nothing in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")


@dataclass
class TrainState:
    """What a training step changes: the network, its optimizer, and the scale of fp16's gradients."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def state_dict(self) -> dict[str, dict]:
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        for name in ("model", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])


def pick_precision(device: torch.device, backbone: str) -> str:
    """Choose the precision for `--precision auto`: bf16 if it is native to the device, else fp16 on CUDA, else fp32.

    On a CPU, also fp32 for all but the networks of FASTER_IN_BF16. fp16 needs tensor cores to be worth its gradient
    scaling: compute capability 7.0 (V100) and above.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bf16"
        # GTX 16 cards report 7.5, but have no tensor cores, and fp16 is known for NaN there.
        has_tensor_cores = torch.cuda.get_device_capability(device) >= (7, 0)
        return "fp16" if has_tensor_cores and "GTX" not in torch.cuda.get_device_name(device) else "fp32"
    is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    is_faster = backbone.removeprefix(TIMM).startswith(FASTER_IN_BF16)
    return "bf16" if device.type == "cpu" and is_native and is_faster else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return a context that computes in `precision`. "fp32" switches an outer autocast off."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


# ------------------------------------------------------------------------------------------------ features

Statistics = tuple[torch.Tensor, torch.Tensor]  # mean and standard deviation of the data set's channels, (3,) each


def features(model: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute a member's embeddings before they are scaled to length 1: `(N, 3, S, S) float` -> `(N, d) float32` each.

    "logits": the D logits (the method). "pooled": the input of the last layer, in most networks the feature after
    average pooling.
    """
    inputs_of_head = []
    with head_of(model).register_forward_pre_hook(lambda head, inputs: inputs_of_head.append(inputs[0])):
        logits = model(pixels)
    return {"logits": logits, "pooled": inputs_of_head[0].float()}


def channel_statistics(data: object, device: torch.device) -> Statistics:
    """Return `data.mean` and `data.std`, of a data set's channels, as tensors `(3,)` on the device."""
    return torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)


def extract_features(
    model: nn.Module, images: np.ndarray, statistics: Statistics, batch_size: int
) -> dict[str, torch.Tensor]:
    """Compute the `features` of many images, `(N, d) float32` each, on the device. Always in full float32.

    `images`: `(N, S, S, 3) uint8`, memory-mapped or not. `statistics`: on the device. `batch_size`: images of a batch,
    halved while memory is too short.
    """
    model.eval()
    return with_less_memory(lambda size: features_in_batches(model, images, statistics, size), batch_size)


@torch.inference_mode()
def features_in_batches(
    model: nn.Module, images: np.ndarray, statistics: Statistics, batch_size: int
) -> dict[str, torch.Tensor]:
    """`extract_features` in batches of this size."""
    device = statistics[0].device
    batches = spans(0, len(images), batch_size)
    head = head_of(model)
    widths = {"logits": head.out_features, "pooled": head.in_features}
    outputs = {name: torch.empty((len(images), width), device=device) for name, width in widths.items()}
    memory = input_memory(min(batch_size, len(images)), images.shape[1], device)

    def fill(start: int, stop: int, out: np.ndarray) -> None:
        out[:] = images[start:stop]

    loaded = image_batches(fill, batches, images.shape[1], device)
    with full_float32(device.type):
        for (start, stop), batch in zip(batches, loaded, strict=True):
            for name, rows in features(model, normalize(batch, *statistics, memory)).items():
                outputs[name][start:stop] = rows
    return outputs


# ------------------------------------------------------------------------------------------------ the ensemble


def unit_rows(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join the members' outputs, `(N, d)` each, into the ensemble's embedding `(N, sum of all d)`, rows of length 1.

    All members have the same weight, so the dot product of two rows is the mean of the members' cosines.
    """
    return torch.cat([F.normalize(output, dim=1) for output in outputs], dim=1) / len(outputs) ** 0.5


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
        rows is the mean of the members' cosines. Computed in float32, on the ensemble's device.
        """
        pixels = normalize(images.to(self.mean.device), self.mean, self.std)
        with full_float32(self.mean.device.type):
            return unit_rows([features(member, pixels)[self.embedding] for member in self.members])


def load_member(path: Path) -> nn.Module:
    """Load a trained member's network from `member_007.safetensors`, on the CPU. Its metadata names the backbone."""
    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()[METADATA])["settings"]
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # not views of the mapped file
    model = without_drawing(lambda: build_model(settings["backbone"], settings["meta_class_size"], None))
    model.load_state_dict(state, assign=True)
    return model.to(memory_format=torch.channels_last)


def load_ensemble(
    run_folder: str | Path,
    device: str | torch.device = "cpu",
    embedding: str = "logits",
    num_members: int | None = None,
) -> Ensemble:
    """Load the first members of a run folder (`results/...`), ready to embed images in float32.

    `num_members` None: all before the first that is missing, or damaged, of which a warning is printed. Raises
    InputError if the folder is no run or has too few members.
    """
    if embedding not in EMBEDDINGS:
        raise ValueError(f"embedding has to be one of {', '.join(EMBEDDINGS)}, not {embedding!r}")
    run_folder = Path(run_folder)
    record = read_run_record(run_folder)
    members = finished_members(run_folder, record, num_members, WEIGHTS)
    networks = [load_member(member_path(run_folder, each.member, WEIGHTS)) for each in members]
    ensemble = Ensemble(networks, record.settings.image_spec, record.data.mean, record.data.std, embedding)
    return ensemble.to(device).eval()
