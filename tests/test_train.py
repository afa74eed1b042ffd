"""train.py: options, one step, one epoch, one member, the ensemble, pooled features."""

import copy
import json
import re
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from builders import copy_run, digests, only_folder, save_image, table_of, train_tiny
from reference import slow_recall
from safetensors.torch import load_file
from torch import nn

import data_utils
import train
from dreml import cli
from dreml import runs as writer
from dreml.batches import Batch, epoch_batches, input_memory, prepare
from dreml.checkpoint import Progress
from dreml.files import read_record
from dreml.runs import MemberRecord, read_run_record
from dreml.settings import Settings, settings_of
from model import Compute, Head, build_model, extract_features, features_in_batches, load_ensemble
from train import Experiment, TrainState, make_optimizer, train_epoch, train_member, train_step
from utils import capped_images, meta_class_partition, recall_at_k, rng_for

CPU = torch.device("cpu")
FP32 = Compute(CPU)


def experiment_of(cache, settings: Settings, weights=None) -> Experiment:
    return Experiment(cache, settings, weights, FP32, environment={})


def no_scaling() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def test_train_step_equals_a_plain_step():
    """Against the same step written out."""
    torch.manual_seed(0)
    # Small and smooth: in a ReLU network on few images, rounding alone moves gradients visibly.
    layers = [nn.Conv2d(3, 4, 5), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    models = [nn.Sequential(*layers), copy.deepcopy(nn.Sequential(*layers))]
    pixels, targets = torch.randn(8, 3, 32, 32), torch.tensor([0, 2, 1, 1, 0, 2, 0, 1])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    models[0][-1].weight.grad = torch.ones(3, 16)  # of an earlier step: must not count
    found, num_correct = train_step(TrainState(models[0], optimizers[0], no_scaling()), FP32, pixels, targets)

    logits = models[1](pixels)
    loss = -logits.log_softmax(1)[range(8), targets].mean()
    loss.backward()
    optimizers[1].step()
    assert num_correct.item() == (logits.argmax(1) == targets).sum().item()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5) and not found.requires_grad
    for parameter, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_a_step_on_mixed_images_counts_both_targets_by_their_shares():
    """Against cross-entropy with a distribution over the meta-classes; the larger share decides what is correct."""
    torch.manual_seed(0)
    models = [nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    pixels, own, partners = torch.randn(5, 4), torch.tensor([0, 1, 2, 2, 0]), torch.tensor([1, 2, 2, 0, 0])
    shares = torch.tensor([0.9, 0.2, 0.5, 0.4999, 1.0])
    shares_of_all = nn.functional.one_hot(own, 3) * shares[:, None]
    shares_of_all += nn.functional.one_hot(partners, 3) * (1 - shares)[:, None]
    states = [TrainState(m, torch.optim.SGD(m.parameters(), 0.1), no_scaling()) for m in models]
    found, num_correct = train_step(states[0], FP32, pixels, shares_of_all)

    logits = models[1](pixels)
    loss = -(logits.log_softmax(1) * shares_of_all).sum(1).mean()
    loss.backward()
    states[1].optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert num_correct.item() == (logits.argmax(1) == torch.tensor([0, 2, 2, 0, 0])).sum().item()


def test_fp16_gradients_are_scaled_and_an_overflow_skips_the_step():
    """A loss so small that its gradients vanish in fp16 unless they are scaled; then a scale that overflows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Head(4, 2))
    model[3].weight.data = torch.tensor([[1e-7, 0, 0, 0], [0, 0, 0, 1e-7]])
    pixels, targets = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 1])
    gradients = {}
    for scale in (1.0, 2.0**16, 2.0**100):
        trained = copy.deepcopy(model)
        optimizer, scaler = make_optimizer("adam", trained, 0.1, CPU), torch.amp.GradScaler("cpu", init_scale=scale)
        state = TrainState(trained, optimizer, scaler)
        train_step(state, Compute(CPU, "fp16"), pixels, targets)
        gradients[scale] = trained[0].weight.grad.abs().max().item()
        moved = [
            not torch.equal(new.weight, old.weight) for new, old in ((trained[0], model[0]), (trained[3], model[3]))
        ]
        assert moved == {1.0: [False, True], 2.0**16: [True, True], 2.0**100: [False, False]}[scale]
        assert scaler.get_scale() == (scale / 2 if scale == 2.0**100 else scale)
    assert gradients[1.0] == 0


def test_steps_never_wait_for_the_device():
    """The data-less device `meta` refuses .item(), copies to the host and mixed devices.

    It has no fused optimiser and no autocast: both are tested on the CPU.
    """
    meta = torch.device("meta")
    model, compute = build_model("resnet18", 12, None).to(meta), Compute(meta)
    state = TrainState(model, make_optimizer("adam", model, 1e-4, meta), no_scaling())
    images, targets, sides = torch.empty(4, 64, 64, 3, dtype=torch.uint8), torch.zeros(4).long(), torch.ones(4).long()
    statistics = torch.ones(3, device=meta), torch.ones(3, device=meta)
    memory = input_memory(5, 64, meta)
    batches = [Batch(images.to(meta), targets.to(meta), 2, s) for s in (None, sides.to(meta))]
    mixed = {"targets": torch.zeros((4, 12), device=meta), "shares": torch.zeros(4, device=meta)}
    for batch in [*batches, batches[0]._replace(**mixed, partners=targets.to(meta))]:
        loss, num_correct = train_step(state, compute, prepare(batch, *statistics, memory), batch.targets)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert loss.device == num_correct.device == meta
    logits, pooled = extract_features(model, np.zeros((5, 64, 64, 3), np.uint8), statistics, batch_size=2).values()
    assert logits.device == pooled.device == meta and logits.shape == (5, 12)
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


def linear_state() -> TrainState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    return TrainState(model, make_optimizer("adam", model, 0.1, CPU), no_scaling())


def random_batches(sizes=(4, 4, 2)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, 2, 2, generator=generator), torch.arange(n) % 2) for n in sizes]


def test_an_epoch_is_its_steps_and_their_mean(capsys):
    state, stepwise, loss, correct = linear_state(), linear_state(), 0, 0
    state.model.eval()
    for pixels, targets in random_batches():
        mean_loss, num_correct = train_step(stepwise, FP32, pixels, targets)
        loss += len(pixels) * mean_loss.item()
        correct += num_correct.item()
    result = train_epoch(state, FP32, iter(random_batches()), 10, "member 1/2 epoch 3")
    assert state.model.training
    assert all(torch.equal(*pair) for pair in zip(state.model.parameters(), stepwise.model.parameters(), strict=True))
    assert result["loss"] == pytest.approx(loss / 10) and result["images"] == 10
    assert result["correct"] == correct and result["accuracy"] == 10 * correct
    assert result["images_per_second"] == pytest.approx(10 / result["seconds"])
    rate = f"{result['images_per_second']:,.0f} images/s"
    line = f"member 1/2 epoch 3: loss {result['loss']:.4f}, accuracy {result['accuracy']:.2f}%, {rate}\n"
    assert capsys.readouterr() == (line, "")


def test_on_a_terminal_an_epoch_has_a_bar_too(capsys, monkeypatch):
    """With loss and accuracy of the images so far. Without one, as under torchrun, there are lines now and then."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(train, "SECONDS_BETWEEN_READINGS", 0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    train_epoch(linear_state(), FP32, random_batches(), 10, "title")
    loss, num_correct = train_step(linear_state(), FP32, *random_batches()[0])
    readings = [f"accuracy={num_correct.item() / 4:.2%}", f"loss={loss.item():.4f}"]
    *_, bar, blank, end = capsys.readouterr().err.split("\r")
    assert bar.startswith("title: ") and " 8/10 " in bar and all(reading in bar for reading in readings)
    assert blank.strip() == end == ""  # it goes when the epoch is over
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "SECONDS_BETWEEN_LINES", 0)
    train_epoch(linear_state(), FP32, random_batches(), 10, "title")
    output = capsys.readouterr()
    assert output.err == "" and output.out.splitlines()[0] == f"title: 4 of 10 images, loss {loss.item():.4f}"


