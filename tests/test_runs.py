"""dreml/runs.py: what a run folder holds and when it is refused; finished and damaged members; reading a run."""

import csv
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors
import torch
from builders import (
    CLASS_NAMES,
    copy_run,
    digests,
    edit_record,
    flip_a_bit,
    random_embeddings,
    table_of,
    train_tiny,
    write_run,
)
from torch import nn

import train
from dreml import files, runs
from dreml.cli import InputError
from dreml.files import json_sha256, read_record, take_lock, write_record
from dreml.runs import WEIGHTS, MemberRecord, Members, Run, read_run, read_run_record
from dreml.settings import Settings
from model import load_ensemble

CPU = torch.device("cpu")


def members_of(folder: Path) -> Members:
    return Members(folder, read_run_record(folder).settings_hash)


def opened(folder: Path, num_members: int | None = None, embedding: str = "logits") -> Run:
    return read_run(folder, num_members, embedding)


# ------------------------------------------------------------------------------------------------ what is written


def test_run_folder(tiny_run, tiny_data, tiny_cache):
    assert tiny_run.name == "tiny_resnet18_D3_e2_s0_i32_b16_lr0.001_wnone_fp32"
    names = {"args.json", "baseline.csv", "recall.csv", "test.csv", "train.csv"}
    names |= {
        f"member_00{member}.{suffix}" for member in (1, 2) for suffix in ("json", "npy", "pooled.npy", "safetensors")
    }
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
        hashes = digests(tiny_run, f"member_00{member}.[nps]*")
        assert finished["sha256"] == hashes and finished["member"] == member
        for suffix, width in (("npy", 3), ("pooled.npy", 512)):
            rows = np.load(tiny_run / f"member_00{member}.{suffix}")
            assert rows.dtype == np.float32 and rows.shape == (36, width)


def test_train_log(tiny_run):
    log = pd.read_csv(tiny_run / "train.csv")
    assert ",".join(log.columns) == "member,epoch,loss,accuracy,lr,seconds,images_per_second"
    assert log[["member", "epoch"]].values.tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    np.testing.assert_allclose(log.lr, [1e-3, 1e-5, 1e-3, 1e-5])
    history = json.loads((tiny_run / "member_002.json").read_text())["history"]
    assert log.accuracy[3] == pytest.approx(100 * history[1]["correct"] / 36, abs=1e-4)
    assert log.loss.between(0.1, 3).all() and (log.images_per_second > 0).all()


