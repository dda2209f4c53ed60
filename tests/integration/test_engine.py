"""What the engine promises of its answers, on one process: who else is asked, and how often, changes none of them."""

from collections import defaultdict
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_mm1.config import (
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    Fp8Config,
    MM1Config,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_mm1.data.assemble import Assembler, Row
from megatron_mm1.data.batch import PackedBatch
from megatron_mm1.data.chat import OWN_TEMPLATE, ChatTemplate
from megatron_mm1.data.image_tokens import tiling_of
from megatron_mm1.data.images import ImageProcessor, check_image
from megatron_mm1.data.records import Control, Image, Text
from megatron_mm1.data.source import Piece
from megatron_mm1.errors import UserError
from megatron_mm1.inference.engine import Engine
from megatron_mm1.inference.generation import Continuation
from megatron_mm1.inference.prompts import EncodedPrompt
from megatron_mm1.inference.requests import (
    Failure,
    Generation,
    GenerationRequest,
    ImageOfSize,
    Sampling,
    Score,
    ScoringRequest,
    WholeImage,
)
from megatron_mm1.training.build import build_module
from tests.corpora import encoded, small_tokenizer
from tests.parallel.generation_jobs import batch_of

A, B, C = (Image(encoded(seed=seed)) for seed in range(3))
PROMPTS = [
    (A, Text(" is a red")),
    (Text("the big circle and"),),
    (Text("a "), B, Text(" of "), A, C, Text("blue square in")),
    (Control("</s>"), Text("with")),
    (C,),
]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.8, top_k=20, seed=2),
    Sampling(temperature=1.5, top_p=0.8, seed=3),
    Sampling(temperature=1.0, seed=4),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def config(tokenizer) -> MM1Config:
    return MM1Config(
        name="asked",
        model=ModelConfig(
            vision=VisionConfig(
                image_size=32, patch_size=8, num_layers=1, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4
            ),
            connector=ConnectorConfig(connector="average_pool", tokens_per_image=4),
            decoder=DecoderConfig(  # large weights: otherwise it repeats one token
                num_layers=2,
                hidden_size=48,
                ffn_hidden_size=96,
                num_attention_heads=6,
                num_query_groups=2,
                vocab_size=tokenizer.vocab_size,
                init_method_std=0.15,
            ),
        ),
        data=DataConfig(tokenizer=str(tokenizer.path), seq_length=96),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(precision="fp32"),
    )


@pytest.fixture(scope="module")
def model(config, groups) -> torch.nn.Module:
    torch.manual_seed(0)
    longer = replace(config, data=replace(config.data, seq_length=160))  # which tiles need
    return build_module(longer, backend="local", pg_collection=groups)


@pytest.fixture
def engine(config, model, tokenizer, groups):
    """`engine(**options)`: a new one."""
    return lambda **options: Engine(options.pop("config", config), model, tokenizer, pg_collection=groups, **options)


def requests(*, new_tokens: int = 12) -> list[GenerationRequest]:
    """Each prompt with each sampling, and lengths of all kinds."""
    return [
        GenerationRequest(prompt=prompt, max_new_tokens=1 + (7 * n) % new_tokens, sampling=sampling)
        for n, (prompt, sampling) in enumerate((p, s) for p in PROMPTS for s in SAMPLINGS)
    ]


