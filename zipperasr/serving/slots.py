"""How many requests are taken at a time, and when those that are not should come again."""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator

from zipperasr.serving.refusal import Refusal


class Slots:
    """At most `num` requests that are being uploaded, wait, or are being transcribed."""

    def __init__(self, num: int) -> None:
        self.num = num
        self._starts: dict[object, float] = {}  # the oldest first
        self._gaps_s: deque[float] = deque(maxlen=32)  # from one end to the next, while there was something to do
        self._last_end = -math.inf

    @property
    def num_taken(self) -> int:
        """Requests in flight."""
        return len(self._starts)

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """One slot while the block runs. Raises Refusal (429) when none is free."""
        if self.num_taken >= self.num:
            seconds = self.retry_after_s()
            message = f"as many requests as are taken ({self.num_taken}) are in flight; come again in {seconds} s"
            raise Refusal(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
        key, start = object(), time.monotonic()
        self._starts[key] = start
        try:
            yield
        finally:
            del self._starts[key]
            now = time.monotonic()
            self._gaps_s.append(now - max(self._last_end, start))
            self._last_end = now

    def retry_after_s(self) -> int:
        """Whole seconds, at least 1, until half of what is in flight is done at the pace of the last ends.

        The time since the last one counts as one, so that the estimate grows while nothing ends. By half, there is room
        for those who wait, and still something to do.
        """
        stalled_s = time.monotonic() - max(self._last_end, min(self._starts.values()))
        return max(1, math.ceil(self.num_taken / 2 * statistics.fmean([*self._gaps_s, stalled_s])))
