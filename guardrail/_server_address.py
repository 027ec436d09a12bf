"""The address that `guardrail serve` listens on."""

from __future__ import annotations

import socket

from guardrail._server_config import ConfigError

__all__ = ["check_address", "resolve"]


def resolve(host: str, port: int) -> socket.AddressFamily:
    """The family of the address to listen on. Raises ConfigError where there is none."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise _no_address(host, port, error) from None


def check_address(host: str, port: int) -> None:
    """Raises ConfigError where the address cannot be listened on now."""
    family = resolve(host, port)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
    except OSError as error:
        raise _no_address(host, port, error) from None


def _no_address(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {host}:{port}: {error.strerror or error}: choose another with --host "
        "and --port"
    )
