"""The one error that a user sees."""

from __future__ import annotations


class UserError(ValueError):
    """A foreseeable mistake: one sentence says what, where, and how to mend it."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows in a notebook: the sentence without the traceback."""
        return [f"{type(self).__name__}: {self}"]
