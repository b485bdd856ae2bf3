"""python -m pytest: what a user of agrepa.py relies on. No network, no checkpoint; a few minutes on two cores."""

import copy, csv, json, os, random, re, shutil, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn as nn

import agrepa
import data_prep
from agrepa import *
from data_prep import log_mel, resynthesise

HERE = Path(agrepa.__file__).parent


# ---- what the tests stand on -----------------------------------------------------------------------------------------


def awake(module, std=0.05):
    """A model as if it had trained: zero-initialised gates and outputs drawn at random."""
    torch.manual_seed(5)
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=std)
    return module


def tone(path, seconds, rate=24_000, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    x = 0.3 * np.sin(
        2 * np.pi * rng.uniform(150, 900) * t * (1 + 0.1 * t)
    ) + 0.05 * rng.standard_normal(len(t))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(x[:, None], channels, 1), rate)
    return path


@pytest.fixture(scope="session")
def audio(tmp_path_factory):
    """Two small folders of audio, of several rates, channel counts and lengths."""
    root = tmp_path_factory.mktemp("audio")
    for i in range(14):
        tone(
            root / "one" / f"s{i % 3}" / f"{i}.flac",
            1 + 0.3 * (i % 4),
            (16_000, 44_100)[i % 2],
            1 + i % 2,
            i,
        )
        tone(root / "two" / f"{i}.wav", 0.4 + 0.4 * (i % 5), 22_050, 1, 100 + i)
    return root


def tiny(**kw):
    return Config(
        **{
            **dict(
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
            ),
            **kw,
        }
    )


@pytest.fixture(scope="session")
def folders(audio, tmp_path_factory):
    """{codebooks: [prepared folder, prepared folder]}"""
    out = tmp_path_factory.mktemp("prepared")
    return {
        c: [
            str(data_prep.prepare(audio / d, out / f"{d}-{c}", tiny(codebooks=c)))
            for d in ("one", "two")
        ]
        for c in (1, 2)
    }


def setting(folders, codebooks=1, **kw):
    config = tiny(codebooks=codebooks, data=folders[codebooks], **kw)
    data = [BlockDataset(d) for d in config.data]
    torch.manual_seed(0)
    model = awake(agrepa.build(config, [d.meta for d in data]))
    bitc = nn.ModuleList(BiTC(config.dim, d.dim) for d in data)
    return config, data, model, bitc


def run(config, out, resume=None):
    out.mkdir(exist_ok=True)
    return train(dataclasses.replace(config, out=str(out)), resume)


def table(path):
    with open(path) as f:
        return list(csv.DictReader(f))


def tensors(x, at=""):
    if torch.is_tensor(x):
        yield at, x
    elif isinstance(x, (dict, list)):
        for k, y in x.items() if isinstance(x, dict) else enumerate(x):
            yield from tensors(y, f"{at}/{k}")


# ---- sections 1, 2, 6: the model, and FoG-A twice ----------------------------------------------------------------------


def test_path_starts_at_noise_ends_at_data_and_moves_at_u():
    x0, x1, t = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.tensor([0.2, 0.7])
    assert torch.equal(flow_path(x0, x1, torch.zeros(2))[0], x0) and torch.allclose(
        flow_path(x0, x1, torch.ones(2))[0], x1
    )
    a, u = flow_path(x0, x1, t)
    b, _ = flow_path(x0, x1, t + 0.1)
    assert torch.allclose((b - a) / 0.1, u, atol=1e-5)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    assert torch.allclose(flow_matching_loss(u * 0, u, mask)[1], u[1, :2].square().mean())


@pytest.mark.parametrize("codebooks", [1, 2])
@pytest.mark.parametrize("at", [0.05, 0.5, 0.95])
def test_one_pass_ablation_equals_closing_gates_one_at_a_time(folders, codebooks, at):
    config, data, model, _ = setting(folders, codebooks, dropout=0.3)
    batch = make_batch(data, config, 3, 1)
    assert batch.cond.mask is not None  # padding is part of what must agree
    t = torch.full_like(batch.t, at)
    x_t, _ = flow_path(batch.x0, batch.x1, t)
    v, v_k = model.train().ablate_each_layer(x_t, t, batch.cond)
    assert model.training
    model.eval()
    with torch.no_grad():
        assert torch.allclose(v, model(x_t, t, batch.cond), atol=1e-5)
        for k, layer in enumerate(model.layers):
            hook = layer.register_forward_hook(lambda layer, args, out: args[0])
            assert torch.allclose(
                v_k[k], model(x_t, t, batch.cond), atol=1e-5
            ) and not torch.allclose(v_k[k], v, atol=1e-3)
            hook.remove()
    scores = fog_a(model.train(), list(model.layers), x_t, t, batch.cond)
    assert torch.allclose(
        scores, relative_change(v, v_k), rtol=1e-4, atol=1e-6
    ) and scores.shape == (4, 6)


def test_fog_a_closed_form_on_a_linear_residual_network():
    class Linear(nn.Module):
        def __init__(self, A):
            super().__init__()
            self.A = A

        def forward(self, h):
            return h + h @ self.A.T

    torch.manual_seed(1)
    A = [0.3 * torch.randn(6, 6) for _ in range(3)] + [
        torch.zeros(6, 6)
    ]  # the last layer is the identity
    net = nn.Sequential(*map(Linear, A))
    x, eye = torch.randn(5, 6), torch.eye(6)
    full = eye
    for a in A:
        full = (eye + a) @ full
    scores = fog_a(net, list(net), x)
    for k in range(4):
        part = eye
        for j, a in enumerate(A):
            part = part if j == k else (eye + a) @ part
        assert torch.allclose(
            scores[k], ((part - full) @ x.T).norm(dim=0) / (full @ x.T).norm(dim=0), rtol=1e-4
        )
    assert not scores[3].any()


def test_fog_a_with_dropout_elsewhere_tuples_and_keywords():
    class Two(nn.Module):  # two streams, returned in the other order, as MM-DiT blocks do
        def __init__(self):
            super().__init__()
            self.f, self.g, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, *, x, context, t):
            return context + self.g(context) + x.mean(1, keepdim=True), x + self.drop(self.f(x)) * t

    class Net(nn.Module):
        def __init__(self, silent=False):
            super().__init__()
            self.blocks, self.drop, self.silent = (
                nn.ModuleList([Two(), Two(), Two()]),
                nn.Dropout(0.5),
                silent,
            )

        def forward(self, x, context, t):
            x = self.drop(x)  # outside the blocks: stays random, and cancels
            for block in self.blocks[: 2 if self.silent else 3]:
                context, x = block(x=x, context=context, t=t)
            return x

    torch.manual_seed(0)
    net, inputs = Net().train(), (torch.randn(2, 7, 4), torch.randn(2, 3, 4), torch.rand(2, 1, 1))
    net.blocks[1].f.weight.data.zero_(), net.blocks[1].f.bias.data.zero_()
    for p in net.blocks[2].g.parameters():
        p.data.zero_()
    before = torch.get_rng_state()
    scores = fog_a(net, net.blocks, *inputs)
    assert torch.equal(torch.get_rng_state(), before) and net.blocks[0].drop.training
    assert not scores[1].any() and (scores[0] > 0).all() and (scores[2] > 0).all()
    assert torch.equal(scores, fog_a(net, net.blocks, *inputs, hidden=("context", "x")))
    with pytest.raises(
        ValueError, match="block 1.*hidden="
    ):  # both streams of one length: which is which?
        fog_a(net, net.blocks, inputs[0], inputs[0], inputs[2])
    with pytest.raises(ValueError, match=r"\[3\] never ran"):
        fog_a(n := Net(silent=True), n.blocks, *inputs)
    with pytest.raises(
        ValueError, match="can't tell block 1"
    ):  # nor does one name serve two outputs
        fog_a(net, net.blocks, inputs[0], inputs[0], inputs[2], hidden="x")
    assert (
        fog_a(net, net.blocks, *inputs, hidden=(None, "x"))[0] != scores[0]
    ).any()  # the context goes on changing
    with pytest.raises(ValueError, match="velocity.. returns tuple"):
        fog_a(lambda *a: (net(*a),), net.blocks, *inputs)
    with pytest.raises(ValueError, match="not a residual block"):
        fog_a(lambda x: lin(x), [lin := nn.Linear(4, 5)], torch.randn(2, 4), hidden=0)
    assert not lin._forward_hooks and not any(b._forward_hooks for b in net.blocks)


