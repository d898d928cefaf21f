"""`python -m srds_fast.cli`, the same as `srds-fast`."""

import sys

from . import main

sys.exit(main())
