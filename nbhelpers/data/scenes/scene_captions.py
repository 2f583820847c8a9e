"""The sentences about a generated scene: counts, colours and places of what was drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

NAMES = {
    "airport": "airport",
    "bareland": "piece of bare land",
    "baseballfield": "baseball field",
    "beach": "beach",
    "bridge": "bridge",
    "center": "civic center",
    "church": "church",
    "commercial": "commercial area",
    "denseresidential": "dense residential area",
    "desert": "desert",
    "farmland": "piece of farmland",
    "forest": "forest",
    "industrial": "industrial area",
    "meadow": "meadow",
    "mediumresidential": "medium residential area",
    "mountain": "mountain area",
    "park": "park",
    "parking": "parking lot",
    "playground": "playground",
    "pond": "pond",
    "port": "port",
    "railwaystation": "railway station",
    "resort": "resort",
    "river": "river",
    "school": "school",
    "sparseresidential": "sparse residential area",
    "square": "square",
    "stadium": "stadium",
    "storagetanks": "storage tank area",
    "viaduct": "viaduct",
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURALS = {"church": "churches", "bush": "bushes", "sheep": "sheep"}
ROOFED = {
    "house",
    "villa",
    "building",
    "factory building",
    "hangar",
    "platform",
    "station building",
}
MASSES = {"sea"}
AT = {"beach"}
# kinds that are the scene itself: other things lie near them, not in them, save for those INSIDE
SELVES = {
    "baseball field",
    "bridge",
    "church",
    "pond",
    "river",
    "playground",
    "stadium",
    "storage tank",
    "viaduct",
    "tall building",
    "factory building",
    "mountain",
}
INSIDE = {
    "stadium": ("football field", "stand"),
    "playground": ("football field",),
    "bridge": ("river",),
    "river": ("bridge", "island"),
}
NEAR, FAR = 75, 149  # pixels: a third of the picture
# "parked near the terminal", to which "on the left side" may be added
ACTION = re.compile(r"(?!surrounded|covered)\w+(ed|ing) (?!.*side by side)")


@dataclass(frozen=True)
class Phrase:
    """A fact in words: "three white planes", "are", "parked near the terminal", "in the middle".

    place           "" if the objects lie all over
    kind, objects   what the fact is about; masks and boxes are those of the objects
    """

    kind: str
    objects: tuple
    noun: str
    be: str
    does: str
    place: str


def plural(kind: str) -> str:
    """Return the plural of a kind."""
    return PLURALS.get(kind, kind + "s")


def article(words: str) -> str:
    """Return the words with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun_phrase(
    kind: str, count: int, colour: str = "", having: str = "", amount: str = ""
) -> tuple[str, str]:
    """Return what there is and its verb: ("three houses with red roofs", "are")."""
    single = (count == 1 and not amount) or kind in MASSES
    words = kind if single else plural(kind)
    if kind == "tall building":
        colour, words = f"tall {colour}", words.removeprefix("tall ")
    if kind in ROOFED and colour:
        words += f" with {article(colour)} roof" if single else f" with {colour} roofs"
    elif kind == "playground" and colour:
        words += f" with {article(colour)} running track"
    elif colour:
        words = f"{colour} {words}"
    if having:
        words += f" {having}"
    if amount:
        return f"{amount} {words}", "is" if single else "are"
    if single:
        return article(words), "is"
    return f"{NUMBERS[count] if count < len(NUMBERS) else 'many'} {words}", "are"


def _side(places: list[int], near: str, far: str) -> str:
    """Return which third of the picture holds all places, "" if not an outer one."""
    if max(places) < NEAR:
        return near
    return far if min(places) > FAR else ""


def place_of(
    centres: list[tuple[int, int]], box: tuple[int, int, int, int], alone: bool = False
) -> str:
    """Return where things lie in words, "" if they lie all over.

    centres   (x, y) of each thing
    box       (left, top, right, bottom) of all together
    alone     there is only one thing; only then may it be large and still lie in the middle
    """
    left, top, right, bottom = box
    xs, ys = [x for x, _ in centres], [y for _, y in centres]
    width, height = right - left, bottom - top
    across = _side(xs, "left", "right")
    down = _side(ys, "upper", "lower")
    if across and down and max(width, height) <= 130:
        return f"in the {down} {across} corner"
    if across and width <= 130:
        return f"along the {across} side" if height >= 180 else f"on the {across} side"
    if down and height <= 130:
        return f"in the {down} part"
    if all(NEAR <= v <= FAR for v in xs + ys) and (alone or max(width, height) <= 130):
        return "in the middle"
    return ""


