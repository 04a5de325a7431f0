"""Three sites train one model, and no record leaves its site: all of it in one process, to read from top to bottom.

    python examples/federated_icd10.py

Every site has a tg-tinker server of its own, with its records, its ledger and its keys. The coordinator has another:
it makes the first adapter, averages updates and keeps every result encrypted. Flower's apps carry the messages, here
over a Grid in memory; `tg-tinker federated site` and `coordinator` run the same code over a network.
"""

import os
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tg_tinker import LoRAConfig, ServiceClient, TrainingConfig
from tg_tinker.federated.coordinator import Coordinator, Progress, Released
from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.flower.apps import client_app, server_app
from tg_tinker.federated.flower.in_process import InProcessGrid
from tg_tinker.federated.keys import make_identity, public_text
from tg_tinker.federated.policy import SitePolicy
from tg_tinker.federated.report_file import write_report
from tg_tinker.federated.site import Site
from tg_tinker.federated.site_config import SiteConfig
from tg_tinker.federated.statement import verify_statement
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.demo.measure import BOUNDARY, perplexity
from tg_tinker_server.federated_demo.data import load_texts

MODEL, ROUNDS, LOCAL_STEPS, BATCH, RECORDS = "tiny-llama-2m", 5, 6, 128, None
ADAPTER = {"rank": 16, "alpha": 32, "target_modules": "all-linear"}

# Three groups of chapters of ICD-10-CM stand for three hospitals' texts; some of each are public, to measure on.
texts = load_texts(held_out=170, train_limit=RECORDS)
home = Path(tempfile.mkdtemp(prefix="federated-"))
stack = ExitStack()


def start_server(name: str) -> EmbeddedServer:
    """A party's own server; its address, and a key for the party's app in the environment."""
    server = stack.enter_context(EmbeddedServer(ServerConfig(port=0, data_dir=home / name / "server")))
    os.environ[f"{name.upper()}_API_KEY"] = server.mint_key(name, ("trainer", "exporter", "auditor"))
    return server


# 1. Keys. A message counts only if the right party signed it, so each learns the others' public keys beforehand.
keys = {name: make_identity(home / name / "identity.key") for name in ("coordinator", *texts.sites)}

# 2. The sites. Each registers its records with its own server, and writes down what it agrees to.
apps, site_clients = {}, {}
for name, records in texts.sites.items():
    server = start_server(name)
    config = SiteConfig(
        site=name,
        server=server.address,
        api_key_env=f"{name.upper()}_API_KEY",
        dataset="diagnoses",
        identity=home / name / "identity.key",
        state_dir=home / name / "state",
        policy=SitePolicy(
            coordinator=public_text(keys["coordinator"]),
            base_models=(MODEL,),
            max_record_tokens=256,
            max_epsilon=8.0,
            min_sites=2,
        ),
    )
    service = site_clients[name] = stack.enter_context(config.service())
    service.create_dataset(
        "diagnoses", [BOUNDARY + text + BOUNDARY for text in records], target_epsilon=8.0, target_delta=1e-5
    )
    apps[name] = client_app(Site(config, service, keys[name]).handle)
    print(f"{name}: {len(records):,} records at {server.address}")

# 3. The coordinator, with the job that every site will be asked to agree to.
config = CoordinatorConfig(
    server=start_server("coordinator").address,
    api_key_env="COORDINATOR_API_KEY",
    identity=home / "coordinator" / "identity.key",
    state_dir=home / "coordinator" / "state",
    job={
        "job_id": "icd-10-cm",
        "base_model": MODEL,
        "adapter": ADAPTER,
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "batch_size": BATCH,
        "max_sequence_length": 256,
        "optimizer": {"learning_rate": 0.03, "lr_scheduler": "linear"},
        "records": {"target_epsilon": 8.0, "target_delta": 1e-5, "people": "disjoint"},
        "roster": {name: public_text(keys[name]) for name in texts.sites},
        "min_sites": 2,
        "expires": datetime.now(UTC) + timedelta(days=1),
    },
)
service: ServiceClient = stack.enter_context(config.service())
reader = service.create_training_client(
    TrainingConfig(model_ref=MODEL, lora_config=LoRAConfig(**ADAPTER), batch_size=64, max_sequence_length=256)
)


def measure(released: Released) -> dict[str, float]:
    """Perplexity of a released adapter on public texts."""
    reader.load_state(released.artifact_id, optimizer=False)
    return {"perplexity": perplexity(reader, texts.held_out, batch_size=64)}


def tell(progress: Progress) -> None:
    """A line for each round."""
    if progress.what == "released" and progress.metrics is not None:
        print(f"round {progress.round} of {ROUNDS}: perplexity {progress.metrics['perplexity']:.1f}")


# 4. Train. Each round the adapter goes out, sites take DP-SGD steps, and noised updates come back to be averaged.
coordinator = Coordinator(config, service, keys["coordinator"], progress=tell, evaluate=measure)
results = []
with InProcessGrid(apps) as grid:
    run = server_app(
        lambda link: results.append(coordinator.run(link)),
        roster=config.job["roster"],
        key=keys["coordinator"],
        poll_s=0.02,
    )
    grid.serve(run)
result = results[0]

# 5. What it cost whom. Each site signed its own figure; its ledger says the same.
for name, envelope in sorted(result.statements.items()):
    statement = verify_statement(envelope, config.job["roster"][name])
    ledger = site_clients[name].get_privacy_ledger("diagnoses")
    ledger.verify()
    print(f"{name} signed epsilon {statement.epsilon} at delta {statement.delta}; ledger {ledger.epsilon_spent:.3f}")

# 6. The adapter is an encrypted artifact, and the report is signed.
written = write_report(result, keys["coordinator"], home / "report")
print(f"adapter {result.artifact_id}, {result.status}; {len(written.verdicts)} checks of the report passed")
print(f"tg-tinker audit verify {written.report} --key {written.verifier_key}")
stack.close()
