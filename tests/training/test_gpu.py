"""All five systems at work on a GPU, in small sizes: `pytest -m gpu`.

Each test runs on the CPU as well, so that its code stays right where there is no GPU. Steps at the
size of the papers are in tests/papers; `tests/benchmarks/bench_gpu.py` measures.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from closeness import assert_close
from coloured_set import coloured
from test_cached_gradients import without_dropout
from torch import Tensor, nn

from nbhelpers.data.scenes import generate
from nbhelpers.data.tokenization import CLIPTokenizer, Tokenizer, train_tokenizer
from nbhelpers.papers import bita, cfitr, pe_rsitr, pir, pir_clip
from nbhelpers.systems import region_maps
from nbhelpers.systems.trained_systems import System
from nbhelpers.tasks import stand_ins, two_stage
from nbhelpers.tasks.captioning import DecoderTokenizer
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.towers import backbones
from nbhelpers.training import device, loop
from nbhelpers.training.schedule import TrainConfig

SENTENCE = "two blue ponds are in the meadow ."
PAIRS, LONG = 8, 32
RETRIEVAL = ("pir", "pir_clip", "pe_rsitr", "cfitr")
CONFIG = TrainConfig(epochs=4, lr=1e-3, batch_size=PAIRS, warmup_fraction=0.0, keep="last")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request, monkeypatch) -> torch.device:
    """The device of the run, as a notebook chooses it."""
    monkeypatch.setattr(device, "_of_run", None)
    monkeypatch.setattr(device, "_encoding", "fp32")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield device.use(request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def batch(size: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 20, (PAIRS, 1), generator=draw)
    row = torch.arange(PAIRS)
    mask = (torch.arange(LONG) < lengths).long()
    return {
        "pixels": torch.randn(PAIRS, 3, size, size, generator=draw),
        "ids": torch.randint(5, 40, (PAIRS, LONG), generator=draw) * mask,
        "mask": mask,
        "image_index": row,
        "scene": row // 2,
        "row": row,
    }


def with_captions(model: cfitr.CFITR) -> cfitr.CFITR:
    here = batch(8)
    tokens = {name: here[name].numpy() for name in ("ids", "mask")}
    return model.set_captions(cfitr.Captions(np.arange(PAIRS), np.arange(PAIRS), tokens))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "pir": lambda: pir.PIR(pir.PIRConfig.tiny(40)),
    "pir_clip": lambda: pir_clip.PIRCLIP(pir_clip.PIRCLIPConfig.tiny()),
    "pe_rsitr": lambda: pe_rsitr.PERSITR(pe_rsitr.PERSITRConfig.tiny()),
    "cfitr": lambda: with_captions(cfitr.CFITR(cfitr.CFITRConfig.tiny(40, bits=16, hidden=32))),
    "bita, stage 1": lambda: bita.Aligner(bita.BITAConfig.tiny(40, 40)),
    "bita, stage 2": lambda: bita.Captioner(bita.BITAConfig.tiny(40, 40)),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def trained(model: nn.Module, folder: Path, **changes) -> tuple[nn.Module, loop.History]:
    history = loop.fit(model, [batch(112)] * 2, replace(CONFIG, **changes), folder)
    return model, history


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


# ---- training
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_every_system_learns_a_batch(place, tmp_path, name, precision):
    model, history = trained(built(name), tmp_path, precision=precision)
    assert next(model.parameters()).device.type == place.type
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    assert all(value.isfinite().all() for value in weights(model).values())


@pytest.mark.parametrize("name", ["pir", "pir_clip", "pe_rsitr"])
def test_gradients_of_micro_batches_are_those_of_the_whole_batch(
    place, tmp_path, name, monkeypatch
):
    """Without dropout, which draws other values for micro-batches than for the whole batch."""
    monkeypatch.setattr(F, "dropout", lambda x, *_, **__: x)
    start = without_dropout(built(name))
    whole, parts = (
        trained(copy.deepcopy(start), tmp_path / str(size), micro_batch=size, epochs=1)[1]
        for size in ("whole", 3)
    )
    assert parts.rows[0]["loss"] == pytest.approx(whole.rows[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("name", ["pir", "pir_clip", "pe_rsitr", "cfitr"])
def test_a_compiled_step_is_the_plain_one(place, tmp_path, name, monkeypatch):
    if place.type == "cpu":
        monkeypatch.setattr(loop, "COMPILER", "aot_eager")  # needs no compiler of C++
    start = built(name)
    plain, compiled = (
        trained(copy.deepcopy(start), tmp_path / str(wish), compile=wish, epochs=1)[1]
        for wish in (False, True)
    )
    assert compiled.rows[0]["loss"] == pytest.approx(plain.rows[0]["loss"], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RETRIEVAL)
def test_a_step_waits_for_no_value(name, monkeypatch):
    """Its forward pass is tried everywhere, on a fake GPU (test_waiting)."""
    monkeypatch.setattr(device, "_of_run", None)
    place, model = device.use("cuda"), built(name).cuda().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for first in (True, False):  # the first call may look for the fastest kernels
        here = device.moved(batch(112), place)
        torch.cuda.set_sync_debug_mode("default" if first else "error")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model.loss(here)["loss"]
            loss.backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- use
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def words(data, tmp_path_factory):
    texts = [*data.table.captions.text, *[SENTENCE] * 4]
    return train_tokenizer(texts, tmp_path_factory.mktemp("words") / "words.json")


def test_embeddings_agree_with_those_of_the_cpu(place, data, words):
    tokenizer = Tokenizer(words, LONG)
    model = pir.PIR(pir.PIRConfig.tiny(tokenizer.vocab_size)).eval()
    task = RetrievalTask(data, tokenizer, backbones.image_input("swin_standin"), workers="auto")
    expected, found = task.embeddings(model, "test"), task.embeddings(model.to(place), "test")
    for ours, theirs in ((found.images, expected.images), (found.texts, expected.texts)):
        assert_close(ours, theirs, 1e-4)
    device.encode_in("bf16")
    half = task.embeddings(model, "test")
    assert half.images.dtype == np.float32
    assert np.abs(half.similarity() - expected.similarity()).max() < 0.03


def test_a_search_in_two_stages_finds_the_same_on_every_device(place, data, words, tmp_path):
    tokenizer = Tokenizer(words, LONG, fixed=True)
    torch.manual_seed(0)
    model = cfitr.CFITR(cfitr.CFITRConfig.tiny(tokenizer.vocab_size, bits=16, hidden=32)).eval()
    task = RetrievalTask(data, tokenizer, backbones.vilt_size("vilt_standin").image)
    scores = []
    for where in ("cpu", place):
        model.to(where)
        images, texts = two_stage.write_stores(model, task, "test", tmp_path / str(where))
        scores.append(two_stage.fine_scores(model, images, texts))
    assert_close(scores[1], scores[0], 5e-3)  # states are stored in 16 bits
    _, texts_of = two_stage.split_inputs(model, task, "test")
    query = two_stage.encode(model, texts_of(np.arange(2)))
    found = two_stage.Search(model, images, k=5)(query)
    assert found.rows.shape == (2, 5) and np.isfinite(found.scores).all()


def test_captions_end_and_do_not_depend_on_the_batch(place):
    model = built("bita, stage 2").to(place).eval()
    vision = model.image_features(torch.randn(3, 3, 112, 112, device=place))["vision"]
    prompt = torch.arange(1, 4, device=place)
    options = {"end": 9, "pad": 2, "beams": 3, "longest": 8}
    together = model.generate(vision, prompt, **options)
    assert together.device.type == place.type and together.shape[1] <= 8
    for number in range(3):
        alone = model.generate(vision[number : number + 1], prompt, **options)[0]
        count = min(len(alone), together.shape[1])
        assert torch.equal(alone[:count], together[number, :count])


@pytest.mark.parametrize("name", [*RETRIEVAL, "bita"])
def test_every_system_has_its_maps(place, words, tmp_path, name):
    plain = Tokenizer(words, LONG, fixed=name == "cfitr", sep=name == "cfitr")
    system = {
        "pir": lambda: (pir.PIR(pir.PIRConfig.tiny(plain.vocab_size)), plain),
        "pir_clip": lambda: (MODELS["pir_clip"](), CLIPTokenizer(40)),
        "pe_rsitr": lambda: (MODELS["pe_rsitr"](), CLIPTokenizer(40)),
        "cfitr": lambda: (cfitr.CFITR(cfitr.CFITRConfig.tiny(plain.vocab_size)), plain),
        "bita": lambda: captioner(plain.vocab_size, tmp_path),
    }[name]
    torch.manual_seed(0)
    model, tokenizer = system()
    image = backbones.image_input("swin_standin")
    opened = System(name, model.to(place).eval(), tokenizer, image, {}, Path())
    match, scene = region_maps.match(opened, SENTENCE), generate.draw(generate.SceneSpec("pond", 0))
    for method in match.methods:
        values = match.map(method, scene.pixels)
        assert values.ndim == 2 and np.isfinite(values).all()


def captioner(vocabulary: int, folder: Path) -> tuple[nn.Module, object]:
    texts = [SENTENCE, "many green trees are near a pond .", "a photo of"] * 4
    pairs = DecoderTokenizer(
        stand_ins.train_byte_pairs(texts, folder / "pairs/tokenizer.json", 300), "opt_standin"
    )
    model = bita.Captioner(bita.BITAConfig.tiny(vocabulary, pairs.vocab_size))
    return model, pairs.prompted("a photo of")


def test_the_script_that_measures_a_gpu_runs(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks/bench_gpu.py"
    options = ["--small", "--device", "cpu", "--out", str(tmp_path), "--systems", "PE-RSITR"]
    done = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "cpu.json").read_text())
    figures = record["systems"]["PE-RSITR"]
    assert set(figures) == {"batch", "fp32", "tf32", "bf16", "bf16, compiled"}
    assert figures["fp32"]["ratio_to_fp32"] == 1 and figures["bf16"]["images_per_second"] > 0
