import os
import sys
from collections.abc import Iterator
from pathlib import Path

import megatron.core
import pytest
from packaging.version import Version

from tests.distributed import with_te
from tests.harness.cluster import Cluster


@pytest.fixture(scope="session")
def cluster(zygotes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ranks of real Megatron-Core with the plugin registered, on CPUs over gloo."""
    cluster = Cluster(zygotes, tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def plain_cluster(zygotes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ranks of real Megatron-Core without the plugin."""
    cluster = Cluster(zygotes, tmp_path_factory.mktemp("plain_cluster"), ["--without-plugin"])
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def apex_cluster(zygotes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """As `cluster`, where Megatron finds Apex: a stand-in for it in PyTorch."""
    folder = tmp_path_factory.mktemp("apex_cluster")
    cluster = Cluster(zygotes, folder, extra_path=Path(__file__).parent / "with_apex")
    yield cluster
    cluster.close()


# Megatron-FSDP does not want it to be 1.
FSDP = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}


@pytest.fixture(scope="session")
def fsdp_cluster(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """As `cluster`, in the environment that Megatron-FSDP wants."""
    if not cluster.run("tests.distributed.version_cases:is_megatron_fsdp_stepped").results[0]:
        pytest.skip("adams refuses the Megatron-FSDP of this Megatron (up to 0.17)")
    return cluster.with_variables(tmp_path_factory.mktemp("fsdp_cluster"), **FSDP)


@pytest.fixture(scope="session")
def apex_fsdp_cluster(
    apex_cluster: Cluster, fsdp_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Cluster:
    """As `apex_cluster` and `fsdp_cluster`."""
    return apex_cluster.with_variables(tmp_path_factory.mktemp("apex_fsdp_cluster"), **FSDP)


@pytest.fixture(scope="session")
def te_cluster(zygotes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """As `cluster`, where Megatron finds TransformerEngine: its Python code, see with_te."""
    if missing := with_te.what_is_missing():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("te_cluster")
    cluster = Cluster(zygotes, folder, ["--with-transformer-engine"])
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def oldest_cluster(zygotes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """As `cluster`, with the oldest Megatron whose wheel has all that training needs."""
    requirements = min((Path(__file__).parents[1] / "versions").glob("*.txt"), key=_number)
    if Version(megatron.core.__version__).release < (*_number(requirements),):
        # What ranks of the newer one pickle, this process could not read.
        pytest.skip(f"the installed Megatron is older than that of {requirements.name}")
    folder = Path(os.environ.get("MEGATRON_ADAMS_TEST_MEGATRONS", Path(sys.prefix) / "megatron"))
    installed = (folder / requirements.stem).resolve()
    if not (installed / "megatron").is_dir():
        pytest.skip(
            f"no Megatron in {installed}: python -m pip install --no-deps --target {installed} "
            f"--requirement {requirements} (make setup does it), or name another parent folder in "
            "MEGATRON_ADAMS_TEST_MEGATRONS"
        )
    cluster = Cluster(zygotes, tmp_path_factory.mktemp("oldest_cluster"), extra_path=installed)
    yield cluster
    cluster.close()


def _number(requirements: Path) -> list[int]:
    return [int(part) for part in requirements.stem.split(".")]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"
