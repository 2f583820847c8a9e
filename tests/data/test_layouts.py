"""Every published layout is read into the same table and written back; broken ones are refused with
a sentence.
"""

import contextlib
import csv
import io
import json
import os

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbhelpers.data import layout_writers, layouts, resplits
from nbhelpers.data.rows import UNPRINTABLE, image_ids, scene_of
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.runs.commands import main

FILES = {
    "airport_1.jpg": "train",
    "airport_2.jpg": "train",
    "pond_7.jpg": "train",
    "pond_8.jpg": "val",
    "00017.jpg": "test",
    "school_3.jpg": "test",
}


def captions_of(file):
    return [f"{word} of {file} ." for word in ("view", "picture", "image", "scene", "photograph")]


def table():
    images = [(image_ids([file])[0], file, split, scene_of(file)) for file, split in FILES.items()]
    captions = [(file[:-4], text) for file in FILES for text in captions_of(file)]
    return CaptionTable(
        "tiny",
        pd.DataFrame(images, columns=["image_id", "file", "split", "scene"]),
        pd.DataFrame(captions, columns=["image_id", "text"]),
    )


def same(a, b):
    """Equal up to the order in which images are listed."""
    assert a.fingerprint() == b.fingerprint()
    key = ["image_id", "file", "split", "scene"]
    pd.testing.assert_frame_equal(*(t.images.sort_values(key, ignore_index=True) for t in (a, b)))
    for image_id in a.images.image_id:
        assert list(a.captions.text[a.captions.image_id == image_id]) == list(
            b.captions.text[b.captions.image_id == image_id]
        )
    return True


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def karpathy(**changes):
    """A good karpathy file; `changes` replace fields of its first image, None removes one."""
    images = [
        {
            "filename": file,
            "imgid": i,
            "split": split,
            "sentences": [{"raw": t} for t in captions_of(file)],
        }
        for i, (file, split) in enumerate(FILES.items())
    ]
    images[0].update(changes)
    images[0] = {field: value for field, value in images[0].items() if value is not None}
    return {"images": images, "dataset": "tiny"}


def in_karpathy(folder):
    return put(folder / "dataset_tiny.json", karpathy())


def in_precomp(folder, per_caption=("train", "val", "test")):
    for split in ("train", "val", "test"):
        files = [file for file in FILES if FILES[file] == split]
        lines = "".join(text + "\n" for file in files for text in captions_of(file))
        put(folder / "tiny_precomp" / f"{split}_caps.txt", lines)
        names = [file for file in files for _ in range(5 if split in per_caption else 1)]
        put(folder / "tiny_precomp" / f"{split}_filename.txt", "\n".join(names))
    return folder / "tiny_precomp"


def in_rows(folder):
    train = [
        {"image": file, "caption": text, "image_id": i, "label_name": scene_of(file), "label": i}
        for i, file in enumerate(FILES)
        if FILES[file] == "train"
        for text in captions_of(file)
    ]
    put(folder / "tiny_train.json", train)
    for split in ("val", "test"):
        put(
            folder / f"tiny_{split}.json",
            [
                {"image": file, "caption": captions_of(file)}
                for file in FILES
                if FILES[file] == split
            ],
        )
    return folder


def in_lavis(folder):
    put(
        folder / "tiny_train.json",
        [
            {"image": file, "caption": text, "image_id": file}
            for file in FILES
            if FILES[file] == "train"
            for text in captions_of(file)
        ],
    )
    for split in ("val", "test"):
        files = [file for file in FILES if FILES[file] == split]
        put(
            folder / f"tiny_{split}.json",
            [{"image": file, "image_id": i} for i, file in enumerate(files)],
        )
        put(
            folder / f"tiny_{split}_gt.json",
            {
                "images": [{"id": i} for i in range(len(files))],
                "annotations": [
                    {"id": 10 * i + k, "image_id": i, "caption": text}
                    for i, file in reversed(list(enumerate(files)))
                    for k, text in enumerate(captions_of(file))
                ],
            },
        )
    return folder


def in_csv(folder, text="image,split,caption\n"):
    for file, split in FILES.items():
        text += "".join(f'{file},{split},"{caption}"\n' for caption in captions_of(file))
    return put(folder / "tiny.csv", text)


MAKERS = {
    "karpathy": in_karpathy,
    "precomp": in_precomp,
    "rows": in_rows,
    "lavis": in_lavis,
    "csv": in_csv,
}


@pytest.mark.parametrize("layout", MAKERS)
def test_layout_is_recognised_and_read(layout, tmp_path):
    path = MAKERS[layout](tmp_path / "tiny")
    reading = layouts.scan(path)
    assert (reading.layout, reading.problems, reading.table.name) == (layout, [], "tiny")
    assert same(reading.table, table())
    assert same(layouts.read(path, layout), table())


def test_layouts_agree_on_the_fingerprint(tmp_path):
    prints = {
        layouts.read(make(tmp_path / layout)).fingerprint() for layout, make in MAKERS.items()
    }
    assert prints == {table().fingerprint()}


@pytest.mark.parametrize("layout", layout_writers.WRITABLE)
def test_round_trip(layout, tmp_path):
    path = tmp_path / ("dataset_tiny.json" if layout == "karpathy" else "tiny")
    layout_writers.write(table(), path, layout)
    reading = layouts.scan(path)
    assert reading.layout == layout and not reading.problems and same(reading.table, table())


# of several captions in one text, which are not read as they are written
MARKS = dict.fromkeys(map(ord, "[({|#<"))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), layout=st.sampled_from(layout_writers.WRITABLE))
def test_round_trip_of_any_captions(data, layout, tmp_path_factory):
    files = data.draw(
        st.lists(
            st.from_regex(r"[a-zé]{1,5}_[0-9]{1,3}\.(jpg|tif)", fullmatch=True),
            min_size=1,
            max_size=6,
            unique_by=lambda file: file[:-4],
        )
    )
    text = st.text(min_size=1, max_size=30).map(
        lambda t: UNPRINTABLE.sub(" ", t).translate(MARKS) + "x"
    )
    rows = [
        (file[:-4], file, data.draw(st.sampled_from(layouts.SPLITS)), scene_of(file))
        for file in files
    ]
    captions = [
        (file[:-4], caption)
        for file in files
        for caption in data.draw(st.lists(text, min_size=1, max_size=7))
    ]
    any_table = CaptionTable(
        "tiny",
        pd.DataFrame(rows, columns=["image_id", "file", "split", "scene"]),
        pd.DataFrame(captions, columns=["image_id", "text"]),
    )
    path = tmp_path_factory.mktemp("any") / (
        "dataset_tiny.json" if layout == "karpathy" else "tiny"
    )
    layout_writers.write(any_table, path, layout)
    assert same(layouts.read(path), any_table)


