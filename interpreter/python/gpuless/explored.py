"""What was tried of the orders in which a launch's warps may synchronise."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Explored:
    """The orders of one launch that were explored before it ran (`gpuless.gpu(explore=)`).

    Attributes:
        kernel: its name.
        launch: its number since the seed was set, as schedules name it.
        orders: those that differ. Blocks that do not synchronise with each other count one by one.
        runs: executions of the launch, or of some of its blocks, that this took.
        complete: there are no other orders.
        limit: why there may be more; "" where there are none.
    """

    kernel: str
    launch: int
    orders: int
    runs: int
    complete: bool
    limit: str

    def __str__(self) -> str:
        orders = f"{self.orders} order{'s' * (self.orders != 1)}"
        if self.complete:
            return f"{self.kernel}, launch {self.launch}: explored all {orders}"
        return f"{self.kernel}, launch {self.launch}: explored {orders} of more ({self.limit})"
