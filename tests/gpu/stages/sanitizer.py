"""Run stages/smoke.py with small tensors under the tools of compute-sanitizer.

racecheck is left out: it looks only at shared memory, and the kernels have none.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.gpu.stages.stage import Stage

# initcheck must see every kernel that writes. The others look only at this project's kernels.
_OURS = ["--kernel-name", "kns=adams"]
TOOLS = {"memcheck": _OURS, "initcheck": [], "synccheck": _OURS}
# A call that the driver refuses is not a finding: cuda.bindings asks for functions that the driver
# may lack.
_REPORTED = ["--report-api-errors", "no", "--print-limit", "50"]
# The line that follows a finding in a tool's output.
_FINDING = re.compile(r"^=+ +at .*\badams_\w+", re.MULTILINE)


def main() -> int:
    stage = Stage("sanitizer")
    tools = {"none": []} if stage.is_rehearsal else TOOLS
    if not stage.is_rehearsal and shutil.which("compute-sanitizer") is None:
        stage.record("compute-sanitizer", ok=False, words="there is none")
        return 1
    for index, (tool, options) in enumerate(tools.items()):
        with stage.check(tool) as found:
            found["words"] = _watch(
                stage, tool, options, stage.seconds_left / (len(tools) - index) + 5
            )
    return stage.exit_code


def _watch(stage: Stage, tool: str, options: list[str], timeout_s: float) -> str:
    """Run the smoke stage under a tool. Raises AssertionError with what it found."""
    smoke = [sys.executable, str(Path(__file__).parent / "smoke.py")]
    # The checks of smoke do not count for this stage, so they go into another file.
    records = stage.folder / f"sanitizer-{tool}.jsonl"
    smoke += ["--small", "--results", str(records), "--out", str(stage.folder)]
    if stage.is_rehearsal:
        command = [*smoke, "--rehearse"]
    else:
        command = ["compute-sanitizer", "--tool", tool, *options, *_REPORTED, *smoke]
    environment = {
        **os.environ,
        # The tools cannot see an access beyond a tensor that stays in a block of the caching
        # allocator.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    output = stage.folder / f"sanitizer-{tool}.log"
    with output.open("w") as file:
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(timeout_s, 5),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {timeout_s:.0f} s") from None
    text = output.read_text(errors="replace")
    print(text[-3000:], flush=True)
    findings = _FINDING.findall(text)
    assert not findings, f"{len(findings)} findings, as {_around(text, findings[0])}"
    assert done.returncode == 0, f"exit code {done.returncode}: {text.strip()[-200:]}"
    if stage.is_rehearsal:
        return "ended well"
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    assert summary == ["0"], f"errors by the tool's own count: {summary or 'it printed none'}"
    return "0 errors"


def _around(text: str, finding: str) -> str:
    """Return a finding with the line before it, which says what it is."""
    before, _, after = text.partition(finding)
    return f"{before.splitlines()[-1]} {finding}{after.partition(chr(10))[0]}".replace("=", "")


if __name__ == "__main__":
    sys.exit(main())
