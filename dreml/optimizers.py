"""The optimizers, and their learning rate in each step. `dreml/settings.py` has their numbers."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from dreml.batches import Targets
from dreml.settings import MILESTONES, Settings

RISE = 0.2  # the share of the training in which "onecycle" goes up


def make_optimizer(name: str, model: nn.Module, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum 0.9; neither with weight decay.

    Fused on CUDA and CPU: one kernel, which also reads fp16's gradient scale without a wait for the device.
    """
    fused = device.type in ("cuda", "cpu")
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, fused=fused)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=fused)
    for parameter in model.parameters():
        # PyTorch's own start, uninitialised memory, is kept if fp16's scale overflows in the first step (2.6 to 2.15).
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(settings: Settings, epochs: float) -> float:
    """The rate after so many epochs, such as 2.5.

    "steps": for each milestone a tenth from epoch int(milestone * E) on, counted from 0, never in epoch 0.
    "onecycle": linearly from 0 up to `settings.lr` in the first fifth of the training, linearly down to 0 in the rest.
    """
    if settings.schedule == "onecycle":
        done = epochs / settings.num_epochs
        return settings.lr * min(done / RISE, (1 - done) / (1 - RISE))
    milestones = MILESTONES[settings.optimizer]
    return settings.lr / 10 ** sum(epochs >= max(int(milestone * settings.num_epochs), 1) for milestone in milestones)


def with_rates(
    batches: Iterable[tuple[torch.Tensor, Targets]],
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    epoch: int,
    num_images: int,
) -> Iterator[tuple[torch.Tensor, Targets]]:
    """The (pixels, targets) of an epoch's batches. Before each, sets the optimizer's rate: that halfway in its step."""
    done = 0
    for pixels, targets in batches:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, epoch + (done + len(pixels) / 2) / num_images)
        yield pixels, targets
        done += len(pixels)
