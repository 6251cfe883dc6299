"""A small rule-based assistant: it turns an intent and slots into an action in an SQLite catalogue.

simulate_assistant.py calls it. A rule says which slots of an intent an action depends on, and which
column of the action each fills. A value is looked up in the catalogue, or kept as text where it is
no thing (times, numbers). What the action depends on is thus less than the whole frame: "a" before
a name, or a city taken for a state, changes nothing here.
"""

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from labels import Tagged

_SCHEMA = """
CREATE TABLE things (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL,
                     UNIQUE (kind, name));
CREATE TABLE words (thing INTEGER NOT NULL REFERENCES things, word TEXT NOT NULL);
CREATE INDEX words_by_word ON words (word);
CREATE TABLE actions (id INTEGER PRIMARY KEY, operation TEXT NOT NULL);
CREATE TABLE arguments (action INTEGER NOT NULL REFERENCES actions, name TEXT NOT NULL,
                        thing INTEGER REFERENCES things, text TEXT);
"""
# A value that no thing has exactly is taken for the one with the most words in common, if these are
# at least this share of all words of the two. Articles do not count, unless there is nothing else.
MIN_OVERLAP = 0.5
_ARTICLES = {"the", "a", "an"}
# Words in front of a time or a number that do not change it.
_LEADING = {"in", "on", "at", "for", "the", "a", "an", "around", "of", "this"}


@dataclass(frozen=True)
class Rule:
    """How an intent is fulfilled.

    Attributes:
        operation: what is done.
        columns: the slots that the action depends on, with the column that each fills.
    """

    operation: str
    columns: Mapping[str, str]


# The columns that hold text, and no thing of the catalogue.
TEXTS = {"time", "rating", "party", "year"}
_PLACE = dict.fromkeys(
    ("city", "state", "country", "geographic_poi", "current_location", "poi"), "place"
)
_TIME = {"timeRange": "time"}
# SNIPS's intents. Slots that are not here, such as music_item, spatial_relation or playlist_owner,
# are not needed to do what is asked.
RULES = {
    "AddToPlaylist": Rule(
        "add", {"playlist": "playlist", "artist": "artist", "entity_name": "work"}
    ),
    "BookRestaurant": Rule(
        "book",
        {
            "restaurant_name": "restaurant",
            "restaurant_type": "type",
            "cuisine": "food",
            "served_dish": "food",
            "party_size_number": "party",
            "party_size_description": "party",
            **_PLACE,
            **_TIME,
        },
    ),
    "GetWeather": Rule(
        "forecast",
        {
            "condition_temperature": "condition",
            "condition_description": "condition",
            **_PLACE,
            **_TIME,
        },
    ),
    "PlayMusic": Rule(
        "play",
        {
            "artist": "artist",
            "track": "work",
            "album": "work",
            "playlist": "playlist",
            "genre": "genre",
            "service": "service",
            "year": "year",
        },
    ),
    "RateBook": Rule(
        "rate", {"object_name": "work", "object_select": "which", "rating_value": "rating"}
    ),
    "SearchCreativeWork": Rule("search", {"object_name": "work", "object_type": "type"}),
    "SearchScreeningEvent": Rule(
        "screenings",
        {
            "movie_name": "work",
            "location_name": "cinema",
            "object_location_type": "cinema",
            **_TIME,
        },
    ),
}


def content_words(name: str) -> set[str]:
    """Return the words of a name without articles, unless there is nothing else."""
    words = set(name.split())
    return words - _ARTICLES or words


def rule_of(intent: str, slot_names: Iterable[str]) -> Rule:
    """Return an intent's rule; one that is not SNIPS's depends on all its slots."""
    return RULES.get(intent) or Rule(intent, {name: name for name in slot_names})


Effect = tuple[str, frozenset[tuple[str, int | None, str | None]]]


class Assistant:
    """Does actions in a catalogue, and says what each has done.

    Args:
        path: of the SQLite file that `create` wrote; ":memory:" for an empty one.
    """

    def __init__(self, path: Path | str = ":memory:") -> None:
        self.database = sqlite3.connect(path)
        if path == ":memory:":
            self.database.executescript(_SCHEMA)

    @classmethod
    def create(cls, path: Path, utterances: Iterable[Tagged]) -> "Assistant":
        """Write a catalogue of the things that labelled utterances ask for."""
        path.unlink(missing_ok=True)
        assistant = cls(path)
        assistant.database.executescript(_SCHEMA)
        for each in utterances:
            columns = rule_of(each.intent, (name for name, *_ in each.spans)).columns
            for name, start, end in each.spans:
                if name in columns and columns[name] not in TEXTS:
                    assistant.add(columns[name], " ".join(each.words[start:end]))
        assistant.database.commit()
        return assistant

    def add(self, kind: str, name: str) -> None:
        """Put a thing into the catalogue, if it is not there."""
        insert = "INSERT OR IGNORE INTO things (kind, name) VALUES (?, ?)"
        cursor = self.database.execute(insert, (kind, name))
        if cursor.rowcount:
            words = [(cursor.lastrowid, word) for word in content_words(name)]
            self.database.executemany("INSERT INTO words VALUES (?, ?)", words)

    def find(self, kind: str, name: str) -> int | None:
        """Return the thing of this name, or the one that is most like it; None if none is."""
        exact = "SELECT id FROM things WHERE kind = ? AND name = ?"
        if found := self.database.execute(exact, (kind, name)).fetchone():
            return int(found[0])
        words = content_words(name)
        places = ", ".join("?" * len(words))
        like = f"""
            SELECT things.id, things.name, COUNT(*) AS common FROM words
            JOIN things ON things.id = words.thing
            WHERE things.kind = ? AND words.word IN ({places})
            GROUP BY things.id
        """
        scored = [
            (common / len(words | content_words(other)), -number)
            for number, other, common in self.database.execute(like, (kind, *sorted(words)))
        ]
        best = max(scored, default=(0.0, 0))
        return -best[1] if best[0] >= MIN_OVERLAP else None

    def do(self, request: Tagged) -> Effect:
        """Do what an utterance's labels ask for, and return what the database says was done.

        A value that is not in the catalogue stays an argument without a thing and without text.
        """
        rule = rule_of(request.intent, (name for name, *_ in request.spans))
        run = self.database.execute
        action = run("INSERT INTO actions (operation) VALUES (?)", (rule.operation,)).lastrowid
        for name, start, end in request.spans:
            column = rule.columns.get(name)
            if column is not None:
                row = self._argument(column, request.words[start:end])
                run("INSERT INTO arguments VALUES (?, ?, ?, ?)", (action, column, *row))
        arguments = run("SELECT name, thing, text FROM arguments WHERE action = ?", (action,))
        return rule.operation, frozenset(tuple(row) for row in arguments)

    def _argument(self, column: str, words: tuple[str, ...]) -> tuple[int | None, str | None]:
        if column not in TEXTS:
            return self.find(column, " ".join(words)), None
        first = next((i for i, word in enumerate(words) if word not in _LEADING), 0)
        return None, " ".join(words[first:])
