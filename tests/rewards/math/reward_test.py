"""Math rewards: equality with the gold answer, reasons, batches, and the benchmark files."""

import random
import re
import time
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import verify

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import score_completions
from rspo_jax.rewards.math import equivalence, shortcuts  # noqa: F401  makes math-verify fast
from rspo_jax.rewards.math.equivalence import _PREPARATIONS, _parse, compare
from rspo_jax.rewards.math.reward import MathReward, MathVerdict, Reason, gold_answers
from rspo_jax.rewards.table import make_reward
from rspo_jax.rewards.worker_pool import Outcome
from tests.support import math_cases
from tests.support.math_cases import PREPARED, STRICTER, Gold, plain
from tests.support.paths import DOCS

HANGS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def reward():
  with MathReward(workers=1, timeout=5.0) as math_reward:
    yield math_reward


# Equality


@pytest.mark.parametrize(("gold", "answer"), PREPARED)
def test_notations_that_math_verify_cannot_read_are_prepared_for_it(gold, answer):
  assert compare((gold, answer)) == "right"


@pytest.mark.parametrize(("gold", "answer"), STRICTER)
def test_different_answers_that_math_verify_equates_are_incorrect(gold, answer):
  assert verify(plain(gold), plain(answer))
  assert compare((gold, answer)) in ("wrong", "unparsed")
  assert compare((gold, gold)) == "right"


@pytest.mark.parametrize("index", range(len(_PREPARATIONS)))
def test_every_preparation_is_necessary(monkeypatch, index):
  steps = list(_PREPARATIONS)
  pattern, _ = steps.pop(index)
  monkeypatch.setattr(equivalence, "_PREPARATIONS", steps)
  monkeypatch.setattr(equivalence, "_parse_gold", _parse)
  changed = [compare(pair) != "right" for pair in PREPARED]
  changed += [compare(pair) == "right" for pair in STRICTER]
  assert any(changed), f"no case needs {pattern.pattern}"


WHOLE = st.integers(-3000, 3000)
NUMBERS = st.one_of(
  st.builds(str, WHOLE),
  st.builds("{:,}".format, WHOLE),
  st.builds("{:05d}".format, WHOLE),
  st.builds("{}.{}".format, WHOLE, st.integers(0, 999_999)),
  st.builds(".{}".format, st.integers(0, 99)),
  st.builds(r"{}\pi".format, WHOLE),
  st.builds(r"{}\sqrt{{{}}}".format, WHOLE, st.integers(2, 99)),
  st.builds("{}/{}".format, WHOLE, st.integers(1, 12)),
  st.builds(r"\frac{{{}}}{{{}}}".format, st.integers(0, 40), st.integers(1, 12)),
  st.builds(r"-\dfrac{{{}}}{{{}}}".format, st.integers(0, 40), st.integers(1, 12)),
)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, NUMBERS, st.integers(1, 5))
def test_numbers_are_compared_as_math_verify_compares_them(gold, other, times):
  same = re.sub(r"(\d+)(\D+)(\d+)(?=\}?$)", lambda m: f"{times * int(m[1])}{m[2]}{times * int(m[3])}", gold)
  for answer in (gold, other, same if "/" in gold or "frac" in gold else gold + ".0" * ("." not in gold)):
    assert (compare((gold, answer)) == "right") == verify(plain(gold), plain(answer))


@pytest.mark.parametrize(
  ("gold", "answer", "equality"),
  [
    ("5", "", "unparsed"),
    ("", "", "unparsed"),
    ("5", r"\frac{", "unparsed"),
    ("f(x)=ax, where a > 0", "f(x)=ax, where a > 0", "right"),
    ("f(x)=ax, where a > 0", "f(x)=ax", "wrong"),
    ("5", "5 million", "wrong"),
    ("2", "2 pi", "wrong"),
    ("2ab", "2 ab", "right"),
    ("5m^2", "5 m^2", "right"),
    ("5", "5x", "wrong"),
    ("8", "8 or 9", "wrong"),
    ("5", "9" * 5000, "unparsed"),
  ],
)
def test_unreadable_answers_are_unparsed_unless_they_are_the_same_text(gold, answer, equality):
  assert compare((gold, answer)) == equality


# Batches


