"""python -m pytest: what a user of agrepa.py relies on. No network, no checkpoint."""

import ast
import builtins
import contextlib
import copy
import csv
import dataclasses
import dis
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import weakref
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
from torch.utils.checkpoint import checkpoint

import agrepa
import data_prep
from agrepa import AlignmentHeads, BiTC, Condition, Config, PreparedFolder, VelocityModel
from agrepa import agrepa_loss, bitc_loss, capture, flow_matching_loss, flow_path, fog_a
from agrepa import interleave, lasp, log_mel, mel_to_wave, pool, sample, select_layers

HERE = Path(agrepa.__file__).parent
torch.set_num_threads(1)  # models are so small here that threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def alike():
    """The same random numbers for each test, and no handler of signals left behind."""
    torch.manual_seed(0)
    np.random.seed(0)
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


# ---- what the tests stand on ---------------------------------------------------------------------


def awake(module):
    """A model as if it had trained: parameters that start at zero drawn at random."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return module


def velocity_model():
    return awake(VelocityModel(4, 32, 2, dropout=0.3, vocab=(8, 16), n_mels=10))


def inputs():
    """x_t, t, Condition: four clips of two domains, the last without its tokens."""
    ref = torch.randn(4, 90, 10) * (torch.arange(90) < 20)[:, None]
    keep, domain = torch.arange(4) < 3, torch.tensor([0, 0, 1, 1])
    cond = Condition(torch.randint(0, 8, (4, 48)), ref, keep, domain)
    return torch.randn(4, 90, 10), torch.rand(4), cond


class Block(nn.Module):
    """h + m f(h), the gate m to be closed by the tests; `give` makes an output of it."""

    def __init__(self, give=lambda h, *others: h, dim=4):
        super().__init__()
        self.f, self.m, self.give = nn.Linear(dim, dim), 1.0, give

    def forward(self, h, *others):
        return self.give(h + self.m * self.f(h).tanh(), *others)


def three(kind=Block, *args):
    return nn.ModuleList(kind(*args) for _ in range(3))


def state():
    return torch.randn(2, 5, 4)


def chain(blocks, step=lambda block, h: block(h)):
    def velocity(h):
        for block in blocks:
            h = step(block, h)
        return h

    return velocity


@torch.no_grad()
def truth(velocity, blocks, *args):
    """The scores, from gates inside the blocks."""
    scores, v = [], velocity(*args)
    for block in blocks:
        block.m = 0.0
        v_k = velocity(*args)
        block.m = 1.0
        scores.append((v_k - v).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1))
    assert torch.stack(scores).min() > 1e-3  # there is something to compare
    return torch.stack(scores)


def assert_right(velocity, blocks, *args, **skip):
    found = fog_a(velocity, blocks, *args, **skip)
    assert_close(found, truth(velocity, blocks, *args), rtol=1e-5, atol=1e-7)


# ---- 1, 2. flow matching and the velocity model --------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 3, 5, 4)])
def test_path_and_loss(shape):
    x0, x1, t = torch.randn(shape), torch.randn(shape), torch.tensor([0.2, 0.5, 0.7])
    assert torch.equal(flow_path(x0, x1, torch.zeros(3))[0], x0)
    assert torch.equal(flow_path(x0, x1, torch.ones(3))[0], x1)
    (a, u), (b, _) = flow_path(x0, x1, t), flow_path(x0, x1, t + 0.1)
    assert_close((b - a) / 0.1, u, atol=1e-5, rtol=1e-4)
    assert_close(flow_matching_loss(x0, u), (x0 - u).square().flatten(1).mean(1))
    with pytest.raises(ValueError, match="v .* is not of the shape of u"):  # they would broadcast
        flow_matching_loss(x0[:1], u)


def test_dropped_tokens_do_not_matter_and_all_else_does():
    model, (x_t, t, cond) = velocity_model().eval(), inputs()
    v = model(x_t, t, cond)
    others = cond._replace(tokens=(cond.tokens + 1) % 8), cond._replace(domain=1 - cond.domain)
    for other in others:
        same = (model(x_t, t, other) == v).flatten(1).all(1)
        assert torch.equal(same, ~cond.keep)
    ref = cond._replace(ref=cond.ref + 1)
    for other in ((x_t + 1, t, cond), (x_t, t / 2, cond), (x_t, t, ref)):
        assert (model(*other) != v).flatten(1).any(1).all()
    assert torch.equal(model.embed(cond)[2], model.tokens.weight[8 + cond.tokens[2]])


def test_attention_is_the_same_in_bfloat16():
    q, k, v, far = torch.randn(4, 2, 3, 64, 16)
    found = []
    for kind in (torch.float32, torch.bfloat16):
        qkv = [y.to(kind).requires_grad_() for y in (q, k, v)]
        out = agrepa.attention(*qkv)
        found.append([out, *torch.autograd.grad((out * far).sum(), qkv)])
    assert all((a - b).norm() < 0.02 * a.norm() for a, b in zip(*found, strict=True))


# ---- 6. FoG-A ------------------------------------------------------------------------------------


def test_fog_a_of_our_model_equals_gates_inside():
    model, (x_t, _, cond) = velocity_model().train(), inputs()
    x = x_t, torch.full((4,), 0.3), cond
    found, scores, v = fog_a(model, model.layers, *x), [], model.eval()(*x)
    for k in range(4):
        closed = copy.deepcopy(model)
        modulation = closed.layers[k].modulation
        for p in (modulation.weight.data.view(6, 32, 32), modulation.bias.data.view(6, 32)):
            p[[2, 5]] = 0  # adaLN's alphas, DiT's word for the scales of both branches
        scores.append((closed(*x) - v).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1))
    assert_close(found, torch.stack(scores).detach(), rtol=1e-4, atol=1e-6)


class Joint(Block):
    """Two streams of one length; the last block lets one fall."""

    last = False

    def forward(self, c, h):
        c, h = c + self.m * self.f(h).tanh(), h + self.m * self.f(c).tanh()
        return h, None if self.last else c


def test_fog_a_takes_two_streams_of_one_length():
    blocks = three(Joint)
    blocks[-1].last = True

    def velocity(c, h):
        for block in blocks:
            h, c = block(c=c, h=h)
        return h

    assert_right(velocity, blocks, state(), state())


GIVES = {
    "tuple of one": (lambda h: (h,), lambda y: y[0]),
    "dict": (lambda h: {"sample": h, "scale": 0.5}, lambda y: y["sample"]),
    "nested": (lambda h: ([h, None], 7), lambda y: y[0][0]),
}


@pytest.mark.parametrize("give, take", GIVES.values(), ids=GIVES)
def test_fog_a_takes_outputs_of_any_form(give, take):
    blocks = three(Block, give)
    assert_right(chain(blocks, lambda block, h: take(block(h))), blocks, state())


def checkpointed(blocks, how):
    return chain(blocks, partial(checkpoint, use_reentrant=how)), blocks


def compiled(blocks):
    blocks = [torch.compile(block, backend="eager") for block in blocks]
    return chain(blocks), blocks


AS_THEY_ARE = {
    "compiled whole": lambda blocks: (torch.compile(chain(blocks), backend="eager"), blocks),
    "compiled blocks": compiled,
    "checkpointed": partial(checkpointed, how=False),
    "reentrant": partial(checkpointed, how=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", AS_THEY_ARE)
def test_fog_a_takes_models_as_they_are(kind):
    blocks, h = three(), state()
    expected = truth(chain(blocks), blocks, h)
    velocity, blocks = AS_THEY_ARE[kind](blocks)
    velocity(h)
    assert_close(fog_a(velocity, blocks, h), expected)


@pytest.mark.filterwarnings("ignore")
def test_fog_a_of_traced_blocks_leaves_them_as_they_were():
    blocks, h = three().eval(), state()
    traced = [torch.jit.trace(block, h) for block in blocks]
    before, velocity = chain(traced)(h), chain(traced)
    assert_close(fog_a(velocity, traced, h), truth(chain(blocks), blocks, h))
    with pytest.raises(AttributeError):
        fog_a(lambda h: velocity(h).nothing, traced, h)
    assert torch.equal(velocity(h), before)


def test_fog_a_takes_blocks_that_write_into_their_input():
    class Writes(Block):
        def forward(self, h):
            h += self.m * self.f(h).tanh()
            return h

    blocks = three(Writes)
    assert_right(lambda h: chain(blocks)(h.clone()), blocks, state())


def test_fog_a_closes_a_block_in_every_pass_of_the_model():
    blocks = three()
    guided = chain(blocks)
    assert_right(lambda h, c: 3 * guided(h) - 2 * guided(c), blocks, state(), state())
    a, b, c = blocks
    assert_right(chain([a, b, b, c]), blocks, state())  # a block that runs twice


CHANGES = [lambda block, h: F.layer_norm(block(h), (4,)), lambda block, h: block(h).add_(1)]


@pytest.mark.parametrize("step", CHANGES, ids=["norm", "in place"])
def test_fog_a_asks_where_a_caller_changes_the_state_between_blocks(step):
    blocks, h = three(), state()
    with pytest.raises(ValueError, match=r"fog_a: block 1 takes \[\[2, 5, 4\]\]: .*skip="):
        fog_a(chain(blocks, step), blocks, h)
    assert_right(chain(blocks, step), blocks, h, skip=lambda args, kwargs, output: args[0])


class Branch(Block):  # its caller adds h
    def forward(self, h):
        return self.m * self.f(h)


def test_fog_a_names_the_answer_where_the_caller_adds_h():
    blocks, h = three(Branch), state()
    velocity = chain(blocks, lambda block, h: h + block(h))
    for wrong in (None, lambda args, kwargs, output: args[0]):
        with pytest.raises(ValueError, match="block 1 .*0 [*] output, as its caller adds h"):
            fog_a(velocity, blocks, h, skip=wrong)
    assert_right(velocity, blocks, h, skip=lambda args, kwargs, output: 0 * output)
    found = fog_a(velocity, [[block] for block in blocks], h)  # lists of modules return zeros
    assert_close(found, truth(velocity, blocks, h))


class Merge(Block):
    """A block of a U-ViT: merges an older state, and only then adds."""

    def __init__(self, merges):
        super().__init__()
        self.merge = nn.Linear(8, 4) if merges else None
        self.branch = nn.Linear(4, 4)

    def forward(self, h, older=None):
        if self.merge:
            h = self.merge(torch.cat([h, older], -1))
        return h + self.m * self.branch(h)


def test_fog_a_asks_where_blocks_merge_a_long_skip_inside():
    blocks, h = nn.ModuleList(Merge(k > 2) for k in range(5)), state()

    def velocity(h):
        a = blocks[0](h)
        b = blocks[1](a)
        return blocks[4](blocks[3](blocks[2](b), b), a)

    with pytest.raises(ValueError, match="block 4 .*: list its branches"):
        fog_a(velocity, blocks, h)
    found = fog_a(velocity, [[block.branch] for block in blocks], h)
    assert_close(found, truth(velocity, blocks, h))

    base = {}
    for block in blocks:
        block.branch.register_forward_pre_hook(lambda module, args: base.update(h=args[0].clone()))
    assert_right(velocity, blocks, h, skip=lambda args, kwargs, output: base["h"])


def test_fog_a_refuses_lists_of_blocks_and_velocities_that_mean_nothing():
    a, b, h = Block(), Block(), state()
    for blocks, velocity, error, why in (
        ([a], a, ValueError, "block 1 .*skip="),  # no other block tells what a closed one returns
        (nn.ModuleDict({"a": a}), a, AttributeError, "register_forward"),
        ([a, nn.ModuleList([b])], chain([a, b]), ValueError, "block 2 never ran .a ModuleList"),
        ([a, b], a, ValueError, "block 2 never ran"),
        ([a, b], lambda h: (chain([a, b])(h), h), AttributeError, "tuple"),
        ([a, b], lambda h: chain([a, b])(h).mean(), TypeError, "0-d"),
        ([a, b], lambda h: chain([a, b])(h + np.random.rand()), ValueError, "changes from pass"),
    ):
        with pytest.raises(error, match=why):
            fog_a(velocity, blocks, h)


def test_skip_must_return_the_form_of_the_output():
    blocks, h = three(Block, lambda h: (h,)), state()
    velocity = chain(blocks, lambda block, h: block(h)[0])
    assert_right(velocity, blocks, h, skip=lambda args, kwargs, output: (args[0],))
    for wrong in (lambda args, kwargs, output: args[0], lambda *_: (h[0],)):
        with pytest.raises(ValueError, match="block 1 "):
            fog_a(velocity, blocks, h, skip=wrong)


def test_probing_leaves_no_trace():
    model, x = velocity_model().train(), inputs()
    model.layers[2].drop.eval()
    weights, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    before = [dict(vars(m)) for m in model.modules()]  # training flags and hooks
    fog_a(model, model.layers, *x)
    assert [vars(m) for m in model.modules()] == before
    fails = model.layers[1].down.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fog_a(model, model.layers, *x)
    fails.remove()
    assert [vars(m) for m in model.modules()] == before
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


def test_fog_a_runs_in_eval_mode_and_replays_random_numbers():
    net, h = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), Block(), Block()), state()
    net(h)
    buffers = copy.deepcopy(dict(net.named_buffers()))
    scores = fog_a(lambda h: net(h + torch.rand(())), net[2:], h)
    assert torch.equal(scores, fog_a(lambda h: net(h + torch.rand(())), net[2:], h))
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    assert_close(fog_a(net.train(), net[2:], h), truth(net.eval(), net[2:], h))


def test_an_argument_that_all_blocks_share_is_copied_for_one_at_a_time(monkeypatch):
    blocks, mask = three(Block, lambda h, mask: h), torch.ones(2)
    real, copies, alive = torch.clone, [], []

    def clone(x):
        copies.append(weakref.ref(y := real(x)))
        alive.append(sum(copy() is not None and copy().shape == mask.shape for copy in copies))
        return y

    monkeypatch.setattr(torch, "clone", clone)
    fog_a(chain(blocks, lambda block, h: block(h, mask)), blocks, state())
    assert max(alive) == 1


# ---- 4, 5, 7, 8. BiT-C, LASP, selection, alignment -----------------------------------------------


def test_pool_is_the_mean_without_padding():
    h, mask = torch.randn(2, 3, 5, 4).bfloat16(), torch.arange(5).expand(2, 3, 5) % 3 != 2
    mask[1, 2] = False
    assert_close(pool(h), h.float().mean(2))
    h[~mask] = float("nan")
    z = pool(h, mask)
    assert_close(z[0, 0], h[0, 0, [0, 1, 3, 4]].float().mean(0))
    assert z.dtype == torch.float32 and z.isfinite().all() and not z[1, 2].any()
    with pytest.raises(ValueError, match="boolean"):  # 0 and -1e9 once gave a loss of -4e9
        pool(h, torch.where(mask, 0.0, -1e9))


def test_bitc_is_the_cosine_of_a_head_on_the_pooled_normed_tokens():
    head, e, T_x = BiTC(6, 4), torch.randn(2, 5, 6), torch.randn(2, 4)
    z = torch.stack([e[0].mean(0), e[1, :3].mean(0)])
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    s = F.cosine_similarity(z @ head.P.weight.T + head.P.bias, T_x)
    assert_close(head(e, T_x, torch.arange(5) < torch.tensor([[5], [3]])), s)
    assert_close(bitc_loss(s, torch.tensor([True, False])), 1 - s[0])  # one lost its tokens
    assert bitc_loss(s, torch.tensor([False, False])) == 0


def test_lasp_uses_the_shared_head_and_leaves_it_untouched():
    head, h, T_x = BiTC(6, 4), torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 4)
    score = lasp({10: h.sin(), 9: 3 * h + 1, 1: h}, head, T_x)
    assert_close(score[[0, 2]], torch.stack([head(h, T_x), head(h.sin(), T_x)]).detach())
    assert_close(score[0], score[1], atol=1e-3, rtol=0)  # neither scale nor offset counts
    assert not score.requires_grad


def test_selection():
    lam = select_layers([0.1, 0.4, 0.2, 0.4, 0.0], 3)
    assert list(lam) == [2, 4, 3] and list(lam.values()) == pytest.approx([0.4, 0.4, 0.2])
    assert select_layers(torch.tensor([0.1, 0.3]), 1) == {2: 1.0}
    assert list(select_layers([0.5] * 64, 5)) == [1, 2, 3, 4, 5]  # ties: the shallower
    for scores, k, why in (
        ([0.1, float("nan")], 1, "can't choose"),
        ([[0.1, 0.2], [0.3, 0.4]], 1, "can't choose 1 layers"),
        ([0.0, 0.0], 1, "adaLN-Zero"),
    ):
        with pytest.raises(ValueError, match=why):
            select_layers(scores, k)


def test_alignment_loss_is_zero_where_the_heads_hit_the_teacher():
    h, lam = torch.randn(3, 6, 8), {3: 0.3, 1: 0.7}
    clip, stretches, head = h.mean(1), h.unflatten(1, (2, 3)).mean(2), nn.Linear(8, 8, bias=False)
    nn.init.eye_(head.weight)
    heads = {"1": nn.Sequential(head), "3": nn.Sequential(head)}
    for sign, T_x, loss in (
        (1, clip, 0.0),
        (1, stretches, 0.0),
        (1, -stretches, 2.0),
        (-1, clip, 0.6),  # layer 3 is as far as can be
    ):
        found = agrepa_loss({1: h, 3: sign * 2 * h}, heads, T_x, lam)
        assert_close(found, torch.full((3,), loss), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [1, 3])
def test_alignment_loss_of_a_padded_clip_is_its_own_loss(targets):
    h, heads = torch.randn(3, 6, 8, requires_grad=True), AlignmentHeads([2], 8, 5)
    mask = torch.arange(6) < torch.tensor([[6], [2], [0]])
    T_x = torch.randn(3, 5) if targets == 1 else torch.randn(3, 3, 5)
    loss = agrepa_loss({2: h}, heads, T_x, {2: 1.0}, mask)
    alone = T_x[1:2] if targets == 1 else T_x[1:2, :1]
    assert_close(loss[1:2], agrepa_loss({2: h[1:2, :2]}, heads, alone, {2: 1.0}))
    assert loss[2] == 0  # all of it is padding


def test_alignment_compares_in_float32_whatever_comes():
    h, heads = torch.randn(2, 6, 8, requires_grad=True), AlignmentHeads([1], 8, 700)
    huge = (torch.randn(2, 700) * 9000).half()  # its norm is beyond float16
    loss = agrepa_loss({1: h}, heads, huge, {1: 1.0})
    assert_close(loss, agrepa_loss({1: h}, heads, huge.float(), {1: 1.0}))
    assert torch.autograd.grad(loss.sum(), h)[0].any()
    bitc = BiTC(8, 700)
    assert_close(bitc(h, huge), bitc(h, huge.float()))
    low = agrepa_loss({1: h.bfloat16()}, heads.bfloat16(), huge, {1: 1.0})
    assert low.dtype == torch.float32 and (low - loss).abs().max() < 0.05


def test_alignment_refuses_shapes_that_would_broadcast():
    v, heads = torch.randn(2, 5, 4), AlignmentHeads({1: 1.0}, {1: 4}, 3)
    for h, T_x, mask in (
        (v, torch.randn(1, 3), None),
        (v[:, None], torch.randn(2, 3), None),
        (v, torch.randn(2, 3), torch.ones(2, 4, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="agrepa_loss: layer 1 is"):
            agrepa_loss({1: h}, heads, T_x, {1: 1.0}, mask)


def test_capture_takes_states_with_gradient():
    net, h = nn.Sequential(*three()), state()
    with capture((block for block in net), {3: 0.6, 1: 0.4}) as hidden:
        v = net(h)
    assert sorted(hidden) == [1, 3] and torch.equal(hidden[3], v)
    hidden[1].sum().backward()
    assert net[0].f.weight.grad.any() and net[1].f.weight.grad is None
    with torch.no_grad(), capture(net, [2]):  # to look at, not to train
        net(h)
    with capture(net, [1]) as hidden:
        net[1](net[0](h).mul_(0))  # a caller that writes into what it got
    assert hidden[1].any()
    assert not any(module._forward_hooks for module in net)


def test_capture_takes_one_of_several_outputs():
    for give, output, take in (
        (lambda h: (None, h, 2 * h), 2, lambda y: y[2]),
        (lambda h: {"sample": h}, "sample", lambda y: y["sample"]),
        (lambda h: (h,), None, lambda y: y[0]),
    ):
        block = Block(give)
        with capture([block], [1], output) as hidden:
            returned = block(state())
        assert torch.equal(hidden[1], take(returned))


def test_capture_says_what_is_wrong():
    net, pair, h = nn.Sequential(*three()), Block(lambda h: (h, h)), state().requires_grad_()
    for blocks, layers, run, why in (
        (net, [2], net[0], "block 2 never ran: dropped, called by .forward.., .*ModuleList"),
        (net, [2], lambda h: net[1].forward(h), "block 2 never ran: .*forward"),
        (net, [4], net, "no layer 4 among 3"),
        ([pair], [1], pair, "block 1 returns a tuple; say output=1"),
        (net, [2], lambda h: net(net(h)), "block 2 ran twice"),
        (net, [1], lambda h: checkpoint(net, h, use_reentrant=True), "no gradient.*use_reentrant"),
        (net, [1], lambda h: torch.func.jvp(net, (h,), (h,)), "no gradient: .*torch.func"),
    ):
        with pytest.raises(ValueError, match=why), capture(blocks, layers):
            run(h)


# ---- the file itself -----------------------------------------------------------------------------

HEAD = "import contextlib, torch, torch.nn.functional as F; from torch import nn\n"
TWO_MORE = "from functools import partial\nfrom torch.utils import _pytree as pytree\n"


def sections():
    """{number: text}, from a banner to the next."""
    found = re.split(r"^(# ---- (\d+)\. )", inspect.getsource(agrepa), flags=re.M)
    return {int(n): a + b for a, n, b in zip(*(found[i::3] for i in (1, 2, 3)), strict=True)}


def global_names(code):
    own = {x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"}
    return own.union(*(global_names(c) for c in code.co_consts if inspect.iscode(c)))


@pytest.mark.parametrize("numbers, most", [((6,), 90), ((4, 5, 6, 7, 8), 235)])
def test_sections_run_when_pasted_alone(numbers, most):
    text, own = "".join(sections()[n] for n in numbers), {}
    assert len(text.rstrip().splitlines()) <= most
    exec(HEAD + TWO_MORE + text, own)
    missing = global_names(compile(text, "pasted", "exec")) - own.keys() - vars(builtins).keys()
    assert not missing  # nor in the paths that no test takes
    net, h = nn.Sequential(*three()), state()
    assert torch.equal(own["fog_a"](net, net, h), fog_a(net, net, h))
    if len(numbers) > 1:
        lam = own["select_layers"](own["fog_a"](net, net, h).mean(1), 1)
        with own["capture"](net, lam) as hidden:
            net(h)
        heads, T_x = own["AlignmentHeads"](lam, 4, 3), torch.randn(2, 3)
        own["agrepa_loss"](hidden, heads, T_x, lam).mean().backward()
        assert own["lasp"](hidden, own["BiTC"](4, 3), T_x).shape == (1, 2)


def test_tables_of_sections_and_equations_tell_the_truth():
    own, banners = {}, sections()
    for n, row in re.findall(r"^ ?(\d+)  (\S.*)", agrepa.__doc__, re.M):
        _, *cited, names = re.split(r" {2,}", row)
        text, cited = banners.pop(int(n)), "".join(cited)
        own[cited] = {getattr(node, "name", "") for node in ast.parse(text).body}
        assert cited in text.splitlines()[0] and set(names.split(", ")) <= own[cited], row
    text = (HERE / "README.md").read_text()
    rows = dict(re.findall(r"^\| (Eqs?\. .*?) \| .* \| (`.*`) \|$", text, re.M))
    assert not banners and rows.keys() == {cited for cited in own if "Eq" in cited}
    for cited, names in rows.items():
        assert set(re.findall(r"`(\w+)`", names)) <= own[cited], cited


class DiT(nn.Module):  # in the place of F5-TTS's
    def __init__(self, dim, mel_dim, **others):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(dim=dim) for _ in range(3))
        self.h, self.v = nn.Linear(mel_dim, dim), nn.Linear(dim, mel_dim)

    def forward(self, x, cond, text, time):
        return self.v(chain(self.transformer_blocks)(self.h(x + cond)))


def test_readme_recipe_runs_as_it_stands(monkeypatch):
    (recipe,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    monkeypatch.setitem(sys.modules, "f5_tts.model", types.SimpleNamespace(DiT=DiT))
    exec(recipe, own := {})
    assert len(own["hidden"]) == len(own["layers"]) == 3 and torch.isfinite(own["loss"])


# ---- 3. teachers and preparation -----------------------------------------------------------------


def tone(path, seconds, rate=24_000, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    x = 0.3 * np.sin(2 * np.pi * rng.uniform(150, 900) * t * (1 + 0.1 * t))
    x += 0.05 * rng.standard_normal(len(t))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(x[:, None], channels, 1), rate)
    return path


@pytest.fixture(scope="session")
def audio(tmp_path_factory):
    root = tmp_path_factory.mktemp("audio")
    for i in range(14):
        rate, channels = (16_000, 44_100)[i % 2], 1 + i % 2
        tone(root / "one" / f"s{i % 3}" / f"{i}.flac", 1 + 0.3 * (i % 4), rate, channels, i)
        tone(root / "two" / f"{i}.wav", 0.4 + 0.4 * (i % 5), 22_050, 1, 100 + i)
    return root


def tiny(**settings):
    """A configuration that runs in a second."""
    default = dict(teacher="MFCC", units=8, layers=4, dim=32, heads=2, seconds=0.96, batch_size=4)
    default |= dict(steps=12, probe_steps=6, probe_every=2, lr=3e-3, top_k=2, device="cpu")
    default |= dict(dtype="float32", eval_every=4, save_every=4)
    return Config(**{**default, **settings})


def prepare(source, out, config=None, like=None):
    return str(data_prep.prepare(Path(source), Path(out), config or tiny(), like))


@pytest.fixture(scope="session")
def folders(audio, tmp_path_factory):
    """{codebooks: [prepared folder, prepared folder]}"""
    out = tmp_path_factory.mktemp("prepared")
    return {
        n: [prepare(audio / d, out / f"{d}-{n}", tiny(codebooks=n)) for d in ("one", "two")]
        for n in (1, 2)
    }


def meta_of(folder):
    return json.loads(Path(folder, "meta.json").read_text())


def arrays(folder):
    return {name: Path(folder, name).read_bytes() for name in (*data_prep.ARRAYS, "units.npy")}


def test_large_bundles_normalise_each_clip_by_itself(monkeypatch):
    class Wrapper(nn.Module):  # as torchaudio's, which normalises over the whole batch
        model = types.SimpleNamespace(extract_features=lambda x, num_layers: ([x[..., None]], None))

    large = types.SimpleNamespace(get_model=Wrapper, _normalize_waveform=True)
    monkeypatch.setattr(torchaudio.pipelines, "HUBERT_LARGE", large)
    wave = torch.randn(2, 2560) * torch.tensor([[0.1], [1.0]])
    heard = agrepa.Teacher("HUBERT_LARGE")(wave)
    assert_close(heard.std((1, 2)), torch.ones(2), rtol=0.01, atol=0)


def test_hubert_bundle_end_to_end(audio, tmp_path, monkeypatch):
    """The real checkpoint's format and file name; every layer above the ninth is NaN."""
    net = torchaudio.models.hubert_base()
    for layer in net.encoder.transformer.layers[9:]:
        for p in layer.parameters():
            p.data.fill_(float("nan"))
    file = tmp_path / "hub" / "checkpoints" / "hubert_fairseq_base_ls960.pth"
    file.parent.mkdir(parents=True)
    torch.save(net.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = tiny(teacher="HUBERT_BASE")
    folder = prepare(audio / "one" / "s0", tmp_path / "out", config)
    teacher = PreparedFolder(folder, 3).teacher
    assert teacher.shape[1] == 768 and np.isfinite(teacher).all() and teacher[:].std() > 0
    file.write_text("<html>no such page</html>")  # what a proxy leaves in its place
    with pytest.raises(ValueError, match=f"--teacher HUBERT_BASE: .*{tmp_path}/hub; delete"):
        prepare(audio / "one" / "s1", tmp_path / "other", config)


TEACHER = """
from __future__ import annotations
import torch
from dataclasses import dataclass
from beside import WIDTH

@dataclass
class Settings:
    width: int = WIDTH

class Teacher(torch.nn.Module):
    calls = 0
    def forward(self, wave):
        self.calls += 1
        x = wave.unfold(1, 320, 320)[..., : Settings().width]
        %s
def load(): return Teacher()
"""
ANSWERS = {
    "numpy": ("return x.numpy()", None),
    "gradient": ("return x.clone().requires_grad_()", None),
    "an output": ("import types; return types.SimpleNamespace(last_hidden_state=x)", None),
    "complex": ("return torch.complex(x, x)", "load: .*complex"),
    "no numbers at first": ("return x / (self.calls != 2)", None),
    "huge": ("return 1e9 * x", "features that aren't finite"),
    "late": ("assert self.calls < 3, 'too long a sound'; return x", "load: .*too long"),
    "few": ("return x[:, 1:]", r"load: .*not reals \[.*, width"),
    "words": ("return 'words'", "load: .*Error"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_teachers_of_the_users_own(name, audio, tmp_path, monkeypatch):
    body, why = ANSWERS[name]
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    (file := tmp_path / "mine.py").write_text(TEACHER % body)
    config = tiny(teacher=f"{file}:load", units=4)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if why:
        with pytest.raises(ValueError, match=why):
            prepare(audio / "one", tmp_path / "out", config)
    else:
        data = PreparedFolder(prepare(audio / "one", tmp_path / "out", config), 3)
        assert data.teacher.shape[1] == 5 and len(np.unique(data.tokens)) == 4
        file.write_text(TEACHER % "return x**2")
        with pytest.raises(ValueError, match="of other audio or settings"):
            prepare(audio / "one", tmp_path / "out", config)


def test_teachers_of_one_name_that_print(audio, tmp_path):
    teach = "print(1); import atexit; atexit.register(print, 'goodbye')\n"
    teach += "def load(): return lambda wave: wave.unfold(1, 320, 320)[..., :%d]"
    for width, folder in ((5, "a"), (7, "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(teach % width)
    argv = audio / "one", "--out", "out", "--units", "4", "--teacher", "a/mine.py:load"
    argv += "--units-teacher", "b/mine.py:load"
    assert cli(*argv, program="data_prep.py", cwd=tmp_path).stdout == "out\n"
    assert np.load(tmp_path / "out" / "units.npy").shape == (4, 7)


@pytest.mark.parametrize("rate", [16_000, 44_100, 16_001])
def test_a_click_lands_in_its_chunk_of_mel_and_teacher(tmp_path, rate):
    at = 5 * agrepa.CHUNK + 7 * 256 / 24_000  # chunk 5, frame 7
    for i in range(3):
        x = np.random.default_rng(i).standard_normal(2 * rate) * 1e-4
        x[round(at * rate)] = 0.9
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{i}.wav", x, rate, "FLOAT")
    data = PreparedFolder(prepare(tmp_path / "in", tmp_path / "out", tiny(units=2)), 12)
    for u in range(3):
        mel = data.mel[12 * u : 12 * u + 12].reshape(-1, 100).astype(np.float32)
        assert mel.sum(1).argmax() == 5 * 15 + 7
        assert data.teacher[12 * u : 12 * u + 12, 0].argmax() == 5  # MFCC's first is loudness


def test_rows_hold_mel_chunk_means_and_nearest_units(folders, audio):
    folder = Path(folders[2][0])
    data, units = PreparedFolder(folder, 3), torch.from_numpy(np.load(folder / "units.npy"))
    log = [json.loads(line) for line in open(folder / "files.jsonl")][1:]
    for line, first in zip(log, np.cumsum([0, *[x["chunks"] for x in log]]), strict=False):
        _, ((low, high),) = data_prep.read_audio(audio / "one" / line["path"])
        rows = slice(first, first + line["chunks"])
        mel, x = log_mel(high[None])[0], data_prep.mfcc(low[None])[0]
        assert_close(torch.tensor(data.mel[rows]).reshape(-1, 100), mel.half())
        means = x.unflatten(0, (-1, 8)).mean(1)
        assert_close(torch.tensor(data.teacher[rows]), means.half(), atol=0.05, rtol=0.01)
        at_50 = F.interpolate(mel.T[None], len(x), mode="area")[0].T
        ids = torch.cdist(x, units[:, :39]).argmin(1), torch.cdist(at_50, units[:, 39:]).argmin(1)
        tokens = torch.tensor(data.tokens[rows].astype(int)).flatten()
        assert torch.equal(tokens, interleave(ids[0], 8 + ids[1]))
    mean = data.teacher[data.clips["training"][0]].mean(0, dtype=float)
    assert np.abs(mean - data.centre).max() < 0.01 * np.abs(mean).max()
    assert not PreparedFolder(folder, 3, raw_teacher=True).centre.any()


def test_unusable_files_are_skipped_and_listed(tmp_path, audio):
    folder = shutil.copytree(audio / "one" / "s0", tmp_path / "in")
    for name, value in (("nan", np.nan), ("huge", 1e38)):
        x = np.zeros(24_000, np.float32)
        x[500] = value
        soundfile.write(folder / f"{name}.wav", x, 24_000, "FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(24_000), 24_000)
    soundfile.write(folder / "short.wav", np.ones(2000), 24_000)
    soundfile.write(folder / "slow.wav", np.random.default_rng(0).uniform(-1, 1, 9000), 1)
    (folder / "text.wav").write_text("not audio")
    (folder / "voice.m4a").write_bytes(b"x" * 9999)
    shutil.copy(folder / "3.flac", folder / "copy.flac")
    os.mkfifo(folder / "pipe.wav")
    (folder / "loop").symlink_to(folder)
    tone(folder / "tiny.ogg", 0.17, 48_000)
    tone(folder / "some.mp3", 3, 44_100, 2)
    before = sorted(path.name for path in folder.iterdir())
    out = prepare(folder, tmp_path / "out")
    why = {skipped["path"]: skipped["reason"] for skipped in meta_of(out)["skipped"]}
    words = {
        "copy.flac": "the content of 3.flac",
        "huge.wav": "1e+38",
        "nan.wav": "nan",
        "pipe.wav": "no file",
        "short.wav": "short",
        "silent.wav": "silent",
        "slow.wav": "1 Hz",
        "text.wav": "can't be read",
        "voice.m4a": "ffmpeg",
    }
    assert why.keys() == words.keys() and all(words[name] in why[name] for name in words), why
    data = PreparedFolder(out, 3)
    assert np.isfinite(data.mel).all() and abs(meta_of(out)["mel_mean"]) < 20
    assert sorted(path.name for path in folder.iterdir()) == before


def test_lengths_come_from_what_is_read(tmp_path):
    """Headers that guess or don't know, formats that can't seek; and channels that cancel out."""
    x = soundfile.read(tone(tmp_path / "x.flac", 3, 48_000))[0]
    content = bytearray((tmp_path / "x.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # a stream whose length was not known when it began
    (tmp_path / "streamed.flac").write_bytes(content)
    soundfile.write(tmp_path / "phone.wav", x[::6], 8000, "GSM610")
    for name in ("streamed.flac", "phone.wav"):
        ((low, _),) = data_prep.read_audio(tmp_path / name)[1]
        assert len(low) in (18 * 2560, 19 * 2560), name  # GSM comes in whole frames
    tone(tmp_path / "odd.wav", 60, 11_127)
    assert sum(len(low) for low, _ in data_prep.read_audio(tmp_path / "odd.wav")[1]) >= 374 * 2560
    soundfile.write(tmp_path / "inverted.wav", np.stack([x, -x], 1), 48_000)
    one, other = (data_prep.read_audio(tmp_path / f)[1][0] for f in ("x.flac", "inverted.wav"))
    assert_close(one[0], other[0], atol=1e-3, rtol=0)
    parts = [tone(tmp_path / f"{s}.mp3", s, 48_000, seed=s).read_bytes() for s in (20, 50)]
    (tmp_path / "joined.mp3").write_bytes(b"".join(parts))
    head, body = tone(tmp_path / "whole.wav", 3, 48_000).read_bytes().split(b"data", 1)
    (tmp_path / "crashed.wav").write_bytes(head + b"data" + bytes(4) + body[4:])  # by a recorder
    for name in ("joined.mp3", "crashed.wav"):
        why, pieces = data_prep.read_audio(tmp_path / name)
        assert "longer than its header says" in why and not pieces, name


def test_preparation_that_ended_early_goes_on(tmp_path, audio, monkeypatch):
    """A drive that is away for a moment is no verdict on a file; a kill leaves half a row."""
    monkeypatch.setattr(data_prep, "GROUP", 30_000)
    real, calls = data_prep.read_audio, []

    def gone(path):
        calls.append(path)
        if len(calls) == 12:
            raise OSError("no such device")
        return real(path)

    with monkeypatch.context() as m, pytest.raises(OSError, match="no such device"):
        m.setattr(data_prep, "read_audio", gone)
        prepare(audio / "one", tmp_path / "out")
    part = tmp_path / "out.partial"
    assert 0 < (part / "mel.bin").stat().st_size
    with open(part / "mel.bin", "ab") as rows, open(part / "files.jsonl", "a") as log:
        rows.write(b"half a row")
        log.write('{"path": "half a li')
    out = prepare(audio / "one", tmp_path / "out")
    assert not meta_of(out)["skipped"]
    assert arrays(out) == arrays(prepare(audio / "one", tmp_path / "at-once"))


def test_preparations_do_not_mix(tmp_path, audio, capfd):
    with data_prep.becoming(tmp_path / "out"):
        with pytest.raises(ValueError, match="in use by another process"):
            prepare(audio / "one", tmp_path / "out")
        (tmp_path / "out.partial" / "files.jsonl").write_text('{"units": 9}\n')
        np.save(tmp_path / "out.partial" / "units.npy", np.zeros((8, 39)))
    with pytest.raises(ValueError, match="prepare with another --out"):
        prepare(audio / "one", tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "out.partial")
    with pytest.raises(ValueError, match="partial is of other audio or settings"):
        prepare(audio / "one", tmp_path / "out")
    first = prepare(audio / "one", tmp_path / "mine")
    assert capfd.readouterr().out.count("files,") > 1
    assert prepare(audio / "one", tmp_path / "mine") == first  # found again
    assert "files," not in capfd.readouterr().out
    with pytest.raises(ValueError, match="of other audio or settings"):
        prepare(audio / "two", tmp_path / "mine")


def test_held_out_are_whole_folders_where_there_are_enough(capfd):
    chapters = {f"train/{s}/{c}/{i}.wav": 40 for s in range(9) for c in range(5) for i in range(30)}
    held = data_prep.hold_out(chapters)
    folders = {str(Path(p).parent) for p in held}
    assert held == {p for p in chapters if str(Path(p).parent) in folders}
    assert 0.02 <= len(held) / len(chapters) <= 0.1
    parts = {"train-clean/1.wav": 20, "dev-clean/2.wav": 9, "test-other/3.wav": 9}
    assert data_prep.hold_out(parts) == {"dev-clean/2.wav", "test-other/3.wav"}
    assert "47%" in capfd.readouterr().out
    with pytest.raises(ValueError, match="most of the audio is in dev"):
        data_prep.hold_out({"test-recordings/a.wav": 30, "b.wav": 3})


def test_no_clip_crosses_a_folder_or_the_end_of_a_long_recording():
    rng = np.random.default_rng(0)
    chunks, folder = rng.integers(1, 12, 60), rng.integers(0, 4, 60)
    utterances = np.stack([np.cumsum([0, *chunks])[:-1], chunks, folder], 1)
    rows, starts = agrepa.clips_of(utterances, 6)
    owner = np.repeat(np.arange(60), chunks)  # of each row
    assert sorted(rows) == list(range(chunks.sum()))  # each of them once
    for start in starts:
        clip = owner[rows[start : start + 6]]
        assert len(set(folder[clip])) == 1
        assert len(set(clip)) == 1 or chunks[clip].max() < 6
    long = sum(max(0, n - 5) for n in chunks if n >= 6)
    short = [sum(chunks[(folder == d) & (chunks < 6)]) for d in range(4)]
    assert len(starts) == long + sum(max(0, n - 5) for n in short) > long


def test_long_files_are_heard_in_pieces_and_are_one_recording(tmp_path):
    for i in range(3):
        tone(tmp_path / "in" / f"{i}.wav", 60, 16_000, seed=i)
    folder = Path(prepare(tmp_path / "in", tmp_path / "out"))
    data = PreparedFolder(folder, 200)
    rows, starts = data.clips["training"]
    assert len(rows) == 2 * 375 and len(starts) == 2 * 176
    first = json.loads((folder / "files.jsonl").read_text().splitlines()[1])["path"]
    wave = torch.tensor(soundfile.read(tmp_path / "in" / first, dtype="float32")[0])[None]
    whole = log_mel(torchaudio.functional.resample(wave, 16_000, 24_000))[0]
    seam, stored = slice(2370, 2430), torch.tensor(data.mel[:375].astype(np.float32))
    assert (stored.reshape(-1, 100)[seam] - whole[seam]).abs().mean() < 0.1


# ---- 10. batches ---------------------------------------------------------------------------------


def datasets(folders, codebooks=1):
    return [PreparedFolder(folder, 6, d) for d, folder in enumerate(folders[codebooks])]


def test_draws_depend_on_neither_processes_nor_each_other(folders):
    config, data = tiny(), datasets(folders)
    whole = agrepa.training_batch(data, dataclasses.replace(config, batch_size=8), 7)
    for rank in range(2):
        half = agrepa.training_batch(data, config, 7, rank)
        for d in range(2):
            mine, every = slice(2 * d, 2 * d + 2), slice(4 * d + 2 * rank, 4 * d + 2 * rank + 2)
            for name in ("x0", "x1", "t"):
                assert torch.equal(getattr(half, name)[mine], getattr(whole, name)[every])
            assert torch.equal(half.cond.ref[mine], whole.cond.ref[every])
    assert not torch.equal(whole.x0[:4], agrepa.training_batch(data, config, 8).x0)
    assert whole.x0[0].std() == pytest.approx(1, abs=0.05)  # N(0, I), not half of it
    held_out = agrepa.held_out_batch(data, "loss", 16)
    assert torch.equal(held_out.x0, agrepa.held_out_batch(data, "loss", 16).x0)
    assert held_out.t[:16].sort().values.diff().max() < 0.1  # times are spread evenly


def test_reference_prefix_dropping_rates_and_scale(folders):
    config, data = tiny(batch_size=16), datasets(folders)
    batches = [agrepa.training_batch(data, config, step) for step in range(40)]
    x1 = torch.cat([b.x1 for b in batches])
    assert x1.std() == pytest.approx(1, abs=0.1) and abs(x1.mean()) < 0.1
    keep = torch.cat([b.cond.keep for b in batches]).float()
    lengths = torch.cat([b.cond.ref.abs().sum(2).gt(0).sum(1) / 90 for b in batches])
    for b in batches:
        prompt = b.cond.ref.abs().sum(2) > 0
        assert torch.equal(b.cond.ref[prompt], b.x1[prompt])
    assert 0.86 < keep.mean() < 0.94
    assert 0.05 < (lengths == 0).float().mean() < 0.2
    assert lengths.max() <= 0.3 and lengths.std() > 0.05


# ---- 11. training --------------------------------------------------------------------------------


def train(config, out, state=None):
    config = dataclasses.replace(config, out=str(out), data=list(config.data))
    agrepa.train(config, state)
    return load(out)


def load(out):
    return torch.load(Path(out, "last.pt"), weights_only=True)


def table(path):
    with open(path) as f:
        return list(csv.DictReader(f))


def assert_same(a, b, **near):
    near = near or {"rtol": 0, "atol": 0}
    assert_close(a["objective"], b["objective"], **near)
    assert_close(a["ema"], b["ema"], **near)
    assert_close(a["optimiser"]["state"], b["optimiser"]["state"], **near)


def objective_of(folders, **settings):
    config, data = tiny(data=folders[1], **settings), datasets(folders)
    return awake(agrepa.Objective(config, [x.meta for x in data])), data


def moved(module):
    return [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]


def test_gradient_of_the_alignment_reaches_what_eq_12_says(folders):
    objective, data = objective_of(folders)
    average = copy.deepcopy(objective).eval()
    for part in (objective, average):
        part.add_heads([{2: 1.0}, {3: 0.6, 1: 0.4}])
    assert_close(average.heads.state_dict(), objective.heads.state_dict())
    objective.aligning = True
    objective.heads.requires_grad_(True)
    batch = agrepa.training_batch(data, dataclasses.replace(objective.config, batch_size=8), 2)
    fm, bitc, align = objective(batch)
    align.backward()
    model = objective.model
    assert all(moved(objective.heads)) and all(all(moved(model.layers[k])) for k in (0, 1, 2))
    assert model.tokens.weight.grad.any() and model.x_in.weight.grad.any()
    assert not any(moved(model.layers[3])) and not any(moved(model.v_out))
    assert not any(moved(objective.bitc))
    own, T_x = slice(0, 4), pool(batch.teacher[0])
    with capture(model.layers, [1, 2, 3]) as hidden:
        model(flow_path(batch.x0, batch.x1, batch.t)[0], batch.t, batch.cond)
    first = agrepa_loss({2: hidden[2][own]}, objective.heads[0], T_x, {2: 1.0})
    rest = {k: hidden[k][4:] for k in (1, 3)}
    second = agrepa_loss(rest, objective.heads[1], pool(batch.teacher[1]), {3: 0.6, 1: 0.4})
    assert_close(align, (first.mean() + second.mean()) / 2)


def test_bitc_trains_the_tokens_and_skips_the_dropped(folders):
    objective, data = objective_of(folders)
    batch = agrepa.training_batch(data, dataclasses.replace(objective.config, batch_size=16), 3)
    keep, expected = batch.cond.keep, 0
    assert 0 < keep.sum() < len(keep)
    _, bitc, _ = objective(batch)
    for d, own in enumerate((slice(0, 8), slice(8, 16))):
        s = objective.bitc[d](objective.model.embed(batch.cond)[own], pool(batch.teacher[d]))
        expected = expected + (1 - s[keep[own]]).mean()
    assert_close(bitc, expected)
    bitc.backward()
    assert objective.model.tokens.weight.grad.any() and not objective.model.null.grad.any()


def test_a_run_writes_its_folder(folders, tmp_path):
    state = train(tiny(data=folders[2], codebooks=2), tmp_path / "run")
    layers = json.loads((tmp_path / "run" / "layers.json").read_text())
    log, probes = table(tmp_path / "run" / "log.csv"), table(tmp_path / "run" / "probe.csv")
    assert [row["step"] + row["phase"] for row in log] == ["01", "41", "61", "82", "122"]
    assert float(log[1]["align"]) == 0 < float(log[-1]["align"])
    assert float(log[-1]["val_fm"]) < float(log[0]["val_fm"])
    assert float(log[1]["lr"]) == pytest.approx(3e-3 * (0.5 + 0.5 * np.cos(np.pi * 3 / 12)))
    assert len(probes) == 3 * 2 * 4 and list(layers) == ["one", "two"]
    for d, (name, entry) in enumerate(layers.items()):
        for k in range(1, 5):
            late = [r for r in probes if r["domain"] == name and int(r["step"]) > 3]
            mine = [float(r["foga"]) for r in late if r["layer"] == str(k)]
            assert len(mine) == 2 and np.isclose(np.mean(mine), entry["foga"][k - 1])
        lam = dict(zip(entry["layers"], entry["weights"], strict=True))
        assert lam == state["lam"][d] == select_layers(entry["foga"], 2)
        assert len(entry["lasp"]) == len(entry["gradnorm"]) == 4


def test_strategies_differ_only_from_the_selection_on(folders, tmp_path):
    runs = {}
    for select in ("foga", "lasp", "gradnorm", "random", "none", "4,1"):
        run = runs[select] = train(tiny(data=folders[1], select=select), tmp_path / select)
        assert run["probes"] == runs["foga"]["probes"]
        for row, first in list(zip(run["log"], runs["foga"]["log"], strict=True))[:3]:
            assert (row["fm"], row["val_fm"]) == (first["fm"], first["val_fm"])
    assert runs["none"]["lam"] == [{}, {}] and runs["none"]["log"][-1]["align"] == 0
    assert runs["4,1"]["lam"] == [{4: 0.5, 1: 0.5}] * 2
    layers = json.loads((tmp_path / "lasp" / "layers.json").read_text())
    for lam, entry in zip(runs["lasp"]["lam"], layers.values(), strict=True):
        assert lam == dict.fromkeys((np.argsort(entry["lasp"])[::-1][:2] + 1).tolist(), 0.5)


def test_align_until_and_chunk_targets(folders, tmp_path, capfd):
    runs = []
    for target, until in (("chunk", 8), ("chunk", 0), ("clip", 8)):
        config = tiny(data=folders[1], align_pool=target, align_until=until)
        runs.append(train(config, tmp_path / f"{target}{until}"))
    assert "of these 2 layers led at half of phase I, too" in capfd.readouterr().out
    assert [row["align"] > 0 for row in runs[0]["log"]] == [False, False, False, True, False]
    one, *others = [torch.cat([x.flatten() for x in run["ema"].values()]) for run in runs]
    assert not any(torch.equal(one, other) for other in others)


@pytest.fixture(scope="session")
def undisturbed(folders, tmp_path_factory):
    config = tiny(data=folders[1], dropout=0.1, eval_every=3, align_until=8)
    return config, train(config, tmp_path_factory.mktemp("undisturbed") / "run")


ENDS = {  # the call of a function of agrepa's that ends a run, how, and the step that it reached
    "log that nobody reads": ("print", 2, BrokenPipeError, 3),  # as after | head
    "Ctrl-C": ("update", 5, signal.SIGINT, 5),
    "SIGTERM": ("update", 9, signal.SIGTERM, 9),
    "closed terminal": ("update", 6, signal.SIGHUP, 6),
    "out of memory in a probe": ("probe", 3, BrokenPipeError, 4),
    "out of memory at the choice": ("end_phase1", 1, BrokenPipeError, 6),
}


@pytest.mark.parametrize("what, call, how, step", ENDS.values(), ids=ENDS)
def test_a_run_that_ended_early_goes_on_as_if_undisturbed(
    undisturbed, tmp_path, monkeypatch, what, call, how, step
):
    (config, whole), real, calls = undisturbed, vars(agrepa).get(what, print), []

    def ends(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and how is BrokenPipeError:
            raise how
        if len(calls) == call:
            os.kill(os.getpid(), how)
        return real(*args, **kwargs)

    if how is not BrokenPipeError:
        signal.signal(how, signal.SIG_DFL)  # jobs in the background ignore some
    with monkeypatch.context() as m, contextlib.suppress(BrokenPipeError):
        m.setattr(agrepa, what, ends, raising=False)
        train(config, tmp_path / "cut")
    assert load(tmp_path / "cut")["step"] == step
    assert_same(whole, train(config, tmp_path / "cut", load(tmp_path / "cut")))
    for name, n in (("log.csv", 8), ("probe.csv", 9)):  # the log's ninth column is the time
        a, b = (table(Path(out, name)) for out in (whole["config"]["out"], tmp_path / "cut"))
        assert [list(row.values())[:n] for row in a] == [list(row.values())[:n] for row in b]


def test_probing_changes_nothing_and_nohup_is_heeded(undisturbed, tmp_path):
    config, _ = undisturbed
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    once = train(dataclasses.replace(config, probe_every=6, select="none"), tmp_path / "once")
    often = train(dataclasses.replace(config, select="none"), tmp_path / "often")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert len(often["probes"]) == 3 * len(once["probes"])
    assert_same(often, once)


def test_updates_are_clipped_apart_and_left_out_where_not_finite(folders):
    moves = {}
    for gradient, heads in ((0.1, 0.1), (0.1, 1e5), (float("nan"), 0.1), (0.1, float("inf"))):
        objective, _ = objective_of(folders)
        parts = agrepa.build(objective.config, objective.metas, torch.device("cpu"), None)
        agrepa.begin_phase2(*parts.values(), [{2: 1.0}, {3: 1.0}])
        objective = parts["objective"]
        before = copy.deepcopy(objective.state_dict())
        for name, p in objective.named_parameters():
            p.grad = torch.full_like(p, heads if name.startswith("heads") else gradient)
        agrepa.update(*parts.values(), 1)
        after = objective.state_dict().items()
        moves[gradient, heads] = torch.cat([(x - before[name]).flatten() for name, x in after])
    one, huge, *rest = moves.values()
    n = sum(p.numel() for p in objective.model.parameters())
    assert one[:n].any() and torch.equal(one[:n], huge[:n])  # the heads do not shrink its step
    assert not any(move.any() for move in rest)


def test_compiled_layers_train_alike(folders, tmp_path, monkeypatch):
    plain = train(tiny(data=folders[1]), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = train(tiny(data=folders[1], compile=True), tmp_path / "compiled")
    assert found["lam"] == [pytest.approx(lam, rel=1e-3) for lam in plain["lam"]]
    assert_same(plain, found, rtol=1e-2, atol=1e-3)


# ---- the command line ----------------------------------------------------------------------------


def command(*args, processes=1, program="agrepa.py"):
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517"]
    head = torchrun if processes == 2 else []
    return [sys.executable, *head, *map(str, (HERE / program, *args))]


def cli(*args, cwd, **how):
    return subprocess.run(command(*args, **how), capture_output=True, text=True, cwd=cwd)


def flags(config):
    """A configuration as a command line."""
    found = []
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if value != f.default and f.name != "out":
            found += [name, *map(str, value if f.name == "data" else [value])]
    return found


@pytest.fixture
def program(tmp_path, monkeypatch, capfd):
    """Runs a command line, in an empty folder -> what it says."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, module=agrepa, code=0):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        found = 0
        try:
            agrepa.guarded(module.main)
        except SystemExit as stop:
            found = stop.code
        said = capfd.readouterr()
        assert found == code and "Traceback" not in said.err, said.err
        return said.err + said.out

    return call


@pytest.fixture(scope="session")
def finished(folders, tmp_path_factory):
    """A run to its end, by agrepa.py alone in its folder."""
    where = tmp_path_factory.mktemp("finished")
    shutil.copy(HERE / "agrepa.py", where)
    argv = [sys.executable, "agrepa.py", *flags(tiny(data=folders[2], codebooks=2))]
    done = subprocess.run(argv, cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens tell" in done.stdout and "the aligned layers tell" in done.stdout
    run = where / "runs" / "one+two-1"
    pictures = {path.name for path in run.glob("*.png")}
    assert pictures == {"dissociation.png", "loss.png", "mel.png"}
    return run


def test_two_processes_choose_and_train_alike(folders, tmp_path):
    config = tiny(data=folders[1], steps=10, align_until=9)
    one = cli(*flags(dataclasses.replace(config, batch_size=8)), "--out", "one", cwd=tmp_path)
    two = cli(*flags(config), "--out", "two", processes=2, cwd=tmp_path)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = load(tmp_path / "one"), load(tmp_path / "two")
    assert [list(x) for x in a["lam"]] == [list(x) for x in b["lam"]]
    for name in ("val_fm", "fm"):
        assert np.allclose(*([row[name] for row in run["log"]] for run in (a, b)), rtol=1e-2)
    assert (tmp_path / "two" / "loss.png").exists()  # to the end
    raw = cli("--data", tmp_path, processes=2, cwd=tmp_path)
    assert raw.returncode != 0 and "before torchrun, once: python data_prep.py" in raw.stderr


def test_killed_runs_end_bit_for_bit(folders, tmp_path):
    config = tiny(data=folders[1], steps=40, probe_steps=20, save_every=2)
    whole = train(config, tmp_path / "whole")
    argv = [*flags(config), "--out", "run"]
    for step in (8, 24):
        run = subprocess.Popen(command(*argv), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert any(line.startswith(f"step {step} ") for line in run.stdout)
        run.kill()
        run.wait()
        argv = ["--out", "run", "--resume"]
    done = cli(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(whole, load(tmp_path / "run"))


def test_raw_audio_is_prepared_once_and_found_again(audio, program):
    shutil.copytree(audio / "one", "a, b\udce9")  # no UTF-8, and a comma
    Path("a, b\udce9", "meta.json").write_text("{}")  # the corpus's own
    argv = flags(tiny(data=["a, b\udce9"]))
    assert "files," in program(*argv, "--out", "x")
    assert "files," not in program(*argv, "--out", "y")
    assert "of other audio or settings" in program(*argv, "--units", 4, code=2)


def test_data_may_move_and_resume_knows_it(folders, program, monkeypatch):
    shutil.copytree(folders[1][0], "here")
    program(*flags(tiny(data=["here"])), "--out", "run")
    shutil.move("here", "there")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    resume = "--out", "../run", "--resume"
    assert "here" in program(*resume, code=2)
    program(*resume, "--data", "../there")
    program("--sample", "../run/last.pt", "--data", "../there", "--count", 1, "--nfe", 1)
    assert "other data" in program(*resume, "--data", folders[1][1], code=2)


def test_bad_input_is_met_at_the_door(folders, program, monkeypatch):
    monkeypatch.setattr(agrepa, "train", lambda *_: pytest.fail("it trains"))
    Path("song.pt").write_text("la la la")
    here = folders[1][0]
    for argv, words in (
        (("--top-k", 20), "--top-k 20 but the model has 12 layers"),
        (("--select", "4,40"), "from 1 to 12"),
        (("--select", "best"), "best is not foga"),
        (("--batch-size", 0), "--batch-size 0 is out of range"),
        (("--probe-steps", 100, "--steps", 50), "more than phase I"),
        (("--teacher", "WHISPER"), "prepared with teacher MFCC"),
        (("--lr", "nan"), "--lr nan is out of range"),
        (("--align-until", 9, "--probe-steps", 9), "--align-until 9 is in phase I"),
        (("--data", "--dim"), "expected at least one argument"),
        (("--data", here, here, here), "can't be shared by 3 domains"),
        (("--data", here, here), "one name"),
        (("--data", "nowhere"), "no such folder"),
        (("--seconds", "inf"), "--seconds inf"),
        (("--nfe", 8), "only --sample has {'nfe'}"),
        (("--resume",), "last.pt"),
        (("--sample", "nothing.pt"), "nothing.pt"),
        (("--sample", "song.pt"), "song.pt: no checkpoint"),
    ):
        assert words in program("--data", here, *argv, code=2), argv
    if not torch.cuda.is_available():
        assert "--device cuda: there is none" in program("--data", here, "--device", "cuda", code=2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "")  # what a launcher leaves half said
    assert agrepa.launch(Config(device="cpu"))[:2] == (0, 1)


def test_bad_audio_folders_are_met_in_words(audio, program):
    Path("empty").mkdir()
    tone(Path("short/a.wav"), 0.1)
    tone(Path("short/b.wav"), 0.1)
    for argv, words in (
        (("nowhere",), "no such folder"),
        (("empty",), "0 usable files"),
        (("short",), "no usable audio"),
        ((audio / "two", "--units", 40_000, "--codebooks", 2), "--units 40000: too many"),
        ((audio / "two", "--teacher", "WHISPER"), "--teacher WHISPER"),
        ((audio / "two", "--units", 5000), "--units 5000: too many"),
    ):
        assert words in program("--teacher", "MFCC", *argv, module=data_prep, code=2), argv


def test_runs_are_neither_overwritten_nor_changed(finished, folders, program):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    argv = flags(tiny(data=folders[2], codebooks=2))
    assert "--resume goes on with it" in program(*argv, "--out", finished, code=2)
    assert "leave out" in program("--out", finished, "--resume", "--dim", 64, code=2)
    assert all(p.read_bytes() == content for p, content in before.items())
    Path("x-1").mkdir()
    assert agrepa.unused("x") == Path("x-2")


# ---- 9, 12. sound --------------------------------------------------------------------------------


class Straight(nn.Module):
    """Straight to a known mel, of each frame's token's id; without tokens it stays where it is."""

    def forward(self, x, t, cond):
        mel = F.interpolate(cond.tokens[:, None].float(), x.shape[1], mode="nearest")
        away = mel[:, 0, :, None] - x
        return torch.where(cond.keep[:, None, None], away, 0) / (1 - t.view(-1, 1, 1))


@pytest.mark.parametrize("guidance, sway", [(1, 0), (3, 0), (1, -1), (3, -1)])
def test_sampling_along_a_straight_line(guidance, sway):
    """With guidance w, v_u + w (v_c - v_u) is w v_c here: the formula says where it ends."""
    ids, x0 = torch.randint(1, 9, (2, 8)), torch.randn(2, 15, 100)
    keep, zeros = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    cond = Condition(ids, torch.zeros(2, 15, 100), keep, zeros)
    x1 = sample(Straight(), cond, x0, nfe=7, guidance=guidance, sway=sway)
    target = F.interpolate(ids[:, None].float(), 15, mode="nearest")[:, 0, :, None]
    t, x = torch.linspace(0, 1, 8), x0
    t = t + sway * (torch.cos(torch.pi / 2 * t) - 1 + t)
    for a, b in zip(t, t[1:], strict=False):
        x = x + (b - a) * guidance * (target - x) / (1 - a)
    assert_close(x1, x, atol=1e-3, rtol=0)


def test_mel_to_wave_inverts_log_mel():
    t = torch.arange(12 * 3840) / 24_000
    wave = 0.3 * torch.sin(2 * torch.pi * 440 * t)[None] + 0.01 * torch.randn(1, len(t))
    mel = log_mel(wave)
    one, two = mel_to_wave(mel), mel_to_wave(mel, seed=1)
    assert one.shape == wave.shape and mel.shape == (1, 12 * 15, 100)
    assert (log_mel(one) - mel).abs().mean() < 0.4
    assert torch.equal(one, mel_to_wave(mel)) and not torch.equal(one, two)


def test_sample_writes_pairs_the_same_each_time(finished, program):
    found = []
    for seed in (0, 0, 1):
        argv = "--sample", finished / "last.pt", "--count", 3, "--nfe", 2, "--seed", seed
        said = program(*argv, "--out", "mine", "--seconds", 0.64)
        out = Path(said.splitlines()[-1])
        assert "s left" in said
        found.append({str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.wav")})
    kinds = {name.rsplit("/", 1)[0] for name in found[0]}
    assert kinds == {f"{d}/{k}" for d in ("one", "two") for k in ("real", "generated", "again")}
    assert found[0] == found[1]
    assert len(soundfile.read(finished / "samples/one/real/000.wav")[0]) == 63 * 256  # as trained
    for name in found[0]:
        wave, rate = soundfile.read(f"mine-3/{name}")
        assert rate == 24_000 and len(wave) == 42 * 256 and np.isfinite(wave).all()
        assert (found[0][name] == found[2][name]) == ("generated" not in name)


def test_a_sound_of_ones_own(finished, folders, program):
    """--like gives it the run's tokens and scales; it may be shorter than the run's clips."""
    tone(Path("mine/a.wav"), 0.7, seed=5)
    program("mine", "--like", folders[2][0], module=data_prep)
    theirs, own = meta_of(folders[2][0]), meta_of("prepared/mine-1")
    for k in ("mel_mean", "mel_std", "teacher_mean", "units_id"):
        assert own[k] == theirs[k]
    assert own["held_out"] == 1
    argv = "--sample", finished / "last.pt", "--nfe", 2, "--count", 1, "--data"
    out = Path(program(*argv, "prepared/mine-1").splitlines()[-1])
    assert len(soundfile.read(out / "mine" / "generated" / "000.wav")[0]) == 42 * 256
    assert "other tokens" in program(*argv, folders[1][0], code=2)


def test_the_toy_corpus_is_learned(tmp_path):
    """The beginning of `python agrepa.py`; its end, three times as far, is told in README."""
    toy = data_prep.toy(tmp_path / "toy")
    data = [prepare(toy / f"toy-{d}", tmp_path / d, tiny(units=64)) for d in ("speech", "sounds")]
    settings = {"layers": 4, "dim": 96, "heads": 4, "seconds": 1.92, "batch_size": 8, "lr": 3e-3}
    settings |= {"steps": 100, "probe_steps": 40, "probe_every": 40, "eval_every": 50}
    log = train(tiny(data=data, **settings), tmp_path / "run")["log"]
    assert log[-1]["val_fm"] < 0.6 * log[0]["val_fm"]
    assert log[-1]["val_align"] < 0.7  # about 1 where nothing is learned
