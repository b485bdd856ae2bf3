"""python -m pytest: what a user of agrepa.py relies on. No network, no checkpoint."""

import builtins
import copy
import dis
import errno
import gc
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import call
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import agrepa
import data_prep
from agrepa import (
    AlignmentHeads,
    BiTC,
    Condition,
    Config,
    PreparedFolder,
    VelocityModel,
    agrepa_loss,
    bitc_loss,
    capture,
    flow_matching_loss,
    flow_path,
    fog_a,
    interleave,
    lasp,
    log_mel,
    mel_to_wave,
    pool,
    select_layers,
    training_batches,
)

HERE = Path(agrepa.__file__).parent
torch.set_num_threads(1)  # models so small that threads would wait for each other
os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
PREP = [data_prep.__file__]
exactly = partial(assert_close, rtol=0, atol=0)


def refused(why):
    return pytest.raises(ValueError, match=why)


@pytest.fixture(autouse=True)
def alike(tmp_path, monkeypatch):
    """The same random numbers for each test, and an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    np.random.seed(0)


# ---- 1, 2. Flow matching and the velocity model ------------------------------------


def test_eqs_1_and_2():
    x0, x1, v = torch.randn(3, 2, 5, 4)
    x_t, u = flow_path(x0, x1, torch.tensor([0.3, 1]))
    assert_close(x_t, torch.stack([0.7 * x0[0] + 0.3 * x1[0], x1[1]]))
    assert_close(u, x1 - x0)
    assert_close(flow_matching_loss(v, u), (v - u).square().mean((1, 2)))
    v[1, 3:] = torch.nan
    loss = flow_matching_loss(v, u, torch.arange(5) < torch.tensor([[5], [3]]))
    assert_close(loss[1], (v[1, :3] - u[1, :3]).square().mean())
    with refused("not of the shape"):  # they would broadcast
        flow_matching_loss(v[:1], u)


def awake(module):
    """A model as if it had trained: parameters that start at zero drawn at random."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return module


def velocity_model():
    return awake(VelocityModel(4, 32, 2, dropout=0.3, vocab=(8, 16), n_mels=10))


def inputs():
    """x_t, t, Condition: four clips, the last without its tokens."""
    x_t, ref = torch.randn(2, 4, 90, 10)
    cond = Condition(torch.randint(0, 8, (4, 48)), ref, torch.arange(4) < 3, 0)
    return x_t, torch.rand(4), cond


def test_dropped_tokens_do_not_matter_and_all_else_does():
    model = velocity_model().eval()
    x_t, t, cond = inputs()
    v = model(x_t, t, cond)
    ref = cond._replace(ref=cond.ref + 1)
    for other in ((x_t + 1, t, cond), (x_t, t / 2, cond), (x_t, t, ref)):
        assert (model(*other) != v).flatten(1).any(1).all()
    tokens = cond._replace(tokens=7 - cond.tokens)
    for other in (tokens, cond._replace(domain=1)):
        differs = (model(x_t, t, other) != v).flatten(1).any(1)
        assert torch.equal(differs, cond.keep)


def test_eq_15():
    assert interleave(*torch.arange(6).view(2, 3)).tolist() == [0, 3, 1, 4, 2, 5]


# ---- 4, 5, 7. BiT-C, LASP, selection -----------------------------------------------


def test_pool_is_the_mean_without_padding():
    h = torch.randn(2, 5, 4)
    assert_close(pool(h.bfloat16()), h.bfloat16().float().mean(1))
    mask = torch.tensor([[1, 1, 0, 1, 1], [0] * 5]).bool()
    h[~mask] = torch.nan
    assert_close(pool(h, mask)[0], h[0, mask[0]].mean(0))
    assert not pool(h, mask)[1].any()
    for wrong in (torch.where(mask, 0.0, -1e9), mask[:1]):
        with refused("boolean"):
            pool(h, wrong)


def test_eqs_3_to_6():
    head = BiTC(6, 4)
    e = torch.randn(2, 5, 6, requires_grad=True)
    T_x = torch.randn(2, 4)
    z = F.layer_norm(e.mean(1), (6,))
    s = F.cosine_similarity(head.P(z), T_x)
    assert_close(head(e, T_x), s)
    assert_close(bitc_loss(s, torch.tensor([True, False])), 1 - s[0])  # one dropped
    assert bitc_loss(s, torch.tensor([False, False])) == 0
    stored = lasp({10: -e, 9: e}, head, T_x)
    exactly(stored, torch.stack([head(e, T_x), head(-e, T_x)]).detach())


def test_eqs_10_and_11():
    lam = select_layers([0.1, 0.4, 0.2, 0.4, 0.0])
    assert list(lam) == [2, 4, 3]
    assert list(lam.values()) == pytest.approx([0.4, 0.4, 0.2])
    assert list(select_layers(torch.ones(64), 5)) == [1, 2, 3, 4, 5]  # ties: shallower
    for scores, k in (([0.1, np.nan], 1), ([[0.1, 0.2]], 1), ([0.1], 2), ([0.1], 0)):
        with refused("can't choose"):
            select_layers(scores, k)
    with refused("adaLN-Zero"):
        select_layers([0.0, 0.0], 1)


# ---- 6. FoG-A: the scores of gates inside the blocks -------------------------------


H = torch.randn(2, 5, 4)  # a hidden state


class Block(nn.Module):
    """h + m f(h), the gate m to be closed by the tests."""

    def __init__(self, dim=4):
        super().__init__()
        self.f = nn.Linear(dim, dim)
        self.m = 1.0

    def forward(self, h, *others):
        return self.give(h + self.m * self.f(h).tanh())

    def give(self, h):
        return h


def three(kind=Block):
    return nn.ModuleList(kind() for _ in range(3))


def chain(blocks, step=call):
    def velocity(h):
        for block in blocks:
            h = step(block, h)
        return h

    return velocity


def distance(v_k, v):
    return (v_k - v).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)


@torch.no_grad()
def truth(velocity, blocks, *args):
    scores = []
    for block in blocks:
        block.m = 0.0
        v_k = velocity(*args)
        block.m = 1.0
        scores.append(distance(v_k, velocity(*args)))
    assert torch.stack(scores).min() > 1e-3  # there is something to compare
    return torch.stack(scores)


def assert_right(velocity, blocks, *args, **skip):
    assert_close(fog_a(velocity, blocks, *args, **skip), truth(velocity, blocks, *args))


def first_input(args, kwargs, output):
    return args[0]


def test_fog_a_of_our_model():
    model = velocity_model().train()
    x = inputs()
    found = fog_a(model, model.layers, *x)
    v = model.eval()(*x)
    for k in range(4):
        closed = copy.deepcopy(model)
        for p in closed.layers[k].modulation.parameters():
            p.data.unflatten(0, (6, 32))[[2, 5]] = 0  # adaLN's alphas
        assert_close(found[k], distance(closed(*x), v).detach(), rtol=1e-4, atol=1e-6)


class Joint(Block):
    """Two streams of one length; the last block lets one fall."""

    last = False

    def forward(self, c, h):
        new = c + self.m * self.f(h).tanh()
        return h + self.m * self.f(c).tanh(), None if self.last else new


def test_fog_a_takes_two_streams_of_one_length():
    blocks = three(Joint)
    blocks[-1].last = True

    def velocity(c, h):
        for block in blocks:
            h, c = block(c=c, h=h)
        return h

    assert_right(velocity, blocks, H, -H)


class Tuple(Block):
    def give(self, h):
        return (h,)


class Dict(Block):
    def give(self, h):
        return {"sample": h, "scale": 0.5}


class Nested(Block):
    def give(self, h):
        return [h, None], 7


