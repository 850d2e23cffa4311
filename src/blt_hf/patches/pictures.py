"""Patches as pictures: in a terminal, and as the figure of the paper."""

import functools
import unicodedata
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.style import Style
from rich.text import Span, Text

from .data import BltPatches
from .display import PATCH_COLOURS, Glyph, split_glyphs


_BARS = "▁▂▃▄▅▆▇█"
_CONTINUATION = "·"


def patches_text(
    patches: BltPatches, width: int = 80, *, show_entropies: bool = False, spell: bool = False, separator: str = ""
) -> list[Text]:
    """Makes lines for a terminal, each patch on a ground of its own colour; print them with a console of rich.

    Control codes, also those inside the text that would move the cursor, are shown by signs. A character that lies in
    several patches stands in the first of them; `·` in the others says that it goes on there.

    Args:
        patches: the result of `model.get_patches` for one text.
        width: cells of a line.
        show_entropies: a line of bars above each line: the entropy before each character (the highest of its bytes);
            those above the threshold are bold.
        spell: write the bytes of a character that lies in several patches, in hexadecimal digits.
        separator: put between patches, where colours cannot be seen.
    Raises:
        ValueError: `width` is less than 8 cells.
    """
    if width < 8:
        raise ValueError(f"`width` must be at least 8 cells; got {width}.")
    lines, bars, used = [Text(no_wrap=True)], [Text(no_wrap=True)], 0
    highest = max([1e-6, *(patches.entropies or ())])

    def start_line() -> None:
        nonlocal used
        lines.append(Text(no_wrap=True))
        bars.append(Text(no_wrap=True))
        used = 0

    for number, cells in enumerate(_cells(patches, spell)):
        fill, dark = PATCH_COLOURS[number % len(PATCH_COLOURS)]
        ground, sign = (Style(color="#1c2430", bgcolor=fill, italic=italic) for italic in (False, True))
        bar, bold_bar = (Style(color=dark, bold=bold) for bold in (False, True))
        mark = separator if number else ""
        needed = cell_len(mark) + sum(cell_len(label) for label, _, _, _ in cells)
        if used and used + needed > width:
            start_line()
        if mark:
            lines[-1].append(mark)
            bars[-1].append(" " * cell_len(mark))
            used += cell_len(mark)
        for label, nats, is_start, kind in cells:
            size = cell_len(label)
            if used and used + size > width:
                start_line()
            lines[-1].append(label, ground if kind in ("text", "space") else sign)
            bars[-1].append(_bar(nats, highest).ljust(size), bold_bar if is_start else bar)
            used += size
            if kind == "newline":
                start_line()
    if not lines[-1]:
        del lines[-1], bars[-1]
    for line in (*lines, *bars):
        line.spans = _joined(line.spans)
    return [line for pair in zip(bars, lines) for line in (pair if show_entropies else pair[1:])]


