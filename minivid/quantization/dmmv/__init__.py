"""DMMV: choose discrete values so that the *worst* of many errors is as small as possible; one search for three unrelated tasks.

Paper:   Discrete Optimization of Min-Max Violation and its Applications Across Computational Sciences (2025), arXiv 2508.13437
Kind:    guest (a solver; it meets the shared generator through core/surgery alone)
Equal:   the optimum of an exhaustive search on tiny problems; with or without its two filters it finds the same moves
Claim:   FIR filters: 20 % less ripple than rounding, as good as HiGHS where HiGHS proves the optimum, 5 % less where it can't;
         3-bit layers: 15 % less worst error than GPTQ on inputs not seen; tomography: 10 % less error under uniform noise
Differs: all thresholds are relative, as absolute ones stop small-scale problems (FIR ripples are 0.01). Filter 1 looks at both
         signs apart, so it drops a little more. The best pair of a pair of levels is taken, without batches in random order.
         FIR also tries pairs of steps of any sign: its few taps hardly ever stand on neighbouring levels, so swaps hardly exist.
         Inferred, since only code was at hand, without the paper's theorems: both filters' proofs, and `distance` in the
         worst-score removal, taken here as the steps between a variable's level and the one at which it pushes hardest

`solver.py` is the search, which knows of A, b and levels only; `uses.py` turns three tasks into such problems.
"""

from .solver import Found, MinMax, Moves, Search, State, improving
from .uses import Inputs, dart, fir, gain, layer, projections, quantised, sart, taps
