"""QuantVGGT: rotate, then smooth, then round; and calibrate on clips that are neither odd nor all alike.

Paper:   Quantized Visual Geometry Grounded Transformer (2025), arXiv 2509.21302
Kind:    surgery (a trained model in, the same model with inputs and weights of few bits out)
Equal:   at 16 bits the folded layers say what they said, whatever the rotation, the smoothing and their order
Claim:   at 4 bits rotating and then smoothing errs less than rotating, smoothing or rounding alone; clips that are filtered and
         drawn from clusters halve the spread of 30 (static) and 10 (learnt) calibrations; special tokens are the heavy tail
Differs: in place of VGGT a transformer of 0.5 million weights, trained from scratch on the world's exact cameras (registers
         added to a trained video generator would mean nothing). Updates: 75 a block of 4 clips each. The
         deep layers of the filter are the last pair of three, a category is what the camera does, and a clip has 6 frames. The
         weight's maxima are those of the rotated weight (the authors' code takes them before), abnormal clips are never drawn
         (their script clusters all), R is the fast transform, shared by q, k and v (theirs a dense product in each layer).
         Blocks that got worse go back to their start. Inferred: what `similarity` does with special tokens (it takes all), the
         batches that the moving average sees (one clip each), and all that concerns the small model

`layers.py` is the quantiser and its calibration, `samples.py` chooses clips, `views.py` is the model. A static clip's vector
isn't all ones in this model, nor in VGGT: the first frame has special tokens of its own.
"""

from .layers import OPEN, PAPER, Dual, How, Rotation, Seen, calibrate, folded, observe, outliers, peaks, quantised, rotations
from .samples import deep, draw, kinds, kurtosis, normal, peak, similarity
from .views import FRAMES, LENSES, SPECIAL, Geometry, Views, at_rest, examples, is_special, loss, places, train, turned
