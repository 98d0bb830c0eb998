"""A small model that watches a clip and answers a question about it with one word.

    logits = model(clip, None, Cond(text=question), cache=None)        `b words`

What is unusual here: 1,024 visual tokens (16 frames x 8 x 8 patches of 4 x 4 pixels) come first and can't see the
question, so their keys and values are computed once, kept in a cache, and serve every question (`watch`, then
`answer`). That cache is the large thing in memory, which is why it is worth compressing. Before the trunk an eye of two
small convolutions looks at each patch's neighbours in its frame.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..cache import Cache
from ..model import Cond, Context, Trunk
from ..text import PAD, VOCABULARY
from ..tokenizer import check_clip
from ..where import Where, grid


class Answerer(nn.Module):
    """`model(x, t, cond, cache=None) -> logits` over all words; t is not looked at.

    Visual tokens form block 0 (they see each other), the answer's slot and the words of the question block 1, padding
    block 2. The slot stands at frame -1, the words of the question at -2, -3 ..., whatever the length of the clip.
    """

    def __init__(self, d: int = 96, depth: int = 3, heads: int = 3, patch: int = 4):
        super().__init__()
        self.patch, self.project = patch, nn.Linear(3 * patch * patch, d)
        self.near = nn.ModuleList(nn.Conv2d(d, d, 3, padding=1) for _ in range(2))
        self.word, self.slot = nn.Embedding(VOCABULARY, d), nn.Parameter(0.5 * torch.randn(d))
        nn.init.normal_(self.word.weight, std=0.5)
        self.trunk = Trunk(d, depth, heads, text=False)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, VOCABULARY)
        for layer in self.trunk.blocks:  # no time to modulate by: gates start open
            nn.init.ones_(layer.table[2]), nn.init.ones_(layer.table[5])

    def forward(self, x: Float[Tensor, "b 3 f h w"] | None, t, cond: Cond, cache=None) -> Float[Tensor, "b words"]:
        """Watch x, then answer. x None: the cache has seen the clip already."""
        if x is not None:
            cache = cache if cache is not None else Cache()
            self.watch(x, cache)
        elif cache is None or cache.tokens == 0:
            raise ValueError("without a clip there must be a cache that has seen one: call watch(clip, cache) first")
        return self.answer(cond.text, cache)

    def see(self, clip: Tensor, start: int = 0, every: int = 1) -> tuple[Tensor, Where]:
        """The visual tokens `b n d` and their places; the clip's frames are number start, start + every, ... of what happens."""
        p = self.patch
        check_clip(clip, p)
        f, h, w = clip.shape[2], clip.shape[3] // p, clip.shape[4] // p
        patches = rearrange(clip, "b c f (h p) (w q) -> b (f h w) (c p q)", p=p, q=p)
        where = grid(f, h, w, device=clip.device)
        at = where.coords * torch.tensor([every, 1, 1], device=clip.device) + torch.tensor([start, 0, 0], device=clip.device)
        x = rearrange(self.project(patches), "b (f h w) d -> (b f) d h w", f=f, h=h)
        for near in self.near:
            x = x + near(F.gelu(x))
        return rearrange(x, "(b f) d h w -> b (f h w) d", f=f), replace(where, coords=at)

    def hear(self, question: Int[Tensor, "b l"]) -> tuple[Tensor, Where]:
        """The slot and the words of the question, `b 1+l d`, and their places."""
        vectors = torch.cat([self.slot.expand(len(question), 1, -1), self.word(question)], 1)
        steps = torch.arange(question.shape[1] + 1, device=question.device)
        coords = torch.stack([-1 - steps, 0 * steps, 0 * steps], -1).float()[None]
        block = torch.cat([torch.ones_like(question[:, :1]), 1 + (question == PAD).long()], 1)
        return vectors, Where(coords, block)

    def watch(self, clip: Float[Tensor, "b 3 f h w"], cache, start: int = 0, every: int = 1) -> tuple[Tensor, Tensor]:
        """Fill the cache with the keys and values of the clip (block 0). start, every: numbers of its frames, see `see`.

        Returns the visual tokens `b n d` before the trunk and after it.
        """
        tokens, where = self.see(clip, start, every)
        cache.open(0, Cond())
        cache.writing = True
        out = self.trunk(tokens, Context(where, cache=cache))
        cache.close(0)
        return tokens, out

    def answer(self, question: Int[Tensor, "b l"], cache) -> Float[Tensor, "b words"]:
        """Logits of the answer to a question about the clip in the cache, which stays as it is."""
        tokens, where = self.hear(question)
        cache.open(1, Cond(text=question))
        y = self.trunk(tokens, Context(where, cache=cache))
        cache.close(1)
        return self.head(self.norm(y[:, 0]))
