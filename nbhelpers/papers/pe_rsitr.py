"""PE-RSITR: adapt a frozen CLIP to remote sensing with few parameters.

Yuan, Zhan, Xiong, "Parameter-Efficient Transfer Learning for Remote Sensing Image-Text Retrieval",
TGRS 2023. The file follows the paper: configuration, the MRS-Adapter, the frozen CLIP around it,
the HMMC loss, our files and the authors'. B is the batch, N tokens, W width of a tower, D embedding
width. Parameters have the authors' names.

The authors train with Adam, which is AdamW without decay: TrainConfig(epochs=30, lr=2e-4,
batch_size=16, weight_decay=0.0, betas=(0.9, 0.999), warmup_fraction=0.0, schedule="step"). From
every 20th epoch on, the rate is multiplied by 0.7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.papers import config_checks
from nbhelpers.papers.clip import (
    CLIP,
    CLIPConfig,
    causal_mask,
    image_tokens,
    pool_image,
    pool_text,
    text_tokens,
)
from nbhelpers.papers.dual_encoder import keep_trained, unpadded
from nbhelpers.papers.pir import triplet_loss
from nbhelpers.towers import backbones, checkpoints, foreign_configs
from nbhelpers.training.device import at_least_fp32
from nbhelpers.training.distributed import gather


@dataclass(frozen=True)
class PERSITRConfig(CLIPConfig):
    """Configure one PE-RSITR.

    The defaults are the released configuration. Each deviation from it is a field of its own.
    """

    clip: str = "vit_b32_quickgelu"  # a name in backbones.CLIP
    bottleneck: int = 64  # width inside the adapter
    # channels of its output that both modalities make with one matrix; 0: none
    share_dim: int = 64
    # True: an adapter of its own for each depth, as the paper's figure draws it
    per_layer: bool = False
    adapter_dropout: float = 0.5
    # False: the up projections start like the down projections, so CLIP starts broken
    zero_init: bool = True
    # "parallel": to the FFN, from the stream before it; "after": from the stream behind it
    placement: str = "parallel"
    # the augmented view drops single elements; "token": whole tokens, as in the figure
    view: str = "element"
    view_dropout: float = 0.2
    intra_image: bool = True  # L_v, ranking between images and their augmented views
    intra_text: bool = True  # L_t, the same for captions
    hardest: bool = True  # over the hardest negative of each query; False: over all
    margin: float = 0.2

    def __post_init__(self):
        problems = {
            f"bottleneck is {self.bottleneck}, must be at least 1": self.bottleneck < 1,
            f"share_dim is {self.share_dim}, must not be negative": self.share_dim < 0,
            "adapter_dropout and view_dropout must lie in [0, 1)": not all(
                0 <= rate < 1 for rate in (self.adapter_dropout, self.view_dropout)
            ),
            "placement must be 'parallel' or 'after'": self.placement not in ("parallel", "after"),
            "view must be 'element' or 'token'": self.view not in ("element", "token"),
        }
        config_checks.check(self, problems)

    @classmethod
    def tiny(cls, **changes) -> PERSITRConfig:
        """Return the stand-in CLIP at 112 px, with an adapter in proportion to the paper's."""
        return replace(cls(clip="clip_standin", bottleneck=16, share_dim=16), **changes)

    @classmethod
    def compact(cls, **changes) -> PERSITRConfig:
        """Return the small CLIP over EfficientNet-Lite0 and MiniLM; all three are frozen."""
        return replace(cls(clip="clip_compact", bottleneck=32, share_dim=32), **changes)


