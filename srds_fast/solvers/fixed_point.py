"""Fixed-point methods: every point of the grid is refined in every wave. ParaTAA, ParaDiGMS, collocation.

    x_{i+1}^new = f_i(x_i^old) + c_i (x_i^new - x_i^old)

f_i is the scheduler's step, c_i how it responds to the state it departs from (`grid.responses`). At a point that is no
row of the wave, the network's output is what was known before, moved with the point and corrected by what is learnt at
the rows around. Triangular Anderson acceleration (Tang et al. 2024) mixes the iterates. A point is made of points
before it alone, and the first one that is not exact of an exact one and of what the network says there: so in every
wave one more becomes exact, at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.anderson_mix import anderson_mix
from ..methods import FixedPoint, ParaTAA
from ..noise import NoiseTable
from ..program import MOST_SPARSE_SWEEPS, Sweeps
from ..steps import Like
from .core import NOTHING, Answer, Checkpoint, Core, Evaluate, Extras, output_of, samples_of
from .grid import Nodes, grid_of

# that look back at more than the newest difference, where all points are rows; nodes, which say something else from
# wave to wave, are mixed so as long as they are few
MIXINGS_OF_ALL = 5


def fixed_point(
    x: Tensor,
    noise: NoiseTable,
    program: Sweeps,
    options: FixedPoint,
    extras: Extras = NOTHING,
    *,
    watch_bits: bool = False,
) -> Core:
    """Sweeps over the grid with a whole sample after each; with a window, one at the end.

    Args:
        x: starting noise, [batch, ...]; its dtype is the dtype of the state.
        noise: table of N steps.
        program: `program.fixed_point(N, ...)`, or `program.windows(N, ...)` for options with a window.
        options: of the method.
        extras: noise of stochastic steps, constraint, trajectory, a first guess, history, the network's wishes.
        watch_bits: fill `Checkpoint.still`.
    """
    points = Points(x, noise, program, options, extras)
    if options.window is not None:
        return (yield from _sliding(points, program, options, watch_bits))
    result = torch.empty_like(x)
    for number, wave in enumerate(program):
        points.take((yield points.evaluate(number)))
        if not wave.boundaries:  # a part of a wave that was too wide
            continue
        before = points.x
        points.sweep()
        points.record()
        iteration, samples = wave.boundaries[0].iteration, points.samples
        moved = points.x - before
        still = None
        if watch_bits:
            still = (moved == 0).flatten(2).all(2).all(0)
            if not points.complete:  # what is interpolated may move as long as it is
                still = torch.zeros_like(still)
        # of the point that moved most: where samples part, the last one may rest for waves while those before it turn
        change = (points.grid.weight * moved.abs().flatten(2).mean(2)).amax(0)
        exact = iteration == program.num_steps
        sample = points.x[-1].clone()
        running = samples_of((yield Checkpoint(iteration, sample, samples, change, exact, still)), samples)
        if len(samples) == len(result):
            result.copy_(sample)
        else:
            result[list(samples)] = sample
        if number + 1 == len(program) or not running:
            return result
        points.keep(running)
    raise AssertionError("a program ends with a checkpoint")


def _sliding(points: Points, program: Sweeps, options: FixedPoint, bits_only: bool) -> Core:
    """The window begins at the first step that is not finished: the host waits for its errors after every wave."""
    assert options.step_tolerance is not None
    parataa = isinstance(options, ParaTAA)
    spread = points.grid.variance.clamp(min=0).sqrt()
    # ParaDiGMS holds a point against the step that departs from it
    spread = spread if parataa else torch.cat([spread[1:], spread.new_zeros(1)])
    bound = (0.0 if bits_only else options.step_tolerance) * (spread.clamp(min=1.0) if parataa else spread)
    first = sweeps = 0
    while first < program.num_steps:
        sweeps += 1
        points.take((yield points.evaluate(first)))
        before = points.x
        error = points.sweep()
        last = first + len(error)
        # what is not a number is within no bound
        within = [*(error.double().cpu() <= bound[first:last, None]).all(1).tolist(), False]
        finished = within.index(False)
        if parataa:
            # residuals are those of the points before the sweep, which may have made some of them larger
            points.put_back(before, first, finished)
        points.record()
        # a point that moved too far was still made of steps that had finished; a residual belongs to its own step
        first = min(last, first + (max(1, finished) if parataa else finished + 1))
        if first < program.num_steps:
            points.enter(last, program.positions[first][-1] + 1)
    sample = points.x[-1].clone()
    yield Checkpoint(sweeps, sample, points.samples, None, exact=False, settled=True)
    return sample


class Points:
    """The points of the grid, and what is known of each.

    Args:
        as of `fixed_point`.

    Attributes:
        x: [N + 1, samples, ...].
        samples: which samples of the original batch still run, in order.
        complete: every point from the first row of the last wave on was a row of it.
        grid: what is known of the grid.
    """

    def __init__(self, x: Tensor, noise: NoiseTable, program: Sweeps, options: FixedPoint, extras: Extras) -> None:
        self.samples = tuple(range(len(x)))
        self.complete = False
        self.grid = grid_of(noise, program, options, Like.of(x), scaled=extras.scaled)
        self._program, self._options, self._extras, self._clip = program, options, extras, noise.clip
        self._number = 0
        self._got: list[Tensor] = []
        self._draws, self._x0_prev = extras.draws, extras.x0_prev
        guess = None if extras.guess is None else extras.guess.to(x)
        if guess is None:
            self.x = self.grid.growth * x.contiguous()  # as the kernels want it
        else:
            self.x = torch.cat([x[None], guess[1:]]).contiguous()
        self._m = torch.zeros_like(self.x[1:])
        self._at = torch.zeros_like(self._m)  # the states that it belongs to
        if guess is not None and self.grid.momentum is None:
            added = None if self.grid.spread is None or self._draws is None else self.grid.spread * self._draws
            # from its own starting noise on: no output leads from another's to its first point
            outputs = self.grid.scan.outputs(guess, added)
            if outputs is not None:
                self._m, self._at = outputs, guess[:-1]
        self._before: tuple[Tensor, Tensor, int] | None = None
        self._history: list[tuple[Tensor, Tensor]] = []
        self._mixings = 0
        self._longest = MIXINGS_OF_ALL if options.num_nodes is None else MOST_SPARSE_SWEEPS

    def evaluate(self, number: int) -> Evaluate:
        """Wave `number`."""
        self._number = number
        index, network = self.grid.rows[number], self._extras.network
        rows = self.x.index_select(0, index)
        if self.grid.input_scale is not None:
            rows = rows * self.grid.input_scale.index_select(0, index)
        given = network.empty(len(index), self.x[0])
        given.unflatten(0, (network.branches, -1)).copy_(rows[None])
        return Evaluate(given, self._program.positions[number], self.samples, number)

    def take(self, answer: Answer) -> None:
        """The network's output at the wave evaluated last; a sweep uses all that was taken since the one before."""
        m = output_of(answer).to(self.x.dtype)
        guidance = self._extras.guidance
        if guidance is not None:
            branches = m.unflatten(0, (len(guidance), -1))
            m = guidance[0] * branches[0]
            for weight, branch in zip(guidance[1:], branches[1:], strict=True):
                m = m + weight * branch
        self._got.append(m)

    def sweep(self) -> Tensor:
        """Move the points behind the first row, to the end of the grid or of the window.

        Returns:
            root mean squares over a state's elements, [points, samples]: for ParaTAA with a window of each step's
            residual before the sweep, otherwise of what each point was moved by.
        """
        nodes = self.grid.nodes[self._number]
        self.complete = nodes.weights is None
        first, last = nodes.first, nodes.last + 1 if self.complete else len(self._m)
        self._learn(nodes)
        y, m, added = self.x[first : last + 1], self._m[first:last], self._added(first, last)
        points, squared_error = self.grid.scan(y, m, first, added)
        if self._extras.constrain is not None:
            points = self._constrained(points, first)
            squared_error = _summed_squares(points - y[1:])
        if self._options.window is not None and isinstance(self._options, ParaTAA):
            stepped = self._constrained(self.grid.scan.stepped(y, m, first, added), first)
            squared_error = _summed_squares(stepped - y[1:])
        if self._options.history:
            # an affine combination of points that are constrained is, too
            points = self._mixed(points, first, last)
        self.x = torch.cat([self.x[: first + 1], points, self.x[last + 1 :]])
        error: Tensor = (squared_error / y[0, 0].numel()).sqrt()
        return error

    def put_back(self, before: Tensor, first: int, count: int) -> None:
        """So many points behind `first` as they were before the sweep."""
        last = first + count
        self.x = torch.cat([self.x[: first + 1], before[first + 1 : last + 1], self.x[last + 1 :]])

    def record(self) -> None:
        """Tell the trajectory what the wave evaluated last has come to."""
        trajectory, nodes = self._extras.trajectory, self.grid.nodes[self._number]
        if trajectory is None:
            return
        for step in range(nodes.first, nodes.last + 1):
            trajectory.record(step + 1, self.x[step + 1], self.samples)
            trajectory.record_x0(step, self._x0(step, step + 1)[0], self.samples)

    def enter(self, last: int, stop: int) -> None:
        """Points behind `last` up to `stop` enter the window: where the last one before them is, as the guess goes.

        Those of a related sample are where it has them.
        """
        if stop > last and self._extras.guess is None:
            way = self.grid.growth[last + 1 : stop + 1] / self.grid.growth[last]
            self.x = torch.cat([self.x[: last + 1], way * self.x[last], self.x[stop + 1 :]])

    def keep(self, running: tuple[int, ...]) -> None:
        """Go on with these positions of the samples only."""
        if len(running) == len(self.samples):
            return
        self.samples = tuple(self.samples[position] for position in running)
        index = torch.tensor(running, device=self.x.device)

        def of(tensor: Tensor) -> Tensor:
            return tensor.index_select(1, index)

        self.x, self._m, self._at = of(self.x), of(self._m), of(self._at)
        self._draws = None if self._draws is None else of(self._draws)
        self._x0_prev = None if self._x0_prev is None else self._x0_prev.index_select(0, index)
        self._before = None if self._before is None else (of(self._before[0]), of(self._before[1]), self._before[2])
        self._history = [(of(dx), of(dr)) for dx, dr in self._history]

    def _learn(self, nodes: Nodes) -> None:
        """The network's output, at the rows and between them."""
        got = self._got[0] if len(self._got) == 1 else torch.cat(self._got)
        self._got.clear()
        if nodes.weights is None:
            self._m = torch.cat([self._m[: nodes.first], got, self._m[nodes.last + 1 :]])
        else:
            expected = self._m + self.grid.response * (self.x[:-1] - self._at)
            surprise = (got - expected.index_select(0, nodes.positions)).flatten(1)
            learnt = (nodes.weights @ surprise).view_as(expected[nodes.first :])
            self._m = torch.cat([expected[: nodes.first], expected[nodes.first :] + learnt])
            self._m.index_copy_(0, nodes.positions, got)
        self._at = self.x[:-1]

    def _added(self, first: int, last: int) -> Tensor | None:
        """What steps add beside what they make of x and x0: fresh noise, and momentum."""
        added = None
        if self.grid.spread is not None:
            assert self._draws is not None
            added = self.grid.spread[first:last] * self._draws[first:last]
        if self.grid.momentum is not None:
            x0 = self._x0(max(0, first - 1), last)
            if first == 0:
                x0 = torch.cat([x0[:1] if self._x0_prev is None else self._x0_prev[None], x0])
            momentum = self.grid.momentum[first:last] * x0.diff(dim=0)
            added = momentum if added is None else added + momentum
        return added

    def _constrained(self, points: Tensor, first: int) -> Tensor:
        """The points behind `first` with what holds for every state."""
        constrain = self._extras.constrain
        if constrain is None:
            return points
        return torch.stack([constrain(each, first + 1 + i, self.samples) for i, each in enumerate(points)])

    def _x0(self, first: int, last: int) -> Tensor:
        """Predicted at the points from `first` to before `last`."""
        x0 = self.grid.p[first:last] * self._at[first:last] + self.grid.q[first:last] * self._m[first:last]
        return x0 if self._clip is None else x0.clamp(-self._clip, self._clip)

    def _mixed(self, points: Tensor, first: int, last: int) -> Tensor:
        """What triangular Anderson acceleration makes of the points of this sweep and those before."""
        x, window = self.x, slice(first + 1, last + 1)
        residual = points - x[window]
        whole = torch.cat([torch.zeros_like(x[: first + 1]), residual, torch.zeros_like(x[last + 1 :])])
        if self._before is not None:
            dx, dr = x - self._before[0], whole - self._before[1]
            entered = self._before[2] + 1  # points that have no residual before this one
            if entered <= last:
                dx[entered:], dr[entered:] = 0.0, 0.0
            # an old difference misleads where a sample has turned since: what has not settled goes by the newest alone
            self._mixings += 1
            length = self._options.history if self._mixings < self._longest else 1
            self._history = [*self._history, (dx, dr)][-length:]
        self._before = x, whole, last
        if not self._history:
            return points
        dx, dr = (torch.stack([each[window] for each in of_kind]) for of_kind in zip(*self._history, strict=True))
        mixed: Tensor = anderson_mix(x[window], residual, dx, dr, regularisation=self._options.regularisation)
        # exact if the one before is, to the bit: x + (f - x) would round, and give back nothing where x is not finite
        mixed[0] = points[0]
        return mixed


def _summed_squares(difference: Tensor) -> Tensor:
    """Over the elements of a state, [points, samples]."""
    return difference.square().flatten(2).sum(2)
