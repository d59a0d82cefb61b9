"""How train.py ends: what a person reads, and its exit status."""

import sys

from submitit.core.utils import UncompletedJobError

from koala.errors import ConfigError
from koala.public import plain
from koala.runs.overrides import config_error
from koala.training.stop import Stopped


def exit_status(error: BaseException) -> int:
    """Prints what `error` means, in one line where it was foreseen, and returns the exit status for it.

    Raises:
        BaseException: `error` itself, of a run and foreseen by nobody; or an exit that has its status.
    """
    if isinstance(error, Stopped):
        print(error, file=sys.stderr)
        return 128 + error.signum
    if isinstance(error, KeyboardInterrupt):  # before a run, or while jobs are waited for, which stay in the queue
        return 130
    if isinstance(error, UncompletedJobError):
        from koala.cluster import submission_error

        if error.__cause__ is None:  # a job left no result; the end of its log tells why
            print(error, file=sys.stderr)
            return 1
        error = submission_error(error)
    of_a_run = hasattr(error, "of_a_run")
    if of_a_run and isinstance(error, OSError):  # the disk; a person can mend it
        print(error, file=sys.stderr)
        return 1
    if isinstance(error, SystemExit) or of_a_run and not isinstance(error, ConfigError):
        raise error
    print(plain(" ".join(str(config_error(error)).split())), file=sys.stderr)
    return 2
