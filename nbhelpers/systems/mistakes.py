"""What a retrieval system gets wrong, and what its mistakes have in common.

N images, M captions; owner (M,) the image row of each caption. Where items tie for the first place,
each counts in part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.feature_extraction.text import CountVectorizer

from nbhelpers.data.catalog import DataSet
from nbhelpers.data.scenes import generate
from nbhelpers.data.scenes.scene_captions import GRAMMARS
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.metrics import audit
from nbhelpers.metrics.recall import Recall, hit_probability
from nbhelpers.metrics.resampling import draws, interval
from nbhelpers.systems.trained_systems import System
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import RetrievalTask

if TYPE_CHECKING:
    from nbhelpers.tasks.two_stage import Ranking

RANKED_BY = "PPSR online"  # the first of two stages, as in the main record of 23_cfitr
# what a first place may be, from the surest to the wildest
KINDS = ("own", "same sentence", "same picture", "all its words", "same class", "other class")


# ---- one interface to every system
@dataclass(frozen=True, eq=False)
class Scores:
    """How a system ranks one split: scores (N,M) for images (i2t) and captions (t2i) as queries.

    For a system of one stage both are one array. A search in two stages ranks its candidates only,
    the rest is -inf; of items that tie for the last candidate the first are taken.
    ranking, k  of a search in two stages: all its scores, and how many candidates it reads
    """

    i2t: np.ndarray
    t2i: np.ndarray
    ranking: Ranking | None = None
    k: int = 0

    def directions(self, by_pair: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Return (scores, values) with a row for each query, i2t first.

        by_pair (N,M) says something of each pair.
        """
        return (self.i2t, by_pair), (self.t2i.T, by_pair.T)

    def recall(self, relevant: np.ndarray, ks: tuple[int, ...] = (1, 5, 10)) -> Recall:
        """Recalls by expectation where relevant (N,M) says which items are right.

        A query none of whose right items is ranked at all misses, as in `search.two_stage`.
        UserError if a query has no right item.
        """
        if not (relevant.any(0).all() and relevant.any(1).all()):
            raise UserError("Some query has no right item; leave it out.")
        found = [_ranked(scores, right, ks) for scores, right in self.directions(relevant)]
        if self.ranking is not None:
            found = self._over_orders(found, relevant, ks)
        (i2t_ranks, i2t_hits), (t2i_ranks, t2i_hits) = found
        return Recall("expectation", ks, i2t_ranks, t2i_ranks, i2t_hits, t2i_hits)

    def _over_orders(self, found: list, relevant: np.ndarray, ks: tuple[int, ...]) -> list:
        """Return ranks and hits both ways, averaged over orders of tied last candidates."""
        from nbhelpers.tasks import two_stage  # which needs faiss

        assert self.ranking is not None, "only a search in two stages has candidates"
        (i2t, t2i), fine = self.ranking.coarse[RANKED_BY], self.ranking.fine
        (i2t_ranks, i2t_hits), (t2i_ranks, t2i_hits) = found
        return [
            two_stage.over_orders(i2t_ranks, i2t_hits, i2t, fine, relevant, self.k, ks),
            two_stage.over_orders(t2i_ranks, t2i_hits, t2i.T, fine.T, relevant.T, self.k, ks),
        ]


def scores(
    system: System,
    data: DataSet,
    cache: Path,
    folder: Path,
    k: int,
    split: str = "test",
    workers: int = 2,
) -> Scores:
    """How a trained system of any kind ranks a split, as its own notebook evaluates it.

    cache   folder of decoded images and cached features
    folder, k   of a search in two stages (CFITR): the run's folder, where 23_cfitr wrote its
                stores, and the number of
            candidates; they are chosen by PPSR with the column means of the training queries
    """
    model = system.model
    task = RetrievalTask(
        data,
        system.tokenizer,
        system.image,
        workers=workers,
        frozen=FrozenTowers.of(model, cache),
    )
    if system.has_two_stages:
        return _two_stages(system, task, folder, k, split)
    similarity = task.embeddings(model, split).similarity()
    return Scores(similarity, similarity)


def _two_stages(system: System, task: RetrievalTask, folder: Path, k: int, split: str) -> Scores:
    from nbhelpers.tasks import two_stage  # which needs faiss

    place = two_stage.store_folder(folder, system.model)
    stores = two_stage.write_stores(system.model, task, split, place / split)
    banks = two_stage.write_stores(system.model, task, "train", place / "train", states=False)
    owner = task.table(split).owner()
    ranking = two_stage.rank(system.model, stores, owner, k, banks, [RANKED_BY], place / split)
    i2t, t2i = ranking.coarse[RANKED_BY]
    by_image = np.where(two_stage.chosen(i2t, k), ranking.fine, -np.inf)
    by_text = np.where(two_stage.chosen(t2i.T, k).T, ranking.fine, -np.inf)
    return Scores(by_image, by_text, ranking, k)


