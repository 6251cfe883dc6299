"""How the plugin attaches to Megatron: named functions are wrapped, nothing is edited.

Called by `register()` alone. Every symbol is looked up before the first one is touched, so that
an unsupported Megatron is refused whole and never left half changed. Imports no Megatron module
by name: only the dotted paths that it is given.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED_MEGATRON = ">=0.19,<0.20"

_MISSING: Any = object()
_WRAPPED_MARK = "__megatron_adams_original__"


@dataclass(frozen=True)
class Symbol:
    """A Megatron symbol that the plugin relies on.

    Args:
        path: dotted path, e.g. "megatron.core.optimizer.get_megatron_optimizer".
        parameters: leading parameter names that the plugin passes or reads; () for any.
    """

    path: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hook:
    """A function of Megatron's and what to put in its place.

    Args:
        symbol: the function.
        wrap: original -> replacement; it is given the original and returns the wrapper.
    """

    symbol: Symbol
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]


class UnsupportedMegatronError(RuntimeError):
    """The installed Megatron is outside the supported range, or a symbol in it has moved."""


def _unsupported(path: str, what: str, version: str) -> UnsupportedMegatronError:
    """Make the error of a symbol that is not what it has to be."""
    return UnsupportedMegatronError(
        f"{path}: {what} in megatron-core {version}; megatron-adams supports megatron-core "
        f"{SUPPORTED_MEGATRON}. Install a supported version, e.g. "
        f'pip install "megatron-core{SUPPORTED_MEGATRON}".'
    )


def check_version(version: str) -> None:
    """Raise UnsupportedMegatronError unless `version` is in the supported range."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    # A container's build has a local part (0.19.2+abc123), a checkout a pre-release (0.19.0rc1).
    release = Version(version).base_version
    if release not in SpecifierSet(SUPPORTED_MEGATRON):
        raise _unsupported("megatron.core", f"version {version} is not supported", version)


def resolve(symbol: Symbol, version: str) -> tuple[Any, str, Any]:
    """Return (owner, name, value) of a symbol.

    Raises:
        UnsupportedMegatronError: it is missing, or its leading parameters have other names.
    """
    parts = symbol.path.split(".")
    owner: Any = None
    for length in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:length])
        try:
            owner = importlib.import_module(module_name)
        except ModuleNotFoundError as exc:
            # Only the absence of this very path means "look one level up"; the absence of
            # one of Megatron's own dependencies is the user's to mend.
            if exc.name is not None and module_name.startswith(exc.name):
                continue
            raise
        break
    for name in parts[length:-1]:
        owner = inspect.getattr_static(owner, name, _MISSING)
    value = inspect.getattr_static(owner, parts[-1], _MISSING)
    if value is _MISSING:
        raise _unsupported(symbol.path, "not found", version)
    if symbol.parameters:
        names = tuple(inspect.signature(value).parameters)
        if names[: len(symbol.parameters)] != symbol.parameters:
            raise _unsupported(
                symbol.path,
                f"has the parameters {names}, expected {symbol.parameters} first,",
                version,
            )
    return owner, parts[-1], value


def require(symbols: Iterable[Symbol], version: str) -> None:
    """Raise UnsupportedMegatronError unless every symbol is as it is expected to be."""
    for symbol in symbols:
        resolve(symbol, version)


def attach(hooks: Iterable[Hook], version: str) -> list[str]:
    """Wrap every hooked function wherever a module has imported it; idempotent.

    Returns:
        Dotted paths that were wrapped now, without those that were wrapped before.
    Raises:
        UnsupportedMegatronError: before anything is wrapped, if any function is missing.
    """
    found = [(hook, resolve(hook.symbol, version)[2]) for hook in hooks]
    replacements = {}
    attached = []
    for hook, original in found:
        if _WRAPPED_MARK in vars(original):
            continue
        replacement = functools.wraps(original)(hook.wrap(original))
        setattr(replacement, _WRAPPED_MARK, original)
        replacements[original] = replacement
        attached.append(hook.symbol.path)
    _replace_everywhere(replacements)
    return attached


def _replace_everywhere(replacements: Mapping[Any, Any]) -> None:
    # `from x import f` leaves copies of f in the importing modules, a trainer's as Megatron's, and
    # under other names with `as`; modules that are imported later take the wrapper from its home.
    replaced = {id(original): replacement for original, replacement in replacements.items()}
    for module in list(sys.modules.values()):
        names: dict[str, Any] = getattr(module, "__dict__", {})
        for name, value in list(names.items()):
            # Not by `setattr`, which a module of another class may have of its own.
            if id(value) in replaced:
                names[name] = replaced[id(value)]
