"""bench/memory.py: what it counts, to numbers worked out by hand; and, slow, to real processes."""

import functools
import json
import subprocess
import sys
import time

from model import RWKV

import pytest
import torch
from helpers import ROOT

sys.path.append(str(ROOT / "bench"))  # for what they import of each other
from bench import memory
from gosling.config import UserError

# Two layers of width 64, vocabulary 128. A block has 19 vectors, four pairs of rank 32 and the
# matrices of both mixes; the root has embedding, head and ln_out. Nothing trains v0, v1 and v2 of
# the first layer; its ln0 does.
C, V, L = 64, 128, 2
BLOCK = 19 * C + 8 * 32 * C + 4 * C * C + 2 * C * 4 * C
ROOT_PART = 2 * V * C + 2 * C
ALL = L * BLOCK + 2 * C + ROOT_PART
TRAINED = ALL - (C + 2 * 32 * C)
WHOLE = L * C  # w0 of each layer is no part of the shares

count_all = memory.count
TINY = dict(n_layer=L, n_embd=C, vocab=V, ctx_len=32)


@functools.cache
def count(**flags):
    cfg = memory.Config(**TINY, **flags)
    memory.check(cfg)
    return count_all(memory.size_of(cfg), memory.layout_of(cfg))


def test_one_card_holds_all_weights():
    counted = count()
    assert (counted.all, counted.trained) == (ALL, TRAINED) == (150_144, 145_984)
    assert counted.peak["parameters"] == 4 * ALL
    assert counted.peak["optimiser"] == 8 * TRAINED
    assert counted.after["gradients"] == 4 * TRAINED
    assert counted.sent == {}
    # Whichever comes first: the gradients of all, or what one block keeps.
    assert counted.peak["gradients"] + counted.peak["activations"] > 4 * TRAINED


@pytest.mark.parametrize("accumulation", [1, 3])
def test_without_grad_cp_what_blocks_and_head_have_in_float32_has_copies(accumulation):
    counted = count(grad_cp=False, accumulation=accumulation)
    assert counted.peak["copies"] == counted.after["copies"] == 2 * (L * BLOCK + 2 * C + V * C)
    assert "copies" not in count(accumulation=accumulation).peak
    assert "copies" not in count(grad_cp=False, dtype="float32", accumulation=accumulation).peak


def test_with_ddp_every_card_holds_all_and_the_gradients_twice():
    counted, alone = count(gpus=4), count()
    assert {**alone.peak, "buckets": 4 * TRAINED} == counted.peak
    assert counted.sent == {"all-reduce": 2 * 3 / 4 * 4 * TRAINED}