def _ranked(
    scores: np.ndarray, right: np.ndarray, ks: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and right items (Q,G) -> expected rank (Q,) of the first right item and hits (Q,K).

    UserError on NaN.
    """
    if np.isnan(scores).any():
        raise UserError("The scores hold NaN, so nothing can be ranked; look for a diverged model.")
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    above, tied = (scores > best).sum(1), (scores == best).sum(1)
    own = ((scores == best) & right).sum(1)
    hits = hit_probability(above, tied, own, ks) * np.isfinite(best)
    return above + (tied - own) / (own + 1), hits


# ---- which items are right
def own_pairs(owner: np.ndarray) -> np.ndarray:
    """(N,M) booleans: the pairs that the protocol calls right."""
    return owner[None, :] == np.arange(owner.max() + 1)[:, None]


def same_sentence(table: CaptionTable, how: str = "spaces") -> np.ndarray:
    """Return (N,M): the image has this very sentence among its own captions.

    Captions are normalised by `how` (audit.NORMALISE).
    """
    sentence = pd.factorize(table.captions.text.map(audit.NORMALISE[how]))[0]
    has = np.zeros((len(table), sentence.max() + 1), bool)
    has[table.owner(), sentence] = True
    return has[:, sentence]


def all_words(table: CaptionTable) -> np.ndarray:
    """Return (N,M): the captions of the image hold every telling word of the caption.

    A word tells something if the captions of at most half of the images use it. A rough judge: it
    knows neither order nor number of a word, and "plane" is not "planes".
    """
    texts = table.captions.text.map(audit.NORMALISE["words"])
    by_caption = CountVectorizer(analyzer=str.split, binary=True, dtype=np.int32).fit_transform(
        texts
    )
    of_image = pd.get_dummies(pd.Series(table.owner()), dtype=np.int32).to_numpy().T
    by_image = (of_image @ by_caption > 0).astype(np.int32)
    telling = by_image.mean(axis=0) <= 0.5
    by_caption, by_image = by_caption[:, telling], by_image[:, telling]
    return (by_image @ by_caption.T) == np.asarray(by_caption.sum(axis=1)).T


def same_picture(table: CaptionTable, hashes: np.ndarray, within: int = 6) -> np.ndarray:
    """Return (N,M): the image and that of the caption are near-duplicates, or the same.

    Near-duplicates are those of `audit.near_duplicates`.
    """
    row = pd.Series(np.arange(len(table)), table.images.image_id)
    alike, pairs = np.eye(len(table), dtype=bool), audit.near_duplicates(table, hashes, within)
    alike[row[pairs.image], row[pairs.other]] = alike[row[pairs.other], row[pairs.image]] = True
    return alike[:, table.owner()]


def kinds(table: CaptionTable, hashes: np.ndarray, how: str = "spaces") -> np.ndarray:
    """Return (N,M) positions in KINDS: the surest kind that holds for this pair.

    hashes (N,) are `audit.image_hashes` of the images of the table, one split.
    """
    owner, scene = table.owner(), pd.factorize(classes(table))[0]
    holds = (
        own_pairs(owner),
        same_sentence(table, how),
        same_picture(table, hashes),
        all_words(table),
        scene[:, None] == scene[owner],
    )
    return np.select(holds, range(len(holds)), len(holds)).astype(np.int8)


def classes(table: CaptionTable) -> np.ndarray:
    """(N,) scene class of each image; "unknown" where the set does not tell."""
    return table.images.scene.where(table.images.scene != table.images.file, "unknown").to_numpy()


def truths(table: CaptionTable, images: Iterable[str]) -> dict[str, set[str]]:
    """Return for each image of the generated set every sentence that is true of it.

    Keys are ids. `table` is the whole generated set.
    """
    specs = {spec.name: spec for spec in generate.specs(len(table))}
    return {image: _sayable(generate.draw(specs[image])) for image in images}


class FixedChoice:
    """Take the place of a random generator: the grammar gets the wording of this number, 0 or 1."""

    def __init__(self, number: int):
        self.number = number

    def integers(self, _: int) -> int:
        """Return the fixed number."""
        return self.number


def _sayable(scene: generate.Scene) -> set[str]:
    said = set()
    for number in (0, 1):
        *pools, write = GRAMMARS[scene.spec.world](
            scene.spec.scene, scene.phrases, scene.around, FixedChoice(number)
        )
        said |= set(map(write, chain.from_iterable(pools)))
    return said


# ---- what mistakes have in common
def by_class(recall: Recall, owner: np.ndarray, scene: np.ndarray) -> pd.DataFrame:
    """Return one row per scene class, the worst mR first.

    Columns: images, every R@K both ways and mR in percent. scene (N,).
    """
    parts = [
        pd.DataFrame(100 * hits, columns=[f"{direction}_R@{k}" for k in recall.ks])
        .groupby(of)
        .mean()
        for direction, hits, of in (
            ("i2t", recall.i2t_hits, scene),
            ("t2i", recall.t2i_hits, scene[owner]),
        )
    ]
    table = pd.concat(parts, axis=1)
    table["mR"] = table.mean(axis=1)
    table.insert(0, "images", pd.Series(scene).value_counts())
    return table.sort_values("mR", kind="stable").rename_axis("class")


def misplaced(table: pd.DataFrame, most: int = 8) -> list[str]:
    """The largest entries of a `confusion` off its diagonal, as text."""
    off = (
        table.where(~np.eye(len(table), dtype=bool))
        .stack()
        .sort_values(ascending=False, kind="stable")
    )
    return [
        f"{asked} taken for {found}: {share:.0f} %"
        for (asked, found), share in off.head(most).items()
        if share > 0
    ]


def first_places(scores: np.ndarray) -> np.ndarray:
    """Return the part (Q,G) of the first place that each item holds.

    It is 1, or a share of it where items tie.
    """
    first = scores == scores.max(axis=1, keepdims=True)
    return first / first.sum(axis=1, keepdims=True)


def shares(scores: np.ndarray, kind: np.ndarray) -> pd.Series:
    """Percent of the queries whose first place is of each of KINDS; scores and kind (Q,G)."""
    first = first_places(scores)
    return pd.Series(
        {
            name: 100 * float(first[kind == number].sum()) / len(first)
            for number, name in enumerate(KINDS)
        }
    )


def confusion(scores: np.ndarray, asked: np.ndarray, found: np.ndarray) -> pd.DataFrame:
    """Return the percentage of a class's queries whose first item is of each class.

    Rows are classes of queries, columns of items. asked (Q,), found (G,) are class names.
    """
    names = sorted({*asked, *found})
    of_items = found[:, None] == np.array(names)
    return (
        pd.DataFrame(100 * first_places(scores) @ of_items, columns=names)
        .groupby(asked)
        .mean()
        .reindex(names)
        .fillna(0.0)
    )


def appearances(scores: np.ndarray, k: int = 10) -> np.ndarray:
    """(Q,G) -> (G,) for how many queries each item is among the first k, ties by expectation."""
    k = min(k, scores.shape[1])
    last = np.partition(scores, -k, axis=1)[:, -k, None]
    above, tied = scores > last, scores == last
    return (above + tied * ((k - above.sum(1)) / tied.sum(1))[:, None]).sum(0)


def hubness(counts: np.ndarray) -> dict[str, float]:
    """Return how unequal appearances (G,) are.

    Skewness (Radovanovic et al., JMLR 11, 2010; 0 is symmetric), appearances of the most frequent
    item as a multiple of the mean, and the percentage of items that appear for less than one query.
    """
    skewness = 0.0 if np.ptp(counts) < 1e-9 else float(stats.skew(counts))  # equal ones have none
    return {
        "skewness": skewness,
        "largest / mean": float(counts.max() / counts.mean()),
        "hardly ever %": 100 * float((counts < 1).mean()),
    }


def rank_correlation(
    generic: np.ndarray,
    ranks: np.ndarray,
    owner: np.ndarray,
    samples: int = 300,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Return Spearman's correlation of two numbers per caption, and its interval.

    Images are drawn with their captions.

    NaN where one of the numbers is the same for all captions; such draws do not count for the
    interval.
    """
    captions: Any = pd.Series(np.arange(len(owner))).groupby(owner).apply(np.array).to_list()
    images = chain.from_iterable(draws(len(captions), samples, seed))
    drawn = (np.concatenate([captions[image] for image in row]) for row in images)
    if _constant(generic, ranks):
        return np.nan, np.nan, np.nan
    found = [
        stats.spearmanr(generic[rows], ranks[rows]).statistic
        for rows in drawn
        if not _constant(generic[rows], ranks[rows])
    ]
    low, high = interval([np.array(found or [np.nan])], level)
    return float(stats.spearmanr(generic, ranks).statistic), float(low), float(high)


def _constant(*columns: np.ndarray) -> bool:
    return any(len(np.unique(column)) < 2 for column in columns)
