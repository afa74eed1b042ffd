"""R@1 and mAP@R of Proxy-Anchor on the classes themselves, with the images, batches and rates of train.py.

    python -m benchmarks.rival --data_name omniglot --image_size 32 --weights none --no_flip --num_epochs 64 --mixup

It takes train.py's options that define a run. Proxies learn at 100 times the network's rate (Kim et al., CVPR 2020);
the loss's numbers are the defaults of pytorch-metric-learning. Of a mixed image, each class counts by its share. The
embedding is the pooled feature after the last epoch.
"""

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model
from dreml.backbones import read_weights
from dreml.batches import epoch_batches, prepare
from dreml.cache import Cache, read_cache
from dreml.cli import DEVICE_HELP, InputError, Parser, pick_device, run_main, set_up_device
from dreml.optimizers import learning_rate, make_optimizer
from dreml.runs import scored
from dreml.settings import Settings, add_settings, settings_of
from utils import map_at_r, recall_at_k, rng_for

PROXY_RATE = 100  # times the network's learning rate


def proxy_anchor(loss: torch.nn.Module, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Proxy-Anchor loss of rows `(B, d)`. `targets`: classes `(B,)`, or the share of each class `(B, num_classes)`.

    The sums over images weight each by its shares.
    """
    shares = F.one_hot(targets, len(loss.proxies)).float() if targets.ndim == 1 else targets
    cosines = F.normalize(rows, dim=1) @ F.normalize(loss.proxies, dim=1).T
    zeros = torch.zeros_like(cosines[:1])  # the 1 in log(1 + sum of exponentials)
    attracted = torch.cat([zeros, loss.alpha * (loss.margin - cosines) + shares.log()])
    repelled = torch.cat([zeros, loss.alpha * (loss.margin + cosines) + (1 - shares).log()])
    num_present = (shares.sum(0) > 0).sum()
    return torch.logsumexp(attracted, 0).sum() / num_present + torch.logsumexp(repelled, 0).mean()


def train_rival(cache: Cache, settings: Settings, weights: str, compute: model.Compute) -> torch.nn.Module:
    """Train a network on the classes of the data set for `settings.num_epochs` and return it."""
    try:
        from pytorch_metric_learning.losses import ProxyAnchorLoss
    except ImportError:
        raise InputError("the loss is in another package: pip install pytorch-metric-learning") from None
    device = compute.device
    labels = cache.array("train_labels")
    num_classes = cache.counts["train"][0]
    settings = replace(settings, meta_class_size=num_classes)
    statistics = model.channel_statistics(cache.meta, device)
    torch.manual_seed(int(rng_for(settings.seed, 1, 0, "weights").integers(2**63)))
    network = model.build_model(settings.backbone, 2, read_weights(settings.backbone, weights)).to(device)
    loss = ProxyAnchorLoss(num_classes, model.head_of(network).in_features).to(device)
    optimizer = make_optimizer(settings.optimizer, network, settings.lr, device)
    optimizer.add_param_group({"params": loss.parameters()})
    state = model.TrainState(network.train(), optimizer, compute.grad_scaler())
    for epoch in range(settings.num_epochs):
        draw = partial(rng_for, settings.seed, 1, epoch)
        total = torch.zeros((), device=device)
        done = 0
        for batch in epoch_batches(cache, np.arange(len(labels)), labels, settings, draw, device):
            rate = learning_rate(settings, epoch + (done + len(batch.images) / 2) / len(labels))
            for group, factor in zip(optimizer.param_groups, (1, PROXY_RATE), strict=True):
                group["lr"] = factor * rate
            with compute.autocast():
                rows = model.features(network, prepare(batch, *statistics))["pooled"]
            value = proxy_anchor(loss, rows, batch.targets)
            optimizer.zero_grad()
            state.scaler.scale(value).backward()
            state.scaler.step(optimizer)
            state.scaler.update()
            total += value.detach() * len(rows)
            done += len(rows)
        print(f"epoch {epoch}: loss {total.item() / len(labels):.4f}", flush=True)
    return network


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.rival", description=__doc__)
    add_settings(parser.add_argument_group("as of train.py"))
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    device = pick_device(args.device)
    set_up_device(device, deterministic=False)
    cache = read_cache(args.data_path, settings.data_name, settings.image_spec)
    precision = settings.precision if settings.precision != "auto" else model.pick_precision(device, settings.backbone)
    start = time.perf_counter()
    network = train_rival(cache, settings, args.weights, model.Compute(device, precision))
    seconds = time.perf_counter() - start
    statistics = model.channel_statistics(cache.meta, device)
    rows = model.extract_features(network, cache.array("test_images"), statistics, 256)["pooled"]
    test = cache.test_table()
    recall = 100 * scored(recall_at_k, [rows], test, ks=[1]).item()
    precision = 100 * scored(map_at_r, [rows], test)[0].item()
    print(f"R@1 {recall:.2f}, mAP@R {precision:.2f}, {seconds:.0f} s of training")


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.rival", lambda: run(parse_args(argv)), "a smaller --batch_size", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
