"""What keys hold, by mutation: each deciding thing changed once gives another key, each cosmetic
thing the same one.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coloured_set import coloured, words
from PIL import Image

import nbhelpers
from nbhelpers import code_identity, figures
from nbhelpers.code_identity import Code, code_digest
from nbhelpers.data import (
    array_store,
    augment,
    decoding,
    image_input,
    images,
    loaders,
    pixel_cache,
    table,
    tokenization,
)
from nbhelpers.data.archives import open_images
from nbhelpers.data.augment import TestTransform, TrainTransform
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.data.scenes import drawing, generate, scene_captions
from nbhelpers.data.scenes.recipes import water
from nbhelpers.data.streaming import ShardDataset
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.keys import key_digest, modules_digest
from nbhelpers.metrics import caption_scores, recall
from nbhelpers.papers import baseline, bita, cfitr, clip, dual_encoder, ift, pe_rsitr, pir, pir_clip
from nbhelpers.results import leaderboard, records
from nbhelpers.runs import start as start_
from nbhelpers.systems import image_folder
from nbhelpers.tasks import (
    caption_stages,
    caption_tokens,
    captioning,
    pretraining,
    retrieval,
    stand_ins,
    two_stage,
)
from nbhelpers.tasks.caption_tokens import AlignmentTokenizer, DecoderTokenizer, Tokenizers
from nbhelpers.tasks.captioning import CaptionTask
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.towers import (
    backbones,
    checkpoints,
    key_names,
    public_weights,
    safe_pickle,
    starting_weights,
)
from nbhelpers.towers.starting_weights import Start, Tower
from nbhelpers.training import distributed, loop, schedule
from nbhelpers.training.loop import checkpoint_key
from nbhelpers.training.schedule import TrainConfig

IMAGE = image_input.ImageInput(112)
CONFIG = TrainConfig(epochs=3, lr=0.01)
# of the coloured squares, in records
FINGERPRINT = "0b487c6ea9f131248aa0dd86897fe24b3576bce0a72cf9cbcb05932a219c77fe"
ROOT = Path(nbhelpers.__file__).parent
CODE = code_identity._this_package()
SYSTEMS = {
    "pir": (pir.PIR,),
    "pir_clip": (pir_clip.PIRCLIP,),
    "pe_rsitr": (pe_rsitr.PERSITR,),
    "cfitr": (cfitr.CFITR, cfitr.Captions, two_stage.validate),
    "bita": (caption_stages.begin_stage,),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def data(folder):
    return coloured(folder / "set")


@pytest.fixture(scope="module")
def tokenizer(data, folder):
    return words(data, folder)


@pytest.fixture(scope="module")
def task(data, tokenizer):
    return RetrievalTask(data, tokenizer, IMAGE, workers=1)


@pytest.fixture(scope="module")
def start():
    return Start(
        "words.json",
        12,
        {"vision_encoder": Tower("swin", "swin.bin", "somewhere", "a" * 64, "file")},
    )


@pytest.fixture(scope="module")
def captions(data, folder, tokenizer):
    """A CaptionTask of the tiny size, without cached features."""
    texts = [bita.clean_bita_caption(text) for text in data.table.captions.text]
    decoder = DecoderTokenizer(
        stand_ins.train_byte_pairs(texts, folder / "lm" / "tokenizer.json", 300), "opt_standin"
    )
    reading = AlignmentTokenizer(folder / "tokenizer.json")
    return CaptionTask(
        data,
        bita.BITAConfig.tiny(reading.vocab_size, decoder.vocab_size),
        Tokenizers(reading, decoder),
        workers=1,
    )


@pytest.fixture(scope="module")
def keys(task, captions, start):
    """Give the key of every system, under the code of the package as it is or changed."""

    def keys() -> dict[str, str]:
        content = {
            system: captions.content("finetune") if system == "bita" else task.content()
            for system in SYSTEMS
        }
        return {
            system: checkpoint_key([CONFIG], content[system], start.content(), 0, *SYSTEMS[system])
            for system in SYSTEMS
        }

    return keys


@pytest.fixture(scope="module")
def before(keys):
    return keys()


@pytest.fixture
def changed(monkeypatch):
    """A context in which modules of the package have another source: name -> text."""

    @contextmanager
    def changed(sources: dict[str, str]):
        other = with_sources(sources)
        monkeypatch.setattr(code_identity, "_this_package", lambda: other)
        code_identity._digest_of.cache_clear()
        yield
        monkeypatch.setattr(code_identity, "_this_package", lambda: CODE)
        code_identity._digest_of.cache_clear()

    monkeypatch.setattr(code_identity, "_this_package", lambda: CODE)
    return changed


def with_sources(sources: dict[str, str]) -> Code:
    """The package with other sources; what stays is not parsed again, nor read where only what is
    computed differs.
    """
    other = Code(CODE.sources | sources, CODE.packages)
    other._modules = {name: module for name, module in CODE._modules.items() if name not in sources}
    if all(
        other.module(name).definitions.keys() == CODE.module(name).definitions.keys()
        for name in sources
        if name in CODE.sources
    ):
        other._read = {here: read for here, read in CODE._read.items() if here[0] not in sources}
    return other


class Bare(ast.NodeTransformer):
    """Takes docstrings and annotations away."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        if "ClassVar" not in ast.unparse(node.annotation):
            node.annotation = ast.Name("object")
        return node

    def visit_Expr(self, node):
        return ast.Pass() if isinstance(node.value, ast.Constant) else node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)


