"""The CUDA forms of the recurrence side by side: time forward and forward + backward, saved memory, error against float64.

    python bench/kernels.py                   # on a GPU: a table, and JSON lines in bench/results/
    python bench/kernels.py --compile         # no GPU needed: registers, spills and shared memory, from nvcc

The forms: "cuda" (tensor cores), "cuda_seq" (token by token, stands for the official kernel), "chunked" (PyTorch), and
flash-linear-attention where it is installed. Inputs are as the networks feed them, log w in fp32.
"""

import ctypes
import json
import re
import statistics
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
from gosling import config, runs  # noqa: E402
import wkv_cuda  # noqa: E402

SHAPES = [
    (C, B, T) for B, T in ((8, 4096), (1, 65536), (32, 512)) for C in (768, 1024, 2048, 2560, 4096)
]
NAMES = {6: "r logw k v u", 7: "r logw k v a b"}


@dataclass
class Config:
    version: Literal[0, 6, 7] = 0  # of the recurrence; 0: both
    rounds: int = 20  # timed passes of each form, interleaved
    compile: bool = False  # what nvcc says of each kernel, and nothing else
    quick: bool = False  # B 8, T 4096 at C 768 and 4096 only
    save: bool = False  # add the JSON lines to bench/results/


def make(version, B, T, H, kind="plain", dtype=torch.bfloat16, device="cuda"):
    """Inputs as the networks feed them; repeated: one key again and again; fastest: as fast a decay as there is."""
    torch.manual_seed(0)
    r, k, v, x, y = (torch.randn(B, T, H, 64, device=device) for _ in range(5))
    k = k * 0.3
    if version == 7:
        kappa, iclr = torch.nn.functional.normalize(y, dim=-1), x.sigmoid()
        if kind != "plain":
            kappa, iclr = kappa[:, :1].expand_as(kappa), 0.99 + 0.01 * iclr
            k = kappa * 0.5 + 0.01 * k
        logw = -0.6065306597 * (torch.ones_like(x) if kind == "fastest" else x.sigmoid())
        xs = [r, logw, k, v, -kappa, kappa * iclr]
    else:
        logw = -torch.exp(torch.full_like(x, 5.0) if kind == "fastest" else x - 1)
        if kind == "repeated":
            k = k[:, :1].expand_as(k)
        xs = [r, logw, k, v, torch.randn(H, 64, device=device)]
    keep = (1, 4) if version == 6 else (1,)
    return [
        x.to(torch.float32 if i in keep else dtype).contiguous().requires_grad_()
        for i, x in enumerate(xs)
    ]


def forms(version):
    def ours(backend):
        return lambda xs: (wkv_cuda.wkv7 if version == 7 else wkv_cuda.wkv6)(*xs, backend=backend)[
            0
        ]

    found = {name: ours(name) for name in ("cuda", "cuda_seq", "chunked")}
    try:
        if version == 7:
            from fla.ops.rwkv7 import chunk_rwkv7

            found["fla"] = lambda xs: chunk_rwkv7(
                **dict(zip("r w k v a b".split(), xs)), scale=1.0
            )[0]
        else:
            from fla.ops.rwkv6 import chunk_rwkv6

            found["fla"] = lambda xs: chunk_rwkv6(**dict(zip("r w k v u".split(), xs)), scale=1.0)[
                0
            ]
    except ImportError:
        pass
    return found


def milliseconds(form, xs, dy):
    """Forward; forward + backward."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    marks[0].record()
    y = form(xs)
    marks[1].record()
    torch.autograd.grad(y, xs, dy)
    marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]), marks[0].elapsed_time(marks[2])


def saved(form, xs):
    """GB that autograd keeps beside the inputs and y."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = form(xs)
    return (torch.cuda.memory_allocated() - before - y.numel() * y.element_size()) / 1e9


def errors(version, form, kind, T=2048, H=4):
    """Relative RMS of y and of each gradient, against float64 on the same inputs."""
    xs = make(version, 1, T, H, kind)
    dy = torch.randn(1, T, H, 64, device="cuda").bfloat16()
    exact = [x.detach().double().requires_grad_() for x in xs]
    want = forms(version)["chunked"](exact)
    want = [want, *torch.autograd.grad(want, exact, dy.double())]
    y = form(xs)
    got = [y, *torch.autograd.grad(y, xs, dy)]
    return {
        name: float(((g.double() - w).norm() / w.norm().clamp(min=1e-38)).item())
        for name, g, w in zip(["y", *NAMES[version].split()], got, want)
    }


