"""How work is drawn and done: random subsets, seeds, and a thread pool that prepares what comes next."""

import hashlib
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor


def subset(items, limit, seed):
    """A random subset of `limit` items in their order (None: all). A smaller limit gives a part of a larger one's."""
    chosen = list(range(len(items)))
    random.Random(seed).shuffle(chosen)
    return [items[i] for i in sorted(chosen[:limit])]


def row_seed(*parts):
    """A 63-bit seed hashed from (seed, image name, role) or the like."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prefetch(prepare, items, workers=4):
    """prepare(item) of all items in order, made ahead of need in threads: decoding and scaling leave Python's lock."""
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            waiting.append(pool.submit(prepare, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # on an error or Ctrl-C the rest is not made any more
