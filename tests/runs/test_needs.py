"""`check`: one table of what a profile needs, before anything runs."""

import json
import os
import subprocess
import sys

import pytest

from nbhelpers.errors import UserError
from nbhelpers.runs import batch, needs
from nbhelpers.runs.commands import main
from nbhelpers.towers import public_weights

PAPER = [
    "swin_t",
    "bert_base",
    "resnet50_aid",
    "clip_vit_b32",
    "clip_rn50",
    "vilt_mlm_itm",
    "minilm",
    "clip_vit_l14",
    "opt_2.7b",
]


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without weights, packages, hub and GPU; returns a folder for data."""
    monkeypatch.setattr(public_weights, "_in_package", lambda known: None)
    monkeypatch.setattr(public_weights, "_on_hub", lambda known, download: None)
    monkeypatch.setattr(public_weights, "_given", {})
    monkeypatch.setattr(needs, "device_memory", lambda: 0.0)
    monkeypatch.delenv("NBHELPERS_WEIGHTS", raising=False)
    return tmp_path


def write_set(folder, name):
    rows = [
        {"filename": f"{split}.png", "split": split, "sentences": [{"raw": "a"}, {"raw": "b"}]}
        for split in ("train", "val", "test")
    ]
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": rows, "dataset": name}))
    (folder / f"{name}_images").mkdir()


def found(rows, kind):
    return {row.name: row for row in rows if row.kind == kind}


def test_everything_of_a_paper_profile_is_listed_at_once(bare, capsys):
    write_set(bare, "rsicd")
    assert main(["check", "--profile", "paper_rsicd", "--data", str(bare), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["missing"] == [*PAPER, "ucm", "nwpu"]
    rows = {(row["kind"], row["name"]): row for row in said["needs"]}
    assert rows["data", "rsicd"]["size"] == "1/1/1 images, 6 captions"
    assert rows["weights", "opt_2.7b"]["size"] == "5304 MB"
    assert rows["weights", "opt_2.7b"]["commands"][0].startswith("hf download facebook/opt-2.7b ")
    for kind in ("memory", "hours"):
        assert {name for kind_, name in rows if kind_ == kind} >= set(needs.COSTS)


def test_the_command_on_a_bare_machine_lists_all_and_does_not_import_torch(tmp_path):
    """It took 3.3 seconds of a processor."""
    code = (
        "import sys; from nbhelpers.runs.commands import main;"
        " code = main(['check', '--profile', 'paper_rsicd']);"
        " sys.exit(code + 2 * ('torch' in sys.modules))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NBHELPERS_WEIGHTS"}
    environment["HF_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    missing = {row[1] for row in rows if row[0] in ("weights", "data") and "missing" in row}
    packaged = {"minilm"}  # a package of this project's own brings it
    assert missing >= {*PAPER, "rsicd", "ucm", "nwpu"} - packaged


@pytest.mark.parametrize(
    "words, added, removed",
    [
        (["--set", "PRIOR=imagenet"], {"resnet50"}, {"resnet50_aid"}),
        (["--set", "PRIOR=random"], set(), {"resnet50_aid"}),
        (["--upto", "20"], set(), {"clip_vit_b32", "clip_rn50", "vilt_mlm_itm", "opt_2.7b"}),
        (["--upto", "22"], set(), {"vilt_mlm_itm", "opt_2.7b"}),
        (["--set", "INSTRUCTION=random"], set(), {"clip_rn50"}),
        (["--set", "SIZE=compact"], {"efficientnet_lite0"}, {"swin_t", "opt_2.7b", "smollm2"}),
        (["--set", "SIZE=compact", "DECODER=smollm2"], {"smollm2"}, {"opt_2.7b"}),
        (["--set", "SIZE=tiny"], set(), set(PAPER)),
    ],
)
def test_only_what_the_notebooks_read_is_listed(bare, capsys, words, added, removed):
    main(["check", "--profile", "paper_ucm", "--json", *words])
    listed = {row["name"] for row in json.loads(capsys.readouterr().out)["needs"]}
    assert added <= listed and not removed & listed


def test_what_is_there_is_found_and_a_part_of_it_is_missing(bare, monkeypatch):
    monkeypatch.setenv("NBHELPERS_WEIGHTS", str(bare))
    whole = bare / "bert-base-uncased"
    whole.mkdir()
    (whole / "model.safetensors").touch()
    chosen = needs.choose("paper_ucm", {}, "20")
    bert = found(needs.table(chosen), "weights")["bert_base"]
    assert bert.state == "missing"
    assert bert.where == f"{whole} lacks config.json, tokenizer.json, vocab.txt"
    for name in public_weights.KNOWN["bert_base"].files:
        (whole / name).touch()
    assert found(needs.table(chosen), "weights")["bert_base"].state == "found"


def test_download_fetches_what_the_hub_has_and_says_what_failed(bare, monkeypatch, capsys):
    fetched = set()

    def on_hub(known, download):
        if download and "opt" in known.hub:
            raise UserError("the hub refused with 403")
        if download:
            fetched.add(known.hub)
        return bare if known.hub in fetched else None

    monkeypatch.setattr(public_weights, "_on_hub", on_hub)
    monkeypatch.setattr(public_weights, "lacking", lambda known, place: [])
    assert main(["check", "--profile", "paper_ucm", "--download", "--json"]) == 1
    said = capsys.readouterr()
    missing = set(json.loads(said.out)["missing"])
    assert missing.intersection(PAPER) == {"resnet50_aid", "opt_2.7b"}
    assert "'opt_2.7b'" in said.err and "the hub refused with 403" in said.err


def test_run_stops_before_anything_with_all_that_is_missing(bare, monkeypatch, capsys):
    monkeypatch.setattr(batch, "run_chain", lambda *given, **named: pytest.fail("it ran"))
    assert main(["run", "--profile", "paper_rsicd", "--data", str(bare)]) == 1
    said = capsys.readouterr()
    for name in (*PAPER, "rsicd", "ucm", "nwpu"):
        assert f"{name} (" in said.err
    assert "hf download facebook/opt-2.7b" in said.out


def test_run_respects_a_parameter_and_refuses_an_unknown_one(bare, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(batch, "run_chain", lambda *_, given: calls.append(given) or 0)
    assert main(["run", "--set", "SIZE=tiny", "PRIOR=imagenet"]) == 0
    assert calls == [{"SIZE": "tiny", "PRIOR": "imagenet"}]
    assert main(["run", "--set", "PRIORS=imagenet"]) == 1
    assert "did you mean PRIOR?" in capsys.readouterr().err
    assert main(["run", "--set", "PRIOR"]) == 1
    assert "give NAME=VALUE, e.g. --set PRIOR=imagenet." in capsys.readouterr().err
    assert len(calls) == 1


def test_the_tiny_size_needs_nothing_from_outside(bare, monkeypatch, capsys):
    needs.require("default", {"SIZE": "tiny"}, "")
    assert capsys.readouterr().out == ""


def test_memory_follows_batch_precision_and_what_saves_it():
    values = batch.values_of("paper_rsicd") | {"MICRO_BATCH": "whole"}
    counted = {  # of nbhelpers/papers/README.md
        (): 43.5,
        ("PRECISION", "bf16"): 28.3,
        ("RECOMPUTE", True): 10.7,
        ("MICRO_BATCH", "32"): 7.8,
    }
    for change, gigabytes in counted.items():
        changed = values | (dict([change]) if change else {})
        assert needs.memory(needs.COSTS["20_pir"], changed) == pytest.approx(gigabytes, rel=0.05)


def test_too_little_memory_is_said_and_is_nothing_missing(bare, monkeypatch):
    chosen = needs.choose("paper_ucm", {"DEVICE": "auto", "MICRO_BATCH": "whole"}, "20")
    for there, state in ((12.0, "short"), (80.0, "fits")):
        monkeypatch.setattr(needs, "device_memory", lambda there=there: there)
        row = found(needs.table(chosen), "memory")["20_pir"]
        assert row.state == state and row.where.startswith(f"{there:.0f} GB on the GPU")
    assert "RECOMPUTE: true" in needs._mend("20_pir")
    monkeypatch.setattr(needs, "device_memory", lambda: 12.0)
    for saved in ({"RECOMPUTE": True, "MICRO_BATCH": "whole"}, {"MICRO_BATCH": "auto"}):
        saving = needs.choose("paper_ucm", saved, "20")
        assert found(needs.table(saving), "memory")["20_pir"].state == "fits"
