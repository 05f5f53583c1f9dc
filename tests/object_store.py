"""A real S3 server in this process (moto), with a layer in front of it that goes wrong on demand.

The layer speaks HTTP: what a test injects reaches the client as it would from a store on the
network.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import pytest

pytest.importorskip("moto.server", reason="moto[server] is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed (effx-dist[s3])")

import boto3
import fsspec
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET, SHADOW = "bucket", "shadow"
READ_TIMEOUT_S = 3.0
"""The client's patience with a request; no test waits for it but those of a store that hangs."""

Environment = dict[str, Any]
Answer = Callable[["Store", Environment, Any], Iterable[bytes]]
"""What the layer does with a request instead of handing it on."""


@dataclass(frozen=True)
class Request:
    """One request as the server saw it. ``key``: the object's, or "" for a bucket's."""

    method: str
    key: str
    query: dict[str, list[str]]

    @property
    def is_upload(self) -> bool:
        """Whether it makes an object appear: a PUT of it, or the end of an upload in parts."""
        whole = self.method == "PUT" and "partNumber" not in self.query
        return bool(self.key) and (whole or (self.method == "POST" and "uploadId" in self.query))


@dataclass
class Fault:
    """Answers requests that it applies to, so many times (None: for ever)."""

    applies: Callable[[Request], bool]
    answer: Answer
    times: int | None = None
    num_hits: int = 0


@dataclass
class Store:
    """The server: what it was asked, and what it shall do wrong."""

    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    has_stale_listings: bool = False
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    endpoint: str = ""
    app: Any = None

    def __call__(self, environ: Environment, start_response: Any) -> Iterable[bytes]:
        bucket, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
        query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        request = Request(environ["REQUEST_METHOD"], key, query)
        if bucket == BUCKET and "x-shadow" not in environ:
            with self.lock:
                self.requests.append(request)
                fault = self._fault_of(request)
            if fault is not None:
                return fault.answer(self, environ, start_response)
            if self.has_stale_listings and request.method == "GET" and "list-type" in query:
                environ["PATH_INFO"] = environ["RAW_URI"] = f"/{SHADOW}"
                environ["REQUEST_URI"] = f"/{SHADOW}?{environ['QUERY_STRING']}"
        return self.pass_on(environ, start_response)

    def _fault_of(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.applies(request) and fault.num_hits != fault.times:
                fault.num_hits += 1
                return fault
        return None

    def pass_on(self, environ: Environment, start_response: Any) -> Iterable[bytes]:
        """The store's own answer."""
        body: Iterable[bytes] = self.app(environ, start_response)
        return body

    def fail(
        self, applies: Callable[[Request], bool], answer: Answer, times: int | None = None
    ) -> Fault:
        """Begin to go wrong."""
        self.faults.append(Fault(applies, answer, times))
        return self.faults[-1]

    def heal(self) -> None:
        """Work again; requests that hang are let go."""
        self.faults.clear()
        self.has_stale_listings = False
        self.released.set()

    def client(self) -> Any:
        """A plain client of the server, to see what it holds."""
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")

    def keys(self, prefix: str = "", bucket: str = BUCKET) -> list[str]:
        """Keys of all objects that begin so."""
        pages = self.client().get_paginator("list_objects_v2").paginate
        found = [c["Key"] for p in pages(Bucket=bucket) for c in p.get("Contents", [])]
        return [key for key in found if key.startswith(prefix)]

    def unfinished_uploads(self, prefix: str = "") -> list[str]:
        """Keys of uploads in parts that were neither completed nor aborted."""
        uploads = self.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return [upload["Key"] for upload in uploads if upload["Key"].startswith(prefix)]

    def make_listings_stale(self) -> None:
        """From now on listings show what is there at this moment; objects and their sizes are
        current."""
        client = self.client()
        for key in self.keys(bucket=SHADOW):
            client.delete_object(Bucket=SHADOW, Key=key)
        for key in self.keys():
            client.copy_object(Bucket=SHADOW, Key=key, CopySource=f"{BUCKET}/{key}")
        self.has_stale_listings = True

    def uploads(self, since: int = 0) -> list[str]:
        """Keys of the objects that appeared, in order."""
        return [request.key for request in self.requests[since:] if request.is_upload]


# What a store may do wrong


def status(code: int, name: str) -> Answer:
    """Refuse with an S3 error."""

    def answer(store: Store, environ: Environment, start_response: Any) -> Iterable[bytes]:
        _body_of(environ)
        start_response(f"{code} {name}", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{name}</Code><Message>injected</Message></Error>".encode()]

    return answer


def hang(store: Store, environ: Environment, start_response: Any) -> Iterable[bytes]:
    """Say nothing until the client has given up and the store is healed."""
    store.released.wait(60)
    return reset(store, environ, start_response)


def reset(store: Store, environ: Environment, start_response: Any) -> Iterable[bytes]:
    """Close the connection in mid-request."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError("injected")


def cut_off(store: Store, environ: Environment, start_response: Any) -> Iterable[bytes]:
    """Store half of what was sent, and say that all is well."""
    body = _body_of(environ)
    kept = body[: len(body) // 2]
    environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(kept), str(len(kept))
    for name in [name for name in environ if "CHECKSUM" in name or "CONTENT_MD5" in name]:
        del environ[name]
    return store.pass_on(environ, start_response)


def lose_the_answer(store: Store, environ: Environment, start_response: Any) -> Iterable[bytes]:
    """Do what was asked, and hang up instead of saying so."""
    b"".join(store.pass_on(environ, lambda *_: None))
    return reset(store, environ, start_response)


def _body_of(environ: Environment) -> bytes:
    body: bytes = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    return body


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer goes out at once, not 40 ms later

    def log(self, *_: object) -> None:
        """Requests are recorded by the store."""


@contextlib.contextmanager
def serving() -> Iterator[Store]:
    """A server with one empty bucket, and an environment in which ``s3://`` means it, also to child
    processes."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = Store(app=DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Quiet)
    store.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    patience = {"read_timeout": READ_TIMEOUT_S, "retries": {"max_attempts": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        patch.setenv("FSSPEC_S3", json.dumps({"config_kwargs": patience}))
        patch.setitem(fsspec.config.conf, "s3", {"config_kwargs": patience})
        patch.setattr(s3fs.S3FileSystem, "retries", 2)
        s3fs.S3FileSystem.clear_instance_cache()
        for bucket in (BUCKET, SHADOW):
            store.client().create_bucket(Bucket=bucket)
        try:
            yield store
        finally:
            store.heal()
            s3fs.S3FileSystem.clear_instance_cache()
            server.shutdown()
            thread.join()
            server.server_close()
