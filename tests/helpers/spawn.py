"""Ranks for tests: the pool of `megatron.parallel.rank_pool`."""

from megatron.parallel.rank_pool import RankPool as Ranks
from megatron.parallel.rank_pool import free_port, groups_for

__all__ = ["Ranks", "free_port", "groups_for"]
