"""MoDeGPT: shrink the width *between* two matrices that stand in a row, so that what they say together is kept best.

Paper:   MoDeGPT: Modular Decomposition for Large Language Model Compression (2024), arXiv 2408.09632
Kind:    surgery (a trained model in, a narrower one out: no gradient, no fine-tuning, no further matrices)
Equal:   the model, where all widths are kept; a width that carries nothing may go at no cost
Claim:   with 30 % of the blocks' matrices gone the loss rises at least 20 % less than by whitened SVD, 50 % less than by plain
         SVD and by pruning; shares of removal by influence beat even ones; of a feed-forward, units by leverage err 5 % less
         than random ones with the same fit, and the fit itself halves the error of the largest; q.k pays for the rotation
Differs: a video generator of 1.9 M parameters measured with three draws of calibration, not language models and their tasks.
         Attention to words is cut as well. Rotary pairs of all three axes compete, and each keeps its axis and frequency.
         Queries and keys that are normed are left alone, since a norm over fewer numbers is another norm. Inferred, since the
         authors' code wasn't found: the entropy in the allocation, its cap of 0.8, both ridges, the size of the calibration

Replacing one matrix by two thin ones pays only below half the rank: 2 r d numbers against d d. But a transformer has pairs of
matrices with a width between them, and that width can simply shrink. What stands between the two decides how:

    I    act(X U) D       an activation   Nystroem: keep k hidden units, say the others through them
    II   (X Q) (Y K)'     a rotation      CR: keep the same rotary pairs of both
    III  A X V O          nothing         SVD: the best rank r there is (A: the attention of a head)

All three need only covariances of activations, kept in float64. Matrices stand as in the paper, y = X W, where `nn.Linear`
keeps W'; X are the rows that enter, after the norm.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.attention import Attention
from ..core.baselines.lowrank import linear
from ..core.surgery import Gram, parts, record, swap

CAP = 0.8  # no block loses more than this share
# --- the three decompositions -----------------------------------------------------------------------------------------


def leverage(c: Float[Tensor, "n n"], ridge: float = 1e-2) -> Float[Tensor, "n"]:
    """Ridge leverage scores 1 - lambda [(C + lambda I)^-1]_ii, in [0, 1): how badly the others can stand in for a unit.

    ridge: lambda in units of the mean eigenvalue of C = h'h. The scores sum to the effective dimension.
    """
    c, eye = c.double(), torch.eye(len(c), dtype=torch.float64, device=c.device)
    limit = ridge * c.trace() / len(c)
    return 1 - limit * torch.linalg.inv(c + limit * eye).diagonal()


def nystroem(c: Float[Tensor, "n n"], keep: Int[Tensor, "k"]) -> Float[Tensor, "k n"]:
    """M = C[J, J]^+ C[J, :], so that h ~ h[:, J] M: the least-squares fit of all hidden units by those that stay."""
    c = c.double()
    return torch.linalg.pinv(c[keep][:, keep], hermitian=True) @ c[keep]


def products(c_q: Float[Tensor, "k d d"], c_k: Float[Tensor, "g d d"], rotary: bool) -> Float[Tensor, "g p"]:
    """CR scores of each key head: of column j, |Q_j| |K_j| = sqrt(C_Q[j,j] C_K[j,j]); where columns turn in pairs (j, j + d/2),
    the sum of the two squares. Added up over the query heads that share a key head."""
    square = c_q.diagonal(dim1=1, dim2=2) * c_k.diagonal(dim1=1, dim2=2).repeat_interleave(len(c_q) // len(c_k), 0)
    score = sum(square.chunk(2, -1)) if rotary else square.sqrt()
    return score.unflatten(0, (len(c_k), -1)).sum(1)


def roots(c: Float[Tensor, "d d"], ridge: float = 1e-5) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """C^1/2 and C^-1/2, with ridge times the mean eigenvalue added to all, or directions without inputs would explode."""
    value, vector = torch.linalg.eigh(c.double())
    value = (value.clamp_min(0) + ridge * value.mean()).sqrt()
    return (vector * value) @ vector.T, (vector / value) @ vector.T


Factors = tuple[Float[Tensor, "g d r"], Float[Tensor, "g r n"]]


def values(c: Float[Tensor, "d d"], v: Float[Tensor, "g d e"], o: Float[Tensor, "g e n"], rank: int, ridge=1e-5) -> Factors:
    """V', O' of rank r that minimise |X (V O - V' O')|, head by head, by two small decompositions in place of a large one.

    C^1/2 V = U S W';  S W' O = U' S' W'';  then V' = C^-1/2 U U'[:, :r] and O' = S'[:r] W''[:r].
    """
    root, inverse = roots(c, ridge)
    u, s, w = torch.linalg.svd(root @ v.double(), full_matrices=False)
    u2, s2, w2 = torch.linalg.svd(s[..., None] * (w @ o.double()), full_matrices=False)
    return inverse @ u @ u2[..., :rank], s2[:, :rank, None] * w2[:, :rank]


# --- what can shrink --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Layers around one width.

    kind:    "mlp", "qk" or "vo": types I, II, III; block: the block that they stand in
    layers:  names: (up, down) or (up, gate, down); (q, k); (v, o)
    full:    the width: hidden units, or numbers a head
    heads:   of queries; key_heads: of keys and values
    rotary:  whether two numbers j and j + full/2 turn together, in an `Attention` of ours
    rescale: whether the attention divides by the root of the width that it sees
    """

    kind: str
    block: str
    layers: tuple[str, ...]
    full: int
    heads: int = 1
    key_heads: int = 1
    rotary: bool = False
    rescale: bool = False

    def kept(self, removed: float) -> int:
        """The width that stays when this share goes. Something always stays; of what turns in pairs, pairs."""
        step = 2 if self.rotary else 1
        return max(step, step * round((1 - removed) * self.full / step))

    def size(self, model: nn.Module, width: int) -> int:
        """Numbers in the matrices when this width stays."""
        return sum(model.get_submodule(name).weight.numel() for name in self.layers) * width // self.full


