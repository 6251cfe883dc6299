import sys
from pathlib import Path

import pytest
import torch

# The cases and the oracle.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="not run: no GPU"))
