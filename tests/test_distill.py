"""distill.py: mixing, the loss, one step, the student of a run, kills, photos of one's own, refusals."""

import contextlib
import copy
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from builders import (
    STUDENT,
    STUDENT_TAG,
    SmallNetwork,
    digests,
    edit_record,
    flip_a_bit,
    only_folder,
    refused,
    save_image,
    train_tiny,
)
from faults import EACH_EPOCH, check_same
from processes import wait_until
from reference import slow_recall
from torch import nn

import data_utils
import distill
from distill import (
    Lesson,
    answers_of,
    block_loss,
    draw_pairs,
    learning_rate,
    mix,
    mixed_batches,
    similarity_loss,
    student_step,
    train_student,
)
from dreml.console import InputError, Terminated
from dreml.data.augment import epoch_batches, prepare
from dreml.data.cache import Cache
from dreml.data.images import ImageSpec
from dreml.files import read_record, sha256, take_lock
from dreml.runs.student import StudentRecord, StudentSettings
from dreml.unlabelled import JoinedImages
from model import Compute, Ensemble, TrainState, backbone_weights, load_ensemble, load_student
from utils import draws

CPU = torch.device("cpu")
FP32 = Compute(CPU)


def no_scaling() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def student_folder(run: Path) -> Path:
    """The one student of a run."""
    (folder,) = run.glob("student_*")
    return folder


