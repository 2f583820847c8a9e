"""Turn captions into padded token ids."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import tokenizers
import torch
from torch import Tensor

from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def clean_caption(text: str, max_words: int = 30) -> str:
    """Clean a caption as `pre_caption` of PIR's released code does.

    The text becomes lower case without punctuation; '-' and '/' become spaces. White space is
    collapsed, and the first `max_words` words are kept.
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).strip()
    return " ".join(text.split(" ")[:max_words])


class Tokenizer:
    """Encode captions as BERT does: [CLS] and the words; [SEP] only with `sep` (PIR has none).

    path        a Hugging Face tokenizer.json, or a folder that holds one
    max_length  most ids of a caption, special tokens included
    fixed       True: pad every batch to max_length, so that embeddings do not depend on the batch
    vocab_size  number of ids
    sha256      hex digest of the file and the options
    """

    _model: Any  # the tokenizer of the library

    def __init__(
        self, path: Path | str, max_length: int = 47, fixed: bool = False, sep: bool = False
    ):
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            content = path.read_bytes()
            self._model = tokenizers.Tokenizer.from_buffer(content)
        except OSError as error:
            raise UserError(
                f"There is no tokenizer {path}; name a tokenizer.json or its folder."
            ) from error
        except ValueError as error:
            raise UserError(f"{path} is not a tokenizer.json ({error}).") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._first, self._pad = self._id("[CLS]", path), self._id("[PAD]", path)
        self._last = [self._id("[SEP]", path)] if sep else []
        self.max_length, self.fixed = max_length, fixed
        self.vocab_size = self._model.get_vocab_size()
        self.sha256 = hashlib.sha256(content + repr((max_length, fixed, sep)).encode()).hexdigest()

    def _id(self, token: str, path: Path) -> int:
        if (found := self._model.token_to_id(token)) is None:
            raise UserError(f"The tokenizer {path} has no {token}; take one of a BERT model.")
        return found

    @staticmethod
    def clean(text: str) -> str:
        """Clean a caption before it is encoded."""
        return clean_caption(text)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, not padded."""
        words = self.max_length - 1 - len(self._last)
        encoded = self._model.encode_batch(list(texts), add_special_tokens=False)
        return [[self._first, *text.ids[:words], *self._last] for text in encoded]

    def pad(self, encoded: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Pad encoded texts to ids (B, L) and mask (B, L) int64, 1 for tokens."""
        return padded(encoded, self.max_length if self.fixed else max(map(len, encoded)), self._pad)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode and pad texts: ids (B, L), mask (B, L) int64."""
        return self.pad(self.encode(texts))


def padded(encoded: list[list[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Fill encoded texts with `pad` on the right: ids and mask (B, length) int64, 1 for tokens."""
    ids = torch.full((len(encoded), length), pad)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(encoded):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return ids, mask


class CLIPTokenizer(Tokenizer):
    """Encode captions in CLIP's byte pairs with open_clip: start token, words, end token.

    A caption that is cut keeps its end token. The mask is 1 up to and including it. Only CLIP's own
    cleaning is applied.

    max_length  most ids of a caption, both special tokens included; batches are always padded to it
    """

    def __init__(self, max_length: int = 77):
        self._model = open_clip.tokenizer.SimpleTokenizer(context_length=max_length)
        self._pad, self.max_length, self.fixed = 0, max_length, True
        self.vocab_size = self._model.vocab_size
        about = (open_clip.__version__, max_length, sorted(self._model.encoder))
        self.sha256 = hashlib.sha256(repr(about).encode()).hexdigest()

    @staticmethod
    def clean(text: str) -> str:
        """Return the caption unchanged, since `encode` cleans it."""
        return text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, not padded."""
        first, last = self._model.sot_token_id, self._model.eot_token_id
        return [[first, *self._model.encode(text)[: self.max_length - 2], last] for text in texts]


def train_tokenizer(texts: list[str], path: Path | str, vocab_size: int = 30522) -> Path:
    """Write a tokenizer.json of the special tokens and the most frequent words of the texts.

    Texts are cleaned first. Equal texts give an equal file: words of one frequency stand in
    alphabetical order.
    """
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="[UNK]"))
    model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        normal = model.normalizer.normalize_str(clean_caption(text))
        counts.update(word for word, _ in model.pre_tokenizer.pre_tokenize_str(normal))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    kept = words[: max(0, vocab_size - len(SPECIAL_TOKENS))]
    ids = {word: i for i, word in enumerate(SPECIAL_TOKENS + kept)}
    model.model = tokenizers.models.WordLevel(ids, unk_token="[UNK]")
    model.add_special_tokens(SPECIAL_TOKENS)
    with atomic_write(path) as temporary:
        temporary.write_text(model.to_str(pretty=True))
    return Path(path)


def distinct_captions(
    table: CaptionTable, clean: Callable[[str], str] = clean_caption
) -> tuple[list[str], np.ndarray]:
    """List the distinct cleaned captions by first appearance.

    Also returns (M,): for each caption of the table its row among them.
    """
    rows, texts = pd.factorize(table.captions.text.map(clean))
    return list(texts), rows


def caption_batches(
    texts: list[str], tokenizer: Tokenizer, batch_size: int = 128
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids (B, L) and mask (B, L) of the cleaned captions `texts`, in their order."""
    for start in range(0, len(texts), batch_size):
        yield tokenizer(texts[start : start + batch_size])
