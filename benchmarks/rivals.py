"""How good is one network, trained on the classes themselves, for as long as a run and its student took?

    python -m benchmarks.rivals results/RUN --loss proxy_anchor --num_epochs 200

It has the run's backbone, initial weights, images, batches, optimizer and learning rate, a loss of
pytorch-metric-learning at its defaults, whose proxies learn at 100 times that rate, and the pooled features as its
embedding. The weights after the last epoch count. Adds a row to RUN/rivals.csv: R@1 and mAP@R in percent, and the
seconds of the training.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.distill_search import add_row
from benchmarks.plain import hardware
from distill import student_step
from dreml.backbones import read_weights, weights_tag
from dreml.console import (
    DEVICE_HELP,
    InputError,
    Parser,
    RunError,
    natural_number,
    pick_device,
    positive_float,
    run_main,
    seed_number,
    set_up_device,
)
from dreml.data.augment import epoch_batches, prepare
from dreml.data.cache import Cache
from dreml.optimizers import learning_rate, make_optimizer
from dreml.runs.folder import Run, read_run
from dreml.runs.settings import Settings
from evaluate import score
from model import Compute, TrainState, build_model, extract_features, features, head_of, unit_blocks
from utils import draws

LOSSES = {"proxy_anchor": "ProxyAnchorLoss", "normalized_softmax": "NormalizedSoftmaxLoss"}
PROXY_RATE = 100  # times the network's learning rate, as in the paper of Proxy-Anchor (Kim et al., CVPR 2020)


class Pooled(nn.Module):
    """A network whose outputs are its pooled features."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return features(self.network, pixels, "pooled")


def make_loss(name: str, num_classes: int, width: int) -> nn.Module:
    """The loss with its proxies, one for each class. It takes rows `(B, width)` and labels `(B,)`."""
    try:
        from pytorch_metric_learning import losses
    except ImportError:
        raise InputError("the losses are in another package: pip install pytorch-metric-learning") from None
    return getattr(losses, LOSSES[name])(num_classes, width)


def initial_weights(of_run: Settings, given: str | None) -> dict | None:
    """Those that the run's members began with; `given` names the file, if they came from one."""
    source = given or of_run.weights.partition(":")[0]
    if source == "sha256" or weights_tag(of_run.backbone, source) != of_run.weights:
        raise InputError(f"the run's members began with {of_run.weights}: --weights has to name that, or its file")
    return read_weights(of_run.backbone, source)


def train_rival(
    run: Run, cache: Cache, settings: Settings, loss_name: str, weights: dict | None, compute: Compute
) -> nn.Module:
    """Trains the network for `settings.num_epochs` and returns it."""
    device, labels = compute.device, cache.array("train_labels")
    statistics = run.statistics(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draws(settings.seed, 0, 0, "weights").integers(2**63)))
        network = build_model(settings.backbone, settings.meta_class_size, weights).to(device)
        loss_of = make_loss(loss_name, int(labels.max()) + 1, head_of(network).in_features).to(device)
    optimizer = make_optimizer(settings.optimizer, nn.ModuleList([network, loss_of]), settings.lr, device)
    (group,), num_proxies = optimizer.param_groups, len(list(loss_of.parameters()))
    optimizer.add_param_group({"params": [group["params"].pop() for _ in range(num_proxies)]})
    state = TrainState(Pooled(network).train(), optimizer, compute.grad_scaler())
    for epoch in range(settings.num_epochs):
        total, done = torch.zeros((), device=device), 0
        draw = partial(draws, settings.seed, 0, epoch)
        torch.manual_seed(int(draw("dropout").integers(2**63)))  # for networks that have some
        for batch in epoch_batches(cache, np.arange(len(labels)), labels, settings, draw, device):
            rate = learning_rate(settings, epoch + (done + len(batch.targets) / 2) / len(labels))
            for group, factor in zip(optimizer.param_groups, (1, PROXY_RATE), strict=True):
                group["lr"] = factor * rate
            pixels = prepare(batch, *statistics)
            total += len(pixels) * student_step(state, compute, pixels, batch.targets, loss_of)
            done += len(pixels)
        loss = total.item() / len(labels)
        print(f"epoch {epoch}: loss {loss:.4f}", flush=True)
        if not math.isfinite(loss):
            raise RunError(f"epoch {epoch}: the loss is not finite; {compute.overflow_remedy()}")
    return network


# ------------------------------------------------------------------------------------------------ the script


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.rivals", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    add("--loss", choices=LOSSES, required=True, help="of pytorch-metric-learning")
    add("--num_epochs", type=natural_number, required=True, metavar="E", help="epochs")
    add("--schedule", choices=("steps", "onecycle"), default="steps", help="as of train.py (default: steps)")
    add("--lr", type=positive_float, help="learning rate of the network (default: the run's)")
    add("--seed", type=seed_number, default=0, metavar="S", help="start of all random draws (default: 0)")
    add("--weights", metavar="W", help="the run's initial weights, where they came from a file")
    add("--data_path", type=Path, metavar="DIR", help="data sets (default: as in training)")
    add("--device", default="auto", help=DEVICE_HELP)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    set_up_device(device, deterministic=False)
    trained = read_run(args.folder)
    of_run = trained.settings
    cache = trained.read_cache(trained.data_path(args.data_path))
    weights = initial_weights(of_run, args.weights)
    changes = {"num_epochs": args.num_epochs, "schedule": args.schedule, "seed": args.seed, "lr": args.lr or of_run.lr}
    settings, compute = replace(of_run, **changes), Compute(device, of_run.precision)
    print(f"{hardware(device)}; {of_run.data_name}, {args.loss}")
    start = time.perf_counter()
    network = train_rival(trained, cache, settings, args.loss, weights, compute)
    row = {"loss": args.loss} | changes | {"seconds": time.perf_counter() - start}
    rows = extract_features(network, cache.array("test_images"), trained.statistics(device), 256, "pooled")
    row["R@1"], row["mAP@R"], _ = score([unit_blocks(rows, 1)], trained.split, [1])[0]
    path = trained.folder / "rivals.csv"
    add_row(path, row)
    print(f"R@1 {row['R@1']:.2f}, mAP@R {row['mAP@R']:.2f}; a row more in {path}")


def main(argv: list[str] | None = None) -> int:
    return run_main(
        "benchmarks.rivals",
        lambda: run(parse_args(argv)),
        "a smaller --image_size, or another backbone, of the run",
        False,
    )


if __name__ == "__main__":
    sys.exit(main())
