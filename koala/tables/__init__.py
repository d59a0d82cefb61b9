"""From records to tables and pictures. Reads what is on disk (experiments/, results/, records) and runs nothing.

load, spec, metric   what an experiment file says           measured, age      recorded runs as rows, and by which code
published            the numbers printed in the papers      build, reduce      rows and printed numbers become cells
runs                 a table without an experiment file     stats              what numbers over seeds say
layout               rows, columns, the text of a cell      render, overview, page, figures, terminal: what people see
"""
