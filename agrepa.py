"""AG-REPA: Causal Layer Selection for Representation Alignment in Audio Flow Matching.

The method of arXiv 2603.01006 (ICML 2026), equation by equation, in one file:

    python agrepa.py                                   # toy corpus, minutes on a CPU
    python agrepa.py --data ./LibriTTS --steps 100000  # prepare, probe, select, align
    torchrun --nproc_per_node=8 agrepa.py --data prepared/LibriTTS-1   # once prepared
    python agrepa.py --sample runs/LibriTTS-1/last.pt  # held-out sounds

 1  flow matching       Eqs. 1, 2    flow_path, flow_matching_loss
 2  velocity model      Eqs. 7, 15   VelocityModel, Condition, interleave
 3  teacher             T(x)         Teacher, log_mel
 4  token interface     Eqs. 3 to 5  pool, BiTC, bitc_loss
 5  store               Eq. 6        lasp
 6  contribute          Eqs. 8, 9    fog_a
 7  selection           Eqs. 10, 11  select_layers
 8  alignment           Eq. 12       capture, AlignmentHeads, agrepa_loss
 9  sampling            App. A       sample, mel_to_wave
10  data                             PreparedFolder, training_batches, fixed_batch
11  training            App. A.5     Config, Objective, probe, choose, train
12  sound                            write_samples
13  command line                     main

Shapes: B clips, n chunks and T mel frames of a clip, N tokens, M mel bins, D the
model's width; L layers, counted from 1, k one of them, K chosen. Time is in chunks of
0.16 s, the shortest stretch that is whole in both clocks: 15 mel frames (hop 256 at
24 kHz) and 8 teacher frames (20 ms). T_x is T(x), a clip's teacher feature.
data_prep.py turns audio into what section 10 reads; results/picture.py draws a run.
"""

import argparse
import contextlib
import copy
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch import distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

# The Vocos 24 kHz mel format: rate, hop and mel bins
RATE = 24_000
HOP = 256
N_MELS = 100
TEACHER_RATE = 16_000  # HuBERT's
CHUNK = 0.16  # seconds
MEL_FRAMES = 15  # of a chunk
TEACHER_FRAMES = 8  # of a chunk

# ---- 1. Flow matching (Eqs. 1, 2) --------------------------------------------------
#     x_t = (1 - t) x0 + t x1     u = x1 - x0     L_FM = E ||v(x_t, t, c) - u||^2
#
# Straight lines from noise x0 at t = 0 to data x1 at t = 1; the model learns their
# velocity u.


def flow_path(x0, x1, t):
    """Eq. 1. x0, x1 [B, ...], t [B] in [0, 1] -> x_t and u, both [B, ...]."""
    t = t.view(-1, *[1] * (x0.dim() - 1))
    x_t = (1 - t) * x0 + t * x1
    u = x1 - x0
    return x_t, u


def flow_matching_loss(v, u, mask=None):
    """Eq. 2 of each clip, a mean over elements, not a sum, so that it is of the order
    of the other losses, which are cosines. v, u [B, ...] -> [B]; mask [B, T], boolean,
    true where a frame is real. Raises ValueError where v and u differ in shape: they
    would broadcast."""
    if v.shape != u.shape:
        raise ValueError(f"v {list(v.shape)} is not of the shape of u {list(u.shape)}")
    error = (v.float() - u).square()
    if mask is not None:
        return pool(error.flatten(2), mask).mean(1)  # pool: section 4
    return error.flatten(1).mean(1)


# ---- 2. Velocity model (Eqs. 7, 15) ------------------------------------------------
#     h_l = h_{l-1} + m_l f_l(h_{l-1}, t, c)     s = [t1, b1, t2, b2, ...]
#
# A DiT, f_l being attention and feed-forward together; m_l is 1. The conditioning c,
# tokens and a reference mel, enters in h_0, the time t in each branch of each layer, by
# adaLN-Zero: alpha branch(LayerNorm(h) (1 + scale) + shift), where t gives alpha, scale
# and shift, and alpha starts at 0.

# The conditioning c of a batch, which is of one domain:
# tokens  [B, N]     ids, 8 a chunk and codebook; the second's follow the first's
# ref     [B, T, M]  reference mel: a clip's first frames, zeros after them
# keep    [B]        false where the tokens are dropped
# domain  int        which table of embeddings
Condition = namedtuple("Condition", "tokens ref keep domain")


def interleave(*codebooks):
    """Eq. 15: s = [t1, b1, t2, b2, ...], made in data_prep.py. Streams [..., n] ->
    [..., n x codebooks]."""
    return torch.stack(codebooks, -1).flatten(-2)


