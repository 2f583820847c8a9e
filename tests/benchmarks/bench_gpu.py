"""What a GPU gives: images per second and memory of training at the size of the papers.

    python tests/benchmarks/bench_gpu.py                  # on a CUDA GPU, a few minutes
    python tests/benchmarks/bench_gpu.py --small --device cpu --out FOLDER   # tries the script

Random weights and random pixels, through the training loop: fp32, TF32, bf16, and bf16 with
torch.compile. One JSON file for each kind of GPU goes to data/results/gpu/. A system that does not
fit is written down as such, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nbhelpers.data.augment import Normalizer
from nbhelpers.papers.bita import Aligner, BITAConfig
from nbhelpers.papers.cfitr import CFITR, Captions, CFITRConfig
from nbhelpers.papers.pe_rsitr import PERSITR, PERSITRConfig
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.training import device, loop
from nbhelpers.training.schedule import TrainConfig

OUT = Path(__file__).parents[2] / "data/results/gpu"
BATCHES = 6  # of an epoch; the first epoch warms up, the second is measured
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
}


def with_captions(model: CFITR, length: int) -> CFITR:
    """With captions to draw false texts from."""
    ids = np.random.default_rng(0).integers(5, 40, (64, length))
    tokens = {"ids": ids, "mask": np.ones_like(ids)}
    return model.set_captions(Captions(np.arange(64), np.arange(64), tokens))


# system -> model at paper size, small model, pairs of a batch, edge of an image, length of captions
SYSTEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], int, int, int]] = {
    "PIR": (lambda: PIR(PIRConfig.paper()), lambda: PIR(PIRConfig.tiny(40)), 256, 224, 47),
    "PIR-CLIP": (
        lambda: PIRCLIP(PIRCLIPConfig.paper()),
        lambda: PIRCLIP(PIRCLIPConfig.tiny()),
        512,
        224,
        77,
    ),
    "PE-RSITR": (
        lambda: PERSITR(PERSITRConfig.paper()),
        lambda: PERSITR(PERSITRConfig.tiny()),
        16,
        224,
        77,
    ),
    "CFITR": (
        lambda: with_captions(CFITR(CFITRConfig.paper()), 40),
        lambda: with_captions(CFITR(CFITRConfig.tiny(40, bits=16, hidden=32)), 32),
        8,
        384,
        40,
    ),
    "BITA, stage 1": (
        lambda: Aligner(BITAConfig.paper()),
        lambda: Aligner(BITAConfig.tiny(40, 40)),
        192,
        224,
        32,
    ),
}


class Pixels(torch.utils.data.Dataset):
    """Random pairs, as bytes or floats, as the training loop asks (`loaders.sent_as_bytes`)."""

    def __init__(self, pairs: int, size: int, length: int):
        self.pairs, self.length, self.as_bytes = pairs, length, False
        self.normalizer = Normalizer()
        self.pixels = torch.randint(0, 256, (pairs, size, size, 3), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.pairs * BATCHES

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """One batch; all batches show the same pixels."""
        number = torch.arange(len(rows))
        pixels = self.pixels.permute(0, 3, 1, 2)
        return {
            "pixels": pixels if self.as_bytes else self.normalizer(pixels),
            "ids": torch.randint(5, 40, (len(rows), self.length)),
            "mask": torch.ones(len(rows), self.length, dtype=torch.long),
            "image_index": number,
            "scene": number // 2,
            "row": number,
        }


def as_it_is(batch):
    """The batch, which is whole already."""
    return batch


def measure(model: nn.Module, pairs: int, size: int, length: int, way: dict) -> dict[str, float]:
    """Images per second of the second epoch, and gigabytes at the peak (0 on a CPU)."""
    loader = torch.utils.data.DataLoader(Pixels(pairs, size, length), pairs, collate_fn=as_it_is)
    config = TrainConfig(epochs=2, lr=1e-6, batch_size=pairs, keep="last", **way)
    on_gpu = device.resolve().type == "cuda"
    if on_gpu:
        device.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        history = loop.fit(model, loader, config, folder, progress=False)
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return {"images_per_second": history.rows[-1]["images_per_second"], "gigabytes": peak}


def run(small: bool, chosen: list[str]) -> dict[str, Any]:
    """The figures of each chosen system in each way, and the ratios to fp32."""
    found: dict[str, Any] = {}
    for name in chosen:
        paper, tiny, pairs, size, length = SYSTEMS[name]
        pairs, size, length = (4, 112, 32) if small else (pairs, size, length)
        found[name] = {"batch": pairs}
        for way, settings in WAYS.items():
            torch.manual_seed(0)
            try:
                figures = measure((tiny if small else paper)(), pairs, size, length, settings)
            except torch.OutOfMemoryError:
                figures = {"does_not_fit": True}
            plain = found[name].get("fp32", figures).get("images_per_second")
            if plain and "images_per_second" in figures:
                figures["ratio_to_fp32"] = figures["images_per_second"] / plain
            found[name][way] = figures
            print(f"{name}, batch {pairs}, {way}: {figures}", flush=True)
    return found


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small models, to try the script")
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    place = device.use(options.device)
    if place.type == "cpu":
        loop.COMPILER = "aot_eager"  # needs no compiler of C++
    card = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
    record = {
        "device": card,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "small": options.small,
        "weights": "random",
        "systems": run(options.small, options.systems),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{re.sub(r'[^a-z0-9]+', '-', card.lower())}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
