"""What the notebooks of a profile need: weights, data sets, memory, disk and hours.

Nothing here imports torch. Memory and hours are estimates, and the table says how they are made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from nbhelpers.errors import UserError
from nbhelpers.paths import runs_root
from nbhelpers.runs import batch
from nbhelpers.runs.parameters import unknown, wrong_values
from nbhelpers.towers import public_weights
from nbhelpers.towers.public_weights import KNOWN

PRIORS = {"": "resnet50_aid", "aid": "resnet50_aid", "imagenet": "resnet50", "fit": "resnet50"}
BITA = ("clip_vit_l14", "bert_base", "opt_2.7b")
GIGABYTE = 1e9


@dataclass(frozen=True)
class Cost:
    """What training one system at paper size takes.

    epochs     parameters whose sum counts its passes;  batch: parameter of pairs in a batch
    fixed      gigabytes of weights, gradients and moments
    per_pair   gigabytes that the graph keeps for a pair: in fp32 and in 16 bits, then both with
               RECOMPUTE. Fitted to the counts of tests/benchmarks/bench_memory.py
    gigaflops  of one training pair, forward and backward
    kept       gigabytes of checkpoint and resume file
    """

    epochs: tuple[str, ...]
    batch: str
    fixed: float
    per_pair: tuple[float, float, float, float]
    gigaflops: float
    kept: float


COSTS = {
    "20_pir": Cost(("EPOCHS",), "BATCH_SIZE", 2.8, (0.159, 0.099, 0.031, 0.019), 60, 2.6),
    "21_pir_clip": Cost(
        ("PIR_CLIP_EPOCHS",), "PIR_CLIP_BATCH", 2.6, (0.062, 0.036, 0.0052, 0.005), 80, 2.8
    ),
    "22_pe_rsitr": Cost(
        ("PE_RSITR_EPOCHS",), "PE_RSITR_BATCH", 1.0, (0.1, 0.062, 0.1, 0.062), 45, 0.7
    ),
    # never counted: from the parameters of ViLT-B/32, and sixteen texts for each image
    "23_cfitr": Cost(("CFITR_EPOCHS",), "CFITR_BATCH", 1.8, (0.9, 0.5, 0.9, 0.5), 600, 1.8),
    "24_bita": Cost(
        ("STAGE1_EPOCHS", "STAGE2_EPOCHS", "FINETUNE_EPOCHS"),
        "CAPTION_BATCH",
        8.0,
        (0.19, 0.19, 0.019, 0.019),
        900,
        2.5,
    ),
}
# Assumed, not measured: teraflops per second that a training reaches.
SPEED = {"cpu": 0.05, "fp32": 10.0, "tf32": 40.0, "bf16": 60.0, "fp16": 60.0}
HOST = {"24_bita": 8.0}  # gigabytes beside the device's: OPT in 16 bits; others take 4
ASSUMED = (
    f"Memory is that counted with random weights on a CPU (nbhelpers/papers/README.md), CFITR's a "
    f"guess. Hours assume {SPEED['fp32']:g} TFLOP/s in fp32, {SPEED['tf32']:g} in tf32 and "
    f"{SPEED['bf16']:g} in 16 bits on a GPU, {SPEED['cpu']} on a CPU. No figure was measured on a "
    "GPU."
)


@dataclass(frozen=True)
class Need:
    """A row of the table.

    state     found, missing, short or fits; "estimate" for what cannot be compared
    size      in words;  where: its place, or the names and places that are accepted
    commands  that bring what is missing
    """

    kind: str
    name: str
    state: str
    size: str
    where: str
    commands: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chosen:
    """A profile with its overrides, and the notebooks that will run."""

    profile: str
    values: dict[str, Any]
    steps: tuple[batch.Step, ...]

    @property
    def names(self) -> set[str]:
        """The notebooks."""
        return {step.name for step in self.steps}


def choose(profile: str, overrides: Mapping[str, Any], upto: str = "") -> Chosen:
    """Read a profile; UserError for names and values that are wrong by themselves."""
    values = batch.values_of("default")
    known = list(values)
    given = batch.read_profile(profile) | dict(overrides)
    wrong = [unknown(name, known) for name in given if name not in known]
    wrong += wrong_values({name: value for name, value in given.items() if name in known})
    if wrong:
        raise UserError(f"Profile '{profile}' was refused and nothing was run. {' '.join(wrong)}")
    public_weights.use(given.get("WEIGHTS", {}))
    return Chosen(profile, values | given, batch.select(upto, batch.only_of(profile)))


def table(chosen: Chosen) -> list[Need]:
    """Return everything that the notebooks need, found or missing."""
    rows = [_weights(name) for name in weight_names(chosen)]
    rows += [_set(name, chosen.values["DATA"]) for name in set_names(chosen)]
    if chosen.values["SIZE"] == "paper":
        rows += _costs(chosen)
    return [*rows, _disk(chosen, rows)]


def weight_names(chosen: Chosen) -> list[str]:
    """Return the known names of the weights that the notebooks read, each once."""
    values, names = chosen.values, chosen.names
    found: list[str] = []
    if values["SIZE"] == "compact":
        found += ["efficientnet_lite0", "minilm"]
        if "24_bita" in names and values["DECODER"] == "smollm2":
            found.append("smollm2")
    if values["SIZE"] == "paper" and batch.WEIGHTS in names:
        found += _of_retrieval(values, names)
    if values["SIZE"] == "paper" and "24_bita" in names:
        found += BITA
    return [name for name in dict.fromkeys(found) if name in KNOWN]


def _of_retrieval(values: Mapping[str, Any], names: set[str]) -> list[str]:
    """The weights that 12_starting_weights reads at paper size; paths of files are among them."""
    found = ["swin_t", "bert_base"]
    found += [PRIORS[values["PRIOR"]]] if values["PRIOR"] in PRIORS else []
    systems = names.intersection(batch.RETRIEVAL_NOTEBOOKS)
    read = {
        name: values[name] and (not systems or names.intersection(readers))
        for name, readers in batch.PRETRAINED.items()
    }
    found += [values["CLIP"], values["INSTRUCTION"]] if read["CLIP"] else []
    found += [values["VILT"], "minilm"] if read["VILT"] else []
    return found


def _weights(name: str) -> Need:
    known = KNOWN[name]
    size = f"{known.megabytes} MB"
    found = public_weights.locate(name)
    if found is None:
        accepted = ", ".join(public_weights.accepted(name))
        place = os.environ.get(public_weights.FOLDER) or f"the folder {public_weights.FOLDER}"
        where = f"accepted in {place}: {accepted}; or WEIGHTS: {{{name}: /path}}"
        commands = known.commands or [f"# {known.source}"]
        return Need("weights", name, "missing", size, where, commands)
    if lacks := public_weights.lacking(known, found[0]):
        where = f"{found[0]} lacks {', '.join(lacks)}"
        return Need("weights", name, "missing", size, where, known.commands)
    return Need("weights", name, "found", size, f"{found[0]} ({found[1]})")


def set_names(chosen: Chosen) -> list[str]:
    """Return the data sets that must be there, each once."""
    values = chosen.values
    further = values["CAPTION_SETS"] if "24_bita" in chosen.names else []
    return [name for name in dict.fromkeys([values["SET"], *further]) if name != "scenes"]


def _set(name: str, data: str) -> Need:
    """Look for a set in DATA, and count its images and captions."""
    from nbhelpers.data import catalog, layouts, shards  # imports pandas

    known = catalog.KNOWN.get(name)
    size = f"{known.images} images published" if known else "a set of your own"
    commands = [f"python -m nbhelpers data get {name} --out {data or 'FOLDER'}"]
    if not data:
        return Need("data", name, "missing", size, "give --data FOLDER (make: DATA=)", commands)
    try:
        captions, images = catalog.find(name, data)
        if shards.layout_of(captions):
            return Need("data", name, "found", size, str(captions))
        read = layouts.read(captions)
    except UserError as error:
        where = f"{str(error).split('; expected')[0]}; data/README.md lists the forms"
        return Need("data", name, "missing", size, where, commands)
    counts = read.images.split.value_counts()
    splits = "/".join(str(counts.get(split, 0)) for split in ("train", "val", "test"))
    size = f"{splits} images, {len(read.captions)} captions"
    return Need("data", name, "found", size, f"{captions}, {images}")


def _costs(chosen: Chosen) -> list[Need]:
    """Memory and hours of each system at the profile's batch."""
    values, gpu = chosen.values, device_memory()
    on_gpu = values["DEVICE"] != "cpu" and gpu > 0
    there = gpu if on_gpu else host_memory()
    place = "GPU" if on_gpu else "host, as no GPU was found"
    rows = []
    for name, cost in COSTS.items():
        if name in chosen.names and not values["CHECKPOINT"]:
            needed = memory(cost, values)
            state = "fits" if needed < there else "short"
            mend = "" if needed < there else _mend(name)
            where = f"{there:.0f} GB on the {place}{mend}"
            rows.append(Need("memory", name, state, f"{needed:.1f} GB", where))
    host = max((HOST.get(name, 4.0) for name in chosen.names), default=4.0)
    state = "fits" if host < host_memory() else "short"
    rows.append(Need("memory", "host", state, f"{host:.0f} GB", f"{host_memory():.0f} GB there"))
    speed = SPEED[values["PRECISION"]] if on_gpu else SPEED["cpu"]
    return rows + _hours(chosen, speed)


