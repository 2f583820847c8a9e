"""Write equations as MathML, which browsers draw without a script and without a network."""

from __future__ import annotations


def visit_inline(translator, node) -> None:
    """Write an equation within a line."""
    _write(translator, node, "inline")


def visit_block(translator, node) -> None:
    """Write an equation of its own lines."""
    _write(translator, node, "block")


def _write(translator, node, display: str) -> None:
    from docutils.nodes import SkipNode
    from latex2mathml.converter import convert

    tag = "span" if display == "inline" else "div"
    equation = convert(node.astext(), display=display)
    translator.body.append(f'<{tag} class="equation-{display}">{equation}</{tag}>')
    raise SkipNode
