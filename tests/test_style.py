"""Style, types and the direction of imports, by the tools made for them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKED = ("nbhelpers", "tests", "notebooks")
COMMANDS = {
    "ruff check": (sys.executable, "-m", "ruff", "check", "--no-cache", *CHECKED),
    "ruff format": (sys.executable, "-m", "ruff", "format", "--no-cache", "--check", *CHECKED),
    "import-linter": (str(Path(sys.executable).with_name("lint-imports")), "--no-cache"),
    "mypy": (sys.executable, "-m", "mypy", "--cache-dir", "/dev/null", "nbhelpers"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_tool_finds_nothing(name):
    done = subprocess.run(COMMANDS[name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def read_twice(node: ast.AST) -> bool:
    """A comprehension with two `for`, or a conditional expression within another."""
    if isinstance(node, COMPREHENSIONS):
        return len(node.generators) > 1
    inner = list(ast.walk(node))[1:] if isinstance(node, ast.IfExp) else []
    return any(isinstance(part, ast.IfExp) for part in inner)


def test_an_expression_does_one_thing():
    found = []
    for path in sorted((ROOT / "nbhelpers").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines = [node.lineno for node in ast.walk(tree) if read_twice(node)]
        found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert not found, f"write a loop, or itertools.product or chain: {found}"
