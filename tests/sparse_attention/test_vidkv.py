"""VidKV: nothing packed is the plain cache; errors of few bits are what theory says; bytes are counted; what is packed stays."""

import itertools
import math

import pytest
import torch
from checks import contracts
from checks.contracts import play, small
from hypothesis import given, settings
from hypothesis import strategies as st

from minivid.core.baselines.answerer import Answerer
from minivid.core.baselines.quant import pack, unpack
from minivid.core.cache import Cache
from minivid.core.model import Cond
from minivid.core.where import grid
from minivid.lab import measure
from minivid.sparse_attention import vidkv as paper
from minivid.sparse_attention.vidkv import Scheme, Setting, VidKV

SEEDS = st.integers(0, 10_000)
SCHEMES = [
    Scheme(), Scheme(bits=1), Scheme(bits=4, by="token"), Scheme("sign"), Scheme("sign", mix="fft"),
    Scheme("sign", mix="hadamard"), Scheme("sign", centred=True),
    Scheme("ternary"), Scheme("ternary", by="token"), Scheme("ternary", gamma=0.5, fitted=True),
    Scheme("ternary", fitted=True, centred=True), Scheme("sign", size=64, mix="fft", centred=True),
]  # fmt: skip
FLAT = [s for s in SCHEMES if not s.mix]


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def heads(b=2, g=2, n=64, d=32, seed=0):
    return torch.randn(b, g, n, d, generator=dice(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def through(scheme, x):
    return scheme.pack(x).values()


def error(scheme, x):
    """|x - x'|^2 / |x|^2."""
    return float((through(scheme, x) - x).square().sum() / x.square().sum())


def of_size(n, **more):
    """The paper's setting in groups of n."""
    two, cold = Scheme(size=n), Scheme("sign", size=n, mix="fft")
    return Setting(**(dict(hot=two, cold=cold, safe=two, rest=Scheme("ternary", size=n), residual=n) | more))


eights = lambda n, **more: of_size(n, **{name: Scheme(bits=8, size=n) for name in ("hot", "cold", "safe", "rest")}, **more)
X = torch.randn(2, 3, 10, 8, 8, generator=dice(1))  # 5 blocks of 2 frames of 16 tokens
T = torch.tensor([[0.0, 0, 0.2, 0.2, 0.7, 0.7, 0.1, 0.1, 0.4, 0.4]]).repeat(2, 1)


# --- the law of limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotated", [True, False])
def test_with_a_residual_longer_than_the_film_it_is_the_plain_cache_in_fp16(rotated):
    class Half(Cache):
        def add(self, layer, q, k, v, where):
            super().add(layer, q, k.half(), v.half(), where)

        def read(self, layer, q, where):
            past = super().read(layer, q, where)
            return past and (past[0].float(), past[1].float(), past[2])

    Half.rotated = rotated
    model, held, half = small(), VidKV(of_size(8, residual=999, rotated=rotated)), Half()
    assert torch.equal(play(model, X, T, held), play(model, X, T, half))
    assert held.nbytes == half.nbytes and not held.pages


@pytest.mark.parametrize("rotated", [True, False])
def test_with_8_bits_it_is_nearly_the_plain_cache(rotated):
    model = small()
    full, far = play(model, X, T, Cache()), lambda setting: (play(model, X, T, VidKV(setting)) - full).abs().mean()
    assert far(eights(16, rotated=rotated)) < 0.03 * far(of_size(16, rotated=rotated))


def test_with_k_and_p_at_1_it_is_the_2_bit_quantiser_and_at_0_all_are_ternary_and_signs():
    for k, p, key, value in ((1, 1, Scheme(), Scheme()), (0, 0, Scheme("sign", mix="fft"), Scheme("ternary"))):
        cache = VidKV(Setting(k=k, p=p))
        cache.open(0, Cond()), cache.add(0, heads(), heads(), heads(seed=1), grid(1, 8, 8)), cache.close(0)
        cache.open(1, Cond())
        ours = cache.read(0, heads(), grid(1, 8, 8))
        for mine, scheme, x in zip(ours, (key, value), (heads(), heads(seed=1)), strict=False):
            assert torch.equal(mine, through(scheme, x.half().float()))


@pytest.mark.parametrize("more", [{}, dict(k=0.25, rotated=False), dict(residual=16), dict(recent=8), dict(k=1, p=1)], ids=str)
def test_the_contract_of_caches_holds(more):
    contracts.cache(lambda: VidKV(of_size(8, **more)), gradient=False, rounds=0.02)


# --- a group --------------------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([1, 2, 3, 4]), st.sampled_from(["channel", "token"]), st.floats(-3, 3))
@settings(max_examples=30)
def test_even_grids(seed, bits, by, shift):
    """Errors of half a step, exact ends, the same again; a and b of a x + b come through."""
    s, x = Scheme(bits=bits, by=by), (heads(seed=seed) + shift).half().float()
    y, groups = through(s, x), s.grouped(x)
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    gap = s.grouped(x - y).abs().amax(-1)
    assert (gap <= 0.502 * step + 1e-3 * groups.abs().amax(-1)).all()  # steps and offsets are rounded to fp16
    for end in (torch.amax, torch.amin):
        close(end(s.grouped(y), -1), end(groups, -1), 4e-3)
    close(through(s, y), y, 4e-3)
    moved = (through(s, 2 * x + 1) - 2 * y - 1).abs() > 1e-2 * (1 + x.abs())
    assert moved.float().mean() < 0.01  # a code may turn where a number lies between two


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.5, -40.0])
def test_a_constant_group_is_itself(scheme, value):
    y = through(scheme, torch.full((1, 2, 64, 32), value))
    exact = not scheme.mix and (scheme.offset or scheme.kind == "sign" or scheme.kind == "ternary")
    assert y.isfinite().all()
    if exact and not (scheme.kind == "sign" and value == 0):
        close(y, torch.full_like(y, value), 1e-2)


