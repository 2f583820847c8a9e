"""Images and captions in the same files: WebDataset shards, the arrow tables of ViLT, the parquet tables of the hub.

| layout | on disk                                                                                                 |
|--------|---------------------------------------------------------------------------------------------------------|
| shards | tars of samples, one caption each: `000123.img_content`, `000123.caption`, `000123.img_name` (PIR-CLIP), |
|        | or `000123.jpg` with `000123.txt` or `000123.json` (RS5M); `S-train-000000.tar` tells set and split       |
| arrow  | `S_train.arrow`, a row per image: image (bytes), caption (list), image_id and, if it is there, split      |
| hub    | `train-00000-of-00001.parquet`, also in `data/`, as `datasets` writes them: image (a struct of bytes and  |
|        | path), captions (list) or caption, and, if they are there, filename and split                            |

`streaming` trains from shards without unpacking them. Importing this module does not import torch.
"""
from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nbhelpers.data.images import MAX_BYTES, ImageStore
from nbhelpers.data.rows import UNPRINTABLE, Rows
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError, atomic_folder

IMAGE = ("img_content", "jpg", "jpeg", "png", "tif", "tiff", "bmp", "webp")  # parts of a sample, by preference
CAPTION = ("caption", "txt", "json")
NAME = "img_name"
MAX_SHARD = 2**30  # bytes of samples after which a new shard begins

_FILE = re.compile(r"(?:(?P<set>.+?)[_-])?(?P<split>train|validation|valid|val|test)(?:[_-]?\d+)?(?:-of-\d+)?(?:-[0-9a-f]+)?"
                   r"\.(?:tar|arrow|parquet)", re.IGNORECASE)
_SPLITS = {"validation": "val", "valid": "val"}
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # key and part, divided as webdataset does


def layout_of(path: Path) -> str | None:
    """"shards", "arrow" or "hub" for such a file, or for a folder of them; None for anything else."""
    if path.is_dir():
        kinds = [("shards", any(map(_is_shard, path.glob("*.tar")))), ("arrow", any(path.glob("*.arrow"))),
                 ("hub", any(_parquets(path)))]
        return next((kind for kind, found in kinds if found), None)
    return {".tar": "shards", ".arrow": "arrow", ".parquet": "hub"}.get(path.suffix.lower())


def read(path: Path, rows: Rows) -> str:
    """Adds the images and captions at `path` to `rows`; returns the name of the set.

    `path` is a shard or a folder of shards, or a table, whose other splits are read with it, or their folder.
    UserError that names shard and sample, or table and column, of what cannot be read.
    """
    tables = layout_of(path) in ("arrow", "hub")
    files = _tables(path) if tables else shard_files(path)
    for file in files:
        (_read_table if tables else _read_shard)(file, rows)
    matches = [_FILE.fullmatch(file.name) for file in files]
    sets = {match["set"] if match else None for match in matches}
    folder = path if path.is_dir() else path.parent
    return (sets.pop() if len(sets) == 1 else None) or folder.resolve().name


def image_store(path: Path) -> ImageStore | None:
    """The images in shards or tables, by the names that `read` gives them; None if `path` holds neither."""
    layout = layout_of(path) if path.is_dir() or path.is_file() else None
    if layout in ("arrow", "hub"):
        return _table_images(path)
    if layout == "shards" and (path.is_dir() or _is_shard(path)):  # any other tar is a plain archive of images
        return _shard_images(path)
    return None


class PackedImages(ImageStore):
    """Images that lie beside their captions; messages name the sample or the row of each.

    known   name -> what its content is known by;  places  name -> what messages call it
    """

    def __init__(self, path: Path, known: dict[str, str], places: dict[str, str], read):
        super().__init__(path, known, read)
        self._places = places

    def where(self, member: str) -> str:
        return f"{member} ({self._places[member]})"


# ---- shards: reading -------------------------------------------------------------------------------------------------
class Sample(NamedTuple):
    """One pair of a shard: the name of the image, its encoded bytes, the caption, and what messages call it."""

    file: str
    image: bytes
    text: str
    place: str


