"""A worker that speaks vLLM's part of the pipe with the standard library alone: a bigram of sixteen tokens.

``next_logits`` says what it computes, so that a test can compute it a second time. Token 2000 in a prompt has it
killed after one token, 2001 has the request refused, 2002 makes it slow. ``hits`` tells how many different salts were
under way at once. The environment's ``VLLM_TOY`` makes it fail: "unsupported", "failed", "refusing", "chatter",
"ignoring" adapters, or "biased".
"""

import json
import math
import os
import queue
import random
import struct
import sys
import threading
import time

SIZE = 16


def next_logits(token, lift):
    """Logits after a token; an adapter lifts that of token 1."""
    return [((token * 7 + v * 5) % 11) / 2.0 + (lift if v == 1 else 0.0) for v in range(SIZE)]


def log_softmax(logits, temperature=1.0):
    scaled = [x / (temperature or 1.0) for x in logits]
    most = max(scaled)
    total = math.log(sum(math.exp(x - most) for x in scaled))
    return [x - most - total for x in scaled]


def lift_of(folder):
    """Mean of all numbers of an adapter, times its scale."""
    with open(f"{folder}/adapter_config.json") as file:
        config = json.load(file)
    with open(f"{folder}/adapter_model.safetensors", "rb") as file:
        raw = file.read()
    (head,) = struct.unpack("<Q", raw[:8])
    body = raw[8 + head :]
    values = struct.unpack(f"<{len(body) // 4}f", body)
    return 1000 * config["lora_alpha"] / config["r"] * sum(values) / len(values)


def read(inbox):
    for line in sys.stdin.buffer:
        inbox.put(json.loads(line))
    os._exit(0)


def row(logprobs, k, token):
    best = sorted(range(SIZE), key=lambda v: -logprobs[v])[:k]
    return [[v, logprobs[v]] for v in dict.fromkeys([token, *best])]


def main():
    out, inbox = os.fdopen(os.dup(1), "w"), queue.Queue()
    os.dup2(2, 1)

    def say(message):
        out.write(json.dumps(message) + "\n")
        out.flush()

    threading.Thread(target=read, args=(inbox,), daemon=True).start()
    mood = os.environ.get("VLLM_TOY", "")
    inbox.get()
    if mood == "failed":
        print("no memory for the model", flush=True)
        os._exit(7)
    if mood == "unsupported":
        say({"failed": "Toy does not support LoRA yet.", "unsupported": True})
        os._exit(1)
    if mood == "chatter":
        out.write("Hello, I am a model\n")
        out.flush()
    say({"ready": "toy"})
    lifts, alive = {}, {}
    while True:
        while not alive or not inbox.empty():
            message = inbox.get()
            what = message["do"]
            if what == "load":
                if mood == "refusing":
                    say({"adapter": message["adapter"], "error": "ValueError: not this layer"})
                    continue
                lifts[message["adapter"]] = 0.0 if mood == "ignoring" else lift_of(message["path"])
                say({"adapter": message["adapter"]})
            elif what == "drop":
                del lifts[message["adapter"]]
            elif what == "cancel":
                for name in message["ids"]:
                    alive.pop(name, None)
            elif 2001 in message["prompt"]:
                say({"id": message["id"], "error": "ValueError"})
            else:
                params = message["params"]
                text = [t % SIZE for t in message["prompt"]]
                lift = float(mood == "biased") if message["adapter"] is None else lifts[message["adapter"]]
                alive[message["id"]] = message, random.Random(params.get("seed")), [text[-1]], lift
        salts = len({message["salt"] for message, *_ in alive.values()})
        for name, (message, rng, tokens, lift) in list(alive.items()):
            params = message["params"]
            logprobs = log_softmax(next_logits(tokens[-1], lift), params["temperature"])
            if params["temperature"] == 0:
                token = max(range(SIZE), key=lambda v: logprobs[v])
            else:
                (token,) = rng.choices(range(SIZE), [math.exp(p) for p in logprobs])
            tokens.append(token)
            ended = len(tokens) - 1 == params["max_tokens"] or token in params["stop_token_ids"]
            answer = {"id": name, "tokens": [token], "logprobs": [row(logprobs, params["logprobs"], token)]}
            answer |= {"ended": ended, "hits": salts}
            say(answer)
            if 2000 in message["prompt"]:
                os.kill(os.getpid(), 9)
            if 2002 in message["prompt"]:
                time.sleep(0.002)
            if ended:
                del alive[name]


if __name__ == "__main__":
    main()
