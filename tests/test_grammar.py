"""Structured output: masks against languages that are written out string by string, samples of
untrained models against json and re, log-probabilities against the network. All of it where
llguidance is installed."""

import contextlib
import http.client
import itertools
import json
import re
import sys
import threading
import time

import sample
import train_grpo
from gosling import engine, grammar, serve
from gosling.chat import render_chat
from gosling.config import UserError, read_flags
from gosling.tokenizer import HubTokenizer, VocabTokenizer, load_tokenizer, train_bpe

import helpers
import numpy as np
import pytest
import torch
from helpers import write

BYTES = load_tokenizer("bytes")
# Whole and half characters, tokens across borders of characters, two ids of one token, gaps.
PIECES = "a b ab ba é aé [ ] , 1 11 [1 1, [] ] 1,1 <".encode().split()
PIECES += [b" ", b" [", b"\xc3", b"\xa9", b"\xa9b", b"a\xc3"]
TINY = VocabTokenizer({2 * i + 3: token for i, token in enumerate(PIECES)}, "tiny")
COMPACT = {"whitespace_flexible": False, "whitespace_pattern": None}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": -3, "maximum": 150},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "kind": {"enum": ["fox", "größer", None, 7]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
    },
    "required": ["name", "age", "score", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def llguidance():
    return pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def model():
    return helpers.random_model("x070", n_layer=2, n_embd=64, vocab_size=257)


def fits(value):
    """Whether a value is one of SCHEMA."""
    kinds = {"name": str, "age": int, "score": (int, float), "tags": list}
    return (
        sorted(value) == sorted(SCHEMA["properties"])
        and all(isinstance(value[key], kind) for key, kind in kinds.items())
        and len(value["name"]) <= 6
        and -3 <= value["age"] <= 150
        and 0 <= value["score"] <= 1
        and value["kind"] in ("fox", "größer", None, 7)
        and len(value["tags"]) <= 2
        and all(isinstance(tag, str) and len(tag) <= 2 for tag in value["tags"])
    )


def grammar_for(tokenizer, prompt=(0,), vocab_size=None, **options):
    options = engine.Options(tokenizer=tokenizer, **options)
    options.stop_ids = {tokenizer.end_id} if options.stop_ids is None else set(options.stop_ids)
    options.logit_bias = options.logit_bias or {}
    return grammar.grammar_of(options, [list(prompt)], vocab_size or tokenizer.vocab_size)


def allowed(matcher):
    return set(np.flatnonzero(np.unpackbits(matcher.allowed, bitorder="little")).tolist())


# ----------------------------------------------------------------------------------------------
# masks


def strings(alphabet, most, regex):
    """All strings over the alphabet, of up to so many letters, that re matches."""
    tuples = (t for n in range(most + 1) for t in itertools.product(alphabet, repeat=n))
    return {text.encode() for text in map("".join, tuples) if re.fullmatch(regex, text)}


def check_every_mask(matcher, language):
    """Walk to every text that tokens can make on the way to a string of the language, and compare
    the masks: a token where the text with it begins a string, 0 where the text is one."""
    seen, waiting = set(), [(b"", matcher)]
    begun = {text[:n] for text in language for n in range(len(text) + 1)}
    while waiting:
        text, matcher = waiting.pop()
        want = {i for i, token in TINY.tokens.items() if text + token in begun}
        assert allowed(matcher) == (want | {0} if text in language else want), text
        for i in want:
            after = text + TINY.tokens[i]
            if after not in seen:
                seen.add(after)
                step = grammar.Matcher(matcher.grammar, matcher.follower.deep_copy())
                step.accept(i, False)
                waiting.append((after, step))
    return len(seen)


@pytest.mark.parametrize(
    "regex, most",
    [("(ab|a)(é|b){0,2}", 4), ("[^a]b{1,2}|é?", 3), ("(aé?){2,3}", 6), ("(?i:A)é{1,3}?", 4)],
)
def test_masks_of_a_regex_are_those_of_its_strings(regex, most):
    language = strings("abé[],1< "[: 3 if most > 4 else 9], most, regex)
    matcher = grammar_for(TINY, regex=regex, vocab_size=50).begin(0)
    assert check_every_mask(matcher, language) > 5


def test_masks_of_a_schema_are_those_of_its_texts():
    """A list of up to two of three values, compact, behind a space or not."""
    lists = [t for n in range(3) for t in itertools.product([1, 11, [1]], repeat=n)]
    language = {json.dumps(values, separators=(",", ":")).encode() for values in lists}
    language |= {b" " + text for text in language}
    items = {"enum": [1, 11, [1]]}
    schema = {"type": "array", "items": items, "maxItems": 2, "x-guidance": COMPACT}
    matcher = grammar_for(TINY, json_schema=schema, vocab_size=50).begin(0)
    assert check_every_mask(matcher, language) > 30


def test_ids_that_end_a_text_and_ids_that_are_ruled_out():
    """Stop ids come where the text may end and are no text, whatever their bytes."""
    a, b = TINY.ids[b"a"], TINY.ids[b"b"]
    matcher = grammar_for(TINY, regex="[ab]{1,2}", stop_ids=[0, a]).begin(0)
    assert a not in allowed(matcher) and 0 not in allowed(matcher) and b in allowed(matcher)
    assert matcher.accept(b, False) is None and {0, a, b} <= allowed(matcher)
    matcher = grammar_for(TINY, regex="a?b", logit_bias={a: -np.inf, 0: -np.inf}).begin(0)
    assert allowed(matcher) == {b, TINY.ids[b"ab"]}  # "a" alone is ruled out
    assert matcher.accept(b, False) == "stop"  # no id is left to end it


def test_a_tokenizer_json_is_read_byte_for_byte(tmp_path):
    """Each token's bytes are what the library decodes, alone where it is whole characters."""
    hub = train_bpe(["naïve größer 東京 1234 the the then"] * 9, 300)
    file = json.loads(hub.text)
    tool = {"id": hub.vocab_size, "content": "<tool ü>", "special": False}
    file["added_tokens"].append({**file["added_tokens"][0], **tool})
    hub = HubTokenizer(json.dumps(file), tmp_path / "tokenizer.json")
    tokens = grammar.token_bytes(hub)
    assert tokens[hub.end_id] == b"" and tokens[-1] == "<tool ü>".encode()
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)
    for i, token in enumerate(tokens):
        if i != hub.end_id:
            assert token.decode("utf-8", "replace") == hub.decode([i])
    ids = hub.encode("größer 東京")
    assert b"".join(tokens[i] for i in ids).decode() == "größer 東京"
    matcher = grammar_for(hub, regex="(größer )?東京").begin(0)
    for i in ids:
        assert i in allowed(matcher)
        matcher.accept(i, False)
    assert allowed(matcher) == {hub.end_id}