class Mutant(ast.NodeTransformer):
    """Change the first operator, comparison or number of a function, or add a statement."""

    def __init__(self, name: str):
        self.path, self.within, self.done = name.split("."), [], False

    def _enter(self, node):
        self.within.append(node.name)
        self.generic_visit(node)
        if self.within == self.path and not self.done and not isinstance(node, ast.ClassDef):
            node.body.append(ast.parse("changed = 1").body[0])
            self.done = True
        self.within.pop()
        return node

    visit_FunctionDef = visit_ClassDef = _enter

    def _changed(self, node, **fields):
        self.generic_visit(node)
        if self.within[: len(self.path)] == self.path and not self.done:
            self.done = True
            for name, value in fields.items():
                setattr(node, name, value)
        return node

    def visit_BinOp(self, node):
        return self._changed(node, op=ast.Sub() if isinstance(node.op, ast.Add) else ast.Add())

    def visit_Compare(self, node):
        return self._changed(
            node, ops=[ast.NotEq() if isinstance(one, ast.Eq) else ast.Eq() for one in node.ops]
        )

    def visit_Constant(self, node):
        return (
            self._changed(node, value=node.value + 1) if type(node.value) in (int, float) else node
        )


def mutated(function) -> dict[str, str]:
    """The source of a function's module, with one change in the function."""
    function = getattr(function, "__wrapped__", function)
    tree, mutant = (
        Bare().visit(ast.parse(CODE.sources[function.__module__])),
        Mutant(function.__qualname__),
    )
    text = ast.unparse(ast.fix_missing_locations(mutant.visit(tree)))
    assert mutant.done, function
    return {function.__module__: text}


# ---- code
EVERY_SYSTEM = [
    loop._Trainer._train_epoch,
    loop._parameter_groups,
    schedule.lr_lambda,
    distributed.gather,
    distributed.accelerator,
    starting_weights.Start.fill,
    starting_weights.Tower.state,
    starting_weights.seeded,
    checkpoints.load_into,
    key_names.clip_state,
    safe_pickle.read_file,
    table.CaptionTable.owner,
    decoding.decode,
    decoding._by_pillow,
    images.resize,
    pixel_cache.DecodedCache.resized,
    augment.random_crop,
    augment.TrainTransform.__call__,
    augment.Normalizer.__call__,
    loaders._Pairs.draw,
    loaders.PairDataset._fields,
    loaders.FeatureDataset._fields,
    loaders.EpochSampler.__iter__,
    loaders.train_loader,
    array_store.storable,
    backbones.vision_tower,
]
OF_ONE = {
    "pir": [
        retrieval.RetrievalTask.train_loader,
        retrieval.RetrievalTask._image_features,
        retrieval.RetrievalTask.embeddings,
        tokenization.clean_caption,
        tokenization.Tokenizer.encode,
        recall.evaluate,
        dual_encoder.turned,
        backbones.image_tokens,
        pir.affiliation_loss,
        pir.PIR.embed_images,
    ],
    "pir_clip": [
        pir_clip.soft_belief,
        pir.contrastive_loss,
        clip.pool_image,
        backbones.instruction_encoder,
    ],
    "pe_rsitr": [
        pe_rsitr.through_blocks,
        pe_rsitr.MRSAdapter.forward,
        clip.pool_text,
        pir.triplet_loss,
    ],
    "cfitr": [
        cfitr.Captions.draw,
        cfitr.triplet_loss,
        two_stage.validate,
        two_stage.two_stage,
        two_stage.split_inputs,
        backbones.vilt_model,
    ],
    "bita": [
        ift.IFT.__init__,
        bita.targets,
        captioning.say,
        captioning.CaptionTask._pairs,
        caption_tokens.DecoderTokenizer.encode,
        caption_stages.build_captioner,
        caption_scores.tokenize_by_rules,
        backbones.language_model,
        captioning.PairsOfAll.__getitems__,
    ],
}
OF_NONE = [
    figures.save,
    records.new,
    leaderboard.boards,
    start_.Run.write_record,
    retrieval.write_record,
    retrieval.compare,
    pir.read,
    cfitr.load_release,
    image_folder.search,
    starting_weights.paper_start,
    public_weights.resolve,
    caption_scores.write_record,
    Code.digest,
    key_digest,
]


def named(function) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"


@pytest.mark.parametrize("function", EVERY_SYSTEM, ids=named)
def test_a_changed_computation_changes_the_key_of_every_system(keys, before, changed, function):
    with changed(mutated(function)):
        found = keys()
    assert all(found[system] != before[system] for system in SYSTEMS)


@pytest.mark.parametrize(
    "system, function",
    [(system, function) for system, some in OF_ONE.items() for function in some],
    ids=lambda one: one if isinstance(one, str) else named(one),
)
def test_a_changed_computation_changes_the_key_of_a_system(keys, before, changed, system, function):
    with changed(mutated(function)):
        assert keys()[system] != before[system]


@pytest.mark.parametrize("function", OF_NONE, ids=named)
def test_what_a_training_does_not_pass_through_leaves_every_key(keys, before, changed, function):
    with changed(mutated(function)):
        assert keys() == before


