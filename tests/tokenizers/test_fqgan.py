"""FQGAN: one book is plain VQ, who gets which gradient, losses at their ends, and a generator that looks at no later code."""

import math

import pytest
import torch
import torch.nn.functional as F
from checks import contracts
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minivid.core.baselines.vq import VQ, ResidualVQ, nearest
from minivid.tokenizers import fqgan as paper
from minivid.tokenizers.fqgan import FAR, Factorized, Head, Meaning


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def latent(b=2, c=12, f=1, side=8, seed=0):
    return torch.randn(b, c, f, side, side, generator=dice(seed))


def units(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=dice(seed)), dim=1)


def part(k=2, size=16, d=4, c=12, side=8, **more):
    books = [VQ(size, d, unit=True, seed=i) for i in range(k)]
    return Factorized([Head(c, d, 16, 1, (side, side)) for _ in books], books, nn.Conv3d(k * d, c, 1), **more)


# --- the law of limits --------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 40), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_one_book_behind_the_identity_is_plain_vq_of_unit_vectors(size, d, seed):
    plain, book = VQ(size, d, unit=True, seed=seed), VQ(size, d, unit=True, seed=seed)
    ours = Factorized([nn.Identity()], [book], nn.Identity(), sure=0)
    mine, its = (latent(c=d, side=4, seed=seed).requires_grad_(True) for _ in range(2))
    (out, codes, losses), (want, wanted, expected) = ours(mine), plain(its)
    assert torch.equal(out, want) and torch.equal(codes[0].index, wanted[0].index)
    assert losses.keys() == expected.keys() and all(torch.equal(losses[name], expected[name]) for name in losses)
    weight = torch.randn(out.shape, generator=dice(1))
    for z, terms in ((out, losses), (want, expected)):
        ((z * weight).sum() + sum(terms.values())).backward()
    assert torch.equal(mine.grad, its.grad) and torch.equal(book.codes.grad, plain.codes.grad)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_it_keeps_the_contract_of_a_bottleneck(k):
    contracts.bottleneck(part(k, side=4), 12)


def test_a_residual_book_and_running_means_fit_as_well():
    stages = [VQ(16, 8, decay=0.99, restart=0.1, seed=i) for i in range(2)]
    ours = Factorized([Head(12, 8, 16)], [ResidualVQ(*stages)], nn.Conv3d(8, 12, 1)).eval()
    out, codes, losses = ours(latent())
    assert ours.size == 256 and len(codes) == 2 and torch.equal(ours.lookup(codes), out) and losses.keys() == {"commit"}


# --- codes ----------------------------------------------------------------------------------------------------------------


def test_comparisons_add_and_words_multiply():
    assert paper.comparisons(2, 16384) == (32_768, 268_435_456)
    assert part(3, 5).size == 125


def test_parts_are_unit_vectors_and_come_back_from_their_codes_in_order():
    ours = part(3).eval()
    parts, codes, _ = ours.split(latent())
    for a, b, book, grid in zip(parts, ours.parts(codes), ours.books, codes, strict=True):
        torch.testing.assert_close(a.norm(dim=1), torch.ones_like(a[:, 0]))
        assert torch.equal(a, b) and torch.equal(a, book.lookup([grid]))
    turned = ours.lookup([codes[1], codes[0], codes[2]])
    assert not torch.allclose(turned, ours.lookup(codes))  # the order of the books matters


@given(size=st.integers(2, 30), d=st.integers(2, 8), seed=st.integers(0, 99))
def test_the_nearest_unit_code_has_the_greatest_cosine(size, d, seed):
    x, table = units(50, d, seed=seed), units(size, d, seed=seed + 1)
    cosines = x @ table.T
    torch.testing.assert_close(cosines.gather(1, nearest(x, table)[:, None])[:, 0], cosines.max(1).values)


# --- apart ----------------------------------------------------------------------------------------------------------------


