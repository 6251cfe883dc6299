"""Scripts in processes of their own, forked from one that has imported torch once.

An interpreter that imports torch takes two seconds, a fork milliseconds. The process that is forked
runs no tensor operation: threads of OpenMP do not survive a fork.
"""

import linecache
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "megatron_adams.cpu_rehearsal", __name__])
_TIMEOUT_S = 120.0


def run_forked(script: str, **environment: str) -> None:
    """Run a script as `python -c` would.

    Args:
        environment: variables beside those of this process.
    Raises:
        AssertionError: with its traceback, if it raised, or did not come to its end.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    variables = {**os.environ, **environment}
    process = _CONTEXT.Process(target=_run, args=(script, variables, sender))
    process.start()
    sender.close()
    process.join(_TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"no end within {_TIMEOUT_S} s")
    try:
        raised = receiver.recv()
    except EOFError:
        raised = f"ended with exit code {process.exitcode}"
    assert not raised, raised


def _run(script: str, variables: dict[str, str], sender: Connection) -> None:
    os.environ.clear()
    os.environ.update(variables)
    # For the traceback.
    linecache.cache["<script>"] = (len(script), None, script.splitlines(keepends=True), "<script>")
    try:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    except BaseException:
        sender.send(traceback.format_exc())
    else:
        sender.send("")
