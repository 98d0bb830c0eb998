"""HAWQ-V3: from the first code to the last nothing but integers, factors of the form m / 2^c, and bits shared out by curvature.

Paper:   HAWQV3: Dyadic Neural Network Quantization (2021), arXiv 2011.10680
Kind:    surgery (a trained network in, one that multiplies, adds and shifts integers out; or a model with fewer bits a layer)
Equal:   with multipliers of 31 bits the integer network says, code for code, what the simulation in float64 says; the chosen bits
         are those of an exhaustive search; a budget for 8 bits everywhere gives 8 bits everywhere
Claim:   no code of a million differs at 31 bits, at 8 and at 4 bits; bits by curvature beat 95 % of random allocations of equal
         budgets, are no worse than 4 bits for all and at most twice as bad as a greedy search that measures the loss; the sum of
         the layers' costs ranks whole allocations with a Spearman correlation of 0.7
Differs: a frame autoencoder in place of ResNets. An average pool's 1/n is one with the factor onto the next grid (the authors
         truncate mean + 0.01), and rounding is half up throughout. Of a video transformer only linear layers are quantised;
         norms, softmax, GELU and modulation stay in floating point, so that model is not integer-only. Its bits are 2, 3, 4 and
         8; inlet and head stay at 8, text and time as they were. Latency is a model, not measured: nothing here runs 4-bit
         kernels. Inferred, since the authors publish traces without the code for them: how the traces are measured (probes,
         batch, clamping), how fast their program is solved, and all of the transformer's part

`dyadic.py` holds the numbers, `network.py` a network as it trains and as it runs, `allocation.py` the bits.
As in the authors' code a gradient passes through clamped values too.
"""

from .allocation import IntegerLinear, Rows, Use, allocated, curvature, integer_layers, limit, rounded, sensitivity, squares
from .dyadic import WIDTH, Dyadic, IntegersOnly, dyadic, nearest, pack4, rescale, unpack4
from .network import Codes, IntegerConv, IntegerJoin, IntegerPool, Integers, Join, Layer, Network, Pool, fold, quantise_all