def memory(cost: Cost, values: Mapping[str, Any]) -> float:
    """Gigabytes of a training step at the profile's batch; a micro-batch counts in its place."""
    short = values["PRECISION"] in ("bf16", "fp16")
    per_pair = cost.per_pair[short + 2 * bool(values["RECOMPUTE"])]
    pairs = values[cost.batch]
    if cost.batch in ("BATCH_SIZE", "PIR_CLIP_BATCH", "PE_RSITR_BATCH"):
        asked = str(values["MICRO_BATCH"])
        pairs = min(pairs, int(asked)) if asked.isdecimal() else pairs
        pairs = min(pairs, 32) if asked == "auto" else pairs
    return cost.fixed + per_pair * pairs


def _mend(name: str) -> str:
    further = ", MICRO_BATCH: auto" if name[:2] in ("20", "21", "22") else ""
    return f"; lower it by RECOMPUTE: true{further} or a smaller batch"


def _hours(chosen: Chosen, speed: float) -> list[Need]:
    from nbhelpers.data import catalog

    known = catalog.KNOWN.get(chosen.values["SET"])
    if known is None:
        return []
    pairs = next(iter(known.splits.values()))[0] * known.captions_per_image
    rows = []
    for name, cost in COSTS.items():
        if name in chosen.names and not chosen.values["CHECKPOINT"]:
            passes = sum(chosen.values[epochs] for epochs in cost.epochs)
            hours = pairs * passes * cost.gigaflops / (speed * 1000) / 3600
            rows.append(Need("hours", name, "estimate", f"{hours:.1f} h", f"{passes} passes"))
    return rows


