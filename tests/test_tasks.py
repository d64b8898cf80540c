"""Tasks: every bundled prompt on real rows, templates and options of one's own, and what a bad task file says."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from zotune import tasks
from zotune.tasks.metrics import ComputeMetrics, accuracy, binary_f1, macro_f1, predictions
from zotune.tasks.template import columns_of, render

NAMES = ["ag_news", "boolq", "cb", "copa", "mnli", "mr", "rte", "snli", "sst2", "sst5", "trec", "wic", "wsc"]

# Row of the evaluation split -> its prompt's ending (all of it where short), its options, the right one.
RENDERED = {
    "ag_news": (
        0,
        "Fears for T N pension after talks Unions representing workers at Turner   Newall say they are 'disappointed' "
        "after talks with stricken parent firm Federal Mogul.\nTopic:",
        (" World", " Sports", " Business", " Technology"),
        2,
    ),
    "boolq": (
        1619,
        "The Punisher (season 2) -- The season is set for release in 2019. Are they going to make a punisher season 2?",
        (" No", " Yes"),
        1,
    ),
    "cb": (
        0,
        "Suppose Valence the void-brain, Valence the virtuous valet. Why couldn't the figger choose his own portion of "
        "titanic anatomy to shaft? Did he think he was helping? "
        'Can we infer that "Valence was helping"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        1,
    ),
    "copa": (
        0,
        "The man turned on the faucet so",
        (" the toilet filled with water.", " water flowed from the spout."),
        1,
    ),
    "mnli": (
        0,
        "Suppose This site includes a list of all award winners and a searchable database of Government Executive "
        'articles. Can we infer that "The Government Executive articles housed on the website are not able to be '
        'searched."? Yes, No, or Maybe?\n',
        ("Yes", "Maybe", "No"),
        2,
    ),
    "mr": (
        0,
        "compassionately explores the seemingly irreconcilable situation between conservative christian parents and "
        "their estranged gay and lesbian children . This movie is",
        (" terrible", " great"),
        1,
    ),
    "rte": (
        0,
        "Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, according to the "
        'Christopher Reeve Foundation.\nDoes this mean that "Christopher Reeve had an accident." is true? Yes or No?\n',
        ("Yes", "No"),
        1,
    ),
    "snli": (
        0,
        "Suppose Two women are embracing while holding to go packages. "
        'Can we infer that "Two woman are holding packages."? Yes, No, or Maybe?\n',
        ("Yes", "Maybe", "No"),
        0,
    ),
    "sst2": (0, "it 's a charming and often affecting journey . This movie is", (" terrible", " great"), 1),
    "sst5": (
        0,
        "in his first stab at the form , jacquot takes a slightly anarchic approach that works only sporadically . This movie is",
        (" terrible", " bad", " okay", " good", " great"),
        2,
    ),
    "trec": (
        0,
        "Question: How far is it from Denver to Aspen ?\nType:",
        (" Expression", " Entity", " Description", " Human", " Location", " Number"),
        5,
    ),
    "wic": (
        0,
        'Does the word "class" have the same meaning in these two sentences? Yes, No?\n'
        "An emerging professional class.\n"
        "Apologizing for losing your temper, even though you were badly provoked, showed real class.\n",
        ("No", "Yes"),
        0,
    ),
    "wsc": (
        0,
        "Bernard , who had not told the government official that he was less than 21 when he filed for a homestead "
        "claim, did not consider that he had done anything dishonest. Still, anyone who knew that he was 19 years old "
        "could take his claim away from him .\n"
        'In the previous sentence, does the pronoun "him" refer to anyone? Yes or No?\n',
        ("No", "Yes"),
        0,
    ),
}


def test_the_bundled_tasks():
    assert tasks.names() == NAMES == sorted(RENDERED)


def test_listing_the_tasks_imports_neither_torch_nor_transformers():
    code = "import sys, zotune.tasks as t; [t.load(n) for n in t.names()]; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("name", NAMES)
def test_one_real_row_is_rendered_exactly(name, data_dir):
    index, prompt, options, answer = RENDERED[name]
    task = tasks.load(name)
    row = tasks.load_rows(task, "eval", data_dir)[index]
    assert task.render(row) == (prompt, options)
    assert task.answer(row) == answer


@pytest.mark.parametrize("name", NAMES)
def test_every_template_renders_on_every_real_row(name, data_dir):
    for split in ("train", "eval"):
        rows = tasks.load_rows(tasks.load(name), split, data_dir)
        seen = set()
        for template in tasks.load(name).templates:
            task = tasks.load(name, template=template)
            for row in rows:
                prompt, options = task.render(row)
                assert prompt and not prompt.endswith(" ")
                assert len(set(options)) == len(task.labels)
                seen.add(task.answer(row))
        assert seen == set(range(len(task.labels)))


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_reads_one_or_two_texts(name, data_dir):
    task = tasks.load(name)
    texts = task.encoder_texts(tasks.load_rows(task, "eval", data_dir)[0])
    assert len(texts) in (1, 2) and all(texts)
    assert task.fixed_options == (name != "copa")


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
    ],
)
def test_a_bad_task_file_is_named_with_what_is_wrong(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        tasks.load(write(tmp_path / "mine.yaml", **changes))
    assert "mine.yaml" in str(caught.value)


def test_a_file_that_is_no_yaml_mapping(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match="is not valid YAML"):
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


def test_compute_metrics_takes_a_trainers_evaluation():
    from transformers import EvalPrediction

    scores, answers = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), np.array([1, 0, 0])
    compute = ComputeMetrics(tasks.load("cb").metrics)
    expected = {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
    assert compute(EvalPrediction(predictions=scores, label_ids=answers)) == expected
    assert compute(EvalPrediction(predictions=(scores, None), label_ids=answers)) == expected
    assert compute((scores, answers)) == expected


def test_the_documentation_is_true(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", text, flags=re.MULTILINE))
    assert {name: tuple(cell.replace("`", "").split(", ")) for name, cell in table.items()} == {
        name: (tasks.load(name).template, *(t for t in tasks.load(name).templates if t != tasks.load(name).template)) for name in NAMES
    }
    (tmp_path / "stars.yaml").write_text(re.search(r"```yaml\n(name: .*?)```", text, flags=re.DOTALL).group(1))
    assert tasks.load(tmp_path / "stars.yaml").render({"review": "fine"})[0] == "fine Stars:"
    own = tasks.load("sst2", template="{sentence} In a word:", options=[" bad", " good"])
    assert str(own.render({"sentence": "a joy ."})) in text
