"""Metrics equal the benchmarks' own code: by its package where there is one, else by recorded values."""

import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from megatron_mm1.evaluation.bootstrap import mean_interval
from megatron_mm1.evaluation.items import Item
from megatron_mm1.evaluation.metrics.choice import choice_accuracy, chosen_letter
from megatron_mm1.evaluation.metrics.cider import cider, cider_d
from megatron_mm1.evaluation.metrics.mathvista import extract_answer, mathvista_accuracy
from megatron_mm1.evaluation.metrics.mmmu import is_answered, mmmu_accuracy
from megatron_mm1.evaluation.metrics.pope import pope, says_yes
from megatron_mm1.evaluation.metrics.ptb import tokenize
from megatron_mm1.evaluation.metrics.strings import anls, exact_match, levenshtein_similarity, relaxed_accuracy
from megatron_mm1.evaluation.metrics.vqa import normalized, vqa_accuracy

FIXTURES = Path(__file__).parents[1] / "fixtures"
CAPTIONS = json.loads((FIXTURES / "ptb_tokens.json").read_text())
ANSWERS = json.loads((FIXTURES / "vqa_accuracy.json").read_text())


@pytest.mark.parametrize("row", CAPTIONS, ids=[row["caption"][:30] for row in CAPTIONS])
def test_tokens_are_those_of_the_java_tokenizer(row):
    """Those were written by PTBTokenizer of pycocoevalcap 1.2, with a caption "A photo" behind each."""
    assert tokenize(row["caption"]) == row["tokens"]


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_recorded_tokens_are_those_of_the_java_tokenizer_here():
    texts = {number: [{"caption": row["caption"]}, {"caption": "A photo"}] for number, row in enumerate(CAPTIONS)}
    tokens = PTBTokenizer().tokenize(texts)
    assert [tokens[number][0].split() for number in texts] == [row["tokens"] for row in CAPTIONS]


@given(st.text(max_size=60))
def test_any_text_has_tokens(text):
    tokens = tokenize(text)
    assert all(token and not any(letter.isspace() for letter in token) for token in tokens)
    assert tokenize(f"  {text}\n") == tokens


def some_captions(count: int, seed: int) -> list[list[str]]:
    """Shuffled and cut captions, so that n-grams of all lengths are shared by some."""
    generator = random.Random(seed)
    tokens = [row["tokens"] for row in CAPTIONS]
    mixed = [generator.choice(tokens)[:6] + generator.choice(tokens)[generator.randrange(6) :] for _ in range(count)]
    return [caption[: generator.randrange(len(caption) + 1)] for caption in mixed]


@pytest.mark.parametrize("num_images", [1, 2, 40])
def test_cider_is_pycocoevalcaps(num_images):
    own = [row["tokens"] for row in CAPTIONS]
    references = [[own[image], *some_captions(image % 5, seed=image)] for image in range(num_images)]
    captions = [some_captions(1, seed=1000 + image)[0] for image in range(num_images)]
    captions[-1] = references[-1][0]
    captions[0] = captions[0] + 3 * references[0][0][:4]  # what is said again and again counts once
    true = {image: [" ".join(tokens) for tokens in of_image] for image, of_image in enumerate(references)}
    mean, scores = Cider().compute_score(true, {image: [" ".join(tokens)] for image, tokens in enumerate(captions)})
    ours = cider_d(captions, references)
    assert ours == pytest.approx(list(scores), abs=1e-6)
    assert sum(ours) / num_images == pytest.approx(mean, abs=1e-6)
    assert (max(ours) > 1) is (num_images > 1)


def test_cider_tokenizes():
    items = [Item(key=str(n), references=(row["caption"],)) for n, row in enumerate(CAPTIONS)]
    shouted = [row["caption"].upper().replace(".", " . ") for row in CAPTIONS[:3]]
    scores = [measures["cider"].value for measures in cider(items, shouted + [""] * (len(items) - 3))]
    assert scores[:3] == pytest.approx([10.0] * 3)
    assert set(scores[3:]) == {0.0}


def test_an_image_without_a_caption_is_refused():
    with pytest.raises(ValueError, match="no reference"):
        cider_d([["a"]], [[]])


@pytest.mark.parametrize("row", ANSWERS, ids=[repr(row["prediction"]) for row in ANSWERS])
def test_vqa_accuracy_is_the_official_codes(row):
    """Values of vqaEval.py of the VQA challenge, and of OpenFlamingo's copy, which always normalizes."""
    item = Item(key="1", references=tuple(row["answers"]))
    [measures] = vqa_accuracy([item], [row["prediction"]])
    assert measures["official_accuracy"].value == pytest.approx(row["official"])
    assert measures["accuracy"].value == pytest.approx(row["open_flamingo"])


def test_normalized_answer():
    assert normalized("The two, T-shirts.") == "2 t shirts"
    assert normalized("dont, somebody'd") == "don't somebodyd"


@given(st.integers(0, 10))
def test_each_person_is_left_out_once(agreeing):
    item = Item(key="1", references=("cat",) * agreeing + ("dog",) * (10 - agreeing))
    expected = (agreeing * min(1, max(0, agreeing - 1) / 3) + (10 - agreeing) * min(1, agreeing / 3)) / 10
    assert vqa_accuracy([item], ["cat"])[0]["accuracy"].value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "truth", "similarity"),
    [
        ("Hello  World", "hello world", 1.0),
        ("hallo", "hello", 0.8),
        ("ab", "cb", 0.5),  # one half counts
        ("abc", "xyc", 0.0),
        ("", "x", 0.0),
    ],
)
def test_levenshtein_similarity(prediction, truth, similarity):
    assert levenshtein_similarity(prediction, truth) == pytest.approx(similarity)


