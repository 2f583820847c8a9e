"""What records say of an idea, and the records that the repository holds."""

from __future__ import annotations

import json
import re

import nbformat
import numpy as np
import pytest

from nbhelpers.errors import UserError
from nbhelpers.metrics import recall
from nbhelpers.paths import notebooks_folder, repository_root
from nbhelpers.results import ideas, records

OWNER = np.repeat(np.arange(30), 2)


def write(folder, idea: str, world: str, arm: str, gain: float, **settings):
    """Records of three seeds of an arm; gain: how good it is."""
    for seed in range(3):
        similarity = np.random.default_rng(seed).random((30, 60))
        similarity[OWNER, np.arange(60)] += gain
        found = recall.evaluate(similarity, OWNER)
        made = records.new(
            {"width": 64},
            notebook=ideas.NOTEBOOK,
            system=ideas.IDEAS[idea].system,
            variant=f"{idea}-{world}-{arm}",
            profile="ideas",
            set=world,
            data_fingerprint="a" * 64,
            seed=seed,
            seconds=1.0,
            metrics={"expectation": found.metrics},
            protocol={"split": "test", "ties": "expectation", "selected_on": "val"},
            settings=settings,
        )
        records.write(folder, made, found.arrays() | {"owner": OWNER})


def test_a_clear_gain_helps_and_a_loss_hurts(tmp_path):
    for world, with_, without in (("wordy1", 0.9, 0.2), ("wordy2", 0.2, 0.9)):
        write(tmp_path, "lca", world, "with", with_)
        write(tmp_path, "lca", world, "without", without)
    helps, hurts = ideas.findings(tmp_path, "lca")
    assert (helps.verdict, hurts.verdict) == ("the idea helps here", "the idea hurts here")
    mean = np.mean(helps.scores["with"]) - np.mean(helps.scores["without"])
    assert helps.difference["difference"] == pytest.approx(mean)
    assert hurts.difference["difference"] == pytest.approx(-mean)
    first, second = ideas.said("lca", tmp_path).splitlines()
    assert first.startswith("- World `wordy1`: test mR ") and "**the idea helps here**" in first
    assert f"Difference {-mean:+.1f}, 95 % interval" in second


def test_equal_arms_show_no_difference_and_a_third_arm_stands_beside_them(tmp_path):
    for arm, gain in (("with", 0.5), ("without", 0.5), ("no_vir", 0.1)):
        write(tmp_path, "belief", "clutter1", arm, gain)
    (found,) = ideas.findings(tmp_path, "belief")
    assert found.verdict == "no difference can be shown" and len(found.scores["no_vir"]) == 3
    assert "For comparison, no VIR" in found.sentence()


@pytest.mark.parametrize(
    ("high", "told"),
    [(0.9, "in 3 of 3 runs the step is shorter"), (1.1, "in 0 of 3 runs the step is shorter")],
)
def test_the_time_of_a_step_is_told_as_a_ratio(tmp_path, high, told):
    times = {"RATIO": 0.8, "RATIO_LOW": 0.7, "RATIO_HIGH": high}
    write(tmp_path, "fourier", "plain", "with", 0.5, **times)
    write(tmp_path, "fourier", "plain", "without", 0.5, **times)
    said = ideas.said("fourier", tmp_path)
    assert "0.80 times as long with as without" in said and told in said


def test_the_time_of_a_query_is_told_against_all_pairs(tmp_path):
    for arm in ("with", "without"):
        write(tmp_path, "two_stages", "gallery1", arm, 0.5, TWO_STAGES_MS=20.0, ALL_PAIRS_MS=400.0)
    assert "in 20 ms; reading all pairs takes 400 ms, 20 times as long" in ideas.said(
        "two_stages", tmp_path
    )


def test_an_idea_without_records_is_said_with_what_makes_them(tmp_path):
    write(tmp_path, "lca", "wordy1", "with", 0.5)
    assert ideas.recorded(tmp_path) == ["lca"]
    with pytest.raises(UserError, match="no record of the idea 'belief'.*make run PROFILE=ideas"):
        ideas.findings(tmp_path, "belief")


# ---- what is committed
@pytest.mark.parametrize("idea", ideas.recorded(ideas.committed()))
def test_each_idea_has_its_records_of_three_seeds_and_a_small_figure(idea):
    found = ideas.findings(ideas.committed(), idea)
    assert found[0].world == ideas.IDEAS[idea].worlds[0]
    for one in found:
        assert {arm: len(values) for arm, values in one.scores.items()} == dict.fromkeys(
            ideas.IDEAS[idea].arms, 3
        )
    figure = repository_root() / "figures" / "ideas" / f"{idea}.png"
    assert figure.stat().st_size <= 120_000


def test_committed_arms_differ_in_nothing_but_the_idea():
    """With and without: the same data, seeds, starting weights and protocol."""
    every = records.read(ideas.committed())
    by_world: dict[tuple, list] = {}
    for one in every:
        key = one["variant"].rsplit("-", 1)[0], one["seed"]
        same = {name: one[name] for name in ("data_fingerprint", "weights", "protocol", "git")}
        by_world.setdefault(key, []).append(json.dumps(same))
        assert one["git"]["dirty"] is False
    assert all(len(set(found)) == 1 for found in by_world.values())


SYSTEMS = {"PIR": ("20_pir", "21_pir_clip"), "PE-RSITR": ("22_pe_rsitr",)} | {
    "CFITR": ("23_cfitr",),
    "BITA": ("24_bita",),
}
SHOWN: dict[str, set[str]] = {}
for recorded in ideas.recorded(ideas.committed()):
    for shown_in in SYSTEMS[ideas.IDEAS[recorded].system]:
        SHOWN.setdefault(shown_in, set()).add(recorded)
SHOWN["21_pir_clip"] = {"belief"}


@pytest.mark.parametrize("notebook", SHOWN)
def test_a_systems_notebook_shows_the_figure_and_reads_the_numbers(notebook):
    cells = nbformat.read(notebooks_folder() / f"{notebook}.ipynb", as_version=4).cells
    (text,) = [cell.source for cell in cells if "(../figures/ideas/" in cell.source]
    (code,) = [cell.source for cell in cells if "ideas.said(" in cell.source]
    named = set(re.findall(r'"(\w+)"', code)) & set(ideas.IDEAS)
    assert named == SHOWN[notebook]
    (figure,) = re.findall(r"\(\.\./figures/ideas/(\w+)\.png\)", text)
    assert figure in named
