"""Test which systems differ on the same queries, corrected for the number of tests.

A run answers every query of a split; a system has one run for each seed. Two systems are paired by
image, its captions included, and where both have several seeds also by seed. How a single pair of
runs is tested stands in recall.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
import pandas as pd

from nbhelpers.errors import UserError
from nbhelpers.metrics import recall
from nbhelpers.metrics.recall import Recall, check_paired, image_shares, swapped

Runs = Mapping[str, Mapping[int, Recall]]  # system -> seed -> its run


@dataclass(frozen=True, eq=False)
class Groups:
    """What `groups` found; systems stand from the best mean to the worst.

    table        one row per system: seeds, mean and, over seeds, spread (standard deviation; NaN
                 for one seed) of the metric in percent, and group, its letters
    differences  (systems, systems) row less column, in points, over the seeds that both have
    p            (systems, systems) two-sided, corrected by Holm for all pairs; 1 on the diagonal
    """

    metric: str
    level: float
    table: pd.DataFrame
    differences: pd.DataFrame
    p: pd.DataFrame

    def sentences(self) -> list[str]:
        """One plain statement for each pair of systems, the better one first."""
        said = []
        for one, other in combinations(self.table.index, 2):
            points, p = self.differences.loc[one, other], self.p.loc[one, other]
            if p < self.level:
                better, worse = (one, other) if points > 0 else (other, one)
                said.append(
                    f"{better} is better than {worse} by {abs(points):.1f} points of {self.metric}"
                    f" (p = {p:.2g})."
                )
            else:
                said.append(
                    f"{one} and {other} cannot be told apart ({points:+.1f} points of"
                    f" {self.metric}, p = {p:.2g})."
                )
        return said


def groups(
    runs: Runs,
    owner: np.ndarray,
    metric: str = "mR",
    level: float = 0.05,
    samples: int = 10_000,
    seed: int = 0,
) -> Groups:
    """Tests every pair of systems on the same queries and groups those that cannot be told apart.

    runs     system -> {seed: Recall}; all of one split, by one tie rule, with the same cut-offs
    owner    (M,) the image row of each caption, as for `recall.evaluate`
    samples  swaps of the permutation test; of P pairs, the smallest corrected p is P / (samples +
             1)
    Two systems share a letter exactly if their corrected p is not below `level`. UserError if runs
    cannot be paired.
    """
    shares = _shares(runs, owner, metric)
    order = sorted(shares, key=lambda name: -_scores(shares[name]).mean())
    pairs = list(combinations(order, 2))
    found = dict(
        zip(
            pairs,
            _tested([_differences(shares, *pair) for pair in pairs], samples, seed),
            strict=True,
        )
    )
    corrected = holm([p for _, p in found.values()])
    points = pd.DataFrame(0.0, order, order)
    p_values = pd.DataFrame(1.0, order, order)
    for (one, other), p in zip(pairs, corrected, strict=True):
        points.loc[one, other], points.loc[other, one] = found[one, other][0], -found[one, other][0]
        p_values.loc[one, other] = p_values.loc[other, one] = p
    scores = {name: _scores(shares[name]) for name in order}
    table = pd.DataFrame(
        {
            "seeds": [len(scores[name]) for name in order],
            "mean": [scores[name].mean() for name in order],
            "spread": [
                scores[name].std(ddof=1) if len(scores[name]) > 1 else np.nan for name in order
            ],
            "group": letters(p_values.to_numpy() < level),
        },
        index=order,
    )
    return Groups(metric, level, table, points, p_values)


def holm(p: list[float]) -> np.ndarray:
    """Correct p-values for their number by Holm's step-down rule.

    Of m values, the smallest is multiplied by m, the next by m - 1, and so on. None falls below the
    one before it, none exceeds 1 (Scandinavian Journal of Statistics 6, 1979).
    """
    given = np.asarray(p, dtype=float)
    order, corrected = np.argsort(given, kind="stable"), np.empty_like(given)
    factors = len(given) - np.arange(len(given))
    corrected[order] = np.maximum.accumulate(np.minimum(1, given[order] * factors))
    return corrected


def letters(different: np.ndarray) -> list[str]:
    """Return a text of letters for each system; two share one exactly if they do not differ.

    different (S, S) is symmetric and boolean. Insert and absorb (Piepho, Journal of Computational
    and Graphical Statistics 13, 2004).
    """
    columns = [frozenset(range(len(different)))]
    for one, other in np.argwhere(np.triu(different, 1)).tolist():
        split = []
        for column in columns:
            both = {one, other} <= column
            split += [column - {one}, column - {other}] if both else [column]
        columns = [
            part for part in dict.fromkeys(split) if not any(part < whole for whole in split)
        ]
    named = enumerate(sorted(columns, key=sorted))
    names = {letter(number): column for number, column in named}
    return [
        "".join(name for name, column in names.items() if system in column)
        for system in range(len(different))
    ]


def letter(number: int) -> str:
    """0 -> "a", 25 -> "z", then with a stroke: 26 -> "a'"."""
    return chr(ord("a") + number % 26) + "'" * (number // 26)


def paired_test(
    one: Mapping[int, Recall],
    other: Mapping[int, Recall],
    owner: np.ndarray,
    metric: str = "mR",
    samples: int = 5000,
    seed: int = 0,
) -> dict[str, float]:
    """Compare one pair of systems, each given as {seed: run}.

    The result has the number of common seeds, the difference in points, its 95 % interval (low,
    high), and p, uncorrected. One common seed: `recall.paired_test`; several: `crossed_test`.
    """
    shares = _shares({"the first": one, "the second": other}, owner, metric)
    differences = _differences(shares, "the first", "the second")
    if len(differences) > 1:
        return {"seeds": len(differences)} | crossed_test(differences * differences.shape[1])
    (common,) = one.keys() & other.keys()
    return {"seeds": 1} | recall.paired_test(one[common], other[common], owner, samples, seed)[
        metric
    ]


def crossed_test(differences: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Test whether the mean difference of two systems over seeds and images is zero.

    differences (S, N), S at least 2. The result has the mean, its interval (low, high) and the
    two-sided p.

    Seeds and images are both samples of many, and each has an effect of its own: the error of the
    mean adds both up. This is Clark's min F' for crossed samples (Journal of Verbal Learning and
    Verbal Behavior 12, 1973), as a t-test. Where seeds differ much, it errs in up to 11 % of the
    cases with two seeds, 9 % with three, 6 % with five, instead of 5 % (simulated).
    """
    from scipy import stats  # slow to import

    (seeds, images), mean = differences.shape, float(differences.mean())
    of_seeds = images * differences.mean(1).var(ddof=1)
    of_images = seeds * differences.mean(0).var(ddof=1)
    if of_seeds + of_images == 0:
        return {"difference": mean, "low": mean, "high": mean, "p": float(mean == 0)}
    error = np.sqrt((of_seeds + of_images) / (seeds * images))
    freedom = (of_seeds + of_images) ** 2 / (
        of_seeds**2 / (seeds - 1) + of_images**2 / (images - 1)
    )
    half = stats.t.ppf((1 + level) / 2, freedom) * error
    return {
        "difference": mean,
        "low": float(mean - half),
        "high": float(mean + half),
        "p": float(2 * stats.t.sf(abs(mean) / error, freedom)),
    }


