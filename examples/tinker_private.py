"""A script for the unmodified `tinker` SDK, on a server of one's own, with a key that can only train privately.

    pip install "tg-tinker[server]" tinker
    python examples/tinker_private.py

Everything between the two lines is what anybody writes for Tinker. It says nothing about privacy and cannot: the key
carries the policy. What surrounds it is usually two terminals: `tg-tinker serve --tinker-api` and
`tg-tinker keys create --policy notes.toml`.
"""

import tempfile
from pathlib import Path

from tg_tinker import ServiceClient
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.service.policy import KeyPolicy

TEXTS = [f"Visit {i}: the patient reports pain in joint {i % 9}." for i in range(256)]  # your records
POLICY = KeyPolicy(
    dataset_id="notes", target_epsilon=8.0, target_delta=1e-3, noise_multiplier="auto", planned_steps=24,
    sampling="max_participation", max_participation=3, diagnostics="owner",
)  # fmt: skip


def train(base_url: str, api_key: str) -> None:
    """Three passes over the texts."""
    # ------------------------------------------------------------------------------------------------ a Tinker script
    import tinker
    from tinker import types

    service = tinker.ServiceClient(base_url=base_url, api_key=api_key)
    client = service.create_lora_training_client("tiny-llama-2m", rank=16).result()
    tokenizer = client.get_tokenizer()

    for step in range(24):
        data = []
        for text in TEXTS[step % 8 * 32 :][:32]:
            tokens = tokenizer.encode(text)
            targets = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
            data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=targets))
        passed = client.forward_backward(data, "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=1e-2))
        loss = passed.result().metrics["loss:sum"] / sum(d.model_input.length for d in data)
        epsilon = stepped.result().metrics["privacy/epsilon"]
        if step % 8 == 7:
            print(f"pass {step // 8 + 1}: loss {loss:.2f} nats per token, epsilon {epsilon:.2f}")

    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(tokenizer.encode("Visit 7: the patient"))
    params = types.SamplingParams(max_tokens=12, temperature=0.0)
    answer = sampler.sample(prompt, num_samples=1, sampling_params=params).result()
    print("sample:", tokenizer.decode(answer.sequences[0].tokens))
    service.close("success").result()
    # ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    """A server in this process, a key with the policy, and at the end what the ledger says."""
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(port=0, tinker_port=0, data_dir=Path(folder))
        with EmbeddedServer(config) as server:
            key = server.mint_key("clinic", ("trainer",), policy=POLICY)
            train(server.tinker_url, "tml-" + key)
            auditor = ServiceClient(api_key=server.mint_key("clinic", ("auditor",)), base_url=server.address)
            ledger = auditor.get_privacy_ledger("notes")
            print(
                f"ledger: {len(ledger.entries)} entries, epsilon {ledger.epsilon_spent:.3f} at delta {ledger.delta:g}"
            )


if __name__ == "__main__":
    main()
