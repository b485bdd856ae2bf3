"""Audio to prepared folders for agrepa.py: log-mel, teacher features, tokens, in chunks of 0.16 s.

    python data_prep.py ./LibriTTS                              # as agrepa.py --data would
    python data_prep.py ./mine --like prepared/LibriTTS-1       # in that folder's tokens, to sample
    python data_prep.py --toy ./toy-audio                       # the toy corpus: speech and sounds

The audio is only read: what libsndfile opens, of any rate from 4 kHz. Audio that can't be used is
skipped; meta.json lists it with the reason. The same command goes on where one was stopped.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import runpy
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio

import agrepa
from agrepa import CHUNK, MEL_FRAMES, N_MELS, PREPARATION, RATE, TEACHER_FRAMES, TEACHER_RATE

AUDIO = set(".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .caf .w64 .rf64 .sph".split())
CLOSED = set(".m4a .mp4 .aac .wma .amr .webm .mka .ac3 .ape .wv".split())  # need ffmpeg
PIECE = 160  # chunks, 25.6 s, heard at once: attention is quadratic, Whisper sees 30 s
BATCH = 600  # chunks, 96 s of equal lengths, heard together
GROUP = 25_000_000  # bytes of files that are read and heard together
ARRAYS = {"mel.bin": "<f2", "tokens.bin": "<u2", "teacher.bin": "<f2"}  # a row a chunk
LOG = "files.jsonl"  # the settings, then a line for each file whose rows are written


def digest(data):
    return hashlib.sha1(data if isinstance(data, bytes) else os.fsencode(data)).hexdigest()


def list_audio(folder):
    """-> {path in folder: (bytes, time of change)}, {path: why it is skipped}. Follows links."""

    def fail(error):
        raise error

    found, skipped, seen = {}, {}, set()
    for base, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(base) in seen:  # a link led here again
            folders[:], names = [], []
        seen.add(os.path.realpath(base))
        for path in (Path(base, name) for name in names if not name.startswith(".")):
            kind, relative = path.suffix.lower(), os.path.relpath(path, folder)
            if kind in CLOSED:
                skipped[relative] = "libsndfile can't open it; ffmpeg can"
            elif kind in AUDIO and path.is_file():
                found[relative] = path.stat().st_size, path.stat().st_mtime_ns
            elif kind in AUDIO:  # a pipe would wait for a writer
                skipped[relative] = "is no file"
    return dict(sorted(found.items())), skipped


def hold_out(sizes):
    """Which of {path: bytes} to hold out: dev-* and test-* folders; else, by a hash, 2 % and 20
    files at least, 10 % at most: as folders just above the files (chapters) where there are 20."""
    total, held, taken, groups = sum(sizes.values()) or 1, set(), 0, {}
    named = {p for p in sizes if any(s.startswith(("dev-", "test-")) for s in Path(p).parts[:-1])}
    if named and len(named) < len(sizes):
        share = sum(sizes[p] for p in named) / total
        print(f"held out for their folders' names, dev-* and test-*: {share:.0%} of the audio")
        if share > 0.5:
            raise ValueError("most of the audio is in dev-* and test-* folders: rename some")
        return named
    for path in sizes:
        groups.setdefault(str(Path(path).parent), []).append(path)
    groups = groups if len(groups) >= 20 else {path: [path] for path in sizes}
    for group in sorted(groups, key=digest):
        size = sum(sizes[p] for p in groups[group])
        if taken < max(0.02, 20 / len(sizes)) * total and taken + size <= 0.1 * total:
            held |= set(groups[group])
            taken += size
    return held or {sorted(sizes, key=sizes.get)[len(sizes) // 2]}


def read_audio(path):
    """A file, mono -> its hash, and pieces of at most PIECE chunks: waveforms at 16 kHz [n x 2560]
    and 24 kHz [n x 3840]; or why it can't be used, and none. OSErrors say nothing about it."""
    data, pieces, loudest, n = Path(path).read_bytes(), [], 0.0, PIECE
    file = io.BytesIO(data)
    try:
        with soundfile.SoundFile(file) as sound:
            # Read on, 25.6 s rounded up: headers only guess the length, some formats can't seek.
            sound.seekable = lambda: False
            rate = sound.samplerate
            if not 4000 <= rate <= 10**6:
                return f"is of {rate} Hz", []
            while n == PIECE:
                wave = sound.read(-(-PIECE * 4 * rate // 25), "float32", always_2d=True)
                n = int(len(wave) / rate / CHUNK + 1e-6)
                loudest = np.maximum(loudest, np.abs(wave).max(initial=0))  # NaN stays
                pieces += [resampled(wave, rate, n)] if n else []
    except RuntimeError as error:  # soundfile's own
        return f"can't be read ({error})", []
    if len(data) - file.tell() > max(len(data) // 10, 65_536):
        return "is longer than its header says: ffmpeg -i it to a .flac", []
    if not pieces or not 1e-5 < loudest < 100:  # NaN too
        return f"is too short, silent, or not sound: its loudest sample is {loudest:.3g}", []
    return digest(data), pieces


def resampled(wave, rate, n):
    """n chunks [samples, channels] -> mono at 16 kHz and at 24 kHz."""
    mean, loud, found = wave.mean(1), np.abs(wave).mean(0), []
    if np.abs(mean).mean() < 0.1 * loud.max():  # channels that cancel each other out
        mean = wave[:, loud.argmax()].copy()
    for new in (TEACHER_RATE, RATE):
        # Denominators up to 500, which usual rates have: 16,001 Hz would take a kernel of 1.5 GB.
        ratio, size = Fraction(rate, new).limit_denominator(500), round(n * CHUNK * new)
        sound = torchaudio.functional.resample(torch.from_numpy(mean), *ratio.as_integer_ratio())
        found.append(F.pad(sound, (0, max(0, size - len(sound))))[:size])
    return found


def mfcc(wave):
    """13 coefficients, their deltas and the deltas' deltas: HuBERT's own first target."""
    how, delta = dict(n_fft=400, hop_length=320, n_mels=26), torchaudio.functional.compute_deltas
    how = {"log_mels": True, "melkwargs": {**how, "center": False}}
    x = torchaudio.transforms.MFCC(TEACHER_RATE, 13, **how)(F.pad(wave.cpu(), (80, 0)))
    return torch.cat([x, delta(x), delta(delta(x))], 1).transpose(1, 2)  # centred, as Teacher's


def listener(name, config):
    """A teacher by its name, a bundle of torchaudio, MFCC or FILE.py:FUNCTION -> a function from
    waveform [B, n x 2560] at 16 kHz to features [B, n x 8, teacher_dim] on the CPU."""
    *_, device, autocast = agrepa.launch(config)

    @contextlib.contextmanager
    def named():
        try:
            yield
        except Exception as error:  # a file of the user's may raise anything
            where = f"checkpoints are in {torch.hub.get_dir()}; delete a damaged one"
            raise ValueError(f"--teacher {name}: {error!r}; {where}") from None

    with named():
        if ".py:" in name:
            path, function = name.rsplit(":", 1)
            sys.path.insert(0, str(Path(path).parent.resolve()))  # for what lies beside it
            net = runpy.run_path(path)[function]()  # no import: two may have one name
        else:
            net = mfcc if name == "MFCC" else agrepa.Teacher(name)
        net = net.to(device).eval() if isinstance(net, torch.nn.Module) else net

    @torch.no_grad()
    def answer(wave):
        low = autocast if isinstance(net, agrepa.Teacher) else contextlib.nullcontext
        with named(), low():
            x, due = net(wave.to(device)), wave.shape[1] // 320
            x = torch.as_tensor(getattr(x, "last_hidden_state", x))
            if x.is_complex() or x.dim() != 3 or x.shape[:2] != (len(wave), due):
                raise TypeError(f"{x.dtype} {list(x.shape)}, not reals [{len(wave)}, {due}, width]")
            return x.detach().float().cpu()

    return answer


def hear(folder, sizes, teachers, codebooks):
    """-> of each file its path, its hash or why it is skipped, and its pieces: mel [n x 15, M], the
    first teacher's features, and what each codebook's units are of (the second's: mel at 50 Hz)."""
    part, began, done = np.cumsum([*sizes.values()]) // GROUP, time.time(), 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 2)) as pool:
        for k in np.unique(part):
            group = [path for path, p in zip(sizes, part, strict=True) if p == k]
            readings = [*pool.map(read_audio, (Path(folder, path) for path in group))]
            pieces = [piece for _, some in readings for piece in some]
            lengths = np.array([len(low) for low, _ in pieces])
            for length in np.unique(lengths):  # equal ones, since padding would change the answer
                alike = np.flatnonzero(lengths == length)
                for some in np.array_split(alike, -(-len(alike) * length // (BATCH * 2560))):
                    low, high = (torch.stack([pieces[i][j] for i in some]) for j in (0, 1))
                    mel, answers = agrepa.log_mel(high), [teacher(low) for teacher in teachers]
                    at_50 = F.interpolate(mel.mT, answers[0].shape[1], mode="area").mT
                    streams = [answers[-1], at_50][:codebooks]
                    for i, *piece in zip(some, mel, answers[0], *streams, strict=True):
                        pieces[i] = piece
            pieces, done = iter(pieces), done + len(readings)
            for path, (result, some) in zip(group, readings, strict=True):
                yield path, result, [next(pieces) for _ in some]
            left = (len(sizes) - done) * (time.time() - began) / done / 60
            print(f"  {done:,} of {len(sizes):,} files, {left:.1f} min left", flush=True)


def fit_units(heard, k):
    """Lloyd's algorithm on 40 frames a unit -> the centroids of the codebooks [k, d of all]."""
    found, books, pick = [], [], torch.Generator().manual_seed(0)
    for *_, pieces in heard:
        found += [s for _, _, *s in pieces if all(x.isfinite().all() for x in s)]
        frames = sum(len(x) for x, *_ in found)
        if frames > 40 * k:
            break
    if not found or frames < 2 * k or k * len(found[0]) > 2**16:  # ids are stored as uint16
        raise ValueError(f"--units {k}: too many, or no usable audio to train on")
    for x in map(torch.cat, zip(*found, strict=True)):
        centroids = x[torch.randperm(len(x), generator=pick)[:k]]
        for _ in range(12):
            near = [torch.cdist(part, centroids).argmin(1) for part in x.split(16_384)]
            count = torch.bincount(unit := torch.cat(near), minlength=k)[:, None]
            total = torch.zeros_like(centroids).index_add_(0, unit, x)
            spare = x[torch.randint(len(x), (k,), generator=pick)]  # for units without rows
            centroids = torch.where(count > 0, total / count.clamp(min=1), spare)
        books.append(centroids)
    return torch.cat(books, 1).numpy()


# ---- the prepared folder -------------------------------------------------------------------------


def rows_of(books, mel, x, *streams):
    """A piece as it is stored."""
    n, pairs = len(x) // TEACHER_FRAMES, zip(streams, books, strict=True)
    ids = [torch.cdist(y, book).argmin(1) + i * len(book) for i, (y, book) in enumerate(pairs)]
    rows = mel, agrepa.interleave(*ids), x.unflatten(0, (n, -1)).mean(1)
    kinds = zip(rows, ARRAYS.values(), strict=True)
    return [row.reshape(n, -1).numpy().astype(kind) for row, kind in kinds]


def lines_of(part, settings, widths):
    """LOG's whole lines after the settings; cuts the arrays to the rows that they count."""
    log = part / LOG
    text = log.read_text() if log.exists() else ""
    log.write_text(text[: text.rfind("\n") + 1] or json.dumps(settings) + "\n")
    first, *lines = map(json.loads, log.read_text().splitlines())
    if first != settings:
        raise ValueError(f"{part} is of other audio or settings; delete it, or change --out")
    for name, width in zip(ARRAYS, widths, strict=True):
        with open(part / name, "ab") as file:
            file.truncate(2 * width * sum(line["chunks"] for line in lines))
    return lines


def fill(part, heard, books, lines):
    """Appends each file's rows to the arrays, then its line to LOG: if killed, it can go on."""
    known = {line["hash"]: line["path"] for line in lines if line["chunks"]}
    with contextlib.ExitStack() as opened:
        *files, log = [opened.enter_context(open(part / name, "ab", 0)) for name in (*ARRAYS, LOG)]
        for path, result, pieces in heard:
            rows = [*map(np.concatenate, zip(*(rows_of(books, *x) for x in pieces), strict=True))]
            if rows and known.setdefault(result, path) != path:
                result, rows = f"has the content of {known[result]}", []
            if not all(np.isfinite(x).all() for x in rows):
                result, rows = "gives features that aren't finite", []
            for x, file in zip(rows, files, strict=False):
                x.tofile(file)  # unlike file.write, raises where the disk is full
            line = {"path": path, "chunks": len(rows[0]) if rows else 0}
            lines.append(line | {"hash" if rows else "reason": result})
            log.write(json.dumps(lines[-1]).encode() + b"\n")


def publish(part, lines, held, meta):
    """utterances.npy, meta.json. Unless meta has them: statistics of at most 20,000 training rows,
    and what tokens tell: a held-out row's cosine with the sum of training rows of its tokens."""
    used = [line for line in lines if line["chunks"]]
    chunks = [line["chunks"] for line in used]
    _, folder = np.unique([str(Path(line["path"]).parent) for line in used], return_inverse=True)
    np.save(part / "utterances.npy", np.stack([np.cumsum([0, *chunks])[:-1], chunks, folder], 1))
    meta["held_out"] = sum(line["path"] in held for line in used)  # they stand last
    meta["hours"] = sum(chunks) * CHUNK / 3600
    why = meta["skipped"] | {line["path"]: line["reason"] for line in lines if not line["chunks"]}
    meta["skipped"] = [{"path": path, "reason": reason} for path, reason in why.items()]
    train = sum(chunks[: len(used) - meta["held_out"]])
    if not used or ("mel_mean" not in meta and not 0 < train < sum(chunks)):
        raise ValueError(f"nothing usable to train on, or to hold out: {meta['skipped'][:3]}")
    if "mel_mean" not in meta:
        files = [np.memmap(part / name, kind, "r") for name, kind in ARRAYS.items()]
        mel, tokens, teacher = (file.reshape(sum(chunks), -1) for file in files)
        some, rest = slice(0, train, 1 + train // 20_000), slice(train, train + 20_000)
        x, centre = mel[some].astype(np.float64), teacher[some].mean(0, dtype=np.float64)
        meta |= {"mel_mean": x.mean(), "mel_std": x.std(), "teacher_mean": centre.tolist()}
        sums = np.zeros((meta["units"] * meta["codebooks"], len(centre)))
        np.add.at(sums, tokens[some], (teacher[some] - centre)[:, None])
        guess, T_x = torch.tensor(sums[tokens[rest]].mean(1)), torch.tensor(teacher[rest] - centre)
        meta["tokens_tell"] = F.cosine_similarity(guess, T_x).mean().item()
    (part / "meta.json").write_text(json.dumps(meta, indent=1))
    print(f"{len(used)} files, {meta['held_out']} held out; {len(why)} skipped, meta.json says why")


@contextlib.contextmanager
def becoming(out):
    """`out`.partial to work in, for this process alone; it is renamed to `out` at the end."""
    part = Path(f"{out}.partial")
    part.mkdir(parents=True, exist_ok=True)
    with open(part / ".lock", "w") as lock:
        with contextlib.suppress(ImportError):  # Windows locks nothing
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{part} is in use by another process") from None
        yield part
        os.replace(part, out)


def prepare(folder, out, config, like=None):
    """A folder of audio -> `out`, prepared. like: the prepared folder whose tokens it takes."""
    files, skipped = list_audio(folder)
    names = [config.teacher, config.units_teacher or config.teacher]
    settings = {k: getattr(config, k) for k in PREPARATION} | {"units_teacher": names[1]}
    code = [Path(name.rsplit(":", 1)[0]).read_bytes() for name in names if ".py:" in name]
    settings["audio"] = digest(str([str(folder.resolve()), like, *code, *files.items()]))
    if out.exists():
        if json.loads(open(out / LOG).readline()) != settings:
            raise ValueError(f"{out} is of other audio or settings; prepare with another --out")
        return out
    sizes = {path: size for path, (size, _) in files.items()}
    if len(sizes) < 1 + (like is None):
        raise ValueError(f"{folder}: {len(sizes)} usable files, none to hold out; {skipped}")
    held = set(sizes) if like else hold_out(sizes)
    sizes = {path: sizes[path] for path in sorted(sizes, key=lambda path: (path in held, path))}
    with becoming(out) as part:
        teachers = [listener(name, config) for name in dict.fromkeys(names)]
        dim = teachers[0](torch.zeros(1, 2560)).shape[2]
        name = os.fsencode(folder.resolve().name).decode(errors="replace")
        meta = {**settings, "name": name, "teacher_dim": dim, "skipped": skipped}
        if like:
            old = json.loads(Path(like, "meta.json").read_text())
            meta |= {k: old[k] for k in ("mel_mean", "mel_std", "teacher_mean", "tokens_tell")}
            shutil.copy(Path(like, "units.npy"), part)
        elif not (part / "units.npy").exists():
            train = np.random.default_rng(0).permutation([p for p in sizes if p not in held])
            train = {path: sizes[path] for path in train.tolist()}
            heard = hear(folder, train, teachers, config.codebooks)
            np.save(part / "units.npy", fit_units(heard, config.units))
        units = torch.from_numpy(np.load(part / "units.npy"))
        meta["units_id"] = digest(units.numpy().tobytes())
        books = units.tensor_split([units.shape[1] - N_MELS][: config.codebooks - 1], 1)
        ids = TEACHER_FRAMES * config.codebooks  # a chunk
        lines = lines_of(part, settings, [MEL_FRAMES * N_MELS, ids, dim])
        rest = {path: sizes[path] for path in [*sizes][len(lines) :]}
        fill(part, hear(folder, rest, teachers, config.codebooks), books, lines)
        publish(part, lines, held, meta)
    return out


VOWELS = (730, 1090), (530, 1840), (270, 2290), (570, 840), (300, 870)  # Peterson, Barney


def toy(folder):
    """Syllables of eight voices, and bells and gusts: 13 minutes, the same each time."""
    for i in range(232):
        rng, voice, speech, sounds = np.random.default_rng(i), i // 14, i < 112, []
        for _ in range(rng.integers(20, 40) if speech else rng.integers(1, 4)):
            t = np.arange(int(rng.uniform(0.06, 0.2) * (1 if speech else 8) * RATE)) / RATE
            f = 90 * 1.14**voice * np.arange(1, 40) if speech else np.array([400, 1104, 2160])
            f = f[:, None] * rng.uniform(0.85, 1.2)  # harmonics of a voice, modes of a bell
            gain = [1 / (1 + ((f - formant) / 100) ** 2) for formant in VOWELS[rng.integers(5)]]
            tone = (sum(gain) * np.sin(2 * np.pi * f * t)).sum(0)
            sound = tone if rng.random() < 0.7 else 0.1 * rng.standard_normal(len(t))
            sounds.append(sound * (np.hanning(len(t)) if speech else np.exp(-4 * t)))
        file = folder / (f"toy-speech/{voice}/{i}.wav" if speech else f"toy-sounds/{i}.wav")
        file.parent.mkdir(parents=True, exist_ok=True)
        sound = np.concatenate(sounds)
        soundfile.write(file, 0.7 * sound / np.abs(sound).max(), RATE)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("audio", nargs="?", type=Path, help="folder of audio")
    parser.add_argument("--out", help="the prepared folder (default: one in prepared/)")
    parser.add_argument("--like", metavar="PREPARED", help="take its teacher, tokens and scales")
    parser.add_argument("--toy", metavar="DIR", type=Path, help="synthesise the toy corpus into it")
    fields = [f for f in dataclasses.fields(agrepa.Config) if f.name in (*PREPARATION, "device")]
    for f in fields:
        how = {"type": f.type, "default": f.default, **f.metadata}
        parser.add_argument("--" + f.name.replace("_", "-"), **how)
    given = parser.parse_args()
    if given.toy:
        return given.toy if (given.toy / "toy-sounds/231.wav").exists() else toy(given.toy)
    if not given.audio or not given.audio.is_dir():
        raise ValueError(f"{given.audio}: no such folder; python data_prep.py FOLDER, or --toy DIR")
    config = agrepa.Config(**{f.name: getattr(given, f.name) for f in fields})
    if given.like:
        meta = json.loads(Path(given.like, "meta.json").read_text())
        config = dataclasses.replace(config, **{k: meta[k] for k in PREPARATION})
    agrepa.check(config)
    out = Path(given.out or f"prepared/{given.audio.resolve().name}-1")
    return prepare(given.audio, out, config, given.like and os.path.abspath(given.like))


if __name__ == "__main__":
    stdout, sys.stdout = sys.stdout, sys.stderr  # what a teacher prints is not the folder's name
    stdout.buffer.write(os.fsencode(agrepa.guarded(main)) + b"\n")  # any path that there is
