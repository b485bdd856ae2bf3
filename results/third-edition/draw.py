"""runs.png from runs.csv: every short run's held-out loss and mel L1, by its layers.

python results/third-edition/draw.py
"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
CHOICES = {  # name: the --select of model A, of model B
    "none": ["none"],
    "shallow": ["1,2,3"],
    "middle": ["3,4,5", "11,12,13"],
    "deep": ["6,7,8", "20,21,22"],
    "random": ["random"],
    "LASP": ["lasp"],
    "FoG-A": ["foga"],
    "lowest FoG-A": ["lowest FoG-A"],
}
MODELS = [
    {"layers": "8", "dim": "128", "steps": "2000", "phase1": "400"},
    {"layers": "24", "dim": "128", "steps": "1500", "phase1": "300"},
]
COLUMNS = {"val_fm": "held-out loss", "mel_l1": "mel L1"}
SETTING = {"align_weight": "1", "align_pool": "chunk", "edition": "3"}


def alike(runs, setting):
    return [run for run in runs if setting.items() <= run.items()]


def draw(ax, runs, column):
    for x, selects in enumerate(CHOICES.values()):
        y = [float(run[column]) for run in runs if run["select"] in selects]
        ax.scatter([x] * len(y), y, 18, color=f"C{x}")
    ax.set_ylabel(COLUMNS[column])
    ax.set_xticks(range(len(CHOICES)), CHOICES, rotation=20, ha="right")


def main():
    with open(HERE.parent / "runs.csv") as file:
        runs = alike(csv.DictReader(file), SETTING)
    figure = Figure((9, 5), layout="constrained")
    axes = figure.subplots(len(MODELS), len(COLUMNS))
    for row, model in enumerate(MODELS):
        for place, column in enumerate(COLUMNS):
            ax = axes[row, place]
            ax.set_title("{layers} layers, {steps} steps".format(**model))
            draw(ax, alike(runs, model), column)
    figure.savefig(HERE / "runs.png", dpi=90)


if __name__ == "__main__":
    main()
