"""Random subsets, seeds, copies to a GPU, and a thread pool that prepares the next items of a loop."""

import hashlib
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor


def subset(items, limit, seed):
    """A random subset of `limit` items (None: all) in their original order. A smaller limit gives a subset of
    a larger one's."""
    indices = list(range(len(items)))
    random.Random(seed).shuffle(indices)
    return [items[i] for i in sorted(indices[:limit])]


def row_seed(*parts):
    """A 63-bit seed hashed from (seed, image name, role) or the like."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def to_device(tensor, device):
    """A tensor of the host's memory on `device`. The host does not wait for the copy to a GPU, which reads
    pinned memory at any later time."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def prefetch(prepare, items, workers=4):
    """Yields prepare(item) for all items in order, computed ahead in threads: decoding and resizing release
    the GIL."""
    pool = ThreadPoolExecutor(workers)
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(prepare, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # on an error or Ctrl-C, what has not started is cancelled
