"""Integer drawing: loops of points to coverage, noise to texture, and a canvas with objects.

Lengths are in units of a quarter pixel (SPAN = 896 units = 224 pixels). Directions are in steps of
five degrees (72 to the full turn, clockwise on the picture because y points down). Everything is
integer arithmetic, so that every machine draws the same pixels.

A shape is a list of loops: (n, 2) int64 arrays, all turning the same way. A hole is a reversed
loop.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from math import isqrt

import numpy as np

SIDE = 224
UNIT = 4
SPAN = SIDE * UNIT
FULL = UNIT * UNIT

# 1024 times the cosine of 0, 5, ... 85 degrees
_QUARTER = (
    1024,
    1020,
    1008,
    989,
    962,
    928,
    887,
    839,
    784,
    724,
    658,
    587,
    512,
    433,
    350,
    265,
    178,
    89,
)
COS = np.array(
    _QUARTER
    + (0,)
    + tuple(-c for c in _QUARTER[:0:-1])
    + tuple(-c for c in _QUARTER)
    + (0,)
    + _QUARTER[:0:-1],
    dtype=np.int64,
)
SIN = np.roll(COS, 18)


def turn(points, direction: int, x: int = 0, y: int = 0) -> np.ndarray:
    """Return the points turned about the origin by `direction` steps, then moved to (x, y)."""
    points = np.asarray(points, dtype=np.int64)
    if direction % 72 == 0:
        return points + (x, y)
    c, s = int(COS[direction % 72]), int(SIN[direction % 72])
    across = (points[:, 0] * c - points[:, 1] * s + 512) >> 10
    down = (points[:, 0] * s + points[:, 1] * c + 512) >> 10
    return np.stack([across + x, down + y], axis=1)


def _same_way(points: np.ndarray) -> np.ndarray:
    after = np.roll(points, -1, axis=0)
    area = (points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]).sum()
    return points if area >= 0 else points[::-1]


def polygon(points, direction: int = 0, x: int = 0, y: int = 0) -> list:
    """Return the loop through the points, turned by `direction` and moved to (x, y)."""
    return [_same_way(turn(points, direction, x, y))]


def rect(x: int, y: int, half_width: int, half_height: int, direction: int = 0) -> list:
    """Return a rectangle about (x, y)."""
    w, h = half_width, half_height
    return [turn([(-w, -h), (w, -h), (w, h), (-w, h)], direction, x, y)]


def disc(x: int, y: int, rx: int, ry: int | None = None, direction: int = 0) -> list:
    """Return a disc about (x, y), or an ellipse if `ry` is given."""
    points = np.stack([COS * rx + 512 >> 10, SIN * (ry or rx) + 512 >> 10], axis=1)
    return [turn(points, direction, x, y)]


def ring(x: int, y: int, radius: int, width: int) -> list:
    """Return a ring about (x, y): its outer radius, and its width inwards."""
    return disc(x, y, radius) + [disc(x, y, radius - width)[0][::-1]]


def smooth(points, rounds: int = 3, closed: bool = False) -> np.ndarray:
    """Return the points with their corners cut, `rounds` times (Chaikin, 1974)."""
    points = np.asarray(points, dtype=np.int64)
    for _ in range(rounds):
        after = np.roll(points, -1, axis=0)
        cut = np.stack([points * 3 + after >> 2, points + after * 3 >> 2], axis=1).reshape(-1, 2)
        points = cut if closed else np.concatenate([points[:1], cut[:-2], points[-1:]])
    return points


def blob(
    x: int, y: int, radius: int, rng, wobble: int = 5, corners: int = 10, stretch: int = 16
) -> list:
    """Return a rounded free shape about (x, y).

    `wobble` is the unevenness and `stretch` the width, both in sixteenths of the radius.
    """
    k = np.arange(corners) * 72 // corners
    radii = radius * rng.integers(16 - wobble, 17 + wobble, corners) >> 4
    points = np.stack([(COS[k] * radii >> 10) * stretch >> 4, SIN[k] * radii >> 10], axis=1)
    return [smooth(points, 3, closed=True) + (x, y)]


def band(points, width: int, round_ends: bool = False) -> list:
    """Return a line of the given width along the points, with round joints."""
    points = np.asarray(points, dtype=np.int64)
    loops = []
    for (x0, y0), (x1, y1) in zip(points[:-1].tolist(), points[1:].tolist(), strict=True):
        length = isqrt(4 * ((x1 - x0) ** 2 + (y1 - y0) ** 2))
        if length:
            nx, ny = (y0 - y1) * width // length, (x1 - x0) * width // length
            loops.append(
                np.array(
                    [(x0 - nx, y0 - ny), (x1 - nx, y1 - ny), (x1 + nx, y1 + ny), (x0 + nx, y0 + ny)]
                )
            )
    joints = points if round_ends else points[1:-1]
    return loops + [disc(x, y, width // 2)[0] for x, y in joints.tolist()]


def dashes(points, width: int, on: int, off: int) -> list:
    """Return a dashed line along the points: dashes of `on` units, gaps of `off` units."""
    points = np.asarray(points, dtype=np.int64)
    loops, gone = [], 0
    for (x0, y0), (x1, y1) in zip(points[:-1].tolist(), points[1:].tolist(), strict=True):
        length = isqrt((x1 - x0) ** 2 + (y1 - y0) ** 2)
        start = -(gone % (on + off))
        while start < length:
            a, b = max(start, 0), min(start + on, length)
            if b > a:
                ends = [
                    (x0 + (x1 - x0) * t // length, y0 + (y1 - y0) * t // length) for t in (a, b)
                ]
                loops += band(ends, width)
            start += on + off
        gone += length
    return loops


def beside(points, offset: int) -> np.ndarray:
    """Return the points moved sideways by `offset` units, to the right of their direction."""
    points = np.asarray(points, dtype=np.int64)
    before = np.concatenate([points[:1], points[:-1]])
    after = np.concatenate([points[1:], points[-1:]])
    moved = []
    for (x, y), (dx, dy) in zip(points.tolist(), (after - before).tolist(), strict=True):
        length = max(isqrt(dx * dx + dy * dy), 1)
        moved.append((x - dy * offset // length, y + dx * offset // length))
    return np.array(moved)


def swept(loops: list, dx: int, dy: int) -> list:
    """Return what the loops cover while they move by (dx, dy): the outline of a shadow."""
    out = loops + [loop + (dx, dy) for loop in loops]
    for loop in loops:
        corners = loop.tolist()
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            quad = [(x0, y0), (x1, y1), (x1 + dx, y1 + dy), (x0 + dx, y0 + dy)]
            back = (x1 - x0) * dy < (y1 - y0) * dx
            out.append(np.array(quad[::-1] if back else quad, dtype=np.int64))
    return out


def _pixels(places: np.ndarray) -> tuple[int, int]:
    """Return the first pixel that the places (in units) reach on the picture, and the end."""
    return max(int(places.min()), 0) // UNIT, -(-min(int(places.max()), SPAN) // UNIT)


def coverage(loops: list, tilt: int = 0):
    """Return (rows, columns, cover): a window and how much of each pixel is covered, 0..16.

    The loops are first turned about the middle by `tilt` steps. Winding is non-zero, with 4x4
    samples per pixel. None if nothing lies on the picture.
    """
    points, middle = np.concatenate(loops), SPAN // 2
    if tilt:
        points = turn(points - middle, tilt, middle, middle)
    lengths = np.array([len(loop) for loop in loops])
    last = np.cumsum(lengths) - 1
    after = np.arange(1, len(points) + 1)
    after[last] = last - lengths + 1
    ends = np.concatenate([points, points[after]], axis=1)
    ends = ends[ends[:, 1] != ends[:, 3]]
    if not len(ends):
        return None
    left, right = _pixels(ends[:, 0])
    top, bottom = _pixels(ends[:, 1])
    if left >= right or top >= bottom:
        return None
    falling = ends[:, 3] > ends[:, 1]
    x0, y0, x1, y1 = np.where(falling[:, None], ends, ends[:, [2, 3, 0, 1]]).T
    first = np.maximum(y0, top * UNIT)
    rows = np.maximum(np.minimum(y1, bottom * UNIT) - first, 0)
    edge = np.repeat(np.arange(len(ends)), rows)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(rows) - rows, rows) + first[edge]
    dx, dy = (x1 - x0)[edge], (y1 - y0)[edge]
    crossing = -((dy - 2 * dy * x0[edge] - (2 * (row - y0[edge]) + 1) * dx) // (2 * dy))
    width, height = (right - left) * UNIT, (bottom - top) * UNIT
    place = (row - top * UNIT) * (width + 1) + np.clip(crossing - left * UNIT, 0, width)
    winding = np.zeros(height * (width + 1), dtype=np.int16)
    np.add.at(winding, place, np.where(falling, np.int16(1), np.int16(-1))[edge])
    # the sum of every row is zero, so that one cumulative sum serves all rows
    winding = winding.cumsum(dtype=np.int16).reshape(height, width + 1)[:, :-1]
    inside = (winding != 0).view(np.uint8).reshape(height // UNIT, UNIT, width)
    down = inside[:, 0] + inside[:, 1] + inside[:, 2] + inside[:, 3]
    cover = down[:, 0::4] + down[:, 1::4] + down[:, 2::4] + down[:, 3::4]
    return slice(top, bottom), slice(left, right), cover


@cache
def _spline(cell: int) -> np.ndarray:
    t = np.arange(cell, dtype=np.int64)
    r = cell - t
    near, far = 4 * cell**3 - 6 * t**2 * cell + 3 * t**3, 4 * cell**3 - 6 * r**2 * cell + 3 * r**3
    return np.stack([r**3, near, far, t**3]) * 16384 // (6 * cell**3)


def noise(rng, cell: int, strength: int = 128) -> np.ndarray:
    """Return smooth noise with features of about `cell` pixels, roughly -strength..strength."""
    count = -(-SIDE // cell)
    knots = rng.integers(-256, 257, (count + 3, count + 3)) << 6
    weights = _spline(cell)
    tall = sum(weights[k][None, :, None] * knots[k : k + count, None, :] for k in range(4)) >> 14
    tall = tall.reshape(count * cell, count + 3)[:SIDE]
    wide = sum(weights[k][None, None, :] * tall[:, k : k + count, None] for k in range(4)) >> 14
    return (wide.reshape(SIDE, -1)[:, :SIDE] * strength >> 13).astype(np.int16)


def fractal(rng, cell: int, strength: int = 128, finest: int = 4) -> np.ndarray:
    """Return noise of several sizes, each half as strong and half as large as the last."""
    total = np.zeros((SIDE, SIDE), dtype=np.int16)
    while cell >= finest and strength:
        total += noise(rng, cell, strength)
        cell, strength = cell // 2, strength // 2
    return total


def speckle(rng, strength: int) -> np.ndarray:
    """Return independent noise for each pixel: (224, 224) int16 in -strength..strength."""
    return rng.integers(-strength, strength + 1, (SIDE, SIDE), dtype=np.int16)


def along(direction: int) -> np.ndarray:
    """Return (224, 224) int: how far each pixel lies in the given direction, in units."""
    grid = np.arange(SIDE, dtype=np.int64) * UNIT
    return COS[direction % 72] * grid[None, :] + SIN[direction % 72] * grid[:, None] >> 10


def stripes(direction: int, period: int, strength: int) -> np.ndarray:
    """Return triangle waves across the given direction, `period` in units."""
    phase = along(direction) % period
    return (np.abs(2 * phase - period) * 2 * strength // period - strength).astype(np.int16)


def tint(colour, field: np.ndarray) -> np.ndarray:
    """Return (224, 224, 3) int16: the colour made lighter or darker by a field of -128..128."""
    colour = np.asarray(colour, dtype=np.int32)
    lighter = field.astype(np.int32)[..., None] * (colour + 40) >> 11
    return np.clip(colour + lighter, 0, 255).astype(np.int16)


def between(low, high, field: np.ndarray) -> np.ndarray:
    """Return (224, 224, 3) int16: from colour `low` at field 0 to colour `high` at field 256."""
    share = np.clip(field, 0, 256).astype(np.int32)[..., None]
    low, high = np.asarray(low, dtype=np.int32), np.asarray(high, dtype=np.int32)
    return (low + ((high - low) * share >> 8)).astype(np.int16)


def relief(height: np.ndarray, light: tuple[int, int], gain: int) -> np.ndarray:
    """Return the slope shading of a height field: brighter towards the sun.

    `light` is the direction in which shadows fall.
    """
    height = height.astype(np.int32)
    east = np.roll(height, -1, 1) - np.roll(height, 1, 1)
    south = np.roll(height, -1, 0) - np.roll(height, 1, 0)
    east[:, [0, -1]], south[[0, -1]] = east[:, [1, -2]], south[[1, -2]]
    return np.clip((east * light[0] + south * light[1]) * gain >> 4, -1600, 1600).astype(np.int16)


def crowns(rng, cell: int, light: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return tree crowns from above: (shade, tone), int16 fields.

    Each crown is a lit dome with its own tone.
    """
    count = SIDE // cell + 3
    spots = rng.integers(0, cell * UNIT, (count, count, 2), dtype=np.int32)
    tones = rng.integers(-128, 129, (count, count), dtype=np.int32)
    sizes = rng.integers(12, 21, (count, count), dtype=np.int32)
    axis = np.arange(SIDE, dtype=np.int32)
    best = np.full((SIDE, SIDE), 1 << 24, dtype=np.int32)
    tone, slope = np.zeros((SIDE, SIDE), np.int32), np.zeros((SIDE, SIDE), np.int32)
    for drow in range(3):
        for dcol in range(3):
            row, col = axis // cell + drow, axis // cell + dcol
            at = np.ix_(row, col)
            dx = ((axis + cell - col * cell) * UNIT)[None, :] - spots[at][..., 0]
            dy = ((axis + cell - row * cell) * UNIT)[:, None] - spots[at][..., 1]
            apart = (dx * dx + dy * dy) * 16 // sizes[at]
            nearer = apart < best
            np.copyto(best, apart, where=nearer)
            np.copyto(tone, tones[at], where=nearer)
            np.copyto(slope, dx * light[0] + dy * light[1], where=nearer)
    dome = 400 - best * 3200 // (cell * UNIT) ** 2
    shade = np.clip(dome, -800, 400) - slope * 60 // (cell * UNIT)
    return shade.astype(np.int16), tone.astype(np.int16)


