"""Memory that was freed, and that the C library keeps for what comes next."""

import ctypes

__all__ = ["give_back"]


def give_back() -> bool:
    """Give it back to the system; False where that cannot be asked for (it needs Linux and glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return False
    return True
