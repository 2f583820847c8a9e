"""Share the frame of every dual encoder: frozen towers make features, small parts make embeddings.

A frozen tower needs to see each image and caption only once. Its features can therefore be cached.
A batch then holds them in place of `pixels` and `ids`, under the names that `image_features` and
`text_features` give them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.towers import backbones
from nbhelpers.training.device import on_host

# Views of a square image: four quarter turns of it, and of its mirror image
TURNS = 8


def turned(pixels: Tensor, number: int) -> Tensor:
    """Return pixels (...,S,S) in one of their TURNS; number 0 leaves them as they are."""
    pixels = torch.rot90(pixels, number % 4, (-2, -1))
    return pixels.flip(-1) if number >= 4 else pixels


def unpadded(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cut `text` (B,L,...) and `mask` (B,L) behind the longest caption of the batch.

    Where padding is not attended this changes no result.
    """
    longest = 1 + int(np.flatnonzero(on_host(mask).any(axis=0)).max())
    return text[:, :longest], mask[:, :longest]


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    is_spared: Callable[[str, nn.Parameter], bool],
) -> list[dict]:
    """Group trainable parameters: those with weight decay, then the spared ones."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, p in named:
        if p.requires_grad:
            (spared if is_spared(name, p) else decayed).append(p)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


def keep_trained(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """Drop what is frozen from a state dict; a hook of `register_state_dict_post_hook`."""
    trained = {prefix + name for name, p in model.named_parameters() if p.requires_grad}
    for name in [name for name in state if name.startswith(prefix) and name not in trained]:
        del state[name]


class DualEncoder(nn.Module):
    """Embed images and texts apart, as unit rows.

    A subclass gives `image_features`, `text_features`, `embed_images`, `embed_texts` and `losses`.
    The loss reads pixels and captions only through `rows`, so that these can be computed in
    micro-batches (`training.cached_gradients`).
    """

    IMAGE_FEATURES: tuple[str, ...] = ("vision",)
    TEXT_FEATURES: tuple[str, ...] = ("text",)
    USES_ALL_PARAMETERS = True  # every trainable one gets a gradient in each step

    def frozen(self) -> list[nn.Module]:
        """Return the parts that stay in eval mode and get no gradient."""
        return []

    def towers(self) -> list[nn.Module]:
        """Return the frozen parts that read pixels and ids, so that their output can be cached."""
        return self.frozen()

    def frozen_state(self) -> dict[str, Tensor]:
        """Return the tensors of the towers, by their names in the model."""
        towers = {id(part) for part in self.towers()}
        state: dict[str, Tensor] = {}
        for name, part in self.named_modules():
            if id(part) in towers:
                part.state_dict(destination=state, prefix=f"{name}.")
        return dict(state)

    def train(self, mode: bool = True) -> DualEncoder:
        """Set the mode of the model, but keep the frozen parts in eval mode."""
        super().train(mode)
        for part in self.frozen():
            part.eval()
        return self

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Embed normalised pixels (B,3,S,S) as unit rows (B,D).

        With `config.turns`, in eval mode, all turns of each image count.
        """
        views = TURNS if getattr(self.config, "turns", False) and not self.training else 1
        return self.embed_views(
            [self.image_features(turned(pixels, number)) for number in range(views)]
        )

    def embed_views(self, views: list[dict[str, Tensor]]) -> Tensor:
        """Embed views of the same images as unit rows (B,D), the direction of their mean."""
        rows = [self.embed_images(**features) for features in views]
        return rows[0] if len(rows) == 1 else F.normalize(torch.stack(rows).mean(0), dim=1)

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed token ids and mask (B,L), 1 = word, as unit rows (B,D)."""
        return self.embed_texts(**self.text_features(ids, mask), mask=mask)

    def embed_batch(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return image and text embeddings (B,D) of pixels and ids, or of cached features."""
        if "pixels" in batch:
            image = self.encode_images(batch["pixels"])
        else:
            image = self.embed_images(**{name: batch[name] for name in self.IMAGE_FEATURES})
        if "ids" in batch:
            return image, self.encode_texts(batch["ids"], batch["mask"])
        features = {name: batch[name] for name in self.TEXT_FEATURES}
        return image, self.embed_texts(**features, mask=batch["mask"])

    def rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what `losses` reads of images and captions: `image` and `text` (B,D)."""
        image, text = self.embed_batch(batch)
        return {"image": image, "text": text}

    def losses(self, rows: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss and its terms from the `rows` of a batch; a subclass gives it."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss and its terms of a batch.

        The batch holds pixels and ids, or cached features, with mask and what `losses` names.
        """
        return self.losses(self.rows(batch), batch)


class OnFrozenTowers(DualEncoder):
    """A dual encoder over two frozen towers if `config.freeze_towers`.

    Else it reads pixels and ids.
    """

    def add_frozen_towers(self, vision: str, text: str, vocab_size: int | None = None) -> None:
        """Build the towers of these names in `backbones`, and freeze them."""
        self.vision_encoder = backbones.vision_tower(vision).requires_grad_(False)
        self.text_encoder = backbones.text_tower(text, vocab_size).requires_grad_(False)

    def towers(self) -> list[nn.Module]:
        """Return both towers if they are frozen."""
        return [self.vision_encoder, self.text_encoder] if self.config.freeze_towers else []

    def frozen(self) -> list[nn.Module]:
        """Return the towers: nothing else is frozen."""
        return self.towers()

    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return `vision`: pixels (B,3,S,S), or tokens (B,1+N,C) of the frozen tower.

        The global token comes first.
        """
        if not self.config.freeze_towers:
            return {"vision": pixels}
        return {"vision": backbones.image_tokens(self.vision_encoder, pixels)}

    def text_features(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return `text`: the ids (B,L), or the states (B,L,C) of the frozen tower."""
        if not self.config.freeze_towers:
            return {"text": ids}
        return {"text": self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state}
