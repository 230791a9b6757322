"""Where the weights of this process lie when an engine has split them."""

import torch

from unlearn.engines import local


def test_the_part_of_a_parameter_that_zero_has_split() -> None:
    """ZeRO 3 leaves the parameter empty and keeps its part in an attribute."""
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.ones(3)
    assert torch.equal(local(parameter), torch.ones(3))


def test_a_whole_parameter_is_its_own_part() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    part = local(parameter)
    assert not part.requires_grad
    assert part.data_ptr() == parameter.data_ptr()