@pytest.mark.parametrize(("correct", "best"), [([3, 9, 7, 9], 1), ([1, 2, 3, 4], 3), ([0] * 4, 0)])
def test_the_best_epoch_by_training_accuracy_is_kept(
    tiny_cache, tiny_settings, small_network, monkeypatch, correct, best
):
    """With planned numbers of right answers; the weights of each epoch are marked with its number."""
    settings = replace(tiny_settings, num_epochs=4, batch_size=64)  # one step an epoch
    steps, rates = iter(range(4)), []

    def step(state, compute, pixels, targets):
        epoch = next(steps)
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.model.fc.bias.data.fill_(epoch)
        return torch.zeros(()), torch.tensor(correct[epoch])

    monkeypatch.setattr(train, "train_step", step)
    model, record = train_member(experiment_of(tiny_cache, settings), 1, "title")
    assert record["best_epoch"] == best and model.fc.bias.tolist() == [best] * 3
    assert [row["correct"] for row in record["history"]] == correct
    assert [row["epoch"] for row in record["history"]] == [0, 1, 2, 3]
    assert rates == [row["lr"] for row in record["history"]] == [1e-3, 1e-3, 1e-5, 1e-5]
    for other in ({"schedule": "onecycle"}, {"mixup": True}):  # the last epoch, whatever the accuracy was
        steps = iter(range(4))
        model, record = train_member(experiment_of(tiny_cache, replace(settings, **other)), 1, "title")
        assert record["best_epoch"] == 3 and model.fc.bias.tolist() == [3] * 3
    assert [row["lr"] for row in record["history"]] == rates[-4:]
    assert rates[4:8] == pytest.approx([6.25e-4, 7.81e-4, 4.69e-4, 1.56e-4], rel=1e-2)


