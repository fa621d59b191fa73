"""Records of settling: a file that says of rankings what cannot be is refused."""

import pytest

from hf_compressm.storage.history import History


@pytest.mark.parametrize(
    "change",
    [
        {"scores": [[1.0] * 16]},
        {"scores": [[1.0] * 15, [1.0] * 16]},
        {"scores": [[-1.0] * 16, [1.0] * 16]},
        {"scores": [[0.0] * 16, [1.0] * 16]},
        {"rank_noise": [0.5]},
        {"rank_correlation": ["x", 1.0]},
        {"settled_points": [-1, 0]},
        {"compared_with": 1.5},
    ],
)
def test_a_record_that_says_what_cannot_be_is_refused(settling_run, change):
    content = settling_run[1].history.to_dict()
    History.from_dict(content)
    content["observations"][4] |= change
    with pytest.raises(ValueError, match="malformed history"):
        History.from_dict(content)


def test_the_reason_of_a_cut_is_checked_when_it_is_read(settling_run):
    content = settling_run[1].history.to_dict()
    content["events"][0]["reasons"] = ["because", None]
    with pytest.raises(ValueError, match="malformed history.*reasons"):
        History.from_dict(content)
