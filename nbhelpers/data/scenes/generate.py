"""The generated data set: aerial scenes drawn by code from a seed, with captions of the drawing.

It is not measured from space: no number obtained on it is comparable with a paper. The same seed
gives the same pixels and captions on every machine. It has the faults of the published sets on
purpose:
- repeated captions within an image and between images of a class;
- near-duplicates: every class has an image that repeats another one (the same things at the same
  places, other grain, brightness and wording). For a third of the classes both are in train, for a
  third one is in val and one in test, for a third one is in train and one in test;
- the scene class as a prefix of the file name, one TIFF among PNGs, and files listed with another
  extension than they have on disk.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from nbhelpers.code_identity import code_digest
from nbhelpers.data.scenes import scene_captions
from nbhelpers.data.scenes.drawing import SIDE
from nbhelpers.data.scenes.recipes import RECIPES
from nbhelpers.data.scenes.scene_parts import Fact, Stage
from nbhelpers.data.scenes.worlds import WORLDS
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_folder

CLASSES = tuple(sorted(RECIPES))
SMALLEST = 16  # pixels an object must show to be spoken of
PERIOD = 20  # splits and twins repeat after so many images of a class
# places within the period; the others are train: 70/15/15
VAL, TEST = (1, 8, 15), (2, 9, 16)
# place of the image that repeats the one before it, by class number mod 3
TWINS = (4, 9, 17)


@dataclass(frozen=True)
class SceneSpec:
    """Which picture: scene class, number in the class (0, 1, ...), seed and world ("a" or "b")."""

    scene: str
    number: int
    seed: int = 0
    world: str = "a"

    @property
    def twin_of(self) -> int | None:
        """The number of the image that this one is a near-duplicate of, or None."""
        twin = self.number % PERIOD == TWINS[CLASSES.index(self.scene) % 3]
        return self.number - 1 if twin else None

    @property
    def split(self) -> str:
        """The split of the image: train, val or test."""
        place = self.number % PERIOD
        if place in VAL:
            return "val"
        return "test" if place in TEST else "train"

    @property
    def name(self) -> str:
        """The name of the image file without its extension."""
        return f"{self.scene}_{self.number + 1}"


@dataclass(frozen=True, eq=False)
class Object:
    """Something drawn: its kind, named colour ("" for none) and how many things it stands for.

    A wood of many trees is one object.
    box     (left, top, right, bottom) in pixels, right and bottom excluded
    centre  (x, y) of the pixels that show it
    mask    (224, 224) bool: the pixels that show it
    """

    kind: str
    colour: str
    count: int
    box: tuple[int, int, int, int]
    centre: tuple[int, int]
    _crop: np.ndarray = field(repr=False)

    @property
    def mask(self) -> np.ndarray:
        """(224, 224) bool: the pixels that show the object."""
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        left, top, right, bottom = self.box
        mask[top:bottom, left:right] = self._crop
        return mask


@dataclass(frozen=True, eq=False)
class Scene:
    """One image: pixels (224, 224, 3) uint8, its objects, the facts about them, five captions."""

    spec: SceneSpec
    pixels: np.ndarray = field(repr=False)
    objects: list[Object] = field(repr=False)
    facts: list[Fact] = field(repr=False)
    around: str = field(repr=False)

    @cached_property
    def phrases(self) -> list[scene_captions.Phrase]:
        """The facts in words, with the objects that they are about."""
        return scene_captions.phrases_of(self.facts, self.objects)

    @cached_property
    def captions(self) -> list[str]:
        """Five captions; some may be equal."""
        rng = _stream(self.spec, self.spec.number, 2)
        return scene_captions.captions(
            self.spec.scene, self.phrases, self.around, rng, self.spec.world
        )


def _stream(spec: SceneSpec, number: int, purpose: int) -> np.random.Generator:
    key = [spec.seed, list(WORLDS).index(spec.world), CLASSES.index(spec.scene), number, purpose]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def draw(spec: SceneSpec) -> Scene:
    """Draw one scene.

    The finished page is turned and mirrored at random; the sun stays where it is. UserError if the
    scene class or the world is unknown.
    """
    if spec.scene not in CLASSES or spec.world not in WORLDS:
        raise UserError(
            f"There is no scene '{spec.scene}' in world '{spec.world}'; the worlds are "
            f"{', '.join(WORLDS)}, the scenes {', '.join(CLASSES)}."
        )
    layout = _stream(spec, spec.number if spec.twin_of is None else spec.twin_of, 0)
    world = WORLDS[spec.world]
    light = world.light[int(layout.integers(len(world.light)))]
    turns, mirrored = int(layout.integers(4)), bool(layout.integers(2))
    if mirrored:
        light = (-light[0], light[1])
    for _ in range(turns):
        light = (-light[1], light[0])
    stage = Stage(world, layout, _stream(spec, spec.number, 1), light, int(layout.integers(-3, 4)))
    RECIPES[spec.scene](stage)
    pixels, owner = np.rot90(stage.finish(), turns), np.rot90(stage.canvas.owner, turns)
    if mirrored:
        pixels, owner = pixels[:, ::-1], owner[:, ::-1]
    objects = _objects(stage.canvas.names, owner)
    return Scene(spec, np.ascontiguousarray(pixels), objects, stage.facts, stage.around)


def _objects(names: list[tuple[str, str, int]], owner: np.ndarray) -> list[Object]:
    rows, columns = np.nonzero(owner >= 0)
    order = np.argsort(owner[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    first = np.unique(owner[rows, columns], return_index=True)[1]
    objects = []
    for y, x in zip(np.split(rows, first[1:]), np.split(columns, first[1:]), strict=True):
        if len(x) >= SMALLEST:
            number = int(owner[y[0], x[0]])
            box = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
            centre = (int(x.sum()) // len(x), int(y.sum()) // len(y))
            crop = owner[box[1] : box[3], box[0] : box[2]] == number
            kind, colour, count = names[number]
            objects.append(Object(kind, colour, count, box, centre, crop))
    return objects


def specs(count: int = 600, seed: int = 0, world: str = "a") -> list[SceneSpec]:
    """Return the pictures of a set of `count` images, class by class.

    The first classes get the remainder. Below three images a class, fewer classes are taken, so
    that every split has images. UserError if `count` is below 3.
    """
    if count < 3:
        raise UserError(f"{count} images are too few for three splits; ask for 3 or more.")
    classes = CLASSES[: count // 3]
    share, more = divmod(count, len(classes))
    listed = []
    for k, scene in enumerate(classes):
        listed += [SceneSpec(scene, n, seed, world) for n in range(share + (k < more))]
    return listed


def generate(count: int = 600, seed: int = 0, world: str = "a") -> Iterator[Scene]:
    """Yield the scenes of `specs`, drawn one at a time."""
    return map(draw, specs(count, seed, world))


def of_class(scene: str, count: int = 6, seed: int = 0, world: str = "a") -> list[Scene]:
    """Return the first scenes of a class without near-duplicates, for a contact sheet."""
    chosen = (SceneSpec(scene, number, seed, world) for number in range(2 * count))
    return [draw(spec) for spec in chosen if spec.twin_of is None][:count]


def fingerprint() -> str:
    """Return the sha256 (hex) of the generator's code: the version of the data set."""
    return code_digest(Scene, generate, _write_image)


