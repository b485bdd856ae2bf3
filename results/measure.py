"""How far generated sounds are from the real ones, by judges of which --teacher alone
took part in training.

    python results/measure.py runs/x/samples-1/LibriTTS    # of agrepa.py --sample

It compares each file of generated/ with the one of the same name in real/, prints a
table and writes metrics.json. The floor is the real file's mel vocoded once more, from
other phases: what vocoding alone costs. Vocode real/ too, as --sample does, or the
vocoder counts.

words_wrong         error rate against the words heard in the real file
speaker_similarity  cosine with the real file's voice; speaker_other: with another's
dnsmos_*            opinion scores, 1 to 5: overall, of the signal, of the background
mel_*               log-mel by frames: l1; in dB, without loudness; its spread over the
                    real one's
frechet_*           squared, of Gaussians fitted to voices, MFCC or a teacher's features
seconds_apart, sample_rate    where these differ from real/, mel_* and frechet_* suffer
silent              share of files without a sound; all other figures count them, too

A pair of which a file can't be used, or the real one is silent, is named and left out.
Whisper hears the words, and is partial to what its pupils learned: not for --teacher
whisper. What can't be judged, for want of a package or of files, is named.
"""

import argparse
import contextlib
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import create_dct, edit_distance
from torchaudio.transforms import MFCC

sys.path.insert(0, str(Path(__file__).parents[1]))
import agrepa
import data_prep
from agrepa import CHUNK, RATE, TEACHER_RATE

COLUMNS = "generated standard_error floor real count".split()  # of files, words or rows
UNSPACED = "zh yue ja th lo km my".split()  # languages written without spaces


# ---- Sounds --------------------------------------------------------------------------


class Sound:
    """A waveform [samples] as judges take it; hear() notes its words and voice."""

    def __init__(self, wave, rate):
        self.rate = rate
        # -80 dB without the constant part: noise of 16 bits' last is silence.
        self.silent = wave.std() < 1e-4
        self.at_16 = data_prep.resampled(wave, rate, TEACHER_RATE)
        self.at_24 = data_prep.resampled(wave, rate, RATE)
        self.mel = agrepa.log_mel(self.at_24[None])[0]  # [frames, 100]
        self.language = None  # until the words are heard


def read(path):
    """A file -> its Sound; ValueError says why there is none."""
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    if len(wave) < CHUNK * rate:
        raise ValueError(f"{path} is empty or shorter than {CHUNK} s")
    if not abs(wave).max() < 100:  # so written, it is true of NaN
        raise ValueError(f"{path} has samples that are not numbers, or above 100")
    return Sound(torch.from_numpy(data_prep.mono(wave)), rate)


# ---- Judges --------------------------------------------------------------------------


@contextlib.contextmanager
def optional(name):
    try:
        yield
    except Exception as error:  # not installed, no such model, no network
        print(f"no judge of {name}: {error!r:.200}")


def load(options):
    """-> {judge: its model or function}; says which can't be had."""
    judges = {}
    if not options.general:
        with optional("words"):
            from faster_whisper import WhisperModel

            judges["words"] = WhisperModel(
                options.whisper, "cpu", compute_type="float32"
            )
        with optional("speaker"):
            from resemblyzer import VoiceEncoder

            judges["speaker"] = VoiceEncoder("cpu", verbose=False)
        with optional("dnsmos"):
            from speechmos.dnsmos import run

            judges["dnsmos"] = run
    if options.teacher:
        with optional("teacher"):
            judges["teacher"] = data_prep.listener(
                options.teacher, agrepa.Config(device="cpu")
            )
    return judges


def split_words(text, language):
    """Words in any script; where no spaces are written, characters with their marks."""
    parted = ""
    for character in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(character)
        if kind[0] in "LN" and language in UNSPACED:
            parted += " " + character
        elif kind[0] in "LNM":  # marks: accents, and the vowel signs of many scripts
            parted += character
        elif kind != "Cf" and character not in "'’":  # joiners, apostrophes: no gap
            parted += " "
    return parted.split()


