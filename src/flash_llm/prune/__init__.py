"""Pruning: dense Hugging Face folder in, dense folder with zeros out. Knows nothing of the packed format."""

from flash_llm.prune.allocate import ALLOCATIONS, OWL, Allocation, Given, LeastError, Uniform
from flash_llm.prune.alps import ALPS
from flash_llm.prune.calibration import CalibrationConfig
from flash_llm.prune.folder import LayerReport, PruneReport, prune_folder
from flash_llm.prune.magnitude import Magnitude
from flash_llm.prune.method import METHODS, Pruner
from flash_llm.prune.sparsegpt import SparseGPT
from flash_llm.prune.text import load_text
from flash_llm.prune.wanda import Wanda

__all__ = [
    "ALLOCATIONS",
    "ALPS",
    "METHODS",
    "OWL",
    "Allocation",
    "CalibrationConfig",
    "Given",
    "LayerReport",
    "LeastError",
    "Magnitude",
    "PruneReport",
    "Pruner",
    "SparseGPT",
    "Uniform",
    "Wanda",
    "load_text",
    "prune_folder",
]
