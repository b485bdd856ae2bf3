"""python -m pytest: what a user of agrepa.py relies on. No network, no checkpoint."""

import ast
import builtins
import contextlib
import copy
import csv
import dataclasses
import dis
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import agrepa
import data_prep
from agrepa import AlignmentHeads, BiTC, BlockDataset, Condition, Config, N_MELS, Teacher
from agrepa import Tokenizer, VelocityModel, agrepa_loss, bitc_loss, capture, flow_matching_loss
from agrepa import flow_path, fog_a, interleave, lasp, log_mel, losses, mel_to_wave, pool
from agrepa import cka, resynthesise, sample, select_layers

HERE = Path(agrepa.__file__).parent
torch.set_num_threads(1)  # models are so small here that threads would wait for each other


OWN = torch.Generator()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    OWN.manual_seed(0)
    np.random.seed(0)


# ---- what the tests stand on ---------------------------------------------------------------------


def awake(module):
    """A model as if it had trained: parameters that start at zero drawn at random."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return module


def velocity_model(layers=4, codebooks=1):
    vocab = 8 * codebooks, 16 * codebooks
    return awake(VelocityModel(layers, 32, 2, dropout=0.3, vocab=vocab, n_mels=10))


def clips(codebooks=1, real=(6, 4, 6, 2)):
    """x_t, t, Condition: two domains; two clips padded to 6 blocks, the last without its tokens."""
    r, mask = 8 * codebooks, torch.arange(6) < torch.tensor(real)[:, None]
    tokens = torch.randint(0, r, (4, 6 * r))
    for ids, blocks in zip(tokens, real, strict=True):
        ids[blocks * r :] = ids[blocks * r - 1]  # as the data does it
    ref = torch.randn(4, 90, 10) * (torch.arange(90) < 20)[:, None]
    cond = Condition(tokens, ref, torch.tensor([0, 0, 1, 1]), torch.arange(4) < 3, mask)
    return torch.randn(4, 90, 10), torch.rand(4), cond


class Block(nn.Module):
    """h + f(h), in whatever `give` makes of it and its other arguments."""

    def __init__(self, give=lambda h, *others: h):
        super().__init__()
        self.f, self.give = nn.Linear(4, 4), give

    def forward(self, h, *others):
        return self.give(h + self.f(h), *others)


def chain(blocks, step=lambda block, h: block(h)):
    def velocity(h):
        for block in blocks:
            h = step(block, h)
        return h

    return velocity


def three(kind=Block):
    return [kind() for _ in range(3)]


def state():
    return torch.randn(2, 5, 4)


def by_hand(velocity, blocks, *inputs, skip=lambda args, kwargs, output: args[0]):
    """The scores, from closing one gate after another with forward hooks."""
    scores = []
    with torch.no_grad():
        v = velocity(*inputs)
        for block in blocks:
            hook = block.register_forward_hook(
                lambda block, *call: copy.deepcopy(skip(*call)), with_kwargs=True
            )
            v_k = velocity(*inputs)
            hook.remove()
            scores.append((v_k - v).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1))
    assert torch.stack(scores).min() > 1e-3  # there is something to compare
    return torch.stack(scores)


def assert_right(velocity, blocks, *inputs, **skip):
    expected = by_hand(velocity, blocks, *inputs, **skip)
    assert_close(fog_a(velocity, blocks, *inputs, **skip), expected, rtol=1e-4, atol=1e-6)


# ---- 1, 2. flow matching and our model -----------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 3, 5, 4)])
def test_path_starts_at_noise_ends_at_data_and_moves_at_u(shape):
    x0, x1, t = torch.randn(shape), torch.randn(shape), torch.tensor([0.2, 0.5, 0.7])
    assert torch.equal(flow_path(x0, x1, torch.zeros(3))[0], x0)
    assert torch.equal(flow_path(x0, x1, torch.ones(3))[0], x1)
    (a, u), (b, _) = flow_path(x0, x1, t), flow_path(x0, x1, t + 0.1)
    assert_close((b - a) / 0.1, u, atol=1e-5, rtol=1e-4)
    for i in range(3):  # each clip at its own time
        assert_close(a[i], (1 - t[i]) * x0[i] + t[i] * x1[i])


def test_loss_is_each_clips_mean_without_padding():
    v, u = torch.randn(2, 2, 5, 3)
    mask, error = torch.arange(5) < torch.tensor([[5], [2]]), (v - u).square()
    assert_close(flow_matching_loss(v, u), error.mean((1, 2)))
    expected = torch.stack([error[0].mean(), error[1, :2].mean()])
    assert_close(flow_matching_loss(v, u, mask), expected)
    assert not flow_matching_loss(v, u, mask & False).any()
    v, u = torch.randn(2, 2, 3, 4, 4)
    assert_close(flow_matching_loss(v, u), (v - u).square().mean((1, 2, 3)))


@pytest.mark.parametrize("codebooks", [1, 2])
@pytest.mark.parametrize("at", [0.05, 0.5, 0.95])
def test_fog_a_equals_closing_gates_by_hand(codebooks, at):
    model, (x_t, _, cond) = velocity_model(codebooks=codebooks), clips(codebooks)
    inputs = x_t, torch.full((4,), at), cond
    found = fog_a(model.train(), model.layers, *inputs)
    assert_close(found, by_hand(model.eval(), model.layers, *inputs), rtol=0, atol=1e-5)


def test_fog_a_shares_what_lies_below_the_closed_gate():
    model, L, evaluated = velocity_model(8), 8, []
    for layer in model.layers:
        layer.up.register_forward_hook(lambda *_: evaluated.append(1))
    fog_a(model, model.layers, *clips())
    once = L + L * (L - 1) // 2  # the open pass, and what lies above each closed gate
    assert once <= len(evaluated) <= once + L + 3 < L * (L + 1)  # with a pass or so of checks


def test_fog_a_closed_form_on_a_linear_residual_network():
    net, eye, h = [Block() for _ in range(4)], torch.eye(4), torch.randn(5, 4)
    for p in [block.f.bias for block in net] + [net[3].f.weight]:
        p.data.zero_()  # the last contributes nothing
    steps = [eye + block.f.weight.data.T for block in net]
    scores, v = fog_a(chain(net), net, h), h @ torch.linalg.multi_dot(steps)
    for k in range(4):
        v_k = h @ torch.linalg.multi_dot([eye if j == k else A for j, A in enumerate(steps)])
        assert_close(scores[k], (v_k - v).norm(dim=1) / v.norm(dim=1))
    assert not scores[3].any()


def test_dropped_tokens_do_not_matter_and_all_else_does():
    model, (x_t, t, cond) = velocity_model().eval(), clips()
    v = model(x_t, t, cond)
    for other in (
        cond._replace(tokens=(cond.tokens + 1) % 8),
        cond._replace(domain=1 - cond.domain),
    ):
        same = (model(x_t, t, other) == v).flatten(1).all(1)
        assert torch.equal(same, ~cond.keep)
    for other in (
        (x_t + 1, t, cond),
        (x_t, t / 2, cond),
        (x_t, t, cond._replace(ref=cond.ref + 1)),
    ):
        assert (model(*other) != v).flatten(1).any(1).all()
    assert torch.equal(model.embed(cond)[2], model.tokens.weight[8 + cond.tokens[2]])


@pytest.mark.parametrize("codebooks", [1, 2])
def test_padding_changes_nothing(codebooks):
    model, (x_t, t, cond) = velocity_model(codebooks=codebooks).eval(), clips(codebooks)
    v, scores = model(x_t, t, cond), fog_a(model, model.layers, x_t, t, cond)
    for i, n in enumerate(cond.mask.sum(1).tolist()):
        one, T = slice(i, i + 1), 15 * n
        tokens, ref = cond.tokens[one, : 8 * codebooks * n], cond.ref[one, :T]
        alone = x_t[one, :T], t[one], Condition(tokens, ref, cond.domain[one], cond.keep[one])
        assert_close(v[one, :T], model(*alone), rtol=0, atol=1e-5)
        assert_close(scores[:, one], fog_a(model, model.layers, *alone), rtol=1e-4, atol=1e-6)
        assert not v[i, T:].any()


@pytest.mark.parametrize("T", [7, 64])
def test_attention_is_the_same_in_bfloat16(T):
    q, k, v, far = torch.randn(4, 2, 3, T, 16)
    for mask in (None, torch.rand(2, 1, 1, T) > 0.3):
        found = []
        for kind in (torch.float32, torch.bfloat16):
            qkv = [y.to(kind).requires_grad_() for y in (q, k, v)]
            out = agrepa.attention(*qkv, mask)
            found.append([out, *torch.autograd.grad((out * far).sum(), qkv)])
        assert found[1][0].dtype == torch.bfloat16
        assert all((a - b).norm() < 0.02 * a.norm() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("fails_at", [None, 1, 2])
def test_probing_leaves_no_trace(fails_at):
    model, calls = velocity_model().train(), []

    def stumble(*_):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyError("stumbled")

    model.layers[1].down.register_forward_hook(stumble)
    model.layers[0].forward = copy.copy(model.layers[0].forward)  # some blocks have their own
    model.layers[2].drop.eval()
    modules, inputs = list(model.modules()), clips()
    before, weights = [dict(vars(m)) for m in modules], copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state(), random.seed(5) or random.getstate()
    try:
        fog_a(model, model.layers, *inputs)
        assert not fails_at
    except KeyError:
        assert fails_at
    assert torch.equal(rng[0], torch.get_rng_state()) and rng[1] == random.getstate()
    assert [vars(m) for m in modules] == before  # training flags, hooks, forward
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


# ---- 6. FoG-A in other people's models: right or refused -----------------------------------------

Pair = namedtuple("Pair", "c h")
GIVES = {
    "tuple": lambda h, c: (c.sin(), h),
    "list": lambda h, c: [h, c + h.mean(1, keepdim=True)],
    "namedtuple": lambda h, c: Pair(2 * c, h),
    "None": lambda h, c: (None, h),
    "dict": lambda h, c: {"sample": h, "scale": 0.5},
    "nested": lambda h, c: ((h, 2 * c), None),
}


@pytest.mark.parametrize("give", GIVES.values(), ids=GIVES)
def test_fog_a_takes_any_output_whose_shapes_tell(give):
    blocks = [Block(give) for _ in range(3)]

    def velocity(h, c):
        for block in blocks:
            found = [y for y in tree_leaves(block(h, c)) if torch.is_tensor(y)]
            h = next(y for y in found if y.shape == h.shape)
            c = next((y for y in found if y.shape == c.shape), c)
        return h + c.mean(1, keepdim=True)

    inputs = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    expected = by_hand(velocity, blocks, *inputs, skip=lambda args, kwargs, output: args)
    assert_close(fog_a(velocity, blocks, *inputs), expected)


UNCLEAR = {
    "a second stream that nobody takes": lambda h, c: (h, c),
    "another width": lambda h, c: h[..., :3],
    "text": lambda h, c: (h, "text"),
    "an object": lambda h, c: (h, object()),
}


@pytest.mark.parametrize("give", UNCLEAR.values(), ids=UNCLEAR)
def test_fog_a_refuses_outputs_that_do_not_tell(give):
    a, b, c = Block(), Block(give), state()
    with pytest.raises(ValueError, match="fog_a: block 2 returns .*skip="):
        fog_a(lambda h: tree_leaves(b(a(h), c))[0], [a, b], state())
    with pytest.raises(ValueError, match="fog_a: block 1 returns .*skip="):
        fog_a(a, [a], state())  # no other block tells what a closed one returns


class Joint(Block):
    """Two streams; the last block lets the first of them fall."""

    last = False

    def forward(self, c, h):
        return None if self.last else c + self.f(h), h + self.f(c)


def test_fog_a_takes_two_streams_of_one_length():
    blocks, inputs = three(Joint), torch.randn(2, 2, 5, 4)
    blocks[-1].last = True

    def velocity(c, h):
        for block in blocks:
            c, h = block(c, h)
        return h

    def own(args, kwargs, output):
        return None if output[0] is None else args[0], args[1]

    expected = by_hand(velocity, blocks, *inputs, skip=own)
    assert_close(fog_a(velocity, blocks, *inputs), expected)
    assert_close(fog_a(velocity, blocks, *inputs, skip=own), expected)
    for wrong in (
        lambda args, kwargs, output: (None if output[0] is None else args[1], args[0]),
        lambda args, kwargs, output: (output[0], args[1]),
        lambda args, kwargs, output: [None if x is None else 0 * x for x in output],
    ):
        with pytest.raises(ValueError, match="block 1 is closed by skip= with something else"):
            fog_a(velocity, blocks, *inputs, skip=wrong)


@pytest.mark.parametrize("gate", [1, 0.3])
def test_fog_a_refuses_residuals_added_by_the_caller_but_for_skip(gate):
    blocks, h = three(lambda: nn.Linear(4, 4)), state()
    velocity = chain(blocks, lambda block, h: h + gate * block(h))
    with pytest.raises(ValueError, match="fog_a: block 1 returns something .*0 [*] output"):
        fog_a(velocity, blocks, h)
    assert_right(velocity, blocks, h, skip=lambda args, kwargs, output: 0 * output)


def test_fog_a_takes_glue_that_writes_in_place_but_no_block_that_does():
    class Writes(Block):
        def forward(self, h):
            h += 1e-6 * self.f(h)
            return h

    blocks, h = three(), state()
    glue = chain(blocks, lambda block, h: block(h).add_(1))
    with pytest.raises(ValueError, match="fog_a: block 1 returns something"):
        fog_a(glue, blocks, h)
    # What a closed block returns is no alias of h.
    assert_right(lambda h: glue(h) + h, blocks, h, skip=lambda args, kwargs, output: args[0])
    blocks[1] = Writes()
    with pytest.raises(ValueError, match="fog_a: block 2 writes into its own input"):
        fog_a(chain(blocks), blocks, h)


def test_fog_a_takes_blocks_that_return_another_precision():
    blocks, head, h = three(lambda: Block(torch.Tensor.double)), nn.Linear(4, 4).double(), state()
    double = chain(blocks, lambda block, h: block(h.float()))
    expected = by_hand(
        lambda h: head(double(h)), blocks, h, skip=lambda args, kwargs, output: args[0].double()
    )
    assert_close(fog_a(lambda h: head(double(h)), blocks, h), expected, check_dtype=False)


def test_fog_a_refuses_blocks_that_run_twice_in_a_pass():
    blocks, h = three(), state()
    for skip in (None, lambda args, kwargs, output: args[0]):
        with pytest.raises(ValueError, match="fog_a: block 1 runs twice"):
            fog_a(lambda h: 3 * chain(blocks)(h) - 2 * chain(blocks)(h / 2), blocks, h, skip=skip)


def test_fog_a_takes_blocks_from_anywhere_in_any_order():
    named, h = nn.ModuleDict({name: Block() for name in "abc"}), state()
    a, b, c = named.values()
    expected = by_hand(chain([a, b, c]), [c, a, b], h)
    for order in ([c, a, b], (block for block in (c, a, b)), nn.ModuleList([c, a, b])):
        assert_close(fog_a(chain([a, b, c]), order, h), expected)
    keywords = chain([a, b, c], lambda block, h: block(h=h))
    assert_close(fog_a(keywords, named.values(), h), expected[[1, 2, 0]])


def test_fog_a_refuses_lists_of_blocks_that_mean_nothing():
    a, b, turns = Block(), Block(), iter("ab")
    outer = nn.Sequential(a, nn.Tanh())
    for blocks, velocity, why in (
        ([b, a, a], chain([a, b]), "block 2 and block 3 are the same module"),
        (nn.ModuleDict({"a": a}), a, "block 1 is a str"),
        ([a, nn.ModuleList([b])], chain([a, b]), "block 2 never ran .* ModuleList"),
        ([], a, "there are no blocks"),
        ([a, b], a, "block 2 never ran"),
        ([outer, a], chain([outer, b]), "block 2 returns something"),
        (
            [a, b],
            lambda h: a(b(h)) if next(turns) == "a" else b(a(h)),
            "block . gives other numbers",
        ),
        ([a], lambda h: (a(h), h), r"velocity\(\) returns a tuple"),
    ):
        with pytest.raises(ValueError, match=f"fog_a: {why}"):
            fog_a(velocity, blocks, state())
    with pytest.raises(ValueError, match="fog_a: block 2 runs inside another"):
        fog_a(chain([outer, b]), [outer, a], state(), skip=lambda args, kwargs, output: args[0])


def test_fog_a_refuses_branches_in_place_of_blocks():
    """Attention or feed-forward modules alone, each with a norm before it: plausible, meaningless."""
    norms, branches, h = (
        [nn.LayerNorm(4) for _ in range(3)],
        three(lambda: nn.Linear(4, 4)),
        state(),
    )
    for norm in norms:
        nn.init.normal_(norm.weight)  # as if it had trained

    def velocity(h):
        for norm, f in zip(norms, branches, strict=True):
            h = h + f(norm(h))
        return h

    with pytest.raises(ValueError, match="fog_a: block 1 returns something"):
        fog_a(velocity, branches, h)
    assert_right(velocity, branches, h, skip=lambda args, kwargs, output: 0 * output)


def test_skip_may_return_one_state_bare():
    """A 1-tuple's caller would take a bare state's first clip for all of it."""
    a, b, c = blocks = three(lambda: Block(lambda h: (h,)))
    glue, h = nn.Linear(4, 4), state()

    def velocity(h):
        x = a(h)[0]
        return c(glue(b(glue(x))[0]) + x)[0]

    expected = by_hand(velocity, blocks, h, skip=lambda args, kwargs, output: (args[0],))
    assert_close(fog_a(velocity, blocks, h, skip=lambda args, kwargs, output: args[0]), expected)
    with pytest.raises(ValueError, match="block 1 .*2, 5, 4"):
        fog_a(velocity, blocks, h, skip=lambda args, kwargs, output: (args[0], args[0]))


def test_fog_a_refuses_what_passes_between_blocks_beside_their_states():
    """As in networks whose first layer's values serve in all (value residuals)."""

    class Remembers(Block):
        def forward(self, h, seen):
            seen.value = getattr(seen, "value", self.f(h))
            return h + self.f(h).tanh() + seen.value

    blocks = [Remembers() for _ in range(4)]

    def velocity(h):
        seen = types.SimpleNamespace()
        for block in blocks:
            h = block(h, seen)
        return h

    with pytest.raises(ValueError, match="block . gives other numbers"):
        fog_a(velocity, blocks, state(), skip=lambda args, kwargs, output: args[0])


