"""The store of encoded rows: a killed build goes on to the same bytes, new rows are added, and
damage is told.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from nbhelpers import files
from nbhelpers.data import array_store
from nbhelpers.data.array_store import ArrayStore
from nbhelpers.errors import UserError

COUNT, BATCH = 11, 3
KEY = {"model": "abc", "kind": "texts", "bits": 16}
ITEMS = [f"caption {row}, \u00e4" for row in range(COUNT)]
CODES = np.random.default_rng(0).integers(0, 256, (COUNT, 2), dtype=np.uint8)
STATES = np.random.default_rng(1).standard_normal((COUNT, 4, 5)).astype(np.float32)


def encode(rows):
    return {
        "codes": CODES[rows],
        "states": torch.from_numpy(STATES[rows]),
        "mask": torch.ones(len(rows), 4, dtype=torch.uint8),
    }


def built(folder, count=COUNT, encode=encode, key=KEY):
    return ArrayStore.build(folder, key, ITEMS[:count], encode, BATCH)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def whole(tmp_path):
    built(tmp_path / "whole")
    return tmp_path / "whole"


def test_rows_come_back_as_they_were_encoded(whole):
    found = ArrayStore.open(whole, KEY)
    assert (
        len(found) == COUNT
        and found.key == KEY
        and set(found.arrays) == {"codes", "states", "mask"}
    )
    assert np.array_equal(found["codes"], CODES) and found["mask"].shape == (COUNT, 4)
    assert found["states"].dtype == np.float16 and np.array_equal(
        found["states"], STATES.astype(np.float16)
    )
    assert all(
        isinstance(array, np.memmap) and not array.flags.writeable
        for array in found.arrays.values()
    )
    assert sorted(contents(whole)) == [
        "codes.bin",
        "mask.bin",
        "same.bin",
        "states.bin",
        "store.json",
    ]
    assert (whole / "codes.bin").stat().st_size == COUNT * 2  # nothing but the packed codes


def test_every_row_is_encoded_once_in_batches(tmp_path):
    seen = []
    built(tmp_path / "store", encode=lambda rows: seen.append(rows.tolist()) or encode(rows))
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    built(tmp_path / "store", encode=lambda rows: pytest.fail("these rows are there"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(1, 4), st.integers(0, 14))
def test_equal_items_are_encoded_once_and_have_equal_rows(numbers, batch, stopped):
    """Also those that come again in another batch, or in a later call."""
    items, seen = [f"item {number}" for number in numbers], []

    def noisy(rows):  # what is encoded depends on the batch, as in a library
        seen.extend(items[row] for row in rows)
        return {"states": np.array([[numbers[row], len(seen)] for row in rows], np.float32)}

    with tempfile.TemporaryDirectory() as folder:
        for count in (stopped, len(items)):
            if items[:count]:
                found = ArrayStore.build(Path(folder) / "store", KEY, items[:count], noisy, batch)
        assert sorted(seen) == sorted(set(items))
        assert [items.index(item) for item in items] == found.same.tolist()
        assert (
            np.array_equal(found["states"], found["states"][found.same])
            and found["states"][:, 0].tolist() == numbers
        )
        kept = ArrayStore.in_memory(
            KEY, items, lambda rows: {"states": np.array(numbers)[rows, None]}, batch
        )
        assert kept["states"][:, 0].tolist() == numbers and np.array_equal(kept.same, found.same)


# ---- killed and resumed
@pytest.mark.parametrize("moment", ["first batch", "encoding", "half a batch", "before the count"])
def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path, whole, monkeypatch, moment):
    calls = []

    def killed(rows):
        calls.append(rows)
        if len(calls) == (1 if moment == "first batch" else 3):
            if moment == "encoding":
                raise KeyboardInterrupt
            monkeypatch.setattr(
                files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
        return encode(rows)

    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "store", encode=killed)
    monkeypatch.undo()
    if moment == "half a batch":
        path = tmp_path / "store" / "states.bin"
        path.write_bytes(path.read_bytes()[:-7])
    elif moment != "encoding":
        # a tail that does not count
        assert (tmp_path / "store" / "states.bin").stat().st_size == len(calls) * BATCH * 40
    if moment != "first batch":
        assert len(ArrayStore.open(tmp_path / "store")) == 2 * BATCH
    resumed = []
    built(tmp_path / "store", encode=lambda rows: resumed.append(rows) or encode(rows))
    assert resumed[0][0] == (0 if moment == "first batch" else 2 * BATCH)
    assert contents(tmp_path / "store") == contents(whole)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_array_store
def slow(rows):
    if rows[0] >= 6:
        print("third batch", flush=True)
        time.sleep(60)
    return test_array_store.encode(rows)
test_array_store.built(sys.argv[1], encode=slow)
"""


