"""PE-RSITR: Yuan, Zhan, Xiong, "Parameter-Efficient Transfer Learning for Remote Sensing Image-Text Retrieval", TGRS 2023.

In the paper's order: configuration, the MRS-Adapter, the frozen CLIP around it, the HMMC loss, our
files and the authors'. B batch, N tokens, W width of a tower, D embedding width. Parameter names
are the authors'.

The authors train with Adam, which AdamW without decay is: TrainConfig(epochs=30, lr=2e-4,
batch_size=16, weight_decay=0.0, betas=(0.9, 0.999), warmup_fraction=0.0, schedule="step"): from
every 20th epoch on, the rate times 0.7 (spec 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.papers.clip import (
    CLIP,
    CLIPConfig,
    causal_mask,
    image_tokens,
    pool_image,
    pool_text,
    text_tokens,
)
from nbhelpers.papers.dual_encoder import unpadded
from nbhelpers.papers.pir import triplet_loss
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.training.distributed import gather


@dataclass(frozen=True)
class PERSITRConfig(CLIPConfig):
    """One PE-RSITR.

    The defaults are the released configuration; each deviation from it is a field of its own.
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
        wrong = [text for text, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise UserError(f"PERSITRConfig: {'; '.join(wrong)}.")

    @classmethod
    def tiny(cls, **changes) -> PERSITRConfig:
        """The stand-in CLIP at 112 px, with an adapter as small beside it as the paper's is beside
        ViT-B/32.
        """
        return replace(cls(clip="clip_standin", bottleneck=16, share_dim=16), **changes)

    @classmethod
    def compact(cls, **changes) -> PERSITRConfig:
        """The small CLIP over the frozen EfficientNet-Lite0 and MiniLM, which is frozen too."""
        return replace(cls(clip="clip_compact", bottleneck=32, share_dim=32), **changes)


class MRSAdapter(nn.Module):
    """The bottleneck of both modalities (spec 2.2): each has its own projections; one up projection they share.

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
        for name, layer in self.named_children():
            if zero_init and "up_proj" in name:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, visual: bool) -> Tensor:
        """(...,W) -> (...,W): the modality's own channels, then the shared ones.

        In float32 whatever x is, as released.
        """
        down, up = (
            (self.visual_down_proj, self.visual_up_proj)
            if visual
            else (self.down_proj, self.up_proj)
        )
        with torch.autocast(x.device.type, enabled=False):
            inner = F.dropout(F.relu(down(x.float())), self.dropout, self.training)
            parts = (
                [up(inner), self.share_up_proj(inner)]
                if self.share_up_proj is not None
                else [up(inner)]
            )
            return torch.cat(parts, dim=-1).to(x.dtype)


# ---- a CLIP that rests
class FrozenCLIP(CLIP):
    """A CLIP without gradients and always in eval mode, for what is trained beside it.

    Its state dict holds what is trained and nothing else: CLIP comes from its own file. So a
    checkpoint is small.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        self.requires_grad_(False)
        self.register_state_dict_post_hook(_keep_trained)

    def train(self, mode: bool = True):
        super().train(mode)
        self.clip.eval()  # not in `frozen`, which are the towers whose features can be cached
        return self

    def after_step(self) -> None:
        """The scale of the logits rests like the rest of CLIP."""


def _keep_trained(model: nn.Module, state: dict[str, Tensor], prefix: str, _) -> None:
    trained = {prefix + name for name, p in model.named_parameters() if p.requires_grad}
    for name in [name for name in state if name.startswith(prefix) and name not in trained]:
        del state[name]


def tokens_first(x: Tensor) -> Tensor:
    """(B,N,W), lying in memory as (N,B,W), as torch's attention turns it: otherwise its product
    with a frozen weight copies that weight for each token.
    """
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def through_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    adapt: Callable[[int, Tensor], Tensor],
    mask: Tensor | None = None,
    placement: str = "parallel",
) -> Tensor:
    """(B,N,W) through open_clip's residual blocks; `adapt(layer, x)` is added to the stream of each (spec 2.3).

    In parallel to the FFN it reads the raw stream behind the attention; after the FFN, the stream
    behind that.
    """
    for layer, block in enumerate(blocks):
        x = x + block.attention(tokens_first(block.ln_1(x)), attn_mask=mask)
        fed = x + block.mlp(block.ln_2(x))
        x = fed + adapt(layer, fed if placement == "after" else x)
    return x


