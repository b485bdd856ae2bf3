"""tokens.png from runs.csv: what alignment changes, over what the tokens tell.

python results/draw.py
"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
SETTING = {"edition": "4", "lr": "8e-3", "steps": "1200"}
TELL = {"4": 0.21, "16": 0.28, "512": 0.35}  # tokens_tell, by units
LOWER = {  # judges whose lower figure is better
    "val_fm": "held-out loss",
    "mel_l1": "mel L1",
    "mel_cepstral_distortion": "mel cepstral distortion",
    "frechet_mfcc": "Fréchet, MFCC",
    "frechet_teachers_own": "Fréchet, the teacher's own",
}
HIGHER = {
    "speaker_similarity": "speaker similarity",
    "dnsmos_ovrl": "DNSMOS",
}
SELECTS = {"foga": "FoG-A", "lowest FoG-A": "lowest FoG-A"}


def gains(runs, select, judge):
    """-> TELL, and how much better than its seed's none in %, of each run."""
    none = {
        (run["units"], run["seed"]): float(run[judge])
        for run in runs
        if run["select"] == "none"
    }
    x = []
    y = []
    for run in runs:
        if run["select"] == select:
            base = none[run["units"], run["seed"]]
            gain = 100 * (float(run[judge]) - base) / base
            x.append(TELL[run["units"]])
            y.append(gain if judge in HIGHER else -gain)
    return x, y


def main():
    with open(HERE / "runs.csv") as file:
        runs = [run for run in csv.DictReader(file) if SETTING.items() <= run.items()]
    figure = Figure((11, 5), layout="constrained")
    *axes, last = figure.subplots(2, 4, sharex=True).flat
    for ax, (judge, title) in zip(axes, {**LOWER, **HIGHER}.items(), strict=True):
        ax.axhline(0, color="grey", lw=0.8)
        for select, label in SELECTS.items():
            x, y = gains(runs, select, judge)
            ax.scatter(x, y, 22, alpha=0.8, label=label)
        ax.set_title(title)
    last.axis("off")
    last.legend(*ax.get_legend_handles_labels(), loc="center")
    axes[0].set_ylabel("better than none by, %")
    figure.supxlabel("the cosine with T(x) that a chunk's tokens tell")
    figure.savefig(HERE / "tokens.png", dpi=90)


if __name__ == "__main__":
    main()
