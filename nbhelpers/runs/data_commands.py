"""The commands of `data`: get a set, check it, decode it, write it as shards, audit it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nbhelpers.errors import UserError, printable
from nbhelpers.runs.audit_command import audit
from nbhelpers.runs.options import (
    AsJson,
    Captions,
    Images,
    SeveralValues,
    Split,
    check_paths,
    group,
    in_runs,
    print_json,
)

app = group("Get a data set, check it, decode it, write it as shards, or audit it for leaks.")
app.command(cls=SeveralValues)(audit)


@app.command()
def check(
    captions: Captions,
    images: Annotated[
        str | None,
        typer.Option(help="Folder, zip or tar of the images; by default they are not checked."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help=(
                "karpathy, precomp, rows, lavis, nwpu, shards, arrow, hub or csv; recognised by "
                "default."
            )
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another caption file of the set: says which images change their split."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count captions and images, and list what is wrong."""
    check_paths(against=against)
    from nbhelpers.data.check import check as check_data

    report = check_data(captions, images, layout, against)
    if as_json:
        print_json(report.facts | {"problems": report.problems})
    else:
        for line in report.lines:
            print(printable(line))
    for problem in report.problems:
        print(printable(f"problem: {problem}"), file=sys.stderr)
    if report.problems:
        raise typer.Exit(1)
    if not as_json and not report.facts["known_set"]:
        _say_what_fits(captions, layout)


def _say_what_fits(captions: str, layout: str | None) -> None:
    """Print for which notebooks a set is too small with the default parameters, and what helps."""
    from nbhelpers.data import layouts
    from nbhelpers.data.check import too_small
    from nbhelpers.runs import batch

    found = too_small(layouts.read(captions, layout), batch.values_of("default"))
    for sentence in found:
        print(printable(f"{'notebooks':<12}{sentence}"))
    if found:
        print(
            f"{'next':<12}python -m nbhelpers data profile --set NAME --data FOLDER writes a"
            " profile that fits, for NAME.csv and NAME_images in FOLDER"
        )


@app.command()
def profile(
    name: Annotated[str, typer.Option("--set", help="The name of your set, e.g. town.")],
    data: Annotated[str, typer.Option(help="Folder that holds town.csv and town_images.")],
) -> None:
    """Write a profile that fits a set of your own."""
    from nbhelpers.runs import own_profile

    path, values, left = own_profile.write(name, data)
    print(f"Written: {path}")
    for key, value in values.items():
        print(f"  {key}: {value}")
    for sentence in left:
        print(printable(f"note: {sentence}"))
    print(f"Next: make run PROFILE={name} DATA={data}")


@app.command(cls=SeveralValues)
def get(
    name: Annotated[str, typer.Argument(help="Name of the set: rsicd, ucm, ...", metavar="SET")],
    out: Annotated[str, typer.Option(help="Folder of data sets; the set gets a folder in it.")],
    mirror: Annotated[
        str, typer.Option(help="Dataset repository of the hub, OWNER/NAME; some sets have one.")
    ] = "",
    url: Annotated[
        list[str] | None, typer.Option(help="Addresses of files, in the place of a mirror.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="The licences are read and accepted; fetch.")
    ] = False,
) -> None:
    """Show licence and size of a set, fetch it from its host, and check its counts."""
    from nbhelpers.data import catalog, downloads

    found = downloads.offer(name, mirror, tuple(url or ()))
    print("\n".join(printable(line) for line in found.lines()))
    if not yes:
        raise UserError("Nothing was fetched; read the licences, then add --yes.")
    folder = downloads.fetch(name, out, found, mirror, tuple(url or ()))
    print(f"The files are in {folder}.")
    captions, images = catalog.find(name.lower(), out)
    check(captions=str(captions), images=str(images))
    print(f"Next: python -m nbhelpers data prepare --set {name.lower()} --data {out}")


@app.command()
def prepare(
    name: Annotated[
        str,
        typer.Option("--set", help="ucm, rsicd, ... or a name of your own; scenes is generated."),
    ] = "scenes",
    data: Annotated[str, typer.Option(help="Folder that holds the set; none for scenes.")] = "",
) -> None:
    """Decode the images of a set once, into the cache."""
    from nbhelpers.data.catalog import open_dataset

    with in_runs(f"data prepare of {name}"):
        dataset = open_dataset(name, data)
    print("\n".join(dataset.where))
    print(dataset.table.counts().to_string())
    print(f"The decoded images lie in {dataset.pixels.folder}.")


@app.command(cls=SeveralValues)
def shards(
    captions: Captions,
    images: Images,
    out: Annotated[str, typer.Option(help="New folder for the shards.")],
    split: Annotated[
        list[Split] | None, typer.Option(help="One or several; default train.")
    ] = None,
    size: Annotated[int, typer.Option(help="Most captions in a shard.")] = 1000,
) -> None:
    """Write images and captions as WebDataset shards."""
    check_paths(captions=captions, images=images)
    from nbhelpers.data import layouts
    from nbhelpers.data import shards as room
    from nbhelpers.data.archives import open_images

    table, store = layouts.read(captions), open_images(images)
    written = room.write(table, store, out, tuple(split or [Split.train]), size)
    print(f"{sum(written.values())} samples in {len(written)} shards lie in {out}.")
