"""torch.compile and torch.export see the whole network, and give its numbers."""

import copy
import subprocess
import sys
import types

from gosling.batch import pack
from gosling.compiled import compile_blocks
from gosling.config import UserError
from gosling.tune import set_tune
from wkv_cuda import cpu

import pytest
import torch
from helpers import RANKS, documents, random_model, tune

both = pytest.mark.parametrize("version", ["x060", "x070"])
# n_embd=256 below: wide enough that products take oneDNN, which needs 2^16 weights.


def ids_and_targets(model, B=2, T=33):
    ids = torch.randint(model.config.vocab_size, (B, T + 1))
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(function, model, ids, targets, **options):
    model.zero_grad()
    scores, state = function(ids, targets=targets, **options)
    loss = -(scores.logps - 0.1 * scores.entropy).mean() + state["wkv"].square().mean()
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def check_training(compiled, model, **options):
    """Loss and gradients against the plain network in float64.

    Float32 itself, in any of its forms, is up to 3e-5 away from them: each head is normed.
    """
    ids, targets = ids_and_targets(model)
    exact = copy.deepcopy(model).double()
    want_loss, want = loss_and_gradients(exact, exact, ids, targets, **options)
    loss, gradients = loss_and_gradients(compiled, model, ids, targets, **options)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == want.keys() and len(want) > 4
    for name, g in want.items():
        assert (gradients[name] - g).norm() < 5e-5 * g.norm(), name


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    # What torch 2.13 has kept of an earlier compilation is now and then of other sizes.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    cpu.unavailable()  # built before anything is compared
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("version", ["x070", pytest.param("x060", marks=pytest.mark.slow)])
def test_one_graph_holds_a_training_step(version):
    """fullgraph: nothing that torch.compile has to leave out."""
    model = random_model(version, n_layer=2, n_embd=256)
    check_training(torch.compile(model, backend="aot_eager", fullgraph=True), model)


@pytest.mark.slow
def test_one_graph_holds_an_adapter():
    model = random_model("x070", n_layer=2, n_embd=256)
    set_tune(model, "lora", r=8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    check_training(torch.compile(model, backend="aot_eager", fullgraph=True), model)


@pytest.mark.parametrize("version", ["x060", pytest.param("x070", marks=pytest.mark.slow)])
def test_lengths_are_dynamic(version):
    """One graph for all batches and lengths but 1."""
    model, graphs = random_model(version, n_layer=1), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for B, T in ((2, 10), (3, 20), (4, 70)):
        ids, _ = ids_and_targets(model, B, T)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids)[0], model(ids)[0], rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
@both
def test_inductor_trains(version):
    model = random_model(version, n_layer=2, n_embd=256)
    check_training(torch.compile(model), model, l2wrap=1e-4, temperature=0.8)


@pytest.mark.slow
@pytest.mark.parametrize(  # a minute of compiling each
    "version, mode", [("x070", "chunk_len"), ("x060", "grad_cp"), ("x060", "head_size")]
)
def test_inductor_in_other_modes(version, mode):
    """Heads without native code take more than one graph."""
    model = random_model(version, n_layer=2, head_size=8 if mode == "head_size" else 64)
    model.grad_cp = mode == "grad_cp"
    compiled = torch.compile(model)
    check_training(compiled, model, chunk_len=16 if mode == "chunk_len" else 0)


# ----------------------------------------------------------------------------------------------
# compile = True: the blocks of a training run

# Documents of a packed row, and their longest. As many as layers would be one size to dynamo.
ROWS = ((4, 40), (2, 9), (5, 33))


def loss_of_packed(model, n, longest, chunk_len=0):
    """-> (loss, {name: gradient}) of n packed documents"""
    model.zero_grad()
    x, y, weight, cu_seqlens = pack(documents(n, seed=n, longest=longest))
    scores, state = model(x, cu_seqlens=cu_seqlens, targets=y, chunk_len=chunk_len)
    loss = -(weight * scores.logps).sum() / weight.sum() + state["wkv"].square().mean()
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def check_packed(version, mode, backend, rows=ROWS):
    """Blocks compiled as the scripts do it: the numbers of the plain ones, whatever the lengths."""
    model = random_model(version, n_layer=3, n_embd=64)
    if mode == "lora":
        set_tune(model, "lora", r=8)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.02)
    if mode == "state":
        tune(model)
    model.grad_cp, chunk_len = mode == "grad_cp", 16 if mode == "chunk_len" else 0
    want = [loss_of_packed(model, *row, chunk_len) for row in rows]
    compile_blocks(model, types.SimpleNamespace(compile=True), backend=backend)
    for row, (want_loss, gradients) in zip(rows, want, strict=True):
        loss, got = loss_of_packed(model, *row, chunk_len)
        torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
        assert got.keys() == gradients.keys() and len(got) >= 3
        for name, g in gradients.items():
            assert (got[name] - g).norm() < 1e-5 * g.norm(), name


