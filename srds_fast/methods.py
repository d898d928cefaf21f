"""The methods by name, and what of each can be chosen."""

from __future__ import annotations

from .solvers.chords.options import Chords as Chords
from .solvers.fixed_point.options import Collocation as Collocation
from .solvers.fixed_point.options import FixedPoint as FixedPoint
from .solvers.fixed_point.options import ParaDiGMS as ParaDiGMS
from .solvers.fixed_point.options import ParaTAA as ParaTAA
from .solvers.method import Method as Method
from .solvers.parasolver import ParaSolver as ParaSolver
from .solvers.registry import METHODS as METHODS
from .solvers.sequential import Sequential as Sequential
from .solvers.srds import SRDS as SRDS

Options = Method
