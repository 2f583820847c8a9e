"""Recipes of open land: each draws one scene on a stage and adds its facts."""

from __future__ import annotations

from itertools import product

import numpy as np

from nbhelpers.data.scenes.drawing import (
    SPAN,
    along,
    band,
    beside,
    between,
    blob,
    disc,
    fractal,
    noise,
    polygon,
    rect,
    relief,
    ring,
    stripes,
)
from nbhelpers.data.scenes.recipes.common import (
    CROPS,
    HIGH,
    LOW,
    POND,
    across,
    box_of,
    cottages,
    crop,
    down,
)
from nbhelpers.data.scenes.scene_parts import MIDDLE, SOME, Fact, Stage, wavy

# number of round fields -> radius and places
PIVOTS = {
    1: (360, [(448, 448)]),
    2: (215, [(225, 448), (671, 448)]),
    4: (195, [(228, 228), (668, 228), (228, 668), (668, 668)]),
}
# colours of lowland and upland, and what the captions say
MOUNTAINS = {
    "green": ((70, 96, 56), (112, 122, 80), "covered with green plants"),
    "brown": ((120, 92, 66), (190, 160, 122), "bare and brown"),
    "snow": ((96, 96, 82), (140, 128, 116), "covered with white snow"),
}
SHAPES_OF_FIELDS = [(2, 1), (1, 3), (2, 2), (3, 2), (2, 3), (3, 3), (4, 2), (2, 4), (5, 2), (3, 1)]


def bareland(s: Stage):
    """Draw bare land with bushes, rocks, mounds or ponds."""
    colour, name = s.pick(
        ((176, 138, 104), "brown"),
        ((196, 168, 128), "yellow"),
        ((168, 156, 142), "grey"),
        ((170, 122, 98), "red"),
    )
    s.start("soil", colour, fractal(s.rng, 72, 260) + relief(fractal(s.rng, 28, 90), s.light, 10))
    for _ in range(s.r(2, 5)):
        patch = blob(s.r(0, SPAN), s.r(0, SPAN), s.r(90, 220), s.rng, 6, 8, s.r(10, 26))
        s.paint((patch, s.surface("soil", s.shade(colour, s.pick(-20, 14, 22))), 9))
    for _ in range(s.r(0, 3)):
        track = wavy(s, s.r(60, 840), s.r(60, 840), 90, 5)
        ruts = [band(beside(track, side), 6) for side in (-9, 9)]
        s.paint(*[(rut, s.shade(colour, 30), 9) for rut in ruts])
    what = s.pick("bush", "rock", "mound", "pond")
    count = s.r(1, 10)
    if what in ("bush", "rock"):
        for x, y in s.spots(count, 30):
            BUSHES[what](s, x, y)
    elif what == "mound":
        for x, y in s.spots(min(count, 6), 70):
            mound(s, x, y, s.r(40, 62), colour)
    else:
        lakes(s, 110, (60, 100, 5), "pond", ("green", POND["green"], "soil"))
    if s.chance(40):
        s.scatter_trees(s.r(6, 16), 16, 28, (-20, -20, SPAN, 150))
    s.around = f"covered with {name} soil"
    s.add_facts(
        Fact("bush", "scattered on the bare land", "green", one="on the bare land"),
        Fact("rock", "scattered on the bare land", "brown", one="on the bare land"),
        Fact("mound", "rising from the bare land"),
        Fact("pond", "in the bare land", "green"),
        Fact("tree", "beside the bare land", "green", amount=SOME),
    )


