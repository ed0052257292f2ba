"""Charts as SVG: a plot area with axes, and lines, bars and dots in it.

Text and lines take their colors from classes, so a chart is readable on light and dark pages, inline or as a
file of its own. Coordinates are in pixels; y grows downward.
"""

import math
from dataclasses import dataclass
from html import escape

NUM_COLORS = 8  # classes c0 to c7
STYLE = """
.chart { --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --paper: #ffffff;
  --c0: #0a5bd0; --c1: #c2304a; --c2: #1a7f4b; --c3: #7d4cc0;
  --c4: #8a5a00; --c5: #00768a; --c6: #b0289a; --c7: #4a5560; max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { .chart { --ink: #e6edf3; --soft: #9aa5b1; --line: #353c45;
  --paper: #14181d; --c0: #6cb0ff; --c1: #ff8a94; --c2: #5fd08f; --c3: #c3a1f7;
  --c4: #e0b040; --c5: #45cfdc; --c6: #f58cf0; --c7: #b4bec8; } }
.chart text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink); }
.chart .title { font-weight: 600; } .chart .soft { fill: var(--soft); }
.chart .ink { fill: var(--ink); } .chart .bar { opacity: .7; }
.chart .paper { fill: var(--paper); } .chart .grid { stroke: var(--line); } .chart polyline { fill: none; }
.chart .line { stroke-width: 2; fill: none; } .chart .faint { opacity: .35; }
.chart .over { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.chart .level { stroke: var(--soft); stroke-width: 1; }
.chart .dashed { stroke-dasharray: 5 4; }
""" + "".join(
    f".chart .c{i} {{ fill: var(--c{i}); }} .chart .line.c{i} {{ stroke: var(--c{i}); fill: none; }}\n"
    for i in range(NUM_COLORS)
)


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    """A line of text. anchor: start, middle or end; kind: classes, such as title or soft."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def line(points: list[tuple[float, float]], kind: str) -> str:
    """A line through points. kind: classes, such as "c0" or "c1 dashed"."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="line {kind}" points="{path}"/>'


def dot(x: float, y: float, kind: str, r: float = 2.5) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


# Corners of the marks, in units of their radius: a circle, then a square, a triangle and a diamond.
MARKS = (
    (),
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
    ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
)


def mark(x: float, y: float, group: int, r: float = 2.5) -> str:
    """A point of a group. Groups differ in color and in shape: not everyone can tell eight colors apart."""
    kind, corners = f"c{group % NUM_COLORS}", MARKS[group % len(MARKS)]
    if not corners:
        return dot(x, y, kind, r)
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
    return f'<polygon class="{kind}" points="{points}"/>'


def scatter(left: float, top: float, side: float, groups: dict[int, list[tuple[float, float]]],
            limits: tuple[float, float, float, float], r: float = 2.5) -> list[str]:
    """A square frame with points in it, for coordinates without a unit.

    groups: {number of color and shape: points}; limits: (lowest x, lowest y, highest x, highest y), so that
    several frames can share a scale. The groups' points alternate, so that no group hides another.
    """
    x0, y0, x1, y1 = limits
    scale = 0.94 * side / (max(x1 - x0, y1 - y0) or 1)
    place_x = lambda x: left + side / 2 + (x - (x0 + x1) / 2) * scale
    place_y = lambda y: top + side / 2 - (y - (y0 + y1) / 2) * scale
    order = sorted(((i + 0.5) / len(points), group, x, y)
                   for group, points in groups.items() for i, (x, y) in enumerate(points))
    marks = [mark(place_x(x), place_y(y), group, r) for _, group, x, y in order]
    return [rectangle(left, top, side, side, "paper grid"), *marks]


def chart(width: int, height: int, title: str, parts: list[str], description: str = "") -> str:
    """A complete SVG. title: above the parts, if there is one. description: what a reader who can't see it
    should know; by default the title."""
    heading = text(width / 2, 22, title, kind="title") if title else ""
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(description or title)}">'
        f'<style>{STYLE}</style>'
        f'<rect class="paper" width="100%" height="100%"/>{heading}'
        + "\n".join(parts)
        + "</svg>\n"
    )


# ---------------------------------------------------------------- axes


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, 1, 2 or 5 times a power of ten apart, that enclose `low` and `high`."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), low + 0.5 * (abs(low) or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def label(value: float) -> str:
    """A tick's number, short: 0.05, 12, 6k, 1e-07."""
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


