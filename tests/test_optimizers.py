"""dreml/optimizers.py: the optimizers and their learning rate. Their steps: test_train.py."""

import numpy as np
import pytest
import torch
from torch import nn

from dreml.optimizers import learning_rate, make_optimizer
from dreml.runs.settings import Settings


@pytest.mark.parametrize(
    ("optimizer", "tenths"),
    [
        ("adam", [0]),
        ("adam", [0, 2]),
        ("adam", [0, 1, 2]),
        ("adam", [0] * 6 + [1] * 2 + [2] * 4),
        ("adam", [0] * 10 + [1] * 4 + [2] * 6),
        ("adam", [0] * 25 + [1] * 10 + [2] * 15),
        ("sgd", [0]),
        ("sgd", [0, 1, 2]),
        ("sgd", [0] * 6 + [1] * 3 + [2] * 3),
        ("sgd", [0] * 10 + [1] * 6 + [2] * 4),
    ],
)
def test_learning_rate(optimizer, tenths):
    settings = Settings(optimizer=optimizer, lr=0.5, num_epochs=len(tenths))
    rates = [learning_rate(settings, epoch) for epoch in range(len(tenths))]
    np.testing.assert_allclose(rates, [0.5 * 10.0**-tenth for tenth in tenths])


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_the_optimizer_is_one_kernel(name, kind):
    for device, fused in (("cpu", True), ("cuda", True), ("mps", False)):
        optimizer = make_optimizer(name, nn.Linear(2, 2), 0.1, torch.device(device))
        assert type(optimizer) is kind and optimizer.defaults["fused"] == fused
        assert optimizer.defaults["weight_decay"] == 0
    with pytest.raises(ValueError, match="no optimizer is called 'adamw'"):
        make_optimizer("adamw", nn.Linear(2, 2), 0.1, torch.device("cpu"))
