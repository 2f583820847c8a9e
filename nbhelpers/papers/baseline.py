"""The baseline of all five systems: two frozen towers with a small trained head for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.papers.dual_encoder import OnFrozenTowers
from nbhelpers.papers.pir import contrastive_loss
from nbhelpers.training.device import at_least_fp32
from nbhelpers.training.distributed import gather


@dataclass(frozen=True)
class FrozenConfig:
    """Choose the towers and the width of the heads."""

    vision: str = "efficientnet_lite0"
    text: str = "minilm"
    vocab_size: int | None = None
    embed_dim: int = 512
    hidden: int = 512  # width of the heads' hidden layer; 0: a linear projection
    dropout: float = 0.2
    temperature: float = 0.07
    # sentences are averaged over their words, never over padding
    use_mask: ClassVar[bool] = True
    freeze_towers: ClassVar[bool] = True

    @classmethod
    def tiny(cls, vocab_size: int, **changes) -> FrozenConfig:
        """Return stand-in towers at 112 px."""
        return replace(
            cls(
                vision="swin_standin",
                text="bert_standin",
                vocab_size=vocab_size,
                embed_dim=64,
                hidden=64,
            ),
            **changes,
        )

    @classmethod
    def compact(cls, **changes) -> FrozenConfig:
        """Return EfficientNet-Lite0 and MiniLM from their packages."""
        return replace(cls(), **changes)


class FrozenHeads(OnFrozenTowers):
    """Embed pooled features by small heads, trained with PIR's multi-positive contrastive loss."""

    def __init__(self, config: FrozenConfig):
        super().__init__()
        self.config = config
        self.add_frozen_towers(config.vision, config.text, config.vocab_size)
        self.image_head = self._head(self.vision_encoder.num_features)
        self.text_head = self._head(self.text_encoder.config.hidden_size)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.train()  # the towers are in eval mode from the first batch on

    def _head(self, width: int) -> nn.Module:
        c = self.config
        if not c.hidden:
            return nn.Linear(width, c.embed_dim)
        return nn.Sequential(
            nn.Linear(width, c.hidden),
            nn.GELU(),
            nn.Dropout(c.dropout),
            nn.Linear(c.hidden, c.embed_dim),
        )

    def embed_images(self, vision: Tensor) -> Tensor:
        """Embed the global token of `vision` (B,1+N,C) as unit rows (B,D)."""
        return F.normalize(self.image_head(vision[:, 0]), dim=1)

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """Embed the mean of the words of `text` (B,L,C) as unit rows (B,D)."""
        words = mask.unsqueeze(2).to(text.dtype)
        return F.normalize(self.text_head((text * words).sum(1) / words.sum(1)), dim=1)

    def losses(self, rows: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the contrastive loss and the temperature; the batch holds image_index (B,)."""
        image, text = gather(at_least_fp32(rows["image"])), gather(at_least_fp32(rows["text"]))
        with torch.autocast(image.device.type, enabled=False):  # as in PIR
            loss = contrastive_loss(image, text, self.temp, gather(batch["image_index"]))
        return {"loss": loss, "contrastive": loss, "temp": self.temp.detach()}
