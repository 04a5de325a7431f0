"""The composition root: builds every part of a server from its configuration and runs it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.reports.verdicts import MAX_BYTES
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.crypto import api_keys
from tg_tinker_server.crypto.signing import TenantSigner
from tg_tinker_server.engine.backend import Backend
from tg_tinker_server.engine.vector import WithVectors
from tg_tinker_server.foundation import DEFAULT_ROLES, SYSTEM_TENANT, Foundation
from tg_tinker_server.gateway.application import Gateway, Services
from tg_tinker_server.ledger.audit import AuditLog
from tg_tinker_server.ledger.log import TransparencyLog
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.report import ReportWriter
from tg_tinker_server.logs import configure_logging
from tg_tinker_server.rpc.artifacts import ArtifactServicer
from tg_tinker_server.rpc.datasets import DatasetServicer
from tg_tinker_server.rpc.endpoint import Endpoint
from tg_tinker_server.rpc.federation import FederationServicer
from tg_tinker_server.rpc.futures import FutureServicer
from tg_tinker_server.rpc.privacy import PrivacyServicer
from tg_tinker_server.rpc.runs import RunServicer
from tg_tinker_server.rpc.sampling import SamplingServicer
from tg_tinker_server.rpc.server import GrpcServer
from tg_tinker_server.rpc.submitting import Submitting
from tg_tinker_server.rpc.training import TrainingServicer
from tg_tinker_server.service.caller import Authenticator
from tg_tinker_server.service.checkpoints import CheckpointService
from tg_tinker_server.service.custom_losses import CustomLosses
from tg_tinker_server.service.dataset_keys import DatasetKeys
from tg_tinker_server.service.datasets import DatasetService
from tg_tinker_server.service.dispatch import Dispatch
from tg_tinker_server.service.draws import DrawService
from tg_tinker_server.service.durability import Durability, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.exports import MOST_AT_ONCE as MOST_EXPORTS
from tg_tinker_server.service.exports import ExportService
from tg_tinker_server.service.federation_notes import FederationNotes
from tg_tinker_server.service.fitting import PassLimits
from tg_tinker_server.service.imports import ImportService
from tg_tinker_server.service.intake import Intake
from tg_tinker_server.service.log import LogService
from tg_tinker_server.service.operations import OperationService
from tg_tinker_server.service.passes import PassQueue
from tg_tinker_server.service.paths import Paths
from tg_tinker_server.service.policy import KeyPolicy
from tg_tinker_server.service.privacy import PrivacyService
from tg_tinker_server.service.resident_runs import ResidentRuns
from tg_tinker_server.service.run_factory import RunFactory
from tg_tinker_server.service.run_info import RunInfos
from tg_tinker_server.service.runs import RunRegistry
from tg_tinker_server.service.samplers import SamplerService
from tg_tinker_server.service.sampling import SamplingService
from tg_tinker_server.service.sampling_loop import SamplingLoop
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.service.states import StateService
from tg_tinker_server.service.steps import StepService
from tg_tinker_server.service.sweeper import Sweeper
from tg_tinker_server.service.tokenizers import Tokenizers
from tg_tinker_server.service.training import TrainingService
from tg_tinker_server.service.updates import UpdatesService
from tg_tinker_server.service.uploads import Uploads
from tg_tinker_server.service.weights import WeightsService
from tg_tinker_server.store import artifact_rows, run_rows

if TYPE_CHECKING:
    from tg_tinker_server.engine.vllm.settings import VllmConfig


def build_backend(config: ServerConfig) -> Backend:
    """The model backend that the configuration names."""
    if config.backend == "bigram":
        from tg_tinker_server.engine.bigram import BigramBackend

        return BigramBackend()
    from tg_tinker_server.engine.performance import PerformanceConfig
    from tg_tinker_server.engine.torch_backend import TorchBackend
    from tg_tinker_server.engine.vllm.adapters import sweep as sweep_adapters

    performance = PerformanceConfig(
        device=config.device, base_dtype=config.base_dtype, micro_batch_tokens=config.micro_batch_tokens
    )
    sweep_adapters()
    return TorchBackend(model_sources(config), performance, _vllm(config))


def _vllm(config: ServerConfig) -> VllmConfig | None:
    """How to start vLLM, where the configuration asks for it.

    Raises:
        InvalidRequestError: it could not be started here.
    """
    if config.sampler == "built-in":
        return None
    from tg_tinker_server.engine.vllm.settings import VllmConfig, require_vllm

    vllm = VllmConfig(python=config.vllm_python or sys.executable, cache_bytes=int(config.vllm_cache_gib * 2**30))
    require_vllm(vllm)
    return vllm


def _loss_parser(config: ServerConfig) -> Callable[[str], object]:
    """Reads graphs of callers' losses; only torch computes them."""

    def parse(graph_json: str) -> object:
        if config.backend == "bigram":
            raise InvalidRequestError(
                "this server computes no graphs: its backend is bigram", field="graph_json", constraint="torch"
            )
        from tg_tinker_server.engine.loss_fns.graph import parse_graph

        return parse_graph(graph_json)

    return parse


