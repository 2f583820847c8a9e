"""What several recipes share: page, palettes, sentences about groups, houses, and a few things.

The page runs from 0 to 896 units; backgrounds reach from LOW to HIGH because a tilted page shows
its corners.
"""

from __future__ import annotations

import numpy as np

from nbhelpers.data.scenes.drawing import SPAN, band, disc, polygon, ring, stripes
from nbhelpers.data.scenes.scene_parts import Stage, oval

LOW, HIGH = -190, SPAN + 190
PAGE = (0, 0, SPAN, SPAN)
ROOFS = ("red", "grey", "orange", "brown", "white", "blue")
CARS = ("white", "red", "blue", "black", "grey", "yellow")
POND = {
    "green": (92, 134, 92),
    "blue": (70, 122, 158),
    "brown": (134, 112, 82),
    "dark": (44, 60, 62),
}
CROPS = {
    "green": (104, 150, 70),
    "dark green": (68, 102, 60),
    "yellow": (214, 188, 92),
    "brown": (150, 112, 80),
}
GROUND = {
    "grass": "green grass",
    "meadow": "green meadows",
    "dry": "yellow grass",
    "soil": "bare land",
}


def below(line: np.ndarray) -> list:
    """Return everything under a line that runs from left to right."""
    return polygon([(LOW, HIGH), *line.tolist(), (HIGH, HIGH)])


def across(y: int) -> list:
    """Return a straight line over the whole page, from left to right."""
    return [(LOW, y), (HIGH, y)]


def down(x: int) -> list:
    """Return a straight line over the whole page, from top to bottom."""
    return [(x, LOW), (x, HIGH)]


def street(s: Stage, points, width: int, offset: int, cars: int, colours=CARS[:5]):
    """Draw a road with up to `cars` cars on its lane `offset` units to the right."""
    s.road(points, width)
    s.drive(points, offset, cars, colours)


def cottages(s: Stage, count: int, room: int, colour: str, width=(28, 36), turns: int = 35):
    """Draw up to `count` houses of one colour, turned at random, on free places."""
    for x, y in s.spots(count, room):
        s.house(x, y, s.r(*width), s.r(20, 26), s.r(0, turns), colour)


def neighbours(s: Stage, box, step: int = 92, percent: int = 85):
    """Draw rows of houses in two colours wherever the box is free, whole on the picture."""
    palette = [s.pick(*ROOFS), s.pick(*ROOFS)]
    for y in range(box[1] + step // 2, box[3], step):
        for x in range(box[0] + step // 2, box[2], step):
            x1, y1 = x + s.r(-6, 6), y + s.r(-6, 6)
            if s.free(x1, y1, 36) and s.chance(percent) and s.inside(x1, y1, 40):
                s.take(x1, y1, 40)
                s.house(x1, y1, 34 + s.r(-5, 5), 24 + s.r(-4, 4), s.pick(0, 18), s.pick(*palette))


def umbrella(s: Stage, x: int, y: int, colour: str, radius: int = 17):
    """Draw an umbrella with eight sectors."""
    whole = disc(x, y, radius)
    sectors = [polygon([(x, y), *whole[0][[k * 9, k * 9 + 9]].tolist()]) for k in range(0, 8, 2)]
    layers = [(sector, s.shade(colour, -30), 9) for sector in sectors]
    top = (disc(x, y, 3), s.rgb("white"))
    s.thing("umbrella", colour, (whole, s.rgb(colour)), *layers, top, height=16)


def running_track(s: Stage, x: int, y: int, half_length: int, radius: int, colour: str):
    """Draw a running track of the named colour around a football field."""
    lanes = [oval(x, y, half_length, radius - k * radius // 24)[0] for k in range(1, 6)]
    marks = [band(np.concatenate([lane, lane[:1]]), 2) for lane in lanes]
    s.thing(
        "playground",
        colour,
        (oval(x, y, half_length, radius), s.surface("concrete", colour)),
        *s.lines(*marks, strength=9),
        (oval(x, y, half_length, radius * 3 // 4), s.surface("grass", (106, 140, 80))),
    )
    s.pitch(x, y, half_length + radius // 5, radius * 5 // 8)


def tank(s: Stage, x: int, y: int, radius: int, colour: str):
    """Draw a round storage tank with a domed roof."""
    lx, ly = (way * radius // 65 for way in s.canvas.light)
    spokes = [band([(x, y), end], 2)[0] for end in disc(x, y, radius - 3)[0][::12]]
    s.canvas.shadow(disc(x, y, radius), radius * 3 // 4)
    s.thing(
        "storage tank",
        colour,
        (disc(x, y, radius), s.shade(colour, -30)),
        (disc(x - lx // 4, y - ly // 4, radius * 15 // 16), s.shade(colour, -4)),
        (disc(x - lx, y - ly, radius * 5 // 8), s.shade(colour, 10), 10),
        (ring(x, y, radius * 15 // 16, 3), s.shade(colour, -52), 11),
        (spokes, s.shade(colour, -40), 6),
        (disc(x, y, max(radius // 10, 4)), s.shade(colour, -50)),
    )


def crop(s: Stage, name: str, corners):
    """Draw a field of the named crop with the given corners."""
    key = ("crop", name, s.pick(0, 18))
    if key not in s.made:
        rows = stripes(key[2] + s.tilt, s.r(14, 30), s.r(60, 150))
        s.made[key] = s.surface("crop", tuple(c + s.r(-8, 8) for c in CROPS[name]), rows)
    s.thing("field", name, (polygon(corners), s.made[key]))


def box_of(x: int, y: int, width: int, height: int) -> list:
    """Return the corners of a rectangle with its upper left corner at (x, y)."""
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