def test_the_best_epoch_is_kept_by_a_member_that_goes_on(
    tiny_cache, tiny_settings, small_network, monkeypatch, tmp_path
):
    """It ends in epoch 3, after the best one, 1. The file of epoch 2 has the weights of both."""
    settings = replace(tiny_settings, num_epochs=4, batch_size=64)
    experiment = experiment_of(tiny_cache, settings)
    epochs = iter([0, 1, 2, KeyboardInterrupt, 3])

    def step(state, compute, pixels, targets):
        epoch = next(epochs)
        if epoch is KeyboardInterrupt:
            raise epoch
        state.model.fc.bias.data.fill_(epoch)
        return torch.zeros(()), torch.tensor([3, 9, 7, 5][epoch])

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        train_member(experiment, 1, "title", Progress(tmp_path, 1, "hash", 0))
    model, record = train_member(experiment, 1, "title", Progress(tmp_path, 1, "hash", 0))
    assert record["best_epoch"] == 1 and model.fc.bias.tolist() == [1] * 3 and not next(epochs, None)


def test_a_member_learns_the_meta_classes_of_its_images(tiny_cache, tiny_settings, small_network, monkeypatch):
    """By its partition, in each epoch's windows and mirror images, without those left out of large classes."""
    steps = []

    def step(state, compute, pixels, targets):
        steps.append((pixels.clone(), targets))  # the next batch overwrites them
        return torch.zeros(()), torch.tensor(0)

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "MAX_IMAGES_PER_CLASS", 4)
    settings, labels = replace(tiny_settings, seed=3), tiny_cache.array("train_labels")
    experiment = experiment_of(tiny_cache, settings)
    partition = np.array(train_member(experiment, 5, "title")[1]["partition"])
    assert partition.tolist() == meta_class_partition(6, 3, rng_for(3, 5, 0, "partition")).tolist()
    images, expected = capped_images(labels, 4, rng_for(3, 5, 0, "cut")), []
    for epoch in (0, 1):
        draw = partial(rng_for, 3, 5, epoch)
        for batch in epoch_batches(tiny_cache, images, np.arange(36), settings, draw, CPU):
            pixels = prepare(batch, torch.tensor(tiny_cache.meta.mean), torch.tensor(tiny_cache.meta.std))
            expected.append((pixels, torch.from_numpy(partition[labels[batch.targets.numpy()]])))
    assert [len(targets) for _, targets in steps] == [16, 8] * 2
    for found, wanted in zip(steps, expected, strict=True):
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_what_is_not_finite_ends_the_run(tiny_data, tmp_path, small_network, capsys, monkeypatch):
    steps = []

    def step(state, compute, pixels, targets):
        steps.append(1)
        return torch.tensor(float("inf") if len(steps) == 2 else 1.0), torch.tensor(0)

    monkeypatch.setattr(train, "train_step", step)
    assert train_tiny(tiny_data, tmp_path) == 1
    message = "member 1/2 epoch 0: the loss is not finite in {}; try a lower --lr, or --precision fp32\n"
    assert capsys.readouterr().err.endswith(message.format("fp32"))
    assert not list(only_folder(tmp_path).glob("member_*"))
    del steps[:]
    assert train_tiny(tiny_data, tmp_path, "--precision", "fp16") == 1
    assert message.format("fp16") in capsys.readouterr().err


