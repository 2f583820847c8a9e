"""Parts that a notebook writes itself: are they the package's, and does a checkpoint say so?

A notebook trains the central part of a paper as it stands in a cell. While the cell does what the
package's part does, the checkpoint serves everywhere. An edited cell makes another model, which
only its own notebook can build again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbhelpers.towers.checkpoints import EDITED


@torch.no_grad()
def agrees(own: Callable, package: Callable, *inputs: Any) -> bool:
    """Tell whether two functions give the same for the inputs: tensors equal to 1e-5.

    An own function that fails on them, or gives another form, does not agree.
    """
    expected = _tensors(package(*inputs))
    try:
        found = _tensors(own(*inputs))
    except Exception:  # whatever an edited cell may raise; training it will show that again
        return False
    return len(found) == len(expected) and all(
        one.shape == other.shape
        and torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-6)
        for one, other in zip(found, expected, strict=True)
    )


def modules_agree(
    make_own: Callable[[], nn.Module], make_package: Callable[[], nn.Module], *inputs: Any
) -> bool:
    """Tell whether two makers of modules give the same module.

    Both start from the same seed. Equal are the names of the parameters, their starting values and
    the outputs in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        package = make_package().eval()
        torch.manual_seed(0)
        try:
            own = make_own().eval()
        except Exception:  # as in `agrees`
            return False
    ours, theirs = own.state_dict(), package.state_dict()
    if list(ours) != list(theirs) or not all(
        torch.equal(ours[name], theirs[name]) for name in theirs
    ):
        return False
    with torch.no_grad():  # zero weights would hide what lies behind them
        for ours_p, theirs_p in zip(own.parameters(), package.parameters(), strict=True):
            drawn = torch.randn(theirs_p.shape, generator=torch.Generator().manual_seed(1))
            ours_p.copy_(drawn)
            theirs_p.copy_(drawn)
    return agrees(own, package, *inputs)


def meta(name: str, agreed: bool) -> dict[str, str]:
    """Return what a checkpoint's metadata says of the part `name`: nothing if it agreed.

    `checkpoints.meta_of` refuses a checkpoint that names an edited part.
    """
    return {} if agreed else {EDITED: name}


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [result[name] for name in sorted(result)]
    return [part if isinstance(part, Tensor) else torch.as_tensor(part) for part in result]
