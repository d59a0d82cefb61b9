"""Makes published tables: which runs are missing, who runs them, how far they are, and then the tables.

The room above training and tables: it may import both, and neither knows it.
"""
