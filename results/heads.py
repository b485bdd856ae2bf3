"""How much of T(x) each layer of a finished run tells: the held-out cosine of new alignment heads,
trained for 1,600 steps on its hidden states, which stay as they are.

    python results/heads.py runs/LibriSpeech-mini-1/last.pt [CKPT ...]

For runs of one domain and --align-pool chunk: T(x) is a chunk's.
"""

import sys

import torch
from mel_l1 import agrepa, finished

STEPS, PEAK = 1600, 2e-3


def main(path):
    _, folder, objective, device, autocast = finished(path)
    config, model = objective.config, objective.model
    layers = range(1, config.layers + 1)
    torch.manual_seed(1)
    heads = agrepa.AlignmentHeads(layers, config.dim, folder.meta["teacher_dim"]).to(device)
    optimiser = torch.optim.AdamW(heads.parameters(), weight_decay=0.1)

    def loss(batch, lam):
        batch = batch.to(device)
        x_t, _ = agrepa.flow_path(batch.x0, batch.x1, batch.t)
        with torch.no_grad(), autocast(), agrepa.capture(model.layers, layers) as hidden:
            model(x_t, batch.t, batch.cond)
        with autocast():
            return agrepa.agrepa_loss(hidden, heads, batch.teacher[0], lam).mean()

    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = PEAK * min(1, 10 * (step + 1) / STEPS) * (1 - step / STEPS)
        batch = agrepa.training_batch([folder], config, step)
        loss(batch, {k: 1 / config.layers for k in layers}).backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    batch = agrepa.held_out_batch([folder], "loss", 16)
    print(path, *(f"{k}: {1 - loss(batch, {k: 1.0}).item():.3f}" for k in layers))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(path)
