"""Files in and out for agrepa.py: audio to prepared folders (log-mel, teacher features and k-means units in blocks of
0.16 s), the toy corpus, the command line's settings, and a run's sounds and pictures.

    python data_prep.py ./LibriTTS                              # prepares into ./prepared, as agrepa.py --data would
    python data_prep.py ./LibriTTS --download train-clean-100   # fetches that part first (torchaudio.datasets)
    python data_prep.py --toy ./toy-audio                       # synthesises the toy corpus: speech and sound events

The audio is only read. WAV, FLAC, OGG, MP3 and whatever else libsndfile opens, of any rate and channel count, from
one block up; what can't be used is skipped, and listed with the reason in meta.json.
"""

import argparse, collections, contextlib, csv, dataclasses, datetime, functools, hashlib, itertools, json, math, os, shutil, sys, time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import agrepa
from agrepa import (
    BLOCK,
    FORMAT,
    FRAMES,
    HOP,
    N_MELS,
    RATE,
    TEACHER_FRAMES,
    TEACHER_RATE,
    BlockDataset,
    Condition,
    Config,
    Teacher,
    interleave,
)

AUDIO = set(".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .caf .w64 .rf64 .sph".split())
WINDOW = 160  # blocks, 25.6 s: longer files are cut (attention is quadratic, Whisper sees 30 s)
BATCH = 600  # blocks, 96 s of equal lengths to the teacher at once
SAMPLE, WINDOWS = (
    40,
    64,
)  # what k-means and place_means are fitted on: frames a unit, and windows at least
SAVE_SECONDS, SAY_SECONDS = 30, 5  # between notes of progress on disk, and lines of it

# ---- sound in and out ------------------------------------------------------------------------------------------------


def resample(wave, rate, new):
    """wave [..., n] -> [..., about n x new / rate]. The ratio is rounded to a denominator of at most 500: at most 0.1 ms in a
    window of 25.6 s, and 16,001 Hz costs no more than 16,000 (its exact kernel would take 1.5 GB)."""
    from torchaudio.functional import resample

    ratio = Fraction(new, rate).limit_denominator(500)
    return wave if ratio == 1 else resample(wave, ratio.denominator, ratio.numerator)


def read(path, start=0, blocks=None):
    """Blocks of a file, mono: waveform at 16 kHz [n x 2560], at 24 kHz [n x 3840], and the file's rate. Raises ValueError with the reason."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as f:
            rate, blocks = f.samplerate, blocks or int(f.frames / f.samplerate / BLOCK + 1e-6)
            if blocks < 1:
                raise ValueError(f"is shorter than a block of {BLOCK} s")
            a, b = round(start * BLOCK * rate), round((start + blocks) * BLOCK * rate)
            f.seek(a)
            wave = f.read(b - a, dtype="float32", always_2d=True).mean(1)
    except (RuntimeError, OSError) as error:  # soundfile's own is a RuntimeError
        raise ValueError(f"can't be read ({error})") from None
    if len(wave) < b - a - BLOCK * rate:
        raise ValueError(
            f"ends at {(a + len(wave)) / rate:.2f} s, its header says {f.frames / rate:.2f} s"
        )
    if not np.isfinite(wave).all():
        raise ValueError("has samples that are NaN or infinite")
    if np.abs(wave).max(initial=0) < 1e-5:
        raise ValueError(
            f"is silent from {start * BLOCK:.2f} s to {(start + blocks) * BLOCK:.2f} s"
        )
    wave = torch.from_numpy(wave)
    fit = lambda x, n: F.pad(x, (0, max(0, n - len(x))))[:n]
    return (
        fit(resample(wave, rate, TEACHER_RATE), round(blocks * BLOCK * TEACHER_RATE)),
        fit(resample(wave, rate, RATE), round(blocks * BLOCK * RATE)),
        rate,
    )


def list_audio(folder):
    """[(path relative to folder, bytes)], sorted; links are followed, once."""
    found, seen = [], set()
    for base, dirs, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(base)) in seen:
            dirs.clear()
            continue
        seen.add(real)
        found += [
            os.path.join(base, f)
            for f in files
            if Path(f).suffix.lower() in AUDIO and not f.startswith(".")
        ]
    return sorted(
        (os.path.relpath(f, folder), os.path.getsize(f)) for f in found if os.path.exists(f)
    )


def scan(folder, files):
    """Header of each file -> {path: blocks} of the usable, [{path, reason}] of the others."""
    import soundfile

    usable, skipped = {}, []
    for path, _ in files:
        try:
            info = soundfile.info(os.path.join(folder, path))
            reason = (
                ""
                if 0 < info.frames < 2**40 and info.duration >= BLOCK
                else f"shorter than a block of {BLOCK} s"
            )
        except (RuntimeError, OSError) as error:
            reason = f"can't be read ({error})"
        if reason:
            skipped.append(dict(path=path, reason=reason))
        else:
            usable[path] = int(info.duration / BLOCK + 1e-6)
    return usable, skipped


def by_hash(path):
    return hashlib.md5(str(path).encode()).hexdigest()


def hold_out(usable):
    """Which files to hold out: dev-* and test-* folders where there are any; else by a hash of the path, evenly in each
    top folder, 2 % and 5 minutes at least, 10 % at most."""
    named = {
        p for p in usable if any(part.startswith(("dev-", "test-")) for part in Path(p).parts[:-1])
    }
    if named and len(named) < len(usable):
        return named
    total, folders, place = sum(usable.values()), collections.defaultdict(list), {}
    for p in sorted(usable, key=by_hash):
        folders[Path(p).parts[0] if len(Path(p).parts) > 1 else ""].append(p)
    for files in folders.values():
        size, before = sum(usable[p] for p in files), 0
        for p in files:
            place[p] = (before / size, by_hash(p))
            before += usable[p]
    want, most, held, taken = max(0.02 * total, 300 / BLOCK), 0.1 * total, set(), 0
    for p in sorted(place, key=place.get):
        if taken < want and taken + usable[p] <= most:
            held.add(p)
            taken += usable[p]
    return held or ({min(usable, key=usable.get)} if len(usable) > 1 else set())


def write_wave(path, wave):
    import soundfile

    soundfile.write(
        f"{path}.part", (wave / wave.abs().max().clamp(min=1)).cpu().numpy(), RATE, format="WAV"
    )
    os.replace(f"{path}.part", path)


def log_mel(wave):
    """Waveform [B, n x 256] at 24 kHz -> [B, n, 100]: n_fft 1024, hop 256, magnitude, natural log (the Vocos format)."""
    import torchaudio

    mel = torchaudio.transforms.MelSpectrogram(
        RATE, 1024, hop_length=HOP, n_mels=N_MELS, power=1
    ).to(wave.device)
    return mel(wave)[..., :-1].clamp(min=1e-5).log().transpose(1, 2)


# ---- units -----------------------------------------------------------------------------------------------------------


def assign(x, centroids):
    """The nearest centroid of each row: x [..., d], centroids [units, d] -> [...]."""
    square = centroids.square().sum(1)
    return torch.cat(
        [(square - 2 * part @ centroids.T).argmin(1) for part in x.flatten(0, -2).split(16384)]
    ).view(x.shape[:-1])


def slow(mel, n):
    """mel [B, T, M] at the rate of n tokens: [B, n, M]."""
    return F.interpolate(mel.transpose(1, 2), n, mode="area").transpose(1, 2)


def tokenise(features, mel, centroids, codebooks):
    """Ids of features [B, n x 8, d] and, after these units in number, of the mel [B, n x 15, M] at their rate if codebooks
    is 2 -> [B, n x 8 x codebooks]."""
    heard = [features, slow(mel, features.shape[1])][:codebooks]
    centroids = centroids.split([x.shape[2] for x in heard], 1)
    return interleave(
        *(
            assign(x.half().float(), c) + i * len(c)
            for i, (x, c) in enumerate(zip(heard, centroids))
        )
    )


def k_means(x, k, rounds=12):
    """Lloyd's algorithm from k of the rows. x [n, d] -> [k, d]."""
    if len(x) < 2 * k:
        raise ValueError(
            f"--units {k}: the training audio has {len(x)} frames at 50 Hz; take at most {len(x) // 2} units"
        )
    pick = torch.Generator().manual_seed(0)
    centroids = x[torch.randperm(len(x), generator=pick)[:k].to(x.device)].clone()
    for _ in range(rounds):
        unit = assign(x, centroids)
        count = torch.bincount(unit, minlength=k)
        total = torch.zeros_like(centroids).index_add_(0, unit, x)
        spare = x[
            torch.randint(len(x), (k,), generator=pick).to(x.device)
        ]  # where a unit has no frames left
        centroids = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], spare)
    return centroids


