"""Requests that come and go: the engine under the server, and the server itself."""

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import sample
from gosling import engine, graph, serve
from gosling.config import UserError, read_flags
from gosling.data import render_chat
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
            dict(frequency_penalty=3.0, seed=7),  # samples as the fourth, but for penalties
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
    asked = mixed_requests(model, 18)
    running, found, requests = engine.Engine(model, n_slots), {}, []
    for i, (prompts, options) in enumerate(asked):
        request = engine.Request(model, prompts, engine.Options(**options))
        running.submit(request)
        requests.append(request)
        for _ in range(i % 3):  # some decode already when the next one comes
            for of, number, completion in running.step():
                found.setdefault(of, {})[number] = completion
        assert len(running.slots) == running.rows.n_rows == running.state["wkv"].shape[1] <= n_slots
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
    widths, real = [], graph.decode

    def decode(model, step, ids, state):
        widths.append(len(ids))
        return real(model, step, ids, state)

    monkeypatch.setattr(graph, "decode", decode)
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


# ----------------------------------------------------------------------------------------------
# the server


@pytest.fixture(scope="module")
def server(model):
    """A server of the model as it is, "m", and from a state, "m:s"."""
    _, state = engine.prefill(model, [[4, 5, 6]])
    cfg = sample.Config(max_new_tokens=24)
    defaults = sample.options_of(cfg, TOKENIZER)
    server = serve.Server(("127.0.0.1", 0), model, {"m": None, "m:s": state}, defaults)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    server.models = {"m": None, "m:s": state}
    yield server
    server.should_exit = True
    thread.join()


def ask(server, path, body=None, **headers):
    """-> (status, text of the answer)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        if body is not None and not isinstance(body, (str, bytes)):
            body = json.dumps(body)
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def events(text):
    """The JSON of a stream's events; the last event must be the one that ends it."""
    *found, last, rest = text.split("\n\n")
    assert last == "data: [DONE]" and rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in found]


def texts_of(server, path, body, stream):
    """-> ([text of each choice], [finish_reason of each]), streamed or not"""
    status, text = ask(server, path, {**body, "stream": stream})
    assert status == 200, text
    if not stream:
        choices = json.loads(text)["choices"]
        texts = [c["text"] if "text" in c else c["message"]["content"] for c in choices]
        return texts, [c["finish_reason"] for c in choices]
    texts, reasons = {}, {}
    for choice in (event["choices"][0] for event in events(text)):
        new = choice["text"] if "text" in choice else choice["delta"]["content"]
        texts[choice["index"]] = texts.get(choice["index"], "") + new
        reasons[choice["index"]] = choice["finish_reason"]
    return [texts[i] for i in sorted(texts)], [reasons[i] for i in sorted(reasons)]


MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
READABLE = {str(token): 6.0 for token in range(98, 123)}  # a to y of the bytes' ids


@pytest.mark.parametrize("stream", [False, True])
def test_both_doors_say_what_generate_says(server, model, stream):
    """With stop texts, several prompts and samples, from either state, and characters in pieces."""
    sampling = dict(n=2, temperature=0.9, top_p=0.95, seed=3, presence_penalty=0.5)
    for name, bias in itertools.product(server.models, ({}, READABLE)):
        options = dict(tokenizer=TOKENIZER, state=server.models[name], max_new_tokens=24)
        options |= dict(logit_bias={int(token): value for token, value in bias.items()})
        prompts = ["abc", "h\u00e9"]
        want = sample.generate(
            model, [TOKENIZER.encode(p) for p in prompts], stop=("a", "bc"), **sampling, **options
        )
        asked = dict(model=name, prompt=prompts, stop=["a", "bc"], logit_bias=bias, **sampling)
        got = texts_of(server, "/v1/completions", asked, stream)
        assert got == ([c.text for c in want], [c.finish_reason for c in want])
        ids, _ = render_chat(MESSAGES, TOKENIZER, generation_prompt=True)
        want = sample.generate(model, [ids], stop=engine.TURNS, **sampling, **options)
        asked = dict(model=name, messages=MESSAGES, logit_bias=bias, **sampling)
        got = texts_of(server, "/v1/chat/completions", asked, stream)
        assert got[0] == [c.text.removeprefix(" ") for c in want]
        assert got[1] == [c.finish_reason for c in want]


def test_tools_that_are_offered_change_nothing(server):
    body = dict(model="m", messages=MESSAGES, seed=1, logit_bias=READABLE)
    tools = [{"type": "function", "function": {"name": "get_current_time"}}]
    want = texts_of(server, "/v1/chat/completions", body, True)
    offered = {**body, "tools": tools, "tool_choice": "auto"}
    assert texts_of(server, "/v1/chat/completions", offered, True) == want