@pytest.mark.parametrize("embedding", ["logits", "pooled"])
def test_an_embedding_that_is_not_finite_ends_the_run(tiny_data, small_run, tmp_path, capsys, monkeypatch, embedding):
    """No file of the member is written."""
    embeddings = {"logits": torch.ones(36, 3), "pooled": torch.ones(36, 16)}
    embeddings[embedding][35, 2] = float("inf")
    monkeypatch.setattr(train, "extract_features", lambda *_: embeddings)
    folder = copy_run(small_run, tmp_path / small_run.name)
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "3") == 1
    assert "member 3: its embedding is not finite; try a lower --lr" in capsys.readouterr().err
    assert digests(folder, "member_*") == digests(small_run, "member_*")


def test_method_options_reach_the_training(tiny_data, tmp_path, small_network, seen, monkeypatch):
    """SGD at its own rate, with its own decay; random resize; no mirroring. All of it is another run."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    mirrored, optimizers = [], set()

    def batches(cache, images, targets, settings, draw, device):
        for batch in epoch_batches(cache, images, targets, settings, draw, device):
            mirrored.append(batch.num_mirrored)
            yield batch

    def step(state, compute, pixels, targets):
        optimizers.add(type(state.optimizer))
        return train_step(state, compute, pixels, targets)

    monkeypatch.setattr(train, "epoch_batches", batches)
    monkeypatch.setattr(train, "train_step", step)
    options = "--ensemble_size 1 --num_epochs 5 --optimizer sgd --lr 0.01 --scale_min 0.5 --no_flip".split()
    assert train_tiny(tiny_data, tmp_path, *options) == 0
    folder = only_folder(tmp_path)
    assert folder.name == "tiny_resnet18_D3_e5_s0_i32_b16_sgd_wnone_noflip_scale0.5_fp32"
    settings = json.loads((folder / "args.json").read_text())["settings"]
    given = {"optimizer": "sgd", "lr": 0.01, "scale_min": 0.5, "flip": False}
    assert {name: settings[name] for name in given} == given
    np.testing.assert_allclose(pd.read_csv(folder / "train.csv").lr, [1e-2, 1e-2, 1e-3, 1e-3, 1e-4])
    sides = np.concatenate([sides for _, _, sides in seen])
    assert sides.min() >= 16 and np.bincount(sides)[16:].all() and len(mirrored) == 15 and not any(mirrored)
    assert optimizers == {torch.optim.SGD} and torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("batch_size", "said"),
    [("2", "3 minutes a member, 6 minutes in all"), ("16", "36 seconds a member, 72 seconds in all")],
)
def test_a_run_says_how_long_it_will_take(tiny_data, tmp_path, small_network, capsys, monkeypatch, batch_size, said):
    """Once: after so many steps, or the first epoch if it has fewer. By a clock of seconds, which then leaps."""
    steps = []
    monkeypatch.setattr(train, "TIMED_STEPS", 9)
    monkeypatch.setattr(train, "train_step", lambda *_: steps.append(1) or (torch.zeros(()), torch.tensor(0)))
    monkeypatch.setattr(train.time, "perf_counter", lambda: len(steps) + 100 * (len(steps) > 9))
    options = ["--batch_size", batch_size, "--num_epochs", "10", "--ensemble_size", "3", "--members", "1-2"]
    assert train_tiny(tiny_data, tmp_path, *options) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("about ")]
    assert lines == [f"about {said}"]
    (only_folder(tmp_path) / "member_001.npy").unlink()  # it is only embedded again
    assert train_tiny(tiny_data, tmp_path, *options[:-1], "1-3") == 0
    assert f"about {said.split(',')[0]}\n" in capsys.readouterr().out


def test_threads_and_deterministic_algorithms_are_no_settings(tiny_data, small_run, tmp_path, monkeypatch, no_training):
    """The same run with either; what was chosen last is recorded."""
    chosen = []
    monkeypatch.setattr(cli, "set_up_device", lambda device, *others: chosen.append(others))
    folder = copy_run(small_run, tmp_path / small_run.name)
    for options, expected in ((["--threads", "3", "--deterministic"], (True, 3)), ([], (False, None))):
        assert train_tiny(tiny_data, tmp_path, *options) == 0
        assert chosen.pop() == expected and only_folder(tmp_path) == folder
        assert read_run_record(folder).environment["deterministic"] == expected[0]


def test_every_class_is_its_own_meta_class(tiny_data, tmp_path, small_network):
    """--meta_class_size all: D is the number of classes, in the name, the record and each member's partition."""
    options = ["--meta_class_size", "all", "--mixup", "--num_epochs", "1", "--embedding", "pooled"]
    assert train_tiny(tiny_data, tmp_path, *options) == 0
    folder = only_folder(tmp_path)
    assert folder.name == "tiny_resnet18_D6_e1_s0_i32_b16_lr0.001_wnone_mixup_fp32"
    assert read_run_record(folder).settings.meta_class_size == 6 and read_run_record(folder).settings.mixup
    for member in (1, 2):
        assert sorted(read_record(folder / f"member_00{member}.json")["partition"]) == list(range(6))
    assert load_ensemble(folder).members[0].fc.out_features == 6
    assert train_tiny(tiny_data, tmp_path, *options[2:], "--meta_class_size", "6") == 0  # the same run
    assert only_folder(tmp_path) == folder


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_another_precision(tiny_data, tmp_path, small_network, precision, monkeypatch):
    """Backbone in that precision in training and in embeddings, gradient scaling for fp16 only; all of it recorded."""
    seen, scaling, initial = [], [], train.initial_state

    def state_with_hook(experiment, member):
        state = initial(experiment, member)
        scaling.append(state.scaler.is_enabled())
        state.model.conv1.register_forward_hook(
            lambda module, inputs, output: seen.append((state.model.training, output.dtype))
        )
        return state

    monkeypatch.setattr(train, "initial_state", state_with_hook)
    options = ["--precision", precision, "--ensemble_size", "1"]
    assert train_tiny(tiny_data, tmp_path, *options) == 0
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(seen) == {(True, dtype), (False, torch.float32)} and set(scaling) == {precision == "fp16"}
    folder = only_folder(tmp_path)
    assert folder.name.endswith(f"_wnone_{precision}")
    assert json.loads((folder / "args.json").read_text())["settings"]["precision"] == precision
    assert 10 < pd.read_csv(folder / "recall.csv")["R@1"][0] < 100
    features = torch.from_numpy(np.load(folder / "member_001.pooled.npy"))
    assert features.dtype == torch.float32 and not torch.equal(features.to(dtype).float(), features)


