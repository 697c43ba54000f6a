"""The token without which nobody can use a Ray that evalkit starts.

Ray's servers and workers listen on ports of the loopback interface, to which every user of the machine can connect.
With token authentication they refuse all requests that do not carry the token. By default Ray takes the token from
``~/.ray/auth_token``, which it makes readable for everyone, so evalkit makes one of its own for each local Ray.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator

from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

__all__ = ["own_token", "read_environment"]

_MODE = "RAY_AUTH_MODE"
_TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable
_SETTINGS = (_MODE, _TOKEN, "RAY_AUTH_TOKEN_PATH")


@contextlib.contextmanager
def own_token() -> Iterator[None]:
    """Give a random token to the Ray that is started within, unless the user has set how Ray authenticates.

    The processes of Ray inherit the token in their environment; this process remembers it until
    :func:`read_environment`. It is written nowhere else, and is not left in the environment of this process, which
    later connections to other clusters read.
    """
    before = {name: os.environ.get(name) for name in (_MODE, _TOKEN)}
    if not any(name in os.environ for name in _SETTINGS):
        os.environ[_MODE] = "token"
        os.environ[_TOKEN] = secrets.token_hex(32)
    read_environment()
    try:
        yield
    finally:
        for name, value in before.items():  # Ray itself sets the mode, too
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def read_environment() -> None:
    """Have Ray read from the environment how to authenticate; it does so only once, when it is imported."""
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")
