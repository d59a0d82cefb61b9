"""From records to tables and figures: reads experiments/, results/ and run folders; runs nothing and needs no torch.

>>> import koala.tables
>>> runs = koala.tables.frame("outputs")  # a row a run and metric, for questions of your own

experiment, parts     an experiment file        measured, frames, runs        recorded runs
published             what papers print         samples, stats, departures    from runs to numbers and footnotes
table, standings      numbers, compared         text, write, figures, plots, readme, cli   what people see
"""

from koala.tables.frames import frame, history

__all__ = ["frame", "history"]
