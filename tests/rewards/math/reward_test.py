"""Math rewards: what is taken for the answer, what is right, and why not."""

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
from rspo_jax.rewards.math import equivalence, shortcuts  # noqa: F401  it makes math-verify fast
from rspo_jax.rewards.math.equivalence import _PREPARATIONS, _parse, compare
from rspo_jax.rewards.math.reward import MathReward, MathVerdict, Reason, gold_answers
from rspo_jax.rewards.table import make_reward
from rspo_jax.rewards.worker_pool import Outcome
from rspo_jax.tasks.answers import FORMS, extract_answer
from tests.support import math_cases
from tests.support.math_cases import PREPARED, STRICTER, Gold, plain
from tests.support.paths import DOCS

HANGS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def reward():
  with MathReward(workers=1, timeout=5.0) as made:
    yield made


# What is taken for the answer


@pytest.mark.parametrize(
  ("text", "answer", "form"),
  [
    ("", None, "none"),
    ("I do not know", None, "none"),
    (r"\boxed{5} and then \boxed{6}, not 7.", "6", "boxed"),
    (r"\boxed{ \frac{1}{2} } #### 3", r"\frac{1}{2}", "boxed"),
    (r"\fbox {7}", "7", "boxed"),
    (r"\boxed{\fbox{8}}", "8", "boxed"),
    (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right.", "boxed"),
    (r"}} \boxed{3} {{ \boxed{4", "3", "boxed"),
    (r"\boxed{a} \boxed{}", "a", "boxed"),
    (r"\boxed{} so 9", "9", "number"),
    (r"\unboxed{5}", "5", "number"),
    ("#### 4\n#### 5 \n6", "5", "####"),
    ("####\n\n 5", "5", "####"),
    ("#### \nno", "no", "####"),
    ("5 ####", "5", "number"),
    ("It costs $1,234.50.", "1,234.50", "number"),
    ("It is -4.", "-4", "number"),
    ("It is −4.", "−4", "number"),
    ("10-5", "5", "number"),
    ("15 cm^2 of a_1 and x2", "15", "number"),
    ("10^3", None, "none"),
    (r"90^\circ", "90", "number"),
    ("50 %", "50 %", "number"),
    (r"12\,345 or 1{,}000", "1{,}000", "number"),
    ("4.5e-12", "4.5e-12", "number"),
    ("3/4", "3/4", "number"),
    ("1 3/4 hours", "1 3/4", "number"),
    (r"-\dfrac{3}{4}", r"-\dfrac{3}{4}", "number"),
    (r"1\frac{3}{4}", r"1\frac{3}{4}", "number"),
    (".5", ".5", "number"),
  ],
)
def test_the_answer_is_the_last_box_else_the_last_hashes_else_the_last_number(text, answer, form):
  assert extract_answer(text) == (answer, form)


PIECES = st.sampled_from([*r"\{}#0159.,-+/^_ ax%$" + "\n", r"\boxed{", r"\fbox{", "####", r"\frac{", r"\{", r"\}"])


@given(st.lists(PIECES, max_size=40).map("".join))
def test_any_text_has_at_most_one_answer_and_it_stands_in_the_text(text):
  answer, form = extract_answer(text)
  assert (answer is None) == (form == "none")
  assert answer is None or (answer in text and answer == answer.strip() != "")


BALANCED = st.recursive(
  st.text(alphabet=r"0159.,-+/^_ ax%$#", max_size=5) | st.sampled_from([r"\{", r"\}", r"\\", r"\frac"]),
  lambda inner: st.lists(inner, max_size=3).map("".join) | inner.map(lambda text: f"{{{text}}}"),
  max_leaves=6,
)


@given(BALANCED, st.text(max_size=20), st.text(alphabet="xyz 0159#$\n", max_size=20))
def test_what_balances_in_a_box_comes_out_whole(inside, before, after):
  text = rf"{before} \boxed{{{inside}}} {after}"
  if inside.strip() and "\\" not in before[-1:]:
    assert extract_answer(text) == (inside.strip(), "boxed")


@given(st.integers(-(10**9), 10**9), st.sampled_from(["It is {}.", "= {}", "{} dollars", "**{}**", "(a) {}\n", "${}$"]))
def test_the_last_number_keeps_sign_and_thousands(number, sentence):
  for written in (str(number), f"{number:,}"):
    assert extract_answer("First 17, then " + sentence.format(written)) == (written, "number")


def test_only_forms_that_count_are_looked_at():
  text = r"\boxed{1} #### 2"
  assert [extract_answer(text, [form]).answer for form in FORMS] == ["1", "2", "2"]
  assert extract_answer("3", ["boxed", "####"]) == (None, "none")


@pytest.mark.parametrize("piece", [r"\boxed{", "{", "1,000", r"\frac{1}", "1/", "#", r"1\,", "-"])
def test_extraction_takes_time_linear_in_the_text(piece):
  def seconds(times):
    begin = time.process_time()
    extract_answer(piece * times)
    return time.process_time() - begin

  assert min(seconds(16_000) for _ in range(3)) < 64 * max(min(seconds(2_000) for _ in range(3)), 1e-4)


# What is right


@pytest.mark.parametrize(("gold", "answer"), PREPARED)
def test_what_math_verify_alone_cannot_read_is_prepared_for_it(gold, answer):
  assert compare((gold, answer)) == "right"


@pytest.mark.parametrize(("gold", "answer"), STRICTER)
def test_what_math_verify_takes_for_equal_by_mistake_is_not_right(gold, answer):
  assert verify(plain(gold), plain(answer))
  assert compare((gold, answer)) in ("wrong", "unparsed")
  assert compare((gold, gold)) == "right"


@pytest.mark.parametrize("place", range(len(_PREPARATIONS)))
def test_no_preparation_is_idle(monkeypatch, place):
  steps = list(_PREPARATIONS)
  pattern, _ = steps.pop(place)
  monkeypatch.setattr(equivalence, "_PREPARATIONS", steps)
  monkeypatch.setattr(equivalence, "_parse_gold", _parse)
  changed = [compare(pair) != "right" for pair in PREPARED]
  changed += [compare(pair) == "right" for pair in STRICTER]
  assert any(changed), f"nothing needs {pattern.pattern}"


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
def test_numbers_are_judged_as_math_verify_judges_them(gold, other, times):
  same = re.sub(r"(\d+)(\D+)(\d+)(?=\}?$)", lambda m: f"{times * int(m[1])}{m[2]}{times * int(m[3])}", gold)
  for answer in (gold, other, same if "/" in gold or "frac" in gold else gold + ".0" * ("." not in gold)):
    assert (compare((gold, answer)) == "right") == verify(plain(gold), plain(answer))


@pytest.mark.parametrize(
  ("gold", "answer", "found"),
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
def test_what_cannot_be_read_is_unparsed_unless_it_is_the_same_text(gold, answer, found):
  assert compare((gold, answer)) == found


# Batches


def test_every_reason_is_given_and_a_hanging_answer_costs_only_itself():
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
def test_an_answer_that_raises_or_ends_its_worker_has_failed(reward, monkeypatch, outcome):
  monkeypatch.setattr(reward._pool, "map", lambda pairs: [outcome] * len(pairs))
  assert reward.verdicts(["5"], ["5"]) == [MathVerdict(False, "failed", "number", "5")]


def test_equal_answers_to_equal_gold_answers_are_judged_once(reward, monkeypatch):
  judged = []
  monkeypatch.setattr(reward._pool, "map", lambda pairs: judged.extend(pairs) or [Outcome("ok", "right")] * len(pairs))
  assert all(verdict.success for verdict in reward.verdicts(["5", r"\boxed{5}", "5", "6"], ["5", "5", "7", "7"]))
  assert judged == [("5", "5"), ("7", "5"), ("7", "6")]


def test_any_alternative_is_right_and_all_parts_are_wanted(reward):
  golds = [["7", r"\frac{1}{2}"], [["1", "2"], "3"], ("3",)]
  texts = [r"\boxed{0.5}", r"\boxed{2, 1}", r"\boxed{1}"]
  assert [verdict.reason for verdict in reward.verdicts(texts, golds)] == ["right", "right", "wrong"]


@pytest.mark.parametrize("gold", [5, None, [], "", [" "], [[]], {"a": 1}])
def test_a_gold_answer_of_another_kind_is_refused(gold):
  with pytest.raises(ValueError, match="want LaTeX text"):
    gold_answers(gold)


def test_a_single_completion_is_judged_as_in_a_batch(reward):
  assert reward(r"\boxed{\dfrac{1}{2}}", Example("x", "0.5")) == (1.0, True, True, "right", r"\dfrac{1}{2}")


def test_the_table_of_rewards_makes_it_with_its_settings():
  with make_reward("math", workers=1, forms=("boxed",)) as reward:
    assert reward("5", Example("x", "5")) == (0.0, False, False, "no answer", "")


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ({"format_reward": 1.0}, "less than a right answer"),
    ({"forms": ()}, "want one or more of boxed"),
    ({"forms": ("box",)}, "want one or more of boxed"),
    ({"timeout": 0.0}, "timeout is 0"),
    ({"workers": 0}, "workers is 0"),
  ],
)
def test_impossible_settings_are_refused(setting, message):
  with pytest.raises(ValueError, match=message):
    MathReward(**setting)