class Canvas:
    """A picture that is being painted.

    pixels  (224, 224, 3) int16
    owner   (224, 224) int16: the object that shows at each pixel, -1 for none
    light   the direction of shadows, in sixteenths of the height of what casts them
    tilt    everything drawn is turned about the middle by this number of five-degree steps
    """

    def __init__(self, ground: np.ndarray, light: tuple[int, int], tilt: int = 0):
        self.pixels = ground.astype(np.int16)
        self.owner = np.full((SIDE, SIDE), -1, dtype=np.int16)
        self.tilt = tilt
        self.light = tuple(turn([light], -tilt)[0].tolist())
        self.names: list[tuple[str, str, int]] = []
        self._item = -1

    @contextmanager
    def again(self, number: int):
        """Let what is painted inside belong to the object of that number."""
        self._item = number
        yield
        self._item = -1

    def item(self, kind: str, colour: str = "", count: int = 1):
        """Let what is painted inside belong to a new object that stands for `count` things."""
        self.names.append((kind, colour, count))
        return self.again(len(self.names) - 1)

    def paint(self, loops: list, colour, strength: int = FULL):
        """Fill the loops with a colour (3,) or texture (224, 224, 3).

        Below full strength, the owners of the pixels do not change.
        """
        found = coverage(loops, self.tilt) if loops else None
        if found is None:
            return
        rows, columns, cover = found
        colour = np.asarray(colour, dtype=np.int16)
        colour = colour[rows, columns] if colour.ndim == 3 else colour
        share = (cover.astype(np.int16) * strength >> 4)[..., None]
        spot = self.pixels[rows, columns]
        self.pixels[rows, columns] = spot + ((colour - spot) * share + FULL // 2 >> 4)
        if strength == FULL:
            self.owner[rows, columns][cover >= FULL // 2] = self._item

    def shadow(self, loops: list, height: int, depth: int = 9):
        """Darken the shadow of the loops; `height` in units."""
        dx, dy = (way * height // 16 for way in self.light)
        found = coverage(swept(loops, dx, dy), self.tilt)
        if found is None:
            return
        rows, columns, cover = found
        share = (cover.astype(np.int32) * depth)[..., None] * (17, 16, 14)
        spot = self.pixels[rows, columns]
        self.pixels[rows, columns] = spot - (spot * share >> 12)

    def lit(self, colour, direction: int) -> tuple[int, int, int]:
        """Return the colour of a roof that slopes down in a direction: lighter towards the sun."""
        across, down = self.light
        towards = -int(COS[direction % 72] * across + SIN[direction % 72] * down) // 1024
        red, green, blue = (min(255, max(0, int(c) * (64 + towards) // 64)) for c in colour)
        return red, green, blue