def test_fog_a_with_other_outputs():
    """A last block that drops a stream, dropout by Python's own generator, outputs that hold no tensor."""

    class Last(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.f, self.kind = nn.Linear(4, 4), kind

        def forward(self, context, x):
            x = x + self.f(x) * (1 + random.random())
            return dict(none=(None, x), dict=dict(x=x), one=x, named=Pair(context, x))[self.kind]

    Pair, before = (
        NamedTuple("Pair", [("context", torch.Tensor), ("x", torch.Tensor)]),
        random.getstate(),
    )
    c, x, found = torch.randn(2, 3, 4), torch.randn(2, 5, 4), []
    for kind, out in (("none", 1), ("named", 1)):
        torch.manual_seed(0)
        block = Last(kind)
        found += [
            fog_a(lambda c, x: block(c, x)[out], [block], c, x, hidden=h)
            for h in (None, ("context", "x") if kind == "none" else (0, 1))[:1]
        ]
    assert torch.equal(found[0], found[1]) and (found[0] > 0).all() and random.getstate() == before
    with pytest.raises(ValueError, match="dict"):
        fog_a(lambda c, x: block(c, x)["x"], [block := Last("dict")], c, x)
    none = Last("none")
    same = torch.randn(2, 5, 4)
    assert fog_a(lambda c, x: none(c, x)[1], [none], same, x, hidden=(0, 1)).shape == (
        1,
        2,
    )  # None needs no input


def test_probing_leaves_no_trace(folders):
    config, data, model, bitc = setting(folders, dropout=0.2)
    held = make_batch(data, config, 2, domains=[1])
    model.train()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    foga, store, grad = probe(model, bitc, held, 1)
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())
    assert all(p.grad is None for p in [*model.parameters(), *bitc.parameters()])
    assert all(torch.equal(w, weights[k]) for k, w in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in model.layers)
    assert np.shape(foga) == np.shape(store) == np.shape(grad) == (4, len(agrepa.PROBE_TIMES))
    again = probe(model, bitc, held, 1)
    assert again == [foga, store, grad] and np.min(foga) > 0 and np.min(grad) > 0


def test_probing_does_not_change_the_training_trajectory(folders, tmp_path):
    config = tiny(data=folders[1], dropout=0.2, select="4,2", weights="equal")
    run(config, tmp_path / "a"), run(dataclasses.replace(config, probe_every=6), tmp_path / "b")
    a, b = (load_checkpoint(tmp_path / x / "last.pt") for x in "ab")
    assert len(a["history"]) == 3 and len(b["history"]) == 1
    assert all(
        torch.equal(x, y) for (_, x), (_, y) in zip(tensors(a["model"]), tensors(b["model"]))
    )


@pytest.mark.parametrize("codebooks", [1, 2])
def test_padding_changes_nothing(folders, codebooks):
    """A short clip in a long batch: velocity, pools and scores as if it stood alone."""
    config, data, model, bitc = setting(folders, codebooks)
    model.eval()
    long = make_batch(data, config, 6, domains=[1])
    i = int(long.cond.mask.sum(1).argmin())
    n = int(long.cond.mask[i].sum())
    assert n < config.blocks
    cut = lambda x, m: x[i : i + 1, :m]
    c = long.cond
    alone = Condition(
        cut(c.tokens, n * 8 * codebooks), cut(c.ref, n * 15), c.domain[i : i + 1], c.keep[i : i + 1]
    )
    v, v_k = model.ablate_each_layer(long.x0, long.t, c)
    w, w_k = model.ablate_each_layer(cut(long.x0, n * 15), long.t[i : i + 1], alone)
    assert torch.allclose(v[i, : n * 15], w[0], atol=1e-5) and not v[i, n * 15 :].any()
    assert torch.allclose(
        relative_change(v, v_k)[:, i], relative_change(w, w_k)[:, 0], rtol=1e-4, atol=1e-6
    )
    T_x = pool_teacher(long.blocks[0], c.mask)
    assert torch.allclose(T_x[i], pool_teacher(long.blocks[0][i : i + 1, :n])[0], atol=1e-5)
    heads, frames = AlignmentHeads([2], 32, data[1].dim), spread(c.mask, long.x0.shape[1])
    h = torch.randn(6, long.x0.shape[1], 32)
    for target in (T_x, long.blocks[0]):
        mine = target[i : i + 1] if target.dim() == 2 else target[i : i + 1, :n]
        assert torch.allclose(
            agrepa_loss({2: h}, heads, target, {2: 1.0}, frames)[i],
            agrepa_loss({2: h[i : i + 1, : n * 15]}, heads, mine, {2: 1.0})[0],
            atol=1e-5,
        )
    assert torch.allclose(
        lasp({2: h}, bitc[1], T_x, frames)[0, i],
        bitc[1](h[i : i + 1, : n * 15], T_x[i : i + 1])[0],
        atol=1e-5,
    )


@pytest.mark.parametrize("T", [7, 64])
def test_attention_is_the_same_in_bfloat16(T):
    torch.manual_seed(0)
    q, k, v, far = torch.randn(4, 2, 3, T, 16)
    for mask in (None, torch.rand(2, 1, 1, T) > 0.3):
        found = []
        for kind in (torch.float32, torch.bfloat16):
            x = [y.to(kind).requires_grad_() for y in (q, k, v)]
            out = agrepa.attention(*x, mask)
            found.append([out, *torch.autograd.grad((out * far).sum(), x)])
        assert found[1][0].dtype == torch.bfloat16
        assert all((a - b).norm() < 0.02 * a.norm() for a, b in zip(*found))


def test_dropped_tokens_do_not_matter_and_kept_ones_do(folders):
    config, data, model, _ = setting(folders)
    b = make_batch(data, config, 2, 3)
    other = b.cond._replace(tokens=(b.cond.tokens + 1) % 8)
    for keep in (True, False):
        a, c = (
            model(b.x0, b.t, x._replace(keep=torch.full_like(x.keep, keep)))
            for x in (b.cond, other)
        )
        assert torch.equal(a, c) != keep


# ---- sections 3 to 5, 7, 8: teacher, heads, selection, loss ------------------------------------------------------------


def test_interleave_order():
    assert interleave(torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9])).tolist() == [
        1,
        7,
        2,
        8,
        3,
        9,
    ]


def test_selection():
    layers, lam = select_layers([0.1, 0.4, 0.2, 0.4, 0.0], 3)
    assert layers == [2, 4, 3] and np.allclose(lam, [0.4, 0.4, 0.2]) and np.isclose(sum(lam), 1)
    assert select_layers([0.5] * 64, 5)[0] == [1, 2, 3, 4, 5]
    assert select_layers([-0.3, -0.1, -0.2], 2, equal=True) == ([2, 3], [0.5, 0.5])
    for bad, word in (
        ([0.1, float("nan")], "finite"),
        ([0.1], "can't choose"),
        ([0.0, 0.0], "adaLN-Zero"),
    ):
        with pytest.raises(ValueError, match=word):
            select_layers(bad, 2)


def test_alignment_loss_is_zero_where_the_heads_hit_the_teacher():
    h, layers = torch.randn(3, 6, 8), [1, 3]
    heads = AlignmentHeads(layers, 8, 8)
    for k in layers:
        heads[str(k)] = nn.Identity()
    hidden = {1: h, 3: 2 * h}
    lam = {1: 0.7, 3: 0.3}
    assert agrepa_loss(hidden, heads, h.mean(1), lam).abs().max() < 1e-6
    assert agrepa_loss(hidden, heads, h.unflatten(1, (2, 3)).mean(2), lam).abs().max() < 1e-6
    assert torch.allclose(agrepa_loss(hidden, heads, -h.mean(1), lam), torch.tensor(2.0))
    assert torch.allclose(
        agrepa_loss({1: h, 3: -h}, heads, h.mean(1), lam), torch.tensor(0.6), atol=1e-6
    )


def test_gradient_of_the_alignment_reaches_what_eq_12_says(folders):
    config, data, model, bitc = setting(folders)
    chosen = [dict(layers=[2], weights=[1.0]), dict(layers=[3, 1], weights=[0.6, 0.4])]
    heads = nn.ModuleList(
        AlignmentHeads(c["layers"], config.dim, d.dim) for c, d in zip(chosen, data)
    )
    batch = make_batch(data, config, 4, 2)
    for x in batch.blocks:
        x.requires_grad_()
    losses(model, bitc, heads, chosen, batch, config)[2].backward()
    moved = lambda m: [p.grad is not None and bool(p.grad.any()) for p in m.parameters()]
    assert (
        all(moved(heads))
        and all(moved(model.layers[0]))
        and all(moved(model.layers[1]))
        and all(moved(model.layers[2]))
    )
    assert (
        model.tokens.weight.grad.any()
        and model.x_in.weight.grad.any()
        and model.cond_in.weight.grad.any()
    )
    assert not any(moved(model.layers[3])) and not any(moved(model.v_out)) and not any(moved(bitc))
    model.zero_grad()
    losses(model, bitc, heads, [chosen[0], dict(layers=[], weights=[])], batch, config)[
        2
    ].backward()  # domain 1 aligns layer 2 alone
    assert all(moved(model.layers[1])) and not any(moved(model.layers[2]))


def test_bitc_trains_the_tokens_and_skips_the_dropped(folders):
    config, data, model, bitc = setting(folders)
    batch = make_batch(data, config, 8, 1)
    keep = batch.cond.keep
    assert 0 < keep.sum() < len(keep) and torch.allclose(
        batch.kept.view(2, -1).sum(1), torch.ones(2)
    )
    _, bit, _ = losses(model, bitc, [], None, batch, config)
    s = [
        bitc[d](
            model.embed(batch.cond)[o],
            pool_teacher(batch.blocks[d], batch.cond.mask[o]),
            spread(batch.cond.mask[o], 48),
        )
        for d, o in enumerate((slice(0, 8), slice(8, 16)))
    ]
    assert torch.allclose(
        bit, sum((1 - x[keep[o]]).mean() for x, o in zip(s, (slice(0, 8), slice(8, 16)))), atol=1e-6
    )
    bit.backward()
    assert model.tokens.weight.grad.any() and model.null.grad is None or not model.null.grad.any()


