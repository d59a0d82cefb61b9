"""One run: compose a configuration, run it on its ranks, keep its record.

>>> from koala.training import compose, launch
>>> record = launch(compose(["data=digits", "optim=koala-m", "epochs=5"]))
"""

from koala.training.config import compose, run_dir
from koala.training.run import find_record, launch
from koala.training.stop import Stopped

__all__ = ["Stopped", "compose", "find_record", "launch", "run_dir"]
