"""Exceptions of this package. Each message names the value, the rule and the way out."""


class FlashLLMError(Exception):
    """Base of all errors that this package raises by itself and that a user may want to catch together."""


class FormatError(FlashLLMError, ValueError):
    """A packed weight is damaged, inconsistent, or of a format version that this release does not know."""


class CheckpointError(FlashLLMError):
    """A model folder can't be read, is damaged, or is not what the operation needs."""


class KernelError(FlashLLMError, RuntimeError):
    """A kernel can't be compiled, loaded or launched on this machine."""


class SlowPathWarning(UserWarning):
    """A correct but slower path was taken, because the fast one does not exist here."""
