"""The CUDA forms of the recurrence side by side: time forward and forward + backward, saved memory,
error against float64.

    python bench/kernels.py               # on a GPU: a table, and JSON lines in bench/results/
    python bench/kernels.py --compile     # no GPU: registers, spills and shared memory, from nvcc

The forms: "cuda" (tensor cores), "cuda_seq" (token by token), "chunked" (PyTorch);
flash-linear-attention where it is installed, "fla" as it comes and "fla_bounded" told how fast the
decay can be and not to compute again what it can keep; "upstream", RWKV-LM's own kernel, whose file
--upstream names. Inputs are as the networks feed them, log w in fp32. The card has all calls in its
queue when the clock starts, so that no Python is in a time.
"""

import ctypes
import functools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import wkv_cuda
from gosling import config

import timer
import upstream

WIDTHS = (768, 1024, 2048, 2560, 4096)
SHAPES = [(C, B, T) for B, T in ((8, 4096), (1, 65536), (32, 512)) for C in WIDTHS]
NAMES = {6: ["r", "logw", "k", "v", "u"], 7: ["r", "logw", "k", "v", "a", "b"]}
FORMS = {"cuda": ("cuda", "cuda_seq", "chunked"), "cpu": ("cpu", "chunked")}


@dataclass
class Config:
    version: Literal[0, 6, 7] = 0  # of the recurrence; 0: both
    rounds: int = 5  # timed rounds of each form, interleaved
    upstream: str = ""  # RWKV-LM's rwkv7_clampw_v3_for_h100.cu; empty = without
    compile: bool = False  # what nvcc says of each kernel, and nothing else
    quick: bool = False  # B 8, T 4096 at C 768 and 4096 only
    save: bool = False  # add the JSON lines to bench/results/


# ----------------------------------------------------------------------------------------------
# on a GPU


def make(version, B, T, H, kind="plain", dtype=torch.bfloat16, device="cuda"):
    """Inputs as the networks feed them.

    kind: plain; repeated: one key again and again; fastest: also as fast a decay as there is.
    """
    torch.manual_seed(0)
    r, k, v, x, y = (torch.randn(B, T, H, 64, device=device) for _ in range(5))
    k = k * 0.3
    if version == 7:
        kappa, iclr = torch.nn.functional.normalize(y, dim=-1), x.sigmoid()
        if kind != "plain":
            kappa, iclr = kappa[:, :1].expand_as(kappa), 0.99 + 0.01 * iclr
            k = kappa * 0.5 + 0.01 * k
        logw = upstream.SCALE * (torch.ones_like(x) if kind == "fastest" else x.sigmoid())
        xs = [r, logw, k, v, -kappa, kappa * iclr]
    else:
        logw = -torch.exp(torch.full_like(x, 5.0) if kind == "fastest" else x - 1)
        if kind == "repeated":
            k = k[:, :1].expand_as(k)
        xs = [r, logw, k, v, torch.randn(H, 64, device=device)]
    in_float32 = (1, 4) if version == 6 else (1,)
    dtypes = [torch.float32 if i in in_float32 else dtype for i in range(len(xs))]
    typed = [x.to(dtype).contiguous() for x, dtype in zip(xs, dtypes, strict=True)]
    return [x.requires_grad_() for x in typed]


def ours(version, backend, xs):
    wkv = wkv_cuda.wkv7 if version == 7 else wkv_cuda.wkv6
    return wkv(*xs, backend=backend)[0]


def fla(chunk, names, options, xs):
    return chunk(**dict(zip(names, xs, strict=True)), scale=1.0, **options)[0]


