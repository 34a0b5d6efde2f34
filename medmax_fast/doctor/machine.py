"""What a machine has and what of it this process may use: cores, memory, disk, graphics cards."""

import math
import os
import shutil
import subprocess
from pathlib import Path

_GROUPS, _SELF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Of a quota without a limit, version 1 of control groups says a number near 2^63.
_NO_LIMIT = 1 << 60


def cores() -> int:
    """CPU cores that this process may use: by its affinity and, rounded up, by the quota of its control group."""
    allowed = len(os.sched_getaffinity(0))
    quotas = [_share(line) for line in _limits("cpu.max")]
    for quota, period in zip(_limits("cpu.cfs_quota_us"), _limits("cpu.cfs_period_us"), strict=False):
        quotas.append(_share(f"{quota} {period}"))
    return max(1, math.ceil(min([allowed, *quotas])))


def memory() -> tuple[int, int]:
    """(bytes of memory that this process may use at all, bytes of it that are free now)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    free = found.get("MemAvailable", total)
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for most, taken in zip(_limits(limit), _limits(used), strict=False):
            if most.isdecimal() and int(most) < min(total, _NO_LIMIT):
                total, free = int(most), min(free, max(int(most) - int(taken), 0))
    return total, free


def free_disk(path: str | Path) -> int:
    """Bytes that are free where `path` is, or would be."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def triton_cache() -> Path:
    """Where Triton keeps what it has compiled."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def graphics_cards() -> list[str]:
    """NVIDIA's cards as its own tool names them, each with the version of the driver; none where that is not there."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip().replace(", ", ", driver ") for line in said.splitlines() if line.strip()]


def _limits(name: str) -> list[str]:
    """The contents of a file of this process's control group and of those around it."""
    found = []
    for line in _SELF.read_text().splitlines() if _SELF.exists() else ():
        _, controllers, place = line.split(":", 2)
        # Version 1 has a tree for each controller. In a container the place may be that outside of it.
        roots = [_GROUPS / controllers, _GROUPS / controllers.split(",")[0]] if controllers else [_GROUPS]
        for root in dict.fromkeys(roots):
            inner = root / place.lstrip("/")
            for folder in dict.fromkeys([inner, *(p for p in inner.parents if p.is_relative_to(root))]):
                if (folder / name).is_file():
                    found.append((folder / name).read_text().strip())
    return found


def _share(words: str) -> float:
    """Cores of a line such as `200000 100000`, quota and period; no limit is infinity."""
    quota, _, period = words.partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else math.inf
