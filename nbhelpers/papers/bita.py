"""BITA: caption remote sensing images by a Fourier transformer and a frozen language model.

Yang, Li, Zhang, "Bootstrapping Interactive Image-Text Alignment for Remote Sensing Image
Captioning", IEEE TGRS 62, 2024 (arXiv 2312.01191). The file holds, in this order: configuration,
what both models share, stage 1 (alignment), stage 2 and fine-tuning (captions), the settings of
each stage, files. The transformer itself is in ift.py. B is the batch, V image tokens, Nq queries,
D width of the transformer, E of the shared space, L caption length, H width of the language model.
Parameters have the authors' names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from nbhelpers.errors import UserError
from nbhelpers.papers import clip, config_checks
from nbhelpers.papers.dual_encoder import keep_trained
from nbhelpers.papers.ift import IFT, MIXINGS, Mix, fourier_mix
from nbhelpers.towers import backbones, checkpoints, foreign_configs
from nbhelpers.training.device import keep_on_host, on_host
from nbhelpers.training.distributed import gather, rank
from nbhelpers.training.schedule import TrainConfig


@dataclass(frozen=True)
class BITAConfig:
    """Configure one BITA.

    Sizes are the release's. Where the release has an error, the default is the correction and the
    error is an option.
    """

    image: str = "clip_vit_l14_21"  # a name in backbones.CLIP_VISION or VISION; frozen
    decoder: str = "opt_2.7b"  # a name in backbones.LANGUAGE; frozen
    frozen_dtype: str = "bfloat16"  # of both; float16 in the release
    # words of the captions in stage 1; the transformer has one more, [DEC]
    vocab_size: int = 30522
    decoder_vocab: int | None = None  # None: the decoder's published vocabulary
    queries: int = 32  # Nq
    width: int = 768  # D
    layers: int = 12
    heads: int = 12
    hidden: int = 3072  # of the feed-forward networks
    positions: int = 512
    embed_dim: int = 256  # E
    mixing: str = "fourier"  # ablations: "attention", "none"
    cross_every: int = 1  # layers between two readings of the image
    dropout: float = 0.1
    temperature: float = 0.07  # learned, not clamped
    smoothing: float = 0.1  # of the labels of stage 1
    # contrastive gradients to both sides; in the release only to the row's own
    two_sided: bool = False
    prompt: str = "a photo of"  # before every caption in fine-tuning and generation
    # between prompt and caption; missing in the release ("a photo oftrees")
    prompt_space: bool = True
    # L: captions are padded to exactly this in stage 1, cut to it in stage 2
    text_length: ClassVar[int] = 32
    freeze_towers: ClassVar[bool] = True  # what the image tower gives can be cached

    def __post_init__(self):
        problems = {
            f"mixing must be one of {', '.join(MIXINGS)}": self.mixing not in MIXINGS,
            f"heads {self.heads} must divide width {self.width}": (
                self.width % max(self.heads, 1) != 0
            ),
            "queries, layers and cross_every must be at least 1": (
                min(self.queries, self.layers, self.cross_every) < 1
            ),
            f"positions must be at least {self.text_length}": self.positions < self.text_length,
            "frozen_dtype must be float32, bfloat16 or float16": (
                self.frozen_dtype not in ("float32", "bfloat16", "float16")
            ),
        }
        config_checks.check(self, problems)

    @classmethod
    def tiny(cls, vocab_size: int, decoder_vocab: int, **changes) -> BITAConfig:
        """Return stand-in towers at 112 px and a stand-in language model, without dropout.

        For a CPU.
        """
        return replace(
            cls(
                image="clip_standin_3",
                decoder="opt_standin",
                frozen_dtype="float32",
                vocab_size=vocab_size,
                decoder_vocab=decoder_vocab,
                queries=8,
                width=64,
                layers=3,
                heads=4,
                hidden=128,
                positions=32,
                embed_dim=64,
                dropout=0.0,
            ),
            **changes,
        )

    @classmethod
    def small(cls, vocab_size: int, decoder_vocab: int, **changes) -> BITAConfig:
        """Return the sizes for EfficientNet-Lite0 and a stand-in language model, for minutes."""
        return cls.tiny(
            vocab_size,
            decoder_vocab,
            image="efficientnet_lite0",
            width=192,
            heads=4,
            hidden=384,
            **changes,
        )

    @classmethod
    def compact(cls, **changes) -> BITAConfig:
        """Return the sizes for EfficientNet-Lite0, MiniLM's words and SmolLM2-135M."""
        return replace(
            cls(
                image="efficientnet_lite0",
                decoder="smollm2",
                frozen_dtype="float32",
                queries=16,
                width=384,
                layers=6,
                hidden=1536,
            ),
            **changes,
        )

    @classmethod
    def paper(cls, **changes) -> BITAConfig:
        """Return CLIP ViT-L/14, BERT-base and OPT-2.7B."""
        return replace(cls(), **changes)

    def bert(self) -> BertConfig:
        """Return transformers' configuration of the query transformer."""
        return BertConfig(
            vocab_size=self.vocab_size + 1,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.hidden,
            max_position_embeddings=self.positions,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            pad_token_id=0,
        )


