"""Retraining: recovery of a pruned model with its zeros held, and pruning while training."""

from flash_llm.prune.retrain.config import RetrainConfig
from flash_llm.prune.retrain.folder import RetrainReport, retrain

__all__ = ["RetrainConfig", "RetrainReport", "retrain"]
