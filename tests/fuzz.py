"""Malformed and hostile input, generated. It succeeds or is refused in one line, and nothing is written elsewhere.

`CASES` has a function for each kind of input; the tests call them with few and with many examples.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import (
    TINY,
    jpeg_bytes,
    write_car_annotations,
    write_csv,
    write_cub,
    write_image_folder,
    write_isc,
    write_sop,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import data_utils
import evaluate
import retrieve
import train
from dreml.cli import InputError


class Box:
    """A folder with data and results, and beside them everything that must not be touched."""

    def __init__(self, root: Path, tiny_data: Path, pooled_run: Path, patch: pytest.MonkeyPatch):
        self.root, self.data, self.results = root, root / "box" / "data", root / "box" / "results"
        self.tiny_data, self.pooled_run, self.patch = tiny_data, pooled_run, patch
        self.data.mkdir(parents=True)
        (root / "box" / "elsewhere").mkdir()
        patch.chdir(root / "box" / "elsewhere")

    def add_tiny_data(self) -> None:
        shutil.copytree(self.tiny_data, self.data, dirs_exist_ok=True)

    def call(self, main: Callable, argv: list[str]) -> tuple[int, str]:
        """Runs a script, which has to end with 0 or 2. Returns the code and what it printed as its errors."""
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                code = main(argv)
            except SystemExit as end:  # --help
                code = end.code
        text = errors.getvalue()
        script = f"{main.__module__}.py"
        refusals = [line for line in text.splitlines() if line.startswith(f"{script}: ")]
        assert code in (0, 2) and len(refusals) == (code == 2) and "Traceback" not in text, (code, text)
        assert [path.name for path in self.root.iterdir()] == ["box"]
        folders = {path.name for path in (self.root / "box").iterdir()}
        assert folders - {"results"} == {"data", "elsewhere"}, folders
        assert not list((self.root / "box" / "elsewhere").iterdir())
        return code, text

    def preprocess(self, *options: str) -> tuple[int, str]:
        here = ["--data_path", str(self.data), "--image_size", "16", "--num_workers", "2"]
        return self.call(data_utils.main, [*options, *here])

    def train(self, *options: str) -> tuple[int, str]:
        here = ["--data_path", str(self.data), "--results_path", str(self.results)]
        return self.call(train.main, [*TINY, *options, *here])


def check(examples: int, strategy: st.SearchStrategy, one: Callable) -> None:
    """Calls `one` with so many drawn values, the same ones each time."""
    phases = [Phase.explicit, Phase.generate, Phase.shrink]
    chosen = settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=phases)
    settings(chosen, suppress_health_check=list(HealthCheck))(given(strategy)(one))()


def reached(*_):
    """Takes the place of what takes long."""
    raise InputError("training would begin")


# ------------------------------------------------------------------------------------------------ options

numbers = st.one_of(st.integers(), st.floats(), st.integers(1, 9)).map(str)
lists = st.lists(st.integers(-1, 40), max_size=4).map(lambda values: ",".join(map(str, values)))
words = (
    "tiny car demo none imagenet resnet18 vgg cpu cuda cuda:1 auto fp16 1-2 3-1 - -- .. ../x / ~ nan 1e400 é ٣".split()
)
words += ["", "a b", "\udcff", "\0", "1" * 5000, "x" * 5000]
values = st.one_of(numbers, lists, st.sampled_from(words), st.text(max_size=8))


def argument_lists(module) -> st.SearchStrategy:
    """Options of a script, real and garbled, with values of all kinds."""
    needed = {retrieve: ["run", "--worst"], evaluate: ["run"]}
    known = module.parse_args(needed.get(module, []))
    options = st.sampled_from([f"--{name}" for name in [*sorted(vars(known)), "help", "unknown"]])
    pair = st.tuples(options, values)
    part = st.one_of(pair.map(list), pair.map(lambda drawn: ["=".join(drawn)]), st.tuples(options), st.tuples(values))
    return st.lists(part, max_size=5).map(lambda parts: [text for part in parts for text in part])


def options_of_train(box: Box, examples: int) -> None:
    box.add_tiny_data()
    box.patch.setattr(train, "finish_member", reached)
    box.patch.setattr(torch, "set_num_threads", lambda number: None)  # later tests compute on one
    codes = set()

    def one(argv):
        shutil.rmtree(box.results, ignore_errors=True)
        code, text = box.train(*argv)
        codes.add((code, "training would begin" in text))

    check(examples, argument_lists(train), one)
    assert codes >= {(2, False), (2, True)}, codes


def options_of_data_utils(box: Box, examples: int) -> None:
    box.add_tiny_data()

    def one(argv):
        box.preprocess(*argv)

    check(examples, argument_lists(data_utils), one)


def options_of_reader(module, box: Box, examples: int) -> None:
    """evaluate.py and retrieve.py, on a whole run and on one whose test.csv is garbled. No run folder changes."""
    if module is retrieve:
        box.patch.setattr(retrieve, "draw_neighbours", lambda *_: None)
    box.results.mkdir()
    folder, out, codes = box.results / "run", str(box.results / "out"), set()
    content = (box.pooled_run / "test.csv").read_bytes()
    first, last = {
        evaluate: (["--recalls", "1,2"], ["--output", out]),
        retrieve: (["--worst", "3"], ["--output", out, "--export", out]),  # of two, the last counts
    }[module]

    def one(drawn):
        argv, changed = drawn
        for path in box.results.iterdir():
            shutil.rmtree(path)
        shutil.copytree(box.pooled_run, folder, copy_function=os.link)
        (folder / "test.csv").unlink()
        (folder / "test.csv").write_bytes(changed or content)
        codes.add(box.call(module.main, [str(folder), *first, *argv, *last])[0])
        assert {path.name for path in folder.iterdir()} == {path.name for path in box.pooled_run.iterdir()}

    garbled_csv = st.composite(lambda draw: ([], garbled(draw, content)))()
    check(examples, st.tuples(argument_lists(module), st.none()) | garbled_csv, one)
    assert codes == {0, 2}, codes


# ------------------------------------------------------------------------------------------------ raw data sets


def garbled(draw, content: bytes) -> bytes:
    """Bytes with pieces cut out, repeated, replaced or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(start + draw(st.sampled_from([0, 1, 2, 20, 10**6])), len(content))
        piece = draw(st.binary(max_size=6) | st.sampled_from(PIECES) | st.just(bytes(content[start:stop])))
        content[start:stop] = piece * draw(st.sampled_from([1, 1, 2, 50]))
    return bytes(content)


