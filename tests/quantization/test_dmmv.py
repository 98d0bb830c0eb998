"""DMMV: tiny problems are solved to the optimum, both filters are safe, the search keeps its laws, the three tasks are right."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, signal
from torch import nn

from minivid.core.baselines.quant import QuantisedLinear, gptq, minmax, quantise
from minivid.core.surgery import Gram
from minivid.quantization import dmmv as paper
from minivid.quantization.dmmv import MinMax, Search

SEEDS = st.integers(0, 10_000)


def problem(seed, n=6, rows=12, q=3, even=True):
    """A random problem, its levels evenly spaced or not, and codes to begin with."""
    dice = np.random.default_rng(seed)
    levels = np.linspace(-1, 1, q) if even else np.sort(dice.standard_normal(q))
    a = dice.standard_normal((rows, n))
    return MinMax(a, a @ dice.uniform(-1, 1, n), levels), dice.integers(0, q, n)


def optimum(p):
    """The least t by trying everything."""
    codes = np.array(list(itertools.product(range(len(p.levels)), repeat=p.A.shape[1])))
    return np.abs(p.levels[codes] @ p.A.T - p.b).max(1).min()


# --- the law of limits ------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(SEEDS)
def test_tiny_problems_are_solved_to_the_optimum(seed):
    p, z = problem(seed)
    best = optimum(p)
    assert p.search(z, Search(("step", "swap"), guard=False, destroy=0.5, iterations=400), seed).t == pytest.approx(best)
    found = p.exact()
    assert found.t == pytest.approx(best) and found.proven and found.bound == pytest.approx(best, rel=1e-5)
    assert p.relaxed()[1] <= best * (1 + 1e-9)


def every_pair(D, first, second, below):
    """What the filters stand for: a loop over all pairs."""
    pairs = itertools.product(range(len(first)), range(len(second)))
    return [(i, j) for i, j in pairs if np.abs(D + first[i] + second[j]).max() < below]


@settings(max_examples=60)
@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(1, 60), st.sampled_from((1, 5, 100)))
def test_filters_are_safe(seed, p, r, rows, top):
    dice = np.random.default_rng(seed)
    D, first, second = (dice.standard_normal(shape) for shape in (rows, (p, rows), (r, rows)))
    D[dice.integers(rows)] *= 3
    for below in (np.abs(D).max() * (1 - 1e-12), np.abs(D).max() * 0.8):
        expected = every_pair(D, 0.3 * first, 0.3 * second, below)
        i, j, useful, left = paper.improving(D, 0.3 * first, 0.3 * second, below, top)
        assert list(zip(i, j, strict=True)) == expected
        assert len(expected) <= left <= p * r and len(useful) <= rows


@settings(max_examples=15)
@given(SEEDS, st.booleans(), st.sampled_from((("swap",), ("step", "swap"), ("pair",))))
def test_the_search_goes_the_same_way_without_filters(seed, even, moves):
    p, z = problem(seed, n=12, rows=40, q=4, even=even)
    how = Search(moves, destroy=0.2, iterations=10)
    one, other = p.search(z, how, seed), p.search(z, replace(how, top=0), seed)
    assert (one.codes == other.codes).all() and one.t == other.t


def test_filters_discard_most():
    p, z = problem(0, n=64, rows=256, q=8)
    s = p.descend(p.state(p.nearest(np.random.default_rng(0).uniform(-1, 1, 64))), Search())
    assert np.mean(s.rows) > 0.3 and np.mean(s.pairs) > 0.9
    s = p.descend(p.state(z), Search(top=0))
    assert set(s.rows) == set(s.pairs) == {0.0}


# --- laws of the search -------------------------------------------------------------------------------------------------


def watched(p, z, how, seed=0):
    """Copies of all states that the search passes."""
    seen = []
    p.search(z, how, seed, lambda s: seen.append(s.copy()))
    return seen


@settings(max_examples=15)
@given(SEEDS, st.booleans(), st.booleans())
def test_the_residual_is_kept_up_and_t_never_rises(seed, even, guard):
    p, z = problem(seed, n=20, rows=50, q=5, even=even)
    seen = watched(p, z, Search(("step", "swap", "pair"), guard=guard, destroy=0.2, iterations=20), seed)
    for s in seen:
        np.testing.assert_allclose(s.D, p.A @ p.levels[s.z] - p.b, rtol=1e-6, atol=1e-9)
        assert s.z.min() >= 0 and s.z.max() < 5
    t = [s.t for s in seen]
    assert t == sorted(t, reverse=True) and t[0] <= p.state(z).t


@settings(max_examples=15)
@given(SEEDS)
def test_guarded_descent_raises_neither_norm(seed):
    p, z = problem(seed, n=20, rows=50, q=5)
    seen = [p.state(z)]
    p.descend(p.state(z), Search(), lambda s: seen.append(s.copy()))
    squares = [s.squares for s in seen]
    assert squares == sorted(squares, reverse=True)


@settings(max_examples=15)
@given(SEEDS, st.booleans())
def test_swaps_keep_the_histogram_of_levels(seed, even):
    p, z = problem(seed, n=20, rows=50, q=5, even=even)
    s = p.descend(p.state(z), Search(guard=False))
    assert (np.bincount(s.z, minlength=5) == np.bincount(z, minlength=5)).all() and s.t < p.state(z).t
    for table in p.tables(z, ("swap",)):  # what exchanges levels, exchanges neighbouring ones
        assert len({*z[table[0].variable]}) == len({*z[table[1].variable]}) == 1
        assert (z[table[0].variable][0] + 1 == z[table[1].variable]).all()


@settings(max_examples=15)
@given(SEEDS)
def test_destroy_and_repair(seed):
    p, z = problem(seed, n=20, rows=50, q=3)
    for remove, repair in itertools.product((p.random, p.worst), (p.scatter, p.greedy)):
        s, dice = p.state(z), np.random.default_rng(seed)
        chosen = remove(s, 7, 30, dice)
        assert len(set(chosen)) == 7
        repair(s, chosen, dice)
        np.testing.assert_allclose(s.D, p.state(s.z).D, atol=1e-12)
        assert s.z.min() >= 0 and s.z.max() <= 2 and np.abs(s.z - z).max() <= 1
        assert (np.delete(s.z, chosen) == np.delete(z, chosen)).all()
        assert repair == p.scatter or s.t <= p.state(z).t


def test_the_worst_variable_is_the_one_that_pushes_hardest():
    p = MinMax(np.array([[1.0, 1.0, -1.0, -1.0]]), np.array([-5.0]), np.arange(10.0))
    z, dice = np.array([9, 0, 9, 0]), np.random.default_rng(0)  # D > 0: 9 with weight +1 and 0 with weight -1 push hardest
    counts = np.bincount([j for _ in range(300) for j in p.worst(p.state(z), 1, 100, dice)], minlength=4)
    assert counts[[0, 3]].sum() > 250


@settings(max_examples=15)
@given(SEEDS, st.integers(-20, 20))
def test_scale_changes_nothing(seed, power):
    p, z = problem(seed)
    c, how = 2.0**power, Search(("step", "swap"), destroy=0.5, iterations=20)  # powers of two, so that nothing is rounded anew
    scaled = MinMax(c * p.A, c * p.b, p.levels)
    one, other = p.search(z, how, 1), scaled.search(z, how, 1)
    assert (one.codes == other.codes).all() and other.t == c * one.t
    assert scaled.exact().t == pytest.approx(c * p.exact().t)


@settings(max_examples=10)
@given(SEEDS)
def test_consistent_data_are_met(seed):
    p, z = problem(seed)
    truth = np.random.default_rng(seed + 1).integers(0, 3, 6)
    p = MinMax(p.A, p.A @ p.levels[truth], p.levels)
    assert p.exact().t == pytest.approx(0, abs=1e-9)
    assert p.search(z, Search(("step", "swap"), guard=False, destroy=0.5, iterations=400), seed).t == pytest.approx(0, abs=1e-9)


@settings(max_examples=15)
@given(SEEDS, st.sampled_from((("swap",), ("step",), ("pair",))))
def test_the_objective_of_squares_takes_the_best_pair_there_is(seed, moves):
    p, z = problem(seed, n=10, rows=20, q=4)
    s, how = p.state(z), Search(moves, "squares")
    for first, second in p.tables(z, moves):
        sums = {(i, j): ((s.D + a + b) ** 2).sum() for i, a in enumerate(first.add) for j, b in enumerate(second.add)
                if first.variable[i] != second.variable[j]}  # fmt: skip
        pair = p.best(s, first, second, how)
        least = min(sums.values())
        assert (pair is None) == (least >= s.squares * (1 - 1e-6))
        assert pair is None or sums[pair] == pytest.approx(least)
    squares = [s.squares for s in watched(p, z, replace(how, destroy=0.2, iterations=10))]
    assert squares == sorted(squares, reverse=True)


def test_seeds_decide_and_time_may_end_it():
    p, z = problem(3, n=30, rows=80, q=6)
    how = Search(destroy=0.2, iterations=20)
    codes = [p.search(z, how, seed).codes.tolist() for seed in (0, 0, 1)]
    assert codes[0] == codes[1] != codes[2]
    assert p.search(z, replace(how, seconds=0.0)).iterations == 0


def test_a_cut_off_keeps_what_is_better():
    p, z = problem(5, n=8, rows=20)
    best = p.exact()
    again = p.exact(start=best.codes)
    assert again.t == pytest.approx(best.t) and again.proven
    assert p.exact(start=z).t == pytest.approx(best.t)


# --- use 1: weights -----------------------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 6)).requires_grad_(False)


def rounded(linear, x):
    s = minmax(linear.weight, 3, dim=1).stored()
    return quantise(linear.weight, s), s


def test_rounding_through_our_surgery_is_rounding_at_once():
    model, x = network(), torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    ours = paper.quantised(model, ["0", "2"], [x], rounded)
    plain = nn.Sequential(*(QuantisedLinear.of(m, minmax(m.weight, 3, dim=1)) if isinstance(m, nn.Linear) else m for m in model))
    assert torch.equal(ours(x), plain(x))
    assert isinstance(model[0], nn.Linear)


def test_layers_see_what_those_before_them_left():
    model, x, seen = network(), torch.randn(40, 12, generator=torch.Generator().manual_seed(1)), []
    paper.quantised(model, ["0", "2"], [x[:20], x[20:]], lambda linear, rows: (seen.append(rows), rounded(linear, rows))[1])
    half = nn.Sequential(QuantisedLinear.of(model[0], minmax(model[0].weight, 3, dim=1)), nn.GELU())
    torch.testing.assert_close(seen[0], x)
    torch.testing.assert_close(seen[1], half(x))


def test_a_searched_layer_errs_less_at_worst():
    linear, x = network()[0], torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
    s = minmax(linear.weight, 3, dim=1).stored()
    gram = Gram()
    gram.add(x)
    worst = lambda codes: ((x @ (codes * s.step + s.offset - linear.weight).T).abs()).amax(0)
    for start in (quantise(linear.weight, s), gptq(linear.weight, gram.xx, s)):
        codes = paper.layer(linear.weight, x, s, start, Search(destroy=0.1, iterations=30))
        assert codes.dtype == start.dtype and codes.min() >= 0 and codes.max() <= 7
        assert (worst(codes) <= worst(start) + 1e-6).all() and worst(codes).mean() < 0.9 * worst(start).mean()


def test_outliers_never_move():
    linear, x = network()[0], torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
    s = minmax(linear.weight, 3, dim=1).stored()
    start, own = quantise(linear.weight, s), linear.weight.abs() > 0.25
    how = Search(("step", "swap"), destroy=0.3, iterations=30)
    codes = paper.layer(linear.weight, x, s, start, how, own=own)
    assert own.any() and torch.equal(codes[own], start[own]) and not torch.equal(codes, start)
    for o in range(16):  # each row is the problem of its other weights alone
        free, levels = ~own[o].numpy(), (s.offset[o] + s.step[o] * torch.arange(8)).double().numpy()
        a = x.double().numpy()[:, free]
        alone = MinMax(a, a @ linear.weight[o].double().numpy()[free], levels)
        assert (alone.search(start[o].numpy()[free], how, o).codes == codes[o].numpy()[free]).all()


# --- use 2: tomography ----------------------------------------------------------------------------------------------------


def test_projections_are_sums_of_the_turned_picture():
    x = np.random.default_rng(0).random((9, 9))
    views = (paper.projections(9, 6) @ x.ravel()).reshape(6, 9)
    for i, view in enumerate(views):
        turned = ndimage.rotate(x, 30 * i, reshape=False, order=1, mode="grid-constant")
        np.testing.assert_allclose(view, turned.sum(0), atol=1e-9)
    np.testing.assert_allclose(views[0], x.sum(0))
    assert min(np.abs(views[3] - x.sum(1)).max(), np.abs(views[3] - x.sum(1)[::-1]).max()) < 1e-9


def test_projections_of_a_disc_are_its_chords():
    at = (np.arange(256) + 0.5) / 8 - 16  # a disc of radius 10, its edge averaged over 8 x 8 points a pixel
    disc = (at[:, None] ** 2 + at**2 < 100).reshape(32, 8, 32, 8).mean((1, 3))
    place = np.arange(32) - 15.5
    chords = 2 * np.sqrt(np.maximum(100 - place**2, 0))
    for view in (paper.projections(32, 7) @ disc.ravel()).reshape(7, 32):
        assert np.abs(view - chords)[np.abs(place) < 9].max() < 0.4
        assert view.sum() == pytest.approx(disc.sum(), rel=0.01)


@settings(max_examples=5)
@given(SEEDS)
def test_the_truth_violates_by_no_more_than_the_noise(seed):
    dice, a = np.random.default_rng(seed), paper.projections(8, 5)
    x = dice.integers(0, 2, 64)
    p = MinMax(a, a @ x + dice.uniform(-0.3, 0.3, len(a)), np.array([0.0, 1.0]))
    assert p.state(x).t <= 0.3 and p.relaxed()[1] <= p.state(x).t
    start = p.nearest(paper.sart(a, p.b, 5))
    assert p.search(start, Search(destroy=0.05, iterations=30)).t <= p.state(start).t


def test_sart_finds_a_picture_that_is_seen_from_all_sides():
    x, a = np.random.default_rng(0).random(64), paper.projections(8, 24)
    back = paper.sart(a, a @ x, 24, 400)
    assert np.abs(back - x).mean() < 0.02 and back.min() >= 0 and back.max() <= 1


def test_dart_finds_three_levels_where_rounded_sart_does_not():
    """A disc with a brighter core, seen from six sides without noise: 120 sums for 400 pixels."""
    u, v = np.mgrid[:20, :20] - 9.5
    picture = 0.5 * (u**2 + v**2 < 75).ravel() + 0.5 * ((u - 2) ** 2 + (v + 1) ** 2 < 14).ravel()
    a = paper.projections(20, 6)
    p = MinMax(a, a @ picture, np.array([0.0, 0.5, 1.0]))
    grey = paper.sart(a, p.b, 6, 60)
    assert (p.levels[p.nearest(grey)] != picture).any()
    z = paper.dart(p, 6, grey, 60, inner=5)
    np.testing.assert_array_equal(p.levels[z], picture)


def test_dart_with_all_pixels_free_is_sart_and_moves_no_pixel_that_is_not():
    dice = np.random.default_rng(0)
    a = paper.projections(8, 6)
    p = MinMax(a, a @ dice.random(64), np.array([0.0, 0.5, 1.0]))
    begin = p.levels[dice.integers(0, 3, 64)]
    once = paper.dart(p, 6, begin, 1, free=1.0, inner=5)
    np.testing.assert_array_equal(once, p.nearest(paper.sart(a, p.b, 6, 5, x=begin)))
    flat = np.full(64, 0.4)  # no edges, nothing free: every pixel keeps its level
    np.testing.assert_array_equal(paper.dart(p, 6, flat, 3, free=0.0), 1)


# --- use 3: filters -------------------------------------------------------------------------------------------------------


def test_the_matrix_is_the_filters_response():
    dice = np.random.default_rng(0)
    for half in (1, 4, 9):
        x, w = dice.standard_normal(half + 1), np.linspace(0, 1, 33)
        _, response = signal.freqz(paper.taps(x), worN=np.pi * w)
        np.testing.assert_allclose(np.abs(paper.gain(w, half) @ x), np.abs(response), atol=1e-9)


@pytest.mark.parametrize("order, bits, coarse, best", [(12, 4, 0.5, 0.276), (20, 5, 0.3125, 0.1875)])
def test_small_filters_reach_the_known_optimum(order, bits, coarse, best):
    p, real = paper.fir(order, bits)
    assert p.A.shape == (16 * order, order // 2 + 1) and len(p.levels) == 2**bits
    z, free = p.nearest(real), p.relaxed()[1]
    assert p.state(z).t == pytest.approx(coarse, rel=0.01)
    found = p.search(z, Search(("step", "pair"), guard=False, destroy=0.25, iterations=100))
    assert found.t == pytest.approx(best, rel=1e-3) and free <= found.t
    assert free == pytest.approx(np.abs(p.A @ real - p.b).max(), rel=0.05)  # no real filter does better than Parks-McClellan's
    if order == 12:
        assert p.exact().t == pytest.approx(found.t)


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_refusals():
    p, z = problem(0)
    for bad in (dict(moves=("swaps",)), dict(moves=()), dict(objective="least")):
        with pytest.raises(ValueError, match="moves are of swap, step, pair"):
            Search(**bad)
    with pytest.raises(ValueError, match="expected A `K n`"):
        MinMax(p.A, p.b[1:], p.levels)
    with pytest.raises(ValueError, match="expected A `K n`"):
        MinMax(p.A, p.b, p.levels[:1])
    with pytest.raises(ValueError, match="levels must ascend"):
        MinMax(p.A, p.b, p.levels[::-1])
    with pytest.raises(ValueError, match="A and b be finite"):
        MinMax(p.A * np.nan, p.b, p.levels)
    for codes in (z[1:], z + 3, z - 3):
        with pytest.raises(ValueError, match=r"expected 6 codes in \[0, 3\)"):
            p.search(codes, Search())
    with pytest.raises(ValueError, match="evenly spaced levels"):
        MinMax(p.A, p.b, np.array([0.0, 1.0, 3.0])).exact()
    for order, edges in ((11, (0.4, 0.5)), (12, (0.5, 0.4)), (0, (0.4, 0.5))):
        with pytest.raises(ValueError, match="an even order and edges"):
            paper.fir(order, 4, edges)
