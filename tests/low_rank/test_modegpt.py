"""MoDeGPT: full width is the model, a width that carries nothing goes for nothing, each cut is the best of its kind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minivid.core import weights
from minivid.core.attention import rotate
from minivid.core.baselines.lowrank import svd
from minivid.core.model import Cond, Guided, VideoModel
from minivid.core.surgery import Gram, swap, tap
from minivid.lab import measure
from minivid.low_rank import modegpt as paper
from minivid.low_rank.modegpt import Pair

double = dict(dtype=torch.float64)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def rows(n=300, d=12, seed=0):
    """Rows of unequal, correlated channels."""
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=dice, **double) * torch.logspace(-1, 0.5, d)
    return x @ torch.randn(d, d, generator=dice, **double)


def gram(x):
    accumulator = Gram()
    accumulator.add(x)
    return accumulator.xx


# --- models: ours, PyTorch's, and somebody's ----------------------------------------------------------------------------


def video(depth=3, size=48, heads=2, seed=0):
    """A small video model whose every parameter is random, as if trained (a fresh one says 0)."""
    torch.manual_seed(seed)
    model = VideoModel(4, size, depth, heads)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval().requires_grad_(False)


def calls(n=6, b=4, f=2, seed=1):
    """Batches for a video model: n x b clips of f frames of 3 x 3 tokens, four words each."""
    dice = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(b, 4, f, 6, 6, generator=dice)
    return [(draw(), torch.rand(b, generator=dice), Cond(text=torch.randint(2, 200, (b, 4), generator=dice))) for _ in range(n)]


class Foreign(nn.Module):
    """Somebody's language model: grouped heads, no rotation, no biases but those of q, k, v, and a gated feed-forward."""

    class Attention(nn.Module):
        def __init__(self, d, heads, key_heads):
            super().__init__()
            self.num_heads, self.num_key_value_heads, narrow = heads, key_heads, d // heads * key_heads
            self.q_proj, self.o_proj = nn.Linear(d, d), nn.Linear(d, d, bias=False)
            self.k_proj, self.v_proj = nn.Linear(d, narrow), nn.Linear(d, narrow)

        def forward(self, x):
            split = lambda y, k: rearrange(y, "b n (k d) -> b k n d", k=k)
            q = split(self.q_proj(x), self.num_heads)
            k, v = (split(part(x), self.num_key_value_heads) for part in (self.k_proj, self.v_proj))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.o_proj(rearrange(o, "b k n d -> b n (k d)"))

    class Layer(nn.Module):
        def __init__(self, d, heads, key_heads):
            super().__init__()
            self.self_attn = Foreign.Attention(d, heads, key_heads)
            self.gate_proj, self.up_proj, self.down_proj = (
                nn.Linear(a, b, bias=False) for a, b in ((d, 3 * d), (d, 3 * d), (3 * d, d))
            )

        def forward(self, x):
            x = x + self.self_attn(F.layer_norm(x, x.shape[-1:]))
            y = F.layer_norm(x, x.shape[-1:])
            return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))

    def __init__(self, d=32, depth=3, heads=4, key_heads=2):
        super().__init__()
        self.layers = nn.ModuleList(Foreign.Layer(d, heads, key_heads) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def foreign():
    torch.manual_seed(0)
    return Foreign().eval().requires_grad_(False)


PLAIN = tuple(f"layers.{i}.self_attn" for i in range(3))
TEXTS = [torch.randn(4, 30, 32, generator=torch.Generator().manual_seed(i)) for i in range(5)]


def encoder():
    """PyTorch's own transformer: its attention is fused and stays, its feed-forward can shrink."""
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True), 2).eval()


MODELS = {
    "video": (video, calls(), dict(within="trunk")),
    "foreign": (foreign, TEXTS, dict(plain=PLAIN)),
    "encoder": (encoder, TEXTS, {}),
}
each = pytest.mark.parametrize("kind", MODELS)


def call(model, batch):
    with torch.no_grad():
        return model(*batch) if isinstance(batch, tuple) else model(batch)


def seen(model, batches, **where):
    pairs = paper.find(model, **where)
    return pairs, paper.observe(model, pairs, batches)


