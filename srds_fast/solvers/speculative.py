"""Speculative sampling of steps that add noise (De Bortoli et al., arXiv:2501.05370; Hu et al., arXiv:2505.03983).

Such a step is a draw from a Gaussian, x' ~ N(f(x, m), s^2), m the network's output at x. A window of steps is drafted
with a guess of m, x' ~ N(g, s^2). One wave evaluates the network at all points of the draft. Then the steps are judged
in order. A drafted x' is accepted with probability min(1, N(x'; f, s^2) / N(x'; g, s^2)). The first one that is not is
replaced by f + s z', where z' is its noise reflected in the hyperplane between g and f. That is the maximal coupling of
the two Gaussians: x' has exactly the law N(f, s^2), and the draft is kept as often as any rule can keep it. The window
then begins behind the replaced step. So a sample has the law of the sequential sampler's. It is not its sample: the
same seed gives another one, and no error is estimated.

The guess of x0 at step j is h + J (x - y): the network predicted h at y when step j was evaluated last, also in a draft
that was rejected. J is how x0 of Gaussian data responds to the state. Where step j was never evaluated, the x0 of the
step before is held constant.

Why the law is exact: each step has one noise z_j and one number u_j that decides, drawn before the first wave. What the
draft of step j is made of, evaluations at steps up to j and how far the windows before it slid, depends on the z and u
of earlier steps alone. An evaluation at a later step has seen z_j: a draft that used it would be biased.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..caches import cached
from ..errors import InvalidArgument
from ..kernels.common.clamping import clamped
from ..kernels.common.network_input import guided
from ..schedulers.steps import TensorSpec, fine_step
from ..schedulers.table import NoiseTable
from .checks import check_positive, check_whole
from .contract import Checkpoint, Core, Evaluate, Parts, SolverInputs
from .fixed_point.grid import responses, usual_std
from .fixed_point.program import windows
from .method import SAME_LAW, Method, Stopping, Target
from .program import Program

# elements of the noise of each step that the numbers which decide are made of
HEAD = 4
# waves of a run: those of N steps in full windows, and so many more; and its rows, in steps: on trained networks
WAVES_MORE, ROWS_OF_A_STEP = 6, 1.5


@dataclass(frozen=True)
class Speculative(Method):
    """Speculative sampling: drafted steps are evaluated in one wave, and accepted or replaced. Same law, other sample.

    Attributes:
        window: steps that are drafted at a time, at most.
        data_std: standard deviation of the Gaussian data by whose response evaluations are moved to other states.
            "auto": that of the data given the condition, about, 0.6, or 0.3 of the bound where the scheduler clips x0.
    """

    name: ClassVar[str] = "speculative"
    about: ClassVar[str] = "drafts 16 steps and keeps those that fit: same law, not the same sample"
    promise: ClassVar[str] = SAME_LAW
    first_iteration: ClassVar[int] = 1
    window: int = 16
    data_std: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_whole("window", self.window, 1)
        check_positive("data_std", self.data_std, infinite=True, word="auto")

    def check(self, target: Target) -> None:
        super().check(target)
        if target.bitwise:
            asked = "exact=True" if target.exact else "tolerance=0"
            raise InvalidArgument(
                f"{asked} was given together with method={self.name!r}. It asks for the sample of the sequential "
                "sampler, and this method gives another one of the same law. Leave it out, or pass another method."
            )

    def why_not(self, noise: NoiseTable) -> str | None:
        if noise.spread is None:
            return "its steps add no noise (those of DDIM do with eta above 0)"
        if noise.learned is not None:
            return "the network also predicts how much noise its steps add"
        if noise.memory is not None:
            return "its steps depend on more of the steps before than their last x0"
        if noise.step_noise is not None:
            return "its steps draw noise in a way of their own, which may not be new in every step"
        return None

    def most_iterations(self, target: Target) -> int:
        return target.num_steps

    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        return windows(num_steps, min(self.window, num_steps))

    def widths(
        self, num_steps: int, iteration: int, max_iterations: int, *, max_rows: int | None, bitwise: bool
    ) -> list[int]:
        rows = math.ceil(ROWS_OF_A_STEP * num_steps / iteration)
        return [min(self.window, num_steps, rows)] * iteration

    def rows(self, num_steps: int, max_iterations: int) -> int:
        return num_steps * min(self.window, num_steps)

    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        return speculative(x, noise, program, self, inputs)

    @property
    def slides(self) -> bool:
        return True

    def candidates(self, target: Target, *, calibrated: bool) -> Iterator[Method]:
        if target.stochastic and target.same_law and target.leaves_choice and not calibrated:
            yield self

    def expected_iterations(self, stopping: Stopping) -> tuple[int, ...]:
        return (min(stopping.max_iterations, -(-stopping.num_steps // self.window) + WAVES_MORE),)

    def words(self) -> list[str]:
        return [f"window {self.window}"]


def speculative(x: Tensor, noise: NoiseTable, program: Program, options: Speculative, inputs: SolverInputs) -> Core:
    """Run a program of `windows`; one checkpoint, the samples. Its iterations are the windows of the slowest sample."""
    drafts = Drafts(x, noise, program, options, inputs)
    rounds = 0
    while drafts.running:
        rounds += 1
        parts, waves = Parts(), drafts.waves()
        for number, wave in enumerate(waves, start=1):
            parts.take((yield wave), last=number == len(waves))
        drafts.judge(parts.joined(inputs.branches))
    yield Checkpoint(rounds, drafts.x, drafts.samples, None, exact=False)
    return drafts.x


def log_ratio(drafted: Tensor, mean: Tensor, std: Tensor, z: Tensor) -> Tensor:
    """log N(x; mean, std^2) / N(x; drafted, std^2) at x = drafted + std z, [rows, samples] float64.

    drafted, mean, z: [rows, samples, ...]; std: [rows, samples or 1, 1, ...]. Where std is 0, x is `mean` or nothing.
    """
    away = drafted - mean
    product, square = _inner(z, away), _inner(away, away)
    size = std.flatten(2)[..., 0].double()
    found = -(product / size + square / (2 * size.square()))
    return torch.where(size > 0, found, torch.where(square == 0, 0.0, -torch.inf))


def reflected(z: Tensor, away: Tensor) -> Tensor:
    """z - 2 e <e, z> with e = away / |away|: noise of a rejected draft, [samples, ...]. away: drafted - mean, not 0."""
    share = _inner(z[None], away[None])[0] / _inner(away[None], away[None])[0]
    return z - 2 * share.to(z.dtype).view(-1, *[1] * (z.ndim - 1)) * away


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products over the elements, [rows, samples] float64."""
    return (left * right).flatten(2).sum(2, dtype=torch.float64)