def sinusoids(x, width):
    """x [...] -> [..., width]: cosines, then sines, at frequencies from 1 to 1e-4."""
    frequencies = 1e4 ** -torch.linspace(0, 1, width // 2, device=x.device)
    angles = x[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotate(x, waves):
    """Rotary positions: x [B, heads, T, d], waves = sinusoids(positions, d) [T, d]."""
    cos, sin = waves.to(x.dtype).chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v):
    """q, k, v [B, heads, T, d] -> [B, heads, T, d]."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    # On a CPU its bf16 backward is slow: written out, a step takes 0.6 to 0.9 of that.
    score = (q * q.shape[-1] ** -0.5) @ k.mT
    with torch.autocast("cpu", enabled=False):  # else softmax would widen the scores
        return score.softmax(-1) @ v


def modulate(h, shift, scale):
    """adaLN: h [B, T, D], shift and scale [B, 1, D]."""
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


def zero(linear):
    """A linear layer that starts at zero: adaLN-Zero's layers start as the identity."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Layer(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads = heads
        self.modulation = zero(nn.Linear(dim, 6 * dim))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(dropout)

    def attend(self, x, waves):
        x = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = x.permute(2, 0, 3, 1, 4)  # [B, heads, T, d] each
        x = attention(rotate(q, waves), rotate(k, waves), v)
        return self.out(x.transpose(1, 2).flatten(2))

    def forward(self, h, t, waves):
        """Eq. 7. h = h_{l-1} [B, T, D], t [B, 1, D] embedded, waves [T, d] -> h_l.
        alpha, adaLN-Zero's scale of a branch, is learned; Eq. 7's gate m is another
        thing."""
        shift1, scale1, alpha1, shift2, scale2, alpha2 = self.modulation(t).chunk(6, -1)
        x = self.attend(modulate(h, shift1, scale1), waves)
        a = alpha1 * self.drop(x)
        x = F.gelu(self.up(modulate(h + a, shift2, scale2)))
        x = self.down(self.drop(x))
        f = a + alpha2 * self.drop(x)
        return h + f  # h + m f, the gate m being 1; fog_a closes it from outside


class VelocityModel(nn.Module):
    """v_theta(x_t, t, c). vocab: for each domain its number of token ids."""

    def __init__(
        self,
        layers=12,
        dim=512,
        heads=8,
        dropout=0.0,
        vocab=(1024,),
        n_mels=N_MELS,
    ):
        super().__init__()
        self.tokens = nn.ModuleList(nn.Embedding(ids, dim) for ids in vocab)
        self.head_dim = dim // heads
        self.x_in = nn.Linear(n_mels, dim)
        self.cond_in = nn.Linear(dim + n_mels, dim)
        self.time = nn.Sequential(
            nn.Linear(256, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
            nn.SiLU(),  # adaLN's, once for all layers
        )
        self.layers = nn.ModuleList(Layer(dim, heads, dropout) for _ in range(layers))
        self.modulation = zero(nn.Linear(dim, 2 * dim))
        self.v_out = zero(nn.Linear(dim, n_mels))

    def embed(self, cond):
        """The embedded tokens e [B, N, D], which train; zeros where dropped."""
        return self.tokens[cond.domain](cond.tokens) * cond.keep[:, None, None]

    def forward(self, x_t, t, cond):
        """x_t [B, T, M], t [B] -> v [B, T, M]."""
        T = x_t.shape[1]
        e = self.embed(cond)
        e = F.interpolate(e.mT, T, mode="linear").mT
        # To concatenate x_t and c and project them is to add up their projections.
        h = self.x_in(x_t) + self.cond_in(torch.cat([e, cond.ref], -1))  # h_0 [B, T, D]
        t_emb = self.time(sinusoids(1000 * t, 256))[:, None]  # [B, 1, D], as in DiT
        waves = sinusoids(torch.arange(T, device=h.device), self.head_dim)
        for layer in self.layers:
            h = layer(h, t_emb, waves)
        shift, scale = self.modulation(t_emb).chunk(2, -1)
        h = modulate(h, shift, scale)
        return self.v_out(h).float()


# ---- 3. Teacher, T(x) --------------------------------------------------------------
# A frozen model of sound: waveform at 16 kHz to features at 50 Hz. It runs once, in
# data_prep.py. A clip's T(x) is the mean of its features, less the corpus mean: left
# in, it makes all clips' targets nearly alike.


class Teacher(nn.Module):
    """A speech bundle of torchaudio.pipelines, one layer of it, frozen: waveform [B, n
    x 2560] at 16 kHz, n chunks -> features [B, n x 8, teacher_dim]. Its checkpoint is
    downloaded once. data_prep.py has teachers of other kinds, too."""

    def __init__(self, name="HUBERT_BASE", layer=9):
        super().__init__()
        bundle = getattr(torchaudio.pipelines, name)
        net = bundle.get_model()
        # Large bundles wrap it, and normalise a batch as one: clips would mix.
        self.net = getattr(net, "model", net)
        self.normalise = bundle._normalize_waveform
        self.layer = layer
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, wave):
        # Windows of 25 ms, every 20: without 5 ms in front the last would be missing.
        wave = F.pad(wave, (80, 0))
        if self.normalise:
            wave = F.layer_norm(wave, wave.shape[1:])  # each clip by itself
        features, _ = self.net.extract_features(wave, num_layers=self.layer)
        return features[-1]


def log_mel(wave):
    """Waveform [B, n x 256] at 24 kHz -> natural log of the mel magnitude [B, n,
    100]."""
    mel = torchaudio.transforms.MelSpectrogram(
        RATE,
        n_fft=1024,
        hop_length=HOP,
        n_mels=N_MELS,
        power=1,
    )
    x = mel.to(wave.device)(wave)[..., :-1]  # centred frames: one more than hops
    return x.clamp(min=1e-5).log().mT  # the paper's floor; Vocos's own is 1e-7


# ---- 4. The token interface: BiT-C (Eqs. 3 to 5) -----------------------------------
#     z = LayerNorm(pool(e))     s_d = cos(P_d z, T_d(x))     L_BiT = sum_d (1 - s_d)
#
# One linear head P_d on the pooled embedded tokens e ties them to the teacher. It
# trains the tokens to carry what the teacher knows, and gives LASP a head that was
# never fitted to a layer.


def pool(h, mask=None):
    """The mean over time: h [..., T, D] -> [..., D] in float32. mask [..., T], boolean,
    true where a frame is real; zeros where none is. Raises ValueError for another mask:
    one of 0 and -1e9, made to be added to scores, would weigh the frames by that."""
    if mask is None:
        return h.float().mean(-2)
    if mask.dtype != torch.bool or mask.shape != h.shape[:-1]:
        raise ValueError(f"a mask {list(mask.shape)}, {mask.dtype}: give booleans")
    total = h.float().masked_fill(~mask[..., None], 0).sum(-2)
    return total / mask.sum(-1, keepdim=True).clamp(min=1)


class BiTC(nn.Module):
    def __init__(self, dim, teacher_dim):
        super().__init__()
        self.P = nn.Linear(dim, teacher_dim)

    def forward(self, e, T_x):
        """Eqs. 3, 4: e [B, N, D], T_x [B, teacher_dim] -> s [B]."""
        z = F.layer_norm(pool(e), e.shape[-1:])  # no gain and bias: P has its own
        return F.cosine_similarity(self.P(z).float(), T_x, dim=-1)


def bitc_loss(s, keep):
    """Eq. 5, one domain: s [B], keep [B] false where tokens were dropped -> scalar."""
    return ((1 - s) * keep).sum() / keep.sum().clamp(min=1)


# ---- 5. LASP: what a layer stores (Eq. 6) ------------------------------------------
#     LASP_l = cos(P_d z_l, T_d(x))     z_l = LayerNorm(pool(h_l))
#
# BiT-C's score with a layer's hidden state in the tokens' place, by one head for all
# layers, which was never fitted to any of them.


@torch.no_grad()
def lasp(hidden, bitc, T_x):
    """Eq. 6: hidden {k: [B, T, D]}, bitc the domain's head, frozen here, T_x
    [B, teacher_dim] -> [L, B], a row a layer, in the order of k."""
    return torch.stack([bitc(hidden[k], T_x) for k in sorted(hidden)])


# ---- 6. FoG-A: what a layer contributes (Eqs. 8, 9) --------------------------------
#     FoG-A_k = E ||v_k - v|| / (||v|| + eps)     v_k: v with the gate m_k = 0
#
# What a layer stores is not what it contributes: a deep one may hold all that the
# teacher knows and hardly move the velocity. So close one layer's gate, and see how far
# it moves: L + 2 passes, one open, one open again as a check, L closed. A closed
# layer returns its h_{l-1}; most of this section finds out which of its inputs that is,
# in models of all kinds. fog_a comes first, its helpers in the order in which it calls
# them.


@torch.inference_mode(False)  # inference tensors have no version: `route` compares it
@torch.no_grad()
def fog_a(velocity, blocks, *inputs, skip=None, eps=1e-8):
    """Eqs. 8, 9 for any residual network: scores [L, B]; their mean over B is FoG-A.

    velocity(*inputs) -> v [B, ...], one tensor. blocks: modules, each returning its own
    sum h + f(h); or lists of modules that return f(h), closed to zeros:
    [[attn, ff], ...]. A module that runs twice is closed in both places.
    skip(args, kwargs, output): what a closed module returns, asked for by a ValueError
    where the passes don't show it. Raises ValueError, too, where a block never runs or
    v changes from pass to pass. Leaves modes, hooks and random states as they were.
    """
    blocks = list(blocks)
    groups = [list(b) if isinstance(b, (list, tuple)) else [b] for b in blocks]
    scores = []
    with probing_mode():
        v, calls = recorded_pass(velocity, inputs, groups)
        again = one_pass(velocity, inputs)
        if (again - v).norm() > 1e-3 * v.norm():
            raise ValueError("fog_a: v changes from pass to pass (numpy's randomness?)")
        for k, block in enumerate(blocks, 1):
            with hooked(groups[k - 1], copies, closing(k, block, calls, skip)):
                v_k = one_pass(velocity, inputs)  # Eq. 8: gate k closed
            scores.append((v_k - v).norm(dim=1) / (v.norm(dim=1) + eps))  # Eq. 9
    return torch.stack(scores)


@contextlib.contextmanager
def probing_mode():
    """Eval mode for every module that runs, and eager code; undone at the end."""

    def to_eval(module, args):
        if module.training:
            undo.callback(setattr, module, "training", True)
            module.training = False

    # Without an accelerator, fork_rng still asks which kind it would be.
    device = torch.accelerator.current_accelerator(True) or torch.device("cuda")
    devices = range(torch.accelerator.device_count())
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng(devices, device_type=device.type))
        undo.enter_context(torch.compiler.set_stance("force_eager"))  # else no hooks
        hook = nn.modules.module.register_module_forward_pre_hook(to_eval)
        undo.callback(hook.remove)  # a hook of all modules: velocity is any callable
        yield


