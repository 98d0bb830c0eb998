"""The command line: `python -m minivid --help`.

Exit codes: 0 it worked, 1 it could not be done (one line on stderr says why), 2 the command was misspelt. A verdict "not
reproduced" is a result, not a failure. Long work shows a bar and may be stopped and started again.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

HELP = """\
minivid: efficient video generation at toy scale, one measured paper a file.

  python -m minivid papers                         the 48 papers: what is done, what came out
  python -m minivid claims simvq                   measure a paper's claim again, in full
  python -m minivid generate "a red circle moves left" out.mp4
  python -m minivid encode holiday.mp4 holiday.mvid
"""
FORMATTER = argparse.RawDescriptionHelpFormatter


class Trouble(Exception):
    """Something that the reader can put right; shown as one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("minivid: stopped; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` closed the pipe: not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Trouble, ValueError, KeyError, OSError) as error:
        # Our errors are all of these kinds and say in a sentence what to do (ClaimError, VideoError, WeightsError ...).
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"minivid: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        return 1


# --- what can be asked for ----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m minivid", description=HELP, formatter_class=FORMATTER)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable, line: str, more: str) -> argparse.ArgumentParser:
        # A percent sign is a format to argparse.
        sub = commands.add_parser(name, help=line, description=f"{line}\n\n{more}", formatter_class=FORMATTER)
        sub.set_defaults(run=run)
        return sub

    _add_papers(command)
    _add_claims(command)
    _add_train(command)
    _add_video(command)
    _add_generate(command)
    bench = command("bench", _bench, "the speeds that a reader feels", "Measures for about half a minute, on one thread.")
    bench.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _add_papers(command: Callable) -> None:
    sub = command(
        "papers", _papers, "list the 48 papers",
        "A paper is done when its four places exist: code, test, claim, lesson. The verdict is what its claim measured.",
    )  # fmt: skip
    sub.add_argument("--json", action="store_true", help="all that is known, as JSON")
    sub.add_argument("--readme", action="store_true", help="write the table into README.md, between its two markers")


def _add_claims(command: Callable) -> None:
    sub = command(
        "claims", _claims, "measure claims, or list what was measured",
        "Without a slug: every verdict so far. With slugs: run them in full and write minivid/claims/<slug>.json.\n"
        "A run may be stopped; jobs that are finished are kept in runs/claims and not run again.\n\n"
        "  python -m minivid claims                 the verdicts\n"
        "  python -m minivid claims simvq           in full: minutes to an hour\n"
        "  python -m minivid claims simvq --fast    seconds: does the short form still give what was stored?",
    )  # fmt: skip
    sub.add_argument("slugs", nargs="*", metavar="SLUG", help="paper or weights whose claim to measure")
    sub.add_argument("--fast", action="store_true", help="compare the short form with what was stored; exit 1 if it moved")
    sub.add_argument("--again", action="store_true", help="forget finished jobs (needed after a change in core or world)")
    sub.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes; 1 where an arm measures time")
    sub.add_argument("--json", action="store_true", help="the results as JSON")


def _add_train(command: Callable) -> None:
    sub = command(
        "train", _train, "train shared weights from nothing",
        "Writes minivid/weights/NAME.safetensors. After a kill, --resume goes on where it was.\n\n"
        "  python -m minivid train tok-v --steps 200\n"
        "  torchrun --nproc-per-node 2 -m minivid train video --compile   (two processes: the fastest way on two cores)",
    )  # fmt: skip
    sub.add_argument("name", metavar="NAME", help="tok-v, tok-f, video ...")
    sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    sub.add_argument("--steps", type=_positive, metavar="N", help="fewer or more than the recipe's")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="which random draws (0)")
    sub.add_argument("--device", metavar="NAME", help="cpu or cuda; by default what there is")
    sub.add_argument("--compile", action="store_true", help="1.4x as fast after a minute; needs a C++ compiler")


