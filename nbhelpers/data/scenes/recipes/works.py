"""Recipes of traffic and industry: each draws one scene on a stage and adds its facts."""

from __future__ import annotations

from itertools import pairwise, product

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
    box_of,
    crop,
    down,
    neighbours,
    street,
    tank,
)
from nbhelpers.data.scenes.scene_parts import EACH, MIDDLE, SAME, SOME, Fact, Stage, wavy

# columns of storage tanks that stand in rows, by their number; 4 for the others
COLUMNS = {1: 1, 2: 2, 4: 2, 3: 3, 5: 3, 6: 3, 9: 3}
PLANES_AT = {"terminal": "parked near the terminal", "hangars": "parked in front of the hangars"}
FACTORY_ROOFS: list[tuple[str, ...]] = [("blue",), ("white",), ("red",), ("grey",)]
FACTORY_ROOFS += [("blue", "white"), ("white", "grey"), ("blue", "red")]
TANKS_ON = {
    "grass": "on the grass",
    "soil": "on the bare land",
    "concrete": "on the concrete ground",
}
AROUND_TANKS = {"grass": "surrounded by green grass", "soil": "surrounded by bare land"}
# a plane, its nose to the right: the body, and for one side wing, tail plane and engine
BODY = [(128, 0), (118, 9), (92, 14), (-70, 13), (-126, 4)]
BODY += [(-126, -4), (-70, -13), (92, -14), (118, -9)]
WING = [(46, 8), (-34, 116), (-58, 116), (-22, 8)]
TAIL = [(-92, 3), (-122, 46), (-134, 46), (-118, 3)]
ENGINE = [(34, 44), (34, 56), (4, 56), (4, 44)]
COCKPIT = [(104, 0), (116, 6), (110, 8), (100, 0), (110, -8), (116, -6)]
FIN = [(-84, 0), (-122, 2), (-130, 0), (-122, -2)]


def airport(s: Stage):
    """Draw planes beside a terminal or hangars, or at crossing runways."""
    land = s.pick("grass", "dry", "meadow")
    s.start(land)
    s.around = "surrounded by " + GROUND[land]
    colour = s.pick("white", "white", "blue", "red", "yellow", "green")
    style = s.pick("terminal", "terminal", "hangars", "crossing")
    if style == "crossing":
        return crossing_runways(s, colour)
    seams = [(band(across(y), 2), s.shade("concrete", -20), 10) for y in range(60, 520, 64)]
    taxiway = band([(s.r(150, 750), 500), (s.r(150, 750), 720)], 56)
    s.paint((rect(MIDDLE, 260, 800, 260), s.surface("concrete")), *seams)
    s.paint((taxiway, s.surface("concrete", "asphalt")))
    runway(s, across(720), 96)
    count = s.r(1, 6)
    chosen = sorted(s.rng.permutation(6)[:count].tolist())
    slots = range(130, 898, 128)
    if style == "terminal":
        roof = s.pick("white", "grey", "blue", "brown")
        s.shed(MIDDLE, 96, s.r(340, 400), 50, 0, roof, "terminal")
        for x in slots:
            s.canvas.shadow(rect(x, 168, 9, 26), 20)
            s.paint((rect(x, 168, 9, 26), s.shade("concrete", 30)))
    else:
        roof = s.pick("white", "blue", "red", "green")
        for k in range(s.r(2, 5)):
            s.shed(150 + 150 * k, 90, 64, 60, 18, roof, "hangar")
    ways = [smooth([(x, 300), (x, 420), (x + 90, 440)]) for x in slots]
    s.paint(*[(band(way, 4), s.rgb("yellow"), 11) for way in ways])
    for k in chosen:
        plane(s, slots[k], 262, 54, 64, colour)
    if s.chance(60):
        s.scatter_trees(18, 16, 26, (-20, 800, SPAN + 20, SPAN + 60))
    s.add_facts(
        Fact("plane", PLANES_AT[style], colour),
        Fact("terminal", "beside the apron", roof),
        Fact("hangar", "beside the apron", roof),
        Fact("runway", "in the airport"),
        Fact("tree", "next to the runway", "green", amount=SOME),
    )


