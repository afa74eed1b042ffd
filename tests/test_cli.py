"""Errors and exit codes, signals, options, devices, and what to do when memory runs out."""

import argparse
import contextlib
import io
import itertools
import os
import re
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

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
    format_problems,
    num_cores,
    one_line,
    out_of_memory,
    pick_device,
    progress_bar,
    run_main,
    set_up_device,
    with_less_memory,
)

# ------------------------------------------------------------------------------------------------ errors


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


def test_warnings_are_one_line_without_their_place_in_the_code():
    before, texts = warnings.formatwarning, []
    run_main("script.py", lambda: texts.append(warnings.formatwarning("such", UserWarning, "file.py", 3)), "less")
    assert texts == ["warning: such\n"] and warnings.formatwarning is before


def test_an_error_on_one_line():
    assert one_line(ValueError("first\n  second")) == "ValueError: first second"
    assert len(one_line(ValueError("x" * 500))) == 200


def test_problems_are_listed_up_to_20():
    problems = [f"problem {number}" for number in range(1, 2022)]
    assert format_problems(problems[:20]).splitlines() == ["", *(f"  {problem}" for problem in problems[:20])]
    for number, more in ((21, "1"), (2021, "2,001")):
        assert format_problems(problems[:number]).splitlines()[20:] == ["  problem 20", f"  … and {more} more"]


def test_characters_that_the_terminal_lacks_are_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert run_main("x.py", lambda: print("猫 and ant"), "") == 0
    out.flush()
    assert out.buffer.getvalue().decode().rstrip() == r"\u732b and ant"


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "code", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_a_signal_ends_a_run_at_once_in_one_line(capsys, number, code, word):
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


def test_a_thread_may_run_a_script_too():
    """There Python cannot handle signals."""
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(run_main, "script.py", lambda: None, "less").result() == 0


def test_what_does_not_go_on_does_not_say_so(capsys):
    assert run_main("script.py", raising(Terminated()), "less", resumable=False) == 143
    assert capsys.readouterr().err == "script.py: terminated\n"


def test_a_progress_bar_yields_the_items(capsys, monkeypatch):
    """Without a terminal there is no bar, however long it takes."""
    monkeypatch.setattr("tqdm.std.time", itertools.count(step=10).__next__)
    assert list(progress_bar(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------ options


def test_options_are_not_abbreviated_and_errors_are_one_line():
    parser = Parser(prog="script.py")
    parser.add_argument("--ensemble_size", type=int)
    assert parser.parse_args(["--ensemble_size", "3"]).ensemble_size == 3
    with pytest.raises(InputError, match=r"^unrecognized arguments: --ensemble 3 \(see python script.py --help\)$"):
        parser.parse_args(["--ensemble", "3"])
    with pytest.raises(InputError, match=r"^argument --ensemble_size: invalid int value: '1{59}…"):
        parser.parse_args(["--ensemble_size", "1" * 5000])
    with pytest.raises(InputError, match=r"^unrecognized arguments: a b \("):
        parser.parse_args(["a\nb"])


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("member_list", {"13-15": [13, 14, 15], "9,1-3,2": [1, 2, 3, 9], "1-10000": list(range(1, 10_001))}),
        ("recall_list", {"1,2,4,8": [1, 2, 4, 8], "8,1": [8, 1]}),
        ("data_set_name", {"car": "car", "Ünï 猫": "Ünï 猫", "a.b-c": "a.b-c"}),
    ],
)
def test_options_are_read(kind, texts):
    for text, value in texts.items():
        result = getattr(cli, kind)(text)
        assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("kind", "texts", "message"),
    [
        ("member_list", ["3-1", "1-99999", "10001"], "is no range of members"),
        ("member_list", ["1-", "-3", "", "1,,2", "0", "1-2-3"], "is no range of members"),
        ("recall_list", ["1,1", "2,1,2"], "names a K twice"),
        ("recall_list", ["1,,2", "0,1", "", "1-2", "1,1000000000"], "is no list of positive integers"),
        ("data_set_name", ["", ".", "..", ".car", "../car", "a/b", "a\\b", "a:b", "a*", "a?"], "is not the name"),
        ("data_set_name", ['"a"', "<a", "a>", "a|b", "a\0", "a\nb", "a\rb", "a\udc80"], "is not the name of a folder"),
    ],
)
def test_wrong_options_are_refused(kind, texts, message):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=message) as error:
            getattr(cli, kind)(text)
        str(error.value).encode()  # it can be printed


