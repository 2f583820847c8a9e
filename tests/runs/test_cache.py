"""The cache of the runs: what is shown, what is cleared, and what never is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from nbhelpers.__main__ import main
from nbhelpers.errors import UserError
from nbhelpers.runs import cache

DAY = 24 * 3600


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two cached folders, one of them three days old, a half one, and things that are no cache."""
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "runs" / "cache"
    for name, days in (
        ("images-0a", 0),
        ("features-0b", 3),
        (".features-0c.x", 2),
        (".images-0d.y", 0),
    ):
        put(folder / name / "deep" / "pixels.u8", days)
    put(folder / "my notes" / "a.txt", 9)
    put(tmp_path / "elsewhere" / "pixels.u8", 9)
    (folder / "images-0e").symlink_to(tmp_path / "elsewhere")
    put(folder / "images-0f", 9)
    return tmp_path / "runs"


def put(path, days):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(8192))
    then = time.time() - DAY * days
    for one in (path, path.parent):
        os.utime(one, (then, then))


def names(runs):
    return {path.name for path in (runs / "cache").iterdir()}


LEFT = {"my notes", "images-0e", "images-0f"}


def test_what_is_there_is_told_by_kind_with_size_and_last_use(runs, capsys):
    assert {entry.path.name: entry.kind for entry in cache.entries(runs)} == {
        "images-0a": "images",
        "features-0b": "features",
        ".features-0c.x": "unfinished",
        ".images-0d.y": "unfinished",
        **dict.fromkeys(LEFT, "other"),
    }
    (one,) = (entry for entry in cache.entries(runs) if entry.kind == "features")
    assert 8192 <= one.size <= 40_000 and one.used == pytest.approx(time.time() - 3 * DAY, abs=60)
    assert main(["cache", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()[:2]) for line in lines[1:]] == [
        "images 1",
        "features 1",
        "unfinished 2",
        "other 3",
        "together 7",
    ]


def test_what_is_there_as_json(runs, capsys):
    assert main(["cache", "show", "--json"]) == 0
    found = {Path(one["path"]).name: one for one in json.loads(capsys.readouterr().out)}
    assert len(found) == 7 and found["features-0b"]["kind"] == "features"
    assert found["features-0b"]["bytes"] >= 8192 and found["features-0b"]["last_used"][:2] == "20"


def test_features_in_the_making_are_not_cleared(runs):
    (runs / "cache" / ".features-0b.lock").touch()
    assert {entry.kind for entry in cache.entries(runs) if entry.path.name == "features-0b"} == {
        "unfinished"
    }
    assert "features-0b" not in [entry.path.name for entry in cache.clear(runs, ["features"])]


def test_a_cache_that_is_not_there_is_empty(tmp_path):
    assert cache.entries(tmp_path) == [] and cache.clear(tmp_path) == []


@pytest.mark.parametrize(
    "options, gone",
    [
        ([], {"images-0a", "features-0b", ".features-0c.x"}),
        (["--kind", "images"], {"images-0a"}),
        (["--days", "2.5"], {"features-0b"}),
        (["--kind", "images", "features", "--days", "1"], {"features-0b"}),
        (["--kind", "sets"], set()),
    ],
)
def test_only_what_is_named_and_old_enough_goes(options, gone, runs, tmp_path, capsys):
    before = names(runs)
    assert main(["cache", "clear", *options]) == 0
    assert before - names(runs) == gone and names(runs) >= LEFT
    assert (tmp_path / "elsewhere" / "pixels.u8").exists()
    assert capsys.readouterr().out.startswith(f"Removed {len(gone)} folders of ")


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--kind", "records"], "no kind 'records'; choose among images"),
        (["--days", "-1"], "at least 0"),
        (["--days", "nan"], "at least 0"),
    ],
)
def test_what_is_no_cache_is_refused(options, sentence, runs, capsys):
    before = names(runs)
    assert main(["cache", "clear", *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err and names(runs) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove everything")
def test_a_folder_of_somebody_else_is_told(runs):
    (runs / "cache").chmod(0o500)
    try:
        with pytest.raises(UserError, match="was not removed .* make sure that you own it"):
            cache.clear(runs)
    finally:
        (runs / "cache").chmod(0o700)
