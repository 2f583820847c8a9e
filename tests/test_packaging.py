"""pyproject.toml, constraints.txt and environment.yml describe one and the same installation."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nbhelpers.runs import commands

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned() -> dict[str, str]:
    lines = (
        line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
    return {
        name.lower().replace("_", "-"): version
        for name, version in (line.split("==") for line in lines if line)
    }


def test_every_range_holds_the_tested_version():
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned()[requirement.name.lower()]), text


def test_torch_and_torchvision_are_a_matched_pair():
    import torch
    import torchvision

    kept = torch.ops.torchvision.nms(
        torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]]), torch.tensor([0.9, 0.8]), 0.5
    )
    assert kept.tolist() == [0], "torchvision's compiled operators do not fit this torch"
    assert torchvision.__version__.split("+")[0] == pinned()["torchvision"]


def test_the_conda_environment_installs_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(
        d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python=")
    )
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    assert environment["dependencies"][-1]["pip"] == ["-c constraints.txt", "-e .[test]"]


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = (
        "import sys, nbhelpers; print(sorted({'torch', 'transformers', 'timm'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_installed_command_is_that_of_the_module():
    room, function = PROJECT["scripts"]["nbhelpers"].split(":")
    assert getattr(import_module(room), function) is commands.main
