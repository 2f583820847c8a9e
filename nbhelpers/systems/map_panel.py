"""Choose an image, a system, a method and a word, and see the map: ipywidgets around maps.

panel = MapPanel(pictures, sentences, maps, words, verdicts)
display(panel)                              # in JupyterLab, Notebook and Voilà
panel.draw(0, "PIR", "relevance")           # or without hands
panel.draw(0, "CFITR", "words", "3. ponds")

The maps are given, so a choice is answered at once. No map is shown without its verdict.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from itertools import chain

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from nbhelpers import figures
from nbhelpers.errors import UserError

Maps = Mapping[str, Mapping[str, Sequence[np.ndarray]]]
Words = Mapping[str, Sequence[tuple[list[str], np.ndarray]]]
ONE_WORD = "words"  # the method that draws the map of one word


class MapPanel(ipywidgets.VBox):
    """Show one map of one image, and what the tests said of maps of its kind.

    pictures   N of (H,W,3) uint8;  sentences  one for each
    maps       system -> method -> N maps (S,S)
    words      system -> for each image its words, and their maps (words,S,S); these systems get
               the method "words"
    verdicts   (system, method) -> a sentence; "" where none is given
    UserError if the counts differ, or there is no map at all.
    """

    def __init__(
        self,
        pictures: Sequence[np.ndarray],
        sentences: Sequence[str],
        maps: Maps,
        words: Words | None = None,
        verdicts: Mapping[tuple[str, str], str] | None = None,
    ):
        self.pictures, self.sentences = list(pictures), list(sentences)
        self.maps, self.words, self.verdicts = maps, words or {}, verdicts or {}
        self._offering = False
        self._check()
        options = [(text, row) for row, text in enumerate(self.sentences)]
        wide = {"layout": {"width": "640px"}}
        self.picture = ipywidgets.Dropdown(options=options, description="image", **wide)
        self.system = ipywidgets.Dropdown(options=list(maps), description="system")
        self.method = ipywidgets.Dropdown(description="method")
        self.word = ipywidgets.Dropdown(description="word")
        self.said = ipywidgets.HTML()
        self.image = ipywidgets.Image(format="png", layout={"width": "640px"})
        below = ipywidgets.HBox([self.system, self.method, self.word])
        super().__init__([self.picture, below, self.said, self.image])
        self.add_class("nbh-maps")
        self._choose()
        for control in (self.picture, self.system, self.method, self.word):
            control.observe(lambda _: self._choose(), "value")

    def _check(self) -> None:
        count = len(self.pictures)
        listed = [*self.words.values(), *chain(*(some.values() for some in self.maps.values()))]
        given = list(map(len, listed))
        if not given or not {len(self.sentences), *given} == {count}:
            raise UserError(
                f"There are {count} pictures, {len(self.sentences)} sentences and lists of"
                f" {sorted(set(given))} maps; give one of each for every picture."
            )

    def methods(self, system: str) -> list[str]:
        """Return the methods of a system, with "words" where its words have maps."""
        return [*self.maps[system], *([ONE_WORD] if system in self.words else [])]

    def numbered(self, row: int, system: str) -> list[str]:
        """Return the words of a sentence, numbered, since a word may come twice."""
        words, _ = self.words[system][row]
        return [f"{place}. {word}" for place, word in enumerate(words, 1)]

    def draw(self, row: int, system: str, method: str, word: str = "") -> Figure:
        """Return the figure of one map. A word is named as `numbered` does."""
        if method == ONE_WORD:
            at = self.numbered(row, system).index(word)
            title, looked = f"{system}: {word}", self.words[system][row][1][at]
        else:
            title, looked = f"{system}: {method}", self.maps[system][method][row]
        return figures.map_rows([self.pictures[row]], [self.sentences[row]], {title: [looked]})

    def _choose(self) -> None:
        """Offer what the chosen system has, keep what can be kept, and show it."""
        if self._offering:  # a new list chooses its first entry, which calls this again
            return
        self._offering = True
        try:
            self._offer(self.method, self.methods(self.system.value))
            by_word = self.method.value == ONE_WORD
            words = self.numbered(self.picture.value, self.system.value) if by_word else []
            self._offer(self.word, words)
            self.word.layout.visibility = "visible" if by_word else "hidden"
        finally:
            self._offering = False
        self._show()

    @staticmethod
    def _offer(chooser: ipywidgets.Dropdown, names: list[str]) -> None:
        """Put names into a list; keep the chosen one if it is among them."""
        if list(chooser.options) != names:
            kept = chooser.value
            chooser.options = names
            if names:
                chooser.value = kept if kept in names else names[0]

    def _show(self) -> None:
        system, method = self.system.value, self.method.value
        buffer = io.BytesIO()
        figure = self.draw(self.picture.value, system, method, self.word.value)
        figure.savefig(buffer, format="png", dpi=130)
        self.image.value = buffer.getvalue()
        self.said.value = html.escape(self.verdicts.get((system, method), ""))