def one_pass(velocity, inputs):
    """v [B, -1] in float32."""
    torch.manual_seed(0)  # the same random numbers in each pass
    v = velocity(*inputs)
    if not torch.is_tensor(v) or v.dim() == 0:
        raise ValueError(f"fog_a: velocity returns {type(v).__name__}, not v [B, ...]")
    return v.reshape(len(v), -1).float().clone()  # velocity may reuse its buffer


@contextlib.contextmanager
def hooked(modules, before, after):
    """Hooks, for as long as the context lasts. As a module starts, its inputs are
    noted: noted = before((args, kwargs)); afterwards it may have written into them. As
    it ends, after(module, noted, output) may return something in its output's place."""
    noted = {}

    def on_entry(module, args, kwargs):
        noted[module] = before((args, kwargs))

    def on_exit(module, args, kwargs, output):
        return after(module, noted.pop(module), output)

    with contextlib.ExitStack() as hooks:
        for module in dict.fromkeys(modules):  # each once, though it be listed twice
            entry = module.register_forward_pre_hook(on_entry, with_kwargs=True)
            hooks.callback(entry.remove)
            exit = module.register_forward_hook(on_exit, with_kwargs=True)
            hooks.callback(exit.remove)
        yield


# A module's call in the open pass; inputs and output are {place: (tensor, version)}.
# It holds the tensors themselves, so that `is` can compare them.
Call = namedtuple("Call", "module inputs output")


def tensors(tree):
    """{place: (tensor, version)}; a version counts how often it was written into."""
    found = {}
    for place, x in pytree.tree_leaves_with_path(tree):
        if torch.is_tensor(x):
            found[place] = x, 0 if x.is_inference() else x._version
    return found


def shapes(tree):
    """{place: shape} of the tensors in it."""
    return {place: x.shape for place, (x, _) in tensors(tree).items()}


# tree -> the same tree, its tensors cloned: what a block took in before it wrote there
copies = partial(pytree.tree_map_only, torch.Tensor, torch.clone)


def recorded_pass(velocity, inputs, groups):
    """The open pass: v, and a Call for each time that a block's module ran."""
    calls = []

    def record(module, inputs, output):
        calls.append(Call(module, inputs, tensors(output)))

    with hooked(sum(groups, []), tensors, record):
        v = one_pass(velocity, inputs)
    ran = {call.module for call in calls}
    for k, modules in enumerate(groups, 1):
        if not ran.issuperset(modules):
            raise ValueError(f"fog_a: block {k} never ran (a ModuleList never does)")
    return v, calls


def route(module, calls):
    """What the open pass shows of a module: -> places, adds.

    places: {place in its output: place in its inputs}, of which input is h_{l-1}: the
    one at the place at which the next module received this very output, as with h =
    a(h, c) and then h = b(h, c) the first. Empty where the pass doesn't show it. adds:
    whether the next module received h + f, where this one took h and returned f.
    """
    i = [call.module for call in calls].index(module)
    own = calls[i]
    beside = calls[max(0, i - 1) : i] + calls[i + 1 : i + 2]  # before and after it
    if module is calls[-1].module and i > 0:
        i = i - 1  # the last one hands on to none: its output goes as that before it
    giver = calls[i]
    taker = calls[i : i + 2][-1]  # the next call; the same if there is but one

    places = {}
    for at, (x, version) in giver.output.items():
        for place, (y, received) in taker.inputs.items():
            if x is y and version == received:  # nobody wrote into it on the way
                places[at] = place

    adds = False
    others = [
        y for place, (y, _) in taker.inputs.items() if place not in places.values()
    ]
    for h, _ in giver.inputs.values():
        for f, _ in giver.output.values():
            # Not with a tensor of another device, as lengths may be: equal would raise.
            alike = [y for y in others if y.device == h.device]
            if h.shape == f.shape and any(torch.equal(y, h + f) for y in alike):
                adds = True

    # An older state, of the output's shape, that no neighbour takes: a U-ViT's long
    # skip, merged inside. It must stay, and h_{l-1} would leave it out.
    sizes = [x.shape for x, _ in own.output.values()]
    for place, (x, _) in own.inputs.items():
        shared = any(call.inputs.get(place, [None])[0] is x for call in beside)
        if x.shape in sizes and not shared and place not in places.values():
            return {}, adds
    return places, adds


def handed_on(places, inputs, output):
    """h_{l-1}, in the form of the output; None in place of what no input tells."""
    came = tensors(inputs)
    leaves, form = pytree.tree_flatten_with_path(output)
    closed = []
    for at, x in leaves:
        if torch.is_tensor(x):
            x, _ = came.get(places.get(at), (None, 0))
        closed.append(x)
    return pytree.tree_unflatten(closed, form)


def closing(k, block, calls, skip):
    """The hook that says what a module of block k returns when closed."""

    def close(module, inputs, output):
        places, adds = route(module, calls)
        if skip:
            closed = skip(*inputs, output)
        elif isinstance(block, (list, tuple)):
            closed = pytree.tree_map_only(torch.Tensor, torch.zeros_like, output)
        else:
            closed = handed_on(places, inputs, output)
        right = shapes(closed) == shapes(output) != {}  # alike, and some tensor at all
        if adds and any(x.any() for x, _ in tensors(closed).values()):
            right = False
        if not right:
            taken = list(map(list, shapes(inputs).values()))
            answer = "0 * output, as its caller adds h" if adds else "..."
            raise ValueError(
                f"fog_a: block {k} takes {taken}: list its branches, [[attn, ff], ...],"
                " or say what it returns when closed, in the form of its output: "
                f"skip=lambda args, kwargs, output: {answer}"
            )
        return closed

    return close


# ---- 7. Selection and weights (Eqs. 10, 11) ----------------------------------------
#     S = the K layers of highest FoG-A     lambda_k = FoG-A_k / sum_{j in S} FoG-A_j