def test_fog_a_takes_a_padded_transformer_encoder():
    """Whose fast path for inference makes nested tensors."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 3).eval(), torch.randn(2, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])

    def velocity(x):
        return encoder(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)

    torch.backends.mha.set_fastpath_enabled(False)
    expected = by_hand(velocity, encoder.layers, x)
    torch.backends.mha.set_fastpath_enabled(True)
    assert_close(fog_a(velocity, encoder.layers, x), expected)
    assert torch.backends.mha.get_fastpath_enabled()


def test_fog_a_refuses_a_skip_of_another_shape_or_that_fails():
    blocks, h = three(), state()
    for skip, why in (
        (lambda args, kwargs, output: output[0], r"returns \[\[2, 5, 4\]\], but when closed"),
        (lambda args, kwargs, output: args[1], "tuple index out of range"),
        (lambda args, kwargs, output: kwargs["h"], "'h'"),
    ):
        with pytest.raises(ValueError, match=f"fog_a: block 1 {why}"):
            fog_a(chain(blocks), blocks, h, skip=skip)


def test_losses_refuse_masks_and_states_of_another_shape():
    v, heads = torch.randn(2, 5, 4), AlignmentHeads([1], 4, 3)
    with pytest.raises(ValueError, match="mask .2, 1, 5. for v .2, 5, 4."):
        flow_matching_loss(v, v, torch.ones(2, 1, 5))
    with pytest.raises(ValueError, match="v .2, 1, 5, 4. is not of the shape of u .2, 5, 4."):
        flow_matching_loss(v[:, None], v)
    with pytest.raises(ValueError, match="layer 1 is .2, 5, 4., .*not .1, T, D."):
        agrepa_loss({1: v}, heads, torch.randn(1, 3), {1: 1.0})
    for h, mask in ((v, torch.ones(2, 1, 5)), (v[:, None], None), (v, torch.ones(2, 4))):
        with pytest.raises(ValueError, match="agrepa_loss: layer 1 is"):
            agrepa_loss({1: h}, heads, torch.randn(2, 3), {1: 1.0}, mask)


def test_fog_a_runs_a_module_in_eval_mode_and_leaves_its_buffers_alone():
    net, h = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), Block(), Block()), state()
    net(h)
    before = copy.deepcopy(dict(net.named_buffers()))
    scores = fog_a(net.train(), net[2:], h)
    for velocity in (net.forward, lambda h: net(h)):  # a bound method's, a function's, too
        assert torch.equal(scores, fog_a(velocity, net[2:], h))
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert_close(scores, by_hand(net.eval(), net[2:], h))


DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "python": random.random,
    "numpy": np.random.rand,
    "generator": partial(torch.rand, 1, generator=OWN),
}


@pytest.mark.parametrize("place", ["before", "between", "after", "inside"])
@pytest.mark.parametrize("source", DRAWS)
def test_random_numbers_outside_the_blocks_cancel_and_others_are_refused(source, place):
    draw = {**dict.fromkeys(["before", "between", "after", "inside"], int), place: DRAWS[source]}
    a, b, c = blocks = three(lambda: Block(lambda h: h + draw["inside"]()))
    for p in b.f.parameters():
        p.data.zero_()  # contributes nothing, which nothing may hide

    def velocity(h):
        h = b(a(h + draw["before"]()))
        return c(h + draw["between"]()) + draw["after"]()

    if place != "inside" and source in ("torch", "python"):
        scores = fog_a(velocity, blocks, state(), skip=lambda args, kwargs, output: args[0])
        assert not scores[1].any() and scores[[0, 2]].min() > 1e-3
    else:
        who = {"after": "velocity..", "between": "block 3"}.get(place, "block [13]")
        with pytest.raises(ValueError, match=f"fog_a: {who} gives other numbers .*numpy"):
            fog_a(velocity, blocks, state(), skip=lambda args, kwargs, output: args[0])
    if place == "inside":  # two alone, too
        with pytest.raises(ValueError, match="fog_a: block [12] gives other numbers"):
            fog_a(chain([b, c]), [b, c], state())


WRAPS = ["compiled blocks", "compiled model", "bfloat16", "image", "checkpointed", "wrapped"]


@pytest.mark.parametrize("wrap", WRAPS)
def test_fog_a_takes_models_as_they_are(wrap):
    blocks, h, graphs = nn.ModuleList(three()), torch.randn(2, 3, 8, 4), []
    if wrap == "image":
        for block in blocks:
            block.f = nn.Conv2d(3, 3, 3, padding=1)

    def velocity(h):
        for block in blocks:
            again = wrap == "checkpointed"
            h = checkpoint(block, h, use_reentrant=True) if again else block(h)
        return h

    expected, run = by_hand(velocity, blocks, h), velocity
    if wrap == "compiled blocks":
        blocks = [torch.compile(block, backend="eager") for block in blocks]
    elif wrap == "compiled model":
        run = torch.compile(velocity, backend=lambda graph, _: graphs.append(graph) or graph)
        run(h)
    elif wrap == "bfloat16":
        blocks, h = blocks.bfloat16(), h.bfloat16()
    elif wrap == "wrapped":
        blocks = nn.ModuleList(map(nn.Sequential, blocks))
    found = fog_a(run, blocks, h)
    assert len(graphs) == (wrap == "compiled model")  # not once more for each gate
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0.05 if wrap == "bfloat16" else 1e-4, atol=0)


# ---- 4, 5, 7, 8. BiT-C, LASP, selection, alignment -----------------------------------------------


def test_interleave_order():
    a, b = torch.arange(12).view(2, 2, 3)
    assert interleave(a, b).tolist() == [[0, 6, 1, 7, 2, 8], [3, 9, 4, 10, 5, 11]]


def test_pool_is_the_mean_without_padding():
    h, mask = torch.randn(2, 3, 5, 4).bfloat16(), torch.arange(5).expand(2, 3, 5) % 3 != 2
    mask[1, 2] = False
    assert_close(pool(h), h.float().mean(2))
    h[~mask] = float("nan")
    z = pool(h, mask)
    assert_close(z[0, 0], h[0, 0, [0, 1, 3, 4]].float().mean(0))
    assert z.dtype == torch.float32 and z.isfinite().all() and not z[1, 2].any()


def test_bitc_is_the_cosine_of_a_head_on_the_pooled_normed_tokens():
    head, e, T_x = BiTC(6, 4), torch.randn(2, 5, 6), torch.randn(2, 4)
    z = torch.stack([e[0].mean(0), e[1, :3].mean(0)])
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    s = F.cosine_similarity(z @ head.P.weight.T + head.P.bias, T_x)
    assert_close(head(e, T_x, torch.arange(5) < torch.tensor([[5], [3]])), s)
    assert_close(bitc_loss(s, torch.tensor([1.0, 0.0])), 1 - s[0])  # one lost its tokens


def test_lasp_uses_the_shared_head_and_leaves_it_untouched():
    head, h, T_x = BiTC(6, 4), torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 4)
    mask, before = torch.rand(2, 5) > 0.4, copy.deepcopy(head.state_dict())
    score = lasp({10: h.sin(), 9: 3 * h + 1, 1: h}, head, T_x, mask)
    assert_close(
        score[[0, 2]], torch.stack([head(h, T_x, mask), head(h.sin(), T_x, mask)]).detach()
    )
    assert_close(score[0], score[1], atol=1e-3, rtol=0)  # neither scale nor offset counts
    assert not score.requires_grad
    assert all(torch.equal(p, before[name]) for name, p in head.state_dict().items())


def test_cka_sees_likeness_in_any_basis_and_none_by_chance():
    h = torch.randn(40, 6)
    turn, _ = torch.linalg.qr(torch.randn(6, 6))
    assert_close(cka(h, 3 * h @ turn + 5), torch.tensor(1.0), atol=1e-3, rtol=0)
    strangers = [cka(torch.randn(20, 30), torch.randn(20, 50)).item() for _ in range(50)]
    assert abs(np.mean(strangers)) < 0.05  # with its bias: over .5
    assert cka(h, torch.cat([h[:, :3], torch.randn(40, 3)], 1)) > 0.3


def test_selection():
    lam = select_layers([0.1, 0.4, 0.2, 0.4, 0.0], 3)
    assert list(lam) == [2, 4, 3] and list(lam.values()) == pytest.approx([0.4, 0.4, 0.2])
    assert select_layers(torch.tensor([0.1, 0.3]), 1) == {2: 1.0}
    assert list(select_layers([0.5] * 64, 5)) == [1, 2, 3, 4, 5]  # ties: the shallower
    assert select_layers([-0.3, -0.1, -0.2], 2, equal=True) == {2: 0.5, 3: 0.5}
    for scores, k, why in (
        ([0.1, float("nan")], 1, "finite"),
        ([0.1], 2, "can't choose 2 layers"),
        ([0.1], 0, "can't choose 0 layers"),
        ([[0.1, 0.2], [0.3, 0.4]], 1, "can't choose 1 layers"),
        ([0.0, 0.0], 1, "adaLN-Zero"),
        ([0.5, 0.4, -0.1], 2, "negative"),
    ):
        with pytest.raises(ValueError, match=why):
            select_layers(scores, k)


def test_alignment_loss_is_zero_where_the_heads_hit_the_teacher():
    h, heads, lam = torch.randn(3, 6, 8), AlignmentHeads([1, 3], 8, 8), {3: 0.3, 1: 0.7}
    heads.update({"1": nn.Identity(), "3": nn.Identity()})
    clip, stretches = h.mean(1), h.unflatten(1, (2, 3)).mean(2)
    for sign, T_x, loss in (
        (1, clip, 0.0),
        (1, stretches, 0.0),
        (1, -stretches, 2.0),
        (-1, clip, 0.6),  # layer 3 is as far as can be
    ):
        found = agrepa_loss({1: h, 3: sign * 2 * h}, heads, T_x, lam)
        assert_close(found, torch.full((3,), loss))


@pytest.mark.parametrize("targets", [1, 3])
def test_alignment_loss_of_a_padded_clip_is_its_own_loss(targets):
    h, heads, T_x = torch.randn(3, 6, 8, requires_grad=True), AlignmentHeads([2], 8, 5), None
    mask = torch.arange(6) < torch.tensor([[6], [2], [0]])
    T_x = torch.randn(3, 5) if targets == 1 else torch.randn(3, 3, 5)
    loss = agrepa_loss({2: h}, heads, T_x, {2: 1.0}, mask)
    alone = T_x[1:2] if targets == 1 else T_x[1:2, :1]
    assert_close(loss[1:2], agrepa_loss({2: h[1:2, :2]}, heads, alone, {2: 1.0}))
    assert loss[2] == 0  # all of it is padding
    for i, moves in ((2, False), (1, True)):
        gradients = torch.autograd.grad(loss[i], [h, *heads.parameters()], retain_graph=True)
        assert all(g.any() == moves for g in gradients)


def test_alignment_heads_take_a_width_a_layer():
    heads = AlignmentHeads({4: 0.6, 2: 0.4}, {2: 8, 4: 6}, 5, width=7)
    hidden = {2: torch.randn(3, 4, 8), 4: torch.randn(3, 4, 6)}
    assert agrepa_loss(hidden, heads, torch.randn(3, 5), {2: 0.5, 4: 0.5}).shape == (3,)
    assert [p.shape for p in heads["4"].parameters()] == [(7, 6), (7,), (5, 7), (5,)]


def test_capture_takes_states_with_gradient():
    net, h = nn.Sequential(*three()), state()
    with capture((block for block in net), {3: 0.6, 1: 0.4}) as hidden:
        v = net(h)
    assert sorted(hidden) == [1, 3] and torch.equal(hidden[3], v) and hidden[1].requires_grad
    with capture(nn.ModuleDict({"a": net[0], "b": net[1]}).values(), [2]) as hidden:
        checkpoint(net, h, use_reentrant=False)
    hidden[2].sum().backward()
    assert net[1].f.weight.grad.any() and net[2].f.weight.grad is None
    with torch.no_grad(), capture(net, [2]):  # to look at, not to train
        net(h)
    net[1].requires_grad_(False)  # what a frozen block returns still trains those below
    with capture(net, [2]) as hidden:
        net(h)
    assert hidden[2].requires_grad
    with pytest.raises(ValueError, match="block 2 has no gradient"), capture(net, [2]):
        checkpoint(net, h, use_reentrant=True)


@pytest.mark.parametrize("then", [nn.ReLU(inplace=True), lambda h: h.mul_(0)])
def test_capture_keeps_what_the_block_returned(then):
    block, h = Block(), state()
    with capture([block], [1]) as hidden:
        then(block(h))
    assert torch.equal(hidden[1], block(h))


@pytest.mark.parametrize("output", [2, "sample"])
def test_capture_takes_one_of_several_outputs(output):
    block, h = Block(lambda h: (None, h, 2 * h) if output == 2 else {"sample": h}), state()
    with capture([block], [1], output) as hidden:
        returned = block(h)
    assert torch.equal(hidden[1], returned[output])


def test_capture_says_what_is_wrong():
    net, pair, h = nn.Sequential(*three()), Block(lambda h: (h, h)), state().requires_grad_()

    def recompute(h):
        checkpoint(net, h, use_reentrant=True)

    for blocks, layers, output, run, why in (
        (net, [2], None, net[0], "block 2 never ran"),
        (net, [4], None, net, "no layer 4 among 3"),
        (net, [0], None, net, "no layer 0 among 3"),
        (nn.ModuleDict({"a": net}), [1], None, net, "capture: "),
        ([net[0], net[1], net[0]], [3], None, net, "block 3 is listed twice"),
        ([pair], [1], None, pair, r"block 1 returns .*2, 5, 4.*2, 5, 4.*; say which"),
        ([pair], [1], 2, pair, "block 1 .*output=2"),
        ([pair], [1], "h", pair, "block 1 .*output=h"),
        (net, [1, 2], None, recompute, "block 1 has no gradient.*use_reentrant=False"),
    ):
        with pytest.raises(ValueError, match=why), capture(blocks, layers, output):
            run(h)
    assert not any(module._forward_hooks for module in [*net, pair])


# ---- 3. teacher and tokens -----------------------------------------------------------------------


def test_large_bundles_normalise_each_clip_by_itself(monkeypatch):
    shape = torchaudio.pipelines.HUBERT_LARGE._params | {
        "extractor_conv_layer_config": [(8, 10, 5), *[(8, 3, 2)] * 4, *[(8, 2, 2)] * 2],
        "encoder_embed_dim": 16,
        "encoder_num_layers": 3,
        "encoder_num_heads": 2,
        "encoder_ff_interm_features": 32,
    }
    net = torchaudio.models.wav2vec2_model(**shape)
    large = torchaudio.pipelines._wav2vec2.utils._extend_model(net, normalize_waveform=True)
    monkeypatch.setattr(torchaudio.pipelines.Wav2Vec2Bundle, "get_model", lambda bundle: large)
    teacher = Teacher("HUBERT_LARGE", 2)
    wave = torch.randn(2, 3 * 2560) * torch.tensor([[0.01], [1.0]])
    found, padded = teacher(wave), F.pad(wave, (80, 0))
    assert found.shape == (2, 24, 16) and teacher.dim == 16
    for i in range(2):  # for a single clip the wrapper is right
        expected = large.extract_features(padded[i : i + 1])[0][1]
        assert_close(found[i : i + 1], expected, rtol=1e-3, atol=1e-3)
    assert (large.extract_features(padded)[0][1] - found).abs().max() > 0.1
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_a_missing_checkpoint_is_explained(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(ValueError, match="no route to host") as error:
        Teacher("HUBERT_BASE")
    for word in ("hubert_fairseq_base_ls960.pth", "https://", str(tmp_path), "--teacher MFCC"):
        assert word in str(error.value)


TEACHERS = """
import torch
class load(torch.nn.Module):
    def forward(self, x): return x.unfold(1, 320, 320)[..., :5]
