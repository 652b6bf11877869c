"""How much memory a training run takes on each card, what the cards send each other, and how fast
it may be: worked out for any size on no memory at all. The memory is measured too, on a CPU.

    python bench/memory.py                       what fits on which card, as in docs/memory.md
    python bench/memory.py --model=13b3 --gpus=64 --shard=fsdp
                                                 one case, item by item, with bytes and tokens/s
    python bench/memory.py --n_layer=24 --n_embd=2048 --tune=lora --ctx_len=4096 --micro_bsz=2
                                                 the same for a size of your own
    python bench/memory.py --measure             the count against peaks of real runs (VmHWM of a
        process each), and ratios: LoRA to full tuning, 65,536 tokens to 4,096 at one chunk_len
    torchrun --nproc_per_node=2 bench/memory.py --measure --shard=fsdp
                                                 the count against train_pretrain.py's own peak,
                                                 of each process

bench/count.py counts the bytes. Tokens/s follow from speeds that are assumed until you give yours:
--rate and --link.
"""

import concurrent.futures
import ctypes
import dataclasses
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config, optimizer, runs
from gosling.batch import pack
from gosling.config import UserError
from gosling.token_files import TokenFileWriter
from model import RWKV, RWKVConfig
from wkv_cuda import fused

import timer
from count import LORA, OFFICIAL, Layout, count, official

MIB = 2**20
LAYERS_MEASURED = 12  # of --measure under torchrun, unless --n_layer says
CARDS = (8, 12, 16, 24, 48, 80, 141)  # GB
METHODS = {  # sequences and decoding slots of a row
    "pretraining, SFT": (1, 0),
    "DPO, reward model": (2, 0),
    "GRPO, 8 completions": (8, 8),
}
# Microseconds that an H200 needs for a token, all weights training, without grad_cp: 3.9 and 21.7
# for each 1e9 parameters. That is the line through what the compiled kernels and the bytes of the
# other operations let expect of 0.1B and 1.5B, 124,000 and 27,000 tokens/s. Predicted, never
# measured.
PREDICTED = (3.9, 21.7)
NVLINK, NETWORK = 300, 50  # GB/s that a card sends while it receives as much: assumed


@dataclass
class Config:
    measure: bool = False  # real runs, minutes
    model: Literal["", "0b1", "0b4", "1b5", "2b9", "7b2", "13b3"] = ""  # one case: official RWKV-7
    n_layer: NonNegativeInt = 0  # one case, a size of your own: layers; 0 and no model = the table
    n_embd: PositiveInt = 768  # of a size of your own: width
    vocab: PositiveInt = 65536  # vocabulary
    tune: Literal["full", "lora", "state"] = "full"  # what trains
    method: str = "pretraining, SFT"  # or "DPO, reward model", "GRPO, 8 completions"
    ctx_len: PositiveInt = 1024  # tokens of a sequence
    micro_bsz: PositiveInt = 1  # documents, pairs or prompts of a backward pass
    accumulation: PositiveInt = 1  # backward passes of a step
    grad_cp: bool = True  # gradient checkpointing
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of frozen weights and of the computation
    optim: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments in a quarter of the memory
    step_in_backward: bool = False  # one gradient in memory at a time
    gpus: PositiveInt = 1  # cards, one process each
    shard: Literal["none", "fsdp"] = "none"  # none = DDP: all weights on every card
    cpu_offload: bool = False  # with fsdp: the shares lie in the memory of the host
    rate: NonNegativeFloat = 0  # tokens/s of one card by itself; 0 = predicted for an H200
    link: NonNegativeFloat = 0  # GB/s that a card sends; 0 = 300 up to 8 cards, 50 beyond
    host_link: PositiveFloat = 25  # GB/s between a card and its host, for cpu_offload
    chunk_len: PositiveInt = 1024  # --measure: of the long-context pair


# ----------------------------------------------------------------------------------------------
# counted