PIECES = [b"", b"\r\n", b"\n", b"\xef\xbb\xbf", b"\0", b"\xff\xfe", b"../../x ", b"/etc/passwd ", b"C:\\x ", b"-1 "]
PIECES += [b"99999 ", b"1e3 ", b"<html>", b"\x1c", b'"', b",", b"NaN", b"[", b"{}", b"null", b"1"]
PIECES += [b"[" * 100_000]
PIECES += ["é ".encode(), "\u2028".encode()]


@st.composite
def files(draw, contents: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a data set, of which one or two are garbled or missing."""
    changed = dict(contents)
    for name in draw(st.sets(st.sampled_from(sorted(contents)), max_size=2)):
        if name.endswith(".mat"):  # scipy crashes on some garbled ones; a download is truncated
            changed[name] = contents[name][: draw(st.integers(0, len(contents[name])))]
        else:
            changed[name] = garbled(draw, contents[name])
        if draw(st.integers(0, 4)) == 0:
            del changed[name]
    return changed


def written(write: Callable, root: Path) -> dict[str, bytes]:
    """What `write` writes: relative path -> content."""
    write(root)
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    shutil.rmtree(root)
    return found


def write_car_small(root: Path) -> None:
    rows = [("car_ims/1.jpg", 1), ("car_ims/2.jpg", 196)]
    write_car_annotations(root / "cars_annos.mat", "relative_im_path", rows)
    for path, _ in rows:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(jpeg_bytes())


def raw_data_set(name: str, write: Callable, box: Box, examples: int) -> None:
    """Lists, annotation files and images alike."""
    contents, codes = written(write, box.root.parent / "good"), set()

    def one(changed):
        shutil.rmtree(box.data / name, ignore_errors=True)
        for path, content in changed.items():
            (box.data / name / path).parent.mkdir(parents=True, exist_ok=True)
            (box.data / name / path).write_bytes(content)
        codes.add(box.preprocess("--data_name", name)[0])

    check(examples, files(contents), one)
    assert codes == {0, 2}, codes


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=20)


def names_of_classes_and_images(box: Box, examples: int) -> None:
    """Whatever a file system accepts."""

    def one(drawn):
        shutil.rmtree(box.data / "named", ignore_errors=True)
        for split in ("train", "test"):
            for class_name, image_name in drawn:
                path = box.data / "named" / split / class_name / f"{image_name}.jpg"
                if len(os.fsencode(path.name)) < 250 and class_name not in (".", ".."):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(jpeg_bytes())
        box.preprocess("--data_name", "named")

    check(examples, st.lists(st.tuples(names, names), min_size=1, max_size=4), one)


def images_of_any_size_and_mode(box: Box, examples: int) -> None:
    """1 pixel wide, palettes, 16 bits, EXIF: decoded, or refused with its name."""
    modes = st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
    sides = st.integers(1, 40) | st.just(300)

    def one(drawn):
        mode, width, height, suffix, orientation = drawn
        shutil.rmtree(box.data / "sized", ignore_errors=True)
        image, exif = Image.new(mode, (width, height)), Image.Exif()
        exif[0x0112] = orientation
        for split in ("train", "test"):
            path = box.data / "sized" / split / "a" / f"image{suffix}"
            path.parent.mkdir(parents=True)
            try:
                image.save(path, exif=exif)
            except (OSError, ValueError, KeyError, TypeError):  # the format does not know the mode
                return
        box.preprocess("--data_name", "sized")

    suffixes = st.sampled_from([".png", ".jpg", ".tif", ".bmp", ".gif", ".webp"])
    check(examples, st.tuples(modes, sides, sides, suffixes, st.integers(0, 9)), one)


CASES: dict[str, Callable[[Box, int], None]] = {
    "options of train.py": options_of_train,
    "options of data_utils.py": options_of_data_utils,
    "options of evaluate.py": partial(options_of_reader, evaluate),
    "options of retrieve.py": partial(options_of_reader, retrieve),
    "raw car": partial(raw_data_set, "car", write_car_small),
    "raw cub": partial(raw_data_set, "cub", write_cub),
    "raw sop": partial(raw_data_set, "sop", write_sop),
    "raw isc": partial(raw_data_set, "isc", write_isc),
    "raw folders": partial(raw_data_set, "folder", write_image_folder),
    "raw images.csv": partial(raw_data_set, "listed", write_csv),
    "names": names_of_classes_and_images,
    "images": images_of_any_size_and_mode,
}
