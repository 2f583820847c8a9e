"""What every dual encoder shares: towers make features, small parts above them make embeddings.

Frozen towers need to see each image and caption only once. Their features can therefore be cached
and travel in batches in the place of `pixels` and `ids`, under the names that `image_features` and
`text_features` give them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.towers import backbones

TURNS = 8  # of a square: four quarter turns of the image, and of its mirror image


def turned(pixels: Tensor, number: int) -> Tensor:
    """(...,S,S) -> the same in one of its TURNS; 0 leaves it as it is."""
    pixels = torch.rot90(pixels, number % 4, (-2, -1))
    return pixels.flip(-1) if number >= 4 else pixels


def unpadded(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`text` (B,L,...) and `mask` (B,L), cut behind the longest caption of the batch: where padding
    is not attended it changes nothing.
    """
    longest = 1 + int(mask.any(dim=0).nonzero().max())
    return text[:, :longest], mask[:, :longest]


class DualEncoder(nn.Module):
    """A subclass gives `image_features`, `text_features`, `embed_images`, `embed_texts` and `loss`."""

    IMAGE_FEATURES: tuple[str, ...] = ("vision",)
    TEXT_FEATURES: tuple[str, ...] = ("text",)
    USES_ALL_PARAMETERS = True  # every trainable one gets a gradient in each step

    def frozen(self) -> list[nn.Module]:
        """Parts that stay in eval mode and get no gradient."""
        return []

    def towers(self) -> list[nn.Module]:
        """The frozen parts that see pixels and ids; what they give can be cached."""
        return self.frozen()

    def frozen_state(self) -> dict[str, Tensor]:
        """The tensors of the towers, by their names in the model."""
        parts = [
            (name, part)
            for name, part in self.named_modules()
            if any(part is one for one in self.towers())
        ]
        return {
            f"{name}.{key}": value
            for name, part in parts
            for key, value in part.state_dict().items()
        }

    def train(self, mode: bool = True):
        super().train(mode)
        for part in self.frozen():
            part.eval()
        return self

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B,3,S,S) normalised pixels -> (B,D) unit rows; with `config.turns`, in eval mode, from
        all turns of each image.
        """
        views = TURNS if getattr(self.config, "turns", False) and not self.training else 1
        return self.embed_views(
            [self.image_features(turned(pixels, number)) for number in range(views)]
        )

    def embed_views(self, views: list[dict[str, Tensor]]) -> Tensor:
        """Features of views of the same images -> (B,D) unit rows, the direction of the mean over
        views.
        """
        rows = [self.embed_images(**features) for features in views]
        return rows[0] if len(rows) == 1 else F.normalize(torch.stack(rows).mean(0), dim=1)

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,L) token ids and mask (1 = word) -> (B,D) unit rows."""
        return self.embed_texts(**self.text_features(ids, mask), mask=mask)

    def embed_batch(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Batch of pixels and ids, or of cached features -> image and text embeddings, (B,D) each."""
        if "pixels" in batch:
            image = self.encode_images(batch["pixels"])
        else:
            image = self.embed_images(**{name: batch[name] for name in self.IMAGE_FEATURES})
        if "ids" in batch:
            return image, self.encode_texts(batch["ids"], batch["mask"])
        return image, self.embed_texts(
            **{name: batch[name] for name in self.TEXT_FEATURES}, mask=batch["mask"]
        )


class OnFrozenTowers(DualEncoder):
    """A dual encoder that with `config.freeze_towers` stands on two frozen towers; else it reads
    pixels and ids itself.
    """

    def stand_on(self, vision: str, text: str, vocab_size: int | None = None):
        """Builds the towers of these names in `backbones`."""
        self.vision_encoder = backbones.vision_tower(vision).requires_grad_(False)
        self.text_encoder = backbones.text_tower(text, vocab_size).requires_grad_(False)

    def towers(self) -> list[nn.Module]:
        return [self.vision_encoder, self.text_encoder] if self.config.freeze_towers else []

    def frozen(self) -> list[nn.Module]:
        return self.towers()

    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B,3,S,S) -> vision: the same pixels, or the tokens (B,1+N,C) of the frozen tower, the
        global one first.
        """
        return {
            "vision": (
                backbones.image_tokens(self.vision_encoder, pixels)
                if self.config.freeze_towers
                else pixels
            )
        }

    def text_features(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """(B,L) -> text: the same ids, or the states (B,L,C) of the frozen tower."""
        if not self.config.freeze_towers:
            return {"text": ids}
        return {"text": self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state}
