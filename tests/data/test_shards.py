"""Images and captions in the same files: written, read, streamed, and refused if broken.

As a script under torchrun this file is one of two processes that train from one stream.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from closeness import assert_close
from coloured_set import coloured, words
from PIL import Image
from torch import nn

from nbhelpers.data import augment, catalog, layouts, loaders, shards
from nbhelpers.data.archives import open_images
from nbhelpers.data.augment import TestTransform, TrainTransform
from nbhelpers.data.check import check
from nbhelpers.data.loaders import PairDataset
from nbhelpers.data.streaming import Sampling, ShardDataset, stream_loader
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import CLIPTokenizer, Tokenizer
from nbhelpers.errors import UserError
from nbhelpers.papers import pir_clip
from nbhelpers.training.distributed import gather
from nbhelpers.training.loop import fit
from nbhelpers.training.schedule import TrainConfig

ALL = ("train", "val", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def data(folder):
    """44 images, two captions each: 48 in train, 16 in val, 24 in test."""
    return coloured(folder / "source")


@pytest.fixture(scope="module")
def tokenizer(data, folder):
    return words(data, folder)


@pytest.fixture(scope="module")
def store(data, folder):
    return open_images(folder / "source" / "images")


@pytest.fixture(scope="module")
def packed(data, store, folder):
    shards.write(data.table, store, folder / "shards", ALL, size=20)
    return folder / "shards"


@pytest.fixture
def copied(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "copied"))


def contents(path):
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def put_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def picture(data, store):
    return store.encoded(data.table.images.file[0])


def sample(picture, key="0", **parts):
    """A released sample; None leaves a part out."""
    parts = {"img_content": picture, "caption": b"a pond", "img_name": b"pond_1.jpg"} | parts
    return {f"{key}.{part}": content for part, content in parts.items() if content is not None}


# ---- shards are written
def test_what_is_written_is_read_back(data, store, packed):
    reading = layouts.scan(packed)
    assert (reading.layout, reading.table.name, reading.problems, reading.notes) == (
        "shards",
        "colours",
        [],
        [],
    )
    assert reading.table.fingerprint() == data.table.fingerprint()
    scene = reading.table.images.set_index("image_id").scene
    assert (
        scene[data.table.images.image_id]
        == [name.rstrip("0123456789") for name in data.table.images.image_id]
    ).all()
    inside = open_images(packed)
    for file in data.table.images.file:
        assert inside.encoded(file) == store.encoded(file) and np.array_equal(
            inside.read(file), store.read(file)
        )


def test_a_sample_has_the_released_parts_and_a_shard_its_size(data, packed):
    listed = json.loads((packed / "sizes.json").read_text())
    assert sorted(listed) == [
        f"colours-{split}-{number:06d}.tar"
        for split, count in (("test", 2), ("train", 3), ("val", 1))
        for number in range(count)
    ]
    seen = []
    for name, count in listed.items():
        parts = contents(packed / name)
        keys = sorted({key.split(".")[0] for key in parts})
        assert len(keys) == count <= 20 and len(parts) == 3 * count
        seen += [
            (parts[f"{key}.img_name"].decode(), parts[f"{key}.caption"].decode()) for key in keys
        ]
    table = data.table.captions.merge(data.table.images, on="image_id")
    assert sorted(seen) == sorted(zip(table.file, table.text, strict=True))


def test_train_is_shuffled_and_equal_seeds_give_equal_bytes(data, store, packed, tmp_path):
    again = {
        seed: shards.write(data.table, store, tmp_path / str(seed), ALL, size=20, seed=seed)
        for seed in (0, 1)
    }
    assert list(again[0]) == list(again[1])
    for name in again[0]:
        same = [
            (tmp_path / str(seed) / name).read_bytes() == (packed / name).read_bytes()
            for seed in (0, 1)
        ]
        assert same == [True, "train" not in name]


def test_a_shard_ends_at_its_bytes_too(data, store, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SHARD", 2 * len(store.encoded(data.table.images.file[0])))
    written = shards.write(data.table, store, tmp_path / "s", ("val",))
    assert len(written) > 4 and sum(written.values()) == 16


def test_an_empty_folder_is_filled_and_any_other_left_alone(data, store, tmp_path):
    (tmp_path / "s%d").mkdir()
    assert sum(shards.write(data.table, store, tmp_path / "s%d", ("val",)).values()) == 16
    before = sorted((tmp_path / "s%d").iterdir())
    with pytest.raises(UserError, match="exists already; name a new folder"):
        shards.write(data.table, store, tmp_path / "s%d", ("test",))
    assert sorted((tmp_path / "s%d").iterdir()) == before


def test_nothing_is_written_of_a_set_that_is_not_whole(data, store, folder, tmp_path):
    table = data.table
    source = Path(shutil.copytree(folder / "source" / "images", tmp_path / "images"))
    (source / "red_val0.png").write_bytes(b"no image")
    (source / "red_test0.png").unlink()
    broken = open_images(source)
    bare = CaptionTable(
        "colours", table.images, table.captions[table.captions.image_id != "red_val0"]
    )
    for wrong, pictures, options, message in (
        (table, broken, {"splits": ("val",)}, "red_val0.png in .* is not an image file"),
        (table, broken, {"splits": ("train", "test")}, "red_test0.png is not in"),
        (bare, store, {"splits": ("val",)}, "1 of the images have no captions .first: red_val0"),
        (table, store, {"splits": ("dev",)}, "no image in split 'dev'"),
        (table, store, {"size": 0}, "at least 1 sample"),
    ):
        with pytest.raises(UserError, match=message):
            shards.write(wrong, pictures, tmp_path / "s", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_full_disk_leaves_no_shard(data, store, tmp_path, monkeypatch):
    def full(self, sample):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    with pytest.raises(UserError, match="disk is full"):
        shards.write(data.table, store, tmp_path / "s")
    assert not list(tmp_path.iterdir())


# ---- shards are read
@pytest.mark.parametrize(
    "parts, text",
    [
        ({"jpg": True, "txt": b"a pond"}, "a pond"),
        ({"PNG": True, "json": b'{"caption": "a \\u2708 pond", "width": 3}'}, "a \u2708 pond"),
        ({"tif": True, "json": b'"a pond"'}, "a pond"),
        ({"jpg": True, "txt": b"this one", "json": b'{"caption": "not this"}'}, "this one"),
    ],
)
def test_pairs_of_an_image_and_a_text_or_json(parts, text, picture, tmp_path):
    part = next(iter(parts))
    # keys need not differ between shards
    for shard in ("pub11-train-0001.tar", "pub11-train-0002.tar"):
        put_tar(
            tmp_path / shard,
            {
                f"a/000123.{name}": picture if content is True else content
                for name, content in parts.items()
            },
        )
    reading = layouts.scan(tmp_path)
    assert (reading.layout, reading.table.name, reading.problems) == ("shards", "pub11", [])
    assert list(reading.table.images.file) == [
        f"pub11-train-000{n}/a/000123.{part.lower()}" for n in (1, 2)
    ]
    assert list(reading.table.captions.text) == [text] * 2
    assert open_images(tmp_path).read(reading.table.images.file[0]).shape == (40, 40, 3)


def test_names_tell_set_and_split_and_train_is_the_rest(picture, tmp_path):
    for number, name in enumerate(("00000.tar", "x_val.tar", "x-test-3.tar")):
        put_tar(tmp_path / "mine" / name, sample(picture, img_name=f"pond_{number}.jpg".encode()))
    reading = layouts.scan(tmp_path / "mine")
    assert reading.table.name == "mine" and dict(
        zip(reading.table.images.file, reading.table.images.split, strict=True)
    ) == {"pond_0.jpg": "train", "pond_1.jpg": "val", "pond_2.jpg": "test"}
    assert layouts.scan(tmp_path / "mine" / "x_val.tar").table.name == "x"
    assert [path.name for path in shards.shard_files(tmp_path / "mine", "test")] == ["x-test-3.tar"]
    with pytest.raises(UserError, match="in the layout shards, not nwpu"):
        layouts.scan(tmp_path / "mine", "nwpu")


def test_a_tar_of_images_alone_is_no_shard(picture, tmp_path):
    path = put_tar(tmp_path / "images.tar", {"readme.txt": b"hello", "imgs/pond_1.png": picture})
    assert open_images(path).names == ["imgs/pond_1.png"]
    with pytest.raises(UserError, match="holds no caption file of a known layout"):
        layouts.read(tmp_path)


def test_check_and_open_dataset_understand_shards(data, packed, tmp_path):
    report = check(packed, packed)
    assert not report.problems and any("44 of 44 found and read" in line for line in report.lines)
    for place in ("data/ucm_shards", "other/UCM", "UCM"):
        shutil.copytree(packed, tmp_path / place)
        found = catalog.open_dataset("ucm", tmp_path / place.split("/")[0], tmp_path / "cache")
        assert found.table.fingerprint() == data.table.fingerprint()
        for file in data.table.images.file:
            assert np.array_equal(
                found.pixels[found.pixels.rows([file])[0]], data.pixels[data.pixels.rows([file])[0]]
            )


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"caption": None}, r"sample 7 of x-train-0.tar has no caption \(caption, txt, json\)"),
        ({"img_content": None}, "sample 7 of x-train-0.tar has no image"),
        (
            {"caption": b"\xff\xfe\xff"},
            "the caption of sample 7 of x-train-0.tar begins as utf-16 text",
        ),
        ({"img_name": b"a\0b"}, "the img_name of sample 7 of x-train-0.tar holds null bytes"),
        (
            {"caption": None, "json": b"{"},
            "The JSON of sample 7 of x-train-0.tar is not readable JSON",
        ),
        (
            {"caption": None, "json": b"[" * 200_000},
            "The JSON of sample 7 of x-train-0.tar is not readable",
        ),
        (
            {"caption": None, "json": b'{"width": 1}'},
            "The JSON of sample 7 of x-train-0.tar has no text or list",
        ),
        (
            {"caption": None, "json": b'[["a"]]'},
            "The JSON of sample 7 of x-train-0.tar has no text or list",
        ),
        (
            {"caption": None, "json": b'{"captions": []}'},
            "The JSON of sample 7 .* has no text or list of texts",
        ),
        ({"img_name": b"../pond_1.jpg"}, "1 file names leave the image folder"),
        ({"img_name": b""}, r"1 rows have no file name .first: sample 7 of x-train-0.tar"),
    ],
)
def test_a_broken_sample_is_named(parts, words, picture, tmp_path):
    put_tar(
        tmp_path / "x-train-0.tar",
        sample(picture, "6", img_name=b"pond_0.jpg") | sample(picture, "7", **parts),
    )
    with pytest.raises(UserError, match=words):
        layouts.read(tmp_path)
        open_images(tmp_path)


def test_an_image_that_does_not_decode_is_named_by_its_sample(picture, tmp_path):
    put_tar(tmp_path / "x-train-0.tar", sample(picture[:99], "7"))
    with pytest.raises(UserError, match=r"pond_1.jpg \(sample 7 of x-train-0.tar\) is damaged"):
        open_images(tmp_path).read("pond_1.jpg")


def test_an_image_in_two_splits_is_refused(picture, tmp_path):
    for split in ("train", "test"):
        put_tar(tmp_path / f"x-{split}.tar", sample(picture))
    with pytest.raises(
        UserError,
        match="1 rows put an image into a second split .first: pond_1.jpg: test and train",
    ):
        layouts.read(tmp_path)


def test_a_shard_that_is_cut_off_anywhere_is_refused(picture, tmp_path):
    path = put_tar(tmp_path / "x-train-0.tar", sample(picture, "0") | sample(picture, "1"))
    whole, end = path.read_bytes(), path.read_bytes().rstrip(b"\0")
    assert len(layouts.read(path).captions) == 2
    cuts = [*range(1, len(end), 509), len(end), len(end) - len(end) % -512]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="shard .*x-train-0.tar is damaged"):
            layouts.read(path)


def test_a_shard_with_a_broken_header_is_refused(picture, tmp_path):
    path = put_tar(tmp_path / "x-train-0.tar", sample(picture, "0") | sample(picture, "1"))
    content = bytearray(path.read_bytes())
    content[content.index(b"1.img_content") + 150] ^= 1  # within its checksum
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged or cut off after 0.img_name"):
        layouts.read(path)


@pytest.mark.parametrize("content", [b"", b"nothing like a tar" * 99, None])
def test_what_is_no_tar_is_refused(content, picture, tmp_path):
    path = put_tar(tmp_path / "x-train-0.tar", sample(picture))
    if content is None:
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("a.caption"))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged, cut off or compressed"):
        layouts.read(path)
    with pytest.raises(UserError, match="is damaged"):
        ShardDataset(path, TestTransform(32), None)


def test_a_part_as_large_as_a_bomb_is_refused(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BYTES", len(picture) - 1)
    with pytest.raises(UserError, match=r"0.img_content in the shard .* more than the 0 MB"):
        layouts.read(put_tar(tmp_path / "x.tar", sample(picture)))


# ---- shards as a stream
CROP = TrainTransform(32)


def stream(packed, tokenizer, transform=CROP, seed=3, **options):
    sampling = Sampling(**({"buffer": 11} | options))
    return ShardDataset(packed, transform, tokenizer, seed, sampling=sampling)


def batches(dataset, epoch=0, size=8, workers=1):
    dataset.set_epoch(epoch)
    return list(stream_loader(dataset, size, workers))


def equal(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(one, other, strict=True)
    )


def test_an_epoch_has_every_pair_once_as_the_table_gives_them(data, packed, tokenizer):
    table = data.table.split("train")
    pairs = PairDataset(table, data.pixels, TestTransform(32), tokenizer)
    expected = {
        (
            batch["pixels"].numpy().tobytes(),
            batch["ids"].numpy().tobytes(),
            batch["mask"].numpy().tobytes(),
        )
        for batch in map(pairs.__getitem__, range(len(pairs)))
    }
    dataset = stream(packed, tokenizer, TestTransform(32))
    found = batches(dataset)
    assert len(dataset) == len(pairs) == 48 and len(stream_loader(dataset, 8)) == len(found) == 6
    template = pairs.__getitems__(list(range(8)))
    for batch in found:
        assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
            name: (value.dtype, value.shape) for name, value in template.items() if name != "row"
        }
    seen = [
        tuple(batch[name][row].numpy().tobytes() for name in ("pixels", "ids", "mask"))
        for batch in found
        for row in range(8)
    ]
    assert len(seen) == len(set(seen)) == 48 and set(seen) == expected


def test_numbers_say_what_is_equal_in_the_batch(packed, tokenizer):
    dataset = stream(packed, tokenizer)
    drawn = list(dataset)[:30]
    names, batch = [sample.file for _, sample in drawn], dataset.collate(drawn)
    assert torch.equal(batch["scene"], pir_clip.labels_from_names(names))
    assert len(set(names)) < 30  # some image comes twice
    assert [[a == b for b in names] for a in names] == (
        batch["image_index"][:, None] == batch["image_index"]
    ).tolist()


@pytest.mark.parametrize("drawn", [0, 40])
def test_batches_depend_on_seed_and_epoch_alone(drawn, packed, tokenizer):
    first = batches(stream(packed, tokenizer, drawn=drawn), epoch=2)
    assert len(first) == (40 if drawn else 48) // 8
    again = stream(packed, tokenizer, drawn=drawn)
    batches(again, 1)
    assert equal(first, batches(again, 2)) and equal(first, batches(again, 2, workers=3))
    assert not equal(first, batches(again, 3))
    assert not equal(first, batches(stream(packed, tokenizer, drawn=drawn, seed=4), 2))


def test_the_transform_is_drawn_from_seed_epoch_and_place(data, packed, tokenizer):
    dataset = stream(packed, tokenizer)
    dataset.set_epoch(5)
    drawn = list(dataset)[:8]
    batch = dataset.collate(drawn)
    for place, ((number, sample), pixels) in enumerate(zip(drawn, batch["pixels"], strict=True)):
        assert number == place
        source = data.pixels[data.pixels.rows([sample.file])[0]]
        view = TrainTransform(32)(source, np.random.default_rng([3, 5, place]))
        assert torch.equal(pixels, augment.normalize(view[None])[0])


def test_pixels_of_a_stream_travel_as_bytes(packed, tokenizer):
    loader = stream_loader(stream(packed, tokenizer), 8)
    plain = next(iter(loader))
    with loaders.sent_as_bytes(loader) as finish:
        sent = next(iter(loader))
        assert sent["pixels"].dtype == torch.uint8
        assert equal([finish(sent)], [plain])


def test_shards_and_the_samples_in_the_buffer_are_mixed(packed, tokenizer):
    dataset, orders = stream(packed, tokenizer, buffer=1), set()
    for epoch in range(4):
        dataset.set_epoch(epoch)
        places = [sample.place for _, sample in dataset]
        order = tuple(dict.fromkeys(place.split(" of ")[1] for place in places))
        assert places == [
            place for shard in order for place in sorted(p for p in places if shard in p)
        ]
        orders.add(order)
    assert len(orders) > 1
    # one shard: only the buffer mixes
    alone, orders = stream(packed, tokenizer, split="val"), set()
    for epoch in range(3):
        alone.set_epoch(epoch)
        orders.add(tuple(sample.place for _, sample in alone))
    assert len(orders) == 3
    mixed = [sample.place for _, sample in stream(packed, tokenizer, buffer=30)]
    assert (
        sorted(mixed) == sorted(places) and len({place.split(" of ")[1] for place in mixed[:8]}) > 1
    )


def test_shards_may_be_drawn_with_replacement(packed, tokenizer):
    dataset = stream(packed, tokenizer, drawn=500)
    places = [sample.place for _, sample in dataset]
    assert len(places) == len(dataset) == 500 and len(set(places)) == 48
    counts = pd.Series([place.split(" of ")[1] for place in places]).value_counts()
    assert counts.nunique() > 1


class Toy(nn.Module):
    """Its loss depends on every part of a whole batch, so that equal weights mean equal batches.

    May stop at a batch.
    """

    def __init__(self, stop=0):
        super().__init__()
        self.weights, self.count, self.stop = nn.Parameter(torch.zeros(3)), 0, stop

    def loss(self, batch):
        self.count += 1
        if self.count == self.stop:
            raise KeyboardInterrupt
        batch = {name: gather(values) for name, values in batch.items()}
        parts = [
            batch["pixels"].mean(),
            batch["ids"].float().mean() / 20,
            (batch["scene"] * batch["image_index"]).float().mean(),
        ]
        return {"loss": ((torch.stack(parts) - self.weights) ** 2).sum()}


CONFIG = TrainConfig(epochs=3, lr=0.1, batch_size=8, save_every_steps=1)


def train(model, packed, tokenizer, drawn, folder):
    fit(
        model,
        stream_loader(stream(packed, tokenizer, drawn=drawn), 8, 2),
        CONFIG,
        folder,
        progress=False,
    )
    return pd.read_csv(folder / "history.csv").loss


@pytest.mark.parametrize("drawn", [0, 40])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not(drawn, packed, tokenizer, tmp_path):
    whole, stopped, rest = Toy(), Toy(stop=9), Toy()
    losses = train(whole, packed, tokenizer, drawn, tmp_path / "whole")
    assert losses.nunique() == 3
    with pytest.raises(KeyboardInterrupt):
        train(stopped, packed, tokenizer, drawn, tmp_path / "stopped")
    train(rest, packed, tokenizer, drawn, tmp_path / "stopped")
    assert rest.count == whole.count - 8 and torch.equal(rest.weights, whole.weights)


def test_two_processes_share_one_stream(packed, tokenizer, folder, tmp_path):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        str(packed),
        str(folder / "tokenizer.json"),
        str(tmp_path / "two"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    one = train(Toy(), packed, tokenizer, 40, tmp_path / "one")
    assert_close(pd.read_csv(tmp_path / "two/history.csv").loss, one)


def test_pir_clip_takes_its_batches(packed):
    model = pir_clip.PIRCLIP(pir_clip.PIRCLIPConfig.tiny())
    batch = batches(
        stream(
            packed,
            CLIPTokenizer(40),
            TrainTransform(112, randaugment=None, scale=(0.9, 1.0), flip=0),
        )
    )[0]
    assert torch.isfinite(model.loss(batch)["loss"])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "parts, words",
    [
        (
            {"img_content": b"GIF89a no image"},
            r"pond_1.jpg .sample 3 of x-train-0.tar. is not an image",
        ),
        ({"caption": None}, "sample 3 of x-train-0.tar has no caption"),
        ({"img_content": None}, "sample 3 of x-train-0.tar has no image"),
        ({"caption": b"a\0"}, "the caption of sample 3 of x-train-0.tar holds null bytes"),
        ({"caption": b"[]"}, "sample 3 of x-train-0.tar begins a list of captions but holds none"),
    ],
)
def test_a_broken_sample_of_a_stream_is_named(parts, words, workers, picture, tokenizer, tmp_path):
    members = {}
    for key in "01234":
        members |= sample(picture, key, **(parts if key == "3" else {}))
    put_tar(tmp_path / "x-train-0.tar", members)
    with pytest.raises(UserError, match=words):
        batches(stream(tmp_path, tokenizer), size=2, workers=workers)


def test_a_shard_that_is_cut_off_while_it_streams_is_named(copied, tokenizer):
    dataset = stream(copied, tokenizer)
    shard = copied / "colours-train-000001.tar"
    content = shard.read_bytes()
    for cut in (0, 700, len(content) // 2):  # nothing left, within a member, within another
        shard.write_bytes(content[:cut])
        with pytest.raises(UserError, match="shard .*colours-train-000001.tar"):
            list(dataset)


def test_a_broken_header_does_not_end_a_shard_without_a_word(copied, tokenizer):
    shard = copied / "colours-train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"000000025.caption") + 150] ^= 1
    shard.write_bytes(content)
    told = "colours-train-000001.tar is damaged or cut off after 000000024.img_name"
    with pytest.raises(UserError, match=told):
        list(stream(copied, tokenizer))
    (copied / "sizes.json").unlink()
    with pytest.raises(UserError, match=told):
        stream(copied, tokenizer)


def test_sizes_of_other_shards_are_named_and_may_be_removed(copied, tokenizer):
    (copied / "sizes.json").write_text('{"colours-train-000001.tar": 19}')
    with pytest.raises(UserError, match="gives 20 samples and should hold 19.*remove that file"):
        list(stream(copied, tokenizer))
    (copied / "sizes.json").unlink()
    assert len(list(stream(copied, tokenizer))) == 48


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"colours-train-000000.tar": "20"}'])
def test_without_sizes_the_samples_are_counted(text, copied, tokenizer):
    (copied / "sizes.json").unlink() if text is None else (copied / "sizes.json").write_text(text)
    assert len(stream(copied, tokenizer)) == 48 and len(list(stream(copied, tokenizer))) == 48


def test_streams_that_cannot_be(copied, tokenizer, tmp_path):
    with pytest.raises(UserError, match="holds no shard of train; name a folder of tars"):
        stream(tmp_path, tokenizer)
    with pytest.raises(UserError, match="holds no shard of val"):
        stream(copied / "colours-train-000001.tar", tokenizer, split="val")
    with pytest.raises(UserError, match="16 pairs do not fill a batch of 17"):
        stream_loader(stream(copied, tokenizer, split="val"), 17)


# ---- arrow tables
def put_arrow(path, columns, stream=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    with (
        pa.OSFile(str(path), "wb") as file,
        (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=3)
    return path


def columns_of(data, store, split):
    part = data.table.split(split)
    texts = part.captions.groupby("image_id").text.agg(list)
    return {
        "image": [store.encoded(file) for file in part.images.file],
        "caption": [texts[i] for i in part.images.image_id],
        "image_id": list(part.images.file),
        "split": [split] * len(part),
    }


@pytest.fixture(scope="module", params=[False, True], ids=["file", "stream"])
def tables(request, data, store, folder):
    place = folder / f"arrow-{request.param}"
    for split in ALL:
        put_arrow(place / f"colours_{split}.arrow", columns_of(data, store, split), request.param)
    return place


def test_arrow_tables_of_three_splits_are_one_set(data, store, tables, tmp_path):
    for path in (tables, tables / "colours_test.arrow"):
        reading = layouts.scan(path)
        assert (reading.layout, reading.table.name, reading.problems) == ("arrow", "colours", [])
        assert reading.table.fingerprint() == data.table.fingerprint()
        inside = open_images(path)
        for file in data.table.images.file:
            assert np.array_equal(inside.read(file), store.read(file))
    assert not check(tables, tables).problems
    shutil.copytree(tables, tmp_path / "sets")
    for split in ALL:
        (tmp_path / "sets" / f"colours_{split}.arrow").rename(
            tmp_path / "sets" / f"ucm_{split}.arrow"
        )
    found = catalog.open_dataset("ucm", tmp_path / "sets", tmp_path / "cache")
    assert found.table.fingerprint() == data.table.fingerprint() and len(found.pixels) == 44


def test_the_name_tells_the_split_where_no_column_does_and_only_its_own_set_is_read(
    data, store, tmp_path
):
    for split in ("train", "test"):
        columns = columns_of(data, store, split)
        put_arrow(
            tmp_path / f"a_{split}.arrow",
            {name: values for name, values in columns.items() if name != "split"},
        )
    put_arrow(tmp_path / "b_test.arrow", {"image": [b"x"], "caption": [["other"]], "image_id": [7]})
    assert (
        layouts.read(tmp_path / "a_train.arrow").fingerprint()
        == data.table.split("train", "test").fingerprint()
    )
    other = layouts.read(tmp_path / "b_test.arrow")
    assert list(other.images.file) == ["7"] and list(other.captions.text) == ["other"]


def test_a_row_may_hold_one_caption(data, store, tmp_path):
    columns = columns_of(data, store, "test")
    rows = [
        (image, text, name)
        for image, texts, name in zip(*list(columns.values())[:3], strict=True)
        for text in texts
    ]
    images_, texts, names = map(list, zip(*rows, strict=True))
    path = put_arrow(
        tmp_path / "test.arrow", {"image": images_, "caption": texts, "image_id": names}
    )
    assert layouts.read(path).fingerprint() == data.table.split("test").fingerprint()


# ---- tables of the hub
def put_hub(path, data, store, split, **changes):
    """As the library `datasets` writes a split: the image a struct of bytes and path."""
    columns = columns_of(data, store, split)
    images_ = [
        {"bytes": content, "path": name}
        for content, name in zip(columns["image"], columns["image_id"], strict=True)
    ]
    written = {
        "image": images_,
        "captions": columns["caption"],
        "filename": columns["image_id"],
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({name: values for name, values in written.items() if values is not None}), path
    )
    return path


@pytest.fixture(scope="module")
def hub(data, store, folder):
    for split, name in zip(ALL, ("train", "validation", "test"), strict=False):
        put_hub(
            folder / "colours" / "data" / f"{name}-00000-of-00001-0123456789abcdef.parquet",
            data,
            store,
            split,
        )
    return folder / "colours"


def test_the_tables_of_a_hub_data_set_are_one_set(data, store, hub, tmp_path):
    for path in (hub, hub / "data", next(hub.glob("data/train*"))):
        reading = layouts.scan(path)
        assert (reading.layout, reading.problems, len(reading.table)) == ("hub", [], 44)
        assert reading.table.fingerprint() == data.table.fingerprint()
        inside = open_images(path)
        assert all(
            np.array_equal(inside.read(file), store.read(file)) for file in data.table.images.file
        )
    assert layouts.read(hub).name == "colours" and not check(hub, hub).problems
    shutil.copytree(hub, tmp_path / "sets" / "ucm")
    found = catalog.open_dataset("ucm", tmp_path / "sets", tmp_path / "cache")
    assert found.table.fingerprint() == data.table.fingerprint() and len(found.pixels) == 44


def test_a_hub_table_may_leave_the_name_to_the_image_and_hold_one_caption_a_row(
    data, store, tmp_path
):
    path = put_hub(tmp_path / "valid.parquet", data, store, "val", filename=None)
    assert layouts.read(path).fingerprint() == data.table.split("val").fingerprint()
    first = data.table.split("val").captions.text.iloc[0]
    put_hub(path, data, store, "val", captions=None, caption=[first] * 8)
    assert list(layouts.read(path).captions.text) == [first] * 8


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"image": None, "filename": None},
            r"has neither images nor file names \(its columns: captions \(list",
        ),
        (
            {"captions": None},
            "has no column captions, caption, sentences, text or raw .its columns: image .struct",
        ),
        (
            {"image": [[1, 2]] * 12},
            "The column image of .*test.parquet holds list.*, not the bytes",
        ),
        ({"Filename": ["a.jpg"] * 12}, "has the column 'filename' more than once"),
    ],
)
def test_a_wrong_hub_table_is_refused(data, store, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        layouts.read(put_hub(tmp_path / "test.parquet", data, store, "test", **changes))


def test_a_damaged_hub_table_is_refused(hub, tmp_path):
    content, path = next(hub.glob("data/test*")).read_bytes(), tmp_path / "test.parquet"
    for broken in (b"", b"no table at all", content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="test.parquet is not a readable parquet table"):
            layouts.read(path)


# ---- what is wrong with arrow tables
@pytest.mark.parametrize(
    "change, words",
    [
        ({"image": None, "image_id": None}, "x_test.arrow has neither images nor file names"),
        (
            {"caption": None},
            r"has no column captions, .*\(its columns: image \(binary\), image_id \(string\)",
        ),
        ({"image": [7]}, "The column image of .*x_test.arrow holds int64, not the bytes"),
        ({"image_id": ["../a.jpg"]}, "1 file names leave the image folder"),
        ({"caption": [None]}, "1 captions are not text .first: of a.jpg"),
        ({"caption": [[]]}, "1 images have no sentences .first: a.jpg"),
        ({"caption": [[7]]}, "1 captions are not text"),
        ({"split": ["tset"]}, "1 images have an unknown split .first: a.jpg: 'tset'"),
    ],
)
def test_a_wrong_table_is_refused(change, words, tmp_path):
    columns = {
        "image": [b"x"],
        "caption": [["a"]],
        "image_id": ["a.jpg"],
        "split": ["test"],
    } | change
    path = put_arrow(
        tmp_path / "x_test.arrow",
        {name: values for name, values in columns.items() if values is not None},
    )
    with pytest.raises(UserError, match=words):
        layouts.read(path)


def test_a_damaged_table_is_refused(tables, tmp_path):
    content = (tables / "colours_test.arrow").read_bytes()
    path = tmp_path / "x_test.arrow"
    for broken in (b"", b"no table at all", content[:100], content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="x_test.arrow is not a readable arrow table"):
            layouts.read(path)
        with pytest.raises(UserError, match="x_test.arrow is not a readable arrow table"):
            open_images(path)


def test_a_table_whose_text_is_not_utf_8_is_refused(tmp_path):
    broken = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    path = put_arrow(
        tmp_path / "x_test.arrow", {"image": [b"x"], "caption": broken, "image_id": ["a.jpg"]}
    )
    with pytest.raises(UserError, match="x_test.arrow is not a readable arrow table .*UTF8"):
        layouts.read(path)


def test_a_table_whose_split_nothing_tells(tmp_path):
    path = put_arrow(
        tmp_path / "captions.arrow", {"image": [b"x"], "caption": [["a"]], "image_id": ["a.jpg"]}
    )
    with pytest.raises(
        UserError, match="has no column split, .* rename it to captions_train.arrow, or _val"
    ):
        layouts.read(path)
    for split in ALL:
        renamed = path.rename(tmp_path / f"captions_{split}.arrow")
        assert list(layouts.read(renamed).images.split) == [split]
        path = renamed


@pytest.mark.parametrize("image", [b"no image", b"", None])
def test_a_broken_image_is_named_by_its_row(image, tmp_path):
    path = put_arrow(
        tmp_path / "x_test.arrow",
        {
            "image": pa.array([b"y", image], pa.binary()),
            "caption": [["a"]] * 2,
            "image_id": ["a.jpg", "b.jpg"],
        },
    )
    with pytest.raises(UserError, match=r"b.jpg \(row 1 of x_test.arrow\) is not an image file"):
        open_images(path).read("b.jpg")


def test_the_digest_of_a_packed_image_follows_its_bytes_not_its_time(packed, tables, tmp_path):
    for place in (packed, tables):
        copy = Path(shutil.copytree(place, tmp_path / place.name))
        before = open_images(copy)
        os.utime(next(iter(sorted(copy.glob("*.*")))), ns=(1, 1))
        after = open_images(copy)
        digests = [after.digest(name) for name in after.names]
        assert digests == [before.digest(name) for name in before.names] and len(
            set(digests)
        ) == len(digests)


def test_no_image_of_another_folder_is_packed(data, tmp_path):
    """Of val alone, other/ might be a folder around all images."""
    files = [
        f"{'other' if split == 'train' else 'own'}/{file}"
        for file, split in zip(data.table.images.file, data.table.images.split, strict=True)
    ]
    listed = CaptionTable("x", data.table.images.assign(file=files), data.table.captions)
    for file in data.table.images.file:
        (tmp_path / "x/other").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "x/other" / file)
    with pytest.raises(
        UserError, match="^8 of 8 images cannot be used; the first: own/red_val0.png is"
    ):
        shards.write(listed, open_images(tmp_path / "x"), tmp_path / "packed", ("val",))
    assert not (tmp_path / "packed").exists()


if __name__ == "__main__":
    train(Toy(), Path(sys.argv[1]), Tokenizer(sys.argv[2], 12, fixed=True), 40, Path(sys.argv[3]))
