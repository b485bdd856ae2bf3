"""How far generated sounds are from the real ones, by judges of which --teacher alone took part.

    python results/measure.py runs/x/samples-1/LibriTTS    # of agrepa.py --sample

It compares generated/*.wav, and again/*.wav (the floor: the real mel, vocoded once more), with
real/*.wav of the same names, and writes metrics.json. Vocode real/ too, or the vocoder counts.

words_wrong           error rate against the words heard in the real file
speaker_similarity    cosine with the real file's voice; speaker_other: with the real file's before
dnsmos_*              opinion scores without a reference, 1 to 5: overall, signal, background
mel_*                 log-mel by frames: l1; in dB, without loudness; its spread over the real one's
frechet_*             squared, of Gaussians fitted to voices, MFCC or a teacher's features
seconds_apart, sample_rate      where these differ from the real files', mel_* and MFCC suffer
"""

import argparse
import json
import re
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import create_dct, resample
from torchaudio.transforms import MFCC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import agrepa
import data_prep

torch.set_num_threads(1)  # models are so small that threads would wait for each other
FOLDERS = {"real": "real", "generated": "generated", "floor": "again"}  # kind: where its files lie
COLUMNS = "generated", "standard_error", "floor", "real", "count"  # count: of files, words or rows
UNSPACED = {"zh", "yue", "ja", "th", "lo", "km", "my"}  # written without spaces: characters count


def load(options):
    """-> {judge: its model or function}; says which can't be had."""
    whisper, config = (options.whisper, "cpu", 0, "float32"), agrepa.Config(device="cpu")
    get, judges = import_module, {}
    makers = {
        "words": lambda: get("jiwer") and get("faster_whisper").WhisperModel(*whisper),
        "speaker": lambda: get("resemblyzer").VoiceEncoder("cpu", verbose=False),
        "dnsmos": lambda: get("speechmos.dnsmos").run,
        "teacher": lambda: data_prep.listener(options.teacher, config),
    }
    speech = ["words", "speaker", "dnsmos"] * (not options.general)
    for name in speech + ["teacher"] * bool(options.teacher):
        try:
            judges[name] = makers[name]()
        except ImportError as error:
            print(f"not installed: {str(error.name).replace('_', '-')} ({name})")
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            print(f"left out: {name}, see --help ({type(error).__name__}: {str(error)[:60]!r})")
    if "words" in judges:
        print("words: judged by Whisper, a sibling of a Whisper teacher, partial to its pupils")
    return judges


