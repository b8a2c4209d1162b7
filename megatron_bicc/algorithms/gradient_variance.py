"""How much a step's gradient would change with other prompts and rollouts, from its groups' parts."""

from torch import Tensor


def gradient_statistics(sketches: Tensor, num_groups: int) -> dict[str, float]:
    """Variance over groups of a gradient that is the sum of its groups' parts. Keys:

    train/gradient_variance   M / (M - 1) sum_g |g - mean g|^2 with M = num_groups: an unbiased estimate of
                              the trace of the covariance of the summed gradient, groups being independent
    train/gradient_noise      that over the squared norm of the summed gradient; free of any scale

    `sketches` are the parts g [G, ...], or what keeps their inner products; M - G groups have a part of 0.
    Nothing of fewer than two groups; no noise where the gradient is 0.
    """
    if num_groups < 2:
        return {}
    parts = sketches.flatten(1).double()
    norm2 = float(parts.sum(0).square().sum())
    # of equal parts it is 0, and rounding can carry the difference below that
    variance = max((num_groups * float(parts.square().sum()) - norm2) / (num_groups - 1), 0.0)
    result = {"train/gradient_variance": variance}
    return result | {"train/gradient_noise": variance / norm2} if norm2 > 0 else result