def test_queries_without_a_class_mate_are_counted(tiny_cache, capsys):
    """One that is alone in the gallery, one that is not in it. Not one with a mate; none that is no query."""
    is_query, is_gallery = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 1, 1, 1], bool)
    train.print_exceptions(tiny_cache, table_of(np.array([0, 1, 2, 2, 3]), is_query, is_gallery), training=True)
    out = "3 queries against a gallery of 4 images\nqueries without another image of their class in the gallery: 2;"
    assert capsys.readouterr().out == f"{out} they count as misses\n"


def test_auto_goes_on_in_the_precision_of_the_run(tiny_data, tmp_path, small_network, monkeypatch):
    """Begun on a device that is fast in bf16, gone on with on one that is not."""
    precisions = []

    def step(state, compute, pixels, targets):
        precisions.append(compute.precision)
        return train_step(state, compute, pixels, targets)

    monkeypatch.setattr(train, "train_step", step)
    options = ["--precision", "auto", "--num_epochs", "1", "--ensemble_size"]
    for device_is_fast_in, ensemble_size, results in (("bf16", "1", "a"), ("fp32", "2", "a"), ("fp32", "1", "b")):
        monkeypatch.setattr(train, "pick_precision", lambda device, backbone, found=device_is_fast_in: found)
        assert train_tiny(tiny_data, tmp_path / results, *options, ensemble_size) == 0
    assert precisions == ["bf16"] * 6 + ["fp32"] * 3
    record = read_run_record(only_folder(tmp_path / "b"))
    assert record.settings.precision == "fp32" and record.options["precision"] == "auto"


