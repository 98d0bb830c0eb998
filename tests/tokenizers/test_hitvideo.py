"""HiTVideo: one layer is a flat tokenizer, a layer of one code is nothing, and who depends on whom."""

import math

import pytest
import torch
from checks import contracts
from hypothesis import given
from hypothesis import strategies as st

from minivid.core.baselines.vq import VQ, Codes, ResidualVQ
from minivid.core.cache import Cache
from minivid.core.codes import generate
from minivid.core.model import Cond, Guided
from minivid.core.tokenizer import Stream, Tokenizer
from minivid.core.where import grid
from minivid.tokenizers import hitvideo as paper
from minivid.tokenizers.hitvideo import HiTVideo, Layers, Level, Steered, Writer

TOP, BOTTOM = Level(16, 2, 2, d=6, depth=1, width=8), Level(5, d=4)
TWO, THREE = (TOP, BOTTOM), (Level(7, 4, 4, d=5), Level(6, 2, 2, d=4), Level(3, d=3))
CELLS = (3, 4, 4)


def latent(f=3, b=2, c=6, seed=0):
    return torch.randn(b, c, f, 4, 4, generator=torch.Generator().manual_seed(seed))


def clip(f=9, b=2, seed=0):
    return torch.rand(b, 3, f, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shaken(model, std=0.1, seed=0):
    """The same with all that begins at 0 (ends, masks) or at the identity moved, so that nothing is trivially so."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn(p.shape, generator=dice))
    return model.eval()


def part(levels=TWO, drop=0.0, c=6):
    torch.manual_seed(0)
    return shaken(Layers(c, levels, drop))


def tokenizer(levels=TWO, drop=0.0):
    torch.manual_seed(0)
    return shaken(HiTVideo(levels, drop, channels=6, widths=(8, 16)), 0.03)


def writer(levels=TWO):
    torch.manual_seed(0)
    return shaken(Writer(levels, CELLS, d=32, depth=2))


def drawn(levels=TWO, b=2, seed=0):
    dice = torch.Generator().manual_seed(seed)
    return [Codes(torch.randint(one.k, (b, *one.grid(*CELLS)), generator=dice), one.places(*one.grid(*CELLS))) for one in levels]


# --- the law of limits --------------------------------------------------------------------------------------------------


def test_one_layer_with_straight_ways_is_plain_vq_to_the_bit():
    ours, plain = Layers(6, [Level(20, d=6)]), VQ(20, 6, decay=0.99, restart=0.1)
    for way in (ours.layers[0].down, ours.layers[0].up):
        torch.nn.init.zeros_(way.linear.bias)
        way.linear.weight.data = torch.eye(6)[..., None, None]
    for i in range(3):  # the books also learn alike
        z = latent(seed=i).requires_grad_(True)
        (out, codes, losses), (want, wanted, expected) = ours(z), plain(z)
        assert torch.equal(out, want) and torch.equal(codes[0].index, wanted[0].index)
        assert torch.equal(losses["commit"], expected["commit"])
    assert torch.equal(ours.layers[0].book.codes, plain.codes)


def test_a_flat_tokenizer_is_the_packages_own_around_a_codebook():
    torch.manual_seed(0)
    ours = HiTVideo([Level(20, d=6)], channels=6, widths=(8, 16))
    plain = Tokenizer(6, 4, (8, 16), (1, 1), bottleneck=ours.bottleneck, noise=0.0)
    plain.load_state_dict(ours.state_dict())
    ours.eval(), plain.eval()
    assert torch.equal(ours(clip())[0], plain(clip())[0])
    assert torch.equal(ours.encode(clip()), plain.encode(clip()))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_layer_of_one_code_costs_nothing_and_before_training_changes_nothing(at):
    """A book of one code 0, ways without bias: what it adds is 0. Above, below or between the others."""
    torch.manual_seed(0)
    other = Layers(6, TWO).eval()
    nothing = Level(1, 2, 2, d=5, depth=1, width=8)
    levels = [*TWO[:at], nothing, *TWO[at:]]
    more = Layers(6, levels).eval()
    silent = more.layers[at]
    torch.nn.init.zeros_(silent.book.codes), torch.nn.init.zeros_(silent.up.linear.bias)
    for mine, theirs in zip([layer for layer in more.layers if layer is not silent], other.layers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    z = latent()
    (out, codes, _), (want, wanted, _) = more(z), other(z)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)
    del codes[at]
    assert all(torch.equal(a.index, b.index) for a, b in zip(codes, wanted, strict=True))
    assert paper.bits(levels, *CELLS) == paper.bits(TWO, *CELLS)


def test_layers_on_one_grid_begin_as_residual_vq():
    """Same books, straight ways: W and J start as difference and sum."""
    ours, books = Layers(6, [Level(8, d=6), Level(4, d=6)]).eval(), [VQ(8, 6), VQ(4, 6, seed=1)]
    for layer, book in zip(ours.layers, books, strict=True):
        for way in (layer.down, layer.up):
            torch.nn.init.zeros_(way.linear.bias)
            way.linear.weight.data = torch.eye(6)[..., None, None]
        layer.book.codes.copy_(book.codes)
    (out, codes, _), (want, wanted, _) = ours(latent()), ResidualVQ(*books)(latent())
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a.index, b.index) for a, b in zip(codes, wanted, strict=True))


def test_guidance_of_1_is_the_model_and_of_0_knows_no_caption():
    model, row = writer(), writer().row(drawn())
    told, null = Cond(text=torch.tensor([[5, 6], [7, 8]])), Cond(text=torch.tensor([[1, 0], [1, 0]]))
    say = lambda scale, cond: Steered(model, scale)(row, None, cond)
    assert torch.equal(say(1.0, told), model(row, None, told))
    torch.testing.assert_close(say(0.0, told), model(row, None, null), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(say(3.0, told), say(0.0, told) + 3 * (say(1.0, told) - say(0.0, told)), atol=1e-3, rtol=1e-4)
    made = [generate(one, 1, told, None, Cache(), 1.0, torch.Generator().manual_seed(0)) for one in (model, Steered(model, 1.0))]
    assert torch.equal(*made) and isinstance(Steered(model, 2.0), Guided)


# --- the bottleneck and the tokenizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [TWO, THREE, [BOTTOM], [TOP]], ids=["two", "three", "fine", "coarse"])
def test_contract_of_a_bottleneck(levels):
    if levels is not THREE:  # the contract's latent has three frames; three layers want 1 + 4
        contracts.bottleneck(part(levels), 6)
    else:
        bottleneck, z = part(levels), latent(5)
        out, codes, _ = bottleneck(z)
        assert torch.equal(bottleneck.lookup(codes), out) and out.shape == z.shape and len(codes) == 3


@pytest.mark.parametrize("levels", [TWO, THREE], ids=["two", "three"])
def test_a_clip_goes_through_codes_and_bytes_and_comes_back(levels):
    tok = tokenizer(levels)
    x = clip(17)
    codes = tok.codes(x)
    data = paper.packed(codes, levels)
    back = paper.unpacked(data, levels, 5, 4, 4)
    for a, b, level in zip(codes, back, levels, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.where.coords, b.where.coords)
        assert a.index.shape[1:] == level.grid(5, 4, 4) and a.index.max() < level.k
    assert torch.equal(tok.decode(tok.bottleneck.lookup(back)), tok.decode(tok.encode(x)))
    assert torch.equal(tok(x)[0].clamp(-1, 1), tok.decode(tok.encode(x)))  # the straight-through output, in evaluation
    assert all(0 <= 8 * len(one) - paper.bits(levels, 5, 4, 4) < 8 for one in data)


@given(ks=st.lists(st.integers(1, 300), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_any_books_pack_to_within_a_byte(ks, seed):
    levels = [Level(k, *stride) for k, stride in zip(ks, ((2, 2), (1, 2), (1, 1)), strict=False)]
    codes = drawn(levels, 3, seed)
    data = paper.packed(codes, levels)
    assert all(0 <= 8 * len(one) - paper.bits(levels, *CELLS) + 1e-6 < 8.001 for one in data)
    back = paper.unpacked(data, levels, *CELLS)
    assert all(torch.equal(a.index, b.index) for a, b in zip(codes, back, strict=True))


def test_rate_against_a_count_by_hand():
    """The card's example: grids 8 x 16 x 16 of 16 bits and 4 x 16 x 16 of 13 bits in 64 x 128 x 128 pixels; here 1 + 8 frames."""
    assert paper.bits([Level(256, 2, 2), Level(8)], 3, 8, 8) == 2 * 4 * 4 * 8 + 3 * 8 * 8 * 3 == 832
    assert paper.bits([Level(161)], 3, 8, 8) == pytest.approx(192 * math.log2(161))
    assert paper.bits([Level(1, 2, 2), Level(4)], 3, 8, 8) == 384 == paper.bits([Level(4)], 3, 8, 8)


@given(frame=st.integers(0, 16))
def test_causality(frame):
    """A changed frame leaves all tokens and all pixels of earlier groups to the bit; a group is eight frames, the first one."""
    tok = tokenizer()
    x = clip(17, 1)
    y = x.clone()
    y[:, :, frame] *= -1
    past = -(-frame // 8)  # top tokens before the group that holds the frame
    a, b = tok.codes(x), tok.codes(y)
    cells = max(0, 2 * past - 1)
    assert torch.equal(a[0].index[:, :past], b[0].index[:, :past]) and torch.equal(a[1].index[:, :cells], b[1].index[:, :cells])
    pixels = max(0, 4 * cells - 3)
    one, two = tok.decode(tok.encode(x)), tok.decode(tok.encode(y))
    assert torch.equal(one[:, :, :pixels], two[:, :, :pixels]) and not torch.equal(one, two)


def test_early_pixels_have_no_gradient_from_late_ones():
    tok, x = tokenizer(), clip(17, 1).requires_grad_(True)
    (grad,) = torch.autograd.grad(tok(x)[0][:, :, :9].square().sum(), x)
    assert grad[:, :, :9].abs().sum() > 0 and grad[:, :, 9:].abs().sum() == 0


@given(cuts=st.lists(st.integers(1, 2), min_size=1, max_size=3))
def test_streaming_any_chunk_plan_equals_one_shot(cuts):
    tok, x = tokenizer(), clip(1 + 8 * sum(cuts))
    there, again, back = Stream(), Stream(), Stream()
    pieces = x.split([1 + 8 * cuts[0], *(8 * n for n in cuts[1:])], 2)
    codes = [tok.codes(piece, there) for piece in pieces]
    for level, whole in enumerate(tok.codes(x)):
        assert torch.equal(torch.cat([c[level].index for c in codes], 1), whole.index)
    for keep in (1, 2):
        again, back = Stream(), Stream()
        z = [tok.bottleneck.lookup(c[:keep], again) for c in codes]
        whole = tok.bottleneck.lookup(tok.codes(x)[:keep])
        torch.testing.assert_close(torch.cat(z, 2), whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.cat([tok.decode(one, back) for one in z], 2), tok.decode(whole), atol=1e-5, rtol=0)


# --- who depends on whom ------------------------------------------------------------------------------------------------


def test_top_tokens_know_nothing_of_the_bottom_and_the_bottom_is_told_the_top():
    bottleneck, z = part(), latent()
    _, (top, bottom), _ = bottleneck(z)
    with torch.no_grad():
        bottleneck.layers[1].book.codes.add_(1)
    assert torch.equal(bottleneck(z)[1][0].index, top.index)
    bottleneck = part()
    with torch.no_grad():  # other vectors behind the same top tokens
        bottleneck.layers[0].up.linear.weight.copy_(bottleneck.layers[0].up.linear.weight.flip(0))
    _, (same, other), _ = bottleneck(z)
    assert torch.equal(same.index, top.index) and not torch.equal(other.index, bottom.index)


def test_the_tops_gradient_is_not_cancelled_by_what_the_bottom_is_told():
    """Straight through the difference, the bottom would hand the top's way up the negative of its own gradient."""
    torch.manual_seed(0)
    bottleneck, z = Layers(6, TWO).eval(), latent()
    out, _, _ = bottleneck(z)
    want = torch.randn(out.shape)
    up = bottleneck.layers[0].up.linear
    (grad,) = torch.autograd.grad((out * want).sum(), up.bias)
    torch.testing.assert_close(grad[:6 * 8].view(6, 2, 2, 2).sum((1, 2, 3)), want.sum((0, 2, 3, 4)), atol=1e-4, rtol=1e-4)


def test_what_is_decoded_from_the_top_alone_does_not_depend_on_the_bottom():
    bottleneck, (top, bottom) = part(), drawn()
    alone = bottleneck.lookup([top])
    gone = bottleneck.layers[1].gone.detach()
    with torch.no_grad():  # the same as a bottom of which every code is the mask
        bottleneck.layers[1].book.codes.copy_(gone.flatten().expand(5, 4))
    torch.testing.assert_close(bottleneck.lookup([top, bottom]), alone, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        bottleneck.layers[1].book.codes.add_(1)
    assert torch.equal(bottleneck.lookup([top]), alone)
    assert not torch.equal(bottleneck.lookup([top, bottom]), alone)


@given(said=st.integers(0, 48))
def test_missing_tokens_are_the_mask_and_earlier_cells_feel_no_later_frame(said):
    """None said is the top alone, all said is all; what is still missing in frame 2 doesn't change frame 1."""
    bottleneck, (top, bottom) = part(), drawn()
    index = bottom.index.flatten(1).clone()
    index[:, said:] = -1
    some = bottleneck.lookup([top, Codes(index.view_as(bottom.index), bottom.where)])
    whole, alone = bottleneck.lookup([top, bottom]), bottleneck.lookup([top])
    frames = said // 16
    assert torch.equal(some[:, :, :frames], whole[:, :, :frames])
    assert torch.equal(some[:, :, -(-said // 16) :], alone[:, :, -(-said // 16) :])


def test_dropping_happens_in_training_alone_as_often_as_said_and_the_same_when_resumed():
    bottleneck, z = Layers(6, THREE, drop=0.2), latent(5, 4000)
    first, second, third = bottleneck.masks(z)
    assert first is None and second.shape == (4000, 1, 3, 2, 2) and third.shape == (4000, 1, 5, 4, 4)
    whole = [~kept.flatten(1).any(1) for kept in (second, third)]
    assert (whole[1] | ~whole[0]).float().mean() > 0.97  # who loses the second loses the third (some cells by chance alone)
    assert whole[1].float().mean().item() == pytest.approx(0.2, abs=0.03)
    part_gone = [~kept.flatten(1).all(1) & kept.flatten(1).any(1) for kept in (second, third)]
    assert part_gone[1].float().mean().item() == pytest.approx(0.2, abs=0.03)
    resumed = Layers(6, THREE, drop=0.2)
    assert not torch.equal(bottleneck.masks(z)[2], third)
    assert torch.equal(resumed.masks(z)[2], third)
    assert bottleneck.eval().masks(z) == [None] * 3 == Layers(6, THREE).masks(z)


def test_it_begins_at_components_and_learns_with_dropped_layers():
    """The start is no worse than a flat book of the top's grid alone, and training moves the mask and lowers the error."""
    torch.manual_seed(0)
    tok = HiTVideo(TWO, 0.25, channels=6, widths=(8, 16))
    x = clip(9, 16).cumsum(-1).clamp(-1, 1)
    tok.begin(x)
    tok.eval()
    errors = [(tok.decode(tok.bottleneck.lookup(tok.codes(x)[:keep])) - x).square().mean().item() for keep in (1, 2)]
    assert errors[1] < errors[0] < x.var().item()
    adam = torch.optim.Adam(tok.train().parameters(), 3e-3)
    for _ in range(15):
        back, _, losses = tok(x)
        loss = (back - x).square().mean() + sum(losses.values())
        adam.zero_grad(), loss.backward(), adam.step()
    assert tok.bottleneck.layers[1].gone.abs().sum() > 0
    tok.eval()
    assert (tok.decode(tok.encode(x)) - x).square().mean().item() < errors[1]


# --- the model over tokens ------------------------------------------------------------------------------------------------


def test_tokens_are_counted_numbered_and_come_back():
    model, codes = writer(), drawn()
    row = model.row(codes)
    assert row.shape == (2, 1, 1, 2 * 4 + 3 * 16) and model.codes == 21
    assert row[..., :8].max() < 16 <= row[..., 8:].min()
    for a, b in zip(model.layers(row, TWO), codes, strict=True):
        assert torch.equal(a.index, b.index)
    (top,) = model.layers(row[..., :8], TWO)
    assert torch.equal(top.index, codes[0].index)


def test_a_top_token_stands_at_the_centre_of_its_cells():
    fine, coarse = (level.places(*level.grid(*CELLS)).coords[0] for level in (BOTTOM, TOP))
    assert torch.equal(fine, grid(*CELLS).coords[0])
    assert coarse[0].tolist() == [0, 0.5, 0.5] and coarse[-1].tolist() == [1.5, 2.5, 2.5]
    below = fine[(fine[:, 0] >= 1) & (fine[:, 1] >= 2) & (fine[:, 2] >= 2)]
    assert torch.equal(below.mean(0), coarse[-1])


def test_the_mask_top_first_then_bottom():
    """Gradient of each prediction in the vectors fed: none from its own token on, and the bottom is told all of the top."""
    model, row = writer(), writer().row(drawn(b=1))
    fed = []
    model.inlet.code.register_forward_hook(lambda layer, x, y: fed.append(y) or y.requires_grad_(True))
    logits = model.predict(row, Cond())[0, :, 0, 0]
    for place in (0, 5, 8, 9, 40):
        (grad,) = torch.autograd.grad(logits[:, place].logsumexp(0), fed[0], retain_graph=True)
        felt = grad[0].abs().sum(1) > 0
        assert felt[: place + 1].all() and not felt[place + 1 :].any()  # place p is fed token p - 1
    bottom = logits[:, 8:].sum(0).sum()
    assert (torch.autograd.grad(bottom, fed[0])[0][0, 1:9].abs().sum(1) > 0).all()


def test_only_codes_of_the_layer_that_is_asked_for_are_said():
    model = writer()
    p = model.predict(model.row(drawn()), Cond()).softmax(1)[0, :, 0, 0]
    assert p[16:, :8].sum() == 0 and p[:16, 8:].sum() == 0
    row = generate(model, 1, Cond(), None, Cache(), 1.0, torch.Generator().manual_seed(0), b=3)
    top, bottom = model.layers(row, TWO)
    assert top.index.shape == (3, 2, 2, 2) and bottom.index.shape == (3, 3, 4, 4) and bottom.index.max() < 5


def test_a_cache_changes_nothing_and_the_plan_may_be_all_that_is_written():
    model = writer()
    say = lambda cache, n: generate(model, 1, Cond(), None, cache, 1.0, torch.Generator().manual_seed(0), b=2)
    slow, fast = say(None, 56), say(Cache(), 56)
    assert torch.equal(slow, fast)
    model.inlet.side = (1, 8)  # stop behind the top layer
    assert torch.equal(say(Cache(), 8), slow[..., :8])


@pytest.mark.usefixtures("untyped")
def test_refusals():
    with pytest.raises(ValueError, match=r"1 \+ 2k frames and multiples of 2"):
        TOP.grid(4, 4, 4)
    with pytest.raises(ValueError, match="0 to 0.5"):
        Layers(6, TWO, drop=0.7)
    with pytest.raises(ValueError, match="'b 6 f h w'"):
        part()(latent(c=5))
    with pytest.raises(ValueError, match="can't come from"):
        Layers(6, [Level(4, d=8)]).begin(latent())
    with pytest.raises(ValueError, match="multiple of 2 frames"):
        tok, stream = tokenizer(), Stream()
        tok.codes(clip(9), stream), tok.codes(clip(8)[:, :, :4], stream)
    with pytest.raises(ValueError, match="codes lie in"):
        model = writer()
        model(torch.full((1, 1, 1, 56), 99), None, Cond())
    assert not tokenizer().frames(5) and tokenizer().frames(9) and tokenizer().frames(1)