def transcribe(model, wave, language):
    """-> words, the language: the one given, or the one heard"""
    parts, about = model.transcribe(
        wave,
        language=language,
        beam_size=1,
        temperature=0,
        condition_on_previous_text=False,
    )
    text = " ".join(part.text for part in parts)
    return split_words(text, about.language), about.language


def embed(encoder, wave):
    """-> the voice [256], of unit length, and that of each 1.6 s [n, 256]"""
    from resemblyzer import preprocess_wav

    voiced = preprocess_wav(wave + 1e-9)  # it divides by the loudness
    if not len(voiced):  # nothing in noise is voiced
        voiced = wave
    return encoder.embed_utterance(voiced, return_partials=True)[:2]


def teacher_rows(teacher, wave):
    """Its features, a row a chunk [n, dim]: of 2560 samples it makes 8 frames."""
    x = teacher(wave[None, : len(wave) // 2560 * 2560])[0]
    return x.unfold(0, 8, 8).mean(2)


def mfcc_rows(wave):
    """Mean and deviation of 13 MFCC over each 0.16 s [n, 26]."""
    mel = {"n_fft": 600, "hop_length": 240, "n_mels": 40}
    x = MFCC(RATE, 13, melkwargs=mel)(wave).unfold(1, 16, 16)
    return torch.cat([x.mean(2), x.std(2)]).T


def compare(sound, real):
    apart = sound.mel[: len(real.mel)] - real.mel[: len(sound.mel)]
    cepstra = apart @ create_dct(14, 100, None)[:, 1:] / 100  # the first is loudness
    decibels = 10 / np.log(10) * (2 * cepstra**2).sum(1).sqrt()
    return {
        "mel_l1": apart.abs().mean(),
        "mel_cepstral_distortion": decibels.mean(),
        "mel_std_ratio": sound.mel.std() / real.mel.std(),
        "seconds_apart": abs(len(sound.at_16) - len(real.at_16)) / TEACHER_RATE,
        "sample_rate": sound.rate,
    }


def hear(sound, judges, real, other):
    """A Sound, its real one, another real one ->
    {metric: a figure; errors and words; or rows of a distribution}"""
    figures = compare(sound, real)
    figures["frechet_mfcc"] = mfcc_rows(sound.at_24)
    figures["silent"] = sound.silent
    wave = sound.at_16.clamp(-1, 1).numpy()
    if "words" in judges:
        # In the real file's language, lest noise be taken for Welsh.
        sound.words, sound.language = transcribe(judges["words"], wave, real.language)
        # Where the real file has no words, all of these are errors.
        errors = edit_distance(real.words, sound.words)
        figures["words_wrong"] = errors, len(real.words)
    if "speaker" in judges:
        sound.voice, figures["frechet_speaker"] = embed(judges["speaker"], wave)
        figures["speaker_similarity"] = sound.voice @ real.voice
        if other:
            figures["speaker_other"] = sound.voice @ other.voice
    if "dnsmos" in judges:
        scores = judges["dnsmos"](wave, TEACHER_RATE)
        for part in ("ovrl", "sig", "bak"):
            figures[f"dnsmos_{part}"] = scores[f"{part}_mos"]
    if "teacher" in judges:
        figures["frechet_teachers_own"] = teacher_rows(judges["teacher"], sound.at_16)
    for metric, figure in figures.items():
        if not np.isfinite(np.asarray(figure)).all():
            raise ValueError(f"{metric} is not a number")
    return figures


def hear_pair(real_path, generated_path, judges, other):
    """-> {kind: {metric: figure}}, the real Sound"""
    real = read(real_path)
    if real.silent:  # distances to nothing say nothing, ratios are infinite
        raise ValueError(f"{real_path} is silent")
    generated = read(generated_path)
    if generated.silent:
        print(f"{generated_path} is silent, which counts against it")
    # Other phases than those of --sample, whose seed is 0.
    floor = Sound(agrepa.mel_to_wave(real.mel[None], seed=1)[0], RATE)
    heard = {}
    for kind, sound in [("real", real), ("generated", generated), ("floor", floor)]:
        heard[kind] = hear(sound, judges, real, other)
    return heard, real


# ---- Files to figures ----------------------------------------------------------------


def frechet(a, b):
    """Squared Fréchet distance of Gaussians fitted to the rows a [n, D], b [m, D]."""
    count, width = a.shape
    if min(count, len(b)) <= width:  # a singular covariance: mostly chance
        raise ValueError(f"{count} rows for {width} dimensions, it takes more files")
    A = np.cov(a.T)
    B = np.cov(b.T)
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    root = np.linalg.eigvals(A @ B).real.clip(0) ** 0.5  # its sum: tr (A B)^(1/2)
    return max(0, apart + np.trace(A + B) - 2 * root.sum())


def reduce(metric, values):
    """{kind: [a figure a file]} -> {column: figure}; ValueError where there is none."""
    tables = {kind: np.vstack(files, dtype=float) for kind, files in values.items()}
    count = len(tables["generated"])
    figures = {}
    for kind, x in tables.items():
        if metric.startswith("frechet"):
            figures[kind] = frechet(x, tables["real"])
        elif metric == "words_wrong":
            errors, count = x.sum(0)
            if count == 0:
                raise ValueError("no words in real/")
            figures[kind] = errors / count
        else:
            figures[kind] = x.mean()
            if kind == "generated" and count > 1:
                figures["standard_error"] = x.std(ddof=1) / count**0.5
    figures["count"] = count
    return {column: float(f"{x:.6g}") for column, x in figures.items()}


def list_sounds(folder):
    """-> {name without its ending: path}"""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # macOS's ._x.wav holds no sound
            print(f"left out: {path} is hidden")
        elif path.suffix.lower() in data_prep.AUDIO:
            found[path.stem] = path
    return found


def measure(folder, judges):
    """-> {metric: {column: figure}}; says which files are left out."""
    real = list_sounds(Path(folder, "real"))
    generated = list_sounds(Path(folder, "generated"))
    names = sorted(real | generated)
    values = {}
    other = None
    for i, name in enumerate(names):
        if name not in real or name not in generated:
            print(f"left out: {name} is not in both real/ and generated/")
            continue
        try:
            heard, other = hear_pair(real[name], generated[name], judges, other)
        except Exception as error:  # of any judge: one odd file must not end the rest
            print(f"left out: {name}: {error!s:.200}")
            continue
        for kind, figures in heard.items():
            for metric, figure in figures.items():
                values.setdefault(metric, {}).setdefault(kind, []).append(figure)
        if i % 20 == 19:
            print(f"{folder}: {i + 1} of {len(names)}", file=sys.stderr)
    if not values:
        raise ValueError(f"{folder}: no pair of real/ and generated/ can be used")
    metrics = {}
    for metric in sorted(values):
        try:
            metrics[metric] = reduce(metric, values[metric])
        except ValueError as error:
            print(f"{metric} is left out: {error}")
    return metrics


def advise(metrics):
    """Guidance changes the mel's spread; so do other causes, ruled out here."""
    spread = metrics["mel_std_ratio"]
    apart = spread["generated"] - 1
    error = spread.get("standard_error", 0)  # 0, too, where all files are copies of one
    for metric in ("silent", "seconds_apart", "sample_rate"):
        if metrics[metric]["generated"] != metrics[metric]["real"]:
            return
    if error and max(2 * error, 0.1) < abs(apart) < 0.5:
        way = "lower" if apart > 0 else "higher"
        print(
            f"mel_std_ratio is off by {apart:+.2f}, by chance {error:.2f}; lengths and "
            f"rates are alike, nothing is silent: try a {way} --guidance"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folders", nargs="+")
    add("--general", action="store_true", help="not speech: no words, speaker, dnsmos")
    add("--whisper", default="tiny", help="a model's folder, or name to download")
    add("--teacher", default="", help="the run's teacher, as agrepa.py takes it")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # names of files may be no text
    judges = load(options)
    for folder in options.folders:
        metrics = measure(folder, judges)
        Path(folder, "metrics.json").write_text(json.dumps(metrics, indent=1))
        print(f"{folder:24}", *(f"{column:>14}" for column in COLUMNS))
        for metric, figures in metrics.items():
            print(
                f"{metric:24}",
                *(f"{figures.get(column, '-'):>14}" for column in COLUMNS),
            )
        advise(metrics)


if __name__ == "__main__":
    agrepa.guarded(main)
