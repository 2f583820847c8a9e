"""Python imports this first in each process whose PYTHONPATH names this folder.

`REHEARSAL` says which sizes then stand for the published ones: those of SIZES[REHEARSAL] in
`sizes.py`. Where parameters are only counted, on torch's meta device, the published sizes stay.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path

CHANGED = ("towers.backbones", "towers.foreign_configs", "papers.pir", "papers.bita")
sys.path.append(str(Path(__file__).parents[1]))


class Changed(importlib.abc.MetaPathFinder):
    """Imports some modules as ever, then hands them to a function."""

    def find_spec(self, name, path=None, target=None):
        if name.removeprefix("nbhelpers.") not in CHANGED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            import sizes

            execute(module)
            sizes.change(module, os.environ["REHEARSAL"])

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, Changed())
