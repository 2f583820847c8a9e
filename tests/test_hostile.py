"""Damaged and hostile files end in a sentence: nothing crashes, hangs or escapes as another error.

`NBHELPERS_FUZZ=10000 pytest tests/test_hostile.py` tries more of them; `make fuzz` does that.
"""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nbhelpers.data import layouts
from nbhelpers.data.archives import open_images
from nbhelpers.data.decoding import decode
from nbhelpers.errors import LONGEST, UserError, printable
from nbhelpers.runs import commands
from nbhelpers.towers.checkpoints import meta_of, read_checkpoint

TRIES = int(os.environ.get("NBHELPERS_FUZZ", "300"))


def picture(kind: str = "PNG") -> bytes:
    """A small image file."""
    file = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(file, kind)
    return file.getvalue()


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.png", "folder/b.png"):
            archive.writestr(name, picture())


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("a.png", "b.png"):
            entry = tarfile.TarInfo(name)
            entry.size = len(picture())
            archive.addfile(entry, io.BytesIO(picture()))


def write_weights(path: Path) -> None:
    torch.save({"state_dict": {"w": torch.arange(64.0), "b": torch.ones(3)}, "epoch": 3}, path)


def write_old_weights(path: Path) -> None:
    torch.save({"w": torch.arange(64.0)}, path, _use_new_zipfile_serialization=False)


def write_table(path: Path) -> None:
    images = [{"bytes": picture(), "path": f"{n}.png"} for n in range(3)]
    captions = [["a red square", "a square"] for _ in images]
    pd.DataFrame({"image": images, "captions": captions}).to_parquet(path)


def write_rows(path: Path) -> None:
    rows = [{"image": f"{n}.png", "caption": ["a red square"], "split": "test"} for n in range(3)]
    path.write_text(json.dumps(rows))


def read_images(path: Path) -> None:
    store = open_images(path)
    for name in store.names:
        store.read(name)


def read_image(path: Path) -> None:
    decode(path.read_bytes(), path.name)


FILES = {
    "images.zip": (write_zip, read_images),
    "images.tar": (write_tar, read_images),
    "weights.pth": (write_weights, read_checkpoint),
    "old.pth": (write_old_weights, read_checkpoint),
    "weights.safetensors": (lambda path: save_file({"w": torch.ones(9)}, path), read_checkpoint),
    "set_test.parquet": (write_table, layouts.read),
    "rows_test.json": (write_rows, layouts.read),
    "table.csv": (lambda path: path.write_text("image,caption\na.png,a square\n"), layouts.read),
    "picture.png": (lambda path: path.write_bytes(picture()), read_image),
    "picture.tif": (lambda path: path.write_bytes(picture("TIFF")), read_image),
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Content with one to four changes: bytes, cuts, repeats, large numbers."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[place : place + rng.randint(1, 40)]
            case 2:
                changed[place:place] = changed[max(0, place - 30) : place]
            case 3:
                changed[place : place + 4] = rng.choice(
                    [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"]
                )
            case _:
                changed = changed[: max(place, 1)]
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(tmp_path, name):
    write, read = FILES[name]
    path = tmp_path / name
    write(path)
    read(path)
    content, rng = path.read_bytes(), random.Random(name)
    for number in range(TRIES // len(FILES)):
        path.write_bytes(damaged(content, rng))
        try:
            read(path)
        except UserError as error:
            assert "\n\n" not in str(error)
        except Exception as error:  # say which of the tries it was
            raise AssertionError(f"try {number} of {name} ended in {error!r}") from error


def test_a_zip_of_an_unknown_version_and_names_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "images.zip"
    write_zip(path)
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02")
    path.write_bytes(content[: at + 6] + b"\x63\x00" + content[at + 8 :])
    with pytest.raises(UserError, match="damaged zip"):
        open_images(path)
    utf8 = content[: at + 8] + b"\x00\x08" + content[at + 10 :]
    path.write_bytes(utf8[: at + 46] + b"\xff" + utf8[at + 47 :])
    with pytest.raises(UserError, match="damaged zip"):
        open_images(path)


def test_a_small_table_does_not_unfold_to_gigabytes(tmp_path):
    path = tmp_path / "bomb_test.parquet"
    text = "a red square " * 1000
    pd.DataFrame({"filename": "a.png", "captions": [text] * 60_000}).to_parquet(path)
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match="would unfold"):
        layouts.read(path)


def test_a_message_holds_no_control_characters_and_no_endless_names():
    assert str(UserError("a\x1b[2Jb \udcff")) == "a\\x1b[2Jb \\udcff"
    assert len(printable("x" * 100_000)) < LONGEST + 10
    assert printable("größer\nals 3 ± 1 · 東京") == "größer\nals 3 ± 1 · 東京"


@pytest.mark.parametrize("meta", ["[" * 5000, "null", "5", "{", ""])
def test_meta_data_that_is_no_dictionary_is_refused(meta):
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        meta_of({"meta": meta}, "model.safetensors")


def test_what_was_not_foreseen_is_one_sentence_and_a_file(monkeypatch, capsys):
    def fail(*_):
        raise ZeroDivisionError("in the depth")

    monkeypatch.setattr("nbhelpers.data.check.check", fail)
    assert commands.main(["data", "check", "--captions", __file__]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and "ZeroDivisionError: in the depth" in said
    details = next(
        Path(word) for word in said.split() if word.endswith(".txt,"[:-1]) or ".txt" in word
    )
    assert "in fail" in Path(str(details).rstrip(",;")).read_text()
