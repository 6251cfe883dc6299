"""Which module may import which, read from the source, and an import with torch alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_adams"

# A module, or a folder of them -> the layers of this package that it may import, at its top and
# lazily (inside a function). A layer may import itself. "__init__" is the package's own names.
TOP = {
    "__init__": {"optimizer"},
    "autoregister": set(),
    "update": set(),
    "precision": set(),
    "checkpoint": set(),
    "kernels": {"precision", "update"},
    "optimizer": {"kernels", "precision", "update"},
    "megatron": {
        "__init__",
        "autoregister",
        "checkpoint",
        "kernels",
        "nvml",
        "optimizer",
        "update",
    },
    "nvml": set(),
    "doctor": {"__init__", "cpu_rehearsal", "kernels", "nvml"},
    "commands": {"checkpoint", "kernels", "planning", "tuning"},
    "cli": {"commands"},
    "cpu_rehearsal": set(),
    "planning": set(),
    "tuning": set(),
    "launch": {"__init__", "cpu_rehearsal"},
    "verl": {"autoregister"},
}
LAZY = {
    "__init__": {"megatron", "optimizer"},
    # At the first call that asks for adams.
    "autoregister": {"megatron"},
    "commands": {"doctor", "planning"},
    # In a process of its own: doctor/probe.py.
    "doctor": {"megatron"},
    # In a process of its own: planning/worker.py.
    "planning": {"__init__", "cpu_rehearsal", "megatron"},
}
# What only megatron_adams/megatron/ may import: the package has to work without them.
MEGATRON_ONLY = {"megatron", "transformer_engine", "apex"}
# What only megatron_adams/megatron/training/ may import: the rest has to work with megatron.core
# alone. register() imports that folder where megatron.training is installed. The doctor and the
# plan import it in processes of their own.
TRAINING = "megatron.training"
TRAINING_FOLDER = ("megatron", "training")
IMPORT_TRAINING_FOLDER = {("megatron", "register"), ("doctor", "probe"), ("planning", "worker")}


def imported_modules(node: ast.AST, package: str) -> list[str]:
    """Return the dotted names that an import statement, or a call of import_module, brings in."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            if level:
                base = package.rsplit(".", level - 1)[0] if level > 1 else package
                module = f"{base}.{module}" if module else base
            # `from megatron_adams import optimizer` imports a layer by its name.
            return [f"{module}.{alias.name}" for alias in names]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def violations(root: Path) -> list[str]:
    """Return one line for each import in the package at `root` that the layers forbid."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        layer = parts[0]
        if layer not in TOP:
            found.append(f"{path.relative_to(root)}: no layer is known for it; add it to TOP")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = lazy_nodes(tree)
        package = ".".join((root.name, *parts[:-1]))
        for node in ast.walk(tree):
            allowed = TOP[layer] | {layer}
            if id(node) in inside:
                allowed |= LAZY.get(layer, set())
            for name in imported_modules(node, package):
                top, target = name.partition(".")[0], layer_of(name, root)
                if (
                    (top in MEGATRON_ONLY and layer != "megatron")
                    or (target is not None and target not in allowed)
                    or (parts[:2] != TRAINING_FOLDER and needs_training(name, parts, root.name))
                ):
                    found.append(f"{path.relative_to(root)}:{node.lineno}: {layer} imports {name}")
    return found


def needs_training(name: str, parts: tuple[str, ...], package: str) -> bool:
    """Whether the module `parts` needs megatron.training for what it imports."""
    needing = [TRAINING]
    if parts not in IMPORT_TRAINING_FOLDER:
        needing.append(".".join((package, *TRAINING_FOLDER)))
    return any(f"{name}.".startswith(f"{each}.") for each in needing)


def permissions_used(root: Path) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return what each layer of the package at `root` imports of others, at its top and lazily."""
    top: dict[str, set[str]] = {}
    lazy: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = lazy_nodes(tree)
        for node in ast.walk(tree):
            for name in imported_modules(node, ".".join((root.name, *parts[:-1]))):
                if (target := layer_of(name, root)) not in (None, parts[0]):
                    places = lazy if id(node) in inside else top
                    places.setdefault(parts[0], set()).add(target)
    return top, lazy


def lazy_nodes(tree: ast.Module) -> set[int]:
    """The ids of the nodes inside functions."""
    return {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }


def layer_of(name: str, root: Path) -> str | None:
    """The layer of the package at `root` that a dotted name is of; None for another package's."""
    top, *rest = name.split(".")
    if top != root.name:
        return None
    # megatron_adams.register and the like are names of __init__.
    return rest[0] if rest and is_layer(root, rest[0]) else "__init__"