class PERSITR(FrozenCLIP):
    """Only `Uniadapt` is trained: an MRSAdapter for all blocks of both towers, or a list of one per
    depth.
    """

    def __init__(self, config: PERSITRConfig):
        super().__init__(config)
        towers = self.clip.transformer, self.clip.visual.transformer

        def build():
            return MRSAdapter(
                *(tower.width for tower in towers),
                config.bottleneck,
                config.share_dim,
                config.adapter_dropout,
                config.zero_init,
            )

        depth = max(tower.layers for tower in towers)
        self.Uniadapt = (
            nn.ModuleList(build() for _ in range(depth)) if config.per_layer else build()
        )
        self.train()

    def adapt(self, layer: int, x: Tensor, visual: bool) -> Tensor:
        """What the adapter of one block adds to the stream (B,N,W)."""
        return (self.Uniadapt[layer] if self.config.per_layer else self.Uniadapt)(x, visual)

    def view(self, tokens: Tensor) -> Tensor:
        """The augmented view (spec 2.4): dropout on the tokens (B,N,W) before block 0; in eval mode
        the tokens themselves.
        """
        drop = {"element": F.dropout, "token": F.dropout1d}[self.config.view]
        return drop(tokens, self.config.view_dropout, self.training)

    def image_vectors(self, tokens: Tensor) -> Tensor:
        """(B,N,W) from clip.image_tokens -> (B,D), not normalised."""
        x = through_blocks(
            self.clip.visual.transformer.resblocks,
            tokens,
            lambda layer, x: self.adapt(layer, x, visual=True),
            placement=self.config.placement,
        )
        return pool_image(self.clip, x)

    def text_vectors(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B,L,W) from clip.text_tokens, mask (B,L) -> (B,D), not normalised."""
        x = through_blocks(
            self.clip.transformer.resblocks,
            tokens,
            lambda layer, x: self.adapt(layer, x, visual=False),
            causal_mask(self.clip, tokens.shape[1]),
            self.config.placement,
        )
        return pool_text(self.clip, x, mask)

    def embed_images(self, vision: Tensor) -> Tensor:
        """-> (B,D) unit rows."""
        return unit_rows(self.image_vectors(image_tokens(self.clip, vision)))

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """-> (B,D) unit rows."""
        text, mask = unpadded(text, mask)
        return unit_rows(self.text_vectors(text_tokens(self.clip, text), mask))

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """HMMC (spec 3) of a batch of pixels and ids, or of cached features, with mask: its sum and its terms.

        In eval mode, where both views are one, only `cross`.
        """
        c, mask = self.config, batch["mask"]
        seen = batch if "vision" in batch else self.image_features(batch["pixels"])
        read = batch if "text" in batch else self.text_features(batch["ids"], mask)
        text, mask = unpadded(read["text"], mask)
        patches, words = image_tokens(self.clip, seen["vision"]), text_tokens(self.clip, text)
        image, text = (
            gather(self.image_vectors(patches).float()),
            gather(self.text_vectors(words, mask).float()),
        )
        pairs = {"cross": (image, text)}
        if self.training and c.intra_image:
            pairs["intra_image"] = image, gather(self.image_vectors(self.view(patches)).float())
        if self.training and c.intra_text:
            pairs["intra_text"] = text, gather(self.text_vectors(self.view(words), mask).float())
        with torch.autocast(image.device.type, enabled=False):  # as in PIR
            terms = {name: ranking_loss(*pair, c.margin, c.hardest) for name, pair in pairs.items()}
        return {"loss": sum(terms.values()), **terms}


# ---- the HMMC loss (spec 3)
def unit_rows(rows: Tensor) -> Tensor:
    """(N,D) divided by their plain norms; a row of zeros stays, so that its cosine with any other
    is 0, as released.
    """
    norm = rows.norm(dim=1, keepdim=True)
    return rows / norm.where(norm > 0, 1.0)


def ranking_loss(a: Tensor, b: Tensor, margin: float, hardest: bool = True) -> Tensor:
    """T(a,b) over the cosines of (N,D) rows of which equal numbers belong together: both
    directions, summed over the batch.
    """
    return triplet_loss(unit_rows(a), unit_rows(b), margin, max_violation=hardest)


# ---- our files, and the authors' (spec 7)
STARTS = ("PE_RSITR.", "Uniadapt.")  # of names, once no prefix stands before them


def _check_widths(state: dict[str, Tensor], clip: str) -> None:
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
    """Fills the adapter of `model`, whatever its CLIP, from the state dict of another PERSITR.

    UserError, and nothing loaded, if the towers are of other widths or any key does not fit.
    """
    _check_widths(state, model.config.clip)
    checkpoints.load_into(model, state)


class ReleasedPERSITR(nn.Module):
    """The authors' names of the parts: `model` is CLIP."""

    def __init__(self, model: PERSITR):
        super().__init__()
        self.model, self.Uniadapt = model.clip, model.Uniadapt


