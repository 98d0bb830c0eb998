"""SimVQ: put one linear layer behind a frozen random table, so that a chosen code moves all the others too.

Paper:   Addressing Representation Collapse in Vector Quantized Models with One Linear Layer (2024), arXiv 2411.02038
Kind:    part (a bottleneck of the tokenizer)
Equal:   plain VQ: in the forward pass where the layer is the identity, in all of training where the table learns in its stead
Claim:   at 1,024 and at 4,096 codes, against plain VQ: +0.30 of the codes in use and +0.3 dB; against running means with restart
         at most 0.3 dB worse at 64, 256, 1,024 and 4,096 codes; from 256 to 4,096 codes +0.5 dB
Differs: the layer has a bias, as in the authors' code; their formula has none. No adversarial and no perceptual loss, no slow
         copy of the weights; frames of 32 x 32, vectors of 32 numbers, at most 4,096 codes. L1 with a difference of gradients
         and Adam with betas (0.9, 0.99) on a cosine, not their recipe

A codebook collapses because it is learnt code by code: whoever isn't nearest to any vector gets no gradient and stays, while
the encoder moves on. SimVQ draws a table C once, never changes it, and learns W and b of

    Q = C W' + b              K codes, rows of Q; c_j is row j of C

Let g be the gradient of the loss in the chosen code q_k. One step of gradient descent at rate eta moves code j by

    plain VQ    -eta [j = k] g            the chosen one alone
    SimVQ       -eta (<c_j, c_k> + 1) g   <c_j, c_k> through W, 1 through b

so the whole book shears and slides after the encoder. A product of matrices says nothing that one matrix couldn't say: only the
way through training differs, and afterwards Q is written out as an ordinary codebook (`plain`).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.baselines.vq import VQ

PARTS = ("codes", "weight", "bias")  # C, W, b


class SimVQ(VQ):
    """A codebook Q = C W' + b; everything else (search, straight-through gradient, both losses) is plain VQ's.

    k, d:  number of codes, and numbers in each: the channels of z
    beta:  weight of the encoder's term beta mean (z - sg q)^2; the codebook's term mean (sg z - q)^2 has weight 1
    learn: which of C, W and b learn. W and b are the method; C alone is plain VQ, C with them the variant that the paper warns
           of, W alone its formula. What doesn't learn stays at its start: C random, W the identity, b zero
    """

    def __init__(self, k: int, d: int, beta: float | int = 0.25, learn: tuple[str, ...] = ("weight", "bias"), seed: int = 0):
        super().__init__(k, d, beta, seed=seed)
        if not set(learn) <= set(PARTS):
            raise ValueError(f"what can learn is {', '.join(PARTS)}; got {', '.join(map(repr, learn))}")
        dice = torch.Generator().manual_seed(seed + 2**31)  # another stream than C's
        uniform = lambda *shape: (2 * torch.rand(*shape, generator=dice) - 1) * d**-0.5  # as nn.Linear begins: Q is 0.58 C wide
        table, weight, bias = self.codes.detach(), uniform(d, d), uniform(d)
        del self.codes
        for name, moving, still in (("codes", table, table), ("weight", weight, torch.eye(d)), ("bias", bias, torch.zeros(d))):
            if name in learn:
                setattr(self, name, nn.Parameter(moving))
            else:  # saved with the model, but unknown to its optimiser
                self.register_buffer(name, still)

    @property
    def table(self) -> Float[Tensor, "k d"]:
        """Q. Always in full precision: under autocast, codes that differ little would become equal."""
        with torch.autocast(self.codes.device.type, enabled=False):
            return F.linear(self.codes, self.weight, self.bias)

    def begin(self, z: Float[Tensor, "b d f h w"]) -> None:
        """Refused: C is drawn blind, and a book that begins at the centres of clusters is another remedy than this one."""
        raise ValueError("SimVQ's table is random and frozen; to begin at clusters of the features use core.baselines.vq.VQ")

    @torch.no_grad()
    def plain(self) -> VQ:
        """The same codes written out: an ordinary codebook, which searches and looks up without the layer."""
        book = VQ(self.size, self.d, self.beta).to(self.codes)
        book.codes.copy_(self.table)
        return book.train(self.training)


# --- looking at it ----------------------------------------------------------------------------------------------------


def reach(part: VQ) -> Float[Tensor, "k k"]:
    """How far code j (row) moves, in units of -eta g, when code k (column) alone is chosen and has the gradient g.

    Exact for W and b. For a table that learns as well it leaves out that its own step is turned by W W'.
    """
    learnt = {name for name, p in part.named_parameters() if p.requires_grad}
    each = torch.zeros(part.size, part.size, device=part.codes.device)
    each += part.codes.detach() @ part.codes.detach().T if "weight" in learnt else 0
    each += 1 if "bias" in learnt else 0
    return each + torch.eye(part.size, device=each.device) if "codes" in learnt else each


def offset(x: Float[Tensor, "n d"], table: Float[Tensor, "k d"]) -> tuple[float, float]:
    """(m, s): how far the mean of the vectors is from that of the codes, and how wide the codes are spread.

    Both a coordinate (root mean square over coordinates), in standard deviations of the vectors. At m = 0 nothing collapses.
    """
    unit = x.var(0).mean().sqrt()
    m = (x.mean(0) - table.mean(0)).square().mean().sqrt() / unit
    return m.item(), (table.var(0).mean().sqrt() / unit).item()


class Look(NamedTuple):
    """A codebook at one step of `chase`, before its update: the vectors of the step, the codes, and which are left behind."""

    step: int
    x: Float[Tensor, "n d"]
    table: Float[Tensor, "k d"]
    age: Int[Tensor, "k"]  # steps since each code was last chosen (0: by this step's vectors), counted from the start

    @property
    def usage(self) -> float:
        """Share of the codes that the vectors of this step choose."""
        return (self.age == 0).float().mean().item()


def chase(part: VQ, vectors: Callable[[int], Float[Tensor, "n d"]], steps: int, lr: float = 3e-3) -> Iterator[Look]:
    """Train a codebook alone on `vectors(i)` of step i, which don't feel it: an encoder that goes its own way.

    Yields steps + 1 looks. By Adam, the codebook's loss alone; a codebook of running means follows by itself.
    """
    learnt = [p for p in part.parameters() if p.requires_grad]
    adam = torch.optim.Adam(learnt, lr) if learnt else None
    age = torch.zeros(part.size, dtype=torch.long, device=part.codes.device)
    for i in range(steps + 1):
        x, table = vectors(i), part.table.detach().clone()
        _, codes, losses = part(rearrange(x, "n d -> 1 d n 1 1"))
        age = age + 1
        age[codes[0].index.flatten()] = 0
        yield Look(i, x, table, age)
        if adam:
            adam.zero_grad(), losses["codebook"].backward(), adam.step()