# ----------------------------------------------------------------------------------------------
# samples


def test_1000_samples_of_an_untrained_model_fit_a_schema(model):
    options = dict(n=500, max_new_tokens=400, tokenizer=BYTES, seed=0, batch_size=128)
    prompts = [BYTES.encode("A fox: "), BYTES.encode("User: a fox?\n\nAssistant:")]
    completions = engine.generate(model, prompts, json_schema=SCHEMA, **options)
    assert len(completions) == 1000 and {c.finish_reason for c in completions} == {"stop"}
    assert all(fits(json.loads(c.text)) for c in completions)
    assert all("\n\n" not in c.text and c.tokens[-1] == 0 for c in completions)
    assert all(c.text.startswith(" ") for c in completions[500:])  # as a reply begins
    assert len({c.text for c in completions}) == 1000


REGEX = r"(19|20)\d\d-[01]\d: (.|東京){1,3}[^\w\s]?"


@pytest.mark.parametrize("n", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_samples_in_worlds_tokens(n):
    """Whose tokens may be parts of a character, and cross the borders of the grammar's parts."""
    world = load_tokenizer("world")
    model = helpers.random_model("x070", n_layer=1, n_embd=64, vocab_size=65536)
    options = dict(n=n, max_new_tokens=300, tokenizer=world, seed=0, batch_size=64)
    prompt = [world.encode("A fox: ")]
    completions = engine.generate(model, prompt, json_schema=SCHEMA, **options)
    assert {c.finish_reason for c in completions} == {"stop"}
    assert all(fits(json.loads(c.text)) for c in completions)
    completions = engine.generate(model, prompt, regex=REGEX, **options)
    assert {c.finish_reason for c in completions} == {"stop"}
    assert all(re.fullmatch(REGEX, c.text, re.ASCII) for c in completions)


WAYS = [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}]


