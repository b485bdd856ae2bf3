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
import datetime
import hashlib
import itertools
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import agrepa
from agrepa import BLOCK, FRAMES, N_MELS, RATE, TEACHER_FRAMES, WINDOW, BlockDataset, Config

AUDIO = set(".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .caf .w64 .rf64 .sph".split())
BATCH = 600  # blocks, 96 s of equal lengths to the teacher at once
FRAMES_A_UNIT = 40  # that k-means is fitted on
FOLDERS = 20  # at least so many folders above the files, to hold out whole ones


def say(text):
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A line on standard error now and then: how much of `total` is done, and how long it takes."""

    def __init__(self, total, unit):
        self.total, self.unit, self.done, self.began = total, unit, 0, time.time()
        self.said = self.began

    def add(self, amount):
        self.done, now = self.done + amount, time.time()
        if now - self.said > 5:
            self.said = now
            left = (self.total - self.done) * (now - self.began) / max(self.done, 1e-9)
            left = datetime.timedelta(seconds=int(left))
            say(f"  {self.done:,.2f} of {self.total:,.2f} {self.unit}, {left} left")


# ---- which audio ---------------------------------------------------------------------------------


def list_audio(folder):
    """-> [(path relative to folder, bytes, time of change)], sorted, and what can't be listed.
    Links are followed, once."""
    found, seen, skipped = [], set(), []
    say(f"looking through {folder}")

    def unreadable(error):
        skipped.append({"path": os.path.relpath(error.filename, folder), "reason": error.strerror})

    for base, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            path = os.path.join(base, name)
            if Path(name).suffix.lower() in AUDIO and not name.startswith("."):
                if os.path.isfile(path):
                    state = os.stat(path)
                    found.append((os.path.relpath(path, folder), state.st_size, state.st_mtime_ns))
                else:
                    skipped.append({"path": os.path.relpath(path, folder), "reason": "is no file"})
    return sorted(found), skipped


def scan(folder, files):
    """Reads the headers -> {path: blocks} of the usable files, and why the others aren't."""
    import soundfile

    usable, skipped, progress = {}, [], Progress(len(files) / 1000, "thousand headers read")
    for path, *_ in files:
        progress.add(0.001)
        try:
            info = soundfile.info(os.fsencode(os.path.join(folder, path)))
            blocks = int(info.frames / info.samplerate / BLOCK + 1e-6)
            if info.samplerate < 4000 or blocks > 2**24:
                reason = f"claims {info.frames} samples at {info.samplerate} Hz; 4 kHz at least"
            else:
                reason = "" if blocks else f"is shorter than a block of {BLOCK} s"
        except (RuntimeError, OSError, ZeroDivisionError) as error:  # soundfile's own is the first
            reason = f"can't be read ({error})"
        if reason:
            skipped.append({"path": path, "reason": reason})
        else:
            usable[path] = blocks
    return usable, skipped


def by_hash(text):
    return hashlib.md5(str(text).encode(errors="surrogateescape")).hexdigest()


def hold_out(usable):
    """Which files to hold out: dev-* and test-* folders where there are any; else, in the order of a
    hash, whole folders just above the files (a chapter, a speaker) where there are FOLDERS of them,
    or files; 2 % and 5 minutes at least, 10 % at most."""
    named = {p for p in usable if any(s.startswith(("dev-", "test-")) for s in Path(p).parts[:-1])}
    if named and len(named) < len(usable):
        return named
    groups = collections.defaultdict(list)
    for path in usable:
        groups[str(Path(path).parent)].append(path)
    if len(groups) < FOLDERS:
        groups = {path: [path] for path in usable}
    total, held, taken = sum(usable.values()), set(), 0
    for group in sorted(groups, key=by_hash):
        size = sum(usable[p] for p in groups[group])
        if taken < max(0.02 * total, 300 / BLOCK) and taken + size <= 0.1 * total:
            held |= set(groups[group])
            taken += size
    return held or ({min(usable, key=usable.get)} if len(usable) > 1 else set())


