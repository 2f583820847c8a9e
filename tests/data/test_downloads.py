"""A set is fetched from a stand-in of the hub or of a host: licence first, resumed, and checked.

It was not tried against the real hub.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stand_in import Host, environment, serving
from PIL import Image

ROOT = Path(__file__).parents[2]


def parquet(split: str, images: int) -> bytes:
    """A table as `datasets` writes it, with its images inside."""
    random, rows = np.random.default_rng(len(split)), []
    for number in range(images):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        image = {"bytes": file.getvalue(), "path": f"{split}_{number}.png"}
        texts = [f"{split} view {number} no {n}" for n in range(5)]
        rows.append({"filename": image["path"], "captions": texts, "image": image})
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.fixture
def host():
    tables = {
        "train": parquet("train", 6),
        "valid": parquet("valid", 2),
        "test": parquet("test", 3),
    }
    Host.files = {f"data/{split}-00000-of-00001.parquet": t for split, t in tables.items()}
    with serving():
        yield f"http://127.0.0.1:{Host.port}"


def get(host: str, tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    own = environment(host, tmp_path / "home")
    command = [sys.executable, "-m", "nbhelpers", "data", "get", *words]
    return subprocess.run(
        command, env=os.environ | own, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_a_mirror_is_fetched_once_its_licence_is_accepted(host, tmp_path):
    words = ["rsicd", "--mirror", "me/mirror", "--out", str(tmp_path / "sets")]
    shown = get(host, tmp_path, *words)
    assert shown.returncode == 1 and "read the licences, then add --yes" in shown.stderr
    assert "licence of the images: research only" in shown.stdout
    assert "licence that the mirror states: cc-by-4.0" in shown.stdout
    size = sum(map(len, Host.files.values()))
    assert f"files: 3, {size / 1e6:.1f} MB" in shown.stdout
    assert not Host.asked and not (tmp_path / "sets").exists()
    done = get(host, tmp_path, *words, "--yes")
    assert "layout      hub" in done.stdout, done.stdout + done.stderr
    assert re.search(r"11 images|images\s+11", done.stdout), done.stdout
    folder = tmp_path / "sets" / "rsicd" / "data"
    assert {path.read_bytes() for path in folder.iterdir()} == set(Host.files.values())
    assert done.returncode == 1 and "has 10921 images but 11 were found" in done.stderr
    assert "Next:" not in done.stdout


def test_a_mirror_that_breaks_off_is_resumed(host, tmp_path):
    words = ["town", "--mirror", "me/mirror", "--out", str(tmp_path / "sets"), "--yes"]
    Host.files["more.bin"] = os.urandom(24 * 2**20)  # the hub's client writes 10 MiB at once
    Host.cut = "more.bin"
    get(host, tmp_path, *words)
    done = get(host, tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    ranges = [asked for name, asked in Host.asked if name == "more.bin"]
    assert any(ranges), "the second answer begins where the first one stopped"
    whole = tmp_path / "sets" / "town" / "more.bin"
    assert whole.read_bytes() == Host.files["more.bin"]
    next_step = done.stdout.split("Next: python -m nbhelpers ")[1].split()
    assert next_step[:4] == ["data", "prepare", "--set", "town"]
    own = {"NBHELPERS_RUNS": str(tmp_path / "runs")}
    advice = [sys.executable, "-m", "nbhelpers", *next_step]
    followed = subprocess.run(
        advice, env=os.environ | own, cwd=ROOT, capture_output=True, text=True
    )
    assert followed.returncode == 0 and "decoded images" in followed.stdout, followed.stderr


def test_files_of_a_host_are_fetched_and_resumed(host, tmp_path):
    captions = "".join(f"{n}.png,view {n},{s}\n" for n, s in enumerate(["train", "test"] * 3))
    Host.files = {"town.csv": b"image,caption,split\n" + captions.encode()}
    Host.files["town_images.zip"] = images_zip()
    Host.cut = "town_images.zip"
    urls = [f"{host}/plain/{name}" for name in Host.files]
    words = ["town", "--url", *urls, "--out", str(tmp_path), "--yes"]
    broken = get(host, tmp_path, *words)
    assert broken.returncode == 1 and "run the command again" in broken.stderr
    assert (tmp_path / "town" / "town_images.zip.part").exists()
    done = get(host, tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "town" / "town_images.zip").read_bytes() == Host.files["town_images.zip"]
    assert [asked for name, asked in Host.asked if name.endswith("zip")][1].startswith("bytes=")
    assert [name for name, _ in Host.asked].count("town.csv") == 1


def images_zip() -> bytes:
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(6):
            file = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            archive.writestr(f"{number}.png", file.getvalue())
    return out.getvalue()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ucm"], "No mirror of 'ucm' is known; its captions are at https://github.com"),
        (["moon"], "known sets are ucm, rsicd"),
        (["moon", "--mirror", "me/nothing"], "me/nothing cannot be fetched"),
        (["moon", "--url", "ftp://host/file.zip"], "is no address of a file"),
        (["moon", "--url", "HOST/plain/none.zip"], "none.zip cannot be fetched"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(host, tmp_path, words, says):
    words = [word.replace("HOST", host) for word in words]
    done = get(host, tmp_path, *words, "--out", str(tmp_path / "sets"), "--yes")
    assert done.returncode == 1 and says in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "sets").exists()
