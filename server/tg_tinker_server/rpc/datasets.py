"""DatasetService: uploads, datasets, erasure, budgets."""

from __future__ import annotations

from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import datasets_pb2
from tg_tinker.wire.datasets import (
    budget_to_proto,
    dataset_to_proto,
    new_dataset_from_proto,
    split_record_ids,
)
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.service.datasets import DatasetService
from tg_tinker_server.service.executors import Executors

MAX_LISTED = 1000
MAX_REQUEST_ID = 128


@dataclass(frozen=True, slots=True)
class DatasetServicer:
    """create, append, seal, get, list, record ids, erase, delete, raise."""

    datasets: DatasetService
    executors: Executors

    async def CreateDataset(  # noqa: N802
        self, call: Call, request: datasets_pb2.CreateDatasetRequest
    ) -> datasets_pb2.CreateDatasetReply:
        """Begin an upload."""
        self.datasets.refuse_policy(call.caller)
        new = new_dataset_from_proto(request)
        return datasets_pb2.CreateDatasetReply(
            received=await self.executors.io(self.datasets.begin, call.tenant, new)
        )

    async def AppendRecords(  # noqa: N802
        self, call: Call, request: datasets_pb2.AppendRecordsRequest
    ) -> datasets_pb2.AppendRecordsReply:
        """Add the next records."""
        self.datasets.refuse_policy(call.caller)

        def append() -> int:
            records = [(r.data, r.slot) for r in request.records]
            return self.datasets.append(call.tenant, request.upload_id, request.position, records)

        return datasets_pb2.AppendRecordsReply(received=await self.executors.io(append))

    async def SealDataset(  # noqa: N802
        self, call: Call, request: datasets_pb2.SealDatasetRequest
    ) -> datasets_pb2.DatasetInfo:
        """Turn the upload into a dataset."""
        self.datasets.refuse_policy(call.caller)
        key = call.caller.key_id
        return dataset_to_proto(await self.executors.io(self.datasets.seal, call.tenant, request.upload_id, key))

    async def GetDataset(  # noqa: N802
        self, call: Call, request: datasets_pb2.GetDatasetRequest
    ) -> datasets_pb2.DatasetInfo:
        """Describe a dataset."""
        return dataset_to_proto(await self.executors.io(self.datasets.get, call.caller, request.dataset_id))

    async def ListDatasets(  # noqa: N802
        self, call: Call, request: datasets_pb2.ListDatasetsRequest
    ) -> datasets_pb2.ListDatasetsReply:
        """The tenant's datasets, newest first."""
        limit = min(max(1, request.limit or 100), MAX_LISTED)
        infos = await self.executors.io(self.datasets.listed, call.caller, limit)
        return datasets_pb2.ListDatasetsReply(datasets=[dataset_to_proto(i) for i in infos])

    async def ListRecordIds(  # noqa: N802
        self, call: Call, request: datasets_pb2.ListRecordIdsRequest
    ) -> datasets_pb2.ListRecordIdsReply:
        """A page of record ids."""
        if request.position >= 2**63:
            raise InvalidRequestError("position is out of range", field="position", constraint="below 2**63")
        ids, following = await self.executors.io(
            self.datasets.record_ids, call.caller, request.dataset_id, request.position
        )
        return datasets_pb2.ListRecordIdsReply(record_ids=b"".join(ids), next_position=following)

    async def EraseRecords(  # noqa: N802
        self, call: Call, request: datasets_pb2.EraseRecordsRequest
    ) -> datasets_pb2.DatasetInfo:
        """Erase records for good."""
        self.datasets.refuse_policy(call.caller)
        ids = split_record_ids(request.record_ids)
        info = await self.executors.io(self.datasets.erase, call.tenant, request.dataset_id, ids, call.caller.key_id)
        return dataset_to_proto(info)

    async def DeleteDataset(  # noqa: N802
        self, call: Call, request: datasets_pb2.DeleteDatasetRequest
    ) -> datasets_pb2.DeleteDatasetReply:
        """Erase every record; the ledger stays."""
        self.datasets.refuse_policy(call.caller)
        await self.executors.io(self.datasets.delete, call.tenant, request.dataset_id, call.caller.key_id)
        return datasets_pb2.DeleteDatasetReply()

    async def RaiseBudget(  # noqa: N802
        self, call: Call, request: datasets_pb2.RaiseBudgetRequest
    ) -> datasets_pb2.BudgetReply:
        """Raise a dataset's target."""
        self.datasets.refuse_policy(call.caller)
        request_id = request.request_id or call.request_id
        if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
            raise InvalidRequestError(
                f"request_id must have 1 to {MAX_REQUEST_ID} printable characters",
                field="request_id",
                constraint=f"1 to {MAX_REQUEST_ID} printable characters",
            )
        budget = await self.executors.io(
            self.datasets.raise_target,
            call.tenant,
            request.dataset_id,
            request.target_epsilon,
            reason=request.reason,
            actor=call.caller.key_id,
            request_id=request_id,
        )
        return budget_to_proto(budget)
