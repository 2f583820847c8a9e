"""Style, types and the direction of imports, by the tools made for them."""

from __future__ import annotations

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
