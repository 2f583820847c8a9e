"""What a system starts from: which weights fill which tower, and which tokenizer reads its captions.

`12_starting_weights` writes one `Start` per system; the training notebooks read it. Nothing is filled silently.
"""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from nbhelpers import weights
from nbhelpers.data.loading import Tokenizer
from nbhelpers.errors import UserError, atomic_write

DROPPED_HEADS = ("classifier.*", "head.*", "fc.*", "head_dist.*")  # of published classifiers, which towers do not have


@dataclass(frozen=True)
class Tower:
    """One tower's weights: file, its sha256, where it came from, and the kind that records know."""

    name: str
    path: str
    source: str
    sha256: str
    kind: str      # package | hub | file | stand-in | random

    @classmethod
    def stand_in(cls, name: str, path: Path, source: str) -> Tower:
        """Weights that this project trained itself."""
        return cls(name, str(path), source, weights.sha256(path), "stand-in")

    @classmethod
    def resolved(cls, name: str, folder: Path | None = None) -> Tower:
        """Public weights by name or path, as `weights.resolve` finds them. UserError if they are missing."""
        found = weights.resolve(name, folder)
        return cls(found.name, str(found.path), found.source, found.sha256, found.kind)

    def state(self) -> dict[str, Tensor]:
        """The tensors under the names of the module that `backbones` builds."""
        if self.name == "efficientnet_lite0":
            return weights.lite0_state(self.path)
        if self.name in ("minilm", "bert_base"):
            return weights.bert_state(self.path)
        return weights.read_state_dict(self.path)


@dataclass(frozen=True)
class Start:
    """towers: attribute of the model ("vision_encoder", ...) -> Tower. What is not named there starts at random.

    tokenizer   path of a tokenizer.json or of its folder, with the longest caption in tokens
    classes     scene classes the prior was fitted on, in its order; empty without a fitted prior
    """

    tokenizer: str
    max_length: int
    towers: dict[str, Tower]
    fixed: bool = False
    classes: list[str] = field(default_factory=list)

    def write(self, path: Path) -> Path:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Start:
        """UserError if `12_starting_weights` has not written it yet."""
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist; run 12_starting_weights first, it says what each system starts from.")
        content = json.loads(Path(path).read_text())
        return cls(**{**content, "towers": {name: Tower(**tower) for name, tower in content["towers"].items()}})

    def read_tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer, self.max_length, self.fixed)

    def fill(self, model: nn.Module) -> nn.Module:
        """Loads every tower that `model` has. UserError, nothing partial, if a file does not fit its tower."""
        for attribute, tower in self.towers.items():
            if module := getattr(model, attribute, None):
                weights.load_into(module, tower.state(), allow_unexpected=DROPPED_HEADS)
        return model

    def sha256s(self) -> list[str]:
        return [tower.sha256 for tower in self.towers.values()]

    def record(self) -> list[dict]:
        """The `weights` entry of a record."""
        return [{"name": f"{attribute}: {t.name}", "source": t.source, "sha256": t.sha256, "kind": t.kind}
                for attribute, t in self.towers.items()]
