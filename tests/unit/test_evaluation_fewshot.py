"""The few-shot protocol: which demonstrations are drawn, and what prompts are made of them."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm1.data.readers import question_answer, question_prompt
from megatron_mm1.data.records import Text
from megatron_mm1.errors import UserError
from megatron_mm1.evaluation.fewshot import FewShot, demonstration_pool, draw, request
from megatron_mm1.evaluation.items import Candidate, ImageFile, Item, Split
from megatron_mm1.evaluation.template import (
    CAPTION,
    CHOICE,
    QUESTION,
    QUESTION_STOPPING,
    Stopping,
    extracted_answer,
    prompt_text,
)


def image(name: str) -> ImageFile:
    return ImageFile(Path(name))


class OneTemplate:
    """A task whose pool is given."""

    stopping = QUESTION_STOPPING

    def __init__(self, pool=(), template=QUESTION):
        self.pool, self.form = tuple(pool), template

    def template(self, item):
        return self.form

    def demonstrations(self):
        return Split(self.pool)


ITEMS = st.builds(
    Item,
    key=st.integers(0, 30).map(str),
    images=st.lists(st.integers(0, 12).map(lambda n: image(f"{n}.jpg")), max_size=3).map(tuple),
    cluster=st.none() | st.sampled_from("abc"),
    question=st.text(max_size=8),
    answer=st.text("xyz", min_size=1, max_size=4),
)
POOLS = st.lists(ITEMS, max_size=25, unique_by=lambda item: item.key).map(tuple)


@given(ITEMS, POOLS, st.integers(0, 6), st.integers(0, 3))
def test_a_draw(item, pool, shots, seed):
    """Exactly as many as asked, all different, and none about the query; or an error where the pool has too few."""
    usable = [
        one
        for one in pool
        if one.key != item.key
        and not {i.path for i in one.images} & {i.path for i in item.images}
        and (item.cluster is None or one.cluster != item.cluster)
    ]
    if len(usable) < shots:
        with pytest.raises(UserError, match=f"only {len(usable)} are not about"):
            draw(item, pool, shots=shots, seed=seed)
        return
    drawn = draw(item, pool, shots=shots, seed=seed)
    assert len({one.key for one in drawn}) == len(drawn) == shots
    assert all(one in usable for one in drawn)
    assert draw(item, pool, shots=shots, seed=seed) == drawn
    assert draw(item, pool, shots=max(0, shots - 1), seed=seed) == drawn[: max(0, shots - 1)]


def pool_of(count: int) -> tuple[Item, ...]:
    return tuple(
        Item(key=f"t{n}", images=(image(f"t{n}.jpg"),), question=f"q{n}", answer=f"a{n}") for n in range(count)
    )


QUERY = Item(key="query", images=(image("q.jpg"),), question="why?", answer="so")


def test_draws_differ_by_seed_and_item_and_reach_the_whole_pool():
    pool, other = pool_of(20), Item(key="other")
    assert draw(QUERY, pool, shots=8, seed=0) != draw(QUERY, pool, shots=8, seed=1)
    assert draw(QUERY, pool, shots=8) != draw(other, pool, shots=8)
    first = [draw(Item(key=str(n)), pool, shots=1)[0].key for n in range(2000)]
    counts = [first.count(one.key) for one in pool]
    assert min(counts) > 60 and max(counts) < 145  # 100 each, with a deviation of 10


def test_draws_stay_the_same_over_versions():
    """Results of last year can be compared with today's."""
    assert [one.key for one in draw(QUERY, pool_of(100), shots=4, seed=7)] == ["t32", "t19", "t52", "t45"]


@given(POOLS.filter(len), ITEMS, st.integers(0, 4), st.none() | st.integers(0, 4))
def test_a_prompt_is_its_parts(pool, item, shots, high):
    task, settings = OneTemplate(pool), FewShot(shots=shots, high_resolution=96, high_resolution_shots=high)
    try:
        shown = draw(item, pool, shots=shots)
    except UserError:
        return
    made = request(item, task, settings, pool=pool)
    assert made.demonstrations == tuple(one.key for one in shown)
    images = [part for part in made.prompt if isinstance(part, ImageFile)]
    assert [one.path for one in images] == [i.path for one in (*shown, item) for i in one.images]
    texts = [part.text for part in made.prompt if isinstance(part, Text)]
    assert "".join(texts) == "".join(
        f"{question_prompt(one.question)}{question_answer(one.answer)}\n" for one in shown
    ) + question_prompt(item.question)
    kinds = [isinstance(part, Text) for part in made.prompt]
    assert not any(one and following for one, following in pairwise(kinds))
    small = shown[: max(0, shots - high)] if high is not None else ()
    flags = [one not in small for one in shown for _ in one.images] + [True for _ in item.images]
    assert [one.high_resolution for one in images] == flags


