"""IFT, BITA's interactive Fourier transformer: a BERT with queries that read an image.

The queries read it in every layer. Self-attention is a Fourier transform without weights. B is the
batch, Nq queries, L caption length, T the tokens that are present (Nq, L or both), V image tokens,
D width. Parameters have the authors' names; embeddings, feed-forward networks and head are
transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertIntermediate,
    BertOnlyMLMHead,
    BertOutput,
    BertSelfOutput,
)

from nbhelpers.errors import UserError

MIXINGS = ("fourier", "attention", "none")
Mix = Callable[[Tensor], Tensor]  # (B,T,D) -> (B,T,D)


def fourier_mix(x: Tensor) -> Tensor:
    """Return the real part of the 2-D Fourier transform of x (B,T,D).

    It is joint over tokens and channels, not scaled, and at least float32: FFTs support no 16-bit
    floats, or only for some sizes. Taking the real part after each axis would be another transform.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.fft.fft2(wide, dim=(1, 2)).real.contiguous()


class Residual(nn.Module):
    """Hold the norm behind a residual, under BERT's names."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(width, eps=eps)


class Mixing(nn.Module):
    """Mix tokens as f = LN(x + m).

    m is the Fourier transform of x ("fourier"), or nothing ("none", an ablation). `mix` computes
    the transform; a notebook gives its own.
    """

    def __init__(self, config: BertConfig, mixing: str, mix: Mix = fourier_mix):
        super().__init__()
        self.mixing, self.mix = mixing, mix
        self.output = Residual(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B,T,D) and return (B,T,D).

        The mask is not used: padding changes every output, as in the release.
        """
        return self.output.LayerNorm(x + self.mix(x) if self.mixing == "fourier" else x)