def test_answers_are_those_of_the_whole_model_run_anew_for_each_token(engine, config, model, tokenizer):
    """Prompts together, two of them alike; the reference is the pass of training, without a cache."""
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[4], PROMPTS[2]]
    texts = [" square", "and blue", "a", "with the circle", "is"]

    def log_probabilities(prompt, behind):
        with torch.no_grad():
            return model.eval()(batch_of(config, tokenizer, prompt, behind), return_logits=True)[0].log_softmax(dim=-1)

    expected, expected_scores = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        ids: list[int] = []
        for _ in range(6):
            last = log_probabilities(prompt, ids)[-1, : tokenizer.vocab_size]
            last[[tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id]] = -torch.inf
            ids.append(int(last.argmax()))
        expected.append(tuple(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids))
        target = [*tokenizer.encode(text), tokenizer.eos_id]
        rows = log_probabilities(prompt, target)[-len(target) - 1 : -1]
        expected_scores.append(rows[torch.arange(len(target)), target].tolist())
    asked = [GenerationRequest(prompt=prompt, max_new_tokens=6) for prompt in prompts]
    assert [answer.token_ids for answer in engine().generate(asked)] == expected
    scored = [ScoringRequest(prompt=prompt, continuation=text) for prompt, text in zip(prompts, texts, strict=True)]
    for score, values in zip(engine().score(scored), expected_scores, strict=True):
        assert score.token_log_likelihoods == pytest.approx(values, abs=1e-5)


def tiled(config: MM1Config, **data) -> MM1Config:
    return replace(config, data=replace(config.data, seq_length=160, **data))


TILINGS = [
    dict(image_tiling="overview_and_crops"),
    dict(image_tiling="dynamic", max_image_tiles=6),
    dict(image_tiling="dynamic", max_image_tiles=6, tile_indicators=True),
]


def seen_in_training(config: MM1Config, tokenizer, prompt, behind: list[int]) -> PackedBatch:
    """A prompt and what is behind it as the loader would assemble them."""
    tokens, sizes = [tokenizer.bos_id], []
    for part in prompt:
        tokens += tokenizer.encode(part.text) if isinstance(part, Text) else [tokenizer.image_id]
        sizes += [check_image(part.data)] if isinstance(part, Image) else []
    images = tuple(part.data for part in prompt if isinstance(part, Image))
    piece = Piece(np.array(tokens + behind), np.zeros(len(tokens + behind), bool), images)
    grids = tiling_of(config).grids(np.array(sizes), len(sizes))
    assembler = Assembler.of(config, tokenizer, processor=ImageProcessor.of(config))
    return assembler([Row([0], [piece], grids=[grids])]).to(torch.device("cpu"))


@pytest.mark.parametrize("tiling", TILINGS)
def test_tiled_images_are_seen_as_in_training(engine, config, model, tokenizer, tiling):
    """Wide, tall and small images, two and three in a prompt, and the same one cut and whole."""
    config = tiled(config, **tiling)
    wide, tall = Image(encoded(size=(90, 40), seed=5)), Image(encoded(size=(33, 70), seed=6))
    prompts = [(wide, Text(" is a red")), (Text("a "), tall, Text(" of "), A), (wide, A, tall, Text("a"))]
    for one in (engine(config=config, images_together=2), engine(config=config)):
        scores = one.score([ScoringRequest(prompt=prompt, continuation=" blue square") for prompt in prompts])
        for prompt, score in zip(prompts, scores, strict=True):
            target = [*tokenizer.encode(" blue square"), tokenizer.eos_id]
            batch = seen_in_training(config, tokenizer, prompt, target)
            with torch.no_grad():
                logits = model.eval()(batch, return_logits=True)[0].log_softmax(dim=-1)
            filled = int((batch.segment_ids > 0).sum())
            rows = logits[filled - len(target) - 1 : filled - 1]
            expected = rows[torch.arange(len(target)), target].tolist()
            assert score.token_log_likelihoods == pytest.approx(expected, abs=1e-5)


def test_a_whole_image_is_not_cut(engine, config):
    config_of_tiles = tiled(config, **TILINGS[0])
    wide = encoded(size=(90, 40), seed=5)
    prompts = [(kind(wide), Text(" is a")) for kind in (WholeImage, Image)]
    whole, cut = engine(config=config_of_tiles).score(
        [ScoringRequest(prompt=prompt, continuation="red circle") for prompt in prompts]
    )
    [expected] = engine().score([ScoringRequest(prompt=prompts[1], continuation="red circle")])
    assert whole.token_log_likelihoods == pytest.approx(expected.token_log_likelihoods, abs=1e-5)
    assert cut.token_log_likelihoods != pytest.approx(expected.token_log_likelihoods, abs=1e-3)


