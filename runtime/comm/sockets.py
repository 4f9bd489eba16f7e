"""Finding and waking the sockets that gloo opened: the one way to free a thread that is blocked in gloo.

gloo gives no access to its connections, so they are found by comparing the process' open sockets around
the constructor, by inode (numbers are reused). They are only ever shut down, on duplicates, never closed:
gloo aborts the process when a descriptor under it disappears, or when its listener is shut down.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection


def socket_inodes() -> dict[int, int]:
    """inode -> fd of every socket this process has open now."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:
            continue  # the listing's own descriptor, or one closed meanwhile
        if stat.S_ISSOCK(status.st_mode):
            found[status.st_ino] = int(name)
    return found


def duplicate_new_connections(before: Collection[int], exclude_ports: Collection[int]) -> list[socket.socket]:
    """Duplicates of the TCP connections opened since `before` (inodes).

    Listening sockets are left out, and connections from or to `exclude_ports` (the control channel's own).
    """
    duplicates = []
    for inode, fd in socket_inodes().items():
        if inode in before:
            continue
        try:
            duplicate = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue
        if _is_peer_connection(duplicate, exclude_ports):
            duplicates.append(duplicate)
        else:
            duplicate.close()
    return duplicates


def _is_peer_connection(sock: socket.socket, exclude_ports: Collection[int]) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return False
    try:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        ports = {sock.getpeername()[1], sock.getsockname()[1]}
    except OSError:
        return False
    return ports.isdisjoint(exclude_ports)


def shut_down(sockets: Collection[socket.socket]) -> None:
    """Shut both directions of each connection: blocked reads and writes on them end within milliseconds."""
    for sock in sockets:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # the peer was faster
