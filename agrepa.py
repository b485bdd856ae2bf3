"""AG-REPA: Causal Layer Selection for Representation Alignment in Audio Flow Matching.

The method of arXiv 2603.01006 (ICML 2026), equation by equation, in one file:

    python agrepa.py                                           # toy corpus, minutes on a CPU
    python agrepa.py --data ./LibriTTS --steps 100000          # prepare, probe, select, align
    torchrun --nproc_per_node=8 agrepa.py --data prepared/LibriTTS-1 --steps 100000

 1  flow matching       Eqs. 1, 2    flow_path, flow_matching_loss
 2  velocity model      Eqs. 7, 15   VelocityModel, Condition, interleave
 3  teacher             T(x)         Teacher, log_mel, Tokenizer
 4  token interface     Eqs. 3 to 5  pool, BiTC, bitc_loss
 5  store               Eq. 6        lasp, cka
 6  contribute          Eqs. 8, 9    fog_a
 7  selection           Eqs. 10, 11  select_layers
 8  alignment           Eq. 12       capture, AlignmentHeads, agrepa_loss
 9  sampling            App. A       sample, mel_to_wave
10  data                             read_audio, BlockDataset, training_batch
11  training            App. A.5     Config, losses, probe, train
12  listening           Fig. 1       resynthesise, evaluate, figures
13  command line                     main

Shapes: B clips, T mel frames, N tokens, M mel bins, D width, L layers (counted from 1), dim the
teacher's width. Time comes in blocks of 0.16 s: 15 mel frames at 24 kHz, 8 teacher frames at 50 Hz.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import random
import runpy
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, Optional
from unittest import mock
from urllib.parse import urljoin

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

RATE, HOP, N_MELS = 24_000, 256, 100  # Vocos 24 kHz mel format
TEACHER_RATE = 16_000  # HuBERT's
BLOCK, FRAMES, TEACHER_FRAMES = 0.16, 15, 8  # seconds, mel frames and teacher frames of a block
WINDOW = 160  # blocks, 25.6 s: longer sounds are cut (attention is quadratic, Whisper sees 30 s)
FORMAT, CHECKPOINT = 3, "agrepa 4"  # of prepared folders, of checkpoints

# ---- 1. Flow matching (Eqs. 1, 2) ----------------------------------------------------------------
# Straight lines from noise x0 at t = 0 to data x1 at t = 1; the model learns their velocity u.


def flow_path(x0, x1, t):
    """Eq. 1. x0, x1 [B, ...], t [B] in [0, 1] -> x_t and u, both [B, ...]."""
    t = t.view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * x1, x1 - x0


def flow_matching_loss(v, u, mask=None):
    """Eq. 2 for each clip, the norm as a mean over frames and bins, which sets what the weights of the
    other losses mean. v, u [B, ..., M], mask [B, T] true where a frame counts -> [B]."""
    if v.shape != u.shape:
        raise ValueError(f"v {list(v.shape)} is not of the shape of u {list(u.shape)}")
    error = (v.float() - u).square()
    if mask is None:
        return error.flatten(1).mean(1)
    if error.dim() != 3 or mask.shape != error.shape[:2]:
        raise ValueError(f"mask {list(mask.shape)} for v {list(v.shape)}: not [B, T], [B, T, M]")
    return (error.mean(-1) * mask).sum(1) / mask.sum(1).clamp(min=1)


# ---- 2. Velocity model (Eqs. 7, 15) --------------------------------------------------------------
# A DiT. Each layer is h_l = h_{l-1} + m_l f_l(h_{l-1}, t, c). The gates m_l are 1 in training, and
# to close one is to hand on h_{l-1}, so none is written down. The conditioning c enters in h_0.


class Condition(NamedTuple):
    tokens: torch.Tensor  # [B, N] ids, N = 8 x codebooks a block
    ref: torch.Tensor  # [B, T, M] reference mel: the clip's first frames, zeros after them
    domain: torch.Tensor  # [B] which embedding table
    keep: torch.Tensor  # [B] false where the tokens are dropped
    mask: Optional[torch.Tensor] = None  # [B, T / 15] true where a block is real; None: everywhere


def interleave(*codebooks):
    """Eq. 15: s = [t1, b1, t2, b2, ...]. Streams [..., n] of equal length -> [..., n x codebooks]."""
    return torch.stack(codebooks, -1).flatten(-2)


def spread(mask, n):
    """A mask of blocks [B, T / 15] -> of the n frames or tokens in them [B, n]; None stays None."""
    return None if mask is None else mask.repeat_interleave(n // mask.shape[1], 1)


def angles(position, n):
    """position [P] -> [P, n], at n frequencies from 1 down towards 1e-4 (RoFormer)."""
    return position[:, None] * 1e4 ** -(torch.arange(n, device=position.device) / n)


def rotate(x, cos, sin):
    """Rotary positions: x [B, heads, T, d], cos and sin of the angles [T, d / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v, mask):
    """q, k, v [B, heads, T, d], mask [B, 1, 1, T] true where a frame is real -> [B, heads, T, d]."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # On a CPU SDPA's bf16 backward is slow: written out, a step takes 0.8 of the time.
    score = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
    with torch.autocast("cpu", enabled=False):  # keeps the scores in bf16; softmax sums in float32
        score = score if mask is None else score.masked_fill(~mask, -math.inf)
        return score.softmax(-1) @ v


def modulate(h, shift, scale):
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

    def forward(self, h, t, rope, mask=None):
        """Eq. 7. h [B, T, D], t [B, D], rope two [T, d / 2], mask [B, 1, 1, T] -> h_l [B, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(t)[:, None].chunk(6, -1)
        x = self.qkv(modulate(h, shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        q, k, v = x.permute(2, 0, 3, 1, 4)  # [B, heads, T, d] each
        cos, sin = rope[0].to(q.dtype), rope[1].to(q.dtype)
        x = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask).transpose(1, 2).flatten(2)
        h = h + gate1 * self.drop(self.out(x))
        x = self.drop(F.gelu(self.up(modulate(h, shift2, scale2))))
        return h + gate2 * self.drop(self.down(x))


class VelocityModel(nn.Module):
    """v_theta(x_t, t, c). vocab: how many token ids (units x codebooks) each domain has."""

    def __init__(self, layers=12, dim=512, heads=8, dropout=0.0, vocab=(1024,), n_mels=N_MELS):
        super().__init__()
        first_id = torch.tensor([0, *vocab]).cumsum(0)[:-1]
        self.register_buffer("first_id", first_id, persistent=False)
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

    def forward(self, x_t, t, cond, e=None):
        """x_t [B, T, M], t [B] -> v [B, T, M], zero on padding. e: embed(cond), if at hand."""
        T = x_t.shape[1]
        e = self.embed(cond) if e is None else e
        e = F.interpolate(e.transpose(1, 2), T, mode="linear").transpose(1, 2)  # [B, T, D]
        # To concatenate x_t and c and project them is to add up their projections.
        h = self.x_in(x_t) + self.cond_in(torch.cat([e, cond.ref], -1))
        turns = angles(1000 * t, 128)
        t = self.time(torch.cat([turns.cos(), turns.sin()], -1))  # [B, D]
        d = h.shape[-1] // self.layers[0].heads
        turns = angles(torch.arange(T, device=h.device), d // 2)
        rope = turns.cos(), turns.sin()
        mask = spread(cond.mask, T)
        attend = None if mask is None else mask[:, None, None]
        for layer in self.layers:
            h = layer(h, t, rope, attend)
        v = self.v_out(modulate(h, *self.modulation(t)[:, None].chunk(2, -1))).float()
        return v if mask is None else v * mask[..., None]


# ---- 3. Teacher, T(x) ----------------------------------------------------------------------------
# A frozen model of sound: waveform at 16 kHz to features at 50 Hz. It runs once, in preparation.
# A clip's T(x) is the mean of its features, less the corpus mean: without that, all clips have
# nearly one target. Tokens are the k-means units of the teacher's features, or of another's.


def hubert(name, layer):
    """A speech model of torchaudio.pipelines -> it, and waveform [B, n] to one layer's features."""
    import torchaudio  # here: neither --help nor training waits for it

    bundle = getattr(torchaudio.pipelines, name, None)
    if not isinstance(bundle, torchaudio.pipelines.Wav2Vec2Bundle):
        raise ValueError("not MFCC, a speech model of torchaudio.pipelines, or FILE.py:FUNCTION")
    if not 1 <= layer <= bundle._params["encoder_num_layers"]:
        raise ValueError(f"--teacher-layer {layer}: it has {bundle._params['encoder_num_layers']}")
    try:
        net = bundle.get_model()
    except OSError as error:  # no network
        address = urljoin("https://download.pytorch.org/torchaudio/models/", bundle._path)
        why = f"{error}. Put {address} into {torch.hub.get_dir()}/checkpoints"
        raise ValueError(f"{why}, or take --teacher MFCC, which needs no download") from None
    net = getattr(net, "model", net)  # the large bundles' wrapper normalises over the whole batch

    def features(wave):
        if bundle._normalize_waveform:
            wave = F.layer_norm(wave, wave.shape[1:])  # each clip by itself
        return net.extract_features(wave, num_layers=layer)[0][-1]

    return net, features


def mfcc():
    """13 coefficients, their deltas and the deltas' deltas: HuBERT's own first target."""
    import torchaudio

    spectrum = dict(n_fft=400, hop_length=320, n_mels=26, center=False)
    net = torchaudio.transforms.MFCC(TEACHER_RATE, 13, log_mels=True, melkwargs=spectrum)
    delta = torchaudio.functional.compute_deltas

    def features(wave):
        x = net(wave)
        return torch.cat([x, delta(x), delta(delta(x))], 1).transpose(1, 2)

    return net, features


def by_hash(thing):
    return hashlib.md5(str(thing).encode(errors="surrogateescape")).hexdigest()


def code_of(spec):
    """A hash of the file that a teacher FILE.py:FUNCTION stands in; None for others."""
    file = Path(spec.rsplit(":", 1)[0])
    if file.suffix == ".py" and file.is_file():
        return by_hash(file.read_bytes())


class Teacher(nn.Module):
    """Waveform [B, n x 2560] at 16 kHz -> features [B, n x 8, dim], frozen.

    spec: a speech bundle of torchaudio.pipelines, of which `layer` is taken; MFCC; or
    FILE.py:FUNCTION or MODULE:FUNCTION, which returns a module from waveform to features.
    Raises ValueError if it can't be had or doesn't answer 50 times a second.
    """

    def __init__(self, spec="HUBERT_BASE", layer=9):
        super().__init__()
        try:
            if ":" in spec:
                place, function = spec.rsplit(":", 1)
                code = place.endswith(".py")
                found = runpy.run_path(place) if code else vars(importlib.import_module(place))
                self.net = self.features = found[function]()
            else:
                self.net, self.features = mfcc() if spec == "MFCC" else hubert(spec, layer)
            self.eval().requires_grad_(False)
            # HuBERT hears 25 ms at once, which costs a frame; 5 ms of silence in front give it back
            # and centre its frames within 3 ms of the mel's.
            for self.pad in (0, 80):
                shape = list(self.features(torch.zeros(1, self.pad + 2 * 2560)).shape)
                if len(shape) == 3 and shape[1] == 2 * TEACHER_FRAMES:
                    self.dim = shape[2]
                    return
        except Exception as error:  # a file of the user's may raise anything
            why = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"--teacher {spec}: {why}") from None
        raise ValueError(f"--teacher {spec}: 0.32 s at 16 kHz gave {shape}, not [1, 16, dim]")

    @torch.no_grad()
    def forward(self, wave):
        try:
            x = self.features(F.pad(wave, (self.pad, 0))).float()
        except (RuntimeError, TypeError, LookupError) as error:
            raise ValueError(f"the teacher fails on {list(wave.shape)}: {error}") from None
        due = [len(wave), wave.shape[1] // 320, self.dim]
        if list(x.shape) != due:
            raise ValueError(f"the teacher makes {list(x.shape)} of {list(wave.shape)}, not {due}")
        return x


def log_mel(wave):
    """Waveform [B, n x 256] at 24 kHz -> [B, n, 100]: n_fft 1024, magnitude, natural log."""
    import torchaudio

    mel = torchaudio.transforms.MelSpectrogram(RATE, 1024, hop_length=HOP, n_mels=N_MELS, power=1)
    return mel.to(wave.device)(wave)[..., :-1].clamp(min=1e-5).log().transpose(1, 2)


class Tokenizer(nn.Module):
    """K-means units. centroids [units, d]: of features [B, n x 8, d]; or [units, d + 100]: a second
    codebook of the mel at their rate, the dense acoustic tokens of Eq. 15."""

    def __init__(self, centroids, codebooks=1):
        super().__init__()
        self.codebooks = codebooks
        self.register_buffer("centroids", torch.as_tensor(centroids).float())

    @staticmethod
    def streams(features, mel, codebooks):
        """features [B, n x 8, d], mel [B, n x 15, 100] -> what each codebook's units are made of."""
        mel = F.interpolate(mel.transpose(1, 2), features.shape[1], mode="area").transpose(1, 2)
        return [features, mel][:codebooks]

    def forward(self, features, mel):
        """-> ids [B, n x 8 x codebooks]; the second codebook's follow the first's in number."""
        streams = self.streams(features, mel, self.codebooks)
        books = self.centroids.split([x.shape[2] for x in streams], 1)
        pairs = zip(streams, books, strict=True)
        return interleave(*(nearest(x, book) + i * len(book) for i, (x, book) in enumerate(pairs)))


def nearest(x, centroids):
    """The nearest centroid of each row: x [..., d], centroids [units, d] -> [...]."""
    square = centroids.square().sum(1)
    rows = x.half().float().flatten(0, -2)  # as float16, which the units were fitted to
    found = [(square - 2 * part @ centroids.T).argmin(1) for part in rows.split(16384)]
    return torch.cat(found).view(x.shape[:-1])


# ---- 4. The token interface: BiT-C (Eqs. 3 to 5) -------------------------------------------------
# One linear head P_d on the pooled embedded tokens e ties them to the teacher. It trains the tokens
# to carry what the teacher knows, and gives LASP a head that was never fitted to a layer.


def pool(h, mask=None):
    """The mean over time without padding: h [..., T, D], mask [..., T] -> [..., D] in float32;
    zeros where all is padding."""
    if mask is None:
        return h.float().mean(-2)
    total = h.float().masked_fill(~mask.bool()[..., None], 0).sum(-2)
    return total / mask.sum(-1, keepdim=True).clamp(min=1)


class BiTC(nn.Module):
    def __init__(self, dim, teacher_dim):
        super().__init__()
        self.P = nn.Linear(dim, teacher_dim)

    def forward(self, e, T_x, mask=None):
        """Eqs. 3, 4: e [B, N, D], T_x [B, dim], mask [B, N] -> s = cos(P z, T(x)) [B]."""
        z = F.layer_norm(pool(e, mask), e.shape[-1:])  # no gain, no bias: P follows
        return F.cosine_similarity(self.P(z).float(), T_x, dim=-1)


def bitc_loss(s, kept):
    """Eq. 5, one domain. s [B], kept [B]: weights, 0 for clips without tokens, sum 1 -> scalar."""
    return (kept * (1 - s)).sum()


# ---- 5. LASP: what a layer stores (Eq. 6) --------------------------------------------------------
# BiT-C's score with a layer's hidden state where the tokens were: the same head, frozen, for all.


@torch.no_grad()
def lasp(hidden, bitc, T_x, mask=None):
    """hidden {k: [B, T, D]}, bitc a domain's head, T_x [B, dim], mask [B, T] -> [L, B], ascending."""
    return torch.stack([bitc(hidden[k], T_x, mask) for k in sorted(hidden)])


def cka(h, T_x):
    """Beside Eq. 6, which asks for the tokens' own basis: centred kernel alignment, for any basis, and
    without the bias of few rows (Song et al. 2012). h [n, D], T_x [n, dim] -> scalar, at most 1."""

    def hsic(K, L):
        n = len(K)
        means = K.sum() * L.sum() / (n - 1) - 2 * K.sum(0) @ L.sum(0)
        return (K * L).sum() + means / (n - 2)

    K, L = ((x.float() @ x.float().T).fill_diagonal_(0) for x in (h, T_x))
    return hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()


# ---- 6. FoG-A: what a layer contributes (Eqs. 8, 9) ----------------------------------------------
# Close one layer's gate in a forward pass and see how far the velocity moves. Closing gate k changes
# nothing below it, so the blocks there hand on what they returned with all gates open: in all
# L (L + 1) / 2 evaluations of a block in place of L (L + 1), exact in any network of residual blocks.
# Two more passes compute the first and the last block of each kind again: the numbers must repeat.


def tensors(tree):
    """Those in an argument or output of any form; complex ones as real pairs."""
    found = [x for x in tree_leaves(tree) if torch.is_tensor(x)]
    return [torch.view_as_real(x) if x.is_complex() else x for x in found]


def shapes(tree):
    return [list(x.shape) for x in tensors(tree)]


def copied(tree):
    return tree_map_only(torch.Tensor, lambda x: x.detach().clone(), tree)


def differ(a, b, tolerance=1e-3):
    """By more than the noise of kernels that add up in any order."""
    if shapes(a) != shapes(b):
        return True
    for x, y in zip(tensors(a), tensors(b), strict=True):
        x, y = x.float(), y.float()
        change = torch.where((x == y) | (x.isnan() & y.isnan()), 0, x - y)
        if change.any() and not change.norm() <= tolerance * x[x.isfinite()].norm():
            return True
    return False


def relative_change(v, v_k, eps):
    """Eq. 9, a sample: ||v^{\\k} - v|| / (||v|| + eps). v, v_k [B, ...] -> [B], norms in float32."""
    v, v_k = (x.float().reshape(len(x), -1) for x in tensors((v, v_k)))
    return (v_k - v).norm(dim=1) / (v.norm(dim=1) + eps)


def inputs_in_place(calls, k):
    """For each output of block k, its own input at the place where the next block takes that output
    in: what it hands on when closed (Eq. 7 with m_k = 0). None for those that don't arrive as they
    were, or in several places with different inputs. calls: each block's inputs and output."""
    giver = min(k, max(0, len(calls) - 2))  # the last block is taken to be like the one before
    taker = min(giver + 1, len(calls) - 1)
    places = list(zip(*(tree_leaves(calls[i][0]) for i in (k, taker)), strict=False))
    found = []
    for x in tree_leaves(calls[giver][1]):
        own = [mine for mine, y in places if torch.is_tensor(x) and not differ(x, y, 0.01)]
        same = own and not any(differ(own[0], mine, 0) for mine in own)
        found.append(own[0] if same else None)
    return found


CHANGED = (
    "returns something that the next block doesn't take in as it is: say with skip=lambda args, "
    "kwargs, output: ... what it returns when closed, args[0], or 0 * output where its caller adds "
    "the residual"
)
UNREPEATABLE = (
    "gives other numbers when the same pass runs again: it draws random numbers that can't be "
    "replayed (numpy's, a torch.Generator's), or is in training mode (call model.eval())"
)


class Gates:
    """Answers for the blocks' forward. The pass "open" keeps what each takes and returns. In "again"
    and "once more" all hand that on but the first or the last of each kind, which compute it anew,
    and nothing may differ. In a block's own pass those below it hand on, it hands on its input, and
    those above compute."""

    def __init__(self, blocks, skip):
        self.blocks, self.skip, self.calls = list(blocks), skip, {}
        if not self.blocks:
            raise ValueError("fog_a: there are no blocks to close")
        for k, block in enumerate(self.blocks, 1):
            if not isinstance(block, nn.Module):
                raise ValueError(f"fog_a: block {k} is a {type(block).__name__}, not a module")
            if block in self.blocks[: k - 1]:
                self.refuse(block, f"and block {k} are the same module")
        last = {type(block): block for block in self.blocks}
        first = {type(block): block for block in reversed(self.blocks)}
        self.samples = {"again": {*first.values()}, "once more": {*last.values()}}
        # fog_a sets now, the pass; above, whether it is past the closed block; and closed, what each
        # block then returns.

    def refuse(self, block, why):
        raise ValueError(f"fog_a: block {self.blocks.index(block) + 1} {why}")

    def forward(self, block, compute, *args, **kwargs):
        if self.now == "open":
            return self.keep(block, compute, args, kwargs)
        given, kept = self.calls[block]
        if self.now is block:
            self.above = True
            return copied(self.closed[block])
        if self.above:
            return compute(*args, **kwargs)
        if self.now in self.samples:
            output = compute(*args, **kwargs) if block in self.samples[self.now] else kept
            if differ((given, kept), ((args, kwargs), output)):
                self.refuse(block, UNREPEATABLE)
        return copied(kept)

    def keep(self, block, compute, args, kwargs):
        given = copied((args, kwargs))
        output = compute(*args, **kwargs)
        if block in self.calls:
            self.refuse(block, "runs twice: let velocity() be one pass of the model")
        if differ(given, (args, kwargs), 0):
            self.refuse(block, "writes into its own input; let it return a new tensor")
        self.calls[block] = given, copied(output)
        return output

    def close(self, block):
        """What the block returns when closed."""
        calls, k = list(self.calls.values()), list(self.calls).index(block)
        (args, kwargs), output = calls[k]
        leaves, form = tree_flatten(output)
        own = inputs_in_place(calls, k)
        own += [None] * (len(leaves) - len(own))
        if self.skip is None:
            for i, x in enumerate(leaves):
                if not isinstance(x, (torch.Tensor, int, float, type(None))):
                    self.refuse(block, f"returns a {type(x).__name__}; {CHANGED}")
                if shapes(x) and shapes(own[i]) != shapes(x):
                    self.refuse(block, CHANGED)
                leaves[i] = own[i].to(x.dtype) if torch.is_tensor(x) else x
            return tree_unflatten(leaves, form)
        try:
            closed = tree_leaves(copied(self.skip(args, kwargs, copied(output))))
            closed = tree_unflatten(closed, form)  # args[0] will do for (args[0],)
        except (ValueError, LookupError, TypeError) as error:
            self.refuse(block, f"{error} (its inputs: {shapes(args)}, {list(kwargs)})")
        if shapes(closed) != shapes(output):
            self.refuse(block, f"returns {shapes(output)}, but when closed {shapes(closed)}")
        for x, y in zip(tree_leaves(closed), own, strict=False):
            if shapes(x) and shapes(y) and differ(x, y, 0.01):
                self.refuse(block, "is closed by skip= with something else than its own input")
        return closed


@torch.no_grad()
def fog_a(velocity, blocks, *inputs, skip=None, eps=1e-8):
    """Eqs. 8, 9 for any residual network: scores [L, B]; their mean over B is FoG-A.

    velocity(*inputs) -> tensor [B, ...]; blocks: its residual modules, each of which returns its own
    sum h + f(h) to be the next one's input. skip(args, kwargs, output) says what a closed block
    returns where that is not so. Modules run in eval mode, and each pass sees the same random
    numbers. Raises ValueError, with the block's number, where a score would mean nothing.
    """
    gates = Gates(blocks, skip)

    def run(now):
        gates.now, gates.above = now, False
        random.seed(0)
        torch.manual_seed(0)
        v = velocity(*copied(inputs))
        if not torch.is_tensor(v) or not v.dim():
            kind = type(v).__name__
            raise ValueError(f"fog_a: velocity() returns a {kind}, not [B, ...]; wrap it")
        return v.clone()

    def eval_mode(module, args=()):
        if module.training:
            undo.callback(setattr, module, "training", True)
            module.training = False

    with contextlib.ExitStack() as undo:
        kind = torch.accelerator.current_accelerator() or torch.device("cpu")
        numbers = range(torch.accelerator.device_count())
        undo.enter_context(torch.random.fork_rng(numbers, device_type=kind.type))
        undo.callback(random.setstate, random.getstate())
        undo.enter_context(torch.compiler.set_stance("force_eager"))  # so that gates are seen
        fast = torch.backends.mha.get_fastpath_enabled()
        undo.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)  # nested tensors have no shape
        root = getattr(velocity, "__self__", velocity)  # of a bound method
        for module in root.modules() if isinstance(root, nn.Module) else ():
            eval_mode(module)
        hook = nn.modules.module.register_module_forward_pre_hook(eval_mode)  # in a function, too
        undo.callback(hook.remove)
        for block in gates.blocks:
            gated = partial(gates.forward, block, block.forward)
            undo.enter_context(mock.patch.object(block, "forward", gated))
        v = run("open")
        for block in gates.blocks:
            if block not in gates.calls:
                gates.refuse(block, "never ran in velocity(), as a bare ModuleList never does")
        gates.closed = {block: gates.close(block) for block in gates.calls}
        if any(differ(v, run(now)) for now in gates.samples):
            raise ValueError(f"fog_a: velocity() {UNREPEATABLE}")
        scores = {}
        for block in reversed(gates.calls):  # what a block leaves in an attribute is then v's
            v_k = run(block)
            if not gates.above:
                gates.refuse(block, "runs inside another block")
            scores[block] = relative_change(v, v_k, eps)
        return torch.stack([scores[block] for block in gates.blocks])


# ---- 7. Selection and weights (Eqs. 10, 11) ------------------------------------------------------


def select_layers(scores, k=3, equal=False):
    """Eqs. 10, 11: scores [L] -> {layer: lambda}, best first, layers counted from 1. Ties go to the
    shallower layer; lambda is a layer's share of the chosen scores, or 1 / k if equal.
    Raises ValueError where scores can't say which layers."""
    scores = torch.as_tensor(scores).detach().cpu().double()
    if scores.dim() != 1 or not 1 <= k <= len(scores):
        raise ValueError(f"can't choose {k} layers from scores of shape {list(scores.shape)}")
    if not scores.isfinite().all():
        raise ValueError(f"layer scores are not finite: {scores.tolist()}")
    if scores.abs().max() < 1e-4:
        why = "fresh adaLN-Zero or LayerScale gates are closed, so train before you probe"
        raise ValueError(f"no layer contributes, the best score is {scores.max():.1e}: {why}")
    if not equal and scores.min() < 0:
        raise ValueError(f"negative scores have no shares: {scores.tolist()}")
    best = scores.argsort(descending=True, stable=True)[:k]
    lam = torch.full_like(scores[best], 1 / k) if equal else scores[best] / scores[best].sum()
    return dict(zip((best + 1).tolist(), lam.tolist(), strict=True))


# ---- 8. Alignment (Eq. 12) -----------------------------------------------------------------------
# A small head a layer maps the pooled hidden state to the teacher's space; the loss is one minus the
# cosine. Wherever layers are asked for, the dictionary {layer: lambda} of section 7 will do.


@contextlib.contextmanager
def capture(blocks, layers, output=None):
    """Hidden states of any model, with gradient, in the forward pass you make anyway.

        with capture(model.blocks, layers) as hidden:
            v = model(...)  # hidden[9] is what the ninth block returned

    output: which one, where blocks return several tensors. Raises ValueError for a block that never
    ran, or whose state carries no gradient.
    """
    blocks, layers, hidden = list(blocks), list(layers), {}

    def keep(k, block, args, returned):
        try:
            x = returned if output is None or torch.is_tensor(returned) else returned[output]
            hidden[k] = x.clone()  # whatever its caller then writes into x
        except (LookupError, TypeError, AttributeError):
            found = [list(x.shape) for x in tree_leaves(returned) if torch.is_tensor(x)]
            why = f"returns {found}, and output={output}; say which tensor, as output=1"
            raise ValueError(f"capture: block {k} {why}") from None

    for k in layers:
        if not 1 <= k <= len(blocks) or not isinstance(blocks[k - 1], nn.Module):
            why = f"no layer {k} among {len(blocks)} modules"
            raise ValueError(f"capture: {why}; they count from 1; of a ModuleDict pass .values()")
        if blocks.count(blocks[k - 1]) > 1:
            raise ValueError(f"capture: block {k} is listed twice")
    with contextlib.ExitStack() as hooks:
        for k in layers:
            hook = blocks[k - 1].register_forward_hook(partial(keep, k))
            hooks.callback(hook.remove)
        yield hidden
    for k in layers:
        if k not in hidden:
            why = "a ModuleList is never called; compile a model's blocks, not the model"
            raise ValueError(f"capture: block {k} never ran: {why}")
        if torch.is_grad_enabled() and not hidden[k].requires_grad:
            why = "has no gradient; checkpoint with use_reentrant=False, or look under no_grad"
            raise ValueError(f"capture: block {k} {why}")


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
    T_x [B, dim]; or [B, n, dim]: n equal stretches of time, each with its own target.
    """
    T_x = T_x[:, None] if T_x.dim() == 2 else T_x
    B, n, _ = T_x.shape
    stretches = None if mask is None else mask.unflatten(1, (n, -1))  # [B, n, T / n]
    real = None if mask is None else stretches.any(-1)  # [B, n]
    loss = torch.zeros(B, device=T_x.device)
    for k in lam:
        shape = hidden[k].shape
        if len(shape) != 3 or shape[0] != B or (mask is not None and mask.shape != shape[:2]):
            found = f"{list(shape)}, mask {None if mask is None else list(mask.shape)}"
            raise ValueError(f"agrepa_loss: layer {k} is {found}, not [{B}, T, D] and [{B}, T]")
        z = heads[str(k)](pool(hidden[k].unflatten(1, (n, -1)), stretches))
        far = 1 - F.cosine_similarity(z.float(), T_x, dim=-1)  # [B, n]
        loss = loss + lam[k] * pool(far[..., None], real)[:, 0]
    return loss


# ---- 9. Sampling (App. A) ------------------------------------------------------------------------
# From noise to mel along the velocity field, and from mel to sound.


@torch.no_grad()
def sample(model, cond, x0, nfe=32, guidance=3.0, sway=-1.0):
    """Noise x0 [B, T, M] -> x1 [B, T, M] in nfe Euler steps. guidance 1 is off; at another, v_u lacks
    the tokens and keeps the reference mel. sway below 0: finer steps near the noise (F5-TTS)."""
    dropped = cond._replace(keep=torch.zeros_like(cond.keep))
    t = torch.linspace(0, 1, nfe + 1)
    t = t + sway * (torch.cos(math.pi / 2 * t) - 1 + t)
    x = x0
    for now, dt in zip(t.tolist(), t.diff().tolist(), strict=False):
        at = torch.full((len(x),), now, device=x.device)
        v_c = model(x, at, cond)
        v_u = v_c if guidance == 1 else model(x, at, dropped)
        v = v_u + guidance * (v_c - v_u)
        x = x + dt * v
    return x


def mel_to_wave(mel, vocoder="griffinlim"):
    """log_mel's inverse: [B, n, 100] -> [B, n x 256] at 24 kHz. Griffin-Lim on least-squares
    magnitudes, or vocos. Raises ValueError where vocos or its weights are missing."""
    import torchaudio

    # Frames are centred: one more closes the last hop.
    mel = torch.cat([mel, mel[:, -1:]], 1).transpose(1, 2)
    if vocoder == "vocos":
        try:
            from vocos import Vocos

            net = Vocos.from_pretrained("charactr/vocos-mel-24khz").to(mel.device)
        except Exception as error:  # no package, or any of a hub's errors
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"--vocoder vocos: {why}; pip install vocos, or griffinlim") from None
        return net.decode(mel)[:, : HOP * (mel.shape[2] - 1)]
    bank = torchaudio.functional.melscale_fbanks(513, 0, RATE / 2, N_MELS, RATE).to(mel)
    magnitude = (torch.linalg.pinv(bank.T) @ mel.exp()).clamp(min=0)
    griffin_lim = torchaudio.transforms.GriffinLim(1024, n_iter=64, hop_length=HOP, power=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # first phases: the same sound each time
        return griffin_lim.to(mel.device)(magnitude)


# ---- 10. Data ------------------------------------------------------------------------------------
# A prepared folder (data_prep.py) is one domain: memory-mapped rows, one a block; an utterance is a
# run of rows. Every draw is a function of (seed, domain, step, clip): neither resuming a run nor
# splitting it over more processes changes any.


def read_audio(path, start=0, blocks=None):
    """Blocks of a file, mono -> waveform at 16 kHz [n x 2560] and at 24 kHz [n x 3840]. Raises
    ValueError with the reason where they can't be used."""
    import soundfile
    from torchaudio.functional import resample

    try:
        with soundfile.SoundFile(os.fsencode(path)) as f:
            rate = f.samplerate
            blocks = blocks or int(f.frames / rate / BLOCK + 1e-6)
            first, last = round(start * BLOCK * rate), round((start + blocks) * BLOCK * rate)
            f.seek(first)
            wave = f.read(last - first, dtype="float32", always_2d=True).mean(1)
    except (RuntimeError, OSError) as error:  # soundfile's own is a RuntimeError
        raise ValueError(f"can't be read ({error})") from None
    if blocks < 1:
        raise ValueError(f"is shorter than a block of {BLOCK} s")
    if len(wave) < last - first - BLOCK * rate:
        raise ValueError(f"ends {(last - first - len(wave)) / rate:.2f} s before its header says")
    loudest = np.abs(wave).max(initial=0)
    if not 1e-5 < loudest < 100:  # NaN too
        raise ValueError(f"is silent, or not sound: its loudest sample there is {loudest:.3g}")

    def at_rate(new):
        # Denominators up to 500: 0.1 ms off in 25.6 s; 16,001 Hz would take a kernel of 1.5 GB.
        ratio, n = Fraction(new, rate).limit_denominator(500), round(blocks * BLOCK * new)
        sound = resample(torch.from_numpy(wave), ratio.denominator, ratio.numerator)
        return F.pad(sound, (0, max(0, n - len(sound))))[:n]

    return at_rate(TEACHER_RATE), at_rate(RATE)


class BlockDataset:
    """A folder made by data_prep.py. Raises ValueError where it isn't one, or is damaged."""

    def __init__(self, folder, raw_teacher=False):
        try:
            self.meta = meta = json.loads((Path(folder) / "meta.json").read_text())
            if meta["format"] != FORMAT:
                raise ValueError("another version made it")
            names = "mel tokens teacher units utterances".split()
            arrays = [np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in names]
            self.mel, self.tokens, self.teacher, self.units, utterances = arrays
            self.mean, self.std = float(meta["mel_mean"]), float(meta["mel_std"])
            self.dim = meta["dim"]
            self.centre = np.float32(meta["teacher_mean"]) * (not raw_teacher)
            self.first, self.blocks = np.array(utterances).T  # rows; held-out utterances stand last
            self.train = len(self.first) - meta["held_out"]  # utterances to train on
            self.ends = self.blocks[: self.train].cumsum()
            self.check([x.dtype.str for x in arrays])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{folder}: not a whole prepared folder ({why})") from None

    def check(self, types):
        meta, n, ids = self.meta, len(self.mel), TEACHER_FRAMES * self.meta["codebooks"]
        inside = (self.first >= 0) & (self.blocks > 0) & (self.first + self.blocks <= n)
        texts = [meta[k] for k in ("name", "teacher", "units_teacher")]
        whole = (
            all(isinstance(text, str) for text in texts)
            and isinstance(meta["hours"], float)
            and isinstance(meta["teacher_layer"], int)
            and Path(meta["name"]).name == meta["name"]  # it becomes part of file names
            and np.isfinite(self.centre).all()
            and types == ["<f2", "<u2", "<f2", "<f4", "<i8"]
            and self.mel.shape == (n, FRAMES, N_MELS)
            and self.tokens.shape == (n, ids)
            and self.teacher.shape == (n, self.dim)
            and self.tokens.max() < len(self.units) * meta["codebooks"]
            and (len(self.units), self.centre.shape) == (meta["units"], (self.dim,))
            and inside.all()
            and 0 < self.train < len(self.first)
            and 0 < self.std < 1e3
            and abs(self.mean) < 1e3
        )
        if not whole:
            raise ValueError("its arrays don't belong together")

    def held_out(self, part):
        """Every other held-out utterance: those with part 0, or those between them with part 1."""
        every = range(self.train, len(self.first))
        return every[part::2] or every

    def clip(self, u, start, n):
        """n blocks of utterance u from block `start`: x1 [n x 15, M] normalised, tokens [n x 8 x
        codebooks], teacher [n, dim] centred, and how many are real. Past the utterance's end stand
        zeros, and its last token, so that interpolation sees no edge."""
        real = int(min(n, self.blocks[u] - start))
        rows, after = slice(self.first[u] + start, self.first[u] + start + real), n - real
        x1 = ((self.mel[rows].astype(np.float32) - self.mean) / self.std).reshape(-1, N_MELS)
        tokens = self.tokens[rows].astype(np.int64).reshape(-1)
        teacher = self.teacher[rows].astype(np.float32) - self.centre
        return {
            "x1": np.pad(x1, [(0, after * FRAMES), (0, 0)]),
            "tokens": np.pad(tokens, (0, after * self.tokens.shape[1]), mode="edge"),
            "teacher": np.pad(teacher, [(0, after), (0, 0)]),
            "real": real,
        }

    def example(self, u, start, n, noise, length):
        """The clip that begins at the share `start` in [0, 1) of where one may, with its noise x0 and
        a reference of the share `length` of its longest, 30 % of the clip."""
        clip = self.clip(u, int(start * max(1, self.blocks[u] - n + 1)), n)
        clip["x0"] = noise.standard_normal(clip["x1"].shape, dtype=np.float32)
        clip["prefix"] = int(length * 0.3 * clip["real"] * FRAMES)
        return clip


class Batch(NamedTuple):
    """b clips of each domain, domain after domain, B in all."""

    x0: torch.Tensor  # [B, T, M] noise
    x1: torch.Tensor  # [B, T, M] log-mel, normalised by the domain's mean and deviation
    t: torch.Tensor  # [B]
    cond: Condition
    teacher: list  # a domain each: [b, n, dim] features, centred, a row a block
    kept: torch.Tensor  # [B] Eq. 5's weights: 1 / (how many of the domain's kept tokens), or 0
    scored: torch.Tensor  # [B, T] frames that the held-out loss counts: real, after the reference


DRAWS, NOISE, HELD_OUT, HELD_OUT_NOISE, SAMPLING = range(1, 6)  # what random numbers are for


def stream(purpose, seed=0, domain=0, step=0, clip=0):
    """Always five numbers: to numpy (1, 2) and (1, 2, 0) are the same seed."""
    return np.random.default_rng((purpose, seed, domain, step, clip))


def training_batch(data, config, step, rank=0, world=1, device="cpu"):
    """Step `step`'s clips for this process, config.batch_size in all."""
    b, clips = config.batch_size // len(data), []
    for d, domain in enumerate(data):
        draws = stream(DRAWS, config.seed, d, step).random((b * world, 6))
        keep = draws[:, 0] >= 0.1  # 10 % lose their tokens, 10 % the reference
        for i in range(rank * b, rank * b + b):
            _, where, start, t, ref, length = draws[i]
            # A random block's utterance: long ones come more often.
            u = np.searchsorted(domain.ends, int(where * domain.ends[-1]), side="right")
            noise = stream(NOISE, config.seed, d, step, i)
            clip = domain.example(u, start, config.blocks, noise, length if ref >= 0.1 else 0)
            # Eq. 5 is a mean over all processes; gradients are averaged over them.
            kept = np.float32(world * keep[i] / max(1, keep.sum()))
            clips.append({**clip, "t": np.float32(t), "domain": d, "keep": keep[i], "kept": kept})
    return collate(clips, len(data), device)


def held_out_batch(data, config, b, only=None, device="cpu"):
    """b fixed clips of each domain, or of domain `only`, the same in every run. The loss is taken of
    every other held-out utterance; layers are chosen on those between, asked for with `only`."""
    clips = []
    for d in range(len(data)) if only is None else (only,):
        held = data[d].held_out(0 if only is None else 1)
        for i in range(b):
            start, length = stream(HELD_OUT, 0, d, 0, i).random(2)
            u, noise = held[i * len(held) // b], stream(HELD_OUT_NOISE, 0, d, 0, i)
            clip = data[d].example(u, start, config.blocks, noise, length)
            t, kept = np.float32((0.5 + i * 0.618034) % 1), np.float32(1 / b)  # golden ratio
            clips.append({**clip, "t": t, "domain": d, "keep": True, "kept": kept})
    return collate(clips, len(clips) // b, device)


def collate(clips, domains, device):
    def put(name, clips=clips):
        x = torch.from_numpy(np.stack([clip[name] for clip in clips]))
        if torch.device(device).type != "cuda":
            return x.to(device)
        return x.pin_memory().to(device, non_blocking=True)  # while the step before runs

    x1, real = put("x1"), put("real")
    T, b = x1.shape[1], len(clips) // domains
    after = torch.arange(T, device=device) >= put("prefix")[:, None]
    inside = torch.arange(T // FRAMES, device=device) < real[:, None]
    whole = all(clip["real"] == T // FRAMES for clip in clips)  # flash attention takes no mask
    ref = x1.masked_fill(after[..., None], 0)
    cond = Condition(put("tokens"), ref, put("domain"), put("keep"), None if whole else inside)
    teacher = [put("teacher", clips[i : i + b]) for i in range(0, len(clips), b)]
    scored = after & spread(inside, T)
    return Batch(put("x0"), x1, put("t"), cond, teacher, put("kept"), scored)


def prefetch(make, first):
    """make(first), make(first + 1), ...: the next four assembled in threads meanwhile."""
    with ThreadPoolExecutor(4) as workers:
        coming = collections.deque(workers.submit(make, first + i) for i in range(4))
        while True:
            first += 1
            yield coming.popleft().result()
            coming.append(workers.submit(make, first + 3))


# ---- 11. Training (App. A.5: probe, then intervene) ----------------------------------------------

PROBE_TIMES, PROBE_CLIPS = (0.1, 0.3, 0.5, 0.7, 0.9), 8
STRATEGIES = "foga", "lasp", "gradnorm", "random", "none"
PROBED = "foga lasp gradnorm cka".split()
WEIGHTS, DTYPES = ("auto", "foga", "equal"), ("auto", "bfloat16", "float32")
LOG = "step phase loss fm bitc align val_fm lr frames_per_s seconds".split()


def flag(default, text, **kw):
    return dataclasses.field(default=default, metadata={"help": text, **kw})


@dataclasses.dataclass
class Config:
    """One field, one flag."""

    data: tuple = flag((), "folders of audio, or prepared ones: a domain each", metavar="DIR")
    out: str = flag("", "run folder (default: runs/<data>-<number>)", metavar="DIR")
    steps: int = flag(100_000, "training steps, both phases together")
    batch_size: int = flag(16, "clips a step in each process, shared equally by the domains")
    seconds: float = flag(4.8, "length of a clip, rounded to blocks of 0.16 s")
    layers: int = flag(12, "layers of the velocity model (paper: 24)")
    dim: int = flag(512, "its width (paper: 1024)")
    heads: int = flag(8, "its attention heads (paper: 16)")
    dropout: float = flag(0.0, "in the layers (paper: 0.2)")
    lr: float = flag(1e-4, "peak, after a third of phase I (paper: 10 %% of all), before a cosine")
    seed: int = flag(0, "of initialisation, crops, noise and times")
    teacher: str = flag("HUBERT_BASE", "torchaudio bundle, MFCC, FILE.py:FUNCTION, MODULE:FUNCTION")
    teacher_layer: int = flag(9, "which layer of a bundle; those above are never computed")
    raw_teacher: bool = flag(False, "don't take the corpus mean off the teacher's features")
    units_teacher: str = flag("", "whose k-means units are the tokens (default: the teacher's)")
    codebooks: int = flag(1, "2: interleave dense acoustic tokens (Eq. 15)", choices=(1, 2))
    units: int = flag(1024, "k-means units a codebook (paper: 4096)")
    probe_steps: int = flag(0, "length of phase I (default: 5000, or 15 %% of a shorter run)")
    probe_every: int = flag(0, "steps between probes (default: 200, or a tenth of phase I)")
    top_k: int = flag(3, "layers to align")
    select: str = flag("foga", "foga, lasp, gradnorm, random, none, or layers such as 4,8,12")
    weights: str = flag("auto", "foga: Eq. 11; auto: equal but for --select foga", choices=WEIGHTS)
    align_weight: float = flag(1.0, "weight of the alignment loss")
    align_pool: str = flag("clip", "a target a clip, or one a block", choices=("clip", "block"))
    align_until: int = flag(0, "stop aligning at this step (default: never)")
    bit_weight: float = flag(0.5, "lambda_BiT (paper: 0.5 for speech, 1.0 for audio)")
    device: str = flag("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = flag("auto", "auto: bfloat16 where the hardware has it", choices=DTYPES)
    compile: bool = flag(False, "torch.compile the layers")
    eval_every: int = flag(200, "steps between log lines, each with the held-out loss")
    save_every: int = flag(1000, "steps between checkpoints")
    resume: bool = flag(False, "go on with the run in --out")
    cache: str = flag("prepared", "where folders of audio are prepared", metavar="DIR")

    @property
    def blocks(self):
        return round(self.seconds / BLOCK)

    @property
    def phase1(self):
        return self.probe_steps or max(1, min(5000, self.steps * 15 // 100))

    @property
    def every(self):
        return self.probe_every or max(1, min(200, self.phase1 // 10))


def named(name, value):
    return f"--{name.replace('_', '-')} {value}"


def check(config):
    """Raises ValueError, with the value and what to do, for settings that can't be run."""

    def require(good, name, why):
        if not good:
            raise ValueError(f"{named(name, getattr(config, name))} {why}")

    for f in dataclasses.fields(config):
        value, may_be_0 = getattr(config, f.name), not f.default or "weight" in f.name
        kinds = {tuple: (tuple, list), float: (float, int)}.get(f.type, f.type)
        require(isinstance(value, kinds), f.name, f"is no {f.type.__name__}")
        if isinstance(f.default, (int, float)):
            good = 0 < value < math.inf or (may_be_0 and value == 0)
            require(good, f.name, f"must be a number {'0 or more' if may_be_0 else 'above 0'}")
    L, most, domains = config.layers, 65536 // config.codebooks, max(1, len(config.data))
    layers = {int(k) for k in config.select.split(",") if k.isdecimal()} & {*range(1, L + 1)}
    known = config.select in STRATEGIES or len(layers) == config.select.count(",") + 1
    which = f"is not {', '.join(STRATEGIES)}, or different layers from 1 to {L}, such as 4,8,12"
    require(known, "select", which)
    require(L > 1, "layers", "must be 2 or more: FoG-A looks at what the next layer takes in")
    require(config.top_k <= L, "top_k", f"but the model has {L} layers")
    whole = config.dim % (2 * config.heads) == 0
    require(whole, "dim", f"must be a multiple of 2 x --heads {config.heads}")
    require(config.dropout < 1, "dropout", "must be below 1")
    require(config.seed < 2**32, "seed", "must be below 2^32")
    require(config.units <= most, "units", f"must be at most {most}")
    require(1 <= config.blocks <= WINDOW, "seconds", f"must be from {BLOCK} to {WINDOW * BLOCK}")
    require(config.phase1 < config.steps, "steps", f"must be more than phase I's {config.phase1}")
    shared = config.batch_size % domains == 0
    require(shared, "batch_size", f"is not a multiple of the {domains} domains")
    within = 0 < config.align_until <= config.phase1
    require(not within, "align_until", f"is within phase I, which ends at {config.phase1}")


def launch(config):
    """Processes, device, precision -> rank, world, device, and a function that makes the autocast
    context to run a model in. Raises ValueError for a device that isn't there."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    best = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    try:
        device = best if config.device == "auto" else torch.device(config.device)
        if device.type == "cuda" and world > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and fast)
    return rank, world, device, partial(torch.autocast, device.type, torch.bfloat16, enabled=low)


def losses(model, bitc, heads, layers, batch, config):
    """The terms of Eq. 12: L_FM, L_BiT and alignment, each a scalar. bitc, heads and layers
    ({layer: lambda}) have an entry a domain; without heads nothing is aligned."""
    cond, b = batch.cond, len(batch.x1) // len(bitc)
    T, e = batch.x1.shape[1], model.embed(batch.cond)
    x_t, u = flow_path(batch.x0, batch.x1, batch.t)
    aligned = sorted({k for lam in layers for k in lam}) if len(heads) else []
    with capture(model.layers, aligned) as hidden:
        v = model(x_t, batch.t, cond, e)
    fm = flow_matching_loss(v, u, spread(cond.mask, T)).mean()
    bit = align = torch.zeros((), device=v.device)
    for d, head in enumerate(bitc):
        own = slice(d * b, d * b + b)
        mask = None if cond.mask is None else cond.mask[own]
        T_x = pool(batch.teacher[d], mask)
        s = head(e[own], T_x, spread(mask, e.shape[1]))
        bit = bit + bitc_loss(s, batch.kept[own])
        if aligned:
            target = T_x if config.align_pool == "clip" else batch.teacher[d]
            h = {k: hidden[k][own] for k in layers[d]}
            far = agrepa_loss(h, heads[d], target, layers[d], spread(mask, T))
            align = align + far.mean() / len(bitc)
    return fm, bit, align


def probe(model, bitc, batch):
    """What each layer stores and contributes, on fixed clips of one domain at each of PROBE_TIMES,
    in eval mode and float32: scores are differences of close numbers. bitc: the domain's head.
    -> PROBED: FoG-A, LASP, the norm of L_FM's gradient, CKA over blocks; each [L][times]."""
    training, mask = model.training, spread(batch.cond.mask, batch.x1.shape[1])
    L, teacher, columns = len(model.layers), batch.teacher[0], []
    T_x = pool(teacher, batch.cond.mask)
    real = torch.ones_like(teacher[..., 0]).bool() if mask is None else batch.cond.mask
    model.eval()
    for now in PROBE_TIMES:
        t = torch.full_like(batch.t, now)
        x_t, u = flow_path(batch.x0, batch.x1, t)
        foga = fog_a(model, model.layers, x_t, t, batch.cond).mean(1)
        with capture(model.layers, range(1, L + 1)) as hidden:
            v = model(x_t, t, batch.cond)
        store = lasp(hidden, bitc, T_x, mask).mean(1)
        loss = flow_matching_loss(v, u, mask).mean()
        gradients = torch.autograd.grad(loss, list(model.layers.parameters()))
        norms = torch.stack([g.norm() for g in gradients]).view(L, -1).norm(dim=1)
        blocks = [pool(hidden[k].detach().unflatten(1, (-1, FRAMES)))[real] for k in sorted(hidden)]
        kernel = torch.stack([cka(h, teacher[real]) for h in blocks])
        columns.append(torch.stack([foga, store, norms, kernel]))
    model.train(training)
    return dict(zip(PROBED, torch.stack(columns, -1).tolist(), strict=True))


def choose(config, probes, d):
    """Eqs. 10, 11 on the mean of domain d's probes in phase I's second half -> {layer: lambda} and
    that mean, {score: [L]}."""
    late = [p["domains"][d] for p in probes if p["step"] > config.phase1 / 2]
    scores = {name: np.mean([p[name] for p in late], axis=(0, 2)).tolist() for name in late[0]}
    lots = torch.Generator().manual_seed(1000 * config.seed + d)
    scores["random"] = torch.rand(config.layers, generator=lots).tolist()
    if config.select == "none":
        return {}, scores
    if config.select in scores:
        layers = list(select_layers(scores[config.select], config.top_k, equal=True))
    else:
        layers = [int(k) for k in config.select.split(",")]
    shares = config.weights == "foga" or (config.weights, config.select) == ("auto", "foga")
    # Listed by FoG-A, however they were chosen.
    if not shares:
        layers.sort(key=lambda k: -scores["foga"][k - 1])
        return dict.fromkeys(layers, 1 / len(layers)), scores
    order = select_layers([scores["foga"][k - 1] for k in layers], len(layers))
    return {layers[i - 1]: lam for i, lam in order.items()}, scores


def report(config, name, lam, scores, probes, d):
    """Prints what a domain's layers store and contribute, which are chosen, and how surely."""
    print(f"\n{name}: mean of the probes after step {config.phase1 // 2}, to {probes[-1]['step']}")
    print("layer   FoG-A    LASP  grad norm     CKA  lambda")
    columns = (scores[name] for name in PROBED)
    for k, row in enumerate(zip(*columns, strict=True), 1):
        chosen = f"  {lam[k]:6.3f}  chosen" if k in lam else ""
        print("{:5d}  {:6.4f}  {:6.3f}  {:9.4f}  {:6.3f}".format(k, *row) + chosen)
    if config.select != "foga":
        return
    foga, K = sorted(scores["foga"], reverse=True), config.top_k
    if K < config.layers:
        margin = foga[K - 1] / max(foga[K], 1e-12) - 1
        print(f"margin: layer {list(lam)[-1]} is {margin:.1%} above the next")
    # Neighbouring probes agree long before the ranking settles: look at the one halfway.
    early = [p for p in probes if p["step"] <= config.phase1 / 2]
    if not early:
        print("one probe can't tell whether the ranking has settled: lower --probe-every")
        return
    led = np.argsort(np.mean(early[-1]["domains"][d]["foga"], 1))[-K:] + 1
    common = len(lam.keys() & set(led.tolist()))
    print(f"{common} of these {K} layers led at step {early[-1]['step']}, too")
    if common < K:
        print("warning: the ranking is still moving; more --probe-steps would settle it")


def parameter_groups(module):
    """AdamW's: weight decay on matrices; none on the token table, biases and the null token."""
    decayed, others = [], []
    for name, p in module.named_parameters():
        (decayed if p.ndim > 1 and name != "tokens.weight" else others).append(p)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def average_gradients(parameters, world):
    """Over all processes, in one message."""
    gradients = [p.grad for p in parameters]
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / world, gradients)


@torch.no_grad()
def update_ema(ema, model, step):
    decay = min(0.9999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def write_text(path, text):
    """By way of a file that is renamed when whole."""
    part = Path(f"{path}.part")
    part.write_text(text, errors="surrogateescape")
    part.replace(path)


def write_table(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def build_model(config, domains):
    """domains: the meta of each prepared folder."""
    vocabulary = [m["units"] * m["codebooks"] for m in domains]
    return VelocityModel(config.layers, config.dim, config.heads, config.dropout, vocabulary)


def same_data(folder, meta, stored):
    """Raises ValueError where a run knew another meta of a prepared folder: its tokens mean others."""
    if any(meta.get(k) != stored[k] for k in stored if k != "centroids"):
        raise ValueError(f"{folder} was prepared anew since the run began; start another run")


class Run:
    """All that training changes, and the folder where it is kept."""

    PARTS = "model ema bitc heads optimiser".split()
    PLAIN = "step seconds layers probes log sums".split()

    def __init__(self, config, data, device, world=1):
        torch.manual_seed(config.seed)
        self.config, self.out, self.device = config, Path(config.out), device
        self.world = world  # how many processes
        self.domains = [{**d.meta, "centroids": torch.tensor(np.array(d.units))} for d in data]
        self.names = [d.meta["name"] for d in data]
        if len(set(self.names)) < len(data):
            self.names = [f"{name}-{i}" for i, name in enumerate(self.names, 1)]
        self.model = build_model(config, self.domains).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        for layer in self.model.layers if config.compile else ():
            layer.forward = torch.compile(layer.forward)  # one graph serves all, hooks see each
        self.bitc = nn.ModuleList(BiTC(config.dim, d.dim) for d in data).to(device)
        self.heads = nn.ModuleList()  # there are none in phase I
        groups = [*parameter_groups(self.model), *parameter_groups(self.bitc)]
        self.optimiser = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        self.step, self.seconds, self.layers, self.probes, self.log = 0, 0.0, [], [], []
        self.sums = [0.0] * 5  # since the last line: loss, fm, bitc, align, and how many steps
        self.began = time.time()
        self.line = time.time(), 0  # when the last line was written, and at which step

    def choose(self, rank):
        """Phase I is over: each domain's {layer: lambda}, and a head a layer."""
        found = [choose(self.config, self.probes, d) for d in range(len(self.domains))]
        self.layers = [lam for lam, _ in found]
        if dist.is_initialized():
            dist.broadcast_object_list(self.layers)
        self.add_heads()
        if rank:
            return
        entries = {}
        for d, (lam, scores) in enumerate(found):
            entry = {"layers": list(lam), "weights": list(lam.values())}
            entries[self.names[d]] = {**entry, **{name: scores[name] for name in PROBED}}
            report(self.config, self.names[d], lam, scores, self.probes, d)
        write_text(self.out / "layers.json", json.dumps(entries, indent=1))

    def add_heads(self):
        torch.manual_seed(self.config.seed + 1)  # alike in every process
        for lam, meta in zip(self.layers, self.domains, strict=True):
            self.heads.append(AlignmentHeads(lam, self.config.dim, meta["dim"]).to(self.device))
        for group in parameter_groups(self.heads):
            self.optimiser.add_param_group(group)

    def learning_rate(self):
        rise = (self.step + 1) / max(1, self.config.phase1 // 3)
        fall = 0.5 + 0.5 * math.cos(math.pi * self.step / self.config.steps)
        return self.config.lr * min(rise, fall)

    def update(self, *terms):
        """One step of AdamW; a gradient that isn't finite changes nothing. terms: for the log."""
        heads = [p for p in self.heads.parameters() if p.grad is not None]
        others = [*self.model.parameters(), *self.bitc.parameters()]
        if self.world > 1:
            average_gradients([*others, *heads], self.world)
        # Heads are clipped apart: they must not shrink the model's step.
        norms = [nn.utils.clip_grad_norm_(part, 1.0) for part in (others, heads) if part]
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        if torch.stack(norms).isfinite().all():
            self.optimiser.step()
            row = [*torch.stack(terms).tolist(), 1.0]
            self.sums = [total + x for total, x in zip(self.sums, row, strict=True)]
        self.optimiser.zero_grad(set_to_none=True)
        update_ema(self.ema, self.model, self.step)
        self.step += 1

    @torch.no_grad()
    def write_log(self, held_out, frames, autocast):
        """A line of log.csv and of the screen, with the loss on held-out clips."""
        with autocast():
            x_t, u = flow_path(held_out.x0, held_out.x1, held_out.t)
            v = self.ema(x_t, held_out.t, held_out.cond)
        val, now = flow_matching_loss(v, u, held_out.scored).mean().item(), time.time()
        (began, start), (*sums, count) = self.line, self.sums
        if self.step > start and not count:
            # Steps without one change nothing: the loss tells whether it was good until then.
            why = "look into the data, or take --dtype float32" if val < 10 else "lower --lr"
            raise ValueError(f"no finite gradient since step {start}, loss {val:.3g}: {why}")
        pace = (now - began) / max(1, self.step - start)  # seconds a step
        row = dict.fromkeys(LOG, "")
        row |= {"step": self.step, "phase": 1 + (self.step > self.config.phase1)}
        row |= {"val_fm": f"{val:.5f}", "lr": f"{self.learning_rate():.3e}"}
        row["seconds"] = f"{self.seconds + now - self.began:.1f}"
        if count:
            for name, total in zip(LOG[2:6], sums, strict=True):
                row[name] = f"{total / count:.5f}" if total else ""
            row["frames_per_s"] = f"{frames / pace:.0f}"
        self.log.append(list(row.values()))
        write_table(self.out / "log.csv", LOG, self.log)
        shown = "step fm bitc align val_fm lr frames_per_s".split()
        left = datetime.timedelta(seconds=int(pace * (self.config.steps - self.step)))
        end = f"{left} left" if count else ""
        print(*(f"{k} {row[k] or '-':>7} " for k in shown), end, flush=True)
        self.line, self.sums = (now, self.step), [0.0] * 5

    def probe(self, clips):
        """clips: a batch of each domain's."""
        pairs = zip(self.bitc, clips, strict=True)
        found = [probe(self.model, head, batch) for head, batch in pairs]
        self.probes.append({"step": self.step, "domains": found})

    def write_probes(self):
        rows = []
        for p in self.probes:
            for name, scores in zip(self.names, p["domains"], strict=True):
                for k, at in enumerate(zip(*scores.values(), strict=True), 1):
                    at = np.array(at)  # [scores, times]; an empty t is the mean over t
                    for t, row in [*zip(PROBE_TIMES, at.T, strict=True), ("", at.mean(1))]:
                        rows.append([p["step"], name, k, t, *(f"{x:.6g}" for x in row)])
        write_table(self.out / "probe.csv", ["step", "domain", "layer", "t", *PROBED], rows)

    def save(self):
        """last.pt, by way of a file that is renamed when whole; the one before is previous.pt."""
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        state |= {name: getattr(self, name) for name in (*self.PLAIN, "names", "domains", "world")}
        state |= {"format": CHECKPOINT, "config": dataclasses.asdict(self.config)}
        state["seconds"] += time.time() - self.began
        last, part = self.out / "last.pt", self.out / "last.pt.part"
        try:
            torch.save(state, part)
        except RuntimeError as error:  # a full disk
            why = str(error).splitlines()[0]
            raise OSError(f"{part} can't be written, is the disk full? ({why})") from None
        if last.exists():
            last.replace(self.out / "previous.pt")
        part.replace(last)

    def load(self, state):
        if state.get("world", self.world) != self.world:
            why = f"{self.out} was run by {state['world']} processes, not {self.world}"
            raise ValueError(f"--resume: {why}: the batches would be others")
        for folder, meta, stored in zip(
            self.config.data, self.domains, state["domains"], strict=True
        ):
            same_data(folder, meta, stored)
        for name in self.PLAIN:
            setattr(self, name, state[name])
        if self.layers:
            self.add_heads()
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.line = time.time(), self.step


@contextlib.contextmanager
def interruptible():
    """-> a list that Ctrl-C and SIGTERM fill: whoever looks into it can end a step first."""
    stop, signals = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, lambda *_: stop.append(1)) for s in signals]
    try:
        yield stop
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)


def train(config, state=None):
    """One run, two phases; all it writes stands in config.out. state: a checkpoint to go on from.
    -> each domain's {layer: lambda}. Raises KeyboardInterrupt when stopped, its last step saved
    (under torchrun its last checkpoint)."""
    rank, world, device, autocast = launch(config)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    data = [BlockDataset(folder, config.raw_teacher) for folder in config.data]
    run = Run(config, data, device, world)
    if state:
        run.load(state)
    held_out = held_out_batch(data, config, 16, device=device)
    probed = [held_out_batch(data, config, PROBE_CLIPS, d, device) for d in range(len(data))]
    make = partial(training_batch, data, config, rank=rank, world=world, device=device)
    batches, frames = prefetch(make, run.step), config.batch_size * config.blocks * FRAMES * world
    if rank == 0 and not state:
        run.out.mkdir(parents=True, exist_ok=True)
        write_text(run.out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        run.write_log(held_out, frames, autocast)

    with interruptible() as stop:
        while run.step < config.steps and not stop:
            batch = next(batches)
            torch.manual_seed(hash((config.seed, run.step, rank)) % 2**32)  # dropout's

            # Phase I, without heads: L_FM + lambda_BiT L_BiT. Phase II: Eq. 12.
            over = 0 < config.align_until <= run.step
            heads = [] if over else run.heads
            with autocast():
                fm, bit, align = losses(run.model, run.bitc, heads, run.layers, batch, config)
                loss = fm + config.bit_weight * bit + config.align_weight * align
            loss.backward()
            run.update(loss, fm, bit, align)

            # Phase I probes now and then, and ends with the choice of layers.
            ends, last = run.step == config.phase1, run.step == config.steps
            if run.step <= config.phase1 and (run.step % config.every == 0 or ends):
                run.probe(probed)
                if rank == 0:
                    run.write_probes()
            if ends:
                run.choose(rank)

            if rank == 0 and (run.step % config.eval_every == 0 or ends or last):
                run.write_log(held_out, frames, autocast)
            if rank == 0 and (run.step % config.save_every == 0 or ends or last):
                run.save()
        if stop and rank == 0:
            run.save()
    batches.close()
    if run.step < config.steps:
        again = f"python agrepa.py --out {config.out} --resume goes on"
        raise KeyboardInterrupt(f"stopped at step {run.step}; {again}")
    return dict(zip(run.names, run.layers, strict=True))


# ---- 12. Listening, measuring, drawing (Fig. 1) --------------------------------------------------
# Nothing above depends on what stands here.


def load_checkpoint(path):
    """A checkpoint's content; no code in it runs. Raises ValueError where it isn't whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load doesn't look at the checksums
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != CHECKPOINT:
            raise ValueError("another version made it")
        if not {*Run.PARTS, *Run.PLAIN, "names", "domains"} <= state.keys():
            raise ValueError("parts are missing")
        check(Config(**state["config"]))
        for meta in state["domains"]:
            scaled = math.isfinite(meta["mel_mean"] * meta["mel_std"])
            if not scaled or meta["centroids"].shape[0] != meta["units"]:
                raise ValueError("a domain's values don't fit each other")
        return state
    except Exception as error:  # torch.load raises a dozen kinds
        raise ValueError(f"{path}: not a whole checkpoint of agrepa.py ({error})") from None


# Default, least and most; a sway beyond would let time turn back.
SAMPLED = {
    "seed": (0, 0, 2**32),
    "nfe": (32, 1, 10_000),
    "guidance": (3.0, -1e3, 1e3),
    "sway": (-1.0, -1, 1.75),
}


class Voice:
    """One domain of a checkpoint, to listen to: its EMA model, its teachers and its tokenizer."""

    def __init__(self, state, d, given):
        self.given, self.d = given, d
        self.how = {}
        for k, (default, least, most) in SAMPLED.items():
            self.how[k] = given.get(k, default)
            if not least <= self.how[k] <= most:
                raise ValueError(f"{named(k, self.how[k])} must be from {least} to {most}")
        own = {k: given[k] for k in ("device", "dtype") if k in given}
        try:
            self.config = Config(**{**state["config"], "device": "auto", **own})
            *_, self.device, self.autocast = launch(self.config)
            self.model = build_model(self.config, state["domains"]).to(self.device)
            self.model.load_state_dict(state["ema"])
            self.meta = state["domains"][d]
            self.r = TEACHER_FRAMES * self.meta["codebooks"]  # tokens a block
            tokenizer = Tokenizer(self.meta["centroids"], self.meta["codebooks"])
            self.tokenizer = tokenizer.to(self.device)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"checkpoint: its settings don't fit its weights ({error})") from None
        self.model.eval().requires_grad_(False)

    @cached_property
    def data(self):
        """The prepared folder that it was trained on."""
        folder = self.config.data[self.d]
        data = BlockDataset(folder)
        same_data(folder, data.meta, self.meta)
        return data

    @cached_property
    def teachers(self):
        """The domain's, and the one its units are of. Code runs only if the command line names it."""
        specs = [self.meta["teacher"], self.meta["units_teacher"]]
        trusted = self.given.get("teacher"), self.given.get("units_teacher")
        for spec in dict.fromkeys(specs):
            if ":" in spec and spec not in trusted:
                raise ValueError(f"its teacher is code, and runs only if you say --teacher {spec}")
            if code_of(spec) != self.meta["settings"]["code"].get(spec):
                why = "has changed since it taught: the same sounds may get other tokens now"
                print(f"warning: {spec} {why}", file=sys.stderr)
        made = {s: Teacher(s, self.meta["teacher_layer"]).to(self.device) for s in set(specs)}
        return [made[spec] for spec in specs]

    def hear(self, wave16, wave24):
        """A sound of any length -> mel [n x 15, M], normalised, tokens [n x r], features [n x 8, dim]."""
        windows = wave16.to(self.device).split(WINDOW * 2560)  # as preparation takes them
        heard = {t: torch.cat([t(w[None])[0] for w in windows]) for t in set(self.teachers)}
        features, own = (heard[t] for t in self.teachers)
        mel = log_mel(wave24[None].to(self.device))
        tokens = self.tokenizer(own[None], mel)[0]
        return (mel[0] - self.meta["mel_mean"]) / self.meta["mel_std"], tokens, features

    def hear_file(self, path):
        try:
            return self.hear(*read_audio(path))[:2]
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None

    def speak(self, mel, vocoder="griffinlim"):
        """Normalised mel [n x 15, M] -> sound [n x 3840] at 24 kHz."""
        return mel_to_wave(mel[None] * self.meta["mel_std"] + self.meta["mel_mean"], vocoder)[0]


def resynthesise(voice, tokens, prompt, prompt_tokens, seed=0, **how):
    """Tokens of a sound of any length [n x r] -> its mel [n x 15, M], in the voice of a prompt
    [p x 15, M] with its tokens [p x r]. Windows of a training clip's length, prompt included, fade
    over a third into each other; four are sampled at a time. how: of sample()."""
    p, r, n = len(prompt), voice.r, len(tokens) // voice.r
    body = min(n, max(1, voice.config.blocks - p // FRAMES))
    starts = sorted({min(s, n - body) for s in range(0, n, body - body // 3)})
    noise = stream(SAMPLING, seed).standard_normal((p + n * FRAMES, N_MELS), dtype=np.float32)
    noise = torch.from_numpy(noise).to(prompt)
    fade = torch.hann_window(body * FRAMES + 2, False, device=prompt.device)[1:-1, None]
    total, weight = torch.zeros_like(noise[p:]), torch.zeros_like(noise[p:, :1])
    for i in range(0, len(starts), 4):
        some = starts[i : i + 4]
        ids = [torch.cat([prompt_tokens, tokens[s * r : (s + body) * r]]) for s in some]
        x0 = [torch.cat([noise[:p], noise[p + s * FRAMES :][: body * FRAMES]]) for s in some]
        ref = F.pad(prompt, (0, 0, 0, body * FRAMES)).expand(len(some), -1, -1)
        domain = torch.full((len(some),), voice.d, device=prompt.device)
        cond = Condition(torch.stack(ids), ref, domain, domain >= 0)
        with voice.autocast():
            made = sample(voice.model, cond, torch.stack(x0), **how)
        for s, x in zip(some, made[:, p:], strict=True):
            total[s * FRAMES : (s + body) * FRAMES] += fade * x
            weight[s * FRAMES : (s + body) * FRAMES] += fade
    return total / weight


def split_prompt(voice, clip):
    """A clip without padding: its first 30 %, a training reference's length at most, are the prompt
    -> mel and tokens of the prompt, mel [m x 15, M] and tokens [m x r] of the rest."""
    mel, tokens = (torch.from_numpy(clip[k]).to(voice.device) for k in ("x1", "tokens"))
    p = int(0.3 * min(clip["real"], voice.config.blocks))
    return mel[: p * FRAMES], tokens[: p * voice.r], mel[p * FRAMES :], tokens[p * voice.r :]


def continued(voice, clip, **how):
    """Generates a clip's rest from its prompt -> that mel, the real mel, its tokens."""
    prompt, prompt_tokens, mel, tokens = split_prompt(voice, clip)
    return resynthesise(voice, tokens, prompt, prompt_tokens, **how), mel, tokens


def write_wave(path, wave):
    import soundfile

    wave = (wave / wave.abs().max().clamp(min=1)).cpu().numpy()
    try:
        soundfile.write(os.fsencode(f"{path}.part"), wave, RATE, format="WAV")
    except RuntimeError as error:  # soundfile's own
        raise OSError(f"{path} can't be written: {error}") from None
    os.replace(f"{path}.part", path)


def sample_file(given):
    """--sample: the tokens of --input, sounded again in the voice of --prompt."""
    state, output = load_checkpoint(given["sample"]), given.get("output")
    name, names = given.get("domain", state["names"][0]), state["names"]
    if "input" not in given or not output or name not in names:
        which = ", ".join(names)
        raise ValueError(f"--sample needs --input FILE, --output FILE.wav, a --domain of {which}")
    if not output.endswith(".wav"):
        raise ValueError(f"--output {output}: must end in .wav")
    for path in (output, f"{output}.part"):  # written first
        if os.path.exists(path):
            raise ValueError(f"--output {path}: exists already; nothing is overwritten")
    if not os.access(Path(output).parent, os.W_OK):
        raise ValueError(f"--output {output}: can't be written there")
    voice = Voice(state, names.index(name), given)
    mel, tokens = voice.hear_file(given["input"])
    prompt, heard = voice.hear_file(given["prompt"]) if "prompt" in given else (mel, tokens)
    p = min(len(prompt) // FRAMES, max(1, int(0.3 * voice.config.blocks)))
    made = resynthesise(voice, tokens, prompt[: p * FRAMES], heard[: p * voice.r], **voice.how)
    write_wave(output, voice.speak(made, given.get("vocoder", "griffinlim")))
    print(f"{output}: {len(made) / FRAMES * BLOCK:.2f} s")


def finish(out, given):
    """A run's end: a held-out clip of each domain, generated beside real, through the same vocoder.
    The clip's beginning is the prompt, and stands in neither."""
    state = load_checkpoint(out / "last.pt")
    for d, name in enumerate(state["names"]):
        voice = Voice(state, d, given)
        data = voice.data
        u = max(data.held_out(0), key=lambda u: data.blocks[u])
        made, real, _ = continued(voice, data.clip(u, 0, min(60, data.blocks[u])))
        write_wave(out / f"sample-{name}.wav", voice.speak(made))
        write_wave(out / f"target-{name}.wav", voice.speak(real))
    print(f"sound, generated and real: {out}/sample-*.wav, {out}/target-*.wav")
    try:
        print("pictures:", *figures(out))
    except (ImportError, ValueError) as error:
        print(f"no pictures: {error}")


def frechet(a, b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of Gaussians fitted to rows a [n, d], b [m, d]."""
    A, B = np.cov(a.T), np.cov(b.T)
    cross = np.sqrt(np.linalg.eigvals(A @ B).real.clip(0)).sum()  # the trace of (A B)^(1/2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * cross)


def held_out_clips(data, n, part, rows):
    """Held-out utterances cut into clips of n blocks or what is left of them, none twice, in random
    order: as many as have `rows` blocks after their first 30 %."""
    cuts = [(u, s) for u in data.held_out(part) for s in range(0, data.blocks[u], n)]
    for u, start in stream(HELD_OUT, 1).permutation(cuts):
        if rows > 0:
            clip = data.clip(u, start, min(n, data.blocks[u] - start))
            rows -= clip["real"] - int(0.3 * clip["real"])
            yield clip


def measure(voice, mel, tokens):
    """A sound by itself, through the vocoder: a row a block of teacher features and of the mel's
    means and deviations; whether the unit heard is another than the token."""
    from torchaudio.functional import resample

    wave, blocks = voice.speak(mel), mel.unflatten(0, (-1, FRAMES))
    _, units, features = voice.hear(resample(wave, RATE, TEACHER_RATE), wave)
    rows = pool(features.unflatten(0, (-1, TEACHER_FRAMES)))
    wrong = (units != tokens)[:: voice.meta["codebooks"]]
    shape = torch.cat([blocks.mean(1), blocks.std(1)], 1)
    return [x.cpu().double().numpy() for x in (rows, shape, wrong)]


@torch.no_grad()
def evaluate_domain(voice, name):
    """Generated and real clips, and as many other real ones -> {metric: value}."""
    data, seconds, made, real = voice.data, 0.0, [], []
    need, seed = max(data.dim, 2 * N_MELS), 10_000 * voice.how["seed"]
    clips, rest = (list(held_out_clips(data, voice.config.blocks, i, 3 * need)) for i in (0, 1))
    print(f"{name}: {len(clips)} held-out clips, and {len(rest)} others", flush=True)
    for i, clip in enumerate(clips):
        began = time.time()
        mel, real_mel, tokens = continued(voice, clip, **{**voice.how, "seed": seed + i})
        mel.sum().item()  # a GPU runs behind: wait for it
        seconds += time.time() - began
        made.append(measure(voice, mel, tokens))
        real.append(measure(voice, real_mel, tokens))
    others = [measure(voice, *split_prompt(voice, clip)[2:]) for clip in rest]
    made, real, others = (
        [np.concatenate(x) for x in zip(*m, strict=True)] for m in (made, real, others)
    )
    rows = min(len(real[0]), len(others[0]))
    if rows <= need:
        why = f"{rows} blocks in each half of what is held out"
        raise ValueError(f"{name}: {why} give no covariance of {need} values; hold out more")
    return {
        **voice.how,
        "rows": rows,
        "frechet": frechet(made[0][:rows], real[0][:rows]),
        "frechet_other_real": frechet(others[0][:rows], real[0][:rows]),
        "mel_frechet": frechet(made[1][:rows], real[1][:rows]),
        "mel_frechet_other_real": frechet(others[1][:rows], real[1][:rows]),
        "unit_error": float(made[2].mean()),
        "unit_error_recording": float(real[2].mean()),
        "real_time_factor": seconds / (len(made[0]) * BLOCK),
    }


def evaluate(path, given):
    """A checkpoint's metrics on held-out audio; a run's last also go into its metrics.json. Each
    Frechet distance to the real clips stands beside that of as many other held-out ones; the unit
    error beside that of the recordings themselves, heard through the vocoder."""
    state, path, metrics = load_checkpoint(path), Path(path), {}
    for d, name in enumerate(state["names"]):
        found = evaluate_domain(Voice(state, d, given), name)
        metrics[name] = {"step": state["step"], **found}
    if path.name == "last.pt" and path.with_name("config.json").exists():
        write_text(path.with_name("metrics.json"), json.dumps(metrics, indent=1))
    return metrics


def read_run(folder):
    """-> config.json, layers.json and the rows of log.csv."""
    try:
        config = Config(**json.loads((folder / "config.json").read_text()))
        layers = json.loads((folder / "layers.json").read_text())
        check(config)
        with open(folder / "log.csv", errors="surrogateescape") as file:
            log = list(csv.DictReader(file))
        whole = all({"layers", *PROBED} <= entry.keys() for entry in layers.values())
        if not whole or not set(LOG) <= log[-1].keys():
            raise ValueError("parts are missing")
        return dataclasses.asdict(config), layers, log
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not the folder of a run past its phase I ({error})") from None


def figures(folder):
    """A run's pictures, from its tables and sounds, into its folder -> their paths. Raises
    ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(folder)
    _, chosen, log = read_run(folder)
    made = [folder / f"{name}.png" for name in ("dissociation", "loss", "mel")]
    shape = {"squeeze": False, "layout": "constrained", "figsize": (8, 3 * len(chosen))}

    fig, axes = pyplot.subplots(len(chosen), 2, sharey=True, **shape)  # Fig. 1
    for (name, entry), (store, contribute) in zip(chosen.items(), axes, strict=True):
        layers = range(1, len(entry["foga"]) + 1)
        colours = ["#1f4e79" if k in entry["layers"] else "#b4c4d4" for k in layers]
        store.barh([k - 0.2 for k in layers], entry["lasp"], 0.4, color="#e0a030")
        store.barh([k + 0.2 for k in layers], entry["cka"], 0.4, color="#b4c4d4")
        contribute.barh(layers, entry["foga"], color=colours)
        store.set(title=f"{name}: stores", xlabel="LASP (yellow), CKA (grey)")
        store.set(ylabel="layer", yticks=layers)
        contribute.set(title="contributes (dark: chosen)", xlabel="FoG-A (relative change)")
    axes[0, 0].invert_yaxis()
    fig.savefig(made[0])

    fig, ax = pyplot.subplots(layout="constrained", figsize=(8, 3.5))
    for column, style in {"fm": "-", "val_fm": "--", "bitc": "-.", "align": ":"}.items():
        line = [(int(r["step"]), float(r[column])) for r in log if r[column]]
        ax.plot(*np.array(line or [(0, math.nan)]).T, style, label=column)
    ax.axvline(max(int(r["step"]) for r in log if r["phase"] == "1"), color="grey", label="chosen")
    ax.set(xlabel="step", ylabel="loss", ylim=(0, None))
    ax.legend()
    fig.savefig(made[1])

    fig, axes = pyplot.subplots(len(chosen), 2, sharey=True, **shape)
    for name, row in zip(chosen, axes, strict=True):
        sounds = [read_audio(folder / f"{kind}-{name}.wav")[1] for kind in ("target", "sample")]
        mels = [log_mel(sound[None])[0].T for sound in sounds]
        low, high = mels[0].quantile(torch.tensor([0.05, 0.99]))  # one scale for both
        for ax, mel, kind in zip(row, mels, ("real", "generated"), strict=True):
            area = (0, mel.shape[1] * HOP / RATE, 0, N_MELS)
            ax.imshow(mel, "magma", vmin=low, vmax=high, origin="lower", aspect="auto", extent=area)
            ax.set(title=f"{name}: {kind}", xlabel="time (s)", ylabel="mel bin")
    fig.savefig(made[2])
    pyplot.close("all")
    return made


def compare(folders):
    """Prints what finished runs came to. Those that differ in the seed alone are taken together: the
    mean of each figure and, after +-, its standard deviation."""
    runs, groups = [], collections.defaultdict(list)
    for folder in dict.fromkeys(map(Path, folders)):
        config, chosen, log = read_run(folder)
        if int(log[-1]["step"]) < config["steps"]:
            raise ValueError(f"{folder}: not finished; --out {folder} --resume goes on")
        found = {"held-out loss": float(log[-1]["val_fm"])}
        if (folder / "metrics.json").exists():
            for name, row in json.loads((folder / "metrics.json").read_text()).items():
                if row.pop("step", None) != config["steps"]:
                    raise ValueError(f"{folder}: --evaluate {folder}/last.pt again; it has gone on")
                how = {k: row.pop(k) for k in SAMPLED}
                other = " ".join(named(k, x) for k, x in how.items() if x != SAMPLED[k][0])
                found |= {f"{name} {metric} {other}": value for metric, value in row.items()}
        runs.append((config, found))
        layers = (f"{name} {entry['layers']}" for name, entry in chosen.items())
        print(f"{folder}: seed {config['seed']}, layers", *layers)
    first, apart = runs[0][0], "seed out resume cache eval_every save_every".split()
    differing = [k for k in first if k not in apart and any(c[k] != first[k] for c, _ in runs)]
    for config, found in runs:
        groups[" ".join(named(k, config[k]) for k in differing)].append(found)
    for label, alike in groups.items():
        print(f"\n{len(alike)} x {label}")
        names = dict.fromkeys(name for found in alike for name in found)
        width = max(map(len, names))
        for name in names:
            values = [found[name] for found in alike if name in found]
            deviation = f" +- {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
            print(f"  {name:{width}}  {np.mean(values):.4g}{deviation}  ({len(values)})")


# ---- 13. Command line ----------------------------------------------------------------------------

# Without --data: the toy corpus, and a model that learns it in two minutes on two cores.
TOY = (
    "--layers 6 --dim 128 --heads 4 --seconds 1.92 --steps 240 --lr 2e-3 --teacher MFCC --units 64 "
    "--probe-steps 90 --probe-every 15 --eval-every 40"
)
# Settings that a prepared folder depends on.
PREPARATION = "teacher teacher_layer units_teacher codebooks units".split()


def add_flags(parser, names):
    """Config's fields as flags; those not given stay out of the result."""
    for f in dataclasses.fields(Config):
        if f.name in names:
            kind = {"type": type(f.default)}
            if f.name == "data":
                kind = {"nargs": "+"}
            elif f.default is False:
                kind = {"action": "store_true"}
            default = f" (default: {f.default})" if f.default else ""
            how = {**kind, **f.metadata, "help": f.metadata["help"] + default}
            parser.add_argument("--" + f.name.replace("_", "-"), **how)


def parse(arguments):
    """-> the flags given, by name."""
    text = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(description=text, argument_default=argparse.SUPPRESS)
    add_flags(parser, [f.name for f in dataclasses.fields(Config)])
    other = parser.add_argument_group("instead of training").add_argument
    other("--sample", metavar="CKPT", help="sound --input again from its tokens, into --output")
    other("--input", metavar="FILE")
    other("--output", metavar="FILE.wav")
    other("--prompt", metavar="FILE", help="whose voice (default: the input's first seconds)")
    other("--domain", help="default: the checkpoint's first")
    other("--nfe", type=int, help="Euler steps (default: 32)")
    other("--guidance", type=float, help="default: 3 (1: off); overdrives the mel of short runs")
    other("--sway", type=float, help="default: -1")
    other("--vocoder", choices=("griffinlim", "vocos"), help="default: griffinlim")
    other("--evaluate", metavar="CKPT", help="metrics on held-out audio")
    other("--figures", nargs="+", metavar="RUN", help="draw a run, or compare several in a table")
    return vars(parser.parse_args(arguments))


def data_prep(*arguments):
    """Runs data_prep.py beside this file; its progress is seen -> its last line of output."""
    path = Path(__file__).with_name("data_prep.py")
    if not path.exists():
        raise ValueError(f"{path} is missing; --data takes folders that it has prepared")
    how = {"encoding": "utf-8", "errors": "surrogateescape", "stdout": subprocess.PIPE}
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:surrogateescape"}
    done = subprocess.run([sys.executable, path, *arguments], env=env, **how)
    if done.returncode:
        sys.exit(done.returncode)  # it said why
    return done.stdout.splitlines()[-1]


def prepared_folder(folder, config):
    """The prepared folder for an entry of --data; audio is prepared by data_prep.py, once."""
    if not (Path(folder) / "mel.npy").exists():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            why = f"python data_prep.py {folder}, and give --data the folder that it names"
            raise ValueError(f"--data {folder}: not prepared yet; before torchrun, once: {why}")
        flags = [(f"--{k.replace('_', '-')}", getattr(config, k)) for k in PREPARATION]
        flags += [("--cache", config.cache), ("--device", config.device)]
        return data_prep(folder, *(str(x) for pair in flags for x in pair))
    return str(Path(folder))


def metas(config, given):
    """Each prepared folder's; config then says what they were prepared with, where they agree."""
    found = [BlockDataset(folder).meta for folder in config.data]
    if len({meta["codebooks"] for meta in found}) > 1:
        raise ValueError("--data: the domains differ in their codebooks; prepare them alike")
    for k in PREPARATION:
        for folder, meta in zip(config.data, found, strict=True):
            if given.get(k, meta[k]) != meta[k]:
                was = f"{folder} was prepared with {meta[k]}; prepare the audio again"
                raise ValueError(f"{named(k, given[k])}: {was}")
        if len({meta[k] for meta in found}) == 1:
            setattr(config, k, found[0][k])
    return found


def lock(path):
    """Holds a file open for this process alone, until it ends. Raises ValueError where another
    does. On Windows, which has no fcntl, nothing is locked."""
    with contextlib.suppress(ImportError):
        import fcntl

        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ValueError(f"{path.parent} is in use by process {file.read()}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file


def resumed(given):
    """--resume: the stored settings with the flags given, and the newest whole checkpoint."""
    if "out" not in given:
        raise ValueError("--resume: which run? Name its folder with --out")
    out = Path(given["out"])
    try:
        stored = dataclasses.asdict(Config(**json.loads((out / "config.json").read_text())))
        config = Config(**{**stored, **given})
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"--resume: no run's settings in --out {out} ({error})") from None
    free = "data device dtype compile eval_every save_every resume cache out".split()
    for k in given.keys() & stored.keys() - set(free):
        if given[k] != stored[k]:
            was = f"{out} was run with {named(k, stored[k])}"
            raise ValueError(f"--resume: {was}, not {given[k]}")
    found = [path for path in (out / "last.pt", out / "previous.pt") if path.exists()]
    for path in found:
        try:
            state = load_checkpoint(path)
            print(f"going on from {path}, step {state['step']}")
            return config, stored["data"], state
        except ValueError as error:
            print(error, file=sys.stderr)
    if found or (out / "layers.json").exists():
        raise ValueError("--resume: no whole checkpoint is left; another --out starts anew")
    return config, stored["data"], None


def new_folder(config, names):
    """--out, or the next free runs/<data>-<number>, made."""
    out = Path(config.out)
    if not config.out:
        for i in itertools.count(1):
            out = Path("runs", f"{'+'.join(names)}-{i}")
            with contextlib.suppress(FileExistsError):
                out.mkdir(parents=True)
                return str(out)
    out.mkdir(parents=True, exist_ok=True)
    if any(path.name != ".lock" for path in out.iterdir()):
        raise ValueError(f"--out {out}: not empty; --resume goes on with a run, or choose another")
    return str(out)


def run_training(given):
    before = state = None
    if "resume" in given:
        config, before, state = resumed(given)
    else:
        if "data" not in given:
            print("toy corpus; a small model:", TOY, flush=True)
            given = {**parse(TOY.split()), **given}
        config = Config(**given)
    check(config)
    rank, world, device, _ = launch(config)
    if not config.data:
        toy = data_prep("--toy", str(Path(config.cache) / "toy-audio"))
        config.data = [f"{toy}/toy-speech", f"{toy}/toy-sounds"]
    config.data = [prepared_folder(folder, config) for folder in config.data]
    if before and config.data != list(before):
        raise ValueError(f"--resume: {config.out} was run with --data {' '.join(before)}")
    domains = metas(config, given)
    if rank == 0:
        config.out = config.out if before else new_folder(config, [m["name"] for m in domains])
        held = lock(Path(config.out) / ".lock")
        for m in domains:
            size = f"{m['hours']:.2f} h, teacher {m['teacher']}, {m['units']} units"
            print(f"domain {m['name']}: {size}")
        phase1 = f"phase I to step {config.phase1}, a probe every {config.every}"
        size = f"{config.layers} layers of width {config.dim} on {world} x {device.type}"
        print(f"{size}; {phase1}; run folder {config.out}", flush=True)
    train(config, state)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        finish(Path(config.out), given)
        del held


LISTENING = {*SAMPLED, "teacher", "units_teacher", "device", "dtype"}
MODES = {  # what goes with each
    "sample": {*LISTENING, "input", "output", "prompt", "domain", "vocoder"},
    "evaluate": LISTENING,
    "figures": set(),
    "training": {f.name for f in dataclasses.fields(Config)},
}


def dispatch(given):
    mode = next((mode for mode in MODES if mode in given), "training")
    stray = given.keys() - MODES[mode] - {mode}
    if stray:
        where = f"--{mode}" if mode in given else mode
        raise ValueError(f"--{min(stray).replace('_', '-')} does not go with {where}; leave it out")
    if mode == "sample":
        sample_file(given)
    elif mode == "evaluate":
        for name, row in evaluate(given["evaluate"], given).items():
            print(name, *(f"  {k:24} {v:.5g}" for k, v in row.items()), sep="\n")
    elif mode == "figures" and len(given["figures"]) > 1:
        compare(given["figures"])
    elif mode == "figures":
        print(*figures(given["figures"][0]), sep="\n")
    else:
        run_training(given)


def guarded(work, *arguments):
    """Runs a program: an error is a line and exit code 2, Ctrl-C or SIGTERM a line and 130."""
    for output in (sys.stdout, sys.stderr):
        if output.errors == "strict":
            output.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return work(*arguments)
    except ImportError as error:
        print(f"{sys.argv[0]}: {error}; pip install {error.name}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped; preparation goes on with the same command'}", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)


def main():
    guarded(dispatch, parse(sys.argv[1:]))


if __name__ == "__main__":
    main()
