"""dreml/run_writer.py: what a run folder holds, when it is refused, its logs and locks."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors
import torch
from builders import copy_run, digests, edit_record, flip_a_bit, only_folder, train_tiny
from reference import slow_recall
from torch import nn

import train
from dreml import files
from dreml import run_writer as writer
from dreml.files import take_lock
from dreml.runs import MemberRecord, Members, TestSplit, read_run_record

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------ what is written


def test_run_folder(tiny_run, tiny_data, tiny_cache):
    assert tiny_run.name == "tiny_resnet18_D3_e2_s0_i32_b16_lr0.001_wnone_fp32"
    names = {"args.json", "baseline.csv", "baseline.json", "recall.csv", "test.csv", "train.csv"}
    names |= {f"member_00{member}.{suffix}" for member in (1, 2) for suffix in ("json", "npy", "safetensors")}
    assert {path.name for path in tiny_run.iterdir() if not path.name.endswith(".lock")} == names

    record = json.loads((tiny_run / "args.json").read_text())
    assert record["options"]["ensemble_size"] == 2 and record["settings"]["lr"] == 1e-3 and record["format"] == 3
    assert record["data"]["fingerprint"] == tiny_cache.fingerprint
    assert record["data"]["mean"] == tiny_cache.meta.mean and record["data"]["std"] == tiny_cache.meta.std
    assert record["data"]["counts"]["train"] == {"classes": 6, "images": 36}
    assert record["environment"]["torch"] == torch.__version__

    test = pd.read_csv(tiny_run / "test.csv")
    assert list(test.columns[:4]) == ["path", "label", "is_query", "is_gallery"]
    assert test.label.tolist() == tiny_cache.array("test_labels").tolist() and test.is_query.all()
    assert all((tiny_data / "tiny" / path).is_file() for path in test.path)

    for member in (1, 2):
        finished = json.loads((tiny_run / f"member_00{member}.json").read_text())
        hashes = digests(tiny_run, f"member_00{member}.[ns]*")
        assert finished["sha256"] == hashes and finished["member"] == member
        assert np.load(tiny_run / f"member_00{member}.npy").dtype == np.float32


def test_train_log(tiny_run):
    log = pd.read_csv(tiny_run / "train.csv")
    assert ",".join(log.columns) == "member,epoch,loss,accuracy,lr,seconds,images_per_second"
    assert log[["member", "epoch"]].values.tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    np.testing.assert_allclose(log.lr, [1e-3, 1e-5, 1e-3, 1e-5])
    history = json.loads((tiny_run / "member_002.json").read_text())["history"]
    assert log.accuracy[3] == pytest.approx(100 * history[1]["correct"] / 36, abs=1e-4)
    assert log.loss.between(0.1, 3).all() and (log.images_per_second > 0).all()


def test_recall_log_equals_the_definition(tiny_run):
    """From the files alone, by the slow implementation."""
    labels = pd.read_csv(tiny_run / "test.csv").label.to_numpy()
    members = [np.load(tiny_run / f"member_00{member}.npy") for member in (1, 2)]
    expected = 100 * slow_recall(members, labels, [1, 4])
    lines = (tiny_run / "recall.csv").read_text().splitlines()
    assert lines[0] == "ensemble_size,R@1,R@4"
    assert lines[1:] == [f"{size},{r1:.4f},{r4:.4f}" for size, (r1, r4) in enumerate(expected, 1)]
    assert 20 < expected[1, 0] < 100  # chance is 14 %


def test_a_member_is_finished_by_its_last_file(tmp_path, monkeypatch):
    """Its record, with the checksums of the others, follows the weights and the embedding."""
    written, replace_file = [], os.replace

    def spy(source, target):
        written.append(Path(target).name)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", spy)
    record = MemberRecord(1, "r", best_epoch=0, history=[], partition=[0, 1], environment={}, sha256={})
    model = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
    writer.save_member(tmp_path, record, model, torch.tensor([[1.0, 2.0]]), {"settings": {"lr": 0.1}, "mean": [0.5]})
    assert written == ["member_001.safetensors", "member_001.npy", "member_001.json"]
    members = Members(tmp_path, "r")
    members.refresh()
    assert members.records == {1: record} and record.sha256 == digests(tmp_path, "*.[ns]*")
    assert members.embeddings(1, "logits", CPU)[0].tolist() == [[1, 2]]
    with safetensors.safe_open(tmp_path / "member_001.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["dreml"]) == {"settings": {"lr": 0.1}, "mean": [0.5]}
        assert all(torch.equal(file.get_tensor(name), value) for name, value in model.state_dict().items())
    del written[:]
    writer.save_pooled(tmp_path, record, torch.tensor([[3.0]]))
    assert written == ["pooled_001.npy", "pooled_001.json"]
    assert members.embeddings(1, "pooled", CPU)[0].tolist() == [[3]]


def test_one_process_at_a_time_writes_the_logs(small_run, tmp_path, monkeypatch):
    """Its lock lies outside, and is held from before the embeddings are read until the logs are written."""
    folder = copy_run(small_run, tmp_path / "run")

    def recalls(embeddings, split, ks):
        assert take_lock(tmp_path / ".run.lock", timeout=0) is None
        return np.array([[7.0]])

    monkeypatch.setattr(writer, "recall_percent", recalls)
    members = Members(folder, read_run_record(folder).settings_hash)
    split = TestSplit(torch.arange(36) // 6, torch.ones(36).bool(), torch.ones(36).bool())
    writer.update_logs(members, 2, split, [1], "logits", CPU)
    assert (folder / "recall.csv").read_text() == "ensemble_size,R@1\n1,7.0000\n"
    assert (folder / "train.csv").read_text() == (small_run / "train.csv").read_text()
    with take_lock(tmp_path / ".run.lock", timeout=0):
        pass


def test_the_environment_says_what_a_number_depends_on(monkeypatch):
    """Without git, there is no commit."""
    here = writer.environment(CPU)
    assert (here["torch"], here["numpy"], here["threads"]) == (torch.__version__, np.__version__, 1)
    assert here["device"].startswith("cpu (")
    assert here["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", here["commit"])
    monkeypatch.setenv("PATH", "")
    assert writer.environment(CPU) == here | {"commit": None}


# ------------------------------------------------------------------------------------------------ folders refused


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["settings", "lr"], 0.5, "other settings: lr 0.5, not 0.001"),
        (["settings", "flip"], False, "other settings: flip False, not True"),
        (["data", "fingerprint"], "0", r"your photos have changed since the members in .* were trained: move it away"),
    ],
)
def test_other_settings_under_the_same_name_are_refused(
    tiny_data, small_run, tmp_path, capsys, no_training, keys, value, message
):
    folder = copy_run(small_run, tmp_path / small_run.name)
    edit_record(folder / "args.json", *keys, value=value)
    before = digests(folder)
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "3") == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert digests(folder) == before


def test_only_what_cannot_be_written_blames_the_results_folder(
    tiny_data, small_run, tmp_path, capsys, no_training, monkeypatch
):
    """A lock that cannot be taken does; a cache that cannot be read does not."""
    copy_run(small_run, tmp_path / small_run.name)

    def unreadable(cache):
        raise OSError(5, "Input/output error", "train_pixels.npy")

    with monkeypatch.context() as patch:
        patch.setattr(train, "verify_cache", unreadable)
        assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "3") == 1
    message = "train.py: failed: [Errno 5] Input/output error: 'train_pixels.npy'\n"
    assert capsys.readouterr().err == message
    lock = tmp_path / f".{small_run.name}.lock"
    lock.unlink()
    lock.mkdir()
    assert train_tiny(tiny_data, tmp_path) == 2
    error = capsys.readouterr().err
    assert str(lock) in error and error.endswith("; --results_path names another folder\n") and error.count("\n") == 1


def test_leftovers_of_finished_members_are_removed(tiny_data, small_run, tmp_path, no_training):
    """Of a process that was killed before it could."""
    folder = copy_run(small_run, tmp_path / small_run.name)
    gone = ["progress_001.pt", ".progress_002.pt.tmp-123", ".args.json.tmp-1", ".recall.csv.tmp-1"]
    gone += [".baseline.json.tmp-1"]
    for name in [*gone, "progress_003.pt"]:
        (folder / name).write_bytes(b"x")
    assert train_tiny(tiny_data, tmp_path) == 0
    assert not [name for name in gone if (folder / name).exists()] and (folder / "progress_003.pt").exists()


def test_a_full_disk_costs_the_member_but_no_file(tiny_data, small_run, tmp_path, capsys, monkeypatch):
    folder = copy_run(small_run, tmp_path / small_run.name)
    before = digests(folder, "member_*")

    def full(file):
        if "member" in file.name:
            raise OSError(28, "No space left on device", file.name)

    monkeypatch.setattr(files, "flush_to_disk", full)
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "3") == 1
    error = capsys.readouterr().err
    assert "train.py: failed: [Errno 28] No space left on device" in error and error.count("\n") == 1
    assert digests(folder, "*member_*[!k]") == before


# ------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("options", [["--ensemble_size", "3"], ["--embedding", "pooled"]])
def test_a_damaged_cache_is_found_before_its_pixels_are_read(tiny_data, small_run, tmp_path, capsys, options):
    """Where nothing is to be trained or embedded, no pixels are read."""
    data, results = tmp_path / "data", tmp_path / "results"
    copy_run(small_run, results / small_run.name)
    shutil.copytree(tiny_data, data)
    flip_a_bit(data / "tiny" / "cache_32" / "test_images.npy")
    assert train_tiny(data, results, *options) == 2
    error = capsys.readouterr().err
    assert re.search(r"damaged: test_images; make it again with: python data_utils\.py .*--force\n$", error)
    assert digests(only_folder(results)) == digests(small_run) and train_tiny(data, results) == 0


def test_a_lost_run_record_is_made_again(tiny_data, small_run, tmp_path, capsys, no_training, monkeypatch):
    """For members that fit only: others would be overwritten. A damaged one has to be removed by hand."""
    folder = copy_run(small_run, tmp_path / small_run.name)
    monkeypatch.setattr(train, "print_near_copies", None)  # it reads all test images: only after a training
    path = folder / "args.json"
    path.write_text(path.read_text().replace('"flip": true', '"flip": false'))
    assert train_tiny(tiny_data, tmp_path) == 2
    assert "args.json is damaged" in capsys.readouterr().err
    path.unlink()
    assert train_tiny(tiny_data, tmp_path) == 0
    assert read_run_record(folder).settings == read_run_record(small_run).settings

    path.unlink()
    for member in (1, 2):
        edit_record(folder / f"member_00{member}.json", "settings_hash", value="another")
    before = digests(folder)
    assert train_tiny(tiny_data, tmp_path) == 2
    assert "has no args.json, and no sound member of these settings: move it away" in capsys.readouterr().err
    assert digests(folder) == before


def test_a_member_without_its_embedding_is_not_trained_again(tiny_data, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_member", None)
    folder = copy_run(small_run, tmp_path / small_run.name)
    (folder / "member_001.npy").unlink()
    (folder / "member_002.npy").write_bytes(b"damaged")
    assert train_tiny(tiny_data, tmp_path) == 0
    assert digests(folder, "member_*") == digests(small_run, "member_*")
