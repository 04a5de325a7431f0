"""A private run in about ten lines, against a running server (`tg-tinker serve`, then `tg-tinker keys create`)."""

from tg_tinker import DPConfig, LoRAConfig, ServiceClient, TrainingConfig
from tg_tinker.data import PoissonSampler, collate

texts = [f"Visit {i}: the patient reports pain in joint {i % 9}." for i in range(400)]  # your records
privacy = DPConfig(
    noise_multiplier="auto", target_epsilon=8, target_delta=1e-3, sampling="poisson", dataset_size=len(texts)
)
config = TrainingConfig(
    model_ref="tiny-llama-2m", lora_config=LoRAConfig(), dp_config=privacy, batch_size=32, max_steps=5
)

tc = ServiceClient().create_training_client(config)
for drawn in PoissonSampler.from_config(config):
    tc.forward_backward(collate(tc.encode_batch([texts[i] for i in drawn])))
    step = tc.optim_step().result()
    print(f"step {step.step}: epsilon {step.dp_metrics.total_epsilon:.2f}")

print(tc.sample("Visit", max_tokens=12).samples[0].completion)
print(tc.save_state().artifact_id)
