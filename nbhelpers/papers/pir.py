"""PIR: a prior instruction representation for remote sensing retrieval.

Pan, Ma, Bai, "A Prior Instruction Representation Framework for Remote Sensing Image-text
Retrieval", MM 2023. The file follows the paper: configuration, the two attention layers, the model
(vision instruction representation VIR, language cycle attention LCA), the losses, the authors' file
format. B is the batch, D the embedding width, k the filter size, n_v and n_t the numbers of layers.
Parameters have the authors' names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.papers import config_checks
from nbhelpers.papers.dual_encoder import DualEncoder, decay_groups, unpadded
from nbhelpers.towers import backbones, checkpoints, foreign_configs, starting_weights
from nbhelpers.training.device import at_least_fp32
from nbhelpers.training.distributed import gather


@dataclass(frozen=True)
class PIRConfig:
    """Configure one PIR.

    The defaults are the released configuration. Each deviation from it is a field of its own.
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
    # tokens are ranked by the "logits" of the belief or, as released, by their "softmax", where
    # logits far apart round to equal beliefs
    ranking: str = "logits"
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
            "ranking must be 'logits' or 'softmax'": self.ranking not in ("logits", "softmax"),
            "text_global must be 'cls' or 'mean'": self.text_global not in ("cls", "mean"),
            "prior_batchnorm must be 'eval' or 'release'": (
                self.prior_batchnorm not in ("eval", "release")
            ),
            "instru_num and cycle_num must be at least 1": min(self.instru_num, self.cycle_num) < 1,
            "a scene head needs freeze_towers=True": (
                self.prior == "scene_head" and not self.freeze_towers
            ),
            "freeze_towers freezes the prior too; leave finetune_prior and prior_batchnorm": (
                self.freeze_towers and (self.finetune_prior or self.prior_batchnorm == "release")
            ),
            "tuned_stages goes with freeze_towers=True": (
                self.tuned_stages and not self.freeze_towers
            ),
            "triplet replaces both other losses; set affiliation=False beside it": (
                self.triplet and self.affiliation
            ),
        }
        config_checks.check(self, problems)

    @classmethod
    def tiny(cls, vocab_size: int, **changes) -> PIRConfig:
        """Return stand-in towers at 112 px, which train in seconds on a CPU."""
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
        """Return a PIR over small frozen towers from Python packages.

        They are EfficientNet-Lite0 (a 7x7 map, so 49 tokens) with a fine-tuned last stage, and
        MiniLM. The scene prior is fitted on the training classes.
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
        """Return Swin-T, BERT-base and the ResNet-50 trained on AID, as released."""
        return replace(cls(), **changes)

    def baseline(self) -> PIRConfig:
        """Return the release's `is_baseline` (VSE2): projections and the contrastive loss alone."""
        return replace(self, vir=False, lca=False, affiliation=False)


class Attention(nn.Module):
    """Multi-head attention with biased projections for values, keys, queries and the output."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_v = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_q = nn.Linear(width, width)
        self.linear_merge = nn.Linear(width, width)

    def forward(self, v: Tensor, k: Tensor, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from q (B,M,D) to k and v (B,N,D).

        Returns (B,M,D). `mask` is (B,1,1,N) bool, True where a token is excluded.
        """
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.linear_q(q), self.linear_k(k), self.linear_v(v))
        )
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else ~mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.linear_merge(out.transpose(1, 2).flatten(2))


class PostNormLayer(nn.Module):
    """The shared part of SA and CA: post-norm residuals and a feed-forward network."""

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
        """Add the attended tokens to the stream (B,N,D), then those of the feed-forward network."""
        stream = self.norm1(stream + self.drop(attended))
        return self.norm2(stream + self.drop(self.ffn(stream)))


class SelfAttention(PostNormLayer):
    """SA of the paper."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__(width, dropout)
        self.mhatt = Attention(width, heads, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let the tokens x (B,N,D) attend to each other; mask as in `Attention.forward`."""
        return self.residual(x, self.mhatt(x, x, x, mask))


class CrossAttention(PostNormLayer):
    """CA of the paper. The query is x; key, value and the *residual stream* are y."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__(width, dropout)
        self.mhatt_cross = Attention(width, heads, dropout)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let x (B,N,D) ask y (B,N,D); mask as in `Attention.forward`."""
        return self.residual(y, self.mhatt_cross(y, y, x, mask))