def check(cfg):
    """UserError for flags that do not go together."""
    sharded = cfg.shard == "fsdp"
    if cfg.model and cfg.n_layer:
        raise UserError("--model and --n_layer are both given; give one of them")
    if cfg.method not in METHODS:
        raise UserError(f"method={cfg.method!r}: expected one of {', '.join(map(repr, METHODS))}")
    if not (cfg.model or cfg.n_layer or cfg.measure) and (sharded or cfg.gpus > 1):
        raise UserError("--gpus and --shard want one case; add --model or --n_layer")
    if cfg.measure and sharded and "WORLD_SIZE" not in os.environ:
        raise UserError("--measure --shard=fsdp wants several: torchrun --nproc_per_node=2 …")
    if cfg.measure and (cfg.model or cfg.gpus > 1 or cfg.cpu_offload or cfg.tune != "full"):
        raise UserError(
            "--measure trains all weights, in the processes that torchrun starts; leave --model "
            "(for --n_layer), --gpus, --cpu_offload and --tune out"
        )
    if (cfg.step_in_backward or cfg.optim == "adamw8bit") and (sharded or cfg.gpus > 1):
        raise UserError("--optim=adamw8bit and --step_in_backward are for one card; leave one out")
    if cfg.step_in_backward and cfg.accumulation > 1:
        raise UserError("--step_in_backward wants one backward pass a step: --accumulation=1")
    if cfg.cpu_offload and (not sharded or cfg.gpus == 1):
        raise UserError("--cpu_offload wants --shard=fsdp and at least --gpus=2")
    if sharded and METHODS[cfg.method][1]:
        raise UserError(
            "--shard=fsdp is counted for training alone, and GRPO gathers weights to sample as "
            "well; leave --shard or --method out"
        )


def size_of(cfg):
    """The RWKVConfig of a case."""
    if cfg.model:
        return official(cfg.model, cfg.vocab)
    try:
        return RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab)
    except ValueError as e:
        raise UserError(str(e)) from None


def layout_of(cfg):
    sequences, slots = METHODS[cfg.method]
    return Layout(
        tune=cfg.tune,
        dtype=getattr(torch, cfg.dtype),
        grad_cp=cfg.grad_cp,
        tokens=cfg.micro_bsz * sequences * cfg.ctx_len,
        accumulation=cfg.accumulation,
        slots=cfg.micro_bsz * slots,
        optim=cfg.optim,
        step_in_backward=cfg.step_in_backward,
        gpus=cfg.gpus,
        shard=cfg.shard,
        cpu_offload=cfg.cpu_offload,
    )


def smallest_card(gb):
    """The smallest that holds it; the allocator leaves gaps, and CUDA takes some itself."""
    return next((card for card in CARDS if gb * 1.05 + 0.6 < card), None)


def cell(gb):
    """The table's words for so many GB."""
    card = smallest_card(gb)
    return f"{gb:.1f} -> {card}" if card else f"{gb:.0f}: more than one"


def table(cfg):
    print(
        f"ctx_len {cfg.ctx_len}, micro_bsz {cfg.micro_bsz}, grad_cp {cfg.grad_cp}, {cfg.dtype}; "
        "GB, and the smallest card that holds it"
    )
    print("| | tune | " + " | ".join(OFFICIAL) + " |\n|---|---|" + "---|" * len(OFFICIAL))
    for method in METHODS:
        for tune in ("full", "lora", "state"):
            cells = []
            for name in OFFICIAL:
                case = dataclasses.replace(cfg, model=name, method=method, tune=tune)
                counted = count(size_of(case), layout_of(case))
                cells.append(cell(sum(counted.peak.values()) / 1e9))
            print(f"| {method} | {tune} | " + " | ".join(cells) + " |", flush=True)


# ----------------------------------------------------------------------------------------------
# one case, with what is sent and how fast it may be


