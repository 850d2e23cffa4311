"""Pictures of patches: in a terminal and as a figure; every character of the text is in them."""

import io

import matplotlib
import pytest
from rich.cells import cell_len
from rich.console import Console

import blt_hf
from blt_hf import BltPatches
from blt_hf.model.patching_blt import PatchingRule
from blt_hf.patches import pictures
from blt_hf.patches.display import PATCH_COLOURS
from blt_hf.patches.pictures import font_with, patches_text, plot_patches


matplotlib.use("Agg")

import matplotlib.pyplot as plt

from helpers.models import make_model, tiny_config
from helpers.texts import encode


def made(text, lengths, entropies=None) -> BltPatches:
    ids = encode(text)
    assert sum(lengths) == len(ids)
    rule = PatchingRule("entropy", threshold=1.0) if entropies else PatchingRule("space")
    return BltPatches(ids, lengths, entropies, False, rule)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def test_terminal_colours_separators_and_signs():
    patches = made("ab\x1b[31m é", [1, 2, 5, 2, 1])  # the last boundary is inside the é
    (line,) = patches_text(patches)
    assert line.plain == "<s>ab␛[31m é·"
    fills = {span.style.bgcolor.name: line.plain[span.start : span.end] for span in line.spans}
    assert fills[PATCH_COLOURS[1][0]] == "ab" and fills[PATCH_COLOURS[3][0]] == " é"
    assert patches_text(patches, separator="|")[0].plain == "<s>|ab|␛[31m| é|·"
    assert patches_text(patches, spell=True, separator="|")[0].plain == "<s>|ab|␛[31m| C3|A9"
    printed = io.StringIO()
    Console(file=printed, color_system="truecolor", force_terminal=True).print(line)
    assert "\x1b[31m" not in printed.getvalue() and "\x1b[" in printed.getvalue()


def test_terminal_lines_fit_wide_characters_and_break_at_newlines():
    text = "速い狐の跳躍する森\nab " * 3
    patches = made(text, [1, *[28, 3] * 3])
    lines = patches_text(patches, width=20)
    assert all(cell_len(line.plain) <= 20 for line in lines) and len(lines) > 6
    assert "".join(line.plain for line in lines) == "<s>" + text.replace("\n", "␊")
    with pytest.raises(ValueError, match="`width`"):
        patches_text(patches, width=3)


def test_terminal_bars_stand_above_their_characters():
    patches = made("a速bc", [1, 4, 2], [0.5, 0.1, 2.0, 0.2, 4.0, 0.0, 9.9])
    bars, line = patches_text(patches, show_entropies=True)
    assert line.plain == "<s>a速bc" and cell_len(bars.plain) == cell_len(line.plain)
    assert bars.plain == "   ▁▂ ▄▁"  # of a character of several bytes, the highest
    assert [span.style.bold for span in bars.spans if bars.plain[span.start] == "▄"] == [True]
    assert patches_text(made("", [1]))[0].plain == "<s>"


def texts_of(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def bars_of(figure) -> list:
    return [bar for axes in figure.axes for container in axes.containers for bar in container]


def test_figure_has_bars_threshold_and_whole_characters():
    text = "a é速न्\n"
    size = len(text.encode())
    entropies = [1.5, 0.2, 2.5, *[0.3] * (size - 2)]
    patches = made(text, [1, 2, size - 2], entropies)
    figure = plot_patches(patches, title="A title")
    (axes,) = figure.axes
    assert [round(bar.get_height(), 6) for bar in bars_of(figure)] == entropies[:-1]
    labels = texts_of(figure)
    assert labels[0] == "threshold" and labels[1:4] == ["a", "␣", "é"]
    assert labels[-1] == ("␊" if font_with("␊") else r"\n")
    limits = [
        line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1 and line.get_ydata()[0] > 0
    ]
    assert set(limits) == {1.0}
    brackets = [line for line in axes.lines if line.get_ydata()[0] == -0.025]
    assert len(brackets) == 3  # é, 速 and न् have several bytes
    assert figure._suptitle.get_text() == "A title"
    assert axes.get_xlim() == (0.5, size + 0.5)
    assert "<s>" in texts_of(plot_patches(patches, show_special=True))


def test_figure_goes_on_in_rows_at_patch_starts():
    text = "some words and more words " * 3
    patches = made(text, [1, *[13] * 6], [0.1] * (len(text) + 1))
    figure = plot_patches(patches, bytes_per_row=30)
    assert len(figure.axes) == 3
    assert "".join(label for label in texts_of(figure) if label != "threshold") == text.replace(" ", "␣")
    assert [axes.get_xlim()[0] for axes in figure.axes] == [0.5, 26.5, 52.5]
    wide = made("ක" * 20, [1, 60], [0.1] * 61)
    assert len(plot_patches([wide, patches], bytes_per_row=8).axes) > 12


def test_limits_of_rules_on_rises_follow_the_entropy():
    patches = made("abcd", [1, 1, 3], [1.0, 2.0, 1.5, 3.0, 0.0]).recut(monotonicity=True, threshold=0.25)
    assert patches.limits == [None, None, 1.25, 2.25, 1.75]
    assert "limit" in texts_of(plot_patches(patches))
    both = patches.recut(monotonicity=False, threshold=1.9, threshold_add=0.25)
    assert both.limits == [None, None, 1.9, 2.25, 1.9]


def test_each_character_gets_a_font_that_has_it():
    from matplotlib import ft2font

    for text in ("a", "é", "Ж", "␣", "ß"):  # in the fonts that come with matplotlib
        assert set(map(ord, text)) <= set(ft2font.FT2Font(str(font_with(text))).get_charmap())
    nowhere = "\U00013000\U0001e900"  # two scripts that no font has together
    assert font_with(nowhere) is None
    assert texts_of(plot_patches(made("\U000f0000", [1, 4], [0.1] * 5)))[-1] == "U+F0000"


def test_characters_that_no_font_has_are_told_by_number_or_escape(monkeypatch):
    monkeypatch.setattr(pictures, "_characters", lambda path: frozenset(range(32, 127)))
    pictures.font_with.cache_clear()
    try:
        labels = texts_of(plot_patches(made("a速\n\x1b\x7f\u2028", [1, 10], [0.1] * 11)))
        assert labels[-6:] == ["a", "U+901F", r"\n", r"\x1b", r"\x7f", "U+2028"]
    finally:
        pictures.font_with.cache_clear()


def test_what_cannot_be_drawn():
    for wrong in ([], ["text"]):
        with pytest.raises(ValueError, match="`patches`"):
            plot_patches(wrong)
    with pytest.raises(ValueError, match="`bytes_per_row`"):
        plot_patches(made("a", [1, 1]), bytes_per_row=1)


def test_of_a_model_without_entropies():
    model = make_model(tiny_config(patching_mode="space", patch_in_forward=False))
    figure = blt_hf.plot_patches(model.get_patches("to be or not"))
    assert bars_of(figure) == []
