"""ViLT, on which CFITR is built: transformers' ViltModel, open to changes of its parts.

It is not one of the five systems. Kim, Son, Kim, "ViLT: Vision-and-Language Transformer Without
Convolution or Region Supervision", ICML 2021. B is the batch, N patches, L caption length, d width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViltModel

from nbhelpers.errors import UserError


def image_tokens(vilt: ViltModel, vision: Tensor, permutation: Tensor | None = None) -> Tensor:
    """Return image tokens (B,1+N,d) with position and modality, the class token first.

    `vision` is pixels (B,3,S,S) or the tokens (B,1+N,C) of a frozen tower. The patches stand in
    raster order, or in that of `permutation` (B,N); the released ViLT draws one at each call.
    UserError if the image size is not that of this ViLT.
    """
    trunk, size = vilt.embeddings, vilt.config.image_size
    # compact size: the map of the frozen tower is the image, its global token stays behind
    if vision.ndim == 3:
        vision = vision[:, 1:].transpose(1, 2).unflatten(2, (size, size))
    if tuple(vision.shape[2:]) != (size, size):
        height, width = vision.shape[2:]
        raise UserError(
            f"This ViLT takes images of {size}x{size}, not {height}x{width}; resize them first."
        )
    patches = (
        trunk.patch_embeddings.projection(vision).flatten(2).transpose(1, 2)
        + trunk.position_embeddings[:, 1:]
    )
    if permutation is not None:
        patches = patches.gather(1, permutation.unsqueeze(2).expand_as(patches))
    first = (trunk.cls_token + trunk.position_embeddings[:, :1]).expand(len(patches), -1, -1)
    return trunk.dropout(torch.cat([first, patches], dim=1)) + trunk.token_type_embeddings.weight[1]


def text_tokens(vilt: ViltModel, text: Tensor) -> Tensor:
    """Return text tokens (B,L,d) with position and modality.

    `text` is ids (B,L) or the states (B,L,C) of a frozen tower.
    """
    trunk = vilt.embeddings
    words = trunk.text_embeddings.word_embeddings(text)
    return trunk.text_embeddings(inputs_embeds=words) + trunk.token_type_embeddings.weight[0]


def through(layers: Iterable[nn.Module], x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pass x (B,n,d) through some of `vilt.encoder.layer`; mask (B,n), 1 = attended.

    Masked tokens have outputs all the same.
    """
    added = None
    if mask is not None:
        added = (1 - mask.float())[:, None, None] * torch.finfo(torch.float32).min
    for layer in layers:
        out = layer(x, added)
        # which of the two depends on transformers' version
        x = out[0] if isinstance(out, tuple) else out
    return x


def first_through(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Do the same as `through` for one layer, but return its first token alone (B,1,d).

    All tokens are attended, but no other output is computed.
    """
    attention, normed = layer.attention.attention, layer.layernorm_before(x)
    parts = attention.query(normed[:, :1]), attention.key(normed), attention.value(normed)
    query, key, value = (
        part.unflatten(2, (attention.num_attention_heads, -1)).transpose(1, 2) for part in parts
    )
    read = F.scaled_dot_product_attention(
        query,
        key,
        value,
        mask[:, None, None].bool(),
        attention.dropout.p if layer.training else 0.0,
    )
    read = layer.attention.output(read.transpose(1, 2).flatten(2), x) + x[:, :1]
    return layer.output(layer.intermediate(layer.layernorm_after(read)), read)
