"""Built-in reward functions and functions by name."""

import importlib.util
import math
import sys

import numpy as np
import pytest

from zotune.rewards import Rewards, load
from zotune.rewards.answers import sentence_bleu


def rewards(name, texts, ids=None, **columns):
    return Rewards(name).score(["p"] * len(texts), texts, columns, ids).total.tolist()


def test_answers_are_compared_with_the_first_known_column():
    assert rewards("exact_match", ["The cat!", "dog"], label=["x", "x"], answer=["cat", ["a dog", "wolf"]]) == [1.0, 1.0]
    assert rewards("exact_match:target", ["42", "x"], target=[42, "y"], answer=["42", "x"]) == [1.0, 0.0]
    assert rewards("token_f1", ["big red cat", ""], reference=["red cat", "x"]) == [0.8, 0.0]


def test_a_row_without_an_answer_is_not_judged():
    assert np.isnan(rewards("exact_match", ["cat", "cat"], answer=["cat", None])).tolist() == [False, True]


def test_a_missing_answer_column_stops():
    with pytest.raises(ValueError, match="'token_f1' compares with a column named 'reference' or 'answer' or 'solution' or 'label'"):
        rewards("token_f1", ["cat"], target=["cat"])


def test_the_text_of_messages_is_judged():
    prompts = [[{"role": "user", "content": "Which?"}]]
    assert Rewards(["exact_match", "contains:at", "characters:3"]).score(prompts, ["cat"], {"answer": ["cat"]}).total.tolist() == [3.0]


def test_text_rewards_take_their_option_from_the_name():
    assert rewards("contains:good: yes", ["so good: yes", "so Good: yes"]) == [1.0, 0.0]
    assert rewards(r"regex:^(?:a|b):\d+$", ["a:12", "c:12"]) == [1.0, 0.0]
    assert rewards("characters:4", ["abcd", "ab", "abcdefgh", ""]) == [1.0, 0.5, 0.5, 0.0]
    assert rewards("length:2", ["x", "x"], [[5, 6], [5]]) == [1.0, 0.5]


@pytest.mark.parametrize("name", ["contains", "regex:", "regex:(", "length", "length:0", "characters:x"])
def test_a_wrong_option_is_refused(name):
    with pytest.raises(ValueError, match=f"the reward '{name.partition(':')[0]}' needs a"):
        load(name)


def test_lengths_need_token_ids():
    with pytest.raises(ValueError, match="'length' counts tokens, and there are none here"):
        rewards("length:2", ["x"])


def test_sentence_bleu_by_hand():
    # Of 4 words 3 match, of 3 pairs 2, of 2 triples 1, of 1 quadruple none; the reference has 5 words.
    product = 3 / 4 * (2 + 1) / (3 + 1) * (1 + 1) / (2 + 1) * 1 / (1 + 1)
    assert sentence_bleu("the cat sat down", ["the cat sat on mats"]) == pytest.approx(math.exp(1 - 5 / 4) * product**0.25)
    assert sentence_bleu("a b", ["c", "a b"]) == 1.0 and sentence_bleu("", ["a"]) == 0.0
    assert rewards("bleu", ["a b"], reference=["a b"]) == [1.0]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="pip install 'zotune[math]'")
def test_equal_formulas_match():
    texts = [r"so it is $\frac{2}{6}$.", r"The answer is \boxed{\sqrt{2}}", "hello", "#### 41"]
    assert rewards("math_verify", texts, solution=[r"\frac{1}{3}", r"\sqrt{2}", "Hello", "3 and 4\n#### 42"]) == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is not None, reason="math-verify is installed")
def test_a_missing_package_is_named():
    with pytest.raises(ValueError, match=r"'math_verify' needs a package: pip install 'zotune\[math\]'"):
        load("math_verify")


OWN = """from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Judge:
    calls: int = 0

    def half(self, completions):
        self.calls += 1
        return [0.5 * self.calls] * len(completions)

judge = Judge()
"""


def test_functions_come_from_modules_and_files(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    before, file = list(sys.path), f"{tmp_path}/own_rewards.py"
    assert rewards("own_rewards:judge.half", ["x"]) == [0.5]
    assert Rewards([f"{file}:judge.half", "own_rewards.py:judge.half"]).score(["p"], ["x"]).total == [1.5]  # one state for both
    assert sys.path == before
    del sys.modules["own_rewards"], sys.modules[str((tmp_path / "own_rewards.py").resolve())]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_mach", "unknown reward function 'exact_mach'; did you mean 'exact_match'?"),
        ("nowhere", "unknown reward function 'nowhere'; a function of your own is `module:function`"),
        ("no_such_module:f", "there is no module 'no_such_module' on the path"),
        ("json:lods", "'json' has no 'lods', which the reward 'json:lods' names; did you mean 'loads'"),
        ("math:pi", "the reward 'math:pi' must be a function, and it is of type float"),
        ("missing.py:f", "there is no file 'missing.py'"),
        ("broken.py:f", "'broken.py' of the reward 'broken.py:f' raised ZeroDivisionError when imported"),
        ("broken:f", "'broken' of the reward 'broken:f' raised ZeroDivisionError when imported"),
        ("ending:f", "'ending' of the reward 'ending:f' raised SystemExit when imported: 3"),
        ("needy:f", "'needy' of the reward 'needy:f' needs 'no_such_package'"),
    ],
)
def test_names_of_nothing_are_refused(name, message, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "ending.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load(name)
    assert message in str(error.value)


def test_right_answers_are_checked_before_anything_is_generated():
    rewards = Rewards("exact_match")
    rewards.check_rows([{"answer": "a"}, {"answer": None}, {"answer": ["b", 3]}], "mine")
    for wrong, message in (({"a": 1}, "mine, row 1, reward 'exact_match': the right answer"), ([["a"]], "row 1.* neither a text")):
        with pytest.raises(ValueError, match=message):
            rewards.check_rows([{"answer": "a"}, {"answer": wrong}], "mine")
    with pytest.raises(ValueError, match="no row has a right answer for the reward 'exact_match'"):
        rewards.check_rows([{"answer": None}, {"answer": []}], "mine")
