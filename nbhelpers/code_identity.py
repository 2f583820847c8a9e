"""Digest the code that decides a result: all definitions that some code reaches.

A definition is a function, a class or an assigned name at the top of a module of this package. It
counts as its syntax tree without docstrings, comments, formatting, annotations and imports. Where
it lies does not count: a moved file, a moved definition or another style of import keeps the
digest. A definition reaches all that it names, and what that names in turn. Methods of objects are
not followed, since nothing says what class these have: name their classes as roots too.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import linecache
import symtable
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.util import resolve_name
from itertools import accumulate, chain
from pathlib import Path
from types import ModuleType
from typing import Any

from nbhelpers.errors import UserError

# in the place of a definition's name: a whole module; what it does on import beside defining
WHOLE, LOOSE = "", "*"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
DEFINITIONS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
    ast.AugAssign,
)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
IMPORTS = (ast.Import, ast.ImportFrom)
# fields of nodes that compute nothing
UNSEEN = ("annotation", "returns", "type_comment", "ctx", "kind")
Address = tuple[str, str]  # a module, and in it "function", "Class", "Class.member", WHOLE or LOOSE


def code_digest(*roots: Any) -> str:
    """sha256 of all code of this package that the roots reach, hex.

    roots  a class, function or module, of another file with what it names of this package; (class,
           *names): these members alone, of the class and its bases, and the members that they name;
           a text: the source of further code, such as the cells of a notebook
    UserError for what has no source of its own, a member that is not there, and a text that is not
    Python.
    """
    return _digest_of(roots)


@cache
def _digest_of(roots: tuple) -> str:
    return _this_package().digest(*roots)


def text_digest(source: str) -> str:
    """Return the sha256 (hex) of what a text computes, statement by statement.

    What it names is not followed. UserError for a text that is not Python.
    """
    module = _Module("the text", source, "")
    return _sha256(_Reader(Code({}), module).plain(ast.parse(source).body))


@cache
def _this_package() -> Code:
    root = Path(__file__).resolve().parent
    return Code.of_folder(root)


class Code:
    """The modules of a package: name -> source text.

    `packages` names those that hold others (`__init__.py`).
    """

    def __init__(self, sources: Mapping[str, str], packages: Iterable[str] = ()):
        self.sources, self.packages = dict(sources), set(packages)
        self._modules: dict[str, _Module] = {}
        self._read: dict[Address, tuple[str, list[Address]]] = {}

    @classmethod
    def of_folder(cls, root: Path) -> Code:
        """All modules below the folder of a package."""
        sources, packages = {}, set()
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            sources[name] = path.read_text(encoding="utf-8")
            packages |= {name} if parts[-1] == "__init__" else set()
        return cls(sources, packages)

    def digest(self, *roots: object) -> str:
        """As `code_digest`."""
        first = list(chain.from_iterable(map(self._addresses, roots)))
        reached = self._reached(first)
        digests, count = dict.fromkeys(reached, ""), 0
        # each round tells more definitions apart, by those that they name
        while len(set(digests.values())) > count:
            count = len(set(digests.values()))
            digests = {
                here: _sha256(own, [digests[name] for name in names])
                for here, (own, names) in reached.items()
            }
        return _sha256(sorted({digests[here] for here in first}), sorted(set(digests.values())))

    def _addresses(self, root: Any) -> list[Address]:
        if isinstance(root, str):
            name = f"text {_sha256(root)}"
            self.sources[name] = root
            return [(name, WHOLE)]
        if isinstance(root, tuple):
            return self._members(self._addresses(root[0])[0], root[1:])
        module = root.__name__ if isinstance(root, ModuleType) else root.__module__
        if module not in self.sources:
            return self._addresses(_text_of(root))
        return [
            (module, WHOLE if isinstance(root, ModuleType) else root.__qualname__.partition(".")[0])
        ]

    def _members(self, of: Address, names: Iterable[str]) -> list[Address]:
        found, ahead, family = [], list(names), self._family(of)
        while ahead:
            name = ahead.pop()
            for module, owner in family:
                here = (module, f"{owner}.{name}")
                statements = _bound(self.statements((module, owner))[0].body).get(name, [])
                if statements and here not in found:
                    found.append(here)
                    nodes = chain.from_iterable(map(ast.walk, statements))
                    ahead += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
        lacking = set(names) - {name.partition(".")[2] for _, name in found}
        if lacking:
            raise UserError(f"{of[1]} has no member {min(lacking)}; name one that it has.")
        return found

    def _family(self, of: Address) -> list[Address]:
        """A class and its bases in this package."""
        reader = _Reader(self, self.module(of[0]))
        bases = filter(None, map(reader.target, self.statements(of)[0].bases))
        families = [self._family(base) for base, _ in bases if base]
        return [of, *chain.from_iterable(families)]

    def module(self, name: str) -> _Module:
        """Return a module, parsed once."""
        if name not in self._modules:
            self._modules[name] = _Module(
                name, self.sources[name], name if name in self.packages else name.rpartition(".")[0]
            )
        return self._modules[name]

    def statements(self, here: Address) -> list[Any]:
        """What defines the name at an address."""
        module, (name, _, member) = self.module(here[0]), here[1].partition(".")
        found = module.loose if name == LOOSE else module.definitions[name]
        if not member:
            return found
        owner: Any = found[0]
        return _bound(owner.body)[member]

    def find(self, dotted: str) -> tuple[Address | None, list[str]]:
        """Return the definition that a dotted name means, and the attributes behind it.

        The definition is None for a name outside this package.
        """
        parts = dotted.split(".")
        cut = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in self.sources), 0)
        if not cut:
            return None, parts
        name, rest = ".".join(parts[:cut]), parts[cut:]
        if rest and rest[0] in self.module(name).definitions:
            return (name, rest[0]), rest[1:]
        if rest and rest[0] in self.module(name).imports:
            return self.find(".".join([self.module(name).imports[rest[0]], *rest[1:]]))
        return (name, WHOLE), rest

    def _reached(self, first: Iterable[Address]) -> dict[Address, tuple[str, list[Address]]]:
        """Return for each address that `first` reaches its digest and what it names.

        The digest is of what is computed there, the names are the definitions that it uses.
        """
        found, ahead = {}, list(first)
        while ahead:
            here = ahead.pop()
            if here not in found:
                found[here] = self._definition(here)
                ahead += found[here][1]
                ahead += [
                    (name, LOOSE)
                    for name in self._imported_with(here[0])
                    if self.module(name).loose
                ]
        return found

    def _imported_with(self, module: str) -> list[str]:
        """A module and the packages that hold it."""
        names = accumulate(module.split("."), "{}.{}".format)
        return [name for name in names if name in self.sources]

    def _definition(self, here: Address) -> tuple[str, list[Address]]:
        if here not in self._read:
            module = self.module(here[0])
            reader = _Reader(self, module)
            if here[1] == WHOLE:
                self._read[here] = "", [(module.name, name) for name in module.definitions]
            else:
                self._read[here] = _sha256(reader.plain(self.statements(here))), reader.names
        return self._read[here]


class _Module:
    """A parsed module: its definitions, what its imports bind, and what else it does on import."""

    def __init__(self, name: str, source: str, package: str):
        try:
            body = ast.parse(source).body
        except SyntaxError as error:
            raise UserError(
                f"The code of {name} is not Python (line {error.lineno}: {error.msg}); mend that"
                " line."
            ) from error
        self.name, self.package = name, package
        self.imports, self.definitions = _imported(body, package), _bound(body)
        self.loose = [part for part in body if not _idle(part) and self._acts(part)]

    def _acts(self, part: ast.stmt) -> bool:
        """Return whether a statement does more than define a name.

        An example is a decorator of this package that keeps what it is given.
        """
        if not isinstance(part, DEFINITIONS) or not _bound([part]):
            return True
        nodes = chain.from_iterable(map(ast.walk, getattr(part, "decorator_list", [])))
        named = [node.id for node in nodes if isinstance(node, ast.Name)]
        top = self.name.partition(".")[0]
        return any(
            name in self.definitions or self.imports.get(name, "").partition(".")[0] == top
            for name in named
        )


class _Reader:
    """Turn statements of a module into nested tuples that say what they compute.

    `names` are the definitions they name.
    """

    def __init__(self, code: Code, module: _Module):
        self.code, self.module = code, module
        self.names: list[Address] = []
        # of functions: name -> what an import binds to it, None for a variable
        self.scopes: list[dict[str, str | None]] = []

    def plain(self, node: Any) -> object:
        if isinstance(node, list):
            return tuple(self.plain(part) for part in node if not _idle(part))
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.AnnAssign):
            node = ast.Assign([node.target], node.value)  # type: ignore[arg-type] # None if bare
        if isinstance(node, ast.Call) and self._makes_key(node):
            return "a key"
        if isinstance(node, (ast.Name, ast.Attribute)) and (target := self.target(node)):
            return self._named(*target)
        if isinstance(node, ast.ClassDef):
            return self._fields(node, "body"), [
                self._in_class(part) for part in node.body if not _idle(part, in_class=True)
            ]
        if isinstance(node, FUNCTIONS):
            return self._fields(node, "body"), self._within(
                _variables(node, self.module.package), node.body
            )
        if isinstance(node, COMPREHENSIONS):
            variables = dict.fromkeys(_stored([one.target for one in node.generators]))
            return self.plain(node.generators[0].iter), self._within(variables, node, self._fields)
        return self._fields(node)

    def target(self, node: ast.AST) -> tuple[Address | None, list[str]] | None:
        """Return what a dotted name means, as `Code.find` does.

        None for variables and for what is no such name.
        """
        rest: list[str] = []
        while isinstance(node, ast.Attribute):
            rest, node = [node.attr, *rest], node.value
        if not isinstance(node, ast.Name):
            return None
        scope = next(
            (scope for scope in reversed(self.scopes) if node.id in scope), self.module.imports
        )
        if scope is self.module.imports and node.id in self.module.definitions:
            return (self.module.name, node.id), rest
        taken = scope.get(node.id)
        return self.code.find(".".join([taken, *rest])) if taken else None

    def _makes_key(self, call: ast.Call) -> bool:
        """Return whether a call makes a key.

        What a key is made of decides no result, so calls of `..._key` and `..._digest` of this
        package are not followed.
        """
        target = self.target(call.func)
        return bool(target and target[0] and target[0][1].endswith(("_digest", "_key")))

    def _named(self, here: Address | None, rest: list[str]) -> tuple:
        if here is None:
            return "from elsewhere", *rest
        self.names.append(here)
        return "of the package", here[1], *rest

    def _within(
        self, variables: dict[str, str | None], node: object, read: Callable | None = None
    ) -> object:
        self.scopes.append(variables)
        found = (read or self.plain)(node)
        self.scopes.pop()
        return found

    def _in_class(self, part: ast.stmt) -> object:
        """Read a statement of a class.

        A name with an annotation is a field there, unless it is a ClassVar.
        """
        if not isinstance(part, ast.AnnAssign):
            return self.plain(part)
        return (
            "field",
            "ClassVar" in ast.unparse(part.annotation),
            self.plain(part.target),
            self.plain(part.value),
        )

    def _fields(self, node: ast.AST, *left_out: str) -> tuple:
        fields = [
            (name, value)
            for name, value in ast.iter_fields(node)
            if name not in (*UNSEEN, *left_out)
        ]
        return type(node).__name__, *(
            (name, self.plain(value)) for name, value in fields if value not in (None, [])
        )


def _idle(node: object, in_class: bool = False) -> bool:
    """Return whether a statement computes nothing.

    That is an import, a docstring, pass, a bare annotation, or an `if` around these.
    """
    if isinstance(node, ast.If) and isinstance(node.test, (ast.Name, ast.Attribute)):
        return all(map(_idle, [*node.body, *node.orelse]))
    if isinstance(node, ast.AnnAssign):
        return node.value is None and not in_class
    return isinstance(node, (*IMPORTS, ast.Pass)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def _own(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield the nodes and all below them, but not into functions, classes, comprehensions."""
    ahead = [*nodes][::-1]
    while ahead:
        node = ahead.pop()
        yield node
        if not isinstance(node, (*FUNCTIONS, *COMPREHENSIONS, ast.ClassDef)):
            ahead += [*ast.iter_child_nodes(node)][::-1]


