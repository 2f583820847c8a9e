"""Not papers of this collection: the usual ways to fit a CLIP to new data, beside which the MRS-Adapter is measured.

All are dual encoders over the CLIP of one `CLIPConfig`, trained by CLIP's contrastive loss; but for
full fine-tuning the scale of the logits rests. What an adapter or a probe adds is zero or an
isometry at first: each starts as the CLIP it is given.
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
    """A matrix (D,2D) over the embeddings of each modality (pe_rsitr.md 1.2)."""

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
        """-> (B,2D) unit rows."""
        return F.normalize(self.image_probe(super().embed_images(vision)), dim=1)

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """-> (B,2D) unit rows."""
        return F.normalize(self.text_probe(super().embed_texts(text, mask)), dim=1)


class LoRA(FrozenCLIP):
    """Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022: peft's, on both matrices of every FFN.

    Not on attention: open_clip keeps it in torch's MultiheadAttention, for which peft adds and
    subtracts the update in every pass, and with the rounding of that the frozen weights wander.
    With rank 1 it trains about as much as an MRS-Adapter.
    """

    def __init__(self, config: CLIPConfig, fill: Callable[[nn.Module], nn.Module], rank: int = 1):
        super().__init__(config)
        fill(self)  # before peft renames the weights
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=["c_fc", "c_proj"]), self.clip
        )
        self.train()


class AdaptFormer(PERSITR):
    """Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
    NeurIPS 2022, one bottleneck per tower, shared by its layers as in the paper's comparison
    (pe_rsitr.md 1.2); peft has no such adapter.
    """

    SCALE, DROPOUT = 0.1, 0.1

    def __init__(self, config: CLIPConfig, bottleneck: int = 64):
        super().__init__(
            PERSITRConfig(config.clip, bottleneck, share_dim=0, adapter_dropout=self.DROPOUT)
        )

    def adapt(self, layer: int, x: Tensor, visual: bool) -> Tensor:
        return self.SCALE * super().adapt(layer, x, visual)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return CLIP.loss(self, batch)


METHODS = ("zero_shot", "linear_probe", "full", "lora", "adaptformer")


def adapted(
    method: str,
    config: CLIPConfig,
    fill: Callable[[nn.Module], nn.Module] = lambda model: model,
    **options,
) -> CLIP:
    """The CLIP of `config` after `fill`, which loads its weights as Start.fill does, made ready for one of METHODS.

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
    """Number of parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(model: nn.Module) -> int:
    """Memory of Adam's two moments, which it keeps for every trainable parameter."""
    return sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
