"""URLs under which files of a checkpoint are fetched without a key: sealed by this server, for one file and hour."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from starlette.concurrency import iterate_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.gateway import names
from tg_tinker_server.gateway.doors import PREFIX, Handler
from tg_tinker_server.gateway.paths import checkpoint_path
from tg_tinker_server.gateway.requests import HttpCall
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoints import CheckpointService
from tg_tinker_server.service.durability import now
from tg_tinker_server.service.weight_files import WeightFiles

VALID_S = 3600
PURPOSE = "tinker-url"
_CONTEXT = b"external"


@dataclass(frozen=True, slots=True)
class ExternalDoors:
    """Signed URLs and what lies behind them.

    Attributes:
        server: the tenant whose key seals URLs: the server's own.
    """

    server: str
    keyring: TenantKeyring
    checkpoints: CheckpointService
    files: WeightFiles

    def handlers(self) -> Mapping[str, Handler]:
        """By route."""
        prefix = "GET training_runs/{model}/checkpoints/{kind}/{name}/"
        return {
            prefix + "external_weights_urls": self.urls,
            prefix + "archive": self.no_archive,
            "GET external/{token}/{file}": self.fetch,
        }

    async def urls(self, call: HttpCall) -> Response:
        """One URL for each file of an external checkpoint."""
        if call.part("kind") != "external_weights":
            raise InvalidRequestError(
                "only weights that were saved with save_weights_external are handed out",
                field="kind",
                constraint="external_weights",
            )
        path = checkpoint_path(call.part("model"), call.part("kind"), call.part("name"))
        row = await self.checkpoints.row(call.caller, path)
        expires = now() + timedelta(seconds=VALID_S)
        found = await self.files.names(row)
        await self.files.note(call.caller.key_id, row)
        base = str(call.request.base_url).rstrip("/") + PREFIX
        urls = {n: f"{base}external/{self._seal(row.tenant, row.artifact_id, n, expires)}/{n}" for n in found}
        return JSONResponse({"urls": urls, "expires": expires.isoformat()})

    async def fetch(self, call: HttpCall) -> Response:
        """A file. One answer for everything that is wrong with a URL."""
        tenant, artifact_id, file = self._unseal(call.part("token"))
        if file != call.part("file"):
            raise names.not_found("file", "")
        row = await self.checkpoints.row(Caller(tenant=tenant, key_id="", scopes=frozenset()), artifact_id)
        pieces = await self.files.open(row, file)
        return StreamingResponse(iterate_in_threadpool(pieces), media_type="application/octet-stream")

    async def no_archive(self, _call: HttpCall) -> Response:
        """Clients before 0.30 ask for this."""
        raise InvalidRequestError(
            "archives are not made here; save with save_weights_external, or update the client",
            field="archive",
            constraint="save_weights_external",
        )

    def _seal(self, tenant: str, artifact_id: str, file: str, expires: datetime) -> str:
        plain = json.dumps([tenant, artifact_id, file, expires.timestamp()]).encode()
        sealed = self.keyring.seal_value(self.server, PURPOSE, plain, _CONTEXT)
        return base64.urlsafe_b64encode(sealed).decode().rstrip("=")

    def _unseal(self, token: str) -> tuple[str, str, str]:
        try:
            sealed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
            plain = self.keyring.open_value(self.server, PURPOSE, sealed, _CONTEXT)
        except (ServerError, ValueError, binascii.Error):
            raise names.not_found("file", "") from None
        tenant, artifact_id, file, expires = json.loads(plain)
        if datetime.fromtimestamp(float(expires), UTC) < now():
            raise names.not_found("file", "")
        return str(tenant), str(artifact_id), str(file)