def _stored(nodes: Iterable[ast.AST]) -> list[str]:
    """The names that statements bind in their own scope, other than by an import."""
    return _names_bound(_own(nodes))


def _names_bound(own: Iterable[ast.AST]) -> list[str]:
    found = []
    for node in own:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.append(node.id)
        elif (
            isinstance(
                node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)
            )
            and node.name
        ):
            found.append(node.name)
    return found


def _bound(body: Iterable[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """Name -> the statements that bind it."""
    found: dict[str, list[ast.stmt]] = {}
    for part in body:
        for name in dict.fromkeys(_stored([part])):
            found.setdefault(name, []).append(part)
    return found


def _imported(nodes: Iterable[ast.AST], package: str) -> dict[str, str]:
    """Name -> the dotted name that an import binds to it, in the scope of these statements."""
    return _names_imported(_own(nodes), package)


def _names_imported(own: Iterable[ast.AST], package: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in own:
        if isinstance(node, ast.Import):
            found |= {
                one.asname or one.name.partition(".")[0]: (
                    one.name if one.asname else one.name.partition(".")[0]
                )
                for one in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            origin = resolve_name(origin, package) if node.level else origin
            if node.names[0].name == "*":
                raise UserError(
                    f"`from {origin} import *` hides which code is named; import what is used by"
                    " its name."
                )
            found |= {one.asname or one.name: f"{origin}.{one.name}" for one in node.names}
    return found


def _variables(function: Any, package: str) -> dict[str, str | None]:
    """What is bound within a function: imports with their dotted names, variables with None."""
    body = function.body if isinstance(function.body, list) else [function.body]
    arguments = [node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    own = list(_own(body))
    outer = [node.names for node in own if isinstance(node, (ast.Global, ast.Nonlocal))]
    elsewhere = set(chain.from_iterable(outer))
    bound = [*arguments, *_names_bound(own)]
    variables = dict.fromkeys(name for name in bound if name not in elsewhere)
    return {**variables, **_names_imported(own, package)}


def _text_of(root: Any, within: tuple = ()) -> str:
    """Return the source of a class or function of another file, with that file's imports.

    An example is a class of a test. One of a notebook's cell comes with what it names there:
    modules, constants, and functions and classes of other cells, but not those `within` which it
    is read.
    """
    try:
        text = textwrap.dedent(_source_of(root))
        if _of_a_cell(root):
            return "\n".join([*_named_in_cells(root, text, (*within, root)), text])
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        imports = _imported(ast.parse(inspect.getsource(sys.modules[root.__module__])).body, "")
    except (OSError, TypeError, SyntaxError, KeyError) as error:
        raise UserError(
            f"The source of {root.__qualname__} cannot be read by itself; give that of its cell as"
            " a text."
        ) from error
    found = {name: dotted for name, dotted in imports.items() if name in names}
    return "\n".join([*(_import(name, dotted) for name, dotted in found.items()), text])


def _import(name: str, dotted: str) -> str:
    """The statement that binds a name to what a dotted name means."""
    origin, _, last = dotted.rpartition(".")
    return f"from {origin} import {last} as {name}" if origin else f"import {last} as {name}"


def _code_of(root: Any) -> Any:
    """The first function of a class that is written in it, or the function itself."""
    parts = vars(root).values() if isinstance(root, type) else [root]
    own = [part for part in map(inspect.unwrap, parts) if inspect.isfunction(part)]
    return next((part for part in own if part.__module__ == root.__module__), None)


def _of_a_cell(root: Any) -> bool:
    """Return whether a class or function is of a cell, whose code is in no file."""
    code = _code_of(root)
    return code is not None and not Path(code.__code__.co_filename).exists()


def _source_of(root: Any) -> str:
    """Return the source of a class or function, of a file or of a notebook's cell.

    Before Python 3.13 `inspect` finds no class of a cell, but it finds the cell of its functions.
    """
    if not isinstance(root, type) or not _of_a_cell(root):
        return inspect.getsource(root)
    file = _code_of(root).__code__.co_filename
    classes = [
        node
        for node in ast.parse("".join(linecache.getlines(file))).body
        if isinstance(node, ast.ClassDef) and node.name == root.__name__
    ]
    if not classes:
        raise OSError(f"no class {root.__name__} in {file}")
    return ast.unparse(classes[-1])


def _global_names(text: str) -> set[str]:
    """The names that a text takes from outside: no arguments, no variables of functions."""
    found, ahead = set(), [symtable.symtable(text, "cell", "exec")]
    while ahead:
        table = ahead.pop()
        ahead += table.get_children()
        symbols = table.get_symbols()
        found |= {one.get_name() for one in symbols if one.is_global() and one.is_referenced()}
    return found


def _named_in_cells(root: Any, text: str, within: tuple) -> list[str]:
    """Statements that define what a class or function of a cell names in its notebook."""
    known = _code_of(root).__globals__
    lines = []
    for name in sorted(_global_names(text) & known.keys()):
        value = known[name]
        if isinstance(value, ModuleType):
            lines.append(_import(name, value.__name__))
        elif inspect.isclass(value) or inspect.isfunction(value):
            if value.__module__ != root.__module__:
                lines.append(_import(name, f"{value.__module__}.{value.__qualname__}"))
            elif value not in within:
                lines.append(_text_of(value, within))
        elif isinstance(value, (bool, int, float, str, tuple, type(None))):
            lines.append(f"{name} = {value!r}")
    return lines


def _sha256(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
