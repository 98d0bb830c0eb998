"""Two small networks that look at clips, for Frechet distances and feature losses; a metric never uses the one a loss saw.

feat-A sees single frames (2-D), feat-B sees motion (3-D). Both are trained to say, for each of the world's colours, whether
such a body is there, which shape it has and how it moves; their features are the 32 numbers before that answer.
"""

import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from ...world import COLOURS, SHAPES

ANSWERS = len(COLOURS) * (1 + len(SHAPES) + 2)  # there?, which shape, velocity (x, y)


class Features(nn.Module):
    """Clip `b 3 f h w` -> 32 features a clip (`forward`), and the answers from them (`answers`).

    time: taps over time of each convolution; 1 looks at frames one by one and averages their features
    """

    def __init__(self, time: int = 3, widths: tuple[int, ...] = (32, 48, 64), out: int = 32):
        super().__init__()
        steps, c = [], 12
        for i, w in enumerate(widths):
            stride = (2 if time > 1 and i else 1, 2 if i else 1, 2 if i else 1)
            steps += [nn.Conv3d(c, w, (time, 3, 3), stride, (time // 2, 1, 1)), nn.GroupNorm(8, w), nn.SiLU()]
            c = w
        self.body = nn.Sequential(*steps, nn.Conv3d(c, c, (1, 3, 3), 1, (0, 1, 1)), nn.SiLU())
        self.squeeze, self.answer = nn.Linear(2 * c, out), nn.Linear(out, ANSWERS)

    def forward(self, clip: Float[Tensor, "b 3 f h w"]) -> Float[Tensor, "b 32"]:
        y = self.body(rearrange(clip, "b c f (h p) (w q) -> b (c p q) f h w", p=2, q=2))
        mean, most = reduce(y, "b c f h w -> b c", "mean"), reduce(y, "b c f h w -> b f c", "max").mean(1)
        return self.squeeze(F.silu(rearrange([mean, most], "s b c -> b (s c)")))

    def answers(self, clip: Tensor) -> Float[Tensor, "b colours answers"]:
        """Logit of presence, logits of the shapes, velocity in frame sides per 16 frames: one row a colour."""
        return rearrange(self.answer(F.silu(self(clip))), "b (k a) -> b k a", k=len(COLOURS))
