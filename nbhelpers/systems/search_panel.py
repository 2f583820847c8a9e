"""The interactive search: ipywidgets around a Gallery (gallery.py).

    panel = SearchPanel({"PIR": lambda: Gallery(system, data)})
    display(panel)                       # in JupyterLab, Notebook and Voilà
    panel.ask("a port with two green ships")  # or without hands

A mistake becomes a sentence below the query, never a traceback. Every part keeps its place and
size, whatever is shown.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets
import matplotlib
import numpy as np
from PIL import Image

from nbhelpers.data import decoding
from nbhelpers.errors import UserError
from nbhelpers.figures.style import GREEN
from nbhelpers.systems import region_maps
from nbhelpers.systems.gallery import Gallery, Stage

COLUMNS, ROWS = 4, 3
TILE, LARGE = 148, 292  # pixels of a screen that a picture takes, in the grid and beside it
SHARPNESS = 2  # pixels of a picture for one of these, for screens that have more
STYLE = Path(__file__).with_name("search_panel.css")


class SearchPanel(ipywidgets.VBox):
    """A query, a grid of pictures, and beside it what one of them says.

    galleries  name of a system -> function that gives its Gallery, called when the system is first
               chosen
    write      picture (H,W,3) uint8 -> a caption for it, where there is a model that writes
    method     map that a click shows, as region_maps.Match.map knows it; "" for none
    example    a sentence that the empty box suggests, such as `Gallery.example`
    """

    def __init__(
        self,
        galleries: Mapping[str, Callable[[], Gallery]],
        write: Callable[[np.ndarray], str] | None = None,
        method: str = "relevance",
        example: str = "",
    ):
        self._make, self._write, self._method = dict(galleries), write, method
        self._made: dict[str, Gallery] = {}
        self.query: str | np.ndarray | None = None  # what was asked last
        self.stages: list[Stage] = []
        self._draw = np.random.default_rng(0)
        self.text = ipywidgets.Text(
            placeholder=f"Type a sentence and press Enter{example and f', for example: {example}'}",
            continuous_update=False,
        )
        self.go = ipywidgets.Button(description="Search", icon="search", button_style="primary")
        self.sample = ipywidgets.Button(
            description="A caption of the set",
            icon="random",
            tooltip="Ask with one of the set's own captions: then the right image is known",
        )
        self.system = ipywidgets.Dropdown(
            options=list(galleries), description="System", layout={"width": "220px"}
        )
        self.upload = ipywidgets.FileUpload(
            accept="image/*,.tif,.tiff", description="Search with an image"
        )
        self.stage = ipywidgets.ToggleButtons(
            options=[("by code", 0), ("reranked", 1)],
            value=1,
            tooltips=[
                "CFITR's first stage: hash codes compared",
                "CFITR's second stage: both read together",
            ],
        )
        self.status = ipywidgets.HTML()
        self.tiles = [_Tile(self._clicked) for _ in range(COLUMNS * ROWS)]
        self.detail = _Detail(self._ask_with_shown)
        super().__init__(self._arranged())
        self.add_class("nbh-search")
        self._listen()
        self._say("Ready.")
        self._show_list()

    def _arranged(self) -> list[ipywidgets.Widget]:
        rows = {
            "top": [self.text, self.go, self.sample],
            "controls": [self.system, self.upload, self.stage],
            "body": [ipywidgets.GridBox(self.tiles), self.detail],
        }
        boxes = {name: ipywidgets.HBox(parts) for name, parts in rows.items()}
        for name, part in (
            boxes
            | {
                "query": self.text,
                "sample": self.sample,
                "upload": self.upload,
                "stages": self.stage,
                "status": self.status,
                "grid": rows["body"][0],
            }
        ).items():
            part.add_class(f"nbh-{name}")
        return [
            ipywidgets.HTML(f"<style>{_css()}</style>"),
            boxes["top"],
            boxes["controls"],
            self.status,
            boxes["body"],
        ]

    def _listen(self) -> None:
        self.text.observe(lambda change: self._ask(change.new), "value")
        self.text.on_msg(self._entered)
        self.go.on_click(lambda _: self._ask(self.text.value))
        self.sample.on_click(lambda _: self._ask_sample())
        self.system.observe(
            lambda _: None if self.query is None else self._ask(self.query), "value"
        )
        self.upload.observe(self._uploaded, "value")
        self.stage.observe(lambda _: self._show_list(), "value")

    def __repr__(self) -> str:
        return f"SearchPanel({', '.join(self._make)})"

    # ---- asking
    def ask(self, query: str | np.ndarray) -> None:
        """Searches with a sentence or a picture (H,W,3) uint8, as if it had been typed or given."""
        if isinstance(query, str) and query != self.text.value:
            self.text.value = query  # which asks
        else:
            self._ask(query)

    def _entered(self, _widget: ipywidgets.Text, content: Mapping, _buffers: object) -> None:
        """Ask with the sentence after a picture, too, when Enter does not change its value.

        Of a changed sentence this message comes before its value, which then asks.
        """
        sentence = self.text.value
        if content.get("event") == "submit" and sentence and not isinstance(self.query, str):
            self._ask(sentence)

    def _ask(self, query: str | np.ndarray) -> None:
        with self._busy("Searching"):
            self.query, self.stages = query, []
            gallery = self._gallery()
            if isinstance(query, str):
                self._ask_sentence(gallery, query)
            else:
                self._ask_picture(gallery, query)

    def _ask_sentence(self, gallery: Gallery, sentence: str) -> None:
        own: Any = gallery.described_by(sentence)
        notes = gallery.notes(sentence)
        self.detail.clear("Click a picture: the map shows where the words look.")
        for stage in gallery.find_images(sentence):
            self.stages.append(stage)
            self._show_list(last=True)
        if len(own):
            place = stage.place(own)
            notes.append(
                f"the caption's own image is at place {place} of {len(gallery)}"
                if place
                else f"the caption's own image is not among the {len(stage.rows)} candidates"
            )
        self._say(_spent(stage), *notes)

    def _ask_picture(self, gallery: Gallery, picture: np.ndarray) -> None:
        self.stages = [gallery.similar(picture)]
        self._show_list(last=True)
        found = gallery.find_sentences(picture)
        texts = [
            f"{score:.2f}&ensp;{html.escape(gallery.sentences[row])}"
            for row, score in zip(found.rows[:5], found.scores, strict=False)
        ]
        says = _spent(self.stages[0]), "images most similar to the one on the right"

        def show(*written: str) -> None:
            self.detail.show(
                picture,
                "Asked with this image",
                [*written, f"<b>{self.system.value} finds</b>", *texts],
            )

        if self._write:
            show("<b>BITA writes</b>", "…")
            self._say(*says, "BITA is writing a caption …", kind="nbh-busy")
            show("<b>BITA writes</b>", html.escape(self._write(picture)))
        else:
            show()
        self._say(*says)

    def _ask_sample(self) -> None:
        with self._busy("Searching"):
            sentence = str(self._draw.choice(self._gallery().sentences))
        self.ask(sentence)

    def _ask_with_shown(self) -> None:
        if self.detail.picture is not None:
            self._ask(self.detail.picture)

    def _uploaded(self, change) -> None:
        if not change.new:
            return
        with self._busy("Reading the image"):
            file = change.new[0]
            self.upload.value = ()  # so that the same file can be given again
            self._clear()
            picture = decoding.decode(bytes(file["content"]), file["name"])
            self._ask(picture)

    def _gallery(self) -> Gallery:
        name = self.system.value
        if name is None:
            raise UserError(
                "There is no trained system yet; run one of the notebooks 20_pir to 23_cfitr first."
            )
        if name not in self._made:
            self._say(f"Loading {name} and encoding its gallery …")
            self._made[name] = self._make[name]()
        return self._made[name]

    # ---- showing
    def _show_list(self, last: bool = False) -> None:
        """Show the list of the chosen stage.

        With `last`, choose the latest stage first.
        """
        two = len(self.stages) > 1 or (self.stages and self.stages[0].name == "coarse")
        self.stage.layout.visibility = "visible" if two else "hidden"
        if last and two and self.stage.value != len(self.stages) - 1:
            self.stage.value = len(self.stages) - 1  # which shows
            return
        if not self.stages:
            for tile in self.tiles:
                tile.clear()
            return
        gallery, stage = self._gallery(), self.stages[min(self.stage.value, len(self.stages) - 1)]
        own: Any = gallery.described_by(self.query) if isinstance(self.query, str) else []
        before = self.stages[0] if stage is not self.stages[0] else None
        for place, tile in enumerate(self.tiles):
            if place >= len(stage.rows):
                tile.clear()
                continue
            row = stage.rows[place]
            came = f" (was {before.place(row)})" if before else ""
            tile.show(
                row,
                gallery.picture(row),
                f"{place + 1}{came} · {stage.scores[place]:.2f}",
                gallery.table.images.scene[row],
                right=row in own,
            )

    def _clicked(self, tile: _Tile) -> None:
        with self._busy("Looking"):
            gallery, picture = self._gallery(), self._gallery().picture(tile.row)
            for other in self.tiles:
                other.mark(other is tile)
            lines = ["<b>Its captions</b>", *map(html.escape, gallery.captions(tile.row))]
            title = (
                f"{html.escape(tile.title)} · {html.escape(gallery.table.images.scene[tile.row])}"
            )
            self.detail.show(picture, title, lines)
            if not isinstance(self.query, str) or not self._method:
                self._say("Where words look is shown when a sentence asks.")
                return
            try:
                looked = region_maps.match(gallery.system, self.query).map(self._method, picture)
            # not every configuration has maps; picture and captions stay
            except UserError as error:
                self._say(str(error), kind="nbh-wrong")
                return
            self.detail.show(picture, title, lines, overlay(picture, looked))
            self._say(
                f"Bright: patches that speak for the sentence ({self._method},"
                f" {self.system.value})",
                "40_attention_and_belief tests whether such maps can be believed",
            )

    def _clear(self) -> None:
        self.stages = []
        self._show_list()
        self.detail.clear("")

    def _say(self, *parts: str, kind: str = "") -> None:
        self.status.value = (
            f'<div class="{kind}">{" · ".join(html.escape(part) for part in parts if part)}</div>'
        )

    @contextmanager
    def _busy(self, doing: str) -> Iterator[None]:
        """Says what goes on; turns what goes wrong into a sentence."""
        self._say(f"{doing} …", kind="nbh-busy")
        try:
            yield
        except UserError as error:
            self._clear()
            self._say(str(error), kind="nbh-wrong")
        except Exception as error:  # the last door before the reader's screen
            self._clear()
            self._say(
                f"Something unforeseen happened ({type(error).__name__}: {error}); the search"
                " goes on.",
                kind="nbh-wrong",
            )


class _Tile(ipywidgets.VBox):
    """A picture of the grid, with a button over all of it."""

    def __init__(self, clicked: Callable[[_Tile], None]):
        self.row, self.title = -1, ""
        self.image = ipywidgets.Image(
            format="jpeg", value=jpeg(np.full((2, 2, 3), 238, np.uint8), 2)
        )
        self.button, self.note = ipywidgets.Button(), ipywidgets.HTML()
        super().__init__([self.image, self.button, self.note])
        self.add_class("nbh-tile")
        self.button.on_click(lambda _: clicked(self))

    def show(self, row: int, picture: np.ndarray, title: str, scene: str, right: bool) -> None:
        self.row, self.title = int(row), title
        self.image.value = jpeg(picture, TILE)
        self.button.tooltip = f"{title} · {scene}: show it large"
        head = html.escape(title) + (" ✓" if right else "")
        self.note.value = f"<div><b>{head}</b></div><div>{html.escape(scene)}</div>"
        (self.add_class if right else self.remove_class)("nbh-right")
        self.remove_class("nbh-empty")
        self.mark(False)

    def mark(self, chosen: bool) -> None:
        (self.add_class if chosen else self.remove_class)("nbh-chosen")

    def clear(self) -> None:
        self.add_class("nbh-empty")  # keeps its place
        self.mark(False)


class _Detail(ipywidgets.VBox):
    """One picture, large, with lines of text below, and a button that searches with it."""

    def __init__(self, ask: Callable[[], None]):
        self.picture: np.ndarray | None = None
        self.title, self.image, self.lines = (
            ipywidgets.HTML(),
            ipywidgets.Image(format="jpeg"),
            ipywidgets.HTML(),
        )
        self.button = ipywidgets.Button(description="Search with this image", icon="picture-o")
        super().__init__([self.title, self.image, self.button, self.lines])
        self.add_class("nbh-detail")
        self.button.on_click(lambda _: ask())
        self.clear("")

    def show(
        self, picture: np.ndarray, title: str, lines: list[str], drawn: np.ndarray | None = None
    ) -> None:
        """Title and lines are HTML. `drawn` is shown in the place of the picture."""
        self.picture = picture
        self.image.value = jpeg(picture if drawn is None else drawn, LARGE)
        self.title.value, self.lines.value = (
            f"<b>{title}</b>",
            "".join(f"<p>{line}</p>" for line in lines),
        )
        self.button.layout.visibility = self.image.layout.visibility = "visible"

    def clear(self, say: str) -> None:
        self.picture, self.title.value, self.lines.value = None, html.escape(say), ""
        self.button.layout.visibility = self.image.layout.visibility = "hidden"


def overlay(picture: np.ndarray, looked: np.ndarray) -> np.ndarray:
    """Return a picture (H,W,3) uint8 with a map (S,S) over it.

    Values above zero are shown, brightest where the map is largest.
    """
    height, width = picture.shape[:2]
    shown = np.maximum(looked, 0) / max(float(looked.max()), 1e-12)
    large = np.asarray(
        Image.fromarray(shown.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    ).clip(0, 1)
    colours = 255 * matplotlib.colormaps["inferno"](large)[..., :3]
    strength = 0.35 + 0.4 * large[..., None]
    return ((1 - strength) * picture + strength * colours).astype(np.uint8)


def _spent(stage: Stage) -> str:
    total = sum(stage.milliseconds.values())
    return (
        f"{total:.0f} ms ("
        + ", ".join(f"{part} {value:.1f}" for part, value in stage.milliseconds.items())
        + ")"
    )


def jpeg(picture: np.ndarray, size: int) -> bytes:
    """Square and no larger than `size` pixels of a screen want it."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    edge = min(SHARPNESS * size, max(image.size))
    image.resize((edge, edge), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _css() -> str:
    return (
        STYLE.read_text(encoding="utf-8")
        .replace("{green}", GREEN)
        .replace("{tile}", f"{TILE}px")
        .replace("{large}", f"{LARGE}px")
        .replace("{columns}", str(COLUMNS))
    )
