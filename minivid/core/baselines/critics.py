"""Losses that look at more than one sample or ask more than one network: contrast (InfoNCE) and distribution matching (DMD).

What is unusual here: `everyone` lets several processes share a loss over the whole batch. It gathers their rows and weighs
the gradient so that its average over processes (`fit.average`) is the gradient that one process would have.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def everyone(x: Float[Tensor, "n ..."]) -> Float[Tensor, "m ..."]:
    """The rows of all processes in the order of the whole batch (x itself in one process); all have equally many.

    The gradient reaches this process's own rows only, times the number of processes: `fit.average` divides by it.
    """
    if not dist.is_initialized():
        return x
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.detach().contiguous())
    rows[dist.get_rank()] = x.detach() + len(rows) * (x - x.detach())
    return torch.cat(rows)


def info_nce(
    query: Float[Tensor, "n d"], target: Float[Tensor, "n d"], temperature: float | int = 1.0,
    hard: Float[Tensor, "n m d"] | None = None,
) -> Float[Tensor, ""]:
    """-log of the share of a query's own target among all targets of the batch, in nats, mean over queries (van den Oord et al.
    2018, arXiv 1807.03748, eq. 4). The batch is that of all processes.

        L = -mean_i log( exp(s_ii / T) / (sum_j exp(s_ij / T) + sum_h exp(s_ih / T)) ),   s = cosine

    hard: m further wrong answers for each query alone. The symmetric form (Radford et al. 2021, arXiv 2103.00020) is the
    mean of both directions, `(info_nce(a, b) + info_nce(b, a)) / 2`. The least value at T = 1 isn't 0: cosines end at 1.
    """
    q, t = everyone(F.normalize(query, dim=-1)), everyone(F.normalize(target, dim=-1))
    logits = q @ t.T
    if hard is not None:
        logits = torch.cat([logits, torch.einsum("nd,nmd->nm", q, everyone(F.normalize(hard, dim=-1)))], 1)
    return F.cross_entropy(logits / temperature, torch.arange(len(q), device=q.device))


def dmd(
    x: Float[Tensor, "b *shape"], fake: Float[Tensor, "b *shape"], real: Float[Tensor, "b *shape"]
) -> Float[Tensor, ""]:
    """Distribution matching distillation: moves x from where its own kind is likely to where real data are (Yin et al. 2023,
    arXiv 2311.18828, eq. 7-8; variational score distillation has the same gradient).

        grad = (fake - real) / mean|x - real|          L = |x - sg(x - grad)|^2 / 2, mean over numbers

    x:          what the generator made, with its graph
    fake, real: what two networks say x was, seeing it with the same noise: `fake` follows the generator's outputs, `real`
                is frozen. No gradient goes through them. The divisor is a mean over each sample by itself.
    """
    fake, real, still = fake.detach(), real.detach(), x.detach()
    size = (still - real).abs().flatten(1).mean(1).clamp(min=1e-8).view(-1, *[1] * (x.ndim - 1))
    return 0.5 * (x - (still - (fake - real) / size)).square().mean()
