"""Where a trained system looks: maps over an image, one interface for all five systems.

    match = explain.match(systems.trained(run.folder, "pir"), "two planes are parked near the
    terminal .") match.map("relevance", picture)

B batch, N patches, S their number along one edge, T tokens. A map is (S,S), in raster order: what a
method says of each patch. Whether it says anything is for `map_checks` to find out. Methods:

belief      where a system has one (pir.md 2.6, pir_clip.md 2.2); it does not know the sentence
attention   the rollout (Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020)
            of what there is of it
relevance   weighs by gradients: integrated gradients of the score (Sundararajan, Taly and Yan, ICML
            2017) from the blurred to the real image, at the first layer that has the system's
            patches, summed over channels
occlusion   what the score loses when a patch is blurred; it costs a pass for every patch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from captum.attr import LayerIntegratedGradients, Occlusion
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from nbhelpers.errors import UserError
from nbhelpers.papers import pir, vilt
from nbhelpers.towers.starting_weights import seeded

if TYPE_CHECKING:
    from nbhelpers.systems.trained_systems import System

AT_ONCE = 64  # images that pass a system at once
PATH = 8  # images on the way from the blurred to the real one


# ---- attention
def rollout(layers: Sequence[Tensor]) -> Tensor:
    """Return attention rollout (B,T,T) of layers (B,heads,T,T), the first one first.

    It is what each token draws from each token of the input. Half of every layer is its residual
    stream. Rows sum to one.
    """
    flow = torch.eye(layers[0].shape[-1], device=layers[0].device)
    for attention in layers:
        mixed = attention.float().mean(1)
        flow = (mixed + torch.eye(mixed.shape[-1], device=mixed.device)) / 2 @ flow
    return flow


@contextmanager
def _watched(modules: Iterable[nn.Module], read: Callable) -> Iterator[list[Tensor]]:
    """Collects `read(module, args, kwargs, out)` of every call, in the order of the calls."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *call: found.append(read(*call)), with_kwargs=True)
        for module in modules
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _of_pir(module: pir.Attention, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
    """(B,heads,M,N) of PIR's attention layer, which keeps no weights."""
    _, k, q, mask = (*args, None)[:4]

    def split(x):
        return x.unflatten(-1, (module.heads, -1)).transpose(1, 2)

    query, key = split(module.linear_q(q)), split(module.linear_k(k))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    return (scores if mask is None else scores.masked_fill(mask, -math.inf)).softmax(3)


def _of_torch(module: nn.MultiheadAttention, args: tuple, kwargs: dict, out: tuple) -> Tensor:
    """(B,heads,T,T) of torch's layer, which open_clip asks for no weights."""
    return module.forward(
        *args, need_weights=True, average_attn_weights=False, attn_mask=kwargs.get("attn_mask")
    )[1]


def _of_vilt(dropout: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
    """(B,heads,T,T): in eval mode a ViLT layer's weights pass the dropout as they are."""
    return out


# ---- one system, one sentence
class Match:
    """How well pictures match one sentence by one system, and where that comes from.

    Get one from `match`.
    """

    def __init__(self, system: System, sentence: str):
        self.system, self.model, self.sentence = system, system.model, sentence
        self.ids, self.mask = system.words(sentence)
        with torch.no_grad():
            self._read()

    def score(self, pixels: Tensor) -> Tensor:
        """Return (B,) for pixels (B,3,size,size); larger is a better match.

        The cosine of a dual encoder, CFITR's single-stream score, or BITA's mean log-probability of
        a token of the sentence.
        """
        raise NotImplementedError

    @torch.no_grad()
    def scores(self, pixels: Tensor) -> np.ndarray:
        """The same without gradients, in parts."""
        return torch.cat([self.score(part).float().cpu() for part in pixels.split(AT_ONCE)]).numpy()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of `map` that this system knows."""
        return ("belief", *MAPS)[0 if hasattr(self, "_belief") else 1 :]

    def map(self, method: str, picture: np.ndarray) -> np.ndarray:
        """(S,S) float of one picture (H,W,3) uint8; relevance and occlusion have signs.

        UserError on an unknown method.
        """
        if method not in self.methods:
            raise UserError(
                f"'{self.system.name}' has no map by '{method}'; choose one of"
                f" {', '.join(self.methods)}."
            )
        pixels = self.system.pixels([picture])
        if method in ("relevance", "occlusion"):
            return getattr(self, f"_{method}")(pixels)
        with torch.no_grad():
            return _square(getattr(self, f"_{method}")(pixels))

    def _read(self) -> None:
        """Reads the sentence, once."""
        self.text = self.model.encode_texts(self.ids, self.mask)

    def _layer(self) -> nn.Module:
        raise NotImplementedError

    def _flow(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _relevance(self, pixels: Tensor) -> np.ndarray:
        layer = self._layer()
        found = LayerIntegratedGradients(self.score, layer).attribute(
            pixels, blurred(pixels), n_steps=PATH
        )
        found = (found[0] if isinstance(found, tuple) else found).detach()
        if found.ndim == 4:  # a map, with channels first in a batch norm and last elsewhere
            return (
                found.sum(1 if isinstance(layer, nn.BatchNorm2d) else 3)[0].cpu().double().numpy()
            )
        return _square(found.sum(2)[:, 1:])

    def _occlusion(self, pixels: Tensor) -> np.ndarray:
        side = self.side(pixels)
        window = (3, pixels.shape[2] // side, pixels.shape[3] // side)
        with torch.no_grad():
            found = Occlusion(self.score).attribute(
                pixels, window, window, blurred(pixels), perturbations_per_eval=AT_ONCE
            )
        return (
            found[0, 0, window[1] // 2 :: window[1], window[2] // 2 :: window[2]]
            .cpu()
            .double()
            .numpy()
        )

    @torch.no_grad()
    def side(self, pixels: Tensor) -> int:
        """S, of patches along one edge."""
        return math.isqrt(self.model.image_features(pixels[:1])["vision"].shape[1] - 1)


MAPS = ("attention", "relevance", "occlusion")


def _square(values: Tensor) -> np.ndarray:
    """(1,N) -> (S,S)."""
    side = math.isqrt(values.shape[1])
    return values.reshape(side, side).cpu().double().numpy()


class _Dual(Match):
    def score(self, pixels: Tensor) -> Tensor:
        """Score the image as it lies, also where the model averages over turns.

        A map shows one picture.
        """
        return (self.model.embed_images(**self.model.image_features(pixels)) @ self.text.T)[:, 0]


class _PIR(_Dual):
    def _layer(self) -> nn.Module:
        """The last of the vision tower, from which also the global token is averaged."""
        tower = self.model.vision_encoder
        return tower.bn2 if hasattr(tower, "bn2") else tower.norm

    def _seen(self, pixels: Tensor) -> dict[str, Tensor]:
        """The image's features, as tokens."""
        features = self.model.image_features(pixels)
        return features | {"vision": self.model.tokens(features["vision"])}

    @torch.no_grad()
    def side(self, pixels: Tensor) -> int:
        return math.isqrt(self._seen(pixels[:1])["vision"].shape[1] - 1)

    def _believed(self, features: dict[str, Tensor]) -> Tensor:
        """(1,1+N). UserError if the belief ranks only some of the patches, which make no map."""
        belief, tokens = self.model.belief(**features), features["vision"].shape[1]
        if belief.shape[1] != tokens:
            raise UserError(
                f"This PIR believes in {belief.shape[1]} of its {tokens} tokens; maps need"
                f" candidates={tokens}."
            )
        return belief

    def _belief(self, pixels: Tensor) -> Tensor:
        return self._believed(self._seen(pixels))[:, 1:]

    def _attention(self, pixels: Tensor) -> Tensor:
        """Return what the most believed token draws from the kept ones in Spatial-PAE.

        Dropped tokens count 0.
        """
        features = self._seen(pixels)
        belief = self._believed(features)
        kept = belief.argsort(dim=1, descending=True, stable=True)[
            :, : self.model.config.filter_size
        ]
        attending = []
        for sa, ca in zip(self.model.img_sa, self.model.img_ca, strict=True):
            attending += [sa.mhatt, ca.mhatt_cross]
        with _watched(attending, _of_pir) as layers:
            self.model.embed_images(**features)
        return torch.zeros_like(belief).scatter(1, kept, rollout(layers)[:, 0])[:, 1:]


class _CLIP(_Dual):
    def _layer(self) -> nn.Module:
        return self.model.clip.visual.ln_pre

    def side(self, pixels: Tensor) -> int:
        return self.model.clip.visual.grid_size[0]

    def _attention(self, pixels: Tensor) -> Tensor:
        """Return what the first token, which makes the embedding, draws from the patches.

        Patches stand last.
        """
        with _watched(
            [block.attn for block in self.model.clip.visual.transformer.resblocks], _of_torch
        ) as layers:
            self.model.encode_images(pixels)
        return rollout(layers)[:, 0, -(self.side(pixels) ** 2) :]


class _PIRCLIP(_CLIP):
    def _read(self) -> None:
        super()._read()
        if self.model.config.belief == "hard":
            raise UserError(
                "Maps need all patches in order; this PIR-CLIP has a hard belief, which drops and"
                " sorts them."
            )

    def _belief(self, pixels: Tensor) -> Tensor:
        return self.model.belief(self.model.image_features(pixels)["vision"])[0][:, 1:]


class _CFITR(Match):
    def _read(self) -> None:
        self.states = self.model.text_states(
            self.model.text_features(self.ids, self.mask)["text"], self.mask
        )

    def score(self, pixels: Tensor) -> Tensor:
        images = self.model.image_states(**self.model.image_features(pixels))
        return self.model.score_pairs(
            images, *(x.expand(len(images), *x.shape[1:]) for x in (self.states, self.mask))
        )

    def _layer(self) -> nn.Module:
        """Embedded patches, before any layer."""
        return self.model.vilt.embeddings.dropout

    def side(self, pixels: Tensor) -> int:
        return math.isqrt(self.model.vilt.embeddings.position_embeddings.shape[1] - 1)

    def _flow(self, pixels: Tensor) -> Tensor:
        """Return (1,L,N): what each token of the text draws from each patch.

        Through upper and lower layers; LFEM is left out.

        Not by way of `score`, whose last layer makes the first token alone.
        """
        count, layers, split = (
            self.states.shape[1],
            self.model.vilt.encoder.layer,
            self.model.config.split,
        )
        with _watched([layer.attention.attention.dropout for layer in layers], _of_vilt) as found:
            images = self.model.image_states(**self.model.image_features(pixels))
            vilt.through(layers[split:], *self.model.join(images, self.states, self.mask))
        return (rollout(found[split:])[:, :count, count:] @ rollout(found[:split]))[:, :, 1:]

    def _attention(self, pixels: Tensor) -> Tensor:
        """Of the first token, from which the score is made."""
        return self._flow(pixels)[:, 0]


class _BITA(Match):
    def score(self, pixels: Tensor) -> Tensor:
        words = (x.expand(len(pixels), -1) for x in (self.ids, self.mask))
        prefix = self.model.prefix(self.model.image_features(pixels)["vision"])
        losses, asked = self.model.token_losses(prefix, *words, self.system.tokenizer.prompt_length)
        return -losses.sum(1) / asked.sum(1)

    def _read(self) -> None:
        longest = int(self.mask.sum())
        self.ids, self.mask = self.ids[:, :longest], self.mask[:, :longest]

    def _layer(self) -> nn.Module:
        return self.model.ln_vision

    def _attention(self, pixels: Tensor) -> Tensor:
        """Return the mean over layers, heads and queries.

        The Fourier mixing between the layers has no weights to roll out.
        """
        layers = self.model.attention_maps(self.model.image_features(pixels)["vision"])
        return torch.stack([layer.mean((1, 2)) for layer in layers]).mean(0)[:, 1:]


_OF = {"pir": _PIR, "pir_clip": _PIRCLIP, "pe_rsitr": _CLIP, "cfitr": _CFITR, "bita": _BITA}


def match(system: System, sentence: str) -> Match:
    """UserError for a system that is none of the five."""
    if system.name not in _OF:
        raise UserError(f"There are no maps of '{system.name}'; choose one of {', '.join(_OF)}.")
    return _OF[system.name](system, sentence)


def untrained(system: System, seed: int = 0) -> System:
    """The control: the same configuration with random weights throughout, also in the towers.

    BITA's control shares the frozen language model of `system`: it only reads what the random parts
    pass on, and at paper size a second one would take 5 GB.
    """
    shared = {"decoder": system.model.opt_model} if system.name == "bita" else {}
    model = seeded(lambda: type(system.model)(system.model.config, **shared), seed)
    return replace(system, model=model.to(system.device).eval())


def blurred(pixels: Tensor) -> Tensor:
    """Return what replaces a hidden patch: the image under a Gaussian blur.

    Its width is a seventh of the image's edge.
    """
    sigma = pixels.shape[-1] / 7
    size = 2 * int(2 * sigma) + 1
    # one direction after the other is faster
    across = gaussian_blur(pixels, [size, 1], [sigma] * 2)
    return gaussian_blur(across, [1, size], [sigma] * 2)


# ---- words
def words_of(system: System, sentence: str) -> tuple[list[str], np.ndarray]:
    """Return the words that the tokenizer reads, and the word of each token.

    (pieces,): -1 for tokens before and behind the words.
    """
    tokenizer = system.tokenizer
    words, around = tokenizer.clean(sentence).split(), tokenizer.encode([""])[0]
    encoded, whole = tokenizer.encode(words), tokenizer.encode([" ".join(words)])[0]
    pieces = np.repeat(np.arange(len(words)), [len(ids) - len(around) for ids in encoded])
    owner = np.full(len(whole), -1)
    owner[1 : 1 + len(pieces)] = pieces[: len(whole) - len(around)]
    return [word for number, word in enumerate(words) if number in owner], owner


@torch.no_grad()
def cycle_attention(system: System, sentence: str) -> tuple[list[str], np.ndarray]:
    """Return words and PIR's language cycle attention (cycles,words).

    It is how much of each word the sentence's own token, the first one, reads in the
    cross-attention of each cycle. Rows sum to less than one, because it also reads itself.

    UserError without LCA.
    """
    _only(system, "pir", "language cycle attention")
    if not system.model.config.lca:
        raise UserError(
            "This PIR was built without LCA, so it has no cycles; build it with lca=True."
        )
    words, owner = words_of(system, sentence)
    ids, mask = system.words(sentence)
    with _watched([layer.mhatt_cross for layer in system.model.txt_ca], _of_pir) as layers:
        system.model.encode_texts(ids, mask)
    rows = torch.cat(layers).mean(1)[:, 0].cpu().double().numpy()
    return words, np.stack(
        [rows[:, : len(owner)][:, owner == word].sum(1) for word in range(len(words))], axis=1
    )


@torch.no_grad()
def word_regions(
    system: System, picture: np.ndarray, sentence: str
) -> tuple[list[str], np.ndarray]:
    """Return words and, for CFITR, what each draws from each patch (words,S,S).

    By rollout of the single stream.
    """
    _only(system, "cfitr", "stream that words and patches share")
    words, owner = words_of(system, sentence)
    one = match(system, sentence)
    flow = one._flow(system.pixels([picture]))[0, : len(owner)]
    return words, np.stack(
        [_square(flow[owner == word].mean(0, keepdim=True)) for word in range(len(words))]
    )


def _only(system: System, name: str, what: str) -> None:
    if system.name != name:
        raise UserError(f"'{system.name}' has no {what}; give '{name}'.")
