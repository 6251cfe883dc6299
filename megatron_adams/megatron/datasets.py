"""Megatron's dataset helpers, which the pip wheel ships built, without their Makefile."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wrap_compile_helpers(original: Callable[[], Any]) -> Callable[[], Any]:
    """Compile Megatron's C++ dataset helpers, but only if there is a Makefile or they are missing.

    The wheel of megatron-core 0.19 contains helpers_cpp*.so but no Makefile. There,
    megatron.core.datasets.utils.compile_helpers would exit the process, because make fails.
    """

    def compile_helpers() -> None:
        spec = importlib.util.find_spec("megatron.core.datasets")
        assert spec is not None and spec.submodule_search_locations is not None
        folders = [Path(folder) for folder in spec.submodule_search_locations]
        has_makefile = any((folder / "Makefile").exists() for folder in folders)
        if has_makefile or importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()
            return
        importlib.import_module("megatron.core.datasets.helpers_cpp")

    return compile_helpers
