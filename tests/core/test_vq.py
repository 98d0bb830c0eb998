"""Codebooks: against vector-quantize-pytorch and scikit-learn, against slow loops, and what each must be in the limit."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from checks import contracts
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from minivid.core import weights
from minivid.core.baselines.vq import FSQ, VQ, ResidualVQ, kmeans, nearest, straight
from minivid.core.tokenizer import Tokenizer
from minivid.lab import measure


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def latent(b=2, d=4, f=3, side=4, seed=0):
    return torch.randn(b, d, f, side, side, generator=dice(seed))


def flat(z):
    return rearrange(z, "b d f h w -> (b f h w) d")


BOTTLENECKS = {
    "gradient": lambda: VQ(16, 4),
    "unit": lambda: VQ(16, 4, unit=True),
    "means": lambda: VQ(16, 4, decay=0.9),
    "means, unit": lambda: VQ(16, 4, decay=0.9, restart=0.1, unit=True),
    "restart": lambda: VQ(16, 4, decay=0.9, restart=0.1),
    "residual": lambda: ResidualVQ(VQ(16, 4), VQ(8, 4, seed=1)),
    "scalar": lambda: FSQ((4, 4, 4, 4)),
}
each = pytest.mark.parametrize("make", BOTTLENECKS.values(), ids=BOTTLENECKS)


@each
def test_the_contract_of_a_bottleneck(make):
    """The shared contract; besides: codes in range, each in its place of the latent's grid, no losses but the two known."""
    contracts.bottleneck(make(), 4)
    part, z = make().eval(), latent()
    _, codes, losses = part(z)
    for (index, where), book in zip(codes, getattr(part, "stages", [part]), strict=True):
        assert index.shape == z[:, 0].shape and index.max() < book.size
        assert where.grid == tuple(z.shape[2:]) and where.coords.shape == (1, 48, 3)
    assert set(losses) <= {"commit", "codebook"}


@each
def test_it_stands_in_a_tokenizer(make):
    tok = Tokenizer(channels=4, time_stride=1, widths=(8, 16), depths=(1, 1), bottleneck=make()).eval()
    clip = torch.rand(1, 3, 2, 16, 16) * 2 - 1
    _, codes, losses = tok(clip)
    torch.testing.assert_close(tok.decode(tok.bottleneck.lookup(codes)), tok.decode(tok.encode(clip)))
    assert {"commit", "lean"} <= set(losses) or not tok.bottleneck(tok.features(clip))[2]


def test_straight_is_exact_and_passes_the_gradient():
    x = torch.randn(1000, requires_grad=True)
    value = torch.randn(1000) * 1e4
    out = straight(value, x)
    assert torch.equal(out, value)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones(1000))


@given(n=st.integers(1, 40), k=st.integers(1, 12), d=st.integers(1, 5), seed=st.integers(0, 99), far=st.sampled_from([0, 1000]))
def test_nearest_is_the_slow_loop(n, k, d, seed, far):
    g = dice(seed)
    x, table = torch.randn(n, d, generator=g) + far, torch.randn(k, d, generator=g) + far
    distance = (x[:, None].double() - table.double()).square().sum(-1)
    best = distance.gather(1, nearest(x, table)[:, None])[:, 0]
    torch.testing.assert_close(best, distance.min(1).values, atol=1e-4 if far else 1e-6, rtol=0)


