"""The optimizers, and their learning rate in each epoch. `RECIPES` in `runs/settings.py` has their numbers."""

import torch
from torch import nn

from dreml.runs.settings import RECIPES, Settings


def make_optimizer(name: str, model: nn.Module, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum 0.9; neither with weight decay.

    Fused on CUDA and CPU: one kernel, which also reads fp16's gradient scale without a wait for the device.
    """
    fused = device.type in ("cuda", "cpu")
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, fused=fused)
    if name != "sgd":
        raise ValueError(f"no optimizer is called {name!r}")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=fused)
    for parameter in model.parameters():
        # PyTorch's own start, uninitialised memory, is kept if fp16's scale overflows in the first step (2.6 to 2.15).
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(settings: Settings, epoch: int) -> float:
    """The rate in an epoch, counted from 0: for each milestone a tenth from int(milestone * E) on, never in epoch 0."""
    milestones = RECIPES[settings.optimizer].milestones
    return settings.lr / 10 ** sum(epoch >= max(int(milestone * settings.num_epochs), 1) for milestone in milestones)
