"""gosling/graph.py, decode steps as CUDA graphs, without a GPU.

A stand-in for CUDA graphs notes the operators of a step and runs them again without its Python. A
trace over tensors without numbers shows what a step asks of the host.
"""

import copy
import math

from gosling import choice, engine, graph
from gosling.tokenizer import load_tokenizer
from wkv_cuda import casts, cpu, cuda_seq, cuda_token, fused

import helpers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BYTES = load_tokenizer("bytes")
PENALTIES = dict(frequency_penalty=0.7, presence_penalty=0.2, penalty_decay=0.9, tokenizer=BYTES)


def random_model(version="x070"):
    return helpers.random_model(version, n_layer=2, n_embd=64, vocab_size=257).eval()


def tensors(x):
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]


class Recorded(TorchDispatchMode):
    """In place of a CUDA graph: the operators of a step, which `replay` runs on the same memory.

    As with a real one, recording computes nothing that stays, numbers of Python's are those of that
    moment, and nothing may be read.
    """

    def __init__(self, step, pool):
        super().__init__()
        self.calls, self.replays = [], 0
        rows = step.args[2]
        before = {name: x.clone() for name, x in rows.tensors.items()}
        try:
            with self:
                step()
        finally:
            for name, x in rows.tensors.items():
                x.copy_(before[name])

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for op, args, kwargs, out in self.calls:
            again = op(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


def recorder():
    return graph.Graphs(Recorded, new_pool=lambda: None)


@pytest.fixture
def in_pytorch(monkeypatch):
    """No native code, which a dispatcher does not see."""
    monkeypatch.setattr(fused, "decoder", lambda model: None)
    monkeypatch.setattr(cpu, "fits", lambda x: False)


def run(model, asked, n_slots, graphs):
    """Requests that join one after the other -> their completions, and the engine"""
    running, found, requests = engine.Engine(model, n_slots, graphs), {}, []
    for prompts, options in asked:
        requests.append(engine.Request(model, prompts, engine.Options(**options)))
        running.submit(requests[-1])
        for request, number, completion in running.step():
            found[request, number] = completion
    while pieces := running.step():
        for request, number, completion in pieces:
            found[request, number] = completion
    return [found[r, i] for r in requests for i in range(len(r.prompts) * r.options.n)], running


SAMPLED = dict(seed=1, n=3, max_new_tokens=[20, 9, 14], stop_ids=range(40))
ASKED = {
    "plain": [([[5, 6, 7], [8], [9] * 6], SAMPLED)],
    "greedy": [([[5, 6, 7], [8], [9] * 6], {**SAMPLED, "temperature": 0})],
    "narrow": [([[5, 6, 7], [8], [9] * 6], {**SAMPLED, "top_p": 0.8, "temperature": 0.7})],
    "top_k": [([[5, 6, 7], [8], [9] * 6], {**SAMPLED, "top_k": 5, "min_p": 0.01})],
    "penalties": [([[5, 6, 7], [8], [9] * 6], {**SAMPLED, **PENALTIES})],
    "states": [([[5, 6, 7], [8], [9] * 6], {**SAMPLED, "return_state": True})],
    "mixed": [
        ([[5, 6]], dict(seed=2, n=2, max_new_tokens=25, top_p=0.9, stop_ids=())),
        ([[7]], dict(seed=3, max_new_tokens=9, temperature=0, **PENALTIES)),
        ([[1], [2]], dict(seed=4, max_new_tokens=30, logit_bias={9: 3.0, 8: -math.inf})),
        ([[3]], dict(seed=5, n=4, max_new_tokens=12, top_k=3, repetition_penalty=1.3)),
        ([[4]], dict(seed=6, max_new_tokens=17, return_state=True)),
        ([[6]], dict(seed=7, n=2, max_new_tokens=21, min_p=0.05, temperature=1.4)),
    ],
}


def same(got, want, atol=0.0):
    for a, b in zip(got, want, strict=True):
        assert (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)
        torch.testing.assert_close((a.logprobs, a.state), (b.logprobs, b.state), atol=atol, rtol=0)


@pytest.mark.parametrize("n_slots", [1, 3, 8])
@pytest.mark.parametrize("what", ASKED)
def test_replayed_steps_give_what_the_engine_gives(what, n_slots, in_pytorch):
    """Tokens, log-probabilities, texts, states, who stops where; to the last bit, but for products
    of matrices with other numbers of rows: a step ahead keeps the rows that it began with."""
    model = random_model("x060" if what == "penalties" else "x070")
    want, _ = run(model, ASKED[what], n_slots, None)
    got, running = run(model, ASKED[what], n_slots, recorder())
    same(got, want, atol=1e-5 if n_slots == 8 else 0)
    assert not running.graphs.has_failed
    assert sum(one.replays for one in running.graphs.recorded.values()) > 3


def test_a_grammar_goes_through_the_recording(in_pytorch):
    pytest.importorskip("llguidance")
    model = helpers.random_model("x070", n_layer=2, n_embd=64, vocab_size=BYTES.vocab_size).eval()
    options = dict(n=3, seed=1, max_new_tokens=30, regex="(red|green)( [0-9]{2,4}){3}")
    asked = [([[5, 6]], {**options, "tokenizer": BYTES}), ([[7]], dict(seed=2, stop_ids=()))]
    asked[1][1]["max_new_tokens"] = 40
    want, _ = run(model, asked, 4, None)
    got, running = run(model, asked, 4, recorder())
    same(got, want, atol=1e-5)
    assert want[0].finish_reason == "stop"
    kinds = {key[0] for key in running.graphs.recorded}
    assert any(kind.masked for kind in kinds) and any(not kind.masked for kind in kinds)


def test_a_slot_that_changes_hands_while_a_step_is_on_its_way(in_pytorch):
    """The step ahead is of the request that was cancelled, not of the one in its place."""
    model, found = random_model(), {}
    running = engine.Engine(model, 2, recorder())
    requests = [
        engine.Request(model, [[i]], engine.Options(seed=i, max_new_tokens=15, stop_ids=()))
        for i in range(4)
    ]
    for request in requests[:2]:
        running.submit(request)
    for _ in range(5):
        running.step()
    assert running.flight is not None
    running.cancel(requests[0])
    running.submit(requests[2])
    for request, _, completion in running.step():
        found[request] = completion
    assert list(found) == [requests[2]] and running.flight.slots[0] not in running.slots
    running.submit(requests[3])
    while pieces := running.step():
        found |= {request: completion for request, _, completion in pieces}
    assert found.keys() == set(requests[1:])
    for i, request in enumerate(requests):
        if i > 0:
            (want,) = engine.generate(model, [[i]], seed=i, max_new_tokens=15, stop_ids=())
            same([found[request]], [want], atol=1e-5)


def test_memory_stays_where_it_is_however_many_rows_are_in_use():
    rows = graph.Rows(random_model(), 6)
    places = {name: x.data_ptr() for name, x in rows.tensors.items()}
    rows["ids"].fill_(7)
    for index in ([0] * 6, [5, 0, 3], [2], [0, 0, 0, 0]):
        rows.take(torch.tensor(index))
        assert {name: x.data_ptr() for name, x in rows.tensors.items()} == places
        assert rows["ids"].tolist() == [7] * len(index) == [7] * rows["wkv"].shape[1]


def test_a_recording_that_fails_says_so_once_and_nothing_else_changes(in_pytorch, capsys):
    def record(step, pool):
        raise RuntimeError("CUDA error: operation not permitted\nCompile with more\n")

    model, tries = random_model(), []
    want, _ = run(model, ASKED["plain"], 4, None)
    graphs = graph.Graphs(record, new_pool=lambda: tries.append(1))
    got, running = run(model, ASKED["plain"], 4, graphs)
    same(got, want, atol=1e-5)
    assert running.graphs.has_failed and tries == [1]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].endswith("recorded: CUDA error: operation not permitted")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_on_a_card_recorded_steps_choose_what_others_choose(version, monkeypatch):
    model = helpers.random_model(version, n_layer=2, n_embd=128, vocab_size=320).cuda().eval()
    for what in ("plain", "narrow", "mixed"):
        got, running = run(model, ASKED[what], 8, None)
        assert running.graphs.recorded and not running.graphs.has_failed
        with monkeypatch.context() as plain:
            plain.setattr(engine, "graphs_for", lambda model: None)
            want, _ = run(model, ASKED[what], 8, None)
        same(got, want, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_card_the_host_waits_for_nothing_while_it_queues_a_step():
    model = helpers.random_model("x070", n_layer=2, n_embd=128, vocab_size=320).cuda().eval()
    running = engine.Engine(model, 4)
    options = engine.Options(n=4, max_new_tokens=30, stop_ids=(), seed=1, top_p=0.9)
    running.submit(engine.Request(model, [[5, 6]], options))
    for _ in range(5):
        running.step()
    assert running.graphs.recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            running.launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------------------------------
# what a step asks of the host


class Watch(TorchDispatchMode):
    """Counts operators; an error for one that meets a tensor on another device than meta."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.count += 1
        elsewhere = {str(x.device) for x in tensors((args, kwargs, out))} - {"meta"}
        if elsewhere:
            raise AssertionError(f"{op} on {elsewhere}")
        return out


@pytest.fixture
def on_meta(monkeypatch):
    """Tensors on meta, which have no numbers, take the way of those on a card."""
    monkeypatch.setattr(cuda_seq, "library", lambda: (None, None))
    monkeypatch.setattr(cuda_seq, "DEVICE", "meta")


def blank(version, kind):
    """-> (a network in bfloat16, rows) on meta, of which two choose like this"""
    with torch.device("meta"):
        model = helpers.RWKV(helpers.RWKVConfig(version, 3, 128, 320)).bfloat16().eval()
    rows = graph.Rows(model, 4)
    rows.take(torch.zeros(2, dtype=torch.long, device="meta"))
    for key in ("count", "bias"):
        rows.add(key, 320)
    for key in ("generated", "read"):
        rows.add(key, 320, dtype=torch.bool)
    rows.add("weighs", dtype=torch.long)
    rows.add("bits", 40, dtype=torch.uint8)
    rows.weights = torch.ones(1, 320, device="meta")
    return model, rows


EVERYTHING = choice.Kind(True, True, 256, True, True, True, True)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_step_asks_the_host_for_nothing(version, on_meta):
    """No number is read, nothing is copied from or to another device, the state has no copy."""
    model, rows = blank(version, EVERYTHING)
    kind = EVERYTHING.without_asking(320)
    assert kind.width == 320 and kind == EVERYTHING._replace(width=320, unbounded=False)
    with torch.no_grad(), Watch() as watch:
        graph.advance(model, None, rows, kind)
    assert watch.count > 100
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError)):
        graph.advance(model, None, rows, EVERYTHING)  # asks whether 256 are enough


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_the_state_is_written_in_place(version, on_meta, monkeypatch):
    """By the kernel of one token, once for each layer."""
    model, rows = blank(version, EVERYTHING)
    written, real = [], cuda_token.wkv

    def wkv(version, inputs, state):
        written.append(state.shape)
        y, after = real(version, inputs, state)
        assert after is state
        return y, after

    class NoCopies(Watch):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            large = [
                x for x in tensors((args, kwargs)) if x.dim() == 4 and x.shape[-2:] == (64, 64)
            ]
            assert not large or "token" in str(op) or "select" in str(op), op
            return super().__torch_dispatch__(op, types, args, kwargs)

    monkeypatch.setattr(cuda_token, "wkv", wkv)
    with torch.no_grad(), NoCopies():
        graph.advance(model, None, rows, EVERYTHING.without_asking(320))
    assert written == [(2, 2, 64, 64)] * 3


# ----------------------------------------------------------------------------------------------
# weights


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_copies_of_weights_give_the_same_numbers_and_follow_them(tune):
    model = random_model().bfloat16()
    model.compute_dtype = torch.bfloat16
    model.set_tune(tune, **({"r": 4, "extra": ("ln",)} if tune == "lora" else {}))
    copies = graph.copies_for(model)
    as_they_are = ("emb.weight", "att.w0")
    assert {id(p) for p in copies.weights} == {
        id(p)
        for name, p in model.named_parameters()
        if p.dtype == torch.float32 and not name.endswith(as_they_are)
    }
    places = [copy.data_ptr() for copy in copies.copies]
    ids, before = torch.tensor([[3], [5]]), torch.zeros(())
    for _ in range(2):
        for p in copies.weights:
            p.data += 0.05 * torch.randn_like(p)
        copies.refresh()
        with torch.no_grad():
            want = model(ids)[0]
            with copies.in_use():
                got = model(ids)[0]
        assert torch.equal(got, want) and not torch.equal(want, before)
        assert [copy.data_ptr() for copy in copies.copies] == places
        before = want


def test_a_step_casts_no_weight(in_pytorch):
    """With copies in use a step makes nothing in bfloat16 of a weight in float32."""
    model = random_model().bfloat16()
    model.compute_dtype = torch.bfloat16
    model.set_tune("full")
    places = {p.data_ptr() for p in model.parameters() if p.dtype == torch.float32}

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if op is torch.ops.aten._to_copy.default and args[0].data_ptr() in places:
                self.count += 1
            return out

    rows, copies = graph.Rows(model), graph.copies_for(model)
    kind = choice.Kind(True, False, 0, False, True, False, False)  # the likeliest token
    counts = []
    for table in (copies.table, {}):
        with torch.no_grad(), casts.use(table), Casts() as counted:
            graph.advance(model, None, rows, kind)
        counts.append(counted.count)
    assert counts[0] == 0 and counts[1] > 64


def test_an_engine_decodes_with_copies_of_the_weights_of_now(in_pytorch):
    model = random_model().bfloat16()
    model.compute_dtype = torch.bfloat16
    model.set_tune("full")
    running = engine.Engine(model, 2, recorder())
    options = dict(max_new_tokens=12, stop_ids=(), seed=1)
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn_like(p)
        request = engine.Request(model, [[5, 6], [7]], engine.Options(**options))
        running.submit(request)
        found = {}
        while pieces := running.step():
            found |= {number: copy.copy(c) for _, number, c in pieces}
        want = engine.generate(copy.deepcopy(model), [[5, 6], [7]], **options)
        same([found[0], found[1]], want)
