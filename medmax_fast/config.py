"""One source of defaults: a frozen dataclass per command.

Each field is a command-line flag (`max_length` -> `--max-length`), a keyword of the Python API, and a line of the
settings written into every output folder. Fields without a default are required; `positional` ones have no dashes.
"""

from dataclasses import dataclass, field, fields

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "fp32", "bf16", "fp16")
PROTOCOLS = ("medmax-v1", "strict")
VQGAN = "vqgan.ckpt to use in place of what the checkpoint holds of it, so that a Hugging Face folder can draw"
SHARDS = "files of a checkpoint in the Chameleon layout, as Chameleon-30B has four (0: as many as the source had)"


def option(default, text: str, choices: tuple[str, ...] = (), off: str = "", positional: bool = False):
    """A flag with a default, its help text and, where it is one of a few words, the words.

    off: of a flag that is on or off, the name of its opposite (default: `no-` before its own).
    """
    return field(default=default, metadata={"help": text, "choices": choices, "off": off, "positional": positional})


def required(text: str, choices: tuple[str, ...] = (), positional: bool = False):
    """A flag that must be given."""
    return field(metadata={"help": text, "choices": choices, "positional": positional})


def settings_of(config, *names: str) -> dict:
    """The named fields of a config, for the settings file of an output folder."""
    known = {f.name for f in fields(config)}
    assert known.issuperset(names), set(names) - known
    return {name: getattr(config, name) for name in names}


@dataclass(frozen=True)
class InitConfig:
    """Make a random checkpoint in the Chameleon layout."""

    dir: str = required("folder to create", positional=True)
    size: str = option("tiny", "model size", ("tiny", "7b"))
    seed: int = option(0, "seed of the random weights")


@dataclass(frozen=True)
class DoctorConfig:
    """Say which accelerated paths are active, and what to install for those that are not."""

    json: bool = option(False, "print the JSON object only")


@dataclass(frozen=True)
class TokenizeConfig:
    """Turn images into VQGAN codes."""

    input: str = required("CSV, Parquet or JSONL with a column of paths, a folder of images, or a tar archive")
    ckpt: str = required("checkpoint folder, in either layout")
    output: str = required("folder for the code Parquet files")
    vqgan: str = option("", VQGAN)
    archive: str = option("", ".tar or .tar.gz, or its first part, in which the table's paths lie")
    image_key: str = option("", "column of image paths (default: img_path, else image_path)")
    alpha: str = option("whiten", "transparent pixels: blend over white, or drop alpha", ("whiten", "drop"))
    depth16: str = option(
        "pillow",
        "grey of more than 8 bits: cut off at 255 as published, scale 0..65535, or window by minimum and maximum",
        ("pillow", "scale", "window"),
    )
    decoder: str = option(
        "auto", "image decoder, with equal pixels (auto: DALI beside a GPU if installed)", ("auto", "pillow", "dali")
    )
    fast: bool = option(False, "decode with nvJPEG on the GPU, whose pixels differ a little", off="exact")
    precision: str = option(
        "auto",
        "arithmetic of the encoder (auto: tf32 on a GPU, fp32 on a CPU)",
        ("auto", "fp32", "tf32", "fp16", "bf16"),
    )
    batch_size: int = option(32, "images encoded at a time on a GPU")
    rows_per_shard: int = option(2048, "input rows per output file")
    workers: int = option(0, "loading threads (0: one per core)")
    max_rejected: str = option("0", "more rejected images than this, a count or a share such as 1%, give exit status 3")
    device: str = option("auto", "where the encoder runs", DEVICES)


@dataclass(frozen=True)
class DecodeConfig:
    """Turn codes back into pictures."""

    input: str = required("code Parquet file, or a folder of them")
    ckpt: str = required("checkpoint folder")
    output: str = required("folder for the PNG files")
    vqgan: str = option("", VQGAN)
    batch_size: int = option(4, "pictures decoded at a time")
    device: str = option("auto", "where the decoder runs", DEVICES)


@dataclass(frozen=True)
class BuildConfig:
    """Turn rows of text and images into a token store for training."""

    input: str = required("rows as JSONL or Parquet: text, image_path, image_tokens, tokens, task, source")
    ckpt: str = required("checkpoint folder (its tokenizer is used)")
    output: str = required("store folder, or the JSONL file with --format jsonl")
    codes: str = option("", "folder made by `medmax tokenize`, joined by image path")
    format: str = option("store", "memory-mapped store, or JSONL with tokens", ("store", "jsonl"))
    workers: int = option(0, "threads that turn rows into ids (0: one per core); the output does not depend on it")
    max_rejected: int | None = option(
        None,
        "rows that may be rejected before exit status 3; when given, malformed rows are rejected as well instead "
        "of ending the run with status 2 (default: malformed rows end it, none may lack codes)",
    )


