"""Stored zip archives as byte ranges: what torch.save leaves behind, read without unpacking anything.

    | local header, name, padding | data | ... | central directory | [zip64 end] | end |
                                    └─ Member("archive/data/3", offset, nbytes)

The directory is read from the end of a region of a file (a .distcp file holds one archive after another), a
member's local header only when its data is asked for. Nothing here decompresses. Invariants:

* members lie inside the region, before the directory, and share no byte;
* names are unique, and a member's local header agrees with the directory on its name, size and method;
* compressed, encrypted, split or commented archives are refused: torch writes none.
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from typing import Final, NamedTuple

from ..universal.errors import CorruptError

MEMBERS_MAX: Final = 2_000_000
DIRECTORY_BYTES_MAX: Final = 512 << 20
END: Final = struct.Struct("<4sHHHHIIH")
END64: Final = struct.Struct("<4sQHHIIQQQQ")
LOCATOR64: Final = struct.Struct("<4sIQI")
CENTRAL: Final = struct.Struct("<4sHHHHHHIIIHHHHHII")
LOCAL: Final = struct.Struct("<4sHHHHHIIIHH")
FULL16: Final = 0xFFFF
FULL32: Final = 0xFFFFFFFF
ENCRYPTED: Final = 0x1
ZIP64_EXTRA: Final = 1


class Member(NamedTuple):
    """A stored file in an archive; `header` is where its local header begins, in the whole file."""

    name: str
    header: int
    nbytes: int
    crc32: int


class Archive:
    """The members of one archive inside [start, stop) of an open file."""

    def __init__(self, fd: int, label: str, start: int = 0, stop: int | None = None) -> None:
        self.fd = fd
        self.label = label
        self.start = start
        self.stop = os.fstat(fd).st_size if stop is None else stop
        count, where, nbytes = self._end()
        if count > MEMBERS_MAX or nbytes > DIRECTORY_BYTES_MAX:
            raise self._corrupt("a zip directory larger than any checkpoint's", members=count, nbytes=nbytes)
        self.directory = self.start + where
        if self.directory + nbytes > self.stop:
            raise self._corrupt("a zip directory outside of its file", offset=self.directory, nbytes=nbytes)
        self.members = self._members(self._read(self.directory, nbytes), count)

    def _corrupt(self, message: str, **fields: object) -> CorruptError:
        return CorruptError(message, file=self.label, **fields)

    def _read(self, offset: int, nbytes: int) -> bytes:
        if offset < self.start or nbytes < 0 or offset + nbytes > self.stop:
            raise self._corrupt("a zip that points outside of its file", offset=offset, nbytes=nbytes)
        data = os.pread(self.fd, nbytes, offset)
        while len(data) < nbytes:
            more = os.pread(self.fd, nbytes - len(data), offset + len(data))
            if not more:
                raise self._corrupt("a file that ends too early", offset=offset + len(data))
            data += more
        return data

    def _end(self) -> tuple[int, int, int]:
        """Entries, offset (from the region's start) and size of the central directory."""
        at = self.stop - END.size
        if at < self.start:
            raise self._corrupt("too short for a zip", nbytes=self.stop - self.start)
        magic, disk, disk0, here, count, nbytes, where, comment = END.unpack(self._read(at, END.size))
        if magic != b"PK\5\6" or comment:
            raise self._corrupt("not a zip as torch.save writes it, or cut short")
        if FULL32 in (nbytes, where) or FULL16 in (here, count):
            return self._end64(at)
        if disk or disk0 or here != count:
            raise self._corrupt("a zip in several parts")
        return count, where, nbytes

    def _end64(self, end: int) -> tuple[int, int, int]:
        magic, disk, where, disks = LOCATOR64.unpack(self._read(end - LOCATOR64.size, LOCATOR64.size))
        if magic != b"PK\6\7" or disk or disks > 1:
            raise self._corrupt("a large zip without its locator")
        fields = END64.unpack(self._read(self.start + where, END64.size))
        here, count, nbytes, offset = fields[6:10]
        if fields[0] != b"PK\6\6" or fields[4] or fields[5] or here != count:
            raise self._corrupt("a large zip in several parts, or without its end")
        return count, offset, nbytes

    def _members(self, data: bytes, count: int) -> dict[str, Member]:
        found: dict[str, Member] = {}
        at, reached, ordered = 0, self.start, True
        for _ in range(count):
            if at + CENTRAL.size > len(data):
                raise self._corrupt("a zip directory that ends too early")
            # fmt: off
            (magic, _, _, flags, method, _, _, crc, packed, nbytes,
             name_bytes, extra_bytes, comment_bytes, disk, _, _, header) = CENTRAL.unpack_from(data, at)
            # fmt: on
            behind = at + CENTRAL.size + name_bytes
            end = behind + extra_bytes + comment_bytes
            if magic != b"PK\1\2" or end > len(data):
                raise self._corrupt("a broken zip directory")
            name = self._name(data[at + CENTRAL.size : behind])
            if FULL32 in (nbytes, packed, header):
                nbytes, packed, header = self._large(data[behind : behind + extra_bytes], nbytes, packed, header)
            if method or flags & ENCRYPTED or packed != nbytes or disk not in (0, FULL16):
                raise self._corrupt("a zip member that is compressed, encrypted or elsewhere", member=name)
            if name in found:
                raise self._corrupt("a zip with a name twice", member=name)
            member = found[name] = Member(name, self.start + header, nbytes, crc)
            ordered = ordered and member.header >= reached
            reached = member.header + LOCAL.size + name_bytes + nbytes
            at = end
        if not ordered or reached > self.directory:
            self._check_disjoint(found)
        return found

    def _name(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._corrupt("a zip with a name that is not UTF-8") from error

    def _large(self, extra: bytes, nbytes: int, packed: int, header: int) -> tuple[int, int, int]:
        """Sizes and offset, taken from the zip64 field where the 32-bit ones say so: at least one does."""
        values = [nbytes, packed, header]
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            body = extra[at + 4 : at + 4 + length]
            at += 4 + length
            if kind != ZIP64_EXTRA:
                continue
            needed = [i for i, value in enumerate(values) if value == FULL32]
            if len(body) < 8 * len(needed):
                break
            for place, i in enumerate(needed):
                values[i] = struct.unpack_from("<Q", body, 8 * place)[0]
            return values[0], values[1], values[2]
        raise self._corrupt("a zip member without its 64-bit size")

    def _check_disjoint(self, members: dict[str, Member]) -> None:
        reached = self.start
        for member in sorted(members.values(), key=lambda m: m.header):
            if member.header < reached:
                raise self._corrupt("zip members that overlap", member=member.name)
            reached = member.header + LOCAL.size + len(member.name.encode()) + member.nbytes
        if reached > self.directory:
            raise self._corrupt("a zip member that runs into the directory")

    def data_offset(self, member: Member) -> int:
        """Where the member's bytes begin, in the whole file."""
        name = member.name.encode()
        header = self._read(member.header, LOCAL.size + len(name))
        fields = LOCAL.unpack_from(header)
        name_bytes, extra_bytes = int(fields[9]), int(fields[10])
        offset = member.header + LOCAL.size + name_bytes + extra_bytes
        agrees = fields[0] == b"PK\3\4" and fields[3] == 0 and name_bytes == len(name) and header.endswith(name)
        if not agrees or offset + member.nbytes > self.directory:
            raise self._corrupt("a zip member whose own header says something else", member=member.name)
        for other in (fields[7], fields[8]):
            # With bit 3 sizes follow the data, and the header holds zeros; a zip64 header holds all ones.
            if other not in (member.nbytes, FULL32) and not (other == 0 and fields[2] & 0x8):
                raise self._corrupt("a zip member whose own header says another size", member=member.name)
        return offset

    def check_room(self, ordered: list[Member]) -> None:
        """Refuse members whose data, with local padding, reaches into the next one's header."""
        for one, following in pairwise(ordered):
            if self.data_offset(one) + one.nbytes > following.header:
                raise self._corrupt("zip members that overlap", member=one.name)

    def read(self, member: Member, limit: int) -> bytes:
        """All bytes of a small member."""
        if member.nbytes > limit:
            raise self._corrupt("a zip member larger than it may be", member=member.name, nbytes=member.nbytes)
        return self._read(self.data_offset(member), member.nbytes)
