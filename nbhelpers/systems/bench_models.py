"""Encode the images and captions of a split with any model, once, and keep the vectors.

A model is named as for `any_model.open_model`, or it is one of this project's systems:

pir                     the system that the run runs/default trained
pir=CHECKPOINT          a system's checkpoint: a file of this project or of the authors
clip=CHECKPOINT         any model that `train --system clip` fine-tuned
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nbhelpers.code_identity import code_digest
from nbhelpers.data.archives import open_images
from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.distinct import distinct
from nbhelpers.data.images import checksum
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.papers import any_clip
from nbhelpers.paths import runs_root
from nbhelpers.systems import trained_systems
from nbhelpers.systems.trained_files import RETRIEVAL, SYSTEMS
from nbhelpers.tasks.retrieval import DTYPES
from nbhelpers.towers import any_model, checkpoints, encoders, hugging_face_models, open_clip_models
from nbhelpers.towers.any_model import AnyModel
from nbhelpers.towers.encoders import Encoders
from nbhelpers.training.device import check_precision, matrix_products, resolve

# what makes vectors of images and captions, for the keys of stored ones
CODE = (any_model, encoders, open_clip_models, hugging_face_models)


@dataclass(frozen=True, eq=False)
class Options:
    """How `encode` computes.

    pictures    folder, zip or tar of the images, or the decoded images themselves
    listed      file names of the whole set, where the table is one split of it
    prompt      template such as "an aerial photograph of {}"; "": the caption alone
    activation  gelu or quickgelu, as `open_model` takes it
    device      auto, cpu, cuda or mps
    precision   fp32, tf32, bf16 or fp16
    batch       images, or captions, at once
    cache       folder of decoded images and kept vectors; default: `cache/` of the run folder
    """

    pictures: Path | str | DecodedCache
    listed: Sequence[str] = ()
    prompt: str = ""
    activation: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    batch: int = 64
    cache: Path | None = None


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model makes of a split: float32 unit rows in the order of the table.

    images (N,D), texts (M,D); equal images, and captions that a model cannot tell apart, have equal
    rows.
    digest  sha256 of layers and weights, "" for functions;  notes: what was decided
    """

    name: str
    digest: str
    images: np.ndarray
    texts: np.ndarray
    notes: tuple[str, ...] = ()


def encode(model: str | AnyModel, table: CaptionTable, options: Options) -> Outputs:
    """Encode all images and captions of a table, usually one split.

    Distinct ones pass the model once. Their vectors are kept under a key of the model's content,
    the pixels, the sentences, the prompt and the precision; an encoding that was interrupted goes
    on after its last whole batch. Vectors of functions, whose content is unknown, are not kept.
    UserError for a model, a precision, images or captions that cannot be used.
    """
    place = resolve(options.device)
    check_precision(options.precision, place)
    if options.batch < 1:
        raise UserError(f"The batch is {options.batch}; encode at least 1 at once.")
    if not isinstance(model, AnyModel):
        model = open_any(model, options.activation, place)
    if options.prompt:
        model = model.prompted(options.prompt)
    cache = Path(options.cache or runs_root() / "cache")
    decoded = _decoded(table, options, cache)
    rows = decoded.rows(table.images.file)
    texts = list(table.captions.text)

    def images_of(some: np.ndarray) -> np.ndarray:
        return model.encode_images([Image.fromarray(decoded[rows[row]]) for row in some])

    def texts_of(some: np.ndarray) -> np.ndarray:
        return model.encode_texts([texts[row] for row in some])

    kept = _Kept(model, options, cache, place)
    digests = [decoded.digests[row] for row in rows]
    seen = kept.rows("images", digests, images_of)
    read = kept.rows("texts", _text_keys(model, texts), texts_of)
    if seen.shape[1] != read.shape[1]:
        raise UserError(
            f"{model.name} gives {seen.shape[1]} numbers for an image and {read.shape[1]} for a"
            " text, which cannot be compared; give a model whose towers end alike."
        )
    return Outputs(model.name, model.digest, seen, read, model.notes)


