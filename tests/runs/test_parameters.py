"""Whoever executes a notebook, a wrong value is one sentence, and the advice in it works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_origin

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from nbhelpers.errors import UserError
from nbhelpers.runs import batch, parameters

NOTEBOOKS = batch.NOTEBOOKS
INT, FLOAT, BOOL, LIST = "EPOCHS", "LR", "ABLATIONS", "PE_RSITR_METHODS"


@pytest.mark.parametrize(
    "values",
    [
        {FLOAT: 1},
        {FLOAT: 1e-4},
        {BOOL: False},
        {LIST: []},
        {LIST: ["full", "lora"]},
        {"SEED": 2**32 - 1},
        {"PROFILE": "ucm_2"},
        {"CHECKPOINT": ""},
        {"PRECISION": "fp16"},
        {"CAPTIONS": 0},
        {"WORKERS": 0},
        {"WORKERS": "auto"},
        {"EVAL_PRECISION": "bf16"},
    ],
)
def test_what_is_right_passes(values):
    assert parameters.problems(values) == []


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        (BOOL, "false", "ABLATIONS is 'false', of type str, but must be bool"),
        (BOOL, 1, "ABLATIONS is 1, of type int, but must be bool."),
        (INT, True, "EPOCHS is True, of type bool, but must be int."),
        (INT, 3.0, "EPOCHS is 3.0, of type float, but must be int."),
        (INT, None, "EPOCHS is None, of type NoneType, but must be int."),
        (FLOAT, float("nan"), "LR is nan; it must be a finite number."),
        (FLOAT, float("inf"), "LR is inf; it must be a finite number."),
        (FLOAT, -1, "LR is -1; it must be above 0."),
        (FLOAT, 0.0, "LR is 0.0; it must be above 0."),
        (FLOAT, False, "LR is False, of type bool, but must be float."),
        (
            LIST,
            "[zero_shot]",
            "PE_RSITR_METHODS is '\\[zero_shot\\]', of type str, but must be list",
        ),
        (LIST, ["zero-shot"], "PE_RSITR_METHODS holds 'zero-shot'; choose 'zero_shot', "),
        (LIST, [1], "PE_RSITR_METHODS holds 1; choose 'zero_shot', "),
        ("PRECISION", "bf61", "PRECISION is 'bf61'; choose 'fp32', 'tf32', 'bf16' or 'fp16'."),
        ("PRECISION", None, "PRECISION is None; choose 'fp32', 'tf32', 'bf16' or 'fp16'."),
        ("SHARDS", None, "SHARDS is None, of type NoneType, but must be str."),
        ("CAPTIONS", "2", "CAPTIONS is '2', of type str, but must be int"),
        ("PRETRAIN", -1, "PRETRAIN is -1; it must be at least 1."),
        ("MICRO_BATCH", 0, "MICRO_BATCH is 0; take whole, auto or a number of pairs."),
        ("MICRO_BATCH", "most", "MICRO_BATCH is 'most'; take whole, auto or a number of pairs."),
        ("WORKERS", 10**6, "WORKERS is 1000000; it must be at most 256."),
        ("BATCH_SIZE", 10**9, "BATCH_SIZE is 1000000000; it must be at most 1000000."),
        ("EPOCHS", 10**4000, "EPOCHS is a number of 13288 bits; it must be at most 1000000."),
        ("K", 10**9, "K is 1000000000; it must be at most 10000000."),
        ("BEAMS", 10**6, "BEAMS is 1000000; it must be at most 1000."),
        (LIST, ["full"] * 101, "PE_RSITR_METHODS holds 101 values; name at most 100."),
        ("MICRO_BATCH", 10**4000, "MICRO_BATCH is a number of 13288 bits; take whole, auto or "),
        ("MICRO_BATCH", "9" * 5000, "MICRO_BATCH is '9+.*9'; take whole, auto or a number of"),
        ("SEED", 2**32, "SEED is 4294967296; it must be below 4294967296."),
        (
            "PRETRAIN_SETS",
            ["UCM"],
            "PRETRAIN_SETS holds 'UCM'; name a set of your own with small letters",
        ),
        (
            "SIX_MODE",
            1,
            "SIX_MODE is not declared; add it to Parameters in nbhelpers/runs/parameters.py.",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(name, value, sentence):
    (found,) = parameters.problems({name: value})
    assert re.match(sentence, found) and "\n" not in found


def test_long_values_are_shortened():
    (found,) = parameters.problems({"PRECISION": "x" * 10_000})
    assert len(found) < 200
    deep = [[[["x"] * 1000] * 1000] * 1000] * 1000
    assert len(parameters.problems({LIST: deep[:1], "SIZE": deep})[1]) < 500


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"SET": "rsicdd"}, "SET is 'rsicdd'; choose one of scenes, ucm, "),
        ({"SET": "ucm"}, "SET ucm needs DATA"),
        ({"DATA": "nowhere"}, "DATA is 'nowhere', not a folder"),
        ({"CHECKPOINT": "gone.pt"}, "CHECKPOINT is 'gone.pt', but there is no such file"),
        ({"SHARDS": "gone"}, "SHARDS is 'gone', but there is no such file"),
        (
            {"SIZE": "paper", "CLIP": "here/clip.pt"},
            "CLIP is 'here/clip.pt', but there is no such file",
        ),
        ({"CLIP": "clip_vit_b32", "PRETRAIN_SETS": []}, "PRETRAIN_SETS is empty, .* add 'scenes'"),
        (
            {"CLIP": "clip_vit_b32", "PRETRAIN_SETS": ["ucm", "scenes"], "SET": "ucm", "DATA": "."},
            "PRETRAIN_SETS begins with 'ucm', the set under study",
        ),
        (
            {"PRETRAIN_SETS": ["scenes", "rsicdd"]},
            "PRETRAIN_SETS holds 'rsicdd', none of scenes, .*; give DATA",
        ),
        (
            {"PRETRAIN_SETS": ["rsicdd"], "DATA": "."},
            "PRETRAIN_SETS holds 'rsicdd', .* of the set 'rsicdd' in ",
        ),
        (
            {"CAPTION_SETS": ["scenes"]},
            "CAPTION_SETS holds 'scenes', the set under study; take it out",
        ),
        ({"CAPTION_SETS": ["ucm"]}, "CAPTION_SETS holds 'ucm'; give DATA"),
        (
            {"CAPTION_SETS": ["ucm"], "DATA": "."},
            "CAPTION_SETS holds 'ucm'; No captions and images of the set",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(tmp_path, values, sentence):
    (found,) = parameters.problems(values, tmp_path)
    assert re.match(sentence, found) and "\n" not in found


def test_files_are_looked_for_where_the_notebooks_run(tmp_path):
    (tmp_path / "a.pt").touch()
    assert parameters.problems({"CHECKPOINT": "a.pt"}, tmp_path) == []
    assert parameters.problems({"CHECKPOINT": str(tmp_path / "a.pt")}) == []
    assert parameters.problems({"SIZE": "paper", "CLIP": "clip_vit_b32", "PRETRAIN_SETS": []}) == []


ADVISED = [
    (BOOL, "false", False),
    (BOOL, "no", False),
    (FLOAT, "1e-4", 1e-4),
    (FLOAT, "1.25e-4", 1.25e-4),
    (INT, "3", 3),
    (LIST, "[zero_shot, full]", ["zero_shot", "full"]),
    (LIST, ("full",), ["full"]),
    ("PROFILE", 2024, "2024"),
    ("CAPTIONS", "2", 2),
]


@pytest.mark.parametrize("name, wrong, meant", ADVISED)
def test_advice_leads_to_what_was_meant(name, wrong, meant):
    """As a line of a cell and of a profile; the test of papermill below tries its -y."""
    (found,) = parameters.problems({name: wrong})
    form = r"\(write `(.*)` in a cell, `(.*)` in a profile or after papermill's -y\)\.$"
    cell, line = re.search(form, found).groups()
    namespace = {}
    exec(cell, namespace)
    assert namespace[name] == meant and yaml.safe_load(line) == {name: meant}
    assert parameters.problems({name: meant}) == []


@pytest.mark.parametrize(
    "name, value",
    [
        (INT, "five"),
        (INT, 1.5),
        (BOOL, "maybe"),
        (LIST, "[nothing]"),
        (INT, "[" * 9000),
        (INT, "[" * 900),
    ],
)
def test_no_advice_where_nothing_can_be_meant(name, value):
    assert "write" not in parameters.problems({name: value})[0]


# the notebook


def small_notebook(path: Path, cell: str) -> Path:
    notebook = new_notebook(cells=[new_code_cell(cell, metadata={"tags": ["parameters"]})])
    notebook.metadata.kernelspec = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, path)
    return path


def test_names_and_defaults_are_read_from_the_cell(tmp_path):
    cell = "SEED: int = 3  # seed\nLR = 2e-3\nDATA: str = str(1)\nprint(SEED)"
    path = small_notebook(tmp_path / "a.ipynb", cell)
    assert parameters.declared(path) == {"SEED": 3, "LR": 2e-3, "DATA": None}
    with pytest.raises(UserError, match="There is no notebook .*b.ipynb"):
        parameters.declared(tmp_path / "b.ipynb")


def test_overrides_count_before_variables_and_these_before_defaults(tmp_path):
    path = small_notebook(tmp_path / "a.ipynb", "SEED: int = 3\nEPOCHS: int = 4\nLR: float = 1.0")
    found = parameters.of_notebook(path, {"SEED": 5, "EPOCHS": 6, "OTHER": 7}, {"SEED": 8})
    assert found == {"SEED": 8, "EPOCHS": 6, "LR": 1.0}


def test_names_that_papermill_set_must_be_known(tmp_path):
    path = small_notebook(tmp_path / "a.ipynb", "SEED: int = 3")
    injected = '# Parameters\nSEED = 4\nSEEDS = [1]\nnote = "a = 1"\n'
    history = ["", "SEED: int = 3", injected, "OTHER = 5"]
    with pytest.raises(UserError) as caught:
        parameters.of_notebook(path, {"In": history, "SEED": 4, "SEEDS": [1], "OTHER": 5}, {})
    assert (
        str(caught.value)
        == "a was not started. There is no parameter 'SEEDS' in a (did you mean SEED?). "
        "There is no parameter 'note' in a."
    )


PAPERMILL = [
    ("-p ABLATIONS false", "ABLATIONS is 'false'"),
    ("-r SEED 3", "SEED is '3'"),
    ("-p LR nan", "LR is nan"),
    ("-y 'PRECISION: bf61'", "PRECISION is 'bf61'"),
    ("-p EPOCHSS 3", "no parameter 'EPOCHSS' in 20_pir"),
    ("-p SHARDS x", "no parameter 'SHARDS' in 20_pir"),
    ("-p EPOCHS None", "EPOCHS is None"),
]


def test_papermill_stops_at_the_first_cell_with_one_sentence_each(tmp_path):
    """All its forms at once, on a copy of 20_pir's first cells; then what the messages advise."""
    notebook = nbformat.read(NOTEBOOKS / "20_pir.ipynb", as_version=4)
    notebook.cells = notebook.cells[:2] + [
        new_code_cell("import nbhelpers\nrun = nbhelpers.start('20_pir')"),
        new_code_cell("print('went on', ABLATIONS, run.parameters.seed)"),
    ]
    nbformat.write(notebook, tmp_path / "in.ipynb")

    def papermill(*options: str) -> str:
        words = [word for option in options for word in shlex.split(option)]
        command = [
            sys.executable,
            "-m",
            "papermill",
            "in.ipynb",
            "out.ipynb",
            "--no-progress-bar",
            *words,
        ]
        subprocess.run(command, cwd=tmp_path, capture_output=True)
        cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
        return "".join(
            output.get("text", "") + "\n".join(output.get("traceback", []))
            for cell in cells
            for output in cell.get("outputs", [])
        )

    refused = papermill(*(option for option, _ in PAPERMILL))
    assert refused.startswith("UserError: 20_pir was not started. ") and refused.count("\n") == 0
    for option, sentence in PAPERMILL:
        assert sentence in refused, option
    (advised,) = re.findall(r"`(ABLATIONS: .*?)` in a profile", refused)
    assert "went on False 3" in papermill(f"-y '{advised}'", "-p SEED 3")


