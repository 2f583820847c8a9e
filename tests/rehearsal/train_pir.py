"""Train PIR on a copy of the notebooks: `torchrun train_pir.py DATA NOTEBOOKS`."""

import sys
from pathlib import Path

from nbhelpers.runs import batch

if __name__ == "__main__":
    batch.train("pir", "paper_ucm", sys.argv[1], notebooks=Path(sys.argv[2]))
