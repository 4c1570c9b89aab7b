"""Object stores (S3, Google Cloud Storage, Azure Blob Storage) and files behind https, through obstore."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import IO, Any, NoReturn

from kdcache.core.errors import KdcacheError, StorageError, UsageError
from kdcache.core.plugins import require_extra
from kdcache.store.storage.base import Bytes, KeyExists, MissingKey, Storage, WrongSize

READ_ONLY_SCHEMES = ("https", "http")
# Requests in flight while a cache is read.
REQUESTS_IN_FLIGHT = 16
# Transient errors (5xx, dropped connections, timeouts) are retried with exponential backoff and jitter.
MAX_RETRIES, RETRY_TIMEOUT_S, FIRST_BACKOFF_S, LAST_BACKOFF_S = 10, 170, 0.1, 15.0
# A conditional put is not retried by obstore when its response is lost, so it is retried here.
CREATE_ATTEMPTS = 4
# Metadata key of every created object; its value is unique to one call of `create`.
_WRITER = "kdcachewriter"
# Options of the HTTP client; obstore takes all others as settings of the store.
_CLIENT_OPTIONS = frozenset(
    {
        *("allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "http1_only"),
        *("http2_only", "pool_idle_timeout", "pool_max_idle_per_host", "proxy_url", "proxy_ca_certificate"),
        *("proxy_excludes", "randomize_addresses", "read_timeout", "timeout", "user_agent"),
    }
)
_KEPT = "then run the same command again; what is committed is kept"
# What the server's answer contains, what was needed, and what to do; the first match counts.
_CAUSES = (
    (
        r"ExpiredToken|TokenRefreshRequired|RequestExpired|token (?:has|is) expired|invalid_grant",
        "credentials that have not expired",
        "renew the session token (AWS_SESSION_TOKEN and its keys)",
    ),
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|incorrectly configured region"
        r"|\b301\b",
        "the region of the bucket",
        "set AWS_REGION or give --storage-option region=NAME",
    ),
    (r"NoSuchBucket|ContainerNotFound|bucket does not exist", "a bucket that exists", "create it, or correct the URL"),
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|Unauthenticated|\b401\b|credential|metadata/",
        "valid credentials",
        "set those of the store in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give "
        "--storage-option skip_signature=true for a public bucket",
    ),
    (r"AccessDenied|PermissionDenied|\b403\b", "permission", "ask the bucket's owner for permission to read or write"),
    (r"PROPFIND", "a server that lists files", "read a packed cache (FILE.zip), which needs no listing"),
    (r"HTTP error", "a server that answers", "check the URL, the endpoint and the network"),
)

# The process that used an object store first; a forked process inherits it.
_io_processes: list[int] = []


def has_done_io() -> bool:
    """Whether this process, or the one that it was forked from, has used an object store."""
    return bool(_io_processes)


def _check_process() -> None:
    """Refuse to use an object store in a process that was forked after its parent used one: obstore would hang."""
    if not _io_processes:
        _io_processes.append(os.getpid())
    elif _io_processes[0] != os.getpid():
        raise StorageError(
            f"process {os.getpid()} was forked from process {_io_processes[0]} after that had used an object store",
            "a process that was started anew: the connections of an object store do not survive a fork",
            'give the DataLoader multiprocessing_context="forkserver"',
        )


class ObjectStorage(Storage):
    """Objects below a URL: `s3://bucket/prefix`, `gs://…`, `az://account/container/prefix`, or to read `https://…`.

    It connects at its first use, and goes to other processes by its URL and options.

    Args:
        options: Settings of the store and of the HTTP client, as obstore names them, such as `region` or
            `endpoint`, and `max_retries`. They are in no message, manifest or log. Credentials are best left to the
            environment variables of the store.
    """

    in_flight = REQUESTS_IN_FLIGHT

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self._options = dict(options or {})
        self._read_only = self.url.partition("://")[0] in READ_ONLY_SCHEMES
        self._obstore = require_extra("obstore", "cloud", self.url)
        self._connection: Any = None
        self._connecting = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self._options)

    def read(self, key: str) -> bytes:
        with self._errors("read", key):
            return bytes(self._obstore.get(self._store(), key).bytes())

    def read_range(self, key: str, start: int, *outs: memoryview, size: int) -> None:
        count = sum(out.nbytes for out in outs)
        with self._errors("read", key):
            answer = self._obstore.get(self._store(), key, options={"range": (start, start + count)})
            found = answer.meta["size"]
            data = memoryview(answer.bytes()) if found == size else memoryview(b"")
        if len(data) != count:
            raise WrongSize(f"has {found} bytes, the ledger says {size}")
        for out in outs:
            out.cast("B")[:] = data[: out.nbytes]
            data = data[out.nbytes :]

    def size(self, key: str) -> int:
        with self._errors("read", key):
            return int(self._obstore.head(self._store(), key)["size"])

    def write(self, key: str, data: Bytes) -> None:
        self._check_writable(key)
        with self._errors("write", key):
            self._obstore.put(self._store(), key, bytes(data))

    def create(self, key: str, data: Bytes) -> None:
        self._check_writable(key)
        token = uuid.uuid4().hex
        for attempt in range(1, CREATE_ATTEMPTS + 1):
            try:
                with self._errors("create", key):
                    self._obstore.put(
                        self._store(),
                        key,
                        bytes(data),
                        mode="create",
                        attributes={_WRITER: token},
                        use_multipart=False,
                    )
            except KeyExists:
                # The response to an earlier attempt of this call may have been lost.
                if self._writer_of(key) != token:
                    raise
            except StorageError as problem:
                if attempt == CREATE_ATTEMPTS or "HTTP error" not in str(problem.__cause__):
                    raise
                time.sleep(FIRST_BACKOFF_S * 2**attempt)
                continue
            return

    def _writer_of(self, key: str) -> str | None:
        with contextlib.suppress(MissingKey), self._errors("read", key):
            return dict(self._obstore.get(self._store(), key).attributes).get(_WRITER)
        return None

    def delete(self, key: str) -> None:
        self._check_writable(key)
        with contextlib.suppress(MissingKey), self._errors("delete", key):
            self._obstore.delete(self._store(), key)

    def objects(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        with self._errors("list", prefix):
            pages = list(self._obstore.list(self._store(), prefix or None, chunk_size=1000))
        yield from sorted((entry["path"], entry["size"]) for page in pages for entry in page)

    def folders(self) -> list[str]:
        if self._read_only:
            return [name for name in ("test", "train", "val") if self._has(f"{name}/zarr.json")]
        with self._errors("list", ""):
            found = self._obstore.list_with_delimiter(self._store())
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    def is_empty(self) -> bool:
        if self._read_only:
            return not self._has("zarr.json")
        with self._errors("list", ""):
            return not any(len(page) for page in self._obstore.list(self._store(), chunk_size=1))

    def _has(self, key: str) -> bool:
        try:
            return self.size(key) > 0
        except MissingKey:
            return False

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[IO[bytes]]:
        self._check_writable(key)
        with self._errors("write", key):
            upload = self._obstore.open_writer(self._store(), key)
            yield upload
            # Only this completes the upload; without it the store keeps the old object, or none.
            upload.close()

    def _check_writable(self, key: str) -> None:
        if self._read_only:
            raise StorageError(
                f"{self.place(key)} cannot be written: {self.url.partition('://')[0]} is only read",
                "a URL of s3, gs or az, or a path",
                "choose another --out",
            )

    def _store(self) -> Any:
        _check_process()
        with self._connecting:
            if self._connection is None:
                self._connection = self._connect()
        return self._connection

    def _connect(self) -> Any:
        options = dict(self._options)
        retries = int(options.pop("max_retries", MAX_RETRIES))
        # Plain http is used only where the URL or the endpoint that the user gave says so.
        client = {"timeout": "300s", "connect_timeout": "10s", "allow_http": "true"}
        client |= {name: str(options.pop(name)) for name in _CLIENT_OPTIONS & options.keys()}
        retry = {
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_BACKOFF_S),
                "max_backoff": timedelta(seconds=LAST_BACKOFF_S),
                "base": 2,
            },
        }
        arguments = {"client_options": client, "retry_config": retry}
        if options:
            arguments["config"] = {name: str(value) for name, value in options.items()}
        try:
            if self._read_only:
                return self._obstore.store.HTTPStore.from_url(self.url, **arguments)
            return self._obstore.store.from_url(self.url, **arguments)
        except Exception as problem:  # a key or a URL that obstore does not know, of one of many classes
            # The names of the options only: a value may be a secret.
            names = f" with the storage options {', '.join(sorted(self._options))}" if self._options else ""
            raise UsageError(
                f"{self.url}{names} cannot be opened: {type(problem).__name__}",
                "a URL as s3://bucket/name, gs://bucket/name or az://account/container/name, and options that obstore "
                "knows for it",
                "correct the URL or --storage-option",
            ) from problem

    @contextlib.contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        """Translate obstore's errors."""
        try:
            yield
        except KdcacheError:
            raise
        except FileNotFoundError as problem:
            if re.search("NoSuchBucket|ContainerNotFound", str(problem)):
                self._refuse(action, key, problem)
            raise MissingKey(key) from problem
        except self._obstore.exceptions.AlreadyExistsError as problem:
            raise KeyExists(key) from problem
        except self._obstore.exceptions.BaseError as problem:
            if re.search(r"InvalidRange|\b416\b", str(problem)):
                raise WrongSize("is shorter than the ledger says") from problem
            self._refuse(action, key, problem)

    def _refuse(self, action: str, key: str, problem: Exception) -> NoReturn:
        said = str(problem).partition("\n\nDebug source")[0]
        text = f"{type(problem).__name__} {said}"
        code, message = (re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
        said = " ".join(match[1] for match in (code, message) if match) or said.partition("\n")[0]
        needed, remedy = "a working connection to the store", "try again later"
        for pattern, needs, to_do in _CAUSES:
            if re.search(pattern, text):
                needed, remedy = needs, to_do
                break
        place = self.place(key) if key else self.url
        raise StorageError(f"could not {action} {place}: {said}", needed, f"{remedy}, {_KEPT}") from problem
