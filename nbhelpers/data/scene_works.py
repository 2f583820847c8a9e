"""Recipes for sport, traffic and industry. A recipe draws one scene on a stage and tells what it drew."""
from __future__ import annotations

import numpy as np

from nbhelpers.data.drawing import SPAN, band, disc, polygon, rect, ring, smooth, turn
from nbhelpers.data.scene_land import HIGH, LOW, ROOFS, crop, CROPS, tell_trees
from nbhelpers.data.scene_parts import MIDDLE, Stage, oval, wavy
from nbhelpers.data.scene_town import CARS, PAGE, neighbours, running_track, tell_all, tell_colours


def plane(s: Stage, x: int, y: int, direction: int, size: int, colour: str):
    """A plane of length 2 * size, its nose in the given direction."""
    def at(points):
        return polygon([(a * size // 128, b * size // 128) for a, b in points], direction, x, y)

    def both(points):
        return at(points) + at([(a, -b) for a, b in points])
    body = at([(128, 0), (118, 9), (92, 14), (-70, 13), (-126, 4), (-126, -4), (-70, -13), (92, -14), (118, -9)])
    wings = both([(46, 8), (-34, 116), (-58, 116), (-22, 8)])
    tail = both([(-92, 3), (-122, 46), (-134, 46), (-118, 3)])
    s.canvas.shadow(body + wings + tail, 22)
    with s.canvas.item("plane", colour):
        s.canvas.paint(wings + tail, s._shift(colour, -14))
        s.canvas.paint(both([(34, 44), (34, 56), (4, 56), (4, 44)]), s._shift(colour, -60))
        s.canvas.paint(body, s.rgb(colour))
        s.canvas.paint(at([(104, 0), (116, 6), (110, 8), (100, 0), (110, -8), (116, -6)]), (60, 70, 84), 13)
        s.canvas.paint(at([(-84, 0), (-122, 2), (-130, 0), (-122, -2)]), s._shift(colour, -70))


def airport(s: Stage):
    land = s.pick("grass", "dry", "meadow")
    s.start(land)
    colour = s.pick("white", "white", "blue", "red", "yellow", "green")
    style = s.pick("terminal", "terminal", "hangars", "crossing")
    if style == "crossing":
        return crossing_runways(s, land, colour)
    s.canvas.paint(rect(MIDDLE, 260, 800, 260), s.surface("concrete"))
    for y in range(60, 520, 64):
        s.canvas.paint(band([(LOW, y), (HIGH, y)], 2), s._shift("concrete", -20), 10)
    runway(s, [(LOW, 720), (HIGH, 720)], 96)
    s.canvas.paint(band([(s.r(150, 750), 500), (s.r(150, 750), 720)], 56), s.surface("concrete", "asphalt"))
    count = s.r(1, 6)
    slots = [130 + 128 * k for k in range(6)]
    chosen = sorted(s.rng.permutation(6)[:count].tolist())
    if style == "terminal":
        roof = s.pick("white", "grey", "blue", "brown")
        s.shed(MIDDLE, 96, s.r(340, 400), 50, 0, roof, "terminal", 50)
        for k in range(6):
            s.canvas.shadow(rect(slots[k], 168, 9, 26), 20)
            s.canvas.paint(rect(slots[k], 168, 9, 26), s._shift("concrete", 30))
        where = "parked near the terminal"
    else:
        roof = s.pick("white", "blue", "red", "green")
        for k in range(s.r(2, 5)):
            s.shed(150 + 150 * k, 90, 64, 60, 18, roof, "hangar", 44)
        where = "parked in front of the hangars"
    for k in range(6):
        s.canvas.paint(band(smooth([(slots[k], 300), (slots[k], 420), (slots[k] + 90, 440)]), 4), s.rgb("yellow"), 11)
    for k in chosen:
        plane(s, slots[k], 262, 54, 64, colour)
    s.tell("plane", where, colour)
    s.tell("terminal", "beside the apron", roof)
    s.tell("hangar", "beside the apron", roof)
    s.tell("runway", "in the airport")
    if s.chance(60):
        s.scatter_trees(18, 16, 26, (-20, 800, SPAN + 20, SPAN + 60))
        tell_trees(s, "next to the runway")
    s.around = "surrounded by " + {"grass": "green grass", "dry": "yellow grass", "meadow": "green meadows"}[land]


def runway(s: Stage, points, width: int):
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
    runway(s, [(s.r(200, 330), LOW), (s.r(520, 640), HIGH)], 80)
    both = s.chance(60)
    if both:
        runway(s, [(LOW, s.r(180, 300)), (HIGH, s.r(180, 300))], 80)
    x = 700
    s.canvas.paint(rect(x, 640, 150, 220), s.surface("concrete"))
    s.canvas.paint(band([(x, 640), (430, 640)], 46), s.surface("concrete", "asphalt"))
    slots = [(x - 72, 500), (x + 72, 500), (x - 72, 640), (x + 72, 640), (x - 72, 780), (x + 72, 780)]
    slots = [p for p in slots if s.inside(*p, 56)]
    for k in s.rng.permutation(len(slots))[:s.r(1, 6)].tolist():
        plane(s, *slots[k], 36, 56, colour)
    s.take(x, 540, 190)
    s.take(x, 740, 190)
    s.tell("plane", "parked on the apron", colour)
    s.tell("runway", "crossing each other", one="in the airport")
    s.scatter_trees(s.r(0, 24), 16, 28)
    tell_trees(s, "next to the runway" if not both else "next to the runways")
    s.around = "surrounded by " + {"grass": "green grass", "dry": "yellow grass", "meadow": "green meadows"}[land]


def diamond(s: Stage, x: int, y: int, size: int, direction: int):
    """A baseball field, its home plate at (x, y), opening in the given direction."""
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
        infield = [(size // 14, 0), (side * 5 // 8 + size // 28, -side * 5 // 8), (side * 5 // 4, 0),
                   (side * 5 // 8 + size // 28, side * 5 // 8)]
        s.canvas.paint([at(infield)], s.surface("grass", (108, 150, 80)))
        s.canvas.paint(disc(x, y, size // 9), dirt)
        mound = at([(side * 11 // 16, 0)])[0].tolist()
        s.canvas.paint(disc(*mound, max(size // 26, 5)), dirt)
        for k in (-9, 9):
            s.lines(band([(x, y), at([turn([(size, 0)], k)[0]])[0]], 3))
        for point in ((side * 11 // 16, -side * 11 // 16), (side * 11 // 8, 0), (side * 11 // 16, side * 11 // 16)):
            s.lines(rect(*at([point])[0].tolist(), 4, 4, direction), 16)


def baseballfield(s: Stage):
    land = s.pick("grass", "meadow", "dry")
    s.start(land)
    count = s.pick(1, 1, 2, 2, 3, 4)
    if count == 1:
        size, homes = s.r(400, 470), [(250 + s.r(-30, 30), 250 + s.r(-30, 30), 9)]
    elif count == 2:
        size, homes = s.r(300, 340), [(150, 150, 9), (746, 746, 45)]
    else:
        size = s.r(280, 310)
        homes = [(448 + 40 * dx, 448 + 40 * dy, d) for dx, dy, d in ((-1, -1, 45), (1, -1, 63), (1, 1, 9), (-1, 1, 27))]
        homes = homes[:count]
        s.canvas.paint(disc(448, 448, 70), s.surface("concrete"))
    for x, y, direction in homes:
        diamond(s, x, y, size, direction)
        s.take(*turn([(size * 9 // 16, 0)], direction, x, y)[0].tolist(), size * 5 // 8)
        s.take(x, y, size // 5)
        s.take(*turn([(size * 7 // 8, 0)], direction - 6, x, y)[0].tolist(), size // 3)
        s.take(*turn([(size * 7 // 8, 0)], direction + 6, x, y)[0].tolist(), size // 3)
    ground = {"grass": "green grass", "meadow": "green meadow", "dry": "yellow grass"}[land]
    s.tell("baseball field", "next to each other", one="on the " + ground)
    if s.chance(50) and count < 3:
        s.road([(840, LOW), (840, HIGH)], 48)
        s.drive([(840, LOW), (840, HIGH)], 11, s.r(0, 5), CARS)
        s.tell("road", "beside the baseball field" if count == 1 else "beside the baseball fields")
        tell_all(s, "car", "on the road")
    if s.chance(40):
        neighbours(s, PAGE, 96, percent=60)
        tell_all(s, "house", "near the baseball field" if count == 1 else "near the baseball fields")
    s.scatter_trees(s.pick(0, 14, 40, 60), 18, 30)
    tell_trees(s, "around the baseball field" if count == 1 else "around the baseball fields")


def bridge(s: Stage):
    banks = s.pick("meadow", "houses", "forest", "bare land")
    s.start({"bare land": "soil"}.get(banks, "grass"))
    width = s.r(300, 480)
    colour = s.pick("green", "brown", "blue")
    tone = {"green": (92, 124, 104), "brown": (140, 122, 94), "blue": (62, 106, 142)}[colour]
    water = wavy(s, s.r(420, 480), s.r(420, 480), 26, 4)
    if banks == "forest":
        s.canvas.paint(rect(MIDDLE, MIDDLE, 900, 900), s.canopy(8))
    s.water(band(water, width), "river", colour, tone, s.pick("soil", "gravel"), 10)
    s.take_line(water, width // 2 + 20)
    count = s.pick(1, 1, 1, 2)
    xs = (s.r(240, 660),) if count == 1 else (s.r(230, 300), s.r(600, 670))
    wide, style = s.r(58, 84), s.pick("beams", "towers", "plain")
    cars = s.r(0, 8)
    for x in xs:
        way = [(x, LOW), (x, HIGH)]
        s.taken.extend((x, y, wide) for y in range(LOW, HIGH, wide))
        s.road(way, wide, verge="concrete")
        span = rect(x, MIDDLE, wide // 2 + 6, width // 2 + 30)
        s.canvas.shadow(span, 60)
        with s.canvas.item("bridge", "grey"):
            s.canvas.paint(span, s._shift("concrete", 20))
            s.canvas.paint(rect(x, MIDDLE, wide // 2, width // 2 + 30), s.surface("asphalt", (128, 128, 130)))
            if style == "beams":
                s.lines([loop for y in range(MIDDLE - width // 2, MIDDLE + width // 2, 26)
                         for loop in rect(x, y, wide // 2, 2)], 9)
            elif style == "towers":
                feet = [rect(x + side * (wide // 2 + 4), MIDDLE + up * width // 3, 9, 9)[0]
                        for side in (-1, 1) for up in (-1, 1)]
                s.canvas.shadow(feet, 90)
                s.canvas.paint(feet, s.rgb("white"))
            s.lines(band([(x, MIDDLE - width // 2 - 30), (x, MIDDLE + width // 2 + 30)], 3))
        half = -(-cars // (2 * count))
        on = [(x, MIDDLE - width // 2), (x, MIDDLE + width // 2)]
        s.drive(on, wide // 4, half, CARS)
        s.drive(on[::-1], wide // 4, half, CARS)
    sails = s.pick("white", "red", "blue")
    s.taken = [t for t in s.taken if t[2] == wide]
    for x, y in s.spots(s.r(0, 4), 40, (0, MIDDLE - width // 3, SPAN, MIDDLE + width // 3)):
        s.boat(x, y, s.pick(0, 36) + s.r(-3, 3), s.r(26, 34), sails, s.chance(50))
    s.tell("bridge", "crossing the river side by side", one="over the river")
    s.tell("river", "under the bridge" if count == 1 else "under the bridges", colour)
    tell_all(s, "car", "driving on the bridge" if count == 1 else "driving on the bridges")
    s.tell("boat", "on the river", sails)
    s.take_line(water, width // 2 + 20)
    if banks == "houses":
        neighbours(s, PAGE, 90)
        tell_all(s, "house", "on both sides of the river")
    if banks != "forest":
        s.scatter_trees(s.r(8, 40), 16, 28)
    tell_trees(s, "on both sides of the river")


def industrial(s: Stage):
    s.start("concrete", s.pick((160, 156, 148), (172, 160, 142), (148, 148, 150)))
    y = s.r(400, 500)
    s.road([(LOW, y), (HIGH, y)], 60)
    colours = s.pick(("blue",), ("white",), ("red",), ("grey",), ("blue", "white"), ("white", "grey"), ("blue", "red"))
    rows = [(y - 230, 150), (y + 230, 150)]
    for middle, half in rows:
        x = -40
        while x < SPAN:
            w = s.r(80, 150)
            if s.chance(80):
                place = (x + w, middle + s.r(-16, 16))
                shape = (s.r(90, half), w - 12, 18) if s.chance(50) else (w - 12, s.r(90, half), 0)
                if s.inside(place[0], place[1], 96):
                    s.shed(*place, *shape, s.pick(*colours), "factory building")
                    s.take(*place, min(shape[:2]) + 10)
                    s.take_line([(place[0], place[1] - half * 2 // 3), (place[0], place[1] + half * 2 // 3)], w - 12)
            x += 2 * w + 10
    tanks = s.r(0, 5)
    for x, y1 in s.spots(tanks, 38):
        tank(s, x, y1, 32, "white")
    s.drive([(LOW, y), (HIGH, y)], 15, s.r(0, 4), CARS)
    s.drive([(HIGH, y), (LOW, y)], 15, s.r(0, 3), CARS)
    s.scatter_trees(s.r(4, 20), 14, 22)
    tell_colours(s, "factory building", "in the industrial area")
    s.tell("storage tank", "near the factory buildings", "white")
    s.tell("road", "between the factory buildings")
    tell_all(s, "car", "on the road")
    tell_trees(s, "near the factory buildings")


def tank(s: Stage, x: int, y: int, radius: int, colour: str):
    lx, ly = s.canvas.light
    s.canvas.shadow(disc(x, y, radius), radius * 3 // 4)
    with s.canvas.item("storage tank", colour):
        s.canvas.paint(disc(x, y, radius), s._shift(colour, -30))
        s.canvas.paint(disc(x - lx * radius // 260, y - ly * radius // 260, radius * 15 // 16), s._shift(colour, -4))
        s.canvas.paint(disc(x - lx * radius // 70, y - ly * radius // 70, radius * 5 // 8), s._shift(colour, 10), 10)
        s.canvas.paint(ring(x, y, radius * 15 // 16, 3), s._shift(colour, -52), 11)
        spokes = [loop for k in range(0, 72, 12) for loop in band([(x, y), disc(x, y, radius - 3)[0][k]], 2)]
        s.canvas.paint(spokes, s._shift(colour, -40), 6)
        s.canvas.paint(disc(x, y, max(radius // 10, 4)), s._shift(colour, -50))


def storagetanks(s: Stage):
    land = s.pick("grass", "soil", "concrete")
    s.start(land)
    colour = s.pick("white", "white", "grey", "green", "red", "yellow", "brown")
    y = s.pick(44, 852)
    beside = s.pick("road", "river", "nothing")
    if beside == "road":
        s.road([(LOW, y), (HIGH, y)], 50)
        s.drive([(LOW, y), (HIGH, y)], 12, s.r(0, 5), CARS)
    elif beside == "river":
        s.water(band(wavy(s, y, y, 20), 130), "river", "green", (88, 122, 104), "gravel")
        s.take_line([(LOW, y), (HIGH, y)], 90)
    count = s.pick(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)
    size = {1: 170, 2: 140, 3: 120, 4: 110}.get(count, 92 if count < 8 else 70)
    if s.chance(60):
        columns = 1 if count == 1 else 2 if count in (2, 4) else 3 if count in (3, 5, 6, 9) else 4
        rows = -(-count // columns)
        size = min(size, 760 // columns // 2 - 14, 640 // rows // 2 - 14)
        top = 130 if y < 400 else 60
        step_x, step_y = 780 // columns, 700 // rows
        places = [(58 + step_x * (k % columns) + step_x // 2, top + step_y * (k // columns) + step_y // 2)
                  for k in range(count)]
        places = [p for p in places if s.inside(*p, size + 4)]
    else:
        places = s.spots(count, size + 16, tries=90)
    for x, y1 in places:
        s.canvas.paint(rect(x, y1, size + 15, size + 15), s.surface("gravel", s.pick((176, 164, 146), (164, 158, 150))), 13)
    for (x0, y0), (x1, y1) in zip(places[:-1], places[1:]):
        s.canvas.shadow(band([(x0, y0), (x1, y0), (x1, y1)], 6), 8)
        s.canvas.paint(band([(x0, y0), (x1, y0), (x1, y1)], 6), s._shift("grey", 30))
    for x, y1 in places:
        tank(s, x, y1, size - s.r(0, size // 8), colour)
        s.take(x, y1, size + 20)
    s.tell("storage tank", "near the " + beside if beside != "nothing" else
           {"grass": "on the grass", "soil": "on the bare land", "concrete": "on the concrete ground"}[land], colour)
    group = "storage tanks" if len(places) > 1 else "storage tank"
    s.tell("road", f"beside the {group}")
    s.tell("river", f"beside the {group}", "green")
    tell_all(s, "car", "on the road")
    s.scatter_trees(s.pick(0, 10, 24), 16, 26)
    tell_trees(s, f"near the {group}")
    s.around = {"grass": "surrounded by green grass", "soil": "surrounded by bare land"}.get(land, "")


def playground(s: Stage):
    s.start("grass")
    s.canvas.paint(rect(MIDDLE, MIDDLE, 520, 420), s.surface("concrete", s.pick((176, 172, 160), (150, 158, 120))))
    track = s.pick("red", "red", "orange", "blue", "brown")
    courts = s.r(0, 4)
    kind, colour = s.pick("basketball court", "tennis court"), s.pick("green", "blue", "red", "orange")
    for k in range(courts):
        s.court(770, 180 + 180 * k, 78, 58, 0, colour, kind)
        s.take(770, 180 + 180 * k, 96)
    x = MIDDLE - (110 if courts else 0)
    running_track(s, x, MIDDLE, s.r(110, 130), s.r(190, 220), track)
    s.take(x - 110, MIDDLE, 250)
    s.take(x + 110, MIDDLE, 250)
    s.tell("playground", f"next to {'the ' + kind + 's' if courts > 1 else 'the ' + kind}" if courts else
           "surrounded by open ground", track)
    s.tell("football field", "in the middle of the running track", "green")
    s.tell(kind, "next to the playground", colour)
    if s.chance(60):
        s.road([(LOW, 40), (HIGH, 40)], 50)
        s.drive([(LOW, 40), (HIGH, 40)], 12, s.r(0, 5), CARS)
        s.tell("road", "beside the playground")
        tell_all(s, "car", "on the road")
    if s.chance(50):
        neighbours(s, PAGE, 92, percent=80)
        tell_all(s, "house", "around the playground")
    s.scatter_trees(s.pick(8, 20, 40), 16, 26)
    tell_trees(s, "around the playground")


def stadium(s: Stage):
    s.start(s.pick("concrete", "paving", "grass"))
    colour = s.pick("white", "white", "grey", "blue", "red", "orange")
    seats = s.pick("red", "blue", "yellow", "green", "grey")
    while seats == colour:
        seats = s.pick("red", "blue", "yellow", "green")
    half, radius = s.r(70, 130), s.r(220, 260)
    ring_width = s.r(80, 104)
    outer, inner = oval(MIDDLE, MIDDLE, half, radius), oval(MIDDLE, MIDDLE, half, radius - ring_width)
    s.canvas.paint(oval(MIDDLE, MIDDLE, half, radius + 34), s.surface("paving"))
    s.canvas.shadow(outer, 90)
    whole = len(s.canvas.names)
    with s.canvas.item("stadium", colour):
        s.canvas.paint(outer, s.rgb(colour))
    with s.canvas.item("stand", seats):
        s.canvas.paint(inner, s.surface("concrete", seats))
        for k in range(1, 4):
            row = oval(MIDDLE, MIDDLE, half, radius - ring_width - k * 9)[0]
            s.canvas.paint(band(np.concatenate([row, row[:1]]), 2), s._shift(seats, -44), 10)
    track = radius - ring_width - 38
    s.canvas.paint(oval(MIDDLE, MIDDLE, half, track), s.surface("grass", (104, 144, 76)))
    s.pitch(MIDDLE, MIDDLE, half + track // 3, track * 11 // 16)
    edge = np.concatenate([inner[0], inner[0][:1]])
    s.canvas.shadow(band(edge, 6), 64)
    with s.canvas.again(whole):
        s.canvas.paint(outer + [inner[0][::-1]], s.rgb(colour))
        for k in range(0, 72, 3):
            n = (k + 3) % 72
            s.canvas.paint(polygon([outer[0][k], outer[0][n], inner[0][n], inner[0][k]]),
                           s.canvas.lit(s.rgb(colour), k + 1), 10)
        s.canvas.paint([loop for k in range(0, 72, 3) for loop in band([outer[0][k], inner[0][k]], 3)],
                       s._shift(colour, -40), 9)
    s.take(MIDDLE - half, MIDDLE, radius + 40)
    s.take(MIDDLE + half, MIDDLE, radius + 40)
    s.tell("stadium", "standing on the open ground", colour, having="with a football field inside")
    s.tell("football field", "in the middle of the stadium", "green")
    s.tell("stand", "around the football field", seats, amount="the")
    if s.chance(60):
        s.road([(LOW, 44), (HIGH, 44)], 54)
        s.drive([(LOW, 44), (HIGH, 44)], 13, s.r(0, 6), CARS)
        s.tell("road", "beside the stadium")
        tell_all(s, "car", "on the road")
    if s.chance(35):
        neighbours(s, PAGE, 96, percent=70)
        tell_all(s, "house", "around the stadium")
    s.scatter_trees(s.pick(10, 26, 50), 16, 26)
    tell_trees(s, "around the stadium")


def train(s: Stage, x: int, y: int, coaches: int, colour: str):
    cars = [rect(x + 70 * k, y, 32, 10)[0] for k in range(coaches)]
    s.canvas.shadow(cars, 14)
    with s.canvas.item("train", colour):
        s.canvas.paint([rect(x + 35 * (coaches - 1), y, 35 * (coaches - 1), 4)[0]], s.rgb("black"))
        s.canvas.paint(cars, s.rgb(colour))
        s.canvas.paint([rect(x + 70 * k, y, 28, 3)[0] for k in range(coaches)], s._shift(colour, 40), 10)


def railwaystation(s: Stage):
    s.start("concrete", (150, 146, 140))
    tracks, platforms = s.r(5, 9), s.r(1, 2)
    top, step = s.r(280, 360), 44
    bottom = top + step * tracks
    ys = [top + step // 2 + step * k for k in range(tracks)]
    used = s.rng.permutation(tracks).tolist()
    s.canvas.paint(rect(MIDDLE, (top + bottom) // 2, 800, (bottom - top) // 2 + 20), s.surface("gravel"))
    for k in used[platforms:]:
        with s.canvas.item("railway track"):
            s.canvas.paint([rect(x, ys[k], 2, 13)[0] for x in range(LOW, HIGH, 13)], (98, 84, 72))
            s.canvas.paint([rect(MIDDLE, ys[k] + side, 700, 2)[0] for side in (-7, 7)], (82, 78, 78))
    roof = s.pick("grey", "blue", "white", "red")
    for k in used[:platforms]:
        s.canvas.paint(rect(MIDDLE, ys[k], 640, 20), s.surface("concrete"))
        s.shed(MIDDLE + s.r(-60, 60), ys[k], s.r(200, 290), 17, 0, roof, "platform", 18)
    colour = s.pick("white", "blue", "red", "green", "yellow")
    trains = s.r(1, 4)
    for k in used[platforms:][:trains]:
        coaches = s.r(4, 7)
        train(s, s.r(130, 766 - 70 * (coaches - 1)), ys[k], coaches, colour)
    s.take_line([(LOW, (top + bottom) // 2), (HIGH, (top + bottom) // 2)], (bottom - top) // 2 + 30)
    hall = s.pick("red", "white", "blue", "brown")
    if s.chance(70):
        x, w = MIDDLE + s.r(-160, 160), s.r(120, 180)
        s.house(x, top - 96, w, 52, 0, hall, "station building", 44)
        s.take_line([(x - w, top - 96), (x + w, top - 96)], 90)
    if s.chance(50):
        s.road([(LOW, bottom + 70), (HIGH, bottom + 70)], 50)
        s.drive([(LOW, bottom + 70), (HIGH, bottom + 70)], 12, s.r(0, 5), CARS)
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


def port(s: Stage):
    colour = s.pick("blue", "green")
    s.start("water", {"blue": (50, 92, 122), "green": (64, 104, 98)}[colour])
    with s.canvas.item("water", colour):
        s.canvas.paint(rect(MIDDLE, MIDDLE, 900, 900), s.canvas.pixels)
    quay = s.r(200, 280)
    s.canvas.shadow(rect(MIDDLE, quay - 500, 900, 500), 12)
    s.canvas.paint(rect(MIDDLE, quay - 500, 900, 500), s.surface("concrete"))
    s.canvas.paint(band([(LOW, quay - 4), (HIGH, quay - 4)], 10), s._shift("concrete", 26))
    if s.chance(55):
        marina(s, quay)
    else:
        docks(s, quay)
    s.around = f"next to {colour} water"


def marina(s: Stage, quay: int):
    piers = s.r(1, 3)
    xs = {1: (448,), 2: (260, 640), 3: (170, 448, 726)}[piers]
    slots = []
    for x in xs:
        length = s.r(420, 520)
        s.canvas.shadow(band([(x, quay), (x, quay + length)], 22), 10)
        with s.canvas.item("pier"):
            s.canvas.paint(band([(x, quay), (x, quay + length)], 22), s.surface("concrete", (190, 176, 150)))
        slots += [(x + side * 50, quay + k, 0 if side > 0 else 36) for k in range(50, length, 52) for side in (-1, 1)]
    slots = [p for p in slots if s.inside(p[0], p[1], 44)]
    many = s.chance(35)
    colour = s.pick("white", "white", "red", "blue", "yellow")
    count = len(slots) * 4 // 5 if many else s.r(2, 10)
    for k in s.rng.permutation(len(slots))[:count].tolist():
        s.boat(*slots[k], s.r(32, 37), colour)
    s.tell("boat", "docked at the pier" if piers == 1 else "docked at the piers", colour)
    s.tell("pier", "stretching into the water")
    s.road([(LOW, quay - 60), (HIGH, quay - 60)], 46)
    s.drive([(LOW, quay - 60), (HIGH, quay - 60)], 11, s.r(0, 5), CARS)
    s.tell("road", "beside the port")
    tell_all(s, "car", "on the road")
    if s.chance(60):
        neighbours(s, (0, -100, SPAN, quay - 100), 92, percent=80)
        tell_all(s, "house", "near the port")
    else:
        s.scatter_trees(26, 14, 24, (-20, -60, SPAN + 20, quay - 100))
        tell_trees(s, "near the port")


def ship(s: Stage, x: int, y: int, direction: int, colour: str):
    """A cargo ship of about 110 by 20 pixels, loaded with containers."""
    def at(points):
        return [turn(points, direction, x, y)]
    hull = at([(220, 0), (196, 22), (160, 40), (-200, 40), (-216, 28), (-216, -28), (-200, -40), (160, -40), (196, -22)])
    s.canvas.shadow(hull, 30)
    with s.canvas.item("ship", colour):
        s.canvas.paint(hull, s.rgb(colour))
        s.canvas.paint(at([(150, 26), (-140, 26), (-140, -26), (150, -26)]), s._shift(colour, -34), 12)
        s.canvas.paint(at([(-156, 30), (-196, 30), (-196, -30), (-156, -30)]), s.rgb("white"))
        s.canvas.paint(at([(-160, 8), (-190, 8), (-190, -8), (-160, -8)]), s._shift("white", -60))
        s.lines(band(turn([(178, -24), (206, 0), (178, 24)], direction, x, y), 4), 9)
        boxes = {}
        for k in range(-130, 130, 34):
            for row in (-18, 0, 18):
                boxes.setdefault(s.pick(colour, colour, colour, "grey", "orange"), []).append(
                    turn([(k, row - 8), (k + 30, row - 8), (k + 30, row + 8), (k, row + 8)], direction, x, y))
        for name, loops in boxes.items():
            s.canvas.paint(loops, s._shift(name, 14), 13)


def docks(s: Stage, quay: int):
    colour = s.pick("red", "blue", "green", "brown", "white")
    count = s.r(1, 4)
    places = [(s.r(240, 300), quay + 56, 0), (s.r(640, 660), quay + 340, 36), (s.r(240, 260), quay + 480, 36),
              (s.r(700, 720), quay + 150, 0)]
    places = [p for p in places if s.inside(p[0], p[1], 100)][:count]
    for place in places:
        ship(s, *place, colour)
    stacks = {}
    for x in range(-60, SPAN + 60, 58):
        for y in range(-80, quay - 100, 26):
            if s.chance(72) and (x // 58) % 5:
                stacks.setdefault(s.pick("red", "blue", "green", "orange", "white", "grey"), []).append(
                    rect(x, y, 26, 10)[0])
    with s.canvas.item("container", count=sum(map(len, stacks.values()))):
        for name, loops in stacks.items():
            s.canvas.shadow(loops, 14)
            s.canvas.paint(loops, s.rgb(name))
    for x in range(s.r(120, 200), SPAN, s.r(200, 320)):
        if s.inside(x, quay - 30, 60):
            s.canvas.shadow(band([(x, quay - 70), (x, quay + 60)], 10), 70)
            with s.canvas.item("crane", "orange"):
                s.canvas.paint(rect(x, quay - 40, 22, 16), s._shift("orange", -20))
                s.canvas.paint(band([(x, quay - 80), (x, quay + 60)], 9), s.rgb("orange"))
    s.tell("ship", "in the port", colour)
    s.tell("container", "piled on the wharf")
    s.tell("crane", "standing on the wharf", "orange")


def viaduct(s: Stage):
    land = s.pick("grass", "meadow", "dry")
    s.start(land)
    if s.chance(30):
        for x in range(LOW, HIGH, 230):
            for y in range(LOW, HIGH, 190):
                crop(s, s.pick(*CROPS), [(x, y), (x + 220, y), (x + 220, y + 180), (x, y + 180)])
    x, y, wide = MIDDLE + s.r(-80, 80), MIDDLE + s.r(-80, 80), s.r(76, 96)
    loops = s.pick(0, 2, 4, 4)
    corners = [(-1, -1), (1, 1), (1, -1), (-1, 1)][:loops]
    radius = s.r(110, 140)
    for sx, sy in corners:
        centre = (x + sx * (wide // 2 + radius), y + sy * (wide // 2 + radius))
        loop = disc(*centre, radius)[0]
        s.road(np.concatenate([loop, loop[:1]]), 30, False, kind="loop")
        outer = smooth([(x + sx * wide // 2, y + sy * 900), (x + sx * (wide // 2 + 40), y + sy * 430),
                        (x + sx * 430, y + sy * (wide // 2 + 40)), (x + sx * 900, y + sy * wide // 2)], 4)
        s.road(outer, 30, False, kind="ramp")
        s.take(*centre, radius)
    lower = [(LOW, y), (HIGH, y)]
    s.road(lower, wide, verge="concrete")
    s.lines(band(lower, 6), 12)
    for way in (lower, lower[::-1]):
        s.drive(way, wide // 4 + 2, s.r(0, 5), CARS, 80)
    upper = [(x, LOW), (x, HIGH)]
    ways = [upper]
    if loops == 0 and s.chance(60):
        ways.append(smooth([(LOW, s.r(60, 200)), (x - 120, y - 60), (x + 100, y + 60), (HIGH, s.r(700, 840))], 4))
    elif loops == 0:
        ways.append([(x + 170, LOW), (x + 170, HIGH)])
    for way in ways:
        s.canvas.shadow(band(way, wide), 44)
        s.road(way, wide, verge="concrete", kind="viaduct")
        s.lines(band(way, 6), 12)
    for way in (upper, upper[::-1]):
        s.drive(way, wide // 4 + 2, s.r(0, 5), CARS, 80)
    s.tell("viaduct", "crossing over the road")
    s.tell("loop", "beside the viaduct")
    tell_all(s, "car", "on the viaduct and the road below", "on the road")
    s.scatter_trees(s.pick(10, 30, 60), 14, 26)
    tell_trees(s, "near the viaduct")
    s.around = "surrounded by " + {"grass": "green grass", "meadow": "green meadows", "dry": "yellow grass"}[land]
