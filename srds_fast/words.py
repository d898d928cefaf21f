"""Words for numbers, in messages, reports and tables: counts with their noun, and durations."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """1 image, 2 images, 1,000 images. plural: of a noun that takes more than an "s"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def duration(seconds: float) -> str:
    """A time with a unit that suits it: 70.5 s, 0.41 s, 37.2 ms."""
    if seconds >= 9.95:
        return f"{seconds:,.1f} s"
    return f"{seconds:.2f} s" if seconds >= 0.0995 else f"{1e3 * seconds:.3g} ms"
