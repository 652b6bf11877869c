"""train_pretrain.py: upstream's steps, the same numbers however it is run, resume, and errors
before anything is lost."""

import json
import math
import signal
import subprocess
import sys
import time

import train_pretrain
from gosling import config, files, runs
from gosling.config import UserError
from gosling.token_files import TokenFile, TokenFileWriter
from gosling.tokenizer import load_tokenizer
from model import RWKV, RWKVConfig
from train_pretrain import Config, magic_prime, window_starts

import numpy as np
import pytest
import torch
from helpers import ROOT, command, kill_after, rows, torchrun


def tiny(prefix, out, **over):
    base = dict(
        data=str(prefix),
        out_dir=str(out),
        tokenizer="bytes",
        n_layer=2,
        n_embd=64,
        ctx_len=16,
        micro_bsz=8,
        global_bsz=8,
        lr=1e-3,
        lr_final=1e-4,
        warmup_steps=3,
        max_steps=6,
        eval_every=0,
        save_every=0,
        log_every=1,
        device="cpu",
    )
    return Config(**{**base, **over})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """2,400 tokens of text with some order in it."""
    prefix = tmp_path_factory.mktemp("data") / "text"
    rng = np.random.default_rng(0)
    with TokenFileWriter(prefix, np.uint16) as f:
        for _ in range(12):
            words = [
                w + 1 for i in rng.integers(0, 5, 33) for w in b"the a of in to".split()[i] + b" "
            ]
            f.add([*words[:199], 0][:200] + [0] * max(0, 200 - len([*words[:199], 0])))
    return prefix


def weights(out, name="rwkv-final.pth"):
    return torch.load(out / name, weights_only=True)


# ----------------------------------------------------------------------------------------------
# the optimiser: eight steps as upstream's formulas give them, written out by hand

MISTAKES = [
    "none",
    "one learning rate",
    "no weight decay",
    "decay on everything",
    "eps 1e-8",
    "no clipping",
    "no warm-up",
]


def upstreams_steps(version, data, cfg, mistake="none"):
    """reference: AdamW with groups, clipping and schedule written out in float64 numbers, gradients
    by autograd."""
    torch.manual_seed(cfg.seed)
    model = RWKV(RWKVConfig(version, cfg.n_layer, cfg.n_embd, 257))
    tokens = TokenFile(data).tokens
    m, v = {}, {}
    for step in range(cfg.max_steps):
        starts = window_starts(
            range(step * cfg.global_bsz, (step + 1) * cfg.global_bsz),
            len(tokens),
            cfg.ctx_len,
            seed=cfg.seed,
        )
        x = torch.from_numpy(
            np.stack([tokens[s : s + cfg.ctx_len + 1].astype(np.int64) for s in starts])
        )
        loss = torch.nn.functional.cross_entropy(
            model(x[:, :-1])[0].flatten(0, 1), x[:, 1:].flatten()
        )
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=False))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
        scale = 1.0 if mistake == "no clipping" else min(1.0, cfg.grad_clip / (norm + 1e-6))
        progress = min(max((step - cfg.warmup_steps) / (cfg.max_steps - cfg.warmup_steps), 0), 1)
        f = cfg.lr_final / cfg.lr
        lr = cfg.lr * (0.5 + f / 2 + (0.5 - f / 2) * math.cos(math.pi * progress))
        if step < cfg.warmup_steps and mistake != "no warm-up":
            lr *= 0.01 + 0.99 * step / cfg.warmup_steps
        eps = 1e-8 if mistake == "eps 1e-8" else 1e-18
        with torch.no_grad():
            for n, p in named.items():
                twice = (
                    n.endswith("att.w0" if version == "x070" else "att.time_decay")
                    and mistake != "one learning rate"
                )
                decays = mistake == "decay on everything" or (
                    n.endswith(
                        (
                            ".receptance.weight",
                            ".key.weight",
                            ".value.weight",
                            ".gate.weight",
                            ".output.weight",
                            "emb.weight",
                            "head.weight",
                        )
                    )
                    and mistake != "no weight decay"
                )
                g = grads[n].double() * scale
                m[n] = 0.9 * m.get(n, 0) + 0.1 * g
                v[n] = 0.99 * v.get(n, 0) + 0.01 * g * g
                update = (m[n] / (1 - 0.9 ** (step + 1))) / (
                    (v[n] / (1 - 0.99 ** (step + 1))).sqrt() + eps
                )
                rate = lr * (2 if twice else 1)
                p.copy_(
                    p.double() * (1 - rate * (cfg.weight_decay if decays else 0)) - rate * update
                )
    return {n: p.detach().double() for n, p in model.named_parameters()}


