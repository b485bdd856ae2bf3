"""AG-REPA: Causal Layer Selection for Representation Alignment in Audio Flow Matching (ICML 2026, arXiv 2603.01006).

    python agrepa.py                                           # toy corpus: the whole method in minutes on a CPU
    python agrepa.py --data ./LibriTTS --steps 100000          # prepare the data, probe, select, align
    torchrun --nproc_per_node=8 agrepa.py --data ./LibriTTS    # the same on eight GPUs, the data prepared before

 1 flow matching      Eqs. 1, 2    flow_path, flow_matching_loss    8 alignment        Eq. 12    capture, AlignmentHeads, agrepa_loss
 2 velocity model     Eqs. 7, 15   VelocityModel                    9 sampling         App. A    sample, mel_to_wave
 3 teacher            T(x)         Teacher                         10 data                       BlockDataset
 4 BiT-C              Eqs. 3 to 5  BiTC                            11 training loop    App. A.5  train
 5 LASP, store        Eq. 6        lasp                            12 metrics, figures           evaluate, figures
 6 FoG-A, contribute  Eqs. 8, 9    fog_a                           13 command line               main
 7 selection          Eqs. 10, 11  select_layers

Shapes: B clips, T mel frames, N tokens, M mel bins, D width, L layers (counted from 1), dim the teacher's width.
Time comes in blocks of 0.16 s: 15 mel frames at 24 kHz, 8 teacher frames and 8 tokens a codebook at 50 Hz.
"""

import collections, contextlib, copy, dataclasses, datetime, importlib, itertools, json, math, os, random, runpy, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist, nn

RATE, HOP, N_MELS, TEACHER_RATE = 24_000, 256, 100, 16_000  # Vocos 24 kHz mel format; HuBERT's rate
FRAMES, TEACHER_FRAMES, BLOCK, FORMAT = (
    15,
    8,
    0.16,
    2,
)  # mel frames, teacher frames, seconds of a block; of prepared folders
STRATEGIES = "foga", "lasp", "gradnorm", "random", "none"

arg = lambda default, text, **kw: dataclasses.field(default=default, metadata=dict(help=text, **kw))