@pytest.mark.parametrize("way", [*WAYS, {"presence_penalty": 2.0, "repetition_penalty": 1.5}])
def test_every_way_to_choose_keeps_to_the_grammar(way, model):
    regex = "[ac]x{3,9}|é{2}"
    options = dict(n=10, max_new_tokens=50, tokenizer=BYTES, seed=3, regex=regex)
    for c in engine.generate(model, [[5], [6]], **options, **way):
        assert re.fullmatch(regex, c.text) and c.finish_reason == "stop"


@pytest.mark.parametrize("version", ["x070", "x060"])
def test_logprobs_are_those_of_the_network_without_the_grammar(version):
    model = helpers.random_model(version, n_layer=2, n_embd=64, vocab_size=257)
    prompt = BYTES.encode("A fox: ")
    options = dict(n=8, max_new_tokens=60, tokenizer=BYTES, seed=1, temperature=0.7, top_p=0.9)
    for c in engine.generate(model, [prompt], json_schema=SCHEMA, **options):
        ids = torch.tensor([prompt + c.tokens])
        want = model.token_logprobs(ids[:, :-1], ids[:, 1:], temperature=0.7)[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(c.logprobs), want, atol=1e-5, rtol=1e-5)


def run_together(model, *requests):
    """Requests of one engine at once -> {request: its completions}"""
    running, done = engine.Engine(model, 16), {request: {} for request in requests}
    for request in requests:
        running.submit(request)
    while pieces := running.step():
        for request, number, completion in pieces:
            done[request][number] = completion
    return [[done[request][i] for i in sorted(done[request])] for request in requests]


def test_batch_mates_do_not_feel_a_grammar_nor_it_them(model):
    def request(**options):
        options = engine.Options(n=3, max_new_tokens=40, tokenizer=BYTES, seed=5, **options)
        return engine.Request(model, [BYTES.encode("A fox: ")], options)

    kinds = ({}, dict(json_schema=SCHEMA), dict(regex="(ab|é){4,}"))
    together = run_together(model, *[request(**kind) for kind in kinds])
    for kind, found in zip(kinds, together, strict=True):
        (alone,) = run_together(model, request(**kind))
        assert [c.tokens for c in found] == [c.tokens for c in alone]
        for one, other in zip(found, alone, strict=True):
            # The C++ sums a single row, as the prompt is here, in another order.
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-6)
    free, fox, letters = together
    assert all(json.loads(c.text) for c in fox if c.finish_reason == "stop")
    assert all(re.fullmatch("(ab|é)+(a|\ufffd)?", c.text) for c in letters)


def test_seeds_give_the_same_alone_and_in_a_batch(model):
    prompts = [BYTES.encode(text) for text in ("A fox: ", "x", "A list: ")]
    options = dict(n=2, max_new_tokens=50, tokenizer=BYTES, seed=5, json_schema=SCHEMA)
    whole = engine.generate(model, prompts, **options)
    for p, prompt in enumerate(prompts):
        alone = engine.generate(model, [prompt], indices=[p], batch_size=1, **options)
        assert [c.tokens for c in alone] == [c.tokens for c in whole[2 * p : 2 * p + 2]]


# ----------------------------------------------------------------------------------------------
# how a text begins and ends


