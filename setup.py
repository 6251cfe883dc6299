"""What pyproject.toml cannot say: megatron-adams.pth lies beside the package, not in it.

Python reads the file at each start (megatron_adams/autoregister.py). An editable installation does
not have it.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "megatron-adams.pth"


class BuildWithPth(build_py):
    """setuptools' own, and the file copied to where the packages are built."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(PTH, str(Path(self.build_lib) / PTH))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib) / PTH)]


setup(cmdclass={"build_py": BuildWithPth})
