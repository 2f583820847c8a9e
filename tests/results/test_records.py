"""Records: written, read and merged whole or not at all, and true to their ranks."""

from __future__ import annotations

import errno
import json
import re
import shutil
from dataclasses import dataclass

import numpy as np
import pytest

from nbhelpers.__main__ import main
from nbhelpers.errors import UserError
from nbhelpers.metrics import recall
from nbhelpers.results import records

OWNER = np.repeat(np.arange(12), 5)


def found(seed=0, ties="expectation"):
    similarity = np.random.default_rng(seed).random((12, 60))
    similarity[OWNER, np.arange(60)] += 0.3
    return recall.evaluate(similarity.round(1), OWNER, ties=ties)


def record(seed=0, **changes):
    by_rule = {ties: found(seed, ties).metrics for ties in ("expectation", "released")}
    return records.new(
        **{
            "config": {"width": 64, "lr": 1e-3},
            "notebook": "20_pir",
            "system": "PIR",
            "profile": "default",
            "set": "scenes",
            "data_fingerprint": "a" * 64,
            "seed": seed,
            "seconds": 12.5,
            "parameters": {"all": 100, "trainable": 60},
            "metrics": by_rule,
            "protocol": {"split": "test", "ties": "expectation", "selected_on": "val"},
            "intervals": recall.bootstrap(found(seed), OWNER, samples=50),
            "chance": recall.chance(OWNER),
            "weights": [
                {"name": "lite0", "source": "package", "sha256": "b" * 64, "kind": "package"}
            ],
        }
        | changes
    )


def arrays(seed=0):
    return found(seed).arrays() | {"owner": OWNER}


def write(folder, seed=0, **changes):
    return records.write(folder, record(seed, **changes), arrays(seed))


# ---- writing and reading
def test_a_record_comes_back_with_its_ranks(tmp_path):
    path = write(tmp_path, variant="no-vir")
    assert path.name == "20_pir-seed0-no-vir.json"
    [back] = records.read(tmp_path)
    assert back["metrics"] == record()["metrics"] and back["weights"] == record()["weights"]
    ours, owner = records.read_recall(path)
    assert ours.metrics == found().metrics and (owner == OWNER).all()
    assert recall.bootstrap(ours, owner, samples=50)["mR"] == tuple(back["intervals"]["mR"])
    assert records.write(tmp_path, back, arrays()) == path  # what was read can be written again


def test_new_collects_versions_and_the_git_state():
    made = record()
    assert set(made["versions"]) >= {"python", "numpy", "torch"}
    revision, dirty = made["git"]["revision"], made["git"]["dirty"]
    assert (revision is None and dirty is None) or (len(revision) == 40 and isinstance(dirty, bool))


def test_without_git_the_state_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert record()["git"] == {"revision": None, "dirty": None}


def test_the_hash_of_a_config_depends_on_values_only():
    @dataclass(frozen=True)
    class Config:
        width: int = 64
        lr: float = 1e-3

    def hashed(config):
        return record(config=config)["config_sha256"]

    assert hashed(Config()) == hashed({"lr": 1e-3, "width": 64})
    assert hashed(Config(65)) != hashed(Config())
    assert hashed({"ks": (1, np.int64(5))}) == hashed({"ks": [1, 5]})


WRONG = [
    ({"seed": None}, "at seed: None is not of type 'integer'"),
    ({"seed": -1}, "at seed"),
    ({"sed": 1}, "'sed' was unexpected"),
    ({"variant": "../../x"}, "at variant"),
    ({"notebook": "/etc/x"}, "at notebook"),
    ({"data_fingerprint": "abc"}, "at data_fingerprint"),
    ({"schema": 2}, "has schema 2; this version of nbhelpers knows schema 1"),
    ({"config": {"lr": 2}, "config_sha256": "c" * 64}, "config_sha256 is not the hash of config"),
    ({"parameters": {"all": 1, "trainable": 2}}, "more parameters are trainable"),
    (
        {"protocol": {"split": "tset", "ties": "expectation", "selected_on": "val"}},
        "at protocol.split",
    ),
    (
        {"protocol": {"split": "test", "ties": "optimistic", "selected_on": "val"}},
        "lack the tie rule",
    ),
    ({"metrics": {}}, "at metrics"),
    ({"metrics": {"luck": {"mR": 50}}}, "'luck' is not one of"),
    ({"metrics": {"expectation": {"mR": 101}}}, "at metrics.expectation.mR: 101"),
    (
        {"metrics": {"expectation": {"mR": float("nan")}}},
        r"record\.metrics\.expectation\.mR is nan",
    ),
    ({"intervals": {"mR": (60.0, 50.0)}}, "low end lies above"),
    (
        {"weights": [{"name": "x", "source": "y", "sha256": "", "kind": "magic"}]},
        r"at weights\[0\]\.kind",
    ),
    ({"notes": object()}, r"record\.notes is a object"),
]


@pytest.mark.parametrize("changes, sentence", WRONG, ids=[next(iter(w[0])) for w in WRONG])
def test_what_does_not_fit_is_refused_in_one_sentence_and_nothing_is_written(
    tmp_path, changes, sentence
):
    with pytest.raises(UserError, match=sentence) as caught:
        records.write(tmp_path, record() | changes, arrays())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_metrics_that_the_ranks_do_not_give_are_refused(tmp_path):
    better = record()
    better["metrics"]["expectation"]["mR"] += 1
    with pytest.raises(
        UserError, match=r"states mR .* by the expectation rule, but its ranks give"
    ):
        records.write(tmp_path, better, arrays())
    with pytest.raises(UserError, match="lack owner"):
        records.write(tmp_path, record(), found().arrays())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_former_record_whole(tmp_path, monkeypatch):
    path = write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for where in ("pathlib.Path.write_text", "numpy.savez_compressed"):
        with monkeypatch.context() as patched:
            patched.setattr(where, full)
            with pytest.raises(UserError, match="The disk is full"):
                write(tmp_path, notes="newer")
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert records.read_recall(path)


