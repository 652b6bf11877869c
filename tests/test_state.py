"""train_state.py, tuned states in the network and in files, sample.py --state, export.py state."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import export
import train_sft
import train_state
import wkv_cuda
from gosling import runs
from gosling.batch import pack
from gosling.config import UserError
from gosling.data import read_examples
from gosling.engine import generate, prefill
from gosling.tokenizer import load_tokenizer
from gosling.tune import load_model, load_to_tune, save_state, task_states
from gosling.weights import fingerprint, read_state, write_state
from model import RWKV, RWKVConfig
from train_state import Config

import pytest
import torch
from helpers import (
    ROOT,
    documents,
    kill_after,
    random_model,
    rows,
    torchrun,
    trained_gradient,
    tune,
    write,
)

BYTES = load_tokenizer("bytes")


def gradient(model, docs, chunk_len=0):
    """Loss and gradient of packed documents, as the loop of train_state.py makes them."""
    model.zero_grad()
    x, y, weight, cu_seqlens = pack(docs)
    state = task_states(model, torch.zeros(len(docs), dtype=torch.long))
    scores, _ = model(x, state, cu_seqlens=cu_seqlens, targets=y, chunk_len=chunk_len)
    loss = -(weight / 10 * scores.logps).sum()
    loss.backward()
    return loss.item(), trained_gradient(model)


def numbers(model, docs):
    """The same loss, as a number, from model.tuned[model.task]."""
    x, y, weight, cu_seqlens = pack(docs)
    with torch.no_grad():
        return float(-(weight / 10 * model.token_logprobs(x, y, cu_seqlens=cu_seqlens)).sum())


# ----------------------------------------------------------------------------------------------
# the state in the network


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("docs", [documents(1, longest=90), documents(4, seed=3, longest=70)])
def test_gradient_equals_finite_differences_and_the_naive_loop(version, docs, monkeypatch):
    """Over chunk borders of the recurrence (32) and of backward, and packed documents."""
    model = tune(random_model(version).double(), shift=True)
    loss, got = gradient(model, docs)
    for chunk_len in (8, 13):
        chunked_loss, chunked = gradient(model, docs, chunk_len)
        assert chunked_loss == pytest.approx(loss, rel=1e-9)
        assert (chunked - got).norm() < 1e-9 * got.norm()
    params = [p for p in model.tuned.parameters() if p.requires_grad]
    grads = got.split([p.numel() for p in params])
    g = torch.Generator().manual_seed(1)
    for p, grad in zip(params, grads, strict=True):
        direction, values = torch.randn(p.shape, generator=g, dtype=p.dtype), []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p += step * direction
                values.append(numbers(model, docs))
                p -= step * direction
        slope = float((grad.view(p.shape) * direction).sum())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-9)
    run = wkv_cuda._run

    def naive_run(version, backend, named, state, cu_seqlens):
        return run(version, "naive", named, state, cu_seqlens)

    monkeypatch.setattr(wkv_cuda, "_run", naive_run)
    naive_loss, naive = gradient(model, docs)
    assert naive_loss == pytest.approx(loss, rel=1e-9)
    assert (naive - got).norm() < 1e-9 * got.norm()
    assert got.norm() > 1e-3


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_state_off_is_the_base_bit_for_bit(version):
    model, idx = random_model(version), torch.randint(0, 320, (2, 20))
    base, frozen = model(idx)[0], {n: p.clone() for n, p in model.named_parameters()}
    model.set_tune("state", shift=True)
    assert torch.equal(model(idx)[0], base)  # a fresh state is zero
    opt = torch.optim.AdamW(model.param_groups(1e-2, 0.1), eps=1e-18)
    for _ in range(5):
        (-model.token_logprobs(idx[:, :-1], idx[:, 1:]).mean()).backward()
        opt.step()
        opt.zero_grad()
    assert (model(idx)[0] - base).abs().max() > 1e-3
    with model.reference():
        assert torch.equal(model(idx)[0], base)
    assert not torch.equal(model(idx)[0], base)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert len(opt.state) == 3 + 2
    assert all(p.dtype == torch.float32 for p in model.tuned.parameters())
    model.set_tune("full")
    assert torch.equal(model(idx)[0], base)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_logprobs_and_gradient_of_forked_prompts(version):
    """From a tuned state: one run = prompt, fork, completions = token by token = what the sampler
    says; right padding and batch-mates do not matter; and the gradient of G forks is that of G
    whole sequences."""
    model = tune(random_model(version), shift=True, scale=0.1)
    prompts, G = [[5, 9, 3], list(range(40, 71)), [7]], 3
    with torch.no_grad():
        out = generate(model, prompts, n=G, max_new_tokens=8, seed=3, temperature=0.9)
    for i, c in enumerate(out):
        ids = torch.tensor([prompts[i // G] + c.tokens + [0] * 5])
        n = len(prompts[i // G])
        whole = model.token_logprobs(ids[:, :-1], ids[:, 1:], temperature=0.9)[0, n - 1 : n + 7]
        state, single = None, []
        for t in range(n + 7):
            targets = ids[:, t + 1 : t + 2]
            scores, state = model(ids[:, t : t + 1], state, targets=targets, temperature=0.9)
            single.append(scores.logps[0, 0])
        for got in (whole, torch.stack(single)[n - 1 :]):
            assert (got - torch.tensor(c.logprobs)).abs().max() < 1e-5
    model.double()
    prompt, answers = torch.tensor([prompts[1]]), torch.tensor([c.tokens for c in out[G : 2 * G]])
    grads = []
    for forked in (True, False):
        model.zero_grad()
        if forked:
            _, state = model(prompt[:, :-1])
            state = {k: v.repeat_interleave(G, 1) for k, v in state.items()}
            x = torch.cat([prompt[:, -1:].expand(G, 1), answers[:, :-1]], 1)
            loss = model.token_logprobs(x, answers, state).sum()
        else:
            ids = torch.cat([prompt.expand(G, -1), answers], 1)
            loss = model.token_logprobs(ids[:, :-1], ids[:, 1:])[:, prompt.shape[1] - 1 :].sum()
        loss.backward()
        grads.append(trained_gradient(model))
    assert (grads[0] - grads[1]).norm() < 1e-9 * grads[1].norm()


def test_each_row_starts_from_its_own_task():
    model, docs = tune(random_model("x070"), tasks=3), documents(5)
    tasks = torch.tensor([2, 0, 1, 1, 2])
    x, y, _, cu_seqlens = pack(docs)
    together = model.token_logprobs(x, y, task_states(model, tasks), cu_seqlens=cu_seqlens)[0]
    for d, (ids, _) in enumerate(docs):
        model.task = int(tasks[d])
        alone = model.token_logprobs(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[0]
        got = together[cu_seqlens[d] : cu_seqlens[d + 1]]
        torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)


def test_a_task_of_two_tokens_weighs_as_much_on_many_processes():
    weight, cu_seqlens, tasks = torch.ones(1, 6), torch.tensor([0, 2, 6]), torch.tensor([1, 0])
    counts = torch.tensor([4.0, 2.0, 0.0])
    for world in (1, 8):
        got, token_tasks = train_state.task_weights(weight * world, cu_seqlens, tasks, counts)
        assert token_tasks.tolist() == [1, 1, 0, 0, 0, 0]
        assert got[0].tolist() == [world / 2] * 2 + [world / 4] * 4


def test_a_state_with_shifts_is_gone_on_from_whole(tmp_path):
    model = tune(random_model("x070"), shift=True)
    model.save_pretrained(tmp_path / "m.pth")
    save_state(model, tmp_path / "s.pth", model="m.pth")
    cfg = types.SimpleNamespace(
        init_from=str(tmp_path / "m.pth"),
        tune="state",
        adapter=str(tmp_path / "s.pth"),
        another_base=False,
        seed=0,
        grad_cp=False,
    )
    run = types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    loaded = load_to_tune(cfg, run)
    idx = torch.arange(9)[None]
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    # The shifts stay as they are.
    assert sum(p.requires_grad for p in loaded.tuned.parameters()) == 3


def test_gradient_checkpointing_changes_nothing():
    model, docs = tune(random_model("x070"), layers=(1, 2)), documents(4)
    _, want = gradient(model, docs)
    model.grad_cp = True
    _, got = gradient(model, docs)
    assert (got - want).norm() < 1e-6 * want.norm()
    assert len(want) == 2 * 2 * 64 * 64


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_state_in_another_precision_goes_on(version):
    model, idx = random_model(version), torch.randint(0, 320, (1, 40))
    _, state = model(idx[:, :20])
    model.bfloat16()
    half = {k: v.bfloat16() for k, v in state.items()}
    for last, start in ((40, state), (40, half), (21, half)):
        assert model(idx[:, 20:last], start)[1]["wkv"].dtype == torch.float32


# ----------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_tuned_state_in_the_official_package(version, official, tmp_path):
    """v7 takes the file's tensors as they are, v6 transposed; either the other way round is
    seen."""
    model = tune(random_model(version), scale=0.5)
    model.save_pretrained(tmp_path / "m.pth")
    save_state(model, tmp_path / "s.pth", model="m.pth")
    saved = torch.load(tmp_path / "s.pth", weights_only=True)
    names = [f"blocks.{i}.att.time_state" for i in range(3)]
    assert {k: v.shape for k, v in saved.items()} == dict.fromkeys(names, (2, 64, 64))
    theirs = official(tmp_path / "m.pth", version == "x070")
    idx = torch.randint(0, 320, (30,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(idx[None])[0][0]

    def run(transpose):
        state = []
        for name in names:
            wkv = saved[name].mT if transpose else saved[name]
            state += [torch.zeros(128), wkv.contiguous().clone(), torch.zeros(128)]
        return theirs.forward(idx.tolist(), state, full_output=True)[0]

    bound = 2e-4 * want.std()
    assert (run(version == "x060") - want).abs().max() < bound
    assert (run(version == "x070") - want).abs().max() > 100 * bound


def test_state_files_round_trip_and_say_what_they_are(tmp_path):
    model = tune(random_model("x070"), shift=True)
    about = {"model": "m.pth", "fingerprint": fingerprint(model), "template": "t"}
    save_state(model, tmp_path / "s.pth", **about)
    state, saved_about = read_state(tmp_path / "s.pth", model.config)
    for key, value in model.tuned[0]().items():
        assert torch.equal(state[key][:, 0], value)
    assert saved_about == about
    other = random_model("x070")
    other.set_tune("state", shift=True)
    other.tuned[0].load(state)
    idx = torch.randint(0, 320, (1, 9))
    assert torch.equal(other(idx)[0], model(idx)[0])


def test_fingerprint_is_of_the_weights_alone(tmp_path):
    model = random_model("x070")
    before = fingerprint(model)
    model.save_pretrained(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = RWKV.from_pretrained(tmp_path / "a.safetensors", dtype=dtype)
        assert fingerprint(loaded) == before
    assert fingerprint(tune(model)) == before
    model.blocks[1].ffn.key.weight.data[3, 4] += 0.1
    assert fingerprint(model) != before


def test_export_to_web_rwkv_and_back(tmp_path):
    from safetensors.torch import load_file

    model = tune(random_model("x060"))
    save_state(model, tmp_path / "s.pth", model="m.pth")
    want = model.tuned[0]()["wkv"]
    saved, theirs, back = (tmp_path / name for name in ("s.pth", "s.st", "back.pth"))
    export.main(["state", f"--state={saved}", f"--out={theirs}", "--to=web-rwkv"])
    found = load_file(theirs)
    assert {name: w.dtype for name, w in found.items()} == {
        f"blocks.{i}.att.time_state": torch.float16 for i in range(3)
    }
    assert torch.equal(found["blocks.1.att.time_state"], want[1].mT.half())  # [H, key, value]
    export.main(["state", f"--state={theirs}", f"--out={back}", "--from=web-rwkv"])
    assert torch.equal(read_state(back)[0]["wkv"][:, 0], want.half().float())
    for args, words in (
        ([f"--out={back}"], "already there"),
        (["--out=x.pth", "--to=web-rwkv"], r"in \.st"),
    ):
        with pytest.raises(UserError, match=words):
            export.main(["state", f"--state={saved}", *args])


# ----------------------------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small byte model that answers "one", "two" or "three" as a system turn bids, and a folder
    of these three tasks without that turn."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    RWKV(RWKVConfig("x070", 2, 64, 257)).save_pretrained(folder / "raw.pth")
    (folder / "tasks").mkdir()
    everything = []
    for task in ("one", "three", "two"):
        chats = [
            [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"{task} {i % 4}"},
            ]
            for i in range(16)
        ]
        write(folder / f"tasks/{task}.jsonl", *({"messages": chat} for chat in chats))
        system = {"role": "system", "content": task}
        for chat in chats:
            everything += [{"messages": chat}, {"messages": [system, *chat]}]
    write(folder / "all.jsonl", *everything)
    train_sft.main(
        train_sft.Config(
            data=str(folder / "all.jsonl"),
            init_from=str(folder / "raw.pth"),
            tokenizer="bytes",
            lr=4e-3,
            out_dir=str(folder / "sft"),
            micro_bsz=16,
            global_bsz=16,
            lr_final=1e-3,
            max_steps=250,
            eval_every=0,
            save_every=0,
            log_every=50,
            device="cpu",
        )
    )
    shutil.copy(folder / "sft/rwkv-final.pth", folder / "base.pth")
    return folder


def tiny(base, out, **over):
    usual = dict(
        data=str(base / "tasks/one.jsonl"),
        init_from=str(base / "base.pth"),
        tokenizer="bytes",
        out_dir=str(out),
        micro_bsz=8,
        global_bsz=8,
        lr=3e-2,
        lr_final=1e-2,
        warmup_steps=2,
        max_steps=6,
        eval_every=0,
        eval_samples=1,
        save_every=0,
        log_every=1,
        device="cpu",
    )
    return Config(**{**usual, **over})


def test_loss_does_not_depend_on_micro_batch_chunks_or_processes(base, tmp_path):
    data = str(base / "tasks")
    layouts = {
        "1x8": {},
        "1x1": dict(micro_bsz=1),
        "1x2": dict(micro_bsz=2),
        "chunks": dict(chunk_len=7),
    }
    for name, over in layouts.items():
        train_state.main(tiny(base, tmp_path / name, data=data, **over))
    done = torchrun("train_state.py", tiny(base, tmp_path / "2x2", micro_bsz=2, data=data), nproc=2)
    assert done.returncode == 0, done.stderr
    want = rows(tmp_path / "1x8")
    for name in ("1x1", "1x2", "chunks", "2x2"):
        for a, b in zip(rows(tmp_path / name), want, strict=True):
            for key in ("loss", "loss/one", "loss/two", "grad_norm"):
                close = pytest.approx(b.get(key), rel=1e-5, abs=1e-7)
                assert a.get(key) == close, (name, a["step"], key)
    states = [read_state(tmp_path / name / "two/state-final.pth")[0] for name in ("1x8", "2x2")]
    torch.testing.assert_close(states[0]["wkv"], states[1]["wkv"], atol=2e-4, rtol=1e-3)


def one_task_alone(base, data, k, cfg):
    """A loop of a few lines: an AdamW of its own over the state of task number k, stepped only when
    the task is there -> (wkv [L, H, N, N], steps that it was absent from)"""
    model = RWKV.from_pretrained(base / "base.pth")
    model.set_tune("state")
    state = model.tuned.parameters()
    opt = torch.optim.AdamW(state, betas=(0.9, 0.99), eps=cfg.adam_eps, weight_decay=0)
    absent = 0
    for step in range(cfg.max_steps):
        samples = range(step * cfg.global_bsz, (step + 1) * cfg.global_bsz)
        batch = [data[i] for i in runs.shuffled(samples, len(data), cfg.seed)]
        batch = [(ids, mask) for ids, mask, task in batch if task == k]
        if not batch:
            absent += 1
            continue
        n_targets = sum(sum(mask[1:]) for _, mask in batch)
        loss = 0.0
        for ids, mask in batch:
            logits = model(torch.tensor([ids[:-1]]))[0][0]
            targets = torch.tensor(ids[1:])
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            loss = loss + (nll * torch.tensor(mask[1:])).sum() / n_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.tuned.parameters(), cfg.grad_clip)
        lr = runs.lr_at(step, cfg.lr, cfg.lr_final, cfg.warmup_steps, cfg.max_steps)
        opt.param_groups[0]["lr"] = lr
        opt.step()
        opt.zero_grad()
    return model.tuned[0]()["wkv"], absent


def test_many_tasks_equal_each_alone(base, tmp_path):
    cfg = tiny(
        base,
        tmp_path / "run",
        data=str(base / "tasks"),
        global_bsz=2,
        micro_bsz=1,
        max_steps=8,
        grad_clip=0.01,
        # At 1e-18 a number whose gradient is rounding takes whole steps, one way or the other.
        adam_eps=1e-7,
    )
    train_state.main(cfg)
    files = sorted((base / "tasks").glob("*.jsonl"))
    data = [(*row, k) for k, f in enumerate(files) for row in read_examples(f, BYTES, 4096)]
    total_absent = 0
    for k, file in enumerate(files):
        want, absent = one_task_alone(base, data, k, cfg)
        got = read_state(tmp_path / "run" / file.stem / "state-final.pth")[0]["wkv"][:, 0]
        assert (got - want).norm() < 1e-5 * want.norm()
        total_absent += absent
    assert total_absent  # a task absent from a step was not stepped, and that was seen


@pytest.mark.parametrize(
    "data, over",
    [
        ("tasks/one.jsonl", {}),
        ("tasks/one.jsonl", dict(shift=True)),
        ("tasks", dict(global_bsz=2, micro_bsz=2)),
    ],
)
def test_resume_is_bit_for_bit(data, over, base, tmp_path):
    data = str(base / data)
    over = {**over, "data": data, "val_data": data, "eval_every": 2, "save_every": 2}
    train_state.main(tiny(base, tmp_path / "whole", **over))
    kill_after(tiny(base, tmp_path / "parts", **over), 3, train_state.main)
    train_state.main(tiny(base, tmp_path / "parts", **over, resume=True))
    a, b = (torch.load(tmp_path / x / "last.pt", weights_only=True) for x in ("whole", "parts"))
    assert a["best_losses"] == b["best_losses"] != {}
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert all(k.startswith("tuned.") for k in a["model"])
    folder = tmp_path / "parts" / ("two" if "global_bsz" in over else "")
    names = [f"state-{n}.{end}" for n in ("2", "4", "final") for end in ("json", "pth")]
    assert sorted(p.name for p in folder.glob("state-*")) == names
    assert read_state(folder / "best.pth")[1]["fingerprint"]


def sample_cli(*args):
    """sample.py in a process of its own -> (exit status, stdout, stderr)"""
    line = [sys.executable, "sample.py", *args, "--device=cpu"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_overfits_the_reference_stays_and_the_sampler_finds_its_model(base, tmp_path):
    shutil.copy(base / "base.pth", tmp_path / "base.pth")
    cfg = tiny(
        base,
        tmp_path / "run",
        init_from=str(tmp_path / "base.pth"),
        lr=0.1,
        max_steps=60,
        log_every=20,
        val_data=str(base / "tasks/one.jsonl"),
        eval_off=True,
    )
    train_state.main(cfg)
    log = rows(tmp_path / "run")
    assert log[-1]["loss"] < 0.1 * log[1]["loss"]
    # The base stays what it was.
    assert log[0]["val_loss"] == log[0]["val_loss_off"] == log[-1]["val_loss_off"]
    code, out, err = sample_cli(
        "--state=none",
        f"--state={tmp_path / 'run/state-final.pth'}",
        "--prompt=User: say 3\n\nAssistant:",
        "--temperature=0",
        "--max_new_tokens=8",
    )
    assert code == 0, err
    off, on = out.split("=== state ")[1:]
    assert off.startswith("none")
    assert "Assistant: one 3" in on
    assert "one 3" not in off


def test_a_saved_state_is_a_prompt_cache(base, tmp_path):
    flags = ["--tokenizer=bytes", "--temperature=0", "--max_new_tokens=12"]
    model, cache = f"--model={base / 'base.pth'}", tmp_path / "c.pth"
    code, out, err = sample_cli(model, "--prompt=once upon", f"--save_state={cache}", *flags)
    assert code == 0, err
    assert "after 9 tokens" in out
    _, whole, _ = sample_cli(model, "--prompt=once upon a time", *flags)
    _, cached, err = sample_cli(f"--state={cache}", "--prompt= a time", *flags)
    assert whole == "once upon" + cached, err


def test_the_sampler_says_what_it_misses(base, tmp_path):
    model, path = RWKV.from_pretrained(base / "base.pth"), tmp_path / "s.pth"
    write_state({k: v + 1 for k, v in model.zero_state(1).items()}, path)
    path.with_suffix(".json").unlink()
    code, _, err = sample_cli(f"--state={path}", "--prompt=a")
    assert code == 1
    assert "which model?" in err and "nothing in or beside" in err
    write_state(model.zero_state(1), path, model="gone.pth")
    code, _, err = sample_cli(f"--state={path}", "--prompt=a")
    assert code == 1
    assert "gone.pth" in err and "is not there" in err
    write_state(model.zero_state(1), path, model=str(base / "base.pth"), fingerprint="00")
    flags = ["--prompt=a", "--tokenizer=bytes", "--max_new_tokens=2"]
    code, _, err = sample_cli(f"--state={path}", *flags)
    assert code == 0
    assert "has other weights" in err


def test_starting_points(base, tmp_path):
    """From a text's state: before training, the tuned model goes on as after that text."""
    from_text = dict(init_prompt="Be brief.", shift=True)
    train_state.main(tiny(base, tmp_path / "p", **from_text, max_steps=0))
    still = dict(max_steps=1, lr=1e-30, lr_final=0.0)
    train_state.main(tiny(base, tmp_path / "q", **from_text, **still))
    state, _ = read_state(tmp_path / "q/state-final.pth")
    model = RWKV.from_pretrained(base / "base.pth")
    _, want = prefill(model, [BYTES.encode("Be brief.")])
    for key in want:
        torch.testing.assert_close(state[key], want[key], atol=1e-7, rtol=0)
    from_file = dict(init_state=str(tmp_path / "q/state-final.pth"), shift=True)
    described = Path(from_file["init_state"]).with_suffix(".json")
    about = json.loads(described.read_text())
    described.write_text(json.dumps({**about, "template": "Q: …", "author": "somebody"}))
    train_state.main(tiny(base, tmp_path / "r", **from_file, **still))
    again, said = read_state(tmp_path / "r/state-final.pth")
    assert torch.equal(again["wkv"], state["wkv"])
    assert (said["template"], said["author"]) == ("Q: …", "somebody")
    assert said["fingerprint"] == about["fingerprint"]


