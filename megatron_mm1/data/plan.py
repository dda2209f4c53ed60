"""From a configuration to the order of training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megatron_mm1.config.batch_sizes import BatchSizes
from megatron_mm1.config.schema import DataConfig, MM1Config, SourceConfig
from megatron_mm1.data.image_tokens import ImageTokens, tiling_of
from megatron_mm1.data.mixture import Ingredient, Phase, Plan
from megatron_mm1.data.pools import PackedStream, PackingLimits, PieceOf, Share
from megatron_mm1.data.source import IndexedSource, Piece
from megatron_mm1.data.tokenizer import Tokenizer
from megatron_mm1.errors import UserError

_BLOCK = 1 << 20
"""Documents whose lengths are read at a time."""


class Sources:
    """The prepared data sets of a run, opened.

    Args:
        configs: in the order that source numbers count.

    Attributes:
        tokenizer: of the run.

    Raises:
        UserError: one is missing or damaged, was prepared with another tokenizer, or the tokenizer has too many pieces.
    """

    def __init__(self, config: MM1Config, configs: Sequence[SourceConfig], *, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > config.model.decoder.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, model.decoder.vocab_size is "
                f"{config.model.decoder.vocab_size}: raise it to at least {tokenizer.vocab_size}"
            )
        self.tokenizer = tokenizer
        self.names = tuple(source.name for source in configs)
        self._opened = [IndexedSource(source.path, tokenizer_fingerprint=tokenizer.fingerprint) for source in configs]

    def __len__(self) -> int:
        return len(self._opened)

    def __getitem__(self, number: int) -> IndexedSource:
        return self._opened[number]

    def read(self, pieces: Sequence[PieceOf]) -> list[Piece]:
        """The content of pieces, with one batch of reads for each source among them."""
        content: dict[int, Piece] = {}
        for number in {piece.source for piece in pieces}:
            places = [place for place, piece in enumerate(pieces) if piece.source == number]
            found = self._opened[number].pieces([pieces[place][1:] for place in places])
            content.update(zip(places, found, strict=True))
        return [content[place] for place in range(len(pieces))]


def packing_limits(config: MM1Config, tokenizer: Tokenizer) -> PackingLimits:
    """What a sequence of this run holds."""
    return PackingLimits(
        seq_length=config.data.seq_length,
        max_images=config.data.max_images_per_sequence,
        tokens_per_image=config.model.connector.tokens_per_image,
        lookahead=config.data.packing_lookahead,
        image_costs=None if config.data.image_tiling == "none" else ImageTokens.of(config, tokenizer).costs,
        long_documents=config.data.long_documents,
        packed=config.data.packing != "none",
    )


def packed_alone(config: MM1Config, sources: Sources, number: int) -> PackedStream:
    """One source packed by itself."""
    share = Share(number, sources.names[number], sources[number])
    return PackedStream([share], limits=packing_limits(config, sources.tokenizer), key=str(config.data.seed))


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on, and in which order."""

    sources: Sources
    plan: Plan

    def epochs(self, consumed: int) -> dict[str, float]:
        """How often each source has been seen when the run has used `consumed` sequences, by name."""
        seen = dict.fromkeys(self.sources.names, 0.0)
        for ingredient, count in zip(self.plan.ingredients, self.plan.used(consumed), strict=True):
            for name, passes in ingredient.passes.items():
                seen[name] += passes * count / len(ingredient.stream)
        return seen

    def keys(self, sequences: Iterable[int]) -> dict[str, list[str]]:
        """Where the documents of these sequences of the plan came from, by source: each once, in order."""
        pieces = [piece for sequence in sequences for piece in self.plan.sequence(sequence)]
        documents = {
            name: list(dict.fromkeys(piece.document for piece in pieces if piece.source == number))
            for number, name in enumerate(self.sources.names)
        }
        return {
            name: self.sources[number].keys(documents[name])
            for number, name in enumerate(self.sources.names)
            if documents[name]
        }

    def long_documents(self) -> list[str]:
        """A sentence for each ingredient that has documents which do not fit a sequence and are not split."""
        sentences = []
        for ingredient in self.plan.ingredients:
            stream = ingredient.stream
            documents, cut, dropped = stream.documents_of_epoch if isinstance(stream, PackedStream) else (0, 0, 0)
            if cut or dropped:
                names = ", ".join(ingredient.passes)
                sentences.append(
                    f"{names}: of {documents + dropped:,} documents {cut:,} are cut at the end of an answer and "
                    f"{dropped:,} left out, since they do not fit a sequence"
                )
        return sentences


def training_data(config: MM1Config, *, tokenizer: Tokenizer) -> TrainingData:
    """Open data.sources and lay out the order of training.

    Raises:
        UserError: see `Sources` and `training_plan`.
    """
    sources = Sources(config, config.data.sources, tokenizer=tokenizer)
    return TrainingData(sources, training_plan(config, sources))


