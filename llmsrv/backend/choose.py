"""Chooses what computes."""

from llmsrv.backend.base import Backend
from llmsrv.backend.reference import ReferenceBackend
from llmsrv.errors import StartupError


def choose_backend(name: str) -> tuple[Backend, str]:
    """The backend of that name, or for "auto" the fastest that runs here, and why, in a clause."""
    if name == "auto":
        return ReferenceBackend(), "the only one in this build"
    if name == "reference":
        return ReferenceBackend(), "asked for"
    raise StartupError(f"there is no backend '{name}'; choose auto or reference")
