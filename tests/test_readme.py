"""What the texts promise: their commands are accepted, their links lead somewhere; and --help.

Their Python runs in test_end_to_end.py.
"""

import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from processes import ROOT


def scripts_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if '__name__ == "__main__"' in path.read_text("utf-8")]


BENCHMARKS = [f"-m benchmarks.{path.stem}" for path in scripts_in(ROOT / "benchmarks")]
SCRIPTS = [*(path.name for path in scripts_in(ROOT)), *BENCHMARKS]
MODULES = {name: importlib.import_module(name.removesuffix(".py").removeprefix("-m ")) for name in SCRIPTS}
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(PAGES)}


@pytest.mark.parametrize("name", MODULES)
def test_help_fits_a_screen_and_explains_every_option(name, monkeypatch):
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: parsers.append(self))
    with pytest.raises(SystemExit, match="0"):
        MODULES[name].parse_args(["--help"])
    (parser,) = parsers
    text = parser.format_help()
    assert 10 < text.count("\n") <= 60 and max(map(len, text.splitlines())) <= 120
    assert len(parser._actions) > 4 and not [action.dest for action in parser._actions if not action.help]


def code_lines(text: str) -> list[str]:
    """Lines of a text's code blocks and its indented lines, and its pieces of code between backticks."""
    block = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    lines = [line for content in block.findall(text) for line in content.splitlines()]
    text = block.sub("", text)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return lines + re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)


def commands(lines: list[str]) -> list[tuple[str, list[str]]]:
    """(script, options) of each command that calls a script of ours. An explanation follows after two spaces."""
    found = []
    for part in (part for line in lines for part in line.split(" && ")):
        command = re.match(r"(?:python|torchrun) (?:--\S+ )*(\w+\.py|-m benchmarks\.\w+)(?= |$)(.*)", part)
        if command:
            options = command[2].split("  ")[0].removesuffix("...")
            found.append((command[1], shlex.split(options, comments=True)))
    return found


@pytest.mark.parametrize("name", [*TEXTS, *MODULES])
def test_every_command_is_accepted(name):
    """Option names and values; most commands take too long to run here."""
    found = commands(code_lines(TEXTS[name] if name in TEXTS else MODULES[name].__doc__))
    for script, options in found:
        if "timm:" in " ".join(options) and importlib.util.find_spec("timm") is None:  # an extra
            continue
        if options != ["--help"]:
            MODULES[script].parse_args(options)
    scripts = {script for script, _ in found}
    if name == "README.md":
        assert {"data_utils.py", "train.py", "evaluate.py", "retrieve.py"} <= scripts
    if name == "benchmarks/README.md":
        assert scripts >= set(BENCHMARKS)
    if name in MODULES:
        assert scripts


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_of_a_page_leads_somewhere(name):
    page = ROOT / name
    text = TEXTS[name]
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text)
    links += [(source, "") for source in re.findall(r'src="(.*?)"', text)]
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), anchor


def anchors(page: Path) -> list[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