@dataclasses.dataclass
class Config:
    """One field, one flag."""

    data: tuple = arg(
        (),
        "folders of audio, or prepared ones; each is a domain (default: the toy corpus)",
        metavar="DIR",
    )
    out: str = arg("", "run folder (default: runs/<data>-<number>)", metavar="DIR")
    steps: int = arg(100_000, "training steps, both phases together")
    batch_size: int = arg(16, "clips a step in each process, shared equally by the domains")
    seconds: float = arg(4.8, "length of a clip, rounded to blocks of 0.16 s")
    layers: int = arg(12, "layers of the velocity model (paper: 24)")
    dim: int = arg(512, "its width (paper: 1024)")
    heads: int = arg(8, "its attention heads (paper: 16)")
    dropout: float = arg(0.0, "in the layers (paper: 0.2); its masks differ between processes")
    lr: float = arg(
        1e-4, "peak learning rate; warm-up over a third of phase I, then cosine to zero"
    )
    seed: int = arg(0, "of initialisation, crops, noise and times")
    teacher: str = arg(
        "HUBERT_BASE", "torchaudio bundle, MFCC, or FILE.py:FUNCTION or MODULE:FUNCTION"
    )
    teacher_layer: int = arg(9, "which layer of a bundle; those above are never computed")
    raw_teacher: bool = arg(False, "don't take the corpus mean off the teacher's features")
    units_teacher: str = arg("", "teacher whose k-means units are the tokens (default: the same)")
    codebooks: int = arg(
        1, "2: dense acoustic tokens interleaved with the teacher's units (Eq. 15)", choices=(1, 2)
    )
    units: int = arg(1024, "k-means units a codebook (paper: 4096)")
    probe_steps: int = arg(
        0, "steps of phase I (default: 5000, or 15 %% of the run where that is less)"
    )
    probe_every: int = arg(0, "steps between probes (default: 200, or a tenth of phase I)")
    top_k: int = arg(3, "layers to align")
    select: str = arg("foga", "foga, lasp, gradnorm, random, none, or layers such as 4,8,12")
    weights: str = arg(
        "auto",
        "foga: Eq. 11; equal: 1/K; auto: foga for --select foga, else equal",
        choices=("auto", "foga", "equal"),
    )
    align_weight: float = arg(1.0, "weight of the alignment loss")
    align_pool: str = arg(
        "clip", "clip: one target a clip (paper); block: one each 0.16 s", choices=("clip", "block")
    )
    align_until: int = arg(0, "stop aligning at this step (default: never)")
    bit_weight: float = arg(0.5, "lambda_BiT of Eq. 12")
    device: str = arg("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = arg(
        "auto",
        "auto: bfloat16 autocast where the hardware has it",
        choices=("auto", "bfloat16", "float32"),
    )
    compile: bool = arg(False, "torch.compile the layers")
    eval_every: int = arg(200, "steps between log lines, each with the held-out loss")
    save_every: int = arg(1000, "steps between checkpoints")
    resume: bool = arg(False, "go on with the run in --out")
    cache: str = arg("prepared", "where folders of audio are prepared", metavar="DIR")
    blocks = property(lambda self: round(self.seconds / BLOCK))
    phase1 = property(lambda self: self.probe_steps or max(1, min(5000, self.steps * 15 // 100)))


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
# A DiT. Each layer is h_l = h_{l-1} + m_l f_l(h_{l-1}, t, c); the gates m_l are 1 in training, and closing one means
# handing on h_{l-1}, so no gate is written down. Conditioning c enters once, in h_0: tokens and a reference mel.


class Condition(NamedTuple):
    tokens: (
        torch.Tensor
    )  # [B, N] ids, N = 8 x codebooks a block; the second codebook's ids follow the first's
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


def attention(q, k, v, mask):
    """q, k, v [B, heads, T, d], mask [B, 1, 1, T] true where a frame is real -> [B, heads, T, d]."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    score = (
        q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
    )  # on a CPU SDPA's bf16 backward is slow; this takes .8 of a step
    with torch.autocast(
        "cpu", enabled=False
    ):  # no float32 copy of the scores; softmax sums in float32 all the same
        return (score if mask is None else score.masked_fill(~mask, -math.inf)).softmax(-1) @ v


class Layer(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        (
            nn.init.zeros_(self.modulation.weight),
            nn.init.zeros_(self.modulation.bias),
        )  # adaLN-Zero: starts as the identity

    def forward(self, h, t, rope, mask=None):
        """Eq. 7. h [B, T, D], t [B, D], rope two [T, d / 2], mask [B, 1, 1, T] -> h_l [B, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(t)[:, None].chunk(6, -1)
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # [B, heads, T, d] each
        cos, sin = rope[0].to(q.dtype), rope[1].to(q.dtype)
        x = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)
        h = h + gate1 * self.drop(self.out(x.transpose(1, 2).flatten(2)))
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale2) + shift2
        return h + gate2 * self.drop(self.down(self.drop(F.gelu(self.up(x)))))


class VelocityModel(nn.Module):
    """v_theta(x_t, t, c). vocab: how many token ids (units x codebooks) each domain has."""

    def __init__(self, layers=12, dim=512, heads=8, dropout=0.0, vocab=(1024,), n_mels=N_MELS):
        super().__init__()
        self.register_buffer(
            "first_id", torch.tensor([0, *itertools.accumulate(vocab)][:-1]), persistent=False
        )
        self.tokens = nn.Embedding(sum(vocab), dim)  # one table a domain, end to end
        self.null = nn.Parameter(torch.randn(dim))  # stands for dropped tokens
        self.x_in, self.cond_in = nn.Linear(n_mels, dim), nn.Linear(dim + n_mels, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.layers = nn.ModuleList(Layer(dim, heads, dropout) for _ in range(layers))
        self.modulation, self.v_out = nn.Linear(dim, 2 * dim), nn.Linear(dim, n_mels)
        for p in (*self.modulation.parameters(), *self.v_out.parameters()):
            nn.init.zeros_(p)

    def embed(self, cond):
        """The embedded tokens e [B, N, D]; they train, the null token too."""
        e = self.tokens(cond.tokens + self.first_id[cond.domain][:, None])
        return torch.where(cond.keep[:, None, None], e, self.null)

    def condition(self, cond, e):
        """e [B, N, D] interpolated to mel frames, beside the reference mel, projected: c [B, T, D]."""
        e = F.interpolate(e.transpose(1, 2), cond.ref.shape[1], mode="linear").transpose(1, 2)
        return self.cond_in(torch.cat([e, cond.ref], -1))

    def enter(self, x_t, t, cond, c=None):
        """h_0, and what each layer is given beside it. To concatenate x_t and c, then project, is a sum of projections."""
        h = self.x_in(x_t) + (self.condition(cond, self.embed(cond)) if c is None else c)
        angle = 1000 * t[:, None] * 1e4 ** -torch.linspace(0, 1, 128, device=t.device)
        t_emb = self.time(torch.cat([angle.cos(), angle.sin()], -1))
        d = h.shape[-1] // self.layers[0].heads
        angle = torch.arange(h.shape[1], device=t.device)[:, None] * 1e4 ** -(
            torch.arange(0, d, 2, device=t.device) / d
        )
        return (
            h,
            t_emb,
            (angle.cos(), angle.sin()),
            None if cond.mask is None else spread(cond.mask, h.shape[1])[:, None, None],
        )

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
        that skips it joins. L (L + 1) / 2 layer evaluations in place of L^2. fog_a does the same gate by gate."""
        training, B = self.training, len(x_t)
        h, t_emb, rope, mask = self.eval().enter(x_t, t, cond)
        ts, masks = t_emb, mask
        for layer in self.layers:
            h = torch.cat([layer(h, ts, rope, masks), h[:B]])
            ts, masks = torch.cat([ts, t_emb]), None if mask is None else torch.cat([masks, mask])
        v = self.train(training).leave(h, ts, masks).unflatten(0, (-1, B))
        return v[0], v[1:]


# ---- 3. Teacher, T(x) ------------------------------------------------------------------------------------------------
# A frozen model of sound: waveform at 16 kHz to features at 50 Hz. It runs once, in preparation. Features are averaged
# over blocks; a clip's T(x) is the mean of its blocks, less the corpus mean: else every clip has nearly one target.


class Teacher(nn.Module):
    """Waveform [B, n x 2560] at 16 kHz -> features [B, n x 8, dim]. Raises ValueError if it can't be had or won't fit."""

    def __init__(self, spec="HUBERT_BASE", layer=9):
        super().__init__()
        import torchaudio  # here: neither --help nor training waits for it

        bundle = getattr(torchaudio.pipelines, spec, None) if spec.isupper() else None
        if (
            spec == "MFCC"
        ):  # HuBERT's own first target: 13 coefficients, their deltas, and the deltas' deltas
            mfcc, delta = torchaudio.transforms.MFCC, torchaudio.functional.compute_deltas
            self.net = mfcc(
                TEACHER_RATE,
                13,
                log_mels=True,
                melkwargs=dict(n_fft=400, hop_length=320, n_mels=26, center=False),
            )
            stack = lambda x: torch.cat([x, delta(x), delta(delta(x))], 1).transpose(1, 2)
            self.features = lambda wave: stack(self.net(wave))
        elif hasattr(bundle, "get_model"):
            if layer > (depth := bundle._params["encoder_num_layers"]):
                raise ValueError(f"--teacher-layer {layer} but {spec} has {depth} layers")
            try:
                self.net = bundle.get_model()
            except OSError as error:  # no network
                raise ValueError(
                    f"--teacher {spec}: {error}. Put https://download.pytorch.org/torchaudio/models/{bundle._path} into "
                    f"{torch.hub.get_dir()}/checkpoints, or take --teacher MFCC, which needs no download"
                ) from None
            self.features = lambda wave: self.net.extract_features(wave, num_layers=layer)[0][-1]
        elif ":" in spec:
            place, function = spec.rsplit(":", 1)
            try:
                found = (
                    runpy.run_path(place)
                    if place.endswith(".py")
                    else vars(importlib.import_module(place))
                )
                self.net = self.features = found[function]()
            except (OSError, ImportError, KeyError) as error:
                raise ValueError(f"--teacher {spec}: {type(error).__name__}: {error}") from None
        else:
            raise ValueError(
                f"--teacher {spec}: not MFCC, HUBERT_BASE or another of torchaudio.pipelines, FILE.py:FUNCTION or MODULE:FUNCTION"
            )
        self.eval().requires_grad_(False)
        for self.pad in (
            0,
            80,
        ):  # HuBERT's receptive field of 400 samples costs a frame; 80 zeros give it back
            shape = self.features(torch.zeros(1, 2 * 2560 + self.pad)).shape
            if len(shape) == 3 and shape[1] == 2 * TEACHER_FRAMES:
                self.dim, self.place = (
                    shape[2],
                    torch.zeros(1, 1),
                )  # place: see data_prep.place_means
                return
        raise ValueError(
            f"--teacher {spec}: 0.32 s at 16 kHz gave {list(shape)}, need [1, 16, dim]: 50 Hz"
        )

    @torch.no_grad()
    def forward(self, wave):
        return (x := self.features(F.pad(wave, (0, self.pad)))) - self.place[: x.shape[1]].to(
            x.device
        )


def pool_teacher(blocks, mask=None):
    """T(x): centred features [B, n, dim], a row a block -> [B, dim], the mean over real blocks; exact for any crop."""
    return (
        blocks.mean(1)
        if mask is None
        else (blocks * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    )


# ---- 4. BiT-C (Eqs. 3 to 5) ------------------------------------------------------------------------------------------
# Ties the token interface to the teacher: one linear head P_d on the pooled embedded tokens. It trains the tokens to
# carry what the teacher knows, and gives LASP a head that was never fitted to a layer.


class BiTC(nn.Module):
    def __init__(self, dim, teacher_dim):
        super().__init__()
        self.P = nn.Linear(dim, teacher_dim)

    def forward(self, e, T_x, mask=None):
        """Eqs. 3, 4: e [B, N, D], T_x [B, dim], mask [B, N] -> s = cos(P z, T(x)) [B]."""
        w = torch.ones_like(e[..., :1]) if mask is None else mask[..., None]
        z = (e * w).float().sum(1) / w.sum(1).clamp(min=1)
        z = F.layer_norm(z, z.shape[-1:])  # no gain, no bias: P follows
        return F.cosine_similarity(self.P(z).float(), T_x, dim=-1)


def bitc_loss(s, kept):
    """Eq. 5, one domain: s [B]; kept [B] weighs the clips that kept their tokens, 0 the others, sum 1 -> scalar."""
    return (kept * (1 - s)).sum()


# ---- 5. LASP: what a layer stores (Eq. 6) ----------------------------------------------------------------------------
# BiT-C's score with a layer's hidden state where the tokens were: the same head, frozen, for all layers.


@torch.no_grad()
def lasp(hidden, bitc, T_x, mask=None):
    """hidden {layer: [B, T, D]}, bitc the domain's head, T_x [B, dim], mask [B, T] -> [L, B], layers ascending."""
    return torch.stack([bitc(hidden[k], T_x, mask) for k in sorted(hidden)])


# ---- 6. FoG-A: what a layer contributes (Eqs. 8, 9) ------------------------------------------------------------------
# Close one layer's gate in a forward pass and see how far the velocity moves. Works on any residual network: paste
# this section into your model's code. No gradient, eval mode, the same random numbers in every pass.


def relative_change(v, v_k, eps=1e-8):
    """Eq. 9, a sample: ||v^{\\k} - v|| / (||v|| + eps). v [B, ...], v_k [L, B, ...] -> [L, B]. Norms in float32."""
    return (v_k.float() - v.float()).flatten(2).norm(dim=2) / (
        v.float().flatten(1).norm(dim=1) + eps
    )


def hand_on(k, output, args, kwargs, hidden):
    """What block k returns with its gate closed: for each output tensor, the block's own input of that name or shape."""
    inputs = {name: x for name, x in [*enumerate(args), *kwargs.items()] if torch.is_tensor(x)}
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    names = hidden if isinstance(hidden, (tuple, list)) else [hidden] * len(outputs)
    fits = [
        [n for n, i in inputs.items() if i.shape == x.shape and name in (None, n)]
        if torch.is_tensor(x) and (hidden is None or name is not None)
        else None
        for name, x in zip(names, outputs)
    ]
    found = [f[0] for f in fits if f is not None and len(f) == 1]
    if not found or len(set(found)) < len(fits) - fits.count(None) or len(names) < len(outputs):
        shape = lambda x: list(x.shape) if torch.is_tensor(x) else type(x).__name__
        raise ValueError(
            f"fog_a: can't tell block {k}'s hidden state: it returns {[*map(shape, outputs)]} from "
            f"{ {n: shape(x) for n, x in inputs.items()} }. With no such input it is not a residual block; with several, name one, as "
            "hidden=0 or hidden='x'; for several outputs a tuple, one an output, None to leave one as it is"
        )
    closed = [x if f is None else inputs[f[0]].to(x.dtype) for f, x in zip(fits, outputs)]
    return (
        closed[0]
        if torch.is_tensor(output)
        else type(output)(*closed)
        if hasattr(output, "_fields")
        else type(output)(closed)
    )


@torch.no_grad()
def fog_a(velocity, blocks, *inputs, hidden=None, eps=1e-8):
    """FoG-A of any residual network. velocity(*inputs) -> tensor [B, ...]; blocks: its residual modules, in order, each
    with its own sum h + f(h), not in place.
    hidden: position or keyword of the hidden state among a block's arguments, needed only where shapes can't tell;
    a tuple, one an output, where blocks return several. -> scores [L, B]; average over B for Eq. 9's expectation.
    Raises ValueError for a block that never ran, or whose output matches no input."""
    now, fired, blocks, chance = None, set(), list(blocks), random.getstate()
    gpus = sorted({p.device.index for b in blocks for p in b.parameters() if p.is_cuda})

    def gate(block, args, kwargs, output):
        fired.add(block)
        return (
            hand_on(blocks.index(block) + 1, output, args, kwargs, hidden) if block is now else None
        )

    def run():  # each pass replays, and leaves, the same random state; compiled models would not see the hooks
        with torch.random.fork_rng(devices=gpus), torch.compiler.set_stance("force_eager"):
            v = velocity(*inputs)
        random.setstate(chance)
        if not torch.is_tensor(v):
            raise ValueError(
                f"fog_a: velocity() returns {type(v).__name__}; wrap it to return the velocity alone"
            )
        return v

    modes, scores = [(m, m.training) for b in blocks for m in b.modules()], []
    hooks = [b.register_forward_hook(gate, with_kwargs=True) for b in blocks]
    try:
        for m, _ in modes:
            m.training = False
        v = run()
        if silent := [k for k, b in enumerate(blocks, 1) if b not in fired]:
            raise ValueError(
                f"fog_a: blocks {silent} never ran in velocity(); is one a bare ModuleList, which is never called?"
            )
        for now in blocks:
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
    if not equal and not (scores.any() and scores.min() >= 0):
        raise ValueError(
            f"negative scores: {scores.tolist()}"
            if scores.any()
            else "no layer contributes, every FoG-A "
            "score is 0: adaLN-Zero starts with all gates closed, so train some steps before probing"
        )
    best = scores.argsort(descending=True, stable=True)[:k]
    lam = torch.full((k,), 1 / k) if equal else scores[best] / scores[best].sum()
    return (best + 1).tolist(), lam.tolist()


# ---- 8. Alignment (Eq. 12) -------------------------------------------------------------------------------------------
# A small head a layer maps the pooled hidden state to the teacher's space; the loss is one minus the cosine.


@contextlib.contextmanager
def capture(blocks, layers, output=None):
    """Hidden states of any model, with gradient, in the forward pass you make anyway.
        with capture(model.blocks, [1, 9, 5]) as hidden:
            v = model(...)                      # hidden[9] is what the ninth block returned
    output: which one, where blocks return several tensors. Raises ValueError for a block that never ran, or whose
    state carries no gradient (inside a re-entrant activation checkpoint it is detached)."""
    hidden, layers = {}, list(layers)
    if not all(1 <= k <= len(blocks) for k in layers):
        raise ValueError(f"capture: layers {layers} of {len(blocks)}; they count from 1")

    def keep(k, out):
        hidden[k] = out if torch.is_tensor(out) or output is None else out[output]
        if not torch.is_tensor(hidden[k]):
            raise ValueError(
                f"capture: block {k} returns {type(out).__name__}; say which of its tensors, as output=0"
            )

    hooks = [
        blocks[k - 1].register_forward_hook(lambda block, args, out, k=k: keep(k, out))
        for k in layers
    ]
    try:
        yield hidden
    finally:
        for h in hooks:
            h.remove()
    for k in layers:
        if k not in hidden:
            raise ValueError(
                f"capture: block {k} never ran; a compiled model ignores hooks: compile its blocks instead"
            )
        if (
            torch.is_grad_enabled()
            and not hidden[k].requires_grad
            and any(p.requires_grad for p in blocks[k - 1].parameters())
        ):
            raise ValueError(
                f"capture: block {k}'s state carries no gradient; checkpoint with use_reentrant=False"
            )


class AlignmentHeads(nn.ModuleDict):
    """h_phi_k: a two-layer MLP for each chosen layer, D -> teacher's dim."""

    def __init__(self, layers, dim, teacher_dim, width=192):
        mlp = lambda: nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, teacher_dim))
        super().__init__({str(k): mlp() for k in layers})


def agrepa_loss(hidden, heads, T_x, weights, mask=None):
    """Eq. 12's sum over k of lambda_k (1 - cos(h_phi_k(pool(h_k)), T(x))), a clip. hidden {k: [B, T, D]}, weights
    {k: lambda_k}, mask [B, T]. T_x [B, dim], or [B, n, dim]: n equal stretches, each with its own target. -> [B]."""
    T_x, loss = T_x[:, None] if T_x.dim() == 2 else T_x, torch.zeros(len(T_x), device=T_x.device)
    for k, lam in weights.items():
        w = torch.ones_like(hidden[k][..., :1]) if mask is None else mask[..., None]
        h, w = (
            (x.float()).unflatten(1, (T_x.shape[1], -1)).sum(2) for x in (hidden[k] * w, w)
        )  # sums over a stretch
        far = 1 - F.cosine_similarity(
            heads[str(k)](h / w.clamp(min=1)).float(), T_x, dim=-1
        )  # [B, n]
        real = w[..., 0] > 0
        loss = loss + lam * (far * real).sum(1) / real.sum(1)
    return loss


# ---- 9. Sampling (App. A) --------------------------------------------------------------------------------------------
# From noise to mel along the velocity field, and from mel to sound. Whole files: data_prep.resynthesise.


def mel_to_wave(mel, vocoder="griffinlim"):
    """log_mel's inverse: [B, n, 100] -> [B, n x 256] at 24 kHz. Griffin-Lim on least-squares magnitudes; or vocos, which
    reads this very format. Raises ValueError if vocos or its weights are missing."""
    import torchaudio

    mel = torch.cat([mel, mel[:, -1:]], 1).transpose(
        1, 2
    )  # frames are centred: one more closes the last hop
    if vocoder == "vocos":
        try:
            from vocos import Vocos

            return (
                Vocos.from_pretrained("charactr/vocos-mel-24khz")
                .to(mel.device)
                .decode(mel)[:, : HOP * (mel.shape[2] - 1)]
            )
        except Exception as error:  # no package, or any of a hub's errors
            raise ValueError(
                f"--vocoder vocos: {type(error).__name__}: {error}; pip install vocos, or take griffinlim"
            ) from None
    bank = torchaudio.functional.melscale_fbanks(513, 0, RATE / 2, N_MELS, RATE).to(mel)
    magnitude = (torch.linalg.pinv(bank.T) @ mel.exp()).clamp(min=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # first phases: the same sound each time
        return torchaudio.transforms.GriffinLim(1024, n_iter=64, hop_length=HOP, power=1).to(
            mel.device
        )(magnitude)


@torch.no_grad()
def sample(model, cond, x0, nfe=32, guidance=3.0, sway=-1.0, join=lambda v: v):
    """x0 [B, T, M] noise -> x1 by nfe Euler steps. guidance w: v_u + w (v_c - v_u), where v_u lacks the tokens and keeps
    the reference mel; 1 is off. sway < 0: finer steps near the noise (F5-TTS). join: makes windows' velocities agree."""
    twice = (
        (lambda x: x) if guidance == 1 else (lambda x: x if x is None else torch.cat([x, x]))
    )  # both passes, one batch
    cond = Condition(*map(twice, cond))
    cond = cond._replace(
        keep=cond.keep & (torch.arange(len(cond.keep), device=x0.device) < len(x0))
    )
    c, x, t = (
        model.condition(cond, model.embed(cond)),
        x0,
        torch.linspace(0, 1, nfe + 1),
    )  # tokens are embedded once
    t = t + sway * (torch.cos(math.pi / 2 * t) - 1 + t)
    for now, step in zip(t.tolist(), t.diff().tolist()):
        v = model(twice(x), torch.full((len(cond.keep),), now, device=x0.device), cond, c)
        v_c, v_u = v[: len(x)], v[-len(x) :]
        x = x + step * join(v_u + guidance * (v_c - v_u))
    return x


# ---- 10. Data --------------------------------------------------------------------------------------------------------
# A prepared folder is one domain: memory-mapped rows, one a block; an utterance is a run of rows, held-out ones last.
# Every draw of a step is a function of (seed, step, domain, sample): neither resuming nor more processes change it.


class Batch(NamedTuple):
    """b clips of each domain, domain after domain, B in all."""

    x0: torch.Tensor  # [B, T, M] noise
    x1: torch.Tensor  # [B, T, M] log-mel, normalised by the domain's mean and deviation
    t: torch.Tensor  # [B]
    cond: Condition
    blocks: list  # a domain each: [b, n, dim] teacher features, centred, a row a block
    kept: (
        torch.Tensor
    )  # [B] Eq. 5's weights: 1 / (how many of the domain's clips kept their tokens), or 0
    scored: torch.Tensor  # [B, T] frames that metrics count: real, and after the reference prefix


class BlockDataset:
    """A folder made by data_prep.py. Raises ValueError where it isn't one."""

    def __init__(self, folder, raw_teacher=False):
        try:
            self.meta = json.loads((Path(folder) / "meta.json").read_text())
            self.mel, self.tokens, self.teacher, self.units, self.place, offsets = (
                np.load(Path(folder) / f"{x}.npy", mmap_mode="r")
                for x in "mel tokens teacher units place offsets".split()
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: not a prepared folder ({error})") from None
        if (
            self.meta["format"] != FORMAT
            or not len(self.mel) == len(self.tokens) == len(self.teacher) == offsets[-1]
        ):
            raise ValueError(
                f"{folder}: its arrays don't belong together, or another version made it; prepare it again"
            )
        self.offsets, self.train = (
            np.array(offsets),
            len(offsets) - 1 - self.meta["held_out"],
        )  # utterances to train on
        self.centre, self.dim = (
            np.float32(0 if raw_teacher else self.meta["teacher_mean"]),
            self.teacher.shape[1],
        )

    def clip(self, u, start, n):
        """n blocks of utterance u from block `start` -> mel [n x 15, M], ids [n x 8 x codebooks], teacher [n, dim], and how
        many blocks are real. Past the utterance's end: zeros, and its last id, so that interpolation sees no edge."""
        a = self.offsets[u] + start
        real = int(min(n, self.offsets[u + 1] - a))
        rows, pad = (
            slice(a, a + real),
            lambda x: np.pad(x, [(0, n - real), *[(0, 0)] * (x.ndim - 1)]),
        )
        mel = (self.mel[rows].astype(np.float32) - self.meta["mel_mean"]) / self.meta["mel_std"]
        ids = self.tokens[rows].astype(np.int64).reshape(-1)
        ids = np.pad(ids, (0, n * self.tokens.shape[1] - len(ids)), mode="edge")
        return (
            pad(mel).reshape(n * FRAMES, -1),
            ids,
            pad(self.teacher[rows].astype(np.float32) - self.centre),
            real,
        )


def make_batch(datasets, config, b, step=None, rank=0, world=1, domains=None, device="cpu"):
    """Step `step`'s clips, b a domain, for this rank; without a step, b fixed held-out clips, the same in every run."""
    n, rows, blocks = config.blocks, [], []
    for d in domains or range(len(datasets)):
        data, key = datasets[d], (0, d) if step is None else (1 + config.seed, d, step)
        draws = np.random.default_rng(key).random((b * world, 6))
        kept = (draws[:, 0] >= 0.1) | (step is None)  # 10 % lose their tokens
        for i in range(rank * b, rank * b + b):
            where, start, t, prompt, length = draws[i, 1:]
            if step is None:  # evenly over the utterances, times by the golden ratio
                u, t = data.train + i * data.meta["held_out"] // b, (0.5 + i * 0.618034) % 1
            else:  # a random block's utterance: long ones come more often
                u = (
                    np.searchsorted(
                        data.offsets, int(where * data.offsets[data.train]), side="right"
                    )
                    - 1
                )
            mel, ids, target, real = data.clip(
                u, int(start * max(1, data.offsets[u + 1] - data.offsets[u] - n + 1)), n
            )
            prompt = (
                int(length * 0.3 * real * FRAMES) if prompt >= 0.1 else 0
            )  # at most 30 %; 10 % have none
            noise = np.random.default_rng((*key, i)).standard_normal(mel.shape, dtype=np.float32)
            rows.append(
                (
                    noise,
                    mel,
                    np.float32(t),
                    ids,
                    d,
                    kept[i],
                    world * kept[i] / max(1, kept.sum()),
                    prompt,
                    real,
                )
            )
            blocks.append(target)

    def put(x):  # pinned, and copied while the step before runs
        x = torch.from_numpy(np.ascontiguousarray(x))
        return (
            x.pin_memory().to(device, non_blocking=True)
            if torch.device(device).type == "cuda"
            else x.to(device)
        )

    x0, x1, t, ids, domain, keep, kept, prompt, real = map(np.stack, zip(*rows))
    after, inside = np.arange(x1.shape[1]) >= prompt[:, None], np.arange(n) < real[:, None]
    cond = Condition(
        put(ids),
        put(np.where(after[..., None], np.float32(0), x1)),
        put(domain),
        put(keep),
        None if inside.all() else put(inside),
    )  # flash attention takes no mask
    blocks = [put(np.stack(blocks[i : i + b])) for i in range(0, len(blocks), b)]
    return Batch(
        put(x0),
        put(x1),
        put(t),
        cond,
        blocks,
        put(np.float32(kept)),
        put(after & inside.repeat(FRAMES, 1)),
    )


def loader(datasets, config, first, rank, world, device):
    """Batches from step `first` on, the next four assembled in threads while one is trained on."""
    make = lambda step: make_batch(
        datasets, config, config.batch_size // len(datasets), step, rank, world, device=device
    )
    with ThreadPoolExecutor(4) as pool:
        coming = collections.deque(pool.submit(make, first + i) for i in range(4))
        for step in itertools.count(first + 4):
            yield coming.popleft().result()
            coming.append(pool.submit(make, step))


# ---- 11. Training loop (App. A.5: probe, then intervene) -------------------------------------------------------------

PROBE_TIMES, PROBE_CLIPS = (0.1, 0.3, 0.5, 0.7, 0.9), 8
LOG = "step phase loss fm bitc align val_fm lr frames_per_s seconds"


def losses(model, bitc, heads, chosen, batch, config):
    """The terms of Eq. 12: L_FM, L_BiT, alignment. bitc, heads, chosen: one entry a domain; no heads, no alignment."""
    cond, b = batch.cond, len(batch.x1) // len(bitc)
    e, (x_t, u) = model.embed(cond), flow_path(batch.x0, batch.x1, batch.t)
    taps = sorted({k for c in chosen for k in c["layers"]}) if len(heads) else []
    with capture(model.layers, taps) as hidden:
        v = model(x_t, batch.t, cond, model.condition(cond, e))
    fm = flow_matching_loss(v, u, spread(cond.mask, v.shape[1])).mean()
    bit = align = torch.zeros((), device=v.device)
    for d, head in enumerate(bitc):
        own = slice(d * b, d * b + b)
        mask = None if cond.mask is None else cond.mask[own]
        T_x = pool_teacher(batch.blocks[d], mask)
        bit = bit + bitc_loss(head(e[own], T_x, spread(mask, e.shape[1])), batch.kept[own])
        if taps:
            lam, target = (
                dict(zip(chosen[d]["layers"], chosen[d]["weights"])),
                T_x if config.align_pool == "clip" else batch.blocks[d],
            )
            far = agrepa_loss(
                {k: hidden[k][own] for k in lam}, heads[d], target, lam, spread(mask, v.shape[1])
            )
            align = align + far.mean() / len(bitc)
    return fm, bit, align


def probe(model, bitc, batch, d=0):
    """FoG-A, LASP and the gradient norm of L_FM, a layer, on domain d's fixed clips at each of PROBE_TIMES, in eval mode
    and float32: the scores are differences of close numbers. -> three lists [L][times]"""
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
        grads = torch.stack([g.norm() for g in grads]).view(len(model.layers), -1).norm(dim=1)
        out.append(torch.stack([foga, store, grads]))
    model.train(training)
    return torch.stack(out, -1).tolist()


def choose(config, history, d, name, say=print):
    """Domain d's entry of layers.json, from the mean of the probes in phase I's second half; says the table."""
    late = [p["scores"][d] for p in history if p["step"] > config.phase1 / 2]
    foga, store, grad = torch.tensor(late, dtype=torch.float64).mean((0, -1)).tolist()  # [L] each
    lots = torch.rand(
        config.layers, generator=torch.Generator().manual_seed(1000 * config.seed + d)
    ).tolist()
    scores = dict(foga=foga, lasp=store, gradnorm=grad, random=lots).get(config.select)
    layers = (
        select_layers(scores, config.top_k, equal=True)[0]
        if scores
        else [int(k) for k in config.select.split(",") if k != "none"]
    )
    shares = config.weights == "foga" or (config.weights, config.select) == (
        "auto",
        "foga",
    )  # Eq. 11, among the chosen
    order, lam = (
        select_layers([foga[k - 1] for k in layers], len(layers), equal=not shares)
        if layers
        else ([], [])
    )
    lam = {layers[i - 1]: w for i, w in zip(order, lam)}
    say(
        f"\n{name}: mean of {len(late)} probes up to step {history[-1]['step']}\nlayer   FoG-A    LASP  grad norm  lambda"
    )
    for k, row in enumerate(zip(foga, store, grad), 1):
        say(
            "{:5d}  {:6.4f}  {:6.3f}  {:9.4f}".format(k, *row)
            + (f"  {lam[k]:6.3f}  chosen" if k in lam else "")
        )
    if config.select == "foga":
        K, (*_, last, following) = (
            config.top_k,
            sorted([0.0, *foga], reverse=True)[: config.top_k + 1],
        )
        say(f"margin: layer {layers[-1]} is {last / max(following, 1e-12) - 1:.1%} above the next")
        common = [
            len({*layers} & {*select_layers(torch.tensor(p["scores"][d][0]).mean(1), K, True)[0]})
            for p in history[-3:]
        ]
        say(
            f"of these {K} layers, the last probes each have {', '.join(map(str, common))} in their top {K}"
            + (
                "\nwarning: the ranking was still moving; more --probe-steps would settle it"
                if min(common) < K
                else ""
            )
        )
    return dict(layers=list(lam), weights=list(lam.values()), foga=foga, lasp=store)


def launch(config):
    """Device, processes, precision. -> rank, world, device, amp(). Raises ValueError for a device that isn't there."""
    rank, world, local = (
        int(os.environ.get(k, default))
        for k, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    best = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    try:
        device = torch.device(best if config.device == "auto" else config.device)
        if device.type == "cuda" and world > 1:
            torch.cuda.set_device(device := torch.device("cuda", local))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device}: {str(error).splitlines()[0]}") from None
    has = dict(
        cuda=lambda: torch.cuda.is_bf16_supported(False), cpu=torch.cpu._is_avx512_bf16_supported
    ).get(device.type, bool)
    low = config.dtype == "bfloat16" or config.dtype == "auto" and has()
    return rank, world, device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=low)


def groups(module):
    """AdamW's parameter groups: weight decay on matrices; none on the token table, biases and the null token."""
    pick = lambda decays: [
        p
        for name, p in module.named_parameters()
        if (p.ndim > 1 and name != "tokens.weight") == decays
    ]
    return [dict(params=pick(True), weight_decay=0.1), dict(params=pick(False), weight_decay=0.0)]


def build(config, domains):  # the meta of each
    return VelocityModel(
        config.layers,
        config.dim,
        config.heads,
        config.dropout,
        [m["units"] * m["codebooks"] for m in domains],
    )


def write_text(path, text):
    Path(f"{path}.part").write_text(text)
    os.replace(f"{path}.part", path)


def write_table(path, header, rows):
    write_text(path, "\n".join(",".join(map(str, row)) for row in [header.split(), *rows]) + "\n")


def save(folder, state):
    """last.pt, by way of a file that is renamed when whole; the one before stays as previous.pt."""
    torch.save(state, folder / "last.pt.part")
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    os.replace(folder / "last.pt.part", folder / "last.pt")


def load_checkpoint(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state if state["format"] == "agrepa 2" else 1 / 0
    except Exception as error:  # torch.load raises a dozen kinds
        raise ValueError(
            f"{path}: not a whole checkpoint of agrepa.py ({type(error).__name__})"
        ) from None


def train(config, resume=None):
    """One run, two phases; all it writes stands in config.out. resume: a checkpoint of this run. -> layers.json's content"""
    rank, world, device, amp = launch(config)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    out, data = Path(config.out), [BlockDataset(d, config.raw_teacher) for d in config.data]
    names = [d.meta["name"] for d in data]
    names = [n if names.count(n) == 1 else f"{n}-{i}" for i, n in enumerate(names, 1)]
    warm, every = config.phase1, config.probe_every or max(1, min(200, config.phase1 // 10))
    torch.manual_seed(config.seed)
    model = build(config, [d.meta for d in data]).to(device)
    bitc, heads = nn.ModuleList(BiTC(config.dim, d.dim) for d in data).to(device), nn.ModuleList()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.AdamW([*groups(model), *groups(bitc)], lr=config.lr, fused=True)
    parts = dict(model=model, bitc=bitc, heads=heads, ema=ema, opt=opt)
    first, spent, chosen, history, log, aligning = 0, 0.0, None, [], [], False
    sums = torch.zeros(
        5, device=device
    )  # since the last line of the log: loss, fm, bitc, align, and how many steps

    def add_heads():  # known only after phase I, its parameters join the optimiser
        torch.manual_seed(config.seed + 1)  # alike on every rank
        heads.extend(
            AlignmentHeads(c["layers"], config.dim, d.dim).to(device) for c, d in zip(chosen, data)
        )
        for group in groups(heads):
            opt.add_param_group(group)

    if resume:
        first, spent, chosen, history, log = (
            resume[k] for k in ("step", "spent", "chosen", "history", "log")
        )
        if chosen:
            add_heads()
        for name, part in parts.items():
            part.load_state_dict(resume[name])
        sums.copy_(resume["sums"])
    for layer in (
        model.layers if config.compile else ()
    ):  # layer by layer: one graph serves all, and capture's hooks still see each
        layer.forward = torch.compile(layer.forward)
    held = make_batch(data, config, 16, device=device)
    probes = [
        make_batch(data, config, PROBE_CLIPS, domains=[d], device=device) for d in range(len(data))
    ]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        print(
            *(
                f"domain {n}: {d.meta['hours']:.2f} h, teacher {d.meta['teacher']}, {d.meta['units']} units"
                for n, d in zip(names, data)
            ),
            sep="\n",
        )
        print(
            f"{config.layers} layers of width {config.dim}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, on "
            f"{world} x {device.type}; phase I to step {warm}, a probe every {every}; run folder {out}"
        )
    lr = lambda step: (
        config.lr
        * min((step + 1) / max(1, warm // 3), 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
    )
    began, line = time.time() - spent, (time.time(), first)

    for step, batch in zip(
        range(first, config.steps + 1), loader(data, config, first, rank, world, device)
    ):
        end, switch, new = (
            step == config.steps,
            chosen is None and step == warm,
            step > first or not resume,
        )
        if new and (switch or chosen is None and step and step % every == 0):
            with torch.compiler.set_stance(
                "force_eager"
            ):  # ablation's stack has another height at each layer
                history.append(
                    dict(step=step, scores=[probe(model, bitc, p, d) for d, p in enumerate(probes)])
                )
            if rank == 0:  # an empty t is the mean over t
                write_table(
                    out / "probe.csv",
                    "step domain layer t foga lasp gradnorm",
                    [
                        [p["step"], name, k, t, *(f"{x:.6g}" for x in row)]
                        for p in history
                        for name, scores in zip(names, p["scores"])
                        for k, s in enumerate(zip(*scores), 1)
                        for t, *row in [*zip(PROBE_TIMES, *s), ("", *map(np.mean, s))]
                    ],
                )
        if new and switch:  # phase I is over: the layers are chosen, once
            chosen = [
                choose(config, history, d, name, print if rank == 0 else lambda text: None)
                for d, name in enumerate(names)
            ]
            if world > 1:
                dist.broadcast_object_list(chosen)
            add_heads()
            if rank == 0:
                write_text(out / "layers.json", json.dumps(dict(zip(names, chosen)), indent=1))
        if new and rank == 0 and (step % config.eval_every == 0 or switch or end):
            with torch.no_grad(), amp():
                x_t, u = flow_path(held.x0, held.x1, held.t)
                val = flow_matching_loss(ema(x_t, held.t, held.cond), u, held.scored).mean().item()
            *total, count = sums.tolist()
            if step > line[1] and not count:
                raise ValueError(
                    f"no finite gradient since step {line[1]}: lower --lr {config.lr:g}, or --dtype float32"
                )
            pace, line = (time.time() - line[0]) / max(1, step - line[1]), (time.time(), step)
            mean = [
                f"{x / count:.5f}" if count and (aligning or i < 3) else ""
                for i, x in enumerate(total)
            ]
            speed = f"{batch.x1[..., 0].numel() * world / pace:.0f}" if count else ""
            log.append(
                [
                    step,
                    1 + (step > warm),
                    *mean,
                    f"{val:.5f}",
                    f"{lr(step):.3e}",
                    speed,
                    f"{time.time() - began:.1f}",
                ]
            )
            write_table(out / "log.csv", LOG, log)
            left = datetime.timedelta(seconds=int(pace * (config.steps - step)))
            shown = [
                (k, "-" if x == "" else x)
                for k, x in zip(LOG.split(), log[-1])
                if k not in ("phase", "loss", "seconds")
            ]
            print(*(f"{k} {x:>7} " for k, x in shown), f"{left} left" if count else "", flush=True)
            sums.zero_()
        if new and rank == 0 and step and (step % config.save_every == 0 or switch or end):
            domains = [
                {
                    **d.meta,
                    "skipped": None,
                    "centroids": torch.tensor(np.array(d.units)),
                    "place": torch.tensor(np.array(d.place)),
                }
                for d in data
            ]
            save(
                out,
                dict(
                    format="agrepa 2",
                    config=dataclasses.asdict(config),
                    names=names,
                    domains=domains,
                    step=step,
                    chosen=chosen,
                    sums=sums,
                    history=history,
                    log=log,
                    spent=time.time() - began,
                    **{k: p.state_dict() for k, p in parts.items()},
                ),
            )
        if end:
            return dict(zip(names, chosen))
        torch.manual_seed(
            hash((config.seed, step, rank)) % 2**32
        )  # dropout's; all else comes with the batch
        aligning = bool(chosen and chosen[0]["layers"]) and not 0 < config.align_until <= step
        with amp():
            fm, bit, align = losses(model, bitc, heads if aligning else [], chosen, batch, config)
            loss = fm + config.bit_weight * bit + config.align_weight * align  # Eq. 12
        loss.backward()
        params = [p for g in opt.param_groups for p in g["params"] if p.grad is not None]
        if world > 1:  # the mean over processes, in one message
            dist.all_reduce(
                flat := nn.utils.parameters_to_vector(grads := [p.grad for p in params])
            )
            nn.utils.vector_to_parameters(flat / world, grads)
        good = nn.utils.clip_grad_norm_(params, 1.0).isfinite()
        opt.found_inf = (
            1 - good.float()
        )  # a gradient that isn't finite changes nothing, and nobody waits to see it
        for group in opt.param_groups:
            group["lr"] = lr(step)
        opt.step()
        opt.zero_grad(set_to_none=True)
        torch._foreach_lerp_(
            list(ema.parameters()),
            list(model.parameters()),
            1 - min(0.9999, (1 + step) / (10 + step)),
        )
        sums += torch.where(
            good,
            torch.stack([loss, fm, bit, align, torch.ones_like(fm)]).detach(),
            torch.zeros_like(sums),
        )


# ---- 12. Metrics and figures (tables, Fig. 1) ------------------------------------------------------------------------


def frechet(a, b):
    """Between Gaussians fitted to rows a [n, d] and b [m, d]: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2))."""
    A, B = np.cov(a.T), np.cov(b.T)
    w, U = np.linalg.eigh(A)
    root = (U * np.sqrt(w.clip(0))) @ U.T
    return float(
        ((a.mean(0) - b.mean(0)) ** 2).sum()
        + np.trace(A + B)
        - 2 * np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(0)).sum()
    )


@torch.no_grad()
def evaluate(path, named=(), device="cpu"):
    """A checkpoint's metrics on held-out clips, the reference prefix left out; also into metrics.json beside it."""
    from data_prep import assign, listen, resample, restore, teachers

    (state, config, model, amp), found = restore(path, device), {}
    n, p, data = (
        config.blocks,
        max(1, int(0.3 * config.blocks)),
        [BlockDataset(folder) for folder in config.data],
    )
    after = (
        torch.arange(n * FRAMES, device=device)[:, None] >= p * FRAMES
    )  # the prefix is p blocks of n
    real = lambda cond: (
        torch.ones(cond.ref.shape[0], n - p, dtype=torch.bool, device=device)
        if cond.mask is None
        else cond.mask[:, p:]
    )
    pick = lambda x, cond: x.unflatten(0, (-1, n, TEACHER_FRAMES))[:, p:][
        real(cond)
    ]  # [B x n x 8, ...] -> [rows, 8, ...]

    def hear(
        mel, cond
    ):  # through the same vocoder -> teacher's rows and units of the real blocks after the prefix
        wave = torch.cat(
            [mel_to_wave(x) for x in (mel * meta["mel_std"] + meta["mel_mean"]).split(16)]
        ).flatten()  # clip after clip
        features = listen(teacher, wave := resample(wave, RATE, TEACHER_RATE))
        units = assign(
            features if listener is teacher else listen(listener, wave),
            meta["centroids"][:, : listener.dim].to(device),
        )
        return pick(features, cond).mean(1).cpu().double().numpy(), pick(units, cond)

    for d, (name, meta) in enumerate(zip(state["names"], state["domains"])):
        (teacher, listener), dim, ends = teachers(meta, named, device), meta["dim"], data[d].offsets
        clips = max(
            1, min(max(64, 3 * dim // max(1, n - p)), int(ends[-1] - ends[data[d].train]) // n)
        )
        held, other = (
            make_batch(
                data, dataclasses.replace(config, seed=0), clips, step, domains=[d], device=device
            )
            for step in (None, 0)
        )
        if (rows := int(real(held.cond).sum())) <= dim:
            raise ValueError(
                f"{name}: {rows} held-out blocks give no covariance of {dim} features; hold out more audio"
            )
        print(f"{name}: {clips} held-out clips", flush=True)
        x_t, u = flow_path(held.x0, held.x1, held.t)
        fm = flow_matching_loss(model(x_t, held.t, held.cond), u, held.scored).mean().item()
        began = time.time()
        with amp():
            made = sample(model, held.cond._replace(ref=torch.where(after, 0, held.x1)), held.x0)
        factor = (time.time() - began) / (clips * n * BLOCK)
        (truth, units), (fake, heard) = (
            hear(held.x1, held.cond),
            hear(torch.where(after, made, held.x1), held.cond),
        )
        stored, error = (
            pick(held.cond.tokens[:, :: meta["codebooks"]].flatten(), held.cond),
            lambda x: (x != units).float().mean().item(),
        )
        found[name] = dict(
            clips=clips,
            rows=rows,
            flow_matching_loss=fm,
            frechet=frechet(fake, truth),
            frechet_floor=frechet(hear(other.x1, other.cond)[0], truth),
            unit_error=error(heard),
            unit_error_floor=error(stored),
            real_time_factor=factor,
        )
    write_text(Path(path).parent / "metrics.json", json.dumps(found, indent=1))
    return found


def figures(*folders):
    """PNGs of a run from its tables and sounds, into its folder; of several, one that compares them. -> paths"""
    return importlib.import_module("data_prep").figures(*folders)


# ---- 13. Command line ------------------------------------------------------------------------------------------------


def main():
    import data_prep

    given = data_prep.command_line(__doc__.splitlines()[0])
    try:
        rank, _, device, _ = launch(Config(device=given.get("device", "auto")))
        if "sample" in given:
            data_prep.resound(given["sample"], given, device)
        elif "evaluate" in given:
            for name, row in evaluate(given["evaluate"], given.values(), device).items():
                print(name, *(f"  {k:20} {v:.5g}" for k, v in row.items()), sep="\n")
        elif "probe" in given:
            data_prep.probe_again(given["probe"], device)
        elif "figures" in given:
            print(*figures(*given["figures"]), sep="\n")
        else:
            config, resume = data_prep.settings(given)
            train(config, resume)
            if dist.is_initialized():
                dist.destroy_process_group()
            if rank == 0:
                data_prep.finish(Path(config.out), device)
    except (ValueError, OSError) as error:
        sys.exit(print(f"agrepa.py: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(
            print("\nstopped; --out RUN --resume goes on from its last checkpoint", file=sys.stderr)
            or 130
        )


if __name__ == "__main__":
    main()
