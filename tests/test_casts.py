"""wkv_cuda/casts.py: kept copies of float32 weights give every bit that casts in place give, with
fewer kernels, and follow the weights however these change."""

import copy

from gosling import optimizer
from gosling.tune import reference
from wkv_cuda import casts, cpu

import pytest
import torch
from helpers import random_model, tune
from torch.utils._python_dispatch import TorchDispatchMode

both = pytest.mark.parametrize("version", ["x060", "x070"])
SIZES = dict(n_layer=2, n_embd=64, vocab_size=97)


def model_of(version, mode="full"):
    """A model in bfloat16 with what trains in float32."""
    model = random_model(version, **SIZES)
    if mode == "lora":
        extra = ("ln", "x_" if version == "x070" else "maa")
        model.bfloat16().set_tune("lora", r=4, extra=extra)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
    elif mode == "state":
        tune(model)  # the frozen weights are float32, too
    else:
        model.set_tune("full")
    model.compute_dtype = torch.bfloat16
    return model


def loss_of(model, seed=0, **options):
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(seed))
    scores, _ = model(ids[:, :-1], targets=ids[:, 1:], **options)
    return -scores.logps.mean()


def train(model, in_backward=False, passes=4, **options):
    """Three optimiser steps of so many micro-batches -> all losses, gradients and weights."""
    opt = torch.optim.AdamW(model.param_groups(1e-2, 0.1), fused=True)
    if in_backward:
        optimizer.step_in_backward(model, opt)
    found = []
    for step in range(3):
        for i in range(passes):
            loss = loss_of(model, seed=step * passes + i, **options)
            loss.backward()
            found.append(loss.detach())
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        opt.step()
        opt.zero_grad()
    return found + [p.detach() for p in model.parameters()]


def is_used(model):
    """Whether copies are kept of the model's blocks."""
    return [block in casts.of_modules for block in model.blocks] == [True] * len(model.blocks)


@both
@pytest.mark.parametrize(
    "mode, options",
    [
        ("full", {}),
        ("full", dict(chunk_len=12, passes=2)),
        ("full", dict(in_backward=True, passes=1)),
        ("lora", {}),
        ("state", {}),
    ],
)
def test_training_gives_the_same_bits(version, mode, options):
    model = model_of(version, mode)
    plain = copy.deepcopy(model)
    plain.keep_casts = False
    got, want = train(model, **options), train(plain, **options)
    assert is_used(model) and not is_used(plain)
    assert len(got) == len(want) > 30
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    trained = [p for p in plain.parameters() if p.requires_grad]
    start = [p for p in model_of(version, mode).parameters() if p.requires_grad]
    assert all(not torch.equal(x, y) for x, y in zip(trained, start, strict=True))


