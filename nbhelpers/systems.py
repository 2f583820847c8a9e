"""A trained system in use: load a checkpoint, encode images and sentences, evaluate on a folder of images and a caption file.

    pir = nbhelpers.load("pir", "model.safetensors")
    scores = pir.encode_images(["harbor.png"]) @ pir.encode_texts(["Many boats.", "A bare hill."]).T
"""
from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from nbhelpers import backbones, recall, records, weights
from nbhelpers.backbones import ImageInput
from nbhelpers.data import audit, images, layouts
from nbhelpers.data.augment import normalize
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.images import DecodedCache, ImageStore
from nbhelpers.data.loading import CLIPTokenizer, Tokenizer, caption_batches
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.recall import Recall
from nbhelpers.retrieval import BATCH, RetrievalTask
from nbhelpers.run import runs_root
from nbhelpers.starting import Start

SYSTEMS = ("pir", "pir_clip", "pe_rsitr", "cfitr")
WORDS_OF_THE_SET = ("bert_standin", "vilt_standin")  # towers whose tokenizer was made from the captions of one set


@dataclass(frozen=True, eq=False)
class System:
    """What `load` gives: name, model (eval mode), what it is fed, what the checkpoint says of itself, and its file."""

    name: str
    model: nn.Module
    tokenizer: Tokenizer
    image: ImageInput
    about: dict
    checkpoint: Path

    @torch.inference_mode()
    def encode_images(self, pictures: Iterable[Path | str | np.ndarray]) -> np.ndarray:
        """Files of images, or (H,W,3) uint8 arrays, -> (N,D) float32 unit rows. UserError on a file that is no image."""
        resized = [images.resize(_pixels(picture), self.image.size) for picture in pictures]
        parts = [normalize(np.stack(resized[start:start + BATCH]), self.image.mean, self.image.std)
                 for start in range(0, len(resized), BATCH)]
        return self._rows(self.model.encode_images(part.to(self.device)) for part in parts)

    @torch.inference_mode()
    def encode_texts(self, texts: Iterable[str]) -> np.ndarray:
        """Sentences -> (M,D) float32 unit rows."""
        batches = caption_batches([self.tokenizer.clean(text) for text in texts], self.tokenizer, BATCH)
        return self._rows(self.model.encode_texts(ids.to(self.device), mask.to(self.device)) for ids, mask in batches)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @staticmethod
    def _rows(parts) -> np.ndarray:
        rows = [part.float().cpu() for part in parts]
        if not rows:
            raise UserError("There is nothing to encode; give at least one.")
        return torch.cat(rows).numpy()


def _pixels(picture: Path | str | np.ndarray) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    try:
        return images.decode(Path(picture).read_bytes(), str(picture))
    except OSError as error:
        raise UserError(f"{picture} cannot be read ({error.strerror}); check the path.") from error


def load(system: str, checkpoint: Path | str, start: Path | str | None = None, device: str = "auto") -> System:
    """A trained system from our checkpoint or the authors', in eval mode.

    start   the file in which 12_starting_weights noted what the checkpoint started from; needed for its tokenizer on stand-in
            towers, and for the CLIP below an adapter. Left away, it is looked for in `starting/` of the checkpoint's run
    device  auto (a GPU where there is one), cpu or cuda
    UserError on an unknown system, a file of another one, and a tokenizer or CLIP that cannot be found.
    """
    if system not in SYSTEMS:
        raise UserError(f"There is no system '{system}'; choose one of {', '.join(SYSTEMS)}.")
    if device not in ("auto", "cpu") and not torch.cuda.is_available():
        raise UserError(f"The device is '{device}', but torch sees no CUDA device; take 'cpu' or 'auto'.")
    path = weights.weight_file(Path(checkpoint).expanduser())
    read = import_module(f"nbhelpers.papers.{system}").read
    if system == "pe_rsitr":  # its checkpoints of ours hold the adapter alone
        read = partial(read, fill=lambda model: Start.read(start or _start_of(system, path)).fill(model))
    model, about = read(path)
    tokenizer, image = _fed(system, model.config, about, path, start)
    place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return System(system, model.to(place).eval(), tokenizer, image, about, path)


def _fed(system: str, config, about: dict, checkpoint: Path, start: Path | str | None) -> tuple[Tokenizer, ImageInput]:
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
        raise UserError(f"{checkpoint} was trained with another tokenizer than that of {start}; name the start of its own run.")
    return tokenizer, image


def _start_of(system: str, checkpoint: Path, tokenizer: str | None = None) -> Path:
    """<run>/starting/<system>-seed*.json of a checkpoint <run>/checkpoints/<name>/model.safetensors: the one with the tokenizer
    of that sha256. UserError if there is none, and without a sha256 if there are several."""
    folder = checkpoint.resolve().parent.parent.parent / "starting"
    found = [path for path in sorted(folder.glob(f"{system}-seed*.json"))
             if tokenizer in (None, Start.read(path).read_tokenizer().sha256)]
    if not found or (tokenizer is None and len(found) > 1):
        raise UserError(f"{checkpoint} does not hold all that it needs, and {folder} has {len(found)} starts that may be its "
                        f"own; name the file that 12_starting_weights wrote for it, {system}-seed0.json or the like.")
    return found[0]