def test_lasp_uses_the_shared_head_and_leaves_it_untouched():
    head, h, T_x = BiTC(6, 4), torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 4)
    before = copy.deepcopy(head.state_dict())
    score = lasp({2: 3 * h + 1, 1: h}, head, T_x)
    assert (
        score.shape == (2, 2)
        and not score.requires_grad
        and all(p.grad is None for p in head.parameters())
    )
    z = h.mean(1)
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(
        score[0], nn.functional.cosine_similarity(z @ head.P.weight.T + head.P.bias, T_x), atol=1e-5
    )
    assert torch.allclose(
        score[0], score[1], atol=1e-3
    )  # LayerNorm: neither scale nor offset counts
    assert all(torch.equal(x, before[k]) for k, x in head.state_dict().items())


def test_capture_takes_states_with_gradient_and_says_what_is_wrong():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    with capture(net, [1, 3]) as hidden:
        out = net(torch.randn(2, 4))
    assert sorted(hidden) == [1, 3] and hidden[3] is out and hidden[1].requires_grad
    assert not any(b._forward_hooks for b in net)
    with pytest.raises(ValueError, match="block 2 never ran"):
        with capture(net, [2]):
            pass
    pair = [nn.Linear(4, 4), nn.Identity()]
    pair[1].forward = lambda h: (None, h, 2 * h)
    with capture(pair, [2], output=2) as hidden:
        out = pair[1](pair[0](torch.randn(2, 4)))
    assert hidden[2] is out[2]
    with pytest.raises(ValueError, match="block 2 returns tuple.*output=0"), capture(pair, [2]):
        pair[1](torch.randn(2, 4))
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 4, requires_grad=True)
    with capture(net, [2]) as hidden:
        checkpoint(net, x, use_reentrant=False)
    assert hidden[2].requires_grad
    with pytest.raises(ValueError, match="use_reentrant=False"):
        with capture(net, [2]):
            checkpoint(net, x, use_reentrant=True)


