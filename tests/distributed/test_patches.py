"""A Megatron tree with a patch of patches/ trains with --optimizer adams, without the launcher."""

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import megatron.core
import pytest
from packaging.version import Version

from tests.harness.argv import printed_arguments
from tests.harness.cluster import REPO, Cluster
from tests.harness.compare import assert_same

TRAIN = "tests.distributed.cases:train"
ADAMS = "--optimizer adams --use-distributed-optimizer --bf16 --train-iters 3"
PATCHED_FILES = ("megatron/training/arguments.py", "megatron/training/plugins.py")


def patch_of(version: str) -> Path:
    major, minor, *_ = Version(version).release
    return REPO / "patches" / f"megatron-{major}.{minor}.patch"


def git(tree: Path, *arguments: str) -> None:
    run = subprocess.run(["git", *arguments], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed Megatron, as a git repository of its own, with the patch applied."""
    tree = tmp_path_factory.mktemp("Megatron-LM")
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations is not None
    installed = Path(spec.submodule_search_locations[0]).parent
    shutil.copytree(
        installed, tree / "megatron", ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    git(tree, "init", "--quiet")
    patch = str(patch_of(megatron.core.__version__))
    git(tree, "apply", "--check", patch)
    git(tree, "apply", patch)
    return tree


@pytest.fixture(scope="module")
def patched_cluster(
    zygotes: Path, tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Ranks of the patched tree; nobody but it calls register()."""
    folder = tmp_path_factory.mktemp("patched_cluster")
    cluster = Cluster(zygotes, folder, ["--without-plugin"], extra_path=tree)
    yield cluster
    cluster.close()


def test_patched_tree_takes_the_steps_of_the_launcher(
    cluster: Cluster, patched_cluster: Cluster, tree: Path
) -> None:
    patched = patched_cluster.run(TRAIN, 2, argv=ADAMS)
    assert_same(patched, cluster.run(TRAIN, 2, argv=ADAMS), "losses", "model")
    assert printed_arguments(patched.log)["optimizer"] == "adams"
    assert {part["classes"][1] for rank in patched.results for part in rank["parts"]} == {"AdamS"}
    assert str(tree) in patched.log  # the paths of warnings: it was this Megatron


def test_patched_tree_runs_other_optimizers_as_before(
    plain_cluster: Cluster, patched_cluster: Cluster
) -> None:
    argv = ADAMS.replace("adams", "adam")
    runs = [each.run(TRAIN, 2, argv=argv) for each in (patched_cluster, plain_cluster)]
    assert_same(*runs, "losses", "model")


def test_unpatched_megatron_does_not_know_adams(plain_cluster: Cluster) -> None:
    run = plain_cluster.run(TRAIN, 1, argv=ADAMS, check=False)
    assert run.codes != [0]
    assert "invalid choice: 'adams'" in run.log


def test_patch_names_the_entry_points_of_this_package(tree: Path) -> None:
    (line,) = [
        line
        for line in (tree / PATCHED_FILES[1]).read_text().splitlines()
        if line.startswith("GROUP")
    ]
    group = line.split('"')[1]
    plugins = {point.name: point.value for point in entry_points(group=group)}
    assert plugins.get("adams") == "megatron_adams:register", "pip install -e . again"


def test_patch_changes_what_its_readme_says_and_nothing_about_adams(tree: Path) -> None:
    patch = patch_of(megatron.core.__version__).read_text()
    changed = [line.split(" b/")[1] for line in patch.splitlines() if line.startswith("diff --git")]
    assert changed == list(PATCHED_FILES)
    readme = (REPO / "patches" / "README.md").read_text()
    assert all(f"`{path}`" in readme for path in PATCHED_FILES)
    assert "adams" not in patch.lower()


def test_patch_can_be_taken_out_again(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy)
    git(copy, "apply", "-R", str(patch_of(megatron.core.__version__)))
    assert not (copy / PATCHED_FILES[1]).exists()
    assert "plugins" not in (copy / PATCHED_FILES[0]).read_text()