def test_a_system_does_not_know_the_losses_of_another(keys, before, changed):
    for function, systems_of_it in (
        (bita.targets, {"bita"}),
        (cfitr.triplet_loss, {"cfitr"}),
        (pir.affiliation_loss, {"pir", "pir_clip"}),
    ):
        with changed(mutated(function)):
            assert {
                system for system, key in keys().items() if key != before[system]
            } == systems_of_it
    with changed(
        {
            "nbhelpers.papers.pir": (
                CODE.sources["nbhelpers.papers.pir"] + "\n\ndef another(x):\n    return x + 1\n"
            )
        }
    ):
        assert keys() == before


def test_comments_formatting_docstrings_and_annotations_leave_every_key(keys, before, changed):
    texts = {name: CODE.sources[name] for name, _ in CODE._read if CODE.sources[name]}
    bare = {name: ast.unparse(Bare().visit(ast.parse(text))) for name, text in texts.items()}
    commented = {
        name: f'"""Another text."""\n# A comment.\n{bare[name]}\n# The end.\n' for name in texts
    }
    assert len(texts) > 20 and all(bare[name] != text for name, text in texts.items())
    for sources in (bare, commented):
        sources = {
            name: text.replace("from __future__ import annotations", "")
            for name, text in sources.items()
        }
        with changed(sources):
            assert keys() == before


MOVED = {
    "nbhelpers.tasks.retrieval": "nbhelpers.tasks.retrieval",
    "nbhelpers.training.loop": "nbhelpers.train.loop",
    "nbhelpers.towers.checkpoints": "nbhelpers.io.weights",
    "nbhelpers.towers.starting_weights": "nbhelpers.train.starting",
    "nbhelpers.data.pixel_cache": "nbhelpers.io.pixels",
    "nbhelpers.papers.pir": "nbhelpers.pir.model",
    "nbhelpers.towers.backbones": "nbhelpers.towers",
    "nbhelpers.errors": "nbhelpers.io.errors",
    "nbhelpers.metrics.recall": "nbhelpers.eval.recall",
}


class Moved(ast.NodeTransformer):
    """Lets a module import others from where they were moved to."""

    def visit_ImportFrom(self, node):
        lines = [
            f"from {MOVED.get(node.module, node.module)} import {one.name} as"
            f" {one.asname or one.name}"
            for one in node.names
            if f"{node.module}.{one.name}" not in MOVED
        ]
        lines += [
            f"import {MOVED[f'{node.module}.{one.name}']} as {one.asname or one.name}"
            for one in node.names
            if f"{node.module}.{one.name}" in MOVED
        ]
        return ast.parse("\n".join(reversed(lines))).body


def test_a_moved_file_leaves_the_digest():
    moved = {
        MOVED.get(name, name): ast.unparse(Moved().visit(ast.parse(text)))
        for name, text in CODE.sources.items()
    }
    for root in (
        pir.PIR,
        retrieval.RetrievalTask,
        loop.load_or_train,
        pixel_cache.DecodedCache,
        recall.evaluate,
    ):
        there = SimpleNamespace(__module__=MOVED[root.__module__], __qualname__=root.__qualname__)
        assert Code(moved, CODE.packages).digest(there) == CODE.digest(root)


def test_a_moved_definition_leaves_the_digest():
    text = CODE.sources["nbhelpers.towers.starting_weights"]
    seeded = next(part for part in ast.parse(text).body if getattr(part, "name", "") == "seeded")
    without = text.replace(ast.get_source_segment(text, seeded), "")
    moved = {
        "nbhelpers.seeds": f"import torch as t\n{ast.unparse(seeded).replace('torch', 't')}",
        "nbhelpers.towers.starting_weights": without.replace(
            "import torch\n",
            "import torch\nfrom nbhelpers import seeds\nfrom nbhelpers.seeds import seeded\n",
        ),
    }
    assert "def seeded" not in moved["nbhelpers.towers.starting_weights"]
    for root in (starting_weights.Start, stand_ins.fit_scenes):
        assert with_sources(moved).digest(root) == CODE.digest(root)


# ---- a small package
A = (
    "import numpy as np\nfrom p import b\nLIMIT = 3\n\ndef f(x):\n    return b.g(np.abs(x)) +"
    " LIMIT\n"
)
B = (
    "def g(x):\n    return helper(x) * 2\n\ndef helper(x):\n    return x\n\ndef other(x):\n   "
    " return x - 1\n"
)


def digest_of_f(a: str = A, b: str = B, **more: str) -> str:
    modules = {"p": "", "p.a": a, "p.b": b} | {
        f"p.{name.replace('_', '.')}": text for name, text in more.items()
    }
    return Code(modules, {"p"}).digest(SimpleNamespace(__module__="p.a", __qualname__="f"))