def open_any(
    spec: str, activation: str | None = None, device: str | torch.device = "auto"
) -> AnyModel:
    """Open a model by the name of a system, or by any name that `open_model` takes.

    UserError as `open_model`, and for systems that do not compare one vector of an image with one
    of a sentence.
    """
    any_model.check_name(spec)
    name, equals, file = spec.partition("=")
    if equals and name == any_clip.SYSTEM:
        return fine_tuned(spec, any_clip.read(checkpoints.weight_file(Path(file)))[0], device)
    if name not in SYSTEMS:
        return any_model.open_model(spec, activation, resolve(device), SYSTEMS)
    if activation:
        raise UserError(f"The checkpoint of {name} knows its activation; leave --activation out.")
    if name not in RETRIEVAL:
        raise UserError(f"{name} writes captions and embeds nothing; use `caption`, then `score`.")
    if name == "cfitr":
        raise UserError(
            "cfitr searches in two stages, and its ranking is not that of one vector each; use"
            " `eval --system cfitr`, which writes the same record."
        )
    if equals:
        return of_system(spec, trained_systems.load(name, file, device=device))
    return of_system(spec, trained_systems.trained(runs_root() / "default", name, device=device))


def of_system(name: str, system: trained_systems.System) -> AnyModel:
    """Return a dual encoder of this project as a model like any other."""

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        ids, mask = system.tokenizer([system.tokenizer.clean(text) for text in texts])
        return {"ids": ids, "mask": mask}

    found = Encoders(
        system.model,
        lambda picture: system.pixels([np.asarray(picture.convert("RGB"))])[0].cpu(),
        tokens,
        lambda pixels: system.model.encode_images(pixels),
        lambda words: system.model.encode_texts(words["ids"], words["mask"]),
        {"image": repr(system.image), "tokenizer": system.tokenizer.sha256},
    )
    return any_model.from_encoders(name, found, system.device)


def fine_tuned(name: str, model: any_clip.AnyCLIP, device: str | torch.device = "auto") -> AnyModel:
    """Return a fine-tuned model as a model like any other."""

    def text_rows(tokens: dict[str, Tensor]) -> Tensor:
        ids = tokens[model.text_name]
        return model.encode_texts(ids, tokens.get("attention_mask", torch.ones_like(ids)))

    own = model.encoders
    found = Encoders(model, own.pixels, own.tokens, model.encode_images, text_rows, own.settings)
    return any_model.from_encoders(name, found, resolve(device))


@dataclass(frozen=True, eq=False)
class _Kept:
    """Compute vectors in batches with a bar, and keep them in the cache."""

    model: AnyModel
    options: Options
    cache: Path
    place: torch.device

    def rows(
        self, kind: str, items: list[str], compute: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Return float32 (N,D), one row for each item; equal items are computed once."""
        found = distinct(items)
        once = [items[row] for row in found.first]
        with tqdm(total=len(once), desc=f"encode {kind}", disable=None) as bar:

            def bits(some: np.ndarray) -> dict[str, np.ndarray]:
                with _precisely(self.place.type, self.options.precision):
                    vectors = compute(found.first[some])
                bar.update(len(some))
                # stored as whole numbers, since a store keeps floats in 16 bits
                return {"bits": vectors.view(np.int32)}

            store = self._store(kind, once, bits)
        return np.array(store["bits"]).view(np.float32)[found.row]

    def _store(
        self, kind: str, once: list[str], bits: Callable[[np.ndarray], dict[str, np.ndarray]]
    ) -> ArrayStore:
        batch = self.options.batch
        if not self.model.digest:
            return ArrayStore.in_memory({}, once, bits, batch)
        key = {
            "kind": f"{kind} of any model",
            "model": any_model.content(self.model),
            "precision": self.options.precision,
            "device": self.place.type,
            "code": code_digest(*CODE),
        }
        return ArrayStore.cached(self.cache, key, once, bits, batch)


@contextmanager
def _precisely(device: str, precision: str) -> Iterator[None]:
    """Compute in a precision, in the model's networks and in functions alike."""
    wide = precision in ("fp32", "tf32")
    dtype = None if wide else DTYPES[precision]
    with matrix_products(precision), torch.autocast(device, dtype, enabled=not wide):
        yield


def _text_keys(model: AnyModel, texts: list[str]) -> list[str]:
    """Return what tells captions apart for a model: their tokens, for functions the text."""
    if model.encoders is None:
        return texts
    once = list(dict.fromkeys(texts))
    template = model.settings.get("prompt", "{}")
    tokens = model.encoders.tokens([template.replace("{}", text) for text in once])
    arrays = [np.ascontiguousarray(value.numpy()) for _, value in sorted(tokens.items())]
    keys = {text: checksum(*(array[row] for array in arrays)) for row, text in enumerate(once)}
    return [keys[text] for text in texts]


def _decoded(table: CaptionTable, options: Options, cache: Path) -> DecodedCache:
    if isinstance(options.pictures, DecodedCache):
        return options.pictures
    store = open_images(options.pictures)
    return DecodedCache.build(store, list(table.images.file), cache, options.listed)
