"""Rename the tensors of ViLT between the authors' files and transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nbhelpers.towers import checkpoints

# The authors' names -> those of transformers
_TRUNK = {
    "text_embeddings": "embeddings.text_embeddings",
    "token_type_embeddings": "embeddings.token_type_embeddings",
    "transformer.cls_token": "embeddings.cls_token",
    "transformer.pos_embed": "embeddings.position_embeddings",
    "transformer.patch_embed.proj": "embeddings.patch_embeddings.projection",
    "transformer.norm": "layernorm",
    "pooler": "pooler",
}
_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.query": "attention.attention.query",
    "attn.key": "attention.attention.key",
    "attn.value": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_FROM_AUTHORS = [(rf"^{a}(?=\.|$)", f"vilt.{b}") for a, b in _TRUNK.items()]
_FROM_AUTHORS += [
    (rf"^transformer\.blocks\.(\d+)\.{a}\.", rf"vilt.encoder.layer.\1.{b}.")
    for a, b in _LAYER.items()
]

# In files and in no trunk: heads of other tasks, and a buffer that transformers computes.
DEAD = re.compile(r"(itm|mlm|mpp)_score\.|(vqa_|nlvr2_)?classifier\.|(.*\.)?position_ids$")
# of names, once no prefix stands before them
STARTS = ("vilt.", "transformer.", "text_embeddings.", "embeddings.")
_PARTS = ("query", "key", "value")  # one matrix with the authors, three in transformers


def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' names of a trunk to transformers', with the trunk in `vilt`.

    Others stay.
    """
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, matrix in zip(_PARTS, value.chunk(3), strict=False):
                split[name.replace("qkv", part)] = matrix
        else:
            split[name] = value
    return checkpoints.rename(split, _FROM_AUTHORS)


def read_trunk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a ViLT file under the names that `from_authors` gives.

    The file is of ViLT's authors or of transformers, with or without heads. Of the heads only the
    rank head stays: `rank_output`, else row 1 of the matching head `itm_score`, which says that a
    pair matches.
    """
    state = checkpoints.bare(state, *STARTS)
    kept = {name: value for name, value in state.items() if not DEAD.match(name)}
    if any(name.startswith("transformer.") for name in kept):
        kept = from_authors(kept)
    elif not any(name.startswith("vilt.") for name in kept):
        heads = {name: value for name, value in kept.items() if name.startswith("rank_output.")}
        trunk = {f"vilt.{name}": value for name, value in kept.items() if name not in heads}
        kept = trunk | heads
    for part in ("weight", "bias"):
        if (matching := f"itm_score.fc.{part}") in state:
            kept.setdefault(f"rank_output.{part}", state[matching][1:2])
    return kept