def place_means(features, least=0.1):
    """What a teacher with absolute positions (Whisper) adds to its features at each place in its window: it says nothing
    about the sound, and a crop would bring any of it. features: a list of [n, d] -> [WINDOW x 8, d] to take off, zero where
    places explain less than `least` of the variance; and the share they explain, by the covariance of the means over two
    halves of the list, so that chance does not count."""
    mean, most = torch.cat(features).mean(0), WINDOW * TEACHER_FRAMES
    sums, counts = (
        torch.zeros(2, most, len(mean), device=mean.device),
        torch.zeros(2, most, 1, device=mean.device),
    )
    for i, x in enumerate(features):
        sums[i % 2, : len(x)] += x - mean
        counts[i % 2, : len(x)] += 1
    both = (counts > 4).all(0)[:, 0]
    a, b = (sums / counts.clamp(min=1))[:, both]
    variance = sum((x - mean).square().sum() for x in features) / sum(map(len, features))
    share = ((a * b).sum(1).mean() / variance).item() if both.any() else 0.0
    return sums.sum(0) / (counts.sum(0) + 1) * (share > least), share


# ---- preparing -------------------------------------------------------------------------------------------------------


def plan(usable, held, units):
    """Batches of equal lengths, [[(path, start, blocks)]]: first the sample that k-means is fitted on, then the rest to
    train on, then what is held out. -> batches, how many are the sample, how many are for training."""
    pieces = lambda p: [(p, s, min(WINDOW, usable[p] - s)) for s in range(0, usable[p], WINDOW)]
    train = [w for p in sorted(set(usable) - held, key=by_hash) for w in pieces(p)]
    out = [w for p in sorted(held) for w in pieces(p)]
    if not held and len(train) > 1:  # one file: its last windows
        cut = max(1, len(train) // 20)
        train, out = sorted(train)[:-cut], sorted(train)[-cut:]
    if not out:
        raise ValueError("one utterance is too little: some audio has to be held out")
    lots = np.random.default_rng(0).permutation(
        len(train)
    )  # windows of one long file are not the whole sample
    need, sample = units * SAMPLE / TEACHER_FRAMES, []
    while (need > 0 or len(sample) < WINDOWS) and len(sample) < len(train):
        sample.append(train[lots[len(sample)]])
        need -= sample[-1][2]
    rest, batches, ends = [train[i] for i in sorted(lots[len(sample) :])], [], []
    for part in (sample, rest, out):
        batch = []
        for w in sorted(part, key=lambda w: (w[2], w[0], w[1])):
            if batch and (w[2] != batch[0][2] or (len(batch) + 1) * w[2] > BATCH):
                batches.append(batch)
                batch = []
            batch.append(w)
        batches += [batch] if batch else []
        ends.append(len(batches))
    return batches, ends[0], ends[1]


class Rows:
    """.npy files that grow by rows. numpy leaves room in a header for any count; the true one is written at the end."""

    def __init__(self, folder, rows, arrays):
        self.files = {
            name: (open(folder / f"{name}.npy", "r+b" if rows else "w+b"), shape, np.dtype(kind))
            for name, (shape, kind) in arrays.items()
        }
        self.set_count(
            rows
        )  # what an interrupted call wrote after its last note of progress is written again

    def set_count(self, rows):
        for f, shape, kind in self.files.values():
            f.seek(0)
            np.lib.format.write_array_header_1_0(
                f, dict(descr=kind.str, fortran_order=False, shape=(rows, *shape))
            )
            f.truncate(f.seek(f.tell() + rows * math.prod(shape) * kind.itemsize))

    def write(self, **arrays):
        for name, x in arrays.items():
            f, _, kind = self.files[name]
            f.write(x.numpy().astype(kind).tobytes())

    def flush(self):
        for f, *_ in self.files.values():
            f.flush()
            os.fsync(f.fileno())

    def close(self, rows):
        self.set_count(rows)
        for f, *_ in self.files.values():
            f.close()


def give_places(place, teacher, listener):
    """place [WINDOW x 8, dim, and d more with two teachers], as place.npy has it, to the teachers it is taken off in."""
    teacher.place, listener.place = place[:, : teacher.dim], place[:, -listener.dim :]


def fit(sample, teacher, listener, config):
    """Centroids and places from a sample of the corpus: a list of mel [n x 15, M], the teacher's features [n x 8, dim], and
    those that units come from [n x 8, d]. Places are taken off in the teachers and in the sample.
    -> centroids [units, d, and M more with two codebooks], place [WINDOW x 8, dim, and d more with two teachers]"""
    places = []
    for column in (1,) if listener is teacher else (1, 2):
        mean, share = place_means([x[column] for x in sample])
        places.append(mean)
        if mean.any():
            print(
                f"{share:.0%} of the variance of this teacher's features is their place in its window; that is taken off",
                flush=True,
            )
    place = torch.cat(places, 1)
    give_places(place, teacher, listener)
    for j, (mel, x, heard) in enumerate(sample):
        x = x - teacher.place[: len(x)]
        sample[j] = mel, x, x if listener is teacher else heard - listener.place[: len(heard)]
    streams = [torch.cat([heard for *_, heard in sample])]
    if config.codebooks == 2:
        streams.append(
            torch.cat([slow(mel[None], len(heard))[0].to(heard) for mel, _, heard in sample])
        )
    return torch.cat([k_means(x.half().float(), config.units) for x in streams], 1), place


def prepare(folder, out, config):
    """A folder of audio -> a prepared folder `out`. Raises ValueError. Interrupted, the same call goes on; until it is
    whole, the work stands in `out`.partial."""
    folder, out = Path(folder), Path(out)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{out} lies inside the audio folder {folder}, where nothing is written: choose another --cache or --out"
        )
    if out.exists():
        raise ValueError(f"{out} exists already; nothing is overwritten")
    files = list_audio(folder)
    usable, skipped = scan(folder, files)
    if not usable:
        reason = (
            f"; the first of {len(skipped)}: {skipped[0]['path']} {skipped[0]['reason']}"
            if skipped
            else ""
        )
        raise ValueError(f"--data {folder}: no usable audio ({', '.join(sorted(AUDIO))}){reason}")
    batches, sampled, train_batches = plan(usable, hold_out(usable), config.units)
    total = sum(w[2] for b in batches for w in b) * BLOCK

    _, _, device, amp = agrepa.launch(config)
    teacher = Teacher(config.teacher, config.teacher_layer).to(device)
    listener = (
        Teacher(config.units_teacher, config.teacher_layer).to(device)
        if config.units_teacher not in ("", config.teacher)
        else teacher
    )
    print(
        f"preparing {folder}: {len(usable)} files, {total / 3600:.2f} h, teacher {config.teacher}, on {device.type}; "
        f"{len(skipped)} files skipped; into {out}",
        flush=True,
    )

    part = out.with_name(out.name + ".partial")
    state = dict(
        key=identity(folder, config, files),
        batch=0,
        rows=0,
        lengths=[],
        train=0,
        skipped=skipped,
        sums=None,
    )
    try:
        before = json.loads((part / "progress.json").read_text())
    except (OSError, ValueError):
        before = {}
    fresh = before.get("key") != state["key"]
    if fresh:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    else:
        state = before
        print(f"going on where it stopped, {state['rows'] * BLOCK / 3600:.2f} h done", flush=True)
    rows = Rows(
        part,
        state["rows"],
        dict(
            mel=((FRAMES, N_MELS), "<f2"),
            teacher=((teacher.dim,), "<f2"),
            tokens=((TEACHER_FRAMES * config.codebooks,), "<u2"),
        ),
    )
    centroids = None
    if not fresh:
        centroids, place = (
            torch.from_numpy(np.load(part / f"{x}.npy")).to(device) for x in ("units", "place")
        )
        give_places(place, teacher, listener)
    sums = (
        np.zeros(3 + teacher.dim) if fresh else np.array(state["sums"])
    )  # values, sum, sum of squares; teacher's sum

    def hear(model, wave):
        with (
            amp() if hasattr(model.net, "extract_features") else contextlib.nullcontext()
        ):  # torchaudio's transformers
            return model(wave).float()

    def load(window):
        try:
            wave, wave24, _ = read(folder / window[0], *window[1:])
            return wave, log_mel(wave24[None])[0]
        except ValueError as error:
            return str(error)

    def understand(batch, loaded):
        """Audio of one batch -> [utterances] of mel [n x 15, M], teacher features [n x 8, dim], and those that units come from."""
        for window, x in zip(batch, loaded):
            if isinstance(x, str):
                state["skipped"].append(dict(path=window[0], reason=x))
        good = [x for x in loaded if not isinstance(x, str)]
        if not good:
            return []
        wave = torch.stack([w for w, _ in good]).to(device)
        features = hear(teacher, wave)
        return list(
            zip(
                [m for _, m in good],
                features,
                features if listener is teacher else hear(listener, wave),
            )
        )

    def put(utterances, training):
        for mel, features, heard in utterances:
            pooled, mel16 = features.unflatten(0, (-1, TEACHER_FRAMES)).mean(1).cpu(), mel.half()
            tokens = (
                tokenise(heard[None], mel[None].to(device), centroids, config.codebooks)[0]
                .view(len(pooled), -1)
                .cpu()
            )
            rows.write(mel=mel16, teacher=pooled.half(), tokens=tokens)
            state["rows"] += len(pooled)
            state["lengths"].append(len(pooled))
            state["train"] += training
            if training:
                m = mel16.double()
                sums[:3] += m.numel(), m.sum(), m.square().sum()
                sums[3:] += pooled.double().sum(0).numpy()

    def none_left():
        reasons = "; ".join(f"{s['path']} {s['reason']}" for s in state["skipped"][:3])
        return f"--data {folder}: no usable audio is left to train on, or to hold out ({reasons})"

    def keep_progress(done):
        rows.flush()
        state.update(batch=done, sums=sums.tolist())
        agrepa.write_text(part / "progress.json", json.dumps(state))

    began = saved = said = time.time()
    done_before, waiting, sample = state["rows"], collections.deque(), []
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2))) as pool:
        todo = iter(batches[state["batch"] :])
        for i in range(state["batch"], len(batches)):
            while len(waiting) < 3 and (
                b := next(todo, None)
            ):  # two batches ahead, no more: memory stays flat
                waiting.append((b, [pool.submit(load, w) for w in b]))
            batch, coming = waiting.popleft()
            found = understand(batch, [c.result() for c in coming])
            if i < sampled:
                sample += found
                if i == sampled - 1:
                    if not sample:
                        raise ValueError(none_left())
                    centroids, place = fit(sample, teacher, listener, config)
                    np.save(part / "units.npy", centroids.cpu().numpy())
                    np.save(part / "place.npy", place.cpu().numpy())
                    put(sample, True)
                    sample.clear()
                    keep_progress(i + 1)
            else:
                put(found, i < train_batches)
            now = time.time()
            if i >= sampled and now - saved > SAVE_SECONDS:
                keep_progress(i + 1)
                saved = now
            if now - said > SAY_SECONDS:
                audio = (
                    state["rows"] - done_before + sum(len(x) for _, x, _ in sample) / TEACHER_FRAMES
                ) * BLOCK
                left = (total - done_before * BLOCK - audio) * (now - began) / max(audio, 1e-9)
                print(
                    f"  {(done_before * BLOCK + audio) / 3600:.2f} of {total / 3600:.2f} h, {audio / (now - began):.0f} x real time, "
                    f"{datetime.timedelta(seconds=int(left))} left",
                    flush=True,
                )
                said = now
    if not 0 < state["train"] < len(state["lengths"]):
        raise ValueError(none_left())
    rows.close(state["rows"])
    np.save(part / "offsets.npy", np.cumsum([0, *state["lengths"]], dtype=np.int64))
    n, total1, total2 = sums[:3]
    mean = total1 / n
    meta = dict(
        format=FORMAT,
        name=folder.resolve().name,
        source=str(folder.resolve()),
        teacher=config.teacher,
        teacher_layer=config.teacher_layer,
        units_teacher=config.units_teacher or config.teacher,
        codebooks=config.codebooks,
        units=config.units,
        rate=RATE,
        dim=teacher.dim,
        mel_mean=mean,
        mel_std=math.sqrt(max(total2 / n - mean**2, 1e-12)),
        teacher_mean=(sums[3:] / (n / FRAMES / N_MELS)).tolist(),
        hours=state["rows"] * BLOCK / 3600,
        utterances=len(state["lengths"]),
        held_out=len(state["lengths"]) - state["train"],
        skipped=state["skipped"],
    )
    agrepa.write_text(part / "meta.json", json.dumps(meta, indent=1))
    (part / "progress.json").unlink()
    os.replace(part, out)
    print(
        f"prepared {out}: {meta['utterances']} utterances, {meta['hours']:.2f} h, {meta['held_out']} held out, "
        f"{len(meta['skipped'])} skipped, {time.time() - began:.0f} s",
        flush=True,
    )
    for s in meta["skipped"][:5]:
        print(f"  skipped {s['path']}: {s['reason']}")
    return out


