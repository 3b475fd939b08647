"""The schema of a run: every key, its type, its bounds and its meaning. Rules across keys are in validation.py.

The heads that predict later tokens are in output_schema.py; bounds, and what sections are made of, in section.py.
"""

import re
from os.path import normpath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from overtok_megatron.config.output_schema import MultiTokenPredictionConfig, OverDecodingConfig
from overtok_megatron.config.section import (
    LARGEST,
    LARGEST_FLOAT,
    NonNegative,
    NonNegativeFloat,
    Parts,
    Positive,
    PositiveFloat,
    Section,
    Width,
)

LONGEST_ORDER = 1024  # of an n-gram, in tokens

Rows = Annotated[int, Field(ge=1, le=2**40)]  # the rules across keys say what the last table may have
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Order = Annotated[int, Field(ge=2, le=LONGEST_ORDER)]
RowRule = Literal["rowwise_adagrad", "rowwise_adam", "adam", "sgd"]  # how n-gram rows are updated: kernels/rows.py
KernelChoice = Literal["auto", "compile", "liger", "apex", "torch"]
LONGEST_NAME = 240  # bytes; file systems take 255, and files of a set or a checkpoint add endings


def _openable(path: str) -> str:
    """Check that a file system can store a path. Whether it exists is checked where it is opened."""
    longest = max(len(name.encode(errors="replace")) for name in path.split("/"))
    if longest > LONGEST_NAME:
        raise PydanticCustomError(
            "path",
            "has a name of {longest} bytes; the parts of a path have at most {most}",
            {"longest": longest, "most": LONGEST_NAME},
        )
    return path


Text = Annotated[str, Field(min_length=1, max_length=4095)]
FilePath = Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_openable)]  # Linux opens 4095 bytes
ScheduleKind = Literal["cosine", "wsd", "linear"]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]

# Choices that code below the configuration also names in its types.
NormPlacement = Literal["post", "pre"]
Combine = Literal["sum", "mean", "scaled"]
RopeScalingType = Literal["linear", "llama3", "yarn"]
Precision = Literal["bf16", "fp32"]
Recompute = Literal["none", "selective", "full"]


class RopeScalingConfig(Section):
    """Rotary angles for contexts longer than those of pretraining, on layers with full attention."""

    type: RopeScalingType = Field(description="how the frequencies change")
    factor: Annotated[float, Field(ge=1.0, le=LARGEST_FLOAT, allow_inf_nan=False)] = Field(
        description="how much longer the context is"
    )
    original_max_position_embeddings: Positive | None = Field(
        None, description="context of pretraining, in tokens; llama3 and yarn need it"
    )
    low_freq_factor: PositiveFloat | None = Field(
        None, description="llama3: wavelengths above the context over this are stretched by the whole factor; none = 1"
    )
    high_freq_factor: PositiveFloat | None = Field(
        None, description="llama3: wavelengths below the context over this stay; none = 4"
    )
    beta_fast: PositiveFloat | None = Field(
        None, description="yarn: rotations in the context above which a frequency stays; none = 32"
    )
    beta_slow: PositiveFloat | None = Field(
        None, description="yarn: rotations below which a frequency is stretched by the whole factor; none = 1"
    )
    attention_factor: PositiveFloat | None = Field(
        None, description="yarn: factor on the cosines and sines; none = 1 + 0.1 ln(factor)"
    )


