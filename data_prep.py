"""Audio to prepared folders for agrepa.py: log-mel, teacher features and tokens in blocks of 0.16 s.

    python data_prep.py ./LibriTTS                              # as agrepa.py --data would
    python data_prep.py ./LibriTTS --download train-clean-100   # fetches that part of LibriTTS first
    python data_prep.py --toy ./toy-audio                       # the toy corpus: speech and sounds

The audio is only read: WAV, FLAC, OGG, MP3 and whatever else libsndfile opens, of any rate from
4 kHz. What can't be used is skipped, and listed with the reason in meta.json. Progress goes to
standard error; the last line of standard output is the prepared folder.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import argparse
import collections
import contextlib
import itertools
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap

import agrepa
from agrepa import BLOCK, FRAMES, N_MELS, RATE, TEACHER_FRAMES, WINDOW, BlockDataset, Config

AUDIO = set(".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .caf .w64 .rf64 .sph".split())
LIBRITTS_PARTS = (
    "dev-clean dev-other test-clean test-other train-clean-100 train-clean-360 train-other-500"
).split()
BATCH = 600  # blocks, 96 s of equal lengths to the teacher at once
FRAMES_A_UNIT = 40  # that k-means is fitted on
SETTINGS = [*agrepa.PREPARATION, "device", "cache"]
FOLDERS = 20  # at least so many folders above the files, to hold out whole ones


def say(text):
    print(text, file=sys.stderr, flush=True)


def progress(things, name):
    """The things, one after another; every five seconds it says how many are done."""
    began = said = time.time()
    for done, thing in enumerate(things, 1):
        yield thing
        now = time.time()
        if now - said > 5:
            said, left = now, (len(things) - done) * (now - began) / done
            say(f"  {done:,} of {len(things):,} {name}, {left / 60:.0f} min left")


# ---- which audio ---------------------------------------------------------------------------------


def list_audio(folder):
    """-> [(path relative to folder, bytes, time of change)], sorted, and what can't be listed.
    Links are followed; a folder or file met again by another name is left out."""
    say(f"looking through {folder}")
    found, skipped, seen, errors = [], [], set(), []
    for base, folders, files in os.walk(folder, onerror=errors.append, followlinks=True):
        folders.sort()
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(files):
            path = os.path.join(base, name)
            if Path(name).suffix.lower() not in AUDIO or name.startswith("."):
                continue
            if os.path.isfile(path):  # no pipe, which would wait for a writer
                state = os.stat(path)
                inode = state.st_dev, state.st_ino
                if inode not in seen:
                    found.append((os.path.relpath(path, folder), state.st_size, state.st_mtime_ns))
                seen.add(inode)
            else:
                skipped.append({"path": os.path.relpath(path, folder), "reason": "is no file"})
    skipped += [{"path": os.path.relpath(e.filename, folder), "reason": e.strerror} for e in errors]
    return sorted(found), skipped


def scan(folder, files):
    """Reads the headers -> {path: blocks} of the usable files, and why the others aren't."""
    import soundfile

    usable, skipped = {}, []
    for path, *_ in progress(files, "headers read"):
        try:
            info = soundfile.info(os.fsencode(os.path.join(folder, path)))
            blocks = int(info.frames / info.samplerate / BLOCK + 1e-6)
            if info.samplerate < 4000 or blocks > 2**24:
                raise ValueError(f"claims {info.frames} samples at {info.samplerate} Hz")
            if blocks < 1:
                raise ValueError(f"is shorter than a block of {BLOCK} s")
            usable[path] = blocks
        except ValueError as error:
            skipped.append({"path": path, "reason": str(error)})
        except (RuntimeError, OSError, ZeroDivisionError) as error:  # soundfile's own is the first
            skipped.append({"path": path, "reason": f"can't be read ({error})"})
    return usable, skipped


def hold_out(usable):
    """Which files to hold out: dev-* and test-* folders where there are any; else, in the order of a
    hash, whole folders just above the files (a chapter, a speaker) where there are FOLDERS of them,
    or files; 2 % and 5 minutes at least, 10 % at most."""
    named = {p for p in usable if any(s.startswith(("dev-", "test-")) for s in Path(p).parts[:-1])}
    if named and len(named) < len(usable):
        return named
    groups = {}
    for path in usable:
        groups.setdefault(str(Path(path).parent), []).append(path)
    if len(groups) < FOLDERS:
        groups = {path: [path] for path in usable}
    total, held, taken = sum(usable.values()), set(), 0
    for group in sorted(groups, key=agrepa.by_hash):
        size = sum(usable[p] for p in groups[group])
        if taken < max(0.02 * total, 300 / BLOCK) and taken + size <= 0.1 * total:
            held |= set(groups[group])
            taken += size
    return held or {min(usable, key=usable.get)}


