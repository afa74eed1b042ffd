"""Errors and exit codes, outputs, signals, options, devices, and what to do when memory runs out."""

import argparse
import io
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from dreml import cli
from dreml.cli import (
    MANY,
    InputError,
    Parser,
    RunError,
    Terminated,
    check_ranges,
    counted,
    duration,
    format_problems,
    one_line,
    out_of_memory,
    pick_device,
    run_main,
    set_up_device,
    with_less_memory,
)


def raising(error: BaseException | None):
    """A script that fails with this error."""

    def run():
        if error is not None:
            raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("bad"), 2), (RunError("bad"), 1), (OSError(28, "bad"), 1), (KeyboardInterrupt(), 130), (None, 0)],
)
def test_exit_codes_and_single_lines(error, code, capsys):
    assert run_main("script.py", raising(error), "less") == code
    message = capsys.readouterr().err
    assert message == "" if error is None else re.fullmatch(r"script\.py: .*\n", message)


def test_texts_for_people():
    assert one_line(ValueError("first\n  second")) == "ValueError: first second"
    assert len(one_line(ValueError("x" * 500))) == 200
    problems = [f"problem {number}" for number in range(1, 2022)]
    assert format_problems(problems[:20]).splitlines() == ["", *(f"  {problem}" for problem in problems[:20])]
    assert format_problems(problems).splitlines()[20:] == ["  problem 20", "  … and 2,001 more"]
    assert [counted(1, "image"), counted(2000, "class")] == ["1 image", "2,000 classes"]
    texts = [duration(seconds) for seconds in (0.01, 89, 90, 420, 5300, 5400)]
    assert texts == ["1 second", "89 seconds", "2 minutes", "7 minutes", "88 minutes", "1.5 hours"]


SCRIPT = """
import sys
from dreml.cli import progress_bar, run_main

def run():
    for number in progress_bar(range(3000), "title", 3000):
        print("line", number, flush=number % 100 == 0)
    print("a warning", file=sys.stderr)
    open(sys.argv[1], "w").write("done")

sys.exit(run_main("script.py", run, ""))
"""


@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        (">&-", 0),
        ("2>&- >/dev/null", 0),
        ("<&- >&- 2>&-", 0),
        ("| head -1 >/dev/null", 141),
        ("2>&1 | true", 141),
        (">/dev/full", 1),
    ],
)
def test_the_work_is_done_whatever_the_output_is(tmp_path, redirection, code):
    """Closed, a pipe whose reader is gone, a full disk: no traceback, and nothing of Python's own."""
    command = f"'{sys.executable}' -c '{SCRIPT}' '{tmp_path}/file' {redirection}; exit ${{PIPESTATUS[0]}}"
    root = os.path.dirname(os.path.dirname(cli.__file__))
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True)
    full = "script.py: done, but its output could not be written: [Errno 28] No space left on device\n"
    assert done.returncode == code and done.stderr in ("", "a warning\n", *[f"a warning\n{full}"] * (code == 1))
    assert (tmp_path / "file").read_text() == "done"


def test_characters_that_the_terminal_lacks_are_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert run_main("x.py", lambda: print("猫 and ant"), "") == 0
    assert out.buffer.getvalue().decode().rstrip() == r"\u732b and ant"


@pytest.mark.parametrize(("number", "code", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_a_signal_ends_a_run_at_once_in_one_line(capsys, request, number, code, word):
    """Ctrl-C also where it was ignored when the script started, as in the background of a shell's script."""
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, earlier))
    reached = []

    def run():
        try:
            os.kill(os.getpid(), getattr(signal, number))
            reached.append("what comes after it")
        finally:
            if number == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it twice
            reached.append("the end of a block")

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run_main("script.py", run, "less") == code and reached == ["the end of a block"]
    assert capsys.readouterr().err == f"script.py: {word}; run the same command again to go on\n"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert run_main("script.py", raising(Terminated()), "less", resumable=False) == 143
    assert capsys.readouterr().err == "script.py: terminated\n"


def test_options_are_not_abbreviated_and_errors_are_one_line():
    parser = Parser(prog="script.py")
    parser.add_argument("--ensemble_size", type=int)
    assert parser.parse_args(["--ensemble_size", "3"]).ensemble_size == 3
    with pytest.raises(InputError, match=r"^unrecognized arguments: --ensemble 3 \(see python script.py --help\)$"):
        parser.parse_args(["--ensemble", "3"])
    with pytest.raises(InputError, match=r"^unrecognized arguments: a b \("):
        parser.parse_args(["a\nb"])


