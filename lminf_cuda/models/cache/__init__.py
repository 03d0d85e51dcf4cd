"""The key-value cache of a patched model.

lambda_cache.py: LambdaCache, all layers together; layers.py: what one layer keeps.
"""

from .lambda_cache import LambdaCache

__all__ = ["LambdaCache"]
