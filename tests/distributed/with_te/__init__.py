"""TransformerEngine's own Python code on a CPU, without its libraries.

Its wheel has Python code alone and is installed where no other test sees it (requirements.txt,
`make setup`): Megatron behaves otherwise where TransformerEngine can be imported. extension.py
stands in for the one module that gives it its kernels.
"""

import importlib
import os
import sys
import warnings
from pathlib import Path

FOLDER = Path(
    os.environ.get("MEGATRON_ADAMS_TEST_TE", Path(sys.prefix) / "transformer-engine")
).resolve()
"""Where requirements.txt is installed; by `make setup`, in the environment of the tests."""


def what_is_missing() -> str | None:
    """What has to be done before `import_transformer_engine` can be called, None: nothing."""
    if (FOLDER / "transformer_engine").is_dir():
        return None
    requirements = Path(__file__).with_name("requirements.txt")
    return (
        f"no TransformerEngine in {FOLDER}: python -m pip install --no-deps --target {FOLDER} "
        f"--requirement {requirements} (make setup does it), or name another folder in "
        "MEGATRON_ADAMS_TEST_TE"
    )


def import_transformer_engine() -> None:
    """Make `import transformer_engine` find TransformerEngine in this process."""
    from tests.distributed.with_te import extension

    sys.path.append(str(FOLDER))
    # TransformerEngine (2.20, common/__init__.py): do not load its libraries.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    sys.modules["transformer_engine_torch"] = extension
    with warnings.catch_warnings():
        # That there is no file with the extension: it goes on without its part for PyTorch.
        warnings.simplefilter("ignore", RuntimeWarning)
        common = importlib.import_module("transformer_engine.common")
    # It would look for that file again.
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
