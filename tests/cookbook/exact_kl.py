"""How far a recipe's student is from its teacher, computed without our server: transformers, PEFT and a full sum.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import tinker
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def last_adapter(log_path: Path, folder: Path, *, base_url: str, api_key: str) -> Path:
    """The adapter of a recipe's last checkpoint as a folder that PEFT loads, fetched with the Tinker SDK."""
    *_, last = (log_path / "checkpoints.jsonl").read_text().splitlines()
    service: Any = tinker.ServiceClient(base_url=base_url, api_key=api_key)
    client = service.create_training_client_from_state(json.loads(last)["state_path"]).result()
    path = client.save_weights_external("for-peft").result().path
    urls = tinker.RestClient(base_url=base_url, api_key=api_key).get_external_weights_urls(path).result().urls
    folder.mkdir()
    for name, url in urls.items():
        (folder / name).write_bytes(httpx.get(url).raise_for_status().content)
    service.close("success").result(timeout=20)
    return folder


def reverse_kl(student: Path, teacher: Path, texts: list[str], *, adapter: Path | None = None) -> float:
    """KL(student || teacher) of the next token, in nats, mean over all positions of the texts.

    Args:
        student: a model's folder, as is ``teacher``; both have one tokenizer.
        adapter: put on the student.
    """
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (student, teacher)]
    if adapter is not None:
        models[0] = PeftModel.from_pretrained(models[0], adapter).eval()
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            own_TV, other_TV = (model(ids).logits[0].double().log_softmax(-1) for model in models)
        found.append((own_TV.exp() * (own_TV - other_TV)).sum(-1))
    return float(torch.cat(found).mean())
