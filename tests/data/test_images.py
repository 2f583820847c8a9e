"""Folders and archives of images, and the decoded cache."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_decoding import RGB, file_of, tiff

from nbhelpers.data import archives, pixel_cache
from nbhelpers.data.archives import open_images
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.errors import UserError

RNG = np.random.default_rng(0)


# ---- stores
def put_folder(path, files: dict[str, bytes]):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def put_zip(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def put_tar(path, files: dict[str, bytes], mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


STORES = {"folder": put_folder, "zip": put_zip, "tar": put_tar}


@pytest.fixture(params=STORES)
def store_of(request, tmp_path):
    (tmp_path / "store").mkdir()
    target = (
        tmp_path / "store" if request.param == "folder" else tmp_path / f"store.{request.param}"
    )
    return lambda files: open_images(STORES[request.param](target, files))


def test_a_store_lists_images_only_and_reads_them(store_of):
    others = {"readme.txt": b"x", "__MACOSX/._a.png": b"x"}
    store = store_of({"train/a.png": file_of(RGB), "b.TIF": tiff(RGB), **others})
    assert store.names == ["b.TIF", "train/a.png"]
    for name in store.names:
        np.testing.assert_array_equal(store.read(name), RGB)


def test_listed_files_are_found_by_path_then_by_stem(store_of):
    names = [
        "imgs/1.jpg",
        "imgs/airport/7.jpg",
        "imgs/beach/7.jpg",
        "imgs/beach/8.jpg",
        "imgs/beach/8.png",
        "2.png",
    ]
    store = store_of(dict.fromkeys(names, file_of(RGB)))
    found = {
        "imgs/1.jpg": "imgs/1.jpg",
        "1.tif": "imgs/1.jpg",
        "2.PNG": "2.png",
        "Beach/7.tif": "imgs/beach/7.jpg",
        "train/airport/7.jpg": "imgs/airport/7.jpg",
        "beach/8.png": "imgs/beach/8.png",
    }
    assert {file: store.locate(file) for file in found} == found
    for file in ("7.jpg", "beach/8.tif"):
        with pytest.raises(UserError, match=f"{file} may be imgs/.* or imgs/.* in .*store"):
            store.locate(file)
    with pytest.raises(UserError, match="3.jpg is not in .*store.*; complete the images or remove"):
        store.locate("3.jpg")
    with pytest.raises(UserError, match="other/1.jpg is not in .*, where imgs/1.jpg lies in"):
        store.locate("other/1.jpg")


def test_the_members_of_a_list_are_its_own_or_it_is_refused(store_of):
    store = store_of({"b/1.png": file_of(RGB), "b/2.png": file_of(RGB)})
    assert store.members(["b/2.tif", "b/1.png"]) == ["b/2.png", "b/1.png"]
    for files, sentence in (
        (["b/1.png", "b/1.tif"], "^b/1.png and b/1.tif both mean b/1.png in "),
        (["a/1.png", "b/1.png"], "^a/1.png is not in .*, where b/1.png lies"),
        (["a/1.png", "3.png"], "^2 of 2 images cannot be used; the first: a/"),
    ):
        with pytest.raises(UserError, match=sentence):
            store.members(files, ["b/1.png"])


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_compared_in_one_unicode_form(store_of, forms):
    listed, stored = (unicodedata.normalize(form, "Zürich/é 1.png") for form in forms)
    store = store_of({stored: file_of(RGB), "other/2.png": file_of(255 - RGB)})
    np.testing.assert_array_equal(store.read(listed), RGB)
    assert store.locate(listed) == stored


def test_two_names_of_one_unicode_form_are_told_apart(store_of):
    one, other = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    store = store_of({one: file_of(RGB), other: file_of(255 - RGB)})
    assert store.members([other, one]) == [other, one]
    np.testing.assert_array_equal(store.read(other), 255 - RGB)


def test_linked_folders_and_files_are_read(tmp_path):
    put_folder(tmp_path / "real", {"a/1.png": file_of(RGB), "b/2.png": file_of(RGB)})
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "links" / "again").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "links" / "3.png").symlink_to(tmp_path / "real" / "b" / "2.png")
    (tmp_path / "links" / "4.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "links")
    for path in (tmp_path / "links", tmp_path / "linked"):
        store = open_images(path)
        assert store.names == ["3.png", "a/1.png", "again/1.png"]
        for name in store.names:
            np.testing.assert_array_equal(store.read(name), RGB)


def test_links_that_lead_round_end(tmp_path, monkeypatch):
    folder = put_folder(tmp_path / "x", {"a/1.png": file_of(RGB), "b/2.png": file_of(RGB)})
    for link, target in (("a/up", "."), ("a/other", "b"), ("b/other", "a")):
        (folder / link).symlink_to(folder / target)
    (folder / "self").symlink_to(folder / "self")
    assert open_images(folder).names == ["a/1.png", "a/other/2.png", "b/2.png", "b/other/1.png"]
    monkeypatch.setattr(archives, "MAX_FOLDERS", 4)
    with pytest.raises(UserError, match="x leads to more than 4 folders; remove links"):
        open_images(folder)
    for link in ("a/up", "a/other", "b/other"):  # the advice
        (folder / link).unlink()
    assert open_images(folder).names == ["a/1.png", "b/2.png"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_images_of_one_name_in_an_archive_are_refused(tmp_path, kind):
    path = STORES[kind](tmp_path / "x", {"a.png": file_of(RGB), "b.png": file_of(RGB)})
    with (zipfile.ZipFile if kind == "zip" else tarfile.open)(path, mode="a") as archive:
        for name, pixels in (("a.png", RGB), ("b.png", 255 - RGB)):
            if kind == "zip":
                archive.writestr(name, file_of(pixels))
            else:
                entry = tarfile.TarInfo(name)
                entry.size = len(file_of(pixels))
                archive.addfile(entry, io.BytesIO(file_of(pixels)))
    with pytest.raises(UserError, match="x holds two different files called b.png; pack it again"):
        open_images(path)


def test_content_is_told_by_bytes_not_by_the_extension(store_of):
    store = store_of(
        {"a.jpg": file_of(RGB), "b.png": b"<html>", "c.jpg": file_of(RGB, "JPEG")[:300]}
    )
    np.testing.assert_array_equal(store.read("a.jpg"), RGB)
    with pytest.raises(UserError, match=r"^b\.png in .*store.* is not an image file"):
        store.read("b.png")
    with pytest.raises(UserError, match=r"^c\.jpg in .*store.* truncated"):
        store.read("c.jpg")


def test_the_digest_of_a_file_follows_its_bytes_alone(store_of):
    first = store_of({"a.png": file_of(RGB), "b.png": file_of(RGB)})
    assert first.digest("a.png") == first.digest("b.png")
    assert store_of({"a.png": file_of(255 - RGB)}).digest("a.png") != first.digest("b.png")


@pytest.mark.parametrize("put", [put_zip, put_tar])
@pytest.mark.parametrize(
    "name", ["../../x.png", "/etc/x.png", "a/../../x.png", "C:/x.png", "a\\..\\x.png"]
)
def test_archives_with_names_that_leave_them_are_refused(tmp_path, put, name):
    archive = put(tmp_path / "bad.archive", {"a.png": file_of(RGB), name: file_of(RGB)})
    with pytest.raises(UserError, match="1 members with absolute, '..' or backslash names"):
        open_images(archive)
    assert os.listdir(tmp_path) == ["bad.archive"]


def test_links_in_a_tar_are_no_images(tmp_path):
    with tarfile.open(put_tar(tmp_path / "x.tar", {"a.png": file_of(RGB)}), "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert open_images(tmp_path / "x.tar").names == ["a.png"]


@pytest.mark.parametrize("put", [put_zip, put_tar, put_folder])
def test_a_member_that_unpacks_to_too_much_is_refused(tmp_path, put, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 10_000_000)
    put(tmp_path / "bomb", {"a.png": bytes(10_000_001)})
    assert put is not put_zip or (tmp_path / "bomb").stat().st_size < 20_000
    with pytest.raises(UserError, match="a.png in .*bomb unpacks to 10 MB, more than the 9 MB"):
        open_images(tmp_path / "bomb").read("a.png")


def test_a_zip_member_never_yields_more_than_its_declared_size(tmp_path):
    path = put_zip(tmp_path / "x.zip", {"a.png": bytes(5_000_000)})
    lying = path.read_bytes().replace(
        (5_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little")
    )
    path.write_bytes(lying)
    with pytest.raises(UserError, match="a.png in .*x.zip cannot be read"):
        open_images(path).read("a.png")


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda path: None, "does not exist"),
        (
            lambda path: path.write_bytes(b"no archive"),
            "neither a folder nor a readable zip or tar",
        ),
        (lambda path: put_tar(path, {"a.png": b"x"}, "w:gz"), "compressed or damaged tar"),
        (lambda path: put_zip(path, {"a.txt": b"x"}), "holds no image files"),
        (lambda path: path.mkdir(), "holds no image files"),
        (
            lambda path: path.write_bytes(put_zip(path, {"a.png": b"x"}).read_bytes()[:-30]),
            "neither a folder",
        ),
    ],
)
def test_what_is_no_store_is_refused(tmp_path, make, reason):
    make(tmp_path / "images")
    with pytest.raises(UserError, match=reason):
        open_images(tmp_path / "images")


def test_a_damaged_member_is_named(tmp_path):
    path = put_zip(tmp_path / "x.zip", {"a.png": file_of(RGB)})
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match="a.png in .*x.zip cannot be read"):
        open_images(path).read("a.png")


# ---- the decoded cache
SIZES = [(20, 30), (64, 48), (31, 31)]


@pytest.fixture
def pictures():
    return {
        f"{i}.png": RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(SIZES)
    }


@pytest.fixture
def store(tmp_path, pictures):
    files = {name: file_of(image) for name, image in pictures.items()}
    return open_images(put_zip(tmp_path / "x.zip", files))


def test_the_cache_holds_the_source_pixels(tmp_path, store, pictures):
    files = ["2.tif", "0.png", "1.png"]
    cache = DecodedCache.build(store, files, tmp_path / "cache")
    again = pickle.loads(pickle.dumps(DecodedCache.open(cache.folder)))
    assert len(again) == 3 and again.key == cache.key and again.files == files
    for i, file in enumerate(files):
        np.testing.assert_array_equal(again[i], pictures[file.replace("tif", "png")])
    assert list(again.rows(["1.png", "2.tif"])) == [2, 0]
    with pytest.raises(UserError, match="1 images are not in the cache .*9.png"):
        again.rows(["1.png", "9.png"])
    with pytest.raises(ValueError):
        again[0][:] = 0


@pytest.mark.parametrize("size", [8, 31, 224])
def test_resized_equals_pillow(tmp_path, store, pictures, size):
    cache = DecodedCache.build(store, list(pictures), tmp_path / "cache")
    for resized in (cache.resized(size), DecodedCache.open(cache.folder).resized(size)):
        assert isinstance(resized, np.memmap) and resized.shape == (3, size, size, 3)
        for found, image in zip(resized, pictures.values(), strict=True):
            expected = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(found, np.asarray(expected))


def test_images_of_the_right_size_are_not_stored_twice(tmp_path):
    store = open_images(put_zip(tmp_path / "x.zip", {"a.png": file_of(RGB[:, :20])}))
    cache = DecodedCache.build(store, ["a.png"], tmp_path / "cache")
    np.testing.assert_array_equal(cache.resized(20)[0], RGB[:, :20])
    assert {path.name for path in cache.folder.iterdir()} == {"pixels.u8", "index.json"}


def test_the_key_follows_content_and_list_but_not_the_place(tmp_path, store, pictures):
    cache = tmp_path / "cache"
    first = DecodedCache.build(store, list(pictures), cache)
    moved = open_images(store.path.rename(tmp_path / "moved.zip"))
    assert DecodedCache.build(moved, list(pictures), cache).key == first.key
    assert DecodedCache.build(moved, list(pictures)[:2], cache).key != first.key
    changed = put_zip(
        tmp_path / "y.zip", {name: file_of(255 - image) for name, image in pictures.items()}
    )
    assert DecodedCache.build(open_images(changed), list(pictures), cache).key != first.key
    assert len(list(cache.iterdir())) == 3


def bitmap(colour) -> bytes:
    """Every colour has a file of the same size."""
    return file_of(np.full((8, 8, 3), colour, np.uint8), "BMP")


def frozen_times(path):
    """Sets the times of a file, or of all in a folder, to one moment."""
    for file in [path, *path.rglob("*")]:
        os.utime(file, ns=(10**18, 10**18))


@pytest.mark.parametrize("kind", STORES)
def test_other_bytes_of_the_same_name_size_and_time_are_another_cache(tmp_path, kind):
    red, blue = (200, 0, 0), (0, 0, 200)
    (tmp_path / "store").mkdir()
    opened = []
    for colour in (red, blue, red):
        path = STORES[kind](
            tmp_path / ("store" if kind == "folder" else "packed"), {"1.bmp": bitmap(colour)}
        )
        frozen_times(path)
        opened.append(DecodedCache.build(open_images(path), ["1.bmp"], tmp_path / "cache"))
        assert tuple(opened[-1][0][0, 0]) == colour
    assert opened[0].key == opened[2].key != opened[1].key


def test_an_open_store_sees_a_file_replaced_in_place(tmp_path):
    folder = put_folder(tmp_path / "store", {"1.bmp": bitmap(1)})
    frozen_times(folder)
    store = open_images(folder)
    before = DecodedCache.build(store, ["1.bmp"], tmp_path / "cache")
    frozen_times(put_folder(folder, {"1.bmp": bitmap(2)}))
    after = DecodedCache.build(store, ["1.bmp"], tmp_path / "cache")
    assert after.key != before.key and (after[0] == 2).all() and (before[0] == 1).all()


def test_the_key_follows_the_listed_files_alone(tmp_path, store, pictures):
    files = list(pictures)
    first = DecodedCache.build(store, files, tmp_path / "cache")
    more = {name: file_of(image) for name, image in pictures.items()} | {"z.png": file_of(RGB)}
    others = open_images(put_tar(tmp_path / "more.tar", more))
    assert DecodedCache.build(others, files, tmp_path / "cache").key == first.key
    assert DecodedCache.build(store, files[::-1], tmp_path / "cache").key != first.key


def test_digests_are_equal_where_shape_and_pixels_are(tmp_path):
    flat = np.full((6, 4, 3), 9, np.uint8)
    files = {
        "a.png": file_of(flat),
        "b.bmp": file_of(flat, "BMP"),
        "c.png": file_of(flat.reshape(4, 6, 3)),
        "d.png": file_of(flat + 1),
    }
    store = open_images(put_zip(tmp_path / "x.zip", files))
    for _ in range(2):  # built, then opened
        a, b, *others = DecodedCache.build(store, list(files), tmp_path / "cache").digests
        assert (
            a == b and len({a, *others}) == 3 and all(isinstance(digest, str) for digest in others)
        )


def test_a_file_that_changes_between_its_two_readings_is_refused(
    tmp_path, store, pictures, monkeypatch
):
    read, times = store._read, []

    def changing(member):
        times.append(member)
        second = member == "1.png" and times.count(member) == 2
        return file_of(RGB) if second else read(member)

    monkeypatch.setattr(store, "_read", changing)
    with pytest.raises(UserError, match="^1.png in .*x.zip changed while it was read; run again"):
        DecodedCache.build(store, list(pictures), tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []
    monkeypatch.setattr(store, "_read", read)  # the advice
    assert len(DecodedCache.build(store, list(pictures), tmp_path / "cache")) == 3


def test_missing_and_unreadable_images_are_counted_and_nothing_is_left(tmp_path):
    store = open_images(put_zip(tmp_path / "x.zip", {"a.png": file_of(RGB), "b.png": b"x"}))
    with pytest.raises(UserError, match="^b.png in .* is not an image file"):
        DecodedCache.build(store, ["a.png", "b.png"], tmp_path / "cache")
    with pytest.raises(UserError, match="^c.png is not in .*; complete the images or remove it"):
        DecodedCache.build(store, ["a.png", "b.png", "c.png"], tmp_path / "cache")
    with pytest.raises(UserError, match="^2 of 3 images cannot be used; the first: c.png is not"):
        DecodedCache.build(store, ["c.png", "a.png", "d.png"], tmp_path / "cache")
    with pytest.raises(UserError, match="^a.png and a.tif both mean a.png in "):
        DecodedCache.build(store, ["a.png", "a.tif"], tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def full_disk(monkeypatch, name):
    """The third write to a file of that name finds no space."""
    written = []

    class Full(io.FileIO):
        def write(self, data):
            written.append(data)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def opened(path, mode="r", *rest):
        return (
            Full(path, mode) if name in Path(path).name and "w" in mode else open(path, mode, *rest)
        )

    monkeypatch.setattr(pixel_cache, "open", opened, raising=False)
    return written


def test_a_full_disk_leaves_no_half_written_cache(tmp_path, store, pictures, monkeypatch):
    with monkeypatch.context() as patch:
        written = full_disk(patch, "pixels")
        with pytest.raises(UserError, match="disk is full: .*images-"):
            DecodedCache.build(store, list(pictures), tmp_path / "cache")
    assert len(written) == 3 and os.listdir(tmp_path / "cache") == []
    cache = DecodedCache.build(store, list(pictures), tmp_path / "cache")
    with monkeypatch.context() as patch:
        written = full_disk(patch, "resized-16")
        with pytest.raises(UserError, match="disk is full: .*resized-16"):
            cache.resized(16)
    assert len(written) == 3 and {path.name for path in cache.folder.iterdir()} == {
        "pixels.u8",
        "index.json",
    }
    assert cache.resized(16).shape == (3, 16, 16, 3)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "pixels.u8").write_bytes(b"123"),
        lambda folder: (folder / "pixels.u8").unlink(),
        lambda folder: (folder / "index.json").write_text('{"key": 1'),
        lambda folder: (folder / "index.json").write_text("[]"),
        lambda folder: (folder / "index.json").write_text(
            (folder / "index.json").read_text().replace('"digests": [', '"digests": ["00", ')
        ),
        lambda folder: next(folder.glob("resized-16-*.u8")).write_bytes(b"123"),
    ],
)
def test_a_damaged_cache_is_named(tmp_path, store, pictures, harm):
    cache = DecodedCache.build(store, list(pictures), tmp_path / "cache")
    cache.resized(16)
    harm(cache.folder)
    with pytest.raises(
        UserError, match="image cache .*images-.* is damaged or incomplete; delete that"
    ):
        DecodedCache.open(cache.folder).resized(16)


WRITER = """
import sys
from nbhelpers.data.archives import open_images
from nbhelpers.data.pixel_cache import DecodedCache
sys.stdin.readline()
cache = DecodedCache.build(open_images(sys.argv[1]), sys.argv[3:], sys.argv[2])
print(int(cache.resized(16).sum()) + int(cache[0].sum()))
"""


def test_two_processes_build_one_cache(tmp_path, store, pictures):
    command = [sys.executable, "-c", WRITER, store.path, tmp_path / "cache", *pictures]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    running = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    sums = [process.communicate(timeout=60)[0] for process in running]
    cache = DecodedCache.build(store, list(pictures), tmp_path / "cache")
    assert sums == [f"{int(cache.resized(16).sum()) + int(cache[0].sum())}\n"] * 2
    assert os.listdir(tmp_path / "cache") == [cache.folder.name]
    assert {path.name.split("-")[0] for path in cache.folder.iterdir()} == {
        "pixels.u8",
        "index.json",
        "resized",
    }


def test_a_second_builder_that_comes_late_takes_the_first_ones_cache(
    tmp_path, store, pictures, monkeypatch
):
    """The other process finishes while this one is still decoding."""
    write, built = pixel_cache._write_pixels, []

    def slow(*arguments):
        if not built:
            built.append(None)
            built[0] = DecodedCache.build(*other)
        return write(*arguments)

    monkeypatch.setattr(pixel_cache, "_write_pixels", slow)
    other = store, list(pictures), tmp_path / "cache"
    cache = DecodedCache.build(*other)
    assert cache.folder == built[0].folder and os.listdir(tmp_path / "cache") == [cache.folder.name]
    np.testing.assert_array_equal(cache[1], pictures["1.png"])


@pytest.mark.realdata
@pytest.mark.parametrize("archive, count", [("UCM_images.zip", 2100), ("RSICD_images.zip", 10_921)])
def test_published_archives(archive, count, tmp_path):
    folder = os.environ.get("NBHELPERS_TEST_DATA")
    if not folder:
        pytest.skip("NBHELPERS_TEST_DATA names no folder of real data")
    store = open_images(Path(folder) / archive)
    assert len(store.names) == count
    some = store.names[:: count // 20]
    cache = DecodedCache.build(store, [Path(name).stem + ".tif" for name in some], tmp_path)
    resized = cache.resized(224)
    for i, name in enumerate(some):
        with zipfile.ZipFile(Path(folder) / archive) as opened:
            image = Image.open(io.BytesIO(opened.read(name))).convert("RGB")
        np.testing.assert_array_equal(cache[i], np.asarray(image))
        expected = image.resize((224, 224), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(resized[i], np.asarray(expected))
