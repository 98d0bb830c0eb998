"""Every way to fewer bits works on a model that isn't ours, torch's own transformer layer; and its file has these few bits."""

import pytest
import torch
from torch import nn

from minivid.core import weights
from minivid.core.baselines.quant import QuantisedLinear, minmax
from minivid.core.surgery import swap
from minivid.quantization import hawqv3, quantvggt, qvgen, shiftaddvit, vq4dit

NAMES = ["linear1", "linear2"]


def few(model, names, x):
    """The model made small by each paper."""
    dice, rows = torch.Generator().manual_seed(0), {name: model.get_submodule(name) for name in names}
    s = vq4dit.Settings(d=2, k=32, n=1)
    how = quantvggt.How((8, 8))
    turns = quantvggt.rotations(model, names, x, 0)
    seen = quantvggt.observe(model, x, how.order, turns, len(x))
    return {
        "nearest": swap(model, {name: QuantisedLinear.of(m, minmax(m.weight.detach(), 6, 1)) for name, m in rows.items()}),
        "hawqv3": hawqv3.allocated(model, dict.fromkeys(names, 6)),
        "vq4dit": vq4dit.quantised(model, vq4dit.books(model, names, s, dice, 20), s),
        "quantvggt": quantvggt.quantised(model, how, turns, seen),
        "qvgen": qvgen.quantised(model, names, qvgen.Bits(6, 8, 0, 1)),
        "shiftaddvit": shiftaddvit.converted(model, names, shiftaddvit.Shift),
    }


def stored(model, names, x):
    """The same as each of them is stored."""
    small = few(model, names, x)
    pack = lambda way: swap(model, {name: small[way].get_submodule(name).packed() for name in names})
    vq4dit.calibrate(small["vq4dit"], [], [], vq4dit.Settings(d=2, k=32, n=1))  # settles: codebooks hold fp16 values
    return {
        "nearest": small["nearest"],
        "hawqv3": hawqv3.integer_layers(model, dict.fromkeys(names, 6), [x]),
        "vq4dit": vq4dit.shipped(small["vq4dit"]),
        "quantvggt": pack("quantvggt"),
        "qvgen": qvgen.shipped(small["qvgen"]),
        "shiftaddvit": pack("shiftaddvit"),
    }


def fresh(seed=0):
    torch.manual_seed(seed)
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval().requires_grad_(False)


@pytest.fixture
def model():
    return fresh()


WEIGHTS, ROWS, COLUMNS = 2 * 32 * 64, 32 + 64, 32 + 64  # of both layers together
BYTES = {  # besides the biases; a step, an offset, a factor and a number of a codeword have two bytes, a bound of qvgen's four
    "nearest": WEIGHTS * 6 // 8 + 2 * 2 * ROWS,
    "hawqv3": WEIGHTS * 6 // 8 + 9 * ROWS + 2 * 2 * 4,  # its dyadic factors: m in eight bytes, c in one; steps in float32
    "vq4dit": WEIGHTS // 2 * 5 // 8 + 2 * 2 * 32 * 2,
    "quantvggt": WEIGHTS + 2 * ROWS + 2 * COLUMNS + COLUMNS // 8,
    "qvgen": WEIGHTS * 6 // 8 + 2 * 2 * ROWS + 2 * 2 * 4,
    "shiftaddvit": WEIGHTS * 5 // 8,
}


@pytest.mark.parametrize("way", BYTES)
def test_a_file_has_the_bits_that_are_claimed_and_is_all_that_is_needed(model, way, tmp_path):
    x, file = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(1)), tmp_path / "few.safetensors"
    small, other = stored(model, NAMES, x)[way], stored(fresh(1), NAMES, 2 * x)[way]
    said = small(x)
    assert not torch.equal(other(x), said)
    weights.write(file, small.state_dict(), {})
    other.load_state_dict(weights.read(file)[0])
    assert torch.equal(other(x), said)
    parts = {name: tensor for name, tensor in small.state_dict().items() if name.split(".")[0] in NAMES}
    weights.write(file, parts, {})
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == BYTES[way] + 4 * ROWS


def test_torchs_own_transformer(model):
    x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(1))
    said = model(x)
    for way, small in few(model, NAMES, x).items():
        off = ((small(x) - said).square().sum() / said.square().sum()).item()
        assert 0 < off < 0.02, way
    assert torch.equal(model(x), said)


def test_layers_that_are_never_called_are_named(model):
    # the fused attention reads out_proj's weight and never calls it
    with pytest.raises(ValueError, match="never called these layers.*self_attn.out_proj"):
        quantvggt.rotations(model, [*NAMES, "self_attn.out_proj"], torch.randn(4, 10, 32), 0)
