"""Seeds derived from what they are for, so that no draw depends on the order or place in which it is made."""

import hashlib


def derived_seed(*parts: int | str) -> int:
    """The seed of what ``parts`` name (run seed, iteration, prompt id, ...), below 2**31."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1
