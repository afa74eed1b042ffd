"""How a script speaks with its user: errors, options, signals, exit codes, progress bars, devices."""

import argparse
import contextlib
import errno
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:  # torch takes seconds to import, and data_utils.py does without it
    import torch

T = TypeVar("T")
MAX_ENSEMBLE_SIZE = 10_000  # a typing error is found before its range is listed
DEVICE_HELP = "auto (default: cuda, else mps, else cpu), cuda, cuda:1, mps or cpu"

# ------------------------------------------------------------------------------------------------ errors


class InputError(Exception):
    """Bad input or options. `run_main` prints it as one line and returns 2."""


class RunError(Exception):
    """A run that failed for a known reason. `run_main` prints it as one line and returns 1."""


class Terminated(BaseException):
    """SIGTERM: what a scheduler sends before it takes the machine away. `run_main` returns 143."""


def one_line(error: Exception) -> str:
    """The kind and the text of an exception on one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def format_problems(problems: list[str], shown: int = 20) -> str:
    """The first 20 problems, or `shown`, a line each, and how many more there are."""
    lines = "".join(f"\n  {problem}" for problem in problems[:shown])
    return lines + (f"\n  … and {len(problems) - shown:,} more" if len(problems) > shown else "")


def print_text(text: str) -> None:
    """Prints a text. Characters that the terminal's encoding lacks are printed as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def run_main(script: str, run: Callable[[], None], save_memory: str, resumable: bool = True) -> int:
    """Runs a script's `run` and returns the exit code.

    0 done, 2 refused input or options, 1 failed while running, 130 Ctrl-C, 143 SIGTERM. `save_memory` names the options
    to change when memory runs out. `resumable`: after an interruption, the same command goes on where it stopped. The
    notes of an interruption (`add_note`) say where it was, the innermost first.
    """
    format_warning, handlers = warnings.formatwarning, {}
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    _signals.clear()
    if threading.current_thread() is threading.main_thread():  # only there signals can be handled
        names = ("SIGINT", "SIGTERM", "SIGALRM")  # Windows has no SIGALRM
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        handlers = {number: signal.signal(number, _notice) for number in numbers}
    try:
        run()
        return 0
    except InputError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"{script}: failed: out of memory; try {save_memory}", file=sys.stderr)
        return 1
    except (RunError, OSError) as error:  # OSError: disk full, no permission, ...
        print(f"{script}: failed: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as stop:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # it has been heard
        place = ", ".join(reversed(getattr(stop, "__notes__", [])))
        remedy = "; run the same command again to go on" if resumable else ""
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        print(f"{script}: {what}{' in ' if place else ''}{place}{remedy}", file=sys.stderr)
        return code
    finally:
        warnings.formatwarning = format_warning
        _set_alarm(0)
        _signals.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ signals

_signals: list[int] = []  # Ctrl-C and SIGTERM that have come since the run began


def raise_if_interrupted() -> None:
    """Ends the run if Ctrl-C or SIGTERM has come, by KeyboardInterrupt or Terminated. Long loops call it.

    An exception right out of the signal's handler could hit a library between two steps that belong together.
    """
    if _signals:
        _set_alarm(0)
        raise Terminated if _signals[0] == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def name_interruption(place: str) -> Iterator[None]:
    """If Ctrl-C or SIGTERM ends the block, the last line of the script says that it was in `place`."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        stop.add_note(place)
        raise


def _notice(signum: int, frame: object) -> None:
    """Handles a signal. If no loop asks for it within 3 seconds, or at a second Ctrl-C, the run ends where it is."""
    first = not _signals
    if signum in (signal.SIGINT, signal.SIGTERM):
        _signals.append(signum)
    if first:
        _set_alarm(3)
    elif signum != signal.SIGTERM:  # schedulers send it twice
        raise_if_interrupted()


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again: Python drops what a destructor raises


def progress_bar(items: Iterable[T], title: str, total: int, unit: str = " images") -> Iterator[T]:
    """Yields the items, with a progress bar if they take more than a second. Stops at Ctrl-C and SIGTERM.

    Without a terminal there is no bar. (The bar of the training itself stands in `train.train_epoch`.)
    """
    for item in tqdm(items, title, total, unit=unit, delay=1, disable=None):
        raise_if_interrupted()
        yield item


# ------------------------------------------------------------------------------------------------ options


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations whose errors are one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        message = re.sub(r"(\S{60})\S{60,}", r"\1…", " ".join(message.split()))
        raise InputError(f"{message} (see python {self.prog} --help)")


def is_utf8(text: str) -> bool:
    """Whether a name from the disk or the command line can be written into a file; some are not valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def data_set_name(text: str) -> str:
    """argparse type: the plain name of a folder."""
    if not text or text.startswith(".") or re.search(r'[/\\:*?"<>|\0\n\r]', text) or not is_utf8(text):
        raise argparse.ArgumentTypeError(f"{text!a} is not the name of a folder under --data_path")
    return text


def natural_number(text: str) -> int:
    """argparse type: an integer in 1..999,999,999."""
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer below 10^9")
    return int(text)


def number_or_all(text: str) -> int | str:
    """argparse type: a positive integer, or "all"."""
    return text if text == "all" else natural_number(text)


def seed_number(text: str) -> int:
    """argparse type: an integer in 0..2**32-1."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer in 0..2**32-1")
    return int(text)


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def seconds(text: str) -> float:
    """argparse type: a finite number of 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return number


def fraction(text: str) -> float:
    """argparse type: a number above 0 and at most 1."""
    number = positive_float(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1")
    return number


def cosine(text: str) -> float:
    """argparse type: a similarity, from -1 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not -1 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from -1 to 1")
    return number


def member_list(text: str) -> list[int]:
    """argparse type: members such as "13-24" or "1,5,7-9", sorted."""
    members = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        bounds = natural_number(first), natural_number(last if dash else first)
        if not bounds[0] <= bounds[1] <= MAX_ENSEMBLE_SIZE:
            raise argparse.ArgumentTypeError(f"{part!r} is no range of members")
        members.update(range(bounds[0], bounds[1] + 1))
    return sorted(members)


def recall_list(text: str) -> list[int]:
    """argparse type: distinct positive integers, separated by commas."""
    ks = [natural_number(k) for k in text.split(",")]
    if len(set(ks)) < len(ks):
        raise argparse.ArgumentTypeError(f"{text!r} names a K twice")
    return ks


# ------------------------------------------------------------------------------------------------ the machine


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name: str) -> "torch.device":
    """The device for `auto`, `cuda`, `cuda:i`, `mps` or `cpu`. Raises InputError for one that is not there.

    Under torchrun, `auto` and `cuda` are each process's own GPU.
    """
    import torch

    has_mps, num_gpus = torch.backends.mps.is_available(), torch.cuda.device_count()
    if name == "auto":
        name = "mps" if has_mps else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    local_rank = os.environ.get("LOCAL_RANK", "")
    if name == "cuda" and local_rank.isdecimal() and num_gpus:
        name = f"cuda:{int(local_rank) % num_gpus}"  # some launchers show each process its GPU only
    if not re.fullmatch(r"cuda(:[0-9]{1,4})?|mps|cpu", name):
        raise InputError(f"--device {name} is not one of auto, cuda, cuda:i, mps, cpu")
    kind, _, index = name.partition(":")
    available = {"cuda": num_gpus, "mps": int(has_mps), "cpu": 1}[kind]
    if int(index or 0) >= available:
        kinds = {"cuda": "CUDA", "mps": "MPS"}[kind]
        have = f"{available} {kinds} devices, the last is {kind}:{available - 1}" if available else f"no {kinds} device"
        build = (
            "" if kind != "cuda" or torch.version.cuda or torch.version.hip else ", or PyTorch was built without CUDA"
        )
        raise InputError(f"--device {name}: this machine has {have}{build}")
    return torch.device(name)


def set_up_device(device: "torch.device", deterministic: bool) -> None:
    """Asks PyTorch for its fastest algorithms, or for deterministic ones."""
    import torch

    torch.backends.cudnn.benchmark = not deterministic  # picks the fastest convolution for each batch shape
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes no result
    if device.index is not None:
        torch.cuda.set_device(device)


# How memory that has run out is reported: PyTorch's allocators, then what cuBLAS and cuDNN say for want of workspace.
OUT_OF_MEMORY = re.compile(
    "out of memory|allocate memory|ALLOC_FAILED|ALLOCATION_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|"
    "unable to find an engine|unable to find a valid cuDNN algorithm",
    re.IGNORECASE,
)


def out_of_memory(error: Exception) -> bool:
    """Whether the machine or the device had too little memory. Most libraries say so by a plain RuntimeError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def with_less_memory(call: Callable[[int], T], size: int) -> T:
    """Returns call(size), or call(size // 2) and so on while memory is too short: no trained member is to be lost."""
    while True:
        try:
            return call(size)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not out_of_memory(error):
                raise
        size //= 2  # outside the handler, where what the failed call held is free again
