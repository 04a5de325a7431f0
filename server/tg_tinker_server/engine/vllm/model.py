"""One base model's worker, and the requests for it."""

from __future__ import annotations

import itertools
import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from pathlib import Path

import structlog

from tg_tinker.errors import ServerError
from tg_tinker_server.engine.sampling.seam import Progress, SampledWeights
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights
from tg_tinker_server.engine.vllm.adapters import Adapters, Held
from tg_tinker_server.engine.vllm.asking import parameters
from tg_tinker_server.engine.vllm.patience import ENDS_WITHIN_S, MOST_ENDS, Patience
from tg_tinker_server.engine.vllm.process import Message, WorkerProcess
from tg_tinker_server.engine.vllm.requests import Request
from tg_tinker_server.engine.vllm.settings import MEMORY_FOLDER
from tg_tinker_server.engine.vllm.trials import Trial

log = structlog.get_logger()
_MOST_SALTS = 1024
_TRIAL = "trial"


class ModelWorker:
    """Requests for one base model, with any adapter.

    vLLM computes all sequences it has together, so it gets those of one group at a time. Requests are begun in the
    order they came in, so no group waits for requests that came after its own.

    Args:
        name: of the model, for the log.
        bare: the model without adapters.
        start: a new worker.
        memory: file system for adapters.
        patience: with its worker.
    """

    def __init__(
        self,
        name: str,
        bare: TorchWeights,
        start: Callable[[], WorkerProcess],
        *,
        memory: Path = MEMORY_FOLDER,
        patience: Patience | None = None,
    ) -> None:
        self._name, self._start = name, start
        self._patience = patience or Patience()
        self._process: WorkerProcess | None = None
        self._ready = False
        self._waiting: list[Request] = []
        self._running: dict[str, tuple[Request, int]] = {}
        self._adapters = Adapters(self._send, memory=memory)
        self._salts: OrderedDict[Hashable, str] = OrderedDict()
        self._names = itertools.count()
        self._declined: list[Request] = []
        self._seen: set[Request] = set()  # in an earlier step
        self._trial = Trial.of(bare)
        self._tried: dict[str, tuple[Trial, Held | None]] = {}  # questions of trials, and the adapter each is of
        self.unsupported = False
        """vLLM cannot serve this model, or finds something else than we do: requests belong to another sampler."""

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._waiting or self._running)

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if there is one."""
        return None if self._process is None else self._process.pid

    def submit(self, request: Request) -> None:
        """Take a request."""
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Drop a request."""
        if request in self._waiting:
            self._waiting.remove(request)
        mine = [name for name, (owner, _) in self._running.items() if owner is request]
        for name in mine:
            del self._running[name]
        if mine:
            self._send({"do": "cancel", "ids": mine})
        self._release(request)

    def step(self, resting: Collection[SampledWeights]) -> tuple[list[Progress], list[Request]]:
        """What came since the last step, and requests that belong to another sampler, of which nothing was told.

        Never waits for the worker.
        """
        messages = self._messages()
        progress = [p for message in messages for p in self._heard(message)]
        if messages or not self._owes:
            self._patience.heard()
        elif self._patience.is_over(ready=self._ready):
            progress += self._heard_end({"gone": "silent", "words": ""})
        closed = {r for r in self._requests() if r.weights.closed}
        progress += [self._failed(r, ServerError("the session is closed; open the run again")) for r in closed]
        if any(r.weights not in resting for r in self._waiting):
            progress += self._begin(resting)
        declined, self._declined = self._declined, []
        self._seen = set(self._requests())
        return progress, declined

    def close(self) -> None:
        """End the worker, and forget every request."""
        self._end()
        self._waiting.clear()
        self._running.clear()

    # What the worker says.

    def _messages(self) -> list[Message]:
        return [] if self._process is None else self._process.receive()

    def _heard(self, message: Message) -> list[Progress]:
        if "id" in message:
            return self._heard_of_sequence(message)
        if "adapter" in message:
            refused = "error" in message
            if refused:
                log.warning("vllm_refused_adapter", model=self._name, reason=message["error"])
            held = self._adapters.answered(message["adapter"], refused=refused)
            if not refused:
                self._try(held.trial, held)
        elif "ready" in message:
            self._try(self._trial, None)
            log.info("vllm_ready", model=self._name, version=message["ready"])
        elif "broken" in message:
            log.error("vllm_broke", model=self._name, error=message["broken"])
        elif "failed" in message:
            log.error("vllm_cannot_serve", model=self._name, reason=message["failed"])
            if message["unsupported"]:
                self._give_up()
        elif "gone" in message:
            return self._heard_end(message)
        return []

    def _heard_of_sequence(self, message: Message) -> list[Progress]:
        if message["id"].startswith(_TRIAL):
            self._heard_of_trial(message)
            return []
        found = self._running.get(message["id"])
        if found is None:  # it was cancelled, or ended by what vLLM does not know
            return []
        request, index = found
        try:
            progress = request.heard(index, message)
        except Exception as e:  # noqa: BLE001 - it fails alone
            return [self._failed(request, e)]
        if index not in request.sequences:
            del self._running[message["id"]]
            if not message["ended"]:
                self._send({"do": "cancel", "ids": [message["id"]]})
            if not request.sequences:
                self._release(request)
        return [progress] if progress.events else []

    def _try(self, trial: Trial, held: Held | None) -> None:
        number = None if held is None else held.number
        for question in trial.questions(f"{_TRIAL}-{number}", number):
            self._tried[question["id"]] = trial, held
            self._send(question)

    def _heard_of_trial(self, message: Message) -> None:
        trial, held = self._tried.pop(message["id"], (None, None))
        if trial is None:  # another of its questions has failed
            return
        agrees = trial.agrees(message)
        if agrees and any(other is trial for other, _ in self._tried.values()):
            return
        self._tried = {name: found for name, found in self._tried.items() if found[0] is not trial}
        if not agrees:
            log.error("vllm_disagrees", model=self._name, about="adapter" if held else "base model")
        if held is not None:
            self._adapters.tried(held, agrees=agrees)
        elif agrees:
            self._ready = True
        else:
            self._give_up()

    def _give_up(self) -> None:
        """This model is none of vLLM's."""
        self.unsupported = True
        self._declined += self._waiting
        self._waiting = []
        self._end()

    def _heard_end(self, message: Message) -> list[Progress]:
        """It ended by itself. Whoever waited hears of it; the next request starts another one."""
        was_ready = self._ready
        # It owes nothing to those who came after, or whom it was never told of: they have the next one.
        owed = [r for r in self._requests() if r.held is not None or r not in self._waiting]
        failing = owed if was_ready else [r for r in self._requests() if r in self._seen]
        log.error("vllm_ended", model=self._name, status=message["gone"], words=message["words"])
        self._patience.ended()
        self._end()
        what = "ended while it worked on the request" if was_ready else "could not be started"
        error = ServerError(
            f"the vLLM engine of {self._name} {what}; send the request again, and tell the operator, whose log says "
            "more, if it fails again",
            details={"retry": True},
        )
        return [self._failed(r, error) for r in failing]

    @property
    def _owes(self) -> bool:
        """Whether the worker has something to say."""
        waited_for = self._running or self._tried or not (self._ready and self._adapters.settled)
        return self._process is not None and bool(waited_for)

    # What it is asked.

    def _begin(self, resting: Collection[SampledWeights]) -> list[Progress]:
        if self._process is None:
            if self._patience.ends_too_often:
                error = ServerError(
                    f"the vLLM engine of {self._name} ended {MOST_ENDS} times within {ENDS_WITHIN_S / 60:.0f} "
                    "minutes and is left alone for as long; the operator's log says how it ended"
                )
                return [self._failed(r, error) for r in self._requests()]
            try:
                self._process = self._start()
            except OSError as e:
                log.error("vllm_not_started", model=self._name, error=type(e).__name__)
                self._patience.ended()
                error = ServerError(f"the vLLM engine of {self._name} could not be started; tell the operator")
                return [self._failed(r, error) for r in self._requests()]
        if not (self._ready and self._adapters.settled):
            return []
        progress: list[Progress] = []
        for request in list(self._waiting):
            if request.weights in resting:
                continue
            if any(owner.group != request.group for owner, _ in self._running.values()):
                break
            try:
                if not self._has_adapter(request):
                    break
            except OSError as e:
                log.error("vllm_adapter_not_written", model=self._name, error=type(e).__name__)
                error = ServerError("the adapter could not be handed to the vLLM engine: its memory is full")
                progress.append(self._failed(request, error))
                continue
            except Exception as e:  # noqa: BLE001 - told to whoever asked
                progress.append(self._failed(request, e))
                continue
            self._waiting.remove(request)
            if request.held is not None and request.held.state == "refused":
                self._release(request)
                self._declined.append(request)
            else:
                self._ask(request)
        return progress

    def _has_adapter(self, request: Request) -> bool:
        """Whether the worker has, or will not have, what the request needs; if neither, it is on its way."""
        if request.weights.adapter is None:
            return True
        if request.held is None:
            request.held = self._adapters.take(request.weights)
        return request.held is not None and request.held.state != "loading"

    def _ask(self, request: Request) -> None:
        adapter = None if request.held is None else request.held.number
        for index, sequence in request.sequences.items():
            name = str(next(self._names))
            self._running[name] = request, index
            self._send(
                {
                    "do": "sample",
                    "id": name,
                    "prompt": request.query.prompt,
                    "params": parameters(request.weights, request.query, index=index, room=sequence.room),
                    "adapter": adapter,
                    "salt": self._salt(request.group),
                }
            )

    def _salt(self, group: Hashable) -> str:
        """What keeps prompts of this group from being recognised in another's."""
        salt = self._salts.pop(group, None) or secrets.token_hex(16)
        self._salts[group] = salt
        if len(self._salts) > _MOST_SALTS:
            self._salts.popitem(last=False)
        return salt

    # Ends.

    def _requests(self) -> list[Request]:
        return list(dict.fromkeys([*(owner for owner, _ in self._running.values()), *self._waiting]))

    def _failed(self, request: Request, error: Exception) -> Progress:
        self.cancel(request)
        return Progress(ticket=request, error=error)

    def _release(self, request: Request) -> None:
        if request.held is not None:
            self._adapters.release(request.held)
            request.held = None

    def _send(self, message: Message) -> None:
        if self._process is not None:
            self._process.send(message)

    def _end(self) -> None:
        process, self._process, self._ready = self._process, None, False
        self._adapters.clear()
        self._tried.clear()
        if process is not None:
            process.close()
