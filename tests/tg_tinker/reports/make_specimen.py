"""Makes the specimen of the report's format anew: ``python -m tests.tg_tinker.reports.make_specimen``.

Only until version 2 is released; from then on the file stands for what was promised, and is never written again.
Three steps drawn by the server from a registered dataset; audit, erasure, raise; a step of another run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.e2e.server_process import batch
from tests.tg_tinker.ledger.test_audits import RESULT
from tg_tinker import DPConfig, ServiceClient, TrainingConfig
from tg_tinker.wire.privacy import report_of
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

SPECIMEN = Path(__file__).parents[2] / "compat" / "report-v2"


def make(folder: Path) -> None:
    """Write the report and the key that signed it."""
    config = ServerConfig(port=0, backend="bigram", data_dir=folder)
    with EmbeddedServer(config) as server:
        key = server.mint_key("default", ("trainer", "auditor", "budget_officer"))
        with ServiceClient(api_key=key, base_url=server.address) as service:
            data = service.create_dataset("notes-2026", [f"note {i}" for i in range(40)], target_epsilon=6.0,
                                          target_delta=0.01)  # fmt: skip
            dp = data.dp_config(noise_multiplier=1.2)
            client = service.create_training_client(TrainingConfig(model_ref="bigram", batch_size=8, dp_config=dp))
            for _ in range(3):
                client.forward_backward(dataset=data)
                client.optim_step().result(timeout=60)
            service.attach_audit("notes-2026", RESULT)
            data.erase(data.record_ids[:2])
            service.raise_budget("notes-2026", 7.0, "a second study")
            terms = DPConfig(dataset_id="notes-2026", noise_multiplier=4.0, target_epsilon=7.0, target_delta=0.01)
            other = service.create_training_client(TrainingConfig(model_ref="bigram", batch_size=2, dp_config=terms))
            other.forward_backward(batch(0))
            other.optim_step().result(timeout=60)
            report = service.get_signed_report("notes-2026")
    (SPECIMEN / "report.json").write_bytes(report)
    (SPECIMEN / "verifier-key.txt").write_text(report_of(report)["integrity"]["verifier_key"] + "\n")


if __name__ == "__main__":
    make(Path(tempfile.mkdtemp()))