def test_the_document_lists_every_reason():
  text = (DOCS / "math_rewards.md").read_text()
  assert re.findall(r"^\| `([\w ]+)` \|", text, re.MULTILINE) == list(typing.get_args(Reason))


# The witness


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


def judged(reward, golds):
  """The completions that are judged other than they should be, and how many of each kind there are."""
  right = [(gold.answer, name, text) for gold in golds for name, text in math_cases.right(gold).items()]
  wrong = [(gold.answer, name, text) for gold in golds for name, text in math_cases.wrong(gold).items()]
  verdicts = reward.verdicts([text for *_, text in right + wrong], [gold for gold, *_ in right + wrong])
  missed = [(*case, verdict.reason) for case, verdict in zip(right, verdicts, strict=False) if not verdict.success]
  taken = [case for case, verdict in zip(wrong, verdicts[len(right) :], strict=True) if verdict.success]
  return missed, taken, len(right), len(wrong)


def test_gold_answers_of_all_kinds_are_right_in_every_dressing_and_their_wrong_variants_are_not(reward):
  golds = [Gold(answer, re.sub(r"(?<!\\)\$", "", answer), "") for answer in OF_ALL_KINDS]
  missed, taken, rights, wrongs = judged(reward, golds)
  assert (missed, taken) == ([], [])
  assert rights > 20 * len(golds) / 2 and wrongs > 5 * len(golds)


def _golds(name):
  try:
    return math_cases.golds(name)
  except FileNotFoundError:
    pytest.skip(f"{name}.jsonl is not in {math_cases.DATA}: the benchmark files are not part of the project")


@pytest.mark.parametrize("name", math_cases.FILES)
def test_some_gold_answers_of_each_file_are_right_and_their_wrong_variants_are_not(reward, name):
  missed, taken, *_ = judged(reward, random.Random(name).sample(_golds(name), 4))
  assert (missed, taken) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("name", math_cases.FILES)
def test_no_gold_answer_of_a_file_is_marked_wrong_and_no_wrong_variant_right(reward, name):
  golds, begin = _golds(name), time.monotonic()
  missed, taken, rights, wrongs = judged(reward, golds)
  print(
    f"{name}: {len(golds)} gold answers, {rights - len(missed):,} of {rights:,} right; of {wrongs:,} wrong variants "
    f"{len(taken)} taken for right; {time.monotonic() - begin:.0f} s"
  )
  assert (missed, taken) == ([], [])
