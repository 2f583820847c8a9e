"""A trained system in use: load a checkpoint, encode images and sentences or write captions, evaluate on a folder of images.

    pir = nbhelpers.load("pir", "model.safetensors")
    scores = pir.encode_images(["harbor.png"]) @ pir.encode_texts(["Many boats.", "A bare hill."]).T
    bita = systems.trained("runs/default", "bita")
    captions = bita.caption(["harbor.png"])
"""
from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from nbhelpers import backbones, recall, records, weights
from nbhelpers.backbones import ImageInput
from nbhelpers.data import audit, images, layouts
from nbhelpers.data.augment import normalize
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.images import DecodedCache, ImageStore
from nbhelpers.data.loading import Tokenizer, caption_batches
from nbhelpers.data.rows import image_ids
from nbhelpers.data.table import CaptionTable
from nbhelpers.device import resolve
from nbhelpers.distinct import Once, Rows, distinct, text_keys
from nbhelpers.errors import UserError
from nbhelpers.recall import Recall
from nbhelpers.retrieval import BATCH, RetrievalTask, finite, result_fields
from nbhelpers.run import runs_root
from nbhelpers.starting import Start

if TYPE_CHECKING:
    from nbhelpers.search import TwoStages
    from nbhelpers.data.array_store import ArrayStore

RETRIEVAL = ("pir", "pir_clip", "pe_rsitr", "cfitr")
SYSTEMS = (*RETRIEVAL, "bita")
NOTEBOOKS = dict(zip(SYSTEMS, ("20_pir", "21_pir_clip", "22_pe_rsitr", "23_cfitr", "24_bita")))
NAMES = dict(zip(SYSTEMS, ("PIR", "PIR-CLIP", "PE-RSITR", "CFITR", "BITA")))  # as records and figures call them
ENCODES_NOTHING = f"writes captions and encodes nothing; load one of {', '.join(RETRIEVAL)}"
WORDS_OF_THE_SET = ("bert_standin", "vilt_standin")  # towers whose tokenizer was made from the captions of one set


@dataclass(frozen=True, eq=False)
class System:
    """What `load` gives: name, model (eval mode), what it is fed, what the checkpoint says of itself, and its file.

    The retrieval systems encode, BITA captions; UserError where a system is asked for what it does not do.
    """

    name: str
    model: nn.Module
    tokenizer: Tokenizer
    image: ImageInput
    about: dict
    checkpoint: Path

    @torch.inference_mode()
    def encode_images(self, pictures: Iterable[Path | str | np.ndarray]) -> np.ndarray:
        """Files of images, or (H,W,3) uint8 arrays, -> (N,D) float32 unit rows. UserError on a file that is no image."""
        return self.image_rows(pictures).all()

    @torch.inference_mode()
    def encode_texts(self, texts: Iterable[str]) -> np.ndarray:
        """Sentences -> (M,D) float32 unit rows."""
        return self.text_rows(texts).all()

    @torch.inference_mode()
    def image_rows(self, pictures: Iterable[Path | str | np.ndarray]) -> Rows:
        """As `encode_images`; equal images pass the model once."""
        self._must_have("encode_images", ENCODES_NOTHING)
        once = Once(_digest)
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
        vectors = self._joined(self.model.encode_texts(ids.to(self.device), mask.to(self.device))
                               for ids, mask in caption_batches(cleaned, self.tokenizer, BATCH))
        return Rows(vectors, row)

    @torch.inference_mode()
    def caption(self, pictures: Iterable[Path | str | np.ndarray], beams: int = 5, longest: int = 21,
                shortest: int = 4) -> list[str]:
        """Images as for `encode_images` -> one caption each, by beam search; equal images get equal
        captions.

        beams               sentences that the search keeps at each step
        longest, shortest   byte pairs of a caption
        """
        self._must_have("generate", "retrieves and writes no captions; load bita")
        from nbhelpers import caption_task  # which needs pycocoevalcap

        if min(beams, shortest) < 1 or longest < shortest:
            raise UserError(f"beams is {beams}, longest {longest} and shortest {shortest}; all must be at least 1, and longest at "
                            "least shortest.")
        once, texts = Once(_digest), []
        options = {"beams": beams, "longest": longest, "shortest": shortest}
        for pixels in self.batches(pictures, once, caption_task.BATCH):
            vision = caption_task.vision_of(self.model, pixels)
            texts += caption_task.say(self.model, vision, self.tokenizer, **options)
        return [texts[number] for number in once.distinct.row]

    def batches(self, pictures: Iterable[Path | str | np.ndarray], once: Once,
                size: int = 0) -> Iterator[Tensor]:
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
        """Images as for `encode_images` -> normalised pixels (B,3,S,S) on the model's device, as the model is fed."""
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
        return next(self.model.parameters()).device

    def _must_have(self, method: str, what: str) -> None:
        if not hasattr(self.model, method):
            raise UserError(f"{self.name} {what}.")

    def _joined(self, parts: Iterable[Tensor]) -> np.ndarray:
        """Batches of vectors as one float32 array. UserError if there is none, and on NaN or infinity."""
        found = [part.float().cpu() for part in parts]
        _must_be_something(found)
        return finite(torch.cat(found), f"The embeddings by {self.name} of {self.checkpoint}").numpy()


