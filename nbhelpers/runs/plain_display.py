"""Let `display` of IPython write plain text where there is no notebook to show more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def plain_display() -> Iterator[None]:
    """Print the text of what is displayed, within the block.

    IPython alone would print `<IPython.core.display.Markdown object>`. What imports `display`
    within the block gets the plain one. Pictures and widgets are left out.
    """
    from IPython import display

    before = display.display
    display.display = _say
    try:
        yield
    finally:
        display.display = before


def _say(*objects: Any, **_options: Any) -> None:
    for one in objects:
        text = _text_of(one)
        if text:
            print(text)


def _text_of(one: Any) -> str:
    """Return the plain text of an object; "" for a picture and a widget."""
    from IPython.display import Markdown, TextDisplayObject

    if isinstance(one, TextDisplayObject):
        return str(one.data) if isinstance(one, Markdown) else ""
    if hasattr(one, "to_string"):
        return one.to_string()
    rich = any(hasattr(one, name) for name in ("_repr_mimebundle_", "_repr_png_", "savefig"))
    return "" if rich else str(one)