class ModelConfig(Section):
    vocab_size: Annotated[
        int, Field(ge=2, le=LARGEST, description="V: input 1-grams and outputs; the tokenizer's size")
    ]
    hidden_size: Width = Field(description="d, the width of the residual stream")
    intermediate_size: Width = Field(description="width inside the SwiGLU feed-forward, or inside an expert")
    num_layers: Parts = Field(description="transformer blocks")
    num_attention_heads: Parts = Field(description="query heads")
    num_key_value_heads: Parts | None = Field(None, description="key/value heads; none = as many as query heads")
    head_size: Width | None = Field(None, description="width of a head; none = hidden_size / num_attention_heads")
    norm_placement: NormPlacement = Field(
        "post", description="norms after attention and feed-forward (OLMo2, Olmo3), or before (Llama, Olmoe)"
    )
    qk_norm: Literal["full", "none"] = Field(
        "full", description="RMSNorm over all heads of q and of k together (OLMo2, Olmo3, Olmoe), or none (Llama)"
    )
    sliding_window: Positive | None = Field(
        None,
        description="positions that a sliding layer sees, its own included; none = every layer uses full attention",
    )
    full_attention_interval: Positive | None = Field(
        None, description="with a sliding window: every N-th layer uses full attention (Olmo3: 4); none = none does"
    )
    attention_pattern: list[Literal["full", "sliding"]] | None = Field(
        None, description="instead of full_attention_interval: what each layer is"
    )
    rope_theta: PositiveFloat = Field(500000.0, description="base of the rotary angles")
    rope_scaling: RopeScalingConfig | None = Field(
        None, description="longer contexts, a section (type, factor, ...) as in transformers' rope_parameters"
    )
    norm_epsilon: PositiveFloat = Field(1e-6, description="added to the mean square in RMSNorm")
    tie_word_embeddings: bool = Field(False, description="use the 1-gram embedding as the output head")
    init_std: PositiveFloat = Field(0.02, description="deviation of the initial dense weights")
    num_experts: Parts | None = Field(None, description="experts of a feed-forward layer; none = a dense one")
    num_experts_per_token: Parts | None = Field(None, description="experts that each token goes to")
    normalize_expert_weights: bool = Field(False, description="make the weights of a token's experts sum to 1")
    router_aux_loss_weight: NonNegativeFloat = Field(0.01, description="weight of the load-balancing loss of experts")
    router_z_loss_weight: NonNegativeFloat = Field(0.0, description="weight of the router's log(Z)^2 in the objective")


class AddedTables(Section):
    """N-gram tables that a trained model got later (`overtok grow`): entries of over_encoding.added."""

    orders: list[Order] = Field(min_length=1, description="n-gram lengths that these tables hash")
    num_slices: Parts = Field(1, description="tables per order")
    table_rows: Rows = Field(description="m: rows of the first of them; table s of them has m + 2 s")
    frozen: bool = Field(False, description="their rows take no update")


class OverEncodingConfig(Section):
    enabled: bool = Field(False, description="add n-gram tables to the input embedding")
    ngram_order: Order = Field(3, description="n: orders 2..n are embedded")
    num_slices: Parts = Field(2, description="k: tables per order")
    table_rows: Rows | None = Field(None, description="m: rows of the first table; table s has m + 2 s")
    row_width: Width | None = Field(None, description="w: values per row; none = hidden_size / ((n - 1) k)")
    added: list[AddedTables] = Field([], description="tables beside these, of the same width; what `overtok grow` adds")
    frozen: bool = Field(False, description="rows of the tables above (not of added ones) take no update, no decay")
    combine: Combine = Field(
        "mean",
        description="e + o; (e + o) / (1 + B), the paper's pseudo-code; or e + o / (1 + B); B: tables without added ones",
    )
    word_embedding: bool = Field(
        True,
        description="whether the 1-gram embedding e is part of the input; false = n-grams alone, e = 0 in `combine`",
    )
    pad_id: NonNegative = Field(0, description="token that stands for missing history")
    boundary: Literal["reset", "ignore"] = Field("reset", description="whether n-grams stop at end-of-document tokens")
    hash_base: Annotated[int, Field(ge=2, le=LARGEST)] | None = Field(
        None, description="p of the n-gram id; none = vocab_size"
    )
    collision_check: Literal["error", "warn"] = Field(
        "error", description="what to do when table_rows / hash_base is close to an integer"
    )
    init_std: NonNegativeFloat = Field(0.02, description="deviation of the initial rows; 0 = rows begin at zero")
    dropout: Fraction | list[Fraction] = Field(
        0.0,
        description="share of look-ups that training drops; the others are scaled up. One number, or one per order from 2 on",
    )
    optimizer: RowRule = Field("rowwise_adagrad", description="row optimizer, touched rows only")
    learning_rate_factor: PositiveFloat | None = Field(
        None, description="rows' learning rate over the dense one; none = 10 with rowwise_adagrad, else 1"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled decay of touched rows")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), strict=False, description="adam's decay rates for rows")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment of rows")
    row_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "bfloat16", description="how rows are stored; int8 with a scale per row; below float32 rounded stochastically"
    )
    state_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="dtype of the row optimizer's state")
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="what gradients of rows travel in; rows travel in the model's precision"
    )
    storage: Literal["device", "host"] = Field(
        "device", description="where tables lie: beside the model, or in host memory, fetched a step ahead"
    )
    ranks_per_host: Positive | None = Field(
        None, description="exchange in two levels: within hosts of so many ranks, then across; none = in one"
    )


