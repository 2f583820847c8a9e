"""Write a CaptionTable in a layout that papers publish; `layouts` describes and reads them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pandas as pd

from nbhelpers.data.rows import UNPRINTABLE
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write


def write(table: CaptionTable, path: Path | str, layout: str) -> None:
    """Write a table in one of the layouts WRITABLE: a file for karpathy, else a folder.

    On an error nothing is written. `read` returns the same table with captions grouped by image, if
    ids are stems (no layout stores ids). Precomp and lavis have no field for the scene class, so
    only classes that are in the file names are kept. UserError for an unknown layout and for images
    without captions, which no reader accepts.
    """
    if layout not in _WRITERS:
        raise UserError(
            f"Cannot write layout '{layout}'; the layouts written are {', '.join(WRITABLE)}."
        )
    table.refuse_bare()
    texts = table.captions.text.str.replace(UNPRINTABLE, " ", regex=True)
    of = texts.groupby(table.captions.image_id, sort=False).agg(list)
    images = table.images.rename(columns={"file": "image"})
    images = images.assign(image_id=range(len(images)), caption=images.image_id.map(of))
    files = _WRITERS[layout](table.name, images)
    path = Path(path)
    with ExitStack() as stack:
        for name, text in files.items():
            target = path / name if name else path
            stack.enter_context(atomic_write(target)).write_text(
                text, encoding="utf-8", newline="\n"
            )


# Each writer below maps (name, images) to {file name: text}; "" means the path itself.
# Columns of the images: image_id (0, 1, ...), image (the file), split, scene, caption (a list).
def _write_karpathy(name: str, images: pd.DataFrame) -> dict[str, str]:
    listed, count = [], 0
    for row in images.itertuples():
        ids = list(range(count, count := count + len(row.caption)))
        sentences = [
            {"raw": text, "tokens": text.split(), "imgid": row.image_id, "sentid": sentid}
            for sentid, text in zip(ids, row.caption, strict=True)
        ]
        listed.append(
            {
                "filename": row.image,
                "imgid": row.image_id,
                "split": row.split,
                "class": row.scene,
                "sentences": sentences,
                "sentids": ids,
            }
        )
    return {"": json.dumps({"images": listed, "dataset": name})}


def _write_precomp(name: str, images: pd.DataFrame) -> dict[str, str]:
    files = {}
    for split, own in images.explode("caption").groupby("split"):
        files[f"{split}_filename.txt"] = "".join(own.image + "\n")
        files[f"{split}_caps.txt"] = "".join(own.caption + "\n")
    return files


def _write_rows(name: str, images: pd.DataFrame) -> dict[str, str]:
    images = images.assign(label_name=images.scene, label=pd.factorize(images.scene)[0])
    files = {}
    for split, own in images.groupby("split"):
        columns = ["image", "caption", "label_name", "label"]
        if split == "train":
            own, columns = own.explode("caption"), ["image_id", *columns]
        files[f"{name}_{split}.json"] = json.dumps(own[columns].to_dict("records"))
    return files


def _write_lavis(name: str, images: pd.DataFrame) -> dict[str, str]:
    files = {}
    for split, own in images.groupby("split"):
        pairs, columns = own.explode("caption"), ["image", "image_id"]
        if split == "train":
            own, columns = pairs, [*columns, "caption"]
        else:
            captions = pairs.assign(id=range(len(pairs)))[["id", "image_id", "caption"]]
            truth = {
                "images": [{"id": image_id} for image_id in own.image_id],
                "annotations": captions.to_dict("records"),
            }
            files[f"{name}_{split}_gt.json"] = json.dumps(truth)
        files[f"{name}_{split}.json"] = json.dumps(own[columns].to_dict("records"))
    return files


_WRITERS = {
    "karpathy": _write_karpathy,
    "precomp": _write_precomp,
    "rows": _write_rows,
    "lavis": _write_lavis,
}
WRITABLE = tuple(_WRITERS)
