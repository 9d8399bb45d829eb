"""Config section of the evaluation on tasks during training."""

import pytest

from megatron.config.evaluation import EvaluationConfig


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("eval_tasks_interval", -1, "0 or more"),
        ("eval_tasks_batch_size", -1, "0 or more"),
        ("eval_tasks_num_fewshot", -1, "0 or more"),
        ("eval_tasks_limit", 1.5, "a positive integer, a fraction between 0 and 1, or 0"),
        ("eval_tasks_limit", -0.5, "a positive integer, a fraction between 0 and 1, or 0"),
    ],
)
def test_wrong_values_are_refused(field, value, allowed):
    flag = "--" + field.replace("_", "-")
    with pytest.raises(ValueError, match=f"{flag} is {value}; allowed: {allowed}"):
        EvaluationConfig(**{field: value})


def test_task_names_may_be_separated_by_commas():
    assert EvaluationConfig(("a,b", "c", ",a")).task_names == ["a", "b", "c"]
