"""Pages of the package: modules, classes and functions with their docstrings, read from the source.

Nothing is imported, so the pages need neither torch nor minutes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from book.links import outside_code

COLUMN = re.compile(r"^(?P<name>\S+(?: \S+)*)\s{2,}(?P<text>\S.*)$")
LABEL = "file-{}".format
PROPERTIES = {"property", "cached_property"}


def rooms(package: Path) -> dict[str, list[Path]]:
    """Return the public modules of each room, in the order of the rooms' names; root files last."""
    found = {
        folder.name: _modules(folder)
        for folder in sorted(package.iterdir())
        if (folder / "__init__.py").is_file()
    }
    return found | {"root": [path for path in sorted(package.glob("*.py")) if _public(path)]}


def _modules(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if _public(path)]


def _public(path: Path) -> bool:
    return not path.stem.startswith("_") or path.name == "__init__.py"


def anchors(package: Path) -> dict[str, str]:
    """Path of a module or room below the repository -> the label of its place in the pages."""
    found = {}
    for paths in rooms(package).values():
        for path in paths:
            place = path.relative_to(package.parent)
            found[place.as_posix()] = LABEL(dotted(path, package))
            if path.name == "__init__.py":
                found[place.parent.as_posix()] = LABEL(dotted(path, package))
    return found


def dotted(path: Path, package: Path) -> str:
    """Return the dotted name of a module's file."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def page(room: str, paths: list[Path], package: Path) -> str:
    """Return the page of a room."""
    title = "The root of the package" if room == "root" else room
    return "\n\n".join([f"# {title}", *(_module(path, package, room) for path in paths)]) + "\n"


def _module(path: Path, package: Path, room: str) -> str:
    name = dotted(path, package)
    tree = Qualified(ast.parse(path.read_text("utf-8")), name).tree
    within = name.removeprefix(f"{package.name}.").removeprefix(f"{room}.")
    heading = [] if within == room else [f"## {_escaped(within)}", f"`{name}`"]
    parts = [
        f"({LABEL(name)})=",
        *heading,
        f"```{{py:module}} {name}\n```",
        prose(ast.get_docstring(tree)),
        *_types(tree),
        *(_described(node, 5) for node in _members(tree)),
    ]
    return "\n\n".join(filter(None, parts))


class Qualified(ast.NodeTransformer):
    """Write the types in a module's signatures with their full names, so that they become links."""

    def __init__(self, tree: ast.Module, module: str):
        self.names = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nbhelpers.")
            for alias in node.names
        }
        self.names |= {name: f"{module}.{name}" for name in _defined(tree)}
        self.tree: ast.Module = self.visit(tree)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        """Qualify the type of a parameter."""
        node.annotation = self._typed(node.annotation)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:  # noqa: N802
        """Qualify the type of a field."""
        self._typed(node.annotation)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:  # noqa: N802
        """Qualify the types of parameters and result."""
        node.returns = self._typed(node.returns)
        self.visit(node.args)
        return node

    def _typed(self, annotation: ast.expr | None) -> ast.expr | None:
        for node in ast.walk(annotation) if annotation else ():
            if isinstance(node, ast.Name):
                node.id = self.names.get(node.id, node.id)
        return annotation


def _defined(tree: ast.Module) -> Iterator[str]:
    """Yield the names of the public classes and types that a module defines."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        elif alias := _alias(node):
            yield alias


def _alias(node: ast.stmt) -> str:
    """Return the name of a type alias, such as `Rows = Sequence[int]`; "" for another statement."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
        shaped = isinstance(node.value, ast.Subscript | ast.BinOp)
        return name if shaped and name[0].isupper() and not name.isupper() else ""
    return ""


def _types(tree: ast.Module) -> Iterator[str]:
    """Yield the directives of the type aliases of a module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and (name := _alias(node)):
            yield f":::{{py:type}} {name}\n:canonical: {ast.unparse(node.value)}\n:::"


def _members(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield the public classes and functions; of a class, those that say what they do."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        sets = any(ast.unparse(each).endswith(".setter") for each in node.decorator_list)
        if not sets and (isinstance(tree, ast.Module) or ast.get_docstring(node)):
            yield node


def _described(node: ast.FunctionDef | ast.ClassDef, fence: int, within: bool = False) -> str:
    """Return the directive of a class, function or method, with those of its members."""
    inner = [prose(ast.get_docstring(node))]
    if isinstance(node, ast.ClassDef):
        head = f"{{py:class}} {_signature(node)}"
        inner += [_described(each, fence - 1, True) for each in _members(node)]
    elif within:
        head = _method(node)
    else:
        head = f"{{py:function}} {_signature(node)}"
    body = "\n\n".join(filter(None, inner))
    return f"{':' * fence}{head}\n\n{body}\n{':' * fence}"


def _method(node: ast.FunctionDef) -> str:
    """Return directive and options of a method or a property."""
    named = {ast.unparse(each).split(".")[-1] for each in node.decorator_list}
    if named & PROPERTIES:
        kind = f"\n:type: {ast.unparse(node.returns)}" if node.returns else ""
        return f"{{py:property}} {node.name}{kind}"
    options = [f"\n:{each}:" for each in ("classmethod", "staticmethod") if each in named]
    return f"{{py:method}} {_signature(node)}{''.join(options)}"


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Return name, parameters and result on one line."""
    if isinstance(node, ast.ClassDef):
        return f"{node.name}{_construction(node)}"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = node.args
    first = (arguments.posonlyargs + arguments.args)[:1]
    if first and first[0].arg in {"self", "cls"} and not first[0].annotation:
        arguments = _without_first(arguments)
    return f"{node.name}({ast.unparse(arguments)}){result}"


def _without_first(arguments: ast.arguments) -> ast.arguments:
    given = {name: getattr(arguments, name) for name in arguments._fields}
    first = "posonlyargs" if arguments.posonlyargs else "args"
    return ast.arguments(**given | {first: given[first][1:]})


def _construction(node: ast.ClassDef) -> str:
    """Return the parameters that make a class: of its `__init__`, or the fields of a dataclass."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return f"({ast.unparse(_without_first(each.args))})"
    if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        return ""
    fields = [
        ast.unparse(each)
        for each in node.body
        if isinstance(each, ast.AnnAssign) and not ast.unparse(each.target).startswith("_")
    ]
    return f"({', '.join(fields)})"


def prose(docstring: str | None) -> str:
    """Return a docstring as Markdown: paragraphs, and its columns of names as definitions."""
    if not docstring:
        return ""
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", docstring))


def _paragraph(part: str) -> str:
    lines = part.splitlines()
    if any(line.startswith("  ") for line in lines) and not any(map(COLUMN.match, lines)):
        return "```text\n" + "\n".join(lines) + "\n```"
    if not any(map(COLUMN.match, lines)):
        return outside_code("\n".join(line.strip() for line in lines), _escaped)
    written: list[str] = []
    for line in lines:
        if found := COLUMN.match(line):
            written += [f"\n{_code(found['name'])}\n: {_safe(found['text'])}"]
        elif line.startswith(" ") and written:
            written[-1] += f" {_safe(line.strip())}"
        else:
            written.append(f"\n{_safe(line)}\n")
    return "\n".join(written).strip()


def _code(names: str) -> str:
    return f"``{names}``" if "`" in names else f"`{names}`"


def _safe(text: str) -> str:
    return outside_code(text, _escaped)


def _escaped(text: str) -> str:
    text = re.sub(r"([\\*_<\[\]${}~^|])", r"\\\1", text)
    return re.sub(r"^([#+>:-]|\d+[.)])", r"\\\1", text, flags=re.M)