def test_a_member_is_finished_by_its_last_file(tmp_path, monkeypatch):
    """Its record, with the checksums of the others, follows the weights and the embeddings."""
    written, replace_file = [], os.replace

    def spy(source, target):
        written.append(Path(target).name)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", spy)
    record = MemberRecord(1, "r", best_epoch=0, history=[], partition=[0, 1], environment={}, sha256={})
    model = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
    metadata = {"settings": {"lr": 0.1}, "mean": [0.5]}
    embeddings = {"pooled": torch.tensor([[3.0]]), "logits": torch.tensor([[1.0, 2.0]])}
    runs.save_member(tmp_path, record, model, metadata, embeddings)
    assert written == [f"member_001.{suffix}" for suffix in ("safetensors", "npy", "pooled.npy", "json")]
    members = Members(tmp_path, "r")
    members.refresh()
    assert members.records == {1: record} and record.sha256 == digests(tmp_path, "*.[nps]*")
    for name, rows in embeddings.items():
        assert torch.equal(runs.load_embeddings(tmp_path, 1, name, CPU)[0], rows)
    with safetensors.safe_open(tmp_path / "member_001.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["dreml"]) == metadata
        assert all(torch.equal(file.get_tensor(name), value) for name, value in model.state_dict().items())


def test_one_process_at_a_time_writes_the_logs(small_run, tmp_path, monkeypatch):
    """Its lock lies outside, and is held from before the embeddings are read until the logs are written."""
    folder = copy_run(small_run, tmp_path / "run")

    def recalls(embeddings, test, ks):
        assert take_lock(tmp_path / ".run.lock", timeout=0) is None
        return np.array([[7.0]])

    monkeypatch.setattr(runs, "recall_percent", recalls)
    members = members_of(folder)
    runs.update_logs(members, 2, table_of(np.arange(36) // 6), [1], "logits", CPU)
    assert (folder / "recall.csv").read_text() == "ensemble_size,R@1\n1,7.0000\n"
    assert (folder / "train.csv").read_text() == (small_run / "train.csv").read_text()
    with take_lock(tmp_path / ".run.lock", timeout=0):
        pass


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
    """Not a cache that cannot be read."""
    copy_run(small_run, tmp_path / small_run.name)

    def unreadable(cache):
        raise OSError(5, "Input/output error", "train_pixels.npy")

    monkeypatch.setattr(train, "verify_cache", unreadable)
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "3") == 1
    assert capsys.readouterr().err == "train.py: failed: [Errno 5] Input/output error: 'train_pixels.npy'\n"


def test_leftovers_of_finished_members_are_removed(tiny_data, small_run, tmp_path, no_training):
    """Of a process that was killed before it could."""
    folder = copy_run(small_run, tmp_path / small_run.name)
    gone = ["progress_001.pt", ".progress_002.pt.tmp-123", ".args.json.tmp-1", ".recall.csv.tmp-1"]
    gone += [".baseline.csv.tmp-1"]
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


def test_a_damaged_cache_is_found_before_its_pixels_are_read(tiny_data, small_run, tmp_path, capsys, no_training):
    """Where nothing is to be trained or embedded, no pixels are read."""
    data, results = tmp_path / "data", tmp_path / "results"
    folder = copy_run(small_run, results / small_run.name)
    shutil.copytree(tiny_data, data)
    flip_a_bit(data / "tiny" / "cache_32" / "test_images.npy")
    error = r"damaged: test_images; make it again with: python data_utils\.py .*--force\n$"
    assert train_tiny(data, results, "--ensemble_size", "3") == 2
    assert re.search(error, capsys.readouterr().err)
    assert digests(folder) == digests(small_run) and train_tiny(data, results) == 0
    (folder / "member_002.npy").unlink()
    assert train_tiny(data, results) == 2
    assert re.search(error, capsys.readouterr().err) and not (folder / "member_002.npy").exists()


def test_a_lost_run_record_is_made_again(tiny_data, small_run, tmp_path, capsys, no_training, monkeypatch):
    """For members that fit only: others would be overwritten. A damaged one has to be removed by hand."""
    folder = copy_run(small_run, tmp_path / small_run.name)
    monkeypatch.setattr(train, "print_near_copies", None)  # it reads all test images: only after a training
    monkeypatch.setattr(train, "update_baseline", lambda *_: None)  # writes the record once more
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


# ------------------------------------------------------------------------------------------------ records


def test_what_is_no_run_is_not_opened(tiny_run, tmp_path):
    def refused(message: str, folder: Path = tmp_path) -> None:
        with pytest.raises(InputError, match=message) as error:
            opened(folder)
        assert "\n" not in str(error.value)

    refused("is not a run folder: it has no args.json$")
    refused("is not a run folder", tmp_path / ("long" * 100))
    path = tmp_path / "args.json"
    for content in ("{}", "[]", "", (tiny_run / "args.json").read_text()[:-9]):
        path.write_text(content)
        refused(r"args.json is damaged \(.*\): remove it, and train.py makes it again$")
    shutil.copy(tiny_run / "args.json", path)
    refused("member 1 of 1 is missing; train.py makes it$")


def test_a_run_of_another_format_is_refused(tiny_run, tiny_data, tmp_path, capsys, no_training):
    """Members of two formats never share a folder. Nothing is written; nothing reads it."""
    folder = copy_run(tiny_run, tmp_path / tiny_run.name)
    record = read_record(folder / "args.json") | {"format": 2}
    del record["settings"]["optimizer"]  # and whatever else an older one lacks
    write_record(folder / "args.json", record)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "3") == 2
    message = capsys.readouterr().err
    assert "is of format 2, and this version of the program reads format 3: train it again under" in message
    for read in (opened, load_ensemble):
        with pytest.raises(InputError) as error:
            read(folder)
        assert message == f"train.py: {error.value}\n"
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before


def test_runs_from_before_a_setting_go_on(small_run, tiny_data, tmp_path, capsys, no_training):
    """Their args.json lacks it and so has its default, and their members belong to it; another value is another run."""
    folder = copy_run(small_run, tmp_path / small_run.name)
    record, settings = read_run_record(folder), read_record(folder / "args.json")["settings"]
    later = {name: settings.pop(name) for name in ("optimizer", "resize", "backbone", "seed", "flip", "scale_min")}
    assert later == {name: getattr(Settings(), name) for name in later}
    edit_record(folder / "args.json", "settings", value=settings)
    assert read_run_record(folder) == record and load_ensemble(folder).image_spec.resize == "crop"
    assert train_tiny(tiny_data, tmp_path) == 0
    assert capsys.readouterr().err == "" and digests(folder, "recall.csv") == digests(small_run, "recall.csv")
    assert read_record(folder / "member_001.json", MemberRecord).settings_hash == record.settings_hash
    given = {"data_name": "tiny", "meta_class_size": 3, "num_epochs": 2, "image_size": 32, "batch_size": 16}
    given |= {"lr": 1e-3, "weights": "none", "precision": "fp32"}  # all that was not at its default when it was begun
    assert json_sha256({"settings": given, "fingerprint": record.data.fingerprint}) == record.settings_hash
    other = replace(record, settings=replace(record.settings, optimizer="sgd"))
    assert other.settings_hash != record.settings_hash


# ------------------------------------------------------------------------------------------------ members


def test_the_next_missing_member_is_locked(small_run, tmp_path):
    """One that another process makes, or has made in the meantime, is passed over; its lock is free again."""
    folder = copy_run(small_run, tmp_path / "run")
    (folder / "member_002.json").rename(tmp_path / "member_002.json")
    members = members_of(folder)
    members.refresh()
    with take_lock(folder / ".member_003.lock"):
        member, lock = members.lock_next_missing([1, 3, 2])
        with lock:
            assert member == 2 and take_lock(folder / ".member_002.lock", timeout=0) is None
            assert members.lock_next_missing([2, 3]) is None
    (tmp_path / "member_002.json").rename(folder / "member_002.json")
    member, lock = members.lock_next_missing([1, 2, 3])
    with lock:
        assert member == 3 and sorted(members.records) == [1, 2]
    for path in folder.glob(".member_*.lock"):
        with take_lock(path, timeout=0):
            pass
    assert members.lock_next_missing([1, 2]) is None


@pytest.mark.parametrize(("key", "value"), [("member", 1), ("settings_hash", "another run")])
def test_a_member_of_another_run_or_number_is_not_taken(small_run, tmp_path, capsys, key, value):
    folder = copy_run(small_run, tmp_path / "run")
    edit_record(folder / "member_002.json", key, value=value)
    members = members_of(folder)
    members.refresh()
    assert list(members.records) == [1] and "from another run or member" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [WEIGHTS, "json"])
