"""Who works on which shard: locks that the operating system drops when a process dies.

A claim on shard s is a POSIX lock on byte s of one file, which also holds between the nodes of a shared NFS, Lustre
or GPFS folder, and which `kill -9` releases at once. Claims only save work: what is published does not depend on
them, so a file system without locks costs shards done twice, not rows.
"""

import errno
import fcntl
import os
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Claims:
    """Claims on the shards of one folder; the file stays open until `close`, which gives all of them up.

    A process must open only one at a time for a folder: closing a second one would drop the locks of the first.
    """

    def __init__(self, path: str | Path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # Whether this file system has locks; found out at the first claim.
        self.work = True

    def take(self, shard: int) -> bool:
        """Claim a shard; False if another process has it."""
        if not self.work:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _NO_LOCKS:
                raise
            self.work = False
        return True

    def give_back(self, shard: int) -> None:
        """Release a shard."""
        if self.work:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, shard)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_) -> None:
        self.close()
