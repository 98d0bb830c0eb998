"""The command line: it teaches, its exit codes tell, and wrong input gets one line on stderr, never a traceback."""

import json
import subprocess
import sys

import pytest
import torch

from minivid.__main__ import main
from minivid.core import weights
from minivid.core.tokenizer import Tokenizer
from minivid.lab import claims, jobs, papers, stored
from minivid.world.files import read_video, write_video

TOY = '''"""A toy.

Outcome: as expected.
"""

from minivid.lab.claims import Arm, Claims, Compare, Floor


def arm(seed, fast, gain):
    return {"m": gain + 0.01 * seed}


CLAIMS = Claims(
    "toy",
    arms={"a": Arm(arm, gain=1.0), "b": Arm(arm, gain=2.0)},
    tests=[Compare("more", "m", method="b", baseline="a", margin=0.5), Floor("floor", "m", arm="a", at_least=3)],
    sources=[__file__],
)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A claims folder with one toy claim."""
    monkeypatch.setattr(jobs, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    (tmp_path / "toy.py").write_text(TOY)
    return tmp_path


@pytest.fixture
def video(tmp_path, monkeypatch):
    """An untrained small tokenizer in place of the shipped one, and a video of 22 frames."""
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    settings = {"channels": 4, "widths": [8, 8], "depths": [1, 1]}
    torch.manual_seed(0)
    weights.save(weights.path_of("tok-v"), Tokenizer(**settings), "tokenizer", settings, {})
    clip = torch.rand(3, 22, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return write_video(tmp_path / "x.mp4", clip, fps=12)


def run(capsys, *words):
    """Exit code, stdout, stderr of a command."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


COMMANDS = ["papers", "claims", "train", "encode", "decode", "info", "generate", "bench"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and len(out.splitlines()) >= 6
    code, out, _ = run(capsys, "--help")
    assert code == 0 and f"\n    {command} " in out and "python -m minivid papers" in out


@pytest.mark.parametrize("words", [[], ["frob"], ["encode", "a"], ["encode", "a", "b", "--size", "30"],
                                   ["claims", "--workers", "0"], ["generate", "a", "b.mp4", "--steps", "many"]])  # fmt: skip
def test_usage_errors_exit_with_2(capsys, words):
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and "usage:" in err


def test_papers(capsys):
    code, out, _ = run(capsys, "papers", "--json")
    facts = json.loads(out)
    assert code == 0 and len(facts) == 48
    keys = {"slug", "title", "chapter", "kind", "done", "code", "test", "claim", "lesson", "verdict"}
    assert all(keys <= fact.keys() for fact in facts)
    code, out, _ = run(capsys, "papers")
    assert code == 0 and all(row.slug in out for row in papers.ROWS) and "of 48 papers are done" in out


def test_papers_writes_the_readme(capsys, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(f"{papers.BEGIN}\n{papers.END}\n")
    monkeypatch.setattr(papers, "ROOT", tmp_path)
    assert run(capsys, "papers", "--readme")[0] == 0
    assert "of 48 papers are done." in (tmp_path / "README.md").read_text()


def test_claims(capsys, toy):
    code, out, _ = run(capsys, "claims")
    assert code == 0 and out.startswith("toy") and "open" in out and "has not been measured" in out
    code, out, _ = run(capsys, "claims", "toy")
    assert code == 0, "a verdict that is not 'holds' is a result, not a failure"
    assert out.startswith("toy: partly") and "gain +1 [1, 1], asked for +0.5" in out and "as expected." in out
    code, out, _ = run(capsys, "claims", "toy", "--fast")
    assert code == 0 and "gives what was stored" in out
    code, out, _ = run(capsys, "claims", "--json")
    assert json.loads(out) == [{"slug": "toy", "verdict": "partly", "stale": ""}]
    (toy / "toy.py").write_text(TOY.replace("gain + 0.01", "gain + 1 + 0.01"))
    code, out, _ = run(capsys, "claims", "toy", "--fast")
    assert code == 1 and "fast m of a was 1, is now 2" in out
    code, out, err = run(capsys, "claims", "toi")
    assert code == 1 and err.count("\n") == 1 and "no claim is written for 'toi'" in err


def test_a_video_goes_through_the_tokenizer_and_back(capsys, video, tmp_path):
    mvid, again = tmp_path / "x.mvid", tmp_path / "again.webp"
    code, out, _ = run(capsys, "encode", video, mvid, "--size", "full", "--json")
    report = json.loads(out)
    assert code == 0 and (report["frames"], report["height"], report["width"]) == (22, 32, 48)
    assert report["file_bytes"] == mvid.stat().st_size and report["numbers_ratio"] == pytest.approx(3 * 22 * 16 / 28)
    code, out, _ = run(capsys, "info", mvid, "--json")
    assert json.loads(out)["latent"] == [4, 7, 8, 12] and json.loads(out)["fps"] == 12
    assert run(capsys, "decode", mvid, again)[0] == 0
    film = read_video(again)
    assert film.clip.shape == (3, 22, 32, 48)
    code, out, _ = run(capsys, "encode", video, tmp_path / "y.mvid", "--size", "16", "--frames", "5", "--exact")
    assert code == 0 and "5 frames of 16 x 16" in out and "PSNR" in out and "times fewer" in out and "seconds" in out


def test_chunks_give_what_one_piece_gives(video):
    model, clip = weights.load("tok-v"), torch.rand(3, 41, 16, 16) * 2 - 1
    with torch.no_grad():
        whole = model.encode(clip[None])
        assert torch.allclose(stored._encode(model, clip), whole, atol=1e-5)
        assert torch.allclose(stored._decode(model, whole, 41), model.decode(whole)[0], atol=1e-5)
    assert list(stored._plan(41, 4, True)) == [(0, 17), (17, 16), (33, 8)]
    assert list(stored._plan(41, 4, False)) == [(0, 41)]


def test_wrong_files_get_one_line(capsys, video, tmp_path):
    text, cut, mvid = tmp_path / "text.mp4", tmp_path / "cut.mvid", tmp_path / "x.mvid"
    text.write_text("no video")
    assert run(capsys, "encode", video, mvid)[0] == 0
    cut.write_bytes(mvid.read_bytes()[:300])
    wrong = [
        (["encode", tmp_path / "none.mp4", "x"], "no file"),
        (["encode", text, "x"], "not a video"),
        (["encode", video, "x", "--frames", "99"], "too short"),
        (["encode", video, "x", "--tokenizer", "tok-x"], "no weights called 'tok-x'"),
        (["decode", cut, "x.mp4"], "no .mvid file"),
        (["decode", tmp_path / "none", "x.mp4"], "no file"),
        (["decode", mvid, tmp_path / "x.doc"], ".mp4"),
        (["info", weights.path_of("tok-v")], "not a video made by"),
        (["generate", "a red circle moves left", "x.doc"], "must end in"),
        (["generate", "a red circle moves left", tmp_path / "x.mp4"], "no weights called 'video'"),
        (["generate", "a purple dog", tmp_path / "x.mp4"], "outside the vocabulary"),
        (["train", "nothing"], "no recipe called"),
    ]
    for words, message in wrong:
        code, out, err = run(capsys, *words)
        assert code == 1 and out == "" and err.count("\n") == 1 and message in err, (words, err)
    assert not (tmp_path / "x.mp4.part").exists()


def test_a_file_of_other_weights_is_refused(capsys, video, tmp_path):
    assert run(capsys, "encode", video, tmp_path / "x.mvid", "--frames", "1")[0] == 0
    torch.manual_seed(1)
    settings = {"channels": 4, "widths": [8, 8], "depths": [1, 1]}
    weights.save(weights.path_of("tok-v"), Tokenizer(**settings), "tokenizer", settings, {})
    code, _, err = run(capsys, "decode", tmp_path / "x.mvid", tmp_path / "y.mp4")
    assert code == 1 and "encoded by other weights" in err and not (tmp_path / "y.mp4").exists()


def test_stopping_is_not_an_error_message(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(papers, "rows", stop)
    code, out, err = run(capsys, "papers")
    assert code == 130 and "what was finished is kept" in err


def test_a_closed_pipe_is_quiet():
    shell = f"{sys.executable} -m minivid papers --json | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=papers.ROOT)
    assert done.stdout == "[\n" and done.stderr == ""