@pytest.mark.parametrize(
    "a, b",
    [
        (A.replace("import numpy as np", "from numpy import abs").replace("np.abs", "abs"), B),
        (A.replace("import numpy as np", "import numpy").replace("np.abs", "numpy.abs"), B),
        (A.replace("from p import b", "from p.b import g").replace("b.g", "g"), B),
        (A.replace("from p import b", "from . import b"), B),
        (A.replace("from p import b", "from .b import g as h").replace("b.g", "h"), B),
        (A.replace("from p import b", "import p.b").replace("b.g", "p.b.g"), B),
        (
            A.replace("from p import b\n", "").replace(
                "    return", "    from p import b\n    return"
            ),
            B,
        ),
        (
            A.replace(
                "from p import b",
                "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nfrom p"
                " import b",
            ),
            B,
        ),
        (A.replace("def f(x):", 'def f(x: int) -> "float":\n    """Says."""\n    y: int'), B),
        (A.replace("LIMIT = 3", "LIMIT: int = 3"), B),
        (
            A.replace("LIMIT", "(  # why\n        LIMIT)").replace(
                "(  # why\n        LIMIT) = 3", "LIMIT = 3"
            ),
            B,
        ),
        (A, B + "\nclass Unused:\n    pass\n"),
        (A, B.replace("x - 1", "x - 2")),
    ],
    ids=str,
)
def test_what_is_cosmetic(a, b):
    assert (a, b) != (A, B) and digest_of_f(a, b) == digest_of_f()


@pytest.mark.parametrize(
    "a, b",
    [
        (A.replace("LIMIT = 3", "LIMIT = 4"), B),
        (A.replace("LIMIT = 3", "LIMIT = 3.0"), B),
        (A.replace("+ LIMIT", "- LIMIT"), B),
        (A.replace("np.abs", "np.exp"), B),
        (A.replace("import numpy as np", "import torch as np"), B),
        (A, B.replace("* 2", "* 3")),
        (A, B.replace("return x\n", "return x + 1\n")),
        (A.replace("b.g", "b.other"), B),
        (A, B.replace("helper(x) *", "other(x) *")),
        (A + "LIMIT += 1\n", B),
        (A + "import cv2\ncv2.setNumThreads(1)\n", B),
        (A.replace("def f(x):", "def f(x, LIMIT=5):"), B),
        (A.replace("def f", "@np.vectorize\ndef f"), B),
        (A.replace("    return", "    global LIMIT\n    LIMIT = 1\n    return"), B),
        (A, B + "\n@other\ndef registered(x):\n    return x\n"),
    ],
    ids=str,
)
def test_what_decides(a, b):
    assert (a, b) != (A, B) and digest_of_f(a, b) != digest_of_f()


def test_of_two_definitions_of_one_name_the_digest_knows_which_is_meant():
    """Both are reached in both cases, and the functions that name them read alike."""
    a = (
        "from p.b import {0} as one, {1} as two\nfrom p import b\ndef f(x):\n    return one(x) -"
        " two(x)\n"
    )
    b, c = "import p.c\ndef g(x):\n    return x\nh = p.c.g\n", "def g(x):\n    return -x\n"
    assert digest_of_f(a.format("g", "h"), b, c=c) != digest_of_f(a.format("h", "g"), b, c=c)
    same = "from p import {0}\ndef f(x):\n    return {0}.g(x), b.g, c.g\n"
    assert digest_of_f("from p import c\n" + same.format("b"), b, c=c) != digest_of_f(
        "from p import b\n" + same.format("c"), b, c=c
    )


def test_variables_that_share_a_name_with_a_definition_are_not_that_definition():
    local = (
        A.replace("def f(x):", "def f(x, other=0):\n    b_ = [helper for helper in x if helper]")
        + "from p.b import other\n"
    )
    assert digest_of_f(local) == digest_of_f(local, B.replace("x - 1", "x - 2"))
    named = A.replace("+ LIMIT", "+ sum(other(y) for y in x)") + "from p.b import other\n"
    assert digest_of_f(named) != digest_of_f(named, B.replace("x - 1", "x - 2"))


def test_members_are_followed_through_self_and_bases():
    text = (
        "class Base:\n    def step(self):\n        return 1\n    def unused(self):\n        return"
        " 2\nclass Child(Base):\n    SIZE = 3\n    def run(self):\n        return self.step() +"
        " self.SIZE\n"
    )

    def digest(text, *names):
        return Code({"p": "", "p.a": text}).digest(
            (SimpleNamespace(__module__="p.a", __qualname__="Child"), *names)
        )

    before = digest(text, "run")
    for number, differs in ((1, True), (2, False), (3, True)):
        assert (digest(text.replace(str(number), "9"), "run") != before) == differs
    with pytest.raises(UserError, match="Child has no member walk"):
        digest(text, "walk")


def test_further_code_is_read_as_text_and_followed(changed):
    cell = (
        "from nbhelpers.papers import pir\n\nclass Mine(pir.PIR):\n    def loss(self, batch):\n    "
        "    return pir.triplet_loss(batch)\n"
    )
    before, outside = code_digest(cell), code_digest(Outside)
    assert (
        code_digest(cell.replace("loss(self", "loss( self") + "# mine\n")
        == before
        != code_digest(cell.replace("batch)\n", "-batch)\n"))
    )
    with changed(mutated(pir.triplet_loss)):
        assert code_digest(cell) != before
    with pytest.raises(UserError, match=r"is not Python \(line 1"):
        code_digest("%matplotlib inline")
    with changed(mutated(pir.PIR.loss)):
        assert code_digest(Outside) not in (outside, code_digest(pir.PIR))
    scope = {"__name__": "__main__"}
    exec(compile(cell, "<cell>", "exec"), scope)
    with pytest.raises(
        UserError, match="source of Mine cannot be read by itself; give that of its cell as a text"
    ):
        code_digest(scope["Mine"])  # `before` is made as advised
    with pytest.raises(UserError, match=r"`from p.b import \*` hides"):
        digest_of_f(A.replace("from p import b", "from p.b import *"))
    digest_of_f(A.replace("from p import b", "from p.b import g").replace("b.g", "g"))


