"""What went wrong when a model was fetched from the hub, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from graftwork.errors import UserError, first_line
from graftwork.files import safetensors_header

_UNREACHED = ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError", "gaierror")
_NETWORK = ("httpx", "httpcore", "requests", "urllib3")
"""Libraries whose errors are those of a connection; a version's number may follow their name."""
_INCOMPLETE = "Consistency check failed"


def not_fetched(ref: str, error: BaseException) -> UserError | None:
    """Return in one sentence why the model ``ref`` could not be fetched; None where it is about something else."""
    from huggingface_hub import constants

    errors = list(_chain(error))
    names = {type(one).__name__ for one in errors}
    hub = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE and names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return UserError(
            f"model '{ref}' is not in the cache, and HF_HUB_OFFLINE keeps from the network; unset it to fetch the "
            f"model from {hub}"
        )
    if names & set(_UNREACHED):
        return UserError(
            f"model '{ref}' is not in the cache, and {hub} cannot be reached; look at the network, or name a folder "
            f"(with HF_HUB_OFFLINE=1 only the cache is asked, without waiting)"
        )
    for one in errors:
        library = type(one).__module__.partition(".")[0].rstrip("0123456789")
        if library in _NETWORK or _INCOMPLETE in str(one):
            return UserError(
                f"model '{ref}' has not come whole from {hub} ({first_line(one)}), and nothing of it is used; try again"
            )
    return None


def damaged_in_cache(ref: str) -> Path | None:
    """Return a weight file of the hub's model ``ref`` that came damaged; None where there is none.

    The hub's client believes the size that it is told, and keeps what it has.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(ref, "config.json")
    except HFValidationError:
        return None
    for path in sorted(Path(config).parent.glob("*.safetensors")) if isinstance(config, str) else []:
        try:
            safetensors_header(path)
        except UserError:
            return path.resolve()
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