@given(SEEDS, st.floats(0.1, 3), st.floats(-2, 2))
@settings(max_examples=30)
def test_signs_err_by_what_theory_says_and_their_scale_is_the_best(seed, spread, shift):
    x = (heads(seed=seed) * spread).sinh() + shift
    groups = Scheme("sign").grouped(x)
    gap = lambda s: (groups.sign() * s - groups).square().mean(-1)
    size = groups.abs().mean(-1, keepdim=True)
    exact = groups.square().mean(-1) - size[..., 0] ** 2
    close(Scheme("sign").grouped(through(Scheme("sign"), x) - x).square().mean(-1), exact, 2e-2)
    assert (gap(1.1 * size) > gap(size)).all() and (gap(0.9 * size) > gap(size)).all()
    best = Scheme("sign", centred=True)
    assert error(best, x) <= error(Scheme("sign"), x) + 1e-3 or abs(shift) < 1.0  # an offset is what it takes out


@pytest.mark.parametrize("name, theory", [("uniform", 0.25), ("normal", 1 - 2 / math.pi), ("laplace", 0.5)])
def test_the_error_of_signs_depends_on_the_tails(name, theory):
    """The card of the method: FFT and Hadamard make all of these normal, so they help one, and hurt another."""
    u = torch.rand(1, 8, 2048, 32, generator=dice()) * 2 - 1
    x = {"uniform": u, "normal": heads(1, 8, 2048, seed=1), "laplace": -u.sign() * u.abs().clamp_min(1e-6).log()}[name]
    found = {mix: error(Scheme("sign", size=2048, mix=mix), x) for mix in ("", "fft", "hadamard")}
    assert found[""] == pytest.approx(theory, abs=0.01)
    assert all(found[mix] == pytest.approx(1 - 2 / math.pi, abs=0.02) for mix in ("fft", "hadamard"))


@pytest.mark.parametrize(
    "gamma, fitted, theory", [(0.7, False, 0.278), (0.7, True, 0.192), (0.5, False, 0.263), (0.5, True, 0.213)]
)
def test_the_error_of_ternary_codes(gamma, fitted, theory):
    x, s = heads(1, 8, 4096), Scheme("ternary", size=4096, gamma=gamma, fitted=fitted)
    assert error(s, x) == pytest.approx(theory, abs=0.004)
    zeros = (s.pack(x).codes() == 1).float().mean()
    assert zeros == pytest.approx({0.7: 0.42, 0.5: 0.31}[gamma], abs=0.01)


def test_ternary_codes_are_three_odd_and_with_gamma_0_signs():
    x = heads()
    codes = Scheme("ternary").pack(x).codes()
    assert codes.unique().tolist() == [0, 1, 2]
    for fitted in (False, True):
        assert torch.equal(through(Scheme("ternary", fitted=fitted), -x), -through(Scheme("ternary", fitted=fitted), x))
    close(through(Scheme("ternary", gamma=0.0), x), through(Scheme("sign"), x), 1e-3)


