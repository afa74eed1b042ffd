"""The command line of all scripts: errors, options, signals, exit codes, progress bars, devices."""

import argparse
import collections
import contextlib
import errno
import functools
import importlib.util
import io
import os
import platform
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:  # torch takes seconds to import, and data_utils.py does without it
    import torch

T = TypeVar("T")
MAX_ENSEMBLE_SIZE = 10_000  # so that a typing error does not make a huge list
MANY = 10**9 - 1  # upper limit of options that have none
DEVICE_HELP = "auto (default: cuda, else mps, else cpu), cuda, cuda:1, mps or cpu"

# ------------------------------------------------------------------------------------------------ errors


class InputError(Exception):
    """Bad input or options. `run_main` prints it as one line and returns 2."""


class RunError(Exception):
    """A run that failed for a known reason. `run_main` prints it as one line and returns 1."""


class Terminated(BaseException):
    """SIGTERM: what a scheduler sends before it takes the machine away. `run_main` returns 143."""


def one_line(error: Exception) -> str:
    """Return the type and message of an exception as one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def counted(number: int, noun: str) -> str:
    """Format a number and its noun: "1 image", "2,000 classes"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}" + (plural if number != 1 else "")


def duration(seconds: float) -> str:
    """Format a duration: "40 seconds", "7 minutes", "1.5 hours"."""
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def format_problems(problems: list[str], shown: int = 20) -> str:
    """List the first `shown` problems, one per line, and the number of the rest."""
    lines = "".join(f"\n  {problem}" for problem in problems[:shown])
    return lines + (f"\n  … and {len(problems) - shown:,} more" if len(problems) > shown else "")


def run_main(script: str, run: Callable[[], None], save_memory: str, resumable: bool = True) -> int:
    """Run a script's `run` and return the exit code.

    0 done, 2 refused input or options, 1 failed while running, 130 Ctrl-C, 143 SIGTERM, 141 done, but the output had no
    reader. `save_memory` names the options to change when memory runs out. `resumable`: the same command can resume.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # one line, without source code
    again = "; run the same command again to go on" if resumable else ""
    output = Output(sys.stdout)
    errors = Output(sys.stderr)

    def ended(code: int, reason: object) -> int:
        print(f"{script}: {reason}", file=errors)
        return code

    code = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
        earlier = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            run()
        except InputError as error:
            code = ended(2, error)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            code = ended(1, f"failed: out of memory; try {save_memory}")
        except (RunError, OSError) as error:  # OSError: disk full, no permission, ...
            code = ended(1, f"failed: {error}")
        except KeyboardInterrupt:
            code = ended(130, f"interrupted{again}")
        except Terminated:
            code = ended(143, f"terminated{again}")
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            output.flush()
            errors.flush()
    if code == 0 and isinstance(output.error, BrokenPipeError):
        return 141
    if code == 0 and output.error:
        return ended(1, f"done, but its output could not be written: {output.error}")
    return code


class Output:
    """stdout or stderr. If its reader is gone or its disk is full, further output is dropped and the work goes on."""

    def __init__(self, stream: io.TextIOBase | None):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed when Python started
        self.error: OSError | None = None  # the first error of a write
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # escape what the encoding lacks

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self.attempt(self.stream.write, text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, call: Callable, *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError as error:
            self.error = self.error or error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # Python flushes the rest at exit


def terminate(signum: int, frame: object) -> None:
    """Handle SIGTERM: raise Terminated, once, since schedulers send it twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def progress_bar(items: Iterable[T], title: str, total: int, unit: str = " images") -> Iterator[T]:
    """Yield the items, with a progress bar if they take more than a second. Without a terminal there is no bar."""
    yield from tqdm(items, title, total, unit=unit, delay=1, disable=None)


