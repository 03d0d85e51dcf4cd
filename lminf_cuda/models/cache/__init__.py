"""The key-value cache of a patched model.

lambda_cache.py: LambdaCache, all layers together; layers.py: what one layer keeps; export.py: the
cache in exported programs.
"""

from . import export as _export  # noqa: F401  (registers LambdaCache as a pytree)
from .lambda_cache import LambdaCache

__all__ = ["LambdaCache"]
