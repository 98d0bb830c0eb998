"""Sparse-vDiT: its limits are dense attention, every kernel is the masked product it stands for, the search keeps its laws."""

import hashlib

import pytest
import torch
from checks import ROOT, contracts
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from minivid.core import noise, weights
from minivid.core.attention import Attention, dense, scores
from minivid.core.model import Cond, Guided, VideoModel
from minivid.core.where import grid
from minivid.lab import measure
from minivid.sparse_attention import sparse_vdit as paper
from minivid.sparse_attention.sparse_vdit import FULL, SKIP, Mode, Sparse

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))


def heads(size, k=1, b=2, d=4, seed=0, keys=None):
    """Random q, k, v of a grid, and its places."""
    dice, (f, h, w) = torch.Generator().manual_seed(seed), size
    draw = lambda k: torch.randn(b, k, f * h * w, d, generator=dice)
    return draw(k), draw(keys or k), draw(keys or k), grid(f, h, w)


def masked(mode, q, k, v, where):
    """What a mode stands for: dense attention with minus infinity wherever it doesn't look; 0 where it looks nowhere."""
    mask = paper.kept(mode, where.grid)
    share = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return share.nan_to_num() @ v


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@st.composite
def modes(draw, size):
    kind = draw(st.sampled_from(paper.KINDS))
    columns = draw(st.sets(st.integers(0, size[0] - 1), min_size=1)) if kind == "stripe" else ()
    return kind, draw(st.integers(0, 6)) if "diagonal" in kind else 0, tuple(sorted(columns))


@st.composite
def tables(draw, most=4):
    """A grid and what makes a mode, for each of up to `most` heads."""
    size = draw(SIZES)
    return size, [draw(modes(size)) for _ in range(draw(st.integers(1, most)))]


# --- the law of limits ------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(SIZES)
def test_widest_windows_and_all_columns_are_dense(size):
    q, k, v, where = heads(size)
    wide = max(size[0], size[1] * size[2]) - 1
    limits = FULL, Mode("diagonal", wide), Mode("multi-diagonal", wide), Mode("stripe", columns=tuple(range(size[0])))
    for mode in limits:
        close(Sparse((mode,))(q, k, v, where), dense(q, k, v, where), 1e-6)
        assert paper.share(mode, size) == 1


def noisy_model(depth=2, size=32, seed=0):
    """A small video model whose every parameter is random, as if trained (a fresh one says 0)."""
    torch.manual_seed(seed)
    model = VideoModel(4, size, depth, heads=4)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval().requires_grad_(False)


def call(f=4, side=4, b=2, seed=1):
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(b, 4, f, side, side, generator=dice), torch.tensor([0.3, 0.8])[:b], Cond(text=torch.ones(b, 3).long())


def test_a_model_of_full_heads_is_the_model():
    model, inputs = noisy_model(), call()
    close(paper.sparsify(model, [[FULL] * 4] * 2)(*inputs), model(*inputs), 0)
    close(paper.sparsify(model, [[Mode("diagonal", 3)] * 4] * 2)(*inputs), model(*inputs))


# --- patterns -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(tables(1))
def test_every_kernel_is_its_masked_product(drawn):
    size, mode = drawn[0], Mode(*drawn[1][0])
    q, k, v, where = heads(size)
    close(Sparse((mode,))(q, k, v, where), masked(mode, q, k, v, where))


@settings(max_examples=40)
@given(tables(1))
def test_rows_sum_to_one_and_none_is_empty(drawn):
    size, mode = drawn[0], Mode(*drawn[1][0])
    q, k, _, where = heads(size)
    ones = torch.ones_like(q)
    close(Sparse((mode,))(q, k, ones, where), ones * (mode != SKIP))
    assert (paper.kept(mode, size).any(-1) == (mode != SKIP)).all()


def test_narrowest_windows_are_attention_in_a_frame_and_at_a_place():
    q, k, v, where = heads((3, 2, 2))
    frames = torch.cat([dense(q[:, :, i : i + 4], k[:, :, i : i + 4], v[:, :, i : i + 4], grid(1, 2, 2)) for i in (0, 4, 8)], 2)
    close(Sparse((Mode("diagonal"),))(q, k, v, where), frames)
    o = torch.zeros_like(q)
    for place in range(4):  # axial attention along time
        o[:, :, place::4] = dense(q[:, :, place::4], k[:, :, place::4], v[:, :, place::4], grid(3, 1, 1))
    close(Sparse((Mode("multi-diagonal"),))(q, k, v, where), o)


