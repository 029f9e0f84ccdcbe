"""Gold answers of the public benchmark files, with other notations of each and incorrect answers for each."""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from math_verify import LatexExtractionConfig, parse

from rspo_jax.tasks.answers import extract_answer
from tests.support.paths import SHARED

DATA = SHARED
FILES = ("aime24", "amc23", "math500", "minerva_math", "olympiadbench", "gsm8k", "gsm8k_train")

NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d+)?)e(-?\d+)")


class Gold(NamedTuple):
  """answer: as in the file. bare: without dollar signs and full stop. unit: of OlympiadBench, bare; often ''."""

  answer: str
  bare: str
  unit: str


def golds(name: str) -> list[Gold]:
  """One per record of a file. FileNotFoundError if it is absent."""
  return [_gold(name, json.loads(line)) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def _gold(name: str, record: dict) -> Gold:
  if name == "minerva_math":
    answer = extract_answer(record["solution"]).answer
  elif name == "olympiadbench":
    (answer,) = record["final_answer"]
  else:
    answer = str(record["answer"]).rpartition("####")[2].strip()
  return Gold(answer, _bare(answer), _bare(record.get("unit") or ""))


def _bare(answer: str) -> str:
  return re.sub(r"(?<!\\)\$", "", answer).strip().rstrip(".")


def _parts(answer: str) -> list[str]:
  """The parts between commas that are outside all brackets."""
  parts, depth = [""], 0
  for character in answer:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += character
  return [part.strip() for part in parts]


def _elements(answer: str) -> list[str]:
  """The elements of a list or set without braces; [] for anything else."""
  number = NUMBER.fullmatch(re.sub(r"\\[!$]|\s", "", answer))
  parts = _parts(answer)
  return [] if number or len(parts) < 2 or "where" in answer or answer.startswith(r"x=\frac{1}{6}") else parts


def _boxed(answer: str) -> str:
  return f"We get $x$ from 7 and 12.\n\nSo it is $\\boxed{{{answer}}}$."


def correct(gold: Gold) -> dict[str, str]:
  """Correct completions, by the name of their notation."""
  bare = gold.bare
  texts = {
    "boxed": _boxed(bare),
    "boxed as in the file": _boxed(gold.answer),
    "display": f"\\[ \\boxed{{{bare}}} \\]\nas 3 steps show",
    "fbox": f"Thus $$\\fbox{{ {bare} }}$$",
    "####": f"17 steps of 3.\n#### {gold.answer}",
    "#### dollars": f"17 steps of 3.\n#### ${bare}$\n",
    "sentence": f"**Answer.** After 4 steps the answer is $\\boxed{{{bare}}}$. I hope it is right, in 5 minutes.",
  }
  if NUMBER.fullmatch(bare):
    plain = bare.replace(",", "")
    texts |= {
      "number": bare,
      "number in words": f"She needs {bare} of them.",
      "number in bold": f"The answer is **{plain}**.",
      "money in words": f"Total cost: ${bare}.",
      "#### money": f"#### ${bare}",
      "#### words": f"#### {bare} dollars",
      "#### bold": f"#### **{bare}**",
    }
  for ways in (_notations, _numbers, _units, _words, _equations, _matrices, _lists, _intervals):
    texts |= {name: _boxed(answer) for name, answer in ways(gold) if answer != bare}
  return texts


def _notations(gold: Gold) -> Iterator[tuple[str, str]]:
  bare = gold.bare
  for old, new in ((r"\frac", r"\dfrac"), (r"\frac", r"\tfrac"), (r"\dfrac", r"\frac")):
    if old in bare:
      yield new, bare.replace(old, new)
  yield "slash", re.sub(r"(?<![\d}\w ])\\d?frac\{(\d+)\}\{(\d+)\}(?!\s*[\\\w(])", r"\1/\2", bare)
  yield "braces of a fraction", re.sub(r"\\(d?)frac ?(\d) ?(\d)(?!\d)", r"\\\1frac{\2}{\3}", bare)
  if mixed := re.fullmatch(r"(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", bare):
    whole, over, under = map(int, mixed.groups())
    yield "improper", rf"\frac{{{whole * under + over}}}{{{under}}}"
    yield "mixed", rf"{whole}\frac{{{over}}}{{{under}}}"
    yield "mixed with a slash", f"{whole} {over}/{under}"
  if r"\left" in bare:
    yield "no left", bare.replace(r"\left", "").replace(r"\right", "")
  elif "(" in bare or bare.startswith("["):
    yield "left", re.sub(r"([)\]])", r"\\right\1", re.sub(r"([(\[])", r"\\left\1", bare))
  if not re.search(r"[a-z]{3}", re.sub(r"\\[a-z]+", "", bare)):
    yield "tight", re.sub(r"(?<!\\) +(?![a-zA-Z])", "", bare)
  if based := re.fullmatch(r"(\d+)_\{?(\d+)\}?", bare):
    yield "base", f"{based[1]}_{based[2]}"
    yield "base in braces", f"{based[1]}_{{{based[2]}}}"
    yield "no base", based[1]
  if r"\pm" in bare and "," not in bare:
    middle, difference = bare.split(r"\pm")
    yield "plus and minus", f"{middle}+{difference}, {middle}-{difference}"
    yield "minus and plus", f"{middle}-{difference}, {middle}+{difference}"


def _numbers(gold: Gold) -> Iterator[tuple[str, str]]:
  if NUMBER.fullmatch(gold.bare):
    plain = gold.bare.replace(",", "")
    yield from (("plain", plain), ("approximately", rf"\approx {plain}"), ("equals", f"= {plain}"))
    yield from (("parentheses", rf"\( {plain} \)"), ("text", rf"\text{{{plain}}}"), ("bold", rf"\textbf{{({plain})}}"))
    if re.fullmatch(r"-?\d+", plain):
      yield from (("decimals", f"{plain}.0"), ("stop", f"{plain}."), ("fraction", rf"\frac{{{2 * int(plain)}}}{{2}}"))
      if abs(int(plain)) >= 1000:
        for comma in (",", "{,}", r",\!", r"\,"):
          yield f"thousands {comma}", f"{int(plain):,}".replace(",", comma)
  if scientific := SCIENTIFIC.fullmatch(gold.bare):
    for times in (r"\times", r"\cdot"):
      for unit in ("", r" \mathrm{~cm}", r"\,\text{m/s}"):
        yield f"{times}{unit}", rf"{scientific[1]} {times} 10^{{{scientific[2]}}}{unit}"


LATEX_UNITS = (
  *(r"\text{ cm}", r"\ \text{cm}", r"\,\mathrm{cm}", r"~\text{units}", r"\text{ cm}^2", r"\mathrm{~m}/\mathrm{s}"),
  *(r"\text{ square units}", r" \text{ kg m/s}^2", r"\text{ meters per second}", r"\ \mathrm{cm}^{3}", r"\ {\rm eV}"),
  *(" dollars", " apples", " cm^2", " minutes", " feet", r"^\circ\mathrm{C}"),
)


def _units(gold: Gold) -> Iterator[tuple[str, str]]:
  bare, unit = gold.bare, gold.unit
  if NUMBER.fullmatch(bare):
    plain = bare.replace(",", "")
    for other in LATEX_UNITS:
      yield f"unit {other}", plain + other
    yield from (("money", rf"\${bare}"), ("money unescaped", f"${bare}"))
  if unit.startswith("^"):
    yield "its unit", bare + unit
  elif unit == "%":
    yield from (("its unit", f"{bare}%"), ("its unit escaped", rf"{bare}\%"))
  elif unit:
    yield from (("its unit", rf"{bare}\text{{ {unit}}}"), ("its unit bare", f"{bare} {unit}"))
    yield "its unit upright", rf"{bare}\ \mathrm{{{unit}}}"
  if degrees := re.fullmatch(r"(.*)\^\{?\\circ\}?", bare):
    for sign in ("", "°", r"^\circ", r"^{\circ}", " degrees", r"\text{ degrees}", r"\degree"):
      yield f"degrees {sign}", degrees[1] + sign
  if percent := re.fullmatch(r"([\d.]+) ?\\?%", bare):
    for sign in ("", "%", r"\%", r" \%", r"\text{ percent}", " percent"):
      yield f"percent {sign}", percent[1] + sign
    yield "percent as a number", f"{float(percent[1]) / 100:g}"
  if money := re.fullmatch(r"\\\$(.*)", bare):
    yield from (("no money", money[1]), ("dollars", rf"{money[1]}\text{{ dollars}}"), ("unescaped", f"${money[1]}"))
  if measured := re.fullmatch(r"(.*\d[}]?) ?\\(?:text|mbox)\{ ?(.*)\}(\^2)?", bare):
    number, word, power = measured[1], measured[2], measured[3] or ""
    yield from (("without its unit", number), ("unit upright", rf"{number}\,\mathrm{{{word}}}{power}"))
    yield "unit in words", f"{number} {word}{power}"


def _words(gold: Gold) -> Iterator[tuple[str, str]]:
  if word := re.fullmatch(r"\\text\{\(?(\w+)\)?\}", gold.bare):
    for way in ("%s", r"\text{%s}", r"\textbf{%s}", r"\mathrm{%s}", r"\text{ %s }", r"\mathbf{%s}"):
      yield f"word {way}", way % word[1]
    if len(word[1]) == 1:
      for way in ("(%s)", r"\textbf{(%s)}", r"\text{(%s)}", r"\mathrm{(%s)}"):
        yield f"choice {way}", way % word[1]
    else:
      yield from (("capital", word[1].capitalize()), ("word and stop", rf"\text{{{word[1]}.}}"))


def _equations(gold: Gold) -> Iterator[tuple[str, str]]:
  bare = gold.bare
  if NUMBER.fullmatch(bare):
    yield from (("equation", f"x = {bare.replace(',', '')}"), ("value", f"f(2)={bare.replace(',', '')}"))
  assignment = re.fullmatch(r"([a-zA-Z](?:\([a-z]\))?|[a-zA-Z]_\{[^{}]*\}) ?= ?(.*)", bare)
  if assignment and "where" not in bare:
    yield "spaced equation", f"{assignment[1]} = {assignment[2]}"
    if "," not in bare and not (assignment[1] == "y" and "x" in assignment[2]):
      yield "right side", assignment[2]
  if member := re.fullmatch(r"x \\in (.*)", bare):
    yield "set alone", member[1]
  if r"\geqslant" in bare:
    yield from (("ge", bare.replace(r"\geqslant", r"\ge")), ("geq", bare.replace(r"\geqslant", r"\geq")))


def _matrices(gold: Gold) -> Iterator[tuple[str, str]]:
  bare = gold.bare
  if "matrix" in bare:
    yield "brackets", bare.replace("pmatrix", "bmatrix")
    yield "fractions", re.sub(r"(\d+)/(\d+)", r"\\frac{\1}{\2}", bare)
    yield "dfractions", re.sub(r"(\d+)/(\d+)", r"\\dfrac{\1}{\2}", bare)
    yield "tight matrix", bare.replace(" ", "")
    opened = bare.replace(r"\begin{pmatrix}", r"\left[\begin{matrix}")
    yield "left matrix", opened.replace(r"\end{pmatrix}", r"\end{matrix}\right]")


def _lists(gold: Gold) -> Iterator[tuple[str, str]]:
  if elements := _elements(gold.bare):
    turned = elements[::-1]
    yield from (("reversed", ", ".join(turned)), ("rotated", ", ".join(elements[1:] + elements[:1])))
    if "=" not in gold.bare:
      yield from (("set", rf"\{{{', '.join(turned)}\}}"), ("left set", rf"\left\{{{', '.join(elements)}\right\}}"))
      yield "and", f"{', '.join(elements[:-1])} and {elements[-1]}"
      yield "and as text", rf"{', '.join(elements[:-1])} \text{{ and }} {elements[-1]}"


def _intervals(gold: Gold) -> Iterator[tuple[str, str]]:
  bare = gold.bare
  if r"\infty" in bare and not bare.startswith(r"(-\infty"):
    yield "plus infinity", bare.replace(r"\infty", r"+\infty")
  if r"\cup" in bare:
    pieces = [piece.strip() for piece in bare.split(r"\cup")]
    yield from (("union in another order", r" \cup ".join(pieces[::-1])), ("tight union", r"\cup".join(pieces)))


def incorrect(gold: Gold) -> dict[str, str]:
  """Incorrect completions, by the name of their mistake."""
  bare = gold.bare
  texts = {"no answer": "I do not know.", "empty box": r"\boxed{}"}
  if NUMBER.fullmatch(bare.replace(r"\$", "")):
    plain = bare.replace(",", "").replace(r"\$", "")
    other = repr(float(plain) + 1)
    texts |= {
      "other number in words": f"The answer is {other}.",
      "correct, then another": f"First {plain}, but then it is {other}",
      "correct, then ####": f"It is {plain}.\n#### {other}",
    }
  for ways in (
    _other_numbers,
    _other_signs,
    _other_equations,
    _other_values,
    _other_ends,
    _other_elements,
    _other_words,
  ):
    texts |= {name: _boxed(answer) for name, answer in ways(gold) if answer != bare}
  return texts


def _other_numbers(gold: Gold) -> Iterator[tuple[str, str]]:
  bare = gold.bare
  for index, number in enumerate([*re.finditer(r"\d+", bare)][:6]):
    if not re.search(r"\\(?:mbox|text)\{", bare[: number.start()]):  # not the power of a unit
      yield f"number {index}", f"{bare[: number.start()]}{int(number[0]) + 1}{bare[number.end() :]}"


def _other_signs(gold: Gold) -> Iterator[tuple[str, str]]:
  bare = gold.bare
  for sign in re.finditer(r"(?<=[\w)}])( ?)([+-])(?= ?[\w\\(])", bare):
    before = bare[: sign.start()]
    if r"\infty" not in bare and not re.search(r"[_^]\{[^{}]*$", before):
      yield "sign inside", f"{before}{sign[1]}{'-' if sign[2] == '+' else '+'}{bare[sign.end() :]}"
      break


def _other_equations(gold: Gold) -> Iterator[tuple[str, str]]:
  for derivative in (r"\frac{d", r"x^{\prime}", r"y^{\prime}", r"\ddot", r"\dot"):
    if derivative in gold.bare and "=" in gold.bare:
      yield f"twice {derivative}", gold.bare.replace(derivative, rf"2 {derivative}", 1)


def _other_values(gold: Gold) -> Iterator[tuple[str, str]]:
  bare = gold.bare
  if NUMBER.fullmatch(bare.replace(r"\$", "")):
    plain = bare.replace(",", "").replace(r"\$", "")
    value = float(plain)
    yield from (("list", f"{plain}, {int(value) + 1}"), ("tuple", f"({plain}, {int(value) + 1})"))
    yield "word", r"\text{none}"
    if value:
      yield from (("negated", plain[1:] if value < 0 else f"-{plain}"), ("times ten", repr(value * 10)))
      yield from (("half", repr(value / 2)), ("one percent off", repr(value * 1.01)), ("with a letter", f"{plain}x"))
      if abs(value) != 1:
        yield from (("reciprocal", rf"\frac{{1}}{{{plain}}}"), ("squared", f"{plain}^2"))
  elif scientific := SCIENTIFIC.fullmatch(bare):
    mantissa, exponent = scientific.groups()
    yield "exponent", rf"{mantissa} \times 10^{{{int(exponent) + 1}}}"
    yield "exponent less", f"{mantissa}e{int(exponent) - 1}"
    yield "one percent off", rf"{float(mantissa) * 1.01} \times 10^{{{exponent}}}"
    yield "negated", rf"-{mantissa} \times 10^{{{exponent}}}"
    yield from (("mantissa", mantissa), ("zero", "0"))
  elif not re.search(r"[=,\[\]]|\\text|matrix|\\infty|\\pm|\\cup|\\in |geq|_\{?\d\}?$|np\.", bare):
    yield from (("negated", f"-({bare})"), ("one more", f"{bare}+1"), ("twice", rf"2 \cdot ({bare})"))


def _other_ends(gold: Gold) -> Iterator[tuple[str, str]]:
  bare = re.sub(r"\\(?:left|right)", "", gold.bare)
  if re.fullmatch(r"[(\[].*,.*[)\]]", bare) and ("]" in bare or r"\infty" in bare or r"\cup" in bare):
    if not bare.startswith(r"(-\infty"):
      yield "left end", ("[" if bare[0] == "(" else "(") + bare[1:]
    if not re.search(r"\\infty ?\)$", bare):
      yield "right end", bare[:-1] + (")" if bare[-1] == "]" else "]")


def _other_elements(gold: Gold) -> Iterator[tuple[str, str]]:
  bare = re.sub(r"\\(?:left|right)", "", gold.bare)
  if elements := _elements(gold.bare):
    yield from (("last missing", ", ".join(elements[:-1])), ("first missing", ", ".join(elements[1:])))
    yield "one too many", ", ".join([*elements, "987"])
  if re.fullmatch(r"\([^()]*(?:\([^()]*\)[^()]*)*\)", bare) and "infty" not in bare and len(_parts(bare[1:-1])) > 1:
    entries = _parts(bare[1:-1])
    yield from (("entry missing", f"({', '.join(entries[:-1])})"), ("entry more", f"({', '.join(entries)}, 987)"))
    if entries != entries[::-1]:
      yield "entries reversed", f"({', '.join(entries[::-1])})"
  if "matrix" in bare:
    rows = re.sub(r"\\(?:begin|end)\{pmatrix\}", "", bare).split(r"\\")
    for name, other in (("row missing", rows[:-1]), ("rows reversed", rows[::-1]), ("row more", rows + rows[:1])):
      yield name, r"\begin{pmatrix}" + r"\\".join(other) + r"\end{pmatrix}"


def _other_words(gold: Gold) -> Iterator[tuple[str, str]]:
  if gold.bare.startswith(r"\text"):
    yield from (
      ("other word", r"\text{(F)}" if "(" in gold.bare else r"\text{maybe}"),
      ("letter", "F"),
      ("number", "12"),
    )


PREPARED = [  # (gold, answer): equal, but only after one of our preparations
  (r"9 \mbox{ inches}^2", r"$9 \mbox{ inches}^2$"),
  ("5", r"\approx 5"),
  ("5", r"**5\,**."),
  ("(3,4]", "(3,4]."),
  ("90", "90°"),
  ("90", r"90\degree"),
  ("5", r"5~\text{units}"),
  ("5", r"5\ {\rm eV}"),
  ("12345", r"12\,345"),
  (r"\text{east}", r"\text{east.}"),
  ("5", r"\text{5 cm}"),
  ("v_{max}+1", r"v_{\text{max}}+1"),
  ("v_{max}+1", r"v_\text{max}+1"),
  ("n^2-1", r"m_{\max }=n^2-1"),
  (r"2M_{\odot}", r"M_\odot \cdot 2"),
  ("73", r"\textbf{(073)}"),
  ("16,3,4", r"16, 3 \text{ and } \frac{8}{2}"),
  ("16,3,1,1", "16, 3, 1 and 1"),
  (r"\frac{3}{4}", r"\frac{3}{4}\,\text{m}\cdot\text{s}^{-1}"),
  (r"\arcsin(10/13)", "np.arcsin(10/13)"),
  ("E_{1},E_{2}", "E_2, E_1"),
  (r"(\gamma^2-1)m", r"m(\gamma^2-1)"),
  ("-1/3", "-1./3"),
  ("7/4", "1 3/4"),
  (r"4.5 \times 10^{33}", "4.5e33"),
  (r"\frac{600}{7}", r"\frac{600}{7} km/h"),
]
STRICTER = [  # (gold, answer): different, but math-verify equates them
  ("52_8", "52_9"),
  ("16,3,1,1", "16,3,1"),
  ("0.0000000074", "0.0000000084"),
  (r"\frac{1}{4000000}", "0.0000003"),
  (r"7.4 \times 10^{-18}", r"7.5 \times 10^{-18}"),
  (r"x_{\text{max}}+\frac{1}{2}", r"x_{\text{max}}+\frac{1}{3}"),
  ("2", r"2 \text{ times } \sqrt{3}"),
  (r"m\frac{dv}{dt}+bv=f", r"2m\frac{dv}{dt}+bv=f"),
  (r"\Gamma^2-1", r"\Gamma^2-2"),
]


def plain(answer):
  """An answer as parsed by math-verify alone."""
  return parse(rf"\boxed{{{answer}}}", [LatexExtractionConfig(boxed_match_priority=0)], extraction_mode="first_match")
