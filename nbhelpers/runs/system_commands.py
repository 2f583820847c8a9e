"""The commands that use trained systems: eval, search, caption, score."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nbhelpers.errors import UserError
from nbhelpers.runs.options import (
    AsJson,
    Captions,
    Checkpoint,
    Device,
    Images,
    RetrievalSystem,
    RunProfile,
    RunSeed,
    SeveralValues,
    Split,
    Start,
    check_count,
    check_paths,
    group,
    in_runs,
    print_json,
    rows_of,
)

if TYPE_CHECKING:
    from nbhelpers.metrics.caption_scores import CaptionScores
    from nbhelpers.systems.evaluation import Evaluation
    from nbhelpers.systems.image_folder import EmbeddingSearch, FolderSearch

FROM_INPUT = "-"  # in the place of a sentence
app = group("Use trained systems.")


@app.command(name="eval")
def evaluate(  # noqa: PLR0913 - each parameter is an option
    *,
    system: RetrievalSystem,
    captions: Captions,
    images: Images,
    checkpoint: Checkpoint = None,
    start: Start = None,
    profile: RunProfile = "default",
    seed: RunSeed = None,
    device: Device = "auto",
    split: Split = Split.test,
    ties: Annotated[
        Literal["expectation", "released"], typer.Option(help="Rule for equal scores.")
    ] = "expectation",
    k: Annotated[
        int | None,
        typer.Option(help="CFITR: candidates to rerank; by default as its run did, else 70."),
    ] = None,
    ppsr: Annotated[
        Literal["online", "transductive", "none"] | None,
        typer.Option(
            help=(
                "CFITR: which queries give PPSR its column means: those of training (online, "
                "default), or all evaluated ones (transductive, as released)."
            )
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder for a result record; by default none is written.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained retrieval system on a data set."""
    given: dict[str, Any] = {
        name: value for name, value in {"k": k, "ppsr": ppsr}.items() if value is not None
    }
    if given and system != "cfitr":
        raise UserError(f"{system} searches in one stage; leave --k and --ppsr to cfitr.")
    check_paths(captions=captions, images=images)
    weights, beginning = locate(system, checkpoint, start, profile, seed)
    from dataclasses import replace

    from nbhelpers.systems import evaluation, trained_systems

    with in_runs(f"eval of {system}"):
        loaded = trained_systems.load(system, weights, beginning, device)
        stages = replace(evaluation.two_stages_of(loaded), **given) if given else None
        found = evaluation.evaluate(loaded, captions, images, split, two_stages=stages)
    record = found.write_record(out, ties) if out else None
    report = _recall_report(found, split, ties, record)
    if as_json:
        print_json(report | {"recalls": rows_of(found.recalls(ties).reset_index(names="name"))})
    else:
        _print_recalls(
            report, found.recalls(ties).to_string(float_format="{:.2f}".format, na_rep="")
        )


def locate(
    system: str, checkpoint: str | None, start: str | None, profile: str, seed: int | None
) -> tuple[Path | str, Path | str | None]:
    """Return the checkpoint and the starting weights that the options name. Imports no torch."""
    if checkpoint:
        check_paths(checkpoint=checkpoint, start=start)
        return checkpoint, start
    if start:
        raise UserError("--start belongs to a --checkpoint; name that too.")
    from nbhelpers.paths import runs_root
    from nbhelpers.runs import batch
    from nbhelpers.systems.trained_files import trained_files

    seed = batch.profile_seed(profile) if seed is None else seed
    return trained_files(runs_root() / profile, system, seed)


def _recall_report(found: Evaluation, split: str, ties: str, record: Path | None) -> dict[str, Any]:
    return {
        "system": found.system.name,
        "split": split,
        "images": len(found.table),
        "captions": len(found.table.captions),
        "ties": ties,
        "how": found.how,
        "notes": found.notes,
        "record": record and str(record),
    }


