"""With this folder first in PYTHONPATH, a process fails if it ends while a thread of a gloo process group is there.

Such a thread can abort it (`leave_process_group` ends them). Linux only: elsewhere nothing is seen.
"""

import atexit
import os
import sys


def _fail_if_threads_are_left() -> None:
    from tests.gloo_threads import gloo_threads_stay  # not at the start, which is that of every Python process

    if gloo_threads_stay():
        sys.stderr.write("a thread of the process group is left\n")
        sys.stderr.flush()
        os._exit(70)


atexit.register(_fail_if_threads_are_left)  # the first to register is the last to run
