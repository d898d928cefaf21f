"""Text tables that can be printed line by line, before the last line is known."""

from __future__ import annotations

from collections.abc import Sequence


class Table:
    """Columns of fixed width, numbers to the right, text to the left.

    Args:
        columns: heading and least width of each column; a negative width sets text to the left.
    """

    def __init__(self, columns: Sequence[tuple[str, int]]) -> None:
        self._headings = [heading for heading, _ in columns]
        self._formats = [f"{'<' if width < 0 else '>'}{max(abs(width), len(heading))}" for heading, width in columns]

    def heading(self) -> str:
        """The line above the others."""
        return self.line(*self._headings)

    def line(self, *cells: object) -> str:
        """One line; None is printed as a dash."""
        texts = ("-" if cell is None else str(cell) for cell in cells)
        return "  ".join(map(format, texts, self._formats)).rstrip()
