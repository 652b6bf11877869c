"""The optimiser's step inside the backward pass, and 8-bit moments."""

import importlib

from gosling import optimizer
from gosling.config import UserError
from gosling.weights import read_weights

import pytest
import torch
from helpers import config_of, kill_after, make_files, random_model, rows

# The step of one weight as its gradient comes wants one backward pass, and no clipping.
ALONE = dict(micro_bsz=4, global_bsz=4, grad_clip=0.0, max_steps=6, eval_every=3)
NOT_COMPARED = {"time", "tokens_per_s", "seconds/rollout", "seconds/train"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("optimizer"))


def vowels(prompts, completions, **columns):
    return [sum(c in "aeiou0123" for c in text) / 8 for text in completions]


def config(base, script, version, out, **over):
    module = importlib.import_module(script)
    cfg = module.Config(**config_of(base, script, version, out, **{**ALONE, **over}))
    if script == "train_grpo":
        cfg.reward = vowels
    return cfg, module.main


def check_equal(one, other, near=0.0):
    """Two runs' logged numbers and final weights."""
    for a, b in zip(rows(one), rows(other), strict=True):
        for key in a.keys() - NOT_COMPARED:
            # The norm of all gradients is that of the parameters' norms, another order of sums.
            expected = pytest.approx(a[key], rel=1e-6 if key == "grad_norm" else near, abs=near)
            assert b[key] == expected, key
    (final,) = [file.name for file in one.glob("*-final.*")]
    a, b = read_weights(one / final), read_weights(other / final)
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=near, rtol=near)


RUNS = [
    ("train_pretrain", "x060", dict(grad_cp=True)),
    ("train_sft", "x070", dict(chunk_len=16, val_data="", eval_every=0)),
    ("train_sft", "x070", dict(dtype="bfloat16", tune="lora", weight_decay=0.1)),
    ("train_reward", "x070", {}),
    ("train_dpo", "x060", {}),
    ("train_grpo", "x070", dict(steps_per_generation=2, beta=0.0)),
]


@pytest.mark.parametrize("script, version, over", RUNS)
def test_the_step_inside_backward_is_the_plain_step(base, tmp_path, script, version, over):
    for name, in_backward in (("plain", False), ("inside", True)):
        over = {**over, "step_in_backward": in_backward}
        cfg, main = config(base, script, version, tmp_path / name, **over)
        main(cfg)
    check_equal(tmp_path / "plain", tmp_path / "inside")


def test_one_gradient_is_there_at_a_time(monkeypatch):
    model = random_model("x070")
    model.train()
    opt = torch.optim.AdamW(model.param_groups(1e-3, 0.1))
    at_once, step = [], opt.step
    monkeypatch.setattr(opt, "step", lambda: (at_once.append(count(model)), step()))
    optimizer.step_in_backward(model, opt)
    ids = torch.randint(0, 320, (2, 30))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(ids, targets=ids)[0].logps.sum().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert at_once == [1] * len(trained) and count(model) == 0
    assert all(not torch.equal(before[name], model.get_parameter(name)) for name in trained)
    assert [len(group["params"]) for group in opt.param_groups] != [1] * len(opt.param_groups)


def count(model):
    return sum(p.grad is not None for p in model.parameters())


def test_it_resumes_bit_for_bit_and_from_a_plain_run(base, tmp_path):
    for inside_first in (True, False):
        out = tmp_path / str(inside_first)
        over = dict(val_data="", eval_every=0, step_in_backward=inside_first)
        cfg, main = config(base, "train_sft", "x070", out / "whole", **over)
        main(cfg)
        cfg, _ = config(base, "train_sft", "x070", out / "parts", **over)
        kill_after(cfg, 3, main)
        cfg.resume, cfg.step_in_backward = True, True
        main(cfg)
        check_equal(out / "whole", out / "parts")


