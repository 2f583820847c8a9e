"""PIR: Pan, Ma, Bai, "A Prior Instruction Representation Framework for Remote Sensing Image-text Retrieval", MM 2023.

In the paper's order: configuration, the two attention layers, the model (VIR, LCA), the losses, the
authors' file format. B batch, D embedding width, k filter size, n_v and n_t the numbers of layers.
Parameter names are the authors'.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.papers.dual_encoder import DualEncoder, unpadded
from nbhelpers.towers import backbones, checkpoints, starting_weights
from nbhelpers.training.distributed import gather


@dataclass(frozen=True)
class PIRConfig:
    """One PIR.

    The defaults are the released configuration; each deviation from it is a field of its own.
    """

    vision: str = "swin_t"  # a name in backbones.VISION
    text: str = "bert_base"  # a name in backbones.TEXT
    # a name in backbones.PRIOR, or "scene_head": fitted on the frozen vision tower
    prior: str = "resnet50"
    vocab_size: int | None = None  # None: the text tower's published vocabulary
    embed_dim: int = 512  # D
    heads: int = 8  # h
    filter_size: int = 40  # k, tokens kept by the belief
    candidates: int = 50  # tokens ranked by the belief, the global one among them
    instru_num: int = 2  # n_v, layers of Spatial-PAE
    cycle_num: int = 3  # n_t, cycles of LCA
    dropout: float = 0.2
    # vision instruction representation; off: the projected global token
    vir: bool = True
    lca: bool = True  # language cycle attention; off: the projected [CLS] token
    affiliation: bool = True  # affiliation loss beside the contrastive one
    center_factor: float = 1.0  # its weight
    # "release": second term transposed, as in the golden; "symmetric": as in PIR-CLIP
    affiliation_form: str = "release"
    triplet: bool = False  # triplet loss instead of the contrastive one
    margin: float = 0.2
    max_violation: bool = False  # triplet over the hardest negative only
    temperature: float = 0.07  # initial value of both temperatures
    # "mean": the mean of the words takes the place of [CLS] (deviation, compact size)
    text_global: str = "cls"
    # True: padding is not attended (deviation; the release attends it)
    use_mask: bool = False
    # True: vision and text towers frozen, in eval mode (deviation, compact size)
    freeze_towers: bool = False
    # last stages of a frozen EfficientNet that are trained all the same (deviation, compact size)
    tuned_stages: int = 0
    tuned_rate: float = 0.3  # their share of the learning rate
    # an image is embedded as the mean over its quarter turns and mirrors (deviation)
    turns: bool = False
    # share of the image tower's channels dropped in training, alike in all tokens (deviation)
    feature_dropout: float = 0.0
    # LayerNorm, without gains, on what the towers give: Swin and BERT end in one (deviation)
    feature_norm: bool = False
    # head_img and head_txt start at zero, so that PIR starts as its baseline (deviation)
    zero_heads: bool = False
    finetune_prior: bool = False  # the release's `finetune_conv`
    # "release": the frozen prior's batch statistics drift, as released
    prior_batchnorm: str = "eval"
    # True: gathered negatives carry no gradient to other processes, as released
    one_sided_gather: bool = False

    def __post_init__(self):
        tokens = self.candidates
        problems = {
            f"filter_size {self.filter_size} must lie between 1 and the {tokens} candidates": (
                not 1 <= self.filter_size <= tokens
            ),
            f"embed_dim {self.embed_dim} must be a multiple of heads {self.heads}": (
                self.embed_dim % self.heads != 0
            ),
            "affiliation_form must be 'release' or 'symmetric'": (
                self.affiliation_form not in ("release", "symmetric")
            ),
            "text_global must be 'cls' or 'mean'": self.text_global not in ("cls", "mean"),
            "prior_batchnorm must be 'eval' or 'release'": (
                self.prior_batchnorm not in ("eval", "release")
            ),
            "instru_num and cycle_num must be at least 1": min(self.instru_num, self.cycle_num) < 1,
            "a scene head needs freeze_towers=True": (
                self.prior == "scene_head" and not self.freeze_towers
            ),
            "freeze_towers rests the prior too": (
                self.freeze_towers and (self.finetune_prior or self.prior_batchnorm == "release")
            ),
            "tuned_stages goes with freeze_towers=True": (
                self.tuned_stages and not self.freeze_towers
            ),
            "triplet replaces both other losses; set affiliation=False beside it": (
                self.triplet and self.affiliation
            ),
        }
        wrong = [text for text, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise UserError(f"PIRConfig: {'; '.join(wrong)}.")

    @classmethod
    def tiny(cls, vocab_size: int, **changes) -> PIRConfig:
        """Stand-in towers at 112 px; trains in seconds on a CPU."""
        return replace(
            cls(
                vision="swin_standin",
                text="bert_standin",
                prior="resnet_standin",
                vocab_size=vocab_size,
                embed_dim=64,
                heads=4,
                dropout=0.1,
            ),
            **changes,
        )

    @classmethod
    def compact(cls, **changes) -> PIRConfig:
        """EfficientNet-Lite0 (7x7 map = 49 tokens) and MiniLM, both frozen but for the last stage
        of the former, and a scene prior fitted on the training classes.
        """
        return replace(
            cls(
                vision="efficientnet_lite0",
                text="minilm",
                prior="scene_head",
                embed_dim=128,
                dropout=0.0,
                tuned_stages=1,
                use_mask=True,
                text_global="mean",
                feature_dropout=0.5,
                feature_norm=True,
                zero_heads=True,
                center_factor=0.3,
                freeze_towers=True,
            ),
            **changes,
        )

    @classmethod
    def paper(cls, **changes) -> PIRConfig:
        """Swin-T, BERT-base and the AID ResNet-50, as released."""
        return replace(cls(), **changes)

    def baseline(self) -> PIRConfig:
        """The release's `is_baseline` (VSE2): linear projections and the contrastive loss alone."""
        return replace(self, vir=False, lca=False, affiliation=False)


