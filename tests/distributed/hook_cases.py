"""What the ranks of test_hooks.py run: calls of Megatron's functions that are not adams's."""

import copy
import functools
import importlib
import inspect
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import megatron_adams
from megatron_adams.checkpoint import TRACKER, DamagedCheckpointError
from megatron_adams.megatron import hooks
from tests.distributed import cases, checkpoint_cases

EXEMPT = {
    # It gives every parser adams's flags; test_flags.py says what else is as without it.
    "megatron.training.arguments.add_megatron_arguments",
    # It concerns the wheel, whatever the optimizer; test_register.py.
    "megatron.core.datasets.utils.compile_helpers",
}

# A world is what the caller has: Megatron's global arguments (None: not set), and the namespace or
# configuration and the optimizer that it gives.
WORLDS: dict[str, tuple[Namespace | None, Any, Any]] = {
    "nothing": (None, Namespace(), None),
    "global arguments that are not set": (None, Namespace(optimizer="adam"), "foreign"),
    "namespaces without optimizer": (
        Namespace(load="/nowhere", save="/nowhere", async_strategy="mcore"),
        Namespace(load="/nowhere", save="/nowhere"),
        "foreign",
    ),
    "save and load that are None": (
        Namespace(load=None, save=None, optimizer="adam"),
        Namespace(load=None, save=None, optimizer="adam"),
        "foreign",
    ),
    "no optimizer, in a run of adams": (
        Namespace(load="/nowhere", save="/nowhere", optimizer="adams", log_interval=1),
        Namespace(optimizer="sgd"),
        None,
    ),
    "another optimizer, in a run of adams": (
        Namespace(load="/nowhere", save="/nowhere", optimizer="adams", curr_iteration=0),
        Namespace(optimizer="muon"),
        "foreign",
    ),
    # Adams's own, but nowhere to save or to load.
    "adams, and global arguments that are not set": (None, Namespace(), "adams"),
    "adams, and save and load that are None": (
        Namespace(load=None, save=None),
        Namespace(save=None),
        "adams",
    ),
}


def sweep(world: str) -> dict[str, Any]:
    """Call the wrapper of every hook as a caller of that world does, by position and by name.

    Returns:
        "hooks": their paths; "problems": what a wrapper did to the call, or raised.
    """
    from megatron.training import global_vars

    # The package has a function of this name.
    register = importlib.import_module("megatron_adams.megatron.register")
    global_arguments, given, optimizer = WORLDS[world]
    if global_arguments is not None:
        global_vars.set_args(global_arguments)
    told: dict[str, Any] = {"hooks": [], "problems": []}
    for hook in [*register._core_hooks(), *register._training_hooks()]:
        path = hook.symbol.path
        told["hooks"].append(path)
        if path in EXEMPT:
            continue
        before = copy.deepcopy((global_arguments, given))
        for by_name in (False, True):
            try:
                problem = _call(hook, given, _optimizer(optimizer), by_name=by_name)
            except Exception as exc:
                problem = f"raised {exc!r}"
            if problem is None and (global_arguments, given) != before:
                problem = "changed a namespace"
            if problem is not None:
                told["problems"].append(f"{path}: {problem}")
    return told


def _optimizer(name: str | None) -> Any:
    from megatron_adams.megatron.distributed import AdamSChainedOptimizer

    if name == "adams":
        return AdamSChainedOptimizer([])
    return None if name is None else torch.optim.SGD([torch.zeros(1)], lr=0.1)