def find(model: nn.Module, within: str = "", plain: Sequence[str] = ()) -> list[Pair]:
    """All pairs of the model's blocks, in order of depth.

    within: only in parts whose name begins so
    plain:  self-attentions, not ours, that compare queries and keys as they are. Of others nobody can tell from outside, and
            theirs stay as they are, as do those that are normed before (some part of the attention has "norm" in its name):
            a norm over fewer numbers is another norm
    Raises ValueError where there is nothing to shrink.
    """
    groups, block, found = {}, "", []
    for name, _, role in parts(model):
        block = name if role == "block" else block
        above, _, last = name.rpartition(".")
        if name.startswith(within) and block and name.startswith(block + "."):
            groups.setdefault((block, above), {})["gate" if last.startswith("gate") else role] = name
    for (block, above), names in groups.items():
        if "fc1" in names and "fc2" in names:
            layers = tuple(names[role] for role in ("fc1", "gate", "fc2") if role in names)
            found.append(Pair("mlp", block, layers, model.get_submodule(layers[-1]).in_features))
        cross = "cross-" if "cross-q" in names else ""
        if all(cross + role in names for role in "qkvo"):
            found += _heads(model, block, above, [names[cross + role] for role in "qkvo"], bool(cross) or above in plain)
    if not found:
        raise ValueError(f"no block within {within!r} has a feed-forward, or an attention, made of plain linear layers")
    return found


