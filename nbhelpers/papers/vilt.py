"""Not one of the five: ViLT, on which CFITR stands, as transformers' ViltModel opened where CFITR reaches in, and its files.

Kim, Son, Kim, "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", ICML 2021. B batch,
N patches, L caption length, d width.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViltModel

from nbhelpers import weights
from nbhelpers.errors import UserError


def image_tokens(vilt: ViltModel, vision: Tensor, permutation: Tensor | None = None) -> Tensor:
    """(B,3,S,S) pixels, or the (B,1+N,C) tokens of a frozen tower, -> (B,1+N,d) with position and modality, the class
    token first.

    The patches stand in raster order, or in that of `permutation` (B,N), as the released ViLT draws one at each call.
    UserError if the image is not as large as this ViLT takes it.
    """
    trunk, size = vilt.embeddings, vilt.config.image_size
    if vision.ndim == 3:  # compact size: the map of the frozen tower is the image, its global token stays behind
        vision = vision[:, 1:].transpose(1, 2).unflatten(2, (size, size))
    if tuple(vision.shape[2:]) != (size, size):
        height, width = vision.shape[2:]
        raise UserError(f"This ViLT takes images of {size}x{size}, not {height}x{width}; resize them first.")
    patches = trunk.patch_embeddings.projection(vision).flatten(2).transpose(1, 2) + trunk.position_embeddings[:, 1:]
    if permutation is not None:
        patches = patches.gather(1, permutation.unsqueeze(2).expand_as(patches))
    first = (trunk.cls_token + trunk.position_embeddings[:, :1]).expand(len(patches), -1, -1)
    return trunk.dropout(torch.cat([first, patches], dim=1)) + trunk.token_type_embeddings.weight[1]


def text_tokens(vilt: ViltModel, text: Tensor) -> Tensor:
    """(B,L) ids, or the (B,L,C) states of a frozen tower, -> (B,L,d) with position and modality."""
    trunk = vilt.embeddings
    words = trunk.text_embeddings.word_embeddings(text)
    return trunk.text_embeddings(inputs_embeds=words) + trunk.token_type_embeddings.weight[0]


def through(layers: Iterable[nn.Module], x: Tensor, mask: Tensor | None = None) -> Tensor:
    """x (B,n,d) through some of `vilt.encoder.layer`; mask (B,n), 1 = attended. What is masked has outputs all the same."""
    added = None if mask is None else (1 - mask.float())[:, None, None] * torch.finfo(torch.float32).min
    for layer in layers:
        out = layer(x, added)
        x = out[0] if isinstance(out, tuple) else out  # which of the two depends on transformers' version
    return x


def first_through(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """`through` of one layer for its first token alone: (B,1,d). All tokens are attended, but no other one is made."""
    attention, normed = layer.attention.attention, layer.layernorm_before(x)
    parts = attention.query(normed[:, :1]), attention.key(normed), attention.value(normed)
    query, key, value = (part.unflatten(2, (attention.num_attention_heads, -1)).transpose(1, 2) for part in parts)
    read = F.scaled_dot_product_attention(query, key, value, mask[:, None, None].bool(), attention.dropout.p if layer.training else 0.0)
    read = layer.attention.output(read.transpose(1, 2).flatten(2), x) + x[:, :1]
    return layer.output(layer.intermediate(layer.layernorm_after(read)), read)


# ---- files (cfitr.md section 7) ------------------------------------------------------------------------------------------
_TRUNK = {"text_embeddings": "embeddings.text_embeddings", "token_type_embeddings": "embeddings.token_type_embeddings",
          "transformer.cls_token": "embeddings.cls_token", "transformer.pos_embed": "embeddings.position_embeddings",
          "transformer.patch_embed.proj": "embeddings.patch_embeddings.projection", "transformer.norm": "layernorm",
          "pooler": "pooler"}
_LAYER = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.query": "attention.attention.query",
          "attn.key": "attention.attention.key", "attn.value": "attention.attention.value",
          "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
_FROM_AUTHORS = [(rf"^{a}(?=\.|$)", f"vilt.{b}") for a, b in _TRUNK.items()]
_FROM_AUTHORS += [(rf"^transformer\.blocks\.(\d+)\.{a}\.", rf"vilt.encoder.layer.\1.{b}.") for a, b in _LAYER.items()]
_TO_AUTHORS = [(rf"^vilt\.{b}(?=\.|$)", a) for a, b in _TRUNK.items()]
_TO_AUTHORS += [(rf"^vilt\.encoder\.layer\.(\d+)\.{b}\.", rf"transformer.blocks.\1.{a}.") for a, b in _LAYER.items()]

# In files and in no trunk: heads of other tasks, and a buffer that transformers computes.
DEAD = re.compile(r"(itm|mlm|mpp)_score\.|(vqa_|nlvr2_)?classifier\.|(.*\.)?position_ids$")
STARTS = ("vilt.", "transformer.", "text_embeddings.", "embeddings.")  # of names, once no prefix stands before them
_PARTS = ("query", "key", "value")  # one matrix with the authors, three in transformers


def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names of a trunk -> those of a model of transformers' with the trunk in `vilt`; other names stay."""
    split = {}
    for name, value in state.items():
        joined = ".attn.qkv." in name
        split |= dict(zip((name.replace("qkv", part) for part in _PARTS), value.chunk(3))) if joined else {name: value}
    return weights.rename(split, _FROM_AUTHORS)


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round."""
    state, joined = weights.rename(state, _TO_AUTHORS), {}
    for name, value in state.items():
        if ".attn.query." in name:
            joined[name.replace("query", "qkv")] = torch.cat([state[name.replace("query", part)] for part in _PARTS])
        elif ".attn.key." not in name and ".attn.value." not in name:
            joined[name] = value
    return joined


def read_trunk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a ViLT file under the names that `from_authors` gives.

    The file is of ViLT's authors or of transformers, with or without heads. Of the heads only the
    rank head stays: `rank_output`, else row 1 of the matching head `itm_score`, which says that a
    pair matches.
    """
    state = weights.bare(state, *STARTS)
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
