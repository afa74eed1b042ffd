"""Scripts in processes of their own, which need not import PyTorch anew: they are forked from one that has."""

import importlib
import itertools
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["torch", "torchvision", "pandas", "scipy.io", "matplotlib.figure", "filelock", "pytest"]  # nothing of ours
LIBRARIES += ["pyarrow.dataset", "lance_namespace"]  # most of lancedb, where it is; it starts a thread of its own
CHANGES = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")  # functions of `os` that change files
ENOUGH = 120  # seconds; what takes longer hangs


class Script:
    """A script that runs, or has run, in a process of its own. `Processes` starts it."""

    def __init__(self, context, logs: tuple[Path, Path], *arguments: object):
        """`logs`: of what it prints to stdout and stderr; `arguments`: the others of `run_as_script`."""
        self.logs, ready = logs, context.Event()
        self.counter = context.Value("i", 0)  # of its changes to files
        self.process = context.Process(target=run_as_script, args=(logs, self.counter, ready, *arguments))
        self.process.start()
        wait_until(ready.is_set, self)
        self.seconds, self.start = 0.0, time.perf_counter()

    def wait(self) -> int:
        """Waits for its end. Returns the exit code; that of a signal is negative."""
        self.process.join(ENOUGH)
        assert self.process.exitcode is not None, f"it hangs: {self.out} {self.err}"
        self.seconds = time.perf_counter() - self.start
        return self.process.exitcode

    @property
    def out(self) -> str:
        return self.logs[0].read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self.logs[1].read_text(encoding="utf-8")


class Processes:
    """Starts scripts. What they print goes to files in the folder `logs`."""

    def __init__(self, logs: Path):
        self.logs, self.numbers = logs, itertools.count()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(LIBRARIES)

    def start(self, *command: object, folder: Path, small: bool = True, last_change: int | None = None) -> Script:
        """Starts `python COMMAND`: a script of ours and its arguments, or -m, a module and its arguments.

        `small`: with a small network in place of a ResNet. Right before it would change files once more than
        `last_change`, the process dies.
        """
        number = next(self.numbers)
        logs = self.logs / f"{number}.out", self.logs / f"{number}.err"
        return Script(self.context, logs, tuple(map(str, command)), folder, small, last_change)

    def run(self, *command: object, folder: Path, code: int = 0, small: bool = True) -> Script:
        """The same, up to its end, which has to come with this exit code."""
        script = self.start(*command, folder=folder, small=small)
        assert script.wait() == code, f"{script.out} {script.err}"
        return script


def wait_until(condition: Callable[[], bool], script: Script) -> None:
    """Waits until the condition holds. The script has to run that long."""
    end = time.monotonic() + ENOUGH
    while True:
        in_time = script.process.is_alive() and time.monotonic() < end  # asked first: it may end as soon as it holds
        if condition():
            return
        assert in_time, script.out + script.err
        time.sleep(0.01)


def run_as_script(logs, counter, ready, command: tuple[str, ...], folder: Path, small: bool, last_change) -> None:
    """What the process does. See `Processes.start`."""
    for log, descriptor in zip(logs, (1, 2), strict=True):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # else workers of its own would import PyTorch anew
    if small:  # in our scripts and in the plain one
        import builders
        import torchvision

        import model

        model.build_model = builders.build_small_model
        torchvision.models.resnet18 = lambda num_classes: builders.build_small_model("resnet18", num_classes, None)
    is_module, code = command[0] == "-m", 0
    sys.argv = list(command[is_module:])
    if not is_module:
        importlib.import_module(Path(sys.argv[0]).stem)  # no test is about what interrupts an import
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # but for the time that `run_main` handles them
    count_changes(counter, last_change)
    ready.set()
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    os._exit(code)


def count_changes(counter, last_change: int | None) -> None:
    """Counts this process's changes to files. It dies right before there is one more than `last_change`."""
    this_process = os.getpid()

    def counted(function):
        def call(*args, **kwargs):
            if os.getpid() == this_process:  # not in its workers
                if counter.value == last_change:
                    os._exit(137)
                counter.value += 1
            return function(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