class Outside(pir.PIR):
    """A model that is not of the package."""


# ---- content
def with_table(data, images=None, captions=None):
    table = data.table
    return replace(
        data,
        table=CaptionTable(
            table.name,
            table.images if images is None else images,
            table.captions if captions is None else captions,
        ),
    )


CELLS = {
    "imports": "import torch\nfrom torch import nn\nWIDTH = 3",
    "helper": "def double(x):\n    return 2 * x",
    "function": "def head(width):\n    return double(nn.Linear(width, WIDTH))",
    "class": "class Head(nn.Module):\n    def forward(self, x):\n        return double(x)",
}


def of_cells(program: Path | None = None, **edited: str) -> tuple[str, str]:
    """The digests of a function and a class of cells that run as a notebook's do.

    `program` runs them from a file, as the command `train` does.
    """
    script = f"""
import linecache
for name, cell in {CELLS | edited}.items():
    linecache.cache[name] = len(cell), None, cell.splitlines(keepends=True), name
    exec(compile(cell, name, "exec"), globals())
from nbhelpers.code_identity import code_digest
print(code_digest(head), code_digest(Head))
"""
    if program:
        program.write_text(script)
    command = [sys.executable, *([str(program)] if program else ["-c", script])]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(found.stdout.split())


def test_what_a_cell_defines_counts_with_all_that_it_names():
    first = of_cells()
    assert of_cells(function=f"# why\n{CELLS['function']}  # a comment") == first
    assert of_cells(imports="import torch\nfrom torch import nn\nWIDTH = 4")[0] != first[0]
    other = of_cells(helper="def double(x):\n    return 3 * x")
    assert other[0] != first[0] and other[1] != first[1]
    assert of_cells(function="def head(width):\n    return nn.Linear(width, 3)") != first
    # a variable of the notebook that has the name of an argument is another thing
    assert of_cells(imports=f"{CELLS['imports']}\nx, width = 5, 6") == first
    mutual = "def double(x):\n    return head(x) if x is None else 2 * x"
    assert of_cells(helper=mutual)[0] != first[0]


def test_cells_count_the_same_where_a_program_runs_them(tmp_path):
    assert of_cells(program=tmp_path / "program.py") == of_cells()


def test_everything_in_a_table_counts_and_so_does_its_order(data):
    table, before = data.table, data.content()
    captions = table.captions.copy()
    captions.loc[0, "text"] += "!"
    swapped = table.captions.iloc[[1, 0, *range(2, len(table.captions))]]
    other_scene, other_split = table.images.copy(), table.images.copy()
    other_scene.loc[0, "scene"], other_split.loc[0, "split"] = "sea", "val"
    others = [
        with_table(data, captions=captions),
        with_table(data, captions=swapped),
        with_table(data, images=other_scene),
        with_table(data, images=other_split),
        with_table(data, images=table.images.iloc[::-1]),
    ]
    assert len({one.table.content() for one in others} | {before["table"]}) == 6
    assert replace(data, table=replace(table, name="another"), where=["said"]).content() == before
    unseen = with_table(data, images=other_scene, captions=swapped)  # records stay comparable
    assert unseen.table.fingerprint() == table.fingerprint()


def test_the_fingerprint_of_records_is_what_it_was(data):
    assert data.table.fingerprint() == FINGERPRINT


def test_a_pixel_counts_and_the_folder_does_not(data, folder, tmp_path):
    store = data.pixels
    files = list(data.table.images.file)
    for name in files:
        (tmp_path / name).write_bytes((folder / "set" / "images" / name).read_bytes())
    again = DecodedCache.build(open_images(tmp_path), files, tmp_path / "cache")
    assert (
        replace(data, pixels=again).content() == data.content()
        and again.folder.parent != store.folder.parent
    )
    pixels = np.array(Image.open(tmp_path / files[3]))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(tmp_path / files[3])
    other = DecodedCache.build(open_images(tmp_path), files, tmp_path / "cache")
    assert replace(data, pixels=other).content() != data.content()


def test_what_decides_a_retrieval_task_counts_and_nothing_else(
    data, tokenizer, task, folder, tmp_path
):
    longer = tokenization.Tokenizer(folder / "tokenizer.json", 13, True)
    torch.manual_seed(0)
    config = baseline.FrozenConfig.tiny(tokenizer.vocab_size)
    towers = baseline.FrozenHeads(config)
    frozen = FrozenTowers(towers, tmp_path)
    others = [
        RetrievalTask(data, longer, IMAGE),
        RetrievalTask(data, tokenizer, replace(IMAGE, std=(0.5, 0.5, 0.5))),
        RetrievalTask(data, tokenizer, image_input.ImageInput(96)),
        RetrievalTask(data, tokenizer, IMAGE, seed=1),
        RetrievalTask(data, tokenizer, IMAGE, frozen=frozen),
        RetrievalTask(data, tokenizer, IMAGE, frozen=FrozenTowers(towers, tmp_path, views=2)),
        RetrievalTask(data, tokenizer, IMAGE, frozen=frozen, precision="bf16"),
        RetrievalTask(
            data, tokenizer, IMAGE, frozen=FrozenTowers(baseline.FrozenHeads(config), tmp_path)
        ),
    ]
    assert len({json.dumps(one.content(), default=str) for one in [task, *others]}) == 9
    assert RetrievalTask(data, tokenizer, IMAGE, workers=7).content() == task.content()