@pytest.mark.parametrize(
    ("value", "limits", "problem"),
    [
        (0, (1, MANY), "0 has to be at least 1"),
        (2049, (1, 2048), "2049 has to be at least 1 and at most 2,048"),
        (0.0, (1e-9, 1), "0.0 has to be above 0 and at most 1"),
        (float("nan"), (-1, 1), "nan has to be at least -1 and at most 1"),
        (float("inf"), (1e-9, MANY), "inf has to be above 0"),
    ],
)
def test_numbers_outside_their_range_are_refused(value, limits, problem):
    with pytest.raises(InputError, match=f"^--number {problem}$"):
        check_ranges(argparse.Namespace(number=value), number=limits)
    for inside in (*limits, None):
        check_ranges(argparse.Namespace(number=inside), number=limits)


# ------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ("option", "local_rank", "gpus", "device"),
    [
        ("auto", "2", 4, "cuda:2"),
        ("cuda", "3", 4, "cuda:3"),
        ("cuda", "3", 1, "cuda:0"),  # a launcher that shows each process its own GPU
        ("cuda:1", "2", 4, "cuda:1"),
        ("auto", None, 4, "cuda"),
        ("auto", "1", 0, "cpu"),
    ],
)
def test_each_process_of_torchrun_takes_its_gpu(monkeypatch, option, local_rank, gpus, device):
    offer_devices(monkeypatch, gpus)
    monkeypatch.setenv("LOCAL_RANK", local_rank) if local_rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick_device(option) == torch.device(device)


def offer_devices(monkeypatch, gpus: int, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_auto_is_cuda_else_mps_else_cpu(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for gpus, mps, expected in ((1, True, "cuda"), (1, False, "cuda"), (0, True, "mps"), (0, False, "cpu")):
        offer_devices(monkeypatch, gpus, mps)
        assert pick_device("auto") == torch.device(expected)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("tpu", "--device tpu is not one of auto, cuda, cuda:i, mps, cpu"),
        ("cpu:", "--device cpu: is not one of"),
        ("cpu:0", "--device cpu:0 is not one of"),
        ("cuda:x", "--device cuda:x is not one of"),
        ("cuda:2", "--device cuda:2: this machine has 2 CUDA devices, the last is cuda:1"),
        ("mps", "--device mps: this machine has no MPS device$"),
    ],
)
def test_devices_that_are_not_there_are_refused(monkeypatch, option, message):
    offer_devices(monkeypatch, gpus=2)
    assert pick_device("cuda:1") == torch.device("cuda:1") and pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=f"^{message}"):
        pick_device(option)


def test_a_machine_without_cuda_is_told_from_a_pytorch_without(monkeypatch):
    offer_devices(monkeypatch, gpus=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for option in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match=f"^--device {option}: this machine has no CUDA device$"):
            pick_device(option)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match=r"no CUDA device, or PyTorch was built without CUDA$"):
        pick_device("cuda")


def test_a_device_is_set_up_for_speed_or_for_the_same_bits(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")

    def asked() -> tuple[str, bool, bool]:
        kind = "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "error"
        settings = (torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory)
        return kind if torch.are_deterministic_algorithms_enabled() else "fast", *settings

    try:
        set_up_device(torch.device("cpu"), deterministic=False)
        assert asked() == ("fast", True, True) and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        set_up_device(torch.device("cpu"), deterministic=True)
        assert asked() == ("warn", False, False) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
        set_up_device(torch.device("cuda"), deterministic=True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8" and not chosen  # the user's choice stays
        set_up_device(torch.device("cuda:1"), deterministic=False)
        assert asked()[0] == "fast" and chosen == [torch.device("cuda:1")]
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_number_of_cores():
    with contextlib.suppress(AttributeError):  # Linux only
        assert num_cores() == len(os.sched_getaffinity(0))
    assert num_cores() >= 1


# ------------------------------------------------------------------------------------------------ too little memory

TOO_LITTLE_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("CUDA error: out of memory"),
    MemoryError(),
]
OTHER_ERRORS = [
    RuntimeError("another one"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("Expected all tensors to be on the same device"),
    ValueError("CUDA out of memory"),
    ValueError("can't allocate memory"),
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
    tried = []
    with pytest.raises(type(error), match=re.escape(str(error))):
        with_less_memory(lambda size: tried.append(size) or raising(error)(), 8)
    assert tried == [8]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_what_never_fits_is_an_error(error):
    tried = []

    def call(size):
        tried.append(size)
        raise error

    with pytest.raises(type(error)):
        with_less_memory(call, 5)
    assert tried == [5, 2, 1]


def test_what_fits_at_last_is_the_result():
    def call(size):
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return f"with {size}"

    assert with_less_memory(call, 20) == "with 2"