class MRSAdapter(nn.Module):
    """The bottleneck of both modalities, which share one up projection beside their own.

    UserError if the shared channels leave no room for a modality's own.
    """

    def __init__(
        self,
        text_width: int,
        vision_width: int,
        bottleneck: int,
        share_dim: int,
        dropout: float = 0.5,
        zero_init: bool = True,
    ):
        super().__init__()
        if share_dim >= min(text_width, vision_width):
            raise UserError(
                f"share_dim is {share_dim}, but the towers are {vision_width} (image) and"
                f" {text_width} (text) wide; make it smaller than {min(text_width, vision_width)}."
            )
        self.down_proj = nn.Linear(text_width, bottleneck)
        self.visual_down_proj = nn.Linear(vision_width, bottleneck)
        self.up_proj = nn.Linear(bottleneck, text_width - share_dim)
        self.visual_up_proj = nn.Linear(bottleneck, vision_width - share_dim)
        self.share_up_proj = nn.Linear(bottleneck, share_dim) if share_dim else None
        self.dropout = dropout
        for name, layer in self.named_children():  # weights start as in nn.Linear: kaiming_uniform
            nn.init.zeros_(layer.bias)
            if zero_init and "up_proj" in name:
                nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, visual: bool) -> Tensor:
        """Map x (...,W) to (...,W): the modality's own channels, then the shared ones.

        The adapter computes in float32 whatever x is, as released.
        """
        down, up = self.down_proj, self.up_proj
        if visual:
            down, up = self.visual_down_proj, self.visual_up_proj
        with torch.autocast(x.device.type, enabled=False):
            inner = F.dropout(F.relu(down(at_least_fp32(x))), self.dropout, self.training)
            parts = [up(inner)]
            if self.share_up_proj is not None:
                parts.append(self.share_up_proj(inner))
            return torch.cat(parts, dim=-1).to(x.dtype)


class FrozenCLIP(CLIP):
    """A frozen CLIP in eval mode, for what is trained beside it.

    Its state dict holds only what is trained, so a checkpoint is small. CLIP comes from its own
    file.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        self.requires_grad_(False)
        self.register_state_dict_post_hook(keep_trained)

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Set the mode of the trained parts; CLIP stays in eval mode."""
        super().train(mode)
        self.clip.eval()  # not in `frozen`, which are the towers whose features can be cached
        return self

    def after_step(self) -> None:
        """Do nothing: the scale of the logits is frozen too."""


def tokens_first(x: Tensor) -> Tensor:
    """Lay x (B,N,W) in memory as (N,B,W), as torch's attention transposes it to train.

    Otherwise its product with a frozen weight copies that weight for each token. Without gradients
    torch's attention takes a faster path, which wants x as it is.
    """
    if not torch.is_grad_enabled():
        return x
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def through_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    adapt: Callable[[int, Tensor], Tensor],
    mask: Tensor | None = None,
    placement: str = "parallel",
) -> Tensor:
    """Pass x (B,N,W) through open_clip's residual blocks, and add `adapt(layer, x)` in each.

    placement  "parallel": `adapt` reads the stream between attention and FFN; "after": the stream
               behind the FFN
    """
    for layer, block in enumerate(blocks):
        x = x + block.attention(tokens_first(block.ln_1(x)), attn_mask=mask)
        fed = x + block.mlp(block.ln_2(x))
        x = fed + adapt(layer, fed if placement == "after" else x)
    return x