def test_two_passes_before_one_backward_add_up_in_float32():
    gradients = []
    for keeps in (True, False):
        model = model_of("x070")
        model.keep_casts = keeps
        (loss_of(model, 1) + loss_of(model, 2)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert is_used(model) == keeps
    assert all(map(torch.equal, *gradients)) and len(gradients[0]) > 60


def test_a_frozen_weight_beside_others_has_a_copy_without_a_gradient():
    """So that no product is made for one that nobody wants."""
    model = model_of("x070")
    ffn = model.blocks[1].ffn
    ffn.key.weight.requires_grad_(False)
    with casts.keep(model.blocks[1], torch.bfloat16):
        frozen, trained = (casts.cast(m.weight, torch.bfloat16) for m in (ffn.key, ffn.value))
    assert trained.requires_grad and not frozen.requires_grad
    loss_of(model).backward()
    assert ffn.key.weight.grad is None and ffn.value.weight.grad is not None


# ----------------------------------------------------------------------------------------------
# how often weights are cast


class Casts(TorchDispatchMode):
    """Counts kernels that make bfloat16 of float32, and those that go back."""

    def __init__(self):
        super().__init__()
        self.down, self.up = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten._to_copy.default:
            self.down += (args[0].dtype, out.dtype) == (torch.float32, torch.bfloat16)
            self.up += (args[0].dtype, out.dtype) == (torch.bfloat16, torch.float32)
        if op is torch.ops.aten._foreach_copy_.default:
            self.down += args[1][0].dtype == torch.float32
            self.up += args[1][0].dtype == torch.bfloat16
        return out


def casts_in_a_step(model):
    """-> (down, up) in the second of two optimiser steps of four micro-batches"""
    opt = torch.optim.AdamW(model.param_groups(1e-3, 0.0), fused=True)
    for _ in range(2):
        with Casts() as counted:
            for i in range(4):
                loss_of(model, i).backward()
            opt.step()
            opt.zero_grad()
    return counted.down, counted.up


def test_weights_are_cast_once_for_an_optimiser_step(monkeypatch):
    """RWKV-7 casts 32 weights of each layer, and the head for the forward and for the backward."""
    monkeypatch.setattr(cpu, "fits", lambda x: False)  # the forms that a GPU takes
    kept, plain = model_of("x070"), model_of("x070")
    plain.keep_casts = False
    down, up = casts_in_a_step(kept)
    plain_down, plain_up = casts_in_a_step(plain)
    n_weights = 2 * 32
    assert plain_down - down == 4 * (n_weights + 2) - 3  # once each of two blocks and the head
    # Gradients of a block go back together in each pass; v0 of the first layer never has one.
    assert plain_up - up == 4 * (n_weights - 1 - 2)


# ----------------------------------------------------------------------------------------------
# when copies are stale


def in_place(model):
    for p in model.parameters():
        p.mul_(1.5)


def elsewhere(model):
    for p in model.parameters():
        p.data = p.data * 1.5


def from_a_file(model):
    model.load_state_dict({name: p * 1.5 for name, p in model.state_dict().items()})


def assigned(model):
    model.load_state_dict({n: p * 1.5 for n, p in model.state_dict().items()}, assign=True)


def fused_adamw(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


class Signs(torch.optim.Optimizer):
    """An optimiser of somebody's that writes into `.data`."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.sub_(0.1 * p.sign())


def of_somebody(model):
    Signs(model.parameters(), {}).step()


@pytest.mark.parametrize(
    "change", [in_place, elsewhere, from_a_file, assigned, fused_adamw, of_somebody]
)
def test_copies_follow_the_weights(change):
    model = model_of("x070")
    before = loss_of(model)
    with torch.no_grad():
        change(model)
    got = loss_of(model)
    model.keep_casts = False
    want = loss_of(model)
    assert torch.equal(got, want) and not torch.equal(got, before)


def test_without_gradients_weights_are_read_as_they_are():
    """So that validation with averaged weights needs nothing, though they are put into `.data`."""
    model = model_of("x070")
    before = loss_of(model)
    for p in model.parameters():
        p.data.mul_(1.5)
    with torch.no_grad():
        got = loss_of(model)
        model.keep_casts = False
        assert torch.equal(got, loss_of(model)) and not torch.equal(got, before)


def test_a_backward_pass_after_the_optimiser_s_step_and_another_forward_is_an_error():
    model = model_of("x070")
    late = loss_of(model)
    with torch.no_grad():
        model.blocks[0].ffn.key.weight.mul_(1.5)  # of which autograd has the copy alone
    loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_inside_of_reference_nothing_is_kept():
    """It puts extra parameters back through `.data`."""
    model = model_of("x070", "lora")
    base = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    loss_of(model)
    with reference(model), reference(base):
        base.keep_casts = False
        assert torch.equal(loss_of(model), loss_of(base))
    assert model.keep_casts


# ----------------------------------------------------------------------------------------------
# where nothing is kept


def test_in_float32_there_are_no_copies():
    model = random_model("x070", **SIZES)
    loss_of(model).backward()
    assert model.blocks[0] not in casts.of_modules and model.head not in casts.of_modules


def test_grad_cp_which_saves_memory_keeps_none():
    model = model_of("x070")
    model.grad_cp = True
    loss_of(model).backward()
    assert model.blocks[0] not in casts.of_modules and model.head not in casts.of_modules


def test_a_copy_of_the_model_has_copies_of_its_own_and_both_go():
    model = model_of("x070")
    loss_of(model)
    other = copy.deepcopy(model)
    loss_of(other)
    ours, theirs = casts.of_modules[model.blocks[0]], casts.of_modules[other.blocks[0]]
    assert not {c.data_ptr() for c in ours.copies} & {c.data_ptr() for c in theirs.copies}
    n_before = len(casts.of_modules)
    del model, other
    assert len(casts.of_modules) == n_before - 2 * 3
