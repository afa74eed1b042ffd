"""figures/style.py: characters that fonts lack."""

import io

import numpy as np
import pytest
from dreml.figures import style
from PIL import Image


def fonts(*names: str) -> list:
    """The installed upright fonts of these names."""
    from matplotlib import font_manager

    entries = font_manager.fontManager.ttflist
    return [font for font in entries if font.name in names and (font.style, font.weight) == ("normal", 400)]


def drawn(text: str) -> np.ndarray:
    """A picture of the text, `(H, W) uint8`."""
    with style.drawing():
        figure = style.new_figure(1)
        figure.text(0.1, 0.5, text)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("L"))


def glyph_warnings(recwarn) -> list[str]:
    return [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


def test_characters_without_a_font_are_named_and_drawn_as_boxes(monkeypatch, recwarn):
    """DejaVu Sans has no Chinese; a "$" is no formula, and a line break is a box."""
    monkeypatch.setattr("matplotlib.font_manager.fontManager.ttflist", fonts("DejaVu Sans"))
    text = style.printable("a\n\x00 $\\frac{$ é")
    assert text == "a□□ $\\frac{$ é" and (drawn(text) < 128).any() and not glyph_warnings(recwarn)
    with pytest.warns(UserWarning, match="missing from"):
        picture = drawn("猫")
    assert (picture < 128).any()


def test_another_font_is_used_for_what_dejavu_lacks(monkeypatch, recwarn):
    """STIX stands for a font with many characters."""
    from matplotlib import font_manager, rcParams

    dejavu, stix = (
        set(font_manager.get_font(fonts(name)[0].fname).get_charmap()) for name in ("DejaVu Sans", "STIXGeneral")
    )
    character = next(chr(code) for code in sorted(stix - dejavu) if chr(code).isprintable())
    monkeypatch.setattr(style, "WIDE_FONTS", ("No Such Font", "STIXGeneral"))
    with style.drawing():
        assert rcParams["font.family"] == ["DejaVu Sans", "STIXGeneral"]
    picture = drawn(character)
    assert (picture < 128).any() and not glyph_warnings(recwarn)
    monkeypatch.setattr(style, "WIDE_FONTS", ())
    with pytest.warns(UserWarning, match="missing from"):
        assert (drawn(character) != picture).any()
