"""Kills and damaged files: what they are made of, and how two folders of data and results are compared."""

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from builders import TINY, index_rows, save_colors
from processes import ENOUGH, ROOT, Processes, Script, wait_until

import data_utils
import train
from dreml.files import read_record
from dreml.index import BATCH_SIZE

EACH_EPOCH = ["--progress_seconds", "0"]
INTERVALS = [EACH_EPOCH, ["--progress_seconds", "0.01"], []]  # not shorter than 20 times what a write takes; 30 seconds
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


def here(root: Path) -> list[str]:
    """The options that name the folders of `root`."""
    return ["--data_path", str(root / "data"), "--results_path", str(root / "results")]


def linked(data: Path, results: Path, root: Path) -> Path:
    """Copies a data folder and a results folder to `root`. Its files are links: to be replaced, not written to."""
    shutil.copytree(data, root / "data", copy_function=os.link)
    shutil.copytree(results, root / "results", copy_function=os.link)
    return root


def final_state(root: Path) -> dict[str, object]:
    """All under data and results but seconds, time stamps, locks and the code's commit: relative path -> content."""
    state = {}
    for path in sorted(path for part in ("data", "results") for path in (root / part).rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            state[name] = None
        elif path.name == "args.json":
            record = read_record(path)
            state[name] = {key: record[key] for key in ("settings", "data", "baseline")}
        elif re.fullmatch(r"member_\d+\.json", path.name):
            record = read_record(path)
            for epoch in record["history"]:
                del epoch["seconds"], epoch["images_per_second"]
            del record["environment"]["commit"]  # somebody may be working on the code
            state[name] = record
        elif path.name == "train.csv":
            state[name] = pd.read_csv(path).drop(columns=["seconds", "images_per_second"]).to_csv()
        elif path.suffix != ".lock":
            state[name] = path.read_bytes()
    return state


def check_same(root: Path, expected: Path) -> None:
    """The folders hold the same files with the same content, bit for bit."""
    found, wanted = final_state(root), final_state(expected)
    assert sorted(found) == sorted(wanted), set(found) ^ set(wanted)
    differing = [name for name in wanted if found[name] != wanted[name]]
    assert not differing, differing


def stop_in_epoch(monkeypatch: pytest.MonkeyPatch, stop: int, reason: type[BaseException]) -> None:
    """Lets training be interrupted after the first step of epoch `stop` of any member."""
    train_epoch = train.train_epoch

    def one(batches):
        yield next(batches)
        raise reason

    def until(state, compute, batches, num_images, title):
        batches = one(batches) if title.endswith(f" epoch {stop}") else batches
        return train_epoch(state, compute, batches, num_images, title)

    monkeypatch.setattr(train, "train_epoch", until)


def interrupted(finished: Path, root: Path) -> Path:
    """A copy of `finished`, whose second member is interrupted in its second and last epoch."""
    linked(finished / "data", finished / "results", root)
    for path in root.glob("results/*/member_002.*"):
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        stop_in_epoch(patch, 1, KeyboardInterrupt)
        assert train.main([*TINY, *EACH_EPOCH, *here(root)]) == 130
    return root


def check_kills(processes: Processes, expected: Path, root: Path, seed: int, small: bool = True) -> int:
    """Both scripts are killed five times each: by a signal after a random time, or before a random change to files.

    In the end, `root` has to be as `expected`, where they were not killed. Returns the number of kills.
    """
    total, draw, measured = 0, random.Random(seed), root / "measured"
    for folder in (root, measured):
        raw = shutil.ignore_patterns("cache*", ".cache*")
        shutil.copytree(expected / "data", folder / "data", ignore=raw, copy_function=os.link)
    preprocess = ["data_utils.py", "--data_name", "tiny", "--image_size", "32"]
    training = ["train.py", *TINY, *EACH_EPOCH]
    for first, product in ((preprocess, root / "data" / "tiny" / "cache_32"), (training, root / "results")):
        whole, kills = processes.run(*first, folder=measured, small=small), 0
        while kills < 5:
            command = [*first, *draw.choice(INTERVALS)] if first is training else first
            reach = draw.choice([0.3, 1.0])  # training goes on, so it comes to its end in short pieces too
            if draw.random() < 0.5:
                last_change = draw.randrange(int(reach * whole.counter.value))
                script = processes.start(*command, folder=root, small=small, last_change=last_change)
                assert script.wait() in (137, 0), script.out + script.err
            else:
                script, sent = processes.start(*command, folder=root, small=small), draw.choice(list(CODES))
                time.sleep(draw.uniform(0.01, reach * whole.seconds))
                with contextlib.suppress(ProcessLookupError):  # it is done already
                    os.kill(script.process.pid, sent)
                check_end(script, sent)
            if script.process.exitcode != 0:
                kills += 1
            else:  # it was done before: from the beginning
                shutil.rmtree(product)
        processes.run(*first, folder=root, small=small)
        total += kills
    check_same(root, expected)
    return total


def check_end(script: Script, sent: int) -> None:
    """A signal ends a script with its exit code and one line, unless the script was done before."""
    code = script.wait()
    assert code in (CODES[sent], 0), script.out + script.err
    # Python drops an exception that comes within a hook of a fork or a __del__, its own or filelock's, and says so.
    places = r"_releaseLock|_resume_parent_after_fork|BaseFileLock\.__del__"
    is_dropped = re.search(f"Exception ignored in: <function ({places})", script.err)
    assert "Traceback" not in script.err or (code == 0 and is_dropped), script.out + script.err
    if code > 0:
        end = r"(terminated|interrupted); run the same command again to go on\n$"
        assert re.search(end, script.err), script.err


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


def check_damages(finished: Path, folder: Path, read_errors: Callable[[], str], seed: int) -> int:
    """Damages every file, each in its turn: that is noticed and mended by the command that is named, or harmless.

    But for files.bin: without it, changed photos are not counted.

    `read_errors` returns what was printed to stderr since it was last called. Returns the number of damaged files.
    """
    draw, stopped = random.Random(seed), interrupted(finished, folder / "stopped")
    parts = [path for part in ("data", "results") for path in (finished / part).rglob("*") if path.is_file()]
    files = sorted(path.relative_to(finished) for path in parts if path.suffix not in (".png", ".lock", ".bin"))
    assert {path.suffix for path in files} == {".json", ".npy", ".safetensors", ".csv"} and len(files) > 15
    progress = next(path.relative_to(stopped) for path in stopped.rglob("progress_*"))
    for file in [*files, progress]:
        is_read = file == progress or file.parts[0] == "data"  # a finished run reads no pixels
        source, root = stopped if is_read else finished, folder / "damaged"
        linked(source / "data", source / "results", root)
        damage(root / file, draw)
        read_errors()
        code = train.main([*TINY, *here(root)])
        if code != 0:
            error = read_errors()
            remedy = re.search(r"make it (again )?with: python data_utils.py (.*)\n$", error)
            assert code == 2 and error.count("\n") == 1 and (remedy or "args.json is damaged" in error), error
            if remedy:
                assert data_utils.main(shlex.split(remedy[2])) == 0
            else:
                (root / file).unlink()
            assert train.main([*TINY, *here(root)]) == 0
        check_same(root, finished)
        shutil.rmtree(root)
    return len(files) + 1


def check_torchrun(processes: Processes, tiny_data: Path, root: Path, num_processes: int, *options: str) -> None:
    """Kills one of the processes of torchrun, which ends the others and starts all of them again: they go on."""
    shutil.copytree(tiny_data, root / "data", copy_function=os.link)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", "--max-restarts=1"]
    script = processes.start(*launcher, ROOT / "train.py", *TINY, *EACH_EPOCH, *options, folder=root)
    wait_until(lambda: len(list(root.glob("results/*/.member_*.lock"))) == num_processes, script)
    pid = script.process.pid
    *others, victim = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for other in others:
        os.kill(other, signal.SIGSTOP)  # they must not be done before torchrun notices
    wait_until(lambda: bool(list(root.glob("results/*/progress_*.pt"))), script)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: script.err.count("closing signal SIGTERM") == len(others), script)
    for other in others:
        os.kill(other, signal.SIGCONT)
    assert script.wait() == 0, script.out + script.err
    assert script.err.count("train.py: terminated") == len(others), script.out + script.err
    assert "goes on after epoch 0" in script.out and " members: R@1" in script.out, script.out + script.err
    assert "\r" not in script.out + script.err  # no progress bars


