"""Check the fields of a paper's configuration."""

from __future__ import annotations

from collections.abc import Mapping

from nbhelpers.errors import UserError


def check(config: object, problems: Mapping[str, object]) -> None:
    """Raise a UserError that lists the problems whose value is true.

    `problems` maps a sentence about the fields of `config` to whether it applies.
    """
    found = [problem for problem, applies in problems.items() if applies]
    if found:
        raise UserError(f"{type(config).__name__}: {'; '.join(found)}.")
