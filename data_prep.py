"""Audio to prepared folders for agrepa.py: log-mel, teacher features and tokens, in
chunks of 0.16 s.

    python data_prep.py ./LibriTTS                        # as agrepa.py --data would
    python data_prep.py ./mine --like prepared/LibriTTS-1 # in its tokens, to sample
    python data_prep.py --toy ./toy-audio                 # the toy corpus

The audio is only read: what libsndfile opens, of any rate from 4 kHz. Audio that can't
be used is skipped; meta.json lists it with the reason. The same command goes on where
one was stopped. Shapes: B pieces, n chunks, M mel bins, D the teacher's width.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio

import agrepa
from agrepa import CHUNK, MEL_FRAMES, N_MELS, PREPARATION
from agrepa import RATE, TEACHER_FRAMES, TEACHER_RATE

AUDIO = """.wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .caf .w64 .rf64
.sph""".split()
CLOSED = ".m4a .mp4 .aac .wma .amr .webm .mka .ac3 .ape .wv".split()
# Chunks, 19.2 s, heard at once: attention is quadratic, and in a convolution of more
# than 2^16 frames, HuBERT's of 20.5 s, MPS raises before macOS 15.1.
PIECE = 120
BATCH = 600  # chunks, 96 s of equal lengths, heard together
GROUP = 48  # pieces, 15 minutes, read before they are heard: 150 MB as waveforms
ARRAYS = {"mel.bin": "<f2", "tokens.bin": "<u2", "teacher.bin": "<f2"}  # a row a chunk
LOG = "files.jsonl"  # the settings, then a line for each file whose rows are written


def digest(content):
    """Of bytes, or of a text or path: the same on every machine."""
    return hashlib.sha1(os.fsencode(content)).hexdigest()


def grouped(items, key):
    """-> {key(item): [items]}, in order."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


# ---- which files, and which of them are held out ----


def list_audio(folder):
    """-> {path in folder: bytes}, {path: why it is skipped}. Follows links, each
    once."""

    def fail(error):  # else os.walk would leave the folder out without a word
        raise error

    sizes = {}
    skipped = {}
    seen = set()
    for base, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:  # a link led here again
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            file = os.path.join(base, name)
            path = os.path.relpath(file, folder)
            kind = os.path.splitext(name)[1].lower()
            if name.startswith(".") or kind not in AUDIO + CLOSED:
                continue
            if kind in CLOSED:
                skipped[path] = "libsndfile can't open it; ffmpeg can"
            elif os.path.isfile(file):
                sizes[path] = os.path.getsize(file)
            else:  # a pipe would wait for a writer
                skipped[path] = "is no file"
    return dict(sorted(sizes.items())), skipped


def drop_copies(folder, sizes, skipped):
    """Of files of equal bytes, the one of the shortest path stays in sizes."""

    def content(path):
        return digest((folder / path).read_bytes())

    for of_one_size in grouped(sizes, sizes.get).values():
        if len(of_one_size) > 1:  # only these need be read
            for same in grouped(of_one_size, content).values():
                kept = min(same, key=len)
                same.remove(kept)
                for path in same:
                    skipped[path] = f"has the content of {kept}"
                    del sizes[path]


def stem(path):
    """The same for a.wav and a.flac, which are one recording."""
    return os.path.splitext(path)[0]