def test_centred_codes_take_an_offset_out():
    x = heads()
    for kind in ("sign", "ternary"):
        near, moved = (through(Scheme(kind, centred=True), y) for y in (x, x + 8))
        assert ((moved - 8 - near).abs() > 0.02).float().mean() < 0.01  # a code may turn where a number is next to its limit
        assert error(Scheme(kind, centred=True), x + 8) < 0.5 * error(Scheme(kind), x + 8)


# --- mixing ---------------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 33))
@settings(max_examples=40)
def test_waves_are_as_many_reals_and_orthogonal(seed, d):
    x = torch.randn(3, d, generator=dice(seed), dtype=torch.float64)
    z = paper.waves(x)
    assert z.shape == x.shape
    close(paper.unwaves(z), x, 1e-10)
    close(z.norm(dim=-1), x.norm(dim=-1), 1e-10)
    close((paper.unwaves(z + 1) - x).norm(dim=-1), torch.full((3,), d**0.5, dtype=torch.float64), 1e-10)
    matrix = paper.waves(torch.eye(d, dtype=torch.float64))
    close(matrix @ matrix.T, torch.eye(d, dtype=torch.float64), 1e-10)


def test_channels_and_tokens_may_come_in_any_order_where_nothing_mixes_them():
    x, p, t = heads(), torch.randperm(32, generator=dice(5)), torch.randperm(64, generator=dice(6))
    for scheme in FLAT:
        by_channel = scheme.by == "channel"
        moved = through(scheme, x[..., p]), through(scheme, x)[..., p]
        assert torch.equal(*moved) if by_channel else not torch.equal(*moved) or scheme.size == 32
        moved = through(scheme, x[:, :, t]), through(scheme, x)[:, :, t]
        assert torch.equal(*moved) == (not by_channel)
    fft = Scheme("sign", mix="fft")
    assert not torch.allclose(through(fft, x[..., p]), through(fft, x)[..., p], atol=1e-2)


# --- bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packed_is_what_it_says_in_as_many_bits(scheme):
    x = heads(2, 4, 160 if scheme.size == 32 else 320, 32)
    codes, step, offset = scheme.coded(scheme.grouped(x))
    held = scheme.pack(x)
    assert torch.equal(held.codes(), codes) and held.data.dtype == torch.uint8 and held.step.dtype == torch.float16
    close(held.values(), scheme.ungrouped(codes * step + offset, 4), 2e-3)
    assert held.nbytes == measure.stored_bytes([t for t in (held.data, held.step, held.offset) if t is not None])
    assert held.nbytes * 8 == pytest.approx(scheme.true * x.numel(), abs=8)


def test_true_bits_count_metadata():
    """A scale for 32 numbers is half a bit, an offset another half; "1.5" and "1.58" bits are 2.25 and 2.1."""
    assert Scheme().true == 3 and Scheme("sign").true == 1.5 and Scheme("sign", centred=True).true == 2
    assert Scheme("ternary").true == pytest.approx(2.1) and Scheme(size=128).true == 2.25
    cache = VidKV(Setting(k=0.5))
    cache.open(0, Cond()), cache.add(0, heads(), heads(), heads(seed=1), grid(1, 8, 8)), cache.close(0)
    numbers = heads().numel()
    lists = 2 * 32 / 8 + 2 * 64 / 8  # a bit a channel and layer, a bit a token, of two samples
    assert cache.nbytes == pytest.approx(numbers * (2.25 + 2.1) / 8 + lists, abs=1)


def test_a_cache_counts_all_that_it_holds():
    model, cache = small(), VidKV(of_size(8, k=0.5, residual=16, recent=4))
    play(model, X, T, cache)
    held = [cache.hot, cache.safe, [[e.k, e.v] for entries in cache.kept.values() for e in entries]]
    parts = [part for pages in cache.pages.values() for page in pages for both in page[:2] for part in both.parts]
    held += [[part.data, part.step] + ([] if part.offset is None else [part.offset]) for part in parts]
    assert cache.nbytes == measure.stored_bytes(held)
    for entries in cache.kept.values():  # a view would keep the whole block alive
        assert all(x.untyped_storage().nbytes() == x.nbytes for e in entries for x in (e.k, e.v))


@given(SEEDS, st.integers(1, 200))
@settings(max_examples=20)
def test_masks_come_through_as_bits(seed, n):
    on = torch.rand(3, n, generator=dice(seed)) < 0.5
    assert torch.equal(unpack(pack(on.byte(), 1), 1, 3 * n).view(3, n).bool(), on)


# --- channels and tokens --------------------------------------------------------------------------------------------------


