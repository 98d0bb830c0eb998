"""NBP: blocks of one token are next tokens; nothing is seen too early; a cache changes nothing; cells are drawn by themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivid.block_diffusion import nbp as paper
from minivid.block_diffusion.nbp import Flat, NextBlock, Sampling, draw, filling, generate, likely
from minivid.core import codes as tokens
from minivid.core.attention import dense
from minivid.core.cache import Cache
from minivid.core.model import Cond
from minivid.core.where import visible
from minivid.lab import measure

K, SIDE, N = 12, (2, 4), 24
SHAPES = [(1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 2), (3, 1, 1), (3, 2, 1), (1, 2, 4)]
BOTH = pytest.mark.parametrize("hybrid", [True, False])
ALL = pytest.mark.parametrize("shape", SHAPES)


def small(shape=(1, 1, 4), hybrid=True, seed=0) -> NextBlock:
    torch.manual_seed(seed)
    return NextBlock(K, 32, 2, 4, SIDE, shape, hybrid).eval().requires_grad_(False)


def some(b=2, f=3, seed=0):
    return torch.randint(K, (b, f, *SIDE), generator=torch.Generator().manual_seed(seed))


def dice(b=2, f=3, seed=0):
    return torch.rand(b, f, *SIDE, generator=torch.Generator().manual_seed(seed))


TEXT = Cond(text=torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]))


def where(model, n=N):
    ids = torch.zeros(1, 1, 1, n, dtype=torch.long)
    return model.inlet(ids, None, Cond())[1]


# --- the law of limits ------------------------------------------------------------------------------------------------


@BOTH
def test_blocks_of_one_token_are_next_token_prediction(hybrid):
    """Against a plain decoder: the code before, its own place, the built-in causal mask."""
    model, x = small((1, 1, 1), hybrid), some()
    causal = lambda q, k, v, where: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    logits = model.predict(x, TEXT)
    for block in model.trunk.blocks:
        assert block.attention.attend is dense
        block.attention.attend = causal
    ids = torch.cat([torch.full((2, 1), K), x.flatten(1)[:, :-1]], 1)
    plain = model(ids[:, None, None], None, TEXT).view(2, K, *x.shape[1:])
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens.nll(logits, x), tokens.nll(plain, x), atol=1e-5, rtol=1e-4)


def test_rows_that_begin_at_once_are_the_core_model():
    """Without the hybrid start, and without the vectors of places, this is `core.codes`, whose weights `codes` is."""
    model, core = small((1, 1, 4), False), tokens.TokenModel(K, 32, 2, 4, 4, SIDE, block=4).eval()
    model.inlet.place.zero_()
    state = {name: value for name, value in model.state_dict().items() if name != "inlet.place"}
    core.load_state_dict(state)
    torch.testing.assert_close(model.predict(some(), TEXT), core.predict(some(), TEXT), atol=1e-5, rtol=1e-4)


def test_all_sizes_have_the_same_parameters():
    counts = {measure.parameters(small(shape)) for shape in SHAPES}
    assert len(counts) == 1
    a, b = small((1, 1, 1)).state_dict(), small((1, 2, 4)).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- order and shapes -------------------------------------------------------------------------------------------------


@ALL
def test_a_shape_is_an_order_of_the_cells(shape):
    cells = small(shape).inlet.cells(torch.arange(N))
    assert sorted(cells.tolist()) == list(range(N))
    block = cells.view(-1, *shape)
    place = torch.stack([block // 8, block % 8 // 4, block % 4], -1)
    corner = place[:, :1, :1, :1]
    grid = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1)
    assert torch.equal(place - corner, grid.expand_as(place))  # each block is a box of that shape, raster inside


def test_rows_keep_the_raster_and_ask_for_the_row_below_also_across_frames():
    inlet = small((1, 1, 4)).inlet
    assert torch.equal(inlet.cells(torch.arange(N)), torch.arange(N))
    raster = torch.arange(N)[None]
    fed = inlet.fed(raster)[0]
    assert fed[8:12].tolist() == [4, 5, 6, 7]  # the last row of frame 0 asks for the first of frame 1
    assert fed[20:].tolist() == [16, 17, 18, 19]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 10_000))
def test_taking_order_and_middles_away_gives_the_codes_back(shape, seed):
    inlet, x = small(shape).inlet, some(seed=seed)
    cell = inlet.cells(torch.arange(N))
    fed = inlet.fed(x.flatten(1)[:, cell])
    last = x.flatten(1)[:, cell][:, N - inlet.block :] if inlet.block > 1 else x.flatten(1)[:, cell][:, -1:]
    codes = torch.cat([fed[fed < K].view(2, -1), last], 1)  # the last block is never fed
    assert torch.equal(codes[:, cell.argsort()].view_as(x), x)


# --- layout and mask --------------------------------------------------------------------------------------------------


@ALL
def test_the_hybrid_layout(shape):
    length = small(shape).inlet.block
    source = paper.sources(N, length)
    assert len(source) == 1 + N + (length - 1) - length == N
    if N == 2 * length or length == 1:
        return
    assert source[0] == -1 and source[1 : length + 1].tolist() == list(range(length))  # BOV, x1 ... xL
    assert source[length + 1 : 2 * length].tolist() == [-1 - j for j in range(1, length)]  # the middles
    assert source[2 * length :].tolist() == list(range(length, N - length))  # block 2 and on, but for the last
    number = paper.numbers(torch.arange(N), length)
    assert number[:length].tolist() == list(range(length))
    assert number[length : 2 * length].unique().tolist() == [length]  # x_L and the middles are one block


@pytest.mark.parametrize("n, block, known, hybrid, passes", [
    (1280, 16, 0, True, 95), (1024, 8, 0, True, 135), (1280, 1, 0, True, 1280), (768, 16, 512, True, 48), (768, 16, 0, False, 48),
])  # fmt: skip
def test_steps(n, block, known, hybrid, passes):
    assert paper.steps(n, block, known, hybrid) == passes


@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_the_plain_mask(block):
    number = paper.numbers(torch.arange(8), block, hybrid=False)
    model = small({1: (1, 1, 1), 2: (1, 1, 2), 4: (1, 1, 4), 8: (1, 2, 4)}[block], False)
    mask = visible(where(model, 8))[0]
    assert torch.equal(mask, number[None] <= number[:, None])
    assert mask.sum(1).tolist() == [block * (q // block + 1) for q in range(8)]
    m = mask.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    assert torch.equal(m, m[:, :1, :, :1].expand_as(m))  # block-constant
    if block == 1:
        assert torch.equal(mask, torch.ones(8, 8).tril().bool())
    if block == 8:
        assert mask.all()


@BOTH
@ALL
def test_no_logit_knows_what_it_says_or_what_follows(shape, hybrid):
    model, x, kept = small(shape, hybrid), some(), {}
    block, inlet = model.inlet.block, model.inlet
    cell = inlet.cells(torch.arange(N))
    vectors = lambda out: kept.update(vectors=out[0].requires_grad_(True))
    inlet.register_forward_hook(lambda m, i, out: (vectors(out), out)[1])
    logits = model.predict(x, Cond()).flatten(2)[..., cell]  # in the order of the blocks
    number = paper.numbers(torch.arange(N), block, hybrid)
    for m in number.unique():
        (grad,) = torch.autograd.grad(logits[..., number == m].sum(), kept["vectors"], retain_graph=True)
        reached = grad.abs().sum((0, 2))
        assert (reached[number > m] == 0).all() and (reached[number <= m] > 0).all()
    for at in range(N):  # by tokens: another code there moves no logit of its own block or before
        other = x.flatten(1).clone()
        other[:, cell[at]] = (other[:, cell[at]] + 1) % K
        moved = model.predict(other.view_as(x), Cond()).flatten(2)[..., cell] != logits
        assert not moved[..., number <= number[at]].any()
        if at < N - block:
            assert moved[..., number > number[at]].any(1).all()


# --- decoding ---------------------------------------------------------------------------------------------------------


@BOTH
@ALL
@pytest.mark.parametrize("make", [lambda: Flat(N), Cache])
def test_a_cache_changes_nothing(shape, hybrid, make):
    model, cache, u = small(shape, hybrid), make(), dice()
    if not isinstance(cache, Flat) and shape[0] > 1:
        return  # `Cache` rotates what it read: the same numbers, tested once
    assert torch.equal(generate(model, 3, TEXT, cache=cache, u=u), generate(model, 3, TEXT, u=u))
    assert cache.tokens == N


@BOTH
@ALL
def test_every_cached_step_is_the_full_pass(shape, hybrid):
    model, x, cache = small(shape, hybrid), some(), Flat(N)
    cell, block = model.inlet.cells(torch.arange(N)), model.inlet.block
    full = model.predict(x, TEXT).flatten(2)[..., cell]
    fed, said, count = model.inlet.fed(x.flatten(1)[:, cell]), 0, 0
    while said < N:
        end = said + (1 if hybrid and said < block else block)
        told = TEXT.at(end, said / 8)  # the place: what the cache holds already, not steps times L
        cache.open(end, told)
        logits = model(fed[:, None, None, said:end], None, told, cache).flatten(2)
        cache.close(end)
        torch.testing.assert_close(logits, full[..., said:end], atol=1e-5, rtol=1e-4)
        said, count = end, count + 1
        singles = min(count, block) if hybrid else 0
        assert cache.tokens == singles + block * (count - singles)
    assert count == paper.steps(N, block, hybrid=hybrid)


@ALL
def test_given_frames_are_kept_and_read_in_one_pass(shape):
    model, x, u = small(shape), some(f=3), dice(f=6)
    walk = list(filling(model, 6, Cond(), x, Flat(48), u))
    assert len(walk) == paper.steps(24, model.inlet.block, known=24)
    assert torch.equal(walk[-1][:, :3], x) and walk[-1].min() >= 0
    assert torch.equal(walk[-1], generate(model, 6, Cond(), x, None, u))
    for a, b in zip(walk, walk[1:], strict=False):
        assert ((b >= 0) & (a < 0)).flatten(1).sum(1).tolist() == [model.inlet.block] * 2  # a block a step
        assert torch.equal(a[a >= 0], b[a >= 0])


def test_a_block_is_drawn_cell_by_cell():
    """With a fixed past, two cells of a block that swap their numbers change these two codes and no other of the block."""
    model, x, u = small((1, 2, 4)), some(f=1), dice(f=2)
    other = u.clone()
    other[:, 1, 0, 1], other[:, 1, 1, 2] = u[:, 1, 1, 2], u[:, 1, 0, 1]
    a, b = (generate(model, 2, Cond(), x, None, v) for v in (u, other))
    same = torch.ones(2, *SIDE, dtype=torch.bool)
    same[1, 0, 1] = same[1, 1, 2] = False
    assert torch.equal(a[:, same], b[:, same])
    other[:, 1, 0, 1] = 1 - u[:, 1, 0, 1]
    assert not torch.equal(a, generate(model, 2, Cond(), x, None, other))


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.5, 0.3, 0.2])
    logits = p.log().view(1, 3, 1).expand(1, 3, 20_000)
    u = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0))
    assert (torch.bincount(draw(logits, u)[0]) / 20_000).tolist() == pytest.approx(p.tolist(), abs=0.015)
    assert draw(logits[..., :3], torch.tensor([[0.49, 0.51, 0.81]])).tolist() == [[0, 1, 2]]
    assert draw(logits[..., :2], torch.tensor([[0.0, 1 - 1e-7]])).tolist() == [[0, 2]]
    assert (draw(logits, u, Sampling(0)) == 0).all() and (draw(logits, u, Sampling(0.1)) == 0).float().mean() > 0.98


def test_what_is_likely():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().view(1, 4, 1)
    left = lambda **s: likely(logits, **s).isfinite()[0, :, 0].nonzero()[:, 0].tolist()
    assert left() == [0, 1, 2, 3] and left(top_k=2) == [1, 3] and left(top_k=1) == [1]
    assert left(top_p=0.5) == [1] and left(top_p=0.7) == [1, 3] and left(top_p=0.8) == [1, 2, 3] and left(top_p=1e-9) == [1]
    assert left(top_k=2, top_p=0.6) == [1]  # of the two that are left, the first holds two thirds
    two = torch.cat([logits, logits.flip(1)], 2)
    assert likely(two, top_k=1).isfinite().nonzero()[:, 1].tolist() == [1, 2]  # each cell by itself
    kept = likely(logits, top_k=2)
    torch.testing.assert_close(kept[kept.isfinite()], logits[kept.isfinite()])


def test_the_likeliest_codes_agree_with_teacher_forcing():
    model = small((1, 1, 2))
    out = generate(model, 3, Cond(), how=Sampling(0))
    assert torch.equal(model.predict(out, Cond()).argmax(1), out)
    assert torch.equal(generate(model, 3, Cond(), u=dice(1), how=Sampling(top_k=1)), out)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 4), (1, 2, 4)])
def test_it_learns_also_the_row_after_the_last(shape):
    model, x = small(shape).requires_grad_(True).train(), some(1)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = tokens.nll(model.predict(x, Cond()), x).mean()
        opt.zero_grad(), loss.backward(), opt.step()
    assert loss < 0.1 and torch.equal(generate(model, 3, Cond(), cache=Flat(N), how=Sampling(0)), x)


@pytest.mark.parametrize("call, message", [
    (lambda: small((1, 2, 3)), "don't divide into blocks of 2 x 3"),
    (lambda: small((2, 2, 4)), "at most the 8 cells"),
    (lambda: small((3, 1, 1)).predict(some(f=2), Cond()), "don't divide"),
    (lambda: small().predict(some().float(), Cond()), "codes are integers"),
    (lambda: small().predict(some() + K, Cond()), r"lie in \[0, 12\)"),
    (lambda: generate(small((3, 1, 1)), 6, Cond(), some(f=2), None, dice(f=6)), "must divide into blocks"),
    (lambda: generate(small(), 3, Cond(), some()), "nothing is left"),
    (lambda: generate(small(), 3, Cond()), "needs a number u"),
    (lambda: generate(small(), 3, Cond(), cache=Flat(20), how=Sampling(0)), "room for 20"),
])  # fmt: skip
def test_errors_say_what_is_wrong(call, message, untyped):
    with pytest.raises(ValueError, match=message):
        call()