def test_the_same_images_cut_otherwise_are_another_prompt(engine, config):
    """Though all positions hold the same tokens."""
    wide = encoded(size=(90, 40), seed=5)
    prompts = [(WholeImage(wide), Image(wide)), (Image(wide), WholeImage(wide))]
    asked = [ScoringRequest(prompt=prompt, continuation="red circle") for prompt in prompts]
    config = tiled(config, **TILINGS[0])
    together, alone = engine(config=config).score(asked), [engine(config=config).score([one])[0] for one in asked]
    for score, expected in zip(together, alone, strict=True):
        assert score.token_log_likelihoods == pytest.approx(expected.token_log_likelihoods, abs=1e-5)
    assert alone[0].token_log_likelihoods != pytest.approx(alone[1].token_log_likelihoods, abs=1e-4)


def test_a_cut_image_is_forgotten_with_all_its_tiles(engine, config):
    config = tiled(config, **TILINGS[0])
    asked = [GenerationRequest(prompt=(image, Text("a")), max_new_tokens=2) for image in (A, B, A, B)]
    for capacity, encoded_images in ((5, 4), (9, 4), (10, 2)):  # in tiles
        short = engine(config=config, batch_size=1, image_cache_bytes=capacity * 4 * 48 * 4)
        assert short.generate(asked) == engine(config=config).generate(asked)
        assert short.features.num_encoded == encoded_images


def test_a_prompt_that_is_too_long_says_how_its_images_are_cut(engine, config):
    config = tiled(config, **TILINGS[1])
    wide = Image(encoded(size=(90, 40), seed=5))
    [answer] = engine(config=config).generate([GenerationRequest(prompt=(wide,) * 2, max_new_tokens=150)])
    assert "(2 images, cut into 14 tiles of 4 each)" in answer.message


@pytest.mark.parametrize("options", [dict(batch_size=3), dict(batch_size=64), dict(batch_size=5, max_positions=40)])
def test_answers_do_not_depend_on_what_else_is_asked(engine, options):
    asked = requests()
    alone = [engine().generate([request])[0] for request in asked]
    assert len({answer.token_ids for answer in alone}) > 15
    assert engine(**options).generate(asked) == alone
    assert engine(**options).generate(asked[::-1]) == alone[::-1]


def test_seeds_give_different_texts_and_the_same_one_again(engine):
    asked = [
        GenerationRequest(prompt=PROMPTS[0], max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=seed))
        for seed in [0, 1, 2, 0]
    ]
    texts = [answer.text for answer in engine().generate(asked)]
    assert texts[0] == texts[3] and len(set(texts)) == 3


def test_text_ends_before_a_stop_string_wherever_its_tokens_end(engine, tokenizer):
    [free] = engine().generate([GenerationRequest(prompt=PROMPTS[2], max_new_tokens=12)])
    assert free.finish_reason == "length" and len(free.token_ids) == 12
    first = len(tokenizer.decode(free.token_ids[:4]))
    stop = free.text[first - 1 : first + 1]  # the end of a token and the beginning of the next
    asked = GenerationRequest(prompt=PROMPTS[2], max_new_tokens=12, stop=(stop,))
    [stopped] = engine().generate([asked])
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)] and len(stopped.token_ids) < 12


def test_pieces_of_text_make_the_answers(engine):
    pieces = defaultdict(list)
    asked = [replace(request, stop=(" ",)) if n % 2 else request for n, request in enumerate(requests())]
    answers = engine(batch_size=4).generate(asked, on_text=lambda index, text: pieces[index].append(text))
    assert ["".join(pieces[n]) for n in range(len(asked))] == [answer.text for answer in answers]
    assert max(map(len, pieces.values())) > 2
    assert {answer.finish_reason for answer in answers} >= {"stop", "length"}