def test_channels_are_chosen_as_it_is_said():
    k = heads(2, 3, 64, 8)
    k[0, :, :, 2] *= 5  # wide in one sample
    k[1, 1, 7, 5] = 40.0  # one giant number in one head of the other
    k[1, :, :, 1] *= 3
    k[1, :, :, 6] += 60.0  # an offset has no range
    on = lambda how, share=0.125: [row.nonzero().flatten().tolist() for row in paper.channels(k, share, how)]
    assert on("range") == [[2], [5]] and on("variance")[0] == [2] and on("variance")[1] != [6]
    assert on("outliers") == [[2], [6]]
    for share, how in itertools.product((0, 0.2, 0.5, 0.99, 1), paper.SELECTORS):
        assert (paper.channels(k, share, how).sum(-1) == math.floor(share * 8)).all()
    random = paper.channels(k, 0.5, "random", 1)
    assert torch.equal(random[0], random[1]) and not torch.equal(random, paper.channels(k, 0.5, "random", 2))


def test_the_chosen_channels_have_two_bits_and_the_others_one_and_no_list_is_made_twice():
    k = heads(1, 2, 64, 32)
    k[..., 4:12] *= 6
    cache = VidKV(Setting(k=0.25, cold=Scheme("sign")))
    for i, x in enumerate((k, k.flip(-1))):
        cache.open(i, Cond()), cache.add(0, x, x, x, grid(1, 8, 8, i)), cache.close(i)
    cache.open(2, Cond())
    ours = cache.read(0, k, grid(1, 8, 8))[0]
    for part, x in zip(ours.split(64, 2), (k, k.flip(-1)), strict=True):
        x = x.half().float()
        assert torch.equal(part[..., 4:12], through(Scheme(), x[..., 4:12]))
        assert torch.equal(part[..., 12:], through(Scheme("sign"), x[..., 12:]))


def filled(setting, v, relevant):
    cache = VidKV(setting, relevant)
    cache.open(0, Cond()), cache.add(0, v, v, v, grid(1, 1, v.shape[2])), cache.close(0)
    cache.open(1, Cond())
    return cache, cache.read(0, v, grid(1, 1, 1))[1]


def test_relevant_tokens_keep_two_bits():
    v, relevant = heads(2, 2, 160, 32), torch.rand(2, 160, generator=dice())
    _, ours = filled(Setting(k=1, p=0.2), v, relevant)
    v = v.half().float()
    for i in range(2):
        best = relevant[i].argsort(descending=True)[:32].sort().values
        rest = torch.tensor([j for j in range(160) if j not in set(best.tolist())])
        assert torch.equal(ours[i : i + 1, :, best], through(Scheme(), v[i : i + 1, :, best]))
        assert torch.equal(ours[i : i + 1, :, rest], through(Scheme("ternary"), v[i : i + 1, :, rest]))
    for p, scheme in ((0.0, Scheme("ternary")), (1.0, Scheme())):
        assert torch.equal(filled(Setting(k=1, p=p), v, relevant)[1], through(scheme, v))


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_average_bits_of_values(p):
    """1.6 (1.58, as packed) + 0.4 p of codes; with steps and offsets 2.1 + 0.9 p."""
    v = heads(1, 4, 320, 32)
    cache, _ = filled(Setting(k=1, p=p), v, torch.rand(1, 320, generator=dice()))
    held = cache.pages[0][0][1].parts
    bits = lambda size: 8 * sum(size(part) for part in held) / v.numel()
    assert bits(lambda part: part.data.nbytes) == pytest.approx(1.6 + 0.4 * p, abs=0.005)
    assert bits(lambda part: part.nbytes) == pytest.approx(2.1 + 0.9 * p, abs=0.005)


def test_relevance_is_the_mean_product_with_the_words_that_are_there():
    seen, words = torch.randn(2, 6, 5, generator=dice()), torch.randn(2, 4, 5, generator=dice(1))
    there = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    ours = paper.relevance(seen, words, there)
    for b, n in itertools.product(range(2), range(6)):
        each = [float(seen[b, n] @ words[b, j]) for j in range(4) if there[b, j]]
        assert float(ours[b, n]) == pytest.approx(sum(each) / len(each), abs=1e-5)


