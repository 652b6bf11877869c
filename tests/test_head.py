"""wkv_cuda/head.py, the head's loss in Triton, against the PyTorch form in float64.

On a GPU the kernels run there. Without one they run in Triton's interpreter, where Triton is
installed: in a process of its own, since it must be told before anything imports Triton.
"""

import sys

from wkv_cuda import fused

import pytest
import torch
from helpers import IN_INTERPRETER, run_in_tritons_interpreter
from torch.utils._python_dispatch import TorchDispatchMode


def test_in_tritons_interpreter():
    run_in_tritons_interpreter(__file__, at_least=17)


@pytest.fixture
def head(device, monkeypatch):
    """wkv_cuda/head.py with small blocks and chunks, so that there are several."""
    from wkv_cuda import head

    monkeypatch.setattr(head, "BLOCK", 64)
    monkeypatch.setattr(head, "rows_at_a_time", lambda h, V: 7)
    return head


def case(V, M, dtype, device):
    """h [M, 24], weight [V, 24], targets [M], factors of both scores in the loss [2, M]"""
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(M, 24, generator=g), torch.randn(V, 24, generator=g)
    targets, factors = torch.randint(0, V, (M,), generator=g), torch.randn(2, M, generator=g)
    targets[0] = (h.to(dtype).double() @ weight.to(dtype).double().T)[0].argmax()  # a hit
    return [x.to(device) for x in (h.to(dtype), weight.to(dtype), targets, factors)]


def run(form, h, weight, targets, factors, temperature=1.0, l2wrap=0.0):
    """-> {name: scores, gradients of the first score's loss, gradients of both scores' loss}"""
    leaves = [x.detach().requires_grad_() for x in (h, weight)]
    logps, entropy, hits = form.apply(*leaves, targets, temperature, l2wrap)
    losses = [logps * factors[0], logps * factors[0] + entropy * factors[1]]
    first, both = (torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in losses)
    values = (logps, entropy, hits, *first, *both)
    names = ("logps", "entropy", "hits", "dh", "dweight", "dh both", "dweight both")
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("temperature, l2wrap", [(1.0, 0.0), (0.7, 0.1), (1.3, 1e-4)])
@pytest.mark.parametrize("V, M", [(150, 17), (64, 7), (5, 9)])
def test_scores_and_gradients_equal_float64(head, device, V, M, temperature, l2wrap):
    h, weight, *rest = case(V, M, torch.float32, device)
    want = run(fused.ScoreTokens, h.double(), weight.double(), *rest, temperature, l2wrap)
    got = run(head.ScoreTokens, h, weight, *rest, temperature, l2wrap)
    for name, x in got.items():
        if name == "hits":
            assert torch.equal(x, want[name]) and x[0]
        else:
            assert x.dtype == torch.float32
            torch.testing.assert_close(x.double(), want[name], atol=2e-5, rtol=2e-5)


def test_bfloat16_is_rounded_twice(head, device):
    """Logits and their gradient are bfloat16, as in the PyTorch form. Where a card rounds them, the
    interpreter cuts them off."""
    h, weight, *rest = case(333, 16, torch.bfloat16, device)
    want = run(fused.ScoreTokens, h.double(), weight.double(), *rest, 0.7, 0.1)
    plain = run(fused.ScoreTokens, h, weight.float(), *rest, 0.7, 0.1)
    got = run(head.ScoreTokens, h, weight.float(), *rest, 0.7, 0.1)
    for name, x in got.items():
        assert x.dtype == plain[name].dtype
        if name == "hits":
            continue  # the two largest may round to the same logit
        size = want[name].norm()
        error, of_plain = ((y.double() - want[name]).norm() / size for y in (x, plain[name]))
        assert error < (1.5 if IN_INTERPRETER else 1.1) * of_plain + 1e-4, (name, error, of_plain)


def test_a_sure_model_has_no_entropy_and_no_gradient(head, device):
    """Logits of a thousand: nothing overflows, and nothing is NaN."""
    h = torch.eye(24, device=device) * 1e3
    targets, factors = torch.arange(24, device=device), torch.ones(2, 24, device=device)
    weight = torch.cat([torch.eye(24), -torch.eye(24), torch.zeros(60, 24)]).to(device)
    found = run(head.ScoreTokens, h, weight, targets, factors)
    assert found.pop("hits").all()
    for name, x in found.items():
        torch.testing.assert_close(x, torch.zeros_like(x), atol=1e-4, rtol=0, msg=name)


def test_of_equal_logits_the_first_is_the_likeliest(head, device):
    h, weight = torch.ones(3, 24, device=device), torch.ones(150, 24, device=device)
    targets = torch.tensor([0, 1, 100], device=device)
    for x in (h, h.double()):  # in float64 the PyTorch form
        form = head.ScoreTokens if x is h else fused.ScoreTokens
        hits = form.apply(x, weight.to(x.dtype), targets, 1.0, 0.0)[2]
        assert hits.tolist() == [True, False, False]