@dataclass
class Axes:
    """A plot area and the two scales that map values to its pixels."""

    left: float
    top: float
    right: float
    bottom: float
    x_ticks: list[float]
    y_ticks: list[float]

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def grid(self, unit: str = "") -> list[str]:
        """Horizontal grid lines with their numbers; the top one has the unit."""
        parts = []
        for value in self.y_ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            number = label(value) + (unit if value == self.y_ticks[-1] else "")
            parts.append(text(self.left - 8, y + 4, number, "end", "soft"))
        return parts

    def x_axis(self, title: str = "") -> list[str]:
        """Numbers below the plot area, and the axis's title below them."""
        parts = [text(self.x(value), self.bottom + 20, label(value), kind="soft") for value in self.x_ticks]
        return [*parts, text((self.left + self.right) / 2, self.bottom + 40, title, kind="soft")]


def legend(x: float, y: float, names: list[str], column: bool = False) -> list[str]:
    """Names, each with a sample of its color, in a row from (x, y) to the right or in a column downward."""
    parts = []
    for i, name in enumerate(names):
        parts += [line([(x, y - 4), (x + 18, y - 4)], f"c{i % NUM_COLORS}"), text(x + 24, y, name, "start")]
        x, y = (x, y + 20) if column else (x + 24 + 7.2 * len(name) + 20, y)
    return parts


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of up to `window` values around each one; fewer at both ends."""
    half = (window - 1) // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def line_chart(title: str, series: dict[str, list[tuple[float, float]]], x_title: str = "step",
               width: int = 420, height: int = 250, zero: bool = False, smooth: int = 1,
               levels: dict[str, float] | None = None) -> str:  # fmt: skip
    """One line per series through its (x, y) points. zero: the y axis includes 0. smooth: if greater than 1,
    the running mean of so many points is drawn over the points' own line, which is faint. levels: {name: y}
    of dashed horizontal lines."""
    points = [point for line_points in series.values() for point in line_points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    levels = levels or {}
    ys = [*ys, *levels.values(), *([0.0] if zero else [])]
    top = 56 if len(series) > 1 else 38
    axes = Axes(64, top, width - 20, height - 48, ticks(min(xs), max(xs), 7), ticks(min(ys), max(ys)))
    parts = axes.grid() + axes.x_axis(x_title)
    if len(series) > 1:
        parts += legend(64, 44, list(series))
    ends = [f"{name} from {ys[0][1]:.3g} to {ys[-1][1]:.3g}" for name, ys in series.items()]
    parts.append(f"<desc>{escape('; '.join(ends))}</desc>")  # for those who can't see the lines
    for y in levels.values():
        parts.append(line([(axes.left, axes.y(y)), (axes.right, axes.y(y))], "level dashed"))
    for i, line_points in enumerate(series.values()):
        pixels = [(axes.x(x), axes.y(y)) for x, y in line_points]
        color = f"c{i % NUM_COLORS}"
        if smooth > 1 and len(pixels) > 1:
            parts.append(line(pixels, f"{color} faint"))
            pixels = list(zip([x for x, _ in pixels], running_mean([y for _, y in pixels], smooth)))
        parts.append(line(pixels, color) if len(pixels) > 1 else dot(*pixels[0], color))
    parts += [text(axes.right, axes.y(y) - 5, name, "end", "soft over") for name, y in levels.items()]
    return chart(width, height, title, parts)


def histogram(title: str, values: list[float], x_title: str, y_title: str,
              width: int = 420, height: int = 250) -> str:
    """How many values lie in each of about 30 equal intervals; those below 0 are in another color."""
    edges = ticks(min(values), max(values), 30)
    step = edges[1] - edges[0]
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(int((value - edges[0]) / step), len(counts) - 1)] += 1
    axes = Axes(64, 50, width - 20, height - 48, ticks(edges[0], edges[-1]), ticks(0, max(5, *counts)))
    parts = axes.grid() + axes.x_axis(x_title) + [text(56, 38, y_title, "end", "soft")]
    for edge, count in zip(edges, counts):
        left, top = axes.x(edge), axes.y(count)
        color = "c1" if edge + step / 2 < 0 else "c0"
        parts.append(rectangle(left + 0.5, top, axes.x(edge + step) - left - 1, axes.bottom - top, color))
    return chart(width, height, title, parts)