def plan(usable):
    """-> windows [(path, start, blocks)], those to train on first, and how many these are; batches
    of equal lengths, ranges of windows."""
    held, parts = hold_out(usable), ([], [])
    for path in sorted(usable, key=by_hash):
        for start in range(0, usable[path], WINDOW):
            parts[path in held].append((path, start, min(WINDOW, usable[path] - start)))
    if not held:  # one file: its last windows
        cut = len(parts[0]) - max(1, len(parts[0]) // 20)
        parts = parts[0][:cut], parts[0][cut:]
    if not parts[0] or not parts[1]:
        raise ValueError("one utterance is too little: some audio has to be held out")
    windows, batches = [w for part in parts for w in sorted(part, key=lambda w: w[2])], []
    start = 0
    for i in range(1, len(windows) + 1):
        full = (i - start) * windows[start][2] + windows[start][2] > BATCH
        if i in (len(parts[0]), len(windows)) or full or windows[i][2] != windows[start][2]:
            batches.append(range(start, i))
            start = i
    return windows, len(parts[0]), batches


# ---- preparing -----------------------------------------------------------------------------------


class Rows:
    """An .npy file of its final size. Written with plain writes: a full disk is an error then, where
    a memory map would die."""

    def __init__(self, path, dtype, shape):
        if not path.exists():
            part = Path(f"{path}.part")
            np.lib.format.open_memmap(part, "w+", dtype, shape).flush()
            part.replace(path)
        try:
            self.array = np.load(path, mmap_mode="r")
        except ValueError:
            self.array = np.empty(0)
        if (self.array.dtype, self.array.shape) != (np.dtype(dtype), shape):
            raise ValueError(f"{path} is damaged; delete {path.parent} and start anew")
        self.file = open(path, "r+b")

    def write(self, row, x):
        x = np.ascontiguousarray(x, self.array.dtype)
        self.file.seek(self.array.offset + row * self.array[:1].nbytes)
        self.file.write(x.tobytes())
        self.file.flush()


def k_means(x, k, rounds=12):
    """Lloyd's algorithm from k of the rows. x [n, d] -> [k, d]."""
    if len(x) < 2 * k:
        most = f"the training audio has {len(x)} frames at 50 Hz; take at most {len(x) // 2} units"
        raise ValueError(f"--units {k}: {most}")
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


class Listener:
    """Windows of audio to what is stored of them."""

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        *_, self.device, self.autocast = agrepa.launch(config)
        self.teacher = agrepa.Teacher(config.teacher, config.teacher_layer).to(self.device)
        self.units_teacher = self.teacher
        if config.units_teacher not in ("", config.teacher):
            other = agrepa.Teacher(config.units_teacher, config.teacher_layer)
            self.units_teacher = other.to(self.device)

    def read(self, window):
        """-> waveform at 16 kHz, mel [n x 15, M]; or the reason why not. Runs in a thread."""
        path, start, blocks = window
        try:
            wave16, wave24 = agrepa.read_audio(os.path.join(self.folder, path), start, blocks)
            mel = agrepa.log_mel(wave24[None])[0]
            return (wave16, mel) if mel.half().isfinite().all() else "gives a mel that isn't finite"
        except ValueError as error:
            return str(error)

    def features(self, teacher, wave):
        bundle = hasattr(teacher.net, "extract_features")  # torchaudio's transformers
        with self.autocast() if bundle else contextlib.nullcontext():
            try:
                return teacher(wave).float()
            except (RuntimeError, TypeError, LookupError) as error:
                raise ValueError(f"the teacher fails on {list(wave.shape)}: {error}") from None

    def hear(self, windows, loaded, skip):
        """-> of each usable window: its number, mel [n x 15, M], the teacher's features [n x 8, dim]
        and those that units are made of. skip(i, reason) is told of the others."""
        for i, x in zip(windows, loaded, strict=True):
            if isinstance(x, str):
                skip(i, x)
        good = [(i, *x) for i, x in zip(windows, loaded, strict=True) if not isinstance(x, str)]
        if not good:
            return
        wave = torch.stack([wave for _, wave, _ in good]).to(self.device)
        features = own = self.features(self.teacher, wave)
        if self.units_teacher is not self.teacher:
            own = self.features(self.units_teacher, wave)
        finite = (
            features.half().isfinite().all((1, 2)) & own.half().isfinite().all((1, 2))
        ).tolist()
        for (i, _, mel), x, y, ok in zip(good, features, own, finite, strict=True):
            if ok:
                yield i, mel.to(self.device), x, y
            else:
                skip(i, "gives teacher features that aren't finite")

    def fit(self, heard):
        """Units of a sample -> centroids [units, d], [units, d + M] with two codebooks."""
        books = self.config.codebooks
        streams = [agrepa.Tokenizer.streams(x[None], mel[None], books) for _, mel, _, x in heard]
        streams = [torch.cat([x[0] for x in stream]) for stream in zip(*streams, strict=True)]
        return torch.cat([k_means(x, self.config.units) for x in streams], 1).cpu().numpy()


def settings_of(folder, config, files):
    """All that a prepared folder depends on: the audio and the settings."""
    codes = {}
    for spec in (config.teacher, config.units_teacher):
        source = Path(spec.rsplit(":", 1)[0])
        if source.suffix == ".py" and source.is_file():
            codes[spec] = by_hash(source.read_bytes())
    return {
        "source": str(folder.resolve()),
        "audio": by_hash(files),
        "code": codes,
        "teacher": config.teacher,
        "teacher_layer": config.teacher_layer,
        "units_teacher": config.units_teacher or config.teacher,
        "codebooks": config.codebooks,
        "units": config.units,
    }


def prepare(folder, out, config, listed=None):
    """A folder of audio -> a prepared folder `out`. Until it is whole the work stands in
    `out`.partial, where the same call goes on. listed: list_audio(folder), if at hand. Raises
    ValueError."""
    folder, out = Path(folder), Path(out)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies inside the audio folder, where nothing is written")
    if out.exists():
        raise ValueError(f"{out} exists already; nothing is overwritten")
    files, unlisted = listed or list_audio(folder)
    settings, part = settings_of(folder, config, files), out.with_name(out.name + ".partial")
    usable, skipped = scan(folder, files)
    if not usable:
        first = "".join(f"; {s['path']} {s['reason']}" for s in skipped[:1])
        raise ValueError(f"--data {folder}: no usable audio ({', '.join(sorted(AUDIO))}){first}")
    windows, train, batches = plan(usable)
    part.mkdir(parents=True, exist_ok=True)
    held = agrepa.lock(part / ".lock")
    if out.exists():
        raise ValueError(f"{out} was just prepared by another process")
    begun = any(path.name != ".lock" for path in part.iterdir())
    if begun and read_json(part / "settings.json") != settings:
        raise ValueError(
            f"{part} belongs to other audio or settings; delete it, or take another --out"
        )
    agrepa.write_text(part / "settings.json", json.dumps(settings))
    hours = sum(w[2] for w in windows) * BLOCK / 3600
    say(
        f"preparing {folder}: {len(usable)} files, {hours:.2f} h, {len(skipped)} skipped; into {out}"
    )

    listener = Listener(folder, config)
    fill(part, windows, batches, train, listener)
    publish(part, windows, train, listener, [*unlisted, *skipped])
    os.replace(part, out)
    for name in ("settings.json", "done.npy", "skipped.txt", ".lock"):
        (out / name).unlink(missing_ok=True)
    del held
    return out


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def first_rows(windows):
    return np.cumsum([0, *(blocks for *_, blocks in windows)])


def read_ahead(listener, windows, batches, numbers):
    """-> each batch's number and its windows as Listener.read gives them, while the next two are
    read in threads: memory stays flat."""
    todo, waiting = iter(numbers), collections.deque()
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2))) as pool:
        while True:
            for b in itertools.islice(todo, 3 - len(waiting)):
                waiting.append((b, [pool.submit(listener.read, windows[i]) for i in batches[b]]))
            if not waiting:
                return
            b, reading = waiting.popleft()
            yield b, [x.result() for x in reading]


