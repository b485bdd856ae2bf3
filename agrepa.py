"""AG-REPA: Causal Layer Selection for Representation Alignment in Audio Flow Matching.

The method of arXiv 2603.01006 (ICML 2026), equation by equation, in one file:

    python agrepa.py                                           # toy corpus, minutes on a CPU
    python agrepa.py --data ./LibriTTS --steps 100000          # prepare, probe, select, align
    torchrun --nproc_per_node=8 agrepa.py --data prepared/LibriTTS-1 --steps 100000  # once prepared
    python agrepa.py --sample runs/LibriTTS-1/last.pt          # held-out sounds, real and generated

 1  flow matching       Eqs. 1, 2    flow_path, flow_matching_loss
 2  velocity model      Eqs. 7, 15   VelocityModel, Condition, interleave
 3  teacher             T(x)         Teacher, log_mel
 4  token interface     Eqs. 3 to 5  pool, BiTC, bitc_loss
 5  store               Eq. 6        lasp
 6  contribute          Eqs. 8, 9    fog_a
 7  selection           Eqs. 10, 11  select_layers
 8  alignment           Eq. 12       capture, AlignmentHeads, agrepa_loss
 9  sampling            App. A       sample, mel_to_wave
10  data                             PreparedFolder, training_batch, held_out_batch
11  training            App. A.5     Config, Objective, probe, choose, train
12  sound and pictures  Fig. 1       write_samples, draw
13  command line                     main

Shapes: B clips, T mel frames, N tokens, M mel bins, D the model's width, L layers, counted from 1.
Time is in chunks of 0.16 s: 15 mel frames at 24 kHz, 8 teacher frames at 50 Hz. T_x is T(x).
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch import distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

RATE, HOP, N_MELS = 24_000, 256, 100  # Vocos 24 kHz mel format
TEACHER_RATE = 16_000  # HuBERT's
CHUNK, MEL_FRAMES, TEACHER_FRAMES = 0.16, 15, 8  # seconds, mel and teacher frames of a chunk
TRAINING, HELD_OUT, CHOICE, SAMPLING = range(4)  # a draw's seed begins with its purpose

# ---- 1. Flow matching (Eqs. 1, 2) ----------------------------------------------------------------
# Straight lines from noise x0 at t = 0 to data x1 at t = 1; the model learns their velocity u.


def flow_path(x0, x1, t):
    """Eq. 1. x0, x1 [B, ...], t [B] in [0, 1] -> x_t and u, both [B, ...]."""
    t = t.view(-1, *[1] * (x0.dim() - 1))
    x_t = (1 - t) * x0 + t * x1
    u = x1 - x0
    return x_t, u


def flow_matching_loss(v, u):
    """Eq. 2 of each clip, a mean over elements, not a sum: the other losses' weights assume it.
    v, u [B, ...] -> [B]. Raises ValueError where they differ in shape."""
    if v.shape != u.shape:
        raise ValueError(f"v {list(v.shape)} is not of the shape of u {list(u.shape)}")
    return (v.float() - u).square().flatten(1).mean(1)


# ---- 2. Velocity model (Eqs. 7, 15) --------------------------------------------------------------
# A DiT. Each layer is h_l = h_{l-1} + m_l f_l(h_{l-1}, t, c), f_l being attention and feed-forward
# together. The gates m_l are 1 in training and stand nowhere in the code: fog_a closes one by
# handing on h_{l-1}. The conditioning c enters in h_0.


class Condition(NamedTuple):
    tokens: torch.Tensor  # [B, N] ids, 8 x codebooks per chunk; the second's begin at `units`
    ref: torch.Tensor  # [B, T, M] reference mel: the clip's first frames, zeros after them
    keep: torch.Tensor  # [B] false where the tokens are dropped
    domain: torch.Tensor  # [B] which embedding table


def interleave(*codebooks):
    """Eq. 15: s = [t1, b1, t2, b2, ...]. Streams [..., n], equally long -> [..., n x codebooks]."""
    return torch.stack(codebooks, -1).flatten(-2)


def rotate(x, turns):
    """Rotary positions: x [B, heads, T, d], turns: angles [T, d / 2]."""
    a, b = x.chunk(2, -1)
    cos, sin = turns.cos().to(x.dtype), turns.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v):
    """q, k, v [B, heads, T, d] -> [B, heads, T, d]."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    # On a CPU its bf16 backward is slow: written out, a step takes 0.8 of the time.
    score = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    with torch.autocast("cpu", enabled=False):  # keeps the scores in bf16; softmax sums in float32
        return score.softmax(-1) @ v


def modulate(h, shift, scale):  # adaLN: h [B, T, D], shift and scale [B, 1, D]
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


