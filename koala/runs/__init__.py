"""What one asks for: composing a configuration, naming the run that it is, and starting, finding or resuming it.

>>> from koala.runs import compose, launch
>>> record = launch(compose(["data=digits", "optim=koala-m", "epochs=5"]))
"""

from koala.runs.compose import compose
from koala.runs.identity import RunId, identify, run_dir
from koala.runs.launch import find_record, launch
from koala.training.stop import Stopped

__all__ = ["RunId", "Stopped", "compose", "find_record", "identify", "launch", "run_dir"]
