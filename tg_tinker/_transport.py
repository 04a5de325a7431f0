"""The wire's shell: one channel, retries that repeat one request byte for byte, errors decoded.

Every call is a ``concurrent.futures.Future`` driven by callbacks of the channel; waiting holds no thread.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
import uuid
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import grpc
from google.protobuf.message import Message

from tg_tinker._alarm import Alarm
from tg_tinker._endpoint import TlsFiles, parse_base_url
from tg_tinker._pressure import Pressure
from tg_tinker.errors import (
    AuthenticationError,
    InvalidRequestError,
    RateLimitedError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.types import ServiceConfig
from tg_tinker.wire.methods import Method, method_of
from tg_tinker.wire.status import BROKEN, failure_of, is_unreachable

MAX_MESSAGE_BYTES = 64 * 2**20
HOW_TO_GET_A_KEY = (
    "create one on the server with `tg-tinker keys create`, then set TG_TINKER_API_KEY or pass "
    "ServiceClient(api_key=...)"
)
_log = logging.getLogger("tg_tinker")
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),  # ours repeat the same sequence number and know the server's hints
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How patiently a call is repeated.

    Attributes:
        patience_s: how long a server that was reached before may be unreachable.
        retry_count: repeats when the server was never reached, is broken, or says "too many requests".
        first_s, longest_s: bounds of the exponential backoff between repeats, before jitter.
        attempt_s: how long one attempt may take.
    """

    patience_s: float = 300.0
    retry_count: int = 3
    first_s: float = 0.1
    longest_s: float = 2.0
    attempt_s: float = 60.0

    def delay_s(self, repeats: int) -> float:
        """The wait before repeat number ``repeats``, from 0."""
        delay: float = min(self.longest_s, self.first_s * 2.0 ** min(repeats, 30))
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, protects nothing

    def with_attempt(self, attempt_s: float) -> RetryPolicy:
        """The same patience with another length of one attempt."""
        return replace(self, attempt_s=attempt_s)


class Call(Future[Any]):
    """One request under way; its result is the reply message, its exception a TGTinkerError."""

    def __init__(
        self, transport: Transport, method: Method, payload: bytes, policy: RetryPolicy, back_pressure: bool
    ):
        super().__init__()
        self.set_running_or_notify_cancel()  # cancelling an await of it must not cancel the call
        self._transport = transport
        self._method = method
        self._payload = payload
        self._policy = policy
        self._back_pressure = back_pressure
        self._request_id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._withdrawn = False
        self._given_up = False
        self._under_way = False
        self._lost_an_answer = False
        self._unreachable_since: float | None = None
        self._unreachable = 0
        self._broken = 0
        self._refusals = 0

    def attempt(self) -> None:
        """Send the request once; the answer decides what follows."""
        with self._lock:
            if self._given_up:
                return
            self._under_way = True
        try:
            rpc = self._transport.start(self._method, self._payload, self._policy.attempt_s, self._request_id)
        except TGTinkerError as e:
            self.set_exception(e)
            return
        except Exception as e:  # noqa: BLE001 - grpc refused to start the call; whoever waits must learn of it
            self.set_exception(ServerError(f"the call could not be started: {e}"))
            return
        rpc.add_done_callback(self._answered)

    def withdraw(self) -> None:
        """Give the call up as soon as the server certainly has nothing of it; it then ends as withdrawn.

        An attempt under way is awaited first. If the server took the call, it goes on as if nothing was said.
        """
        with self._lock:
            self._withdrawn = True
            give_up = not (self._under_way or self._lost_an_answer or self._given_up)
            self._given_up = self._given_up or give_up
        if give_up:
            self.set_exception(withdrawn())

    def _answered(self, rpc: Any) -> None:
        try:
            if rpc.code() is grpc.StatusCode.OK:
                self._transport.reached = True
                self.set_result(rpc.result())
            else:
                self._failed(*failure_of(rpc, self._request_id))
        except Exception as e:  # noqa: BLE001 - whoever waits must learn of it; logged
            if not self.done():
                self.set_exception(ServerError(f"the answer could not be read: {type(e).__name__}"))
            _log.exception("an answer to tg_tinker could not be handled")

    def _failed(self, code: grpc.StatusCode, error: TGTinkerError, ours: bool) -> None:
        if self._transport.closed:
            self.set_exception(closed_error())
            return
        self._transport.reached = self._transport.reached or ours
        policy = self._policy
        with self._lock:
            self._under_way = False
            self._lost_an_answer = self._lost_an_answer or is_unreachable(code, ours)
            limited = isinstance(error, RateLimitedError)
            give_up = self._withdrawn and limited and not self._lost_an_answer
            self._given_up = self._given_up or give_up
        if isinstance(error, RateLimitedError):
            self._transport.pressure.heard(error)
            self._unreachable, self._unreachable_since = 0, None
            self._refusals += 1
            if give_up:
                self.set_exception(withdrawn())
                return
            if self._back_pressure or self._refusals <= policy.retry_count:
                self._transport.alarm.after(max(error.retry_after, policy.first_s), self.attempt)
                return
        elif self._may_repeat(code, ours):
            patience = -1 if self._transport.reached else 1  # a server that starts with us needs a moment
            self._transport.alarm.after(policy.delay_s(self._unreachable + patience), self.attempt)
            return
        elif is_unreachable(code, ours):
            error = self._transport.unreachable_error(error, self._unreachable_since)
        self.set_exception(error)

    def _may_repeat(self, code: grpc.StatusCode, ours: bool) -> bool:
        if not is_unreachable(code, ours):
            return False
        now = time.monotonic()
        self._unreachable += 1
        self._broken += code in BROKEN
        if self._unreachable_since is None:
            self._unreachable_since = now
        if self._policy.retry_count == 0 or self._broken > self._policy.retry_count:
            return False
        if not self._transport.reached:
            return self._unreachable <= self._policy.retry_count
        return now - self._unreachable_since < self._policy.patience_s


