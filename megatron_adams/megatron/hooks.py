"""How the plugin attaches to Megatron: it wraps named functions, and edits no file.

Called only by `register()`. Every symbol is looked up before the first one is touched, so that an
unsupported Megatron is refused as a whole and never left half changed. This module imports no
Megatron module by name, only the dotted paths that it is given.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_adams.autoregister import behind, replace_everywhere

SUPPORTED_MEGATRON = ">=0.16,<0.21"

_MISSING: Any = object()
_WRAPPED_MARK = "__megatron_adams_original__"


@dataclass(frozen=True)
class Symbol:
    """A Megatron symbol that the plugin relies on.

    Args:
        path: the dotted path, e.g. "megatron.core.optimizer.get_megatron_optimizer".
        parameters: the names of the first parameters, which the plugin passes or reads; () for any.
    """

    path: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hook:
    """A function of Megatron, and what replaces it.

    Args:
        symbol: the function.
        wrap: takes the original function, and returns its replacement.
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

    # The version of a container's build has a local part (0.19.2+abc123), that of a checkout can be
    # a pre-release (0.19.0rc1).
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
            # Go one level up only if this very path is missing. If one of Megatron's own
            # dependencies is missing, the user has to install it.
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
    """Raise UnsupportedMegatronError unless every symbol is there with its parameters."""
    for symbol in symbols:
        resolve(symbol, version)


def attach(hooks: Iterable[Hook], version: str) -> list[str]:
    """Wrap every hooked function in every module that has imported it, or in its class. Idempotent.

    An entrance of autoregister.py is taken out: what it stood in front of is wrapped.

    Returns:
        The dotted paths that this call has wrapped, without those that were wrapped before.
    Raises:
        UnsupportedMegatronError: a function is missing. Nothing has been wrapped then.
    """
    found = [(hook, *resolve(hook.symbol, version)) for hook in hooks]
    replacements: dict[Any, Any] = {}
    attached = []
    for hook, owner, name, present in found:
        if _WRAPPED_MARK in vars(present):
            continue
        original = behind(present)
        replacement = functools.wraps(original)(hook.wrap(original))
        setattr(replacement, _WRAPPED_MARK, original)
        replacements |= {present: replacement, original: replacement}
        if isinstance(owner, type):
            setattr(owner, name, replacement)
        attached.append(hook.symbol.path)
    replace_everywhere(replacements)
    return attached