class Layer(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)  # adaLN-Zero: each layer starts as the identity
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h, t, turns):
        """Eq. 7. h [B, T, D], t [B, D] embedded, turns [T, d / 2] -> h_l [B, T, D]."""
        shift1, scale1, alpha1, shift2, scale2, alpha2 = self.modulation(t)[:, None].chunk(6, -1)
        x = self.qkv(modulate(h, shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        q, k, v = x.permute(2, 0, 3, 1, 4)  # [B, heads, T, d] each
        x = attention(rotate(q, turns), rotate(k, turns), v).transpose(1, 2).flatten(2)
        h = h + alpha1 * self.drop(self.out(x))
        x = self.drop(F.gelu(self.up(modulate(h, shift2, scale2))))
        return h + alpha2 * self.drop(self.down(x))


class VelocityModel(nn.Module):
    """v_theta(x_t, t, c). vocab: how many token ids (units x codebooks) each domain has."""

    def __init__(self, layers=12, dim=512, heads=8, dropout=0.0, vocab=(1024,), n_mels=N_MELS):
        super().__init__()
        self.register_buffer("first_id", torch.tensor([0, *vocab]).cumsum(0)[:-1], persistent=False)
        self.tokens = nn.Embedding(sum(vocab), dim)  # one table per domain, end to end
        self.null = nn.Parameter(torch.randn(dim))  # stands for dropped tokens
        self.x_in, self.cond_in = nn.Linear(n_mels, dim), nn.Linear(dim + n_mels, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.layers = nn.ModuleList(Layer(dim, heads, dropout) for _ in range(layers))
        self.modulation, self.v_out = nn.Linear(dim, 2 * dim), nn.Linear(dim, n_mels)
        for p in (*self.modulation.parameters(), *self.v_out.parameters()):  # v = 0 at first
            nn.init.zeros_(p)

    def embed(self, cond):
        """The embedded tokens e [B, N, D]; they train, the null token too."""
        e = self.tokens(cond.tokens + self.first_id[cond.domain][:, None])
        return torch.where(cond.keep[:, None, None], e, self.null)

    def forward(self, x_t, t, cond, e=None):
        """x_t [B, T, M], t [B] -> v [B, T, M]. e: embed(cond), if at hand."""
        T = x_t.shape[1]
        e = self.embed(cond) if e is None else e
        e = F.interpolate(e.transpose(1, 2), T, mode="linear").transpose(1, 2)  # [B, T, D]
        # To concatenate x_t and c and project them is to add up their projections.
        h = self.x_in(x_t) + self.cond_in(torch.cat([e, cond.ref], -1))
        waves = 1000 * t[:, None] * 1e4 ** -(torch.arange(128, device=h.device) / 128)  # DiT's
        t_emb = self.time(torch.cat([waves.cos(), waves.sin()], -1))  # [B, D]
        half = h.shape[-1] // self.layers[0].heads // 2
        turns = 1e4 ** -(torch.arange(half, device=h.device) / half)  # from 1 to 1e-4 (RoFormer)
        turns = torch.arange(T, device=h.device)[:, None] * turns
        for layer in self.layers:
            h = layer(h, t_emb, turns)
        return self.v_out(modulate(h, *self.modulation(t_emb)[:, None].chunk(2, -1))).float()


# ---- 3. Teacher, T(x) ----------------------------------------------------------------------------
# A frozen model of sound: waveform at 16 kHz to features at 50 Hz. It runs once, in data_prep.py.
# A clip's T(x) is the mean of its features, less the corpus mean: left in, it makes all clips'
# targets nearly alike.


class Teacher(nn.Module):
    """A speech bundle of torchaudio.pipelines, one layer of it, frozen: waveform [B, n x 2560] at
    16 kHz -> features [B, n x 8, teacher_dim]. Its checkpoint is downloaded once."""

    def __init__(self, name="HUBERT_BASE", layer=9):
        super().__init__()
        bundle = getattr(torchaudio.pipelines, name)
        net = bundle.get_model()
        self.net = getattr(net, "model", net)  # not its wrapper, which normalises across the batch
        self.normalise, self.layer = bundle._normalize_waveform, layer
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, wave):
        # Windows of 25 ms, every 20: without 5 ms in front the last frame would be missing.
        wave = F.pad(wave, (80, 0))
        if self.normalise:
            wave = F.layer_norm(wave, wave.shape[1:])  # each clip by itself
        return self.net.extract_features(wave, num_layers=self.layer)[0][-1]


def log_mel(wave):
    """Waveform [B, n x 256] at 24 kHz -> [B, n, 100]: n_fft 1024, magnitude, natural log."""
    mel = torchaudio.transforms.MelSpectrogram(RATE, 1024, hop_length=HOP, n_mels=N_MELS, power=1)
    return mel.to(wave.device)(wave)[..., :-1].clamp(min=1e-5).log().mT  # the paper's; Vocos: 1e-7


# ---- 4. The token interface: BiT-C (Eqs. 3 to 5) -------------------------------------------------
# One linear head P_d on the pooled embedded tokens e ties them to the teacher. It trains the tokens
# to carry what the teacher knows, and gives LASP a head that was never fitted to a layer.


def pool(h, mask=None):
    """The mean over time: h [..., T, D] -> [..., D] in float32. mask [..., T], boolean, true where
    a frame counts; all zeros where none does. Raises ValueError for another kind of mask."""
    if mask is None:
        return h.float().mean(-2)
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask of {mask.dtype}: give a boolean one, true where a frame counts")
    total = h.float().masked_fill(~mask[..., None], 0).sum(-2)
    return total / mask.sum(-1, keepdim=True).clamp(min=1)


class BiTC(nn.Module):
    def __init__(self, dim, teacher_dim):
        super().__init__()
        self.P = nn.Linear(dim, teacher_dim)

    def forward(self, e, T_x, mask=None):
        """Eqs. 3, 4: e [B, N, D], T_x [B, teacher_dim], mask [B, N] -> s = cos(P z, T(x)) [B]."""
        z = F.layer_norm(pool(e, mask), e.shape[-1:])  # P would absorb gain and bias
        return F.cosine_similarity(self.P(z).float(), T_x.float(), dim=-1)


def bitc_loss(s, keep):
    """Eq. 5, one domain: s [B], keep [B] false where the tokens were dropped -> scalar."""
    return ((1 - s) * keep).sum() / keep.sum().clamp(min=1)


# ---- 5. LASP: what a layer stores (Eq. 6) --------------------------------------------------------
# BiT-C's score with a layer's hidden state where the tokens were, by the same head for all layers.


@torch.no_grad()
def lasp(hidden, bitc, T_x, mask=None):
    """hidden {k: [B, T, D]}, bitc a head, T_x [B, teacher_dim], mask [B, T] -> [L, B], by k."""
    return torch.stack([bitc(hidden[k], T_x, mask) for k in sorted(hidden)])


# ---- 6. FoG-A: what a layer contributes (Eqs. 8, 9) ----------------------------------------------
# Close one layer's gate, see how far the velocity moves: L + 2 passes. A closed block returns its
# h_{l-1}: the input at the place where, in an open pass, the next block receives its output.


@torch.no_grad()
def fog_a(velocity, blocks, *inputs, skip=None, eps=1e-8):
    """Eqs. 8, 9 for any residual network: scores [L, B]; their mean over B is FoG-A.
    velocity(*inputs) -> v [B, ...]. blocks: modules, each returning its own sum h + f(h); or lists
    of modules that return f(h), closed to zeros: [[attn, ff], ...]. One that runs twice is closed
    in both. skip(args, kwargs, output): what a closed module returns, if a ValueError asks."""
    gates, passes = Gates(blocks, skip), []

    def eval_mode(module, args):
        if module.training:
            undo.callback(setattr, module, "training", True)
            module.training = False  # whatever runs: velocity may be any callable

    with torch.random.fork_rng(range(torch.cuda.device_count())), contextlib.ExitStack() as undo:
        undo.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code calls no hooks
        undo.callback(nn.modules.module.register_module_forward_pre_hook(eval_mode).remove)
        for module in gates.number:
            undo.callback(module.register_forward_pre_hook(gates.before, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(gates.after, with_kwargs=True).remove)
        for closed in (None, (), *gates.groups):  # who feeds whom; does v repeat; Eq. 8 per block
            gates.closed, gates.kept = closed, None
            torch.manual_seed(0)  # the same random numbers in each pass
            v = velocity(*inputs)
            passes.append(v.reshape(len(v), -1).clone())  # velocity may reuse its buffer
            if never := gates.number.keys() - {call[0] for call in gates.calls}:
                k = min(gates.number[module] for module in never)
                raise ValueError(f"fog_a: block {k} never ran (a ModuleList is never called)")
    v, again, *ablated = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in passes)
    if (again - v).norm() > 1e-3 * v.norm():
        raise ValueError("fog_a: velocity changes from pass to pass (randomness outside torch?)")
    return torch.stack([(v_k - v).norm(dim=1) / (v.norm(dim=1) + eps) for v_k in ablated])  # Eq. 9


def tensors(tree):  # {place: (tensor, its version: how often it was written into)}
    return {p: (x, x._version) for p, x in pytree.tree_leaves_with_path(tree) if torch.is_tensor(x)}


class Gates:  # hooks. closed: modules to close; None: note what each takes in and returns
    def __init__(self, blocks, skip):
        self.groups = [list(b) if isinstance(b, (list, tuple)) else (b,) for b in blocks]
        self.number = {module: k for k, group in enumerate(self.groups, 1) for module in group}
        self.skip, self.calls = skip, []  # (module, inputs, outputs), held so no id() is reused

    def before(self, module, args, kwargs):
        self.came = tensors((args, kwargs))
        if self.closed and module in self.closed:  # copies, since it may write into its inputs
            self.kept = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))

    def after(self, module, args, kwargs, output):
        if self.closed is None:
            return self.calls.append((module, self.came, tensors(output)))
        return self.close(module, output) if module in self.closed else None

    def close(self, module, output):
        i = [call[0] for call in self.calls].index(module)
        near, takes = self.calls[max(0, i - 1) : i] + self.calls[i + 1 : i + 2], self.calls[i][1]
        shared = [(p, id(y)) for _, inputs, _ in near for p, (y, _) in inputs.items()]
        i -= module is self.calls[-1][0] and i > 0  # the last has no next: as the one before it
        (_, own, outputs), (_, given, _) = self.calls[i], self.calls[i : i + 2][-1]
        place = {(id(y), n): p for p, (y, n) in given.items()}
        places = {at: place.get((id(x), n)) for at, (x, n) in outputs.items()}  # of next's inputs
        sums = [h + x for h, _ in own.values() for x, _ in outputs.values() if h.shape == x.shape]
        rest = [y for p, (y, _) in given.items() if p not in places.values()]
        adds = any(torch.equal(y, z) for y in rest for z in sums)  # the caller, not the block
        due = {at: x.shape for at, (x, _) in tensors(output).items()}
        other = [(p, id(y)) for p, (y, _) in takes.items() if y.shape in due.values()]
        # An input of the output's shape that no neighbour has: a long skip, which must stay.
        merges = any(x not in shared and x[0] not in places.values() for x in other)
        kept = {} if merges else {p: x for p, (x, _) in tensors(self.kept).items()}
        stood = {at: kept.get(places.get(at)) for at in due}
        closed = pytree.tree_map_with_path(lambda at, x: stood.get(at, x), output)
        if self.skip:
            closed = self.skip(*self.kept, output)
        elif isinstance(self.closed, list):
            closed = pytree.tree_map_only(torch.Tensor, torch.zeros_like, output)
        wrong = adds and any(x.any() for x, _ in tensors(closed).values())
        if wrong or not due or due != {at: x.shape for at, (x, _) in tensors(closed).items()}:
            say = "0 * output, as its caller adds h" if adds else "..."
            shapes = [list(x.shape) for x, _ in takes.values()]
            raise ValueError(
                f"fog_a: block {self.number[module]} takes {shapes}: list its branches, "
                "[[attn, ff], ...], or say what it returns when closed, in the form of its output: "
                f"skip=lambda args, kwargs, output: {say}"
            )
        return closed


