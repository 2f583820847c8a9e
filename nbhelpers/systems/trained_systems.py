"""Use a trained system: load a checkpoint, encode images and sentences, write captions.

pir = nbhelpers.load("pir", "model.safetensors")
scores = pir.encode_images(["harbor.png"]) @ pir.encode_texts(["Many boats.", "A bare hill."]).T
bita = systems.trained("runs/default", "bita")
captions = bita.caption(["harbor.png"])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nbhelpers.data import decoding, images
from nbhelpers.data.augment import normalize
from nbhelpers.data.distinct import Once, Rows, distinct, text_keys
from nbhelpers.data.image_input import ImageInput
from nbhelpers.data.tokenization import Tokenizer, caption_batches
from nbhelpers.errors import UserError, of_system
from nbhelpers.files import given
from nbhelpers.systems.trained_files import NAMES as NAMES
from nbhelpers.systems.trained_files import NOTEBOOK_OF as NOTEBOOK_OF
from nbhelpers.systems.trained_files import RETRIEVAL, SYSTEMS, trained_files
from nbhelpers.tasks.retrieval import BATCH, finite
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.towers.starting_weights import Start
from nbhelpers.training.device import resolve

if TYPE_CHECKING:
    pass


ENCODES_NOTHING = f"writes captions and encodes nothing; load one of {', '.join(RETRIEVAL)}"
# towers whose tokenizer was made from the captions of one set
WORDS_OF_THE_SET = ("bert_standin", "vilt_standin")


@dataclass(frozen=True, eq=False)
class System:
    """What `load` returns: name, model in eval mode, inputs, metadata and file.

    The retrieval systems encode, BITA captions; UserError where a system is asked for what it does
    not do.
    """

    name: str
    model: nn.Module
    tokenizer: Any  # Tokenizer, of BITA a DecoderTokenizer
    image: ImageInput
    about: dict
    checkpoint: Path

    @property
    def has_two_stages(self) -> bool:
        """Whether a second stage reads image and text together, as in CFITR."""
        return hasattr(self.model, "score_pairs")

    @torch.inference_mode()
    def encode_images(self, pictures: Iterable[Path | str | np.ndarray]) -> np.ndarray:
        """Files of images, or (H,W,3) uint8 arrays, -> (N,D) float32 unit rows.

        UserError on a file that is no image.
        """
        return self.image_rows(pictures).all()

    @torch.inference_mode()
    def encode_texts(self, texts: Iterable[str]) -> np.ndarray:
        """Sentences -> (M,D) float32 unit rows."""
        return self.text_rows(texts).all()

    @torch.inference_mode()
    def image_rows(self, pictures: Iterable[Path | str | np.ndarray]) -> Rows:
        """As `encode_images`; equal images pass the model once."""
        self._must_have("encode_images", ENCODES_NOTHING)
        once = Once(picture_digest)
        batches = self.batches(pictures, once)
        vectors = self._joined(self.model.encode_images(pixels) for pixels in batches)
        return Rows(vectors, once.distinct.row)

    @torch.inference_mode()
    def text_rows(self, texts: Iterable[str]) -> Rows:
        """As `encode_texts`; sentences of equal token ids pass the model once."""
        self._must_have("encode_texts", ENCODES_NOTHING)
        texts = list(texts)
        first, row = distinct(text_keys(texts, self.tokenizer))
        cleaned = [self.tokenizer.clean(texts[number]) for number in first]
        vectors = self._joined(
            self.model.encode_texts(ids.to(self.device), mask.to(self.device))
            for ids, mask in caption_batches(cleaned, self.tokenizer, BATCH)
        )
        return Rows(vectors, row)

    @torch.inference_mode()
    def caption(
        self,
        pictures: Iterable[Path | str | np.ndarray],
        beams: int = 5,
        longest: int = 21,
        shortest: int = 4,
    ) -> list[str]:
        """Return a caption for each image, by beam search; equal images get equal ones.

        Images are as for `encode_images`.
        beams               sentences that the search keeps at each step
        longest, shortest   byte pairs of a caption
        """
        self._must_have("generate", "retrieves and writes no captions; load bita")
        from nbhelpers.tasks import captioning  # which needs pycocoevalcap

        if min(beams, shortest) < 1 or longest < shortest:
            raise UserError(
                f"beams is {beams}, longest {longest} and shortest {shortest}; all must be at least"
                " 1, and longest at least shortest."
            )
        once, texts = Once(picture_digest), []
        options = {"beams": beams, "longest": longest, "shortest": shortest}
        for pixels in self.batches(pictures, once, captioning.BATCH):
            vision = captioning.vision_of(self.model, pixels)
            texts += captioning.say(self.model, vision, self.tokenizer, **options)
        return [texts[number] for number in once.distinct.row]

    def batches(
        self, pictures: Iterable[Path | str | np.ndarray], once: Once, size: int = 0
    ) -> Iterator[Tensor]:
        """Batches of the pixels that the model is fed; of equal images only the first.

        once  tells afterwards which are equal;  size: images of a batch; 0: BATCH

        UserError if there is no image, or a file is none.
        """
        size = size or BATCH
        resized = once(images.resize(_pixels(picture), self.image.size) for picture in pictures)
        some = list(islice(resized, size))
        _must_be_something(some)
        while some:
            yield self._normalized(some)
            some = list(islice(resized, size))

    def pixels(self, pictures: Iterable[Path | str | np.ndarray]) -> Tensor:
        """Return normalised pixels (B,3,S,S) of images, on the model's device.

        Images are as for `encode_images`.
        """
        resized = [images.resize(_pixels(picture), self.image.size) for picture in pictures]
        _must_be_something(resized)
        return self._normalized(resized)

    def _normalized(self, resized: list[np.ndarray]) -> Tensor:
        return normalize(np.stack(resized), self.image.mean, self.image.std).to(self.device)

    def words(self, sentence: str) -> tuple[Tensor, Tensor]:
        """A sentence -> token ids and mask (1,L) on the model's device."""
        ids, mask = self.tokenizer([self.tokenizer.clean(sentence)])
        return ids.to(self.device), mask.to(self.device)

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return next(self.model.parameters()).device

    def _must_have(self, method: str, what: str) -> None:
        if not hasattr(self.model, method):
            raise UserError(f"{self.name} {what}.")

    def _joined(self, parts: Iterable[Tensor]) -> np.ndarray:
        """Batches of vectors as one float32 array.

        UserError if there is none, and on NaN or infinity.
        """
        found = [part.float().cpu() for part in parts]
        _must_be_something(found)
        return finite(
            torch.cat(found), f"The embeddings by {self.name} of {self.checkpoint}"
        ).numpy()