class Graphs:
    """A backend that runs what it gets, and keeps it."""

    def __init__(self):
        self.made = []

    def __call__(self, graph, inputs):
        self.made.append(graph)
        return graph


@pytest.mark.parametrize(
    "version, mode",
    [
        ("x070", "plain"),
        ("x060", "grad_cp"),
        *[
            pytest.param(version, mode, marks=pytest.mark.slow)
            for version in ("x060", "x070")
            for mode in ("lora", "state", "chunk_len")
        ],
        pytest.param("x070", "grad_cp", marks=pytest.mark.slow),
    ],
)
def test_packed_rows_of_any_length_are_two_graphs(version, mode):
    """One of the first block and one of all others: no length is compiled anew."""
    graphs = Graphs()
    check_packed(version, mode, graphs)
    # In chunks a state with a gradient comes in, too, and documents without a token there.
    assert len(graphs.made) <= (8 if mode == "chunk_len" else 2)
    for graph in graphs.made:
        assert sum("gosling.wkv" in str(node.target) for node in graph.graph.nodes) == 1


@pytest.mark.slow
@both
def test_inductor_trains_packed_rows(version):
    check_packed(version, "plain", "inductor", ROWS[:2])


def test_without_a_gradient_nothing_is_compiled():
    """Validation and sampling have lengths and modes of their own."""
    model, graphs = random_model("x070", n_layer=1, n_embd=64), Graphs()
    compile_blocks(model, types.SimpleNamespace(compile=True), backend=graphs)
    with torch.no_grad():
        model(ids_and_targets(model)[0])
    assert graphs.made == []


@pytest.mark.parametrize(
    "sizes, words", [(dict(head_size=8), "head_size 16, 32"), ({}, "needs the compiled recurrence")]
)
def test_what_cannot_be_one_graph_is_refused(sizes, words, monkeypatch):
    if not sizes:
        monkeypatch.setattr(cpu, "unavailable", lambda: "no C++ compiler")
    model = random_model("x070", n_layer=1, n_embd=64, **sizes)
    with pytest.raises(UserError, match=words):
        compile_blocks(model, types.SimpleNamespace(compile=True))


# ----------------------------------------------------------------------------------------------
# torch.export


@both
def test_export_of_any_length(version):
    """Lengths and batches not seen at export, from a state, against the spec's own loop."""
    from torch.export import Dim

    n_layer = 2 if version == "x070" else 1  # the value residual begins in the second
    model = random_model(version, n_layer=n_layer, **RANKS[version]).requires_grad_(False)
    state = model.zero_state(2)
    shapes = {"idx": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    shapes["state"] = {name: {1: Dim.DYNAMIC} for name in state}
    program = torch.export.export(
        model, (ids_and_targets(model, 2, 5)[0], state), dynamic_shapes=shapes
    )
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("gosling" in name or "mkldnn" in name for name in names)
    assert len(program.graph.nodes) < 700  # of 5 tokens or of 5,000
    exported = program.module()
    for B, T in ((1, 1), (3, 7), (2, 70)):
        ids, _ = ids_and_targets(model, B, T)
        before = {name: torch.randn_like(x) for name, x in model.zero_state(B).items()}
        want, want_state = model(ids, before)
        got, got_state = exported(ids, before)
        assert (got - want).abs().max() < 1e-5 * want.std()
        for name in want_state:
            torch.testing.assert_close(got_state[name], want_state[name], rtol=1e-4, atol=1e-5)


def test_an_exported_program_runs_without_gosling(tmp_path):
    model = random_model("x070", n_layer=1, n_embd=256).requires_grad_(False)
    ids, _ = ids_and_targets(model, 2, 9)
    shapes = {"idx": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    torch.export.save(
        torch.export.export(model, (ids[:1, :6].repeat(2, 1),), dynamic_shapes=shapes),
        tmp_path / "a.pt2",
    )
    torch.save((ids, model(ids)[0]), tmp_path / "numbers.pt")
    code = (
        "import torch, sys; run = torch.export.load('a.pt2').module()\n"
        "ids, want = torch.load('numbers.pt'); got = run(ids)[0]\n"
        "assert not {'model', 'wkv_cuda', 'gosling'} & set(sys.modules)\n"
        "assert (got - want).abs().max() < 1e-5 * want.std()"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
