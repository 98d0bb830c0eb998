"""Swapping a part for itself changes nothing, statistics are those of the stored activations, foreign models work like ours."""

import copy
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from minivid.core import noise
from minivid.core.attention import unfused
from minivid.core.baselines.unet import UNet
from minivid.core.cache import Cache
from minivid.core.model import Cond, Guided, VideoModel
from minivid.core.surgery import Clock, Gram, Histogram, Range, parts, record, swap, tap

TEXT = Cond(text=torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]))
DICE = torch.Generator().manual_seed(0)
X, T = torch.randn(2, 4, 3, 8, 8, generator=DICE), torch.rand(2, 3, generator=DICE)


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


def convs():
    """Somebody's small image classifier."""
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), Residual(8), Residual(8), *end)


def encoder():
    """PyTorch's own transformer, with its fused fast path on (an even number of heads, GELU, batch first)."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.1, "gelu", batch_first=True), 2)


WORDS, PADDING = torch.randn(2, 5, 16, generator=DICE), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
MODELS = {
    "video": (lambda: VideoModel(4, 32, 2, 2), (X, T, TEXT)),
    "unet": (lambda: UNet(4, widths=(8, 16, 24), d=16), (X, T, TEXT)),
    "encoder": (encoder, {"src": WORDS, "src_key_padding_mask": PADDING}),
    "convs": (convs, X[:, :, 0]),
}
each = pytest.mark.parametrize("kind", MODELS)


def make(kind):
    """A model whose zero-initialised branches were opened, in evaluation mode, and inputs for it."""
    torch.manual_seed(0)
    model, inputs = MODELS[kind][0]().eval(), MODELS[kind][1]
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return model, inputs


def call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


# parts


def test_parts_of_our_models():
    found = {name: role for name, _, role in parts(make("video")[0])}
    one = {name[15:]: role for name, role in found.items() if name.startswith("trunk.blocks.1.")}
    assert one == {
        **{f"attention.{r}": r for r in "qkvo"}, **{f"cross.{r}": f"cross-{r}" for r in "qkvo"}, "fc1": "fc1", "fc2": "fc2",
    }
    assert found["trunk.blocks.0"] == "block" and found["mod"] == found["head.mod"] == "mod"
    assert found["time.fc1"] == found["inlet.project"] == "linear"  # fc1 and fc2 are the pair of a block
    roles = [role for name, _, role in parts(UNet()) if not name.startswith("text")]
    assert roles.count("block") == roles.count("mod") == 16 and roles.count("conv") > 32
    assert roles.count("q") == 27 and roles.count("cross-q") == 16  # along time everywhere, in space at the lower levels


def test_parts_of_somebody_elses_models():
    found = {name: role for name, _, role in parts(make("encoder")[0])}
    a_layer = {"": "block", ".self_attn": "attention", ".linear1": "fc1", ".linear2": "fc2"}
    assert found == {f"layers.{i}{name}": role for i in range(2) for name, role in a_layer.items()}
    found = [(name, role) for name, _, role in parts(make("convs")[0])]
    residual = lambda i: [(f"{i}", "block"), (f"{i}.conv1", "conv"), (f"{i}.conv2", "conv")]
    assert found == [("0", "conv"), *residual(2), *residual(3), ("7", "linear")]


@each
def test_every_layer_is_a_part_once(kind):
    model = make(kind)[0]
    layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]  # the fused attention has a class of its own
    listed = [m for _, m, _ in parts(model) if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert len(layers) == len(listed) and all(a is b for a, b in zip(layers, listed, strict=True))


# swap


@each
def test_a_part_swapped_for_its_copy_is_the_same_model(kind):
    model, inputs = make(kind)
    before, state = call(model, inputs), copy.deepcopy(model.state_dict())
    for name, module in {role: (name, module) for name, module, role in parts(model)}.values():  # one of each role
        assert torch.equal(call(swap(model, {name: copy.deepcopy(module)}), inputs), before), name
    everything = swap(model, {name: copy.deepcopy(m) for name, m, role in parts(model) if role != "block"})
    assert torch.equal(call(everything, inputs), before)
    for p in everything.parameters():
        p.data.add_(0 if any(p is q for q in model.parameters()) else 1)
    assert not torch.equal(call(everything, inputs), before) and torch.equal(call(model, inputs), before)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@each
def test_a_full_rank_product_is_the_layer(kind):
    model, inputs = make(kind)

    def product(layer):
        u, s, v = torch.linalg.svd(layer.weight.data, full_matrices=False)
        first, second = nn.Linear(layer.in_features, len(s), bias=False), nn.Linear(len(s), layer.out_features)
        first.weight.data, second.weight.data, second.bias.data = v, u * s, layer.bias.data
        return nn.Sequential(first, second)

    new = {name: product(m) for name, m, _ in parts(model) if isinstance(m, nn.Linear)}
    with torch.no_grad():  # where PyTorch's encoder would take its fused path, not look at its parts, and pad with zeros
        swapped, original = call(swap(model, new), inputs), call(model, inputs)
    told = ~PADDING if kind == "encoder" else ...
    torch.testing.assert_close(swapped[told], original[told], atol=1e-4, rtol=1e-3)


@each
@pytest.mark.parametrize("grad", [True, False])
def test_the_new_part_is_really_called(kind, grad):
    model, inputs = make(kind)

    class Loud(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x):
            calls.add(self)
            return self.inner(x)

    new, calls = {name: Loud(m) for name, m, role in parts(model) if role in ("q", "fc2", "conv")}, set()
    with torch.set_grad_enabled(grad):
        call(swap(model, new), inputs)
    assert len(calls) == len(new) > 0


def test_what_is_not_touched_is_shared_and_what_is_copied_is_apart():
    model, inputs = make("video")
    new = swap(model, {"trunk.blocks.1.fc1": nn.Linear(32, 64), "trunk.blocks.1.fc2": nn.Linear(64, 32)})
    assert call(new, inputs).shape == X.shape and new.trunk.blocks[1].fc1.out_features == 64
    assert new.trunk.blocks[0] is model.trunk.blocks[0] and new.text is model.text and new.mod is model.mod
    assert new.trunk.blocks[1].attention is model.trunk.blocks[1].attention and new.trunk.blocks[1] is not model.trunk.blocks[1]
    assert new.trunk.blocks[1].attention.layer == 1 and new.trunk.blocks[1].table is model.trunk.blocks[1].table
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in new.parameters()) == 2 * 32 * 32 + 32
    new.trunk.blocks[1].register_buffer("more", torch.ones(1)), new.register_forward_hook(lambda *_: None)
    assert "trunk.blocks.1.more" not in model.state_dict() and not model._forward_hooks
    again = swap(new, {"trunk.blocks.1.fc1": model.trunk.blocks[1].fc1, "trunk.blocks.1.fc2": model.trunk.blocks[1].fc2})
    assert torch.equal(call(again, inputs), call(model, inputs))
    copy.deepcopy(new).load_state_dict(new.state_dict())


def test_a_part_may_become_nothing():
    model, inputs = make("convs")
    nothing = nn.Sequential()  # has length 0, so it counts as false
    assert swap(model, {"2": nothing})[2] is nothing
    torch.testing.assert_close(call(swap(model, {"2": nothing, "3": nothing}), inputs), model[4:](model[:2](inputs)))


def test_a_part_and_something_inside_it():
    model, inputs = make("video")
    block, layer = copy.deepcopy(model.trunk.blocks[0]), nn.Linear(32, 96)
    new = swap(model, {"trunk.blocks.1.fc1": layer, "trunk.blocks.1": block})
    assert new.trunk.blocks[1].fc1 is layer and block.fc1 is not layer and new.trunk.blocks[1].fc2 is block.fc2


def test_an_attention_plug_is_swapped_by_name():
    model, inputs = make("video")
    seen = []

    def plug(q, k, v, where):
        seen.append(q.shape)
        return unfused(q, k, v, where)

    new = swap(model, {f"trunk.blocks.{i}.attention.attend": plug for i in range(2)})
    torch.testing.assert_close(call(new, inputs), call(model, inputs), atol=1e-5, rtol=1e-4)
    assert seen == [(2, 2, 48, 16)] * 2


def test_cached_and_uncached_agree_after_surgery():
    model = VideoModel(4, 32, 2, 2, block=1).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.2 * torch.randn(p.shape))
    new, cache, out = swap(model, {"trunk.blocks.1.fc2": nn.Linear(96, 32)}), Cache(), []
    for i in range(3):
        cache.open(i, Cond())
        cache.writing = True
        out.append(new(X[:, :, i : i + 1], T[:, i : i + 1], Cond(start=i), cache))
        cache.close(i)
    torch.testing.assert_close(torch.cat(out, 2), new(X, T, Cond()), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("untyped")
def test_swap_says_what_is_wrong():
    model = make("video")[0]
    with pytest.raises(ValueError, match=r"no part 'trunk.blocks.1.fc3'.*trunk.blocks.1.fc[12]"):
        swap(model, {"trunk.blocks.1.fc3": nn.Identity()})
    for name in ("", "blocks", "trunk.blocks.0.table", "trunk.blocks.7.fc1"):
        with pytest.raises(ValueError, match=f"no part '{name}'"):
            swap(model, {name: nn.Identity()})
    with pytest.raises(ValueError, match="no part 'blocks'"), tap(model, ["blocks"]):
        pass
    with pytest.raises(TypeError, match="got a Tensor"):
        swap(model, {"trunk.blocks.1.fc1": torch.zeros(3)})
    with pytest.raises(ValueError, match="fused.*'layers.0.self_attn'"):
        swap(make("encoder")[0], {"layers.0.self_attn.out_proj": nn.Linear(16, 16)})


# record


def stored(model, inputs, name):
    """The inputs of a part, kept whole: what `record` must do without."""
    kept = []
    hook = dict(model.named_modules())[name].register_forward_hook(lambda m, args, out: kept.append(args[0].detach()))
    call(model, inputs)
    hook.remove()
    return torch.cat(kept)


DEEP = [("video", "trunk.blocks.1.fc2"), ("encoder", "layers.1.linear2"), ("unet", "mid.attention.time.o")]


@pytest.mark.parametrize("kind, name", DEEP)
def test_statistics_are_those_of_the_stored_inputs(kind, name):
    model, inputs = make(kind)
    x = stored(model, inputs, name)
    x = x.reshape(-1, x.shape[-1]).double()
    gram, span, bars = Gram(), Range(), Histogram(-1, 1, 8)
    record(model, [inputs] * 3, {name: gram})
    record(model, [inputs] * 3, {name: span})
    record(model, [inputs] * 3, {name: bars})
    assert gram.n == 3 * len(x) and gram.xx.dtype == torch.float64
    torch.testing.assert_close(gram.xx, 3 * x.T @ x, atol=1e-9, rtol=1e-9)
    assert torch.equal(span.low.double(), x.min(0).values) and torch.equal(span.high.double(), x.max(0).values)
    assert bars.counts.tolist() == (3 * np.histogram(x.numpy().clip(-1, 1 - 1e-6), np.linspace(-1, 1, 9))[0]).tolist()


def test_many_batches_are_one():
    model, x = make("convs")[0].double(), torch.randn(6, 4, 8, 8).double()
    whole, split = Gram(1), Gram(1)
    record(model, [x], {"2.conv2": whole})
    record(model, x.split([3, 1, 2]), {"2.conv2": split})
    torch.testing.assert_close(whole.xx, split.xx, atol=1e-10, rtol=1e-10)
    assert whole.xx.shape == (8, 8) and whole.n == split.n == 6 * 6 * 6


def test_outputs_are_recorded_too_and_blocks_give_what_the_next_gets():
    model, inputs = make("video")
    left, got = Gram(), Gram()
    record(model, [inputs], {"trunk.blocks.1": got}, {"trunk.blocks.0": left})
    assert torch.equal(left.xx, got.xx)


def test_recording_keeps_no_activation_and_leaves_the_model_as_it_was():
    model, inputs = make("convs")
    model.train()
    model[2].eval()
    state, seen = copy.deepcopy(model.state_dict()), []

    class Watch(Gram):
        def add(self, x):
            assert not x.requires_grad and not model.training
            seen.append(weakref.ref(x))
            super().add(x)

    record(model, [inputs] * 3, {"2.conv2": Watch(1)})
    assert len(seen) == 3 and not any(ref() is not None for ref in seen)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert model.training and not model[2].training and not model[2].conv2._forward_hooks
    with pytest.raises(RuntimeError):
        record(model, [torch.zeros(1)], {"2.conv2": Gram()})
    assert model.training and not model[2].conv2._forward_hooks


def test_record_says_what_is_wrong():
    model, inputs = make("encoder")
    with pytest.raises(ValueError, match="no part 'layers.0.linear3'.*layers.0.linear1"):
        record(model, [inputs], {"layers.0.linear3": Gram()})
    with pytest.raises(ValueError, match="never called: layers.0.self_attn.out_proj"):
        record(model, [inputs], {"layers.0.self_attn.out_proj": Gram()})
    with pytest.raises(ValueError, match="low < high"):
        Histogram(1, 1)


def test_what_lies_outside_a_histogram_counts_at_its_ends():
    bars = Histogram(0, 1, 4)
    for x in torch.tensor([-7, 0, 0.3, 0.3, 0.99, 1, 9.0]).split(2):
        bars.add(x)
    assert bars.counts.tolist() == [2, 2, 0, 3]


# tap


@each
def test_features_are_what_the_part_said_with_their_graph(kind):
    model, inputs = make(kind)
    blocks = [name for name, _, role in parts(model) if role == "block"]
    first, last = blocks[0], blocks[-1]
    with tap(model, [first, last]) as features:
        out = call(model, inputs)
    features[last].square().sum().backward()
    grads = {name: any(p.grad is not None for p in m.parameters()) for name, m in model.named_modules()}
    assert grads[first] and grads[last] and features[first].requires_grad
    names = [name for name, p in model.named_parameters() if p.grad is None]
    assert (kind == "encoder") == (names == [])  # what comes after the tapped part gets none
    assert torch.equal(out, call(model, inputs)) and not any(m._forward_hooks for m in model.modules())


def test_a_tap_sees_inside_the_fused_encoder_and_the_last_call_only():
    model, inputs = make("encoder")
    with torch.no_grad(), tap(model, ["layers.1.linear1", "layers.0.self_attn"]) as features:
        call(model, inputs)
        features["once"] = features["layers.1.linear1"]
        call(model, {"src": WORDS + 1}), call(model, inputs)
    assert torch.equal(features["once"], features["layers.1.linear1"]) and features["once"].shape == (2, 5, 32)
    assert isinstance(features["layers.0.self_attn"], tuple)  # PyTorch's attention says its output and its map


# the clock


class Timed(nn.Module):
    """A layer that asks the clock."""

    def __init__(self, inner, clock):
        super().__init__()
        self.inner, self.clock, self.seen = inner, clock, []

    def forward(self, x):
        self.seen.append(self.clock.t)
        return self.inner(x)


def timed(model, name="trunk.blocks.0.fc1"):
    clock = Clock()
    part = Timed(dict(model.named_modules())[name], clock)
    return swap(model, {name: part}, clock), part


def test_parts_know_the_time_of_the_call():
    model, inputs = make("video")
    new, part = timed(model)
    assert torch.equal(new(X, T, TEXT), model(X, T, TEXT)) and part.seen[-1] is T
    new(X, cond=TEXT, t=1 - T)
    assert torch.equal(part.seen[-1], 1 - T)
    Guided(new, 3.0)(X, T, TEXT)
    assert torch.equal(part.seen[-1], torch.cat([T, T]))
    del part.seen[:]
    noise.sample(new, noise.flow(), X, TEXT, noise.table(4, 3))
    assert [t.unique().tolist() for t in part.seen] == [[1.0], [0.75], [0.5], [0.25]]


def test_a_copy_has_a_clock_of_its_own():
    new, part = timed(make("unet")[0], "mid.attention.time.q")
    other = copy.deepcopy(new)
    new(X, T, TEXT), other(X, T / 2, TEXT)
    assert other.mid.attention.time.q.seen != [] and part.clock.t is T
    assert torch.equal(other.mid.attention.time.q.clock.t, T / 2)


def test_a_clock_for_a_model_that_calls_its_time_otherwise():
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, sample, text, timestep=None):
            return self.layer(sample)

    clock = Clock("timestep", 2)
    part = Timed(nn.Linear(3, 3), clock)
    model = swap(Foreign(), {"layer": part}, clock)
    model(torch.zeros(1, 3), None, 7), model(torch.zeros(1, 3), None, timestep=8), model(torch.zeros(1, 3), None)
    assert part.seen == [7, 8, None]