def test_with_fsdp_every_card_holds_a_share():
    counted = count(gpus=4, shard="fsdp")
    assert (counted.all, counted.trained) == (ALL, TRAINED)
    assert counted.peak["parameters"] == 4 * ((ALL - WHOLE) // 4 + WHOLE) == 150_528
    assert counted.peak["optimiser"] == 8 * ((TRAINED - WHOLE) // 4 + WHOLE) == 292_736
    assert counted.after["gradients"] == 4 * ((TRAINED - WHOLE) // 4 + WHOLE) == 146_368
    assert counted.after["activations"] < 1000  # nothing stays gathered
    assert counted.sent == {
        "all-gather, forward": 3 / 4 * 2 * (ALL - WHOLE),
        "all-gather, backward": 3 / 4 * 2 * (ALL - WHOLE - ROOT_PART),  # the root stays
        "reduce-scatter": 3 / 4 * 4 * (TRAINED - WHOLE),
        "all-reduce": 2 * 3 / 4 * 4 * WHOLE,
    }


def test_what_is_gathered_is_the_root_and_at_most_two_blocks():
    """In bfloat16; and a block's gradients in float32, on their way."""
    gathered = count(gpus=4, shard="fsdp").peak["gathered"]
    assert 2 * (ROOT_PART + BLOCK) <= gathered <= 2 * (ROOT_PART + 2 * BLOCK) + 4 * BLOCK + 512


def test_passes_before_the_last_keep_whole_gradients_and_gather_again():
    once, thrice = count(gpus=4, shard="fsdp"), count(gpus=4, shard="fsdp", accumulation=3)
    assert thrice.peak["gradients"] >= 4 * TRAINED
    for name in ("all-gather, forward", "all-gather, backward"):
        assert thrice.sent[name] == 3 * once.sent[name]
    for name in ("reduce-scatter", "all-reduce"):
        assert thrice.sent[name] == once.sent[name]
    assert thrice.after["gradients"] == once.after["gradients"]


def test_with_cpu_offload_a_card_holds_what_is_gathered():
    cfg = memory.Config(**TINY, gpus=4, shard="fsdp", cpu_offload=True)
    offloaded, kept = count(gpus=4, shard="fsdp", cpu_offload=True), count(gpus=4, shard="fsdp")
    assert offloaded.sent == kept.sent and offloaded.after == kept.after
    assert memory.to_and_from_host(cfg, offloaded) == 2 * 150_528 + 146_368
    assert memory.to_and_from_host(cfg, kept) == 2 * 150_528 + 146_368


@pytest.mark.parametrize("tune", ["lora", "state"])
def test_frozen_weights_are_divided_too(tune):
    alone, counted = count(tune=tune), count(tune=tune, gpus=4, shard="fsdp")
    assert counted.trained == alone.trained
    assert counted.peak["parameters"] < 0.5 * alone.peak["parameters"]
    assert ("reduce-scatter" in counted.sent) == (tune == "lora")
    if tune == "state":  # it is tiny, and stays whole
        assert counted.after["gradients"] == alone.after["gradients"] == 4 * alone.trained
        assert counted.sent["all-reduce"] == 2 * 3 / 4 * 4 * alone.trained


def test_tokens_per_second_follow_from_the_given_speeds():
    sent = 1.5 * (ALL - WHOLE) + 1.5 * (ALL - WHOLE - ROOT_PART) + 3 * (TRAINED - WHOLE) + 6 * WHOLE
    flags = dict(gpus=4, shard="fsdp")
    cfg = memory.Config(**TINY, **flags, rate=32.0, link=2 * sent / 1e9)  # a second; half of one
    hidden, waited = memory.tokens_per_second(cfg, count(**flags))
    assert hidden == pytest.approx(4 * 32 / 1.0)
    assert waited == pytest.approx(4 * 32 / 1.5)


def test_the_predicted_rate_passes_through_what_it_was_drawn_through():
    """Without grad_cp: 0.1B at 124,000 tokens/s, 1.5B at 27,000."""
    cfg = memory.Config(grad_cp=False)
    assert memory.rate_of_a_card(cfg, 191_034_624) == pytest.approx(124_000, rel=0.01)
    assert memory.rate_of_a_card(cfg, 1_527_404_544) == pytest.approx(27_000, rel=0.01)
    with_cp = memory.Config(grad_cp=True)
    assert memory.rate_of_a_card(with_cp, 1_527_404_544) == pytest.approx(27_000 * 3 / 4, rel=0.01)


# ----------------------------------------------------------------------------------------------
# official sizes


@pytest.mark.parametrize(
    "name, official",
    [  # of the released files, which have no v0, v1 and v2 in the first layer
        ("0b1", 191_034_624),
        ("0b4", 450_767_872),
        ("1b5", 1_527_404_544),
        ("2b9", 2_947_735_040),
        ("7b2", 7_199_141_888),
        ("13b3", 13_269_245_952),
    ],
)
def test_official_sizes_are_built_on_no_memory_at_once(name, official):
    start = time.process_time()
    with torch.device("meta"):
        model = RWKV(memory.official(name))
    assert time.process_time() - start < 10
    assert all(p.is_meta for p in model.parameters())
    c = model.config
    first = c.n_embd + 2 * c.value_rank * c.n_embd
    assert sum(p.numel() for p in model.parameters()) == official + first


def test_a_case_is_printed_and_says_what_was_not_measured(capsys, monkeypatch):
    monkeypatch.setattr(memory, "count", lambda c, layout: count(**flags))
    flags = dict(gpus=4, shard="fsdp")
    memory.main(memory.Config(**TINY, **flags))
    words = capsys.readouterr().out
    assert "150,144 parameters" in words and "a card of 8 GB" in words
    assert "predicted for an H200, not measured" in words and "50 GB/s" not in words
    assert "300 GB/s each way, assumed" in words
    flags = dict(gpus=4, shard="fsdp", cpu_offload=True)
    memory.main(memory.Config(**TINY, **flags, rate=7.0, link=2.0))
    words = capsys.readouterr().out
    assert "7 tokens/s, given" in words and "2 GB/s each way, given" in words
    assert "host, GB for each card" in words and "predicted" not in words


@pytest.mark.parametrize(
    "flags, word",
    [
        (dict(model="0b1", n_layer=2), "--model and --n_layer"),
        (dict(gpus=8), "--gpus"),
        (dict(model="0b1", cpu_offload=True), "--cpu_offload"),
        (dict(model="0b1", gpus=8, cpu_offload=True), "--cpu_offload"),
        (dict(model="0b1", gpus=8, shard="fsdp", method="GRPO, 8 completions"), "GRPO"),
        (dict(model="0b1", method="SFT"), "method"),
        (dict(measure=True, shard="fsdp"), "torchrun"),
        (dict(measure=True, tune="lora"), "all weights"),
    ],
)
def test_flags_that_do_not_go_together_are_said(flags, word, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=word):
        memory.main(memory.Config(**flags))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_the_count_is_within_a_tenth_of_real_processes(shard):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    line += ["--standalone", "bench/memory.py", "--measure", f"--shard={shard}"]
    line += ["--n_layer=6", "--n_embd=512", "--vocab=4096", "--ctx_len=256", "--dtype=float32"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    rows = [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]
    assert [row["case"][-11:] for row in rows] == ["rank 0 of 2", "rank 1 of 2"], done.stderr
    assert all(0.9 <= row["ratio"] <= 1.1 for row in rows), rows
