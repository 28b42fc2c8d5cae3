"""A stand-in for a server of nnsight on 127.0.0.1, which answers as told and can fail in many ways.

It speaks the protocol of `nnsight.intervention.backends.remote`: a websocket tells a session and, later,
how its job stands; the job itself comes by POST; its result is fetched by GET or told by the websocket.
"""

import base64
import hashlib
import io
import json
import linecache
import threading
from contextlib import contextmanager
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

TEXT, BINARY, CLOSE = 1, 2, 8


class StandIn(ThreadingHTTPServer):
    """Runs jobs on `model`. While there are `faults`, each job takes the next one and fails so."""

    daemon_threads = True

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.sessions: dict[str, Handler] = {}
        self.results: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.reset()

    def reset(self):
        self.faults: list[str] = []
        self.failed: list[str] = []
        self.by_websocket = False
        """Whether results come by the websocket; else they are fetched."""
        self.done = 0
        self.sent = 0
        """Bytes of results."""
        self.model_keys: set[str] = set()

    @property
    def host(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fails(self, fault):
        """Whether the job that runs now is to fail so; it then counts as failed."""
        if self.faults and self.faults[0] == fault:
            self.failed.append(self.faults.pop(0))
            return True
        return False

    def handle_error(self, request, client_address):
        """Connections end in many ways here."""


@contextmanager
def served(model):
    server = StandIn(model)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_):
        pass

    def answer(self, status, body, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/subscribe":
            self.subscribe()
            return
        blob = self.server.results.pop(self.path.rsplit("/", 1)[1])
        if self.server.fails("the result breaks off"):
            self.answer(200, blob[:100], len(blob))
        elif self.server.fails("half a result"):
            self.answer(200, blob[: len(blob) // 2])
        else:
            self.server.done += 1
            self.answer(200, blob)

    def subscribe(self):
        self.ended = threading.Event()
        if self.server.fails("no websocket"):
            self.answer(503, b"")
            return
        if self.server.fails("no answer"):
            return
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        accepted = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_header("Sec-WebSocket-Accept", accepted)
        self.end_headers()
        if self.server.fails("no session"):
            self.send(CLOSE, (1001).to_bytes(2, "big"))
            return
        session = str(id(self))
        self.server.sessions[session] = self
        self.send(TEXT, json.dumps({"session_id": session}).encode())
        self.ended.wait(60)

    def send(self, kind, data):
        """One whole frame of the websocket."""
        size = len(data)
        length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
        if size > 0xFFFF:
            length = b"\x7f" + size.to_bytes(8, "big")
        self.wfile.write(bytes([0x80 | kind]) + length + data)

    def tell(self, status, data=None, description=""):
        from nnsight.schema.response import ResponseModel

        message = ResponseModel(id="job", status=status, data=data, description=description)
        if isinstance(data, bytes):
            self.send(BINARY, message.pickle())
        else:
            self.send(TEXT, message.model_dump_json().encode())

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        whole = message_from_bytes(
            b"Content-Type: %b\r\n\r\n" % self.headers["Content-Type"].encode() + body
        )
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in whole.get_payload()
        }
        request = json.loads(parts["data"])
        server.model_keys.add(request["model_key"])
        subscriber = server.sessions.pop(request["session_id"])
        received = json.dumps({"id": "job", "status": "RECEIVED"}).encode()
        try:
            if server.fails("wrong key"):
                self.answer(401, b'{"detail": "no such key"}')
            elif server.fails("busy"):
                self.answer(503, b'{"detail": "no worker is free"}')
            elif server.fails("half an answer"):
                self.answer(200, received[:20])
            elif server.fails("the answer breaks off"):
                self.answer(200, received[:20], len(received))
            else:
                self.answer(200, received)
                self.run(subscriber, parts["blob"], request["compress"])
        finally:
            subscriber.ended.set()

    def run(self, subscriber, blob, compress):
        server = self.server
        subscriber.tell("RUNNING")
        if server.fails("hangs up"):
            subscriber.send(CLOSE, (1001).to_bytes(2, "big"))
        elif server.fails("drops"):
            subscriber.connection.shutdown(2)
        elif server.fails("job fails"):
            subscriber.tell("ERROR", description="out of memory")
        else:
            with server.lock:
                result = saved_by(server.model, blob, compress)
            server.sent += len(result)
            if server.by_websocket:
                server.done += 1
                subscriber.tell("COMPLETED", result)
            else:
                number = str(id(subscriber))
                server.results[number] = result
                subscriber.tell("COMPLETED", f"{server.host}/results/{number}")


def saved_by(model, blob, compress):
    """The bytes of what a job saves."""
    import zstandard
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import dec, inc

    sources = dict(linecache.cache)
    try:
        tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress)
    finally:
        # The client, in this same process, reads its own sources there.
        linecache.cache.clear()
        linecache.cache.update(sources)
    variables = tracer.info.frame.f_locals
    sent = dict(variables)
    inc()
    try:
        tracer.execute(tracer.info.code)
    finally:
        dec()
    saved = {name: value for name, value in variables.items() if value is not sent.get(name)}
    with io.BytesIO() as file:
        torch.save(saved, file, pickle_protocol=4)
        content = file.getvalue()
    return zstandard.ZstdCompressor().compress(content) if compress else content