# ---- 7. Selection and weights (Eqs. 10, 11) ------------------------------------------------------


def select_layers(scores, k=3):
    """Eqs. 10, 11: FoG-A scores [L] -> {layer: lambda}, best first, layers counted from 1; lambda
    is a layer's share of the chosen scores. Raises ValueError where scores can't say which."""
    scores = torch.as_tensor(scores).detach().cpu().double()
    if scores.dim() != 1 or not 1 <= k <= len(scores) or not scores.isfinite().all():
        raise ValueError(f"can't choose {k} layers from scores {scores.tolist()}")
    if scores.max() < 1e-4:  # scores are relative to v's norm: this small, they are rounding
        raise ValueError("no layer contributes yet; adaLN-Zero starts closed: probe for longer")
    best = scores.argsort(descending=True, stable=True)[:k]  # of ties, the shallower
    lam = scores[best] / scores[best].sum()
    return dict(zip((best + 1).tolist(), lam.tolist(), strict=True))


# ---- 8. Alignment (Eq. 12) -----------------------------------------------------------------------
# A small head per layer maps the pooled hidden state to the teacher's space; loss: 1 - cosine.
# Wherever layers are asked for, section 7's dictionary {layer: lambda} will do.


@contextlib.contextmanager
def capture(blocks, layers, output=None):
    """Hidden states of any model, with gradient, in the forward pass you make anyway:
    `with capture(model.blocks, layers) as hidden: v = model(...)` -> hidden[9] is what the ninth
    block returned; output: which one, of several. Raises ValueError where a block gave none."""
    blocks, hidden = list(blocks), {}

    def keep(k, block, args, returned):
        if isinstance(returned, (tuple, list)) and len(returned) == 1:
            returned = returned[0]
        x = returned if output is None or torch.is_tensor(returned) else returned[output]
        if not torch.is_tensor(x):
            raise ValueError(f"capture: block {k} returns a {type(x).__name__}; say output=1")
        if k in hidden:
            raise ValueError(f"capture: block {k} ran twice: capture one pass, backward outside")
        hidden[k] = x.clone()  # its caller may write into x

    with contextlib.ExitStack() as hooks:
        for k in layers:
            if not 1 <= k <= len(blocks):
                raise ValueError(f"capture: no layer {k} among {len(blocks)}; they count from 1")
            hooks.callback(blocks[k - 1].register_forward_hook(partial(keep, k)).remove)
        yield hidden
    for k in layers:
        if k not in hidden:
            why = "dropped, called by .forward(), in a model compiled whole, or a ModuleList?"
            raise ValueError(f"capture: block {k} never ran: {why}")
        if torch.is_grad_enabled() and not hidden[k].requires_grad:
            why = "reentrant checkpointing (use_reentrant=False), torch.func, or frozen?"
            raise ValueError(f"capture: block {k} has no gradient: {why}")


class AlignmentHeads(nn.ModuleDict):
    """h_phi_k: a two-layer MLP for each layer. dim: the hidden states' width, or {layer: width}."""

    def __init__(self, layers, dim, teacher_dim, width=192):
        super().__init__()
        for k in layers:
            into = nn.Linear(dim[k] if isinstance(dim, dict) else dim, width)
            self[str(k)] = nn.Sequential(into, nn.SiLU(), nn.Linear(width, teacher_dim))


def agrepa_loss(hidden, heads, T_x, lam, mask=None):
    """Eq. 12's sum over k of lambda_k (1 - cos(h_phi_k(pool(h_k)), T(x))), for each clip.

    hidden {k: [B, T, D]}, lam {k: lambda_k}, mask [B, T] true where a frame is real -> [B].
    T_x [B, teacher_dim]; or [B, n, teacher_dim]: n equal stretches of time, each with its target.
    """
    T_x = T_x.float() if T_x.dim() == 3 else T_x.float()[:, None]
    B, n, _ = T_x.shape
    stretches = None if mask is None else mask.unflatten(1, (n, -1))  # [B, n, T / n]
    real = None if mask is None else stretches.any(-1)  # [B, n]
    loss = torch.zeros(B, device=T_x.device)
    for k in lam:
        shape = hidden[k].shape
        if len(shape) != 3 or shape[0] != B or (mask is not None and mask.shape != shape[:2]):
            raise ValueError(f"agrepa_loss: layer {k} is {list(shape)}, or its mask isn't [B, T]")
        head, z = heads[str(k)], pool(hidden[k].unflatten(1, (n, -1)), stretches)
        z = head(z.to(head[0].weight.dtype)).float()  # heads of any precision
        far = 1 - F.cosine_similarity(z, T_x, dim=-1)  # [B, n]
        loss = loss + lam[k] * pool(far[..., None], real)[:, 0]  # the mean of real stretches
    return loss


