"""A model behind OpenAI's API, and a page to talk to it: for trying a model, not for production.

    GET  /                      the page, serve.html
    GET  /v1/models             the model, once for each state
    POST /v1/chat/completions   messages, in the template of training
    POST /v1/completions        texts or ids to go on from

One thread owns the engine, in which all requests decode together. Each connection has a thread that
hands a request over and writes what comes. web.py is the HTTP, api.py knows OpenAI's forms.
"""

import contextlib
import functools
import json
import queue
import threading
import traceback
from pathlib import Path

from gosling import api, engine, web
from gosling.answers import score_tokens
from gosling.config import UserError
from gosling.schemas import ChatRequest, CompletionRequest
from gosling.web import Refused

MAX_SLOTS = 64  # completions that decode at a time, unless --batch_size says another number
PAGE = Path(__file__).with_suffix(".html")
DEFAULTS = ("temperature", "top_p", "max_new_tokens", "presence_penalty", "frequency_penalty")


class Worker(threading.Thread):
    """The thread that owns the engine. Others put (what to do, a Call) into its inbox."""

    def __init__(self, model, n_slots):
        super().__init__(daemon=True)
        self.model, self.n_slots = model, n_slots
        self.inbox, self.live = queue.SimpleQueue(), set()

    def add(self, call):
        self.live.add(call)
        if call.has_echo:
            state = call.options.state
            call.echo = [score_tokens(self.model, ids, state) for ids in call.prompts]
        self.engine.submit(call)

    def drop(self, call):
        """Forget a call whose client has gone; its slots are free at once."""
        self.live.discard(call)
        self.engine.cancel(call)

    def run(self):
        self.engine = engine.Engine(self.model, self.n_slots)
        while True:
            try:
                while not self.live or not self.inbox.empty():
                    act, call = self.inbox.get()
                    if act is None:
                        return
                    act(call)
                for call, number, completion in self.engine.step():
                    reason = completion.finish_reason
                    call.pieces.put((number, completion, len(completion.tokens), reason))
                    call.left -= reason is not None
                    if call.left == 0:
                        self.live.discard(call)
            except Exception:  # too little memory, say; the next requests find a new engine
                traceback.print_exc()
                for call in self.live:
                    call.pieces.put(None)
                self.live.clear()
                self.engine = engine.Engine(self.model, self.n_slots)


class Server(web.Server):
    """models: {name: state or None}; defaults: Options of what a request does not say."""

    worker = None

    def __init__(self, address, model, models, defaults):
        super().__init__(address, Handler)
        self.model, self.models, self.defaults = model, models, defaults
        n_slots = defaults.get("batch_size") or min(MAX_SLOTS, engine.slots_for(model))
        self.worker = Worker(model, n_slots)
        self.worker.start()

    def server_close(self):
        super().server_close()
        if self.worker:  # None if the port was in use
            self.worker.inbox.put((None, None))
            self.worker.join(web.SECONDS)


class Handler(web.Handler):
    """What the paths say is done."""

    def do_GET(self):
        self.answer({"/": self.send_page, "/v1/models": self.send_models})

    def do_POST(self):
        kinds = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
        self.answer({path: functools.partial(self.complete, kind) for path, kind in kinds.items()})

    def send_page(self):
        self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8")

    def send_models(self):
        about = {"object": "model", "created": 0, "owned_by": "gosling"}
        models = [{"id": name, **about} for name in self.server.models]
        defaults = {key: self.server.defaults[key] for key in DEFAULTS}
        self.send(200, {"object": "list", "data": models, "defaults": defaults})

    def complete(self, kind):
        """What is asked for goes to the engine, and what comes of it to the client."""
        sent, server = api.read(kind, self.read_json()), self.server
        if sent.model not in server.models:
            raise Refused(404, f"model: {sent.model:.200} is none of {[*server.models]}", "model")
        call = api.Call(server.model, sent, server.models[sent.model], server.defaults)
        server.worker.inbox.put((server.worker.add, call))
        try:
            choices = {}
            for piece in self.pieces(call):
                is_told = sent.stream or piece[-1] is not None
                choice = call.choice(*piece) if is_told else None
                if choice and sent.stream:
                    self.send_event(json.dumps(call.answer([choice])))
                elif choice:
                    choices[piece[0]] = choice
        finally:
            server.worker.inbox.put((server.worker.drop, call))
        if not sent.stream:
            in_order = [choices[number] for number in sorted(choices)]
            self.send(200, call.answer(in_order, is_last=True))
            return
        if sent.stream_options.include_usage:
            self.send_event(json.dumps(call.answer([], is_last=True)))
        self.end_stream()

    def pieces(self, call):
        """The latest of each completion as it comes; ConnectionError once the client has gone."""
        left = len(call.prompts) * call.options.n
        while left:
            latest = {}
            with contextlib.suppress(queue.Empty):
                piece = call.pieces.get(timeout=0.5)
                while piece is not None:
                    latest[piece[0]] = piece
                    piece = call.pieces.get_nowait()
                raise Refused(500, "the engine failed; this server's terminal says how")
            if self.is_gone():
                raise ConnectionError
            yield from latest.values()
            left -= sum(piece[-1] is not None for piece in latest.values())


def serve(model, models, defaults, host, port):
    """Serve until Ctrl-C. models: {name: state or None}"""
    try:
        server = Server((host, port), model, models, defaults)
    except OSError as e:
        raise UserError(
            f"--host={host} --port={port} cannot be listened on: {e.strerror}; choose another"
        ) from None
    with server:
        name = f"[{host}]" if ":" in host else host
        where = f"http://{name}:{server.server_port}"
        print(f"{where} is the page, {where}/v1 OpenAI's API of {', '.join(models)}")
        print("For trying a model, not for production. Ctrl-C ends it.", flush=True)
        if server.any_address:
            print("Whoever reaches this machine can use it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    print("\nstopped")