@torch.no_grad()
def hear(path, judges, real=None, other=None):
    """A file; what this returned for its real file and another -> {metric: value}: a figure; or a
    part and a whole, to be summed over files; or rows [n, D] of a distribution. Names in _ are no
    metrics but what others are compared with."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if len(wave) < 0.16 * rate or not np.isfinite(wave).all():
        raise ValueError(f"{path}: shorter than 0.16 s, or not all numbers")
    wave, wave_24 = (resample(torch.from_numpy(wave.mean(1)), rate, r) for r in (16_000, 24_000))
    x, heard = wave.clamp(-1, 1).numpy(), {"sample_rate": rate, "_seconds": len(wave) / 16_000}
    real = real or heard  # a real file is compared with itself
    heard["seconds_apart"] = abs(heard["_seconds"] - real["_seconds"])
    if "words" in judges:  # in the real file's language, lest noise be taken for Welsh
        how = {"beam_size": 1, "temperature": 0, "condition_on_previous_text": False}
        parts, about = judges["words"].transcribe(x, language=real.get("_language"), **how)
        words = re.findall(r"[\w']+", " ".join(part.text for part in parts).lower())
        heard["_language"] = about.language
        heard["_text"] = " ".join("".join(words) if about.language in UNSPACED else words)
        n, wer = len(real["_text"].split()), import_module("jiwer").wer
        heard["words_wrong"] = n * wer(real["_text"], heard["_text"]), n
    if "speaker" in judges:  # nothing voiced may be left of noise
        voiced = import_module("resemblyzer").preprocess_wav(x) if x.any() else x
        voice, rows, _ = judges["speaker"].embed_utterance(voiced if len(voiced) else x, True)
        heard |= {"_voice": voice, "frechet_speaker": rows}  # voices have unit length
        heard["speaker_similarity"] = voice @ real["_voice"]
        heard |= {"speaker_other": voice @ other["_voice"]} if other else {}
    if "dnsmos" in judges:
        scores = judges["dnsmos"](x, 16_000)
        heard |= {f"dnsmos_{k}": scores[f"{k}_mos"] for k in ("ovrl", "sig", "bak")}
    if "teacher" in judges:  # its frames, 8 by 8
        x = judges["teacher"](wave[None, : len(wave) // 2560 * 2560])
        heard["frechet_teachers_own"] = x[0].unflatten(0, (-1, 8)).mean(1)
    heard["_mel"] = agrepa.log_mel(wave_24[None, : len(wave_24) // 256 * 256])[0]
    a, b = heard["_mel"][: len(real["_mel"])], real["_mel"][: len(heard["_mel"])]
    cepstra = (a - b) @ create_dct(14, 100, None)[:, 1:] / 100
    decibels = 10 / np.log(10) * (2 * cepstra**2).sum(1).sqrt()
    heard |= {"mel_l1": (a - b).abs().mean(), "mel_cepstral_distortion": decibels.mean()}
    x = MFCC(24_000, 13, melkwargs={"n_fft": 600, "hop_length": 240, "n_mels": 40})(wave_24)
    x = x[:, : x.shape[1] // 16 * 16].unflatten(1, (-1, 16))  # chunks of 0.16 s
    rows = torch.cat([x.mean(2), x.std(2)]).T
    return heard | {"mel_std_ratio": a.std() / b.std(), "frechet_mfcc": rows}


def frechet(a, b):
    """Squared Fréchet distance of the Gaussians fitted to the rows of a [n, D] and b [m, D]."""
    A, B = np.cov(a.T), np.cov(b.T)
    shared = np.linalg.eigvals(A @ B).real.clip(0) ** 0.5  # its sum: tr (A B)^(1/2)
    return max(0, ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * shared.sum())


def reduce(metric, values):
    """{kind: [hear's value of each file]} -> {column: figure}; {} if it takes more files."""
    n, rank = len(values["real"]), np.ndim(values["real"][0])
    if rank == 2:
        rows = {kind: np.concatenate(files).astype(float) for kind, files in values.items()}
        n, d = min(map(len, rows.values())), rows["real"].shape[1]
        if n <= d:  # a singular covariance: the distance would be mostly chance
            print(f"{metric}: refused, {n} rows for {d} dimensions; it takes more files")
            return {}
        figures = {kind: frechet(x, rows["real"]) for kind, x in rows.items()}
    elif rank == 1:
        part, (n, *_) = np.sum(list(values.values()), 1).T
        figures = dict(zip(values, part / (n or np.nan), strict=True))
    else:
        figures = {kind: np.mean(files) for kind, files in values.items()}
        figures |= {"standard_error": np.std(values["generated"]) / (n - 1 or np.nan) ** 0.5}
    return {k: float(f"{x:.6g}") for k, x in (figures | {"count": n}).items() if np.isfinite(x)}


def measure(folder, judges):
    """-> {metric: {column: figure}}; says what may mislead."""
    have = {k: {path.name for path in Path(folder, at).glob("*.wav")} for k, at in FOLDERS.items()}
    names = sorted(have["real"] & have["generated"])
    if not names:
        raise ValueError(f"{folder}: no real/*.wav and generated/*.wav of the same names")
    if any(files ^ set(names) for files in have.values() if files):
        print("some names aren't in all folders: left out, or where again/ lacks them, no floor")
    kinds = [kind for kind in FOLDERS if have[kind] >= set(names)]
    values, real, told = {}, None, time.monotonic()
    for i, name in enumerate(names):
        other, real = real, None
        for kind in kinds:
            heard = hear(Path(folder, FOLDERS[kind], name), judges, real, other)
            real = real or heard
            for metric in [m for m in heard if m[0] != "_"]:
                values.setdefault(metric, {k: [] for k in kinds})[kind].append(heard[metric])
        if time.monotonic() > told + 5:
            told = time.monotonic()
            print(f"{folder}: {i + 1} of {len(names)}", file=sys.stderr)
    return {m: of for m in sorted(values) if (of := reduce(m, values[m]))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER")
    add("--general", action="store_true", help="not speech: without words, speaker, dnsmos")
    add("--whisper", default="tiny", metavar="DIR", help="a model's folder, or name to download")
    add("--teacher", default="", help="the run's teacher, as agrepa.py takes it")
    options = parser.parse_args()
    judges = load(options)
    for folder in options.folders:
        print(f"\n{folder}")
        metrics = measure(folder, judges)
        Path(folder, "metrics.json").write_text(json.dumps(metrics, indent=1))
        for metric, of in ({"": dict(zip(COLUMNS, COLUMNS, strict=True))} | metrics).items():
            print(f"{metric:24}" + "".join(f"{of.get(k, '-'):>15}" for k in COLUMNS))
        if not 0.9 <= (ratio := metrics["mel_std_ratio"].get("generated", 1)) <= 1.1:
            print(f"mel_std_ratio should be 1: {'lower' if ratio > 1 else 'raise'} --guidance")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, soundfile.SoundFileError, KeyboardInterrupt) as error:
        print(f"measure.py: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)
