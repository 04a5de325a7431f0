"""A vLLM engine on a pipe: run by its path, in an environment that has vLLM and none of this package.

Lines of JSON come in on stdin and go out on what was stdout; process.py is the other end and says what they mean.
Only tokens and numbers cross, never text: what ends a sequence, beyond a token or a length, is decided over there.
When stdin ends this process ends, whatever it is doing: nothing of it outlives the server.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
import threading
import traceback
from typing import Any

UNSUPPORTED = (ValueError, NotImplementedError)
"""How vLLM says that it cannot serve a model like this, or not with adapters: another try would end alike."""
PASSING = "memory on "
"""So it says, with one of these errors too, that others have the memory of a device or node just now."""


def main() -> None:
    """Serve one model until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever vLLM prints must not get between our lines
    inbox: queue.Queue[dict[str, Any]] = queue.Queue()
    folders: set[str] = set()
    threading.Thread(target=_read, args=(inbox, folders), daemon=True).start()
    options = inbox.get()
    try:
        engine = Engine(options, folders)
    except Exception as e:  # noqa: BLE001 - told to the server, which logs it
        text = f"{type(e).__name__}: {e}"
        _say(out, {"failed": text[-2000:], "unsupported": isinstance(e, UNSUPPORTED) and PASSING not in text})
        os._exit(1)  # the other thread still reads
    _say(out, {"ready": engine.version})
    try:
        _serve(engine, inbox, out)
    except BaseException as e:  # noqa: BLE001 - the engine is broken: the server starts another
        # Where, and not what: the text of an error may hold somebody's tokens.
        last = traceback.extract_tb(e.__traceback__)[-1]
        _say(out, {"broken": f"{type(e).__name__} at {os.path.basename(last.filename)}:{last.lineno}"})
        out.flush()
        os._exit(1)


def _serve(engine: Engine, inbox: queue.Queue[dict[str, Any]], out: Any) -> None:
    while True:
        messages = [] if engine.busy else [inbox.get()]
        while not inbox.empty():
            messages.append(inbox.get())
        for message in messages:
            for answer in engine.take(message):
                _say(out, answer)
        if engine.busy:
            for answer in engine.step():
                _say(out, answer)
        out.flush()


def _read(inbox: queue.Queue[dict[str, Any]], folders: set[str]) -> None:
    """Take messages until there are no more, or one was cut off because whoever wrote it was killed."""
    try:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if message.get("do") == "load":
                folders.add(message["path"])
            inbox.put(message)
    finally:
        for path in list(folders):
            shutil.rmtree(path, ignore_errors=True)
        os._exit(0)  # the engine may be deep in its own code; there is nothing to save


def _say(out: Any, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    if "ready" in answer or "failed" in answer:
        out.flush()


class Engine:
    """The engine, in this process, and the adapters that it holds.

    Args:
        options: arguments of vLLM's engine.
        folders: of adapters that are to be loaded, and are gone when this process is.
    """

    def __init__(self, options: dict[str, Any], folders: set[str]) -> None:
        import torch
        import vllm
        from vllm import EngineArgs, SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.llm_engine import LLMEngine

        torch.set_float32_matmul_precision("highest")
        self.version: str = vllm.__version__
        self._params, self._lora, self._delta = SamplingParams, LoRARequest, RequestOutputKind.DELTA
        self._engine = LLMEngine.from_engine_args(EngineArgs(**options))
        self._adapters: dict[int, Any] = {}
        self._alive: set[str] = set()
        self._folders = folders

    @property
    def busy(self) -> bool:
        """Whether there are sequences to go on with."""
        return bool(self._alive)

    def take(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Do what a message says, and what there is to answer at once."""
        what = message["do"]
        if what == "sample":
            return self._sample(message)
        if what == "cancel":
            gone = [i for i in message["ids"] if i in self._alive]
            self._alive.difference_update(gone)
            if gone:
                self._engine.abort_request(gone)
            return []
        if what == "load":
            return self._load(message["adapter"], message["path"])
        self._adapters.pop(message["adapter"], None)  # "drop"
        self._engine.remove_lora(message["adapter"])
        return []

    def step(self) -> list[dict[str, Any]]:
        """One run through the model, and what each sequence got of it."""
        answers = []
        for output in self._engine.step():
            if output.request_id in self._alive:
                answers.append(_answer(output))
                if output.finished:
                    self._alive.discard(output.request_id)
        return answers

    def _load(self, number: int, path: str) -> list[dict[str, Any]]:
        adapter = self._lora(lora_name=str(number), lora_int_id=number, lora_path=path)
        try:
            self._engine.add_lora(adapter)
        except Exception as e:  # noqa: BLE001 - told to the server
            return [{"adapter": number, "error": f"{type(e).__name__}: {e}"[-500:]}]
        finally:
            shutil.rmtree(path, ignore_errors=True)
            self._folders.discard(path)
        self._adapters[number] = adapter
        return [{"adapter": number}]

    def _sample(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        name = message["id"]
        try:
            self._engine.add_request(
                name,
                {"prompt_token_ids": message["prompt"], "cache_salt": message["salt"]},
                self._params(output_kind=self._delta, detokenize=False, ignore_eos=True, **message["params"]),
                lora_request=None if message["adapter"] is None else self._adapters[message["adapter"]],
            )
        except Exception as e:  # noqa: BLE001 - this request fails, and no other
            return [{"id": name, "error": type(e).__name__}]
        self._alive.add(name)
        return []


def _answer(output: Any) -> dict[str, Any]:
    """New tokens of a sequence: of each its log-probability and those of the most likely ones, as [[id, value]]."""
    new = output.outputs[0]
    return {
        "id": output.request_id,
        "tokens": list(new.token_ids),
        "logprobs": [_pairs(row) for row in new.logprobs or ()],
        "ended": bool(output.finished),
        "hits": output.num_cached_tokens or 0,
    }


def _pairs(row: Any) -> list[list[float]]:
    return [[int(token), float(found.logprob)] for token, found in row.items()]


if __name__ == "__main__":
    main()
