"""Recipes of water and what lies on it: each draws one scene on a stage and adds its facts."""

from __future__ import annotations

from itertools import product

import numpy as np

from nbhelpers.data.scenes.drawing import SPAN, band, blob, polygon, rect, smooth, turn
from nbhelpers.data.scenes.recipes.common import (
    CARS,
    CROPS,
    GROUND,
    HIGH,
    LOW,
    PAGE,
    POND,
    ROOFS,
    across,
    below,
    box_of,
    cottages,
    crop,
    down,
    neighbours,
    street,
    umbrella,
)
from nbhelpers.data.scenes.scene_parts import MIDDLE, SAME, SOME, Fact, Stage, wavy

BRIDGED = {"green": (92, 124, 104), "brown": (140, 122, 94), "blue": (62, 106, 142)}
RIVERS = {"green": (96, 128, 104), "brown": (146, 124, 92), "blue": (66, 110, 146)}
HARBOURS = {"blue": (50, 92, 122), "green": (64, 104, 98)}
BANKS = {"forest": "grass", "farmland": "dry", "meadow": "meadow", "bare land": "soil"}
PONDS = {1: 270, 2: 165, 3: 140, 4: 120, 6: 100}  # number of ponds -> units that each takes
PIERS = {1: (448,), 2: (260, 640), 3: (170, 448, 726)}
FLOWING = {
    "forest": "flowing through the forest",
    "farmland": "flowing through the farmland",
    "meadow": "winding across the meadow",
    "bare land": "crossing the bare land",
}
BESIDE_RIVER = {"forest": "a dense forest", "meadow": "green meadows"}
# a cargo ship, seen from above with its bow to the right: outline, hold, deckhouse and its roof
HULL = [(220, 0), (196, 22), (160, 40), (-200, 40), (-216, 28)]
HULL += [(-216, -28), (-200, -40), (160, -40), (196, -22)]
HOLD = [(150, 26), (-140, 26), (-140, -26), (150, -26)]
HOUSE = [(-156, 30), (-196, 30), (-196, -30), (-156, -30)]
HOUSE_ROOF = [(-160, 8), (-190, 8), (-190, -8), (-160, -8)]


def beach(s: Stage):
    """Draw sand between the sea and the land, with umbrellas and boats."""
    land = s.pick("meadow", "grass", "sand", "tree")
    s.start("sand")
    coast = wavy(s, s.r(420, 560), s.r(420, 560), 50)
    s.paint((below(coast), s.surface("sand", s.shade("sand", -34))))
    deep, shallow = (s.surface(name).astype(np.int32) for name in ("deep", "shallow"))
    depths = [(deep * k + shallow * (256 - k) >> 8).astype(np.int16) for k in range(0, 264, 22)]
    edges = [below(coast + (0, 14 + k * k * 2 + k * 8)) for k in range(12)]
    s.thing("sea", "", *zip(edges, depths, strict=True))
    white = s.rgb("white")
    for offset in (12, 34, 62)[: s.r(2, 3)]:
        surf = smooth(coast[::3] + (0, offset) + s.rng.integers(-7, 8, coast[::3].shape), 2)
        s.paint((band(surf, s.r(5, 9)), white, 12), (band(surf + (0, 8), 12), white, 4))
    s.take_line(coast, 40)
    if land != "sand":
        _land_behind(s, land)
    umbrellas, boats = s.r(0, 8), s.r(0, 5)
    if not umbrellas and not boats:
        boats = s.r(1, 4)
    colour = s.pick("red", "blue", "yellow", "orange", "white")
    for x, y in s.spots(umbrellas, 26, (0, 200, SPAN, 440)):
        umbrella(s, x, y, colour)
    sails = s.pick("white", "red", "yellow")
    for x, y in s.spots(boats, 46, (0, 640, SPAN, SPAN)):
        s.boat(x, y, s.r(0, 71), s.r(26, 36), sails, s.chance(50))
    if land == "meadow" and s.chance(60):
        s.road(across(60), 44)
    if land in ("meadow", "grass"):
        s.scatter_trees(s.r(8, 22), 14, 24, (-20, -60, SPAN + 20, 190))
    s.add_facts(
        Fact("umbrella", "standing on the sand", colour),
        Fact("boat", "sailing on the sea", sails),
        Fact("sea", "next to the beach", amount="the"),
        Fact("road", "running along the beach"),
        Fact("tree", "behind the beach", "green", amount=SOME),
    )


def _land_behind(s: Stage, land: str):
    """Draw the land behind a beach."""
    edge = wavy(s, s.r(110, 200), s.r(110, 200), 26, 7)
    upper = polygon([(LOW, LOW), *edge.tolist(), (HIGH, LOW)])
    if land == "tree":
        s.grove(upper)
        s.around = "next to green trees"
    else:
        s.paint((upper, s.surface(land)))
        s.around = "next to green grass"
    s.take_line(edge, 40)