def test_growing_an_ensemble(tiny_data, small_run, tmp_path, capsys, monkeypatch):
    """One member and then a second are the two members at once; asking for less again only rewrites the log."""
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "1") == 0
    first = digests(only_folder(tmp_path), "member_001.*")
    capsys.readouterr()
    assert train_tiny(tiny_data, tmp_path) == 0
    output = capsys.readouterr().out
    assert "1 of 2 members finished" in output and "larger class" not in output
    assert digests(only_folder(tmp_path), "member_001.*") == first
    for pattern in ("member_*.npy", "recall.csv", "test.csv"):
        assert digests(only_folder(tmp_path), pattern) == digests(small_run, pattern)

    monkeypatch.setattr(train, "train_member", None)  # would fail if called
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "1", "--recalls", "2,1") == 0
    lines = (only_folder(tmp_path) / "recall.csv").read_text().splitlines()
    assert lines[0] == "ensemble_size,R@2,R@1" and len(lines) == 3  # a smaller ensemble does not shorten it
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 member: R@2 ")
    assert pd.read_csv(only_folder(tmp_path) / "train.csv").member.tolist() == [1, 1, 2, 2]  # all that are finished
    assert lines[1].split(",")[2] == (small_run / "recall.csv").read_text().splitlines()[1].split(",")[1]
    capsys.readouterr()
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "4", "--members", "1") == 0
    output = capsys.readouterr().out
    text = "still missing: member 3, 4; the process that finishes the last one scores"
    assert "2 of 4 members finished" in output and output.endswith(f"\n{text}\n")


def test_queries_are_scored_against_the_gallery(shop_data, tmp_path, small_network, capfd):
    """recall.csv and the column `alone` by the slow implementation, from the files alone."""
    options = ["--data_name", "shop", "--num_epochs", "1", "--recalls", "1,2,7"]
    assert train_tiny(shop_data, tmp_path / "results", *options) == 0
    output, folder = capfd.readouterr(), only_folder(tmp_path / "results")
    assert output.out.count("\n9 queries against a gallery of 8 images\n") == 1
    assert "\nqueries without another image of their class in the gallery: 1; they count as misses\n" in output.out
    test = pd.read_csv(folder / "test.csv")
    masks = test.is_query.to_numpy(), test.is_gallery.to_numpy()
    assert [mask.sum() for mask in masks] == [9, 8]
    members = [np.load(folder / f"member_00{member}.npy") for member in (1, 2)]
    expected = 100 * slow_recall(members, test.label.to_numpy(), [1, 2, 7], *masks)
    lines = [",".join([str(size), *(f"{value:.4f}" for value in row)]) for size, row in enumerate(expected, 1)]
    assert (folder / "recall.csv").read_text().splitlines()[1:] == lines
    assert expected[1, 0] != 100 * slow_recall(members, test.label.to_numpy(), [1])[1, 0]
    alone = [100 * slow_recall([member], test.label.to_numpy(), [1], *masks).item() for member in members]
    assert [float(line.split()[-1]) for line in output.out.splitlines()[-4:-2]] == pytest.approx(alone, abs=0.006)


