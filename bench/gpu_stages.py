"""The stages of bench/gpu.py: functions of its Config and of `record(what, measured, unit)`.

A figure's name is that of its full size, in a tiny run too.
"""

import contextlib
import csv
import functools
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_pretrain
from gosling import engine, runs
from gosling.files import whole_lines
from model import RWKV, RWKVConfig
from wkv_cuda import cpu, cuda, cuda_seq, fused

import kernels as wkv
import timer

SIZES = {"0.1B": (12, 768), "1.5B": (24, 2048)}  # layers, width
VOCAB = 65536
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # bf16, dense, a second
WKV_SHAPES = [(4096, 8, 4096), (2048, 8, 4096), (768, 8, 4096), (2048, 1, 65536)]
TRAINING = [  # size, B, T, grad_cp, blocks compiled
    ("0.1B", 8, 4096, False, False),
    ("0.1B", 16, 512, False, False),
    ("1.5B", 2, 4096, False, False),
    ("1.5B", 8, 4096, True, False),
    ("0.1B", 8, 4096, False, True),
]
# What each counter of ncu says: how often the schedulers issue, what they wait for, and traffic.
COUNTERS = {
    "sm__cycles_elapsed.max": "cycles",
    "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor %",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
    "smsp__inst_executed_op_local_ld.sum": "local loads",
    "dram__bytes.sum": "DRAM bytes",
    **{
        f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio": f"stall {why}"
        for why in ("long_scoreboard", "short_scoreboard", "barrier", "no_instruction", "wait")
    },
}


def pick(cfg, full, tiny):
    """What the scale says."""
    return full if cfg.scale == "full" else tiny


def is_cuda(cfg):
    return cfg.device == "cuda"


# ----------------------------------------------------------------------------------------------
# the card, the build, the tests


def card(cfg, record):
    if is_cuda(cfg):
        fields = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            print(subprocess.run(query, capture_output=True, text=True).stdout.strip())
        about = torch.cuda.get_device_properties(0)
        record("multiprocessors", about.multi_processor_count)
        record("memory", about.total_memory / 1e9, "GB")
    n = pick(cfg, 2**30, 2**12)
    x, y = (torch.empty(n, dtype=torch.bfloat16, device=cfg.device) for _ in range(2))
    ms = timer.queued(functools.partial(y.copy_, x), cfg.device, ahead=True)
    record("device copy, read and written", 4 * n / ms / 1e9, "TB/s")
    del x, y
    for M, K, N in ((8192, 8192, 8192), (32768, 768, 768)):
        name = f"bf16 product, {M} x {K} x {N}"
        M, K, N = pick(cfg, (M, K, N), (32, 32, 32))
        x, w = (torch.randn(*shape, device=cfg.device).bfloat16() for shape in ((M, K), (K, N)))
        ms = timer.queued(functools.partial(torch.matmul, x, w), cfg.device, ahead=True)
        record(name, 2 * M * K * N / ms / 1e9, "TFLOP/s")


def build(cfg, record):
    start = time.perf_counter()
    forms = {"sequential kernels": cuda_seq, "tensor-core kernels": cuda}
    for name, form in (forms if is_cuda(cfg) else {"C++": cpu}).items():
        if missing := form.unavailable():  # the first one builds; "cuda" tries itself on the card
            raise RuntimeError(f"{name}: {missing}")
    record("build and trial", time.perf_counter() - start, "s")


def ended(line):
    """-> (test, PASSED, FAILED, ERROR or SKIPPED), of a line of `pytest -v`; or two None"""
    alone = re.match(r"(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", line)
    if alone:
        return alone.groups()
    of_a_worker = re.match(r"\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED) (tests/\S+::.*)", line)
    return of_a_worker.groups()[::-1] if of_a_worker else (None, None)


def tests(cfg, record):
    """Those marked gpu. Every failure is kept at once, so that a time limit loses none."""
    files = pick(cfg, "tests", "tests/test_cuda.py")
    options = ["-v", "--tb=line", "--color=no", "-p", "no:cacheprovider", "-m", "gpu"]
    options += ["-n", str(pick(cfg, 4, 0)), files]
    command = [sys.executable, "-m", "pytest", *options]
    counts = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as pytest:
        for line in pytest.stdout:
            test, outcome = ended(line)
            if outcome:
                counts[outcome] += 1
            if outcome in ("FAILED", "ERROR"):
                record(test, outcome)
            if line.startswith(("FAILED", "ERROR", "E ")):  # the summary at the end, with reasons
                print(f"{'':9}{line.rstrip()[:160]}", flush=True)
    if pytest.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {pytest.returncode}")
    record("tests that passed", counts["PASSED"], skipped=counts["SKIPPED"])
    n_failed = counts["FAILED"] + counts["ERROR"]
    record("tests that failed", n_failed)
    if n_failed:
        raise RuntimeError(f"{n_failed} tests failed")


