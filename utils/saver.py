"""Writing results while the network goes on."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from utils.cli import UsageError

# Results that wait to be written, for each thread that writes.
WAITING = 4


class Saver:
    """Threads that write results; where too many wait, the next one waits too.

    Args:
        workers: threads, one at least.
        option: of the command line that says where results go.
    """

    def __init__(self, workers: int, option: str) -> None:
        self.pool = ThreadPoolExecutor(max(1, workers))
        self.most = WAITING * max(1, workers)
        self.option = option
        self.waiting: deque[Future] = deque()
        self.failures: list[str] = []

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown(cancel_futures=exception[0] is not None)

    def put(self, write: Callable[..., None], *args: Any) -> None:
        self.waiting.append(self.pool.submit(write, *args))
        self.finish(self.most)

    def finish(self, most: int = 0) -> None:
        """Wait until at most so many are left.

        Raises:
            UsageError: the disk takes no more.
        """
        while len(self.waiting) > most:
            try:
                self.waiting.popleft().result()
            except OSError as error:
                if error.errno is not None:
                    raise cannot_write(error, self.option) from error
                self.failures.append(f"a result cannot be saved ({error})")  # PIL's own


def cannot_write(error: OSError, option: str) -> UsageError:
    return UsageError(
        f"{error.filename or 'a result'} cannot be written ({error.strerror}): make room, or give "
        f"another {option}"
    )