def write_dataset(folder: Path | str, count: int = 600, seed: int = 0, world: str = "a") -> Path:
    """Write `images/` and `dataset_scenes.json` (Karpathy layout) and return the caption file.

    A folder that holds just this set stays as it is, and an outdated one is replaced. The caption
    file names the generator's version, seed and world. The first image is a TIFF; the second image
    of every fifth class is listed as .tif but stored as .png. UserError if the folder holds other
    files.
    """
    folder = Path(folder)
    listing = folder / "dataset_scenes.json"
    made_by = {"generator": fingerprint(), "count": count, "seed": seed, "world": world}
    if folder.exists() and any(folder.iterdir()):
        if _made_by(listing) == made_by:
            return listing
        if _made_by(listing) is None:
            raise UserError(
                f"{folder} holds files that are not a generated data set; choose another folder."
            )
    with atomic_folder(folder) as temporary:
        (temporary / "images").mkdir()
        images = [
            _write_image(temporary / "images", scene, number)
            for number, scene in enumerate(generate(count, seed, world))
        ]
        text = json.dumps({"dataset": "scenes", **made_by, "images": images}, indent=1)
        (temporary / listing.name).write_text(text, encoding="utf-8")
        if folder.exists() and _made_by(listing) != made_by:
            shutil.rmtree(folder)
    return listing


def _made_by(listing: Path) -> dict | None:
    """Return the settings stored in a caption file, or None if it is not a file of ours."""
    try:
        content = json.loads(listing.read_text(encoding="utf-8"))
        return {key: content[key] for key in ("generator", "count", "seed", "world")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_image(folder: Path, scene: Scene, number: int) -> dict:
    """Save the pixels and return the image's entry in the caption file."""
    spec = scene.spec
    suffix = ".tif" if number == 0 else ".png"
    Image.fromarray(scene.pixels).save(folder / (spec.name + suffix), compress_level=1)
    if spec.number == 1 and CLASSES.index(spec.scene) % 5 == 0:
        suffix = ".tif"
    sentences = [
        {
            "raw": text,
            "tokens": re.findall(r"[a-z-]+", text.lower()),
            "imgid": number,
            "sentid": 5 * number + k,
        }
        for k, text in enumerate(scene.captions)
    ]
    return {
        "filename": spec.name + suffix,
        "imgid": number,
        "split": spec.split,
        "sentids": [sentence["sentid"] for sentence in sentences],
        "sentences": sentences,
    }
