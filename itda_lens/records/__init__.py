"""Plain data that every other room may use."""

from itda_lens.records.hook_points import HookPoint

__all__ = ["HookPoint"]
