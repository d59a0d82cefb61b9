from tests.training.conftest import forked_ranks, runs  # noqa: F401
