"""Worker processes that end with the process that started them."""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Task, Result = TypeVar("Task"), TypeVar("Result")


class WorkerDied(Exception):
    """A worker process ended without an answer: it was killed, or a library crashed it."""


@contextlib.contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Offers a pool of worker processes. Raises WorkerDied if one of them is killed or crashes."""
    pool = ProcessPoolExecutor(num_workers, initializer=end_with_parent)
    try:
        yield pool
    except BrokenProcessPool:
        time.sleep(0.1)  # a SIGTERM to the whole group reaches this process at about the same time
        raise WorkerDied from None
    finally:
        pool.shutdown(cancel_futures=True)


def map_ahead(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task], ahead: int
) -> Iterator[tuple[Task, Result]]:
    """Yields (task, function(task)) in the order of the tasks, at most `ahead` of which wait or are worked on.

    `pool.map` would take all tasks, and keep all results, at once.
    """
    waiting: collections.deque[tuple[Task, Future[Result]]] = collections.deque()
    for task in tasks:
        waiting.append((task, pool.submit(function, task)))
        if len(waiting) == ahead:
            task, future = waiting.popleft()
            yield task, future.result()
    for task, future in waiting:
        yield task, future.result()


def end_with_parent() -> None:
    """Prepares a worker: Ctrl-C is left to the parent, and the worker ends when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by it, a pool of which one worker died ends the others

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
