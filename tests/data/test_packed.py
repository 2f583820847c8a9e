"""Shards and tables: which images are one, how many captions a text holds, which forms are read."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nbhelpers.data import layouts
from nbhelpers.data.archives import open_images
from nbhelpers.data.augment import TestTransform
from nbhelpers.data.streaming import Sampling, ShardDataset
from nbhelpers.errors import UserError

COLOURS = ("red", "green", "blue")


def square(colour, kind="bmp"):
    """All of one kind have one size in bytes if the kind is bmp."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(data, kind)
    return data.getvalue()


def put_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def put_shard(path, rows):
    """`rows` are (name, bytes, caption), a sample each."""
    parts = [
        (
            (f"{key}.img_content", content),
            (f"{key}.img_name", name.encode()),
            (f"{key}.caption", text.encode()),
        )
        for key, (name, content, text) in enumerate(rows)
    ]
    return put_tar(path.with_suffix(".tar"), [part for sample in parts for part in sample])


def put_arrow(path, rows):
    names, images, texts = zip(*rows, strict=True)
    table = pa.table(
        {"image": list(images), "caption": [[text] for text in texts], "image_id": list(names)}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        pa.OSFile(str(path.with_suffix(".arrow")), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    return path.with_suffix(".arrow")


def put_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def structs(rows):
    return [{"bytes": content, "path": name} for name, content, _ in rows]


def put_hub(path, rows):
    return put_parquet(
        path.with_suffix(".parquet"), image=structs(rows), caption=[text for _, _, text in rows]
    )


def put_hub_lists(path, rows):
    return put_parquet(
        path.with_suffix(".parquet"), image=structs(rows), captions=[[text] for _, _, text in rows]
    )


def captions_of(folder):
    """The captions of each encoded image, and how many images there are."""
    reading, store = layouts.scan(folder), open_images(folder)
    assert not reading.problems and sorted(reading.table.images.file) == store.names
    found = {}
    for row in reading.table.images.itertuples():
        own = reading.table.captions.text[reading.table.captions.image_id == row.image_id]
        found.setdefault(store.encoded(row.file), []).append(sorted(own))
    return found


every_layout = pytest.mark.parametrize("put", [put_shard, put_arrow, put_hub, put_hub_lists])


# ---- one name, one image
@every_layout
def test_different_images_of_one_name_are_kept_apart(put, tmp_path):
    rows = [("1.bmp", square(colour), f"a {colour} field") for colour in COLOURS]
    put(tmp_path / "a" / "toy_test", rows)
    assert captions_of(tmp_path / "a") == {content: [[text]] for _, content, text in rows}
    notes = layouts.scan(tmp_path / "a").notes
    assert any("1 file names stand for different images" in note for note in notes)
    put(tmp_path / "b" / "toy_test", rows[::-1])  # names depend on the content, not on the order
    assert layouts.read(tmp_path / "a").fingerprint() == layouts.read(tmp_path / "b").fingerprint()


@every_layout
def test_equal_images_of_one_name_are_one_with_all_captions(put, tmp_path):
    put(
        tmp_path / "toy_test",
        [
            ("1.bmp", square("red"), "one"),
            ("2.bmp", square("blue"), "three"),
            ("1.bmp", square("red"), "two"),
        ],
    )
    assert captions_of(tmp_path) == {square("red"): [["one", "two"]], square("blue"): [["three"]]}
    assert list(layouts.read(tmp_path).images.file) == ["1.bmp", "2.bmp"]


@every_layout
def test_equal_images_of_two_names_are_two(put, tmp_path):
    put(tmp_path / "toy_test", [("1.bmp", square("red"), "one"), ("2.bmp", square("red"), "two")])
    assert captions_of(tmp_path) == {square("red"): [["one"], ["two"]]}


@every_layout
def test_one_name_in_two_splits_is_two_images_if_they_differ(put, tmp_path):
    for split, colour in (("train", "red"), ("test", "blue")):
        put(tmp_path / "a" / f"toy_{split}", [("0.bmp", square(colour), f"a {colour} field")])
        put(tmp_path / "b" / f"toy_{split}", [("0.bmp", square("red"), "a red field")])
    assert captions_of(tmp_path / "a") == {
        square(colour): [[f"a {colour} field"]] for colour in ("red", "blue")
    }
    images = layouts.read(tmp_path / "a").images
    assert dict(zip(images.file, images.split, strict=True)) == {
        "train/0.bmp": "train",
        "test/0.bmp": "test",
    }
    with pytest.raises(
        UserError, match="1 rows put an image into a second split .first: 0.bmp: test and train"
    ):
        layouts.read(tmp_path / "b")


def test_names_told_apart_never_take_a_name_that_is_listed(tmp_path):
    put_hub(
        tmp_path / "train", [("0.bmp", square("red"), "a"), ("test/0.bmp", square("green"), "b")]
    )
    put_hub(tmp_path / "test", [("0.bmp", square("blue"), "c")])
    assert captions_of(tmp_path) == {
        square("red"): [["a"]],
        square("green"): [["b"]],
        square("blue"): [["c"]],
    }


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path):
    path = put_shard(tmp_path / "x_test", [("0.bmp", square("red"), "a")])
    store = open_images(tmp_path)
    assert store.encoded("0.bmp") == square("red")
    put_shard(tmp_path / "x_test", [("0.bmp", square("blue"), "a")])
    with pytest.raises(UserError, match=f"0.bmp .sample 0 of {path.name}. changed since"):
        store.encoded("0.bmp")
    assert open_images(tmp_path).encoded("0.bmp") == square("blue")


# ---- several captions in one text
FIVE = [f"field number {number}" for number in range(5)]


@pytest.mark.parametrize(
    "part, text",
    [
        ("txt", "\n".join(FIVE)),
        ("txt", "\r\n".join(FIVE) + "\r\n\r\n"),
        ("caption", json.dumps(FIVE)),
        ("txt", str(FIVE)),
        ("json", json.dumps(FIVE)),
        ("json", json.dumps({"captions": FIVE})),
        ("json", json.dumps({"caption": "\n".join(FIVE)})),
        ("json", json.dumps({"sentences": [{"raw": text} for text in FIVE]})),
        ("txt", "\ufeff" + "\n".join(FIVE)),
    ],
)
def test_five_captions_of_a_sample_are_five(part, text, tmp_path):
    path = put_tar(
        tmp_path / "test" / "0.tar", [("s0.bmp", square("red")), (f"s0.{part}", text.encode())]
    )
    reading = layouts.scan(path.parent)
    assert list(reading.table.captions.text) == FIVE and list(reading.table.images.split) == [
        "test"
    ]
    dataset = ShardDataset(path.parent, TestTransform(8), Words(), sampling=Sampling(split="test"))
    drawn = set()
    for epoch in range(30):
        dataset.set_epoch(epoch)
        dataset.collate(list(dataset))
        drawn |= set(dataset.tokenizer.seen)
    assert len(dataset) == 1 and drawn == set(FIVE)


class Words:
    """Keeps the texts that it is given."""

    def clean(self, text):
        return text

    def __call__(self, texts):
        self.seen = texts
        return np.zeros((len(texts), 1)), np.ones((len(texts), 1))


@pytest.mark.parametrize(
    "column, value",
    [
        ("captions", FIVE),
        ("captions", json.dumps(FIVE)),
        ("caption", "\n".join(FIVE)),
        ("text", str(FIVE)),
        ("Sentences", FIVE),
        ("sentences", [{"raw": text, "sentid": 1} for text in FIVE]),
    ],
)
def test_five_captions_of_a_row_are_five(column, value, tmp_path):
    put_parquet(
        tmp_path / "test-00000-of-00001.parquet",
        image=structs([("0.bmp", square("red"), "")]),
        **{column: [value]},
    )
    assert captions_of(tmp_path) == {square("red"): [FIVE]}


def test_of_two_columns_of_captions_one_is_read_and_named(tmp_path):
    put_parquet(
        tmp_path / "test.parquet",
        image=structs([("0.bmp", square("red"), "")]),
        text=["other"],
        captions=[FIVE],
    )
    assert captions_of(tmp_path) == {square("red"): [FIVE]}
    assert (
        "The captions of test.parquet were taken from its column captions, not from text."
        in layouts.scan(tmp_path).notes
    )


# ---- forms of shards
def pairs(order=lambda members: members, image="{}.bmp", text="{}.txt"):
    members = [
        (image.format(key), square(colour)) for key, colour in zip("012", COLOURS, strict=False)
    ]
    members += [
        (text.format(key), colour.encode()) for key, colour in zip("012", COLOURS, strict=False)
    ]
    return order(members)


@pytest.mark.parametrize(
    "members",
    [
        pairs(sorted),
        pairs(),
        pairs(lambda members: members[::-1]),
        [
            ("dataset_info.json", b"{}"),
            ("README.txt", b"pairs"),
            ("._0.txt", b"x"),
            ("__meta__/0.txt", b"x"),
            *pairs(sorted),
        ],
        [*pairs(sorted), ("classes.csv", b"0,field")],
        pairs(sorted, "{}.input.bmp", "{}.input.txt"),
        pairs(sorted, "{}.view.bmp", "{}.caption.json.txt"),
        pairs(sorted, "img.{}.bmp", "img.{}.txt"),
        pairs(sorted, "a/v1.0.{}.bmp", "a/v1.0.{}.txt"),
        pairs(sorted, "v1.0/{}.bmp", "v1.0/{}.txt"),
        pairs(sorted, "./{}.BMP", "./{}.TXT"),
        [
            ("0.bmp", square("red")),
            ("0.txt", b"red"),
            ("0.bmp", square("green")),
            ("0.txt", b"green"),
            *pairs(sorted)[4:],
        ],
    ],
    ids=[
        "sorted",
        "images first",
        "reversed",
        "metadata",
        "list of classes",
        "dots",
        "dots in parts",
        "dots in keys",
        "dots in keys of a folder",
        "dots in folders",
        "upper case",
        "keys begin again",
    ],
)
def test_a_shard_is_read_however_its_members_stand(members, tmp_path):
    put_tar(tmp_path / "toy-test-000000.tar", members)
    assert captions_of(tmp_path) == {square(colour): [[colour]] for colour in COLOURS}
    dataset = ShardDataset(tmp_path, TestTransform(8), Words(), sampling=Sampling(split="test"))
    assert len(dataset) == 3 and {(sample.image, *sample.texts) for _, sample in dataset} == {
        (square(colour), colour) for colour in COLOURS
    }


@pytest.mark.parametrize(
    "members, words",
    [
        (pairs(sorted)[1:], "The sample 0 of toy-test-000000.tar has no image"),
        (pairs(sorted)[:-1], "The sample 2 of toy-test-000000.tar has no caption"),
        (
            [*pairs(sorted), ("3.json", b'["a list"]')],
            "The sample 3 of toy-test-000000.tar has no image",
        ),
        (
            [*pairs(sorted), ("4.txt", b"a field")],
            "The sample 4 of toy-test-000000.tar has no image",
        ),
    ],
)
def test_a_sample_that_lacks_a_part_is_named_wherever_it_stands(members, words, tmp_path):
    path = put_tar(tmp_path / "toy-test-000000.tar", members)
    with pytest.raises(UserError, match=words):
        layouts.read(tmp_path)
    with pytest.raises(UserError, match=words):
        list(ShardDataset(path, TestTransform(8), Words(), sampling=Sampling(split="test")))


def test_several_images_of_a_key_are_refused_until_each_has_its_own(tmp_path):
    members = [("0.a.bmp", square("red")), ("0.b.bmp", square("blue")), ("0.txt", b"fields")]
    put_tar(tmp_path / "toy-test-000000.tar", members)
    told = r"sample 0 of .*tar has several images .*\(a.bmp, b.bmp, txt\).*as 0_1.jpg and 0_1.txt"
    with pytest.raises(UserError, match=told):
        layouts.read(tmp_path)
    put_tar(
        tmp_path / "toy-test-000000.tar",
        [
            ("0_1.jpg", square("red", "jpeg")),
            ("0_1.txt", b"fields"),
            ("0_2.jpg", square("blue", "jpeg")),
            ("0_2.txt", b"fields"),
        ],
    )
    assert captions_of(tmp_path) == {
        square(colour, "jpeg"): [["fields"]] for colour in ("red", "blue")
    }


def test_a_json_without_a_caption_is_completed_as_its_message_says(tmp_path):
    image = ("0.bmp", square("red"))
    put_tar(tmp_path / "toy-test-000000.tar", [image, ("0.json", b'{"label": "field"}')])
    with pytest.raises(
        UserError, match="captions, caption, sentences, text or raw; write one there or as .txt"
    ):
        layouts.read(tmp_path)
    for more in (
        [("0.json", b'{"text": "red"}')],
        [("0.json", b'{"label": "field"}'), ("0.txt", b"red")],
    ):
        put_tar(tmp_path / "toy-test-000000.tar", [image, *more])
        assert captions_of(tmp_path) == {square("red"): [["red"]]}


def test_folders_named_after_splits_hold_the_shards_of_a_set(tmp_path):
    for split, colour in (("train", "red"), ("validation", "green"), ("test", "blue")):
        put_tar(
            tmp_path / "toy" / split / "00000.tar",
            [("0.bmp", square(colour)), ("0.txt", colour.encode())],
        )
    reading = layouts.scan(tmp_path / "toy")
    assert reading.table.name == "toy" and list(reading.table.images.split) == [
        "test",
        "train",
        "val",
    ]
    assert captions_of(tmp_path / "toy") == {square(colour): [[colour]] for colour in COLOURS}


def test_the_message_on_a_folder_of_other_tars_speaks_of_them(tmp_path):
    put_tar(tmp_path / "a" / "images.tar", [("0.bmp", square("red")), ("1.bmp", square("blue"))])
    with pytest.raises(
        UserError,
        match="images.tar is no shard, since no key in it has both an image .*and a caption",
    ):
        layouts.read(tmp_path / "a")
    plain = put_shard(tmp_path / "toy_test", [("0.bmp", square("red"), "a")])
    packed = tmp_path / "b" / "toy_test.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(UserError, match="If toy_test.tar.gz is a shard, unpack it to toy_test.tar"):
        layouts.read(tmp_path / "b")
    (tmp_path / "b" / "toy_test.tar").write_bytes(gzip.decompress(packed.read_bytes()))
    assert list(layouts.read(tmp_path / "b").captions.text) == ["a"]


# ---- forms of tables of the hub
ROWS = [(f"{colour}.bmp", square(colour), f"a {colour} field") for colour in COLOURS]
READ = {content: [[text]] for _, content, text in ROWS}


@pytest.mark.parametrize(
    "place",
    [
        "data/validation-00000-of-00001-0123456789abcdef.parquet",
        "val/0000.parquet",
        "default/validation/0000.parquet",
        "VAL-00000-of-00009.PARQUET",
        "dev.parquet",
    ],
)
def test_splits_and_places_of_the_hub(place, tmp_path):
    written = put_hub(tmp_path / "train", ROWS)
    (tmp_path / "toy" / place).parent.mkdir(parents=True)
    written.rename(tmp_path / "toy" / place)
    assert captions_of(tmp_path / "toy") == READ
    reading = layouts.scan(tmp_path / "toy")
    assert reading.table.name == "toy" and set(reading.table.images.split) == {"val"}


def test_a_table_in_a_folder_of_a_split_leads_to_the_other_splits(tmp_path):
    for split, row in (("train", ROWS[0]), ("test", ROWS[1])):
        put_hub(tmp_path / "toy" / split / "0000", [row])
    images = layouts.read(tmp_path / "toy" / "test" / "0000.parquet").images
    assert dict(zip(images.file, images.split, strict=True)) == {
        "red.bmp": "train",
        "green.bmp": "test",
    }
    assert list(layouts.read(tmp_path / "toy" / "test").images.file) == ["green.bmp"]


def test_a_data_set_saved_to_disk_is_read(tmp_path):
    """As `Dataset.save_to_disk`: a stream of arrow in a folder of its split, beside JSON."""
    table = pa.table({"image": structs(ROWS), "text": [text for _, _, text in ROWS]})
    folder = tmp_path / "toy" / "test"
    folder.mkdir(parents=True)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    for name in ("test/dataset_info.json", "test/state.json", "dataset_dict.json"):
        (tmp_path / "toy" / name).write_text("{}")
    assert captions_of(tmp_path / "toy") == captions_of(folder) == READ


def test_images_without_names_are_known_by_their_rows(tmp_path):
    nameless = [(None, content, text) for _, content, text in ROWS]
    put_hub(tmp_path / "train-00000-of-00002", nameless[:2])
    put_hub(tmp_path / "train-00001-of-00002", [*nameless[1:], (None, square("red"), "again red")])
    put_hub(tmp_path / "test-00000-of-00001", nameless[:1])
    images, captions = layouts.read(tmp_path).images, layouts.read(tmp_path).captions
    assert dict(zip(images.file, images.split, strict=True)) == {
        "test/0": "test",
        "train/0": "train",
        "train/1": "train",
        "train/3": "train",
    }
    assert list(captions.text[captions.image_id == "train/0"]) == ["a red field", "again red"]
    assert open_images(tmp_path).encoded("train/3") == square("blue")
    assert (
        "Images without a file name are called by split and row, as test/0."
        in layouts.scan(tmp_path).notes
    )


@pytest.mark.parametrize(
    "images",
    [[name for name, _, _ in ROWS], [{"bytes": None, "path": name} for name, _, _ in ROWS]],
    ids=["paths", "no bytes"],
)
def test_paths_alone_are_refused_with_two_ways_out(images, tmp_path):
    texts = [text for _, _, text in ROWS]
    path = put_parquet(tmp_path / "hub" / "test.parquet", image=images, caption=texts)
    with pytest.raises(
        UserError,
        match="test.parquet holds the names of images .first: red.bmp. but not the images",
    ):
        open_images(tmp_path / "hub")
    (tmp_path / "images").mkdir()  # the first way: a folder of these files
    for name, content, _ in ROWS:
        (tmp_path / "images" / name).write_bytes(content)
    store = open_images(tmp_path / "images")
    assert [store.encoded(file) for file in layouts.read(path).images.file] == list(READ)
    put_parquet(path, image=structs(ROWS), caption=texts)  # the second: their bytes
    assert captions_of(tmp_path / "hub") == READ
    put_parquet(
        path,
        image=[content for _, content, _ in ROWS],
        filename=[name for name, _, _ in ROWS],
        caption=texts,
    )
    assert captions_of(tmp_path / "hub") == READ


def test_a_path_listed_twice_is_refused_where_no_image_shows_that_it_is_the_same(tmp_path):
    path = put_parquet(tmp_path / "test.parquet", image=["1.bmp", "1.bmp"], captions=[["a"], ["b"]])
    with pytest.raises(UserError, match="1 file names are listed twice .first: 1.bmp"):
        layouts.read(path)


def test_the_message_on_columns_speaks_as_the_hub_and_leads_to_a_table_that_is_read(tmp_path):
    path = put_parquet(
        tmp_path / "test.parquet", image=structs(ROWS), description=[text for _, _, text in ROWS]
    )
    told = r"has no column captions, caption, .*image \(struct.*\), descr.* \(string\)\); rename"
    with pytest.raises(UserError, match=told):
        layouts.read(path)
    pq.write_table(pq.read_table(path).rename_columns(["image", "captions"]), path)
    assert captions_of(tmp_path) == READ


def test_of_a_path_on_another_machine_the_last_part_is_the_name(tmp_path):
    paths = ["/home/me/red.bmp", "C:\\data\\green.bmp", "../x/blue.bmp"]
    put_hub(
        tmp_path / "test",
        [(path, content, text) for path, (_, content, text) in zip(paths, ROWS, strict=False)],
    )
    assert captions_of(tmp_path) == READ
    assert list(layouts.read(tmp_path).images.file) == [name for name, _, _ in ROWS]


# ---- streams
def test_different_images_of_one_name_have_different_numbers_in_a_stream(tmp_path):
    rows = [
        ("a_1.bmp", square("red"), "r"),
        ("a_1.bmp", square("blue"), "b"),
        ("a_1.bmp", square("red"), "again"),
    ]
    put_shard(tmp_path / "toy_train", rows)
    dataset = ShardDataset(tmp_path, TestTransform(8), Words())
    drawn = list(dataset)
    batch = dataset.collate(drawn)
    red = [sample.image == square("red") for _, sample in drawn]
    same = batch["image_index"][:, None] == batch["image_index"]
    assert same.tolist() == [[one == other for other in red] for one in red] and set(
        batch["scene"].tolist()
    ) == {0}
