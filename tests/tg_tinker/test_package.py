import inspect
import subprocess
import sys

import tg_tinker
from tg_tinker import FutureHandle, ServiceClient, TrainingClient, errors


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY][
        1:
    ]


NONE = inspect.Parameter.empty


def test_every_public_name_is_there():
    for name in tg_tinker.__all__:
        assert getattr(tg_tinker, name) is not None
    assert len(set(tg_tinker.__all__)) == len(tg_tinker.__all__)


def test_every_error_is_public():
    classes = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert classes <= set(tg_tinker.__all__)
    assert all(issubclass(getattr(tg_tinker, n), tg_tinker.TGTinkerError) for n in classes)


def test_the_package_needs_neither_torch_nor_the_server():
    heavy = "{'torch', 'transformers', 'peft', 'opacus', 'sqlalchemy', 'tg_tinker_server'}"
    code = f"import sys, tg_tinker; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_signatures_are_those_of_the_reference():
    assert parameters(ServiceClient.__init__) == [
        ("api_key", None),
        ("base_url", None),
        ("tenant_id", None),
        ("timeout", 300.0),
        ("retry_count", 3),
    ]
    assert parameters(TrainingClient.forward_backward) == [
        ("batch", None),
        ("batch_hash", None),
        ("loss_fn_config", None),  # of datums
    ]
    assert parameters(TrainingClient.optim_step) == [("apply_dp_noise", True)]
    assert parameters(TrainingClient.save_state) == [("include_optimizer", True), ("metadata", None)]
    assert parameters(TrainingClient.load_state) == [("artifact_id", NONE)]
    assert parameters(TrainingClient.sample) == [
        ("prompts", NONE),
        ("max_tokens", 128),
        ("temperature", 1.0),
        ("top_p", 1.0),
        ("top_k", None),
        ("stop_sequences", None),
        ("num_completions", 1),
        ("repetition_penalty", 1.0),
        ("presence_penalty", 0.0),
        ("frequency_penalty", 0.0),
    ]
    assert parameters(FutureHandle.result) == parameters(FutureHandle.wait) == [("timeout", None)]
    for name in ("id", "step", "config", "status"):
        assert isinstance(inspect.getattr_static(TrainingClient, name), property)