def test_out_of_memory_in_the_evaluation_costs_time_only(tiny_data, small_run, tmp_path, monkeypatch):
    """Batches of 32 and 16 do not fit, nor blocks of 1 GiB and 512 MiB: the same results come of less."""
    sizes = {"batch": [], "block": []}

    def limited(kind, size, largest):
        sizes[kind].append(size)
        if size > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def extract(model, images, statistics, batch_size):
        limited("batch", batch_size, 8)
        return features_in_batches(model, images, statistics, batch_size)

    def recall(embeddings, labels, ks, *, max_bytes, **masks):
        limited("block", max_bytes, 2**28)
        return recall_at_k(embeddings, labels, ks, max_bytes=max_bytes, **masks)

    monkeypatch.setattr("model.features_in_batches", extract)
    monkeypatch.setattr(writer, "recall_at_k", recall)
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "1") == 0
    assert sizes["batch"] == 2 * [32, 16, 8] and sizes["block"][:3] == [2**30, 2**29, 2**28]
    logits = [np.load(folder / "member_001.npy") for folder in (only_folder(tmp_path), small_run)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    first_two = [(folder / "recall.csv").read_text().splitlines()[:2] for folder in (only_folder(tmp_path), small_run)]
    assert first_two[0] == first_two[1]


@pytest.mark.parametrize(("meta_classes", "batch_size"), [(2, 3), (3, 128)])
def test_odd_data_sets_are_trained_on(tmp_path, small_network, meta_classes, batch_size):
    """Images smaller than the crop or 1 pixel wide, one class more than D or as many, batches of one image."""
    sizes = {"ä b": (1, 50), "c,d": (50, 1), "ﬁn": (2, 2)}
    for name, (width, height) in sizes.items():
        save_image(tmp_path / "odd" / "train" / name / "é 1.png", width=width, height=height)
    save_image(tmp_path / "odd" / "train" / "c,d" / "2.png")
    for name in ("x y", "x y/deeper", "ü"):
        save_image(tmp_path / "odd" / "test" / name / "1 ö.png", width=1, height=7)
    save_image(tmp_path / "odd" / "test" / "x y" / "2.png")
    assert data_utils.main(["--data_path", str(tmp_path), "--data_name", "odd", "--image_size", "32"]) == 0
    options = ["--data_name", "odd", "--meta_class_size", str(meta_classes), "--batch_size", str(batch_size)]
    assert train_tiny(tmp_path, tmp_path / "results", *options, "--recalls", "1", "--num_epochs", "1") == 0
    folder = only_folder(tmp_path / "results")
    assert pd.read_csv(folder / "test.csv").class_name.tolist() == ["x y", "x y", "x y/deeper", "ü"]
    table = pd.read_csv(folder / "recall.csv")
    assert len(table) == 2 and table["R@1"].between(0, 50).all()  # two of the four have no other of their class
    assert read_record(folder / "member_001.json", MemberRecord).history[0]["images"] == 4


def test_a_cut_of_large_classes_is_said(tiny_data, tmp_path, small_network, capsys, monkeypatch):
    monkeypatch.setattr(train, "MAX_IMAGES_PER_CLASS", 4)
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "1", "--num_epochs", "1") == 0
    said = "each member trains on a random 4 images of each larger class, and leaves out 12 of 36 images\n"
    assert said in capsys.readouterr().out
    assert json.loads((only_folder(tmp_path) / "member_001.json").read_text())["history"][0]["images"] == 24
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "1", "--num_epochs", "1") == 0
    assert "a random 4" not in capsys.readouterr().out  # nothing was trained


def test_pooled_features(tiny_run, tiny_cache):
    """Against torchvision's own network and transforms with the saved weights."""
    images = torch.from_numpy(np.array(tiny_cache.array("test_images"))).permute(0, 3, 1, 2) / 255
    images = torchvision.transforms.functional.normalize(images, tiny_cache.meta.mean, tiny_cache.meta.std)
    for member in (1, 2):
        model, seen = torchvision.models.resnet18(num_classes=3).eval(), []
        model.load_state_dict(load_file(tiny_run / f"member_00{member}.safetensors"))
        model.avgpool.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.flatten(1)))
        with torch.no_grad():
            model(images)
        pooled = np.load(tiny_run / f"member_00{member}.pooled.npy")
        np.testing.assert_allclose(pooled, seen[0], rtol=1e-4, atol=1e-4)