@pytest.mark.parametrize("kind", [Tuple, Dict, Nested])
def test_fog_a_takes_outputs_of_any_form(kind):
    blocks = three(kind)

    def step(block, h):
        # With another tensor that lies on another device, as lengths may
        return pytree.tree_leaves(block(h, H.to("meta")[0]))[0]

    assert_right(chain(blocks, step), blocks, H)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["whole", "blocks", "checkpoint", "reentrant", "trace"]
)
def test_fog_a_takes_models_as_they_are(kind):
    blocks = three().eval()
    expected = truth(chain(blocks), blocks, H)
    velocity = chain(blocks, partial(checkpoint, use_reentrant=kind == "reentrant"))
    if kind == "whole":
        velocity = torch.compile(chain(blocks), backend="eager")
    if kind == "blocks":
        blocks = [torch.compile(block, backend="eager") for block in blocks]
        velocity = chain(blocks)
    if kind == "trace":
        blocks = [torch.jit.trace(block, H) for block in blocks]
        velocity = chain(blocks)
    v = velocity(H)
    assert_close(fog_a(velocity, blocks, H), expected)
    with pytest.raises(AttributeError):
        fog_a(lambda h: velocity(h).nothing, blocks, H)
    exactly(velocity(H), v)  # nothing is left


class Writes(Block):
    def forward(self, h):
        h += self.m * self.f(h).tanh()
        return h


def test_fog_a_takes_blocks_that_write_into_their_input():
    blocks = three(Writes)
    assert_right(lambda h: chain(blocks)(h.clone()), blocks, H)


def test_fog_a_closes_a_block_in_every_pass_of_the_model():
    blocks = three()
    run = chain(blocks)
    assert_right(lambda h, c: 3 * run(h) - 2 * run(c), blocks, H, -H)
    a, b, c = blocks
    assert_right(chain([a, b, b, c]), blocks, H)  # a block that runs twice


def normed(block, h):
    return F.layer_norm(block(h), (4,))


def written(block, h):
    return block(h).add_(1)


@pytest.mark.parametrize("step", [normed, written])
def test_fog_a_asks_where_a_caller_changes_the_state_between_blocks(step):
    blocks = three()
    velocity = chain(blocks, step)
    with refused(r"block 1 takes \[\[2, 5, 4\]\]: .*skip="):
        fog_a(velocity, blocks, H)
    assert_right(velocity, blocks, H, skip=first_input)


class Branch(Block):  # its caller adds h
    def forward(self, h):
        return self.m * self.f(h)


def test_fog_a_names_the_answer_where_the_caller_adds_h():
    blocks = three(Branch)
    velocity = chain(blocks, lambda block, h: h + block(h))
    for wrong in (None, first_input):
        with refused("block 1 .*0 [*] output, as its caller"):
            fog_a(velocity, blocks, H, skip=wrong)
    assert_right(velocity, blocks, H, skip=lambda args, kwargs, output: 0 * output)
    found = fog_a(velocity, [[block] for block in blocks], H)  # closed to zeros
    assert_close(found, truth(velocity, blocks, H))


class Merge(nn.Module):
    """A block of a U-ViT: merges an older state, and only then adds."""

    def __init__(self):
        super().__init__()
        self.merge = nn.Linear(8, 4)
        self.branch = Branch()

    def forward(self, h, older=None):
        if older is not None:
            h = self.merge(torch.cat([h, older], -1))
        self.base = h
        return h + self.branch(h)


def test_fog_a_asks_where_blocks_merge_a_long_skip_inside():
    a, b, c, d, e = blocks = [Merge() for _ in range(5)]

    def velocity(h):
        one = a(h)
        two = b(one)
        return e(d(c(two), two), one)

    with refused("block 4 .*: list its branches"):
        fog_a(velocity, blocks, H)
    branches = [block.branch for block in blocks]
    expected = truth(velocity, branches, H)
    assert_close(fog_a(velocity, [[branch] for branch in branches], H), expected)
    order = iter(blocks)
    assert_close(fog_a(velocity, blocks, H, skip=lambda *_: next(order).base), expected)


def test_fog_a_refuses_blocks_and_velocities_that_mean_nothing():
    a, b, _ = three()
    both = chain([a, b])
    noisy = chain([a, b], lambda block, h: block(h) + np.random.rand())
    for blocks, velocity, why in (
        ([a], a, "block 1 .*skip="),  # no other block tells what a closed one returns
        ([a, [nn.ModuleList([b])]], both, "block 2 never ran"),
        ([a, b], a, "block 2 never ran"),
        ([a, b], lambda h: (both(h), h), "velocity .*tuple"),
        ([a, b], lambda h: {"v": both(h)}, "velocity .*dict"),
        ([a, b], lambda h: both(h).mean(), "velocity .*v .B, ...."),
        ([a, b], noisy, "changes from pass"),
    ):
        with refused(why):
            fog_a(velocity, blocks, H)


def test_skip_must_return_the_form_of_the_output():
    blocks = three(Tuple)
    velocity = chain(blocks, lambda block, h: block(h)[0])
    assert_right(velocity, blocks, H, skip=lambda args, *_: args)
    for wrong in (first_input, lambda *_: (H[0],)):
        with refused("block 1 "):
            fog_a(velocity, blocks, H, skip=wrong)


def test_probing_leaves_no_trace():
    model = velocity_model().train()
    model.layers[2].drop.eval()
    x = inputs()
    rng = torch.get_rng_state()
    before = [dict(vars(m)) for m in model.modules()]  # training flags and hooks
    fog_a(model, model.layers, *x)
    assert [vars(m) for m in model.modules()] == before
    fails = model.layers[1].down.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fog_a(model, model.layers, *x)
    fails.remove()
    assert [vars(m) for m in model.modules()] == before
    exactly(torch.get_rng_state(), rng)


def test_random_states_of_all_devices_are_restored(monkeypatch):
    asked = []
    real = torch.random.fork_rng

    def fork_rng(devices, device_type):
        asked.extend([*devices, device_type])
        return real([])

    xpu = torch.device("xpu")
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: xpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    net = nn.Sequential(*three())
    fog_a(net, net, H)
    assert asked == [0, 1, "xpu"]


def test_fog_a_runs_in_eval_mode_and_replays_random_numbers():
    net = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), *three())
    net(H)
    buffers = copy.deepcopy(dict(net.named_buffers()))
    blocks = net[2:]
    exactly(*[fog_a(lambda h: net(h + torch.rand(())), blocks, H) for _ in range(2)])
    exactly(dict(net.named_buffers()), buffers)
    assert_close(fog_a(net.train(), blocks, H), truth(net.eval(), blocks, H))


def test_fog_a_within_inference_mode():
    net = nn.Sequential(*three(), *three(Writes))
    expected = fog_a(net, net, H)
    with torch.inference_mode():
        for h in (H, H.clone()):  # the second is made inside
            assert_close(fog_a(net, net, h), expected)
            with refused("block 1 takes .*skip="):
                fog_a(chain(net, written), net, h)


class Counts(Block):
    def forward(self, h, mask):
        alive = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        self.copies = sum(x.shape == mask.shape for x in alive)
        return super().forward(h)


def test_an_argument_that_all_blocks_share_is_copied_for_one_at_a_time():
    mask = torch.ones(77)
    found = []

    def step(block, h):
        h = block(h, mask)
        found.append(block.copies)
        return h

    blocks = three(Counts)
    fog_a(chain(blocks, step), blocks, H)
    assert max(found) == 2  # itself and one


# ---- 8. Alignment ------------------------------------------------------------------


