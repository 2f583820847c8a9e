"""Score captions by any model that embeds images and texts: CLIPScore and RefCLIPScore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nbhelpers.data import layouts
from nbhelpers.data.archives import open_images
from nbhelpers.data.rows import image_ids
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.metrics.caption_scores import CaptionScores, clean
from nbhelpers.metrics.clip_score import NAMES, PROMPT, beside, clip_score, ref_clip_score
from nbhelpers.systems.bench_models import Options, Outputs, encode
from nbhelpers.towers.any_model import AnyModel


def with_clip_scores(
    scores: CaptionScores,
    said: Mapping[Any, str],
    truth: Mapping[Any, Sequence[str]],
    model: str | AnyModel,
    options: Options,
    listed: Path | str | None = None,
) -> tuple[CaptionScores, Outputs]:
    """Add CLIPScore and RefCLIPScore by a model to the scores of the captions `said`.

    truth    references by image id, in the order of `scores`
    options  its pictures are the images; without a prompt it is that of the paper
    listed   captions of the data set, which name the file of each id; without them an id is the
             name of its file
    An empty caption scores 0. UserError if an image is not found, or the model cannot be used.
    """
    ids = list(truth)
    files = _files(ids, options, listed)
    table = _table(ids, files, said, truth)
    found = encode(model, table, replace(options, prompt=options.prompt or PROMPT))
    own, references = found.texts[: len(ids)], found.texts[len(ids) :]
    spoken = np.array([bool(clean(said[one])) for one in ids])
    by_image = clip_score(found.images, own) * spoken
    with_references = ref_clip_score(by_image, own, references, table.owner()[len(ids) :])
    values = dict(zip(NAMES, (by_image, with_references), strict=True))
    return beside(scores, values), found


def _files(ids: list, options: Options, listed: Path | str | None) -> list[str]:
    """Return the file of each image id."""
    names = open_images(str(options.pictures)).names
    known = dict(zip(image_ids(names), names, strict=True))
    if listed is not None:
        known |= _listed(listed)
    missing = [one for one in ids if str(one) not in known]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(ids)} captions are of images that --images does not hold"
            f" (first: {missing[0]!r}); give the folder of this set, and its captions as"
            " --references."
        )
    return [known[str(one)] for one in ids]


def _listed(listed: Path | str) -> dict[str, str]:
    """Return id -> file of a data set's captions; none for references that name no files."""
    try:
        images = layouts.read(listed).images
    except UserError:
        return {}
    return dict(zip(map(str, images.image_id), images.file, strict=True))


def _table(
    ids: list, files: list[str], said: Mapping[Any, str], truth: Mapping[Any, Sequence[str]]
) -> CaptionTable:
    """Return the images with the caption of each, then with all references."""
    names = [str(one) for one in ids]
    images = pd.DataFrame({"image_id": names, "file": files, "split": "test", "scene": names})
    own = pd.DataFrame({"image_id": names, "text": [said[one] for one in ids]})
    rest = pd.Series({str(one): list(truth[one]) for one in ids}).explode()
    others = pd.DataFrame({"image_id": rest.index, "text": rest.to_numpy()})
    return CaptionTable("captions", images, pd.concat([own, others]))
