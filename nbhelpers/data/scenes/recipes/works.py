"""Recipes of traffic and industry: each draws one scene on a stage and adds its facts."""

from __future__ import annotations

from itertools import product

import numpy as np

from nbhelpers.data.scenes.drawing import SPAN, band, disc, polygon, rect, smooth
from nbhelpers.data.scenes.recipes.common import (
    CARS,
    CROPS,
    GROUND,
    HIGH,
    LOW,
    PAGE,
    across,
    crop,
    down,
    neighbours,
    plant_trees,
    street,
    tank,
    tell_all,
    tell_colours,
    tell_trees,
)
from nbhelpers.data.scenes.scene_parts import MIDDLE, Stage, wavy

# columns of storage tanks that stand in rows, by their number; 4 for the others
COLUMNS = {1: 1, 2: 2, 4: 2, 3: 3, 5: 3, 6: 3, 9: 3}
TANKS_ON = {
    "grass": "on the grass",
    "soil": "on the bare land",
    "concrete": "on the concrete ground",
}


def airport(s: Stage):
    """Draw planes beside a terminal or hangars, or at crossing runways."""
    land = s.pick("grass", "dry", "meadow")
    s.start(land)
    colour = s.pick("white", "white", "blue", "red", "yellow", "green")
    style = s.pick("terminal", "terminal", "hangars", "crossing")
    if style == "crossing":
        return crossing_runways(s, land, colour)
    s.canvas.paint(rect(MIDDLE, 260, 800, 260), s.surface("concrete"))
    for y in range(60, 520, 64):
        s.canvas.paint(band(across(y), 2), s.shade("concrete", -20), 10)
    s.canvas.paint(
        band([(s.r(150, 750), 500), (s.r(150, 750), 720)], 56), s.surface("concrete", "asphalt")
    )
    runway(s, across(720), 96)
    count = s.r(1, 6)
    slots = [130 + 128 * k for k in range(6)]
    chosen = sorted(s.rng.permutation(6)[:count].tolist())
    if style == "terminal":
        roof = s.pick("white", "grey", "blue", "brown")
        s.shed(MIDDLE, 96, s.r(340, 400), 50, 0, roof, "terminal")
        for k in range(6):
            s.canvas.shadow(rect(slots[k], 168, 9, 26), 20)
            s.canvas.paint(rect(slots[k], 168, 9, 26), s.shade("concrete", 30))
        where = "parked near the terminal"
    else:
        roof = s.pick("white", "blue", "red", "green")
        for k in range(s.r(2, 5)):
            s.shed(150 + 150 * k, 90, 64, 60, 18, roof, "hangar")
        where = "parked in front of the hangars"
    for k in range(6):
        line = smooth([(slots[k], 300), (slots[k], 420), (slots[k] + 90, 440)])
        s.canvas.paint(band(line, 4), s.rgb("yellow"), 11)
    for k in chosen:
        plane(s, slots[k], 262, 54, 64, colour)
    s.tell("plane", where, colour)
    s.tell("terminal", "beside the apron", roof)
    s.tell("hangar", "beside the apron", roof)
    s.tell("runway", "in the airport")
    if s.chance(60):
        plant_trees(s, "next to the runway", 18, 16, 26, (-20, 800, SPAN + 20, SPAN + 60))
    s.around = "surrounded by " + GROUND[land]