class TokenizerConfig(Section):
    type: Literal["sentencepiece", "hugging_face", "bytes"] = Field("sentencepiece", description="kind of tokenizer")
    path: FilePath | None = Field(
        None, description="tokenizer model file, or Hugging Face's tokenizer.json; none for bytes"
    )
    eod_token: Text | None = Field(
        None, description="token that ends documents; none = sentencepiece's </s>, Hugging Face's <|endoftext|>"
    )


class WeightedSet(Section):
    path: FilePath = Field(description="prefix of the set")
    weight: PositiveFloat = Field(description="share of the samples, at any scale")


def _named_sets(given: dict[Any, Any]) -> dict[Any, Any]:
    """Check names and prefixes of validation sets. Names are parts of metrics' names, so they have no slash and no space."""

    def refuse(problem: str) -> None:
        raise PydanticCustomError("named_sets", "{problem}", {"problem": problem})

    if not given:
        refuse("names no set; write name: prefix, or null for none")
    known: dict[str, str] = {}
    for name, prefix in given.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            refuse(f"has the name {name!r}; write one of letters, digits, _ and -")
        other = known.setdefault(normpath(prefix), name) if isinstance(prefix, str) else name
        if other != name:
            refuse(f"has {prefix} twice, as {other} and as {name}; remove one")
    return given


class DataConfig(Section):
    train: Annotated[
        Annotated[FilePath, Tag("<prefix>")] | Annotated[list[WeightedSet], Field(min_length=1), Tag("<sets>")],
        Discriminator(
            lambda value: "<sets>" if isinstance(value, list) else "<prefix>"
        ),  # an error is of one form alone
    ] = Field(description="prefix of the training set (PREFIX.bin, .idx, .json), or a list of {path, weight}")
    validation: Annotated[
        Annotated[FilePath | None, Tag("<prefix>")]
        | Annotated[dict[str, FilePath], BeforeValidator(_named_sets), Tag("<named>")],
        Discriminator(lambda value: "<named>" if isinstance(value, dict) else "<prefix>"),
    ] = Field(
        None,
        description="prefix of the validation set, or of several as a mapping name: prefix, each evaluated and reported "
        "as validation/NAME/loss; a file adds to the names of its base",
    )
    seq_length: Positive = Field(description="tokens per sample")
    shuffle_seed: Seed = Field(1234, description="seed of the order of samples")
    document_attention: Literal["across", "within"] = Field(
        "across", description="whether a token sees the documents before its own in a sample, or its own only"
    )


class ParallelConfig(Section):
    tensor_parallel_size: Positive = Field(1, description="ranks that split every layer")
    sequence_parallel: bool = Field(False, description="split norms and residuals along the sequence as well")
    pipeline_parallel_size: Positive = Field(1, description="stages over which the layers are spread")
    pipeline_partition: Literal["uniform", "parameters"] | list[NonNegative] = Field(
        "uniform", description="blocks per stage: as even as can be, by parameters, or the numbers themselves"
    )
    context_parallel_size: Positive = Field(1, description="ranks that split every sequence, for long ones")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(1, description="DeepSpeed's ZeRO stage, 0 to 3")
    offload_optimizer: Literal["none", "cpu"] = Field("none", description="where DeepSpeed keeps dense optimizer state")
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="what dense gradients travel in between ranks; bfloat16 halves the bytes and rounds them"
    )


class OptimizerConfig(Section):
    learning_rate: PositiveFloat = Field(description="peak learning rate of the dense weights")
    min_learning_rate: NonNegativeFloat = Field(0.0, description="learning rate at the end")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), strict=False, description="AdamW's decay rates")
    eps: PositiveFloat = Field(1e-8, description="AdamW's epsilon")
    weight_decay: NonNegativeFloat = Field(0.1, description="decoupled decay of matrices")
    schedule: ScheduleKind = Field("cosine", description="how the learning rate falls")
    warmup_iters: NonNegative = Field(0, description="steps of linear warm-up")
    decay_iters: Positive | None = Field(None, description="last steps over which wsd decays")
    gradient_clipping: NonNegativeFloat = Field(1.0, description="largest joint norm of all gradients; 0 = off")


