"""Random numbers that nobody can compute without a key, unlike those of a seed: for noise and samples that have to stay unknown."""

from __future__ import annotations

import hashlib
import secrets
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

#: Bytes of a key.
KEY_BYTES = 32
_UNIT = 2.0**-53


def new_key() -> bytes:
    """A key of 256 bits from the operating system's generator."""
    return secrets.token_bytes(KEY_BYTES)


class SecretStream:
    """Numbers as a function of a key, a purpose and a context.

    The bits are SHAKE-256 (FIPS 202) of key, purpose and context: without the key they cannot be told from independent fair coins, whatever
    is known of numbers of other contexts. The same key, purpose and context give the same numbers.

    Args:
        key: :data:`KEY_BYTES` secret bytes.

    Raises:
        ValueError: the key has another length.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"the key must have {KEY_BYTES} bytes, not {len(key)}; zotune.rng.secret.new_key() makes one.")
        self._key = key

    def _digest(self, purpose: str, context: bytes, size: int) -> bytes:
        name = purpose.encode()
        return hashlib.shake_256(b"zotune" + self._key + len(name).to_bytes(2, "little") + name + context).digest(size)

    def uniforms(self, purpose: str, context: bytes, count: int) -> npt.NDArray[np.float64]:
        """``count`` numbers in (0, 1) of 53 bits each, uniform."""
        words = np.frombuffer(self._digest(purpose, context, 8 * count), dtype="<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * _UNIT

    def normals(self, purpose: str, context: bytes, count: int) -> list[float]:
        """``count`` standard normal numbers, by the inverse of the distribution function."""
        standard = NormalDist()
        return [standard.inv_cdf(float(u)) for u in self.uniforms(purpose, context, count)]

    def digest(self, purpose: str, data: bytes = b"") -> str:
        """A keyed digest in hexadecimal: it identifies data, or the key itself, to the holder of the key alone."""
        return self._digest(purpose, data, 16).hex()
