"""The ground floor: a procedural captioned world with exact truth, defects, moving digits, real clips, and the judge."""

from . import judge, readings, scores
from .caption import STYLES, WORDS, attributes, caption, captions, chunk_caption, compose, event_captions, fields
from .clips import CLIPS, PHOTOS, natural, natural_crops, pan, photograph
from .defects import DEFECTS, corrupt, cut_words, degrade, wrong_words
from .digits import Digits, digits, draw_digits, render_digits
from .files import Video, VideoError, read_video, write_video
from .parts import COLOURS, HELD_OUT, MOTIONS, SHAPES, SIZES, Body, Scene, held_out, states
from .quality import LIMITS, quality, reject
from .render import batch, render
from .scene import RECIPES, draw, stream, vary
from .truth import Truth, truth