@pytest.mark.parametrize("version", ["x070", "x060"])
def test_eight_steps_end_where_upstreams_would(version, data, tmp_path):
    cfg = tiny(data, tmp_path / "run", version=version, max_steps=8, weight_decay=0.1)
    train_pretrain.main(cfg)
    ours = {n: w.double() for n, w in weights(tmp_path / "run").items()}
    torch.manual_seed(cfg.seed)
    start = {
        n: p.detach().double()
        for n, p in RWKV(RWKVConfig(version, cfg.n_layer, cfg.n_embd, 257)).named_parameters()
    }

    def distance(other):
        """of each tensor, as a share of the way it went; a tensor that did not move has gone no
        way"""
        distances = {}
        for n in ours:
            way = (other[n] - start[n]).norm()
            if way > 0:
                distances[n] = ((ours[n] - other[n]).norm() / way).item()
        return distances

    right = distance(upstreams_steps(version, data, cfg))
    # Adam with eps = 1e-18 turns the last bit of a tiny gradient into a full step, so a few numbers
    # may differ
    assert np.median(list(right.values())) < 1e-3 and max(right.values()) < 0.05, right
    seen = {
        mistake: distance(upstreams_steps(version, data, cfg, mistake)) for mistake in MISTAKES[1:]
    }
    for mistake, far in seen.items():
        worst = max(far[n] / max(right[n], 1e-3) for n in far)
        assert worst > 10, f"this test would not see: {mistake}"


def test_schedule():
    args = dict(lr=1.0, lr_final=0.1, warmup_steps=10, max_steps=110)
    for step, want in ((0, 0.01), (5, 0.505), (10, 1.0), (60, 0.55), (110, 0.1), (500, 0.1)):
        assert runs.lr_at(step, **args) == pytest.approx(want)


