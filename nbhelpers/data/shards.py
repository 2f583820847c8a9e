"""Read and write images with their captions: WebDataset shards, and the tables of `tables`.

A shard is a tar of samples, whose members share a key, the path up to the first dot of the name:

    000123.img_content, 000123.caption, 000123.img_name      PIR-CLIP's, a caption each
    000123.jpg, 000123.txt or 000123.json                    RS5M's and others'

Set and split are in the name, as in `S-train-000000.tar`, or the split is in that of the folder. A
text may hold several captions, as lines or as a list in JSON. The members of a sample need not
follow each other.

`streaming` trains from shards without unpacking them. Importing this module does not import torch.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nbhelpers.data import packed, tables
from nbhelpers.data.images import MAX_BYTES, ImageStore, checksum
from nbhelpers.data.packed import Entry, PackedImages
from nbhelpers.data.reading import (
    CAPTION_FIELDS,
    captions_in,
    decode_text,
    first_field,
    parse_json,
    sentence,
)
from nbhelpers.data.rows import UNPRINTABLE, Rows
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_folder

IMAGE = ("img_content", "jpg", "jpeg", "png", "tif", "tiff", "bmp", "webp", "gif")  # by preference
CAPTION = ("caption", "txt", "json")
NAME = "img_name"
MAX_SHARD = 2**30  # bytes of samples after which a new shard begins

_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # key and part, divided as webdataset does
_ABOUT = {"readme", "license", "licence", "citation", "dataset_info", "dataset_infos", "sizes"}


def layout_of(path: Path) -> str | None:
    """Return "shards", "arrow" or "hub" for such a file or a folder of them, else None."""
    if path.is_dir():
        if any(map(_is_shard, packed.files_in(path, ".tar"))):
            return "shards"
        files = tables.table_files(path)
        return tables.LAYOUT_OF[files[0].suffix.lower()] if files else None
    return ({".tar": "shards"} | tables.LAYOUT_OF).get(path.suffix.lower())


def read(path: Path, rows: Rows) -> str:
    """Add the images and captions at `path` to `rows`; return the name of the set.

    `path` is a shard or a folder of shards, or a table, whose other splits are read with it, or
    their folder. UserError, with shard and sample or table and column, if something is unreadable.
    """
    packed.add_entries(_entries(path, rows.notes), rows)
    return packed.set_name(_files(path), path if path.is_dir() else path.parent)


def image_store(path: Path) -> ImageStore | None:
    """Open the images in shards or tables by the names that `read` gives them; else None."""
    layout = layout_of(path) if path.is_dir() or path.is_file() else None
    if layout is None or layout == "shards" and path.is_file() and not _is_shard(path):
        return None  # any other tar is a plain archive of images
    if layout != "shards":
        for file in _files(path):
            tables.refuse_without_images(file)
    return PackedImages(path, _entries(path, []))


def _files(path: Path) -> list[Path]:
    return shard_files(path) if layout_of(path) == "shards" else tables.table_files(path)


def _entries(path: Path, notes: list[str]) -> list[Entry]:
    entries: list[Entry] = []
    for file in _files(path):
        read_file = _shard_entries if file.suffix.lower() == ".tar" else tables.read_entries
        entries += read_file(file, notes)
    return entries


class Sample(NamedTuple):
    """Hold a sample of a shard.

    file   the name of its image
    image  the encoded image
    texts  each with one or several captions
    place  its name in messages
    """

    file: str
    image: bytes
    texts: list[str]
    place: str

    def captions(self) -> list[str]:
        """Split the texts into captions. UserError if there are none."""
        try:
            found = list(chain.from_iterable(map(captions_in, self.texts)))
        except ValueError:
            found = []
        if not found:
            raise UserError(
                f"The {self.place} begins a list of captions but holds none; write one "
                "caption, one a line, or a list in JSON."
            )
        return found


def sample_of(parts: Mapping[str, bytes], key: str, shard: Path, notes: list[str]) -> Sample:
    """Make a sample of the parts of a key. UserError if one is missing or a text is unreadable.

    An image without img_name (only PIR-CLIP's shards have it) is named after its shard and key.
    """
    place = f"sample {key} of {shard.name}"
    image, caption, name = (_first(parts, kinds) for kinds in (IMAGE, CAPTION, (NAME,)))
    if not image or not caption:
        kind, kinds = ("caption", CAPTION) if image else ("image", IMAGE)
        raise UserError(
            f"The {place} has no {kind} ({', '.join(kinds)}); write the shard again or "
            "remove the sample."
        )
    texts = [decode_text(parts[caption], f"the {caption} of {place}", notes)]
    if caption.endswith("json"):
        texts = _json_texts(texts[0], place)
    file = f"{shard.stem}/{key}.{image}"
    if name:
        file = decode_text(parts[name], f"the {name} of {place}", notes).strip()
    return Sample(file, parts[image], texts, place)


def _json_texts(text: str, place: str) -> list[str]:
    content = parse_json(text, f"The JSON of {place}")
    if isinstance(content, dict):
        content = content.get(first_field(content, CAPTION_FIELDS))
    texts = [sentence(one) for one in (content if isinstance(content, list) else [content])]
    if not texts or not all(isinstance(one, str) for one in texts):
        raise UserError(
            f"The JSON of {place} has no text or list of texts called "
            f"{', '.join(CAPTION_FIELDS[:-1])} or {CAPTION_FIELDS[-1]}; write one "
            "there or as .txt."
        )
    return texts


def _named(parts: Iterable[str], kinds: tuple[str, ...]) -> list[str]:
    """List the part of the first such kind; else all that end in one, as `input.jpg`."""
    if plain := [kind for kind in kinds if kind in parts]:
        return plain[:1]
    dotted = [part for part in parts if _kind(part) in kinds]
    return sorted(dotted, key=lambda part: kinds.index(_kind(part)))


def _kind(part: str) -> str:
    return part.rpartition(".")[2]


def _first(parts: Iterable[str], kinds: tuple[str, ...]) -> str | None:
    return next(iter(_named(parts, kinds)), None)


def shard_files(path: Path | str, split: str | None = None) -> list[Path]:
    """List the shards at `path`, a tar or a folder of tars, by name; with `split`, those of it.

    The split is in the name of a shard, or else of its folder; if in neither, it is train.
    UserError if there is none.
    """
    path = Path(path).expanduser().resolve()
    files = packed.files_in(path, ".tar") if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and split in (None, _split(file))]
    if not files:
        of_split = f" of {split}" if split else ""
        raise UserError(
            f"{path} holds no shard{of_split}; name a folder of tars, or write them "
            "with `python -m nbhelpers data shards`."
        )
    return files


def sizes(files: list[Path]) -> dict[Path, int]:
    """Count the samples of each shard; `sizes.json` beside it, from `write`, saves the reading."""
    listed: dict[Path, dict] = {}
    for folder in {file.parent for file in files}:
        try:
            listed[folder] = dict(json.loads((folder / "sizes.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            listed[folder] = {}
    counts = {file: listed[file.parent].get(file.name) for file in files}
    return {
        file: count if type(count) is int else len(_index(file, []))
        for file, count in counts.items()
    }


def samples(shard: Path, notes: list[str]) -> Iterator[tuple[Sample, tarfile.TarInfo]]:
    """Yield each sample of a shard, and the member that is its image.

    UserError as `sample_of`, and if the shard is damaged.
    """
    index = _index(shard, notes)
    odd: list[str] = []
    with open(shard, "rb") as file:
        for key, members in index:
            parts = {part: _content(file, member) for part, member in members.items()}
            yield sample_of(parts, key, shard, odd), members[_named(members, IMAGE)[0]]
    if odd:
        notes.append(f"{len(odd)} texts in {shard.name}: {odd[0]}")


def not_shards(folder: Path) -> str:
    """Say why the tars in a folder are no shards; "" if there are none."""
    for file in packed.files_in(folder, ".tar"):
        return (
            f" {file.name} is no shard, since no key in it has both an image "
            f"({', '.join(IMAGE)}) and a caption ({', '.join(CAPTION)})."
        )
    for file in packed.files_in(folder, ".gz") + packed.files_in(folder, ".tgz"):
        return f" If {file.name} is a shard, unpack it to {file.name.partition('.')[0]}.tar."
    return ""


def _split(file: Path) -> str:
    return packed.split_by_name(file) or "train"


def _key_and_part(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """None for what is no part of a sample: folders, hidden files, and webdataset's `__names__`."""
    name = member.name.removeprefix("./")
    match = _MEMBER.fullmatch(name)
    if not match or not member.isfile() or re.match(r"__[^/]*__($|/)", name):
        return None
    return match[1], match[2].lower()


def _is_shard(path: Path) -> bool:
    """Whether a tar has a part that only samples have, or an image and a caption of one key."""
    seen: dict[str, set[str]] = {}
    try:
        with tarfile.open(path, mode="r:") as archive:
            for key, part in filter(None, map(_key_and_part, archive)):
                parts = seen.setdefault(key, set())
                parts.add(part)
                if part in (IMAGE[0], CAPTION[0], NAME):
                    return True
                if _named(parts, IMAGE) and _named(parts, CAPTION):
                    return True
    except (OSError, tarfile.TarError):
        pass
    return False


def _index(shard: Path, notes: list[str]) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    """List (key, {part: member}) of each sample, in the order of their first members.

    Members about the whole set are left out and noted. UserError if the shard is damaged
    or a sample has several images.
    """
    found = []
    about: list[str] = []
    groups = _grouped(_members(shard))
    with open(shard, "rb") as file:
        for key, parts in groups:
            if _is_about_the_set(key, parts, file):
                about += [member.name for member in parts.values()]
            else:
                found += _divided(key, parts, shard)
    if about:
        notes.append(
            f"{len(about)} members of {shard.name} belong to no sample and were not read "
            f"(first: {about[0]})."
        )
    return found


def _grouped(members: list[tarfile.TarInfo]) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The members by key, wherever they stand; a part that comes again begins another sample."""
    groups = []
    latest: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        if named := _key_and_part(member):
            key, part = named
            if key not in latest or part in latest[key]:
                latest[key] = {}
                groups.append((key, latest[key]))
            latest[key][part] = member
    return groups


def _is_about_the_set(key: str, parts: dict[str, tarfile.TarInfo], file) -> bool:
    """Whether parts without an image are no sample: by their name, or as they hold no caption."""
    if NAME in parts or _named(parts, IMAGE):
        return False
    caption = _first(parts, CAPTION)
    if caption is None or key.rpartition("/")[2].lower() in _ABOUT:
        return True
    if not caption.endswith("json"):
        return False
    try:
        content = json.loads(_content(file, parts[caption]))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and not set(CAPTION_FIELDS) & set(content)


def _divided(
    key: str, parts: dict[str, tarfile.TarInfo], shard: Path
) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The parts as one sample; as several, divided at the last dot, where names hold more dots.

    UserError if there are several images or captions, but not one of both in each.
    """
    captions = [_kind(part) for part in _named(parts, CAPTION)]
    if len(_named(parts, IMAGE)) < 2 and len(captions) == len(set(captions)):
        return [(key, parts)]
    inner: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
    for part, member in parts.items():
        middle, _, kind = part.rpartition(".")
        inner[f"{key}.{middle}" if middle else key][kind] = member
    if not all(_named(own, IMAGE) and _named(own, CAPTION) for own in inner.values()):
        raise UserError(
            f"The sample {key} of {shard.name} has several images or captions "
            f"({', '.join(parts)}), since a key ends at the first dot; write one of "
            f"both under each key, as {key}_1.jpg and {key}_1.txt."
        )
    return list(inner.items())


def _content(file, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _members(shard: Path) -> list[tarfile.TarInfo]:
    """The files in a tar. UserError if it is cut off, or damaged anywhere between its members."""
    try:
        with tarfile.open(shard, mode="r:") as archive:
            members = [member for member in archive if member.isfile()]
            end_of_members = archive.offset
        with open(shard, "rb") as file:
            file.seek(end_of_members)
            end = file.read(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"The shard {shard} is damaged, cut off or compressed ({error}); fetch or write it"
            " again."
        ) from error
    if end != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
        last = members[-1].name if members else "its beginning"
        raise UserError(
            f"The shard {shard} is damaged or cut off after {last}; fetch or write it again."
        )
    large = next((member for member in members if member.size > MAX_BYTES), None)
    if large:
        raise UserError(
            f"{large.name} in the shard {shard} has {large.size / 2**20:.0f} MB, more than the "
            f"{MAX_BYTES // 2**20} MB that an image may have; remove it."
        )
    return members


def _shard_entries(shard: Path, notes: list[str]) -> Iterator[Entry]:
    for sample, member in samples(shard, notes):
        read = partial(_read_image, shard, member)
        yield Entry(
            sample.place, sample.file, _split(shard), sample.texts, checksum(sample.image), read
        )


def _read_image(shard: Path, member: tarfile.TarInfo) -> bytes:
    with open(shard, "rb") as file:
        return _content(file, member)


def write(
    table: CaptionTable,
    store: ImageStore,
    folder: Path | str,
    splits: tuple[str, ...] = ("train",),
    size: int = 1000,
    seed: int = 0,
) -> dict[str, int]:
    """Write shards and `sizes.json` into a new folder; return shard name -> number of samples.

    Shards are called `<set>-<split>-000000.tar` and so on. Each caption is a sample with the
    encoded file of its image. A shard has at most `size` samples or about 1 GiB. Equal arguments
    give equal bytes. The captions of train are in an order drawn from `seed`, since a reader
    shuffles only within its buffer; those of val and test are in the order of the table. Scene
    classes are kept only in file names. UserError, and nothing written, if the folder is not empty
    or an image is missing, unreadable or without captions.
    """
    folder = Path(folder).expanduser()
    if size < 1:
        raise UserError(f"The size of a shard is {size}; it must be at least 1 sample.")
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists already; name a new folder for the shards.")
    chosen = table.split(*splits)
    chosen.refuse_bare()
    members = store.members(chosen.images.file, table.images.file)
    for member in tqdm(members, desc="look at images", disable=None):
        store.read(member)
    member_of = dict(zip(chosen.images.file, members, strict=True))
    if folder.exists():
        folder.rmdir()
    written: dict[str, int] = {}
    with atomic_folder(folder) as temporary:
        for split in splits:
            part = table.split(split)
            order = np.arange(len(part.captions))
            if split == "train":
                order = np.random.default_rng(seed).permutation(len(order))
            samples = _pairs(part, store, member_of, tqdm(order, desc=split, disable=None))
            written |= _write_samples(samples, temporary.resolve() / f"{table.name}-{split}", size)
        text = json.dumps(written, indent=1)
        (temporary / "sizes.json").write_text(f"{text}\n", encoding="utf-8")
    return written


def _write_samples(samples: Iterable[dict[str, bytes]], begin: Path, size: int) -> dict[str, int]:
    """Write `<begin>-000000.tar` and so on; return shard name -> number of samples."""
    import webdataset  # here, because it imports torch, which reading does not need

    written: dict[str, int] = {}
    writer: webdataset.ShardWriter = webdataset.ShardWriter(
        f"{str(begin).replace('%', '%%')}-%06d.tar",
        maxcount=size,
        maxsize=MAX_SHARD,
        verbose=0,
        encoder=False,
        mtime=0,
        post=lambda name: written.update({Path(name).name: writer.count}),
    )
    with writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:09d}", **sample})
    return written


def _pairs(
    table: CaptionTable, store: ImageStore, member_of: Mapping[str, str], order: Iterable[int]
) -> Iterator[dict[str, bytes]]:
    files, texts = table.images.file.to_numpy()[table.owner()], table.captions.text.to_numpy()
    for row in order:
        yield {
            IMAGE[0]: store.encoded(member_of[files[row]]),
            NAME: files[row].encode(),
            CAPTION[0]: UNPRINTABLE.sub(" ", texts[row]).encode(),
        }
