"""Turn captions into token ids for BITA: BERT's words in stage 1, byte pairs for the decoder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from torch import Tensor

from nbhelpers.data.tokenization import Tokenizer, padded
from nbhelpers.errors import UserError
from nbhelpers.papers import bita
from nbhelpers.papers.bita import BITAConfig
from nbhelpers.towers import backbones
from nbhelpers.towers.starting_weights import Start

END = "Ċ"  # a line break, as byte pairs write it: what ends a caption


class AlignmentTokenizer(Tokenizer):
    """Encode captions as BERT does for stage 1: [CLS], the words, [SEP].

    Every caption is padded to exactly 32 ids, since Fourier mixing reads the padding too.
    """

    clean = staticmethod(bita.clean_bita_caption)

    def __init__(self, path: Path | str):
        super().__init__(path, BITAConfig.text_length, fixed=True, sep=True)


class DecoderTokenizer:
    """Byte pairs of a language model, padded on the right to `max_length`.

    A text becomes: first token, prompt, caption, line break.
    path           a tokenizer.json, or the folder that holds one, or vocab.json and merges.txt
    name           in backbones.LANGUAGE, which knows the first token and that of padding
    prompt, space  what stands before each caption, and whether a space stands between; the release
                   forgot the space
    prompt_length  ids that are the same in all captions: the first token and those of the prompt
    A caption that is cut loses its line break, as in the release.
    """

    clean = staticmethod(bita.clean_bita_caption)

    def __init__(
        self,
        path: Path | str,
        name: str,
        prompt: str = "",
        space: bool = True,
        max_length: int = BITAConfig.text_length,
    ):
        self.path, self.name, self.prompt, self.space, self.max_length = (
            Path(path),
            name,
            prompt,
            space,
            max_length,
        )
        self._model = _byte_pairs(self.path)
        _, first, pad = backbones.LANGUAGE[name]
        self.first, self.pad_id, self.end = (self._id(token) for token in (first, pad, END))
        self.vocab_size, self.prompt_length = self._model.get_vocab_size(), len(self.prompt_ids())
        content = repr((self._model.to_str(), name, prompt, space, max_length))
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()

    def _id(self, token: str) -> int:
        if (found := self._model.token_to_id(token)) is None:
            raise UserError(
                f"The tokenizer in {self.path} has no {token!r}; take that of '{self.name}'."
            )
        return found

    def prompted(self, prompt: str, space: bool = True) -> DecoderTokenizer:
        """Return the same tokenizer with another prompt."""
        return DecoderTokenizer(self.path, self.name, prompt, space, self.max_length)

    def prompt_ids(self) -> list[int]:
        """Return the ids of the first token and the prompt."""
        return [self.first, *self._model.encode(self.prompt, add_special_tokens=False).ids]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, not padded."""
        start = self.prompt + (" " if self.prompt and self.space else "")
        encoded = self._model.encode_batch(
            [f"{start}{text}\n" for text in texts], add_special_tokens=False
        )
        return [[self.first, *text.ids][: self.max_length] for text in encoded]

    def pad(self, encoded: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Encoded texts -> ids and mask (B,max_length) int64, 1 where a token stands."""
        return padded(encoded, self.max_length, self.pad_id)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask (B, L) of the texts."""
        return self.pad(self.encode(texts))

    def decode(self, ids: Tensor) -> list[str]:
        """Generated ids (B,n) -> captions, without what follows the line break."""
        rows = [row[: row.index(self.end)] if self.end in row else row for row in ids.tolist()]
        special = {self.first, self.pad_id}
        return [
            text.strip()
            for text in self._model.decode_batch(
                [[i for i in row if i not in special] for row in rows]
            )
        ]


def _byte_pairs(path: Path) -> tokenizers.Tokenizer:
    single = path if path.is_file() else path / "tokenizer.json"
    try:
        if single.is_file():
            return tokenizers.Tokenizer.from_file(str(single))
        model = tokenizers.Tokenizer(
            tokenizers.models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
        )
    # the library raises bare exceptions for what is missing and for what is broken
    except Exception as error:
        raise UserError(
            f"{path} holds no tokenizer of byte pairs ({error}); it needs tokenizer.json, or"
            " vocab.json and merges.txt."
        ) from error
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return model


def decoder_tokenizer(start: Start, config: BITAConfig) -> DecoderTokenizer:
    """That of the start's language model, beside whose weights it lies."""
    path = Path(start.towers["opt_model"].path)
    return DecoderTokenizer(path if path.is_dir() else path.parent, config.decoder)


@dataclass(frozen=True, eq=False)
class Tokenizers:
    """What reads captions: `alignment` in stage 1, `decoder` in stage 2.

    In fine-tuning the decoder's has the configuration's prompt.
    """

    alignment: Tokenizer
    decoder: DecoderTokenizer