def training_plan(config: MM1Config, sources: Sources) -> Plan:
    """The order of training over `sources`, those of data.sources; its `fingerprint` names it.

    Raises:
        UserError: the mixture cannot be made, or ends before training does.
    """
    data, batches = config.data, BatchSizes.of(config.training)
    weights = {0: {source.name: source.weight for source in data.sources}}
    weights |= {phase.step: phase.weights for phase in data.curriculum}
    mix = _mixed if data.packing == "mixed" else _by_source
    ingredients, shares = mix(config, sources, list(weights.values()))
    plan = Plan(
        ingredients,
        [Phase(batches.sequences_before(step), of) for step, of in zip(weights, shares, strict=True)],
        seed=data.seed,
        identity=_identity(config, sources.tokenizer),
    )
    needed = batches.sequences_before(config.training.train_iters)
    if plan.end is not None and plan.end < needed:
        raise UserError(
            f"the data ends after {plan.end:,} sequences, {batches.step_of(plan.end):,} steps, training takes "
            f"{config.training.train_iters:,} steps: raise max_epochs of data.sources or lower training.train_iters"
        )
    return plan


def _identity(config: MM1Config, tokenizer: Tokenizer) -> dict[str, object]:
    """What sequences and their pixels depend on besides the sources and their shares."""
    data, limits = config.data, packing_limits(config, tokenizer)
    identity: dict[str, object] = {
        "packing": data.packing,
        "limits": [limits.seq_length, limits.max_images, limits.tokens_per_image, limits.lookahead],
        "text_only": data.text_only,
        "random_resized_crop": data.random_resized_crop,
    }
    if limits.long_documents != "split":
        identity |= {"long_documents": limits.long_documents}
    if data.image_tiling != "none":
        identity |= {"tiling": asdict(tiling_of(config))}
    if data.tile_indicators:
        identity |= {"tile_indicators": tokenizer.fingerprint}
    return identity


def _by_source(
    config: MM1Config, sources: Sources, weights: Sequence[Mapping[str, float]]
) -> tuple[list[Ingredient], list[dict[int, float]]]:
    """One stream for each source, and each phase's weights in sequences."""
    streams = [packed_alone(config, sources, number) for number in range(len(sources))]
    per_sequence = [_units_per_sequence(stream, config.data) for stream in streams]
    ingredients = [
        Ingredient({source.name: 1.0}, stream, sources[number].fingerprint, max_epochs=source.max_epochs)
        for number, (source, stream) in enumerate(zip(config.data.sources, streams, strict=True))
    ]
    numbers = {name: number for number, name in enumerate(sources.names)}
    shares = [
        {numbers[name]: weight / per_sequence[numbers[name]] for name, weight in phase.items()} for phase in weights
    ]
    return ingredients, shares


def _units_per_sequence(stream: PackedStream, data: DataConfig) -> float:
    match data.mixture_unit:
        case "sequences":
            return 1.0
        case "tokens":
            return stream.positions_per_sequence
        case "examples":
            return stream.documents_per_sequence


def _mixed(
    config: MM1Config, sources: Sources, weights: Sequence[Mapping[str, float]]
) -> tuple[list[Ingredient], list[dict[int, float]]]:
    """One stream for each phase, in which sequences hold documents of all its sources."""
    limits = packing_limits(config, sources.tokenizer)
    numbers = {name: number for number, name in enumerate(sources.names)}
    ingredients = []
    for turn, phase in enumerate(weights):
        documents = {}
        for name, weight in phase.items():
            if weight > 0:
                source = sources[numbers[name]]
                documents[name] = weight / (_mean_length(source, limits) if config.data.mixture_unit == "tokens" else 1)
        if not documents or min(phase.values()) < 0:
            raise UserError(f"a mixture needs sources with weights that are not negative, not all 0; got {dict(phase)}")
        rates = {name: share / len(sources[numbers[name]]) for name, share in documents.items()}
        passes = {name: rate / min(rates.values()) for name, rate in rates.items()}
        shares = [Share(numbers[name], name, sources[numbers[name]], passes=times) for name, times in passes.items()]
        stream = PackedStream(shares, limits=limits, key=f"{config.data.seed}/phase {turn}")
        ingredients.append(Ingredient(passes, stream, [share.documents.fingerprint for share in shares]))
    return ingredients, [{turn: 1.0} for turn in range(len(weights))]


def _mean_length(source: IndexedSource, limits: PackingLimits) -> float:
    """Positions of a document of a source, on average, before any is cut."""
    total = 0
    for first in range(0, len(source), _BLOCK):
        documents = np.arange(first, min(first + _BLOCK, len(source)))
        total += int(limits.of_documents(source, documents)[0].sum())
    return total / len(source)