def test_numbers_of_an_answer(server, model):
    """Usage, log-probabilities, and what lm-eval reads of a prompt: each token's and the best."""
    prompt = TOKENIZER.encode("some text")
    asked = dict(model="m:s", prompt=prompt, max_tokens=3, temperature=0, logprobs=1, echo=True)
    answer = json.loads(ask(server, "/v1/completions", asked)[1])
    assert answer["usage"] == dict(prompt_tokens=9, completion_tokens=3, total_tokens=12)
    options = dict(state=server.models["m:s"], tokenizer=TOKENIZER)
    (want,) = sample.generate(model, [prompt], temperature=0, max_new_tokens=3, **options)
    (choice,) = answer["choices"]
    assert choice["text"] == "some text" + want.text
    ids = torch.tensor([prompt + want.tokens])
    logps = model(ids, server.models["m:s"])[0][0].log_softmax(-1)
    scores = choice["logprobs"]["token_logprobs"]
    own = logps[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scores[1:]), own, atol=1e-4, rtol=1e-4)
    best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:]]
    torch.testing.assert_close(torch.tensor(best), logps[:-1].amax(-1), atol=1e-4, rtol=1e-4)
    is_best = logps[:-1].argmax(-1) == ids[0, 1:]
    assert [a == b for a, b in zip(scores[1:], best, strict=True)] == is_best.tolist()
    asked = dict(model="m", messages=MESSAGES, max_completion_tokens=5, seed=1, logprobs=True)
    asked |= dict(stream=True, stream_options={"include_usage": True})
    *pieces, last = events(ask(server, "/v1/chat/completions", asked)[1])
    said = [x for piece in pieces for x in piece["choices"][0]["logprobs"]["content"]]
    ids, _ = render_chat(MESSAGES, TOKENIZER, generation_prompt=True)
    (want,) = sample.generate(model, [ids], seed=1, max_new_tokens=5, tokenizer=TOKENIZER)
    assert [x["logprob"] for x in said] == pytest.approx(want.logprobs, abs=1e-4)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5


def test_32_clients_at_once_get_what_they_get_one_by_one(server, model):
    """Other options and states side by side; the same seeds, so the same texts."""
    g = random.Random(0)
    asked = []
    for i in range(32):
        body = dict(model=("m", "m:s")[i % 2], seed=i, max_tokens=g.randint(5, 40), stream=True)
        body |= dict(logit_bias=READABLE) if i % 3 == 0 else {}
        body |= dict(temperature=g.choice([0, 0.7, 1.0]), top_p=g.choice([0.5, 1.0]))
        body |= dict(frequency_penalty=g.choice([0, 0, 0.8]), n=1 + (i % 5 == 0))
        asked.append({**body, "prompt": "".join(g.choices("abcdef", k=g.randint(1, 90)))})
    alone = [texts_of(server, "/v1/completions", body, True) for body in asked]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        jobs = [pool.submit(texts_of, server, "/v1/completions", body, True) for body in asked]
        assert [job.result() for job in jobs] == alone
    assert len({text for texts, _ in alone for text in texts}) > 25


def wait_until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def send(server, text):
    """Bytes as they are -> the socket, still open"""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(text if isinstance(text, bytes) else text.encode())
    return connection


