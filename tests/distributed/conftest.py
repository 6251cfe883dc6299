from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import with_te
from tests.harness.cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ranks of real Megatron-Core with the plugin registered, on CPUs over gloo."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def plain_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ranks of real Megatron-Core without the plugin."""
    cluster = Cluster(tmp_path_factory.mktemp("plain_cluster"), ["--without-plugin"])
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def apex_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """As `cluster`, where Megatron finds Apex: a stand-in for it in PyTorch."""
    folder = tmp_path_factory.mktemp("apex_cluster")
    cluster = Cluster(folder, extra_path=Path(__file__).parent / "with_apex")
    yield cluster
    cluster.close()


# Megatron-FSDP does not want it to be 1.
FSDP = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}


@pytest.fixture(scope="session")
def fsdp_cluster(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """As `cluster`, in the environment that Megatron-FSDP wants."""
    return cluster.with_variables(tmp_path_factory.mktemp("fsdp_cluster"), **FSDP)


@pytest.fixture(scope="session")
def apex_fsdp_cluster(apex_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """As `apex_cluster` and `fsdp_cluster`."""
    return apex_cluster.with_variables(tmp_path_factory.mktemp("apex_fsdp_cluster"), **FSDP)


@pytest.fixture(scope="session")
def te_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """As `cluster`, where Megatron finds TransformerEngine: its Python code, see with_te."""
    if missing := with_te.what_is_missing():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("te_cluster")
    cluster = Cluster(folder, ["--with-transformer-engine"])
    yield cluster
    cluster.close()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"
