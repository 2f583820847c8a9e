"""PIR-CLIP: a CLIP whose image tower gets an instruction token that says where to look.

Pan, Ma, Ma, Bai, Chen, arXiv 2405.10160 (v3: PriorCLIP). The file follows the paper: configuration,
the model (instruction token, soft belief), the losses, the authors' file format. B is the batch, N
patches, W width of the image tower, D embedding width. Parameters have the authors' names, below
`clip`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.papers import config_checks
from nbhelpers.papers.clip import CLIP, CLIPConfig, image_tokens, pool_image
from nbhelpers.papers.pir import affiliation_loss, contrastive_loss
from nbhelpers.towers import backbones, checkpoints, foreign_configs
from nbhelpers.training.device import at_least_fp32
from nbhelpers.training.distributed import gather, rank, world_size


@dataclass(frozen=True)
class PIRCLIPConfig(CLIPConfig):
    """Configure one PIR-CLIP on the CLIP `clip`.

    The defaults are the paper's. Each deviation from it is a field of its own.
    """

    instruction_token: bool = True  # off: a plain CLIP, pooled at its class token
    # "soft": it weighs the tokens; "hard": it drops all but `filter_size`, as in PIR; "none"
    belief: str = "soft"
    # "pre_fix": the release before October 2024; "rank": weights by the rank of a token
    belief_rule: str = "official"
    filter_size: int = 40  # tokens that a hard belief keeps
    affiliation: bool = True  # affiliation loss beside the contrastive one
    # True: captions of one image share the target, as in PIR (deviation)
    multi_positive: bool = False
    # True: class centres over the pairs of each process alone, as released
    local_classes: bool = False
    # True: gathered negatives carry no gradient to other processes, as released
    one_sided_gather: bool = False
    # False: it trains, its batch norms over each process's own images, as released
    freeze_instruction: bool = True
    # True: as in the figure of v1 and v2; v3 and the release train it
    freeze_text: bool = False

    def __post_init__(self):
        problems = {
            "belief must be 'soft', 'hard' or 'none'": self.belief not in ("soft", "hard", "none"),
            "belief_rule must be 'official', 'pre_fix' or 'rank'": (
                self.belief_rule not in ("official", "pre_fix", "rank")
            ),
            f"filter_size {self.filter_size} must be at least 1": self.filter_size < 1,
            "a belief needs the instruction token; set belief='none' too": (
                self.belief != "none" and not self.instruction_token
            ),
        }
        config_checks.check(self, problems)

    @classmethod
    def compact(cls, **changes) -> PIRCLIPConfig:
        """Return a small PIR-CLIP over frozen package towers.

        The instruction encoder is a head on the frozen global token. It is trained, since nobody
        publishes one.
        """
        return replace(cls(clip="clip_compact", freeze_instruction=False), **changes)

    def baseline(self) -> PIRCLIPConfig:
        """Return the same CLIP, fine-tuned plainly."""
        return replace(self, instruction_token=False, belief="none", affiliation=False)


class PIRCLIP(CLIP):
    """A CLIP with an instruction encoder beside its image tower.

    `res_visual` is the encoder; `vision_proj_res` makes a token of its answer. `weigh` is the
    function that weights tokens by belief, `soft_belief` or one of a notebook.
    """

    config: PIRCLIPConfig

    def __init__(
        self,
        config: PIRCLIPConfig,
        weigh: Callable[[Tensor, Tensor, str], Tensor] | None = None,
    ):
        super().__init__(config)
        self.weigh = weigh or soft_belief
        if config.instruction_token:
            width = len(self.clip.visual.class_embedding)
            self.res_visual = backbones.instruction_encoder(config.clip)
            self.res_visual.requires_grad_(not config.freeze_instruction)
            self.vision_proj_res = nn.Linear(backbones.clip_size(config.clip).embed_dim, width)
        if config.freeze_text:
            for part in self._text_modules():
                part.requires_grad_(False)
            self.clip.positional_embedding.requires_grad_(False)
            self.clip.text_projection.requires_grad_(False)
        self.train()  # frozen parts are in eval mode from the first batch on

    def _text_modules(self) -> list[nn.Module]:
        return [self.clip.token_embedding, self.clip.transformer, self.clip.ln_final]

    def frozen(self) -> list[nn.Module]:
        """Return the package towers, and instruction encoder and text tower if they are frozen."""
        parts = list(super().frozen())
        # the base class sets the mode before there is an encoder
        if self.config.freeze_instruction and hasattr(self, "res_visual"):
            parts.append(self.res_visual)
        if self.config.freeze_text:
            parts.extend(self._text_modules())
        return parts

    def instruct(self, vision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute tokens X (B,1+N,W), instruction y (B,1,W) and belief logits X.y (B,1+N).

        `vision` is what `image_features` gives. The logits are float32 also under mixed precision:
        y is not normalised, and float16 ends at 65504. UserError without instruction token.
        """
        if not self.config.instruction_token:
            raise UserError(
                "This PIR-CLIP was built without instruction token, so it holds no belief; build it"
                " with one."
            )
        tokens = image_tokens(self.clip, vision)
        seen = vision[:, 0] if self.config.freeze_towers else vision
        instruction = self.vision_proj_res(self.res_visual(seen)).unsqueeze(1)
        # autocast would take a matrix product in 16 bits
        logits = (tokens.float() * instruction.float()).sum(2)
        return tokens, instruction, logits

    def apply_belief(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Weight the tokens (B,1+N,W), or keep the best (B,filter_size,W), best first."""
        if self.config.belief == "none":
            return tokens
        if self.config.belief == "soft":
            return self.weigh(tokens.float(), logits.softmax(1), self.config.belief_rule)
        k = self.config.filter_size
        if logits.shape[1] < k:
            raise UserError(
                f"filter_size is {k} but the image tower has {logits.shape[1]} tokens; lower"
                " filter_size."
            )
        kept = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
        return tokens.gather(1, kept.unsqueeze(2).expand(-1, -1, tokens.shape[2]))

    def pooled(self, vision: Tensor) -> Tensor:
        """Pool an image to (B,D), not normalised.

        The pooled token is the instruction token after the blocks or, without one, the class token.
        """
        if self.config.instruction_token:
            tokens, instruction, logits = self.instruct(vision)
            tokens = torch.cat([instruction, self.apply_belief(tokens, logits)], dim=1)
        else:
            tokens = image_tokens(self.clip, vision)
        return pool_image(self.clip, self.clip.visual.transformer(tokens))

    def embed_images(self, vision: Tensor) -> Tensor:
        """Embed the feature `vision` as unit rows (B,D)."""
        return F.normalize(self.pooled(vision), dim=1)

    @torch.no_grad()
    def belief(self, vision: Tensor) -> tuple[Tensor, Tensor]:
        """Return the belief and the weights that the configured rule adds to it, (B,1+N) each.

        Rows of the belief sum to one. Column 0 is the class token, the others are the image in
        raster order.
        """
        belief = self.instruct(vision)[2].softmax(1)
        return belief, added_weights(belief, self.config.belief_rule)

    @torch.no_grad()
    def instruction_figures(self, vision: Tensor) -> dict[str, float]:
        """Return batch means that show an instruction which dominates or vanishes.

        `instruction_norm` is the norm of y. `belief_entropy` is in nats: log(1 + N) for a uniform
        belief.
        """
        _, instruction, logits = self.instruct(vision)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        return {
            "instruction_norm": instruction.float().norm(dim=2).mean().item(),
            "belief_entropy": entropy.mean().item(),
        }

    def losses(self, rows: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute loss, terms and scale of a batch.

        Where the options need them, the batch holds scene and image_index (B,). Both terms share
        one scale. It multiplies, so it is the inverse of PIR's temperature.
        """
        c = self.config
        image = gather(at_least_fp32(rows["image"]), c.one_sided_gather)
        text = gather(at_least_fp32(rows["text"]), c.one_sided_gather)
        scale = self.clip.logit_scale.exp()
        with torch.autocast(image.device.type, enabled=False):  # 16-bit logits would be too coarse
            image_index = gather(batch["image_index"]) if c.multi_positive else None
            loss = contrastive_loss(image, text, 1 / scale, image_index)
            terms = {"contrastive": loss, "scale": scale.detach()}
            if c.affiliation:
                scene = batch["scene"]
                if c.local_classes:
                    scene = scene * world_size() + rank()
                terms["affiliation"] = affiliation_loss(
                    image, text, gather(scene), 1 / scale, symmetric=True
                )
                loss = loss + terms["affiliation"]
        return {"loss": loss, **terms}


# Soft belief: belief is (B,1+N), with rows that sum to one
def added_weights(belief: Tensor, rule: str) -> Tensor:
    """Return what the weight of a token adds to its belief (B,1+N).

    No gradient flows through ranks.

    "official"  1/sqrt(1 + o_i), o_i the token that holds rank i: as released, the inverse of the
                intended order
    "rank"      1/sqrt(1 + r_i), r_i the rank of token i, 0 for the highest belief
    "pre_fix"   the belief once more, as released until October 2024
    """
    if rule == "pre_fix":
        return belief
    order = belief.argsort(dim=1, descending=True, stable=True)
    place = order if rule == "official" else order.argsort(dim=1)
    return (1 + place).to(belief.dtype).rsqrt()


def soft_belief(tokens: Tensor, belief: Tensor, rule: str = "official") -> Tensor:
    """Weight the tokens (B,1+N,W), then give each column unit norm over the tokens.

    The order of tokens stays. A norm over the columns of a token would undo all weights.
    """
    weight = belief + added_weights(belief, rule)
    return F.normalize(tokens * weight.unsqueeze(2), dim=1)


def labels_from_names(names: list[str]) -> Tensor:
    """Number the classes of images by file name: the text before the first '_'; (B,) int64.

    Classes count by first appearance. As released, a name without '_' is a class of its own,
    extension included.
    """
    labels: dict[str, int] = {}
    return torch.tensor(
        [labels.setdefault(name.split("_")[0], len(labels)) for name in names], dtype=torch.int64
    )


# The authors' files. STARTS: of names, once no prefix stands before them
STARTS = ("vision_proj_res.", "res_visual.", "clip.visual.")
FROM_RELEASE = [(r"^(?!res_visual\.|vision_proj_res\.)", "clip.")]


def load_release(model: PIRCLIP, state: dict[str, Tensor]) -> None:
    """Fill `model` from the authors' state dict.

    UserError lists every key without a place, and nothing is loaded.
    """
    checkpoints.load_into(model, checkpoints.rename(checkpoints.bare(state, *STARTS), FROM_RELEASE))


def read(path: Path | str) -> tuple[PIRCLIP, dict]:
    """Read a PIR-CLIP, in eval mode, and its metadata, from our checkpoint or the authors'.

    The authors' published file is older than their fix of the belief rule. Evaluate it under both
    rules, with `model.config = replace(model.config, belief_rule="pre_fix")` for the older one.
    UserError for a file of another model, with the keys that do not fit.
    """
    state, rest = checkpoints.read_checkpoint(path, *STARTS)
    if "meta" not in rest:
        if "nbhelpers" not in rest and not any("vision_proj_res." in name for name in state):
            raise UserError(
                "This file holds no PIR-CLIP: vision_proj_res is missing; give a checkpoint of "
                "PIR-CLIP, or name a plain CLIP in 12_starting_weights to start from."
            )
        if "nbhelpers" in rest:
            config = foreign_configs.config_of(PIRCLIPConfig, "PIR-CLIP", rest["nbhelpers"])
        else:
            config = PIRCLIPConfig.paper()
        model = foreign_configs.built(PIRCLIP, config, state)
        load_release(model, state)
        return model.eval(), {"system": "pir_clip", "release": True}
    meta = checkpoints.meta_of(rest, path, {"system": "pir_clip"})
    config = foreign_configs.config_of(PIRCLIPConfig, "PIR-CLIP", meta.get("model"))
    model = foreign_configs.built(PIRCLIP, config, state)
    checkpoints.load_into(model, state)
    return model.eval(), meta