def test_captions_and_questions_as_the_paper_has_them():
    caption = Item(key="1", images=(image("a.jpg"),), answer="a dog\nruns")
    assert CAPTION.asked(caption) == (image("a.jpg"), Text("A photo of"))
    assert CAPTION.answered(caption) == (image("a.jpg"), Text("A photo of a dog runs\n"))
    assert prompt_text(QUESTION.answered(QUERY)) == "<image>Question: why? Short answer: so\n"


def test_choices_are_lettered():
    item = Item(key="1", question="which?", choices=("{x}", "y"), answer="B")
    assert prompt_text(CHOICE.answered(item)).startswith("Question: which?\nA. {x}\nB. y\nAnswer with")
    assert prompt_text(CHOICE.answered(item)).endswith("Answer: B\n")


def test_images_stand_where_they_are_mentioned():
    item = Item(
        key="1", question="is <image 2> like <image 1>, not <image 9>?", images=tuple(image(f"{n}") for n in range(3))
    )
    assert QUESTION.asked(item) == (
        image("2"),
        Text("Question: is "),
        image("1"),
        Text(" like "),
        image("0"),
        Text(", not <image 9>? Short answer:"),
    )


def test_candidates_stand_behind_the_same_demonstrations():
    item = Item(key="1", images=(image("a"),), candidates=(Candidate("x"), Candidate("y", images=(image("b"),))))
    made = request(item, OneTemplate(), FewShot(shots=2), pool=pool_of(5))
    [(own, x), (other, y)] = made.scored
    assert (x, y) == ("x", "y")
    assert own == made.prompt
    assert [image("b") if part == image("a") else part for part in own] == list(other)


def test_chain_of_thought():
    pool = (*pool_of(3), Item(key="r", question="q", answer="3", rationale="one and\ntwo"))
    task, settings = OneTemplate(pool), FewShot(shots=1, chain_of_thought=True)
    usable = demonstration_pool(task, settings)
    assert [one.key for one in usable] == ["r"]
    text = prompt_text(request(QUERY, task, settings, pool=usable).prompt)
    assert text == (
        "Question: q Let's think step by step. one and two The answer is 3.\n"
        "<image>Question: why? Let's think step by step."
    )
    assert settings.answer(" 1. add, then stop. The answer is 4.") == "4"
    assert FewShot().answer(" 1. add") == "1. add"
    with pytest.raises(UserError, match="rationale"):
        demonstration_pool(OneTemplate(pool_of(3)), settings)


def test_a_chain_of_thought_is_long_and_has_sentences():
    task, settings = OneTemplate(), FewShot(chain_of_thought=True)
    assert settings.stopping(task).max_new_tokens >= 512
    assert settings.stopping(task).strings == ("\n", "Question:")
    task.stopping = Stopping(max_new_tokens=0)
    assert settings.stopping(task).max_new_tokens == 0


def test_no_shots_need_no_training_split():
    class NoTraining(OneTemplate):
        def demonstrations(self):
            raise UserError("none")

    assert demonstration_pool(NoTraining(), FewShot()) == ()
    with pytest.raises(UserError, match="none"):
        demonstration_pool(NoTraining(), FewShot(shots=1))


@pytest.mark.parametrize("field", ["shots", "high_resolution_shots"])
def test_negative_numbers(field):
    with pytest.raises(UserError, match="give 0 or more"):
        FewShot(high_resolution=96, **{field: -1})


@pytest.mark.parametrize(
    ("text", "answer"),
    [("So the answer is: B.", "B"), ("The answer is 3, no, the answer is 3.5.", "3.5"), ("just 7", "just 7"), ("", "")],
)
def test_extracted_answer(text, answer):
    assert extracted_answer(text) == answer