def test_a_damaged_member_is_named_once_and_trained_again(tiny_data, small_run, tmp_path, capsys, suffix):
    folder = copy_run(small_run, tmp_path / small_run.name)
    path = folder / f"member_001.{suffix}"
    flip_a_bit(path)
    assert train_tiny(tiny_data, tmp_path) == 0
    output = capsys.readouterr()
    assert output.err.count(f"warning: member 1 is incomplete or damaged ({path.name}") == 1
    assert "1 of 2 members finished" in output.out
    for pattern in ("member_*.npy", "recall.csv"):
        assert digests(folder, pattern) == digests(small_run, pattern)


@pytest.mark.parametrize("change", [Path.unlink, flip_a_bit])
@pytest.mark.parametrize("suffixes", [["npy"], ["pooled.npy"], ["npy", "pooled.npy"]])
def test_bad_embeddings_are_named_and_made_again(
    small_run, tiny_data, tmp_path, capsys, no_training, monkeypatch, suffixes, change
):
    """Once, without training, and without the initial weights."""
    monkeypatch.setattr(train, "read_weights", None)
    folder = copy_run(small_run, tmp_path / small_run.name)
    names = [f"member_001.{suffix}" for suffix in suffixes]
    for name in names:
        change(folder / name)
    assert train_tiny(tiny_data, tmp_path) == 0
    output = capsys.readouterr()
    assert output.err == f"warning: member 1 is incomplete or damaged ({', '.join(names)}); train.py makes it again\n"
    assert "1 of 2 members finished" in output.out
    for pattern in ("member_*", "*.csv"):
        assert digests(folder, pattern) == digests(small_run, pattern)


# ------------------------------------------------------------------------------------------------ embeddings


def test_embeddings_that_do_not_fit_on_the_device_are_scored_on_the_cpu(small_run, capsys, monkeypatch):
    def full(array, device):
        raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    arrays = opened(small_run).embeddings("logits", torch.device("mps"))
    assert capsys.readouterr().err == "warning: the embeddings do not fit on mps: they are scored on the CPU\n"
    assert np.array_equal(arrays[1], np.load(small_run / "member_002.npy"))


