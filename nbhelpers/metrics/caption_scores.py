"""Score captions with pycocoevalcap's metrics, with intervals and a human baseline.

BLEU, ROUGE-L and CIDEr are pycocoevalcap's Python; its tokenizer, METEOR and SPICE are Java and are
called by `java`. All scores are fractions; papers print them times 100. `CIDEr` is what is called
CIDEr-D elsewhere.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from nbhelpers.data.caption_files import read_captions, read_references  # noqa: F401
from nbhelpers.errors import UserError
from nbhelpers.metrics import java
from nbhelpers.metrics.resampling import interval

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
BLEU = METRICS[:4]
KEPT = 8  # lists of sentences whose tokens a scorer remembers

Hypotheses = Mapping[Any, str]  # by image id, text or number
References = Mapping[Any, Sequence[str]]


@dataclass(frozen=True, eq=False)
class CaptionScores:
    """What a scorer found.

    corpus      metric -> score of all captions; BLEU and METEOR pool their counts over the images,
                the others are means
    per_image   one row per image id, one column per metric
    tokenizer   "PTB", or "rules" where Java was missing, which may differ from it in rare words
    skipped     metric that was wanted -> why it is not there
    counts      per round (one, or one for each left-out reference) metric -> what `bootstrap`
                pools, a row per image
    """

    corpus: dict[str, float]
    per_image: pd.DataFrame
    tokenizer: str
    skipped: dict[str, str] = field(default_factory=dict)
    counts: tuple[dict[str, np.ndarray], ...] = field(default=(), repr=False)


def score_captions(
    hypotheses: Hypotheses, references: References, metrics: Iterable[str] | None = None
) -> CaptionScores:
    """Score one caption per image against its references; both need the same ids.

    metrics  of METRICS, or "Bleu" for all four; left away: all that can be computed here, and
             `skipped` tells of the others

    UserError, one sentence, on ids that do not fit, on what is no text, and if a metric named
    cannot be computed.
    """
    with CaptionScorer(metrics) as scorer:
        return scorer.score(hypotheses, references)


class CaptionScorer:
    """Score captions many times: METEOR keeps running, references are tokenised once.

    As `score_captions`. METEOR runs until `close()` or the end of a `with`. Several scorers may
    work at once, and several threads may use one.

    texts  captions like those to come: METEOR starts anew, in seconds, when words come that it has
           not met
    """

    def __init__(
        self,
        metrics: Iterable[str] | None = None,
        timeout: float = java.TIMEOUT,
        texts: Iterable[str] = (),
    ):
        self.metrics, self.skipped = _available(metrics)
        self.timeout, self._texts = timeout, list(texts)
        self._meteor: java.Meteor | None = None
        self._waking = threading.Lock()
        self._by_java = lru_cache(KEPT)(_by_java)

    def __enter__(self) -> CaptionScorer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends METEOR's process. The scorer may be used again."""
        if self._meteor is not None:
            self._meteor.close()

    def score(
        self, hypotheses: Hypotheses, references: References, leave_one_out: bool = False
    ) -> CaptionScores:
        """As `score_captions`.

        leave_one_out  the mean over rounds that each lack one reference: what may stand beside the
                       human line
        """
        _check(hypotheses, references, "METEOR" in self.metrics)
        self._wake()
        read = self._tokens([[hypotheses[one]] for one in references], references.values())
        hyps, refs = [only for (only,) in read[0]], read[1]
        rounds = [rest for _, rest in _rounds(references, refs)] if leave_one_out else [refs]
        return self._mean(list(references), [(hyps, rest) for rest in rounds])

    def human_line(self, references: References) -> CaptionScores:
        """Score people: in each round one reference is the caption, the others its references.

        There are as many rounds as the image with the fewest references has; scores are the means
        over rounds. A machine has one reference more to agree with; `score(...,
        leave_one_out=True)` takes that advantage away.
        """
        _check(dict.fromkeys(references, ""), references, "METEOR" in self.metrics)
        self._wake()
        return self._mean(
            list(references), _rounds(references, self._tokens(references.values())[0])
        )

    def _wake(self) -> None:
        """Starts METEOR before anything else, since its start takes longest."""
        with self._waking:
            if "METEOR" in self.metrics and (self._meteor is None or not self._meteor.alive):
                self._meteor = java.Meteor(self.timeout, self._texts)

    def _tokens(self, *groups: Iterable[Sequence[str]]) -> list[list[list[str]]]:
        """Tokenise groups of sentences: all of a group at once, groups side by side."""
        cleaned = [[[clean(text) for text in texts] for texts in group] for group in groups]
        with ThreadPoolExecutor() as pool:
            flat = [list(chain.from_iterable(group)) for group in cleaned]
            found = [iter(tokens) for tokens in pool.map(self._tokenise, flat)]
        return [
            [[next(tokens) for _ in texts] for texts in group]
            for group, tokens in zip(cleaned, found, strict=True)
        ]

    def _tokenise(self, sentences: list[str]) -> list[str]:
        if java.find() is None:
            return [tokenize_by_rules(text) for text in sentences]
        return self._by_java(tuple(sentences), self.timeout)

    def _mean(self, ids: list, rounds: list[tuple[list[str], list[list[str]]]]) -> CaptionScores:
        found = [self._score(*one) for one in rounds]
        names = [name for name in METRICS if name in self.metrics]
        corpus = {name: float(np.mean([corpus[name] for corpus, _, _ in found])) for name in names}
        rows = {name: np.mean([images[name] for _, images, _ in found], axis=0) for name in names}
        return CaptionScores(
            corpus,
            pd.DataFrame(rows, index=pd.Index(ids, name="image_id", tupleize_cols=False)),
            "PTB" if java.find() else "rules",
            self.skipped,
            tuple(counts for _, _, counts in found),
        )

    def _score(self, hyps: list[str], refs: list[list[str]]) -> tuple[dict, dict, dict]:
        """(corpus, per image, counts) of tokenised captions; Java's metrics run beside Python's."""
        beside: dict[str, Callable] = {"METEOR": _meteor, "SPICE": _spice}
        here: dict[str, Callable] = {"Bleu": _bleu, "ROUGE_L": _rouge, "CIDEr": _cider}
        wanted = {"Bleu" if name in BLEU else name for name in self.metrics}
        with ThreadPoolExecutor() as pool:
            try:
                waiting = [
                    pool.submit(beside[name], self._meteor, hyps, refs)
                    for name in beside
                    if name in wanted
                ]
                found = [function(hyps, refs) for name, function in here.items() if name in wanted]
                found += [one.result() for one in waiting]
            except BaseException:  # such as an interrupt: nobody will read METEOR's answers
                self.close()
                raise
        corpus: dict[str, float] = {}
        images: dict[str, np.ndarray] = {}
        counts: dict[str, np.ndarray] = {}
        for of_corpus, of_images, counted in found:
            corpus |= of_corpus
            images |= of_images
            counts |= counted
        return corpus, images, counts


