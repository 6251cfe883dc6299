"""How the plugin attaches to a module, and what it refuses, on modules of the test's own."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_adams import autoregister
from megatron_adams.megatron.hooks import (
    SUPPORTED_MEGATRON,
    Hook,
    Symbol,
    UnsupportedMegatronError,
    attach,
    check_version,
    require,
    resolve,
)

VERSION = "0.19.2"
HOME, USER = "megatron.adams_test_home", "megatron.adams_test_user"


class Optimizer:
    def load(self, state: Any) -> None: ...


@pytest.fixture
def modules() -> Iterator[tuple[Any, Any]]:
    """Megatron's stand-ins: a module with functions, and one that has imported one by name."""
    home, user = ModuleType(HOME), ModuleType(USER)

    def build(config: str, chunks: int = 1) -> str:
        """Build."""
        return f"{config} {chunks}"

    home.build, home.check, home.Optimizer = build, lambda: "checked", Optimizer  # type: ignore[attr-defined]
    user.build, user.mine = build, "untouched"  # type: ignore[attr-defined]
    sys.modules.update({HOME: home, USER: user})
    yield home, user
    del sys.modules[HOME], sys.modules[USER]


def louder(original: Callable[..., str]) -> Callable[..., str]:
    return lambda *args, **kwargs: original(*args, **kwargs) + "!"


BUILD = Hook(Symbol(f"{HOME}.build", ("config", "chunks")), louder)
CHECK = Hook(Symbol(f"{HOME}.check"), louder)


@pytest.mark.parametrize(
    "version", ["0.16.0", "0.18.9+abc", "0.19.2+abc123", "0.19.0rc1", "0.19.10", "0.20.0rc0"]
)
def test_supported_version_is_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.15.3", "0.15.9+abc", "0.21.0", "0.21.0rc0", "1.0"])
def test_other_version_is_refused_with_path_and_range(version: str) -> None:
    with pytest.raises(UnsupportedMegatronError) as refused:
        check_version(version)
    for part in ("megatron.core:", version, SUPPORTED_MEGATRON, "pip install"):
        assert part in str(refused.value)


def test_function_is_wrapped_wherever_it_was_imported(modules: tuple[Any, Any]) -> None:
    home, user = modules
    assert attach([BUILD, CHECK], VERSION) == [f"{HOME}.build", f"{HOME}.check"]
    assert home.build("a", chunks=2) == user.build("a", chunks=2) == "a 2!"
    assert home.check() == "checked!"
    assert user.mine == "untouched"
    assert (home.build.__name__, home.build.__doc__) == ("build", "Build.")


def test_function_is_wrapped_outside_megatron_and_under_another_name(
    modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = modules
    trainer = ModuleType("adams_test_trainer")
    vars(trainer).update(make=home.build, mine="untouched")
    monkeypatch.setitem(sys.modules, trainer.__name__, trainer)
    attach([BUILD], VERSION)
    assert vars(trainer)["make"]("a") == "a 1!"
    assert vars(trainer)["mine"] == "untouched"


def test_attaching_twice_wraps_once(modules: tuple[Any, Any]) -> None:
    home, _ = modules
    attach([BUILD], VERSION)
    assert attach([BUILD, CHECK], VERSION) == [f"{HOME}.check"]
    assert home.build("a") == "a 1!"


def test_entrance_of_the_import_hook_is_taken_out(
    modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, user = modules
    theirs = home.build
    monkeypatch.setitem(autoregister._PLACES, HOME, "build")
    monkeypatch.setattr(autoregister, "_finder", autoregister._Finder())
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    autoregister.install()
    assert home.build is user.build is not theirs
    attach([BUILD], VERSION)
    assert home.build is user.build
    assert vars(home.build)["__megatron_adams_original__"] is theirs


@pytest.mark.parametrize(
    ("symbol", "what"),
    [
        (Symbol(f"{HOME}.gone"), "not found"),
        (Symbol(f"{HOME}.Gone.load"), "not found"),
        (Symbol(f"{HOME}.Optimizer.gone"), "not found"),
        (Symbol("megatron.adams_test_nowhere.build"), "not found"),
        (Symbol(f"{HOME}.build", ("model_chunks",)), "('config', 'chunks')"),
        (Symbol(f"{HOME}.Optimizer.load", ("self", "state_dict")), "('self', 'state')"),
    ],
)
def test_missing_or_changed_symbol_is_refused_before_anything_is_wrapped(
    modules: tuple[Any, Any], symbol: Symbol, what: str
) -> None:
    home, user = modules
    with pytest.raises(UnsupportedMegatronError) as refused:
        attach([BUILD, Hook(symbol, louder)], VERSION)
    for part in (symbol.path, what, VERSION, SUPPORTED_MEGATRON):
        assert part in str(refused.value)
    assert home.build("a") == user.build("a") == "a 1"
    with pytest.raises(UnsupportedMegatronError, match=symbol.path):
        require([BUILD.symbol, symbol], VERSION)


def test_leading_parameters_are_compared_and_later_ones_are_free(
    modules: tuple[Any, Any],
) -> None:
    home, _ = modules
    assert resolve(Symbol(f"{HOME}.build", ("config",)), VERSION) == (home, "build", home.build)
    path = f"{HOME}.Optimizer.load"
    assert resolve(Symbol(path, ("self",)), VERSION) == (Optimizer, "load", Optimizer.load)


def test_missing_dependency_is_not_taken_for_another_megatron(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adams_test_tree.py").write_text("import adams_test_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="adams_test_dependency"):
        resolve(Symbol("adams_test_tree.build"), VERSION)