def forms(version, device="cuda", upstream_file=""):
    """{name: function from the inputs to y}"""
    found = {name: functools.partial(ours, version, name) for name in FORMS[device]}
    if version == 7 and upstream_file:
        found["upstream"] = functools.partial(upstream.wkv7, upstream_file)
    try:
        if version == 7:
            from fla.ops.rwkv7 import chunk_rwkv7 as chunk
        else:
            from fla.ops.rwkv6 import chunk_rwkv6 as chunk
    except ImportError:
        return found
    names = ["w" if name == "logw" else name for name in NAMES[version]]
    found["fla"] = functools.partial(fla, chunk, names, {})
    if version == 7:
        options = dict(lower_bound=upstream.SCALE, disable_recompute=True)
        found["fla_bounded"] = functools.partial(fla, chunk, names, options)
    return found


def inputs_of(name, xs):
    """What a form takes, of our inputs."""
    return upstream.inputs(xs) if name == "upstream" else xs


def exact(name, version, xs):
    """y of these inputs of a form, in float64."""
    if name == "upstream":
        xs = [xs[0], upstream.logw_of(xs[1]), *xs[2:]]
    return ours(version, "chunked", xs)


def forward_and_backward(form, xs, dy):
    torch.autograd.grad(form(xs), xs, dy)


def milliseconds(form, xs, dy):
    """Forward, as training runs it; forward + backward."""
    works = functools.partial(form, xs), functools.partial(forward_and_backward, form, xs, dy)
    return [timer.queued(work, xs[0].device.type, ahead=True) for work in works]


def saved(form, xs):
    """GB that autograd keeps beside the inputs and y; on a CPU nobody counts them."""
    if not xs[0].is_cuda:
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = form(xs)
    return (torch.cuda.memory_allocated() - before - y.numel() * y.element_size()) / 1e9


def errors(version, name, form, kind, T=2048, H=4, device="cuda"):
    """Relative RMS of y and of each gradient, against float64 on the same inputs."""
    xs = inputs_of(name, make(version, 1, T, H, kind, device=device))
    dy = torch.randn(1, T, H, 64, device=device).bfloat16()
    doubles = [x.detach().double().requires_grad_() for x in xs]
    want = exact(name, version, doubles)
    want = [want, *torch.autograd.grad(want, doubles, dy.double())]
    y = form(xs)
    got = [y, *torch.autograd.grad(y, xs, dy)]
    return {
        name: float(((g.double() - w).norm() / w.norm().clamp(min=1e-38)).item())
        for name, g, w in zip(["y", *NAMES[version]], got, want, strict=True)
    }


