"""Profiling ranges: NVTX for Nsight, a Chrome trace for everybody else, totals per phase for the report.

    call > encode | trace | plan | iteration p > wave k > network | wave_update | checkpoint | record | explore | decode

- call: one call of a compiled pipeline, or of `sample`. It holds all others.
- encode, decode: the pipeline's own code before and after its loop.
- trace: the first turn of the pipeline's loop. Where nothing is known of the loop, it holds network calls.
- plan: choosing what to run, including the network calls that measure costs, and making tables and memory for it.
- iteration p: the waves up to checkpoint p. For SRDS, iteration 0 is the coarse sweep. A method with a sliding window
  has one iteration; its checkpoint gives the number of sweeps. A run that starts again (after a callback that changed
  something, or after a run that did not settle) counts from the first iteration again.
- wave k: its category is "coarse", "fine" or "mixed", its payload the number of rows.
- network: one network call; payload: rows. Where coarse rows run on a stream of their own (`overlap="streams"`), the
  wave has two ranges, "coarse" and "fine", each around its own network call.
- wave_update: the solver's work between two network calls, for every method. One more comes before the first wave.
- checkpoint: the decision to stop; waits for the device. Payload: the iteration.
- record: graphs are recorded, for later calls or for the rest of this one. It holds the ranges of the recorded waves.
- explore: other plans are run, to time them; their ranges are left out.
- stock: the pipeline's own loop, instead of all others, where a call cannot be accelerated.

Replaying a graph runs no Python code: there an iteration holds one "replay p" for each launch (payload: number of
waves) and "checkpoint". If the next launch comes before the decision to stop, the first replay of an iteration lies in
the range of the iteration before. To find the wave of a graph's node, look at "record": the node was made in the range
of its wave.

A Chrome trace has neither categories nor payloads: there the names tell them, "wave 3 (fine, 6 rows)".

While nobody profiles, a wave pays for one question: is a watched call open in this thread?
"""

from .ranges import Timeline as Timeline
from .ranges import call as call
from .ranges import of_wave as of_wave
from .ranges import phase as phase
from .ranges import ranged as ranged
from .ranges import recording as recording
from .ranges import span as span
from .ranges import unseen as unseen
from .watch import profile as profile
from .watch import profile_as as profile_as
