"""Check whether a map explains the score, and marks what the sentence names.

N images, n patches (or words), K pictures of which parts are hidden. An order of patches is as good
as the score falls early when they are hidden in that order, and rises early when they alone are
shown (Petsiuk, Das, Saenko, "RISE", BMVC 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats

from nbhelpers.data.scenes.generate import Scene
from nbhelpers.errors import UserError
from nbhelpers.systems.region_maps import Match, blurred, words_of

if TYPE_CHECKING:
    from nbhelpers.systems.trained_systems import System

STEPS = 7  # into which an order is cut
ORDERS = 2  # random ones of each image; each counts backwards, too
RESAMPLES = 2000


# ---- deletion and insertion
def order_of(relevance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the flat positions of a map from the largest to the smallest value.

    Equal values come in random order.
    """
    flat = np.asarray(relevance, float).ravel()
    return np.lexsort((rng.random(flat.size), -flat))


def curves(
    score_of: Callable[[np.ndarray], np.ndarray], orders: Sequence[np.ndarray], steps: int = STEPS
) -> np.ndarray:
    """Return scores (R,2,steps+1) of R orders.

    Row 0: more and more patches are hidden. Row 1: more and more alone are shown.

    score_of  (K,n) bool of what is shown -> (K,)
    """
    place = np.argsort(orders, axis=1)[:, None]  # of each patch in its order
    hidden = place < np.linspace(0, place.shape[2], steps + 1).round()[:, None]
    shown = np.stack([~hidden, hidden], axis=1)
    # all begin or end alike
    distinct, where = np.unique(shown.reshape(-1, shown.shape[-1]), axis=0, return_inverse=True)
    return score_of(distinct)[where].reshape(shown.shape[:-1])


def compare(
    score_of: Callable, maps: Mapping[str, np.ndarray], seed: int = 0, steps: int = STEPS
) -> dict[str, np.ndarray]:
    """Return curves (2,steps+1) of each map of one image, and of "random" orders.

    "random" is the mean over random orders and the same ones backwards.

    To show the last patches of an order alone is to hide the first ones of it: so the random
    insertion curve is the deletion curve backwards, and has the same area.
    """
    rng = np.random.default_rng(seed)
    some = next(iter(maps.values()))
    orders = [order_of(values, rng) for values in maps.values()] + [
        rng.permutation(np.size(some)) for _ in range(ORDERS)
    ]
    found = curves(score_of, orders, steps)
    deletion = (found[len(maps) :, 0] + found[len(maps) :, 1, ::-1]).mean(0) / 2
    return dict(zip(maps, found[: len(maps)], strict=True)) | {
        "random": np.stack([deletion, deletion[::-1]])
    }


