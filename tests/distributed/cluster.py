"""For branches that import it from here; `tests.harness.cluster` is its place."""

from tests.harness.cluster import REPO, Cluster, Outcome

__all__ = ["REPO", "Cluster", "Outcome"]
