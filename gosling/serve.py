"""A model behind OpenAI's API, and a page to talk to it: for trying a model, not for production.

    GET  /                      the page, serve.html
    GET  /v1/models             the model, once for each state
    POST /v1/chat/completions   messages, in the template of training
    POST /v1/completions        texts or ids to go on from

One thread owns the engine, in which all requests decode together; uvicorn's loop in another hands
them over and sends what comes. api.py knows OpenAI's forms. Bodies and seconds are limited, and no
page of another site may ask.
"""

import asyncio
import contextlib
import functools
import ipaddress
import json
import queue
import re
import socket
import threading
import traceback
import urllib.parse
from pathlib import Path

from gosling import api, engine
from gosling.answers import score_tokens
from gosling.config import UserError
from gosling.schemas import ChatRequest, CompletionRequest

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_SLOTS = 64  # completions that decode at a time, unless --batch_size says another number
MAX_CONNECTIONS = 128
MAX_BODY = 2**20  # bytes of a request
SECONDS = 10  # for a client to send a request, and to take a piece of the answer
PAGE = Path(__file__).with_suffix(".html")
DEFAULTS = ("temperature", "top_p", "max_new_tokens", "presence_penalty", "frequency_penalty")
HEADERS = {
    "Connection": "close",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


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
        """Forget a call that is done or whose client has gone; its slots are free at once."""
        self.live.discard(call)
        self.engine.cancel(call)

    def give_up(self):
        for call in self.live:
            call.tell(None, None)
        self.live.clear()

    def run(self):
        self.engine = engine.Engine(self.model, self.n_slots)
        while True:
            try:
                while not self.live or not self.inbox.empty():
                    act, call = self.inbox.get()
                    if act is None:
                        self.give_up()
                        return
                    act(call)
                for call, number, completion in self.engine.step():
                    call.tell(number, completion)
            except Exception:  # too little memory, say; the next requests find a new engine
                traceback.print_exc()
                self.give_up()
                self.engine = engine.Engine(self.model, self.n_slots)


class Connection(H11Protocol):
    """uvicorn's, closed when a client takes SECONDS to send a head or to take what it asked for."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.wait()

    def wait(self):
        self.clock = self.loop.call_later(SECONDS, self.transport.abort)

    def data_received(self, data):
        super().data_received(data)
        if self.cycle:  # the head is whole; read_json gives the body its time
            self.clock.cancel()

    def pause_writing(self):
        super().pause_writing()
        self.wait()

    def resume_writing(self):
        super().resume_writing()
        self.clock.cancel()

    def connection_lost(self, error):
        self.clock.cancel()
        super().connection_lost(error)


class OwnPageOnly:
    """Refuses what a page of another site asks: its Origin tells, or, where its own name was made
    to lead here (DNS rebinding), the Host. Where any address is ours, no address is such a name."""

    def __init__(self, app, host):
        self.app, self.any_address = app, host in ("0.0.0.0", "::")
        self.names = {"localhost", "127.0.0.1", "::1", host.lower()}
        if self.any_address:
            self.names |= {socket.gethostname().lower(), "host.docker.internal"}

    def knows(self, host):
        with contextlib.suppress(ValueError):
            name = urllib.parse.urlsplit(f"//{host}").hostname
            return name in self.names or (self.any_address and bool(ipaddress.ip_address(name)))
        return False

    async def __call__(self, scope, receive, send):
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.knows(host):
            names = ", ".join(sorted(self.names))
            problem = f"Host {host:.200} is not this server; use {names}, or set --host"
        elif origin and origin.partition("://")[2].lower() != host.lower():
            problem = f"Origin {origin:.200}: no other site's page may ask"
        else:
            await self.app(scope, receive, send)
            return
        answer = await failed(None, HTTPException(403, problem))
        await answer(scope, receive, send)


def error_of(error):
    """An error as OpenAI's clients know it; of a text such as "n: ..." the key is known."""
    text = str(getattr(error, "detail", error))
    key = re.match(r"\w+(?=[=:\[])", text)
    kind = "invalid_request_error" if status_of(error) < 500 else "server_error"
    return {"error": {"message": text, "type": kind, "param": key and key[0], "code": None}}


def status_of(error):
    return getattr(error, "status_code", 400)


async def failed(request, error):
    return JSONResponse(error_of(error), status_of(error))


async def read_json(request):
    """The body of the request; HTTPException if it is not JSON, too large or too slow."""
    body, size = b"", 0
    with anyio.move_on_after(SECONDS) as limit:
        async for piece in request.stream():  # to its end: closed before, it might not see why
            size += len(piece)
            body += piece if size <= MAX_BODY else b""
    if limit.cancelled_caught:
        raise HTTPException(408, f"the request did not come within {SECONDS} seconds")
    if size > MAX_BODY:
        raise HTTPException(413, f"{size} bytes; at most {MAX_BODY} are read")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as e:
        raise HTTPException(400, f"the body is not JSON: {e}") from None


async def send_page(request):
    return HTMLResponse(PAGE.read_text(encoding="utf-8"))


async def send_models(request):
    here, about = request.app.state, {"object": "model", "created": 0, "owned_by": "gosling"}
    models = [{"id": name, **about} for name in here.models]
    defaults = {key: here.defaults[key] for key in DEFAULTS}
    return JSONResponse({"object": "list", "data": models, "defaults": defaults})


async def complete(kind, request):
    """What is asked for goes to the engine, and what comes of it to the client."""
    sent, here = api.read(kind, await read_json(request)), request.app.state
    if sent.model not in here.models:
        raise HTTPException(404, f"model: {sent.model:.200} is none of {[*here.models]}")
    # In a thread of its own: a schema may take seconds, and the others' texts go on meanwhile.
    about = (here.worker.model, sent, here.models[sent.model], here.defaults)
    loop = asyncio.get_running_loop()
    call = await anyio.to_thread.run_sync(api.Call, *about, loop)
    here.worker.inbox.put((here.worker.add, call))
    if sent.stream:
        return StreamingResponse(events(call, request), media_type="text/event-stream")
    choices = {}
    async for piece in pieces(call, request):
        if piece[-1] is not None:
            choices[piece[0]] = call.choice(*piece)
    in_order = [choices[number] for number in sorted(choices)]
    return JSONResponse(call.answer(in_order, is_last=True))


async def events(call, request):
    """The texts of a stream."""
    try:
        async for piece in pieces(call, request):
            choice = call.choice(*piece)
            if choice:
                yield f"data: {json.dumps(call.answer([choice]))}\n\n"
    except ClientDisconnect:
        return
    except HTTPException as e:
        yield f"data: {json.dumps(error_of(e))}\n\n"
        return
    if call.sent.stream_options.include_usage:
        yield f"data: {json.dumps(call.answer([], is_last=True))}\n\n"
    yield "data: [DONE]\n\n"


async def pieces(call, request):
    """The latest of each completion as it comes, until all have ended."""
    worker, left = request.app.state.worker, call.n_completions
    try:
        while left:
            with anyio.move_on_after(0.5):
                await call.news.wait()
            if await request.is_disconnected():
                raise ClientDisconnect
            call.news.clear()
            latest, call.latest = call.latest, {}
            if None in latest:
                raise HTTPException(
                    500, "the engine failed or ends; the server's terminal says how"
                )
            for piece in latest.values():
                yield piece
                left -= piece[-1] is not None
    finally:
        worker.inbox.put((worker.drop, call))


class Server(uvicorn.Server):
    """models: {name: state or None}; defaults: Options of what a request does not say."""

    def __init__(self, address, model, models, defaults):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.socket = socket.create_server(address, family=family, backlog=MAX_CONNECTIONS)
        self.port = self.socket.getsockname()[1]
        chat = functools.partial(complete, ChatRequest)
        completion = functools.partial(complete, CompletionRequest)
        app = Starlette(
            routes=[
                Route("/", send_page),
                Route("/v1/models", send_models),
                Route("/v1/chat/completions", chat, methods=["POST"]),
                Route("/v1/completions", completion, methods=["POST"]),
            ],
            middleware=[Middleware(OwnPageOnly, host=address[0])],
            exception_handlers=dict.fromkeys(
                (HTTPException, UserError, UnicodeError, ClientDisconnect, 500), failed
            ),
        )
        n_slots = defaults.get("batch_size") or min(MAX_SLOTS, engine.slots_for(model))
        app.state.models, app.state.defaults = models, defaults
        app.state.worker = self.worker = Worker(model, n_slots)
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                log_level="error",
                proxy_headers=False,
                headers=list(HEADERS.items()),
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )

    def run(self):
        """Serve until Ctrl-C, or until another thread sets should_exit."""
        self.worker.start()
        with contextlib.suppress(KeyboardInterrupt):
            super().run([self.socket])
        self.worker.join(SECONDS)

    async def shutdown(self, sockets=None):
        """The worker tells the requests that are open; they end before the loop does."""
        self.worker.inbox.put((None, None))
        await super().shutdown(sockets)


def serve(model, models, defaults, host, port):
    """Serve until Ctrl-C. models: {name: state or None}"""
    try:
        server = Server((host, port), model, models, defaults)
    except OSError as e:
        raise UserError(
            f"--host={host} --port={port} cannot be listened on: {e.strerror}; choose another"
        ) from None
    name = f"[{host}]" if ":" in host else host
    where = f"http://{name}:{server.port}"
    print(f"{where} is the page, {where}/v1 OpenAI's API of {', '.join(models)}")
    print("For trying a model, not for production. Ctrl-C ends it.", flush=True)
    if host in ("0.0.0.0", "::"):
        print("Whoever reaches this machine can use it.", flush=True)
    server.run()
    print("\nstopped")
