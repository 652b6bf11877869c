"""train_sft.py: packing, long context, LoRA; the same loss however it is run."""

import json
import os
import subprocess
import sys

import prepare
import sample
import train_sft
from gosling import config
from gosling.batch import pack, pad
from gosling.config import UserError
from gosling.data import render_row
from gosling.tokenizer import load_tokenizer
from gosling.tune import LoRALinear, load_tuned, write_tuned
from model import RWKV, RWKVConfig, pieces
from train_sft import Config

import pytest
import torch
from helpers import ROOT, documents, kill_after, random_model, rows, torchrun, write

BYTES = load_tokenizer("bytes")


def gradient(model, docs, layout=pack, chunk_len=0, bptt="full"):
    """Loss and gradient of the documents, as the loop of train_sft.py makes them."""
    model.zero_grad()
    x, y, weight, cu_seqlens = layout(docs)
    n_targets, total, state = sum(sum(mask[1:]) for _, mask in docs), 0.0, None
    backward_len = chunk_len if bptt == "truncated" else 0
    for a, b, cu in pieces(x.shape[1], cu_seqlens, backward_len):
        packed = dict(cu_seqlens=cu, targets=y[:, a:b], chunk_len=chunk_len)
        scores, state = model(x[:, a:b], state, **packed)
        loss = -(weight[:, a:b] * scores.logps).sum() / n_targets
        loss.backward()
        total += loss.item()
        state = {key: value.detach() for key, value in state.items()}
    grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return total, torch.cat(grads)


