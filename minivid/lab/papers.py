"""The registry: one row for each of the 48 papers, from the first day on, whether it is done or still open.

A paper has one slug and four places: its file, its test, its claim, its lesson. It is *done* when all four exist, and
that is looked up, never declared. The rows below say what is known before a paper is written; once its file exists, the
card at the file's top is read in their stead, so that no fact is kept twice.

A card is the docstring that opens a paper's file:

    \"\"\"SimVQ: move the whole codebook through one linear layer.

    Paper:   Addressing Representation Collapse ... with One Linear Layer (2024), arXiv 2411.02038
    Kind:    part (a bottleneck of the tokenizer)
    Equal:   with the layer frozen at the identity it is plain VQ
    Claim:   codes in use at K = 1024: +0.30 over plain VQ at equal steps
    Differs: no adversarial loss; 32 x 32 clips
    \"\"\"
"""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

KINDS = {
    "part": "given to the model",
    "surgery": "a trained model in, a smaller one out",
    "procedure": "data, training or rollout",
    "guest": "shares data, claims and figures only",
}

CHAPTERS = {
    "data": "what does a good clip and caption look like?",
    "tokenizers": "how few numbers can a clip be?",
    "diffusion": "how is one model told what to make?",
    "block_diffusion": "how does it go on for a minute?",
    "sparse_attention": "which token pairs matter?",
    "quantization": "how few bits?",
    "low_rank": "how few weights?",
    "codecs": "can the network be the video file?",
    "restoration": "can it repair a real video?",
    "understanding": "can it find and recognise one?",
    "foundations": "the mathematics underneath",
}


class CardError(ValueError):
    """The card at the top of a paper's file can't be read; the message says what is missing and where."""


@dataclass(frozen=True)
class Card:
    """What the docstring at the top of a paper's file says."""

    name: str  # the short name: "SimVQ"
    line: str  # the one sentence after it
    title: str
    year: int
    arxiv: str
    kind: str
    detail: str  # what stands in brackets after the kind
    equal: str
    claim: str
    differs: str


@dataclass(frozen=True)
class Row:
    """One paper. `slug` uses dashes; files use `module`, the same with underscores."""

    slug: str
    name: str
    title: str
    year: int
    arxiv: str
    chapter: str
    kind: str
    root: Path = ROOT

    @property
    def module(self) -> str:
        return self.slug.replace("-", "_")

    @property
    def code(self) -> Path:
        """The paper's file, or the `__init__.py` of its folder where the paper is a whole recipe."""
        folder = self.root / "minivid" / self.chapter
        whole = folder / self.module / "__init__.py"
        return whole if whole.exists() else folder / f"{self.module}.py"

    @property
    def places(self) -> dict[str, Path]:
        """The four places: code, test, claim, lesson."""
        return {
            "code": self.code,
            "test": self.root / "tests" / self.chapter / f"test_{self.module}.py",
            "claim": self.root / "minivid" / "claims" / f"{self.module}.py",
            "lesson": self.root / "notebooks" / "papers" / f"{self.slug}.ipynb",
        }

    @property
    def missing(self) -> list[str]:
        return [name for name, path in self.places.items() if not path.exists()]

    @property
    def done(self) -> bool:
        return not self.missing

    @property
    def result(self) -> Path:
        return self.places["claim"].with_suffix(".json")

    @property
    def verdict(self) -> str:
        """holds, partly or not reproduced, as the claim's result file says; empty while nothing has been measured."""
        return json.loads(self.result.read_text()).get("verdict", "") if self.result.exists() else ""

    def card(self) -> Card:
        """The card of the paper's file. Raises FileNotFoundError while it is open, CardError when it is malformed."""
        if not self.code.exists():
            raise FileNotFoundError(f"{self.slug} is still open: there is no {self.code}.")
        card = read_card(self.code)
        if card.arxiv != self.arxiv:
            raise CardError(f"{self.code}: its card says arXiv {card.arxiv}, the registry {self.arxiv}.")
        return card

    def known(self) -> "Row":
        """This row with the facts of the card where the paper's file exists."""
        if not self.code.exists():
            return self
        card = self.card()
        return replace(self, name=card.name, title=card.title, year=card.year, kind=card.kind)

    def facts(self) -> dict:
        """The row as plain values, paths relative to the repository: what `papers --json` prints."""
        row = self.known()
        places = {name: p.relative_to(self.root).as_posix() if p.exists() else None for name, p in row.places.items()}
        return {
            "slug": row.slug, "name": row.name, "title": row.title, "year": row.year, "arxiv": row.arxiv,
            "chapter": row.chapter, "kind": row.kind, "done": row.done, **places, "verdict": row.verdict,
        }  # fmt: skip