class BertAttention(nn.Module):
    """BERT's attention to tokens of any width, with its residual and norm."""

    def __init__(self, config: BertConfig, context_width: int):
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(context_width, width),
                "value": nn.Linear(context_width, width),
            }
        )
        self.output = BertSelfOutput(config)

    def _split(self, name: str, x: Tensor) -> Tensor:
        return self.self[name](x).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def attend(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let x (B,T,D) read context (B,V,C); mask (B,V), 1 = may be read."""
        seen = None if mask is None else mask[:, None, None].bool()
        query, key = self._split("query", x), self._split("key", context)
        value = self._split("value", context)
        answer = F.scaled_dot_product_attention(
            query, key, value, seen, self.dropout if self.training else 0.0
        )
        return self.output(answer.transpose(1, 2).flatten(2), x)

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """Return (B,heads,T,V), what each token reads, without dropout; rows sum to 1."""
        query, key = self._split("query", x), self._split("key", context)
        return (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(3)


class ImageAttention(BertAttention):
    """Attention of the queries to image tokens."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Let queries x (B,Nq,D) read image tokens (B,V,C)."""
        return self.attend(x, context)


class BertSelfAttention(BertAttention):
    """Self-attention as in BLIP-2's Q-Former, in place of `Mixing` (an ablation).

    Padding is not attended.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let tokens x (B,T,D) attend to each other; mask (B,T), 1 = attended."""
        return self.attend(x, x, mask)


class Layer(nn.Module):
    """Mix all tokens.

    Then queries read the image; then feed-forward networks for queries and for text.
    """

    def __init__(
        self,
        config: BertConfig,
        context_width: int,
        mixing: str,
        cross: bool,
        text: bool,
        mix: Mix = fourier_mix,
    ):
        super().__init__()
        if mixing == "attention":
            self.fourier = BertSelfAttention(config)
        else:
            self.fourier = Mixing(config, mixing, mix)
        self.crossattention = ImageAttention(config, context_width) if cross else None
        if text:
            self.intermediate, self.output = BertIntermediate(config), BertOutput(config)
        self.intermediate_query, self.output_query = BertIntermediate(config), BertOutput(config)

    def forward(
        self, x: Tensor, queries: int, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Pass x (B,T,D), whose first `queries` tokens are queries, through the layer.

        context  (B,V,C) image tokens
        mask     (B,T), 1 = attended
        """
        x = self.fourier(x, mask)
        seeing, text = x[:, :queries], x[:, queries:]
        parts = []
        if queries:
            seeing = self.crossattention(seeing, context) if self.crossattention else seeing
            parts.append(self.output_query(self.intermediate_query(seeing), seeing))
        if text.shape[1]:
            parts.append(self.output(self.intermediate(text), text))
        return torch.cat(parts, dim=1)


class Embeddings(BertEmbeddings):
    """BERT's embeddings without token types.

    Words and their positions stand behind the queries, which have none; then one norm over all.
    """

    def __init__(self, config: BertConfig, text: bool):
        super().__init__(config)
        del self.token_type_embeddings
        if not text:
            del self.word_embeddings, self.position_embeddings

    def forward(self, queries: Tensor | None, ids: Tensor | None) -> Tensor:
        """Embed queries (B,Nq,D) and / or ids (B,L) as (B,T,D)."""
        parts = [] if queries is None else [queries]
        if ids is not None:
            parts.append(
                self.word_embeddings(ids)
                + self.position_embeddings(self.position_ids[:, : ids.shape[1]])
            )
        return self.dropout(self.LayerNorm(torch.cat(parts, dim=1)))


class Encoder(nn.Module):
    """Hold the layers, under BERT's names."""

    def __init__(self, layers: list[Layer]):
        super().__init__()
        self.layer = nn.ModuleList(layers)


class Trunk(nn.Module):
    """Hold embeddings and encoder, under BERT's names."""

    def __init__(self, embeddings: Embeddings, encoder: Encoder):
        super().__init__()
        self.embeddings, self.encoder = embeddings, encoder


class IFT(nn.Module):
    """The whole transformer (`Fformer` in the authors' files).

    context_width  channels of an image token
    mixing         "fourier", or for ablations "attention" or "none"
    cross_every    queries read the image in every layer (1), every other (2), ...
    text           False: the query branch alone, as in stage 2
    mix            what "fourier" computes; a notebook gives its own

    Weights start as N(0, 0.02), norms as the identity, biases at 0. UserError for another mixing.
    """

    def __init__(
        self,
        config: BertConfig,
        context_width: int,
        mixing: str = "fourier",
        cross_every: int = 1,
        text: bool = True,
        mix: Mix = fourier_mix,
    ):
        super().__init__()
        if mixing not in MIXINGS:
            raise UserError(f"There is no mixing '{mixing}'; choose one of {', '.join(MIXINGS)}.")
        layers = [
            Layer(config, context_width, mixing, number % cross_every == 0, text, mix)
            for number in range(config.num_hidden_layers)
        ]
        self.bert = Trunk(Embeddings(config, text), Encoder(layers))
        if text:
            self.cls = BertOnlyMLMHead(config)
            self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
            self.cls.predictions.decoder.bias = self.cls.predictions.bias
        self.apply(_initialise)

    def forward(
        self,
        queries: Tensor | None = None,
        ids: Tensor | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Pass queries (B,Nq,D) and / or ids (B,L) through all layers.

        Returns (B,T,D), the queries first.

        context  (B,V,C), the image tokens that the queries read
        mask     (B,L), 1 = word; only the self-attention of an ablation uses it
        Captions must be padded to the same length: under Fourier mixing padding changes all
        outputs.
        """
        x = self.bert.embeddings(queries, ids)
        count = 0 if queries is None else queries.shape[1]
        if mask is not None and count:
            mask = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
        for layer in self.bert.encoder.layer:
            x = layer(x, count, context, mask)
        return x

    def attention_maps(self, queries: Tensor, context: Tensor) -> list[Tensor]:
        """Return what each query reads of the image, (B,heads,Nq,V) for each layer that reads."""
        found: list[Tensor] = []
        reading = [
            layer.crossattention for layer in self.bert.encoder.layer if layer.crossattention
        ]
        hooks = [
            one.register_forward_hook(lambda module, args, out: found.append(module.weights(*args)))
            for one in reading
        ]
        try:
            self(queries, context=context)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