def _add_video(command: Callable) -> None:
    sub = command(
        "encode", _encode, "put a real video through the shared tokenizer",
        "Keeps the centre square at --size pixels, stores the latent in fp16, decodes it again and says what it cost.\n"
        "The clip is held in memory: a minute at 96 pixels takes about 200 MB.\n\n"
        "  python -m minivid encode holiday.mp4 holiday.mvid --size 128 --frames 100",
    )  # fmt: skip
    sub.add_argument("video", metavar="VIDEO", help="any file with pictures in it: mp4, mkv, webm, gif ...")
    sub.add_argument("out", metavar="OUT", help="the file to write, by habit NAME.mvid")
    sub.add_argument("--size", type=_side, default=96, metavar="N", help="side in pixels, a multiple of 4, or full (96)")
    sub.add_argument("--frames", type=_positive, metavar="N", help="how many frames (all)")
    sub.add_argument("--start", type=int, default=0, metavar="N", help="the first frame (0)")
    sub.add_argument("--tokenizer", default="tok-v", metavar="NAME", help="whose latents (tok-v)")
    sub.add_argument("--exact", action="store_true", help="store float32, twice the size")
    sub.add_argument("--json", action="store_true", help="the report as JSON")

    sub = command("decode", _decode, "turn an encoded video back into a film", "  python -m minivid decode x.mvid x.mp4")
    sub.add_argument("stored", metavar="FILE", help="what `encode` wrote")
    sub.add_argument("out", metavar="OUT", help="the film: .mp4, .mkv, .mov, .webp or .gif")

    sub = command("info", _info, "what an encoded video is", "Reads the header only; no tokenizer is needed.")
    sub.add_argument("stored", metavar="FILE", help="what `encode` wrote")
    sub.add_argument("--json", action="store_true", help="as JSON")