def test_a_state_of_another_base_is_refused_unless_it_is_meant(base, tmp_path):
    model = RWKV.from_pretrained(base / "base.pth")
    write_state(model.zero_state(1), tmp_path / "s.pth", model="m.pth", fingerprint="0" * 32)
    from_file = dict(init_state=str(tmp_path / "s.pth"), max_steps=1)
    with pytest.raises(UserError, match=r"s\.pth was trained on m\.pth, .*--another_base"):
        train_state.main(tiny(base, tmp_path / "run", **from_file))
    train_state.main(tiny(base, tmp_path / "run", **from_file, another_base=True))
    _, about = read_state(tmp_path / "run/state-final.pth")
    assert about["fingerprint"] == fingerprint(model)


def test_layers_that_are_not_trained_stay_zero(base, tmp_path):
    train_state.main(tiny(base, tmp_path / "l", layers=(1,), max_steps=60, log_every=20))
    log, (state, _) = rows(tmp_path / "l"), read_state(tmp_path / "l/state-final.pth")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert not state["wkv"][0].any()
    assert state["wkv"][1].any()
    assert set(torch.load(tmp_path / "l/last.pt", weights_only=True)["model"]) == {"tuned.0.wkv.1"}


OTHER_SIZES = (
    "state of another model: 3 layers, 2 heads of 64; this one has 2 layers, 1 heads of 64"
)


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(init_from=""), "which model"),
        (dict(data="EMPTY"), "folder without .jsonl"),
        (dict(data="BAD"), "untrained.jsonl holds nothing to train on"),
        (dict(init_state="OTHER"), OTHER_SIZES),
        (dict(init_state="NAN"), "1 values in wkv that are NaN"),
        (dict(init_state="MODEL"), "not a tuned state.*whole model"),
        (dict(init_state="OTHER", init_prompt="x"), "both given"),
        (dict(layers=(5,)), "from 0 to 1"),
        (dict(val_data="FOLDER"), "is no task of"),
    ],
)
def test_bad_input_stops_before_the_first_step(over, words, base, tmp_path):
    paths = {name: tmp_path / name for name in ("EMPTY", "BAD", "OTHER", "NAN", "MODEL")}
    paths["FOLDER"] = base / "tasks"
    paths["EMPTY"].mkdir()
    paths["BAD"].mkdir()
    write(paths["BAD"] / "untrained.jsonl", {"text": [1, 2, 3], "mask": [1, 0, 0]})
    save_state(tune(random_model("x070")), paths["OTHER"], model="m")
    model = RWKV.from_pretrained(base / "base.pth")
    wrong = model.zero_state(1)
    wrong["wkv"][1, 0, 0, 3, 4] = float("nan")
    write_state(wrong, paths["NAN"])
    model.save_pretrained(paths["MODEL"])
    over = {key: str(paths[v]) if v in paths else v for key, v in over.items()}
    with pytest.raises(UserError, match=words):
        train_state.main(tiny(base, tmp_path / "run", **over))
    assert not (tmp_path / "run").exists()


