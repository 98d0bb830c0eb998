"""Surgery: reading and replacing parts of a trained model from outside, ours or anybody's.

Nothing here edits a model's code. `parts` says what there is and which role it plays.
"""

from collections.abc import Iterator

from torch import nn

from .attention import Attention
from .model import Block, Cross

ROLES = ("q", "k", "v", "o", "fc1", "fc2")  # names of linear layers that are also their role


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name, module, role) of every block and of the linear layers inside, in order of depth.

    role: "block"; "q", "k", "v", "o" of self-attention, and the same with "cross-" before; "fc1", "fc2"; "linear" or "conv"
    for the rest.
    """
    inside = {}
    for name, module in model.named_modules():
        if isinstance(module, Block):
            yield name, module, "block"
        if isinstance(module, (Attention, Cross)):
            inside[name] = "cross-" if isinstance(module, Cross) else ""
        if not isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            continue
        parent, _, last = name.rpartition(".")
        if parent in inside:
            yield name, module, inside[parent] + last
        elif last in ROLES[4:]:
            yield name, module, last
        else:
            yield name, module, "linear" if isinstance(module, nn.Linear) else "conv"
