"""A bucket in memory: behind `gs://` for etils (through fsspec) and, over HTTP on loopback, for tensorstore's own client."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import sys
import threading
import types
import unittest.mock
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
from fsspec.registry import _registry


class Bucket(fsspec.AbstractFileSystem):
    """Objects by name ("bucket/folder/file"). As in a real one there are no folders, and nothing can be appended."""

    protocol = ("gs", "gcs")
    cachable = False
    objects: dict[str, tuple[bytes, int]] = {}
    requests: list[str] = []
    gate = threading.Event()  # uploads of arrays wait for it
    late: list[str] = []  # those that waited in vain

    @classmethod
    def put(cls, name: str, data: bytes) -> int:
        generation = cls.objects.get(name, (b"", 0))[1] + 1
        cls.objects[name] = (data, generation)
        return generation

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        names, found = list(self.objects), {}
        for name in names:
            if name == path:
                found[name] = {"name": name, "size": len(self.objects[name][0]), "type": "file"}
            elif name.startswith(path + "/"):
                first, slash, _ = name[len(path) + 1 :].partition("/")
                child = f"{path}/{first}"
                size = 0 if slash else len(self.objects[name][0])
                found[child] = {"name": child, "size": size, "type": "directory" if slash else "file"}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else sorted(found)

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        if path in self.objects:
            return {"name": path, "size": len(self.objects[path][0]), "type": "file"}
        self.ls(path)
        return {"name": path, "size": 0, "type": "directory"}

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def _rm(self, path):
        self.objects.pop(self._strip_protocol(path), None)

    def _open(self, path, mode="rb", **kwargs):
        path = self._strip_protocol(path)
        if mode == "rb":
            if path not in self.objects:
                raise FileNotFoundError(path)
            return io.BytesIO(self.objects[path][0])
        if mode != "wb":
            raise NotImplementedError(f"mode {mode!r}: objects cannot be changed")
        return _Upload(path)


class _Upload(io.BytesIO):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def close(self):
        if not self.closed:
            Bucket.put(self.name, self.getvalue())
        super().close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """What tensorstore asks for: media, conditional uploads, deletions and lists."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _name(self):
        url = urlsplit(self.path)
        Bucket.requests.append(f"{self.command} {url.path}")
        query = {key: value[0] for key, value in parse_qs(url.query).items()}
        bucket, _, name = re.match(r".*/b/([^/]+)/o(/(.*))?$", url.path).groups()
        return unquote(bucket), unquote(name or query.get("name", "")), query

    def _say(self, code, data=b"", **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        bucket, name, query = self._name()
        if not name:
            prefix = f"{bucket}/{query.get('prefix', '')}"
            items = [
                {"name": n.partition("/")[2], "size": str(len(d)), "generation": str(g)}
                for n, (d, g) in sorted(Bucket.objects.items())
                if n.startswith(prefix)
            ]
            return self._say(200, json.dumps({"items": items}).encode())
        if f"{bucket}/{name}" not in Bucket.objects:
            return self._say(404)
        data, generation = Bucket.objects[f"{bucket}/{name}"]
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._say(304)
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._say(200, data, x_goog_generation=str(generation))
        start, end = int(asked[1]), int(asked[2] or len(data) - 1)
        end = min(end, len(data) - 1)
        span = {"Content-Range": f"bytes {start}-{end}/{len(data)}", "x-goog-generation": str(generation)}
        self._say(206, data[start : end + 1], **span)

    def do_POST(self):
        bucket, name, query = self._name()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not Bucket.gate.wait(20):
            Bucket.late.append(name)
        current = Bucket.objects.get(f"{bucket}/{name}", (b"", 0))[1]
        if query.get("ifGenerationMatch", str(current)) != str(current):
            return self._say(412)
        self._say(200, json.dumps({"name": name, "generation": str(Bucket.put(f"{bucket}/{name}", data))}).encode())

    def do_DELETE(self):
        bucket, name, _ = self._name()
        self._say(204 if Bucket.objects.pop(f"{bucket}/{name}", None) else 404)


@contextlib.contextmanager
def serving():
    """`gs://` is the bucket in memory while the block runs."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    env = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
    Bucket.gate.set()
    # What orbax asks of Google's client: whether the bucket has folders of its own.
    client = types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace(hierarchical_namespace_enabled=False))
    google = types.ModuleType("google.cloud")
    google.storage = types.SimpleNamespace(Client=lambda: client)
    try:
        with unittest.mock.patch.dict(os.environ, env), unittest.mock.patch.dict(sys.modules, {"google.cloud": google}):
            yield Bucket
    finally:
        for name in Bucket.protocol:
            _registry.pop(name, None)
        Bucket.objects.clear()
        Bucket.requests.clear()
        Bucket.late.clear()
        server.shutdown()
        server.server_close()
