"""The commands of `weights`: exchange checkpoints with the hub, make one small, export a CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbhelpers.errors import UserError
from nbhelpers.runs.options import RunProfile, RunSeed, check_paths, group

app = group("Upload or download a checkpoint, make one small, or export a CLIP.")
Trained = Annotated[str, typer.Argument(help="A model.safetensors of this project, or its folder.")]


@app.command()
def push(
    checkpoint: Trained,
    repository: Annotated[str, typer.Argument(help="owner/name; made if it does not exist.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public, not private.")
    ] = False,
) -> None:
    """Upload a checkpoint of this project with a model card."""
    check_paths(checkpoint=checkpoint)
    from nbhelpers.systems import hub

    print(f"The checkpoint is at {hub.push(checkpoint, repository, public)}.")


@app.command()
def pull(
    repository: Annotated[str, typer.Argument(help="owner/name.")],
    out: Annotated[str, typer.Option(help="Folder for model.safetensors.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; by default the newest.")
    ] = None,
) -> None:
    """Download a checkpoint that `push` uploaded."""
    from nbhelpers.systems import hub

    print(f"The checkpoint is {hub.pull(repository, out, revision)}.")


@app.command()
def heads(
    checkpoint: Trained,
    out: Annotated[str, typer.Option(help="The new file, .safetensors.")],
    half: Annotated[
        bool, typer.Option("--half", help="Numbers of 16 bits: half the size.")
    ] = False,
) -> None:
    """Write a compact PIR without the towers that packages bring."""
    check_paths(checkpoint=checkpoint)
    from nbhelpers.papers import pir
    from nbhelpers.towers import checkpoints

    model, about = pir.read(checkpoints.weight_file(Path(checkpoint).expanduser()))
    path = pir.write_heads(model, about, out, half)
    size = path.stat().st_size / 1e6
    print(f"{path} holds what was trained, {size:.2f} MB; its towers come with their packages.")


@app.command()
def export(
    open_clip: Annotated[
        str | None, typer.Option(help="New folder in the form of open_clip.")
    ] = None,
    hugging_face: Annotated[
        str | None, typer.Option(help="New folder in the form of transformers' CLIPModel.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="A file of 12_starting_weights for pe_rsitr; by default that of the run."
        ),
    ] = None,
    profile: RunProfile = "default",
    seed: RunSeed = None,
) -> None:
    """Write the CLIP that 12_starting_weights trained in a public form."""
    if not (open_clip or hugging_face):
        raise UserError("Nothing is to be written; name a folder by --open-clip or --hugging-face.")
    check_paths(start=start)
    from nbhelpers.paths import runs_root
    from nbhelpers.runs import batch

    seed = batch.profile_seed(profile) if seed is None else seed
    path = Path(start or runs_root() / profile / "starting" / f"pe_rsitr-seed{seed}.json")
    from nbhelpers.systems import clip_files

    for folder in clip_files.export(path, open_clip, hugging_face):
        print(f"The model folder is {folder}; where a model is named, write --model {folder}.")