def rate_of_a_card(cfg, n_all):
    """Tokens/s of one card that waits for nobody: what the user says, or predicted.

    Time goes with the passes over the weights: forward, the gradient of what goes in, the gradient
    of the weights, and for grad_cp the forward again.
    """
    if cfg.rate:
        return cfg.rate
    passes = 2 + (cfg.tune == "full") + cfg.grad_cp
    microseconds = PREDICTED[0] + PREDICTED[1] * n_all / 1e9
    return 1e6 / (microseconds * passes / 3)


def link_of_a_card(cfg):
    return cfg.link or (NVLINK if cfg.gpus <= 8 else NETWORK)


def to_and_from_host(cfg, counted):
    """Bytes between a card and its host in a step: shares go to the card for each gathering, and
    gradients come back."""
    if not cfg.cpu_offload:
        return 0
    return counted.peak["parameters"] * 2 * cfg.accumulation + counted.after["gradients"]


def tokens_per_second(cfg, counted):
    """-> (all that is sent hidden behind the work, none of it): tokens/s of all cards"""
    tokens = cfg.accumulation * layout_of(cfg).tokens
    work = tokens / rate_of_a_card(cfg, counted.all)
    waits = [sum(counted.sent.values()) / (link_of_a_card(cfg) * 1e9)]
    waits.append(to_and_from_host(cfg, counted) / (cfg.host_link * 1e9))
    return tuple(cfg.gpus * tokens / seconds for seconds in (max(work, *waits), work + sum(waits)))


def gigabytes(items):
    return ", ".join(f"{name} {size / 1e9:.3g}" for name, size in items.items() if size)


def print_case(cfg):
    c, layout = size_of(cfg), layout_of(cfg)
    counted = count(c, layout)
    print(
        f"{c.n_layer} layers x {c.n_embd}, {counted.all:,} parameters, tune={cfg.tune}, "
        f"{layout.tokens:,} tokens a pass, grad_cp={cfg.grad_cp}, {cfg.dtype}; gpus={cfg.gpus}, "
        f"shard={cfg.shard}, cpu_offload={cfg.cpu_offload}, accumulation={cfg.accumulation}"
    )
    peak = counted.peak
    if cfg.cpu_offload:
        on_host = {name: peak[name] for name in ("parameters", "optimiser")}
        on_host["gradients"] = counted.after["gradients"]
        peak = {name: size for name, size in peak.items() if name not in on_host}
        together = sum(on_host.values()) / 1e9
        print(f"host, GB for each card: {gigabytes(on_host)}; together {together:.3g}")
    together = sum(peak.values()) / 1e9
    card = smallest_card(together)
    fits = f"a card of {card} GB" if card else "no card"
    print(f"card, GB at the peak: {gigabytes(peak)}; together {together:.3g}: {fits}")
    if cfg.gpus > 1:
        print(f"card, GB sent in a step, and as many received: {gigabytes(counted.sent)}")
    print_speed(cfg, counted)


def print_speed(cfg, counted):
    rate, link = rate_of_a_card(cfg, counted.all), link_of_a_card(cfg)
    whose_rate = "given" if cfg.rate else "predicted for an H200, not measured"
    print(f"one card by itself: {rate:,.0f} tokens/s, {whose_rate}")
    if cfg.cpu_offload:
        moved = to_and_from_host(cfg, counted) / 1e9
        print(
            f"card and host: {moved:.3g} GB in a step at {cfg.host_link:g} GB/s; the optimiser's "
            "time on the CPU is not counted"
        )
    if cfg.gpus > 1:
        whose_link = "given" if cfg.link else "assumed"
        hidden, waited = tokens_per_second(cfg, counted)
        print(
            f"all cards, from this and {link:g} GB/s each way, {whose_link}: {waited:,.0f} "
            f"tokens/s if they wait for what is sent, {hidden:,.0f} if work hides it"
        )


# ----------------------------------------------------------------------------------------------
# measured