def _print_recalls(report: dict[str, Any], table: str) -> None:
    for note in report["notes"]:
        print(note)
    counts = "{split}: {images} images, {captions} captions".format(**report)
    print(f"{counts}; recalls in percent, ties by {report['ties']}")
    if report["how"]:
        print(f"{report['system']}: {report['how']}")
    print(table)
    if report["record"]:
        print(f"The record is {report['record']}.")


@app.command()
def search(  # noqa: PLR0913 - each parameter is an option
    *,
    system: RetrievalSystem,
    images: Annotated[str | None, typer.Option(help="Folder, zip or tar of the images.")] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(help="Embeddings of this system in their place: npy, npz, parquet, ..."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="A sentence that says what is seen; - reads many, one a line, from standard input."
        ),
    ] = None,
    image: Annotated[str | None, typer.Option(help="A file; finds similar images.")] = None,
    checkpoint: Checkpoint = None,
    start: Start = None,
    profile: RunProfile = "default",
    seed: RunSeed = None,
    device: Device = "auto",
    top: Annotated[int, typer.Option(help="How many images to show.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Find the images that fit a sentence or resemble an image."""
    if (text is None) == (image is None):
        raise typer.BadParameter("Give one of --text and --image.")
    if (images is None) == (embeddings is None):
        raise typer.BadParameter("Give one of --images and --embeddings.")
    check_count("top", top)
    check_paths(images=images, embeddings=embeddings, image=image)
    weights, beginning = locate(system, checkpoint, start, profile, seed)
    from nbhelpers.systems import image_folder, trained_systems

    loaded = trained_systems.load(system, weights, beginning, device)
    searcher: FolderSearch | EmbeddingSearch = (
        image_folder.EmbeddingSearch(loaded, embeddings)
        if embeddings
        else image_folder.FolderSearch(loaded, images or "")
    )
    with in_runs("search"):
        if text == FROM_INPUT:
            _answer_lines(searcher, top, as_json)
        else:
            _answer(searcher, text if image is None else Path(image), top, as_json)


def _answer_lines(searcher: FolderSearch | EmbeddingSearch, top: int, as_json: bool) -> None:
    """Answer each line of standard input; a sentence that cannot be asked does not end it.

    UserError at the end if there was one, or no line at all.
    """
    asked = failed = 0
    for line in filter(str.strip, sys.stdin):
        asked += 1
        try:
            _answer(searcher, line.strip(), top, as_json)
        except UserError as error:
            failed += 1
            print(error, file=sys.stderr)
        sys.stdout.flush()
    if not asked:
        raise UserError("Standard input holds no sentence; write one a line.")
    if failed:
        raise UserError(f"{failed} of {asked} sentences got no answer; the lines above say why.")


def _answer(
    searcher: FolderSearch | EmbeddingSearch, query: str | Path | None, top: int, as_json: bool
) -> None:
    from nbhelpers.systems import gallery

    query = query or ""
    notes = gallery.reading(query, searcher.system.tokenizer) if isinstance(query, str) else []
    found = searcher.ask(query, top)
    notes.append(found.attrs["how"])
    if as_json:
        print_json({"query": str(query), "notes": notes, "images": rows_of(found)})
        return
    print("".join(f"{note}\n" for note in notes), end="")
    for place, (file, score) in enumerate(found.itertuples(index=False), 1):
        print(f"{place:3}  {score:8.4f}  {file}")


@app.command()
def caption(  # noqa: PLR0913 - each parameter is an option
    *,
    images: Images,
    system: Annotated[Literal["bita"], typer.Option(help="The captioning system.")] = "bita",
    captions: Annotated[
        str | None,
        typer.Option(help="Caption file of a data set: only the images of its split, by its ids."),
    ] = None,
    checkpoint: Checkpoint = None,
    start: Start = None,
    profile: RunProfile = "default",
    seed: RunSeed = None,
    device: Device = "auto",
    split: Annotated[Split, typer.Option(help="Split of --captions.")] = Split.test,
    beams: Annotated[int, typer.Option(help="Sentences that the search keeps at each step.")] = 5,
    out: Annotated[
        str | None,
        typer.Option(help="File of the captions, for `score`; by default they are printed."),
    ] = None,
) -> None:
    """Write a caption for every image, as JSON."""
    check_count("beams", beams)
    check_paths(images=images, captions=captions)
    weights, beginning = locate(system, checkpoint, start, profile, seed)
    from nbhelpers.files import atomic_write
    from nbhelpers.systems import image_folder, trained_systems

    loaded = trained_systems.load(system, weights, beginning, device)
    found = image_folder.caption_folder(loaded, images, captions, split, beams=beams)
    text = json.dumps({"captions": found}, indent=1, ensure_ascii=False)
    if not out:
        print(text)
        return
    with atomic_write(out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"{len(found)} captions are in {out}.")


@app.command(cls=SeveralValues)
def score(  # noqa: PLR0913 - each parameter is an option
    *,
    captions: Annotated[
        str, typer.Option(help="Generated captions: COCO's results, or a file of `caption`.")
    ],
    references: Annotated[
        str, typer.Option(help="COCO's ground truth, a file of ours, or captions of a data set.")
    ],
    split: Annotated[Split, typer.Option(help="Split of a data set.")] = Split.test,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="Bleu, METEOR, ROUGE_L, CIDEr, SPICE; by default all that are possible."),
    ] = None,
    samples: Annotated[
        int, typer.Option(max=100_000, help="Samples of the bootstrap over images.")
    ] = 2000,
    model: Annotated[
        str | None,
        typer.Option(help="Any model, by name: adds CLIPScore and RefCLIPScore."),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Images of --model: folder, zip or tar.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Sentence of --model around a caption: 'A photo depicts {}'.")
    ] = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score generated captions against references."""
    if bool(model) != bool(images):
        raise UserError("CLIPScore needs both --model and --images; give the other one, too.")
    check_paths(captions=captions, references=references, images=images)
    from nbhelpers.metrics import caption_scores

    notes: list[str] = []
    said = caption_scores.read_captions(captions, notes)
    truth = caption_scores.read_references(references, split, said, notes)
    scores = caption_scores.score_captions(said, truth, metrics or None)
    if model and images:
        from nbhelpers.systems import caption_models
        from nbhelpers.systems.bench_models import Options

        options = Options(images, prompt=prompt, device=device)
        with in_runs("score"):
            scores, found = caption_models.with_clip_scores(
                scores, said, truth, model, options, references
            )
        notes += [*found.notes, f"CLIPScore is that of {model}; other models give other values."]
    report = _score_report(scores, caption_scores.bootstrap(scores, samples))
    report["images"] = len(truth)
    report["references"] = sum(map(len, truth.values()))
    report["notes"] = notes
    report["weightless"] = ""
    if "CIDEr" in scores.corpus:
        report["weightless"] = caption_scores.weightless(truth)
    report["degenerate"] = int(caption_scores.degenerate(said).degenerate.sum())
    if as_json:
        print_json(report)
    else:
        _print_scores(report)


def _score_report(
    scores: CaptionScores, intervals: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    found = {}
    for name, value in scores.corpus.items():
        low, high = intervals[name]
        found[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return {"scores": found, "tokenizer": scores.tokenizer, "skipped": scores.skipped}


def _print_scores(report: dict[str, Any]) -> None:
    for note in report["notes"]:
        print(note)
    print(
        "{images} images, {references} references, tokens by {tokenizer}; in brackets the 95 %"
        " interval over images".format(**report)
    )
    for name, found in report["scores"].items():
        percent, low, high = (100 * found[part] for part in ("value", "low", "high"))
        print(f"{name:8} {found['value']:.4f}   x 100: {percent:6.2f} [{low:.2f}, {high:.2f}]")
    if report["weightless"]:
        print(report["weightless"])
    for name, reason in report["skipped"].items():
        print(f"{name} was not computed: {reason}")
    print(f"{report['degenerate']} captions are empty or repeat themselves.")
