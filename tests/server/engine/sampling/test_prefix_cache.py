"""What is remembered of prompts, and what is forgotten first."""

from __future__ import annotations

from dataclasses import dataclass

from tg_tinker_server.engine.sampling.prefix_cache import PrefixCache


@dataclass(frozen=True)
class Memory:
    text: tuple[int, ...]

    @property
    def length(self):
        return len(self.text)

    @property
    def size_bytes(self):
        return len(self.text)

    def cut(self, length):
        return Memory(self.text[:length])


def put(cache, weights, *tokens):
    cache.put(weights, tokens, Memory(tokens))


def find(cache, weights, *tokens):
    found = cache.find(weights, tokens)
    return None if found is None else found.text


A, B = object(), object()


def test_the_longest_known_beginning_is_found_for_the_same_weights_only():
    cache = PrefixCache(100)
    put(cache, A, 1, 2, 3)
    put(cache, A, 1, 5)
    assert find(cache, A, 1, 2, 9, 9) == (1, 2)
    assert find(cache, A, 1, 5, 6) == (1, 5)
    assert find(cache, A, 2) is None
    assert find(cache, A) is None
    assert find(cache, B, 1, 2) is None


def test_a_longer_text_takes_the_place_of_its_beginning_and_a_shorter_one_adds_nothing():
    cache = PrefixCache(100)
    put(cache, A, 1, 2)
    put(cache, A, 1, 2, 3, 4)
    assert cache.size_bytes == 4
    put(cache, A, 1, 2, 3)
    assert cache.size_bytes == 4
    assert find(cache, A, 1, 2, 3, 4, 5) == (1, 2, 3, 4)


def test_memory_is_bounded_and_what_was_used_last_stays():
    cache = PrefixCache(6)
    put(cache, A, 1, 1)
    put(cache, A, 2, 2)
    put(cache, A, 3, 3)
    assert find(cache, A, 1, 1) == (1, 1)  # used: 2 is now the oldest
    put(cache, A, 4, 4)
    assert cache.size_bytes == 6
    assert find(cache, A, 2, 2) is None
    assert find(cache, A, 1, 1) == (1, 1)
    put(cache, A, *range(10, 17))
    assert find(cache, A, 10) is None, "larger than the whole cache"
    assert cache.size_bytes == 6


def test_weights_that_are_gone_leave_nothing():
    cache = PrefixCache(100)
    put(cache, A, 1)
    put(cache, B, 2)
    cache.forget(A)
    assert (find(cache, A, 1), find(cache, B, 2), cache.size_bytes) == (None, (2,), 1)
