"""What a weights file may hold: the kind written in its header, and the class that it is rebuilt with."""

from .baselines.answerer import Answerer
from .baselines.unet import UNet
from .baselines.vq import FSQ
from .codes import TokenModel
from .features import Features
from .model import VideoModel
from .tokenizer import Tokenizer


def tokenizer(levels: list[int] | None = None, **settings) -> Tokenizer:
    """A tokenizer; with `levels` its bottleneck is finite scalar quantisation."""
    return Tokenizer(**settings, bottleneck=FSQ(tuple(levels)) if levels else None)


BUILDERS = {
    "tokenizer": tokenizer, "video": VideoModel, "features": Features,
    "tokens": TokenModel, "answerer": Answerer, "unet": UNet,
}