def fill(part, windows, batches, train, listener):
    """Writes the rows of every batch that has no flag yet; first the data, then the flag."""
    config, first = listener.config, first_rows(windows)
    shapes = {
        "mel": ("<f2", (FRAMES, N_MELS)),
        "teacher": ("<f2", (listener.teacher.dim,)),
        "tokens": ("<u2", (TEACHER_FRAMES * config.codebooks,)),
    }
    rows = {
        k: Rows(part / f"{k}.npy", dtype, (int(first[-1]), *s)) for k, (dtype, s) in shapes.items()
    }
    done = Rows(part / "done.npy", "|u1", (len(batches),))
    todo = np.flatnonzero(done.array[:] == 0).tolist()
    hours = [sum(windows[i][2] for i in batch) * BLOCK / 3600 for batch in batches]
    progress = Progress(sum(hours[b] for b in todo), "h")

    def skip(i, reason):
        with open(part / "skipped.txt", "a") as f:
            f.write(json.dumps({"path": windows[i][0], "reason": reason}) + "\n")

    def hear(numbers):
        for b, loaded in read_ahead(listener, windows, batches, numbers):
            yield b, list(listener.hear(batches[b], loaded, skip))
            progress.add(hours[b])

    def write(b, heard, tokenizer):
        for i, mel, features, own in heard:
            pooled = features.unflatten(0, (-1, TEACHER_FRAMES)).mean(1)
            ids = tokenizer(own[None], mel[None])[0].view(len(pooled), -1)
            rows["mel"].write(first[i], mel.half().cpu().numpy())
            rows["teacher"].write(first[i], pooled.half().cpu().numpy())
            rows["tokens"].write(first[i], ids.cpu().numpy())
        done.write(b, np.ones(1))

    sample = []
    if not (part / "units.npy").exists():
        lots = np.random.default_rng(0).permutation([b for b in todo if batches[b][0] < train])
        heard_hours = np.cumsum([hours[b] for b in lots]) - [hours[b] for b in lots]
        need = config.units * FRAMES_A_UNIT / TEACHER_FRAMES * BLOCK / 3600
        sample = list(
            hear([b for b, h in zip(lots.tolist(), heard_hours, strict=True) if h < need])
        )
        if not any(heard for _, heard in sample):
            raise ValueError(f"--data {listener.folder}: nothing usable to make units of")
        np.save(part / "units.part.npy", listener.fit([x for _, heard in sample for x in heard]))
        os.replace(part / "units.part.npy", part / "units.npy")
    tokenizer = agrepa.Tokenizer(np.load(part / "units.npy"), config.codebooks).to(listener.device)
    for b, heard in sample:
        write(b, heard, tokenizer)
    at_once = {b for b, _ in sample}
    del sample
    for b, heard in hear([b for b in todo if b not in at_once]):
        write(b, heard, tokenizer)


