"""What stands between a stage's floor and its time: for roofline.md, by the stages of `medmax bench --suite gpu`."""

GAPS = {
    "vq": (
        "the floor is the one fp16 product of the screen. Above it: keeping a running best two per latent, the "
        "measuring of norms and rounding losses, and the fp32 search of the latents left undecided, which tensor "
        "cores do not help (6 % of independent normal ones: as many FLOP as 0.06 of the product, at about 1/15 of its "
        "rate)."
    ),
    "remap": (
        "one read, one write. Above it: the range check ends in a transfer of a few bytes to the host, a wait of some "
        "microseconds a call whatever the size."
    ),
    "resample": (
        "the floor counts source pixels and results once. Above it: the intermediate rows, written and read once "
        "more, and a load from the caches for every tap (11 at 1 megapixel) where the floor has one."
    ),
    "group_norm": (
        "the statistics need all of a group before its first value can be normalised: the floor reads a picture twice "
        "where it is larger than the L2 cache, else once. Above it: a batch of smaller pictures is read twice too, as "
        "the first launch goes through all of it. What is added up before is written by the launch that takes the "
        "statistics."
    ),
    "norm_rope": (
        "one read, one write; cosines and sines come from the L2 cache. Above it: the sums over a head within a warp; "
        "backward with a trained affine part the slots of its sums."
    ),
    "rms_norm": (
        "one read, one write. Above it: a row's sum has to be whole before its first value is written, which other "
        "programs on the multiprocessor must hide."
    ),
    "swiglu": ("two reads, one write and nothing else; the exponential is far from the limit of the units for it."),
    "lora": (
        "the two wide products, forward and back, and the adapter's four narrow ones. Above it: the result and its "
        "gradient once more for each narrow product, the input twice more with its mask made on the way, and the "
        "gradient of the input read and written once more."
    ),
    "loss": (
        "the first shape is the kernel alone, bound by bytes; the others have the products of the supervised ids with "
        "the head, forward and back, as their floor. Above it: logits in chunks of 256 MiB, written by the product, "
        "read twice and written once by the kernel, read by the next product; with few supervised ids the products "
        "are small and the launches show."
    ),
    "norm_rope_store": (
        "decoding has few tokens: the floor is below the time of a launch, which a CUDA graph shortens but does not "
        "remove."
    ),
    "paged_attention": (
        "keys and values once. Above it: with few streams the second launch that adds up their shares; pages are 64 "
        "positions, so that a stream's reads are long but scattered."
    ),
    "sampling": ("the logits once. Above it: passes over the row in the L2 cache until top-p has its threshold."),
    "collate": (
        "on a GPU the floor is a large copy from pinned memory, 24 bytes an id. Above it: writing the pack on the "
        "host, 26 bytes an id, which a thread does for the next pack meanwhile, and the launch of three small copies."
    ),
    "encoder": (
        "the floor is the convolutions' products. Above it: between two of them GroupNorm and SiLU, which also add "
        "biases and residuals (8 reads and writes of all values a block, beside the 4 of its convolutions), and the "
        "first layers, whose 128 channels leave tensor cores short of work."
    ),
    "tokenize": (
        "end to end: reading, decoding and resizing on CPU cores beside the encoder; the slowest stage sets the rate, "
        "and the shares of time in the result say which it is."
    ),
    "text": (
        "a step reads all weights and the keys and values of its streams. Above it: launches within the CUDA graph, "
        "and layers whose products are too small to fill the memory's pipeline."
    ),
    "pictures": ("as text, with two streams a picture for guidance; more pictures share the same read of the weights."),
    "vqa": (
        "a prefill: products of 1,000 ids and more a question. Above it: attention, norms, and reading the weights "
        "where one question comes alone."
    ),
    "train": (
        "the products at 4 N FLOP an id. Above it: attention, norms, the adapter's narrow products, the optimizer, "
        "and what is computed again where activations are not kept."
    ),
    "full": (
        "the products at 6 N FLOP an id. Above it: attention, norms, and the optimizer, which goes through weights, "
        "gradients and two moments once a step."
    ),
    "short_rows": (
        "the products, which do not depend on where rows end. Above it: attention, of which short rows have less, in "
        "more and smaller pieces."
    ),
    "start": (
        "the files once, at the rate of the disk as measured in the same run. Above it: starting Python and CUDA, "
        "importing torch, building the vocabulary, and capturing the first graph; pages of mapped files are read by "
        "the thread that copies them."
    ),
    "compile": (
        "no floor: one kernel after the other goes through Triton's compiler and the assembler, once for each set of "
        "constants, and lies in a cache on the disk from then on."
    ),
}