def test_hubert_bundle_end_to_end(audio, tmp_path, monkeypatch):
    """The real checkpoint format, under the real file name, in a folder of ours; every layer above the chosen one is NaN."""
    import torchaudio

    torch.manual_seed(0)
    net = torchaudio.models.hubert_base()
    for layer in net.encoder.transformer.layers[4:]:
        for p in layer.parameters():
            p.data.fill_(float("nan"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "hub" / "checkpoints" / "hubert_fairseq_base_ls960.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "in").mkdir()
    for f in sorted((audio / "one" / "s0").iterdir()):
        os.link(f, tmp_path / "in" / f.name)
    config = tiny(teacher="HUBERT_BASE", teacher_layer=4, units=8)
    data = BlockDataset(data_prep.prepare(tmp_path / "in", tmp_path / "out", config))
    assert (
        data.dim == 768
        and data.meta["teacher"] == "HUBERT_BASE"
        and np.isfinite(data.teacher).all()
    )
    teacher = Teacher("HUBERT_BASE", 4)
    for blocks in (1, 7):
        assert teacher(torch.randn(2, 2560 * blocks)).shape == (2, 8 * blocks, 768)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="--teacher-layer 13 but HUBERT_BASE has 12"):
        Teacher("HUBERT_BASE", 13)


def test_missing_checkpoint_is_explained(tmp_path, monkeypatch):
    import urllib.error

    def refuse(*a, **k):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (
        monkeypatch.setattr("urllib.request.urlopen", refuse),
        monkeypatch.setattr("torch.hub.urlopen", refuse),
    )
    with pytest.raises(ValueError) as error:
        Teacher("HUBERT_BASE")
    for word in ("hubert_fairseq_base_ls960.pth", "https://", str(tmp_path), "--teacher MFCC"):
        assert word in str(error.value)


def test_callable_teachers(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nclass T(torch.nn.Module):\n    def forward(self, x):\n        return x.unfold(1, 320, 320)[..., :5]\n"
        "def load():\n    return T()\ndef late():\n    return lambda x: x[:, None]\ndef padded():\n    return lambda x: x.unfold(1, 400, 320)\n"
    )
    assert Teacher(f"{file}:load")(torch.randn(1, 5120)).shape == (1, 16, 5)
    assert Teacher(f"{file}:padded")(torch.randn(1, 5120)).shape == (1, 16, 400)
    for spec, word in (
        (f"{file}:late", "50 Hz"),
        (f"{file}:nothing", "nothing"),
        (f"{tmp_path}/no.py:load", "no.py"),
        ("no_such_package:load", "no_such_package"),
        ("HUBERT_BSE", "not MFCC"),
    ):
        with pytest.raises(ValueError, match=word):
            Teacher(spec)


def test_absolute_positions_are_taken_off(tmp_path, capsys):
    """A teacher that adds its place in the window to all it hears, as Whisper does: neither rows nor units may show it."""
    (tmp_path / "mine.py").write_text(
        "import agrepa, torch\nmfcc = agrepa.Teacher('MFCC')\ndef load():\n    return lambda wave: (x := mfcc(wave)) + 30 * torch.sin("
        "torch.arange(x.shape[1])[:, None] * torch.linspace(0.002, 1.5, 39))\n"
    )
    for i in range(40):
        rng = np.random.default_rng(i)
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(
            tmp_path / "in" / f"{i}.wav",
            0.1 * data_prep.speak(rng, 100 + 3 * i, 1.0, 2 + i % 3),
            24_000,
        )
    spec = f"{tmp_path}/mine.py:load"
    plain = BlockDataset(data_prep.prepare(tmp_path / "in", tmp_path / "plain", tiny(units=16)))
    assert "place in its window" not in capsys.readouterr().out and not plain.place.any()
    placed = BlockDataset(
        data_prep.prepare(tmp_path / "in", tmp_path / "placed", tiny(units=16, teacher=spec))
    )
    assert "place in its window" in capsys.readouterr().out
    place = np.concatenate([np.arange(n) for n in np.diff(plain.offsets)])
    for data, most in ((plain, 0.25), (placed, 0.05)):
        rows = data.teacher - data.teacher.mean(0, dtype=np.float32)
        means = np.stack([rows[place == p].mean(0) for p in range(12)])
        assert np.square(means).sum(1).mean() < most * np.square(rows).sum(1).mean()
    meta = {
        **placed.meta,
        "centroids": torch.tensor(np.array(placed.units)),
        "place": torch.tensor(np.array(placed.place)),
    }
    assert (
        abs(data_prep.place_means(list(torch.randn(12, 50, 20)))[1]) < 0.05
    )  # chance alone would explain a sixth of these
    _, listener = data_prep.teachers(meta, (spec,), "cpu")
    _, ids = data_prep.understand(
        tmp_path / "in" / "3.wav", meta, listener, "cpu"
    )  # sampling hears as preparation did
    assert any(
        len(u) == len(ids) and (u == ids.numpy()).mean() > 0.99
        for u in np.split(placed.tokens[:].reshape(-1), placed.offsets[1:-1] * 8)
    )


# ---- sections 10, 11: data and the loop --------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 44_100, 16_001])
def test_a_click_lands_in_its_frame_and_block(tmp_path, rate):
    at = 5 * BLOCK + 7 * 256 / 24_000  # block 5, frame 7
    for i in range(3):
        x = np.random.default_rng(i).standard_normal(2 * rate) * 1e-4
        x[round(at * rate)] = 0.9
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{i}.wav", x, rate, "FLOAT")
    data = BlockDataset(data_prep.prepare(tmp_path / "in", tmp_path / "out", tiny(units=2)))
    for u in range(3):
        mel, _, teacher, real = data.clip(u, 0, 12)
        assert real == 12 and mel.sum(1).argmax() == 5 * 15 + 7
        assert (teacher + data.centre)[:, 0].argmax() == 5  # MFCC's first coefficient is loudness


def test_teacher_rows_are_block_means_centred_and_exact_for_any_crop(folders, audio):
    data = BlockDataset(folders[1][0])
    rows = np.concatenate(
        [data.clip(u, 0, data.offsets[u + 1] - data.offsets[u])[2] for u in range(data.train)]
    )
    assert (
        np.abs(rows.mean(0)).max() < 2e-2 * np.abs(rows).std()
    )  # the training utterances' mean is the centre
    assert np.allclose(
        BlockDataset(folders[1][0], raw_teacher=True).clip(0, 0, 3)[2], data.teacher[:3], atol=1e-6
    )
    teacher, lengths = Teacher("MFCC"), np.diff(data.offsets)
    for file in sorted((audio / "one").rglob("*.flac"))[:6]:
        wave, *_ = data_prep.read(file)
        feats = teacher(wave[None])[0] - torch.from_numpy(data.centre)
        found = [
            u
            for u in np.flatnonzero(lengths * 8 == len(feats))
            if np.allclose(
                data.clip(u, 0, lengths[u])[2], feats.unflatten(0, (-1, 8)).mean(1), atol=0.03
            )
        ]
        assert found
        clip = torch.from_numpy(data.clip(found[0], 1, 3)[2])[None]
        assert torch.allclose(pool_teacher(clip)[0], feats[8:32].mean(0), atol=0.03)


def test_draws_do_not_depend_on_the_processes(folders):
    config, data, *_ = setting(folders)
    whole = make_batch(data, config, 4, 7)
    halves = [make_batch(data, config, 2, 7, rank, 2) for rank in range(2)]
    for d in range(2):
        for rank in range(2):
            mine, all_ = slice(2 * d, 2 * d + 2), slice(4 * d + 2 * rank, 4 * d + 2 * rank + 2)
            assert torch.equal(halves[rank].x0[mine], whole.x0[all_]) and torch.equal(
                halves[rank].x1[mine], whole.x1[all_]
            )
            assert torch.equal(halves[rank].cond.ref[mine], whole.cond.ref[all_]) and torch.equal(
                halves[rank].t[mine], whole.t[all_]
            )
            assert torch.allclose(halves[rank].kept[mine] / 2, whole.kept[all_])
    assert not torch.equal(whole.x0, make_batch(data, config, 4, 8).x0)
    held = make_batch(data, config, 4), make_batch(data, dataclasses.replace(config, seed=3), 4)
    assert torch.equal(held[0].x0, held[1].x0) and torch.equal(
        held[0].cond.tokens, held[1].cond.tokens
    )
    assert (
        make_batch(data, config, 16).t[:16].sort().values.diff().max() < 0.1
    )  # held-out times are spread evenly


def test_reference_prefix_and_dropping_rates(folders):
    config, data, *_ = setting(folders, batch_size=2)
    batches = [
        make_batch(data[1:], config, 16, s) for s in range(40)
    ]  # some clips are shorter than the crop
    dropped = np.mean([(~b.cond.keep).float().mean() for b in batches])
    length = torch.cat(
        [
            b.cond.ref.abs().sum(2).gt(0).sum(1)
            / (90 if b.cond.mask is None else 15 * b.cond.mask.sum(1))
            for b in batches
        ]
    )
    assert (
        0.06 < dropped < 0.14
        and length.max() <= 0.3
        and 0.05 < (length == 0).float().mean() < 0.25
        and length.std() > 0.05
    )
    b = batches[0]
    prompt = b.cond.ref.abs().sum(2) > 0
    assert torch.equal(b.cond.ref[prompt], b.x1[prompt]) and not (b.scored & prompt).any()


def test_a_run_writes_its_folder(folders, tmp_path):
    found = run(tiny(data=folders[2], codebooks=2), tmp_path / "run")
    layers = json.loads((tmp_path / "run" / "layers.json").read_text())
    assert layers == found and list(layers) == ["one", "two"]
    log, probes = table(tmp_path / "run" / "log.csv"), table(tmp_path / "run" / "probe.csv")
    assert list(log[0]) == "step phase loss fm bitc align val_fm lr frames_per_s seconds".split()
    assert [r["step"] for r in log] == ["0", "4", "6", "8", "12"] and [r["phase"] for r in log] == [
        "1",
        "1",
        "1",
        "2",
        "2",
    ]
    assert (
        log[1]["align"] == ""
        and float(log[-1]["align"]) > 0
        and float(log[-1]["val_fm"]) < float(log[0]["val_fm"])
    )
    assert (
        list(probes[0]) == "step domain layer t foga lasp gradnorm".split()
        and len(probes) == 3 * 2 * 4 * 6
    )
    for name, entry in layers.items():
        late = [
            [
                float(r["foga"])
                for r in probes
                if (r["domain"], r["t"], r["layer"]) == (name, "", str(k)) and int(r["step"]) > 3
            ]
            for k in range(1, 5)
        ]
        assert np.allclose(np.mean(late, 1), entry["foga"], rtol=1e-4) and select_layers(
            entry["foga"], 2
        ) == (entry["layers"], entry["weights"])
        assert len(entry["lasp"]) == 4 and np.isclose(sum(entry["weights"]), 1)
    assert {"config.json", "last.pt", "previous.pt"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    ids = np.load(Path(folders[2][0]) / "tokens.npy")
    assert (
        ids[:, ::2].max() < 8 <= ids[:, 1::2].min() and ids.max() < 16
    )  # the second codebook's ids follow the first's
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["domains"][1]["centroids"].shape == (8, 39 + 100) and state["step"] == 12


def test_strategies_differ_only_from_the_selection_on(folders, tmp_path):
    runs = {}
    for select in ("foga", "lasp", "gradnorm", "random", "none", "4,1"):
        found = run(tiny(data=folders[1], select=select), tmp_path / select)
        runs[select] = (
            [e["layers"] for e in found.values()],
            [e["weights"] for e in found.values()],
            table(tmp_path / select / "log.csv"),
        )
        assert (tmp_path / select / "probe.csv").read_text() == (
            tmp_path / "foga" / "probe.csv"
        ).read_text()
        for key in ("loss", "val_fm"):
            assert [r[key] for r in runs[select][2][:3]] == [r[key] for r in runs["foga"][2][:3]]
    assert (
        runs["none"][0] == [[], []]
        and runs["none"][2][-1]["align"] == ""
        and [sorted(k) for k in runs["4,1"][0]] == [[1, 4]] * 2
    )
    assert (
        runs["lasp"][1] == [[0.5, 0.5]] * 2
        and runs["foga"][2][-1]["loss"] != runs["none"][2][-1]["loss"]
    )


def test_align_until_and_block_targets(folders, tmp_path):
    config, data, model, bitc = setting(folders)
    heads, chosen = (
        nn.ModuleList([AlignmentHeads([2], 32, data[0].dim)]),
        [dict(layers=[2], weights=[1.0])],
    )
    batch = make_batch(data[:1], config, 4, 1)
    with capture(model.layers, [2]) as hidden:
        model(*flow_path(batch.x0, batch.x1, batch.t)[:1], batch.t, batch.cond)
    for pool, target in (
        ("clip", pool_teacher(batch.blocks[0], batch.cond.mask)),
        ("block", batch.blocks[0]),
    ):
        expected = agrepa_loss(
            hidden, heads[0], target, {2: 1.0}, spread(batch.cond.mask, 90)
        ).mean()
        assert torch.allclose(
            losses(model, bitc[:1], heads, chosen, batch, tiny(align_pool=pool))[2], expected
        )
    run(tiny(data=folders[1], align_until=8, align_pool="block"), tmp_path / "run")
    assert [r["align"] != "" for r in table(tmp_path / "run" / "log.csv")] == [
        False,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("stop", [4, 8])
def test_resuming_equals_the_uninterrupted_run(folders, tmp_path, monkeypatch, stop):
    config = tiny(data=folders[1], dropout=0.1, eval_every=3)
    run(config, tmp_path / "whole")
    real = agrepa.save

    def save_and_stop(folder, state):
        real(folder, state)
        if state["step"] == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(agrepa, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut")
    with open(tmp_path / "cut" / "log.csv", "a") as f:
        f.write("11,2,later than the checkpoint\n")
    monkeypatch.setattr(agrepa, "save", real)
    run(config, tmp_path / "cut", load_checkpoint(tmp_path / "cut" / "last.pt"))
    a, b = (load_checkpoint(tmp_path / x / "last.pt") for x in ("whole", "cut"))
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert len(pairs) > 200 and all(x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in pairs)
    a, b = (table(tmp_path / x / "log.csv") for x in ("whole", "cut"))
    assert [[r[k] for k in list(r)[:8]] for r in a] == [[r[k] for k in list(r)[:8]] for r in b]
    assert (tmp_path / "whole" / "probe.csv").read_text() == (
        tmp_path / "cut" / "probe.csv"
    ).read_text()


def test_a_step_that_is_not_finite_changes_nothing(folders, tmp_path, monkeypatch):
    real, calls = agrepa.losses, []

    def sometimes(*a):
        calls.append(1)
        fm, bit, align = real(*a)
        return (fm * float("nan") if len(calls) > 9 else fm), bit, align

    monkeypatch.setattr(agrepa, "losses", sometimes)
    run(tiny(data=folders[1], steps=10, save_every=9, eval_every=5), tmp_path / "run")
    a, b = (load_checkpoint(tmp_path / "run" / f"{x}.pt") for x in ("previous", "last"))
    assert a["step"] == 9 and b["step"] == 10
    for part in ("model", "heads", "opt"):
        assert all(
            torch.equal(x, y)
            for (_, x), (_, y) in zip(tensors(a[part]), tensors(b[part]), strict=True)
        )
    calls.extend([1] * 9)
    with pytest.raises(ValueError, match="lower --lr"):
        run(tiny(data=folders[1], steps=10), tmp_path / "other")


def cli(*args, processes=1, **kw):
    head = [sys.executable] + (
        ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29517"]
        if processes > 1
        else []
    )
    return subprocess.run(
        [*head, str(HERE / "agrepa.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kw,
    )


def flags(config):
    skip = {"out", "resume", "compile", "raw_teacher", "units_teacher"}
    return [
        x
        for k, v in dataclasses.asdict(config).items()
        if k not in skip
        for x in ["--" + k.replace("_", "-"), *(v if k == "data" else [v])]
    ]


def test_two_processes_are_one_with_twice_the_batch(folders, tmp_path):
    config = tiny(data=folders[1], steps=8)
    one = cli(*flags(dataclasses.replace(config, batch_size=8)), "--out", "one", cwd=tmp_path)
    two = cli(*flags(config), "--out", "two", processes=2, cwd=tmp_path)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = (json.loads((tmp_path / x / "layers.json").read_text()) for x in ("one", "two"))
    assert [e["layers"] for e in a.values()] == [e["layers"] for e in b.values()]
    a, b = (table(tmp_path / x / "log.csv") for x in ("one", "two"))
    assert np.allclose([float(r["val_fm"]) for r in a], [float(r["val_fm"]) for r in b], rtol=1e-4)
    a, b = (load_checkpoint(tmp_path / x / "last.pt") for x in ("one", "two"))
    for part in ("model", "bitc", "heads", "ema"):
        x, y = (
            torch.cat([z.flatten().float() for _, z in tensors(state[part])]) for state in (a, b)
        )
        assert (x - y).norm() < 0.01 * x.norm(), (part, (x - y).norm() / x.norm())
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        p.name for p in (tmp_path / "two").iterdir()
    }  # to the end: sound, pictures
    raw = cli("--data", tmp_path, "--out", "three", processes=2, cwd=tmp_path)
    assert (
        raw.returncode != 0
        and "python data_prep.py" in raw.stderr
        and 'agrepa.py", line' not in raw.stderr
    )


def refused(capsys, monkeypatch, *argv, program=agrepa):
    """What the program says as it leaves with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        program.main()
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "Traceback" not in said
    return said.splitlines()[-1]


def test_bad_input_is_met_at_the_door(folders, audio, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    say = lambda *argv: refused(capsys, monkeypatch, *argv)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text" / "a").mkdir(parents=True)
    (tmp_path / "text" / "a" / "song.wav").write_text("la la la")
    assert "no such folder" in say("--data", "nowhere")
    assert "no usable audio" in say("--data", "empty", "--teacher", "MFCC")
    assert "song.wav" in say("--data", "text", "--teacher", "MFCC")
    here = folders[1][0]
    assert say("--data", here, "--top-k", 20).endswith("--top-k 20 but the model has 12 layers")
    for argv, word in (
        (("--dim", 100), "--heads"),
        (("--select", "4,40"), "from 1 to 12"),
        (("--select", "best"), "foga"),
        (("--seconds", 0.01), "one block"),
        (("--batch-size", 0), "above 0"),
        (("--probe-steps", 100, "--steps", 50), "before --steps"),
        (("--teacher", "WHISPER"), "prepared with MFCC"),
        (("--device", "abacus"), "--device abacus"),
        (("--layers", "many"), "invalid int"),
        (("--data", here, here, here, "--batch-size", 16), "multiple of the 3 domains"),
        (("--nfe", 3), "--nfe goes with --sample"),
        (("--lr", "nan"), "--lr nan"),
        (("--dropout", 1), "below 1"),
        (("--align-weight", -1), "0 or more"),
        (("--units", 70_000), "at most 65536"),
    ):
        assert word in say("--data", here, *argv), argv
    assert "number of codebooks" in say("--data", here, folders[2][1], "--out", "mixed")
    assert "not MFCC" in say("--data", audio / "two", "--teacher", "WHISPER")
    assert "inside the audio folder" in say(
        "--data", audio / "two", "--teacher", "MFCC", "--cache", audio / "two" / "x"
    )
    assert not list(tmp_path.glob("runs/*")) and "--resume" in say("--resume", "--out", "nowhere")
    config = tiny(data=(here,), steps=8)
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, flags(config)), "--out", "run"])
    agrepa.main()
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert "another --out" in say("--data", here, "--out", "run")
    assert "--dim 32, not 64" in say("--out", "run", "--resume", "--dim", 64)
    assert "--data" in say("--out", "run", "--resume", "--data", folders[1][1])
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    (tmp_path / "run" / "last.pt").write_bytes(before[tmp_path / "run" / "last.pt"][:5000])
    assert "last.pt: not a whole checkpoint" in say("--out", "run", "--resume")


def test_unusable_files_are_skipped_and_listed(tmp_path, audio):
    (tmp_path / "in").mkdir()
    for f in (audio / "one").rglob("*.flac"):
        (tmp_path / "in" / f.name).write_bytes(f.read_bytes())
    source = tone(tmp_path / "in" / "whole.flac", 30)
    (tmp_path / "in" / "cut.flac").write_bytes(source.read_bytes()[:200_000])
    x = np.zeros(24_000, np.float32)
    x[500] = np.nan
    soundfile.write(tmp_path / "in" / "nan.wav", x, 24_000, "FLOAT")
    soundfile.write(tmp_path / "in" / "silent.wav", np.zeros(24_000), 24_000)
    soundfile.write(tmp_path / "in" / "short.wav", np.ones(2000), 24_000)
    (tmp_path / "in" / "text.wav").write_text("not audio")
    (
        tone(tmp_path / "in" / "tiny.ogg", 0.17, 48_000),
        tone(tmp_path / "in" / "some.mp3", 3, 44_100, 2),
    )
    listing = sorted(p.name for p in (tmp_path / "in").iterdir())
    meta = BlockDataset(data_prep.prepare(tmp_path / "in", tmp_path / "out", tiny())).meta
    reasons = {s["path"]: s["reason"] for s in meta["skipped"]}
    assert (
        set(reasons) >= {"nan.wav", "silent.wav", "short.wav", "text.wav", "cut.flac"}
        and len(set(reasons)) == 5
    )
    assert (
        "NaN" in reasons["nan.wav"]
        and "silent" in reasons["silent.wav"]
        and "read" in reasons["text.wav"]
    )
    assert (
        meta["utterances"] == 14 + 2 + 1 + 1
        and sorted(p.name for p in (tmp_path / "in").iterdir()) == listing
    )


def test_held_out_share_and_folders():
    sizes = {f"{f}/{i}.wav": 100 + i for f in ("a", "b", "c") for i in range(40)}
    held = data_prep.hold_out(sizes)
    share = sum(sizes[p] for p in held) / sum(sizes.values())
    assert (
        0.02 <= share <= 0.1
        and {p[0] for p in held} == set("abc")
        and held == data_prep.hold_out(dict(reversed(sizes.items())))
    )
    assert data_prep.hold_out(
        {"train-clean/1.wav": 9, "dev-clean/2.wav": 9, "test-other/3.wav": 9}
    ) == {"dev-clean/2.wav", "test-other/3.wav"}


def test_interrupted_preparation_goes_on(tmp_path, audio, monkeypatch):
    config = tiny(units=2)  # the sample for k-means is a part of the whole
    whole = data_prep.prepare(audio / "one", tmp_path / "whole", config)
    (
        monkeypatch.setattr(data_prep, "WINDOWS", 1),
        monkeypatch.setattr(data_prep, "BATCH", 20),
        monkeypatch.setattr(data_prep, "SAVE_SECONDS", 0),
        monkeypatch.setattr(data_prep, "SAY_SECONDS", 0),
    )
    expected = data_prep.prepare(audio / "one", tmp_path / "expected", config)
    real, calls = data_prep.tokenise, []

    def fails(*a):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(data_prep, "tokenise", fails)
    with pytest.raises(KeyboardInterrupt):
        data_prep.prepare(audio / "one", tmp_path / "out", config)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "progress.json").exists()
    assert 0 < json.loads((tmp_path / "out.partial" / "progress.json").read_text())["batch"]
    monkeypatch.setattr(data_prep, "tokenise", real)
    data_prep.prepare(audio / "one", tmp_path / "out", config)
    for name in ("mel", "tokens", "teacher", "units", "offsets"):
        assert (tmp_path / "out" / f"{name}.npy").read_bytes() == (
            tmp_path / "expected" / f"{name}.npy"
        ).read_bytes()
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == json.loads(
        (tmp_path / "expected" / "meta.json").read_text()
    )
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="nothing is overwritten"):
        data_prep.prepare(audio / "one", tmp_path / "out", config)


def test_long_files_are_cut_and_stay_in_step(tmp_path):
    for i in range(3):
        tone(tmp_path / "in" / f"{i}.wav", 60, 16_000, seed=i)
    data = BlockDataset(data_prep.prepare(tmp_path / "in", tmp_path / "out", tiny()))
    lengths = np.diff(data.offsets)
    assert lengths.max() == data_prep.WINDOW and lengths.sum() == 3 * 375 and len(lengths) == 9
    second = data_prep.read(tmp_path / "in" / "0.wav", data_prep.WINDOW, 5)[1]
    whole, _ = soundfile.read(tmp_path / "in" / "0.wav")
    assert (
        np.corrcoef(
            data_prep.resample(
                torch.from_numpy(whole[data_prep.WINDOW * 2560 :][: 5 * 2560]), 16_000, 24_000
            )[100:-100],
            second[100:-100],
        )[0, 1]
        > 0.999
    )


def test_toy_corpus_is_the_same_each_time(tmp_path):
    assert [Path(p).name for p in data_prep.toy(tmp_path / "a")] == ["toy-speech", "toy-sounds"]
    sound = (
        data_prep.speak(np.random.default_rng(3), 120, 1.0, 2.0),
        data_prep.strike(np.random.default_rng(3), 2.0),
    )
    assert all(np.isfinite(x).all() and 0.1 < np.abs(x).max() for x in sound)
    files = sorted((tmp_path / "a").rglob("*.wav"))
    assert len(files) == 232 and 0.68 < np.abs(soundfile.read(files[0])[0]).max() < 0.71


# ---- sections 9, 12, 13: sound, metrics, figures -----------------------------------------------------------------------


class Straight(nn.Module):
    """A model whose velocity is the straight line to a known mel: each frame's value is its token's id."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def embed(self, cond):
        return torch.where(cond.keep[:, None, None], cond.tokens[..., None].float(), 0.0)

    def condition(self, cond, e):
        self.calls.append("condition")
        return (
            F.interpolate(e.transpose(1, 2), cond.ref.shape[1], mode="nearest")
            .transpose(1, 2)
            .expand(-1, -1, N_MELS)
        )

    def forward(self, x, t, cond, c):
        self.calls.append(len(x))
        return (torch.where(cond.keep[:, None, None], c, x) - x) / (
            1 - t.view(-1, 1, 1)
        )  # without tokens it stays where it is


@pytest.mark.parametrize("guidance", [1, 3])
@pytest.mark.parametrize("sway", [0, -1])
def test_sampling_along_a_straight_line_arrives(guidance, sway):
    """With guidance w, v_u + w (v_c - v_u) is w times v_c here; following it ends where the formula says."""
    model, mel = Straight(), torch.randint(1, 9, (2, 8))
    cond = Condition(
        mel,
        torch.zeros(2, 15, N_MELS),
        torch.zeros(2, dtype=torch.long),
        torch.ones(2, dtype=torch.bool),
    )
    target, x0 = model.condition(cond, model.embed(cond)), torch.randn(2, 15, N_MELS)
    model.calls.clear()
    x1 = sample(model, cond, x0, nfe=7, guidance=guidance, sway=sway)
    assert (
        model.calls == ["condition"] + [2 if guidance == 1 else 4] * 7
    )  # tokens once, both passes in one batch
    if guidance == 1:
        assert torch.allclose(x1, target, atol=1e-4)
    t = torch.linspace(0, 1, 8)
    t = t + sway * (torch.cos(math.pi / 2 * t) - 1 + t)
    x = x0
    for a, b in zip(t, t[1:]):
        x = x + (b - a) * guidance * (target - x) / (1 - a)
    assert torch.allclose(x1, x, atol=1e-3)

    class Line(Straight):  # tokens or none, the same line: guidance changes nothing
        def forward(self, x, t, cond, c):
            return torch.cat([target - x0] * (len(x) // 2))

    assert torch.allclose(
        sample(Line(), cond, x0, nfe=5, guidance=guidance, sway=sway), target, atol=1e-4
    )


def test_windows_of_a_long_sound_move_as_one():
    class Own(Straight):  # every window wants to go elsewhere
        def forward(self, x, t, cond, c):
            states.append(x)
            return torch.arange(len(x)).view(-1, 1, 1).expand_as(x) + x.sin()

    states, r = [], 8
    mel = resynthesise(
        Own(),
        torch.zeros(20 * r, dtype=torch.long),
        torch.zeros(30, N_MELS),
        torch.zeros(2 * r, dtype=torch.long),
        0,
        9,
        guidance=1,
        nfe=6,
    )
    for (
        x
    ) in states:  # windows of 7 blocks, every 5: where two see the same frames, these are the same
        assert torch.allclose(x[0, 30 + 75 :], x[1, 30 : 30 + 30], atol=1e-6)
    noise = np.random.default_rng(0).standard_normal((30 + 300, N_MELS), dtype=np.float32)[30:]
    drift = (mel - torch.from_numpy(noise)).mean(
        1
    )  # from one window's way to the next one's, without a step
    assert drift[-1] - drift[0] > 1 and drift.diff().abs().max() < 0.1 * (drift[-1] - drift[0])


@pytest.mark.parametrize("blocks", [1, 7, 8, 61])
def test_long_sounds_have_no_seam(blocks):
    ids = torch.arange(blocks * 8)
    model, prompt = Straight(), torch.full((2 * 15, N_MELS), 5.0)
    mel = resynthesise(
        model, ids, prompt, torch.zeros(16, dtype=torch.long), 0, 9, guidance=1, nfe=4
    )
    expected = F.interpolate(ids[None, None].float(), blocks * 15, mode="nearest")[0, 0]
    assert mel.shape == (blocks * 15, N_MELS) and torch.allclose(mel[:, 3], expected, atol=1e-2)
    assert max(c for c in model.calls if c != "condition") == max(
        1, math.ceil((blocks - 7) / 5) + 1
    )  # windows of 7, every 5


def test_mel_to_wave_to_mel():
    speech = data_prep.speak(np.random.default_rng(0), 120, 1.0, 3.0)
    wave = torch.from_numpy(speech[: 18 * 3840]).float()[None]
    mel = log_mel(0.3 * wave / wave.abs().max())
    back, _ = mel_to_wave(mel), torch.rand(1)
    assert back.shape == (1, 18 * 3840) and torch.equal(back, mel_to_wave(mel))
    loud = mel > -7
    distance = (log_mel(back) - mel)[loud].abs().mean().item()
    print(f"mean log-spectral distance {distance * 20 / math.log(10):.2f} dB")
    assert distance < 0.35
    lag = [
        (log_mel(back)[:, 5 + k : -5 + k or None] - mel[:, 5:-5]).abs().mean().item()
        for k in (-2, -1, 0, 1, 2)
    ]
    assert min(lag) == lag[2]  # not a frame late or early


@pytest.fixture(scope="session")
def finished(folders, tmp_path_factory):
    """A run to its end, through the command line."""
    out = tmp_path_factory.mktemp("finished")
    config = tiny(data=folders[2], codebooks=2, seconds=1.28)
    argv, sys.argv = sys.argv, ["agrepa.py", *map(str, flags(config)), "--out", str(out / "run")]
    agrepa.main()
    sys.argv = argv
    return out / "run"


def call(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["agrepa.py", *map(str, argv)])
    agrepa.main()
    return capsys.readouterr().out


def test_a_run_ends_with_sound_and_pictures(finished, tmp_path):
    from matplotlib.image import imread

    for name in ("one", "two"):
        for kind in ("sample", "target"):
            wave, rate = soundfile.read(finished / f"{kind}-{name}.wav")
            assert (
                rate == 24_000
                and len(wave) % 3840 == 0
                and np.isfinite(wave).all()
                and 0 < np.abs(wave).max() <= 1
                and np.mean(np.abs(wave) > 0.99) < 0.01
            )
    for name in ("dissociation", "foga", "loss", "mel"):
        image = imread(finished / f"{name}.png")
        assert (
            image.shape[0] > 150 and 600 <= image.shape[1] <= 1000 and image[..., :3].std() > 0.05
        ), name
    assert {p.suffix for p in finished.iterdir()} == {
        ".json",
        ".csv",
        ".pt",
        ".wav",
        ".png",
    }  # nothing half-written


def test_sampling_from_the_command_line(finished, audio, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quiet = tone(tmp_path / "low.wav", 3.3, 8_000)
    said = call(
        monkeypatch,
        capsys,
        "--sample",
        finished / "last.pt",
        "--input",
        quiet,
        "--output",
        "a.wav",
        "--nfe",
        3,
    )
    assert "8000 Hz" in said and "3.20 s" in said and len(soundfile.read("a.wav")[0]) == 20 * 3840
    prompt = next((audio / "one").rglob("*.flac"))
    for out, extra in (
        ("b.wav", ()),
        ("c.wav", ("--prompt", prompt)),
        ("d.wav", ("--guidance", 1)),
        ("e.wav", ("--domain", "two")),
    ):
        call(
            monkeypatch,
            capsys,
            "--sample",
            finished / "last.pt",
            "--input",
            quiet,
            "--output",
            out,
            "--nfe",
            3,
            *extra,
        )
    sounds = [Path(x).read_bytes() for x in ("a.wav", "b.wav", "c.wav", "d.wav", "e.wav")]
    assert sounds[0] == sounds[1] and len(set(sounds)) == 4
    say = lambda *argv: refused(capsys, monkeypatch, "--sample", finished / "last.pt", *argv)
    soundfile.write("silent.wav", np.zeros(24_000), 24_000)
    Path("text.wav").write_text("words")
    assert (
        "exists already" in say("--input", quiet, "--output", "a.wav")
        and sounds[0] == Path("a.wav").read_bytes()
    )
    for argv, word in (
        (("--input", "silent.wav"), "silent"),
        (("--input", "text.wav"), "text.wav"),
        (("--input", "no.wav"), "no.wav"),
        (("--input", quiet, "--domain", "three"), "one, two"),
        (("--input", quiet, "--vocoder", "vocos"), "vocos"),
        (("--input", quiet, "--nfe", 0), "--nfe 0"),
    ):
        assert word in say(*argv, "--output", "f.wav"), argv
    assert not Path("f.wav").exists()
    Path("cut.pt").write_bytes((finished / "last.pt").read_bytes()[:3000])
    torch.save({"model": 1}, "other.pt")
    for name in ("cut.pt", "other.pt", "text.wav", "none.pt"):
        for mode in ("--sample", "--evaluate", "--probe"):
            assert name in refused(capsys, monkeypatch, mode, name)


def test_evaluate_repeats_itself_and_scores_real_audio_as_real(
    finished, tmp_path, monkeypatch, capsys
):
    from agrepa import evaluate

    for i in range(20):
        tone(tmp_path / "in" / f"{i}.wav", 8, 16_000, seed=i)
    config = tiny(codebooks=2, seconds=1.28, steps=4, probe_steps=2)
    config.data = [str(data_prep.prepare(tmp_path / "in", tmp_path / "out", config))]
    run(config, tmp_path / "run")
    first, again = evaluate(tmp_path / "run" / "last.pt"), evaluate(tmp_path / "run" / "last.pt")
    without_time = lambda x: {k: v for k, v in x["in"].items() if k != "real_time_factor"}
    assert (
        without_time(first) == without_time(again)
        and json.loads((tmp_path / "run" / "metrics.json").read_text()) == again
    )
    row = first["in"]
    assert (
        row["frechet"] > row["frechet_floor"] > 0
        and 0 < row["unit_error"] <= 1
        and row["rows"] == row["clips"] * 6 > 39
    )
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    state["domains"][0]["dim"] = 10_000
    torch.save(state, tmp_path / "wide.pt")
    assert "give no covariance of 10000 features" in refused(
        capsys, monkeypatch, "--evaluate", tmp_path / "wide.pt"
    )

    def perfect(model, cond, x0, **kw):  # but for the prefix, which the metrics leave out
        x1 = make_batch([BlockDataset(config.data[0])], config, len(x0)).x1
        x1[:, :30] = float("nan")
        return x1

    monkeypatch.setattr(agrepa, "sample", perfect)
    real = evaluate(tmp_path / "run" / "last.pt")["in"]
    assert (
        abs(real["frechet"]) < 1e-6
        and real["unit_error"] == 0
        and real["frechet_floor"] == row["frechet_floor"]
    )
    assert "give no covariance of 39 features" in refused(
        capsys, monkeypatch, "--evaluate", finished / "last.pt"
    )


def test_frechet_distance_of_known_gaussians():
    from agrepa import frechet

    rng = np.random.default_rng(0)
    a = rng.standard_normal((200_000, 2)) * [1, 2]
    assert (
        abs(frechet(a, a)) < 1e-8
        and abs(frechet(a, a * 3 + [3, 4]) - (25 + 4 + 16)) < 1e-6 * 45 + 0.3
    )


def test_probe_again_and_figures_again(finished, monkeypatch, capsys):
    said = call(monkeypatch, capsys, "--probe", finished / "last.pt")
    assert (
        said.count("chosen now") == 2
        and "grad norm" in said
        and (finished / "probe-12.png").exists()
    )
    state, config, model, _ = data_prep.restore(finished / "last.pt", "cpu")
    assert (
        all(torch.equal(x, state["ema"][k]) for k, x in model.state_dict().items())
        and not model.training
    )
    model.load_state_dict(state["model"])  # the probe takes the weights that train
    x = make_batch([BlockDataset(d) for d in config.data], config, agrepa.PROBE_CLIPS, domains=[0])
    v = [
        model.ablate_each_layer(flow_path(x.x0, x.x1, t)[0], t, x.cond)
        for t in (torch.full_like(x.t, at) for at in agrepa.PROBE_TIMES)
    ]
    assert all(
        f"{y:.4f}" in said for y in torch.stack([relative_change(*y).mean(1) for y in v]).mean(0)
    )
    (finished / "loss.png").unlink()
    assert (
        "loss.png" in call(monkeypatch, capsys, "--figures", finished)
        and (finished / "loss.png").exists()
    )
    other = shutil.copytree(finished, finished.parent / "other")
    said = call(monkeypatch, capsys, "--figures", other, finished)
    assert (
        said.count("foga") == 2
        and said.splitlines()[-1] == str(other / "compare.png")
        and (other / "compare.png").exists()
    )
    assert "not the folder of a run" in refused(capsys, monkeypatch, "--figures", finished.parent)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(capsys, monkeypatch, "--figures", finished)


def test_code_in_a_stored_configuration_is_not_run(audio, tmp_path, monkeypatch, capsys):
    teacher = tmp_path / "mine.py"
    teacher.write_text(
        "import torch\nopen(__file__ + '.ran', 'a').write('x')\ndef load():\n    return lambda x: x.unfold(1, 320, 320)[..., ::80]\n"
    )
    config, spec = tiny(teacher=f"{teacher}:load", steps=4, probe_steps=2), f"{teacher}:load"
    config.data = [str(data_prep.prepare(audio / "one", tmp_path / "prepared", config))]
    run(config, tmp_path / "run")
    ran = (tmp_path / "mine.py.ran").read_text()
    assert f"--teacher {spec}" in refused(
        capsys, monkeypatch, "--evaluate", tmp_path / "run" / "last.pt"
    )
    assert (tmp_path / "mine.py.ran").read_text() == ran
    call(monkeypatch, capsys, "--evaluate", tmp_path / "run" / "last.pt", "--teacher", spec)
    assert (tmp_path / "mine.py.ran").read_text() != ran


# ---- in other people's models -------------------------------------------------------------------------------------------


def section(n):
    text = Path(agrepa.__file__).read_text()
    return re.search(rf"^# ---- {n}\. .*?(?=^# ---- {n + 1}\. )", text, re.S | re.M).group()


@pytest.mark.parametrize("n", [4, 5, 6, 7, 8])
def test_sections_4_to_8_run_when_pasted_alone(n):
    own = {}
    exec(
        "import contextlib, random\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
        + section(n),
        own,
    )
    net, x = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), torch.randn(2, 5, 4)
    if n == 4:
        assert (
            own["bitc_loss"](
                own["BiTC"](4, 3)(x, torch.randn(2, 3)), torch.tensor([0.5, 0.5])
            ).item()
            <= 2
        )
    elif n == 5:
        assert own["lasp"]({1: x, 2: x}, lambda h, T_x, mask: h.mean((1, 2)), None).shape == (2, 2)
    elif n == 6:
        assert torch.equal(own["fog_a"](net, list(net), x), fog_a(net, list(net), x))
    elif n == 7:
        assert own["select_layers"]([0.1, 0.3], 1) == ([2], [1.0])
    else:
        with own["capture"](net, [2]) as hidden:
            net(x)
        own["agrepa_loss"](
            hidden, own["AlignmentHeads"]([2], 4, 3), torch.randn(2, 3), {2: 1.0}
        ).mean().backward()
        assert net[1].weight.grad.any() and net[2].weight.grad is None


def test_readme_recipes_run_as_they_stand():
    recipes = [
        r for r in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    ]
    assert len(recipes) == 3 and all(
        len([x for x in r.splitlines() if x.strip()]) <= 15 for r in recipes
    )
    for recipe in recipes:
        if "f5_tts" not in recipe:
            torch.manual_seed(0)
            exec(recipe, own := {})
            assert (
                sorted(own["hidden"]) == sorted(own["layers"])
                and np.isclose(sum(own["weights"]), 1)
                and torch.isfinite(own["loss"])
            )


@pytest.mark.parametrize(
    "wrap", ["compiled blocks", "compiled model", "bfloat16", "image", "checkpointed", "wrapped"]
)
def test_fog_a_takes_models_as_they_are(wrap):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, h, t):
            return h + self.f(h) * t[:, None, None, None]

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kw):
            return self.module(*args, **kw)

    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(3))
    x, t, call = torch.randn(2, 3, 8, 8), torch.rand(2), lambda block, *a: block(*a)
    expected = fog_a(lambda x, t: blocks[2](blocks[1](blocks[0](x, t), t), t), blocks, x, t)
    if wrap == "compiled blocks":
        blocks = [torch.compile(b, backend="eager") for b in blocks]
    elif wrap == "bfloat16":
        blocks, x, t = blocks.bfloat16(), x.bfloat16(), t.bfloat16()
    elif wrap == "checkpointed":
        from torch.utils.checkpoint import checkpoint

        call = lambda block, *a: checkpoint(block, *a, use_reentrant=True)
    elif wrap == "wrapped":
        blocks = nn.ModuleList(map(Wrapped, blocks))

    def velocity(x, t):
        for block in blocks:
            x = call(block, x, t)
        return x

    compiled = []
    if wrap == "compiled model":
        velocity = torch.compile(
            velocity, backend=lambda graph, inputs: compiled.append(graph) or graph
        )
        velocity(x, t)
    found = fog_a(velocity, blocks, x, t)
    assert len(compiled) == (wrap == "compiled model")  # not once more for each gate
    assert found.shape == (3, 2) and found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=0.05 if wrap == "bfloat16" else 1e-4)


# ---- speed: python -m pytest -m bench -s prints ratios, asserts none ---------------------------------------------------

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # there is no settings file to register the marker in
    bench = [
        pytest.mark.bench,
        pytest.mark.skipif("bench" not in sys.argv, reason="python -m pytest -m bench -s"),
    ]


def in_turn(rounds, **calls):
    """Median seconds of each call, taken in turn so that a drifting machine drifts for all."""
    times = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: float(np.median(t[1:])) for name, t in times.items()}


class Bench:
    """A training step on random blocks."""

    def __init__(self, layers, dim, heads, batch=8, seconds=4.8):
        torch.manual_seed(0)
        self.config = Config(layers=layers, dim=dim, heads=heads, batch_size=batch, seconds=seconds)
        n = self.config.blocks
        self.model = awake(VelocityModel(layers, dim, heads), 0.02)
        self.bitc, self.chosen = (
            nn.ModuleList([BiTC(dim, 768)]),
            [dict(layers=[1, 5, 3], weights=[0.5, 0.3, 0.2])],
        )
        self.heads = nn.ModuleList([AlignmentHeads(self.chosen[0]["layers"], dim, 768)])
        self.opt = torch.optim.AdamW(
            [*groups(self.model), *groups(self.bitc), *groups(self.heads)], lr=1e-5, fused=True
        )
        cond = Condition(
            torch.randint(0, 1024, (batch, n * 8)),
            torch.zeros(batch, n * 15, 100),
            torch.zeros(batch, dtype=torch.long),
            torch.ones(batch, dtype=torch.bool),
        )
        self.batch = Batch(
            torch.randn(batch, n * 15, 100),
            torch.randn(batch, n * 15, 100),
            torch.rand(batch),
            cond,
            [torch.randn(batch, n, 768)],
            torch.full((batch,), 1 / batch),
            None,
        )

    def step(self, low=True, align=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            fm, bit, far = losses(
                self.model,
                self.bitc,
                self.heads if align else [],
                self.chosen,
                self.batch,
                self.config,
            )
        (fm + 0.5 * bit + far).backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters()], 1.0)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)


