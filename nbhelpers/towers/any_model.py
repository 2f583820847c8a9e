"""Open any model that embeds images and texts alike, by a name that its users already write.

A model is named by one of these, in the order in which they are tried:

module:function        a function that returns (encode_images, encode_texts)
NAME=FILE              an architecture of open_clip, and a file of its weights
FOLDER                 a model folder of open_clip or of transformers
NAME,TAG               an architecture of open_clip, and one of its pre-trained weights
NAME                   a CLIP of `public_weights.KNOWN`, such as remoteclip_vit_b32
hf-hub:OWNER/NAME      a repository of the Hugging Face hub; OWNER/NAME works, too
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nbhelpers.errors import UserError, reason
from nbhelpers.keys import key_digest, modules_digest
from nbhelpers.towers.encoders import FORMS, Encoders, unknown

ACTIVATIONS = ("gelu", "quickgelu")
HUB = "hf-hub:"


@dataclass(frozen=True, eq=False)
class AnyModel:
    """A model that `open_model` opened.

    name      as the user wrote it
    digest    sha256 of its layers and weights; "" for functions, whose content is unknown
    settings  what else decides its vectors: image size, mean, context length, tokenizer, prompt
    notes     sentences about what was decided when it was opened
    encoders  the network; None for functions
    """

    name: str
    digest: str
    images: Callable[[Sequence[Image.Image]], Any]
    texts: Callable[[Sequence[str]], Any]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    encoders: Encoders | None = None

    def encode_images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return float32 unit rows (N,D) of PIL images.

        UserError if the model gives another number of rows, NaN, or a row of zeros.
        """
        return self._rows("images", self.images, list(pictures))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 unit rows (M,D) of sentences, each put into the prompt.

        UserError as `encode_images`.
        """
        template = self.settings.get("prompt", "{}")
        return self._rows("texts", self.texts, [template.replace("{}", text) for text in texts])

    def prompted(self, template: str) -> AnyModel:
        """Return this model with a template such as "an aerial photograph of {}".

        UserError if the place of the sentence, {}, is missing or there twice.
        """
        if template.count("{}") != 1:
            raise UserError(
                f"The prompt is '{template}'; write {{}} once, where the sentence belongs."
            )
        return replace(self, settings=self.settings | {"prompt": template})

    @torch.inference_mode()
    def _rows(self, what: str, encode: Callable[[list], Any], items: list) -> np.ndarray:
        if not items:
            raise UserError(f"There are no {what} to encode; give at least one.")
        found = encode(items)
        rows = found if isinstance(found, Tensor) else torch.from_numpy(np.array(found, np.float32))
        rows = rows.detach().float().cpu()
        if rows.ndim != 2 or len(rows) != len(items):
            raise UserError(
                f"{self.name} gave {what} of shape {tuple(rows.shape)} for {len(items)} {what}; it"
                " must give one row of numbers for each."
            )
        lengths = rows.norm(dim=1)
        wrong = torch.nonzero(~lengths.isfinite() | (lengths == 0)).flatten()
        if len(wrong):
            raise UserError(
                f"{self.name} gave {len(wrong)} rows of zeros or of NaN for {what} (first: number"
                f" {int(wrong[0])} of its batch); check its weights and its precision."
            )
        return F.normalize(rows, dim=1).numpy()


def open_model(
    spec: str,
    activation: str | None = None,
    device: str | torch.device = "cpu",
    others: Sequence[str] = (),
) -> AnyModel:
    """Open a model by a name of one of the forms above, in eval mode on `device`.

    activation  gelu or quickgelu, where neither the name nor the file says with which one of them
                the weights were trained
    others      further names that the caller knows, to be among the nearest of an unknown one
    UserError on an unknown name, with the nearest ones, on weights that do not fit, and on an
    activation that contradicts the weights.
    """
    check_name(spec)
    if activation not in (None, *ACTIVATIONS):
        raise UserError(
            f"The activation is '{activation}'; choose {' or '.join(ACTIVATIONS)}, or leave it out."
        )
    if is_function(spec):
        return _functions(spec, activation)
    from nbhelpers.towers import hugging_face_models, open_clip_models

    name, equals, file = spec.partition("=")
    architecture, comma, tag = spec.partition(",")
    place = Path(spec).expanduser()
    if equals:
        found = open_clip_models.from_file(name, Path(file).expanduser(), activation)
    elif place.is_dir():
        found = from_folder(place, activation)
    elif place.is_file():
        raise UserError(
            f"{spec} is a file of weights, which does not name its network; write NAME={spec}, with"
            f" a NAME of open_clip{open_clip_models.names_of_file(place)}."
        )
    elif comma:
        found = open_clip_models.from_tag(architecture, tag, activation)
    elif spec in open_clip_models.public_names():
        found = open_clip_models.from_public(spec, activation)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", spec.removeprefix(HUB)):
        found = from_folder(hugging_face_models.snapshot(spec.removeprefix(HUB)), activation)
    else:
        raise _unknown(spec, others)
    encoders, notes = found
    return from_encoders(spec, encoders, device, notes)


def check_name(spec: str) -> None:
    """Raise a UserError for an empty name, and for one half of NAME=FILE."""
    if not spec.strip():
        raise UserError(f"The name of the model is empty; write {FORMS}.")
    name, equals, file = spec.partition("=")
    if equals and not (name.strip() and file.strip()):
        raise UserError(
            f"'{spec}' is one half of NAME=FILE; write the name of a network, =, and the file of"
            " its weights."
        )


def _unknown(spec: str, others: Sequence[str]) -> UserError:
    """Return the error for a name that no form has."""
    from nbhelpers.towers import open_clip_models

    if spec in open_clip_models.names():
        return UserError(
            f"{spec} is a network without weights; write {spec},TAG with a tag that open_clip"
            f" knows, or {spec}=FILE."
        )
    known = [*open_clip_models.names(), *open_clip_models.public_names(), *others]
    return unknown(spec, known)


def is_function(spec: str) -> bool:
    """Tell whether a name is module:function."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec) is not None