def hidden_score(match: Match, picture: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the score of a picture with some patches blurred: (K,S*S) bool -> (K,).

    True patches are shown.
    """
    pixels = match.system.pixels([picture])
    side, veil = match.side(pixels), blurred(pixels)

    def score_of(shown: np.ndarray) -> np.ndarray:
        stencil = torch.from_numpy(shown).float().reshape(-1, 1, side, side).to(pixels.device)
        return match.scores(torch.where(F.interpolate(stencil, pixels.shape[2:]) > 0, pixels, veil))

    return score_of


def gains(found: Sequence[Mapping[str, np.ndarray]], seed: int = 0) -> pd.DataFrame:
    """Return for each map how much its curves beat the random ones.

    Areas (deletion below, insertion above) are in units of the score. `gain` is their mean with its
    95 % interval over images; `verdict` is what it allows.
    """
    rows = {}
    for name in (name for name in found[0] if name != "random"):
        more = np.array(
            [
                [_area(one[name][kind]) - _area(one["random"][kind]) for kind in (0, 1)]
                for one in found
            ]
        )
        rows[name] = {"deletion": -more[:, 0].mean(), "insertion": more[:, 1].mean()}
        rows[name] |= against_zero((more[:, 1] - more[:, 0]) / 2, seed, "gain")
    return pd.DataFrame(rows.values(), index=list(rows))


def _area(curve: np.ndarray) -> float:
    return float(np.trapezoid(curve, dx=1 / (len(curve) - 1)))


def against_zero(values: np.ndarray, seed: int = 0, name: str = "mean") -> dict[str, object]:
    """Return the mean of one number per image, its 95 % interval, and a verdict.

    "yes": the interval lies above zero; "worse": below; "no": otherwise. One image has no interval:
    its bounds are NaN. UserError for no image.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise UserError("A mean over images needs one or more, not 0; raise IMAGES.")
    low, high = (values.min(), values.max()) if len(values) > 1 else (np.nan, np.nan)
    if low < high:
        found = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        low, high = found.confidence_interval
    verdict = "worse" if high < 0 else "no"
    if low > 0:
        verdict = "yes"
    return {name: values.mean(), "low": low, "high": high, "verdict": verdict}


@torch.no_grad()
def hidden_words(
    system: System, picture: np.ndarray, sentence: str
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the cosine of a picture and a sentence without some words.

    (K,words) bool -> (K,). For a dual encoder.

    Sentences pass one by one, since padding, which some systems read, would tell how many words
    were left out.
    """
    words, image = words_of(system, sentence)[0], system.encode_images([picture])[0]

    def score_of(kept: np.ndarray) -> np.ndarray:
        texts = [
            " ".join(word for word, stays in zip(words, row, strict=True) if stays) for row in kept
        ]
        return np.concatenate([system.encode_texts([text]) for text in texts]) @ image

    return score_of


# ---- on the object
def named(scene: Scene, sentence: str) -> dict[str, np.ndarray]:
    """Return masks (224,224) of what a sentence names in a generated scene.

    An example of a key is "three white planes".

    What is named without the words of its fact, as in "near the terminal", does not count.
    """
    said = f" {sentence.lower().strip(' .')} "
    return {
        phrase.noun: np.any([thing.mask for thing in phrase.objects], axis=0)
        for phrase in scene.phrases
        if phrase.objects and f" {phrase.noun} " in said
    }


def covered(mask: np.ndarray, side: int) -> np.ndarray:
    """(H,W) bool -> (side,side): the share of each patch that a mask covers."""
    return F.adaptive_avg_pool2d(torch.from_numpy(mask)[None].double(), side)[0].numpy()


def on_object(relevance: np.ndarray, mask: np.ndarray) -> float:
    """Return the share of the positive values of a map (S,S) on a mask (H,W).

    A map without positive values counts as even.
    """
    weight = np.clip(relevance, 0, None)
    weight = weight if weight.sum() > 0 else np.ones_like(weight)
    return float((weight * covered(mask, len(weight))).sum() / weight.sum())


def objects_found(
    maps: Mapping[str, Sequence[np.ndarray]], masks: Sequence[np.ndarray], seed: int = 0
) -> pd.DataFrame:
    """Return a row for each method: how much of its maps lies on the named object.

    Its maps are of N images with masks. `share`: mean share on the object. `area`: what the object
    takes. `elsewhere`: the share that maps of other images have there (what habits of place alone
    reach). `excess`: share over the larger of these two, with interval and verdict.
    """
    rows = {}
    for name, some in maps.items():
        share = np.array([[on_object(one, mask) for one in some] for mask in masks])
        own, others = share.diagonal(), (share.sum(1) - share.diagonal()) / max(1, len(masks) - 1)
        area = np.array([covered(mask, len(some[0])).mean() for mask in masks])
        baseline = others if others.mean() > area.mean() else area
        rows[name] = {"share": own.mean(), "area": area.mean(), "elsewhere": others.mean()}
        rows[name] |= against_zero(own - baseline, seed, "excess")
    return pd.DataFrame(rows.values(), index=list(rows))