def model_sources(config: ServerConfig) -> dict[str, str | Path]:
    """Folders and hub ids of the models that the configuration offers; the bigram backend needs none."""
    if config.backend == "bigram":
        return {}
    from tg_tinker_server.engine.models import BUNDLED_MODELS

    bundled = {name: source for name, source in BUNDLED_MODELS.items() if isinstance(source, str | Path)}
    return {**bundled, **config.models}


class Server:
    """A whole server. ``start`` and ``stop`` run on the event loop that serves."""

    def __init__(self, config: ServerConfig, foundation: Foundation, backend: Backend) -> None:
        self.config = config
        self._foundation = foundation
        self._locks = foundation.lock(config)
        self._executors = Executors()
        db, vault, keyring = foundation.db, foundation.vault, foundation.keyring
        executors = self._executors
        ledger = PrivacyLedger(db, clock=now)
        tree = TransparencyLog(db, TenantSigner(keyring))
        log = LogService(db, tree, executors)
        texts = SealedText(keyring)
        durability = Durability(db, vault, keyring, executors, config.kept_results)
        paths = Paths(db, keyring, texts, now)
        checkpoints = CheckpointService(db, vault, executors, texts, paths)
        self._sweeper = Sweeper(checkpoints)
        resident = ResidentRuns(db, durability, executors, config.max_runs_per_tenant)
        factory = RunFactory(
            db,
            WithVectors(backend),
            ledger,
            keyring,
            texts,
            durability,
            checkpoints,
            executors,
            max_queue=config.max_queue,
        )
        self._registry = RunRegistry(db, texts, durability, checkpoints, executors, factory, resident)
        audit = AuditLog(db)
        self._operations = operations = OperationService(db, self._registry, durability, audit, executors)
        reports = ReportWriter(ledger, tree, most_bytes=min(MAX_BYTES, config.max_request_bytes))
        privacy = PrivacyService(ledger, reports, executors)
        self._passes = PassQueue(executors)
        dataset_keys = DatasetKeys(keyring)
        self._datasets = datasets = DatasetService(
            db, ledger, dataset_keys, max_bytes=config.max_dataset_bytes, max_records=config.max_dataset_records
        )
        losses = CustomLosses(db, keyring, texts, executors, _loss_parser(config))
        limits = PassLimits(max_records=config.max_batch_records, max_tokens=config.max_batch_tokens)
        draws = DrawService(db, dataset_keys, executors, limits)
        training = TrainingService(ledger, executors, self._passes, draws, losses, config.share_passes, limits)
        steps = StepService(ledger, log, durability, executors)
        self._sampling = sampling_loop = SamplingLoop(backend, executors)
        sampling = SamplingService(executors, sampling_loop, config.share_passes)
        self._samplers = samplers = SamplerService(
            db, texts, checkpoints, backend, self._registry.models, executors, sampling_loop, config.share_passes
        )
        signers = TenantSigner(keyring)
        # A folder of this machine means nothing elsewhere.
        hub_ids = {n: s for n, s in config.models.items() if not Path(s).exists()}
        scratch = config.resolved_artifacts_dir
        exports = ExportService(
            vault,
            checkpoints,
            signers,
            audit,
            executors,
            scratch,
            privacy.report,
            hub_ids,
            asyncio.Semaphore(MOST_EXPORTS),
        )
        intake = Intake(db, vault, audit, texts, Uploads(executors))
        imports = ImportService(ledger, signers, intake)
        weights = WeightsService(self._registry, audit, executors, intake, checkpoints)
        states = StateService(checkpoints, vault, ledger, durability, executors, texts, paths)
        dispatch = Dispatch(operations, training, steps, UpdatesService(training, executors), states, sampling)
        submitting = Submitting(self._registry, operations, dispatch)
        tokenizers = Tokenizers(model_sources(config))
        infos = RunInfos(self._registry, privacy, tokenizers, operations.epoch)
        authenticator = Authenticator(db, foundation.desk.pepper)
        endpoint = Endpoint(authenticator, executors)
        self._grpc = GrpcServer(
            config,
            [
                TrainingServicer(submitting, losses),
                SamplingServicer(submitting, sampling, samplers),
                RunServicer(submitting, infos, config),
                FutureServicer(operations),
                ArtifactServicer(checkpoints, exports, imports, executors),
                DatasetServicer(datasets, executors),
                FederationServicer(weights, FederationNotes(audit, executors), executors),
                PrivacyServicer(self._registry, privacy, audit, log, executors),
            ],
            endpoint,
        )
        self._gateway: Gateway | None = None
        if config.tinker_port is not None:
            self._gateway = Gateway(
                config,
                Services(
                    db=db,
                    keyring=keyring,
                    executors=executors,
                    authenticator=authenticator,
                    registry=self._registry,
                    operations=operations,
                    dispatch=dispatch,
                    training=training,
                    checkpoints=checkpoints,
                    samplers=samplers,
                    losses=losses,
                    infos=infos,
                    audit=audit,
                    system_tenant=SYSTEM_TENANT,
                    hub_ids=hub_ids,
                    scratch=scratch,
                ),
            )

    @property
    def address(self) -> str:
        """Where it listens, host:port."""
        return self._grpc.address

    @property
    def tinker_url(self) -> str:
        """Where the Tinker API is; empty where it is not served."""
        return self._gateway.url if self._gateway else ""

    async def start(self) -> None:
        """Clear what a crash left over, then accept calls."""
        await self._executors.io(self._sweep)
        await self._grpc.start()
        if self._gateway is not None:
            await self._gateway.start()
        self._watch = asyncio.create_task(self._stop_accepting_when_unhealthy())
        self._sweeping = asyncio.create_task(self._sweeper.run(), name="sweeper")

    async def stop(self, grace_s: float | None = None) -> None:
        """Drain: say so, let running operations end, close everything."""
        grace = self.config.drain_s if grace_s is None else grace_s
        self._watch.cancel()
        self._sweeping.cancel()
        await self._grpc.stop_accepting()
        self._operations.stopping.set()
        if self._gateway is not None:
            await self._gateway.stop(min(grace, 2.0))
        await self._registry.close(grace)
        await self._passes.close()
        await self._sampling.close()
        await self._grpc.stop(min(grace, 1.0))
        await asyncio.to_thread(self._executors.close)
        await asyncio.to_thread(self._foundation.db.close)
        for file in self._locks:
            file.close()

    async def _stop_accepting_when_unhealthy(self) -> None:
        """Health checks send nobody to a server that can no longer write its audit log."""
        await self._operations.unhealthy.wait()
        await self._grpc.stop_accepting()

    def _sweep(self) -> None:
        """Delete what a crash left: ciphertexts no row points to, and older pages with keys destroyed since."""
        db = self._foundation.db
        db.forget_deleted()
        self._sweeper.sweep()
        wanted = db.read(run_rows.referenced_states) | db.read(artifact_rows.live_artifact_ids)
        self._foundation.vault.sweep(wanted)
        self._datasets.sweep()