@pytest.mark.parametrize(
    ("kind", "right", "wrong", "message"),
    [
        (
            cli.number_list,
            {"13-15": [13, 14, 15], "9,1-3": [9, 1, 2, 3], "1-10000": list(range(1, 10_001)), "1,2,4": [1, 2, 4]},
            ["3-1", "1-99999", "1-", "-3", "", "1,,2", "0", "0,1", "1-2-3", "1234567890"],
            "is no positive integer, and no range of them",
        ),
        (cli.number_list, {"1": [1]}, ["2,1,2", "9,1-3,2"], "names a number twice"),
        (
            cli.data_set_name,
            {"car": "car", "Ünï 猫": "Ünï 猫", "a.b-c": "a.b-c"},
            ["", "..", ".car", "../car", "a/b", "a\\b", "a:b", '"a"', "<a", "a|b", "a\0", "a\rb", "a\udc80"],
            "is not the name of a folder",
        ),
    ],
)
def test_options_are_read_or_refused(kind, right, wrong, message):
    assert {text: kind(text) for text in right} == right
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=message) as error:
            kind(text)
        str(error.value).encode()  # it can be printed


@pytest.mark.parametrize(
    ("value", "limits", "problem"),
    [
        (0, (1, MANY), "0 has to be at least 1"),
        (2049, (1, 2048), "2049 has to be at least 1 and at most 2,048"),
        (0.0, (1e-9, 1), "0.0 has to be above 0 and at most 1"),
        (float("nan"), (-1, 1), "nan has to be at least -1 and at most 1"),
    ],
)
def test_numbers_outside_their_range_are_refused(value, limits, problem):
    with pytest.raises(InputError, match=f"^--number {problem}$"):
        check_ranges(argparse.Namespace(number=value), number=limits)
    for inside in (*limits, None):
        check_ranges(argparse.Namespace(number=inside), number=limits)


@pytest.mark.parametrize(
    ("option", "local_rank", "gpus", "mps", "device"),
    [
        ("auto", None, 4, True, "cuda"),
        ("auto", None, 0, True, "mps"),
        ("auto", "1", 0, False, "cpu"),
        ("auto", "2", 4, False, "cuda:2"),  # each process of torchrun takes its GPU
        ("cuda", "3", 1, False, "cuda:0"),  # a launcher that shows each process its own GPU
        ("cuda:1", "2", 4, False, "cuda:1"),
        ("tpu", None, 2, False, None),
        ("cpu:0", None, 2, False, None),
        ("cuda:2", None, 2, False, None),
        ("mps", None, 2, False, None),
    ],
)
def test_devices(monkeypatch, option, local_rank, gpus, mps, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("LOCAL_RANK", local_rank) if local_rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
    if device:
        assert pick_device(option) == torch.device(device)
        return
    message = f"^device '{option}' is not there; this machine has cuda, cpu, cuda:0, cuda:1; .* built without CUDA$"
    with pytest.raises(InputError, match=message):
        pick_device(option)


def test_a_device_is_set_up_for_speed_or_for_the_same_bits(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        set_up_device(torch.device("cuda:1"), deterministic=False, threads=3)
        assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ and chosen == [3, torch.device("cuda:1")]
        set_up_device(torch.device("cpu"), deterministic=True)
        assert not torch.backends.cudnn.benchmark and torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_environment_says_what_a_number_depends_on(monkeypatch):
    """Without git, there is no commit."""
    here = cli.environment(torch.device("cpu"))
    assert (here["torch"], here["threads"]) == (torch.__version__, 1)
    assert here["device"].startswith("cpu (")
    assert here["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", here["commit"])
    monkeypatch.setenv("PATH", "")
    assert cli.environment(torch.device("cpu")) == here | {"commit": None}


TOO_LITTLE_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    MemoryError(),
]
OTHER_ERRORS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    ValueError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", TOO_LITTLE_MEMORY, ids=repr)
def test_every_kind_of_out_of_memory_is_one_line(capsys, error):
    assert out_of_memory(error)
    assert run_main("script.py", raising(error), "less") == 1
    assert capsys.readouterr().err == "script.py: failed: out of memory; try less\n"


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=repr)
def test_other_errors_are_not_taken_for_out_of_memory(error):
    assert not out_of_memory(error)
    with pytest.raises(type(error), match=re.escape(str(error))):
        run_main("script.py", raising(error), "less")
    with pytest.raises(type(error), match=re.escape(str(error))):
        with_less_memory(lambda size: raising(error)(), 8)


def test_less_memory_is_tried_until_it_fits(monkeypatch):
    tried = []

    def call(size, largest):
        tried.append(size)
        if size > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return f"with {size}"

    assert with_less_memory(lambda size: call(size, 2), 20) == "with 2"
    with pytest.raises(torch.OutOfMemoryError):
        with_less_memory(lambda size: call(size, 0), 5)
    assert tried == [20, 10, 5, 2, 5, 2, 1]