@settings(max_examples=40)
@given(SIZES, st.integers(0, 4))
def test_multi_diagonal_is_diagonal_after_a_permutation(size, width):
    q, k, v, where = heads(size)
    n, places = q.shape[2], size[1] * size[2]
    p = torch.arange(n).view(size[0], places).T.flatten()  # (f s) -> (s f)
    back = torch.arange(n).view(places, size[0]).T.flatten()
    assert torch.equal(p[back], torch.arange(n)) and torch.equal(back[p], torch.arange(n))
    close(dense(q[:, :, p], k[:, :, p], v[:, :, p], where)[:, :, back], dense(q, k, v, where))  # attention doesn't see order
    moved = paper.window(q[:, :, p], k[:, :, p], v[:, :, p], paper.groups(size), width)[:, :, back]
    close(Sparse((Mode("multi-diagonal", width),))(q, k, v, where), moved)


def test_a_stripe_reads_each_heads_own_frames():
    q, k, v, where = heads((4, 1, 2), k=2)
    own = Mode("stripe", columns=(0, 2)), Mode("stripe", columns=(1, 3))
    o = Sparse(own)(q, k, v, where)
    for head, columns in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
        share = (q[:, head] @ k[:, head, columns].mT / 2).softmax(-1)
        close(o[:, head], share @ v[:, head, columns])


@settings(max_examples=40)
@given(tables(1))
def test_share_counts_blocks(drawn):
    size, mode = drawn[0], Mode(*drawn[1][0])
    assert paper.share(mode, size) == pytest.approx(paper.kept(mode, size).float().mean().item())
    if mode.kind == "diagonal" and mode.width < size[0]:
        w, b = mode.width, size[0]
        assert paper.share(mode, size) == ((2 * w + 1) * b - w * (w + 1)) / b**2


def test_both_windows_cost_the_same_where_places_divide_by_frames():
    for size in ((16, 4, 4), (16, 8, 8), (16, 16, 16), (4, 2, 2)):
        for width in range(4):
            assert paper.share(Mode("diagonal", width), size) == paper.share(Mode("multi-diagonal", width), size)
    assert paper.share(Mode("multi-diagonal"), (5, 4, 4)) == 1 / 16


# --- heads together -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(tables(6))
def test_fused_heads_are_heads_one_by_one(drawn):
    size, row = drawn[0], tuple(Mode(*made) for made in drawn[1])
    q, k, v, where = heads(size, len(row))
    one = [Sparse((mode,))(q[:, [i]], k[:, [i]], v[:, [i]], where) for i, mode in enumerate(row)]
    close(Sparse(row)(q, k, v, where), torch.cat(one, 1), 1e-6)


@settings(max_examples=40)
@given(tables(5), st.randoms(use_true_random=False))
def test_permuting_heads_permutes_outputs(drawn, dice):
    size, row = drawn[0], tuple(Mode(*made) for made in drawn[1])
    q, k, v, where = heads(size, len(row))
    p = dice.sample(range(len(row)), len(row))
    moved = Sparse(tuple(row[i] for i in p))(q[:, p], k[:, p], v[:, p], where)
    close(moved, Sparse(row)(q, k, v, where)[:, p], 1e-6)


def test_key_heads_may_be_shared_and_values_narrower():
    row = (Mode("diagonal", 1), FULL, SKIP, Mode("stripe", columns=(2,)))
    q, k, v, where = heads((3, 2, 2), 4, keys=2)
    k4, v4 = (x.repeat_interleave(2, 1) for x in (k, v))
    close(Sparse(row)(q, k, v, where), Sparse(row)(q, k4, v4, where), 0)
    close(Sparse(row)(q, k, v[..., :3], where), Sparse(row)(q, k, v, where)[..., :3])


PLUGS = {
    "narrow": Sparse((Mode("diagonal", 1), Mode("multi-diagonal", 1), Mode("stripe", columns=(0, 2)), FULL)),
    "one skipped": Sparse((SKIP, Mode("stripe", columns=(0,)), Mode("stripe", columns=(1,)), Mode("diagonal"))),
    "online": paper.Online(1, 6), "top blocks": paper.TopBlocks(2),
}  # fmt: skip


@pytest.mark.parametrize("plug", PLUGS.values(), ids=PLUGS)
def test_contract_of_attention(plug):
    contracts.attention(plug, blocks=(None,))


