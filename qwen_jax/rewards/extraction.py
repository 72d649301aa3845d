"""Where in an answer the final answer stands, and whether it stands there as it was asked to."""

import re
from fractions import Fraction
from typing import Literal

Form = Literal["whole", "number", "tag", "boxed"]

# What a prompt may say, so that the model knows how it will be read.
ASKS = {
    "whole": "Answer with nothing but the final answer.",
    "number": "End with the final answer as a number.",
    "tag": "Give the final answer as <answer>...</answer>.",
    "boxed": r"Give the final answer as \boxed{...}.",
}
# A minus is a sign unless something stands before it that it may subtract from; commas count in groups of three.
_NUMBER = re.compile(r"(?<![0-9.])(?:(?<![\w)])-)?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?![0-9])")
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def extract(answer: str, form: Form) -> str | None:
    """Returns the final answer without the space around it, None where there is none.

    Of several the last one counts: a model that corrects itself means what it said last.

    Args:
      answer: the whole of what the model said.
      form: "whole": all of it; "number": a number, its commas taken off; "tag": <answer>...</answer>; "boxed":
        \\boxed{...}, whose braces may hold braces.
    """
    if form == "whole":
        found = [answer]
    elif form == "number":
        found = [number.replace(",", "") for number in _NUMBER.findall(answer.replace("\N{MINUS SIGN}", "-"))]
    elif form == "tag":
        found = _TAG.findall(answer)
    else:
        found = _boxed(answer)
    return (found[-1].strip() or None) if found else None


def well_formed(answer: str, form: Form) -> bool:
    """Whether the final answer stands in the form that was asked for, once, and nothing follows but punctuation."""
    if extract(answer, form) is None:
        return False
    text = answer.strip().rstrip(".!")
    if form == "tag":
        return text.endswith("</answer>") and text.count("<answer>") == text.count("</answer>") == 1
    if form == "boxed":
        # A formula ends with its own marks.
        return text.rstrip("$ )]\\").endswith("}") and text.count("\\boxed{") == 1
    return form == "whole" or text[-1:].isdigit()


def _boxed(text: str) -> list[str]:
    """What stands in each \\boxed{...} whose braces close, in order."""
    found = []
    for start in (match.end() for match in re.finditer(r"\\boxed\{", text)):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                found.append(text[start:place])
                break
    return found


def number(text: str) -> Fraction | None:
    """Returns the number that a text spells, exactly; None where it spells none."""
    try:
        return Fraction(text.replace(",", "").strip())
    except (ValueError, ZeroDivisionError):
        return None