def one(model, prompt="x", **options):
    """One greedy completion."""
    options = {"temperature": 0, "max_new_tokens": 20, "tokenizer": BYTES, **options}
    return engine.generate(model, [BYTES.encode(prompt)], **options)[0]


def test_how_a_text_ends(model):
    c = one(model, regex="abc")
    assert (c.text, c.finish_reason, c.tokens[-1], len(c.tokens)) == ("abc", "stop", 0, 4)
    c = one(model, regex="abc", max_new_tokens=3)  # whole, with no room for the end id
    assert (c.text, c.finish_reason, len(c.tokens)) == ("abc", "stop", 3)
    c = one(model, regex="abc", stop_ids=[])
    assert (c.text, c.finish_reason, len(c.tokens)) == ("abc", "stop", 3)
    c = one(model, regex="abc", max_new_tokens=2)
    assert (c.text, c.finish_reason) == ("ab", "length")
    c = one(model, regex="(abc){5,}", logit_bias={0: -100.0})  # fits, and might go on
    assert (c.text, c.finish_reason) == ("abcabcabcabcabcabcab", "length")
    c = one(model, regex="a{0}")
    assert (c.text, c.tokens, c.finish_reason) == ("", [0], "stop")


def test_a_stop_text_ends_a_text_wherever_it_comes(model):
    """As without a grammar, within a JSON string too; what is left need not parse."""
    c = one(model, json_schema={"const": "one STOP two"}, stop="STOP")
    assert (c.text.strip(), c.finish_reason) == ('"one', "stop")
    c = one(model, json_schema={"const": "a\n\nUser: b"}, stop=engine.TURNS)  # written with \\n
    assert json.loads(c.text) == "a\n\nUser: b" and c.finish_reason == "stop"


def test_a_reply_begins_behind_the_templates_space(model):
    """Or behind </think> and a line end, where the prompt rules thoughts out."""
    messages = [{"role": "user", "content": "?"}]
    for think, lead in ((None, " "), ("off", ">\n")):
        prompt, _ = render_chat(messages, BYTES, generation_prompt=True, think=think)
        for kind in (dict(regex="yes|no|a"), dict(json_schema={"enum": ["yes", "no"]})):
            for c in engine.generate(model, [prompt], n=4, tokenizer=BYTES, seed=0, **kind):
                assert c.text.startswith(lead) and c.finish_reason == "stop"
                assert c.text.removeprefix(lead).strip('"') in ("yes", "no", "a")


@pytest.mark.parametrize("name", ["bytes", "world"])
@pytest.mark.parametrize("kind", [{"regex": "yes|no"}, {"json_schema": {"enum": ["yes", "no"]}}])
def test_thoughts_are_free(name, kind):
    """Up to </think>; then a line end, and the text that fits."""
    tokenizer = load_tokenizer(name)
    messages = [{"role": "user", "content": "?"}]
    prompt, _ = render_chat(messages, tokenizer, generation_prompt=True, think="on")
    answer = "no" if "regex" in kind else '"no"'
    for thoughts in ("\nHm: {größer}?\n", "", "</think", "a <b></b>\n\n"):
        matcher = grammar_for(tokenizer, prompt, **kind).begin(0)
        assert not any(text in ("no", "y", '"') for text in texts_of(tokenizer, matcher))
        for token in tokenizer.encode(f">{thoughts}</think>\n{answer}"):
            assert token in allowed(matcher) and tokenizer.end_id not in allowed(matcher)
            assert matcher.accept(token, False) is None
        assert allowed(matcher) == {tokenizer.end_id}


def texts_of(tokenizer, matcher):
    return [tokenizer.decode([i]) for i in allowed(matcher)]


# ----------------------------------------------------------------------------------------------
# what is asked for wrongly

PATTERNS = [{"type": "string", "pattern": f".*{a}{b}.*"} for a in "abcd" for b in "abcde"]
DEEP, CIRCLE = {"type": "string"}, {}
for _ in range(2000):
    DEEP = {"type": "array", "items": DEEP}
