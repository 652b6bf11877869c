"""The network against the official `rwkv` package, and against itself in pieces."""

import copy
import os
import re
import subprocess
import sys

import wkv_cuda
from gosling.config import UserError
from gosling.weights import config_of
from model import RWKV, RWKVConfig
from wkv_cuda import fused

import pytest
import torch
from helpers import RANKS, ROOT, random_model


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("layer0", ["with", "without"])
def test_logits_equal_the_official_package(version, layer0, official, tmp_path):
    """Whole, in pieces and token by token; ranks that no table holds; layer 0 with and without v0,
    v1, v2."""
    if version == "x060" and layer0 == "without":
        pytest.skip("RWKV-6 has no value residual")
    model = random_model(version, **RANKS[version])
    path = tmp_path / "m.pth"
    weights = model.state_dict()
    if layer0 == "without":
        weights = {k: w for k, w in weights.items() if not re.match(r"blocks\.0\.att\.v[012]", k)}
    torch.save(weights, path)
    theirs = official(path, version == "x070")
    ours = RWKV.from_pretrained(path)
    idx = torch.randint(0, 320, (70,), generator=torch.Generator().manual_seed(1))
    want = theirs.forward(idx.tolist(), None, full_output=True)[0]
    state, steps = None, []
    for token in idx.tolist():
        logits, state = theirs.forward([token], state)
        steps.append(logits)
    for reference in (want, torch.stack(steps)):
        bound = 2e-4 * reference.std()
        whole, end = ours(idx[None])
        pieces, s = [], None
        for i, j in ((0, 1), (1, 34), (34, 70)):
            logits, s = ours(idx[None, i:j], s)
            pieces.append(logits)
        single, s1 = [], None
        for t in range(70):
            logits, s1 = ours(idx[None, t : t + 1], s1)
            single.append(logits)
        for got in (whole, torch.cat(pieces, 1), torch.cat(single, 1)):
            assert (got[0] - reference).abs().max() < bound
        for key in end:
            for other in (s, s1):
                torch.testing.assert_close(end[key], other[key], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_packed_documents_equal_each_alone(version):
    model = random_model(version).double()
    idx = torch.randint(0, 320, (1, 60))
    cu_seqlens = [0, 7, 7, 40, 41, 60]
    start = {k: torch.randn_like(v) for k, v in model.zero_state(5).items()}
    packed, end = model(idx, start, cu_seqlens=cu_seqlens)
    for d, (i, j) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        one = {k: v[:, d : d + 1] for k, v in start.items()}
        if i < j:
            alone, one = model(idx[:, i:j], one)
            torch.testing.assert_close(packed[:, i:j], alone, atol=1e-11, rtol=1e-9)
        for key in end:  # an empty document hands its state through
            torch.testing.assert_close(end[key][:, d : d + 1], one[key], atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_batch_mates_and_later_tokens_change_nothing(version):
    model = random_model(version).double()
    idx = torch.randint(0, 320, (3, 40))
    logits = model(idx)[0]
    other = idx.clone()
    other[1:], other[0, 25:] = 5, 7
    torch.testing.assert_close(model(other)[0][0, :25], logits[0, :25], atol=1e-12, rtol=1e-10)
    last = model(idx, last_only=True)[0]
    torch.testing.assert_close(last, logits[:, -1:], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_scores_equal_log_softmax_and_its_gradients(temperature, monkeypatch):
    # Several pieces, the last one short.
    few_rows = staticmethod(lambda h, weight: 7)
    monkeypatch.setattr(fused.ScoreTokens, "rows_at_a_time", few_rows)
    model = random_model("x070").double()
    idx = torch.randint(0, 320, (2, 31))
    weight = torch.randn(2, 2, 30, dtype=torch.float64)

    def grads(scores):
        loss = (scores[0] * weight[0]).sum() + (scores[1] * weight[1]).sum()
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    logp = (model(idx[:, :-1])[0] / temperature).log_softmax(-1)
    want = logp.gather(-1, idx[:, 1:, None])[..., 0], -(logp.exp() * logp).sum(-1)
    got, _ = model(idx[:, :-1], targets=idx[:, 1:], temperature=temperature)
    torch.testing.assert_close(got.logps, want[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(got.entropy, want[1], atol=1e-10, rtol=1e-10)
    assert torch.equal(got.hits, logp.argmax(-1) == idx[:, 1:])
    for a, b in zip(grads(got), grads(want), strict=False):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    assert torch.equal(
        model.token_logprobs(idx[:, :-1], idx[:, 1:], temperature=temperature), got.logps
    )


def test_l2wrap_adds_upstreams_gradient_and_leaves_the_loss():
    """Upstream: d loss / d logits at the arg-max += max logit * 1e-4 / (B T), for the mean loss,
    scaled with it."""
    model = random_model("x070").double()
    idx = torch.randint(0, 320, (2, 21))
    plain = -model.token_logprobs(idx[:, :-1], idx[:, 1:]).mean()
    wrapped = -model(idx[:, :-1], targets=idx[:, 1:], l2wrap=1e-4)[0].logps.mean()
    assert torch.equal(plain, wrapped)
    logits = model(idx[:, :-1])[0]
    # 0.5e-4 max^2 / (B T) has exactly that gradient
    explicit = plain + (0.5e-4 * logits.max(-1).values ** 2).mean()
    params = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(0.25 * wrapped, params),
        torch.autograd.grad(0.25 * explicit, params),
        strict=False,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_gradient_checkpointing_changes_no_gradient(version):
    model = random_model(version)
    idx = torch.randint(0, 320, (2, 33))

    def grads():
        loss = -model(idx[:, :-1], targets=idx[:, 1:])[0].logps.mean()
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    plain = grads()
    model.grad_cp = True
    for a, b in zip(plain, grads(), strict=False):
        assert torch.equal(a, b)


def test_gradient_through_the_state_equals_finite_differences():
    model = random_model("x070", n_layer=2).double()
    idx = torch.randint(0, 320, (1, 10))
    state = {k: torch.randn_like(v).requires_grad_() for k, v in model.zero_state(1).items()}

    def loss(state):
        half, state = model(idx[:, :4], state)  # through a border between two pieces
        return half.square().mean() + model.token_logprobs(idx[:, 4:-1], idx[:, 5:], state).sum()

    grads = torch.autograd.grad(loss(state), list(state.values()))
    for (key, value), grad in zip(state.items(), grads, strict=False):
        direction = torch.randn_like(value)
        h = 1e-5
        up, down = ({**state, key: value + sign * h * direction} for sign in (1, -1))
        numeric = (loss(up) - loss(down)) / (2 * h)
        torch.testing.assert_close((grad * direction).sum(), numeric, atol=1e-7, rtol=1e-6)


def test_bf16_compute_over_fp32_weights():
    model = random_model("x070")
    idx = torch.randint(0, 320, (2, 20))
    exact = model(idx)[0]
    model.compute_dtype = torch.bfloat16
    logits, state = model(idx)
    assert logits.dtype == torch.bfloat16 and state["wkv"].dtype == torch.float32
    assert (logits.float() - exact).norm() < 0.05 * exact.norm()
    (-model.token_logprobs(idx[:, :-1], idx[:, 1:]).mean()).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# ----------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_save_and_load_is_exact_and_finds_every_dimension(version, suffix, tmp_path):
    model = random_model(version, **RANKS[version], dim_ffn=96)
    model.save_pretrained(tmp_path / f"m{suffix}")
    again = RWKV.from_pretrained(tmp_path / f"m{suffix}")
    assert again.config == model.config
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=False):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad, name
    model.save_pretrained(tmp_path / f"half{suffix}", dtype=torch.bfloat16)
    half = RWKV.from_pretrained(tmp_path / f"half{suffix}")
    assert half.emb.weight.dtype == torch.float32
    assert torch.equal(half.emb.weight, model.emb.weight.bfloat16().float())


def test_squeezed_vectors_load(tmp_path):
    model = random_model("x070")
    torch.save({k: w.squeeze() for k, w in model.state_dict().items()}, tmp_path / "m.pth")
    assert torch.equal(
        RWKV.from_pretrained(tmp_path / "m.pth").blocks[1].att.x_r, model.blocks[1].att.x_r
    )


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda w: w.pop("blocks.1.att.w1"), ["missing", "blocks.1.att.w1"]),
        (
            lambda w: w.update({"blocks.1.att.extra": torch.zeros(3)}),
            ["extra", "blocks.1.att.extra"],
        ),
        (
            lambda w: w.update({"blocks.2.ffn.key.weight": torch.zeros(7, 128)}),
            ["misshapen", "blocks.2.ffn.key.weight", "[7, 128]"],
        ),
        (
            lambda w: w.update({"blocks.2.att.w1": w["blocks.2.att.w1"].T.contiguous()}),
            ["misshapen", "blocks.2.att.w1"],
        ),
        (lambda w: w.pop("emb.weight"), ["emb.weight"]),
        (lambda w: [w.pop(k) for k in list(w) if "att.r_k" in k], ["neither RWKV-7"]),
    ],
)
def test_damaged_files_are_named(damage, words, tmp_path):
    weights = random_model("x070").state_dict()
    damage(weights)
    torch.save(weights, tmp_path / "m.pth")
    with pytest.raises(UserError) as e:
        RWKV.from_pretrained(tmp_path / "m.pth")
    for word in [*words, "m.pth"]:
        assert word in str(e.value)


def test_truncated_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "m.pth"
    random_model("x070").save_pretrained(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="m.pth cannot be read"):
        RWKV.from_pretrained(path)
    torch.save({"step": 3}, path)
    with pytest.raises(UserError, match="not a file of weights"):
        RWKV.from_pretrained(path)
    with pytest.raises(UserError, match="nowhere.pth does not exist"):
        RWKV.from_pretrained(tmp_path / "nowhere.pth")


def test_width_must_be_whole_heads():
    with pytest.raises(ValueError, match="n_embd=100.*head_size=64.*128"):
        RWKVConfig(n_embd=100)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize(
    "suffix, dtype",
    [
        (".pth", "float32"),
        (".pth", "bfloat16"),
        (".safetensors", "float32"),
        (".safetensors", "bfloat16"),
    ],
)
def test_loading_peaks_below_1_6_times_the_model(suffix, dtype, tmp_path):
    """In a fresh process: growth of its peak resident memory over the model's size in float32."""
    torch.manual_seed(0)
    model = RWKV(RWKVConfig(n_layer=6, n_embd=512, vocab_size=16384))
    model.save_pretrained(tmp_path / f"m{suffix}", dtype=getattr(torch, dtype))
    size = 4 * sum(p.numel() for p in model.parameters())
    code = f"""
import re, torch
from model import RWKV
import gosling.weights, safetensors.torch
def peak():  # VmHWM, not ru_maxrss: the latter starts at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
torch.zeros(10) @ torch.zeros(10)
before = peak()
m = RWKV.from_pretrained({str(tmp_path / f"m{suffix}")!r})
total = sum(float(p.sum()) for p in m.parameters())  # touch everything
print(peak() - before)
"""
    grown = int(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    )
    print(f"{suffix} {dtype}: {grown / size:.2f} x the model")
    assert 0.5 * size < grown < 1.6 * size


def test_official_sizes_follow_the_rule_for_new_models():
    c = RWKVConfig()
    assert (c.decay_rank, c.iclr_rank, c.value_rank, c.gate_rank) == (64, 64, 32, 128)
    assert c.dim_ffn == 3072
    c = RWKVConfig("x070", 1, 2048)
    assert (c.decay_rank, c.iclr_rank, c.value_rank, c.gate_rank) == (128, 128, 64, 224)
    assert RWKVConfig("x060", 1, 2560).dim_ffn == 8960
    weights = dict(random_model("x070").state_dict().items())
    assert config_of(copy.copy(weights)).n_layer == 3


# ----------------------------------------------------------------------------------------------
# initial values: RWKV-LM's formulas, number by number, for layer 1 of 3, width 128


def test_initial_values_are_upstreams():
    C, L, layer, N = 128, 3, 1, 64
    s, q = layer / (L - 1), 1 - layer / L
    torch.manual_seed(0)
    v7 = {n: p.detach() for n, p in RWKV(RWKVConfig("x070", L, C, 320)).named_parameters()}
    v6 = {n: p.detach() for n, p in RWKV(RWKVConfig("x060", L, C, 320)).named_parameters()}
    for i in (0, 1, 37, 64, 100, 127):
        d, lin = i / C, i / (C - 1) - 0.5
        z = (i % N - 31.5) / 31.5
        z *= abs(z)
        want7 = {
            "att.x_r": 1 - d ** (0.2 * q),
            "att.x_w": 1 - d ** (0.9 * q),
            "att.x_k": 1 - d ** (0.7 * q),
            "att.x_v": 1 - d ** (0.7 * q),
            "att.x_a": 1 - d ** (0.9 * q),
            "att.x_g": 1 - d ** (0.2 * q),
            "att.w0": -5.5 + 6 * (i / (C - 1)) ** (1 + s**0.3) + 2.5 * z,
            "att.a0": -0.19 + 0.3 * z + 0.4 * lin,
            "att.v0": 0.73 - 0.4 * lin,
            "att.k_k": 0.71 - 0.1 * lin,
            "att.k_a": 1.02,
            "att.r_k": -0.04,
            "ffn.x_k": 1 - d**q**4,
            "att.ln_x.weight": (2 / 3) ** 0.7,
            "att.ln_x.bias": 0,
            "ln1.weight": 1,
        }
        want6 = {
            "att.time_maa_x": 1 - d**q,
            "att.time_maa_w": 1 - d**q,
            "att.time_maa_k": 1 - d**q,
            "att.time_maa_v": 1 - (d**q + 0.3 * s),
            "att.time_maa_r": 1 - d ** (0.5 * q),
            "att.time_maa_g": 1 - d ** (0.5 * q),
            "att.time_decay": -6 + 5 * (i / (C - 1)) ** (0.7 + 1.3 * s),
            "att.time_faaaa": s * (1 - i / (C - 1)) + 0.1 * ((i + 1) % 3 - 1),
            "ffn.time_maa_k": 1 - d**q**3,
            "ffn.time_maa_r": 1 - d**q**3,
        }
        for got, want in ((v7, want7), (v6, want6)):
            for name, value in want.items():
                assert got[f"blocks.1.{name}"].flatten()[i].item() == pytest.approx(
                    value, abs=2e-6
                ), (name, i)
    eye = torch.eye(C)
    for got, name, gain in (
        (v7, "receptance", 1),
        (v7, "key", 0.1),
        (v7, "value", 1),
        (v6, "gate", 0.1),
    ):
        w = got[f"blocks.1.att.{name}.weight"]
        torch.testing.assert_close(w @ w.T, gain**2 * eye, atol=1e-5, rtol=0)
    head, ffn, w2 = v7["head.weight"], v7["blocks.1.ffn.key.weight"], v7["blocks.1.att.w2"]
    torch.testing.assert_close(head.T @ head, 0.25 * 320 / C * eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(ffn.T @ ffn, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(w2 @ w2.T, 0.01 * torch.eye(len(w2)), atol=1e-6, rtol=0)
    for got, name in (
        (v7, "att.output.weight"),
        (v7, "ffn.value.weight"),
        (v7, "att.w1"),
        (v7, "att.g1"),
        (v6, "ffn.receptance.weight"),
        (v6, "att.time_maa_w1"),
        (v6, "att.time_decay_w1"),
    ):
        assert not got[f"blocks.1.{name}"].any(), name
    assert 0.9e-4 < v7["emb.weight"].abs().max() <= 1e-4
    assert (
        0.009
        < v6["blocks.1.att.time_maa_w2"].abs().max()
        <= 0.01
        >= v6["blocks.1.att.time_decay_w2"].abs().max()
    )


def test_one_layer_has_no_division_by_zero():
    for version in ("x060", "x070"):
        for p in RWKV(RWKVConfig(version, 1, 64, 10)).parameters():
            assert p.isfinite().all()


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 5e-6), (torch.bfloat16, 0.05)])
def test_one_token_in_one_call_equals_the_layers(version, dtype, most):
    """step_cpu.cpp against forward; batch-mates and threads change no bit of it."""
    if wkv_cuda.cpu.unavailable():
        pytest.skip(wkv_cuda.cpu.unavailable())
    torch.manual_seed(0)
    for C, N, V in ((64, 16, 257), (128, 64, 300), (96, 48, 77)):
        model = RWKV(RWKVConfig(version, 2, C, V, head_size=N))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        model.to(dtype)
        step, ids = fused.decoder(model), torch.randint(0, V, (19, 6))
        for rows in (1, 2, 5, 19):
            with torch.no_grad():
                want, _ = model(ids[:rows])
                state, got = model.zero_state(rows), []
                for t in range(6):
                    before = {k: v.clone() for k, v in state.items()}
                    got.append(step(ids[:rows, t], state))
            assert (torch.stack(got, 1) - want).norm() < most * want.norm()
        some, threads = torch.tensor([17, 3, 4]), torch.get_num_threads()
        fewer = {k: v[:, some].contiguous() for k, v in before.items()}
        torch.set_num_threads(3)
        try:
            assert torch.equal(step(ids[some, 5], fewer), got[-1][some])
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(fewer[k], state[k][:, some]) for k in state)
        with pytest.raises(ValueError, match="ids must be"):
            step(ids[:1, 0] * 0 - 1, model.zero_state(1))
        for wrong in (model.zero_state(2), {k: v[:, ::2] for k, v in model.zero_state(2).items()}):
            with pytest.raises(ValueError, match="state"):
                step(ids[:1, 0], wrong)
    model.set_tune("lora", r=2)
    assert fused.decoder(model) is None


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 5e-6), (torch.bfloat16, 0.05)])
def test_what_relu_leaves_at_zero_is_not_read_in_one_call(version, dtype, most, monkeypatch):
    """ffn.value's columns of units that are 0 may hold anything. The others give, to the bit, what
    reading all gives, and for one sequence up to rounding; threads change no bit."""
    if wkv_cuda.cpu.unavailable():
        pytest.skip(wkv_cuda.cpu.unavailable())
    torch.manual_seed(0)
    for share in (None, 0, 0.5, 1):  # None: each sequence has other units at 0, about half
        model = RWKV(RWKVConfig(version, 2, 96, 70, head_size=48)).requires_grad_(False)
        unused = [torch.rand(model.config.dim_ffn) < (share or 0) for _ in model.blocks]
        for block, zero in zip(model.blocks, unused, strict=True):
            ffn, key = block.ffn, block.ffn.key.weight
            if share is not None:
                key.copy_(torch.where(zero[:, None], -key.abs(), key.abs()))  # for inputs around 5
                block.ln2.bias.fill_(5)
            ffn.value.weight.add_(0.1 * torch.randn_like(ffn.value.weight))
            ffn.value.weight[:, zero] = 0
        model.to(dtype)
        ids = torch.randint(0, 70, (19, 12))
        want, _ = model(ids)
        every_step = every_logit(model, fused.decoder(model), ids, 19)
        with monkeypatch.context() as patch:
            patch.setattr(wkv_cuda.cpu, "MOST_FEW", 0)
            everything = {M: every_logit(model, fused.decoder(model), ids, M) for M in (1, 2, 4)}
        for block, zero in zip(model.blocks, unused, strict=True):
            block.ffn.value.weight[:, zero] = torch.nan
        step = fused.decoder(model)
        for M, dense in everything.items():
            got = every_logit(model, step, ids, M)
            assert (got - want[:M]).norm() < most * want[:M].norm()
            if M == 1:
                assert (got - dense).norm() < most * dense.norm()
            else:
                assert torch.equal(got, dense) and torch.equal(got, every_step[:M])
            threads = torch.get_num_threads()
            torch.set_num_threads(3)
            try:
                assert torch.equal(every_logit(model, step, ids, M), got)
            finally:
                torch.set_num_threads(threads)


