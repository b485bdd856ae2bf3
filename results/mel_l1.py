"""The mel_l1 of runs.csv: how far generated log-mel is from the real clip's, in nats,
before any vocoder.

    python results/mel_l1.py runs/LibriSpeech-mini-1/last.pt [CKPT ...]

64 held-out clips of the run's first domain, those of --sample --count 64 --guidance 1,
after their first 30 %. Prints the mean distance, its standard error over clips, and the
held-out loss of 128 clips.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import agrepa


@torch.no_grad()
def main(path):
    state, objective = agrepa.load(path)
    config = agrepa.Config(**state["config"])
    device, cast = agrepa.launch(config)
    model = objective.average.to(device)
    folder = agrepa.PreparedFolder(config.data[0], config.seconds)

    batch = agrepa.fixed_batch(folder, "held out", 64, device)
    with cast:
        made = agrepa.sample(model, batch.cond, batch.x0, guidance=1.0)
    prompt = int(0.3 * made.shape[1])
    apart = (made - batch.x1)[:, prompt:].abs() * folder.meta["mel_std"]
    apart = apart.mean((1, 2))  # [64]

    batch = agrepa.fixed_batch(folder, "held out", 128, device)
    x_t, u = agrepa.flow_path(batch.x0, batch.x1, batch.t)
    with cast:
        v = model(x_t, batch.t, batch.cond)
    loss = agrepa.flow_matching_loss(v, u)
    print(
        f"{path}: mel L1 {apart.mean():.4f} +- {apart.std() / 8:.4f}, "
        f"held-out loss {loss.mean():.4f} +- {loss.std() / 128**0.5:.4f}"
    )


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(path)
