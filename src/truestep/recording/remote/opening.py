"""Which kind of server an address is of."""

from __future__ import annotations

from truestep.recording.remote.address import Address
from truestep.recording.remote.objects import Remote


def open_store(place: Address) -> Remote:
    """The store at an address; nothing is asked of it yet.

    Raises:
        MissingExtraError: The package that speaks to its servers is not installed.
    """
    if place.folder is not None:
        from truestep.recording.remote.folder import folder_store

        return folder_store(place)
    if place.scheme in ("http", "https"):
        from truestep.recording.remote.web import web_store

        return web_store(place)
    if place.scheme == "hf":
        from truestep.recording.remote.hub import hub_store

        return hub_store(place)
    from truestep.recording.remote.cloud import cloud_store

    return cloud_store(place)
