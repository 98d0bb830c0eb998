"""FlashSVD: streaming is the ordinary low-rank model, at full rank the dense one; memory and FLOPs are those of the formulas."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minivid.claims import flashsvd as claim
from minivid.core import surgery, weights
from minivid.core.attention import dense, rotary_pairs, rotate
from minivid.core.baselines.lowrank import Factored
from minivid.core.cache import Cache
from minivid.core.model import Block, Cond, Context, VideoModel
from minivid.core.where import Where, grid
from minivid.lab import measure
from minivid.low_rank import flashsvd as paper
from minivid.low_rank.flashsvd import PerHead, Streamed, StreamedLayer, Tiles

D, HEADS, E = 16, 2, 8
sizes = st.integers(1, 9)
TILES = st.builds(Tiles, sizes, sizes, sizes, sizes, st.none() | sizes, sizes)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a, b, tolerance=None):
    """Equal up to rounding: 1e-10 in double, 1e-4 in single precision, of the largest value."""
    tolerance = tolerance or (1e-10 if a.dtype == torch.float64 else 1e-4)
    assert a.dtype == b.dtype and a.shape == b.shape and a.isfinite().all()
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def random_block(key_heads=None, ratio=3, dtype=torch.float64, seed=0):
    """A block of ours whose every parameter is random (a fresh one has closed gates)."""
    torch.manual_seed(seed)
    block = Block(D, HEADS, key_heads, ratio).requires_grad_(False).eval()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    return block.to(dtype)


def context(f=3, h=2, w=2, b=2, captions=1, block=None, dtype=torch.float64):
    words = draw(b, captions, 4, D, seed=3, dtype=dtype)
    mask = torch.tensor([True, True, True, False]).expand(b, captions, 4)
    return Context(grid(f, h, w, 2.0, block), draw(b, f, 6 * D, seed=2, dtype=dtype), words, mask)


def low_rank(block, rank=3, wide=5, grams=None):
    return paper.factorise(nn.ModuleList([block]), rank, wide, grams)[0]


# --- the law of limits ----------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), TILES, st.integers(0, E), st.integers(0, D),
       st.sampled_from((1, 2)), st.sampled_from((torch.float64, torch.float32)))  # fmt: skip
def test_streaming_is_the_low_rank_block(size, tiles, rank, wide, variant, dtype):
    low, ctx = low_rank(random_block(dtype=dtype), rank, wide), context(*size, dtype=dtype)
    x = draw(2, size[0] * size[1] * size[2], D, dtype=dtype)
    close(Streamed(low, tiles, variant)(x, ctx), low(x, ctx))


@pytest.mark.parametrize("variant", [1, 2])
def test_at_full_rank_it_is_the_dense_block(variant):
    block, ctx, x = random_block(), context(), draw(2, 12, D, dtype=torch.float64)
    close(Streamed(low_rank(block, E, D), Tiles(5, 7, 3, 6, 4, 9), variant)(x, ctx), block(x, ctx))


def test_what_a_call_may_bring_is_handled_as_the_block_does():
    x = draw(2, 12, D, dtype=torch.float64)
    many = Tiles(5, 5, 2, 7, 2, 6)
    for key_heads, told in itertools.product((1, 2), (
        context(captions=3), replace(context(), text=None, text_mask=None), replace(context(), mod=None),
        context(block=1), replace(context(), where=Where(draw(1, 12, 3, seed=5), torch.arange(12).flip(0)[None] // 4)),
        replace(context(), where=Where(draw(2, 2, 12, 3, seed=5).double())),
    )):  # fmt: skip
        low = low_rank(random_block(key_heads))
        if told.where.coords.ndim == 4 and key_heads == 1:
            continue  # places for each of two heads don't fit one key head
        close(Streamed(low, many)(x, told), low(x, told))
    low.attention.width = 2  # heads that surgery narrowed or widened keep their scale
    close(Streamed(low, many)(x, context()), low(x, context()))


def small_model(block=None, dtype=torch.float64):
    torch.manual_seed(0)
    model = VideoModel(3, D, 2, HEADS, block=block).requires_grad_(False).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.to(dtype)


@pytest.mark.parametrize("causal", [None, 1, 2])
def test_a_whole_model_and_the_original_stays(causal):
    model = small_model(causal)
    times = torch.tensor([[0.1, 0.2, 0.5, 0.9]] * 2).double()
    inputs = draw(2, 3, 4, 4, 4, dtype=torch.float64), times, Cond(text=torch.ones(2, 3).long())
    before = model(*inputs)
    low = paper.factorise(model, 3, 5)
    streamed = paper.each_block(low, lambda block: Streamed(block, Tiles(5, 3)))
    close(streamed(*inputs), low(*inputs))
    assert torch.equal(model(*inputs), before) and (low(*inputs) - before).abs().max() > 1e-3
    assert {p.data_ptr() for p in streamed.parameters()} == {p.data_ptr() for p in low.parameters()}


def test_the_shared_generator_streams():
    model = weights.load("video")
    low = paper.factorise(model, 16, 32)
    assert measure.parameters(low) < measure.parameters(model)
    inputs = draw(1, model.channels, 3, 8, 8), torch.tensor([0.7]), Cond(text=torch.tensor([[3, 4, 5]]))
    close(paper.each_block(low, lambda block: Streamed(block, Tiles(20, 30), 2))(*inputs), low(*inputs))
    full = paper.each_block(paper.factorise(model, 32, 128), Streamed)
    close(full(*inputs), model(*inputs))


# --- models that aren't ours ------------------------------------------------------------------------------------------------


def merged(layer, streamed):
    """PyTorch's layer with the products of the streamed one's factors in place of its weights: the ordinary low-rank layer."""
    with torch.no_grad():
        wide = [rearrange(part.u.mT @ part.v, "k d e -> (k e) d") for part in streamed.qkv]
        layer.self_attn.in_proj_weight.copy_(torch.cat(wide))
        for own, part in ((layer.self_attn.out_proj, streamed.o), (layer.linear1, streamed.fc1), (layer.linear2, streamed.fc2)):
            own.weight.copy_(part.a @ part.b)
    return layer


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("first, act", [(False, "gelu"), (True, "relu")])
@pytest.mark.parametrize("rank, wide", [(3, 6), (E, D)])
def test_pytorchs_transformer_streams(variant, first, act, rank, wide):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, HEADS, 40, 0.0, act, batch_first=True, norm_first=first).double().eval()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).requires_grad_(False).eval()
    tiles = Tiles(4, 3, 2, 16, 4, 7)
    streamed = surgery.swap(encoder, {f"layers.{i}": StreamedLayer(part, rank, wide, tiles, variant)
                                      for i, part in enumerate(encoder.layers)})  # fmt: skip
    x = draw(3, 11, D, dtype=torch.float64)
    if rank == E:  # full rank: the model as PyTorch runs it
        close(streamed(x), encoder(x))
    for part, low in zip(encoder.layers, streamed.layers, strict=True):
        merged(part, low)
    late = torch.arange(11) >= torch.tensor([[11], [7], [2]])  # padding at the end; and once at the beginning
    early = torch.arange(11) < 5
    causal = torch.ones(11, 11).triu(1).bool()
    torch.backends.mha.set_fastpath_enabled(False)  # PyTorch's fast path takes a mask of numbers for one of booleans
    for how in ({}, {"src_key_padding_mask": late}, {"src_key_padding_mask": early.expand(3, -1)}, {"mask": causal},
                {"mask": causal, "src_key_padding_mask": late}, {"mask": draw(11, 11, seed=4, dtype=torch.float64)}):  # fmt: skip
        close(streamed(x, **how), encoder(x, **how))
    torch.backends.mha.set_fastpath_enabled(True)


class Guest(nn.Module):
    """Somebody's block: normalised queries and keys, rotary places, a gated sum, layers under names of their own."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(D, D, bias=i > 1) for i in range(4))
        self.up_proj, self.down_proj, self.norm = nn.Linear(D, 5 * D, bias=False), nn.Linear(5 * D, D, bias=False), nn.RMSNorm(D)

    def turn(self, x, rows):
        """Heads `k b n e` of some rows: to unit length, then to their places."""
        places = torch.arange(100.0).view(1, -1, 1).expand(1, -1, 3)[:, rows]
        return rotate(F.normalize(3 * x, dim=-1).transpose(0, 1), places, *rotary_pairs(E)).transpose(0, 1)

    def forward(self, x):
        q, k, v = (rearrange(part(self.norm(x)), "b n (k e) -> k b n e", k=HEADS) for part in (self.to_q, self.to_k, self.to_v))
        q, k = (self.turn(y, slice(0, x.shape[1])) for y in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + 0.5 * self.to_out(rearrange(o, "k b n e -> b n (k e)"))
        return x + 0.5 * self.down_proj(F.silu(self.up_proj(self.norm(x))))


def test_a_guest_with_normalised_rotated_heads_streams():
    torch.manual_seed(0)
    guest = Guest().double().requires_grad_(False)
    x, tiles = draw(2, 13, D, dtype=torch.float64), Tiles(4, 5, 3, 7, 4)
    qkv = [PerHead.of(part.weight, part.bias, HEADS, E) for part in (guest.to_q, guest.to_k, guest.to_v)]
    around = (lambda x, rows: guest.norm(x)), (lambda x, said, rows: x + 0.5 * said)
    hide = lambda rows, keys: torch.zeros(13, 13).double().masked_fill(torch.ones(13, 13).triu(1).bool(), -torch.inf)[rows, keys]
    y = paper.attention(x, qkv, guest.to_out, around, tiles, turn=(guest.turn, guest.turn), bias=hide)
    paper.feed_(y, Factored.of(guest.up_proj, D), Factored.of(guest.down_proj, D), F.silu, around, tiles)
    close(y, guest(x))


# --- attention --------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 5), st.floats(0, 1e4), st.sampled_from((torch.float64, torch.float32)))
def test_softmax_in_pieces_is_softmax(n, size, scale, dtype):
    seed = 10 * n + size
    s, v = draw(3, 4, n, seed=seed, dtype=dtype).tanh() * scale, draw(3, n, 2, seed=seed + 1, dtype=dtype)
    hidden = draw(3, 4, n, seed=seed + 2) > 0.3
    hidden[:, 0] = True  # a row that sees nothing
    hidden[:, 1, : n - 1], hidden[:, 1, n - 1] = True, False  # and one that sees nothing but the last
    for scores in (s, s.masked_fill(hidden, -torch.inf)):
        m, l, acc = s.new_full((3, 4, 1), -torch.inf), s.new_zeros(3, 4, 1), s.new_zeros(3, 4, 2)
        for piece in paper.cut(n, size):
            paper.fold(m, l, acc, scores[..., piece].clone(), v[:, piece])
        close(acc / l.clamp_min(1e-30), scores.softmax(-1).nan_to_num() @ v, 1e-10 if dtype == torch.float64 else 1e-5)


@settings(max_examples=15)
@given(st.integers(1, 14), TILES, st.integers(1, 6))
def test_attention_is_the_fused_one_on_what_was_never_made(n, tiles, rank):
    x = draw(2, n, D, dtype=torch.float64)
    qkv = [PerHead(draw(HEADS, rank, D, seed=i).double(), draw(HEADS, rank, E, seed=i + 3).double(),
                   draw(HEADS, E, seed=i + 6).double()) for i in range(3)]  # fmt: skip
    strips = [part.thin(x) for part in qkv]
    full = [rearrange(part(x), "b n (k e) -> b k n e", k=HEADS) for part in qkv]
    want = rearrange(F.scaled_dot_product_attention(*full), "b k n e -> b n (k e)")
    got = [paper.attend(rows, strips, qkv, tiles) for rows in paper.cut(n, tiles.rows)]
    close(torch.cat(got, 1), want)
    blind = lambda rows, keys: torch.full((rows.stop - rows.start, keys.stop - keys.start), -torch.inf)
    assert (paper.attend(slice(0, n), strips, qkv, tiles, bias=blind) == 0).all()  # as PyTorch's: who sees nothing says 0


@torch.no_grad()
def test_factors_are_the_best_of_each_head():
    linear, gram = nn.Linear(D, 2 * E).requires_grad_(False), draw(40, D, seed=1)
    for x in (torch.eye(D), gram):
        part = PerHead.of(linear.weight, linear.bias, 2, 3, x.T @ x)
        for head in range(2):
            whole = x @ linear.weight.detach()[head * E : (head + 1) * E].T
            error = (x @ (part.u[head].T @ part.v[head]) - whole).square().sum().item()
            assert error == pytest.approx(torch.linalg.svdvals(whole)[3:].square().sum().item(), rel=1e-3)
    close(PerHead.of(linear.weight, linear.bias, 2, E)(gram[None]), linear(gram[None]))
    low = low_rank(random_block(), grams={"0.attention.q": (gram.T @ gram).double(), "0.fc1": (gram.T @ gram).double()})
    plain = low_rank(random_block())
    for name in ("attention.q", "attention.k", "fc1", "fc2"):
        same = torch.equal(*(next(one.get_submodule(name).parameters()) for one in (low, plain)))
        assert same == (name in ("attention.k", "fc2")), name


# --- memory, counted ----------------------------------------------------------------------------------------------------------


def streamed_and_context(n, rank=4, wide=8, ratio=3, tiles=Tiles(8, 8, 4, 8), variant=1, b=1):
    low = low_rank(random_block(ratio=ratio, dtype=torch.float32), rank, wide)
    return Streamed(low, tiles, variant), context(1, 1, n, b, dtype=torch.float32), draw(b, n, D)


def numbers(*how, **more):
    """float32 numbers alive at the peak of a streamed block, its input included."""
    block, ctx, x = streamed_and_context(*how, **more)
    return measure.peak(lambda: block(x, ctx)) // 4 + x.numel()


@pytest.mark.parametrize("rank, wide, variant", [(4, 8, 1), (1, 12, 1), (1, 12, 2), (8, 16, 1)])
def test_memory_grows_by_the_memory_model(rank, wide, variant):
    a, b, c = (numbers(n, rank, wide, variant=variant) for n in (64, 128, 192))
    assert b - a == paper.model_numbers(64, D, HEADS, rank, wide, wide, variant)
    assert c - b == b - a


def test_memory_grows_by_the_memory_model_with_the_batch_and_factors_are_never_copied():
    a, b, c = (numbers(96, b=b) for b in (1, 2, 3))
    assert c - b == b - a  # all that depends on a sample, tiles too
    part = PerHead(torch.zeros(2, 50, 4), torch.zeros(2, 50, 60), torch.zeros(2, 60))
    strip = torch.zeros(2, 9, 3, 50)
    with torch.no_grad():  # 9 samples of 3 rows give 3,240 numbers; V, which has 6,000, would be 54,000 if it were spread
        assert measure.peak(lambda: part.rebuild(strip, 25)) // 4 == 3240
        assert measure.peak(lambda: strip @ part.v[:, None]) // 4 == 3240 + 54000


def test_memory_does_not_depend_on_the_hidden_layer():
    assert numbers(64, 1, 12, ratio=2) == numbers(64, 1, 12, ratio=40)
    assert numbers(64, 1, 12, ratio=2, variant=2) == numbers(64, 1, 12, ratio=40, variant=2)


def test_less_rank_is_less_memory_and_tiles_change_only_tiles():
    ranks = [numbers(64, rank, 2 * rank) for rank in (1, 2, 4, 6, 8)]
    assert ranks == sorted(ranks)
    for tiles in (Tiles(8, 8), Tiles(16, 8), Tiles(8, 32), Tiles(32, 32, 2, 16)):
        grown = [numbers(n, tiles=tiles) for n in (64, 128)]
        assert grown[1] - grown[0] == paper.model_numbers(64, D, HEADS, 4, 8, 8)


def test_nothing_wide_ever_exists():
    for variant in (1, 2):
        block, ctx, x = streamed_and_context(256, tiles=Tiles(16, 16, 4, 8), variant=variant)
        long = [one for one in measure.lives(lambda block=block, x=x, ctx=ctx: block(x, ctx)) if one.bytes >= 4 * 256 * 8]
        want = [(HEADS, 1, 256, 4)] * 3 + [(1, 256, D)] + [(1, 256, 8)] * (2 if variant == 1 else 1)
        assert [one.shape for one in long] == want


@torch.no_grad()
def test_torchs_profiler_sees_the_same_peaks():
    low = low_rank(random_block(dtype=torch.float32), 4, 8)
    ctx, x = context(2, 16, 16, 1, dtype=torch.float32), draw(1, 512, D)
    for block in (Streamed(low, Tiles(32, 32)), Streamed(low, Tiles(32, 32), 2)):
        seen, counted = (meter(lambda block=block: block(x, ctx)) for meter in (measure.allocated, measure.peak))
        assert seen == pytest.approx(counted, rel=0.03)
    q = draw(1, HEADS, 512, E)
    fused = lambda: F.scaled_dot_product_attention(q, q, q)  # its scratch is out of the meter's sight: the rivals look better
    scratch = measure.allocated(fused) - measure.peak(fused)
    for block in (low, claim.Chunked(low)):
        seen, counted = (meter(lambda block=block: block(x, ctx)) for meter in (measure.allocated, measure.peak))
        assert counted <= seen <= counted + scratch


# --- work -----------------------------------------------------------------------------------------------------------------------


def test_flops_of_the_feed_forward():
    fc1, fc2, x = Factored(draw(48, 8), draw(8, D)), Factored(draw(D, 12), draw(12, 48)), draw(1, 20, D)
    around = paper._as_it_is, lambda x, said, rows: x + said
    count = lambda variant=1, **how: measure.flops(
        lambda: paper.feed_(x.clone(), fc1, fc2, F.relu, around, Tiles(7, **how), variant))  # fmt: skip
    unfused = measure.flops(lambda: fc2(F.relu(fc1(x))))
    assert count() == count(hidden=5) == unfused == 2 * 20 * (D * 8 + 8 * 48 + 48 * 12 + 12 * D)
    assert count(second=5) - unfused == 2 * 20 * 8 * 48 * 2  # the hidden layer is rebuilt three times
    assert count(2, out=D) == unfused
    assert count(2, out=6) - unfused == 2 * 20 * (8 * 48 + 48 * 12) * 2  # and here the sum behind it as well


def test_flops_of_attention_are_those_of_keys_and_values_rebuilt_for_every_block_of_queries():
    block, ctx, x = streamed_and_context(64, 4, 8, tiles=Tiles(16, 8, 3))
    low = block.block
    once = 2 * 64 * 4 * E * HEADS * 2  # keys and values of all heads
    words = 2 * 2 * 4 * D * D  # so are those of the four words, for each block of rows
    assert measure.flops(lambda: block(x, ctx)) - measure.flops(lambda: low(x, ctx)) == 3 * (once + words)


# --- the rival ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, 1])
@pytest.mark.parametrize("low", [False, True])
def test_chunking_is_the_block(heads, low):
    block, x = random_block(), draw(2, 12, D, dtype=torch.float64)
    block = low_rank(block) if low else block
    for ctx in (context(), context(captions=3), context(block=1)):
        close(claim.Chunked(block, 5, heads)(x, ctx), block(x, ctx))


def test_memory_of_chunking():
    block, _, _ = streamed_and_context(8)
    for heads, per_token in ((None, 5 * D), (1, 2 * D + 8 + D)):  # x, q, k, v, o;  x, the sum, and q, k, v, o of one of two heads
        at = [measure.peak(lambda n=n, heads=heads: claim.Chunked(block.block, 8, heads)(
            draw(1, n, D), context(1, 1, n, 1, dtype=torch.float32))) for n in (128, 256)]  # fmt: skip
        assert at[1] - at[0] >= 4 * 128 * per_token - 1


# --- refusals -------------------------------------------------------------------------------------------------------------------


def test_refusals():
    block, ctx, x = random_block(), context(), draw(2, 12, D, dtype=torch.float64)
    low = low_rank(block)
    with pytest.raises(ValueError, match=r"only a low-rank block can be streamed: call factorise"):
        Streamed(block)
    with pytest.raises(ValueError, match="a tile holds at least 1 row"):
        Tiles(rows=0)
    with pytest.raises(ValueError, match="variants 1 .two stages. and 2 .fused., got 3"):
        Streamed(low, variant=3)(x, ctx)
    with pytest.raises(ValueError, match="ranks 0 to 8, got 9"):
        low_rank(block, rank=9)
    for other in (replace(ctx, cache=Cache()), replace(ctx, where=ctx.where.seen_from(ctx.where))):
        with pytest.raises(ValueError, match="without a cache"):
            Streamed(low)(x, other)
    sparse = surgery.swap(low, {"attention.attend": lambda q, k, v, where: dense(q, k, v, where)})
    with pytest.raises(ValueError, match="run it densely"):
        Streamed(sparse)(x, ctx)
    for wrong in ({}, {"batch_first": True, "bias": False}):
        with pytest.raises(ValueError, match="batch_first=True and biases"):
            StreamedLayer(nn.TransformerEncoderLayer(D, HEADS, **wrong), 2, 4)
    layer = StreamedLayer(nn.TransformerEncoderLayer(D, HEADS, batch_first=True), 2, 4)
    with pytest.raises(ValueError, match="one of tokens by tokens for all heads, got shape .4, 12, 12."):
        layer(x.float(), torch.zeros(4, 12, 12))
