"""Shipped weights: safetensors files whose header says what they are and which command made them.

Stored as fp16: the shipped values *are* the model, and they are read into float32. A file that is damaged, foreign or of
another shape is refused with a sentence; writing goes to a temporary file first, so a full disk leaves the old one whole.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "weights"


class WeightsError(ValueError):
    """A weights file that is missing, damaged, foreign, or doesn't fit the model."""


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write tensors and header (text to text) to `path`, all or nothing. Raises OSError when it can't be written.

    A tensor that goes by several names, as a codebook that layers share, is stored once; `read` gives all names back.
    """
    path, known, shared = Path(path), {}, {}
    for name, tensor in tensors.items():
        place = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        first = known.setdefault(place if tensor.numel() else name, name)
        if first != name:
            shared[name] = first
    once = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items() if name not in shared}
    header = {"minivid": "1", **({"shared": json.dumps(shared)} if shared else {}), **header}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as f:
            f.write(serialise(once, header))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file that `write` made. Raises WeightsError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights file {path}")
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            if header.get("minivid") != "1":
                raise WeightsError(f"{path} is a safetensors file, but minivid didn't write it (header: {sorted(header)})")
            found = {k: f.get_tensor(k) for k in f.keys()}
            return found | {name: found[first] for name, first in json.loads(header.pop("shared", "{}")).items()}, header
    except (SafetensorError, OSError) as e:
        raise WeightsError(f"{path} is damaged or no safetensors file ({e}); fetch it again, or train it anew") from e


def save(path: Path, model: nn.Module, kind: str, settings: dict, made: dict) -> None:
    """Ship a model: fp16 values, what rebuilds it (`kind`, `settings`) and where it comes from (`made`)."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    bad = [k for k, v in half.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise WeightsError(f"values of {bad[:3]} don't fit into fp16: not shipped")
    write(path, half, {"kind": kind, "settings": json.dumps(settings), "made": json.dumps(made)})


def card(name: str | Path) -> dict:
    """What the header of shipped weights says: kind, settings, and the command, steps, seconds and device that made them."""
    _, header = read(path_of(name))
    return {"kind": header["kind"], "settings": json.loads(header["settings"]), "made": json.loads(header["made"])}


def path_of(name: str | Path) -> Path:
    """The file of shipped weights called `name`, or the path itself when it is one."""
    return Path(name) if str(name).endswith(".safetensors") else FOLDER / f"{name}.safetensors"


def names() -> list[str]:
    """Names of all shipped weights."""
    return sorted(p.stem for p in FOLDER.glob("*.safetensors"))


def fill(model: nn.Module, tensors: dict[str, Tensor], path) -> nn.Module:
    """Load tensors into a model, in float32. Raises WeightsError naming what is missing, unknown or of another shape."""
    own = model.state_dict()
    wrong = [f"{k} is missing" for k in own.keys() - tensors.keys()] + [f"{k} is unknown" for k in tensors.keys() - own.keys()]
    wrong += [f"{k} is {tuple(tensors[k].shape)}, expected {tuple(v.shape)}" for k, v in own.items()
              if k in tensors and tensors[k].shape != v.shape]
    if wrong:
        raise WeightsError(f"{path} doesn't fit this model: {'; '.join(sorted(wrong)[:4])}{' ...' if len(wrong) > 4 else ''}")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    return model


def build(kind: str, settings: dict) -> nn.Module:
    """A fresh model of a kind, with settings, as both stand in a header. Raises KeyError for an unknown kind."""
    from .baselines.answerer import Answerer  # here, because the models' files import this one
    from .baselines.features import Features
    from .baselines.unet import UNet
    from .baselines.vq import FSQ, VQ
    from .codes import TokenModel
    from .model import VideoModel
    from .tokenizer import Tokenizer

    def tokenizer(levels=None, codes=None, **rest):  # a grid of levels a channel, or so many codes that learn
        bottleneck = FSQ(tuple(levels)) if levels else VQ(codes, rest["channels"], decay=0.99, restart=0.1) if codes else None
        return Tokenizer(**rest, bottleneck=bottleneck)

    kinds = {"tokenizer": tokenizer, "video": VideoModel, "tokens": TokenModel, "unet": UNet}
    kinds |= {"answerer": Answerer, "features": Features}
    if kind not in kinds:
        raise KeyError(f"its kind is {kind!r}; this version knows {', '.join(sorted(kinds))}")
    return kinds[kind](**settings)


def load(name: str | Path, device="cpu") -> nn.Module:
    """The shipped model `name` (or a path), in evaluation mode, without gradients.

    Raises WeightsError when there is no such file, or it is damaged, foreign, or of a kind that this version doesn't know.
    """
    path = path_of(name)
    if not path.is_file():
        raise WeightsError(f"no weights called {str(name)!r}; there are {', '.join(names()) or 'none'}")
    tensors, header = read(path)
    try:
        model = build(header.get("kind", "nothing"), json.loads(header["settings"]))
    except (KeyError, TypeError) as e:
        raise WeightsError(f"{path} can't be rebuilt: {e}") from e
    return fill(model, tensors, path).eval().requires_grad_(False).to(device)
