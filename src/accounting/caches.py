"""What a processor's last cache spares its memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: how sharp the edge of a cache is: the share goes from a fifth to four fifths within a factor of 1.6
EDGE = 6.0


def memory_share(held: ArrayLike) -> NDArray[np.float64]:
    """Share of the bytes of a call that come from memory where the cache holds ``held`` times all of them, (...,).

    1 / (1 + held^q): calls that read the same bytes over and over find them in the cache as long as it holds them all;
    of a little more than it holds, each is evicted before it is read again.
    """
    return 1 / (1 + np.minimum(held, 1e3) ** EDGE)
