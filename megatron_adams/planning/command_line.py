"""Finds a job's flags in a pasted command line, or in the script that holds it.

Understands the part of bash that Megatron's own example scripts use: continued lines, comments,
quotes, variables, defaults (${TP:-1}), integer arithmetic, arrays (ARGS=( ... ), ARGS+=( ... )),
#SBATCH lines, and commands inside of `srun bash -c "..."`. Nothing is run, and the environment is
not read: a variable that the text does not set is refused where it matters.
"""

import ast
import dataclasses
import operator
import re
import shlex
from collections.abc import Sequence

# What is not known stands between two of these, in values that it has got into, with another sign
# in the place of $, so that it is not looked for again.
_MARK, _DOLLAR = "\x00", "\x01"
_OPERATORS = frozenset("();<>|&")
_NAME = r"[A-Za-z_]\w*"
# Flags of paths, names and places: no value of theirs changes a byte on a GPU.
_HARMLESS = re.compile(
    r"--(data-path|.*-data-path|.*data-args-path|data-cache-path|save|load|pretrained-checkpoint|"
    r"ckpt-.*|.*-dir|vocab-file|merge-file|tokenizer-model|wandb-.*|tensorboard-.*|log-.*|"
    r"exit-.*|save-.*|seed|master[-_].*|node[-_]rank|rdzv[-_].*|lr|min-lr|train-iters|"
    r"train-samples|lr-.*|weight-decay|split|eval-.*|distributed-timeout-minutes|num-workers)"
)
_OPENING = re.compile(r"^(if|for|while|until|case|select)\b|^(function\s+)?[\w-]+\s*\(\)\s*\{?\s*$")
_CLOSING = re.compile(r"^(fi\b|done\b|esac\b|\})")


class CommandLineError(ValueError):
    """The text holds no command line that can be read; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What was found.

    Attributes:
        flags: of the training script.
        num_ranks: by torchrun's or Slurm's own options; None: they do not say.
    """

    flags: tuple[str, ...]
    num_ranks: int | None


def read_text(text: str) -> Command:
    """Find the job in a command line or a script.

    Raises:
        CommandLineError: there is none, there are several, or it has variables that the text does
            not set.
    """
    shell = _Shell()
    shell.read(text)
    return _found(shell.commands, shell.sbatch)


def read_words(words: Sequence[str]) -> Command:
    """Find the job in words that a shell has split: flags alone, or with what starts them.

    Raises:
        CommandLineError: as `read_text`.
    """
    if len(words) == 1 and any(letter.isspace() for letter in words[0].strip()):
        return read_text(words[0])
    if variables := [word for word in words if re.search(rf"\$({_NAME}|\{{|\()", word)]:
        raise CommandLineError(_unset(variables[0], words[max(0, words.index(variables[0]) - 1)]))
    return _found([list(words)], {})


def _unset(name: str, flag: str) -> str:
    where = f" in the value of {flag}" if flag.startswith("--") else ""
    return (
        f"{name}{where} is not set in what was given: write its value in its place, or in a script "
        f"set it on a line before"
    )


# --- which command ------------------------------------------------------------------------------


def _found(commands: Sequence[Sequence[str]], sbatch: dict[str, str]) -> Command:
    jobs = [job for words in commands if (job := _job(words)) is not None]
    jobs = [job for job in jobs if len(job[1]) > 1] or jobs
    if not jobs:
        raise CommandLineError(
            "no command with Megatron's flags was found: give a line such as torchrun ... "
            "pretrain_gpt.py --num-layers ..., or the flags alone"
        )
    if len(jobs) > 1:
        raise CommandLineError(
            f"{len(jobs)} commands with Megatron's flags were found: give the one to plan"
        )
    launcher, flags = jobs[0]
    return Command(tuple(_resolved(flags)), _num_ranks(launcher, sbatch))