def test_what_decides_a_stage_of_bita_counts(data, captions, folder, tmp_path):
    plain = {stage: captions.content(stage) for stage in bita.STAGES}
    assert len({json.dumps(one, default=str) for one in plain.values()}) == 3
    reader, read = bita.Aligner(captions.config), Tokenizers(captions.words, captions.decoder)
    given = {"data": data, "config": captions.config, "tokenizers": read, "workers": 1}
    given["frozen"] = FrozenTowers(reader, tmp_path)

    def of(**changes):
        task = CaptionTask(**given | changes)
        return {stage: task.content(stage) for stage in bita.STAGES}

    assert of(frozen=None, workers=5) == plain
    before = of()
    assert of(workers=5, frozen=FrozenTowers(reader, tmp_path / "elsewhere")) == before
    longer = tokenization.Tokenizer(folder / "tokenizer.json", 30, True, True)
    cut = DecoderTokenizer(captions.decoder.path, "opt_standin", max_length=30)
    for changes, stages in (
        ({"seed": 1}, bita.STAGES),
        ({"frozen": None}, bita.STAGES),
        ({"frozen": FrozenTowers(reader, tmp_path, views=2)}, bita.STAGES),
        ({"others": [data]}, ("stage1", "stage2")),
        ({"tokenizers": replace(read, alignment=longer)}, ("stage1",)),
        ({"tokenizers": replace(read, decoder=cut)}, ("stage2", "finetune")),
        ({"config": replace(captions.config, prompt="a view of")}, ("finetune",)),
    ):
        assert {
            stage for stage, content in of(**changes).items() if content != before[stage]
        } == set(stages), changes


def test_what_a_training_starts_from_counts_and_its_place_does_not(start):
    tower, before = start.towers["vision_encoder"], start.content()
    for changes in ({"sha256": "b" * 64}, {"layout": "clip"}, {"left": ["head.*"]}):
        assert (
            replace(start, towers={"vision_encoder": replace(tower, **changes)}).content() != before
        )
    assert (
        replace(start, towers={"text_encoder": tower}).content()
        != before
        != replace(start, options={"clip": "vit_b32"}).content()
    )
    elsewhere = replace(tower, path="/elsewhere", source="the same file")
    assert replace(start, towers={"vision_encoder": elsewhere}).content() == before
    both = {"vision_encoder": tower, "text_encoder": tower}
    assert (
        replace(start, towers=both).content()
        == replace(start, towers=dict(reversed(both.items()))).content()
    )


