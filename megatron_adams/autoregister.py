"""Registration where someone else starts the process: Ray's workers, a torchrun of a framework's.

`megatron-adams.pth`, beside the package, imports this module at a start of Python in which
MEGATRON_ADAMS_AUTOREGISTER=1 or MEGATRON_ADAMS_REPLACE=adam is set; without them it does nothing.
An import hook then puts an entrance in front of a few functions of Megatron, as their modules are
imported. The first call that asks for adams registers it, by which time Megatron has been imported
as a whole. Processes that never import Megatron, or use another optimizer, are left as they are.

Imports the standard library alone: it is part of every start of Python.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTOREGISTER = "MEGATRON_ADAMS_AUTOREGISTER"
REPLACE = "MEGATRON_ADAMS_REPLACE"

_ADAMS = "adams"
_TRAINING = "megatron.training.arguments"
# Module -> what gets an entrance there: a function, or a method of a class.
_PLACES = {
    "megatron.core.optimizer": "get_megatron_optimizer",
    "megatron.core.optimizer.optimizer_config": "OptimizerConfig.__post_init__",
    # The flags have to be known before anything can be asked for.
    _TRAINING: "parse_args",
}
_BEHIND = "__megatron_adams_behind__"


class _Finder:
    """A finder that finds nothing itself: it has the modules of _PLACES changed once imported."""

    # What is built as adams beside "adams" itself: None or "adam".
    replace: str | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _PLACES:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)):
                _enter_after_execution(spec)
                return spec
        return None


_finder = _Finder()


def install(replace: str | None = None) -> None:
    """Have adams registered in this process at the first call that asks for it. Idempotent.

    This is what the environment variables do, for a process that has been started without them.
    Megatron may have been imported already.

    Args:
        replace: as of `megatron_adams.register`.
    Raises:
        ValueError: `replace` is neither None nor "adam".
    """
    if replace not in (None, "adam"):
        raise ValueError(f"replace={replace!r}: must be 'adam', or be left out")
    _finder.replace = replace or _finder.replace
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
        for name in _PLACES.keys() & sys.modules.keys():
            _enter(sys.modules[name])


def install_from_environment() -> None:
    """`install`, if an environment variable asks for it.

    Raises:
        ValueError: a variable has another value than its own.
    """
    asked, replace = os.environ.get(AUTOREGISTER, "0"), os.environ.get(REPLACE, "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{AUTOREGISTER}={asked}: must be 1, or 0 to leave Megatron as it is")
    if replace not in ("", "adam"):
        raise ValueError(f"{REPLACE}={replace}: must be adam, or be left out")
    if asked == "1" or replace:
        install(replace or None)


def behind(function: Any) -> Any:
    """Return what an entrance stands in front of; any other function itself."""
    return getattr(function, "__dict__", {}).get(_BEHIND, function)


def replace_everywhere(replacements: Mapping[Any, Any]) -> None:
    """Put other values under every name of every loaded module that has one of `replacements`.

    `from x import f` puts f into the importing module, be it Megatron's or a trainer's, and `as`
    gives it another name. Modules that are imported later get f from the module that defines it.
    """
    replaced = {id(original): replacement for original, replacement in replacements.items()}
    for module in list(sys.modules.values()):
        names: dict[str, Any] = getattr(module, "__dict__", {})
        for name, value in list(names.items()):
            # Not by `setattr`: a module can be of a class that defines its own.
            if id(value) in replaced:
                names[name] = replaced[id(value)]


def _enter_after_execution(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        # One loader has all modules of a zip file.
        if module.__name__ == spec.name:
            _enter(module)

    # On the loader itself, which stays what it was to all that asks it for sources or data.
    loader.exec_module = exec_module


def _enter(module: ModuleType) -> None:
    """Put the entrance in front of the module's function, if that is there."""
    owner, name, function = _look_up(module.__name__)
    # One of register.py's wrappers needs none.
    if function is None or "__megatron_adams_original__" in vars(function):
        return
    if behind(function) is function:
        entrance = _entrance(module.__name__, function)
        setattr(owner, name, entrance)
        replace_everywhere({function: entrance})


def _look_up(module_name: str) -> tuple[Any, str, Any]:
    """Return (owner, name, function), where the function is None if it is not there."""
    owner: Any = sys.modules[module_name]
    *classes, name = _PLACES[module_name].split(".")
    for each in classes:
        owner = getattr(owner, each, None)
    return owner, name, vars(owner).get(name) if owner is not None else None


def _entrance(module_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def entrance(*args: Any, **kwargs: Any) -> Any:
        if module_name != _TRAINING and not _asks(*args, **kwargs):
            return function(*args, **kwargs)
        _register(with_training=module_name == _TRAINING)
        present = _look_up(module_name)[2]
        # `register` has wrapped the function, unless it is not among those that it wraps.
        return (function if present is entrance else present)(*args, **kwargs)

    vars(entrance)[_BEHIND] = function
    return entrance


def _asks(*args: Any, **kwargs: Any) -> bool:
    """Whether a call asks for adams: by its configuration, which is its first argument."""
    config = kwargs["config"] if "config" in kwargs else args[0] if args else None
    optimizer = getattr(config, "optimizer", None)
    return optimizer == _ADAMS or (optimizer is not None and optimizer == _finder.replace)


def _register(*, with_training: bool) -> None:
    # Not imported before: it imports torch and Megatron.
    register = importlib.import_module("megatron_adams.megatron.register")
    register.register_by_entrance(with_training=with_training, replace=_finder.replace)