def test_gradients_are_those_of_the_masked_product():
    for mode in (Mode("diagonal", 1), Mode("multi-diagonal", 1), Mode("stripe", columns=(1, 2))):
        grads = []
        for how in (Sparse((mode,)), lambda *a, mode=mode: masked(mode, *a)):
            q, k, v, where = heads((5, 2, 2))
            inputs = [x.requires_grad_(True) for x in (q, k, v)]
            grads.append(torch.autograd.grad(how(*inputs, where).square().sum(), inputs))
        for a, b in zip(*grads, strict=True):
            close(a, b, 1e-4)


# --- work ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(tables(5))
def test_flops_are_the_blocks_that_are_computed(drawn):
    size, row = drawn[0], tuple(Mode(*made) for made in drawn[1])
    q, k, v, where = heads(size, len(row), b=1)
    n = q.shape[2]
    expected = sum(paper.share(mode, size) for mode in row) * 4 * n * n * 4
    assert measure.flops(lambda: Sparse(row)(q, k, v, where)) == round(expected)


def test_no_kernel_holds_a_score_matrix():
    q, k, v, where = heads((16, 8, 8), b=1, d=8)
    for mode in (Mode("diagonal", 1), Mode("multi-diagonal", 1), Mode("stripe", columns=(0, 9))):
        assert measure.peak(lambda mode=mode: Sparse((mode,))(q, k, v, where)) < 1024 * 1024  # a quarter of its floats


# --- in a model ---------------------------------------------------------------------------------------------------------


def test_the_model_is_left_alone_and_shares_its_weights():
    model, inputs = noisy_model(), call()
    before = model(*inputs)
    sparse = paper.sparsify(model, [[SKIP] * 4, [Mode("diagonal")] * 4])
    assert (sparse(*inputs) - before).abs().max() > 1e-3
    assert torch.equal(model(*inputs), before)
    assert sparse.state_dict().keys() == model.state_dict().keys()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(sparse.parameters(), model.parameters(), strict=True))


def test_a_guided_model_is_a_model_and_any_grid_will_do():
    model = noisy_model()
    table = [[Mode("multi-diagonal", 9)] * 4] * 2
    for side in (4, 8, 12):
        inputs = call(side=side)
        wide = paper.sparsify(Guided(model, 2.0), [[Mode("multi-diagonal", 99)] * 4] * 2)
        close(wide(*inputs), Guided(model, 2.0)(*inputs), 1e-4)
        assert torch.isfinite(paper.sparsify(model, table)(*inputs)).all()


def test_a_skipped_head_may_as_well_not_be_there():
    model, inputs = noisy_model(), call()
    table = [[FULL, SKIP, Mode("diagonal", 1), SKIP], [SKIP] * 4]
    sparse = paper.sparsify(model, table)
    silent = noisy_model()
    with torch.no_grad():
        for (_, layer), row in zip(paper.layers(silent), table, strict=True):
            for head, mode in enumerate(row):
                layer.o.weight[:, 8 * head : 8 * head + 8] *= mode != SKIP
    rest = paper.sparsify(silent, [[m if m != SKIP else FULL for m in row] for row in table])
    close(sparse(*inputs), rest(*inputs))
    small = paper.without_skipped(sparse)
    close(small(*inputs), sparse(*inputs))
    assert [layer.heads for _, layer in paper.layers(small)] == [2, 1] and paper.layers(sparse)[0][1].heads == 4
    assert measure.parameters(model) - measure.parameters(small) == 5 * (4 * 8 * 32 + 3 * 8)
    assert measure.flops(lambda: small(*inputs)) < measure.flops(lambda: sparse(*inputs))


def test_models_by_time():
    model = noisy_model()
    sparse = paper.sparsify(model, [[SKIP] * 4] * 2)
    both = paper.ByTime([model, sparse], [0.5])
    x, _, cond = call()
    for t, one in ((0.9, model), (0.6, model), (0.5, sparse), (0.1, sparse)):
        t = torch.full((2,), t)
        assert torch.equal(both(x, t, cond), one(x, t, cond))


# --- the search -----------------------------------------------------------------------------------------------------------


def once(model):
    """A calibration: one call."""
    return model(*call())


def random_losses(seed=0):
    dice = torch.Generator().manual_seed(seed)
    error = torch.rand(3, 4, 5, generator=dice) + 0.01
    error[..., 0], error[..., 1] = 0, 1
    return error, torch.tensor([1.0, 0.0, 0.2, 0.2, 0.3])