def _by_java(sentences: tuple[str, ...], timeout: float) -> list[str]:
    return java.tokenize(list(sentences), timeout)


def _available(wanted: Iterable[str] | None) -> tuple[frozenset[str], dict[str, str]]:
    """(metrics to compute, metric -> why it is skipped)."""
    named = list(METRICS) if wanted is None else _named(wanted)
    problems = {"SPICE": java.spice_problem(), "METEOR": "" if java.find() else java.NO_JAVA}
    problems = {name: problem for name, problem in problems.items() if problem and name in named}
    if wanted is not None and problems:
        raise UserError(next(iter(problems.values())))
    return frozenset(named) - set(problems), problems


def _named(wanted: Iterable[str]) -> list[str]:
    """The metrics that are wanted by name; "Bleu" are all four."""
    named: list[str] = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        named += BLEU if name == "Bleu" else [name]
    if not named or set(named) - set(METRICS):
        raise UserError(
            f"The metrics are {', '.join(map(str, named)) or 'none'}; choose among "
            f"{', '.join(METRICS)}."
        )
    return named


# the metrics
# each returns metric -> score of the corpus, metric -> (N,) scores, metric -> (N, C) counts for
# `bootstrap`


def _bleu(hyps: list[str], refs: list[list[str]]):
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for one, own in zip(hyps, refs, strict=True):
        scorer += (one, own)
    corpus, images = scorer.compute_score(option="closest", verbose=0)
    closest = [
        min((abs(n - part["testlen"]), n) for n in part["reflen"])[1] for part in scorer.ctest
    ]
    counts = [
        [*part["correct"], *part["guess"], part["testlen"], n]
        for part, n in zip(scorer.ctest, closest, strict=True)
    ]
    return (
        dict(zip(BLEU, map(float, corpus), strict=False)),
        dict(zip(BLEU, map(np.array, images), strict=False)),
        {"Bleu": np.array(counts, float)},
    )


