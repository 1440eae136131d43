"""CaseOps: capital letters as operators, so that a word and its capitalised form share their tokens.

Runs of ASCII letters, as long as they go, become lower case behind an operator:

    U+E001 (Title)  The -> U+E001 the         U+E003 (the next letter)  iPhone -> i U+E003 phone, McDonald ->
    U+E002 (CAPS)   NASA -> U+E002 nasa                                 U+E001 mc U+E003 donald

U+E004 stands before an operator's character that the text itself holds. An operator costs the model a token and the
text no byte. The published transform, `lossless_caps_caseops_v1` (public pull request 1729), puts the operator between
a space and its word; `before` puts it before the space, so that ` The` keeps the piece `▁the` of the lower-case word.
"""

import re

TITLE, CAPS, NEXT, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"
PLACES = ("after", "piece", "before")  # of an operator: after the space, one piece with it, before it

# A run before a combining mark stays as it is: a normaliser composes j with a caron into one character, J with none.
CASED = re.compile("(?P<space> ?)(?<![A-Za-z])(?P<word>[a-z]*[A-Z][A-Za-z]*)(?![A-Za-z\u0300-\u036f])|[\ue001-\ue004]")
MARKED = re.compile("\ue004([\ue001-\ue004])|([\ue001\ue002])( ?)([A-Za-z]+)|\ue003([A-Za-z])")


def symbols(place: str) -> dict[str, list[str]]:
    """What SentencePiece's trainer has to be told; by these pieces train_gpt.py knows the transform."""
    joined = ["\u2581" + TITLE, "\u2581" + CAPS] if place == "piece" else []
    mark = ["<caseops_before>"] if place == "before" else []  # a piece without a text
    return {"user_defined_symbols": [*OPERATORS, *joined], "control_symbols": mark}


def transform(text: str, place: str) -> str:
    """The text without capitals; it is normalised, with one space between words. `place` is one of PLACES."""

    def replace(found: re.Match) -> str:
        space, word = found["space"], found["word"]
        if word is None:
            return ESCAPE + found[0]
        if len(word) > 1 and word.isupper():
            operator, word = CAPS, word.lower()
        else:
            operator = TITLE if word[0].isupper() else ""
            word = word[0].lower() + re.sub("[A-Z]", lambda capital: NEXT + capital[0].lower(), word[1:])
        return operator + space + word if place == "before" else space + operator + word

    return CASED.sub(replace, text)


def escape(text: str) -> str:
    """The text with its capitals: what a normaliser would change behind the operators."""
    return re.sub(f"[{OPERATORS}]", ESCAPE + r"\g<0>", text)


def restore(text: str) -> str:
    """The text before `transform` (of any place) or `escape`. An operator without its word is left where it stands."""

    def replace(found: re.Match) -> str:
        literal, operator, space, word, letter = found.groups()
        if operator:
            return space + (word.upper() if operator == CAPS else word[0].upper() + word[1:])
        return literal or letter.upper()

    return MARKED.sub(replace, text)