class PERSITR(FrozenCLIP):
    """Train only `Uniadapt`: one adapter for all blocks of both towers, or one per depth.

    adapter  makes an adapter, from what `MRSAdapter` takes; a notebook may give a class of its own.
             The adapter is called with the stream (B,N,W) and whether it is of images
    """

    config: PERSITRConfig

    def __init__(self, config: PERSITRConfig, adapter: Callable[..., nn.Module] = MRSAdapter):
        super().__init__(config)
        self._make_adapter = adapter
        if config.per_layer:
            depth = max(self.clip.transformer.layers, self.clip.visual.transformer.layers)
            self.Uniadapt = nn.ModuleList(self._new_adapter() for _ in range(depth))
        else:
            self.Uniadapt = self._new_adapter()
        self.train()

    def _new_adapter(self) -> nn.Module:
        return self._make_adapter(
            self.clip.transformer.width,
            self.clip.visual.transformer.width,
            self.config.bottleneck,
            self.config.share_dim,
            self.config.adapter_dropout,
            self.config.zero_init,
        )

    def adapt(self, layer: int, x: Tensor, visual: bool) -> Tensor:
        """Return what the adapter of one block adds to the stream (B,N,W), computed in float32."""
        adapter = self.Uniadapt[layer] if self.config.per_layer else self.Uniadapt
        with torch.autocast(x.device.type, enabled=False):
            return adapter(at_least_fp32(x), visual).to(x.dtype)

    def view(self, tokens: Tensor) -> Tensor:
        """Return the augmented view: dropout on the tokens (B,N,W) before block 0.

        In eval mode the tokens stay as they are.
        """
        drop = F.dropout if self.config.view == "element" else F.dropout1d
        return drop(tokens, self.config.view_dropout, self.training)

    def image_vectors(self, tokens: Tensor) -> Tensor:
        """Map tokens (B,N,W) of clip.image_tokens to (B,D), not normalised."""
        x = through_blocks(
            self.clip.visual.transformer.resblocks,
            tokens,
            lambda layer, x: self.adapt(layer, x, visual=True),
            placement=self.config.placement,
        )
        return pool_image(self.clip, x)

    def text_vectors(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map tokens (B,L,W) of clip.text_tokens, with mask (B,L), to (B,D), not normalised."""
        x = through_blocks(
            self.clip.transformer.resblocks,
            tokens,
            lambda layer, x: self.adapt(layer, x, visual=False),
            causal_mask(self.clip, tokens.shape[1]),
            self.config.placement,
        )
        return pool_text(self.clip, x, mask)

    def embed_images(self, vision: Tensor) -> Tensor:
        """Embed the feature `vision` as unit rows (B,D)."""
        return unit_rows(self.image_vectors(image_tokens(self.clip, vision)))

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """Embed the feature `text` with its mask (B,L) as unit rows (B,D)."""
        text, mask = unpadded(text, mask)
        return unit_rows(self.text_vectors(text_tokens(self.clip, text), mask))

    def rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `image` and `text` (B,D), in training also each pair's second views."""
        c, mask = self.config, batch["mask"]
        seen = batch if "vision" in batch else self.image_features(batch["pixels"])
        read = batch if "text" in batch else self.text_features(batch["ids"], mask)
        text, mask = unpadded(read["text"], mask)
        patches, words = image_tokens(self.clip, seen["vision"]), text_tokens(self.clip, text)
        rows = {"image": self.image_vectors(patches), "text": self.text_vectors(words, mask)}
        if self.training and c.intra_image:
            rows["intra_image"] = self.image_vectors(self.view(patches))
        if self.training and c.intra_text:
            rows["intra_text"] = self.text_vectors(self.view(words), mask)
        return rows

    def losses(self, rows: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the HMMC loss, the sum of its terms.

        In eval mode both views are the same, so `cross` is the only term.
        """
        c = self.config
        seen = {name: gather(at_least_fp32(part)) for name, part in rows.items()}
        image, text = seen["image"], seen["text"]
        pairs = {"cross": (image, text)}
        if "intra_image" in seen:
            pairs["intra_image"] = image, seen["intra_image"]
        if "intra_text" in seen:
            pairs["intra_text"] = text, seen["intra_text"]
        with torch.autocast(image.device.type, enabled=False):  # as in PIR
            terms = {name: ranking_loss(*pair, c.margin, c.hardest) for name, pair in pairs.items()}
        return {"loss": sum(terms.values()), **terms}


# The HMMC loss
def unit_rows(rows: Tensor) -> Tensor:
    """Divide rows (N,D) by their norms; a row of zeros stays.

    Its cosine with any other is then 0, as released.
    """
    norm = rows.norm(dim=1, keepdim=True)
    return rows / norm.where(norm > 0, 1.0)


def ranking_loss(a: Tensor, b: Tensor, margin: float, hardest: bool = True) -> Tensor:
    """Compute the ranking loss T(a,b) over cosines of (N,D) rows, where equal numbers match.

    Both directions are summed over the batch.
    """
    return triplet_loss(unit_rows(a), unit_rows(b), margin, max_violation=hardest)


# Our files, and the authors'
STARTS = ("PE_RSITR.", "Uniadapt.")  # of names, once no prefix stands before them


def _check_widths(state: dict[str, Tensor], clip: str) -> None:
    """Raise a UserError if an adapter's widths are not those of the CLIP `clip`."""
    size = backbones.clip_size(clip)
    found = {
        name.split(".")[-2]: value.shape[1]
        for name, value in state.items()
        if name.endswith("down_proj.weight")
    }
    wanted = {"visual_down_proj": size.vision["width"], "down_proj": size.text["width"]}
    if found.keys() == wanted.keys() and found != wanted:
        raise UserError(
            f"This adapter is for towers {found['visual_down_proj']} (image) and"
            f" {found['down_proj']} (text) wide, but those of {clip} are"
            f" {wanted['visual_down_proj']} and {wanted['down_proj']}; give a CLIP of the adapter's"
            " widths."
        )


def load_adapter(model: PERSITR, state: dict[str, Tensor]) -> None:
    """Fill the adapter of `model`, whatever its CLIP, from the state dict of another PERSITR.

    UserError, and nothing loaded, if the towers are of other widths or any key does not fit.
    """
    _check_widths(state, model.config.clip)
    checkpoints.load_into(model, state)


class ReleasedPERSITR(nn.Module):
    """The parts under the authors' names: `model` is CLIP."""

    def __init__(self, model: PERSITR):
        super().__init__()
        self.model, self.Uniadapt = model.clip, model.Uniadapt


def load_release(model: PERSITR, state: dict[str, Tensor]) -> None:
    """Fill CLIP and adapter from the authors' state dict.

    UserError lists the keys that do not fit, and nothing is loaded.
    """
    checkpoints.load_into(
        ReleasedPERSITR(model),
        checkpoints.rename(checkpoints.bare(state, *STARTS), [(r"^PE_RSITR\.", "")]),
    )


def config_of_release(state: dict[str, Tensor], options: dict) -> PERSITRConfig:
    """Return the configuration of a released checkpoint.

    A note of ours may hold it. For other files the adapter's sizes come from its tensors. UserError
    for a file without PE-RSITR.
    """
    biases = {
        name.rpartition("Uniadapt.")[2]: value
        for name, value in state.items()
        if name.endswith("_proj.bias")
    }
    if "down_proj.bias" not in biases:
        raise UserError(
            "This file holds no PE-RSITR: Uniadapt.down_proj is missing; give a checkpoint of"
            " PE-RSITR."
        )
    if "nbhelpers" in options:
        return foreign_configs.config_of(PERSITRConfig, "PE-RSITR", options["nbhelpers"])
    return PERSITRConfig(
        bottleneck=len(biases["down_proj.bias"]),
        share_dim=len(biases.get("share_up_proj.bias", ())),
    )


def read(
    path: Path | str,
    fill: Callable[[nn.Module], nn.Module] | None = None,
    clip: str | None = None,
) -> tuple[PERSITR, dict]:
    """Read a PE-RSITR, in eval mode, and its metadata, from our checkpoint or the authors'.

    fill   gives CLIP its weights, as Start.fill does: our checkpoints hold the adapter alone. The
           authors' include CLIP
    clip   a name in backbones.CLIP, if it is not the one in the file
    UserError for a file of another model, with the keys that do not fit, and for a CLIP of other
    widths.
    """
    state, rest = checkpoints.read_checkpoint(path, *STARTS)
    if "meta" not in rest:
        options = checkpoints.settings_in(rest, "options")
        config = config_of_release(state, options)
        config = replace(config, clip=clip or config.clip)
        model = foreign_configs.built(PERSITR, config, state)
        load_release(model, state)
        return model.eval(), {"system": "pe_rsitr", "release": True, "config": options}
    meta = checkpoints.meta_of(rest, path, {"system": "pe_rsitr"})
    if fill is None:
        raise UserError(
            f"{path} holds an adapter alone; give `fill`, which loads the CLIP that it stands on."
        )
    config = foreign_configs.config_of(PERSITRConfig, "PE-RSITR", meta.get("model"))
    config = replace(config, clip=clip or config.clip)
    _check_widths(state, config.clip)
    model = fill(foreign_configs.built(PERSITR, config, state))
    checkpoints.load_into(model, state)
    return model.eval(), meta
