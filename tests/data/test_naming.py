"""Which file a listed name means: published layouts are found, no file stands in for another."""

from __future__ import annotations

import unicodedata

import pytest

from nbhelpers.data.naming import Naming
from nbhelpers.errors import UserError

SPLIT_UP = unicodedata.normalize("NFD", "Zürich/é.jpg")  # as macOS stores it
FOUND = {  # what is at the place, then each listed name with its file
    "the same paths": ("a/1.jpg b/1.jpg", "a/1.jpg=a/1.jpg b/1.jpg=b/1.jpg"),
    "bare names in an outer folder": ("imgs/1.jpg imgs/2.jpg", "1.tif=imgs/1.jpg 2=imgs/2.jpg"),
    "bare names in class folders": ("a/a_1.jpg b/b_1.jpg", "a_1.jpg=a/a_1.jpg b_1.tif=b/b_1.jpg"),
    "class folders in another case": ("Port/1.JPG Beach/1.JPG", "port/1.tif=Port/1.JPG"),
    "class folders in outer folders": (
        "x/NWPU/a/1.jpg x/NWPU/b/1.jpg",
        "a/1.jpg=x/NWPU/a/1.jpg b/1.tif=x/NWPU/b/1.jpg",
    ),
    "one class folder in an outer one": ("NWPU/a/1.jpg", "a/1.jpg=NWPU/a/1.jpg"),
    "class folders in split folders": (
        "train/a/1.jpg test/b/2.jpg",
        "a/1.jpg=train/a/1.jpg b/2.jpg=test/b/2.jpg",
    ),
    "listed class folders, flat files": ("a_1.jpg b_1.jpg", "a/a_1.jpg=a_1.jpg b/b_1.jpg=b_1.jpg"),
    "listed class folders, one outer folder": (
        "imgs/a_1.jpg imgs/b_1.jpg",
        "a/a_1.jpg=imgs/a_1.jpg b/b_1.tif=imgs/b_1.jpg",
    ),
    "listed splits, flat files": (
        "imgs/a_1.tif imgs/b_1.tif",
        "train/a_1.tif=imgs/a_1.tif test/b_1.tif=imgs/b_1.tif",
    ),
    "listed splits, class folders": (
        "a/a_1.jpg b/b_1.jpg",
        "train/a_1.tif=a/a_1.jpg val/b_1.tif=b/b_1.jpg",
    ),
    "listed splits and classes": (
        "imgs/a/1.jpg imgs/b/1.jpg",
        "train/a/1.jpg=imgs/a/1.jpg test/b/1.jpg=imgs/b/1.jpg",
    ),
    "listed outer folder, none at the place": (
        "1.jpg small/1.jpg small/2.jpg 2.jpg",
        "images/1.jpg=1.jpg images/2.jpg=2.jpg",
    ),
    "listed outer folders around classes": (
        "a/1.jpg b/1.jpg",
        "data/set/a/1.jpg=a/1.jpg data/set/b/1.jpg=b/1.jpg",
    ),
    "the listed extension of two": ("x/8.jpg x/8.png", "x/8.png=x/8.png 8.jpg=x/8.jpg"),
    "images beside masks": ("images/1.jpg masks/1.png", "1.jpg=images/1.jpg"),
    "the one in the root": ("1.jpg sub/1.jpg", "1.tif=1.jpg"),
    "dots in names": ("s.2019.jpg s.2020.jpg", "s.2019=s.2019.jpg s.2020.tif=s.2020.jpg"),
    "another Unicode form": (SPLIT_UP, f"Zürich/é.jpg={SPLIT_UP}"),
    "another Unicode form and case": (f"x/{SPLIT_UP}", f"zürich/É.tif=x/{SPLIT_UP}"),
    "both Unicode forms": (
        f"Zürich/é.jpg {SPLIT_UP}",
        f"Zürich/é.jpg=Zürich/é.jpg {SPLIT_UP}={SPLIT_UP}",
    ),
}


@pytest.mark.parametrize("kind", FOUND)
def test_published_layouts_are_found(kind):
    place, pairs = FOUND[kind]
    listed = dict(pair.split("=") for pair in pairs.split())
    assert Naming(place.split(), "here").find_all(listed) == (listed, [])