def plain_product(b):
    """FLOP/s of a bf16 matrix product of the feed-forward's shape."""
    D = b.config.dim
    a, w = torch.randn(b.batch.x1[..., 0].numel(), D).bfloat16(), torch.randn(4 * D, D).bfloat16()
    return 2 * a.numel() * 4 * D / in_turn(20, product=lambda: a @ w.T)["product"]


@bench[0]
@bench[1]
@pytest.mark.parametrize("size", [(8, 256, 4), (12, 512, 8)])
def test_bench_training_step(size):
    b, c = Bench(*size), Bench(*size)
    for layer in c.model.layers:
        layer.forward = torch.compile(layer.forward)
    began = time.perf_counter()
    c.step()
    began = time.perf_counter() - began
    t = in_turn(
        5,
        low=lambda: b.step(True),
        full=lambda: b.step(False),
        aligned=lambda: b.step(True, True),
        compiled=c.step,
    )
    (B, T, _), D = b.batch.x1.shape, size[1]
    flops = (
        6 * B * T * D * D * 12 * size[0] + 12 * B * T * T * D * size[0]
    )  # weights' products and attention's, forward and backward
    print(
        f"\n{size}: bf16 step {t['low']:.2f} s, {t['full'] / t['low']:.2f} x as fast as float32; {flops / t['low'] / 1e9:.0f} GFLOP/s, "
        f"{flops / t['low'] / plain_product(b):.0%} of a plain bf16 product; with alignment {t['aligned'] / t['low']:.3f} of its time; "
        f"compiled {t['compiled'] / t['low']:.2f} of it, after {began:.0f} s"
    )