def test_anls_takes_the_nearest_truth():
    [measures] = anls([Item(key="1", references=("nothing", "hello"))], ["hallo"])
    assert measures["anls"].value == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("prediction", "truth", "right"),
    [
        ("105", "100", True),
        ("94.9", "100", False),
        ("-104", "-100", True),
        ("4%", "0.04", True),
        ("4", "4%", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("Blue ", "blue", True),
        ("blues", "blue", False),
        ("1,000", "1000", False),
    ],
)
def test_relaxed_accuracy(prediction, truth, right):
    [measures] = relaxed_accuracy([Item(key="1", answer=truth)], [prediction])
    assert measures["relaxed_accuracy"].value == right


def test_exact_match():
    items = [Item(key="1", answer="red")] * 2
    assert [one["exact_match"].value for one in exact_match(items, ["red", "Red"])] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "yes"),
    [("yes", True), ("No", False), ("no, it is", False), ("There is not", False), ("Yes. Not all", True), ("", True)],
)
def test_yes_or_no(text, yes):
    assert says_yes(text) is yes


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_pope_by_counting(pairs):
    """Weighted means of the measures are precision, recall and F1 as they are defined."""
    items = [Item(key=str(n), answer="yes" if true else "no") for n, (true, _) in enumerate(pairs)]
    measures = pope(items, ["yes" if said else "no" for _, said in pairs])

    def mean(name: str) -> float:
        of_items = [one[name] for one in measures]
        weights = [one.weight for one in of_items]
        return mean_interval([one.value for one in of_items], weights=weights, resamples=10).mean

    hits, said, true = (sum(t and s for t, s in pairs), sum(s for _, s in pairs), sum(t for t, _ in pairs))
    precision, recall = hits / said if said else 0, hits / true if true else 0
    assert mean("precision") == pytest.approx(precision)
    assert mean("recall") == pytest.approx(recall)
    assert mean("f1") == pytest.approx(2 * precision * recall / (precision + recall) if hits else 0)
    assert mean("accuracy") == pytest.approx(sum(t == s for t, s in pairs) / len(pairs))
    assert mean("yes_ratio") == pytest.approx(said / len(pairs))


CHOICES = ("a red car", "two dogs", "seven", "none of them")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("B.", "B"),
        ("C. seven", "C"),
        ("D: none of them", "D"),
        ("The answer is (D).", "D"),
        ("I think it is B, because of the dogs", "B"),
        ("(A) is wrong, (C) is right", "C"),
        ("A dog is there, so D", "D"),
        ("A or B? B", "B"),
        ("A dog", ""),
        ("**C**", "C"),
        ("Seven.", "C"),
        ("There must be two dogs in it", "B"),
        ("two dogs and a red car", ""),
        ("seventy", ""),
        ("E", ""),
        ("", ""),
    ],
)
def test_chosen_letter(text, letter):
    assert chosen_letter(text, CHOICES) == letter
    [measures] = choice_accuracy([Item(key="1", answer="C", choices=CHOICES)], [text])
    assert measures["accuracy"].value == (letter == "C")


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("12.5", "12.50", True),
        ("The area is 1,250 cm", "1250", True),
        ("x = 3. Thus the result is 4", "4", True),
        ("It is a heart rate monitor.", "heart rate", True),
        ("Therefore the gas is argon", "neon", False),
        ("banana", "a", False),  # a letter stands alone
        ("the answer is a", "a", True),
        ("125", "12.5", False),
        ("1990-1995", "1995", True),
        ("it is -3", "3", False),
        ("1e3", "1000", True),
    ],
)
def test_open_answers_of_mmmu(text, truth, right):
    assert is_answered(text, [truth]) is right
    [measures] = mmmu_accuracy([Item(key="1", answer=truth)], [text])
    assert measures["accuracy"].value == right


@pytest.mark.parametrize(
    ("text", "kind", "precision", "answer"),
    [
        ("The answer is 12 apples", "integer", "0", "12"),
        ("3 and 4 are 7", "integer", "0", "7"),
        ("from 1990-1995", "integer", "0", "1995"),
        ("9" * 400, "integer", "0", None),
        ("about 1,234.56 m", "float", "1", "1234.6"),
        ("-0.5", "float", "2", "-0.5"),
        (".25", "float", "2", "0.25"),
        ("no idea", "integer", "0", None),
        ("so [1, 2]", "list", "0", "[1, 2]"),
        (" yes ", "text", "0", "yes"),
    ],
)
def test_mathvista_answers(text, kind, precision, answer):
    item = Item(key="1", answer=answer or "0", attributes={"answer_type": kind, "precision": precision})
    assert extract_answer(text, item) == answer
    assert mathvista_accuracy([item], [text])[0]["accuracy"].value == (answer is not None)


@pytest.mark.parametrize(("text", "answer"), [("(B)", "24"), ("24", "24"), ("twelve!", "twelve"), ("C", "[3]")])
def test_mathvista_choices(text, answer):
    item = Item(key="1", choices=("twelve", "24", "[3]"), answer="A", references=("twelve",))
    assert extract_answer(text, item) == answer
