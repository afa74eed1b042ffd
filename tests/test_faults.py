"""Kills, damaged files and several processes: the same command run again ends as if nothing had happened.

pytest -m slow tests/test_faults.py        the long version: 200 kills and 440 damaged files
"""

import contextlib
import io
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY

import data_utils
import train
from utils import Terminated, read_record, write_record

REPOSITORY = Path(train.__file__).resolve().parent
ENOUGH = 120  # seconds; what takes longer hangs
IMAGE_SIZE = ["--data_name", "tiny", "--image_size", "32"]


def short_and_long(short: int, long: int) -> pytest.MarkDecorator:
    """Seeds 0..long-1, of which those from `short` on are marked as slow."""
    seeds = [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= short)) for seed in range(long)]
    return pytest.mark.parametrize("seed", seeds)


# ------------------------------------------------------------------------------------------------ a process to kill


def commands(root: Path) -> list[tuple]:
    """The two command lines, as (main function, arguments)."""
    data, results = ["--data_path", str(root / "data")], ["--results_path", str(root / "results")]
    return [(data_utils.main, [*IMAGE_SIZE, *data]), (train.main, [*TINY, *data, *results])]


def child(main, argv: list[str], log: Path, ready, last_change: int | None) -> None:
    """Runs `main` in a process of its own, which dies at once before it changes files once more than `last_change`."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # else its workers would import PyTorch anew
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    parent, changes = os.getpid(), 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal changes
            if os.getpid() == parent:
                if changes == last_change:
                    os._exit(137)
                changes += 1
            return function(*args, **kwargs)

        return call

    for name in ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # but for the time that `main` handles them
    ready.set()
    code = main(argv)
    if code == 0:
        print(changes)
    sys.stdout.flush()
    os._exit(code)


class Processes:
    """Starts the scripts in processes that need not import PyTorch anew."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["data_utils", "train"])

    def start(self, main, argv: list[str], log: Path, last_change: int | None = None):
        ready = self.context.Event()
        process = self.context.Process(target=child, args=(main, argv, log, ready, last_change))
        process.start()
        assert ready.wait(60)
        return process

    def run(self, main, argv: list[str], log: Path) -> tuple[float, int]:
        """Returns the seconds that it took, and how often it changed files."""
        process, start = self.start(main, argv, log), time.perf_counter()
        process.join()
        assert process.exitcode == 0, log.read_text()
        return time.perf_counter() - start, int(log.read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def processes() -> Processes:
    return Processes()


@pytest.fixture(scope="module")
def raw(tiny_data, tmp_path_factory) -> Path:
    """data/tiny without its cache."""
    root = tmp_path_factory.mktemp("raw")
    shutil.copytree(tiny_data / "tiny", root / "data" / "tiny", ignore=shutil.ignore_patterns("*cache*"))
    return root


@pytest.fixture(scope="module")
def uninterrupted(processes, raw, tmp_path_factory) -> tuple[Path, list[tuple[float, int]]]:
    """Both commands without interruption: the folder, and what `Processes.run` returned of each."""
    root = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(raw, root, dirs_exist_ok=True)
    return root, [processes.run(main, argv, root / "log") for main, argv in commands(root)]


def final_state(root: Path) -> dict[str, object]:
    """Everything under data and results but seconds, time stamps and locks: relative path -> content."""
    state = {}
    for path in sorted(path for part in ("data", "results") for path in (root / part).rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() or path.name.endswith(".lock") or path.name == "cache_compared.json":
            state[name] = None
        elif path.name == "args.json":
            record = read_record(path, {})
            state[name] = {key: record[key] for key in ("settings", "data")}
        elif path.suffix == ".pth":
            tensors = torch.load(path, weights_only=True)
            state[name] = {key: (tensor.dtype, tensor.numpy().tobytes()) for key, tensor in tensors.items()}
        elif re.fullmatch(r"member_\d+\.json", path.name):
            record = read_record(path, {})
            for epoch in record["history"]:
                del epoch["seconds"], epoch["images_per_second"]
            del record["sha256"][path.with_suffix(".pth").name]  # its tensors are compared
            del record["environment"]["commit"]  # somebody may be working on the code
            state[name] = record
        elif path.name == "train.csv":
            state[name] = pd.read_csv(path).drop(columns=["seconds", "images_per_second"]).to_csv()
        else:
            state[name] = path.read_bytes()
    return {name: value for name, value in state.items() if not name.endswith(".lock")}


def same(root: Path, expected: Path) -> None:
    found, wanted = final_state(root), final_state(expected)
    assert sorted(found) == sorted(wanted)
    assert not [name for name in wanted if found[name] != wanted[name]]


# ------------------------------------------------------------------------------------------------ kills


@short_and_long(1, 20)
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_state(processes, raw, uninterrupted, tmp_path, seed):
    """Each command is killed five times: by a signal after a random time, or before a random change to files."""
    draw, (expected, measured) = random.Random(seed), uninterrupted
    shutil.copytree(raw, tmp_path, dirs_exist_ok=True)
    log, codes = tmp_path / "log", {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    made = [tmp_path / "data" / "tiny" / "cache_32", tmp_path / "results"]
    for (main, argv), (seconds, changes), product in zip(commands(tmp_path), measured, made, strict=True):
        kills = 0
        while kills < 5:
            reach = draw.choice([0.3, 1.0])  # training goes on, so it comes to its end in short pieces too
            if draw.random() < 0.5:
                process = processes.start(main, argv, log, last_change=draw.randrange(int(reach * changes)))
                process.join()
                assert process.exitcode in (137, 0), log.read_text()
            else:
                process, sent = processes.start(main, argv, log), draw.choice(list(codes))
                time.sleep(draw.uniform(0.01, reach * seconds))
                with contextlib.suppress(ProcessLookupError):  # it is done already
                    os.kill(process.pid, sent)
                process.join()
                output = log.read_text()
                assert process.exitcode in (codes[sent], 0) and "Traceback" not in output, output
                if process.exitcode > 0:
                    last = output.splitlines()[-1]
                    assert re.search(r"(terminated|interrupted)( in .*)?; run the same command again to go on$", last)
            if process.exitcode != 0:
                kills += 1
            else:  # it was done before: from the beginning
                shutil.rmtree(product)
        processes.run(main, argv, log)
    log.unlink()
    same(tmp_path, expected)


@pytest.fixture
def interrupted(tiny_data, tiny_run, tmp_path, capsys, monkeypatch) -> Path:
    """The two members of `tiny_run`, the second interrupted in its second and last epoch."""
    root = linked(tiny_data, tiny_run, tmp_path / "interrupted")
    for path in root.glob("results/*/member_002.*"):
        path.unlink()
    train_epoch = train.train_epoch

    def until_epoch_1(*args):
        if args[5] == 1:
            raise KeyboardInterrupt
        return train_epoch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", until_epoch_1)
        assert train.main(commands(root)[1][1]) == 130
    last = "train.py: interrupted in member 2/2, epoch 1; run the same command again to go on\n"
    assert capsys.readouterr().err == last
    return root


def linked(data: Path, run_folder: Path, root: Path) -> Path:
    """A copy of a data folder and a run folder. Its files are links: to be replaced, not to be written to."""
    shutil.copytree(data, root / "data", copy_function=os.link)
    shutil.copytree(run_folder.parent, root / "results", copy_function=os.link)
    return root


def test_training_goes_on_after_the_last_finished_epoch(
    interrupted, tiny_data, tiny_run, tmp_path, capsys, monkeypatch
):
    assert [path.name for path in interrupted.glob("results/*/progress_*")] == ["progress_002.pt"]
    epochs, train_epoch = [], train.train_epoch
    monkeypatch.setattr(train, "train_epoch", lambda *args: epochs.append(args[4:6]) or train_epoch(*args))
    assert train.main(commands(interrupted)[1][1]) == 0
    assert epochs == [(2, 1)] and "member 2/2: goes on after epoch 0" in capsys.readouterr().out
    same(interrupted, linked(tiny_data, tiny_run, tmp_path / "expected"))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_optimizer_the_scaler_and_the_best_epoch_go_on_exactly(tiny_data, tmp_path, monkeypatch, optimizer):
    """Stopped after each of four epochs, with a gradient scale so large that it makes steps be skipped."""
    scaler, train_epoch = torch.amp.GradScaler, train.train_epoch
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, enabled: scaler(kind, 2.0**124, growth_interval=2))
    roots, options = [tmp_path / "straight", tmp_path / "stopped"], ["--num_epochs", "4", "--ensemble_size", "1"]
    options += ["--lr", "0.02", "--optimizer", optimizer]  # so large a rate that training gets worse again
    for root in roots:
        shutil.copytree(tiny_data, root / "data", copy_function=os.link)
    assert train.main([*commands(roots[0])[1][1], *options]) == 0
    for stop in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_epoch", lambda *args, stop=stop: stopping(stop, train_epoch, args))
            assert train.main([*commands(roots[1])[1][1], *options]) == 143
    assert train.main([*commands(roots[1])[1][1], *options]) == 0
    same(*roots)
    record = read_record(next(roots[0].rglob("member_001.json")), {})
    assert record["best_epoch"] < 3


def stopping(stop: int, train_epoch, args: tuple):
    if args[5] == stop:
        raise Terminated
    return train_epoch(*args)


# ------------------------------------------------------------------------------------------------ damaged files


def damage(path: Path, draw: random.Random) -> None:
    """Truncates a file, or flips up to 8 of its bits."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        del content[draw.randrange(len(content)) :]
    else:
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.unlink()  # it may be a link
    path.write_bytes(content)


@short_and_long(1, 20)
def test_a_damaged_file_never_changes_a_number(interrupted, tiny_data, tiny_run, tmp_path, capsys, seed):
    """Every file, each in its turn: noticed and mended by the command that is named, or harmless."""
    draw = random.Random(seed)
    expected = linked(tiny_data, tiny_run, tmp_path / "expected")
    files = [path.relative_to(expected) for path in expected.rglob("*") if path.is_file() and path.suffix != ".png"]
    files = [path for path in files if path.suffix != ".lock"]
    assert {path.suffix for path in files} == {".json", ".npy", ".pth", ".csv"} and len(files) > 15
    progress = next(path.relative_to(interrupted) for path in interrupted.rglob("progress_*"))
    for file in [*sorted(files), progress]:
        root = tmp_path / "damaged"
        shutil.copytree(interrupted if file == progress else expected, root, copy_function=os.link)
        damage(root / file, draw)
        capsys.readouterr()
        code = train.main(commands(root)[1][1])
        if code != 0:
            error = capsys.readouterr().err
            remedy = re.search(r"make it (again )?with: python data_utils.py (.*)\n$", error)
            assert code == 2 and error.count("\n") == 1 and remedy, error
            assert data_utils.main(shlex.split(remedy[2])) == 0 and train.main(commands(root)[1][1]) == 0
        same(root, expected)
        shutil.rmtree(root)


@pytest.mark.parametrize("other", ["run", "member"])
def test_progress_of_another_run_or_member_is_not_used(interrupted, tiny_data, tiny_run, tmp_path, capsys, other):
    path = next(interrupted.glob("results/*/progress_002.pt"))
    state = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
    run, member = state.pop("identity").split(", member ")
    assert member == "2"
    run, member = ("another", 2) if other == "run" else (run, 1)
    with train.Progress(tmp_path, member, run) as progress:
        progress.write(**state)
    shutil.move(progress.path, path)
    assert train.main(commands(interrupted)[1][1]) == 0
    assert "progress_002.pt is damaged or of another run: the member is begun anew" in capsys.readouterr().err
    same(interrupted, linked(tiny_data, tiny_run, tmp_path / "expected"))


def test_a_cache_that_changes_during_a_run_costs_the_member(tiny_data, tiny_run, tmp_path, capsys, monkeypatch):
    root = linked(tiny_data, tiny_run, tmp_path / "root")
    train_member = train.train_member

    def meanwhile(*args):
        path = root / "data" / "tiny" / "cache_32" / "meta.json"
        record = read_record(path, {})
        path.unlink()
        write_record(path, record | {"mean": [0.1, 0.2, 0.3]})
        return train_member(*args)

    monkeypatch.setattr(train, "train_member", meanwhile)
    assert train.main([*commands(root)[1][1], "--ensemble_size", "3"]) == 1
    assert "cache_32 has been changed during the run; what was finished before is kept" in capsys.readouterr().err
    assert not list(root.rglob("member_003*")) and list(root.rglob("member_002.pth"))


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture(scope="module")
def one_process(processes, tiny_data, tmp_path_factory) -> Path:
    """Four members trained by one process of one thread."""
    root = tmp_path_factory.mktemp("one")
    shutil.copytree(tiny_data, root / "data", copy_function=os.link)
    processes.run(train.main, four_members(root), root / "log")
    return root


def four_members(root: Path) -> list[str]:
    return [*commands(root)[1][1], "--ensemble_size", "4"]


def trained(log: str) -> list[int]:
    """The members that a process says it has trained."""
    return [int(member) for member in re.findall(r"^member (\d)/4: training accuracy", log, re.MULTILINE)]


def test_processes_share_an_ensemble(processes, one_process, tiny_data, tmp_path):
    """Two at a time; one is killed while it trains and started again."""
    shutil.copytree(tiny_data, tmp_path / "data", copy_function=os.link)
    logs = [tmp_path / "log_0", tmp_path / "log_1", tmp_path / "log_2"]
    killed, other = (processes.start(train.main, four_members(tmp_path), log) for log in logs[:2])
    while "epoch 0" not in logs[0].read_text():
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    third = processes.start(train.main, four_members(tmp_path), logs[2])
    for process in (other, third):
        process.join(ENOUGH)
        assert process.exitcode == 0
    members = [trained(log.read_text()) for log in logs]
    assert sorted([*members[0], *members[1], *members[2]]) == [1, 2, 3, 4] and members[1] and members[2]
    outputs = [log.read_text() for log in logs[1:]]
    assert any("4 members: R@1" in output for output in outputs)
    same(tmp_path, one_process)


def test_some_members_only(processes, one_process, tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data", copy_function=os.link)
    log = tmp_path / "log"
    for members, expected in (("3-4", [3, 4]), ("1,3", [1]), ("1-4", [2])):
        processes.run(train.main, [*four_members(tmp_path), "--members", members], log)
        assert trained(log.read_text()) == expected
        missing = {3: "1, 2", 1: "2"}.get(expected[0])
        assert missing is None or f"not finished: member {missing}; " in log.read_text()
    same(tmp_path, one_process)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
@pytest.mark.parametrize("num_processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_torchrun_goes_on_when_a_worker_is_killed(one_process, tiny_data, tmp_path, num_processes):
    shutil.copytree(tiny_data, tmp_path / "data", copy_function=os.link)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", "--max-restarts=1"]
    command = [sys.executable, *launcher, str(REPOSITORY / "train.py"), *four_members(tmp_path)]
    with open(tmp_path / "log", "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while not re.search(r"member \d/4 epoch 0", (tmp_path / "log").read_text()):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(ENOUGH) == 0, (tmp_path / "log").read_text()
    output = (tmp_path / "log").read_text()
    assert "terminated in member" in output and "4 members: R@1" in output
    assert "\r" not in output  # no progress bars
    same(tmp_path, one_process)
