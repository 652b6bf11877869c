"""Fixtures, the slow marker, and one thread per process: two-thread runs beside other work are
several times slower."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from helpers import IN_INTERPRETER

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a script's jobs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def library_on_cpu(tmp_path_factory):
    """The CUDA sources, compiled by g++."""
    from wkv_cuda import cpu, cuda_seq

    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    path = tmp_path_factory.mktemp("wkv") / "wkv.so"
    sources = [str(p) for p in cuda_seq.SOURCES if p.suffix == ".cu"]
    subprocess.run(
        [
            "g++",
            cpu.FLAGS[0],
            "-std=c++17",
            "-O2",
            "-shared",
            "-fPIC",
            "-Wno-unknown-pragmas",
            "-include",
            str(ROOT / "tests/cuda_on_cpu.h"),
            "-x",
            "c++",
            *sources,
            "-o",
            str(path),
        ],
        check=True,
    )
    return ctypes.CDLL(str(path))


@pytest.fixture
def emulated(library_on_cpu, monkeypatch):
    """The CUDA ops take CPU tensors, and run there."""
    from wkv_cuda import cuda, cuda_seq

    monkeypatch.setattr(cuda_seq, "library", lambda: (library_on_cpu, None))
    monkeypatch.setattr(cuda, "unavailable", lambda: None)  # it would ask for the card
    for form in (cuda_seq, cuda):
        monkeypatch.setattr(form, "DEVICE", "cpu")
    torch.use_deterministic_algorithms(
        True
    )  # torch.empty is then full of NaN: what a kernel forgot to write shows
    yield library_on_cpu
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where Triton's kernels run: in its interpreter, or on a GPU."""
    if request.param == "cpu" and not IN_INTERPRETER:
        pytest.skip("in a process of its own: test_in_tritons_interpreter")
    if request.param == "cuda" and (IN_INTERPRETER or not torch.cuda.is_available()):
        pytest.skip("no GPU")
    pytest.importorskip("triton")
    return torch.device("cpu" if request.param == "cpu" else "cuda:0")


@pytest.fixture(scope="session")
def official():
    """rwkv.model.RWKV, importable once the environment says which code paths to take."""
    os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0")

    def load(path, v7):
        os.environ["RWKV_V7_ON"] = "1" if v7 else "0"
        for name in [m for m in sys.modules if m.startswith("rwkv")]:
            del sys.modules[name]
        from rwkv.model import RWKV as Official

        return Official(model=str(path).removesuffix(".pth"), strategy="cpu fp32")

    return load


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a proof that takes minutes; runs/test.sh slow")
    config.addinivalue_line("markers", "gpu: wants a CUDA device; bench/gpu.py runs them alone")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow proofs, and only them")
    parser.addoption("--full", action="store_true", help="with --slow: whole campaigns, for hours")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    slow = config.getoption("--slow")
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        reasons = {marker.kwargs.get("reason") for marker in item.iter_markers("skipif")}
        if parameters.get("device") == "cuda" or reasons & {"no GPU", "no CUDA device"}:
            item.add_marker("gpu")
        if (item.get_closest_marker("slow") is not None) != slow:  # a folder may be called so, too
            item.add_marker(
                pytest.mark.skip(reason="runs/test.sh slow" if not slow else "not a slow proof")
            )
