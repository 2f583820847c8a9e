"""BITA: Yang, Li, Zhang, "Bootstrapping Interactive Image-Text Alignment for Remote Sensing Image Captioning", 2023 (arXiv 2312.01191; IEEE TGRS 2024).

In this order: configuration, what both models share, stage 1 (alignment), stage 2 and fine-tuning
(captions), how they are optimised, files. The transformer itself stands in ift.py. B batch, V image
tokens, Nq queries, D width of the transformer, E of the shared space, L caption length, H width of
the language model. Names of parameters are the authors'.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.papers import clip
from nbhelpers.papers.ift import IFT, MIXINGS
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.training.distributed import gather, rank
from nbhelpers.training.schedule import TrainConfig


@dataclass(frozen=True)
class BITAConfig:
    """One BITA.

    Sizes are the release's; where it has an error, the default is mended and the error a choice.
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
        wrong = [text for text, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise UserError(f"BITAConfig: {'; '.join(wrong)}.")

    @classmethod
    def tiny(cls, vocab_size: int, decoder_vocab: int, **changes) -> BITAConfig:
        """Stand-in towers at 112 px and a stand-in language model; no dropout, as passes are few;
        trains on a CPU.
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
    def compact(cls, **changes) -> BITAConfig:
        """The map of EfficientNet-Lite0 as image tokens, MiniLM's sizes and words, SmolLM2-135M as
        decoder.
        """
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
        """CLIP ViT-L/14, BERT-base, OPT-2.7B."""
        return replace(cls(), **changes)

    def bert(self) -> BertConfig:
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


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower case; .

    ! " ( ) * # : ; ~ and runs of white space become one space; the first `max_words` words (bita.md
    4).
    """
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


# ---- what both models share (2.1, 2.2)
class ImageReader(nn.Module):
    """A frozen image tower, a trained norm, and queries that read what it gives.

    `tower` may replace the configured one, e.g. in tests; it comes with the channels of its tokens.
    Checkpoints hold what is trained, never the frozen towers.
    """

    IMAGE_FEATURES: tuple[str, ...] = ("vision",)

    def __init__(self, config: BITAConfig, text: bool, tower: tuple[nn.Module, int] | None = None):
        super().__init__()
        self.config = config
        encoder, channels = tower or backbones.image_reader(config.image)[:2]
        self.visual_encoder = _frozen(encoder, config.frozen_dtype)
        self.ln_vision = nn.LayerNorm(channels)
        self.query_tokens = nn.Parameter(
            torch.empty(1, config.queries, config.width).normal_(std=0.02)
        )
        self.Fformer = IFT(config.bert(), channels, config.mixing, config.cross_every, text)
        self.register_state_dict_post_hook(_keep_trained)

    def frozen(self) -> list[nn.Module]:
        """Parts that stay in eval mode and get no gradient."""
        return [self.visual_encoder]

    def towers(self) -> list[nn.Module]:
        """The part whose features can be cached."""
        return [self.visual_encoder]

    def train(self, mode: bool = True):
        super().train(mode)
        for part in self.frozen():
            part.eval()
        return self

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B,3,S,S) -> vision (B,V,C), a global token first."""
        return {
            "vision": backbones.image_tokens(
                self.visual_encoder, pixels.to(next(self.visual_encoder.parameters()).dtype)
            )
        }

    def _context(self, vision: Tensor) -> Tensor:
        return self.ln_vision(vision.to(self.ln_vision.weight.dtype))

    def read(self, vision: Tensor) -> Tensor:
        """(B,V,C) -> the queries after they read it, (B,Nq,D)."""
        return self.Fformer(
            self.query_tokens.expand(len(vision), -1, -1), context=self._context(vision)
        )

    def attention_maps(self, vision: Tensor) -> list[Tensor]:
        """Of each layer that reads: (B,heads,Nq,V), what each query reads of the image."""
        return self.Fformer.attention_maps(
            self.query_tokens.expand(len(vision), -1, -1), self._context(vision)
        )

    def vision_of(self, batch: dict[str, Tensor]) -> Tensor:
        """Cached features, or those of the pixels of a batch."""
        return (
            batch["vision"] if "vision" in batch else self.image_features(batch["pixels"])["vision"]
        )

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """No decay on vectors and scalars; the queries decay."""
        return clip.parameter_groups(self, weight_decay)


def _frozen(module: nn.Module, dtype: str) -> nn.Module:
    """Without gradients, its parameters in `dtype`; not its buffers, as rotary frequencies would
    not survive 16 bits, nor its batch norms, which want weights and statistics of one kind.
    """
    for part in module.modules():
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            for p in part.parameters(recurse=False):
                p.data = p.data.to(getattr(torch, dtype))
    return module.requires_grad_(False)


def _keep_trained(model: nn.Module, state: dict[str, Tensor], prefix: str, _) -> None:
    trained = {prefix + name for name, p in model.named_parameters() if p.requires_grad}
    for name in set(state) - trained:
        del state[name]


# ---- stage 1: queries and caption are aligned (3)
class Aligner(ImageReader):
    """Image and caption pass the transformer one after the other and meet in a contrastive loss alone.

    The head of matching and the language head exist in the authors' files, and never train.
    """

    def __init__(self, config: BITAConfig, tower: tuple[nn.Module, int] | None = None):
        super().__init__(config, text=True, tower=tower)
        self.vision_proj = nn.Linear(config.width, config.embed_dim)
        self.text_proj = nn.Linear(config.width, config.embed_dim)
        self.itm_head = nn.Linear(config.width, 2)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.train()  # from the first batch on, the tower rests

    def embed_images(self, vision: Tensor) -> Tensor:
        """(B,V,C) -> (B,Nq,E) unit rows, one for each query."""
        return F.normalize(self.vision_proj(self.read(vision)), dim=2)

    def embed_texts(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,L) -> (B,E) unit rows, of [CLS].

        Fourier mixing heeds no mask: captions must all be padded to one length.
        """
        return F.normalize(self.text_proj(self.Fformer(ids=ids, mask=mask)[:, 0]), dim=1)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Batch of `vision` (B,V,C) or `pixels`, with ids and mask (B,L) -> loss and temperature.

        UserError if captions are not padded to one fixed length.
        """
        if batch["ids"].shape[1] != self.config.text_length:
            raise UserError(
                "Under Fourier mixing padding changes every output, so stage 1 wants captions of"
                f" exactly {self.config.text_length} tokens, not {batch['ids'].shape[1]}; give the"
                " tokenizer fixed=True."
            )
        image, text = (
            self.embed_images(self.vision_of(batch)).float(),
            self.embed_texts(batch["ids"], batch["mask"]).float(),
        )
        # 16-bit similarities would be too coarse
        with torch.autocast(image.device.type, enabled=False):
            loss = alignment_loss(
                *similarities(image, text, self.temp, self.config.two_sided), self.config.smoothing
            )
        return {"loss": loss, "contrastive": loss, "temp": self.temp.detach()}

    def match_logits(self, vision: Tensor, ids: Tensor) -> Tensor:
        """Pairs -> (B,Nq,2) of the matching head over the joint pass.

        Its mean over queries of column 1 is the authors' score for ranking again, though nothing
        ever trained it.
        """
        joint = self.Fformer(
            self.query_tokens.expand(len(vision), -1, -1), ids, self._context(vision)
        )
        return self.itm_head(joint[:, : self.config.queries])


def similarities(
    image: Tensor, text: Tensor, temp: Tensor, two_sided: bool = False
) -> tuple[Tensor, Tensor]:
    """Image (B,Nq,E) and text (B,E) unit rows -> image to text and text to image, (B,N) each, of the pairs of all processes: the best of the queries, over the temperature.

    One-sided, as released, the columns are constants: image to text trains the image side alone,
    and text to image the text side.
    """
    texts, images = (gather(x if two_sided else x.detach()) for x in (text, image))
    i2t = torch.einsum("bqe,ne->bqn", image, texts).max(1).values
    t2i = torch.einsum("be,nqe->bnq", text, images).max(2).values
    return i2t / temp, t2i / temp


def alignment_loss(i2t: Tensor, t2i: Tensor, smoothing: float = 0.1) -> Tensor:
    """Mean of both cross-entropies; the right column of row b is rank * B + b.

    Other captions of an image count as wrong.
    """
    right = rank() * len(i2t) + torch.arange(len(i2t), device=i2t.device)
    return (
        F.cross_entropy(i2t, right, label_smoothing=smoothing)
        + F.cross_entropy(t2i, right, label_smoothing=smoothing)
    ) / 2


# ---- stage 2 and fine-tuning: queries become the prefix of a frozen language model (2.3, 2.4, 3)
GROUPS = 4  # of captions of like length in a batch


class Captioner(ImageReader):
    """The query branch, one projection, and a frozen causal language model through which gradients flow to them.

    `decoder` may replace the configured language model, e.g. in tests.
    """

    USES_ALL_PARAMETERS = True  # unlike Aligner, two of whose heads never train

    def __init__(
        self,
        config: BITAConfig,
        tower: tuple[nn.Module, int] | None = None,
        decoder: nn.Module | None = None,
    ):
        super().__init__(config, text=False, tower=tower)
        decoder = decoder or backbones.language_model(config.decoder, config.decoder_vocab)
        self.opt_model = _frozen(decoder, config.frozen_dtype)
        self.opt_proj = nn.Linear(config.width, decoder.config.hidden_size)
        self.train()

    def frozen(self) -> list[nn.Module]:
        return [self.visual_encoder, self.opt_model]

    def begin(self, aligner: Aligner) -> Captioner:
        """Takes queries, norm and query branch over from stage 1; the projection keeps its random
        start.
        """
        return self.take(aligner.state_dict())

    def take(self, state: dict[str, Tensor]) -> Captioner:
        """The same from a state dict of stage 1.

        UserError, and nothing loaded, if it is not one of this size.
        """
        checkpoints.load_into(
            self, state, allow_missing=("opt_proj.*",), allow_unexpected=TEXT_BRANCH
        )
        return self

    def prefix(self, vision: Tensor) -> Tensor:
        """(B,V,C) -> (B,Nq,H), in the place of words."""
        return self.opt_proj(self.read(vision))

    def states(self, prefix: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Prefix (B,Nq,H), ids and mask (B,L) -> the decoder's last states (B,Nq+L,H)."""
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
        """Prefix (B,Nq,H), ids and mask (B,L) -> cross-entropy of each token (B,L), 0 where it is no target; which are (B,L).

        prompt_length  leading ids, first token included, that are no targets (fine-tuning); 0: all
                       are, also the first token
        """
        wanted = targets(ids, mask, prompt_length)
        asked = wanted != -100
        # each before its target
        states = self.states(prefix, ids, mask)[:, self.config.queries - 1 : -1][asked]
        # of targets alone: this head is a third of a step
        logits = self.opt_model.get_output_embeddings()(states)
        losses = F.cross_entropy(logits.float(), wanted[asked], reduction="none")
        return losses.new_zeros(asked.shape).masked_scatter(asked, losses), asked

    def loss(self, batch: dict[str, Tensor], prompt_length: int = 0) -> dict[str, Tensor]:
        """Batch of `vision` (B,V,C) or `pixels`, with the decoder's ids and mask (B,L), padded
        right -> mean loss of a target; `prompt_length` as in `token_losses`. Captions of like
        length are read together, with no more padding than they need.
        """
        prefix, mask, total, count = self.prefix(self.vision_of(batch)), batch["mask"], 0, 0
        for rows in mask.sum(1).argsort(stable=True).tensor_split(min(GROUPS, len(mask))):
            longest = int(mask[rows].sum(1).max())
            losses, asked = self.token_losses(
                prefix[rows], batch["ids"][rows, :longest], mask[rows, :longest], prompt_length
            )
            total, count = total + losses.sum(), count + asked.sum()
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
        """Vision (B,V,C), prompt_ids (P,) -> the ids that follow the prompt, (B, at most `longest`).

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
    """(B,L): the ids, and -100 where nothing is to be learned: padding and the prompt."""
    wanted = ids.masked_fill(mask == 0, -100)
    wanted[:, :prompt_length] = -100
    return wanted


# ---- how each stage is optimised (5)
STAGES = ("stage1", "stage2", "finetune")
RELEASED = {  # the authors' settings, their four processes together
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
    """A stage as released, or with changes; only fine-tuning is selected by validation.

    With another `lr`, its first and last values change in proportion.
    """
    released = RELEASED[stage]
    ends = {
        name: released[name] * changes.get("lr", released["lr"]) / released["lr"]
        for name in ("lr_first", "lr_last")
    }
    keep = {"keep": "best", "monitor": "CIDEr_BLEU4"} if stage == "finetune" else {"keep": "last"}
    settings = (
        {"weight_decay": 0.05, "betas": (0.9, 0.999), "schedule": "epoch_cosine"}
        | released
        | ends
        | keep
    )
    return TrainConfig(**(settings | changes))


# ---- files (7)
# Of stage 1 and not of the captioner, as shell patterns.
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
    """Fills what is trained of an Aligner or a Captioner from the authors' state dict of the same
    stage; returns the keys that were left out, a buffer. All else must fit, or UserError lists the
    keys and nothing is loaded; their loader is silent.
    """
    state = checkpoints.bare(state, *STARTS)
    dropped = [name for name in state if name == POSITION_IDS]
    tied = [name for name in state if name.startswith("Fformer.cls.predictions.decoder.")]
    checkpoints.load_into(model, state, allow_unexpected=(*dropped, *tied))
    return dropped


def release_state(model: ImageReader) -> dict[str, Tensor]:
    """What is trained, and the buffer, with the authors' names."""
    state = dict(model.state_dict())
    if isinstance(model, Aligner):
        decoder = model.Fformer.cls.predictions.decoder
        state |= {
            f"Fformer.cls.predictions.decoder.{name}": getattr(decoder, name)
            for name in ("weight", "bias")
        }
    return state | {POSITION_IDS: torch.arange(model.config.positions)[None]}