# --- the law of limits --------------------------------------------------------------------------------------------------


@each
def test_full_width_is_the_model(kind):
    make, batches, where = MODELS[kind]
    model = make()
    thin = paper.compress(model, batches, 1.0, **where)
    assert torch.equal(call(thin, batches[0]), call(model, batches[0]))
    assert thin.state_dict().keys() == model.state_dict().keys()


@each
def test_every_cut_at_full_width_says_the_same(kind):
    """Nothing is skipped here: all units are fitted by all, all values pass through C^1/2 and back."""
    make, batches, where = MODELS[kind]
    model = make()
    pairs, found = seen(model, batches, **where)
    new = {}
    for p in pairs:
        own = [model.get_submodule(name) for name in p.layers]
        if p.kind == "mlp":
            keep = torch.arange(p.full)
            made = paper.cut_mlp(own, keep, paper.nystroem(found.gram[p.layers[-1]], keep))
        elif p.kind == "vo":
            made = paper.cut_vo(*own, p, found.gram[p.layers[0]], p.full)
        else:
            made = paper.cut_qk(*own, p, torch.arange(p.full).expand(p.key_heads, -1))
        new |= dict(zip(p.layers, made, strict=True))
    before, after = call(model, batches[0]), call(swap(model, new), batches[0])
    assert (after - before).norm() < 1e-4 * before.norm()