@dataclass(frozen=True)
class Case:
    tune: str
    n_layer: int
    n_embd: int
    vocab: int
    T: int
    chunk_len: int = 0
    grad_cp: bool = False
    step_in_backward: bool = False


def random_model(case):
    """A network whose initial values are quick to draw, and its optimiser."""
    with torch.device("meta"):
        model = RWKV(RWKVConfig("x070", case.n_layer, case.n_embd, case.vocab))
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.set_tune(case.tune, **(LORA if case.tune == "lora" else {}))
    model.grad_cp = case.grad_cp
    opt = torch.optim.AdamW(model.param_groups(1e-4, 0.0), fused=True)
    if case.step_in_backward:
        optimizer.step_in_backward(model, opt)
    return model, opt


def train(case):
    """Two optimiser steps, or none without a case -> the largest memory of this process, bytes."""
    torch.set_num_threads(1)
    if case is not None:
        model, opt = random_model(case)
        for _ in range(2):
            ids = torch.randint(0, case.vocab, (case.T + 1,)).tolist()
            x, y, weight, cu_seqlens = pack([(ids, [1] * len(ids))])
            scores, _ = model(x, cu_seqlens=cu_seqlens, targets=y, chunk_len=case.chunk_len)
            loss = -(weight * scores.logps).sum() / case.T
            loss.backward()
            opt.step()
            opt.zero_grad()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def peak(case):
    """`train` in a process of its own."""
    # Every tensor is a mapping of its own: glibc's heap, left to itself, keeps up to 1.6 times as
    # much.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(train, case).result()


def compare_with_estimate(case, measured):
    c = RWKVConfig("x070", case.n_layer, case.n_embd, case.vocab)
    layout = Layout(case.tune, torch.float32, case.grad_cp, case.T, on_a_gpu=False)
    layout.step_in_backward = case.step_in_backward
    estimated = sum(count(c, layout).peak.values())
    words = f"{case.tune}, {case.n_layer} x {case.n_embd}, vocabulary {case.vocab}, {case.T} tokens"
    timer.report(
        "memory",
        case=words + ", grad_cp" * case.grad_cp + ", step in backward" * case.step_in_backward,
        estimate_mib=round(estimated / MIB),
        measured_mib=round(measured / MIB),
        ratio=round(estimated / measured, 3),
    )


def measure(cfg):
    torch.set_num_threads(1)
    nothing = peak(None)
    full = Case("full", 12, 768, 65536, 128)
    lora = dataclasses.replace(full, tune="lora")
    peaks = {}
    for case in (
        full,
        lora,
        dataclasses.replace(full, step_in_backward=True),
        Case("full", 12, 768, 65536, 1024, grad_cp=True),
        Case("full", 6, 512, 4096, 2048),
        Case("lora", 6, 512, 4096, 4096),
        Case("state", 6, 512, 4096, 4096, grad_cp=True),
    ):
        peaks[case] = peak(case)
        compare_with_estimate(case, peaks[case] - nothing)
    timer.report(
        "memory",
        case="lora to full, 12 x 768, vocabulary 65536, ctx 128, one document",
        lora_mib=round(peaks[lora] / MIB),
        full_mib=round(peaks[full] / MIB),
        ratio=round(peaks[lora] / peaks[full], 3),
    )
    short, long = (peak(Case("full", 4, 256, 4096, T, cfg.chunk_len)) for T in (4096, 65536))
    timer.report(
        "memory",
        case=f"65,536 tokens to 4,096, 4 x 256, chunk_len {cfg.chunk_len}, exact gradient",
        short_mib=round(short / MIB),
        long_mib=round(long / MIB),
        ratio=round(long / short, 3),
    )


# ----------------------------------------------------------------------------------------------
# measured, several processes


def keep_nothing():
    """In place of fused.keep_memory: every tensor is a mapping of its own, given back when it goes,
    so that the process holds what it uses."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def status(*names):
    """Bytes that the system says of this process, added up."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return sum(int(re.search(rf"{name}:\s+(\d+)", text)[1]) * 1024 for name in names)