def test_a_record_of_another_system_is_not_overwritten(tmp_path):
    write(tmp_path)
    write(tmp_path, notes="again")
    with pytest.raises(
        UserError, match="holds a record of system 'PIR', and this one is of 'frozen'"
    ):
        write(tmp_path, system="frozen")
    assert records.read(tmp_path)[0]["notes"] == "again"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 1}', "\xff"])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "20_pir-seed0.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="20_pir-seed0.json"):
        records.read(tmp_path)


# ---- merging
def holds(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_records_of_two_machines_are_merged_with_their_ranks(tmp_path, capsys):
    one, other, out = tmp_path / "one", tmp_path / "other", tmp_path / "all"
    write(one / "default"), write(one / "default", 1)
    (
        write(other / "default", 2, checkpoint="checkpoints/pir-2/model.safetensors"),
        write(other / "ucm", 1, profile="ucm", set="ucm"),
    )
    # the same records lie in both
    shutil.copytree(one / "default", other / "default", dirs_exist_ok=True)
    assert main(["records", "merge", str(one), str(other), "--out", str(out)]) == 0
    assert "4 records lie in" in capsys.readouterr().out
    assert holds(out) == holds(one) | holds(other)
    assert main(["records", "check", str(out)]) == 0


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (
            lambda other: write(other, notes="measured again"),
            (
                "one/20_pir-seed0.json and .*other/20_pir-seed0.json are of one run, but differ in"
                " notes; "
            ),
        ),
        (
            lambda other: write(other, profile="ucm"),
            (
                "are of different runs and would share .*20_pir-seed0.json; merge them into folders"
                " of their own"
            ),
        ),
        (
            lambda other: write(other, 1).with_suffix(".npz").unlink(),
            "lacks its ranks 20_pir-seed1.npz",
        ),
        (lambda other: (other.parent / "all").mkdir(), "all exists already; name a new folder"),
        (lambda other: other.rmdir(), "other does not exist"),
    ],
)
def test_what_cannot_be_merged_is_one_sentence_and_nothing_is_written(
    tmp_path, capsys, spoil, sentence
):
    one, other, out = tmp_path / "one", tmp_path / "other", tmp_path / "all"
    write(one), other.mkdir()
    spoil(other)
    before = holds(tmp_path)
    assert main(["records", "merge", str(one), str(other), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert re.search(sentence, said) and said.count("\n") == 1
    assert holds(tmp_path) == before


def test_a_merge_that_fills_the_disk_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "one"), write(tmp_path / "one", 1)
    before, copies, copy = holds(tmp_path), [], shutil.copyfile

    def full(source, target):
        copies.append(target)
        if len(copies) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="The disk is full"):
        records.merge([tmp_path / "one"], tmp_path / "all")
    assert (
        holds(tmp_path) == before
        and len(copies) == 3
        and sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    )


# ---- the command line
def test_command_line_shows_and_checks(tmp_path, capsys):
    write(tmp_path, variant="no-vir")
    assert main(["records", "check", str(tmp_path)]) == 0
    assert "1 records, 0 with a problem" in capsys.readouterr().out
    assert main(["records", "show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "PIR no-vir" in shown and "ties by released rule" in shown and "lite0 (package)" in shown


def test_records_as_json(tmp_path, capsys):
    path = write(tmp_path, variant="no-vir")
    assert main(["records", "show", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [json.loads(path.read_text("utf-8"))]
    assert main(["records", "check", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"records": [str(path)], "problems": []}
    assert main(["records", "table", str(tmp_path), "--json"]) == 0
    (board,) = json.loads(capsys.readouterr().out)
    (metrics,) = [record["metrics"] for record in records.read(tmp_path)]
    assert board["rows"][0]["mR"] == pytest.approx(metrics["expectation"]["mR"])


def test_check_names_every_record_at_fault(tmp_path, capsys):
    for seed in range(4):
        write(tmp_path, seed=seed)
    (tmp_path / "20_pir-seed0.npz").unlink()
    (tmp_path / "20_pir-seed1.npz").write_bytes((tmp_path / "20_pir-seed2.npz").read_bytes())
    edited = json.loads((tmp_path / "20_pir-seed2.json").read_text())
    edited["metrics"]["expectation"]["mR"] += 5
    (tmp_path / "20_pir-seed2.json").write_text(json.dumps(edited))
    assert main(["records", "check", str(tmp_path)]) == 1
    said = capsys.readouterr()
    first, second, third = said.err.splitlines()
    (last,) = said.out.splitlines()
    assert "lacks its ranks 20_pir-seed0.npz" in first
    assert "does not hold the ranks of 20_pir-seed1.json" in second
    assert "20_pir-seed2.json states mR" in third
    assert last == "4 records, 3 with a problem."


def test_a_missing_or_empty_folder_is_one_sentence(tmp_path, capsys):
    assert main(["records", "show", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["records", "table", str(tmp_path)]) == 1
    assert "There is no record in" in capsys.readouterr().err
