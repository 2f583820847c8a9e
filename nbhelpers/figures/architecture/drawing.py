"""Draw block diagrams: boxes for modules, arrows for tensors, frames around what belongs together.

Positions and sizes are inches from the lower left corner of the figure. Boxes and frames are named
by their keys, and arrows by what they join. Every artist has a gid, such as "box:belief", by which
it is found again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from nbhelpers.figures import style
from nbhelpers.figures.architecture.line_art import HATCH, INK, LIGHT, PALE, LineArt

TERM, SMALL = 12, style.SMALL  # points
PAD, GAP = 0.1, 0.06  # inches: between text and the edge of its box, between a label and its line
LINE = {TERM: 0.205, SMALL: 0.185}  # inches that a line of text takes
MONOSPACE = "DejaVu Sans Mono"
# look of a box: (fill, pattern, edge, line, what the legend says)
LOOKS = {
    "data": (PALE, "", PALE, "-", "data"),
    "trained": ("white", "", INK, "-", "trained"),
    "frozen": ("white", "//", INK, "-", "frozen"),
    "idea": (style.ORANGE, "", INK, "-", "new in the paper"),
    "rule": (style.ORANGE, "", INK, "--", "new, without weights"),
    "loss": (LIGHT, "", style.BLUE, "-", "loss"),
    "prepares": (PALE, "", INK, "-", "prepares"),
    "trains": (style.ORANGE, "", INK, "-", "trains a system"),
    "measures": ("white", "", INK, "-", "uses and measures what was trained"),
}
SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, 1), "bottom": (0, -1)}
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A module, with its centre and width in inches.

    term    the paper's word or symbol, in bold
    note    what it computes
    code    names of this package, one a line
    look    a key of LOOKS
    height  0: what the text needs
    """

    key: str
    at: Point
    width: float
    term: str
    note: str = ""
    code: str = ""
    look: str = "trained"
    height: float = 0.0

    def lines(self) -> list[tuple[str, str, int]]:
        """Return the lines of text from top to bottom: (kind, text, points)."""
        parts = (("term", self.term, TERM), ("note", self.note, SMALL), ("code", self.code, SMALL))
        found: list[tuple[str, str, int]] = []
        for kind, text, size in parts:
            found += [(kind, line, size) for line in text.split("\n") if text]
        return found

    @property
    def half(self) -> Point:
        """Half of the width and of the height."""
        needed = sum(LINE[size] for _, _, size in self.lines()) + 2 * PAD
        return self.width / 2, (self.height or needed) / 2

    def edge(self, side: str, shift: float = 0.0) -> Point:
        """Return the middle of a side, moved along it by `shift` inches."""
        (x, y), (across, up) = self.half, SIDES[side]
        moved = (0.0, shift) if across else (shift, 0.0)
        return self.at[0] + across * x + moved[0], self.at[1] + up * y + moved[1]


@dataclass(frozen=True)
class Arrow:
    """A tensor that goes from one box to another, in horizontal and vertical lines.

    tail, head  "key:side", or "key:side:shift" with a shift along the side in inches
    label       its shape, written at the middle of the longest piece or of piece `piece`
    via         corners in between; None: found by `route`
    place       "above", "below", "left" or "right" of the line; "": above or right
    dashed      it is there in training only
    """

    tail: str
    head: str
    label: str = ""
    via: tuple[Point, ...] | None = None
    place: str = ""
    piece: int | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Frame:
    """A dashed outline around boxes, with a title above them and a name of this package."""

    key: str
    around: tuple[str, ...]
    title: str
    code: str = ""
    pad: float = 0.1

    def outline(self, boxes: Sequence[Box]) -> Box:
        """Return the frame as a box, so that arrows can begin and end at it."""
        left = min(box.edge("left")[0] for box in boxes) - self.pad
        right = max(box.edge("right")[0] for box in boxes) + self.pad
        low = min(box.edge("bottom")[1] for box in boxes) - self.pad
        high = max(box.edge("top")[1] for box in boxes) + self.pad
        high += LINE[SMALL] + GAP
        middle = ((left + right) / 2, (low + high) / 2)
        return Box(self.key, middle, right - left, "", height=high - low)