def sample_of(parts: Mapping[str, bytes], key: str, shard: Path) -> Sample:
    """The pair in the parts of a sample. UserError if one is missing or its text is not readable.

    Without img_name, which few shards but PIR-CLIP's have, an image is named by its shard and key.
    """
    place = f"sample {key} of {shard.name}"
    image, caption = _part(parts, IMAGE), _part(parts, CAPTION)
    if not image or not caption:
        lacking = f"image ({', '.join(IMAGE)})" if not image else f"caption ({', '.join(CAPTION)})"
        raise UserError(f"The {place} has no {lacking}; write the shard again or remove the sample.")
    try:
        text = parts[caption].decode()
        if caption == "json":
            content = json.loads(text)
            text = content.get("caption") if isinstance(content, dict) else content
        file = parts[NAME].decode() if NAME in parts else f"{shard.stem}/{key}.{image}"
    except (ValueError, RecursionError) as error:
        raise UserError(f"The {place} holds no readable text ({error}); write the shard again in UTF-8.") from error
    if not isinstance(text, str):
        raise UserError(f"The {place} has no string 'caption' in its JSON; write the shard again.")
    return Sample(file, parts[image], text, place)


def _part(parts: Mapping, kinds: tuple[str, ...]) -> str | None:
    return next((kind for kind in kinds if kind in parts), None)


def shard_files(path: Path | str, split: str | None = None) -> list[Path]:
    """The shards at `path`, a tar or a folder of tars, by name; with `split`, those of it. UserError without one.

    A shard whose name tells no split is of train.
    """
    path = Path(path).expanduser().resolve()
    files = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
    files = [file for file in files if split in (None, _split(file))]
    if not files:
        raise UserError(f"{path} holds no shard{f' of {split}' if split else ''}; name a folder of tars, or write them "
                        "with `python -m nbhelpers data shards`.")
    return files


