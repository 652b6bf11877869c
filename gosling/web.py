"""http.server with manners: one JSON request a connection, within limits, for our own page alone.

A body has a length and a limit, a client has seconds to send it, connections are counted, and no
page of another site may ask: neither by its Origin nor under a name of its own that leads here.
"""

import contextlib
import ipaddress
import json
import re
import socket
import socketserver
import threading
import traceback
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gosling.config import UserError

MAX_BODY = 2**20  # bytes of a request
MAX_CONNECTIONS = 128
SECONDS = 10  # for a client to send its whole request, and to take a piece of the answer
LAST_CHUNK = b"0\r\n\r\n"
NAMES = {"localhost", "127.0.0.1", "::1"}  # by which the browser may know us
HEADERS = {
    "Connection": "close",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class Refused(Exception):
    """A request that is answered with an error: (HTTP status, what is wrong, the key or None)."""


class Server(ThreadingHTTPServer):
    """A thread for each connection, up to a number of them. handler: a class made of Handler."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address, handler):
        host = address[0]
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.names, self.any_address = NAMES | {host.lower()}, host in ("0.0.0.0", "::")
        if self.any_address:
            self.names |= {socket.gethostname().lower(), "host.docker.internal"}
        self.room = threading.Semaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def server_bind(self):
        """Without HTTPServer's look-up of our name, which may wait for the network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def knows(self, host):
        """Whether a Host header names us. A page of another site whose name was made to point here
        (DNS rebinding) sends that name; where any address is ours, no address is such a name."""
        with contextlib.suppress(ValueError):
            name = urllib.parse.urlsplit(f"//{host}").hostname
            return name in self.names or (self.any_address and bool(ipaddress.ip_address(name)))
        return False

    def process_request(self, request, client_address):
        if not self.room.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(0)
                request.sendall(b"HTTP/1.1 503 Too many connections\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request, client_address):
        """A connection that breaks is no event; what goes wrong here is told by `answer`."""


class Handler(BaseHTTPRequestHandler):
    """Reads one request; every answer closes its connection."""

    protocol_version, timeout, is_begun = "HTTP/1.1", SECONDS, False

    def setup(self):
        super().setup()
        self.set_deadline()

    def set_deadline(self):
        """However slowly a client sends, in SECONDS it is over."""
        self.deadline = threading.Timer(SECONDS, self.hang_up)
        self.deadline.daemon = True
        self.deadline.start()

    def hang_up(self):
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self):
        """Read on what a client still sends: closed before, it might not see the answer."""
        self.deadline.cancel()
        self.set_deadline()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(2**16):
                pass
        self.deadline.cancel()
        with contextlib.suppress(OSError):
            super().finish()

    def answer(self, doors):
        """Do what the path says, if the page that asks is our own or none."""
        try:
            hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
            if len(hosts) != 1 or not self.server.knows(hosts[0]):
                names = ", ".join(sorted(self.server.names))
                raise Refused(403, f"Host {hosts} is not this server; use {names}, or set --host")
            if origin and origin.partition("://")[2].lower() != hosts[0].lower():
                raise Refused(403, f"Origin {origin:.200}: no other site's page may ask")
            path = self.path.partition("?")[0]
            if path not in doors:
                raise Refused(404, f"{self.command} {path:.200}: there is no such thing here")
            doors[path]()
        except Refused as e:
            self.fail(*e.args)
        except (UserError, UnicodeError) as e:
            key = re.match(r"\w+(?==)", str(e))
            self.fail(400, str(e), key and key[0])
        except OSError:  # the client has gone
            self.close_connection = True
        except Exception:
            traceback.print_exc()
            self.fail(500, "this server has a bug; its terminal says which")

    def read_json(self):
        """The body of the request; Refused if it is not JSON or has no length that will do."""
        length = self.headers.get("Content-Length", "")
        if not length or "Transfer-Encoding" in self.headers:
            raise Refused(411, "a body with a Content-Length is needed")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refused(400, f"Content-Length {length:.40} is no length")
        if int(length) > MAX_BODY:
            raise Refused(413, f"{length} bytes; at most {MAX_BODY} are read")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError
        self.deadline.cancel()
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as e:
            raise Refused(400, f"the body is not JSON: {e}") from None

    def is_gone(self):
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        finally:
            self.connection.settimeout(SECONDS)

    def send_event(self, text):
        """A piece of a stream; the first one begins it. In chunks, so that a torn one is seen."""
        if not self.is_begun:
            self.is_begun = True
            self.send_head(200, "text/event-stream", **{"Transfer-Encoding": "chunked"})
        piece = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def end_stream(self):
        self.send_event("[DONE]")
        self.wfile.write(LAST_CHUNK)

    def send_head(self, status, kind, **more):
        self.send_response(status)
        for key, value in {**HEADERS, "Content-Type": kind, **more}.items():
            self.send_header(key, str(value))
        self.end_headers()

    def send(self, status, body, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_head(status, kind, **{"Content-Length": len(body)})
        self.wfile.write(body)

    def fail(self, status, message, key=None):
        """An error as OpenAI's clients know it."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"error": {"message": message, "type": kind, "param": key, "code": None}}
        with contextlib.suppress(OSError):
            if self.is_begun:
                self.send_event(json.dumps(error))
                self.wfile.write(LAST_CHUNK)
            else:
                self.send(status, error)

    def send_error(self, code, message=None, explain=None):
        """What http.server itself finds wrong."""
        self.fail(int(code), message or explain or "this cannot be read")

    def log_message(self, format, *args):
        """Nothing of requests is written down."""
