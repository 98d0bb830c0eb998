"""Captions as word numbers, and the small encoder that reads them.

The vocabulary is the world's: about two hundred words, one number each. A caption that says something else is refused
with the words that came nearest, because a silently dropped word would look like a model that can't read.
"""

import difflib

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..world import WORDS

PAD, NULL = 0, 1  # NULL is the empty caption of classifier-free guidance
NUMBER = {word: i + 2 for i, word in enumerate(WORDS)}
VOCABULARY = 256  # rows of the embedding: room for words to come, so that appending one leaves shipped weights loadable


def tokens(captions: list[str], length: int = 16) -> Int[Tensor, "b l"]:
    """Word numbers of the captions, padded with PAD to `length`. An empty caption is NULL followed by PAD.

    Raises ValueError for a word outside the vocabulary or a caption of more than `length` words.
    """
    if isinstance(captions, str):
        raise TypeError(f"captions must be a list of strings, got the single string {captions!r}: wrap it in [ ]")
    out = torch.full((len(captions), length), PAD)
    for row, caption in zip(out, captions, strict=True):
        words = caption.lower().replace(",", " ").replace(".", " ").split()
        unknown = [w for w in words if w not in NUMBER]
        if unknown:
            near = {w: difflib.get_close_matches(w, WORDS, 3, 0.5) for w in unknown}
            hint = "; ".join(f"{w!r} (nearest known: {', '.join(n) or 'none'})" for w, n in near.items())
            raise ValueError(f"the caption {caption!r} has words outside the vocabulary of {len(WORDS)}: {hint}")
        if len(words) > length:
            raise ValueError(f"a caption may have at most {length} words, got {len(words)}: {caption!r}")
        ids = [NUMBER[w] for w in words] or [NULL]
        row[: len(ids)] = torch.tensor(ids)
    return out


class TextEncoder(nn.Module):
    """Word numbers `b l` -> vectors `b l d`, by a two-layer bidirectional transformer with learned positions."""

    def __init__(self, d: int, layers: int = 2, heads: int = 4, length: int = 64):
        super().__init__()
        self.word, self.place = nn.Embedding(VOCABULARY, d), nn.Parameter(torch.zeros(length, d))
        nn.init.normal_(self.word.weight, std=0.5)
        layer = nn.TransformerEncoderLayer(d, heads, 2 * d, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(d), enable_nested_tensor=False)

    def forward(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        x = self.word(ids) + self.place[: ids.shape[1]]
        return self.layers(x, src_key_padding_mask=ids == PAD)