def uniforms(draws: Tensor) -> Tensor:
    """The numbers that decide whether drafts are accepted, [samples, N] float64 on the CPU, between 0 and 1.

    They are a hash of each sample's own noise, draws [N, samples, ...]. So the generator of the call ends where it ends
    in the stock loop, and a sample is the same whatever else is in its batch.
    """
    heads, steps = draws.flatten(2)[..., :HEAD].transpose(0, 1).contiguous().cpu(), len(draws)
    digests = (hashlib.shake_128(head.numpy().tobytes()).digest(8 * steps) for head in heads)
    whole = torch.stack([torch.frombuffer(bytearray(each), dtype=torch.int64) for each in digests])
    return ((whole & (2**53 - 1)).double() + 0.5) * 2.0**-53


class Coefficients(NamedTuple):
    """Of steps, [rows, samples or 1, 1, ...] each, or of all steps, [N, 1, ...].

    a, b, c, d: as of `fine_step`. response: of x0 to the state, for Gaussian data. of_x, of_x0: a and b of the same
    step with an x0 that is not clamped in the place of the network's output.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    p: Tensor
    q: Tensor
    spread: Tensor
    input_scale: Tensor
    response: Tensor
    of_x: Tensor
    of_x0: Tensor


@cached
def _table(noise: NoiseTable, data_std: float, spec: TensorSpec) -> Tensor:
    """The coefficients of all steps, [N, columns, 1, ...], for states like these."""
    steps = torch.tensor([fine_step(noise, step) for step in range(noise.num_steps)], dtype=torch.float64, device="cpu")
    a, b, c, d = steps.unbind(1)
    response, _ = responses(noise, data_std)
    assert noise.spread is not None
    ours = noise.p, noise.q, noise.spread, noise.input_scale, response, a - b * noise.p / noise.q, b / noise.q
    columns = spec._replace(ndim=spec.ndim - 1)  # without the dimension of the samples
    return torch.stack([columns.column(each) for each in Coefficients(a, b, c, d, *ours)], 1)


class Drafts:
    """The drafts of one run. Each sample has a window of its own; none leaves the batch before the others.

    Attributes:
        samples: of the batch, all.
        x: [samples, ...], where their windows begin.
    """

    def __init__(
        self, x: Tensor, noise: NoiseTable, program: Program, options: Speculative, inputs: SolverInputs
    ) -> None:
        assert inputs.draws is not None
        self.samples, self.x = tuple(range(len(x))), x
        self._noise, self._program, self._inputs, self._most = noise, program, inputs, options.window
        data_std = usual_std(noise) if options.data_std == "auto" else options.data_std
        self._table = _table(noise, data_std, TensorSpec.of(x))
        self._draws, self._log_u = inputs.draws, uniforms(inputs.draws).log()
        # waves by the step that their window begins at; the first one where a window is cut into several
        self._numbers = {wave.rows[0].iteration: number for number, wave in reversed(list(enumerate(program)))}
        # all samples at the same steps: a constraint is given one position, and a turn of a loop has one step
        self._together = inputs.together or inputs.constrain is not None
        # as predicted in the step before; None: there is none
        self._x0 = inputs.carried[0] if inputs.carried is not None and len(inputs.carried) else None
        # of each sample, on the CPU: steps that are done, and how many are drafted next
        self._done = torch.zeros(len(x), dtype=torch.int64, device="cpu")
        self._window = torch.full_like(self._done, options.window)
        # x0 - response * state of the newest evaluation at each step that is not done; 0 before the first
        self._intercept = x.new_zeros(min(options.window, noise.num_steps), *x.shape)
        self._known = torch.full_like(self._done, len(self._intercept))  # steps that have one
        self._path: Tensor | None = None  # all states, [N + 1, samples, ...]
        if inputs.trajectory is not None:
            self._path = x.new_zeros(noise.num_steps + 1, *x.shape)
        # the draft of the wave under way
        self._at: Coefficients
        self._z: Tensor  # [rows, samples, ...]
        self._rows: Tensor  # of each sample, on the CPU; 0: it is finished
        self._points: Tensor  # [rows, samples, ...], where steps depart
        self._drafted: Tensor  # [rows - 1, samples, ...], the means of those behind the first

    @property
    def running(self) -> bool:
        """Whether some sample has steps to go."""
        return bool((self._done < self._noise.num_steps).any())

    def waves(self) -> list[Evaluate]:
        """The points of the next draft: one wave, or several if it has more rows than are allowed."""
        first, shifts = int(self._done.min()), None
        if bool((self._done != first).any()):
            shifts = tuple((self._done - first).tolist())
        self._rows = torch.minimum(self._window, self._noise.num_steps - self._done)
        rows = int(self._rows.max())
        self._look_up(first, rows, aligned=shifts is None)
        self._draft(rows)
        points = self._points * self._at.input_scale if self._inputs.scaled else self._points
        number, most, found = self._numbers[first], self._program.peak_rows, []
        for part, begin in enumerate(range(0, rows, most)):
            given = points[begin : begin + most]
            x = self._inputs.network.empty(len(given), given[0])
            x.unflatten(0, (self._inputs.network.branches, -1)).copy_(given[None])
            positions = tuple(range(first + begin, first + begin + len(given)))
            found.append(Evaluate(x, positions, self.samples, number + part, shifts))
        return found

    def _look_up(self, first: int, rows: int, *, aligned: bool) -> None:
        """Coefficients and noise of the rows. A sample with fewer rows than others is given some that do not count."""
        if aligned:
            at, self._z = self._table[first : first + rows, None], self._draws[first : first + rows]
        else:
            steps = self._steps(rows).to(self.x.device)
            at, self._z = self._table[steps], self._draws[steps, torch.arange(len(self.x), device=self.x.device)]
        self._at = Coefficients(*at.unbind(2))

    def _steps(self, rows: int) -> Tensor:
        """Of the rows of each sample, [rows, samples], on the CPU."""
        return (self._done + torch.arange(rows, device="cpu")[:, None]).clamp(max=self._noise.num_steps - 1)

    def _draft(self, rows: int) -> None:
        """Draft the points of the window, one after another."""
        at, clip, momentum = self._at, self._noise.clip, self._noise.momentum is not None
        whole, some = int(self._known.min()), int(self._known.max())
        known = None if whole == some else self._column(self._known)
        points, drafted, x0 = [self.x], list[Tensor](), self._x0
        for row in range(rows - 1):
            x = points[-1]
            if row < some:
                guess = torch.addcmul(self._intercept[row], at.response[row], x)
            if row >= whole:
                assert x0 is not None, "before the first wave all rows have a guess"
                guess = x0 if known is None or row >= some else torch.where(known > row, guess, x0)
            before, x0 = x0, clamped(guess, clip, leading=1)
            mean = at.of_x[row] * x + at.of_x0[row] * guess
            if momentum or clip is not None:
                mean = mean + at.c[row] * x0
            if momentum:
                mean = mean + at.d[row] * (x0 if before is None else before)
            drafted.append(mean)
            points.append(self._arrived(torch.addcmul(mean, at.spread[row], self._z[row]), row + 1))
        self._points = torch.stack(points)
        self._drafted = torch.stack(drafted) if drafted else self._points[:0]

    def judge(self, output: Tensor) -> None:
        """Accept drafts or replace them, by the network's output at their points; the windows slide."""
        at, points, inputs = self._at, self._points, self._inputs
        m = guided(output, inputs.guidance, points.dtype)
        guess = at.p * points + at.q * m
        x0 = clamped(guess, self._noise.clip)
        mean = at.a * points + at.b * m + at.c * x0
        if self._noise.momentum is not None:
            mean = mean + at.d * torch.cat([x0[:1] if self._x0 is None else self._x0[None], x0[:-1]])
        row, accepted = self._judged(log_ratio(self._drafted, mean[:-1], at.spread[:-1], self._z[:-1]).cpu())
        z, replaced = self._of(self._z, row), (row < self._rows - 1) & ~accepted
        if bool(replaced.any()):
            drafted = self._of(self._drafted, row.clamp(max=len(self._drafted) - 1))
            z = torch.where(self._column(replaced), reflected(z, drafted - self._of(mean, row)), z)
        x = self._arrived(torch.addcmul(self._of(mean, row), self._of(at.spread, row), z), int(row[0]) + 1)
        if bool(accepted.any()):
            x = torch.where(self._column(accepted), self._of(points, (row + 1).clamp(max=len(points) - 1)), x)
        finished = self._rows == 0
        if bool(finished.any()):
            x = torch.where(self._column(finished), self.x, x)
        passed = torch.where(finished, 0, row + 1)
        self._slide(passed, x, self._of(x0, row), torch.addcmul(guess, at.response, points, value=-1))

    def _judged(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The last row of each sample, from which its window passes to a new state; whether its draft was accepted.

        ratio: `log_ratio` of the drafts, [rows - 1, samples].
        """
        log_u = self._log_u.gather(1, self._steps(len(ratio)).T).T
        rows = torch.arange(len(ratio), device="cpu")[:, None]
        # behind the last row there is no draft; NaN is never accepted
        accepted = (log_u < ratio) & (rows < self._rows - 1)
        row = accepted.long().cumprod(0).sum(0)
        if self._together:  # those that could go on do not: what decides that is not of their own noise
            row = row.min().expand(len(row))
            if int(row[0]) < len(accepted):
                return row, accepted[row[0]]
        return row, torch.zeros_like(row, dtype=torch.bool)

    def _slide(self, passed: Tensor, x: Tensor, x0: Tensor, intercept: Tensor) -> None:
        """The windows pass so many steps, and begin at x; x0: of the last one. intercept: of all rows."""
        rows, kept = len(intercept), self._intercept
        inside = torch.arange(rows, device="cpu")[:, None] < self._rows
        if not bool(inside.all()):
            intercept = torch.where(self._column(inside), intercept, kept[:rows])
        kept = torch.cat([intercept, kept[rows:]])
        if bool((passed == passed[0]).all()):
            self._intercept = kept.roll(-int(passed[0]), 0)
        else:
            places = (torch.arange(len(kept), device="cpu")[:, None] + passed).clamp(max=len(kept) - 1)
            self._intercept = kept[places.to(x.device), torch.arange(len(x), device=x.device)]
        self._known = (torch.maximum(self._known, self._rows) - passed).clamp(min=0)
        self._window = next_window(passed, self._most)
        before, self._done = self._done, self._done + passed
        self.x, self._x0 = x, x0
        self._record(before, passed)

    def _record(self, before: Tensor, passed: Tensor) -> None:
        """The states that the windows have passed. before: steps that were done."""
        trajectory, path = self._inputs.trajectory, self._path
        if trajectory is None or path is None:
            return
        for sample, (first, count) in enumerate(zip(before.tolist(), passed.tolist(), strict=True)):
            if count:
                path[first + 1 : first + count, sample] = self._points[1:count, sample]
                path[first + count, sample] = self.x[sample]
        for position in range(int(before.min()) + 1, int(self._done.min()) + 1):
            trajectory.record(position, path[position].clone(), self.samples)

    def _of(self, values: Tensor, row: Tensor) -> Tensor:
        """The entries of one row of each sample, [samples or 1, ...]. values: [rows, samples or 1, ...]."""
        if bool((row == row[0]).all()):
            return values[int(row[0])]
        columns = torch.arange(len(row), device=values.device) if values.shape[1] > 1 else 0
        return values[row.to(values.device), columns]

    def _column(self, values: Tensor) -> Tensor:
        """Numbers [..., samples] as a column over the elements of states, on their device."""
        return values.to(self.x.device).view(*values.shape, *[1] * (self.x.ndim - 1))

    def _arrived(self, x: Tensor, row: int) -> Tensor:
        """States that have arrived behind so many rows of their windows."""
        constrain = self._inputs.constrain  # then all samples are at the same step
        return x if constrain is None else constrain(x, int(self._done[0]) + row, self.samples)


def next_window(passed: Tensor, most: int) -> Tensor:
    """Steps to draft next, [samples], by how many the window has just passed.

    Rejected drafts are of use too, so a window shrinks late: half as wide, runs take as many rows in more waves.
    """
    return (3 * passed + 4).clamp(max=most)