def is_layer(root: Path, name: str) -> bool:
    return name in TOP or (root / f"{name}.py").exists() or (root / name).is_dir()


def test_no_module_imports_what_its_layer_must_not():
    assert violations(PACKAGE) == []


def test_every_permission_is_used():
    top, lazy = permissions_used(PACKAGE)
    assert {layer: top.get(layer, set()) for layer in TOP} == TOP
    assert lazy == LAZY


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("update.py", "import megatron_adams.optimizer"),
        ("update.py", "from megatron_adams import optimizer"),
        ("update.py", "from . import optimizer"),
        ("update.py", "def f():\n    from megatron_adams.optimizer import AdamS"),
        ("update.py", "from megatron_adams import AdamS"),
        ("optimizer.py", "def f():\n    import megatron.core"),
        ("optimizer.py", "from megatron_adams.megatron import register"),
        ("optimizer.py", "import importlib\nimportlib.import_module('megatron.core')"),
        ("optimizer.py", "try:\n    import transformer_engine\nexcept ImportError:\n    pass"),
        ("megatron/arguments.py", "from megatron_adams.launch import main"),
        ("megatron/arguments.py", "from ..launch import main"),
        ("megatron/arguments.py", "from .. import cpu_rehearsal"),
        ("megatron/config.py", "def f():\n    from megatron.training import get_args"),
        ("megatron/config.py", "from megatron import training"),
        ("megatron/config.py", "from megatron_adams.megatron.training import arguments"),
        ("megatron/register.py", "import megatron.training"),
        ("launch.py", "def f():\n    from megatron.training import pretrain"),
        ("launch.py", "from megatron_adams.megatron import register"),
        ("cpu_rehearsal.py", "def f():\n    import megatron"),
        ("cpu_rehearsal.py", "def f():\n    import megatron_adams.launch"),
        ("__init__.py", "from megatron_adams.megatron import register"),
        ("__init__.py", "import megatron"),
        ("stray.py", "import torch"),
    ],
)
def test_planted_violation_is_found(tmp_path, path, source):
    root = tmp_path / "megatron_adams"
    (root / "megatron").mkdir(parents=True)
    for name in ("__init__", "update", "optimizer", "launch", "cpu_rehearsal"):
        (root / f"{name}.py").touch()
    (root / path).write_text(source)
    assert len(violations(root)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from megatron_adams.optimizer import AdamS"),
        ("__init__.py", "def register():\n    from megatron_adams.megatron import register"),
        ("optimizer.py", "import torch\nfrom megatron_adams.update import adams_update_"),
        (
            "megatron/__init__.py",
            "import megatron.core\nfrom megatron_adams.optimizer import AdamS",
        ),
        ("megatron/a/b.py", "from ..arguments import x\nfrom megatron_adams.megatron import y"),
        ("megatron/training/log.py", "from megatron.training import get_args"),
        ("megatron/register.py", "def f():\n    from megatron_adams.megatron.training import log"),
        ("launch.py", "from megatron_adams import cpu_rehearsal, register"),
        ("launch.py", "import megatron_adams"),
    ],
)
def test_permitted_import_is_not_reported(tmp_path, path, source):
    root = tmp_path / "megatron_adams"
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text(source)
    for name in ("update", "optimizer", "launch", "cpu_rehearsal"):
        (root / f"{name}.py").touch()
    assert violations(root) == []


TORCH_ALONE = """
import os, sys

class Blocked:
    names = {"megatron", "transformer_engine", "transformer_engine_torch", "apex"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
before = set(sys.modules)
import megatron_adams
more = {name.partition(".")[0] for name in set(sys.modules) - before}
assert more <= {"megatron_adams", "torch", *sys.stdlib_module_names}, more
assert "megatron_adams.megatron" not in sys.modules

param = torch.nn.Parameter(torch.ones(3))
optimizer = megatron_adams.AdamS([param])
param.sum().backward()
optimizer.step()
assert (param < 1).all()
assert not torch.cuda.is_available() and not torch.cuda.is_initialized()
assert megatron_adams.__version__
try:
    megatron_adams.register()
except ImportError as error:
    print("register:", error)
else:
    raise AssertionError("register() without Megatron did not raise ImportError")
"""


def test_package_imports_and_steps_with_torch_alone_and_without_cuda():
    result = subprocess.run(
        [sys.executable, "-c", TORCH_ALONE],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "megatron" in result.stdout