def hold_out(sizes):
    """Which of {path: bytes} to hold out: dev-* and test-* folders; else, by a hash,
    2 % or about 20 files, 10 % at most. They are whole folders (chapters) where there
    are 20 folders, else whole recordings."""
    total = sum(sizes.values())
    named = {p for p in sizes if re.search(r"(^|[/\\])(dev|test)-.*[/\\]", p)}
    if named and len(named) < len(sizes):
        share = sum(sizes[path] for path in named) / total
        print(f"held out as dev-* and test-* folders: {share:.0%} of the audio")
        if share > 0.5:
            raise ValueError("most audio is in dev-* and test-* folders: rename some")
        return named
    groups = grouped(sizes, os.path.dirname)
    if len(groups) < 20:
        groups = {paths[0]: paths for paths in grouped(sizes, stem).values()}

    def size(group):
        return sum(sizes[path] for path in groups[group])

    held = set()
    taken = 0
    share = max(0.02, 20 / len(sizes))
    for group in sorted(groups, key=digest):
        if taken < share * total and taken + size(group) <= 0.1 * total:
            held.update(groups[group])
            taken += size(group)
    # None where there are few and large ones: one of middle size.
    return held or set(groups[sorted(groups, key=size)[len(groups) // 2]])


def first_of(skipped):
    """Words for the end of an error."""
    for path, reason in skipped.items():
        return f"; {len(skipped)} skipped, first {path}: {reason}"
    return ""


def split(folder, sizes, skipped, like):
    """-> the paths to train on, and those to hold out: all of them if they are to be
    `like` another folder. Copies go to skipped."""
    drop_copies(folder, sizes, skipped)
    held = set(sizes) if like or not sizes else hold_out(sizes)
    train = [path for path in sizes if path not in held]
    if not held or not (train or like):
        raise ValueError(
            f"{folder}: {len(sizes)} usable files, none to hold out{first_of(skipped)}"
        )
    return train, [path for path in sizes if path in held]


# ---- from files to waveforms ----


class Checked(io.FileIO):
    """A file that keeps its errors: libsndfile takes a lost drive for the file's
    end."""

    error = None

    def readinto(self, buffer):
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.error = error
            return 0


def mono(wave):
    """[samples, channels] -> [samples]: the mean of the channels or, where they cancel
    each other out, the loudest."""
    mean = wave.mean(1)
    loudness = np.abs(wave).mean(0)
    if np.abs(mean).mean() < 0.1 * loudness.max():
        return wave[:, loudness.argmax()]
    return mean


def resampled(wave, rate, new):
    """[samples] at `rate` -> the same at `new`."""
    # Up to 640, as 11,025 Hz needs: 16,001 Hz would take a kernel of 1.5 GB.
    ratio = Fraction(rate, new).limit_denominator(640).as_integer_ratio()
    return torchaudio.functional.resample(wave, *ratio)


def fitted(sound, samples):
    """Zeros after it, or cut."""
    return F.pad(sound, (0, samples - len(sound)))


def decode(file):
    """An open file -> its pieces, of at most PIECE chunks: waveforms at 16 kHz [n x
    2560] and at 24 kHz [n x 3840]. Returns why it can't be used, perhaps after the
    last."""

    loudest = 0.0
    n = PIECE
    with soundfile.SoundFile(file) as sound:
        # Read on: headers guess lengths, and some formats can't seek.
        sound.seekable = lambda: False
        rate = sound.samplerate
        if not 4000 <= rate <= 10**6:
            return f"is of {rate} Hz"
        samples = math.ceil(PIECE * 4 * rate / 25)
        while n == PIECE:
            wave = sound.read(samples, "float32", always_2d=True)
            n = int(len(wave) / rate / CHUNK + 1e-6)
            if n:
                loudest = np.maximum(loudest, np.ptp(wave))
                if not loudest < 100:  # NaN, too
                    break
                wave = torch.from_numpy(mono(wave))
                low = resampled(wave, rate, TEACHER_RATE)
                high = resampled(wave, rate, RATE)
                yield fitted(low, n * 2560), fitted(high, n * 3840)
    size = os.path.getsize(file.name)
    if loudest < 100 and size - file.tell() > max(size // 10, 65_536):
        return "is longer than its header says: ffmpeg -i it to a .flac"
    if not 1e-5 < loudest < 100:
        return f"is too short, silent or no sound: its samples span {loudest:.3g}"


def pieces_of(folder, path, skipped):
    """decode, of a file; why it can't be used goes to skipped[path]."""
    with Checked(folder / path) as opened:
        try:
            reason = yield from decode(opened)
        except soundfile.SoundFileError as error:
            reason = f"can't be read ({error})"
        if opened.error:  # which says nothing about the file
            raise opened.error
    if reason:
        skipped[path] = reason


def expected(file):
    """Pieces of a file, GROUP at most and where it is unknown; its header may be
    wrong."""
    try:
        with Checked(file) as opened:
            return min(GROUP, soundfile.info(opened).duration / PIECE / CHUNK) or GROUP
    except soundfile.SoundFileError:
        return 0


def take(pieces, n=GROUP):
    return list(itertools.islice(pieces, n))


# ---- from waveforms to features ----


def mfcc(wave):
    """13 coefficients, their deltas and the deltas' deltas: HuBERT's own first target.
    [B, n x 2560] -> [B, n x 8, 39]"""
    delta = torchaudio.functional.compute_deltas
    spectrum = {"n_fft": 400, "hop_length": 320, "n_mels": 26, "center": False}
    transform = torchaudio.transforms.MFCC(
        TEACHER_RATE, 13, log_mels=True, melkwargs=spectrum
    )
    x = transform(F.pad(wave.cpu(), (80, 0)))  # centred, as Teacher's
    return torch.cat([x, delta(x), delta(delta(x))], 1).mT


def load_teacher(name):
    """MFCC, a bundle of torchaudio, or what FUNCTION() of a FILE.py returns."""
    if name == "MFCC":
        return mfcc
    if ".py:" not in name:
        return agrepa.Teacher(name)
    path, function = name.rsplit(":", 1)
    path = os.path.abspath(path)
    sys.path.insert(0, os.path.dirname(path))  # for what lies beside it
    module = types.ModuleType(digest(path))  # two files may have one name
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    return getattr(module, function)()


def attempt(name, work, *inputs):
    """A teacher's work. Raises ValueError for whatever that raises: it is anyone's
    code."""
    try:
        return work(*inputs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        words = (
            f"--teacher {name}: {type(error).__name__}: {error}; checkpoints are in "
            f"{torch.hub.get_dir()}; delete a damaged one"
        )
        raise ValueError(" ".join(words.split())) from None


def listener(name, config):
    """A teacher by its name: MFCC, a bundle of torchaudio, or FILE.py:FUNCTION -> a
    function from waveform [B, n x 2560] at 16 kHz to features [B, n x 8, D] on the
    CPU."""
    device, precision = agrepa.launch(config)
    teacher = attempt(name, load_teacher, name)
    if isinstance(teacher, torch.nn.Module):
        teacher = teacher.to(device).eval()
    if not isinstance(teacher, agrepa.Teacher):  # others choose it themselves
        precision = contextlib.nullcontext()

    def features(wave):
        with torch.no_grad(), precision:
            x = teacher(wave.to(device, copy=True))  # it may write into its input
        x = torch.as_tensor(getattr(x, "last_hidden_state", x))
        due = [len(wave), wave.shape[1] // 320]
        if x.is_complex() or x.dim() != 3 or list(x.shape[:2]) != due:
            raise TypeError(f"{x.dtype} {list(x.shape)}, not reals {due} and a width")
        return x.detach().float().cpu()

    return partial(attempt, name, features)


def listen(pieces, teachers):
    """Waveforms of pieces -> of each piece a list: mel [n x 15, M], features of the
    first teacher [n x 8, D], and what units are of: features of the last teacher [n x
    8, width] and mel at 50 Hz [n x 8, M]."""
    found = [None] * len(pieces)
    lengths = np.array([len(low) for low, _ in pieces])
    for length in np.unique(lengths):  # equal ones: padding would change the answer
        alike = np.flatnonzero(lengths == length)
        batches = math.ceil(len(alike) * length / (BATCH * 2560))
        for batch in np.array_split(alike, batches):
            low = torch.stack([pieces[i][0] for i in batch])
            high = torch.stack([pieces[i][1] for i in batch])
            mel = agrepa.log_mel(high)
            features = [teacher(low) for teacher in teachers]
            at_50 = F.interpolate(mel.mT, length // 320, mode="area").mT
            for row, i in enumerate(batch):
                found[i] = [x[row] for x in (mel, features[0], features[-1], at_50)]
    return found


def hear(paths, folder, skipped, teachers):
    """Reads and hears files -> of each its path and an iterator of heard pieces. After
    the last, skipped has the path if the file proved to be unusable."""

    def following(heard, reader):
        while heard:
            yield from heard
            heard = listen(take(reader), teachers)

    with ThreadPoolExecutor() as pool:
        ends = np.cumsum([*pool.map(expected, [folder / path for path in paths])])
        part = dict(zip(paths, ends // GROUP, strict=True))
        for group in grouped(paths, part.get).values():
            readers = [pieces_of(folder, path, skipped) for path in group]
            taken = list(pool.map(take, readers))
            heard = iter(listen(sum(taken, []), teachers))
            for path, reader, pieces in zip(group, readers, taken, strict=True):
                yield path, following(take(heard, len(pieces)), reader)
            print(f"  {paths.index(path) + 1:,} of {len(paths):,} files")


# ---- units ----


def k_means(x, k, generator):
    """Lloyd's algorithm on rows x [N, width] -> centroids [k, width]."""
    centroids = x[torch.randperm(len(x), generator=generator)[:k]]
    for _ in range(12):
        unit = torch.cat(
            [torch.cdist(part, centroids).argmin(1) for part in x.split(16_384)]
        )
        count = torch.bincount(unit, minlength=k)[:, None]
        total = torch.zeros_like(centroids).index_add_(0, unit, x)
        # A unit without rows starts again at a row of another.
        spare = x[torch.randint(len(x), (k,), generator=generator)]
        centroids = torch.where(count > 0, total / count, spare)
    return centroids


def fit_units(paths, folder, skipped, teachers, config):
    """k-means on 40 frames a unit: of one piece of each of many files, in this order;
    round again, the next piece of each, if the files run out. One long recording would
    else fill the units. -> the codebooks' centroids side by side [k, widths], of how
    many files."""
    waiting = [(path, pieces_of(folder, path, skipped)) for path in paths]
    heard = []
    used = set()
    frames = 0
    while waiting and frames < 40 * config.units:
        waves = []
        for _ in range(min(32, len(waiting))):  # many, even if few frames are wanted
            path, reader = waiting.pop(0)
            for wave in take(reader, 1):
                waves.append(wave)
                used.add(path)
                if len(wave[0]) == PIECE * 2560:  # a shorter one is the last
                    waiting.append((path, reader))
        for piece in listen(waves, teachers):
            if all(x.isfinite().all() for x in piece):
                heard.append(piece)
                frames += len(piece[1])
    # Ids are stored as uint16.
    if frames < 2 * config.units or config.units * config.codebooks > 2**16:
        raise ValueError(
            f"--units {config.units}: too many for {frames:,} frames of usable, finite sound"
            f"{first_of(skipped)}"
        )
    generator = torch.Generator().manual_seed(0)
    books = []
    for stream in range(config.codebooks):
        x = torch.cat([piece[2 + stream] for piece in heard])
        books.append(k_means(x, config.units, generator))
    return torch.cat(books, 1).numpy(), len(used)


# ---- the prepared folder ----


def rows_of(books, mel, features, *streams):
    """A heard piece as it is stored: ARRAYS' rows, one a chunk."""
    n = len(features) // TEACHER_FRAMES
    ids = []
    for i, book in enumerate(books):
        ids.append(torch.cdist(streams[i], book).argmin(1) + i * len(book))
    means = features.unflatten(0, (n, -1)).mean(1)
    rows = zip((mel, agrepa.interleave(*ids), means), ARRAYS.values(), strict=True)
    return [x.reshape(n, -1).numpy().astype(kind) for x, kind in rows]


def mixed(part):
    return ValueError(
        f"{part}: two processes wrote into it, or a disk was full: delete it"
    )


def go_on(part, settings, paths, widths):
    """-> the lines of LOG after the settings, of an earlier run that was stopped; cuts
    the arrays to the rows that they count. Raises ValueError for other settings or
    files."""
    log = part / LOG
    head = json.dumps(settings) + "\n"
    text = log.read_text() if log.exists() else ""
    text = text[: text.rfind("\n") + 1] or head  # a kill leaves half a line
    first, *lines = [json.loads(line) for line in text.splitlines()]
    if lines and first != settings:  # without lines there's nothing to lose
        raise ValueError(
            f"{part} is of other audio or settings; delete it, or change --out"
        )
    if [line["path"] for line in lines] != paths[: len(lines)]:
        raise mixed(part)
    log.write_text(text if lines else head)
    for name, width in zip(ARRAYS, widths, strict=True):
        size = 2 * width * sum(line["chunks"] for line in lines)
        with open(part / name, "ab") as file:
            if file.tell() < size:
                raise mixed(part)
            file.truncate(size)
    return lines


def fill(part, heard, books, skipped):
    """Appends each file's rows to the arrays, then its line to LOG: if killed, it can
    go on. Raises ValueError where the files have grown by what it didn't write."""

    def check():
        if [file.seek(0, 2) for file in files] != ends:  # where each of them ends
            raise mixed(part)

    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open(part / name, "ab", 0)) for name in (*ARRAYS, LOG)
        ]
        ends = [file.tell() for file in files]
        for path, pieces in heard:
            check()
            starts = list(ends)
            chunks = 0
            for piece in pieces:
                rows = rows_of(books, *piece)
                chunks += len(rows[0])
                for i, x in enumerate(rows):
                    x.tofile(files[i])  # unlike write, raises where the disk is full
                    ends[i] += x.nbytes
                    if not np.isfinite(x).all():
                        skipped[path] = "gives features that aren't finite"
            if path in skipped:
                chunks = 0
                ends = starts
                for i, file in enumerate(files):
                    file.truncate(ends[i])
            line = {"path": path, "chunks": chunks, "reason": skipped.get(path)}
            text = json.dumps(line).encode() + b"\n"
            check()  # before the line that counts them: a full disk loses rows unsaid
            files[3].write(text)
            ends[3] += len(text)
        check()


def statistics(part, total, train, ids):
    """Of at most 20,000 of the first `train` of all rows: scales, and what tokens tell:
    a held-out row's cosine with the sum of the training rows of its tokens."""
    mel, tokens, teacher = [
        np.memmap(part / name, kind, "r").reshape(total, -1)
        for name, kind in ARRAYS.items()
    ]
    some = slice(0, train, 1 + train // 20_000)
    rest = slice(train, train + 20_000)
    x = mel[some].astype(np.float64)
    centre = teacher[some].mean(0, dtype=np.float64)
    sums = np.zeros((ids, len(centre)))
    np.add.at(sums, tokens[some], (teacher[some] - centre)[:, None])
    guess = torch.tensor(sums[tokens[rest]].mean(1))
    T_x = torch.tensor(teacher[rest] - centre)
    return {
        "mel_mean": x.mean(),
        "mel_std": x.std(),
        "teacher_mean": centre.tolist(),
        "tokens_tell": F.cosine_similarity(guess, T_x).mean().item(),
    }


def publish(part, lines, training, meta, like):
    """utterances.npy and meta.json, with statistics unless it has those of `like`.
    training: how many of the lines are of files to train on; they stand first."""
    chunks = np.array([line["chunks"] for line in lines])
    total = chunks.sum()
    train = chunks[:training].sum()
    skipped = meta["skipped"]
    for line in lines:
        if not line["chunks"]:
            skipped[line["path"]] = line["reason"]
    if train == total or not (train or like):
        raise ValueError(
            f"nothing usable to train on, or to hold out{first_of(skipped)}"
        )
    _, place = np.unique(
        [os.path.dirname(line["path"]) for line in lines], return_inverse=True
    )
    rows = np.stack([chunks.cumsum() - chunks, chunks, place], 1)
    np.save(part / "utterances.npy", rows[chunks > 0])
    meta["held_out"] = int((chunks[training:] > 0).sum())
    meta["hours"] = total * CHUNK / 3600
    meta["skipped"] = [{"path": path, "reason": skipped[path]} for path in skipped]
    if not like:
        meta.update(statistics(part, total, train, meta["units"] * meta["codebooks"]))
    (part / "meta.json").write_text(json.dumps(meta, indent=1))
    print(f"{len(lines)} files, {meta['held_out']} held out; {len(skipped)} skipped")


def lock(file):
    """For this process alone. Where the file system has no locks, goes on without."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{file.name} is in use by another process") from None
    except (ImportError, OSError) as error:
        print(f"no locks here ({error}): prepare this folder once at a time")


def identity(sizes, config, like):
    """What a prepared folder depends on: settings, the user's code, and the audio by
    paths in its folder and sizes, which stay as they are when it is touched, copied or
    mounted anew."""
    audio = json.dumps(sizes)
    for name in (config.teacher, config.units_teacher):
        if ".py:" in name:
            audio += digest(Path(name.rsplit(":", 1)[0]).read_bytes())
    if like:
        audio += digest((like / "units.npy").read_bytes())
    settings = {name: getattr(config, name) for name in PREPARATION}
    settings["audio"] = digest(audio)
    return settings


def prepare(folder, out, config, like=None, name=None):
    """A folder of audio -> `out`, prepared. like: the prepared folder whose tokens it
    takes. name: the domain's, else the folder's."""
    sizes, skipped = list_audio(folder)
    settings = identity(sizes, config, like)
    if out.exists():
        with open(out / LOG) as file:
            if json.loads(file.readline()) != settings:
                raise ValueError(
                    f"{out} is of other audio or settings: delete it, or give "
                    "data_prep.py another --out"
                )
        print(f"{out} was made before, of audio of the same names and sizes")
        return out
    train, held = split(folder, sizes, skipped, like)
    paths = train + held
    # Bytes of a name that are no UTF-8 can't be written.
    name = os.fsencode(name or folder.resolve().name).decode(errors="replace")
    names = dict.fromkeys([config.teacher, config.units_teacher])  # may be one
    teachers = [listener(teacher, config) for teacher in names]
    dim = teachers[0](torch.zeros(1, 2560)).shape[2]
    widths = [MEL_FRAMES * N_MELS, TEACHER_FRAMES * config.codebooks, dim]
    part = Path(f"{out}.partial")
    part.mkdir(parents=True, exist_ok=True)
    with open(part / ".lock", "w") as file:
        lock(file)
        lines = go_on(part, settings, paths, widths)
        if like:
            shutil.copy(like / "units.npy", part)
            shutil.copy(like / "meta.json", part)
        elif not lines:
            drawn = sorted(train, key=digest)  # as good as random
            units, count = fit_units(drawn, folder, skipped, teachers, config)
            known = {
                "units_recordings": count,
                # By name, too: a run has a table of embeddings for each domain.
                "units_id": digest(f"{name!a} {units.tolist()}"),
            }
            (part / "meta.json").write_text(json.dumps(known))
            np.save(part / "units.npy", units)
        units = torch.from_numpy(np.load(part / "units.npy"))
        books = [units]
        if config.codebooks == 2:
            books = units.tensor_split([-N_MELS], 1)
        heard = hear(paths[len(lines) :], folder, skipped, teachers)
        fill(part, heard, books, skipped)
        meta = {**json.loads((part / "meta.json").read_text()), **settings}
        meta.update(
            name=name, teachers_in=os.getcwd(), teacher_dim=dim, skipped=skipped
        )
        publish(part, go_on(part, settings, paths, widths), len(train), meta, like)
    os.replace(part, out)  # Windows renames no folder with an open file in it
    return out


# First and second formants of five vowels, in Hz (Peterson and Barney)
VOWELS = (730, 1090), (530, 1840), (270, 2290), (570, 840), (300, 870)


def toy(folder):
    """Syllables of eight voices, and bells and gusts: 12 minutes, the same each
    time."""
    if (folder / "toy-sounds" / "231.wav").exists():
        return
    for i in range(232):
        rng = np.random.default_rng(i)
        speech = i < 112
        sounds = []
        for _ in range(rng.integers(20, 40) if speech else rng.integers(1, 4)):
            seconds = rng.uniform(0.06, 0.2) * (1 if speech else 8)
            t = np.arange(int(seconds * RATE)) / RATE
            f = np.array([400, 1104, 2160])  # modes of a bell
            if speech:
                f = 90 * 1.14 ** (i // 14) * np.arange(1, 40)  # harmonics of a voice
            f = f[:, None] * rng.uniform(0.85, 1.2)
            formants = VOWELS[rng.integers(5)]
            gain = [1 / (1 + ((f - formant) / 100) ** 2) for formant in formants]
            sound = (sum(gain) * np.sin(2 * np.pi * f * t)).sum(0)
            if rng.random() >= 0.7:
                sound = 0.1 * rng.standard_normal(len(t))
            sounds.append(sound * (np.hanning(len(t)) if speech else np.exp(-4 * t)))
        place = folder / (f"toy-speech/{i // 14}" if speech else "toy-sounds")
        place.mkdir(parents=True, exist_ok=True)
        sound = np.concatenate(sounds)
        soundfile.write(place / f"{i}.wav", 0.7 * sound / np.abs(sound).max(), RATE)


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="folder of audio")
    add("--out", help="the prepared folder (default: prepared/NAME-1)")
    add("--name", help="of the domain (default: the folder's)")
    add("--like", type=Path, help="prepared folder: take its teachers, tokens, scales")
    add("--toy", type=Path, help="folder to make the toy corpus in")
    agrepa.add_flags(parser, (*PREPARATION, "device"))
    # Flags that aren't given leave a Config as it is.
    config = parser.parse_args(namespace=agrepa.Config())
    if config.toy:
        toy(config.toy)
        return config.toy
    folder = config.folder
    if not folder or not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one, or --toy DIR")
    if config.codebooks > 2:
        raise ValueError("--codebooks: 1 or 2")
    if config.like:
        meta = agrepa.PreparedFolder(config.like, 1).meta
        for key in PREPARATION:
            value = meta[key]
            if ".py:" in str(value):  # as it is found from elsewhere
                value = os.path.join(meta["teachers_in"], value)
            setattr(config, key, value)
    agrepa.check(config)
    out = Path(config.out or f"prepared/{config.name or folder.resolve().name}-1")
    return prepare(folder, out, config, config.like, config.name)


if __name__ == "__main__":
    # What a teacher prints, even in C, is not the folder's name.
    answer = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    os.write(answer, os.fsencode(agrepa.guarded(main)) + b"\n")