def plain(): return lambda x: x.unfold(1, 400, 320)
def fast(): return lambda x: x.unfold(1, 160, 160)
def fails(): raise KeyError("no weights")
def late(): return lambda x: 1 / 0
def wordy(): return lambda x: ("no", "tensor")
def hasty(): return lambda x: x.unfold(1, 400, 319)
"""


def test_teachers_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TEACHERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    wave = torch.randn(2, 2560)
    assert torch.equal(Teacher("mine.py:load")(wave), wave.unfold(1, 320, 320)[..., :5])
    assert Teacher("mine:load").dim == 5
    assert Teacher("mine.py:plain")(wave).shape == (2, 8, 400)
    hasty = Teacher("mine.py:hasty")  # right for a third of a second
    with pytest.raises(ValueError, match=r"makes \[1, 1284, 400\] of \[1, 409600\], not"):
        hasty(torch.zeros(1, 160 * 2560))


@pytest.mark.parametrize(
    "spec, layer, why",
    [
        ("SQUIM_OBJECTIVE", 9, "not MFCC, a speech model"),
        ("HDEMUCS_HIGH_MUSDB", 9, "not MFCC, a speech model"),
        ("HUBERT_BSE", 9, "not MFCC, a speech model"),
        ("HUBERT_BASE", 0, "--teacher-layer 0: it has 12"),
        ("HUBERT_BASE", 13, "--teacher-layer 13: it has 12"),
        ("mine.py:fast", 9, r"gave \[1, 32, 160\], not \[1, 16, dim\]"),
        ("mine.py:fails", 9, "KeyError: 'no weights'"),
        ("mine.py:late", 9, "ZeroDivisionError"),
        ("mine.py:wordy", 9, "tuple"),
        ("mine.py:nothing", 9, "nothing"),
        ("no.py:load", 9, "no.py"),
        ("no_such_package:load", 9, "no_such_package"),
    ],
)
def test_teachers_that_can_not_be_had_are_refused_in_a_line(
    spec, layer, why, tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text(TEACHERS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^--teacher {spec}: .*{why}") as error:
        Teacher(spec, layer)
    assert "\n" not in str(error.value)


def test_teacher_and_mel_hear_clicks_at_one_time():
    at = torch.linspace(0.4, 0.48, 25)  # the mean over places of a click in its frame
    low, high = torch.zeros(25, 5 * 2560), torch.zeros(25, 5 * 3840)
    low[range(25), (at * 16_000).round().long()] = 1
    high[range(25), (at * 24_000).round().long()] = 1
    loudness = (Teacher("MFCC")(low)[..., 0] / 26**0.5).exp()  # from the sum of 26 logarithms
    heard = []
    for energy, seconds in (
        (loudness - 1e-6, 0.02),
        (log_mel(high).exp().square().sum(2), 0.8 / 75),
    ):
        middles = (torch.arange(energy.shape[1]) + 0.5) * seconds  # as interpolation takes them
        heard.append((energy * middles).sum(1) / energy.sum(1))
    assert abs((heard[0] - heard[1]).mean()) < 0.006
    assert abs(heard[0] - at).max() < 0.02 and abs(heard[1] - at).max() < 0.02


def test_tokens_are_the_nearest_units_codebook_after_codebook():
    features, mel, centroids = torch.randn(2, 8, 5), torch.randn(2, 15, 100), torch.randn(7, 105)
    ids = Tokenizer(centroids, codebooks=2)(features, mel)
    assert torch.equal(ids[:, ::2], torch.cdist(features, centroids[:, :5]).argmin(2))
    assert torch.equal(ids[:, ::2], Tokenizer(centroids[:, :5])(features, mel))
    assert ids[:, 1::2].min() >= 7 and ids.max() < 14


# ---- the file itself -----------------------------------------------------------------------------

HEAD = """
import contextlib, random
from functools import partial
from unittest import mock
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
"""


def sections():
    """{number: text}, from a banner to the next."""
    found = re.split(r"^(# ---- (\d+)\. )", inspect.getsource(agrepa), flags=re.M)
    return {int(n): a + b for a, n, b in zip(*(found[i::3] for i in (1, 2, 3)), strict=True)}


def global_names(code):
    own = {x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"}
    return own.union(*(global_names(c) for c in code.co_consts if inspect.iscode(c)))


def pasted(n):
    """What section n defines when it stands alone; 8 leans on 4's pool."""
    own, text = {}, sections()[n] + (inspect.getsource(pool) if n == 8 else "")
    exec(HEAD + text, own)
    missing = global_names(compile(text, "section", "exec")) - own.keys() - vars(builtins).keys()
    assert not missing  # nor in the paths that no test below takes
    return own


def test_sections_4_to_8_run_when_pasted_alone():
    net, h, T_x = nn.Sequential(*three()), state(), torch.randn(2, 3)
    four, five, six, seven, eight = map(pasted, range(4, 9))
    head = four["BiTC"](4, 3)
    assert four["bitc_loss"](head(h, T_x), torch.tensor([0.5, 0.5])) <= 2
    assert five["lasp"]({1: h, 2: h}, head, T_x).shape == (2, 2)
    scores = six["fog_a"](net, net, h)
    assert torch.equal(scores, fog_a(net, net, h))
    lam = seven["select_layers"](scores.mean(1), 1)
    with eight["capture"](net, lam) as hidden:
        net(h)
    heads = eight["AlignmentHeads"](lam, 4, 3)
    eight["agrepa_loss"](hidden, heads, T_x, lam).mean().backward()


def equations(text):
    """The numbers of "Eq. 3", "Eqs. 3, 4" and "Eqs. 3 to 5" in a text."""
    found = set()
    for group in re.findall(r"Eqs?\. ([\d, ]+(?:to \d+)?)", text):
        numbers = [int(n) for n in re.findall(r"\d+", group)]
        found |= set(range(numbers[0], numbers[1] + 1)) if "to" in group else set(numbers)
    return found


def test_the_table_of_sections_tells_the_truth():
    texts, rows = sections(), re.findall(r"^ ?(\d+)  (\S.*)", agrepa.__doc__, re.M)
    assert [int(n) for n, _ in rows] == list(texts) == list(range(1, 14))
    for n, row in rows:
        text = texts[int(n)]
        _, *cited, names = re.split(r" {2,}", row)
        defined = {getattr(node, "name", None) for node in ast.parse(text).body}
        assert equations(" ".join(cited)) == equations(text.splitlines()[0]), row
        for name in names.split(", "):
            assert hasattr(agrepa, name) and name in defined, name


def test_readme_maps_equations_to_what_implements_them():
    rows = re.findall(
        r"^\| (Eqs?\. .*?) \| .* \| (`.*`) \|$", (HERE / "README.md").read_text(), re.M
    )
    assert set.union(*(equations(cited) for cited, _ in rows)) == {*range(1, 13), 15}
    for cited, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            (home,) = [
                text
                for text in sections().values()
                if re.search(rf"^(def|class) {name}\b", text, re.M)
            ]
            assert equations(cited) & equations(home.splitlines()[0]), name


# ---- what a close reading found ------------------------------------------------------------------


def test_a_block_that_runs_again_and_again_with_the_residual_outside_is_refused():
    block = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="fog_a: block 1 runs twice"):
        fog_a(lambda h: chain([block] * 3, lambda block, h: h + block(h))(h), [block], state())


def test_complex_velocities_count_whole():
    blocks, h = three(), state()

    def velocity(h):
        h = chain(blocks)(h)
        return torch.complex(h, 3 * h.flip(1))

    assert_right(velocity, blocks, h)
    assert fog_a(lambda h: 1j * velocity(h).real, blocks, h).min() > 0


def test_a_velocity_may_return_the_same_buffer_each_time():
    blocks, h, buffer = three(), state(), state()
    assert_close(
        fog_a(lambda h: buffer.copy_(chain(blocks)(h)), blocks, h),
        by_hand(chain(blocks), blocks, h),
    )


@pytest.mark.parametrize("turn", [1, -1])
def test_blocks_that_leave_something_in_an_attribute_are_right_in_any_order(turn):
    class Leaves(Block):
        def forward(self, h):
            self.left = self.f(h)
            return h + self.left

    blocks = [Leaves() for _ in range(4)]
    assert_right(lambda h: chain(blocks)(h) + sum(b.left for b in blocks), blocks[::turn], state())


def test_numpy_in_another_than_the_last_block_of_its_kind_is_refused():
    blocks = [Block(lambda h: h + np.random.rand()), Block(), Block()]
    with pytest.raises(ValueError, match="block 1 gives other numbers"):
        fog_a(chain(blocks), blocks, state())


def test_shapes_that_change_from_pass_to_pass_are_refused():
    blocks, sizes = three(), iter(range(1, 99))
    with pytest.raises(ValueError, match="fog_a: block 1 gives other numbers"):
        fog_a(lambda h: chain(blocks)(h[:, : next(sizes)]).sum(1), blocks, state())

    class Appends(Block):
        def forward(self, h, kept):
            kept.append(h)
            return h + self.f(h)

    block = Appends()
    with pytest.raises(ValueError, match="fog_a: block 1 writes into its own input"):
        fog_a(lambda h: block(h, [h]), [block], state())


def test_an_output_taken_in_twice_where_inputs_differed_is_refused():
    a, b = (Block(lambda h, c: h) for _ in range(2))
    with pytest.raises(ValueError, match="fog_a: block 1 returns something"):
        fog_a(lambda h: b(*[a(h, torch.ones(2, 5, 4))] * 2), [a, b], state())


