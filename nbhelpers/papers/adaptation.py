"""Fit a CLIP to new data in the usual ways, to compare the MRS-Adapter of PE-RSITR with them.

All are dual encoders over the CLIP of one `CLIPConfig`, trained by CLIP's contrastive loss. Only
full fine-tuning trains the scale of the logits. An adapter or a probe starts as zero or as an
isometry, so each method starts as the CLIP it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.papers.pe_rsitr import PERSITR, FrozenCLIP, PERSITRConfig


class LinearProbe(FrozenCLIP):
    """Train a matrix (D,2D) over the embeddings of each modality."""

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        width = self.clip.visual.output_dim
        self.image_probe = nn.Linear(width, 2 * width, bias=False)
        self.text_probe = nn.Linear(width, 2 * width, bias=False)
        # an isometry: cosines are CLIP's before the first step
        nn.init.orthogonal_(self.image_probe.weight)
        with torch.no_grad():
            self.text_probe.weight.copy_(self.image_probe.weight)

    def embed_images(self, vision: Tensor) -> Tensor:
        """Embed the feature `vision` as unit rows (B,2D)."""
        return F.normalize(self.image_probe(super().embed_images(vision)), dim=1)

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """Embed the feature `text` with its mask as unit rows (B,2D)."""
        return F.normalize(self.text_probe(super().embed_texts(text, mask)), dim=1)


class LoRA(FrozenCLIP):
    """Train LoRA updates of both matrices of every feed-forward network, by peft.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. Attention gets none:
    open_clip keeps it in torch's MultiheadAttention. There peft adds and subtracts the update in
    every pass, and the rounding changes the frozen weights. With rank 1 LoRA trains about as many
    parameters as an MRS-Adapter.
    """

    def __init__(self, config: CLIPConfig, fill: Callable[[nn.Module], nn.Module], rank: int = 1):
        super().__init__(config)
        fill(self)  # before peft renames the weights
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=["c_fc", "c_proj"]), self.clip
        )
        self.train()


class AdaptFormer(PERSITR):
    """Train one bottleneck per tower, shared by its layers as in PE-RSITR's comparison.

    Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
    NeurIPS 2022; peft has no such adapter.
    """

    SCALE, DROPOUT = 0.1, 0.1

    def __init__(self, config: CLIPConfig, bottleneck: int = 64):
        super().__init__(
            PERSITRConfig(config.clip, bottleneck, share_dim=0, adapter_dropout=self.DROPOUT)
        )

    def adapt(self, layer: int, x: Tensor, visual: bool) -> Tensor:
        """Return the scaled output of the adapter for the stream x (B,N,W)."""
        return self.SCALE * super().adapt(layer, x, visual)

    def rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `image` and `text` (B,D), without PE-RSITR's second views."""
        return CLIP.rows(self, batch)

    def losses(self, rows: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute CLIP's loss, not PE-RSITR's."""
        return CLIP.losses(self, rows, batch)


METHODS = ("zero_shot", "linear_probe", "full", "lora", "adaptformer")


def adapted(
    method: str,
    config: CLIPConfig,
    fill: Callable[[nn.Module], nn.Module] = lambda model: model,
    **options,
) -> CLIP:
    """Return the CLIP of `config`, made ready for one of METHODS.

    fill     loads its weights, as Start.fill does
    options  `rank` of lora, `bottleneck` of adaptformer
    UserError for another method.
    """
    if method == "lora":
        return LoRA(config, fill, **options)
    makers = {
        "zero_shot": FrozenCLIP,
        "linear_probe": LinearProbe,
        "full": CLIP,
        "adaptformer": AdaptFormer,
    }
    if method not in makers:
        raise UserError(
            f"There is no adaptation called '{method}'; choose one of {', '.join(METHODS)}."
        )
    return fill(makers[method](config, **options))


def trainable(model: nn.Module) -> int:
    """Count the parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(model: nn.Module) -> int:
    """Return the memory of Adam's two moments, which it keeps for every trainable parameter."""
    return sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