def ahead(futures: Iterator[Future[T]], number: int) -> Iterator[T]:
    """Yield the results of futures in order, while as many as `number` more are at work."""
    waiting = collections.deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > number:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ------------------------------------------------------------------------------------------------ options


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations whose errors are one line."""

    def __init__(self, **kwargs):
        formatter_class = functools.partial(argparse.RawDescriptionHelpFormatter, width=120)
        super().__init__(allow_abbrev=False, formatter_class=formatter_class, **kwargs)

    def error(self, message: str):
        raise InputError(f"{' '.join(message.split())} (see python {self.prog} --help)")


def is_utf8(text: str) -> bool:
    """Whether a name can be encoded as UTF-8. On the disk or the command line, some hold other bytes: surrogates."""
    return re.search("[\ud800-\udfff]", text) is None


def data_set_name(text: str) -> str:
    """argparse type: the name of a folder, not a path."""
    if not text or text.startswith(".") or re.search(r'[/\\:*?"<>|\0\n\r]', text) or not is_utf8(text):
        raise argparse.ArgumentTypeError(f"{text!a} is not the name of a folder under --data_path")
    return text


def check_ranges(args: argparse.Namespace, **ranges: tuple[float, float]) -> None:
    """Raise InputError for an option outside its range (low, high), both included. None: not given, no check."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is None or low <= value <= high:  # False for NaN
            continue
        least = "above 0" if 0 < low < 1e-6 else f"at least {low:,g}"
        most = f" and at most {high:,g}" if high < MANY else ""
        raise InputError(f"--{name} {value} has to be {least}{most}")


def number_list(text: str) -> list[int]:
    """argparse type: distinct positive integers and ranges of them, such as "1,2,4,8" or "13-24,30"."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last < first + MAX_ENSEMBLE_SIZE:
            raise argparse.ArgumentTypeError(f"{part!r} is no positive integer, and no range of them such as 13-24")
        numbers += range(first, last + 1)
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return numbers


# ------------------------------------------------------------------------------------------------ the machine


def require(what: str, *packages: str) -> None:
    """Raise InputError if some of the packages are not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{what} needs: pip install {' '.join(missing)}")


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name: str) -> "torch.device":
    """Return the device for `auto`, `cuda`, `cuda:i`, `mps` or `cpu`. Raises InputError if it is not available.

    Under torchrun, `auto` and `cuda` give each process its own GPU.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if num_gpus:
        there = ["cuda", *there, *(f"cuda:{index}" for index in range(num_gpus))]
    if name == "auto":
        name = there[0]
    local_rank = os.environ.get("LOCAL_RANK", "")
    if name == "cuda" and num_gpus and local_rank.isdecimal():
        name = f"cuda:{int(local_rank) % num_gpus}"  # some launchers show each process only its own GPU
    if name not in there:
        has_cuda = torch.version.cuda or torch.version.hip
        reason = "" if has_cuda else "; this PyTorch was built without CUDA"
        raise InputError(f"device {name!r} is not there; this machine has {', '.join(there)}{reason}")
    return torch.device(name)


def set_up_device(device: "torch.device", deterministic: bool, threads: int | None = None) -> None:
    """Ask PyTorch for its fastest algorithms, or for deterministic ones; for so many threads, or its own number."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = not deterministic  # picks the fastest convolution for each batch shape
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes no result
    if device.index is not None:
        torch.cuda.set_device(device)


def environment(device: "torch.device") -> dict[str, str | int | None]:
    """Describe what results depend on beside the options: versions, hardware, and the commit of this code."""
    import numpy
    import torch
    import torchvision

    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        here = Path(__file__).resolve().parent
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "commit": commit or None,
    }


# Messages that mean out of memory: from PyTorch's allocators, then from cuBLAS and cuDNN if they lack workspace.
OUT_OF_MEMORY = re.compile(
    "out of memory|allocate memory|ALLOC_FAILED|ALLOCATION_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|"
    "unable to find an engine|unable to find a valid cuDNN algorithm",
    re.IGNORECASE,
)


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that the machine or device ran out of memory. Most libraries raise a RuntimeError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return OUT_OF_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError)


def with_less_memory(call: Callable[[int], T], size: int) -> T:
    """Return call(size). While memory runs out, halve `size` and retry, so that no trained member is lost."""
    while True:
        try:
            return call(size)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not out_of_memory(error):
                raise
        size //= 2  # outside the handler, so that the failed call's memory is free