def mound(s: Stage, x: int, y: int, radius: int, colour):
    """Draw a mound of earth."""
    lx, ly = s.canvas.light
    layers = []
    for k in range(8):
        step = blob(
            x - lx * k * radius // 300,
            y - ly * k * radius // 300,
            radius * (8 - k) // 8,
            s.rng,
            2,
            9,
        )
        layers.append((step, s.surface("soil", s.shade(colour, -14 + k * 5)), 10))
    s.canvas.shadow(disc(x, y, radius), radius // 2, 6)
    s.thing("mound", "", *layers)


def desert(s: Stage):
    """Draw dunes, and sometimes a road or an oasis."""
    colour, name = s.pick(
        ((222, 186, 128), "yellow"), ((206, 148, 96), "orange"), ((184, 150, 116), "brown")
    )
    period = s.r(100, 200)
    bend = noise(s.rng, 90, s.r(120, 420)).astype(np.int64) + noise(s.rng, 36, 60)
    phase = (along(s.r(0, 71)) + bend) % period
    rise = period * 3 // 4
    height = np.where(phase < rise, phase * 256 // rise, (period - phase) * 256 // (period - rise))
    shade = relief(height * period // 200, s.light, s.r(7, 11)) // 2 + fractal(s.rng, 40, 160)
    s.start("sand", colour, shade)
    if s.chance(45):
        way = wavy(s, s.r(200, 700), s.r(200, 700), 120)
        s.road(way, 34, lines=False, verge=None)
        s.drive(way, 0, s.r(0, 3), gap=110)
    if s.chance(35):
        for x, y in s.spots(1, 130):
            s.paint((blob(x, y, 118, s.rng, 3), s.surface("grass"), 12))
            s.water(blob(x, y, 64, s.rng, 4), "lake", "blue", (70, 130, 160), "grass")
            around = disc(x, y, 92)[0][::9][: s.r(5, 8)].tolist()
            s.trees([(*place, s.r(12, 20)) for place in around])
    count = s.r(0, 9)
    kind = s.pick("bush", "rock")
    for x, y in s.spots(count, 26):
        BUSHES[kind](s, x, y)
    s.around = f"covered with {name} sand"
    s.add_facts(
        Fact("car", "driving on the road"),
        Fact("road", "crossing the desert"),
        Fact("lake", "in the desert", "blue"),
        Fact("tree", "around the small lake", "green", amount=SOME),
        Fact("bush", "scattered on the sand", "green", one="on the sand"),
        Fact("rock", "scattered on the sand", "brown", one="on the sand"),
    )


def farmland(s: Stage):
    """Draw rectangular fields, or round ones."""
    s.start("dry", (136, 134, 88))
    if s.chance(25):
        return pivots(s)
    columns, rows = s.pick(*SHAPES_OF_FIELDS)
    gap = s.r(5, 9)
    xs = [LOW, *(SPAN * k // columns + s.r(-50, 50) for k in range(1, columns)), HIGH]
    ys = [LOW, *(SPAN * k // rows + s.r(-50, 50) for k in range(1, rows)), HIGH]
    chosen = [s.pick(*CROPS) for _ in range(columns * rows)]
    for name, (row, column) in zip(chosen, product(range(rows), range(columns)), strict=True):
        left, top = xs[column] + gap, ys[row] + gap
        crop(s, name, box_of(left, top, xs[column + 1] - gap - left, ys[row + 1] - gap - top))
    s.add_facts(*[Fact("field", "in the farmland", name) for name in dict.fromkeys(chosen)])
    if s.chance(45):
        y = ys[s.r(1, rows - 1)] if rows > 1 else MIDDLE
        s.road(across(y), 34, lines=False)
    houses = s.r(1, 3) if s.chance(40) else 0
    colour = s.pick("red", "white", "grey")
    cottages(s, houses, 44, colour, (28, 38), 17)
    if columns > 1 and s.chance(50):
        x = xs[s.r(1, columns - 1)]
        s.trees([(x + s.r(-6, 6), y, s.r(14, 22)) for y in range(20, SPAN, s.r(44, 80))])
    s.add_facts(
        Fact("road", "passing through the farmland"),
        Fact("house", "beside the fields", colour),
        Fact("tree", "planted in a row between the fields", "green", amount=SOME),
    )


def pivots(s: Stage):
    """Draw round fields that are watered by turning arms."""
    count = s.pick(1, 2, 4, 4)
    radius, places = PIVOTS[count]
    names = [s.pick(*CROPS) for _ in places]
    soil = s.surface("soil", s.pick((186, 164, 124), (146, 148, 92)))
    s.paint((rect(MIDDLE, MIDDLE, 700, 700), soil))
    for name, (x, y) in zip(names, places, strict=True):
        rows = s.surface("crop", CROPS[name], stripes(s.r(0, 35), 20, 60))
        rings = [
            (ring(x, y, radius * k // 6, 3), s.shade(CROPS[name], -24), 8) for k in range(1, 6)
        ]
        arm = band([disc(x, y, radius - 2)[0][s.r(0, 71)], (x, y)], 4)
        s.thing("round field", name, (disc(x, y, radius), rows), *rings, (arm, s.rgb("white"), 9))
    if count > 1:
        way = across(MIDDLE) if count == 4 else down(MIDDLE)
        s.road(way, 22, lines=False)
    s.around = "surrounded by bare land"
    s.add_facts(*[Fact("round field", "in the farmland", name) for name in dict.fromkeys(names)])
    s.add_facts(Fact("road", "between the round fields"))


def forest(s: Stage):
    """Draw a closed forest with at most one thing in it."""
    shade = s.pick((52, 84, 46), (64, 92, 48), (46, 74, 52))
    s.start("grass")
    canopy = s.canopy(s.pick(7, 9, 11), shade)
    s.thing("tree", "green", (rect(MIDDLE, MIDDLE, 900, 900), canopy), count=999)
    amount = s.pick("many", "many dense")
    what = s.pick("river", "road", "clearing", "lake", "houses", "nothing")
    way = wavy(s, s.r(150, 750), s.r(150, 750), 150)
    colour = ""
    if what == "river":
        s.water(band(way, s.r(50, 90)), "river", "green", (84, 122, 104), "soil", 5)
    elif what == "road":
        s.road(way, 36, lines=s.chance(50))
        s.drive(way, 0, s.r(0, 3), gap=120)
    elif what == "clearing":
        for x, y in s.spots(s.r(1, 4), 92):
            glade = blob(x, y, s.r(60, 88), s.rng, 4)
            s.thing("clearing", "", (glade, s.surface(s.pick("meadow", "soil", "dry"))))
    elif what == "lake":
        lakes(s, 150, (90, 140, 4), "lake", ("blue", (62, 104, 132), "soil"))
    elif what == "houses":
        colour = s.pick("red", "white", "grey", "orange")
        for x, y in s.spots(s.r(1, 4), 66):
            s.paint((blob(x, y, 62, s.rng, 3), s.surface("meadow")))
            s.house(x, y, s.r(30, 38), s.r(22, 28), s.r(0, 35), colour)
    s.add_facts(
        Fact("tree", "in the forest", "green", amount=amount),
        Fact("river", "flowing through the forest", "green"),
        Fact("road", "passing through the forest"),
        Fact("car", "driving on the road"),
        Fact("clearing", "surrounded by the trees"),
        Fact("lake", "surrounded by the trees", "blue"),
        Fact("house", "hidden in the forest", colour),
    )


def meadow(s: Stage):
    """Draw a meadow with trees, hay bales, sheep or ponds."""
    colour = s.pick((128, 152, 84), (146, 166, 92), (112, 142, 82), (160, 160, 100))
    mown = stripes(s.r(0, 35), s.r(60, 130), s.pick(0, 40, 90))
    s.start("meadow", colour, mown)
    if s.chance(45):
        way = wavy(s, s.r(120, 780), s.r(120, 780), 90)
        s.path(way, s.r(12, 20), (206, 190, 150))
    s.add_facts(Fact("path", "crossing the meadow"))
    kind = s.pick("tree", "tree", "hay bale", "sheep", "pond")
    count = s.r(1, 10)
    if kind == "tree":
        spots = [(x, y, s.r(24, 36)) for x, y in s.spots(count, 40)]
        for spot in spots:
            s.trees([spot])
        s.add_facts(Fact("tree", "standing on the meadow", "green"))
        return
    if kind == "hay bale":
        for x, y in s.spots(count, 26):
            bale(s, x, y)
    elif kind == "sheep":
        for x, y in s.spots(count, 22):
            sheep(s, x, y)
    else:
        lakes(s, 120, (70, 110, 4), "pond", ("blue", (74, 118, 146), "dry"))
    if s.chance(50):
        edge = wavy(s, s.r(90, 150), s.r(90, 150), 30, 7)
        s.grove(polygon([(LOW, LOW), *edge.tolist(), (HIGH, LOW)]), 8)
    s.add_facts(
        Fact("hay bale", "lying on the meadow", "yellow"),
        Fact("sheep", "grazing on the meadow", "white"),
        Fact("pond", "in the meadow", "blue"),
        Fact("tree", "beside the meadow", "green", amount=SOME),
    )


def bale(s: Stage, x: int, y: int):
    """Draw a hay bale."""
    d = s.r(0, 35)
    ridge = (rect(x, y, 20, 4, d), s.shade("yellow", 18), 10)
    s.thing("hay bale", "yellow", (rect(x, y, 20, 13, d), s.rgb("yellow")), ridge, height=16)


def sheep(s: Stage, x: int, y: int):
    """Draw a sheep."""
    d = s.r(0, 71)
    s.thing("sheep", "white", (disc(x, y, 21, 13, d), s.rgb("white")), height=8)
    s.paint((polygon([(16, -6), (28, -5), (28, 5), (16, 6)], d, x, y), s.rgb("black"), 13))


def mountain(s: Stage):
    """Draw folded mountains with at most one thing on them."""
    folds = [
        np.abs(noise(s.rng, cell, strength * 16)).astype(np.int32)
        for cell, strength in ((110, 400), (56, 240), (28, 110), (14, 40))
    ]
    shade = relief(4800 - sum(folds), s.light, 1)
    height = 300 - (sum(folds) >> 4)
    kind = s.pick("green", "brown", "snow")
    lowland, upland, covered = MOUNTAINS[kind]
    base = between(lowland, upland, height * 3 // 2)
    if kind == "snow":
        base = between(base, (240, 244, 248), (height - s.r(60, 130)) * 4)
    light = (shade.astype(np.int32) + s.fine // 2)[..., None]
    s.start("grass")
    s.canvas.pixels = np.clip(base + (light * (base + 60) >> 10), 0, 255).astype(np.int16)
    what = s.pick("lake", "road", "river", "nothing", "houses")
    colour = ""
    if what == "lake":
        lakes(s, 110, (60, 104, 5), "lake", ("blue", (54, 108, 150), "dry"))
    elif what in ("road", "river"):
        way = wavy(s, s.r(160, 740), s.r(160, 740), 170, 7)
        if what == "road":
            s.road(way, 26, lines=False, verge=None)
        else:
            s.water(band(way, s.r(34, 60)), "river", "green", (96, 150, 142), "gravel", 8)
    elif what == "houses":
        colour = s.pick("red", "white", "blue")
        for x, y in s.spots(s.r(1, 5), 40):
            s.house(x, y, s.r(24, 30), s.r(18, 22), s.r(0, 35), colour)
    s.add_facts(
        Fact("mountain", covered, amount="the"),
        Fact("lake", "between the mountains", "blue"),
        Fact("road", "winding through the mountains"),
        Fact("river", "flowing through the valley", "green"),
        Fact("house", "built on the mountain", colour),
    )


def lakes(s: Stage, room: int, shape: tuple, kind: str, look: tuple):
    """Draw one or two bodies of water.

    room   units that each takes
    shape  smallest and largest radius, unevenness in sixteenths
    look   named colour, painted colour, surface of the shore
    """
    low, high, wobble = shape
    for x, y in s.spots(s.r(1, 2), room):
        s.water(blob(x, y, s.r(low, high), s.rng, wobble), kind, *look)


def bush(s: Stage, x: int, y: int):
    """Draw a bush."""
    shape = blob(x, y, s.r(13, 20), s.rng, 4, 8)
    top = blob(x - 3, y - 3, 8, s.rng, 5, 7)
    light, dark = (s.surface("tree", colour) for colour in ((116, 138, 80), (92, 112, 62)))
    s.thing("bush", "green", (shape, dark), (top, light), height=12)


def rock(s: Stage, x: int, y: int):
    """Draw a rock."""
    shape = blob(x, y, s.r(15, 24), s.rng, 5, 6)
    lx, ly = s.canvas.light
    top = (shape[0] - (x, y)) * 9 // 16 + (x - lx // 3, y - ly // 3)
    layers = ((shape, s.surface("gravel", "brown")), ([top], s.shade("brown", 34), 11))
    s.thing("rock", "brown", *layers, height=18)


BUSHES = {"bush": bush, "rock": rock}
