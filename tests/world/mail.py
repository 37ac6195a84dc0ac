"""Messages between ranks: late, in any order, twice, or never."""

from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Faults:
    """What a world does to its ranks. Times in virtual seconds."""

    late: float = 0.02
    """A message is under way for up to so long, so that others overtake it."""
    doubled: float = 0.1
    """Share of messages that come twice."""
    pauses: float = 0.2
    """Share of calls before which a rank does nothing for up to `late`."""
    cut: int | None = None
    """Number of the one message, of all that are sent, that never comes."""
    dies: int | None = None
    """Number of the message whose sender dies instead of sending it."""


class Mail:
    """What every rank has got, by the channel and the number of the call it was sent for."""

    def __init__(self, scheduler, faults, size):
        self._scheduler, self._faults = scheduler, faults
        self._got = [{} for _ in range(size)]
        self._behind = defaultdict(float)
        """When the last message of a sender to a receiver comes."""
        self.gone = [set() for _ in range(size)]
        """Senders of which nothing more comes to each rank."""
        self.sent = self.dropped = 0
        self.fault_at = None
        """When the message was cut, or the rank died."""

    def send(self, sender, receiver, channel, number, content):
        """Returns whether the sender lives on."""
        scheduler, faults = self._scheduler, self._faults
        this = self.sent
        self.sent += 1
        if this == faults.dies:
            self.fault_at = scheduler.now
            return False
        if this == faults.cut:
            self.fault_at = scheduler.now
            return True
        for _ in range(1 + (scheduler.random.random() < faults.doubled)):
            time = scheduler.now + scheduler.random.uniform(0, faults.late)
            pair = sender, receiver
            self._behind[pair] = max(self._behind[pair], time)
            place = channel, number, sender
            scheduler.at(time, lambda place=place: self._come(receiver, place, content))
        return True

    def _come(self, receiver, place, content):
        got = self._got[receiver]
        if place in got:
            self.dropped += 1
            return
        got[place] = content

    def has(self, receiver, channel, number, sender):
        """Whether a message has come."""
        return (channel, number, sender) in self._got[receiver]

    def take(self, receiver, channel, number, sender):
        """A message that has come; a second one of the number does nothing."""
        place = channel, number, sender
        content = self._got[receiver][place]
        self._got[receiver][place] = None
        return content

    def leave(self, sender):
        """A rank has ended: all hear of it, behind what it has sent."""
        for receiver, gone in enumerate(self.gone):
            late = self._scheduler.random.uniform(0, self._faults.late)
            time = max(self._behind[sender, receiver], self._scheduler.now) + late
            self._scheduler.at(time, lambda gone=gone: gone.add(sender))