@pytest.mark.parametrize("value", ["whole", "auto", 32, "32"])
def test_a_micro_batch_may_be_a_number_or_a_word(value):
    assert not parameters.problems({"MICRO_BATCH": value})


def test_papermill_takes_whole_profiles_with_what_other_notebooks_read():
    """As `-f paper.yaml -f paper_ucm.yaml` gives them; a name of no notebook stays an error."""
    notebook = NOTEBOOKS / "20_pir.ipynb"
    lines = {"PROFILE": "mine", "BASE": "paper", "PRIOR": "aid", "EPOCHS": 7}
    cell = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in lines.items())
    values = parameters.of_notebook(notebook, lines | {"In": [cell]}, {})
    assert values["EPOCHS"] == 7 and "PRIOR" not in values and "BASE" not in values
    wrong = lines | {"EPOCH": 7, "In": [f"{cell}\nEPOCH = 7"]}
    with pytest.raises(UserError, match="There is no parameter 'EPOCH' in 20_pir"):
        parameters.of_notebook(notebook, wrong, {})
    alone = {"PRIOR": "aid", "In": ["# Parameters\nPRIOR = 'aid'"]}
    with pytest.raises(UserError, match="There is no parameter 'PRIOR' in 20_pir"):
        parameters.of_notebook(notebook, alone, {})


def test_every_number_and_every_list_has_an_upper_bound():
    """Rates and seeds aside, a slip of zeros is a sentence and not a full memory."""
    for name, field in parameters.Parameters.model_fields.items():
        wrong = {int: 10**12, list: ["scenes"] * 10**4}.get(
            get_origin(field.annotation) or field.annotation
        )
        if wrong is not None:
            (sentence,) = parameters.problems({name: wrong})
            assert sentence.startswith(f"{name} "), name


def test_a_number_that_python_does_not_write_is_described():
    for name in ("EPOCHS", "LR", "SET", "MICRO_BATCH"):
        (sentence,) = parameters.problems({name: 10**5000})
        assert sentence.startswith(f"{name} is a number of 16610 bits")
