"""Slows down whoever tries out API keys: a budget of wrong keys for each address.

While an address has used up its budget, a new key from there is not even looked at, since a prompt
answer would still say whether it is right.  Keys that came from that address before, right or
wrong, are answered as always: a client that keeps sending an old key must not lock out others
behind the same proxy.
"""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

MAX_WRONG_KEYS = 50  # at once, from one address
WRONG_KEYS_PER_S = 1.0  # by which the budget is refilled
# Far more than one server's clients have.  Beyond them the oldest are forgotten.
MAX_ADDRESSES = 10_000
MAX_KEYS = 10_000
IPV6_PREFIX = 64  # the smallest network that one customer gets


class Brake:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Address -> how many wrong keys it has left, and at which time.
        self._budgets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._answered: OrderedDict[tuple[str, bytes], None] = OrderedDict()  # address and digest

    def retry_after_s(self, address: str, digest: bytes) -> float:
        """How long a key from that address must wait before it is checked; mostly 0."""
        if address not in self._budgets or (address, digest) in self._answered:
            return 0.0
        return max(0.0, 1.0 - self._budget(address)) / WRONG_KEYS_PER_S

    def note_key(self, address: str, digest: bytes, is_right: bool) -> None:
        """Call it for each key that is checked."""
        if (address, digest) in self._answered:
            return
        self._answered[address, digest] = None
        if len(self._answered) > MAX_KEYS:
            self._answered.popitem(last=False)
        if not is_right:
            self._budgets[address] = self._budget(address) - 1.0, self._clock()
            self._budgets.move_to_end(address)
            if len(self._budgets) > MAX_ADDRESSES:
                self._budgets.popitem(last=False)

    def _budget(self, address: str) -> float:
        left, at_s = self._budgets.get(address, (float(MAX_WRONG_KEYS), 0.0))
        return min(float(MAX_WRONG_KEYS), left + (self._clock() - at_s) * WRONG_KEYS_PER_S)


def network_of(host: str) -> str:
    """What stands for a client's address: the address itself, or the /64 of an IPv6 address."""
    if ":" not in host:
        return host
    try:
        return str(ipaddress.ip_network((host.partition("%")[0], IPV6_PREFIX), strict=False))
    except ValueError:
        return host
