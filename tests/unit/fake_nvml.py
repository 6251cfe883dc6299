"""A driver without a GPU, for tests: nvidia-ml-py itself, on the library of fake_nvml.c."""

import ctypes
from collections.abc import Mapping
from pathlib import Path

import pynvml
import pytest

from tests.harness.c_library import compile_c

GIB = 2**30

# A node of eight healthy H100s; ".3" behind a name is said of GPU 3 alone.
NODE: dict[str, str] = {
    "Count": "8",
    "Driver": "580.65.06",
    "Cuda": "13000",
    "Name": "NVIDIA H100 80GB HBM3",
    **{f"Uuid.{i}": f"GPU-0000000{i}-1111-2222-3333-444444444444" for i in range(8)},
    **{f"Pci.{i}": f"00000000:{i + 1}B:00.0" for i in range(8)},
    "Memory": f"{80 * GIB} {4 << 20}",
    "Capability": "9.0",
    "SmClock": "345",
    "MaxSmClock": "1980",
    "MemoryClock": "2619",
    "MaxMemoryClock": "2619",
    "Temperature": "31",
    "Reasons": "0x1",
    "EccMode": "1",
    "EccSinceLoad": "0",
    "EccLifetime": "0",
    "Remapped": "0 0 0 0",
    "NvLinks": "1" * 18,
    "ComputeMode": "0",
    "MigMode": "0",
    "Processes": "none",
    "Fabric": "3 0",
}
NOT_SUPPORTED = "error 3"


def build(folder: Path, *flags: str) -> Path:
    """Compile the library; return it. Skips the test where there is no compiler."""
    source = Path(__file__).with_name("fake_nvml.c")
    return compile_c(source, folder / "libnvidia-ml.so.1", *flags)


class FakeDriver:
    """Puts the library in the driver's place in this process, until the test ends."""

    def __init__(self, library: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = folder / "nvml.txt"
        monkeypatch.setenv("FAKE_NVML", str(self.file))
        monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library)))
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        self.say()

    def say(self, changes: Mapping[str, str | None] | None = None) -> None:
        """Have it answer as NODE, but for some lines; None: the line goes."""
        lines = {**NODE, **(changes or {})}
        text = [f"{name} {value}\n" for name, value in lines.items() if value is not None]
        self.file.write_text("".join(text))
