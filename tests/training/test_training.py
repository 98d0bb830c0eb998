"""The one command: trains, resumes to the same values, ships with provenance; the materials are what they say."""

import numpy as np
import pytest
import torch
from torch import nn

from minivid import training, world
from minivid.core import corpus, fit, text, weights
from minivid.core.tokenizer import Pix
from minivid.training import command, generators, tokenizers
from minivid.training.recipe import Recipe, pick

WORDS = text.tokens(["a red circle moves left"] * 4)
SETTINGS = dict(channels=3, time_stride=1, widths=[4, 8], depths=[1, 1])


def material(device):
    clips = world.batch(corpus.scenes("base", 6), 16, 3)
    return lambda i: clips[pick(i, 6, 4)]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    recipe = Recipe("tokenizer", SETTINGS, material, tokenizers.reconstruct, 12, 1e-3, 4, begin=begin, end=tokenizers.settle)
    monkeypatch.setitem(training.RECIPES, "tiny", recipe)
    monkeypatch.setenv("MINIVID_RUNS", str(tmp_path / "runs"))
    return tmp_path


def begin(model, batches):
    model.begin(batches(0))


def test_train_ships_weights_with_their_command(tiny):
    path = training.train("tiny", seed=3, out=tiny)
    card = weights.card(path)
    assert path.name == "tiny-3.safetensors" and card["settings"] == SETTINGS
    assert card["made"]["command"] == "python -m minivid train tiny --seed 3 --steps 12"
    model = weights.load(path)
    z = model.encode(torch.cat([material("cpu")(i) for i in range(8)]))
    assert (z.std((0, 2, 3, 4)) - 1).abs().max() < 0.01  # settled


def test_every_parameter_has_one_optimiser():
    model = weights.build("video", dict(channels=3, d=16, depth=2, heads=2))
    recipe = Recipe("video", {}, material, generators.generate_loss(), 1, muon=0.01)
    both = command.optimisers(model, recipe)
    held = {name: [p for g in part.param_groups for p in g["params"]] for name, part in both.items()}
    assert sorted(map(id, held["opt"] + held["muon"])) == sorted(map(id, model.parameters()))
    q, table = model.trunk.blocks[1].attention.q, model.trunk.blocks[1].table
    assert any(p is q.weight for p in held["muon"])
    assert all(any(p is x for p in held["opt"]) for x in (q.bias, table, model.text.word.weight, model.head.project.weight))
    assert list(command.optimisers(model, Recipe("video", {}, material, generators.generate_loss(), 1))) == ["opt"]


@pytest.mark.parametrize("muon", [None, 0.01])
def test_resumed_is_uninterrupted_and_a_new_run_starts_anew(tiny, monkeypatch, muon):
    if muon:
        batches = material("cpu")
        latents = lambda device: lambda i: (batches(i)[..., :8, :8], WORDS)
        small = dict(channels=3, d=16, depth=1, heads=2)
        recipe = Recipe("video", small, latents, generators.generate_loss(), 12, 1e-3, 4, muon=muon)
        monkeypatch.setitem(training.RECIPES, "tiny", recipe)
    whole = training.train("tiny", out=tiny / "whole")
    real, seen = training.RECIPES["tiny"].objective, []

    def breaks(model, batch, generator):
        seen.append(0)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return real(model, batch, generator)

    good = training.RECIPES["tiny"]
    monkeypatch.setattr(command, "EVERY", 5)
    monkeypatch.setitem(training.RECIPES, "tiny", Recipe(**{**vars(good), "objective": breaks}))
    with pytest.raises(KeyboardInterrupt):
        training.train("tiny", out=tiny / "broken")
    monkeypatch.setitem(training.RECIPES, "tiny", good)
    resumed = training.train("tiny", out=tiny / "broken", resume=True)
    assert weights.card(resumed)["made"]["resumed_from"] > 0
    a, b = weights.read(whole)[0], weights.read(resumed)[0]
    assert all(torch.equal(a[k], b[k]) for k in a)
    anew = training.train("tiny", out=tiny / "anew")
    assert weights.card(anew)["made"]["resumed_from"] == 0


def test_compiled_parts_train_to_the_same_values(tiny, monkeypatch):
    plain, real, compiled = training.train("tiny", out=tiny / "plain"), nn.Module.compile, []

    def without_a_compiler(module, **options):  # the tracing is real, only the machine code isn't made
        compiled.append(module)
        real(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", without_a_compiler)
    path = training.train("tiny", out=tiny / "compiled", compiled=True)
    assert len(compiled) >= 4
    a, b = weights.read(plain)[0], weights.read(path)[0]
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)
    assert weights.card(path)["made"]["products"] in ("bfloat16", "float32")


