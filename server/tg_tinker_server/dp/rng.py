"""Standard normals that nobody can predict: the only source of privacy noise.

Every draw takes a 256-bit key of its own from the operating system. It drives AES-CTR; pairs of the keystream's
64-bit words become float64 normals by Box and Muller. With 64-bit uniforms values reach 9.5 standard deviations: the
missing tail adds less than 1e-14 of delta per step at 1e5 parameters. No user seed reaches this; there is no state
to save.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Normals = npt.NDArray[np.float64]

BLOCK = 1 << 15
"""Normals made at a time: their 256 KiB and the temporaries' stay in a core's cache."""

_ZEROS = memoryview(bytes(8 * BLOCK))


class NormalSource(Protocol):
    """Where a mechanism takes its noise from."""

    def normals(self, count: int) -> Normals:
        """Independent standard normals, float64 [count], in an array that is the caller's to overwrite."""
        ...


class SecureNormal:
    """Independent standard normals, every draw under a new secret key.

    It cannot be seeded, copied, pickled or shown. Nothing is kept between draws that a forked child or another thread
    could repeat.

    >>> SecureNormal().normals(3).shape
    (3,)
    """

    __slots__ = ()

    def normals(self, count: int) -> Normals:
        """Draw ``count`` independent standard normals, float64 [count]."""
        words = np.empty(count + count % 2, dtype=np.uint64)
        # GCM for its keystream alone, which is AES-CTR: OpenSSL has wider code for it, up to twice as fast. The key
        # is used once, so its nonce may be constant; past 2^33 words cryptography refuses to go on.
        keystream = Cipher(algorithms.AES(os.urandom(32)), modes.GCM(bytes(12))).encryptor()
        for start in range(0, len(words), BLOCK):
            block = words[start : start + BLOCK]
            keystream.update_into(_ZEROS[: block.nbytes], block.view(np.uint8).data)
            normals_from_words_(block)
        return words.view(np.float64)[:count]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a noise generator is never copied, pickled or saved: its secrecy is the guarantee")

    def __repr__(self) -> str:
        return "SecureNormal(<secret>)"


def normals_from_words_(words: npt.NDArray[np.uint64]) -> None:
    """Turn an even number of independent uniform words into as many float64 normals, in place: view them as float64.

    Box and Muller (1958), with radius sqrt(-2 log u) for a 64-bit uniform u in (0, 1] and the angle a 64-bit
    fraction of a turn. Results are within 1e-14 of exact arithmetic on the same words. There is one ``tan`` of half
    the angle in place of ``sin`` and ``cos``, whose float64 code in NumPy is several times slower.
    """
    pairs = len(words) // 2
    normals = words.view(np.float64)
    first, second = normals[:pairs], normals[pairs:]
    tangent = words[pairs:].view(np.int64) * (np.pi * 2.0**-64)
    np.tan(tangent, out=tangent)

    # A uniform in two exact halves: the conversion of whole uint64 words takes five times as long. The last
    # 2^-65 keeps u away from zero: log stays finite for every word.
    upper, lower = words[:pairs].view(np.uint32).reshape(2, pairs)
    radius = upper * 2.0**-32
    np.multiply(lower, 2.0**-64, out=second)
    second += 2.0**-65
    radius += second
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)

    # cos = 2 / (1 + tan^2) - 1 and sin = 2 tan / (1 + tan^2), of the half angle's tangent.
    np.multiply(tangent, tangent, out=first)
    first += 1.0
    np.divide(radius, first, out=first)
    first += first
    np.multiply(first, tangent, out=second)
    first -= radius
