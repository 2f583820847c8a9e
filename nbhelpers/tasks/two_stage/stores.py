"""What is stored of a gallery: packed hash codes, and the states at which the layers are split.

B batch, N images, M texts, W bytes of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nbhelpers.code_identity import code_digest
from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.loaders import PIXEL_CODE
from nbhelpers.data.tokenization import Tokenizer
from nbhelpers.errors import UserError
from nbhelpers.keys import key_digest, tensors_digest
from nbhelpers.tasks import retrieval
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.training.device import at_least_fp32, encoding, encoding_on

FORM = 2  # of a store; others are not read


def store_key(model: nn.Module, kind: str) -> dict[str, object]:
    """Return what the rows of a store depend on, for kind "images" or "texts".

    The model, its settings and code, and the hash length.
    """
    # which only training reads
    state = {name: value for name, value in model.state_dict().items() if name != "bank"}
    read = (RetrievalTask, "features", "pixels_of"), Tokenizer, *PIXEL_CODE
    digest = key_digest(
        FORM,
        model.config,
        tensors_digest(state),
        code_digest(type(model), encode, split_inputs, *read),
    )
    key = {"system": "cfitr", "kind": kind, "bits": model.config.bits, "model": digest[:16]}
    return key if encoding() == "fp32" else key | {"encoded in": encoding()}


def store_folder(run: Path | str, model: nn.Module) -> Path:
    """Return where a run keeps the stores of a trained model.

    It has a folder for each split, as `write_stores` fills it.
    """
    return Path(run) / "stores" / f"23_cfitr-{store_key(model, 'images')['model']}"


@torch.inference_mode()
def encode(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, object]:
    """Return codes, states and, of texts, the mask of encoded inputs.

    Inputs of images have `vision`, of texts `text` and `mask`. Codes (B,W) are uint8, states
    (B,n,d), mask (B,L) uint8. UserError in training mode and on NaN.
    """
    check_eval_mode(model)
    with encoding_on(next(model.parameters()).device):
        if "mask" in inputs:
            states = model.text_states(**inputs)
            h, mask = model.text_codes(states), {"mask": inputs["mask"].to(torch.uint8)}
        else:
            states = model.image_states(**inputs)
            h, mask = model.image_codes(states), {}
    states = at_least_fp32(states)
    if not (states.isfinite().all() and h.isfinite().all()):
        raise UserError(
            "The states or codes of the model hold NaN or infinity; look for a diverged model or"
            " broken pixels."
        )
    return {"codes": pack(model.binary(h)), "states": states} | mask


def check_eval_mode(model: nn.Module) -> None:
    """Raise UserError if the model is in training mode."""
    if model.training:
        raise UserError(
            "The model is in training mode, where dropout and batch statistics change all it gives;"
            " call model.eval()."
        )


def pack(signs: Tensor) -> np.ndarray:
    """Pack signs (B,bits), booleans or -1 and +1, into (B,W) uint8.

    The first bit is the highest. Missing bits of the last byte are 0.
    """
    return np.packbits(signs.cpu().numpy() > 0, axis=1)


def split_inputs(model: nn.Module, task: RetrievalTask, split: str) -> tuple[Callable, Callable]:
    """Return two functions of row numbers (B,): inputs of images, inputs of captions.

    Rows are those of a split in file order.
    They give what `encode` takes, on the model's device: features of the task's cache, or pixels
    and ids.
    """
    table, device = task.table(split), next(model.parameters()).device
    if task.towers is not None:
        task._check_towers(model)
        (seen, read), row = task.features(split), task.distinct_texts(split).row
        first = (0,) if task.views and split == "train" else ()  # of several views of an image
        vision, words = model.IMAGE_FEATURES, (*model.TEXT_FEATURES, "mask")
        return (
            lambda rows: retrieval.taken(seen, vision, (rows, *first), device),
            lambda rows: retrieval.taken(read, words, row[rows], device),
        )
    cleaned = [task.tokenizer.clean(text) for text in table.captions.text]

    def images(rows):
        return model.image_features(task.pixels_of(table, rows, device=device))

    def texts(rows):
        ids, mask = (part.to(device) for part in task.tokenizer([cleaned[row] for row in rows]))
        return model.text_features(ids, mask) | {"mask": mask}

    return images, texts


def write_stores(
    model: nn.Module, task: RetrievalTask, split: str, folder: Path | str, states: bool = True
) -> tuple[ArrayStore, ArrayStore]:
    """Write the stores <folder>/images and <folder>/texts of a split, in file order.

    Equal images and captions are encoded once.
    Without `states` only codes, and of captions that an image repeats only the first, as a bank of
    training queries needs them. A store of other images or captions is replaced; see
    ArrayStore.build for what else an existing folder means.
    """
    images, texts = split_inputs(model, task, split)
    repeated = task.table(split).captions.duplicated().to_numpy()
    kept = np.flatnonzero(~repeated | states)

    def stored(kind: str, items: list[str], inputs: Callable, read_by: str) -> ArrayStore:
        def rows_of(rows: np.ndarray) -> dict[str, object]:
            encoded = encode(model, inputs(rows))
            return encoded if states else {"codes": encoded["codes"]}

        key = store_key(model, kind) | {"inputs": read_by}
        return ArrayStore.build(Path(folder) / kind, key, items, rows_of, renew=True)

    keys = task.text_keys(split)
    text_keys, read_by = [keys[row] for row in kept], task.tokenizer.sha256[:16]
    return (
        stored("images", task.image_keys(split), images, repr(task.image)),
        stored("texts", text_keys, lambda rows: texts(kept[rows]), read_by),
    )