CIRCLE["items"] = CIRCLE


@pytest.mark.parametrize(
    "kind, words",
    [
        ({"json_schema": {"type": "strin"}}, "json_schema: Invalid type: strin"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"$ref": "https://example.com/a.json"}}, "example.com"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "etc/passwd"),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "minimum"),
        ({"json_schema": {"enum": []}}, "json_schema"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema"),
        ({"json_schema": {"const": float("nan")}}, "cannot be written as JSON"),
        ({"json_schema": DEEP}, "json_schema"),
        ({"json_schema": CIRCLE}, "cannot be written as JSON"),
        ({"json_schema": {"enum": [str(i) for i in range(200_000)]}}, "characters"),
        ({"json_schema": {"type": "integer", "multipleOf": 2000003}}, "simpler"),
        ({"json_schema": {"allOf": PATTERNS}}, "not done with it after"),
        ({"json_schema": {"x-guidance": 1}}, "x-guidance"),
        ({"json_schema": {"x-guidance": {"spaces": 1}}}, "spaces"),
        ({"json_schema": [1]}, "json_schema"),
        ({"regex": "a)(b"}, "regex='a)(b': unopened group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "(" * 3000 + "a" + ")" * 3000}, "nest"),
        ({"regex": "[^\\s\\S]"}, "no token of bytes begins"),
        ({"regex": ""}, "regex=''"),
        ({"regex": "a\ud800"}, "half of a character"),
        ({"regex": "a" * 2**21}, "characters"),
        ({"regex": 'x/\nstart: "y"', "json_schema": {}}, "leave one out"),
        ({"regex": "a", "tokenizer": None}, "need the tokenizer"),
        ({"regex": "a", "tokenizer": load_tokenizer("integers:9")}, "integers:9"),
        ({"regex": "é", "tokenizer": VocabTokenizer({1: b"a"}, "small")}, "no token of small"),
        ({"regex": "a", "logit_bias": {98: -np.inf}}, "no token of bytes begins"),
    ],
)
def test_what_is_no_grammar(kind, words, model, monkeypatch):
    monkeypatch.setattr(grammar, "SECONDS", 1)
    with pytest.raises(UserError) as e:
        engine.generate(model, [[1]], **{"tokenizer": BYTES, "max_new_tokens": 5, **kind})
    assert words in str(e.value) and len(str(e.value)) < 400 and "\n" not in str(e.value)
    assert "thoughts" not in str(e.value)  # which is of our own grammar around it


@pytest.mark.parametrize(
    "kind",
    [
        {"regex": "(a{1,1000}){1,1000}"},
        {"regex": "(a|b)*a(a|b){300}"},
        {"regex": "(.*a){50}"},
        {"regex": "((a{0,100}){0,100}){0,100}"},
        {"regex": "a{4000000000}"},
        {"regex": 'x/\nstart: "y"'},  # is no syntax of the library's
        {"json_schema": {"type": "array", "minItems": 10**7}},
        {"json_schema": {"type": "string", "minLength": 10**9}},
        {"json_schema": {"type": "string", "pattern": "(a{1,1000}){1,1000}"}},
        {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}},
    ],
)
def test_what_is_large_is_done_or_refused(kind, model):
    """In steps and memory that the library bounds; what comes is the beginning of a text."""
    options = dict(tokenizer=BYTES, seed=0, n=2, max_new_tokens=12)
    for c in engine.generate(model, [[1]], **options, **kind):
        assert c.text and c.finish_reason in ("stop", "length")
        if kind == {"regex": 'x/\nstart: "y"'}:
            assert c.text == 'x/\nstart: "y"'[:12]


def test_a_text_that_cannot_go_on_ends_with_a_warning(model, capsys):
    """The tokenizer has no letter c; the warning comes once."""
    small = VocabTokenizer({1: b"a", 2: b"b"}, "small")
    completions = engine.generate(model, [[1]], n=3, tokenizer=small, regex="a*bc", seed=0)
    assert all(re.fullmatch("a*b", c.text) for c in completions)
    assert {c.finish_reason for c in completions} == {"length"}
    assert capsys.readouterr().err.count("warning: regex: a completion cannot go on") == 1