def _rouge(hyps: list[str], refs: list[list[str]]):
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = Rouge()
    # an empty caption would equal an empty reference
    images = np.array(
        [scorer.calc_score([one], own) if one else 0.0 for one, own in zip(hyps, refs, strict=True)]
    )
    return {"ROUGE_L": float(images.mean())}, {"ROUGE_L": images}, {"ROUGE_L": images[:, None]}


def _cider(hyps: list[str], refs: list[list[str]]):
    from pycocoevalcap.cider.cider import Cider

    images = np.zeros(len(hyps))
    # else the scorer stumbles over the maximum of nothing
    if any(map(any, refs)):
        _, images = Cider().compute_score(
            dict(enumerate(refs)), {row: [one] for row, one in enumerate(hyps)}
        )
    return {"CIDEr": float(images.mean())}, {"CIDEr": images}, {"CIDEr": images[:, None]}


def _meteor(meteor: java.Meteor, hyps: list[str], refs: list[list[str]]):
    corpus, images, counts = meteor.score(hyps, refs)
    words, matches, chunks = counts[:, :2], counts[:, 4:20].reshape(-1, 8, 2).sum(1), counts[:, 20]
    # METEOR adds no chunk for a caption that is its reference
    counts[(matches == words).all(axis=1) & (chunks == 1), 20] = 0
    return {"METEOR": corpus}, {"METEOR": images}, {"METEOR": counts}


def _spice(_, hyps: list[str], refs: list[list[str]]):
    images = java.spice(hyps, refs)
    return {"SPICE": float(images.mean())}, {"SPICE": images}, {"SPICE": images[:, None]}


def pooled_bleu(counts: np.ndarray) -> np.ndarray:
    """Return BLEU-1 to 4 (S, 4) of summed counts (S, 10).

    The counts are matches and n-grams for n = 1..4, words, and words of the closest references.
    """
    correct, guess, words, closest = counts[:, :4], counts[:, 4:8], counts[:, 8], counts[:, 9]
    # smoothing as in pycocoevalcap
    bleu = np.cumprod((correct + 1e-15) / (guess + 1e-9), axis=1) ** (1 / np.arange(1, 5))
    ratio = (words + 1e-15) / (closest + 1e-9)
    return bleu * np.exp(np.minimum(0, 1 - 1 / ratio))[:, None]


def pooled_meteor(counts: np.ndarray) -> np.ndarray:
    """Return METEOR 1.5 (S,) of summed counts (S, 23).

    Denkowski and Lavie 2014, section 2; weights for ranking in English.
    """
    alpha, beta, gamma, delta, stages = 0.85, 0.2, 0.6, 0.75, np.array([1.0, 0.6, 0.8, 0.6])
    words, function = counts[:, 0:2], counts[:, 2:4]  # of caption and reference
    # stage; content or function word; caption or reference
    matches = counts[:, 4:20].reshape(-1, 4, 2, 2)
    weighted = np.einsum("ijkl,j,k->il", matches, stages, np.array([delta, 1 - delta]))
    broken = counts[:, 20] / np.maximum(matches.sum(axis=(1, 2)).mean(axis=1), 1e-9)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (weighted / (delta * (words - function) + (1 - delta) * function)).T
        mean = 1 / ((1 - alpha) / precision + alpha / recall)
        return np.nan_to_num(mean * (1 - gamma * broken**beta))