def test_a_table_of_ones_own_as_people_write_it(tmp_path):
    """Semicolons or tabs, columns in any order and case, blank lines, a class, a comma in a
    caption, one caption a line in a cell.
    """
    text = (
        'Class;Caption ; image;SPLIT\r\nharbour;"two boats, ""moored""";p/a.jpg;train\r\n\r\n;"one'
        ' boat\n a pier";p/a.jpg;train\r\n;a pond;pond_1.tif;test\r\n'
    )
    for delimiter in ";\t":
        reading = layouts.scan(put(tmp_path / "Our town.csv", text.replace(";", delimiter)))
        assert (reading.layout, reading.table.name, reading.problems) == ("csv", "our_town", [])
        assert reading.table.images.values.tolist() == [
            ["a", "p/a.jpg", "train", "harbour"],
            ["pond_1", "pond_1.tif", "test", "pond"],
        ]
        assert list(reading.table.captions.text) == [
            'two boats, "moored"',
            "one boat",
            "a pier",
            "a pond",
        ]
    assert layouts.read(tmp_path).name == "our_town"  # the only table of its folder
    put(tmp_path / "dataset_tiny.json", karpathy())
    # beside a published layout, a table may be anything
    assert layouts.read(tmp_path).name == "tiny"


def test_a_table_without_splits_is_split_by_a_hash(tmp_path):
    rows = [f"pond_{n}.jpg,a pond\n" for n in range(2000)]
    reading = layouts.scan(put(tmp_path / "x.csv", "image,caption\n" + "".join(rows)))
    split = reading.table.images.set_index("file").split
    assert {name: round(count / 2000, 1) for name, count in split.value_counts().items()} == {
        "train": 0.8,
        "val": 0.1,
        "test": 0.1,
    }
    assert "tells a split: a tenth" in reading.notes[0] and not reading.problems
    fewer = (
        layouts.read(put(tmp_path / "y.csv", "image,caption\n" + "".join(rows[::-3])))
        .images.set_index("file")
        .split
    )
    assert (fewer == split[fewer.index]).all()
    # pinned: another rule would test on other images under the same name
    assert list(split.index[split == "test"][:4]) == [
        "pond_0.jpg",
        "pond_5.jpg",
        "pond_46.jpg",
        "pond_52.jpg",
    ]


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            "a.jpg,a plane\n",
            "no column image and no column caption; its first line must .* but is 'a.jpg,a plane'",
        ),
        ("image,words\na.jpg,a plane\n", "no column caption;"),
        ('image,caption\na.jpg,"a plane\n', "no readable CSV .line 2: .*double quotes"),
        ('image,caption\na.jpg,"a" plane\n', "no readable CSV .line 2: "),
        (
            "image,caption\na.jpg,a plane, a car\na.jpg,a plane\n",
            "1 rows have more or fewer cells .* .first: line 2 of x.csv.; put captions that",
        ),
        ("image,caption\na.jpg\nb.jpg,a plane\n", "1 rows have more or fewer cells"),
        ("image,caption\n,a plane\n", "1 rows have no file name .first: line 2"),
        ("image,caption\n..\\a.jpg,a plane\n", "1 file names leave the image folder"),
        (
            "image,caption,split\na.jpg,a plane,tset\nb.jpg,a plane,\n",
            "2 images have an unknown split .first: a.jpg: 'tset'",
        ),
        (
            "image,caption,split\na.jpg,a plane,train\na.jpg,a car,test\n",
            "1 rows put an image into a second split .first: a.jpg: train and",
        ),
        ("image,caption\na.jpg,\n", "1 of 1 captions are empty"),
        ("image,caption\n", "no caption at all"),
        ("", "is empty"),
    ],
)
def test_a_table_that_cannot_be_used(text, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as caught:
        layouts.read(put(tmp_path / "x.csv", text))
    assert "\n" not in str(caught.value)


def test_nwpu_takes_class_folders_and_all_five_captions(tmp_path):
    row = {
        "filename": "airplane_001.jpg",
        "imgid": 0,
        "split": "train",
        "raw": "a",
        "raw_1": "b",
        "raw_2": "c",
        "raw_3": "d",
        "raw_4": "e",
    }
    data = {
        "airplane": [row],
        "storage tank": [row | {"filename": "storage tank_001.jpg", "split": "test"}],
    }
    reading = layouts.scan(put(tmp_path / "dataset_nwpu.json", data))
    assert (reading.layout, reading.table.name, reading.problems) == ("nwpu", "nwpu", [])
    assert list(reading.table.images.file) == [
        "airplane/airplane_001.jpg",
        "storage tank/storage tank_001.jpg",
    ]
    assert list(reading.table.images.scene) == ["airplane", "storage tank"]
    assert list(reading.table.captions.text) == list("abcde") * 2


def test_tokens_stand_in_for_raw_and_nothing_else_is_needed(tmp_path):
    data = karpathy(
        imgid=None,
        sentences=[{"tokens": ["many", "planes"]}, {"raw": "raw wins", "tokens": ["no"]}],
    )
    texts = layouts.read(put(tmp_path / "d.json", data)).captions.text
    assert list(texts[:2]) == ["many planes", "raw wins"]


@pytest.mark.parametrize(
    "file, scene",
    [
        ("airport_1.jpg", "airport"),
        ("train/bridge_942.tif", "bridge"),
        ("dense_residential_12.png", "dense_residential"),
        ("agricultural01.tif", "agricultural"),
        ("00017.jpg", "00017.jpg"),
        ("a/1_2.jpg", "a/1_2.jpg"),
        ("airport.jpg", "airport.jpg"),
    ],
)
def test_scene_of_a_file_name(file, scene):
    assert scene_of(file) == scene


def test_a_scene_class_is_cleaned_and_an_empty_one_is_none(tmp_path):
    for listed, scene in ((" a\u2028b\ud800", "a b"), (" ", "airport"), (7, "airport")):
        path = put(tmp_path / "d.json", karpathy(**{"class": listed}))
        assert layouts.read(path).images.scene[0] == scene


def test_ids_are_stems_unless_stems_repeat():
    assert image_ids(["a/x.jpg", "b/y.tif"]) == ["x", "y"]
    assert image_ids(["a/x.jpg", "b/x.jpg"]) == ["a/x", "b/x"]
    assert image_ids(["x.jpg", "x.tif"]) == ["x.jpg", "x.tif"]


# ---- traps of the published files ----


def test_precomp_decides_by_the_counts(tmp_path):
    reading = layouts.scan(in_precomp(tmp_path, per_caption=("test",)))  # the published UCM folder
    assert same(reading.table, table())
    assert sum("one name per image" in note for note in reading.notes) == 2  # train and val


@pytest.mark.parametrize("names", [1, 2, 4, 14, 16])
def test_precomp_refuses_other_counts(names, tmp_path):
    folder = in_precomp(tmp_path)
    put(folder / "train_filename.txt", "".join(f"a_{i}.jpg\n" for i in range(names)))
    with pytest.raises(
        UserError, match=f"15 captions and train_filename.txt {names} names.*same release"
    ):
        layouts.read(folder)


def test_precomp_lacking_half_of_a_pair(tmp_path):
    folder = in_precomp(tmp_path)
    (folder / "test_filename.txt").unlink()
    with pytest.raises(UserError, match="no test_filename.txt beside it"):
        layouts.read(folder)


def test_precomp_keeps_empty_lines_and_unicode_line_separators_in_place(tmp_path):
    folder = put(
        tmp_path / "p" / "test_caps.txt", "one\u2028still one\r\n\r\nthree\x0bstill three\n"
    ).parent
    put(folder / "test_filename.txt", "a_1.jpg\r\na_2.jpg\r\na_3.jpg\r\n")
    assert list(layouts.scan(folder).table.captions.text) == [
        "one still one",
        "",
        "three still three",
    ]


def harma(n_val):
    data = karpathy()
    for i, image in enumerate(data["images"]):
        if image["split"] == "test":
            image["harma_split"] = "test"
        else:
            image["harma_split"] = "val" if i < n_val else "train"
            image["split"] = "train"
    return data


def test_resplit_field_is_taken_where_split_has_no_val(tmp_path):
    reading = layouts.scan(put(tmp_path / "d.json", harma(n_val=1)))
    assert dict(reading.table.images.split.value_counts()) == {"train": 3, "test": 2, "val": 1}
    (note,) = (note for note in reading.notes if "harma_split" in note)
    assert "Images that move: 1 from train to val. Test is the same, 2 images" in note


def test_resplit_field_is_not_taken_where_split_has_val_or_the_field_is_not_everywhere(tmp_path):
    with_val, partial = harma(1), harma(1)
    with_val["images"][2]["split"] = "val"
    del partial["images"][3]["harma_split"]
    assert list(layouts.read(put(tmp_path / "a.json", with_val)).images.split)[:3] == [
        "train",
        "train",
        "val",
    ]
    assert "val" not in set(layouts.read(put(tmp_path / "b.json", partial)).images.split)


def test_images_that_move_between_two_splits_are_counted(tmp_path, capsys):
    """Names count without folder and ending; the command says it, too."""
    other = karpathy()
    for image in other["images"]:
        image["filename"] = f"{image['split']}/{image['filename'].replace('.jpg', '.tif')}"
    same, moved = put(tmp_path / "a.json", karpathy()), put(tmp_path / "b.json", other)
    counts = resplits.moves(layouts.read(same), layouts.read(moved))
    assert set(counts) == {("train", "train"), ("val", "val"), ("test", "test")}
    assert resplits.sentence(counts) == (
        "No image moves. Test is the same, 2 images, so only training differs."
    )
    tests = [image for image in other["images"] if image["split"] == "test"]
    tests[0]["split"] = "val"
    moved = put(tmp_path / "b.json", other)
    argv = ["data", "check", "--captions", str(moved), "--against"]
    assert main([*argv, str(same)]) == 0
    said = capsys.readouterr().out
    assert "Images that move: 1 from test to val. Test differs: 1 images are in both." in said
    assert main([*argv, str(same), "--json"]) == 0
    assert {"from": "test", "to": "val", "images": 1} in json.loads(capsys.readouterr().out)[
        "moves"
    ]
    other["images"] = other["images"][:-1]
    gone = resplits.moves(layouts.read(same), layouts.read(put(tmp_path / "b.json", other)))
    assert sum(gone.values()) == 6 and sum(new == "no split" for _, new in gone) == 1


def test_splits_of_two_sets_are_not_compared(tmp_path, capsys):
    other = karpathy()
    for number, image in enumerate(other["images"]):
        image["filename"] = f"x_{number}.png"
    one, two = put(tmp_path / "a.json", karpathy()), put(tmp_path / "b.json", other)
    argv = ["data", "check", "--captions", str(one), "--against"]
    assert main([*argv, str(two)]) == 1
    assert "have no file name in common; compare two splits of one set" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def many(images, empty_of_train, empty_of_test=0):
    rows = [
        {
            "filename": f"a_{i}.jpg",
            "split": "test" if i < 10 else "train",
            "sentences": [{"raw": f"caption {i} {k}"} for k in range(5)],
        }
        for i in range(images)
    ]
    for row in rows[10 : 10 + empty_of_train] + rows[:empty_of_test]:
        row["sentences"] = [{"raw": " "}] * 5
    return {"images": rows}


def test_empty_captions_are_counted_and_dropped_from_training_only(tmp_path):
    path = put(tmp_path / "d.json", many(400, empty_of_train=2, empty_of_test=1))
    reading = layouts.scan(path)
    assert len(reading.table.captions) == 2000 and not reading.problems
    assert "15 captions of 3 images are empty; training drops them." in reading.notes
    read = layouts.read(path)
    assert read.counts().loc["train"].tolist() == [388, 1940] and read.counts().loc[
        "test"
    ].tolist() == [10, 50]


def test_more_than_one_percent_empty_is_an_error(tmp_path):
    # exactly 1 %
    assert not layouts.scan(put(tmp_path / "a.json", many(400, empty_of_train=4))).problems
    with pytest.raises(UserError, match="25 of 2000 captions are empty .*more than 1%"):
        layouts.read(put(tmp_path / "b.json", many(400, empty_of_train=5)))


def test_lavis_captions_follow_their_id_not_their_order(tmp_path):
    path = in_lavis(tmp_path)
    put(
        path / "tiny_test.json",
        [{"image": "school_3.jpg", "image_id": 1}, {"image": "00017.jpg", "image_id": "0"}],
    )
    assert same(layouts.read(path), table())


def test_lavis_truth_without_listed_images(tmp_path):
    path = in_lavis(tmp_path)
    put(path / "tiny_test.json", [{"image": "00017.jpg", "image_id": 0}])
    with pytest.raises(UserError, match="1 annotated images are not listed .first: image_id 1"):
        layouts.read(path)
    (path / "tiny_test.json").unlink()
    put(
        path / "tiny_test_gt.json",
        {
            "images": [{"id": 5, "file_name": "00017.jpg"}],
            "annotations": [{"image_id": 5, "caption": "alone"}],
        },
    )
    assert layouts.read(path).split("test").captions.text.tolist() == ["alone"]


def test_one_file_leads_to_its_siblings_and_not_to_other_sets(tmp_path):
    in_rows(tmp_path)
    put(tmp_path / "zoo_test.json", [{"image": "x_1.jpg", "caption": ["x"]}])
    assert same(layouts.read(tmp_path / "tiny_test.json"), table())
    with pytest.raises(UserError, match="several sets .tiny_.*, zoo_"):
        layouts.read(tmp_path)


@pytest.mark.parametrize("layout", ["karpathy", "rows"])
def test_a_scene_class_of_its_own_field_goes_before_the_file_name(layout, tmp_path):
    classes = table().images.assign(scene=["farmland", "airport", "00", "farmland", "pond", "pond"])
    written = CaptionTable("tiny", classes, table().captions)
    path = tmp_path / ("d.json" if layout == "karpathy" else "d")
    layout_writers.write(written, path, layout)
    assert same(layouts.read(path), written)


# ---- one rule for every reader ----

SPLIT_OF = {
    "train": ["airport_1.jpg", "airport_2.jpg", "pond_7.jpg"],
    "val": ["pond_8.jpg"],
    "test": ["00017.jpg", "school_3.jpg"],
}


def lines_of(files, text="image,caption\n"):
    return text + "".join(f"{file},{caption}\n" for file in files for caption in captions_of(file))


def objects_of(files):
    return "".join(
        json.dumps({"file_name": file, "text": text}) + "\n"
        for file in files
        for text in captions_of(file)
    )


def coco_of(files, first=7):
    ids = {file: first + i for i, file in enumerate(files)}
    return {
        "info": {},
        "images": [{"id": ids[file], "file_name": file} for file in files],
        "annotations": [
            {"id": i, "image_id": ids[file], "caption": text}
            for i, (text, file) in enumerate(
                (text, file) for file in files for text in captions_of(file)
            )
        ],
    }


NAMES = [
    ("tiny_train", "tiny_val", "tiny_test"),
    ("tiny-training", "tiny-validation", "tiny-testing"),
    ("Tiny.Train", "tiny.dev", "TINY.test"),
    ("tiny_train2017", "tiny_valid2017", "tiny_test2017"),
]
PARTS = {
    "csv": (".csv", lines_of),
    "tsv": (".tsv", lambda files: lines_of(files).replace(",", "\t")),
    "rows": (".jsonl", objects_of),
    "coco": (".json", coco_of),
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", PARTS)
def test_the_splits_of_one_set_lie_beside_each_other(kind, names, tmp_path):
    suffix, content = PARTS[kind]
    for split, name in zip(layouts.SPLITS, names, strict=True):
        put(tmp_path / (name + suffix), content(SPLIT_OF[split]))
    for path in (tmp_path, *tmp_path.iterdir()):
        reading = layouts.scan(path)
        assert (reading.layout, reading.problems) == ("csv" if kind == "tsv" else kind, [])
        assert same(reading.table, table()) and reading.table.name == "tiny"
        assert not reading.notes


@pytest.mark.parametrize(
    "suffix, content",
    [
        *PARTS.values(),
        (".json", lambda files: [{"image": file, "caption": captions_of(file)} for file in files]),
        (
            ".json",
            lambda files: {
                "images": [{"filename": file, "sentences": captions_of(file)} for file in files]
            },
        ),
    ],
)
def test_without_a_split_anywhere_a_hash_splits_and_it_is_noted(suffix, content, tmp_path):
    files = [f"pond_{n}.jpg" for n in range(59)]
    reading = layouts.scan(put(tmp_path / f"town{suffix}", content(files)))
    test = list(reading.table.images.file[reading.table.images.split == "test"])
    assert (
        test == ["pond_0.jpg", "pond_5.jpg", "pond_46.jpg", "pond_52.jpg"] and not reading.problems
    )
    assert [note for note in reading.notes if f"nor the name town{suffix} tells a split" in note]
    advised = put(tmp_path / "b" / f"town_test{suffix}", content(files))  # a split in the name
    assert set(layouts.read(advised).images.split) == {"test"} and not layouts.scan(advised).notes


def test_a_split_in_the_rows_goes_before_the_name_of_the_file(tmp_path):
    path = put(
        tmp_path / "town_test.csv",
        "image,caption,split\na.jpg,a,Train\nb.jpg,b,restval\nc.jpg,c,dev\nd.jpg,d, TEST \n",
    )
    assert list(layouts.read(path).images.split) == ["train", "train", "val", "test"]
    lines = "".join(
        json.dumps({"image": f"{n}.jpg", "caption": "a", "split": n}) + "\n"
        for n in ("train", "Valid")
    )
    assert list(layouts.read(put(tmp_path / "x.jsonl", lines)).images.split) == ["train", "val"]


@pytest.mark.parametrize(
    "word, split", [("restval", "train"), ("VALIDATION", "val"), ("dev", "val")]
)
def test_split_words_in_every_layout(word, split, tmp_path):
    row = {"filename": "a_1.jpg", "split": word, "raw": "a", "sentences": [{"raw": "a"}]}
    paths = [
        put(tmp_path / "dataset_a.json", {"images": [row]}),
        put(tmp_path / "n.json", {"pond": [row]}),
        put(tmp_path / "c.csv", f"image,caption,split\na_1.jpg,a,{word}\n"),
        put(tmp_path / f"s_{word}.json", [{"image": "a_1.jpg", "caption": "a"}]),
        put(tmp_path / "p" / f"{word}_caps.txt", "a\n").parent,
    ]
    put(tmp_path / "p" / f"{word}_filename.txt", "a_1.jpg\n")
    assert [list(layouts.read(path).images.split) for path in paths] == [[split]] * len(paths)


def test_two_files_of_one_split_are_refused_and_the_advice_helps(tmp_path):
    put(tmp_path / "t_val.csv", "image,caption\na.jpg,a\n")
    put(tmp_path / "t_valid.csv", "image,caption\nb.jpg,b\n")
    with pytest.raises(
        UserError,
        match="t_val.csv and t_valid.csv are both of the split val; remove one .* or write both",
    ):
        layouts.read(tmp_path)
    put(tmp_path / "t_val.csv", "image,caption\na.jpg,a\nb.jpg,b\n")
    (tmp_path / "t_valid.csv").unlink()
    assert len(layouts.read(tmp_path)) == 2


def test_a_file_of_another_layout_in_the_set_is_refused_and_the_advice_helps(tmp_path):
    put(tmp_path / "t_train.json", [{"image": "a.jpg", "caption": "a"}])
    stray = put(tmp_path / "t_val.json", {"images": [], "categories": []})
    with pytest.raises(
        UserError,
        match="t_val.json does not belong to the layout of t_train.json; move it to another",
    ):
        layouts.read(tmp_path)
    stray.parent.joinpath("elsewhere").mkdir()
    stray.rename(tmp_path / "elsewhere" / stray.name)
    assert len(layouts.read(tmp_path)) == 1


def test_files_of_the_set_that_are_not_read_are_named_and_the_advice_helps(tmp_path):
    put(tmp_path / "t_train.csv", "image,caption\na.jpg,a\n")
    extra = put(tmp_path / "t_extra.csv", "image,caption\nb.jpg,b\n")
    note = layouts.scan(tmp_path / "t_train.csv").notes[0]
    assert note.startswith("Not read: t_extra.csv beside t_train.csv;") and "t_val.csv" in note
    extra.rename(tmp_path / "t_val.csv")
    reading = layouts.scan(tmp_path / "t_train.csv")
    assert len(reading.table) == 2 and not reading.notes


def test_metadata_in_a_folder_per_split(tmp_path):
    for name in ("train", "validation", "test"):
        put(
            tmp_path / "town" / name / "metadata.jsonl",
            '{"file_name": "1.png", "text": "a field"}\n',
        )
    for path in (tmp_path / "town", tmp_path / "town" / "test" / "metadata.jsonl"):
        table = layouts.read(path)
        assert (
            dict(zip(table.images.file, table.images.split, strict=True))
            == {
                "train/1.png": "train",
                "validation/1.png": "val",
                "test/1.png": "test",
            }
            and table.name == "town"
        )


def test_json_lines(tmp_path):
    text = (
        '{"filename": "1.png", "captions": ["a red field", "red"]}\n\n{"image": "2.png", "caption":'
        ' "a blue field"}\n'
    )
    for name in ("toy_test.jsonl", "toy_test.json"):
        reading = layouts.scan(put(tmp_path / name, text))
        assert (reading.layout, reading.problems, len(reading.table.captions)) == ("rows", [], 3)
        (tmp_path / name).unlink()
    one = layouts.read(put(tmp_path / "one_test.jsonl", '{"image": "2.png", "caption": "a"}'))
    assert list(one.images.file) == ["2.png"]
    with pytest.raises(UserError, match="toy_test.jsonl, line 3, is not readable JSON"):
        layouts.read(
            put(tmp_path / "toy_test.jsonl", '{"image": "1.png", "caption": "a"}\n\n{"image": }\n')
        )


def test_coco_annotations_that_do_not_fit(tmp_path):
    data = coco_of(["a_1.jpg", "a_2.jpg"])
    data["images"].pop()
    with pytest.raises(UserError, match="1 annotated images are not listed .first: image_id 8."):
        layouts.read(put(tmp_path / "a_test.json", data))
    data["annotations"] = data["annotations"][:5]
    assert len(layouts.read(put(tmp_path / "a_test.json", data))) == 1


@pytest.mark.parametrize("ids", ["row ids", "number", "file name", "stem", "own captions"])
def test_ground_truth_is_joined_by_the_ids_that_there_are(ids, tmp_path):
    files = ["val/UCM_3.png", "val/UCM_12.png"]
    known = {
        "row ids": [0, 1],
        "number": [3, 12],
        "stem": ["UCM_3", "UCM_12"],
        "file name": [5, 6],
        "own captions": [8, 9],
    }[ids]
    rows = [{"image": file} for file in files]
    images = [{"id": one} for one in known]
    if ids == "row ids":
        rows = [row | {"image_id": one} for row, one in zip(rows, known, strict=True)]
    if ids == "file name":
        images = [image | {"file_name": file} for image, file in zip(images, files, strict=True)]
    if ids == "own captions":
        rows = [row | {"caption": [f"of {one}"]} for row, one in zip(rows, known, strict=True)]
    put(tmp_path / "toy_test.json", rows)
    put(
        tmp_path / "toy_test_gt.json",
        {
            "images": images,
            "annotations": [{"image_id": one, "caption": f"of {one}"} for one in reversed(known)],
        },
    )
    read = layouts.read(tmp_path)
    assert (
        list(read.captions.text) == [f"of {one}" for one in known]
        and list(read.images.file) == files
    )


def test_row_numbers_are_no_ids(tmp_path):
    """image_id counts the rows, the ground truth counts the files: no caption may move to another
    image.
    """
    put(
        tmp_path / "toy_test.json", [{"image": f"UCM_{n + 1}.png", "image_id": n} for n in range(3)]
    )
    put(
        tmp_path / "toy_test_gt.json",
        {"images": [], "annotations": [{"image_id": n, "caption": f"of {n}"} for n in (1, 2, 3)]},
    )
    assert list(layouts.read(tmp_path).captions.text) == ["of 1", "of 2", "of 3"]
    put(
        tmp_path / "toy_test_gt.json",
        {"images": [], "annotations": [{"image_id": n, "caption": f"of {n}"} for n in (3, 4, 5)]},
    )
    with pytest.raises(UserError, match="images have no sentences"):
        layouts.read(tmp_path)


# ---- lists of lines ----


def put_lists(folder, **lists):
    for name, (files, per_image) in lists.items():
        put(
            folder / f"{name.replace('_', '_caps_', 1) if '_' in name else name + '_caps'}.txt",
            "".join(f"caption {k} of {file}\n" for file in files for k in range(per_image)),
        )
        put(
            folder
            / f"{name.replace('_', '_filename_', 1) if '_' in name else name + '_filename'}.txt",
            "".join(f"{file}\n" for file in files),
        )
    return folder


def test_verify_lists_are_the_authors_train_and_val(tmp_path):
    folder = put_lists(
        tmp_path / "p",
        train=(["0.png", "1.png", "2.png"], 5),
        test=(["3.png"], 5),
        train_verify=(["0.png", "2.png"], 5),
        val_verify=(["1.png"], 5),
    )
    reading = layouts.scan(folder)
    assert dict(zip(reading.table.images.file, reading.table.images.split, strict=True)) == {
        "0.png": "train",
        "2.png": "train",
        "1.png": "val",
        "3.png": "test",
    }
    assert (
        "The authors' lists _verify were taken for train and val, not train_caps.txt, which joins"
        " them." in reading.notes
    )


@pytest.mark.parametrize(
    "plain, verified, expected, noted",
    [
        (
            {"train": "01", "val": "2", "test": "3"},
            {"train": "0", "val": "1"},
            {"train": "01", "val": "2", "test": "3"},
            "Not read: train_caps_verify.txt, val_caps_verify.txt;",
        ),
        (
            {"train": "01", "test": "3"},
            {"val": "1"},
            {"train": "01", "test": "3"},
            "Not read: val_caps_verify.txt;",
        ),
        (
            {"test": "3"},
            {"train": "0", "val": "1"},
            {"train": "0", "val": "1", "test": "3"},
            "taken for train and val.",
        ),
        ({}, {"test": "3"}, {"test": "3"}, "taken for test."),
    ],
)
def test_verify_lists_beside_other_lists(plain, verified, expected, noted, tmp_path):
    lists = {split: (list(files), 1) for split, files in plain.items()}
    lists |= {f"{split}_verify": (list(files), 1) for split, files in verified.items()}
    reading = layouts.scan(put_lists(tmp_path / "p", **lists))
    found = reading.table.images.groupby("split").file.agg("".join).to_dict()
    assert found == expected and any(noted in note for note in reading.notes)


def test_lists_that_are_not_read_are_named(tmp_path):
    folder = put_lists(tmp_path / "p", test=(["3.png"], 1))
    put(folder / "extra_caps.txt", "a\n")
    assert (
        "Not read: extra_caps.txt; only lists of train, val and test are."
        in layouts.scan(folder).notes
    )


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n", "\r\n\r\n", "\n \n"])
def test_blank_lines_at_the_end_of_a_list_are_no_captions(end, tmp_path):
    for per_image in (1, 5):
        folder = put_lists(tmp_path / f"p{per_image}", test=(["1.png", "2.png"], per_image))
        for name in ("test_caps.txt", "test_filename.txt"):
            put(folder / name, (folder / name).read_text().rstrip("\n") + end)
        assert len(layouts.read(folder).captions) == 2 * per_image


def test_an_empty_caption_at_the_end_of_a_list_stays(tmp_path):
    folder = put(tmp_path / "p" / "test_caps.txt", "one\n\n\n\n").parent
    put(folder / "test_filename.txt", "1.png\n2.png\n")
    assert list(layouts.scan(folder).table.captions.text) == ["one", ""]


def test_blank_rows_of_a_table_are_no_captions(tmp_path):
    path = put(tmp_path / "x_test.csv", "image,caption\n\na.jpg,a\n,\n , \nb.jpg,b\n\n\n")
    assert list(layouts.read(path).captions.text) == ["a", "b"]


# ---- several captions in one text ----


@pytest.mark.parametrize(
    "packed",
    [
        "['red', 'a field']",
        '["red", "a field"]',
        "['red' 'a field']",
        "red\na field",
        "red\r\n\r\na field\r\n",
    ],
)
def test_packed_captions_in_every_layout(packed, tmp_path):
    line = io.StringIO()
    csv.writer(line).writerow(["a_1.jpg", packed, "test"])
    row = {"filename": "a_1.jpg", "split": "test", "raw": packed, "sentences": [{"raw": packed}]}
    paths = [
        put(tmp_path / "c.csv", "image,caption,split\n" + line.getvalue()),
        put(tmp_path / "n.json", {"pond": [row]}),
        put(tmp_path / "dataset_a.json", {"images": [row]}),
        put(tmp_path / "l_test.jsonl", json.dumps({"image": "a_1.jpg", "caption": packed}) + "\n"),
        put(tmp_path / "r_test.json", [{"image": "a_1.jpg", "caption": packed}]),
        put(
            tmp_path / "o_test.json",
            {
                "images": [{"id": 1, "file_name": "a_1.jpg"}],
                "annotations": [{"image_id": 1, "caption": packed}],
            },
        ),
    ]
    if "\n" not in packed:
        paths.append(put(tmp_path / "p" / "test_caps.txt", packed + "\n").parent)
        put(tmp_path / "p" / "test_filename.txt", "a_1.jpg\n")
    for path in paths:
        reading = layouts.scan(path)
        assert list(reading.table.captions.text) == ["red", "a field"] and not reading.problems
        assert (
            "1 texts held several captions (first: of " in reading.notes[-1]
            and "read as 2 captions" in reading.notes[-1]
        )


@pytest.mark.parametrize(
    "packed, words",
    [
        (
            "['it's red', 'a field']",
            "2 texts begin as a list of captions but are none .first: of a_1.jpg",
        ),
        (
            "red | a field",
            r"2 captions hold a mark as if several were joined by it .first: of a_1.jpg, '\|'",
        ),
        ("red ### a field", "2 captions hold a mark"),
        ("red <SEP> a field", "2 captions hold a mark"),
        ("[]", "2 images have no sentences"),
    ],
)
def test_packed_captions_that_cannot_be_divided_are_refused_and_the_advice_helps(
    packed, words, tmp_path
):
    path = tmp_path / "x_test.csv"
    with pytest.raises(UserError, match=words):
        layouts.read(put(path, f'image,caption\na_1.jpg,"{packed}"\na_2.jpg,"{packed}"\n'))
    one_per_row = (
        "image,caption\na_1.jpg,it's red\na_1.jpg,a field\na_2.jpg,it's red\na_2.jpg,a field\n"
    )
    as_json = "image,caption\n" + "".join(
        f'a_{n}.jpg,"[""it\'s red"", ""a field""]"\n' for n in (1, 2)
    )
    for advised in (one_per_row, as_json):
        assert (
            layouts.read(put(path, advised)).captions.text.tolist() == ["it's red", "a field"] * 2
        )


def test_a_mark_in_few_captions_is_a_caption(tmp_path):
    rows = "".join(f"a_{n}.jpg,a | b\n" if n == 0 else f"a_{n}.jpg,a plane\n" for n in range(4))
    assert (
        layouts.read(put(tmp_path / "x_test.csv", "image,caption\n" + rows)).captions.text[0]
        == "a | b"
    )


def test_further_columns_of_captions_are_named_and_the_advice_helps(tmp_path):
    path = put(tmp_path / "x_test.csv", "image,caption,caption_2\na.jpg,a,b\n")
    assert (
        layouts.scan(path)
        .notes[0]
        .startswith("Not read: caption_2 of x_test.csv; write one caption per row")
    )
    put(path, "image,caption\na.jpg,a\na.jpg,b\n")
    assert list(layouts.read(path).captions.text) == ["a", "b"] and not layouts.scan(path).notes


# ---- what is wrong with a file ----


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\xff\xfe", "is empty"),
        (b"{'images': []}", "not readable JSON .line 1"),
        (b'{"images": [', "not readable JSON"),
        (b"\x89PNG\r\n\x1a\n\x00", "holds null bytes"),
        (b"[" * 200_000, "not readable JSON"),
        (b'{"images": ' + b"9" * 5000 + b"}", "not readable JSON"),
        (b"17", "none of the known layouts"),
        (b"null", "none of the known layouts"),
        (b"[]", "none of the known layouts"),
        (b'"images"', "none of the known layouts"),
        (b'{"images": {}}', "none of the known layouts"),
        (b'{"a": [{"b": 1}]}', "none of the known layouts"),
        (b"[1, 2]", "none of the known layouts"),
        (b'{"images": []}', "no caption at all"),
    ],
)
def test_a_file_that_is_no_caption_file(content, words, tmp_path):
    path = tmp_path / "dataset_x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        layouts.read(path)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"filename": None}, "1 rows have no file name (first: images[0])"),
        ({"filename": 17}, "1 rows have no file name"),
        ({"filename": ""}, "1 rows have no file name"),
        ({"split": None}, "1 images have an unknown split (first: airport_1.jpg: None)"),
        ({"split": "tset"}, "1 images have an unknown split (first: airport_1.jpg: 'tset')"),
        ({"split": ["train"]}, "1 images have an unknown split"),
        ({"sentences": None}, "1 images have no sentences (first: airport_1.jpg)"),
        ({"sentences": []}, "1 images have no sentences"),
        ({"sentences": 7}, "1 captions are not text"),
        (
            {"sentences": [7, {"raw": 3}, {}, "good", {"raw": "good"}]},
            "3 captions are not text (first: of airport_1.jpg)",
        ),
        ({"filename": "airport_2.jpg"}, "1 file names are listed twice (first: airport_2.jpg)"),
        ({"filename": "school_3.jpg"}, "1 file names are listed twice (first: school_3.jpg)"),
    ],
)
def test_a_class_of_broken_rows_is_one_sentence(change, sentence, tmp_path):
    path = put(tmp_path / "d.json", karpathy(**change))
    reading = layouts.scan(path)
    assert len(reading.problems) == 1 and sentence in reading.problems[0]
    assert len(reading.table) >= 5  # the good rows are still there to be looked at
    with pytest.raises(UserError) as error:
        layouts.read(path)
    assert reading.problems[0] in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "../../x.jpg",
        "/etc/passwd.jpg",
        "C:/x.jpg",
        "C:\\x.jpg",
        "a\\b.jpg",
        "\\\\host\\x.jpg",
        "a/../../b.jpg",
        "..",
        ".",
        "a/.",
        "a/",
        "a\0b.jpg",
        "a\nb.jpg",
        "a\ud800.jpg",
    ],
)
@pytest.mark.parametrize("layout", ["karpathy", "precomp", "rows", "nwpu"])
def test_names_that_leave_their_folder_are_refused(name, layout, tmp_path):
    row = {"split": "train", "raw": "a", "caption": "a", "sentences": [{"raw": "a"}]}
    row |= {"filename": name, "image": name}
    data = {
        "karpathy": {"images": [row]},
        "rows": [row | {"label": 1}],
        "nwpu": {"pond": [row]},
    }.get(layout)
    path = tmp_path / "tiny_train.json"
    if layout == "precomp":
        if set("\n\0\ud800") & set(name):
            pytest.skip("a list of lines in UTF-8 cannot hold this name")
        put(tmp_path / "train_caps.txt", "a\n")
        path = put(tmp_path / "train_filename.txt", name)
    else:
        put(path, data)
    with pytest.raises(
        UserError, match="1 file names leave the image folder or hold control characters"
    ):
        layouts.read(path)