FIELDS = ("Paper", "Kind", "Equal", "Claim", "Differs")


def read_card(path: Path) -> Card:
    """Read the card from a paper's file, without importing it.

    Raises CardError that names the file and the line that is missing or can't be understood.
    """
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    if not doc:
        raise CardError(f"{path}: the file must open with a docstring, its card ({', '.join(FIELDS)}).")
    first, _, body = doc.partition("\n")
    head = re.fullmatch(r"(\S[^:]*): (.+)", first.strip())
    if not head:
        raise CardError(f"{path}: the card's first line should read 'Name: one sentence.', not {first.strip()!r}.")
    found = {}
    for name, text in re.findall(r"^(\w+):[ \t]*((?:.*)(?:\n[ \t]+\S.*)*)", body, flags=re.M):
        found.setdefault(name, " ".join(text.split()))
    lacking = [name for name in FIELDS if not found.get(name)]
    if lacking:
        raise CardError(f"{path}: the card lacks {', '.join(f'{name}:' for name in lacking)}.")
    paper = re.match(r"(.+) \((\d{4})[^)]*\), arXiv (\d{4}\.\d{4,5})", found["Paper"])
    if not paper:
        raise CardError(f"{path}: 'Paper:' should read 'Title (2024), arXiv 2411.02038', not {found['Paper']!r}.")
    kind, _, detail = found["Kind"].partition(" ")
    if kind not in KINDS:
        raise CardError(f"{path}: 'Kind:' should begin with one of {', '.join(KINDS)}, not {kind!r}.")
    return Card(
        name=head[1], line=head[2], title=paper[1], year=int(paper[2]), arxiv=paper[3], kind=kind,
        detail=detail.strip("()"), equal=found["Equal"], claim=found["Claim"], differs=found["Differs"],
    )  # fmt: skip


def rows(root: Path = ROOT) -> list[Row]:
    """All 48 rows, in the order of the chapters, looked up under `root`."""
    return [replace(row, root=root) for row in ROWS]


def find(slug: str, root: Path = ROOT) -> Row:
    """The row of a slug (dashes or underscores). Raises KeyError with the nearest slugs."""
    import difflib

    wanted = slug.replace("_", "-")
    for row in rows(root):
        if row.slug == wanted:
            return row
    near = difflib.get_close_matches(wanted, [row.slug for row in ROWS]) or ["python -m minivid papers lists all 48"]
    raise KeyError(f"there is no paper {slug!r}; did you mean: {', '.join(near)}?")


def table(root: Path = ROOT) -> str:
    """The rows as a Markdown table for the README: links where something exists, 'open' where it doesn't."""
    lines = ["| chapter | paper | kind | where | verdict |", "|---|---|---|---|---|"]
    for row in rows(root):
        facts = row.facts()
        where = " ".join(_link(place, facts[place]) for place in row.places if facts[place]) or "open"
        verdict = _link(facts["verdict"], row.result.relative_to(root).as_posix()) if facts["verdict"] else "open"
        title = f"[{facts['name']}](https://arxiv.org/abs/{facts['arxiv']}): {facts['title']} ({facts['year']})"
        chapter = f"{list(CHAPTERS).index(row.chapter) + 1:02d} {row.chapter.replace('_', ' ')}"
        lines.append(f"| {chapter} | {title} | {facts['kind']} | {where} | {verdict} |")
    done = sum(row.done for row in rows(root))
    return "\n".join(lines) + f"\n\n{done} of {len(ROWS)} papers are done."


