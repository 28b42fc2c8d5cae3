"""The rules that presets name."""

from itda_lens.dictionary.energy import EnergyRule
from itda_lens.dictionary.greedy import GreedyRule
from itda_lens.dictionary.rule import Rule

RULES: dict[str, Rule] = {
    "best": EnergyRule(),
    "thorough": EnergyRule(refine=True, rounds=8, min_updated=49_152),
    "paper": GreedyRule(),
}
"""Rules by name. A new rule of the library is a line here. A rule of your own needs no line: pass it to
`fit` or `build`."""
