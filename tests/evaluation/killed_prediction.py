"""predict.py in a process that kills itself, with SIGKILL, at a given point."""
import os
import signal
from pathlib import Path

from timm_dynamic.evaluation import predict, predict_main


def predict_until(args: list[str]) -> int:
    """Run predict.py; the first argument is POINT:N. It changes modules: only for a process of its own.

    Points, each the N-th time it is reached: `half` (half of a shard is on the disk), `shard` (a shard is written,
    not yet renamed), `results` (7 rows of the results are written), `written` (the shards are not yet removed).
    """
    point, _, number = args[0].partition(':')
    left = int(number)

    def reached(name):
        nonlocal left
        left -= name == point
        if name == point and not left:
            os.kill(os.getpid(), signal.SIGKILL)

    replace, write = os.replace, predict.write_predictions

    def killing_replace(source, target):
        if Path(target).stem.isdigit() and Path(target).parent.suffix == '.shards':
            reached('shard')
            if point == 'half' and left == 1:
                os.truncate(source, os.path.getsize(source) // 2)
            reached('half')
        replace(source, target)

    def rows_until(rows):
        for i, row in enumerate(rows):
            if i == 7:
                reached('results')
            yield row

    def killing_write(path, fmt, columns, rows):
        write(path, fmt, columns, rows_until(rows))
        reached('written')

    os.replace, predict.write_predictions = killing_replace, killing_write
    return predict_main(args[1:])