class Attention(nn.Module):
    """Multi-head attention with biased v, k, q and merge projections (spec 2.5)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_v = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_q = nn.Linear(width, width)
        self.linear_merge = nn.Linear(width, width)

    def forward(self, v: Tensor, k: Tensor, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """v, k (B,N,D), q (B,M,D) -> (B,M,D). mask (B,1,1,N) bool, True = excluded."""
        parts = [
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.linear_q(q), self.linear_k(k), self.linear_v(v))
        ]
        out = F.scaled_dot_product_attention(
            *parts,
            attn_mask=None if mask is None else ~mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.linear_merge(out.transpose(1, 2).flatten(2))


class PostNormLayer(nn.Module):
    """What SA and CA share: post-norm residuals and a feed-forward with a LayerNorm inside."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.ffn = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def residual(self, stream: Tensor, attended: Tensor) -> Tensor:
        stream = self.norm1(stream + self.drop(attended))
        return self.norm2(stream + self.drop(self.ffn(stream)))


class SelfAttention(PostNormLayer):
    """SA (spec 2.5): x (B,N,D) -> (B,N,D)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__(width, dropout)
        self.mhatt = Attention(width, heads, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.residual(x, self.mhatt(x, x, x, mask))


class CrossAttention(PostNormLayer):
    """CA (spec 2.5): the query is x, but key, value and the *residual stream* are y; both (B,N,D)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__(width, dropout)
        self.mhatt_cross = Attention(width, heads, dropout)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.residual(y, self.mhatt_cross(y, y, x, mask))


def stack(layer: nn.Module, count: int) -> nn.ModuleList:
    """`count` layers that all start as copies of one, as released."""
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(count))