def test_a_process_that_is_killed_lets_go_of_the_store(tmp_path, whole):
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "store", Path(__file__).parent],
        stdout=subprocess.PIPE,
    )
    assert run.stdout.readline() == b"third batch\n"
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert len(ArrayStore.open(tmp_path / "store")) == 2 * BATCH
    built(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(whole)


def test_a_tail_longer_than_what_follows_is_cut_off(tmp_path, whole):
    built(tmp_path / "store", count=9)
    with open(tmp_path / "store" / "codes.bin", "ab") as file:
        file.write(b"x" * 1000)
    built(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(whole)


def test_of_two_builds_the_second_waits(tmp_path):
    rows = []

    def slowly(batch):
        rows.extend(batch)
        time.sleep(0.02)
        return encode(batch)

    builds = [
        threading.Thread(target=built, args=(tmp_path / "store",), kwargs={"encode": slowly})
        for _ in range(2)
    ]
    for build in builds:
        build.start()
    for build in builds:
        build.join()
    assert rows == list(range(COUNT))
    assert np.array_equal(ArrayStore.open(tmp_path / "store")["codes"], CODES)


# ---- more rows
@pytest.mark.parametrize("first", [1, 3, 10])
def test_added_rows_give_the_files_of_a_rebuild(tmp_path, whole, first):
    before = built(tmp_path / "store", count=first)
    added = []
    after = built(tmp_path / "store", encode=lambda rows: added.extend(rows) or encode(rows))
    assert added == list(range(first, COUNT)) and len(after) == COUNT
    assert contents(tmp_path / "store") == contents(whole)
    # who reads meanwhile reads on
    assert len(before) == first and np.array_equal(before["codes"], CODES[:first])


@pytest.mark.parametrize("items", [["another", *ITEMS[1:], "new"], ITEMS[:5]])
def test_other_items_are_not_mixed_in(whole, items):
    before = contents(whole)
    with pytest.raises(UserError, match="holds 11 rows of other items than the first 11"):
        ArrayStore.build(whole, KEY, items, encode)
    assert contents(whole) == before


def test_nothing_to_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="the list of items is empty"):
        built(tmp_path / "store", count=0)
    assert not list(tmp_path.iterdir())


# ---- what is refused
@pytest.mark.parametrize(
    "read", [ArrayStore.open, lambda folder, key: built(folder, key=key)], ids=["open", "build"]
)
@pytest.mark.parametrize(
    "other, sentence",
    [
        ({"model": "xyz"}, "model: stored 'abc', wanted 'xyz'"),
        ({"bits": 32}, "bits: stored 16, wanted 32"),
        ({"kind": "images"}, "kind: stored 'texts', wanted 'images'"),
    ],
)
def test_a_store_of_another_model_is_refused(whole, read, other, sentence):
    before = contents(whole)
    with pytest.raises(UserError, match=sentence):
        read(whole, KEY | other)
    assert contents(whole) == before


def flip(path):
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def forget(path, part):
    about = json.loads((path / array_store.MANIFEST).read_text())
    del about[part]
    (path / array_store.MANIFEST).write_text(json.dumps(about))


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (
            lambda folder: os.truncate(folder / "states.bin", 300),
            r"states.bin is cut short \(300 of 440 bytes\); delete",
        ),
        (lambda folder: (folder / "codes.bin").unlink(), "codes.bin is cut short"),
        (
            lambda folder: flip(folder / "states.bin"),
            "states.bin does not match its checksum; delete",
        ),
        (lambda folder: flip(folder / "mask.bin"), "mask.bin does not match its checksum"),
        (lambda folder: (folder / array_store.MANIFEST).write_text("{"), "store.json is damaged"),
        (lambda folder: forget(folder, "rows"), "store.json is damaged"),
        (lambda folder: (folder / array_store.MANIFEST).write_text("[]"), "store.json is damaged"),
    ],
)
def test_damage_is_told_and_not_built_upon(whole, damage, sentence):
    damage(whole)
    before = contents(whole)
    for read in (
        lambda: ArrayStore.open(whole),
        lambda: ArrayStore.build(whole, KEY, [*ITEMS, "new"], encode),
    ):
        with pytest.raises(UserError, match=sentence):
            read()
    assert contents(whole) == before