def listed(asks: Mapping[str, str], root: Path = ROOT) -> str:
    """Papers of a chapter as a Markdown list: the question that each asks (by slug), title, year, lesson and verdict if done."""
    lines = []
    for slug, question in asks.items():
        row = find(slug, root).known()
        where = f"[lesson](papers/{slug}.ipynb), {row.verdict}" if row.done else "lesson still open"
        lines.append(f"* **{slug}**: {question} [{row.title}](https://arxiv.org/abs/{row.arxiv}) ({row.year}); {where}")
    return "\n".join(lines)


def _link(text: str, path: str) -> str:
    return f"[{text}]({path})"


BEGIN, END = "<!-- papers: written by `python -m minivid papers --readme` -->", "<!-- /papers -->"


def readme(text: str, root: Path = ROOT) -> str:
    """`text` with everything between the two markers replaced by the table. Raises ValueError without the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the two lines {BEGIN!r} and {END!r}; the table is written between them.")
    return f"{before}{BEGIN}\n{table(root)}\n{END}{after}"


def _rows(text: str) -> tuple[Row, ...]:
    out, chapter = [], ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line in CHAPTERS:
            chapter = line
            continue
        slug, name, year, arxiv, kind, title = (cell.strip() for cell in line.split("|"))
        out.append(Row(slug, name, title, int(year), arxiv, chapter, kind))
    return tuple(out)


# slug | name | year | arXiv | kind | title
ROWS = _rows("""
data
  openvid | OpenVid | 2024 | 2407.02371 | procedure | OpenVid-1M: A Large-Scale High-Quality Dataset for Text-to-video Generation
  ultravideo | UltraVideo | 2025 | 2506.13691 | procedure | UltraVideo: High-Quality UHD Video Dataset with Comprehensive Captions
  sharegpt4video | ShareGPT4Video | 2024 | 2406.04325 | guest | ShareGPT4Video: Improving Video Understanding and Generation with Better Captions
tokenizers
  simvq | SimVQ | 2024 | 2411.02038 | part | Addressing Representation Collapse in Vector Quantized Models with One Linear Layer
  fqgan | FQGAN | 2024 | 2411.16681 | part | Factorized Visual Tokenization and Generation
  hitvideo | HiTVideo | 2025 | 2503.11513 | part | HiTVideo: Hierarchical Tokenizers for Enhancing Text-to-Video Generation with Autoregressive Large Language Models
  vitok | ViTok | 2025 | 2501.09755 | part | Learnings from Scaling Visual Tokenizers for Reconstruction and Generation
  tvt | TVT | 2025 | 2507.20291 | procedure | Fine-structure Preserved Real-world Image Super-resolution via Transfer VAE Training
diffusion
  wan | Wan | 2025 | 2503.20314 | part | Wan: Open and Advanced Large-Scale Video Generative Models
  step-video | Step-Video | 2025 | 2502.10248 | procedure | Step-Video-T2V Technical Report: The Practice, Challenges, and Future of Video Foundation Model
  stiv | STIV | 2024 | 2412.07730 | part | STIV: Scalable Text and Image Conditioned Video Generation
  pusa | Pusa | 2025 | 2507.16116 | procedure | PUSA V1.0: Surpassing Wan-I2V with $500 Training Cost by Vectorized Timestep Adaptation
  framebridge | FrameBridge | 2024 | 2410.15371 | part | FrameBridge: Improving Image-to-Video Generation with Bridge Models
  mcvd | MCVD | 2022 | 2205.09853 | procedure | MCVD: Masked Conditional Video Diffusion for Prediction, Generation, and Interpolation
  factorized-dreamer | Factorized-Dreamer | 2024 | 2408.10119 | procedure | Factorized-Dreamer: Training A High-Quality Video Generator with Limited and Low-Quality Data
  videorepa | VideoREPA | 2025 | 2505.23656 | procedure | VideoREPA: Learning Physics for Video Generation through Relational Alignment with Foundation Models
block_diffusion
  nbp | NBP | 2025 | 2502.07737 | procedure | Next Block Prediction: Video Generation via Semi-Autoregressive Modeling
  vid-gpt | ViD-GPT | 2024 | 2406.10981 | procedure | ViD-GPT: Introducing GPT-style Autoregressive Generation in Video Diffusion Models
  art-v | ART-V | 2023 | 2311.18834 | procedure | ART\u00b7V: Auto-Regressive Text-to-Video Generation with Diffusion Models
  blockvid | BlockVid | 2025 | 2511.22973 | procedure | BlockVid: Block Diffusion for High-Quality and Consistent Minute-Long Video Generation