def identity(folder, config, files):
    """Eight characters that stand for the audio, and for every setting that preparation depends on."""
    parts = [FORMAT, str(Path(folder).resolve()), files]
    for spec in (config.teacher, config.units_teacher):
        source = Path(spec.rsplit(":", 1)[0])
        parts.append(
            [spec, source.read_text() if source.suffix == ".py" and source.is_file() else ""]
        )
    parts += [config.teacher_layer, config.codebooks, config.units]
    return hashlib.md5(json.dumps(parts).encode()).hexdigest()[:8]


def flag(name, value):
    return f"--{name.replace('_', '-')} {value}"


def prepared(folder, config, given):
    """The prepared folder for one entry of --data; prepares audio into the cache if that isn't done."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    if (folder / "meta.json").exists():
        meta = BlockDataset(folder).meta
        for k in {"teacher", "teacher_layer", "units_teacher", "codebooks", "units"} & set(given):
            if given[k] != meta[k]:
                raise ValueError(
                    f"{flag(k, given[k])}: {folder} was prepared with {meta[k]}; prepare the audio again"
                )
        return folder
    files = list_audio(folder)
    out = Path(config.cache) / f"{folder.resolve().name}-{identity(folder, config, files)}"
    if (out / "meta.json").exists():
        return out
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        flags = " ".join(
            flag(k, getattr(config, k))
            for k in ("teacher", "teacher_layer", "units_teacher", "codebooks", "units", "cache")
            if getattr(config, k) != ""
        )
        raise ValueError(
            f"--data {folder}: not prepared yet; before torchrun, once: python data_prep.py {folder} {flags}"
        )
    return prepare(folder, out, config)


# ---- the toy corpus --------------------------------------------------------------------------------------------------

VOWELS = dict(
    a=(730, 1090, 2440),
    e=(530, 1840, 2480),
    i=(270, 2290, 3010),
    o=(570, 840, 2410),
    u=(300, 870, 2240),
)  # Peterson and Barney 1952


def shaped(source, envelope):
    """Filters source [n] by a time-varying magnitude envelope [frames, 257], frames 128 samples apart."""
    window = torch.hann_window(512)
    spec = torch.stft(
        torch.from_numpy(source.astype(np.float32)), 512, 128, window=window, return_complex=True
    )
    envelope = torch.from_numpy(envelope.astype(np.float32)).T[:, : spec.shape[1]]
    return torch.istft(
        spec * F.pad(envelope, (0, spec.shape[1] - envelope.shape[1])),
        512,
        128,
        window=window,
        length=len(source),
    ).numpy()


def peak(freqs, centre, width):
    return 1 / (1 + ((freqs - np.asarray(centre)[..., None]) / np.asarray(width)[..., None]) ** 2)


def speak(rng, pitch, tract, seconds):
    """Speech-like sound of one voice: vowels, nasals, fricatives, stops and pauses, source and filter. [n] at 24 kHz."""
    frames, freqs = int(seconds * RATE / 128), np.linspace(0, RATE / 2, 257)
    voiced, noise, formants, colour, at = (
        *np.zeros((2, frames)),
        np.full((frames, 3), 500.0),
        np.full((frames, 2), 4000.0),
        0,
    )
    while at < frames:
        kind, n = (
            rng.choice(["vowel"] * 5 + ["nasal", "hiss", "hiss", "stop", "stop", "pause"]),
            int(rng.uniform(9, 30)),
        )
        s, at = slice(at, at + n), at + n
        if kind in ("vowel", "nasal"):
            voiced[s] = 1.0 if kind == "vowel" else 0.3
            formants[s] = tract * np.array(
                VOWELS[rng.choice(list(VOWELS))] if kind == "vowel" else (250, 1200, 2200)
            )
        elif kind == "hiss":
            noise[s], colour[s] = 0.3, ((6500, 2000), (3200, 1200))[rng.integers(2)]
        elif kind == "stop":
            noise[s.stop - 4 : s.stop], colour[s.stop - 4 : s.stop] = (
                0.8,
                (rng.choice([900, 2500, 4500]), 1200),
            )
    smooth = lambda x, n: np.apply_along_axis(np.convolve, 0, x, np.ones(n) / n, "same")
    voiced, noise, formants = smooth(voiced, 5), smooth(noise, 3), smooth(formants, 9)
    glide = np.interp(
        np.arange(frames * 128), np.linspace(0, frames * 128, 6), rng.uniform(0.85, 1.2, 6)
    )
    pulses = np.diff(np.floor(np.cumsum(pitch * glide / RATE)), prepend=0) * 12
    filters = sum(
        g * peak(freqs, formants[:, k], np.full(frames, w))
        for k, (g, w) in enumerate(((1, 60), (0.5, 90), (0.25, 140)))
    )
    sound = shaped(pulses, voiced[:, None] * filters)
    return (
        sound
        + shaped(
            rng.standard_normal(frames * 128),
            noise[:, None] * peak(freqs, colour[:, 0], colour[:, 1]),
        )
        * 0.3
    )


def strike(rng, seconds):
    """One or several sound events: a bell, a sweep, a gust or an engine. [n] at 24 kHz."""
    n, freqs, out = (
        int(seconds * RATE),
        np.linspace(0, RATE / 2, 257),
        np.zeros(int(seconds * RATE)),
    )
    for _ in range(rng.integers(1, 4)):
        a = int(rng.uniform(0, 0.6) * n)
        t, kind = np.arange(n - a) / RATE, rng.integers(4)
        decay = np.exp(-t * rng.uniform(2, 10))
        if kind == 0:
            f = rng.uniform(200, 1500)
            sound = sum(
                np.sin(2 * np.pi * f * r * t) * np.exp(-t * 3 * r) / r
                for r in (1, 2.76, 5.4, 8.9)
                if f * r < 11_000
            )  # a free bar's modes
        elif kind == 1:
            sound = (
                np.sin(
                    2 * np.pi * np.cumsum(np.geomspace(*rng.uniform(200, 5000, 2), len(t))) / RATE
                )
                * decay
            )
        else:
            source = (
                rng.standard_normal(len(t))
                if kind == 2
                else np.diff(np.floor(t * rng.uniform(18, 70)), prepend=0) * 9
            )
            centre = np.linspace(*rng.uniform(300, 6000, 2), len(t) // 128 + 1)
            sound = shaped(source, peak(freqs, centre, centre / 3)) * (decay if kind == 2 else 1)
        out[a:] += sound / max(1e-6, np.abs(sound).max()) * rng.uniform(0.3, 1)
    return out


def toy(folder):
    """Eight voices and a hundred and twenty recordings of sound events, 13 minutes in all, the same each time. -> two folders."""
    import soundfile

    folder = Path(folder)
    if not folder.exists():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "the toy corpus isn't there yet; before torchrun, once: python agrepa.py"
            )
        part = folder.with_name(folder.name + ".partial")
        shutil.rmtree(part, ignore_errors=True)
        sounds = {
            f"toy-speech/voice{v}/{i}": lambda rng, v=v: speak(
                rng, 90 * 1.14**v, 0.88 + 0.04 * v, rng.uniform(2.5, 5)
            )
            for v in range(8)
            for i in range(14)
        }
        sounds |= {
            f"toy-sounds/{i}": lambda rng: strike(rng, rng.uniform(1, 5)) for i in range(120)
        }
        for seed, (name, make) in enumerate(sounds.items()):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            sound = make(np.random.default_rng(seed))
            soundfile.write(part / f"{name}.wav", 0.7 * sound / np.abs(sound).max(), RATE)
        os.replace(part, folder)
    return [str(folder / "toy-speech"), str(folder / "toy-sounds")]


# ---- runs ------------------------------------------------------------------------------------------------------------

TOY = dict(
    layers=6,
    dim=128,
    heads=4,
    seconds=1.92,
    batch_size=16,
    steps=240,
    lr=2e-3,
    teacher="MFCC",
    units=64,
    probe_steps=90,
    probe_every=15,
    eval_every=40,
)


def check(config):
    """Raises ValueError, with the value and what to do, for settings that can't be run."""
    for f in dataclasses.fields(config):
        value, may_be_0 = getattr(config, f.name), not f.default or "weight" in f.name
        if isinstance(f.default, (int, float)) and not (value > 0 or value == 0 and may_be_0):
            raise ValueError(
                f"{flag(f.name, value)}: must be {'0 or more' if may_be_0 else 'above 0'}"
            )
    listed, domains, L = config.select.split(","), max(1, len(config.data)), config.layers
    fits = len(set(listed)) == len(listed) and all(k.isdigit() and 1 <= int(k) <= L for k in listed)
    for wrong, why in (
        (
            config.select not in agrepa.STRATEGIES and not fits,
            f"--select {config.select}: {', '.join(agrepa.STRATEGIES)}, or different layers from 1 to {L}, such as 4,8,12",
        ),
        (config.top_k > L, f"--top-k {config.top_k} but the model has {L} layers"),
        (
            config.dim % (2 * config.heads),
            f"--dim {config.dim}: must be a multiple of 2 x --heads {config.heads}, for rotary positions",
        ),
        (config.dropout >= 1, f"--dropout {config.dropout}: must be below 1"),
        (
            config.units * config.codebooks > 65536,
            f"--units {config.units}: at most {65536 // config.codebooks}",
        ),
        (config.blocks < 1, f"--seconds {config.seconds}: below one block, {BLOCK} s"),
        (
            config.phase1 >= config.steps,
            f"--probe-steps {config.phase1}: must end before --steps {config.steps}; phase II needs some",
        ),
        (
            config.batch_size % domains,
            f"--batch-size {config.batch_size}: must be a multiple of the {domains} domains",
        ),
    ):
        if wrong:
            raise ValueError(why)


