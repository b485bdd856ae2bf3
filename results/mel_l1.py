"""The mel_l1 of runs.csv: how far generated log-mel is from the real clip's, before any vocoder.

    python results/mel_l1.py runs/LibriSpeech-mini-1/last.pt [CKPT ...]

64 held-out clips of the run's first domain, those of --sample --count 64 --guidance 1, after their
prompts. Prints the mean distance in nats, its standard error over clips, and the held-out loss.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import agrepa


def finished(path):
    """-> the checkpoint, its first domain's folder, its moving average and how to run it."""
    state = agrepa.load(path)
    config = agrepa.Config(**state["config"])
    *_, device, autocast = agrepa.launch(config)
    objective = agrepa.Objective(config, state["metas"]).to(device).eval()
    objective.add_heads(state["lam"] or [{} for _ in state["metas"]])
    objective.load_state_dict(state["ema"])
    return state, agrepa.PreparedFolder(config.data[0], config.chunks), objective, device, autocast


def main(path):
    state, folder, objective, device, autocast = finished(path)
    clips = []
    for i in range(64):
        draws = np.random.default_rng((agrepa.SAMPLING, 0, 0, 0, i))
        clips.append(folder.clip("held out", (i + 0.5) / 64, 1, draws))
    batch = agrepa.collate(clips, 1).to(device)
    with autocast():
        made = agrepa.sample(objective.model, batch.cond, batch.x0, guidance=1.0)
    apart = (made - batch.x1)[:, int(0.3 * made.shape[1]) :].abs() * folder.meta["mel_std"]
    apart, loss = apart.mean((1, 2)), state["log"][-1]["val_fm"]
    print(f"{path}: mel L1 {apart.mean():.4f} +- {apart.std() / 8:.4f}, held-out loss {loss:.4f}")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(path)
