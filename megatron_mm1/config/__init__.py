"""Typed configuration: schema, presets, the paper's laws, loading and validation. Imports no torch."""

from megatron_mm1.config.schema import (
    CheckpointConfig,
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    FaultsConfig,
    Fp8Config,
    LoggingConfig,
    MM1Config,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    SourceConfig,
    TrainingConfig,
    VisionConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConnectorConfig",
    "DataConfig",
    "DecoderConfig",
    "EvaluationConfig",
    "FaultsConfig",
    "Fp8Config",
    "LoggingConfig",
    "MM1Config",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SourceConfig",
    "TrainingConfig",
    "VisionConfig",
]
