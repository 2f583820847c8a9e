"""CFITR: search coarsely by hash codes, then rerank with a single-stream transformer.

Zhou, Wu, Deng, "Toward Efficient and Accurate Remote Sensing Image-Text Retrieval With a
Coarse-to-Fine Approach", IEEE GRSL 22, 2025 (online 2024). The file holds, in this order:
configuration, the modules on top of ViLT, the model (dual stream, hash codes, single stream), the
captions that false texts are drawn from, the losses, files. B is the batch, N patches, L caption
length, d width, F the number of false texts of an image.

The *states* of an image (B,1+N,d) or a text (B,L,d) are its tokens behind the lower layers, where
ViLT is cut. They are not normalised, and their modality is already added. They are cached, and the
upper layers read them. Parameters have the authors' names, those of the trunk `vilt` have
transformers'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViltModel

from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import distinct_captions
from nbhelpers.errors import UserError
from nbhelpers.papers import config_checks, vilt
from nbhelpers.papers.dual_encoder import OnFrozenTowers, decay_groups
from nbhelpers.towers import backbones, checkpoints, foreign_configs, vilt_names
from nbhelpers.training.device import on_host
from nbhelpers.training.distributed import gather, rank


@dataclass(frozen=True)
class CFITRConfig:
    """Configure one CFITR.

    Sizes and weights are the release's. Where the release has an error, the default is the
    correction and the error is an option.
    """

    vilt: str = "vilt_b32"  # a name in backbones.VILT
    vocab_size: int | None = None  # None: ViLT's published vocabulary
    # lower layers, which read image and text apart; the others read both together
    split: int = 6
    bits: int = 128  # of a hash code
    hidden: int = 4096  # width of the hash heads' hidden layer
    # local feature enhancement; off in the release, which builds it and leaves it out
    lfem: bool = True
    false_texts: int = 15  # F
    false_from: str = "others"  # "all": also captions that do describe the image, as released
    # of the triplet loss; "others": not those of a batch that match too (deviation, small sets)
    negatives_from: str = "all"
    # "released": a code bank that is never written and turns to zero
    bank: str = "intended"
    # sum over the bits of a sample, as released; "bit": over the samples of a bit
    balance: str = "sample"
    margin: float = 0.2  # of the triplet loss
    # weight of the quantisation loss, a sum over the batch (8 pairs in the release)
    beta: float = 0.001
    gamma: float = 0.01  # weight of the balance loss, a sum like it
    dropout: float = 0.1
    use_mask: ClassVar[bool] = True  # padding is attended nowhere

    def __post_init__(self):
        layers = backbones.vilt_size(self.vilt).vilt["num_hidden_layers"]
        problems = {
            f"split {self.split} must leave layers on both sides of the {layers} of {self.vilt}": (
                not 1 <= self.split < layers
            ),
            "bits, hidden and false_texts must be at least 1": (
                min(self.bits, self.hidden, self.false_texts) < 1
            ),
            "false_from and negatives_from must be 'others' or 'all'": (
                {self.false_from, self.negatives_from} - {"others", "all"}
            ),
            "bank must be 'intended' or 'released'": self.bank not in ("intended", "released"),
            "balance must be 'sample' or 'bit'": self.balance not in ("sample", "bit"),
        }
        config_checks.check(self, problems)

    @property
    def freeze_towers(self) -> bool:
        """Whether this ViLT stands on frozen package towers, whose features can be cached."""
        return backbones.vilt_size(self.vilt).towers is not None

    @classmethod
    def tiny(cls, vocab_size: int, **changes) -> CFITRConfig:
        """Return four layers at 112 px, seven by seven patches; trains on a CPU."""
        return replace(
            cls(
                vilt="vilt_standin",
                vocab_size=vocab_size,
                split=2,
                bits=64,
                hidden=256,
                false_texts=3,
                negatives_from="others",
            ),
            **changes,
        )

    @classmethod
    def compact(cls, **changes) -> CFITRConfig:
        """Return four layers over frozen EfficientNet-Lite0 maps and frozen MiniLM states."""
        return replace(
            cls(vilt="vilt_compact", split=2, hidden=1024, false_texts=3, negatives_from="others"),
            **changes,
        )

    @classmethod
    def paper(cls, **changes) -> CFITRConfig:
        """Return ViLT-B/32 at 384 px."""
        return replace(cls(), **changes)

    def released(self) -> CFITRConfig:
        """Return the configuration that the released code trains.

        It has no LFEM, a bank that turns to zero, and false texts and negatives that may be true.
        """
        return replace(
            self,
            lfem=False,
            bank="released",
            false_from="all",
            negatives_from="all",
            balance="sample",
        )


class LFEM(nn.Module):
    """Local feature enhancement: a residual block of convolutions over the square patch grid."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.net = nn.Sequential(
            nn.Conv2d(channels, half, 3, padding=1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 5, padding=2),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map patches (B,N,d) in raster order to (B,N,d).

        In training the batch statistics are those of all processes.
        """
        count, side = len(x), math.isqrt(x.shape[1])
        every = gather(x) if self.training else x
        grid = every.transpose(1, 2).unflatten(2, (side, side))
        out = F.relu(self.net(grid) + grid).flatten(2).transpose(1, 2)
        return out[rank() * count : (rank() + 1) * count] if self.training else out


class PositionPool(nn.Module):
    """Pool by one learned weight for each position, padding included, and a tanh."""

    def __init__(self, positions: int):
        super().__init__()
        self.dense = nn.Linear(positions, 1)
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pool x (B,n,d) to (B,d)."""
        return self.dense(x.transpose(1, 2)).squeeze(2).tanh()