def test_an_image_is_encoded_once_in_the_life_of_an_engine(engine, model):
    asked = [GenerationRequest(prompt=prompt, max_new_tokens=2) for prompt in [*PROMPTS, *PROMPTS]]
    once = engine(batch_size=2)
    once.generate(asked)
    once.score([ScoringRequest(prompt=(A, B), continuation="a")])
    assert once.features.num_encoded == 3


def test_images_are_forgotten_when_memory_is_short_and_answers_stay(engine):
    asked = [GenerationRequest(prompt=prompt, max_new_tokens=4) for prompt in [*PROMPTS, *PROMPTS]]
    short = engine(batch_size=2, image_cache_bytes=4 * 48 * 4)  # one image
    assert short.generate(asked) == engine().generate(asked)
    assert short.features.num_encoded > 3


def test_texts_behind_one_prompt_are_scored_as_each_by_itself(engine):
    texts = ["a", " blue square", "the red circle with a big", ""]
    asked = [
        ScoringRequest(prompt=prompt, continuation=text, with_end=with_end)
        for text in texts
        for prompt in PROMPTS
        for with_end in (True, False)
    ]
    alone = [engine().score([request])[0] for request in asked]
    assert sum(isinstance(score, Failure) for score in alone) == len(PROMPTS)  # no text and no end of it
    for options in (dict(), dict(max_positions=30)):
        for score, expected in zip(engine(**options).score(asked), alone, strict=True):
            assert type(score) is type(expected)
            if isinstance(score, Score) and isinstance(expected, Score):
                assert score.token_log_likelihoods == pytest.approx(expected.token_log_likelihoods, abs=1e-5)


def test_a_score_is_what_generation_samples_from(engine, tokenizer):
    """The likeliest token is what greedy generation takes, and probabilities of all first tokens add up to 1."""
    [greedy] = engine().generate([GenerationRequest(prompt=PROMPTS[0], max_new_tokens=1)])
    scores = {}
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        if tokenizer.encode(text) == [token]:
            scores[token] = text
    answers = engine().score(
        [ScoringRequest(prompt=PROMPTS[0], continuation=text, with_end=False) for text in scores.values()]
    )
    found = {token: answer.log_likelihood for token, answer in zip(scores, answers, strict=True)}
    assert greedy.token_ids[0] not in found or max(found, key=found.get) == greedy.token_ids[0]
    assert 0 < sum(torch.tensor(list(found.values())).exp().tolist()) <= 1 + 1e-5


def test_an_image_can_be_shown_in_another_resolution(engine, config):
    asked = [
        GenerationRequest(prompt=(image, Text(" is a")), max_new_tokens=10)
        for image in (A, ImageOfSize(A.data, image_size=64), ImageOfSize(A.data, image_size=32))
    ]
    usual, large, same = engine().generate(asked)
    assert usual == same and isinstance(large, Generation) and large.token_ids != usual.token_ids
    bad = GenerationRequest(prompt=(ImageOfSize(A.data, image_size=33),), max_new_tokens=1)
    assert engine().generate([bad]) == [Failure("image_size is 33: give a multiple of the tower's patches of 8 px")]


def test_what_the_tokenizer_lacks_fails_its_own_request(engine):
    asked = [GenerationRequest(prompt=(Control(symbol),), max_new_tokens=1) for symbol in ("<|nobody|>", "</s>")]
    failed, answered = engine().generate(asked)
    assert isinstance(failed, Failure) and "has no control symbol '<|nobody|>'" in failed.message
    assert isinstance(answered, Generation)