def sizes(files: list[Path]) -> dict[Path, int]:
    """How many samples each shard holds: from `sizes.json` beside it, which `write` makes, else counted in the shard."""
    listed: dict[Path, dict] = {}
    for folder in {file.parent for file in files}:
        try:
            listed[folder] = dict(json.loads((folder / "sizes.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            listed[folder] = {}
    counts = {file: listed[file.parent].get(file.name) for file in files}
    return {file: count if type(count) is int else sum(1 for _ in _samples(_members(file))) for file, count in counts.items()}


def _split(file: Path) -> str:
    match = _FILE.fullmatch(file.name)
    return _SPLITS.get(match["split"].lower(), match["split"].lower()) if match else "train"


def _samples(members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, {part: member}) of each sample."""
    named = [(match[1], match[2].lower(), member) for member in members if (match := _MEMBER.fullmatch(member.name))]
    for key, group in groupby(named, lambda part: part[0]):
        yield key, {part: member for _, part, member in group}


def _is_shard(path: Path) -> bool:
    """Whether the first sample of a tar has a part that only samples have, or an image with a caption."""
    try:
        with tarfile.open(path, mode="r:") as archive:
            _, parts = next(_samples(member for member, _ in zip(archive, range(8)) if member.isfile()), ("", {}))
    except (OSError, tarfile.TarError):
        return False
    return bool({IMAGE[0], CAPTION[0], NAME} & parts.keys()) or None not in (_part(parts, IMAGE), _part(parts, CAPTION))


def _members(shard: Path) -> list[tarfile.TarInfo]:
    """The files in a tar. UserError if it is cut off, or damaged anywhere between its members."""
    try:
        with tarfile.open(shard, mode="r:") as archive:
            members = [member for member in archive if member.isfile()]
            archive.fileobj.seek(archive.offset)
            end = archive.fileobj.read(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"The shard {shard} is damaged, cut off or compressed ({error}); fetch or write it again.") from error
    if end != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
        last = members[-1].name if members else "its beginning"
        raise UserError(f"The shard {shard} is damaged or cut off after {last}; fetch or write it again.")
    large = next((member for member in members if member.size > MAX_BYTES), None)
    if large:
        raise UserError(f"{large.name} in the shard {shard} has {large.size / 2**20:.0f} MB, more than the "
                        f"{MAX_BYTES // 2**20} MB that an image may have; remove it.")
    return members


def _described(shard: Path) -> Iterator[tuple[Sample, tarfile.TarInfo]]:
    """Each sample without its image, which the member beside it is."""
    samples = list(_samples(_members(shard)))
    with open(shard, "rb") as file:
        for key, members in samples:
            parts = {}
            for part, member in members.items():
                if part in (*CAPTION, NAME):
                    file.seek(member.offset_data)
                    parts[part] = file.read(member.size)
            image = _part(members, IMAGE)
            yield sample_of(parts | ({image: b""} if image else {}), key, shard), members.get(image)


def _read_shard(shard: Path, rows: Rows) -> None:
    for sample, _ in _described(shard):
        rows.add(sample.place, sample.file, _split(shard), [sample.text], once=False)


def _shard_images(path: Path) -> ImageStore:
    spots: dict[str, tuple[Path, int, int]] = {}
    known, places = {}, {}
    for shard in shard_files(path):
        changed = shard.stat().st_mtime_ns
        for sample, member in _described(shard):
            if sample.file not in spots:
                spots[sample.file], places[sample.file] = (shard, member.offset_data, member.size), sample.place
                known[sample.file] = f"{sample.place} {member.offset_data} {member.size} {changed}"
            elif spots[sample.file][2] != member.size:
                raise UserError(f"The {sample.place} and the {places[sample.file]} are both called {sample.file} but are not "
                                "the same image; write the shards again with a name for each image.")

    def read(name: str) -> bytes:
        shard, offset, size = spots[name]
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return PackedImages(path, known, places, read)


# ---- shards: writing -------------------------------------------------------------------------------------------------
def write(table: CaptionTable, store: ImageStore, folder: Path | str, splits: tuple[str, ...] = ("train",),
          size: int = 1000, seed: int = 0) -> dict[str, int]:
    """Writes `<set>-<split>-000000.tar`, ... and `sizes.json` into a new folder; returns shard name -> samples.

    One sample for each caption, its image as the encoded file; at most `size` samples or about 1 GiB a shard. Equal
    arguments give equal bytes. The captions of train stand in an order drawn from `seed`, since a reader shuffles only
    within its buffer, those of val and test as in the table. Of a scene class only what the file name tells is kept.
    UserError, and nothing written, if the folder is not empty or an image is missing, unreadable or without captions.
    """
    import webdataset  # here, because it imports torch, which reading does without

    folder = Path(folder).expanduser()
    if size < 1:
        raise UserError(f"The size of a shard is {size}; it must be at least 1 sample.")
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists already; name a new folder for the shards.")
    chosen = table.split(*splits)
    bare = chosen.images.image_id[~chosen.images.image_id.isin(chosen.captions.image_id)]
    if len(bare):
        raise UserError(f"{len(bare)} of the images have no captions (first: {bare.iloc[0]}); drop them.")
    for file in tqdm(chosen.images.file, desc="look at images", disable=None):
        store.read(file)
    if folder.exists():
        folder.rmdir()
    written: dict[str, int] = {}
    with atomic_folder(folder) as temporary:
        for split in splits:
            part = table.split(split)
            pattern = f"{str(temporary.resolve()).replace('%', '%%')}/{table.name}-{split}-%06d.tar"
            order = np.random.default_rng(seed).permutation(len(part.captions)) if split == "train" else range(len(part.captions))
            with webdataset.ShardWriter(pattern, maxcount=size, maxsize=MAX_SHARD, verbose=0, encoder=False, mtime=0,
                                        post=lambda name: written.update({Path(name).name: shards.count})) as shards:
                for number, sample in enumerate(_pairs(part, store, tqdm(order, desc=split, disable=None))):
                    shards.write({"__key__": f"{number:09d}", **sample})
        (temporary / "sizes.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return written


def _pairs(table: CaptionTable, store: ImageStore, order: Iterable[int]) -> Iterator[dict[str, bytes]]:
    files, texts = table.images.file.to_numpy()[table.owner()], table.captions.text.to_numpy()
    for row in order:
        yield {IMAGE[0]: store.encoded(files[row]), NAME: files[row].encode(),
               CAPTION[0]: UNPRINTABLE.sub(" ", texts[row]).encode()}


# ---- tables ----------------------------------------------------------------------------------------------------------
def _parquets(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))


def _tables(path: Path) -> list[Path]:
    """The tables of a folder, or the one file with those of the same set beside it."""
    if path.is_dir():
        return sorted(path.glob("*.arrow")) or _parquets(path)
    own = _FILE.fullmatch(path.name)
    beside = [(file, _FILE.fullmatch(file.name)) for file in sorted(path.parent.glob(f"*{path.suffix}"))] if own else []
    return [file for file, match in beside if match and match["set"] == own["set"]] or [path]


def _open_table(path: Path):
    """The pyarrow Table of a file: image (bytes), caption, image_id and, if the file says so, split. The bytes of an arrow file
    are mapped, those of a parquet file are in memory. UserError if it is damaged or lacks a column."""
    import pyarrow as pa

    hub = path.suffix.lower() == ".parquet"
    try:
        table = _hub_table(path) if hub else _arrow_table(path)
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        kind = "parquet" if hub else "arrow"
        raise UserError(f"{path} is not a readable {kind} table ({str(error).splitlines()[0]}); fetch it again.") from error
    lacking = [name for name in ("image", "caption", "image_id") if table.column_names.count(name) != 1]
    if lacking:
        raise UserError(f"{path} does not have one column {' and one '.join(lacking)} (its columns: "
                        f"{', '.join(table.column_names) or 'none'}); write image, caption and image_id.")
    kind = table.schema.field("image").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"The column image of {path} holds {kind}, not the bytes of image files; write the table again.")
    return table


def _arrow_table(path: Path):
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:  # the other of arrow's two forms
        mapped.seek(0)
        return pa.ipc.open_stream(mapped).read_all()


def _hub_table(path: Path):
    """A parquet table of the hub with its columns named as in ViLT's. A name is `filename`, or the path of the image."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns = {name: table[name] for name in table.column_names if name != "image" and table.column_names.count(name) == 1}
    if "captions" in columns:
        columns["caption"] = columns.pop("captions")
    if "image" in table.column_names:
        image = table["image"]
        fields = [field.name for field in image.type] if pa.types.is_struct(image.type) else []
        columns["image"] = pc.struct_field(image, "bytes") if "bytes" in fields else image
        names = columns.get("filename", pc.struct_field(image, "path") if "path" in fields else None)
        if names is not None:
            columns["image_id"] = names
    return pa.table(columns)


def _names(table) -> list[str | None]:
    return [None if image_id is None else str(image_id) for image_id in table["image_id"].to_pylist()]


def _read_table(path: Path, rows: Rows) -> None:
    table, match = _open_table(path), _FILE.fullmatch(path.name)
    if "split" not in table.column_names and not match:
        raise UserError(f"{path} has no column split, and its name tells none; call it like S_train.arrow.")
    splits = table["split"].to_pylist() if "split" in table.column_names else [_split(path)] * table.num_rows
    for row, (file, split, texts) in enumerate(zip(_names(table), splits, table["caption"].to_pylist())):
        alone = not isinstance(texts, list)
        rows.add(f"{path.name} row {row}", file, split, [texts] if alone else texts, once=not alone)


def _table_images(path: Path) -> ImageStore:
    spots, known, places = {}, {}, {}
    for file in _tables(path):
        table, changed = _open_table(file), file.stat().st_mtime_ns
        for row, name in enumerate(_names(table)):
            if name is not None and name not in spots:
                spots[name], places[name] = (table["image"], row), f"row {row} of {file.name}"
                known[name] = f"{places[name]} {file.stat().st_size} {changed}"

    def read(name: str) -> bytes:
        column, row = spots[name]
        return column[row].as_py() or b""

    return PackedImages(path, known, places, read)
