"""What rounding alone may do: eps x sqrt(number of terms) x size of what was added up."""

from torch import Tensor

from moetk.equivalence.judge import floor


def within_rounding(
    value: Tensor, truth: Tensor, *, terms: int, size: Tensor | float | None = None
) -> None:
    """Fail unless |value - truth|_F <= floor x size. truth: fp64, of the same rounded inputs.

    terms: how many were added up, or rounded one upon the other, for one element. size: the norm
    of the addends' magnitudes, where they cancel; None = |truth|_F, where they do not.
    """
    assert truth.shape == value.shape
    scale = float(truth.double().norm() if size is None else size)
    error = float((value.detach().double() - truth.double()).norm())
    bound = floor(value.dtype, terms) * scale
    assert error <= bound, f"error {error:.3g} where rounding explains {bound:.3g}"
