"""The section of a configuration that names an OpenAI-compatible server."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from moe_dist.config.schema import key
from moe_dist.errors import UserError


@dataclass
class ServerSection:
    url: str | None = key(None, "Base URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.")
    model: str | None = key(None, "Name under which the server knows the model.")
    concurrency: int = key(16, "Requests of a rank at the same time.", low=1)
    timeout: float = key(600.0, "Seconds to wait for an answer.", above=0)
    retries: int = key(6, "Further tries after a failure that may pass, with growing pauses.", low=0)

    def validate(self, place: str) -> None:
        """Check what bounds of single keys do not say. Raises UserError that names the key; never shows a password."""
        for name in ("url", "model"):
            if not getattr(self, name):
                raise UserError(f"{place}.{name} is not set: it is needed for a server")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"{place}.url: has to begin with http:// or https:// and a host, as http://127.0.0.1:8000/v1"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(f"{place}.url: no user, password or query in it; a key goes into the environment")
