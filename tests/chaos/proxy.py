"""A TCP proxy between the parts of a service, which can be cut or held: what a broken network does to both ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

CHUNK_BYTES = 1 << 16
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Proxy:
    """Listens on a loopback port and hands connections on to the targets in turn, from a thread of its own.

    Attributes:
        port: where it listens.
    """

    def __init__(self, *target_ports: int) -> None:
        self._targets: Sequence[int] = target_ports
        self._num_connections = 0
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Reset all connections, and every new one."""
        self._call(self._set(cut=True, flowing=True))

    def hold(self) -> None:
        """Keep the connections, but let nothing pass."""
        self._call(self._set(cut=False, flowing=False))

    def mend(self) -> None:
        """Let everything pass again."""
        self._call(self._set(cut=False, flowing=True))

    def close(self) -> None:
        """End all connections and the thread."""
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _set(self, *, cut: bool, flowing: bool) -> None:
        self._is_cut = cut
        if cut:
            for writer in list(self._writers):
                _reset(writer)
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _end(self) -> None:
        self._server.close()
        await self._set(cut=True, flowing=True)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.gather(*tasks, return_exceptions=True)  # they end, since their connections have

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            onward = None if self._is_cut else await self._connect()
            if onward is None:
                _reset(writer)
                return
            target_reader, target_writer = onward
            self._writers.add(target_writer)
            try:
                await asyncio.gather(self._pump(reader, target_writer), self._pump(target_reader, writer))
            finally:
                self._writers.discard(target_writer)
                target_writer.close()
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """To the next target in turn, or to one of the others if that does not listen."""
        self._num_connections += 1
        for place in range(len(self._targets)):
            target = self._targets[(self._num_connections + place) % len(self._targets)]
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", target)
        return None

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError, RuntimeError):
            if writer.can_write_eof() and not writer.is_closing():
                writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
