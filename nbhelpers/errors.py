"""What every room uses: the one error a user sees, and writing that leaves nothing half-written."""

from __future__ import annotations


class UserError(ValueError):
    """A foreseeable mistake, told in one sentence: what, where, how to mend."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it in a notebook: the sentence, without the lines of code that led
        to it.
        """
        return [f"{type(self).__name__}: {self}"]
