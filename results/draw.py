"""runs.png from runs.csv: every short run's held-out loss and mel L1, by its choice of layers.

python results/draw.py
"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
CHOICES = {
    "none": ("none",),
    "shallow": ("1,2,3",),
    "middle": ("3,4,5", "11,12,13"),
    "deep": ("6,7,8", "20,21,22"),
    "random": ("random",),
    "LASP": ("lasp",),
    "FoG-A": ("foga",),
    "lowest FoG-A": ("lowest FoG-A",),
}

with open(HERE / "runs.csv") as file:
    runs = [
        r for r in csv.DictReader(file) if (r["align_weight"], r["align_pool"]) == ("1", "chunk")
    ]
figure = Figure((9, 5), layout="constrained")
for axes, shape in zip(
    figure.subplots(2, 2), (("8", "128", "2000", "400"), ("24", "128", "1500", "300")), strict=True
):
    own = [r for r in runs if (r["layers"], r["dim"], r["steps"], r["phase1"]) == shape]
    for ax, column, label in zip(
        axes, ("val_fm", "mel_l1"), ("held-out loss", "mel L1"), strict=True
    ):
        for x, selects in enumerate(CHOICES.values()):
            y = [float(r[column]) for r in own if r["select"] in selects]
            ax.scatter([x] * len(y), y, 18, color=f"C{x}")
        ax.set(title="{0} layers, {2} steps".format(*shape), ylabel=label)
        ax.set_xticks(range(len(CHOICES)), CHOICES, rotation=20, ha="right")
figure.savefig(HERE / "runs.png", dpi=90)