def test_every_parameter_is_in_one_group():
    for version in ("x060", "x070"):
        model = RWKV(RWKVConfig(version, 2, 64, 50))
        groups = {g["name"]: g for g in model.param_groups(1e-3, 0.1)}
        ids = [id(p) for g in groups.values() for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        assert (
            groups["2x"]["lr"] == 2e-3
            and len(groups["2x"]["params"]) == 2
            and groups["decay"]["weight_decay"] == 0.1
        )
        assert groups["1x"]["weight_decay"] == 0 == groups["2x"]["weight_decay"]
        assert "decay" not in {g["name"] for g in model.param_groups(1e-3, 0.0)}


# ----------------------------------------------------------------------------------------------
# data order


def test_every_window_once_an_epoch():
    n_tokens, ctx = 1000, 16
    n = (n_tokens - 1) // ctx
    first = window_starts(range(n), n_tokens, ctx, seed=3)
    assert sorted(first) == [i * ctx for i in range(n)]
    second = window_starts(range(n, 2 * n), n_tokens, ctx, seed=3)
    assert sorted(second) == sorted(first) and second != first
    assert window_starts(range(n), n_tokens, ctx, seed=4) != first


def test_magic_prime_order_is_upstreams():
    for tokens, ctx, p in (
        (1600, 32, 47),
        (40000, 32, 1229),
        (40000, 512, 71),
        (1498226207, 512, 2926181),
        (332115325534, 4096, 81082817),
    ):
        assert magic_prime(tokens, ctx) == p
    with pytest.raises(UserError, match="1,500 tokens are too few.*order=shuffle"):
        magic_prime(1500, 32)
    # ((phi n^3) mod p) ctx for n = 1, 2, 3 by hand: p = 71, phi = int(71 * 0.6180339887) = 43
    assert window_starts(range(3), 40000, 512, "magic_prime") == [
        43 * 512,
        43 * 8 % 71 * 512,
        43 * 27 % 71 * 512,
    ]
    starts = window_starts(range(1229), 40000, 32, "magic_prime")
    assert sorted(starts) == [i * 32 for i in range(1229)]


# ----------------------------------------------------------------------------------------------
# the same numbers however it is run


def test_loss_and_weights_do_not_depend_on_micro_batch_or_processes(data, tmp_path):
    """One process x 8, 1 x 2, and two processes x 2: losses and gradient norms of every step, and
    the weights."""
    cfgs = {
        name: tiny(data, tmp_path / name, micro_bsz=m, val_data=str(data))
        for name, m in (("1x8", 8), ("1x2", 2), ("2x2", 2))
    }
    train_pretrain.main(cfgs["1x8"])
    train_pretrain.main(cfgs["1x2"])
    done = torchrun("train_pretrain.py", cfgs["2x2"], nproc=2)
    assert done.returncode == 0, done.stderr
    want = rows(tmp_path / "1x8")
    for name in ("1x2", "2x2"):
        got = rows(tmp_path / name)
        assert len(got) == len(want) == 6
        for a, b in zip(got, want, strict=False):
            for key in ("loss", "grad_norm"):
                assert a[key] == pytest.approx(b[key], rel=1e-5), (name, a["step"], key)
        assert got[-1]["val_loss"] == pytest.approx(want[-1]["val_loss"], rel=1e-5)


def test_gradients_do_not_depend_on_the_micro_batch(data):
    tokens = TokenFile(data).tokens
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", 2, 64, 257))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    x, y = train_pretrain.batch_at(tokens, window_starts(range(8), len(tokens), 16), 16, "cpu")

    def grads(size):
        model.zero_grad()
        for i in range(0, 8, size):
            (-model(x[i : i + size], targets=y[i : i + size])[0].logps.sum() / (8 * 16)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    whole = grads(8)
    for size in (1, 2):
        assert (grads(size) - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("version", ["x070", "x060"])
def test_resume_is_bit_for_bit(version, data, tmp_path):
    whole, parts = (
        tiny(data, tmp_path / name, version=version, val_data=str(data), eval_every=2, save_every=2)
        for name in ("whole", "parts")
    )
    train_pretrain.main(whole)
    kill_after(parts, 4, train_pretrain.main)
    train_pretrain.main(Config(**{**config.config_dict(parts), "resume": True}))
    for name, w in weights(tmp_path / "whole").items():
        assert torch.equal(w, weights(tmp_path / "parts")[name]), name
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "parts"))
    assert a["best_loss"] == b["best_loss"] and a["step"] == b["step"] == 6
    for x, y in zip(
        a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=False
    ):
        assert all(torch.equal(x[k], y[k]) for k in x)
    strip = [
        [
            {k: v for k, v in row.items() if k not in ("time", "tokens_per_s")}
            for row in rows(tmp_path / n)
        ]
        for n in ("whole", "parts")
    ]
    assert strip[0] == strip[1]


def test_resume_on_another_number_of_processes_and_with_more_steps(data, tmp_path):
    whole, parts = (
        tiny(data, tmp_path / "whole", micro_bsz=4),
        tiny(data, tmp_path / "parts", micro_bsz=4),
    )
    train_pretrain.main(whole)
    kill_after(parts, 3, train_pretrain.main)
    done = torchrun("train_pretrain.py", parts, "--resume", nproc=2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    more = Config(**{**config.config_dict(whole), "resume": True, "max_steps": 8})
    train_pretrain.main(more)
    assert [row["step"] for row in rows(tmp_path / "whole")] == list(range(1, 9))


def test_continued_pretraining_starts_from_the_file(data, tmp_path):
    train_pretrain.main(tiny(data, tmp_path / "a"))
    train_pretrain.main(
        tiny(
            data,
            tmp_path / "b",
            init_from=str(tmp_path / "a/rwkv-final.pth"),
            max_steps=1,
            n_layer=7,
        )
    )
    about = files.read_json(tmp_path / "b/config.json")
    assert about["arch"]["n_layer"] == 2  # the file's, not the flag's
    assert rows(tmp_path / "b")[0]["loss"] < rows(tmp_path / "a")[0]["loss"]


def test_sigterm_and_sigkill_leave_a_whole_checkpoint(data, tmp_path):
    """A second process: SIGTERM saves and says how to go on; SIGKILL at some moment leaves the last
    one."""
    cfg = tiny(data, tmp_path / "run", max_steps=100000, save_every=1)
    for sig in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        resume = ["--resume"] if (tmp_path / "run").exists() else []
        p = subprocess.Popen(
            command("train_pretrain.py", cfg, *resume),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.time() + 120
        seen = len(rows(tmp_path / "run")) if (tmp_path / "run/metrics.jsonl").exists() else 0
        while time.time() < until and not (
            (tmp_path / "run/metrics.jsonl").exists()
            and len(rows_safe(tmp_path / "run")) > seen + 3
        ):
            assert p.poll() is None, p.stderr.read()
            time.sleep(0.05)
        p.send_signal(sig)
        out, err = p.communicate(timeout=60)
        last = torch.load(tmp_path / "run/last.pt", weights_only=True)
        assert last["step"] >= seen
        RWKV.from_pretrained(
            max((tmp_path / "run").glob("rwkv-*.pth"), key=lambda f: int(f.stem[5:]))
        )
        if sig == signal.SIGTERM:
            assert p.returncode == 130 and "--resume" in out
    assert len(list((tmp_path / "run").glob("rwkv-*.pth"))) <= cfg.keep_last + 1


def rows_safe(out):
    """metrics.jsonl of a run that may be writing its last line."""
    return [line for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


# ----------------------------------------------------------------------------------------------
# bad input: one line, the thing and the remedy


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(n_embd=100), "n_embd=100 is not a multiple of head_size=64; try n_embd=128"),
        (dict(ctx_len=5000), "holds 2,400 tokens, fewer than ctx_len \\+ 1 = 5001"),
        (dict(data="nowhere/x"), "nowhere/x.bin does not exist"),
        (dict(device="cuda"), "device=cuda: .* sees no CUDA device"),
        (dict(device="tpu9"), "device=tpu9 is not a device"),
        (dict(tokenizer="integers:20"), "id \\d+ .*vocab_size 22"),
        (dict(tokenizer=""), "no note of its tokenizer"),
        (dict(micro_bsz=3), "global_bsz=8 is not a multiple of micro_bsz x processes = 3 x 1"),
        (dict(epochs=1.0), "max_steps and epochs are both given"),
        (dict(resume=True), "last.pt does not exist"),
        (dict(init_from="nowhere.pth"), "nowhere.pth does not exist"),
        (dict(order="magic_prime", ctx_len=64), "too few for ctx_len=64"),
        (dict(log="wandb"), "pip install wandb"),
    ],
)
def test_bad_input(over, words, data, tmp_path, monkeypatch):
    if torch.cuda.is_available() and over.get("device") == "cuda":
        pytest.skip("there is one")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=words):
        train_pretrain.main(tiny(data, tmp_path / "run", **over))
    assert not list((tmp_path / "run").glob("*.p*")) if (tmp_path / "run").exists() else True