def about_the_card():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return dict(
        date=str(date.today()),
        card=torch.cuda.get_device_name(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=subprocess.run(query, capture_output=True, text=True).stdout.strip(),
    )


def time_shape(version, found, C, B, T, rounds, device="cuda"):
    """-> {form: (ms forward, ms forward + backward, GB saved)} of those, of `forms`, that run"""
    xs = make(version, B, T, C // 64, device=device)
    dy = torch.randn_like(xs[0])
    inputs, memory, times = {}, {}, {}
    for name, form in found.items():
        try:
            inputs[name] = inputs_of(name, xs)
            forward_and_backward(form, inputs[name], dy)  # builds, tunes, warms
            memory[name], times[name] = saved(form, inputs[name]), []
        except Exception as error:  # out of memory, or a peer that does not take this shape
            first_line = str(error).strip().splitlines()[:1]
            print(f"{C:5} {B:3} {T:6}  {name:12}{type(error).__name__}: {first_line}", flush=True)
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for name in times:
            times[name].append(milliseconds(found[name], inputs[name], dy))
    return {name: (*timer.median(times[name], 4), memory[name]) for name in times}


def measure(version, cfg):
    """Rows of JSON, printed as tables."""
    about, found = about_the_card(), forms(version, upstream_file=cfg.upstream)
    print(f"\nWKV-{version} on {about['card']}")
    print(f"{'C':>5} {'B':>3} {'T':>6}  {'form':12}{'forward':>10}{'f + b':>10} ms{'saved':>9} GB")
    for C, B, T in SHAPES:
        if cfg.quick and (B != 8 or C not in (768, 4096)):
            continue
        timed = time_shape(version, found, C, B, T, cfg.rounds)
        for name, (forward, both, gb) in timed.items():
            row = f"{C:5} {B:3} {T:6}  {name:12}{forward:10.3f}{both:10.3f}   {gb:9.3f}"
            print(row, flush=True)
            yield dict(
                bench="kernels",
                version=version,
                form=name,
                C=C,
                B=B,
                T=T,
                forward_ms=forward,
                forward_backward_ms=both,
                saved_gb=round(gb, 4),
                **about,
            )
    columns = "".join(f"{name:>9}" for name in ["y", *NAMES[version]])
    print(f"relative RMS error{'':9}" + columns)
    for kind in ("plain", "repeated", "fastest"):
        for name, form in found.items():
            off = errors(version, name, form, kind)
            print(f"{kind:10} {name:16}" + "".join(f"{e:9.1e}" for e in off.values()), flush=True)
            row = dict(bench="kernel_errors", version=version, form=name, kind=kind)
            yield {**row, **off, **about}


# ----------------------------------------------------------------------------------------------
# without one

ENTRY = re.compile(
    r"\d(forward|backward|combine|find_T_and_D|find_E)(?:I(f|13__nv_bfloat16)?)?"
    r"(?:Lb([01])E)?(?:Li(\d)E)?.*for 'sm_(\d+)'"
)
NUMBERS = re.compile(
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.S
)


def nvcc(version):
    """Registers, spills and shared memory of each kernel, for sm_80 and sm_90, as nvcc says."""
    banner = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", banner)[1]
    with tempfile.TemporaryDirectory() as folder:
        options = ["-O3", "-std=c++17", "-Xptxas", "-v", "-shared", "-Xcompiler", "-fPIC"]
        options += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
        source = ROOT / f"wkv_cuda/wkv{version}_chunk.cu"
        command = ["nvcc", *options, "-o", f"{folder}/wkv.so", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise config.UserError(f"nvcc failed: {done.stderr[-2000:]}")
        shared = getattr(ctypes.CDLL(f"{folder}/wkv.so"), f"wkv{version}_chunk_shared_bytes")
        for entry in done.stderr.split("Compiling entry function")[1:]:
            yield kernel_row(version, entry, shared, release)


def kernel_row(version, entry, shared, release):
    """What nvcc prints of one kernel -> a row of JSON."""
    kernel, logw, flag, at_once, sm = ENTRY.search(entry).groups()
    stores, loads, registers = map(int, NUMBERS.search(entry).groups())
    numbers = {"forward": 0, "find_T_and_D": 0, "backward": 1, "combine": 2, "find_E": 3}
    shared_bytes = shared(numbers[kernel], int(logw == "13__nv_bfloat16"))
    if flag == "1":
        kernel = {"backward": "scan", "combine": "combine_backward"}[kernel]
    return dict(
        bench="nvcc",
        date=str(date.today()),
        version=version,
        kernel=kernel,
        logw={"f": "float32", None: None}.get(logw, "bfloat16"),
        sm=int(sm),
        at_once=at_once and int(at_once),  # blocks of it on one multiprocessor, as compiled for
        registers=registers,
        spill_store_bytes=stores,
        spill_load_bytes=loads,
        shared_bytes=shared_bytes,
        threads=128,
        nvcc=release,
    )


def main(cfg):
    if not cfg.compile and not torch.cuda.is_available():
        raise config.UserError(
            "bench/kernels.py needs CUDA, and there is no CUDA device here; "
            "--compile asks nvcc alone, tests/test_kernels.py proves the kernels on a CPU"
        )
    for version in (cfg.version,) if cfg.version else (7, 6):
        for row in nvcc(version) if cfg.compile else measure(version, cfg):
            if cfg.compile:
                print(json.dumps(row), flush=True)
            if cfg.save or not cfg.compile:
                name = "nvcc" if cfg.compile else re.sub(r"\W+", "-", row["card"].lower())
                path = ROOT / f"bench/results/{date.today()}-{name}.jsonl"
                with open(path, "a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(config.read_flags(Config))