def copied(run: Path, folder: Path) -> Path:
    """A copy whose files are links: to be replaced, not written to."""
    return Path(shutil.copytree(run, folder, copy_function=os.link))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(student_folder(run) / "weights.pth", weights_only=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """It takes half of the time of a small student; test_curves.py looks at it."""
    monkeypatch.setattr(distill, "save_figure", lambda *_: None)


@pytest.fixture
def lesson(small_run, tiny_cache, tiny_settings) -> Lesson:
    """Two members, in batches of 16, for two epochs."""
    teacher = load_ensemble(small_run)
    settings = StudentSettings("resnet18", 2, num_epochs=2, batch_size=16, precision="fp32", weights="member1")
    weights = backbone_weights(teacher.members[0])
    return Lesson(tiny_settings, settings, teacher, JoinedImages([tiny_cache]), weights, FP32)


# ------------------------------------------------------------------------------------------------ mixing


def test_mixed_images_are_weighted_sums_of_two():
    pixels = torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
    mixed = mix(pixels, torch.tensor([1, 1]), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(mixed[0], 0.25 * pixels[0] + 0.75 * pixels[1])
    torch.testing.assert_close(mixed[1], pixels[1])
    assert mixed.is_contiguous(memory_format=torch.channels_last)  # what the networks compute fastest
    assert torch.equal(pixels.contiguous().ravel(), torch.arange(24.0))  # as they were


def test_every_image_has_a_partner_of_its_batch_and_a_weight():
    """Each is partner once; weights are uniform; epochs differ."""
    pairs = draw_pairs(1003, 200, partial(draws, 0, 0, 5), CPU)
    assert [len(partners) for partners, _ in pairs] == [200] * 5 + [3]
    assert all(sorted(partners.tolist()) == list(range(len(partners))) for partners, _ in pairs)
    weights = torch.cat([weights for _, weights in pairs])
    assert 0 <= weights.min() and weights.max() < 1 and (weights.histc(10, 0, 1) - 100).abs().max() < 40
    assert not torch.equal(pairs[0][0], draw_pairs(1003, 200, partial(draws, 0, 0, 6), CPU)[0][0])


def test_batches_are_the_training_images_mixed_in_pairs(lesson, tiny_cache, tiny_settings):
    """Cropped and mirrored as in train.py, then mixed: against each image by itself."""
    draw, expected = partial(draws, 0, 0, 3), []
    statistics = torch.tensor(tiny_cache.meta.mean), torch.tensor(tiny_cache.meta.std)
    batches = list(epoch_batches(tiny_cache, np.arange(36), np.arange(36), tiny_settings, draw, CPU))
    for batch, (partners, weights) in zip(batches, draw_pairs(36, 16, draw, CPU), strict=True):
        images = prepare(batch, *statistics)
        for image, partner, weight in zip(images, partners, weights, strict=True):
            expected.append(weight * image + (1 - weight) * images[partner])
    found = torch.cat(list(mixed_batches(lesson, draw)))
    assert sorted(torch.cat([batch.targets for batch in batches]).tolist()) == list(range(36))
    torch.testing.assert_close(found, torch.stack(expected))


def test_members_and_student_see_the_same_pixels(lesson, monkeypatch):
    """In every step, and every training image in every epoch."""
    asked, shown = [], []
    monkeypatch.setattr(
        Ensemble, "embed", lambda self, pixels: asked.append(pixels.clone()) or torch.zeros(len(pixels), 6)
    )
    step = distill.student_step

    def watched(state, compute, pixels, answers, loss_of):
        shown.append(pixels.clone())
        return step(state, compute, pixels, answers, loss_of)

    monkeypatch.setattr(distill, "student_step", watched)
    train_student(lesson)
    assert [len(pixels) for pixels in asked] == [16, 16, 4] * 2
    assert all(torch.equal(*pair) for pair in zip(asked, shown, strict=True))


# ------------------------------------------------------------------------------------------------ the loss


def test_the_loss_is_one_minus_the_mean_cosine_of_the_blocks():
    generator = np.random.default_rng(0)
    outputs, members = generator.normal(size=(5, 12)), generator.normal(size=(3, 5, 4))
    cosines = []
    for image in range(5):
        for member in range(3):
            student, answer = outputs[image, 4 * member : 4 * member + 4], members[member, image]
            cosines.append(student @ answer / np.linalg.norm(student) / np.linalg.norm(answer))
    answers = np.concatenate([rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in members], 1) / 3**0.5
    loss = block_loss(torch.from_numpy(outputs), torch.from_numpy(answers), 3)
    assert loss.item() == pytest.approx(1 - np.mean(cosines))


def test_the_loss_of_another_width_compares_the_cosines_of_pairs():
    generator = np.random.default_rng(1)
    outputs, answers = generator.normal(size=(4, 3)), generator.normal(size=(4, 6))
    answers /= np.linalg.norm(answers, axis=1, keepdims=True)
    errors = []
    for one in range(4):
        for other in range(4):
            pair = outputs[one], outputs[other]
            cosine = pair[0] @ pair[1] / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1])
            errors.append((cosine - answers[one] @ answers[other]) ** 2)
    loss = similarity_loss(torch.from_numpy(outputs), torch.from_numpy(answers))
    assert loss.item() == pytest.approx(np.mean(errors))


def test_the_answers_are_the_members_logits_without_a_gradient(lesson):
    """In eval mode, each scaled to length 1 / sqrt(L), side by side."""
    pixels = torch.randn(4, 3, 32, 32)
    answers = answers_of(lesson.teacher, FP32, pixels)
    expected = [F.normalize(member.eval()(pixels), dim=1) / 2**0.5 for member in load_ensemble_members(lesson)]
    torch.testing.assert_close(answers, torch.cat(expected, 1))
    assert not answers.requires_grad and not any(member.training for member in lesson.teacher.modules())


def load_ensemble_members(lesson: Lesson) -> list[nn.Module]:
    return copy.deepcopy(list(lesson.teacher.members))


# ------------------------------------------------------------------------------------------------ one step


