import math

import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.sampling import GenerationOptions


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("stop_sequences", ("a", "")),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("seed", 2**63),
    ],
)
def test_impossible_sampling_options_are_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        GenerationOptions(**{field: value})
    assert caught.value.field == field
