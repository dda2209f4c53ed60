"""`python -m megatron_mm1.torchrun`: torchrun with the exit code of the worker that failed first; its own is always 1.

Job scripts tell by the code an error of the user's from a fault that another try may mend (docs/cluster.md).
"""

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    try:
        run.main()
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # as shells count signals
    return 0


if __name__ == "__main__":
    sys.exit(main())