def test_huge_states_are_not_called_writing():
    blocks, h = three(), state()
    small = fog_a(chain(blocks), blocks, h)
    for block in blocks:
        block.f.bias.data *= 1e25
    assert_close(fog_a(lambda h: chain(blocks)(1e25 * h) / 1e25, blocks, h), small)


def test_nan_is_not_called_writing():
    blocks = [Block(lambda h, *missing: h) for _ in range(3)]
    missing, h = torch.tensor([float("nan"), 1.0]), state()
    assert_right(chain(blocks, lambda block, h: block(h, missing)), blocks, h)
    assert fog_a(lambda h: chain(blocks)(h) * float("nan"), blocks, h).isnan().all()
    assert fog_a(lambda h: chain(blocks)(h * float("nan")), blocks, h).isnan().all()


def test_a_velocity_may_write_in_its_inputs():
    blocks, h = three(), state()
    before, expected = h.clone(), by_hand(lambda h: chain(blocks)(h + 1), blocks, h)
    assert_close(fog_a(lambda h: chain(blocks)(h.add_(1)), blocks, h), expected)
    assert torch.equal(h, before)


def test_a_velocity_may_be_a_number_a_sample_and_blocks_must_be_some():
    blocks, h = three(), state()
    assert fog_a(lambda h: chain(blocks)(h).mean((1, 2)), blocks, h).shape == (3, 2)
    with pytest.raises(ValueError, match="no blocks"):
        fog_a(lambda h: h, [], h)


def test_a_single_number_is_no_velocity():
    blocks = three()
    with pytest.raises(ValueError, match="velocity"):
        fog_a(lambda h: chain(blocks)(h).mean(), blocks, state())


def test_capture_takes_a_block_without_a_tuple_whole_and_layers_once():
    block, h = Block(), state()
    with capture([block], [1], output=0) as hidden:
        block(h)
    assert hidden[1].shape == h.shape
    with capture([block], (k for k in [1])) as hidden:
        block(h)
    assert list(hidden) == [1]
    with pytest.raises(ValueError, match="values"), capture(nn.ModuleDict({"a": block}), [1]):
        block(h)


def test_the_loss_takes_any_rank():
    v, u = torch.randn(2, 3, 4)
    assert_close(flow_matching_loss(v, u), (v - u).square().mean(1))


def test_a_missing_checkpoint_from_elsewhere_is_explained(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchaudio.pipelines.Wav2Vec2Bundle, "get_model", refuse)
    monkeypatch.setattr(type(torchaudio.pipelines.MMS_FA), "get_model", refuse)
    with pytest.raises(ValueError) as error:
        Teacher("MMS_FA", 9)
    assert str(error.value).count("https://") == 1


# ---- data: preparation and batches --------------------------------------------------------------


def tone(path, seconds, rate=24_000, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    x = 0.3 * np.sin(2 * np.pi * rng.uniform(150, 900) * t * (1 + 0.1 * t))
    x += 0.05 * rng.standard_normal(len(t))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(x[:, None], channels, 1), rate)
    return path


def plenty(folder):
    """Half a minute to train on, and enough held-out audio to measure a run on."""
    for i in range(32):
        part = "train" if i < 8 else "dev-x"
        tone(folder / part / f"{i}.wav", 3 + i % 5, 16_000, seed=i)


@pytest.fixture
def hasty_vocoder(monkeypatch):
    """Two rounds of Griffin-Lim in place of 64: metrics only have to be the same each time."""
    real = torchaudio.transforms.GriffinLim

    def few(*args, n_iter, **how):
        return real(*args, n_iter=2, **how)

    monkeypatch.setattr(torchaudio.transforms, "GriffinLim", few)


@pytest.fixture(scope="session")
def audio(tmp_path_factory):
    """Two small folders of audio, of several rates, channel counts and lengths."""
    root = tmp_path_factory.mktemp("audio")
    for i in range(14):
        rate, channels = (16_000, 44_100)[i % 2], 1 + i % 2
        tone(root / "one" / f"s{i % 3}" / f"{i}.flac", 1 + 0.3 * (i % 4), rate, channels, i)
        tone(root / "two" / f"{i}.wav", 0.4 + 0.4 * (i % 5), 22_050, 1, 100 + i)
    return root


def tiny(**settings):
    """A configuration that runs in a second."""
    default = dict(
        teacher="MFCC",
        units=8,
        layers=4,
        dim=32,
        heads=2,
        seconds=0.96,
        batch_size=4,
        steps=12,
        probe_steps=6,
        probe_every=2,
        lr=3e-3,
        top_k=2,
        device="cpu",
        dtype="float32",
        eval_every=4,
        save_every=4,
    )
    return Config(**{**default, **settings})


def prepare(source, out, config=None):
    return str(data_prep.prepare(source, out, config or tiny()))


@pytest.fixture(scope="session")
def folders(audio, tmp_path_factory):
    """{codebooks: [prepared folder, prepared folder]}"""
    out = tmp_path_factory.mktemp("prepared")
    return {
        n: [prepare(audio / d, out / f"{d}-{n}", tiny(codebooks=n)) for d in ("one", "two")]
        for n in (1, 2)
    }


def datasets(folders, codebooks=1):
    return [BlockDataset(folder) for folder in folders[codebooks]]


def arrays(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.npy")}


@pytest.mark.parametrize("rate", [16_000, 44_100, 16_001])
def test_a_click_lands_in_its_block_of_mel_and_teacher(tmp_path, rate):
    at = 5 * agrepa.BLOCK + 7 * 256 / 24_000  # block 5, frame 7
    for i in range(3):
        x = np.random.default_rng(i).standard_normal(2 * rate) * 1e-4
        x[round(at * rate)] = 0.9
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{i}.wav", x, rate, "FLOAT")
    data = BlockDataset(prepare(tmp_path / "in", tmp_path / "out", tiny(units=2)))
    for u in range(3):
        clip = data.clip(u, 0, 12)
        assert clip["real"] == 12 and clip["x1"].sum(1).argmax() == 5 * 15 + 7
        assert (clip["teacher"] + data.centre)[:, 0].argmax() == 5  # MFCC's first is loudness


def test_teacher_rows_are_centred_block_means_and_exact_for_any_crop(folders, audio):
    data = BlockDataset(folders[1][0])
    rows = [data.clip(u, 0, data.blocks[u])["teacher"] for u in range(data.train)]
    rows = np.concatenate(rows)
    assert np.abs(rows.mean(0)).max() < 2e-2 * np.abs(rows).std()
    raw = BlockDataset(folders[1][0], raw_teacher=True)
    first = raw.first[0]
    assert np.allclose(raw.clip(0, 0, 3)["teacher"], raw.teacher[first : first + 3], atol=1e-6)
    teacher, found = Teacher("MFCC"), 0
    for file in sorted((audio / "one").rglob("*.flac"))[:6]:
        features = teacher(agrepa.read_audio(file)[0][None])[0] - torch.from_numpy(data.centre)
        means = features.unflatten(0, (-1, 8)).mean(1)
        for u in np.flatnonzero(data.blocks == len(means)):
            if np.allclose(data.clip(u, 0, len(means))["teacher"], means, atol=0.03):
                found += 1
                clip = torch.from_numpy(data.clip(u, 1, 3)["teacher"])
                assert torch.allclose(agrepa.pool(clip), features[8:32].mean(0), atol=0.03)
    assert found == 6


def test_draws_depend_on_neither_processes_nor_each_other(folders):
    config, data = tiny(), datasets(folders)
    whole = agrepa.training_batch(data, dataclasses.replace(config, batch_size=8), 7)
    for rank in range(2):
        half = agrepa.training_batch(data, config, 7, rank, 2)
        for d in range(2):
            mine, all_ = slice(2 * d, 2 * d + 2), slice(4 * d + 2 * rank, 4 * d + 2 * rank + 2)
            for name in ("x0", "x1", "t"):
                assert torch.equal(getattr(half, name)[mine], getattr(whole, name)[all_])
            assert torch.equal(half.cond.ref[mine], whole.cond.ref[all_])
            assert torch.allclose(half.kept[mine] / 2, whole.kept[all_])
    assert not torch.equal(whole.x0[:4], agrepa.training_batch(data, config, 8).x0)


def test_no_two_random_streams_meet():
    purposes = agrepa.DRAWS, agrepa.NOISE, agrepa.HELD_OUT, agrepa.HELD_OUT_NOISE, agrepa.SAMPLING
    keys = list(itertools.product(purposes, (0, 1, 2), (0, 1), (0, 1), (0, 1)))
    seen = {agrepa.stream(*key).random() for key in keys}
    assert len(seen) == len(keys)
    assert agrepa.stream(1, 2).random() == agrepa.stream(1, 2, 0).random()  # one key, spelt shorter


def test_held_out_clips_are_the_same_in_every_run_and_not_those_of_the_choice(folders):
    data = datasets(folders)
    one, other = (agrepa.held_out_batch(data, tiny(seed=seed), 16) for seed in (0, 3))
    assert torch.equal(one.x0, other.x0) and torch.equal(one.cond.tokens, other.cond.tokens)
    assert one.t[:16].sort().values.diff().max() < 0.1  # times are spread evenly
    assert not one.cond.mask is None and (one.scored.sum(1) > 0).all()
    many = data[0]
    many.train = 4  # as if more were held out
    assert not set(many.held_out(0)) & set(many.held_out(1))
    many.train = len(many.first) - 1
    assert list(many.held_out(1)) == list(many.held_out(0)) == [many.train]


def test_reference_prefix_and_dropping_rates(folders):
    config, data = tiny(batch_size=16), datasets(folders)[1:]  # some are shorter than the crop
    batches = [agrepa.training_batch(data, config, step) for step in range(40)]
    dropped = np.mean([(~b.cond.keep).float().mean() for b in batches])
    lengths = []
    for b in batches:
        real = 90 if b.cond.mask is None else 15 * b.cond.mask.sum(1)
        lengths.append(b.cond.ref.abs().sum(2).gt(0).sum(1) / real)
        prompt = b.cond.ref.abs().sum(2) > 0
        assert torch.equal(b.cond.ref[prompt], b.x1[prompt]) and not (b.scored & prompt).any()
    lengths = torch.cat(lengths)
    assert 0.06 < dropped < 0.14 and lengths.max() <= 0.3 and lengths.std() > 0.05
    assert 0.05 < (lengths == 0).float().mean() < 0.25


def test_hubert_bundle_end_to_end(audio, tmp_path, monkeypatch):
    """The real checkpoint's format and file name; every layer above the chosen one is NaN."""
    torch.manual_seed(0)
    net = torchaudio.models.hubert_base()
    for layer in net.encoder.transformer.layers[4:]:
        for p in layer.parameters():
            p.data.fill_(float("nan"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "hub" / "checkpoints" / "hubert_fairseq_base_ls960.pth"
    torch.save(net.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "in").mkdir()
    for f in sorted((audio / "one" / "s0").iterdir()):
        os.link(f, tmp_path / "in" / f.name)
    config = tiny(teacher="HUBERT_BASE", teacher_layer=4)
    data = BlockDataset(prepare(tmp_path / "in", tmp_path / "out", config))
    assert data.dim == 768 and np.isfinite(data.teacher).all() and data.teacher[:].std() > 0
    teacher = Teacher("HUBERT_BASE", 4)
    for blocks in (1, 7):
        assert teacher(torch.randn(2, 2560 * blocks)).shape == (2, 8 * blocks, 768)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_unusable_files_are_skipped_and_listed(tmp_path, audio):
    folder = tmp_path / "in"
    folder.mkdir()
    for f in (audio / "one").rglob("*.flac"):
        (folder / f.name).write_bytes(f.read_bytes())
    whole = tone(folder / "whole.flac", 30)
    (folder / "cut.flac").write_bytes(whole.read_bytes()[:200_000])
    for name, value in (("nan", np.nan), ("huge", 1e38)):
        x = np.zeros(24_000, np.float32)
        x[500] = value
        soundfile.write(folder / f"{name}.wav", x, 24_000, "FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(24_000), 24_000)
    soundfile.write(folder / "short.wav", np.ones(2000), 24_000)
    soundfile.write(folder / "slow.wav", np.random.default_rng(0).uniform(-1, 1, 9000), 1)
    (folder / "text.wav").write_text("not audio")
    os.mkfifo(folder / "pipe.wav")
    tone(folder / "tiny.ogg", 0.17, 48_000)
    tone(folder / "some.mp3", 3, 44_100, 2)
    before = sorted(path.name for path in folder.iterdir())
    data = BlockDataset(prepare(folder, tmp_path / "out"))
    reasons = {s["path"]: s["reason"] for s in data.meta["skipped"]}
    wrong = "cut.flac huge.wav nan.wav pipe.wav short.wav silent.wav slow.wav text.wav".split()
    assert sorted(reasons) == wrong
    assert "1e+38" in reasons["huge.wav"] and "nan" in reasons["nan.wav"]
    assert "silent" in reasons["silent.wav"] and "read" in reasons["text.wav"]
    assert data.meta["utterances"] == 14 + 2 + 1 + 1
    assert np.isfinite(data.mel).all() and abs(data.mean) < 20
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_teacher_that_answers_nan_poisons_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def load():\n"
        "    def features(x):\n"
        "        x = x.unfold(1, 320, 320)[..., :4].clone()\n"
        "        x[x.abs().amax((1, 2)) > 0.5] = float('nan')\n"
        "        return x\n"
        "    return features\n"
    )
    for i in range(12):
        x = 0.01 * np.random.default_rng(i).standard_normal(24_000)
        x[::7] *= 90 if i == 5 else 1
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{i}.wav", x.clip(-0.99, 0.99), 16_000)
    config = tiny(teacher=f"{tmp_path}/mine.py:load", units=4)
    data = BlockDataset(prepare(tmp_path / "in", tmp_path / "out", config))
    assert [s["path"] for s in data.meta["skipped"]] == ["5.wav"]
    assert np.isfinite(data.teacher).all() and np.isfinite(data.centre).all()


def test_held_out_are_whole_folders_where_there_are_enough():
    chapters = {f"train/{s}/{c}/{i}.wav": 40 for s in range(9) for c in range(5) for i in range(30)}
    held = data_prep.hold_out(chapters)
    folders = {str(Path(p).parent) for p in held}
    assert held == {p for p in chapters if str(Path(p).parent) in folders}
    share = len(held) / len(chapters)
    assert 0.02 <= share <= 0.1 and held == data_prep.hold_out(dict(reversed(chapters.items())))
    few = {f"{f}/{i}.wav": 100 + i for f in ("a", "b", "c") for i in range(40)}
    share = sum(few[p] for p in data_prep.hold_out(few)) / sum(few.values())
    assert 0.02 <= share <= 0.1
    parts = {"train-clean/1.wav": 9, "dev-clean/2.wav": 9, "test-other/3.wav": 9}
    assert data_prep.hold_out(parts) == {"dev-clean/2.wav", "test-other/3.wav"}


def interrupted_at(monkeypatch, count):
    """Preparation stops, as by Ctrl-C, when the tokenizer is called for the count-th time."""
    real, calls = agrepa.Tokenizer.forward, []

    def forward(self, *args):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(agrepa.Tokenizer, "forward", forward)


@pytest.mark.parametrize("stop", [3, 12])
def test_interrupted_preparation_goes_on(tmp_path, audio, monkeypatch, stop):
    config = tiny(units=2)  # the sample for k-means is a part of the whole
    monkeypatch.setattr(data_prep, "BATCH", 20)
    whole = prepare(audio / "one", tmp_path / "whole", config)
    with monkeypatch.context() as m:
        interrupted_at(m, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(audio / "one", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    state = json.loads((tmp_path / "out.partial" / "state.json").read_text())
    assert (state["batches"] > 0) == (stop > 3)  # the other stops in the first
    out = prepare(audio / "one", tmp_path / "out", config)
    assert arrays(out) == arrays(whole) and not list(tmp_path.glob("*.partial"))
    assert sorted(p.name for p in Path(out).iterdir()) == sorted([*arrays(out), "meta.json"])
    with pytest.raises(ValueError, match="nothing is overwritten"):
        prepare(audio / "one", tmp_path / "out", config)


def test_damaged_or_foreign_partial_work_is_refused(tmp_path, audio, monkeypatch):
    with monkeypatch.context() as m:
        interrupted_at(m, 9)
        with pytest.raises(KeyboardInterrupt):
            prepare(audio / "one", tmp_path / "out")
    part = tmp_path / "out.partial"
    with pytest.raises(ValueError, match="other audio or settings"):
        prepare(audio / "two", tmp_path / "out")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="other audio or settings"):
        prepare(audio / "two", tmp_path / "mine")
    os.truncate(part / "mel.npy", 9000)
    with pytest.raises(ValueError, match="mel.npy is damaged"):
        prepare(audio / "one", tmp_path / "out")


def test_the_cache_knows_changed_audio_and_broken_folders(tmp_path, audio, capsys):
    source = shutil.copytree(audio / "one", tmp_path / "in")
    config = tiny(cache=str(tmp_path / "cache"))
    first = data_prep.prepared(source, config)
    assert data_prep.prepared(source, config) == first
    file = next(source.rglob("*.flac"))
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))  # edited, at equal length
    second = data_prep.prepared(source, config)
    assert second != first and first.exists()
    os.truncate(second / "tokens.npy", 300)
    third = data_prep.prepared(source, config)
    assert third not in (first, second) and "preparing again" in capsys.readouterr().err


def test_a_file_of_two_names_is_taken_once(tmp_path):
    for name in ("a", "b"):
        tone(tmp_path / "in" / "by-voice" / f"{name}.wav", 1)
    (tmp_path / "in" / "by-set").mkdir()
    (tmp_path / "in" / "by-set" / "x.wav").symlink_to(tmp_path / "in" / "by-voice" / "a.wav")
    for name in ("d", "c"):
        os.link(tmp_path / "in" / "by-voice" / "b.wav", tmp_path / "in" / f"{name}.wav")
    found, _ = data_prep.list_audio(tmp_path / "in")
    assert [path for path, *_ in found] == ["by-set/x.wav", "c.wav"]


def test_a_download_stopped_while_unpacked_begins_anew(tmp_path, monkeypatch):
    from torchaudio.datasets import libritts

    def fetch(url, archive, hash_prefix):
        assert url.endswith("/dev-clean.tar.gz") and hash_prefix
        for name in ("1", "2"):
            tone(tmp_path / "LibriTTS" / "dev-clean" / "84" / name / f"{name}.wav", 0.2)
        shutil.make_archive(archive.removesuffix(".tar.gz"), "gztar", tmp_path, "LibriTTS")
        shutil.rmtree(tmp_path / "LibriTTS")

    def dies(archive):
        real(archive)
        next(Path(archive).parent.rglob("2.wav")).unlink()
        raise KeyboardInterrupt

    real, folder = libritts._extract_tar, tmp_path / "speech"
    monkeypatch.setattr(libritts, "download_url_to_file", fetch)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(libritts, "_extract_tar", dies)
        data_prep.download(folder, "dev-clean")
    assert not folder.exists()
    for _ in range(2):
        data_prep.download(folder, "dev-clean")
        assert len(list(folder.rglob("dev-clean/84/*/*.wav"))) == 2
    assert os.listdir(tmp_path) == ["speech"]


def test_two_preparations_of_one_folder_do_not_mix(tmp_path, audio):
    (tmp_path / "out.partial").mkdir()
    held = agrepa.lock(tmp_path / "out.partial" / ".lock")
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        prepare(audio / "one", tmp_path / "out")
    held.close()
    assert prepare(audio / "one", tmp_path / "out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda meta, folder: meta.pop("teacher_mean"),
        lambda meta, folder: meta.update(mel_std=0.0),
        lambda meta, folder: meta.update(mel_mean="loud"),
        lambda meta, folder: meta.update(dim=7),
        lambda meta, folder: meta.update(held_out=10**6),
        lambda meta, folder: meta.update(units=3),
        lambda meta, folder: meta.update(format=2),
        lambda meta, folder: meta.update(codebooks=[1]),
        lambda meta, folder: meta.update(name="../elsewhere"),
        lambda meta, folder: meta.update(hours="many"),
        lambda meta, folder: meta["teacher_mean"].__setitem__(0, math.nan),
        lambda meta, folder: np.save(folder / "mel.npy", np.zeros((3, 15, 100), "<f2")),
        lambda meta, folder: np.save(folder / "tokens.npy", np.load(folder / "tokens.npy") + 99),
        lambda meta, folder: np.save(folder / "utterances.npy", np.array([[0, 10**6]] * 14)),
        lambda meta, folder: np.save(folder / "units.npy", np.zeros((8, 3), "<f8")),
        lambda meta, folder: (folder / "teacher.npy").write_text("hello"),
    ],
)
def test_damaged_prepared_folders_are_refused(folders, tmp_path, damage):
    folder = Path(shutil.copytree(folders[1][0], tmp_path / "copy"))
    meta = json.loads((folder / "meta.json").read_text())
    damage(meta, folder)
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="not a whole prepared folder"):
        BlockDataset(folder)


