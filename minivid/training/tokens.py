"""Models over discrete codes and questions: `codes` says the next block, `qa` answers about a clip."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import world
from ..core import corpus, fit, text, weights
from ..core.cache import Cache
from ..core.codes import nll
from ..core.model import Cond
from ..world import questions
from ..world.parts import COLOURS, MOTIONS, SHAPES
from .generators import mixed
from .recipe import Recipe, pick

CODED = {"base": 12288, "cuts": 6144, "varied": 6144}


@torch.no_grad()
def codes_of(tokenizer, data: Tensor, batch: int = 128) -> Tensor:
    """Codes `n f h w` (bytes) of clips in bytes, by a tokenizer whose bottleneck has one grid of at most 256 codes."""
    parts = (tokenizer.bottleneck(tokenizer.features(corpus.clip_of(part)))[1][0].index for part in data.split(batch))
    return torch.cat([p.to(torch.uint8) for p in parts])


def coded(batch: int, recipes: dict[str, int] = CODED, tokenizer: str = "tok-q") -> Callable:
    """Codes of 16 frames with their captions."""

    def material(device):
        tok = weights.load(tokenizer, device)
        data, said = mixed(recipes, slice(0, 16), "cpu", 48)  # films of three shots take many words
        name, said = "-".join(f"{recipe}-{n}" for recipe, n in recipes.items()), said.to(device)
        like = (tok.latent_shape(*data.shape[2:])[1:], np.uint8)
        say = lambda some: codes_of(tok, some.to(device))
        codes = corpus.encoded(tok, f"codes-{name}", data.numpy(), like, say).to(device)

        def batches(i):
            rows = pick(i, len(codes), batch, 11).to(device)
            return codes[rows].long(), said[rows]

        return batches

    return material


def next_block(model, batch, generator) -> dict[str, Tensor]:
    """Negative log-likelihood a token in nats; one caption in ten emptied."""
    codes, said = batch
    dropped = fit.uniform(len(codes), generator=generator) < 0.1
    return {"nll": nll(model.predict(codes, Cond(text=said).drop(dropped)), codes).mean()}


ASKED = {"base": 24576, "two": 12288, "many": 16384}
EACH = 4  # questions that are kept of each scene


def interviews(recipe: str, n: int, each: int = EACH) -> Tensor:
    """`each` questions about every scene with their answers, as word numbers `n each 9`: 8 places and the answer last."""
    name = f"questions-{recipe}-{n}x{each}-{text.VOCABULARY}"
    return corpus.by_all_cores(name, (n, each, 9), _interview, [(recipe, i, each) for i in range(n)])


def _interview(job) -> np.ndarray:
    recipe, i, each = job
    scene = world.draw(0, i, recipe)
    said = [questions.ask(scene, number) for number in range(each)]
    return torch.cat([text.tokens([q for q, _ in said], 8), text.tokens([a for _, a in said], 1)], 1).numpy()


def tags(recipe: str, n: int) -> Tensor:
    """Colour, shape and motion of the body that covers most of each patch of 4 x 4 pixels: word numbers `n 16 8 8 3`, or 0."""
    jobs = [(recipe, i) for i in range(n)]
    return corpus.by_all_cores(f"tags-{recipe}-{n}-{text.VOCABULARY}", (n, 16, 8, 8, 3), _tagged, jobs, np.uint8)


def _tagged(job) -> np.ndarray:
    scene = world.draw(0, job[1], job[0])
    cover, which = world.truth(scene, 8, 16, grid=1).visible.max(0)
    words = torch.stack([text.tokens([b.colour, b.shape, b.motion], 1)[:, 0] for b in scene.bodies])
    return (words[which] * (cover > 0.3)[..., None]).byte().numpy()


GLANCES = 1400  # steps that see every fourth frame; the steps after them see all frames of a quarter of the clips


def asked(batch: int, recipes: dict[str, int] = ASKED) -> Callable:
    """(clip, its questions with their answers, tags of its patches, number of its first frame, frames from one to the next).

    Four frames of a clip say nearly all that sixteen say, at less than an eighth of the cost, so most steps see four: each time
    others, with their true numbers. The last steps see clips whole. Every step has the same number of visual tokens.
    """

    def material(device):
        data = torch.cat([torch.from_numpy(np.array(corpus.clips(r, n, 32, 17)[:, :, :16])) for r, n in recipes.items()])
        said = torch.cat([interviews(r, n) for r, n in recipes.items()]).to(device)
        data, names = data.to(device), torch.cat([tags(r, n) for r, n in recipes.items()]).to(device)

        def batches(i):
            start, every = (i % 4, 4) if i < GLANCES else (0, 1)
            rows = pick(i, len(data), batch * every // 4, 13).to(device)
            seen = slice(start, None, every)
            return corpus.clip_of(data[rows][:, :, seen]), said[rows], names[rows][:, seen].long(), start, every

        return batches

    return material


NAMES = [text.tokens(list(words), 1)[:, 0] for words in (COLOURS, SHAPES, MOTIONS)]


def answer_right(model, batch, generator) -> dict[str, Tensor]:
    """Cross-entropy of the answers. The clip is watched once, then all its questions are asked.

    Answers alone teach next to nothing for long: whoever sees no shapes can't learn to ask for them, nor the other way round. So
    patches of bodies also learn to agree with the words for their colour and shape (as in large models, where a trained eye comes
    first), and what the trunk says of them to name how they move.
    """
    clip, said, tags, start, every = batch
    cache, tags = Cache(), tags.flatten(1, 3)
    seen, out = model.watch(clip, cache, start, every)
    logits = torch.stack([model.answer(question, cache) for question in said[..., :8].unbind(1)], 1)
    right = F.cross_entropy(logits.flatten(0, 1), said[..., 8].flatten())
    there, words = tags[..., 0] > 0, [names.to(tags) for names in NAMES]
    agree = [seen[there] @ model.word(names).mT / 10 for names in words[:2]] + [model.head(model.norm(out[there]))[:, words[2]]]
    named = sum(F.cross_entropy(a, (tags[there][:, i, None] == words[i]).int().argmax(1)) for i, a in enumerate(agree))
    return {"loss": right + named, "wrong": (logits.argmax(-1) != said[..., 8]).float().mean(), "named": named}


RECIPES = {
    "codes": Recipe("tokens", dict(codes=256), coded(16), next_block, 1800, 3e-3, 16, muon=1e-2),
    "qa": Recipe("answerer", {}, asked(64), answer_right, 1600, 3e-3, 64, muon=1e-2),
}
