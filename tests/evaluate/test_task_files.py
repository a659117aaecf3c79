"""Task files of strangers for lm-eval, which are code: what is damaged in them is one line of error."""

import functools

import pytest
from lm_eval import tasks

from bilevel_jax.evaluate import __main__ as command

TASK = "task: odd\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\n"


@pytest.mark.parametrize(
    "content",
    [
        TASK + "doc_to_target: !function absent.name\n",
        TASK + "metric_list:\n  - metric: [1, 2\n",
        TASK + "include: absent.yaml\n",
        TASK + "include: odd.yaml\n",
        TASK + "dataset_path: /dev/zero\n",
        TASK + "unknown_key: 1\n",
        "task: odd\n",
        "task: odd\ngroup: [odd]\n",
        "- a list\n",
        "task: odd\nx: &a [*a]\n",
        "\x00",
    ],
)
def test_one_line(tmp_path, monkeypatch, content):
    local = functools.partial(tasks.TaskManager, include_defaults=False)  # the thousands of tasks of lm-eval take long to read
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: local(include_path=include_path))
    (tmp_path / "odd.yaml").write_text(content)
    with pytest.raises((ValueError, OSError)) as caught:
        command.load_tasks(["odd"], str(tmp_path))
    assert "\n" not in str(caught.value) and "odd" in str(caught.value)
