"""Bytes as people read them: whole characters, signs for invisible ones, and patches in HTML.

A patch may end in the middle of a character, and a text may hold control codes that would move a cursor or turn the
direction of writing. So a text is shown as [`Glyph`]s: each stands for some bytes that lie in one patch, and its
label is safe to print anywhere.
"""

import html
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..model.patching_blt import BYTE_OFFSET, VOCAB_SIZE
from ..tokenizer.encoding import SPECIAL_NAMES


_ZERO_WIDTH_JOINER = "\u200d"
_DOTTED_CIRCLE = "\u25cc"


@dataclass(frozen=True)
class Glyph:
    """Shows some ids of a row.

    Attributes:
        start, stop: positions in the row.
        label: text to print; never a control code, never empty.
        kind: `"text"`, `"space"`, `"newline"`, `"code"` (a sign for a control code, or `U+200E`), `"byte"` (two
            hexadecimal digits of a byte that is no whole character) or `"special"` (a special token).
    """

    start: int
    stop: int
    label: str
    kind: str

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def split_glyphs(input_ids: Sequence[int], boundaries: Iterable[int] = ()) -> list[Glyph]:
    """Splits a row into glyphs, in order; together they cover all of it.

    Args:
        input_ids: ids of the row.
        boundaries: positions that no glyph may cross. A character that one of them divides is shown by the
            whole parts on each side: (a letter and its accent), or its bytes.
    Returns:
        glyphs. `"é\\n"` is one `"é"` of 2 bytes and one `"␊"`; with a boundary inside the é it is `"C3"`, `"A9"`, `"␊"`.
    """
    glyphs: list[Glyph] = []
    first = 0
    for stop in [*sorted({b for b in boundaries if 0 < b < len(input_ids)}), len(input_ids)]:
        glyphs += _split_piece(input_ids, first, stop)
        first = stop
    return glyphs


def _split_piece(input_ids: Sequence[int], first: int, stop: int) -> Iterator[Glyph]:
    cluster, cluster_start = "", first
    position = first
    while position < stop:
        size, character = _character_at(input_ids, position, stop)
        if cluster and (character is None or not _continues(cluster, character)):
            yield Glyph(cluster_start, position, *_label(cluster))
            cluster = ""
        if character is None:
            yield _lone_id(input_ids[position], position)
        else:
            if not cluster:
                cluster_start = position
            cluster += character
        position += size
    if cluster:
        yield Glyph(cluster_start, stop, *_label(cluster))


def _character_at(input_ids: Sequence[int], position: int, stop: int) -> tuple[int, str | None]:
    """Returns the number of ids of the character at `position`, and the character; `(1, None)` if none is whole there."""
    byte = input_ids[position] - BYTE_OFFSET
    if not 0 <= byte < 256:
        return 1, None
    size = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
    ids = input_ids[position : min(position + size, stop)]
    try:
        return size, bytes(i - BYTE_OFFSET for i in ids).decode("utf-8")
    except ValueError:  # no UTF-8, or an id that is no byte
        return 1, None


def _continues(cluster: str, character: str) -> bool:
    """Tells whether `character` is joined to those before it (the common cases of Unicode's annex 29)."""
    last = cluster[-1]
    if _stands_alone(cluster[0]):
        return False
    code = ord(character)
    if unicodedata.category(character) in ("Mn", "Me", "Mc") or character in (_ZERO_WIDTH_JOINER, "\u200c"):
        return True
    if 0x1F3FB <= code <= 0x1F3FF or 0xE0020 <= code <= 0xE007F:  # skin tones, and the letters of some flags
        return True
    if last == _ZERO_WIDTH_JOINER:
        return unicodedata.category(character) == "So"
    if 0x1F1E6 <= code <= 0x1F1FF:  # two of them are a flag
        return len(cluster) == 1 and 0x1F1E6 <= ord(last) <= 0x1F1FF
    jamo_vowel_or_final = 0x1160 <= code <= 0x11FF
    return jamo_vowel_or_final and (0x1100 <= ord(last) <= 0x11FF or 0xAC00 <= ord(last) <= 0xD7A3)


def _stands_alone(character: str) -> bool:
    """Tells spaces, controls and invisible characters, with which nothing combines here."""
    return character == " " or unicodedata.category(character)[0] in "CZ"


def _label(cluster: str) -> tuple[str, str]:
    first = cluster[0]
    if first == " ":
        return " ", "space"
    if first == "\n":
        return "\u240a", "newline"
    if ord(first) < 0x20:
        return chr(0x2400 + ord(first)), "code"
    if first == "\x7f":
        return "\u2421", "code"
    if _stands_alone(first):
        return f"U+{ord(first):04X}", "code"
    if unicodedata.category(first) in ("Mn", "Me", "Mc"):  # an accent whose letter lies in another patch
        return _DOTTED_CIRCLE + cluster, "text"
    return cluster, "text"


def _lone_id(token_id: int, position: int) -> Glyph:
    if 0 <= token_id < BYTE_OFFSET:
        return Glyph(position, position + 1, SPECIAL_NAMES[token_id], "special")
    if token_id >= VOCAB_SIZE:
        return Glyph(position, position + 1, f"<{token_id}>", "special")
    return Glyph(position, position + 1, f"{token_id - BYTE_OFFSET:02X}", "byte")


def describe_ids(input_ids: Sequence[int]) -> str:
    """Names ids for a reader: `"C3 A9"` of two bytes, `"<s>"` of a BOS."""
    return " ".join(_lone_id(token_id, 0).label for token_id in input_ids)


