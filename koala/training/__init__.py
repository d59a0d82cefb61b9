"""One rank of one run: from a composed configuration to rows and checkpoints. Asking for runs is koala.runs."""