def test_resume_with_another_architecture_or_order(data, tmp_path):
    cfg = tiny(data, tmp_path / "run", max_steps=2)
    train_pretrain.main(cfg)
    with pytest.raises(UserError, match="already holds a run; --resume"):
        train_pretrain.main(cfg)
    for over, words in (
        (dict(n_layer=3), "n_layer was 2, is 3"),
        (dict(version="x060"), "version was x070, is x060"),
        (dict(seed=7), "seed was 42, is 7"),
        (dict(ctx_len=8), "ctx_len was 16, is 8"),
    ):
        with pytest.raises(UserError, match=words):
            train_pretrain.main(
                Config(**{**config.config_dict(cfg), "resume": True, "max_steps": 4, **over})
            )


def test_the_tokenizer_is_one_and_is_noted(data, tmp_path):
    """Training data, validation data, model and flag: the same by content, not only by size."""
    for name in ("bytes", "integers:255"):  # both of 257 ids
        prefix = tmp_path / name[:5]
        with TokenFileWriter(f"{prefix}_train", np.uint16) as f:
            f.add([*(np.arange(300) % 256 + 1), 0])
        (tmp_path / f"{name[:5]}_train.json").write_text(json.dumps({"tokenizer": name}))
    ours, theirs = tmp_path / "bytes_train", tmp_path / "integ_train"
    cfg = dict(data=str(ours), tokenizer="", max_steps=1)
    with pytest.raises(
        UserError, match="integ_train has the tokenizer integers:255, .*bytes_train"
    ):
        train_pretrain.main(tiny(data, tmp_path / "run", **cfg, val_data=str(theirs)))
    train_pretrain.main(tiny(data, tmp_path / "run", **cfg))
    noted = json.loads((tmp_path / "run/config.json").read_text())
    assert noted["tokenizer_digest"] == load_tokenizer("bytes").digest
    from_it = dict(init_from=str(tmp_path / "run/rwkv-final.pth"), data=str(theirs), tokenizer="")
    with pytest.raises(UserError, match="rwkv-final.pth has the tokenizer bytes, .*integ_train"):
        train_pretrain.main(tiny(data, tmp_path / "more", **from_it))
    with pytest.raises(UserError, match="--tokenizer=bytes"):
        train_pretrain.main(
            tiny(data, tmp_path / "more", **{**cfg, "data": str(theirs), "tokenizer": "bytes"})
        )