def _add_generate(command: Callable) -> None:
    sub = command(
        "generate", _generate, "draw a clip from a caption",
        "The vocabulary is small; a word that is not in it is named, with the nearest that are.\n\n"
        '  python -m minivid generate "a large blue star moves up" star.mp4 --seed 3',
    )  # fmt: skip
    sub.add_argument("caption", metavar="CAPTION", help='such as "a red circle moves left"')
    sub.add_argument("out", metavar="OUT", help="the film: .mp4, .mkv, .mov, .webp or .gif")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="which noise to begin with (0)")
    sub.add_argument("--steps", type=_positive, default=20, metavar="N", help="calls of the model (20)")
    sub.add_argument("--guidance", type=float, default=2.0, metavar="W", help="how hard to follow the caption; 1: plain (2)")
    sub.add_argument("--scale", type=_positive, default=8, metavar="N", help="enlarge every pixel N times in the film (8)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)


def _side(text: str) -> int | None:
    if text == "full":
        return None
    side = _positive(text)
    if side % 4:
        raise argparse.ArgumentTypeError(f"a multiple of 4 or 'full', not {side} (try {side - side % 4 or 4})")
    return side


# --- what is then done --------------------------------------------------------------------------------------------------


def _papers(options: argparse.Namespace) -> None:
    from minivid.lab import papers

    if options.readme:
        path = papers.ROOT / "README.md"
        path.write_text(papers.readme(path.read_text(encoding="utf-8")), encoding="utf-8")
        print("README.md: table written")
        return
    facts = [row.facts() for row in papers.rows()]
    if options.json:
        print(json.dumps(facts, indent=1))
        return
    for chapter, question in papers.CHAPTERS.items():
        print(f"\n{chapter.replace('_', ' ')}: {question}")
        for row in (f for f in facts if f["chapter"] == chapter):
            state = row["verdict"] or ("done" if row["done"] else "open")
            print(f"  {row['slug']:<19}{row['kind']:<11}{state:<16}{row['title'][:70]}")
    print(f"\n{sum(f['done'] for f in facts)} of {len(facts)} papers are done.")


def _claims(options: argparse.Namespace) -> int:
    from minivid.lab import claims

    if not options.slugs:
        return _verdicts(options.json)
    bad, results = 0, []
    for slug in options.slugs:
        if options.fast:
            complaints = claims.check_fast(slug)
            bad += bool(complaints)
            results.append({"slug": slug, "moved": complaints})
            if not options.json:
                print("\n".join(complaints) or f"{slug}: the fast form gives what was stored")
            continue
        results.append(claims.run(slug, workers=options.workers, again=options.again))
        if not options.json:
            _print_result(results[-1], claims.outcome(slug))
    if options.json:
        print(json.dumps(results, indent=1))
    return 1 if bad else 0


def _verdicts(as_json: bool) -> int:
    from minivid.lab import claims

    listed = []
    for slug in claims.slugs():
        why = claims.stale(slug)
        verdict = claims.read(slug)["verdict"] if claims.load(slug).result.exists() else ""
        listed.append({"slug": slug, "verdict": verdict, "stale": why})
    if as_json:
        print(json.dumps(listed, indent=1))
    for row in () if as_json else listed:
        print(f"{row['slug']:<20}{row['verdict'] or 'open':<16}{row['stale']}".rstrip())
    if not listed and not as_json:
        print("No claim is written yet.")
    return 0


def _print_result(result: dict, outcome: str) -> None:
    took = f"{result['seconds'] / 120:.1f} of {result['minutes_allowed']:g} minutes of two cores"
    print(f"{result['slug']}: {result['verdict']} ({took})")
    for test in result["tests"]:
        print(f"  {test['verdict']:<16}{test['claim']}{'' if test['counts'] else ' (does not count)'}")
        if test["kind"] == "floor":
            print(f"{'':<18}mean {test['mean']:.4g} over {len(result['seeds'])} seeds")
            continue
        d = test["difference"]
        span = f" [{d['low']:.3g}, {d['high']:.3g}]" if d["low"] is not None else ", one seed"
        print(f"{'':<18}gain {d['mean']:+.3g}{span}, asked for {test['margin']:+.3g}")
    if outcome:
        print(f"  {outcome}")
    for run in result["earlier"]:
        print(f"  measured otherwise on {run['date']}: {run['verdict']}; see 'earlier' in the result file")
    if result["commit"].endswith("+changes"):
        print("  note: the measured files differ from the last commit; commit them, then measure once more")


def _train(options: argparse.Namespace) -> None:
    from minivid.training.command import train

    path = train(
        options.name, steps=options.steps, seed=options.seed, device=options.device, resume=options.resume,
        compiled=options.compile,
    )  # fmt: skip
    print(f"wrote {path}")


def _encode(options: argparse.Namespace) -> None:
    from minivid.lab import stored

    report = stored.encode(
        options.video, options.out, size=options.size, frames=options.frames, start=options.start,
        tokenizer=options.tokenizer, exact=options.exact,
    )  # fmt: skip
    if options.json:
        print(json.dumps(asdict(report), indent=1))
        return
    print(f"{options.out}: {report.frames} frames of {report.width} x {report.height}")
    print(f"  PSNR         {report.psnr:.1f} dB")
    print(f"  numbers      {report.numbers_ratio:.1f} times fewer than pixel values")
    print(f"  bytes        {report.file_bytes:,}, {report.raw_bytes / report.file_bytes:.1f} times fewer than raw pixels")
    print(f"  seconds      {report.encode_seconds:.2f} to encode, {report.decode_seconds:.2f} to decode")


def _decode(options: argparse.Namespace) -> None:
    from minivid.lab import stored

    video = stored.decode(options.stored, options.out)
    print(f"{options.out}: {video.clip.shape[1]} frames of {video.clip.shape[3]} x {video.clip.shape[2]}")


def _info(options: argparse.Namespace) -> None:
    from minivid.lab import stored

    facts = stored.info(options.stored)
    if options.json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        print(f"{name:<11}{' x '.join(map(str, value)) if isinstance(value, list) else value}")


def _generate(options: argparse.Namespace) -> None:
    from minivid.core.sample import generate
    from minivid.world.files import write_video

    if Path(options.out).suffix.lower() not in (".mp4", ".mkv", ".mov", ".webp", ".gif"):
        raise Trouble(f"the film's name must end in .mp4, .mkv, .mov, .webp or .gif, not {options.out!r}")
    clip = generate([options.caption], seed=options.seed, steps=options.steps, guidance=options.guidance)[0]
    large = clip.repeat_interleave(options.scale, 2).repeat_interleave(options.scale, 3)
    write_video(options.out, large, fps=8)
    print(f"{options.out}: {clip.shape[1]} frames of {clip.shape[3]} x {clip.shape[2]}, enlarged {options.scale} times")


def _bench(options: argparse.Namespace) -> None:
    from minivid.lab import bench

    speeds = bench.run()
    if options.json:
        print(json.dumps([asdict(speed) | {"met": speed.met} for speed in speeds], indent=1))
        return
    for speed in speeds:
        goal = f"{'at least' if speed.more else 'at most'} {speed.target:g}"
        print(f"{speed.name:<34}{speed.value:8.3g} {speed.unit:<8} {goal:<14} {'ok' if speed.met else 'MISSED'}")
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > (os.cpu_count() or 1):
        print(f"note: the machine is busy (load {busy:.1f} on {os.cpu_count()} cores), so these are too slow")


if __name__ == "__main__":
    sys.exit(main())