sparse_attention
  sparse-vdit | Sparse-vDiT | 2025 | 2506.03065 | part | Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers
  louiskv | LouisKV | 2025 | 2510.11292 | part | LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences
  vidkv | VidKV | 2025 | 2503.16257 | part | Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models
quantization
  hawqv3 | HAWQV3 | 2021 | 2011.10680 | surgery | HAWQV3: Dyadic Neural Network Quantization
  qvgen | QVGen | 2025 | 2505.11497 | surgery | QVGen: Pushing the Limit of Quantized Video Generative Models
  vq4dit | VQ4DiT | 2024 | 2408.17131 | surgery | VQ4DiT: Efficient Post-Training Vector Quantization for Diffusion Transformers
  quantvggt | QuantVGGT | 2025 | 2509.21302 | surgery | Quantized Visual Geometry Grounded Transformer
  shiftaddvit | ShiftAddViT | 2023 | 2306.06446 | surgery | ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer
  dmmv | DMMV | 2025 | 2508.13437 | guest | Discrete Optimization of Min-Max Violation and its Applications Across Computational Sciences
low_rank
  flashsvd | FlashSVD | 2025 | 2508.01506 | surgery | FlashSVD: Memory-Efficient Inference with Streaming for Low-Rank Models
  modegpt | MoDeGPT | 2024 | 2408.09632 | surgery | MoDeGPT: Modular Decomposition for Large Language Model Compression
  dsformer | DSFormer | 2023 | 2312.13211 | surgery | DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization
  maestro | Maestro | 2023 | 2308.14929 | procedure | Maestro: Uncovering Low-Rank Structures via Trainable Decomposition
  vdmini | VDMini | 2024 | 2411.18375 | surgery | Individual Content and Motion Dynamics Preserved Pruning for Video Diffusion Models
  hummingbird | Hummingbird | 2025 | 2503.18559 | surgery | AMD-Hummingbird: Towards an Efficient Text-to-Video Model
codecs
  nirvana | NIRVANA | 2023 | 2212.14593 | guest | NIRVANA: Neural Implicit Representations of Videos with Adaptive Networks and Autoregressive Patch-wise Modeling
  boost-nerv | Boost-NeRV | 2024 | 2402.18152 | guest | Boosting Neural Representations for Videos with a Conditional Decoder
  queen | QUEEN | 2024 | 2412.04469 | guest | QUEEN: QUantized Efficient ENcoding of Dynamic Gaussians for Streaming Free-viewpoint Videos
  t-gvc | T-GVC | 2026 | 2507.07633 | procedure | T-GVC: Trajectory-Guided Generative Video Coding at Ultra-Low Bitrates
restoration
  infvsr | InfVSR | 2025 | 2510.00948 | procedure | InfVSR: Breaking Length Limits of Generic Video Super-Resolution
  star | STAR | 2025 | 2501.02976 | part | STAR: Spatial-Temporal Augmentation with Text-to-Video Models for Real-World Video Super-Resolution
understanding
  vivit-frozen | ViViT-frozen | 2023 | 2306.04822 | guest | Optimizing ViViT Training: Time and Memory Reduction for Action Recognition
  lv-mae | LV-MAE | 2025 | 2504.03501 | guest | LV-MAE: Learning Long Video Representations through Masked-Embedding Autoencoders
  gve | GVE | 2025 | 2510.27571 | guest | Towards Universal Video Retrieval: Generalizing Video Embedding via Synthesized Multimodal Pyramid Curriculum
foundations
  gaunt | Gaunt | 2024 | 2401.10216 | guest | Enabling Efficient Equivariant Operations in the Fourier Basis via Gaunt Tensor Products
  sparse-ot | Sparse-OT | 2022 | 2209.15466 | guest | Sparsity-Constrained Optimal Transport
  sae-choice | SAE-choice | 2024 | 2411.02124 | part | Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders
  layerwise-wd | Layerwise-WD | 2025 | 2510.15262 | procedure | Robust Layerwise Scaling Rules by Proper Weight Decay Tuning
""")  # noqa: E501