# ---- 9. Sampling (App. A) ------------------------------------------------------------------------


@torch.no_grad()
def sample(model, cond, x0, nfe=32, guidance=3.0, sway=-1.0):
    """Noise x0 [B, T, M] -> x1 [B, T, M] in nfe Euler steps. guidance 1 is off, 3 F5-TTS's 2: v_u
    lacks the tokens, not the reference mel. sway below 0: finer steps near the noise (F5-TTS)."""
    dropped = cond._replace(keep=torch.zeros_like(cond.keep))
    t = torch.linspace(0, 1, nfe + 1)
    t = t + sway * (torch.cos(np.pi / 2 * t) - 1 + t)
    x = x0
    for now, dt in zip(t.tolist(), t.diff().tolist(), strict=False):
        at = torch.full((len(x),), now, device=x.device)
        v_c = model(x, at, cond)
        v_u = v_c if guidance == 1 else model(x, at, dropped)
        v = v_u + guidance * (v_c - v_u)
        x = x + dt * v
    return x


def mel_to_wave(mel, vocoder="griffinlim", seed=0):
    """log_mel's inverse: [B, n, 100] -> [B, n x 256] at 24 kHz: Griffin-Lim, or vocos."""
    mel = torch.cat([mel, mel[:, -1:]], 1).transpose(1, 2)  # one more frame closes the last hop
    if vocoder == "vocos":
        from vocos import Vocos

        net = Vocos.from_pretrained("charactr/vocos-mel-24khz").to(mel.device)
        return net.decode(mel)[:, : HOP * (mel.shape[2] - 1)]
    bank = torchaudio.functional.melscale_fbanks(513, 0, RATE / 2, N_MELS, RATE).to(mel)
    magnitude = (torch.linalg.pinv(bank.T) @ mel.exp()).clamp(min=0)
    griffin_lim = torchaudio.transforms.GriffinLim(1024, n_iter=64, hop_length=HOP, power=1)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return griffin_lim.to(mel.device)(magnitude)


# ---- 10. Data ------------------------------------------------------------------------------------
# A prepared folder is one domain: memory-mapped rows, one per chunk; a clip is n chunks. A draw
# depends on (purpose, seed, domain, step, clip) alone: resuming a run changes none.


def clips_of(utterances, n):
    """utterances [U, 3]: first row, chunks, folder -> rows [R], starts; a clip: rows[start:][:n].
    A clip lies within one recording; recordings shorter than n are joined within their folder."""
    first, chunks, folder = utterances.T
    source = np.where(chunks < n, folder, folder.max(initial=0) + 1 + np.arange(len(chunks)))
    order = source.argsort(kind="stable")
    rows = [np.arange(first[u], first[u] + chunks[u]) for u in order]
    source = source[order].repeat(chunks[order])  # of each row: its recording, or folder
    starts = np.flatnonzero(source[: max(0, len(source) - n + 1)] == source[n - 1 :])
    return np.concatenate([np.arange(0), *rows]), starts


class PreparedFolder:
    """What data_prep.py made, domain number d of a run, to be cut into clips of n chunks."""

    def __init__(self, folder, n, d=0, raw_teacher=False):
        def rows(name, kind, *shape):
            return np.memmap(Path(folder, name), kind, "r").reshape(-1, *shape)

        self.n, self.d, self.meta = n, d, json.loads(Path(folder, "meta.json").read_text())
        self.mel = rows("mel.bin", "<f2", MEL_FRAMES, N_MELS)
        self.tokens = rows("tokens.bin", "<u2", TEACHER_FRAMES * self.meta["codebooks"])
        self.teacher = rows("teacher.bin", "<f2", self.meta["teacher_dim"])  # a chunk's mean
        self.centre = np.float32(self.meta["teacher_mean"]) * (not raw_teacher)
        utterances = np.load(Path(folder, "utterances.npy"))
        train, held = np.split(utterances, [len(utterances) - self.meta["held_out"]])
        # Layers are chosen on every other held-out utterance; the held-out loss is of the others.
        parts = {"training": train, "held out": held, "loss": held[::2], "choice": held[1::2]}
        self.clips = {name: clips_of(part, n) for name, part in parts.items()}
        if not all(len(starts) for _, starts in self.clips.values()):  # too few: each gets all
            self.clips |= dict.fromkeys(("loss", "choice"), self.clips["held out"])

    def clip(self, part, where, length, draws, t=0.0, keep=True):
        """The part's clip at `where`, in [0, 1); its first 0.3 x `length` is the reference."""
        rows, starts = self.clips[part]
        if not len(starts):
            raise ValueError(f"{self.meta['name']} has no clip so long for {part}: lower --seconds")
        rows = rows[starts[int(where * len(starts))] :][: self.n]
        x1 = (self.mel[rows].astype(np.float32) - self.meta["mel_mean"]) / self.meta["mel_std"]
        x1 = x1.reshape(-1, N_MELS)
        prefix = np.arange(len(x1))[:, None] < int(0.3 * length * len(x1))
        return {
            "x0": draws.standard_normal(x1.shape, dtype=np.float32),
            "x1": x1,
            "t": np.float32(t),
            "tokens": self.tokens[rows].astype(np.int64).reshape(-1),
            "ref": np.where(prefix, x1, np.float32(0)),
            "keep": keep,
            "domain": self.d,
            "teacher": self.teacher[rows].astype(np.float32) - self.centre,
        }


class Batch(NamedTuple):
    x0: torch.Tensor  # [B, T, M] noise; b clips of each domain, domain after domain
    x1: torch.Tensor  # [B, T, M] log-mel, normalised by the domain's mean and deviation
    t: torch.Tensor  # [B]
    cond: Condition
    teacher: list  # per domain [b, n, teacher_dim]: features, centred, a row per chunk

    def to(self, device):
        return pytree.tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), self)


def training_batch(data, config, step, rank=0):
    """The config.batch_size clips of step `step` for process `rank`. data: a folder per domain."""
    b, clips = config.batch_size // len(data), []
    for folder in data:
        for i in range(rank * b, rank * b + b):
            draws = np.random.default_rng((TRAINING, config.seed, folder.d, step, i))
            where, t, length, keep, keep_ref = draws.random(5)
            length *= keep_ref >= 0.1  # 10 % lose the reference and, independently, 10 % the tokens
            clips.append(folder.clip("training", where, length, draws, t, keep >= 0.1))
    return collate(clips, len(data))


def held_out_batch(data, part, b):
    """b fixed clips of each domain, the same in every run; times spread by the golden ratio."""
    clips = []
    for folder in data:
        for i in range(b):
            draws = np.random.default_rng((HELD_OUT, 0, folder.d, 0, i))
            where, t = (i + draws.random()) / b, (0.5 + i * 0.618034) % 1
            clips.append(folder.clip(part, where, draws.random(), draws, t))
    return collate(clips, len(data))


