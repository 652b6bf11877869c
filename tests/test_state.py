"""train_state.py, tuned states in model.py, sample.py --state, export.py state."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import common
import export
import prepare
import sample
import train_sft
import train_state
import wkv_cuda
from common import UserError
from conftest import ROOT
from model import RWKV, RWKVConfig, backward, pack, read_state, write_state
from test_model import random_model
from test_pretrain import kill_after
from test_sft import documents, rows, write
from train_state import Config

BYTES = prepare.load_tokenizer("bytes")


def tune(model, tasks=1, scale=0.3, **options):
    """Random tuned states."""
    model.set_tune("state", tasks=tasks, **options)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.tuned.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * scale)
    return model


def gradient(model, docs, chunk_len=0, tasks=None):
    model.zero_grad()
    x, y, w, borders = pack(docs)
    loss, *_ = backward(model, x, y, w / 10, borders, chunk_len, tasks=tasks)
    return float(loss.sum()), torch.cat(
        [p.grad.flatten() for p in model.tuned.parameters() if p.requires_grad]
    )


# ---------------------------------------------------------------------------------------------------------------------
# the state in the network


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("docs", [documents(1, longest=90), documents(4, seed=3, longest=70)])
def test_gradient_equals_finite_differences_and_the_naive_loop(version, docs, monkeypatch):
    """Over chunk borders of the recurrence (32) and of backward, and packed documents."""
    model = tune(random_model(version).double(), shift=True)
    loss, got = gradient(model, docs)
    for chunk_len in (8, 13):
        chunked_loss, chunked = gradient(model, docs, chunk_len)
        assert (
            chunked_loss == pytest.approx(loss, rel=1e-9)
            and (chunked - got).norm() < 1e-9 * got.norm()
        )
    params = [p for p in model.tuned.parameters() if p.requires_grad]
    g, at = torch.Generator().manual_seed(1), 0
    for p in params:
        grad, direction = (
            got[at : at + p.numel()].view(p.shape),
            torch.randn(p.shape, generator=g, dtype=p.dtype),
        )
        at += p.numel()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p += step * direction
                x, y, w, borders = pack(docs)
                values.append(-(w / 10 * model.token_logprobs(x, y, cu_seqlens=borders)).sum())
                p -= step * direction
        assert float(values[0] - values[1]) / 2e-5 == pytest.approx(
            float((grad * direction).sum()), rel=1e-5, abs=1e-9
        )
    run = wkv_cuda._run
    monkeypatch.setattr(
        wkv_cuda, "_run", lambda v, backend, inputs, state, cu: run(v, "naive", inputs, state, cu)
    )
    naive_loss, naive = gradient(model, docs)
    assert naive_loss == pytest.approx(loss, rel=1e-9) and (naive - got).norm() < 1e-9 * got.norm()
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
    assert len(opt.state) == 3 + 2 and all(
        p.dtype == torch.float32 for p in model.tuned.parameters()
    )
    model.set_tune("full")
    assert torch.equal(model(idx)[0], base)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_logprobs_and_gradient_of_forked_prompts(version):
    """From a tuned state: one run = prompt, fork, completions = token by token = what the sampler says; right padding and
    batch-mates do not matter; and the gradient of G forks is that of G whole sequences."""
    model = tune(random_model(version), shift=True, scale=0.1)
    prompts, G = [[5, 9, 3], list(range(40, 71)), [7]], 3
    with torch.no_grad():
        out = sample.generate(model, prompts, n=G, max_new_tokens=8, seed=3, temperature=0.9)
    for i, c in enumerate(out):
        ids = torch.tensor([prompts[i // G] + c.tokens + [0] * 5])
        n = len(prompts[i // G])
        whole = model.token_logprobs(ids[:, :-1], ids[:, 1:], temperature=0.9)[0, n - 1 : n + 7]
        state, single = None, []
        for t in range(n + 7):
            scores, state = model(
                ids[:, t : t + 1], state, targets=ids[:, t + 1 : t + 2], temperature=0.9
            )
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
        grads.append(torch.cat([p.grad.flatten() for p in model.tuned.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-9 * grads[1].norm()


def test_each_row_starts_from_its_own_task():
    model, docs = tune(random_model("x070"), tasks=3), documents(5)
    tasks = torch.tensor([2, 0, 1, 1, 2])
    x, y, _, borders = pack(docs)
    together = model(x, cu_seqlens=borders, tasks=tasks, targets=y)[0].logps[0]
    for d, (ids, _) in enumerate(docs):
        model.task = int(tasks[d])
        alone = model.token_logprobs(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[0]
        torch.testing.assert_close(
            together[borders[d] : borders[d + 1]], alone, atol=1e-5, rtol=1e-5
        )
    model.task = 0


def test_a_task_of_two_tokens_weighs_as_much_on_many_processes():
    weight, borders, tasks = torch.ones(1, 6), torch.tensor([0, 2, 6]), torch.tensor([1, 0])
    for world in (1, 8):
        got, of_token = train_state.task_weights(
            weight * world, borders, tasks, torch.tensor([4.0, 2.0, 0.0])
        )
        assert (
            of_token.tolist() == [1, 1, 0, 0, 0, 0]
            and got[0].tolist() == [world / 2] * 2 + [world / 4] * 4
        )


def test_a_state_with_shifts_is_gone_on_from_whole(tmp_path):
    from model import load_to_tune

    model = tune(random_model("x070"), shift=True)
    model.save_pretrained(tmp_path / "m.pth")
    model.save_state(tmp_path / "s.pth", model="m.pth")
    cfg = types.SimpleNamespace(
        init_from=str(tmp_path / "m.pth"),
        tune="state",
        adapter=str(tmp_path / "s.pth"),
        seed=0,
        grad_cp=False,
    )
    again = load_to_tune(
        cfg, types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    )
    idx = torch.arange(9)[None]
    assert torch.equal(again(idx)[0], model(idx)[0])
    assert (
        sum(p.requires_grad for p in again.tuned.parameters()) == 3
    )  # the shifts stay as they are


def test_gradient_checkpointing_changes_nothing():
    model, docs = tune(random_model("x070"), layers=(1, 2)), documents(4)
    _, want = gradient(model, docs)
    model.grad_cp = True
    _, got = gradient(model, docs)
    assert (got - want).norm() < 1e-6 * want.norm() and len(want) == 2 * 2 * 64 * 64


def test_a_state_in_another_precision_goes_on():
    for version in ("x060", "x070"):
        model, idx = random_model(version), torch.randint(0, 320, (1, 40))
        _, state = model(idx[:, :20])
        model.bfloat16()
        assert model(idx[:, 20:], state)[1]["wkv"].dtype == torch.float32
        half = {k: v.bfloat16() for k, v in state.items()}
        assert (
            model(idx[:, 20:], half)[1]["wkv"].dtype
            == model(idx[:, 20:21], half)[1]["wkv"].dtype
            == torch.float32
        )


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_tuned_state_in_the_official_package(version, official, tmp_path):
    """v7 takes the file's tensors as they are, v6 transposed; either the other way round is seen."""
    model = tune(random_model(version), scale=0.5)
    model.save_pretrained(tmp_path / "m.pth")
    model.save_state(tmp_path / "s.pth", model="m.pth")
    saved = torch.load(tmp_path / "s.pth", weights_only=True)
    assert {k: v.shape for k, v in saved.items()} == {
        f"blocks.{i}.att.time_state": (2, 64, 64) for i in range(3)
    }
    theirs = official(tmp_path / "m.pth", version == "x070")
    idx = torch.randint(0, 320, (30,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(idx[None])[0][0]

    def run(transpose):
        state = []
        for i in range(3):
            wkv = saved[f"blocks.{i}.att.time_state"]
            state += [
                torch.zeros(128),
                (wkv.mT if transpose else wkv).contiguous().clone(),
                torch.zeros(128),
            ]
        return theirs.forward(idx.tolist(), state, full_output=True)[0]

    bound = 2e-4 * want.std()
    assert (run(version == "x060") - want).abs().max() < bound
    assert (run(version == "x070") - want).abs().max() > 100 * bound


def test_state_files_round_trip_and_say_what_they_are(tmp_path):
    model = tune(random_model("x070"), shift=True)
    model.save_state(
        tmp_path / "s.pth", model="m.pth", fingerprint=model.fingerprint(), template="t"
    )
    state, about = read_state(tmp_path / "s.pth", model.config)
    for key, value in model.tuned[0]().items():
        assert torch.equal(state[key][:, 0], value)
    assert about == {"model": "m.pth", "fingerprint": model.fingerprint(), "template": "t"}
    other = random_model("x070")
    other.set_tune("state", shift=True)
    other.tuned[0].load(state)
    idx = torch.randint(0, 320, (1, 9))
    assert torch.equal(other(idx)[0], model(idx)[0])


def test_fingerprint_is_of_the_weights_alone(tmp_path):
    model = random_model("x070")
    mark = model.fingerprint()
    model.save_pretrained(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        assert RWKV.from_pretrained(tmp_path / "a.safetensors", dtype=dtype).fingerprint() == mark
    assert tune(model).fingerprint() == mark
    model.blocks[1].ffn.key.weight.data[3, 4] += 0.1
    assert model.fingerprint() != mark


def test_export_to_web_rwkv_and_from_statetuning(tmp_path, capsys):
    from safetensors.torch import load_file

    model = tune(random_model("x060"))
    model.save_state(tmp_path / "s.pth", model="m.pth")
    want = model.tuned[0]()["wkv"]
    export.main(
        ["state", f"--state={tmp_path / 's.pth'}", f"--out={tmp_path / 's.st'}", "--to=web-rwkv"]
    )
    theirs = load_file(tmp_path / "s.st")
    assert (
        all(theirs[f"blocks.{i}.att.time_state"].dtype == torch.float16 for i in range(3))
        and len(theirs) == 3
    )
    assert torch.equal(theirs["blocks.1.att.time_state"], want[1].mT.half())  # [H, key, value]
    export.main(
        [
            "state",
            f"--state={tmp_path / 's.st'}",
            f"--out={tmp_path / 'back.pth'}",
            "--from=web-rwkv",
        ]
    )
    assert torch.equal(read_state(tmp_path / "back.pth")[0]["wkv"][:, 0], want.half().float())
    # RWKV-StateTuning: att shift [C], state, ffn shift [C] a layer, bfloat16 parameters
    shifts = [torch.randn(128).bfloat16() for _ in range(6)]
    listed = [
        t
        for i in range(3)
        for t in (shifts[2 * i], torch.nn.Parameter(want[i].bfloat16()), shifts[2 * i + 1])
    ]
    torch.save(listed, tmp_path / "list.pth")
    export.main(
        [
            "state",
            f"--state={tmp_path / 'list.pth'}",
            f"--out={tmp_path / 'l.pth'}",
            "--from=statetuning",
        ]
    )
    state, _ = read_state(tmp_path / "l.pth", model.config)
    assert torch.equal(state["wkv"][:, 0], want.bfloat16().float())
    assert torch.equal(state["att_shift"][2, 0], shifts[4].float()) and torch.equal(
        state["ffn_shift"][0, 0], shifts[1].float()
    )
    for args, words in (
        (["--out=" + str(tmp_path / "l.pth")], "already there"),
        (["--out=x.pth", "--to=web-rwkv"], r"in \.st"),
        (["--out=x.pth", "--from=statetuning"], "not RWKV-StateTuning's list"),
    ):
        with pytest.raises(UserError, match=words):
            export.main(["state", f"--state={tmp_path / 's.pth'}", *args])


# ---------------------------------------------------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small byte model that answers "one", "two" or "three" as a system turn bids, and a folder of these three tasks
    without that turn."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    RWKV(RWKVConfig("x070", 2, 64, 257)).save_pretrained(folder / "raw.pth")
    tasks = {
        task: [
            {
                "messages": [
                    {"role": "user", "content": f"say {i}"},
                    {"role": "assistant", "content": f"{task} {i % 4}"},
                ]
            }
            for i in range(16)
        ]
        for task in ("one", "three", "two")
    }
    (folder / "tasks").mkdir()
    for task in tasks:
        write(folder / f"tasks/{task}.jsonl", *tasks[task])
    write(
        folder / "all.jsonl",
        *(
            {"messages": [{"role": "system", "content": task}] * n + row["messages"]}
            for task in tasks
            for row in tasks[task]
            for n in (0, 1)
        ),
    )
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
    return Config(
        **{
            **dict(
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
            ),
            **over,
        }
    )


def test_loss_does_not_depend_on_micro_batch_chunks_or_processes(base, tmp_path):
    tasks = dict(data=str(base / "tasks"))
    for name, over in {
        "1x8": {},
        "1x1": dict(micro_bsz=1),
        "1x2": dict(micro_bsz=2),
        "chunks": dict(chunk_len=7),
    }.items():
        train_state.main(tiny(base, tmp_path / name, **tasks, **over))
    cfg = tiny(base, tmp_path / "2x2", micro_bsz=2, **tasks)
    flags = [f"--{f}={v}" for f, v in common.config_dict(cfg).items() if v not in (None, "()", "")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port",
            str(29800 + os.getpid() % 1000),
            "--",
            "train_state.py",
            *flags,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    want = rows(tmp_path / "1x8")
    for name in ("1x1", "1x2", "chunks", "2x2"):
        for a, b in zip(rows(tmp_path / name), want, strict=True):
            for key in ("loss", "loss/one", "loss/two", "grad_norm"):
                assert a.get(key) == pytest.approx(b.get(key), rel=1e-5, abs=1e-7), (
                    name,
                    a["step"],
                    key,
                )
    states = [
        read_state(tmp_path / name / "two/state-final.pth")[0]["wkv"] for name in ("1x8", "2x2")
    ]
    torch.testing.assert_close(*states, atol=2e-4, rtol=1e-3)


def test_many_tasks_equal_each_alone(base, tmp_path):
    """The reference is a loop of a few lines: its own AdamW over one task's state, stepped only when the task is there."""
    cfg = tiny(
        base,
        tmp_path / "run",
        data=str(base / "tasks"),
        global_bsz=2,
        micro_bsz=1,
        max_steps=8,
        grad_clip=0.01,
        adam_eps=1e-7,
    )  # at 1e-18 a number whose gradient is rounding takes whole steps, one way or the other
    train_state.main(cfg)
    files = sorted((base / "tasks").glob("*.jsonl"))
    data = [(*row, k) for k, f in enumerate(files) for row in prepare.read_examples(f, BYTES, 4096)]
    absent = 0
    for k, file in enumerate(files):
        model = RWKV.from_pretrained(base / "base.pth")
        model.set_tune("state")
        opt = torch.optim.AdamW(
            model.tuned.parameters(), betas=(0.9, 0.99), eps=1e-7, weight_decay=0
        )
        for step in range(8):
            batch = [data[i] for i in common.shuffled(range(step * 2, step * 2 + 2), len(data), 42)]
            batch = [row for row in batch if row[2] == k]
            if not batch:
                absent += 1
                continue
            loss = 0.0
            for ids, mask, _ in batch:
                logits = model(torch.tensor([ids[:-1]]))[0][0]
                ce = torch.nn.functional.cross_entropy(
                    logits, torch.tensor(ids[1:]), reduction="none"
                )
                loss = loss + (ce * torch.tensor(mask[1:])).sum() / sum(
                    sum(m[1:]) for _, m, _ in batch
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.tuned.parameters(), 0.01)
            opt.param_groups[0]["lr"] = common.lr_at(
                step, cfg.lr, cfg.lr_final, cfg.warmup_steps, 8
            )
            opt.step()
            opt.zero_grad()
        got = read_state(tmp_path / "run" / file.stem / "state-final.pth")[0]["wkv"][:, 0]
        want = model.tuned[0]()["wkv"]
        assert (got - want).norm() < 1e-5 * want.norm()
    assert absent  # a task absent from a step was not stepped, and that was seen


@pytest.mark.parametrize(
    "over", [{}, dict(shift=True, encoder=16), dict(data="tasks", global_bsz=2, micro_bsz=2)]
)
def test_resume_is_bit_for_bit(over, base, tmp_path):
    over = {**over, **({"data": str(base / over["data"])} if "data" in over else {})}
    over.update(
        val_data=over.get("data", str(base / "tasks/one.jsonl")), eval_every=2, save_every=2
    )
    whole, parts = (tiny(base, tmp_path / name, **over) for name in ("whole", "parts"))
    train_state.main(whole)
    kill_after(parts, 3, train_state.main)
    train_state.main(tiny(base, tmp_path / "parts", **over, resume=True))
    a, b = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert a["best"] == b["best"] and a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert all(k.startswith("tuned.") for k in a["model"])
    folder = tmp_path / "parts" / ("two" if "global_bsz" in over else "")
    assert sorted(p.name for p in folder.glob("state-*")) == [
        f"state-{n}.{end}" for n in ("2", "4", "final") for end in ("json", "pth")
    ]
    assert read_state(folder / "best.pth")[1]["fingerprint"]


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
    assert (
        log[0]["val_loss"] == log[0]["val_loss_off"] == log[-1]["val_loss_off"]
    )  # the base stays what it was
    done = subprocess.run(
        [
            sys.executable,
            "sample.py",
            "--state=none",
            f"--state={tmp_path / 'run/state-final.pth'}",
            "--device=cpu",
            "--prompt=User: say 3\n\nAssistant:",
            "--temperature=0",
            "--max_new_tokens=8",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    off, on = done.stdout.split("=== state ")[1:]
    assert off.startswith("none") and "Assistant: one 3" in on and "one 3" not in off


def cli(*args):
    done = subprocess.run(
        [sys.executable, "sample.py", *args, "--device=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_saved_state_is_a_prompt_cache(base, tmp_path):
    common_flags = ["--tokenizer=bytes", "--temperature=0", "--max_new_tokens=12"]
    code, out, err = cli(
        f"--model={base / 'base.pth'}",
        "--prompt=once upon",
        f"--save_state={tmp_path / 'c.pth'}",
        *common_flags,
    )
    assert code == 0 and "after 9 tokens" in out, err
    _, whole, _ = cli(f"--model={base / 'base.pth'}", "--prompt=once upon a time", *common_flags)
    _, cached, err = cli(f"--state={tmp_path / 'c.pth'}", "--prompt= a time", *common_flags)
    assert whole == "once upon" + cached, err


def test_the_sampler_says_what_it_misses(base, tmp_path):
    model = RWKV.from_pretrained(base / "base.pth")
    write_state({k: v + 1 for k, v in model.zero_state(1).items()}, tmp_path / "s.pth")
    (tmp_path / "s.json").unlink()
    code, _, err = cli(f"--state={tmp_path / 's.pth'}", "--prompt=a")
    assert code == 1 and "which model?" in err and "nothing in or beside" in err
    write_state(model.zero_state(1), tmp_path / "s.pth", model="gone.pth")
    code, _, err = cli(f"--state={tmp_path / 's.pth'}", "--prompt=a")
    assert code == 1 and "gone.pth" in err and "is not there" in err
    write_state(
        model.zero_state(1), tmp_path / "s.pth", model=str(base / "base.pth"), fingerprint="00"
    )
    code, _, err = cli(
        f"--state={tmp_path / 's.pth'}", "--prompt=a", "--tokenizer=bytes", "--max_new_tokens=2"
    )
    assert code == 0 and "has other weights" in err


def test_starting_points(base, tmp_path):
    """From a text's state: before training, the tuned model goes on as after that text."""
    train_state.main(
        tiny(base, tmp_path / "p", init_prompt="Be brief.", shift=True, max_steps=0, epochs=None)
    )
    train_state.main(
        tiny(
            base,
            tmp_path / "q",
            init_prompt="Be brief.",
            shift=True,
            max_steps=1,
            lr=1e-30,
            lr_final=0.0,
        )
    )
    state, _ = read_state(tmp_path / "q/state-final.pth")
    model = RWKV.from_pretrained(base / "base.pth")
    _, want = sample.prefill(model, [BYTES.encode("Be brief.")])
    for key in want:
        torch.testing.assert_close(state[key], want[key], atol=1e-7, rtol=0)
    train_state.main(
        tiny(
            base,
            tmp_path / "r",
            init_state=str(tmp_path / "q/state-final.pth"),
            shift=True,
            max_steps=1,
            lr=1e-30,
            lr_final=0.0,
        )
    )
    assert torch.equal(read_state(tmp_path / "r/state-final.pth")[0]["wkv"], state["wkv"])


def test_the_encoder_starts_at_zero_and_its_file_is_a_plain_state(base, tmp_path):
    train_state.main(
        tiny(base, tmp_path / "e", encoder=32, layers=(1,), max_steps=60, lr=1e-2, log_every=20)
    )
    log, (state, _) = rows(tmp_path / "e"), read_state(tmp_path / "e/state-final.pth")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert not state["wkv"][0].any() and state["wkv"][1].any()
    plain = torch.load(tmp_path / "e/last.pt", weights_only=True)["model"]
    assert set(plain) == {
        f"tuned.0.encoder.{n}" for n in ("code", "down", "up", "gain1", "bias1", "gain2", "bias2")
    }


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(init_from=""), "which model"),
        (dict(data="EMPTY"), "folder without .jsonl"),
        (dict(data="BAD"), "untrained.jsonl holds nothing to train on"),
        (
            dict(init_state="OTHER"),
            "state of another model: 3 layers, 2 heads of 64; this one has 2 layers, 1 heads of 64",
        ),
        (dict(init_state="NAN"), "1 values in wkv that are NaN"),
        (dict(init_state="MODEL"), "not a tuned state.*whole model"),
        (dict(init_state="OTHER", init_prompt="x"), "both given"),
        (dict(layers=(5,)), "from 0 to 1"),
        (dict(val_data="FOLDER"), "is no task of"),
    ],
)
def test_bad_input_stops_before_the_first_step(over, words, base, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BAD").mkdir()
    write(tmp_path / "BAD/untrained.jsonl", {"text": [1, 2, 3], "mask": [1, 0, 0]})
    tune(random_model("x070")).save_state(tmp_path / "OTHER", model="m")
    model = RWKV.from_pretrained(base / "base.pth")
    wrong = model.zero_state(1)
    wrong["wkv"][1, 0, 0, 3, 4] = float("nan")
    write_state(wrong, tmp_path / "NAN")
    model.save_pretrained(tmp_path / "MODEL")
    names = {"EMPTY", "BAD", "OTHER", "NAN", "MODEL"}
    over = {
        k: str(tmp_path / v) if v in names else str(base / "tasks") if v == "FOLDER" else v
        for k, v in over.items()
    }
    with pytest.raises(UserError, match=words):
        train_state.main(tiny(base, tmp_path / "run", **over))
    assert not (tmp_path / "run").exists()


def test_help_shows_every_field():
    done = subprocess.run(
        [sys.executable, "train_state.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and all(
        f"--{f}" in done.stdout for f in Config.__dataclass_fields__
    )
    assert Path(ROOT / "config/state_tiny.py").exists()
