"""What is drawn at random, as pure functions: no generator has a state that a stop could lose."""

import hashlib
import struct


def uniform(seed: int, epoch: int, index: int, size: int, what: str = "") -> int:
    """Give a uniform integer below ``size`` that is a pure function of its arguments.

    ``what`` (at most 16 bytes) sets draws for different purposes apart.
    """
    digest = hashlib.blake2b(
        struct.pack("<qqq", seed, epoch, index), digest_size=8, person=what.encode()
    ).digest()
    return int.from_bytes(digest, "little") % size
