"""Whether a configuration and a checkpoint can be served together: what is known before Ray starts."""

from afd_ray.autoscaling.loading import load_policy
from afd_ray.config import Config, ConfigError
from afd_ray.kernels.quantised import PROJECTIONS, QuantisedDense, QuantisedExperts, QuantisedLinear
from afd_ray.membership.epoch import Epoch
from afd_ray.membership.epochs import epoch_of
from afd_ray.membership.shape import Shape
from afd_ray.models.checkpoint import Checkpoint
from afd_ray.models.config import ModelConfig
from afd_ray.models.layout import Unallocated
from afd_ray.models.step3 import FFNShard, MultiMatrixFactorizationAttention
from afd_ray.text import Tokenizer


def check_fits(config: Config, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError or TokenizerError for a checkpoint that cannot be served, ConfigError for settings that this model cannot have."""
    checkpoint.require_sound()
    Tokenizer.from_directory(checkpoint.directory)
    _check_context(config, checkpoint.config)
    _check_redundancy(config, checkpoint.config)
    try:
        epoch = epoch_of(config, checkpoint.config, Shape.of(config), 1)
        epoch.check(checkpoint.config)
        _check_narrow(config, checkpoint.config, epoch)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.autoscaling.policy != "fixed":
        _check_autoscaling(config, checkpoint.config)


def _check_context(config: Config, model: ModelConfig) -> None:
    wanted, cached = config.model.max_context, config.attention.kv_cache.tokens
    if wanted is not None and wanted > model.max_position_embedding:
        raise ConfigError(f"model.max_context: {wanted} must be at most the model's {model.max_position_embedding}")
    if wanted is not None and wanted < 2:
        raise ConfigError(f"model.max_context: {wanted} must be at least 2, a token of prompt and one of answer")
    if cached is not None and cached < 2:
        raise ConfigError(
            f"attention.kv_cache.num_blocks: {config.attention.kv_cache.num_blocks} must hold at least 2 tokens, "
            f"a token of prompt and one of answer, got blocks of {config.attention.kv_cache.block_size}"
        )


def _check_redundancy(config: Config, model: ModelConfig) -> None:
    """For the largest shape that is configured: a smaller one has room for fewer copies, and holds as many as it can."""
    ffn = config.ffn
    instances = max(ffn.expert_parallel, config.autoscaling.max.ffn // ffn.tensor_parallel)
    most = model.moe_num_experts * (instances - 1)
    if ffn.redundant_experts > most:
        raise ConfigError(
            f"ffn.redundant_experts: {ffn.redundant_experts} must be at most {most}, for no instance holds an expert twice "
            f"({model.moe_num_experts} experts, at most {instances} instances by ffn and autoscaling.max)"
        )


def _check_narrow(config: Config, model: ModelConfig, epoch: Epoch) -> None:
    """Raises ValueError for widths that have no blocks of 128, where weights are to be in e4m3."""
    ranks = [FFNShard.whole(model)] if config.ffn.colocated else [epoch.shard(rank, model) for rank in epoch.ffn_ranks]
    with Unallocated():
        if config.attention.quantises:
            attention = MultiMatrixFactorizationAttention(model)
            for name in PROJECTIONS:
                QuantisedLinear(*getattr(attention, name).weight.shape)
        for shard in ranks if config.ffn.quantises else []:
            QuantisedExperts(0, model.hidden_size, shard.routed.width(model.moe_intermediate_size))
        if config.ffn.quantises_dense:
            QuantisedDense(model.hidden_size, model.share_expert_dim)


def _check_autoscaling(config: Config, model: ModelConfig) -> None:
    """Raises for a policy that cannot be loaded, or that has nothing to scale; ConfigError for bounds that no cluster can come to."""
    scaling, within = config.autoscaling, config.ffn.tensor_parallel
    load_policy(scaling.policy)
    if config.ffn.colocated:
        raise ConfigError(
            f"autoscaling.policy: {scaling.policy} must be fixed with ffn.colocated: there are no FFN ranks to scale"
        )
    if scaling.max.ffn < within:
        raise ConfigError(f"autoscaling.max.ffn: {scaling.max.ffn} must be at least ffn.tensor_parallel, {within}")
    largest = Shape.of(config).scaled(scaling.max.attention, scaling.max.ffn // within * within)
    try:
        epoch_of(config, model, largest, 1).check(model)
    except ValueError as error:
        raise ConfigError(f"autoscaling.max: {largest} are more than this model can have: {error}") from None
