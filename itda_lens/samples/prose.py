"""Real English prose that is on every machine: Python's language reference."""

from pydoc_data.topics import topics

HELD_OUT = 8
"""Articles, the last in the alphabet of their titles, that dictionaries are evaluated on."""


def reference_prose() -> tuple[list[str], list[str]]:
    """Articles of the standard library's `pydoc_data.topics`: to build from, and held out."""
    articles = [topics[title] for title in sorted(topics)]
    return articles[:-HELD_OUT], articles[-HELD_OUT:]
