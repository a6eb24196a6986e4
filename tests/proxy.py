"""How does a test lose its network?"""

import contextlib
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["TcpProxy"]

CHUNK = 65536


class TcpProxy:
    """A port on 127.0.0.1 whose bytes go to a PostgreSQL server, unless the test says otherwise.

    One thread owns every socket, so that cut() really resets: a socket that another thread reads cannot be.
    """

    def __init__(self, host: str, port: int) -> None:
        """Listen at once. `host` is a name, an address, or the directory of a unix socket, as for libpq."""
        self._target = (host, port)
        self._peers: dict[socket.socket, socket.socket] = {}
        self._unsent: dict[socket.socket, bytes] = {}
        self._stalled = False
        self._refusals = 0
        self._commands: list[tuple[Callable[[], None], Future[None]]] = []
        self._wake_read, self._wake_write = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._listener: socket.socket | None = None
        self.host, self.port = "127.0.0.1", 0
        self._listen()
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> "TcpProxy":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._peers) // 2

    def cut(self) -> None:
        """Reset every connection and refuse new ones, until resume()."""
        self._call(self._refuse)  # first: who connected in between would stay
        self._call(self._reset_all)

    def drop(self) -> None:
        """Reset every connection; new ones are welcome."""
        self._call(self._reset_all)

    def refuse(self, count: int) -> None:
        """Reset every connection, and the next so many new ones."""
        self._call(lambda: setattr(self, "_refusals", count))
        self._call(self._reset_all)

    @property
    def refusals(self) -> int:
        """How many new connections are still to be refused."""
        return self._refusals

    def stall(self) -> None:
        """Forward nothing, in neither direction; sockets stay open, and new ones are accepted by the kernel only."""
        self._call(lambda: self._set_stalled(True))

    def resume(self) -> None:
        """Undo cut() and stall(): what was held back is forwarded, the same port listens again."""
        self._call(self._listen)
        self._call(lambda: self._set_stalled(False))

    def close(self) -> None:
        """Reset everything and end the thread."""
        if self._thread.is_alive():
            self._call(self._refuse)
            self._call(self._reset_all)
            self._call(self._end)
            self._thread.join()
            self._wake_read.close()
            self._wake_write.close()

    def _call(self, command: Callable[[], None]) -> None:
        done: Future[None] = Future()
        self._commands.append((command, done))
        self._wake_write.send(b"x")
        done.result(timeout=30)

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):
            while True:
                for key, events in self._selector.select():
                    self._handle(key, events)

    def _handle(self, key: selectors.SelectorKey, events: int) -> None:
        ready = key.fileobj
        assert isinstance(ready, socket.socket)
        if ready is self._wake_read:
            self._obey()
        elif ready is self._listener:
            self._accept()
        elif ready in self._peers:  # a command or its peer may have closed it in this very round
            if events & selectors.EVENT_WRITE:
                self._send(ready)
            if events & selectors.EVENT_READ and ready in self._peers:
                self._receive(ready)

    def _obey(self) -> None:
        self._wake_read.recv(1)
        command, done = self._commands.pop(0)
        try:
            command()
        except BaseException as exc:
            done.set_exception(exc) if not isinstance(exc, SystemExit) else done.set_result(None)
            raise
        done.set_result(None)

    def _accept(self) -> None:
        assert self._listener is not None
        client, _ = self._listener.accept()
        if self._refusals:
            self._refusals -= 1
            reset(client)
            return
        try:
            server = self._connect()
        except OSError:
            reset(client)
            return
        self._peers |= {client: server, server: client}
        self._unsent |= {client: b"", server: b""}
        for one in (client, server):
            one.setblocking(False)
            self._watch(one)

    def _connect(self) -> socket.socket:
        host, port = self._target
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(os.path.join(host, f".s.PGSQL.{port}"))
        except OSError:
            server.close()
            raise
        return server

    def _receive(self, source: socket.socket) -> None:
        try:
            chunk = source.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._close_pair(source)
            return
        self._unsent[self._peers[source]] += chunk
        self._send(self._peers[source])

    def _send(self, target: socket.socket) -> None:
        try:
            sent = target.send(self._unsent[target])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close_pair(target)
            return
        self._unsent[target] = self._unsent[target][sent:]
        self._watch(target)
        self._watch(self._peers[target])

    def _watch(self, one: socket.socket) -> None:
        """Wait for what this socket can do now: nobody reads faster than the other side takes."""
        wanted = 0
        if not self._stalled:
            wanted |= selectors.EVENT_WRITE if self._unsent[one] else 0
            wanted |= 0 if self._unsent[self._peers[one]] else selectors.EVENT_READ
        known = one in self._selector.get_map()
        if wanted and known:
            self._selector.modify(one, wanted)
        elif wanted:
            self._selector.register(one, wanted)
        elif known:
            self._selector.unregister(one)

    def _close_pair(self, one: socket.socket, how: Callable[[socket.socket], None] = socket.socket.close) -> None:
        for each in (one, self._peers[one]):
            if each in self._selector.get_map():
                self._selector.unregister(each)
            how(each)
            del self._peers[each], self._unsent[each]

    def _reset_all(self) -> None:
        while self._peers:
            self._close_pair(next(iter(self._peers)), reset)

    def _refuse(self) -> None:
        if self._listener is not None:
            if self._listener in self._selector.get_map():
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server((self.host, self.port), backlog=128)
            self.port = self._listener.getsockname()[1]
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _set_stalled(self, stalled: bool) -> None:
        self._stalled = stalled
        for one in list(self._peers):
            self._watch(one)
        if self._listener is not None:
            known = self._listener in self._selector.get_map()
            if stalled and known:
                self._selector.unregister(self._listener)
            elif not stalled and not known:
                self._selector.register(self._listener, selectors.EVENT_READ)

    def _end(self) -> None:
        self._selector.close()
        raise SystemExit


def reset(one: socket.socket) -> None:
    """Close with RST instead of FIN."""
    if one.family == socket.AF_INET:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
