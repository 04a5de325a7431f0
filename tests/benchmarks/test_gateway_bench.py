"""The two doors of the benchmark are given the same work."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gateway import SMALL, TinkerServerProcess, native_block, rows_of, tinker_block


def test_records_are_whole() -> None:
    rows = rows_of(SMALL)
    assert [len(row) for row in rows] == [SMALL.tokens] * SMALL.records


@pytest.mark.slow  # 15 s: a server process and two clients
def test_both_doors_train_the_same_run(tmp_path: Path) -> None:
    with TinkerServerProcess(tmp_path / "server") as server:
        for block_of in (native_block, tinker_block):
            block_of(server, SMALL)(2)
        with server.client() as service:
            one, other = (service.get_training_client(run.id) for run in service.list_training_clients())
            assert one.step == other.step == 2
            (lora, other_lora) = (run.config.lora_config for run in (one, other))
            assert lora is not None
            assert other_lora is not None
            assert (lora.rank, lora.alpha, set(lora.target_modules)) == (
                other_lora.rank,
                other_lora.alpha,
                set(other_lora.target_modules),
            )
            assert one.privacy.total_epsilon == pytest.approx(other.privacy.total_epsilon)
            assert one.config.dp_config is not None
            assert other.config.dp_config is not None
            assert one.config.dp_config.max_grad_norm == other.config.dp_config.max_grad_norm
