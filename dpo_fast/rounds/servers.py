"""A first look at the servers that stages will ask: one that is down is told before hours of work."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from dpo_fast.rounds.config import RoundsConfig

SECONDS = 3.0
PORTS = {"http": 80, "https": 443}


def unreached(config: RoundsConfig) -> list[str]:
    """Of the servers that samples and scores come from those that do not answer now, in words."""
    urls = {}
    if config.sample.engine.type == "openai":
        urls["sample.engine.url"] = config.sample.engine.url
    if config.judge is not None and config.judge.type == "openai":
        urls["judge.url"] = config.judge.url
    found = []
    for option, url in urls.items():
        if reason := _refuses(url):
            found.append(f"{option}={url} cannot be reached now ({reason})")
    return found


def _refuses(url: str) -> str | None:
    """Why nobody listens at an address; None if somebody does."""
    try:
        parts = urlsplit(url)
        port = parts.port or PORTS.get(parts.scheme, 80)
        socket.create_connection((parts.hostname, port), SECONDS).close()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None
