"""Processes that evaluate one network together: each forward pass of one is a forward pass of all."""

from collections.abc import Callable

import torch

from modules.layers.transformer import Transformer
from modules.world import ONE_PROCESS, World

_DONE, _FORWARD, _FAILED, _STOPPED = range(4)


class PeerFailed(RuntimeError):
    """Another process failed at this task."""


class Disagreement(RuntimeError):
    """Processes are about to do different things."""


class Stopped(Exception):
    """Somebody was told to stop."""


class Company:
    """Keeps processes in step that share a network out, so that none waits for another that has nothing to do.

    Before each forward pass all processes say what they are about to do, one small exchange: a forward pass; nothing
    any more; or that they have failed, or were told to stop, and then all of them give up at the same place. One that
    has nothing to do runs a single token beside the others. An error in the middle of a forward pass is out of reach:
    others wait inside of theirs, until the strategy's time is up.

    Args:
        network: the part of it that this process holds.
        world: who evaluates together.
        is_told: whether this process was told to stop.
    """

    def __init__(
        self, network: Transformer, world: World = ONE_PROCESS, is_told: Callable[[], bool] = lambda: False
    ) -> None:
        self.network, self.world, self.is_told = network, world, is_told
        self._idle_token = torch.zeros(1, 1, dtype=torch.long, device=next(network.parameters()).device)

    def before_forward(self) -> None:
        """Say that a forward pass comes.

        Raises:
            PeerFailed: another process has failed.
            Stopped: some process was told to stop.
        """
        self._say(_FORWARD)

    def finish(self) -> None:
        """Go along until nobody has anything to do any more; raises as `before_forward`."""
        while self._say(_DONE) == _FORWARD:
            self.network(self._idle_token, decoding=True)

    def agree(self, number: int) -> None:
        """Make sure that all processes are about to do the same, by a number that stands for it.

        Raises:
            Disagreement: they are not, on all of them; and as `before_forward`.
        """
        self._say(_FORWARD)
        if self.world.largest(number) != -self.world.largest(-number):
            raise Disagreement(
                "processes have loaded other tasks or data than each other; let all of them see the same"
            )

    def tell_failure(self) -> None:
        """Say that this process cannot go on with the task: it stands where others are about to say something."""
        if self.world.largest(_FAILED) == _STOPPED:
            raise Stopped

    def _say(self, what: int) -> int:
        said = self.world.largest(_STOPPED if self.is_told() else what)
        if said == _FAILED:
            raise PeerFailed("another process failed; its output tells why")
        if said == _STOPPED:
            raise Stopped
        return said
