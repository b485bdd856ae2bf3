"""tokens.png from runs.csv: what alignment changes, over what the tokens tell.

python results/draw.py
"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
SETTING = {
    "edition": "4",
    "lr": "8e-3",
    "steps": "1200",
    "align_weight": "1",
    "align_pool": "chunk",
    "minutes": "48",
}
TELL = {"4": 0.21, "16": 0.28, "64": 0.31, "512": 0.35}  # tokens_tell, by units
LOWER = {  # judges whose lower figure is better
    "val_fm": "held-out loss",
    "mel_l1": "mel L1",
    "mel_cepstral_distortion": "mel cepstral distortion",
    "frechet_mfcc": "Fréchet, MFCC, 64 clips",
    "frechet_mfcc_256": "the same, 256 clips",
    "frechet_teachers_own": "Fréchet, the teacher's own",
}
HIGHER = {
    "speaker_similarity": "speaker similarity",
    "dnsmos_ovrl": "DNSMOS",
}
SELECTS = {
    "foga": "FoG-A",
    "lowest FoG-A": "lowest FoG-A",
    "1,2,3": "layers 1 2 3",
    "6,7,8": "layers 6 7 8",
}
PAIR = ["units", "seed", "dtype", "device"]  # what a run has in common with its none


def gains(runs, select, judge):
    """-> TELL, and how much better than its seed's none in %, of each run."""
    runs = [run for run in runs if run[judge]]  # not all were judged by all
    none = {
        tuple(run[k] for k in PAIR): float(run[judge])
        for run in runs
        if run["select"] == "none"
    }
    x = []
    y = []
    for run in runs:
        if run["select"] == select:
            base = none[tuple(run[k] for k in PAIR)]
            gain = 100 * (float(run[judge]) - base) / base
            x.append(TELL[run["units"]])
            y.append(gain if judge in HIGHER else -gain)
    return x, y


def main():
    with open(HERE / "runs.csv") as file:
        runs = [run for run in csv.DictReader(file) if SETTING.items() <= run.items()]
    figure = Figure((11, 5), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True).flat
    for ax, (judge, title) in zip(axes, {**LOWER, **HIGHER}.items(), strict=True):
        ax.axhline(0, color="grey", lw=0.8)
        for i, (select, label) in enumerate(SELECTS.items()):
            x, y = gains(runs, select, judge)
            x = [tell + 0.005 * i for tell in x]  # side by side
            ax.scatter(x, y, 22, alpha=0.8, label=label)
        ax.set_title(title)
    names = ax.get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=4)
    axes[0].set_ylabel("better than none by, %")
    figure.supxlabel("the cosine with T(x) that a chunk's tokens tell")
    figure.savefig(HERE / "tokens.png", dpi=90)


if __name__ == "__main__":
    main()