def test_apart_at_its_ends_and_its_symmetries():
    a, b = units(2, 6, 1, 4, 4), units(2, 6, 1, 4, 4, seed=1)
    right = F.normalize(b - (a * b).sum(1, keepdim=True) * a, dim=1)
    assert paper.apart(a, a).item() == pytest.approx(1) and paper.apart(a, -a).item() == pytest.approx(1)
    assert paper.apart(a, right).item() < 1e-10
    assert torch.equal(paper.apart(a, b), paper.apart(b, a)) and torch.equal(paper.apart(a, b), paper.apart(a, -b))


@pytest.mark.parametrize("d", [2, 8])
def test_random_directions_give_one_over_d(d):
    a, b = units(50, d, 1, 32, 32), units(50, d, 1, 32, 32, seed=1)
    assert paper.apart(a, b).item() == pytest.approx(1 / d, rel=0.02)


def test_apart_moves_the_heads_and_never_a_table():
    ours, z = part(3), latent()
    features = []
    for head in ours.heads:
        head.register_forward_hook(lambda m, i, o: (o.retain_grad(), features.append(o))[0])
    _, _, losses = ours.split(z)
    losses["apart"].backward()
    assert all(book.codes.grad is None or not book.codes.grad.any() for book in ours.books)
    for x in features:
        assert x.grad.abs().max() > 0
        radial = (x.grad * F.normalize(x.detach(), dim=1)).sum(1).abs()
        assert radial.max() < 1e-6 * (1 + x.grad.abs().max())
    assert 0 <= losses["apart"] <= 0.1


