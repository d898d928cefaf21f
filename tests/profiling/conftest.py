from __future__ import annotations

import sys
from pathlib import Path

# bench and profiling are not installed
sys.path.insert(0, str(Path(__file__).parents[2]))