@dataclass
class Diagram:
    """The parts of a figure of that size in inches; `note` stands beside the legend."""

    size: Point
    boxes: list[Box]
    arrows: list[Arrow]
    frames: list[Frame] = field(default_factory=list)
    note: str = ""

    def draw(self) -> Figure:
        """Draw all parts, and the legend of the looks that occur at the lower edge."""
        figure = LineArt(figsize=self.size)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, self.size[0]), ylim=(0, self.size[1]))
        axes.set_axis_off()
        ends = {box.key: box for box in self.boxes}
        for frame in self.frames:
            ends[frame.key] = frame.outline([ends[key] for key in frame.around])
            _draw_frame(axes, frame, ends[frame.key])
        for arrow in self.arrows:
            _draw_arrow(axes, arrow, route(arrow, ends))
        for box in self.boxes:
            _draw_box(axes, box)
        _draw_legend(axes, {box.look for box in self.boxes}, self.note)
        for text in axes.texts:
            text.set_color(INK)
        return figure


def shape(*sizes: int | str) -> str:
    """Write the shape of a tensor: "(B, 50, 512)"."""
    return f"({', '.join(map(str, sizes))})"


def route(arrow: Arrow, ends: dict[str, Box]) -> list[Point]:
    """Return the corners of an arrow, both ends included.

    Ends without a shift are moved so that the line is straight, where the boxes allow it.
    """
    (tail, out, shifted), (head, into, fixed) = (_end(end) for end in (arrow.tail, arrow.head))
    start, end = ends[tail].edge(out, shifted or 0), ends[head].edge(into, fixed or 0)
    axis = 1 if SIDES[out][0] else 0  # along which straight ends must agree
    if arrow.via is not None:
        return [start, *arrow.via, end]
    if bool(SIDES[out][0]) != bool(SIDES[into][0]):
        corner = (end[0], start[1]) if axis else (start[0], end[1])
        return [start, corner, end]
    if _spans(ends[head], axis, start[axis]) and fixed is None:
        end = _at(end, axis, start[axis])
    elif _spans(ends[tail], axis, end[axis]) and shifted is None:
        start = _at(start, axis, end[axis])
    if abs(start[axis] - end[axis]) < 1e-6:
        return [start, end]
    middle = (start[1 - axis] + end[1 - axis]) / 2
    return [start, _at(start, 1 - axis, middle), _at(end, 1 - axis, middle), end]


def _end(text: str) -> tuple[str, str, float | None]:
    key, side, *shift = text.split(":")
    return key, side, float(shift[0]) if shift else None


def _spans(box: Box, axis: int, value: float) -> bool:
    return abs(box.at[axis] - value) < box.half[axis] - 0.05


def _at(point: Point, axis: int, value: float) -> Point:
    return (value, point[1]) if axis == 0 else (point[0], value)


def _draw_box(axes: Axes, box: Box) -> None:
    fill, hatch, edge, dashes, _ = LOOKS[box.look]
    for patch in _filled(box, fill, hatch, edge, dashes):
        axes.add_patch(patch)
    y = box.at[1] + sum(LINE[size] for _, _, size in box.lines()) / 2
    for kind, text, size in box.lines():
        drawn = axes.text(
            box.at[0],
            y - LINE[size] / 2,
            text,
            fontsize=size,
            fontweight="bold" if kind == "term" else "normal",
            fontfamily=MONOSPACE if kind == "code" else "DejaVu Sans",
            ha="center",
            va="center",
            gid=f"{kind}:{box.key}",
        )
        if hatch:
            drawn.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        y -= LINE[size]


def _filled(box: Box, fill: str, hatch: str, edge: str, dashes: str) -> list[FancyBboxPatch]:
    """Return the patch of a box, and a second one for the outline of a hatched box."""
    (x, y), (half, tall) = box.at, box.half
    rounding = min(0.16, tall) if box.look == "loss" else 0.02
    form = f"round,pad=0,rounding_size={rounding}"
    place = (x - half, y - tall), 2 * half, 2 * tall
    look: dict[str, Any] = {
        "facecolor": fill,
        "edgecolor": edge,
        "linewidth": 1.3,
        "linestyle": dashes,
    }
    if not hatch:
        return [FancyBboxPatch(*place, boxstyle=form, gid=f"box:{box.key}", **look)]
    # the colour of the edge is that of the pattern too
    inside = look | {"hatch": hatch, "edgecolor": HATCH}
    return [
        FancyBboxPatch(*place, boxstyle=form, gid=f"box:{box.key}", **inside),
        FancyBboxPatch(*place, boxstyle=form, **(look | {"facecolor": "none"})),
    ]


