"""HiTVideo: tokens in layers, the coarse ones first; each finer layer is told what the coarser ones have said.

Paper:   HiTVideo: Hierarchical Tokenizers for Enhancing Text-to-Video Generation with Autoregressive Large Language Models
         (2025), arXiv 2503.11513
Kind:    part (a bottleneck of the tokenizer, and the order of a model over its codes)
Equal:   one layer on the finest grid is a flat tokenizer; a layer of one code costs no bits and, before training, changes nothing
Claim:   at equal bits within 0.3 dB of one flat grid, and 0.3 dB ahead at the lowest rate; 0.5 dB below the flat one at 60 %
         of its bits; with layer dropping the top layer decides what is seen, without it the bottom does; captions are followed
         5 points better than over flat tokens
Differs: the abstract and summaries alone were read; they name a causal 3-D autoencoder, several layers of tokens, "dynamic
         encoding", "masked decoding", a Llama of 3 B told by Flan-T5-XL, 3-D rotary positions and guidance. All else is inferred:
         two layers, of which the coarse one halves time, rows and columns of the package's 4 x 4 x 4 tokenizer; the finer layer
         begins as the code of what the coarser leaves over; running means with restart for codebooks; in training the finer
         layer gives way to a learnt vector, whole or in random cells; all top tokens come before all others. No perceptual and no
         adversarial loss. 9 frames of 32 x 32, a transformer of 0.3 M, learnt words

    known_0 = 0;   q_l = VQ_l(Down_l(W_l [e ; known])),   known_l = J_l [known ; Up_l(q_l)]        l from coarse to fine

e is what the encoder says of the clip, on the finest grid; the decoder sees the last `known` alone. W and J begin as difference
and sum, which makes this residual quantisation across grids; what training makes of them is VQ-VAE-2's (Razavi et al. 2019).
No gradient goes through what a layer is told: straight through a difference, it would cancel the coarser layers' own.

`layers.py` is the bottleneck, its tokenizer and its rate, `writer.py` the model over its tokens.
"""

from .layers import HiTVideo, Layer, Layers, Level, Way, bits, packed, unpacked
from .writer import Line, Steered, Writer