def phrases_of(facts, objects) -> list[Phrase]:
    """Return the facts in words; a fact whose objects cannot be seen is left out.

    Objects need kind, colour, count, box and centre.
    """
    phrases = []
    for fact in facts:
        seen = [o for o in objects if o.kind == fact.kind and fact.colour in ("", o.colour)]
        if not seen and fact.amount != "the":
            continue
        count, place = sum(o.count for o in seen), ""
        if seen:
            boxes = np.array([o.box for o in seen])
            box = (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())
            place = place_of([o.centre for o in seen], box, count == 1)
        noun, be = noun_phrase(fact.kind, count, fact.colour, fact.having, fact.amount)
        does = fact.one if fact.one and count == 1 else fact.does
        phrases.append(Phrase(fact.kind, tuple(seen), noun, be, does, place))
    return phrases


def _whole(name: str, phrases: list[Phrase]) -> str:
    """Return the scene as the subject of a sentence: "the ponds are"."""
    if phrases and phrases[0].kind == name and phrases[0].be == "are":
        return f"the {plural(name)} are"
    return f"the {name.removeprefix('piece of ')} is"


def _field_sentences(scene: str, phrases: list[Phrase], around: str, rng):
    """Return sentences in the style of the published sets, and how to write them down.

    (about the main thing, about the rest, about every scene of the class, function of a sentence)
    """
    name = NAMES[scene]
    at = "at" if scene in AT else "in"
    main: list[str] = []
    rest: list[str] = []
    plain = [f"this is {article(name)}", f"it is {article(name)} seen from above"]
    if around:
        rest.append(f"{_whole(name, phrases)} {around}")
    for k, t in enumerate(phrases):
        pool = main if k == 0 else rest
        for where in [t.does, t.place] if t.place else [t.does]:
            there = (
                not t.noun.startswith("the ") and (k > 0 or where == t.place) and rng.integers(2)
            )
            pool.append(f"there {t.be} {t.noun} {where}" if there else f"{t.noun} {t.be} {where}")
        if t.place and ACTION.match(t.does):
            pool.append(f"{t.noun} {t.be} {t.does} {t.place}")
    for other in phrases[1:]:
        if phrases[0].kind in SELVES and other.kind not in INSIDE.get(phrases[0].kind, ()):
            rest.append(f"{other.noun} {other.be} near {phrases[0].noun.replace('many', 'the')}")
        elif phrases[0].kind not in SELVES and other.kind not in MASSES:
            main.append(f"{phrases[0].noun} and {other.noun} are {at} {article(name)}")
            main.append(f"{article(name)} with {phrases[0].noun} and {other.noun}")
    return main, rest, plain, lambda text: text + " ."


def _other_sentences(scene: str, phrases: list[Phrase], around: str, rng):
    """Return the same facts in another grammar, for the other world."""
    name = NAMES[scene]
    main: list[str] = []
    rest: list[str] = []
    plain = [f"a view of {article(name)} from the air"]
    if around:
        rest.append(f"from the air we see that {_whole(name, phrases)} {around}")
    for k, t in enumerate(phrases):
        pool = main if k == 0 else rest
        pool.append(f"{'we can see' if rng.integers(2) else 'the photo shows'} {t.noun} {t.does}")
        if t.place:
            seen = f"{t.noun} can be seen {t.place}"
            pool.append(f"{t.place} {t.be} {t.noun}" if rng.integers(2) else seen)
    for other in phrases[1:]:
        main.append(
            f"besides {phrases[0].noun} we also see {other.noun}"
            if rng.integers(2)
            else f"{phrases[0].noun} and {other.noun} appear in this photo of {article(name)}"
        )
    return main, rest, plain, lambda text: text[0].upper() + text[1:] + "."


GRAMMARS = {"a": _field_sentences, "b": _other_sentences}


def captions(scene: str, phrases: list[Phrase], around: str, rng, world: str) -> list[str]:
    """Return five captions of a scene.

    In a quarter of the images captions repeat; some sentences fit the whole class.
    """
    main, rest, plain, write = GRAMMARS[world](scene, phrases, around, rng)
    main, rest = ([pool[k] for k in rng.permutation(len(pool)).tolist()] for pool in (main, rest))
    chosen = main[:2] + rest[:3] + main[2:] + rest[3:]
    if len(chosen) < 2 or rng.integers(6) == 0:
        chosen = chosen[:4] + [plain[int(rng.integers(len(plain)))]]
    chosen = list(dict.fromkeys(chosen))[:5]
    if rng.integers(4) == 0:
        chosen = chosen[: int(rng.integers(1, 4))]
    return [write(chosen[k * len(chosen) // 5]) for k in range(5)]