def stage_of(state: dict[str, Tensor]) -> type[ImageReader]:
    """Aligner or Captioner, by what is in the file. UserError if it is neither."""
    names = set(state)
    if "query_tokens" not in names or not names & {"temp", "opt_proj.weight"}:
        raise UserError(
            "This file holds no BITA: query_tokens and temp or opt_proj are missing; give a"
            " checkpoint of BITA."
        )
    return Aligner if "temp" in names else Captioner


def read(
    path, fill: Callable[[nn.Module], nn.Module] = lambda model: model
) -> tuple[ImageReader, dict]:
    """An Aligner or a Captioner from our checkpoint or the authors', in eval mode, and what the file says of itself.

    fill   gives the frozen towers their weights, as `starting.fill_frozen` does: no checkpoint
           holds them
    The authors' files do not tell their configuration; without a note of `write_release` it is that
    of the paper. UserError on a file of another model, with the keys that do not fit.
    """
    state, rest = checkpoints.read_checkpoint(path, *STARTS)
    kind = stage_of(state)
    if "meta" in rest:
        meta = checkpoints.meta_of(rest, path, {"system": "bita"})
        model = fill(kind(checkpoints.config_of(BITAConfig, "BITA", meta.get("model"))))
        checkpoints.load_into(model, state)
        return model.eval(), meta
    settings = rest.get("config") if isinstance(rest.get("config"), dict) else {}
    model = fill(
        kind(
            checkpoints.config_of(BITAConfig, "BITA", settings["nbhelpers"])
            if "nbhelpers" in settings
            else BITAConfig.paper()
        )
    )
    dropped = load_release(model, state)
    return model.eval(), {"system": "bita", "release": True, "config": settings, "dropped": dropped}


def write_release(model: ImageReader, path, epoch: int = 0) -> None:
    """Writes the authors' layout: model, optimizer, config, scaler, epoch; optimizer and scaler are
    empty.
    """
    state = {name: value.detach().cpu() for name, value in release_state(model).items()}
    with atomic_write(path) as temporary:
        torch.save(
            {
                "model": state,
                "optimizer": {},
                "config": {"nbhelpers": asdict(model.config)},
                "scaler": {},
                "epoch": epoch,
            },
            temporary,
        )
