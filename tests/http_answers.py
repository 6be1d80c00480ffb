"""Answers of the stand-ins for servers."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler


def send(handler: BaseHTTPRequestHandler, body: object, status: int = 200, **headers: str) -> None:
    """Sends bytes or text as they are, and anything else as JSON."""
    data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)