def test_long_files_are_cut_and_stay_in_step(tmp_path):
    for i in range(3):
        tone(tmp_path / "in" / f"{i}.wav", 60, 16_000, seed=i)
    data = BlockDataset(prepare(tmp_path / "in", tmp_path / "out"))
    assert data.blocks.max() == agrepa.WINDOW and len(data.blocks) == 9
    assert data.blocks.sum() == 3 * 375
    _, second = agrepa.read_audio(tmp_path / "in" / "0.wav", agrepa.WINDOW, 5)
    whole = agrepa.read_audio(tmp_path / "in" / "0.wav")[1][agrepa.WINDOW * 3840 :][: 5 * 3840]
    assert np.corrcoef(whole[100:-100], second[100:-100])[0, 1] > 0.999


def test_toy_corpus_is_the_same_each_time(tmp_path):
    assert {p.name for p in data_prep.toy(tmp_path / "a").iterdir()} == {"toy-speech", "toy-sounds"}
    for make in (data_prep.speak, data_prep.strike):
        extra = (120, 1.0) if make is data_prep.speak else ()
        one, two = (make(np.random.default_rng(3), *extra, 2.0) for _ in range(2))
        assert np.array_equal(one, two) and np.isfinite(one).all() and np.abs(one).max() > 0.1
    files = sorted((tmp_path / "a").rglob("*.wav"))
    assert len(files) == 232
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine exists already"):
        data_prep.toy(tmp_path / "mine")
    assert 0.68 < np.abs(soundfile.read(files[0])[0]).max() < 0.71


# ---- the training loop ---------------------------------------------------------------------------


def setting(folders, codebooks=1, **settings):
    config = tiny(codebooks=codebooks, data=folders[codebooks], **settings)
    data = datasets(folders, codebooks)
    torch.manual_seed(0)
    model = awake(agrepa.build_model(config, [d.meta for d in data]))
    return config, data, model, nn.ModuleList(BiTC(config.dim, d.dim) for d in data)


def train(config, out, state=None):
    return agrepa.train(dataclasses.replace(config, out=str(out)), state)


def table(path):
    with open(path) as f:
        return list(csv.DictReader(f))


def tensors(x, at=""):
    """Every tensor in nested dicts and lists, with where it stands."""
    if torch.is_tensor(x):
        yield at, x
    elif isinstance(x, (dict, list)):
        for k, y in x.items() if isinstance(x, dict) else enumerate(x):
            yield from tensors(y, f"{at}/{k}")


def moved(module):
    return [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]


def test_gradient_of_the_alignment_reaches_what_eq_12_says(folders):
    config, data, model, bitc = setting(folders)
    lam = [{2: 1.0}, {3: 0.6, 1: 0.4}]
    pairs = zip(lam, data, strict=True)
    heads = nn.ModuleList(AlignmentHeads(x, config.dim, d.dim) for x, d in pairs)
    batch = agrepa.training_batch(data, dataclasses.replace(config, batch_size=8), 2)
    losses(model, bitc, heads, lam, batch, config)[2].backward()
    assert all(moved(heads)) and all(all(moved(model.layers[k])) for k in (0, 1, 2))
    for part in (model.tokens, model.x_in, model.cond_in):
        assert part.weight.grad.any()
    assert not any(moved(model.layers[3])) and not any(moved(model.v_out)) and not any(moved(bitc))
    model.zero_grad()
    losses(model, bitc, heads, [lam[0], {}], batch, config)[2].backward()
    assert all(moved(model.layers[1])) and not any(moved(model.layers[2]))


def test_bitc_trains_the_tokens_and_skips_the_dropped(folders):
    config, data, model, bitc = setting(folders)
    batch = agrepa.training_batch(data, dataclasses.replace(config, batch_size=16), 3)
    keep, mask, expected = batch.cond.keep, batch.cond.mask, 0
    assert 0 < keep.sum() < len(keep)
    assert torch.allclose(batch.kept.view(2, -1).sum(1), torch.ones(2))
    _, bit, _ = losses(model, bitc, [], [], batch, config)
    for d, own in enumerate((slice(0, 8), slice(8, 16))):
        T_x = agrepa.pool(batch.teacher[d], mask[own])
        s = bitc[d](model.embed(batch.cond)[own], T_x, agrepa.spread(mask[own], 48))
        expected = expected + (1 - s[keep[own]]).mean()
    assert torch.allclose(bit, expected, atol=1e-6)
    bit.backward()
    assert model.tokens.weight.grad.any()
    assert model.null.grad is None or not model.null.grad.any()


def test_probing_does_not_change_the_training_trajectory(folders, tmp_path):
    config = tiny(data=folders[1], dropout=0.2, select="none")
    train(config, tmp_path / "a")
    train(dataclasses.replace(config, probe_every=6), tmp_path / "b")
    a, b = (agrepa.load_checkpoint(tmp_path / x / "last.pt") for x in "ab")
    assert len(a["probes"]) == 3 and len(b["probes"]) == 1
    for (_, x), (_, y) in zip(tensors(a["model"]), tensors(b["model"]), strict=True):
        assert torch.equal(x, y)


def test_a_run_writes_its_folder(folders, tmp_path):
    found = train(tiny(data=folders[2], codebooks=2), tmp_path / "run")
    layers = json.loads((tmp_path / "run" / "layers.json").read_text())
    log, probes = table(tmp_path / "run" / "log.csv"), table(tmp_path / "run" / "probe.csv")
    names = "step phase loss fm bitc align val_fm lr frames_per_s seconds".split()
    assert list(log[0]) == names
    assert [r["step"] for r in log] == ["0", "4", "6", "8", "12"]
    assert [r["phase"] for r in log] == ["1", "1", "1", "2", "2"]
    assert log[1]["align"] == "" and float(log[-1]["align"]) > 0
    assert float(log[-1]["val_fm"]) < float(log[0]["val_fm"])
    assert list(probes[0]) == "step domain layer t foga lasp gradnorm cka".split()
    assert len(probes) == 3 * 2 * 4 * 6
    assert list(layers) == list(found) == ["one", "two"]
    for name, entry in layers.items():
        late = [r for r in probes if r["domain"] == name and r["t"] == "" and int(r["step"]) > 3]
        for k in range(1, 5):
            mine = [float(r["foga"]) for r in late if r["layer"] == str(k)]
            assert len(mine) == 2 and np.isclose(np.mean(mine), entry["foga"][k - 1], rtol=1e-4)
        lam = dict(zip(entry["layers"], entry["weights"], strict=True))
        assert lam == found[name] == select_layers(entry["foga"], 2) and len(entry["lasp"]) == 4
    ids = np.load(Path(folders[2][0]) / "tokens.npy")
    assert ids[:, ::2].max() < 8 <= ids[:, 1::2].min() and ids.max() < 16
    state = agrepa.load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["domains"][1]["centroids"].shape == (8, 39 + 100) and state["step"] == 12


def test_strategies_differ_only_from_the_selection_on(folders, tmp_path):
    logs, layers = {}, {}
    for select in ("foga", "lasp", "gradnorm", "random", "none", "4,1"):
        layers[select] = list(
            train(tiny(data=folders[1], select=select), tmp_path / select).values()
        )
        logs[select] = table(tmp_path / select / "log.csv")
        probes = (tmp_path / select / "probe.csv").read_text()
        assert probes == (tmp_path / "foga" / "probe.csv").read_text()
        for row, first in list(zip(logs[select], logs["foga"], strict=True))[:3]:
            assert (row["loss"], row["val_fm"]) == (first["loss"], first["val_fm"])
    assert layers["none"] == [{}, {}] and logs["none"][-1]["align"] == ""
    assert [sorted(lam) for lam in layers["4,1"]] == [[1, 4]] * 2
    assert [list(lam.values()) for lam in layers["lasp"]] == [[0.5, 0.5]] * 2
    assert logs["foga"][-1]["loss"] != logs["none"][-1]["loss"]


def test_named_layers_need_no_scores(folders, tmp_path):
    """Alignment from the first step on, where no layer contributes yet."""
    config = tiny(data=folders[1], select="2,4", probe_steps=1, steps=3, lr=1e-6)
    for lam in train(config, tmp_path / "run").values():
        assert lam == {2: 0.5, 4: 0.5}