@settings(max_examples=40)
@given(st.integers(0, 99))
def test_laws_of_the_search(seed):
    error, cost = random_losses(seed)
    inf = float("inf")
    assert (paper.search(error, cost, 0.5, 0.0) == 0).all()
    assert torch.equal(paper.search(error, cost, 0.5, inf), (error + 0.5 * cost)[..., 1:].argmin(-1) + 1)
    assert torch.equal(paper.search(error, cost, 0.0, inf), error[..., 1:].argmin(-1) + 1)
    assert (paper.search(error, cost, 1e6, inf) == 1).all()
    sparse = [(paper.search(error, cost, 0.5, eps) > 0).sum().item() for eps in torch.linspace(0, 1.5, 30).tolist()]
    assert sparse == sorted(sparse) and sparse[-1] == 12


@settings(max_examples=40)
@given(st.integers(0, 99), st.floats(0.3, 0.9))
def test_tolerance_is_the_least_epsilon_that_is_cheap_enough(seed, most):
    error, cost = random_losses(seed)
    epsilon = paper.tolerance(error, cost, most)
    mean = lambda epsilon: cost[paper.search(error, cost, 0.5, epsilon)].mean().item()
    assert mean(epsilon) <= most + 1e-6 < mean(epsilon - 1e-6)
    with pytest.raises(ValueError, match="can't be met: the candidates cost"):
        paper.tolerance(error, cost + 1, most)


def test_errors_are_measured_on_what_the_model_computes():
    model = noisy_model()
    tables = paper.candidates(model, once, width=0, columns=1)
    found = paper.errors(model, lambda m: (once(m), once(m)), tables)
    assert found.shape == (2, 2, 2, 4, 5) and torch.equal(found[0], found[1])
    assert (found[..., 0] == 0).all()
    close(found[..., 1].mean(-1), torch.ones(2, 2, 2), 1e-6)  # MSE(0, O_0) = mean(O_0^2), and that is the unit
    seen = []
    attend = lambda q, k, v, where: seen.append((q, k, v, where)) or dense(q, k, v, where)
    once(paper.swap(model, {f"{name}.attend": attend for name, _ in paper.layers(model)}))
    for layer, (q, k, v, where) in enumerate(seen):
        full = dense(q, k, v, where)
        for i, mode in ((2, Mode("diagonal")), (3, Mode("multi-diagonal"))):
            gap = (masked(mode, q, k, v, where) - full).square().mean((2, 3))
            close(found[0, :, layer, :, i], gap / full.square().mean((1, 2, 3))[:, None], 1e-4)
        close(found[0, :, layer, :, 1], full.square().mean((2, 3)) / full.square().mean((1, 2, 3))[:, None])
        received = scores(q, k, where).sum((0, 2)).view(4, 4, 4).sum(-1)  # k f
        assert [mode.columns for mode in tables[4][layer]] == [(i,) for i in received.argmax(-1).tolist()]


def planted(kinds):
    """One layer whose heads do what `kinds` says: q and k are constants, so only the rotary turn tells tokens apart."""
    model = noisy_model(1, 128)
    layer = model.trunk.blocks[0].attention
    with torch.no_grad():
        for part in (layer.q, layer.k):
            part.weight.zero_(), part.bias.zero_()
        for same in (model.inlet.project.bias, model.mod.weight, model.mod.bias, model.trunk.blocks[0].table, layer.v.bias):
            same.zero_()  # what all tokens share would look alike through any window
        for head, kind in enumerate(kinds):
            rows = torch.arange(16) + 32 * head  # the first half of a pair, (1, 0), turned by its angle
            for part in (layer.q, layer.k):
                if kind == "frame":
                    part.bias[rows[layer.axis == 0]] = 8.0
                if kind == "place":
                    part.bias[rows[layer.axis > 0]] = 8.0
            if kind == "nothing":
                layer.v.weight[32 * head : 32 * head + 32], layer.v.bias[32 * head : 32 * head + 32] = 0, 0
    return model


def test_the_search_finds_what_heads_do():
    model = planted(("frame", "place", "all", "nothing"))
    calibrate = lambda m: m(*call(f=4, side=8))  # 4 x 4 x 4 tokens
    tables = paper.candidates(model, calibrate, width=0, columns=1)
    error = paper.errors(model, calibrate, tables).mean((0, 1))
    cost = torch.tensor([paper.share(table[0][0], (4, 4, 4)) for table in tables])
    (row,) = paper.assemble(paper.search(error, cost, 0.1, 0.1), tables)
    assert [mode.kind for mode in row] == ["diagonal", "multi-diagonal", "full", "skip"], error