def _heads(model: nn.Module, block: str, above: str, names: list[str], plain: bool) -> list[Pair]:
    """The pairs of one attention."""
    whole, k, v = (model.get_submodule(name) for name in (above, *names[1:3]))
    heads = next(getattr(whole, word) for word in ("heads", "num_heads", "num_attention_heads") if hasattr(whole, word))
    key_heads = getattr(whole, "key_heads", getattr(whole, "num_key_value_heads", heads))
    own, normed = isinstance(whole, Attention), any("norm" in name for name, _ in whole.named_modules())
    rescale = not any(hasattr(whole, word) for word in ("width", "scale", "scaling"))
    qk = Pair("qk", block, (names[0], names[1]), k.out_features // key_heads, heads, key_heads, own, rescale)
    vo = Pair("vo", block, (names[2], names[3]), v.out_features // key_heads, heads, key_heads)
    return [qk, vo] if (own or plain) and not normed else [vo]


# --- what activations say ---------------------------------------------------------------------------------------------


class _Heads:
    """Covariance `k d d` of each head of x, `b n (k d)` or `b k n d`."""

    def __init__(self, heads: int):
        self.heads, self.xx = heads, 0

    def add(self, x: Tensor) -> None:
        x = x if x.ndim == 4 else rearrange(x, "b n (k d) -> b k n d", k=self.heads)
        x = rearrange(x.double(), "b k n d -> k (b n) d")
        self.xx = self.xx + x.mT @ x


class _Turn:
    """Mean cosine between what a block gets and what it says: it is told both in turn."""

    def __init__(self):
        self.before, self.total, self.n = None, 0.0, 0

    def add(self, x: Tensor) -> None:
        before, self.before = self.before, x
        if before is not None:
            cosine = nn.functional.cosine_similarity(before.double(), x.double(), dim=-1)
            self.before, self.total, self.n = None, self.total + cosine.sum().item(), self.n + cosine.numel()


class Seen(NamedTuple):
    """What calibration found. influence: 1 - E cos(x_in, x_out) of each block; gram: of a layer, by name: X'X `d d` of what
    enters (for v, and the last of a feed-forward), or of each head `k d d` what comes out (q and k, turned)."""

    influence: dict[str, float]
    gram: dict[str, Tensor]


@torch.no_grad()
def observe(model: nn.Module, pairs: Sequence[Pair], batches: Iterable) -> Seen:
    """Run the model over the batches (as `record` takes them), once, and keep what all pairs need."""
    turns, gram = {p.block: _Turn() for p in pairs}, {}
    inputs, outputs, watched = dict(turns), dict(turns), {}
    for p in pairs:
        if p.kind != "qk":
            name = p.layers[-1 if p.kind == "mlp" else 0]
            gram[name] = inputs[name] = Gram()
            continue
        q, k = (_Heads(n) for n in (p.heads, p.key_heads))
        gram |= dict(zip(p.layers, (q, k), strict=True))
        if p.rotary:
            above = p.layers[0].rpartition(".")[0]
            watched[f"{above}.attend"] = _watch(model.get_submodule(above).attend, q, k)
        else:
            outputs |= dict(zip(p.layers, (q, k), strict=True))
    record(swap(model, watched), batches, inputs, outputs)
    influence = {name: 1 - turn.total / turn.n for name, turn in turns.items()}
    return Seen(influence, {name: one.xx for name, one in gram.items()})


def _watch(attend: Callable, for_q: _Heads, for_k: _Heads) -> Callable:
    """An attention that shows its queries and keys, after their turn."""
    return lambda q, k, v, where: (for_q.add(q), for_k.add(k)) and attend(q, k, v, where)


# --- how much goes where ----------------------------------------------------------------------------------------------


def allocate(s: Float[Tensor, "l"], average: float, epsilon: float, cap: float = CAP) -> Float[Tensor, "l"]:
    """Shares phi to remove from each block: l average softmax(-s / epsilon), which maximises
    sum s (1 - phi) + epsilon H(phi) at this mean.

    Whoever would lose more than `cap` loses that, and the others share what is left over in proportion. epsilon: infinity is
    uniform, towards 0 the least influential blocks lose all they may. Raises ValueError for an average beyond the cap.
    """
    if not 0 <= average <= cap <= 1 or epsilon <= 0:
        raise ValueError(f"needs 0 <= average <= cap <= 1 and epsilon > 0; got {average}, {cap}, {epsilon}")
    phi, free = torch.zeros(len(s), dtype=torch.float64), torch.ones(len(s), dtype=torch.bool)
    while free.any():
        left = len(s) * average - phi[~free].sum()
        phi[free] = left * (-s.double()[free] / epsilon).softmax(0)
        over = free & (phi > cap)
        if not over.any():
            break
        phi[over], free = cap, free & ~over
    return phi


def plan(model: nn.Module, pairs: Sequence[Pair], influence: dict[str, float], share: float, epsilon: float) -> dict[Pair, int]:
    """The widths with which the pairs keep at most this share of their weights.

    The same phi holds for all pairs of a block, with the least average that does it. Heads are coarse, so something is left
    over, and hidden units take it. Raises ValueError where even the largest cut leaves more.
    """
    unit = {p: p.size(model, 1) for p in pairs}  # sizes grow in proportion to widths
    s, most = torch.tensor(list(influence.values())), share * sum(p.full * unit[p] for p in pairs)
    for step in range(801):
        phi = dict(zip(influence, allocate(s, step * CAP / 800, epsilon).tolist(), strict=True))
        widths = {p: p.kept(phi[p.block]) for p in pairs}
        left = most - sum(width * unit[p] for p, width in widths.items())
        if left >= 0:
            fine = [p for p in pairs if p.kind == "mlp"]
            return widths | {p: min(p.full, widths[p] + int(left / len(fine) / unit[p])) for p in fine}
    raise ValueError(f"at most {CAP} of a block may go, and that leaves more than the share {share} asked for")


# --- cutting ----------------------------------------------------------------------------------------------------------


def cut_mlp(own: Sequence[nn.Linear], keep: Int[Tensor, "k"], mix: Float[Tensor, "k n"]) -> list[nn.Linear]:
    """(up, down) or (up, gate, down) with the hidden units `keep`; `mix` says all old ones through them."""
    *into, down = own
    thin = [linear(layer.weight[keep], None if layer.bias is None else layer.bias[keep]) for layer in into]
    return [*thin, linear((down.weight.double() @ mix.T).to(down.weight), down.bias)]


def cut_qk(q: nn.Linear, k: nn.Linear, p: Pair, keep: Int[Tensor, "g r"]) -> list[nn.Linear]:
    """q, k with the numbers `keep` of each key head. Where the attention would rescale, q makes up for it."""
    scale = (keep.shape[1] / p.full) ** 0.5 if p.rescale else 1.0

    def cut(layer, heads, scale):
        rows = (keep.repeat_interleave(heads // len(keep), 0) + p.full * torch.arange(heads)[:, None]).flatten()
        return linear(scale * layer.weight[rows], None if layer.bias is None else scale * layer.bias[rows])

    return [cut(q, p.heads, scale), cut(k, p.key_heads, 1.0)]


def cut_vo(v: nn.Linear, o: nn.Linear, p: Pair, c: Float[Tensor, "d d"], rank: int) -> list[nn.Linear]:
    """v, o of a lower rank a head. Rows of attention sum to 1, so the bias of v goes through o into its bias: b_O + b_V O."""
    into = rearrange(v.weight, "(g e) d -> g d e", g=p.key_heads)
    out = rearrange(o.weight, "n (g s e) -> g e (s n)", g=p.key_heads, e=p.full)
    bias = o.bias
    if v.bias is not None:
        said = v.bias.view(p.key_heads, 1, p.full).expand(-1, p.heads // p.key_heads, -1)
        bias = o.weight @ said.flatten() + (0 if bias is None else bias)
    into, out = (x.to(v.weight) for x in values(c, into, out, rank))
    out = rearrange(out, "g r (s n) -> n (g s r)", n=o.out_features)
    return [linear(rearrange(into, "g d r -> (g r) d"), None), linear(out, bias)]


@torch.no_grad()
def shrink(model: nn.Module, seen: Seen, widths: dict[Pair, int], ridge: float = 1e-2) -> nn.Module:
    """The model with these widths. What keeps its width is shared with `model`, which stays as it is."""
    new, turned = {}, {}
    for p, width in widths.items():
        own, c = [model.get_submodule(name) for name in p.layers], [seen.gram.get(name) for name in p.layers]
        if width == p.full:
            continue
        if p.kind == "mlp":
            keep = leverage(c[-1], ridge).topk(width).indices.sort().values
            made = cut_mlp(own, keep, nystroem(c[-1], keep))
        elif p.kind == "vo":
            made = cut_vo(own[0], own[1], p, c[0], width)
        else:
            keep = products(c[0], c[1], p.rotary).topk(width // (1 + p.rotary)).indices.sort().values
            if p.rotary:
                turned[p.layers[0].rpartition(".")[0]] = keep
                keep = torch.cat([keep, keep + p.full // 2], 1)
            made = cut_qk(own[0], own[1], p, keep)
        new |= dict(zip(p.layers, made, strict=True))
    thin = swap(model, new)
    for name, keep in turned.items():  # each pair keeps its axis and frequency, which belong to the state dict from now on
        attention = thin.get_submodule(name)
        for word in ("axis", "freq"):
            attention.register_buffer(word, getattr(attention, word).expand(len(keep), -1).gather(1, keep))
    return thin


def compress(
    model: nn.Module, batches: Iterable, share: float, epsilon: float = 0.1, within: str = "", plain: Sequence[str] = ()
) -> nn.Module:
    """A model whose pairs of layers have this share of their parameters. batches: calls, as `record` takes them; tens of
    thousands of tokens, of all noise levels and captions. epsilon, within, plain: see `allocate` and `find`."""
    pairs = find(model, within, plain)
    seen = observe(model, pairs, batches)
    return shrink(model, seen, plan(model, pairs, seen.influence, share, epsilon))


def reload(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A shrunk model from its state dict and a model of the shape that it had before."""
    model, new = copy.deepcopy(model), {}
    for name, part, _ in parts(model):
        if isinstance(part, nn.Linear) and part.weight.shape != state[f"{name}.weight"].shape:
            new[name] = linear(state[f"{name}.weight"], state.get(f"{name}.bias"))
    model = swap(model, new)
    for name, value in state.items():
        above, _, word = name.rpartition(".")
        if word in ("axis", "freq") and name not in model.state_dict():
            model.get_submodule(above).register_buffer(word, value)
    model.load_state_dict(state)
    return model