def test_eq_12():
    lam = {3: 0.3, 1: 0.7}
    hidden = {3: torch.randn(2, 6, 8), 1: torch.randn(2, 6, 4)}
    heads = AlignmentHeads(lam, {1: 4, 3: 8}, 5)
    T_x = torch.randn(2, 3, 5)  # a target for each third of the time
    expected = 0
    for k in lam:
        z = heads[str(k)](hidden[k].unflatten(1, (3, 2)).mean(2))
        cos = F.cosine_similarity(z, T_x, dim=2)
        expected = expected + lam[k] * (1 - cos.mean(1))
    assert_close(agrepa_loss(hidden, heads, T_x, lam), expected)
    whole = agrepa_loss(hidden, heads, T_x[:, :1], lam)
    exactly(agrepa_loss(hidden, heads, T_x[:, 0], lam), whole)


def test_alignment_loss_of_a_padded_clip_is_its_own_loss():
    h = torch.randn(3, 6, 8)
    T_x = torch.randn(3, 3, 5)
    heads = AlignmentHeads([2], 8, 5)
    mask = torch.arange(6) < torch.tensor([[6], [2], [0]])

    def loss(h, T_x, mask=None):
        return agrepa_loss({2: h}, heads, T_x, {2: 1.0}, mask)

    for n in (1, 3):
        alone = loss(h[1:2, :2], T_x[1:2, :1])
        assert_close(loss(h, T_x[:, :n], mask)[1:], torch.cat([alone, torch.zeros(1)]))
    for wrong in ((h, T_x[:1]), (h[:, None], T_x), (h, T_x, mask[:, :3])):
        with refused("layer 2|mask"):  # they would broadcast
            loss(*wrong)


def test_capture_takes_states_with_gradient():
    net = nn.Sequential(*three())
    with capture((block for block in net), {3: 0.6, 1: 0.4}) as hidden:
        exactly(net(H), hidden[3])
    assert sorted(hidden) == [1, 3]
    hidden[1].sum().backward()
    assert net[0].f.weight.grad.any() and net[1].f.weight.grad is None
    with torch.no_grad(), capture(net, [2]):  # to look at, not to train
        net(H)
    with capture(net, [1]) as hidden:
        net[0](H).mul_(0)  # a caller that writes into what it got
    assert hidden[1].any()
    assert not any(module._forward_hooks for module in net)


class Pair(Block):
    def give(self, h):
        return h, 2 * h


def test_capture_takes_one_of_several_outputs():
    for kind, output in ((Pair, 1), (Dict, "sample"), (Tuple, None)):
        block = kind()
        with capture([block], [1], output) as hidden:
            returned = block(H)
        exactly(hidden[1], returned[output or 0])


def test_capture_says_what_is_wrong():
    net = nn.Sequential(*three())
    pair = Pair()
    reentrant = partial(checkpoint, net, use_reentrant=True)
    for blocks, k, run, why in (
        (net, 2, net[0], "block 2 never ran or gave no tensor .*ModuleList"),
        (net, 4, net, "no layer 4 among 3"),
        (net, 0, net, "no layer 0 among 3"),
        ([pair], 1, pair, "block 1 never ran or gave no tensor .*output=1"),
        (net, 2, chain([net, net]), "block 2 ran twice"),
        (net, 1, reentrant, "no tensor with a gradient.*use_reentrant"),
    ):
        with refused(why), capture(blocks, [k]):
            run(H.clone().requires_grad_())


# ---- The file itself ---------------------------------------------------------------

HEAD = """import contextlib, torch, torch.nn.functional as F; from torch import nn
from collections import namedtuple
from functools import partial
from torch.utils import _pytree as pytree
"""


def sections():
    """[text before the first, section 1, ...]: banners and what is below them."""
    return re.split(r"^(?=# ---- \d)", inspect.getsource(agrepa), flags=re.M)


def global_names(code):
    loads = [x for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"]
    names = {x.argval for x in loads}
    for inner in filter(inspect.iscode, code.co_consts):
        names |= global_names(inner)
    return names


@pytest.mark.parametrize("first", [6, 4])
def test_sections_run_when_pasted_alone(first):
    text = "".join(sections()[first : 7 if first == 6 else 9])
    own = {"__name__": "pasted"}
    exec(HEAD + text, own)
    missing = global_names(compile(text, "pasted", "exec")) - own.keys()
    assert not missing - vars(builtins).keys()
    net = nn.Sequential(*three())
    exactly(own["fog_a"](net, net, H), fog_a(net, net, H))


def test_tables_of_sections_and_equations_tell_the_truth():
    own = {}
    pairs = []
    rows = re.findall(r"^ ?\d+  (\S.*)", agrepa.__doc__, re.M)
    for row, text in zip(rows, sections()[1:], strict=True):
        _, *cited, names = re.split(r" {2,}", row)
        assert "".join(cited) in text.splitlines()[0]
        own["".join(cited)] = text
        pairs.append((text, names))
    readme = (HERE / "README.md").read_text()
    rows = re.findall(r"^\| (Eqs?\. .*?) \| .* \| (`.*`) \|$", readme, re.M)
    assert [cited for cited, _ in rows] == [cited for cited in own if "Eq" in cited]
    pairs += [(own[cited], names) for cited, names in rows]
    for text, names in pairs:
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(def |class |){name}\b", text, re.M), name


class DiT(nn.Module):  # in the place of F5-TTS's
    def __init__(self, dim, mel_dim, **others):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(dim) for _ in range(3))
        self.h = nn.Linear(mel_dim, dim)
        self.v = nn.Linear(dim, mel_dim)

    def forward(self, x, cond, text, time):
        return self.v(chain(self.transformer_blocks)(self.h(x + cond)))


def test_readme_recipes_run_as_they_stand(monkeypatch):
    text = (HERE / "README.md").read_text()
    monkeypatch.setitem(sys.modules, "f5_tts.model", types.SimpleNamespace(DiT=DiT))
    own = {}
    for recipe in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(recipe, own)
    assert len(own["hidden"]) == len(own["layers"]) == 3
    assert torch.isfinite(own["loss"])


# ---- What data and runs stand on ---------------------------------------------------

TINY = """--teacher MFCC --units 8 --layers 4 --dim 32 --heads 2 --seconds .96 --batch-size 4
--steps 12 --probe-steps 6 --probe-every 2 --top-k 2 --lr 3e-3 --eval-every 4
--save-every 4 --nfe 2 --count 3 --device cpu --dtype float32""".split()


def tiny(**settings):
    """A configuration that runs in a second."""
    return Config(**{**agrepa.parse(TINY), **settings})


SETTINGS = """{"teacher": "MFCC", "units_teacher": "MFCC", "units": 8, "tokens_tell": 0.7,
"held_out": 6, "teacher_dim": 12}"""