def bootstrap(
    scores: CaptionScores, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Return the interval (low, high) of each corpus score, resampling images.

    BLEU and METEOR pool the counts of the drawn images. The n-gram weights of CIDEr stay those of
    the whole set.
    """
    return _intervals(_resampled(scores, samples, seed), level)


def paired_bootstrap(
    one: CaptionScores,
    other: CaptionScores,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float, float]]:
    """Return the difference of each score that both have, with its interval (low, high).

    Each draw takes the same images for both, as `bootstrap` draws them. UserError if they are
    scores of different images.
    """
    if list(one.per_image.index) != list(other.per_image.index):
        raise UserError("Only scores of the same images in the same order can be paired.")
    ours, theirs = (_resampled(scores, samples, seed) for scores in (one, other))
    bounds = _intervals({name: ours[name] - theirs[name] for name in ours if name in theirs}, level)
    return {
        name: (one.corpus[name] - other.corpus[name], *interval)
        for name, interval in bounds.items()
    }


def _resampled(scores: CaptionScores, samples: int, seed: int) -> dict[str, np.ndarray]:
    """Metric -> (samples,) scores of as many draws of images."""
    images = len(scores.per_image)
    rng, even = np.random.default_rng(seed), np.full(images, 1 / images)
    drawn = rng.multinomial(images, even, max(samples, 0)).astype(float)  # as in the stored records
    rounds = []
    for counts in scores.counts:
        found = {
            name: (drawn @ part / images)[:, 0]
            for name, part in counts.items()
            if name not in ("Bleu", "METEOR")
        }
        if "Bleu" in counts:
            found |= dict(zip(BLEU, pooled_bleu(drawn @ counts["Bleu"]).T, strict=False))
        if "METEOR" in counts:
            found["METEOR"] = pooled_meteor(drawn @ counts["METEOR"])
        rounds.append(found)
    return {name: np.mean([one[name] for one in rounds], axis=0) for name in scores.corpus}


def _intervals(drawn: Mapping[str, np.ndarray], level: float) -> dict[str, tuple[float, float]]:
    bounds = {name: interval([values], level) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


# the captions


def clean(text: str) -> str:
    """Put a text in one line: a run of white space and control characters is one blank.

    Control characters are line breaks, NUL, U+2028 and others.
    """
    return " ".join(_CONTROL.sub(" ", text.encode("utf-8", "replace").decode()).split())


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_JOINED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b")
_WORDS = re.compile(
    r"""(?<!\w)(?:[a-z]\.)+ | \b(?:mr|mrs|ms|dr|st|co|inc|etc|vs)\. | \d+(?:[.,:/]\d+)+ | n't\b
    | '(?:s|re|ve|ll|d|m)\b | \w+?(?=n't\b) | \w+(?:-\w+)* | \.{3} | -- | [^\w\s]""",
    re.X,
)


def tokenize_by_rules(text: str) -> str:
    """Tokenise a caption without Java.

    The PTB tokenizer gives the same in all but 15 of the 41,547 different captions of RSICD,
    RSITMD, UCM, Sydney and the generated set.
    """
    text = _JOINED.sub(
        lambda found: " ".join(filter(None, found.groups())), text.lower().replace("’", "'")
    )
    return " ".join(
        _BRACKETS.get(word, word) for word in _WORDS.findall(text) if word not in java.DROPPED
    )


def _check(hypotheses: Hypotheses, references: References, meteor: bool) -> None:
    if not isinstance(hypotheses, Mapping) or not isinstance(references, Mapping) or not references:
        raise UserError(
            "There is nothing to score; give a caption, and a list of references, by image id."
        )
    _check_ids(hypotheses, references)
    for one, own in references.items():
        if not isinstance(own, (list, tuple)) or not own:
            given = f"a {type(own).__name__}" if own else "none"
            raise UserError(
                f"The references of image {one!r} are {given}; give a list of at least one text."
            )
        for text in (hypotheses[one], *own):
            _check_text(text, one, java.MAX_WORDS if meteor else None)


def _check_text(text, one: Hashable, most: int | None) -> None:
    """UserError for what is no text, or has more words than METEOR can match."""
    if not isinstance(text, str):
        raise UserError(
            f"A caption of image {one!r} is a {type(text).__name__}, not a text; give "
            "one text per image."
        )
    words = len(text.split())
    if most is not None and words > most:
        raise UserError(
            f"A caption of image {one!r} has {words:,} words, and METEOR would search "
            f"for minutes beyond {most:,}; shorten it, or leave METEOR out of the "
            "metrics."
        )


def _check_ids(hypotheses: Hypotheses, references: References) -> None:
    missing = [one for one in references if one not in hypotheses]
    more = [one for one in hypotheses if one not in references]
    if more and len(missing) == len(references):
        raise UserError(
            f"No image has both a caption and references: captions are of {more[0]!r} "
            f"and so on, references of {missing[0]!r} and so on; call the images alike "
            "in both."
        )
    without = ""
    if more:
        without = f"{len(more)} captions are of images without references (first: {more[0]!r})"
    if missing:
        count = f"{len(missing)} of {len(references)}"
        also = f", and {without}" if more else ""
        raise UserError(
            f"{count} images have no caption (first: {missing[0]!r}){also};"
            " caption every image, if with an empty text."
        )
    if more:
        raise UserError(f"{without}; leave them out.")


def weightless(references: References) -> str:
    """Why CIDEr is 0 for any captions of these images, in one sentence; "" where it is not.

    It weighs an n-gram by log(images / images that have it), which is 0 for one that all have.
    """
    if len(references) == 1:
        return (
            "CIDEr of a single image is 0.00 whatever its caption says, because it weighs words "
            "by how few of the images have them; score several images."
        )
    if len({frozenset(map(clean, own)) for own in references.values()}) == 1:
        return (
            "CIDEr is 0.00 whatever the captions say, because it weighs words by how few of "
            "the images have them, and all images have the same references."
        )
    return ""


def _rounds(
    references: References, tokens: list[list[str]]
) -> list[tuple[list[str], list[list[str]]]]:
    """(the k-th reference of each image, the other references) for every k that all images have."""
    lonely = [one for one, own in references.items() if len(own) < 2]
    if lonely:
        raise UserError(
            f"{len(lonely)} images have one reference only (first: {lonely[0]!r}); to leave one out"
            " takes two."
        )
    return [
        ([own[k] for own in tokens], [own[:k] + own[k + 1 :] for own in tokens])
        for k in range(min(map(len, tokens)))
    ]


def most_frequent(captions: Iterable[str]) -> str:
    """The caption that occurs most often, the first of those; punctuation and case do not count."""
    captions = list(captions)
    if not captions:
        raise UserError("There is no caption to choose from; give those of the training split.")
    read = [tokenize_by_rules(clean(text)) for text in captions]
    return captions[read.index(Counter(read).most_common(1)[0][0])]


def degenerate(hypotheses: Hypotheses, training: Iterable[str] = ()) -> pd.DataFrame:
    """What is wrong with captions whatever their score: one row per image id.

    empty          no word at all
    repeats        how often an n-gram (n = 1..4) stands in a row, at most; 1 is sound, and
                   `repeated` is that n-gram
    copy           the caption is the most frequent one of `training`
    degenerate     any of these
    """
    copied = (
        tokenize_by_rules(clean(most_frequent(training))) if (training := list(training)) else None
    )
    rows = []
    for text in hypotheses.values():
        read = tokenize_by_rules(clean(text))
        repeats, repeated = _in_a_row(read.split())
        rows.append(
            {
                "empty": not read,
                "repeats": repeats,
                "repeated": repeated,
                "copy": bool(read) and read == copied,
            }
        )
    found = pd.DataFrame(
        rows, index=pd.Index(list(hypotheses), name="image_id", tupleize_cols=False)
    )
    return found.assign(degenerate=found["empty"] | (found["repeats"] > 1) | found["copy"])


def _in_a_row(words: list[str]) -> tuple[int, str]:
    """Return how often an n-gram directly repeats at most, and the shortest such n-gram."""
    best = (min(len(words), 1), "")
    for n in range(1, 5):
        same = 0
        for place in range(len(words) - n):
            same = same + 1 if words[place] == words[place + n] else 0
            if same // n + 1 > best[0]:
                best = same // n + 1, " ".join(words[place + 1 : place + 1 + n])
    return best


def describe(captions: Iterable[str]) -> dict[str, float]:
    """Count captions and words.

    The result has captions, distinct captions, words per caption (mean, shortest, longest), and
    distinct words.
    """
    read = [tokenize_by_rules(clean(text)).split() for text in captions]
    if not read:
        raise UserError("There is no caption to describe.")
    lengths = [len(words) for words in read]
    return {
        "captions": len(read),
        "distinct": len(set(map(tuple, read))),
        "words, mean": float(np.mean(lengths)),
        "shortest": min(lengths),
        "longest": max(lengths),
        "vocabulary": len(set().union(*read)),
    }


def write_record(
    run,
    system: str,
    variant: str,
    scores: CaptionScores,
    config,
    split: str = "test",
    selected_on: str = "val",
    **fields,
) -> dict:
    """Write the caption record of a system with its intervals to `run.records`, and return it.

    config and fields are those of `records.new`: data_fingerprint and, where known, seconds,
    parameters, weights and notes.
    """
    images = len(scores.per_image)
    protocol = {
        "split": split,
        "images": images,
        "tokenizer": scores.tokenizer,
        "selected_on": selected_on,
    }
    intervals = bootstrap(scores, seed=run.parameters.seed)
    return run.write_record(
        config,
        kind="captions",
        system=system,
        variant=variant,
        **fields,
        protocol=protocol,
        metrics=scores.corpus,
        intervals=intervals,
    )