def test_apart_is_the_mean_of_all_pairs_and_absent_for_one():
    ours = part(3, apart=0.5, sure=0)
    parts, _, losses = ours.split(latent())
    pairs = [paper.apart(parts[i], parts[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert losses["apart"].item() == pytest.approx(0.5 * sum(pairs).item() / 3, rel=1e-5)
    assert "apart" not in part(1)(latent())[2] and "apart" not in part(2, apart=0)(latent())[2]


def test_mutual_information_of_streams_that_agree_and_of_strangers():
    a, b = (torch.randint(16, (20_000,), generator=dice(seed)) for seed in (0, 1))
    assert paper.mutual(a, b) == pytest.approx(0, abs=0.003)  # counting alone would say about 0.006
    assert paper.mutual(a, a) == pytest.approx(math.log(16), abs=0.01)
    half = torch.where(torch.arange(20_000) % 2 == 0, a, b)
    assert 0.5 < paper.mutual(a, half) < math.log(16) and paper.mutual(a, half) == pytest.approx(paper.mutual(half, a), abs=0.003)


# --- decided and even -------------------------------------------------------------------------------------------------------


def test_the_entropy_term_at_its_ends():
    table = torch.eye(8)
    assert paper.sure(table.repeat(4, 1), table).item() == pytest.approx(-math.log(8), abs=1e-4)
    assert paper.sure(table[:1].repeat(32, 1), table).item() == pytest.approx(0, abs=1e-4)
    same = torch.full((8, 8), 8**-0.5)  # as near to all codes: undecided, and even
    assert paper.sure(same, table).item() == pytest.approx(0, abs=1e-4)


def test_the_entropy_term_is_the_textbook_sum():
    x, table = units(20, 4), units(6, 4, seed=1)
    p = (-(x[:, None] - table).square().sum(-1) / 0.01).softmax(-1).double()
    slow = -(p * p.clamp(min=1e-300).log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()
    assert paper.sure(x, table).item() == pytest.approx(slow.item(), abs=1e-4)


# --- meaning ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [2, 16])
def test_infonce_is_log_b_when_all_agree_and_least_in_a_simplex(b):
    same = torch.ones(b, 5)
    assert paper.infonce(same, same).item() == pytest.approx(math.log(b), abs=1e-5)
    corners = torch.eye(b) - 1 / b
    assert paper.infonce(corners, corners).item() == pytest.approx(paper.least(b), abs=1e-5)


def test_the_least_infonce_is_far_from_zero():
    assert paper.least(16) == pytest.approx(1.82, abs=0.005) and paper.least(256) == pytest.approx(4.55, abs=0.005)


def test_meaning_reaches_the_weights_of_its_head_and_of_no_other():
    """A teacher's loss under no_grad would train nothing."""
    ours, summary, z = part(2), Meaning(4, 16), latent(4)
    parts, _, _ = ours.split(z)
    paper.infonce(summary(parts[1]), torch.randn(4, 16, generator=dice())).backward()
    grads = [[p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters()] for head in ours.heads]
    assert not any(grads[0]) and sum(grads[1]) > len(grads[1]) / 2
    assert all(p.grad is not None for p in summary.parameters())


def test_meaning_can_be_learnt():
    torch.manual_seed(0)
    head, summary, z, v = Head(12, 4, 16), Meaning(4, 16), latent(8), torch.randn(8, 16)
    adam = torch.optim.Adam([*head.parameters(), *summary.parameters()], 3e-3)
    before = None
    for _ in range(60):
        loss = paper.infonce(summary(F.normalize(head(z), dim=1)), v)
        before = before or loss.item()
        adam.zero_grad(), loss.backward(), adam.step()
    assert loss.item() < before - 0.3 and loss.item() >= paper.least(8) - 1e-5


# --- the generator ------------------------------------------------------------------------------------------------------------


def far(**more):
    torch.manual_seed(0)
    model = FAR((7, 5), 16, 2, 1, 2, (3, 3), **more)
    for end in model.ends:
        nn.init.normal_(end.weight)
    codes = torch.stack([torch.randint(size, (2, 9), generator=dice(size)) for size in (7, 5)], 1)
    return model.eval(), codes


def changed(model, codes, book, cell):
    """Which logits (book, cell) move when one code is another one."""
    other = codes.clone()
    other[:, book, cell] = (other[:, book, cell] + 1) % model.sizes[book]
    with torch.no_grad():
        return [(a - b).abs().amax((0, 2)) > 1e-6 for a, b in zip(model(codes), model(other), strict=True)]


@pytest.mark.parametrize("cell", [0, 4, 8])
def test_no_logit_looks_at_its_own_or_a_later_code(cell):
    model, codes = far()
    first, second = changed(model, codes, 0, cell)
    assert not first[: cell + 1].any() and not second[:cell].any() and second[cell] and first[cell + 1 :].all()
    first, second = changed(model, codes, 1, cell)
    assert not first[: cell + 1].any() and not second[: cell + 1].any() and second[cell + 1 :].all()


def test_the_parallel_twin_has_as_many_parameters_and_books_that_know_nothing_of_each_other():
    (model, codes), (twin, _) = far(), far(parallel=True)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(model) == count(twin)
    _, second = changed(twin, codes, 0, 4)
    assert not second[4] and second[5:].all()


def test_a_fresh_model_finds_all_codes_equally_likely():
    nll = FAR((7, 5), 16, 1, 1, 2, (3, 3)).nll(far()[1])
    torch.testing.assert_close(nll, torch.tensor([7.0, 5.0]).log())


def test_sampling_in_two_steps_gives_the_logits_of_teacher_forcing():
    model, codes = far()
    forced = model(codes)
    for i in (0, 3, 8):
        h = model.context(codes[:, :, : i + 1])[:, -1]
        one = model.ends[0](model.slots(h, [])[:, 0])
        two = model.ends[1](model.slots(h, [codes[:, 0, i]])[:, 1])
        torch.testing.assert_close(one, forced[0][:, i]), torch.testing.assert_close(two, forced[1][:, i])


def test_greedy_samples_are_the_likeliest_codes_given_themselves():
    model, _ = far()
    codes = model.sample(2, (0, 0))
    assert all(torch.equal(x.argmax(-1), codes[:, j]) for j, x in enumerate(model(codes)))
    drawn = [model.sample(2, (1, 1), dice(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_refusals():
    with pytest.raises(ValueError, match="every book has a head: got 1 heads and 2 books"):
        Factorized([nn.Identity()], [VQ(4, 4), VQ(4, 4)], nn.Identity())
    with pytest.raises(ValueError, match=r"places of this head are those of \(8, 8\) cells, got \(4, 4\)"):
        Head(12, 4, 16)(latent(side=4))
