"""How does a network fail in one direction only?"""

import selectors
import socket
import weakref

from proxy import TcpProxy

__all__ = ["OneWayProxy"]


class OneWayProxy(TcpProxy):
    """A proxy that can go deaf: what clients say reaches the server, its answers do not reach them."""

    def __init__(self, host: str, port: int) -> None:
        self._servers: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._deaf = False
        super().__init__(host, port)

    def go_deaf(self) -> None:
        self._call(lambda: self._set_deaf(True))

    def hear_again(self) -> None:
        """New connections are whole; those from before are reset, as a firewall would that has forgotten them."""
        self._call(lambda: self._set_deaf(False))
        self.drop()

    def _set_deaf(self, deaf: bool) -> None:
        self._deaf = deaf
        for one in list(self._peers):
            self._watch(one)

    def _connect(self) -> socket.socket:
        server = super()._connect()
        self._servers.add(server)
        return server

    def _watch(self, one: socket.socket) -> None:
        super()._watch(one)
        if not self._deaf or one not in self._selector.get_map():
            return
        silenced = selectors.EVENT_READ if one in self._servers else selectors.EVENT_WRITE
        wanted = self._selector.get_key(one).events & ~silenced
        if wanted:
            self._selector.modify(one, wanted)
        else:
            self._selector.unregister(one)
