"""Every way to fewer bits works on a model that isn't ours: torch's own transformer layer."""

import pytest
import torch
from torch import nn

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


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval().requires_grad_(False)


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
