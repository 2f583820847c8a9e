"""Make pages of the stored notebooks, with their links, listings of code, and kept pictures."""

from __future__ import annotations

import ast
import base64
import json
import re
from pathlib import Path

from book.links import Resolver

PLACEHOLDER = "<IPython.core.display.Image object>"  # alone, where a picture was not stored
LISTING = "\\begin{Verbatim}"  # how IPython.display.Code begins in LaTeX


def page(path: Path, root: Path, resolver: Resolver, figures: Path) -> str:
    """Return a stored notebook as the source of a page.

    figures  folder of the pictures that the repository keeps of this notebook
    """
    notebook = json.loads(path.read_text("utf-8"))
    place = path.relative_to(root).as_posix()
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            cell["source"] = resolver.text("".join(cell["source"]), place)
            if number == 0:
                cell["source"] = numbered(cell["source"], path.stem)
        elif cell["cell_type"] == "code":
            cell["outputs"] = _outputs(cell, figures)
            for output in cell["outputs"]:
                _relink(output, resolver, place)
    return json.dumps(notebook, indent=1, ensure_ascii=False)


def numbered(source: str, stem: str) -> str:
    """Return the first cell with the number of its notebook before the title."""
    return re.sub(r"\A# ", f"# {stem.split('_')[0]} · ", source)


def _relink(output: dict, resolver: Resolver, place: str) -> None:
    data = output.get("data", {})
    if "text/markdown" in data:
        data["text/markdown"] = resolver.text("".join(data["text/markdown"]), place)


def _outputs(cell: dict, figures: Path) -> list[dict]:
    """Return the outputs of a cell: code as code, and pictures where the repository has them."""
    found, missing = [], 0
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "".join(data.get("text/plain", "")) == PLACEHOLDER and len(data) == 1:
            missing += 1
        elif "".join(data.get("text/latex", "")).startswith(LISTING):
            found.append(_markdown(f"```python\n{''.join(data['text/plain'])}\n```"))
        else:
            found.append(output)
    kept = pictures("".join(cell["source"]), figures)[:missing] if missing else []
    found += [_picture(path) for path in kept]
    if missing > len(kept):
        found.append(_markdown(_absent(missing - len(kept), bool(kept))))
    if any("image/png" in output.get("data", {}) for output in found):
        cell["metadata"]["mystnb"] = {"image": {"alt": _names("".join(cell["source"]))}}
    return found


def _names(source: str) -> str:
    """Return what the pictures of a cell are called, for those who cannot see them."""
    names = [_pattern(name).replace("*", " ").replace("_", " ") for name in _shown(source)]
    return ", ".join(" ".join(name.split()) for name in names) or "picture of this cell"


def pictures(source: str, figures: Path) -> list[Path]:
    """Return the kept pictures that the calls of `run.show` in a cell have written."""
    found: dict[Path, None] = {}
    for name in _shown(source):
        found |= dict.fromkeys(sorted(figures.glob(f"{_pattern(name)}.png")))
    return list(found)


def _shown(source: str) -> list[ast.expr]:
    """Return the names that a cell gives its pictures, in the calls of `run.show`."""
    return [
        call.args[1]
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "show"
        and len(call.args) == 2
    ]


def _pattern(name: ast.expr) -> str:
    """Return the pattern of a name that may be an f-string."""
    if isinstance(name, ast.JoinedStr):
        return "".join(_pattern(part) for part in name.values)
    return str(name.value) if isinstance(name, ast.Constant) else "*"


def _picture(path: Path) -> dict:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return {
        "output_type": "display_data",
        "data": {"image/png": encoded, "text/plain": path.stem},
        "metadata": {},
    }


def _absent(count: int, more: bool) -> str:
    pictures = f"{count}{' more' if more else ''} picture{'s' if count > 1 else ''}"
    return f"*{pictures}: not stored in this notebook; run it to see them.*"


def _markdown(text: str) -> dict:
    return {"output_type": "display_data", "data": {"text/markdown": text}, "metadata": {}}
