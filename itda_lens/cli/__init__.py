"""The commands of `itda` for the user's own model, a module for each few."""

from itda_lens.cli.bench import bench_command
from itda_lens.cli.build import build_command
from itda_lens.cli.compare import compare_command
from itda_lens.cli.control import erase_command, steer_command
from itda_lens.cli.fit import fit_command
from itda_lens.cli.look import decompose_command, eval_command, info_command
from itda_lens.cli.push import push_command
from itda_lens.cli.shards import build_finish_command, build_shard_command

__all__ = [
    "bench_command",
    "build_command",
    "build_finish_command",
    "build_shard_command",
    "compare_command",
    "decompose_command",
    "erase_command",
    "eval_command",
    "fit_command",
    "info_command",
    "push_command",
    "steer_command",
]
