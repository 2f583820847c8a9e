"""The notebooks as files: skeleton, parameters, tags, links, stored form; and the profiles against
them.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin

import nbformat
import papermill
import pytest

from nbhelpers.data import catalog
from nbhelpers.papers import adaptation
from nbhelpers.runs import batch, parameters, stored_notebooks
from nbhelpers.systems import trained_systems
from nbhelpers.training import schedule

FOLDER = batch.NOTEBOOKS
PATHS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
BOOKS = {name: nbformat.read(path, as_version=4) for name, path in PATHS.items()}
PROFILES = sorted(path.stem for path in (FOLDER / "profiles").glob("*.yaml"))
IGNORED = "nbval-ignore-output"

every_notebook = pytest.mark.parametrize("name", BOOKS)


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in BOOKS[name].cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def parameters_cell(name: str) -> nbformat.NotebookNode:
    tagged = [cell for cell in code_cells(name) if "parameters" in tags(cell)]
    assert len(tagged) == 1, f"{name} has {len(tagged)} cells tagged parameters"
    return tagged[0]


def kind_of(parameter: str) -> str:
    """The kind that a cell writes for a declared parameter: "int", "str", "list", ..."""
    annotation = parameters.Parameters.model_fields[parameter].annotation
    if get_origin(annotation) is Literal:
        return type(get_args(annotation)[0]).__name__
    return (get_origin(annotation) or annotation).__name__


def choices(parameter: str) -> tuple[str, ...]:
    """What a parameter, or an element of a list, may be."""
    annotation = parameters.Parameters.model_fields[parameter].annotation
    return (
        get_args(get_args(annotation)[0])
        if get_origin(annotation) is list
        else get_args(annotation)
    )


def test_the_folder_holds_the_chain_and_nothing_else():
    assert list(BOOKS) == [step.name for step in batch.CHAIN]
    assert all(re.fullmatch(r"\d\d_[a-z_]+", name) for name in BOOKS)
    assert len({name[:2] for name in BOOKS}) == len(BOOKS)


@every_notebook
def test_it_begins_with_its_title_its_table_and_its_neighbours(name):
    first = BOOKS[name].cells[0]
    assert first.cell_type == "markdown" and re.match(r"# \S", first.source)
    head = first.source.lower()
    assert all(f"| {word}" in head for word in ("reads", "writes", "time")), (
        "the table reads / writes / time"
    )
    names = [step.name for step in batch.CHAIN]
    place = names.index(name)
    for neighbour in names[max(place - 1, 0) : place] + names[place + 1 : place + 2]:
        assert f"({neighbour}.ipynb)" in first.source, f"no link to {neighbour}"


@every_notebook
def test_it_opens_with_a_picture_of_its_result(name):
    """An image of the default run, in the first two cells of text."""
    texts = [cell.source for cell in BOOKS[name].cells if cell.cell_type == "markdown"][:2]
    (link,) = re.findall(r"!\[[^\]]{10,}\]\((\S+\.png)\)", "\n".join(texts))
    picture = (FOLDER / link).resolve()
    assert picture.is_file() and picture.stat().st_size <= 120_000


@pytest.mark.parametrize("name", trained_systems.NOTEBOOK_OF.values())
def test_a_system_is_drawn(name):
    drawn = [cell for cell in code_cells(name) if '"architecture"' in cell.source]
    assert len(drawn) == 1 and any(
        "image/png" in output.get("data", {}) for output in drawn[0].outputs
    )


def test_the_stored_notebooks_are_of_one_run():
    stamps = stored_notebooks.stamps()
    assert len({one.get("package") for one in stamps.values()}) == 1, stamps
    assert all(one.get("cells") for one in stamps.values())
    assert sum(path.stat().st_size for path in PATHS.values()) < 6_000_000


@every_notebook
def test_it_ends_with_summary_exercises_and_references(name):
    text = "\n".join(cell.source for cell in BOOKS[name].cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert headings[-3:] == ["Summary", "Exercises", "References"]
    assert BOOKS[name].cells[-1].cell_type == "markdown"


@every_notebook
def test_parameters_are_annotated_commented_literals(name):
    cell = parameters_cell(name)
    found = {}
    lines = cell.source.splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if line.startswith("#"):
            continue
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.AnnAssign), f"'{line}' is not NAME: kind = literal"
        kind, value = ast.unparse(statement.annotation), ast.literal_eval(statement.value)
        assert statement.target.id.isupper(), f"'{line}' has no upper-case name"
        commented = "#" in line[statement.end_col_offset :] or above.startswith("#")
        assert commented, f"'{line}' has no comment beside or above it"
        assert kind == kind_of(statement.target.id), (
            f"'{line}' and nbhelpers/runs/parameters.py differ"
        )
        assert not parameters.wrong_values({statement.target.id: value}), (
            f"'{line}' has a wrong default"
        )
        found[statement.target.id] = kind, value
    inspected = papermill.inspect_notebook(str(PATHS[name])).items()
    seen = {key: entry["inferred_type_name"] for key, entry in inspected}
    assert seen == {key: kind for key, (kind, _) in found.items()}, (
        "what papermill reads of the cell"
    )
    assert parameters.declared(PATHS[name]) == {key: value for key, (_, value) in found.items()}
    assert parameters.problems(parameters.declared(PATHS[name])) == []
    assert found["PROFILE"] == ("str", "default")
    assert found.get("SEED", ("int", 0)) == ("int", 0)


@every_notebook
def test_set_up_starts_the_run_by_its_name_alone(name):
    starts = [
        (cell, call)
        for cell in code_cells(name)
        for call in ast.walk(ast.parse(cell.source))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "nbhelpers.start"
    ]
    assert len(starts) == 1
    cell, call = starts[0]
    assert ast.unparse(call) == f"nbhelpers.start('{name}')"
    assert IGNORED in tags(cell), "the header differs between machines"


@every_notebook
def test_only_the_cell_of_parameters_sets_them(name):
    others = [ast.parse(cell.source) for cell in code_cells(name) if "parameters" not in tags(cell)]
    nodes = [node for tree in others for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stored_names = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    assert not stored_names.intersection(parameters.declared(PATHS[name]))


def test_every_declared_parameter_belongs_to_a_notebook():
    assert set(parameters.Parameters.model_fields) == set().union(
        *map(parameters.declared, PATHS.values())
    )


def test_declared_choices_are_those_of_the_code():
    assert set(choices("PE_RSITR_METHODS")) == set(adaptation.METHODS)
    for precision in choices("PRECISION"):
        schedule.TrainConfig(epochs=1, lr=1.0, precision=precision)


@pytest.mark.parametrize(
    "parameter, name",
    [
        ("PIR_CLIP_VARIANTS", "21_pir_clip"),
        ("PE_RSITR_VARIANTS", "22_pe_rsitr"),
        ("CFITR_VARIANTS", "23_cfitr"),
        ("BITA_VARIANTS", "24_bita"),
    ],
)
def test_declared_variants_are_those_of_the_notebook(parameter, name):
    (cell,) = [
        cell.source
        for cell in code_cells(name)
        if re.search(rf" in \(?{parameter} if", cell.source)
    ]
    dictionaries = [node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Dict)]
    known = [{ast.unparse(key) for key in one.keys} for one in dictionaries]
    assert {repr(choice) for choice in choices(parameter)} in known


MOST_LINES = 20  # of a cell of code, imports and the list of parameters aside
LONGER = {"32_bring_your_model": 29}  # may have longer cells


@every_notebook
def test_cells_are_short_and_told_about(name):
    for cell in code_cells(name):
        lines = cell.source.splitlines()
        assert max(map(len, lines)) <= 100, cell.source
        if "parameters" not in tags(cell):
            imported = [
                node.end_lineno - node.lineno + 1
                for node in ast.parse(cell.source).body
                if isinstance(node, ast.Import | ast.ImportFrom)
            ]
            assert len(lines) - sum(imported) <= LONGER.get(name, MOST_LINES), cell.source
    kinds = "".join(cell.cell_type[0] for cell in BOOKS[name].cells)
    assert "ccc" not in kinds, "three code cells in a row without a word between them"


@every_notebook
def test_code_suits_papermill_and_nbval(name):
    nodes = []
    for cell in code_cells(name):
        assert set(tags(cell)) <= {"parameters", IGNORED, "train"}
        assert not re.search(r"^\s*[%!]", cell.source, re.M), (
            "magics and shell commands are no Python"
        )
        assert not re.search(r";\s*$", cell.source), "nbval shows what a trailing semicolon hides"
        nodes += ast.walk(ast.parse(cell.source))
    assert any(isinstance(node, ast.Assert) for node in nodes), (
        "it is run unattended and asserts nothing"
    )
    assert BOOKS[name].metadata.kernelspec.name == "python3"


@every_notebook
def test_each_assertion_says_what_must_hold(name):
    trees = [ast.parse(cell.source) for cell in code_cells(name)]
    assertions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    silent = [ast.unparse(node) for node in assertions if node.msg is None]
    assert assertions and not silent


@pytest.mark.parametrize("name", trained_systems.NOTEBOOK_OF.values())
def test_cells_for_training_need_no_others(name):
    found = [cell.source for cell in code_cells(name) if {"parameters", "train"} & set(tags(cell))]
    nodes = list(ast.walk(ast.parse("\n".join(found))))
    used = {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    made = {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    made |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    made |= {
        (name.asname or name.name).split(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert not used - made - set(dir(builtins)) and {"run", "files"} <= made


@every_notebook
def test_relative_links_lead_somewhere(name):
    for cell in BOOKS[name].cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", cell.source):
                assert (Path(FOLDER) / target).exists(), f"{target} does not exist"


@every_notebook
def test_it_is_in_its_stored_form(name):
    assert stored_notebooks.verify([name]) == []


@every_notebook
def test_nbval_has_something_to_compare(name):
    compared = [cell for cell in code_cells(name) if cell.outputs and IGNORED not in tags(cell)]
    assert compared, "no checked cell has a stored output"


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_fit_the_notebooks(profile, tmp_path):
    for name in catalog.KNOWN:
        (tmp_path / f"dataset_{name}.json").touch()
        (tmp_path / f"{name}_images").mkdir()
    given = batch.check_profile(profile, {"SEED": 0, "DATA": str(tmp_path)})
    lines = (FOLDER / "profiles" / f"{profile}.yaml").read_text()
    assert "BASE: paper " in lines or not profile.startswith("paper_")
    assert batch.read_profile(profile)["PROFILE"] == profile
    assert all(values["PROFILE"] == profile for values in given.values())


def test_the_published_profiles_are_there():
    assert {"ucm", "rsicd", "paper_rsicd", "paper_rsitmd", "paper_ucm", "paper_nwpu"} <= set(
        PROFILES
    )


def imported(trees: list[ast.AST]) -> dict[str, object]:
    """What the cells of a notebook import from the package, by name."""
    found: dict[str, object] = {}
    for node in chain.from_iterable(map(ast.walk, trees)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nbhelpers"):
            room = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(room, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(room, alias.name)
    return found


@every_notebook
def test_every_name_that_a_notebook_takes_from_the_package_exists(name):
    trees = [ast.parse(cell.source) for cell in code_cells(name)]
    known, missing = imported(trees), []
    for node in chain.from_iterable(map(ast.walk, trees)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = known.get(node.value.id)
            if isinstance(owner, ModuleType | type) and not hasattr(owner, node.attr):
                missing.append(ast.unparse(node))
    assert not missing