@bench[0]
@bench[1]
def test_bench_against_f5_tts():
    """A step of F5-TTS's DiT at our default size: forward, backward, AdamW."""
    f5 = pytest.importorskip("f5_tts.model", reason="pip install f5-tts")
    b, x = Bench(12, 512, 8), torch.randn(3, 8, 450, 100)
    other = f5.DiT(
        dim=512,
        depth=12,
        heads=8,
        dim_head=64,
        ff_mult=4,
        dropout=0.0,
        text_dim=512,
        conv_layers=4,
        text_num_embeds=256,
        mel_dim=100,
    )
    opt, t, text = (
        torch.optim.AdamW(other.parameters(), lr=1e-5),
        torch.rand(8),
        torch.randint(0, 256, (8, 450)),
    )

    def step(low):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = (other(x[0], x[1], text, t).float() - x[2]).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)

    t_ = in_turn(
        5,
        ours=b.step,
        theirs=lambda: step(True),
        ours32=lambda: b.step(False),
        theirs32=lambda: step(False),
    )
    print(
        f"\n12 x 512: {t_['theirs'] / t_['ours']:.2f} x as fast as F5-TTS's DiT in bf16, {t_['theirs32'] / t_['ours32']:.2f} x in float32"
    )


@bench[0]
@bench[1]
def test_bench_heads_share():
    model = sum(p.numel() for p in VelocityModel(24, 1024, 16).parameters())
    print(
        f"\nheads at 24 x 1024, K = 3, two domains: {2 * sum(p.numel() for p in AlignmentHeads([1, 2, 3], 1024, 768).parameters()) / model:.2%} of the parameters"
    )