def _must_be_something(found: list) -> None:
    if not found:
        raise UserError("There is nothing to encode; give at least one.")


def _digest(pixels: np.ndarray) -> str:
    return images.checksum(str(pixels.shape).encode(), pixels)


def _pixels(picture: Path | str | np.ndarray) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    try:
        return images.decode(Path(picture).read_bytes(), str(picture))
    except OSError as error:
        raise UserError(f"{picture} cannot be read ({error.strerror}); check the path.") from error


def load(system: str, checkpoint: Path | str, start: Path | str | None = None,
         device: str | torch.device = "auto") -> System:
    """A trained system from our checkpoint or the authors', in eval mode.

    start   the file in which 12_starting_weights, for BITA 24_bita, noted what the checkpoint started from; needed for its
            tokenizer on stand-in towers, for the CLIP below an adapter, and for what BITA keeps frozen. Left away, it is looked
            for in `starting/` of the checkpoint's run
    device  auto (that of the run; without one a GPU, where there is one), cpu, cuda or mps, or a torch.device
    UserError on an unknown system, a file of another one, and a tokenizer or CLIP that cannot be found.
    """
    if system not in SYSTEMS:
        raise UserError(f"There is no system '{system}'; choose one of {', '.join(SYSTEMS)}.")
    place = resolve(device)
    path = weights.weight_file(Path(checkpoint).expanduser())
    if system == "bita":
        return _load_captioner(path, Start.read(start or _start_of(system, path)), place)
    read = import_module(f"nbhelpers.papers.{system}").read
    if system == "pe_rsitr":  # its checkpoints of ours hold the adapter alone
        read = partial(read, fill=lambda model: Start.read(start or _start_of(system, path)).fill(model))
    model, about = read(path)
    tokenizer, image = _fed(system, model.config, about, path, start)
    return System(system, model.to(place).eval(), tokenizer, image, about, path)


def _load_captioner(path: Path, start: Start, place: torch.device) -> System:
    """BITA after stage 2 or fine-tuning; a prompt is known only to the latter. UserError for stage 1, which says nothing."""
    from nbhelpers import caption_task  # which needs pycocoevalcap
    from nbhelpers.papers import bita

    model, about = bita.read(path, partial(caption_task.fill_frozen, start))
    if isinstance(model, bita.Aligner):
        raise UserError(f"{path} is stage 1 of BITA, which aligns and writes nothing; give that of stage 2 or fine-tuning.")
    config, words = model.config, caption_task.decoder_tokenizer(start, model.config)
    if about.get("stage") != "stage2":
        words = words.prompted(config.prompt, config.prompt_space)
    return System("bita", model.to(place), words, caption_task.image_input(config.image), about, path)


