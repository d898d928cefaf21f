from __future__ import annotations

import pytest
from tape import Tape


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The graphs that are replayed, in order."""
    launched: list[Tape] = []
    replay = Tape.replay

    def counted(self: Tape) -> None:
        launched.append(self)
        replay(self)

    monkeypatch.setattr(Tape, "replay", counted)
    return launched
