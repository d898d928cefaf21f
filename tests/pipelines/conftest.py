from __future__ import annotations

from typing import Any

import pytest
import tiny


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny.stable_diffusion()