# ----------------------------------------------------------------------------------------------
# kernels


def kernels(cfg, record):
    for version in (7, 6):
        forms = wkv.forms(version, cfg.device, cfg.upstream)
        quick = {name: form for name, form in forms.items() if name != "chunked"}
        for C, B, T in WKV_SHAPES:
            shape, label = pick(cfg, (C, B, T), (64, 1, 32)), f"WKV-{version} C {C} B {B} T {T}"
            timed = wkv.time_shape(version, quick, *shape, rounds=3, device=cfg.device)
            for name, (forward, both, gb) in timed.items():
                name = pick_name(cfg, name)
                record(f"{label}, {name}: forward", forward, "ms")
                record(f"{label}, {name}: forward + backward", both, "ms", saved_gb=gb)
        for kind in ("plain", "repeated", "fastest"):
            for name, form in quick.items():
                label = f"WKV-{version} {kind}, {pick_name(cfg, name)}: error of"
                size = pick(cfg, {}, dict(T=64, H=1))
                try:
                    off = wkv.errors(version, name, form, kind, device=cfg.device, **size)
                except Exception as error:  # a peer that does not take this
                    record(f"{label} y", type(error).__name__, said=str(error)[:300])
                    continue
                record(f"{label} y", off.pop("y"))
                record(f"{label} gradients", max(off.values()), **off)
    head(cfg, record)


def pick_name(cfg, name):
    """A CPU's form stands where the card's would."""
    return "cuda" if name == "cpu" else name


def head(cfg, record):
    """Microseconds a token of the head's loss, forward and backward, with its products."""
    V, M = pick(cfg, (VOCAB, 16384), (96, 8))
    forms = {"PyTorch": fused.ScoreTokens}
    forms["Triton"] = fused.score_in_triton(torch.device(cfg.device))
    if is_cuda(cfg) and forms["Triton"] is fused.ScoreTokens:
        record("the head's loss, Triton", "missing")
        del forms["Triton"]
    for C in (768, 2048):
        label, C = f"the head's loss, C {C}", pick(cfg, C, 32)
        dtype = torch.bfloat16 if is_cuda(cfg) else torch.float32
        h, weight = (torch.randn(n, C, device=cfg.device, dtype=dtype) * 0.05 for n in (M, V))
        targets = torch.randint(0, V, (M,), device=cfg.device)
        leaves = [h.requires_grad_(), weight.float().requires_grad_()]
        for name, form in forms.items():
            work = functools.partial(loss_and_gradient, form, leaves, targets)
            record(f"{label}, {name}", 1e3 * timer.queued(work, cfg.device) / M, "us")


def loss_and_gradient(form, leaves, targets):
    logps, *_ = form.apply(*leaves, targets, 1.0, 1e-4)
    torch.autograd.grad(-logps.mean(), leaves)


# ----------------------------------------------------------------------------------------------
# a network of random weights, and what a step of it is


def network(cfg, size, dtype=torch.float32):
    """A model that computes in bf16 on a GPU; drawn there, since upstream's start takes long."""
    layers, width = pick(cfg, SIZES[size], (2, 64))
    with torch.device("meta"):
        model = RWKV(RWKVConfig("x070", layers, width, pick(cfg, VOCAB, 96)))
    model.to_empty(device=cfg.device)
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.compute_dtype = torch.bfloat16 if is_cuda(cfg) else None
    return model.to(dtype)


def training_step(cfg, size, B, T, grad_cp=False, is_compiled=False):
    """-> (model, function of one optimiser step), as in train_pretrain.py but for what the host
    reads of it."""
    B, T = pick(cfg, (B, T), (2, 16))
    model = network(cfg, size)
    model.grad_cp = grad_cp
    if is_compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend=pick(cfg, "inductor", "eager"))
    settings = train_pretrain.Config(device=cfg.device, lr=1e-4)
    run = SimpleNamespace(device=torch.device(cfg.device))
    with contextlib.redirect_stdout(io.StringIO()):  # what it prints of the groups
        opt = runs.make_optimizer(model, settings, run)
    x, y = (torch.randint(0, model.config.vocab_size, (B, T), device=cfg.device) for _ in range(2))

    def step():
        scores, _ = model(x, targets=y, l2wrap=1e-4)
        (-scores.logps.sum() / y.numel()).backward()
        runs.clip_gradients(model, 1.0)
        opt.step()
        opt.zero_grad()

    return model, step


def decoding_step(cfg, size, B):
    """One token of B sequences through the network, by itself."""
    model = network(cfg, size, torch.bfloat16 if is_cuda(cfg) else torch.float32).eval()
    state, ids = model.zero_state(B), torch.zeros(B, 1, dtype=torch.long, device=cfg.device)

    @torch.no_grad()
    def step():
        model(ids, state)

    return step


