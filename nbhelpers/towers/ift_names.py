"""Rename the tensors of a BERT for the Interactive Fourier Transformer."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nbhelpers.towers.checkpoints import rename

WORDS = "bert.embeddings.word_embeddings.weight"


def from_bert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a published BERT, with or without heads, under the names of `IFT`.

    These are words and positions, the norm of the embeddings, the feed-forward network of each
    layer for text and again for queries, and the head where there is one. Self-attention, token
    types and pooler are dropped. The vocabulary gains one row, [DEC], drawn as in the authors' code
    but from a seed of its own; no caption contains it.
    """
    rules = [
        (
            r"^(bert\.)?pooler\.|token_type_embeddings|position_ids$|\.attention\.|^cls\.seq_relationship",
            None,
        ),
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
        (r"^(embeddings|encoder)\.", r"bert.\1."),
    ]
    found = rename(state, rules)
    query = {
        re.sub(r"(\.layer\.\d+\.(?:intermediate|output))\.", r"\1_query.", name): value
        for name, value in found.items()
        if ".layer." in name
    }
    row = torch.randn(1, found[WORDS].shape[1], generator=torch.Generator().manual_seed(0)) * 0.02
    found[WORDS] = torch.cat([found[WORDS], row.to(found[WORDS].dtype)])
    if "cls.predictions.bias" in found:
        found["cls.predictions.bias"] = F.pad(found["cls.predictions.bias"], (0, 1))
        found |= {
            "cls.predictions.decoder.bias": found["cls.predictions.bias"],
            "cls.predictions.decoder.weight": found[WORDS],
        }
    return found | query


# what no BERT has, or not every file; shell patterns
FROM_BERT_LEFT = ("*.fourier.*", "*.crossattention.*", "cls.*")
