"""Know the published data sets, and find a set in a user's folder."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pandas as pd

from nbhelpers.code_identity import code_digest
from nbhelpers.data import layouts, shards
from nbhelpers.data.archives import image_files, open_images
from nbhelpers.data.reading import split_file
from nbhelpers.data.rows import draw
from nbhelpers.data.table import SPLITS, CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.paths import repository_root, runs_root

if TYPE_CHECKING:
    from nbhelpers.data.pixel_cache import DecodedCache

HELD_OUT = 0.2  # share of the training images that becomes val where a set has none
# compressed tars are found so that their refusal says why
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")

UCM_CLASSES = (
    "agricultural",
    "airplane",
    "baseballdiamond",
    "beach",
    "buildings",
    "chaparral",
    "denseresidential",
    "forest",
    "freeway",
    "golfcourse",
    "harbor",
    "intersection",
    "mediumresidential",
    "mobilehomepark",
    "overpass",
    "parkinglot",
    "river",
    "runway",
    "sparseresidential",
    "storagetanks",
    "tenniscourt",
)
RSICD_PAGE = "https://github.com/201528014227051/RSICD_optimal"  # also of UCM- and Sydney-Captions


@dataclass(frozen=True)
class KnownSet:
    """Describe a published data set.

    splits  name of a split in use -> image counts (train, val, test)
    """

    title: str
    splits: dict[str, tuple[int, int, int]]
    size: str
    captions_source: str
    images_source: str
    captions_licence: str
    images_licence: str
    captions_per_image: int = 5

    @property
    def images(self) -> int:
        """Count all images."""
        return sum(next(iter(self.splits.values())))

    def split_name(self, table: CaptionTable) -> str | None:
        """Name the published split that the table has, if any; train and val may be merged."""
        counts = tuple(int((table.images.split == split).sum()) for split in SPLITS)
        for name, (train, val, test) in self.splits.items():
            if counts == (train, val, test):
                return name
            if counts == (train + val, 0, test):
                return f"{name}, train and val merged"
        return None

    def caption_fault(self, table: CaptionTable) -> str | None:
        """Say how the number of captions differs from the published one; None if it agrees."""
        counts = table.captions.image_id.value_counts().reindex(table.images.image_id, fill_value=0)
        other = counts[counts != self.captions_per_image]
        if other.empty:
            return None
        published = self.captions_per_image * len(table)
        return (
            f"{self.title} has {self.captions_per_image} captions for each image, {published} "
            f"for these, but {len(table.captions)} were found ({len(other)} images have "
            f"another number, first: {other.index[0]})."
        )


KNOWN = {
    "ucm": KnownSet(
        "UCM-Captions",
        {"published": (1680, 210, 210)},
        "256x256 (44 of the tifs differ by a few pixels)",
        RSICD_PAGE,
        "http://weegee.vision.ucmerced.edu/datasets/landuse.html",
        "none stated; cite Qu et al. 2016",
        "public domain (USGS); cite Yang & Newsam 2010",
    ),
    "rsicd": KnownSet(
        "RSICD",
        {"published": (8734, 1094, 1093), "the re-split of PIR and HarMA": (7862, 1966, 1093)},
        "224x224",
        RSICD_PAGE,
        RSICD_PAGE,
        "none stated; cite Lu et al. 2017",
        "research only (Google Earth, Baidu Map, MapABC, Tianditu)",
    ),
    "rsitmd": KnownSet(
        "RSITMD",
        {"published": (4291, 0, 452), "the re-split of PIR and HarMA": (3435, 856, 452)},
        "256x256",
        "https://github.com/xiaoyuan1996/AMFMN",
        "https://github.com/xiaoyuan1996/AMFMN",
        "none stated; cite Yuan et al. 2021",
        "research only (Google Earth; some scenes are RSICD's)",
    ),
    "sydney": KnownSet(
        "Sydney-Captions",
        {"published": (497, 58, 58)},
        "500x500",
        RSICD_PAGE,
        RSICD_PAGE,
        "none stated; cite Qu et al. 2016",
        "research only (Google Earth)",
    ),
    "nwpu": KnownSet(
        "NWPU-Captions",
        {"published": (25200, 3150, 3150)},
        "256x256",
        "https://github.com/HaiyanHuang98/NWPU-Captions",
        "https://github.com/HaiyanHuang98/NWPU-Captions",
        "none stated; cite Cheng et al. 2022",
        "research only (Google Earth; images of NWPU-RESISC45)",
    ),
}


@dataclass(frozen=True)
class DataSet:
    """Hold a data set that is ready to use.

    table   images and captions; row i of table.images has the pixels pixels[i]
    known   its entry in KNOWN, None for other sets
    where   sentences for the user: which files were read, and what was decided about them
    files   paths of the captions and of the images
    """

    table: CaptionTable
    pixels: DecodedCache
    known: KnownSet | None
    where: list[str]
    files: tuple[Path, Path] | None = None

    def content(self) -> dict[str, str]:
        """Return what decides its pairs, for keys: table, pixels, and the code that reads them."""
        from nbhelpers.data.loaders import PIXEL_CODE

        return {
            "table": self.table.content(),
            "pixels": self.pixels.key,
            "code": code_digest(CaptionTable, *PIXEL_CODE),
        }


def recognise(table: CaptionTable) -> str | None:
    """Find the key in KNOWN of a table, by its name or else its image counts; None if unknown."""
    words = re.split(r"[^a-z0-9]+", table.name.lower())
    if named := [key for key in KNOWN if key in words]:
        return named[0]
    return next((key for key, known in KNOWN.items() if known.split_name(table)), None)


def name_scenes(table: CaptionTable, key: str | None) -> CaptionTable:
    """Add the scene classes of UCM-Captions: image N has class number (N-1) // 100."""
    if key != "ucm" or not (table.images.scene == table.images.file).all():
        return table
    numbers = pd.to_numeric(
        table.images.file.map(lambda file: PurePosixPath(file).stem), errors="coerce"
    )
    if not numbers.between(1, 2100).all():
        return table
    scenes = [UCM_CLASSES[(int(number) - 1) // 100] for number in numbers]
    return CaptionTable(table.name, table.images.assign(scene=scenes), table.captions)


def hold_out(table: CaptionTable, share: float = HELD_OUT) -> CaptionTable:
    """Move that share of the training images to val.

    A hash of the id alone decides, so the choice is always the same. Of two or more training
    images at least one is moved and at least one stays.
    """
    draws = table.images.image_id[table.images.split == "train"].map(draw).sort_values()
    count = int((draws < share).sum())
    if len(draws) > 1:
        count = min(max(count, 1), len(draws) - 1)
    chosen = table.images.index.isin(draws.index[:count])
    images = table.images.assign(split=table.images.split.mask(chosen, "val"))
    return CaptionTable(table.name, images, table.captions)


def open_dataset(
    set_name: str, data_folder: Path | str = "", cache_folder: Path | str | None = None
) -> DataSet:
    """Open a set from a user's folder, or without a folder the generated set "scenes".

    Images are decoded once into `cache_folder` (default: `cache/` under the run folder). A set
    without val gets one by `hold_out`. UserError with the expected tree if the set is not found,
    and for bad captions or images.
    """
    from nbhelpers.data import pixel_cache

    key = str(set_name).lower()
    if not str(data_folder):
        captions, pictures = _generated(key)
        where = ["The data set 'scenes' is generated: drawn by code, not measured from space."]
    else:
        captions, pictures = find(key, data_folder)
        where = [f"Captions were taken from {captions}.", f"Images were taken from {pictures}."]
    reading = layouts.scan(captions)
    recognised = key if key in KNOWN else recognise(reading.table)
    known = KNOWN[recognised] if recognised else None
    where += [f"The layout of the captions is {reading.layout}.", *reading.notes]
    if known:
        where += _compared(known, reading.table)
    table = name_scenes(dataclasses.replace(reading.usable(), name=key), recognised)
    splits = table.images.split
    if "train" in set(splits) and "val" not in set(splits):
        table = hold_out(table)
        where.append(
            f"There is no val split: {(table.images.split == 'val').sum()} of "
            f"{(splits == 'train').sum()} training images, chosen by a hash of their ids, "
            "were held out for it."
        )
    folder = Path(cache_folder) if cache_folder else runs_root() / "cache"
    pixels = pixel_cache.DecodedCache.build(open_images(pictures), list(table.images.file), folder)
    return DataSet(table, pixels, known, where, (captions, pictures))


def _compared(known: KnownSet, table: CaptionTable) -> list[str]:
    """Say whether the counts of images and captions are the published ones."""
    split, fault = known.split_name(table), known.caption_fault(table)
    if split and not fault:
        return [f"The counts of images and captions are those of {known.title}, {split}."]
    found = [fault] if fault else []
    if not split:
        title = known.title
        found.insert(
            0, f"The image counts are not those of {title}: compare with other work with care."
        )
    return found


def find(key: str, data_folder: Path | str) -> tuple[Path, Path]:
    """Find the captions and the images of a set in a user's folder, in any letter case.

    UserError, with the expected tree, if one of the two is not there.
    """
    folder = Path(data_folder).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"The data folder {folder} does not exist; name the one that holds the set '{key}'."
        )
    captions = _find_captions(key, folder)
    pictures = captions if captions and shards.layout_of(captions) else _find_images(key, folder)
    if captions and pictures:
        return captions, pictures
    found = {"captions": captions, "images": pictures}
    lacking = " and ".join(name for name, path in found.items() if not path)
    source = f"Known sets: scenes, {', '.join(KNOWN)}."
    if key in KNOWN:
        source = f"{KNOWN[key].title} comes from {KNOWN[key].captions_source}."
    raise UserError(f"No {lacking} of the set '{key}' in {folder}; {expected_tree(key)}. {source}")


def expected_tree(key: str) -> str:
    """Say where the files of a set are looked for."""
    return (
        f"expected dataset_{key}.json, {key}/dataset*.json, {key}.csv, {key}.jsonl, "
        f"{key}_train.json (or .jsonl, .csv) with its other splits or a folder {key}_precomp, "
        f"and {key}_images.zip (or .tar), a folder {key}_images or {key}/images; or a folder "
        f"{key}_shards, {key}_train.arrow or {key}/train-*.parquet, which hold both"
    )


def _find_captions(key: str, folder: Path) -> Path | None:
    entries = _entries(folder)
    names = [f"dataset_{key}.json", *(key + suffix for suffix in layouts.SUFFIXES[1:])]
    names += sorted(filter(partial(_is_part, key), entries), key=len)
    for name in (*names, f"{key}.json", f"{key}_precomp", f"{key}_shards", f"{key}_train.arrow"):
        if name in entries:
            return entries[name]
    endings = (*layouts.SUFFIXES, "_caps.txt", "_caps_verify.txt")
    for own in _own_folders(key, folder):
        inner = _entries(own)
        if shards.layout_of(own):
            return own
        if any(name.endswith(endings) for name in inner):
            try:
                return layouts.caption_file(own)
            except UserError as error:
                raise UserError(f"{str(error).rstrip('.')}; {expected_tree(key)}.") from None
        if f"{key}_precomp" in inner:
            return inner[f"{key}_precomp"]
    return None


def _is_part(key: str, name: str) -> bool:
    """Whether a file is one split of the set, as in S_train.json."""
    named = split_file(name)
    return named is not None and named.set.lower() == key and name.endswith(layouts.SUFFIXES)


def _find_images(key: str, folder: Path) -> Path | None:
    named = (f"{key}_images", f"{key}_imgs")
    own_folders = _own_folders(key, folder)
    places = [(own, ("images", "imgs", *named)) for own in own_folders]
    for place, names in [(folder, named), *places]:
        entries = _entries(place)
        for name in names:
            for suffix in ("", *ARCHIVES):
                found = entries.get(name + suffix)
                if found and found.is_dir() == (suffix == ""):
                    return found
    return next((place for place in own_folders if any(image_files(place))), None)


def _own_folders(key: str, folder: Path) -> list[Path]:
    """List the folders of this set alone: `S/`, `S_captions/`, `S_precomp/`, or the folder."""
    names = (key, f"{key}_captions", f"{key}-captions", f"{key}_precomp")
    entries = _entries(folder)
    own = [entries[name] for name in names if name in entries and entries[name].is_dir()]
    return own + ([folder] if folder.resolve().name.lower() in names else [])


def _entries(folder: Path) -> dict[str, Path]:
    return {path.name.lower(): path for path in sorted(folder.iterdir(), reverse=True)}


def _generated(key: str) -> tuple[Path, Path]:
    if key != "scenes":
        source = f" (from {KNOWN[key].captions_source})" if key in KNOWN else ""
        raise UserError(
            f"The set '{key}' is not generated: name its folder{source} with DATA, "
            "in a command with --data, or take the set 'scenes', which needs none."
        )
    from nbhelpers.data.scenes import generate

    captions = generate.write_dataset(repository_root() / "data" / "scenes")
    return captions, captions.parent / "images"
