"""How items are written in a prompt, and where generated text ends."""

import re
from dataclasses import dataclass, replace

from megatron_mm1.data.records import Text
from megatron_mm1.evaluation.items import ImageFile, Item, Prompt

_MARK = re.compile(r"<image (\d+)>")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER_CUE = "The answer is"
"""In front of the answer at the end of a chain of thought."""


@dataclass(frozen=True)
class Template:
    """Format strings over an item's `question` and `choices` (lines "A. text"), `answer` and `rationale`.

    Attributes:
        question: the item without its answer; its images stand before it, or where "<image N>" marks say.
        cue: what follows and asks for the answer.
        answer: what follows in a demonstration.
        separator: behind a demonstration.
    """

    question: str
    cue: str
    answer: str = " {answer}"
    separator: str = "\n"

    def reasoned(self) -> "Template":
        """The same with a chain of thought: the reasoning, then the answer. Wording ours [C]."""
        cue = " Let's think step by step."
        return replace(self, cue=cue, answer=f" {{rationale}} {ANSWER_CUE} {{answer}}.")

    def asked(self, item: Item) -> Prompt:
        """The item, up to where the model goes on."""
        return _interleaved(self._text(item, self.question + self.cue), item.images)

    def answered(self, item: Item) -> Prompt:
        """The item as a demonstration."""
        return _interleaved(self._text(item, self.question + self.cue + self.answer) + self.separator, item.images)

    @staticmethod
    def _text(item: Item, form: str) -> str:
        answer = " ".join(item.answer.split())
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
        # A demonstration ends with its line: an answer over several would seem to end with the first.
        rationale = " ".join(item.rationale.split())
        return form.format(question=item.question, choices=choices, answer=answer, rationale=rationale)


CAPTION = Template(question="", cue="A photo of")
""" "{IMAGE} A photo of" [M, uncertain]."""
QUESTION = Template(question="Question: {question}", cue=" Short answer:")
""" "{IMAGE} Question: {q} Short answer:" [M, uncertain], as questions are trained."""
CHOICE = Template(
    question="Question: {question}\n{choices}\n",
    cue="Answer with the option's letter from the given choices directly. Answer:",
)
"""Wording ours [C]; the instruction is LLaVA-1.5's."""


@dataclass(frozen=True)
class Stopping:
    """Where generated text ends.

    Attributes:
        max_new_tokens: at most; 0: nothing is generated.
        strings: text ends before the first of these.
    """

    max_new_tokens: int
    strings: tuple[str, ...] = ("\n",)

    def reasoned(self) -> "Stopping":
        """For a chain of thought, whose sentences go on behind "." and ","."""
        return Stopping(max_new_tokens=max(512, self.max_new_tokens), strings=("\n", "Question:"))


CAPTION_STOPPING = Stopping(max_new_tokens=30)
"""At a newline [M]; the length is ours [C]."""
QUESTION_STOPPING = Stopping(max_new_tokens=16, strings=("\n", ".", ",", "Question"))
"""[M]; the length is ours [C]."""
ANSWER_STOPPING = Stopping(max_new_tokens=32, strings=("\n", "Question"))
"""Where answers have "." and "," in them: numbers, names in documents [C]."""


def extracted_answer(text: str) -> str:
    """What a chain of thought ends with: behind the last "The answer is"; the whole text where it never says so."""
    found = list(re.finditer(rf"{ANSWER_CUE}:?\s*", text, re.IGNORECASE))
    answer = text[found[-1].end() :] if found else text
    return answer.strip().rstrip(".").rstrip()


def _interleaved(text: str, images: tuple[ImageFile, ...]) -> Prompt:
    """Text with each image in the place of its marks, or before everything where it has none."""
    pieces = _MARK.split(text)
    mentioned = {int(number) for number in pieces[1::2]}
    parts: list[Text | ImageFile] = [image for number, image in enumerate(images, 1) if number not in mentioned]
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            parts.append(Text(piece))
        elif 0 < int(piece) <= len(images):
            parts.append(images[int(piece) - 1])
        else:
            parts.append(Text(f"<image {piece}>"))
    return merged(parts)


def merged(parts: list[Text | ImageFile]) -> Prompt:
    """`parts` without empty text, and with neighbouring texts in one, since text is tokenized part by part."""
    out: list[Text | ImageFile] = []
    for part in parts:
        if isinstance(part, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + part.text)
        elif not isinstance(part, Text) or part.text:
            out.append(part)
    return tuple(out)


def prompt_text(prompt: Prompt) -> str:
    """A prompt for reading, with images as "<image>"."""
    return "".join(part.text if isinstance(part, Text) else "<image>" for part in prompt)
