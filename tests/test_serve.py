"""Requests that come and go: the engine under the server, and the server itself."""

import itertools

from gosling import engine
from gosling.tokenizer import load_tokenizer

import helpers
import pytest
import torch

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model():
    return helpers.random_model("x070", n_layer=2, n_embd=64, vocab_size=257).eval()


# ----------------------------------------------------------------------------------------------
# the engine


def mixed_requests(model, n):
    """n requests of every kind: (prompts, options)."""
    _, state = engine.prefill(model, [[4, 5, 6]])
    kinds = itertools.cycle(
        [
            dict(temperature=0),
            dict(temperature=0.8, top_p=0.7, seed=1),
            dict(n=3, seed=2, top_k=20),
            dict(presence_penalty=1.5, frequency_penalty=0.5, seed=3),
            dict(repetition_penalty=1.3, temperature=0, tokenizer=TOKENIZER),
            dict(logit_bias={7: 4.0, 8: -100.0}, seed=4, n=2),
            dict(state=state, seed=5, return_state=True),
            dict(stop="a", tokenizer=TOKENIZER, seed=6, logit_bias={98: 3.0}),
        ]
    )
    g = torch.Generator().manual_seed(0)
    requests = []
    for i, options in zip(range(n), kinds, strict=False):
        lengths = torch.randint(1, 40, (1 + i % 2,), generator=g).tolist()
        prompts = [torch.randint(1, 257, (length,), generator=g).tolist() for length in lengths]
        requests.append((prompts, {**options, "max_new_tokens": 3 + 5 * (i % 4)}))
    return requests


def told(completion):
    """What a completion is, apart from rounding."""
    return (
        completion.tokens,
        completion.text,
        completion.finish_reason,
        [round(logprob, 3) for logprob in completion.logprobs],
    )


def run_to_end(running, found):
    """Step until nothing is left; found: {request: {number: Completion}}."""
    while pieces := running.step():
        for request, number, completion in pieces:
            found.setdefault(request, {})[number] = completion


@pytest.mark.parametrize("n_slots", [1, 5, 32])
def test_requests_that_join_while_others_decode_get_what_they_get_alone(model, n_slots):
    asked = mixed_requests(model, 24)
    running, found, requests = engine.Engine(model, n_slots), {}, []
    for i, (prompts, options) in enumerate(asked):
        request = engine.Request(model, prompts, engine.Options(**options))
        running.submit(request)
        requests.append(request)
        for _ in range(i % 3):  # some decode already when the next one comes
            for of, number, completion in running.step():
                found.setdefault(of, {})[number] = completion
        assert len(running.slots) == len(running.ids) == running.state["wkv"].shape[1] <= n_slots
    run_to_end(running, found)
    for (prompts, options), request in zip(asked, requests, strict=True):
        alone = engine.generate(model, prompts, **options)
        together = [found[request][number] for number in range(len(alone))]
        assert [told(c) for c in together] == [told(c) for c in alone]
        for a, b in zip(together, alone, strict=True):
            assert (a.state is None) == (b.state is None)
            if a.state is not None:
                torch.testing.assert_close(a.state, b.state, atol=2e-5, rtol=1e-4)


def test_rows_follow_the_number_of_live_requests(model, monkeypatch):
    """One long completion among 15 short ones is not decoded 16 wide to its end."""
    widths, real = [], engine.decode

    def decode(model, step, ids, state):
        widths.append(len(ids))
        return real(model, step, ids, state)

    monkeypatch.setattr(engine, "decode", decode)
    prompts = [[i] for i in range(1, 17)]
    engine.generate(model, prompts, max_new_tokens=[3] * 15 + [40], stop_ids=(), seed=1)
    assert widths == [16] * 2 + [2] * 37


@pytest.mark.parametrize("when", ["read", "queued", "decoding"])
def test_a_request_that_is_cancelled_frees_its_slots_at_once(model, when):
    running = engine.Engine(model, 2)
    first, second, third = (
        engine.Request(model, [[i]], engine.Options(seed=i, n=n, max_new_tokens=9))
        for i, n in ((1, 2 if when == "read" else 1), (2, 1), (3, 1))
    )
    for request in (first, second, third):
        running.submit(request)
    running.step()
    gone = third if when == "queued" else second
    waits = {"read": [slot.request for slot, _, _ in running.ready], "decoding": [second]}
    assert gone in waits.get(when, [request for request, _ in running.queue])
    running.cancel(gone)
    assert len(running.live()) == (1 if when == "decoding" else 2)
    found = {}
    run_to_end(running, found)
    assert found.keys() == {first, second, third} - {gone}
    for request in found:
        seed, n = request.options.seed, request.options.n
        alone = engine.generate(model, [[seed]], seed=seed, n=n, max_new_tokens=9)
        assert [told(found[request][k]) for k in range(n)] == [told(c) for c in alone]
    assert running.live() == [] and not running.queue and not running.ready
