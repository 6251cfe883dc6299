"""What the ranks of test_register.py run: `register()` on real Megatron, and single wrappers."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_adams
from tests.harness.log_lines import collect_log_lines


@contextlib.contextmanager
def _without(dotted_path: str) -> Iterator[None]:
    """Delete a symbol for a while."""
    module_path, _, name = dotted_path.rpartition(".")
    module = importlib.import_module(module_path)
    value = getattr(module, name)
    delattr(module, name)
    try:
        yield
    finally:
        setattr(module, name, value)


def register_without(dotted_path: str) -> dict[str, Any]:
    """`register()` on real Megatron with one symbol missing; run where it is not registered.

    Returns:
        "error": class and text of what it raised, "wrapped": Megatron's functions that were
        changed nevertheless.
    """
    error: tuple[str, str] | None = None
    with _without(dotted_path):
        try:
            megatron_adams.register()
        except RuntimeError as exc:
            error = (type(exc).__name__, str(exc))
    return {"error": error, "wrapped": wrapped_symbols()}


def wrapped_symbols() -> list[str]:
    """Dotted paths of all wrapped functions in Megatron's modules."""
    return sorted(
        f"{module_name}.{name}"
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("megatron.")
        for name, value in list(vars(module).items())
        if "__megatron_adams_original__" in getattr(value, "__dict__", {})
    )


def register_twice() -> dict[str, Any]:
    """`register()` two times; run where it is not registered.

    Returns:
        "log": lines of the package's loggers, "wrapped": by `wrapped_symbols` after each call,
        "depth": how many wrappers get_megatron_optimizer has.
    """
    import megatron.core.optimizer

    lines = collect_log_lines()
    wrapped = []
    for _ in range(2):
        megatron_adams.register()
        wrapped.append(wrapped_symbols())
    depth, function = 0, megatron.core.optimizer.get_megatron_optimizer
    while "__megatron_adams_original__" in vars(function):
        function, depth = vars(function)["__megatron_adams_original__"], depth + 1
    return {"log": lines, "wrapped": wrapped, "depth": depth}


def parse_by_hook() -> dict[str, Any]:
    """Parse `--optimizer adams` by autoregister's hook; run where it is not registered.

    Returns:
        "without": argparse's exit code without the hook; "optimizer": what is parsed with it;
        "wrapped_before", "wrapped": by `wrapped_symbols`, before and after.
    """
    from megatron.training.arguments import parse_args

    from megatron_adams import autoregister

    sys.argv = ["pretrain.py", "--optimizer", "adams"]
    told: dict[str, Any] = {}
    try:
        parse_args(ignore_unknown_args=True)
    except SystemExit as exc:
        told["without"] = exc.code
    autoregister.install()
    told["wrapped_before"] = wrapped_symbols()
    # As a framework's module has it that was imported before: under a name of its own.
    parse = vars(sys.modules["megatron.training.arguments"])["parse_args"]
    told["optimizer"] = parse(ignore_unknown_args=True).optimizer
    told["wrapped"] = wrapped_symbols()
    return told


def mimo_config_passes() -> bool:
    """get_megatron_optimizer hands a configuration without `optimizer` to Megatron untouched."""
    from megatron_adams.megatron.adoption import wrap_get_megatron_optimizer

    class MimoConfig:
        __slots__ = ()  # takes no attribute either

    received: list[Any] = []

    def original(*args: Any, **kwargs: Any) -> str:
        received.append((args, kwargs))
        return "theirs"

    config, chunks = MimoConfig(), [object()]
    answer = wrap_get_megatron_optimizer(original)(config, chunks, use_gloo_process_groups=False)
    return answer == "theirs" and received == [
        ((config, chunks), {"use_gloo_process_groups": False})
    ]


def compile_helpers_with_and_without_makefile(folder: str) -> dict[str, Any]:
    """megatron.core.datasets.utils.compile_helpers, with the wheel's files and with a Makefile.

    Args:
        folder: a new folder that stands for a source tree's megatron/core/datasets.
    """
    datasets = importlib.import_module("megatron.core.datasets")
    from megatron_adams.megatron.datasets import wrap_compile_helpers

    calls: list[str] = []
    compile_helpers = wrap_compile_helpers(lambda: calls.append("make"))
    makefiles = [Path(p) / "Makefile" for p in datasets.__path__]
    compile_helpers()
    wheel = {"made": list(calls), "loaded": "megatron.core.datasets.helpers_cpp" in sys.modules}
    Path(folder, "Makefile").touch()
    datasets.__path__.append(folder)
    datasets.__spec__.submodule_search_locations = datasets.__path__
    compile_helpers()
    return {
        "is_wheel": not any(path.exists() for path in makefiles),
        "wheel": wheel,
        "source": calls,
    }