def trained(folder: Path | str, system: str, seed: int = 0, device: str | torch.device = "auto") -> System:
    """The model that the training notebook of a system trained in the run `folder`, such as runs/default.

    UserError if that notebook has not run there, trained nothing (it was given a CHECKPOINT), or its file is gone.
    """
    if system not in SYSTEMS:
        raise UserError(f"There is no system '{system}'; choose one of {', '.join(SYSTEMS)}.")
    folder, notebook = Path(folder), NOTEBOOKS[system]
    note = folder / ("captions" if system == "bita" else "records") / f"{notebook}-seed{seed}.json"
    try:
        file = json.loads(note.read_text(encoding="utf-8")).get("checkpoint", "")
    except FileNotFoundError:
        raise UserError(f"{folder} has no trained {system} of seed {seed} yet; run {notebook} first.") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{note} cannot be read ({error}); run {notebook} again.") from error
    if not file or not (folder / file).is_file():
        raise UserError(f"{note} names no checkpoint that is there{file and f' ({file})'}; run {notebook} again, without CHECKPOINT.")
    return load(system, folder / file, folder / "starting" / f"{system}-seed{seed}.json", device)


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
    folder = _run_of(checkpoint) / "starting"
    found = [path for path in sorted(folder.glob(f"{system}-seed*.json"))
             if tokenizer in (None, Start.read(path).read_tokenizer().sha256)]
    if not found or (tokenizer is None and len(found) > 1):
        raise UserError(f"{checkpoint} does not hold all that it needs, and {folder} has {len(found)} starts that may be its "
                        f"own; name the file that 12_starting_weights wrote for it, {system}-seed0.json or the like.")
    return found[0]


# ---- a folder of images ----------------------------------------------------------------------------------------------
def search(system: System, pictures: Path | str, query: str | Path, top: int = 10) -> pd.DataFrame:
    """The images of a folder, zip or tar that fit a query best: columns file and score, best first.

    query  a sentence, or the Path of an image, to which similar ones are found
    The score is the cosine of the embeddings. CFITR answers a sentence in two stages, as `searched`
    tells, with the score of the second.
    """
    if top < 1:
        raise UserError(f"The search is to show {top} images; ask for at least 1.")
    store = ImageStore.open(pictures)
    if isinstance(query, str) and not system.tokenizer.clean(query).strip():
        raise UserError("The sentence is empty; say what the image shows.")
    if isinstance(query, str) and hasattr(system.model, "score_pairs"):
        order, scores = _read_together(system, store, query, top)
    else:
        asked = system.text_rows([query]) if isinstance(query, str) else system.image_rows([query])
        scores = system.image_rows(store.read(name) for name in store.names).products(asked)[:, 0]
        order = np.argsort(-scores, kind="stable")
        scores = scores[order]
    return pd.DataFrame({"file": np.array(store.names)[order[:top]], "score": scores[:top]})


def searched(system: System, top: int = 10) -> str:
    """How `search` answers a sentence, where that is in two stages; else ""."""
    if not hasattr(system.model, "score_pairs"):
        return ""
    ppsr = "no PPSR"
    if _banks_of_run(system) is not None:
        ppsr = "column means of PPSR from the training queries of its run"
    k = max(two_stages_of(system).k, top)
    return f"{system.name} reads the sentence with {k} candidates, chosen by hash code; {ppsr}."


