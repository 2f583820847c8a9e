"""One device for a whole run, on machines that only seem to have a GPU: CPU, CUDA or Apple."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from coloured_set import coloured
from torch import nn

import nbhelpers
from nbhelpers.data.image_input import ImageInput
from nbhelpers.errors import UserError
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.systems import gallery
from nbhelpers.tasks import pretraining, search_times, stand_ins
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.towers import backbones
from nbhelpers.towers.starting_weights import Start
from nbhelpers.training import device, distributed
from nbhelpers.training.loop import fit, load_or_train
from nbhelpers.training.schedule import TrainConfig

CONFIG = TrainConfig(epochs=1, lr=0.01, batch_size=2)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def loss(self, batch):
        return {"loss": (batch["inputs"] @ self.weight).square().mean()}


BATCHES = [{"inputs": torch.ones(2, 3)}] * 2


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No run has chosen a device, and Accelerate knows of none."""
    monkeypatch.setattr(device, "_of_run", None)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def seen(monkeypatch):
    """Sets which GPUs torch says it sees. Whatever touches one fails: there is none."""

    def set_them(cuda=False, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        # torch's own optimisers ask
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)

    set_them()
    return set_them


@pytest.mark.parametrize(
    "cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_is_the_first_of_cuda_mps_and_cpu(seen, cuda, mps, best):
    seen(cuda, mps)
    assert device.resolve() == device.resolve("auto") == torch.device(best)
    assert device.resolve("cpu") == device.resolve(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    "wish, words",
    [
        (
            "cuda",
            (
                "The device is 'cuda', but torch sees no CUDA device of that name; choose 'cpu' or"
                " 'auto'"
            ),
        ),
        (
            "mps",
            (
                "The device is 'mps', but torch sees no Apple device of that name; choose 'cpu' or"
                " 'auto'"
            ),
        ),
        ("tpu", "The device is 'tpu'; choose one of auto, cpu, cuda, mps"),
        ("xpu", "choose one of auto, cpu, cuda, mps"),
        ("", "choose one of"),
        (None, "choose one of"),
    ],
)
def test_what_torch_does_not_see_is_refused_and_the_advice_helps(seen, wish, words):
    with pytest.raises(UserError, match=words):
        device.resolve(wish)
    assert device.resolve("auto") == device.resolve("cpu")


def test_one_of_several_gpus(seen, monkeypatch):
    seen(cuda=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.resolve("cuda:1") == torch.device("cuda:1")
    with pytest.raises(
        UserError,
        match="is 'cuda:2', but torch sees no CUDA device of that name; choose 'cuda' or 'auto'",
    ):
        device.resolve("cuda:2")


@pytest.mark.parametrize(
    "wish, gpus, found",
    [
        ("cpu", {"cuda": True}, "cpu"),
        ("auto", {"cuda": True}, "cuda"),
        ("cuda", {"cuda": True, "mps": True}, "cuda"),
        ("cpu", {"mps": True}, "cpu"),
        ("auto", {"mps": True}, "mps"),
        ("mps", {"mps": True}, "mps"),
        ("auto", {}, "cpu"),
    ],
)
def test_the_device_of_a_run_reaches_its_header_accelerate_and_what_loads_by_auto(
    seen, capsys, wish, gpus, found
):
    seen(**gpus)
    run = nbhelpers.start("20_pir", DEVICE=wish)
    assert run.device == found and f"device: {found}, " in capsys.readouterr().out
    assert (
        distributed.process_state().device.type
        == distributed.accelerator("fp32").device.type
        == found
    )
    assert device.resolve("auto").type == found


def test_a_later_run_of_the_same_process_chooses_anew(seen):
    seen(cuda=True)
    for wish, found in (("cpu", "cpu"), ("auto", "cuda"), ("cpu", "cpu")):
        nbhelpers.start("20_pir", DEVICE=wish)
        assert distributed.accelerator("fp32").device.type == device.resolve().type == found
    device.use("auto")
    seen()
    assert device.resolve() == torch.device("cpu")  # a device that is gone is not used


def test_the_cpu_trains_though_there_is_a_gpu(seen, tmp_path):
    seen(cuda=True)
    nbhelpers.start("20_pir", DEVICE="cpu")
    before = torch.get_rng_state()
    one, other = Line(), load_or_train("line", Line, BATCHES, CONFIG, tmp_path, "k" * 64)[0]
    fit(one, BATCHES, CONFIG, tmp_path / "one")
    again = load_or_train("line", Line, BATCHES, CONFIG, tmp_path, "k" * 64)[0]
    assert torch.equal(torch.get_rng_state(), before)
    for model in (one, other, again):
        assert model.weight.device.type == "cpu" and torch.equal(model.weight, one.weight)


def test_stand_ins_are_fitted_on_the_device_of_the_run_though_there_is_a_gpu(seen, tmp_path):
    seen(cuda=True)
    nbhelpers.start("12_starting_weights", DEVICE="cpu")
    batches = stand_ins.SceneBatches(np.eye(4, dtype=np.float32), np.arange(4) % 2, 2, 0)
    classifier, path = stand_ins.fit_scenes(
        "head",
        lambda: stand_ins.SceneClassifier(backbones.SceneHead(4), 2),
        batches,
        CONFIG,
        tmp_path,
        "data",
    )
    assert classifier.predict(np.eye(4, dtype=np.float32)).shape == (4,) and path.is_file()


@pytest.mark.parametrize("wish", ["cpu", "auto"])
def test_frozen_towers_are_built_on_the_device_of_the_run(seen, monkeypatch, wish):
    seen(cuda=True)
    built = []
    monkeypatch.setattr(
        Start, "build", lambda *_: SimpleNamespace(to=lambda where: built.append(where))
    )
    monkeypatch.setattr(Start, "read_tokenizer", lambda self: None)
    found = device.use(wish)
    pretraining.task_of(None, Start("", 0, {}, options={"clip": "clip_compact"}), 0, Path())
    assert built == [found]


def test_clocks_wait_for_the_device_of_the_run(seen, monkeypatch):
    seen(cuda=True)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append("cuda"))
    for wish, expected in (("cpu", 0), ("cuda", 3)):
        device.use(wish)
        search_times.milliseconds(lambda: None, repeats=1)
        gallery._Clock().note("encode")
        assert len(waited) == expected


def test_each_of_several_processes_takes_its_own_gpu(seen, monkeypatch):
    seen(cuda=True)
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.use("auto") == torch.device("cuda") and taken == [1]


def test_accelerate_may_ask_for_the_cpu(seen, monkeypatch):
    seen(cuda=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device.use("auto") == device.use("cpu") == torch.device("cpu")
    with pytest.raises(
        UserError,
        match="ACCELERATE_USE_CPU asks for the CPU; choose 'auto', or take that variable out",
    ):
        device.use("cuda")
    assert device.use("auto") == torch.device("cpu")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert device.use("cuda") == torch.device("cuda")


def test_precisions_belong_to_the_device_of_the_run(seen, monkeypatch, tmp_path):
    seen(cuda=True)
    device.use("cpu")
    for precision in ("fp32", "bf16"):
        assert distributed.accelerator(precision).device.type == "cpu"
    with pytest.raises(
        UserError, match="needs a CUDA GPU, and the device is 'cpu'; use 'bf16' or 'fp32' here"
    ):
        distributed.accelerator("fp16")
    device.check_precision("fp16", torch.device("cuda"))
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
    device.check_precision("bf16", torch.device("mps"))
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: False)
    device.check_precision("fp32", torch.device("mps"))
    with pytest.raises(
        UserError, match="'bf16' needs macOS 14 or newer on an Apple GPU; use 'fp32'"
    ):
        device.check_precision("bf16", torch.device("mps"))
    towers = CLIP(CLIPConfig.compact())
    with pytest.raises(UserError, match="needs a CUDA GPU, and the device is 'cpu'"):
        RetrievalTask(
            coloured(tmp_path),
            None,
            ImageInput(112),
            frozen=FrozenTowers(towers, None),
            precision="fp16",
        )


def test_evaluation_encodes_in_what_was_chosen(seen, monkeypatch):
    monkeypatch.setattr(device, "_encoding", "fp32")
    cpu, kinds = torch.device("cpu"), {}
    for precision in ("fp32", "bf16", "fp32"):
        device.encode_in(precision)
        with device.encoding_on(cpu):
            kinds[precision] = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    assert kinds == {"fp32": torch.float32, "bf16": torch.bfloat16}
    with pytest.raises(UserError, match="evaluation is 'fp16'; choose one of fp32, bf16"):
        device.encode_in("fp16")
    seen(mps=True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: False)
    with pytest.raises(UserError, match="'bf16' needs macOS 14 or newer"):
        device.encode_in("bf16")
    device.encode_in("fp32")
    assert device.encoding() == "fp32"


def test_no_other_module_asks_torch_which_gpu_there_is():
    """Such a question would answer for the machine, and not for the run."""
    package = Path(device.__file__).parent
    for path in sorted({*package.rglob("*.py")} - {package / "device.py"}):
        calls = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        ]
        found = [
            call
            for call in calls
            if call.startswith(
                ("torch.cuda.", "torch.backends.", "torch.mps.", "torch.accelerator.")
            )
        ]
        assert not found, f"{path.name}: {found}"