def post(body, path="/v1/completions", **headers):
    """A request's bytes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Host": "localhost", "Content-Length": len(body), **headers}
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + body


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_slots(server, stream):
    body = dict(model="m", prompt="x", n=3, max_tokens=10**6, stream=stream, logit_bias={"0": -100})
    clients = [send(server, post(body)) for _ in range(3)]
    running = server.worker.engine
    wait_until(lambda: len(running.live()) == 9)
    for client in clients:
        client.close()
    wait_until(lambda: not running.live() and not server.worker.live)


HUGE = 2**20 + 1
CHUNKED = post(b"", **{"Content-Length": None, "Transfer-Encoding": "chunked"})
ERRORS = [  # (bytes, status of the answer, words in it)
    (post(b"{"), 400, "not JSON"),
    (post(b"[" * 100_000), 400, "not JSON"),
    (post(b"\xff\xfe{"), 400, "not JSON"),
    (post([]), 400, "the request: expected"),
    (post(5), 400, "the request: expected"),
    (post({"model": "m"}), 400, "prompt: it is missing"),
    (post({"model": "x", "prompt": "a"}), 404, "none of ['m', 'm:s']"),
    (post({"model": "m", "prompt": []}), 400, "of each of 0 prompts"),
    (post({"model": "m", "prompt": [999]}), 400, "has id 999"),
    (post({"model": "m", "prompt": [[]]}), 400, "the prompt is empty"),
    (post(b'{"model": "m", "prompt": "\\ud83d"}'), 400, "whole characters"),
    (post({"model": "m", "prompt": "a" * 40_000}), 400, "at most 32768 are read"),
    (post({"model": "m", "prompt": "a", "n": 0}), 400, "n: expected"),
    (post({"model": "m", "prompt": ["a"] * 100, "n": 100}), 400, "n: 100 of each of 100"),
    (post({"model": "m", "prompt": "a", "temperature": -1}), 400, "temperature=-1.0: expected"),
    (post(b'{"model": "m", "prompt": "a", "temperature": NaN}'), 400, "temperature: expected"),
    (post({"model": "m", "prompt": "a", "temperature": "hot"}), 400, "temperature: expected"),
    (post({"model": "m", "prompt": "a", "top_p": 2}), 400, "top_p=2.0: expected"),
    (post({"model": "m", "prompt": "a", "seed": -1}), 400, "seed=-1: expected"),
    (post({"model": "m", "prompt": "a", "max_tokens": 0}), 400, "max_tokens: expected"),
    (post({"model": "m", "prompt": "a", "stop": [""]}), 400, "stop='' is empty"),
    (
        post({"model": "m", "prompt": "a", "logit_bias": {"x": 1}}),
        400,
        "logit_bias: String should match",
    ),
    (post({"model": "m", "prompt": "a", "logit_bias": {"999": 1}}), 400, "999 is not an id"),
    (post({"model": "m", "prompt": "a", "logprobs": 5}), 400, "logprobs: expected"),
    (post({"model": "m", "prompt": "a", "mirostat": 2}), 400, "mirostat: this server does not"),
    (
        post({"model": "m", "messages": []}, "/v1/chat/completions"),
        400,
        "messages: List should have",
    ),
    (
        post({"model": "m", "messages": [{"role": "x"}]}, "/v1/chat/completions"),
        400,
        "expected a role",
    ),
    (
        post({"model": "m", "messages": [5], "tool_choice": "required"}, "/v1/chat/completions"),
        400,
        "expected 'none' or 'auto'",
    ),
    (post({}, "/v1/embeddings"), 404, "Not Found"),
    (post(b" " * HUGE), 413, "at most 1048576"),
    (post(b"", **{"Content-Length": "-1"}), 400, "Invalid HTTP"),
    (post(b"", **{"Content-Length": None}), 400, "not JSON"),
    (CHUNKED + b"10001\r\n" + b" " * 0x10001 + b"\r\n0\r\n\r\n", 400, "not JSON"),
    (post({}, Host="evil.example"), 403, "is not this server"),
    (post({}, Host="127.0.0.1.evil.example:80"), 403, "is not this server"),
    (post({}, Host=None), 400, "Invalid HTTP"),
    (post({}, Origin="http://evil.example"), 403, "no other site's page"),
    (post({}, Origin="http://localhost:1234"), 403, "no other site's page"),
    (post({}, Origin="null"), 403, "no other site's page"),
    (b"GET / HTTP/1.1\r\nHost: rebound.example\r\n\r\n", 403, "is not this server"),
    (b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, "Method Not Allowed"),
    (b"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, "Method Not Allowed"),
    (b"nonsense\r\n\r\n", 400, "Invalid HTTP"),
    (b"GET / HTTP/1.0\r\n\r\n", 403, "is not this server"),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 400, "Invalid HTTP"),
]


def read_all(connection):
    """What the server says until it closes."""
    pieces = []
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**16):
            pieces.append(piece)
    connection.close()
    return b"".join(pieces).decode()


@pytest.mark.parametrize("sent, status, words", ERRORS)
def test_a_bad_request_is_told_what_is_wrong(server, sent, status, words):
    head, _, body = read_all(send(server, sent)).partition("\r\n\r\n")
    assert head.split()[:2] == ["HTTP/1.1", str(status)] and "Access-Control" not in head
    if words == "Invalid HTTP":  # uvicorn's own words
        assert words in body
        return
    error = json.loads(body)["error"]
    assert words in error["message"] and error.keys() == {"message", "type", "param", "code"}


def test_our_own_page_may_ask_and_is_whole(server):
    port = server.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
        status, text = ask(server, "/v1/models", Host=host, Origin=f"http://{host}")
        assert status == 200
        assert [about["id"] for about in json.loads(text)["data"]] == ["m", "m:s"]
    status, page = ask(server, "/")
    assert status == 200 and "not for production" in page
    assert "http://" not in page and "https://" not in page  # nothing from elsewhere


def test_what_is_open_to_all_still_knows_no_other_sites_name():
    door = serve.OwnPageOnly(None, "0.0.0.0")
    assert door.knows("192.168.1.5:8000") and door.knows("localhost:8000")
    assert not door.knows("evil.example:8000") and not door.knows("[::1")


def test_slow_clients_are_let_go(server, monkeypatch):
    """A head or a body that does not come, and an answer that is not taken."""
    monkeypatch.setattr(serve, "SECONDS", 0.5)
    slow = [send(server, b"POST / HT"), send(server, post({"model": "m"})[:-3])]
    for _ in range(8):  # a byte now and then keeps no connection
        with contextlib.suppress(OSError):
            slow[0].sendall(b"T")
        time.sleep(0.1)
    assert read_all(slow[0]) == ""
    assert " 408 " in read_all(slow[1])
    body = dict(model="m", prompt="x", n=64, max_tokens=10**6, stream=True, logit_bias={"0": -100})
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", server.port))
    client.sendall(post(body))
    wait_until(lambda: server.worker.live)
    wait_until(lambda: not server.worker.live and not server.worker.engine.live(), 60)
    client.close()


def test_too_many_clients_are_refused(server, monkeypatch):
    monkeypatch.setattr(server.config, "limit_concurrency", 3)
    holding = [send(server, b"GET / HT") for _ in range(2)]
    request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    wait_until(lambda: " 503 " in read_all(send(server, request)))
    for client in holding:
        client.close()
    wait_until(lambda: ask(server, "/v1/models", Host="localhost")[0] == 200)


def test_an_engine_that_fails_fails_its_requests_alone(server, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError("no room")

    def tear(running, n):  # leave the engine without its tables
        running.rows.tensors = {}
        fail()

    body = {"model": "m", "prompt": "a", "seed": 1}
    before = ask(server, "/v1/completions", body)
    monkeypatch.setattr(graph, "decode", fail)
    for stream in (False, True):
        text = ask(server, "/v1/completions", {**body, "stream": stream})[1]
        assert "the engine failed" in text
    monkeypatch.undo()
    monkeypatch.setattr(engine.Engine, "resize", tear)
    assert "the engine failed" in ask(server, "/v1/completions", body)[1]
    monkeypatch.undo()
    after = ask(server, "/v1/completions", body)
    assert json.loads(after[1])["choices"] == json.loads(before[1])["choices"]
    assert "MemoryError" in capsys.readouterr().err


def hostile(g):
    """A request that is malformed, of wrong types, huge, or cut off, and whether it is slow."""
    sent, _, _ = g.choice(ERRORS)
    kind = g.randrange(5)
    good = {"model": "m", "prompt": "abc", "max_tokens": 20, "seed": 1, "stream": g.random() < 0.5}
    if kind == 1:  # values of wrong types and sizes
        key = g.choice([*good, "n", "stop", "temperature", "logit_bias", "stream_options"])
        good[key] = g.choice([-1, 1e30, "x" * 5000, [], {}, [[5]], True, {"a": [1]}, 10**30])
        sent = post(good)
    elif kind == 2:  # bytes that changed on their way
        sent = bytearray(post(good))
        for _ in range(g.randint(1, 20)):
            sent[g.randrange(len(sent))] = g.randrange(256)
    elif kind == 3:  # cut off
        sent = post(good)[: g.randrange(len(post(good)))]
    elif kind == 4:  # more than is said, or less
        sent = post(b" " * g.randrange(200_000), **{"Content-Length": g.randrange(300_000)})
    return bytes(sent)


def attack(server, n, seed):
    """n hostile requests; some leave before the answer, some read it."""
    g = random.Random(seed)
    for _ in range(n):
        with contextlib.suppress(OSError):
            client = send(server, hostile(g))
            if g.random() < 0.5:
                client.close()
                continue
            client.settimeout(0.2)
            client.recv(100)
            client.close()


def survives(server, n):
    body = {"model": "m", "prompt": "abc", "max_tokens": 20, "seed": 1}
    before = ask(server, "/v1/completions", body)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(attack, server, n // 8, seed) for seed in range(8)]:
            done.result()
    wait_until(lambda: not server.worker.live and not server.worker.engine.live(), 60)
    after = ask(server, "/v1/completions", body)
    assert after[0] == before[0] == 200
    assert json.loads(after[1])["choices"] == json.loads(before[1])["choices"]


def test_hostile_requests_leave_it_serving(server):
    survives(server, 80)


@pytest.mark.slow
def test_a_thousand_hostile_requests_leave_it_serving(server):
    n_threads = threading.active_count()
    survives(server, 1000)

    def no_thread_is_left():  # anyio's that were idle for 10 seconds end at the next request
        assert ask(server, "/v1/completions", {"model": "m", "prompt": "a", "seed": 1})[0] == 200
        return threading.active_count() <= n_threads + 2

    wait_until(no_thread_is_left, 60)


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client(server, model, stream):
    openai = pytest.importorskip("openai")
    base_url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=base_url, api_key="none") as client:
        assert [about.id for about in client.models.list()] == ["m", "m:s"]
        asked = dict(model="m", seed=1, max_tokens=9, stream=stream)
        chat = client.chat.completions.create(messages=MESSAGES, **asked)
        text = client.completions.create(prompt="abc", **asked)
        if stream:
            chat = "".join(piece.choices[0].delta.content for piece in chat)
            text = "".join(piece.choices[0].text for piece in text)
        else:
            chat, text = chat.choices[0].message.content, text.choices[0].text
        options = dict(seed=1, max_new_tokens=9, tokenizer=TOKENIZER)
        ids, _ = render_chat(MESSAGES, TOKENIZER, generation_prompt=True)
        want = sample.generate(model, [ids], stop=engine.TURNS, **options)[0].text
        assert chat == want.removeprefix(" ")
        assert text == sample.generate(model, [TOKENIZER.encode("abc")], **options)[0].text
        with pytest.raises(openai.BadRequestError, match="temperature=-1.0") as e:
            client.completions.create(prompt="abc", temperature=-1, **asked)
        assert e.value.param == "temperature"
        with pytest.raises(openai.NotFoundError, match="none of"):
            client.completions.create(prompt="abc", model="other")


def test_think_and_what_it_leaves_in_the_reply(server, model):
    for think, prefix in (("on", " <think"), ("off", " <think>\n</think")):
        asked = dict(model="m", messages=MESSAGES, seed=2, think=think, logit_bias=READABLE)
        got = texts_of(server, "/v1/chat/completions", asked, True)[0]
        ids, _ = render_chat(MESSAGES, TOKENIZER, generation_prompt=True)
        options = dict(seed=2, max_new_tokens=24, tokenizer=TOKENIZER)
        bias = {int(token): value for token, value in READABLE.items()}
        ids = ids + TOKENIZER.encode(prefix)
        want = sample.generate(model, [ids], logit_bias=bias, stop=engine.TURNS, **options)[0].text
        assert got == ["<think" + want if think == "on" else want.removeprefix(">").lstrip()]


def test_ctrl_c_ends_streams_and_the_server_in_two_lines(model, tmp_path):
    model.save_pretrained(tmp_path / "m.pth")
    flags = [f"--model={tmp_path / 'm.pth'}", "--tokenizer=bytes", "--device=cpu", "--serve"]
    command = [sys.executable, "sample.py", *flags, "--port=0"]
    with subprocess.Popen(command, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
        port = int(re.search(r":(\d+) is the page", process.stdout.readline())[1])
        body = dict(model="m", prompt="x", max_tokens=10**6, stream=True, logit_bias={"0": -100})
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        client = socket.create_connection(("127.0.0.1", port), timeout=30)
        client.sendall(post(body))
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGINT)
        assert "the engine failed or ends" in read_all(client)
        said = process.stdout.read()
    assert process.returncode == 0
    assert said == "For trying a model, not for production. Ctrl-C ends it.\n\nstopped\n"


def test_a_port_in_use_and_flags_that_do_not_go_together_are_one_line(model, tmp_path):
    model.save_pretrained(tmp_path / "m.pth")
    flags = [f"--model={tmp_path / 'm.pth'}", "--tokenizer=bytes", "--device=cpu", "--serve"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port} cannot be listened on: Address"):
            sample.main(read_flags(sample.Config, [*flags, f"--port={port}"]))
    with pytest.raises(UserError, match="--serve takes no prompt"):
        sample.main(read_flags(sample.Config, [*flags, "--prompt=x"]))
    with pytest.raises(UserError, match="port=70000: expected"):
        read_flags(sample.Config, [*flags, "--port=70000"])
