"""The commands of `weights`: exchange checkpoints with the Hugging Face hub, or make one small."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbhelpers.runs.options import check_paths, group

app = group("Upload or download a checkpoint, or make one small.")
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
) -> None:
    """Write a compact PIR without the towers that packages bring."""
    check_paths(checkpoint=checkpoint)
    from nbhelpers.papers import pir
    from nbhelpers.towers import checkpoints

    model, about = pir.read(checkpoints.weight_file(Path(checkpoint).expanduser()))
    path = pir.write_heads(model, about, out)
    size = path.stat().st_size / 1e6
    print(f"{path} holds what was trained, {size:.2f} MB; its towers come with their packages.")