def every_logit(model, step, ids, M):
    """Of the first M rows of ids [19, T], one token after the other -> [M, T, V]"""
    state = model.zero_state(M)
    return torch.stack([step(token, state) for token in ids[:M].T], 1)


@pytest.mark.parametrize("temperature, l2wrap, V", [(1.0, 0.0, 333), (0.7, 0.1, 64), (1.3, 0.0, 5)])
def test_scores_in_cpp_equal_float64(temperature, l2wrap, V):
    """train_cpu.cpp, in float32, against the PyTorch form in float64."""
    if wkv_cuda.cpu.unavailable():
        pytest.skip(wkv_cuda.cpu.unavailable())
    torch.manual_seed(0)
    xs, targets = (
        [torch.randn(50, 24, dtype=torch.float64), torch.randn(V, 24, dtype=torch.float64)],
        torch.randint(0, V, (50,)),
    )
    weight, out = torch.randn(2, 50, dtype=torch.float64), []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in xs]
        logps, entropy, hits = fused.score_tokens(*leaves, targets, temperature, l2wrap)
        first = torch.autograd.grad((logps * weight[0]).sum(), leaves, retain_graph=True)
        both = torch.autograd.grad((logps * weight[0] + entropy * weight[1]).sum(), leaves)
        out.append((logps, entropy, *first, *both, hits))
    for want, got in zip(*out, strict=False):
        torch.testing.assert_close(got.to(want.dtype), want, atol=2e-5, rtol=2e-5)
    with pytest.raises(IndexError, match="targets must be"):
        fused.score_tokens(*[x.float() for x in xs], targets + V, temperature, l2wrap)
