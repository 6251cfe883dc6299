"""Countdown problems: combine three numbers with + and - so that they make the target.

The module holds the problems, their split, and the check of an answer. It does not import torch.
"""

import ast
import itertools
import random
import re
from dataclasses import dataclass
from functools import cache

NUM_NUMBERS = 3
MAX_NUMBER = 20
OPERATORS = "+-"
# The longest answer that is taught: "20+20-10".
MAX_ANSWER_CHARS = 8

_ANSWER = re.compile(r"[0-9+\-()]{1,32}", re.ASCII)
_OPERATIONS = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
}


@dataclass(frozen=True, order=True)
class Problem:
    """Numbers in ascending order, and the target that they have to make."""

    numbers: tuple[int, ...]
    target: int

    def prompt(self, order: random.Random | None = None) -> str:
        """Return what the model reads, such as "3 5 2=13:"; the numbers are shuffled by `order`."""
        numbers = list(self.numbers)
        if order is not None:
            order.shuffle(numbers)
        return f"{' '.join(map(str, numbers))}={self.target}:"


# --- the check ----------------------------------------------------------------------------------


class _Wrong(Exception):
    """The text is no answer."""


def _evaluate(node: ast.expr, used: list[int]) -> int:
    """Return an expression's value, and append the numbers that it uses."""
    match node:
        case ast.Constant(value=value) if type(value) is int:  # True is an int, too
            used.append(value)
            return value
        case ast.BinOp(left, operator, right) if type(operator) in _OPERATIONS:
            return _OPERATIONS[type(operator)](_evaluate(left, used), _evaluate(right, used))
    raise _Wrong


def is_correct(answer: str, problem: Problem) -> bool:
    """Whether an answer makes the target of the numbers, each used exactly once.

    An answer has digits, + - and parentheses, and nothing else: no spaces, no sign before a number
    or a parenthesis, no leading zeros, at most 32 characters. The text is parsed with `ast`, and
    never executed.
    """
    if not _ANSWER.fullmatch(answer):
        return False
    used: list[int] = []
    try:
        value = _evaluate(ast.parse(answer, mode="eval").body, used)
    except (SyntaxError, _Wrong):
        return False
    return value == problem.target and sorted(used) == sorted(problem.numbers)


# --- the problems -------------------------------------------------------------------------------


@cache
def answers(numbers: tuple[int, ...]) -> dict[int, list[str]]:
    """Return the answers without parentheses by the target that they make, sorted.

    With + and - alone, parentheses make no target that can do without them.
    """
    found: dict[int, set[str]] = {}
    signs = list(itertools.product(OPERATORS, repeat=len(numbers) - 1))
    for first, *others in set(itertools.permutations(numbers)):
        for choice in signs:
            pairs = list(zip(choice, others, strict=True))
            text = str(first) + "".join(f"{sign}{number}" for sign, number in pairs)
            value = first + sum(number if sign == "+" else -number for sign, number in pairs)
            found.setdefault(value, set()).add(text)
    return {target: sorted(texts) for target, texts in found.items()}


def all_problems() -> list[Problem]:
    """Return every problem with an answer and a target of 1 or more, sorted."""
    return sorted(
        Problem(numbers, target)
        for numbers in itertools.combinations_with_replacement(
            range(1, MAX_NUMBER + 1), NUM_NUMBERS
        )
        for target in answers(numbers)
        if target >= 1
    )


@dataclass(frozen=True)
class Split:
    """Problems that SFT teaches with answers, that GRPO trains on, and that are held out.

    GRPO trains on all that are not held out, so `taught` is a part of `train`.
    """

    taught: list[Problem]
    train: list[Problem]
    held_out: list[Problem]


def split_problems(num_taught: int, num_held_out: int) -> Split:
    """Divide the problems, in an order that is always the same.

    Raises:
        ValueError: there are too few problems.
    """
    problems = all_problems()
    if num_taught + num_held_out > len(problems):
        raise ValueError(
            f"num_taught={num_taught}, num_held_out={num_held_out}: there are {len(problems):,} "
            "problems; ask for fewer"
        )
    random.Random(0).shuffle(problems)
    held_out, train = problems[:num_held_out], problems[num_held_out:]
    split = Split(train[:num_taught], train, held_out)
    check_apart(split)
    return split


def check_apart(split: Split) -> None:
    """Compare the held-out problems with the others.

    Raises:
        ValueError: a problem is on both sides, perhaps with its numbers in another order.
    """
    trained = {(*sorted(each.numbers), each.target) for each in [*split.taught, *split.train]}
    both = [each for each in split.held_out if (*sorted(each.numbers), each.target) in trained]
    if both:
        raise ValueError(f"held-out problems {both[:3]} are trained on, too; divide them again")
