"""Whether the Hugging Face hub did not answer for a reason that passes by itself."""

from __future__ import annotations

import socket

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from search_r3_jax.errors import causes_of

# What the hub answers when it is asked too often, or is ill.
_PASSING = {429, 500, 502, 503, 504}


def unanswered(error: BaseException) -> str | None:
    """Why the hub did not answer, where that passes by itself; None for any other error.

    Libraries that ask the hub wrap its errors: what an error came from counts too.
    """
    for cause in causes_of(error):
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in _PASSING:
            return f"the hub is busy (status {cause.response.status_code}: {_one_line(error)})"
        # Asked for: it does not pass.
        if isinstance(cause, OfflineModeIsEnabled):
            return None
        if _is_of_network(cause):
            return (
                "no such folder, nor in the local Hugging Face cache, and the hub cannot be reached "
                f"({_one_line(error)}); check the network, or the name"
            )
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _is_of_network(error: BaseException) -> bool:
    """Whether a connection failed."""
    # Of httpx or of httpx2, by the release of huggingface_hub.
    named = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return named or isinstance(error, (ConnectionError, TimeoutError, socket.gaierror))
