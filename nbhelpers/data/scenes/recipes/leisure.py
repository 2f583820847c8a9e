"""Recipes of sport, school and leisure: each draws one scene on a stage and adds its facts."""

from __future__ import annotations

from itertools import product

import numpy as np

from nbhelpers.data.scenes.drawing import SPAN, band, blob, disc, polygon, rect, turn
from nbhelpers.data.scenes.recipes.common import (
    CARS,
    GROUND,
    PAGE,
    POND,
    ROOFS,
    across,
    below,
    down,
    neighbours,
    running_track,
    street,
    umbrella,
)
from nbhelpers.data.scenes.scene_parts import MIDDLE, SAME, SOME, Fact, Stage, oval, wavy

# places and half widths of school buildings, beside those on the free side of the yard
SCHOOL = [(x, y, w) for y, (x, w) in product((150, 330), ((190, 120), (480, 120), (740, 84)))]


def baseballfield(s: Stage):
    """Draw one to four baseball fields."""
    land = s.pick("grass", "meadow", "dry")
    s.start(land)
    count = s.pick(1, 1, 2, 2, 3, 4)
    if count == 1:
        size, homes = s.r(400, 470), [(250 + s.r(-30, 30), 250 + s.r(-30, 30), 9)]
    elif count == 2:
        size, homes = s.r(300, 340), [(150, 150, 9), (746, 746, 45)]
    else:
        size = s.r(280, 310)
        homes = [(408, 408, 45), (488, 408, 63), (488, 488, 9), (408, 488, 27)][:count]
        s.paint((disc(448, 448, 70), s.surface("concrete")))
    for x, y, direction in homes:
        diamond(s, x, y, size, direction)
        s.take(x, y, size // 5)
        outfield, room = size * 7 // 8, size // 3
        for far, way, radius in (
            (size * 9 // 16, 0, size * 5 // 8),
            (outfield, -6, room),
            (outfield, 6, room),
        ):
            at_x, at_y = turn([(far, 0)], direction + way, x, y)[0].tolist()
            s.take(at_x, at_y, radius)
    if s.chance(50) and count < 3:
        street(s, down(840), 48, 11, s.r(0, 5), CARS)
    if s.chance(40):
        neighbours(s, PAGE, 96, percent=60)
    s.scatter_trees(s.pick(0, 14, 40, 60), 18, 30)
    group = "baseball field" if count == 1 else "baseball fields"
    s.add_facts(
        Fact("baseball field", "next to each other", one="surrounded by " + GROUND[land]),
        Fact("road", f"beside the {group}"),
        Fact("car", "on the road", SAME),
        Fact("house", f"near the {group}", SAME),
        Fact("tree", f"around the {group}", "green", amount=SOME),
    )


def diamond(s: Stage, x: int, y: int, size: int, direction: int):
    """Draw a baseball field with its home plate at (x, y), open in the given direction."""

    def at(points):
        return turn(points, direction, x, y)

    def fan(radius, half=9):
        rim = [tuple(turn([(radius, 0)], k)[0]) for k in range(-half, half + 1)]
        return [at([(0, 0), *rim])]

    dirt, far = s.surface("soil", (186, 138, 96)), s.surface("soil", (170, 132, 92))
    side = size * 9 // 32
    near, base = side * 5 // 8 + size // 28, side * 11 // 16
    infield = at(
        [(size // 14, 0), (near, -side * 5 // 8), (side * 5 // 4, 0), (near, side * 5 // 8)]
    )
    mound_x, mound_y = at([(base, 0)])[0].tolist()
    mound = disc(mound_x, mound_y, max(size // 26, 5))
    fouls = [band([(x, y), at([turn([(size, 0)], k)[0]])[0]], 3) for k in (-9, 9)]
    corners = at([(base, -base), (2 * base, 0), (base, base)]).tolist()
    bases = [rect(a, b, 4, 4, direction) for a, b in corners]
    s.thing(
        "baseball field",
        "",
        (fan(size + size // 14, 10), far),
        (fan(size), s.surface("grass", (100, 142, 74))),
        (fan(size * 15 // 32), dirt),
        ([infield], s.surface("grass", (108, 150, 80))),
        (disc(x, y, size // 9), dirt),
        (mound, dirt),
        *s.lines(*fouls),
        *s.lines(*bases, strength=16),
    )


def park(s: Stage):
    """Draw a park with lakes, pavilions and paths."""
    sand = (214, 200, 168)
    s.start("meadow")
    for _ in range(s.r(2, 3)):
        s.path(wavy(s, s.r(100, 800), s.r(100, 800), 130), 18, sand)
    if s.chance(70):
        x = s.r(150, 750)
        s.path(wavy(s, x, x, 90)[:, ::-1], 18, sand)
    s.taken.clear()
    colour = s.pick("green", "blue", "dark")
    lakes = s.r(1, 2)
    room, size = (190, 178) if lakes == 1 else (140, 130)
    for x, y in s.spots(lakes, room):
        s.paint((blob(x, y, size + 20, s.rng, 2), s.surface("gravel", sand)))
        s.water(blob(x, y, size, s.rng, 4, 9, s.r(13, 18)), "lake", colour, POND[colour], "tree", 5)
    roof = s.pick("red", "orange", "blue", "white")
    for x, y in s.spots(s.r(1, 4), 48):
        s.paint((disc(x, y, 46), s.surface("paving")))
        pavilion(s, x, y, 32, roof)
    s.scatter_trees(s.r(50, 90), 16, 30)
    s.add_facts(
        Fact("lake", "in the park", colour),
        Fact("pavilion", "near the lake" if lakes == 1 else "near the lakes", roof),
        Fact("tree", "in the park", "green", amount=SOME),
        Fact("path", "winding through the park", amount="several"),
    )


def pavilion(s: Stage, x: int, y: int, radius: int, colour: str):
    """Draw a small eight-sided roof."""
    rim = disc(x, y, radius)[0][::9]
    facets = [
        (polygon([rim[k], rim[(k + 1) % 8], (x, y)]), s.canvas.lit(s.rgb(colour), k * 9 + 4))
        for k in range(8)
    ]
    s.canvas.shadow([rim], 26)
    s.thing("pavilion", colour, *facets, (disc(x, y, 5), s.shade(colour, 40)))


def playground(s: Stage):
    """Draw a running track, and sometimes courts beside it."""
    s.start("grass")
    ground = s.pick((176, 172, 160), (150, 158, 120))
    s.paint((rect(MIDDLE, MIDDLE, 520, 420), s.surface("concrete", ground)))
    track = s.pick("red", "red", "orange", "blue", "brown")
    courts = s.r(0, 4)
    kind = s.pick("basketball court", "tennis court")
    colour = s.pick("green", "blue", "red", "orange")
    for k in range(courts):
        s.court(770, 180 + 180 * k, 78, 58, colour, kind)
        s.take(770, 180 + 180 * k, 96)
    x = MIDDLE - (110 if courts else 0)
    running_track(s, x, MIDDLE, s.r(110, 130), s.r(190, 220), track)
    s.take(x - 110, MIDDLE, 250)
    s.take(x + 110, MIDDLE, 250)
    if s.chance(60):
        street(s, across(40), 50, 12, s.r(0, 5), CARS)
    if s.chance(50):
        neighbours(s, PAGE, 92, percent=80)
    s.scatter_trees(s.pick(8, 20, 40), 16, 26)
    courts_said = f"next to the {kind}" + "s" * (courts > 1)
    s.add_facts(
        Fact("playground", courts_said if courts else "surrounded by open ground", track),
        Fact("football field", "in the middle of the running track", "green"),
        Fact(kind, "next to the playground", colour),
        Fact("road", "beside the playground"),
        Fact("car", "on the road", SAME),
        Fact("house", "around the playground", SAME, "near the playground"),
        Fact("tree", "around the playground", "green", amount=SOME),
    )


def resort(s: Stage):
    """Draw villas and swimming pools, on half of the pictures beside the sea."""
    sea = s.chance(50)
    s.start("meadow")
    if sea:
        coast = wavy(s, s.r(680, 760), s.r(680, 760), 26)
        s.paint((below(coast - (0, 90)), s.surface("sand")))
        s.water(below(coast), "sea", "blue", "shallow", None)
        s.paint((band(coast, 9), s.rgb("white"), 12))
        s.take_line(coast, 60)
        s.take_line(coast + (0, 90), 60)
    roof = s.pick("red", "orange", "white", "brown", "blue")
    limit = 560 if sea else 800
    pools = s.r(1, 3)
    for x, y in s.spots(pools, 96, (100, 100, 796, limit)):
        s.paint((blob(x, y, 92, s.rng, 2, 9), s.surface("paving")))
        s.pool(x, y, s.r(56, 66), 0, 0, True)
    for x, y in s.spots(s.r(1, 7), 84, (60, 60, 836, limit), tries=80):
        s.house(x, y, s.r(64, 78), s.r(30, 38), s.pick(0, 0, 18), roof, "villa")
    colour = s.pick("red", "blue", "yellow", "white")
    for x, y in s.spots(s.r(0, 9), 19, (40, 590, 856, 650) if sea else (40, 40, 856, 856)):
        umbrella(s, x, y, colour, 14)
    s.scatter_trees(s.r(24, 60), 14, 24, (-20, -20, SPAN + 20, limit + 60))
    s.add_facts(
        Fact("swimming pool", "in the resort", "blue"),
        Fact("villa", "near the swimming pools" if pools > 1 else "near the swimming pool", roof),
    )
    if sea:
        s.add_facts(Fact("sea", "next to the resort", amount="the"))
    s.add_facts(
        Fact("umbrella", "on the beach" if sea else "on the grass", colour),
        Fact("tree", "in the resort", "green", amount=SOME),
    )


def school(s: Stage):
    """Draw school buildings with a running track or courts."""
    s.start("grass", (126, 140, 96))
    s.paint(
        (rect(MIDDLE, MIDDLE, 420, 400), s.surface("concrete")),
        (rect(MIDDLE, MIDDLE, 402, 382), s.surface(s.pick("paving", "grass", "meadow"))),
        (rect(MIDDLE, 240, 402, 14), s.surface("concrete")),
        (rect(MIDDLE, 430, 402, 14), s.surface("concrete")),
        (rect(MIDDLE, MIDDLE, 14, 382), s.surface("concrete")),
    )
    x, far = (300, 636) if s.r(0, 1) else (596, 260)
    colour = s.pick("red", "orange", "blue")
    kind = "playground"
    if s.chance(65):
        running_track(s, x, 620, 110, 112, colour)
    else:
        s.paint((rect(x, 620, 230, 150), s.surface("grass")))
        kind = s.pick("basketball court", "tennis court")
        colour = s.pick("green", "blue", "red", "orange")
        for k in range(s.r(1, 4)):
            s.court(x - 105 + 210 * (k % 2), 550 + 140 * (k // 2), 92, 56, colour, kind)
    s.take(x, 620, 240)
    roof = s.pick(*ROOFS)
    slots = [*SCHOOL, (far, 520, 60), (far, 700, 60)]
    for k in sorted(s.rng.permutation(len(slots))[: s.r(2, 7)].tolist()):
        bx, by, w = slots[k]
        s.house(bx, by, w + s.r(-10, 6), 42, 0, roof, "building")
        s.take(bx - w // 2, by, 82)
        s.take(bx + w // 2, by, 82)
    s.scatter_trees(s.r(16, 40), 15, 24)
    s.add_facts(
        Fact("building", "in the school", roof),
        Fact(kind, "next to the school buildings", colour),
        Fact("tree", "around the school buildings", "green", amount=SOME),
    )


def stadium(s: Stage):
    """Draw a stadium: a ring of stands around a football field."""
    s.start(s.pick("concrete", "paving", "grass"))
    colour = s.pick("white", "white", "grey", "blue", "red", "orange")
    seats = s.pick("red", "blue", "yellow", "green", "grey")
    while seats == colour:
        seats = s.pick("red", "blue", "yellow", "green")
    half, radius = s.r(70, 130), s.r(220, 260)
    _stands(s, half, radius, radius - s.r(80, 104), (colour, seats))
    s.take(MIDDLE - half, MIDDLE, radius + 40)
    s.take(MIDDLE + half, MIDDLE, radius + 40)
    if s.chance(60):
        street(s, across(44), 54, 13, s.r(0, 6), CARS)
    if s.chance(35):
        neighbours(s, PAGE, 96, percent=70)
    s.scatter_trees(s.pick(10, 26, 50), 16, 26)
    field = "with a football field inside"
    s.add_facts(
        Fact("stadium", "standing on the open ground", colour, having=field),
        Fact("football field", "in the middle of the stadium", "green"),
        Fact("stand", "around the football field", seats, amount="the"),
        Fact("road", "beside the stadium"),
        Fact("car", "on the road", SAME),
        Fact("house", "around the stadium", SAME, "near the stadium"),
        Fact("tree", "around the stadium", "green", amount=SOME),
    )


def _stands(s: Stage, half: int, radius: int, inside: int, colours: tuple[str, str]):
    """Draw a roof between the radii `radius` and `inside`, rows of seats below it, and the field.

    half     half the length of the straights
    colours  of roof and seats
    """
    colour, seats = colours
    (outer,), (inner,) = oval(MIDDLE, MIDDLE, half, radius), oval(MIDDLE, MIDDLE, half, inside)
    s.paint((oval(MIDDLE, MIDDLE, half, radius + 34), s.surface("paving")))
    whole = len(s.canvas.names)
    s.thing("stadium", colour, ([outer], s.rgb(colour)), height=90)
    rows = [oval(MIDDLE, MIDDLE, half, inside - k * 9)[0] for k in range(1, 4)]
    edges = [band(np.concatenate([row, row[:1]]), 2) for row in rows]
    steps = [(edge, s.shade(seats, -44), 10) for edge in edges]
    s.thing("stand", seats, ([inner], s.surface("concrete", seats)), *steps)
    track = inside - 38
    s.paint((oval(MIDDLE, MIDDLE, half, track), s.surface("grass", (104, 144, 76))))
    s.pitch(MIDDLE, MIDDLE, half + track // 3, track * 11 // 16)
    s.canvas.shadow(band(np.concatenate([inner, inner[:1]]), 6), 64)
    with s.canvas.again(whole):
        s.paint(([outer, inner[::-1]], s.rgb(colour)))
        for k in range(0, 72, 3):
            n = (k + 3) % 72
            panel = polygon([outer[k], outer[n], inner[n], inner[k]])
            s.paint((panel, s.canvas.lit(s.rgb(colour), k + 1), 10))
        ribs = [band([outer[k], inner[k]], 3)[0] for k in range(0, 72, 3)]
        s.paint((ribs, s.shade(colour, -40), 9))
