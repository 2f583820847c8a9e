"""Edit a caption and watch its scores: ipywidgets around LiveScores.

    editor = CaptionEditor(pictures, references)
    display(editor)                      # in JupyterLab, Notebook and Voilà
    editor.write("two planes")           # or without hands

Scores follow every key. METEOR, which needs Java and a moment, answers a button. A mistake becomes
a sentence, never a traceback.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from nbhelpers import figures
from nbhelpers.errors import UserError
from nbhelpers.metrics.caption_scores import (
    BLEU,
    CaptionScorer,
    References,
    clean,
    tokenize_by_rules,
)
from nbhelpers.systems.search_panel import jpeg

LONGEST = 200  # words of a caption
SIGMA = 6.0  # of CIDEr-D's penalty for another length
PICTURE = 260  # pixels of a screen that the picture takes
STYLE = Path(__file__).with_name("caption_editor.css")
Vector = dict[tuple[str, ...], float]


class LiveScores:
    """Score one caption at a time, in milliseconds: BLEU, ROUGE-L and CIDEr, without Java.

    references  of all images: the n-gram weights of CIDEr are those of the whole set

    Scores are those of `CaptionScorer` on the same set, up to the few words that its tokenizer
    splits in another way.
    """

    METRICS = (*BLEU, "ROUGE_L", "CIDEr")

    def __init__(self, references: References):
        if not references:
            raise UserError("There are no references; give a list of texts by image id.")
        self.references = {
            image: [tokenize_by_rules(clean(text)) for text in own]
            for image, own in references.items()
        }
        self._images_with: Counter = Counter()
        for own in self.references.values():
            self._images_with.update(set(chain.from_iterable(map(_grams, own))))

    def score(self, image: Hashable, caption: str) -> dict[str, float]:
        """Return metric -> score of a caption for an image, as fractions.

        UserError for an unknown image and a caption of more than LONGEST words.
        """
        if image not in self.references:
            raise UserError(f"Image {image!r} has no references here; choose another one.")
        words, own = tokenize_by_rules(clean(caption)), self.references[image]
        count = len(words.split())
        if count > LONGEST:
            raise UserError(f"The caption has {count} words; give at most {LONGEST}.")
        if not words:
            return dict.fromkeys(self.METRICS, 0.0)
        return _bleu(words, own) | {"ROUGE_L": _rouge(words, own), "CIDEr": self._cider(words, own)}

    def _cider(self, words: str, own: list[str]) -> float:
        """CIDEr-D: per n, clipped cosines of weighted n-grams, with a penalty for the length."""
        ours, scores = self._vectors(words), []
        for text in own:
            theirs = self._vectors(text)
            longer = _bigrams(words) - _bigrams(text)
            alike = [_clipped_cosine(ours[n], theirs[n]) for n in range(4)]
            scores.append(np.exp(-(longer**2) / (2 * SIGMA**2)) * np.mean(alike))
        return float(10 * np.mean(scores))

    def _vectors(self, words: str) -> list[Vector]:
        """For n of 1 to 4, the n-grams of a caption with their weights."""
        vectors: list[Vector] = [{}, {}, {}, {}]
        for gram, count in _grams(words).items():
            weight = np.log(len(self.references) / max(1, self._images_with[gram]))
            vectors[len(gram) - 1][gram] = count * weight
        return vectors


def _grams(words: str) -> Counter:
    """The runs of 1 to 4 words of a tokenised caption, counted."""
    tokens = words.split()
    found: Counter = Counter()
    for n in range(1, 5):
        found.update(zip(*(tokens[start:] for start in range(n)), strict=False))
    return found


def _bigrams(words: str) -> int:
    """The number of runs of two words, which pycocoevalcap takes for the length."""
    return max(len(words.split()) - 1, 0)


def _clipped_cosine(ours: Vector, theirs: Vector) -> float:
    """The cosine of two vectors, where no entry of ours counts beyond that of theirs."""
    norms = np.linalg.norm(list(ours.values())) * np.linalg.norm(list(theirs.values()))
    shared = sum(min(ours[gram], theirs[gram]) * theirs[gram] for gram in ours if gram in theirs)
    return float(shared / norms) if norms else 0.0


def _bleu(words: str, own: list[str]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    scorer += (words, own)
    found, _ = scorer.compute_score(option="closest", verbose=0)
    return dict(zip(BLEU, map(float, found), strict=True))


def _rouge(words: str, own: list[str]) -> float:
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().calc_score([words], own))


class CaptionEditor(ipywidgets.VBox):
    """A picture, a caption to edit, and its scores against the references of the picture.

    pictures    image id -> picture (H,W,3) uint8, those that may be chosen
    references  image id -> its references, of the whole set
    scorer      for METEOR, on a button; None for none
    """

    def __init__(
        self,
        pictures: Mapping[Hashable, np.ndarray],
        references: References,
        scorer: CaptionScorer | None = None,
    ):
        if not pictures:
            raise UserError("There is no picture to describe; give at least one.")
        self.pictures, self._texts, self._scorer = dict(pictures), references, scorer
        self.live = LiveScores(references)
        self.shown = next(iter(self.pictures))
        self.scores: dict[str, float] = {}
        self.text = ipywidgets.Text(placeholder="Type a caption", continuous_update=True)
        self.sample = ipywidgets.Button(description="A reference", icon="quote-left")
        self.next = ipywidgets.Button(description="Another image", icon="picture-o")
        self.meteor = ipywidgets.Button(
            description="METEOR", icon="play", tooltip="Needs Java, and some seconds at its start"
        )
        self.image = ipywidgets.Image(format="jpeg")
        self.words, self.bars, self.list, self.status = (ipywidgets.HTML() for _ in range(4))
        super().__init__(self._arranged())
        self.add_class("nbh-editor")
        self._listen()
        self._show_image()
        self._score()

    def _arranged(self) -> list[ipywidgets.Widget]:
        buttons = [self.sample, self.next, *([self.meteor] if self._scorer else [])]
        top = ipywidgets.HBox([self.text, *buttons])
        right = ipywidgets.VBox([self.words, self.bars])
        body = ipywidgets.HBox([ipywidgets.VBox([self.image]), right, self.list])
        named = {"top": top, "caption": self.text, "bars": self.bars, "references": self.list}
        named |= {"words": self.words, "said": self.status}
        for name, part in named.items():
            part.add_class(f"nbh-editor-{name}")
        css = STYLE.read_text(encoding="utf-8").replace("{picture}", f"{PICTURE}px")
        return [ipywidgets.HTML(f"<style>{css}</style>"), top, self.status, body]

    def _listen(self) -> None:
        self.text.observe(lambda _: self._score(), "value")
        self.sample.on_click(lambda _: self._take_reference())
        self.next.on_click(lambda _: self._next_image())
        self.meteor.on_click(lambda _: self._ask_meteor())

    def __repr__(self) -> str:
        return f"CaptionEditor({len(self.pictures)} pictures)"

    # ---- doing
    def write(self, caption: str) -> dict[str, float]:
        """Put a caption into the field, as if it had been typed; return its scores."""
        self.text.value = caption
        return self.scores

    def choose(self, image: Hashable) -> None:
        """Show another image, and score the caption against its references."""
        with self._guarded():
            if image not in self.pictures:
                raise UserError(f"There is no picture of image {image!r} here.")
            self.shown = image
            self._show_image()
            self._score()

    def figure(self) -> Figure:
        """What the editor shows, as a plain figure."""
        own = list(self._texts[self.shown])
        return figures.caption_scored(
            self.pictures[self.shown], self.text.value, own, self.scores or self._zeros()
        )

    def _zeros(self) -> dict[str, float]:
        return dict.fromkeys(self.live.METRICS, 0.0)

    def _take_reference(self) -> None:
        own = list(self._texts[self.shown])
        at = own.index(self.text.value) + 1 if self.text.value in own else 0
        self.write(own[at % len(own)])

    def _next_image(self) -> None:
        images = list(self.pictures)
        self.choose(images[(images.index(self.shown) + 1) % len(images)])

    def _score(self) -> None:
        with self._guarded():
            self.scores = {}
            self.scores = self.live.score(self.shown, self.text.value)
            self._say("Scores times 100, by rules for words; they follow every key.")
        self._show_scores()

    def _ask_meteor(self) -> None:
        if self._scorer is None:
            return
        with self._guarded():
            self._say("METEOR reads the caption …")
            found = self._scorer.score({0: self.text.value}, {0: list(self._texts[self.shown])})
            if "METEOR" not in found.corpus:
                raise UserError(found.skipped.get("METEOR", "METEOR is not among the metrics."))
            self.scores = self.scores | {"METEOR": found.corpus["METEOR"]}
            self._say("METEOR is of the caption as it stands; the next key takes it away.")
        self._show_scores()

    # ---- showing
    def _show_image(self) -> None:
        self.image.value = jpeg(self.pictures[self.shown], PICTURE)
        own = self._texts[self.shown]
        best = max(self.live.score(self.shown, text)["CIDEr"] for text in own)
        self._most = max(best, 1e-9)  # where the bar of CIDEr ends: what a reference reaches
        lines = "".join(f"<li>{html.escape(text)}</li>" for text in own)
        self.list.value = f"<b>References</b><ul>{lines}</ul>"

    def _show_scores(self) -> None:
        self.words.value = f"<div>{' '.join(self._marked())}</div>"
        self.bars.value = "".join(
            _bar(name, value, self._most if name == "CIDEr" else 1.0)
            for name, value in self.scores.items()
        )

    def _marked(self) -> Iterator[str]:
        """The words of the caption; those that no reference has are marked."""
        known = set(" ".join(self.live.references[self.shown]).split())
        for word in tokenize_by_rules(clean(self.text.value)).split()[:LONGEST]:
            kind = "known" if word in known else "new"
            yield f'<span class="nbh-{kind}">{html.escape(word)}</span>'

    def _say(self, sentence: str, kind: str = "") -> None:
        self.status.value = f'<div class="{kind}">{html.escape(sentence)}</div>'

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn what goes wrong into a sentence."""
        try:
            yield
        except UserError as error:
            self._say(str(error), "nbh-editor-wrong")
        except Exception as error:  # the last door before the reader's screen
            self._say(
                f"Something unforeseen happened ({type(error).__name__}: {error}); the editor"
                " goes on.",
                "nbh-editor-wrong",
            )


def _bar(name: str, value: float, top: float) -> str:
    width = min(100.0, 100 * value / top)
    return (
        f'<div class="nbh-bar"><span>{name.replace("_", "-")}</span>'
        f'<i><b style="width: {width:.1f}%"></b></i><em>{100 * value:.1f}</em></div>'
    )