def stack(layer: nn.Module, count: int) -> nn.ModuleList:
    """Return `count` layers that all start as copies of one, as released."""
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(count))


def belief_logits(tokens: Tensor, instruction: Tensor) -> Tensor:
    """Return S.c (B,N) of tokens S (B,N,D) and the instruction c (B,1,D), without any scaling.

    The belief is their softmax over the tokens.
    """
    return (tokens @ instruction.transpose(1, 2)).squeeze(2)


def select_tokens(tokens: Tensor, instruction: Tensor, k: int) -> Tensor:
    """Return the k tokens (B,k,D) of highest belief, best first, of tokens (B,N,D).

    The belief only orders the tokens: it has no gradient and no weight. The softmax keeps the order
    of the logits, so they are ranked.
    """
    return _best(tokens, belief_logits(tokens, instruction), k)


def select_by_softmax(tokens: Tensor, instruction: Tensor, k: int) -> Tensor:
    """Return the k tokens (B,k,D) as released: the belief itself is ranked.

    Beliefs that round to the same number, most often 0, keep the order of the tokens here. The
    release leaves it to torch's unstable sort.
    """
    return _best(tokens, belief_logits(tokens, instruction).softmax(1), k)


def _best(tokens: Tensor, score: Tensor, k: int) -> Tensor:
    kept = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return tokens.gather(1, kept.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


class PIR(DualEncoder):
    """The dual encoder.

    `towers` may replace the configured ones by (vision, text, prior), e.g. in tests. `select` is
    the function that ranks and drops tokens, `select_tokens` or one of a notebook.
    """

    IMAGE_FEATURES: tuple[str, ...] = ("vision", "prior")

    def __init__(
        self,
        config: PIRConfig,
        towers: tuple[nn.Module, nn.Module, nn.Module | None] | None = None,
        select: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    ):
        super().__init__()
        self.config = config
        self.select = select or (select_tokens if config.ranking == "logits" else select_by_softmax)
        vision, text, prior = towers or self._build_towers(config)
        if not config.triplet:
            self.temp = nn.Parameter(torch.tensor(config.temperature))
        if config.affiliation:
            self.temp2 = nn.Parameter(torch.tensor(config.temperature))
        self.vision_encoder, self.text_encoder = vision, text
        self.vision_proj = nn.Linear(vision.num_features, config.embed_dim)
        self.text_proj = nn.Linear(text.config.hidden_size, config.embed_dim)
        if config.vir:
            self._add_vir(prior)
        if not config.vir or config.prior == "scene_head":
            self.IMAGE_FEATURES = ("vision",)
        if config.lca:
            self._add_lca()
        if config.zero_heads:
            for name, p in self.named_parameters():
                if name.startswith(("head_img.", "head_txt.")):
                    nn.init.zeros_(p)
        self.parted = (
            backbones.PartedTower(vision, config.tuned_stages) if config.tuned_stages else None
        )
        for part in self._frozen_towers():
            part.requires_grad_(False)
        self.train()  # frozen parts are in eval mode from the first batch on

    def _add_vir(self, prior: nn.Module) -> None:
        c, D = self.config, self.config.embed_dim
        self.conv_encoder = prior
        self.conv_proj = nn.Linear(prior.num_features, D)
        self.mapping_img = stack(nn.Linear(D, D), c.instru_num)
        self.img_sa = stack(SelfAttention(D, c.heads, c.dropout), c.instru_num)
        self.img_ca = stack(CrossAttention(D, c.heads, c.dropout), c.instru_num)
        self.head_img = nn.Linear(D, D)
        prior.requires_grad_(c.finetune_prior)

    def _add_lca(self) -> None:
        c, D = self.config, self.config.embed_dim
        self.mapping_txt = stack(nn.Linear(D, D), c.cycle_num)
        self.txt_sa = stack(SelfAttention(D, c.heads, c.dropout), c.cycle_num)
        self.txt_ca = stack(CrossAttention(D, c.heads, c.dropout), c.cycle_num)
        self.head_txt = nn.Linear(D, D)

    @staticmethod
    def _build_towers(config: PIRConfig) -> tuple[nn.Module, nn.Module, nn.Module | None]:
        vision = backbones.vision_tower(config.vision)
        text = backbones.text_tower(config.text, config.vocab_size)
        if config.prior == "scene_head":
            return vision, text, backbones.SceneHead(vision.num_features)
        return vision, text, backbones.prior_tower(config.prior) if config.vir else None

    def frozen(self) -> list[nn.Module]:
        """Return the parts that stay in eval mode.

        These are the frozen towers, and the prior unless `prior_batchnorm` asks for the batch
        statistics that drift, as released.
        """
        c = self.config
        parts = self._frozen_towers()
        if c.vir and not c.finetune_prior and c.prior_batchnorm == "eval":
            parts.append(self.conv_encoder)
        return parts

    def towers(self) -> list[nn.Module]:
        """Return the frozen parts that read pixels or ids.

        A scene head and the norms of fine-tuned stages read the output of other parts, so they do
        not count.
        """
        above = self.parted.norms() if self.parted else []
        if self._reads_tokens():
            above.append(self.conv_encoder)
        return [part for part in self.frozen() if not any(part is one for one in above)]

    def _frozen_towers(self) -> list[nn.Module]:
        if not self.config.freeze_towers:
            return []
        if self.parted is None:
            return [self.vision_encoder, self.text_encoder]
        return [*self.parted.below(), *self.parted.norms(), self.text_encoder]

    def _reads_tokens(self) -> bool:
        """Tell whether the prior is a scene head."""
        return self.config.vir and self.config.prior == "scene_head"

    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        """Compute tower features of pixels (B,3,S,S).

        `vision` is (B,1+N,W) with the global token first. With VIR and its own CNN there is also
        `prior` (B,P). With `tuned_stages`, `vision` is the map (B,C,H,W) below the fine-tuned
        stages, and `tokens` makes tokens of it.
        """
        if self.parted:
            features = {"vision": self.parted.map_of(pixels)}
        else:
            features = {"vision": backbones.image_tokens(self.vision_encoder, pixels)}
        if "prior" in self.IMAGE_FEATURES:
            features["prior"] = self.conv_encoder(pixels)
        return features

    def tokens(self, vision: Tensor) -> Tensor:
        """Turn the feature `vision`, a map or tokens, into tokens (B,1+N,W)."""
        return vision if self.parted is None or vision.ndim == 3 else self.parted.tokens_of(vision)

    def text_features(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Compute the tower feature `text` (B,L,W) of ids and mask (B,L).

        The mask reaches BERT only with `use_mask`; the release attends padding.
        """
        attended = mask if self.config.use_mask else torch.ones_like(mask)
        return {"text": self.text_encoder(input_ids=ids, attention_mask=attended).last_hidden_state}

    def instruct(self, vision: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Return projected tokens S (B,1+N,D) and the instruction c (B,1,D)."""
        return self.vision_proj(vision), self.conv_proj(prior.flatten(1)).unsqueeze(1)

    def filter_tokens(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """Return the k tokens (B,k,D) of highest belief, best first.

        UserError if the tower gives fewer than k tokens.
        """
        c, candidates = self.config, tokens[:, : self.config.candidates]
        if candidates.shape[1] < c.filter_size:
            raise UserError(
                f"filter_size is {c.filter_size} but the vision tower gives {candidates.shape[1]}"
                " tokens; lower filter_size."
            )
        return self.select(candidates, instruction, c.filter_size)

    def embed_images(self, vision: Tensor, prior: Tensor | None = None) -> Tensor:
        """Embed tower features as unit rows (B,D).

        A row is L2norm(g + head(F[:,0])), or L2norm(g) without VIR.
        """
        vision = self.tokens(vision)
        prior = self._prior(vision, prior)
        vision = self._normed(vision)
        if self.training and self.config.feature_dropout:
            channels = vision.new_ones(len(vision), 1, vision.shape[2])
            vision = vision * F.dropout(channels, self.config.feature_dropout)
        if not self.config.vir:
            return F.normalize(self.vision_proj(vision[:, 0]), dim=1)
        tokens, instruction = self.instruct(vision, prior)
        kept = self.filter_tokens(tokens, instruction)
        for mapping, attend, cross in zip(self.mapping_img, self.img_sa, self.img_ca, strict=True):
            kept = cross(mapping(instruction).expand_as(kept), attend(kept))
        return F.normalize(tokens[:, 0] + self.head_img(kept[:, 0]), dim=1)

    def _prior(self, vision: Tensor, prior: Tensor | None) -> Tensor | None:
        """Return the prior: a scene head reads the global token, a CNN is in the features."""
        return self.conv_encoder(vision[:, 0]) if self._reads_tokens() else prior

    def _normed(self, features: Tensor) -> Tensor:
        return F.layer_norm(features, features.shape[-1:]) if self.config.feature_norm else features

    @torch.no_grad()
    def belief(self, vision: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return the belief (B,candidates), rows that sum to one.

        Column 0 is the global token, the others are the image in raster order. UserError without
        VIR.
        """
        if not self.config.vir:
            raise UserError(
                "This PIR was built without VIR, so it holds no belief; build it with vir=True."
            )
        vision = self.tokens(vision)
        tokens, instruction = self.instruct(self._normed(vision), self._prior(vision, prior))
        return belief_logits(tokens[:, : self.config.candidates], instruction).softmax(1)

    def embed_texts(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed tower features (B,L,W) as unit rows (B,D), by LCA (Temporal-PAE).

        `mask` (B,L), 1 = word, is used, and needed, only with `use_mask`.
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

    def losses(self, rows: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute loss, terms and temperatures; the batch holds image_index and scene (B,)."""
        one_sided = self.config.one_sided_gather
        image = gather(at_least_fp32(rows["image"]), one_sided)
        text = gather(at_least_fp32(rows["text"]), one_sided)
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
        """Group the trainable parameters by weight decay and learning rate.

        The release spares names with certain parts from decay. The fine-tuned stages have groups of
        their own.
        """
        tuned = "vision_encoder." if self.parted else "no tower"
        named = list(self.named_parameters())
        others = [(name, p) for name, p in named if not name.startswith(tuned)]
        stages = [(name, p) for name, p in named if name.startswith(tuned)]
        groups = decay_groups(others, weight_decay, _is_spared)
        for group in decay_groups(stages, weight_decay, _is_spared):
            groups.append(group | {"rate": self.config.tuned_rate})
        return [group for group in groups if group["params"]]


def _is_spared(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether the release trains a parameter without weight decay."""
    spared = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
    return any(part in name for part in spared)


# Losses. image and text are unit rows (N,D); a temperature divides.
def contrastive_loss(
    image: Tensor, text: Tensor, temp: Tensor, image_index: Tensor | None = None
) -> Tensor:
    """Compute InfoNCE in both directions over unit rows (N,D); `temp` divides.

    Captions of the same image (equal image_index (N,)) share the target evenly.
    """
    if image_index is None:
        same = torch.eye(len(image), device=image.device)
    else:
        same = (image_index[:, None] == image_index).float()
    target = same / same.sum(1, keepdim=True)
    logits = image @ text.t() / temp
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def affiliation_loss(
    image: Tensor, text: Tensor, scene: Tensor, temp: Tensor, symmetric: bool = False
) -> Tensor:
    """Pull each sample to the centre of its scene class (labels (N,)) in the other modality.

    A centre is the plain mean over the whole gathered batch, the sample itself included; it is not
    normalised again. As released, the second term is a softmax over texts for each image centre;
    `symmetric` takes it over centres instead.
    """
    member = (scene[:, None] == scene).to(image.dtype)
    member = member / member.sum(1, keepdim=True)
    own = torch.arange(len(scene), device=scene.device)
    to_text = image @ (member @ text).t() / temp
    to_image = text @ (member @ image).t() / temp
    if not symmetric:
        to_image = to_image.t()
    return (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2


def triplet_loss(image: Tensor, text: Tensor, margin: float, max_violation: bool = False) -> Tensor:
    """Compute a hinge over all negatives (summed) or over the hardest one of each query."""
    scores = image @ text.t()
    own = scores.diagonal()
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    texts = (margin + scores - own[:, None]).clamp(min=0).masked_fill(itself, 0)
    images = (margin + scores - own[None, :]).clamp(min=0).masked_fill(itself, 0)
    if max_violation:
        return texts.amax(1).sum() + images.amax(0).sum()
    return texts.sum() + images.sum()


# The authors' files
_STAGES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
FROM_RELEASE = [
    (rf"^conv_encoder\.{index}\.", f"conv_encoder.{name}.") for index, name in _STAGES.items()
]

STARTS = ("vision_proj.", "text_proj.")  # of names, once no prefix stands before them
# buffers that the released Swin stores and timm does not
RECOMPUTED = ("relative_position_index", "attn_mask")


def _shift_downsample(state: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """Move downsampling layers: old Swin ends stage i with one, timm begins stage i+1 with it."""

    def moved(name: str) -> str:
        parts = name.split(".")
        if name.startswith("vision_encoder.layers.") and parts[3:4] == ["downsample"]:
            parts[2] = str(int(parts[2]) + by)
        return ".".join(parts)

    return {moved(name): value for name, value in state.items()}


def load_release(model: PIR, state: dict[str, Tensor]) -> list[str]:
    """Fill `model` from the authors' state dict, and return the keys that timm recomputes.

    UserError lists every other key without a place, and nothing is loaded.
    """
    state = checkpoints.bare(state, *STARTS)
    recomputed = [name for name in state if name.endswith(RECOMPUTED)]
    kept = {name: value for name, value in state.items() if name not in recomputed}
    checkpoints.load_into(model, checkpoints.rename(_shift_downsample(kept, +1), FROM_RELEASE))
    return recomputed


def config_of_release(state: dict[str, Tensor], settings: dict) -> PIRConfig:
    """Return the configuration of a released checkpoint.

    A note of ours may hold it. For other files the sizes come from the tensors and k from the
    settings. UserError for a file without PIR.
    """

    def layers(name: str) -> int:
        return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})

    if "vision_proj.weight" not in state or "text_proj.weight" not in state:
        raise UserError(
            "This file holds no PIR: vision_proj and text_proj are missing; give a checkpoint of"
            " PIR."
        )
    if "nbhelpers" in settings:
        return foreign_configs.config_of(PIRConfig, "PIR", settings["nbhelpers"])
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
        ranking="softmax",
    )


def read(path: Path | str) -> tuple[PIR, dict]:
    """Read a PIR, in eval mode, and its metadata, from our checkpoint or the authors'.

    UserError for a file of another model, with the keys that do not fit. UserError also for a file
    of `write_heads` if the packages are missing or hold other weights.
    """
    state, rest = checkpoints.read_checkpoint(path, *STARTS)
    if "meta" not in rest:
        settings = checkpoints.settings_in(rest, "config")
        model = foreign_configs.built(PIR, config_of_release(state, settings), state)
        load_release(model, state)
        return model.eval(), {"system": "pir", "release": True, "config": settings}
    meta = checkpoints.meta_of(rest, path, {"system": "pir"})
    config = foreign_configs.config_of(PIRConfig, "PIR", meta.get("model"))
    model = foreign_configs.built(PIR, config, state)
    if "packages" in meta:
        state |= _of_packages(model, meta["packages"], path).frozen_state()
    checkpoints.load_into(model, state)
    return model.eval(), meta


def write_heads(model: PIR, about: dict, path: Path | str, half: bool = False) -> Path:
    """Write a checkpoint without the frozen towers.

    `read` takes them from their packages (compact size). half: numbers of 16 bits, so the file is
    half as large and embeddings differ in their fourth digit.

    `about` is the metadata that `read` returns. UserError if the frozen towers are not those of the
    packages.
    """
    c = model.config
    if (c.vision, c.text, c.freeze_towers) != ("efficientnet_lite0", "minilm", True):
        raise UserError(
            "Only a PIR over the frozen towers of the packages, the compact size, can be written"
            " without them; keep its whole checkpoint."
        )
    packages = {
        name: tower.sha256 for name, tower in starting_weights.package_start().towers.items()
    }
    original = _of_packages(PIR(model.config), packages, path).frozen_state()
    if not all(
        torch.equal(original[name], value.to(original[name]))
        for name, value in model.frozen_state().items()
    ):
        raise UserError(
            "The frozen towers of this PIR hold other weights than the packages bring; keep its"
            " whole checkpoint."
        )
    state = {name: value for name, value in model.state_dict().items() if name not in original}
    if half:
        state = {
            name: value.half() if value.is_floating_point() else value
            for name, value in state.items()
        }
    return checkpoints.save_checkpoint(path, state, about | {"packages": packages})


def _of_packages(model: PIR, packages: dict[str, str], path: Path | str) -> PIR:
    """Fill a PIR with the towers of the packages.

    UserError if their sha256 differ from `packages`.
    """
    start = starting_weights.package_start()
    if packages != {name: tower.sha256 for name, tower in start.towers.items()}:
        raise UserError(
            f"{path} was trained over other weights than the installed packages hold; install the"
            " versions in constraints.txt."
        )
    return start.fill(model)