def test_a_target_that_is_none_of_the_vocabulary_is_not_a_number(head, device):
    h, weight, targets, factors = case(70, 6, torch.float32, device)
    want = run(head.ScoreTokens, h, weight, targets, factors)
    targets[2], targets[4] = 70, -1
    got = run(head.ScoreTokens, h, weight, targets, factors)
    assert got["logps"].isnan().tolist() == [False, False, True, False, True, False]
    assert torch.equal(got["entropy"], want["entropy"])


def test_only_what_is_asked_for(head, device):
    """A frozen weight, a frozen h, a loss of the entropy alone: the same numbers."""
    h, weight, targets, factors = case(150, 9, torch.float32, device)
    want = run(head.ScoreTokens, h, weight, targets, factors)
    for i, name in enumerate(("dh", "dweight")):
        leaves = [h, weight]
        leaves[i] = leaves[i].detach().requires_grad_()
        logps, *_ = head.ScoreTokens.apply(*leaves, targets, 1.0, 0.0)
        (found,) = torch.autograd.grad((logps * factors[0]).sum(), leaves[i : i + 1])
        assert torch.equal(found, want[name])
        entropy = head.ScoreTokens.apply(*leaves, targets, 1.0, 0.0)[1]
        (found,) = torch.autograd.grad((entropy * factors[1]).sum(), leaves[i : i + 1])
        torch.testing.assert_close(found, want[f"{name} both"] - want[name], atol=1e-5, rtol=1e-5)


def test_the_trial_sees_a_kernel_that_is_wrong_or_fails(head, device, monkeypatch):
    monkeypatch.setattr(head, "BLOCK", 4096)
    trial = head.trial.__wrapped__
    assert trial(device) is None
    monkeypatch.setattr(head, "differentiate_rows", lambda *args: None)
    assert "off by" in trial(device)
    monkeypatch.setattr(head, "score_rows", lambda *args: 1 / 0)
    assert trial(device) == "ZeroDivisionError: division by zero"


# ----------------------------------------------------------------------------------------------
# which form runs, and what it moves


def test_without_triton_the_pytorch_form_takes_over(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wkv_cuda.head", None)  # its import fails
    monkeypatch.delattr("wkv_cuda.head", raising=False)
    choose = fused.score_in_triton.__wrapped__
    assert choose(torch.device("cpu")) is fused.ScoreTokens
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "PyTorch" in said


def test_triton_is_asked_on_cuda_alone():
    assert not fused.takes_triton(torch.zeros(3, 4))
    assert not fused.takes_triton(torch.zeros(3, 4, device="meta"))


class Moved(TorchDispatchMode):
    """Bytes that the operators read and write; views and empty tensors move nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = str(op)
        if not op.is_view and "empty" not in name and "detach" not in name:
            tensors = [x for x in (*args, out) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.nbytes for x in tensors)
        return out


def bytes_of_a_token(form, M, V, C):
    """Forward and backward, on tensors without content."""
    h = torch.empty(M, C, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(V, C, device="meta", requires_grad=True)
    targets = torch.empty(M, device="meta", dtype=torch.int64)
    with Moved() as moved:
        logps, *_ = form.apply(h, weight, targets, 1.0, 1e-4)
        logps.backward(torch.empty_like(logps))
    return moved, moved.bytes / M


def test_a_token_moves_a_ninth(monkeypatch):
    pytest.importorskip("triton")
    if IN_INTERPRETER:
        pytest.skip("outside of the interpreter")
    from wkv_cuda import head

    moved = []

    def score(z, *args):
        moved.append(z.nbytes)  # read once

    def differentiate(z, *args):
        moved.append(2 * z.nbytes)  # read and written

    def add(dw, dz, h):
        moved.append(2 * dw.nbytes + dz.nbytes + h.nbytes)

    monkeypatch.setattr(head, "score_rows", score)
    monkeypatch.setattr(head, "differentiate_rows", differentiate)
    monkeypatch.setattr(head, "add_product", add)
    M, V, C = 32768, 65536, 768
    _, by_operators = bytes_of_a_token(head.ScoreTokens, M, V, C)
    ours = by_operators + sum(moved) / M
    rows = staticmethod(lambda h, weight: 1024)  # as on CUDA
    monkeypatch.setattr(fused.ScoreTokens, "rows_at_a_time", rows)
    _, plain = bytes_of_a_token(fused.ScoreTokens, M, V, C)
    assert 0.9e6 < ours < 1.2e6, ours
    assert 7 * ours < plain < 12e6, (ours, plain)