class EmbeddedServer:
    """A server on a loopback socket inside this process, for demos, tests and notebooks.

    >>> with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=getfixture("tmp_path"))) as server:
    ...     server.address.startswith("127.0.0.1:")
    True
    """

    def __init__(self, config: ServerConfig, backend: Backend | None = None) -> None:
        configure_logging(level="warning", style="console")  # a guest in somebody's process keeps quiet
        self._config = config
        self._foundation = Foundation.open(config)
        self._backend = backend or build_backend(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tg-tinker-server", daemon=True)
        self._server: Server | None = None

    @property
    def address(self) -> str:
        """Where it listens, host:port."""
        if self._server is None:
            raise ServerError("the embedded server is not running; use it in a with statement")
        return self._server.address

    @property
    def tinker_url(self) -> str:
        """Where the Tinker API is; needs a configuration with ``tinker_port``."""
        if self._server is None or not self._server.tinker_url:
            raise ServerError("the Tinker API is not served; set ServerConfig.tinker_port, and use a with statement")
        return self._server.tinker_url

    def mint_key(
        self, tenant: str = "default", roles: tuple[str, ...] = DEFAULT_ROLES, policy: KeyPolicy | None = None
    ) -> str:
        """Create an API key for this server; with a policy it is bound to one dataset and its privacy."""
        return self._foundation.desk.mint(tenant, roles, policy=policy)

    def revoke_key(self, key: str) -> None:
        """Revoke an API key; it stops working within a second."""
        self._foundation.desk.revoke(api_keys.parse(key).key_id)

    def start(self) -> Self:
        """Start serving; returns itself."""
        self._thread.start()

        async def go() -> Server:
            server = Server(self._config, self._foundation, self._backend)
            await server.start()
            return server

        self._server = asyncio.run_coroutine_threadsafe(go(), self._loop).result()
        return self

    def stop(self, grace_s: float | None = None) -> None:
        """Drain and close."""
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._server.stop(grace_s), self._loop).result()
            self._server = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(grace_s=5.0)


__all__ = ["EmbeddedServer", "Server", "build_backend"]
