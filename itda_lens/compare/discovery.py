"""Which of many scores stand out: false-discovery rates against a null fitted to the scores."""

import torch
from jaxtyping import Float
from torch import Tensor

NULL_FREEDOM = 5
"""Degrees of freedom of Student's t, the null distribution. Normal tails would be too thin: in a trial
with models tuned on one text with other seeds, the largest of 1,024 excesses lay 3.9 and 4.4 standard
deviations (1.4826 median absolute deviations) above the median."""

MIN_SCORES = 30
"""Fewest scores to fit a null distribution to: with fewer, it cannot be told from scores that stand
out."""


def false_discovery_rates(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The false-discovery rate at which each score stands out above the others.

    The null is fitted to the lower half of the scores, which a minority of large ones hardly moves (an
    empirical null, Efron 2004): Student's t with `NULL_FREEDOM` degrees of freedom, through the median
    and the lower quartile of the scores. Rates are Benjamini & Hochberg's (1995) for its upper tail.

    Returns:
        The rates, float64. All are 1 if there are fewer than `MIN_SCORES` scores, or if half of them are
        equal, since no null can be fitted then.
    """
    from scipy import stats  # more than a second, which `import itda_lens` should not wait for

    scores = scores.double()
    nothing = torch.ones_like(scores)
    if len(scores) < MIN_SCORES:
        return nothing
    below, centre = scores.quantile(torch.tensor([0.25, 0.5], dtype=torch.float64)).tolist()
    scale = (below - centre) / stats.t.ppf(0.25, NULL_FREEDOM)
    if scale <= torch.finfo(torch.float32).eps * scores.abs().max().item():
        return nothing
    tails = stats.t.sf(((scores - centre) / scale).numpy(), NULL_FREEDOM)
    return torch.from_numpy(stats.false_discovery_control(tails))