def clean_bita_caption(text: str, max_words: int = 50) -> str:
    """Clean a caption as BITA's authors do, and keep its first `max_words` words.

    The text becomes lower case. Each of .!"()*#:;~ and each run of white space becomes one space.
    """
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


class ImageReader(nn.Module):
    """A frozen image tower, a trained norm, and queries that read its tokens.

    tower  replaces the configured one, e.g. in tests; it comes with the channels of its tokens
    mix    the mixing of tokens; a notebook gives its own
    Checkpoints hold what is trained, never the frozen towers.
    """

    IMAGE_FEATURES: tuple[str, ...] = ("vision",)

    def __init__(
        self,
        config: BITAConfig,
        text: bool,
        tower: tuple[nn.Module, int] | None = None,
        mix: Mix = fourier_mix,
    ):
        super().__init__()
        self.config = config
        encoder, channels = tower or backbones.image_reader(config.image)[:2]
        self.visual_encoder = _frozen(encoder, config.frozen_dtype)
        self.ln_vision = nn.LayerNorm(channels)
        self.query_tokens = nn.Parameter(
            torch.empty(1, config.queries, config.width).normal_(std=0.02)
        )
        self.Fformer = IFT(config.bert(), channels, config.mixing, config.cross_every, text, mix)
        self.register_state_dict_post_hook(keep_trained)

    def frozen(self) -> list[nn.Module]:
        """Return the parts that stay in eval mode and get no gradient."""
        return [self.visual_encoder]

    def towers(self) -> list[nn.Module]:
        """Return the part whose features can be cached."""
        return [self.visual_encoder]

    def train(self, mode: bool = True) -> ImageReader:
        """Set the mode of the model, but keep the frozen parts in eval mode."""
        super().train(mode)
        for part in self.frozen():
            part.eval()
        return self

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return `vision` (B,V,C) of pixels (B,3,S,S), a global token first."""
        dtype = next(self.visual_encoder.parameters()).dtype
        return {"vision": backbones.image_tokens(self.visual_encoder, pixels.to(dtype))}

    def _context(self, vision: Tensor) -> Tensor:
        return self.ln_vision(vision.to(self.ln_vision.weight.dtype))

    def read(self, vision: Tensor) -> Tensor:
        """Let the queries read `vision` (B,V,C); (B,Nq,D)."""
        return self.Fformer(
            self.query_tokens.expand(len(vision), -1, -1), context=self._context(vision)
        )

    def attention_maps(self, vision: Tensor) -> list[Tensor]:
        """Return what each query reads of the image, (B,heads,Nq,V) for each layer that reads."""
        return self.Fformer.attention_maps(
            self.query_tokens.expand(len(vision), -1, -1), self._context(vision)
        )

    def vision_of(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the cached features of a batch, or those of its pixels."""
        if "vision" in batch:
            return batch["vision"]
        return self.image_features(batch["pixels"])["vision"]

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Group the parameters: vectors and scalars have no decay, the queries have."""
        return clip.parameter_groups(self, weight_decay)


def _frozen(module: nn.Module, dtype: str) -> nn.Module:
    """Freeze a module, with its parameters in `dtype`.

    Its buffers stay, as rotary frequencies need more than 16 bits. Batch norms stay too, since
    their weights and statistics must have one dtype.
    """
    for part in module.modules():
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            for p in part.parameters(recurse=False):
                p.data = p.data.to(getattr(torch, dtype))
    return module.requires_grad_(False)


class Aligner(ImageReader):
    """Stage 1: align queries and caption by a contrastive loss alone.

    Image and caption pass the transformer one after the other. The matching head and the language
    head exist in the authors' files, but are never trained.
    """

    def __init__(
        self,
        config: BITAConfig,
        tower: tuple[nn.Module, int] | None = None,
        mix: Mix = fourier_mix,
    ):
        super().__init__(config, text=True, tower=tower, mix=mix)
        self.vision_proj = nn.Linear(config.width, config.embed_dim)
        self.text_proj = nn.Linear(config.width, config.embed_dim)
        self.itm_head = nn.Linear(config.width, 2)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.train()  # the tower is in eval mode from the first batch on

    def embed_images(self, vision: Tensor) -> Tensor:
        """Embed the feature `vision` (B,V,C) as unit rows (B,Nq,E), one for each query."""
        return F.normalize(self.vision_proj(self.read(vision)), dim=2)

    def embed_texts(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed ids (B,L) as unit rows (B,E), by their [CLS] token.

        Fourier mixing ignores the mask: all captions must be padded to one length.
        """
        return F.normalize(self.text_proj(self.Fformer(ids=ids, mask=mask)[:, 0]), dim=1)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the alignment loss and the temperature.

        The batch holds `vision` (B,V,C) or `pixels`, with ids and mask (B,L). UserError if captions
        are not padded to one fixed length.
        """
        if batch["ids"].shape[1] != self.config.text_length:
            raise UserError(
                "Under Fourier mixing padding changes every output, so stage 1 wants captions of"
                f" exactly {self.config.text_length} tokens, not {batch['ids'].shape[1]}; give the"
                " tokenizer fixed=True."
            )
        c = self.config
        image = self.embed_images(self.vision_of(batch)).float()
        text = self.embed_texts(batch["ids"], batch["mask"]).float()
        # 16-bit similarities would be too coarse
        with torch.autocast(image.device.type, enabled=False):
            i2t, t2i = similarities(image, text, self.temp, c.two_sided)
            loss = alignment_loss(i2t, t2i, c.smoothing)
        return {"loss": loss, "contrastive": loss, "temp": self.temp.detach()}

    def match_logits(self, vision: Tensor, ids: Tensor) -> Tensor:
        """Return the matching head's logits (B,Nq,2) for pairs.

        The authors rerank by the mean of column 1 over the queries, though this head is never
        trained.
        """
        joint = self.Fformer(
            self.query_tokens.expand(len(vision), -1, -1), ids, self._context(vision)
        )
        return self.itm_head(joint[:, : self.config.queries])


def similarities(
    image: Tensor, text: Tensor, temp: Tensor, two_sided: bool = False
) -> tuple[Tensor, Tensor]:
    """Return image-to-text and text-to-image similarities, (B,N) each, over the temperature.

    image  (B,Nq,E) unit rows; the best query of an image counts
    text   (B,E) unit rows
    The N pairs are those of all processes. One-sided, as released, the columns are constants: image
    to text trains the image side alone, and text to image the text side.
    """
    texts, images = (gather(x if two_sided else x.detach()) for x in (text, image))
    i2t = torch.einsum("bqe,ne->bqn", image, texts).max(1).values
    t2i = torch.einsum("be,nqe->bnq", text, images).max(2).values
    return i2t / temp, t2i / temp


def alignment_loss(i2t: Tensor, t2i: Tensor, smoothing: float = 0.1) -> Tensor:
    """Return the mean of both cross-entropies; the right column of row b is rank * B + b.

    Other captions of an image count as wrong.
    """
    right = rank() * len(i2t) + torch.arange(len(i2t), device=i2t.device)
    return (
        F.cross_entropy(i2t, right, label_smoothing=smoothing)
        + F.cross_entropy(t2i, right, label_smoothing=smoothing)
    ) / 2


GROUPS = 4  # of captions of like length in a batch


class Captioner(ImageReader):
    """Stages 2 and 3: the queries become a prefix of a frozen causal language model.

    The query branch and one projection are trained, by gradients through the language model.
    `decoder` may replace the configured language model, e.g. in tests.
    """

    USES_ALL_PARAMETERS = True  # unlike Aligner, two of whose heads never train

    def __init__(
        self,
        config: BITAConfig,
        tower: tuple[nn.Module, int] | None = None,
        decoder: nn.Module | None = None,
        mix: Mix = fourier_mix,
    ):
        super().__init__(config, text=False, tower=tower, mix=mix)
        dtype = getattr(torch, config.frozen_dtype)
        decoder = decoder or backbones.language_model(config.decoder, config.decoder_vocab, dtype)
        self.opt_model = _frozen(decoder, config.frozen_dtype)
        self.opt_proj = nn.Linear(config.width, decoder.config.hidden_size)
        self.train()

    def frozen(self) -> list[nn.Module]:
        """Return the image tower and the language model."""
        return [self.visual_encoder, self.opt_model]

    def begin(self, aligner: Aligner) -> Captioner:
        """Take queries, norm and query branch from stage 1.

        The projection keeps its random start.
        """
        return self.take(aligner.state_dict())

    def take(self, state: dict[str, Tensor]) -> Captioner:
        """Do the same as `begin` from a state dict of stage 1.

        UserError, and nothing loaded, if it is not one of this size.
        """
        checkpoints.load_into(
            self, state, allow_missing=("opt_proj.*",), allow_unexpected=TEXT_BRANCH
        )
        return self

    def prefix(self, vision: Tensor) -> Tensor:
        """Map `vision` (B,V,C) to a prefix (B,Nq,H) in place of words."""
        return self.opt_proj(self.read(vision))

    def states(self, prefix: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the decoder's last states (B,Nq+L,H) for prefix (B,Nq,H), ids and mask (B,L)."""
        words = self.opt_model.get_input_embeddings()(ids)
        mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)
        return self.opt_model.base_model(
            inputs_embeds=torch.cat([prefix.to(words.dtype), words], dim=1),
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state

    def token_losses(
        self, prefix: Tensor, ids: Tensor, mask: Tensor, prompt_length: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each token (B,L), and which tokens are targets (B,L).

        It is 0 for a token that is no target.
        prefix         (B,Nq,H), with ids and mask (B,L)
        prompt_length  leading ids, first token included, that are no targets (fine-tuning); 0: all
                       are targets, also the first token
        """
        wanted = targets(ids, mask, prompt_length).flatten()
        # places of the targets, known to the host, so that a GPU is not waited for
        learned = on_host(mask) != 0
        learned[:, :prompt_length] = False
        places = torch.from_numpy(np.flatnonzero(learned)).to(ids.device, non_blocking=True)
        # each before its target
        states = self.states(prefix, ids, mask)[:, self.config.queries - 1 : -1]
        # of targets alone: this head is a third of a step
        logits = self.opt_model.get_output_embeddings()(states.flatten(0, 1)[places])
        losses = F.cross_entropy(logits.float(), wanted[places], reduction="none")
        every = losses.new_zeros(ids.numel()).index_copy(0, places, losses)
        return every.view(ids.shape), (wanted != -100).view(ids.shape)

    def loss(self, batch: dict[str, Tensor], prompt_length: int = 0) -> dict[str, Tensor]:
        """Compute the mean loss of a target, and the perplexity.

        The batch holds `vision` (B,V,C) or `pixels`, with the decoder's ids and mask (B,L), padded
        right. `prompt_length` is as in `token_losses`. Captions of like length are read together,
        with no more padding than they need.
        """
        prefix, mask = self.prefix(self.vision_of(batch)), batch["mask"]
        total = torch.zeros((), device=prefix.device)
        count = torch.zeros((), device=prefix.device, dtype=torch.long)
        host = on_host(mask)
        lengths = host.sum(1)
        order = np.argsort(lengths, kind="stable")
        for some in np.array_split(order, min(GROUPS, len(order))):
            longest = int(lengths[some].max())
            rows = torch.from_numpy(some).to(mask.device, non_blocking=True)
            read = mask[rows, :longest]
            keep_on_host(read, host[some, :longest])
            losses, asked = self.token_losses(
                prefix[rows], batch["ids"][rows, :longest], read, prompt_length
            )
            total = total + losses.sum()
            count = count + asked.sum()
        loss = total / count
        return {"loss": loss, "perplexity": loss.detach().exp()}

    @torch.inference_mode()
    def generate(
        self,
        vision: Tensor,
        prompt_ids: Tensor,
        end: int,
        pad: int,
        beams: int = 5,
        longest: int = 21,
        shortest: int = 4,
    ) -> Tensor:
        """Generate the ids that follow the prompt, (B, at most `longest`), by beam search.

        vision             (B,V,C)
        prompt_ids         (P,)
        end, pad           ids of the line break, which ends a caption, and of padding
        longest, shortest  new tokens before the end; the authors' max_length 22 and min_length 5
                           count an artificial first token
        UserError on NaN and infinity, which no beam search can order.
        """
        words = self.opt_model.get_input_embeddings()(prompt_ids.expand(len(vision), -1))
        start = torch.cat([self.prefix(vision).to(words.dtype), words], dim=1)
        first = self.opt_model.base_model(inputs_embeds=start[:, :-1], use_cache=True)
        if not (start.isfinite().all() and first.last_hidden_state.isfinite().all()):
            raise UserError(
                "What the decoder is to continue holds NaN or infinity, so there is no best"
                " caption; the weights or the pixels are broken, or 16 bits are too few: give"
                " another checkpoint, or frozen_dtype float32."
            )
        read = first.past_key_values
        # generate would read what all beams share once for each of them
        read.batch_repeat_interleave(beams)
        return self.opt_model.generate(
            inputs_embeds=start,
            attention_mask=start.new_ones(start.shape[:2], dtype=torch.long),
            past_key_values=read,
            num_beams=beams,
            max_new_tokens=longest,
            min_new_tokens=shortest,
            do_sample=False,
            length_penalty=1.0,
            repetition_penalty=1.0,
            eos_token_id=end,
            pad_token_id=pad,
        )


def targets(ids: Tensor, mask: Tensor, prompt_length: int = 0) -> Tensor:
    """Return the ids (B,L), and -100 where nothing is learned: padding and the prompt."""
    wanted = ids.masked_fill(mask == 0, -100)
    wanted[:, :prompt_length] = -100
    return wanted


STAGES = ("stage1", "stage2", "finetune")
# the authors' settings, their four processes together
RELEASED: dict[str, dict[str, Any]] = {
    "stage1": {
        "epochs": 5,
        "lr": 1e-4,
        "lr_last": 1e-5,
        "lr_first": 1e-6,
        "warmup_steps": 5000,
        "batch_size": 384,
    },
    "stage2": {
        "epochs": 5,
        "lr": 1e-4,
        "lr_last": 1e-5,
        "lr_first": 1e-6,
        "warmup_steps": 2000,
        "batch_size": 192,
    },
    "finetune": {
        "epochs": 50,
        "lr": 1e-5,
        "lr_last": 0.0,
        "lr_first": 1e-8,
        "warmup_steps": 1000,
        "batch_size": 192,
    },
}


def train_config(stage: str, **changes) -> TrainConfig:
    """Return a stage's settings as released, or with changes.

    Validation selects only in fine-tuning.

    With another `lr`, its first and last values change in proportion.
    """
    settings = dict(RELEASED[stage], weight_decay=0.05, betas=(0.9, 0.999), keep="last")
    settings["schedule"] = "epoch_cosine"
    if stage == "finetune":
        settings |= {"keep": "best", "monitor": "CIDEr_BLEU4"}
    lr = settings["lr"]
    for name in ("lr_first", "lr_last"):
        settings[name] = settings[name] * changes.get("lr", lr) / lr
    return TrainConfig(**(settings | changes))


# Files. Of stage 1 and not of the captioner, as shell patterns.
TEXT_BRANCH = (
    "temp",
    "vision_proj.*",
    "text_proj.*",
    "itm_head.*",
    "Fformer.cls.*",
    "*.word_embeddings.*",
    "*.position_embeddings.*",
    "*.intermediate.*",
    "*.layer.*[0-9].output.*",
)
STARTS = ("query_tokens",)  # of names, once no prefix stands before them
POSITION_IDS = "Fformer.bert.embeddings.position_ids"


def load_release(model: ImageReader, state: dict[str, Tensor]) -> list[str]:
    """Fill the trained part of an Aligner or a Captioner from the authors' state dict of its stage.

    Returns the keys left out, a buffer. UserError lists every other key that does not fit, and
    nothing is loaded.
    """
    state = checkpoints.bare(state, *STARTS)
    dropped = [name for name in state if name == POSITION_IDS]
    tied = [name for name in state if name.startswith("Fformer.cls.predictions.decoder.")]
    checkpoints.load_into(model, state, allow_unexpected=(*dropped, *tied))
    return dropped


def stage_of(state: dict[str, Tensor]) -> type[Aligner] | type[Captioner]:
    """Return Aligner or Captioner, by the names in the file; UserError if it is neither."""
    names = set(state)
    if "query_tokens" not in names or not names & {"temp", "opt_proj.weight"}:
        raise UserError(
            "This file holds no BITA: query_tokens and temp or opt_proj are missing; give a"
            " checkpoint of BITA."
        )
    return Aligner if "temp" in names else Captioner


def read(
    path: Path | str, fill: Callable[[nn.Module], nn.Module] = lambda model: model
) -> tuple[ImageReader, dict]:
    """Read an Aligner or a Captioner, in eval mode, and its metadata.

    The file is our checkpoint or the authors'.
    fill   gives the frozen towers their weights, as `captioning.fill_frozen` does: no checkpoint
           holds them
    The authors' files do not hold their configuration; without a note of ours it is the
    paper's. UserError for a file of another model, with the keys that do not fit.
    """
    state, rest = checkpoints.read_checkpoint(path, *STARTS)
    kind = stage_of(state)
    if "meta" in rest:
        meta = checkpoints.meta_of(rest, path, {"system": "bita"})
        config = foreign_configs.config_of(BITAConfig, "BITA", meta.get("model"))
        model = fill(foreign_configs.built(kind, config, state))
        checkpoints.load_into(model, state)
        return model.eval(), meta
    settings = checkpoints.settings_in(rest, "config")
    if "nbhelpers" in settings:
        config = foreign_configs.config_of(BITAConfig, "BITA", settings["nbhelpers"])
    else:
        config = BITAConfig.paper()
    model = fill(foreign_configs.built(kind, config, state))
    dropped = load_release(model, state)
    return model.eval(), {"system": "bita", "release": True, "config": settings, "dropped": dropped}