def plane(s: Stage, x: int, y: int, direction: int, size: int, colour: str):
    """Draw a plane of length 2 * size, its nose in the given direction."""

    def at(points):
        return polygon([(a * size // 128, b * size // 128) for a, b in points], direction, x, y)

    def both(points):
        return at(points) + at([(a, -b) for a, b in points])

    wings = both(WING) + both(TAIL)
    s.canvas.shadow(at(BODY) + wings, 22)
    s.thing(
        "plane",
        colour,
        (wings, s.shade(colour, -14)),
        (both(ENGINE), s.shade(colour, -60)),
        (at(BODY), s.rgb(colour)),
        (at(COCKPIT), (60, 70, 84), 13),
        (at(FIN), s.shade(colour, -70)),
    )


def runway(s: Stage, points, width: int):
    """Draw a runway with its lines."""
    (x0, y0), (x1, y1) = points
    aside = width // 2 - 7
    shift = np.array((0, aside) if y0 == y1 else (aside, 0))
    edges = [band(np.array(points) + side * shift, 4) for side in (-1, 1)]
    length = max(abs(x1 - x0), abs(y1 - y0))
    step = ((x1 - x0) * 40 // length, (y1 - y0) * 40 // length)
    dashes = []
    for t in range(20, length, 80):
        x, y = x0 + (x1 - x0) * t // length, y0 + (y1 - y0) * t // length
        dashes.append(band([(x, y), (x + step[0], y + step[1])], 5))
    asphalt = (band(points, width), s.surface("asphalt"))
    s.thing("runway", "grey", asphalt, *s.lines(*edges, *dashes))
    s.take_line(points, width // 2 + 10)


def crossing_runways(s: Stage, colour: str):
    """Draw an apron with planes beside one or two runways."""
    s.paint((band([(700, 640), (430, 640)], 46), s.surface("concrete", "asphalt")))
    runway(s, [(s.r(200, 330), LOW), (s.r(520, 600), HIGH)], 80)
    both = s.chance(60)
    if both:
        runway(s, [(LOW, s.r(180, 300)), (HIGH, s.r(180, 300))], 80)
    s.paint((rect(700, 640, 150, 220), s.surface("concrete")))
    slots = [(x, y) for y, x in product((500, 640, 780), (628, 772))]
    slots = [p for p in slots if s.inside(*p, 56)]
    for k in s.rng.permutation(len(slots))[: s.r(1, 6)].tolist():
        x, y = slots[k]
        plane(s, x, y, 36, 56, colour)
    s.take(700, 540, 190)
    s.take(700, 740, 190)
    s.scatter_trees(s.r(0, 24), 16, 28)
    s.add_facts(
        Fact("plane", "parked on the apron", colour),
        Fact("runway", "crossing each other", one="in the airport"),
        Fact("tree", "next to the runways" if both else "next to the runway", "green", amount=SOME),
    )


def industrial(s: Stage):
    """Draw factory buildings on both sides of a road."""
    s.start("concrete", s.pick((160, 156, 148), (172, 160, 142), (148, 148, 150)))
    y = s.r(400, 500)
    s.road(across(y), 60)
    colours = s.pick(*FACTORY_ROOFS)
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
    for x, y1 in s.spots(s.r(0, 5), 38):
        tank(s, x, y1, 32, "white")
    s.drive(across(y), 15, s.r(0, 4), CARS)
    s.drive(across(y)[::-1], 15, s.r(0, 3), CARS)
    s.scatter_trees(s.r(4, 20), 14, 22)
    s.add_facts(
        Fact("factory building", "in the industrial area", EACH),
        Fact("storage tank", "near the factory buildings", "white"),
        Fact("road", "between the factory buildings"),
        Fact("car", "on the road", SAME),
        Fact("tree", "near the factory buildings", "green", amount=SOME),
    )


def parking(s: Stage):
    """Draw a parking lot that is almost empty or almost full."""
    s.start("grass")
    lot = s.pick(("asphalt",), ("concrete", (150, 148, 144)), ("asphalt", (96, 96, 100)))
    s.paint(
        (rect(MIDDLE, MIDDLE, 430, 390), s.surface("paving")),
        (rect(MIDDLE, MIDDLE, 422, 382), s.surface(*lot)),
    )
    few = s.chance(60)
    rows = s.r(3, 4)
    slots = []
    for k in range(rows):
        y = MIDDLE - 382 + 764 * (2 * k + 1) // (2 * rows)
        bays = [band([(x, y - 46), (x, y + 46)], 2) for x in range(60, 836, 30)]
        s.paint(*s.lines(*bays, band([(60, y), (830, y)], 2), strength=12))
        sides = product(range(75, 835, 30), (-1, 1))
        slots += [(x, y + side * 24, 18 * side) for x, side in sides]
        if s.chance(30):
            s.paint((rect(445, y, 385, 7), s.surface("grass")))
    slots = [p for p in slots if s.inside(p[0], p[1], 24)]
    order = [slots[k] for k in s.rng.permutation(len(slots)).tolist()]
    if few:
        first, second = s.pick(*CARS[:3], "yellow"), s.pick("white", "black", "green")
        count = s.r(1, 10)
        for n, slot in enumerate(order[:count]):
            s.cars([slot], first if n < (count + 1) * 3 // 5 else second)
        s.add_facts(Fact("car", "parked in the parking lot", EACH))
    else:
        share = s.pick(45, 70, 92)
        taken = order[: len(order) * share // 100]
        for k, colour in enumerate(CARS):
            s.cars(taken[k :: len(CARS)], colour)
        where = "parked neatly in rows" if share > 80 else "parked in the parking lot"
        s.add_facts(Fact("car", where))
    if s.chance(60):
        y = s.pick(14, 882)
        s.trees([(x + s.r(-8, 8), y, s.r(18, 26)) for x in range(-60, SPAN + 80, s.r(52, 80))])
    else:
        x, w = MIDDLE + s.r(-120, 120), s.r(240, 400)
        roof = s.pick("white", "grey", "red", "blue")
        s.canvas.shadow(rect(x, -20, w, 66), 60)
        with s.canvas.item("building", roof):
            s.flat_roof(x, -20, w, 66, roof, 3)
    s.add_facts(
        Fact("tree", "next to the parking lot", "green", amount=SOME),
        Fact("building", "beside the parking lot", EACH),
    )


def railwaystation(s: Stage):
    """Draw tracks, platforms and trains."""
    s.start("concrete", (150, 146, 140))
    tracks, platforms = s.r(5, 9), s.r(1, 2)
    top, step = s.r(280, 360), 44
    bottom = top + step * tracks
    middle, half = (top + bottom) // 2, (bottom - top) // 2
    used = [top + step // 2 + step * k for k in s.rng.permutation(tracks).tolist()]
    s.paint((rect(MIDDLE, middle, 800, half + 20), s.surface("gravel")))
    for y in used[platforms:]:
        sleepers = [rect(x, y, 2, 13)[0] for x in range(LOW, HIGH, 13)]
        rails = [rect(MIDDLE, y + side, 700, 2)[0] for side in (-7, 7)]
        s.thing("railway track", "", (sleepers, (98, 84, 72)), (rails, (82, 78, 78)))
    roof = s.pick("grey", "blue", "white", "red")
    for y in used[:platforms]:
        s.paint((rect(MIDDLE, y, 640, 20), s.surface("concrete")))
        s.shed(MIDDLE + s.r(-60, 60), y, s.r(200, 290), 17, 0, roof, "platform")
    colour = s.pick("white", "blue", "red", "green", "yellow")
    trains = s.r(1, 4)
    for y in used[platforms:][:trains]:
        coaches = s.r(4, 7)
        train(s, s.r(130, 766 - 70 * (coaches - 1)), y, coaches, colour)
    s.take_line(across(middle), half + 30)
    hall = s.pick("red", "white", "blue", "brown")
    if s.chance(70):
        x, w = MIDDLE + s.r(-160, 160), s.r(120, 180)
        s.house(x, top - 96, w, 52, 0, hall, "station building")
        s.take_line([(x - w, top - 96), (x + w, top - 96)], 90)
    if s.chance(50):
        street(s, across(bottom + 70), 50, 12, s.r(0, 5), CARS)
    neighbours(s, PAGE, 92, percent=s.pick(0, 60, 90))
    s.scatter_trees(s.pick(8, 20, 40), 15, 26)
    s.add_facts(
        Fact("train", "parked in the railway station", colour),
        Fact("railway track", "lying side by side"),
        Fact("station building", "beside the railway tracks", hall),
        Fact("platform", "between the railway tracks", roof),
        Fact("road", "near the railway station"),
        Fact("car", "on the road", SAME),
        Fact("house", "near the railway station", SAME),
        Fact("tree", "beside the railway tracks", "green", amount=SOME),
    )


def train(s: Stage, x: int, y: int, coaches: int, colour: str):
    """Draw a train of several coaches."""
    half = 35 * (coaches - 1)
    cars = [rect(x + 70 * k, y, 32, 10)[0] for k in range(coaches)]
    roofs = [rect(x + 70 * k, y, 28, 3)[0] for k in range(coaches)]
    couplings = (rect(x + half, y, half, 4), s.rgb("black"))
    s.canvas.shadow(cars, 14)
    roofs_lit = (roofs, s.shade(colour, 40), 10)
    s.thing("train", colour, couplings, (cars, s.rgb(colour)), roofs_lit)


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
        wide, high = 780 // columns, 700 // rows
        left, top = 58 + wide // 2, (130 if y < 400 else 60) + high // 2
        places = [(left + wide * (k % columns), top + high * (k // columns)) for k in range(count)]
        places = [p for p in places if s.inside(*p, size + 4)]
    else:
        places = s.spots(count, size + 16, tries=90)
    for x, y in places:
        pad = s.surface("gravel", s.pick((176, 164, 146), (164, 158, 150)))
        s.paint((rect(x, y, size + 15, size + 15), pad, 13))
    for (x0, y0), (x1, y1) in pairwise(places):
        pipe = band([(x0, y0), (x1, y0), (x1, y1)], 6)
        s.canvas.shadow(pipe, 8)
        s.paint((pipe, s.shade("grey", 30)))
    for x, y in places:
        tank(s, x, y, size - s.r(0, size // 8), colour)
        s.take(x, y, size + 20)
    s.scatter_trees(s.pick(0, 10, 24), 16, 26)
    s.around = AROUND_TANKS.get(land, "")
    where = TANKS_ON[land] if beside == "nothing" else f"near the {beside}"
    group = "storage tanks" if len(places) > 1 else "storage tank"
    s.add_facts(
        Fact("storage tank", where, colour),
        Fact("road", f"beside the {group}"),
        Fact("river", f"beside the {group}", "green"),
        Fact("car", "on the road", SAME),
        Fact("tree", f"near the {group}", "green", amount=SOME),
    )


def viaduct(s: Stage):
    """Draw crossing roads on two levels, with up to four loops."""
    land = s.pick("grass", "meadow", "dry")
    s.start(land)
    s.around = "surrounded by " + GROUND[land]
    if s.chance(30):
        for x, y in product(range(LOW, HIGH, 230), range(LOW, HIGH, 190)):
            crop(s, s.pick(*CROPS), box_of(x, y, 220, 180))
        s.around = "surrounded by farmland"
    x, y, wide = MIDDLE + s.r(-80, 80), MIDDLE + s.r(-80, 80), s.r(76, 96)
    loops = s.pick(0, 2, 4, 4)
    radius = s.r(110, 140)
    for corner in [(-1, -1), (1, 1), (1, -1), (-1, 1)][:loops]:
        _loop(s, x, y, corner, wide, radius)
    lower = across(y)
    s.road(lower, wide, verge="concrete")
    s.paint(*s.lines(band(lower, 6), strength=12))
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
        s.paint(*s.lines(band(way, 6), strength=12))
    for way in (upper, upper[::-1]):
        s.drive(way, wide // 4 + 2, s.r(0, 5), CARS, 80)
    s.scatter_trees(s.pick(10, 30, 60), 14, 26)
    s.add_facts(
        Fact("viaduct", "crossing over the road"),
        Fact("loop", "beside the viaduct"),
        Fact("car", "on the roads", SAME, "on the road"),
        Fact("tree", "near the viaduct", "green", amount=SOME),
    )


def _loop(s: Stage, x: int, y: int, corner: tuple[int, int], wide: int, radius: int):
    """Draw a round loop and a ramp at one corner of a crossing of roads `wide` units wide."""
    sx, sy = corner
    centre = (x + sx * (wide // 2 + radius), y + sy * (wide // 2 + radius))
    loop = disc(*centre, radius)[0]
    s.road(np.concatenate([loop, loop[:1]]), 30, False, kind="loop")
    near = wide // 2 + 40
    bend = [(sx * wide // 2, sy * 900), (sx * near, sy * 430)]
    bend += [(sx * 430, sy * near), (sx * 900, sy * wide // 2)]
    s.road(smooth(np.array(bend) + (x, y), 4), 30, False, kind="ramp")
    s.take(*centre, radius)