def load_release(model: PERSITR, state: dict[str, Tensor]) -> None:
    """Fills CLIP and adapter from the authors' state dict, or raises a UserError that lists the
    keys and loads nothing.
    """
    checkpoints.load_into(
        ReleasedPERSITR(model),
        checkpoints.rename(checkpoints.bare(state, *STARTS), [(r"^PE_RSITR\.", "")]),
    )


def release_state(model: PERSITR) -> dict[str, Tensor]:
    """CLIP and adapter with the authors' key names."""
    return {
        f"PE_RSITR.{name}": value for name, value in ReleasedPERSITR(model).state_dict().items()
    }


def config_of_release(state: dict[str, Tensor], options: dict) -> PERSITRConfig:
    """Of a released checkpoint: what `write_release` noted, else the adapter's sizes from its
    tensors.
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
        return checkpoints.config_of(PERSITRConfig, "PE-RSITR", options["nbhelpers"])
    return PERSITRConfig(
        bottleneck=len(biases["down_proj.bias"]),
        share_dim=len(biases.get("share_up_proj.bias", ())),
    )


def read(
    path, fill: Callable[[nn.Module], nn.Module] | None = None, clip: str | None = None
) -> tuple[PERSITR, dict]:
    """A PE-RSITR from our checkpoint or the authors', in eval mode, and what the file says of itself.

    fill   gives CLIP its weights, as Start.fill does: our checkpoints hold the adapter alone. The
           authors' bring CLIP along
    clip   a name in backbones.CLIP, if it is not the one that the file says
    UserError on a file of another model, with the keys that do not fit, and on a CLIP of other
    widths.
    """
    state, rest = checkpoints.read_checkpoint(path, *STARTS)
    if "meta" not in rest:
        options = rest.get("options") if isinstance(rest.get("options"), dict) else {}
        config = config_of_release(state, options)
        model = PERSITR(replace(config, clip=clip or config.clip))
        load_release(model, state)
        return model.eval(), {"system": "pe_rsitr", "release": True, "config": options}
    meta = checkpoints.meta_of(rest, path, {"system": "pe_rsitr"})
    if fill is None:
        raise UserError(
            f"{path} holds an adapter alone; give `fill`, which loads the CLIP that it stands on."
        )
    config = checkpoints.config_of(PERSITRConfig, "PE-RSITR", meta.get("model"))
    config = replace(config, clip=clip or config.clip)
    _check_widths(state, config.clip)
    model = fill(PERSITR(config))
    checkpoints.load_into(model, state)
    return model.eval(), meta


def write_release(model: PERSITR, path) -> None:
    """Writes the authors' layout, CLIP included.

    UserError for one adapter per layer or a CLIP over frozen towers.
    """
    if model.config.per_layer or model.config.freeze_towers:
        raise UserError(
            "The authors' layout has one adapter on a CLIP that reads pixels; use"
            " weights.save_checkpoint instead."
        )
    content = {
        "epoch": 0,
        "arch": "PE_RSITR",
        "model": {k: v.detach().cpu() for k, v in release_state(model).items()},
        "best_rsum": 0.0,
        "options": {"nbhelpers": asdict(model.config)},
        "Eiters": 0,
    }
    with atomic_write(path) as temporary:
        torch.save(content, temporary)
