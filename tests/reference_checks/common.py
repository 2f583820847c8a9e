"""What the checks against the authors' vectors share: the files, filling a model, and gradients."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from closeness import assert_close


class Vectors:
    """One .npz: `meta`, and tensors by key; `param()` gives the stored parameters."""

    def __init__(self, path):
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta = json.loads(str(self.arrays["meta"])) if "meta" in self.arrays else {}

    def __getitem__(self, key):
        return (
            torch.from_numpy(self.arrays[key])
            if key in self.arrays
            else pytest.skip(f"these vectors lack {key}")
        )

    def leaf(self, key):
        return self[key].clone().requires_grad_()

    def param(self):
        return {
            key.removeprefix("param/"): torch.from_numpy(a)
            for key, a in self.arrays.items()
            if key.startswith("param/")
        }

    def gradients_of_parameters(self):
        return [
            key.removeprefix("grad/param/") for key in self.arrays if key.startswith("grad/param/")
        ]


@pytest.fixture
def vectors(request):
    """vectors("pir/mhsa.npz") -> Vectors; skips by name where the folder has no such file."""
    return lambda name: Vectors(reference_file(request, name))


def reference_file(request, name):
    path = request.config.getoption("--reference-dir") / name
    if not path.exists():
        pytest.skip(f"{path.parent.parent} holds no {name}")
    return path


def fill(model, state):
    """Loads the stored parameters; each of them must have a place in the model."""
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    assert not unexpected, unexpected
    return model.eval()


def check_gradients(parameters, v):
    """Every stored gradient of a parameter against that of the parameter of this name."""
    names = v.gradients_of_parameters()
    assert names
    assert_close(
        {name: parameters[name].grad for name in names},
        {name: v[f"grad/param/{name}"] for name in names},
    )
