"""Optimizers and learning rate schedules. Default rates and milestones are in `dreml/settings.py`."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from dreml.settings import MILESTONES, Settings

RISE = 0.2  # the share of the training in which the rate of "onecycle" rises


def make_optimizer(name: str, model: nn.Module, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """Make Adam, or SGD with momentum 0.9, without weight decay.

    Fused on CUDA and CPU: one kernel, which also reads fp16's gradient scale without waiting for the device.
    """
    fused = device.type in ("cuda", "cpu")
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, fused=fused)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=fused)
    for parameter in model.parameters():
        # PyTorch (2.6 to 2.15) starts with uninitialised memory, and keeps it if fp16 overflows in the first step.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(settings: Settings, epochs: float) -> float:
    """Return the learning rate after `epochs` epochs, which may be a fraction such as 2.5.

    "steps": divide by 10 at each milestone, from epoch int(milestone * E) on, counted from 0, but never in epoch 0.
    "onecycle": rise linearly from 0 to `settings.lr` in the first fifth of the training, then fall linearly to 0.
    """
    if settings.schedule == "onecycle":
        done = epochs / settings.num_epochs
        return settings.lr * min(done / RISE, (1 - done) / (1 - RISE))
    milestones = MILESTONES[settings.optimizer]
    return settings.lr / 10 ** sum(epochs >= max(int(milestone * settings.num_epochs), 1) for milestone in milestones)


def with_rates(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    epoch: int,
    num_images: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield an epoch's batches. Before each one, set the optimizer to the learning rate in the middle of its step."""
    done = 0
    for pixels, targets in batches:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, epoch + (done + len(pixels) / 2) / num_images)
        yield pixels, targets
        done += len(pixels)
