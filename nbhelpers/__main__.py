"""`python -m nbhelpers`: the command line."""

from __future__ import annotations

import sys

from nbhelpers.runs.commands import main

if __name__ == "__main__":
    sys.exit(main())
