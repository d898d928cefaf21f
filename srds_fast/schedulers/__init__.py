"""Samplers as tables of numbers: what `srds_fast.sample` reads a scheduler as, and takes in the place of one.

`noise_table(scheduler)` reads a diffusers scheduler whose `set_timesteps` has run. `table_of_sigmas(sigmas)` makes the
table of a sampler of k-diffusion. A `NoiseTable` of your own describes any sampler with linear steps.
"""

from .sigmas import PREDICTIONS as PREDICTIONS
from .sigmas import SAMPLERS as SAMPLERS
from .sigmas import table_of_sigmas as table_of_sigmas
from .table import NoiseTable as NoiseTable
from .verify import noise_table as noise_table