def test_errors(tiny):
    with pytest.raises(ValueError, match="no recipe called 'nothing'; there are tok-v"):
        training.train("nothing")
    training.train("tiny", out=tiny)
    with pytest.raises(ValueError, match="belongs to another run"):
        training.train("tiny", steps=20, out=tiny, resume=True)


def test_every_shipped_file_has_its_recipe():
    for name in weights.names():
        recipe = training.RECIPES[name if name in training.RECIPES else name.rsplit("-", 1)[0]]  # video-1: another seed
        card = weights.card(name)
        assert card["kind"] == recipe.kind and card["settings"] == recipe.settings
        assert card["made"]["command"].startswith("python -m minivid train ")


def test_answers_say_what_is_in_the_scene():
    scene = world.draw(0, 4)
    rows = tokenizers.answers(scene)
    for body in scene.bodies:
        there, shape, vx, vy = rows[list(world.COLOURS).index(body.colour)].tolist()
        assert (there, world.SHAPES[int(shape)]) == (1.0, body.shape)
        assert abs(vx / 16 - body.legs[0].vx) < 1e-6 and abs(vy / 16 - body.legs[0].vy) < 1e-6
    assert rows[:, 0].sum() == len(scene.bodies)


def test_batches_and_picks_are_functions_of_the_step():
    assert torch.equal(pick(5, 100, 8), pick(5, 100, 8)) and not torch.equal(pick(5, 100, 8), pick(6, 100, 8))


def test_generation_loss_is_that_of_the_whole_clip_and_drops_captions():
    seen = {}

    class Model(torch.nn.Module):
        def forward(self, x, t, cond):
            seen.update(t=t, text=cond.text)
            return torch.zeros_like(x)

    latent, words = torch.zeros(400, 2, 3, 4, 4), torch.full((400, 5), 7)
    loss = generators.generate_loss()(Model(), (latent, words), fit.draws(0, 0))["loss"]
    assert loss == pytest.approx(1.0, abs=0.02)  # the target is noise - 0
    assert torch.equal(seen["t"][:, 0], seen["t"][:, 2])
    assert 0.05 < (seen["text"][:, 0] != 7).float().mean() < 0.16


def test_the_recognition_loss_draws_from_its_generator_alone():
    """Global random state must not matter, or a resumed run would differ from an uninterrupted one."""
    model, batch = weights.build("features", {"time": 1}), (torch.zeros(2, 3, 4, 16, 16), torch.ones(2, 6, 4))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(tokenizers.recognise(model, batch, fit.draws(0, 5))["loss"])
    assert torch.equal(*found)


def test_windows_have_their_lengths_and_their_captions(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIVID_RUNS", str(tmp_path))
    pix = Pix(4)
    monkeypatch.setattr(weights, "load", lambda name, device: pix)
    batches = generators.windows("pix", "base", 8, 2, (16, 8, 1))("cpu")
    scenes = corpus.scenes("base", 8)
    clips, said = pix.encode(world.batch(scenes, 32, 17)), corpus.captions("base", 8)
    for i, (b, f) in enumerate([(2, 16), (4, 8), (8, 1), (2, 16)]):
        latent, words = batches(i)
        assert latent.shape == (b, 48, f, 8, 8) and words.shape == (b, 16)
        for row, caption in zip(latent, words, strict=True):
            same = [n for n in range(8) if torch.equal(said[n], caption)]
            assert any((clips[n][:, k : k + f] - row).abs().max() < 0.01 for n in same for k in range(18 - f))


def test_told_has_clips_with_captions_and_films_without(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIVID_RUNS", str(tmp_path))
    pix = Pix(4)
    monkeypatch.setattr(weights, "load", lambda name, device: pix)
    batches = generators.told("pix", {"base": 3, "textured": 3}, 2, 12, 64, natural=6)("cpu")
    latent, words = batches(0)
    assert latent.shape == (12, 48, 2, 16, 16) and words.shape == (12, 16)
    drawn = [scene for recipe in ("base", "textured") for scene in corpus.scenes(recipe, 3)]
    made, told = pix.encode(world.batch(drawn, 64, 2)), text.tokens([world.caption(scene) for scene in drawn])
    films = pix.encode(corpus.clip_of(torch.from_numpy(np.array(corpus.natural(6, 64, 2)))))
    for row, caption in zip(latent, words, strict=True):
        own = films if torch.equal(caption, text.tokens([""])[0]) else made[(told == caption).all(1)]
        assert any((clip - row).abs().max() < 0.01 for clip in own)
    assert len({tuple(caption.tolist()) for caption in words}) > 2
