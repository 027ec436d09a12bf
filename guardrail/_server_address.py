"""The address that `guardrail serve` listens on."""

from __future__ import annotations

import socket

from guardrail._server_config import Settings
from guardrail._server_source import ConfigError

__all__ = ["check_address", "resolve"]


def resolve(settings: Settings) -> socket.AddressFamily:
    """The family of the address to listen on. Raises ConfigError where there is none."""
    try:
        return socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:  # the latter for a..b
        raise settings.error(("host",), _no_address(settings, error)) from None


def check_address(settings: Settings) -> None:
    """Raises ConfigError where the address cannot be listened on now."""
    family = resolve(settings)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((settings.host, settings.port))
    except OSError as error:
        raise ConfigError(_no_address(settings, error)) from None


def _no_address(settings: Settings, error: OSError | UnicodeError) -> str:
    reason = (error.strerror if isinstance(error, OSError) else "no name of a host") or error
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return (
        f"cannot listen on {host}:{settings.port}: {reason}: choose another with --host and --port"
    )