# ---- the retrieval tool ----------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Retrieval:
    """What `retrieve` found of one split.

    table    every image and every caption of it;  notes: what was decided when they were read
    results  tie rule -> {name: Recall}: the system under its own name, and with two stages also its first one alone
    """

    system: System
    table: CaptionTable
    notes: list[str]
    results: Callable[[str], dict[str, Recall]]
    seconds: float

    def recalls(self, ties: str = "expectation") -> pd.DataFrame:
        """Percent; a row for each result, chance and, by expectation, the ceiling of the captions; columns R@K both ways, mR and
        the bounds of its 95 % interval over images."""
        owner, rows = self.table.owner(), {}
        for name, found in self.results(ties).items():
            low, high = recall.bootstrap(found, owner)["mR"]
            rows[name] = found.metrics | {"mR low": low, "mR high": high}
        rows["chance"] = recall.chance(owner)
        if ties == "expectation":
            rows["ceiling"] = audit.ceilings(self.table)
        frame = pd.DataFrame(rows.values(), index=list(rows))
        return frame[[name for name in frame if "median" not in name]]

    def write_record(self, folder: Path | str, ties: str = "expectation") -> Path:
        """Writes a result record and its ranks to `folder`, in the form of the notebooks; returns the record's path."""
        name, model, owner = self.system.name, self.system.model, self.table.owner()
        found = {rule: self.results(rule)[name] for rule in recall.TIES}
        record = records.new(
            model.config, notebook="retrieve", profile="retrieve", set=self.table.name, system=name, variant=name, seed=0,
            data_fingerprint=self.table.fingerprint(), seconds=self.seconds,
            device=f"{self.system.device.type} ({platform.machine()})",
            weights=[{"name": self.system.checkpoint.name, "source": "file", "kind": "file",
                      "sha256": weights.sha256(self.system.checkpoint)}],
            parameters={"all": sum(p.numel() for p in model.parameters()),
                        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)},
            protocol={"split": self.table.images.split.iloc[0], "ties": ties, "selected_on": "unknown"},
            metrics={rule: result.metrics for rule, result in found.items()},
            intervals=recall.bootstrap(found[ties], owner), ceiling=audit.ceilings(self.table), chance=recall.chance(owner))
        return records.write(folder, record, found[ties].arrays() | {"owner": owner})


def retrieve(system: System, captions: Path | str, pictures: Path | str, split: str = "test", cache: Path | None = None,
             workers: int = 1) -> Retrieval:
    """Evaluates a system on a caption file of any layout and a folder or archive of images (PIR-CLIP, spec 6).

    An image that is listed twice counts once, with the captions of both entries; every image and every caption of the split
    is a query and stands in the gallery, however many captions an image has. Decoded images are kept in `cache` (default:
    `cache/` under the run folder). UserError for captions, images or a split that cannot be used.
    """
    began = time.perf_counter()
    reading = layouts.scan(captions, joined=True)
    table, cache = reading.usable().split(split), cache or runs_root() / "cache"
    pixels = DecodedCache.build(ImageStore.open(pictures), list(table.images.file), cache)
    model = system.model
    task = RetrievalTask(DataSet(table, pixels, None, []), system.tokenizer, system.image, workers=workers,
                         towers=model if model.config.freeze_towers else None, cache=cache)
    results = (_two_stages if hasattr(model, "score_pairs") else _one_stage)(system, task, split)
    return Retrieval(system, table, reading.notes, results, time.perf_counter() - began)


def _one_stage(system: System, task: RetrievalTask, split: str) -> Callable[[str], dict[str, Recall]]:
    embeddings = task.embeddings(system.model, split)
    return lambda ties: {system.name: embeddings.recall(ties)}


def _two_stages(system: System, task: RetrievalTask, split: str) -> Callable[[str], dict[str, Recall]]:
    """As CFITR is evaluated (its spec, 6): PPSR over the whole split chooses candidates, the single stream ranks them."""
    from nbhelpers import search  # which needs faiss

    owner, k = task.table(split).owner(), search.K
    with tempfile.TemporaryDirectory(dir=task.cache) as folder:
        pictures, texts = search.write_stores(system.model, task, split, folder)
        coarse = search.post_process(search.negative_hamming(pictures["codes"], texts["codes"]))
        fine = search.fine_scores(system.model, pictures, texts, search.chosen(coarse, k) | search.chosen(coarse.T, k).T)
    return lambda ties: {f"{system.name}, coarse": recall.evaluate(coarse, owner, ties=ties),
                         system.name: search.two_stage(coarse, fine, owner, k, ties=ties)}
