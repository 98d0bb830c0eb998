"""FQGAN: one book is the plain VQ, L_dis moves heads and never codes, the writer's steps are its one pass."""

import math

import pytest
import torch

from minivid.core import text
from minivid.core.baselines.vq import VQ, Codes
from minivid.core.cache import Cache
from minivid.core.model import Cond
from minivid.core.tokenizer import Tokenizer
from minivid.core.where import grid
from minivid.tokenizers.fqgan import Adapter, Factorised, Reader, Writer, disentangled, entropies, joined, split


def features(c=32, b=2, f=1, seed=0):
    return torch.randn(b, c, f, 8, 8, generator=torch.Generator().manual_seed(seed))


def unit(b, d, n=400, seed=0):
    x = torch.randn(b, d, 1, 1, n, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


# --- the bottleneck -----------------------------------------------------------------------------------------------------


def test_one_book_behind_a_plain_adapter_is_the_unit_vq():
    part, book = Factorised(c=8, k=16, heads=1, even=0, adapter={"depth": 0}), VQ(16, 8, unit=True, seed=0)
    with torch.no_grad():
        for conv in (part.adapters[0].out, part.up):
            conv.weight.copy_(torch.eye(8).view(conv.weight.shape))
            conv.bias.zero_()
    z = features(8)
    mine, codes, losses = part(z)
    value, other, more = book(z)
    assert torch.equal(codes[0].index, other[0].index) and losses == more
    torch.testing.assert_close(mine, value)


def test_distances_and_combinations():
    part = Factorised(k=64, heads=2)
    assert part.size == 64**2 and sum(len(book.table) for book in part.books) == 128


def test_codes_are_unit_vectors_and_the_nearest_by_angle():
    part = Factorised(k=32, heads=3)
    z = features()
    out, codes, _ = part.said(z)
    for adapter, book, value, one in zip(part.adapters, part.books, out, codes, strict=True):
        torch.testing.assert_close(value.norm(dim=1), torch.ones(2, 1, 8, 8))
        cosine = torch.einsum("nd,kd->nk", book.cells(adapter(z)), book.table)
        assert torch.equal(cosine.argmax(-1), one.index.flatten())


def test_stored_codes_give_the_latent():
    part = Factorised(k=32).eval()
    value, codes, _ = part(features())
    kept = [Codes(one.index.to(torch.uint8).long(), one.where) for one in codes]
    torch.testing.assert_close(part.lookup(kept), value, atol=1e-5, rtol=0)


def test_it_stands_in_a_tokenizer():
    torch.manual_seed(0)
    tok = Tokenizer(32, 1, (16, 24), (1, 1), bottleneck=Factorised(32, 16, decay=0.99, restart=0.1), noise=0.0)
    clip = torch.rand(2, 3, 1, 32, 32) * 2 - 1
    back, codes, losses = tok(clip)
    assert back.shape == clip.shape and len(codes) == 2 and {"commit", "even", "dis"} <= set(losses)
    tok.eval()
    torch.testing.assert_close(tok.decode(tok.bottleneck.lookup(tok(clip)[1])), tok.decode(tok.encode(clip)))


def test_positions_belong_to_a_grid():
    with pytest.raises(ValueError, match="positions belong to frames"):
        Adapter(8, 4)(torch.randn(1, 8, 1, 4, 4))


# --- losses -------------------------------------------------------------------------------------------------------------


def test_the_range_of_disentanglement():
    a, b = unit(1, 8), unit(1, 8, seed=1)
    assert disentangled([a, a]) == pytest.approx(1, abs=1e-6) and disentangled([a, -a]) == pytest.approx(1, abs=1e-6)
    right = b - (a * b).sum(1, keepdim=True) * a
    assert disentangled([a, right / right.norm(dim=1, keepdim=True)]) < 1e-10
    assert torch.equal(disentangled([a, b]), disentangled([b, a])) and torch.equal(disentangled([a, b]), disentangled([-a, b]))
    many = disentangled([unit(1, 8, 40000), unit(1, 8, 40000, seed=1)])
    assert many == pytest.approx(1 / 8, rel=0.03)


def test_disentanglement_moves_the_heads_and_never_the_codes():
    part = Factorised(k=16)
    heard = [adapter(features()).detach().requires_grad_() for adapter in part.adapters]
    out = [book(x)[0] for book, x in zip(part.books, heard, strict=True)]
    disentangled(out).backward()
    assert all(book.codes.grad is None or not book.codes.grad.any() for book in part.books)
    for x in heard:
        assert x.grad.abs().sum() > 0
        inside = (x.grad * x).sum(1) / x.norm(dim=1)
        assert inside.abs().max() < 1e-5 * x.grad.norm(dim=1).max() + 1e-8


def test_entropies_at_their_ends():
    table = torch.eye(8)
    assert entropies(table, table) == pytest.approx(-math.log(8), abs=1e-4)
    assert entropies(table[:1].expand(20, -1), table) == pytest.approx(0, abs=1e-4)


def test_the_entropies_are_the_textbook_sum():
    x, table = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.randn(6, 4)
    p = (-(x[:, None] - table).square().sum(-1) / 0.5).softmax(-1).double()
    slow = -(p * p.clamp(min=1e-300).log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()
    assert entropies(x, table, 0.5).item() == pytest.approx(slow.item(), abs=1e-4)


def test_three_heads_are_kept_apart_in_pairs_and_one_head_from_nobody():
    part = Factorised(k=16, heads=3, lam=0.5, even=0)
    out, _, losses = part.said(features())
    pairs = [disentangled([out[i], out[j]]) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(losses["dis"], 0.5 * sum(pairs) / 3)
    assert "dis" not in Factorised(k=16, heads=1)(features())[2] and "dis" not in Factorised(k=16, lam=0)(features())[2]


def test_the_teacher_moves_its_head_and_no_other():
    """A teacher's loss that is computed without gradients would train nothing."""
    part, reader = Factorised(k=16), Reader(8, 12)
    out, _, _ = part.said(features())
    reader.loss(out[1], torch.randn(2, 12)).backward()
    moved = [[p.grad is not None and bool(p.grad.any()) for p in head.parameters()] for head in part.adapters]
    assert not any(moved[0]) and sum(moved[1]) > len(moved[1]) / 2


def test_the_teacher_is_heard_and_its_loss_ends_where_it_must():
    reader, q = Reader(8, 12), torch.randn(16, 8, 1, 8, 8, requires_grad=True)
    teacher = torch.randn(16, 12)
    loss = reader.loss(q, teacher)
    loss.backward()
    assert q.grad.abs().sum() > 0 and all(p.grad is not None for p in reader.parameters())
    simplex = torch.eye(16) - 1 / 16
    reader.forward = lambda _: simplex
    least = math.log(1 + 15 * math.exp(-1 - 1 / 15))
    assert reader.loss(q, simplex) == pytest.approx(least, abs=1e-5) and least == pytest.approx(1.82, abs=0.02)
    reader.forward = lambda _: torch.ones(16, 16)
    assert reader.loss(q, torch.ones(16, 16)) == pytest.approx(math.log(16), abs=1e-5)


# --- the writer ---------------------------------------------------------------------------------------------------------


def ready(alone=False):
    torch.manual_seed(0)
    model = Writer(8, 3, 32, 2, (2, 4), alone).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def told():
    return Cond(text=text.tokens(["a red circle moves left", "a blue square moves up"], 8))


def test_numbers_of_combinations():
    codes = [torch.randint(8, (2, 5)) for _ in range(3)]
    ids = joined(codes, 8)
    assert ids.max() < 512 and all(torch.equal(a, b) for a, b in zip(split(ids, 8, 3), codes, strict=True))
    assert joined([torch.tensor([1]), torch.tensor([0])], 8) == 8


def test_a_code_sees_the_codes_before_it_at_its_place_and_earlier_places_only():
    model, b = ready(), 1
    codes = [torch.randint(8, (b, 1, 2, 4), generator=torch.Generator().manual_seed(s)) for s in range(3)]
    base = model.nll(codes, Cond())
    for place, slot in ((3, 0), (3, 1), (3, 2), (6, 1)):
        other = [one.clone() for one in codes]
        other[slot].view(-1)[place] = (other[slot].view(-1)[place] + 1) % 8
        moved = (model.nll(other, Cond()) - base).abs()[0] > 1e-12
        moved[place, slot] = False  # its own likelihood
        assert not moved[:place].any() and not moved[place, : slot + 1].any()
        assert moved[place, slot + 1 :].all() and moved[place + 1 :].all()


def test_the_twin_says_every_code_by_itself():
    model = ready(alone=True)
    codes = [torch.randint(8, (1, 1, 2, 4), generator=torch.Generator().manual_seed(s)) for s in range(3)]
    other = [codes[0].clone(), *codes[1:]]
    other[0][0, 0, 1, 3] = (other[0][0, 0, 1, 3] + 1) % 8
    change = (model.nll(other, Cond()) - model.nll(codes, Cond())).abs()[0, 7]
    assert change[0] > 1e-6 and not change[1:].any()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ready().parameters())


def test_steps_with_a_cache_are_one_pass():
    model, u = ready(), torch.rand(2, 16, 3, generator=torch.Generator().manual_seed(1)).double()
    plain, cached = (model.generate(2, told(), u, cache) for cache in (None, Cache()))
    assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))
    ids = joined(plain, 8)
    fed = torch.cat([torch.full((2, 1), 512), ids.flatten(1)[:, :-1]], 1).view_as(ids)
    logits = model.slot(model.context(fed, told()), [one.flatten(1) for one in plain[:-1]])
    for s, one in enumerate(plain):
        below = logits[s].softmax(-1).cumsum(-1)
        again = (below <= u[..., s : s + 1] * below[..., -1:]).sum(-1)
        assert torch.equal(again, one.flatten(1))


def test_a_fresh_writer_knows_nothing():
    model = Writer(8, 2, 32, 1, (2, 4))
    codes = [torch.randint(8, (2, 1, 2, 4)) for _ in range(2)]
    torch.testing.assert_close(model.nll(codes, Cond()), torch.full((2, 8, 2), math.log(8)))
    with pytest.raises(ValueError, match=r"codes lie in \[0, 8\)"):
        model.nll([codes[0] + 8, codes[1]], Cond())


def test_places_of_a_grid():
    codes = Factorised(k=16)(features(f=2))[1]
    assert all(torch.equal(one.where.coords, grid(2, 8, 8).coords) for one in codes)