def test_each_embedding_is_scored_and_not_made_twice(small_run, tiny_data, tmp_path, no_training, capsys, monkeypatch):
    """Neither trained nor embedded; the table and the last line are of the embedding that was asked for."""
    folder = copy_run(small_run, tmp_path / small_run.name)
    monkeypatch.setattr(train, "extract_features", None)  # would fail if called
    cases = [("pooled", "recall_pooled.csv", "pooled.npy"), ("logits", "recall.csv", "npy")]
    for embedding, csv, suffix in cases:
        assert train_tiny(tiny_data, tmp_path, "--embedding", embedding) == 0
        output = capsys.readouterr()
        members = [np.load(folder / f"member_00{member}.{suffix}") for member in (1, 2)]
        recalls = 100 * slow_recall(members, np.arange(36) // 6, [1, 4])
        lines = ["ensemble_size,R@1,R@4", *(f"{n},{r1:.4f},{r4:.4f}" for n, (r1, r4) in enumerate(recalls, 1))]
        assert (folder / csv).read_text().splitlines() == lines
        *_, row, _, last = output.out.splitlines()
        assert last.startswith(f"2 members: R@1 {recalls[1, 0]:.2f}, R@4 {recalls[1, 1]:.2f}, mAP@R ")
        assert last.endswith(f" in {folder / csv}") and output.err == ""
        alone = 100 * slow_recall(members[1:], np.arange(36) // 6, [1]).item()
        assert [float(value) for value in row.split()] == pytest.approx([2, *recalls[1], alone], abs=0.006)
    (folder / "recall_pooled.csv").unlink()
    assert digests(folder, "[!a]*") == digests(small_run, "[!a]*")  # all but args.json


def test_defaults_are_those_of_the_original_command_line():
    args = train.parse_args([])
    assert (args.data_name, args.recalls, args.batch_size, args.num_epochs) == ("car", [1, 2, 4, 8], 128, 12)
    assert (args.ensemble_size, args.meta_class_size, args.weights) == (12, 12, "imagenet")
    assert (settings_of(args).lr, args.progress_seconds) == (1e-4, 30)
    assert train.parse_args("--data_name sop --recalls 1,10,100,1000".split()).recalls == [1, 10, 100, 1000]
    assert train.parse_args("--data_name sop".split()).recalls == [1, 2, 4, 8]
    assert train.parse_args("--data_name isc".split()).recalls == [1, 10, 20, 30]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data_name", "other"],
            r"no such folder; .*python data_utils\.py --data_name other --data_path .* --image_size 32",
        ),
        (["--image_size", "64"], r"no cache: .*--data_name tiny --data_path .* --image_size 64"),
        (["--meta_class_size", "7"], r"--meta_class_size 7 has to be in 2\.\.6"),
        (["--meta_class_size", "every"], "argument --meta_class_size: 'every' is neither a positive integer nor all"),
        (["--recalls", "1,36"], "36 is not below the number of gallery images, 36"),
        (["--batch_size", "1"], "--batch_size 1 has to be at least 2"),
        (["--ensemble_size", "-3"], "--ensemble_size -3 has to be at least 1 and at most 10,000"),
        (["--members", "2,5"], "--members 5 is above --ensemble_size 2"),
        (["--lr", "nan"], "--lr nan has to be above 0"),
        (["--progress_seconds", "-1"], "--progress_seconds -1.0 has to be at least 0"),
        (["--scale_min", "0"], "--scale_min 0.0 has to be above 0 and at most 1"),
        (["--backbone", "resnet19"], "--backbone 'resnet19' is no network of .*near it: resnet1"),
        (["--backbone", "vit_b_32"], "--image_size 32: vit_b_32 cannot take it"),
        (["--weights", "nowhere.pth"], "--weights 'nowhere.pth': no such file"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there; this machine has "),
        (["--threads", "0"], "--threads 0 has to be at least 1"),
        (["--resize", "stretch"], "argument --resize: invalid choice: 'stretch'"),
        (["--resize", "squash"], r"no cache: .*cache_32_squash.* --image_size 32 --resize squash"),
        (["--ensemble", "3"], "unrecognized arguments: --ensemble 3"),
    ],
)
def test_wrong_options_end_at_once_in_one_line(tiny_data, tmp_path, capsys, no_training, options, message):
    assert train_tiny(tiny_data, tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and error.startswith("train.py: ")
    assert not list(tmp_path.iterdir())


def test_unwritable_results_end_at_once(tiny_data, tmp_path, capsys, no_training):
    (tmp_path / "results").write_text("a file, not a folder")
    assert train_tiny(tiny_data, tmp_path / "results") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"train.py: cannot write into {tmp_path / 'results'} (")
    assert error.endswith("; --results_path names another folder\n")