def test_eval_fn_may_call_backward_and_trains_nothing(base, tmp_path):
    def eval_fn(model, tokenizer):
        ids = torch.arange(9)[None]
        model(ids, targets=ids)[0].logps.sum().backward()
        return 0.0

    over = dict(step_in_backward=True, val_data="")
    cfg, main = config(base, "train_sft", "x070", tmp_path / "without", **over)
    main(cfg)
    cfg, main = config(base, "train_sft", "x070", tmp_path / "with", **over)
    cfg.eval_fn = eval_fn
    main(cfg)
    a, b = (read_weights(tmp_path / name / "rwkv-final.pth") for name in ("without", "with"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "over, says",
    [
        (dict(global_bsz=8), "give --global_bsz=4"),
        (dict(grad_clip=1.0), "grad_clip=1: step_in_backward"),
        (dict(bptt="truncated", chunk_len=16), "bptt=truncated"),
    ],
)
def test_what_does_not_go_with_it_is_refused(base, tmp_path, over, says):
    over = {"step_in_backward": True, **over}
    cfg, main = config(base, "train_sft", "x070", tmp_path / "run", **over)
    with pytest.raises(UserError, match=says):
        main(cfg)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_is_told_and_nothing_is_saved(base, tmp_path):
    over = dict(step_in_backward=True, lr=1e30, lr_final=1e30, val_data="", eval_every=0)
    cfg, main = config(base, "train_sft", "x070", tmp_path / "run", **over, save_every=1)
    with pytest.raises(UserError, match="nan|NaN"):
        main(cfg)
    for file in (tmp_path / "run").glob("*.pth"):
        assert all(w.isfinite().all() for w in read_weights(file).values())


# ----------------------------------------------------------------------------------------------
# 8-bit moments


def test_without_torchao_it_says_what_to_install(base, tmp_path, monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "torchao", None)
    over = dict(optim="adamw8bit", adam_eps=1e-8)
    cfg, main = config(base, "train_sft", "x070", tmp_path / "run", **over)
    with pytest.raises(UserError, match="pip install torchao"):
        main(cfg)


def test_upstreams_eps_is_refused(base, tmp_path):
    pytest.importorskip("torchao.optim")
    over = dict(optim="adamw8bit", adam_eps=1e-18)
    cfg, main = config(base, "train_sft", "x070", tmp_path / "run", **over)
    with pytest.raises(UserError, match="give --adam_eps=1e-08"):
        main(cfg)


@pytest.mark.slow
def test_8_bit_moments_learn_alike_and_resume_bit_for_bit(base, tmp_path):
    """A moment takes a byte; the curve is plain AdamW's within noise."""
    pytest.importorskip("torchao.optim")
    common = dict(adam_eps=1e-8, max_steps=40, val_data="", eval_every=0, lr_final=1e-3)
    for name, over in (
        ("plain", {}),
        ("whole", dict(optim="adamw8bit")),
        ("inside", dict(optim="adamw8bit", step_in_backward=True)),
        ("parts", dict(optim="adamw8bit")),
    ):
        out = tmp_path / name
        cfg, main = config(base, "train_pretrain", "x070", out, **common, **over)
        if name == "parts":
            kill_after(cfg, 7, main)
            cfg.resume = True
        main(cfg)
    check_equal(tmp_path / "whole", tmp_path / "inside")
    check_equal(tmp_path / "whole", tmp_path / "parts")
    plain, eight = ([row["loss"] for row in rows(tmp_path / name)] for name in ("plain", "whole"))
    assert plain[0] == eight[0] and plain[-1] < 0.8 * plain[0]
    assert eight[-1] == pytest.approx(plain[-1], rel=0.02)
    last = torch.load(tmp_path / "whole/last.pt", weights_only=True)["optimizer"]["state"]
    sizes = [values["exp_avg.codes"].nbytes for values in last.values() if len(values) == 5]
    scales = [values["exp_avg.scale"].nbytes for values in last.values() if len(values) == 5]
    # All matrices but the low-rank pairs: a byte each, and 4 for each 64, which is the width here.
    assert len(sizes) == 2 * 6 + 2 and sum(scales) == sum(sizes) / 16