def _joined(spans: list[Span]) -> list[Span]:
    """Joins neighbours of one style, which a terminal is told once."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].style == span.style and joined[-1].end == span.start:
            joined[-1] = Span(joined[-1].start, span.end, span.style)
        else:
            joined.append(span)
    return joined


def _cells(patches: BltPatches, spell: bool) -> Iterator[list[tuple[str, float | None, bool, str]]]:
    """Lists for each patch: labels, the highest entropy of their bytes, whether it is above the limit, their kinds."""
    boundaries, before, limits = patches.boundaries, patches.entropies_before, patches.limits
    glyphs = split_glyphs(patches.input_ids, boundaries if spell else ())
    index = 0
    for start, stop in zip(boundaries, [*boundaries[1:], len(patches.input_ids)]):
        cells = []
        while index < len(glyphs) and glyphs[index].start < stop:
            glyph = glyphs[index]
            first, last = max(glyph.start, start), min(glyph.stop, stop)
            found = [(before[p], limits[p]) for p in range(first, last) if before[p] is not None]
            nats = max((e for e, _ in found), default=None)
            is_start = any(limit is not None and e > limit for e, limit in found)
            label = glyph.label if glyph.start >= start else _CONTINUATION
            cells.append((label, nats, is_start, glyph.kind))
            if glyph.stop > stop:
                break  # it goes on in the next patch
            index += 1
        yield cells


def _bar(nats: float | None, highest: float) -> str:
    return " " if nats is None else _BARS[min(int(nats / highest * len(_BARS)), len(_BARS) - 1)]


def plot_patches(
    patches: BltPatches | Sequence[BltPatches],
    *,
    title: str | None = None,
    bytes_per_row: int = 96,
    show_special=False,
):
    """Draws the figure of the paper: the entropy before each byte, the threshold, and the patches that follow from it.

    A bar for each byte, on a ground in the colour of its patch; a patch starts where a bar crosses the dashed line.
    Below stand whole characters, those of several bytes above a bracket, each in an installed font that has it (or as
    `U+1F600`, if none does; a control code as ``\\n``). Needs matplotlib (`pip install "blt-hf[plot]"`).

    Args:
        patches: the result of `model.get_patches`, for one text or several.
        title: above the figure; None: none.
        bytes_per_row: longer texts go on in further rows, cut where a patch starts if one does nearby.
        show_special: also draw special tokens at the beginning, such as the BOS.
    Returns:
        a `matplotlib.figure.Figure`, which notebooks show; `figure.savefig("patches.svg")` writes it to a file.
    Raises:
        ValueError: nothing to draw, or less than 8 bytes a row.
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('`plot_patches` needs matplotlib: pip install "blt-hf[plot]".') from error

    texts = [patches] if isinstance(patches, BltPatches) else list(patches)
    if bytes_per_row < 8:
        raise ValueError(f"`bytes_per_row` must be at least 8; got {bytes_per_row}.")
    if not texts or not all(isinstance(text, BltPatches) and text.input_ids for text in texts):
        raise ValueError("`patches` must be a BltPatches or a list of them, each with a byte or more.")
    rows = [(text, *span) for text in texts for span in _rows(text, bytes_per_row, show_special)]
    longest = max(stop - start for _, start, stop in rows)
    figure, all_axes = plt.subplots(
        len(rows),
        figsize=(1.3 + 0.155 * longest, (0.35 if title else 0.1) + 1.9 * len(rows)),
        squeeze=False,
        layout="constrained",
        dpi=120,
    )
    highest = max([*(e for text in texts for e in text.entropies or ()), *(text.rule.threshold for text in texts)])
    for axes, (text, start, stop) in zip(all_axes[:, 0], rows):
        _draw_row(axes, text, start, stop, longest, highest)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _rows(patches: BltPatches, bytes_per_row: int, show_special: bool) -> Iterator[tuple[int, int]]:
    """Splits positions into spans, one a row; no glyph is cut."""
    glyphs = split_glyphs(patches.input_ids)
    while not show_special and len(glyphs) > 1 and glyphs[0].kind == "special":
        glyphs = glyphs[1:]
    boundaries, start = set(patches.boundaries), glyphs[0].start
    while len(patches.input_ids) - start > bytes_per_row:
        stops = [glyph.start for glyph in glyphs if start < glyph.start <= start + bytes_per_row]
        nearby = [stop for stop in stops if stop in boundaries and stop > start + 0.75 * bytes_per_row]
        stop = max(nearby or stops or [glyph.stop for glyph in glyphs if glyph.stop > start][:1])
        yield start, stop
        start = stop
    if start < len(patches.input_ids):
        yield start, len(patches.input_ids)


def _draw_row(axes, patches: BltPatches, start: int, stop: int, longest: int, highest: float) -> None:
    numbers = [number for number, length in enumerate(patches.patch_lengths) for _ in range(length)]
    colours = [PATCH_COLOURS[numbers[position] % len(PATCH_COLOURS)] for position in range(start, stop)]
    positions = range(start, stop)
    for position, (fill, _) in zip(positions, colours):
        axes.axvspan(position - 0.5, position + 0.5, color=fill, linewidth=0, zorder=0)
    for boundary in patches.boundaries:
        if start <= boundary < stop:
            axes.axvline(boundary - 0.5, color="white", linewidth=1.6, zorder=1)
    if patches.entropies is not None:
        heights = [patches.entropies_before[position] or 0.0 for position in positions]
        axes.bar(positions, heights, width=0.78, color=[dark for _, dark in colours], zorder=2)
        axes.set_ylim(0, highest * 1.06)
        axes.set_ylabel("entropy before\nthe byte (nats)", fontsize=9)
        _draw_limits(axes, patches, start, stop)
    else:
        axes.set_yticks([])
    axes.set_xlim(start - 0.5, start + longest - 0.5)
    axes.set_xticks([])
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    for glyph in split_glyphs(patches.input_ids):
        if start <= glyph.start < stop:
            _draw_label(axes, glyph, colours[glyph.start - start][1])


