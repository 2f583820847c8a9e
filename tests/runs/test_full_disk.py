"""A disk that fills while a checkpoint is saved: one sentence, the old pair intact, nothing
half-written.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from nbhelpers.errors import UserError
from nbhelpers.towers import checkpoints

REAL_DISK = """
import sys, torch
from pathlib import Path
from nbhelpers.towers import checkpoints
from nbhelpers.errors import UserError
folder = Path(sys.argv[1])
checkpoints.save_checkpoint(folder / "best", {"w": torch.ones(1000)}, {"step": 1})
before = sorted(p.name for p in folder.iterdir())
try:
    checkpoints.save_checkpoint(folder / "best", {"w": torch.ones(1_000_000)}, {"step": 2})
except UserError as error:
    print(error)
state, meta = checkpoints.load_checkpoint(folder / "best")
assert meta == {"step": 1} and state["w"].shape == (1000,)
assert '"step": 1' in (folder / "best.json").read_text()
assert sorted(p.name for p in folder.iterdir()) == before, list(folder.iterdir())
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs the user namespaces of Linux")
def test_a_really_full_disk(tmp_path):
    """A 100 kB file system of its own, in a namespace of its own."""
    (tmp_path / "disk").mkdir()
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounted = f"mount -t tmpfs -o size=100k none '{tmp_path}/disk'"
    if subprocess.run([*mount, mounted], capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    script = tmp_path / "save.py"
    script.write_text(REAL_DISK)
    root = Path(checkpoints.__file__).parents[2]
    done = subprocess.run(
        [*mount, f"{mounted} && exec '{sys.executable}' '{script}' '{tmp_path}/disk'"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The disk is full:") and "best.safetensors" in done.stdout


@pytest.mark.parametrize("moment", ["weights", "json"])
@pytest.mark.parametrize(
    "number, sentence",
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "may not be read or written"),
    ],
)
def test_the_old_pair_survives_a_failed_save(tmp_path, monkeypatch, moment, number, sentence):
    checkpoints.save_checkpoint(tmp_path / "best", {"w": torch.ones(3)}, {"step": 1})
    names = sorted(path.name for path in tmp_path.iterdir())

    def fail_in_safetensors(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: (os error {number})")

    def fail_in_python(self, *_, **__):
        raise OSError(number, os.strerror(number))

    if moment == "weights":
        monkeypatch.setattr(safetensors.torch, "save_file", fail_in_safetensors)
    else:
        monkeypatch.setattr(Path, "write_text", fail_in_python)
    with pytest.raises(UserError, match=sentence):
        checkpoints.save_checkpoint(tmp_path / "best", {"w": torch.zeros(5)}, {"step": 2})
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    state, meta = checkpoints.load_checkpoint(tmp_path / "best")
    assert meta == {"step": 1} and torch.equal(state["w"], torch.ones(3))
