"""Nobody waits for the device inside a step: the scripts' loops run on tensors without content.

Whatever is read of such a tensor on the host is an error, as it would be a wait on a GPU.
"""

import importlib
import math
import traceback
import types

import wkv_cuda
from bench.count import to_fake
from gosling import batch, processes, runs
from gosling.token_files import TokenFileWriter
from model import packing_of
from wkv_cuda import cpu, cuda, cuda_seq, packed

import numpy as np
import pytest
import torch
from helpers import documents, random_model, write
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

both = pytest.mark.parametrize("version", ["x060", "x070"])
PAIR = {"prompt": "one two", "chosen": "three", "rejected": "four five"}
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
DATA = {  # a script's rows, and settings of its own
    "train_pretrain": (None, dict(n_layer=2, n_embd=64, ctx_len=24)),
    "train_sft": ([{"messages": CHAT}] * 4, dict(chunk_len=16)),
    "train_state": ([{"messages": CHAT}] * 4, {}),
    "train_reward": ([PAIR] * 4, {}),
    "train_dpo": ([PAIR] * 4, {}),
    "train_grpo": ([{"prompt": "one two"}] * 4, dict(num_generations=2, rollouts_every=0)),
}


def no_rollouts(sampler, prompts, cursor, cfg, run):
    """In place of train_grpo.next_rollouts: nothing is sampled."""
    completion = dict(tokens=[3, 4, 5], mask=[1, 1, 1], logprobs=[-1.0, -1.0, math.nan])
    group = dict(ids=[7, 8], completions=[completion] * 2, reward=[1.0, 0.0], advantages=[1.0, -1])
    return [dict(group, number=i, prompt="a", rewards={}) for i in range(cfg.global_bsz)], cursor


@pytest.fixture
def on_device(monkeypatch):
    """What is sent to the device, and the models that are trained, have shapes and no content."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for name in DATA:  # a script that is imported later would have the stand-ins for good
        importlib.import_module(name)

    def send(x, device):
        return mode.from_tensor(x)

    def make_optimizer(model, cfg, run, make=runs.make_optimizer):
        with mode:
            to_fake(model)
        return make(model, cfg, run)

    monkeypatch.setattr(runs, "make_optimizer", make_optimizer)
    for room in (packed, batch, processes):
        monkeypatch.setattr(room, "to_device", send)
    return send


def settings_of(script, folder):
    """The script's Config for one step on two micro-batches."""
    rows, own = DATA[script.__name__]
    data = folder / "text"
    if rows is None:
        with TokenFileWriter(data, np.uint16) as file:
            file.add(list(range(200)))
    else:
        data = write(folder / "rows.jsonl", *rows)
        random_model("x070", n_layer=2, n_embd=64).save_pretrained(folder / "m.pth")
        own = {**own, "init_from": str(folder / "m.pth")}
    common = dict(micro_bsz=2, global_bsz=4, max_steps=1, tokenizer="bytes", device="cpu")
    return script.Config(data=str(data), out_dir=str(folder / "out"), **common, **own)


@pytest.mark.parametrize("name", DATA)
def test_a_script_waits_for_the_device_after_the_step_alone(name, tmp_path, monkeypatch, on_device):
    """The first number that its loop reads are the sums, once the optimiser has moved."""
    cpu.unavailable()
    script, steps = importlib.import_module(name), []
    if hasattr(script, "to_device"):
        monkeypatch.setattr(script, "to_device", on_device)
    if name == "train_grpo":
        monkeypatch.setattr(script, "next_rollouts", no_rollouts)
        monkeypatch.setattr(script, "check_settings", lambda cfg: ["reward"])
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda opt: steps.append(step(opt)))
    with pytest.raises(DataDependentOutputException) as e:
        script.main(settings_of(script, tmp_path))
    here = [frame for frame in traceback.extract_tb(e.tb) if frame.filename == script.__file__]
    assert "= sums.tolist()" in here[-1].line and len(steps) == 1