def test_many_faults_of_one_class_make_one_sentence_that_is_short(tmp_path):
    rows = [
        {"filename": "../" + "x" * 10_000, "split": "train", "sentences": [{"raw": "a"}]}
    ] * 500 + [7, None]
    data = karpathy()
    data["images"] += rows + [
        {"filename": "y" * 10_000, "split": "train"},
        {"filename": "z" * 10_000},
    ]
    problems = layouts.scan(put(tmp_path / "d.json", data)).problems
    assert sorted(problem[:3] for problem in problems) == ["1 i", "1 i", "2 r", "500"]
    assert all(len(problem) < 300 for problem in problems)


def test_control_characters_become_spaces_and_are_counted(tmp_path):
    raw = ["a\x00b", "c\u2028d", "e\ud800f", "g\vh\x85", "\u2708 caf\u00e9 \U0001f6eb \u673a\u573a"]
    reading = layouts.scan(
        put(tmp_path / "d.json", karpathy(sentences=[{"raw": text} for text in raw]))
    )
    assert list(reading.table.captions.text[:5]) == ["a b", "c d", "e f", "g h ", raw[4]]
    assert reading.notes == ["4 captions held control characters; each became a space."]
    assert reading.table.fingerprint() and not reading.problems


@pytest.mark.parametrize(
    "encoding, noted", [("utf-8", False), ("utf-8-sig", False), ("utf-16", False), ("cp1252", True)]
)
def test_encodings(encoding, noted, tmp_path):
    text = json.dumps(karpathy(sentences=[{"raw": "a caf\u00e9 \u2019s roof"}]), ensure_ascii=False)
    (tmp_path / "d.json").write_bytes(text.encode(encoding))
    reading = layouts.scan(tmp_path / "d.json")
    assert reading.table.captions.text[0] == "a caf\u00e9 \u2019s roof"
    assert any("Windows-1252" in note for note in reading.notes) == noted


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "d.json", "wb") as file:
        file.truncate(3 * 2**30)  # sparse: takes no room
    with pytest.raises(UserError, match="3.0 GiB"):
        layouts.read(tmp_path / "d.json")


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        layouts.read(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="holds no caption file of a known layout"):
        layouts.read(tmp_path)
    in_rows(tmp_path)
    (tmp_path / "tiny_val.json").unlink()
    (tmp_path / "tiny_val.json").mkdir()
    with pytest.raises(UserError, match="tiny_val.json is a folder where a file is needed"):
        layouts.read(tmp_path)