def bridge(s: Stage):
    """Draw one or two bridges over a river."""
    banks = s.pick("meadow", "houses", "forest", "bare land")
    s.start("soil" if banks == "bare land" else "grass")
    width = s.r(300, 480)
    colour = s.pick("green", "brown", "blue")
    water = wavy(s, s.r(420, 480), s.r(420, 480), 26, 4)
    if banks == "forest":
        s.paint((rect(MIDDLE, MIDDLE, 900, 900), s.canopy(8)))
    s.water(band(water, width), "river", colour, BRIDGED[colour], s.pick("soil", "gravel"), 10)
    s.take_line(water, width // 2 + 20)
    count = s.pick(1, 1, 1, 2)
    xs = (s.r(240, 660),) if count == 1 else (s.r(230, 300), s.r(600, 670))
    wide, style = s.r(58, 84), s.pick("beams", "towers", "plain")
    half = -(-s.r(0, 8) // (2 * count))
    for x in xs:
        s.taken.extend((x, y, wide) for y in range(LOW, HIGH, wide))
        s.road(down(x), wide, verge="concrete")
        _span(s, x, wide, width, style)
        on = [(x, MIDDLE - width // 2), (x, MIDDLE + width // 2)]
        s.drive(on, wide // 4, half, CARS)
        s.drive(on[::-1], wide // 4, half, CARS)
    sails = s.pick("white", "red", "blue")
    s.taken = [t for t in s.taken if t[2] == wide]
    for x, y in s.spots(s.r(0, 4), 40, (0, MIDDLE - width // 3, SPAN, MIDDLE + width // 3)):
        s.boat(x, y, s.pick(0, 36) + s.r(-3, 3), s.r(26, 34), sails, s.chance(50))
    s.take_line(water, width // 2 + 20)
    if banks == "houses":
        neighbours(s, PAGE, 90)
    if banks != "forest":
        s.scatter_trees(s.r(8, 40), 16, 28)
    group = "bridge" if count == 1 else "bridges"
    s.add_facts(
        Fact("bridge", "crossing the river side by side", one="over the river"),
        Fact("river", f"under the {group}", colour),
        Fact("car", f"driving on the {group}", SAME),
        Fact("boat", "on the river", sails),
        Fact("house", "on both sides of the river", SAME, "near the river"),
        Fact("tree", "near the river", "green", amount=SOME),
    )


def _span(s: Stage, x: int, wide: int, width: int, style: str):
    """Draw a bridge that is `wide` units wide over a river that is `width` units wide."""
    half = width // 2
    deck = (rect(x, MIDDLE, wide // 2, half + 30), s.surface("asphalt", (128, 128, 130)))
    span = rect(x, MIDDLE, wide // 2 + 6, half + 30)
    middle = band([(x, MIDDLE - half - 30), (x, MIDDLE + half + 30)], 3)
    s.canvas.shadow(span, 60)
    with s.canvas.item("bridge", "grey"):
        s.paint((span, s.shade("concrete", 20)), deck)
        if style == "beams":
            beams = [rect(x, y, wide // 2, 2)[0] for y in range(MIDDLE - half, MIDDLE + half, 26)]
            s.paint(*s.lines(beams, strength=9))
        elif style == "towers":
            feet = [
                rect(x + side * (wide // 2 + 4), MIDDLE + up * width // 3, 9, 9)[0]
                for side, up in product((-1, 1), (-1, 1))
            ]
            s.canvas.shadow(feet, 90)
            s.paint((feet, s.rgb("white")))
        s.paint(*s.lines(middle))


def pond(s: Stage):
    """Draw one to six ponds."""
    land = s.pick("meadow", "grass", "dry", "soil")
    s.start(land)
    if s.chance(50):
        street(s, across(s.r(30, 90)), 40, 10, s.r(0, 4))
    colour = s.pick(*POND)
    count = s.pick(1, 1, 2, 3, 4, 6)
    if s.chance(35) and count > 1:
        square_ponds(s, count, colour)
    else:
        size = PONDS[count]
        for x, y in s.spots(count, size, tries=200):
            shape = blob(x, y, s.r(size * 3 // 4, size * 7 // 8), s.rng, 4, s.r(7, 11), s.r(13, 18))
            s.water(shape, "pond", colour, POND[colour], s.pick("dry", "soil", "tree"), 8)
    roof = s.pick(*ROOFS)
    cottages(s, s.r(1, 5) if s.chance(40) else 0, 44, roof)
    s.scatter_trees(s.pick(0, 6, 14, 40), 16, 30)
    s.around = "surrounded by " + GROUND[land]
    s.add_facts(
        Fact("pond", "on the " + GROUND[land].replace("meadows", "meadow"), colour),
        Fact("road", "near the water"),
        Fact("car", "on the road near the water"),
        Fact("house", "near the water", roof),
        Fact("tree", "around the water", "green", amount=SOME),
    )


def square_ponds(s: Stage, count: int, colour: str):
    """Draw rectangular ponds in rows."""
    columns = 2 if count < 6 else 3
    rows = -(-count // columns)
    w, h = 520 // columns // 2 + 10, 520 // rows // 2 + 10
    for k in range(count):
        x = 150 + (SPAN - 300) * (2 * (k % columns) + 1) // (2 * columns)
        y = 150 + (SPAN - 300) * (2 * (k // columns) + 1) // (2 * rows)
        s.water(rect(x, y, w, h), "pond", colour, POND[colour], "dry", 8)
        s.take_line([(x - w, y), (x + w, y)], h + 12)


def port(s: Stage):
    """Draw a quay with a marina or docks."""
    colour = s.pick("blue", "green")
    s.start("water", HARBOURS[colour])
    s.thing("water", colour, (rect(MIDDLE, MIDDLE, 900, 900), s.canvas.pixels))
    quay = s.r(200, 280)
    land = rect(MIDDLE, quay - 500, 900, 500)
    s.canvas.shadow(land, 12)
    edge = band(across(quay - 4), 10)
    s.paint((land, s.surface("concrete")), (edge, s.shade("concrete", 26)))
    if s.chance(55):
        marina(s, quay)
    else:
        docks(s, quay)
    s.around = f"next to {colour} water"


def marina(s: Stage, quay: int):
    """Draw piers with boats."""
    piers = s.r(1, 3)
    slots = []
    for x in PIERS[piers]:
        length = s.r(420, 520)
        pier = band([(x, quay), (x, quay + length)], 22)
        s.thing("pier", "", (pier, s.surface("concrete", (190, 176, 150))), height=10)
        sides = product(range(50, length, 52), ((-50, 36), (50, 0)))
        slots += [(x + dx, quay + k, way) for k, (dx, way) in sides]
    slots = [p for p in slots if s.inside(p[0], p[1], 44)]
    many = s.chance(35)
    colour = s.pick("white", "white", "red", "blue", "yellow")
    count = len(slots) * 4 // 5 if many else s.r(2, 10)
    for k in s.rng.permutation(len(slots))[:count].tolist():
        x, y, way = slots[k]
        s.boat(x, y, way, s.r(32, 37), colour)
    street(s, across(quay - 60), 46, 11, s.r(0, 5), CARS)
    if s.chance(60):
        neighbours(s, (0, -100, SPAN, quay - 100), 92, percent=80)
    else:
        s.scatter_trees(26, 14, 24, (-20, -60, SPAN + 20, quay - 100))
    s.add_facts(
        Fact("boat", "docked at the pier" if piers == 1 else "docked at the piers", colour),
        Fact("pier", "stretching into the water"),
        Fact("road", "beside the port"),
        Fact("car", "on the road", SAME),
        Fact("house", "near the port", SAME),
        Fact("tree", "near the port", "green", amount=SOME),
    )


def docks(s: Stage, quay: int):
    """Draw cargo ships, containers and cranes."""
    colour = s.pick("red", "blue", "green", "brown", "white")
    count = s.r(1, 4)
    places = [
        (s.r(240, 300), quay + 56, 0),
        (s.r(640, 660), quay + 340, 36),
        (s.r(240, 260), quay + 480, 36),
        (s.r(700, 720), quay + 150, 0),
    ]
    places = [p for p in places if s.inside(p[0], p[1], 100)][:count]
    for place in places:
        ship(s, *place, colour)
    stacks: dict[str, list] = {}
    for x, y in product(range(-60, SPAN + 60, 58), range(-80, quay - 100, 26)):
        if s.chance(72) and (x // 58) % 5 and s.inside(x, y, 0):
            name = s.pick("red", "blue", "green", "orange", "white", "grey")
            stacks.setdefault(name, []).append(rect(x, y, 26, 10)[0])
    with s.canvas.item("container", count=sum(map(len, stacks.values()))):
        for name, loops in stacks.items():
            s.canvas.shadow(loops, 14)
            s.canvas.paint(loops, s.rgb(name))
    orange = s.rgb("orange")
    for x in range(s.r(120, 200), SPAN, s.r(200, 320)):
        if s.inside(x, quay - 30, 60):
            s.canvas.shadow(band([(x, quay - 70), (x, quay + 60)], 10), 70)
            foot = (rect(x, quay - 40, 22, 16), s.shade("orange", -20))
            s.thing("crane", "orange", foot, (band([(x, quay - 80), (x, quay + 60)], 9), orange))
    s.add_facts(
        Fact("ship", "in the port", colour),
        Fact("container", "piled on the wharf"),
        Fact("crane", "standing on the wharf", "orange"),
    )


def ship(s: Stage, x: int, y: int, direction: int, colour: str):
    """Draw a cargo ship of about 110 by 20 pixels, loaded with containers."""

    def at(points):
        return [turn(points, direction, x, y)]

    boxes: dict[str, list] = {}
    for k, row in product(range(-130, 130, 34), (-18, 0, 18)):
        name = s.pick(colour, colour, colour, "grey", "orange")
        boxes.setdefault(name, []).extend(at(box_of(k, row - 8, 30, 16)))
    s.thing(
        "ship",
        colour,
        (at(HULL), s.rgb(colour)),
        (at(HOLD), s.shade(colour, -34), 12),
        (at(HOUSE), s.rgb("white")),
        (at(HOUSE_ROOF), s.shade("white", -60)),
        (band(at([(178, -24), (206, 0), (178, 24)])[0], 4), s.rgb("white"), 9),
        *[(loops, s.shade(name, 14), 13) for name, loops in boxes.items()],
        height=30,
    )


def river(s: Stage):
    """Draw a winding river with boats, an island or a bridge."""
    land = s.pick("forest", "farmland", "meadow", "bare land")
    s.start(BANKS[land])
    if land == "forest":
        s.paint((rect(MIDDLE, MIDDLE, 900, 900), s.canopy(8)))
    if land == "farmland":
        for x, y in product(range(LOW, HIGH, 210), range(LOW, HIGH, 180)):
            corners = box_of(x, y, s.r(195, 205), s.r(165, 175))
            crop(s, s.pick(*CROPS), corners)
    colour = s.pick("green", "brown", "blue")
    width = s.r(90, 210)
    way = wavy(s, s.r(300, 600), s.r(300, 600), s.r(40, 200), s.r(4, 6))
    shore = s.pick("soil", "sand", "tree")
    s.water(band(way, width), "river", colour, RIVERS[colour], shore, s.r(5, 14))
    s.take_line(way, width // 2 + 14)
    what = s.pick("boats", "boats", "island", "bridge")
    s.add_facts(Fact("river", FLOWING[land], colour))
    RIVER_THINGS[what](s, way, width)
    if land in ("meadow", "bare land"):
        s.scatter_trees(s.r(10, 40), 16, 30)
        s.add_facts(Fact("tree", "along the river", "green", amount=SOME))
    if land != "forest" and s.chance(40):
        roof = s.pick(*ROOFS)
        cottages(s, s.r(1, 4), 44, roof)
        s.add_facts(Fact("house", "near the river", roof))
    s.around = "surrounded by " + BESIDE_RIVER.get(land, land)


def _river_boats(s: Stage, way: np.ndarray, width: int):
    sails = s.pick("white", "red", "blue", "yellow")
    slots = [p for p in way[2 :: max(len(way) // 9, 1)].tolist() if s.inside(p[0], p[1], 40)]
    for x, y in slots[: s.r(1, 6)]:
        y += s.r(-width // 5, width // 5)
        s.boat(x, y, s.pick(0, 36) + s.r(-2, 2), s.r(24, 32), sails, s.chance(60))
    s.add_facts(Fact("boat", "sailing on the river", sails))


def _island(s: Stage, way: np.ndarray, width: int):
    x, y = way[len(way) // 2].tolist()
    s.thing("island", "", (blob(x, y, width // 3, s.rng, 3, 8, 26), s.surface("grass")))
    w, h = width // 4, width // 6
    s.trees([(x + s.r(-w, w), y + s.r(-h, h), s.r(13, 20)) for _ in range(4)])
    s.add_facts(Fact("island", "in the middle of the river"))


def _small_bridge(s: Stage, way: np.ndarray, width: int):
    x, y = way[len(way) // 2].tolist()
    top, bottom = y - width, y + width
    s.canvas.shadow(rect(x, y, 20, width), 26)
    s.road([(x, top), (x, bottom)], 30, lines=False, kind="bridge")
    ramps = band([(x, LOW), (x, top + 6)], 30) + band([(x, bottom - 6), (x, HIGH)], 30)
    s.paint((ramps, s.surface("asphalt")))
    s.take_line(down(x), 24)
    s.add_facts(Fact("bridge", "over the river"))


RIVER_THINGS = {"boats": _river_boats, "island": _island, "bridge": _small_bridge}