def test_a_large_store_opens_without_being_read(whole):
    flip(whole / "states.bin")
    assert len(ArrayStore.open(whole, verify=False)) == COUNT
    os.truncate(whole / "states.bin", 300)
    with pytest.raises(UserError, match="cut short"):
        ArrayStore.open(whole, verify=False)


def test_a_folder_without_a_store_is_named(tmp_path):
    with pytest.raises(UserError, match="There is no store in .*nowhere"):
        ArrayStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5, -7e4])
def test_what_float16_cannot_hold_is_refused_and_the_rest_kept(tmp_path, value):
    def broken(rows):
        return encode(rows) | {"states": np.where(rows[:, None, None] == 7, value, STATES[rows])}

    with pytest.raises(UserError, match="'states' hold NaN or values beyond 65504"):
        built(tmp_path / "store", encode=broken)
    assert len(ArrayStore.open(tmp_path / "store")) == 2 * BATCH


@pytest.mark.parametrize(
    "change",
    [
        {"states": STATES[:3, :2]},
        {"states": STATES[:2]},
        {"extra": CODES[:3]},
        {"codes": CODES[:3].astype(np.int64)},
    ],
)
def test_rows_of_another_form_are_refused(tmp_path, change):
    built(tmp_path / "store", count=3)
    before = contents(tmp_path / "store")
    with pytest.raises(
        UserError, match=f"rows of '{next(iter(change))}' .* change their number, shape or type"
    ):
        built(tmp_path / "store", count=6, encode=lambda rows: encode(rows) | change)
    assert contents(tmp_path / "store") == before


def test_a_full_disk_keeps_the_rows_that_count(tmp_path, monkeypatch, whole):
    built(tmp_path / "store", count=6)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(array_store, "open", full, raising=False)
    with pytest.raises(UserError, match="The disk is full"):
        built(tmp_path / "store")
    monkeypatch.undo()
    assert len(ArrayStore.open(tmp_path / "store")) == 6
    built(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(whole)


# ---- features in the cache
def cached(tmp_path, compute=encode, key=KEY, items=ITEMS):
    return ArrayStore.cached(tmp_path, key, items, compute, BATCH)


def test_features_are_computed_once_for_a_key_and_its_items(tmp_path):
    asked = []

    def compute(rows):
        asked.append(rows.tolist())
        return {"f": STATES[rows], "number": 50_000 + rows[:, None]}

    for _ in range(2):
        found = cached(tmp_path, compute)
    assert asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert found["number"].dtype == np.int64 and found["number"][:, 0].tolist() == list(
        range(50_000, 50_011)
    )
    for number, other in enumerate(
        ({"key": KEY | {"bits": 32}}, {"items": ITEMS[::-1]}, {"items": ITEMS[:9]}), 2
    ):
        cached(tmp_path, compute, **other)
        assert len(os.listdir(tmp_path)) == number and len(asked) > 4 * (number - 1)


def test_finished_features_are_read_while_another_process_holds_their_lock(tmp_path):
    cached(tmp_path)
    [folder] = tmp_path.iterdir()
    with FileLock(tmp_path / f".{folder.name}.lock"):
        assert len(cached(tmp_path)) == COUNT


def test_of_two_builders_of_features_one_computes_and_a_failed_one_leaves_no_lock(tmp_path):
    computed = []

    def compute(rows):
        computed.append(len(rows))
        if len(computed) == 1:
            second.start()
            second.join(0.3)  # without a lock it would be done by now
        return encode(rows)

    second = threading.Thread(target=cached, args=(tmp_path, compute))
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path, lambda rows: 1 / 0)
    assert not list(tmp_path.iterdir())
    cached(tmp_path, compute)
    second.join()
    assert computed == [3, 3, 3, 2] and [path.name[:9] for path in tmp_path.iterdir()] == [
        "features-"
    ]


def test_features_that_are_cut_short_are_named(tmp_path):
    cached(tmp_path)
    os.truncate(next(tmp_path.glob("*/states.bin")), 300)
    with pytest.raises(
        UserError, match="features-.*states.bin is cut short .*; delete .*features-"
    ):
        cached(tmp_path)