def test_help_shows_every_field():
    line = [sys.executable, "train_state.py", "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"--{name}" in done.stdout for name in Config.__dataclass_fields__)
    assert (ROOT / "config/state_tiny.py").exists()


@pytest.mark.parametrize(
    "about, words",
    [
        ([], None),  # nothing is said
        ("x", "s.json: it is 'x'; expected a valid dictionary"),
        ({"tokenizer": [1]}, "s.json: tokenizer is .1.; expected the name of a file"),
        ({"att_shift": "x"}, "s.json: att_shift is 'x'; expected a valid list"),
        ({"att_shift": [[0.5]]}, "s.pth: att_shift has 1 rows of .1. … numbers; the state has 2"),
        ({"score": [float("nan")]}, "s.json: score.0 is nan; expected a finite number"),
    ],
)
def test_what_a_state_says_of_itself_is_looked_at(about, words, tmp_path):
    model = random_model("x070", n_layer=2, n_embd=64)
    _, state = prefill(model, [[4, 5]])
    write_state(state, tmp_path / "s.pth")
    (tmp_path / "s.json").write_text(json.dumps(about))
    if words is None:
        about = {}
        (tmp_path / "s.json").write_text("{}")
        assert read_state(tmp_path / "s.pth")[1] == about
        return
    with pytest.raises(UserError, match=words):
        read_state(tmp_path / "s.pth")


def test_a_score_of_another_width_is_refused(tmp_path):
    model = random_model("x070", n_layer=2, n_embd=64)
    model.save_pretrained(tmp_path / "m.pth")
    _, state = prefill(model, [[4, 5]])
    write_state(state, tmp_path / "s.pth", model="m.pth", score=[1.0, 2.0])
    with pytest.raises(UserError, match="s.pth: score has 2 numbers, the model's is 64"):
        load_model(tmp_path / "s.pth")
