"""dreml/optimizers.py: the optimizers and their learning rate. Their steps: test_train.py."""

import numpy as np
import pytest
import torch
from torch import nn

from dreml.optimizers import learning_rate, make_optimizer, with_rates
from dreml.settings import Settings


@pytest.mark.parametrize(
    ("optimizer", "tenths"),
    [
        ("adam", [0, 2]),
        ("adam", [0] * 6 + [1] * 2 + [2] * 4),
        ("adam", [0] * 10 + [1] * 4 + [2] * 6),
        ("sgd", [0]),
        ("sgd", [0, 1, 2]),
        ("sgd", [0] * 10 + [1] * 6 + [2] * 4),
    ],
)
def test_learning_rate(optimizer, tenths):
    settings = Settings(optimizer=optimizer, lr=0.5, num_epochs=len(tenths))
    for within in (0, 0.5, 0.999999):
        rates = [learning_rate(settings, epoch + within) for epoch in range(len(tenths))]
        np.testing.assert_allclose(rates, [0.5 * 10.0**-tenth for tenth in tenths])


def test_one_cycle_goes_up_over_a_fifth_and_down_to_0():
    settings = Settings(schedule="onecycle", lr=0.8, num_epochs=10)
    rates = [learning_rate(settings, epochs) for epochs in (0, 0.5, 1, 2, 4, 6, 9.5, 10)]
    np.testing.assert_allclose(rates, [0, 0.2, 0.4, 0.8, 0.6, 0.4, 0.05, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("onecycle", [0.5, 0.875, 0.6875, 0.5, 0.25, 0.0625]), ("steps", [1.0] * 3 + [0.01] * 3)]
)
def test_each_step_has_the_rate_of_its_middle(schedule, expected):
    """Two epochs of 10 images in batches of 4, 4 and 2, which are passed on as they are."""
    settings = Settings(schedule=schedule, lr=1.0, num_epochs=2)
    optimizer, rates = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=9.0), []
    batches = [(torch.ones(size, 3), torch.zeros(size)) for size in (4, 4, 2)]
    for epoch in range(2):
        for number, batch in enumerate(with_rates(iter(batches), optimizer, settings, epoch, 10)):
            assert batch[0] is batches[number][0] and batch[1] is batches[number][1]
            rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, expected)


def test_sgd_equals_the_definition_of_momentum():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = make_optimizer("sgd", model, 0.1, torch.device("cpu"))
    weight, velocity = model.weight.detach().clone(), torch.zeros(3, 4)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
        velocity = 0.9 * velocity + model.weight.grad
        weight = weight - 0.1 * velocity
        torch.testing.assert_close(model.weight, weight, rtol=1e-5, atol=1e-6)


def test_the_momentum_of_sgd_survives_an_overflow_in_the_first_step():
    """PyTorch's fused SGD would go on from uninitialised memory."""
    model = nn.Linear(2, 2)
    optimizer = make_optimizer("sgd", model, 0.1, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaler.scale(model(torch.full((1, 2), 8.0)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert [state["momentum_buffer"].any().item() for state in optimizer.state.values()] == [False, False]


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_the_optimizer_is_one_kernel(name, kind):
    for device, fused in (("cpu", True), ("cuda", True), ("mps", False)):
        optimizer = make_optimizer(name, nn.Linear(2, 2), 0.1, torch.device(device))
        assert type(optimizer) is kind and optimizer.defaults["fused"] == fused
        assert optimizer.defaults["weight_decay"] == 0