def _job(words: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """The words before the script, itself included, and its flags."""
    if words and words[0].startswith("--"):
        return [], list(words)
    scripts = [index for index, word in enumerate(words) if word.endswith(".py")]
    modules = [index + 1 for index, word in enumerate(words[:-1]) if word == "-m"]
    for index in [*scripts[:1], *modules[-1:]]:
        flags = list(words[index + 1 :])
        if any(flag.startswith("--") for flag in flags):
            return list(words[: index + 1]), flags
    return None


def _resolved(flags: Sequence[str]) -> list[str]:
    """The flags without those that have unknown values and change no byte.

    Raises:
        CommandLineError: a value that matters is not known.
    """
    kept: list[str] = []
    for group in _by_flag(flags):
        unknown = [word for word in group if _MARK in word]
        flag = group[0].partition("=")[0]
        if not unknown:
            kept += group
        elif _HARMLESS.fullmatch(flag) is None:
            name = unknown[0].split(_MARK)[1].replace(_DOLLAR, "$")
            raise CommandLineError(_unset(name, flag))
    return kept


def _by_flag(flags: Sequence[str]) -> list[list[str]]:
    """Each flag with its values."""
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def _num_ranks(launcher: Sequence[str], sbatch: dict[str, str]) -> int | None:
    """Nodes times processes of a node, where the launcher or Slurm says both."""
    options: dict[str, str] = {}
    for index, word in enumerate(launcher):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-"):
            following = launcher[index + 1] if index + 1 < len(launcher) else ""
            options[name.replace("_", "-")] = value if equals else following
    is_torchrun = any(
        word.rpartition("/")[2] in ("torchrun", "torch.distributed.run", "torch.distributed.launch")
        for word in launcher
    )
    if is_torchrun:
        sizes = [options.get("nnodes", "1"), options.get("nproc-per-node", "1")]
    else:
        options = {**sbatch, **options}
        nodes = options.get("nodes", options.get("N", ""))
        sizes = [nodes, options.get("ntasks-per-node", "")]
    if not all(size.isdigit() for size in sizes):
        return None
    return int(sizes[0]) * int(sizes[1])


# --- bash ---------------------------------------------------------------------------------------


class _Shell:
    """Reads a script line by line.

    Attributes:
        commands: the words of each command.
        sbatch: options of the #SBATCH lines.
    """

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.sbatch: dict[str, str] = {}
        self._variables: dict[str, str] = {}
        self._arrays: dict[str, list[str]] = {}
        self._depth = 0

    def read(self, text: str) -> None:
        lines = iter(re.sub(r"\\\r?\n", " ", text).splitlines())
        for line in lines:
            stripped = line.strip()
            if stripped.startswith("#"):
                self._read_sbatch(stripped)
                continue
            start = re.match(
                rf"(?:(?:export|local|declare|readonly)\s+(?:-a\s+)?)?({_NAME})(\+?)=\(", stripped
            )
            if start:
                body = [stripped[start.end() :]]
                while not self._is_closed(body):
                    following = next(lines, None)
                    if following is None:
                        raise CommandLineError(
                            f"the array {start[1]}=( has no closing parenthesis: add it"
                        )
                    body.append(following)
                self._assign_array(start[1], body, is_more=bool(start[2]))
                continue
            for statement in _statements(stripped):
                self._read_line(statement)

    def _read_sbatch(self, comment: str) -> None:
        if found := re.match(r"#SBATCH\s+(--?[\w-]+)(?:[=\s]\s*(\S+))?", comment):
            name, value = found[1].lstrip("-"), found[2] or ""
            self.sbatch[name] = value
            variables = {
                "nodes": ("SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
                "N": ("SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
                "ntasks-per-node": ("SLURM_NTASKS_PER_NODE",),
                "gpus-per-node": ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"),
            }
            for variable in variables.get(name, ()):
                self._variables[variable] = value

    @staticmethod
    def _is_closed(body: Sequence[str]) -> bool:
        text = "\n".join(_without_comment(line) for line in body)
        bare = re.sub(r"'[^']*'|\"(?:\\.|[^\"\\])*\"|\$\(\([^)]*\)\)|\$\([^)]*\)", "", text)
        return ")" in bare

    def _assign_array(self, name: str, body: Sequence[str], *, is_more: bool) -> None:
        text = " ".join(_without_comment(line) for line in body)
        words = _words(self._expanded(text[: text.rindex(")")]))
        self._arrays[name] = [*(self._arrays.get(name, []) if is_more else []), *words]

    def _read_line(self, line: str) -> None:
        if _CLOSING.match(line):
            self._depth = max(0, self._depth - 1)
        line = re.sub(r"^(then|else|do|elif)\b", "", line).strip()
        if not line:
            return
        assignment = re.fullmatch(
            rf"(?:(?:export|local|declare|readonly)\s+)?({_NAME})(\+?)=(.*)", line
        )
        if assignment and self._assign(*assignment.groups()):
            return
        if _OPENING.match(line) and not re.search(r"\b(fi|done|esac)\b", line):
            self._depth += 1
        for words in _split(_tokens(self._expanded(line))):
            self._keep(words)

    def _assign(self, name: str, more: str, value: str) -> bool:
        """Set a variable; False: a command follows the assignment."""
        words = _words(self._expanded(_without_comment(value).strip()))
        if len(words) > 1:
            # Several assignments, or a command with its own variables.
            if not all(re.match(rf"{_NAME}=", word) for word in words[1:]):
                return False
            for word in words[1:]:
                self._set(*word.split("=", 1))
        value = words[0] if words else ""
        self._set(name, self._variables.get(name, "") + value if more else value)
        return True

    def _set(self, name: str, value: str) -> None:
        # Inside of a condition or a loop: which of its values it has is not known.
        if self._depth and self._variables.get(name) != value:
            value = f"{_MARK}{_DOLLAR}{name}{_MARK}"
        self._variables[name] = value

    def _keep(self, words: list[str]) -> None:
        while words and (re.match(rf"{_NAME}=", words[0]) or words[0] in ("eval", "exec", "time")):
            words = words[1:]
        nested = [word for word in words if re.search(r"\s--[a-z]", word)]
        if nested and not any(word.endswith(".py") for word in words):
            for text in nested:
                self.commands += _split(_tokens(text))
            return
        if words:
            self.commands.append(words)

    def _expanded(self, text: str) -> str:
        """`text` with its variables, but for what stands in single quotes."""
        text = re.sub(
            rf'"\$\{{({_NAME})\[[@*]\]\}}"|\$\{{({_NAME})\[[@*]\]\}}',
            lambda found: self._array(found[1] or found[2]),
            text,
        )
        parts = re.split(r"('[^']*')", text)
        return "".join(
            part if index % 2 else self._variables_in(part) for index, part in enumerate(parts)
        )

    def _array(self, name: str) -> str:
        if name in self._arrays:
            return shlex.join(self._arrays[name])
        return f"{_MARK}{_DOLLAR}{{{name}[@]}}{_MARK}"

    def _variables_in(self, text: str) -> str:
        text = re.sub(
            rf"\$\{{({_NAME})(?::?[-=]([^}}]*))?\}}|\$({_NAME})|\$([0-9@*#?!$])|\$\{{([^}}]*)\}}",
            self._variable,
            text,
        )
        text = re.sub(r"\$\(\(([^()]*(?:\([^()]*\)[^()]*)*)\)\)", self._arithmetic, text)
        return re.sub(r"\$\([^)]*\)|`[^`]*`", _marked, text)

    def _variable(self, found: re.Match[str]) -> str:
        name = found[1] or found[3]
        if name in self._variables:
            return self._variables[name]
        if found[2] is not None:
            return found[2]
        return _marked(found)

    def _arithmetic(self, found: re.Match[str]) -> str:
        expression = re.sub(
            _NAME, lambda name: self._variables.get(name[0], name[0]), found[1].strip()
        )
        try:
            return str(_evaluated(ast.parse(expression, mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError):
            return _marked(found)


def _marked(found: re.Match[str]) -> str:
    name = re.sub(rf"[{_MARK}\s]", "", found[0]).replace("$", _DOLLAR)
    return f"{_MARK}{name}{_MARK}"


_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: int(a / b),
    ast.Mod: operator.mod,
}


def _evaluated(node: ast.expr) -> int:
    """The value of an integer expression; bash's division drops the fraction.

    Raises:
        ValueError: something else stands in it.
    """
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return int(_ARITHMETIC[type(op)](_evaluated(left), _evaluated(right)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluated(operand)
    raise ValueError(ast.dump(node))


def _without_comment(line: str) -> str:
    """A line up to a # that begins a word outside of quotes."""
    bare = re.sub(r"'[^']*'|\"(?:\\.|[^\"\\])*\"", lambda quoted: "_" * len(quoted[0]), line)
    found = re.search(r"(?:^|\s)#", bare)
    return line[: found.start()] if found else line


def _statements(line: str) -> list[str]:
    """The parts of a line between semicolons outside of quotes, without a comment."""
    line = _without_comment(line)
    hidden = r"'[^']*'|\"(?:\\.|[^\"\\])*\"|;;|\\;"
    bare = re.sub(hidden, lambda found: "_" * len(found[0]), line)
    ends = [found.start() for found in re.finditer(";", bare)]
    starts = [0, *(end + 1 for end in ends)]
    parts = [line[a:b].strip() for a, b in zip(starts, [*ends, len(line)], strict=True)]
    return [part for part in parts if part]


def _tokens(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    return _lexed(lexer, line)


def _words(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    return _lexed(lexer, text)


def _lexed(lexer: shlex.shlex, text: str) -> list[str]:
    try:
        return list(lexer)
    except ValueError as exc:
        raise CommandLineError(
            f"{text.strip()[:60]!r}: {exc}; close the quotes, and keep what they hold on one line"
        ) from exc


def _split(tokens: Sequence[str]) -> list[list[str]]:
    """Commands between ; | & and the like, without what is redirected."""
    commands: list[list[str]] = [[]]
    is_target = False
    for token in tokens:
        if token and set(token) <= _OPERATORS:
            is_target = "<" in token or ">" in token
            if is_target and commands[-1] and commands[-1][-1].isdigit():
                commands[-1].pop()  # 2>
            if not is_target:
                commands.append([])
        elif is_target:
            is_target = False
        else:
            commands[-1].append(token)
    return [words for words in commands if words]
