"""Our engine as the service drives it, in process: a session, its pass, its step."""

from __future__ import annotations

from benchmarks.engine_peers.contender import Recipe, Weights, seeded_weights
from benchmarks.engine_peers.shapes import Shape, build_model, make_batches, vocabulary_of
from tg_tinker.types import BatchData, DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker_server.dp.mechanism import GaussianMechanism
from tg_tinker_server.dp.rng import SecureNormal
from tg_tinker_server.engine.backend import EngineState, PassRequest, StepRequest
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.state import WEIGHTS
from tg_tinker_server.engine.tokenizers import ByteTokenizer
from tg_tinker_server.engine.torch_backend import TorchBackend

MODEL = "bench"


class Ours:
    """One session on a backend of its own. The base stays float32, as the peers' does."""

    private = True

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        base = build_model(shape)
        backend = TorchBackend({MODEL: lambda: (base, ByteTokenizer())}, PerformanceConfig(device=recipe.device))
        self._recipe, self._noise = recipe, SecureNormal()  # one generator per run, as the service has it
        # The requests hold the ids that the client sent; they become tensors within the step.
        self._requests = [
            PassRequest.of_batch(
                BatchData(input_ids=b.input_ids, attention_mask=b.attention_mask, labels=b.labels), train=True
            )
            for b in make_batches(shape, vocabulary_of(shape, base))
        ]
        self._session = backend.open(run_id="bench", config=self._config(shape))
        state = self._session.export_state(optimizer=False)
        shapes = {name.removeprefix(WEIGHTS): value.shape for name, value in state.tensors.items()}
        tensors = {WEIGHTS + name: value for name, value in seeded_weights(shapes).items()}
        self._session.import_state(EngineState(tensors=tensors, scalars=state.scalars), optimizer=False)

    def _config(self, shape: Shape) -> TrainingConfig:
        recipe = self._recipe
        dp = DPConfig(
            noise_multiplier=recipe.noise_multiplier or 1.0, max_grad_norm=recipe.max_grad_norm, target_epsilon=None
        )
        return TrainingConfig(
            model_ref=MODEL,
            lora_config=LoRAConfig(
                rank=shape.rank,
                alpha=2 * shape.rank,
                target_modules=shape.targets if shape.targets == "all-linear" else list(shape.targets),
            ),
            optimizer=OptimizerConfig(name=recipe.optimizer, learning_rate=recipe.learning_rate, momentum=0.0),
            dp_config=dp if self.private else None,
            batch_size=shape.records,
            gradient_accumulation_steps=shape.micro_batches,
            mixed_precision="fp32",
        )

    def step(self) -> None:
        """See ``Contender``."""
        for request in self._requests:
            contribution = self._session.forward_backward(request).contribution
            assert contribution is not None
            self._session.accumulate(contribution)
        recipe, mechanism = self._recipe, None
        if self.private and recipe.noise_multiplier > 0:
            mechanism = GaussianMechanism(recipe.noise_multiplier, recipe.max_grad_norm, self._noise)
        self._session.step(StepRequest(learning_rate=recipe.learning_rate, mechanism=mechanism))

    def weights(self) -> Weights:
        """See ``Contender``."""
        tensors = self._session.export_state(optimizer=False).tensors
        return {name.removeprefix(WEIGHTS): value for name, value in tensors.items()}


class OursPlain(Ours):
    """The same engine without privacy."""

    private = False