def test_nearest_works_on_batches_and_in_half_precision():
    x, table = torch.randn(3, 50, 4), torch.randn(3, 7, 4)
    assert torch.equal(nearest(x, table), torch.stack([nearest(a, b) for a, b in zip(x, table, strict=True)]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(x, table), torch.cdist(x, table).argmin(-1))
    assert nearest(x.double(), table.double()).dtype == torch.int64


def test_memory_of_the_search_is_linear():
    """n x k distances would be 67 MB here; the search holds its input, the codes and one piece."""
    x, table = torch.randn(16384, 8), torch.randn(1024, 8)
    assert measure.peak(lambda: nearest(x, table)) < 16e6


def library(k, d, **settings):
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(d, k, rotation_trick=False, **settings)


@pytest.mark.parametrize("unit", [False, True])
def test_running_means_are_those_of_the_library(unit):
    """Codes, values, loss and gradient over several passes, begun at the same table and counts."""
    k, d, decay = 16, 4, 0.8
    ours = VQ(k, d, beta=1.0, unit=unit, decay=decay).train()
    theirs = library(k, d, decay=decay, use_cosine_sim=unit, threshold_ema_dead_code=0).train()
    share = latent()[:, 0].numel() / k
    theirs.codebook = ours.codes
    theirs._codebook.embed_avg.copy_(ours.total[None] * share), theirs._codebook.cluster_size.fill_(share)
    for i in range(5):
        z, y = latent(seed=i).requires_grad_(True), latent(seed=i).requires_grad_(True)
        out, codes, losses = ours(z)
        want, index, loss = theirs(flat(y)[None])
        assert torch.equal(codes[0].index.flatten(), index[0])
        torch.testing.assert_close(flat(out), want[0])
        torch.testing.assert_close(losses["commit"], loss[0] if loss.ndim else loss)
        (out.pow(3).sum() + losses["commit"]).backward(), (want.pow(3).sum() + loss.sum()).backward()
        torch.testing.assert_close(z.grad, y.grad)
        torch.testing.assert_close(ours.codes, theirs.codebook, atol=1e-4, rtol=1e-4)


def test_gradient_learning_is_that_of_the_library():
    """vector-quantize-pytorch's SimVQ with the identity as its layer is the plain codebook, with the same two losses."""
    from vector_quantize_pytorch import SimVQ

    ours, theirs = VQ(16, 4), SimVQ(4, 16, rotation_trick=False, codebook_transform=torch.nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        theirs.code_transform.weight.copy_(torch.eye(4)), theirs.frozen_codebook.copy_(ours.codes)
    z = latent()
    out, codes, losses = ours(z)
    want, index, loss = theirs(flat(z)[None])
    assert torch.equal(codes[0].index.flatten(), index[0])
    torch.testing.assert_close(flat(out), want[0])
    torch.testing.assert_close(sum(losses.values()), loss)


def test_gradients_of_the_losses_are_the_papers():
    """Only chosen codes move, each to what chose it; the encoder feels beta; the decoder's gradient stays off the table."""
    part, z = VQ(64, 4, beta=0.25), latent(1, 4, 1, 4).requires_grad_(True)
    out, codes, losses = part(z)
    (out.sum() + sum(losses.values())).backward()
    x, index = flat(z), codes[0].index.flatten()
    error = x - part.codes[index]
    torch.testing.assert_close(flat(z.grad), 1 + 2 * 0.25 * error.detach() / x.numel())
    want = torch.zeros(64, 4).index_add_(0, index, -2 * error.detach() / x.numel())
    torch.testing.assert_close(part.codes.grad, want)
    assert (part.codes.grad.abs().sum(1) > 0).sum() == len(index.unique())


def test_unit_codes_compare_directions():
    part, z = VQ(32, 4, unit=True), latent().requires_grad_(True)
    out, codes, _ = part(z)
    torch.testing.assert_close(flat(out).norm(dim=-1), torch.ones(96))
    cosine = F.cosine_similarity(flat(z)[:, None], part.codes[None], dim=-1)
    assert torch.equal(codes[0].index.flatten(), cosine.argmax(1))
    assert torch.equal(codes[0].index, part(3 * z)[1][0].index)
    (out * torch.randn_like(out)).sum().backward()
    assert (flat(z.grad) * flat(z)).sum(-1).abs().max() < 1e-5  # nothing along z: its length doesn't count


def test_residual_codes_are_the_librarys():
    from vector_quantize_pytorch import ResidualVQ as Theirs

    stages = [VQ(16, 4, decay=0.8, seed=i) for i in range(3)]
    ours = ResidualVQ(*stages).eval()
    theirs = Theirs(dim=4, num_quantizers=3, codebook_size=16, rotation_trick=False).eval()
    for mine, other in zip(stages, theirs.layers, strict=True):
        other.codebook = mine.codes
    z = latent()
    out, codes, _ = ours(z)
    want, index, _ = theirs(flat(z)[None])
    assert torch.equal(torch.stack([c.index.flatten() for c in codes], -1), index[0])
    torch.testing.assert_close(flat(out), want[0])
    assert ours.size == 16**3


def test_each_stage_of_a_residual_codebook_helps_and_one_is_plain():
    z = latent(8, 4, 4, 8)
    part = ResidualVQ(*[VQ(16, 4, seed=i) for i in range(3)])
    part.begin(z)
    codes = part(z)[1]
    errors = [(part.lookup(codes[:m]) - z).square().mean().item() for m in (1, 2, 3)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
    one, plain = ResidualVQ(VQ(16, 4)), VQ(16, 4)
    assert torch.equal(one(z)[0], plain(z)[0]) and torch.equal(one(z)[1][0].index, plain(z)[1][0].index)


def test_lloyd_is_scikit_learns():
    from sklearn.cluster import KMeans

    x = torch.randn(500, 3, generator=dice())
    start = x[:8]
    centres, index = kmeans(x, 8, dice(), rounds=100, start=start)
    theirs = KMeans(8, init=start.numpy(), n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(x.numpy())
    torch.testing.assert_close(centres, torch.from_numpy(theirs.cluster_centers_), atol=1e-4, rtol=0)
    assert (index.numpy() == theirs.labels_).all()


@given(n=st.integers(2, 60), seed=st.integers(0, 99), data=st.data())
def test_more_rounds_never_hurt_and_no_cluster_stays_empty(n, seed, data):
    k = data.draw(st.integers(1, n))
    x = torch.randn(n, 2, generator=dice(seed)).round(decimals=1)  # some vectors are equal
    start, errors = torch.randn(k, 2, generator=dice(seed + 1)) * 5, []
    for rounds in range(4):
        centres, index = kmeans(x, k, dice(), rounds, start)
        errors.append(float((x - centres[index]).square().sum()))
    assert all(b <= a + 1e-4 for a, b in zip(errors, errors[1:], strict=False))
    exact, _ = kmeans(x, len(x.unique(dim=0)), dice(), 2)
    assert float((x - exact[nearest(x, exact)]).abs().max()) < 1e-6  # as many centres as distinct vectors


def test_clusters_are_found_and_batches_are_independent():
    corners = torch.tensor([[0.0, 0], [9, 0], [0, 9], [9, 9]])
    x = corners.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2)
    both = torch.stack([x, x + 100])
    centres, index = kmeans(both, 4, dice())
    assert sorted(nearest(corners, centres[0]).tolist()) == [0, 1, 2, 3] and index.shape == (2, 200)
    assert float((both - torch.stack([c[i] for c, i in zip(centres, index, strict=True)])).abs().max()) < 0.6
    with pytest.raises(ValueError, match="5 vectors can't form 6 clusters"):
        kmeans(torch.randn(5, 2), 6, dice())


def use(part, z):
    """Share of the codes that z uses."""
    return len(part.search(z)[0].index.unique()) / part.size


def test_a_far_codebook_dies_by_gradient_and_restart_or_kmeans_revive_it():
    """Features one standard deviation away from the codes a coordinate: the collapse of the first chapter, and two cures."""
    z = latent(8, 8, 4, 8) + 3
    plain, means = VQ(128, 8, seed=1), VQ(128, 8, decay=0.9, restart=0.05, seed=1)
    opt = torch.optim.Adam(plain.parameters(), 3e-3)
    for _ in range(60):
        opt.zero_grad(), sum(plain(z)[2].values()).backward(), opt.step()
        means(z)
    assert use(plain, z) < 0.1 and use(means, z) > 0.95
    kept = {k: v.clone() for k, v in plain.state_dict().items()}
    plain.begin(z)
    assert use(plain, z) > 0.95 and not torch.equal(kept["codes"], plain.codes)


def test_restarts_are_rows_of_the_pass_and_resume_exactly():
    part, z = VQ(64, 4, decay=0.9, restart=0.5), latent(1, 4, 1, 4) + 10
    part.count.zero_()
    part(z)
    rows = {tuple(r) for r in flat(z).tolist()}
    # Some 60 codes are dead and the pass has 16 vectors: each revives one code, the others wait for the next pass.
    assert {tuple(c) for c in part.codes.tolist() if tuple(c) in rows} == rows
    assert (part.count == 1).sum() == 16
    again = VQ(64, 4, decay=0.9, restart=0.5)
    again.load_state_dict(part.state_dict())
    part(z), again(z)
    assert all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), again.state_dict().values(), strict=True))
    before = {k: v.clone() for k, v in part.state_dict().items()}
    part.eval()(z)
    assert all(torch.equal(v, before[k]) for k, v in part.state_dict().items())


