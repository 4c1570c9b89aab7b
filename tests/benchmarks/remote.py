"""Reading a cache from an S3 server on this machine against local files: rows per second, requests, bytes moved.

rows     of a view per second, whole epochs, streamed and from memory, timed in turn
requests range reads per epoch, and their bytes over those of the stored rows
kills    dumps killed at random instants, each continued to the store of an uninterrupted one
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

ROWS, CLASSES, KILLS = 65_536, 1000, 20
BUCKET = "benchmark"


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server with one bucket, its address and credentials in the environment; the bucket's URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert server.poll() is None, "the S3 server ended"
            try:
                urllib.request.urlopen(f"{address}/moto-api/", timeout=10).close()
                break
            except OSError:
                time.sleep(0.1)
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=10).close()
        os.environ |= {
            "AWS_ENDPOINT_URL": address,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
        yield f"s3://{BUCKET}"
    finally:
        server.kill()
        server.wait()