# Fill and bar of a patch; neighbours differ in lightness too, for readers who do not tell the hues apart.
PATCH_COLOURS = (("#cfe3f7", "#3b77b7"), ("#ffe2ad", "#d08a1d"), ("#cdebd3", "#3f9660"), ("#f6d3dc", "#bf5673"))

_BAR_HEIGHT = 44  # pixels

_STYLE = f"""<style>
.blt-patches{{background:#fff;color:#1c2430;border:1px solid #d8dee6;border-radius:8px;padding:10px 12px;margin:6px 0;
 font:14px/1.35 system-ui,sans-serif;max-width:100%;box-sizing:border-box}}
.blt-patches .blt-summary{{color:#4a5563;font-size:13px;margin-bottom:6px}}
.blt-patches .blt-row{{display:flex;flex-wrap:wrap;align-items:flex-end;row-gap:8px;overflow-wrap:anywhere}}
.blt-patches .blt-g{{display:flex;flex-direction:column}}
.blt-patches .blt-bars{{display:flex;align-items:flex-end}}
.blt-patches .blt-bars i{{flex:1 1 0;min-width:5px;height:{_BAR_HEIGHT}px;position:relative}}
.blt-patches .blt-bars b{{position:absolute;left:.5px;right:.5px;bottom:0;background:var(--bar);
 height:calc(var(--e)*1px)}}
.blt-patches .blt-bars u{{position:absolute;left:0;right:0;bottom:calc(var(--t)*1px);border-top:1px dashed #1c2430}}
.blt-patches .blt-l{{color:#1c2430;font:14px/1.5 ui-monospace,"DejaVu Sans Mono",monospace;
 padding:0 1px 0 3px;min-width:8px;text-align:center;white-space:pre;unicode-bidi:isolate}}
.blt-patches .blt-small{{font-size:10px;line-height:21px;color:#7a2140}}
.blt-patches .blt-break{{flex-basis:100%;height:0}}
</style>"""


def patches_html(patches, with_style: bool = True) -> str:
    """Draws [`BltPatches`] as HTML that needs nothing else: entropy bars, the threshold, coloured patches below.

    Each byte has a bar in the colour of its patch. Below stand whole characters; one that lies in several patches has
    the colours of all of them.

    Args:
        patches: a [`BltPatches`].
        with_style: put the style sheet in front; once a page is enough.
    """
    highest = max([*(e for e in patches.entropies or ()), patches.rule.threshold, 0.1])
    scale = (_BAR_HEIGHT - 2) / highest
    before, limits = patches.entropies_before, patches.limits
    numbers = [number for number, length in enumerate(patches.patch_lengths) for _ in range(length)]
    boundaries = set(patches.boundaries)
    cells = []
    for glyph in split_glyphs(patches.input_ids):
        bars, bands = [], []
        for position in range(glyph.start, glyph.stop):
            fill, bar = PATCH_COLOURS[numbers[position] % len(PATCH_COLOURS)]
            share = 100 / glyph.num_bytes
            left = (position - glyph.start) * share
            bands.append((fill, bar, left, left + share, position in boundaries))
            if patches.entropies is not None:
                limit = limits[position]
                line = "" if limit is None else f'<u style="--t:{min(max(limit, 0), highest) * scale:.0f}"></u>'
                bars.append(f'<i><b style="--e:{(before[position] or 0) * scale:.0f};--bar:{bar}"></b>{line}</i>')
        is_small = len(glyph.label) > 1 and glyph.kind in ("code", "byte", "special")
        cells.append(
            f'<span class="blt-g" title="{html.escape(_tooltip(patches, glyph, numbers, before))}">'
            f'<span class="blt-bars">{"".join(bars)}</span>'
            f'<span class="blt-l{" blt-small" if is_small else ""}" style="background:{_background(bands)}">'
            f"{html.escape(glyph.label)}</span></span>"
        )
        if glyph.kind == "newline":
            cells.append('<span class="blt-break"></span>')
    return (
        f'{_STYLE if with_style else ""}<div class="blt-patches"><div class="blt-summary">{html.escape(patches.summary)}'
        f'</div><div class="blt-row" dir="ltr">{"".join(cells)}</div></div>'
    )


def _background(bands: list[tuple[str, str, float, float, bool]]) -> str:
    """Makes a CSS background: each byte's share in the colour of its patch, a dark edge where a patch starts."""
    stops = [f"{fill} {left:.4g}% {right:.4g}%" for fill, _, left, right, _ in bands]
    fills = f"linear-gradient(90deg,{','.join(stops)})" if len(stops) > 1 else bands[0][0]
    _, bar, _, _, is_first = bands[0]
    return f"linear-gradient({bar},{bar}) 0 0/3px 100% no-repeat,{fills}" if is_first else fills


def _tooltip(patches, glyph: Glyph, numbers: list[int], before: list[float | None]) -> str:
    first, last = numbers[glyph.start] + 1, numbers[glyph.stop - 1] + 1
    where = f"patch {first}" if first == last else f"patches {first} to {last}"
    told = f"{where}: {describe_ids(patches.input_ids[glyph.start : glyph.stop])}"
    nats = [e for e in before[glyph.start : glyph.stop] if e is not None]
    return f"{told}; {', '.join(f'{e:.2f}' for e in nats)} nats before" if nats else told


__all__ = ["PATCH_COLOURS", "Glyph", "describe_ids", "patches_html", "split_glyphs"]
