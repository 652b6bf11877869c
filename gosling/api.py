"""OpenAI's requests for text, and the engine's completions in the form of OpenAI's answers."""

import asyncio
import contextlib
import dataclasses
import itertools
import re
import time
import uuid

from gosling import engine
from gosling.answers import settled
from gosling.chat import THINK, render_chat
from gosling.config import UserError
from gosling.grammar import ANY_OBJECT
from gosling.schemas import ChatRequest

import pydantic

MAX_PROMPT = 2**15  # tokens of a request's prompts; while they are read, the others wait
MAX_COMPLETIONS = 128  # of a request
SAMPLING = {field.name for field in dataclasses.fields(engine.Sampling)} - {"n", "stop"}


def read(kind, sent):
    """JSON's value -> the request, of a kind of schemas.py; UserError names the key."""
    try:
        return kind.model_validate(sent)
    except pydantic.ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"][:1]) or None
        expected = re.sub("Input should be|Value error,", "expected", first["msg"])
        expected = expected.replace("expected expected", "expected")
        problem = f"{expected}, not {first['input']!r:.60}"
        if first["type"] == "missing":
            problem = "it is missing"
        if first["type"] == "extra_forbidden":
            problem = "this server does not know it; leave it out"
        raise UserError(f"{key or 'the request'}: {problem}") from None


