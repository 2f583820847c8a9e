"""Recipes of sport, school and leisure: each draws one scene on a stage and adds its facts."""

from __future__ import annotations

import numpy as np

from nbhelpers.data.scenes.drawing import SPAN, band, blob, disc, polygon, rect, turn
from nbhelpers.data.scenes.recipes.common import (
    CARS,
    GROUND,
    HIGH,
    LOW,
    PAGE,
    POND,
    ROOFS,
    across,
    down,
    neighbours,
    plant_trees,
    running_track,
    street,
    tell_all,
    tell_trees,
    umbrella,
)
from nbhelpers.data.scenes.scene_parts import MIDDLE, Stage, oval, wavy


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
        s.canvas.paint(disc(448, 448, 70), s.surface("concrete"))
    for x, y, direction in homes:
        diamond(s, x, y, size, direction)
        infield = turn([(size * 9 // 16, 0)], direction, x, y)[0].tolist()
        s.taken.append((*infield, size * 5 // 8))
        s.take(x, y, size // 5)
        for way in (direction - 6, direction + 6):
            s.taken.append((*turn([(size * 7 // 8, 0)], way, x, y)[0].tolist(), size // 3))
    s.tell("baseball field", "next to each other", one="surrounded by " + GROUND[land])
    group = "baseball field" if count == 1 else "baseball fields"
    if s.chance(50) and count < 3:
        street(s, down(840), 48, 11, s.r(0, 5), CARS)
        s.tell("road", f"beside the {group}")
        tell_all(s, "car", "on the road")
    if s.chance(40):
        neighbours(s, PAGE, 96, percent=60)
        tell_all(s, "house", f"near the {group}")
    plant_trees(s, f"around the {group}", s.pick(0, 14, 40, 60), 18, 30)


def diamond(s: Stage, x: int, y: int, size: int, direction: int):
    """Draw a baseball field with its home plate at (x, y), open in the given direction."""

    def fan(radius, half=9):
        return [(0, 0)] + [tuple(turn([(radius, 0)], k)[0]) for k in range(-half, half + 1)]

    def at(points):
        return turn(points, direction, x, y)

    dirt = s.surface("soil", (186, 138, 96))
    with s.canvas.item("baseball field"):
        s.canvas.paint([at(fan(size + size // 14, 10))], s.surface("soil", (170, 132, 92)))
        s.canvas.paint([at(fan(size))], s.surface("grass", (100, 142, 74)))
        s.canvas.paint([at(fan(size * 15 // 32))], dirt)
        side = size * 9 // 32
        infield = [
            (size // 14, 0),
            (side * 5 // 8 + size // 28, -side * 5 // 8),
            (side * 5 // 4, 0),
            (side * 5 // 8 + size // 28, side * 5 // 8),
        ]
        s.canvas.paint([at(infield)], s.surface("grass", (108, 150, 80)))
        s.canvas.paint(disc(x, y, size // 9), dirt)
        mound_x, mound_y = at([(side * 11 // 16, 0)])[0].tolist()
        s.canvas.paint(disc(mound_x, mound_y, max(size // 26, 5)), dirt)
        for k in (-9, 9):
            s.lines(band([(x, y), at([turn([(size, 0)], k)[0]])[0]], 3))
        base = side * 11 // 16
        for point in ((base, -base), (2 * base, 0), (base, base)):
            base_x, base_y = at([point])[0].tolist()
            s.lines(rect(base_x, base_y, 4, 4, direction), 16)


def park(s: Stage):
    """Draw a park with lakes, pavilions and paths."""
    s.start("meadow")
    for _ in range(s.r(2, 3)):
        way = wavy(s, s.r(100, 800), s.r(100, 800), 130)
        s.path(way, 18, (214, 200, 168))
    if s.chance(70):
        x = s.r(150, 750)
        s.path([(y, k) for k, y in wavy(s, x, x, 90).tolist()], 18, (214, 200, 168))
    s.taken.clear()
    colour = s.pick("green", "blue", "dark")
    lakes = s.r(1, 2)
    for x, y in s.spots(lakes, 190 if lakes == 1 else 140):
        size = 178 if lakes == 1 else 130
        s.canvas.paint(blob(x, y, size + 20, s.rng, 2), s.surface("gravel", (214, 200, 168)))
        s.water(blob(x, y, size, s.rng, 4, 9, s.r(13, 18)), "lake", colour, POND[colour], "tree", 5)
    roof = s.pick("red", "orange", "blue", "white")
    count = s.r(1, 4)
    for x, y in s.spots(count, 48):
        s.canvas.paint(disc(x, y, 46), s.surface("paving"))
        pavilion(s, x, y, 32, roof)
    s.scatter_trees(s.r(50, 90), 16, 30)
    s.tell("lake", "in the park", colour)
    s.tell("pavilion", "near the lake" if lakes == 1 else "near the lakes", roof)
    tell_trees(s, "in the park")
    s.tell("path", "winding through the park", amount="several")


def pavilion(s: Stage, x: int, y: int, radius: int, colour: str):
    """Draw a small eight-sided roof."""
    rim = disc(x, y, radius)[0][::9]
    s.canvas.shadow([rim], 26)
    with s.canvas.item("pavilion", colour):
        for k in range(8):
            facet = polygon([rim[k], rim[(k + 1) % 8], (x, y)])
            s.canvas.paint(facet, s.canvas.lit(s.rgb(colour), k * 9 + 4))
        s.canvas.paint(disc(x, y, 5), s.shade(colour, 40))


def playground(s: Stage):
    """Draw a running track, and sometimes courts beside it."""
    s.start("grass")
    ground = s.pick((176, 172, 160), (150, 158, 120))
    s.canvas.paint(rect(MIDDLE, MIDDLE, 520, 420), s.surface("concrete", ground))
    track = s.pick("red", "red", "orange", "blue", "brown")
    courts = s.r(0, 4)
    kind, colour = (
        s.pick("basketball court", "tennis court"),
        s.pick("green", "blue", "red", "orange"),
    )
    for k in range(courts):
        s.court(770, 180 + 180 * k, 78, 58, 0, colour, kind)
        s.take(770, 180 + 180 * k, 96)
    x = MIDDLE - (110 if courts else 0)
    running_track(s, x, MIDDLE, s.r(110, 130), s.r(190, 220), track)
    s.take(x - 110, MIDDLE, 250)
    s.take(x + 110, MIDDLE, 250)
    courts_said = f"next to the {kind}" + "s" * (courts > 1)
    s.tell("playground", courts_said if courts else "surrounded by open ground", track)
    s.tell("football field", "in the middle of the running track", "green")
    s.tell(kind, "next to the playground", colour)
    if s.chance(60):
        street(s, across(40), 50, 12, s.r(0, 5), CARS)
        s.tell("road", "beside the playground")
        tell_all(s, "car", "on the road")
    if s.chance(50):
        neighbours(s, PAGE, 92, percent=80)
        tell_all(s, "house", "around the playground", "near the playground")
    plant_trees(s, "around the playground", s.pick(8, 20, 40), 16, 26)


def resort(s: Stage):
    """Draw villas and swimming pools, on half of the pictures beside the sea."""
    sea = s.chance(50)
    s.start("meadow")
    if sea:
        coast = wavy(s, s.r(680, 760), s.r(680, 760), 26)
        s.canvas.paint(
            polygon([(LOW, HIGH), *(coast - (0, 90)).tolist(), (HIGH, HIGH)]), s.surface("sand")
        )
        s.water(
            polygon([(LOW, HIGH), *coast.tolist(), (HIGH, HIGH)]), "sea", "blue", "shallow", None
        )
        s.canvas.paint(band(coast, 9), s.rgb("white"), 12)
        s.take_line(coast, 60)
        s.take_line(coast + (0, 90), 60)
    roof = s.pick("red", "orange", "white", "brown", "blue")
    limit = 560 if sea else 800
    pools = s.r(1, 3)
    for x, y in s.spots(pools, 96, (100, 100, 796, limit)):
        s.canvas.paint(blob(x, y, 92, s.rng, 2, 9), s.surface("paving"))
        s.pool(x, y, s.r(56, 66), 0, 0, True)
    for x, y in s.spots(s.r(1, 7), 84, (60, 60, 836, limit), tries=80):
        s.house(x, y, s.r(64, 78), s.r(30, 38), s.pick(0, 0, 18), roof, "villa")
    colour = s.pick("red", "blue", "yellow", "white")
    for x, y in s.spots(s.r(0, 9), 19, (40, 590, 856, 650) if sea else (40, 40, 856, 856)):
        umbrella(s, x, y, colour, 14)
    s.tell("swimming pool", "in the resort", "blue")
    s.tell("villa", "near the swimming pools" if pools > 1 else "near the swimming pool", roof)
    if sea:
        s.tell("sea", "next to the resort", amount="the")
    s.tell("umbrella", "on the beach" if sea else "on the grass", colour)
    plant_trees(s, "in the resort", s.r(24, 60), 14, 24, (-20, -20, SPAN + 20, limit + 60))


def school(s: Stage):
    """Draw school buildings with a running track or courts."""
    s.start("grass", (126, 140, 96))
    s.canvas.paint(rect(MIDDLE, MIDDLE, 420, 400), s.surface("concrete"))
    s.canvas.paint(rect(MIDDLE, MIDDLE, 402, 382), s.surface(s.pick("paving", "grass", "meadow")))
    for y in (240, 430):
        s.canvas.paint(rect(MIDDLE, y, 402, 14), s.surface("concrete"))
    s.canvas.paint(rect(MIDDLE, MIDDLE, 14, 382), s.surface("concrete"))
    side = s.r(0, 1)
    x = 300 if side else 596
    track = s.pick("red", "orange", "blue")
    has_track = s.chance(65)
    if has_track:
        running_track(s, x, 620, 110, 112, track)
        s.take(x, 620, 240)
    else:
        s.canvas.paint(rect(x, 620, 230, 150), s.surface("grass"))
        kind, colour = (
            s.pick("basketball court", "tennis court"),
            s.pick("green", "blue", "red", "orange"),
        )
        for k in range(s.r(1, 4)):
            s.court(x - 105 + 210 * (k % 2), 550 + 140 * (k // 2), 92, 56, 0, colour, kind)
        s.take(x, 620, 240)
    roof = s.pick(*ROOFS)
    far = 636 if side else 260
    slots = [
        (190, 150, 120),
        (480, 150, 120),
        (740, 150, 84),
        (190, 330, 120),
        (480, 330, 120),
        (740, 330, 84),
        (far, 520, 60),
        (far, 700, 60),
    ]
    for k in sorted(s.rng.permutation(len(slots))[: s.r(2, 7)].tolist()):
        bx, by, w = slots[k]
        s.house(bx, by, w + s.r(-10, 6), 42, 0, roof, "building")
        s.take(bx - w // 2, by, 82)
        s.take(bx + w // 2, by, 82)
    s.tell("building", "in the school", roof)
    if has_track:
        s.tell("playground", "next to the school buildings", track)
    else:
        s.tell(kind, "next to the school buildings", colour)
    plant_trees(s, "around the school buildings", s.r(16, 40), 15, 24)


def stadium(s: Stage):
    """Draw a stadium: a ring of stands around a football field."""
    s.start(s.pick("concrete", "paving", "grass"))
    colour = s.pick("white", "white", "grey", "blue", "red", "orange")
    seats = s.pick("red", "blue", "yellow", "green", "grey")
    while seats == colour:
        seats = s.pick("red", "blue", "yellow", "green")
    half, radius = s.r(70, 130), s.r(220, 260)
    ring_width = s.r(80, 104)
    outer, inner = (
        oval(MIDDLE, MIDDLE, half, radius),
        oval(MIDDLE, MIDDLE, half, radius - ring_width),
    )
    s.canvas.paint(oval(MIDDLE, MIDDLE, half, radius + 34), s.surface("paving"))
    s.canvas.shadow(outer, 90)
    whole = len(s.canvas.names)
    with s.canvas.item("stadium", colour):
        s.canvas.paint(outer, s.rgb(colour))
    with s.canvas.item("stand", seats):
        s.canvas.paint(inner, s.surface("concrete", seats))
        for k in range(1, 4):
            row = oval(MIDDLE, MIDDLE, half, radius - ring_width - k * 9)[0]
            s.canvas.paint(band(np.concatenate([row, row[:1]]), 2), s.shade(seats, -44), 10)
    track = radius - ring_width - 38
    s.canvas.paint(oval(MIDDLE, MIDDLE, half, track), s.surface("grass", (104, 144, 76)))
    s.pitch(MIDDLE, MIDDLE, half + track // 3, track * 11 // 16)
    edge = np.concatenate([inner[0], inner[0][:1]])
    s.canvas.shadow(band(edge, 6), 64)
    with s.canvas.again(whole):
        s.canvas.paint(outer + [inner[0][::-1]], s.rgb(colour))
        ribs = []
        for k in range(0, 72, 3):
            n = (k + 3) % 72
            ribs += band([outer[0][k], inner[0][k]], 3)
            s.canvas.paint(
                polygon([outer[0][k], outer[0][n], inner[0][n], inner[0][k]]),
                s.canvas.lit(s.rgb(colour), k + 1),
                10,
            )
        s.canvas.paint(ribs, s.shade(colour, -40), 9)
    s.take(MIDDLE - half, MIDDLE, radius + 40)
    s.take(MIDDLE + half, MIDDLE, radius + 40)
    s.tell("stadium", "standing on the open ground", colour, having="with a football field inside")
    s.tell("football field", "in the middle of the stadium", "green")
    s.tell("stand", "around the football field", seats, amount="the")
    if s.chance(60):
        street(s, across(44), 54, 13, s.r(0, 6), CARS)
        s.tell("road", "beside the stadium")
        tell_all(s, "car", "on the road")
    if s.chance(35):
        neighbours(s, PAGE, 96, percent=70)
        tell_all(s, "house", "around the stadium", "near the stadium")
    plant_trees(s, "around the stadium", s.pick(10, 26, 50), 16, 26)
