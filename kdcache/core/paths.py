"""Paths as users write them: `~` is their home, and what is no path on this machine is named for what it is."""

from __future__ import annotations

import os
import re

from kdcache.core.errors import UsageError

NAME_BYTES, PATH_BYTES = 255, 4095
# Object stores of caches, and servers that they are read from.
REMOTE_SCHEMES = ("s3", "gs", "az", "https", "http")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# Specs with the path of a folder behind a kind, as `folder:~/pets`.
_SPEC_WITH_HOME = re.compile(r"([a-z:-]+:)(~.*)", re.DOTALL)


def local_path(text: str, what: str) -> str:
    """A path on this machine, with `~` expanded.

    Args:
        what: Name of the option for messages, such as `--out`.

    Raises:
        UsageError: it is a URL, a home that is not known, or has a name too long for a file.
    """
    if _URL.match(text):
        raise UsageError(
            f"{what} is {text}, a URL",
            "a path on this machine; caches may also be at s3://, gs:// or az://, and be read from https://",
            "copy it here first",
        )
    path = os.path.expanduser(text) if text.startswith("~") else text
    if path.startswith("~"):
        raise UsageError(
            f"{what} is {text}", "a home that this machine knows", f"for a file of this name give ./{text}"
        )
    if "\0" in path:
        raise UsageError(f"{what} is {path!r}", "a path without NUL")
    sizes = [len(os.fsencode(name)) for name in path.split(os.sep)]
    if max(sizes) > NAME_BYTES or len(os.fsencode(path)) > PATH_BYTES:
        raise UsageError(
            f"{what} has a name of {max(sizes)} bytes in a path of {len(os.fsencode(path))}",
            f"names of at most {NAME_BYTES} bytes, and a path of at most {PATH_BYTES}",
            "choose a shorter one",
        )
    return path


def cache_location(text: str, what: str) -> str:
    """The URL of a cache, as it is, or a path on this machine with `~` expanded.

    Raises:
        UsageError: it is neither.
    """
    scheme, separator, _ = text.partition("://")
    return text if separator and scheme in REMOTE_SCHEMES else local_path(text, what)


def local_spec(text: str, what: str) -> str:
    """A dataset's or a model's spec, with `~` expanded where it holds a path: `folder:~/pets`."""
    match = _SPEC_WITH_HOME.fullmatch(text)
    return match[1] + local_path(match[2], what) if match else text