def publish(part, windows, train, listener, skipped):
    """The utterances that are really there, the statistics of those to train on, meta.json."""
    first = first_rows(windows)
    mel, teacher = (np.load(part / f"{name}.npy", mmap_mode="r") for name in ("mel", "teacher"))
    there = [i for i in range(len(windows)) if mel[first[i]].any()]  # what was skipped is zeros
    training = sum(i < train for i in there)
    with contextlib.suppress(FileNotFoundError):
        skipped = skipped + [json.loads(line) for line in (part / "skipped.txt").open()]
    if not 0 < training < len(there):
        reasons = "; ".join(f"{s['path']} {s['reason']}" for s in skipped[:3])
        raise ValueError(f"no usable audio is left to train on, or to hold out ({reasons})")
    keep = np.zeros(len(mel), bool)
    for i in there[:training]:
        keep[first[i] : first[i + 1]] = True
    count, total, squares, centre = 0, 0.0, 0.0, np.zeros(teacher.shape[1])
    for i in range(0, len(mel), 4096):
        x = mel[i : i + 4096][keep[i : i + 4096]].astype(np.float64)
        count, total, squares = count + x.size, total + x.sum(), squares + np.square(x).sum()
        centre += teacher[i : i + 4096][keep[i : i + 4096]].sum(0, dtype=np.float64)
    mean = total / count
    std, centre = math.sqrt(max(squares / count - mean**2, 1e-12)), centre / keep.sum()
    if not (math.isfinite(mean) and math.isfinite(std) and np.isfinite(centre).all()):
        raise ValueError(f"{part}: its statistics are not finite; delete it and start anew")
    utterances = np.array([(first[i], windows[i][2]) for i in there], "<i8")
    np.save(part / "utterances.npy", utterances)
    settings = read_json(part / "settings.json")
    meta = {
        **{k: settings[k] for k in agrepa.PREPARATION},
        "format": agrepa.FORMAT,
        "name": os.fsencode(listener.folder.resolve().name).decode(errors="replace"),
        "dim": teacher.shape[1],
        "mel_mean": mean,
        "mel_std": std,
        "teacher_mean": centre.tolist(),
        "hours": float(utterances[:, 1].sum() * BLOCK / 3600),
        "utterances": len(there),
        "held_out": len(there) - training,
        "skipped": skipped,
        "settings": settings,
    }
    agrepa.write_text(part / "meta.json", json.dumps(meta, indent=1))
    kept, lost = f"{len(there)} utterances, {meta['hours']:.2f} h", f"{len(skipped)} skipped"
    say(f"prepared {kept}, {meta['held_out']} held out, {lost}")
    for s in skipped[:5]:
        say(f"  skipped {s['path']}: {s['reason']}")