def test_what_carries_nothing_goes_for_nothing():
    """Dead hidden units, heads of low rank and silent rotary pairs: the halved model is the model."""
    model, batches = video(), calls()
    dice = torch.Generator().manual_seed(3)
    for p in paper.find(model, "trunk"):
        first, last = (model.get_submodule(p.layers[i]) for i in (0, -1))
        if p.kind == "mlp":
            gone = torch.randperm(p.full, generator=dice)[: p.full // 2]
            first.weight[gone], first.bias[gone] = 0, 0  # gelu(0) = 0
        elif p.kind == "vo":
            first.weight.view(p.heads, 2, p.full // 2, -1)[:, 1] = first.weight.view(p.heads, 2, p.full // 2, -1)[:, 0]
        else:
            for layer in (first, last):
                shaped = layer.weight.view(p.heads, 2, p.full // 2, -1) if p.rotary else layer.weight.view(p.heads, 1, p.full, -1)
                bias = layer.bias.view(shaped.shape[:-1])
                for head in range(p.heads):  # other pairs in every head
                    gone = torch.randperm(shaped.shape[2], generator=torch.Generator().manual_seed(head))[: shaped.shape[2] // 2]
                    shaped[head, :, gone], bias[head, :, gone] = 0, 0
    thin = paper.compress(model, batches, 0.5, float("inf"), "trunk")
    assert 0.45 < shrunk(model, thin) <= 0.51
    for batch in calls(2, seed=9):
        close(call(thin, batch), call(model, batch), 1e-3)


def shrunk(model, thin):
    """Share of the trunk's matrices that is left."""
    size = lambda m: sum(p.numel() for name, p in m.named_parameters() if "trunk" in name and p.ndim == 2 and "table" not in name)
    return size(thin) / size(model)


# --- type I -------------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 12))
def test_nystroem_is_least_squares(seed, k):
    h, down = rows(seed=seed), torch.randn(12, 5, generator=torch.Generator().manual_seed(seed), **double)
    c = gram(h)
    keep = paper.leverage(c).topk(k).indices.sort().values
    new = paper.nystroem(c, keep) @ down
    close(new, torch.linalg.lstsq(h[:, keep], h @ down).solution, 1e-6)
    rest = h @ down - h[:, keep] @ new
    assert (h[:, keep].T @ rest).abs().max() < 1e-6 * h.norm() * (h @ down).norm()
    if k == 12:
        close(paper.nystroem(c, keep), torch.eye(12, **double), 1e-6)


def test_leverage():
    c = gram(rows())
    values = torch.linalg.eigvalsh(c)
    for ridge in (1e-6, 1e-2, 1.0):
        s, limit = paper.leverage(c, ridge), ridge * values.mean()
        assert (s >= 0).all() and (s < 1).all()
        close(s.sum(), (values / (values + limit)).sum(), 1e-8)  # the effective dimension
        close(s, (c @ torch.linalg.inv(c + limit * torch.eye(12))).diagonal(), 1e-8)
        close(paper.leverage(7 * c, ridge), s, 1e-8)  # in units of C
    close(paper.leverage(c, 1e-9), torch.ones(12, **double), 1e-4)


def test_a_unit_that_repeats_another_costs_nothing():
    h, down = rows(), torch.randn(12, 5, generator=torch.Generator().manual_seed(1), **double)
    h[:, 7] = -2 * h[:, 3]
    c = gram(h)
    keep = torch.tensor([i for i in range(12) if i != 7])
    close(h[:, keep] @ paper.nystroem(c, keep) @ down, h @ down, 1e-8)
    least = paper.leverage(c, 1e-6).topk(2, largest=False).indices
    assert set(least.tolist()) == {3, 7}  # either can stand in for the other, and nobody for the rest


def test_units_are_seen_after_activation_and_gate():
    model = foreign()
    p = next(p for p in paper.find(model) if p.kind == "mlp")
    assert p.layers == tuple(f"layers.0.{name}_proj" for name in ("up", "gate", "down"))
    found = paper.observe(model, [p], TEXTS)
    with tap(model, ["layers.0.gate_proj", "layers.0.up_proj", "layers.0.down_proj"]) as said:
        model(torch.cat(TEXTS))
    up, gate, _ = (said[name].flatten(0, 1).double() for name in p.layers)
    h = F.silu(gate) * up
    close(found.gram["layers.0.down_proj"], h.T @ h, 1e-4)
    keep = paper.leverage(h.T @ h).topk(50).indices.sort().values
    new = paper.cut_mlp([model.get_submodule(name) for name in p.layers], keep, paper.nystroem(h.T @ h, keep))
    down = model.layers[0].down_proj.weight.T.double()
    close(new[2].weight.T.double(), torch.linalg.lstsq(h[:, keep], h @ down).solution, 1e-4)
    close(new[0].weight, model.layers[0].up_proj.weight[keep], 0)
    close(new[1].weight, model.layers[0].gate_proj.weight[keep], 0)


# --- type II ------------------------------------------------------------------------------------------------------------


def test_columns_of_the_root_are_on_the_diagonal():
    c = gram(rows())
    root, inverse = paper.roots(c, 0.0)
    close(root @ root, c, 1e-8)
    close(root @ inverse, torch.eye(12, **double), 1e-6)
    close(root.norm(dim=0) ** 2, c.diagonal(), 1e-8)
    lower = torch.linalg.cholesky(c)
    close(lower.norm(dim=1) ** 2, c.diagonal(), 1e-8)  # of Cholesky's factor the rows, not the columns
    assert ((lower.norm(dim=0) ** 2 - c.diagonal()).abs() > 0.1 * c.diagonal()).any()


def test_scores_by_hand():
    q, k = rows(50, 8).view(50, 4, 2).permute(2, 0, 1), rows(50, 4, seed=1)[None]  # 2 query heads, 1 key head, 4 numbers
    c_q, c_k = q.mT @ q, k.mT @ k
    single = sum(q[i].norm(dim=0) * k[0].norm(dim=0) for i in range(2))
    close(paper.products(c_q, c_k, rotary=False), single[None], 1e-8)
    squares = sum(q[i].square().sum(0) * k[0].square().sum(0) for i in range(2))
    close(paper.products(c_q, c_k, rotary=True), (squares[:2] + squares[2:])[None], 1e-8)


@pytest.mark.parametrize("kind", ["video", "foreign"])
def test_cutting_is_zeroing(kind):
    """Narrow queries and keys say what the wide ones with zeros say: places, frequencies and the softmax's scale are kept."""
    make, batches, where = MODELS[kind]
    model = make()
    pairs, found = seen(model, batches, **where)
    pairs = [p for p in pairs if p.kind == "qk"]
    thin = paper.shrink(model, found, {p: p.full // 2 for p in pairs})
    silent = copy.deepcopy(model)
    for p in pairs:
        score = paper.products(*(found.gram[name] for name in p.layers), p.rotary)
        gone = score.topk(score.shape[1] // 2, largest=False).indices
        for name, heads in zip(p.layers, (p.heads, p.key_heads), strict=True):
            layer = silent.get_submodule(name)
            for head in range(heads):
                mine = gone[head * len(gone) // heads]
                mine = torch.cat([mine, mine + p.full // 2]) if p.rotary else mine
                layer.weight[head * p.full + mine], layer.bias[head * p.full + mine] = 0, 0
    for batch in batches[:2]:
        close(call(thin, batch), call(silent, batch), 1e-4)
        assert (call(thin, batch) - call(model, batch)).abs().max() > 1e-3
    if kind == "video":
        part = thin.trunk.blocks[1].attention
        assert part.q.out_features == 24 and part.width == 24 and part.axis.shape == part.freq.shape == (2, 6)
        assert model.trunk.blocks[1].attention.axis.shape == (12,)


def test_queries_and_keys_are_seen_after_their_turn():
    model, batches = video(1), calls(3)
    pairs, found = seen(model, batches, within="trunk")
    attention, gathered = model.trunk.blocks[0].attention, []
    attend = lambda q, k, v, where: gathered.append((q, k)) or attention.attend(q, k, v, where)
    for batch in batches:
        call(swap(model, {"trunk.blocks.0.attention.attend": attend}), batch)
    for i, name in enumerate(("q", "k")):
        x = rearrange(torch.cat([pair[i] for pair in gathered]), "b k n d -> k (b n) d").double()
        close(found.gram[f"trunk.blocks.0.attention.{name}"], x.mT @ x, 1e-6)
    with tap(model, ["trunk.blocks.0.attention.q"]) as said:
        call(model, batches[-1])
    q = rearrange(said["trunk.blocks.0.attention.q"], "b n (k d) -> b k n d", k=2)
    assert not torch.allclose(q, gathered[-1][0])
    assert rotate(q, torch.zeros(1, 18, 3), attention.axis, attention.freq).equal(q)  # nothing turns at place 0


# --- type III -----------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(0, 6))
def test_the_error_of_values_is_the_tail_of_singular_values(seed, rank):
    dice = torch.Generator().manual_seed(seed)
    x, v, o = rows(seed=seed), torch.randn(2, 12, 6, generator=dice, **double), torch.randn(2, 6, 12, generator=dice, **double)
    thin_v, thin_o = paper.values(gram(x), v, o, rank, ridge=1e-12)
    assert thin_v.shape == (2, 12, rank) and thin_o.shape == (2, rank, 12)
    for head in range(2):
        rest = x @ v[head] @ o[head] - x @ thin_v[head] @ thin_o[head]
        tail = torch.linalg.svdvals(x @ v[head] @ o[head])[rank:]
        close(rest.square().sum(), tail.square().sum(), 1e-5)
        a, b = svd((v[head] @ o[head]).T, rank, gram(x))  # one large decomposition instead of two small ones
        close(thin_v[head] @ thin_o[head], (a @ b).T, 1e-5)


def test_values_of_low_rank_are_exact_and_dead_inputs_no_trouble():
    x, v = rows(), rows(12, 6, seed=2)[None]
    v[..., 3:] = v[..., :3]
    o = rows(6, 12, seed=3)[None]
    thin_v, thin_o = paper.values(gram(x), v, o, 3)
    close(thin_v @ thin_o, v @ o, 1e-3)
    x[:, 5] = 0
    thin_v, thin_o = paper.values(gram(x[:4]), v, o, 3)  # fewer rows than channels
    assert thin_v.isfinite().all() and thin_v.abs().max() < 1e4
    close(x[:4] @ thin_v[0] @ thin_o[0], x[:4] @ v[0] @ o[0], 1e-2)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_heads_sum_to_the_attention_and_the_bias_of_values_is_folded(key_heads):
    torch.manual_seed(0)
    v, o = nn.Linear(16, 4 * key_heads), nn.Linear(16, 16)
    p = Pair("vo", "", ("v", "o"), 4, 4, key_heads)
    x = rows(40, 16).float()
    with torch.no_grad():
        new_v, new_o = paper.cut_vo(v, o, p, gram(x), 4)
        share = torch.randn(4, 40, 40).softmax(-1)  # any attention: its rows sum to 1

        def attention(v, o):
            heads = rearrange(v(x), "n (g e) -> g n e", g=key_heads).repeat_interleave(4 // key_heads, 0)
            return o(rearrange(share @ heads, "k n e -> n (k e)"))

        close(attention(new_v, new_o), attention(v, o), 1e-4)
        assert new_v.bias is None and (new_o.bias - o.bias).abs().max() > 0.01
        new_v, new_o = paper.cut_vo(v, o, p, gram(x), 2)
        assert new_v.out_features == 2 * key_heads and new_o.in_features == 8


# --- how much goes where ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0.05, 0.75), st.floats(0.01, 10))
def test_allocation(s, average, epsilon):
    phi = paper.allocate(torch.tensor(s), average, epsilon)
    assert phi.mean().item() == pytest.approx(average) and phi.min() >= 0 and phi.max() <= 0.8 + 1e-12
    for i in range(len(s)):
        for j in range(len(s)):
            assert s[i] <= s[j] or phi[i] <= phi[j] + 1e-9
    free = phi < 0.8 - 1e-9
    wanted = (-torch.tensor(s).double() / epsilon).softmax(0)
    if free.any():  # among those below the cap, in proportion to the softmax
        close(phi[free] / phi[free].sum(), wanted[free] / wanted[free].sum(), 1e-6)


def test_limits_of_the_allocation():
    s = torch.tensor([0.3, 0.1, 0.2, 0.4])
    close(paper.allocate(s, 0.3, float("inf")), torch.full((4,), 0.3, **double))
    close(paper.allocate(torch.full((4,), 0.2), 0.3, 0.01), torch.full((4,), 0.3, **double))
    close(paper.allocate(s, 0.3, 1e-4), torch.tensor([0.0, 0.8, 0.4, 0.0], **double))  # 0.8 + 0.4 = 4 x 0.3
    close(paper.allocate(s, 0.1, 0.5), 0.4 * (-s.double() / 0.5).softmax(0))
    for wrong in ((0.9, 0.1), (-0.1, 0.1), (0.3, 0.0)):
        with pytest.raises(ValueError, match="average <= cap"):
            paper.allocate(s, *wrong)


def test_the_allocation_maximises_what_it_says():
    """The closed form beats whatever is near it at the same mean."""
    s, epsilon = torch.tensor([0.3, 0.1, 0.2, 0.4], **double), 0.2
    worth = lambda phi: (s * (1 - phi)).sum() - epsilon * (phi * phi.log()).sum()
    phi, dice = paper.allocate(s, 0.2, epsilon), torch.Generator().manual_seed(0)
    for _ in range(50):
        step = 0.02 * torch.randn(4, generator=dice, **double)
        assert worth(phi + step - step.mean()) <= worth(phi)


# --- whole models -------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("share", [0.5, 0.72])
def test_sizes_and_reloading(kind, share, tmp_path):
    make, batches, where = MODELS[kind]
    model = make()
    pairs, found = seen(model, batches, **where)
    spread = torch.tensor(list(found.influence.values())).std().item()
    widths = paper.plan(model, pairs, found.influence, share, 2 * spread)
    thin = paper.shrink(model, found, widths)
    full = sum(p.size(model, p.full) for p in pairs)
    size = sum(p.size(model, w) for p, w in widths.items())
    assert share - 0.01 < size / full <= share
    matrices = lambda m: sum(part.weight.numel() for part in m.modules() if isinstance(part, nn.Linear))
    assert matrices(model) - matrices(thin) == full - size
    for p in pairs:
        for old, new in ((model.get_submodule(name), thin.get_submodule(name)) for name in p.layers):
            assert type(new) is nn.Linear and new.weight.numel() * p.full == old.weight.numel() * widths[p]
    if len({p.block for p in pairs}) > 1:
        assert len({w for p, w in widths.items() if p.kind == "mlp"}) > 1  # unequal widths
    weights.write(tmp_path / "thin.safetensors", thin.state_dict(), {})
    again = paper.reload(model, weights.read(tmp_path / "thin.safetensors")[0])
    assert torch.equal(call(again, batches[0]), call(thin, batches[0]))
    assert measure.parameters(again) == measure.parameters(thin) < measure.parameters(model)


@each
def test_the_model_is_left_alone_and_may_be_shrunk_again(kind):
    make, batches, where = MODELS[kind]
    model = make()
    before, state = call(model, batches[0]), copy.deepcopy(model.state_dict())
    thin = paper.compress(model, batches, 0.7, **where)
    assert (call(thin, batches[0]) - before).abs().max() > 1e-4
    assert torch.equal(call(model, batches[0]), before)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert (call(paper.compress(thin, batches, 1.0, **where), batches[0]) - call(thin, batches[0])).abs().max() < 1e-5
    twice = paper.compress(thin, batches, 0.7, **where)
    assert measure.parameters(twice) < measure.parameters(thin) and call(twice, batches[0]).isfinite().all()


@each
def test_less_is_worse_but_far_better_than_nothing_at_all(kind):
    make, batches, where = MODELS[kind]
    model, error = make(), []
    for share in (0.9, 0.7, 0.5):
        thin = paper.compress(model, batches, share, **where)
        error.append((call(thin, batches[0]) - call(model, batches[0])).norm() / call(model, batches[0]).norm())
    assert error[0] < error[1] < error[2] < 1


def test_influence_is_one_minus_the_mean_cosine():
    model, batches = video(2), calls(2)
    _, found = seen(model, batches, within="trunk")
    with tap(model, ["trunk.blocks.0", "trunk.blocks.1"]) as said:
        each = []
        for batch in batches:
            call(model, batch)
            each.append(F.cosine_similarity(said["trunk.blocks.0"], said["trunk.blocks.1"], dim=-1).flatten())
    assert found.influence["trunk.blocks.1"] == pytest.approx(1 - torch.cat(each).mean().item(), abs=1e-5)
    assert list(found.influence) == ["trunk.blocks.0", "trunk.blocks.1"]


def test_a_guided_model_and_any_grid():
    model = video()
    thin = paper.compress(model, calls(), 0.8, within="trunk")
    x, t, cond = calls(1, f=3, seed=4)[0]
    both = paper.compress(Guided(model, 2.0), calls(), 0.8, within="model.trunk")
    assert both(x, t, cond).shape == Guided(thin, 2.0)(x, t, cond).shape == x.shape


def test_what_is_found():
    found = paper.find(video(1), "trunk")
    assert [(p.kind, p.full, p.rotary, p.rescale) for p in found] == [
        ("qk", 24, True, False), ("vo", 24, False, False), ("qk", 24, False, True), ("vo", 24, False, False),
        ("mlp", 144, False, False),
    ]  # fmt: skip
    assert {p.kind for p in paper.find(foreign())} == {"mlp", "vo"}  # who knows whether it rotates
    assert {p.kind for p in paper.find(foreign(), plain=PLAIN)} == {"mlp", "qk", "vo"}
    assert {p.kind for p in paper.find(encoder())} == {"mlp"}
    with pytest.raises(ValueError, match="no block within 'head' has"):
        paper.find(video(1), "head")


def test_normed_queries_and_keys_are_left_alone():
    model = video(1)
    model.trunk.blocks[0].attention.q_norm = nn.RMSNorm(24)
    kinds = [(p.kind, p.layers[0]) for p in paper.find(model, "trunk")]
    assert ("qk", "trunk.blocks.0.attention.q") not in kinds and ("vo", "trunk.blocks.0.attention.v") in kinds
    scaled = foreign()
    scaled.layers[0].self_attn.scaling = 8**-0.5  # a fixed number: nothing to make up for
    assert [p.rescale for p in paper.find(scaled, plain=PLAIN) if p.kind == "qk"] == [False, True, True]


def test_too_much_is_refused():
    model = video(1)
    pairs, found = seen(model, calls(1), within="trunk")
    with pytest.raises(ValueError, match="at most 0.8 of a block may go, and that leaves more"):
        paper.plan(model, pairs, found.influence, 0.1, 0.1)
    with pytest.raises(ValueError, match="never called"):
        paper.observe(model, pairs, [])