def most_anonymous():
    """The largest anonymous memory of this process so far; what it maps from files only grows."""
    return status("VmHWM") - status("RssFile", "RssShmem")


def random_data(folder, cfg, windows):
    """A token file of so many windows -> its prefix, and the tokenizer's name"""
    tokens = np.random.default_rng(0).integers(1, cfg.vocab, windows * cfg.ctx_len + 1)
    with TokenFileWriter(f"{folder}/data", np.uint32) as f:
        f.add(tokens.tolist())
    return f"{folder}/data", f"integers:{cfg.vocab - 2}"


def measure_processes(cfg):
    """train_pretrain.py in these processes: the peak of each, to what is counted."""
    import train_pretrain

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(tempfile.gettempdir()) / f"gosling-memory-{os.getppid()}"  # torchrun's
    before, peaks = [], []
    open_model, checkpoint_name = train_pretrain.open_model, runs.checkpoint_name

    def open_model_(*args):
        before.append(status("RssAnon"))
        return open_model(*args)

    def checkpoint_name_(cfg, done, max_steps):
        if done == max_steps:  # the last step is over, and nothing is saved yet
            peaks.extend(runs.gather([most_anonymous() - before[0]]))
        return checkpoint_name(cfg, done, max_steps)

    with (
        unittest.mock.patch.object(fused, "keep_memory", keep_nothing),
        unittest.mock.patch.object(train_pretrain, "open_model", open_model_),
        unittest.mock.patch.object(runs, "checkpoint_name", checkpoint_name_),
    ):
        try:
            train_pretrain.main(config_of_run(train_pretrain, cfg, world, folder, rank))
        finally:
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
    if rank == 0:
        compare_processes(cfg, world, peaks)


def config_of_run(train_pretrain, cfg, world, folder, rank):
    """Three steps on random tokens; every process writes the same ones for itself."""
    steps, global_bsz = 3, cfg.micro_bsz * world * cfg.accumulation
    data_folder = folder / str(rank)
    data_folder.mkdir(parents=True)
    data, tokenizer = random_data(data_folder, cfg, steps * global_bsz)
    return train_pretrain.Config(
        data=data,
        tokenizer=tokenizer,
        n_layer=cfg.n_layer or LAYERS_MEASURED,
        n_embd=cfg.n_embd,
        out_dir=str(folder / "run"),
        device="cpu",
        dtype=cfg.dtype,
        shard=cfg.shard,
        micro_bsz=cfg.micro_bsz,
        global_bsz=global_bsz,
        ctx_len=cfg.ctx_len,
        grad_cp=cfg.grad_cp,
        max_steps=steps,
        save_every=0,
        eval_every=0,
    )


def compare_processes(cfg, world, peaks):
    c = RWKVConfig("x070", cfg.n_layer or LAYERS_MEASURED, cfg.n_embd, cfg.vocab)
    layout = layout_of(dataclasses.replace(cfg, gpus=world))
    counted = sum(count(c, dataclasses.replace(layout, on_a_gpu=False)).peak.values())
    for rank, measured in enumerate(peaks):
        timer.report(
            "memory",
            case=f"{c.n_layer} x {c.n_embd}, vocabulary {c.vocab_size}, {layout.tokens} tokens, "
            f"{cfg.dtype}, {cfg.accumulation} passes, shard {cfg.shard}, rank {rank} of {world}",
            estimate_mib=round(counted / MIB),
            measured_mib=round(measured / MIB),
            ratio=round(counted / measured, 3),
        )


def main(cfg):
    check(cfg)
    if cfg.measure and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        measure_processes(cfg)
    elif cfg.measure:
        measure(cfg)
    elif cfg.model or cfg.n_layer:
        print_case(cfg)
    else:
        table(cfg)


if __name__ == "__main__":
    main(config.read_flags(Config))