def test_every_reason_occurs_and_a_hanging_answer_affects_no_other():
  texts = [r"\boxed{5}", r"\boxed{6}", "none", r"\boxed{\frac{5}{}}", HANGS, "#### 5", "It is 5.", "It is 6."]
  with MathReward(workers=2, timeout=2.0, format_reward=0.25) as reward:
    begin = time.monotonic()
    scores = score_completions(reward, texts, [Example("x", "5")] * len(texts))
    assert time.monotonic() - begin < 10
  assert scores.reason == ("right", "wrong", "no answer", "unparsed", "timeout", "right", "right", "wrong")
  assert scores.success.tolist() == [reason == "right" for reason in scores.reason]
  assert scores.format.tolist() == [True, True, False, False, False, True, False, False]
  assert scores.reward.tolist() == [1, 0.25, 0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("outcome", [Outcome("died", "exit status -9"), Outcome("error", "MemoryError")])
def test_an_answer_that_raises_or_ends_its_worker_is_failed(reward, monkeypatch, outcome):
  monkeypatch.setattr(reward._pool, "map", lambda pairs: [outcome] * len(pairs))
  assert reward.verdicts(["5"], ["5"]) == [MathVerdict(False, "failed", "number", "5")]


def test_equal_pairs_of_gold_answer_and_answer_are_compared_once(reward, monkeypatch):
  compared = []
  monkeypatch.setattr(
    reward._pool, "map", lambda pairs: compared.extend(pairs) or [Outcome("ok", "right")] * len(pairs)
  )
  assert all(verdict.success for verdict in reward.verdicts(["5", r"\boxed{5}", "5", "6"], ["5", "5", "7", "7"]))
  assert compared == [("5", "5"), ("7", "5"), ("7", "6")]


def test_any_alternative_is_correct_and_all_parts_are_required(reward):
  golds = [["7", r"\frac{1}{2}"], [["1", "2"], "3"], ("3",)]
  texts = [r"\boxed{0.5}", r"\boxed{2, 1}", r"\boxed{1}"]
  assert [verdict.reason for verdict in reward.verdicts(texts, golds)] == ["right", "right", "wrong"]


@pytest.mark.parametrize("gold", [5, None, [], "", [" "], [[]], {"a": 1}])
def test_a_gold_answer_of_another_kind_is_refused(gold):
  with pytest.raises(ValueError, match="want LaTeX text"):
    gold_answers(gold)


def test_a_single_completion_is_scored_as_in_a_batch(reward):
  assert reward(r"\boxed{\dfrac{1}{2}}", Example("x", "0.5")) == (1.0, True, True, "right", r"\dfrac{1}{2}")


def test_math_reward_is_built_by_name_with_its_options():
  with make_reward("math", workers=1, forms=("boxed",)) as reward:
    assert reward("5", Example("x", "5")) == (0.0, False, False, "no answer", "")


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ({"format_reward": 1.0}, "less than a correct answer"),
    ({"forms": ()}, "want one or more of boxed"),
    ({"forms": ("box",)}, "want one or more of boxed"),
    ({"timeout": 0.0}, "timeout is 0"),
    ({"workers": 0}, "workers is 0"),
  ],
)
def test_settings_out_of_range_are_refused(setting, message):
  with pytest.raises(ValueError, match=message):
    MathReward(**setting)


def test_the_document_lists_every_reason():
  text = (DOCS / "math_rewards.md").read_text()
  assert re.findall(r"^\| `([\w ]+)` \|", text, re.MULTILINE) == list(typing.get_args(Reason))


# Benchmark files


OF_ALL_KINDS = (
  *(
    "204",
    "-7",
    "1,000,000",
    "27.0",
    ".0035",
    "0",
    r"\frac{3}{56}",
    r"1\frac{4}{5}",
    r"7\sqrt{15}",
    r"\frac 59",
    "4.5e-12",
  ),
  *(r"\$18.90", r"35^\circ", "17.5%", r"864 \mbox{ inches}^2", r"\frac{270}{7}\text{ degrees}", "306_{9}"),
  *(r"\text{Maria}", r"\text{(C)}", "x=5", "$f(n)=n^{2}$", r"x \in [-3,7]", r"1 \pm \sqrt{19}", "1,-2", "16,3,1,1"),
  *("(3,4]", r"(-\infty, 2) \cup (3, \infty)", r"\left( 3, \frac{\pi}{2} \right)", "$(1,8,19), (2,7,13)$", "$69$,$84$"),
  *(r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", "x^3+3x-6", r"$\lfloor n / 2\rfloor+1$", "6-5i", r"k \geqslant 2"),
)


def errors(reward, golds):
  """Compares verdicts with the labels of the cases.

  Returns:
    (rejected, accepted, number of correct completions, number of incorrect ones): correct completions that are rejected
    and incorrect ones that are accepted, each with its gold answer and the name of its case.
  """
  correct = [(gold.answer, name, text) for gold in golds for name, text in math_cases.correct(gold).items()]
  incorrect = [(gold.answer, name, text) for gold in golds for name, text in math_cases.incorrect(gold).items()]
  verdicts = reward.verdicts([text for *_, text in correct + incorrect], [gold for gold, *_ in correct + incorrect])
  rejected = [(*case, verdict.reason) for case, verdict in zip(correct, verdicts, strict=False) if not verdict.success]
  accepted = [case for case, verdict in zip(incorrect, verdicts[len(correct) :], strict=True) if verdict.success]
  return rejected, accepted, len(correct), len(incorrect)


def test_gold_answers_of_all_kinds_are_correct_in_every_notation_and_their_variants_are_incorrect(reward):
  golds = [Gold(answer, re.sub(r"(?<!\\)\$", "", answer), "") for answer in OF_ALL_KINDS]
  rejected, accepted, corrects, incorrects = errors(reward, golds)
  assert (rejected, accepted) == ([], [])
  assert corrects > 20 * len(golds) / 2 and incorrects > 5 * len(golds)


def _golds(name):
  try:
    return math_cases.golds(name)
  except FileNotFoundError:
    pytest.skip(f"{name}.jsonl is not in {math_cases.DATA}: the benchmark files are not part of the project")


@pytest.mark.parametrize("name", math_cases.FILES)
def test_some_gold_answers_of_each_file_are_correct_and_their_variants_are_incorrect(reward, name):
  rejected, accepted, *_ = errors(reward, random.Random(name).sample(_golds(name), 4))
  assert (rejected, accepted) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("name", math_cases.FILES)
def test_all_gold_answers_of_each_file_are_correct_and_their_variants_are_incorrect(reward, name):
  golds, begin = _golds(name), time.monotonic()
  rejected, accepted, corrects, incorrects = errors(reward, golds)
  print(
    f"{name}: {len(golds)} gold answers; of {corrects:,} correct completions {corrects - len(rejected):,} accepted, of "
    f"{incorrects:,} incorrect ones {len(accepted):,}; {time.monotonic() - begin:.0f} s"
  )
  assert (rejected, accepted) == ([], [])