@dataclass(frozen=True)
class InspectConfig:
    """Describe a token store (lengths, packing, rows that look wrong) or a checkpoint (sizes, parts, checksums)."""

    path: str = required("store or checkpoint folder", positional=True)
    output: str = option("", "of a store: folder for its figures and suspicious.jsonl (default: the store itself)")


ROWS = ("none", "image", "all")


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a checkpoint on a token store with DeepSpeed. @FILE reads flags from a file (see examples/recipes)."""

    data: str = required("token store")
    ckpt: str = required("base checkpoint, in either layout")
    output: str = required("run folder")
    full: bool = option(False, "train all weights instead of a LoRA adapter")
    freeze: str = option(
        "", "with --full: weights left as they are, patterns of names such as *.layers.0.*, comma-separated"
    )
    lora_rank: int = option(16, "LoRA rank (0: no adapter, only what --head and --embeddings name)")
    lora_alpha: float = option(16.0, "LoRA alpha (scale = alpha / rank)")
    lora_dropout: float = option(0.05, "LoRA dropout")
    lora_targets: str = option(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "modules with an adapter, comma-separated"
    )
    head: str = option("none", "rows of the output head trained too: of image codes, boi and eoi, or all", ROWS)
    embeddings: str = option("none", "rows of the input embeddings trained too, as --head", ROWS)
    epochs: int = option(3, "passes over the store")
    max_steps: int = option(0, "stop after this many optimizer steps (0: all epochs)")
    pack_length: int = option(4096, "ids per pack; a pack holds whole rows only")
    max_length: int = option(4096, "most ids of a row")
    too_long: str = option(
        "skip",
        "longer rows: leave out, or cut at the end, never inside an image nor down to the prompt (both are reported)",
        ("skip", "cut"),
    )
    labels: str = option(
        "first-eot",
        "what the loss counts: all after the first eot as published, the assistant's turns, or every id",
        ("first-eot", "per-turn", "all"),
    )
    packs_per_step: int = option(8, "packs per optimizer step over all ranks (the global batch)")
    lr: float = option(1e-4, "peak learning rate")
    warmup_ratio: float = option(0.1, "share of the steps with rising learning rate")
    weight_decay: float = option(0.0, "AdamW weight decay")
    clip: float = option(1.0, "gradient norm limit (0: none)")
    z_loss: float = option(0.0, "weight of the squared log-partition added to the loss (PaLM: 1e-4)")
    optimizer: str = option("adamw", "AdamW, or with its state in 8 bits (bitsandbytes)", ("adamw", "adamw8bit"))
    seed: int = option(0, "seed of order, adapter and dropout")
    precision: str = option("auto", "arithmetic (auto: bf16 on a GPU, fp32 on a CPU)", DTYPES)
    zero: int = option(2, "DeepSpeed ZeRO stage, 0 to 3")
    offload: str = option(
        "none",
        "kept in CPU memory: the optimizer's state, or with --zero 3 all weights too",
        ("none", "optimizer", "all"),
    )
    bucket_size: int = option(500_000_000, "elements that ZeRO reduces or gathers at a time")
    recompute: str = option(
        "none",
        "activations computed again in the backward pass: all but large products and attention, or whole layers",
        ("none", "selective", "layers"),
    )
    deepspeed_config: str = option("", "JSON file whose entries override the built DeepSpeed configuration")
    validation: str = option("", "token store whose loss is measured, per task and source")
    validate_every: int = option(0, "steps between validations (0: only after the last)")
    save_every: int = option(500, "steps between resumable checkpoints (0: only after the last)")
    keep: int = option(2, "newest checkpoints that are kept")
    log_every: int = option(1, "steps between lines of metrics.jsonl; the loss is read, and checked, only then")
    track: str = option("", "also log to these: tensorboard, wandb")
    device: str = option("auto", "where to train", DEVICES)


@dataclass(frozen=True)
class MergeConfig:
    """Put a LoRA adapter, or what a DeepSpeed folder holds, into its base checkpoint."""

    ckpt: str = required("base checkpoint, in either layout")
    adapter: str = required("adapter folder, the run folder that holds it, or a DeepSpeed folder (ZeRO or universal)")
    output: str = required("checkpoint folder to create")
    to: str = option("base", "layout to write (base: that of the base)", ("base", "hf", "chameleon"))
    dtype: str = option("base", "dtype to write (base: that of the base)", ("base", "fp32", "bf16", "fp16"))
    shards: int = option(0, SHARDS)
    vqgan: str = option("", VQGAN)


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint to the other layout."""

    input: str = required("checkpoint folder")
    output: str = required("checkpoint folder to create")
    to: str = required("layout to write", ("hf", "chameleon"))
    shards: int = option(0, SHARDS)
    vqgan: str = option("", VQGAN)
    average_qk_norm: bool = option(False, "average query/key norms that differ between heads (lossy)")


