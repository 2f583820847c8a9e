"""Known sets are recognised, found in a user's folder in any usual tree, and checked down to the
pixels.
"""

import dataclasses
import functools
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nbhelpers.data import catalog, layout_writers, layouts
from nbhelpers.data.check import check
from nbhelpers.data.rows import image_ids, scene_of
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError

FILES = {
    "airport_1.tif": "train",
    "airport_2.tif": "train",
    "pond_7.tif": "train",
    "pond_8.tif": "val",
    "00017.tif": "test",
    "school_3.tif": "test",
}


def put_captions(path, files=FILES, name="tiny", per_image=5, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [
        {
            "filename": file,
            "split": split,
            "sentences": [{"raw": f"caption {k} of {file}"} for k in range(per_image)],
        }
        | fields
        for file, split in files.items()
    ]
    path.write_text(json.dumps({"images": images, "dataset": name}))
    return path


def put_images(folder, files=FILES, size=(40, 32), suffix=".jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for shade, file in enumerate(files):
        Image.new("RGB", size, (10 * shade, 90, 200)).save(folder / f"{file[:-4]}{suffix}")
    return folder


def put_zip(path, files=FILES):
    folder = put_images(path.parent / "unpacked")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"imgs/{file.name}")
            file.unlink()
    folder.rmdir()
    return path


def bare_table(name, train, val, test, file="{}.tif"):
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    files = [file.format(i + 1) for i in range(len(splits))]
    ids = image_ids(files)
    images = pd.DataFrame({"image_id": ids, "file": files, "split": splits})
    images["scene"] = images.file.map(scene_of)
    return CaptionTable(name, images, pd.DataFrame({"image_id": ids, "text": "a caption"}))


# ---- the catalogue ----


@pytest.mark.parametrize(
    "name, counts, key, split",
    [
        ("dataset", (1680, 210, 210), "ucm", "published"),
        ("dataset", (1890, 0, 210), "ucm", "published, train and val merged"),
        ("dataset", (8734, 1094, 1093), "rsicd", "published"),
        ("dataset", (4291, 0, 452), "rsitmd", "published"),
        ("dataset", (3435, 856, 452), "rsitmd", "the re-split of PIR and HarMA"),
        ("dataset", (497, 58, 58), "sydney", "published"),
        ("ucm_captions", (10, 0, 2), "ucm", None),
        ("dataset", (10, 0, 2), None, None),
        ("lucmap", (10, 0, 2), None, None),
    ],
)
def test_recognised_by_name_or_by_counts(name, counts, key, split):
    table = bare_table(name, *counts)
    assert catalog.recognise(table) == key
    assert key is None or catalog.KNOWN[key].split_name(table) == split


def test_every_known_set_is_in_the_readme_with_its_counts_and_source():
    text = (Path(__file__).parents[2] / "data" / "README.md").read_text()
    for key, known in catalog.KNOWN.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{key}`"))
        assert known.title in row and known.captions_source in row and known.images_source in row
        assert all("/".join(map(str, counts)) in row for counts in known.splits.values())
        assert known.images_licence in row and known.captions_licence in row
        assert len({sum(counts) for counts in known.splits.values()}) == 1


def test_ucm_classes_come_from_the_numbers():
    table = catalog.name_scenes(bare_table("ucm", 1680, 210, 210), "ucm")
    scenes = dict(zip(table.images.file, table.images.scene, strict=True))
    assert [scenes[f"{n}.tif"] for n in (1, 100, 101, 200, 2001, 2100)] == [
        "agricultural",
        "agricultural",
        "airplane",
        "airplane",
        "tenniscourt",
        "tenniscourt",
    ]
    assert (table.images.scene.value_counts() == 100).all() and table.images.scene.nunique() == 21


@pytest.mark.parametrize(
    "key, file", [("rsicd", "{}.tif"), ("ucm", "9{:04d}.tif"), ("ucm", "airport_{}.tif")]
)
def test_other_names_keep_their_scene(key, file):
    table = bare_table(key, 5, 1, 1, file)
    pd.testing.assert_frame_equal(catalog.name_scenes(table, key).images, table.images)


def test_hold_out_is_a_fifth_by_id_alone():
    table = bare_table("x", 5000, 0, 100)
    held = catalog.hold_out(table)
    counts = held.images.split.value_counts()
    assert counts["test"] == 100 and 0.18 < counts["val"] / 5000 < 0.22
    fewer = catalog.hold_out(CaptionTable("x", table.images[::3], table.captions[::3]))
    assert (fewer.images.split.values == held.images.split.values[::3]).all()
    # pinned: another rule would train on other images under the same name
    assert list(held.images.image_id[held.images.split == "val"][:6]) == [
        "8",
        "9",
        "39",
        "46",
        "47",
        "49",
    ]


# ---- finding a set in a folder ----

CAPTIONS = {
    "file": "dataset_tiny.json",
    "folder": "tiny/dataset.json",
    "case": "Tiny/Dataset_TINY.json",
    "release": "tiny_captions/dataset.json",
}
IMAGES = {
    "zip": "tiny_images.zip",
    "folder": "tiny_images",
    "own": "tiny/imgs",
    "case": "TINY_Images",
    "loose": "tiny",
}


@pytest.mark.parametrize("captions", CAPTIONS)
@pytest.mark.parametrize("images", IMAGES)
def test_find(captions, images, tmp_path):
    wanted = tmp_path / IMAGES[images], tmp_path / CAPTIONS[captions]
    if (captions, images) in (("case", "own"), ("case", "loose")):
        wanted = tmp_path / IMAGES[images].replace("tiny", "Tiny"), wanted[1]
    (put_zip if images == "zip" else put_images)(wanted[0])
    put_captions(wanted[1])
    put_captions(tmp_path / "dataset_other.json")
    put_images(tmp_path / "other_images")
    found = catalog.find("tiny", tmp_path)
    assert [path.resolve() for path in found] == [wanted[1].resolve(), wanted[0].resolve()]


@pytest.mark.parametrize("layout", ["precomp", "rows", "lavis"])
@pytest.mark.parametrize("place", ["own", "beside"])
def test_find_layouts_of_several_files(layout, place, tmp_path):
    table = layouts.read(put_captions(tmp_path / "source" / "dataset_tiny.json"))
    beside = tmp_path / "tiny_precomp" if layout == "precomp" else tmp_path
    layout_writers.write(table, tmp_path / "tiny" if place == "own" else beside, layout)
    put_images(tmp_path / "tiny_images")
    captions, _ = catalog.find("tiny", tmp_path)
    assert layouts.read(captions).fingerprint() == table.fingerprint()


@pytest.mark.parametrize(
    "captions, images",
    [("town.csv", "town_images"), ("town/captions.csv", "town/images"), ("town/t.csv", "town")],
)
def test_a_table_of_ones_own_is_found_and_opened(captions, images, tmp_path):
    files = [f"pond_{n}.jpg" for n in range(40)]
    folder = put_images(tmp_path / images, files)
    text = "image,caption\n" + "".join(f"{file},a pond\n{file},water\n" for file in files)
    (tmp_path / captions).write_text(text)
    assert catalog.find("town", tmp_path) == (tmp_path / captions, folder)
    data = catalog.open_dataset("town", tmp_path, tmp_path / "cache")
    counts = data.table.counts()
    assert (
        counts.images.to_dict() == {"train": 35, "val": 3, "test": 2}
        and counts.captions.sum() == 80
        and data.known is None
    )
    assert (
        any("tells a split: a tenth" in line for line in data.where)
        and not check(tmp_path / captions, folder).problems
    )


TREES = {
    "town.jsonl": ("town.jsonl", {"image": "{}", "caption": "a"}),
    "town_train.csv": ("town_train.csv", None),
    "town_train.jsonl": ("town_train.jsonl", {"file_name": "{}", "text": "a"}),
    "town.tsv": ("town.tsv", None),
    "own folder": ("town/captions.jsonl", {"image": "{}", "caption": "a"}),
    "own csv": ("town/train.csv", None),
}


@pytest.mark.parametrize("tree", TREES)
def test_each_place_of_the_expected_tree_is_found(tree, tmp_path):
    name, row = TREES[tree]
    files = [f"pond_{n}.jpg" for n in range(3)]
    if row is None:
        header = "image\tcaption" if name.endswith("tsv") else "image,caption"
        lines = [header, *(header.replace("image", file) for file in files)]
    else:
        lines = [json.dumps(row).replace("{}", file) for file in files]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("\n".join(lines))
    pictures = put_images(tmp_path / "town_images", files)
    assert catalog.find("town", tmp_path) == (tmp_path / name, pictures)
    assert len(layouts.read(tmp_path / name)) == 3


def test_the_advice_of_a_check_helps(tmp_path):
    captions = tmp_path / "town_test.csv"
    captions.write_text("image,caption\na_1.jpg,a\n")
    (problem,) = check(captions).problems
    assert "no image in split 'train'" in problem and "named like them but with train" in problem
    (tmp_path / "town_train.csv").write_text("image,caption\na_2.jpg,a\n")
    assert check(captions).problems == []
    by_column = tmp_path / "b" / "town.csv"
    by_column.parent.mkdir()
    by_column.write_text("image,caption,split\na_1.jpg,a,test\na_2.jpg,a,train\n")
    assert check(by_column).problems == []


def test_check_shows_what_was_packed_and_what_was_not_read(tmp_path):
    (tmp_path / "town_test.csv").write_text("image,caption\na_1.jpg,\"['a', 'b']\"\n")
    (tmp_path / "town_extra.csv").write_text("image,caption\na_2.jpg,a\n")
    text = "\n".join(check(tmp_path / "town_test.csv").lines)
    assert (
        "test        1 images, 2 captions" in text
        and "note        1 texts held several captions" in text
    )
    assert "note        Not read: town_extra.csv beside town_test.csv" in text


@pytest.mark.parametrize("named", [".", "tiny_precomp"])
def test_the_tree_of_pe_rsitr_has_its_images_beside_the_lists(named, tmp_path):
    table = layouts.read(put_captions(tmp_path / "source" / "dataset_tiny.json"))
    layout_writers.write(table, tmp_path / "tiny_precomp", "precomp")
    pictures = put_images(tmp_path / "tiny_precomp" / "tiny_images")
    assert catalog.find("tiny", tmp_path / named) == (tmp_path / "tiny_precomp", pictures)


def test_a_file_is_no_folder_and_a_folder_no_archive(tmp_path):
    put_captions(tmp_path / "dataset_tiny.json")
    (tmp_path / "tiny_images").write_text("")
    (tmp_path / "tiny_images.zip").mkdir()
    put_images(tmp_path / "tiny" / "images")
    assert catalog.find("tiny", tmp_path)[1] == tmp_path / "tiny" / "images"


def test_the_folder_itself_may_be_the_set(tmp_path):
    put_captions(tmp_path / "RSICD" / "dataset_rsicd.json")
    put_images(tmp_path / "RSICD" / "RSICD_images")
    assert catalog.find("rsicd", tmp_path / "RSICD")[1] == tmp_path / "RSICD" / "RSICD_images"


def test_images_behind_linked_class_folders_are_found(tmp_path):
    put_captions(tmp_path / "data" / "dataset_tiny.json")
    (tmp_path / "data" / "tiny").mkdir()
    put_images(tmp_path / "elsewhere")
    (tmp_path / "data" / "tiny" / "towns").symlink_to(tmp_path / "elsewhere")
    assert catalog.find("tiny", tmp_path / "data")[1] == tmp_path / "data" / "tiny"
    data = catalog.open_dataset("tiny", tmp_path / "data", tmp_path / "cache")
    assert data.pixels.shapes.tolist() == [[32, 40]] * 6


def test_what_is_missing_is_named_with_the_expected_tree(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        catalog.find("ucm", tmp_path / "no")
    with pytest.raises(
        UserError,
        match=(
            "No captions and images of the set 'ucm'.*dataset_ucm.json.*ucm_images.zip"
            ".*UCM-Captions comes from http"
        ),
    ):
        catalog.find("ucm", tmp_path)
    put_captions(tmp_path / "dataset_ucm.json")
    with pytest.raises(UserError, match="No images of the set 'ucm'"):
        catalog.find("ucm", tmp_path)
    with pytest.raises(UserError, match="set 'ucn'.*Known sets: scenes, ucm, rsicd"):
        catalog.find("ucn", tmp_path)


# ---- opening ----


def test_open_dataset_gives_table_pixels_and_what_was_taken(tmp_path):
    put_captions(tmp_path / "dataset_tiny.json")
    put_zip(tmp_path / "tiny_images.zip")
    data = catalog.open_dataset("tiny", tmp_path, tmp_path / "cache")
    assert list(data.table.images.file) == list(FILES) and data.known is None
    assert data.pixels[2].shape == (32, 40, 3) and data.pixels[2].dtype == np.uint8
    assert abs(int(data.pixels[2][..., 0].mean()) - 20) <= 2  # the image of row 2, not another
    text = " ".join(data.where)
    assert all(word in text for word in ("dataset_tiny.json", "tiny_images.zip", "karpathy"))
    assert "held out" not in text


def test_open_dataset_makes_a_val_split_and_says_so(tmp_path):
    files = {f"pond_{i}.tif": "test" if i < 5 else "train" for i in range(60)}
    put_captions(tmp_path / "dataset_rsitmd.json", files, name="rsitmd")
    put_images(tmp_path / "rsitmd_images", files)
    data = catalog.open_dataset("RSITMD", tmp_path, tmp_path / "cache")
    val = int((data.table.images.split == "val").sum())
    assert 0 < val < 30 and data.known is catalog.KNOWN["rsitmd"] and data.table.name == "rsitmd"
    assert any(
        line.startswith(f"There is no val split: {val} of 55 training images")
        for line in data.where
    )
    assert any("not those of RSITMD" in line for line in data.where)


def test_open_dataset_compares_the_captions_too(tmp_path, monkeypatch):
    files = {f"pond_{i}.tif": split for i, split in enumerate(["train", "train", "val", "test"])}
    small = dataclasses.replace(catalog.KNOWN["sydney"], splits={"published": (2, 1, 1)})
    monkeypatch.setitem(catalog.KNOWN, "sydney", small)
    put_images(tmp_path / "sydney_images", files)
    for per_image, words in (
        (5, "The counts of images and captions are those of Sydney-Captions, published."),
        (1, "Sydney-Captions has 5 captions for each image, 20 for these, but 4 were found"),
    ):
        put_captions(tmp_path / "dataset_sydney.json", files, name="sydney", per_image=per_image)
        where = catalog.open_dataset("sydney", tmp_path, tmp_path / "cache").where
        assert [line for line in where if line.startswith(words)]
        assert any("are those of" in line for line in where) == (per_image == 5)


def test_without_a_folder_the_generated_set_is_opened_through_the_readers(tmp_path, monkeypatch):
    from nbhelpers.data.scenes import generate

    small = functools.partial(generate.write_dataset, count=12)
    monkeypatch.setattr(generate, "write_dataset", small)
    monkeypatch.setattr(catalog, "repository_root", lambda: tmp_path)
    data = catalog.open_dataset("scenes", cache_folder=tmp_path / "cache")
    assert len(data.table) == len(data.pixels) == 12 and data.table.name == "scenes"
    assert set(data.table.images.scene) <= set(generate.CLASSES)
    assert (data.table.captions.image_id.value_counts() == 5).all()
    assert data.known is None and "generated" in data.where[0]
    # these lines are stored with the notebooks
    assert not any(str(tmp_path) in line for line in data.where)
    first = next(iter(generate.generate(12)))
    assert (data.pixels[0] == first.pixels).all()


def test_open_dataset_refuses_before_decoding(tmp_path):
    with pytest.raises(
        UserError, match="'ucm' is not generated: name its folder .from http.* with DATA"
    ):
        catalog.open_dataset("ucm", "", tmp_path / "cache")
    put_captions(tmp_path / "dataset_tiny.json", {"../x.tif": "train"})
    put_images(tmp_path / "tiny_images")
    with pytest.raises(UserError, match="leave the image folder"):
        catalog.open_dataset("tiny", tmp_path, tmp_path / "cache")
    put_captions(tmp_path / "dataset_tiny.json", FILES | {"lake_1.tif": "train"})
    with pytest.raises(UserError, match="lake_1"):
        catalog.open_dataset("tiny", tmp_path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").rglob("*.json"))


# ---- data check ----


def test_check_of_a_good_set(tmp_path):
    report = check(put_captions(tmp_path / "dataset_tiny.json"), put_zip(tmp_path / "i.zip"))
    text = "\n".join(report.lines)
    assert report.problems == []
    for words in (
        "layout      karpathy",
        "train       3 images, 15 captions",
        "test        2 images, 10 captions",
        "'tiny' is not in the catalogue",
        "per image: 5 (6 images)",
        "train: 15 of 15 captions distinct; 0 images",
        "3 classes: airport, pond, school",
        "1 images without a known class",
        "6 of 6 found and read",
        "6 have another extension",
        "40x32 (6)",
    ):
        assert words in text, words


def test_check_names_missing_unreadable_and_odd_sized_images(tmp_path):
    images = put_images(tmp_path / "images", suffix=".tif")
    (images / "airport_1.tif").unlink()
    (images / "pond_7.tif").write_bytes((images / "pond_7.tif").read_bytes()[:100])
    (images / "pond_8.tif").write_text("not an image")
    put_images(images, ["school_3.tif"], size=(41, 32), suffix=".tif")
    report = check(put_captions(tmp_path / "dataset_tiny.json"), images)
    assert len(report.problems) == 2
    assert report.problems[0].startswith("1 of 6 listed images have no file of their own (first: a")
    assert (
        report.problems[1].startswith("2 images cannot be read") and "pond_7" in report.problems[1]
    )
    assert any("40x32 (2); 1 odd-sized: 41x32 (1)" in line for line in report.lines)


def test_check_reports_two_names_of_one_image_and_one_of_another_folder(tmp_path):
    files = {"a/pond_1.tif": "train", "a/pond_1.jpg": "train", "b/pond_2.tif": "test"}
    images = put_images(tmp_path / "images" / "a", ["pond_1.tif", "pond_2.tif"]).parent
    report = check(put_captions(tmp_path / "d.json", files), images)
    assert report.problems == [
        "2 of 3 listed images have no file of their own (first: a/pond_1.tif and a/pond_1.jpg both"
        f" mean a/pond_1.jpg in {images}; list every image once, and complete the images if one is"
        " missing)."
    ]


def test_check_without_images_says_so(tmp_path):
    report = check(put_captions(tmp_path / "dataset_tiny.json"))
    assert (
        not report.problems
        and "images      not looked at: no folder or archive was named" in report.lines
    )


def test_check_reports_a_missing_image_folder(tmp_path):
    report = check(put_captions(tmp_path / "dataset_tiny.json"), tmp_path / "nowhere")
    assert len(report.problems) == 1 and "nowhere" in report.problems[0]


def test_check_counts_repeated_captions(tmp_path):
    path = put_captions(
        tmp_path / "d.json", {"a_1.jpg": "train", "a_2.jpg": "train", "b_1.jpg": "test"}
    )
    data = json.loads(path.read_text())
    data["images"][0]["sentences"] = [{"raw": text} for text in ("x", "x", "y", "z")]
    data["images"][1]["sentences"] = [{"raw": text} for text in ("x", "y", "w")]
    path.write_text(json.dumps(data))
    lines = "\n".join(check(path).lines)
    assert (
        "train: 4 of 7 captions distinct; 1 images repeat one of their own; "
        "2 captions belong to several images" in lines
    )
    assert "per image: 3 (1 images), 4 (1 images), 5 (1 images)" in lines


@pytest.mark.parametrize(
    "files, problem",
    [
        ({"a_1.jpg": "train"}, "no image in split 'test'"),
        ({"a_1.jpg": "test"}, "no image in split 'train'"),
        ({}, "no caption at all"),
    ],
)
def test_check_of_missing_splits(files, problem, tmp_path):
    assert [
        problem in text for text in check(put_captions(tmp_path / "d.json", files)).problems
    ] == [True]


def ucm_splits():
    """File name -> split, as many of each as published."""
    splits = ["train"] * 1680 + ["val"] * 210 + ["test"] * 210
    return {f"{number}.tif": split for number, split in enumerate(splits, 1)}


def test_check_compares_with_the_published_counts(tmp_path):
    part = check(put_captions(tmp_path / "dataset_ucm.json", name="ucm"))
    assert part.problems == [
        "UCM-Captions has 2100 images but 6 were found; take the complete release from "
        f"{catalog.KNOWN['ucm'].captions_source}."
    ]
    whole = ucm_splits()
    good = check(put_captions(tmp_path / "dataset.json", whole, name=None))
    assert not good.problems and any(
        "counts of images and captions agree (published)" in line for line in good.lines
    )
    assert any("21 classes: agricultural" in line for line in good.lines)
    whole["1.tif"] = "test"
    other = check(put_captions(tmp_path / "dataset_ucm.json", whole, name="ucm"))
    assert not other.problems and any("another split" in line for line in other.lines)


def test_counts_agree_only_with_the_captions(tmp_path):
    whole = ucm_splits()
    fewer = check(put_captions(tmp_path / "dataset_ucm.json", whole, name="ucm", per_image=1))
    assert fewer.problems == [
        "UCM-Captions has 5 captions for each image, 10500 for these, but 2100 were found (2100"
        " images have another number, first: 1); take the complete release from"
        f" {catalog.KNOWN['ucm'].captions_source}."
    ]
    assert not any("agree" in line for line in fewer.lines)


@pytest.mark.parametrize(
    "key, counts, captions",
    [
        ("ucm", (1680, 210, 210), 10500),
        ("rsicd", (8734, 1094, 1093), 54605),
        ("rsicd", (7862, 1966, 1093), 54605),
        ("rsitmd", (4291, 0, 452), 23715),
        ("rsitmd", (3435, 856, 452), 23715),
        ("sydney", (497, 58, 58), 3065),
        ("nwpu", (25200, 3150, 3150), 157500),
    ],
)
def test_captions_of_the_known_sets(key, counts, captions):
    bare, known = bare_table(key, *counts), catalog.KNOWN[key]
    full = CaptionTable(key, bare.images, pd.concat([bare.captions] * 5))
    assert (
        known.split_name(full)
        and known.caption_fault(full) is None
        and len(full.captions) == captions
    )
    fault = known.caption_fault(CaptionTable(key, bare.images, full.captions[1:]))
    assert (
        f"{captions} for these, but {captions - 1} were found (1 images have another number,"
        " first: 1)" in fault
    )


def test_check_gives_one_sentence_per_class_of_problem(tmp_path):
    path = put_captions(tmp_path / "d.json")
    data = json.loads(path.read_text())
    data["images"] += [
        {"filename": "../../x.jpg", "split": "train", "sentences": [{"raw": "a"}]}
    ] * 3
    data["images"] += [
        {"filename": f"n_{i}.jpg", "split": "train", "sentences": []} for i in range(4)
    ]
    path.write_text(json.dumps(data))
    problems = check(path).problems
    assert [text.split(" ")[0] for text in problems] == ["3", "4"]
    assert check(path, layout="nwpu").problems == [
        f"{path} is in the layout karpathy, not nwpu; name karpathy or none."
    ]


# ---- the published files themselves ----


@pytest.mark.realdata
@pytest.mark.parametrize("key", ["ucm", "rsicd", "rsitmd", "sydney"])
def test_published_captions(key):
    folder = os.environ.get("NBHELPERS_TEST_DATA")
    path = Path(folder or "") / f"dataset_{key}.json"
    if not folder or not path.exists():
        pytest.skip(f"NBHELPERS_TEST_DATA does not name a folder with dataset_{key}.json")
    reading = layouts.scan(path)
    known = catalog.KNOWN[key]
    assert not reading.problems and known.split_name(reading.table)
    assert known.caption_fault(reading.table) is None
    if key == "rsitmd":
        assert "20 captions of 4 images are empty; training drops them." in reading.notes


@pytest.mark.realdata
def test_ucm_numbers_agree_with_the_class_field():
    path = Path(os.environ.get("NBHELPERS_TEST_DATA", "")) / "dataset_ucm.json"
    if not path.exists():
        pytest.skip("NBHELPERS_TEST_DATA does not name a folder with dataset_ucm.json")
    table = layouts.read(path)
    unnamed = CaptionTable("ucm", table.images.assign(scene=table.images.file), table.captions)
    assert list(catalog.name_scenes(unnamed, "ucm").images.scene) == list(table.images.scene)