class Transport:
    """A channel to one server, shared by threads."""

    def __init__(self, config: ServiceConfig, *, tls: TlsFiles | None = None, policy: RetryPolicy | None = None):
        self.config = config
        self.policy = policy or RetryPolicy(patience_s=config.timeout, retry_count=config.retry_count)
        self.alarm = Alarm()
        self.pressure = Pressure()
        self.closed = False
        self.reached = False
        endpoint = parse_base_url(config.base_url)
        self._target = endpoint.target
        options = [*_OPTIONS, ("grpc.enable_http_proxy", 0)] if endpoint.loopback else list(_OPTIONS)
        if endpoint.tls:
            files = tls or TlsFiles()
            credentials = grpc.ssl_channel_credentials(files.ca, files.key, files.cert)
            self._channel = grpc.secure_channel(endpoint.target, credentials, options)
        else:
            self._channel = grpc.insecure_channel(endpoint.target, options)
        self._stubs: dict[str, Any] = {}

    def send(
        self,
        request: Message | tuple[Method, bytes],
        *,
        policy: RetryPolicy | None = None,
        back_pressure: bool = False,
    ) -> Call:
        """Start a unary call. ``back_pressure``: wait for as long as the server says its queue is full."""
        method, payload = request if isinstance(request, tuple) else encode(request)
        call = Call(self, method, payload, policy or self.policy, back_pressure)
        call.attempt()
        return call

    def call(self, request: Message, *, attempt_s: float | None = None) -> Any:
        """Make a unary call and wait for its reply.

        Raises:
            TGTinkerError: what the server said, or that it cannot be reached.
        """
        policy = None if attempt_s is None else self.policy.with_attempt(attempt_s)
        return self.send(request, policy=policy).result()

    def stream(self, request: Message, *, attempt_s: float | None = None) -> Generator[Any]:
        """The replies of a server-streaming call. Closing the iterator cancels the call.

        A server that cannot be reached is asked again until the first reply has come.
        """
        method, payload = encode(request)
        request_id = uuid.uuid4().hex
        since, repeats, begun = None, 0, False
        while True:
            rpc = self.start(method, payload, attempt_s, request_id)
            try:
                for reply in rpc:
                    begun = self.reached = True
                    yield reply
                return
            except grpc.RpcError as e:
                code, error, ours = failure_of(e, request_id)
                if self.closed:
                    raise closed_error() from None
                if not is_unreachable(code, ours):
                    if isinstance(error, RateLimitedError):
                        self.pressure.heard(error)
                    raise error from None
                since = since or time.monotonic()
                limit = self.policy.retry_count if not self.reached or code in BROKEN else 10**9
                patient = self.policy.retry_count and time.monotonic() - since < self.policy.patience_s
                if begun or repeats >= limit or not patient:
                    raise self.unreachable_error(error, since) from None
            finally:
                rpc.cancel()
            time.sleep(self.policy.delay_s(repeats))
            repeats += 1

    def upload(self, requests: Iterable[Message]) -> Any:
        """Make a client-streaming call and wait for its reply. It is sent once: nothing holds what was sent.

        Raises:
            TGTinkerError: what the server said, or that it cannot be reached; or what ``requests`` raised.
        """
        source = iter(requests)
        first = next(source)
        method, request_id = method_of(type(first)), uuid.uuid4().hex
        failure: list[Exception] = []

        def payloads() -> Iterator[bytes]:
            try:
                for request in itertools.chain((first,), source):
                    yield request.SerializeToString()
            except Exception as e:
                failure.append(e)  # grpc reads this on a thread of its own, and tells the caller nothing
                raise

        rpc = self.start(method, payloads(), None, request_id)
        try:
            reply = rpc.result()
        except grpc.RpcError as e:
            code, error, ours = failure_of(e, request_id)
            if failure:
                raise failure[0] from None
            if self.closed:
                raise closed_error() from None
            raise (self.unreachable_error(error, None) if is_unreachable(code, ours) else error) from None
        self.reached = True
        return reply

    def start(
        self, method: Method, payload: bytes | Iterator[bytes], attempt_s: float | None, request_id: str
    ) -> Any:
        """Send one attempt.

        Raises:
            AuthenticationError: there is no key to send.
            InvalidRequestError: the client is closed.
        """
        key = self.config.api_key
        if not key or not (key.isascii() and key.isprintable()):
            what = "the API key holds characters no key has" if key else "no API key was given"
            raise AuthenticationError(f"{what}; {HOW_TO_GET_A_KEY}")
        metadata = [
            ("authorization", f"Bearer {key}"),
            ("x-request-id", request_id),
            ("x-client-version", version("tg-tinker")),
        ]
        if self.config.tenant_id:
            metadata.append(("x-tenant-id", self.config.tenant_id))
        stub = self._stubs.get(method.path)
        if stub is None:
            make: Any = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
            make = self._channel.stream_unary if method.client_streaming else make
            stub = make(method.path, None, method.reply.FromString)
            self._stubs[method.path] = stub
        try:
            if method.server_streaming:
                return stub(payload, timeout=attempt_s, metadata=tuple(metadata))
            return stub.future(payload, timeout=attempt_s, metadata=tuple(metadata))
        except ValueError as e:  # grpc's word for a closed channel
            if self.closed:
                raise closed_error() from e
            raise

    def unreachable_error(self, error: TGTinkerError, since: float | None) -> ServerError:
        """What to tell a person when patience is over."""
        waited = time.monotonic() - since if since is not None else 0.0
        scheme = "TLS" if self.config.tls else "plaintext"
        return ServerError(
            f"cannot reach a TG-Tinker server at {self._target} ({scheme}) after {waited:.0f} s: {error.message}. "
            "Start one with `tg-tinker serve`, or correct the address: base_url, else TG_TINKER_BASE_URL; of a "
            "federated party, `server` in its TOML file",
            details={"retry": True, "target": self._target},
            request_id=error.request_id,
        )

    def close(self) -> None:
        """End every call and the channel. Calls after that are refused."""
        self.closed = True
        self._channel.close()
        self.alarm.close()


def encode(request: Message) -> tuple[Method, bytes]:
    """A request's method and bytes; sending the same bytes again is what makes a retry recognisable."""
    return method_of(type(request)), request.SerializeToString()


def withdrawn() -> ServerError:
    """How a call ends that was given up before the server had it."""
    return ServerError("withdrawn before the server took it", details={"withdrawn": True})


def closed_error() -> InvalidRequestError:
    """What a closed client answers."""
    return InvalidRequestError("this client is closed; create a new ServiceClient", field="client", constraint="open")
