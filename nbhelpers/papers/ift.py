"""IFT, BITA's interactive Fourier transformer (bita.md 2.2): a BERT whose self-attention is a Fourier transform without weights, with queries that read an image in every layer.

B batch, Nq queries, L caption length, T = tokens that are present (Nq, L or both), V image tokens,
D width. Names of parameters are the authors'; embeddings, feed-forward networks and head are
transformers' own.
"""

from __future__ import annotations

import math

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


def fourier_mix(x: Tensor) -> Tensor:
    """X (B,T,D) -> the real part of its joint 2-D Fourier transform over tokens and channels, not scaled; at least float32.

    Not real after each axis, which is another transform. FFTs know no 16-bit floats, or only for
    some sizes.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.fft.fft2(wide, dim=(1, 2)).real.contiguous()


class Residual(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(width, eps=eps)


class Mixing(nn.Module):
    """f = LN(x + m), where m is the Fourier transform of x ("fourier") or nothing ("none", an
    ablation).
    """

    def __init__(self, config: BertConfig, mixing: str):
        super().__init__()
        self.mixing, self.output = mixing, Residual(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,T,D) -> (B,T,D).

        The mask is not used: padding changes every output, as in the release.
        """
        return self.output.LayerNorm(x + fourier_mix(x) if self.mixing == "fourier" else x)


class Attention(nn.Module):
    """BERT's attention, residual and norm included, to tokens of any width."""

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

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """X (B,T,D) asks context (B,V,C), of which mask (B,V) says what may be read (1) -> (B,T,D)."""
        seen = None if mask is None else mask[:, None, None].bool()
        query, key, value = (
            self._split(*part) for part in (("query", x), ("key", context), ("value", context))
        )
        answer = F.scaled_dot_product_attention(
            query, key, value, seen, self.dropout if self.training else 0.0
        )
        return self.output(answer.transpose(1, 2).flatten(2), x)

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """(B,heads,T,V): what each token reads, rows that sum to 1; without dropout."""
        query, key = self._split("query", x), self._split("key", context)
        return (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(3)


class SelfAttention(Attention):
    """In the place of `Mixing` (an ablation): what BLIP-2's Q-Former has.

    Padding is not attended.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, x, mask)


class Layer(nn.Module):
    """Mixing of all tokens; then the queries read the image; then a feed-forward network for
    queries and one for text.
    """

    def __init__(
        self, config: BertConfig, context_width: int, mixing: str, cross: bool, text: bool
    ):
        super().__init__()
        self.fourier = SelfAttention(config) if mixing == "attention" else Mixing(config, mixing)
        self.crossattention = Attention(config, context_width) if cross else None
        if text:
            self.intermediate, self.output = BertIntermediate(config), BertOutput(config)
        self.intermediate_query, self.output_query = BertIntermediate(config), BertOutput(config)

    def forward(
        self, x: Tensor, queries: int, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """X (B,T,D), of which the first `queries` are queries; context (B,V,C) image tokens; mask
        (B,T) -> (B,T,D).
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
    """BERT's without token types: words and their positions behind the queries, which have none;
    then one norm over all.
    """

    def __init__(self, config: BertConfig, text: bool):
        super().__init__(config)
        del self.token_type_embeddings
        if not text:
            del self.word_embeddings, self.position_embeddings

    def forward(self, queries: Tensor | None, ids: Tensor | None) -> Tensor:
        """Queries (B,Nq,D) and / or ids (B,L) -> (B,T,D)."""
        parts = [] if queries is None else [queries]
        if ids is not None:
            parts.append(
                self.word_embeddings(ids)
                + self.position_embeddings(self.position_ids[:, : ids.shape[1]])
            )
        return self.dropout(self.LayerNorm(torch.cat(parts, dim=1)))


class Encoder(nn.Module):
    def __init__(self, layers: list[Layer]):
        super().__init__()
        self.layer = nn.ModuleList(layers)


class Trunk(nn.Module):
    def __init__(self, embeddings: Embeddings, encoder: Encoder):
        super().__init__()
        self.embeddings, self.encoder = embeddings, encoder


class IFT(nn.Module):
    """The whole transformer (`Fformer` in the authors' files).

    context_width  channels of an image token
    mixing         "fourier", or for ablations "attention" or "none"
    cross_every    queries read the image in every layer (1), every other (2), ...
    text           False: the query branch alone, as in stage 2

    Weights start as N(0, 0.02), norms as the identity, biases at 0.
    """

    def __init__(
        self,
        config: BertConfig,
        context_width: int,
        mixing: str = "fourier",
        cross_every: int = 1,
        text: bool = True,
    ):
        super().__init__()
        if mixing not in MIXINGS:
            raise UserError(f"There is no mixing '{mixing}'; choose one of {', '.join(MIXINGS)}.")
        layers = [
            Layer(config, context_width, mixing, number % cross_every == 0, text)
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
        """Queries (B,Nq,D) that read context (B,V,C), and / or ids (B,L) -> (B,T,D), the queries first.

        mask  (B,L), 1 = word; only the self-attention of an ablation heeds it
        Captions must be padded to one and the same length: under Fourier mixing padding changes
        every output.
        """
        x, count = self.bert.embeddings(queries, ids), 0 if queries is None else queries.shape[1]
        if mask is not None and count:
            mask = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
        for layer in self.bert.encoder.layer:
            x = layer(x, count, context, mask)
        return x

    def attention_maps(self, queries: Tensor, context: Tensor) -> list[Tensor]:
        """Of each layer with cross-attention: (B,heads,Nq,V), what each query reads of the image."""
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
