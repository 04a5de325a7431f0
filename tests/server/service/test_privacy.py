"""Answers about a whole ledger: complete, or refused with what to do instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.server_process import batch
from tg_tinker import DPConfig, ServiceClient, TrainingConfig
from tg_tinker.errors import InvalidRequestError
from tg_tinker.wire.log import log_entries_request
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig


def test_a_ledger_larger_than_an_answer_is_refused_and_can_be_read_in_pages(tmp_path: Path) -> None:
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path, max_request_bytes=2**16)
    private = TrainingConfig(
        model_ref="bigram", batch_size=2, dp_config=DPConfig(dataset_id="d", target_epsilon=None)
    )
    with EmbeddedServer(config) as server:
        service = ServiceClient(api_key=server.mint_key(), base_url=server.address)
        with service:
            tc = service.create_training_client(private)
            for step in range(80):
                tc.forward_backward(batch(step))
                tc.optim_step().result(timeout=60)
                if step == 9:
                    assert len(service.get_privacy_ledger("d").entries) == 1 + 2 * 10
            for question in (service.get_privacy_ledger, service.get_signed_report):
                with pytest.raises(InvalidRequestError, match=r"161 entries.* over the 0\.0625 MiB of one answer"):
                    question("d")
            found, start = 0, 0
            while page := service._transport.call(log_entries_request(start, 50)).entries_json:
                found += sum(json.loads(line).get("dataset_id") == "d" for line in page)
                start += len(page)
            assert found == 161  # and no entry of a report that was refused