@dataclass(frozen=True)
class ScoreConfig:
    """Summed cross-entropy of each row over its supervised ids, no id masked."""

    ckpt: str = required("checkpoint folder")
    input: str = required("JSONL or Parquet with `tokens`, or a token store")
    output: str = required("JSONL file to write")
    max_length: int = option(2048, "rows are cut to this many ids, as in the published training (cuts are counted)")
    pack_length: int = option(4096, "ids scored at a time")
    precision: str = option("fp32", "arithmetic", DTYPES)
    device: str = option("auto", "where the model runs", DEVICES)


@dataclass(frozen=True)
class GenerateConfig:
    """Generate text, pictures or both."""

    ckpt: str = required("checkpoint folder")
    vqgan: str = option("", VQGAN)
    prompts: str = option("", "JSONL: id and content (or token_ids) per line")
    output: str = option("", "folder for outputs.jsonl and the pictures (needed with --prompts)")
    prompt: str = option("", "one prompt, answered on the terminal")
    image: str = option("", "image put before --prompt")
    mode: str = option("text", "what may be generated", ("text", "image", "any"))
    eot: bool = option(True, "append the end-of-turn id to `content` prompts")
    greedy: bool = option(False, "take the likeliest id instead of sampling")
    temperature: float = option(1.0, "of text")
    top_p: float = option(0.9, "of text")
    repetition_penalty: float = option(1.2, "of text, over the whole sequence")
    image_temperature: float = option(0.7, "of image ids")
    image_top_p: float = option(0.9, "of image ids")
    guidance_text: float = option(3.0, "weight of the full prompt against its images alone")
    guidance_image: float = option(1.2, "weight of the prompt's images against no prompt")
    max_new_tokens: int = option(1024, "text ids per stretch of text (starts afresh after an image)")
    max_length: int = option(4096, "prompt and output together")
    batch_size: int = option(16, "prompts generated at a time, as far as the cache has room for them")
    preview: bool = option(False, "show each picture while it is being drawn, as NAME.preview.png")
    seed: int = option(0, "of sampling; each prompt has random numbers of its own, from (seed, id)")
    precision: str = option("auto", "arithmetic (auto: bf16 on a GPU, fp32 on a CPU)", DTYPES)
    quantize: str = option("none", "8-bit weights by torchao; answers change", ("none", "int8", "fp8"))
    cache_gb: float = option(0.0, "GB for keys and values (0: three quarters of the memory that is free)")
    device: str = option("auto", "where the model runs", DEVICES)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model on the MedMax evaluation folder. Keys of servers are read from the environment."""

    data: str = required("folder with one Parquet (or JSONL) of questions beside images/")
    output: str = required("folder for samples.jsonl, results.json and pictures")
    ckpt: str = option("", "checkpoint folder (native backend)")
    vqgan: str = option("", VQGAN)
    backend: str = option(
        "native", "what answers: our engine, a Hugging Face model, or a server", ("native", "hf", "openai")
    )
    model: str = option("", "with --backend hf: folder or hub name; with openai: the server's name of the model")
    api_url: str = option("", "server of --backend openai (default: OPENAI_BASE_URL, or OpenAI); key: OPENAI_API_KEY")
    tasks: str = option("", "task ids such as vqa_rad_closed, comma-separated (default: all that the data holds)")
    limit: int = option(0, "questions per task (0: all)")
    protocol: str = option("medmax-v1", "scoring rules; both are computed, this one is put first", PROTOCOLS)
    prompt_form: str = option(
        "auto",
        "how questions are put (auto: tuned for our engine, chat for others); base is for models without tuning",
        ("auto", "tuned", "base", "chat"),
    )
    max_new_tokens: int = option(0, "bound of every answer in text (0: as published, per task)")
    judge: str = option("none", "what judges open answers (none: only compared word by word)", ("none", "openai"))
    judge_model: str = option("gpt-4o-mini-2024-07-18", "the judge; name a snapshot, so that it stays the same")
    judge_url: str = option(
        "",
        "server of the judge (default: OPENAI_BASE_URL, or OpenAI); key: MEDMAX_JUDGE_API_KEY or OPENAI_API_KEY",
    )
    judge_prompts: str = option("", "YAML or JSON file with other words for the judge: accuracy, relative")
    clip: str = option(
        "auto",
        "image-text encoder: biomedclip, an open_clip or transformers model (hub name or folder), none "
        "(auto: biomedclip if open_clip is installed)",
    )
    fid: str = option(
        "none",
        "FID and KID of generated pictures too, on features of --clip or of Inception",
        ("none", "clip", "inception"),
    )
    budget: float = option(0.0, "US dollars that servers may cost, what the run has cost before included (0: no limit)")
    price: str = option("", "of --model in dollars per million ids, IN,OUT (known for OpenAI's)")
    judge_price: str = option("", "of --judge-model, as --price")
    concurrency: int = option(8, "requests to a server at a time")
    batch_size: int = option(32, "questions answered at a time")
    batch_tokens: int = option(65536, "ids of a batch, after which answers are saved; images are counted once")
    precision: str = option("auto", "arithmetic (auto: bf16 on a GPU, fp32 on a CPU)", DTYPES)
    device: str = option("auto", "where the model runs", DEVICES)


@dataclass(frozen=True)
class _ForUsers:
    """What `serve` and `demo` have in common; each has its own values of port, batch_size and waiting."""

    ckpt: str = required("checkpoint folder")
    vqgan: str = option("", VQGAN)
    host: str = option("127.0.0.1", "address to listen on; another one than this is open to the network")
    port: int = option(0, "port to listen on (0: any that is free)")
    batch_size: int = option(8, "requests answered at a time")
    waiting: int = option(32, "requests that may wait beside them")
    max_upload_mb: float = option(20.0, "most MB of an image")
    max_pixels: float = option(50.0, "most millions of pixels of an image")
    precision: str = option("auto", "arithmetic (auto: bf16 on a GPU, fp32 on a CPU)", DTYPES)
    quantize: str = option("none", "8-bit weights by torchao; answers change", ("none", "int8", "fp8"))
    cache_gb: float = option(0.0, "GB for keys and values (0: three quarters of the memory that is free)")
    device: str = option("auto", "where the model runs", DEVICES)


@dataclass(frozen=True)
class ServeConfig(_ForUsers):
    """Answer the OpenAI chat-completions protocol over HTTP, with text and pictures in and out."""

    port: int = option(8000, "port to listen on (0: any that is free)")
    batch_size: int = option(16, "requests answered at a time")
    waiting: int = option(64, "requests that may wait beside them; more are refused with status 429")
    name: str = option("", "the model's name for clients (default: that of the checkpoint's folder)")


@dataclass(frozen=True)
class DemoConfig(_ForUsers):
    """Open a web page to chat about images and to have pictures drawn."""

    port: int = option(7860, "port to listen on (0: any that is free)")
    waiting: int = option(32, "requests that may wait beside them; more are turned away")
    share: bool = option(False, "publish the page through a tunnel of Gradio's, for anyone who has the link")
    auth: bool = option(False, "ask for a name and a password: MEDMAX_AUTH in the environment, as name:password")


@dataclass(frozen=True)
class BenchConfig:
    """Measure a suite of benchmarks in a checkout, each stage after the tests that guard it."""

    stages: tuple[str, ...] = option((), "stages to run (default: all of the suite)", positional=True)
    suite: str = option("auto", "what to measure (auto: gpu where there is one)", ("auto", "cpu", "gpu"))
    dry: bool = option(False, "tiny sizes on the CPU, interpreted kernels: shows that it runs, not how fast")
    output: str = option("", "folder for benchmark.json, table.md, roofline.png and the log (default: none are kept)")
    limit: float = option(0.0, "seconds after which no stage is begun and the running one is stopped (0: none)")


@dataclass(frozen=True)
class ReportConfig:
    """Render evaluation, training and benchmark runs as Markdown and HTML, beside the published rows."""

    runs: tuple[str, ...] = required("evaluation, training, benchmark or store folders", positional=True)
    output: str = required("folder for report.md and report.html")
    title: str = option("medmax_fast report", "heading of the report")