def test_a_step_equals_a_plain_step():
    """Against AdamW written out, with its weight decay."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"lr": 0.1, "weight_decay": distill.WEIGHT_DECAY}
    state = TrainState(models[0], torch.optim.AdamW(models[0].parameters(), **options), no_scaling())
    pixels, answers = torch.randn(3, 3, 2, 2), F.normalize(torch.randn(3, 4), dim=1)
    models[0][1].weight.grad = torch.ones(4, 12)  # of an earlier step: must not count
    loss = student_step(state, FP32, pixels, answers, partial(block_loss, num_blocks=1))
    expected = 1 - F.cosine_similarity(models[1](pixels), answers).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item()) and not loss.requires_grad
    for found, before in zip(models[0].parameters(), models[1].parameters(), strict=True):
        wanted = before * (1 - 0.1 * 1e-4) - 0.1 * before.grad / (before.grad.abs() + 1e-8)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_step_never_waits_for_the_device():
    """The data-less device `meta` refuses .item(), copies to the host and mixed devices."""
    meta = torch.device("meta")
    teacher = Ensemble([SmallNetwork(3), SmallNetwork(3)], ImageSpec(32), [0.5] * 3, [0.2] * 3)
    teacher, model, compute = teacher.to(meta).eval(), SmallNetwork(6).to(meta), Compute(meta)
    state = TrainState(model, torch.optim.AdamW(model.parameters()), no_scaling())
    ((partners, weights),) = draw_pairs(4, 4, partial(draws, 0, 0, 0), meta)
    for loss_of in (partial(block_loss, num_blocks=2), similarity_loss):
        pixels = mix(torch.empty(4, 3, 32, 32, device=meta), partners, weights)
        loss = student_step(state, compute, pixels, answers_of(teacher, compute, pixels), loss_of)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


def test_the_learning_rate_rises_and_falls_to_nothing():
    rates = [learning_rate(0.5, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.005) and rates[49] == pytest.approx(0.25 * (1 + math.cos(0.049 * math.pi)) / 2)
    assert rates[500] == pytest.approx(0.25) and rates[999] < 1e-5 and max(rates) < 0.5
    assert rates[:90] == sorted(rates[:90]) and rates[110:] == sorted(rates[110:], reverse=True)
    short = [learning_rate(1.0, step, 20) for step in range(20)]  # the rise takes a quarter of the steps at most
    assert short[4] == pytest.approx((1 + math.cos(math.pi / 5)) / 2) and learning_rate(1.0, 0, 1) == 1


def test_every_step_has_the_rate_of_its_place_in_the_whole(lesson, monkeypatch):
    rates = []

    def step(state, *_):
        rates.append(state.optimizer.param_groups[0]["lr"])
        return torch.zeros(())

    monkeypatch.setattr(distill, "student_step", step)
    _, history = train_student(lesson)
    assert rates == [learning_rate(1e-3, number, 6) for number in range(6)]
    assert [row["lr"] for row in history] == [rates[2], rates[5]] and [row["epoch"] for row in history] == [0, 1]


# ------------------------------------------------------------------------------------------------ the student of a run


def test_a_student_begins_with_the_first_member(small_run, lesson):
    """But for its last layer, which is drawn from the seed."""
    states = [distill.initial_state(replace(lesson, settings=replace(lesson.settings, seed=s))) for s in (0, 1, 0)]
    first = torch.load(small_run / "member_001.pth", weights_only=True)
    for state in states:
        model = state.model.state_dict()
        assert all(torch.equal(model[name], value) for name, value in first.items() if not name.startswith("fc."))
        assert model["fc.weight"].shape == (6, 16)
    heads = [state.model.fc.weight for state in states]
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])


def test_what_a_student_leaves(small_student, capsys):
    """Its embeddings are what `load_student` computes; recall.csv is right; a rerun changes nothing."""
    folder = small_student / f"student_{STUDENT_TAG}"
    names = ["logits.npy", "pooled.npy", "recall.csv", "recall.png", "recall.svg", "student.json", "train.csv"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "weights.pth"]
    record = read_record(folder / "student.json", StudentRecord)
    assert len(record.history) == 3 and record.settings.num_members == 2 and record.photos == {}
    assert record.settings.weights == "member1" and record.settings.precision == "fp32"
    log = pd.read_csv(folder / "train.csv")
    assert log.epoch.tolist() == [0, 1, 2] and (log.teacher_seconds + log.student_seconds < log.seconds).all()
    assert log.loss.iloc[-1] < log.loss.iloc[0]

    table = pd.read_csv(folder / "recall.csv")
    test = pd.read_csv(small_student / "test.csv")
    parts = [[np.load(folder / "logits.npy")], [np.load(folder / "pooled.npy")]]
    parts += [[np.load(small_student / f"{kind}_00{n}.npy") for n in (1, 2)] for kind in ("member", "pooled")]
    expected = np.concatenate([slow_recall(part, test.label.to_numpy(), [1, 2, 4, 8]) for part in parts])
    np.testing.assert_allclose(table.iloc[:, 4:8], 100 * expected, atol=5e-5)
    np.testing.assert_allclose(table.kept, 100 * expected[:, 0] / expected[3, 0], atol=5e-5)
    assert table.model.tolist() == ["student"] * 2 + ["ensemble"] * 4
    assert table.embedding.tolist() == ["logits", "pooled", "logits", "logits", "pooled", "pooled"]
    assert table.ensemble_size.tolist() == [1, 1, 1, 2, 1, 2] and table.dimensions.tolist() == [6, 16, 3, 6, 16, 32]

    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert distill.main([str(small_student), *STUDENT]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"recall.csv"}
    out = capsys.readouterr().out
    assert f"student_{STUDENT_TAG}: is finished; device cpu" in out
    assert f"of the R@1 of 2 members' logits, the student keeps {table.kept[0]:.1f} % (logits) and" in out


def test_ensembles_of_powers_of_two_stand_beside_the_student(small_run, tiny_data, tmp_path, capsys):
    """And the whole one; pooled ones only where they are saved."""
    shutil.copytree(small_run, tmp_path / "results" / small_run.name)
    assert train_tiny(tiny_data, tmp_path / "results", "--ensemble_size", "5") == 0
    options = [str(tmp_path / "results" / small_run.name), *STUDENT, "--num_epochs", "1"]
    assert distill.main(options) == 0
    assert pd.read_csv(student_folder(Path(options[0])) / "recall.csv").ensemble_size.tolist() == [1, 1, 1, 2, 4, 5]
    assert "keeps" in capsys.readouterr().out
    shutil.rmtree(student_folder(Path(options[0])))
    assert distill.main([*options, "--num_members", "3"]) == 0
    assert pd.read_csv(student_folder(Path(options[0])) / "recall.csv").ensemble_size.tolist() == [1, 1, 1, 2, 3]


def test_neither_labels_nor_test_images_are_read_in_training(small_run, tmp_path, monkeypatch):
    guarding, array, train = [], Cache.array, distill.train_student

    def guarded(self, name):
        assert not guarding or name in ("train_pixels", "train_offsets", "train_sizes"), name
        return array(self, name)

    def training(*arguments):
        guarding.append(True)
        result = train(*arguments)
        guarding[:] = []
        return result

    monkeypatch.setattr(Cache, "array", guarded)
    monkeypatch.setattr(distill, "train_student", training)
    run = copied(small_run, tmp_path / "run")
    assert distill.main([str(run), *STUDENT]) == 0 and (student_folder(run) / "logits.npy").exists()


def test_the_start_is_the_first_member_unless_weights_are_given(small_run, tmp_path, monkeypatch):
    run, starts = copied(small_run, tmp_path / "run"), []

    def training(lesson, progress):
        starts.append(lesson.weights)
        raise InputError("training would begin")

    monkeypatch.setattr(distill, "train_student", training)
    monkeypatch.setattr(distill, "read_weights", lambda *arguments: arguments)
    for options in ([], ["--weights", "none"], ["--backbone", "resnet34"]):
        assert distill.main([str(run), *STUDENT, *options]) == 2
    first = torch.load(run / "member_001.pth", weights_only=True)
    assert same(starts[0], {name: value for name, value in first.items() if not name.startswith("fc.")})
    assert starts[1:] == [("resnet18", "none"), ("resnet34", "imagenet")]


def test_a_run_without_test_images_has_a_student_without_recall(small_run, tiny_data, tmp_path, capsys):
    data, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(tiny_data / "tiny" / "train", data / "tiny" / "train")
    assert data_utils.main(["--data_path", str(data), "--data_name", "tiny", "--image_size", "32"]) == 0
    assert train_tiny(data, results) == 0
    run = only_folder(results)
    assert distill.main([str(run), *STUDENT]) == 0
    assert capsys.readouterr().out.endswith("no test images: there is no recall\n")
    assert not (student_folder(run) / "recall.csv").exists() and load_student(run).embedding == "pooled"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions(small_run, tmp_path, precision):
    """The backbone of the student computes in it; what is saved is float32."""
    run = copied(small_run, tmp_path / "run")
    assert distill.main([str(run), *STUDENT, "--precision", precision]) == 0
    assert student_folder(run).name == f"student_{STUDENT_TAG}_{precision}"
    assert weights_of(run)["conv1.weight"].dtype == torch.float32


def test_a_student_of_another_width(small_run, tmp_path):
    """Its logits are one block; pooled features do not depend on it."""
    run = copied(small_run, tmp_path / "run")
    assert distill.main([str(run), *STUDENT, "--dim", "5", "--weights", "none"]) == 0
    folder = student_folder(run)
    assert folder.name == "student_resnet18_L2_e3_s0_d5_b16_wnone"
    for name, width in (("logits", 5), ("pooled", 16)):
        rows = np.load(folder / f"{name}.npy")
        assert rows.shape == (36, width)
        np.testing.assert_allclose((rows**2).sum(1), 1, rtol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run(small_run, tmp_path, monkeypatch, capsys):
    run = copied(small_run, tmp_path / "run")
    monkeypatch.setattr(distill, "student_step", lambda *_: torch.tensor(float("nan")))
    assert distill.main([str(run), *STUDENT]) == 1
    line = "distill.py: failed: epoch 0: the loss is not finite; try a lower --lr\n"
    assert capsys.readouterr().err == line and not (student_folder(run) / "student.json").exists()


def test_the_run_is_locked_while_its_cache_is_compared(small_run, tmp_path, monkeypatch):
    """By any path: a starting train.py removes half-written files there. In the training, others may have the lock."""
    run, held = copied(small_run, tmp_path / "run"), []

    def is_held(*_):
        lock = take_lock(tmp_path / ".run.lock", timeout=0)
        held.append(lock is None)
        with lock or contextlib.nullcontext():
            if len(held) == 2:
                raise InputError("the training would begin")

    monkeypatch.setattr(distill.writer, "verify_once", is_held)
    monkeypatch.setattr(distill, "train_student", is_held)
    (tmp_path / "link").symlink_to(run)
    assert distill.main([str(tmp_path / "link"), *STUDENT]) == 2 and held == [True, False]


# ------------------------------------------------------------------------------------------------ kills and damages


def test_a_student_that_is_killed_is_the_same(processes, small_pooled_run, small_student, tmp_path):
    """Its figures too. tests/slow/test_faults.py kills 20 times."""
    roots = [tmp_path / "killed", tmp_path / "whole"]
    for root, run in zip(roots, (small_pooled_run, small_student), strict=True):
        copied(run, root / "results" / "run")
    command = ["distill.py", "results/run", *STUDENT, *EACH_EPOCH]
    script = processes.start(*command, folder=roots[0])
    wait_until(lambda: bool(list(roots[0].rglob("progress_000.pt"))), script)
    script.process.kill()
    assert script.wait() == -signal.SIGKILL
    assert "goes on after epoch" in processes.run(*command, folder=roots[0]).out
    check_same(*roots)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_training_goes_on_after_the_last_finished_epoch(small_run, tmp_path, monkeypatch, capsys, precision):
    """With AdamW's moments, the rate's place and the scale of fp16, here so large that steps are skipped."""
    scaler, train_epoch, epochs = torch.amp.GradScaler, distill.train_epoch, []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, enabled: scaler(kind, 2.0**124, 2, enabled=enabled))
    command = [*STUDENT, "--precision", precision]

    def stopping(state, lesson, epoch):
        if epoch == 2 and 2 not in epochs:
            epochs.append(2)
            raise Terminated
        epochs.append(epoch)
        return train_epoch(state, lesson, epoch)

    roots = [tmp_path / "straight", tmp_path / "stopped"]
    runs = [copied(small_run, root / "results" / "run") for root in roots]
    assert distill.main([str(runs[0]), *command]) == 0
    monkeypatch.setattr(distill, "train_epoch", stopping)
    capsys.readouterr()
    assert distill.main([str(runs[1]), *command]) == 143
    assert capsys.readouterr().err == "distill.py: terminated in epoch 2; run the same command again to go on\n"
    assert [path.name for path in student_folder(runs[1]).iterdir()] == ["progress_000.pt"]
    assert distill.main([str(runs[1]), *command]) == 0
    assert epochs == [0, 1, 2, 2] and "goes on after epoch 1" in capsys.readouterr().out
    check_same(*roots)


def test_damaged_files_are_made_again(small_student, tmp_path, capsys, monkeypatch):
    """Weights and record by training, an embedding from the weights. recall.csv is written each time."""
    for number, name in enumerate(["weights.pth", "student.json", "logits.npy"]):
        root, expected = tmp_path / str(number), tmp_path / "expected"
        for folder in (root, expected):
            shutil.copytree(small_student, folder / "results" / "run", dirs_exist_ok=True)
        flip_a_bit(root / "results" / "run" / f"student_{STUDENT_TAG}" / name)
        capsys.readouterr()
        trained, train = [], distill.train_student
        with monkeypatch.context() as patch:
            patch.setattr(distill, "train_student", lambda *a, train=train, t=trained: t.append(True) or train(*a))
            assert distill.main([str(root / "results" / "run"), *STUDENT]) == 0
        err = capsys.readouterr().err
        assert bool(trained) == (number < 2) == (f"student_{STUDENT_TAG} counts as not made" in err)
        check_same(root, expected)


def test_a_student_of_other_weights_is_left_alone(small_student, tmp_path, capsys):
    """Member 2 has been trained again and is not the same."""
    run = copied(small_student, tmp_path / small_student.name)
    before = digests(student_folder(run))
    path = run / "member_002.pth"
    state = torch.load(path, weights_only=True)
    path.unlink()
    torch.save(state | {"fc.bias": state["fc.bias"] + 1}, path)
    edit_record(run / "member_002.json", "sha256", path.name, value=sha256(path))
    message = refused(capsys, distill, run, *STUDENT)
    assert "is of other members' weights, or of when --batch_size was 128: move it away" in message
    assert digests(student_folder(run)) == before


def test_a_cache_that_changes_during_the_training_leaves_no_student(
    small_run, tiny_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        distill, "check_unchanged", failing := lambda cache: (_ for _ in ()).throw(distill.RunError("x"))
    )
    run = copied(small_run, tmp_path / "run")
    assert failing and distill.main([str(run), *STUDENT]) == 1
    assert not (student_folder(run) / "weights.pth").exists()


# ------------------------------------------------------------------------------------------------ photos of one's own


@pytest.fixture
def photos(tmp_path) -> Path:
    """Five different photos in two folders; one of them twice; and one that cannot be read."""
    for number in range(5):
        save_image(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", 100 + number, width=50, height=44)
    shutil.copy(tmp_path / "photos" / "a" / "0.png", tmp_path / "photos" / "b" / "again.png")
    (tmp_path / "photos" / "b" / "bad.png").write_text("no image")
    return tmp_path / "photos"


def test_photos_of_ones_own_are_seen_and_recorded(threads, small_run, tmp_path, photos, capsys, monkeypatch):
    """In a student of its own, whatever the folders' order; each content once, without the bad one."""
    run, images, train = copied(small_run, tmp_path / "run"), [], distill.train_student

    def training(lesson, progress):
        images.append(len(lesson.images))
        assert (student_folder(run) / "photos" / "train_pixels.npy").exists()
        return train(lesson, progress)

    monkeypatch.setattr(distill, "train_student", training)
    options = [str(run), *STUDENT, "--images", str(photos / "a"), str(photos / "b")]
    assert distill.main(options) == 0
    assert "1 images cannot be used:\n" in (err := capsys.readouterr().err) and "bad.png" in err
    folder = student_folder(run)
    record = read_record(folder / "student.json", StudentRecord)
    assert record.photos == {"folders": [str(photos / "a"), str(photos / "b")], "images": 5} and images == [36 + 5]
    assert re.fullmatch(rf"student_{STUDENT_TAG}_photos{record.settings.photos[:8]}", folder.name)
    assert not (folder / "photos").exists()
    shutil.move(photos, tmp_path / "elsewhere")
    assert distill.main([str(run), *STUDENT, "--images", str(tmp_path / "elsewhere")]) == 0
    assert len(images) == 1 and "is finished" in capsys.readouterr().out  # the same photos: nothing to train
    without = copied(small_run, tmp_path / "without")
    monkeypatch.setattr(distill, "train_student", train)
    assert distill.main([str(without), *STUDENT]) == 0
    assert not same(weights_of(run), weights_of(without))


