"""Points in time on the wire: aware, UTC, microseconds."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from tg_tinker.errors import InvalidRequestError


def time_to_proto(moment: datetime) -> Timestamp:
    """Raises:
    InvalidRequestError: a naive datetime, which says no point in time.
    """
    if moment.tzinfo is None:
        raise InvalidRequestError(
            "the time has no timezone; use datetime.now(timezone.utc) or add tzinfo",
            field="time",
            constraint="timezone-aware",
        )
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def time_from_proto(stamp: Timestamp) -> datetime:
    """An aware datetime in UTC."""
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as e:
        raise InvalidRequestError("impossible time", field="time", constraint="years 1 to 9999") from e