def _draw_limits(axes, patches: BltPatches, start: int, stop: int) -> None:
    limits = patches.limits
    shown = [(p, limits[p]) for p in range(start, stop) if limits[p] is not None]
    for position, limit in shown:
        axes.plot(
            [position - 0.5, position + 0.5], [limit] * 2, color="#1c2430", linewidth=1.1, dashes=(3, 1.5), zorder=3
        )
    if shown:
        is_constant = len({limit for _, limit in shown}) == 1
        label = "threshold" if is_constant else "limit"
        axes.text(
            stop - 0.3, shown[-1][1], label, fontsize=8, va="center", color="#1c2430", clip_on=False,
        )  # fmt: skip


def _draw_label(axes, glyph: Glyph, colour: str) -> None:
    label = "␣" if glyph.kind == "space" else glyph.label
    font = font_with(label)
    if font is None and glyph.kind in ("newline", "code"):  # few fonts have signs for control codes
        label = _escaped_sign(label)
        font = font_with(label)
    if font is None:
        label = " ".join(f"U+{ord(character):04X}" for character in label[:1])
        font = font_with(label)
    is_small = len(label) > 1 and (glyph.kind in ("code", "byte", "special") or label.startswith("U+"))
    middle = (glyph.start + glyph.stop - 1) / 2
    transform = axes.get_xaxis_transform()
    if glyph.num_bytes > 1:  # one character, several bytes
        ends = [glyph.start - 0.38, glyph.stop - 1 + 0.38]
        axes.plot(ends, [-0.025] * 2, color=colour, linewidth=1.4, transform=transform, clip_on=False)
    axes.text(
        middle, -0.05, label, transform=transform, ha="center", va="top", rotation=90 if is_small else 0, color="#1c2430",
        font=font, fontsize=6 if is_small else 10, parse_math=False,
    )  # fmt: skip


def _escaped_sign(label: str) -> str:
    """Writes the control code of a sign of Unicode's control pictures as Python does: `"␊"` is ``\\n``."""
    code = ord(label[0])
    if len(label) > 1 or not 0x2400 <= code <= 0x2421:
        return label
    return repr("\x7f" if code == 0x2421 else chr(code - 0x2400))[1:-1]


_PREFERRED_FONTS = ("DejaVu Sans Mono", "DejaVu Sans", "Noto Sans")


@functools.lru_cache(maxsize=4096)
def font_with(text: str):
    """Finds an installed font of matplotlib's list that has all characters of `text`; None if none does."""
    needed = {ord(character) for character in text if unicodedata.category(character) != "Cf"}
    script = unicodedata.name(text[-1] if text[0] == "◌" else text[0], "").split(" ")[0].split("-")[0].lower()
    for path in sorted(_fonts(), key=lambda path: _rank(_fonts()[path], script)):
        if needed <= _characters(path):
            return path
    return None


def _rank(name: str, script: str) -> tuple:
    if name in _PREFERRED_FONTS:
        return 0, _PREFERRED_FONTS.index(name), name
    script = {"hiragana": "cjk", "katakana": "cjk", "hangul": "cjk", "ideographic": "cjk"}.get(script, script)
    return (1 if script and script in name.lower() else 2, 0 if "Sans" in name else 1, name)


@functools.lru_cache(maxsize=1)
def _fonts() -> dict:
    """Lists upright fonts of normal weight, as `Path: name`."""
    from pathlib import Path

    from matplotlib import font_manager

    fonts = {}
    for entry in font_manager.fontManager.ttflist:
        if "Last Resort" in entry.name or "LastResort" in entry.name:  # it has all characters, as empty frames
            continue
        if entry.style == "normal" and entry.weight in (400, "normal", "regular", "book"):
            fonts.setdefault(Path(entry.fname), entry.name)
    return fonts


@functools.cache
def _characters(path) -> frozenset[int]:
    """Lists the code points of a font; none if matplotlib cannot draw with it (such as colour emoji)."""
    from matplotlib import ft2font

    try:
        font = ft2font.FT2Font(str(path))
        font.set_size(10, 100)
        return frozenset(font.get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


__all__ = ["font_with", "patches_text", "plot_patches"]
