"""The import hook by itself, on modules that stand for Megatron's; registration is recorded."""

import functools
import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_adams import autoregister

# Named as in no package: what stands for megatron.core.optimizer, its configuration's module, and
# the module of the command line.
CORE, CONFIG, ARGUMENTS, OTHER = (
    f"adams_test_{name}" for name in ("core", "config", "arguments", "other")
)
SOURCES = {
    CORE: "def build(config=None, chunks=1):\n    return 'theirs', config, chunks\n",
    CONFIG: "class Config:\n    def __post_init__(self):\n        return 'theirs'\n",
    ARGUMENTS: "def parse(line=''):\n    return 'theirs', line\n",
    OTHER: "def build():\n    return 'theirs'\n",
}
ADAMS = SimpleNamespace(optimizer="adams")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A world with the modules' names alone; what it holds is `with_training` of each call."""
    calls: list[bool] = []
    places = {CORE: "build", CONFIG: "Config.__post_init__", ARGUMENTS: "parse"}
    monkeypatch.setattr(autoregister, "_PLACES", places)
    monkeypatch.setattr(autoregister, "_TRAINING", ARGUMENTS)
    monkeypatch.setattr(autoregister, "_finder", autoregister._Finder())
    monkeypatch.setattr(
        autoregister, "_register", lambda *, with_training: calls.append(with_training)
    )
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield calls
    for name in SOURCES:
        sys.modules.pop(name, None)


@pytest.fixture
def load(
    registered: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """A function that imports one of SOURCES, or another text in its place."""
    monkeypatch.syspath_prepend(tmp_path)

    def import_it(name: str, source: str | None = None) -> Any:
        (tmp_path / f"{name}.py").write_text(source or SOURCES[name], "utf-8")
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return import_it


def is_entrance(function: Any) -> bool:
    return autoregister.behind(function) is not function


@pytest.mark.parametrize("replace", ["adamw", "", "sgd"])
def test_install_takes_adams_own_name_alone(registered: list[bool], replace: str) -> None:
    with pytest.raises(ValueError, match=f"replace='{replace}': must be 'adam', or be left out"):
        autoregister.install(replace)
    assert autoregister._finder not in sys.meta_path


@pytest.mark.parametrize(
    ("first", "second", "replace"),
    [(None, None, None), ("adam", None, "adam"), (None, "adam", "adam")],
)
def test_second_install_adds_no_finder_and_takes_nothing_back(
    registered: list[bool], first: str | None, second: str | None, replace: str | None
) -> None:
    autoregister.install(first)
    autoregister.install(second)
    assert sys.meta_path.count(autoregister._finder) == 1
    assert autoregister._finder.replace == replace


@pytest.mark.parametrize("before", [True, False])
def test_entrance_is_put_in_modules_that_come_later_and_that_are_there(
    load: Callable[..., Any], before: bool
) -> None:
    if before:
        autoregister.install()
    core, other = load(CORE), load(OTHER)
    # As `from core import build` leaves it.
    other.mine = core.build
    autoregister.install()
    assert is_entrance(core.build) and not is_entrance(other.build)
    assert other.mine is core.build
    assert is_entrance(load(CONFIG).Config.__post_init__)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (CORE, "builds = 'in another way'\n"),
        (CONFIG, "class Config:\n    pass\n"),
        (CONFIG, "config = 'of another class'\n"),
    ],
)
def test_megatron_without_the_function_is_imported_as_it_is(
    load: Callable[..., Any], name: str, source: str
) -> None:
    """register() says what is missing where adams is asked for."""
    autoregister.install()
    assert load(name, source).__name__ == name


def test_modules_of_one_loader_have_their_own_entrances_once(
    registered: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zip file has one loader for all that is in it."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, source in SOURCES.items():
            archive.writestr(f"{name}.py", source)
    monkeypatch.syspath_prepend(tmp_path / "all.zip")
    autoregister.install()
    # As it is done to find out whether a package is there.
    assert importlib.util.find_spec(CORE) is not None
    core, other = (importlib.import_module(name) for name in (CORE, OTHER))
    assert not is_entrance(other.build)
    assert is_entrance(core.build)
    assert not is_entrance(autoregister.behind(core.build))


def test_function_that_register_has_wrapped_gets_no_entrance(load: Callable[..., Any]) -> None:
    core = load(CORE)
    core.build.__megatron_adams_original__ = core.build
    wrapper = core.build
    autoregister.install()
    assert core.build is wrapper


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((), {"chunks": 2}),
        ((SimpleNamespace(optimizer="adam"),), {}),
        ((SimpleNamespace(optimizer=None),), {}),
        ((SimpleNamespace(),), {"chunks": 2}),
        ((), {"config": SimpleNamespace(optimizer="sgd")}),
    ],
)
def test_call_that_does_not_ask_for_adams_is_passed_on(
    load: Callable[..., Any], registered: list[bool], args: Any, kwargs: Any
) -> None:
    autoregister.install()
    build = load(CORE).build
    assert build(*args, **kwargs) == autoregister.behind(build)(*args, **kwargs)
    assert registered == []


@pytest.mark.parametrize(("args", "kwargs"), [((ADAMS, 2), {}), ((), {"config": ADAMS})])
def test_call_that_asks_for_adams_registers_it(
    load: Callable[..., Any], registered: list[bool], args: Any, kwargs: Any
) -> None:
    autoregister.install()
    build = load(CORE).build
    # Here registration wraps nothing, as where it wraps other functions alone.
    assert build(*args, **kwargs) == autoregister.behind(build)(*args, **kwargs)
    assert registered == [False]


def test_taken_over_name_registers_it_and_no_other_does(
    load: Callable[..., Any], registered: list[bool]
) -> None:
    autoregister.install("adam")
    build = load(CORE).build
    build(SimpleNamespace(optimizer="sgd"))
    assert registered == []
    build(SimpleNamespace(optimizer="adam"))
    assert registered == [False]


def test_command_line_registers_whatever_is_asked_for(
    load: Callable[..., Any], registered: list[bool]
) -> None:
    """Its flags have to be known before it is parsed."""
    autoregister.install()
    assert load(ARGUMENTS).parse("--lr 1") == ("theirs", "--lr 1")
    assert registered == [True]


def test_call_reaches_what_registration_has_put_in_place(
    load: Callable[..., Any], registered: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through a partial, which registration does not find."""
    autoregister.install()
    core = load(CORE)

    def register(*, with_training: bool) -> None:
        core.build = lambda config, chunks: "ours"

    monkeypatch.setattr(autoregister, "_register", register)
    assert functools.partial(core.build, ADAMS)(1) == "ours"


@pytest.mark.parametrize(
    ("variables", "replace"),
    [
        ({}, None),
        ({autoregister.AUTOREGISTER: "0"}, None),
        ({autoregister.REPLACE: "adam"}, "adam"),
    ],
)
def test_verls_plugin_installs_the_hook_and_reads_the_variables(
    registered: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    replace: str | None,
) -> None:
    """Without a .pth file, as where the package was not installed by pip."""
    for name in (autoregister.AUTOREGISTER, autoregister.REPLACE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.delitem(sys.modules, "megatron_adams.verl", raising=False)
    importlib.import_module("megatron_adams.verl")
    assert sys.meta_path.count(autoregister._finder) == 1
    assert autoregister._finder.replace == replace