def settings(given):
    """Flags of the command line -> Config, and the checkpoint to resume. Prepares folders of audio."""
    stored, resume, out = {}, None, Path(given.get("out", ""))
    if stray := set(given) - {f.name for f in dataclasses.fields(Config)}:
        raise ValueError(f"--{min(stray)} goes with --sample CKPT")
    if "resume" in given:
        if "out" not in given or not (out / "config.json").exists():
            raise ValueError(f"--resume: no run in --out {given.get('out', '')!r}")
        stored = json.loads((out / "config.json").read_text())
        found = [p for p in (out / "last.pt", out / "previous.pt") if p.exists()]
        resume = agrepa.load_checkpoint(found[0]) if found else None
    elif "data" not in given:
        toy_flags = {k: v for k, v in TOY.items() if k not in given}
        print("toy corpus; a small model:", *(flag(k, v) for k, v in toy_flags.items()))
        given = {
            **toy_flags,
            **given,
            "data": toy(Path(given.get("cache", Config.cache)) / "toy-audio"),
        }
    config = Config(**{**stored, **given})
    check(config)
    config.data = [str(prepared(folder, config, given)) for folder in config.data]
    for k in (set(given) & set(stored)) - set(
        "device dtype compile eval_every save_every resume cache out".split()
    ):
        if getattr(config, k) != stored[k]:
            raise ValueError(
                f"--resume: {out} was run with {flag(k, stored[k])}, not {getattr(config, k)}"
            )
    metas = [BlockDataset(d).meta for d in config.data]
    if len({m["codebooks"] for m in metas}) > 1:
        raise ValueError(
            "--data: the domains differ in their number of codebooks; prepare them alike"
        )
    if not config.out:
        name = "+".join(m["name"] for m in metas)
        config.out = str(
            next(p for i in itertools.count(1) if not (p := Path("runs", f"{name}-{i}")).exists())
        )
    if (
        not stored
        and int(os.environ.get("RANK", 0)) == 0
        and Path(config.out).exists()
        and any(Path(config.out).iterdir())
    ):
        raise ValueError(
            f"--out {config.out}: not empty; --resume goes on with a run, another --out starts a new one"
        )
    return config, resume