def prepared(folder, config, find=False):
    """The folder in config.cache that was prepared from this audio with these settings; prepares it
    where there is none, or with `find` raises ValueError."""
    listed = list_audio(folder)
    settings = settings_of(folder, config, listed[0])
    for i in itertools.count(1):
        out = Path(config.cache) / f"{folder.resolve().name}-{i}"
        if out.exists():
            if (read_json(out / "meta.json") or {}).get("settings") == settings:
                try:
                    BlockDataset(out)
                    return out
                except ValueError as error:
                    say(f"{error}: preparing again beside it")
            continue
        part = out.with_name(out.name + ".partial")
        if not part.exists() or read_json(part / "settings.json") in (settings, None):
            break
    if find:
        flags = " ".join(
            agrepa.named(k, getattr(config, k)) for k in (*agrepa.PREPARATION, "cache")
        )
        flags = flags.replace("--units-teacher  ", "")
        command = f"python data_prep.py {folder} {flags}"
        raise ValueError(f"--data {folder}: not prepared yet; before torchrun, once: {command}")
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
    """Eight voices and 120 recordings of sound events, 13 minutes, the same each time -> folder,
    which holds toy-speech and toy-sounds."""
    import soundfile

    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"--toy {folder}: is a file")
    if folder.exists():
        return folder
    part = folder.with_name(folder.name + ".partial")
    part.mkdir(parents=True, exist_ok=True)
    held = agrepa.lock(part / ".lock")
    names = [f"toy-speech/voice{v}/{i}" for v in range(8) for i in range(14)]
    for seed, name in enumerate([*names, *(f"toy-sounds/{i}" for i in range(120))]):
        rng, voice = np.random.default_rng(seed), seed // 14
        if seed < len(names):
            sound = speak(rng, 90 * 1.14**voice, 0.88 + 0.04 * voice, rng.uniform(2.5, 5))
        else:
            sound = strike(rng, rng.uniform(1, 5))
        path = part / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.7 * sound / np.abs(sound).max(), RATE)
    (part / ".lock").unlink(missing_ok=True)
    os.replace(part, folder)
    del held
    return folder


# ---- command line --------------------------------------------------------------------------------


def parse(arguments):
    text = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(description=text, argument_default=argparse.SUPPRESS)
    parser.add_argument("audio", nargs="?", help="folder of audio")
    parser.add_argument("--out", help="the prepared folder (default: one in --cache)")
    parser.add_argument("--download", metavar="PART", help="first fetch this part of LibriTTS")
    parser.add_argument("--toy", metavar="DIR", help="synthesise the toy corpus into this folder")
    agrepa.add_flags(parser, [*agrepa.PREPARATION, "device", "cache"])
    return vars(parser.parse_args(arguments))


def download(folder, name):
    if folder.name != "LibriTTS":
        raise ValueError(f"--download: the folder must be called LibriTTS, not {folder.name!r}")
    from torchaudio.datasets import LIBRITTS

    folder.parent.mkdir(parents=True, exist_ok=True)
    LIBRITTS(folder.parent, name, download=True)


def run(given):
    if "toy" in given:
        return print(toy(given["toy"]))
    if "audio" not in given:
        raise ValueError("which folder? python data_prep.py FOLDER, or --toy DIR")
    audio = Path(given["audio"])
    known = agrepa.PREPARATION + ["device", "cache"]
    config = Config(**{k: value for k, value in given.items() if k in known})
    agrepa.check(config)
    if "download" in given:
        download(audio, given["download"])
    if not audio.is_dir():
        raise ValueError(f"--data {audio}: no such folder")
    print(
        prepare(audio, given["out"], config)
        if "out" in given
        else prepared(audio, config, "find" in given)
    )


def main():
    agrepa.guarded(run, parse(sys.argv[1:]))


if __name__ == "__main__":
    main()