@bench[0]
@bench[1]
@pytest.mark.parametrize("layers", [12, 24])
def test_bench_ablation(layers):
    b = Bench(layers, 256, 4, batch=2, seconds=2.4)
    args = b.batch.x0, b.batch.t, b.batch.cond

    @torch.no_grad()
    def one_by_one():
        b.model.eval()(*args)
        for layer in b.model.layers:
            hook = layer.register_forward_hook(lambda layer, a, out: a[0])
            b.model(*args)
            hook.remove()

    @torch.no_grad()
    def forwards():
        for _ in range(layers + 1):
            b.model.eval()(*args)

    t = in_turn(
        2,
        stack=lambda: b.model.ablate_each_layer(*args),
        loop=one_by_one,
        fog_a=lambda: fog_a(b.model, list(b.model.layers), *args),
        plain=forwards,
    )
    print(
        f"\n{layers} layers: ablate_each_layer takes {t['stack'] / t['loop']:.2f} of closing gates one by one; fog_a {t['fog_a'] / t['plain']:.2f} of {layers + 1} forward passes"
    )


@bench[0]
@bench[1]
def test_bench_probing_share():
    b = Bench(12, 512, 8, batch=16)
    few = b.batch._replace(
        cond=Condition(*(x if x is None else x[: agrepa.PROBE_CLIPS] for x in b.batch.cond)),
        blocks=[b.batch.blocks[0][: agrepa.PROBE_CLIPS]],
        x0=b.batch.x0[: agrepa.PROBE_CLIPS],
        x1=b.batch.x1[: agrepa.PROBE_CLIPS],
        t=b.batch.t[: agrepa.PROBE_CLIPS],
    )
    t = in_turn(1, step=lambda: b.step(), probe=lambda: probe(b.model, b.bitc, few))
    print(
        f"\na probe takes {t['probe'] / t['step']:.1f} training steps; 25 of them {25 * t['probe'] / t['step'] / 100_000:.2%} of a default run"
    )


