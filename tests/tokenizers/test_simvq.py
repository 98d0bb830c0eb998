"""SimVQ: plain VQ in its limits, the one-step law to the last digit, vector-quantize-pytorch's layer, and no code left behind."""

import numpy as np
import pytest
import torch
from checks import contracts
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from minivid.core import weights
from minivid.core.baselines.vq import VQ
from minivid.core.tokenizer import Tokenizer
from minivid.lab import measure
from minivid.tokenizers import simvq as paper
from minivid.tokenizers.simvq import SimVQ
from minivid.world.scores import perplexity

CELLS = {  # what learns, in the five cells of the ablation
    "table": ("codes",), "table and layer": ("codes", "weight", "bias"), "no bias": ("weight",),
    "layer": ("weight", "bias"), "bias": ("bias",),
}  # fmt: skip
each = pytest.mark.parametrize("learn", CELLS.values(), ids=CELLS)
cells = st.sampled_from(list(CELLS.values()))


def latent(b=2, d=4, f=3, side=4, seed=0):
    return torch.randn(b, d, f, side, side, generator=torch.Generator().manual_seed(seed))


def flat(z):
    return rearrange(z, "b d f h w -> (b f h w) d")


def index(codes):
    return codes[0].index.flatten()


def step(part, z, lr=0.1):
    """One step of plain gradient descent on both losses. Returns the chosen codes, their gradients and how all codes moved."""
    before = part.table.detach().clone()
    out, codes, losses = part(z)
    grad = torch.zeros_like(before).index_add_(0, index(codes), 2 * (before[index(codes)] - flat(z)) / z.numel())
    part.zero_grad(), sum(losses.values()).backward()
    torch.optim.SGD(part.parameters(), lr).step()
    return index(codes), grad, part.table.detach() - before


# --- the law of limits --------------------------------------------------------------------------------------------------


