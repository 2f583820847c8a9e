"""What a notebook of the chain was made of, by content: its cells, the package, and files it reads.

Names, sizes and times do not stand for content: all bytes are read, about a second for a gigabyte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nbhelpers.code_identity import text_digest
from nbhelpers.errors import UserError

NOT_FOR_NOTEBOOKS = {
    "app.py",
    "audit_command.py",
    "batch.py",
    "stored_notebooks.py",
    "cache.py",
    "hub.py",
    "commands.py",
    "data_commands.py",
    "record_commands.py",
    "system_commands.py",
    "train_command.py",
    "weight_commands.py",
    "options.py",
    "needs.py",
    "needs_command.py",
    "own_profile.py",
    "plain_display.py",
    "rehearsal.py",
    "__main__.py",
    "README.md",
}
SUFFIXES = (".py", ".md", ".css")
PATHS = ("CHECKPOINT", "SHARDS", "CLIP", "VILT", "INSTRUCTION")  # parameters that may name a file


def sources() -> list[Path]:
    """The package's files that a notebook may use."""
    found = [path for path in Path(__file__).parents[1].rglob("*") if path.suffix in SUFFIXES]
    return sorted(path for path in found if path.name not in NOT_FOR_NOTEBOOKS)


def package() -> str:
    """Digest of the package: of modules what they compute, without comments and docstrings."""
    return digest_of([(path.name, _code(path.read_text("utf-8"))) for path in sources()])


def cells(notebook: Path) -> str:
    """Digest of a notebook's code cells, as of the package's modules. Its text does not count."""
    import nbformat  # slow to import

    found = nbformat.read(notebook, as_version=4).cells
    return digest_of([_code(cell.source) for cell in found if cell.cell_type == "code"])


def _code(text: str) -> str:
    """Digest of what a text computes; what is no Python counts as it is written."""
    try:
        return text_digest(text)
    except UserError:
        return text


def files(values: Mapping[str, Any], here: Path, patterns: Iterable[str] = ()) -> list[Path]:
    """Files and folders that a notebook with these values reads from outside its run.

    here      folder that relative paths start from
    patterns  of further files in DATA
    """
    paths = [values[name] for name in PATHS if values.get(name)]
    paths += values.get("WEIGHTS", {}).values()
    named = [here / Path(path).expanduser() for path in paths]
    found = [path for path in named if path.exists()]
    if values.get("DATA"):
        folder = here / Path(values["DATA"]).expanduser()
        sets = values.get("PRETRAIN_SETS", []) + values.get("CAPTION_SETS", [])
        for name in {values.get("SET", "scenes"), *sets}:
            found += _of_set(name, folder)
        for pattern in patterns:
            found += folder.glob(pattern)
    return sorted(set(found))


def _of_set(name: str, folder: Path) -> list[Path]:
    """What lies in DATA under a set's name, or all of a folder that has this name itself.

    More than `catalog.find` takes: also the other files of a layout of several.
    """
    word = re.compile(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])")
    if word.search(folder.resolve().name.lower()):
        return [folder]
    return [path for path in folder.iterdir() if word.search(path.name.lower())]


def digest(path: Path) -> str:
    """Digest of a file, or of all files of a folder and their names."""
    if path.is_dir():
        inside = sorted(_inside(path))
        return digest_of([(str(file.relative_to(path)), digest(file)) for file in inside])
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error


def _inside(folder: Path) -> Iterator[Path]:
    """The regular files of a folder and of those in it, also behind links; each folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(f"{place}/{name}") not in seen]
        yield from filter(Path.is_file, (Path(place) / name for name in names))


def digest_of(content: Any) -> str:
    """Digest of anything that JSON can write."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
