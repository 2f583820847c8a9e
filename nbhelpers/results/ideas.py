"""What the records say of each paper's idea, with and without, on a world made for it.

`tasks.ideas` writes these records; `data.ideas` has the worlds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbhelpers.errors import UserError
from nbhelpers.metrics import recall
from nbhelpers.metrics.significance import paired_test
from nbhelpers.paths import repository_root
from nbhelpers.results import comparisons, controls, records

NOTEBOOK = "33_ideas"
WITH, WITHOUT = "with", "without"
# settings of a record that hold what was measured beside the recalls
MEASURED = ("RATIO", "RATIO_LOW", "RATIO_HIGH", "TWO_STAGES_MS", "ALL_PAIRS_MS")


@dataclass(frozen=True)
class Idea:
    """An idea and the experiment on it.

    system   the paper's system
    title    what the idea is, in a few words
    world    what the world has, in a few words
    arms     name of an arm -> what it is; the first two are "without" and "with"
    worlds   names of the worlds, one for each version
    """

    system: str
    title: str
    world: str
    arms: Mapping[str, str]
    worlds: tuple[str, ...]


IDEAS = {
    "belief": Idea(
        "PIR",
        "the belief drops tokens",
        "each scene lies small on clutter that no caption mentions",
        {
            WITHOUT: "VIR, all tokens stay",
            WITH: "VIR, the 17 most believed stay",
            "no_vir": "no VIR: the global token alone",
        },
        ("clutter1",),
    ),
    "lca": Idea(
        "PIR",
        "the caption instructs itself (LCA)",
        "as many office words as words of its own stand in each caption",
        {WITHOUT: "mean of the words", WITH: "LCA, three cycles"},
        ("wordy1", "wordy2"),
    ),
    "affiliation": Idea(
        "PIR",
        "the affiliation loss",
        "ten classes that look alike",
        {WITHOUT: "contrastive loss alone", WITH: "affiliation loss too"},
        ("alike1", "alike2"),
    ),
    "adapter": Idea(
        "PE-RSITR",
        "an adapter in a frozen CLIP",
        "60 training images with two captions each",
        {WITHOUT: "all of CLIP is trained", WITH: "the adapter alone is trained"},
        ("few1",),
    ),
    "two_stages": Idea(
        "CFITR",
        "codes, then reranking of 10",
        "a gallery of 420 images and their captions",
        {WITHOUT: "codes alone", WITH: "codes, then 10 candidates are reranked"},
        ("gallery1",),
    ),
    "fourier": Idea(
        "BITA",
        "Fourier mixing in the place of self-attention",
        "the generated set as it is; the question is the time of a step",
        {WITHOUT: "self-attention", WITH: "Fourier mixing"},
        ("plain",),
    ),
}


@dataclass(frozen=True)
class Finding:
    """What the records of an idea in one world say.

    scores      arm -> mR of each seed
    difference  with less without, in points of mR, with its 95 % interval (low, high) over seeds
                and images, and its p
    measured    further numbers of the arm with, a list over seeds
    chance      mR of a random order
    """

    idea: str
    world: str
    scores: dict[str, list[float]]
    difference: dict[str, float]
    measured: dict[str, list[float]]
    chance: float

    @property
    def verdict(self) -> str:
        """Whether the idea helps by more than the interval."""
        if self.difference["low"] > 0:
            return "the idea helps here"
        if self.difference["high"] < 0:
            return "the idea hurts here"
        return "no difference can be shown"

    def sentence(self) -> str:
        """Say it, with the numbers."""
        one, arms = self.difference, IDEAS[self.idea].arms
        with_, without = (float(np.mean(self.scores[arm])) for arm in (WITH, WITHOUT))
        said = (
            f"World `{self.world}`: test mR {with_:.1f} with ({arms[WITH]}), {without:.1f} without"
            f" ({arms[WITHOUT]}), {self.chance:.1f} by chance, {len(self.scores[WITH])} seeds."
            f" Difference {one['difference']:+.1f}, 95 % interval {one['low']:+.1f} to"
            f" {one['high']:+.1f}: **{self.verdict}**."
        )
        others = [
            f" For comparison, {arms[arm]}: {np.mean(values):.1f}."
            for arm, values in self.scores.items()
            if arm not in (WITH, WITHOUT)
        ]
        return said + "".join(others) + self._times()

    def _times(self) -> str:
        """Say what was measured beside the recalls."""
        if ratios := self.measured.get("RATIO"):
            ends = zip(self.measured["RATIO_LOW"], self.measured["RATIO_HIGH"], strict=True)
            each = ", ".join(
                f"{ratio:.2f} ({low:.2f} to {high:.2f})"
                for ratio, (low, high) in zip(ratios, ends, strict=True)
            )
            shorter = sum(high < 1 for high in self.measured["RATIO_HIGH"])
            return (
                f" A training step takes {np.median(ratios):.2f} times as long with as without"
                f" (steps timed in turn; seed by seed, with 95 % interval: {each}): in {shorter}"
                f" of {len(ratios)} runs the step is shorter by more than the interval."
            )
        if both := self.measured.get("TWO_STAGES_MS"):
            quick, slow = np.median(both), np.median(self.measured["ALL_PAIRS_MS"])
            return (
                f" An image finds its captions in {quick:.0f} ms; reading all pairs takes"
                f" {slow:.0f} ms, {slow / quick:.0f} times as long."
            )
        return ""


def findings(folder: Path | str, idea: str) -> list[Finding]:
    """Return the findings of an idea, one for each world that has records in the folder.

    UserError if there is none.
    """
    found = [one for one in (_finding(folder, idea, world) for world in IDEAS[idea].worlds) if one]
    if not found:
        raise UserError(
            f"{folder} has no record of the idea '{idea}'; run `make run PROFILE=ideas` first."
        )
    return found


def _finding(folder: Path | str, idea: str, world: str) -> Finding | None:
    names = {(NOTEBOOK, f"{idea}-{world}-{arm}"): arm for arm in IDEAS[idea].arms}
    every = [one for one in records.read(folder) if controls.key_of(one) in names]
    if not every:
        return None
    runs, owner = comparisons.read_runs(folder, names)
    scores = {
        arm: [one.metrics["mR"] for _, one in sorted(seeds.items())] for arm, seeds in runs.items()
    }
    settings = [one["settings"] for one in every if names[controls.key_of(one)] == WITH]
    measured = {
        name: [float(one[name]) for one in settings] for name in MEASURED if name in settings[0]
    }
    difference = paired_test(runs[WITH], runs[WITHOUT], owner)
    return Finding(idea, world, scores, difference, measured, recall.chance(owner)["mR"])


def recorded(folder: Path | str) -> list[str]:
    """Return the ideas that have records in a folder."""
    variants = {record["variant"].split("-")[0] for record in records.read(folder)}
    return [idea for idea in IDEAS if idea in variants]


def committed() -> Path:
    """Return the folder of the records that the repository holds."""
    return repository_root() / "data" / "results" / "ideas"


def said(idea: str, folder: Path | str | None = None) -> str:
    """Return the findings of an idea as a Markdown list; by default those of `committed`."""
    found = findings(folder or committed(), idea)
    return "\n".join(f"- {one.sentence()}" for one in found)
