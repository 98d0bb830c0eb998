"""The search: worst violation, two filters, descent, adaptive large neighbourhoods; bounds and optima by HiGHS.

    t(z) = max_k |D_k|,   D = A levels[z] - b,   z_j one of q codes                       (NP-hard; n variables, K constraints)

A *move* adds a known vector to D, so all D' of p first and r second moves are p r sums. What is unusual here: nearly none of
these sums is computed. Filter 1 drops rows that cannot reach t whatever is chosen; filter 2 drops pairs that don't push the
worst rows down, looking at a handful of rows only. Both are safe: what is left holds every pair that lowers t.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

Array = np.ndarray
KINDS = ("swap", "step", "pair")


class Moves(NamedTuple):
    """Steps of single variables: `variable` goes up or down by `by` codes, which adds the rows `add` (`p K`) to D."""

    variable: Int[Array, "p"]
    by: Int[Array, "p"]
    add: Float[Array, "p K"]


@dataclass
class State:
    """Codes `n`, the residual D `K` that is kept up to date with them, and what the filters saw since the search began."""

    z: Int[Array, "n"]
    D: Float[Array, "K"]
    rows: list[float] = field(default_factory=list)  # share of rows that filter 1 dropped, a number for each table of pairs
    pairs: list[float] = field(default_factory=list)  # share of pairs that filter 2 dropped

    @property
    def t(self) -> float:
        """The worst violation."""
        return float(np.abs(self.D).max())

    @property
    def squares(self) -> float:
        return float(self.D @ self.D)

    def copy(self) -> "State":
        return State(self.z.copy(), self.D.copy(), self.rows, self.pairs)


@dataclass(frozen=True)
class Search:
    """How to search.

    moves:      any of "swap" (two variables exchange neighbouring levels), "step" (one goes up or down), "pair" (two do)
    objective:  "max" or, to tell what the maximum is good for, "squares"
    guard:      take only moves that don't raise the sum of squares (the maximum alone over-fits)
    destroy:    share of the variables that an iteration disturbs, at least one
    iterations: of destroy, repair and descent; `seconds` may end them earlier
    top:        how many of the worst rows filter 2 looks at (the paper's k_e); 0 switches both filters off
    gain:       what counts as less, as a share of what was there
    """

    moves: tuple[str, ...] = ("swap",)
    objective: str = "max"
    guard: bool = True
    destroy: float = 0.005
    iterations: int = 100
    seconds: float = float("inf")
    top: int = 100
    gain: float = 1e-6

    def __post_init__(self):
        if self.objective not in ("max", "squares") or not set(self.moves) <= set(KINDS) or not self.moves:
            raise ValueError(f'moves are of {", ".join(KINDS)}, the objective is "max" or "squares"; got {self}')


@dataclass(frozen=True)
class Found:
    """Codes `n`, their worst violation t, a bound that no codes can beat, seconds, iterations; proven: t is the optimum."""

    codes: Int[Array, "n"]
    t: float
    seconds: float
    bound: float = 0.0
    proven: bool = False
    iterations: int = 0


def improving(
    D: Float[Array, "K"], first: Float[Array, "p K"], second: Float[Array, "r K"], below: float, top: int = 100
) -> tuple[Int[Array, "s"], Int[Array, "s"], Int[Array, "u"], int]:
    """Pairs (i, j) with max_k |D_k + first_ik + second_jk| < below, all of them; rows looked at, and pairs left by filter 2.

    below: at most max|D|, so that each pair is an improvement
    Both filters allow for rounding (`tight`, `loose`); what they leave is computed and compared exactly.
    """
    tight, loose = below * (1 - 1e-12), below * (1 + 1e-12)
    high, low = D + first.max(0) + second.max(0), D + first.min(0) + second.min(0)
    rows = np.flatnonzero((high >= tight) | (low <= -tight)) if top else np.arange(len(D))  # filter 1
    worst = rows[np.argsort(-np.abs(D[rows]))[:top]]
    sign, room = np.where(D[worst] < 0, -1.0, 1.0), loose - np.abs(D[worst])
    a, c = first[:, worst] * sign, second[:, worst] * sign
    alive = np.ones((len(a), len(c)), bool)
    for k in range(min(8, len(worst))):  # filter 2: a pair must push the worst row down, the next ones nearly so ...
        alive &= a[:, k, None] + c[:, k] < room[k]
    i, j = np.nonzero(alive)
    for part in (slice(8, 24), slice(24, None)):  # ... and the rest is looked at for the pairs that the first eight left over
        left = (a[i, part] + c[j, part] < room[part]).all(1)
        i, j = i[left], j[left]
    seen = np.empty(len(i))
    for part in range(0, len(i), 2048):
        here, there = (np.ix_(m[part : part + 2048], rows) for m in (i, j))
        seen[part : part + 2048] = np.abs(D[rows] + first[here] + second[there]).max(1, initial=0.0)
    return i[seen < below], j[seen < below], rows, len(i)


class MinMax:
    """min over codes z of max_k |A_k . levels[z] - b_k|.

    A `K n`, b `K`, levels `q` in ascending order, the same for all variables; numpy, kept as float64. Raises ValueError
    for shapes that don't fit and for levels that don't ascend.
    """

    def __init__(self, A: Array, b: Array, levels: Array):  # shapes are checked here, with a sentence
        self.A, self.b, self.levels = (np.ascontiguousarray(x, np.float64) for x in (A, b, levels))
        if self.A.ndim != 2 or self.b.shape != self.A.shape[:1] or self.levels.ndim != 1 or len(self.levels) < 2:
            raise ValueError(f"expected A `K n`, b `K` and two levels or more, got {A.shape}, {b.shape}, {levels.shape}")
        if not (np.diff(self.levels) > 0).all() or not (np.isfinite(self.A).all() and np.isfinite(self.b).all()):
            raise ValueError("levels must ascend, each once, and A and b be finite: sort the levels, look for NaN")
        self.columns = np.ascontiguousarray(self.A.T)

    def nearest(self, x: Float[Array, "n"]) -> Int[Array, "n"]:
        """The codes of the levels nearest to real values: rounding."""
        return np.searchsorted((self.levels[1:] + self.levels[:-1]) / 2, x)

    def state(self, z: Int[Array, "n"]) -> State:
        """A state to search from. Raises ValueError for codes that don't fit."""
        z = np.array(z, np.int64)
        if z.shape != self.A.shape[1:] or z.min() < 0 or z.max() >= len(self.levels):
            wanted = f"{self.A.shape[1]} codes in [0, {len(self.levels)})"
            raise ValueError(f"expected {wanted}, got shape {z.shape}, {z.min()} to {z.max()}")
        return State(z, self.A @ self.levels[z] - self.b)

    # --- moves ------------------------------------------------------------------------------------------------------------

    def moves(self, z: Int[Array, "n"], variable: Int[Array, "p"], by: Int[Array, "p"]) -> Moves:
        step = self.levels[z[variable] + by] - self.levels[z[variable]]
        return Moves(variable, by, self.columns[variable] * step[:, None])

    def tables(self, z: Int[Array, "n"], kinds: Sequence[str]) -> Iterator[tuple[Moves, Moves]]:
        """Tables of pairs of moves, in the order in which they are tried. A single step is a pair with nothing."""
        nothing = Moves(np.array([-1]), np.array([0]), np.zeros((1, len(self.b))))
        up, down = np.flatnonzero(z < len(self.levels) - 1), np.flatnonzero(z > 0)
        if set(kinds) & {"step", "pair"}:
            single = self.moves(z, np.r_[up, down], np.r_[np.ones_like(up), -np.ones_like(down)])
        for kind in kinds:
            if kind != "swap":
                yield single, nothing if kind == "step" else single
                continue
            for level in range(len(self.levels) - 1):
                low, high = np.flatnonzero(z == level), np.flatnonzero(z == level + 1)
                if len(low) and len(high):
                    yield self.moves(z, low, np.ones_like(low)), self.moves(z, high, -np.ones_like(high))

    def best(self, s: State, first: Moves, second: Moves, how: Search) -> tuple[int, int] | None:
        """The pair of moves that lowers the objective most, or None where no pair does."""
        if how.objective == "squares":
            gains = [2 * m.add @ s.D + (m.add**2).sum(1) for m in (first, second)]
            score = gains[0][:, None] + gains[1] + 2 * first.add @ second.add.T
            score[first.variable[:, None] == second.variable] = 0  # a variable moves once
            i, j = np.unravel_index(score.argmin(), score.shape)
            return (int(i), int(j)) if score[i, j] < -how.gain * s.squares else None
        i, j, rows, left = improving(s.D, first.add, second.add, s.t * (1 - how.gain), how.top)
        s.rows.append(1 - len(rows) / len(s.D))
        s.pairs.append(1 - left / (len(first.by) * len(second.by)))
        once = first.variable[i] != second.variable[j]
        i, j = i[once], j[once]
        after = s.D + first.add[i] + second.add[j]
        score = np.abs(after).max(1, initial=0.0)
        if how.guard:
            score[(after**2).sum(1) > s.squares] = np.inf
        at = score.argmin() if len(score) else 0
        return (int(i[at]), int(j[at])) if len(score) and score[at] < np.inf else None

    def descend(self, s: State, how: Search, look: Callable[[State], None] = lambda s: None) -> State:
        """Take the best pair of the first table that has one, and begin again; until no table has one. Changes s."""
        tables = self.tables(s.z, how.moves)
        while (table := next(tables, None)) is not None:
            if (pair := self.best(s, *table, how)) is None:
                continue
            for moves, i in zip(table, pair, strict=True):
                s.z[moves.variable[i]] += moves.by[i]
                s.D += moves.add[i]
            look(s)
            tables = self.tables(s.z, how.moves)
        return s

    # --- adaptive large-neighbourhood search --------------------------------------------------------------------------------

    def random(self, s: State, n: int, top: int, dice: np.random.Generator) -> Int[Array, "d"]:
        """Removal: any n variables."""
        return dice.choice(len(s.z), n, replace=False)

    def worst(self, s: State, n: int, top: int, dice: np.random.Generator) -> Int[Array, "d"]:
        """Removal: variables that push the worst rows hard, drawn with chances in proportion to their score.

            score_j = sum_k |D_k| exp(-0.3 distance_jk) / sum_k |D_k|

        over the `top` worst rows; distance: how many levels j is away from the one that pushes row k hardest.
        """
        rows = np.argsort(-np.abs(s.D))[: top or None]
        share = np.abs(s.D[rows]) @ (self.A[rows] * s.D[rows, None] > 0) / max(np.abs(s.D[rows]).sum(), 1e-300)
        score = share * np.exp(-0.3 * (len(self.levels) - 1 - s.z)) + (1 - share) * np.exp(-0.3 * s.z)
        return dice.choice(len(s.z), n, replace=False, p=score / score.sum())

    def put(self, s: State, j: int, code: int) -> None:
        """Variable j takes a code. Changes s."""
        s.D += self.columns[j] * (self.levels[code] - self.levels[s.z[j]])
        s.z[j] = code

    def scatter(self, s: State, chosen: Int[Array, "d"], dice: np.random.Generator) -> None:
        """Repair: each chosen variable goes one level up, down, or stays. Changes s."""
        by = dice.integers(-1, 2, len(chosen))
        for j, code in zip(chosen.tolist(), (s.z[chosen] + by).clip(0, len(self.levels) - 1).tolist(), strict=True):
            self.put(s, j, code)

    def greedy(self, s: State, chosen: Int[Array, "d"], dice: np.random.Generator) -> None:
        """Repair: each chosen variable goes to the better of its two neighbouring levels, unless t gets worse. Changes s."""
        for j in chosen.tolist():
            near = [code for code in (int(s.z[j]) - 1, int(s.z[j]) + 1) if 0 <= code < len(self.levels)]
            steps = self.levels[near] - self.levels[s.z[j]]
            after = np.abs(s.D + steps[:, None] * self.columns[j]).max(1)
            if after.min() <= s.t:
                self.put(s, j, near[after.argmin()])

    def search(
        self, start: Int[Array, "n"], how: Search, seed: int = 0, look: Callable[[State], None] = lambda s: None
    ) -> Found:
        """Descend, then destroy, repair and descend again; what is better stays. Never worse than the start.

        look: called with the state after each accepted move and iteration (it must not change it)
        Which removal and which repair is drawn by roulette: a weight is 0.7 old + 0.3 score, the score 5 for a new best, 1 for
        a tie, 0.5 for a refusal. (The paper's 2, for better than the current though not the best, can't come up when climbing.)
        """
        dice, began = np.random.default_rng(seed), time.perf_counter()
        value = lambda s: s.t if how.objective == "max" else s.squares
        now, n, i = self.descend(self.state(start), how, look), max(1, round(how.destroy * self.A.shape[1])), 0
        weights = np.ones((2, 2))
        while i < how.iterations and time.perf_counter() - began < how.seconds and now.t > 0:
            remove, repair = (int(dice.random() * w.sum() > w[0]) for w in weights)
            new = now.copy()
            (self.scatter, self.greedy)[repair](new, (self.random, self.worst)[remove](new, n, how.top, dice), dice)
            new = self.descend(new, how)
            less = value(new) < value(now) * (1 - how.gain)
            if less and how.guard and repair == 0:
                less = new.squares <= now.squares
            score = 5.0 if less else 1.0 if value(new) == value(now) else 0.5
            weights[(0, 1), (remove, repair)] = 0.7 * weights[(0, 1), (remove, repair)] + 0.3 * score
            now, i = new if less else now, i + 1
            look(now)
        exact = self.state(now.z)
        return Found(now.z, exact.t, time.perf_counter() - began, iterations=i)

    # --- what can be proved ---------------------------------------------------------------------------------------------------

    def _program(self, unit: float) -> tuple[Array, Array, Array]:
        """Rows M and right sides of -t <= A x - b <= t, for (x, t / unit), and the cost that picks t out."""
        one = -np.ones((len(self.b), 1))
        m = np.block([[self.A / unit, one], [-self.A / unit, one]])
        return m, np.r_[self.b, -self.b] / unit, np.eye(m.shape[1])[-1]

    def relaxed(self) -> tuple[Float[Array, "n"], float]:
        """Real values between the lowest and the highest level with the least t, and that t: no codes can beat it."""
        m, right, cost = self._program(unit := float(np.abs(self.A.sum(1) * self.levels.mean() - self.b).max()) or 1.0)
        ends = [(self.levels[0], self.levels[-1])] * self.A.shape[1] + [(0, None)]
        found = linprog(cost, m, right, bounds=ends, method="highs")
        return found.x[:-1], found.fun * unit

    def exact(self, seconds: float = float("inf"), start: Int[Array, "n"] | None = None) -> Found:
        """The same as an integer program, solved by HiGHS: the optimum, or the best codes and bound when time is up.

        start: codes to be beaten: HiGHS is told their t as a cut-off, and they are returned when it finds nothing better
        Raises ValueError for levels that aren't evenly spaced.
        """
        step, began = self.levels[1] - self.levels[0], time.perf_counter()
        if not np.allclose(np.diff(self.levels), step, rtol=1e-6):
            raise ValueError("as an integer program this takes evenly spaced levels; `search` takes any")
        x, bound = self.relaxed()
        best = self.state(self.nearest(x) if start is None else start)
        if (unit := best.t) == 0:  # HiGHS takes what is below 1e-6 for nothing, so everything is told in units of a good t
            return Found(best.z, 0.0, time.perf_counter() - began, 0.0, True)
        m, right, cost = self._program(unit)
        rows = LinearConstraint(np.c_[m[:, :-1] * step, m[:, -1]], -np.inf, right - m[:, :-1].sum(1) * self.levels[0])
        most = np.r_[np.full(len(x), len(self.levels) - 1.0), np.inf if start is None else 1.0]
        told = {"time_limit": min(seconds, 1e6), "mip_rel_gap": 0.0}
        found = milp(cost, integrality=1 - cost, bounds=Bounds(0, most), constraints=rows, options=told)
        if found.x is not None and (new := self.state(np.rint(found.x[:-1]).astype(int))).t < best.t:
            best = new
        bound = max(bound, unit * found.mip_dual_bound if found.mip_dual_bound is not None else 0.0)
        return Found(best.z, best.t, time.perf_counter() - began, bound, found.status == 0)