def collate(clips, domains):
    def stack(name, some=clips):
        return torch.from_numpy(np.stack([clip[name] for clip in some]))

    b, cond = len(clips) // domains, Condition(*map(stack, Condition._fields))
    teacher = [stack("teacher", clips[d * b : d * b + b]) for d in range(domains)]
    return Batch(stack("x0"), stack("x1"), stack("t"), cond, teacher)


# ---- 11. Training (App. A.5: probe, then intervene) ----------------------------------------------

PROBE_TIMES, PROBE_CLIPS = (0.1, 0.3, 0.5, 0.7, 0.9), 25  # five clips a time
PROBED = "foga", "lasp", "gradnorm"  # a probe's columns
STRATEGIES = *PROBED, "random", "none"
DTYPES, DEVICES = ("auto", "bfloat16", "float32"), ("auto", "cuda", "mps", "cpu")


def flag(default, text, **kw):  # one field of Config, one flag
    return dataclasses.field(default=default, metadata={"help": text, **kw})


@dataclasses.dataclass
class Config:
    data: tuple = flag((), "folders of audio, or prepared ones: a domain each", metavar="DIR")
    out: str = flag("", "run folder (default: runs/<data>-<number>)", metavar="DIR")
    steps: int = flag(100_000, "training steps, both phases together")
    batch_size: int = flag(16, "clips a step in each process, shared equally by the domains")
    seconds: float = flag(4.8, "length of a clip, rounded to chunks of 0.16 s")
    layers: int = flag(12, "layers of the velocity model (paper: 24)")
    dim: int = flag(512, "its width (paper: 1024)")
    heads: int = flag(8, "its attention heads (paper: 16)")
    dropout: float = flag(0.0, "in the layers (paper: 0.2)")
    lr: float = flag(1e-4, "of a cosine decay, with a linear warm-up over a tenth of the steps")
    seed: int = flag(0, "of initialisation, crops, noise and times")
    teacher: str = flag("HUBERT_BASE", "speech bundle of torchaudio, MFCC, or FILE.py:FUNCTION")
    units_teacher: str = flag("", "whose k-means units are the tokens (default: the teacher's)")
    raw_teacher: bool = flag(False, "don't take the corpus mean off the teacher's features")
    codebooks: int = flag(1, "2: interleave dense acoustic tokens (Eq. 15)", choices=(1, 2))
    units: int = flag(1024, "k-means units a codebook (paper: 4096)")
    probe_steps: int = flag(0, "length of phase I (default: 5000, or 15 %% of a shorter run)")
    probe_every: int = flag(0, "steps between probes (default: 200, or a tenth of phase I)")
    top_k: int = flag(3, "layers to align")
    select: str = flag("foga", "foga, lasp, gradnorm, random, none, or layers such as 4,8,12")
    align_weight: float = flag(1.0, "weight of the alignment loss")
    align_pool: str = flag("clip", "one target per clip, or per chunk", choices=("clip", "chunk"))
    align_until: int = flag(0, "stop aligning at this step (default: never)")
    bit_weight: float = flag(0.5, "lambda_BiT (paper: 0.5 for speech, 1.0 for audio)")
    device: str = flag("auto", "auto takes the first there is", choices=DEVICES)
    dtype: str = flag("auto", "auto: bfloat16 where the hardware has it", choices=DTYPES)
    compile: bool = flag(False, "torch.compile the layers")
    eval_every: int = flag(200, "steps between log lines, each with the held-out loss")
    save_every: int = flag(1000, "steps between checkpoints")
    resume: bool = flag(False, "go on with the run in --out")

    def __post_init__(self):  # settings with defaults filled in
        self.chunks = max(1, round(min(1e9, self.seconds) / CHUNK))  # inf: check refuses it
        self.phase1 = self.probe_steps or max(1, min(5000, self.steps * 15 // 100))
        self.every = self.probe_every or max(1, min(200, self.phase1 // 10))
        self.until = self.align_until or self.steps


def check(config):
    """Raises ValueError, with the value and what to do, for settings that can't be run."""

    def require(good, name, why):
        if not good:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} {why}")

    for f in dataclasses.fields(config):
        if isinstance(f.default, (int, float)):
            least = 0 if not f.default or "weight" in f.name else 1e-9  # others can't be 0
            require(least <= getattr(config, f.name) < np.inf, f.name, "is out of range")
    L, domains = config.layers, max(1, len(config.data))
    layers = {int(k) for k in config.select.split(",") if k.isdecimal()} & {*range(1, L + 1)}
    known = config.select in STRATEGIES or len(layers) == config.select.count(",") + 1
    require(known, "select", f"is not {', '.join(STRATEGIES)}, or layers from 1 to {L}: 4,8,12")
    require(config.top_k <= L, "top_k", f"but the model has {L} layers")
    require(config.dim % (2 * config.heads) == 0, "dim", "must be a multiple of 2 x --heads")
    require(config.phase1 < config.steps, "steps", f"must be more than phase I's {config.phase1}")
    require(config.phase1 < config.until, "align_until", f"is in phase I, {config.phase1} steps")
    require(config.batch_size % domains == 0, "batch_size", f"can't be shared by {domains} domains")


def launch(config):
    """-> rank, world (how many processes), device, and what opens the autocast context."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    rank = int(os.environ["RANK"]) if world > 1 else 0
    best = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    device = best if config.device == "auto" else torch.device(config.device)
    if device.type not in ("cpu", best.type):
        raise ValueError(f"--device {device}: there is none")
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    cuda = partial(torch.cuda.is_bf16_supported, including_emulation=False)
    fast = {"cuda": cuda, "cpu": torch.cpu._is_avx512_bf16_supported}.get(device.type, bool)
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and fast())
    return rank, world, device, partial(torch.autocast, device.type, torch.bfloat16, enabled=low)


class Objective(nn.Module):
    """All that trains: velocity model, a BiT-C head per domain, alignment heads (phase II)."""

    def __init__(self, config, metas):
        super().__init__()
        self.config, self.metas = config, metas
        vocab = [meta["units"] * meta["codebooks"] for meta in metas]
        self.model = VelocityModel(config.layers, config.dim, config.heads, config.dropout, vocab)
        self.bitc = nn.ModuleList(BiTC(config.dim, meta["teacher_dim"]) for meta in metas)
        self.heads, self.lam, self.aligning = nn.ModuleList(), [], None  # None: not wrapped yet

    def add_heads(self, lam):
        """lam: each domain's {layer: lambda}."""
        torch.manual_seed(self.config.seed + 1)  # alike in the moving average and every process
        self.lam, self.aligning = lam, None if self.training else True  # the average's stays on
        for chosen, meta in zip(lam, self.metas, strict=True):
            self.heads.append(AlignmentHeads(chosen, self.config.dim, meta["teacher_dim"]))
        self.heads.to(self.model.null.device).requires_grad_(False)  # until it aligns

    def forward(self, batch):
        """The terms of Eq. 12: L_FM, L_BiT and alignment, each a scalar."""
        b, e = len(batch.x1) // len(self.bitc), self.model.embed(batch.cond)
        x_t, u = flow_path(batch.x0, batch.x1, batch.t)
        aligned = {k for lam in self.lam for k in lam} if self.aligning else ()
        with capture(self.model.layers, aligned) as hidden:
            v = self.model(x_t, batch.t, batch.cond, e)
        fm = flow_matching_loss(v, u).mean()
        bitc = align = torch.zeros((), device=v.device)
        for d, teacher in enumerate(batch.teacher):
            own = slice(d * b, d * b + b)
            bitc = bitc + bitc_loss(self.bitc[d](e[own], pool(teacher)), batch.cond.keep[own])
            if aligned:
                T_x = pool(teacher) if self.config.align_pool == "clip" else teacher
                h = {k: hidden[k][own] for k in self.lam[d]}
                loss = agrepa_loss(h, self.heads[d], T_x, self.lam[d])
                align = align + loss.mean() / len(self.bitc)  # of all clips; Eq. 5 sums domains
        return fm, bitc, align


def update(objective, ema, optimiser, step):
    """One step of AdamW, unless a gradient isn't finite, and of the moving average."""
    heads = [p for p in objective.heads.parameters() if p.grad is not None]
    others = [*objective.model.parameters(), *objective.bitc.parameters()]
    # In one norm the heads' gradients would shrink the model's step.
    norms = [nn.utils.clip_grad_norm_(part, 1.0) for part in (others, heads) if part]
    steps, peak = objective.config.steps, objective.config.lr
    rise, fall = 10 * (step + 1) / steps, 0.5 + 0.5 * np.cos(np.pi * step / steps)
    for group in optimiser.param_groups:
        group["lr"] = float(peak * min(rise, fall))
    if torch.stack(norms).isfinite().all():
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    decay = min(0.9999, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_([*ema.parameters()], [*objective.parameters()], 1 - decay)


def probe(model, bitc, batch):
    """What each layer stores and contributes, the mean over PROBE_TIMES, each on its own clips of a
    domain's batch. In float32: scores are differences of close numbers. -> PROBED of each layer."""
    L, found = len(model.layers), []
    model.eval()
    for i, now in enumerate(PROBE_TIMES):
        clips = pytree.tree_map(lambda x, i=i: x[i :: len(PROBE_TIMES)], batch)
        t = torch.full_like(clips.t, now)
        x_t, u = flow_path(clips.x0, clips.x1, t)
        foga = fog_a(model, model.layers, x_t, t, clips.cond).mean(1)
        with capture(model.layers, range(1, L + 1)) as hidden:
            v = model(x_t, t, clips.cond)
        store = lasp(hidden, bitc, pool(clips.teacher[0])).mean(1)
        grads = torch.autograd.grad(flow_matching_loss(v, u).mean(), [*model.layers.parameters()])
        norms = torch.stack([g.norm() for g in grads]).view(L, -1).norm(dim=1)  # of L_FM
        found.append(torch.stack([foga, store, norms], 1))
    model.train()
    return torch.stack(found).mean(0).tolist()


def choose(config, scores, d):
    """Eqs. 10, 11 for domain d, or another strategy with equal weights -> {layer: lambda}."""
    if config.select == "foga":
        return select_layers(scores["foga"], config.top_k)
    if config.select not in STRATEGIES:
        layers = [int(k) for k in config.select.split(",")]
    else:
        lots = np.random.default_rng((CHOICE, config.seed, d, 0, 0)).random(config.layers)
        score = {**scores, "random": lots, "none": []}[config.select]
        layers = (np.argsort(-np.array(score), kind="stable")[: config.top_k] + 1).tolist()
    return {k: 1 / len(layers) for k in layers}


def report(config, name, lam, scores, early):
    """Prints scores, the choice, and how sure it is. early: FoG-A of earlier probes [probes, L]."""
    print(f"\n{name}: mean of the late probes\nlayer   FoG-A    LASP  grad norm  lambda")
    for k, row in enumerate(zip(*scores.values(), strict=True), 1):
        chosen = f"  {lam[k]:6.3f}  chosen" if k in lam else ""
        print("{:5d}  {:6.4f}  {:6.3f}  {:9.4f}".format(k, *row) + chosen)
    K, foga = config.top_k, sorted(scores["foga"], reverse=True)
    if config.select == "foga" and len(early) and K < len(foga):
        common = len(lam.keys() & {*(np.argsort(early[-1])[-K:] + 1).tolist()})
        print(f"margin: layer {[*lam][-1]} is {foga[K - 1] / foga[K] - 1:.1%} above the next")
        moving = "; the ranking is still moving: try more --probe-steps" * (common < K)
        print(f"{common} of these {K} layers led at half of phase I, too{moving}")


def end_phase1(config, names, probes):
    """Chooses on the mean of its second half's probes -> each domain's {layer: lambda}."""
    found, entries = [], {}
    for d, name in enumerate(names):
        rows = np.array([[row[0], *row[3:]] for row in probes if row[1] == name])
        rows = rows.reshape(-1, config.layers, 4)  # [probes, L, step and scores]
        late = rows[:, 0, 0] > config.phase1 / 2
        scores = dict(zip(PROBED, rows[late].mean(0)[:, 1:].T.tolist(), strict=True))
        found.append(choose(config, scores, d))
        report(config, name, found[d], scores, rows[~late][:, :, 1])
        entries[name] = {"layers": [*found[d]], "weights": [*found[d].values()], **scores}
    Path(config.out, "layers.json").write_text(json.dumps(entries, indent=1))
    with open(Path(config.out, "probe.csv"), "w", newline="") as file:
        csv.writer(file).writerows([["step", "domain", "layer", *PROBED], *probes])
    return found


@torch.no_grad()
def log_line(ema, log, step, sums, lr, seconds, held_out, autocast):
    """Another line of log.csv and of the screen. sums: of fm, bitc, align, steps, aligned steps."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    fm, bitc, align, steps, aligned = sums.tolist()
    sums.zero_()
    with autocast():
        val_fm, _, val_align = ema(held_out)
    row = {"step": step, "phase": 1 + (step > ema.config.phase1), "fm": fm / max(1, steps)}
    row |= {"bitc": bitc / max(1, steps), "align": align / max(1, aligned), "lr": lr}
    row |= {"val_fm": val_fm.item(), "val_align": val_align.item(), "seconds": seconds}
    log.append(row)
    if not dist.is_initialized() or dist.get_rank() == 0:
        with open(Path(ema.config.out, "log.csv"), "w", newline="") as file:
            csv.writer(file).writerows([row, *(line.values() for line in log)])
        left = f"{seconds * (ema.config.steps / step - 1) / 60:.0f} min left" if step else ""
        print(*(f"{k} {x:<8.5g}" for k, x in row.items()), left, flush=True)


def begin_phase2(objective, ema, optimiser, lam):
    if dist.is_initialized():
        dist.broadcast_object_list(lam)
    for part in (objective, ema):
        part.add_heads(lam)
    optimiser.add_param_group({"params": [*objective.heads.parameters()]})


def build(config, metas, device, state):
    """-> what training changes, by name; as it is in `state`, if there is a checkpoint."""
    torch.manual_seed(config.seed)
    objective = Objective(config, metas).to(device)
    ema = copy.deepcopy(objective).requires_grad_(False).eval()  # a moving average
    for layer in objective.model.layers if config.compile else ():
        layer.forward = torch.compile(layer.forward)  # not the module: hooks stay outside
    optimiser = torch.optim.AdamW(objective.parameters(), lr=0.0, weight_decay=0.1, fused=True)
    parts = {"objective": objective, "ema": ema, "optimiser": optimiser}
    if state and state["lam"]:
        begin_phase2(*parts.values(), state["lam"])
    for name, part in parts.items() if state else ():
        part.load_state_dict(state[name])
    return parts


def end_on_signals(stop):
    """Signals fill the list `stop`, so that a step can end first; not those that nohup ignores."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: stop.append(1))


def train(config, state=None):
    """One run, two phases; what it writes stands in config.out. state: a checkpoint to go on from.
    However it ends, the step that it reached is saved."""
    rank, world, device, autocast = launch(config)
    folders, out, stop = enumerate(config.data), Path(config.out), []
    data = [PreparedFolder(path, config.chunks, d, config.raw_teacher) for d, path in folders]
    metas, names = [folder.meta for folder in data], [folder.meta["name"] for folder in data]
    held_out = held_out_batch(data, "loss", 16).to(device)
    choice = [held_out_batch([x], "choice", PROBE_CLIPS).to(device) for x in data]
    parts = build(config, metas, device, state)
    objective, ema, optimiser = parts.values()
    state = state or {"step": 0, "probes": [], "log": [], "sums": torch.zeros(5)}
    step, probes, log, sums = (state[k] for k in ("step", "probes", "log", "sums"))
    sums = sums.to(device)
    began = time.time() - (log[-1]["seconds"] if log else 0)

    def write_log():
        lr, seconds = optimiser.param_groups[0]["lr"], time.time() - began
        log_line(ema, log, step, sums, lr, seconds, held_out, autocast)

    def save():
        saved = {name: part.state_dict() for name, part in parts.items()}
        saved |= {"step": step, "probes": probes, "log": log, "sums": sums, "lam": objective.lam}
        saved |= {"config": dataclasses.asdict(config), "metas": metas, "world": world}
        if rank == 0:
            torch.save(saved, out / "last.pt.part")
            os.replace(out / "last.pt.part", out / "last.pt")  # a whole one is there at any moment

    if not log:  # a new run, and all its settings have passed
        out.mkdir(parents=True, exist_ok=world > 1)
        write_log()
        save()
    add_up = dist.all_reduce if world > 1 else (lambda x: x)
    make = partial(training_batch, data, config, rank=rank)
    ahead = {"num_workers": 4, "pin_memory": True} if device.type == "cuda" else {}
    steps = range(step, config.steps)
    batches = torch.utils.data.DataLoader(steps, batch_size=None, collate_fn=make, **ahead)
    end_on_signals(stop)
    try:
        for batch in batches:
            # Phase I probes now and then, and ends with the choice of layers.
            ends = step == config.phase1
            due = 0 < step <= config.phase1 and (step % config.every == 0 or ends)
            if due and step not in [row[0] for row in probes]:
                probes += [  # all domains or none, should an error end the run here
                    [step, name, k, *scores]
                    for name, head, clips in zip(names, objective.bitc, choice, strict=True)
                    for k, scores in enumerate(probe(objective.model, head, clips), 1)
                ]
            if ends and not objective.lam:  # else it was resumed after the choice
                lam = end_phase1(config, names, probes) if rank == 0 else [None] * len(data)
                begin_phase2(objective, ema, optimiser, lam)

            aligning = config.phase1 <= step < config.until
            if objective.aligning != aligning:
                objective.aligning = aligning  # what trains has changed: wrap anew
                objective.heads.requires_grad_(aligning)
                model = nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
            torch.manual_seed(hash((config.seed, step, rank)) % 2**32)  # dropout's

            # Phase I, before there are heads: L_FM + lambda_BiT L_BiT. Phase II: Eq. 12.
            with autocast():
                fm, bitc, align = model(batch.to(device))
                loss = fm + config.bit_weight * bitc + config.align_weight * align
            loss.backward()
            update(objective, ema, optimiser, step)
            step += 1
            sums += torch.stack([fm, bitc, align, 0 * fm + 1, 0 * fm + aligning]).detach()
            if step % config.eval_every == 0 or step in (config.phase1, config.steps):
                write_log()
            if step % config.save_every == 0:
                save()
            told = torch.tensor(len(stop))  # a CPU tensor: to read it never waits for the GPU
            add_up(told)  # of all processes, which must leave after the same step
            if told:
                break
    finally:
        save()


# ---- 12. Sound and pictures (Fig. 1) -------------------------------------------------------------


def write_samples(state, out, given):
    """Resynthesises held-out clips. All after their first 30 % goes to out/<domain>/real, generated
    and again (real, by another Griffin-Lim seed: a floor). -> {domain: its first clip's mels}."""
    own = {k: given[k] for k in ("data", "seconds", "device", "dtype") if k in given}
    config = Config(**{**state["config"], "device": "auto", **own})
    *_, device, autocast = launch(config)
    objective = Objective(config, state["metas"]).to(device).eval()
    objective.add_heads(state["lam"] or [{} for _ in state["metas"]])
    objective.load_state_dict(state["ema"])
    guidance = 3.0 if state["step"] >= 10_000 else 1.0  # 3 overdrives the mel of short runs
    how = {"nfe": 32, "guidance": guidance, "sway": -1.0}
    how |= {k: given[k] for k in how.keys() & given.keys()}
    pairs, units = {}, [meta["units_id"] for meta in state["metas"]]
    for path in config.data:
        meta, began = json.loads(Path(path, "meta.json").read_text()), time.time()
        _, chunks, place = np.load(Path(path, "utterances.npy"))[-meta["held_out"] :].T
        n = min(config.chunks, np.bincount(place, chunks).max().astype(int))  # all may be short
        if meta["units_id"] not in units:
            raise ValueError(f"{path} is in other tokens than the run's: prepare it with --like")
        folder = PreparedFolder(path, n, units.index(meta["units_id"]))
        count = min(given.get("count", 8), -(-len(folder.clips["held out"][1]) // folder.n))
        for i in range(count):
            draws = np.random.default_rng((SAMPLING, given.get("seed", 0), folder.d, 0, i))
            clip = folder.clip("held out", (i + 0.5) / count, 1, draws)
            batch = collate([clip], 1).to(device)
            with autocast():
                made = sample(objective.model, batch.cond, batch.x0, **how)
            mel = torch.cat([batch.x1, made, batch.x1]) * meta["mel_std"] + meta["mel_mean"]
            mel = mel[:, int(0.3 * mel.shape[1]) :]
            pairs.setdefault(meta["name"], mel.cpu())
            for kind, x, seed in zip(("real", "generated", "again"), mel, (0, 0, 1), strict=True):
                wave = mel_to_wave(x[None], given.get("vocoder"), seed)[0].cpu()
                file = out / meta["name"] / kind / f"{i:03}.wav"
                file.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(file, wave / wave.abs().max().clamp(min=1), RATE)
            left = (time.time() - began) / (i + 1) * (count - i - 1)
            print(f"{file}: {i + 1} of {count}, {left:.0f} s left", file=sys.stderr)
    return pairs


def draw(out, layers, log, pairs):
    """Fig. 1, a pair of mel, and the losses, as pictures in a run's folder."""
    from matplotlib.figure import Figure

    figures = [Figure((8, 3 * len(pairs)), layout="constrained") for _ in range(3)]
    scores, mels = (figure.subplots(len(pairs), 2, squeeze=False) for figure in figures[:2])
    for (name, entry), bars, images in zip(layers.items(), scores, mels, strict=True):
        for ax, score, what in zip(bars, ("lasp", "foga"), ("stores", "contributes"), strict=True):
            colours = ["C0" if k + 1 in entry["layers"] else "C7" for k in range(len(entry[score]))]
            ax.bar(range(1, len(colours) + 1), entry[score], color=colours)
            ax.set(title=f"{name}: {what}", xlabel="layer (blue: chosen)", ylabel=score)
        for ax, mel, kind in zip(images, pairs[name], ("real", "generated"), strict=False):
            ax.imshow(mel.T.numpy(), "magma", vmin=-9, vmax=3, origin="lower", aspect="auto")
            ax.set(title=f"{name}: {kind}", xlabel="frame", ylabel="mel bin")
    ax = figures[2].subplots()
    for column in ("fm", "val_fm", "bitc", "align"):
        ax.plot([row["step"] for row in log], [row[column] or None for row in log], label=column)
    ax.set(xlabel="step", ylabel="loss")
    ax.legend()
    for figure, name in zip(figures, ("dissociation", "mel", "loss"), strict=True):
        figure.savefig(out / f"{name}.png")


# ---- 13. Command line ----------------------------------------------------------------------------

# Without --data: the toy corpus, and a model that learns it in two minutes on two cores.
TOY = """--layers 6 --dim 128 --heads 4 --seconds 1.92 --steps 240 --lr 2e-3 --teacher MFCC
--units 64 --probe-steps 90 --probe-every 15 --eval-every 40"""
PREPARATION = "teacher", "units_teacher", "codebooks", "units"  # what a prepared folder depends on
FREE = set("data out device dtype compile eval_every save_every resume".split())  # when resuming


def parse(arguments):
    """-> the flags given, by name."""
    parser = argparse.ArgumentParser("agrepa.py", argument_default=argparse.SUPPRESS)
    kinds = {bool: {"action": "store_true"}, tuple: {"nargs": "+"}}
    for f in dataclasses.fields(Config):
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default else "")
        kind = {**kinds.get(f.type, {"type": f.type}), **f.metadata, "help": text}
        parser.add_argument("--" + f.name.replace("_", "-"), **kind)
    other = parser.add_argument_group("instead of training").add_argument
    other("--sample", metavar="CKPT", help="resynthesise held-out clips of its data, or of --data")
    other("--count", type=int, help="pairs a domain (default: 8)")
    other("--nfe", type=int, help="Euler steps (default: 32)")
    other("--guidance", type=float, help="default: 3; 1 (off) for runs of under 10,000 steps")
    other("--sway", type=float, help="default: -1")
    other("--vocoder", choices=("griffinlim", "vocos"), help="default: griffinlim")
    return vars(parser.parse_args(arguments))


def data_prep(*arguments):
    """Runs data_prep.py beside this file; its progress is seen -> its last line of output."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError(f"before torchrun, once: python data_prep.py {' '.join(arguments)}")
    command = [sys.executable, Path(__file__).with_name("data_prep.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="surrogateescape")
    if done.returncode:
        sys.exit(done.returncode)  # it said why
    return done.stdout.splitlines()[-1]


def load(path):
    try:
        return torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise ValueError(f"{path}: no checkpoint, or a damaged one") from None


def unused(stem):  # stem-1, stem-2, ...: the first that doesn't exist
    return next(path for i in range(1, 10**9) if not (path := Path(f"{stem}-{i}")).exists())


def settings(given):
    """-> Config, the meta of each domain, and with --resume the checkpoint to go on from."""
    state, asked = None, given
    if other := given.keys() - {f.name for f in dataclasses.fields(Config)}:
        raise ValueError(f"only --sample has {other}")
    if "resume" in given:
        state = load(Path(given.get("out", ""), "last.pt"))
        if given.keys() - FREE:
            raise ValueError(f"--resume has the run's settings; leave out {given.keys() - FREE}")
        given = {**state["config"], **given}
    elif "data" not in given:
        print("toy corpus; a small model:", TOY, flush=True)
        toy = data_prep("--toy", "prepared/toy-audio")
        given = {**parse(TOY.split()), "data": [f"{toy}/toy-speech", f"{toy}/toy-sounds"], **given}
    config, metas = Config(**given), []
    check(config)
    flags = [f"--{k.replace('_', '-')}={getattr(config, k)}" for k in (*PREPARATION, "device")]
    for i, folder in enumerate(config.data):
        if not Path(folder, "utterances.npy").exists():
            folder = data_prep(folder, *flags)
        config.data[i] = os.path.abspath(folder)
        metas.append(json.loads(Path(folder, "meta.json").read_text()))
        for k in PREPARATION:
            if asked.get(k, metas[i][k]) != metas[i][k]:
                raise ValueError(f"{folder} was prepared with {k} {metas[i][k]}, not {asked[k]}")
    if len({meta["name"] for meta in metas}) < len(metas):
        raise ValueError(f"--data {' '.join(config.data)}: two domains have one name")
    return config, metas, state


def main():
    given = parse(sys.argv[1:])
    if "sample" in given:
        out = unused(given.get("out") or Path(given["sample"]).with_name("samples"))
        write_samples(load(given["sample"]), out, given)
        return print(out)
    config, metas, state = settings(given)
    rank, world, *_ = launch(config)
    if state and (state["metas"], state["world"]) != (metas, world):
        raise ValueError(f"--resume: the run had other data, or not {world} processes")
    out = Path(config.out or unused("runs/" + "+".join(meta["name"] for meta in metas)))
    config.out = str(out)
    if rank == 0:
        if out.exists() and not state:
            raise ValueError(f"--out {out}: exists; --resume goes on with it, or choose another")
        cosines = ", ".join(f"{meta['tokens_tell']:.2f} ({meta['name']})" for meta in metas)
        print(f"{out}: phase I to step {config.phase1}; tokens tell of a chunk's T(x): {cosines}")
    if world > 1:
        dist.init_process_group()  # gloo for the CPU's tensors, nccl for the GPUs'
    train(config, state)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        os._exit(0)  # threads of gloo's may outlive the interpreter: it would abort
    state = load(out / "last.pt")
    if (at := state["step"]) < config.steps:
        raise KeyboardInterrupt(f"stopped at step {at}: --out {out} --resume goes on")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    pairs = write_samples(state, out / "samples", {"count": 1, "device": config.device})
    draw(out, json.loads((out / "layers.json").read_text()), state["log"], pairs)
    cosine = 1 - state["log"][-1]["val_align"]
    told = f"; the aligned layers tell {cosine:.2f} of a {config.align_pool}'s T(x)"
    print(f"{out}: samples, pictures" + told * any(state["lam"]))


def guarded(work):
    """Runs a program: an error is a line and exit code 2, Ctrl-C a line and 130."""
    try:
        return work()
    except (ValueError, OSError) as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped; the same command goes on'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    guarded(main)
