"""The floor of every stage of `medmax bench` on a GPU that is no single kernel; nothing is loaded and no GPU needed."""

from benchmarks import bench_collate, bench_full, bench_generate, bench_images, bench_start, bench_train


def floors() -> list[dict]:
    """Rows of stage, shape (as in the evidence), moved_bytes and flop, in the order of the suite; 0 is none.

    Compiling has neither: its goal is a time.
    """
    modules = bench_collate, bench_images, bench_generate, bench_train, bench_full, bench_start
    return [row for module in modules for row in module.floors()]
