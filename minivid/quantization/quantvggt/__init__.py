"""QuantVGGT: rotate, then smooth, then round; and calibrate on clips that are neither odd nor all alike.

Paper:   Quantized Visual Geometry Grounded Transformer (2025), arXiv 2509.21302
Kind:    surgery (a trained model in, the same model with inputs and weights of few bits out)
Equal:   at 16 bits the folded layers say what they said, whatever the rotation, the smoothing and their order
Claim:   at 4 bits rotating and then smoothing errs less than rotating, smoothing or rounding alone; clips that are filtered and
         drawn from clusters halve the spread of 30 calibrations; special tokens are the heavy tail
Differs: TODO
"""

from .layers import OPEN, PAPER, Dual, How, Rotation, Seen, calibrate, folded, observe, outliers, peaks, quantised, rotations
from .samples import deep, draw, kinds, kurtosis, normal, peak, similarity
from .views import FRAMES, LENSES, SPECIAL, Geometry, Views, at_rest, examples, is_special, loss, places, train, turned