def test_without_the_library(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammar.readable.cache_clear()
    with pytest.raises(UserError, match="pip install llguidance"):
        engine.generate(model, [[1]], tokenizer=BYTES, regex="a")
    assert engine.generate(model, [[1]], tokenizer=BYTES, max_new_tokens=2)


# ----------------------------------------------------------------------------------------------
# the commands


@pytest.fixture
def files(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "m.pth")
    write(tmp_path / "rows.jsonl", {"prompt": "x"}, {"prompt": [{"role": "user", "content": "?"}]})
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    return ["--model=m.pth", "--tokenizer=bytes", "--device=cpu", "--max_new_tokens=400"]


def test_the_commands_texts_fit(files, capsys):
    flags = [*files, "--json_schema=schema.json", "--prompt=A fox:"]
    sample.main(read_flags(sample.Config, flags))
    assert fits(json.loads(capsys.readouterr().out.removeprefix("A fox:")))
    sample.main(read_flags(sample.Config, [*files, "--regex=(ab){3}", "--prompt=A fox: "]))
    assert capsys.readouterr().out == "A fox: ababab\n"


def test_batch_writes_texts_that_fit_and_notes_the_schema(files, tmp_path):
    flags = ["rows.jsonl", "out.jsonl", *files, "--n=2", "--seed=0"]
    cfg = read_flags(sample.BatchConfig, [*flags, "--json_schema=schema.json"])
    sample.batch(cfg)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert all(fits(json.loads(c["text"])) for row in rows for c in row["completions"])
    sample.batch(cfg)
    (tmp_path / "schema.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="json_schema"):
        sample.batch(cfg)


BAD_FILES = {"{": "is not JSON", "[1]": "expected an object", '{"type": 1}': "json_schema: "}


@pytest.mark.parametrize("text, words", [(None, "no.json"), *BAD_FILES.items()])
def test_a_bad_file(text, words, files, tmp_path, capsys):
    if text is not None:
        (tmp_path / "no.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        sample.main(read_flags(sample.Config, [*files, "--json_schema=no.json", "--prompt=x"]))
    assert capsys.readouterr().out == ""
    flags = [*files, "--json_schema=schema.json", "--regex=a", "--prompt=x"]
    with pytest.raises(UserError, match="leave one out"):
        sample.main(read_flags(sample.Config, flags))


@pytest.fixture(scope="module")
def server(model):
    """A server with a regex of its own, for what does not say another form."""
    defaults = sample.options_of(sample.Config(max_new_tokens=400, regex="fox"), BYTES)
    server = serve.Server(("127.0.0.1", 0), model, {"m": None}, defaults)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server
    server.should_exit = True
    thread.join()


def ask(server, path, **body):
    """-> (status, JSON of the answer, or of a stream's events a list)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", f"/v1/{path}", json.dumps({"model": "m", **body}))
        answer = connection.getresponse()
        text = answer.read().decode()
    if body.get("stream"):
        return answer.status, [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    return answer.status, json.loads(text)


CHAT = {"messages": [{"role": "user", "content": "a fox?"}], "seed": 1}
FORMAT = {"type": "json_schema", "json_schema": {"name": "fox", "strict": True, "schema": SCHEMA}}


def test_the_server_keeps_to_a_response_format(server, model):
    """As OpenAI's clients ask for it; what a chat says parses, and is what generate makes."""
    asked = dict(**CHAT, response_format=FORMAT, n=3)
    choices = ask(server, "chat/completions", **asked)[1]["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    assert all(fits(json.loads(text)) and text.startswith("{") for text in texts)
    prompt, _ = render_chat(CHAT["messages"], BYTES, generation_prompt=True)
    options = dict(n=3, seed=1, tokenizer=BYTES, json_schema=SCHEMA, max_new_tokens=400)
    assert texts == [c.text[1:] for c in engine.generate(model, [prompt], **options)]
    streamed = {}
    for piece in ask(server, "chat/completions", **asked, stream=True)[1]:
        for choice in piece["choices"]:
            new = choice["delta"]["content"]
            streamed[choice["index"]] = streamed.get(choice["index"], "") + new
    assert [streamed[i] for i in range(3)] == texts
    asked["response_format"] = {"type": "json_object"}
    choices = ask(server, "chat/completions", **asked)[1]["choices"]
    texts = [c["message"]["content"] for c in choices if c["finish_reason"] == "stop"]
    assert texts and all(isinstance(json.loads(text), dict) for text in texts)


def test_the_servers_regex_and_what_a_request_says_instead(server):
    def text(**body):
        status, answer = ask(server, "completions", prompt="x", seed=2, **body)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    assert text() == "fox" and re.fullmatch("(ab){2,}", text(regex="(ab){2,}"))
    assert fits(json.loads(text(response_format=FORMAT)))
    assert len(text(response_format={"type": "text"}, max_tokens=9).encode()) > 3


@pytest.mark.parametrize(
    "form, words",
    [
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format: it is"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {**FORMAT, "json_schema": {"schema": {"type": 3}}}}, "json_schema: "),
        ({"regex": "("}, "regex='(': unclosed group"),
        ({"regex": ""}, "regex"),
        ({"regex": "a", "response_format": FORMAT}, "leave one out"),
    ],
)
def test_what_the_server_refuses(form, words, server):
    status, answer = ask(server, "chat/completions", **CHAT, **form)
    assert status == 400 and words in answer["error"]["message"]


def test_a_schema_that_takes_hours_holds_nobody_up(server, monkeypatch):
    monkeypatch.setattr(grammar, "SECONDS", 1)
    schema, answers = {"type": "integer", "multipleOf": 2000029}, []
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    thread = threading.Thread(
        target=lambda: answers.append(ask(server, "completions", prompt="x", response_format=form))
    )
    thread.start()
    n_meanwhile = 0
    while not answers:
        assert ask(server, "completions", prompt="x")[0] == 200
        n_meanwhile += 1
    ((status, answer),) = answers
    assert status == 400 and "simpler" in answer["error"]["message"] and n_meanwhile > 3


def run_grpo(tmp_path, out="out", **over):
    given = dict(data="rows.jsonl", init_from="m.pth", tokenizer="bytes", device="cpu")
    sizes = dict(num_generations=4, micro_bsz=1, global_bsz=2, ctx_len=600, max_steps=2, lr=1e-3)
    every = dict(eval_every=0, save_every=0, rollouts_every=1, warmup_steps=0, grad_clip=0.0)
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    train_grpo.main(
        train_grpo.Config(**given, **sizes, **every, reward=reward, out_dir=out, **over)
    )
    rows = [
        json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()
    ]
    return seen, [row for row in rows if "loss" in row]


def test_grpo_samples_what_fits_and_trains_on_its_own_log_probabilities(files, tmp_path):
    """The sampler's and the training pass's: both are without the grammar, so that they agree."""
    texts, rows = run_grpo(
        tmp_path, json_schema="schema.json", max_completion_length=400, importance_cap=2.0
    )
    assert len(texts) >= 16 and all(fits(json.loads(text)) for text in texts)
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
    texts, _ = run_grpo(tmp_path, "two", regex="(ab|é)+!", max_completion_length=300)
    assert all(re.fullmatch("(ab|é)+!", text.removeprefix(" ")) for text in texts)


def test_grpo_says_what_is_wrong_before_it_samples(files, tmp_path):
    with pytest.raises(UserError, match="unclosed group"):
        run_grpo(tmp_path, regex="(", max_completion_length=20)
    with pytest.raises(UserError, match=r"no\.json"):
        run_grpo(tmp_path, json_schema="no.json", max_completion_length=20)