def test_a_run_says_whether_its_ranking_has_settled(folders, tmp_path, capsys):
    for every, said in ((2, "of these 2 layers led at step 2, too"), (9, "one probe can't tell")):
        train(tiny(data=folders[1], probe_every=every), tmp_path / str(every))
        assert said in capsys.readouterr().out


def test_another_number_of_processes_does_not_go_on(folders, tmp_path):
    config = tiny(data=folders[1], steps=8)
    train(config, tmp_path / "run")
    state = agrepa.load_checkpoint(tmp_path / "run" / "last.pt")
    with pytest.raises(ValueError, match="was run by 2 processes, not 1"):
        train(config, tmp_path / "run", {**state, "world": state["world"] + 1})


def test_align_until_and_block_targets(folders, tmp_path):
    config, data, model, bitc = setting(folders)
    heads, lam = nn.ModuleList([AlignmentHeads([2], 32, data[0].dim)]), {2: 1.0}
    batch = agrepa.training_batch(data[:1], config, 1)
    x_t, _ = flow_path(batch.x0, batch.x1, batch.t)
    with capture(model.layers, [2]) as hidden:
        model(x_t, batch.t, batch.cond)
    clip = agrepa.pool(batch.teacher[0], batch.cond.mask)
    for pooled, target in (("clip", clip), ("block", batch.teacher[0])):
        mask = agrepa.spread(batch.cond.mask, 90)
        expected = agrepa_loss(hidden, heads[0], target, lam, mask).mean()
        found = losses(model, bitc[:1], heads, [lam], batch, tiny(align_pool=pooled))[2]
        assert torch.allclose(found, expected)
    train(tiny(data=folders[1], align_until=8, align_pool="block"), tmp_path / "run")
    aligned = [r["align"] != "" for r in table(tmp_path / "run" / "log.csv")]
    assert aligned == [False, False, False, True, False]


@pytest.mark.parametrize("stop", [4, 8])
def test_resuming_equals_the_uninterrupted_run(folders, tmp_path, monkeypatch, stop):
    config = tiny(data=folders[1], dropout=0.1, eval_every=3)
    train(config, tmp_path / "whole")
    real = agrepa.Run.save

    def save_and_stop(run):
        real(run)
        if run.step == stop:
            raise SystemError("the machine died")

    with monkeypatch.context() as m:
        m.setattr(agrepa.Run, "save", save_and_stop)
        with pytest.raises(SystemError):
            train(config, tmp_path / "cut")
    with open(tmp_path / "cut" / "log.csv", "a") as f:
        f.write("11,2,later than the checkpoint\n")
    train(config, tmp_path / "cut", agrepa.load_checkpoint(tmp_path / "cut" / "last.pt"))
    a, b = (agrepa.load_checkpoint(tmp_path / x / "last.pt") for x in ("whole", "cut"))
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert len(pairs) > 200
    assert all(x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in pairs)
    a, b = (table(tmp_path / x / "log.csv") for x in ("whole", "cut"))
    assert [list(r.values())[:8] for r in a] == [list(r.values())[:8] for r in b]
    a, b = ((tmp_path / x / "probe.csv").read_text() for x in ("whole", "cut"))
    assert a == b


def test_a_step_that_is_not_finite_changes_nothing(folders, tmp_path, monkeypatch):
    real, calls = agrepa.losses, []

    def sometimes(*args):
        calls.append(1)
        fm, bit, align = real(*args)
        return (fm * float("nan") if len(calls) > 9 else fm), bit, align

    monkeypatch.setattr(agrepa, "losses", sometimes)
    train(tiny(data=folders[1], steps=10, save_every=9, eval_every=5), tmp_path / "run")
    a, b = (agrepa.load_checkpoint(tmp_path / "run" / f"{x}.pt") for x in ("previous", "last"))
    assert (a["step"], b["step"]) == (9, 10)
    for part in ("model", "heads", "optimiser"):
        for (_, x), (_, y) in zip(tensors(a[part]), tensors(b[part]), strict=True):
            assert torch.equal(x, y)
    calls.extend([1] * 9)
    with pytest.raises(ValueError, match="look into the data"):  # the loss is as good as ever
        train(tiny(data=folders[1], steps=10), tmp_path / "other")
    monkeypatch.setattr(agrepa, "flow_matching_loss", lambda v, *_: 0 * v.mean((1, 2)) + 1e9)
    with pytest.raises(ValueError, match="lower --lr"):  # the loss had grown before
        train(tiny(data=folders[1], steps=10), tmp_path / "steep")


def test_heads_do_not_shrink_the_step_of_the_model(folders):
    """A huge gradient in the heads leaves the model's update as it was."""
    config, found = tiny(data=folders[1], seed=1), []
    for scale in (1, 1e6):
        run = agrepa.Run(config, datasets(folders), torch.device("cpu"))
        run.layers = [{2: 1.0}, {3: 1.0}]
        run.add_heads()
        for module, g in ((run.model, 0.1), (run.bitc, 0.1), (run.heads, 0.1 * scale)):
            for p in module.parameters():
                p.grad = torch.full_like(p, g)
        one = torch.tensor(1.0)
        run.update(one, one, one, one)
        found.append(run.optimiser.state[run.model.null]["exp_avg"].clone())
    assert torch.equal(*found)


def test_the_moving_average_keeps_no_graph(folders, tmp_path, monkeypatch):
    """Each step of a graph kept is memory for the rest of the run."""
    seen = []
    real = agrepa.update_ema

    def watch(ema, model, step):
        real(ema, model, step)
        seen.extend(p.grad_fn for p in ema.parameters())

    monkeypatch.setattr(agrepa, "update_ema", watch)
    train(tiny(data=folders[1], steps=8), tmp_path / "run")
    assert len(seen) > 100 and not any(seen)


