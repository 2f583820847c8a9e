"""What every dual encoder shares: towers make features, small parts above them make embeddings.

Frozen towers need to see each image and caption only once. Their features can therefore be cached and travel in batches
in the place of `pixels` and `ids`, under the names that `image_features` and `text_features` give them.
"""
from __future__ import annotations

from torch import Tensor, nn


class DualEncoder(nn.Module):
    """A subclass gives `image_features`, `text_features`, `embed_images`, `embed_texts` and `loss`."""

    IMAGE_FEATURES: tuple[str, ...] = ("vision",)
    TEXT_FEATURES: tuple[str, ...] = ("text",)

    def frozen(self) -> list[nn.Module]:
        """Parts that stay in eval mode and get no gradient."""
        return []

    def towers(self) -> list[nn.Module]:
        """The frozen parts that see pixels and ids; what they give can be cached."""
        return self.frozen()

    def frozen_state(self) -> dict[str, Tensor]:
        """The tensors of the towers, by their names in the model."""
        parts = [(name, part) for name, part in self.named_modules() if any(part is one for one in self.towers())]
        return {f"{name}.{key}": value for name, part in parts for key, value in part.state_dict().items()}

    def train(self, mode: bool = True):
        super().train(mode)
        for part in self.frozen():
            part.eval()
        return self

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B,3,S,S) normalised pixels -> (B,D) unit rows."""
        return self.embed_images(**self.image_features(pixels))

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
        return image, self.embed_texts(**{name: batch[name] for name in self.TEXT_FEATURES}, mask=batch["mask"])