def test_a_tokenizer_larger_than_the_model(data, tmp_path):
    RWKV(RWKVConfig("x070", 1, 64, 100)).save_pretrained(tmp_path / "small.pth")
    with pytest.raises(
        UserError, match="tokenizer has 257 ids, but .*small.pth has a vocabulary of 100"
    ):
        train_pretrain.main(tiny(data, tmp_path / "run", init_from=str(tmp_path / "small.pth")))


def test_nan_stops_before_the_weights_are_saved(data, tmp_path):
    model = RWKV(RWKVConfig("x070", 1, 64, 257))
    with torch.no_grad():
        # Finite, so that the file loads; one of the two logits is then +inf, and the loss NaN.
        model.head.weight[3] = 3e38
        model.head.weight[4] = -3e38
    model.save_pretrained(tmp_path / "bad.pth")
    with pytest.raises(UserError, match="step 1: loss nan"):
        train_pretrain.main(tiny(data, tmp_path / "run", init_from=str(tmp_path / "bad.pth")))
    assert not list((tmp_path / "run").glob("*.p*"))


def test_command_line_errors_are_one_line_and_status_1(data, tmp_path):
    done = torchrun("train_pretrain.py", tiny(data, tmp_path / "run", n_embd=100))
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: n_embd=100")
        and done.stderr.count("\n") == 1
    )
    done = subprocess.run(
        [sys.executable, "train_pretrain.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for field in Config.__dataclass_fields__:
        assert f"--{field}" in done.stdout