def _shares(runs: Runs, owner: np.ndarray, metric: str) -> dict[str, dict[int, np.ndarray]]:
    """Return for each run what each image adds to the metric.

    UserError without a run, or if two cannot be paired.
    """
    every = list(chain.from_iterable(seeds.values() for seeds in runs.values()))
    if not every or not all(runs.values()):
        raise UserError("Every system needs at least one run to be compared.")
    for run in every[1:]:
        check_paired(every[0], run)
    return {
        name: {seed: image_shares(run, owner, metric) for seed, run in seeds.items()}
        for name, seeds in runs.items()
    }


def _scores(seeds: Mapping[int, np.ndarray]) -> np.ndarray:
    return np.array([shares.sum() for shares in seeds.values()])


def _differences(
    shares: Mapping[str, Mapping[int, np.ndarray]], one: str, other: str
) -> np.ndarray:
    """(seeds that both have, images); UserError if there is none."""
    common = sorted(shares[one].keys() & shares[other].keys())
    if not common:
        raise UserError(f"{one} and {other} have no seed in common; run both with one seed.")
    return np.array([shares[one][seed] - shares[other][seed] for seed in common])


def _tested(differences: list[np.ndarray], samples: int, seed: int) -> list[tuple[float, float]]:
    """Return (points, p) of each pair.

    One common seed: images are swapped. Several: `crossed_test`.
    """
    single = [number for number, pair in enumerate(differences) if len(pair) == 1]
    if single:
        p_single = dict(
            zip(
                single,
                swapped(
                    np.concatenate([differences[number] for number in single]).T, samples, seed
                ),
                strict=True,
            )
        )
    return [
        (
            float(pair.sum() / len(pair)),
            float(p_single[number] if len(pair) == 1 else crossed_test(pair)["p"]),
        )
        for number, pair in enumerate(differences)
    ]