def prepared_by_hand(path, codebooks=1, seed=0):
    """30 recordings in five folders, of 3 to 11 chunks, whose tokens tell their mel."""
    rng = np.random.default_rng(seed)
    chunks = rng.integers(3, 12, 30)
    chunks[22:26] = 4  # joined, they would cross into the last six, held out
    tokens = rng.integers(0, 8, (chunks.sum(), 8))
    mel = rng.standard_normal((8, 100))[tokens.repeat(2, 1)[:, 1:]] - 5
    teacher = mel.mean(1)[:, :12] + 3
    streams = np.stack([tokens, tokens + 8][:codebooks], -1)
    path.mkdir(parents=True)
    rows = np.stack([chunks.cumsum() - chunks, chunks, np.arange(30) // 7], 1)
    np.save(path / "utterances.npy", rows)
    mel.astype("<f2").tofile(path / "mel.bin")
    streams.astype("<u2").tofile(path / "tokens.bin")
    teacher.astype("<f2").tofile(path / "teacher.bin")
    meta = json.loads(SETTINGS)
    meta.update(name=path.name, codebooks=codebooks, units_id=seed)
    meta["teacher_mean"] = teacher.mean(0).tolist()
    meta.update(mel_mean=mel.mean(), mel_std=mel.std())
    (path / "meta.json").write_text(json.dumps(meta))
    return str(path)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    return [prepared_by_hand(out / "one"), prepared_by_hand(out / "two", seed=1)]


def train(made, out, **settings):
    agrepa.train(tiny(data=made, out=out, **settings))
    return load(out)


def load(out):
    return torch.load(f"{out}/last.pt", weights_only=True)


def assert_same(a, b):
    exactly(a["objective"], b["objective"])
    exactly(a["optimiser"]["state"], b["optimiser"]["state"])


# ---- 10. Data ----------------------------------------------------------------------


def batches_of(made, step=0, rank=0, **settings):
    data = [PreparedFolder(path, 0.96, d) for d, path in enumerate(made)]
    return training_batches(data, tiny(**settings), step, rank, "cpu")


def test_a_draw_depends_on_seed_step_rank_and_domain_alone(made):
    one, other = batches_of([made[0], made[0]], 7)
    again, _ = batches_of(made, 7, steps=99, layers=5)
    exactly(pytree.tree_leaves(one), pytree.tree_leaves(again))
    others = batches_of(made, 8) + batches_of(made, 7, 1) + batches_of(made, 7, seed=1)
    noises = torch.stack([batch.x0.flatten() for batch in [one, other, *others]])
    assert torch.corrcoef(noises).triu(1).abs().max() < 0.1


def test_scales_reference_prefix_and_dropping(made):
    data = PreparedFolder(made[0], 0.96, raw_teacher=True)
    (raw,) = training_batches([data], tiny(batch_size=1000), 0, 0, "cpu")
    (batch,) = batches_of(made[:1], batch_size=1000)
    assert batch.teacher.mean().abs() < 0.1 < raw.teacher.mean().abs()
    for x in (batch.x0, batch.x1):
        assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    assert batch.t.histc(4, 0, 1).min() > 200
    ref = batch.cond.ref
    given = ref.any(2)
    lengths = given.sum(1)
    exactly(given, torch.arange(90) < lengths[:, None])
    exactly(ref[given], batch.x1[given])
    assert lengths.unique().tolist() == list(range(27))  # up to 30 %
    assert 0.1 < (lengths < 1).float().mean() < 0.17  # 10 %, and parts of a frame
    assert 0.87 < batch.cond.keep.float().mean() < 0.93


def test_no_clip_crosses_a_folder_a_long_recording_or_the_held_out_border(made):
    data = PreparedFolder(made[0], 0.96)
    _, chunks, folder = np.load(f"{made[0]}/utterances.npy").T
    owner = np.arange(30).repeat(chunks)
    right = {"training": [], "held out": []}
    for start in range(len(owner) - 5):
        clip = np.unique(owner[start : start + 6])
        joined = chunks[clip].max() < 6 and np.ptp(folder[clip]) == 0
        if len(clip) == 1 or joined:
            if clip[-1] < 24:
                right["training"].append(start)
            if clip[0] >= 24:
                right["held out"].append(start)
    assert {part: starts.tolist() for part, starts in data.starts.items()} == right


def test_folders_that_are_not_whole_are_refused(made):
    contents = []
    for name in os.listdir(made[0]):
        contents.append((name, Path(made[0], name).read_bytes()[:-200]))
    meta = json.loads(Path(made[0], "meta.json").read_text())
    for key in meta:
        less = {k: meta[k] for k in meta if k != key}
        contents.append(("meta.json", json.dumps(less).encode()))
    for name, content in contents:
        shutil.copytree(made[0], "x", dirs_exist_ok=True)
        Path("x", name).write_bytes(content)
        with refused("isn.t whole"):
            PreparedFolder("x", 0.96)


# ---- 11. Training ------------------------------------------------------------------

LAM = [{2: 1.0}, {3: 0.6, 1: 0.4}]


def objective_of(made, lam=LAM):
    metas = [PreparedFolder(path, 0.96).meta for path in made]
    objective = awake(agrepa.Objective(tiny(), metas))
    objective.align(lam)
    return objective


def trained(module):
    return [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]


def test_the_objective_has_the_terms_of_eq_12(made):
    objective = objective_of(made)
    model = objective.model
    batches = batches_of(made, batch_size=32)
    for align_pool in ("chunk", "clip"):
        objective.config.align_pool = align_pool
        expected = torch.zeros(3)
        for d, batch in enumerate(batches):
            x_t, u = flow_path(batch.x0, batch.x1, batch.t)
            with capture(model.layers, LAM[d]) as hidden:
                v = model(x_t, batch.t, batch.cond)
            clip = batch.teacher.mean(1)
            T_x = {"clip": clip, "chunk": batch.teacher}[align_pool]
            align = agrepa_loss(hidden, objective.heads[d], T_x, LAM[d])
            s = objective.bitc[d](model.tokens[d](batch.cond.tokens), clip)
            expected[0] += flow_matching_loss(v, u).mean() / 2
            expected[1] += 1 - s[batch.cond.keep].mean()
            expected[2] += align.mean() / 2
        assert_close(torch.stack(objective(batches)), expected)


def test_gradients_reach_what_the_equations_say(made):
    objective = objective_of(made)
    model = objective.model
    _, bitc, align = objective(batches_of(made, batch_size=32))
    align.backward(retain_graph=True)
    heads = [objective.heads[0]["2"], objective.heads[1]["3"], objective.heads[1]["1"]]
    for part in (*heads, *model.layers[:3], model.tokens, model.x_in):
        assert all(trained(part))
    for part in (model.layers[3], model.v_out, objective.bitc):
        assert not any(trained(part))
    objective.zero_grad()
    bitc.backward()
    assert all(trained(model.tokens) + trained(objective.bitc))


class Unread(TorchDispatchMode):
    """Fails where a tensor's value is asked for: there a program waits for the GPU."""

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        assert func._opname not in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


def updated(objective):
    groups = [{"params": list(part.parameters())} for part in objective.children()]
    agrepa.update(objective, torch.optim.AdamW(groups, fused=True), 3)
    return objective.model.state_dict()


def test_nothing_in_a_step_waits_for_the_gpu(made):
    objective = objective_of(made)
    with Unread():
        sum(objective(batches_of(made))).backward()
        updated(objective)


def test_updates_are_clipped_apart(made):
    moves = []
    for huge in (0.1, 1e5):
        torch.manual_seed(0)
        objective = objective_of(made)
        for p in objective.parameters():
            p.grad = torch.full_like(p, 0.1)
        for p in objective.heads.parameters():
            p.grad = torch.full_like(p, huge)
        moves.append(updated(objective))
    exactly(*moves)  # the heads do not shrink the model's step


def test_strategies_differ_only_from_the_selection_on(made):
    runs = {}
    for select in ("foga", "lasp", "gradnorm", "random", "none", "4,1"):
        runs[select] = train(made, select, select=select, dropout=0.1)
        for name in ("probe.csv", "log.csv"):
            one, other = (open(f"{run}/{name}") for run in (select, "foga"))
            assert one.readlines()[:4] == other.readlines()[:4]
        layers = json.loads(Path(select, "layers.json").read_text())
        for lam, entry in zip(runs[select]["lam"], layers.values(), strict=True):
            best = 1 + np.argsort(entry.get(select, [0]))[::-1][:2]
            chosen = {"random": lam, "none": [], "4,1": [4, 1]}
            assert set(lam) == set(chosen.get(select, best))
            if select != "foga":
                assert set(lam.values()) <= {1 / 2}
    once = train(made, "once", select="none", dropout=0.1, probe_every=6)
    assert list(once["probes"]) == [6] and list(runs["none"]["probes"]) == [2, 4, 6]
    assert_same(once, runs["none"])  # probing changes nothing


def test_compiled_layers_train_alike(made, monkeypatch):
    plain = train(made, "plain")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = train(made, "compiled", compile=True)
    assert_close(plain["objective"], compiled["objective"], rtol=1e-2, atol=1e-3)


def test_a_loss_that_is_not_finite_ends_in_words(made):
    with refused("finite"):
        train(made, "run", lr=1e9, select="4")
    assert load("run")["step"] < 12


def cli(*argv, cwd=".", **env):
    run = [sys.executable, *map(str, argv)]
    env = {**os.environ, **env}
    done = subprocess.run(run, capture_output=True, text=True, cwd=cwd, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_two_processes_average_their_gradients(made, monkeypatch):
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", agrepa.__file__]
    cli(*torchrun, "--data", *made, *TINY, "--out", "two")
    assert len(list(Path("two").glob("samples/*/*/*.wav"))) == 12  # to the end

    def both(data, config, step, rank, device):
        return [training_batches(data, config, step, r, device) for r in range(2)]

    def averaged(objective):
        return lambda pair: sum(torch.stack(objective(batches)) for batches in pair) / 2

    monkeypatch.setattr(agrepa, "training_batches", both)
    monkeypatch.setattr(agrepa, "distributed", averaged)
    one = train(made, "one")
    two = load("two")
    assert_close(two["objective"], one["objective"], rtol=1e-3, atol=1e-4)


def test_killed_runs_end_bit_for_bit(made):
    argv = [
        "--data",
        *made,
        *TINY,
        "--steps=40",
        "--probe-steps=20",
        "--dropout=.1",
    ]
    whole = train(made, "whole", steps=40, probe_steps=20, dropout=0.1)
    code = """
import os, sys, agrepa
_, name, left, *sys.argv = sys.argv
real = eval(name)
def ends(*args):
    global left
    left = int(left) - 1
    if left < 0:
        os.kill(os.getpid(), 9)
    return real(*args)
exec(name + " = ends")
agrepa.guarded(agrepa.main)"""

    def killed(name, after, *argv):
        """Runs the program, which dies as it calls a function for so many times."""
        done = cli("-c", code, name, after, "agrepa.py", *argv)
        assert done.returncode == -9, done.stderr
        return load("run")["step"]

    resume = ["--resume", "run"]
    assert killed("agrepa.update", 10, *argv, "--out", "run") == 8  # phase I
    assert killed("agrepa.end_phase1", 0, *resume) == 20  # at the choice
    assert killed("os.replace", 1, *resume) == 24  # phase II, beside half a checkpoint
    cli(agrepa.__file__, *resume)
    found = load("run")
    assert_same(whole, found)
    assert found["probes"] == whole["probes"] and found["lam"] == whole["lam"]
    for name in ("log.csv", "probe.csv"):
        one, other = (open(f"{run}/{name}") for run in ("whole", "run"))
        assert one.read() == other.read()
    weights = found["objective"]  # and their moving average is another
    assert (weights["average.v_out.weight"] != weights["model.v_out.weight"]).any()


# ---- 9, 12, 13. Sound, picture, command line ---------------------------------------


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run to its end, by agrepa.py alone in its folder."""
    where = tmp_path_factory.mktemp("finished")
    shutil.copy(HERE / "agrepa.py", where)
    prepared_by_hand(where / "one", codebooks=2)
    prepared_by_hand(where / "two", codebooks=2, seed=1)
    argv = [*TINY, "--codebooks", 2, "--data", "one", "--data", "two"]  # both
    said = cli("agrepa.py", *argv, cwd=where).stdout
    assert said.count("try another --units-teacher") == 2  # tokens tell .7
    assert said.count("of these 2 layers led at half of phase I") == 2
    return where / "runs/one+two-1"


@pytest.fixture
def program(monkeypatch, capfd):
    """Runs a command line -> what it says."""

    def run(*argv, module=agrepa, code=0):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
        found = 0
        try:
            agrepa.guarded(module.main)
        except SystemExit as stop:
            found = stop.code
        said = capfd.readouterr()
        assert found == code, said
        if code:
            assert said.err.count("\n") == 1, said  # a line, no traceback
        return said.out + said.err

    return run


def test_a_run_writes_its_folder(finished):
    files = {"log.csv", "probe.csv", "layers.json", "last.pt", "samples"}
    assert files <= set(os.listdir(finished))
    numbers = partial(np.genfromtxt, delimiter=",", names=True)
    log = numbers(finished / "log.csv")
    columns = "step", "fm", "bitc", "align", "val_fm", "val_align"
    assert log.dtype.names == columns and log["step"].tolist() == [0, 4, 6, 8, 12]
    assert log["align"][2] == 0 < log["align"][4] and log["val_fm"].argmin() == 4
    foga = numbers(finished / "probe.csv")["foga"].reshape(3, 2, 4)
    layers = json.loads((finished / "layers.json").read_text())
    for entry, late in zip(layers.values(), foga[1:].mean(0), strict=True):
        assert entry["foga"] == pytest.approx(late)
        lam = select_layers(late, 2)
        assert entry["layers"] == list(lam)
        assert entry["weights"] == pytest.approx(list(lam.values()))


def test_sampling_twice_gives_the_same_sounds(finished, program):
    found = []
    for seed in (0, 0, 1):
        argv = ["--sample", finished / "last.pt", "--seed", seed, "--seconds", 0.64]
        out = Path(program(*argv, "--out", "mine").splitlines()[-1])
        paths = sorted(out.rglob("*.wav"))
        found.append(np.stack([soundfile.read(path)[0] for path in paths]))
    one, again, other = found
    assert one.shape == (12, 42 * 256) and (one == again).all()
    generated = ["generated" in str(path) for path in paths]
    assert (one != other).any(1).tolist() == generated


def straight(x, t, cond):
    """Straight to a mel of ones; without tokens it stays where it is."""
    return (1 - x) * cond.keep[:, None, None] / (1 - t.view(-1, 1, 1))


def test_sampling_along_a_straight_line():
    """With guidance w, v_u + w (v_c - v_u) is w v_c here."""
    x = torch.randn(2, 15, 100)
    cond = Condition(None, None, torch.ones(2) > 0, 0)
    found = agrepa.sample(straight, cond, x, nfe=7, guidance=3, sway=-1)
    t = 1 - torch.cos(torch.pi / 2 * torch.linspace(0, 1, 8))
    for i in range(7):
        x = x + (t[i + 1] - t[i]) * 3 * (1 - x) / (1 - t[i])
    assert_close(found, x, atol=1e-3, rtol=1e-3)


def test_mel_to_wave_inverts_log_mel():
    wave = 0.1 * torch.randn(1, 8 * 3840)
    mel = agrepa.log_mel(wave)
    one = mel_to_wave(mel)
    assert_close(agrepa.log_mel(0 * wave), torch.full_like(mel, 1e-5).log())
    assert one.shape == wave.shape and mel.shape == (1, 120, 100)
    assert (agrepa.log_mel(one) - mel).abs().mean() < 0.4
    exactly(one, mel_to_wave(mel))


BAD = """
--top-k 20 | --top-k 20 but the model has 12 layers
--select 4,40 | --select 4,40
--batch-size 0 | --batch-size 0
--batch-size 3 | --batch-size 3
--probe-steps 100 --steps 50 | --steps 50
--dim 33 | --dim 33
--lr nan | --lr nan
--dropout 2 | dropout
--align-pool all | --align-pool
--device tpu | --device
--dtype int8 | --dtype
--steps many | --steps
--nonsense | --nonsense
--data | expected at least one argument
--seconds 99 | --seconds
--data ONE --batch-size 15 | one name
--data nowhere --batch-size 15 | nowhere
--resume nothing | --resume doesn't go with
--sample nothing.pt --lr 1 | --sample doesn't go with
"""


def test_bad_input_is_met_in_a_line(made, program, monkeypatch):
    monkeypatch.delattr(agrepa, "update")  # it must not train
    for line in BAD.strip().splitlines():
        argv, words = line.split(" | ")
        argv = argv.replace("ONE", made[0]).split()
        assert words in program("--seconds=.96", "--data", *made, *argv, code=2), line
    for flag in ("--resume", "--sample"):
        assert "No such file" in program(flag, "nothing", code=2)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert "torchrun" in program("--data", made[0], code=2)


def test_foreign_and_damaged_checkpoints_are_met_in_a_line(finished, program):
    state = load(finished)
    contents = [[1], {**state, "config": {**state["config"], "dim": 64}}]
    for key in state:
        contents.append({**state})
        del contents[-1][key]
    Path("run").mkdir()
    for content in contents:
        torch.save(content, "run/last.pt")
        assert "run/last.pt" in program("--resume", "run", code=2)
    for content in (b"la la la", (finished / "last.pt").read_bytes()[:9999], b""):
        Path("run/last.pt").write_bytes(content)
        assert "run/last.pt" in program("--sample", "run/last.pt", code=2)


def test_other_data_than_the_runs(finished, made, program):
    shutil.copytree(finished, "run")
    home = finished.parent.parent
    shutil.copytree(home / "one", "one")
    assert "data are others" in program("--resume", "run", "--data", *made, code=2)
    program("--resume", "run", "--data", "one", home / "two")  # it may move
    assert "File exists" in program(*TINY, "--data", "one", "--out", "run", code=2)
    argv = ["--sample", "run/last.pt", "--data"]
    assert "run/samples-1" in program(*argv, "one")
    assert "File exists" in program(*argv, "one", "one", code=2)
    assert "pip install vocos" in program(*argv, "one", "--vocoder", "vocos", code=2)
    prepared_by_hand(Path("other"), codebooks=2, seed=2)
    assert "other tokens" in program(*argv, "other", code=2)


def test_runs_started_at_once_get_a_folder_each():
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(agrepa.new_folder, ["a"] * 40))
    assert len(found) == 40


# ---- 3. Teachers and data_prep.py ---------------------------------------------------


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
        rate = (16_000, 44_100)[i % 2]
        path = root / "one" / f"s{i % 3}" / f"{i}.flac"
        tone(path, 1 + 0.3 * (i % 4), rate, 1 + i % 2, i)
        tone(root / "two" / f"{i}.wav", 0.4 + 0.4 * (i % 5), 22_050, 1, 100 + i)
    return root


def prepare(source, out, config=None, **how):
    return str(data_prep.prepare(Path(source), Path(out), config or tiny(), **how))


@pytest.fixture(scope="session")
def folders(audio, tmp_path_factory):
    """{codebooks: [prepared folder, prepared folder]}"""
    out = tmp_path_factory.mktemp("prepared")
    found = {1: [], 2: []}
    for n, prepared in found.items():
        for name in ("one", "two"):
            config = tiny(codebooks=n)
            prepared.append(prepare(audio / name, out / f"{name}-{n}", config))
    return found


def meta_of(folder):
    return json.loads(Path(folder, "meta.json").read_text())


def skipped_of(folder):
    return {entry["path"]: entry["reason"] for entry in meta_of(folder)["skipped"]}


def lines_of(folder):
    lines = Path(folder, "files.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def arrays(folder):
    names = (*data_prep.ARRAYS, "units.npy", "utterances.npy")
    return {name: Path(folder, name).read_bytes() for name in names}


def read(path):
    """-> a file's pieces, and why it can't be used."""
    skipped = {}
    pieces = list(data_prep.pieces_of(path.parent, path.name, skipped))
    return pieces, skipped.get(path.name)


def test_hubert_bundle_end_to_end(audio, tmp_path, monkeypatch):
    """The real checkpoint's format and file name; layers above the ninth are NaN."""
    net = torchaudio.models.hubert_base()
    for p in net.encoder.transformer.layers[9:].parameters():
        p.data.fill_(float("nan"))
    file = tmp_path / "hub" / "checkpoints" / "hubert_fairseq_base_ls960.pth"
    file.parent.mkdir(parents=True)
    torch.save(net.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = tiny(teacher="HUBERT_BASE")
    out = prepare(audio / "one" / "s0", tmp_path / "out", config)
    teacher = PreparedFolder(out, 0.48).teacher
    assert teacher.shape[1] == 768 and np.isfinite(teacher).all()
    assert teacher[:].std() > 0
    file.write_text("<html>no such page</html>")  # what a proxy leaves in its place
    with pytest.raises(
        ValueError, match=f"--teacher HUBERT_BASE: .*{tmp_path}/hub; delete"
    ):
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
    "return x.numpy()": None,
    "return x.clone().requires_grad_()": None,
    "import types; return types.SimpleNamespace(last_hidden_state=x)": None,
    "return torch.complex(x, x)": "load: .*complex",
    "return x / (self.calls != 2)": None,  # no numbers at first
    "return 1e9 * x": "first .*flac: gives features that aren't finite",
    "assert self.calls < 3, 'too long a sound'; return x": "load: .*too long",
    "return x[:, 1:]": r"load: .*not reals .* a width",
    "return 'words'": "load: .*Error",
    "raise KeyError('a', 'b')": "--teacher .*load: KeyError",
    "raise SystemExit('no licence')": "--teacher .*load: SystemExit: no licence",
    "raise StopIteration": "--teacher .*load: StopIteration",
}


@pytest.mark.parametrize("body", ANSWERS)
def test_teachers_of_the_users_own(body, audio, tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    file = tmp_path / "mine.py"
    file.write_text(TEACHER % body)
    config = tiny(teacher=f"{file}:load", units_teacher=f"{file}:load", units=4)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if ANSWERS[body]:
        with pytest.raises(ValueError, match=ANSWERS[body]):
            prepare(audio / "one", tmp_path / "out", config)
        return
    data = PreparedFolder(prepare(audio / "one", tmp_path / "out", config), 0.48)
    assert data.teacher.shape[1] == 5 and len(np.unique(data.tokens)) == 4
    file.write_text(TEACHER % "return x**2")
    with pytest.raises(ValueError, match="of other audio or settings"):
        prepare(audio / "one", tmp_path / "out", config)


def test_teachers_of_one_name_that_print(audio, tmp_path):
    """Also in C, and at exit; --like finds them from elsewhere, or says what it wants."""
    teach = "import atexit, os\nprint(1)\nos.system('echo 2')\n"
    teach += "atexit.register(print, 'goodbye')\natexit.register(os.system, 'echo 3')\n"
    teach += "def load(): return lambda wave: wave.unfold(1, 320, 320)[..., :%d]"
    for width, folder in ((5, "a"), (7, "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(teach % width)
    argv = audio / "one", "--out=out", "--units=4", "--teacher=a/mine.py:load"
    done = cli(*PREP, *argv, "--units-teacher=b/mine.py:load", cwd=tmp_path)
    assert done.stdout == "out\n"
    assert np.load(tmp_path / "out" / "units.npy").shape == (4, 7)
    like = audio / "two", "--like", "../out", "--out"
    assert cli(*PREP, *like, "x", cwd=tmp_path / "a").stdout == "x\n"
    shutil.rmtree(tmp_path / "b")
    done = cli(*PREP, *like, "y", cwd=tmp_path / "a")
    assert done.returncode == 2 and f"{tmp_path}/b/mine.py" in done.stderr


@pytest.mark.parametrize("rate", [16_000, 44_100, 16_001])
def test_a_click_lands_in_its_chunk_of_mel_and_teacher(tmp_path, rate):
    at = 5 * agrepa.CHUNK + 7 * 256 / 24_000  # chunk 5, frame 7
    x = np.random.default_rng(0).standard_normal(2 * rate) * 1e-4
    x[round(at * rate)] = 0.9
    soundfile.write(tmp_path / "x.wav", x, rate, "FLOAT")
    ((low, high),) = read(tmp_path / "x.wav")[0]
    mel = log_mel(high[None])[0]
    assert mel.sum(1).argmax() == 5 * 15 + 7
    loudness = data_prep.mfcc(low[None])[0, :, 0]
    chunks = loudness.unflatten(0, (-1, 8)).mean(1)
    assert chunks.argmax() == 5


def test_rows_hold_mel_chunk_means_and_nearest_units(folders, audio):
    folder = Path(folders[2][0])
    data = PreparedFolder(folder, 0.48)
    units = torch.from_numpy(np.load(folder / "units.npy"))
    line, *_ = lines_of(folder)
    n = line["chunks"]
    ((low, high),) = read(audio / "one" / line["path"])[0]
    mel = log_mel(high[None])
    x = data_prep.mfcc(low[None])[0]
    stored = torch.tensor(data.mel[:n])
    assert_close(stored.reshape(-1, 100), mel[0].half())
    means = x.unflatten(0, (n, 8)).mean(1)
    teacher = torch.tensor(data.teacher[:n])
    assert_close(teacher, means.half(), atol=0.05, rtol=0.01)
    at_50 = F.interpolate(mel.mT, len(x), mode="area")[0].T
    semantic = torch.cdist(x, units[:, :39]).argmin(1)
    acoustic = torch.cdist(at_50, units[:, 39:]).argmin(1)
    tokens = torch.tensor(data.tokens[:n].astype(int))
    assert torch.equal(tokens.flatten(), interleave(semantic, 8 + acoustic))


def unusable(folder):
    """-> {file: a word of why it can't be used}"""
    x = np.zeros(24_000, np.float32)
    x[500] = np.nan
    soundfile.write(folder / "nan.wav", x, 24_000, "FLOAT")
    x[500] = 1e38
    soundfile.write(folder / "huge.wav", x, 24_000, "FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(24_000), 24_000)
    soundfile.write(folder / "short.wav", np.ones(2000), 24_000)
    soundfile.write(folder / "slow.wav", np.linspace(-1, 1, 9000), 1)
    (folder / "text.wav").write_text("not audio")
    (folder / "voice.m4a").write_bytes(b"x" * 9999)
    os.mkfifo(folder / "pipe.wav")
    return {
        "huge.wav": "1e+38",
        "nan.wav": "nan",
        "pipe.wav": "no file",
        "short.wav": "short",
        "silent.wav": "silent",
        "slow.wav": "1 Hz",
        "text.wav": "can't be read",
        "voice.m4a": "ffmpeg",
    }


def test_unusable_files_are_skipped_and_listed(tmp_path, audio):
    folder = shutil.copytree(audio / "one" / "s0", tmp_path / "in")
    words = unusable(folder)
    words["copy of 3.flac"] = "the content of 3.flac"
    shutil.copy(folder / "3.flac", folder / "copy of 3.flac")
    (folder / "loop").symlink_to(folder)
    (folder / "._3.flac").write_text("hidden")
    tone(folder / "tiny.ogg", 0.17, 48_000)
    tone(folder / "some.mp3", 3, 44_100, 2)
    before = sorted(folder.iterdir())
    out = prepare(folder, tmp_path / "out")
    why = skipped_of(out)
    assert why.keys() == words.keys()
    assert all(words[name] in why[name] for name in words), why
    assert np.isfinite(PreparedFolder(out, 0.48).mel).all()
    assert sorted(folder.iterdir()) == before


def test_lengths_come_from_what_is_read(tmp_path):
    """Headers that guess or don't know, and formats that can't seek."""
    x = soundfile.read(tone(tmp_path / "x.flac", 3, 48_000))[0]
    content = bytearray((tmp_path / "x.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # a stream whose length was not known when it began
    (tmp_path / "streamed.flac").write_bytes(content)
    soundfile.write(tmp_path / "phone.wav", x[::6], 8000, "GSM610")
    for name in ("streamed.flac", "phone.wav"):
        ((low, _),) = read(tmp_path / name)[0]
        assert len(low) in (18 * 2560, 19 * 2560), name  # GSM comes in whole frames
    pieces, _ = read(tone(tmp_path / "odd.wav", 60, 11_127))
    assert sum(len(low) for low, _ in pieces) >= 374 * 2560
    first = tone(tmp_path / "1.mp3", 20).read_bytes()
    second = tone(tmp_path / "2.mp3", 50).read_bytes()
    (tmp_path / "joined.mp3").write_bytes(first + second)
    head, body = tone(tmp_path / "w.wav", 3).read_bytes().split(b"data", 1)
    (tmp_path / "crashed.wav").write_bytes(head + b"data" + bytes(4) + body[4:])
    for name in ("joined.mp3", "crashed.wav"):
        _, reason = read(tmp_path / name)
        assert "longer than its header says" in reason, name


def test_channels_that_cancel_each_other_out():
    x = np.random.default_rng(0).standard_normal((9, 1))
    assert_close(data_prep.mono(np.hstack([x, -x])), x[:, 0])
    assert_close(data_prep.mono(np.hstack([x, 3 * x])), 2 * x[:, 0])


def test_preparation_that_ended_early_goes_on(tmp_path, audio, monkeypatch):
    """A drive that is away for a moment is no verdict on a file; a kill leaves half a row.
    Meanwhile the audio is touched, copied and mounted elsewhere."""
    monkeypatch.setattr(data_prep, "GROUP", 0.1)
    real = data_prep.Checked.readinto
    calls = []

    def gone(file, buffer):
        calls.append(file)
        if len(calls) > 220:
            file.error = OSError("no such device")
            return 0
        return real(file, buffer)

    with monkeypatch.context() as m:
        m.setattr(data_prep.Checked, "readinto", gone)
        with pytest.raises(OSError, match="no such device"):
            prepare(audio / "one", tmp_path / "out")
    part = tmp_path / "out.partial"
    assert 0 < len(lines_of(part)) < 14
    with open(part / "mel.bin", "ab") as rows, open(part / "files.jsonl", "a") as log:
        rows.write(b"half a row")
        log.write('{"path": "half a li')
    moved = shutil.copytree(audio / "one", tmp_path / "mount" / "moved")
    os.utime(next(moved.rglob("*.flac")), (0, 0))
    out = prepare(moved, tmp_path / "out", name="mine")
    assert meta_of(out)["name"] == "mine" and not meta_of(out)["skipped"]
    assert arrays(out) == arrays(prepare(audio / "one", tmp_path / "at-once"))
    assert prepare(audio / "one", tmp_path / "out") == out  # found again


def test_preparations_do_not_mix(tmp_path, audio, monkeypatch):
    part = tmp_path / "out.partial"
    part.mkdir()
    with open(part / ".lock", "w") as file:
        data_prep.lock(file)
        with pytest.raises(ValueError, match="in use by another process"):
            prepare(audio / "one", tmp_path / "out")
    (part / "files.jsonl").write_text('{"units": 9}\n{"path": "x", "chunks": 1}\n')
    with pytest.raises(ValueError, match="partial is of other audio or settings"):
        prepare(audio / "one", tmp_path / "out")
    first = prepare(audio / "one", tmp_path / "mine")
    with pytest.raises(ValueError, match="mine is of other audio .*--out"):
        prepare(audio / "two", tmp_path / "mine")
    assert prepare(audio / "one", tmp_path / "mine") == first


@pytest.mark.parametrize("kind", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "no fcntl"])
def test_without_locks_it_goes_on(kind, tmp_path, audio, monkeypatch, capsys):
    def flock(*_):
        raise OSError(getattr(errno, kind), "as such a file system answers")

    if kind == "no fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", flock)
    prepare(audio / "two", tmp_path / "out")
    assert capsys.readouterr().out.count("no locks here") == 1


@pytest.mark.parametrize("name", ["mel.bin", "tokens.bin", "files.jsonl"])
@pytest.mark.parametrize("call", [3, 14])
def test_two_writers_are_noticed(name, call, tmp_path, audio, monkeypatch):
    """Where locks don't hold: what another one wrote is never published."""
    real = data_prep.rows_of
    calls = []

    def while_another_writes(*piece):
        calls.append(piece)
        if len(calls) == call:
            with open(tmp_path / "out.partial" / name, "ab") as file:
                file.write(b"{}\n")
        return real(*piece)

    monkeypatch.setattr(data_prep, "rows_of", while_another_writes)
    with pytest.raises(ValueError, match="two processes wrote .*delete it"):
        prepare(audio / "two", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_open_in_a_folder_that_is_renamed(tmp_path, audio, monkeypatch):
    real = os.replace  # Windows would refuse

    def replace(old, new):
        opened = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
        opened += Path("/proc/self/maps").read_text().splitlines()
        assert not [path for path in opened if str(old) in path]
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    prepare(audio / "two", tmp_path / "out")


def test_held_out_are_whole_folders_where_there_are_enough(capfd):
    chapters = {}
    for i in range(1350):
        chapters[f"train/{i % 45}/{i}.wav"] = 40
    held = data_prep.hold_out(chapters)
    of = {str(Path(path).parent) for path in held}
    assert held == {path for path in chapters if str(Path(path).parent) in of}
    assert 0.02 <= len(held) / len(chapters) <= 0.1
    parts = {"train-clean/1.wav": 20, "dev-clean/2.wav": 9, "test-other/3.wav": 9}
    assert data_prep.hold_out(parts) == {"dev-clean/2.wav", "test-other/3.wav"}
    assert "47%" in capfd.readouterr().out
    with pytest.raises(ValueError, match="most audio is in dev"):
        data_prep.hold_out({"test-recordings/a.wav": 30, "b.wav": 3})


def test_siblings_and_copies_are_known_before_files_are_held_out(
    tmp_path, audio, folders
):
    siblings = {f"{i // 2}.{'wav' if i % 2 else 'flac'}": 40 + i for i in range(80)}
    held = data_prep.hold_out(siblings)
    stems = [path.split(".")[0] for path in held]
    assert held and all(stems.count(s) == 2 for s in stems)
    assert (
        len(data_prep.hold_out({"a.wav": 9, "a.mp3": 2, "b.wav": 5, "b.mp3": 1})) == 2
    )
    twice = shutil.copytree(audio / "two", tmp_path / "in")
    shutil.copytree(audio / "two", twice / "backup")
    out = prepare(twice, tmp_path / "out")
    assert arrays(out) == arrays(folders[1][1])
    assert skipped_of(out)["backup/3.wav"] == "has the content of 3.wav"
    assert len(skipped_of(out)) == 14


@pytest.fixture
def listened(monkeypatch):
    """How many pieces were heard at once, each time."""
    counts = []
    real = data_prep.listen

    def listen(pieces, teachers):
        counts.append(len(pieces))
        return real(pieces, teachers)

    monkeypatch.setattr(data_prep, "listen", listen)
    return counts


@pytest.fixture(scope="session")
def minutes(tmp_path_factory):
    """Three recordings of a minute, three pieces each."""
    folder = tmp_path_factory.mktemp("minutes")
    for i in range(3):
        tone(folder / f"{i}.wav", 60, 16_000, seed=i)
    return folder


def test_units_are_of_many_recordings(minutes, listened, tmp_path):
    """Not of one long one alone; the files' next pieces where they run out."""
    config = tiny(units=80)  # 3,200 frames, a piece has 1,280
    assert meta_of(prepare(minutes, tmp_path / "out", config))["units_recordings"] == 2
    assert listened[:2] == [2, 2]
    few = prepare(minutes, tmp_path / "few")  # 320 frames
    assert meta_of(few)["units_recordings"] == 2


def test_long_files_are_heard_in_pieces_and_are_one_recording(minutes, tmp_path):
    out = Path(prepare(minutes, tmp_path / "out"))
    assert np.load(out / "utterances.npy")[:, 1].tolist() == [375, 375, 375]
    path = minutes / lines_of(out)[0]["path"]
    x, _ = soundfile.read(path, dtype="float32")
    wave = torchaudio.functional.resample(torch.tensor(x), 16_000, 24_000)
    whole = log_mel(wave[None])[0]
    stored = np.fromfile(out / "mel.bin", "<f2").reshape(-1, 100)
    difference = torch.tensor(stored[2370:2430]) - whole[2370:2430]  # at a seam
    assert difference.abs().mean() < 0.1


def test_bad_audio_folders_are_met_in_words(audio, program):
    Path("empty").mkdir()
    tone(Path("short/a.wav"), 0.1, seed=1)
    tone(Path("short/b.wav"), 0.1, seed=2)
    Path("closed").mkdir()
    Path("closed/x.m4a").write_bytes(b"x")
    for argv, words in (
        (("nowhere",), "no such folder"),
        (("empty",), "0 usable files"),
        (("closed",), "first x.m4a: libsndfile can't open it"),
        (("short",), "wav: is too short"),
        (
            (audio / "two", "--units", 40_000, "--codebooks", 2),
            "--units 40000: too many",
        ),
        ((audio / "two", "--teacher", "WHISPER"), "--teacher WHISPER"),
    ):
        assert words in program("--teacher", "MFCC", *argv, module=data_prep, code=2), (
            argv
        )


def test_domains_of_one_folder_name_and_any_locale(audio, tmp_path):
    """Optimised, too: docstrings are gone."""
    folder = shutil.copytree(audio / "two", tmp_path / "wavs\udce9")
    os.rename(folder / "3.wav", folder / "\udce9.wav")
    argv = folder, "--teacher", "MFCC", "--units", "4"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = cli("-OO", *PREP, *argv, "--name", "LJ", cwd=tmp_path, **locale)
    assert done.stdout == "prepared/LJ-1\n", done.stderr
    assert meta_of(tmp_path / "prepared" / "LJ-1")["name"] == "LJ"


def test_a_sound_of_ones_own(folders, program):
    """--like gives it the run's tokens and scales."""
    tone(Path("mine/a.wav"), 0.7, seed=5)
    program("mine", "--like", folders[2][0], module=data_prep)
    own = meta_of("prepared/mine-1")
    for key in ("mel_mean", "mel_std", "teacher_mean", "units_id", "codebooks"):
        assert own[key] == meta_of(folders[2][0])[key]
    assert own["held_out"] == 1 and own["name"] == "mine"
