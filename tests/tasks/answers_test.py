"""Extraction of the final answer from a text."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspo_jax.tasks.answers import FORMS, extract_answer


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
def test_any_text_has_at_most_one_answer_and_it_occurs_in_the_text(text):
  answer, form = extract_answer(text)
  assert (answer is None) == (form == "none")
  assert answer is None or (answer in text and answer == answer.strip() != "")


BALANCED = st.recursive(
  st.text(alphabet=r"0159.,-+/^_ ax%$#", max_size=5) | st.sampled_from([r"\{", r"\}", r"\\", r"\frac"]),
  lambda inner: st.lists(inner, max_size=3).map("".join) | inner.map(lambda text: f"{{{text}}}"),
  max_leaves=6,
)


@given(BALANCED, st.text(max_size=20), st.text(alphabet="xyz 0159#$\n", max_size=20))
def test_balanced_content_of_a_box_is_extracted_whole(inside, before, after):
  text = rf"{before} \boxed{{{inside}}} {after}"
  if inside.strip() and "\\" not in before[-1:]:
    assert extract_answer(text) == (inside.strip(), "boxed")


@given(st.integers(-(10**9), 10**9), st.sampled_from(["It is {}.", "= {}", "{} dollars", "**{}**", "(a) {}\n", "${}$"]))
def test_the_last_number_keeps_sign_and_thousands(number, sentence):
  for written in (str(number), f"{number:,}"):
    assert extract_answer("First 17, then " + sentence.format(written)) == (written, "number")


def test_only_accepted_forms_are_extracted():
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
