"""Parameters from a configuration alone."""

from blt_hf.evaluation.memory import count_parameters
from helpers.models import make_model


def test_parameters_are_those_of_the_model():
    model = make_model()
    counted = count_parameters(model.config)
    assert sum(counted.values()) == model.num_parameters()
    assert counted["patcher"] == model.model.patcher.num_parameters()