def restore(path, device):
    """A checkpoint -> its content, its Config, its EMA model in eval mode, and the precision it trained in, as amp()."""
    state = agrepa.load_checkpoint(path)
    config = Config(**{**state["config"], "device": str(device)})
    model = agrepa.build(config, state["domains"]).to(device).eval().requires_grad_(False)
    model.load_state_dict(state["ema"])
    return state, config, model, agrepa.launch(config)[3]


def teachers(meta, named, device):
    """A domain's teacher, and the one its units come from. A callable runs only if it is among those named on the command line."""
    for spec in (meta["teacher"], meta["units_teacher"]):
        if ":" in spec and spec not in named:
            raise ValueError(
                f"this checkpoint's teacher is code, {spec}, and runs only if you name it: --teacher {spec}"
            )
    make = functools.cache(lambda spec: Teacher(spec, meta["teacher_layer"]).to(device))
    teacher, listener = make(meta["teacher"]), make(meta["units_teacher"])
    give_places(meta["place"].to(device), teacher, listener)
    return teacher, listener


def listen(teacher, wave):
    """A sound of any length [n x 2560], in windows as preparation takes them -> its features [n x 8, dim]."""
    return torch.cat([teacher(w[None])[0] for w in wave.split(WINDOW * 2560)])


def understand(path, meta, listener, device):
    """A file for sampling: its mel [n x 15, M], normalised, and its ids [n x 8 x codebooks], by a checkpoint's own units."""
    try:
        wave, wave24, rate = read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if rate < TEACHER_RATE:
        print(
            f"note: {path} is sampled at {rate} Hz: nothing above {rate // 2} Hz is there to be heard"
        )
    mel = log_mel(wave24[None].to(device))
    ids = tokenise(
        listen(listener, wave.to(device))[None],
        mel,
        meta["centroids"].to(device),
        meta["codebooks"],
    )[0]
    return (mel[0] - meta["mel_mean"]) / meta["mel_std"], ids