def nvcc(version):
    """Registers, spills and shared memory of each kernel, for sm_80 and sm_90, as nvcc tells them."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                "nvcc",
                "-O3",
                "-std=c++17",
                "-Xptxas",
                "-v",
                "-shared",
                "-Xcompiler",
                "-fPIC",
                "-o",
                f"{folder}/wkv.so",
                *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)),
                str(ROOT / f"wkv_cuda/wkv{version}_chunk.cu"),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise config.UserError(f"nvcc failed: {done.stderr[-2000:]}")
        shared = getattr(ctypes.CDLL(f"{folder}/wkv.so"), f"wkv{version}_chunk_shared_bytes")
        for part in done.stderr.split("Compiling entry function")[1:]:
            kernel, logw, flag, sm = re.search(
                r"\d(forward|backward|combine)I(f|13__nv_bfloat16)?(?:Lb([01])E)?.*for 'sm_(\d+)'",
                part,
            ).groups()
            stores, loads, registers = map(
                int,
                re.search(
                    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
                    part,
                    re.S,
                ).groups(),
            )
            bytes_ = shared(
                ("forward", "backward", "combine").index(kernel),
                int(logw != "f" and logw is not None),
            )
            if flag == "1":
                kernel = {"backward": "scan", "combine": "combine_backward"}[kernel]
            yield dict(
                bench="nvcc",
                date=str(date.today()),
                version=version,
                kernel=kernel,
                logw={"f": "float32", None: None}.get(logw, "bfloat16"),
                sm=int(sm),
                registers=registers,
                spill_store_bytes=stores,
                spill_load_bytes=loads,
                shared_bytes=bytes_,
                threads=128,
                nvcc=re.search(r"release ([\d.]+)", said)[1],
            )


def measure(version, cfg):
    here = dict(
        date=str(date.today()),
        card=torch.cuda.get_device_name(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip(),
    )
    print(
        f"\nWKV-{version} on {here['card']}\n{'C':>5} {'B':>3} {'T':>6}  {'form':10}{'forward':>10}{'f + b':>10} ms"
        f"{'saved':>9} GB"
    )
    for C, B, T in SHAPES:
        if cfg.quick and (B != 8 or C not in (768, 4096)):
            continue
        xs = make(version, B, T, C // 64)
        dy = torch.randn_like(xs[0])
        times, kept = {}, {}
        for name, form in forms(version).items():
            try:
                milliseconds(form, xs, dy)  # builds, tunes, warms
                kept[name], times[name] = saved(form, xs), []
            except Exception as error:  # out of memory, or a peer that does not take this shape
                print(
                    f"{C:5} {B:3} {T:6}  {name:10}{type(error).__name__}: {str(error).splitlines()[0][:60]}"
                )
                torch.cuda.empty_cache()
        for _ in range(cfg.rounds):
            for name in times:
                times[name].append(milliseconds(forms(version)[name], xs, dy))
        for name, pairs in times.items():
            forward, both = (statistics.median(t) for t in zip(*pairs))
            print(
                f"{C:5} {B:3} {T:6}  {name:10}{forward:10.3f}{both:10.3f}   {kept[name]:9.3f}",
                flush=True,
            )
            yield dict(
                bench="kernels",
                version=version,
                form=name,
                C=C,
                B=B,
                T=T,
                forward_ms=round(forward, 4),
                forward_backward_ms=round(both, 4),
                saved_gb=round(kept[name], 4),
                **here,
            )
    print(f"relative RMS error{'':9}" + "".join(f"{n:>9}" for n in ["y", *NAMES[version].split()]))
    for kind in ("plain", "repeated", "fastest"):
        for name, form in forms(version).items():
            found = errors(version, form, kind)
            print(f"{kind:10} {name:16}" + "".join(f"{e:9.1e}" for e in found.values()), flush=True)
            yield dict(
                bench="kernel_errors", version=version, form=name, kind=kind, **found, **here
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
                with open(ROOT / f"bench/results/{date.today()}-{name}.jsonl", "a") as out:
                    out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(config.read_flags(Config))