def _must_be_something(found: list) -> None:
    if not found:
        raise UserError("There is nothing to encode; give at least one.")


def picture_digest(pixels: np.ndarray) -> str:
    """Return a checksum of an image (H,W,3) uint8."""
    return images.checksum(str(pixels.shape).encode(), pixels)


def _pixels(picture: Path | str | np.ndarray) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    try:
        return decoding.decode(given(picture).read_bytes(), str(picture))
    except OSError as error:
        raise of_system(error, picture) from error


def load(
    system: str,
    checkpoint: Path | str,
    start: Path | str | None = None,
    device: str | torch.device = "auto",
) -> System:
    """A trained system from our checkpoint or the authors', in eval mode.

    start   the file in which 12_starting_weights, for BITA 24_bita, noted what the checkpoint
            started from; needed for its tokenizer on stand-in towers, for the CLIP below an
            adapter, and for what BITA keeps frozen. Left away, it is looked for in `starting/` of
            the checkpoint's run
    device  auto (that of the run; without one a GPU, where there is one), cpu, cuda or mps, or a
            torch.device
    UserError on an unknown system, a file of another one, and a tokenizer or CLIP that cannot be
    found.
    """
    if system not in SYSTEMS:
        raise UserError(f"There is no system '{system}'; choose one of {', '.join(SYSTEMS)}.")
    place = resolve(device)
    path = checkpoints.weight_file(Path(checkpoint).expanduser())
    if system == "bita":
        return _load_captioner(path, Start.read(start or _start_of(system, path)), place)
    read = import_module(f"nbhelpers.papers.{system}").read
    if system == "pe_rsitr":  # its checkpoints of ours hold the adapter alone
        read = partial(
            read, fill=lambda model: Start.read(start or _start_of(system, path)).fill(model)
        )
    model, about = read(path)
    tokenizer, image = _fed(system, model.config, about, path, start)
    return System(system, model.to(place).eval(), tokenizer, image, about, path)


