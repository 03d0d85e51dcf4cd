from collections.abc import Callable
from typing import Any

def cpu_isa() -> str: ...
def plan(
    call: Callable[[], object], capability: int, multiprocessors: int
) -> dict[str, Any] | None: ...
