import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster

HERE = Path(__file__).parent


def installed(name: str) -> Path:
    """Return the folder of a framework, or skip the test where there is none.

    Args:
        name: of its list of packages in this folder, NAME.txt.
    """
    parent = Path(os.environ.get("MEGATRON_ADAMS_TEST_FRAMEWORKS", Path(sys.prefix) / "frameworks"))
    folder = (parent / name).resolve()
    if not folder.is_dir():
        pytest.skip(
            f"no {name} in {folder}: make {parent / name}/.complete, or make test-frameworks for "
            "all; or name another parent folder in MEGATRON_ADAMS_TEST_FRAMEWORKS"
        )
    return folder


@pytest.fixture(scope="session")
def torch_cluster(zygotes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ranks that have torch alone: without Megatron, and without the rehearsal's stand-ins."""
    cluster = Cluster(zygotes, tmp_path_factory.mktemp("torch_cluster"), ["--without-megatron"])
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def cluster_with(
    zygotes: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Cluster]]:
    """A function: the name of a framework -> ranks as of `torch_cluster` that have it."""
    clusters: dict[str, Cluster] = {}

    def start(name: str) -> Cluster:
        if name not in clusters:
            folder = tmp_path_factory.mktemp(name)
            flags = ["--without-megatron"]
            clusters[name] = Cluster(zygotes, folder, flags, extra_path=installed(name))
        return clusters[name]

    yield start
    for cluster in clusters.values():
        cluster.close()


@pytest.fixture(scope="session")
def ranks_with_megatron(
    zygotes: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Cluster]]:
    """A function: a version of Megatron, "" for the installed one -> ranks without the plugin."""
    clusters: dict[str, Cluster] = {}

    def start(version: str) -> Cluster:
        if version not in clusters:
            folder = tmp_path_factory.mktemp(f"megatron_{version}")
            path = other_megatron_folder(version) if version else None
            clusters[version] = Cluster(zygotes, folder, ["--without-plugin"], extra_path=path)
        return clusters[version]

    yield start
    for cluster in clusters.values():
        cluster.close()


def other_megatron_folder(version: str) -> Path:
    parent = Path(os.environ.get("MEGATRON_ADAMS_TEST_MEGATRONS", Path(sys.prefix) / "megatron"))
    folder = (parent / version).resolve()
    if not folder.is_dir():
        pytest.skip(f"no Megatron {version} in {folder}: make {parent / version}/.complete")
    return folder