def test_an_image_in_two_splits_is_refused(tmp_path):
    in_rows(tmp_path)
    put(tmp_path / "tiny_test.json", [{"image": "airport_1.jpg", "caption": ["x"]}])
    with pytest.raises(
        UserError, match="1 file names are listed twice .first: airport_1.jpg.*in one split"
    ):
        layouts.read(tmp_path)


def test_an_image_in_two_splits_of_precomp_is_refused(tmp_path):
    folder = in_precomp(tmp_path)
    put(folder / "val_filename.txt", "airport_1.jpg\n" * 5)
    with pytest.raises(
        UserError,
        match="5 rows put an image into a second split .first: airport_1.jpg: train and val",
    ):
        layouts.read(folder)


def test_a_named_layout_must_fit(tmp_path):
    with pytest.raises(UserError, match="is in the layout karpathy, not nwpu"):
        layouts.read(in_karpathy(tmp_path), "nwpu")
    with pytest.raises(UserError, match="Unknown layout 'cocoo'; the layouts are karpathy"):
        layouts.read(tmp_path, "cocoo")


ROW = {"filename": "a_1.jpg", "split": "test", "sentences": [{"raw": "a"}]}
HEAD = "image,caption,split\n"
ADVICE = {  # what is wrong, what the message advises, and the files when it was followed
    "row": (
        {"dataset_t.json": {"images": [ROW, 7]}},
        "are not JSON objects .*write each as",
        {"dataset_t.json": {"images": [ROW]}},
    ),
    "cells": (
        {"t.csv": HEAD + "a.jpg,a, b,test\n"},
        "put captions that hold a comma into double quotes",
        {"t.csv": HEAD + 'a.jpg,"a, b",test\n'},
    ),
    "quotes": (
        {"t.csv": HEAD + 'a.jpg,"a" b,test\n'},
        "into double quotes, and double the marks in them",
        {"t.csv": HEAD + 'a.jpg,"""a"" b",test\n'},
    ),
    "columns": (
        {"t.csv": "a.jpg,a,test\n"},
        "first line must name the columns, as in image,caption",
        {"t.csv": HEAD + "a.jpg,a,test\n"},
    ),
    "repeated": (
        {"t.csv": "image,caption,caption\na.jpg,a,b\n"},
        "column 'caption' more than once; rename or remove",
        {"t.csv": "image,caption,other\na.jpg,a,b\n"},
    ),
    "key": (
        {"dataset_t.json": '{"images": [{"filename": "a.jpg", "filename": "b.jpg"}]}'},
        "'filename' twice in one object",
        {"dataset_t.json": {"images": [ROW]}},
    ),
    "name": (
        {"t.csv": HEAD + ",a,test\n"},
        "have no file name .*name the image of each",
        {"t.csv": HEAD + "a.jpg,a,test\n"},
    ),
    "unsafe": (
        {"t.csv": HEAD + "../a.jpg,a,test\n"},
        "list plain relative names without '..'",
        {"t.csv": HEAD + "b/a.jpg,a,test\n"},
    ),
    "split": (
        {"t.csv": HEAD + "a.jpg,a,tset\n"},
        "unknown split .*use one of the words train, .*validation",
        {"t.csv": HEAD + "a.jpg,a,validation\n"},
    ),
    "bare": (
        {"dataset_t.json": {"images": [ROW, ROW | {"filename": "b_1.jpg", "sentences": []}]}},
        "at least one or remove it",
        {"dataset_t.json": {"images": [ROW]}},
    ),
    "text": (
        {"dataset_t.json": {"images": [ROW | {"sentences": [{"raw": 7}]}]}},
        "not text .*write each as a string",
        {"dataset_t.json": {"images": [ROW | {"sentences": [{"raw": "7"}]}]}},
    ),
    "twice": (
        {"dataset_t.json": {"images": [ROW, ROW]}},
        "list every image once",
        {"dataset_t.json": {"images": [ROW]}},
    ),
    "moved": (
        {"t.csv": HEAD + "a.jpg,a,train\na.jpg,b,test\n"},
        "give all captions of an image one split",
        {"t.csv": HEAD + "a.jpg,a,train\na.jpg,b,train\n"},
    ),
    "stray": (
        {"t_test.json": {"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}},
        "list or drop them",
        {
            "t_test.json": {
                "images": [{"id": 1, "file_name": "a.jpg"}],
                "annotations": [{"image_id": 1, "caption": "a"}],
            }
        },
    ),
    "unknown": (
        {"t_test.json": {"a.jpg": ["a"]}},
        "write its captions into a file like town.csv whose first line",
        {"t.csv": HEAD + "a.jpg,a,test\n"},
    ),
    "half": (
        {"test_caps.txt": "a\n"},
        "no test_filename.txt beside it",
        {"test_filename.txt": "a.jpg\n", "test_caps.txt": "a\n"},
    ),
    "counts": (
        {"test_filename.txt": "a.jpg\n", "test_caps.txt": "a\nb\n"},
        "take both files from the same release",
        {"test_filename.txt": "a.jpg\n", "test_caps.txt": "a\n"},
    ),
    "no set": (
        {"notes.md": "a"},
        "name the folder or the file that does",
        {"t.csv": HEAD + "a.jpg,a,test\n"},
    ),
    "text file": ({"t.csv": "\0"}, "save it as UTF-8", {"t.csv": HEAD + "a.jpg,a,test\n"}),
    "json": (
        {"t_test.json": "["},
        "download it again or mend it",
        {"t_test.json": [{"image": "a.jpg", "caption": "a"}]},
    ),
}


@pytest.mark.parametrize("fault", ADVICE)
def test_the_advice_of_each_message_helps(fault, tmp_path):
    wrong, words, mended = ADVICE[fault]
    for name, content in wrong.items():
        put(tmp_path / "wrong" / name, content)
    with pytest.raises(UserError, match=words):
        layouts.read(tmp_path / "wrong")
    for name, content in mended.items():
        put(tmp_path / "mended" / name, content)
    assert len(layouts.read(tmp_path / "mended")) == 1


def test_a_file_of_another_ending(tmp_path):
    with pytest.raises(
        UserError,
        match="captions.txt is neither JSON nor a table .*write its captions into a file like",
    ):
        layouts.read(put(tmp_path / "captions.txt", "a_1.jpg#0\ta plane\n"))
    assert len(layouts.read(put(tmp_path / "town.csv", HEAD + "a_1.jpg,a plane,test\n"))) == 1
    assert len(layouts.read(put(tmp_path / "captions.txt", {"images": [ROW]}))) == 1


def test_the_advice_to_name_a_file_or_a_layout_helps(tmp_path):
    put(tmp_path / "a_test.csv", HEAD + "a.jpg,a,test\n")
    put(tmp_path / "b_test.csv", HEAD + "b.jpg,b,test\n")
    with pytest.raises(
        UserError, match=r"several sets .a_test.csv, b_test.csv.; name one of the files"
    ):
        layouts.read(tmp_path)
    assert [layouts.read(tmp_path / name).name for name in ("a_test.csv", "b_test.csv")] == [
        "a",
        "b",
    ]
    with pytest.raises(UserError, match="is in the layout csv, not rows; name csv or none"):
        layouts.read(tmp_path / "a_test.csv", "rows")
    assert len(layouts.read(tmp_path / "a_test.csv", "csv")) == len(
        layouts.read(tmp_path / "a_test.csv")
    )


FIELDS = [
    "images",
    "annotations",
    "filename",
    "image",
    "file_name",
    "split",
    "harma_split",
    "sentences",
    "raw",
    "tokens",
    "raw_1",
    "caption",
    "image_id",
    "id",
    "label_name",
    "class",
    "dataset",
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from(["train", "test", "a_1.jpg", "../x"]),
    st.text(max_size=3),
)
ANY_JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(
    data=st.one_of(
        ANY_JSON,
        st.lists(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON), min_size=1, max_size=3),
        st.fixed_dictionaries(
            {"images": st.lists(ANY_JSON, max_size=3)},
            optional={"annotations": st.lists(ANY_JSON, max_size=3)},
        ),
    )
)
def test_no_json_makes_more_than_a_sentence(data, tmp_path_factory):
    path = put(tmp_path_factory.getbasetemp() / "any_json" / "tiny_test.json", data)
    with contextlib.suppress(UserError):
        assert layouts.read(path).fingerprint()


# ---- writing ----


def test_write_refuses_what_no_reader_takes(tmp_path):
    with pytest.raises(UserError, match="Cannot write layout 'nwpu'"):
        layout_writers.write(table(), tmp_path / "x", "nwpu")
    bare = table()
    bare = CaptionTable("tiny", bare.images, bare.captions[bare.captions.image_id != "pond_7"])
    with pytest.raises(UserError, match="1 of the images have no captions .first: pond_7"):
        layout_writers.write(bare, tmp_path / "x", "rows")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_part_of_a_set(tmp_path, monkeypatch):
    from pathlib import Path

    written, real = [], Path.write_text

    def full(self, *args, **keywords):
        written.append(self)
        if len(written) == 3:
            raise OSError(28, os.strerror(28))
        return real(self, *args, **keywords)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="disk is full"):
        layout_writers.write(table(), tmp_path / "set", "precomp")
    assert len(written) == 3 and not list((tmp_path / "set").iterdir())