@given(k=st.integers(1, 40), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_with_the_identity_for_its_layer_it_is_plain_vq_to_the_bit(k, d, seed):
    ours, plain, z = SimVQ(k, d, learn=(), seed=seed), VQ(k, d, seed=seed), latent(d=d, seed=seed)
    (out, codes, losses), (want, wanted, expected) = ours(z), plain(z)
    assert torch.equal(out, want) and torch.equal(index(codes), index(wanted))
    assert losses.keys() == expected.keys() and all(torch.equal(losses[name], expected[name]) for name in losses)


def test_where_the_table_learns_instead_of_the_layer_all_of_training_is_plain_vq():
    ours, plain = SimVQ(16, 4, learn=("codes",)), VQ(16, 4)
    walks = [list(paper.chase(part, lambda i: flat(latent(seed=i)), 20)) for part in (ours, plain)]
    for a, b in zip(*walks, strict=True):
        assert torch.equal(a.table, b.table) and torch.equal(a.age, b.age)
    assert not torch.equal(walks[0][0].table, walks[0][-1].table)


# --- one step -----------------------------------------------------------------------------------------------------------


@given(learn=cells.filter(lambda learn: not {"codes", "weight"} <= {*learn}), k=st.integers(2, 30), d=st.integers(1, 6),
       seed=st.integers(0, 99))  # fmt: skip
def test_one_step_moves_code_j_by_what_reach_says(learn, k, d, seed):
    """Delta Q = -eta (C C' [W] + 1 [b] + I [C]) G; with C learning this holds where the layer is the identity."""
    part = SimVQ(k, d, learn=learn, seed=seed)
    chosen, grad, moved = step(part, latent(d=d, seed=seed))
    torch.testing.assert_close(moved, -0.1 * paper.reach(part) @ grad, atol=1e-6, rtol=1e-4)
    others = [j for j in range(k) if j not in chosen.tolist()]
    assert (moved[others].abs().sum() == 0) == (learn == ("codes",) or not others)


def test_a_table_and_a_layer_that_both_learn_move_by_a_product_of_two_steps():
    part = SimVQ(12, 4, learn=paper.PARTS)
    c, w = part.codes.detach().clone(), part.weight.detach().clone()
    _, grad, moved = step(part, latent(d=4))
    want = (c - 0.1 * grad @ w) @ (w - 0.1 * grad.T @ c).T - c @ w.T - 0.1 * grad.sum(0)
    torch.testing.assert_close(moved, want, atol=1e-6, rtol=1e-4)


def test_the_law_as_the_paper_writes_it_for_a_single_choice():
    """-eta <c_j, c_k> g, and -eta g for every j more with a bias."""
    z = latent(1, 4, 1, 1)
    for learn, more in ((("weight",), 0.0), (("weight", "bias"), 1.0)):
        part = SimVQ(8, 4, learn=learn)
        chosen, grad, moved = step(part, z)
        c, g = part.codes, grad[chosen[0]]
        torch.testing.assert_close(moved, -0.1 * torch.outer(c @ c[chosen[0]] + more, g), atol=1e-7, rtol=1e-5)
    chosen, grad, moved = step(plain := VQ(8, 4), z)
    want = torch.zeros(8, 4)
    want[chosen[0]] = -0.1 * grad[chosen[0]]
    torch.testing.assert_close(moved, want)
    assert torch.equal(paper.reach(plain), torch.eye(8))


@given(cells=st.integers(1, 12), d=st.integers(2, 6), bias=st.booleans(), seed=st.integers(0, 99))
def test_a_step_has_at_most_the_rank_of_what_was_chosen(cells, d, bias, seed):
    part = SimVQ(64, d, learn=("weight", "bias") if bias else ("weight",), seed=seed)
    z = latent(1, d, cells, 1, seed).double()
    chosen, _, moved = step(part.double(), z)
    assert torch.linalg.matrix_rank(moved) <= min(len(chosen.unique()), d + bias)


# --- what learns and what doesn't -----------------------------------------------------------------------------------------


@each
def test_what_does_not_learn_stays_to_the_bit_and_is_unknown_to_the_optimiser(learn):
    part = SimVQ(32, 4, learn=learn)
    before = {name: value.clone() for name, value in part.state_dict().items()}
    assert {name for name, _ in part.named_parameters()} == set(learn) and set(before) == set(paper.PARTS)
    for _ in paper.chase(part, lambda i: flat(latent(seed=i)) + 1, 10):
        pass
    for name, value in part.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in learn), name


def test_the_table_is_as_wide_as_the_paper_says_and_seeds_differ():
    part = SimVQ(4096, 16)
    assert part.codes.std().item() == pytest.approx(16**-0.5, rel=0.02)
    assert part.weight.abs().max() <= 16**-0.5 and part.weight.std().item() == pytest.approx((3 * 16) ** -0.5, rel=0.1)
    again, other = SimVQ(4096, 16), SimVQ(4096, 16, seed=1)
    for name, value in part.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]) and not torch.equal(value, other.state_dict()[name])


def test_gradients_of_the_losses_are_the_papers():
    """beta is on the encoder's term, not on the codebook's; nothing comes to the layer from the decoder."""
    part, z = SimVQ(64, 4, beta=0.25), latent(1, 4, 1, 4).requires_grad_(True)
    out, codes, losses = part(z)
    assert torch.autograd.grad(out.sum(), (part.weight, part.bias), allow_unused=True, retain_graph=True) == (None, None)
    (3 * out).sum().backward(retain_graph=True)
    error = flat(z - out).detach()
    z.grad = None
    ((3 * out).sum() + sum(losses.values())).backward()
    torch.testing.assert_close(flat(z.grad), 3 + 2 * 0.25 * error / z.numel())
    torch.testing.assert_close(part.bias.grad, -2 * error.sum(0) / z.numel())
    torch.testing.assert_close(part.weight.grad, -2 * error.T @ part.codes[index(codes)] / z.numel())


# --- against the library --------------------------------------------------------------------------------------------------