class PIR(DualEncoder):
    """The dual encoder.

    `towers` may replace the configured ones by (vision, text, prior), e.g. in tests.
    """

    IMAGE_FEATURES = ("vision", "prior")

    def __init__(
        self, config: PIRConfig, towers: tuple[nn.Module, nn.Module, nn.Module | None] | None = None
    ):
        super().__init__()
        self.config, D = config, config.embed_dim
        vision, text, prior = towers or self._build_towers(config)
        if not config.triplet:
            self.temp = nn.Parameter(torch.tensor(config.temperature))
        if config.affiliation:
            self.temp2 = nn.Parameter(torch.tensor(config.temperature))
        self.vision_encoder, self.text_encoder = vision, text
        self.vision_proj = nn.Linear(vision.num_features, D)
        self.text_proj = nn.Linear(text.config.hidden_size, D)
        if config.vir:
            self.conv_encoder = prior
            self.conv_proj = nn.Linear(prior.num_features, D)
            self.mapping_img = stack(nn.Linear(D, D), config.instru_num)
            self.img_sa = stack(SelfAttention(D, config.heads, config.dropout), config.instru_num)
            self.img_ca = stack(CrossAttention(D, config.heads, config.dropout), config.instru_num)
            self.head_img = nn.Linear(D, D)
            prior.requires_grad_(config.finetune_prior)
        if not config.vir or config.prior == "scene_head":
            self.IMAGE_FEATURES = ("vision",)
        if config.lca:
            self.mapping_txt = stack(nn.Linear(D, D), config.cycle_num)
            self.txt_sa = stack(SelfAttention(D, config.heads, config.dropout), config.cycle_num)
            self.txt_ca = stack(CrossAttention(D, config.heads, config.dropout), config.cycle_num)
            self.head_txt = nn.Linear(D, D)
        if config.zero_heads:
            for name, p in self.named_parameters():
                if name.startswith(("head_img.", "head_txt.")):
                    nn.init.zeros_(p)
        self.parted = (
            backbones.PartedTower(vision, config.tuned_stages) if config.tuned_stages else None
        )
        for part in self._resting_towers():
            part.requires_grad_(False)
        self.train()  # from the first batch on, frozen parts rest

    @staticmethod
    def _build_towers(config: PIRConfig):
        vision, text = (
            backbones.vision_tower(config.vision),
            backbones.text_tower(config.text, config.vocab_size),
        )
        if config.prior == "scene_head":
            return vision, text, backbones.SceneHead(vision.num_features)
        return vision, text, backbones.prior_tower(config.prior) if config.vir else None

    def frozen(self) -> list[nn.Module]:
        """Frozen towers stay in eval mode; the prior too, unless `prior_batchnorm` asks for the
        released drift.
        """
        rests = (
            self.config.vir
            and not self.config.finetune_prior
            and self.config.prior_batchnorm == "eval"
        )
        return self._resting_towers() + ([self.conv_encoder] if rests else [])

    def towers(self) -> list[nn.Module]:
        """A scene head, and the norms of trained stages, read what other parts of the vision tower
        give: they do not count.
        """
        above = [
            *(self.parted.norms() if self.parted else []),
            *([self.conv_encoder] if self._reads_tokens() else []),
        ]
        return [part for part in self.frozen() if not any(part is one for one in above)]

    def _resting_towers(self) -> list[nn.Module]:
        if not self.config.freeze_towers:
            return []
        vision = (
            [*self.parted.below(), *self.parted.norms()] if self.parted else [self.vision_encoder]
        )
        return [*vision, self.text_encoder]

    def _reads_tokens(self) -> bool:
        """Whether the prior is a scene head."""
        return self.config.vir and self.config.prior == "scene_head"

    # ---- what the towers see
    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B,3,S,S) -> vision (B,1+N,W) with the global token first and, with VIR and its own CNN, prior (B,P).

        With `tuned_stages`, vision is the map (B,C,H,W) below them, and `tokens` makes tokens of
        it.
        """
        features = {
            "vision": (
                self.parted.map_of(pixels)
                if self.parted
                else backbones.image_tokens(self.vision_encoder, pixels)
            )
        }
        return (
            features | {"prior": self.conv_encoder(pixels)}
            if "prior" in self.IMAGE_FEATURES
            else features
        )

    def tokens(self, vision: Tensor) -> Tensor:
        """What `image_features` calls vision, a map or tokens -> tokens (B,1+N,W)."""
        return self.parted.tokens_of(vision) if vision.ndim == 4 else vision

    def text_features(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """(B,L) -> text (B,L,W).

        The mask reaches BERT only with `use_mask` (the release attends padding).
        """
        attended = mask if self.config.use_mask else torch.ones_like(mask)
        return {"text": self.text_encoder(input_ids=ids, attention_mask=attended).last_hidden_state}

    # ---- VIR: belief, filtering, Spatial-PAE (spec 2.6)
    def instruct(self, vision: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> projected tokens S (B,1+N,D), instruction c (B,1,D), belief logits S.c (B,candidates)."""
        tokens = self.vision_proj(vision)
        instruction = self.conv_proj(prior.flatten(1)).unsqueeze(1)
        logits = (tokens[:, : self.config.candidates] @ instruction.transpose(1, 2)).squeeze(2)
        return tokens, instruction, logits

    def filter_tokens(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """The k tokens (B,k,D) of highest belief, best first.

        The belief only orders: no gradient, no weighting.
        """
        k = self.config.filter_size
        if logits.shape[1] < k:
            raise UserError(
                f"filter_size is {k} but the vision tower gives {logits.shape[1]} tokens; lower"
                " filter_size."
            )
        kept = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
        return tokens.gather(1, kept.unsqueeze(2).expand(-1, -1, tokens.shape[2]))

    def embed_images(self, vision: Tensor, prior: Tensor | None = None) -> Tensor:
        """Tower features -> (B,D) unit rows: L2norm(g + head(F[:,0])), or L2norm(g) without VIR."""
        vision = self.tokens(vision)
        prior = self._prior(vision, prior)
        vision = self._normed(vision)
        if self.training and self.config.feature_dropout:
            vision = vision * F.dropout(
                vision.new_ones(len(vision), 1, vision.shape[2]), self.config.feature_dropout
            )
        if not self.config.vir:
            return F.normalize(self.vision_proj(vision[:, 0]), dim=1)
        tokens, instruction, logits = self.instruct(vision, prior)
        kept = self.filter_tokens(tokens, logits)
        for mapping, attend, cross in zip(self.mapping_img, self.img_sa, self.img_ca, strict=True):
            kept = cross(mapping(instruction).expand_as(kept), attend(kept))
        return F.normalize(tokens[:, 0] + self.head_img(kept[:, 0]), dim=1)

    def _prior(self, vision: Tensor, prior: Tensor | None) -> Tensor | None:
        """A scene head reads the global token; another prior comes with the features."""
        return self.conv_encoder(vision[:, 0]) if self._reads_tokens() else prior

    def _normed(self, features: Tensor) -> Tensor:
        return F.layer_norm(features, features.shape[-1:]) if self.config.feature_norm else features

    @torch.no_grad()
    def belief(self, vision: Tensor, prior: Tensor | None = None) -> Tensor:
        """(B,candidates) rows that sum to one; column 0 is the global token, the rest the image in
        raster order.
        """
        if not self.config.vir:
            raise UserError(
                "This PIR was built without VIR, so it holds no belief; build it with vir=True."
            )
        vision = self.tokens(vision)
        return self.instruct(self._normed(vision), self._prior(vision, prior))[2].softmax(1)

    # ---- LCA: language cycle attention, Temporal-PAE (spec 2.7)
    def embed_texts(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tower features (B,L,W) -> (B,D) unit rows.

        mask (B,L), 1 = word, is used, and needed, only with `use_mask`.
        """
        if self.config.use_mask:
            text, attended = unpadded(text, mask)
        else:
            attended = torch.ones(text.shape[:2], device=text.device)
        if self.config.text_global == "mean":
            share = (attended / attended.sum(1, keepdim=True)).unsqueeze(1)
            text = torch.cat([share @ text, text[:, 1:]], dim=1)
        text = self._normed(text)
        if not self.config.lca:
            return F.normalize(self.text_proj(text[:, 0]), dim=1)
        state = words = self.text_proj(text)
        excluded = attended[:, None, None, :] == 0 if self.config.use_mask else None
        for mapping, attend, cross in zip(self.mapping_txt, self.txt_sa, self.txt_ca, strict=True):
            state = cross(mapping(state), attend(state, excluded), excluded)
        return F.normalize(words[:, 0] + self.head_txt(state[:, 0]), dim=1)

    # ---- training
    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Batch of pixels and ids, or of cached features, with image_index and scene (B,) -> loss,
        terms, temperatures.
        """
        image, text = (
            gather(rows.float(), self.config.one_sided_gather) for rows in self.embed_batch(batch)
        )
        with torch.autocast(image.device.type, enabled=False):  # 16-bit logits would be too coarse
            return self._losses(image, text, batch)

    def _losses(self, image: Tensor, text: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.config.triplet:
            loss = triplet_loss(image, text, self.config.margin, self.config.max_violation)
            return {"loss": loss, "triplet": loss}
        terms = {
            "contrastive": contrastive_loss(image, text, self.temp, gather(batch["image_index"])),
            "temp": self.temp.detach(),
        }
        if not self.config.affiliation:
            return {"loss": terms["contrastive"], **terms}
        symmetric = self.config.affiliation_form == "symmetric"
        affiliation = affiliation_loss(image, text, gather(batch["scene"]), self.temp2, symmetric)
        total = terms["contrastive"] + self.config.center_factor * affiliation
        return {"loss": total, **terms, "affiliation": affiliation, "temp2": self.temp2.detach()}

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Decay and no-decay groups by the release's substring rule (spec 5), and those of trained
        stages apart; frozen parameters are left out.
        """
        spared = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
        groups = {
            (decays, tuned): []
            for tuned in ((False, True) if self.parted else (False,))
            for decays in (True, False)
        }
        for name, p in self.named_parameters():
            if p.requires_grad:
                tuned = self.parted is not None and name.startswith("vision_encoder.")
                groups[not any(part in name for part in spared), tuned].append(p)
        return [
            {"params": params, "weight_decay": weight_decay if decays else 0.0}
            | ({"rate": self.config.tuned_rate} if tuned else {})
            for (decays, tuned), params in groups.items()
            if params
        ]


# ---- losses (spec 3): image, text (N,D) unit rows; temperatures divide
def contrastive_loss(
    image: Tensor, text: Tensor, temp: Tensor, image_index: Tensor | None = None
) -> Tensor:
    """InfoNCE in both directions; captions of the same image (equal image_index (N,)) share the
    target evenly.
    """
    same = (
        torch.eye(len(image), device=image.device)
        if image_index is None
        else (image_index[:, None] == image_index).float()
    )
    target = same / same.sum(1, keepdim=True)
    logits = image @ text.t() / temp
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def affiliation_loss(
    image: Tensor, text: Tensor, scene: Tensor, temp: Tensor, symmetric: bool = False
) -> Tensor:
    """Each sample is drawn to the centre of its scene class (labels (N,)) in the other modality.

    The centres are plain means over the whole (gathered) batch, not normalised again, the sample
    itself included. As released, the second term is a softmax over texts for each image centre;
    `symmetric` takes it over centres instead.
    """
    member = (scene[:, None] == scene).to(image.dtype)
    member = member / member.sum(1, keepdim=True)
    own = torch.arange(len(scene), device=scene.device)
    to_text = image @ (member @ text).t() / temp
    to_image = text @ (member @ image).t() / temp
    return (
        F.cross_entropy(to_text, own)
        + F.cross_entropy(to_image if symmetric else to_image.t(), own)
    ) / 2


def triplet_loss(image: Tensor, text: Tensor, margin: float, max_violation: bool = False) -> Tensor:
    """Hinge over all negatives (summed, not averaged) or over the hardest one of each query."""
    scores = image @ text.t()
    own = scores.diagonal()
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    texts = (margin + scores - own[:, None]).clamp(min=0).masked_fill(itself, 0)
    images = (margin + scores - own[None, :]).clamp(min=0).masked_fill(itself, 0)
    if max_violation:
        return texts.amax(1).sum() + images.amax(0).sum()
    return texts.sum() + images.sum()


# ---- the authors' files (spec 7)
_STAGES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
FROM_RELEASE = [
    (rf"^conv_encoder\.{index}\.", f"conv_encoder.{name}.") for index, name in _STAGES.items()
]
TO_RELEASE = [
    (rf"^conv_encoder\.{name}\.", f"conv_encoder.{index}.") for index, name in _STAGES.items()
]

STARTS = ("vision_proj.", "text_proj.")  # of names, once no prefix stands before them
# buffers that the released Swin stores and timm does not
RECOMPUTED = ("relative_position_index", "attn_mask")


def _shift_downsample(state: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """Old Swin keeps a downsample at the end of stage i, timm at the start of stage i+1."""

    def moved(name: str) -> str:
        parts = name.split(".")
        if name.startswith("vision_encoder.layers.") and parts[3:4] == ["downsample"]:
            parts[2] = str(int(parts[2]) + by)
        return ".".join(parts)

    return {moved(name): value for name, value in state.items()}


def load_release(model: PIR, state: dict[str, Tensor]) -> list[str]:
    """Fills `model` from the authors' state dict; returns the keys left out because timm recomputes them.

    Every other key must find its place, else UserError lists the keys and nothing is loaded.
    """
    state = checkpoints.bare(state, *STARTS)
    recomputed = [name for name in state if name.endswith(RECOMPUTED)]
    kept = {name: value for name, value in state.items() if name not in recomputed}
    checkpoints.load_into(model, checkpoints.rename(_shift_downsample(kept, +1), FROM_RELEASE))
    return recomputed


def release_state(model: PIR) -> dict[str, Tensor]:
    """The model's state dict with the authors' key names, their Swin buffers included."""
    buffers = {
        f"vision_encoder.{name}": b
        for name, b in model.vision_encoder.named_buffers()
        if name.endswith(RECOMPUTED)
    }
    return checkpoints.rename(_shift_downsample({**model.state_dict(), **buffers}, -1), TO_RELEASE)


def config_of_release(state: dict[str, Tensor], settings: dict) -> PIRConfig:
    """Of a released checkpoint: what `write_release` noted, else sizes from its tensors and k from
    its settings.
    """

    def layers(name: str) -> int:
        return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})

    if "vision_proj.weight" not in state or "text_proj.weight" not in state:
        raise UserError(
            "This file holds no PIR: vision_proj and text_proj are missing; give a checkpoint of"
            " PIR."
        )
    if "nbhelpers" in settings:
        return checkpoints.config_of(PIRConfig, "PIR", settings["nbhelpers"])
    swin = "vision_encoder.layers.0.blocks.0.norm1.weight" in state
    return PIRConfig(
        vision="swin_t" if swin else "deit_s_released",
        embed_dim=len(state["vision_proj.weight"]),
        vir="conv_proj.weight" in state,
        lca="mapping_txt.0.weight" in state,
        affiliation="temp2" in state,
        triplet="temp" not in state,
        instru_num=max(layers("mapping_img"), 1),
        cycle_num=max(layers("mapping_txt"), 1),
        filter_size=settings.get("filter_size", PIRConfig.filter_size),
    )


def read(path) -> tuple[PIR, dict]:
    """A PIR from our checkpoint or the authors', in eval mode, and what the file says of itself.

    UserError on a file of another model, with the keys that do not fit, and for one of
    `write_heads` whose packages are missing or bring other weights.
    """
    state, rest = checkpoints.read_checkpoint(path, *STARTS)
    if "meta" not in rest:
        settings = rest.get("config") if isinstance(rest.get("config"), dict) else {}
        model = PIR(config_of_release(state, settings))
        load_release(model, state)
        return model.eval(), {"system": "pir", "release": True, "config": settings}
    meta = checkpoints.meta_of(rest, path, {"system": "pir"})
    model = PIR(checkpoints.config_of(PIRConfig, "PIR", meta.get("model")))
    if "packages" in meta:
        state |= _of_packages(model.config, meta["packages"], path).frozen_state()
    checkpoints.load_into(model, state)
    return model.eval(), meta


def write_heads(model: PIR, about: dict, path) -> Path:
    """Writes a checkpoint without the towers that rest, which `read` takes from their packages again (compact size).

    about  what `read` says of the model
    UserError for a model whose resting towers are not those of the packages.
    """
    if (model.config.vision, model.config.text, model.config.freeze_towers) != (
        "efficientnet_lite0",
        "minilm",
        True,
    ):
        raise UserError(
            "Only a PIR over the frozen towers of the packages, the compact size, can be written"
            " without them."
        )
    packages = {
        name: tower.sha256 for name, tower in starting_weights.package_start().towers.items()
    }
    original = _of_packages(model.config, packages, path).frozen_state()
    if not all(
        torch.equal(original[name], value.to(original[name]))
        for name, value in model.frozen_state().items()
    ):
        raise UserError(
            "The frozen towers of this PIR hold other weights than the packages bring; keep its"
            " whole checkpoint."
        )
    state = {name: value for name, value in model.state_dict().items() if name not in original}
    return checkpoints.save_checkpoint(path, state, about | {"packages": packages})


def _of_packages(config: PIRConfig, packages: dict[str, str], path) -> PIR:
    """A PIR with the towers of the packages.

    UserError if these are not the ones whose sha256 are told.
    """
    start = starting_weights.package_start()
    if packages != {name: tower.sha256 for name, tower in start.towers.items()}:
        raise UserError(
            f"{path} was trained over other weights than the installed packages bring; install the"
            " versions in constraints.txt."
        )
    return start.fill(PIR(config))


def write_release(model: PIR, path) -> None:
    """Writes the authors' layout, {'model': state dict, 'config': dict}.

    UserError with another prior than a ResNet.
    """
    c = model.config
    if c.vir and not c.prior.startswith("resnet"):
        raise UserError(
            f"The authors' layout has no place for the prior '{c.prior}'; use"
            " weights.save_checkpoint instead."
        )
    settings = {
        "embed_dim": c.embed_dim,
        "filter_size": c.filter_size,
        "instru_num": c.instru_num,
        "cycle_num": c.cycle_num,
        "is_baseline": not (c.vir or c.lca),
        "use_affil_loss": c.affiliation,
        "center_factor": c.center_factor,
        "use_triplet_loss": c.triplet,
        "temp1": c.temperature,
        "temp2": c.temperature,
        "nbhelpers": asdict(c),
    }
    with atomic_write(path) as temporary:
        torch.save(
            {
                "model": {k: v.detach().cpu() for k, v in release_state(model).items()},
                "config": settings,
            },
            temporary,
        )
