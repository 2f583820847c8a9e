"""Write the CLIP that a run starts from in public forms."""

from __future__ import annotations

from pathlib import Path

from nbhelpers.errors import UserError
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.towers import clip_exports
from nbhelpers.towers.starting_weights import Start


def export(
    start: Path | str, open_clip: Path | str | None = None, hugging_face: Path | str | None = None
) -> list[Path]:
    """Write the CLIP of a start as model folders, and return them.

    start         the file that 12_starting_weights wrote for pe_rsitr
    open_clip     new folder in the form of open_clip;  hugging_face  in that of transformers
    UserError if the start has no CLIP, the CLIP has no such form, or a folder exists.
    """
    model = starting_clip(start)
    writers = {
        clip_exports.write_open_clip: open_clip,
        clip_exports.write_hugging_face: hugging_face,
    }
    wanted = {write: folder for write, folder in writers.items() if folder}
    for folder in wanted.values():
        clip_exports.new_folder(folder)
    return [write(model.clip, model.config.clip, folder) for write, folder in wanted.items()]


def starting_clip(start: Path | str) -> CLIP:
    """Return the CLIP of a start, in eval mode; UserError if it has none."""
    found = Start.read(start)
    if "clip" not in found.towers:
        raise UserError(f"{start} has no CLIP; name the start of pe_rsitr or pir_clip.")
    model = found.build(lambda: CLIP(CLIPConfig(clip=found.options["clip"])), seed=0)
    return model.eval()
