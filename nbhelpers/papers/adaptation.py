"""Fit a CLIP to new data in the usual ways, to compare the MRS-Adapter of PE-RSITR with them.

First stands what each method adds, to any network: `any_clip` adds the same to models of others.
Then come the dual encoders over the CLIP of one `CLIPConfig`, trained by CLIP's contrastive loss.
Only full fine-tuning trains the scale of the logits. An adapter or a probe starts as zero or as an
isometry, so each method starts as the CLIP it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.papers.pe_rsitr import PERSITR, FrozenCLIP, PERSITRConfig

# matrices of feed-forward networks, as open_clip, transformers and timm call them
FEED_FORWARD = ("c_fc", "c_proj", "fc1", "fc2", "intermediate.dense", "output.dense")


def add_probes(model: nn.Module, width: int) -> None:
    """Give a model `image_probe` and `text_probe` (D,2D), at first one isometry.

    So cosines of embeddings, of D = `width` numbers, are at first those of the model.
    """
    model.image_probe = nn.Linear(width, 2 * width, bias=False)
    model.text_probe = nn.Linear(width, 2 * width, bias=False)
    nn.init.orthogonal_(model.image_probe.weight)
    with torch.no_grad():
        model.text_probe.weight.copy_(model.image_probe.weight)


def probed(rows: Tensor, probe: nn.Module) -> Tensor:
    """Map embeddings (B,D) to unit rows (B,2D)."""
    return F.normalize(probe(rows), dim=1)


def add_lora(network: nn.Module, rank: int) -> int:
    """Add LoRA to both matrices of every feed-forward network, by peft; return their number.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. Attention gets none:
    open_clip keeps it in torch's MultiheadAttention. There peft adds and subtracts the update in
    every pass, and the rounding changes the frozen weights. Without feed-forward networks nothing
    is added.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import

    linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    chosen = [name for name in linear if name.endswith(FEED_FORWARD)]
    if chosen:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen)
        inject_adapter_in_model(config, network)
    return len(chosen)


class LinearProbe(FrozenCLIP):
    """Train a matrix (D,2D) over the embeddings of each modality."""

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        add_probes(self, self.clip.visual.output_dim)

    def embed_images(self, vision: Tensor) -> Tensor:
        """Embed the feature `vision` as unit rows (B,2D)."""
        return probed(super().embed_images(vision), self.image_probe)

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """Embed the feature `text` with its mask as unit rows (B,2D)."""
        return probed(super().embed_texts(text, mask), self.text_probe)


class LoRA(FrozenCLIP):
    """Train LoRA updates of both matrices of every feed-forward network.

    With rank 1 LoRA trains about as many parameters as an MRS-Adapter.
    """

    def __init__(self, config: CLIPConfig, fill: Callable[[nn.Module], nn.Module], rank: int = 1):
        super().__init__(config)
        fill(self)  # before peft renames the weights
        add_lora(self.clip, rank)
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