def test_it_is_the_librarys_simvq():
    """vector-quantize-pytorch, same table and weight (it has no bias): codes, values, loss and gradients, over five steps."""
    from vector_quantize_pytorch import SimVQ as Theirs

    ours, theirs = SimVQ(64, 4, learn=("weight",)), Theirs(4, 64, rotation_trick=False)
    with torch.no_grad():
        theirs.code_transform.weight.copy_(ours.weight), theirs.frozen_codebook.copy_(ours.codes)
    adams = [torch.optim.Adam(part.parameters(), 1e-2) for part in (ours, theirs)]
    for i in range(5):
        z, y = (latent(seed=i).requires_grad_(True) for _ in range(2))
        out, codes, losses = ours(z)
        want, chosen, loss = theirs(flat(y)[None])
        assert torch.equal(index(codes), chosen[0])
        torch.testing.assert_close(flat(out), want[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(sum(losses.values()), loss, atol=1e-6, rtol=0)
        for adam in adams:
            adam.zero_grad()
        (out.pow(3).mean() + sum(losses.values())).backward(), (want.pow(3).mean() + loss).backward()
        torch.testing.assert_close(z.grad, y.grad, atol=1e-6, rtol=1e-4)
        for adam in adams:
            adam.step()
        torch.testing.assert_close(ours.weight, theirs.code_transform.weight, atol=1e-6, rtol=1e-4)


# --- a bottleneck ---------------------------------------------------------------------------------------------------------


@each
def test_contract_of_a_bottleneck(learn):
    contracts.bottleneck(SimVQ(16, 4, learn=learn), 4)


@given(k=st.integers(1, 300), seed=st.integers(0, 99))
def test_codes_go_through_the_layer_and_the_written_out_book_is_the_same(k, seed):
    part, z = SimVQ(k, 4, seed=seed), latent(seed=seed)
    out, codes, _ = part(z)
    assert torch.equal(part.lookup(codes), out)
    assert k < 4 or not torch.equal(part.codes[codes[0].index], part.table[codes[0].index])  # the raw table is not the book
    book = part.plain()
    assert type(book) is VQ and torch.equal(index(book.search(z)), index(codes)) and torch.equal(book(z)[0], out)
    with torch.no_grad():
        part.weight += 1
    assert torch.equal(book(z)[0], out)  # a copy


@given(k=st.integers(1, 200), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_perplexity_used_codes_and_their_bounds(k, n, seed):
    found = index(SimVQ(k, 3, seed=seed).search(latent(1, 3, n, 1, seed)))
    used = len(found.unique())
    assert perplexity(found, k) <= used + 1e-6 and used <= min(k, n)


@given(seed=st.integers(0, 99))
def test_turning_the_table_and_the_layer_against_each_other_changes_nothing(seed):
    """C R and W R for an orthogonal R are the same book, and move in the same way."""
    part, turned, z = SimVQ(32, 4, seed=seed).double(), SimVQ(32, 4).double(), latent(seed=seed).double()
    r = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).double()).Q
    with torch.no_grad():
        turned.codes.copy_(part.codes @ r), turned.weight.copy_(part.weight @ r), turned.bias.copy_(part.bias)
    torch.testing.assert_close(paper.reach(part), paper.reach(turned))
    for _ in range(3):
        (chosen, _, moved), (others, _, want) = step(part, z), step(turned, z)
        assert torch.equal(chosen, others)
        torch.testing.assert_close(moved, want)
    torch.testing.assert_close(part(z)[0], turned(z)[0])


def test_codes_are_not_rounded_under_autocast():
    part, z = SimVQ(1024, 4), latent()
    with torch.no_grad():
        part.weight.copy_(torch.eye(4) / 1000), part.bias.fill_(1.0)  # the codes differ in the fourth digit
    with torch.autocast("cpu", torch.bfloat16):
        out, codes, losses = part(z)
    assert part.table.dtype == torch.float32 and torch.equal(out, part(z)[0]) and torch.equal(index(codes), index(part(z)[1]))
    assert losses["codebook"].dtype == torch.float32


def test_memory_is_linear_in_tokens():
    """A table of distances would be 67 MB here, one of differences 537."""
    part, z = SimVQ(1024, 8), latent(1, 8, 256, 8)
    assert measure.peak(lambda: sum(part(z)[2].values()).backward()) < 12e6


def tokenizer(bottleneck):
    torch.manual_seed(0)
    return Tokenizer(4, 1, (8, 16), (1, 1), bottleneck=bottleneck, noise=0.0)


def test_in_a_tokenizer_it_survives_being_stored_as_bits_and_weights(tmp_path):
    tok, clip = tokenizer(SimVQ(1000, 4)).eval(), torch.rand(1, 3, 2, 16, 16) * 2 - 1
    _, codes, losses = tok(clip)
    assert {"commit", "codebook", "lean"} == set(losses)
    places = np.arange(10)
    stored = np.packbits(codes[0].index.flatten()[:, None].numpy() >> places & 1).tobytes()
    assert len(stored) == 40  # 32 codes of 10 bits
    bits = np.unpackbits(np.frombuffer(stored, np.uint8)).reshape(-1, 10)
    read = codes[0]._replace(index=torch.from_numpy(bits @ 2**places).view_as(codes[0].index))
    want = tok.decode(tok.encode(clip))
    assert torch.equal(tok.decode(tok.bottleneck.lookup([read])), want)
    weights.write(tmp_path / "tok.safetensors", tok.state_dict(), {})
    again = tokenizer(SimVQ(1000, 4, seed=5))
    again.load_state_dict(weights.read(tmp_path / "tok.safetensors")[0])
    assert torch.equal(again.eval().decode(again.encode(clip)), want)


# --- what it is for -------------------------------------------------------------------------------------------------------


def left(part, mean, steps=300):
    """Share of the codes in use after a chase of vectors with this mean and variance 1."""
    x = flat(latent(4, 8, 4, 8)) + mean
    return list(paper.chase(part, lambda i: x, steps, 1e-2))[-1].usage


def test_a_far_book_dies_code_by_code_and_lives_through_its_layer():
    assert left(VQ(128, 8), 0) > 0.95 and left(SimVQ(128, 8), 0) > 0.95  # where nothing is far, nothing collapses
    assert left(VQ(128, 8), 1) < 0.6 and left(SimVQ(128, 8), 1) > 0.85
    assert left(SimVQ(128, 8, learn=("weight",)), 1) < 0.6  # far from the origin the layer alone can't carry the book over


def test_chase_counts_since_when_a_code_was_not_chosen():
    part = VQ(3, 1)
    with torch.no_grad():
        part.codes.copy_(torch.tensor([[0.0], [1.0], [50.0]]))
    ages = [look.age.tolist() for look in paper.chase(part, lambda i: torch.tensor([[0.0], [1.0]])[: 1 + i % 2], 3, lr=0.0)]
    assert ages == [[0, 1, 1], [0, 0, 2], [0, 1, 3], [0, 0, 4]]


def test_offset_is_in_standard_deviations_of_the_vectors():
    x = 2 * torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) + 6
    m, s = paper.offset(x, SimVQ(4096, 4, learn=()).table)
    assert m == pytest.approx(3, rel=0.02) and s == pytest.approx(0.25, rel=0.02)
    m, _ = paper.offset(x, x[:5000])
    assert m < 0.03


def test_it_follows_running_means_too():
    """A book that learns without gradients can be chased, and its reach is nothing: no gradient moves it."""
    part = VQ(16, 4, decay=0.9)
    looks = list(paper.chase(part, lambda i: flat(latent(seed=i)) + 1, 5))
    assert not torch.equal(looks[0].table, looks[-1].table) and paper.reach(part).abs().sum() == 0


@pytest.mark.usefixtures("untyped")
def test_refusals():
    with pytest.raises(ValueError, match="what can learn is codes, weight, bias; got 'W'"):
        SimVQ(8, 4, learn=("W",))
    with pytest.raises(ValueError, match=r"core\.baselines\.vq\.VQ"):
        SimVQ(8, 4).begin(latent())
    with pytest.raises(ValueError, match=r"'b 4 f h w', got \(2, 3, 3, 4, 4\)"):
        SimVQ(8, 4)(latent(d=3))