def _disk(chosen: Chosen, rows: Iterable[Need]) -> Need:
    """Downloads, and what trainings keep, against what is free in the folder of runs."""
    missing = [row for row in rows if row.kind == "weights" and row.state == "missing"]
    needed = sum(KNOWN[row.name].megabytes for row in missing) / 1000 + 1
    if chosen.values["SIZE"] == "paper":
        needed += sum(cost.kept for name, cost in COSTS.items() if name in chosen.names)
    folder = runs_root()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIGABYTE
    state = "fits" if needed < free else "short"
    return Need("disk", "runs", state, f"{needed:.1f} GB", f"{free:.0f} GB free in {folder}")


def host_memory() -> float:
    """Gigabytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIGABYTE


def device_memory() -> float:
    """Gigabytes of the largest NVIDIA GPU; 0 without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return max(int(line) for line in said.stdout.split()) * 2**20 / GIGABYTE
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0


# what is done about it


def download(rows: Sequence[Need]) -> list[str]:
    """Fetch what the hub has, with the progress bars of its client; return what failed."""
    failed = []
    for row in rows:
        if row.kind == "weights" and row.state == "missing" and KNOWN[row.name].hub:
            try:
                public_weights.fetch(row.name)
            except UserError as error:
                failed.append(str(error))
    return failed


def lines(chosen: Chosen, rows: Sequence[Need]) -> list[str]:
    """Return the table as text, and below it the commands that bring what is missing."""
    widths = [max(len(getattr(row, part)) for row in rows) for part in ("name", "size", "state")]
    found = [f"profile {chosen.profile} needs"]
    for row in rows:
        parts = zip((row.name, row.size, row.state), widths, strict=True)
        cells = "  ".join(text.ljust(width) for text, width in parts)
        found.append(f"{row.kind:8} {cells}  {row.where}")
    if chosen.values["SIZE"] == "paper":
        found.append(ASSUMED)
    if missing := missing_of(rows):
        found.append(f"{len(missing)} missing; get them so:")
        commands = chain.from_iterable(row.commands for row in missing)
        found += [f"  {command}" for command in dict.fromkeys(commands)]
    return found


def missing_of(rows: Iterable[Need]) -> list[Need]:
    """Return the rows of what is missing."""
    return [row for row in rows if row.state == "missing"]


def as_json(chosen: Chosen, rows: Sequence[Need]) -> dict[str, Any]:
    """Return the table for JSON."""
    return {
        "profile": chosen.profile,
        "needs": [asdict(row) for row in rows],
        "missing": [row.name for row in missing_of(rows)],
    }


def require(profile: str, overrides: Mapping[str, Any], upto: str) -> None:
    """Print the table before notebooks run; UserError that lists all that is missing.

    What the hub has is fetched first, so that no notebook waits for it. A profile that needs
    nothing from outside says nothing.
    """
    chosen = choose(profile, overrides, upto)
    if not (weight_names(chosen) or set_names(chosen)):
        return
    rows = table(chosen)
    print("\n".join(lines(chosen, rows)), flush=True)
    failed = download(rows)
    if missing := missing_of(table(chosen) if missing_of(rows) else rows):
        names = ", ".join(f"{row.name} ({row.kind})" for row in missing)
        raise UserError(
            f"Nothing was run, because profile '{profile}' lacks {names}; the commands above bring "
            f"them. {' '.join(failed)}".strip()
        )