def hash_head(width: int, hidden: int, bits: int) -> nn.Sequential:
    """Build the layers from (B,width) to continuous codes (B,bits) in (-1,1)."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, bits),
        nn.Tanh(),
    )


class CFITR(OnFrozenTowers):
    """Both stages in one model.

    As a dual encoder it is the coarse stage: `encode_images` and `encode_texts` give the continuous
    codes as unit rows. `score_pairs` is the fine stage. Training needs the captions
    (`set_captions`).
    trunk  replaces the configured ViLT, e.g. in tests
    head   makes a hash head from width, hidden width and bits; a notebook gives its own
    """

    def __init__(
        self,
        config: CFITRConfig,
        trunk: ViltModel | None = None,
        head: Callable[[int, int, int], nn.Module] = hash_head,
    ):
        super().__init__()
        self.config = config
        self.vilt = trunk or backbones.vilt(config.vilt, config.vocab_size, config.dropout)
        width = self.vilt.config.hidden_size
        self.rank_output = nn.Linear(width, 1)
        nn.init.normal_(self.rank_output.weight, std=0.02)
        nn.init.zeros_(self.rank_output.bias)
        if config.lfem:
            self.res = LFEM(width)
        self.imagepooler_be = PositionPool(self.vilt.embeddings.position_embeddings.shape[1])
        self.textpooler_be = PositionPool(self.vilt.config.max_position_embeddings)
        self.image_module = head(width, config.hidden, config.bits)
        self.text_module = head(width, config.hidden, config.bits)
        self.captions: Captions | None = None
        self.register_buffer("bank", None)
        if towers := backbones.vilt_size(config.vilt).towers:
            self.add_frozen_towers(*towers)
        self.train()  # frozen parts are in eval mode from the first batch on

    # Dual stream: the lower layers read image and text apart.
    def image_states(self, vision: Tensor, permutation: Tensor | None = None) -> Tensor:
        """Return the states (B,1+N,d) of the feature `vision`, with LFEM over the patches.

        UserError for LFEM out of raster order.
        """
        states = vilt.through(
            self.vilt.encoder.layer[: self.config.split],
            vilt.image_tokens(self.vilt, vision, permutation),
        )
        if not self.config.lfem:
            return states
        if permutation is not None:
            raise UserError(
                "LFEM convolves the patch grid, which a permutation destroys; leave the one or the"
                " other out."
            )
        return torch.cat([states[:, :1], self.res(states[:, 1:])], dim=1)

    def text_states(self, text: Tensor, mask: Tensor) -> Tensor:
        """Return the states (B,L,d) of the feature `text`, with mask (B,L), 1 = word.

        Padding is not attended, but has states. UserError if L is not the length of the pooling.
        """
        length = self.vilt.config.max_position_embeddings
        if text.shape[1] != length:
            raise UserError(
                f"This CFITR pools over {length} positions, padding included, and got captions of"
                f" {text.shape[1]}; give the tokenizer max_length={length} and fixed=True."
            )
        return vilt.through(
            self.vilt.encoder.layer[: self.config.split], vilt.text_tokens(self.vilt, text), mask
        )

    # Hash codes
    def pooled_images(self, states: Tensor) -> Tensor:
        """Pool states (B,1+N,d) to (B,d), over the trunk's last norm, which both stages share."""
        return self.imagepooler_be(self.vilt.layernorm(states))

    def pooled_texts(self, states: Tensor) -> Tensor:
        """Pool states (B,L,d) to (B,d), over all positions."""
        return self.textpooler_be(self.vilt.layernorm(states))

    def image_codes(self, states: Tensor) -> Tensor:
        """Return continuous codes (B,bits) in (-1,1) of states (B,1+N,d)."""
        return self.image_module(self.pooled_images(states))

    def text_codes(self, states: Tensor) -> Tensor:
        """Return continuous codes (B,bits) in (-1,1) of states (B,L,d)."""
        return self.text_module(self.pooled_texts(states))

    @staticmethod
    def binary(h: Tensor) -> Tensor:
        """Return the signs of continuous codes as bool, True for plus.

        A zero has no sign and counts as plus.
        """
        return h >= 0

    def embed_images(self, vision: Tensor) -> Tensor:
        """Embed the feature `vision` as unit rows (B,bits)."""
        return F.normalize(self.image_codes(self.image_states(vision)), dim=1)

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """Embed the feature `text` with its mask as unit rows (B,bits)."""
        return F.normalize(self.text_codes(self.text_states(text, mask)), dim=1)

    # Single stream: the upper layers read both together.
    def join(
        self,
        image_states: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        image_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Join P pairs of states, (P,1+N,d) and (P,L,d), with masks (P,L) and (P,1+N).

        Returns (P,L+1+N,d) and its mask, the text first.
        """
        if image_mask is None:
            image_mask = text_mask.new_ones(image_states.shape[:2])
        states = torch.cat([text_states, image_states], dim=1)
        return states, torch.cat([text_mask, image_mask], dim=1)

    def fuse_pairs(
        self,
        image_states: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Pass P pairs of states through the upper layers.

        Returns ViLT's pooled first word (P,d). The arguments are those of `join`. The last layer
        computes no other output, as nothing reads one.
        """
        x, mask = self.join(image_states, text_states, text_mask, image_mask)
        *layers, last = self.vilt.encoder.layer[self.config.split :]
        x = vilt.first_through(last, vilt.through(layers, x, mask), mask)
        return self.vilt.pooler(self.vilt.layernorm(x))

    def score_pairs(
        self,
        image_states: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Score P pairs of states, as in `join`; (P,), a larger score is a better match."""
        fused = self.fuse_pairs(image_states, text_states, text_mask, image_mask)
        return self.rank_output(fused).squeeze(1)

    # Training
    def set_captions(self, captions: Captions, seed: int = 0) -> CFITR:
        """Give the model what it trains with: captions for false texts, and a bank of random codes.

        The bank has one code for each caption. It is a buffer of the state dict, since a resumed
        training needs it. A model that is only read has none.
        """
        self.captions = captions
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(captions), self.config.bits, generator=generator)
        self.bank = _signs(noise).to(self.rank_output.weight.device)
        return self

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss and its terms: triplet, quantisation and balance (not weighted), rerank.

        The batch holds pixels and ids, or cached features, with mask and row (B,), the row of each
        caption among those of `set_captions`. In training the codes of the batch go into the bank
        afterwards (`update_bank`). Batch statistics, negatives and sums are over the pairs of all
        processes: the inputs of the hash heads are gathered before the heads. UserError without
        captions, and for a single pair in training.
        """
        row = batch["row"]
        false = self._false_texts(row)
        image = self.image_states(self._vision(batch))
        mask = torch.cat([batch["mask"], false["mask"]])
        text = self.text_states(torch.cat([self._text(batch), self._text(false)]), mask)
        pooled_images = gather(self.pooled_images(image).float())
        pooled_texts = gather(self.pooled_texts(text[: len(row)]).float())
        if self.training and len(pooled_images) < 2:
            raise UserError(
                "A single pair has no batch statistics and no negative; train CFITR on batches of"
                " two or more."
            )
        h_image = self.image_module(pooled_images).float()
        h_text = self.text_module(pooled_texts).float()
        scores = gather(self._score_choices(image, text, mask).float())
        row = gather(row)
        with torch.autocast(row.device.type, enabled=False):  # 16-bit sums would be too coarse
            matches, targets = self._matches(row), self.bank[row].float()
            losses = self._losses(h_image, h_text, matches, targets, scores)
        if self.training:
            self.update_bank(row, h_image, h_text)
        return losses

    @torch.no_grad()
    def update_bank(self, row: Tensor, h_image: Tensor, h_text: Tensor) -> None:
        """Write the next codes of the captions `row` (B,) into the bank.

        The intended next code is that of the mean of h_image and h_text; the released code writes
        zeros. The release does so at the end of an epoch. An epoch has each row once, so writing
        now changes no target of this epoch.
        """
        if self.config.bank == "intended":
            self.bank[row] = _signs(h_image + h_text)
        else:
            self.bank[row] = 0

    def _false_texts(self, row: Tensor) -> dict[str, Tensor]:
        captions = self._given_captions()
        also_true = self.config.false_from == "all"
        rows = torch.from_numpy(on_host(row))
        tokens = captions.texts(captions.draw(rows, self.config.false_texts, also_true).flatten())
        return {name: value.to(row.device, non_blocking=True) for name, value in tokens.items()}

    def _given_captions(self) -> Captions:
        if self.captions is None:
            raise UserError(
                "This CFITR has no captions to draw false texts from; call set_captions before"
                " training."
            )
        return self.captions

    def _vision(self, batch: dict[str, Tensor]) -> Tensor:
        if "pixels" in batch:
            return self.image_features(batch["pixels"])["vision"]
        return batch["vision"]

    def _text(self, batch: dict[str, Tensor]) -> Tensor:
        if "ids" in batch:
            return self.text_features(batch["ids"], batch["mask"])["text"]
        return batch["text"]

    def _score_choices(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Score the texts of each image, its own first; (B,1+F).

        image       (B,1+N,d)
        text, mask  of the B captions, then of the F false texts of each image
        """
        count = len(image)
        texts, masks = (
            torch.cat([x[:count, None], x[count:].unflatten(0, (count, -1))], dim=1)
            for x in (text, mask)
        )
        images = image.unsqueeze(1).expand(-1, texts.shape[1], -1, -1)
        scores = self.score_pairs(images.flatten(0, 1), texts.flatten(0, 1), masks.flatten(0, 1))
        return scores.unflatten(0, (count, -1))

    def _matches(self, row: Tensor) -> Tensor:
        """Tell which images and texts are no negatives of each other; (B,B) bool."""
        if self.config.negatives_from == "all":
            return torch.eye(len(row), dtype=torch.bool, device=row.device)
        rows = torch.from_numpy(on_host(row))
        described = self._given_captions().describe(rows, rows.expand(len(rows), -1))
        return described.to(row.device, non_blocking=True)

    def _losses(
        self, h_image: Tensor, h_text: Tensor, matches: Tensor, targets: Tensor, scores: Tensor
    ) -> dict[str, Tensor]:
        c = self.config
        triplet = triplet_loss(h_image, h_text, matches, c.margin)
        quantisation = quantisation_loss(h_image, h_text, targets)
        balance = balance_loss(h_image, h_text, c.balance)
        rerank = rerank_loss(scores)
        return {
            "loss": triplet + c.beta * quantisation + c.gamma * balance + rerank,
            "triplet": triplet,
            "quantisation": quantisation,
            "balance": balance,
            "rerank": rerank,
        }

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Group the parameters as released: no decay on LayerNorms and biases."""
        names = re.compile("bias|layernorm|LayerNorm")
        return decay_groups(
            self.named_parameters(), weight_decay, lambda name, p: bool(names.search(name))
        )


def _signs(h: Tensor) -> Tensor:
    return CFITR.binary(h).to(torch.int8) * 2 - 1


class Captions:
    """The training captions, from which each step draws false texts by torch's CPU generator.

    owner   (M,) the image of each caption
    string  (M,) which of T distinct texts it reads
    tokens  of the T distinct texts: ids (T,L) or, of a frozen tower, text (T,L,C), with mask (T,L);
            stays on the CPU
    UserError if an image has no false text, since all texts are among its captions.
    """

    def __init__(self, owner: np.ndarray, string: np.ndarray, tokens: dict[str, np.ndarray]):
        self.owner, self.string = torch.as_tensor(owner), torch.as_tensor(string)
        self.tokens = tokens
        self.distinct = len(tokens["mask"])
        # all (image, text) that belong together
        self.described = torch.unique(self.owner * self.distinct + self.string)
        if (self.described // self.distinct).bincount().max() == self.distinct:
            raise UserError(
                "An image has all texts among its captions, which leaves no false one; take more"
                " images or captions."
            )

    @classmethod
    def of(cls, task: Any) -> Captions:
        """Return the training captions of a `RetrievalTask`, as ids or as tower features."""
        table = task.table("train")
        texts, string = distinct_captions(table, task.tokenizer.clean)
        if task.towers is not None:
            return cls(table.owner(), string, task.features("train")[1].arrays)
        ids, mask = task.tokenizer(texts)
        return cls(table.owner(), string, {"ids": ids.numpy(), "mask": mask.numpy()})

    def __len__(self) -> int:
        return len(self.owner)

    def draw(self, row: Tensor, count: int, also_true: bool = False) -> Tensor:
        """Draw texts for the captions `row` (B,), uniformly and with replacement; (B,count) rows.

        The texts are those that no caption of the same image reads like. `also_true` draws from
        all, as released.
        """
        drawn = torch.randint(len(self), (len(row), count))
        while not also_true and (true := self.describe(row, drawn)).any():
            drawn[true] = torch.randint(len(self), (int(true.sum()),))
        return drawn

    def describe(self, row: Tensor, drawn: Tensor) -> Tensor:
        """Tell whether the image of `row` has the drawn text among its captions; (B,count) bool."""
        return torch.isin(
            self.owner[row].unsqueeze(1) * self.distinct + self.string[drawn], self.described
        )

    def texts(self, row: Tensor) -> dict[str, Tensor]:
        """Return the tokens of these captions (n,), floats as float32."""
        wanted = self.string[row].numpy()
        found = {
            name: torch.from_numpy(np.asarray(array[wanted])) for name, array in self.tokens.items()
        }
        return {
            name: value.float() if value.is_floating_point() else value
            for name, value in found.items()
        }


def without_repeats(table: CaptionTable) -> CaptionTable:
    """Keep each text once per image, in the files' order, as the release trains and tests."""
    return replace(table, captions=table.captions.drop_duplicates())


# Losses: h_image and h_text are continuous codes (B,bits) of pairs.
def cosine(h_image: Tensor, h_text: Tensor) -> Tensor:
    """Return the cosines (B,M) of (B,bits) and (M,bits), with the release's epsilon."""
    norms = h_image.norm(dim=1).unsqueeze(1) * h_text.norm(dim=1)
    return h_image @ h_text.t() / (norms + 1e-8)


def triplet_loss(
    h_image: Tensor, h_text: Tensor, matches: Tensor, margin: float, hardest: bool = True
) -> Tensor:
    """Compute a hinge over the hardest in-batch negative of each query, or over all pairs.

    It is averaged, and the two directions are added.
    matches  (B,B) bool, images by texts: what is no negative, the pairs themselves among it
    """
    scores = cosine(h_image, h_text)
    own = scores.diagonal()
    texts = (margin + scores - own[:, None]).clamp(min=0).masked_fill(matches, 0)
    images = (margin + scores - own[None, :]).clamp(min=0).masked_fill(matches, 0)
    return texts.amax(1).mean() + images.amax(0).mean() if hardest else texts.mean() + images.mean()


def quantisation_loss(h_image: Tensor, h_text: Tensor, targets: Tensor) -> Tensor:
    """Sum the squared distances of both codes from the bank's."""
    return (targets - h_image).square().sum() + (targets - h_text).square().sum()


def balance_loss(h_image: Tensor, h_text: Tensor, over: str = "sample") -> Tensor:
    """Sum the squared sums over the bits of each sample, or over the samples of each "bit"."""
    axis = 1 if over == "sample" else 0
    return h_image.sum(axis).square().sum() + h_text.sum(axis).square().sum()


def rerank_loss(scores: Tensor) -> Tensor:
    """Compute the cross-entropy of the own text, column 0 of (B,1+F), among the false ones."""
    return F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long))


# Files
STARTS = ("image_module.",)  # of names, once no prefix stands before them
DEAD = "transformer.SE_blocks."  # blocks in the authors' files that nothing calls


def load_release(model: CFITR, state: dict[str, Tensor]) -> list[str]:
    """Fill `model` from the authors' state dict, and return the keys left out.

    Those are dead keys and, without LFEM, the keys of LFEM. UserError lists every other key without
    a place, and nothing is loaded.
    """
    state = checkpoints.bare(state, *STARTS)
    unused = (DEAD,) if model.config.lfem else (DEAD, "res.")
    dropped = [name for name in state if vilt_names.DEAD.match(name) or name.startswith(unused)]
    kept = {name: value for name, value in state.items() if name not in dropped}
    checkpoints.load_into(model, vilt_names.from_authors(kept), allow_missing=("bank",))
    return dropped


def config_of_release(state: dict[str, Tensor], settings: dict) -> CFITRConfig:
    """Return the configuration of a released checkpoint.

    A note of ours may hold it. Other files hold ViLT-B/32 as released, with the sizes of their hash
    heads. UserError for a file without CFITR.
    """
    if "image_module.3.weight" not in state or "textpooler_be.dense.weight" not in state:
        raise UserError(
            "This file holds no CFITR: image_module and textpooler_be are missing; give a"
            " checkpoint of CFITR."
        )
    if "nbhelpers" in settings:
        return foreign_configs.config_of(CFITRConfig, "CFITR", settings["nbhelpers"])
    bits, hidden = state["image_module.3.weight"].shape
    return CFITRConfig.paper(bits=bits, hidden=hidden).released()


def read(path: Path | str) -> tuple[CFITR, dict]:
    """Read a CFITR, in eval mode and without bank, and its metadata.

    The file is our checkpoint or the authors'. The metadata of the authors' files lists the keys
    that were `dropped`. UserError for a file of another model, with the keys that do not fit.
    """
    state, rest = checkpoints.read_checkpoint(path, *STARTS)
    if "meta" not in rest:
        settings = checkpoints.settings_in(rest, "hyper_parameters")
        model = foreign_configs.built(CFITR, config_of_release(state, settings), state)
        dropped = load_release(model, state)
        return model.eval(), {
            "system": "cfitr",
            "release": True,
            "config": settings,
            "dropped": dropped,
        }
    meta = checkpoints.meta_of(rest, path, {"system": "cfitr"})
    config = foreign_configs.config_of(CFITRConfig, "CFITR", meta.get("model"))
    model = foreign_configs.built(CFITR, config, state)
    checkpoints.load_into(model, state, allow_unexpected=("bank",))
    return model.eval(), meta