def plane(s: Stage, x: int, y: int, direction: int, size: int, colour: str):
    """Draw a plane of length 2 * size, its nose in the given direction."""

    def at(points):
        return polygon([(a * size // 128, b * size // 128) for a, b in points], direction, x, y)

    def both(points):
        return at(points) + at([(a, -b) for a, b in points])

    body = at(
        [
            (128, 0),
            (118, 9),
            (92, 14),
            (-70, 13),
            (-126, 4),
            (-126, -4),
            (-70, -13),
            (92, -14),
            (118, -9),
        ]
    )
    wings = both([(46, 8), (-34, 116), (-58, 116), (-22, 8)])
    tail = both([(-92, 3), (-122, 46), (-134, 46), (-118, 3)])
    s.canvas.shadow(body + wings + tail, 22)
    with s.canvas.item("plane", colour):
        s.canvas.paint(wings + tail, s.shade(colour, -14))
        s.canvas.paint(both([(34, 44), (34, 56), (4, 56), (4, 44)]), s.shade(colour, -60))
        s.canvas.paint(body, s.rgb(colour))
        s.canvas.paint(
            at([(104, 0), (116, 6), (110, 8), (100, 0), (110, -8), (116, -6)]), (60, 70, 84), 13
        )
        s.canvas.paint(at([(-84, 0), (-122, 2), (-130, 0), (-122, -2)]), s.shade(colour, -70))


def runway(s: Stage, points, width: int):
    """Draw a runway with its lines."""
    (x0, y0), (x1, y1) = points
    with s.canvas.item("runway", "grey"):
        s.canvas.paint(band(points, width), s.surface("asphalt"))
        for side in (-1, 1):
            shift = (0, side * (width // 2 - 7)) if y0 == y1 else (side * (width // 2 - 7), 0)
            s.lines(band(np.array(points) + shift, 4))
        length = max(abs(x1 - x0), abs(y1 - y0))
        for t in range(20, length, 80):
            x, y = x0 + (x1 - x0) * t // length, y0 + (y1 - y0) * t // length
            step = ((x1 - x0) * 40 // length, (y1 - y0) * 40 // length)
            s.lines(band([(x, y), (x + step[0], y + step[1])], 5))
    s.take_line(points, width // 2 + 10)


def crossing_runways(s: Stage, land: str, colour: str):
    """Draw an apron with planes beside one or two runways."""
    s.canvas.paint(band([(700, 640), (430, 640)], 46), s.surface("concrete", "asphalt"))
    runway(s, [(s.r(200, 330), LOW), (s.r(520, 600), HIGH)], 80)
    both = s.chance(60)
    if both:
        runway(s, [(LOW, s.r(180, 300)), (HIGH, s.r(180, 300))], 80)
    x = 700
    s.canvas.paint(rect(x, 640, 150, 220), s.surface("concrete"))
    slots = [
        (x - 72, 500),
        (x + 72, 500),
        (x - 72, 640),
        (x + 72, 640),
        (x - 72, 780),
        (x + 72, 780),
    ]
    slots = [p for p in slots if s.inside(*p, 56)]
    for k in s.rng.permutation(len(slots))[: s.r(1, 6)].tolist():
        x1, y1 = slots[k]
        plane(s, x1, y1, 36, 56, colour)
    s.take(x, 540, 190)
    s.take(x, 740, 190)
    s.tell("plane", "parked on the apron", colour)
    s.tell("runway", "crossing each other", one="in the airport")
    plant_trees(s, "next to the runway" if not both else "next to the runways", s.r(0, 24), 16, 28)
    s.around = "surrounded by " + GROUND[land]


def industrial(s: Stage):
    """Draw factory buildings on both sides of a road."""
    s.start("concrete", s.pick((160, 156, 148), (172, 160, 142), (148, 148, 150)))
    y = s.r(400, 500)
    s.road(across(y), 60)
    colours = s.pick(
        ("blue",),
        ("white",),
        ("red",),
        ("grey",),
        ("blue", "white"),
        ("white", "grey"),
        ("blue", "red"),
    )
    for middle in (y - 230, y + 230):
        x = -40
        while x < SPAN:
            w, h = s.r(80, 150), s.r(90, 150)
            x1, y1 = x + w, middle + s.r(-16, 16)
            if s.chance(80) and s.inside(x1, y1, 96):
                shape = (h, w - 12, 18) if s.chance(50) else (w - 12, h, 0)
                s.shed(x1, y1, *shape, s.pick(*colours), "factory building")
                s.take_line([(x1, y1 - h), (x1, y1), (x1, y1 + h)], w)
            x += 2 * w + 10
    tanks = s.r(0, 5)
    for x, y1 in s.spots(tanks, 38):
        tank(s, x, y1, 32, "white")
    s.drive(across(y), 15, s.r(0, 4), CARS)
    s.drive([(HIGH, y), (LOW, y)], 15, s.r(0, 3), CARS)
    s.scatter_trees(s.r(4, 20), 14, 22)
    tell_colours(s, "factory building", "in the industrial area")
    s.tell("storage tank", "near the factory buildings", "white")
    s.tell("road", "between the factory buildings")
    tell_all(s, "car", "on the road")
    tell_trees(s, "near the factory buildings")


def parking(s: Stage):
    """Draw a parking lot that is almost empty or almost full."""
    s.start("grass")
    lot = s.surface(
        *s.pick(("asphalt",), ("concrete", (150, 148, 144)), ("asphalt", (96, 96, 100)))
    )
    s.canvas.paint(rect(MIDDLE, MIDDLE, 430, 390), s.surface("paving"))
    s.canvas.paint(rect(MIDDLE, MIDDLE, 422, 382), lot)
    few = s.chance(60)
    rows = s.r(3, 4)
    slots = []
    for k in range(rows):
        y = MIDDLE - 382 + 764 * (2 * k + 1) // (2 * rows)
        islands = s.chance(30)
        for x in range(60, 836, 30):
            s.lines(band([(x, y - 46), (x, y + 46)], 2), 12)
        s.lines(band([(60, y), (830, y)], 2), 12)
        bays = product(range(75, 835, 30), (-1, 1))
        slots += [(x, y + side * 24, 18 * side) for x, side in bays]
        if islands:
            s.canvas.paint(rect(445, y, 385, 7), s.surface("grass"))
    slots = [p for p in slots if s.inside(p[0], p[1], 24)]
    order = s.rng.permutation(len(slots)).tolist()
    if few:
        first, second = s.pick(*CARS[:3], "yellow"), s.pick("white", "black", "green")
        count = s.r(1, 10)
        for n, k in enumerate(order[:count]):
            s.cars([slots[k]], first if n < (count + 1) * 3 // 5 else second)
        tell_colours(s, "car", "parked in the parking lot")
    else:
        share = s.pick(45, 70, 92)
        taken = order[: len(order) * share // 100]
        for k, colour in enumerate(CARS):
            s.cars([slots[i] for i in taken[k :: len(CARS)]], colour)
        s.tell("car", "parked neatly in rows" if share > 80 else "parked in the parking lot")
    if s.chance(60):
        y = s.pick(14, 882)
        s.trees([(x + s.r(-8, 8), y, s.r(18, 26)) for x in range(-60, SPAN + 80, s.r(52, 80))])
        tell_trees(s, "next to the parking lot")
    else:
        x, w = MIDDLE + s.r(-120, 120), s.r(240, 400)
        roof = s.pick("white", "grey", "red", "blue")
        s.canvas.shadow(rect(x, -20, w, 66), 60)
        with s.canvas.item("building", roof):
            s.flat_roof(x, -20, w, 66, roof, 3)
        tell_colours(s, "building", "beside the parking lot")


def railwaystation(s: Stage):
    """Draw tracks, platforms and trains."""
    s.start("concrete", (150, 146, 140))
    tracks, platforms = s.r(5, 9), s.r(1, 2)
    top, step = s.r(280, 360), 44
    bottom = top + step * tracks
    ys = [top + step // 2 + step * k for k in range(tracks)]
    used = s.rng.permutation(tracks).tolist()
    s.canvas.paint(
        rect(MIDDLE, (top + bottom) // 2, 800, (bottom - top) // 2 + 20), s.surface("gravel")
    )
    for k in used[platforms:]:
        with s.canvas.item("railway track"):
            s.canvas.paint([rect(x, ys[k], 2, 13)[0] for x in range(LOW, HIGH, 13)], (98, 84, 72))
            s.canvas.paint(
                [rect(MIDDLE, ys[k] + side, 700, 2)[0] for side in (-7, 7)], (82, 78, 78)
            )
    roof = s.pick("grey", "blue", "white", "red")
    for k in used[:platforms]:
        s.canvas.paint(rect(MIDDLE, ys[k], 640, 20), s.surface("concrete"))
        s.shed(MIDDLE + s.r(-60, 60), ys[k], s.r(200, 290), 17, 0, roof, "platform")
    colour = s.pick("white", "blue", "red", "green", "yellow")
    trains = s.r(1, 4)
    for k in used[platforms:][:trains]:
        coaches = s.r(4, 7)
        train(s, s.r(130, 766 - 70 * (coaches - 1)), ys[k], coaches, colour)
    s.take_line([(LOW, (top + bottom) // 2), (HIGH, (top + bottom) // 2)], (bottom - top) // 2 + 30)
    hall = s.pick("red", "white", "blue", "brown")
    if s.chance(70):
        x, w = MIDDLE + s.r(-160, 160), s.r(120, 180)
        s.house(x, top - 96, w, 52, 0, hall, "station building")
        s.take_line([(x - w, top - 96), (x + w, top - 96)], 90)
    if s.chance(50):
        street(s, across(bottom + 70), 50, 12, s.r(0, 5), CARS)
    neighbours(s, PAGE, 92, percent=s.pick(0, 60, 90))
    s.scatter_trees(s.pick(8, 20, 40), 15, 26)
    s.tell("train", "parked in the railway station", colour)
    s.tell("railway track", "lying side by side")
    s.tell("station building", "beside the railway tracks", hall)
    s.tell("platform", "between the railway tracks", roof)
    s.tell("road", "near the railway station")
    tell_all(s, "car", "on the road")
    tell_all(s, "house", "near the railway station")
    tell_trees(s, "beside the railway tracks")


def train(s: Stage, x: int, y: int, coaches: int, colour: str):
    """Draw a train of several coaches."""
    cars = [rect(x + 70 * k, y, 32, 10)[0] for k in range(coaches)]
    s.canvas.shadow(cars, 14)
    with s.canvas.item("train", colour):
        s.canvas.paint([rect(x + 35 * (coaches - 1), y, 35 * (coaches - 1), 4)[0]], s.rgb("black"))
        s.canvas.paint(cars, s.rgb(colour))
        s.canvas.paint(
            [rect(x + 70 * k, y, 28, 3)[0] for k in range(coaches)], s.shade(colour, 40), 10
        )


def storagetanks(s: Stage):
    """Draw storage tanks in rows or at random places."""
    land = s.pick("grass", "soil", "concrete")
    s.start(land)
    colour = s.pick("white", "white", "grey", "green", "red", "yellow", "brown")
    y = s.pick(44, 852)
    beside = s.pick("road", "river", "nothing")
    if beside == "road":
        street(s, across(y), 50, 12, s.r(0, 5), CARS)
    elif beside == "river":
        s.water(band(wavy(s, y, y, 20), 130), "river", "green", (88, 122, 104), "gravel")
        s.take_line(across(y), 90)
    count = s.pick(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)
    size = {1: 170, 2: 140, 3: 120, 4: 110}.get(count, 92 if count < 8 else 70)
    if s.chance(60):
        columns = COLUMNS.get(count, 4)
        rows = -(-count // columns)
        size = min(size, 760 // columns // 2 - 14, 640 // rows // 2 - 14)
        top = 130 if y < 400 else 60
        step_x, step_y = 780 // columns, 700 // rows
        places = [
            (58 + step_x * (k % columns) + step_x // 2, top + step_y * (k // columns) + step_y // 2)
            for k in range(count)
        ]
        places = [p for p in places if s.inside(*p, size + 4)]
    else:
        places = s.spots(count, size + 16, tries=90)
    for x, y1 in places:
        pad = s.surface("gravel", s.pick((176, 164, 146), (164, 158, 150)))
        s.canvas.paint(rect(x, y1, size + 15, size + 15), pad, 13)
    for (x0, y0), (x1, y1) in zip(places[:-1], places[1:], strict=False):
        s.canvas.shadow(band([(x0, y0), (x1, y0), (x1, y1)], 6), 8)
        s.canvas.paint(band([(x0, y0), (x1, y0), (x1, y1)], 6), s.shade("grey", 30))
    for x, y1 in places:
        tank(s, x, y1, size - s.r(0, size // 8), colour)
        s.take(x, y1, size + 20)
    where = TANKS_ON[land] if beside == "nothing" else f"near the {beside}"
    s.tell("storage tank", where, colour)
    group = "storage tanks" if len(places) > 1 else "storage tank"
    s.tell("road", f"beside the {group}")
    s.tell("river", f"beside the {group}", "green")
    tell_all(s, "car", "on the road")
    plant_trees(s, f"near the {group}", s.pick(0, 10, 24), 16, 26)
    s.around = {"grass": "surrounded by green grass", "soil": "surrounded by bare land"}.get(
        land, ""
    )


def viaduct(s: Stage):
    """Draw crossing roads on two levels, with up to four loops."""
    land = s.pick("grass", "meadow", "dry")
    s.start(land)
    s.around = "surrounded by " + GROUND[land]
    if s.chance(30):
        for x, y in product(range(LOW, HIGH, 230), range(LOW, HIGH, 190)):
            crop(s, s.pick(*CROPS), [(x, y), (x + 220, y), (x + 220, y + 180), (x, y + 180)])
        s.around = "surrounded by farmland"
    x, y, wide = MIDDLE + s.r(-80, 80), MIDDLE + s.r(-80, 80), s.r(76, 96)
    loops = s.pick(0, 2, 4, 4)
    corners = [(-1, -1), (1, 1), (1, -1), (-1, 1)][:loops]
    radius = s.r(110, 140)
    for sx, sy in corners:
        centre = (x + sx * (wide // 2 + radius), y + sy * (wide // 2 + radius))
        loop = disc(*centre, radius)[0]
        s.road(np.concatenate([loop, loop[:1]]), 30, False, kind="loop")
        outer = smooth(
            [
                (x + sx * wide // 2, y + sy * 900),
                (x + sx * (wide // 2 + 40), y + sy * 430),
                (x + sx * 430, y + sy * (wide // 2 + 40)),
                (x + sx * 900, y + sy * wide // 2),
            ],
            4,
        )
        s.road(outer, 30, False, kind="ramp")
        s.take(*centre, radius)
    lower = across(y)
    s.road(lower, wide, verge="concrete")
    s.lines(band(lower, 6), 12)
    for way in (lower, lower[::-1]):
        s.drive(way, wide // 4 + 2, s.r(0, 5), CARS, 80)
    upper = down(x)
    ways: list = [upper]
    if loops == 0 and s.chance(60):
        corners = [(LOW, s.r(60, 200)), (x - 120, y - 60), (x + 100, y + 60), (HIGH, s.r(700, 840))]
        ways.append(smooth(corners, 4))
    elif loops == 0:
        ways.append(down(x + 170))
    for way in ways:
        s.canvas.shadow(band(way, wide), 44)
        s.road(way, wide, verge="concrete", kind="viaduct")
        s.lines(band(way, 6), 12)
    for way in (upper, upper[::-1]):
        s.drive(way, wide // 4 + 2, s.r(0, 5), CARS, 80)
    s.tell("viaduct", "crossing over the road")
    s.tell("loop", "beside the viaduct")
    tell_all(s, "car", "on the roads", "on the road")
    plant_trees(s, "near the viaduct", s.pick(10, 30, 60), 14, 26)
