"""The README names nothing that is not there, and leaves out no flag of the plugin's own."""

import argparse
import re
from pathlib import Path

from megatron_adams.megatron.arguments import wrap_add_megatron_arguments
from megatron_adams.megatron.config import ADAMS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def named_tests() -> list[tuple[str, str]]:
    """File and function of each test that is named; `::name` is of the file named before it."""
    named, file = [], ""
    for path, test in re.findall(r"`((?:tests/\w+/)?test_\w+\.py)?(?:::(test_\w+))?`", README):
        file = path or file
        if path or test:
            named.append((file if "/" in file else f"tests/distributed/{file}", test))
    return named


def test_every_test_that_is_named_exists() -> None:
    named = named_tests()
    assert len(named) > 40
    for file, test in named:
        text = (ROOT / file).read_text("utf-8")
        assert not test or f"def {test}(" in text, f"{file}::{test}"


def tree_of_files() -> list[str]:
    """The paths of the section "The tree", by indentation."""
    section = README.partition("## The tree")[2]
    paths, folders = [], [""]
    for line in section.splitlines():
        entry = re.match(r"    ( *)(\S+(?:, \S+)*)(?:  |$)", line)
        if entry is None:
            continue
        depth = len(entry[1]) // 2
        folders[depth + 1 :] = []
        for name in entry[2].split(", "):
            paths.append(folders[depth] + name)
        folders.append(folders[depth] + name)
    return paths


def test_every_file_of_the_tree_exists() -> None:
    paths = tree_of_files()
    assert len(paths) > 30
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_module_is_in_the_tree() -> None:
    paths = {(ROOT / path).resolve() for path in tree_of_files()}
    modules = (ROOT / "megatron_adams").rglob("*.py")
    missing = {m for m in modules if m.name != "__init__.py" and "__pycache__" not in m.parts}
    assert not {str(m.relative_to(ROOT)) for m in missing - paths}


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"train", "test"} <= set(re.findall(r"`?make (\w+)", README)) <= targets


def test_own_flags_are_documented_and_no_other() -> None:
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--optimizer", choices=["adam", "sgd"])
        parser.add_argument("--adam-beta2", type=float, default=0.999, help="")
        parser.add_argument("--exp-avg-sq-dtype", default="fp32")
        return parser

    parser = wrap_add_megatron_arguments(add_megatron_arguments)(argparse.ArgumentParser())
    own = {flag for flag in parser._option_string_actions if flag.startswith(f"--{ADAMS}-")}
    assert own
    assert own == set(re.findall(rf"--{ADAMS}-[\w-]+", README))