def prompts_of(sent, tokenizer):
    """-> the ids of each prompt of a request"""
    if isinstance(sent, ChatRequest):
        ids, _ = render_chat(sent.messages, tokenizer, generation_prompt=True, think=sent.think)
        return [ids]
    prompts = sent.prompt
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    return [
        (tokenizer.encode(prompt) or [tokenizer.end_id]) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def form_of(sent):
    """What the texts must fit, as keywords of the engine; {} where a request does not say."""
    if sent.response_format is None and sent.regex is None:
        return {}
    kind, form = getattr(sent.response_format, "type", "text"), {"regex": sent.regex}
    if kind == "json_schema":
        return {**form, "json_schema": sent.response_format.json_schema.schema_}
    return {**form, "json_schema": ANY_OBJECT if kind == "json_object" else None}


class Call(engine.Request):
    """A request to the engine, with the way back to the coroutine that waits for it.

    state: that the model starts from, or None. defaults: the tokenizer, and what is not sent.
    loop: that of the coroutine.
    """

    def __init__(self, model, sent, state, defaults, loop):
        self.sent, self.is_chat = sent, isinstance(sent, ChatRequest)
        self.has_echo = not self.is_chat and sent.echo
        prompts = prompts_of(sent, defaults["tokenizer"])
        given = sent.model_dump(exclude_unset=True)
        key, n_tokens = "messages" if self.is_chat else "prompt", sum(map(len, prompts))
        if n_tokens > MAX_PROMPT:
            raise UserError(f"{key}: {n_tokens} tokens; at most {MAX_PROMPT} are read")
        if not 0 < sent.n * len(prompts) <= MAX_COMPLETIONS:
            asked = f"{sent.n} of each of {len(prompts)} prompts"
            raise UserError(f"n: {asked}; expected 1 to {MAX_COMPLETIONS} completions")
        if self.has_echo and sent.stream:
            raise UserError("echo: not in a stream; send one of the two")
        limit = given.get("max_completion_tokens") or sent.max_tokens
        stop = [sent.stop] if isinstance(sent.stop, str) else sent.stop
        options = {**defaults, **{name: given[name] for name in SAMPLING & given.keys()}}
        options["max_new_tokens"] = limit or defaults["max_new_tokens"]
        options["stop"] = (*defaults["stop"], *stop, *(engine.TURNS if self.is_chat else ()))
        options["logit_bias"] = {int(token): bias for token, bias in sent.logit_bias.items()}
        options = engine.Options(**{**options, **form_of(sent)}, n=sent.n, state=state)
        super().__init__(model, prompts, options)
        if sent.logprobs == 1 and not self.is_chat and options.temperature:
            raise UserError("logprobs: 1 needs temperature 0; others take 0")
        self.n_completions = sent.n * len(prompts)
        self.loop, self.news = loop, asyncio.Event()
        self.latest = {}  # number: (number, Completion, tokens of it, finish_reason), to be sent
        self.echo = []  # of each prompt: what answers.score_tokens says
        self.told = {}  # number: (text, tokens) that the client has
        self.id, self.created = f"gosling-{uuid.uuid4().hex}", int(time.time())

    def tell(self, number, completion):
        """From the engine's thread: a completion as it is now. None, None: it failed, or ends."""
        piece = (number, completion, 0, "")
        if completion:
            piece = (number, completion, len(completion.tokens), completion.finish_reason)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            self.loop.call_soon_threadsafe(self.note, piece)

    def note(self, piece):
        self.latest[piece[0]] = piece
        self.news.set()

    def choice(self, number, completion, n_tokens, reason):
        """What is new of a completion since the last time, as one of OpenAI's choices, or None."""
        o, (before, n_before) = self.options, self.told.get(number, ("", 0))
        text = completion.text
        if reason is None:
            text = settled(o.tokenizer.decode(completion.tokens[:n_tokens]), o.stop)
        text = self.content(text)
        new = text[len(before) :] if text.startswith(before) else ""
        if not new and reason is None:
            return None
        self.told[number] = (before + new, n_tokens)
        tokens = completion.tokens[n_before:n_tokens]
        logprobs = completion.logprobs[n_before:n_tokens]
        scores = list(zip(logprobs, tokens, logprobs, strict=True))
        if self.has_echo:
            prompt = self.prompts[number // o.n]
            new = o.tokenizer.decode(prompt) + new
            tokens, scores = prompt + tokens, [None, *self.echo[number // o.n], *scores]
        choice = {"index": number, "finish_reason": reason, "logprobs": None}
        if self.sent.logprobs not in (None, False):
            choice["logprobs"] = self.logprobs(tokens, scores)
        if not self.is_chat:
            return {**choice, "text": new}
        message = {"role": "assistant", "content": new}
        if not self.sent.stream:
            return {**choice, "message": message}
        return {**choice, "delta": message if n_before == 0 else {"content": new}}

    def content(self, text):
        """What a reply says, of the text behind "Assistant:" and what `think` put there."""
        if not self.is_chat:
            return text
        if self.sent.think == "on":
            return THINK["on"].strip() + text
        if self.sent.think == "off":
            return text.removeprefix(">").lstrip()
        return text.removeprefix(" ")

    def logprobs(self, tokens, scores):
        """scores: of each token (its log-probability, the likeliest id, that one's) or None."""
        decode = self.options.tokenizer.decode
        texts = [decode([token]) for token in tokens]
        if self.is_chat:
            pairs = zip(texts, scores, strict=True)
            rest = {"bytes": None, "top_logprobs": []}
            return {"content": [{"token": t, "logprob": s[0], **rest} for t, s in pairs]}
        starts = itertools.accumulate(map(len, texts), initial=0)
        found = {"tokens": texts, "text_offset": list(starts)[:-1], "top_logprobs": None}
        found["token_logprobs"] = [score and score[0] for score in scores]
        if self.sent.logprobs:
            found["top_logprobs"] = [score and {decode([score[1]]): score[2]} for score in scores]
        return found

    def answer(self, choices, is_last=False):
        """OpenAI's object around choices; the last one has the numbers of tokens."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if self.sent.stream else "chat.completion"
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.sent.model}
        if not is_last:
            return {**about, "choices": choices}
        n_read = sum(map(len, self.prompts))
        n_new = sum(n_tokens for _, n_tokens in self.told.values())
        usage = {
            "prompt_tokens": n_read,
            "completion_tokens": n_new,
            "total_tokens": n_read + n_new,
        }
        return {**about, "choices": choices, "usage": usage}
