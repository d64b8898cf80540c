"""Tasks: every bundled prompt on real rows, templates and options of one's own, and what a bad task file says."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import paths
from zotune import tasks
from zotune.tasks.metrics import (
    ComputeAnswerMetrics,
    ComputeMetrics,
    accuracy,
    binary_f1,
    exact_match,
    macro_f1,
    normalized,
    predictions,
    token_f1,
)
from zotune.tasks.template import columns_of, render

NAMES = [
    "ag_news", "boolq", "cb", "copa", "drop", "mnli", "mr", "multirc", "record", "rte", "snli", "squad", "sst2", "sst5", "trec", "wic",
    "winogrande", "wsc",
]  # fmt: skip


def test_the_bundled_tasks():
    assert tasks.names() == NAMES


def test_listing_tasks_imports_neither_torch_nor_transformers():
    code = "import sys, zotune.tasks as t; [t.load(n) for n in t.names()]; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_template_renders_on_every_real_row(name, data_dir):
    for split in ("train", "eval"):
        rows = tasks.load_rows(tasks.load(name), split, data_dir)
        seen = set()
        for template in tasks.load(name).templates:
            task = tasks.load(name, template=template)
            for row in rows:
                prompt, options = task.render(row)
                assert not prompt.endswith(" ") and (prompt or (name, template) == ("winogrande", "mezo"))
                assert len(set(options)) == len(options) >= (1 if task.generation else 2)
                assert all(options[index] for index in task.right(row))
                seen.add(task.answer(row))
        if task.labels:
            assert seen == set(range(len(task.labels)))


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_reads_one_or_two_texts(name, data_dir):
    task = tasks.load(name)
    texts = task.encoder_texts(tasks.load_rows(task, "eval", data_dir)[0])
    assert len(texts) in (1, 2) and all(texts)
    assert task.fixed_options == (name not in ("copa", "drop", "record", "squad", "winogrande"))


def test_alternatives_by_name():
    row = {"sentence": "a joy . ", "label": 1}
    assert tasks.load("sst2", template="mezo").render(row) == ("a joy . It was", (" terrible", " great"))
    assert tasks.load("sst2", template="this-movie-is-good").render(row) == ("a joy . This movie is", (" bad", " good"))
    assert tasks.load("mr", template="mezo").render({"text": "a joy ."})[0] == "a joy . It was"


def test_a_prompt_and_options_of_ones_own():
    row = {"sentence": "a joy .", "label": 1}
    task = tasks.load("sst2", template="{sentence} In a word:", options=[" bad", " good"])
    assert task.template == "custom"
    assert task.render(row) == ("a joy . In a word:", (" bad", " good"))
    by_name = tasks.load("sst2", template="{sentence} In a word:", options={"positive": " good", "negative": " bad"})
    by_value = tasks.load("sst2", template="{sentence} In a word:", options={1: " good", 0: " bad"})
    assert by_name == by_value == task


def test_a_blank_at_the_prompts_end_moves_to_the_options():
    task = tasks.load("sst2", template="{sentence} In a word: ", options=["bad", " good"])
    assert task.render({"sentence": "fine ."}) == ("fine . In a word:", (" bad", " good"))


def test_copa_keeps_a_leading_i_and_says_because_for_a_cause():
    row = {"premise": "My hand hurt.", "choice1": "I hit it.", "choice2": "It rained.", "question": "cause"}
    assert tasks.load("copa").render(row) == ("My hand hurt because", (" I hit it.", " it rained."))
    with pytest.raises(ValueError, match=r"column 'question' holds 'why', not one of cause, effect"):
        tasks.load("copa").render({**row, "question": "why"})


RECORD = {
    "passage": "Ann met Bo.\n@highlight\nThey talked",
    "query": "Later @placeholder left.",
    "entities": ["Ann", "Bo ", "Cy", "Ann"],
    "answers": ["Cy", "Bo"],
}


def test_candidates_are_a_rows_own_and_several_may_be_right():
    task = tasks.load("record")
    prompt, options = task.render(RECORD)
    assert prompt == "Ann met Bo.\n- They talked\n-"
    assert options == (" Later Ann left.", " Later Bo left.", " Later Cy left.")
    assert (task.right(RECORD), task.answer(RECORD)) == ((2, 1), 2)  # trained on is the first of the answers
    assert task.references(RECORD) == ("Cy", "Bo")
    with pytest.raises(ValueError, match=r"none of the right answers \['Di'\] is among the row's 'entities'"):
        task.right({**RECORD, "answers": ["Di"]})


def test_a_generation_task_renders_its_right_answers():
    row = {"title": "T", "context": "C.", "question": "Q?", "answers": {"text": ["one", "1", "one"]}}
    task = tasks.load("squad")
    assert task.generation and not task.labels
    assert task.render(row) == ("Title: T\nContext: C.\nQuestion: Q?\nAnswer:", (" one\n", " 1\n"))
    assert task.references(row) == ("one", "1")
    with pytest.raises(ValueError, match=r"column 'answers.text' holds no answer"):
        task.references({**row, "answers": {"text": []}})


def test_an_option_with_what_follows_the_blank_is_scored():
    row = {"sentence": "Al paid  Ed as _ lost.", "option1": "Al", "option2": "Ed", "answer": "2"}
    assert tasks.load("winogrande").render(row) == ("Al paid  Ed as", (" Al lost.", " Ed lost."))
    assert tasks.load("winogrande", template="mezo").render(row) == ("", ("Al paid  Ed as Al lost.", "Al paid  Ed as Ed lost."))
    assert tasks.load("winogrande").answer(row) == 1
    quoted = {**row, "sentence": "Al said (_'s book) is lost."}
    assert tasks.load("winogrande").render(quoted) == ("Al said", (" (Al's book) is lost.", " (Ed's book) is lost."))
    assert tasks.load("winogrande").render({**row, "sentence": "_ lost."}) == ("", (" Al lost.", " Ed lost."))
    with pytest.raises(ValueError, match=r"'Al lost\.' has no blank: write _ where an option belongs"):
        tasks.load("winogrande").render({**row, "sentence": "Al lost."})


def test_published_prompts_of_boolq():
    row = {"passage": "Title -- A text.", "question": "is it a text", "label": 1}
    assert tasks.load("boolq").render(row) == ("Title -- A text. Is it a text?\n", ("No", "Yes"))  # MeZO's code, version 2
    assert tasks.load("boolq", template="zo-bench").render(row) == ("Title -- A text. Is it a text?", (" No", " Yes"))


def test_published_data_sets():
    assert [tasks.load(name).subset for name in ("wsc", "winogrande")] == ["wsc.fixed", "winogrande_m"]


def test_a_label_may_be_its_value_its_class_name_or_a_boolean():
    task = tasks.load("boolq")
    assert [task.answer({"label": label}) for label in (1, True, "yes", 0, False, "no")] == [1, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match=r"column 'label' holds 2, which is none of the options 0 \(no\), 1 \(yes\)"):
        task.answer({"label": 2})


def test_a_task_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tasks.load("sst2").prompt = "x"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{row.__class__} x", "not a plain column name"),
        ("{row[0]} x", "not a plain column name"),
        ("{sentence!r} x", "not a plain column name"),
        ("{sentence:>9999999} x", "not a plain column name"),
        ("{} x", "not a plain column name"),
        ("{sentence x", "lone '{'"),
    ],
)
def test_a_template_takes_plain_columns_only(template, message):
    with pytest.raises(ValueError, match=message):
        tasks.load("sst2", template=template)


def test_render():
    assert render("{a} and {b c}, {{a}}", {"a": " x ", "b c": 3}) == "x and 3, {a}"
    assert render("{a}", {"a": "{b}"}) == "{b}"  # a value is never rendered again
    assert columns_of("{a} {b} {a} {{c}}") == ("a", "b")
    with pytest.raises(ValueError, match=r"no column 'sentense': the row has sentence, label; did you mean 'sentence'"):
        render("{sentense} It was", {"sentence": "x", "label": 1})
    with pytest.raises(ValueError, match=r"column 'a' holds null, not text"):
        render("{a}", {"a": None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sst-2",), r"unknown task 'sst-2'; did you mean 'sst2'; list them with `zotune tasks`"),
        (("no/such.yaml",), r"no task file no/such.yaml"),
        (("sst2", "mezzo"), r"no template 'mezzo'; did you mean 'mezo'; there are this-movie-is"),
        (("sst2", None, [" good"]), r"got 1 options \[' good'\], but the task has 2 options, one for each of negative"),
        (("squad", None, [" yes", " no"]), r"it has no options to choose: leave options out"),
        (("sst2", None, [" good", " good"]), r"two options are the same"),
        (("sst2", None, [" good", " "]), r"an option is blank"),
        (("sst2", None, {"positive": " good", "bad": " bad"}), r"do not name 2 options"),
        (("sst2", None, ["bad", "good"]), r"would read 'movie isbad': write the option as ' bad'"),
    ],
)
def test_a_bad_choice_is_one_clear_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        tasks.load(*arguments)
    assert "\n" not in str(caught.value)


GOOD = {
    "name": "mine",
    "columns": ["review"],
    "label": "stars",
    "labels": {1: "low", 5: "high"},
    "templates": {"plain": {"prompt": "{review} Stars:", "options": {1: " one", 5: " five"}}},
}


#: Turns it into a generation task.
FREE = {"label": None, "labels": None, "answers": "gold", "answer": " {answer}", "templates": {"plain": "{review}"}}


def write(path, **changes):
    # JSON is YAML, but its keys are strings: integer labels are written as integers.
    text = json.dumps({key: value for key, value in {**GOOD, **changes}.items() if value is not None})
    path.write_text(text.replace('"1":', "1:").replace('"5":', "5:"), encoding="utf-8")
    return path


def test_a_yaml_file_of_ones_own(tmp_path):
    task = tasks.load(write(tmp_path / "mine.yaml"))
    assert (task.name, task.labels, task.splits, task.metrics) == (
        "mine", (1, 5), {"train": "train", "eval": "validation"}, ("accuracy",),
    )  # fmt: skip
    assert task.render({"review": "fine"}) == ("fine Stars:", (" one", " five"))
    assert task.answer({"stars": 5}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "the key 'labels' is missing"),
        ({"labels": {1: "low"}}, "needs at least two"),
        ({"lables": 1}, "unknown key 'lables'; did you mean 'labels'"),
        ({"metrics": ["acuracy"]}, "unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({"template": "fancy"}, "default template 'fancy' is not among plain"),
        ({"templates": {"plain": "{review} Stars:"}}, "template 'plain' needs a prompt, and options"),
        ({"derived": {"x": {"column": "review", "apply": ["upper"]}}}, "unknown change 'upper'"),
        ({"derived": {"x": {"column": "revue", "apply": ["lower"]}}}, "which is not in 'columns'"),
        ({"columns": "review"}, "'columns' must be a list"),
        ({"answers": "gold"}, "'answers' and 'label' exclude each other"),
        ({"candidates": "stars"}, "'candidates' goes with 'answers'"),
        ({**FREE, "answer": " {review}"}, "does not hold {answer}"),
        ({**FREE, "candidates": "revew"}, "the candidates come from 'revew', which is not in 'columns'; did you mean 'review'"),
        ({**FREE, "metrics": ["accuracy"]}, "unknown metric 'accuracy'"),
        ({**FREE, "max_new_tokens": 0}, "'max_new_tokens' must be a number of tokens"),
        ({**FREE, "templates": {"plain": "{review}"}, "answer": None}, "template 'plain' needs a prompt, and an answer"),
        ({"derived": {"x": {"column": "review", "replace": {"_": "{revue}"}}}}, "puts in 'revue', which is not in 'columns'; did you mean"),
    ],
)
def test_a_bad_task_file_is_named_with_what_is_wrong(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        tasks.load(write(tmp_path / "mine.yaml", **changes))
    assert "mine.yaml" in str(caught.value)


def test_a_file_that_is_no_yaml_mapping(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match="this is not YAML"):
        tasks.load(path)
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        tasks.load(path)


def test_metrics():
    predicted, answers = np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])
    assert accuracy(predicted, answers) == 0.75
    assert macro_f1(predicted, answers) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert binary_f1(np.array([1, 1, 0]), np.array([1, 0, 1])) == pytest.approx(0.5)
    scores = np.array([[-1.0, -2.0], [-np.inf, -3.0], [np.nan, 0.0]])
    assert predictions(scores).tolist() == [0, 1, -1]


def test_answers_are_normalized_and_take_the_best_reference():
    assert normalized("  The Cat's, a\tHat! ") == "cats hat"
    assert exact_match("the  U.S.", ["Us", "America"]) == 1 and exact_match("us all", ["Us"]) == 0
    assert token_f1("the black cat", ["cat", "a black dog"]) == pytest.approx(2 / 3)  # of "cat": 1/2 and 1; of "black dog": 1/2
    assert token_f1("cat cat", ["cat cat sat"]) == pytest.approx(0.8)  # words count as often as they occur
    assert token_f1("", ["cat"]) == 0 and token_f1("the", ["a"]) == 1


def test_an_answer_ends_at_its_line_and_padding_is_no_token():
    words = {1: " one", 2: " two", 3: "\n", 4: " three"}
    compute = ComputeAnswerMetrics(lambda ids: "".join(words[i] for i in ids), [("two",), ("one two", "x")])
    tokens = np.array([[1, 2, 3, 4], [2, 3, -100, -100]])
    assert [compute.text(row) for row in tokens] == ["one two", "two"]
    assert compute((tokens, np.array([1, 0]))) == {"token_f1": 1.0, "exact_match": 1.0}
    assert compute((tokens, np.array([0, 0]))) == {"token_f1": pytest.approx((2 / 3 + 1) / 2), "exact_match": 0.5}


def test_any_of_several_right_options_will_do():
    scores = np.array([[-1.0, -2.0, -3.0], [-3.0, -1.0, -100.0], [-200.0, -150.0, -100.0]])  # -100: an option that is not there
    right = np.array([[1, 1, 0], [1, 0, -100], [0, 1, -100]])
    assert ComputeMetrics()((scores, right)) == {"accuracy": pytest.approx(2 / 3)}


def test_compute_metrics_takes_a_trainers_evaluation():
    from transformers import EvalPrediction

    scores, answers = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), np.array([1, 0, 0])
    compute = ComputeMetrics(tasks.load("cb").metrics)
    expected = {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
    assert compute(EvalPrediction(predictions=scores, label_ids=answers)) == expected
    assert compute(EvalPrediction(predictions=(scores, None), label_ids=answers)) == expected
    assert compute((scores, answers)) == expected


def test_the_documentation_is_true(tmp_path):
    reference, text = ((paths.ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("reference/tasks.md", "how-to/add_task.md"))
    first = reference.partition("\nThe template `mezo`")[0]
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", first, flags=re.MULTILINE))
    assert {name: tuple(cell.replace("`", "").split(", ")) for name, cell in table.items()} == {
        name: (tasks.load(name).template, *(t for t in tasks.load(name).templates if t != tasks.load(name).template)) for name in NAMES
    }
    (tmp_path / "stars.yaml").write_text(re.search(r"```yaml\n(name: stars.*?)```", text, flags=re.DOTALL).group(1))
    assert tasks.load(tmp_path / "stars.yaml").render({"review": "fine"})[0] == "fine It was"
    (tmp_path / "capitals.yaml").write_text(re.search(r"```yaml\n(name: capitals.*?)```", text, flags=re.DOTALL).group(1))
    row = {"country": "Peru", "gold": {"text": ["Lima"]}}
    assert tasks.load(tmp_path / "capitals.yaml").render(row) == ("Capital of Peru:", (" Lima\n",))
    own = tasks.load("sst2", template="{sentence} In a word:", options=[" bad", " good"])
    assert str(own.render({"sentence": "a joy ."})) in reference
