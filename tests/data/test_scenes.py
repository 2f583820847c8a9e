"""The generated data set: the same everywhere, true to its captions, and with the vices it
promises.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from nbhelpers.data.scenes import drawing, generate, scene_captions
from nbhelpers.data.scenes.generate import CLASSES, SceneSpec
from nbhelpers.errors import UserError

# sha256 over pixels and captions of the first image of every class; changing the drawings changes
# them
GOLDEN = {
    "a": "3423730cef8e3643822e8a700d21df03f30f54e7cb192806f9ed6f0a9a1b9eb9",
    "b": "cd6401ca2e8ab090b9095755017d67de99371df670bcd633e023c39551bbd50d",
}
SOURCES = [Path(drawing.__file__).parent / name for name in ("drawing.py", "scene_parts.py")]
SOURCES += sorted((Path(drawing.__file__).parent / "recipes").glob("*.py"))


@cache
def scene(name: str, number: int = 0, world: str = "a") -> generate.Scene:
    return generate.draw(SceneSpec(name, number, world=world))


def some_scenes() -> list[generate.Scene]:
    return [scene(name, number) for name in CLASSES for number in (0, 1)]


@pytest.mark.parametrize("world", ["a", "b"])
def test_golden(world):
    digest = hashlib.sha256()
    for name in CLASSES:
        digest.update(scene(name, 0, world).pixels.tobytes())
        digest.update("\n".join(scene(name, 0, world).captions).encode())
    assert digest.hexdigest() == GOLDEN[world]


def test_no_floating_point_in_the_drawing():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Div), f"{path.name}:{node}"
            assert not isinstance(getattr(node, "value", None), float), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in {
                    "mean",
                    "sin",
                    "cos",
                    "sqrt",
                    "interp",
                    "normal",
                    "uniform",
                }


def test_shape_seed_and_number():
    one = scene("airport")
    assert one.pixels.shape == (224, 224, 3) and one.pixels.dtype == np.uint8
    again, other = (
        generate.draw(SceneSpec("airport", 0)),
        generate.draw(SceneSpec("airport", 0, seed=1)),
    )
    assert np.array_equal(one.pixels, again.pixels) and one.captions == again.captions
    assert not np.array_equal(one.pixels, other.pixels)
    with pytest.raises(UserError, match="no scene 'volcano'"):
        generate.draw(SceneSpec("volcano", 0))


def test_masks_boxes_and_centres():
    for drawn in some_scenes():
        together = np.zeros((224, 224), int)
        for thing in drawn.objects:
            rows, columns = np.nonzero(thing.mask)
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert thing.centre == (columns.sum() // len(columns), rows.sum() // len(rows))
            together += thing.mask
        assert together.max() <= 1  # a pixel shows one object at most


def test_counts_are_what_can_be_seen():
    """Umbrellas, tanks, sheep, ...

    stand apart: their masks fall into as many pieces as the captions say.
    """
    apart, checked = (
        {
            "umbrella",
            "storage tank",
            "hay bale",
            "sheep",
            "swimming pool",
            "pavilion",
            "rock",
        },
        0,
    )
    names = ("beach", "storagetanks", "meadow", "resort", "park", "desert")
    for drawn in [scene(name, number) for name in names for number in range(6)]:
        for phrase in drawn.phrases:
            if phrase.kind in apart:
                mask = np.any([thing.mask for thing in phrase.objects], axis=0)
                pieces = ndimage.label(mask, np.ones((3, 3)))[0].max()
                word = phrase.noun.split()[0]
                said = (
                    {"a": 1, "an": 1}.get(word) or scene_captions.NUMBERS.index(word)
                    if word != "many"
                    else 11
                )
                assert said == min(pieces, 11), (drawn.spec, phrase.noun, pieces)
                checked += 1
    assert checked > 30


def test_colours_are_those_named():
    """The mean colour of a thing is closest in hue and lightness to the colour that the captions
    name.
    """
    plain = {
        "house",
        "villa",
        "plane",
        "boat",
        "umbrella",
        "storage tank",
        "tall building",
        "church",
        "car",
        "factory building",
        "train",
        "pavilion",
        "hangar",
        "terminal",
        "ship",
        "station building",
    }
    wrong, checked = [], 0
    for world in ("a", "b"):
        names = {n: np.array(c) for n, c in generate.WORLDS[world].colours.items()}
        for drawn in [scene(name, 0, world) for name in CLASSES]:
            for thing in drawn.objects:
                if thing.kind in plain and thing.colour in names:
                    inside = (
                        ndimage.binary_erosion(thing.mask) if thing.kind != "car" else thing.mask
                    )
                    colour = np.median(drawn.pixels[inside if inside.any() else thing.mask], axis=0)
                    best = min(names, key=lambda n: distance(names[n], colour))
                    checked += 1
                    if best != thing.colour:
                        wrong.append((thing.kind, thing.colour, best))
    assert checked > 200 and len(wrong) <= checked // 50, (checked, wrong)


def distance(named: np.ndarray, seen: np.ndarray) -> float:
    """Squared difference; lightness counts a quarter, because the sun changes it."""
    named = named + (named @ [5, 9, 2] / 16 - named) * 3 / 16  # the camera's paleness
    apart = seen - named
    return np.sum((apart - apart.mean()) ** 2) + 0.25 * 3 * apart.mean() ** 2


def test_places_are_where_the_pixels_are():
    checked = 0
    for drawn in some_scenes():
        for phrase in drawn.phrases:
            for thing in phrase.objects if phrase.place else ():
                rows, columns = np.nonzero(thing.mask)
                across, down = columns.mean(), rows.mean()
                assert "left" not in phrase.place or across < 76
                assert "right" not in phrase.place or across > 148
                assert "upper" not in phrase.place or down < 76
                assert "lower" not in phrase.place or down > 148
                assert "middle" not in phrase.place or (74 < across < 151 and 74 < down < 151)
                checked += 1
    assert checked > 60


@pytest.mark.parametrize(
    ("kind", "count", "colour", "words", "be"),
    [
        ("plane", 1, "white", "a white plane", "is"),
        ("plane", 3, "orange", "three orange planes", "are"),
        ("umbrella", 1, "", "an umbrella", "is"),
        ("church", 2, "red", "two red churches", "are"),
        ("sheep", 4, "white", "four white sheep", "are"),
        ("house", 1, "orange", "a house with an orange roof", "is"),
        ("house", 11, "grey", "many houses with grey roofs", "are"),
        ("tall building", 2, "red", "two tall red buildings", "are"),
        ("playground", 1, "blue", "a playground with a blue running track", "is"),
    ],
)
def test_noun_phrases(kind, count, colour, words, be):
    assert scene_captions.noun_phrase(kind, count, colour) == (words, be)


def test_places_in_words():
    at = scene_captions.place_of
    assert at([(20, 30), (50, 60)], (5, 5, 70, 70)) == "in the upper left corner"
    assert at([(200, 112)], (180, 0, 224, 224)) == "along the right side"
    assert at([(112, 200)], (80, 180, 140, 220)) == "in the lower part"
    assert at([(112, 112)], (10, 10, 210, 210), alone=True) == "in the middle"
    assert (
        at([(112, 112)], (10, 10, 210, 210)) == at([(20, 20), (200, 200)], (5, 5, 220, 220)) == ""
    )


@pytest.mark.parametrize("world", ["a", "b"])
def test_grammar(world):
    for drawn in some_scenes() if world == "a" else [scene(name, 0, world) for name in CLASSES]:
        assert len(drawn.captions) == 5
        for text in drawn.captions:
            assert re.fullmatch(
                r"[a-z][a-z -]* \." if world == "a" else r"[A-Z][a-z -]*\.", text
            ), text
            assert "  " not in text and not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
            assert not re.search(" and .* is ", text), text  # two things are
        for phrase in drawn.phrases:
            single = phrase.noun.startswith(("a ", "an ")) or phrase.kind == "sea"
            assert phrase.be == ("is" if single else "are"), phrase


def test_captions_tell_images_apart():
    """Most images have a caption that no other image of their class has."""
    alone = 0
    for name in CLASSES[:10]:
        said = [set(scene(name, number).captions) for number in range(3)]
        alone += sum(
            bool(mine - set().union(*said[:k], *said[k + 1 :])) for k, mine in enumerate(said)
        )
    assert alone >= 27


def test_the_sun_stands_still():
    """Beyond a tank it is darker on the shadow side than on the sunny side, however the page was
    turned.
    """
    for world, way in (("a", 1), ("b", -1)):
        gaps = []
        for number in range(8):
            drawn = scene("storagetanks", number, world)
            grey = drawn.pixels.mean(axis=2)
            for thing in drawn.objects:
                if thing.kind == "storage tank":
                    (x, y), far = thing.centre, (thing.box[2] - thing.box[0]) * 11 // 20
                    dx, dy = way * far * 3 // 4, far * 3 // 4
                    if max(x + abs(dx), y + dy) < 224 and min(x - abs(dx), y - dy) >= 0:
                        gaps.append(grey[y - dy, x - dx] - grey[y + dy, x + dx])
        assert len(gaps) > 15 and np.mean(np.array(gaps) > 10) > 0.7


def test_splits_and_twins():
    listed = generate.specs(600)
    assert len(listed) == 600 and len(CLASSES) == 30 and len({spec.name for spec in listed}) == 600
    assert [sum(spec.split == s for spec in listed) for s in ("train", "val", "test")] == [
        420,
        90,
        90,
    ]
    pairs = {
        spec.scene: (SceneSpec(spec.scene, spec.twin_of).split, spec.split)
        for spec in listed
        if spec.twin_of is not None
    }
    assert len(pairs) == 30
    assert set(pairs.values()) == {("train", "train"), ("val", "test"), ("test", "train")}
    assert [spec.split for spec in generate.specs(9)] == ["train", "val", "test"] * 3
    with pytest.raises(UserError, match="too few"):
        generate.specs(2)


def test_twins_look_alike():
    for name in CLASSES[:6]:
        twin = next(n for n in range(20) if SceneSpec(name, n).twin_of is not None)
        first, second, other = (
            scene(name, n).pixels.astype(int) for n in (twin - 1, twin, twin - 2)
        )
        apart = np.abs(first - second).mean()
        assert 1 < apart < 12 and apart * 1.5 < np.abs(first - other).mean()
        assert [(t.kind, t.colour) for t in scene(name, twin).objects] == [
            (t.kind, t.colour) for t in scene(name, twin - 1).objects
        ]


def test_vices_in_the_captions():
    texts = [scene(name, number).captions for name in CLASSES for number in (0, 1)]
    repeats = np.mean([len(set(five)) < 5 for five in texts])
    everywhere = [text for five in texts for text in set(five)]
    assert 0.15 < repeats < 0.6 and len(set(everywhere)) < len(everywhere)


def test_worlds_differ():
    a, b = scene("church", 0, "a"), scene("church", 0, "b")
    assert not np.array_equal(a.pixels, b.pixels) and not set(a.captions) & set(b.captions)


def test_contact_sheet_has_no_twins():
    sheet = generate.of_class("beach", 5)
    assert [s.spec.scene for s in sheet] == ["beach"] * 5 and all(
        s.spec.twin_of is None for s in sheet
    )


def test_write_dataset(tmp_path):
    folder = tmp_path / "set"
    listing = generate.write_dataset(folder, count=18)
    content = json.loads(listing.read_text())
    assert listing == folder / "dataset_scenes.json" and len(content["images"]) == 18
    on_disk = {p.stem: p for p in (folder / "images").iterdir()}
    assert len(on_disk) == 18 and [p.suffix for p in on_disk.values()].count(".tif") == 1
    listed = [entry["filename"] for entry in content["images"]]
    astray = [name for name in listed if on_disk[name[:-4]].suffix != name[-4:]]
    assert astray and all(name.endswith(".tif") for name in astray)
    for entry, spec in zip(content["images"], generate.specs(18), strict=True):
        drawn = scene(spec.scene, spec.number)
        assert np.array_equal(np.asarray(Image.open(on_disk[spec.name])), drawn.pixels)
        assert [s["raw"] for s in entry["sentences"]] == drawn.captions and entry[
            "split"
        ] == spec.split
    assert {p.name for p in tmp_path.iterdir()} == {"set"}

    stamp = listing.stat().st_mtime_ns
    assert (
        generate.write_dataset(folder, count=18) == listing and listing.stat().st_mtime_ns == stamp
    )
    generate.write_dataset(folder, count=3)  # another set of ours is replaced
    assert len(list((folder / "images").iterdir())) == 3


def test_write_dataset_leaves_foreign_folders_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another folder"):
        generate.write_dataset(tmp_path, count=3)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_real_reader_reads_it(tmp_path):
    layouts = pytest.importorskip("nbhelpers.data.layouts")
    table = layouts.read(generate.write_dataset(tmp_path / "set", count=6))
    assert table.counts().images.tolist() == [2, 2, 2] and len(table.captions) == 30


def test_two_processes_write_one_set(tmp_path):
    command = [
        sys.executable,
        "-c",
        (
            "import sys; from nbhelpers.data.scenes import generate; "
            "generate.write_dataset(sys.argv[1], count=6)"
        ),
        str(tmp_path / "set"),
    ]
    running = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    assert (
        len(list((tmp_path / "set" / "images").iterdir())) == 6
        and len(list(tmp_path.iterdir())) == 1
    )


@pytest.mark.slow
def test_six_hundred_images_in_a_minute(tmp_path):
    start = time.perf_counter()
    generate.write_dataset(tmp_path / "set")
    assert time.perf_counter() - start < 60