# ------------------------------------------------------------------------------------------------ a run


def test_a_run_is_read_up_to_the_first_member_that_is_missing(tiny_run, tmp_path):
    """Its members, the images that they embedded, and by what they are scored. Nothing is written."""
    labels, is_query, is_gallery = np.arange(12) // 3, np.arange(12) % 3 > 0, np.arange(12) % 4 > 0
    saved = {"logits": random_embeddings(0, 4), "pooled": random_embeddings(1, 4)}
    folder = write_run(
        tmp_path / "run", tiny_run, saved["logits"], labels, is_query, is_gallery, saved["pooled"], lr=0.5
    )
    (folder / "member_003.json").unlink()
    run = opened(folder)
    assert (run.folder, run.num_members, run.settings.lr) == (folder, 2, 0.5)
    assert run.settings == run.record.settings and [each.member for each in run.members] == [1, 2]
    assert run.test.class_name.tolist() == CLASS_NAMES[labels].tolist() and run.test.path[11] == "11.png"
    for name, expected in (("label", labels), ("is_query", is_query), ("is_gallery", is_gallery)):
        assert run.test[name].tolist() == expected.tolist()
    for (number, size), (name, rows) in itertools.product(((None, 2), (2, 2), (1, 1)), saved.items()):
        found = opened(folder, number, name).embeddings(name, CPU)
        assert len(found) == size
        assert all(np.array_equal(*pair) for pair in zip(found, rows[:size], strict=True))
    with pytest.raises(InputError, match=r"member 3 of 4 is missing; train\.py makes it$"):
        opened(folder, 4)
    with pytest.raises(InputError, match=r"num_members has to be at least 1, not 0$"):
        opened(folder, 0)
    (folder / "member_001.json").unlink()
    with pytest.raises(InputError, match=r"member 1 of 1 is missing; train\.py makes it$"):
        opened(folder)


def test_only_the_embedding_that_is_read_has_to_be_sound(tiny_run, tmp_path, capsys):
    folder = write_run(tmp_path / "run", tiny_run, random_embeddings(0))
    for name in ("member_001.safetensors", "member_001.npy", "member_002.pooled.npy"):
        flip_a_bit(folder / name)
    assert opened(folder, 1, "pooled").num_members == opened(folder, None, "pooled").num_members == 1
    warning = "warning: member {} is incomplete or damaged ({}); train.py makes it again\n"
    assert capsys.readouterr().err == warning.format(2, "member_002.pooled.npy")  # only where it was asked for
    with pytest.raises(InputError, match="member 1 of 1 is missing"):
        opened(folder)
    assert capsys.readouterr().err == warning.format(1, "member_001.npy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:-1], r"test.csv has 11 images, the embeddings 12$"),
        (lambda table: table.drop(columns="class_name"), r"test.csv is missing or damaged \(.*\); train.py writes it"),
        (lambda table: table.assign(label="x"), r"test.csv is missing or damaged \(.*\); train.py writes it again$"),
    ],
)
def test_a_damaged_list_of_test_images_is_refused(tiny_run, tmp_path, change, message):
    folder = write_run(tmp_path / "run", tiny_run, random_embeddings(0))
    change(pd.read_csv(folder / "test.csv")).to_csv(folder / "test.csv", index=False)
    with pytest.raises(InputError, match=message):
        opened(folder).embeddings("logits", CPU)


def test_a_process_that_waits_for_another_says_so(tmp_path, capsys, monkeypatch):
    timeouts, locks = [], iter([None, "held"])
    monkeypatch.setattr(files, "take_lock", lambda path, timeout=-1: timeouts.append(timeout) or next(locks))
    assert runs.run_lock(tmp_path / "run") == "held" and timeouts == [2, -1]
    assert capsys.readouterr().out == f"{tmp_path / 'run'}: waiting for another process\n"


def test_every_name_comes_back_from_test_csv(tiny_run, tmp_path):
    """Also one with a carriage return, which pandas takes for the end of a line unless told otherwise."""
    names = ["a\rb", "a\r\nb", 'a"b', "a,b", "NA", "", "ä 猫", "\ufeffa"]
    with open(tmp_path / "test.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(runs.TEST_COLUMNS)
        table.writerows([f"{number}.png", number, True, True, name] for number, name in enumerate(names))
    assert runs.read_test(tmp_path).class_name.tolist() == names