def test_a_conversation_is_asked_like_its_parts_and_ends_with_the_turn(engine, config, model, tokenizer, groups):
    """The template begins with the beginning of text, which the plain engine puts there itself."""
    template = ChatTemplate("{{ bos_token }}" + OWN_TEMPLATE, tokenizer, origin="test")
    prompts = [prompt for prompt in PROMPTS if Control("</s>") not in prompt]
    written_out = [(Control("<|user|>"), *one, Control("<|end|>"), Control("<|assistant|>")) for one in prompts]
    chat, plain = engine(chat=template), engine()

    def asked(prompts):
        return [GenerationRequest(prompt=prompt, max_new_tokens=12) for prompt in prompts]

    end = tokenizer.control_id("<|end|>")
    expected = [(*one.token_ids, end)[: (*one.token_ids, end).index(end)] for one in plain.generate(asked(written_out))]
    answers = chat.generate(asked(prompts))
    assert [one.token_ids for one in answers] == expected
    assert {one.finish_reason for one in answers} == {"end", "length"}  # this model ends some turns
    padding = copy(tokenizer)
    padding.pad_id = end  # as Llama's and Qwen's symbol of an ended turn often is
    both = ChatTemplate("{{ bos_token }}" + OWN_TEMPLATE, padding, origin="test")
    assert Engine(config, model, padding, pg_collection=groups, chat=both).generate(asked(prompts)) == answers
    [score] = chat.score([ScoringRequest(prompt=prompts[0], continuation="red")])
    ids = tokenizer.encode("red")
    with torch.no_grad():
        logits = model.eval()(batch_of(config, tokenizer, written_out[0], ids), return_logits=True)[0]
    last = logits.log_softmax(dim=-1)[-1, end].item()
    assert score.token_log_likelihoods[-1] == pytest.approx(last, abs=1e-4)


def test_a_text_ends_with_any_of_its_ends(tokenizer):
    request = GenerationRequest(prompt=(), max_new_tokens=5)
    word, end = tokenizer.encode("red")[0], tokenizer.control_id("<|end|>")
    for ends in ([end, tokenizer.eos_id], [tokenizer.eos_id, end]):
        one = Continuation(0, request, EncodedPrompt(()), tokenizer=tokenizer, ends=ends, on_text=None)
        one.add(word)
        assert one.finish_reason is None
        one.add(end)
        assert one.result() == Generation(tokenizer.decode([word]), (word,), "end")


@pytest.mark.parametrize("part", [Control("<|end|>"), Text("a \U0010fff0")])
def test_what_only_templates_write_is_refused_in_a_conversation(engine, tokenizer, part):
    chat = engine(chat=ChatTemplate(OWN_TEMPLATE, tokenizer, origin="test"))
    [failed] = chat.generate([GenerationRequest(prompt=(A, part), max_new_tokens=1)])
    assert isinstance(failed, Failure) and "in a conversation a prompt is text and images" in failed.message


def test_a_template_that_refuses_a_prompt_fails_its_request(engine, tokenizer):
    strict = OWN_TEMPLATE + "{% if 'fox' in messages[0].content %}{{ raise_exception('no foxes') }}{% endif %}"
    chat = engine(chat=ChatTemplate(strict, tokenizer, origin="test"))
    asked = [GenerationRequest(prompt=(Text(text),), max_new_tokens=1) for text in ("a fox", "a dog")]
    failed, answered = chat.generate(asked)
    assert isinstance(failed, Failure) and "no foxes" in failed.message and isinstance(answered, Generation)


def test_modules_are_in_the_mode_they_were_in(engine, model):
    model.train()
    model.get_submodule("tower").eval()
    before = [module.training for module in model.modules()]
    engine().generate(requests()[:2])
    assert [module.training for module in model.modules()] == before
    assert True in before and False in before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: replace(config, fp8=Fp8Config(tower_recipe="fp8_delayed")),
            "the tower: multiplied by fp8_delayed",
        ),
    ],
)
def test_models_that_cannot_be_asked_are_refused(engine, config, change, message):
    with pytest.raises(UserError, match=message):
        engine(config=change(config))