def resynthesise(model, ids, prompt, prompt_ids, domain, blocks, seed=0, **how):
    """Tokens of a sound of any length -> its mel, in the voice of a prompt. ids [n x r], prompt [p x 15, M] normalised,
    prompt_ids [p x r]; blocks: a window's, prompt included. Windows overlap by a third, and move with one velocity where
    they do. -> [n x 15, M]"""
    p, device = len(prompt), prompt.device
    r = len(prompt_ids) * FRAMES // p  # ids a block
    n = len(ids) // r
    body = min(n, max(1, blocks - p // FRAMES))
    starts = sorted({min(s, n - body) for s in range(0, n, body - body // 3)})
    frames = torch.tensor(
        [range(s * FRAMES, (s + body) * FRAMES) for s in starts], device=device
    )  # [windows, body x 15]
    tokens = torch.stack([torch.cat([prompt_ids, ids[s * r : (s + body) * r]]) for s in starts])
    ref = F.pad(prompt, (0, 0, 0, body * FRAMES)).expand(len(starts), -1, -1)
    noise = torch.from_numpy(
        np.random.default_rng(seed).standard_normal((p + n * FRAMES, N_MELS), dtype=np.float32)
    ).to(device)
    x0 = torch.stack([torch.cat([noise[:p], noise[p + f]]) for f in frames])
    fade = torch.hann_window(body * FRAMES + 2, False, device=device)[1:-1, None].expand(
        len(starts), -1, 1
    )
    add = lambda v: torch.zeros(n * FRAMES, v.shape[-1], device=device).index_add_(
        0, frames.flatten(), v.flatten(0, 1)
    )
    whole = lambda v: add(v[:, p:] * fade) / add(fade)  # windows -> one line of frames
    one = torch.ones(len(starts), dtype=torch.long, device=device)
    return whole(
        agrepa.sample(
            model,
            Condition(tokens, ref, domain * one, one > 0),
            x0,
            join=lambda v: torch.cat([v[:, :p], whole(v)[frames]], 1),
            **how,
        )
    )


def resound(path, ask, device):
    """--sample: the tokens of --input, sounded again in the voice of --prompt."""
    state, config, model, amp = restore(path, device)
    name = ask.get("domain", state["names"][0])
    if not {"input", "output"} <= set(ask) or name not in state["names"]:
        raise ValueError(
            f"--sample needs --input FILE, --output FILE.wav, and a --domain of {', '.join(state['names'])}"
        )
    if ask.get("nfe", 1) < 1:
        raise ValueError(f"--nfe {ask['nfe']}: needs a step at least")
    if os.path.exists(ask["output"]):
        raise ValueError(f"--output {ask['output']}: exists already; nothing is overwritten")
    d = state["names"].index(name)
    meta, n = state["domains"][d], config.blocks
    _, listener = teachers(meta, ask.values(), device)
    mel, ids = understand(ask["input"], meta, listener, device)
    prompt, prompt_ids = (
        understand(ask["prompt"], meta, listener, device) if "prompt" in ask else (mel, ids)
    )
    p = min(len(prompt) // FRAMES, max(1, int(0.3 * n)))
    how, prompt_ids = (
        {k: ask[k] for k in ("seed", "nfe", "guidance", "sway") if k in ask},
        prompt_ids[: p * TEACHER_FRAMES * meta["codebooks"]],
    )
    with amp():
        made = resynthesise(model, ids, prompt[: p * FRAMES], prompt_ids, d, n, **how)
    write_wave(
        ask["output"],
        agrepa.mel_to_wave(
            made[None] * meta["mel_std"] + meta["mel_mean"], ask.get("vocoder", "griffinlim")
        )[0],
    )
    print(f"{ask['output']}: {len(made) / FRAMES * BLOCK:.2f} s")


def finish(folder, device):
    """A run's end: a held-out clip of each domain, generated beside real, through the same vocoder; and the figures."""
    state, config, model, amp = restore(folder / "last.pt", device)
    for d, (name, data) in enumerate(zip(state["names"], map(BlockDataset, config.data))):
        u = len(data.offsets) - 2  # the longest held out: they stand in order of length
        n = min(60, int(data.offsets[-1] - data.offsets[-2]))
        mel, ids = (torch.from_numpy(x).to(device) for x in data.clip(u, 0, n)[:2])
        p = max(1, min(n, int(0.3 * config.blocks)))
        with amp():
            made = resynthesise(
                model, ids, mel[: p * FRAMES], ids[: p * len(ids) // n], d, config.blocks
            )
        for kind, x in (("sample", made), ("target", mel)):
            write_wave(
                folder / f"{kind}-{name}.wav",
                agrepa.mel_to_wave(x[None] * data.meta["mel_std"] + data.meta["mel_mean"])[0],
            )
    print(f"sound, generated and real: {folder}/sample-*.wav, {folder}/target-*.wav")
    try:
        print("pictures:", *figures(folder))
    except ValueError as error:
        print(error)


def probe_again(path, device):
    """--probe: a checkpoint's stores and contributions, beside the layers that phase I chose."""
    state, config, model, _ = restore(path, device)
    model.load_state_dict(state["model"]), model.requires_grad_(True)
    bitc = nn.ModuleList(agrepa.BiTC(config.dim, m["dim"]) for m in state["domains"]).to(device)
    bitc.load_state_dict(state["bitc"])
    data, clips = (
        [BlockDataset(folder, config.raw_teacher) for folder in config.data],
        agrepa.PROBE_CLIPS,
    )
    scores = [
        agrepa.probe(
            model, bitc, agrepa.make_batch(data, config, clips, domains=[d], device=device), d
        )
        for d in range(len(data))
    ]
    config, history = (
        dataclasses.replace(config, probe_steps=1),
        [dict(step=max(1, state["step"]), scores=scores)],
    )
    now = {name: agrepa.choose(config, history, d, name) for d, name in enumerate(state["names"])}
    for (name, entry), before in zip(now.items(), state["chosen"] or []):
        common = set(before["layers"]) & set(entry["layers"])
        print(
            f"{name}: {len(common)} of the {len(before['layers'])} layers chosen after phase I, {before['layers']}, are chosen now"
        )
    print(draw_layers(now, Path(path).parent / f"probe-{state['step']}.png"))


# ---- figures ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def panels(path, rows, columns, height, **kw):
    """Axes [rows, columns] to draw in, saved as a PNG in the end. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(min(max(6.5, 4.4 * columns), 10), height),
        squeeze=False,
        layout="constrained",
        **kw,
    )
    yield axes
    fig.savefig(path, dpi=100)
    pyplot.close(fig)


def draw_layers(entries, path):
    """Store beside contribute, a pair of panels a domain; entries: layers.json's. -> path"""
    L = len(next(iter(entries.values()))["foga"])
    with panels(path, 1, 2 * len(entries), 0.2 * L + 1.4, sharey=True) as axes:
        for (name, entry), (store, contribute) in zip(entries.items(), axes[0].reshape(-1, 2)):
            store.barh(
                range(1, L + 1), entry["lasp"], color="#e0a030", hatch="//", edgecolor="white"
            )
            bars = contribute.barh(range(1, L + 1), entry["foga"], color="#b4c4d4")
            for k, lam in zip(entry["layers"], entry["weights"]):
                bars[k - 1].set_color("#1f4e79")
                contribute.text(
                    entry["foga"][k - 1], k, f" $\\lambda$ {lam:.2f}", va="center", fontsize=8
                )
            contribute.margins(x=0.3)
            store.set(
                title=f"{name}\nstores",
                xlabel="LASP (cosine)",
                yticks=range(1, L + 1),
                ylabel="layer",
            )
            store.locator_params(axis="x", nbins=4), contribute.locator_params(axis="x", nbins=4)
            contribute.set(
                title=f"{name}\ncontributes; dark: chosen",
                xlabel="FoG-A (relative change)",
                ylim=(L + 0.6, 0.4),
            )
    return path


def draw_losses(logs, path, **columns):
    """Curves over steps: logs {run: rows of log.csv}, columns {name in log.csv: legend}. -> path"""
    styles = itertools.cycle(("-", "--", "-.", ":"))
    with panels(path, 1, 1, 3.4) as [[ax]]:
        for (run, log), (column, text) in itertools.product(logs.items(), columns.items()):
            line = [(int(r["step"]), float(r[column])) for r in log if r[column]] or [(0, math.nan)]
            ax.plot(*zip(*line), next(styles), label=text.format(run=run))
        for log in logs.values():
            switch = max(int(r["step"]) for r in log if r["phase"] == "1")
            ax.axvline(switch, color="grey", linewidth=1)
            ax.text(
                switch,
                0.97,
                " layers chosen",
                transform=ax.get_xaxis_transform(),
                va="top",
                fontsize=8,
            )
        ax.set(xlabel="step", ylabel="loss", ylim=(0, None))
        ax.legend(fontsize=8)
    return path


def read_run(folder):
    """layers.json, and the rows of log.csv and probe.csv."""
    try:
        with (
            open(folder / "layers.json") as layers,
            open(folder / "log.csv") as log,
            open(folder / "probe.csv") as probe,
        ):
            return json.load(layers), [*csv.DictReader(log)], [*csv.DictReader(probe)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not the folder of a run past its phase I ({error})") from None


def figures(*folders):
    """PNGs of a run from its tables and sounds, into its folder; of several, one that compares them. -> paths"""
    runs = {Path(folder): read_run(Path(folder)) for folder in folders}
    here = Path(folders[0])
    if len(folders) > 1:
        print(f"{'run':24}{'select':>10}  held-out loss  layers")
        for folder, (chosen, log, _) in runs.items():
            select = json.loads((folder / "config.json").read_text())["select"]
            print(
                f"{folder!s:24}{select:>10}  {log[-1]['val_fm']:>13}  "
                + "; ".join(f"{n} {e['layers']}" for n, e in chosen.items())
            )
        return [
            draw_losses(
                {folder: log for folder, (_, log, _) in runs.items()},
                here / "compare.png",
                val_fm="{run}, held out",
            )
        ]
    chosen, log, probes = runs[here]
    L = len(next(iter(chosen.values()))["foga"])
    made = [
        draw_layers(chosen, here / "dissociation.png"),
        here / "foga.png",
        draw_losses(
            {"": log},
            here / "loss.png",
            fm="flow matching",
            val_fm="flow matching, held out",
            bitc="BiT-C",
            align="alignment",
        ),
    ]
    with panels(made[1], 1, len(chosen), 0.16 * L + 1.8) as [
        axes
    ]:  # contribution over time, at the last probe
        for name, ax in zip(chosen, axes):
            own = [r for r in probes if r["domain"] == name and r["t"]]
            grid = [
                [
                    float(r["foga"])
                    for r in own
                    if r["step"] == own[-1]["step"] and r["layer"] == str(k)
                ]
                for k in range(1, L + 1)
            ]
            image = ax.imshow(grid, aspect="auto", cmap="viridis", extent=(0, 1, L + 0.5, 0.5))
            ax.set(
                title=f"{name}, step {own[-1]['step']}",
                xlabel="t (0: noise, 1: data)",
                xticks=agrepa.PROBE_TIMES,
                ylabel="layer",
                yticks=range(1, L + 1, 1 + L // 16),
            )
            ax.figure.colorbar(image, label="FoG-A (relative change)")
    if sounds := [name for name in chosen if (here / f"sample-{name}.wav").exists()]:
        import soundfile

        made.append(here / "mel.png")
        with panels(made[-1], 2, len(sounds), 4, sharex="col") as axes:
            for name, column in zip(sounds, axes.T):
                waves = [
                    torch.from_numpy(
                        soundfile.read(here / f"{kind}-{name}.wav", dtype="float32")[0]
                    )
                    for kind in ("target", "sample")
                ]
                mels = [log_mel(wave[None])[0].T.numpy() for wave in waves]
                low, high = np.quantile(mels[0], (0.05, 0.99))  # one scale for both
                for ax, mel, text in zip(column, mels, ("real", "generated")):
                    image = ax.imshow(
                        mel,
                        origin="lower",
                        aspect="auto",
                        cmap="magma",
                        vmin=low,
                        vmax=high,
                        extent=(0, len(waves[0]) / RATE, 0, N_MELS),
                    )
                    ax.set(
                        title=f"{name}: {text}",
                        ylabel="mel bin",
                        xlabel="time (s)" if text == "generated" else None,
                    )
                ax.figure.colorbar(image, ax=column, label="log magnitude")
    return made


# ---- command lines ---------------------------------------------------------------------------------------------------


def add_flags(parser, names):
    for f in (f for f in dataclasses.fields(Config) if f.name in names):
        kind = (
            dict(nargs="+")
            if f.name == "data"
            else dict(action="store_true")
            if f.default is False
            else dict(type=type(f.default))
        )
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default else "")
        parser.add_argument("--" + f.name.replace("_", "-"), **kind, **{**f.metadata, "help": text})


def command_line(description):
    """agrepa.py's flags -> those given."""
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    add_flags(parser, [f.name for f in dataclasses.fields(Config)])
    other = parser.add_argument_group("instead of training").add_argument
    other("--sample", metavar="CKPT", help="sound --input again from its tokens, into --output")
    other("--input", metavar="FILE"), other("--output", metavar="FILE.wav")
    other("--prompt", metavar="FILE", help="whose voice (default: the input's first seconds)")
    other("--domain", help="default: the checkpoint's first")
    (
        other("--nfe", type=int, help="Euler steps (default: 32)"),
        other("--guidance", type=float, help="default: 3; 1 is off"),
    )
    (
        other("--sway", type=float, help="default: -1"),
        other("--vocoder", choices=("griffinlim", "vocos"), help="default: griffinlim"),
    )
    other("--evaluate", metavar="CKPT", help="metrics on held-out audio")
    other("--probe", metavar="CKPT", help="store and contribute, now")
    other("--figures", nargs="+", metavar="RUN", help="draw a run, or compare several")
    return vars(parser.parse_args())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS
    )
    parser.add_argument("audio", nargs="?", default="", help="folder of audio")
    parser.add_argument(
        "--out", help="the prepared folder (default: one inside --cache, where agrepa.py finds it)"
    )
    parser.add_argument(
        "--download",
        metavar="PART",
        help="first fetch this part of LibriTTS, such as dev-clean; the folder must be called LibriTTS",
    )
    parser.add_argument(
        "--toy", metavar="DIR", help="synthesise the toy corpus into this folder, and stop"
    )
    add_flags(parser, "teacher teacher_layer units_teacher codebooks units device cache".split())
    given = vars(parser.parse_args())
    try:
        if "toy" in given:
            return print(*toy(given["toy"]), sep="\n")
        audio, config = (
            Path(given["audio"]),
            Config(**{k: v for k, v in given.items() if hasattr(Config, k) and k != "out"}),
        )
        check(config)
        if "download" in given:
            if audio.name != "LibriTTS":
                raise ValueError(
                    f"--download: the folder must be called LibriTTS, not {audio.name!r}"
                )
            from torchaudio.datasets import LIBRITTS

            audio.parent.mkdir(parents=True, exist_ok=True)
            LIBRITTS(audio.parent, given["download"], download=True)
        if not given["audio"]:
            raise ValueError("which folder? python data_prep.py FOLDER, or --toy DIR")
        if "out" in given and audio.is_dir():
            prepare(audio, given["out"], config)
        else:
            print(prepared(audio, config, given))
    except (ValueError, OSError) as error:
        sys.exit(print(f"data_prep.py: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nstopped; the same command goes on from here", file=sys.stderr) or 130)


if __name__ == "__main__":
    main()
