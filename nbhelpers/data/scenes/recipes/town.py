"""Recipes of houses and streets: each draws one scene on a stage and adds its facts."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np

from nbhelpers.data.scenes.drawing import SPAN, band, disc, polygon, rect, ring, turn
from nbhelpers.data.scenes.recipes.common import (
    CARS,
    GROUND,
    HIGH,
    LOW,
    PAGE,
    ROOFS,
    across,
    down,
    neighbours,
    street,
)
from nbhelpers.data.scenes.scene_parts import EACH, MIDDLE, SAME, SOME, Fact, Stage, wavy

# the side of the road and the distance from it
PLOTS = ((-1, 130), (1, 130), (-1, 310), (1, 310))
STREETS = {1: (448,), 2: (270, 640), 3: (160, 448, 736)}
CORNERS = {"round": 24, "oval": 24, "star": 12, "hexagon": 6}
BUILDINGS = {
    "round": "round building",
    "oval": "oval building",
    "star": "star-shaped building",
    "hexagon": "hexagonal building",
}
OFFICES = [("white", "grey"), ("white",), ("grey",), ("white", "brown")]
OFFICES += [("blue", "white"), ("red", "grey")]
DENSE_ROOFS = [("red",), ("grey",), ("orange", "orange", "red"), ("brown", "grey")]
DENSE_ROOFS += [("white", "grey"), ("red", "blue")]


def church(s: Stage):
    """Draw a church with a tower or a dome on a small square."""
    s.start("grass")
    s.paint(
        (rect(MIDDLE, MIDDLE, 310, 230), s.surface("paving")),
        (rect(MIDDLE, MIDDLE, 40, 460), s.surface("paving")),
    )
    colour = s.pick("grey", "red", "brown", "orange", "blue", "white", "green")
    x, y = MIDDLE + s.r(-70, 70), MIDDLE + s.r(-50, 50)
    length, width = s.r(170, 220), s.r(52, 66)
    arm, at = s.r(110, 140), s.r(20, 70)
    dome = s.chance(40)
    _nave(s, x, y, (length, width, arm, at), colour)
    if dome:
        other = s.pick("white", "green", "blue") if colour != "white" else "grey"
        _dome(s, x + at, y, width + 8, other)
    else:
        _tower(s, x - length, y, width - 6, colour)
    s.take(x, y, 300)
    s.take(x - length, y, 130)
    s.take(x + length, y, 130)
    if s.chance(75):
        street(s, across(s.pick(60, 836)), 50, 12, s.r(0, 5))
    if s.chance(60):
        neighbours(s, PAGE, 100, percent=s.r(30, 90))
    s.scatter_trees(s.r(10, 34), 18, 30)
    top = "with a round dome" if dome else "with a tall tower"
    s.add_facts(
        Fact("church", "in the middle of a small square", colour, having=top),
        Fact("road", "next to the church"),
        Fact("car", "on the road near the church", SAME),
        Fact("house", "around the church", SAME, "near the church"),
        Fact("tree", "around the church", "green", amount=SOME),
    )


def _nave(s: Stage, x: int, y: int, sizes: tuple[int, int, int, int], colour: str):
    """Draw a nave and a transept; `sizes`: length, width, arm and place of the transept."""
    length, width, arm, at = sizes
    s.canvas.shadow(rect(x, y, length, width) + rect(x + at, y, width, arm), 50)
    naves, transepts = [], []
    for side in (-1, 1):
        end = side * width
        nave = [(-length, 0), (length, 0), (length, end), (-length, end)]
        transept = [
            (0, -arm),
            (end, -arm),
            (end, -width),
            (0, 0),
            (end, width),
            (end, arm),
            (0, arm),
        ]
        naves.append((polygon(nave, 0, x, y), s.canvas.lit(s.rgb(colour), 36 - 18 * side)))
        lit = s.canvas.lit(s.rgb(colour), 18 - 18 * side)
        transepts.append((polygon(transept, 0, x + at, y), lit))
    ridge = band([(x - length, y), (x + length, y)], 4)
    ridge += band([(x + at, y - arm), (x + at, y + arm)], 4)
    s.thing("church", colour, *naves, *transepts, (ridge, s.shade(colour, 34)))


def _tower(s: Stage, x: int, y: int, half: int, colour: str):
    s.canvas.shadow(rect(x, y, half, half), 130)
    corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
    with s.canvas.again(len(s.canvas.names) - 1):
        for k, way in enumerate((54, 0, 18, 36)):
            points = [corners[k], corners[(k + 1) % 4], (0, 0)]
            s.paint((polygon(points, 0, x, y), s.canvas.lit(s.shade(colour, -14), way)))


def _dome(s: Stage, x: int, y: int, radius: int, colour: str):
    lx, ly = (way * radius // 190 for way in s.canvas.light)
    rings = [
        (disc(x - lx * k, y - ly * k, radius * (8 - k) // 8), s.shade(colour, -40 + 9 * k))
        for k in range(8)
    ]
    s.thing("dome", colour, *rings, (disc(x, y, 6), s.shade(colour, 40)), height=70)


def commercial(s: Stage):
    """Draw tall buildings along one or two streets."""
    s.start("concrete", s.pick((158, 154, 148), (146, 146, 148), (172, 166, 154)))
    x, y = s.r(300, 596), s.r(300, 596)
    crossing = s.chance(65)
    s.road(across(y), 66)
    if crossing:
        s.road(down(x), 66)
        s.paint((rect(x, y, 32, 32), s.surface("asphalt")))
    colours = s.pick(*OFFICES)
    spots = s.spots(s.r(3, 10), 104, (100, 100, 796, 796), tries=120)
    plots = [(x1, y1, s.r(72, 96), s.r(72, 96)) for x1, y1 in spots]
    light = s.canvas.light
    s.paint(*[(rect(x, y, w + 18, h + 18), s.surface("paving")) for x, y, w, h in plots])
    for x1, y1, w, h in sorted(plots, key=lambda p: p[0] * light[0] + p[1] * light[1]):
        tall_building(s, x1, y1, w, h, s.pick(*colours), s.r(60, 140))
    for x1, y1 in s.spots(16, 44, (-30, -30, SPAN + 30, SPAN + 30), whole=False):
        s.paint((rect(x1, y1, 40, 36), s.surface("grass")))
        s.trees([(x1 + s.r(-20, 20), y1 + s.r(-18, 18), s.r(12, 17)) for _ in range(4)])
    s.drive(across(y), 17, s.r(0, 5), CARS)
    s.drive(across(y)[::-1], 17, s.r(0, 5), CARS)
    ways = "crossing each other in the commercial area"
    s.add_facts(
        Fact("tall building", "in the commercial area", EACH),
        Fact("road", ways, one="passing through the commercial area"),
        Fact("car", "on the roads" if crossing else "on the road", SAME),
        Fact("tree", "between the buildings", "green", amount=SOME),
    )


def tall_building(s: Stage, x: int, y: int, w: int, h: int, colour: str, height: int):
    """Draw a tall building in a style that is picked at random."""
    style = s.pick("flat", "tower", "tower", "round", "court")
    if style == "round":
        radius = min(w, h)
        s.thing(
            "tall building",
            colour,
            (disc(x, y, radius), s.shade(colour, 14)),
            (disc(x, y, radius - 8), s.surface("concrete", s.shade(colour, -8))),
            (ring(x, y, radius * 5 // 8, 5), s.shade(colour, 24)),
            (disc(x, y, radius // 4), s.shade(colour, -26)),
            height=height,
        )
        return
    s.canvas.shadow(rect(x, y, w, h), height)
    with s.canvas.item("tall building", colour):
        s.flat_roof(x, y, w, h, colour, s.r(3, 6))
        if style == "tower":
            x, y, w, h = x + s.r(-12, 12), y + s.r(-12, 12), w * 9 // 16, h * 9 // 16
            s.canvas.shadow(rect(x, y, w, h), 46)
            s.flat_roof(x, y, w, h, colour, 2)
        elif style == "court":
            s.paint((rect(x, y, w // 3, h // 3), s.surface("asphalt")))
            s.canvas.shadow(s.frame(x, y, w // 3, h // 3, 4), 20, 6)


def center(s: Stage):
    """Draw one large building of a special shape with lawns around it."""
    s.start("paving", s.pick((196, 190, 178), (182, 184, 182)))
    x, y, radius = MIDDLE + s.r(-60, 60), MIDDLE + s.r(-60, 60), s.r(190, 250)
    colour = s.pick("white", "grey", "blue", "brown", "orange")
    shape = s.pick("round", "star", "hexagon", "oval")
    grey = s.shade("paving", -34)
    s.paint((ring(x, y, radius + 66, 8), grey, 10), (ring(x, y, radius + 214, 14), grey, 10))
    near, far = radius + 70, radius + 190
    for k in range(0, 72, 9):
        if s.chance(75):
            wedge = polygon([(near, -60), (far, -110), (far, 110), (near, 60)], k, x, y)
            s.paint((wedge, s.surface("grass")))
    _special_building(s, x, y, radius, shape, colour)
    s.take(x, y, radius * 5 // 4 + 40)
    if s.chance(70):
        street(s, across(s.pick(50, 846)), 54, 13, s.r(0, 6), CARS)
    s.scatter_trees(s.r(8, 30), 16, 26)
    s.add_facts(
        Fact(BUILDINGS[shape], "surrounded by small lawns", colour),
        Fact("road", "beside the building"),
        Fact("car", "on the road near the building", SAME),
        Fact("tree", "around the building", "green", amount=SOME),
    )


def _special_building(s: Stage, x: int, y: int, radius: int, shape: str, colour: str):
    """Draw a round, oval, hexagonal or star-shaped roof that rises to its middle."""
    corners = CORNERS[shape]
    direction = s.r(0, 11)
    rx, ry = (radius * 5 // 4, radius * 3 // 4) if shape == "oval" else (radius, radius)
    rim = disc(0, 0, rx, ry)[0][:: 72 // corners]
    if shape == "star":
        rim[1::2] = rim[1::2] * 5 // 8
    rim = turn(rim, direction, x, y)
    slopes = []
    for k in range(corners):
        lit = s.canvas.lit(s.rgb(colour), direction + (2 * k + 1) * 36 // corners)
        slopes.append((polygon([rim[k], rim[(k + 1) % corners], (x, y)]), lit))
    edges = [(band([corner, (x, y)], 3), s.shade(colour, 24), 9) for corner in rim]
    layers = [([rim], s.rgb(colour)), *slopes, *edges]
    if s.chance(50):
        layers.append((disc(x, y, radius // 4), s.shade(colour, 16)))
        layers.append((ring(x, y, radius // 4, 6), s.shade(colour, -40)))
    s.thing(BUILDINGS[shape], colour, *layers, height=70)


def dense(s: Stage):
    """Draw rows of houses that stand close together."""
    s.start("grass", s.pick((122, 132, 92), (136, 132, 104)))
    roads = s.pick(1, 2, 2, 3)
    ys = STREETS[roads]
    lines = s.chance(40)
    for y in ys:
        s.road(across(y), 44, lines)
    cross = s.chance(45)
    if cross:
        s.road(down(s.r(250, 650)), 44, lines)
    for x, y in s.spots(s.r(0, 4), 26):
        s.pool(x, y, 20, 14, s.pick(0, 18))
    colours = s.pick(*DENSE_ROOFS)
    for top, bottom in pairwise((LOW, *ys, HIGH)):
        rows = max((bottom - top - 80) // 82, 1)
        heights = [top + 40 + (bottom - top - 80) * (2 * k + 1) // (2 * rows) for k in range(rows)]
        for y, x in product(heights, range(-40, SPAN + 60, 76)):
            if s.free(x, y, 30) and s.inside(x, y, -20):
                place = (x + s.r(-4, 4), y + s.r(-5, 5), s.r(26, 32), s.r(22, 28))
                s.house(*place, s.pick(0, 18), s.pick(*colours))
                s.take(x, y, 34)
    moving = s.r(0, 6)
    for y in ys:
        s.drive(across(y), 10, -(-moving // len(ys)), CARS)
    s.scatter_trees(40, 9, 14)
    s.add_facts(
        Fact("house", "arranged in rows", SAME),
        Fact("road", "passing through the dense residential area"),
        Fact("swimming pool", "beside the houses", "blue"),
        Fact("car", "on the road" if roads == 1 and not cross else "on the roads", SAME),
        Fact("tree", "between the houses", "green", amount=SOME),
    )


def medium(s: Stage):
    """Draw a few houses on both sides of a winding road."""
    s.start("meadow", s.pick((124, 142, 86), (136, 148, 98)))
    way = wavy(s, s.r(400, 500), s.r(400, 500), 50, 4)
    s.road(way, 50, s.chance(50))
    roof = s.pick(*ROOFS)
    other = s.pick(roof, s.pick(*ROOFS))
    count = s.r(5, 10)
    shift = s.r(-20, 20)
    slots = []
    for x, (side, depth) in product((120, 285, 450, 615, 780), PLOTS):
        y = int(way[np.abs(way[:, 0] - x).argmin(), 1]) + side * depth
        slots.append((x + shift, y, side))
    slots = [p for p in slots if s.inside(p[0], p[1], 60)]
    chosen = s.rng.permutation(len(slots))[:count].tolist()
    for n, k in enumerate(chosen):
        x, y, side = slots[k]
        if abs(y - MIDDLE) < 240:
            s.paint((band([(x + 20, y), (x + 20, y - side * 100)], 22), s.surface("concrete")))
            if s.chance(50):
                s.cars([(x + 20, y - side * 62, 18)], s.pick(*CARS))
        s.house(x, y, s.r(44, 52), s.r(32, 38), 0, roof if n < count * 2 // 3 else other)
        s.take(x, y, 66)
    for x, y in s.spots(s.r(0, 4), 34):
        s.pool(x, y, 28, 18, s.pick(0, 18))
    s.scatter_trees(36, 15, 26)
    s.add_facts(
        Fact("house", "near the road", EACH),
        Fact("road", "running between the houses"),
        Fact("swimming pool", "near the houses", "blue"),
        Fact("car", "parked in front of the houses", SAME, "parked in front of a house"),
        Fact("tree", "around the houses", "green", amount=SOME),
    )


def sparse(s: Stage):
    """Draw up to five large houses among trees."""
    land = s.pick("meadow", "grass", "dry")
    s.start(land)
    y = s.r(60, 160)
    with_road = s.chance(60)
    if with_road:
        s.road(across(y), 44, lines=False)
    roof = s.pick(*ROOFS)
    count = s.r(1, 5)
    box = (0, 230 if with_road else 0, SPAN, SPAN)
    direction = s.r(0, 17)
    for x, y1 in s.spots(count, 120, box, tries=120):
        if with_road:
            s.paint((band([(x, y1), (x, y + 20)], 20), s.surface("gravel")))
        s.house(x, y1, s.r(58, 76), s.r(40, 50), direction, roof)
    for x, y1 in s.spots(s.r(0, 2), 46, box):
        s.pool(x, y1, 38, 24, direction)
    s.scatter_trees(s.r(12, 60), 20, 34)
    s.around = "covered with " + GROUND[land]
    group = "house" if count == 1 else "houses"
    s.add_facts(
        Fact("house", "in the sparse residential area", roof),
        Fact("swimming pool", f"near the {group}", "blue"),
        Fact("road", f"near the {group}"),
        Fact("tree", f"around the {group}", "green", amount=SOME),
    )


def square(s: Stage):
    """Draw a paved square with a fountain, a monument or a flower bed in its middle."""
    s.start("concrete", (168, 164, 158))
    paving = s.pick((206, 192, 168), (196, 176, 152), (188, 188, 188))
    w, h = s.r(240, 300), s.r(220, 300)
    s.paint(
        (rect(MIDDLE, MIDDLE, w, h), s.surface("paving", paving)),
        (s.frame(MIDDLE, MIDDLE, w, h, 8), s.shade(paving, -30), 12),
    )
    PATTERNS[s.pick("lawns", "rings", "tiles")](s, w, h, paving)
    middle = s.pick(*CENTREPIECES)
    CENTREPIECES[middle](s, paving)
    s.take(MIDDLE, MIDDLE, max(w, h) * 9 // 8)
    sides = s.r(1, 4)
    for way in (across(60), across(836), down(60), down(836))[:sides]:
        street(s, way, 52, 13, s.r(0, 3), CARS)
    for sx, sy in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        if s.chance(60):
            x = MIDDLE + sx * (w + 20)
            s.trees([(x, MIDDLE + sy * k, s.r(13, 17)) for k in range(30, h, 44)])
    if s.chance(50):
        s.trees([(MIDDLE + k, MIDDLE - h - 20, s.r(13, 17)) for k in range(-w, w, 44)])
    if s.chance(65):
        neighbours(s, PAGE, 96, percent=70)
    s.add_facts(
        Fact(middle, "in the center of the square", SAME),
        Fact("lawn", "in the square", "green"),
        Fact("road", "around the square" if sides > 1 else "beside the square"),
        Fact("car", "on the roads" if sides > 1 else "on the road", SAME),
        Fact("house", "around the square", SAME, "near the square"),
        Fact("tree", "planted along the square", "green", amount=SOME),
    )


def _lawns(s: Stage, w: int, h: int, paving):
    a, b = w // 2 - 4, h // 2 - 4
    for sx, sy in product((-1, 1), (-1, 1)):
        lawn = rect(MIDDLE + sx * a, MIDDLE + sy * b, a - 36, b - 36)
        s.thing("lawn", "green", (lawn, s.surface("grass")))


def _rings(s: Stage, w: int, h: int, paving):
    rings = [ring(MIDDLE, MIDDLE, min(w, h) - 14 - 36 * k, 15) for k in range(6)]
    s.paint(*[(one, s.shade(paving, -26), 12) for one in rings])


def _tiles(s: Stage, w: int, h: int, paving):
    seams = [rect(MIDDLE, MIDDLE + k, w, 3) for k in range(-h + 30, h, 60)]
    seams += [rect(MIDDLE + k, MIDDLE, 3, h) for k in range(-w + 30, w, 60)]
    s.paint(*[(seam, s.shade(paving, -28), 11) for seam in seams])


def _fountain(s: Stage, paving):
    s.canvas.shadow(disc(MIDDLE, MIDDLE, 74), 8)
    s.paint((disc(MIDDLE, MIDDLE, 74), s.shade(paving, 26)))
    s.thing(
        "fountain",
        "",
        (disc(MIDDLE, MIDDLE, 64), s.surface("pool")),
        (disc(MIDDLE, MIDDLE, 15), s.rgb("white")),
        (ring(MIDDLE, MIDDLE, 36, 4), s.rgb("white"), 9),
    )


def _monument(s: Stage, paving):
    s.paint((rect(MIDDLE, MIDDLE, 60, 60), s.shade(paving, 24)))
    top = (rect(MIDDLE, MIDDLE, 12, 12), s.shade("white", -30))
    s.thing("monument", "white", (rect(MIDDLE, MIDDLE, 24, 24), s.rgb("white")), top, height=150)


def _flower_bed(s: Stage, paving):
    colour = s.pick("red", "yellow", "orange")
    s.thing("flower bed", colour, (disc(MIDDLE, MIDDLE, 72), s.surface("tree", colour)))
    s.paint((ring(MIDDLE, MIDDLE, 50, 12), s.surface("grass")))


PATTERNS = {"lawns": _lawns, "rings": _rings, "tiles": _tiles}
CENTREPIECES = {"fountain": _fountain, "monument": _monument, "flower bed": _flower_bed}
