"""VQ4DiT: enough codewords are the model, one candidate is classic, choices settle for good, the teacher has no loss."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from checks.models import linears, video
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

from minivid.core import noise
from minivid.core.baselines.vq import kmeans
from minivid.core.model import Cond
from minivid.lab import measure
from minivid.quantization import vq4dit as paper
from minivid.quantization.vq4dit import Settings, VQLinear

SEEDS = st.integers(0, 10_000)
BLOCKS = ["trunk.blocks.0", "trunk.blocks.1"]


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def trajectory(model, steps=4, b=2, seed=1):
    x = torch.randn(b, 4, 2, 6, 6, generator=dice(seed))
    cond = Cond(text=torch.randint(2, 200, (b, 4), generator=dice(seed)))
    return x, cond, noise.table(steps, 2), list(paper.walk(model, x, cond, noise.table(steps, 2), BLOCKS))


def student(model, s=None, seed=0):
    s = s or Settings(k=16)
    return paper.quantised(model, paper.books(model, linears(model), s, dice(seed), 10), s)


def layer(o=6, i=8, d=4, k=5, n=2, seed=0, **more):
    torch.manual_seed(seed)
    linear = nn.Linear(i, o)
    x = paper.groups(linear.weight.detach(), d)
    return linear, VQLinear(linear, nn.Parameter(kmeans(x, k, dice(seed), 10)[0]), n, **more)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- the law of limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True])
def test_a_codeword_for_every_group_is_the_model(released):
    model = video()
    codes = {name: paper.groups(model.get_submodule(name).weight, 4).unique(dim=0) for name in linears(model)}
    for s in (Settings(n=1), Settings(n=2, released=released)):
        same = paper.quantised(model, codes, s)
        for part in paper.layers(same).values():
            part.settle()
        call = trajectory(model)[3][0][0]
        assert torch.equal(same(*call), model(*call))


@given(SEEDS)
@settings(max_examples=10)
def test_one_candidate_is_the_hard_codeword_whatever_the_logits(seed):
    _, part = layer(n=1, seed=seed)
    hard = part.codes[part.index].reshape(part.shape)
    part.z = nn.Parameter(torch.randn(1, len(part.index), generator=dice(seed)))
    close(part.weight, hard)
    assert part.weight.shape == (6, 8)


def test_the_float_model_as_its_own_student_has_no_loss_at_any_step():
    model = video()
    for pair in trajectory(model)[3]:
        assert paper.block_loss(model, pair, BLOCKS) == 0


def test_the_walk_is_the_samplers_own():
    model = video()
    x, cond, times, pairs = trajectory(model)
    call, _ = pairs[-1]
    out = model(*call)
    last = noise.remix(noise.flow(), call[0], noise.flow().clean(call[0], call[1], out), times[-2], times[-1])
    close(last, noise.sample(model, noise.flow(), x, cond, times))
    for i, (call, _) in enumerate(pairs):
        close(call[0], noise.sample(model, noise.flow(), x, cond, times[: i + 1]))


def test_lloyds_rounds_never_lose_and_agree_with_scikit_learn():
    x = torch.randn(400, 4, generator=dice())
    start = x[:16].clone()
    lost = [(x - (found := kmeans(x, 16, dice(), r, start))[0][found[1]]).square().sum().item() for r in range(12)]
    assert all(b <= a + 1e-4 for a, b in itertools.pairwise(lost)) and lost[-1] < lost[0]
    centres, _ = kmeans(x, 16, dice(), 100, start)
    theirs = KMeans(16, init=start.numpy(), n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(x.numpy())
    close(centres, torch.from_numpy(theirs.cluster_centers_), 1e-4)


# --- candidates and ratios ------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 5))
@settings(max_examples=20)
def test_candidates_are_the_nearest_in_order(seed, n):
    x, codes = torch.randn(30, 3, generator=dice(seed)), torch.randn(7, 3, generator=dice(seed + 1))
    found = paper.candidates(x, codes, n)
    for group, row in zip(x, found.T.tolist(), strict=True):  # the slow loop
        assert row == sorted(range(7), key=lambda j: float((codes[j] - group).norm()))[:n]


def test_groups_that_tie_still_get_different_candidates():
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    found = paper.candidates(torch.zeros(4, 2), codes, 3)
    assert all(sorted(row) == [0, 1, 2] for row in found.T.tolist())


def test_ratios_are_shares_and_start_even_or_by_distance():
    linear, part = layer(n=3)
    close(part.ratios, torch.full((3, 12), 1 / 3))
    _, part = layer(n=3, released=True)
    far = (paper.groups(linear.weight.detach(), 4) - part.codes.detach()[part.options]).norm(dim=-1) + 1e-5
    close(part.ratios, (1 / far) / (1 / far).sum(0), 1e-3)
    assert (part.ratios >= 0).all() and (part.ratios[0] >= part.ratios[2]).all()


def test_the_ratio_loss_is_zero_only_at_a_choice():
    one, half = torch.eye(2)[:, torch.tensor([0, 1, 1])], torch.full((2, 3), 0.5)
    some = torch.tensor([[0.9, 1.0, 0.0], [0.1, 0.0, 1.0]])
    assert paper.ratio_loss(one) == 0 == paper.ratio_loss(one, True)
    assert paper.ratio_loss(half) == 1 and paper.ratio_loss(half, True) == 0.5
    close(paper.ratio_loss(some), torch.tensor(0.2 / 3))
    close(paper.ratio_loss(some, True), torch.tensor(2 * 0.18 / 6))


# --- learning -------------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=10)
def test_a_codeword_gets_the_gradients_of_its_groups_by_their_ratios(seed):
    _, part = layer(n=3, seed=seed)
    part.z.data = torch.randn(3, 12, generator=dice(seed))
    up = torch.randn(6, 8, generator=dice(seed + 1))
    part.weight.backward(up)
    slow = torch.zeros_like(part.codes)
    for group, (ratios, options) in enumerate(zip(part.ratios.detach().T, part.options.T, strict=True)):
        for r, a in zip(ratios, options, strict=True):
            slow[a] += r * paper.groups(up, 4)[group]
    close(part.codes.grad, slow, 1e-5)


def test_what_is_frozen_stays_and_gets_no_gradient_at_all():
    _, part = layer(o=40, n=2)
    part.z.data[1, :10] = 6.0  # a ratio of 0.9975, for the second candidate
    part.freeze()
    assert part.frozen.sum() == 10 and not part.settled
    before, optimiser = part.z.detach().clone(), torch.optim.RMSprop([part.z], lr=0.05, alpha=0.9)
    for _ in range(3):
        optimiser.zero_grad()
        (part.weight.square().sum() + paper.ratio_loss(part.ratios)).backward()
        assert (part.z.grad[:, :10] == 0).all() and (part.z.grad[:, 10:] != 0).any()
        optimiser.step()
    assert torch.equal(part.z[:, :10], before[:, :10]) and not torch.equal(part.z[:, 10:], before[:, 10:])
    soft = paper.groups(part.weight.detach(), 4)[:10]
    close(soft, part.codes.detach()[part.options[1, :10]])


def test_a_layer_settles_when_nearly_all_groups_have_and_says_the_same():
    _, part = layer(o=100, n=2)  # 200 groups
    part.z.data[1, :198] = 9.0
    part.freeze()
    assert not part.settled  # 99 % is not more than 99 %
    part.z.data[0, 198:] = 9.0
    soft = part.weight.detach()
    part.freeze()
    assert part.settled and part.z is None and torch.equal(part.index[:198], part.options[1, :198])
    assert torch.equal(part.index[198:], part.options[0, 198:])
    close(part.weight.detach(), soft, 1e-3)  # logits 9 apart: 1e-4 of the other codeword was left
    close(part.plain()(torch.ones(2, 8)), part(torch.ones(2, 8)))


def test_learnt_choices_are_near_the_best_of_all():
    """One output, 8 groups of 2, codebook held: all 2^8 choices are tried."""
    won = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 1, bias=False)).requires_grad_(False)
        mix = torch.randn(16, 5, generator=dice(seed))
        x = torch.randn(64, 5, generator=dice(seed)) @ mix.T + 0.1 * torch.randn(64, 16, generator=dice(seed + 9))
        pair, s = ((x,), [model(x)]), Settings(d=2, k=4, n=2, slow=0.0, weight=0.1)
        w = paper.groups(model[0].weight, 2)
        codes = {"0": kmeans(w, 3, dice(seed), 10)[0]}
        codes["0"] = codes["0"].half().float()
        soft = paper.quantised(model, codes, s)
        options = soft[0].options
        errors = torch.tensor([
            (x @ (codes["0"][options[choice, range(8)]].flatten() - model[0].weight[0])).square().mean()
            for choice in itertools.product((0, 1), repeat=8)])  # fmt: skip
        paper.calibrate(soft, [pair] * 200, ["0"], s)
        won.append((paper.block_loss(soft, pair, ["0"]).item(), errors[0], errors.min(), errors.median()))
    learnt, nearest, best, usual = torch.tensor(won).T
    assert (learnt >= best - 1e-5).all() and learnt.sum() < 0.8 * nearest.sum()
    assert learnt.sum() - best.sum() < 0.2 * (usual.sum() - best.sum())


@pytest.mark.parametrize("more", [{}, dict(released=True), dict(n=1), dict(n=3), dict(n=1, again=5), dict(shared=True)])
def test_calibration_settles_everything_lowers_the_loss_and_leaves_the_model_alone(more):
    model, s = video(), Settings(k=16, quick=0.2, slow=3e-3, **more)
    before, pairs = copy.deepcopy(model.state_dict()), trajectory(model)[3]
    soft = student(model, s)
    hard = student(model, Settings(k=16, n=1, shared=s.shared))
    told = paper.calibrate(soft, pairs * 12, BLOCKS, s)
    own = paper.layers(soft)
    assert all(part.settled for part in own.values()) and len(own) == len(linears(model))
    loss = lambda m: sum(paper.block_loss(m, pair, BLOCKS).item() for pair in pairs)
    assert loss(soft) < 0.97 * loss(hard)
    assert all(torch.equal(part.codes, part.codes.half().float()) for part in own.values())
    assert model.state_dict().keys() == before.keys() and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    shares = [step["frozen"] for step in told]
    assert all(b >= a for a, b in itertools.pairwise(shares)) and (s.n > 1 or shares[0] == 1)


def test_as_released_a_codebook_waits_for_its_layers():
    model, s = video(), Settings(k=16, released=True, quick=1.0)
    pairs, soft = trajectory(model)[3], student(video(), s)
    parts_ = paper.layers(soft)
    start, seen = {name: part.codes.detach().clone() for name, part in parts_.items()}, set()

    def look(step):
        for name, part in parts_.items():
            moved = not torch.equal(part.codes, start[name])
            assert not (moved and not part.settled)
            seen.add((part.settled, moved))

    paper.calibrate(soft, pairs * 15, BLOCKS, s, look)
    assert {(False, False), (True, True)} <= seen
    both = student(model, Settings(k=16))
    paper.calibrate(both, pairs[:1], BLOCKS, Settings(k=16))  # as written, it moves in the first step
    assert all(not torch.equal(part.codes, start[name].half().float()) for name, part in paper.layers(both).items())


def test_taken_anew_groups_have_the_nearest_codeword():
    model, s = video(), Settings(k=16, n=1, again=4, slow=0.05)
    soft = student(model, s)
    first = {name: part.index.clone() for name, part in paper.layers(soft).items()}
    pairs = trajectory(model)[3]
    paper.calibrate(soft, pairs, BLOCKS, s)
    assert any((part.index != first[name]).any() for name, part in paper.layers(soft).items())
    for name, part in paper.layers(soft).items():
        x = paper.groups(model.get_submodule(name).weight, 4)
        away = torch.cdist(x, part.codes.detach())
        assert (away.gather(1, part.index[:, None])[:, 0] <= away.min(1).values + 1e-3).all()


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_bits_are_those_that_are_stored(shared):
    model, s = video(), Settings(k=16, shared=shared)
    soft = student(model, s)
    own, counted, small = paper.layers(soft), paper.bits(soft), paper.shipped(soft)
    parts = [small.get_submodule(name) for name in own]
    books = {id(part.codes): part.codes for part in parts}
    assert len(books) == (10 if shared else 20)
    weights = sum(model.get_submodule(name).weight.numel() for name in own)
    stored = measure.stored_bytes([part.packed for part in parts]), measure.stored_bytes(list(books.values()))
    assert counted["index"] == 8 * stored[0] / weights and counted["codebook"] == 8 * stored[1] / weights
    biases = sum(part.bias.nbytes for part in parts if part.bias is not None)
    assert measure.stored_bytes(parts) == sum(stored) + biases  # and nothing else
    assert counted["total"] == counted["index"] + counted["codebook"]
    assert counted["index"] == 1.0  # log2(16) / 4; the smallest layers, 16 x 16, have just the 64 groups that 16 need


def test_a_layer_of_the_papers_size_counts_as_its_card_says():
    _, part = layer(256, 256, 4, 256, 1)
    counted = paper.bits(nn.Sequential(part))
    assert counted == {"index": 2.0, "codebook": 0.25, "total": 2.25}
    assert paper.shipped(nn.Sequential(part))[0].packed.nbytes == 256 * 256 * 2 // 8


@pytest.mark.parametrize("k, m, most", [(256, 4096, 256), (256, 512, 128), (200, 4096, 128), (256, 3, 1), (1, 8, 1)])
def test_codebooks_are_limited_by_their_groups(k, m, most):
    assert paper.limit(k, m) == most


# --- what groups want -------------------------------------------------------------------------------------------------


def test_agreement_is_the_mean_cosine_of_all_pairs():
    g, index = torch.randn(20, 4, generator=dice()), torch.randint(0, 3, (20,), generator=dice())
    index[index == 2] = 1
    index[0] = 2  # alone
    found = paper.agreement(g, index, 4)
    for k in range(2):
        mine = g[index == k]
        cosines = [F.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(mine, 2)]
        close(found[k], torch.stack(cosines).mean(), 1e-5)
    assert found[2:].isnan().all()
    close(paper.agreement(torch.ones(4, 2), torch.zeros(4, dtype=torch.long), 1), torch.ones(1))


def test_pulls_add_up_to_the_codebooks_gradient():
    model = video()
    soft, pairs = student(model, Settings(k=16, n=1)), trajectory(model)[3]
    for pair in pairs:
        paper.block_loss(soft, pair, BLOCKS).backward()
    for name, g in paper.pulls(soft, pairs, BLOCKS).items():
        part = paper.layers(soft)[name]
        close(torch.zeros_like(part.codes).index_add_(0, part.index, g), part.codes.grad, 1e-4)


# --- other models, and bad input ----------------------------------------------------------------------------------------


def test_somebody_elses_model_is_calibrated_as_well():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).requires_grad_(False)
    s, x = Settings(k=16), torch.randn(40, 16, generator=dice())
    soft = paper.quantised(model, paper.books(model, ["0", "2"], s, dice()), s)
    pair = (x,), paper.heard(model, (x,), ["2"])[0]
    told = paper.calibrate(soft, [pair] * 150, ["2"], s)
    assert told[-1]["frozen"] > 0.99 and told[-1]["apart"] < told[0]["apart"]


def test_bad_input_is_refused_in_words():
    model = video()
    with pytest.raises(ValueError, match="groups of 5: take a divisor"):
        paper.books(model, linears(model), Settings(d=5), dice())
    with pytest.raises(ValueError, match="only linear layers.*trunk.blocks.0$"):
        paper.books(model, ["trunk.blocks.0"], Settings(), dice())
    with pytest.raises(ValueError, match="1 to 3 candidates, not 4"):
        paper.candidates(torch.zeros(2, 2), torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match="`again` is for n = 1"):
        Settings(n=2, again=50)
    with pytest.raises(ValueError, match="nothing in this model can learn"):
        paper.calibrate(model, [], BLOCKS, Settings())
