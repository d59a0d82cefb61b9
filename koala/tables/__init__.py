"""From records to tables and pictures. Reads what is on disk (experiments/, results/, records) and runs nothing.

spec       what an experiment file says            measured   recorded runs as rows
published  the numbers printed in the papers       build      rows and printed numbers become cells
layout     rows, columns, the text of a cell       render, page, figures, terminal, wandb_log   what people look at
"""