def forget(cfg):
    if is_cuda(cfg):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ----------------------------------------------------------------------------------------------
# counters


def counters(cfg, record):
    """What a step launches and waits for, from PyTorch's profiler; what the kernels wait for, from
    ncu where it is installed and may read the card's counters."""
    _, train = training_step(cfg, "0.1B", 8, 4096)
    profile(cfg, record, "0.1B training step", train)
    profile(cfg, record, "0.1B decoding step", decoding_step(cfg, "0.1B", 1))
    forget(cfg)
    for C in (4096, 768):
        ncu(cfg, record, C)


def profile(cfg, record, label, step):
    """Kernels of one step, the longest of them, and the calls that wait for the card."""
    from torch.profiler import ProfilerActivity

    step()
    on = ProfilerActivity.CUDA if is_cuda(cfg) else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[on]) as found:
        step()
        if is_cuda(cfg):
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if is_cuda(cfg) else "self_cpu_time_total"
    rows = [(e.key, e.count, getattr(e, time_of) / 1e3) for e in found.key_averages()]
    rows = sorted((row for row in rows if row[2] > 0), key=operator_time, reverse=True)
    longest = [[name[:100], count, round(ms, 4)] for name, count, ms in rows[:20]]
    record(f"{label}: kernels", sum(count for _, count, _ in rows), longest=longest)
    record(f"{label}: on the card", sum(ms for *_, ms in rows), "ms")
    for name, count, ms in longest[:10]:
        print(f"{'':9}{name[:60]:61}{count:5} x {ms / count:9.4f} ms")
    record(f"{label}: waits of the host", *waits(cfg, step))


def operator_time(row):
    return row[2]


def waits(cfg, step):
    """-> (how many calls of a step wait for the card,); on a CPU none does."""
    if not is_cuda(cfg):
        return (0,)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message)]
    for place in sorted({f"{Path(w.filename).name}:{w.lineno}" for w in found}):
        print(f"{'':9}waits at {place}")
    return (len(found),)


# Run under ncu, which counts between the two calls alone.
ONE_PASS = """
import sys, torch
sys.path[:0] = ["bench", "."]
import kernels
device, C, B, T = sys.argv[1], *map(int, sys.argv[2:])
form = kernels.forms(7, device)["cuda" if device == "cuda" else "cpu"]
xs = kernels.make(7, B, T, C // 64, device=device)
dy = torch.randn_like(xs[0])
kernels.forward_and_backward(form, xs, dy)
if device == "cuda":
    torch.cuda.cudart().cudaProfilerStart()
kernels.forward_and_backward(form, xs, dy)
if device == "cuda":
    torch.cuda.cudart().cudaProfilerStop()
"""


def ncu(cfg, record, C):
    found = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if found is None:
        record(f"ncu, C {C}", "missing")
        return
    size = pick(cfg, (C, 8, 1024), (64, 1, 32))
    work = [sys.executable, "-c", ONE_PASS, cfg.device, *map(str, size)]
    for what in ("--metrics=" + ",".join(COUNTERS), "--set=full"):  # if it does not know one
        options = ["--profile-from-start=off", "--csv", "--page=raw", "--print-units=base", what]
        done = subprocess.run([found, *options, *work], capture_output=True, text=True, cwd=ROOT)
        kernels_found = counted(done.stdout)
        if kernels_found:
            break
    else:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        record(f"ncu, C {C}", "nothing", said=said[-5:])
    for name, values in kernels_found:
        values = {COUNTERS[key]: value for key, value in values.items()}
        record(f"ncu, C {C}: {name[:40]}", values.get("issue %", "?"), "issue %", counters=values)


def counted(text):
    """ncu's CSV -> [(kernel's name, {metric: number as text})]"""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    if not heads:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[heads[0] :]))))
    return [  # the first row has the units
        (row["Kernel Name"], {key: row[key] for key in COUNTERS if row.get(key)})
        for row in rows[1:]
        if row.get("Kernel Name")
    ]


# ----------------------------------------------------------------------------------------------
# training, decoding, GRPO


def train(cfg, record):
    for size, B, T, grad_cp, is_compiled in TRAINING:
        label = f"{size} B {B} T {T}" + " grad_cp" * grad_cp + " compiled" * is_compiled
        try:
            model, step = training_step(cfg, size, B, T, grad_cp, is_compiled)
            ms = timer.queued(step, cfg.device, seconds=1.5)
        except torch.OutOfMemoryError:
            record(f"{label}: training", "no memory")
        else:
            B, T = pick(cfg, (B, T), (2, 16))
            speed = 1e3 * B * T / ms
            record(f"{label}: training", speed, "tokens/s")
            report_use(cfg, record, label, model, speed)
        model = step = None
        forget(cfg)