class Window(NamedTuple):
    path: str
    start: int  # the block of the file that it begins at
    blocks: int
    row: int  # of the prepared arrays, which have one a block
    held_out: bool


def plan(usable):
    """-> the windows that files are cut into, in the order of their rows: those to train on first."""
    files, cuts = hold_out(usable), []
    for path in sorted(usable, key=agrepa.by_hash):
        for start in range(0, usable[path], WINDOW):
            cuts.append((path, start, min(WINDOW, usable[path] - start)))
    held = {cut for cut in cuts if cut[0] in files}
    if len(usable) == 1:  # its last windows
        held = set(cuts[-max(1, len(cuts) // 20) :])
    if len(held) == len(cuts):
        raise ValueError("one utterance is too little: some audio has to be held out")
    windows, row = [], 0
    for cut in sorted(cuts, key=lambda cut: (cut in held, cut[2])):
        windows.append(Window(*cut, row, cut in held))
        row += windows[-1].blocks
    return windows


def batches_of(windows):
    """Windows of one length together: padding would change what the teacher says of a clip."""
    batches = []
    for _, group in itertools.groupby(windows, key=lambda w: (w.held_out, w.blocks)):
        alike = list(group)
        size = max(1, BATCH // alike[0].blocks)
        batches += [alike[i : i + size] for i in range(0, len(alike), size)]
    return batches


# ---- audio to what is stored of it ---------------------------------------------------------------


class Listener:
    """Reads windows of audio and asks the teacher."""

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        self.threads = ThreadPoolExecutor(min(8, os.cpu_count() or 2))
        *_, self.device, self.autocast = agrepa.launch(config)
        specs = [config.teacher, config.units_teacher or config.teacher]
        made = {s: agrepa.Teacher(s, config.teacher_layer).to(self.device) for s in set(specs)}
        self.teacher, self.units_teacher = (made[spec] for spec in specs)

    def read(self, window):
        """-> waveform at 16 kHz [n x 2560], mel. Raises ValueError with the reason why not."""
        path = os.path.join(self.folder, window.path)
        wave16, wave24 = agrepa.read_audio(path, window.start, window.blocks)
        return wave16, agrepa.log_mel(wave24[None])[0]

    def read_ahead(self, batches):
        """-> each batch and its readings, which threads make while the teacher hears the one before."""
        coming = collections.deque()
        for batch in batches:
            coming.append((batch, [self.threads.submit(self.read, window) for window in batch]))
            if len(coming) > 2:
                yield coming.popleft()
        yield from coming

    def features(self, teacher, wave):
        bundle = hasattr(teacher.net, "extract_features")  # torchaudio's transformers
        with self.autocast() if bundle else contextlib.nullcontext():
            return teacher(wave)

    def hear(self, batch, readings):
        """-> of each window that can be used: itself, its mel [n x 15, M], the teacher's features
        [n x 8, dim] and those that units are made of [n x 8, d]; and why the others can't."""
        sounds, heard, skipped = [], [], []
        for window, reading in zip(batch, readings, strict=True):
            try:
                sounds.append((window, *reading.result()))
            except ValueError as error:
                skipped.append({"path": window.path, "reason": str(error)})
        if not sounds:
            return heard, skipped
        wave = torch.stack([wave for _, wave, _ in sounds]).to(self.device)
        features = unit_features = self.features(self.teacher, wave)
        if self.units_teacher is not self.teacher:
            unit_features = self.features(self.units_teacher, wave)
        for (window, _, mel), x, y in zip(sounds, features, unit_features, strict=True):
            if all(values.half().isfinite().all() for values in (mel, x, y)):
                heard.append((window, mel.to(self.device), x, y))
            else:
                skipped.append({"path": window.path, "reason": "gives features that aren't finite"})
        return heard, skipped


def k_means(x, k, rounds=12):
    """Lloyd's algorithm from k of the rows. x [n, d] -> [k, d]."""
    if len(x) < 2 * k:
        raise ValueError(f"--units {k}: of {len(x)} frames to train on, take at most {len(x) // 2}")
    pick = torch.Generator().manual_seed(0)
    x = x.half().float()
    centroids = x[torch.randperm(len(x), generator=pick)[:k].to(x.device)]
    for _ in range(rounds):
        unit = agrepa.nearest(x, centroids)
        count = torch.bincount(unit, minlength=k)[:, None]
        total = torch.zeros_like(centroids).index_add_(0, unit, x)
        # A unit without rows starts anew from one of them.
        spare = x[torch.randint(len(x), (k,), generator=pick).to(x.device)]
        centroids = torch.where(count > 0, total / count.clamp(min=1), spare)
    return centroids


def fit_units(batches, listener):
    """On FRAMES_A_UNIT frames a unit of the audio to train on, picked at random -> centroids
    [units, d], or [units, d + M] with two codebooks."""
    config, streams, frames = listener.config, [], 0
    training = [batch for batch in batches if not batch[0].held_out]
    order = np.random.default_rng(0).permutation(len(training))
    for batch, readings in listener.read_ahead(training[i] for i in order):
        if frames >= config.units * FRAMES_A_UNIT:
            break
        for _, mel, _, x in listener.hear(batch, readings)[0]:
            streams.append(agrepa.Tokenizer.streams(x[None], mel[None], config.codebooks))
            frames += len(x)
    if not streams:
        raise ValueError(f"--data {listener.folder}: nothing usable to make units of")
    books = [torch.cat(book, 1)[0] for book in zip(*streams, strict=True)]
    return torch.cat([k_means(x, config.units) for x in books], 1).cpu().numpy()


# ---- the prepared folder -------------------------------------------------------------------------


def write_rows(array, row, x):
    """x [n, ...] by plain writes: a full disk is an error then, where a memory map would die."""
    with open(array.filename, "r+b") as f:
        f.seek(array.offset + row * array[:1].nbytes)
        f.write(x.cpu().numpy().astype(array.dtype).tobytes())


def fill(part, windows, listener, state):
    """Writes units.npy and the rows of all batches. After the rows of a batch state.json counts it:
    a killed preparation goes on there."""
    config, batches = listener.config, batches_of(windows)
    if state["batches"] == 0:
        np.save(part / "units.npy", fit_units(batches, listener))
        n = sum(window.blocks for window in windows)
        open_memmap(part / "mel.npy", "w+", "<f2", (n, FRAMES, N_MELS))
        open_memmap(part / "teacher.npy", "w+", "<f2", (n, listener.teacher.dim))
        open_memmap(part / "tokens.npy", "w+", "<u2", (n, TEACHER_FRAMES * config.codebooks))
    rows = {}
    for name in ("mel", "teacher", "tokens"):
        try:
            rows[name] = np.load(part / f"{name}.npy", mmap_mode="r")
        except (ValueError, EOFError):
            raise ValueError(f"{part}/{name}.npy is damaged; delete {part}, start anew") from None
    tokenizer = agrepa.Tokenizer(np.load(part / "units.npy"), config.codebooks).to(listener.device)
    todo = progress(batches[state["batches"] :], "batches")
    for batch, readings in listener.read_ahead(todo):
        heard, skipped = listener.hear(batch, readings)
        for window, mel, features, unit_features in heard:
            pooled = features.unflatten(0, (-1, TEACHER_FRAMES)).mean(1)
            ids = tokenizer(unit_features[None], mel[None])
            write_rows(rows["mel"], window.row, mel.unflatten(0, (-1, FRAMES)))
            write_rows(rows["teacher"], window.row, pooled)
            write_rows(rows["tokens"], window.row, ids.view(window.blocks, -1))
        state["batches"] += 1
        state["skipped"] += skipped
        agrepa.write_text(part / "state.json", json.dumps(state))


def publish(part, windows, settings, skipped):
    """utterances.npy, of the windows that are really there, and meta.json."""
    mel, teacher = (np.load(part / f"{name}.npy", mmap_mode="r") for name in ("mel", "teacher"))
    there = [w for w in windows if mel[w.row].any()]  # what was skipped is zeros
    training = [w for w in there if not w.held_out]
    if not 0 < len(training) < len(there):
        reasons = "; ".join(f"{s['path']} {s['reason']}" for s in skipped[:3])
        raise ValueError(f"no usable audio is left to train on, or to hold out ({reasons})")
    np.save(part / "utterances.npy", np.array([(w.row, w.blocks) for w in there], "<i8"))
    total, squares, centre = 0.0, 0.0, np.zeros(teacher.shape[1])
    for window in training:
        rows = slice(window.row, window.row + window.blocks)
        x = mel[rows].astype(np.float64)
        total += x.sum()
        squares += np.square(x).sum()
        centre += teacher[rows].sum(0, dtype=np.float64)
    blocks = sum(w.blocks for w in training)
    count = blocks * FRAMES * N_MELS
    mean = total / count
    hours = sum(w.blocks for w in there) * BLOCK / 3600
    meta = {
        **{k: settings[k] for k in agrepa.PREPARATION},
        "format": agrepa.FORMAT,
        "name": os.fsencode(Path(settings["source"]).name).decode(errors="replace"),
        "dim": teacher.shape[1],
        "mel_mean": mean,
        "mel_std": max(squares / count - mean**2, 1e-12) ** 0.5,
        "teacher_mean": (centre / blocks).tolist(),
        "hours": hours,
        "utterances": len(there),
        "held_out": len(there) - len(training),
        "skipped": skipped,
        "settings": settings,
    }
    agrepa.write_text(part / "meta.json", json.dumps(meta, indent=1))
    kept = f"{len(there)} utterances, {hours:.2f} h, {meta['held_out']} held out"
    say(f"prepared {kept}; {len(skipped)} skipped, meta.json says why")


def settings_of(folder, config, files):
    """All that a prepared folder depends on: the audio and the settings."""
    codes = {spec: agrepa.code_of(spec) for spec in (config.teacher, config.units_teacher)}
    codes = {spec: code for spec, code in codes.items() if code}
    audio = {"source": str(folder.resolve()), "audio": agrepa.by_hash(files), "code": codes}
    settings = {k: getattr(config, k) for k in agrepa.PREPARATION}
    return {**audio, **settings, "units_teacher": config.units_teacher or config.teacher}


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def becoming(out):
    """`out`.partial to work in, for this process alone; it is renamed to `out` at the end."""
    part = Path(f"{out}.partial")
    part.mkdir(parents=True, exist_ok=True)
    held = agrepa.lock(part / ".lock")
    if out.exists():
        raise ValueError(f"{out} exists already; nothing is overwritten")
    yield part
    os.replace(part, out)
    (out / ".lock").unlink(missing_ok=True)
    del held


def prepare(folder, out, config, listed=None):
    """A folder of audio -> a prepared folder `out`, or ValueError. Until it is whole the work stands
    in `out`.partial, where the same call goes on. listed: list_audio(folder), if at hand."""
    folder, out = Path(folder), Path(out)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies inside the audio folder, where nothing is written")
    if out.exists():
        raise ValueError(f"{out} exists already; nothing is overwritten")
    files, unlisted = listed or list_audio(folder)
    usable, unusable = scan(folder, files)
    if not usable:
        first = "".join(f"; {s['path']} {s['reason']}" for s in unusable[:1])
        raise ValueError(f"--data {folder}: no usable audio ({', '.join(sorted(AUDIO))}){first}")
    windows, settings = plan(usable), settings_of(folder, config, files)
    with becoming(out) as part:
        state = {"settings": settings, "batches": 0, "skipped": [*unlisted, *unusable]}
        if {path.name for path in part.iterdir()} - {".lock", "state.json.part"}:
            state = read_json(part / "state.json")
        if state.get("settings") != settings:
            raise ValueError(f"{part} is of other audio or settings; delete it or change --out")
        agrepa.write_text(part / "state.json", json.dumps(state))
        say(f"preparing {folder}: {len(usable)} files, {len(unusable)} skipped; into {out}")
        fill(part, windows, Listener(folder, config), state)
        publish(part, windows, settings, state["skipped"])
    (out / "state.json").unlink()  # only now: a process killed before goes on with it
    return out


def prepared(folder, config):
    """The folder in config.cache that was prepared from this audio with these settings; prepares it
    where there is none."""
    listed = list_audio(folder)
    settings = settings_of(folder, config, listed[0])
    for i in itertools.count(1):
        out = Path(config.cache) / f"{folder.resolve().name}-{i}"
        if out.exists() and read_json(out / "meta.json").get("settings") == settings:
            try:
                BlockDataset(out)
                return out
            except ValueError as error:
                say(f"{error}: preparing again beside it")
        begun = read_json(Path(f"{out}.partial/state.json")).get("settings", settings)
        if not out.exists() and begun == settings:
            return prepare(folder, out, config, listed)


# ---- the toy corpus ------------------------------------------------------------------------------

# Formants in Hz of a, e, i, o, u: Peterson and Barney 1952.
VOWELS = (730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240)


def speak(rng, pitch, tract, seconds):
    """Speech-like sound of one voice: vowels, hisses and pauses. -> about [seconds x 24000]"""
    sounds, left = [], seconds
    while left > 0:
        t = np.arange(int(rng.uniform(0.06, 0.2) * RATE)) / RATE
        kind, noise = rng.random(), rng.standard_normal(len(t) + 1)
        if kind < 0.65:
            f = pitch * rng.uniform(0.85, 1.2) * np.arange(1, 40)[:, None]  # harmonics
            formants = tract * np.array(VOWELS[rng.integers(5)])
            gain = (1 / (1 + ((f - formants) / 100) ** 2)).sum(1, keepdims=True)
            sound = (gain * np.sin(2 * np.pi * f * t)).sum(0)
        else:
            sound = 0.2 * (kind < 0.9) * (np.diff(noise) if kind < 0.8 else noise[1:])
        sounds.append(sound * np.hanning(len(t)))
        left -= len(t) / RATE
    return np.concatenate(sounds)


def strike(rng, seconds):
    """One or several sound events: a bell, a sweep or a gust. -> [n] at 24 kHz."""
    out = np.zeros(int(seconds * RATE))
    for _ in range(rng.integers(1, 4)):
        a, kind = int(rng.uniform(0, 0.6) * len(out)), rng.integers(3)
        t = np.arange(len(out) - a) / RATE
        sound = rng.standard_normal(len(t))
        if kind == 0:
            f, modes = rng.uniform(200, 1200), (1, 2.76, 5.4, 8.9)  # a free bar's
            sound = sum(np.sin(2 * np.pi * f * m * t) * np.exp(-3 * m * t) / m for m in modes)
        elif kind == 1:
            sweep = np.geomspace(*rng.uniform(200, 5000, 2), len(t))
            sound = np.sin(2 * np.pi * np.cumsum(sweep) / RATE)
        out[a:] += sound * np.exp(-t * rng.uniform(2, 10)) * rng.uniform(0.3, 1)
    return out


def toy(folder):
    """Speech-like sounds and sound events, 13 minutes, the same each time, in two folders of it."""
    import soundfile

    folder = Path(folder)
    if (folder / "toy-speech").is_dir():
        return folder
    with becoming(folder) as part:
        for seed in range(8 * 14 + 120):
            rng, voice = np.random.default_rng(seed), seed // 14
            if voice < 8:
                path = part / "toy-speech" / f"voice{voice}" / f"{seed % 14}.wav"
                sound = speak(rng, 90 * 1.14**voice, 0.88 + 0.04 * voice, rng.uniform(2.5, 5))
            else:
                path = part / "toy-sounds" / f"{seed - 8 * 14}.wav"
                sound = strike(rng, rng.uniform(1, 5))
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, 0.7 * sound / np.abs(sound).max(), RATE)
    return folder


# ---- command line --------------------------------------------------------------------------------


def download(audio, name):
    """A part of LibriTTS into the folder `audio`, where it appears when it is all there."""
    from torchaudio.datasets import LIBRITTS

    if not (audio / name).exists():
        part = Path(f"{audio}-{name}.download")
        shutil.rmtree(part / "LibriTTS", ignore_errors=True)  # stopped while it was unpacked
        part.mkdir(parents=True, exist_ok=True)
        LIBRITTS(part, name, download=True)
        audio.mkdir(exist_ok=True)
        os.replace(part / "LibriTTS" / name, audio / name)
        shutil.rmtree(part)


def parse(arguments):
    text = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(description=text, argument_default=argparse.SUPPRESS)
    parser.add_argument("audio", nargs="?", help="folder of audio")
    parser.add_argument("--out", help="the prepared folder (default: one in --cache)")
    text = "first fetch this part of LibriTTS"
    parser.add_argument("--download", metavar="PART", choices=LIBRITTS_PARTS, help=text)
    parser.add_argument("--toy", metavar="DIR", help="synthesise the toy corpus into this folder")
    agrepa.add_flags(parser, SETTINGS)
    return vars(parser.parse_args(arguments))


def dispatch(given):
    if "toy" in given:
        print(toy(given["toy"]))
        return
    if "audio" not in given:
        raise ValueError("which folder? python data_prep.py FOLDER, or --toy DIR")
    audio = Path(given["audio"])
    config = Config(**{k: value for k, value in given.items() if k in SETTINGS})
    agrepa.check(config)
    if "download" in given:
        download(audio, given["download"])
    if not audio.is_dir():
        raise ValueError(f"--data {audio}: no such folder")
    print(prepare(audio, given["out"], config) if "out" in given else prepared(audio, config))


if __name__ == "__main__":
    agrepa.guarded(dispatch, parse(sys.argv[1:]))
