"""Kills, damaged files and several processes: the same command run again ends as if nothing had happened.

tests/slow/test_faults.py has the long versions.
"""

import itertools
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import faults
import pytest
import torch
from builders import TINY
from faults import EACH_EPOCH, check_same, here, linked, stop_in_epoch
from processes import wait_until

import train
from dreml.cli import Terminated
from dreml.files import read_record

EIGHT_MEMBERS = [*TINY, "--ensemble_size", "8"]


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_state(processes, finished, tmp_path, record_property):
    # Seed 5 has a kill that leaves half-written files behind.
    record_property("kills", faults.check_kills(processes, finished, tmp_path / "root", seed=5))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_at_once_and_it_goes_on_after_the_last_file(
    finished, tmp_path, capsys, monkeypatch, number
):
    """With a file for each epoch, only the epoch in hand is trained again. The run ends with the same bits."""
    root, steps, train_step = tmp_path / "root", itertools.count(), train.train_step
    shutil.copytree(finished / "data", root / "data", copy_function=os.link)

    def step(*args):
        result = train_step(*args)
        if next(steps) == 4:  # the second of three of epoch 1
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(train, "train_step", step)
    assert train.main([*TINY, *EACH_EPOCH, *here(root)]) == faults.CODES[number]
    word = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[number]
    assert capsys.readouterr().err == f"train.py: {word}; run the same command again to go on\n"
    assert next(steps) == 5 and [path.name for path in root.glob("results/*/*progress_*")] == ["progress_001.pt"]
    assert train.main([*TINY, *here(root)]) == 0
    assert "member 1/2: goes on after epoch 0" in capsys.readouterr().out
    assert next(steps) == 5 + 1 + 3 + 6  # one epoch of member 1, two of member 2
    check_same(root, finished)


@pytest.mark.parametrize("options", [["--optimizer", "adam"], ["--optimizer", "sgd"], ["--mixup"]])
def test_the_optimizer_the_scaler_and_the_best_epoch_go_on_exactly(
    small_network, tiny_data, tmp_path, monkeypatch, options
):
    """Stopped within each of four epochs, with a gradient scale so large that it makes steps be skipped."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, enabled: scaler(kind, 2.0**124, growth_interval=2))
    roots = [tmp_path / "straight", tmp_path / "stopped"]
    options = [*options, *EACH_EPOCH, "--num_epochs", "4", "--ensemble_size", "1"]
    options += ["--lr", "1"]  # so large a rate that training gets worse again
    for root in roots:
        shutil.copytree(tiny_data, root / "data", copy_function=os.link)
    assert train.main([*TINY, *here(roots[0]), *options]) == 0
    for stop in (1, 2, 3):
        with monkeypatch.context() as patch:
            stop_in_epoch(patch, stop, Terminated)
            assert train.main([*TINY, *here(roots[1]), *options]) == 143
    assert train.main([*TINY, *here(roots[1]), *options]) == 0
    check_same(*roots)
    best_epoch = read_record(next(roots[0].rglob("member_001.json")))["best_epoch"]
    assert best_epoch == 3 if "--mixup" in options else best_epoch < 3


def test_a_damaged_file_never_changes_a_number(threads, finished, tmp_path, capsys, record_property):
    damaged = faults.check_damages(finished, tmp_path, lambda: capsys.readouterr().err, seed=0)
    record_property("damaged files", damaged)


def eight_members(finished: Path, root: Path) -> Path:
    """Eight members trained by one process."""
    linked(finished / "data", finished / "results", root)
    assert train.main([*EIGHT_MEMBERS, *here(root)]) == 0
    return root


def trained(log: str) -> list[int]:
    """The members that a process says it has trained."""
    return [int(member) for member in re.findall(r"^member (\d)/8: training accuracy", log, re.MULTILINE)]


def test_processes_share_an_ensemble(processes, finished, tmp_path):
    """Two at a time; one is killed while it trains and started again. Who trains what is left to chance."""
    root = tmp_path / "root"
    shutil.copytree(finished / "data", root / "data", copy_function=os.link)
    killed, other = (processes.start("train.py", *EIGHT_MEMBERS, folder=root) for _ in range(2))
    wait_until(lambda: "epoch 0: loss" in killed.out, killed)
    killed.process.kill()
    third = processes.start("train.py", *EIGHT_MEMBERS, folder=root)
    assert (killed.wait(), other.wait(), third.wait()) == (-signal.SIGKILL, 0, 0), other.err + third.err
    finished_by = [trained(script.out) for script in (killed, other, third)]
    members = [member for each in finished_by for member in each]
    assert len(set(members)) == len(members) >= 7 and finished_by[1]  # the killed one may not have come to say so
    assert "8 members: R@1" in other.out + third.out
    check_same(root, eight_members(finished, tmp_path / "expected"))


def test_some_members_only(finished, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(finished / "data", root / "data", copy_function=os.link)
    for members, expected, missing in (("3-8", [3, 4, 5, 6, 7, 8], "1, 2"), ("1,3", [1], "2"), ("1-4", [2], None)):
        capsys.readouterr()
        assert train.main([*EIGHT_MEMBERS, *here(root), "--members", members]) == 0
        output = capsys.readouterr().out
        assert trained(output) == expected
        assert missing is None or f"still missing: member {missing}; " in output
    check_same(root, eight_members(finished, tmp_path / "expected"))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_torchrun_goes_on_when_a_worker_is_killed(processes, tiny_data, tiny_run, tmp_path):
    faults.check_torchrun(processes, tiny_data, tmp_path / "root", num_processes=2)
    check_same(tmp_path / "root", linked(tiny_data, tiny_run.parent, tmp_path / "expected"))