def _call(hook: Any, given: Any, optimizer: Any, *, by_name: bool) -> str | None:
    """Call a hook's wrapper around a recorder with the signature of Megatron's function.

    Returns:
        What was not passed on as it came; None where nothing was changed.
    """
    function = hooks.resolve(hook.symbol, version="the installed one")[2]
    original = vars(function)["__megatron_adams_original__"]
    answer = object()
    calls: list[tuple[Any, Any]] = []

    @functools.wraps(original)
    def recorder(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return answer

    values = {
        "args": given,
        "config": given,
        "self": given,
        "optimizer": optimizer,
        "model_chunks": [torch.nn.Linear(1, 1)],
        "iteration": 3,
        "rank": 0,
        "load_arg": "load",
        "parameters": [torch.nn.Parameter(torch.zeros(1))],
        "max_norm": 1.0,
        "total_norm": 2.0,
        "optimizer_state_dict": {"state": {"a.mlp.linear_fc1.weight": {"momentum_buffer": 0}}},
    }
    signature = inspect.signature(original)
    arguments = {
        parameter.name: values.get(parameter.name, object())
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty or parameter.name in values
    }
    wrapper = hook.wrap(recorder)
    if by_name:
        outcome = wrapper(**arguments)
    else:
        # All in front of the last one given, as positions have no gaps.
        last = list(signature.parameters).index(list(arguments)[-1])
        names = list(signature.parameters)[: last + 1]
        arguments = {
            name: arguments.get(name, signature.parameters[name].default) for name in names
        }
        outcome = wrapper(*arguments.values())
    if len(calls) != 1:
        return f"{len(calls)} calls of the original"
    bound = signature.bind(*calls[0][0], **calls[0][1])
    bound.apply_defaults()
    given_or_default = {
        parameter.name: arguments.get(parameter.name, parameter.default)
        for parameter in signature.parameters.values()
    }
    changed = [
        name
        for name, value in bound.arguments.items()
        if value is not given_or_default.get(name, value)
    ]
    if changed:
        return f"changed {changed}"
    return None if outcome is answer else "kept the answer"


# --- Megatron's own functions -------------------------------------------------------------------


def checkpoint_without_arguments(argv: str, folder: str) -> dict[str, Any]:
    """Save and load an optimizer's checkpoint as tools do, whose arguments are not a run's.

    Args:
        argv: of a run of one step, without --save.
        folder: a new one.
    Returns:
        What came of each call: what it returned, or the error.
    """
    from megatron.training import checkpointing, training

    utils = importlib.import_module("megatron.core.datasets.utils")
    if not hasattr(utils.compile_helpers, "__megatron_adams_original__"):
        utils.compile_helpers = lambda: None
    captured = checkpoint_cases.capture_setup()
    outcomes: dict[str, Any] = {}

    def attempt(name: str, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            outcomes[name] = function(*arguments)
        except Exception as exc:
            outcomes[name] = f"{type(exc).__name__}: {exc}"

    train_step = training.train_step

    @functools.wraps(train_step)
    def then_call(*args: Any, **kwargs: Any) -> Any:
        outcome = train_step(*args, **kwargs)
        save, load = checkpointing.save_checkpoint, checkpointing.load_checkpoint
        attempt("save None", save, 1, *captured, 0)
        own = copy.copy(checkpointing.get_args())
        del own.optimizer
        checkpointing.get_args = lambda: own
        own.save = own.load = folder
        attempt("save", save, 1, *captured, 0)
        attempt("load", load, *captured)
        attempt("load by position", load, *captured, "load", True)
        attempt("load weights", load, captured[0], None, None)
        own.load = None
        attempt("load None", load, *captured)
        return outcome

    training.train_step = then_call
    cases.train(argv)
    return outcomes


def import_before_register() -> dict[str, Any]:
    """Have modules import get_megatron_optimizer, then register; run where it is not registered.

    Returns:
        "is_reached": of a module outside Megatron, and one that calls it otherwise; "error": what
        building adams ends in where `register` cannot reach.
    """
    import megatron.core.optimizer as home

    original = home.get_megatron_optimizer
    trainer, other = ModuleType("adams_test_trainer"), ModuleType("adams_test_other")
    vars(trainer)["get_megatron_optimizer"] = vars(other)["build"] = original
    sys.modules |= {module.__name__: module for module in (trainer, other)}
    kept = functools.partial(original)
    megatron_adams.register()
    wrapper = home.get_megatron_optimizer
    told = {
        "is_wrapped": wrapper is not original,
        "is_reached": vars(trainer)["get_megatron_optimizer"] is vars(other)["build"] is wrapper,
    }
    try:
        kept(home.OptimizerConfig(optimizer="adams", lr=1e-3), [torch.nn.Linear(1, 1)])
    except Exception as exc:
        told["error"] = f"{type(exc).__name__}: {exc}"
    return told


def checkpoint_of_a_mimo_model(argv: str, folder: str) -> dict[str, Any]:
    """Give the hooks of a checkpoint that adams saved the optimizer of a MIMO model.

    Args:
        argv: of a run of two steps, which is saved after each.
        folder: where it is saved.
    Returns:
        "is_passed_on": of a whole checkpoint; "is_withdrawn": of one that is about to be
        overwritten; "error": of loading it then.
    """
    from megatron.core.models.mimo.optimizer import MimoOptimizer
    from megatron.training import checkpointing

    from megatron_adams.megatron.training import checkpoint

    captured = checkpoint_cases.capture_setup()
    cases.train(f"{argv} --save {folder} --load {folder}")
    model, optimizer, scheduler = captured
    # Of a rank that no module is on.
    of_modules = MimoOptimizer({}, optimizer.config)
    calls: list[str] = []

    @functools.wraps(vars(checkpointing.load_checkpoint)["__megatron_adams_original__"])
    def load(*_: Any, **__: Any) -> None:
        calls.append("load")

    @functools.wraps(vars(checkpointing.save_checkpoint)["__megatron_adams_original__"])
    def save(*_: Any, **__: Any) -> None:
        calls.append("save")

    load_checkpoint = checkpoint.wrap_load_checkpoint(load)
    load_checkpoint(model, of_modules, scheduler)
    told: dict[str, Any] = {"is_passed_on": calls == ["load"]}
    checkpoint.wrap_save_checkpoint(save)(2, model, of_modules, scheduler, 0)
    told["is_withdrawn"] = (Path(folder) / TRACKER).read_text() == "1"
    checkpointing.get_args().ckpt_step = 2
    try:
        load_checkpoint(model, of_modules, scheduler)
    except DamagedCheckpointError as exc:
        told["error"] = str(exc)
    return told


def log_without_arguments_of_adams(argv: str) -> list[str]:
    """Train with a cap, in a program whose arguments have none of adams's once it is built.

    Returns:
        What was logged of the update RMS.
    """
    from megatron.training import training

    from megatron_adams.megatron.training import log as training_log

    lines: list[str] = []
    training_log.print_rank_last = lines.append
    setup = training.setup_model_and_optimizer

    def then_forget(*args: Any, **kwargs: Any) -> Any:
        built = setup(*args, **kwargs)
        settings = training.get_args()
        for name in [name for name in vars(settings) if name.startswith("adams_")]:
            delattr(settings, name)
        return built

    training.setup_model_and_optimizer = then_forget
    cases.train(argv)
    return lines
