from collections.abc import Iterator

import pytest

from tests.harness.cluster import Cluster


@pytest.fixture(scope="session")
def torch_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ranks that have torch alone: without Megatron, and without the rehearsal's stand-ins."""
    cluster = Cluster(tmp_path_factory.mktemp("torch_cluster"), ["--without-megatron"])
    yield cluster
    cluster.close()
