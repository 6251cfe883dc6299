"""refusals.py and the support matrix say the same: which flags are refused."""

import ast
import re
from pathlib import Path

from megatron_adams.megatron.names import flag_of
from megatron_adams.megatron.refusals import refusal

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "megatron_adams" / "megatron" / "refusals.py").read_text("utf-8")
SUPPORT = (ROOT / "docs" / "support.md").read_text("utf-8")
TEXTS = [
    node.value
    for node in ast.walk(ast.parse(SOURCE))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
]
FLAG = r"--[a-z][\w-]+"
# Flags stand there as they are, or as the fields that `flag_of` makes flags of.
NAMED = {flag for text in TEXTS for flag in [*re.findall(FLAG, text), flag_of(text)]}
# What a remedy names alone.
ACCEPTED = {"--override-opt_param-scheduler"}


def test_every_refused_row_of_the_support_matrix_has_its_flags_in_refusals() -> None:
    rows = re.findall(r"^\|(.*)\|(.*)\| refused", SUPPORT, re.MULTILINE)
    flags = {flag for row in rows for cell in row for flag in re.findall(FLAG, cell)}
    assert len(flags) > 30
    assert flags - NAMED == set()


def test_every_flag_of_refusals_is_in_the_support_matrix() -> None:
    flags = {flag for text in TEXTS for flag in re.findall(FLAG, text)} - ACCEPTED
    assert len(flags) > 40
    assert {flag for flag in flags if not re.search(rf"{flag}(?![\w-])", SUPPORT)} == set()


def test_refusal_has_what_was_given_the_rule_and_the_remedy() -> None:
    error = refusal("--save x", "must be y", "add --z")
    assert isinstance(error, ValueError) and str(error) == "--save x: must be y; add --z"
