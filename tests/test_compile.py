"""torch.compile and torch.export see the whole network, and give its numbers."""

import subprocess
import sys

from gosling.tune import set_tune
from wkv_cuda import cpu

import pytest
import torch
from helpers import RANKS, random_model

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
    ids, targets = ids_and_targets(model)
    want_loss, want = loss_and_gradients(model, model, ids, targets, **options)
    loss, gradients = loss_and_gradients(compiled, model, ids, targets, **options)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == want.keys() and len(want) > 4
    for name, g in want.items():
        assert (gradients[name] - g).norm() < 1e-5 * g.norm(), name


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
@both
@pytest.mark.parametrize("mode", ["chunk_len", "grad_cp", "head_size"])
def test_inductor_in_other_modes(version, mode):
    """Heads without native code take more than one graph."""
    model = random_model(version, n_layer=2, head_size=8 if mode == "head_size" else 64)
    model.grad_cp = mode == "grad_cp"
    compiled = torch.compile(model)
    check_training(compiled, model, chunk_len=16 if mode == "chunk_len" else 0)


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


@pytest.mark.slow
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
