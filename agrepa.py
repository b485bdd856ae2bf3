"""AG-REPA: Causal Layer Selection for Representation Alignment in Audio Flow Matching (ICML 2026, arXiv 2603.01006).

    python agrepa.py                                           # toy corpus: the whole method in three minutes on a CPU
    python agrepa.py --data ./LibriTTS --steps 100000          # prepare the data, probe, select, align
    torchrun --nproc_per_node=8 agrepa.py --data PREPARED      # the same on eight GPUs, the data prepared before

 1 flow matching    Eqs. 1, 2    flow_path, flow_matching_loss     7 selection       Eqs. 10, 11   select_layers
 2 velocity model   Eqs. 7, 15   VelocityModel                     8 alignment       Eq. 12        AlignmentHeads, agrepa_loss
 3 teacher          T(x)         Teacher                           9 sampling        App. A        sample, mel_to_wave
 4 BiT-C            Eqs. 3 to 5  BiTC                             10 data                          BlockDataset
 5 LASP, store      Eq. 6        lasp                             11 training loop   App. A.5      train
 6 FoG-A, contribute  Eqs. 8, 9  fog_a                            12 metrics, figures              evaluate, figures

Shapes: B clips, T mel frames, N tokens, M mel bins, D width, L layers (counted from 1), dim the teacher's width.
Time comes in blocks of 0.16 s: 15 mel frames at 24 kHz, 8 teacher frames and 8 tokens a codebook at 50 Hz.
"""
import argparse, contextlib, copy, csv, dataclasses, importlib.util, itertools, json, math, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

N_MELS, FRAMES, TEACHER_FRAMES, RATE, TEACHER_RATE, HOP = 100, 15, 8, 24_000, 16_000, 256  # a block: 3840, 2560 samples
BLOCK = FRAMES * HOP / RATE  # 0.16 s


def arg(default, text, **kw):
    return dataclasses.field(default=default, metadata=dict(help=text, **kw))


