"""A headline and a table of names and texts below it: as plain text, and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Rows = Sequence[tuple[str, str]]
"""(name, text) of each row; rows that continue the one above have no name."""


def plain(headline: str, rows: Rows) -> str:
    """Lines of text, the names in a column."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([headline, *(f"{name:<{width}}  {text}" for name, text in rows)])


def html(headline: str, rows: Rows) -> str:
    """The same as a table that needs nothing from elsewhere: every text is escaped, and nothing is loaded."""
    left = 'style="text-align: left; vertical-align: top"'
    cells = "".join(f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(text)}</td></tr>" for name, text in rows)
    return f"<div><strong>{escape(headline)}</strong><table><tbody>{cells}</tbody></table></div>"
