"""Parts of a framework's modules, from their sources, without the packages that the rest imports.

What builds an optimizer is a few lines of a framework that imports Ray, vLLM and much else. These
lines run here as they are, with real Megatron; what they read of the rest is given by the test.
"""

import __future__

import ast
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

_IMPORTED = {*sys.stdlib_module_names, "torch"}


def load(
    root: Path, name: str, wanted: Collection[str], given: Mapping[str, Any] | None = None
) -> ModuleType:
    """Make a module of some of the definitions of a framework's module.

    What these read of its imports of Megatron-Core, torch and the standard library is imported, as
    there: by the same names. Other imports are left out.

    Args:
        root: the folder that holds the framework's package.
        name: dotted, of the module.
        wanted: functions, classes, constants, and methods as "Class.method": these become
            functions.
        given: names that the definitions read and that another package would define.
    Returns:
        The module, which is also in sys.modules, where `register()` looks for what was imported.
    Raises:
        ValueError: a wanted definition is not there.
    """
    path = root / Path(*name.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text("utf-8"))
    definitions = dict(_definitions(tree.body))
    if missing := sorted(set(wanted) - definitions.keys()):
        raise ValueError(f"{missing}: must be defined in {path}; another version has moved them")
    chosen = [definition for each, definition in definitions.items() if each in wanted]
    read = {node.id for each in chosen for node in ast.walk(each) if isinstance(node, ast.Name)}
    body = [*_imports(tree.body, read), *chosen]
    module = ModuleType(name)
    vars(module).update(given or {})
    sys.modules[name] = module
    # Annotations name what is not imported here.
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(body, []), str(path), "exec", flags), vars(module))
    return module


def _imports(body: Iterable[ast.stmt], read: Collection[str]) -> Iterable[ast.stmt]:
    """A module's imports, also those in its top-level `try` blocks, of names that are read."""
    for node in body:
        match node:
            case ast.Try():
                yield from _imports(node.body, read)
            case ast.Import() | ast.ImportFrom(level=0):
                module = getattr(node, "module", None)
                node.names = [
                    alias
                    for alias in node.names
                    if _is_known(module or alias.name)
                    and (alias.asname or alias.name).split(".")[0] in read
                ]
                if node.names:
                    yield node


def _is_known(module: str) -> bool:
    return module.split(".")[0] in _IMPORTED or module.startswith("megatron.core")


def _definitions(body: Iterable[ast.stmt]) -> Iterable[tuple[str, ast.stmt]]:
    for node in body:
        match node:
            case ast.FunctionDef(name=name):
                yield name, node
            case ast.ClassDef(name=name, body=methods):
                yield name, node
                for method in methods:
                    if isinstance(method, ast.FunctionDef):
                        yield f"{name}.{method.name}", _as_function(method)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name, node


def _as_function(method: ast.FunctionDef) -> ast.FunctionDef:
    # Neither @staticmethod nor @property says anything outside of the class.
    method = ast.parse(ast.unparse(method)).body[0]  # type: ignore[assignment]
    method.decorator_list = []
    return method
