"""How much of T(x) each layer of a finished run tells: the held-out cosine of new
alignment heads, trained for 1,600 steps on its hidden states, which stay as they are.

    python results/heads.py runs/LibriSpeech-mini-1/last.pt [CKPT ...]

For runs of one domain and --align-pool chunk: T(x) is a chunk's.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import agrepa

STEPS = 1600
PEAK = 2e-3  # learning rate


def main(path):
    state, objective = agrepa.load(path)
    config = agrepa.Config(**state["config"])
    device, cast = agrepa.launch(config)
    model = objective.average.to(device)
    folder = agrepa.PreparedFolder(config.data[0], config.seconds)
    layers = range(1, config.layers + 1)
    torch.manual_seed(1)
    width = folder.meta["teacher_dim"]
    heads = agrepa.AlignmentHeads(layers, config.dim, width).to(device)
    optimiser = torch.optim.AdamW(heads.parameters(), weight_decay=0.1)

    def loss(batch, lam):
        x_t, _ = agrepa.flow_path(batch.x0, batch.x1, batch.t)
        with torch.no_grad(), cast, agrepa.capture(model.layers, layers) as hidden:
            model(x_t, batch.t, batch.cond)
        with cast:
            return agrepa.agrepa_loss(hidden, heads, batch.teacher, lam).mean()

    alike = {k: 1 / config.layers for k in layers}
    for step in range(STEPS):
        rate = PEAK * min(1, 10 * (step + 1) / STEPS) * (1 - step / STEPS)
        for group in optimiser.param_groups:
            group["lr"] = rate
        (batch,) = agrepa.training_batches([folder], config, step, 0, device)
        loss(batch, alike).backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    batch = agrepa.fixed_batch(folder, "held out", 128, device)
    cosines = [f"{k}: {1 - loss(batch, {k: 1.0}).item():.3f}" for k in layers]
    print(path, *cosines)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(path)