@torch.inference_mode()
def _read_together(system: System, store: ImageStore, sentence: str,
                   top: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of the candidates among the images of a store, best first.

    They are chosen as in the evaluation: as many as the record of the checkpoint says, or `top`,
    and by PPSR where its run holds training queries. Only the codes of all images are kept; the
    candidates are opened a second time, no more than a batch of them at once.
    """
    from nbhelpers import search as engine  # which needs faiss
    from nbhelpers.data.array_store import ArrayStore, Computed, as_stored

    model, once = system.model, Once(_digest)
    encoded = [engine.encode(model, model.image_features(pixels))["codes"]
               for pixels in system.batches((store.read(name) for name in store.names), once)]
    first, row = once.distinct

    def states_of(rows: np.ndarray) -> np.ndarray:
        pixels = system.pixels(store.read(store.names[number]) for number in rows)
        return as_stored(engine.encode(model, model.image_features(pixels)))["states"]

    codes = np.concatenate(encoded)[row]
    arrays = {"codes": codes, "states": Computed(states_of)}
    gallery = ArrayStore(engine.store_key(model, "images"), arrays, first[row])
    ids, mask = system.words(sentence)
    query = engine.encode(model, model.text_features(ids, mask) | {"mask": mask})
    banks = _banks_of_run(system) or (None, None)
    k = max(two_stages_of(system).k, top)
    found = engine.Search(model, gallery, banks[1], k, batch=BATCH)(query)
    return found.rows[0], found.scores[0]


def caption_folder(system: System, pictures: Path | str, listed: Path | str | None = None, split: str = "test",
                   **options) -> dict[str, str]:
    """Image id -> caption of the images of a folder, zip or tar; options as `System.caption`.

    listed  a file of captions of any layout: only the images of its `split`, by its ids. Without it all, by their file names
    """
    store = ImageStore.open(pictures)
    if listed is None:
        ids, members = image_ids(store.names), store.names
    else:
        whole = layouts.read(listed)
        part = whole.split(split).images
        ids, members = list(part.image_id), store.members(part.file, whole.images.file)
    return dict(zip(ids, system.caption((store.read(member) for member in members), **options)))


# ---- the evaluation ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found of one split.

    table    every image and every caption of it;  notes: what was decided when they were read
    results  tie rule -> {name: Recall}: the system under its own name, and with two stages also its first one alone
    how      its two stages, where it has them
    """

    system: System
    table: CaptionTable
    notes: list[str]
    results: Callable[[str], dict[str, Recall]]
    seconds: float
    how: str = ""

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
        name, file = self.system.name, self.system.checkpoint
        found = {rule: self.results(rule)[name] for rule in recall.TIES}
        start = {"name": file.name, "source": "file", "kind": "file"}
        start["sha256"] = weights.sha256(file)
        record = records.new(
            self.system.model.config, notebook="eval", profile="eval", set=self.table.name,
            system=name, variant=name, seed=0, seconds=self.seconds, weights=[start],
            notes=self.how, device=f"{self.system.device.type} ({platform.machine()})",
            **result_fields(self.system.model, self.table, found, ties, "unknown", 0))
        ranks = found[ties].arrays() | {"owner": self.table.owner()}
        return records.write(folder, record, ranks)


def evaluate(system: System, captions: Path | str, pictures: Path | str, split: str = "test", cache: Path | None = None,
             workers: int = 1, two_stages: TwoStages | None = None) -> Evaluation:
    """Evaluate a system on a caption file of any layout and a folder or archive of images, as its
    notebook does (PIR-CLIP, spec 6).

    An image that is listed twice counts once, with the captions of both entries; every image and every caption of the split
    is a query and stands in the gallery, however many captions an image has. Decoded images are kept in `cache` (default:
    `cache/` under the run folder).
    two_stages  of CFITR; left away, `two_stages_of` the system
    UserError for captions, images or a split that cannot be used.
    """
    system._must_have("encode_images", "writes captions: `caption` writes them and `score` evaluates them")
    began, cache = time.perf_counter(), cache or runs_root() / "cache"
    reading = layouts.scan(captions, joined=True)
    whole = reading.usable()
    task = _task(system, whole, split, pictures, cache, workers)
    how = ""
    if hasattr(system.model, "score_pairs"):
        two_stages, banks = two_stages or two_stages_of(system), None
        if two_stages.ppsr == "online":
            banks = _banks(system, whole, pictures, cache, workers)
        results, how = _two_stages(system, task, split, two_stages, banks), str(two_stages)
    elif two_stages is not None:
        raise UserError(f"{system.name} searches in one stage; leave --k and --ppsr to cfitr.")
    else:
        results = _one_stage(system, task, split)
    seconds = time.perf_counter() - began
    return Evaluation(system, task.table(split), reading.notes, results, seconds, how)


def _task(system: System, whole: CaptionTable, split: str, pictures: Path | str, cache: Path,
          workers: int) -> RetrievalTask:
    """One split of a table; which file of `pictures` an image is depends on all that it lists."""
    table = whole.split(split)
    pixels = DecodedCache.build(ImageStore.open(pictures), list(table.images.file), cache,
                                whole.images.file)
    towers = system.model if system.model.config.freeze_towers else None
    return RetrievalTask(DataSet(table, pixels, None, []), system.tokenizer, system.image,
                         workers=workers, towers=towers, cache=cache)


def _one_stage(system: System, task: RetrievalTask, split: str) -> Callable[[str], dict[str, Recall]]:
    embeddings = task.embeddings(system.model, split)
    return lambda ties: {system.name: embeddings.recall(ties)}


def _two_stages(system: System, task: RetrievalTask, split: str, two_stages: TwoStages,
                banks: tuple[ArrayStore, ArrayStore] | None) -> Callable[[str], dict[str, Recall]]:
    """As CFITR is evaluated (its spec, 6): coarse scores of the whole split choose candidates, the
    single stream ranks them."""
    from nbhelpers import search as engine  # which needs faiss

    k, way = two_stages.k, two_stages.way
    with tempfile.TemporaryDirectory(dir=task.cache) as folder:
        stores = engine.write_stores(system.model, task, split, folder)
        ranking = engine.rank(system.model, stores, task.table(split).owner(), k, banks, [way])

    def results(ties: str) -> dict[str, Recall]:
        found = ranking.results(k, ties)
        return {f"{system.name}, coarse": found[way], system.name: found[f"{way} + fine"]}

    return results


# ---- what a run knows of its search in two stages ------------------------------------------------
def two_stages_of(system: System) -> TwoStages:
    """As the notebook evaluated this checkpoint, by its record; as published where there is
    none."""
    from nbhelpers import search as engine  # which needs faiss

    settings = (_record_of(system) or {}).get("settings", {})
    return engine.TwoStages(settings.get("K", engine.K))


def _run_of(checkpoint: Path) -> Path:
    """The run of a checkpoint <run>/checkpoints/<name>/model.safetensors."""
    return checkpoint.resolve().parent.parent.parent


def _record_of(system: System) -> records.Record | None:
    """The record, beside a checkpoint, that names it."""
    run = _run_of(system.checkpoint)
    for path in sorted((run / "records").glob(f"{NOTEBOOKS[system.name]}-seed*.json")):
        record = records.read_one(path)
        if (run / record.get("checkpoint", "")).resolve() == system.checkpoint.resolve():
            return record
    return None


def _banks_of_run(system: System) -> tuple[ArrayStore, ArrayStore] | None:
    """Codes of the training images and texts that the notebook stored in the run of this
    checkpoint."""
    from nbhelpers import search as engine  # which needs faiss
    from nbhelpers.data.array_store import ArrayStore

    folder = engine.store_folder(_run_of(system.checkpoint), system.model) / "train"
    if not folder.is_dir() or _record_of(system) is None:
        return None
    images, texts = (ArrayStore.open(folder / kind, engine.store_key(system.model, kind))
                     for kind in ("images", "texts"))
    return images, texts


def _banks(system: System, whole: CaptionTable, pictures: Path | str, cache: Path,
           workers: int) -> tuple[ArrayStore, ArrayStore]:
    """Codes of training images and texts: those of the run, else of the training split of the
    captions that are evaluated. UserError if there is neither."""
    from nbhelpers import search as engine  # which needs faiss
    from nbhelpers.data.array_store import ArrayStore

    if (banks := _banks_of_run(system)) is not None:
        return banks
    if "train" not in set(whole.images.split):
        raise UserError(f"PPSR takes column means from training queries, but {system.checkpoint} lies "
                        "in no run that has them, and the captions have no train split; give --ppsr "
                        "transductive, as released, or --ppsr none.")
    task = _task(system, whole, "train", pictures, cache, workers)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        written = engine.write_stores(system.model, task, "train", folder, states=False)
        images, texts = (ArrayStore(bank.key, {"codes": np.array(bank["codes"])})
                         for bank in written)
    return images, texts
