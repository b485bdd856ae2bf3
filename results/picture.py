"""run.png in a run's folder: the run as one picture.

    python results/picture.py runs/LibriTTS-1

A row a domain: how its layers rank by what they contribute (FoG-A) and by what they
store (LASP); the log-mel of a held-out clip, real and generated; the held-out losses.
"""

import json
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import agrepa


def ranks(scores):
    """1 for the lowest: LASP may be negative, so that bars from zero would say little."""
    return np.argsort(np.argsort(scores)) + 1


def log_mel(path):
    wave, _ = soundfile.read(path, dtype="float32")
    return agrepa.log_mel(torch.from_numpy(wave)[None])[0]


def main(run):
    from matplotlib.figure import Figure

    layers = json.loads(Path(run, "layers.json").read_text())
    log = np.genfromtxt(Path(run, "log.csv"), delimiter=",", names=True)
    figure = Figure((15, 4 * len(layers)), layout="constrained")
    rows = figure.subplots(len(layers), 3, squeeze=False)
    for (left, middle, right), (name, entry) in zip(rows, layers.items(), strict=True):
        k = np.arange(1, len(entry["foga"]) + 1)
        left.bar(k - 0.2, ranks(entry["foga"]), 0.4, label="contributes (FoG-A)")
        left.bar(k + 0.2, ranks(entry["lasp"]), 0.4, label="stores (LASP)")
        for layer in entry["layers"]:
            left.axvspan(layer - 0.5, layer + 0.5, color="gold", alpha=0.3, zorder=0)
        left.set(title=f"{name}: golden layers are aligned", xlabel="layer", xticks=k)
        left.set(ylabel=f"rank among the layers, {len(k)} is highest")
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)

        samples = Path(run, "samples", name)
        pair = [log_mel(samples / kind / "000.wav") for kind in ("real", "generated")]
        gap = torch.full((4, agrepa.N_MELS), -12.0)
        mel = torch.cat([pair[0], gap, pair[1]]).T
        middle.imshow(mel, "magma", vmin=-9, vmax=3, origin="lower", aspect="auto")
        middle.set(title=f"{name}: a held-out clip, real | generated")
        middle.set(xlabel="frame", ylabel="mel bin")

        right.plot(log["step"], log["val_fm"], label="flow matching")
        aligned = log["val_align"] > 0
        right.plot(log["step"][aligned], log["val_align"][aligned], label="alignment")
        right.set(title="held-out losses of the run", xlabel="step", ylim=(0, None))
        right.legend()
    figure.savefig(Path(run, "run.png"), dpi=80)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception as error:  # a run is whole without its picture
        print(f"no picture: {error!r}", file=sys.stderr)