# --- the residual ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "residual, recent, sizes", [(32, 0, [1024, 1, 30, 1, 64]), (128, 0, [40, 40, 40, 40, 200]), (32, 50, [64, 20, 64])]
)
def test_groups_are_full_and_old_codes_stay(residual, recent, sizes):
    cache, total, before = VidKV(Setting(residual=residual, recent=recent)), 0, []
    for i, n in enumerate(sizes):
        x = heads(1, 1, n, 8, seed=i)
        cache.open(i, Cond()), cache.add(0, x, x, x, grid(1, 1, n, i)), cache.close(i)
        total += n
        old = sum(page[2].coords.shape[-2] for page in cache.pages.get(0, []))
        new = sum(e.k.shape[2] for e in cache.kept[0])
        assert old % 32 == 0 and old + new == total == cache.tokens
        assert new < residual + recent + 32 and (not old or new >= recent)
        data = [part.data.clone() for page in cache.pages.get(0, []) for both in page[:2] for part in both.parts]
        assert all(torch.equal(a, b) for a, b in zip(before, data, strict=False))
        before = data
    cache.open(len(sizes), Cond())
    k, _, where = cache.read(0, x, grid(1, 1, 1))
    assert k.shape[2] == where.coords.shape[-2] == total
    whole = torch.cat([heads(1, 1, n, 8, seed=i) for i, n in enumerate(sizes)], 2)
    if new:
        assert torch.equal(k[:, :, total - new :], whole[:, :, total - new :].half().float())


def test_tokens_keep_their_places():
    model, held, plain = small(), VidKV(of_size(8, residual=8, recent=4)), Cache()
    play(model, X, T, held), play(model, X, T, plain)
    q, at = heads(2, 2, 1, 16), grid(1, 1, 1)
    held.open(9, Cond()), plain.open(9, Cond())
    _, _, a = held.read(0, q, at)
    _, _, b = plain.read(0, q, at)
    assert torch.equal(a.coords, b.coords) and torch.equal(a.block, b.block)


# --- in use ---------------------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=10)
def test_attention_of_ternary_values_is_additions(seed):
    v, a = heads(2, 2, 96, 32, seed=seed), torch.rand(2, 2, 96, generator=dice(seed)).softmax(-1)
    for gamma, fitted in ((0.7, False), (0.5, True)):
        held = Scheme("ternary", gamma=gamma, fitted=fitted).pack(v)
        close(paper.by_additions(a, held), torch.einsum("bgn,bgnd->bgd", a, held.values()), 1e-5)


def test_a_question_is_answered_from_a_packed_clip():
    torch.manual_seed(0)
    model = Answerer(d=64, depth=2, heads=2).eval().requires_grad_(False)
    clip, asked = torch.rand(2, 3, 4, 32, 32, generator=dice()) * 2 - 1, Cond(text=torch.tensor([[5, 6, 0], [8, 9, 7]]))
    (seen, _), there = model.see(clip), asked.text > 0
    relevant = paper.relevance(seen, model.word(asked.text), there)
    plain, gaps, sizes = Cache(), [], []
    truth = model(clip, None, asked, plain)
    for setting in (eights(32), Setting(k=1, p=1), Setting(p=0.2)):
        held = VidKV(setting, relevant)
        gaps.append(float((model(clip, None, asked, held) - truth).abs().mean()))
        sizes.append(plain.nbytes / held.nbytes)
        again = held.nbytes
        model(None, None, asked, held)
        assert held.nbytes == again
    assert gaps[0] < 0.2 * gaps[1] < 0.2 * gaps[2] and sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] == pytest.approx(32 / (2.25 + 2.1 + 0.9 * 0.25) * 2, rel=0.02)  # 2 of 8 groups are protected


def test_reading_twice_gives_the_same_and_the_batch_may_be_guided():
    cache, v = VidKV(Setting(p=0.5), torch.arange(64.0)[None]), heads(4, 2, 64, 32)
    cache.open(0, Cond()), cache.add(0, v, v, v, grid(1, 8, 8)), cache.close(0)
    cache.open(1, Cond())
    a, b = (together_of(cache.read(0, v, grid(1, 8, 8))) for _ in range(2))
    assert torch.equal(a, b)


def together_of(past):
    return torch.cat(past[:2], -1)


def test_refusals():
    with pytest.raises(ValueError, match="a scheme is minmax, sign, ternary"):
        Scheme("signs")
    with pytest.raises(ValueError, match="by channel or token"):
        Scheme(by="head")
    with pytest.raises(ValueError, match="30 numbers by channel don't divide into groups of 32"):
        Scheme().pack(heads(n=30))
    with pytest.raises(ValueError, match="k and p are shares"):
        Setting(k=1.5)
    with pytest.raises(ValueError, match="select one of range"):
        Setting(select="widest")
    with pytest.raises(ValueError, match="say how relevant each of them is"):
        VidKV(Setting(p=0.2))
    with pytest.raises(ValueError, match="know the relevance of 64 tokens"):
        filled(Setting(p=0.5), heads(1, 1, 96, 8), torch.rand(1, 64))

