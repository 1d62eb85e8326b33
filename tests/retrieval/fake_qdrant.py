"""A server for Qdrant's client that answers by the embedded engine, and records the requests."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

from qdrant_client import QdrantClient, models


@contextmanager
def serve():
    """Yield the server's URL, and a list that grows: ("PUT /collections/x", body as a dict, bytes of it) for each request."""
    engine = QdrantClient(":memory:", force_disable_check_same_thread=True)
    requests, lock = [], Lock()

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            path = self.path.partition("?")[0]
            with lock:
                requests.append((f"{self.command} {path}", body, length))
                result = respond(engine, self.command, path.split("/")[2:], body)
            text = dump(result)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def respond(engine: QdrantClient, method: str, path: list[str], body: dict):
    name, *resource = path
    match method, resource:
        case "GET", ["exists"]:
            return {"exists": engine.collection_exists(name)}
        case "GET", []:
            return engine.get_collection(name)
        case "PUT", []:
            request = models.CreateCollection(**body)
            return engine.create_collection(name, request.vectors, metadata=request.metadata)
        case "PUT", ["points"]:
            return engine.upsert(name, models.PointsList(**body).points)
        case "POST", ["points"]:
            request = models.PointRequest(**body)
            return engine.retrieve(name, request.ids, with_payload=request.with_payload)
        case "POST", ["points", "scroll"]:
            request = models.ScrollRequest(**body)
            points, start = engine.scroll(name, limit=request.limit, offset=request.offset, with_payload=request.with_payload)
            return {"points": [point.model_dump(mode="json") for point in points], "next_page_offset": start}
        case "POST", ["points", "delete"]:
            return engine.delete(name, models.PointIdsList(**body).points)
        case "POST", ["points", "count"]:
            return engine.count(name)
        case "POST", ["points", "query", "batch"]:
            return engine.query_batch_points(name, models.QueryRequestBatch(**body).searches)
    raise ValueError(f"{method} {path}")


def dump(result) -> bytes:
    def plain(value):
        return value.model_dump(mode="json") if hasattr(value, "model_dump") else value

    result = [plain(value) for value in result] if isinstance(result, list) else plain(result)
    return json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