REFUSED = {  # what is at the place, the list, the name that is refused, the file that is not it
    "another class folder": ("a/2.jpg b/1.jpg", "a/1.jpg a/2.jpg", "a/1.jpg", "b/1.jpg"),
    "the only folder, of others": ("b/1.jpg b/2.jpg", "a/1.jpg b/2.jpg", "a/1.jpg", "b/1.jpg"),
    "both names, one file": ("b/1.jpg", "a/1.jpg b/1.jpg", "a/1.jpg", "b/1.jpg"),
    "a folder that nobody lists": ("a/2.jpg c/1.jpg", "a/1.jpg a/2.jpg", "a/1.jpg", "c/1.jpg"),
    "no such folder among several": ("b/1.jpg c/2.jpg", "a/1.jpg", "a/1.jpg", "b/1.jpg"),
    "in the root": ("1.jpg b/1.jpg", "a/1.jpg b/1.jpg", "a/1.jpg", "1.jpg"),
    "deeper than its folder": ("a/2.jpg x/a/1.jpg", "a/1.jpg a/2.jpg", "a/1.jpg", "x/a/1.jpg"),
    "a folder of the same end": ("a/2.jpg b/1.jpg", "a/b/1.jpg a/2.jpg", "a/b/1.jpg", "b/1.jpg"),
    "another split": (
        "train/1.jpg test/2.jpg",
        "train/1.jpg test/1.jpg",
        "test/1.jpg",
        "train/1.jpg",
    ),
    "another end after a dot": ("scene.jpg", "scene.2019", "scene.2019", None),
    "nowhere": ("a/1.jpg", "a/1.jpg a/3.jpg", "a/3.jpg", None),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_missing_file_is_not_replaced_by_a_namesake(kind):
    place, files, refused, other = REFUSED[kind]
    place, files = place.split(), files.split()
    found, (wrong,) = Naming(place, "here").find_all(files)
    assert sorted([*found, refused]) == sorted(files)
    assert Naming([*place, refused], "here").find_all(files)[1] == []  # "complete the images"
    if other:
        advice = f"where {other} lies in another folder; complete the images, or list that name"
        assert wrong.startswith(f"{refused} is not in here, {advice}")
        assert Naming(place, "here").find_all([other]) == ({other: other}, [])
    else:
        advice = "complete the images or remove it from the list."
        assert wrong == f"{refused} is not in here; {advice}"


def test_all_names_of_a_list_tell_which_folders_count():
    naming = Naming(["b/1.jpg", "b/2.jpg"], "here")
    assert naming.find("a/1.jpg") == "b/1.jpg"  # an outer folder, as far as one name tells
    assert naming.find_all(["a/1.jpg"], ["b/2.jpg"])[0] == {}


@pytest.mark.parametrize(
    "member, one, other",
    [
        ("1.jpg", "1.jpg", "1.tif"),
        ("x/1.jpg", "a/1.jpg", "b/1.jpg"),
        ("A/1.jpg", "a/1.jpg", "A/1.jpg"),
        ("x/1.jpg", "train/1.jpg", "test/1.jpg"),
        ("é.jpg", "é.jpg", "e\u0301.jpg"),
    ],
)
def test_two_names_never_get_one_file(member, one, other):
    naming = Naming([member], "here")
    found, wrong = naming.find_all([one, other])
    assert found == {one: member}
    assert wrong == [
        f"{one} and {other} both mean {member} in here; list every image once, and "
        "complete the images if one is missing."
    ]
    assert naming.find_all([one, one])[1] == []  # the advice; the same name again is no other
    both = {one: one, other: other}
    assert Naming({member, *both}, "here").find_all(both) == (both, [])


@pytest.mark.parametrize(
    "place, file",
    [
        ("x/8.jpg x/8.png", "8"),
        ("x/8.jpg x/8.png", "x/8.tif"),
        ("a/7.jpg b/7.jpg", "7.jpg"),
        ("x/a/7.jpg y/a/7.jpg", "a/7.jpg"),
        ("A/7.jpg a/7.jpg", "a/7.tif"),
    ],
)
def test_several_likely_files_are_refused_and_each_can_be_listed(place, file):
    naming, (one, other) = Naming(place.split(), "here"), place.split()
    with pytest.raises(UserError, match=f"^{file} may be {one} or {other} in here; list the one"):
        naming.find(file)
    assert [naming.find(name) for name in (one, other)] == [one, other]
