"""Turn written text into the form in which it is spoken: lower case, no punctuation, no digits.

`spoken_form` works on one whitespace-separated word at a time, so that
spoken_form(f"{a} {b}") is spoken_form(a) and spoken_form(b) with a space between them. A label of a
written word therefore belongs to all words that it is spoken as. Only English is spoken here; the
letters of other languages are kept."""

import re
import unicodedata
from functools import cache, lru_cache

from num2words import num2words

_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen"}
_SYMBOLS = {
    **_CURRENCIES,
    "%": "percent",
    "&": "and",
    "@": "at",
    "+": "plus",
    "=": "equals",
    "°": "degrees",
    "#": "number",
}
_APOSTROPHES = str.maketrans("\u2019\u2018\u02bc`", "''''")
_DIGITS_ALONE = 16
"""A number of this many digits or more is spoken digit by digit, as one with a leading zero is."""

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
_PARTS = re.compile(
    rf"(?P<currency>[$€£¥])(?P<amount>{_NUMBER})"
    r"|(?P<hour>[0-9]{1,2}):(?P<minute>[0-5][0-9])(?![0-9])"
    r"|(?P<ordinal>[0-9]+)(?:st|nd|rd|th)(?![a-z])"
    r"|(?P<decade>[0-9]{2,4})'?s(?![a-z])"
    rf"|(?P<number>{_NUMBER})"
    r"|(?P<word>[^\W\d_]+(?:'[^\W\d_]+)*)"
    r"|(?P<symbol>[%&@+=°#$€£¥])"
)


def _digits(text: str) -> str:
    return " ".join(num2words(int(digit)) for digit in text)


def _is_spelled(digits: str) -> bool:
    return len(digits) >= _DIGITS_ALONE or (len(digits) > 1 and digits.startswith("0"))


@cache
def _cardinal(text: str) -> str:
    whole, _, fraction = text.replace(",", "").partition(".")
    spoken = _digits(whole) if _is_spelled(whole) else num2words(int(whole))
    return f"{spoken} point {_digits(fraction)}" if fraction else spoken


def _is_year(text: str) -> bool:
    return len(text) == 4 and text.isdecimal() and 1100 <= int(text) < 2100


@cache
def _number(text: str) -> str:
    return num2words(int(text), to="year") if _is_year(text) else _cardinal(text)


def _time(hour: str, minute: str) -> str:
    words = num2words(int(hour))
    if minute == "00":
        return words
    zero = "oh " if minute.startswith("0") else ""
    return f"{words} {zero}{num2words(int(minute))}"


def _money(symbol: str, amount: str) -> str:
    unit = _CURRENCIES[symbol]
    plural = "" if amount == "1" or unit == "yen" else "s"
    return f"{_cardinal(amount)} {unit}{plural}"


def _decade(text: str) -> str:
    words = _number(text)
    return f"{words[:-1]}ies" if words.endswith("y") else f"{words}s"


def _ordinal(text: str) -> str:
    return _digits(text) if _is_spelled(text) else num2words(int(text), to="ordinal")


def _spoken_part(match: re.Match[str]) -> str:
    part = match.groupdict()
    if part["word"]:
        return part["word"]
    if part["symbol"]:
        return _SYMBOLS[part["symbol"]]
    if part["currency"]:
        return _money(part["currency"], part["amount"])
    if part["hour"]:
        return _time(part["hour"], part["minute"])
    if part["ordinal"]:
        return _ordinal(part["ordinal"])
    return _decade(part["decade"]) if part["decade"] else _number(part["number"])


def _ascii_digits(text: str) -> str:
    return "".join(str(unicodedata.decimal(char, char)) for char in text)


@lru_cache(maxsize=4096)
def spoken_form(text: str) -> str:
    """Return a text as it is spoken.

    Lower case; words of letters with one space between them, and apostrophes inside words. Numbers,
    years, decades, ordinals, times, amounts of money and some symbols are written out; every other
    character is left out. Its result is its own spoken form. It is "" where nothing is spoken.
    """
    text = unicodedata.normalize("NFKC", text).lower().translate(_APOSTROPHES)
    text = _ascii_digits(unicodedata.normalize("NFKC", text))
    words = [_spoken_part(match) for match in _PARTS.finditer(text)]
    return " ".join(" ".join(words).replace(",", "").replace("-", " ").split())