@dataclasses.dataclass
class Config:
    """One field, one flag."""
    data: tuple = arg((), "folders of audio, or prepared ones; each is a domain (default: the toy corpus)", metavar="DIR")
    out: str = arg("", "run folder (default: runs/<data>-<number>)", metavar="DIR")
    steps: int = arg(100_000, "training steps, both phases together")
    batch_size: int = arg(16, "clips a step in each process, shared equally by the domains")
    seconds: float = arg(4.8, "length of a clip; a whole number of 0.16 s blocks")
    layers: int = arg(12, "layers of the velocity model (paper: 24)")
    dim: int = arg(512, "its width (paper: 1024)")
    heads: int = arg(8, "its attention heads (paper: 16)")
    dropout: float = arg(0.0, "dropout in the layers (paper: 0.2); its masks depend on the number of processes")
    lr: float = arg(1e-4, "peak learning rate; warm-up over a third of phase I, then cosine to zero")
    seed: int = arg(0, "seed of initialisation, crops, noise and times")
    teacher: str = arg("HUBERT_BASE", "torchaudio bundle, MFCC, or FILE.py:FUNCTION or MODULE:FUNCTION")
    teacher_layer: int = arg(9, "which layer of a bundle to take; those above are never computed")
    raw_teacher: bool = arg(False, "do not take the corpus mean off the teacher's features (the authors' release)")
    units_teacher: str = arg("", "teacher whose k-means units are the tokens (default: the same)")
    codebooks: int = arg(1, "1: one token stream; 2: dense acoustic tokens interleaved with it (Eq. 15)", choices=(1, 2))
    units: int = arg(1024, "k-means units a codebook (paper: 4096)")
    probe_steps: int = arg(0, "steps of phase I (default: 5,000, or 15 %% of the run where that is less)")
    probe_every: int = arg(0, "steps between probes (default: 200, or a tenth of phase I)")
    top_k: int = arg(3, "layers to align")
    select: str = arg("foga", "foga, lasp, gradnorm, random, none, or layers such as 4,8,12")
    weights: str = arg("auto", "foga: Eq. 11; equal: 1/K; auto: foga for --select foga, else equal", choices=("auto", "foga", "equal"))
    align_weight: float = arg(1.0, "weight of the alignment loss")
    align_pool: str = arg("clip", "clip: one target a clip (paper); block: one each 0.16 s", choices=("clip", "block"))
    align_until: int = arg(0, "stop aligning at this step (default: never)")
    bit_weight: float = arg(0.5, "lambda_BiT of Eq. 12")
    device: str = arg("auto", "cuda, mps, cpu; auto takes the first there is")
    dtype: str = arg("auto", "auto: bfloat16 autocast where the hardware has it", choices=("auto", "bfloat16", "float32"))
    compile: bool = arg(False, "torch.compile the layers")
    eval_every: int = arg(200, "steps between log lines, each with the held-out loss")
    save_every: int = arg(1000, "steps between checkpoints")
    resume: bool = arg(False, "go on with the run in --out")
    cache: str = arg("prepared", "where audio folders are prepared", metavar="DIR")

    @property
    def blocks(self):
        return round(self.seconds / BLOCK)

    def check(self):
        """Raises ValueError, with the value and what to do, for settings that can't be run."""
        for name in "steps batch_size layers dim heads teacher_layer units top_k eval_every save_every lr".split():
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        for name in "seed probe_steps probe_every align_weight align_until bit_weight dropout".split():
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative")
        named = self.select.split(",") if self.select[:1].isdigit() else []
        if not named and self.select not in ("foga", "lasp", "gradnorm", "random", "none"):
            raise ValueError(f"--select {self.select}: foga, lasp, gradnorm, random, none, or layers such as 4,8,12")
        if not all(k.isdigit() and 1 <= int(k) <= self.layers for k in named) or len(set(named)) < len(named):
            raise ValueError(f"--select {self.select}: different layers from 1 to {self.layers}, such as 4,8,12")
        if self.top_k > self.layers:
            raise ValueError(f"--top-k {self.top_k} but the model has {self.layers} layers")
        if self.dim % (2 * self.heads):
            raise ValueError(f"--dim {self.dim}: must be a multiple of 2 x --heads {self.heads}, rotary positions pair channels")
        if self.dropout >= 1 or self.blocks < 1:
            raise ValueError("--dropout must be below 1" if self.blocks else f"--seconds {self.seconds}: below one block, 0.16 s")
        if not 0 < self.warmup < self.steps:
            raise ValueError(f"--probe-steps {self.probe_steps}: must end before --steps {self.steps}; phase II needs some")
        if len(self.data) and self.batch_size % len(self.data):
            raise ValueError(f"--batch-size {self.batch_size}: must be a multiple of the {len(self.data)} domains")

    @property
    def warmup(self):
        return self.probe_steps or max(1, min(5000, self.steps * 15 // 100))


# ---- 1. Flow matching (Eqs. 1, 2) ------------------------------------------------------------------------------------
# Straight lines from noise x0 to data x1; the model learns their velocity u.

def flow_path(x0, x1, t):
    """Eq. 1. x0, x1 [B, T, M], t [B] in [0, 1] -> x_t and u, both [B, T, M]."""
    t = t.view(-1, 1, 1)
    return (1 - t) * x0 + t * x1, x1 - x0


def flow_matching_loss(v, u, mask=None):
    """Eq. 2, a clip: v, u [B, T, M] -> [B], the mean over bins and over the frames where mask [B, T] is true."""
    error = (v.float() - u).square().mean(-1)  # [B, T]
    return error.mean(1) if mask is None else (error * mask).sum(1) / mask.sum(1).clamp(min=1)


# ---- 2. Velocity model (Eqs. 7, 15) ----------------------------------------------------------------------------------
# A DiT. Each layer is h_l = h_{l-1} + m_l f_l(h_{l-1}, t, c); the gates m_l are 1 in training, and closing one is
# handing on h_{l-1}, so no gate is written down. Conditioning c enters once, in h_0: tokens and a reference mel.

class Condition(NamedTuple):
    tokens: torch.Tensor  # [B, N] ids, N = 8 x codebooks a block; the second codebook's ids follow the first's
    ref: torch.Tensor  # [B, T, M] reference mel: the clip's first frames, zeros after them
    domain: torch.Tensor  # [B] which embedding table
    keep: torch.Tensor  # [B] false where the tokens are dropped
    mask: Optional[torch.Tensor] = None  # [B, T / 15] true where a block is real; None: everywhere


def interleave(*codebooks):
    """Eq. 15: s = [t1, b1, t2, b2, ...]. Token streams [..., n] of equal length -> [..., n x codebooks]."""
    return torch.stack(codebooks, -1).flatten(-2)


def spread(mask, n):
    """Block mask [B, blocks] -> [B, n], n a multiple of the blocks; None stays None."""
    return None if mask is None else mask.repeat_interleave(n // mask.shape[1], 1)


def rotate(x, cos, sin):
    """Rotary positions (RoFormer): x [B, heads, T, d] turned by angles [T, d / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)  # adaLN-Zero: starts as identity

    def forward(self, h, t, rope, mask=None):
        """Eq. 7. h [B, T, D], t [B, D], rope two [T, d / 2], mask [B, 1, 1, T] -> h_l [B, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(t)[:, None].chunk(6, -1)
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, d] each
        cos, sin = rope[0].to(q.dtype), rope[1].to(q.dtype)
        x = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask)
        h = h + gate1 * self.drop(self.out(x.transpose(1, 2).flatten(2)))
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale2) + shift2
        return h + gate2 * self.drop(self.down(self.drop(F.gelu(self.up(x), approximate="tanh"))))


class VelocityModel(nn.Module):
    """v_theta(x_t, t, c). vocab: the number of token ids (units x codebooks) of each domain."""

    def __init__(self, layers=12, dim=512, heads=8, dropout=0.0, vocab=(1024,), n_mels=N_MELS):
        super().__init__()
        self.register_buffer("first_id", torch.tensor([0, *itertools.accumulate(vocab)][:-1]), persistent=False)
        self.tokens = nn.Embedding(sum(vocab), dim)  # one table a domain, end to end
        self.null = nn.Parameter(torch.randn(dim))  # stands for dropped tokens
        self.x_in, self.cond_in = nn.Linear(n_mels, dim), nn.Linear(dim + n_mels, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.layers = nn.ModuleList(Layer(dim, heads, dropout) for _ in range(layers))
        self.modulation, self.v_out = nn.Linear(dim, 2 * dim), nn.Linear(dim, n_mels)
        for w in (self.modulation, self.v_out):
            nn.init.zeros_(w.weight), nn.init.zeros_(w.bias)

    def embed(self, cond):
        """The embedded tokens e [B, N, D]; they train, the null token too."""
        e = self.tokens(cond.tokens + self.first_id[cond.domain][:, None])
        return torch.where(cond.keep[:, None, None], e, self.null)

    def condition(self, cond, e):
        """e [B, N, D] interpolated to mel frames, beside the reference mel, projected: [B, T, D]."""
        e = F.interpolate(e.transpose(1, 2), cond.ref.shape[1], mode="linear").transpose(1, 2)
        return self.cond_in(torch.cat([e, cond.ref], -1))

    def enter(self, x_t, t, cond, c=None):
        """h_0 and what every layer is given beside it. Concatenating x_t with c and projecting is a sum of projections."""
        h = self.x_in(x_t) + (self.condition(cond, self.embed(cond)) if c is None else c)
        freq = 1e4 ** -torch.linspace(0, 1, 128, device=t.device)
        angle = 1000 * t[:, None] * freq
        t_emb = self.time(torch.cat([angle.cos(), angle.sin()], -1))
        d = h.shape[-1] // self.layers[0].heads
        angle = torch.arange(h.shape[1], device=t.device)[:, None] * 1e4 ** -(torch.arange(0, d, 2, device=t.device) / d)
        mask = spread(cond.mask, h.shape[1])
        return h, t_emb, (angle.cos(), angle.sin()), None if mask is None else mask[:, None, None]

    def leave(self, h, t_emb, mask):
        """Velocity [B, T, M], zero on padding: so no norm of it counts any."""
        shift, scale = self.modulation(t_emb)[:, None].chunk(2, -1)
        v = self.v_out(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift).float()
        return v if mask is None else v * mask[:, 0, 0, :, None]

    def forward(self, x_t, t, cond, c=None):
        """x_t [B, T, M], t [B] -> v [B, T, M]. c: condition(cond, embed(cond)), if the caller has it."""
        h, t_emb, rope, mask = self.enter(x_t, t, cond, c)
        for layer in self.layers:
            h = layer(h, t_emb, rope, mask)
        return self.leave(h, t_emb, mask)

    @torch.no_grad()
    def ablate_each_layer(self, x_t, t, cond):
        """Eq. 8 for every k in one pass: v [B, T, M] and v^{\\k} [L, B, T, M], in eval mode, without gradient.

        Layers below a closed gate are shared: a stack of hidden states goes up, row 0 intact; at each layer a row
        that skips it joins. L (L + 1) / 2 layer evaluations in place of L^2. fog_a is the same, gate by gate."""
        training, B = self.training, len(x_t)
        self.eval()
        try:
            h, t_emb, rope, mask = self.enter(x_t, t, cond)
            ts, masks = t_emb, mask
            for layer in self.layers:
                h = torch.cat([layer(h, ts, rope, masks), h[:B]])
                ts, masks = torch.cat([ts, t_emb]), None if mask is None else torch.cat([masks, mask])
            v = self.leave(h, ts, masks).unflatten(0, (-1, B))
        finally:
            self.train(training)
        return v[0], v[1:]


# ---- 3. Teacher, T(x) ------------------------------------------------------------------------------------------------
# A frozen model of sound: waveform at 16 kHz to features at 50 Hz. It runs once, in preparation. Its features are
# averaged over blocks; a clip's T(x) is the mean of its blocks, less the corpus mean: without that every clip's
# target is nearly the same vector.

class Teacher(nn.Module):
    """Waveform [B, n x 2560] at 16 kHz -> features [B, n x 8, dim]. Raises ValueError if it can't be had or won't fit."""

    def __init__(self, spec="HUBERT_BASE", layer=9):
        super().__init__()
        import torchaudio  # here: --help and training don't wait for it
        bundle = getattr(torchaudio.pipelines, spec, None) if spec.isupper() else None
        if spec == "MFCC":  # HuBERT's own first-iteration target: 13 coefficients, their deltas and the deltas' deltas
            mfcc = torchaudio.transforms.MFCC(TEACHER_RATE, 13, log_mels=True, melkwargs=dict(
                n_fft=400, hop_length=320, n_mels=26, center=False))
            delta = torchaudio.functional.compute_deltas
            stack = lambda x: torch.cat([x, delta(x), delta(delta(x))], 1).transpose(1, 2)
            self.net, self.features = mfcc, lambda wave: stack(mfcc(wave))
        elif hasattr(bundle, "get_model"):
            self.net = self.from_bundle(spec, bundle, layer)
            self.features = lambda wave: self.net.extract_features(wave, num_layers=layer)[0][-1]
        elif ":" in spec:
            self.net = self.features = self.from_callable(spec)
        else:
            raise ValueError(f"--teacher {spec}: not MFCC, not a speech model of torchaudio.pipelines (HUBERT_BASE, "
                             "WAVLM_LARGE, ...), and not FILE.py:FUNCTION or MODULE:FUNCTION")
        self.eval().requires_grad_(False)
        for self.pad in (0, 80):  # HuBERT's receptive field of 400 samples eats a frame; 80 zeros give it back
            found = self.features(torch.zeros(1, 2 * 2560 + self.pad))
            if found.dim() == 3 and found.shape[1] == 2 * TEACHER_FRAMES:
                break
        else:
            raise ValueError(f"--teacher {spec}: 0.32 s at 16 kHz gave {list(found.shape)}, need [1, 16, dim]: 50 Hz")
        self.spec, self.layer, self.dim = spec, layer, found.shape[2]

    def from_bundle(self, spec, bundle, layer):
        if layer > bundle._params["encoder_num_layers"]:
            raise ValueError(f"--teacher-layer {layer} but {spec} has {bundle._params['encoder_num_layers']} layers")
        try:
            return bundle.get_model()
        except OSError as error:  # no network
            folder = os.path.join(torch.hub.get_dir(), "checkpoints")
            raise ValueError(f"--teacher {spec}: its checkpoint {bundle._path} could not be fetched ({error}). Put "
                             f"https://download.pytorch.org/torchaudio/models/{bundle._path} into {folder}, "
                             "or take --teacher MFCC, which needs no download") from None

    def from_callable(self, spec):
        name, function = spec.rsplit(":", 1)
        try:
            if name.endswith(".py"):
                found = importlib.util.spec_from_file_location(Path(name).stem, name)
                module = importlib.util.module_from_spec(found)
                found.loader.exec_module(module)
            else:
                module = importlib.import_module(name)
            return getattr(module, function)()
        except (OSError, ImportError, AttributeError) as error:
            raise ValueError(f"--teacher {spec}: {error}") from None

    @torch.no_grad()
    def forward(self, wave):
        return self.features(F.pad(wave, (0, self.pad)))


def pool_teacher(blocks, mask=None):
    """T(x): centred features [B, n, dim], a row a block -> [B, dim]; exact for any run of blocks, all being equal long."""
    return blocks.mean(1) if mask is None else (blocks * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


# ---- 4. BiT-C (Eqs. 3 to 5) ------------------------------------------------------------------------------------------
# Ties the token interface to the teacher: one linear head P_d on the pooled embedded tokens. It trains the tokens to
# carry what the teacher knows, and gives LASP a head that was never fitted to any layer.

class BiTC(nn.Module):
    def __init__(self, dim, teacher_dim):
        super().__init__()
        self.P = nn.Linear(dim, teacher_dim)

    def forward(self, e, T_x, mask=None):
        """Eqs. 3, 4: e [B, N, D], T_x [B, dim], mask [B, N] -> s = cos(P z, T(x)) [B]."""
        if mask is None:
            z = e.float().mean(1)
        else:
            z = (e.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        z = F.layer_norm(z, z.shape[-1:])  # no gain, no bias: P follows
        return F.cosine_similarity(self.P(z).float(), T_x, dim=-1)


def bitc_loss(s, kept):
    """Eq. 5 for one domain: s [B]; kept [B] weighs the clips that kept their tokens, 0 for the others, sum 1 -> scalar."""
    return (kept * (1 - s)).sum()


# ---- 5. LASP: what a layer stores (Eq. 6) ----------------------------------------------------------------------------
# The score of BiT-C, with a layer's hidden state where the tokens were: the same head, frozen, for all layers.

@torch.no_grad()
def lasp(hidden, bitc, T_x, mask=None):
    """hidden {layer: [B, T, D]}, bitc the domain's head, T_x [B, dim], mask [B, T] -> [L, B], layers ascending."""
    return torch.stack([bitc(hidden[k], T_x, mask) for k in sorted(hidden)])


# ---- 6. FoG-A: what a layer contributes (Eqs. 8, 9) ------------------------------------------------------------------
# Close one layer's gate in a forward pass and see how far the velocity moves. Works on any residual network: paste
# this section into your model. No gradient, eval mode, the same random numbers in every pass.

def relative_change(v, v_k, eps=1e-8):
    """Eq. 9, a sample: ||v^{\\k} - v|| / (||v|| + eps). v [B, ...], v_k [L, B, ...] -> [L, B]. Norms in float32."""
    v, v_k = v.float(), v_k.float()
    return (v_k - v).flatten(2).norm(dim=2) / (v.flatten(1).norm(dim=1) + eps)


def hand_on(k, output, args, kwargs, hidden):
    """What block k returns with its gate closed: for each output tensor the block's own input."""
    inputs = {name: x for name, x in [*enumerate(args), *kwargs.items()] if torch.is_tensor(x)}
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    if hidden is None:
        names = [x if not torch.is_tensor(x) else [n for n, i in inputs.items() if i.shape == x.shape] for x in outputs]
        if any(isinstance(n, list) and len(n) != 1 for n in names):
            shapes = {n: list(i.shape) for n, i in inputs.items()}
            raise ValueError(f"fog_a: can't tell block {k}'s hidden state: outputs {[list(getattr(x, 'shape', ())) for x in outputs]}, "
                             f"inputs {shapes}; name it, as hidden=0 or hidden='x', or one name an output (None: leave it)")
        names = [n[0] if isinstance(n, list) else None for n in names]
    else:
        names = hidden if isinstance(hidden, (tuple, list)) else (hidden,) * len(outputs)
    closed = []
    for n, x in zip(names, outputs, strict=True):
        if n is not None and (n not in inputs or inputs[n].shape != x.shape):
            raise ValueError(f"fog_a: block {k} returns {list(x.shape)} where its input {n!r} is "
                             f"{list(inputs[n].shape) if n in inputs else 'missing'}: not a residual block, or another hidden=")
        closed.append(x if n is None else inputs[n].to(x.dtype))
    return closed[0] if torch.is_tensor(output) else type(output)(closed)


@torch.no_grad()
def fog_a(velocity, blocks, *inputs, hidden=None, eps=1e-8):
    """FoG-A of any residual network. velocity(*inputs) -> tensor [B, ...]; blocks: its residual modules, in order.

    hidden: position or keyword of the hidden state among a block's arguments, needed only where shapes can't tell;
    a tuple, one an output, where blocks return several. -> scores [L, B]; average over B for Eq. 9's expectation.
    Raises ValueError for a block that never ran, or whose output matches no input."""
    now, fired = None, set()

    def gate(k):
        def hook(block, args, kwargs, output):
            fired.add(k)
            return hand_on(k, output, args, kwargs, hidden) if k == now else None
        return hook

    def run():
        with torch.random.fork_rng(devices=gpus):  # every pass replays, and leaves, the same random state
            return velocity(*inputs)

    gpus = sorted({p.device.index for b in blocks for p in b.parameters() if p.is_cuda})
    modes = [(m, m.training) for b in blocks for m in b.modules()]
    hooks = [b.register_forward_hook(gate(k), with_kwargs=True) for k, b in enumerate(blocks, 1)]
    try:
        for m, _ in modes:
            m.training = False
        v, scores = run(), []
        if len(fired) < len(blocks):
            silent = sorted(set(range(1, len(blocks) + 1)) - fired)
            raise ValueError(f"fog_a: blocks {silent} never ran in velocity(); a compiled model ignores hooks: run it eagerly")
        for now in range(1, len(blocks) + 1):
            scores.append(relative_change(v, run()[None], eps)[0])
    finally:
        for h in hooks:
            h.remove()
        for m, training in modes:
            m.training = training
    return torch.stack(scores)


# ---- 7. Selection and weights (Eqs. 10, 11) --------------------------------------------------------------------------

def select_layers(scores, k=3, equal=False):
    """Eq. 10: the k layers of highest score [L], best first, counted from 1; ties go to the shallower layer.
    Eq. 11: lambda, their shares of the scores' sum (or 1 / k if equal). -> layers, weights. Raises ValueError."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    if scores.dim() != 1 or not 1 <= k <= len(scores):
        raise ValueError(f"can't choose {k} layers from scores of shape {list(scores.shape)}")
    if not scores.isfinite().all():
        raise ValueError(f"layer scores are not finite: {scores.tolist()}")
    best = scores.argsort(descending=True, stable=True)[:k]
    if not equal and not (scores[best].sum() > 0 and (scores[best] >= 0).all()):
        raise ValueError("no layer contributes, every FoG-A score is 0: adaLN-Zero starts with all gates closed, so "
                         "train some steps before probing" if not scores.any() else f"negative scores: {scores.tolist()}")
    lam = torch.full((k,), 1 / k) if equal else scores[best] / scores[best].sum()
    return (best + 1).tolist(), lam.tolist()


# ---- 8. Alignment (Eq. 12) -------------------------------------------------------------------------------------------
# A small head a layer maps the pooled hidden state to the teacher's space; the loss is one minus the cosine.

@contextlib.contextmanager
def capture(blocks, layers, output=None):
    """Hidden states of any model, with gradient, in the forward pass you make anyway.

        with capture(model.blocks, [1, 9, 5]) as hidden:
            v = model(...)                      # hidden[9] is what the ninth block returned
    output: which one, where blocks return several tensors. Raises ValueError for a block that never ran, or that
    returned a state without gradient (re-entrant activation checkpointing does)."""
    hidden = {}

    def keep(k):
        def hook(block, args, out):
            if not torch.is_tensor(out) and output is None:
                raise ValueError(f"capture: block {k} returns {len(out)} values; say which one, as output=0")
            hidden[k] = out if torch.is_tensor(out) else out[output]
        return hook

    hooks = [blocks[k - 1].register_forward_hook(keep(k)) for k in layers]
    try:
        yield hidden
    finally:
        for h in hooks:
            h.remove()
    for k in layers:
        if k not in hidden:
            raise ValueError(f"capture: block {k} never ran; a compiled model ignores hooks: compile its blocks instead")
        if torch.is_grad_enabled() and not hidden[k].requires_grad and any(p.requires_grad for p in blocks[k - 1].parameters()):
            raise ValueError(f"capture: block {k}'s state carries no gradient; re-entrant activation checkpointing "
                             "detaches it: pass use_reentrant=False")


class AlignmentHeads(nn.ModuleDict):
    """h_phi_k: a two-layer MLP for each chosen layer, D -> teacher's dim."""

    def __init__(self, layers, dim, teacher_dim, width=192):
        super().__init__({str(k): nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, teacher_dim)) for k in layers})


def agrepa_loss(hidden, heads, T_x, weights, mask=None):
    """Eq. 12's sum over k of lambda_k (1 - cos(h_phi_k(pool(h_k)), T(x))), a clip. hidden {k: [B, T, D]}, weights
    {k: lambda_k}, mask [B, T]. T_x [B, dim], or [B, n, dim]: n equal stretches, each with its own target. -> [B]."""
    T_x = T_x[:, None] if T_x.dim() == 2 else T_x
    n, loss = T_x.shape[1], 0.0
    for k, lam in weights.items():
        h = hidden[k].float()
        w = torch.ones_like(h[..., :1]) if mask is None else mask[..., None].float()
        real = w.unflatten(1, (n, -1)).sum(2)  # [B, n, 1]
        z = (h * w).unflatten(1, (n, -1)).sum(2) / real.clamp(min=1)
        far = 1 - F.cosine_similarity(heads[str(k)](z).float(), T_x, dim=-1)  # [B, n]
        real = (real[..., 0] > 0).float()
        loss = loss + lam * (far * real).sum(1) / real.sum(1)
    return loss


# ---- 9. Sampling (App. A) --------------------------------------------------------------------------------------------

def log_mel(wave):
    """Waveform [B, n x 256] at 24 kHz -> [B, n, 100]: n_fft 1024, hop 256, magnitude, natural log (the Vocos format)."""
    import torchaudio
    mel = torchaudio.transforms.MelSpectrogram(RATE, 1024, hop_length=HOP, n_mels=N_MELS, power=1).to(wave.device)
    return mel(wave)[..., :-1].clamp(min=1e-5).log().transpose(1, 2)


# ---- 10. Data --------------------------------------------------------------------------------------------------------
# A prepared folder is one domain: memory-mapped rows, one a block; an utterance is a run of rows, held-out ones last.
# Every draw of a step is a function of (seed, step, domain, sample): resuming and adding processes change none.

class Batch(NamedTuple):
    """Clips in order of domain, b each, B in all."""
    x0: torch.Tensor  # [B, T, M] noise
    x1: torch.Tensor  # [B, T, M] log-mel, normalised by the domain's mean and std
    t: torch.Tensor  # [B]
    cond: Condition
    blocks: list  # a domain each: [b, n, dim] teacher features, centred, a row a block
    kept: torch.Tensor  # [B] Eq. 5's weights: 1 / (clips of the domain that kept their tokens), or 0
    scored: torch.Tensor  # [B, T] frames that metrics count: real, and after the reference prefix


class BlockDataset:
    """A folder made by data_prep.py. Raises ValueError where it isn't one."""

    def __init__(self, folder, raw_teacher=False):
        try:
            self.meta = json.loads((Path(folder) / "meta.json").read_text())
            load = lambda name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r")
            self.mel, self.tokens, self.teacher, self.units = map(load, ("mel", "tokens", "teacher", "units"))
            self.offsets = np.array(load("offsets"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: not a prepared folder ({error})") from None
        if self.meta["format"] != 1 or not len(self.mel) == len(self.tokens) == len(self.teacher) == self.offsets[-1]:
            raise ValueError(f"{folder}: its arrays don't belong together, or another version made it; prepare it again")
        self.train = len(self.offsets) - 1 - self.meta["held_out"]  # utterances to train on
        self.centre = np.float32(0 if raw_teacher else self.meta["teacher_mean"])
        self.dim, self.vocab = self.teacher.shape[1], self.meta["units"] * self.meta["codebooks"]

    def carried(self):
        """What a checkpoint carries of a domain: all that sampling needs."""
        return {**{k: v for k, v in self.meta.items() if k != "skipped"}, "centroids": torch.tensor(np.array(self.units))}

    def clip(self, u, start, n):
        """n blocks of utterance u from `start`: mel [n x 15, M], ids [n x 8 x codebooks], teacher [n, dim], and how many
        blocks are real. After the utterance's end: zeros, and the last id again, so that interpolating sees no edge."""
        a = self.offsets[u] + start
        real = int(min(n, self.offsets[u + 1] - a))
        pad = lambda x, **kw: np.pad(x, [(0, n - real), *[(0, 0)] * (x.ndim - 1)], **kw)
        mel = (self.mel[a:a + real].astype(np.float32) - self.meta["mel_mean"]) / self.meta["mel_std"]
        teacher = self.teacher[a:a + real].astype(np.float32) - self.centre
        slots = np.arange(self.tokens.shape[1]) % self.meta["codebooks"] * self.meta["units"]
        ids = (self.tokens[a:a + real].astype(np.int64) + slots).reshape(-1)
        ids = np.pad(ids, (0, n * self.tokens.shape[1] - len(ids)), mode="edge")
        return pad(mel).reshape(n * FRAMES, -1), ids, pad(teacher), real


def make_batch(datasets, config, b, step=None, rank=0, world=1, domains=None, device="cpu"):
    """Clips of step `step`, b a domain, for this rank; without a step, b fixed held-out clips, the same in every run."""
    n, rows, blocks = config.blocks, [], []
    for d in domains or range(len(datasets)):
        data, key, teacher = datasets[d], (0, d) if step is None else (1 + config.seed, d, step), []
        draws = np.random.default_rng(key).random((b * world, 5))
        kept = (draws[:, 0] >= 0.1) | (step is None)  # tokens dropped for 10 %
        for i in range(rank * b, rank * b + b):
            where, start, t, prompt, length = *draws[i, 1:], draws[i, 0] * 1e4 % 1
            if step is None:  # held out: evenly over the utterances, times by the golden ratio
                u, t = data.train + i * data.meta["held_out"] // b, (0.5 + i * 0.618034) % 1
            else:  # a random block's utterance: long ones are drawn more often
                u = np.searchsorted(data.offsets, int(where * data.offsets[data.train]), side="right") - 1
            start = int(start * max(1, data.offsets[u + 1] - data.offsets[u] - n + 1))
            mel, ids, target, real = data.clip(u, start, n)
            prompt = int(length * 0.3 * real * FRAMES) if prompt >= 0.1 else 0  # dropped for 10 %, else at most 30 %
            noise = np.random.default_rng((*key, i)).standard_normal(mel.shape, dtype=np.float32)
            rows.append((noise, mel, np.float32(t), ids, d, kept[i], world * kept[i] / max(1, kept.sum()), prompt, real))
            teacher.append(target)
        blocks.append(np.stack(teacher))

    def put(x):  # pinned, and copied while the step before runs
        x = torch.from_numpy(np.ascontiguousarray(x))
        return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)

    x0, x1, t, ids, domain, keep, kept, prompt, real = (np.stack(x) for x in zip(*rows))
    after = np.arange(x1.shape[1]) >= prompt[:, None]
    inside = np.arange(n) < real[:, None]
    cond = Condition(put(ids), put(np.where(after[..., None], np.float32(0), x1)), put(domain), put(keep),
                     None if inside.all() else put(inside))  # no mask where none is needed: flash attention takes none
    return Batch(put(x0), put(x1), put(t), cond, [put(x) for x in blocks], put(np.float32(kept)),
                 put(after & inside.repeat(FRAMES, 1)))


def loader(datasets, config, first, rank, world, device):
    """Batches from step `first` on, each assembled in a thread while the one before is trained on."""
    make = lambda step: make_batch(datasets, config, config.batch_size // len(datasets), step, rank, world, device=device)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make, first)
        for step in itertools.count(first + 1):
            batch, coming = coming.result(), thread.submit(make, step)
            yield batch


# ---- 11. Training loop (App. A.5: probe, then intervene) -------------------------------------------------------------

PROBE_TIMES, PROBE_CLIPS = (0.1, 0.3, 0.5, 0.7, 0.9), 8


def losses(model, bitc, heads, chosen, batch, config):
    """The terms of Eq. 12: L_FM, L_BiT, alignment. bitc, heads, chosen: one entry a domain; no heads, no alignment."""
    cond, b = batch.cond, len(batch.x1) // len(bitc)
    e = model.embed(cond)
    x_t, u = flow_path(batch.x0, batch.x1, batch.t)
    taps = sorted({k for c in chosen or [] for k in c["layers"]}) if len(heads) else []
    with capture(model.layers, taps) as hidden:
        v = model(x_t, batch.t, cond, model.condition(cond, e))
    fm = flow_matching_loss(v, u, spread(cond.mask, v.shape[1])).mean()
    bit = align = torch.zeros((), device=v.device)
    for d, head in enumerate(bitc):
        own = slice(d * b, d * b + b)
        mask = None if cond.mask is None else cond.mask[own]
        T_x = pool_teacher(batch.blocks[d], mask)
        bit = bit + bitc_loss(head(e[own], T_x, spread(mask, e.shape[1])), batch.kept[own])
        if taps and chosen[d]["layers"]:
            lam = dict(zip(chosen[d]["layers"], chosen[d]["weights"]))
            T_x = T_x if config.align_pool == "clip" else batch.blocks[d]
            own_hidden = {k: hidden[k][own] for k in lam}
            align = align + agrepa_loss(own_hidden, heads[d], T_x, lam, spread(mask, v.shape[1])).mean() / len(bitc)
    return fm, bit, align


def probe(model, bitc, batch, d=0):
    """FoG-A, LASP and gradient norm of L_FM by layer, for domain d's fixed clips, each at every one of PROBE_TIMES.
    In eval mode, and in float32: the scores are differences of close numbers. -> three lists [L][times]."""
    training, out, mask = model.training, [], spread(batch.cond.mask, batch.x1.shape[1])
    model.eval()
    for at in PROBE_TIMES:
        t = torch.full_like(batch.t, at)
        x_t, u = flow_path(batch.x0, batch.x1, t)
        foga = relative_change(*model.ablate_each_layer(x_t, t, batch.cond)).mean(1)
        with capture(model.layers, range(1, len(model.layers) + 1)) as hidden:
            loss = flow_matching_loss(model(x_t, t, batch.cond), u, mask).mean()
        store = lasp(hidden, bitc[d], pool_teacher(batch.blocks[0], batch.cond.mask), mask).mean(1)
        grads = torch.autograd.grad(loss, list(model.layers.parameters()))
        per_layer = len(grads) // len(model.layers)
        norm = [torch.stack(g).norm() for g in zip(*[iter([x.norm() for x in grads])] * per_layer)]
        out.append(torch.stack([foga, store, torch.stack(norm)]))
    model.train(training)
    return torch.stack(out, -1).tolist()


def choose(config, history, d):
    """Selection for domain d from the probes of phase I's second half. -> its entry of layers.json, and its gradient norms."""
    late = [p["scores"][d] for p in history if p["step"] > config.warmup / 2]
    foga, store, grad = torch.tensor(late).mean((0, -1)).double()  # [L] each
    k, strategy = config.top_k, config.select
    if strategy == "none":
        layers, lam = [], []
    elif strategy[:1].isdigit():
        layers = [int(x) for x in strategy.split(",")]
    else:
        noise = torch.rand(config.layers, generator=torch.Generator().manual_seed(1000 * config.seed + d))
        score = dict(foga=foga, lasp=store, gradnorm=grad, random=noise)[strategy]
        layers, lam = select_layers(score, k, equal=strategy != "foga")
    if layers and (config.weights == "foga" or (config.weights, strategy) == ("auto", "foga")):
        order, share = select_layers(foga[[x - 1 for x in layers]], len(layers))  # Eq. 11 within the chosen set
        layers, lam = [layers[x - 1] for x in order], share
    elif layers:
        lam = [1 / len(layers)] * len(layers)
    return dict(layers=layers, weights=lam, foga=foga.tolist(), lasp=store.tolist()), grad.tolist()


def report(config, name, entry, grad, history, d):
    """The table of stores and contributions, and how sure the choice is."""
    print(f"\n{name}: mean of the probes from step {config.warmup // 2 + 1} to {config.warmup}\nlayer   FoG-A    LASP  grad norm  lambda")
    lam = dict(zip(entry["layers"], entry["weights"]))
    for k, row in enumerate(zip(entry["foga"], entry["lasp"], grad), 1):
        print(f"{k:5d}  {row[0]:6.4f}  {row[1]:6.3f}  {row[2]:9.4f}" + (f"  {lam[k]:6.3f}  chosen" if k in lam else ""))
    if config.select != "foga":
        return
    K, top = config.top_k, [set(select_layers(torch.tensor(p["scores"][d][0]).mean(1), config.top_k)[0]) for p in history[-3:]]
    if K < config.layers:
        last, following = sorted(entry["foga"], reverse=True)[K - 1:K + 1]
        print(f"margin: layer {entry['layers'][-1]} is {last / max(following, 1e-12) - 1:.1%} above the next")
    common = [len(t & set(entry["layers"])) for t in top]
    print(f"the last {len(top)} probes each share {', '.join(map(str, common))} of these {K} layers")
    if min(common) < K:
        print("warning: the ranking was still moving when phase I ended; more --probe-steps would settle it", flush=True)


def launch(config):
    """torchrun's environment, the device, and whether autocast is on. -> rank, world, device, amp()"""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if config.device == "auto" else config.device)
        if device.type == "cuda" and world > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device}: {str(error).splitlines()[0]}") from None
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    has = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    low = config.dtype == "bfloat16" or config.dtype == "auto" and has
    return rank, world, device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=low)


def groups(module, decay=0.1):
    """AdamW's groups: weight decay on matrices, none on embeddings, biases and the null token."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    split = {True: [], False: []}
    for p in module.parameters():
        split[p.ndim > 1 and id(p) not in tables].append(p)
    return [dict(params=ps, weight_decay=decay * matrix) for matrix, ps in split.items() if ps]


def share_gradients(params, world):
    """The mean over processes, in one message."""
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.div_(world).split([p.numel() for p in params])):
        p.grad.copy_(g.view_as(p))


def write_text(path, text):
    Path(f"{path}.part").write_text(text)
    os.replace(f"{path}.part", path)


def write_rows(path, rows):
    with open(path, "a", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)


def keep_rows(path, header, last):
    """A new table, or the rows of an interrupted run up to its checkpoint."""
    lines = path.read_text().splitlines()[1:] if path.exists() and last else []
    write_text(path, "\n".join([",".join(header), *(x for x in lines if int(x.split(",")[0]) <= last)]) + "\n")


def write_probe(path, names, found):
    for name, scores in zip(names, found["scores"]):
        for k, layer in enumerate(zip(*scores), 1):  # three lists over t
            per_t = [*zip(PROBE_TIMES, *layer), ("", *(sum(x) / len(x) for x in layer))]
            write_rows(path, [[found["step"], name, k, t, *(f"{x:.6g}" for x in row)] for t, *row in per_t])


def clock(seconds):
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def save(folder, state):
    """last.pt, by way of a file that is renamed when whole; the one before stays as previous.pt."""
    torch.save(state, folder / "last.pt.part")
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    os.replace(folder / "last.pt.part", folder / "last.pt")


def load_checkpoint(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert state["format"] == "agrepa 1"
        return state
    except Exception as error:  # torch.load raises a dozen kinds
        raise ValueError(f"{path}: not a whole checkpoint of agrepa.py ({type(error).__name__})") from None


LOG = "step phase loss fm bitc align val_fm lr frames_per_s seconds".split()
PROBE = "step domain layer t foga lasp gradnorm".split()


def train(config, resume=None):
    """One run, two phases; everything it writes stands in config.out. resume: a checkpoint of this run."""
    rank, world, device, amp = launch(config)
    out, data = Path(config.out), [BlockDataset(d, config.raw_teacher) for d in config.data]
    names = [f"{d.meta['name']}-{i}" if sum(d.meta["name"] == x.meta["name"] for x in data) > 1 else d.meta["name"]
             for i, d in enumerate(data, 1)]
    if len({d.meta["codebooks"] for d in data}) > 1:
        raise ValueError("--data: the domains differ in their number of codebooks; prepare them alike")
    warm, every = config.warmup, config.probe_every or max(1, min(200, config.warmup // 10))
    torch.manual_seed(config.seed)
    model = VelocityModel(config.layers, config.dim, config.heads, config.dropout, [d.vocab for d in data]).to(device)
    bitc = nn.ModuleList(BiTC(config.dim, d.dim) for d in data).to(device)
    ema, heads, chosen, history = copy.deepcopy(model).requires_grad_(False).eval(), nn.ModuleList(), None, []
    opt = torch.optim.AdamW([*groups(model), *groups(bitc)], lr=config.lr, fused=True)
    first, spent, aligning, sums = 0, 0.0, False, torch.zeros(5, device=device)  # sums of loss, fm, bitc, align, and how many steps

    def add_heads():  # known only now, phase II's own parameters join the optimiser
        torch.manual_seed(config.seed + 1)
        heads.extend(AlignmentHeads(c["layers"], config.dim, d.dim).to(device) for c, d in zip(chosen, data))
        for group in groups(heads):
            opt.add_param_group(group)

    if resume:
        first, spent, chosen, history = (resume[k] for k in ("step", "spent", "chosen", "history"))
        if chosen:
            add_heads()
        for part, name in ((model, "model"), (bitc, "bitc"), (heads, "heads"), (ema, "ema"), (opt, "opt")):
            part.load_state_dict(resume[name])
        sums.copy_(resume["sums"])
    if config.compile:
        for layer in model.layers:  # layer by layer: one graph serves all, and capture's hooks still see each
            layer.forward = torch.compile(layer.forward)
    held = make_batch(data, config, 16, device=device)
    probes = [make_batch(data, config, PROBE_CLIPS, domains=[d], device=device) for d in range(len(data))]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        keep_rows(out / "log.csv", LOG, first), keep_rows(out / "probe.csv", PROBE, first)
        print(f"{config.layers} layers of width {config.dim}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
              f"parameters, on {world} x {device.type}; phase I to step {warm}, a probe every {every}; run folder {out}")
        for name, d in zip(names, data):
            print(f"domain {name}: {d.meta['hours']:.2f} h, teacher {d.meta['teacher']}, {d.meta['units']} units")
    lr = lambda step: config.lr * min((step + 1) / max(1, warm // 3), 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
    began, line = time.time() - spent, (time.time(), first)

    for step, batch in zip(range(first, config.steps + 1), loader(data, config, first, rank, world, device)):
        end, switch = step == config.steps, chosen is None and step == warm
        if step > first or not resume:  # a resumed run did all this before it saved
            if switch or chosen is None and step and step % every == 0:
                with torch.compiler.set_stance("force_eager"):  # ablation's stack has another height at each layer
                    history.append(dict(step=step, scores=[probe(model, bitc, p, d) for d, p in enumerate(probes)]))
                if rank == 0:
                    write_probe(out / "probe.csv", names, history[-1])
            if switch:  # phase I is over: the layers are chosen, once
                found = [choose(config, history, d) for d in range(len(data))]
                if world > 1:
                    dist.broadcast_object_list(found)
                chosen = [entry for entry, _ in found]
                add_heads()
                if rank == 0:
                    write_text(out / "layers.json", json.dumps(dict(zip(names, chosen)), indent=1))
                    for d, (entry, grad) in enumerate(found):
                        report(config, names[d], entry, grad, history, d)
            if rank == 0 and (step % config.eval_every == 0 or switch or end):
                with torch.no_grad(), amp():
                    x_t, u = flow_path(held.x0, held.x1, held.t)
                    val = flow_matching_loss(ema(x_t, held.t, held.cond), u, held.scored).mean().item()
                *mean, count = (sums[:4] / sums[4]).tolist() + [int(sums[4])]
                if step > line[1] and not count:
                    raise ValueError(f"no finite gradient since step {line[1]}: lower --lr {config.lr:g}, or --dtype float32")
                pace, line = (time.time() - line[0]) / max(1, step - line[1]), (time.time(), step)
                speed = world * len(batch.x1) * batch.x1.shape[1] / pace
                mean[3] = mean[3] if aligning else math.nan
                row = [f"{x:.5f}" if math.isfinite(x) else "" for x in mean] + [f"{val:.5f}", f"{lr(step):.3e}", f"{speed:.0f}"]
                write_rows(out / "log.csv", [[step, 1 + (step > warm), *row, f"{time.time() - began:.1f}"]])
                print(f"step {step:6d}  " + "  ".join(f"{k} {x or '-':>7.7}" for k, x in zip(LOG[2:7], row)) +
                      (f"  lr {row[5]}  {row[6]} frames/s  {clock(pace * (config.steps - step))} left" if count else ""), flush=True)
                sums.zero_()
            if rank == 0 and (step % config.save_every == 0 and step or switch or end):
                save(out, dict(format="agrepa 1", config=dataclasses.asdict(config), names=names, step=step, chosen=chosen,
                               spent=time.time() - began, history=history, sums=sums, domains=[d.carried() for d in data],
                               **{n: m.state_dict() for n, m in dict(model=model, bitc=bitc, heads=heads, ema=ema, opt=opt).items()}))
        if end:
            break
        torch.manual_seed(hash((config.seed, step, rank)) % 2 ** 32)  # dropout's; all else comes with the batch
        with amp():
            aligning = bool(chosen and chosen[0]["layers"]) and not 0 < config.align_until <= step
            fm, bit, align = losses(model, bitc, heads if aligning else [], chosen, batch, config)
            loss = fm + config.bit_weight * bit + config.align_weight * align  # Eq. 12
        loss.backward()
        params = [p for g in opt.param_groups for p in g["params"] if p.grad is not None]
        if world > 1:
            share_gradients(params, world)
        good = torch.nn.utils.clip_grad_norm_(params, 1.0).isfinite()
        opt.found_inf = 1 - good.float()  # a step with a gradient that isn't finite changes nothing; no wait to see it
        for group in opt.param_groups:
            group["lr"] = lr(step)
        opt.step()
        opt.zero_grad(set_to_none=True)
        decay = min(0.9999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        terms = torch.stack([loss, fm, bit, align, torch.ones_like(fm)]).detach()
        sums += torch.where(good, terms, torch.zeros_like(terms))
    return dict(zip(names, chosen))


# ---- 13. Command line ------------------------------------------------------------------------------------------------

TOY = dict(layers=6, dim=128, heads=4, seconds=1.92, batch_size=16, steps=300, lr=2e-3, teacher="MFCC", units=64,
           probe_steps=90, probe_every=15, eval_every=50)


def settings(given):
    """Flags given on the command line -> Config and the checkpoint to resume. Prepares folders of audio."""
    import data_prep
    stored, resume, first_rank = {}, None, int(os.environ.get("RANK", 0)) == 0
    if given.get("resume"):
        folder = Path(given.get("out", ""))
        if not given.get("out") or not (folder / "config.json").exists():
            raise ValueError(f"--resume: no run in --out {given.get('out', '')!r}")
        stored = json.loads((folder / "config.json").read_text())
        found = [p for p in (folder / "last.pt", folder / "previous.pt") if p.exists()]
        resume = load_checkpoint(found[0]) if found else None
    elif not given.get("data"):
        toy = {k: v for k, v in TOY.items() if k not in given}
        print("toy corpus; a small model: " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in toy.items()))
        given = {**toy, **given, "data": data_prep.toy(Path(given.get("cache", Config.cache)) / "toy-audio")}
    config = Config(**{**stored, **given})
    config.check()
    data = [data_prep.prepared(folder, config, given) for folder in config.data]
    config = dataclasses.replace(config, data=[str(d) for d in data])
    free = {"device", "compile", "eval_every", "save_every", "resume", "cache", "out", "dtype"}
    for k in (set(given) & set(stored)) - free:
        if getattr(config, k) != stored[k]:
            raise ValueError(f"--resume: {config.out} was run with --{k.replace('_', '-')} {stored[k]}, not {getattr(config, k)}")
    if not config.out:
        name = "+".join(json.loads((Path(d) / "meta.json").read_text())["name"] for d in config.data)
        config.out = str(next(p for i in itertools.count(1) if not (p := Path("runs", f"{name}-{i}")).exists()))
    if first_rank and not stored and Path(config.out).exists() and any(Path(config.out).iterdir()):
        raise ValueError(f"--out {config.out}: holds a run already; --resume goes on with it, another --out starts a new one")
    return config, resume


def add_flags(parser, names):
    for f in (f for f in dataclasses.fields(Config) if f.name in names):
        kind = dict(nargs="+") if f.name == "data" else dict(action="store_true") if f.default is False else dict(type=type(f.default))
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default else "")
        parser.add_argument("--" + f.name.replace("_", "-"), **kind, **{**f.metadata, "help": text})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    add_flags(parser, [f.name for f in dataclasses.fields(Config)])
    given = vars(parser.parse_args())
    try:
        config, resume = settings(given)
        train(config, resume)
    except (ValueError, OSError) as error:
        sys.exit(print(f"agrepa.py: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nstopped; --out RUN --resume goes on from its last checkpoint", file=sys.stderr) or 130)


if __name__ == "__main__":
    main()
