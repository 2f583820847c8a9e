"""The command `data audit`: what of a test set stands in the training data of a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nbhelpers.errors import UserError, printable
from nbhelpers.runs.options import (
    AsJson,
    Data,
    Split,
    check_paths,
    in_runs,
    print_json,
    rows_of,
)

if TYPE_CHECKING:
    from nbhelpers.data.table import CaptionTable
    from nbhelpers.metrics.leaks import Leaks, Pictures

SHOWN = 10  # pairs of images that are printed


def audit(  # noqa: PLR0913 - each parameter is an option
    *,
    test: Annotated[
        str, typer.Option(help="Caption file of the test set, or with --data its name.")
    ],
    test_images: Annotated[
        str | None, typer.Option(help="Folder, zip or tar of the images of --test.")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="Caption file of the training data, or with --data the name of a set."),
    ] = None,
    train_images: Annotated[
        str | None,
        typer.Option(help="Images of --train; by default only captions are compared."),
    ] = None,
    train_hashes: Annotated[
        str | None, typer.Option(help="List of hashes in the place of --train-images.")
    ] = None,
    data: Data = "",
    split: Split = Split.test,
    train_split: Annotated[
        list[Split] | None, typer.Option(help="Splits of --train; by default all that it has.")
    ] = None,
    within: Annotated[
        int, typer.Option(help="Bits of 64 in which the hashes of similar images may differ.")
    ] = 6,
    normalise: Annotated[
        Literal["exact", "spaces", "words"],
        typer.Option(help="What is ignored when captions are compared."),
    ] = "spaces",
    record: Annotated[
        str | None, typer.Option(help="Result record: its recalls without the leaked queries.")
    ] = None,
    write_hashes: Annotated[
        str | None, typer.Option(help="File for the hashes of the training images.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find images and captions of a test set that stand in the training data of a model."""
    if not (train or train_hashes):
        raise UserError("No training data is named; give --train, --train-hashes, or both.")
    if train_images and train_hashes:
        raise UserError("Give one of --train-images and --train-hashes.")
    if write_hashes and train_hashes:
        raise UserError("--train-hashes is a list already; leave --write-hashes out.")
    check_paths(
        test_images=test_images,
        train_images=train_images,
        train_hashes=train_hashes,
        record=record,
    )
    from nbhelpers.metrics import leaks

    asked = _side("test", test, test_images, data, [split])
    learnt = _side("train", train, train_images, data, train_split)
    others = leaks.Pictures.read(train_hashes) if train_hashes else learnt.pictures
    if others is not None and asked.pictures is None:
        raise UserError("The images of --test are not named; give --test-images.")
    if asked.table is None:
        raise UserError("The captions of --test are not named; give --test.")
    if write_hashes:
        _write(others, write_hashes)
    found = leaks.find(
        asked.table, asked.pictures, others, learnt.table, within=within, how=normalise
    )
    _report(found, record, as_json)


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two sets: its captions, and its images where they are named."""

    table: CaptionTable | None = None
    pictures: Pictures | None = None


def _side(
    option: str, name: str | None, images: str | None, data: str, splits: Sequence[Split] | None
) -> _Side:
    """Read a set by its caption file, or by its name in the folder `data`."""
    if not name:
        return _Side()
    from nbhelpers.data import catalog, layouts

    captions: Path | str = Path(name).expanduser()
    if not Path(captions).exists():
        if not data:
            raise UserError(
                f"{name} does not exist; give --{option} a caption file, or the name of a set"
                " with --data."
            )
        captions, found = catalog.find(name.lower(), data)
        images = images or str(found)
    whole = layouts.scan(captions, joined=True).usable()
    table = whole.split(*splits) if splits else whole
    return _Side(table, _pictures(table, whole, images) if images else None)


def _pictures(table: CaptionTable, whole: CaptionTable, images: str) -> Pictures:
    from nbhelpers.data.archives import open_images
    from nbhelpers.data.pixel_cache import DecodedCache
    from nbhelpers.metrics.leaks import Pictures
    from nbhelpers.paths import runs_root

    cache = runs_root() / "cache"
    files = list(table.images.file)
    with in_runs("data audit"):
        pixels = DecodedCache.build(open_images(images), files, cache, whole.images.file)
        return Pictures.of(table, pixels)


def _write(pictures: Pictures | None, path: str) -> None:
    if pictures is None:
        raise UserError("There are no training images to hash; give --train-images.")
    print(f"The hashes are in {pictures.write(path)}.", file=sys.stderr)


def _report(found: Leaks, record: str | None, as_json: bool) -> None:
    from nbhelpers.results import records

    recalls = found.recalls(*records.read_recall(record)) if record else None
    counts = found.counts().reset_index(names="what")
    if as_json:
        print_json(
            {
                "images": len(found.table),
                "counts": rows_of(counts),
                "pairs": rows_of(found.pairs),
                "recalls": None
                if recalls is None
                else rows_of(recalls.reset_index(names="queries")),
            }
        )
        return
    print(f"{found.table.name}: {len(found.table)} images, {len(found.captions)} captions")
    print(counts.round(1).to_string(index=False))
    if len(found.pairs):
        print("The nearest pairs; look at them, since hashes may err:")
        print(printable(found.pairs.head(SHOWN).to_string(index=False)))
    if recalls is not None:
        print("Recalls in percent; leaked images and captions stay in the gallery:")
        print(recalls.to_string(float_format="{:.2f}".format))
