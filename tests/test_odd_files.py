"""What is no ordinary file, and what the operating system refuses, ends in a sentence.

Each command meets pipes, devices, links in a circle, endless names, empty files and the like.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from nbhelpers import files
from nbhelpers.data import layouts
from nbhelpers.data.archives import open_images
from nbhelpers.data.arrow_sizes import unfolded_size
from nbhelpers.data.decoding import decode
from nbhelpers.errors import SYSTEM, UserError, of_system
from nbhelpers.runs.commands import main

SECONDS = 20
TRIES = 200 if os.environ.get("NBHELPERS_FUZZ") else 8  # of all odd paths, for each command
ENDINGS = ("json", "csv", "parquet", "arrow", "zip", "tar", "pth", "safetensors", "yaml", "txt")
CONTENTS = {
    "empty": b"",
    "three": b"\xff\xfe\x00",
    "short": b"a,b",
    "deep": b"[" * 100_000,
    "nested": b'{"a":' * 100_000,
    "digits": b'[{"image": "a.png", "caption": "x", "split": "test", "n": ' + b"9" * 5000 + b"}]",
    "nan": b'[{"image": NaN, "caption": Infinity, "split": "test"}]',
}


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """End a test that hangs."""

    def give_up(*_):
        raise TimeoutError(f"nothing came for {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A small set that is right."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "images").mkdir()
    rows = []
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(folder / f"images/{number}.png")
        rows.append(f"{number}.png,a red square {number},test\n")
    (folder / "captions.csv").write_text("image,caption,split\n" + "".join(rows))
    captions = {str(number): "a red square" for number in range(4)}
    (folder / "generated.json").write_text(json.dumps({"captions": captions}))
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> list[str]:
    """Paths that are no good input."""
    folder = tmp_path_factory.mktemp("odd")
    found = ["/dev/zero", "/dev/urandom", "/dev/null", "/proc/self/mem", "\0", "a\x1b[2J", "-"]
    found += ["~nobody/x", str(folder / ("n" * 300)), str(folder / ("a/" * 200))]
    for name in ("pipe", "pipe.json", "pipe.csv", "pipe.zip", "pipe.pth", "pipe_test.parquet"):
        os.mkfifo(folder / name)
        found.append(str(folder / name))
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "names").mkdir()
    with open(os.fsencode(folder / "names") + b"/\xff\xfe.png", "wb") as file:
        file.write(b"no image")
    found += [str(folder / "circle"), str(folder / "names"), str(folder / "nowhere")]
    for ending in ENDINGS:
        (folder / f"folder_test.{ending}").mkdir()
        found.append(str(folder / f"folder_test.{ending}"))
        for name, content in CONTENTS.items():
            (folder / f"{name}_test.{ending}").write_bytes(content)
            found.append(str(folder / f"{name}_test.{ending}"))
    return found


COMMANDS: dict[str, Callable[[str, Path, Path], list[str]]] = {
    "captions": lambda odd, good, out: ["data", "check", "--captions", odd],
    "images": lambda odd, good, out: [
        *("data", "check", "--captions", str(good / "captions.csv"), "--images", odd)
    ],
    "shards": lambda odd, good, out: [
        *("data", "shards", "--captions", odd, "--images", odd, "--out", str(out / "shards"))
    ],
    "prepare": lambda odd, good, out: ["data", "prepare", "--set", "mine", "--data", odd],
    "audit": lambda odd, good, out: ["data", "audit", "--test", odd, "--train", odd],
    "score": lambda odd, good, out: [
        *("score", "--captions", odd, "--references", str(good / "captions.csv"))
    ],
    "references": lambda odd, good, out: [
        *("score", "--captions", str(good / "generated.json"), "--references", odd)
    ],
    "weights": lambda odd, good, out: ["weights", "heads", odd, str(out / "small.safetensors")],
    "records": lambda odd, good, out: ["records", "check", odd],
    "table": lambda odd, good, out: ["records", "table", odd],
    "merge": lambda odd, good, out: ["records", "merge", odd, "--out", str(out / "merged")],
    "profile": lambda odd, good, out: ["run", "--profile", odd],
    "train": lambda odd, good, out: ["train", "--system", "pir", "--profile", odd],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_files_end_in_a_sentence(command, odd, good, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    always = [path for path in odd if path.startswith("/dev") or "/pipe" in path]
    others = [path for path in odd if path not in always]
    for path in [*always, *random.Random(command).sample(others, min(TRIES, len(others)))]:
        signal.alarm(SECONDS)
        code = main(COMMANDS[command](path, good, tmp_path))
        said = capsys.readouterr()
        assert code in (0, 1, 2), path
        assert "Traceback" not in said.err and "not foreseen" not in said.err, (path, said.err)
        assert all(letter.isprintable() or letter in "\n\t" for letter in said.out + said.err)
        assert code == 0 or said.err or "problem" in said.out, path
    written = {path.name for path in tmp_path.iterdir()}
    assert written <= {"runs"}, "nothing is half-written"


def test_a_pipe_is_refused_and_the_advice_works(tmp_path, good):
    os.mkfifo(pipe := tmp_path / "set_test.csv")
    with pytest.raises(UserError, match="is a device or a pipe, .* copy what it gives into a file"):
        layouts.read(pipe)
    pipe.unlink()
    pipe.write_bytes((good / "captions.csv").read_bytes())
    assert len(layouts.read(pipe)) == 4


@pytest.mark.parametrize("number", [*SYSTEM, errno.ENODEV])
def test_what_the_system_refuses_is_a_sentence(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    sentence = str(of_system(OSError(number, os.strerror(number)), tmp_path / "record.json"))
    assert sentence.endswith(".") and sentence.count(str(tmp_path / "record.json")) == 1
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError) as error, files.atomic_write(tmp_path / "record.json") as path:
        path.write_text("x")
    assert str(error.value) == sentence
    assert not list(tmp_path.iterdir()), "nothing is half-written"


def test_an_error_of_the_system_in_a_command_is_a_sentence(monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system", "/mnt/runs")

    monkeypatch.setattr("nbhelpers.data.check.check", refuse)
    assert main(["data", "check", "--captions", __file__]) == 1
    assert capsys.readouterr().err == (
        "/mnt/runs lies on a file system that can only be read; choose a folder elsewhere.\n"
    )


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff", b"{", b""])
def test_json_that_is_none_is_a_sentence(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x.json is not JSON \(.*\); get it again\.$"):
        files.read_json(path, "get it again")


def test_a_folder_that_may_not_be_listed_does_not_look_empty(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(["records", "check", str(tmp_path)]) == 1
    assert "may not be read or written by this user; choose one" in capsys.readouterr().err


# arrow


def table_of(texts: list[str]) -> pa.Table:
    names = pa.array(["a.png"] * len(texts)).dictionary_encode()
    return pa.table({"filename": names, "captions": texts})


def write_arrow(path: Path, table: pa.Table, compression: str | None, stream: bool) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    writer = pa.ipc.new_stream if stream else pa.ipc.new_file
    with writer(str(path), table.schema, options=options) as file:
        file.write_table(table, max_chunksize=300)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_the_unfolded_size_of_an_arrow_file_is_known_before_it_is_read(
    compression, stream, tmp_path
):
    path, table = tmp_path / "set_test.arrow", table_of(["a red square " * 100] * 1000)
    write_arrow(path, table, compression, stream)
    with pa.memory_map(str(path)) as file:
        assert unfolded_size(file) == pytest.approx(table.nbytes, rel=0.01)
    assert len(layouts.read(path)) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_small_arrow_file_does_not_unfold_to_gigabytes(stream, tmp_path):
    path = tmp_path / "bomb_test.arrow"
    write_arrow(path, table_of(["a red square " * 10**6] * 30), "zstd", stream)
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match="would unfold to more than"):
        layouts.read(path)


def test_an_image_that_is_another_format_starts_no_program(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    with pytest.raises(UserError):
        decode(eps, "picture.png")


def test_a_file_of_zeros_is_no_tar_and_is_not_unpacked(tmp_path):
    path = tmp_path / "images.tar"
    with open(path, "wb") as file:
        file.truncate(3 * 10**9)  # takes no space on the disk
    signal.alarm(SECONDS)
    with pytest.raises(UserError, match="neither a folder nor a readable zip or tar|holds no im"):
        open_images(path)


def test_a_compressed_tar_is_refused_and_the_advice_works(tmp_path, good):
    path = tmp_path / "images.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(good / "images", "images")
    with pytest.raises(UserError, match="a compressed or damaged tar .* unpack it first"):
        open_images(path)
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert len(open_images(tmp_path / "unpacked").names) == 4


LONG = pa.array(["a red square " * 10**5, "a square"])


@pytest.mark.parametrize(
    "column",
    [
        pa.nulls(2**27),
        pa.DictionaryArray.from_arrays(
            pa.array([0] * 10**6, pa.int32()), ["a red square " * 10**5]
        ),
    ],
    ids=["nulls", "dictionary"],
)
def test_rows_that_take_no_bytes_are_counted(column, tmp_path):
    path = tmp_path / "bomb_test.arrow"
    table = pa.table({"captions": column, "filename": column})
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)
    with pytest.raises(UserError, match="would unfold to more than"):
        layouts.read(path)