def report_use(cfg, record, label, model, speed):
    """Of the card: its arithmetic, if its peak is known, and its memory."""
    if not is_cuda(cfg):
        return
    # Six operations for each parameter and token; the embedding is only read.
    n = sum(p.numel() for p in model.parameters()) - model.emb.weight.numel()
    for name, peak in PEAK.items():
        if name in torch.cuda.get_device_name():
            record(f"{label}: of the card's peak", 100 * 6 * n * speed / peak, "%")
    record(f"{label}: memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


def decode(cfg, record):
    for size in SIZES:
        dtype = torch.bfloat16 if is_cuda(cfg) else torch.float32
        model = network(cfg, size, dtype).eval()
        for B in (1, 16, 64, 256):
            speed = decoding_speed(cfg, model, B)
            record(f"{size} B {B}: decoding", speed, "tokens/s")
        for B in (1, 256):
            step = decoding_step(cfg, size, pick(cfg, B, 2))
            ms = timer.queued(step, cfg.device, seconds=0.3)
            record(f"{size} B {B}: the network alone", 1e3 * pick(cfg, B, 2) / ms, "tokens/s")
        if size == "0.1B":  # as GRPO samples: from the weights that train
            model = network(cfg, size).eval()
            speed = decoding_speed(cfg, model, 64)
            record(f"{size} B 64, float32 weights: decoding", speed, "tokens/s")
        del model
        forget(cfg)


def decoding_speed(cfg, model, B):
    """Tokens a second of B sequences, sampled; a second run, prompts of 16 tokens included."""
    B, tokens = pick(cfg, (B, 96 if B == 1 else 48), (min(B, 2), 3))
    prompts = torch.randint(1, model.config.vocab_size, (B, 16)).tolist()
    options = dict(max_new_tokens=tokens, seed=0, stop_ids=(), batch_size=B, progress=False)
    engine.generate(model, prompts, **options)
    start = time.perf_counter()
    engine.generate(model, prompts, **options)
    return B * tokens / (time.perf_counter() - start)


def grpo(cfg, record):
    """30 steps of train_grpo.py on a small model after SFT, which is trained here if need be."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for command in grpo_commands(cfg, folder):
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                sys.stderr.write(done.stderr)
                raise RuntimeError(f"{' '.join(command)}: status {done.returncode}")
            record(f"GRPO: {Path(command[0]).stem}", time.perf_counter() - start, "s, so far")
        rows = whole_lines(Path(folder, "grpo/metrics.jsonl"))
        rows = [row for row in rows if "reward" in row]  # of training steps
    gaps = [row["sampling/sampling_logp_difference/mean"] for row in rows]
    record("GRPO: difference of sampler and trainer", max(gaps), "nats")
    for name, some in (("first", rows[:5]), ("last", rows[-5:])):
        record(f"GRPO: reward, {name} steps", sum(row["reward"] for row in some) / len(some))
        seconds = sum(row["seconds/rollout"] + row["seconds/train"] for row in some) / len(some)
        record(f"GRPO: {name} steps, each", seconds, "s")


def grpo_commands(cfg, folder):
    """The command lines, each after the one before."""
    steps = pick(cfg, (500, 150, 30), (2, 2, 2))
    start, tasks = cfg.grpo_from and str(Path(cfg.grpo_from).resolve()), f"{folder}/tasks"
    on = [f"--device={cfg.device}", "--log_every=1"]
    sizes = pick(cfg, [], ["--text_tokens=20000", "--sft=64", "--prompts=64", "--heldout=8"])
    yield ["tasks.py", f"--out={tasks}", *sizes]
    if not start:
        yield [
            "prepare.py",
            f"{tasks}_text.jsonl",
            f"--out={tasks}",
            "--tokenizer=bytes",
            "--val=0.01",
        ]
        yield [
            *("train_pretrain.py", "config/pretrain_tasks.py", f"--out_dir={folder}/pretrain"),
            *(f"--data={tasks}_train", "--val_data=", f"--max_steps={steps[0]}", *on),
        ]
        yield [
            *("train_sft.py", "config/sft_tiny.py", f"--out_dir={folder}/sft"),
            *(f"--data={tasks}_sft.jsonl", "--val_data=", f"--max_steps={steps[1]}", *on),
            f"--init_from={folder}/pretrain/rwkv-final.pth",
        ]
        start = f"{folder}/sft/rwkv-final.pth"
    batch = pick(cfg, [], ["--micro_bsz=8", "--global_bsz=8", "--num_generations=4"])
    yield [
        *(
            "train_grpo.py",
            "config/grpo_tiny.py",
            f"--out_dir={folder}/grpo",
            f"--init_from={start}",
        ),
        *(f"--data={tasks}_prompts.jsonl", f"--max_steps={steps[2]}", *on, *batch),
    ]
