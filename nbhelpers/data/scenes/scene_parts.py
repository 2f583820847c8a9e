"""What generated scenes are made of: a stage to draw on, houses, trees, roads, cars, boats, ..."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import numpy as np

from nbhelpers.data.scenes.drawing import (
    COS,
    SIDE,
    SIN,
    SPAN,
    Canvas,
    band,
    beside,
    blob,
    crowns,
    dashes,
    fractal,
    noise,
    polygon,
    rect,
    ring,
    smooth,
    speckle,
    stripes,
    tint,
    turn,
)
from nbhelpers.data.scenes.worlds import ROUGH, World

MIDDLE = SPAN // 2

# heights of roofs, in units
HEIGHTS = {
    "house": 26,
    "villa": 36,
    "building": 44,
    "station building": 44,
    "terminal": 50,
    "hangar": 44,
    "factory building": 40,
    "platform": 18,
}

SAME, EACH, SOME = "same", "each", "some"  # see Fact


@dataclass(frozen=True)
class Fact:
    """Objects of one kind (of one colour, if it is named) and what the captions say about them.

    does    "parked near the terminal"; `one`, if given, replaces it where there is only one
    colour  SAME: that of all objects, "" if they differ; EACH: one fact for each colour drawn
    having  goes with the noun: "with a tall tower"
    amount  replaces the counted number: "many", "the"; SOME: "some" or "many", and no fact if
            fewer than three are drawn
    """

    kind: str
    does: str
    colour: str = ""
    one: str = ""
    having: str = ""
    amount: str = ""


@dataclass
class Stage:
    """One scene that is being drawn.

    `rng` decides the layout, `grain` the roughness of surfaces (near-duplicates differ in it).
    """

    world: World
    rng: np.random.Generator
    grain: np.random.Generator
    light: tuple[int, int]
    tilt: int
    facts: list[Fact] = field(default_factory=list)
    around: str = ""
    taken: list = field(default_factory=list)
    made: dict = field(default_factory=dict)

    # chance
    def r(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, *choices):
        """Return one of the choices."""
        return choices[self.r(0, len(choices) - 1)]

    def chance(self, percent: int) -> bool:
        """Return True in `percent` of the cases."""
        return self.r(1, 100) <= percent

    # surfaces
    @cached_property
    def rough(self) -> np.ndarray:
        """(224, 224) int16: large unevenness that all surfaces share."""
        return fractal(self.rng, 56)

    @cached_property
    def fine(self) -> np.ndarray:
        """(224, 224) int16: fine unevenness that all surfaces share."""
        return speckle(self.grain, 120) + noise(self.grain, 3, 120)

    def rgb(self, name) -> tuple:
        """Return a surface or colour by name; a tuple stays as it is."""
        if isinstance(name, str):
            return self.world.surfaces.get(name) or self.world.colours[name]
        return name

    def surface(self, name: str, colour=None, extra=None) -> np.ndarray:
        """Return (224, 224, 3): the roughened surface.

        Another colour or an extra field may be given.
        """
        key = (name, colour)
        if key not in self.made or extra is not None:
            large, small = ROUGH[name]
            bumps = (self.rough.astype(np.int32) * large + self.fine.astype(np.int32) * small) >> 4
            if extra is not None:
                return tint(self.rgb(colour or name), bumps + extra)
            self.made[key] = tint(self.rgb(colour or name), bumps)
        return self.made[key]

    def start(self, name: str, colour=None, extra=None) -> Canvas:
        """Cover the page with a surface and return the new canvas."""
        self.canvas = Canvas(self.surface(name, colour, extra), self.light, self.tilt)
        return self.canvas

    # room
    def inside(self, x: int, y: int, margin: int) -> bool:
        """Return whether a point lies on the picture, `margin` units from its edge or more."""
        x, y = (turn([(x - MIDDLE, y - MIDDLE)], self.tilt)[0] + MIDDLE).tolist()
        return margin <= x <= SPAN - margin and margin <= y <= SPAN - margin

    def free(self, x: int, y: int, radius: int) -> bool:
        """Return whether a disc overlaps nothing that was taken."""
        return all((x - a) ** 2 + (y - b) ** 2 > (radius + c) ** 2 for a, b, c in self.taken)

    def take(self, x: int, y: int, radius: int):
        """Keep a disc free of later things."""
        self.taken.append((x, y, radius))

    def take_line(self, points, radius: int):
        """Keep a line and its surroundings free of later things."""
        points = np.asarray(points)
        for a, b in zip(points[:-1], points[1:], strict=False):
            steps = int(np.abs(b - a).max()) // max(radius, 1) + 1
            self.taken += [(*(a + (b - a) * t // steps).tolist(), radius) for t in range(steps + 1)]

    def spots(
        self, count: int, radius: int, box=(0, 0, SPAN, SPAN), whole: bool = True, tries: int = 40
    ) -> list:
        """Take up to `count` free places for things of that radius in the box; return their (x, y).

        `whole`: nothing may stick out of the picture.
        """
        found: list[tuple[int, int]] = []
        for _ in range(count * tries):
            if len(found) == count:
                break
            x, y = self.r(box[0], box[2]), self.r(box[1], box[3])
            if whole and not self.inside(x, y, radius + 8):
                continue
            if self.free(x, y, radius):
                self.take(x, y, radius)
                found.append((x, y))
        return found

    def add_facts(self, *facts: Fact):
        """Add facts about what was drawn; the captions leave out what cannot be seen."""
        for fact in facts:
            drawn = [name for name in self.canvas.names if name[0] == fact.kind]
            colours = list(dict.fromkeys(colour for _, colour, _ in drawn))
            number = sum(count for _, _, count in drawn)
            if fact.colour == EACH:
                self.facts += [replace(fact, colour=colour) for colour in colours]
            elif fact.colour == SAME:
                self.facts.append(replace(fact, colour=colours[0] if len(colours) == 1 else ""))
            elif fact.amount != SOME:
                self.facts.append(fact)
            elif number > 2:
                self.facts.append(replace(fact, amount="many" if number > 10 else "some"))

    # shapes and objects
    def paint(self, *layers: tuple):
        """Paint shapes one over another: (loops, colour or texture) or (..., strength)."""
        for layer in layers:
            self.canvas.paint(*layer)

    def thing(
        self,
        kind: str,
        colour: str,
        *layers: tuple,
        height: int = 0,
        depth: int = 9,
        count: int = 1,
    ):
        """Draw an object of these layers; `height` units high, it casts a shadow of the first."""
        if height:
            self.canvas.shadow(layers[0][0], height, depth)
        with self.canvas.item(kind, colour, count):
            self.paint(*layers)

    def finish(self) -> np.ndarray:
        """Return (224, 224, 3) uint8: the picture seen from above, a little soft and grainy."""
        p = np.clip(self.canvas.pixels, 0, 255).astype(np.int32)
        padded = np.pad(p, ((1, 1), (1, 1), (0, 0)), mode="edge")
        p = (
            10 * p + padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2]
        ) * 37 >> 9
        grey = (5 * p[..., :1] + 9 * p[..., 1:2] + 2 * p[..., 2:]) >> 4
        p = p + ((grey - p) * 3 >> 4)
        dust = (
            self.grain.integers(-4, 5, (SIDE, SIDE, 1))
            + self.grain.integers(-2, 3, (SIDE, SIDE, 3))
            + self.grain.integers(-5, 6)
        )
        return np.clip(p + dust + (6, 7, 9), 0, 255).astype(np.uint8)

    # plants
    def trees(self, spots):
        """Draw trees at (x, y, radius) as one object."""
        if not spots:
            return
        lx, ly = self.canvas.light
        textures = [self.surface("tree", self.shade("tree", by)) for by in (-22, 0, 24)]
        shapes = [blob(x, y, r, self.rng, 3, 8)[0] for x, y, r in spots]
        mid = [
            blob(x - lx * r // 72, y - ly * r // 72, r * 3 // 4, self.rng, 4, 9)[0]
            for x, y, r in spots
        ]
        top = [
            blob(x - lx * r // 36, y - ly * r // 36, r * 7 // 16, self.rng, 5, 9)[0]
            for x, y, r in spots
        ]
        self.canvas.shadow(shapes, max(r for _, _, r in spots), 8)
        seen = sum(self.inside(x, y, 0) for x, y, _ in spots)
        with self.canvas.item("tree", "green", seen):
            self.paint(*zip((shapes, mid, top), textures, strict=True))

    def shade(self, colour, by: int) -> tuple:
        """Return a colour made lighter (or darker, if `by` is negative)."""
        return tuple(min(255, max(0, c + by)) for c in self.rgb(colour))

    def scatter_trees(
        self, count: int, low: int = 16, high: int = 30, box=(-20, -20, SPAN + 20, SPAN + 20)
    ):
        """Draw up to `count` trees wherever there is room."""
        sizes = [self.r(low, high) for _ in range(count)]
        spots = []
        for r in sizes:
            spots += [(x, y, r) for x, y in self.spots(1, r, box, whole=False, tries=12)]
        self.trees(spots)

    def grove(self, loops: list, cell: int = 8):
        """Fill the loops with closed woodland."""
        self.thing("tree", "green", (loops, self.canopy(cell)), height=24, depth=8, count=99)

    def canopy(self, cell: int = 8, colour="tree") -> np.ndarray:
        """Return (224, 224, 3): closed woodland with crowns of about `cell` pixels."""
        key = ("canopy", cell, colour)
        if key not in self.made:
            shade, tone = crowns(self.rng, cell, self.canvas.light)
            self.made[key] = tint(
                self.shade(colour, 6), shade + tone * 2 + self.rough + (self.fine >> 1)
            )
        return self.made[key]

    # ways
    def road(self, points, width: int = 56, lines: bool = True, verge="paving", kind="road"):
        """Draw a paved road along the points, with edge lines and a dashed middle."""
        layers: list[tuple] = [(band(points, width), self.surface("asphalt"))]
        if verge:
            layers.insert(0, (band(points, width + 14), self.surface(verge)))
        if lines:
            white = self.rgb("white")
            edges = [band(beside(points, side * (width // 2 - 5)), 2) for side in (-1, 1)]
            layers += [(edge, white, 10) for edge in edges]
            layers.append((dashes(points, 3, 18, 18), white, 13))
        self.thing(kind, "", *layers)
        self.take_line(points, width // 2 + 8)

    def path(self, points, width: int = 16, colour="sand"):
        """Draw an unpaved path along the points."""
        self.thing("path", "", (band(points, width), self.surface("gravel", colour)))
        self.take_line(points, width // 2 + 4)

    def cars(self, spots, colour: str):
        """Draw cars at (x, y, direction), all of one colour and one object."""
        if not spots:
            return
        body = [(-20, -7), (-17, -9), (16, -9), (20, -6), (20, 6), (16, 9), (-17, 9), (-20, 7)]
        panes = ([(5, -7), (10, -6), (10, 6), (5, 7)], [(-14, -6), (-10, -7), (-10, 7), (-14, 6)])
        bodies = [turn(body, d, x, y) for x, y, d in spots]
        glass = [turn(pane, d, x, y) for (x, y, d), pane in product(spots, panes)]
        layers = (
            (bodies, self.rgb(colour)),
            (glass, (50, 58, 68) if colour != "black" else (120, 130, 140), 13),
        )
        self.thing("car", colour, *layers, height=9, count=len(spots))

    def drive(
        self,
        points,
        offset: int,
        count: int,
        colours=("white", "red", "blue", "black", "grey"),
        gap: int = 70,
    ):
        """Draw up to `count` cars on the lane `offset` units to the right of the points.

        Each car is whole on the picture; `gap` is the distance of their places.
        """
        points = beside(points, offset)
        ways = []
        for (x0, y0), (x1, y1) in zip(points[:-1].tolist(), points[1:].tolist(), strict=True):
            length = max(abs(x1 - x0), abs(y1 - y0))
            for t in range(gap // 2, length, gap):
                x, y = x0 + (x1 - x0) * t // length, y0 + (y1 - y0) * t // length
                if self.inside(x, y, 26):
                    ways.append((x, y, heading(x1 - x0, y1 - y0)))
        for k in self.rng.permutation(len(ways))[:count].tolist():
            self.cars([ways[k]], self.pick(*colours))

    # buildings
    def house(
        self,
        x: int,
        y: int,
        half_width: int,
        half_height: int,
        direction: int,
        colour: str,
        kind: str = "house",
    ):
        """Draw a hipped roof, its ridge along the longer side."""
        if half_width < half_height:
            half_width, half_height, direction = half_height, half_width, direction + 18
        w, h = half_width, half_height
        corners = [(-w, -h), (w, -h), (w, h), (-w, h)]
        left, right = (-w + h * 3 // 4, 0), (w - h * 3 // 4, 0)
        facets = [
            ((corners[0], corners[1], right, left), 54),
            ((corners[1], corners[2], right), 0),
            ((corners[2], corners[3], left, right), 18),
            ((corners[3], corners[0], left), 36),
        ]
        slopes = [
            (polygon(points, direction, x, y), self.canvas.lit(self.rgb(colour), way + direction))
            for points, way in facets
        ]
        ridge = band(turn([left, right], direction, x, y), 3)
        layers = [(rect(x, y, w, h, direction), self.rgb(colour)), *slopes]
        self.thing(kind, colour, *layers, (ridge, self.shade(colour, 30), 10), height=HEIGHTS[kind])

    def flat_roof(self, x: int, y: int, w: int, h: int, colour: str, clutter: int):
        """Draw a flat roof with a parapet and some machines on it, for the current object."""
        self.paint(
            (rect(x, y, w, h), self.shade(colour, 16)),
            (rect(x, y, w - 6, h - 6), self.surface("concrete", self.shade(colour, -6))),
        )
        for _ in range(clutter):
            box = rect(
                x + self.r(-w, w) * 5 // 8, y + self.r(-h, h) * 5 // 8, self.r(6, 14), self.r(5, 10)
            )
            self.canvas.shadow(box, 12)
            self.canvas.paint(box, self.shade(colour, 22 if self.chance(50) else -34))

    def shed(
        self,
        x: int,
        y: int,
        half_width: int,
        half_height: int,
        direction: int,
        colour: str,
        kind: str,
    ):
        """Draw a long ribbed metal roof in two slopes."""
        w, h = half_width, half_height
        halves = [
            (
                polygon([(-w, 0), (w, 0), (w, side * h), (-w, side * h)], direction, x, y),
                self.canvas.lit(self.rgb(colour), way + direction),
            )
            for side, way in ((-1, 54), (1, 18))
        ]
        ribs = [
            turn([(k, -h), (k + 4, -h), (k + 4, h), (k, h)], direction, x, y)
            for k in range(-w + 10, w - 6, 16)
        ]
        places = turn([(k, 0) for k in range(-w + 40, w - 20, 72)], direction, x, y).tolist()
        vents = [rect(a, b, 8, 5, direction)[0] for a, b in places]
        self.canvas.shadow(rect(x, y, w, h, direction), HEIGHTS[kind])
        self.thing(
            kind,
            colour,
            *halves,
            (ribs, self.shade(colour, -40), 5),
            (vents, self.shade(colour, 30), 13),
        )

    # water
    def water(
        self, loops: list, kind: str, colour: str = "", surface="water", shore="soil", rim: int = 6
    ):
        """Draw water with a shore that is slightly wider than the water."""
        if shore:
            for loop in loops:
                outline = band(np.concatenate([loop, loop[:1]]), 2 * rim, True)
                self.canvas.paint(outline, self.surface("soil", shore))
        with self.canvas.item(kind, colour):
            self.canvas.paint(loops, self.surface("water", surface))
            for size in (14, 11, 8) if len(loops) == 1 else ():
                middle = loops[0].sum(axis=0) // len(loops[0])
                deeper = [(loops[0] - middle) * size // 16 + middle]
                self.canvas.paint(deeper, self.surface("water", self.shade(surface, size - 22)), 9)

    def pool(
        self, x: int, y: int, half_width: int, half_height: int, direction: int, free: bool = False
    ):
        """Draw a swimming pool with a pale edge: a free shape or a rectangle."""
        if free:
            outer = blob(x, y, half_width, self.rng, 4, 7)
            inner = [(outer[0] - (x, y)) * 13 // 16 + (x, y)]
        else:
            outer = rect(x, y, half_width, half_height, direction)
            inner = rect(x, y, half_width - 6, half_height - 6, direction)
        self.paint((outer, self.shade("paving", 26)))
        self.thing("swimming pool", "blue", (inner, self.surface("pool")))

    def boat(self, x: int, y: int, direction: int, size: int, colour: str, wake: bool = False):
        """Draw a boat of length 2 * size, its bow in the given direction."""
        n = size

        def at(points):
            return [turn([(a * n // 32, b * n // 32) for a, b in points], direction, x, y)]

        if wake:
            self.paint(
                (at([(-30, -6), (-30, 6), (-96, 26), (-96, -26)]), self.rgb("white"), 4),
                (at([(-30, -5), (-30, 5), (-80, 9), (-80, -9)]), self.rgb("white"), 7),
            )
        hull = at([(32, 0), (22, 7), (4, 10), (-28, 9), (-31, 0), (-28, -9), (4, -10), (22, -7)])
        deck = at([(2, 5), (-20, 5), (-20, -5), (2, -5)])
        cabin = at([(10, 4), (3, 5), (3, -5), (10, -4)])
        layers = (
            (hull, self.rgb(colour)),
            (deck, self.shade(colour, -36), 12),
            (cabin, (60, 70, 80), 12),
        )
        self.thing("boat", colour, *layers, height=8, depth=7)

    # sport
    def lines(self, *marks: list, strength: int = 13) -> list[tuple]:
        """Return the layers of white lines, one for each list of loops."""
        return [(loops, self.rgb("white"), strength) for loops in marks]

    def frame(self, x, y, w, h, width: int = 3) -> list:
        """Return the loops of a rectangle's outline."""
        corners = np.array([(-w, -h), (w, -h), (w, h), (-w, h), (-w, -h)])
        return band(corners + (x, y), width, True)

    def court(self, x: int, y: int, half_width: int, half_height: int, colour: str, kind: str):
        """Draw a tennis or basketball court with its lines."""
        w, h = half_width, half_height
        a, b = w * 3 // 4, h * 3 // 4
        left, top = -w * 3 // 4, -h * 3 // 4
        marks = [self.frame(x, y, a, b), band([(x, y + top), (x, y + b)], 3)]
        if kind == "basketball court":
            marks.append(ring(x, y, h // 3, 3))
        else:
            for side in (-1, 1):
                service, base = x + side * w * 3 // 8, y + side * h // 2
                marks.append(band([(service, y + -h // 2), (service, y + h // 2)], 3))
                marks.append(band([(x + left, base), (x + a, base)], 2))
        self.thing(
            kind,
            colour,
            (rect(x, y, w, h), self.surface("concrete", colour)),
            (rect(x, y, a, b), self.shade(colour, 16), 9),
            *self.lines(*marks),
        )

    def pitch(self, x: int, y: int, half_width: int, half_height: int):
        """Draw a football field: mown stripes, white lines, goals."""
        w, h = half_width, half_height
        mown = self.surface("grass", (92, 142, 72), stripes(self.tilt, max(w // 4, 24), 70))
        a, b = w - 10, h - 10
        marks = [self.frame(x, y, a, b), band([(x, y - b), (x, y + b)], 3)]
        marks.append(ring(x, y, h * 5 // 16, 3))
        for side, (depth, half) in product((-1, 1), ((a // 5, b // 2), (a // 12, b // 4))):
            inner, outer = side * (a - depth), side * a
            goal = [(outer, -half), (inner, -half), (inner, half), (outer, half)]
            marks.append(band(np.array(goal) + (x, y), 3))
        grass = (rect(x, y, w, h), mown)
        self.thing("football field", "green", grass, *self.lines(*marks))


def heading(dx: int, dy: int) -> int:
    """Return the five-degree direction closest to the vector (dx, dy)."""
    return int(np.argmax(COS * dx + SIN * dy))


def oval(x: int, y: int, half_length: int, radius: int) -> list:
    """Return two half circles joined by straights: a running track."""
    k = np.arange(72)
    shift = np.where((k <= 18) | (k >= 54), half_length, -half_length)
    rim = np.stack([(COS * radius >> 10) + shift, SIN * radius >> 10], axis=1)
    return polygon(rim, 0, x, y)


def wavy(stage: Stage, start: int, end: int, sway: int, knots: int = 5) -> np.ndarray:
    """Return a smooth line from left to right, swaying by up to `sway` between its two heights."""
    xs = [-190 + (SPAN + 380) * k // (knots - 1) for k in range(knots)]
    ys = [start + (end - start) * k // (knots - 1) + stage.r(-sway, sway) for k in range(knots)]
    return smooth(np.stack([xs, ys], axis=1))
