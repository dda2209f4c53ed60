"""What every process that works beside another one does first."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def use_one_core() -> None:
    """No GPU, where DALI would open a context, and no thread per core."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("DALI_NUM_THREADS", "1")


def end_with_parent() -> None:
    """End this process when the one that started it is gone, killed perhaps: a pool's would wait for work for ever."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