def test_searching_in_turn_sees_sparse_layers_before():
    model = noisy_model()
    tables = paper.candidates(model, once, width=0, columns=1)
    cost = torch.tensor([1.0, 0.0, 0.25, 0.25, 0.25])
    found = paper.errors(model, once, tables).mean((0, 1))
    at_once, in_turn = paper.search(found, cost, epsilon=9.0), paper.search_in_turn(model, once, tables, cost, epsilon=9.0)
    assert torch.equal(in_turn[0], at_once[0])
    behind = paper.sparsify(model, paper.assemble(torch.stack([at_once[0], torch.zeros(4).long()]), tables))
    again = paper.errors(behind, once, tables).mean((0, 1))
    assert torch.equal(in_turn[1], paper.search(again, cost, epsilon=9.0)[1])


# --- rivals ---------------------------------------------------------------------------------------------------------------


def test_online_takes_the_better_window_for_every_sample_and_head():
    q, k, v, where = heads((4, 2, 2), 3)
    o = paper.Online(0, 16)(q, k, v, where)  # all 16 rows are looked at
    both = torch.stack([masked(Mode(kind), q, k, v, where) for kind in ("diagonal", "multi-diagonal")])
    best = (both - dense(q, k, v, where)).square().mean((3, 4)).argmin(0)
    assert 0 < best.float().mean() < 1
    close(o, torch.where(best[..., None, None] == 0, both[0], both[1]))


def test_top_blocks_reads_the_blocks_that_agree():
    q, k, v, where = heads((4, 2, 2), 2)
    close(paper.TopBlocks(4)(q, k, v, where), dense(q, k, v, where))
    o = paper.TopBlocks(2)(q, k, v, where)
    mean = lambda x: rearrange(x, "b k (f s) d -> b k f s d", f=4).mean(3)
    chosen = (mean(q) @ mean(k).mT).topk(2).indices  # b k i c
    mask = torch.zeros(2, 2, 4, 4).scatter(-1, chosen, 1).bool().repeat_interleave(4, 2).repeat_interleave(4, 3)
    close(o, (q @ k.mT / 2).masked_fill(~mask, -torch.inf).softmax(-1) @ v)


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_refusals():
    q, k, v, where = heads((3, 2, 2), 2)
    with pytest.raises(ValueError, match="a mode is one of full, skip"):
        Mode("diagonals")
    with pytest.raises(ValueError, match="a stripe keeps columns"):
        Mode("stripe")
    with pytest.raises(ValueError, match="don't fit 2 heads, 3 frames"):
        Sparse((FULL,))(q, k, v, where)
    with pytest.raises(ValueError, match="don't fit 2 heads, 3 frames: search them anew"):
        Sparse((FULL, Mode("stripe", columns=(3,))))(q, k, v, where)
    for places, why in ((grid(3, 2, 2, block=1), "blocks that mustn't"), (where.seen_from(where), "a cache")):
        with pytest.raises(ValueError, match=why):
            Sparse((FULL, FULL))(q, k, v, places)
    with pytest.raises(ValueError, match="has no grid"):
        Sparse((FULL, FULL))(q, k, v, where.join(grid(1, 1, 1)))
    with pytest.raises(ValueError, match=r"table has \[4\] heads by layer, the model \[4, 4\]"):
        paper.sparsify(noisy_model(), [[FULL] * 4])


def test_what_the_lesson_shows_was_made_with_the_shipped_weights():
    _, header = weights.read(ROOT / "notebooks" / "papers" / "sparse-vdit.safetensors")
    digest = lambda name: hashlib.sha256(weights.path_of(name).read_bytes()).hexdigest()[:12]
    assert header["weights"] == f"{digest('frames')} {digest('tok-f')}", "run `python scripts/make_explorer.py`"


def test_sampling_with_a_sparse_model():
    model = noisy_model()
    x, _, cond = call()
    one = noise.sample(paper.sparsify(model, [[Mode("diagonal", 3)] * 4] * 2), noise.flow(), x, cond, noise.table(3, 4))
    close(one, noise.sample(model, noise.flow(), x, cond, noise.table(3, 4)), 1e-3)
    assert isinstance(paper.layers(model)[0][1], Attention)
