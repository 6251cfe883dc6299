"""The wheel: what it holds, what it needs, what it leaves alone, and what starts with Python."""

import ast
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest

from megatron_adams import cli
from tests.harness.environment import build_wheel, make_environment, pip

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# A container's, which no index has; and what the index of these tests has.
CONTAINER = {"torch": "2.9.0a0+145a3a7bda.nv25.10", "megatron-core": "0.18.2", "numpy": "1.26.4"}
INDEX = {
    "torch": "2.14.1",
    "megatron-core": "0.19.2",
    "numpy": "2.5.5",
    "nvidia-ml-py": "13.615.71",
    "packaging": "26.3",
    "rich": "15.0.0",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("dist"))


def metadata_of(name: str, version: str) -> str:
    extra = "Provides-Extra: training\n" if name == "megatron-core" else ""
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{extra}"


@pytest.fixture(scope="module")
def would_install(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, str]]:
    """What pip would install into a container, by its own report: name -> version."""
    folder = tmp_path_factory.mktemp("container")
    site_packages = make_environment(folder / "environment")
    for name, version in CONTAINER.items():
        info = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata_of(name, version), "utf-8")
        (info / "INSTALLER").write_text("pip\n", "utf-8")
        (info / "RECORD").touch()
    (folder / "index").mkdir()
    for name, version in INDEX.items():
        stem = f"{name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(folder / "index" / f"{stem}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{stem}.dist-info/METADATA", metadata_of(name, version))
            archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{stem}.dist-info/RECORD", "")

    def ask(extras: str) -> dict[str, str]:
        report = folder / "report.json"
        options = ("--dry-run", "--report", report, "--find-links", folder / "index")
        pip(folder / "environment", "install", *options, f"{wheel}{extras}")
        found = json.loads(report.read_text("utf-8"))["install"]
        return {each["metadata"]["name"]: each["metadata"]["version"] for each in found}

    return ask


def test_nothing_but_the_package_is_installed_into_a_container(
    would_install: Callable[[str], dict[str, str]],
) -> None:
    assert would_install("").keys() == {"megatron-adams"}


def test_the_extras_leave_a_containers_megatron_and_torch(
    would_install: Callable[[str], dict[str, str]],
) -> None:
    installed = would_install("[megatron,tools]")
    assert installed.keys() == {"megatron-adams", "nvidia-ml-py", "packaging", "rich"}


def test_wheel_needs_torch_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = message_from_bytes(archive.read(path))
    required = metadata.get_all("Requires-Dist") or []
    assert [each for each in required if "extra ==" not in each] == ["torch>=2.6"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"] == ">=3.10"


@pytest.mark.parametrize("path", sorted((ROOT / "megatron_adams").rglob("*.py")), ids=str)
def test_the_package_has_the_syntax_of_the_oldest_python(path: Path) -> None:
    oldest = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    ast.parse(path.read_text("utf-8"), path.name, feature_version=oldest)


# --- megatron-adams.pth ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    make_environment(folder)
    pip(folder, "install", "--no-deps", wheel)
    return folder / "bin" / "python"


STATE = """
import sys
from importlib.metadata import entry_points
if sys.argv[1:]:
    (point,) = entry_points(group=sys.argv[1])
    point.load()
finders = [each for each in sys.meta_path if type(each).__module__ == "megatron_adams.autoregister"]
print("megatron_adams" in sys.modules, "torch" in sys.modules, [each.replace for each in finders])
"""


def state(python: Path, *words: str, **variables: str) -> tuple[str, str]:
    """What a new process has imported and installed by the time that it runs; its stderr."""
    own = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "MEGATRON_ADAMS"))
    }
    done = subprocess.run(
        [python, "-c", STATE, *words],
        env={**own, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "False False []"),
        ({"MEGATRON_ADAMS_AUTOREGISTER": ""}, "False False []"),
        ({"MEGATRON_ADAMS_AUTOREGISTER": "0"}, "True False []"),
        ({"MEGATRON_ADAMS_AUTOREGISTER": "1"}, "True False [None]"),
        ({"MEGATRON_ADAMS_REPLACE": "adam"}, "True False ['adam']"),
    ],
)
def test_python_starts_with_the_hook_where_a_variable_asks_for_it(
    installed: Path, variables: dict[str, str], expected: str
) -> None:
    """And never with torch, which is not installed there."""
    assert state(installed, **variables) == (expected, "")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MEGATRON_ADAMS_AUTOREGISTER", "yes"), ("MEGATRON_ADAMS_REPLACE", "adamw")],
)
def test_python_starts_with_a_message_where_a_variable_is_wrong(
    installed: Path, variable: str, value: str
) -> None:
    out, err = state(installed, **{variable: value})
    assert out == "True False []"
    assert f"ValueError: {variable}={value}: must be " in err


def test_verl_finds_the_plugin_by_its_entry_point(installed: Path) -> None:
    assert state(installed, "verl.plugins") == ("True False [None]", "")


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (["doctor"], "rich.console"),
        (["doctor"], "packaging.requirements"),
        (["plan", "--model", "llama2-7b"], "rich.console"),
    ],
)
def test_command_without_its_extra_says_what_to_install(
    command: list[str],
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [*sys.modules]:
        if name.startswith(("megatron_adams.doctor", "megatron_adams.planning.report")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    assert cli.main(command) == 1
    assert "pip install 'megatron-adams[tools]'" in capsys.readouterr().err