def from_folder(folder: Path, activation: str | None) -> tuple[Encoders, list[str]]:
    """Open a model folder of open_clip or of transformers; UserError if it is neither."""
    from nbhelpers.towers import hugging_face_models, open_clip_models

    if (folder / open_clip_models.CONFIG).is_file():
        return open_clip_models.from_folder(folder, activation)
    if (folder / hugging_face_models.CONFIG).is_file():
        return hugging_face_models.from_folder(folder, activation)
    raise UserError(
        f"The folder {folder} has neither {open_clip_models.CONFIG} nor"
        f" {hugging_face_models.CONFIG}; name a model folder, or write NAME=FILE."
    )


def from_encoders(
    name: str, encoders: Encoders, device: str | torch.device = "cpu", notes: Sequence[str] = ()
) -> AnyModel:
    """Return the model of two encoders, moved to `device`."""
    place = torch.device(device)
    encoders.module.to(place).eval().requires_grad_(False)

    def images(pictures: Sequence[Image.Image]) -> Tensor:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            pixels = torch.stack(list(pool.map(encoders.pixels, pictures)))
        return encoders.image_rows(pixels.to(place))

    def texts(sentences: Sequence[str]) -> Tensor:
        tokens = encoders.tokens(list(sentences))
        return encoders.text_rows({key: value.to(place) for key, value in tokens.items()})

    digest = modules_digest([encoders.module])
    return AnyModel(name, digest, images, texts, encoders.settings, tuple(notes), encoders)


def content(model: AnyModel) -> str:
    """Return a digest of all that decides the vectors of a model; "" if it is unknown."""
    return key_digest(model.digest, model.settings) if model.digest else ""


def _functions(spec: str, activation: str | None) -> AnyModel:
    """Open module:function; UserError if it is not there or returns no two functions."""
    if activation:
        raise UserError(f"{spec} decides its own activation; leave --activation out.")
    module, _, name = spec.partition(":")
    made = _called(spec, module, name)
    if not (isinstance(made, tuple) and len(made) == 2 and all(map(callable, made))):
        raise UserError(
            f"{spec} returned {type(made).__name__}; it must return two functions, one for a list"
            " of PIL images and one for a list of sentences."
        )
    run = partial(_run, spec)
    return AnyModel(spec, "", partial(run, made[0]), partial(run, made[1]), {})


def _called(spec: str, module: str, name: str) -> object:
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(
            f"{spec} cannot be called ({type(error).__name__}: {reason(error)}); name a module"
            " that Python can import from this folder, and its function without arguments."
        ) from error
    finally:
        sys.path[:] = before


def _run(spec: str, encode: Callable[[list], Any], items: list) -> object:
    try:
        rows = encode(items)
        return rows if isinstance(rows, Tensor) else np.asarray(rows, np.float32)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(
            f"An encoder of {spec} failed ({type(error).__name__}: {reason(error)}); it gets a"
            " list, and returns an array with one row for each item."
        ) from error