def check_index_kills(
    processes: Processes, run: Path, folder: Path, num_kills: int, num_photos: int, seed: int, num_processes: int = 1
) -> None:
    """Searches of a new photo folder are killed `num_kills` times while they embed it, after a random batch or in one.

    Each goes on where the last one was killed. In the end the table has to equal that of an uninterrupted search, and
    no stored batch was embedded twice. `num_processes` searches run at once.
    """
    draw, photos = random.Random(seed), folder / "photos"
    save_colors(photos, [f"{number % 7}/{number}.png" for number in range(num_photos)])
    (photos / "1" / "bad.png").write_text("no image")
    command = ["retrieve.py", run, "--query", "test:0", "--no_picture", "--device", "cpu", "--gallery", photos]
    options = [["--index", folder / name, "--output", folder / "out"] for name in ("killed", "whole")]
    stored, batches = folder / "killed" / "photos.lance" / "_versions", -(-num_photos // BATCH_SIZE)

    def num_stored() -> int:
        return len(list(stored.glob("*.manifest")))

    for kill in range(num_kills):
        scripts = [processes.start(*command, *options[0], folder=folder) for _ in range(num_processes)]
        wanted = max(num_stored(), batches * (kill + draw.random()) // num_kills)
        end = time.perf_counter() + ENOUGH
        while num_stored() < wanted and any(script.process.is_alive() for script in scripts):
            assert time.perf_counter() < end
            time.sleep(0.001)
        time.sleep(draw.choice([0, 0.02 * draw.random(), 0.5 * draw.random()]))
        for script in scripts:
            with contextlib.suppress(ProcessLookupError):  # it was done before
                os.kill(script.process.pid, signal.SIGKILL)
            script.wait()
    last = [processes.start(*command, *options[0], folder=folder) for _ in range(num_processes)]
    assert [script.wait() for script in last] == [0] * num_processes, last[0].err
    processes.run(*command, *options[1], folder=folder)
    found, expected = (index_rows(folder / name) for name in ("killed", "whole"))
    assert found == expected and len(found) == num_photos
