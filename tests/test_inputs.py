"""Data sets of which one file is truncated, replaced or missing: cached, or refused in one line."""

import shutil

import pytest
from builders import jpeg_bytes, write_car_devkit, write_csv, write_cub, write_image_folder, write_isc, write_sop

import data_utils

WRITERS = {"car": write_car_devkit, "cub": write_cub, "sop": write_sop, "isc": write_isc}
WRITERS |= {"folder": write_image_folder, "listed": write_csv}
CONTENTS = {  # -> what becomes of the bytes of a file; None: it is missing
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) * 2 // 3],
    "a web page": lambda content: b"<!DOCTYPE html>\n<html>Too many requests</html>\n",
    "an image": lambda content: jpeg_bytes(),
    "a list": lambda content: b"1 1\n2 2\n",
    "zeros": lambda content: bytes(len(content)),
    "in UTF-16": lambda content: content.decode("latin-1").encode("utf-16"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_not_what_it_should_be(tmp_path, capsys, threads, name):
    WRITERS[name](tmp_path / "good")
    files = [path.relative_to(tmp_path / "good") for path in sorted((tmp_path / "good").rglob("*")) if path.is_file()]
    images = [path for path in files if path.suffix.lower() in (".jpg", ".png")]
    lists = [path for path in files if path not in images]
    for path in [*lists, images[0], images[-1]]:
        for kind, change in CONTENTS.items():
            folder = tmp_path / "data" / name
            shutil.copytree(tmp_path / "good", folder)
            content = change((folder / path).read_bytes())
            (folder / path).unlink()
            if content is not None:
                (folder / path).write_bytes(content)
            code = data_utils.main(["--data_path", str(tmp_path / "data"), "--data_name", name, "--image_size", "16"])
            errors = capsys.readouterr().err
            refusals = [line for line in errors.splitlines() if line.startswith("data_utils.py: ")]
            assert code in (0, 2) and len(refusals) == (code == 2) and "Traceback" not in errors, (path, kind, errors)
            if path in images and kind not in ("missing", "an image"):
                assert code == 2 and f"{path}: unreadable (" in errors, (path, kind, errors)
            assert {item.name for item in tmp_path.iterdir()} == {"good", "data"}
            shutil.rmtree(folder)