@bench[0]
@bench[1]
def test_bench_loader(tmp_path):
    """52 minutes, and a hundred times that (7 GB): a step with its batch coming from the loader, and the process's own memory."""
    b, rng = Bench(8, 256, 4), np.random.default_rng(0)
    shapes = dict(mel=((15, 100), "f2"), tokens=((8,), "u2"), teacher=((768,), "f2"))
    part = {k: (rng.random((19_500, *s)) * 8).astype(kind) for k, (s, kind) in shapes.items()}
    for times in (1, 100):
        folder = tmp_path / str(times)
        folder.mkdir()
        for k, x in part.items():
            out = np.lib.format.open_memmap(
                folder / f"{k}.npy", "w+", x.dtype, (times * len(x), *x.shape[1:])
            )
            for i in range(times):
                out[i * len(x) : (i + 1) * len(x)] = x
            del out
        (
            np.save(folder / "units.npy", np.zeros((8, 768), np.float32)),
            np.save(folder / "place.npy", np.zeros((1280, 768), np.float32)),
        )
        np.save(folder / "offsets.npy", np.arange(0, times * 19_500 + 1, 75))
        meta = dict(
            format=agrepa.FORMAT, held_out=4, mel_mean=0.0, mel_std=1.0, teacher_mean=[0.0] * 768
        )
        (folder / "meta.json").write_text(json.dumps(meta))
        data = [BlockDataset(folder)]
        batches = agrepa.loader(data, b.config, 0, 0, 1, "cpu")

        def step(batch):
            b.batch = batch
            b.step()

        kept = next(batches)
        t = in_turn(
            8,
            same=lambda: step(kept),
            loaded=lambda: step(next(batches)),
            batch=lambda: make_batch(data, b.config, 8, random.randrange(10**6)),
        )
        own = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        print(
            f"\n{times * 52 / 60:.1f} h: assembling a batch {t['batch'] / t['same']:.1%} of a step of 8 layers of width 256; a step that waits for the loader "
            f"{t['loaded'] / t['same']:.3f} of one that doesn't; {int(own[1]) / 1024 if own else 0:.0f} MB of its own"
        )


@bench[0]
@bench[1]
def test_bench_preparation(tmp_path, monkeypatch):
    """HuBERT's size with random weights, 8 minutes of audio in files of 4 to 16 s."""
    import torchaudio

    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(
        torchaudio.models.hubert_base().state_dict(),
        tmp_path / "hub" / "checkpoints" / "hubert_fairseq_base_ls960.pth",
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for i in range(48):
        tone(tmp_path / "in" / f"{i}.flac", 4 + i % 5 * 3, 16_000, 1, i)
    config = Config(units=64)
    teacher, (_, _, _, amp) = Teacher(), launch(config)
    monkeypatch.setattr(data_prep, "Teacher", lambda *spec: teacher)  # loaded already
    usable, _ = data_prep.scan(tmp_path / "in", data_prep.list_audio(tmp_path / "in"))
    batches = [
        torch.stack([data_prep.read(tmp_path / "in" / p, s, n)[0] for p, s, n in b])
        for b in data_prep.plan(usable, data_prep.hold_out(usable), 64)[0]
    ]

    def bare():
        with amp():
            for wave in batches:
                teacher(wave)

    count = iter(range(9))
    t = in_turn(
        2,
        bare=bare,
        whole=lambda: data_prep.prepare(tmp_path / "in", tmp_path / f"out{next(count)}", config),
    )
    seconds = sum(usable.values()) * agrepa.BLOCK
    print(
        f"\npreparation runs at {t['bare'] / t['whole']:.2f} of the speed of the bare teacher, {seconds / t['whole']:.0f} x real time"
    )