def test_test_images_are_no_photos_of_ones_own(small_run, tiny_data, tmp_path, photos, capsys):
    """By any path that leads to them."""
    run = copied(small_run, tmp_path / "run")
    (tmp_path / "link").symlink_to(tiny_data / "tiny" / "test" / "character_006")
    message = refused(capsys, distill, run, *STUDENT, "--images", photos, tmp_path / "link")
    assert "--images: 6 of the images are test images of this run, such as " in message
    assert not list(run.glob("student_*"))


def test_a_refusal_leaves_no_pixels_of_photos(threads, small_run, tmp_path, photos, capsys, monkeypatch):
    """Nor does any other end. Photos are decoded before the members are loaded."""
    run = copied(small_run, tmp_path / "run")

    def load(*_, **__):
        assert (student_folder(run) / "photos" / "train_pixels.npy").exists()
        raise InputError("member 1 is damaged")

    monkeypatch.setattr(distill, "load_ensemble", load)
    assert "member 1 is damaged" in refused(capsys, distill, run, *STUDENT, "--images", photos / "a")
    assert not list(run.glob("student_*"))
    for number, file in enumerate([*photos.glob("a/*"), *photos.glob("b/*")]):
        file.write_bytes(file.read_bytes()[:200] + bytes([number]))
    monkeypatch.setattr(distill, "load_ensemble", lambda *_, **__: pytest.fail("the members are loaded"))
    assert distill.main([str(run), *STUDENT, "--images", str(photos)]) == 2
    assert capsys.readouterr().err.endswith("\ndistill.py: --images: no image is left\n")
    assert not list(run.glob("student_*"))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "1"], "--batch_size has to be at least 2: images are mixed in pairs"),
        (["--num_members", "3"], "--num_members 3: "),
        (["--backbone", "resnet19"], "is no network of torchvision"),
        (["--backbone", "resnet34", "--weights", "member1"], "--weights member1 is a resnet18, not a resnet34"),
        (["--weights", "nowhere"], "--weights 'nowhere': no such file"),
        (["--dim", "-1"], "argument --dim: '-1' is not a positive integer"),
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--data_path", "nowhere"], "no such folder"),
    ],
)
def test_options_are_refused_in_one_line(small_run, tmp_path, capsys, options, message):
    run = copied(small_run, tmp_path / "run")
    assert message in refused(capsys, distill, run, *STUDENT, *options)
    assert not list(run.glob("student_*"))


def test_another_data_set_of_the_same_name_is_refused(small_run, tiny_data, tmp_path, capsys):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data", copy_function=os.link))
    edit_record(data / "tiny" / "cache_32" / "meta.json", "mean", value=[0.1, 0.2, 0.3])
    run = copied(small_run, tmp_path / "run")
    message = refused(capsys, distill, run, *STUDENT, "--data_path", data)
    assert "is not the cache of this run" in message and not list(run.glob("student_*"))