def test_sigterm_saves_the_step_and_says_how_to_go_on(folders, tmp_path, monkeypatch):
    real, config = agrepa.losses, tiny(data=folders[1], save_every=100)

    def stopped(*args):
        steps.append(1)
        if len(steps) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    steps, before = [], signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(agrepa, "losses", stopped)
        with pytest.raises(
            KeyboardInterrupt, match="step 9; python agrepa.py --out .*run --resume"
        ):
            train(config, tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == before
    assert agrepa.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 9
    train(config, tmp_path / "whole")
    train(config, tmp_path / "run", agrepa.load_checkpoint(tmp_path / "run" / "last.pt"))
    a, b = (agrepa.load_checkpoint(tmp_path / x / "last.pt") for x in ("whole", "run"))
    for (_, x), (_, y) in zip(tensors(a["model"]), tensors(b["model"]), strict=True):
        assert torch.equal(x, y)


# ---- the command line ----------------------------------------------------------------------------


def cli(*args, processes=1, program=HERE / "agrepa.py", **how):
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        head += ["--master_port=29517"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*head, str(program), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, **how)


def flags(config):
    """A configuration as a command line."""
    found = []
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if value != f.default and f.name != "out":
            found += [name, *map(str, value if f.name == "data" else [value])]
    return found


def refused(capsys, *argv, program=agrepa):
    """What the program says as it leaves with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        agrepa.guarded(program.dispatch, program.parse([str(x) for x in argv]))
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "Traceback" not in said
    return said.splitlines()[-1]


def call(capsys, *argv):
    agrepa.dispatch(agrepa.parse([str(x) for x in argv]))
    return capsys.readouterr().out


@pytest.fixture(scope="session")
def finished(folders, tmp_path_factory):
    """A run to its end, through the command line."""
    out = tmp_path_factory.mktemp("finished") / "run"
    config = tiny(data=folders[2], codebooks=2, seconds=1.28)
    agrepa.dispatch(agrepa.parse([*flags(config), "--out", str(out)]))
    return out


def test_two_processes_are_one_with_twice_the_batch(folders, tmp_path):
    config = tiny(data=folders[1], steps=8)
    twice = dataclasses.replace(config, batch_size=8)
    one = cli(*flags(twice), "--out", "one", cwd=tmp_path)
    two = cli(*flags(config), "--out", "two", processes=2, cwd=tmp_path)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = (json.loads((tmp_path / x / "layers.json").read_text()) for x in ("one", "two"))
    assert [e["layers"] for e in a.values()] == [e["layers"] for e in b.values()]
    a, b = (table(tmp_path / x / "log.csv") for x in ("one", "two"))
    vals = [[float(r["val_fm"]) for r in log] for log in (a, b)]
    assert np.allclose(*vals, rtol=1e-4)
    a, b = (agrepa.load_checkpoint(tmp_path / x / "last.pt") for x in ("one", "two"))
    for part in ("model", "bitc", "heads", "ema"):
        x, y = (torch.cat([z.flatten() for _, z in tensors(s[part])]) for s in (a, b))
        assert (x - y).norm() < 0.01 * x.norm(), part
    names = [{p.name for p in (tmp_path / x).iterdir()} for x in ("one", "two")]
    assert names[0] == names[1]  # to the end: sound and pictures
    raw = cli("--data", tmp_path, "--out", "three", processes=2, cwd=tmp_path)
    assert raw.returncode != 0 and "python data_prep.py" in raw.stderr
    assert 'agrepa.py", line' not in raw.stderr


def test_agrepa_py_alone_trains_samples_and_evaluates(tmp_path):
    plenty(tmp_path / "audio")
    alone = tmp_path / "alone"
    alone.mkdir()
    prepare(tmp_path / "audio", alone / "data")
    shutil.copy(HERE / "agrepa.py", alone)
    program = alone / "agrepa.py"
    config = tiny(data=("data",), seconds=3.2)
    done = cli(*flags(config), "--out", "run", program=program, cwd=alone)
    assert done.returncode == 0 and "pictures" in done.stdout, done.stderr
    sound = tmp_path / "audio" / "train" / "0.wav"
    argv = "--sample", "run/last.pt", "--input", sound, "--output", "a.wav", "--nfe", 2
    assert cli(*argv, program=program, cwd=alone).returncode == 0 and (alone / "a.wav").exists()
    done = cli("--evaluate", "run/last.pt", "--nfe", 2, program=program, cwd=alone)
    assert done.returncode == 0 and "unit_error" in done.stdout, done.stderr
    missing = cli("--data", tmp_path / "audio", program=program, cwd=alone)
    assert missing.returncode == 2 and "data_prep.py is missing" in missing.stderr


def test_raw_audio_is_prepared_once_and_found_again(tmp_path, audio):
    folder = shutil.copytree(audio / "one", tmp_path / "a, b\udce9")  # no UTF-8, and a comma
    config = tiny(data=(str(folder),))
    for run in ("x", "y"):
        done = cli(*flags(config), "--out", run, cwd=tmp_path, errors="surrogateescape")
        assert done.returncode == 0, done.stderr
        assert ("preparing" in done.stderr) == (run == "x")
    row = table(tmp_path / "x" / "probe.csv")[0]
    assert row["domain"].startswith("a, b") and row["layer"] == "1"


def test_bad_input_is_met_at_the_door(folders, audio, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agrepa, "train", lambda *_: pytest.fail("it trains"))
    here = folders[1][0]
    for argv, word in (
        (("--top-k", 20), "--top-k 20 but the model has 12 layers"),
        (("--dim", 100), "--heads"),
        (("--select", "4,40"), "from 1 to 12"),
        (("--select", "4,4"), "different layers"),
        (("--select", "4,04"), "different layers"),
        (("--select", "best"), "best is not foga"),
        (("--seconds", 0.01), "--seconds 0.01 must be from 0.16"),
        (("--seconds", "inf"), "--seconds inf"),
        (("--seconds", "1e9"), "to 25.6"),
        (("--batch-size", 0), "above 0"),
        (("--probe-steps", 100, "--steps", 50), "more than phase I"),
        (("--teacher", "WHISPER"), "prepared with MFCC"),
        (("--device", "abacus"), "--device abacus"),
        (("--device", "meta"), "--device meta"),
        (("--nfe", 3), "--nfe does not go with training"),
        (("--lr", "nan"), "--lr nan"),
        (("--dropout", 1), "below 1"),
        (("--align-weight", -1), "0 or more"),
        (("--seed", -1), "--seed -1"),
        (("--seed", 2**32), "below 2^32"),
        (("--layers", 1, "--top-k", 1), "2 or more"),
        (("--align-until", 9, "--probe-steps", 9), "within phase I"),
        (("--units", 70_000), "at most 65536"),
    ):
        assert word in refused(capsys, "--data", here, *argv), argv
    for mode, flag in (("--evaluate", "--vocoder"), ("--sample", "--data"), ("--figures", "--nfe")):
        said = refused(capsys, mode, "x", flag, {"--vocoder": "vocos"}.get(flag, 1))
        assert f"{flag} does not go with {mode}" in said
    said = refused(capsys, "--data", here, here, here, "--batch-size", 16)
    assert "multiple of the 3 domains" in said
    said = refused(capsys, "--data", here, folders[2][1], "--out", "mixed")
    assert "differ in their codebooks" in said
    assert not list(tmp_path.glob("runs/*"))


def test_bad_audio_folders_are_met_in_words(audio, tmp_path, capsys):
    def say(*argv):
        return refused(capsys, *argv, "--cache", tmp_path / "cache", program=data_prep)

    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "song.wav").write_text("la la la")
    assert "no such folder" in say(tmp_path / "nowhere")
    assert "no usable audio" in say(tmp_path / "empty", "--teacher", "MFCC")
    assert "song.wav" in say(tmp_path / "text", "--teacher", "MFCC")
    assert "not MFCC" in say(audio / "two", "--teacher", "WHISPER")
    assert "which folder" in say()
    inside = refused(
        capsys, audio / "two", "--teacher", "MFCC", "--out", audio / "two" / "x", program=data_prep
    )
    assert "inside the audio folder" in inside
    small = say(audio / "two", "--teacher", "MFCC", "--units", 5000)
    assert "take at most" in small


def test_runs_are_neither_overwritten_nor_shared(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny(data=[f"{folders[1][0]}/"], steps=8, teacher="HUBERT_BASE", units=1024)
    call(capsys, *flags(config), "--out", "run")  # both defaults: the folder says how it is
    stored = json.loads(Path("run/config.json").read_text())
    assert (stored["teacher"], stored["units"]) == ("MFCC", 8)
    assert stored["data"] == folders[1][:1]  # without the slash
    before = {p: p.read_bytes() for p in Path("run").iterdir()}

    def say(*argv):
        return refused(capsys, *argv)

    assert "not empty" in say(*flags(config), "--out", "run")
    assert "--dim 32, not 64" in say("--out", "run", "--resume", "--dim", 64)
    assert "--data" in say("--out", "run", "--resume", "--data", folders[1][1])
    assert "no run's settings in --out nowhere" in say("--resume", "--out", "nowhere")
    with monkeypatch.context() as inside:
        inside.chdir("run")
        assert "--out" in say("--resume")  # not the run that happens to lie here
    held = agrepa.lock(Path("run") / ".lock")
    assert f"in use by process {os.getpid()}" in say("--out", "run", "--resume")
    held.close()
    before.pop(Path("run/.lock"))
    assert all(p.read_bytes() == content for p, content in before.items())
    first, second = (agrepa.new_folder(Config(), ["x"]) for _ in range(2))
    assert first != second and Path(first).is_dir() and Path(second).is_dir()


def test_a_folder_prepared_anew_is_not_taken_for_the_old(folders, tmp_path, capsys):
    folder, out = shutil.copytree(folders[1][0], tmp_path / "in"), tmp_path / "run"
    train(tiny(data=[str(folder)], steps=8), out)
    meta = json.loads((folder / "meta.json").read_text())
    meta["teacher_mean"][0] += 1
    (folder / "meta.json").write_text(json.dumps(meta))
    for argv in (("--out", out, "--resume"), ("--evaluate", out / "last.pt")):
        assert "prepared anew" in refused(capsys, *argv)


def test_a_damaged_checkpoint_is_never_used(folders, tmp_path, capsys):
    config = tiny(data=folders[1][:1])
    out = tmp_path / "run"
    call(capsys, *flags(config), "--out", out)
    whole = (out / "last.pt").read_bytes()
    start = whole.index(b"model") + len(whole) // 2
    flipped = whole[:start] + bytes([whole[start] ^ 4]) + whole[start + 1 :]
    for damaged in (whole[:5000], b"", b"words", flipped):
        (out / "last.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="last.pt: not a whole checkpoint"):
            agrepa.load_checkpoint(out / "last.pt")
        config, _, state = agrepa.resumed({"out": str(out), "resume": True})
        assert state["step"] == 8 and "previous.pt, step 8" in capsys.readouterr().out
    (out / "previous.pt").write_bytes(b"")
    assert "no whole checkpoint is left" in refused(capsys, "--out", out, "--resume")
    for name in ("last.pt", "previous.pt"):
        (out / name).unlink()
    tables = (out / "log.csv").read_text()  # it does not begin anew over these
    assert "no whole checkpoint is left" in refused(capsys, "--out", out, "--resume")
    assert (out / "log.csv").read_text() == tables
    for damage, why in (
        ({"names": None}, "parts are missing"),
        ({"config": {"lr": "high"}}, "--lr high is no float"),
        ({"domains": [{**state["domains"][0], "units": 3}]}, "don't fit"),
        ({"domains": [{**state["domains"][0], "mel_std": "loud"}]}, "not a whole checkpoint"),
    ):
        odd = {k: v for k, v in {**state, **damage}.items() if v is not None}
        torch.save(odd, tmp_path / "odd.pt")
        assert why in refused(capsys, "--evaluate", tmp_path / "odd.pt"), why
    (out / "last.pt").write_bytes(whole)
    stored = (out / "config.json").read_text()
    (out / "config.json").write_text(stored.replace('"select": "foga"', '"select": 5'))
    assert "--select 5 is no str" in refused(capsys, "--out", out, "--resume")
    assert "--select 5" in refused(capsys, "--figures", out)
    (out / "config.json").write_text("{}")
    assert "--dim 512, not 64" in refused(capsys, "--out", out, "--resume", "--dim", 64)
    (out / "config.json").write_text(stored)
    (out / "layers.json").write_text('{"x": {}}')
    assert "parts are missing" in refused(capsys, "--figures", out)


# ---- sound, metrics, figures ---------------------------------------------------------------------


class Straight(nn.Module):
    """A velocity that goes straight to a known mel: each frame's value is its token's id. Without
    tokens it stays where it is."""

    def forward(self, x, t, cond):
        mel = cond.tokens[:, None].float()
        mel = nn.functional.interpolate(mel, x.shape[1], mode="nearest")[:, 0, :, None]
        return torch.where(cond.keep[:, None, None], mel - x, 0) / (1 - t.view(-1, 1, 1))


def tokens_only(ids):
    return Condition(
        ids,
        torch.zeros(len(ids), ids.shape[1] // 8 * 15, N_MELS),
        torch.zeros(len(ids), dtype=torch.long),
        torch.ones(len(ids), dtype=torch.bool),
    )


@pytest.mark.parametrize("guidance", [1, 3])
@pytest.mark.parametrize("sway", [0, -1])
def test_sampling_along_a_straight_line(guidance, sway):
    """With guidance w, v_u + w (v_c - v_u) is w v_c here; following it ends where the formula says."""
    ids, x0 = torch.randint(1, 9, (2, 8)), torch.randn(2, 15, N_MELS)
    x1 = sample(Straight(), tokens_only(ids), x0, nfe=7, guidance=guidance, sway=sway)
    target = nn.functional.interpolate(ids[:, None].float(), 15, mode="nearest")[:, 0, :, None]
    if guidance == 1:
        assert torch.allclose(x1, target.expand_as(x1), atol=1e-4)
    t, x = torch.linspace(0, 1, 8), x0
    t = t + sway * (torch.cos(math.pi / 2 * t) - 1 + t)
    for a, b in itertools.pairwise(t):
        x = x + (b - a) * guidance * (target - x) / (1 - a)
    assert torch.allclose(x1, x, atol=1e-3)


class Listener:
    """What resynthesise needs of a Voice."""

    def __init__(self, model):
        self.model, self.d, self.r, self.config = model, 0, 8, tiny(seconds=9 * 0.16)
        self.autocast = contextlib.nullcontext


@pytest.mark.parametrize("blocks", [1, 7, 8, 61])
def test_long_sounds_have_no_seam(blocks):
    ids, prompt = torch.arange(blocks * 8), torch.full((2 * 15, N_MELS), 5.0)
    heard = torch.zeros(16, dtype=torch.long)
    mel = resynthesise(Listener(Straight()), ids, prompt, heard, guidance=1, nfe=4)
    expected = nn.functional.interpolate(ids[None, None].float(), blocks * 15, mode="nearest")[0, 0]
    assert mel.shape == (blocks * 15, N_MELS) and torch.allclose(mel[:, 3], expected, atol=1e-2)


def test_windows_fade_into_each_other_and_few_are_sampled_at_once():
    class Own(nn.Module):  # every window wants to go elsewhere
        def forward(self, x, t, cond):
            sizes.append(len(x))
            return torch.arange(len(x)).view(-1, 1, 1).expand_as(x) - x

    sizes, ids = [], torch.zeros(60 * 8, dtype=torch.long)
    prompt, heard = torch.zeros(30, N_MELS), torch.zeros(16, dtype=torch.long)
    mel = resynthesise(Listener(Own()), ids, prompt, heard, guidance=1, nfe=20)
    assert max(sizes) == 4
    level = mel.mean(1)
    assert level.max() - level.min() > 1.5  # windows differ by as much
    assert level.diff().abs().max() < 0.35  # and no frame jumps


def test_mel_to_wave_to_mel():
    speech = data_prep.speak(np.random.default_rng(0), 120, 1.0, 3.0)
    wave = torch.from_numpy(speech[: 18 * 3840]).float()[None]
    mel = log_mel(0.3 * wave / wave.abs().max())
    back = mel_to_wave(mel)
    torch.rand(1)
    assert back.shape == (1, 18 * 3840) and torch.equal(back, mel_to_wave(mel))
    again = log_mel(back)
    assert (again - mel)[mel > -7].abs().mean() < 0.35
    lag = [(again[:, 5 + k : -5 + k or None] - mel[:, 5:-5]).abs().mean() for k in range(-2, 3)]
    assert min(lag) == lag[2]  # not a frame late or early


def test_a_run_ends_with_sound_and_pictures(finished):
    from matplotlib.image import imread

    for name in ("one", "two"):
        lengths = []
        for kind in ("sample", "target"):
            wave, rate = soundfile.read(finished / f"{kind}-{name}.wav")
            assert rate == 24_000 and len(wave) % 3840 == 0 and np.isfinite(wave).all()
            assert 0 < np.abs(wave).max() <= 1 and np.mean(np.abs(wave) > 0.99) < 0.01
            lengths.append(len(wave))
        assert lengths[0] == lengths[1]
    for name in ("dissociation", "loss", "mel"):
        image = imread(finished / f"{name}.png")
        assert image.shape[0] > 150 and 600 <= image.shape[1] <= 1000, name
        assert image[..., :3].std() > 0.05, name
    assert not [p for p in finished.iterdir() if p.suffix == ".part"]


def test_the_prompt_stands_in_neither_sound(folders):
    """What is compared with the generated sound is the clip after its prompt."""
    data, voice = BlockDataset(folders[1][0]), Listener(Straight())
    voice.device = "cpu"
    clip = data.clip(0, 0, 6)
    made, real, tokens = agrepa.continued(voice, clip)
    assert len(made) == len(real) == 5 * 15 and len(tokens) == 5 * 8
    assert np.array_equal(real, clip["x1"][15:]) and np.array_equal(tokens, clip["tokens"][8:])
    short = data.clip(0, 0, 3)  # too short for a prompt: all of it is generated
    assert len(agrepa.continued(voice, short)[0]) == 3 * 15


def test_sampling_from_the_command_line(finished, audio, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quiet, start = tone(tmp_path / "low.wav", 1.8, 8_000), ("--sample", finished / "last.pt")
    said = call(capsys, *start, "--input", quiet, "--output", "a.wav", "--nfe", 2)
    assert "1.76 s" in said and len(soundfile.read("a.wav")[0]) == 11 * 3840
    prompt = next((audio / "one").rglob("*.flac"))
    for out, extra in (
        ("b.wav", ()),
        ("c.wav", ("--prompt", prompt)),
        ("d.wav", ("--domain", "two")),
    ):
        call(capsys, *start, "--input", quiet, "--output", out, "--nfe", 2, *extra)
    sounds = [Path(f"{x}.wav").read_bytes() for x in "abcd"]
    assert sounds[0] == sounds[1] and len(set(sounds)) == 3
    soundfile.write("silent.wav", np.zeros(24_000), 24_000)
    Path("text.wav").write_text("words")
    assert "exists already" in refused(capsys, *start, "--input", quiet, "--output", "a.wav")
    assert "must end in .wav" in refused(capsys, *start, "--input", quiet, "--output", "a.flac")
    for argv, word in (
        (("--input", "silent.wav"), "silent"),
        (("--input", "text.wav"), "text.wav"),
        (("--input", "no.wav"), "no.wav"),
        (("--input", quiet, "--domain", "three"), "one, two"),
        (("--input", quiet, "--vocoder", "vocos"), "vocos"),
        (("--input", quiet, "--nfe", 0), "--nfe 0"),
        (("--input", quiet, "--guidance", "nan"), "--guidance nan"),
        (("--input", quiet, "--sway", 2), "--sway 2.0 must be from -1 to 1.75"),
    ):
        assert word in refused(capsys, *start, *argv, "--output", "f.wav"), argv
    Path("f.wav.part").write_text("mine")
    assert "exists already" in refused(capsys, *start, "--input", quiet, "--output", "f.wav")
    said = refused(capsys, *start, "--input", quiet, "--output", "no/such/place.wav")
    assert "no/such/place" in said and not Path("f.wav").exists()


def test_figures_and_comparison(finished, tmp_path, monkeypatch, capsys):
    (finished / "loss.png").unlink()
    assert "loss.png" in call(capsys, "--figures", finished)
    assert (finished / "loss.png").exists()
    other = shutil.copytree(finished, tmp_path / "other")
    said = call(capsys, "--figures", finished, other, finished)
    assert str(other) in said and "2 x \n  held-out loss" in said and " +- 0  (2)" in said
    how = {"step": 12, "seed": 0, "nfe": 32, "guidance": 2.0, "sway": -1.0}
    for folder, row in ((other, how), (finished, {**how, "guidance": 3.0})):
        (folder / "metrics.json").write_text(json.dumps({"one": {**row, "frechet": 7}}))
    said = call(capsys, "--figures", finished, other)
    assert "2 x" in said and re.search(r"one frechet +7  \(1\)", said)
    assert re.search(r"one frechet --guidance 2.0 +7  \(1\)", said)
    (other / "metrics.json").write_text(json.dumps({"one": {**how, "step": 8}}))
    assert "--evaluate" in refused(capsys, "--figures", finished, other)
    lines = (other / "log.csv").read_text().splitlines()
    (other / "log.csv").write_text("\n".join(lines[:-1]))
    assert f"{other}: not finished" in refused(capsys, "--figures", finished, other)
    (finished / "metrics.json").unlink()
    assert "not the folder of a run" in refused(capsys, "--figures", tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(capsys, "--figures", finished)


@pytest.fixture(scope="session")
def listened(tmp_path_factory):
    """A run on enough held-out audio to measure it, of utterances of 2 to 8 s."""
    root = tmp_path_factory.mktemp("listened")
    plenty(root / "in")
    config = tiny(codebooks=2, seconds=3.2, steps=4, probe_steps=2)
    config.data = [prepare(root / "in", root / "data", config)]
    train(config, root / "run")
    return root / "run"


def test_evaluate_repeats_itself(listened, hasty_vocoder, tmp_path):
    copied = shutil.copy(listened / "last.pt", tmp_path)
    first, again = (agrepa.evaluate(x, {"nfe": 2})["in"] for x in (listened / "last.pt", copied))
    assert not (tmp_path / "metrics.json").exists()  # no run's folder
    first.pop("real_time_factor"), again.pop("real_time_factor")
    assert first == again and first["rows"] > 200
    assert first["frechet"] > first["frechet_other_real"] > 0
    assert 0 < first["unit_error_recording"] < first["unit_error"] <= 1
    assert json.loads((listened / "metrics.json").read_text())["in"]["rows"] == first["rows"]


def test_evaluate_scores_real_audio_as_real(listened, hasty_vocoder, monkeypatch):
    """A perfect generator: no distance at all, and the recording's own unit error."""
    real_continued = agrepa.continued

    def perfect(voice, clip, **how):
        _, real, tokens = real_continued(voice, clip, **how)
        return real, real, tokens

    monkeypatch.setattr(agrepa, "continued", perfect)
    real = agrepa.evaluate(listened / "last.pt", {"nfe": 1})["in"]
    assert abs(real["frechet"]) < 1e-6 and abs(real["mel_frechet"]) < 1e-6
    assert real["unit_error"] == real["unit_error_recording"]


def test_evaluate_counts_no_block_twice(listened):
    voice = agrepa.Voice(agrepa.load_checkpoint(listened / "last.pt"), 0, {})
    data, seen = BlockDataset(voice.config.data[0]), []
    for part in (0, 1):
        for clip in agrepa.held_out_clips(data, 8, part, 10**9):
            seen += [row.tobytes() for row in clip["x1"].reshape(clip["real"], -1)]
    held = data.blocks[data.train :].sum()
    assert len(seen) == len(set(seen)) == held


def test_too_little_held_out_audio_is_said(finished, hasty_vocoder, capsys):
    said = refused(capsys, "--evaluate", finished / "last.pt", "--nfe", 1)
    assert "give no covariance of 200 values; hold out more" in said


def test_frechet_distance_of_known_gaussians():
    a = np.random.default_rng(0).standard_normal((200_000, 2)) * [1, 2]
    assert abs(agrepa.frechet(a, a)) < 1e-8
    assert abs(agrepa.frechet(a, a * 3 + [3, 4]) - (25 + 4 + 16)) < 0.3


def test_code_in_a_stored_configuration_is_not_run(tmp_path, hasty_vocoder, capsys):
    teacher, ran = tmp_path / "mine.py", tmp_path / "mine.py.ran"
    teacher.write_text(
        "import torch\n"
        "open(__file__ + '.ran', 'a').write('x')\n"
        "def load():\n"
        "    return lambda x: x.unfold(1, 320, 320)[..., ::80]\n"
    )
    spec = f"{teacher}:load"
    plenty(tmp_path / "in")
    config = tiny(teacher=spec, steps=4, probe_steps=2, seconds=3.2)
    config.data = [prepare(tmp_path / "in", tmp_path / "data", config)]
    train(config, tmp_path / "run")
    before = ran.read_text()
    checkpoint = tmp_path / "run" / "last.pt"
    assert f"--teacher {spec}" in refused(capsys, "--evaluate", checkpoint)
    assert ran.read_text() == before
    argv = "--evaluate", checkpoint, "--teacher", spec, "--nfe", 1
    agrepa.dispatch(agrepa.parse([str(x) for x in argv]))
    assert ran.read_text() != before and "has changed" not in capsys.readouterr().err
    teacher.write_text(teacher.read_text() + "# another version")
    agrepa.dispatch(agrepa.parse([str(x) for x in argv]))
    assert capsys.readouterr().err.count(f"{spec} has changed since it taught") == 1


def readme_code():
    text = (HERE / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_readme_recipes_run_as_they_stand():
    recipes = [code for code in readme_code() if "whisper" not in code]
    assert len(recipes) == 3
    for recipe in recipes:
        assert len([line for line in recipe.splitlines() if line.strip()]) <= 15
        if "f5_tts" not in recipe:
            torch.manual_seed(0)
            own = {}
            exec(recipe, own)
            assert own["hidden"].keys() == own["layers"].keys() and torch.isfinite(own["loss"])
            assert np.isclose(sum(own["layers"].values()), 1)


def test_readme_whisper_teacher_takes_positions_off(tmp_path, monkeypatch):
    class Encoder(nn.Module):
        positions = torch.randn(1500, 4)

        def forward(self, mel):
            assert mel.shape[1:] == (80, 3000)
            return mel.mean(1)[:, ::2, None] + self.positions

    whisper = types.ModuleType("whisper")  # the package's own shapes
    whisper.pad_or_trim = lambda wave: F.pad(wave, (0, 480_000 - len(wave)))
    whisper.log_mel_spectrogram = lambda wave: wave.view(3000, 160).mean(1).expand(80, -1)
    whisper.load_model = lambda name, device: types.SimpleNamespace(encoder=Encoder())
    monkeypatch.setitem(sys.modules, "whisper", whisper)
    (code,) = [code for code in readme_code() if "whisper" in code]
    (tmp_path / "whisper_teacher.py").write_text(code)
    teacher = Teacher(f"{tmp_path}/whisper_teacher.py:load")
    assert teacher.dim == 4
    heard = teacher(torch.ones(2, 3 * 2560))
    assert heard.shape == (2, 24, 4)
    assert_close(heard, heard[:, :1].expand_as(heard))  # one steady sound, alike at every place


# ---- speed and endurance, off by default ---------------------------------------------------------
# python -m pytest -m bench -s prints ratios; python -m pytest -m slow breaks things many times.


def asked_for(mark):
    """A marker for tests that run only where the command line asks for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no settings file to register it in
        marker = getattr(pytest.mark, mark)
    skip = pytest.mark.skipif(mark not in sys.argv, reason=f"python -m pytest -m {mark}")

    def decorate(test):
        return marker(skip(test))

    return decorate


def in_turn(rounds, **calls):
    """Median seconds of each call, taken in turn so that a drifting machine drifts for all."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: float(np.median(t[1:])) for name, t in times.items()}


class Step:
    """A training step on random blocks."""

    def __init__(self, layers, dim, heads, batch=8, seconds=4.8):
        torch.manual_seed(0)
        self.config = Config(layers=layers, dim=dim, heads=heads, batch_size=batch, seconds=seconds)
        n = self.config.blocks
        self.model = awake(agrepa.VelocityModel(layers, dim, heads))
        self.bitc, self.lam = nn.ModuleList([BiTC(dim, 768)]), [{1: 0.5, 5: 0.3, 3: 0.2}]
        self.heads = nn.ModuleList([AlignmentHeads(self.lam[0], dim, 768)])
        parts = (self.model, self.bitc, self.heads)
        groups = [group for part in parts for group in agrepa.parameter_groups(part)]
        self.optimiser = torch.optim.AdamW(groups, lr=1e-5, fused=True)
        self.batch = agrepa.Batch(
            torch.randn(batch, n * 15, N_MELS),
            torch.randn(batch, n * 15, N_MELS),
            torch.rand(batch),
            tokens_only(torch.randint(0, 1024, (batch, n * 8))),
            [torch.randn(batch, n, 768)],
            torch.full((batch,), 1 / batch),
            None,
        )

    def __call__(self, low=False, align=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            heads = self.heads if align else []
            terms = losses(self.model, self.bitc, heads, self.lam, self.batch, self.config)
        sum(terms).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


@asked_for("bench")
@pytest.mark.parametrize("size", [(8, 256, 4), (12, 512, 8)])
def test_bench_training_step(size):
    step = Step(*size)
    t = in_turn(
        3,
        full=step,
        low=partial(step, True),
        aligned=partial(step, align=True),
    )
    print(
        f"\n{size}: a step takes {t['full']:.2f} s in float32, {t['low'] / t['full']:.2f} of it in"
    )
    print(f"bfloat16, {t['aligned'] / t['full']:.2f} of it with alignment")


@asked_for("bench")
@pytest.mark.parametrize("layers", [12, 24])
def test_bench_fog_a(layers):
    step = Step(layers, 512, 8, batch=8, seconds=2.4)
    model, b = step.model.eval(), step.batch

    @torch.no_grad()
    def passes():
        for _ in range(layers + 1):
            model(b.x0, b.t, b.cond)

    t = in_turn(2, fog=lambda: agrepa.fog_a(model, model.layers, b.x0, b.t, b.cond), passes=passes)
    print(f"\nfog_a at {layers} layers: {t['fog'] / t['passes']:.2f} of {layers + 1} passes")


@asked_for("bench")
def test_bench_probing():
    step, few = Step(12, 512, 8, batch=16), Step(12, 512, 8, batch=agrepa.PROBE_CLIPS)
    t = in_turn(1, step=step, probe=lambda: agrepa.probe(step.model, step.bitc[0], few.batch))
    share = 25 * t["probe"] / t["step"] / 100_000
    print(f"\na probe takes {t['probe'] / t['step']:.1f} steps: {share:.2%} of a default run")


@asked_for("bench")
def test_bench_loader(folders):
    step, data = Step(8, 256, 4), datasets(folders)[:1]
    config = dataclasses.replace(step.config, batch_size=8)
    t = in_turn(5, step=step, batch=lambda: agrepa.training_batch(data, config, 1))
    print(f"\nassembling a batch takes {t['batch'] / t['step']:.1%} of a step of 8 x 256")


@asked_for("bench")
def test_bench_preparation(tmp_path, monkeypatch):
    """HuBERT's size with random weights, 8 minutes of audio in files of 4 to 16 s."""
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "hub" / "checkpoints" / "hubert_fairseq_base_ls960.pth"
    torch.save(torchaudio.models.hubert_base().state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for i in range(48):
        tone(tmp_path / "in" / f"{i}.flac", 4 + i % 5 * 3, 16_000, 1, i)
    config, count = Config(units=64), itertools.count()
    listener = data_prep.Listener(tmp_path / "in", config)
    monkeypatch.setattr(data_prep, "Listener", lambda *args: listener)  # loaded already
    usable, _ = data_prep.scan(tmp_path / "in", data_prep.list_audio(tmp_path / "in")[0])
    batches = data_prep.batches_of(data_prep.plan(usable))
    waves = [torch.stack([listener.read(window)[0] for window in b]) for b in batches]

    def bare():
        for wave in waves:
            listener.features(listener.teacher, wave)

    def whole():
        data_prep.prepare(tmp_path / "in", tmp_path / f"out{next(count)}", config)

    t = in_turn(1, bare=bare, whole=whole)
    speed = sum(usable.values()) * agrepa.BLOCK / t["whole"]
    ratio = t["bare"] / t["whole"]
    print(f"\npreparation runs at {ratio:.2f} of the bare teacher's speed, {speed:.0f} x real time")


# ---- a campaign: kill, flip, fill, race ----------------------------------------------------------


def killed(command, cwd, seconds):
    """Starts a program and kills it after so many seconds -> whether it had ended by itself."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    null = subprocess.DEVNULL
    program = subprocess.Popen(command, cwd=cwd, env=env, stdout=null, stderr=null)
    try:
        program.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()
        return False


@asked_for("slow")
def test_killed_preparations_end_byte_identical(tmp_path, audio):
    command = [sys.executable, str(HERE / "data_prep.py"), str(audio / "one"), "--teacher", "MFCC"]
    command += ["--units", "8", "--out"]
    expected = arrays(prepare(audio / "one", tmp_path / "whole"))
    rng = np.random.default_rng(0)
    for i in range(20):
        while not killed([*command, f"out{i}"], tmp_path, rng.uniform(2, 6)):
            pass
        assert arrays(tmp_path / f"out{i}") == expected, i


@asked_for("slow")
def test_killed_runs_end_bit_for_bit(tmp_path, folders):
    config = tiny(data=folders[1], steps=40, probe_steps=20, save_every=2)
    command = [sys.executable, str(HERE / "agrepa.py")]
    train(config, tmp_path / "whole")
    whole = agrepa.load_checkpoint(tmp_path / "whole" / "last.pt")
    rng = np.random.default_rng(0)
    for i in range(20):
        out, start = tmp_path / f"run{i}", [*command, *flags(config), "--out", f"run{i}"]
        waits = [*rng.uniform(3, 8, 4), 300]  # a run's last sounds take longer than eight seconds
        while not killed(start, tmp_path, waits.pop(0)):
            if (out / "config.json").exists():
                start = [*command, "--out", f"run{i}", "--resume"]
            else:
                shutil.rmtree(out, ignore_errors=True)
        found = agrepa.load_checkpoint(out / "last.pt")
        for (_, x), (_, y) in zip(tensors(found["model"]), tensors(whole["model"]), strict=True):
            assert torch.equal(x, y), i


@asked_for("slow")
def test_mutated_audio_poisons_nothing(tmp_path, audio):
    rng, sources = np.random.default_rng(0), sorted((audio / "one").rglob("*.flac"))
    sources += sorted((audio / "two").glob("*.wav"))
    (tmp_path / "in").mkdir()
    for i in range(300):
        content = bytearray(sources[i % len(sources)].read_bytes())
        for _ in range(1 + i % 8):
            content[rng.integers(min(len(content), 10 ** (1 + i % 5)))] = rng.integers(256)
        name = f"{i}{sources[i % len(sources)].suffix}"
        (tmp_path / "in" / name).write_bytes(content[: rng.integers(1, 2 * len(content))])
    data = BlockDataset(prepare(tmp_path / "in", tmp_path / "out"))
    for x in (data.mel, data.teacher, data.centre):
        assert np.isfinite(x).all()
    print(f"\n{len(data.meta['skipped'])} of 300 mutated files skipped, {len(data.first)} kept")


@asked_for("slow")
def test_flipped_bits_in_a_checkpoint_are_found(tmp_path, folders):
    train(tiny(data=folders[1]), tmp_path / "run")
    content, rng = (tmp_path / "run" / "last.pt").read_bytes(), np.random.default_rng(0)
    expected = list(tensors(agrepa.load_checkpoint(tmp_path / "run" / "last.pt")))
    found = 0
    for _ in range(60):
        at, bit = rng.integers(len(content)), 1 << rng.integers(8)
        flipped = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            state = agrepa.load_checkpoint(tmp_path / "flipped.pt")
        except ValueError:
            found += 1
        else:  # between the zip's members, where nothing is stored
            pairs = zip(tensors(state), expected, strict=True)
            assert all(torch.equal(x, y) for (_, x), (_, y) in pairs)
    print(f"\n{found} of 60 flipped bits refused, the others changed nothing")


@asked_for("slow")
def test_races_end_with_one_winner(tmp_path, audio):
    prep = [sys.executable, str(HERE / "data_prep.py"), str(audio / "one"), "--teacher", "MFCC"]
    prep += ["--units", "8", "--out"]
    expected = arrays(prepare(audio / "one", tmp_path / "whole"))
    how = {"cwd": tmp_path, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    for i in range(20):
        both = [subprocess.Popen([*prep, f"out{i}"], **how) for _ in range(2)]
        said = [p.communicate()[1].decode() for p in both]
        assert sorted(p.returncode for p in both) == [0, 2], said
        assert arrays(tmp_path / f"out{i}") == expected and "Traceback" not in "".join(said)


@asked_for("slow")
def test_memory_does_not_grow(tmp_path, folders, monkeypatch):
    resident, real = {}, agrepa.Run.update

    def watch(run, *args):
        real(run, *args)
        if run.step in (200, 3000):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident[run.step] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    monkeypatch.setattr(agrepa.Run, "update", watch)
    train(tiny(data=folders[1], steps=3000, probe_steps=100, eval_every=200), tmp_path / "run")
    print(f"\n{resident[200]:.0f} MB after 200 steps, {resident[3000]:.0f} MB after 3,000")
    assert resident[3000] < 1.02 * resident[200]
