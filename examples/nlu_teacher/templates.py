"""Draw labelled utterances from Home Assistant's sentence templates.

labelled.py calls it. The package `home-assistant-intents` has the templates (Apache-2.0), and
`hassil` parses them. A template names lists of values, such as {area}: the package has some of
them, VALUES has those that a household would fill in, and a template with any other list (free
text, such as a message) is left out and counted.
"""

import json
import random
from importlib import resources
from typing import Any

from labelled import Malformed, Utterance, from_chunks

Chunks = list[tuple[str, str | None]]
# What Home Assistant takes from the household that it runs in.
VALUES = {
    "area": ("kitchen", "living room", "bedroom", "bathroom", "garage", "office", "hallway"),
    "floor": ("ground floor", "first floor", "basement", "attic"),
    "name": ("desk lamp", "ceiling fan", "front door", "heater", "radio", "porch light", "oven"),
}
MAX_TRIES_PER_DRAW = 20


class _Missing(Exception):
    """A template names a list that has no values here."""


class Sampler:
    """Draws sentences from the templates of a language.

    Args:
        data: the package's file of a language, parsed.
    """

    def __init__(self, data: dict[str, Any], rng: random.Random) -> None:
        from hassil.parse_expression import parse_sentence

        self.rng = rng
        self.parse = parse_sentence
        self.lists = data["lists"] | {name: {"values": each} for name, each in VALUES.items()}
        self.rules = data["expansion_rules"]
        self.parsed: dict[str, Any] = {}

    def draw(self, template: str) -> Chunks:
        """Return a sentence as pieces of text, each with its slot's name or None.

        Raises:
            _Missing: the template names a list without values.
        """
        return self._expand(self._expression(template), None)

    def _expression(self, text: str) -> Any:
        if text not in self.parsed:
            self.parsed[text] = self.parse(text).expression
        return self.parsed[text]

    def _expand(self, node: Any, slot: str | None) -> Chunks:
        from hassil import expression as kinds

        if isinstance(node, kinds.TextChunk):
            return [(node.original_text, slot)]
        if isinstance(node, kinds.ListReference):
            return [("".join(text for text, _ in self._value(node)), node.slot_name)]
        if isinstance(node, kinds.RuleReference):
            if node.rule_name not in self.rules:
                raise _Missing(node.rule_name)
            return self._expand(self._expression(self.rules[node.rule_name]), slot)
        items = list(node.items)
        if isinstance(node, kinds.Alternative):
            return self._expand(self.rng.choice(items), slot)
        if isinstance(node, kinds.Permutation):
            self.rng.shuffle(items)
        return [chunk for item in items for chunk in self._expand(item, slot)]

    def _value(self, node: Any) -> Chunks:
        found = self.lists.get(node.list_name, {})
        if "range" in found:
            limits = found["range"]
            return [(str(self.rng.randint(limits["from"], limits["to"])), None)]
        if not found.get("values"):
            raise _Missing(node.list_name)
        value = self.rng.choice(found["values"])
        return self._expand(
            self._expression(value["in"] if isinstance(value, dict) else value), None
        )


def tidy(chunks: Chunks) -> Chunks:
    """Remove doubled spaces, which optional words leave between the pieces."""
    tidied: Chunks = []
    ends_in_space = True
    for text, slot in chunks:
        words = " ".join(text.split())
        lead = " " if text[:1].isspace() and not ends_in_space else ""
        trail = " " if words and text[-1:].isspace() else ""
        if lead + words + trail:
            tidied += [(lead, None)] if lead and slot else []
            tidied.append(((words if slot else lead + words) + ("" if slot else trail), slot))
            tidied += [(trail, None)] if trail and slot else []
            ends_in_space = (lead + words + trail).endswith(" ")
    return tidied


def read_home_assistant(language: str, per_intent: int, seed: int) -> list[Utterance]:
    """Draw up to `per_intent` different utterances of each intent.

    Raises:
        ValueError: a package is missing, or has no such language.
    """
    try:
        import hassil  # noqa: F401

        folder = resources.files("home_assistant_intents") / "data"
    except ImportError as exc:
        what = "must be installed; pip install hassil home-assistant-intents"
        raise ValueError(f"{exc}: {what}") from exc
    path = folder / f"{language}.json"
    if not path.is_file():
        raise ValueError(f"--source {language}: must be a language of {folder}, such as en")
    data = json.loads(path.read_text("utf-8"))
    sampler = Sampler(data, random.Random(seed))
    utterances = []
    left_out = total = 0
    for intent, entry in data["intents"].items():
        templates = [text for block in entry["data"] for text in block["sentences"]]
        usable = [text for text in templates if _is_usable(sampler, text)]
        total, left_out = total + len(templates), left_out + len(templates) - len(usable)
        utterances += _draws(sampler, intent, usable, per_intent)
    print(f"{total:,} templates, of which {left_out:,} need free text and are left out")
    return utterances


def _is_usable(sampler: Sampler, template: str) -> bool:
    """Whether every list that some draw of the template can need has values."""
    try:
        for _ in range(8):
            sampler.draw(template)
    except _Missing:
        return False
    return True


def _draws(sampler: Sampler, intent: str, templates: list[str], count: int) -> list[Utterance]:
    found: dict[str, Utterance] = {}
    for _ in range(count * MAX_TRIES_PER_DRAW if templates else 0):
        template = sampler.rng.choice(templates)
        try:
            chunks = tidy(sampler.draw(template))
            utterance = from_chunks(chunks, intent, f"{intent}: {template}")
        except (_Missing, Malformed):  # a rare list, or a draw without a word
            continue
        found.setdefault(utterance.text.strip(), utterance)
        if len(found) == count:
            break
    return list(found.values())
