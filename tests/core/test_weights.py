"""Weights files: round trip in fp16, provenance, and every way in which a file can be wrong."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from minivid.core import weights
from minivid.core.tokenizer import Tokenizer

SETTINGS = dict(channels=4, widths=[8, 16], depths=[1, 1])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tok.safetensors"
    weights.save(path, Tokenizer(**SETTINGS), "tokenizer", SETTINGS, {"command": "python -m minivid train tok"})
    return path


def test_round_trip(file):
    a, b = weights.load(file), weights.load(file)
    assert not a.training and all(p.dtype == torch.float32 and not p.requires_grad for p in a.parameters())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y) and (not x.is_floating_point() or torch.equal(x, x.half().float())), name
    assert weights.card(file)["made"]["command"] == "python -m minivid train tok"
    assert file.stat().st_size < 2.5 * sum(p.numel() for p in a.parameters()) + 8000


@pytest.mark.parametrize("grid", [dict(levels=[2, 2, 2, 2]), dict(codes=16)])
def test_a_tokenizer_with_codes_comes_back_with_them(tmp_path, grid):
    clip = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    tok = weights.build("tokenizer", SETTINGS | grid)
    tok.train()(clip)  # one pass of learning moves the codes that learn
    weights.save(tmp_path / "q.safetensors", tok, "tokenizer", SETTINGS | grid, {})
    back = weights.load(tmp_path / "q.safetensors")
    assert back.bottleneck.size == 16
    latent, codes, _ = back.bottleneck(back.features(clip))
    assert codes[0].index.max() < 16 and torch.equal(back.bottleneck.lookup(codes), latent)


def test_what_goes_by_two_names_is_stored_once(tmp_path):
    book, own = torch.randn(1000), torch.randn(1000)
    tensors = {"a.book": book, "b.book": book, "b.own": own, "part": book[:500], "empty": own[:0], "none": own[:0]}
    weights.write(tmp_path / "shared.safetensors", tensors, {"by": "hand"})
    back, header = weights.read(tmp_path / "shared.safetensors")
    assert back.keys() == tensors.keys() and header == {"minivid": "1", "by": "hand"}
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert back["a.book"] is back["b.book"]
    assert 4 * 2500 < (tmp_path / "shared.safetensors").stat().st_size < 4 * 2500 + 800


def test_missing_name():
    with pytest.raises(weights.WeightsError, match="no weights called 'nothing'; there are"):
        weights.load("nothing")


def test_damaged(file):
    whole = file.read_bytes()
    for broken in (b"", b"hello", whole[: len(whole) // 2], b"\xff" * 64):
        file.write_bytes(broken)
        with pytest.raises(weights.WeightsError, match="damaged"):
            weights.load(file)


def test_foreign(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(weights.WeightsError, match="didn't write it"):
        weights.load(path)


def test_unknown_kind(tmp_path):
    path = tmp_path / "x.safetensors"
    weights.write(path, {"a": torch.zeros(2)}, {"kind": "spaceship", "settings": "{}"})
    with pytest.raises(weights.WeightsError, match="'spaceship'; this version knows"):
        weights.load(path)


def test_another_shape(tmp_path):
    path = tmp_path / "x.safetensors"
    weights.save(path, Tokenizer(**SETTINGS), "tokenizer", {**SETTINGS, "channels": 5}, {})
    with pytest.raises(weights.WeightsError, match="expected"):
        weights.load(path)


def test_values_beyond_fp16_are_not_shipped(tmp_path):
    model = Tokenizer(**SETTINGS)
    model.encoder.start.weight.data[0] = 1e6
    with pytest.raises(weights.WeightsError, match="fp16"):
        weights.save(tmp_path / "x.safetensors", model, "tokenizer", SETTINGS, {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_whole(file, monkeypatch):
    before = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        weights.save(file, Tokenizer(**SETTINGS), "tokenizer", SETTINGS, {})
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]