# ----------------------------------------------------------------------------------------------
# packing


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_packed_loss_of_each_document_is_its_loss_alone(version):
    model, docs = random_model(version).double(), documents(9)
    x, y, w, cu_seqlens = pack(docs)
    nll = -model(x, cu_seqlens=cu_seqlens, targets=y)[0].logps[0]
    for d, (ids, mask) in enumerate(docs):
        logits = model(torch.tensor([ids]))[0][0, :-1]
        alone = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        at = slice(int(cu_seqlens[d]), int(cu_seqlens[d + 1]))
        torch.testing.assert_close(nll[at], alone, atol=1e-9, rtol=1e-7)
        assert (
            y[0, at].tolist() == ids[1:] and w[0, at].tolist() == mask[1:]
        )  # the target's mask, not the input's
    assert x.shape[1] == sum(len(ids) - 1 for ids, _ in docs)  # not one position is wasted


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_is_the_same_packed_padded_and_in_any_micro_batch(tune):
    model, docs = random_model("x070"), documents(8)
    if tune == "lora":
        model.set_tune("lora", r=4)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.02)
    loss, want = gradient(model, docs)
    padded, got = gradient(model, docs, pad)
    assert padded == pytest.approx(loss, rel=1e-5) and (got - want).norm() < 1e-5 * want.norm()
    n_targets = sum(sum(mask[1:]) for _, mask in docs)
    for size in (1, 2):
        model.zero_grad()
        total = 0.0
        for i in range(0, 8, size):
            x, y, weight, cu_seqlens = pack(docs[i : i + size])
            logps = model(x, cu_seqlens=cu_seqlens, targets=y)[0].logps
            nll = -(weight * logps).sum() / n_targets
            nll.backward()
            total += nll.item()
        got = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        assert total == pytest.approx(loss, rel=1e-5) and (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_logprobs_of_a_completion_however_it_is_run(version):
    """Prompt and completion in one run = prompt, state, completion = token by token = what the
    sampler says, whatever the other rows and the right padding are."""
    model = random_model(version)
    prompts = [[5, 6, 7, 8], [9], [3, 1, 4, 1, 5, 9, 2, 6]]
    said = sample.generate(model, prompts, max_new_tokens=11, temperature=0.8, seed=1)
    docs = [
        (p + c.tokens, [0] * len(p) + [1] * len(c.tokens))
        for p, c in zip(prompts, said, strict=False)
    ]
    padded = model(pad(docs)[0], targets=pad(docs)[1], temperature=0.8)[0].logps
    for row, (p, c) in enumerate(zip(prompts, said, strict=False)):
        ids, n = torch.tensor([p + c.tokens]), len(p)
        whole = model.token_logprobs(ids[:, :-1], ids[:, 1:], temperature=0.8)[0, n - 1 :]
        _, state = model(ids[:, : n - 1]) if n > 1 else (None, None)
        forked = model.token_logprobs(ids[:, n - 1 : -1], ids[:, n:], state, temperature=0.8)[0]
        single = []
        for t in range(n - 1, ids.shape[1] - 1):
            scores, state = model(
                ids[:, t : t + 1], state, targets=ids[:, t + 1 : t + 2], temperature=0.8
            )
            single.append(scores.logps[0, 0])
        for got in (whole, forked, torch.stack(single), padded[row, n - 1 : n - 1 + 11]):
            assert (got - torch.tensor(c.logprobs)).abs().max() < 1e-5


# ----------------------------------------------------------------------------------------------
# long context


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize(
    "docs", [documents(1, longest=64)[:1], documents(5, seed=3), documents(3, seed=4, longest=90)]
)
def test_chunked_backward_equals_the_whole(version, docs):
    model = random_model(version).double()
    loss, want = gradient(model, docs)
    for chunk_len in (8, 13):
        got_loss, got = gradient(model, docs, chunk_len=chunk_len)
        assert got_loss == pytest.approx(loss, rel=1e-9)
        assert (got - want).norm() < 1e-9 * want.norm()
    cut_loss, cut = gradient(model, docs, chunk_len=8, bptt="truncated")
    assert cut_loss == pytest.approx(loss, rel=1e-9)
    assert (cut - want).norm() > 1e-3 * want.norm()  # truncation is another gradient


def test_chunked_backward_in_float32_and_with_checkpointing():
    model, docs = random_model("x070"), documents(2, seed=1, longest=80)
    _, want = gradient(model, docs)
    model.grad_cp = True
    _, got = gradient(model, docs, chunk_len=8)
    assert (got - want).norm() < 1e-5 * want.norm()


def test_a_chunk_that_is_run_again_drops_what_it_dropped():
    """With LoRA dropout, the recomputed forward of a chunk is the one that the loss was of."""
    model, (doc,) = random_model("x070"), documents(1, seed=2, longest=60)
    model.set_tune("lora", r=4, dropout=0.5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    x, y, weight, cu_seqlens = pack([doc])
    model.train()

    def grads(run_in_chunks):
        torch.manual_seed(7)
        model.zero_grad()
        logps = run_in_chunks()
        (-(weight * logps).sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    def by_hand():
        logps, state = [], None
        for a, b, cu in pieces(x.shape[1], cu_seqlens, 8):
            scores, state = model(x[:, a:b], state, cu_seqlens=cu, targets=y[:, a:b])
            logps.append(scores.logps)
        return torch.cat(logps, 1)

    want = grads(by_hand)
    got = grads(lambda: model(x, cu_seqlens=cu_seqlens, targets=y, chunk_len=8)[0].logps)
    assert (got - want).norm() < 1e-5 * want.norm() and want.norm() > 0


# ----------------------------------------------------------------------------------------------
# LoRA


def test_a_fresh_lora_changes_no_bit_and_only_it_trains():
    model, idx = random_model("x070"), torch.randint(0, 320, (2, 20))
    base, frozen = model(idx)[0], {n: p.clone() for n, p in model.named_parameters()}
    model.set_tune("lora", r=4, alpha=8)
    assert torch.equal(model(idx)[0], base)
    opt = torch.optim.AdamW(model.param_groups(1e-2, 0.1), eps=1e-18)
    for _ in range(20):
        (-model.token_logprobs(idx[:, :-1], idx[:, 1:]).mean()).backward()
        opt.step()
        opt.zero_grad()
    assert not torch.equal(model(idx)[0], base)
    with model.reference():
        assert torch.equal(
            model(idx)[0], base
        )  # a step later the reference still says what it said
    assert not torch.equal(model(idx)[0], base)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert (
        trained == {n for n, _ in model.named_parameters() if ".lora_" in n}
        and len(trained) == 2 * 6 * 3
    )
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert len(opt.state) == len(trained)


def test_lora_is_w_plus_scale_b_a():
    model = random_model("x070")
    x, w = torch.randn(3, 128), model.blocks[0].att.key.weight.clone()
    for rslora, scale in ((False, 8 / 4), (True, 8 / 2)):
        model.set_tune("lora", r=4, alpha=8, rslora=rslora, targets=("att.key",))
        layer = model.blocks[0].att.key
        torch.nn.init.normal_(layer.lora_B)
        torch.testing.assert_close(
            layer(x), x @ (w + scale * layer.lora_B @ layer.lora_A).T, atol=1e-4, rtol=1e-4
        )
    assert not isinstance(model.blocks[0].ffn.key, LoRALinear)
    assert tuple(layer.lora_A.shape) == (4, 128)
    layer.lora_dropout = 0.5
    assert not torch.equal(model.train().blocks[0].att.key(x), layer(x))
    model.eval()
    assert torch.equal(layer(x), layer(x))
    model.set_tune("full")  # without its adapter, every weight trains
    layer = model.blocks[0].att.key
    assert torch.equal(layer(x), torch.nn.functional.linear(x, w)) and layer.weight.requires_grad


def test_an_adapter_of_the_head_trains_and_is_heard_in_the_loss():
    """The loss without [B, T, V] and the logits are of the same head."""
    model, idx = random_model("x070").double(), torch.randint(0, 320, (2, 20))
    model.set_tune("lora", r=4, targets=("head",))
    with torch.no_grad():
        model.head.lora_B.normal_(std=0.1)

    def gradient(logps):
        model.zero_grad()
        logps.sum().backward()
        return torch.cat([model.head.lora_A.grad.flatten(), model.head.lora_B.grad.flatten()])

    logps = model(idx[:, :-1])[0].log_softmax(-1).gather(-1, idx[:, 1:, None])[..., 0]
    scored = model.token_logprobs(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(scored, logps, atol=1e-9, rtol=1e-9)
    want, got = gradient(logps), gradient(scored)
    assert (got - want).norm() < 1e-9 * want.norm() and want.norm() > 0
    with model.reference():
        assert (model.token_logprobs(idx[:, :-1], idx[:, 1:]) - scored).abs().max() > 1e-3


def test_a_fresh_lora_is_the_same_in_every_process():
    """Python orders a set of names by a hash that differs from process to process."""
    code = """
import torch
from model import RWKV, RWKVConfig, pieces
m = RWKV(RWKVConfig("x070", 2, 64, 50))
torch.manual_seed(1)
m.set_tune("lora", r=4)
for name, p in m.named_parameters():
    if ".lora_A" in name:
        print(name, p.double().sum().item())
"""
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "0123"
    }
    assert len(seen) == 1, seen


def test_extra_parameters_train_are_saved_and_have_a_reference(tmp_path):
    model, idx = random_model("x070"), torch.randint(0, 320, (1, 9))
    base = model(idx)[0]
    model.set_tune("lora", r=2, targets=("ffn",), extra=("ln", "x_k"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1
    tuned = model(idx)[0]
    with model.reference():
        assert torch.equal(model(idx)[0], base)
    assert torch.equal(model(idx)[0], tuned) and not torch.equal(tuned, base)
    path = write_tuned(model, tmp_path, "a")
    other = random_model("x070")
    other.set_tune("lora", r=2, targets=("ffn",), extra=("ln", "x_k"))
    load_tuned(other, path)
    assert torch.equal(other(idx)[0], tuned)


def test_lora_errors(tmp_path):
    with pytest.raises(UserError, match="'atn' is not a matrix.*att.key.*head"):
        random_model("x070").set_tune("lora", targets=("atn",))
    model = random_model("x070")
    model.set_tune("lora", r=4)
    path = write_tuned(model, tmp_path, "a")
    other = random_model("x070", n_embd=192)
    other.set_tune("lora", r=4)
    with pytest.raises(
        UserError, match=r"a.safetensors is of another base.*\[4, 128\].*\[4, 192\]"
    ):
        load_tuned(other, path)


# ----------------------------------------------------------------------------------------------
# the script


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small byte model and 32 conversations of words."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    RWKV(RWKVConfig("x070", 2, 64, 257)).save_pretrained(folder / "base.pth")
    words = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]
    write(
        folder / "chats.jsonl",
        *(
            {
                "messages": [
                    {"role": "user", "content": f"{a} {i}"},
                    {"role": "assistant", "content": b},
                ]
            }
            for i in range(4)
            for a, b in zip(words, words[i:] + words[:i], strict=False)
        ),
    )
    return folder


def tiny(base, out, **over):
    return Config(
        **{
            **dict(
                data=str(base / "chats.jsonl"),
                init_from=str(base / "base.pth"),
                tokenizer="bytes",
                out_dir=str(out),
                micro_bsz=8,
                global_bsz=8,
                lr=3e-3,
                lr_final=3e-4,
                warmup_steps=3,
                max_steps=6,
                eval_every=0,
                save_every=0,
                log_every=1,
                device="cpu",
            ),
            **over,
        }
    )


def test_loss_does_not_depend_on_micro_batch_packing_or_processes(base, tmp_path):
    layouts = {
        "1x8": {},
        "1x1": dict(micro_bsz=1),
        "1x2": dict(micro_bsz=2),
        "padded": dict(packing=False),
        "chunks": dict(chunk_len=7),
    }
    for name, over in layouts.items():
        train_sft.main(tiny(base, tmp_path / name, **over))
    done = torchrun("train_sft.py", tiny(base, tmp_path / "2x2", micro_bsz=2), nproc=2)
    assert done.returncode == 0, done.stderr
    want = rows(tmp_path / "1x8")
    for name in [*layouts, "2x2"]:
        for a, b in zip(rows(tmp_path / name), want, strict=True):
            for key in ("loss", "accuracy", "grad_norm"):
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), (name, a["step"], key)


@pytest.mark.parametrize("tune, lr", [("full", 3e-3), ("lora", 1e-2)])
def test_overfits_32_conversations_and_stops_by_itself(tune, lr, base, tmp_path):
    train_sft.main(
        tiny(
            base,
            tmp_path / tune,
            tune=tune,
            lr=lr,
            lr_final=lr / 5,
            lora_r=16,
            lora_targets=("att", "ffn", "head"),
            lora_extra=("emb", "ln") if tune == "lora" else (),
            global_bsz=32,
            micro_bsz=32,
            max_steps=300,
            log_every=50,
        )
    )
    assert rows(tmp_path / tune)[-1]["loss"] < 0.05
    if tune == "full":
        model, tokenizer = RWKV.from_pretrained(tmp_path / "full/rwkv-final.pth"), BYTES
    else:
        model, tokenizer = RWKV.from_pretrained(base / "base.pth"), BYTES
        model.set_tune("lora", r=16, targets=("att", "ffn", "head"), extra=("emb", "ln"))
        load_tuned(model, tmp_path / "lora/lora-final.safetensors")
    chats = [
        json.loads(line)["messages"] for line in (base / "chats.jsonl").read_text().splitlines()
    ]
    prompts = [prepare.render_chat(m[:1], tokenizer, generation_prompt=True)[0] for m in chats]
    answers = sample.generate(
        model.eval(), prompts, max_new_tokens=20, temperature=0, tokenizer=tokenizer
    )
    assert [a.text.strip() for a in answers] == [m[1]["content"] for m in chats]
    assert all(a.finish_reason == "stop" and a.tokens[-1] == 0 for a in answers)


def test_without_the_end_token_in_the_mask_it_does_not_stop(base, tmp_path):
    """The check of the test above can fail."""

    def no_end(row, tokenizer):
        ids, mask = render_row(row, tokenizer)
        return ids, [*mask[:-1], 0]

    train_sft.main(
        tiny(
            base,
            tmp_path / "run",
            template=no_end,
            global_bsz=32,
            micro_bsz=32,
            max_steps=120,
            log_every=50,
        )
    )
    model = RWKV.from_pretrained(tmp_path / "run/rwkv-final.pth")
    prompt = prepare.render_chat(
        [{"role": "user", "content": "red 1"}], BYTES, generation_prompt=True
    )[0]
    assert (
        sample.generate(model, [prompt], max_new_tokens=30, temperature=0, tokenizer=BYTES)[
            0
        ].finish_reason
        == "length"
    )


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_resume_is_bit_for_bit(tune, base, tmp_path):
    over = dict(
        tune=tune,
        val_data=str(base / "chats.jsonl"),
        eval_every=2,
        save_every=2,
        eval_samples=1,
        lora_dropout=0.1,
    )
    whole, parts = (tiny(base, tmp_path / name, **over) for name in ("whole", "parts"))
    train_sft.main(whole)
    kill_after(parts, 3, train_sft.main)
    train_sft.main(tiny(base, tmp_path / "parts", **over, resume=True))
    a, b = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert a["best_loss"] == b["best_loss"] and a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert (tmp_path / "whole" / ("best.pth" if tune == "full" else "best.safetensors")).exists()
    assert len(a["model"]) < 40 or tune == "full"  # of a LoRA run, the adapter alone


def test_eval_fn_and_template_come_from_the_config_file(base, tmp_path):
    (tmp_path / "c.py").write_text("def eval_fn(model, tokenizer):\n    return {'seven': 7.0}\n")
    cfg = config.load_config(
        Config,
        [
            str(tmp_path / "c.py"),
            f"--data={base / 'chats.jsonl'}",
            f"--init_from={base / 'base.pth'}",
            "--tokenizer=bytes",
            f"--out_dir={tmp_path / 'run'}",
            "--max_steps=1",
            "--global_bsz=8",
            "--device=cpu",
            "--lora_targets",
            "att.key",
            "head",
        ],
    )
    train_sft.main(cfg)
    assert [row["seven"] for row in rows(tmp_path / "run")] == [7.0, 7.0] and cfg.lora_targets == (
        "att.key",
        "head",
    )


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(init_from=""), "which model"),
        (dict(data="no.jsonl"), "no.jsonl does not exist"),
        (dict(chunk_len=8, packing=False), "chunk_len needs packing"),
        (dict(adapter="x.safetensors"), "adapter is for --tune=lora"),
        (dict(tokenizer=""), "vocabulary of 257 and no config.json"),
        (dict(micro_bsz=3), "not a multiple of micro_bsz"),
    ],
)
def test_bad_input(over, words, base, tmp_path):
    with pytest.raises(UserError, match=words):
        train_sft.main(tiny(base, tmp_path / "run", **over))


def test_lora_goes_on_from_a_saved_adapter(base, tmp_path):
    train_sft.main(
        tiny(
            base,
            tmp_path / "a",
            tune="lora",
            lora_r=4,
            lr=1e-2,
            max_steps=4,
            val_data=str(base / "chats.jsonl"),
        )
    )
    train_sft.main(
        tiny(
            base,
            tmp_path / "b",
            tune="lora",
            lora_r=4,
            max_steps=1,
            val_data=str(base / "chats.jsonl"),
            adapter=str(tmp_path / "a/lora-final.safetensors"),
        )
    )
    assert rows(tmp_path / "b")[0]["step"] == 0
    assert rows(tmp_path / "b")[0]["val_loss"] == pytest.approx(
        rows(tmp_path / "a")[-1]["val_loss"], rel=1e-6
    )
    with pytest.raises(UserError, match="other settings.*lora_r=4, and --lora_r=8"):
        train_sft.main(
            tiny(
                base,
                tmp_path / "c",
                tune="lora",
                lora_r=8,
                adapter=str(tmp_path / "a/lora-final.safetensors"),
            )
        )