def test_half_precision_features_are_averaged_in_full():
    part, z = VQ(16, 4, decay=0.5, restart=0.1), latent()
    again = VQ(16, 4, decay=0.5, restart=0.1)
    part(z.bfloat16()), again(z.bfloat16().float())
    assert part.codes.dtype == torch.float32 and torch.equal(part.codes, again.codes)


def test_fsq_is_the_librarys():
    from vector_quantize_pytorch import FSQ as Theirs

    levels, z = (8, 5, 4), latent(2, 3) * 2
    ours, theirs = FSQ(levels), Theirs(list(levels))
    out, _, _ = ours(z)
    want, _ = theirs(flat(z)[None])
    torch.testing.assert_close(flat(out), want[0])


@pytest.mark.usefixtures("untyped")
def test_wrong_settings_and_shapes_are_refused_in_words():
    with pytest.raises(ValueError, match="give a decay"):
        VQ(8, 4, restart=0.1)
    with pytest.raises(ValueError, match=r"'b 4 f h w', got \(2, 3, 3, 4, 4\)"):
        VQ(8, 4)(latent(d=3))
    with pytest.raises(ValueError, match="share d"):
        nearest(torch.randn(4, 3), torch.randn(4, 2))


SCRIPT = textwrap.dedent("""
    import sys, torch
    from pathlib import Path
    from torch import distributed, nn
    from minivid.core import fit
    from minivid.core.baselines.critics import info_nce
    from minivid.core.baselines.vq import VQ
    torch.set_num_threads(1)
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if world > 1:
        distributed.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=world)
    torch.manual_seed(0)
    encoder, book = nn.Linear(6, 4), VQ(32, 4, decay=0.9, restart=0.2)
    opt = torch.optim.SGD(encoder.parameters(), 0.1)
    state = fit.State({"encoder": encoder, "book": book, "opt": opt})
    def step(state, batch, generator):
        y = state.encoder(batch)
        out, _, losses = state.book(y.view(-1, 4, 1, 1, 1))
        loss = (out.flatten(1) - batch[:, :4]).square().mean() + sum(losses.values()) + info_nce(y, batch[:, :4], 0.5)
        state.opt.zero_grad(); loss.backward(); fit.average(state.encoder); state.opt.step()
        return {"loss": loss.detach()}
    batches = lambda i: torch.randn(64, 6, generator=torch.Generator().manual_seed(i)) + 2
    fit.fit(step, state, batches, 12, path=folder / f"{world}.safetensors", every=12)
""")


def test_two_processes_learn_the_codebook_and_the_contrast_of_one(tmp_path):
    """Running means, restarts and InfoNCE are those of the whole batch."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    ranks = (("0", "1"), ("0", "2"), ("1", "2"))
    for run in [subprocess.Popen([*command, *rank], stderr=subprocess.PIPE, text=True) for rank in ranks]:
        said = run.communicate(timeout=240)[1]
        assert run.returncode == 0, said
    one, two = (weights.read(tmp_path / f"{n}.safetensors")[0] for n in (1, 2))
    assert one.keys() == two.keys() and int(one["book/passes"]) == 12
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)