def _draw_arrow(axes: Axes, arrow: Arrow, points: list[Point]) -> None:
    name = f"{arrow.tail}>{arrow.head}"
    look: dict[str, Any] = {"color": INK, "linewidth": 1.3}
    dashes = "--" if arrow.dashed else "-"
    line = Line2D(*zip(*points, strict=True), linestyle=dashes, gid=f"arrow:{name}", **look)
    line.set_dash_capstyle("butt")
    axes.add_line(line)
    # the head apart from the line, so that its outline is never dashed
    (x0, y0), (x1, y1) = points[-2:]
    length = abs(x1 - x0) + abs(y1 - y0)
    share = min(0.1 / length, 1)
    begin = (x1 + share * (x0 - x1), y1 + share * (y0 - y1))
    head = FancyArrowPatch(
        path=Path([begin, (x1, y1)]),
        arrowstyle="-|>",
        mutation_scale=13,
        gid=f"head:{name}",
        **look,
    )
    axes.add_patch(head)
    if arrow.label:
        _draw_label(axes, arrow, points, f"label:{name}")


def _draw_label(axes: Axes, arrow: Arrow, points: list[Point], gid: str) -> None:
    pieces = list(zip(points, points[1:], strict=False))
    lengths = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in pieces]
    number = lengths.index(max(lengths)) if arrow.piece is None else arrow.piece
    (x0, y0), (x1, y1) = pieces[number]
    place = arrow.place or ("above" if abs(y0 - y1) < 1e-6 else "right")
    across, up = {"above": (0, 1), "below": (0, -1), "left": (-1, 0), "right": (1, 0)}[place]
    axes.text(
        (x0 + x1) / 2 + across * GAP,
        (y0 + y1) / 2 + up * GAP,
        arrow.label,
        fontsize=SMALL,
        ha={-1: "right", 0: "center", 1: "left"}[across],
        va={-1: "top", 0: "center", 1: "bottom"}[up],
        linespacing=1.1,
        gid=gid,
    )


def _draw_frame(axes: Axes, frame: Frame, outline: Box) -> None:
    (left, _), (_, low), (_, high) = (outline.edge(side) for side in ("left", "bottom", "top"))
    axes.add_patch(
        FancyBboxPatch(
            (left, low),
            outline.width,
            outline.height,
            boxstyle="round,pad=0,rounding_size=0.05",
            facecolor="none",
            edgecolor=style.GREY,
            linestyle=(0, (4, 3)),
            linewidth=1.1,
            gid=f"frame:{frame.key}",
        )
    )
    title = axes.text(
        left + PAD, high - GAP, frame.title, fontsize=SMALL, va="top", gid=f"title:{frame.key}"
    )
    axes.annotate(
        frame.code,
        (1, 1),
        (8, 0),
        xycoords=title,
        textcoords="offset points",
        fontsize=SMALL,
        fontfamily=MONOSPACE,
        va="top",
        gid=f"code:{frame.key}",
    )


def _draw_legend(axes: Axes, looks: Iterable[str], note: str) -> None:
    """Draw a swatch for each look that occurs, in the order of LOOKS, then the note."""
    x, y = 0.15, 0.2
    for look in (look for look in LOOKS if look in looks):
        fill, hatch, edge, dashes, meaning = LOOKS[look]
        swatch = Box(f"legend {look}", (x + 0.17, y), 0.34, "", look=look, height=0.22)
        for patch in _filled(swatch, fill, hatch, edge, dashes):
            patch.set_gid(f"swatch:{look}")
            axes.add_patch(patch)
        axes.text(x + 0.42, y, meaning, fontsize=SMALL, va="center", gid=f"legend:{look}")
        x += 0.42 + 0.08 * len(meaning) + 0.2
    axes.text(
        axes.get_xlim()[1] - 0.15, y, note, fontsize=SMALL, ha="right", va="center", gid="note"
    )