def select_layers(scores, k=3):
    """Eqs. 10, 11: FoG-A scores [L] -> {layer: lambda}, best first, layers counted from
    1; lambda is a layer's share of the chosen scores, and they sum to 1.
    Raises ValueError where the scores can't say which."""
    scores = torch.as_tensor(scores).detach().cpu().double()
    if scores.dim() != 1 or not 1 <= k <= len(scores) or not scores.isfinite().all():
        raise ValueError(f"can't choose {k} layers from scores {scores.tolist()}")
    if scores.max() < 1e-4:  # scores are relative to v's norm: below, they are rounding
        raise ValueError("no layer contributes yet (adaLN-Zero): probe for longer")
    S = scores.argsort(descending=True, stable=True)[:k]  # of ties, the shallower
    lam = scores[S] / scores[S].sum()
    layers = S + 1
    return dict(zip(layers.tolist(), lam.tolist(), strict=True))


# ---- 8. Alignment (Eq. 12) ---------------------------------------------------------
#     L = L_FM + lambda_BiT L_BiT + sum_{k in S} lambda_k (1 - cos_k)
#     cos_k = cos(h_phi_k(pool(h_k)), T(x))
#
# h_phi_k, a small head a layer, maps its pooled hidden state to the teacher's space.
# Wherever layers are asked for, section 7's {layer: lambda} will do.


@contextlib.contextmanager
def capture(blocks, layers, output=None):
    """Hidden states of any model, with gradient, in the forward pass you make anyway:
    `with capture(model.blocks, layers) as hidden: v = model(...)`, then hidden[9] is
    what the ninth block returned; output: which one, of several. Raises ValueError
    where a block gave no tensor that trains, or ran twice."""
    blocks = list(blocks)
    hidden = {}

    def note(k, block, args, returned):
        if k in hidden:
            raise ValueError(f"capture: block {k} ran twice: capture one pass")
        if isinstance(returned, (tuple, list)) and len(returned) == 1:  # Hugging Face's
            returned = returned[0]
        if output is not None and not torch.is_tensor(returned):
            returned = returned[output]
        if torch.is_tensor(returned):
            hidden[k] = returned.clone()  # its caller may write into it

    with contextlib.ExitStack() as hooks:
        for k in layers:
            if not 1 <= k <= len(blocks):
                raise ValueError(
                    f"capture: no layer {k} among {len(blocks)}, counted from 1"
                )
            hook = blocks[k - 1].register_forward_hook(partial(note, k))
            hooks.callback(hook.remove)
        yield hidden
    for k in layers:
        gave = k in hidden and (hidden[k].requires_grad or not torch.is_grad_enabled())
        if not gave:
            raise ValueError(
                f"capture: block {k} never ran or gave no tensor with a gradient. Of "
                "several outputs name one: output=1. A ModuleList, a block called by "
                ".forward() or inside a model compiled whole, layer drop, torch.func and "
                "reentrant checkpointing (use_reentrant=False instead) hide a block."
            )


class AlignmentHeads(nn.ModuleDict):
    """h_phi_k: a two-layer MLP a layer, narrow, so that three are about 1 % of the
    model. dim: the hidden states' width, or {layer: width}."""

    def __init__(self, layers, dim, teacher_dim, width=192):
        super().__init__()
        for k in layers:
            own = dim[k] if isinstance(dim, dict) else dim
            self[str(k)] = nn.Sequential(
                nn.Linear(own, width),
                nn.SiLU(),
                nn.Linear(width, teacher_dim),
            )


def agrepa_loss(hidden, heads, T_x, lam, mask=None):
    """Eq. 12's sum over k in S of lambda_k (1 - cos(h_phi_k(pool(h_k)), T(x))) -> [B].

    hidden {k: [B, T, D]}, lam {k: lambda_k}, mask [B, T], boolean, true where a frame
    is real. T_x [B, teacher_dim]; or [B, n, teacher_dim]: n equal stretches of the T
    frames, each with its own target. Raises ValueError for shapes that would broadcast.
    """
    if T_x.dim() == 2:
        T_x = T_x[:, None]  # one stretch
    B, n, _ = T_x.shape
    stretches = real = None
    if mask is not None:
        stretches = mask.unflatten(1, (n, -1))  # [B, n, T / n]
        real = stretches.any(-1)
    loss = torch.zeros(B, n, device=T_x.device)
    for k in lam:
        h = hidden[k]
        if h.dim() != 3 or len(h) != B:
            raise ValueError(f"agrepa_loss: layer {k} is {list(h.shape)} for {B} clips")
        head = heads[str(k)]
        z = pool(h.unflatten(1, (n, -1)), stretches)  # [B, n, D]
        z = head(z.to(head[0].weight.dtype))
        cos = F.cosine_similarity(z.float(), T_x, dim=-1)
        loss = loss + lam[k] * (1 - cos)  # Eq. 12
    return pool(loss[..., None], real)[:, 0]  # the mean over real stretches


# ---- 9. Sampling (App. A) ----------------------------------------------------------
#     x <- x + (t' - t) v     v = v_u + w (v_c - v_u)
#     t <- t + sway (cos(pi t / 2) - 1 + t)


@torch.no_grad()
def sample(model, cond, x0, nfe=32, guidance=3.0, sway=-1.0):
    """Noise x0 [B, T, M] -> x1 [B, T, M] in nfe Euler steps. guidance w: 1 is off; 3 is
    what F5-TTS calls 2 (v_c + 2 (v_c - v_u)). v_u lacks the tokens, not the reference
    mel. sway below 0: finer steps near the noise (F5-TTS)."""
    dropped = cond._replace(keep=torch.zeros_like(cond.keep))
    t = torch.linspace(0, 1, nfe + 1, device=x0.device)
    t = t + sway * (torch.cos(torch.pi / 2 * t) - 1 + t)
    x = x0
    for now, then in zip(t, t[1:], strict=False):
        at = now.expand(len(x))
        v_c = model(x, at, cond)
        v_u = v_c if guidance == 1 else model(x, at, dropped)
        v = v_u + guidance * (v_c - v_u)
        x = x + (then - now) * v
    return x


