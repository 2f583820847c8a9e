"""What all tests share: the environment, the option for other reference vectors, and reasons to
skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("NBHELPERS_THREADS", "2")

HERE = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption(
        "--reference-dir",
        type=Path,
        default=HERE / "reference",
        help="folder of reference vectors, DIR/<system>/*.npz|json (default: tests/reference)",
    )


@pytest.fixture(scope="session")
def reference_dir(request) -> Path:
    return request.config.getoption("--reference-dir")


@pytest.fixture(scope="session")
def make_run() -> Callable[[], subprocess.CompletedProcess]:
    """What `make run` does in the default profile: runs what is not finished in the folder named by
    NBHELPERS_RUNS.
    """
    # notebooks share the cores
    environment = {name: value for name, value in os.environ.items() if name != "NBHELPERS_THREADS"}
    return lambda: subprocess.run(
        [sys.executable, "-m", "nbhelpers", "run"],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def chain(make_run) -> subprocess.CompletedProcess:
    """The whole chain, run once for all tests."""
    done = make_run()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def one_thread():
    """torch computes in one thread as long as a module's tests run."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _no_real_data() -> str:
    folder = os.environ.get("NBHELPERS_TEST_DATA", "")
    return (
        ""
        if folder and Path(folder).is_dir()
        else "NBHELPERS_TEST_DATA names no folder of real data"
    )


def _no_browser() -> str:
    found = any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return "" if found else "there is no Chromium on the PATH"


def pytest_collection_modifyitems(config, items):
    reasons = {
        "gpu": _no_gpu,
        "realdata": _no_real_data,
        "browser": _no_browser,
        "slow": lambda: "" if "slow" in config.option.markexpr else "slow tests run with -m slow",
    }
    for marker, reason in reasons.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        text = reason() if marked else ""
        for item in marked if text else []:
            item.add_marker(pytest.mark.skip(reason=text))
