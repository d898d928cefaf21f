"""The packages that serving needs, and that this package does not depend on."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import InvalidArgument

EXTRA = "pip install 'srds-fast[serve]'"


def require(*names: str) -> None:
    """Raise InvalidArgument if one of the packages is not installed. It says how to install them."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InvalidArgument(f"Serving needs {', '.join(missing)}, and it is not installed. Install it: {EXTRA}.")