def another(value):
    """A value of the same kind that is a different one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str):
        return value + "x"
    return value * 2 if isinstance(value, tuple) else value + 1


@pytest.mark.parametrize(
    "config",
    [
        pir.PIRConfig(),
        pir_clip.PIRCLIPConfig(),
        pe_rsitr.PERSITRConfig(),
        cfitr.CFITRConfig(),
        bita.BITAConfig(),
        baseline.FrozenConfig(),
        CONFIG,
        TrainTransform(224),
        TestTransform(224),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_field_of_a_configuration_counts(config):
    names = [
        field.name for field in fields(config) if field.name not in ("workers", "save_every_steps")
    ]
    keys = {name: key_digest(with_field(config, name)) for name in names}
    assert len({*keys.values(), key_digest(config)}) == len(names) + 1


def with_field(config, name):
    """A copy whose field has another value, whether or not it makes sense."""
    copy = replace(config)
    object.__setattr__(copy, name, another(getattr(copy, name)))
    return copy


def test_the_parts_of_a_checkpoint_key(task, start):
    arguments = {
        "configs": [CONFIG, TrainTransform(112)],
        "data": task.content(),
        "start": start.content(),
        "seed": 0,
    }
    before = checkpoint_key(**arguments)
    assert before == checkpoint_key(**arguments) and len(before) == 64
    same = [replace(CONFIG, workers=4, save_every_steps=9), TrainTransform(112)]
    assert checkpoint_key(**arguments | {"configs": same}) == before
    others = [
        checkpoint_key(**arguments | change)
        for change in (
            {"configs": [CONFIG, TrainTransform(112, turn=True)]},
            {"configs": [CONFIG, TestTransform(112)]},
            {"configs": [CONFIG]},
            {"data": {}},
            {"start": {}},
            {"seed": 1},
        )
    ]
    others += [
        checkpoint_key(*arguments.values(), pir.PIR),
        checkpoint_key(*arguments.values(), "def mine(x):\n    return x\n"),
    ]
    assert len({before, *others}) == 9
    with pytest.raises(TypeError, match="cannot hold a .*Path"):
        checkpoint_key([Path("here")], None, None, 0)


def test_two_kinds_of_configuration_with_equal_fields_differ():
    @dataclass
    class One:
        size: int = 1

    @dataclass
    class Two:
        size: int = 1

    assert key_digest(One()) != key_digest(Two()) and key_digest(One()) == key_digest(One())


def test_modules_are_known_by_tensors_and_settings():
    def block(heads=2, seed=0, **changes):
        torch.manual_seed(seed)
        made = torch.nn.TransformerEncoderLayer(8, heads, 16)
        for name, value in changes.items():
            setattr(made.norm1, name, value)
        return modules_digest([made])

    assert (
        block() == block() and len({block(), block(heads=4), block(seed=1), block(eps=1e-6)}) == 4
    )
    training_mode = torch.nn.Linear(2, 2)
    before = modules_digest([training_mode])
    assert (
        modules_digest([training_mode.eval()])
        == before
        != modules_digest([training_mode.to(torch.bfloat16)])
    )


def test_shards_are_known_by_their_bytes(data, folder, tmp_path, tokenizer):
    from nbhelpers.data import shards

    shards.write(data.table, open_images(folder / "set" / "images"), tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    content = ShardDataset(tmp_path / "b", TestTransform(112), tokenizer, 0).content()
    assert ShardDataset(tmp_path / "b", TestTransform(112), tokenizer, 1).content() != content
    assert ShardDataset(tmp_path / "b", TestTransform(96), tokenizer, 0).content() != content
    os.rename(tmp_path / "b", tmp_path / "c")
    again = ShardDataset(tmp_path / "c", TestTransform(112), tokenizer, 0)
    assert again.content() == content
    with open(again.files[0], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert again.content() != content


# ---- who makes keys
class Captured(Exception):
    """Carries a key of a checkpoint."""


def key_of(monkeypatch, call) -> str:
    """The key that a call makes, which goes no further."""

    def captured(*arguments):
        raise Captured(checkpoint_key(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "checkpoint_key", captured)
        with pytest.raises(Captured) as found:
            call()
    return found.value.args[0]


def test_stand_ins_learn_anew_where_their_code_or_data_change(data, folder, changed, monkeypatch):
    def keys(data=data, epochs=1):
        return [
            key_of(
                monkeypatch, lambda: stand_ins.fitted("resnet_standin", data, folder, 0, epochs)
            ),
            key_of(
                monkeypatch,
                lambda: stand_ins.fitted_language([data.table], folder, 0, epochs, "a photo of"),
            ),
        ]

    before = keys()
    images = data.table.images.copy()
    images.loc[images.scene == "red", "scene"] = "sea"
    assert all(map(str.__ne__, keys(with_table(data, images=images)), before)) and all(
        map(str.__ne__, keys(epochs=2), before)
    )
    assert (
        key_of(monkeypatch, lambda: stand_ins.fitted("swin_standin", data, folder, 0, 1))
        != before[0]
    )
    assert (
        key_of(
            monkeypatch, lambda: stand_ins.fitted_language([data.table], folder, 0, 1, "a map of")
        )
        != before[1]
    )
    for function, differ in (
        (stand_ins.SceneBatches.__iter__, (True, False)),
        (stand_ins._labelled, (True, False)),
        (stand_ins.documents, (False, True)),
        (stand_ins.train_byte_pairs, (False, True)),
        (loop._seed, (True, True)),
        (starting_weights.smollm2, (False, False)),
        (figures.save, (False, False)),
    ):
        with changed(mutated(function)):
            assert tuple(map(str.__ne__, keys(), before)) == differ, function


def test_pre_training_is_found_by_what_decides_it(data, folder, changed, monkeypatch):
    plan = pretraining.Pretraining(data, CONFIG, folder, folder / "cache", workers=1)
    calls = [lambda: plan.clip_start("tiny"), lambda: plan.vilt_start("tiny", data)]
    before = [key_of(monkeypatch, call) for call in calls]
    for function, differ in (
        (pretraining.MatchingViLT.mean, (False, True)),
        (clip.clamp_scale, (True, True)),
        (pretraining.loader, (True, True)),
        (loop._seed, (True, True)),
        (pretraining.matched, (False, False)),
    ):
        with changed(mutated(function)):
            assert (
                tuple(map(str.__ne__, [key_of(monkeypatch, call) for call in calls], before))
                == differ
            ), function


def test_generated_scenes_are_known_by_the_code_that_draws_them(changed):
    before = generate.fingerprint()
    for function, differs in (
        (drawing.blob, True),
        (water.port, True),
        (scene_captions.phrases_of, True),
        (generate._write_image, True),
        (generate.of_class, False),
        (pir.PIR.loss, False),
    ):
        with changed(mutated(function)):
            assert (generate.fingerprint() != before) == differs, function


def test_features_of_changed_code_are_not_served(data, tokenizer, tmp_path, changed):
    towers = baseline.FrozenHeads(baseline.FrozenConfig.tiny(tokenizer.vocab_size))

    def folders():
        RetrievalTask(
            data, tokenizer, IMAGE, workers=1, frozen=FrozenTowers(towers, tmp_path)
        ).features("val")
        return len(list(tmp_path.glob("features-*")))

    assert folders() == folders() == 2
    for count, function in (
        (4, backbones._with_mean),
        (6, decoding._by_pillow),
        (8, dual_encoder.OnFrozenTowers.text_features),
        (8, retrieval.RetrievalTask.embeddings),
        (8, baseline.FrozenHeads.embed_images),
    ):
        with changed(mutated(function)):
            assert folders() == folders() == count, function


def test_towers_that_differ_in_a_setting_alone_share_no_features(data, tokenizer, tmp_path):
    for number, heads in enumerate((2, 4)):
        torch.manual_seed(0)
        towers = baseline.FrozenHeads(baseline.FrozenConfig.tiny(tokenizer.vocab_size))
        for layer in towers.text_encoder.encoder.layer:
            attention = layer.attention.self
            attention.num_attention_heads, attention.attention_head_size = (
                heads,
                attention.all_head_size // heads,
            )
        RetrievalTask(
            data, tokenizer, IMAGE, workers=1, frozen=FrozenTowers(towers, tmp_path)
        ).features("val")
        assert len(list(tmp_path.glob("features-*"))) == 2 * (number + 1)


def test_systems_on_the_same_towers_share_features(data, tokenizer, tmp_path):
    torch.manual_seed(0)
    heads = baseline.FrozenHeads(baseline.FrozenConfig.tiny(tokenizer.vocab_size))
    model = pir.PIR(
        pir.PIRConfig.tiny(
            tokenizer.vocab_size, vir=False, freeze_towers=True, use_mask=True, affiliation=False
        )
    )
    model.vision_encoder.load_state_dict(heads.vision_encoder.state_dict())
    model.text_encoder.load_state_dict(heads.text_encoder.state_dict())
    for towers in (heads, model):
        RetrievalTask(
            data, tokenizer, IMAGE, workers=1, frozen=FrozenTowers(towers, tmp_path)
        ).features("val")
        assert len(list(tmp_path.glob("features-*"))) == 2


def test_tokens_of_a_changed_image_tower_are_not_served(data, captions, tmp_path, changed):
    reader = bita.Aligner(captions.config)
    task = CaptionTask(
        data,
        captions.config,
        Tokenizers(captions.words, captions.decoder),
        workers=1,
        frozen=FrozenTowers(reader, tmp_path),
    )
    turned = with_table(data, images=data.table.images.iloc[::-1])

    def folders(of=data):
        task.vision("val", of)
        return len(list(tmp_path.glob("features-*")))

    assert (folders(), folders(), folders(turned)) == (1, 1, 2)  # another order is another cache
    for count, function in (
        (3, bita.ImageReader.image_features),
        (4, captioning.vision_of),
        (4, bita.ImageReader.read),
    ):
        with changed(mutated(function)):
            assert folders() == count, function


def test_codes_and_scores_of_changed_code_or_pixels_are_not_served(
    data, tokenizer, folder, tmp_path, changed
):
    torch.manual_seed(0)
    model = cfitr.CFITR(cfitr.CFITRConfig.tiny(tokenizer.vocab_size, bits=16, hidden=32)).eval()
    tokenizer = tokenization.Tokenizer(folder / "tokenizer.json", 32, fixed=True)
    task = RetrievalTask(data, tokenizer, backbones.vilt_size("vilt_standin").image, workers=1)
    place = two_stage.store_folder(tmp_path, model)
    for function, differs in (
        (two_stage.encode, True),
        (cfitr.CFITR.pooled_images, True),
        (tokenization.Tokenizer.encode, True),
        (two_stage.two_stage, False),
        (recall.evaluate, False),
    ):
        with changed(mutated(function)):
            assert (two_stage.store_folder(tmp_path, model) != place) == differs, function
    wanted = np.zeros((8, 16), bool)
    wanted[0, :2] = True

    def scores(task=task):
        pair = two_stage.write_stores(model, task, "val", place)
        two_stage.fine_scores(model, *pair, wanted, kept=place)
        return pair[0]["codes"].shape, len(list(place.glob("fine-*.npy")))

    assert scores() == scores() == ((8, 2), 1)
    with changed(mutated(two_stage.pair_scores)):
        assert scores()[1] == 2
    files = data.table.images.file
    swapped = data.table.images.assign(
        file=files.where(data.table.images.split != "val", files[::-1].to_numpy())
    )
    table = with_table(data, images=swapped)
    # the same ids show other pixels
    assert scores(RetrievalTask(table, tokenizer, task.image, workers=1))[1] == 3


# ---- notebooks
def calls(name: str) -> list[ast.Call]:
    """The calls of `loop.checkpoint_key` in a notebook."""
    cells = json.loads((ROOT.parent / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]
    trees = [ast.parse("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]
    return [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "loop.checkpoint_key"
    ]


@pytest.mark.parametrize("name", ["20_pir", "21_pir_clip", "22_pe_rsitr", "23_cfitr", "24_bita"])
def test_notebooks_put_task_start_and_code_into_their_keys(name):
    found = calls(name)
    assert found
    for call in found:
        configs, data, start, seed, *code = map(ast.unparse, call.args)
        data = "fed" if data == "fed" else data  # with shards; see 21_pir_clip
        assert (
            data.startswith(("task.content(", "fed"))
            and (start, seed) == ("start.content()", "SEED")
            and code
        )
        assert "settings" in configs or "config" in configs
