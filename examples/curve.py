"""A line chart as SVG, by hand: loss curves with failures marked, without any plotting library.

    [Line("with kills", points)], marks at x ─▶ svg(...) ─▶ text of a file that every browser shows

What it does not do: more than four lines, anything but numbers on both axes. Colours are Okabe and Ito's, which the
colour-blind can tell apart. Invariant: same arguments, same text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

COLOURS: Final = ("#D55E00", "#0072B2", "#000000", "#009E73")
WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 56, 52


@dataclass(frozen=True, slots=True)
class Line:
    """One curve, ascending in x."""

    title: str
    points: Sequence[tuple[float, float]]


def svg(
    title: str, lines: Sequence[Line], marks: Sequence[tuple[float, str]], x_title: str, y_title: str, marks_title: str
) -> str:
    """The chart. `marks`: where something happened, and a short word for it, such as which stage was killed."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    (left, right), (low, high) = (min(xs), max(xs)), _padded(min(ys), max(ys))

    def at_x(x: float) -> float:
        return LEFT + (x - left) / max(right - left, 1e-12) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 20, title, size=15),
    ]
    for tick in ticks(low, high):
        parts.append(_rule(LEFT, at_y(tick), WIDTH - RIGHT, at_y(tick), "#e6e6e6"))
        parts.append(_text(LEFT - 8, at_y(tick) + 4, f"{tick:g}", anchor="end"))
    for tick in ticks(left, right):
        parts.append(_text(at_x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", anchor="middle"))
    rows = levels([(at_x(x), 7.0 * len(word)) for x, word in marks])
    for (x, word), row in zip(marks, rows, strict=True):
        parts.append(_rule(at_x(x), TOP, at_x(x), HEIGHT - BOTTOM, "#999999", dashes="3 3"))
        parts.append(_text(at_x(x), HEIGHT - BOTTOM - 4 - 12 * row, word, anchor="middle", size=11))
    for line, colour in zip(lines, COLOURS, strict=False):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    parts += _legend(lines, marks_title)
    parts.append(_rule(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "#333333"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_title, anchor="middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="rotate(-90 18 {middle})">{_text(18, middle, y_title, anchor="middle")}</g>')
    return "\n".join([*parts, "</svg>", ""])


def levels(words: Sequence[tuple[float, float]]) -> list[int]:
    """For words of (middle, width) the row of each, from 0 up: the lowest in which it overlaps none before it."""
    held: list[list[tuple[float, float]]] = []
    found = []
    for middle, width in words:
        low, high = middle - width / 2, middle + width / 2
        row = next((i for i, row in enumerate(held) if all(high <= a or b <= low for a, b in row)), len(held))
        held += [[]] if row == len(held) else []
        held[row].append((low, high))
        found.append(row)
    return found


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def _legend(lines: Sequence[Line], marks_title: str) -> list[str]:
    parts, x = [], LEFT
    for line, colour in zip(lines, COLOURS, strict=False):
        parts += [_rule(x, 38, x + 24, 38, colour, width=2.5), _text(x + 30, 42, line.title)]
        x += 48 + 7 * len(line.title)
    parts += [_rule(x, 38, x + 24, 38, "#999999", dashes="3 3"), _text(x + 30, 42, marks_title)]
    return parts


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1.0, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    where = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {where} stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
