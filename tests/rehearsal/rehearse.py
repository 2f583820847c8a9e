"""A rehearsal of the profile paper_ucm on a CPU, with random weights in the public forms.

    python tests/rehearsal/rehearse.py full [FOLDER OF UCM-CAPTIONS]

"full" takes the published networks, of OPT-2.7B few blocks; "cut" takes narrow and shallow ones.
Nothing of its results means anything: it says whether a run at paper size comes to its end.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROFILE = "paper_ucm"
# The profile's batches are larger than the training split here. Notebooks learn the pairs of one
# batch by heart, in up to 120 steps.
GIVEN = {
    "DEVICE": "cpu",
    "WORKERS": 2,
    "EPOCHS": 1,
    "BATCH_SIZE": 4,
    "PIR_CLIP_EPOCHS": 1,
    "PIR_CLIP_BATCH": 4,
    "PE_RSITR_EPOCHS": 1,
    "PE_RSITR_BATCH": 4,
    "CFITR_EPOCHS": 1,
    "CFITR_BATCH": 4,
    "CFITR_ACCUMULATE": 2,
    "FALSE_TEXTS": 3,
    "STAGE1_EPOCHS": 1,
    "STAGE2_EPOCHS": 1,
    "FINETUNE_EPOCHS": 1,
    "CAPTION_BATCH": 4,
    "IMAGES": 2,
}


def environment(size: str, home: Path) -> dict[str, str]:
    """The variables of all processes of a rehearsal in the folder `home`."""
    paths = [str(path) for path in (HERE / "narrow", HERE.parent, ROOT)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    own = {"PYTHONPATH": os.pathsep.join(paths), "REHEARSAL": size, "HF_HUB_OFFLINE": "1"}
    own |= {"NBHELPERS_RUNS": str(home / "runs"), "NBHELPERS_WEIGHTS": str(home / "weights")}
    return os.environ | own | {"TQDM_DISABLE": "1", "HF_HOME": str(home / "hub")}


def call(size: str, home: Path, *words: str) -> subprocess.CompletedProcess:
    """Run Python with these words from the repository, and print what it prints."""
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment(size, home), text=True)


def rehearse(size: str, home: Path, data: str = "") -> int:
    """Write weights and sets, run the chain, read the authors' files; the first exit code."""
    (home / "weights").mkdir(parents=True)
    (home / "data").mkdir()
    cut = json.dumps(GIVEN | {"DATA": str(home / "data")})
    chain = [str(HERE / "forks.py"), str(home), cut]
    if size == "full":
        chain = ["-m", "nbhelpers", "run", "--profile", PROFILE, "--data", str(home / "data")]
        chain += ["--set", *(f"{name}={value}" for name, value in GIVEN.items())]
    steps = {
        "weights and sets": [str(HERE / "public_files.py"), str(home), data],
        "all notebooks": chain,
        "the authors' files": [str(HERE / "authors_files.py"), str(home)],
    }
    for name, words in steps.items():
        began = time.monotonic()
        done = call(size, home, *words)
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(
            f"{name}: exit code {done.returncode} after {(time.monotonic() - began) / 60:.1f} "
            f"minutes; the largest process so far took {largest:.1f} GiB",
            flush=True,
        )
        if done.returncode:
            return done.returncode
    return 0


def main(size: str = "full", data: str = "") -> int:
    """Rehearse in a temporary folder."""
    if size not in ("full", "cut"):
        print(f"'{size}' is no size of a rehearsal; choose full or cut.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        return rehearse(size, Path(folder), data)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