def mel_to_wave(mel, vocoder="griffinlim", seed=0):
    """log_mel's inverse: [B, n, 100] -> [B, n x 256] at 24 kHz, on the CPU, since MPS
    lacks a solver: Griffin-Lim, whose first phases are drawn by seed, or the package
    vocos. Raises ImportError without it."""
    last = mel[:, -1:]  # one more frame closes the last hop
    mel = torch.cat([mel, last], 1).mT.cpu()
    if vocoder == "vocos":
        from vocos import Vocos

        net = Vocos.from_pretrained("charactr/vocos-mel-24khz")
        return net.decode(mel)[:, : HOP * (mel.shape[2] - 1)]
    # 513 bins of frequency: n_fft / 2 + 1
    linear = torchaudio.transforms.InverseMelScale(513, N_MELS, RATE)
    griffin_lim = torchaudio.transforms.GriffinLim(
        n_fft=1024,
        n_iter=64,
        hop_length=HOP,
        power=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return griffin_lim(linear(mel.exp()))


# ---- 10. Data ----------------------------------------------------------------------
# A prepared folder is one domain: memory-mapped rows, one a chunk. A clip is n rows,
# and a batch is cut from them at once. A draw depends on (purpose, seed, step, rank,
# domain) alone, so that going on with a run changes none.

TRAINING, FIXED, RANDOM = range(3)  # purposes: no two streams meet
# units_id: two folders of one id have the same tokens. tokens_tell: the cosine of T(x)
# with what a chunk's tokens alone tell of it.
META = """name teacher units_teacher codebooks units units_id tokens_tell held_out
teacher_dim teacher_mean mel_mean mel_std"""


# A batch of one domain:
# x0       [B, T, M]  noise
# x1       [B, T, M]  log-mel, scaled by two numbers a domain: mean 0, deviation 1
# t        [B]        time
# cond                a Condition
# teacher  [B, n, teacher_dim]  features, a row a chunk, less the corpus mean
Batch = namedtuple("Batch", "x0 x1 t cond teacher")


def clip_starts(utterances, held_out, n):
    """utterances [U, 3]: first row, chunks, folder; the last `held_out` aren't trained
    on -> {part: rows at which a clip of n rows may begin}. A clip lies within one
    recording; recordings that are shorter are joined with neighbours as short, in the
    folder."""
    # place: alike for neighbours that may be joined, else each recording's own.
    # source: of each row, which such stretch it lies in.
    # A clip may begin at row i if row i + n - 1 lies in the same.
    _, chunks, folder = utterances.T
    alone = -1 - np.arange(len(chunks))
    place = np.where(chunks < n, folder, alone)
    source = np.cumsum(np.diff(place, prepend=0) != 0).repeat(chunks)
    ends = source[n - 1 :]
    starts = np.flatnonzero(source[: len(ends)] == ends)
    split = chunks[: len(chunks) - held_out].sum()
    return {
        "training": starts[starts + n <= split],
        "held out": starts[starts >= split],
    }


class PreparedFolder:
    """What data_prep.py made of a folder of audio, to be cut into clips of so many
    seconds. domain: its number in the run. Raises ValueError where it isn't whole."""

    def __init__(self, path, seconds, domain=0, raw_teacher=False):
        self.n = max(1, round(seconds / CHUNK))  # rows of a clip
        self.domain = domain
        try:
            meta = json.loads(Path(path, "meta.json").read_text())
            utterances = np.load(f"{path}/utterances.npy")
            rows = utterances[:, 1].sum()  # reshape raises where a file has others
            mel = np.memmap(f"{path}/mel.bin", "<f2", "r")
            tokens = np.memmap(f"{path}/tokens.bin", "<u2", "r")
            teacher = np.memmap(f"{path}/teacher.bin", "<f2", "r")
            self.mel = mel.reshape(rows, MEL_FRAMES, N_MELS)
            self.tokens = tokens.reshape(rows, TEACHER_FRAMES * meta["codebooks"])
            self.teacher = teacher.reshape(rows, meta["teacher_dim"])
            self.centre = np.float32(0 if raw_teacher else meta["teacher_mean"])
            self.starts = clip_starts(utterances, meta["held_out"], self.n)
            wrong = set(META.split()) - meta.keys()
        except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
            wrong = error
        if wrong:
            raise ValueError(f"{path} isn't whole, or not prepared: {wrong!r}")
        self.meta = meta

    def batch(self, starts, t, reference, keep, rng, device):
        """The clips that begin at rows starts [B]; t [B]; reference [B]: which share of
        a clip's first frames is its reference mel; keep [B] -> Batch."""

        def on(array):  # from pinned memory, so that nobody waits for the GPU
            cuda = "cuda" in str(device)
            x = torch.from_numpy(array)
            if cuda:
                x = x.pin_memory()
            return x.to(device, non_blocking=cuda)

        rows = starts[:, None] + np.arange(self.n)  # [B, n]
        B = len(rows)
        x1 = self.mel[rows].astype(np.float32) - self.meta["mel_mean"]
        x1 = x1.reshape(B, -1, N_MELS) / self.meta["mel_std"]
        x0 = rng.standard_normal(x1.shape, np.float32)
        T = x1.shape[1]
        prefix = np.arange(T) < np.floor(reference * T)[:, None]  # [B, T]
        ref = x1 * prefix[:, :, None]
        tokens = self.tokens[rows].astype(np.int64).reshape(B, -1)
        teacher = self.teacher[rows].astype(np.float32) - self.centre
        cond = Condition(
            on(tokens),
            on(ref),
            on(keep),
            self.domain,
        )
        return Batch(
            on(x0),
            on(x1),
            on(np.float32(t)),
            cond,
            on(teacher),
        )


def training_batches(data, config, step, rank, device):
    """Step `step`'s batch of each domain, for process `rank`. data: PreparedFolders."""
    B = config.batch_size // len(data)
    batches = []
    for folder in data:
        draw = TRAINING, config.seed, step, rank, folder.domain
        rng = np.random.default_rng(draw)
        starts = rng.choice(folder.starts["training"], B)
        t = rng.random(B)
        # 10 % lose the reference and, independently, 10 % the tokens.
        reference = np.where(rng.random(B) < 0.1, 0, 0.3 * rng.random(B))
        keep = rng.random(B) >= 0.1
        batch = folder.batch(
            starts,
            t,
            reference,
            keep,
            rng,
            device,
        )
        batches.append(batch)
    return batches


def fixed_batch(folder, part, B, device, seed=0):
    """B clips, always the same, spread evenly over a part and in t; none drops any."""
    rng = np.random.default_rng((FIXED, seed, 0, 0, folder.domain))
    starts = folder.starts[part]
    if len(starts) == 0:
        raise ValueError(f"--seconds: {folder.meta['name']} has no {part} clip so long")
    starts = starts[np.linspace(0, len(starts) - 1, B).astype(int)]
    t = (rng.permutation(B) + 0.5) / B
    return folder.batch(
        starts,
        t,
        0.3 * rng.random(B),  # reference
        t > 0,  # keep all: true everywhere
        rng,
        device,
    )


# ---- 11. Training (App. A.5: probe, then intervene) --------------------------------

SCORES = [  # of a layer, by a probe
    "foga",
    "lasp",
    "gradnorm",
]
STRATEGIES = [*SCORES, "random"]  # in the order of choose
PREPARATION = "teacher units_teacher codebooks units".split()  # of a prepared folder

CHOICES = {
    "align_pool": "clip chunk",
    "device": "auto cuda mps cpu",
    "dtype": "auto bfloat16 float32",
    "vocoder": "griffinlim vocos",
}


@dataclasses.dataclass
class Config:
    """A field is a flag, its comment the flag's help."""

    data: tuple = ()  # folders of audio, or prepared ones: a domain each
    out: str = ""  # run folder (default: runs/<names>-<number>); --sample numbers it
    steps: int = 100_000  # training steps, both phases together
    batch_size: int = 16  # clips a step in each process, shared by the domains
    seconds: float = 4.8  # length of a clip, rounded to chunks of 0.16 s
    layers: int = 12  # layers of the velocity model (paper: 24)
    dim: int = 512  # its width (paper: 1024)
    heads: int = 8  # its attention heads (paper: 16)
    dropout: float = 0.0  # in the layers (paper: 0.2)
    lr: float = 1e-4  # of a cosine decay; it rises over the first tenth of the steps
    seed: int = 0  # of initialisation, crops, noise and times
    teacher: str = "HUBERT_BASE"  # bundle of torchaudio, MFCC, or FILE.py:FUNCTION
    units_teacher: str = "MFCC"  # whose k-means units are the tokens
    raw_teacher: bool = False  # don't take the corpus mean off the teacher's features
    codebooks: int = 1  # 2: interleave dense acoustic tokens (Eq. 15)
    units: int = 1024  # k-means units a codebook (paper: 4096)
    probe_steps: int = 0  # length of phase I (default: 5000, or 15 % of a shorter run)
    probe_every: int = 0  # steps between probes (default: 200, or a tenth of phase I)
    top_k: int = 3  # layers to align
    select: str = "foga"  # foga, lasp, gradnorm, random, none, or layers: 4,8,12
    align_weight: float = 1.0  # weight of the alignment loss
    align_pool: str = "clip"  # one target per clip, or per chunk
    bit_weight: float = 0.5  # lambda_BiT, of all domains (paper: 0.5 speech, 1.0 audio)
    device: str = "auto"  # cuda, mps or cpu; auto: the first there is
    dtype: str = "auto"  # of a run; auto, as in data_prep.py: bfloat16 where it is fast
    compile: bool = False  # torch.compile the layers
    eval_every: int = 200  # steps between log lines, each with the held-out loss
    save_every: int = 500  # steps between checkpoints: as many can be lost
    resume: str = ""  # go on with the run in this folder, in as many processes
    sample: str = ""  # resynthesise held-out clips by this checkpoint
    count: int = 8  # pairs of sounds a domain, at a run's end or with --sample
    nfe: int = 32  # Euler steps of a sound
    guidance: float = 3.0  # 1 is off, better after short runs
    sway: float = -1.0  # below 0: finer steps near the noise
    vocoder: str = "griffinlim"  # vocos: if it is installed

    @property
    def phase1(self):
        return self.probe_steps or min(5000, 1 + self.steps * 15 // 100)


def check(config):
    """Raises ValueError, with the flag and its value, for a setting that can't be
    run."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = f"--{field.name.replace('_', '-')} {value}"
        if field.type in (int, float):
            least = min(field.default, 1e-9)  # above 0, or a default below: 0; sway: -1
            if field.name in ("align_weight", "bit_weight", "guidance"):
                least = 0
            if not least <= value < 1e12:
                raise ValueError(f"{flag} is out of range")
    L = config.layers
    numbers = map(str, range(1, L + 1))
    listed = set(config.select.split(",")) <= set(numbers)
    if not listed and config.select not in (*STRATEGIES, "none"):
        raise ValueError(
            f"--select {config.select} is not {', '.join(STRATEGIES)}, none, or layers "
            f"from 1 to {L}: 4,8,12"
        )
    if config.top_k > L:
        raise ValueError(f"--top-k {config.top_k} but the model has {L} layers")
    if config.dim % (2 * config.heads) > 0:
        raise ValueError(f"--dim {config.dim} is no multiple of 2 x --heads")
    if config.phase1 >= config.steps:
        raise ValueError(f"--steps {config.steps}: phase I has {config.phase1} already")
    if config.vocoder == "vocos" and not find_spec("vocos"):
        raise ValueError("--vocoder vocos: pip install vocos")


def launch(config):
    """-> device, and the context in which matrices are multiplied as --dtype says."""
    best = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    device = best if config.device == "auto" else torch.device(config.device)
    if device.type not in ("cpu", best.type):
        raise ValueError(f"--device {device}: there is none")
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and fast)
    return device, torch.autocast(device.type, torch.bfloat16, low)


class Objective(nn.Module):
    """All that trains: the velocity model, a BiT-C head a domain and alignment heads,
    which stay as they are until phase II asks for some. Beside them the moving average
    of the model, which is judged and sampled from; it has no gradients, so that AdamW
    leaves it alone."""

    def __init__(self, config, metas):
        super().__init__()
        self.config = config
        vocab = [meta["units"] * meta["codebooks"] for meta in metas]
        self.model = VelocityModel(
            config.layers,
            config.dim,
            config.heads,
            config.dropout,
            vocab,
        )
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.bitc = nn.ModuleList()
        self.heads = nn.ModuleList()
        for meta in metas:
            dims = config.dim, meta["teacher_dim"]
            self.bitc.append(BiTC(*dims))
            self.heads.append(AlignmentHeads(range(1, config.layers + 1), *dims))
        self.align([{} for _ in metas])

    def align(self, lam):
        """lam: {layer: lambda} of each domain; empty in phase I."""
        self.lam = lam
        self.heads.requires_grad_(False)
        for heads, layers in zip(self.heads, lam, strict=True):
            for k in layers:
                heads[str(k)].requires_grad_(True)

    def forward(self, batches, averaged=False):
        """A Batch a domain -> the terms of Eq. 12: L_FM, L_BiT, alignment; scalars."""
        model = self.average if averaged else self.model
        fm = bitc = align = 0
        for d, batch in enumerate(batches):
            x_t, u = flow_path(batch.x0, batch.x1, batch.t)
            with capture(model.layers, self.lam[d]) as hidden:
                v = model(x_t, batch.t, batch.cond)
            T_x = pool(batch.teacher)
            s = self.bitc[d](model.embed(batch.cond), T_x)
            if self.config.align_pool == "chunk":
                T_x = batch.teacher
            loss = agrepa_loss(hidden, self.heads[d], T_x, self.lam[d])
            fm = fm + flow_matching_loss(v, u).mean()
            bitc = bitc + bitc_loss(s, batch.cond.keep)
            align = align + loss.mean()
        n = len(batches)
        return fm / n, bitc, align / n  # means over clips; Eq. 5 sums over domains


def distributed(objective):
    """The objective as it is called in training, by one process or several."""
    if dist.is_initialized():
        return nn.parallel.DistributedDataParallel(objective)
    return objective


def update(objective, optimiser, step):
    """One step of AdamW, and of the model's moving average."""
    config = objective.config
    rise = 10 * (step + 1) / config.steps
    fall = 0.5 + 0.5 * np.cos(np.pi * step / config.steps)
    for group in optimiser.param_groups:
        group["lr"] = float(config.lr * min(rise, fall))
        # By their own norm: in one, the heads' gradients would shrink the model's step.
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimiser.step()
    optimiser.zero_grad()
    decay = min(0.9999, (1 + step) / (10 + step))
    with torch.no_grad():
        average = list(objective.average.parameters())
        torch._foreach_lerp_(average, list(objective.model.parameters()), 1 - decay)


def probe(objective, batches):
    """SCORES of each layer, [domains][L][3], of the model as it trains, not its
    average. Not to be called within autocast: FoG-A's are differences of close numbers.
    The batches' times are spread over [0, 1]."""
    model = objective.model
    model.eval()
    found = []
    for bitc, batch in zip(objective.bitc, batches, strict=True):
        x_t, u = flow_path(batch.x0, batch.x1, batch.t)
        foga = fog_a(model, model.layers, x_t, batch.t, batch.cond).mean(1)
        L = len(foga)
        with capture(model.layers, range(1, L + 1)) as hidden:
            v = model(x_t, batch.t, batch.cond)
        store = lasp(hidden, bitc, pool(batch.teacher)).mean(1)
        loss = flow_matching_loss(v, u).mean()
        gradients = torch.autograd.grad(loss, list(model.layers.parameters()))
        # All layers have as many parameters: [L, parameters], a norm a layer.
        norms = torch.stack(torch._foreach_norm(gradients)).view(L, -1).norm(dim=1)
        found.append(torch.stack([foga, store, norms], 1).tolist())
    model.train()
    return found


def top(scores, k):
    """The k layers of the highest scores [L], counted from 1."""
    order = np.argsort(-scores, kind="stable")
    return (order[:k] + 1).tolist()


def choose(config, scores, domain):
    """Eqs. 10, 11, or another strategy with equal weights: scores [L, 3] -> {layer:
    lambda}."""
    K = config.top_k
    if config.select == "foga":
        return select_layers(scores[:, 0], K)
    rng = np.random.default_rng((RANDOM, config.seed, 0, 0, domain))
    columns = [*scores.T, rng.random(len(scores))]
    if config.select in STRATEGIES:
        layers = top(columns[STRATEGIES.index(config.select)], K)
    else:
        # 4,8,12; of "none", none
        layers = {int(k) for k in config.select.split(",") if k.isdecimal()}
    return {k: 1 / len(layers) for k in layers}


def report(config, name, lam, scores, early):
    """Prints scores [L, 3], the choice, and how sure it is. early: of earlier
    probes."""
    print(f"\n{name}: mean of the late probes")
    print("layer   FoG-A    LASP  grad norm  lambda")
    for k, (foga, store, norm) in enumerate(scores, 1):
        chosen = f"{lam[k]:6.3f}  chosen" if k in lam else ""
        print(f"{k:5d}  {foga:6.4f}  {store:6.3f}  {norm:9.4f}  {chosen}")
    K = config.top_k
    if config.select == "foga" and len(early) and K < len(scores):
        best = sorted(scores[:, 0], reverse=True)
        above = f"{best[K - 1] / best[K] - 1:.1%} above the next"
        print(f"margin: layer {list(lam)[-1]} is {above}")
        common = len(set(top(early[-1][:, 0], K)) & set(lam))
        print(f"{common} of these {K} layers led at half of phase I, too")
        if common < K:
            print("the ranking is still moving: try more --probe-steps")


def end_phase1(config, names, probes, out):
    """Chooses each domain's layers on the mean of the second half of the probes, since
    the model has just left zero in the first; says and writes why. probes: {step:
    [domains][L][3]} -> {layer: lambda} of each domain."""
    lines = ["step,domain,layer,foga,lasp,gradnorm"]
    for step, domains in probes.items():
        for name, layers in zip(names, domains, strict=True):
            for k, (foga, store, norm) in enumerate(layers, 1):
                lines.append(f'{step},"{name}",{k},{foga},{store},{norm}')
    Path(out, "probe.csv").write_text("\n".join(lines))
    early, late = np.split(np.array(list(probes.values())), [len(probes) // 2])
    found = []
    entries = {}
    for d, name in enumerate(names):
        scores = late[:, d].mean(0)
        lam = choose(config, scores, d)
        report(config, name, lam, scores, early[:, d])
        entries[name] = {"layers": list(lam), "weights": list(lam.values())}
        entries[name].update(zip(SCORES, scores.T.tolist(), strict=True))
        found.append(lam)
    Path(out, "layers.json").write_text(json.dumps(entries, indent=1))
    return found


def load(path):
    """A checkpoint, and its objective with the averaged weights. Raises ValueError
    where it is none of this program's."""
    try:
        state = torch.load(path, "cpu", weights_only=True)
        objective = Objective(Config(**state["config"]), state["metas"])
        objective.load_state_dict(state["objective"])
        for key in ("step", "lam", "probes", "log", "optimiser"):
            state[key]
    except Exception as error:  # a foreign file may be anything
        raise ValueError(f"{path}: no checkpoint of agrepa.py: {error!r:.50}") from None
    return state, objective


def begin(config, names, metas):
    """Makes a new run's folder, and says what is to come."""
    out = config.out or new_folder(f"runs/{'+'.join(names)}")
    os.makedirs(out, exist_ok=not config.out)
    for meta in metas:
        tell = meta["tokens_tell"]
        print(f"{meta['name']}: tokens tell {tell:.2f} of a chunk's T(x) (cosine)")
        if tell > 0.6:
            print("  so alignment can add little: try another --units-teacher")
    print(f"{out}: phase I to step {config.phase1}; if stopped, --resume {out}")
    return out


def train(config, out=None, state=None):  # noqa: C901
    """One run in two phases -> its folder, made and written by process 0. state: the
    checkpoint in it to go on from. Raises ValueError for unfit data and NaN losses."""
    device, cast = launch(config)
    rank = dist.get_rank() if dist.is_initialized() else 0
    data = [
        PreparedFolder(path, config.seconds, d, config.raw_teacher)
        for d, path in enumerate(config.data)
    ]
    metas = [folder.meta for folder in data]
    names = [meta["name"] for meta in metas]
    if len(set(names)) < len(names):
        raise ValueError(
            "--data: two domains of one name: prepare one with --name, --out"
        )
    held_out = [fixed_batch(folder, "held out", 16, device) for folder in data]
    probed = [fixed_batch(folder, "training", 12, device) for folder in data]
    torch.manual_seed(config.seed)
    objective = Objective(config, metas).to(device)
    groups = [{"params": list(part.parameters())} for part in objective.children()]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.1, fused=True)
    if state:
        if state["metas"] != metas:
            raise ValueError(f"--resume {out}: the data are others than the run's")
        objective.align(state["lam"])
        objective.load_state_dict(state["objective"])
        optimiser.load_state_dict(state["optimiser"])
    else:
        state = {"step": 0, "probes": {}, "log": {}}
        if rank == 0:
            out = begin(config, names, metas)
    if config.compile:
        for layer in objective.model.layers:  # not the module: hooks stay outside
            layer.forward = torch.compile(layer.forward)
    model = distributed(objective)
    log = state["log"]
    every = config.probe_every or min(200, 1 + config.phase1 // 10)
    sums = torch.zeros(3, device=device)  # of training losses, since the last log line

    # step: how many updates are done. The last turn only logs and saves.
    for step in range(state["step"], config.steps + 1):
        saves = step % config.save_every == 0 or step == config.steps
        logs = saves or step % config.eval_every == 0 or step == config.phase1
        if rank == 0 and logs and step not in log:  # after --resume it is there
            fm, bitc, align = sums / max(1, step - max(log, default=0))
            with torch.no_grad(), cast:
                val_fm, _, val_align = objective(held_out, averaged=True)
            if not val_fm.isfinite():
                raise ValueError(f"{out}, step {step}: not finite; lower --lr?")
            log[step] = (
                f"{step},{fm:.6g},{bitc:.6g},{align:.6g},{val_fm:.6g},{val_align:.6g}"
            )
            Path(out, "log.csv").write_text(
                "\n".join(["step,fm,bitc,align,val_fm,val_align", *log.values()])
            )
            print(
                f"step {step}  fm {fm:.4f}  bitc {bitc:.4f}  align {align:.4f}  "
                f"held out: fm {val_fm:.4f}  align {val_align:.4f}",
                flush=True,
            )
            sums.zero_()
            if saves:
                state["step"] = step
                state["config"] = vars(config)
                state["metas"] = metas
                state["lam"] = objective.lam
                state["objective"] = objective.state_dict()
                state["optimiser"] = optimiser.state_dict()
                torch.save(state, f"{out}/last.pt.part")  # a whole one is always there
                os.replace(f"{out}/last.pt.part", f"{out}/last.pt")
        if step == config.steps:
            if rank > 0:
                sums.cpu()  # waits for this process's part in the last step
                os._exit(0)  # gloo's threads would abort a slow interpreter
            return out

        # Phase I: probe now and then; at its end, choose the layers to align.
        if 0 < step <= config.phase1 and (step % every == 0 or step == config.phase1):
            state["probes"][step] = probe(objective, probed)
        torch.manual_seed(config.seed + 1000 * step + rank)  # dropout's
        if step == config.phase1:
            lam = [None] * len(data)
            if rank == 0:
                lam = end_phase1(config, names, state["probes"], out)
            if dist.is_initialized():
                dist.broadcast_object_list(lam)
            objective.align(lam)
            model = distributed(objective)

        # L_FM + lambda_BiT L_BiT in phase I, when no layer is aligned; then Eq. 12.
        batches = training_batches(data, config, step, rank, device)
        with cast:
            fm, bitc, align = model(batches)
            loss = fm + config.bit_weight * bitc + config.align_weight * align
        loss.backward()
        update(objective, optimiser, step)
        sums += torch.stack([fm, bitc, align]).detach()  # nothing waits for the GPU


# ---- 12. Sound ---------------------------------------------------------------------


def write_samples(path, given, out=None):
    """Resynthesises held-out clips of a run's domains, or of given["data"], from their
    tokens and reference mel; what comes after their first 30 % goes to
    out/<domain>/real and generated, as WAV. path: a checkpoint; given: flags."""
    state, objective = load(path)
    # The same clips and noise for runs of all seeds
    config = Config(**{**state["config"], "seed": 0, **given})
    check(config)
    device, cast = launch(config)
    model = objective.average.to(device)
    units = [meta["units_id"] for meta in state["metas"]]
    for data in config.data:
        folder = PreparedFolder(data, config.seconds)
        meta = folder.meta
        if meta["units_id"] not in units:
            raise ValueError(f"{data} has other tokens than the run: use --like")
        folder.domain = units.index(meta["units_id"])
        batch = fixed_batch(folder, "held out", config.count, device, config.seed)
        with cast:
            made = sample(
                model,
                batch.cond,
                batch.x0,
                config.nfe,
                config.guidance,
                config.sway,
            )
        for kind, x in ("real", batch.x1), ("generated", made):
            mel = x * meta["mel_std"] + meta["mel_mean"]
            mel = mel[:, int(0.3 * mel.shape[1]) :]
            waves = mel_to_wave(mel, config.vocoder)
            # Not before: no empty folder is left where sampling fails.
            out = out or new_folder(given.get("out", f"{Path(path).parent}/samples"))
            # A resumed run's end may find it there; else two domains have one name.
            os.makedirs(f"{out}/{meta['name']}/{kind}", exist_ok=not given)
            for i, wave in enumerate(waves):
                file = f"{out}/{meta['name']}/{kind}/{i:03}.wav"
                soundfile.write(file, wave / wave.abs().max().clamp(min=1), RATE)
    print(out)


# ---- 13. Command line --------------------------------------------------------------

# Without --data: the toy corpus, and a model that learns it in minutes on two cores.
TOY = """--layers 6 --dim 128 --heads 4 --seconds 1.92 --steps 240 --lr 2e-3
--teacher MFCC --units 64 --probe-steps 90 --probe-every 15 --eval-every 40
--count 1 --guidance 1"""
TAKES = {  # the flags that go with a mode
    "sample": "sample data out seed seconds device count nfe guidance sway vocoder",
    "resume": "resume data device",
}


def add_flags(parser, names=None):
    """Config's flags, or those named. A field's comment is the help: it is read from
    this file's text, so that each stands once."""
    comments = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M)
    for name, text in comments:
        default = getattr(Config, name)
        if names and name not in names:
            continue
        if default:
            text += f" (default: {default})"
        how = {"type": type(default), "choices": CHOICES.get(name, "").split() or None}
        if default is False:
            how = {"action": "store_true"}
        if default == ():  # given twice it adds up
            how = {"nargs": "+", "action": "extend"}
        text = text.replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **how)


def parse(arguments):
    """-> the flags given, {name: value}. Raises ValueError for those that --sample or
    --resume don't take."""
    parser = argparse.ArgumentParser(
        description="Trains on --data (default: a toy corpus), or samples from a run.",
        usage=argparse.SUPPRESS,  # an error is one line
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser)
    given = vars(parser.parse_args(arguments))
    for mode, names in TAKES.items():
        others = given.keys() - names.split()
        if mode in given and others:
            raise ValueError(f"--{mode} doesn't go with {', '.join(sorted(others))}")
    return given


def new_folder(stem):
    """Makes stem-1 or, where that is taken, the next: runs begun at once get one
    each."""
    number = 1
    while True:
        folder = Path(f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def data_prep(*arguments):
    """Runs data_prep.py beside this file; its progress is seen -> its last line."""
    if dist.is_initialized():
        raise ValueError(
            f"torchrun takes prepared --data: python data_prep.py {' '.join(arguments)}"
        )
    command = [sys.executable, Path(__file__).with_name("data_prep.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(done.returncode)  # it said why
    return os.fsdecode(done.stdout.splitlines()[-1])


def prepared(path, config, given):
    """path, or what data_prep.py makes of the audio in it. Raises ValueError for a
    folder that was prepared with other flags than those given."""
    if not Path(path, "utterances.npy").exists():
        return data_prep(
            path,
            f"--teacher={config.teacher}",
            f"--units-teacher={config.units_teacher}",
            f"--codebooks={config.codebooks}",
            f"--units={config.units}",
            f"--device={config.device}",
        )
    meta = PreparedFolder(path, config.seconds).meta
    for k in PREPARATION:
        if given.get(k, meta[k]) != meta[k]:
            raise ValueError(f"{path} was prepared with {k} {meta[k]}, not {given[k]}")
    return path


def main():
    given = parse(sys.argv[1:])
    if "sample" in given:
        write_samples(given["sample"], given)
        return
    out = given.get("resume")
    state = None
    defaults = {}
    if out:
        state, _ = load(f"{out}/last.pt")
        defaults = state["config"]
    elif "data" not in given:
        defaults = parse(TOY.split())
    config = Config(**{**defaults, **given})
    check(config)
    if int(os.environ.get("WORLD_SIZE") or 0) > 1:
        dist.init_process_group()  # gloo for the CPU's tensors, nccl for the GPUs'
    elif os.environ.get("SLURM_NTASKS", "1") != "1":  # each would train alone
        raise ValueError("SLURM_NTASKS is above 1: start torchrun, one task a node")
    if not config.data:  # audio; it is prepared below
        toy = data_prep("--toy", "prepared/toy-audio")
        config.data = [f"{toy}/toy-speech", f"{toy}/toy-sounds"]
    if config.batch_size % len(config.data) > 0:
        raise ValueError(
            f"--batch-size {config.batch_size}: not the same for all --data"
        )
    config.data = [
        os.path.abspath(prepared(path, config, given)) for path in config.data
    ]
    out = train(config, out, state)
    write_samples(f"{out}/last.pt", {}, f"{out}/samples")
    # Draws run.png. A run is whole without it.
    picture = f"{Path(__file__).parent}/results/picture.py"
    subprocess.run([sys.executable, picture, out])


def guarded(work):
    """Runs a program: a ValueError or OSError, as its flags and files cause them, is a
    line and exit code 2."""
    try:
        return work()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    guarded(main)