class TrainingConfig(Section):
    output_directory: FilePath = Field(description="where the run writes everything")
    micro_batch_size: Positive = Field(description="sequences a rank handles at once")
    global_batch_size: Positive = Field(description="sequences per optimizer step")
    train_iters: Positive | None = Field(None, description="optimizer steps (or train_tokens)")
    train_tokens: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = Field(
        None, description="tokens in all, rounded up to whole steps (or train_iters)"
    )
    precision: Precision = Field("bf16", description="bf16 with float32 master weights, or fp32")
    seed: Seed = Field(1234, description="seed of the initial weights and rows")
    deterministic: bool = Field(False, description="only operators that give the same bits at every run, also on CUDA")
    train_only: Literal["heads"] | None = Field(
        None,
        description="heads: train only the heads for later tokens, while the main model's weights and rows stay as they are; "
        "none = train everything",
    )
    z_loss: NonNegativeFloat = Field(0.0, description="weight of log(Z)^2 in the objective")
    validation_interval: Positive | None = Field(None, description="steps between validations; always one at the end")
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="a step whose loss or gradient is not finite ends the run, or is left out: no weight, row or state "
        "changes, its samples go to skipped.jsonl, and the schedule and the data go on",
    )
    non_finite_limit: Positive = Field(10, description="steps left out in a row that end the run")
    weights_check_interval: Positive | None = Field(
        None,
        description="steps between comparisons of the dense weights over the ranks that should hold the same, by checksum; "
        "with one before each save, too; none = off, as always under ZeRO 3",
    )
    validation_batches: Positive | None = Field(
        None,
        description="evaluate, during training, only the first so many times global_batch_size samples of each validation set; "
        "none = all of it",
    )
    exit_after_minutes: PositiveFloat | None = Field(
        None,
        description="minutes after the start of its processes in which a run saves and leaves with exit code 75, to be "
        "started again; none = no limit",
    )
    resume: Literal["auto", "never"] = Field("auto", description="continue from the latest checkpoint if there is one")
    initial_checkpoint: FilePath | None = Field(
        None, description="run folder or checkpoint whose weights and rows a run without one of its own starts from"
    )
    initial_state: Literal["weights", "everything"] = Field(
        "weights",
        description="what a run takes from initial_checkpoint: weights alone, and it begins at step 0; or everything: "
        "optimizer state, step and position in the data too, as if that run went on with this configuration",
    )
    recompute: Recompute = Field(
        "none", description="what backward computes again: nothing, the core of attention, or whole blocks"
    )
    kernels: KernelChoice = Field(
        "auto",
        description="auto: compiled loops on CPU, passes fused by torch.compile on CUDA; compile: these on any device; "
        "liger, apex: auto with that package's kernels (CUDA only); torch: torch's operators only",
    )
    num_threads: Parts | None = Field(None, description="CPU threads per rank; none = cores divided by ranks")
    hang_timeout: NonNegativeFloat | None = Field(
        300.0,
        description="seconds that a step may take before its ranks count as hung and end: four times that for the first step "
        "and per batch of a validation, twelve times for the start, a save and the end; 0 or none = any time",
    )
    straggler_report_interval: Positive | None = Field(
        100,
        description="steps between reports on stragglers: which rank the others wait for, by how much, in which phase; "
        "none = off",
    )
    straggler_threshold: PositiveFloat = Field(
        0.05, description="a rank is named when it is late by more than this share of a step, and by more than 5 ms"
    )


class CheckpointConfig(Section):
    interval: Positive | None = Field(None, description="steps between checkpoints; always one at the end")
    keep_last: Positive | None = Field(None, description="how many to keep; none = all")
    keep_every: Positive | None = Field(None, description="checkpoints of steps that this divides are kept forever")
    asynchronous: bool = Field(True, description="write tables while training goes on")
    incremental: NonNegative = Field(
        0, description="saves between full ones that write only rows changed since the last"
    )


class LoggingConfig(Section):
    interval: Positive = Field(1, description="steps between reports")
    tensorboard: bool = Field(True, description="write TensorBoard events")
    progress_bar: Literal["auto", "on", "off"] = Field("auto", description="auto draws it on a terminal")
    trace_steps: list[Positive] = Field([], description="steps of which a profiler's trace is written, [first, last]")
    trace_ranks: list[NonNegative] = Field([0], description="ranks that write one")


class RunConfig(Section):
    """A whole run."""

    model: ModelConfig
    over_encoding: OverEncodingConfig = OverEncodingConfig()
    over_decoding: OverDecodingConfig = OverDecodingConfig()
    multi_token_prediction: MultiTokenPredictionConfig = MultiTokenPredictionConfig()
    tokenizer: TokenizerConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="raw DeepSpeed keys, merged with the derived ones"
    )
