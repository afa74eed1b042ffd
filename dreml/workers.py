"""Worker processes that end with the process that started them."""

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def worker_pool(num_workers: int) -> ProcessPoolExecutor:
    """A pool of worker processes. Its futures raise BrokenProcessPool if one is killed or crashes."""
    return ProcessPoolExecutor(num_workers, initializer=end_with_parent)


def end_with_parent() -> None:
    """Prepare a worker: Ctrl-C is left to the parent, and the worker ends when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by it, a pool of which one worker died ends the others

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def map_ahead(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task], ahead: int
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, function(task)) in the order of the tasks, at most `ahead` of which wait or are worked on.

    `pool.map` would take all tasks, and keep all results, at once.
    """
    waiting = collections.deque()
    tasks = iter(tasks)
    while True:
        for task in itertools.islice(tasks, ahead - len(waiting)):
            waiting.append((task, pool.submit(function, task)))
        if not waiting:
            return
        task, future = waiting.popleft()
        yield task, future.result()