def _load_captioner(path: Path, start: Start, place: torch.device) -> System:
    """BITA after stage 2 or fine-tuning; a prompt is known only to the latter.

    UserError for stage 1, which says nothing.
    """
    from nbhelpers.papers import bita
    from nbhelpers.tasks import caption_stages, caption_tokens, captioning

    model, about = bita.read(path, partial(caption_stages.fill_frozen, start))
    if isinstance(model, bita.Aligner):
        raise UserError(
            f"{path} is stage 1 of BITA, which aligns and writes nothing; give that of stage 2 or"
            " fine-tuning."
        )
    config, words = model.config, caption_tokens.decoder_tokenizer(start, model.config)
    if about.get("stage") != "stage2":
        words = words.prompted(config.prompt, config.prompt_space)
    return System("bita", model.to(place), words, captioning.image_input(config.image), about, path)


def trained(
    folder: Path | str, system: str, seed: int = 0, device: str | torch.device = "auto"
) -> System:
    """Return the model that a system's notebook trained in the run `folder`.

    An example is runs/default.

    UserError if that notebook has not run there, trained nothing (it was given a CHECKPOINT), or
    its file is gone.
    """
    checkpoint, start = trained_files(folder, system, seed)
    return load(system, checkpoint, start, device)


def _fed(
    system: str, config, about: dict, checkpoint: Path, start: Path | str | None
) -> tuple[Tokenizer, ImageInput]:
    """The tokenizer and the image input of a model with this configuration."""
    if hasattr(config, "clip"):
        name, image = config.clip, backbones.clip_size(config.clip).image
    elif hasattr(config, "vilt"):
        name, image = config.vilt, backbones.vilt_size(config.vilt).image
    else:
        name, image = config.text, backbones.image_input(config.vision)
    if name not in WORDS_OF_THE_SET:
        return Start.for_checkpoint(name, Path()).read_tokenizer(), image
    start = start or _start_of(system, checkpoint, about.get("tokenizer"))
    tokenizer = Start.for_checkpoint(name, start).read_tokenizer()
    if about.get("tokenizer", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(
            f"{checkpoint} was trained with another tokenizer than that of {start}; name the start"
            " of its own run."
        )
    return tokenizer, image


def _start_of(system: str, checkpoint: Path, tokenizer: str | None = None) -> Path:
    """Return the note of what a checkpoint's run started from.

    It is <run>/starting/<system>-seed*.json for <run>/checkpoints/<name>/model.safetensors, the one
    with the tokenizer of that sha256. UserError if there is none, and without a sha256 if there are
    several.
    """
    folder = run_of(checkpoint) / "starting"
    found = [
        path
        for path in sorted(folder.glob(f"{system}-seed*.json"))
        if tokenizer in (None, Start.read(path).read_tokenizer().sha256)
    ]
    if not found or (tokenizer is None and len(found) > 1):
        raise UserError(
            f"{checkpoint} does not hold all that it needs, and {folder} has {len(found)} starts"
            " that may be its own; name the file that 12_starting_weights wrote for it,"
            f" {system}-seed0.json or the like."
        )
    return found[0]


def run_of(checkpoint: Path) -> Path:
    """The run of a checkpoint <run>/checkpoints/<name>/model.safetensors."""
    return checkpoint.resolve().parent.parent.parent
