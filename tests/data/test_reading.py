"""The rules that all readers share: text, JSON, columns, split words, names of files, packed
captions, ids.
"""

import pytest

from nbhelpers.data.reading import (
    SPLIT_WORDS,
    captions_in,
    column_names,
    decode_text,
    match_ids,
    parse_json,
    read_text,
    split_file,
    split_of,
)
from nbhelpers.errors import UserError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_what_a_text_is(encoding):
    notes = []
    assert (
        decode_text("a caf\u00e9".encode(encoding), "x.txt", notes) == "a caf\u00e9" and not notes
    )


def test_the_other_byte_orders():
    for mark, encoding in ((b"\xfe\xff", "utf-16-be"), (b"\0\0\xfe\xff", "utf-32-be")):
        assert decode_text(mark + "a caf\u00e9".encode(encoding), "x.txt", []) == "a caf\u00e9"


def test_windows_text_is_read_and_noted():
    notes = []
    assert decode_text("a caf\u00e9".encode("cp1252"), "x.txt", notes) == "a caf\u00e9"
    assert notes == ["x.txt is not UTF-8; it was read as Windows-1252."]


@pytest.mark.parametrize(
    "data", ["a caf\u00e9".encode("utf-16-le"), b"a\0b", b"PK\x03\x04\x00\xff"]
)
def test_null_bytes_are_refused_and_the_advice_helps(data, tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match="x.txt holds null bytes.*save it as UTF-8"):
        read_text(path, [])
    path.write_text("a caf\u00e9", encoding="utf-8")
    assert read_text(path, []) == "a caf\u00e9"


def test_a_mark_that_does_not_hold_is_refused():
    with pytest.raises(UserError, match="begins as utf-16 text but goes on otherwise"):
        decode_text(b"\xff\xfea", "x.txt", [])


def test_a_key_twice_in_one_object_is_refused():
    assert parse_json('[{"a": 1}, {"a": 2}]', "x.json") == [{"a": 1}, {"a": 2}]
    with pytest.raises(
        UserError, match="x.json has the key 'caption' twice in one object .*'image': 'a.jpg'"
    ):
        parse_json('[{"image": "a.jpg", "caption": "a", "caption": "b"}]', "x.json")


def test_columns_that_differ_by_case_spaces_or_mark_are_the_same():
    assert column_names(["\ufeffImage ", " Caption", "", ""], "x.csv") == [
        "image",
        "caption",
        "",
        "",
    ]
    for names in (["caption", "caption"], ["caption", "Caption "], ["\ufeffcaption", "caption"]):
        with pytest.raises(
            UserError, match="x.csv has the column 'caption' more than once; rename or remove"
        ):
            column_names(names, "x.csv")


def test_words_for_a_split():
    assert {split_of(word) for word in SPLIT_WORDS} == {"train", "val", "test"}
    words = {
        " Train": "train",
        "TRAINING": "train",
        "restval": "train",
        "trainval": "train",
        "Valid": "val",
        "validation": "val",
        "dev ": "val",
        "TEST": "test",
        "testing": "test",
        "": None,
        "tset": None,
        7: None,
        None: None,
    }
    assert {word: split_of(word) for word in words} == words


@pytest.mark.parametrize(
    "name, found",
    [
        ("S_train.json", ("S", "train", False)),
        ("S.test.csv", ("S", "test", False)),
        ("S-validation.csv", ("S", "val", False)),
        ("s_Valid.JSON", ("s", "val", False)),
        ("S_test_gt.json", ("S", "test", True)),
        ("test.json", ("", "test", False)),
        ("captions_train2017.json", ("captions", "train", False)),
        ("test_captions.csv", ("", "test", False)),
        ("my_test_area_train.csv", ("my_test_area", "train", False)),
        ("S-train-000001.tar", ("S", "train", False)),
        ("validation-00000-of-00001-0123456789abcdef.parquet", ("", "val", False)),
        ("contest.csv", None),
        ("test_site.csv", None),
        ("town.csv", None),
        ("dataset_x.json", None),
    ],
)
def test_split_from_the_name_of_a_file(name, found):
    named = split_file(name)
    assert (named and (named.set, named.split, named.truth)) == found


def test_a_family_is_the_splits_of_one_set():
    family = split_file("captions_train2017.json").family
    assert (
        family
        == split_file("Captions_val2017.json").family
        != split_file("captions_val2014.json").family
    )
    assert split_file("S_train.json").family != split_file("S_train.csv").family


@pytest.mark.parametrize(
    "text",
    [
        "['a b', 'c']",
        '["a b", "c"]',
        "['a b' 'c']",
        "['a b'\n 'c']",
        "('a b', 'c')",
        "{'a b', 'c'}",
        "[u'a b', u'c']",
        " [ 'a b' ,\"c\" ] ",
        "a b\nc",
        "a b\r\n\r\nc\r\n",
        "a b\rc",
        " a b \n c",
    ],
)
def test_captions_packed_into_one_text(text):
    assert captions_in(text) == ["a b", "c"]


def test_quotes_and_escapes_in_packed_captions():
    assert captions_in(r"""["a farmer's field", 'a "red" field', 'it\'s red', 'caf\xe9']""") == [
        "a farmer's field",
        'a "red" field',
        "it's red",
        "caf\u00e9",
    ]
    assert (
        captions_in(r'["caf\u00e9"]') == ["caf\u00e9"]
        and captions_in("[]") == []
        and captions_in("['a']") == ["a"]
    )


@pytest.mark.parametrize(
    "text",
    [
        '"a red field"',
        "[a plane]",
        '["go" signs] seen from above',
        "(a plane)",
        "('school')",
        "[1]",
        'a "red" field',
        "a | b",
        "a field, a pond.",
        "['",
        " a ",
        "",
        "{'a': 'b'}",
        "[" * 10_000,
    ],
)
def test_a_single_caption_stays_as_it_is(text):
    assert captions_in(text) == [text]
    assert captions_in("a field\n") == ["a field"]


@pytest.mark.parametrize(
    "text",
    [
        "['it's red', 'b']",
        '["a", null]',
        "['a', nan]",
        "['a', 'b'",
        "[['a'], ['b']]",
        "[{'raw': 'a'}]",
        "[b'a', b'b']",
    ],
)
def test_what_begins_as_a_list_but_is_none_is_refused(text):
    with pytest.raises(ValueError):
        captions_in(text)


@pytest.mark.parametrize(
    "wanted, known, found",
    [
        (["a", "b"], ["b", "a"], ["a", "b"]),
        (["UCM_3.png", "UCM_1.png"], ["1", "3"], ["3", "1"]),
        (["UCM_3"], ["3"], ["3"]),
        (["val2014/COCO_val2014_000000391895.jpg"], ["391895"], ["391895"]),
        (["x/a.jpg"], ["a.png"], ["a.png"]),
        (["3"], ["ucm_3"], ["ucm_3"]),
        (["a/1.jpg", "b/1.jpg"], ["b/1", "a/1"], ["a/1", "b/1"]),
        (["pond_1.jpg", "park_1.jpg"], ["1"], [None, None]),
        (["a", "b"], ["b"], [None, "b"]),
        ([], ["b"], []),
        (["a"], [], [None]),
    ],
)
def test_ids_that_name_the_same_image(wanted, known, found):
    assert match_ids(wanted, known) == found