def test_a_read_before_the_step_is_seen(on_device):
    """What the test above rests on."""
    model, (x, y, weight, cu_seqlens) = random_model("x070"), batch.pack(documents(3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake(model)
    with torch.no_grad():
        scores, _ = model(x, cu_seqlens=cu_seqlens, targets=y)
    with pytest.raises(DataDependentOutputException):
        float((weight * scores.logps).sum())


@both
def test_tokens_and_packed_rows_through_the_cuda_ops(version, monkeypatch):
    """The Python around the kernels: a training pass, and tokens that are decoded after it."""
    for form in (cuda, cuda_seq):
        monkeypatch.setattr(form, "unavailable", lambda: None)
        monkeypatch.setattr(form, "DEVICE", "cpu")
    monkeypatch.setattr(
        wkv_cuda, "_fastest", lambda x, state: "cuda_seq" if x[0].shape[1] == 1 else "cuda"
    )
    model = random_model(version, n_layer=2).bfloat16()
    x, y, _, cu_seqlens = batch.pack(documents(3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake(model)
        scores, state = model(x, cu_seqlens=cu_seqlens, targets=y)
        scores.logps.sum().backward()
        state, logits = {key: value.detach() for key, value in state.items()}, torch.zeros(3, 1, 9)
        for _ in range(2):
            with torch.no_grad():
                logits, state = model(logits[:, -1].argmax(-1, keepdim=True), state)
    assert logits.shape == (3, 1, 320) and model.blocks[1].att.key.weight.grad is not None


@both
def test_a_step_that_is_not_finite_leaves_everything(version):
    """Weights and moments to the bit, and the steps that AdamW counts."""
    model = random_model(version, n_layer=2, n_embd=64)
    cfg = types.SimpleNamespace(
        lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99, adam_eps=1e-8, optimizer="adamw"
    )
    opt = runs.make_optimizer(model, cfg, types.SimpleNamespace(device=torch.device("cpu")))
    other = random_model(version, n_layer=2, n_embd=64)
    plain = torch.optim.AdamW(
        other.param_groups(1e-3, 0.1), betas=(0.9, 0.99), eps=1e-8, fused=True
    )
    wrong, right = torch.tensor(math.inf), torch.tensor(1.0)
    for one in (wrong, right, torch.tensor(math.nan), right):
        for m in (model, other):
            for p in m.parameters():
                p.grad = torch.full_like(p, float(one)) if p.requires_grad else None
        runs.step_if_finite(opt, one, right)
        runs.step_if_finite(opt, right, wrong)
        if one is right:
            plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, value in plain.state.get(q, {}).items():
            assert torch.equal(value, opt.state[p][name])


def test_borders_of_documents_are_made_once_per_batch(monkeypatch):
    """Not in every layer, and the kernels get what was made."""
    made, model = [], random_model("x070", n_layer=3)
    monkeypatch.setattr(packed, "to_device", lambda x, device: made.append(x) or x)
    ids, cu_seqlens = batch.pack_ids([[1, 2], [], [3, 4, 5]])
    packing = packing_of(cu_seqlens, ids)
    assert packing.cu_seqlens.host.tolist() == packing.cu_seqlens.device.tolist() == [0, 2, 2, 5]
    assert [x.tolist() for x in packing[1:]] == [[0, 2], [0, 2], [1, 4]]
    assert len(made) == 4
    model(ids, cu_seqlens=cu_seqlens)
    assert len(made) == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@both
def test_a_real_step_never_waits(version):
    """torch.cuda's own count of waits, in a step and in a token that is decoded."""
    model = random_model(version, n_layer=2).to("cuda")
    model.compute_dtype = torch.bfloat16
    opt = torch.optim.AdamW(model.param_groups(1e-3, 0.1), fused=True)

    def step():
        x, y, weight, cu_seqlens = batch.pack(documents(3), "cuda")
        scores, state = model(x, cu_seqlens=cu_seqlens, targets=y)
        loss = -(weight * scores.logps).sum()
        loss.backward()
        grad_norm = runs.clip_gradients(model, 1.0)
        sums = runs.sum_on(loss.device, loss, 1)
        runs.step_if_finite(opt, sums[0], grad_norm)
        opt.zero_grad()
        with torch.no_grad():
            model(x[:, :3].mT, {key: value.detach() for key, value in state.items()})
        return sums

    step().tolist()  # builds the kernels, and makes AdamW's moments
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(sums.tolist()[0])
